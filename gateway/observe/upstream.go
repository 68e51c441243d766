package observe

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type upstreamVecs struct {
	queries   *prometheus.CounterVec
	responses *prometheus.CounterVec
	errors    *prometheus.CounterVec
	duration  *prometheus.HistogramVec
	hedges    *prometheus.CounterVec
	hedgeWins *prometheus.CounterVec
	state     *prometheus.GaugeVec
	conns     *prometheus.GaugeVec
}

func newUpstreamVecs() upstreamVecs {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	gauge := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
	}
	return upstreamVecs{
		queries: counter("dnsgateway_upstream_queries_total",
			"Queries sent to an upstream server, answered or not.", "group", "server"),
		responses: counter("dnsgateway_upstream_responses_total",
			"Responses of an upstream server.", "group", "server", "rcode"),
		errors: counter("dnsgateway_upstream_errors_total",
			"Queries to which an upstream server gave no response that could be used.", "group", "server", "kind"),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "dnsgateway_upstream_query_duration_seconds",
			Help:    "Time until an upstream server's response, of those queries that got one.",
			Buckets: bucketSeconds(),
		}, []string{"group", "server"}),
		hedges: counter("dnsgateway_upstream_hedges_total",
			"Queries sent to an upstream server because another one was late.", "group", "server"),
		hedgeWins: counter("dnsgateway_upstream_hedge_wins_total",
			"Those of them whose answer came first.", "group", "server"),
		state: gauge("dnsgateway_upstream_state",
			"1 for the state that an upstream server is in: unknown, ok, suspect (being probed) or failing (left alone).",
			"group", "server", "state"),
		conns: gauge("dnsgateway_upstream_connections", "Open connections to an upstream server.", "group", "server"),
	}
}

// upstreamStates are the values of the label state.
var upstreamStates = []string{"unknown", "ok", "suspect", "failing"}

func (v *upstreamVecs) all() []prometheus.Collector {
	return []prometheus.Collector{v.queries, v.responses, v.errors, v.duration, v.hedges, v.hedgeWins, v.state, v.conns}
}

// Server counts the exchanges with one upstream server of one group.
type Server struct {
	queries   prometheus.Counter
	duration  prometheus.Observer
	responses *prometheus.CounterVec // by rcode
	errors    *prometheus.CounterVec // by kind
	hedges    prometheus.Counter
	hedgeWins prometheus.Counter
	conns     prometheus.Gauge
	states    []prometheus.Gauge // in the order of upstreamStates

	byRcode [16]atomic.Pointer[prometheus.Counter] // of responses, once they were needed
}

// Server returns the handle of a server (its URL as written) in a group, the same for the same names. Ask for it once,
// not for each exchange.
func (m *Metrics) Server(group, server string) *Server {
	group, server = validLabel(group), validLabel(server)
	m.mu.Lock()
	defer m.mu.Unlock()
	key := [2]string{group, server}
	s := m.servers[key]
	if s == nil {
		labels := prometheus.Labels{"group": group, "server": server}
		s = &Server{
			queries:   m.upstream.queries.With(labels),
			duration:  m.upstream.duration.With(labels),
			responses: m.upstream.responses.MustCurryWith(labels),
			errors:    m.upstream.errors.MustCurryWith(labels),
			hedges:    m.upstream.hedges.With(labels),
			hedgeWins: m.upstream.hedgeWins.With(labels),
			conns:     m.upstream.conns.With(labels),
		}
		states := m.upstream.state.MustCurryWith(labels)
		for _, state := range upstreamStates {
			s.states = append(s.states, states.WithLabelValues(state))
		}
		m.servers[key] = s
	}
	return s
}

// Done counts one exchange. kind is "" when there was a response, with rcode, after d; else it is the kind of error
// (such as "connect", "tls", "timeout", "mismatch"), one of a fixed set, never a message, and rcode means nothing.
func (s *Server) Done(d time.Duration, rcode int, kind string) {
	s.queries.Inc()
	if kind != "" {
		s.errors.WithLabelValues(validLabel(kind)).Inc()
		return
	}
	s.response(rcode).Inc()
	s.duration.Observe(max(d, 0).Seconds())
}

// response returns the counter for rcode. The usual ones are looked up among all labels once.
func (s *Server) response(rcode int) prometheus.Counter {
	if rcode < 0 || rcode >= len(s.byRcode) {
		return s.responses.WithLabelValues(rcodeLabel(rcode))
	}
	if c := s.byRcode[rcode].Load(); c != nil {
		return *c
	}
	c := s.responses.WithLabelValues(rcodeLabel(rcode))
	s.byRcode[rcode].Store(&c)
	return c
}

// Hedge counts a query that the server is sent because another one is late.
func (s *Server) Hedge() { s.hedges.Inc() }

// HedgeWon counts an answer to such a query that came first.
func (s *Server) HedgeWon() { s.hedgeWins.Inc() }

// State says that the server is in state now, one of unknown, ok, suspect and failing.
func (s *Server) State(state string) {
	for i, name := range upstreamStates {
		v := 0.0
		if name == state {
			v = 1
		}
		s.states[i].Set(v)
	}
}

// Connections counts connections that were opened, or closed where delta is negative.
func (s *Server) Connections(delta int) { s.conns.Add(float64(delta)) }
