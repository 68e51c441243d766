package observe

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type upstreamVecs struct {
	queries   *prometheus.CounterVec
	responses *prometheus.CounterVec
	errors    *prometheus.CounterVec
	duration  *prometheus.HistogramVec
}

func newUpstreamVecs() upstreamVecs {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
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
	}
}

// Server counts the exchanges with one upstream server of one group.
type Server struct {
	queries   prometheus.Counter
	duration  prometheus.Observer
	responses *prometheus.CounterVec // by rcode
	errors    *prometheus.CounterVec // by kind
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
	s.responses.WithLabelValues(rcodeLabel(rcode)).Inc()
	s.duration.Observe(max(d, 0).Seconds())
}
