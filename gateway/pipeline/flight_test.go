package pipeline

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"dnsgateway/gateway/access"
	"dnsgateway/gateway/cache"
	"dnsgateway/gateway/route"
	"dnsgateway/gateway/wire"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

// upstream counts what it is asked, and answers as do says, after a time.
type upstream struct {
	mu    sync.Mutex
	asked []string
	after time.Duration
	do    exchange
}

func (u *upstream) set(after time.Duration, do exchange) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.asked, u.after, u.do = nil, after, do
}

func (u *upstream) count() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.asked)
}

func (u *upstream) Ask(ctx context.Context, q wire.Question) (*wire.Answer, error) {
	return exchange(func(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
		u.mu.Lock()
		u.asked = append(u.asked, strings.ToLower(req.Question[0].Name))
		after, do := u.after, u.do
		u.mu.Unlock()
		select {
		case <-time.After(after):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		return do(ctx, req)
	}).Ask(ctx, q)
}

func dead(context.Context, *dns.Msg) (*dns.Msg, error) { return nil, errors.New("all dead") }

func servfail(_ context.Context, req *dns.Msg) (*dns.Msg, error) {
	return new(dns.Msg).SetRcode(req, dns.RcodeServerFailure), nil
}

// inTime runs test in a bubble, with a pipeline whose Run ends with it.
func inTime(t *testing.T, c Config, test func(t *testing.T, p *Pipeline, u *upstream, seen *events)) {
	synctest.Test(t, func(t *testing.T) {
		u, seen := &upstream{do: world}, &events{}
		c.Groups, c.Observer, c.Now = append([]Group{{Upstream: u}}, c.Groups...), seen, time.Now
		p := mustNew(t, c)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- p.Run(ctx) }()
		test(t, p, u, seen)
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func mustCacheOf(t testing.TB, c cache.Config) *cache.Cache {
	t.Helper()
	c.MaxBytes = 4 << 20
	made, err := cache.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// get asks as one client over UDP and returns the answer.
func get(t testing.TB, p *Pipeline, m *dns.Msg) *dns.Msg {
	t.Helper()
	q := query(p, wire.UDP, pack(t, m))
	out, _ := ask(t, p, q)
	return checkResponse(t, q, out)
}

// TestCoalesce has many clients ask for one missing name at once, each in its own way.
func TestCoalesce(t *testing.T) {
	for _, cached := range []bool{false, true} {
		c := Config{}
		if cached {
			c.Cache = mustCache(t)
		}
		inTime(t, c, func(t *testing.T, p *Pipeline, u *upstream, seen *events) {
			u.set(time.Second, world)
			const clients = 1000
			answers := make(chan string, clients)
			for i := range clients {
				go func() {
					name := []byte("big.crowd.test.")
					for j := range 9 {
						if i>>j&1 == 1 {
							name[j] = strings.ToUpper(string(name[j]))[0]
						}
					}
					m := dig(string(name), dns.TypeTXT, bufsize(uint16(512+i)))
					m.Id = uint16(i)
					got := get(t, p, m)
					answers <- fmt.Sprintln(got.Id == m.Id, got.Question[0].Name == string(name), got.Truncated)
				}()
			}
			for range clients {
				if got := <-answers; got != "true true true\n" { // big is too large for any of them
					t.Fatalf("ID, name and TC: got %s", got)
				}
			}
			if n := u.count(); n != 1 {
				t.Errorf("the upstream was asked %d times, want once", n)
			}
			if n := seen.counts[Coalesced]; n != clients-1 {
				t.Errorf("%d are counted as coalesced, want %d", n, clients-1)
			}
			if n := seen.outcomes(); n[Miss] != clients {
				t.Errorf("outcomes %v, want %d misses", n, clients)
			}
		})
	}
}

// TestNotCoalesced asks at once what only looks like one question.
func TestNotCoalesced(t *testing.T) {
	inTime(t, Config{}, func(t *testing.T, p *Pipeline, u *upstream, _ *events) {
		u.set(time.Second, world)
		var wg sync.WaitGroup
		list := []*dns.Msg{
			dig("one.test.", dns.TypeA), dig("one.test.", dns.TypeAAAA), dig("one.test.", dns.TypeA, dnssec),
			dig("one.test.", dns.TypeA, cdflag), dig("one.a.test.", dns.TypeA), dig("one.test.", dns.TypeA, class(dns.ClassHESIOD)),
		}
		for _, m := range list {
			wg.Go(func() { get(t, p, m) })
		}
		wg.Wait()
		if n := u.count(); n != len(list) {
			t.Errorf("the upstream was asked %d times, want %d", n, len(list))
		}
	})
}

// TestLateFollower joins a flight just before its time is over: the one who joined has its own.
func TestLateFollower(t *testing.T) {
	inTime(t, Config{}, func(t *testing.T, p *Pipeline, u *upstream, _ *events) {
		u.set(3*time.Second, func(context.Context, *dns.Msg) (*dns.Msg, error) { return nil, context.DeadlineExceeded })
		first := make(chan int)
		go func() { first <- get(t, p, dig("one.test.", dns.TypeA)).Rcode }()
		time.Sleep(2900 * time.Millisecond)
		second := make(chan int)
		go func() { second <- get(t, p, dig("one.test.", dns.TypeA)).Rcode }()
		synctest.Wait()
		u.mu.Lock()
		u.do, u.after = world, 50*time.Millisecond // the upstreams are back
		u.mu.Unlock()
		if got := <-first; got != dns.RcodeSuccess && got != dns.RcodeServerFailure {
			t.Errorf("the first got RCODE %d", got)
		}
		if got := <-second; got != dns.RcodeSuccess {
			t.Errorf("the second got RCODE %d, want an answer within its own time", got)
		}
	})
}

// TestFlightPanic has the upstream panic under a flight that others follow.
func TestFlightPanic(t *testing.T) {
	var log strings.Builder
	inTime(t, Config{Logger: slog.New(slog.NewTextHandler(&log, nil))}, func(t *testing.T, p *Pipeline, u *upstream, _ *events) {
		u.set(time.Second, func(context.Context, *dns.Msg) (*dns.Msg, error) { panic("on purpose") })
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if m := get(t, p, dig("one.test.", dns.TypeA)); m.Rcode != dns.RcodeServerFailure {
					t.Errorf("got RCODE %d, want SERVFAIL", m.Rcode)
				}
			})
		}
		wg.Wait()
		if got := p.Inflight(); got != 0 || strings.Count(log.String(), "on purpose") != 1 {
			t.Errorf("%d in flight; the log says\n%s", got, &log)
		}
	})
}

// TestStale follows one name from its answer past the end of its life.
func TestStale(t *testing.T) {
	const after = 1800 * time.Millisecond
	c := Config{Stale: StaleConfig{After: after, TTL: 30}, Cache: mustCacheOf(t, cache.Config{MaxTTL: 10 * time.Second, StaleFor: time.Hour})}
	inTime(t, c, func(t *testing.T, p *Pipeline, u *upstream, seen *events) {
		for _, tt := range []struct {
			name, host string
			ede        uint16
		}{{"an address", "one.test.", dns.ExtendedErrorCodeStaleAnswer}, {"a denial", "nxdomain.test.", dns.ExtendedErrorCodeStaleNXDOMAINAnswer}} {
			want := get(t, p, dig(tt.host, dns.TypeA))
			step := func(what string, begin time.Time, least, most time.Duration, asked int) {
				t.Helper()
				m := get(t, p, dig(tt.host, dns.TypeA))
				if took := time.Since(begin); took < least || took > most {
					t.Errorf("%s, %s: took %v, want %v to %v", tt.name, what, took, least, most)
				}
				if n := u.count(); n != asked {
					t.Errorf("%s, %s: asked %d times, want %d", tt.name, what, n, asked)
				}
				if m.Rcode != want.Rcode || len(m.Answer) != len(want.Answer) || !cmp.Equal(edes(m), []wire.EDE{{Code: tt.ede}}) {
					t.Errorf("%s, %s: got\n%v", tt.name, what, m)
				}
				for _, rr := range append(m.Answer, m.Ns...) {
					if rr.Header().Ttl != 30 {
						t.Errorf("%s, %s: got TTL %d, want 30", tt.name, what, rr.Header().Ttl)
					}
				}
			}
			time.Sleep(11 * time.Second)
			u.set(0, dead)
			step("upstreams dead", time.Now(), 0, 0, 1)
			step("and again", time.Now(), 0, 0, 1) // nobody asks for 30 s
			time.Sleep(31 * time.Second)
			u.set(0, servfail)
			step("SERVFAIL", time.Now(), 0, 0, 1)
			time.Sleep(31 * time.Second)
			u.set(3*time.Second, world)
			step("slow upstreams", time.Now(), after, after, 1)
			time.Sleep(3 * time.Second) // the answer came after the client had gone, and was kept
			u.set(0, noUpstream(t))
			if m := get(t, p, dig(tt.host, dns.TypeA)); len(edes(m)) != 0 || m.Rcode != want.Rcode {
				t.Errorf("%s: the late answer was not kept: got\n%v", tt.name, m)
			}
			u.set(0, world)
		}
		if n := seen.outcomes(); n[Stale] != 8 {
			t.Errorf("outcomes %v, want 8 stale ones", n)
		}
	})
}

// TestServfailKept asks for a name that cannot be resolved: once in 5 s, and never in the place of a good answer.
func TestServfailKept(t *testing.T) {
	inTime(t, Config{Cache: mustCache(t)}, func(t *testing.T, p *Pipeline, u *upstream, seen *events) {
		u.set(0, world)
		for i, tt := range []struct {
			sleep time.Duration
			asked int
		}{{0, 1}, {4 * time.Second, 1}, {2 * time.Second, 2}} {
			time.Sleep(tt.sleep)
			m := get(t, p, dig("servfail.test.", dns.TypeA))
			if m.Rcode != dns.RcodeServerFailure || len(edes(m)) != 1 || u.count() != tt.asked {
				t.Errorf("%d: RCODE %d, %v, asked %d times, want %d", i, m.Rcode, edes(m), u.count(), tt.asked)
			}
		}
		u.set(0, dead) // that nobody answers is not kept
		for n := range 3 {
			if m := get(t, p, dig("one.test.", dns.TypeA)); m.Rcode != dns.RcodeServerFailure || u.count() != n+1 {
				t.Errorf("all dead: RCODE %d, asked %d times", m.Rcode, u.count())
			}
		}
	})
}

// TestDenial asks below a name that does not exist, for other types, and where another group might know more.
func TestDenial(t *testing.T) {
	corp := &upstream{do: world}
	c := Config{
		Cache: mustCache(t), Groups: []Group{{Upstream: corp}},
		Routes: mustRoutes(t, route.Rule{Group: 1, Below: []string{"corp.nxdomain.test"}}),
	}
	inTime(t, c, func(t *testing.T, p *Pipeline, u *upstream, seen *events) {
		first := get(t, p, dig("nxdomain.test.", dns.TypeA))
		get(t, p, dig("nxdomain.test.", dns.TypeA, dnssec))
		u.set(0, noUpstream(t))
		for _, m := range []*dns.Msg{
			dig("nxdomain.test.", dns.TypeAAAA), dig("a.NXdomain.test.", dns.TypeA), dig("a.b.c.d.e.nxdomain.test.", dns.TypeTXT, noedns),
			dig("x.nxdomain.test.", dns.TypeA, dnssec),
		} {
			got := get(t, p, m)
			if got.Rcode != dns.RcodeNameError || got.Question[0] != m.Question[0] || len(got.Ns) != 1 || got.Ns[0].String() != first.Ns[0].String() {
				t.Errorf("got\n%v\nwant the denial with\n%v", got, first.Ns[0])
			}
		}
		u.set(0, world)
		get(t, p, dig("one.nxdomain2.test.", dns.TypeA))
		get(t, p, dig("one.test.", dns.TypeA))
		if n := u.count(); n != 2 {
			t.Errorf("beside it %d questions were asked, want 2", n)
		}
		if got := get(t, p, dig("one.corp.nxdomain.test.", dns.TypeA)); got.Rcode != 0 || corp.count() != 1 {
			t.Errorf("another group's name: asked %d times, got\n%v", corp.count(), got)
		}
	})
}

// TestPrefetch has a popular name renewed before its time is over, once, and no client wait for that.
func TestPrefetch(t *testing.T) {
	c := Config{Cache: mustCacheOf(t, cache.Config{MaxTTL: 100 * time.Second, PrefetchHits: 5, PrefetchRemaining: 0.1})}
	inTime(t, c, func(t *testing.T, p *Pipeline, u *upstream, seen *events) {
		hits := func(n int) {
			t.Helper()
			for range n {
				begin := time.Now()
				if m := get(t, p, dig("one.test.", dns.TypeA)); m.Rcode != 0 || time.Since(begin) != 0 {
					t.Errorf("RCODE %d after %v", m.Rcode, time.Since(begin))
				}
			}
		}
		hits(10)
		time.Sleep(95 * time.Second)
		u.set(time.Second, world)
		hits(10)
		time.Sleep(2 * time.Second)
		if n := u.count(); n != 1 || seen.counts[Prefetch] != 1 {
			t.Fatalf("asked %d times, %d prefetches, want one", n, seen.counts[Prefetch])
		}
		time.Sleep(50 * time.Second) // the old answer would be gone
		u.set(time.Second, dead)
		hits(10)
		time.Sleep(42 * time.Second)
		hits(10) // a refresh in vain leaves what is there
		time.Sleep(2 * time.Second)
		hits(1)
		if n := u.count(); n != 1 {
			t.Errorf("asked %d times, want once", n)
		}
	})
}

// TestServeWireAllocs is the budget of everything that ServeWire answers: none, with limiter, metrics and stale answers on.
func TestServeWireAllocs(t *testing.T) {
	clock := newClock()
	c := Config{
		Access: mustAccess(t, access.Config{Everywhere: true, Allow: access.PrivateNetworks(), PerClient: 1e9}),
		Cache:  mustCacheOf(t, cache.Config{MaxTTL: 10 * time.Second, StaleFor: time.Hour, PrefetchHits: 5, PrefetchRemaining: 0.1}),
		Groups: []Group{{Upstream: exchange(world)}}, Now: clock.Now, Observer: quiet{},
	}
	p := mustNew(t, c)
	dst := make([]byte, 0, 8192)
	for _, stale := range []bool{false, true} {
		for _, transport := range transports {
			for name, m := range map[string]*dns.Msg{
				"plain": dig("one.test.", dns.TypeA, noedns), "EDNS": dig("one.test.", dns.TypeA), "DO": dig("records.test.", dns.TypeA, dnssec),
				"truncated": dig("big.test.", dns.TypeTXT), "denial": dig("nxdomain.test.", dns.TypeA),
				"cut": dig("a.b.nxdomain.test.", dns.TypeA), "padded": dig("alias.test.", dns.TypeA, option(&dns.EDNS0_PADDING{})),
			} {
				if stale && name == "cut" {
					continue // a name above counts only while it is fresh
				}
				raw := pack(t, m)
				if !stale {
					if name == "cut" {
						ask(t, p, query(p, transport, pack(t, dig("nxdomain.test.", dns.TypeA))))
					}
					ask(t, p, query(p, transport, raw))
				}
				q := query(p, transport, raw)
				n := testing.AllocsPerRun(20, func() {
					q.Parse(raw)
					if _, v := p.ServeWire(dst, q); v != wire.Answered {
						t.Fatalf("%s over %v, stale %v: %v", name, transport, stale, v)
					}
				})
				if n != 0 {
					t.Errorf("%s over %v, stale %v: %v allocations", name, transport, stale, n)
				}
			}
			stranger := query(p, transport, pack(t, dig("one.test.", dns.TypeA)))
			stranger.Client = netip.MustParseAddrPort("192.0.2.1:53")
			if n := testing.AllocsPerRun(20, func() { p.ServeWire(dst, stranger) }); n != 0 {
				t.Errorf("refused over %v: %v allocations", transport, n)
			}
		}
		clock.add(20 * time.Second)
		p.stale.After = 0 // at once
	}
}

// quiet is an Observer that times every query.
type quiet struct{}

func (quiet) Query(wire.Transport, uint8, uint16, Outcome) bool  { return true }
func (quiet) Took(wire.Transport, uint8, Outcome, time.Duration) {}
func (quiet) Count(Event)                                        {}
