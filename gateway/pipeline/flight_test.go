package pipeline

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"dnsgateway/gateway/wire"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

// outOfTime is an error as package forward has it when the deadline is over.
type outOfTime struct{}

func (outOfTime) Error() string { return "no answer in time" }
func (outOfTime) Timeout() bool { return true }

// slow answers like world after a while, and counts the questions.
func slow(d time.Duration, asked *atomic.Int64) exchange {
	return func(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
		asked.Add(1)
		select {
		case <-time.After(d):
			return world(ctx, req)
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func lower(b []byte) []byte {
	b = bytes.Clone(b)
	for i, c := range b {
		b[i] = wire.Lower(c)
	}
	return b
}

// resolve takes a query through both doors and unpacks the response.
func resolve(t *testing.T, ctx context.Context, p *Pipeline, transport wire.Transport, m *dns.Msg) *dns.Msg {
	t.Helper()
	q := query(p, transport, pack(t, m))
	out, v := p.ServeWire(nil, q)
	if v == wire.Miss {
		var err error
		if out, err = p.Resolve(ctx, nil, q); err != nil {
			t.Errorf("no response: %v", err)
			return new(dns.Msg)
		}
	}
	return checkResponse(t, q, out)
}

// TestCoalesce has many clients ask the same at once, in all ways in which one may ask the same: one question leaves, and each
// gets the response that it would have got alone.
func TestCoalesce(t *testing.T) {
	for _, cached := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			const clients = 1000
			var asked atomic.Int64
			seen := &events{}
			c := Config{Groups: []Group{{Upstream: slow(20*time.Millisecond, &asked)}}, Observer: seen, Now: time.Now}
			if cached {
				c.Cache = mustCache(t)
			}
			p := mustNew(t, c)
			alone := mustNew(t, Config{Now: time.Now})
			var wg sync.WaitGroup
			for i := range clients {
				wg.Go(func() {
					time.Sleep(time.Duration(i%20) * time.Millisecond / 2)
					name := []byte("big.test.")
					for b := range name {
						if i>>b&1 != 0 {
							name[b] &^= 0x20
						}
					}
					name[3], name[8] = '.', '.'
					var options []func(*dns.Msg)
					switch i % 5 {
					case 0:
						options = append(options, noedns)
					case 1:
						options = append(options, bufsize(4096), norec)
					case 2:
						options = append(options, option(&dns.EDNS0_PADDING{Padding: make([]byte, 8)}))
					case 3:
						options = append(options, additional("x. 1 IN A 192.0.2.1"))
					}
					m := dig(string(name), dns.TypeTXT, options...)
					raw := pack(t, m)
					transport := transports[i/5%len(transports)]
					want, _ := ask(t, alone, query(alone, transport, raw))
					q := query(p, transport, raw)
					out, v := ask(t, p, q)
					checkResponse(t, q, out)
					if !bytes.Equal(lower(out), lower(want)) { // the upstream's records have the leader's spelling
						t.Errorf("client %d: got %v, want %v", i, unpack(t, out), unpack(t, want))
					}
					if v != wire.Miss {
						t.Errorf("client %d: %v", i, v)
					}
				})
			}
			wg.Wait()
			if n := asked.Load(); n != 1 {
				t.Errorf("%d questions left for %d clients, want 1", n, clients)
			}
			if n := seen.counted(Coalesced); n != clients-1 {
				t.Errorf("%d followed, want %d", n, clients-1)
			}
			if diff := cmp.Diff(seen.outcomes(), map[Outcome]int{Miss: clients}); diff != "" {
				t.Errorf("outcomes, got -, want +:\n%s", diff)
			}
			if n := p.Inflight(); n != 0 {
				t.Errorf("%d in flight when all is done", n)
			}
		})
	}
}

// TestNotTheSame has questions that must not share an answer.
func TestNotTheSame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		up := Group{Upstream: slow(20*time.Millisecond, &asked)}
		p := mustNew(t, Config{Groups: []Group{up}, Now: time.Now})
		all := []*dns.Msg{
			dig("one.test.", dns.TypeA), dig("one.test.", dns.TypeAAAA), dig("one.test.", dns.TypeA, dnssec), dig("one.test.", dns.TypeA, cdflag),
			dig("one.test.", dns.TypeA, dnssec, cdflag), dig("two.test.", dns.TypeA), dig("x.one.test.", dns.TypeA),
			// The key has no class, so of other classes not even the same are.
			dig("one.test.", dns.TypeA, class(dns.ClassHESIOD)), dig("one.test.", dns.TypeA, class(dns.ClassHESIOD)),
		}
		var wg sync.WaitGroup
		for _, m := range all {
			wg.Go(func() { resolve(t, t.Context(), p, wire.TCP, m) })
		}
		wg.Wait()
		if n := asked.Load(); n != int64(len(all)) {
			t.Errorf("%d questions left, want %d", n, len(all))
		}
	})
}

// TestFollowPanic breaks the exchange of a flight: all who wait get SERVFAIL, and the log one line.
func TestFollowPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		seen := &events{}
		p := mustNew(t, Config{Observer: seen, Now: time.Now, Logger: slog.New(slog.NewTextHandler(&log, nil)), Groups: []Group{{Upstream: exchange(
			func(context.Context, *dns.Msg) (*dns.Msg, error) {
				time.Sleep(time.Second)
				panic("a broken invariant")
			})}}})
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				m := resolve(t, t.Context(), p, wire.UDP, dig("one.test.", dns.TypeA))
				if m.Rcode != dns.RcodeServerFailure || !cmp.Equal(edes(m), []wire.EDE{{Code: 0, Text: "internal error"}}) {
					t.Errorf("got %v", m)
				}
			})
		}
		wg.Wait()
		if n := strings.Count(log.String(), "\n"); n != 1 || p.Inflight() != 0 || seen.counted(Coalesced) != 9 {
			t.Errorf("%d lines, %d in flight, %d followed; want 1, 0, 9", n, p.Inflight(), seen.counted(Coalesced))
		}
	})
}

// TestLateFollower joins a question 2 s before its deadline of 3 s is over. It has 3 s of its own, and gets the answer of the
// next one; or SERVFAIL, and not before they are over.
func TestLateFollower(t *testing.T) {
	for _, tt := range []struct {
		name  string
		back  time.Duration // when the upstream answers again, from the start
		late  bool          // whether its error says that the time was over
		want  time.Duration // when the follower has a response
		rcode int
		asked int64
	}{
		{"the upstream comes back", 3500 * time.Millisecond, true, 3510 * time.Millisecond, dns.RcodeSuccess, 2},
		{"it does not", time.Hour, true, 5 * time.Second, dns.RcodeServerFailure, 2},
		{"it fails for another reason", time.Hour, false, 3 * time.Second, dns.RcodeServerFailure, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := mustCache(t) // which has the failure: that is for those who come later
				start := time.Now()
				var asked atomic.Int64
				up := exchange(func(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
					asked.Add(1)
					select {
					case <-time.After(3 * time.Second):
						if tt.late {
							return nil, fmt.Errorf("asking: %w", outOfTime{})
						}
						return nil, errors.New("all dead")
					case <-time.After(max(0, tt.back-time.Since(start)) + 10*time.Millisecond):
						return world(ctx, req)
					case <-ctx.Done():
						return nil, context.Cause(ctx)
					}
				})
				p := mustNew(t, Config{Groups: []Group{{Upstream: up}}, Now: time.Now, Cache: store})
				var wg sync.WaitGroup
				for _, client := range []struct {
					joins, gets time.Duration
					rcode       int
				}{{0, 3 * time.Second, dns.RcodeServerFailure}, {2 * time.Second, tt.want, tt.rcode}, {2 * time.Second, tt.want, tt.rcode}} {
					wg.Go(func() {
						time.Sleep(client.joins)
						m := resolve(t, t.Context(), p, wire.TCP, dig("one.test.", dns.TypeA))
						if took := time.Since(start); m.Rcode != client.rcode || took != client.gets {
							t.Errorf("who came at %v got RCODE %d at %v, want %d at %v", client.joins, m.Rcode, took, client.rcode, client.gets)
						}
					})
				}
				wg.Wait()
				synctest.Wait()
				if n := asked.Load(); n != tt.asked || p.Inflight() != 0 {
					t.Errorf("%d questions left and %d are in flight, want %d and 0", n, p.Inflight(), tt.asked)
				}
			})
		})
	}
}

// TestLeave ends the contexts of those who wait, the leader's first: the question goes on as long as somebody waits for it, and
// no longer.
func TestLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var asked, ended atomic.Int64
		up := exchange(func(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
			asked.Add(1)
			<-ctx.Done()
			ended.Store(int64(time.Since(start)))
			return nil, context.Cause(ctx)
		})
		p := mustNew(t, Config{Groups: []Group{{Upstream: up}}, Now: time.Now, Cache: mustCache(t)})
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * time.Millisecond)
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i+1)*time.Second)
				defer cancel()
				if m := resolve(t, ctx, p, wire.DoH, dig("one.test.", dns.TypeA)); m.Rcode != dns.RcodeServerFailure {
					t.Errorf("client %d got %v", i, m)
				}
				if took := time.Since(start); i > 0 && took != time.Duration(i+1)*time.Second+time.Duration(i)*time.Millisecond {
					t.Errorf("client %d waited for %v", i, took)
				}
			})
		}
		wg.Wait()
		if n, d := asked.Load(), time.Duration(ended.Load()); n != 1 || d != 3002*time.Millisecond || p.Inflight() != 0 {
			t.Errorf("%d questions, the last given up after %v, %d in flight; want 1, 3.002s, 0", n, d, p.Inflight())
		}
	})
}

// TestShed floods the bound with questions that nobody answers: each new one costs the oldest, whose clients get SERVFAIL at
// once, followers too; and a stale answer if there is one.
func TestShed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bound = 8
		seen := &events{}
		up := exchange(func(ctx context.Context, _ *dns.Msg) (*dns.Msg, error) {
			<-ctx.Done()
			return nil, context.Cause(ctx)
		})
		p := mustNew(t, Config{Groups: []Group{{Upstream: up}}, Now: time.Now, Inflight: bound, Observer: seen})
		start := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for i := range 100 {
			for range 2 {
				wg.Go(func() {
					time.Sleep(time.Duration(i) * time.Second)
					m := resolve(t, ctx, p, wire.TCP, dig(fmt.Sprintf("%d.test.", i), dns.TypeA))
					if i >= 100-bound {
						return
					}
					if took := time.Since(start); took != time.Duration(i+bound)*time.Second {
						t.Errorf("client %d had a response after %v", i, took)
					}
					if !cmp.Equal(edes(m), []wire.EDE{{Code: 0, Text: "too many queries in flight"}}) {
						t.Errorf("client %d: %v", i, edes(m))
					}
				})
			}
		}
		time.Sleep(200 * time.Second)
		if n := p.Inflight(); n != bound || seen.counted(Shed) != 100-bound {
			t.Errorf("%d in flight and %d shed, want %d and %d", n, seen.counted(Shed), bound, 100-bound)
		}
		cancel()
		wg.Wait()
		if n := p.Inflight(); n != 0 {
			t.Errorf("%d in flight when all is done", n)
		}
	})
}

// TestSameHash has two keys with one hash: they are two questions, and the second has no followers.
func TestSameHash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		p := mustNew(t, Config{Groups: []Group{{Upstream: slow(20*time.Millisecond, &asked)}}, Now: time.Now})
		p.hash = func([]byte) uint64 { return 1 }
		var wg sync.WaitGroup
		for _, name := range []string{"one.test.", "big.test.", "one.test.", "big.test."} {
			wg.Go(func() {
				if m := resolve(t, t.Context(), p, wire.TCP, dig(name, dns.TypeTXT)); len(m.Answer) == 0 || m.Answer[0].Header().Name != name {
					t.Errorf("%s: %v", name, m)
				}
			})
		}
		wg.Wait()
		if n := asked.Load(); n != 3 || p.Inflight() != 0 {
			t.Errorf("%d questions left and %d are in flight, want 3 and 0", n, p.Inflight())
		}
	})
}

// TestFlightsConcurrent is for the race detector: few names, a small bound, clients that leave.
func TestFlightsConcurrent(t *testing.T) {
	p := mustNew(t, Config{Now: time.Now, Inflight: 3, Cache: mustCache(t), Observer: &events{}})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 200 {
				ctx, cancel := context.WithCancel(context.Background())
				if n%7 == 0 {
					cancel()
				}
				resolve(t, ctx, p, wire.TCP, dig(fmt.Sprintf("%s.%d.test.", []string{"tc", "referral", "one"}[n%3], n/10), uint16(1+i%2*27)))
				cancel()
			}
		})
	}
	wg.Wait()
	if n := p.Inflight(); n != 0 {
		t.Errorf("%d in flight when all is done", n)
	}
	for i := range p.flights {
		if s := &p.flights[i]; len(s.byHash) != 0 || s.oldest != nil || s.newest != nil {
			t.Errorf("shard %d still has flights", i)
		}
	}
}

// TestDeserted has an upstream that takes a second to notice that nobody waits for its answer any more: who asks in that second
// has a question of his own.
func TestDeserted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		up := exchange(func(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
			if asked.Add(1) == 1 {
				<-ctx.Done()
				time.Sleep(time.Second)
				return nil, context.Cause(ctx)
			}
			return world(ctx, req)
		})
		p := mustNew(t, Config{Groups: []Group{{Upstream: up}}, Now: time.Now})
		var wg sync.WaitGroup
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			resolve(t, ctx, p, wire.TCP, dig("one.test.", dns.TypeA))
		})
		time.Sleep(1500 * time.Millisecond)
		if m := resolve(t, t.Context(), p, wire.TCP, dig("one.test.", dns.TypeA)); m.Rcode != dns.RcodeSuccess || asked.Load() != 2 {
			t.Errorf("RCODE %d after %d questions, want 0 after 2", m.Rcode, asked.Load())
		}
		wg.Wait()
		if n := p.Inflight(); n != 0 {
			t.Errorf("%d in flight when all is done", n)
		}
	})
}

// TestJoinAfterEnd has a query that looked into the cache before a flight stored its answer there, and joins when that flight is
// over: it is sent back to the cache. Without a key, which is never in the cache, it is not.
func TestJoinAfterEnd(t *testing.T) {
	p := mustNew(t, Config{Cache: mustCache(t)})
	q := query(p, wire.TCP, pack(t, dig("one.test.", dns.TypeA)))
	key, hash := p.key(q)
	s := p.flights.shard(hash)
	before := s.ended.Load()
	ask(t, p, query(p, wire.TCP, pack(t, dig("one.test.", dns.TypeA))))
	if f, seat := p.join(t.Context(), s, key, hash, before, q, false); f != nil || seat != nowhere {
		t.Errorf("with a key: seat %v, want %v", seat, nowhere)
	}
	if _, seat := p.join(t.Context(), s, nil, hash, before, q, false); seat != leading {
		t.Errorf("without a key: seat %v, want %v", seat, leading)
	}
	if _, seat := p.join(t.Context(), s, key, hash, s.ended.Load(), q, false); seat != leading {
		t.Errorf("with the count of now: seat %v, want %v", seat, leading)
	}
}

// TestLateTwice has followers whose second question is over early as well: they do not ask a third time.
func TestLateTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var asked atomic.Int64
		up := exchange(func(context.Context, *dns.Msg) (*dns.Msg, error) {
			if asked.Add(1) == 1 {
				time.Sleep(3 * time.Second)
			} else {
				time.Sleep(500 * time.Millisecond)
			}
			return nil, outOfTime{}
		})
		p := mustNew(t, Config{Groups: []Group{{Upstream: up}}, Now: time.Now})
		var wg sync.WaitGroup
		for i := range 20 { // whoever leads the second question, most come later than it
			wg.Go(func() {
				joins, want := time.Duration(0), 3*time.Second
				if i > 0 {
					joins, want = time.Second+time.Duration(i)*50*time.Millisecond, 3500*time.Millisecond
				}
				time.Sleep(joins)
				m := resolve(t, t.Context(), p, wire.TCP, dig("one.test.", dns.TypeA))
				if took := time.Since(start); m.Rcode != dns.RcodeServerFailure || took != want {
					t.Errorf("who came at %v got RCODE %d at %v, want 2 at %v", joins, m.Rcode, took, want)
				}
			})
		}
		wg.Wait()
		if n := asked.Load(); n != 2 {
			t.Errorf("%d questions left, want 2", n)
		}
	})
}

// TestLateFollowersFollower comes to a question that a follower asks who has followed in vain before: it waits for its own
// three seconds, and not for those of who asks.
func TestLateFollowersFollower(t *testing.T) {
	for _, store := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			up := exchange(func(ctx context.Context, _ *dns.Msg) (*dns.Msg, error) {
				select {
				case <-time.After(3 * time.Second):
					return nil, outOfTime{}
				case <-ctx.Done():
					return nil, context.Cause(ctx)
				}
			})
			c := Config{Groups: []Group{{Upstream: up}}, Now: time.Now}
			if store {
				c.Cache = mustCache(t)
			}
			p := mustNew(t, c)
			var wg sync.WaitGroup
			for _, joins := range []time.Duration{0, 200, 2800, 4020, 5900} {
				wg.Go(func() {
					time.Sleep(joins * time.Millisecond)
					m := resolve(t, t.Context(), p, wire.TCP, dig("one.test.", dns.TypeA))
					if took := time.Since(start) - joins*time.Millisecond; m.Rcode != dns.RcodeServerFailure || took != 3*time.Second {
						t.Errorf("cache %v: who came at %v ms got RCODE %d after %v, want 2 after 3s", store, int64(joins), m.Rcode, took)
					}
				})
			}
			wg.Wait()
		})
	}
}
