package forward

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"dnsgateway/gateway/wire"
	"github.com/AdguardTeam/dnsproxy/upstream"

	"github.com/miekg/dns"
)

var quietLog = log.New(io.Discard, "", 0)

var schemes = []string{"tls", "tcp", "udp", "https", "h3", "quic"}

// newTestClient returns a client for s that is closed at the end of the test.
func newTestClient(t testing.TB, s Server) client {
	t.Helper()
	c, err := newClient(s, environment{timeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestTransports(t *testing.T) {
	for _, scheme := range schemes {
		t.Run(scheme, func(t *testing.T) {
			f := newFake(t, scheme, "a")
			c := newTestClient(t, f.server)
			req := question("Name.Test.")
			req.SetEdns0(4096, true)
			req.CheckingDisabled = true
			opt := req.IsEdns0()
			opt.Option = append(opt.Option, &dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24,
				Address: net.IPv4(192, 0, 2, 0)}, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0123456789abcdef"})
			before := req.String()
			for range 3 {
				resp, err := c.Exchange(req)
				if err != nil {
					t.Fatal(err)
				}
				if got, want := text(resp), "a"; got != want {
					t.Errorf("got answer %q, want %q", got, want)
				}
				if resp.Id != req.Id || resp.Question[0] != req.Question[0] {
					t.Errorf("got ID %d and question %v, want the request's", resp.Id, resp.Question[0])
				}
				wantTTL := uint32(300)
				if scheme == "https" || scheme == "h3" {
					wantTTL = 200 // the fake says Age: 100
				}
				if got := resp.Answer[0].Header().Ttl; got != wantTTL {
					t.Errorf("got TTL %d, want %d", got, wantTTL)
				}
			}
			if req.String() != before {
				t.Errorf("the request was modified:\n%s", req)
			}
			checkSent(t, scheme, *f.last.Load())
			if n := f.conns.Load(); n > 1 {
				t.Errorf("got %d connections, want 1", n)
			}
			if got := c.Address(); got != f.server.URL {
				t.Errorf("got address %q, want %q", got, f.server.URL)
			}
		})
	}
}

// checkSent holds a query against what may leave the gateway.
func checkSent(t *testing.T, scheme string, raw []byte) {
	t.Helper()
	m := new(dns.Msg)
	if err := m.Unpack(raw); err != nil {
		t.Fatal(err)
	}
	if !m.CheckingDisabled || !m.RecursionDesired || m.Question[0].Name != "Name.Test." || !m.IsEdns0().Do() {
		t.Errorf("sent without CD, RD, DO or the question:\n%s", m)
	}
	encrypted := scheme != "udp" && scheme != "tcp"
	if encrypted && len(raw)%padBlock != 0 {
		t.Errorf("got %d octets, want a multiple of %d", len(raw), padBlock)
	}
	var codes []uint16
	for _, o := range m.IsEdns0().Option {
		codes = append(codes, o.Option())
	}
	for _, code := range codes {
		padding := code == wire.OptionPadding && encrypted
		alive := code == wire.OptionKeepalive && (scheme == "tls" || scheme == "tcp")
		if !padding && !alive {
			t.Errorf("got option %d in the query over %s", code, scheme)
		}
	}
	if got := m.IsEdns0().UDPSize(); got != udpSize {
		t.Errorf("got UDP size %d, want %d", got, udpSize)
	}
	if id := m.Id; (scheme == "https" || scheme == "h3" || scheme == "quic") && id != 0 {
		t.Errorf("got ID %d, want 0", id)
	}
}

// TestClientFaults asks each transport's client while its server has a fault, and holds the kind of error.
func TestClientFaults(t *testing.T) {
	tests := []struct {
		scheme string
		fault  int32
		kind   string
		text   string
	}{
		{"tls", silent, KindTimeout, ""},
		{"tls", hang, KindTimeout, ""},
		{"tls", badCert, KindTLS, "unknown authority"},
		{"tls", garbage, KindMismatch, "shorter than a header"},
		{"tls", notDNS, KindMismatch, ""},
		{"tls", wrongID, KindMismatch, "wrong ID"},
		{"tls", wrongName, KindMismatch, "wrong question"},
		{"tls", isQuery, KindMismatch, "not a response"},
		{"tls", cutMessage, KindMalformed, "malformed"},
		{"tls", cutFrame, KindIO, ""},
		{"tls", reset, KindIO, "reset"},
		{"tls", truncated, KindMalformed, "truncated"},
		{"tcp", hang, KindTimeout, ""},
		{"tcp", reset, KindIO, "reset"},
		{"udp", hang, KindTimeout, ""},
		{"udp", garbage, KindTimeout, "packets that were none"},
		{"udp", wrongID, KindTimeout, "packets that were none"},
		{"udp", wrongName, KindTimeout, "packets that were none"},
		{"udp", truncated, KindMalformed, "truncated"}, // over TCP too
		{"https", hang, KindTimeout, ""},
		{"https", badCert, KindTLS, "unknown authority"},
		{"https", garbage, KindMismatch, ""},
		{"https", wrongID, KindMismatch, "wrong ID"},
		{"https", wrongName, KindMismatch, "wrong question"},
		{"https", cutFrame, KindMismatch, "more than"},
		{"https", reset, KindIO, ""},
		{"h3", hang, KindTimeout, ""},
		{"h3", badCert, KindTLS, "unknown authority"},
		{"h3", wrongName, KindMismatch, "wrong question"},
		{"h3", reset, KindIO, ""},
		{"quic", hang, KindTimeout, ""},
		{"quic", badCert, KindTLS, "unknown authority"},
		{"quic", garbage, KindMismatch, ""},
		{"quic", wrongID, KindMismatch, "wrong ID"},
		{"quic", wrongName, KindMismatch, "wrong question"},
		{"quic", reset, KindIO, ""},
	}
	for _, tt := range tests {
		t.Run(tt.scheme+"/"+faultNames[tt.fault], func(t *testing.T) {
			t.Parallel()
			f := newFake(t, tt.scheme, "a")
			f.fault.Store(tt.fault)
			c := newTestClient(t, f.server)
			limit := 10 * time.Second // machines are slow
			if tt.kind == KindTimeout {
				limit = 700 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			q := must(queryOf(question("name.test.")))
			start := time.Now()
			resp, err := c.ask(ctx, q)
			if err == nil {
				t.Fatalf("got %v, want an error", resp)
			}
			if got := kindOf(err); got != tt.kind || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %q, want kind %q with %q", err, tt.kind, tt.text)
			}
			if d := time.Since(start); d > limit+time.Second {
				t.Errorf("took %v with a context of %v", d, limit)
			}
			// The server is well again: so is the client, without a restart.
			f.fault.Store(well)
			if !eventually(func() bool {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				_, err = c.ask(ctx, q)
				return err == nil
			}) {
				t.Errorf("after recovery: %v", err)
			}
		})
	}
}

// eventually tries for twenty seconds: machines are slow.
func eventually(try func() bool) bool {
	for start := time.Now(); time.Since(start) < 20*time.Second; time.Sleep(10 * time.Millisecond) {
		if try() {
			return true
		}
	}
	return false
}

func TestRefusedPort(t *testing.T) {
	for _, scheme := range []string{"tls", "tcp", "https", "udp"} {
		network := "tcp"
		if scheme == "udp" {
			network = "udp"
		}
		c := newTestClient(t, Server{URL: scheme, Scheme: scheme, Host: "127.0.0.1", Port: deadPort(network)})
		start := time.Now()
		_, err := c.Exchange(question("name.test."))
		if got := kindOf(err); got != KindConnect && scheme != "udp" || got != KindConnect && got != KindIO {
			t.Errorf("%s: got %v, want kind connect", scheme, err)
		}
		if d := time.Since(start); d > time.Second {
			t.Errorf("%s: took %v, want at once", scheme, d)
		}
	}
}

// TestStreamOrder holds that answers may come in any order and in any pieces.
func TestStreamOrder(t *testing.T) {
	for _, mode := range []int32{reversed, bytewise} {
		for _, scheme := range []string{"tls", "tcp"} {
			f := newFake(t, scheme, "a")
			f.fault.Store(mode)
			c := newTestClient(t, f.server)
			var wg sync.WaitGroup
			for i := range 10 {
				wg.Go(func() {
					name := string(rune('a'+i)) + ".test."
					resp, err := c.Exchange(question(name))
					if err != nil || resp.Answer[0].Header().Name != name {
						t.Errorf("%s, fault %d: %s: got %v, %v", scheme, mode, name, resp, err)
					}
				})
			}
			wg.Wait()
		}
	}
}

// TestFewConnections holds that many queries in flight share two connections.
func TestFewConnections(t *testing.T) {
	for _, scheme := range []string{"tls", "tcp", "https", "quic", "h3"} {
		t.Run(scheme, func(t *testing.T) {
			f := newFake(t, scheme, "a")
			f.delay.Store(int64(200 * time.Millisecond))
			c := must(newClient(f.server, environment{timeout: 20 * time.Second})) // machines are slow
			defer c.Close()
			n := 1000
			if scheme != "tls" && scheme != "tcp" {
				n = 300
			}
			var wg sync.WaitGroup
			var failed atomic.Int32
			for range n {
				wg.Go(func() {
					if _, err := c.Exchange(question("name.test.")); err != nil {
						failed.Add(1)
						t.Log(err)
					}
				})
			}
			wg.Wait()
			if got := failed.Load(); got != 0 {
				t.Errorf("%d of %d queries failed", got, n)
			}
			if got := f.conns.Load(); got > maxLinks {
				t.Errorf("got %d connections, want at most %d", got, maxLinks)
			}
		})
	}
}

// TestAskedAgain holds that a query in flight on a connection that breaks, and had been good, gets its answer from the
// same server over a new one.
func TestAskedAgain(t *testing.T) {
	for _, scheme := range []string{"tls", "tcp", "quic"} {
		t.Run(scheme, func(t *testing.T) {
			f := newFake(t, scheme, "a")
			c := newTestClient(t, f.server)
			if _, err := c.Exchange(question("first.test.")); err != nil {
				t.Fatal(err)
			}
			f.fault.Store(flap)
			for range 4 { // only the first query or two of a connection are answered
				if _, err := c.Exchange(question("second.test.")); err != nil {
					t.Fatal(err)
				}
			}
			if n := f.conns.Load(); n < 2 {
				t.Errorf("got %d connections, want the first to have broken", n)
			}
		})
	}
}

// TestStalledReplaced holds that a connection on which answers stop coming is replaced, and closed after a while.
func TestStalledReplaced(t *testing.T) {
	for _, scheme := range []string{"tls", "https", "quic"} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			f := newFake(t, scheme, "a")
			c := newTestClient(t, f.server)
			if _, err := c.Exchange(question("first.test.")); err != nil {
				t.Fatal(err)
			}
			f.fault.Store(hang)
			ctx, cancel := context.WithTimeout(t.Context(), stallAfter+100*time.Millisecond)
			defer cancel()
			if _, err := c.ask(ctx, must(queryOf(question("lost.test.")))); kindOf(err) != KindTimeout {
				t.Fatalf("got %v, want a timeout", err)
			}
			f.fault.Store(well)
			if _, err := c.Exchange(question("second.test.")); err != nil {
				t.Fatal(err)
			}
			if n := f.conns.Load(); n != 2 {
				t.Errorf("got %d connections, want a second one", n)
			}
		})
	}
}

// TestLateAnswer holds that the late answer to a query that was given up harms nobody.
func TestLateAnswer(t *testing.T) {
	f := newFake(t, "tls", "a")
	c := newTestClient(t, f.server)
	f.delay.Store(int64(100 * time.Millisecond))
	for range 5 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		c.ask(ctx, rootQuery)
		cancel()
	}
	f.delay.Store(0)
	if _, err := c.Exchange(question("name.test.")); err != nil {
		t.Fatal(err)
	}
	if n := f.conns.Load(); n != 1 {
		t.Errorf("got %d connections, want the one to have stayed", n)
	}
}

// TestBrokenConnections breaks thousands of connections and holds that nothing is left of them.
func TestBrokenConnections(t *testing.T) {
	n := 10000
	if testing.Short() || raceEnabled {
		n = 2000
	}
	f := newFake(t, "tcp", "a")
	f.fault.Store(reset)
	noLeak(t, func() {
		p := newStreamClient(f.server, must(newTarget(&f.server, environment{})), environment{timeout: time.Second}, false)
		defer p.Close()
		for f.conns.Load() < int64(n) {
			p.mu.Lock()
			p.retry, p.failures = time.Time{}, 0 // no back-off here
			p.mu.Unlock()
			if resp, err := p.Exchange(question("name.test.")); err == nil {
				t.Fatalf("got %v from a server that resets", resp)
			}
		}
	})
	if got := f.peak.Load(); got > maxLinks+maxDraining {
		t.Errorf("got %d connections at once, want at most %d", got, maxLinks+maxDraining)
	}
}

// TestResumption holds that a second connection resumes the TLS session of the first.
func TestResumption(t *testing.T) {
	f := newFake(t, "tls", "a")
	c := newTestClient(t, f.server).(*poolClient)
	for range 2 {
		if _, err := c.Exchange(question("name.test.")); err != nil {
			t.Fatal(err)
		}
		c.mu.Lock()
		l := c.links[0]
		c.mu.Unlock()
		l.vitals().die(nil)
	}
	if got := f.resume.Load(); got != 1 {
		t.Errorf("got %d resumed sessions, want 1", got)
	}
}

// TestIdle holds that a connection without queries is closed, and what the server says about it is heeded.
func TestIdle(t *testing.T) {
	keepalive := func(units uint16) func(*fake) {
		return func(f *fake) {
			f.answer = func(m *dns.Msg) *dns.Msg {
				r := new(dns.Msg)
				r.SetReply(m)
				r.SetEdns0(1232, false)
				ka := &dns.EDNS0_LOCAL{Code: dns.EDNS0TCPKEEPALIVE, Data: []byte{byte(units >> 8), byte(units)}}
				r.IsEdns0().Option = append(r.IsEdns0().Option, ka)
				return r
			}
		}
	}
	t.Run("timeout", func(t *testing.T) {
		f := newFake(t, "tcp", "a", keepalive(5))
		c := newTestClient(t, f.server).(*poolClient)
		if _, err := c.Exchange(question("name.test.")); err != nil {
			t.Fatal(err)
		}
		l := c.links[0].vitals()
		l.mu.Lock()
		got := l.idle
		l.used = time.Now().Add(-time.Minute)
		l.mu.Unlock()
		if got != 500*time.Millisecond {
			t.Errorf("got idle time %v, want 500ms", got)
		}
		l.tick()
		if !eventually(func() bool { return f.open.Load() == 0 }) {
			t.Error("the idle connection stays open")
		}
		if _, err := c.Exchange(question("name.test.")); err != nil {
			t.Errorf("after the idle close: %v", err)
		}
	})
	t.Run("zero", func(t *testing.T) {
		f := newFake(t, "tcp", "a", keepalive(0))
		c := newTestClient(t, f.server)
		for range 2 {
			if _, err := c.Exchange(question("name.test.")); err != nil {
				t.Fatal(err)
			}
			if !eventually(func() bool { return f.open.Load() == 0 }) {
				t.Error("the connection stays open, though the server wants it closed")
			}
		}
	})
}

// TestHangingDial holds that a dial that hangs does not keep out a later one, and that there are never many.
func TestHangingDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dials atomic.Int32
		p := newPool(environment{timeout: 10 * time.Second}, func(ctx context.Context, _ func(func())) (link, error) {
			dials.Add(1)
			<-ctx.Done()
			return nil, classify(KindConnect, "dialling", ctx.Err())
		})
		defer p.close()
		for range 9 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if _, err := p.ask(ctx, rootQuery); kindOf(err) != KindTimeout {
				t.Errorf("got %v, want a timeout", err)
			}
			cancel()
			time.Sleep(time.Millisecond)
		}
		if n := dials.Load(); n != 2 {
			t.Errorf("got %d dials in 9s, want 2", n)
		}
	})
}

// TestBackoff holds that a server that cannot be reached is not dialled for every query.
func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dials atomic.Int32
		p := newPool(environment{timeout: time.Second}, func(context.Context, func(func())) (link, error) {
			dials.Add(1)
			return nil, fault(KindConnect, "refused")
		})
		defer p.close()
		for range 10000 {
			if _, err := p.ask(t.Context(), rootQuery); kindOf(err) != KindConnect && kindOf(err) != KindBackoff {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
		if n := dials.Load(); n < 12 || n > 30 {
			t.Errorf("got %d dials in 10s, want a few at first and then one every %v or sooner", n, maxBackoff)
		}
	})
}

func TestUDP(t *testing.T) {
	t.Run("truncated goes over TCP", func(t *testing.T) {
		var udp, tcp atomic.Int32
		f := newFake(t, "udp", "a", func(f *fake) {
			f.answer = func(m *dns.Msg) *dns.Msg {
				r := new(dns.Msg)
				r.SetReply(m)
				// only the stream's form has the keepalive option
				if len(m.IsEdns0().Option) == 0 {
					udp.Add(1)
					r.Truncated = true
					return r
				}
				tcp.Add(1)
				for range 100 {
					r.Answer = append(r.Answer, &dns.TXT{Hdr: dns.RR_Header{Name: m.Question[0].Name,
						Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{strings.Repeat("x", 200)}})
				}
				return r
			}
		})
		c := newTestClient(t, f.server)
		resp, err := c.Exchange(question("big.test."))
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.Answer) != 100 || udp.Load() != 1 || tcp.Load() != 1 {
			t.Errorf("got %d records after %d queries over UDP and %d over TCP", len(resp.Answer), udp.Load(), tcp.Load())
		}
	})
	t.Run("a lost query is sent again", func(t *testing.T) {
		var n atomic.Int32
		f := newFake(t, "udp", "a", func(f *fake) {
			f.answer = func(m *dns.Msg) *dns.Msg {
				if n.Add(1) == 1 {
					return nil
				}
				return new(dns.Msg).SetReply(m)
			}
		})
		if _, err := newTestClient(t, f.server).Exchange(question("name.test.")); err != nil {
			t.Error(err)
		}
	})
	t.Run("close ends what waits", func(t *testing.T) {
		f := newFake(t, "udp", "a")
		f.fault.Store(silent)
		c := newTestClient(t, f.server)
		done := make(chan error, 1)
		go func() { _, err := c.Exchange(question("name.test.")); done <- err }()
		c.Close()
		if err := <-done; kindOf(err) != KindClosed {
			t.Errorf("got %v, want kind closed", err)
		}
	})
}

// fakeUpstream is a framework client that waits until it is let go.
type fakeUpstream struct {
	gate chan struct{}
	n    atomic.Int32
}

func (u *fakeUpstream) Exchange(req *dns.Msg) (*dns.Msg, error) {
	u.n.Add(1)
	<-u.gate
	req.Id = 0 // as the framework's DoQ does
	return new(dns.Msg).SetReply(req), nil
}
func (u *fakeUpstream) Address() string { return "fake" }
func (u *fakeUpstream) Close() error    { return nil }

func TestFrameworkBounds(t *testing.T) {
	noLeak(t, func() {
		up := &fakeUpstream{gate: make(chan struct{})}
		c := wrapUpstream(up, "sdns://fake", environment{timeout: time.Second})
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		var wg sync.WaitGroup
		for range maxAbandoned {
			wg.Go(func() {
				if _, err := c.ask(ctx, rootQuery); kindOf(err) != KindTimeout {
					t.Errorf("got %v, want a timeout", err)
				}
			})
		}
		wg.Wait()
		start := time.Now()
		if _, err := c.ask(t.Context(), rootQuery); kindOf(err) != KindBusy || time.Since(start) > time.Second {
			t.Errorf("got %v after %v, want kind busy at once", err, time.Since(start))
		}
		if got := c.abandonedCalls(); got != maxAbandoned {
			t.Errorf("got %d abandoned calls, want %d", got, maxAbandoned)
		}
		close(up.gate)
		if !eventually(func() bool { return c.abandonedCalls() == 0 }) {
			t.Errorf("got %d abandoned calls after they ended", c.abandonedCalls())
		}
		req := question("name.test.")
		id := req.Id
		if resp, err := c.Exchange(req); err != nil || resp.Id != id || req.Id != id {
			t.Errorf("got %v, %v, want the request's ID %d", resp, err, id)
		}
		c.Close()
		if _, err := c.ask(t.Context(), rootQuery); !errors.Is(err, errClosed) {
			t.Errorf("after Close: got %v", err)
		}
	})
}

func TestUpstreamVocabulary(t *testing.T) {
	for _, scheme := range schemes {
		f := newFake(t, scheme, "a")
		var u upstream.Upstream = newTestClient(t, f.server)
		if _, ok := u.(interface {
			ExchangeContext(context.Context, *dns.Msg) (*dns.Msg, error)
		}); !ok {
			t.Errorf("%s: no ExchangeContext", scheme)
		}
	}
}

// TestHTTP1 holds that a DoH server without HTTP/2 serves too, one query at a time on each connection, and that a query
// that is given up takes only its own connection with it.
func TestHTTP1(t *testing.T) {
	f := newFake(t, "https", "a", func(f *fake) { f.http1 = true })
	f.delay.Store(int64(10 * time.Millisecond))
	c := must(newClient(f.server, environment{timeout: 20 * time.Second}))
	defer c.Close()
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if _, err := c.Exchange(question("name.test.")); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := f.conns.Load(); n > maxLinks {
		t.Errorf("got %d connections, want at most %d", n, maxLinks)
	}
	f.fault.Store(hang)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.(*poolClient).ask(ctx, rootQuery); kindOf(err) != KindTimeout {
		t.Errorf("got %v, want a timeout", err)
	}
	f.fault.Store(well)
	for range 5 {
		if _, err := c.Exchange(question("name.test.")); err != nil {
			t.Error(err)
		}
	}
}

// TestLossyConnection holds that a connection on which many answers were lost takes no more queries, long before its IDs
// run out, and closes when the last one is over.
func TestLossyConnection(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	go io.Copy(io.Discard, far)
	var wg sync.WaitGroup
	l := newStreamLink(near, keepalive, wg.Go)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	waits := make(chan error)
	go func() { _, err := l.ask(t.Context(), rootQuery); waits <- err }()
	for {
		l.mu.Lock()
		live := l.live
		l.mu.Unlock()
		if live == 1 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	state := func() (draining, dead bool) {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.draining, l.dead
	}
	for range maxTombstones - 1 {
		if _, err := l.ask(over, rootQuery); kindOf(err) != KindAbandoned {
			t.Fatal(err)
		}
	}
	if draining, _ := state(); draining {
		t.Errorf("draining after %d lost answers", maxTombstones-1)
	}
	for range 2 {
		l.ask(over, rootQuery)
	}
	if draining, dead := state(); !draining || dead {
		t.Errorf("got draining %v, dead %v with a query in flight, want true, false", draining, dead)
	}
	answer := func(id uint16, q *query) {
		m := new(dns.Msg)
		m.SetReply(&dns.Msg{MsgHdr: dns.MsgHdr{Id: id}, Question: []dns.Question{askedOf(q)}})
		if err := l.deliver(must(m.Pack())); err != nil {
			t.Error(err)
		}
	}
	l.mu.Lock()
	var id uint16
	for i, c := range l.pending {
		if !c.givenUp {
			id = i
		}
	}
	l.mu.Unlock()
	answer(id, rootQuery)
	if err := <-waits; err != nil {
		t.Error(err)
	}
	if _, dead := state(); !dead {
		t.Error("still open after the last answer")
	}
	wg.Wait()
}
