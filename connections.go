package tcplb

import (
	"cmp"
	"net/http"
	"slices"
	"strconv"
	"time"

	"go.uber.org/zap"
)

// connectionStatus is one open connection as the admin API shows it.
type connectionStatus struct {
	LB            string    `json:"lb"`
	Client        string    `json:"client"`
	Backend       string    `json:"backend"`
	Since         time.Time `json:"since"`          // when it reached tcp_lb
	Age           float64   `json:"age"`            // seconds since then
	Idle          float64   `json:"idle"`           // seconds without a byte either way, as exactly as is known
	ReceivedBytes uint64    `json:"received_bytes"` // from the client
	SentBytes     uint64    `json:"sent_bytes"`     // to the client
}

// defaultListed is how many connections an answer has, unless it is said.
const defaultListed = 100

// totalHeader says how many connections matched, of which the answer may have
// the first only.
const totalHeader = "X-Total-Count"

var connectionFilters = []string{"lb", "address", "client"}

// serveConnections lists open connections, and cuts them.
func serveConnections(w http.ResponseWriter, r *http.Request) error {
	kill := r.Method == http.MethodDelete
	if !kill && !isRead(r) {
		return methodNotAllowed(w, r, "GET, HEAD, DELETE")
	}
	q, err := parseConnectionQuery(r, kill)
	if err != nil {
		return err
	}
	now := time.Now()
	found, total := q.find(now)
	if kill && total == 0 {
		return noneMatched("connection")
	}
	list := make([]connectionStatus, len(found))
	for i, f := range found {
		list[i] = f.status(now)
	}
	if kill {
		killSessions(found)
	}
	w.Header().Set(totalHeader, strconv.Itoa(total))
	return sendJSON(w, list)
}

// killSessions cuts them, and says so once for each pool.
func killSessions(found []foundSession) {
	pools := make(map[*pool]int)
	for _, f := range found {
		f.s.end(reasonKilled)
		pools[f.s.pool]++
	}
	for p, n := range pools {
		p.logger().Info("connections are cut by hand", zap.String("lb", p.name), zap.Int("connections", n))
	}
}

// connectionQuery says which connections are meant, and in which order.
type connectionQuery struct {
	backendFilter
	client clientFilter
	key    func(s *session, now time.Time) int64 // the highest come first
	limit  int                                   // 0 = all
}

// connectionOrders are the values of sort.
var connectionOrders = map[string]func(s *session, now time.Time) int64{
	"age":  func(s *session, now time.Time) int64 { return int64(now.Sub(s.began)) },
	"idle": func(s *session, _ time.Time) int64 { return int64(s.relay.Idle()) },
	"bytes": func(s *session, _ time.Time) int64 {
		received, sent := s.relay.Moved()
		return int64(received + sent)
	},
}

// parseConnectionQuery reads the request's query. Who kills has to say which, and
// means all of them unless there is a limit.
func parseConnectionQuery(r *http.Request, kill bool) (q connectionQuery, err error) {
	set, err := parameters(r, slices.Concat(connectionFilters, []string{"sort", "limit"})...)
	if err != nil {
		return q, err
	}
	filtered := slices.ContainsFunc(connectionFilters, func(name string) bool { return set[name] != "" })
	if kill && !filtered {
		return q, badRequest("which connections? want lb, address or client")
	}
	if q.backendFilter, err = parseBackendFilter(set); err != nil {
		return q, err
	}
	if q.client, err = parseClientFilter(set["client"]); err != nil {
		return q, err
	}
	order := cmp.Or(set["sort"], "age")
	if q.key = connectionOrders[order]; q.key == nil {
		return q, badRequest("%s", unknown("sort", order, []string{"age", "bytes", "idle"}, nil))
	}
	listed := defaultListed
	if kill {
		listed = 0
	}
	q.limit, err = parseLimit(set["limit"], listed)
	return q, err
}

// foundSession is an open session with its place in the order.
type foundSession struct {
	s   *session
	key int64
}

// find returns the open connections that match, as many as are wanted, and how
// many there are. Those that come or go meanwhile may be among them.
func (q connectionQuery) find(now time.Time) (found []foundSession, total int) {
	for _, p := range registry.snapshot() {
		for _, b := range p.backends {
			if !q.backendFilter.matches(p.name, b) {
				continue
			}
			b.visitSessions(func(some []*session) {
				for _, s := range some {
					if q.client.matches(s.from) {
						found = append(found, foundSession{s, q.key(s, now)})
					}
				}
			})
		}
	}
	slices.SortFunc(found, func(a, b foundSession) int {
		return cmp.Or(cmp.Compare(b.key, a.key), a.s.began.Compare(b.s.began))
	})
	total = len(found)
	if q.limit > 0 && total > q.limit {
		found = found[:q.limit]
	}
	return found, total
}

// sessionsAtOnce is how many are looked at before others may have the mutex.
const sessionsAtOnce = 256

// visitSessions calls f with the open sessions, some at a time and without holding
// the mutex: connects and ends need it. One that is open all the while is among
// them once.
func (b *Backend) visitSessions(f func(some []*session)) {
	some := make([]*session, 0, sessionsAtOnce)
	b.mu.Lock()
	c := b.sessions.cursor()
	b.mu.Unlock()
	defer func() { // also of a panic: f may ask somebody's net.Addr
		b.mu.Lock()
		c.end()
		b.mu.Unlock()
	}()
	for {
		b.mu.Lock()
		some = c.take(some[:0])
		b.mu.Unlock()
		if len(some) == 0 {
			return
		}
		f(some)
	}
}

func (f foundSession) status(now time.Time) connectionStatus {
	c := connectionStatus{
		LB:      f.s.pool.name,
		Backend: f.s.backend.address,
		Since:   f.s.began.UTC(),
		Age:     seconds(now.Sub(f.s.began)),
		Idle:    seconds(f.s.relay.Idle()),
	}
	if f.s.from != nil {
		c.Client = f.s.from.String()
	}
	c.ReceivedBytes, c.SentBytes = f.s.relay.Moved()
	return c
}

// seconds returns d to the millisecond; 0 for what began just after a look at the
// clock.
func seconds(d time.Duration) float64 {
	return float64(max(d, 0).Milliseconds()) / 1000
}
