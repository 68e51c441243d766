package pipeline

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"dnsgateway/gateway/cache"
	"dnsgateway/gateway/wire"

	"github.com/miekg/dns"
)

// counting is an upstream whose answers have the time to live ttl, and say how often version was raised before they were asked
// for; they take d. It answers NXDOMAIN to what begins with "no.".
func counting(version *atomic.Int64, d time.Duration, ttl uint32) exchange {
	return func(_ context.Context, req *dns.Msg) (*dns.Msg, error) {
		v := version.Load()
		if d > 0 {
			time.Sleep(d)
		}
		name := req.Question[0].Name
		if len(name) > 3 && name[:3] == "no." {
			m := new(dns.Msg).SetRcode(req, dns.RcodeNameError)
			m.Ns = []dns.RR{mustRR(fmt.Sprintf("test. %d IN SOA ns.test. hostmaster.test. %d 2 3 4 60", ttl, v))}
			return m, nil
		}
		m := new(dns.Msg).SetReply(req)
		m.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: ttl}, Txt: []string{fmt.Sprint(v)}}}
		return m, nil
	}
}

// versionOf returns what counting says in m.
func versionOf(t *testing.T, m *dns.Msg) (v int64) {
	t.Helper()
	switch {
	case len(m.Answer) == 1:
		fmt.Sscan(m.Answer[0].(*dns.TXT).Txt[0], &v)
	case len(m.Ns) == 1:
		v = int64(m.Ns[0].(*dns.SOA).Serial)
	default:
		t.Errorf("no answer:\n%v", m)
	}
	return v
}

func wireName(t *testing.T, name string) []byte {
	t.Helper()
	n, err := wire.ParseName(name)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestFlushUnderWay flushes while a question is under way: whoever waits for it gets its answer, with TTLs as they should be; whoever
// comes after it has an answer of his own, and so does who comes when all are there.
func TestFlushUnderWay(t *testing.T) {
	for _, tt := range []struct {
		asked, flushed string
		below, want    bool
	}{
		{"one.test.", "one.test", false, true},
		{"One.test.", "one.test", true, true},
		{"one.test.", "test", true, true},
		{"one.test.", ".", true, true},
		{"one.test.", "test", false, false},
		{"one.test.", ".", false, false},
		{"one.test.", "xone.test", true, false},
		{"one.test.", "two.test", true, false},
		{"no.test.", "x.y.no.test", false, true},
		{"no.test.", "x.y.no.test", true, true},
		{"no.test.", "no.test", false, true},
		{"no.test.", "xno.test", false, false},
	} {
		for _, size := range []int64{cache.MinBytes, 0} {
			t.Run(fmt.Sprint(tt, size > 0), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var version atomic.Int64
					config := Config{Now: time.Now, Groups: []Group{{Upstream: counting(&version, time.Second, 1000)}}}
					if size > 0 {
						var err error
						if config.Cache, err = cache.New(cache.Config{MaxBytes: size, MaxTTL: 100 * time.Second}); err != nil {
							t.Fatal(err)
						}
					}
					p := mustNew(t, config)
					var wg sync.WaitGroup
					ask := func(want int64) {
						wg.Go(func() {
							m := resolve(t, t.Context(), p, wire.TCP, dig(tt.asked, dns.TypeTXT))
							if got := versionOf(t, m); got != want {
								t.Errorf("got version %d, want %d", got, want)
							}
							for _, rr := range append(m.Answer, m.Ns...) {
								if ttl := rr.Header().Ttl; size > 0 && ttl > 100 {
									t.Errorf("version %d has a TTL of %d, want at most 100", want, ttl)
								}
							}
						})
						time.Sleep(100 * time.Millisecond)
					}
					ask(0)
					ask(0)
					version.Add(1)
					p.Flush(wireName(t, tt.flushed), tt.below)
					after := int64(0)
					if tt.want {
						after = 1
					}
					ask(after)
					ask(after)
					time.Sleep(650 * time.Millisecond) // the first question has its answer, the second one has not
					if size > 0 {
						ask(after)
					}
					time.Sleep(2 * time.Second)
					if size > 0 {
						ask(after)
					}
					wg.Wait()
					if n := p.Inflight(); n != 0 {
						t.Errorf("%d in flight when all is done", n)
					}
				})
			})
		}
	}
}

// TestFlushShed flushes when a question was given up for a newer one whose answer comes nevertheless: it is not kept.
func TestFlushShed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var version atomic.Int64
		p := mustNew(t, Config{Now: time.Now, Cache: mustCache(t), Groups: []Group{{Upstream: counting(&version, time.Second, 300)}}, Inflight: 1})
		var wg sync.WaitGroup
		for _, name := range []string{"one.test.", "two.test."} {
			wg.Go(func() { resolve(t, t.Context(), p, wire.TCP, dig(name, dns.TypeTXT)) })
			time.Sleep(100 * time.Millisecond)
		}
		version.Add(1)
		p.Flush(wireName(t, "one.test"), false)
		wg.Wait()
		if got := versionOf(t, resolve(t, t.Context(), p, wire.TCP, dig("one.test.", dns.TypeTXT))); got != 1 {
			t.Errorf("got version %d, want 1", got)
		}
	})
}

// TestFlushConcurrent flushes all the time, for the race detector: who asks after a flush never gets an answer from before it.
func TestFlushConcurrent(t *testing.T) {
	var version atomic.Int64
	p := mustNew(t, Config{Now: time.Now, Cache: mustCache(t), Groups: []Group{{Upstream: counting(&version, 0, 300)}}, Inflight: 3})
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	names := []string{"one.test.", "no.test.", "x.no.test."}
	for i := range 6 {
		wg.Go(func() {
			for ctx.Err() == nil {
				q := query(p, wire.TCP, pack(t, dig(names[i%len(names)], dns.TypeTXT)))
				ask(t, p, q)
			}
		})
	}
	for i := range 2000 {
		name := names[i%len(names)]
		want := version.Add(1)
		p.Flush(wireName(t, name), i%2 == 0)
		m := resolve(t, ctx, p, wire.TCP, dig(name, dns.TypeTXT))
		if m.Rcode == dns.RcodeServerFailure {
			continue // shed
		}
		if got := versionOf(t, m); got < want {
			t.Fatalf("%s: version %d after a flush at %d", name, got, want)
		}
	}
	stop()
	wg.Wait()
}

// TestFlushDenialAbove flushes names whose answer is that a name above them does not exist: the next question for them goes upstream.
func TestFlushDenialAbove(t *testing.T) {
	for _, tt := range []struct {
		name  string
		below bool
		want  Outcome // of x.y.no.test afterwards
		n     int
	}{
		{"x.y.no.test", false, Miss, 1},
		{"x.y.no.test", true, Miss, 1},
		{"y.no.test", false, Miss, 1},
		{"no.test", false, Miss, 1},
		{"z.test", true, Hit, 1}, // whose own answer goes: "test" exists
		{"xno.test", true, Hit, 0},
		{".", false, Hit, 0},
	} {
		var version atomic.Int64
		seen := &events{}
		p := mustNew(t, Config{Cache: mustCache(t), Observer: seen, Groups: []Group{{Upstream: counting(&version, 0, 300)}}})
		for _, name := range []string{"no.test.", "test.", "z.test."} {
			resolve(t, t.Context(), p, wire.TCP, dig(name, dns.TypeTXT))
		}
		if n := p.Flush(wireName(t, tt.name), tt.below); n != tt.n {
			t.Errorf("%s: %d entries went, want %d", tt.name, n, tt.n)
		}
		for name, want := range map[string]Outcome{"x.y.no.test.": tt.want, "test.": Hit} {
			seen.list = nil
			resolve(t, t.Context(), p, wire.TCP, dig(name, dns.TypeTXT))
			if got := seen.last(t).outcome; got != want {
				t.Errorf("%s is flushed: %s: %v, want %v", tt.name, name, got, want)
			}
		}
	}
}
