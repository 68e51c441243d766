package forward

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// TestShortContext holds that no server is blamed when the caller's own deadline is shorter than its answers take.
func TestShortContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newTally()
		g, scripts := scripted(t, Config{Observer: o}, "a | b")
		scripts["a"].set(says("a", 0, 10*time.Millisecond))
		defer running(t, g)()
		load(t, g, 20*time.Millisecond, time.Second)
		time.Sleep(time.Second)
		for i := range 20 {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
			g.Exchange(ctx, question(fmt.Sprintf("n%d.test.", i)))
			cancel()
			time.Sleep(time.Millisecond)
		}
		if got := o.servers["a"].history(); got != "unknown ok" {
			t.Errorf("got states %q, want it not to be blamed: %+v", got, g.Status()[0])
		}
	})
}

// TestOtherLatency holds that a server that is slower from some moment on, and no less reliable, is not taken out of use
// time and again.
func TestOtherLatency(t *testing.T) {
	ms := time.Millisecond
	for _, stream := range []bool{true, false} {
		for _, d := range []time.Duration{60 * ms, 200 * ms, 600 * ms} {
			t.Run(fmt.Sprint(stream, d), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					o := newTally()
					var g *Group
					var set func(time.Duration)
					if stream {
						var servers map[string]*piped
						g, servers = piping(t, Config{Observer: o}, "a | b")
						set = func(d time.Duration) { servers["a"].set(after(d)) }
					} else {
						var scripts map[string]*script
						g, scripts = scripted(t, Config{Observer: o}, "a | b")
						scripts["a"].set(says("a", 0, 5*ms))
						scripts["b"].set(says("b", 0, 5*ms))
						set = func(d time.Duration) { scripts["a"].set(says("a", 0, d)) }
					}
					defer running(t, g)()
					load(t, g, 5*ms, time.Second)
					set(d)
					load(t, g, 5*ms, 60*time.Second)
					h := o.servers["a"].history()
					from, _ := load(t, g, 5*ms, time.Second)
					if n := strings.Count(h, "suspect"); n > 3 {
						t.Errorf("it was suspect %d times in a minute", n)
					}
					if d < maxHedge && from["a"] == 0 {
						t.Errorf("got %v, want it in use", from)
					}
				})
			})
		}
	}
}

// TestHardNames holds that names that are answered late, or by nobody, are not held against the server that is asked only
// such names, because it is the next one.
func TestHardNames(t *testing.T) {
	for _, d := range []time.Duration{500 * time.Millisecond, time.Hour} {
		for _, every := range []time.Duration{time.Millisecond, 50 * time.Millisecond} {
			t.Run(fmt.Sprint(d, every), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					o := newTally()
					j := newJournal()
					g, scripts := scripted(t, Config{Observer: o, Logger: j.Logger}, "a | b")
					defer running(t, g)()
					defer func() {
						if t.Failed() {
							t.Log(j.lines())
						}
					}()
					scripts["a"].set(slowNames("a", 33, d))
					scripts["b"].set(slowNames("b", 33, d))
					var wg sync.WaitGroup
					for i := range 2000 {
						wg.Go(func() { g.Exchange(t.Context(), question(fmt.Sprintf("n%d.test.", i))) })
						time.Sleep(every)
					}
					wg.Wait()
					for name, c := range o.servers {
						h := c.history()
						if n := strings.Count(h, StateSuspect) + strings.Count(h, StateFailing); n > 1 {
							t.Errorf("%s was away %d times, though it is well", name, n)
						}
					}
				})
			})
		}
	}
}

// TestMaxConnections holds that there are never more than four connections to a server, as it counts them itself, and
// that the observer counts none when the group is closed, whatever stalls and hangs.
func TestMaxConnections(t *testing.T) {
	ms := time.Millisecond
	for seed := range uint64(4) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 3))
			o := newTally()
			g, servers := piping(t, Config{Observer: o}, "a | b")
			stop := running(t, g)
			for _, s := range g.servers {
				s.stream.limit = 10 * time.Second // so that dials hang for long
			}
			var wg sync.WaitGroup
			for end := time.Now().Add(20 * time.Second); time.Now().Before(end); {
				p := servers[[]string{"a", "a", "b"}[r.IntN(3)]]
				p.set([]hearing{deaf, after(10 * ms), after(700 * ms), lossy(seed, 0.5, 10*ms)}[r.IntN(4)])
				p.mu.Lock()
				p.hangs = r.IntN(4) == 0
				p.mu.Unlock()
				for range r.IntN(20) {
					for range []int{1, 5, 2 * spread}[r.IntN(3)] {
						wg.Go(func() { g.Exchange(t.Context(), question("name.test.")) })
					}
					time.Sleep(time.Duration(r.IntN(150)) * ms)
				}
			}
			wg.Wait()
			stop()
			for name, p := range servers {
				if p.peak > maxConnections || p.open != 0 {
					t.Errorf("%s: got %d connections at once and %d after Close, want at most %d and none", name, p.peak,
						p.open, maxConnections)
				}
				c := o.servers[name]
				if c.conns.Load() != 0 || c.peak.Load() < 1 || c.peak.Load() > maxConnections {
					t.Errorf("%s: the observer got %d connections after Close and %d at once", name, c.conns.Load(), c.peak.Load())
				}
			}
		})
	}
}

// TestSlowAtLowRates asks one question a second of a server that takes 2 s, or says SERVFAIL after 1.5 s, while the next
// one is well. The root's servers it has at hand. It costs a few questions the hedge, and is left.
func TestSlowAtLowRates(t *testing.T) {
	for name, late := range map[string]play{
		"slow":          says("a", 0, 2*time.Second),
		"slow SERVFAIL": says("", dns.RcodeServerFailure, 1500*time.Millisecond),
	} {
		for _, before := range []int{0, 20, 100} {
			t.Run(fmt.Sprint(name, " after ", before), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					g, scripts := scripted(t, Config{}, "a | b")
					defer running(t, g)()
					ask := func(n int) (slow int) {
						for i := range n {
							start := time.Now()
							if _, err := g.Exchange(t.Context(), question(fmt.Sprintf("n%d.test.", i))); err != nil {
								t.Error(err)
							}
							took := time.Since(start)
							if took > maxHedge {
								t.Errorf("question %d took %v", i, took)
							}
							if took > minHedge {
								slow++
							}
							time.Sleep(time.Second - took)
						}
						return slow
					}
					ask(before)
					scripts["a"].set(func(ctx context.Context, q *query) (*dns.Msg, error) {
						if q == rootQuery {
							return says("a", 0, 0)(ctx, q)
						}
						return late(ctx, q)
					})
					if slow := ask(120); slow > 2*openAfterRefuted {
						t.Errorf("%d of 120 questions took longer than %v", slow, minHedge)
					}
				})
			})
		}
	}
}
