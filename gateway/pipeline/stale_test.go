package pipeline

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"dnsgateway/gateway/cache"
	"dnsgateway/gateway/route"
	"dnsgateway/gateway/wire"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

// upstream is an Exchanger that a test can break.
type upstream struct {
	asked atomic.Int64
	mode  atomic.Pointer[string] // what it does; nil: it answers like world
	back  atomic.Int64           // when it recovered
}

func (u *upstream) set(mode string) { u.mode.Store(&mode) }

// heal makes u answer, and tell so.
func (u *upstream) heal() {
	u.set("")
	u.back.Store(time.Now().UnixNano())
}

func (u *upstream) group() Group {
	return Group{Upstream: exchange(u.exchange), Recovered: u.back.Load}
}

func (u *upstream) exchange(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
	u.asked.Add(1)
	mode := ""
	if m := u.mode.Load(); m != nil {
		mode = *m
	}
	d := 10 * time.Millisecond
	switch mode {
	case "silent":
		d = 3 * time.Second
	case "slow":
		d = 2500 * time.Millisecond
	}
	select {
	case <-time.After(d):
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	switch mode {
	case "silent":
		return nil, outOfTime{}
	case "dead":
		return nil, errors.New("all dead")
	case "SERVFAIL":
		return new(dns.Msg).SetRcode(req, dns.RcodeServerFailure), nil
	case "REFUSED":
		return new(dns.Msg).SetRcode(req, dns.RcodeRefused), nil
	case "NXDOMAIN":
		m := new(dns.Msg).SetRcode(req, dns.RcodeNameError)
		m.Ns = []dns.RR{mustRR("test. 60 IN SOA ns.test. hostmaster.test. 1 2 3 4 60")}
		return m, nil
	}
	return world(ctx, req)
}

func staleCache(t testing.TB) *cache.Cache {
	t.Helper()
	c, err := cache.New(cache.Config{MaxBytes: 4 << 20, StaleFor: time.Hour, PrefetchHits: 3, PrefetchRemaining: 0.1})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// running is a Pipeline whose Run is called, and ended with the test.
func running(t *testing.T, c Config) *Pipeline {
	t.Helper()
	c.Now = time.Now
	p := mustNew(t, c)
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := p.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		stop()
		wg.Wait()
		if n := p.Inflight(); n != 0 {
			t.Errorf("%d in flight after Run", n)
		}
	})
	return p
}

// TestStale has what a client gets, and when, whose answer's time is over, for all that upstreams may do; and what the next one
// gets a second later.
func TestStale(t *testing.T) {
	type end struct {
		took    time.Duration
		outcome Outcome
		rcode   int
		ede     []wire.EDE
	}
	const client, answer = 1800 * time.Millisecond, 10 * time.Millisecond
	old := []wire.EDE{{Code: dns.ExtendedErrorCodeStaleAnswer}}
	gone := []wire.EDE{{Code: dns.ExtendedErrorCodeStaleNXDOMAINAnswer}}
	fresh, freshGone := end{took: answer, outcome: Miss}, end{took: answer, outcome: Miss, rcode: dns.RcodeNameError}
	hit, hitGone := end{outcome: Hit}, end{outcome: Hit, rcode: dns.RcodeNameError}
	for _, tt := range []struct {
		name, mode  string
		after       time.Duration
		first, next end
		asked       int64 // by both
	}{
		{"one", "", client, fresh, hit, 1},
		{"one", "NXDOMAIN", client, freshGone, hitGone, 1},
		{"one", "slow", client, end{client, Stale, 0, old}, hit, 1},
		{"one", "silent", client, end{client, Stale, 0, old}, end{0, Stale, 0, old}, 1},
		{"one", "dead", client, end{answer, Stale, 0, old}, end{0, Stale, 0, old}, 1},
		{"one", "SERVFAIL", client, end{answer, Stale, 0, old}, end{0, Stale, 0, old}, 1},
		{"one", "REFUSED", client, end{answer, Stale, 0, old}, end{0, Stale, 0, old}, 1},
		{"nxdomain", "", client, freshGone, hitGone, 1},
		{"nxdomain", "silent", client, end{client, Stale, 3, gone}, end{0, Stale, 3, gone}, 1},
		{"nxdomain", "SERVFAIL", client, end{answer, Stale, 3, gone}, end{0, Stale, 3, gone}, 1},
		{"one", "", 0, end{0, Stale, 0, old}, hit, 1},
		{"one", "NXDOMAIN", 0, end{0, Stale, 0, old}, hitGone, 1},
		{"one", "silent", 0, end{0, Stale, 0, old}, end{0, Stale, 0, old}, 1},
		{"nxdomain", "dead", 0, end{0, Stale, 3, gone}, end{0, Stale, 3, gone}, 1},
		{"nxdomain", "", 0, end{0, Stale, 3, gone}, hitGone, 1},
	} {
		for _, odd := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/%s/%v/odd=%v", tt.name, tt.mode, tt.after, odd), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var up upstream
					seen := &events{}
					p := running(t, Config{Groups: []Group{up.group()}, Observer: seen, Cache: staleCache(t), Stale: StaleConfig{After: tt.after}})
					m := dig(tt.name+".test.", dns.TypeA)
					if odd {
						additional("x. 1 IN A 192.0.2.1")(m)
					}
					resolve(t, t.Context(), p, wire.TCP, m)
					time.Sleep(10 * time.Minute)
					up.set(tt.mode)
					up.asked.Store(0)
					for i, want := range []end{tt.first, tt.next} {
						seen.list = nil
						start := time.Now()
						r := resolve(t, t.Context(), p, wire.TCP, m)
						got := end{time.Since(start), seen.last(t).outcome, r.Rcode, edes(r)}
						if diff := cmp.Diff(got, want, cmp.AllowUnexported(end{})); diff != "" {
							t.Errorf("query %d, got -, want +:\n%s", i, diff)
						}
						if got.outcome == Stale {
							for _, rr := range append(r.Answer, r.Ns...) {
								if rr.Header().Ttl != 30 {
									t.Errorf("query %d: %v, want a TTL of 30", i, rr)
								}
							}
						}
						time.Sleep(time.Second + 10*time.Millisecond)
						if got.took == client {
							time.Sleep(time.Second) // until the deadline is over as well
						}
					}
					if n := up.asked.Load(); n != tt.asked {
						t.Errorf("%d questions left, want %d", n, tt.asked)
					}
				})
			})
		}
	}
}

// TestStaleRetry follows a name through an outage: it is asked for once in 30 s, and found again when the outage is over.
func TestStaleRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up upstream
		p := running(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t), Stale: StaleConfig{After: 1800 * time.Millisecond, TTL: 7}})
		m := dig("one.test.", dns.TypeA)
		resolve(t, t.Context(), p, wire.UDP, m)
		time.Sleep(10 * time.Minute)
		up.set("dead")
		up.asked.Store(0)
		for range 300 {
			if r := resolve(t, t.Context(), p, wire.UDP, m); len(r.Answer) != 1 || r.Answer[0].Header().Ttl != 7 {
				t.Fatalf("got %v", r)
			}
			time.Sleep(time.Second)
		}
		if n := up.asked.Load(); n < 9 || n > 11 {
			t.Errorf("asked %d times in 300 s, want 10", n)
		}
		up.set("")
		time.Sleep(30 * time.Second)
		if r := resolve(t, t.Context(), p, wire.UDP, m); len(r.Answer) != 1 || len(edes(r)) != 0 {
			t.Errorf("after the outage: %v", r)
		}
	})
}

// TestStaleRecovered has upstreams come back soon after a stale name was asked for in vain: the next one who asks has it asked for
// again, and again after each recovery, but for what another group serves.
func TestStaleRecovered(t *testing.T) {
	for _, tt := range []struct {
		name  string
		after time.Duration
		want  Outcome // of the first query after the recovery
	}{
		{"one.test.", 1800 * time.Millisecond, Miss}, {"nxdomain.test.", 1800 * time.Millisecond, Miss},
		{"one.test.", 0, Stale}, {"nxdomain.test.", 0, Stale},
	} {
		t.Run(fmt.Sprint(tt.name, tt.after), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var up, other upstream
				seen := &events{}
				p := running(t, Config{Groups: []Group{other.group(), up.group()}, Cache: staleCache(t), Stale: StaleConfig{After: tt.after},
					Observer: seen, Routes: mustRoutes(t, route.Rule{Group: 1, Below: []string{"test"}})})
				ask := func() Outcome {
					seen.list = nil
					resolve(t, t.Context(), p, wire.TCP, dig(tt.name, dns.TypeA))
					return seen.last(t).outcome
				}
				ask()
				for range 3 {
					time.Sleep(10 * time.Minute)
					for _, mode := range []string{"dead", "SERVFAIL", "silent"} {
						up.set(mode)
						up.asked.Store(0)
						for i := range 5 {
							if got := ask(); got != Stale {
								t.Fatalf("%s, query %d: %v, want a stale answer", mode, i, got)
							}
							time.Sleep(4 * time.Second) // longer than a question takes
							other.heal()
						}
						if n := up.asked.Load(); n != 1 {
							t.Errorf("%s: asked %d times, want once", mode, n)
						}
						up.back.Store(time.Now().UnixNano()) // and gone again at once, but for the last one
					}
					up.heal()
					if got := ask(); got != tt.want {
						t.Errorf("first query after the recovery: %v, want %v", got, tt.want)
					}
					time.Sleep(20 * time.Millisecond)
					if got := ask(); got != Hit {
						t.Errorf("second query after the recovery: %v, want a fresh answer", got)
					}
				}
			})
		})
	}
}

// TestRecoveredBefore has upstreams come back, and a question fail in the same second: what comes first is no recovery from what
// comes then, and what comes after it is.
func TestRecoveredBefore(t *testing.T) {
	for _, mode := range []string{"SERVFAIL", "dead"} {
		synctest.Test(t, func(t *testing.T) {
			var up upstream
			seen := &events{}
			p := running(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t), Observer: seen, Stale: StaleConfig{After: 1800 * time.Millisecond}})
			ask := func(want Outcome, took time.Duration) {
				t.Helper()
				begin := time.Now()
				resolve(t, t.Context(), p, wire.TCP, dig("one.test.", dns.TypeA))
				if got := seen.last(t).outcome; got != want || time.Since(begin) != took {
					t.Errorf("%s: %v after %v, want %v after %v", mode, got, time.Since(begin), want, took)
				}
			}
			ask(Miss, 10*time.Millisecond)
			time.Sleep(10 * time.Minute)
			time.Sleep(time.Until(time.Now().Truncate(time.Second).Add(1200 * time.Millisecond)))
			up.heal()
			time.Sleep(500 * time.Millisecond)
			up.set(mode)
			ask(Stale, 10*time.Millisecond)
			up.set("silent")
			n := up.asked.Load()
			for range 3 {
				time.Sleep(50 * time.Millisecond)
				ask(Stale, 0)
			}
			if up.asked.Load() != n {
				t.Errorf("%s: asked %d times more", mode, up.asked.Load()-n)
			}
			up.heal() // still in that second
			ask(Miss, 10*time.Millisecond)
		})
	}
}

// TestRecoveredMeanwhile has upstreams come back while a question waits in vain for one that is gone: that it failed says nothing
// about the time from then on.
func TestRecoveredMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up upstream
		p := running(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t), Stale: StaleConfig{After: 1800 * time.Millisecond}})
		m := dig("one.test.", dns.TypeA)
		resolve(t, t.Context(), p, wire.TCP, m)
		time.Sleep(10 * time.Minute)
		up.set("silent")
		if r := resolve(t, t.Context(), p, wire.TCP, m); len(edes(r)) != 1 {
			t.Errorf("got %v, want a stale answer", r)
		}
		up.heal()
		time.Sleep(5 * time.Second)
		if r := resolve(t, t.Context(), p, wire.TCP, m); len(r.Answer) != 1 || len(edes(r)) != 0 {
			t.Errorf("got %v, want a fresh answer", r)
		}
	})
}

// TestPrefetchRecovered has the renewal of a popular answer fail: it is tried again after 30 s, or as soon as upstreams are back
// and nobody else can be about it.
func TestPrefetchRecovered(t *testing.T) {
	for _, tt := range []struct {
		back bool
		want int // seconds from one renewal to the next
	}{{true, 10}, {false, 31}} { // 30 s after the failure, which comes after the question
		synctest.Test(t, func(t *testing.T) {
			var up upstream
			p := running(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t)})
			var at []int
			for i := 0; len(at) < 3; i++ {
				resolve(t, t.Context(), p, wire.UDP, dig("one.test.", dns.TypeA))
				time.Sleep(time.Second)
				if int(up.asked.Load()) == len(at) {
					continue
				}
				switch at = append(at, i); len(at) {
				case 1:
					up.set("dead")
				case 2:
					up.set("")
					if tt.back {
						up.heal()
					}
				}
			}
			if got := at[2] - at[1]; got != tt.want {
				t.Errorf("back %v: renewed after %d s, want %d", tt.back, got, tt.want)
			}
		})
	}
}

// TestStaleShed gives up a question whose clients have a stale answer: they get that.
func TestStaleShed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up upstream
		seen := &events{}
		p := running(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t), Stale: StaleConfig{After: 1800 * time.Millisecond}, Inflight: 1,
			Observer: seen})
		resolve(t, t.Context(), p, wire.TCP, dig("one.test.", dns.TypeA))
		time.Sleep(10 * time.Minute)
		up.set("silent")
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if r := resolve(t, t.Context(), p, wire.TCP, dig("one.test.", dns.TypeA)); len(r.Answer) != 1 || len(edes(r)) != 1 {
					t.Errorf("got %v", r)
				}
			})
		}
		synctest.Wait()
		start := time.Now()
		time.Sleep(100 * time.Millisecond)
		wg.Go(func() { resolve(t, t.Context(), p, wire.TCP, dig("two.test.", dns.TypeA)) })
		synctest.Wait()
		if n := seen.outcomes()[Stale]; n != 3 || time.Since(start) != 100*time.Millisecond {
			t.Errorf("%d have the stale answer, want 3", n)
		}
		wg.Wait()
	})
}

// TestRunEnds ends Run while questions are under way whose clients have left, and some that nobody asked.
func TestRunEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up upstream
		p := mustNew(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t), Stale: StaleConfig{After: time.Millisecond}, Now: time.Now})
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- p.Run(ctx) }()
		one, alias := dig("one.test.", dns.TypeA), dig("alias.test.", dns.TypeA)
		resolve(t, t.Context(), p, wire.TCP, one)
		resolve(t, t.Context(), p, wire.TCP, alias)
		time.Sleep(10 * time.Minute)
		up.set("silent")
		resolve(t, t.Context(), p, wire.TCP, one)
		p.renew(query(p, wire.TCP, pack(t, alias)), &hit{})
		synctest.Wait()
		if n := p.Inflight(); n != 2 {
			t.Fatalf("%d in flight, want 2", n)
		}
		start := time.Now()
		stop()
		if err := <-ended; err != nil || time.Since(start) != 0 || p.Inflight() != 0 {
			t.Errorf("Run ended with %v after %v, and %d in flight", err, time.Since(start), p.Inflight())
		}
		// What comes later is answered, and leaves nothing behind.
		if r := resolve(t, t.Context(), p, wire.TCP, one); len(r.Answer) != 1 || p.Inflight() != 0 {
			t.Errorf("after Run: %v, %d in flight", r, p.Inflight())
		}
	})
}

// TestRunEndsLateFollower ends Run while the question of a late follower is under way, which flies on a goroutine of its own.
func TestRunEndsLateFollower(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up upstream
		up.set("silent")
		p := mustNew(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t), Now: time.Now})
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- p.Run(ctx) }()
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() { resolve(t, t.Context(), p, wire.TCP, dig("one.test.", dns.TypeA)) })
			time.Sleep(2 * time.Second)
		}
		if n := up.asked.Load(); n != 2 || p.Inflight() != 1 {
			t.Fatalf("%d questions left and %d are in flight, want 2 and 1", n, p.Inflight())
		}
		start := time.Now()
		stop()
		if err := <-ended; err != nil || time.Since(start) != 0 || p.Inflight() != 0 {
			t.Errorf("Run ended with %v after %v, and %d in flight", err, time.Since(start), p.Inflight())
		}
		wg.Wait()
	})
}

// TestPrefetch asks for a name every second: from the second life on it is renewed before its time is over, by one question.
func TestPrefetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up upstream
		seen := &events{}
		p := running(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t), Observer: seen})
		for _, name := range []string{"one.test.", "nxdomain.test."} {
			seen.list = nil
			for i := range 2000 {
				resolve(t, t.Context(), p, wire.UDP, dig(name, dns.TypeA))
				time.Sleep(time.Second)
				if i == 0 {
					up.asked.Store(0)
				}
			}
			if n := seen.outcomes(); n[Miss] != 1 || n[Hit] != 1999 {
				t.Errorf("%s: outcomes %v, want one miss", name, n)
			}
			life := 2000 / int(up.asked.Load())
			if life < 50 || life > 360 {
				t.Errorf("%s: asked %d times in 2000 s", name, up.asked.Load())
			}
		}
		if n := seen.counted(Prefetch); n < 10 {
			t.Errorf("%d prefetches", n)
		}
		// A renewal that fails leaves the entry.
		up.set("SERVFAIL")
		for range 100 {
			if r := resolve(t, t.Context(), p, wire.UDP, dig("nxdomain.test.", dns.TypeA)); r.Rcode != dns.RcodeNameError {
				t.Fatalf("got %v", r)
			}
			time.Sleep(500 * time.Millisecond)
		}
	})
}

// TestRenewBound has more to renew than there is room for: it is dropped, and clients' questions go first.
func TestRenewBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up upstream
		seen := &events{}
		p := running(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t), Observer: seen, Inflight: renewers / 2})
		up.set("silent")
		for i := range 3 * renewRoom {
			p.renew(query(p, wire.UDP, pack(t, dig(fmt.Sprintf("%d.test.", i), dns.TypeA))), &hit{})
		}
		synctest.Wait()
		if n := p.Inflight(); n != renewers/2 {
			t.Errorf("%d in flight, want %d", n, renewers/2)
		}
		up.set("")
		if r := resolve(t, t.Context(), p, wire.UDP, dig("one.test.", dns.TypeA)); r.Rcode != 0 {
			t.Errorf("a client got %v", r)
		}
		if n := seen.counted(Shed); n != 1 {
			t.Errorf("%d shed, want 1", n)
		}
		time.Sleep(time.Minute)
	})
}

// TestServFail has a SERVFAIL of upstream for all who ask within 5 s, with its reason, and not instead of anything good.
func TestServFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up upstream
		p := running(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t)})
		for range 20 {
			r := resolve(t, t.Context(), p, wire.UDP, dig("servfail.test.", dns.TypeA))
			if diff := cmp.Diff(edes(r), []wire.EDE{{Code: dns.ExtendedErrorCodeDNSBogus, Text: "bogus"}}); r.Rcode != dns.RcodeServerFailure || diff != "" {
				t.Errorf("RCODE %d, extended errors, got -, want +:\n%s", r.Rcode, diff)
			}
			time.Sleep(time.Second)
		}
		if n := up.asked.Load(); n < 4 || n > 5 {
			t.Errorf("asked %d times in 20 s", n)
		}
		up.asked.Store(0)
		for range 3 { // what is neither an answer nor SERVFAIL is not kept
			resolve(t, t.Context(), p, wire.UDP, dig("refused.test.", dns.TypeA))
		}
		if n := up.asked.Load(); n != 3 {
			t.Errorf("REFUSED: asked %d times, want 3", n)
		}
	})
}

// TestUnanswered has a question that nobody answers for all who ask soon after it, longer each time; until upstreams are back.
func TestUnanswered(t *testing.T) {
	for _, mode := range []string{"silent", "dead"} {
		synctest.Test(t, func(t *testing.T) {
			var up upstream
			seen := &events{}
			p := running(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t), Observer: seen})
			up.set(mode)
			takes := map[string]time.Duration{"silent": 3 * time.Second, "dead": 10 * time.Millisecond}[mode]
			ask := func(name string, rcode int, outcome Outcome, took time.Duration) {
				t.Helper()
				begin := time.Now()
				r := resolve(t, t.Context(), p, wire.TCP, dig(name, dns.TypeA))
				e := seen.last(t)
				if r.Rcode != rcode || e.outcome != outcome || time.Since(begin) != took || rcode != 0 != (len(edes(r)) == 1) {
					t.Errorf("%s: %v after %v:\n%v\nwant RCODE %d, %v after %v", mode, e.outcome, time.Since(begin), r, rcode, outcome, took)
				}
			}
			for _, life := range []time.Duration{1, 2, 4, 5, 5} {
				ask("one.test.", dns.RcodeServerFailure, Miss, takes)
				ask("one.test.", dns.RcodeServerFailure, Hit, 0)
				time.Sleep(life*time.Second - time.Nanosecond)
				ask("one.test.", dns.RcodeServerFailure, Hit, 0)
				time.Sleep(time.Nanosecond)
			}
			ask("one.test.", dns.RcodeServerFailure, Miss, takes)
			time.Sleep(time.Nanosecond)
			up.heal() // after the failure, be it by a nanosecond
			ask("one.test.", dns.RcodeSuccess, Miss, 10*time.Millisecond)
			up.set(mode)
			ask("one.test.", dns.RcodeSuccess, Hit, 0)
		})
	}
}

// TestGivenUpIsNotKept gives up questions for a newer one, and for want of anybody who waits: who asks later has them asked again.
func TestGivenUpIsNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up upstream
		p := running(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t), Inflight: 1})
		up.set("silent")
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for _, name := range []string{"one.shed.test.", "one.left.test."} {
			wg.Go(func() {
				if r := resolve(t, ctx, p, wire.TCP, dig(name, dns.TypeA)); r.Rcode != dns.RcodeServerFailure {
					t.Errorf("%s: got %v", name, r)
				}
			})
			synctest.Wait()
		}
		cancel()
		wg.Wait()
		up.set("")
		for _, name := range []string{"one.shed.test.", "one.left.test."} {
			if r := resolve(t, t.Context(), p, wire.TCP, dig(name, dns.TypeA)); r.Rcode != dns.RcodeSuccess {
				t.Errorf("%s: got %v", name, r)
			}
		}
	})
}

// TestDenialBeforeFailure has a name fail for one type, and then denied for another one, or the name above it: the denial is true
// for the first type as well.
func TestDenialBeforeFailure(t *testing.T) {
	for _, mode := range []string{"SERVFAIL", "dead"} {
		for _, denied := range []string{"x.one.test.", "one.test."} {
			synctest.Test(t, func(t *testing.T) {
				var up upstream
				seen := &events{}
				p := running(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t), Observer: seen})
				for _, step := range []struct {
					mode, name string
					qtype      uint16
					rcode      int
					outcome    Outcome
				}{
					{mode, "x.one.test.", dns.TypeA, dns.RcodeServerFailure, Miss},
					{mode, "x.one.test.", dns.TypeA, dns.RcodeServerFailure, Hit},
					{"NXDOMAIN", denied, dns.TypeAAAA, dns.RcodeNameError, Miss},
					{"NXDOMAIN", "x.one.test.", dns.TypeA, dns.RcodeNameError, Hit},
				} {
					up.set(step.mode)
					r := resolve(t, t.Context(), p, wire.TCP, dig(step.name, step.qtype))
					if got := seen.last(t); got.outcome != step.outcome || r.Rcode != step.rcode {
						t.Errorf("%s is denied: %+v: got %v, RCODE %d", denied, step, got.outcome, r.Rcode)
					}
				}
			})
		}
	}
}

// TestDenials has the NXDOMAIN of a name for its other types and for what is below it; for nothing else, and for no name that
// goes to another group.
func TestDenials(t *testing.T) {
	var up, corp upstream
	seen, clock := &events{}, newClock()
	p := mustNew(t, Config{Cache: mustCache(t), Observer: seen, Now: clock.Now, Groups: []Group{up.group(), corp.group()},
		Routes: mustRoutes(t, route.Rule{Group: 1, Below: []string{"corp.nxdomain.test"}, Regexps: []string{`^re[0-9]\.nxdomain\.test$`}})})
	for _, options := range [][]func(*dns.Msg){nil, {dnssec}, {cdflag}} {
		resolve(t, t.Context(), p, wire.TCP, dig("nxDomain.test.", dns.TypeA, options...))
	}
	deep := ""
	for range 20 {
		deep += "a."
	}
	for _, tt := range []struct {
		query *dns.Msg
		want  Outcome
	}{
		{dig("nxdomain.test.", dns.TypeA), Hit},
		{dig("nxdomain.test.", dns.TypeAAAA), Hit},
		{dig("nxdomain.test.", 65280), Hit},
		{dig("x.NXDOMAIN.test.", dns.TypeA), Hit},
		{dig("x.nxdomain.test.", dns.TypeA, noedns), Hit},
		{dig("x.y.z.nxdomain.test.", dns.TypeMX, dnssec), Hit},
		{dig("x.nxdomain.test.", dns.TypeMX, cdflag), Hit},
		{dig("x.nxdomain.test.", dns.TypeMX, cdflag, dnssec), Miss},
		{dig(deep+"nxdomain.test.", dns.TypeMX), Hit},
		{dig("x.nxdomain.test.", dns.TypeA, additional("x. 1 IN A 192.0.2.1")), Hit},
		{dig("re.nxdomain.test.", dns.TypeA), Hit},
		{dig("re1.nxdomain.test.", dns.TypeA), Miss},
		{dig("corp.nxdomain.test.", dns.TypeA), Miss},
		{dig("payroll.corp.nxdomain.test.", dns.TypeA), Miss},
		{dig("xnxdomain.test.", dns.TypeA), Miss},
		{dig("test.", dns.TypeA), Miss},
		{dig("nxdomain.test.", dns.TypeA, class(dns.ClassHESIOD)), Miss},
		{dig("x.nxdomain.test.", dns.TypeANY), Local},
	} {
		seen.list = nil
		clock.add(time.Second)
		up.asked.Store(0)
		corp.asked.Store(0)
		m := resolve(t, t.Context(), p, wire.TCP, tt.query)
		name := tt.query.Question[0].String()
		if got := seen.last(t); got.outcome != tt.want {
			t.Errorf("%s: %v, want %v", name, got.outcome, tt.want)
		}
		if tt.want == Hit && (m.Rcode != dns.RcodeNameError || len(m.Ns) != 1 || m.Ns[0].Header().Name != "test." || m.Ns[0].Header().Ttl > 59) {
			t.Errorf("%s: got %v", name, m)
		}
		if n := up.asked.Load() + corp.asked.Load(); (n == 1) != (tt.want == Miss) {
			t.Errorf("%s: %d questions left", name, n)
		}
		if private := strings.Contains(name, "corp.") || strings.Contains(name, "re1."); private && up.asked.Load() > 0 {
			t.Errorf("%s left through the wrong group", name)
		}
	}
	// With the denial's time over, all is asked again; and what then exists has nothing in its way.
	clock.add(time.Hour)
	seen.list = nil
	resolve(t, t.Context(), p, wire.TCP, dig("x.nxdomain.test.", dns.TypeA))
	if got := seen.last(t); got.outcome != Miss {
		t.Errorf("an hour later: %v", got)
	}
}

// TestDenialRefreshed has a name that ceases to exist: the denial that came later stands before the answer that is stale.
func TestDenialRefreshed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up upstream
		seen := &events{}
		p := running(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t), Observer: seen, Stale: StaleConfig{After: 1800 * time.Millisecond}})
		m := dig("one.test.", dns.TypeA)
		for _, step := range []struct {
			mode    string
			rcode   int
			outcome Outcome
			wait    time.Duration
		}{
			{"", dns.RcodeSuccess, Miss, 10 * time.Minute},
			{"NXDOMAIN", dns.RcodeNameError, Miss, 10 * time.Second},
			{"NXDOMAIN", dns.RcodeNameError, Hit, 10 * time.Minute},
			{"dead", dns.RcodeNameError, Stale, 10 * time.Second},
			{"dead", dns.RcodeNameError, Stale, time.Minute},
			{"", dns.RcodeSuccess, Miss, 10 * time.Minute},
			{"dead", dns.RcodeSuccess, Stale, time.Second},
		} {
			up.set(step.mode)
			seen.list = nil
			r := resolve(t, t.Context(), p, wire.TCP, m)
			if got := seen.last(t); got.outcome != step.outcome || r.Rcode != step.rcode {
				t.Errorf("%+v: got %v, RCODE %d", step, got.outcome, r.Rcode)
			}
			time.Sleep(step.wait)
		}
	})
}

// TestDenialGone has a name that comes into being: when that is known by one type, its denial does not stand before the others,
// fresh or stale; unless it may be the newer of the two.
func TestDenialGone(t *testing.T) {
	type step struct {
		mode  string
		qtype uint16
		rcode int
		wait  time.Duration
	}
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"a stale denial", []step{
			{"NXDOMAIN", dns.TypeA, dns.RcodeNameError, 10 * time.Minute},
			{"", dns.TypeA, dns.RcodeSuccess, 0},
			{"dead", dns.TypeAAAA, dns.RcodeServerFailure, 0},
		}},
		{"a prefetched denial", []step{
			{"NXDOMAIN", dns.TypeA, dns.RcodeNameError, time.Second},
			{"NXDOMAIN", dns.TypeA, dns.RcodeNameError, 0},
			{"NXDOMAIN", dns.TypeA, dns.RcodeNameError, 55 * time.Second},
			{"", dns.TypeA, dns.RcodeNameError, 100 * time.Millisecond},
			{"", dns.TypeAAAA, dns.RcodeSuccess, 0},
		}},
		{"a denial that came meanwhile", []step{
			{"slow", dns.TypeA, dns.RcodeSuccess, 100 * time.Millisecond},
			{"NXDOMAIN", dns.TypeAAAA, dns.RcodeNameError, 5 * time.Second},
			{"", dns.TypeMX, dns.RcodeNameError, 0},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var up upstream
				p := running(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t), Stale: StaleConfig{After: time.Second}})
				var wg sync.WaitGroup
				for i, step := range tt.steps {
					up.set(step.mode)
					wg.Go(func() {
						if r := resolve(t, t.Context(), p, wire.TCP, dig("one.test.", step.qtype)); r.Rcode != step.rcode {
							t.Errorf("step %d: RCODE %d, want %d", i, r.Rcode, step.rcode)
						}
					})
					if step.mode != "slow" {
						wg.Wait()
					}
					time.Sleep(step.wait)
				}
				wg.Wait()
			})
		})
	}
}

// TestStaleWaits has a query that was received a second before its turn came: that second is part of what its client waits. And
// its octets are the listener's again as soon as it has the stale answer: the question that is still under way has its own.
func TestStaleWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up upstream
		p := running(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t), Stale: StaleConfig{After: 1800 * time.Millisecond}})
		m := dig("one.test.", dns.TypeA)
		resolve(t, t.Context(), p, wire.TCP, m)
		time.Sleep(10 * time.Minute)
		up.set("slow")
		raw := pack(t, m)
		q := query(p, wire.TCP, raw)
		time.Sleep(time.Second)
		start := time.Now()
		out, err := p.Resolve(t.Context(), nil, q)
		if took := time.Since(start); err != nil || took != 800*time.Millisecond || len(edes(unpack(t, out))) != 1 {
			t.Errorf("%x, %v after %v, want a stale answer after 800ms", out, err, took)
		}
		for i := range raw {
			raw[i] = 1
		}
		time.Sleep(3 * time.Second)
		up.set("dead")
		if r := resolve(t, t.Context(), p, wire.TCP, m); len(r.Answer) != 1 || len(edes(r)) != 0 {
			t.Errorf("the late answer was not kept: %v", r)
		}
	})
}

// TestShedIsNoFailure gives up the question for a stale answer: that says nothing about upstreams, and the next client has them
// asked.
func TestShedIsNoFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up upstream
		p := running(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t), Stale: StaleConfig{After: 1800 * time.Millisecond}, Inflight: 1})
		one := dig("one.test.", dns.TypeA)
		resolve(t, t.Context(), p, wire.TCP, one)
		time.Sleep(10 * time.Minute)
		up.set("silent")
		var wg sync.WaitGroup
		wg.Go(func() {
			if r := resolve(t, t.Context(), p, wire.TCP, one); len(edes(r)) != 1 {
				t.Errorf("got %v, want a stale answer", r)
			}
		})
		synctest.Wait()
		wg.Go(func() { resolve(t, t.Context(), p, wire.TCP, dig("two.test.", dns.TypeA)) })
		wg.Wait()
		up.set("")
		if r := resolve(t, t.Context(), p, wire.TCP, one); len(r.Answer) != 1 || len(edes(r)) != 0 {
			t.Errorf("afterwards: %v, want a fresh answer", r)
		}
	})
}

// TestRenewOnce has many clients get a stale answer at once before anybody is free to renew it: it is asked for once.
func TestRenewOnce(t *testing.T) {
	var up upstream
	clock := newClock()
	p := mustNew(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t), Now: clock.Now})
	raw := pack(t, dig("one.test.", dns.TypeA))
	ask(t, p, query(p, wire.UDP, raw))
	clock.add(10 * time.Minute)
	up.asked.Store(0)
	for range 5 {
		if _, v := ask(t, p, query(p, wire.UDP, raw)); v != wire.Answered {
			t.Fatalf("%v, want a stale answer", v)
		}
	}
	if n := len(p.renewals); n != 5 {
		t.Fatalf("%d are to be renewed, want 5", n)
	}
	for range 5 {
		r := <-p.renewals
		p.renewNow(t.Context(), &r)
	}
	if n := up.asked.Load(); n != 1 {
		t.Errorf("asked %d times, want once", n)
	}
}

// TestPrefetchQuestion asks below a name that does not exist: what is renewed is the denial of that name, with the DO and CD bits of
// those who ask, and nobody has to wait for it.
func TestPrefetchQuestion(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options []func(*dns.Msg)
		do, cd  bool
	}{
		{"plain", nil, false, false},
		{"DO", []func(*dns.Msg){dnssec}, true, false},
		{"CD", []func(*dns.Msg){cdflag}, false, true},
		{"DO and CD", []func(*dns.Msg){dnssec, cdflag}, true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var asked atomic.Int64
				up := exchange(func(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
					asked.Add(1)
					if name := req.Question[0].Name; name != "nxdomain.test." || req.IsEdns0().Do() != tt.do || req.CheckingDisabled != tt.cd {
						t.Errorf("asked for %s, DO %v, CD %v", name, req.IsEdns0().Do(), req.CheckingDisabled)
					}
					return world(ctx, req)
				})
				seen := &events{}
				p := running(t, Config{Groups: []Group{{Upstream: up}}, Cache: staleCache(t), Observer: seen})
				resolve(t, t.Context(), p, wire.UDP, dig("nxdomain.test.", dns.TypeA, tt.options...))
				for range 300 {
					time.Sleep(time.Second)
					resolve(t, t.Context(), p, wire.UDP, dig("x.y.nxdomain.test.", dns.TypeMX, tt.options...))
				}
				if n := seen.outcomes(); n[Hit] != 300 || seen.counted(Prefetch) < 4 || asked.Load() != int64(1+seen.counted(Prefetch)) {
					t.Errorf("outcomes %v, %d prefetches, %d questions; want 300 hits", n, seen.counted(Prefetch), asked.Load())
				}
			})
		})
	}
}

// TestPrefetchBoundary has a denial found near its end for a name below that goes to another group, which it says nothing about:
// that renews nothing, and takes the renewal from nobody.
func TestPrefetchBoundary(t *testing.T) {
	clock := newClock()
	var up, corp upstream
	p := mustNew(t, Config{Cache: staleCache(t), Now: clock.Now, Groups: []Group{up.group(), corp.group()},
		Routes: mustRoutes(t, route.Rule{Group: 1, Below: []string{"corp.nxdomain.test"}})})
	for range 4 {
		resolve(t, t.Context(), p, wire.TCP, dig("nxdomain.test.", dns.TypeA))
	}
	clock.add(55 * time.Second)
	for _, tt := range []struct {
		name string
		want int // renewals
	}{{"one.corp.nxdomain.test.", 0}, {"x.nxdomain.test.", 1}, {"x.nxdomain.test.", 1}} {
		resolve(t, t.Context(), p, wire.TCP, dig(tt.name, dns.TypeA))
		if n := len(p.renewals); n != tt.want {
			t.Errorf("%s: %d to renew, want %d", tt.name, n, tt.want)
		}
	}
	if n := corp.asked.Load(); n != 1 {
		t.Errorf("the other group was asked %d times, want once", n)
	}
}

// TestNoDenialBelow has denials that say nothing of the names below them: one whose time is over (RFC 8020, section 2), even where
// its own name still gets it; the root's; and one so deep that it is not looked for.
func TestNoDenialBelow(t *testing.T) {
	deep := strings.Repeat("a.", maxCuts-2) + "test." // maxCuts-1 labels
	for _, tt := range []struct {
		name, denied, below string
		later               time.Duration
		own, want           Outcome // of the denied name, and of the one below
	}{
		{"fresh", "nxdomain.test.", "x.nxdomain.test.", 0, Hit, Hit},
		{"stale", "nxdomain.test.", "x.nxdomain.test.", 10 * time.Minute, Stale, Miss},
		{"root", ".", "test.", 0, Hit, Miss},
		{"as deep as may be", "nxdomain." + deep, "x.nxdomain." + deep, 0, Hit, Hit},
		{"deeper", "nxdomain.a." + deep, "x.nxdomain.a." + deep, 0, Hit, Miss},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var up upstream
				seen := &events{}
				p := running(t, Config{Groups: []Group{up.group()}, Cache: staleCache(t), Observer: seen})
				up.set("NXDOMAIN")
				resolve(t, t.Context(), p, wire.TCP, dig(tt.denied, dns.TypeA))
				up.set("dead")
				time.Sleep(tt.later)
				for _, q := range []struct {
					name string
					want Outcome
				}{{tt.below, tt.want}, {tt.denied, tt.own}} {
					seen.list = nil
					resolve(t, t.Context(), p, wire.TCP, dig(q.name, dns.TypeAAAA))
					if got := seen.last(t); got.outcome != q.want {
						t.Errorf("%s: %v, want %v", q.name, got.outcome, q.want)
					}
				}
			})
		})
	}
}
