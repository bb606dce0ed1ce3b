// Package tcplb is a TCP load balancer for Caddy.
//
// It registers layer4.handlers.tcp_lb, a terminal handler of the caddy-l4 app
// that relays a TCP connection to one of several backends; tcp_lb, the app that
// checks the backends' health while a config runs; http.handlers.tcp_lb_health,
// a health endpoint; and admin.api.tcp_lb, which lists the backends on Caddy's
// admin endpoint. Package discovery has the sources of backends that come and go.
package tcplb
