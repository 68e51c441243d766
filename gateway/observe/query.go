package observe

import (
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// bounds are the upper bounds of the latency buckets. A hit takes microseconds and a miss milliseconds; 5 s is beyond
// the default deadline of a group.
var bounds = [...]time.Duration{
	10 * time.Microsecond, 25 * time.Microsecond, 50 * time.Microsecond,
	100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	1 * time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond,
	10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	1 * time.Second, 2500 * time.Millisecond, 5 * time.Second,
}

// bucketSeconds returns bounds as Prometheus has them.
func bucketSeconds() []float64 {
	s := make([]float64, len(bounds))
	for i, b := range bounds {
		s[i] = b.Seconds()
	}
	return s
}

// The RCODEs with a series of their own: 0 to 11 are where they are, RFC 6895, section 2.3 and RFC 8490, section 10.2.
const (
	rcodeBadVers   = 12 + iota
	rcodeBadCookie // RFC 7873, section 8
	rcodeOther
	rcodeNone // nothing was sent
	numRcodes
)

var rcodeNames = [numRcodes]string{"NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED", "YXDOMAIN",
	"YXRRSET", "NXRRSET", "NOTAUTH", "NOTZONE", "DSOTYPENI", "BADVERS", "BADCOOKIE", "other", "none"}

func rcodeClass(rcode uint16) int {
	switch {
	case rcode <= 11:
		return int(rcode)
	case rcode == 16:
		return rcodeBadVers
	case rcode == 23:
		return rcodeBadCookie
	}
	return rcodeOther
}

const (
	// stripes is how many copies of a transport's counters there are: one for each goroutine that reads queries, which a
	// listener has one a core of. More than this many share.
	stripes = 16
	// hitSample is how many hits there are for one whose duration is wanted. To read the clock takes as long as all the rest
	// of the counting, and about as long as finding the answer; quantiles and means of a sample are those of the whole.
	hitSample = 16
)

// stripe is one copy of a transport's counters. The padding keeps the next stripe off its last cache line; 128 bytes
// because processors fetch lines in pairs.
type stripe struct {
	queries [numOutcomes][numRcodes]atomic.Uint64
	latency [2]histogram // of Hit and Miss
	_       [128]byte
}

type histogram struct {
	buckets [len(bounds) + 1]atomic.Uint64
	sum     atomic.Int64 // nanoseconds
}

func (h *histogram) observe(d time.Duration) {
	i := 0
	for i < len(bounds) && d > bounds[i] {
		i++
	}
	h.buckets[i].Add(1)
	h.sum.Add(int64(d))
}

// Transport counts the queries of one transport.
type Transport struct {
	name    string
	stripes [stripes]stripe
}

// Transport returns the handle of the transport with that name, the same for the same name. Ask for it once, not for
// each query.
func (m *Metrics) Transport(name string) *Transport {
	name = validLabel(name)
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.transports[name]
	if t == nil {
		t = &Transport{name: name}
		m.transports[name] = t
	}
	return t
}

// Query counts one query that ended with outcome and rcode (the extended RCODE, 12 bits). The rcode of a dropped query means
// nothing. Lane is any number; goroutines with different ones seldom share a cache line. It reports whether Took should be
// told how long the query took: for every miss, and for the first of every 16 hits. It does not allocate.
func (t *Transport) Query(lane uint8, outcome Outcome, rcode uint16) (timed bool) {
	if outcome >= numOutcomes {
		return false
	}
	class := rcodeClass(rcode)
	if outcome == Dropped {
		class = rcodeNone
	}
	n := t.stripes[lane%stripes].queries[outcome][class].Add(1)
	return outcome == Miss || outcome == Hit && n%hitSample == 1
}

// Queries returns how many queries, over all transports, ended with outcome.
func (m *Metrics) Queries(outcome Outcome) (n uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, t := range m.transports {
		for i := range t.stripes {
			for rcode := range t.stripes[i].queries[outcome] {
				n += t.stripes[i].queries[outcome][rcode].Load()
			}
		}
	}
	return n
}

// Took takes note of the time that a query took for which Query said that it wants to know. It does not allocate.
func (t *Transport) Took(lane uint8, outcome Outcome, d time.Duration) {
	if outcome <= Miss {
		t.stripes[lane%stripes].latency[outcome].observe(max(d, 0)) // a clock that was set back must not make the sum fall
	}
}

var (
	queriesTotal  = desc("dnsgateway_queries_total", "Queries of clients.", "transport", "outcome", "rcode")
	queryDuration = desc("dnsgateway_query_duration_seconds",
		"Time from reading a query to having its response: of every miss, and of one in 16 answers from the cache.", "transport", "outcome")
)

// queryCollector adds up the stripes at scrape time.
type queryCollector struct{ m *Metrics }

// Describe implements prometheus.Collector.
func (c queryCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- queriesTotal
	ch <- queryDuration
}

// Collect implements prometheus.Collector. Of the many combinations of outcome and RCODE it shows those that have
// occurred, and successful hits and misses from the start, so that a rate over them exists.
func (c queryCollector) Collect(ch chan<- prometheus.Metric) {
	c.m.mu.Lock()
	transports := make([]*Transport, 0, len(c.m.transports))
	for _, t := range c.m.transports {
		transports = append(transports, t)
	}
	c.m.mu.Unlock()
	for _, t := range transports {
		for o := range numOutcomes {
			for r := range numRcodes {
				var n uint64
				for i := range t.stripes {
					n += t.stripes[i].queries[o][r].Load()
				}
				if n > 0 || o <= Miss && r == 0 {
					ch <- prometheus.MustNewConstMetric(queriesTotal, prometheus.CounterValue, float64(n),
						t.name, outcomeNames[o], rcodeNames[r])
				}
			}
		}
		for o := range Miss + 1 {
			ch <- t.histogram(o)
		}
	}
}

// histogram adds up the stripes of one histogram. The count is the sum of the buckets, so that the two always agree,
// whatever is counted meanwhile.
func (t *Transport) histogram(o Outcome) prometheus.Metric {
	var sum int64
	var count uint64
	buckets := make(map[float64]uint64, len(bounds))
	for b := range len(bounds) + 1 {
		for i := range t.stripes {
			count += t.stripes[i].latency[o].buckets[b].Load()
		}
		if b < len(bounds) {
			buckets[bounds[b].Seconds()] = count
		}
	}
	for i := range t.stripes {
		sum += t.stripes[i].latency[o].sum.Load()
	}
	return prometheus.MustNewConstHistogram(queryDuration, count, time.Duration(sum).Seconds(), buckets,
		t.name, outcomeNames[o])
}

// validLabel makes s a label value that Prometheus takes: names come from the operator's file, which may hold anything.
func validLabel(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

// rcodeLabel returns the name of rcode as dig prints it; "other" for those without, as a server could send all 4096.
func rcodeLabel(rcode int) string {
	if rcode < 0 || rcode > 0xfff {
		return rcodeNames[rcodeOther]
	}
	return rcodeNames[rcodeClass(uint16(rcode))]
}
