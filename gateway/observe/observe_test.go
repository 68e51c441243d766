package observe

import (
	"bytes"
	"flag"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func newMetrics(t testing.TB) *Metrics {
	t.Helper()
	m, err := New(prometheus.NewRegistry(), "1.2.3")
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// exposition returns what a scrape of m sees.
func exposition(t testing.TB, m *Metrics) string {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler(nil).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != 200 {
		t.Fatalf("scrape: status %d: %s", w.Code, w.Body)
	}
	return w.Body.String()
}

// ours returns the lines about the gateway's own metrics, without the buckets and with the Go version normalised.
func ours(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if !strings.Contains(line, "dnsgateway_") || strings.Contains(line, "_bucket{") {
			continue
		}
		if strings.Contains(line, "goversion=") {
			line = "dnsgateway_build_info{goversion=\"go\",version=\"1.2.3\"} 1\n"
		}
		b.WriteString(line)
	}
	return b.String()
}

// query counts a query, and its duration if that is wanted.
func query(t *Transport, o Outcome, rcode uint16, d time.Duration) {
	if t.Query(1, o, rcode) {
		t.Took(1, o, d)
	}
}

// fill gives every metric a value.
func fill(m *Metrics) {
	udp := m.Transport("udp")
	query(udp, Hit, 0, 20*time.Microsecond)
	query(udp, Hit, 0, 20*time.Microsecond)
	query(udp, Miss, 3, 20*time.Millisecond)
	query(udp, Local, 16, time.Microsecond)
	query(udp, Refused, 5, time.Microsecond)
	query(udp, Dropped, 5, time.Microsecond) // the rcode of what was not sent is not shown
	query(udp, Limited, 0, time.Microsecond)
	query(udp, Miss, 4095, -time.Second) // a clock that was set back
	query(udp, numOutcomes, 0, time.Second)
	query(m.Transport("dot"), Miss, 23, 10*time.Second)

	s := m.Server("default", "tls://192.0.2.1#dns.example")
	s.Done(10*time.Millisecond, 0, "")
	s.Done(10*time.Millisecond, 3, "")
	s.Done(time.Second, 200, "")
	s.Done(0, -1, "") // a caller's mistake
	s.Done(time.Second, -1, "timeout")
	m.WatchCache(func() CacheStats { return CacheStats{1, 2, 3, 4, 5, 6, 7} })
	m.WatchInflight(func() InflightStats { return InflightStats{Now: 7, Max: 8, Shed: 5, Unsent: 9} })
	m.WatchSnapshot(func() SnapshotStats {
		return SnapshotStats{Saved: time.Unix(1750000000, 250e6), Took: 1500 * time.Millisecond, Entries: 9, Bytes: 990, Failures: 10}
	})
	m.WatchListeners(func() []ListenerStats {
		return []ListenerStats{{"a", "tcp", 1}, {"a", "tcp", 2}, {"b", "dot", 4}}
	})
}

func TestExposition(t *testing.T) {
	m := newMetrics(t)
	fill(m)
	got := ours(exposition(t, m))
	golden := filepath.Join("testdata", "metrics.txt")
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(got, string(want)); d != "" {
		t.Errorf("exposition (-got +want, rewrite by -update):\n%s", d)
	}
}

func TestExpositionLint(t *testing.T) {
	m := newMetrics(t)
	fill(m)
	problems, err := promlint.New(strings.NewReader(exposition(t, m))).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestRuntimeMetrics(t *testing.T) {
	text := exposition(t, newMetrics(t))
	for _, name := range []string{"go_goroutines ", "process_start_time_seconds "} {
		if !strings.Contains(text, "\n"+name) {
			t.Errorf("no %sin the exposition", name)
		}
	}
	for _, state := range []string{"dnsgateway_cache_", "dnsgateway_snapshot_", "dnsgateway_inflight_"} {
		if strings.Contains(text, state) {
			t.Errorf("%s without a source:\n%s", state, ours(text))
		}
	}
}

// TestLabels holds the promise that no client and no name can become a label.
func TestLabels(t *testing.T) {
	m := newMetrics(t)
	fill(m)
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	allowed := []string{"transport", "outcome", "rcode", "listener", "group", "server", "kind", "state", "version", "goversion"}
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "dnsgateway_") {
			continue
		}
		for _, metric := range f.GetMetric() {
			for _, l := range metric.GetLabel() {
				if !slices.Contains(allowed, l.GetName()) {
					t.Errorf("%s has a label %q", f.GetName(), l.GetName())
				}
			}
		}
	}
}

func TestNewRefusals(t *testing.T) {
	if _, err := New(nil, "1"); err == nil {
		t.Error("no registry: no error")
	}
	reg := prometheus.NewRegistry()
	if _, err := New(reg, "1"); err != nil {
		t.Fatal(err)
	}
	if _, err := New(reg, "1"); err == nil {
		t.Error("a registry twice: no error")
	}
}

func TestHandlesAreTheSame(t *testing.T) {
	m := newMetrics(t)
	if first, second := m.Transport("udp"), m.Transport("udp"); first != second {
		t.Error("two handles for one transport")
	}
	if first, second := m.Server("g", "s"), m.Server("g", "s"); first != second {
		t.Error("two handles for one server")
	}
}

// TestForeignLabels feeds what the operator's file may hold by mistake.
func TestForeignLabels(t *testing.T) {
	m := newMetrics(t)
	query(m.Transport("\xff"), Hit, 0, 0)
	m.Server("\xff", "\"\n\xfe").Done(0, 0, "\xff")
	m.WatchListeners(func() []ListenerStats { return []ListenerStats{{"\xff", "tcp", 1}, {"\xfe", "tcp", 1}} })
	text := exposition(t, m)
	if want := "dnsgateway_connections{listener=\"\uFFFD\",transport=\"tcp\"} 2\n"; !strings.Contains(text, want) {
		t.Errorf("no %q in:\n%s", want, ours(text))
	}
}

func TestWatchNil(t *testing.T) {
	m := newMetrics(t)
	fill(m)
	m.WatchCache(nil)
	m.WatchSnapshot(nil)
	m.WatchInflight(nil)
	m.WatchListeners(nil)
	text := exposition(t, m)
	for _, name := range []string{"dnsgateway_cache_", "dnsgateway_snapshot_", "dnsgateway_inflight_", "dnsgateway_connections"} {
		if strings.Contains(text, name) {
			t.Errorf("%s is still there", name)
		}
	}
}

// TestSnapshotBeforeTheFirst has nothing saved yet: no year 1754, which the zero time would be.
func TestSnapshotBeforeTheFirst(t *testing.T) {
	m := newMetrics(t)
	m.WatchSnapshot(func() SnapshotStats { return SnapshotStats{} })
	if text := exposition(t, m); !strings.Contains(text, "\ndnsgateway_snapshot_last_success_timestamp_seconds 0\n") {
		t.Errorf("want 0 before the first save:\n%s", ours(text))
	}
}

func TestHistogramBuckets(t *testing.T) {
	m := newMetrics(t)
	for _, d := range []time.Duration{0, 10 * time.Microsecond, 10*time.Microsecond + 1, 5 * time.Second, 5*time.Second + 1} {
		query(m.Transport("udp"), Miss, 0, d) // of which each is timed
	}
	text := exposition(t, m)
	for _, c := range []struct {
		le   string
		want int
	}{{"1e-05", 2}, {"2.5e-05", 3}, {"2.5", 3}, {"5", 4}, {"+Inf", 5}} {
		line := fmt.Sprintf("dnsgateway_query_duration_seconds_bucket{outcome=\"miss\",transport=\"udp\",le=%q} %d\n", c.le, c.want)
		if !strings.Contains(text, line) {
			t.Errorf("no line %s", line)
		}
	}
}

// TestNothingIsLost counts from many goroutines while others scrape.
func TestNothingIsLost(t *testing.T) {
	m := newMetrics(t)
	udp := m.Transport("udp")
	const workers, each = 8, 2000
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range each {
				query(udp, Hit, 0, 30*time.Microsecond)
			}
		})
	}
	for range 10 {
		exposition(t, m)
	}
	wg.Wait()
	text := exposition(t, m)
	for _, want := range []string{
		fmt.Sprintf("dnsgateway_queries_total{outcome=\"hit\",rcode=\"NOERROR\",transport=\"udp\"} %d\n", workers*each),
		fmt.Sprintf("dnsgateway_query_duration_seconds_count{outcome=\"hit\",transport=\"udp\"} %d\n", workers*each/hitSample),
		"dnsgateway_query_duration_seconds_sum{outcome=\"hit\",transport=\"udp\"} 0.03\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in:\n%s", want, ours(text))
		}
	}
}

func TestQueryAllocations(t *testing.T) {
	udp := newMetrics(t).Transport("udp")
	if n := testing.AllocsPerRun(1000, func() { query(udp, Hit, 0, 30*time.Microsecond) }); n != 0 {
		t.Errorf("Query: %v allocs, want 0", n)
	}
}

func TestServerAllocations(t *testing.T) {
	s := newMetrics(t).Server("default", "tls://192.0.2.1")
	if n := testing.AllocsPerRun(1000, func() { s.Done(time.Millisecond, 0, "") }); n != 0 {
		t.Errorf("Done: %v allocs, want 0", n)
	}
}

func TestOutcomeString(t *testing.T) {
	if got := Limited.String(); got != "limited" {
		t.Errorf("got %q, want limited", got)
	}
	if got := numOutcomes.String(); got != "unknown" {
		t.Errorf("got %q, want unknown", got)
	}
}

func TestHandlerTellsErrors(t *testing.T) {
	m := newMetrics(t)
	bad := prometheus.NewDesc("dnsgateway_bad", "Cannot be gathered.", nil, nil)
	m.registry.MustRegister(invalidCollector{bad})
	var log bytes.Buffer
	w := httptest.NewRecorder()
	m.Handler(slog.New(slog.NewTextHandler(&log, nil))).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != 200 || !strings.Contains(w.Body.String(), "go_goroutines") {
		t.Errorf("status %d, want 200 with the rest", w.Code)
	}
	if !strings.Contains(log.String(), "level=WARN") || !strings.Contains(log.String(), "no source") {
		t.Errorf("log: %q, want a warning", log.String())
	}
}

type invalidCollector struct{ d *prometheus.Desc }

func (c invalidCollector) Describe(ch chan<- *prometheus.Desc) { ch <- c.d }
func (c invalidCollector) Collect(ch chan<- prometheus.Metric) {
	ch <- prometheus.NewInvalidMetric(c.d, fmt.Errorf("no source"))
}

func BenchmarkQuery(b *testing.B) {
	udp := newMetrics(b).Transport("udp")
	b.Run("one", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			query(udp, Hit, 0, 30*time.Microsecond)
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				query(udp, Hit, 0, 30*time.Microsecond)
			}
		})
	})
}

func BenchmarkScrape(b *testing.B) {
	m := newMetrics(b)
	fill(m)
	b.ReportAllocs()
	for b.Loop() {
		exposition(b, m)
	}
}
