package statuspage

import (
	"fmt"
	"math"
	"time"
)

var noon = time.Date(2026, 11, 24, 14, 10, 30, 0, time.UTC)

func ago(d time.Duration) time.Time { return noon.Add(-d) }

// moments are a history of as many seconds, with something happening.
func moments(n int, scale, refused float64) (list []Moment) {
	for i := range n {
		x := float64(i) / 12
		m := Moment{At: ago(time.Duration(n-i) * 5 * time.Second)}
		m.Open = scale * (3 + math.Sin(x/2) + math.Sin(x*3)/3)
		m.New = scale * (1 + math.Sin(x)) / 3
		m.Received, m.Sent = m.New*4000, m.New*90_000
		if i > n-60 {
			m.Refused = refused
		}
		list = append(list, m)
	}
	return list
}

func backend(address string, change ...func(*Backend)) Backend {
	b := Backend{
		Address: address, Configured: true, Available: true, Health: "up", HealthSince: ago(26 * time.Hour), Checked: ago(3 * time.Second),
		State: "ready", Weight: 1, EffectiveWeight: 1, Open: 41,
		Total: Traffic{Connections: 120_345, Errors: 3, Received: 34_000_000, Sent: 5_600_000_000},
		Pace:  &Pace{Connections: 12.4, Received: 48_000, Sent: 1_200_000},
	}
	for _, c := range change {
		c(&b)
	}
	return b
}

func down(b *Backend) {
	b.Health, b.Available, b.HealthSince = "down", false, ago(8*time.Minute+12*time.Second)
	b.CheckError = "dial tcp " + b.Address + ": connect: connection refused"
	b.ConnectError, b.ConnectAt = b.CheckError, ago(8*time.Minute+14*time.Second)
	b.Open, b.Pace = 0, &Pace{}
}

func pool(name string, backends ...Backend) Pool {
	return Pool{
		Name: name, Configured: true, Policy: "round_robin", Checks: "tcp every 10s", Connections: 123, MaxConnections: 5000,
		Total:    Traffic{Connections: 361_035, Errors: 9, Retries: 4, Received: 102_000_000, Sent: 16_800_000_000},
		Backends: backends, History: moments(240, 40, 0),
	}
}

func page(pools ...Pool) *Page {
	return &Page{
		Host: "lb-1", At: noon, Started: ago(77 * time.Hour), Loaded: ago(3 * time.Hour), Every: 5 * time.Second, Window: 20 * time.Minute,
		Files: 1840, MaxFiles: 260_000, Pools: pools,
	}
}

// troubled is a page of a bad night.
func troubled() *Page {
	orders := pool("orders", backend("10.0.0.1:5432", down), backend("10.0.0.2:5432", down), backend("10.0.0.3:5432", func(b *Backend) {
		b.State, b.StateSince, b.Available, b.EffectiveWeight = "drain", ago(40*time.Minute), false, 0
		b.Open, b.Pace = 7, &Pace{}
	}))
	orders.Outage = &Outage{Since: ago(8*time.Minute + 10*time.Second), TurnedAway: 1412}
	orders.Refused = []Refusal{{Reason: "no_backend", Recent: 1412, Total: 1500}, {Reason: "client_closed", Recent: 3, Total: 3, ByClient: true}}
	orders.Waiting, orders.Patience, orders.Connections = 12, 5*time.Second, 19
	orders.History = moments(240, 10, 4.2)
	web := pool("web", backend("web1.internal:8080", func(b *Backend) {
		b.MaxConnections, b.Open, b.Connecting, b.Available = 100, 100, 0, true
	}), backend("web2.internal:8080", func(b *Backend) {
		b.EjectedUntil, b.Available = noon.Add(7*time.Second), false
		b.ConnectError, b.ConnectAt = "dial tcp web2.internal:8080: i/o timeout", ago(4*time.Second)
		b.Total.Errors, b.Pace.Errors = 311, 2.4
	}), backend("web3.internal:8080", func(b *Backend) {
		b.Source, b.Weight, b.EffectiveWeight, b.MaxConnections, b.Open = "a web.internal 8080", 3, 1.2, 100, 33
		b.HealthSince = ago(30 * time.Second)
	}), backend("[2001:db8::17]:8080", func(b *Backend) {
		b.Backup, b.Open, b.Health, b.HealthSince, b.Checked = true, 0, "unchecked", time.Time{}, time.Time{}
	}), backend("web9.internal:8080", func(b *Backend) {
		b.Configured, b.Available, b.Weight, b.EffectiveWeight, b.Open = false, false, 0, 0, 5
		b.DrainUntil = noon.Add(18 * time.Second)
	}))
	web.Policy, web.Checks = "least_conn", "http /healthz every 5s"
	web.Connections = 4720
	web.Sources = []Source{{Name: "a web.internal 8080", Backends: 1, Failing: ago(3 * time.Minute), Error: "lookup web.internal on 10.0.0.53:53: read udp: i/o timeout"}}
	return page(orders, web, pool("cache", backend("10.0.4.1:6379"), backend("10.0.4.2:6379")), Pool{
		Name: "old", Connections: 2, DrainUntil: noon.Add(9 * time.Second),
		Backends: []Backend{backend("10.9.0.1:80", func(b *Backend) { b.Configured, b.Available, b.Open = false, false, 2 })},
	})
}

// quiet is a page on which nothing is wrong.
func quiet() *Page { return page(pool("web", backend("10.0.0.1:8080"), backend("10.0.0.2:8080"))) }

// many is a page of one pool with that many backends, of which every hundredth is
// down.
func many(n int) *Page {
	p := pool("web")
	for i := range n {
		b := backend(fmt.Sprintf("10.0.%d.%d:8080", i/250, i%250))
		if i%100 == 7 {
			down(&b)
		}
		b.MaxConnections = 1000
		p.Backends = append(p.Backends, b)
	}
	return page(p)
}
