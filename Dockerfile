# Caddy with tcp_lb, and the demo backend.
FROM golang:1.26.8-alpine3.23 AS build
WORKDIR /src
# Modules are downloaded anew only when these two change.
COPY go.mod go.sum ./
RUN go mod download
# What the build reads and nothing more: a change of a Caddyfile builds nothing.
COPY *.go ./
COPY cmd cmd/
COPY checks checks/
COPY discovery discovery/
COPY internal internal/
# Caddy's own tags: without drivers that only its ACME server would use.
RUN CGO_ENABLED=0 go build -trimpath -ldflags '-w -s' -tags nobadger,nomysql,nopgx -o /out/caddy ./cmd/caddy

# Alpine, for the wget of the health check.
FROM alpine:3.23.4
RUN adduser -D -H -u 1000 caddy && \
	mkdir -p /config /data && \
	chown caddy:caddy /config /data
COPY --from=build /out/caddy /usr/bin/caddy
COPY docker/balancer/Caddyfile /etc/caddy/Caddyfile
COPY docker/backend/Caddyfile /etc/caddy-backend/Caddyfile
# Where Caddy keeps its last config, and certificates.
ENV XDG_CONFIG_HOME=/config XDG_DATA_HOME=/data
USER caddy
EXPOSE 8080 9090
# Whether the process lives, by its admin endpoint. Whether it can serve is another
# question, that of tcp_lb_health: a balancer without backends is no better for a
# restart. A container without the admin endpoint needs another check.
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s --retries=3 \
	CMD ["wget", "-q", "-O", "/dev/null", "http://127.0.0.1:2019/tcp_lb/pools"]
ENTRYPOINT ["caddy"]
CMD ["run", "--config", "/etc/caddy/Caddyfile"]
