// Package observe is the gateway's instruments: every metric's name and labels in one place, and the logger's set-up.
//
// It knows nothing of DNS messages, pipelines or listeners. The others tell it small numbers and strings, or it asks
// them through functions when it is scraped; package gateway does the wiring. No client's address and no queried name
// ever becomes a label: labels are transports, RCODEs, outcomes, listeners, groups and servers,
// all of which the operator's file or this package bounds.
//
// What surprises a newcomer: the metrics of the hot path are not prometheus.Counter but striped atomics, which a
// collector adds up at scrape time, so that two cores that answer from the cache do not share a cache line.
package observe

import (
	"errors"
	"log/slog"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Outcome is what became of a client's query.
type Outcome uint8

// The outcomes.
const (
	Hit     Outcome = iota // answered from the cache
	Miss                   // resolved by an upstream
	Local                  // the gateway's own answer or error
	Refused                // the client may not ask
	Dropped                // nothing was sent back
	Limited                // the client asked too often
	Stale                  // answered with what was known before
	numOutcomes
)

var outcomeNames = [numOutcomes]string{"hit", "miss", "local", "refused", "dropped", "limited", "stale"}

// String returns the outcome as it stands in the label.
func (o Outcome) String() string {
	if o < numOutcomes {
		return outcomeNames[o]
	}
	return "unknown"
}

// Event is something that happens to questions on their way upstream.
type Event uint8

// The events.
const (
	Coalesced Event = iota // a query waited for the answer to the same question of another one
	Prefetch               // the gateway asked of itself, to renew an answer in the cache
	Shed                   // a question was given up for a newer one: there were too many
	numEvents
)

var eventDescs = [numEvents]*prometheus.Desc{
	Coalesced: desc("dnsgateway_coalesced_total", "Queries that waited for the answer to the same question of another one."),
	Prefetch:  desc("dnsgateway_prefetches_total", "Questions that the gateway asked to renew an answer in the cache."),
	Shed:      desc("dnsgateway_shed_total", "Questions that were given up because too many newer ones came."),
}

// Count counts e. It does not allocate.
func (m *Metrics) Count(e Event) { m.events[e].Add(1) }

// eventCollector shows how often each event was.
type eventCollector struct{ m *Metrics }

// Describe implements prometheus.Collector.
func (c eventCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range eventDescs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c eventCollector) Collect(ch chan<- prometheus.Metric) {
	for e, d := range eventDescs {
		n := c.m.events[e].Load()
		if f := c.m.inflight.Load(); f != nil && Event(e) == Shed {
			n += (*f)().Shed
		}
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n))
	}
}

// CacheStats is the cache as it is seen at one moment. The counters only grow; Hits, Stale and Misses are all queries that it was
// asked for.
type CacheStats struct {
	Entries, Bytes, MaxBytes       int64
	Hits, Stale, Misses, Evictions uint64
}

// SnapshotStats are the saves of the cache to its file. All but Failures is about the last one that went well, and zero before
// the first.
type SnapshotStats struct {
	Saved    time.Time // when it was done
	Took     time.Duration
	Entries  int
	Bytes    int64  // the file's size
	Failures uint64 // saves that went wrong; only grows
}

// ListenerStats is one listener on one transport as it is seen at one moment.
type ListenerStats struct {
	Listener  string // its name in the file
	Transport string // as in Metrics.Transport
	Open      int    // open connections
}

// InflightStats are the cache misses that are being resolved at one moment, and their bound.
type InflightStats struct {
	Now, Max int
	// Shed is how many were given up by listeners, before they were counted as an Event.
	Shed uint64
	// Unsent is how many were resolved, but their answers were given up because too many others waited to be sent.
	Unsent uint64
}

// Metrics holds all metrics of one gateway. All methods may be called at once from many goroutines.
type Metrics struct {
	registry *prometheus.Registry
	upstream upstreamVecs

	events [numEvents]atomic.Uint64

	mu         sync.Mutex
	transports map[string]*Transport
	servers    map[[2]string]*Server

	cache     atomic.Pointer[func() CacheStats]
	snapshot  atomic.Pointer[func() SnapshotStats]
	listeners atomic.Pointer[func() []ListenerStats]
	inflight  atomic.Pointer[func() InflightStats]
}

// New registers the gateway's metrics, the Go runtime's and the process's with reg, which must be new to all of them.
// version is the program's, for dnsgateway_build_info.
func New(reg *prometheus.Registry, version string) (*Metrics, error) {
	if reg == nil {
		return nil, errors.New("metrics need a registry")
	}
	m := &Metrics{
		registry:   reg,
		upstream:   newUpstreamVecs(),
		transports: make(map[string]*Transport),
		servers:    make(map[[2]string]*Server),
	}
	build := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name:        "dnsgateway_build_info",
		Help:        "Always 1; the labels say which program runs.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()},
	}, func() float64 { return 1 })
	var errs []error
	for _, c := range append(m.upstream.all(),
		build, queryCollector{m}, eventCollector{m}, stateCollector{m},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	) {
		errs = append(errs, reg.Register(c))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return m, nil
}

// Handler serves the registry in the Prometheus text and OpenMetrics formats. What cannot be gathered is left out and
// the rest is still served; logger, which may be nil, is told.
func (m *Metrics) Handler(logger *slog.Logger) http.Handler {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(logger.Handler(), slog.LevelWarn),
		ErrorHandling:       promhttp.ContinueOnError,
		MaxRequestsInFlight: 4,
		Timeout:             10 * time.Second,
		EnableOpenMetrics:   true,
	})
}

// WatchCache makes f the source of the cache's metrics. f is called at each scrape, perhaps by several at once; nil
// takes the metrics away.
func (m *Metrics) WatchCache(f func() CacheStats) { store(&m.cache, f, f == nil) }

// WatchSnapshot makes f the source of the metrics of saves. f is called at each scrape, perhaps by several at once; nil takes
// the metrics away.
func (m *Metrics) WatchSnapshot(f func() SnapshotStats) { store(&m.snapshot, f, f == nil) }

// WatchListeners makes f the source of the open connections. f is called at each scrape, perhaps by several at once;
// nil takes the metric away. Entries with the same listener and transport are added up.
func (m *Metrics) WatchListeners(f func() []ListenerStats) { store(&m.listeners, f, f == nil) }

// WatchInflight makes f the source of the number of misses in flight. f is called at each scrape, perhaps by several at
// once; nil takes the metrics away.
func (m *Metrics) WatchInflight(f func() InflightStats) { store(&m.inflight, f, f == nil) }

func store[F any](p *atomic.Pointer[F], f F, remove bool) {
	if remove {
		p.Store(nil)
		return
	}
	p.Store(&f)
}

var (
	cacheEntries   = desc("dnsgateway_cache_entries", "Answers in the cache.")
	cacheBytes     = desc("dnsgateway_cache_bytes", "Memory that the cached answers take.")
	cacheMaxBytes  = desc("dnsgateway_cache_max_bytes", "Memory that cached answers may take.")
	cacheHits      = desc("dnsgateway_cache_hits_total", "Queries that were answered with a live answer of the cache.")
	cacheStale     = desc("dnsgateway_cache_stale_total", "Queries that were answered with a stale answer of the cache.")
	cacheMisses    = desc("dnsgateway_cache_misses_total", "Queries that upstreams answered, or nobody.")
	cacheEvictions = desc("dnsgateway_cache_evictions_total", "Answers thrown out to make room.")
	connections    = desc("dnsgateway_connections", "Open client connections.", "listener", "transport")
	inflightNow    = desc("dnsgateway_inflight_misses", "Cache misses being resolved.")
	inflightMax    = desc("dnsgateway_inflight_misses_max", "Cache misses that may be resolved at once.")
	unsent         = desc("dnsgateway_unsent_answers_total", "Answers over UDP that were given up because too many others waited to be sent.")

	snapshotSaved    = desc("dnsgateway_snapshot_last_success_timestamp_seconds", "When a snapshot of the cache was last saved, in Unix time; 0: not yet.")
	snapshotTook     = desc("dnsgateway_snapshot_duration_seconds", "Time that it took to save the last snapshot of the cache.")
	snapshotEntries  = desc("dnsgateway_snapshot_entries", "Answers in the last snapshot of the cache.")
	snapshotBytes    = desc("dnsgateway_snapshot_bytes", "Size of the last snapshot of the cache.")
	snapshotFailures = desc("dnsgateway_snapshot_failures_total", "Snapshots of the cache that could not be saved.")
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

// stateCollector shows the state of the others, asked at scrape time.
type stateCollector struct{ m *Metrics }

// Describe implements prometheus.Collector.
func (c stateCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{cacheEntries, cacheBytes, cacheMaxBytes, cacheHits, cacheStale, cacheMisses, cacheEvictions,
		connections, inflightNow, inflightMax, unsent,
		snapshotSaved, snapshotTook, snapshotEntries, snapshotBytes, snapshotFailures} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c stateCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v))
	}
	if f := c.m.cache.Load(); f != nil {
		s := (*f)()
		gauge(cacheEntries, float64(s.Entries))
		gauge(cacheBytes, float64(s.Bytes))
		gauge(cacheMaxBytes, float64(s.MaxBytes))
		counter(cacheHits, s.Hits)
		counter(cacheStale, s.Stale)
		counter(cacheMisses, s.Misses)
		counter(cacheEvictions, s.Evictions)
	}
	if f := c.m.snapshot.Load(); f != nil {
		s := (*f)()
		saved := 0.0
		if !s.Saved.IsZero() {
			saved = float64(s.Saved.UnixMilli()) / 1000
		}
		gauge(snapshotSaved, saved)
		gauge(snapshotTook, s.Took.Seconds())
		gauge(snapshotEntries, float64(s.Entries))
		gauge(snapshotBytes, float64(s.Bytes))
		counter(snapshotFailures, s.Failures)
	}
	if f := c.m.inflight.Load(); f != nil {
		s := (*f)()
		gauge(inflightNow, float64(s.Now))
		gauge(inflightMax, float64(s.Max))
		counter(unsent, s.Unsent)
	}
	if f := c.m.listeners.Load(); f != nil {
		open := make(map[[2]string]int)
		for _, l := range (*f)() {
			open[[2]string{validLabel(l.Listener), validLabel(l.Transport)}] += l.Open
		}
		for labels, n := range open {
			gauge(connections, float64(n), labels[:]...)
		}
	}
}
