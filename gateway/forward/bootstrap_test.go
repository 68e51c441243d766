package forward

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

// addresses answers A and AAAA questions with addrs and ttl.
func addresses(ttl uint32, addrs ...string) play {
	return func(_ context.Context, q *query) (*dns.Msg, error) {
		m := new(dns.Msg)
		m.SetReply(&dns.Msg{Question: []dns.Question{askedOf(q)}})
		h := dns.RR_Header{Name: askedOf(q).Name, Rrtype: askedOf(q).Qtype, Class: dns.ClassINET, Ttl: ttl}
		for _, a := range addrs {
			ip := net.ParseIP(a)
			switch {
			case askedOf(q).Qtype == dns.TypeA && ip.To4() != nil:
				m.Answer = append(m.Answer, &dns.A{Hdr: h, A: ip})
			case askedOf(q).Qtype == dns.TypeAAAA && ip.To4() == nil:
				m.Answer = append(m.Answer, &dns.AAAA{Hdr: h, AAAA: ip})
			}
		}
		return m, nil
	}
}

// forFamily plays one of two scripts by the question's type.
func forFamily(a, aaaa play) play {
	return func(ctx context.Context, q *query) (*dns.Msg, error) {
		if askedOf(q).Qtype == dns.TypeA {
			return a(ctx, q)
		}
		return aaaa(ctx, q)
	}
}

func newTestBootstrap(t *testing.T) (*bootstrap, *script) {
	g, scripts := scripted(t, Config{}, "boot")
	b := &bootstrap{group: g, hosts: make(map[string]*host)}
	b.life, b.end = context.WithCancel(context.Background())
	return b, scripts["boot"]
}

func lookup(t *testing.T, b *bootstrap, want ...string) {
	t.Helper()
	addrs, err := b.lookup(t.Context(), "dns.test")
	var got []string
	for _, a := range interleave(addrs, 1) {
		got = append(got, a.Addr().String())
	}
	if diff := cmp.Diff(got, want); diff != "" {
		t.Errorf("got, want (error %v):\n%s", err, diff)
	}
}

func TestBootstrap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, boot := newTestBootstrap(t)
		defer b.close()
		boot.set(addresses(60, "192.0.2.1", "192.0.2.2", "2001:db8::1", "0.0.0.0", "224.0.0.1"))
		var wg sync.WaitGroup
		for range 50 { // one lookup for all
			wg.Go(func() { lookup(t, b, "2001:db8::1", "192.0.2.1", "192.0.2.2") })
		}
		wg.Wait()
		if n := boot.n.Load(); n != 2 {
			t.Errorf("got %d questions, want one for each family", n)
		}
		time.Sleep(59 * time.Second)
		lookup(t, b, "2001:db8::1", "192.0.2.1", "192.0.2.2")
		if n := boot.n.Load(); n != 2 {
			t.Errorf("got %d questions before the TTL was over", n)
		}
		// Old addresses serve while new ones are asked for, in vain and then not.
		boot.set(fails(KindConnect, 0))
		for range 10 {
			time.Sleep(10 * time.Second)
			lookup(t, b, "2001:db8::1", "192.0.2.1", "192.0.2.2")
		}
		synctest.Wait()
		if n := boot.n.Load(); n < 6 || n > 22 {
			t.Errorf("got %d questions while failing, want some with growing pauses", n)
		}
		boot.set(addresses(60, "192.0.2.9"))
		time.Sleep(2 * maxLookupPause)
		lookup(t, b, "2001:db8::1", "192.0.2.1", "192.0.2.2")
		synctest.Wait()
		lookup(t, b, "192.0.2.9")
	})
}

func TestBootstrapRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, boot := newTestBootstrap(t)
		defer b.close()
		b.want("dns.test")
		boot.set(addresses(100, "192.0.2.1"))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { b.run(ctx); close(done) }()
		time.Sleep(50 * time.Second)
		if n := boot.n.Load(); n != 2 {
			t.Errorf("got %d questions, want the name to be looked up once before anyone needs it", n)
		}
		boot.set(addresses(100, "192.0.2.2"))
		time.Sleep(40 * time.Second) // behind 80 of 100 s, before the end
		synctest.Wait()
		lookup(t, b, "192.0.2.2")
		cancel()
		<-done
	})
}

func TestBootstrapFamilies(t *testing.T) {
	tests := []struct {
		name    string
		a, aaaa play
		want    []string
		within  time.Duration
		err     string
	}{
		{"one is enough", addresses(60, "192.0.2.1"), fails(KindTimeout, 0), []string{"192.0.2.1"}, 0, ""},
		{"one waits a moment for the other", addresses(60, "192.0.2.1"), slowly(40*time.Millisecond,
			addresses(60, "2001:db8::1")), []string{"2001:db8::1", "192.0.2.1"}, 40 * time.Millisecond, ""},
		{"and not longer", addresses(60, "192.0.2.1"), slowly(2*time.Second, addresses(60, "2001:db8::1")),
			[]string{"192.0.2.1"}, resolutionDelay, ""},
		{"IPv6 only", addresses(60), addresses(60, "2001:db8::1"), []string{"2001:db8::1"}, 0, ""},
		{"none", addresses(60), addresses(60), nil, 0, "the name has none"},
		{"SERVFAIL", says("", 2, 0), says("", 2, 0), nil, 0, "SERVFAIL"},
		{"silent", mute, mute, nil, 3 * time.Second, "timeout"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, boot := newTestBootstrap(t)
				defer b.close()
				boot.set(forFamily(tt.a, tt.aaaa))
				start := time.Now()
				lookup(t, b, tt.want...)
				if got := time.Since(start); got != tt.within {
					t.Errorf("took %v, want %v", got, tt.within)
				}
				if tt.err == "" {
					return
				}
				_, err := b.lookup(t.Context(), "dns.test")
				if kindOf(err) != KindBootstrap || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("got %v, want kind bootstrap with %q", err, tt.err)
				}
			})
		})
	}
}

func slowly(d time.Duration, p play) play {
	return func(ctx context.Context, q *query) (*dns.Msg, error) {
		if !sleep(ctx, d) {
			return nil, classify(KindIO, "waiting", ctx.Err())
		}
		return p(ctx, q)
	}
}

// TestGroupByName goes the whole way: a bootstrap server by address, and upstream servers of all kinds by name.
func TestGroupByName(t *testing.T) {
	boot := newFake(t, "udp", "boot", func(f *fake) {
		f.answer = func(m *dns.Msg) *dns.Msg {
			r := new(dns.Msg)
			r.SetReply(m)
			if m.Question[0].Name == "dns.test." && m.Question[0].Qtype == dns.TypeA {
				r.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: "dns.test.", Rrtype: dns.TypeA, Class: dns.ClassINET,
					Ttl: 60}, A: net.IPv4(127, 0, 0, 1)}}
			}
			return r
		}
	})
	for _, scheme := range schemes {
		f := newFake(t, scheme, scheme)
		s := f.server
		s.Host, s.VerifyName = "dns.test", ""
		g := newTestGroup(t, Config{Tiers: [][]Server{{s}}, Bootstrap: []Server{boot.server}})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- g.Run(ctx) }()
		if resp, err := g.Exchange(t.Context(), question("name.test.")); err != nil || text(resp) != scheme {
			t.Errorf("%s: got %v, %v", scheme, resp, err)
		}
		cancel()
		<-done
	}
}

// TestRace holds the order and the timing of several addresses, RFC 8305.
func TestRace(t *testing.T) {
	type conn struct{ addr string }
	ms := time.Millisecond
	tests := []struct {
		name   string
		plan   map[string]time.Duration // how long until it is open; negative: until it fails
		want   string
		within time.Duration
		tried  int32
	}{
		{"first is well", map[string]time.Duration{"::1": 10 * ms, "192.0.2.1": 1}, "::1", 10 * ms, 1},
		{"first is silent", map[string]time.Duration{"::1": time.Hour, "192.0.2.1": 10 * ms}, "192.0.2.1", 260 * ms, 2},
		{"first fails", map[string]time.Duration{"::1": -10 * ms, "192.0.2.1": 10 * ms}, "192.0.2.1", 20 * ms, 2},
		{"slow first wins", map[string]time.Duration{"::1": 300 * ms, "192.0.2.1": time.Second}, "::1", 300 * ms, 2},
		{"none", map[string]time.Duration{"::1": -10 * ms, "192.0.2.1": -10 * ms}, "", 20 * ms, 2},
		{"all silent", map[string]time.Duration{"::1": time.Hour, "192.0.2.1": time.Hour}, "", 3 * time.Second, 2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var tried, shut atomic.Int32
				target := &target{fixed: []netip.AddrPort{netip.MustParseAddrPort("[::1]:1"), netip.MustParseAddrPort("192.0.2.1:1")}}
				ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
				defer cancel()
				start := time.Now()
				got, err := race(ctx, target, func(ctx context.Context, a netip.AddrPort) (*conn, error) {
					tried.Add(1)
					d := tt.plan[a.Addr().String()]
					if !sleep(ctx, max(d, -d)) {
						return nil, classify(KindConnect, "opening", ctx.Err())
					}
					if d < 0 {
						return nil, fault(KindConnect, "refused")
					}
					return &conn{a.Addr().String()}, nil
				}, func(*conn) { shut.Add(1) })
				switch {
				case tt.want == "" && err == nil, tt.want != "" && (err != nil || got.addr != tt.want):
					t.Errorf("got %v, %v, want %q", got, err, tt.want)
				case tt.want == "" && errors.Is(err, context.Canceled):
					t.Errorf("got %v", err)
				}
				if d := time.Since(start); d != tt.within {
					t.Errorf("took %v, want %v", d, tt.within)
				}
				if n := tried.Load(); n != tt.tried {
					t.Errorf("tried %d addresses, want %d", n, tt.tried)
				}
			})
		})
	}
}

func TestInterleave(t *testing.T) {
	var in []netip.Addr
	for _, a := range []string{"192.0.2.1", "192.0.2.2", "::ffff:192.0.2.3", "2001:db8::1", "192.0.2.4", "192.0.2.5", "192.0.2.6"} {
		in = append(in, netip.MustParseAddr(a))
	}
	var got []string
	for _, a := range interleave(in, 853) {
		got = append(got, a.String())
	}
	want := []string{"[2001:db8::1]:853", "192.0.2.1:853", "192.0.2.2:853", "192.0.2.3:853", "192.0.2.4:853", "192.0.2.5:853"}
	if diff := cmp.Diff(got, want); diff != "" {
		t.Errorf("got, want:\n%s", diff)
	}
}
