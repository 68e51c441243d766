package listen

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"dnsgateway/gateway/wire"
)

func listenStream(t testing.TB, cfg StreamConfig) *Stream {
	t.Helper()
	s, err := ListenStream(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if withGoroutines {
		s.ln.Listener = disguised{s.ln.Listener}
	}
	serve(t, s)
	return s
}

// withGoroutines has connections driven by goroutines where loops would do it.
var withGoroutines bool

// disguised is a listener whose connections do not look like TCP.
type disguised struct{ net.Listener }

type disguisedConn struct{ net.Conn }

func (l disguised) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return disguisedConn{nc}, nil
}

func (c disguisedConn) CloseWrite() error { return c.Conn.(*net.TCPConn).CloseWrite() }

// streamClient asks over TCP, or over TLS when it is given a configuration.
type streamClient struct {
	t   testing.TB
	raw *net.TCPConn
	net.Conn
}

func dialStream(t testing.TB, s *Stream) *streamClient {
	t.Helper()
	nc, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	_ = nc.SetDeadline(time.Now().Add(10 * time.Second))
	c := &streamClient{t: t, raw: nc.(*net.TCPConn), Conn: nc}
	if s.cfg.TLS != nil {
		c.Conn = tls.Client(nc, clientConfig("dot"))
	}
	return c
}

func (c *streamClient) send(b []byte) {
	c.t.Helper()
	if _, err := c.Write(b); err != nil {
		c.t.Fatal(err)
	}
}

// ids reads n answers and returns their IDs.
func (c *streamClient) ids(n int) []int {
	c.t.Helper()
	var ids []int
	for range n {
		m, err := readFramed(c)
		if err != nil {
			c.t.Fatalf("after answers %v: %v", ids, err)
		}
		ids = append(ids, int(m.Id))
	}
	return ids
}

func (c *streamClient) want(ids ...int) {
	c.t.Helper()
	if got := c.ids(len(ids)); !slices.Equal(got, ids) {
		c.t.Fatalf("got answers %v, want %v", got, ids)
	}
}

// end fails unless the server has closed the connection.
func (c *streamClient) end() {
	c.t.Helper()
	if n, err := io.Copy(io.Discard, c); n != 0 || err != nil {
		c.t.Errorf("got %d octets and %v, want the end", n, err)
	}
}

func readFramed(r io.Reader) (*dns.Msg, error) {
	var prefix [2]byte
	if _, err := io.ReadFull(r, prefix[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint16(prefix[:]))
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, err
	}
	m := new(dns.Msg)
	return m, m.Unpack(b)
}

// overBoth runs test over TCP and over DoT, with either driver.
func overBoth(t *testing.T, test func(t *testing.T, cfg StreamConfig, h *fake)) {
	for _, name := range []string{"tcp", "dot", "tcp with goroutines", "dot with goroutines"} {
		t.Run(name, func(t *testing.T) {
			h := newFake()
			cfg := StreamConfig{Common: common(h)}
			if strings.HasPrefix(name, "dot") {
				cfg.TLS = serverConfig()
			}
			withGoroutines = strings.HasSuffix(name, "goroutines")
			defer func() { withGoroutines = false }()
			test(t, cfg, h)
		})
	}
}

func TestStream(t *testing.T) {
	overBoth(t, func(t *testing.T, cfg StreamConfig, h *fake) {
		s := listenStream(t, cfg)
		client := &dns.Client{Net: "tcp"}
		transport := wire.TCP
		if cfg.TLS != nil {
			client.Net, client.TLSConfig, transport = "tcp-tls", clientConfig(), wire.DoT
		}
		for i, name := range []string{"hit.test.", "miss.test."} {
			got, _, err := client.Exchange(new(dns.Msg).SetQuestion(name, dns.TypeA), s.Addr().String())
			if err != nil || len(got.Answer) != 1 {
				t.Fatalf("%s: %v, %v", name, got, err)
			}
			q := h.queries()[i]
			if q.Transport != transport || q.Listener != "test" || q.Local.String() != s.Addr().String() ||
				q.Client.Addr() != netip.MustParseAddr("127.0.0.1") || q.Received == 0 {
				t.Errorf("%s: got %+v", name, q)
			}
		}
	})
}

func TestStreamWildcardUnmapsClients(t *testing.T) {
	h := newFake()
	cfg := StreamConfig{Common: common(h)}
	cfg.Addr = netip.MustParseAddrPort("[::]:0")
	s := listenStream(t, cfg)
	for i, ip := range []string{"127.0.0.1", "::1"} {
		addr := netip.AddrPortFrom(netip.MustParseAddr(ip), addrPort(s.Addr()).Port())
		client := &dns.Client{Net: "tcp"}
		if _, _, err := client.Exchange(new(dns.Msg).SetQuestion("hit.test.", dns.TypeA), addr.String()); err != nil {
			t.Fatal(err)
		}
		if q := h.queries()[i]; q.Client.Addr().String() != ip || q.Local != addr {
			t.Errorf("got client %v, local %v, want %v and %v", q.Client, q.Local, ip, addr)
		}
	}
}

func TestStreamByteByByte(t *testing.T) {
	overBoth(t, func(t *testing.T, cfg StreamConfig, _ *fake) {
		c := dialStream(t, listenStream(t, cfg))
		_ = c.raw.SetNoDelay(true)
		for i, name := range []string{"hit", "miss"} {
			for _, b := range framed(query(t, name, uint16(i))) {
				c.send([]byte{b})
			}
			c.want(i)
		}
	})
}

// TestStreamOneSegment sends many messages in one write, so that they cross buffers and flush limits; misses in between
// come back in any order.
func TestStreamOneSegment(t *testing.T) {
	overBoth(t, func(t *testing.T, cfg StreamConfig, _ *fake) {
		cfg.Pipeline = 10
		c := dialStream(t, listenStream(t, cfg))
		const n = 1000
		var all []byte
		var want []int
		for i := range n {
			all = append(all, framed(query(t, []string{"hit", "hit", "miss"}[i%3], uint16(i)))...)
			want = append(want, i)
		}
		go func() { _, _ = c.Write(all) }()
		got := c.ids(n)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("got %v", got)
		}
	})
}

func TestStreamSlowHoldsNobody(t *testing.T) {
	overBoth(t, func(t *testing.T, cfg StreamConfig, h *fake) {
		c := dialStream(t, listenStream(t, cfg))
		c.send(framed(query(t, "slow", 1), query(t, "hit", 2), query(t, "miss", 3)))
		if got := c.ids(2); !slices.Contains(got, 2) || !slices.Contains(got, 3) {
			t.Errorf("got %v, want 2 and 3 in any order", got)
		}
		receive(t, h.waiting)
		c.send(framed(query(t, "hit", 4)))
		c.want(4)
		close(h.gate)
		c.want(1)
	})
}

func TestStreamHalfClose(t *testing.T) {
	overBoth(t, func(t *testing.T, cfg StreamConfig, h *fake) {
		c := dialStream(t, listenStream(t, cfg))
		// The last message is not whole: there is no answer to it, and it costs no other its answer.
		c.send(append(framed(query(t, "slow", 1), query(t, "hit", 2)), 0, 40, 1))
		if tc, ok := c.Conn.(*tls.Conn); ok {
			if err := tc.CloseWrite(); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.raw.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		c.want(2)
		receive(t, h.waiting)
		close(h.gate)
		c.want(1)
		c.end()
	})
}

func TestStreamPipelineLimit(t *testing.T) {
	overBoth(t, func(t *testing.T, cfg StreamConfig, h *fake) {
		cfg.Pipeline = 3
		c := dialStream(t, listenStream(t, cfg))
		c.send(framed(query(t, "hit", 1), query(t, "slow", 2), query(t, "slow", 3), query(t, "slow", 4)))
		c.send(framed(query(t, "hit", 5), query(t, "slow", 6)))
		c.want(1)
		for range 3 {
			receive(t, h.waiting)
		}
		// The limit is reached: 5 and 6 are not dropped, and not asked either.
		if n := len(h.queries()); n != 4 {
			t.Errorf("%d queries were taken, want 4", n)
		}
		h.gate <- struct{}{}
		got := c.ids(2) // one slow answer, and the hit behind it
		if got[0] == 5 || got[1] != 5 {
			t.Errorf("got %v, want a slow answer and 5", got)
		}
		receive(t, h.waiting)
		close(h.gate)
		c.ids(3)
	})
}

func TestStreamPerClientLimit(t *testing.T) {
	overBoth(t, func(t *testing.T, cfg StreamConfig, _ *fake) {
		cfg.PerClient = 2
		s := listenStream(t, cfg)
		open := func() *streamClient {
			c := dialStream(t, s)
			c.send(framed(query(t, "hit", 1)))
			c.want(1)
			return c
		}
		first := open()
		open()
		over := dialStream(t, s)
		_, _ = over.Write(framed(query(t, "hit", 1)))
		if _, err := readFramed(over); err == nil {
			t.Error("a connection over the limit got an answer")
		}
		_ = first.raw.Close()
		for s.ln.limit.open() != 1 {
			<-time.After(time.Millisecond)
		}
		open()
	})
}

func TestConnLimit(t *testing.T) {
	l := newConnLimit(Limits{PerClient: 2, PrefixV4: 24, PrefixV6: 56, Total: 4})
	ip := netip.MustParseAddr
	steps := []struct {
		client string
		want   bool
	}{
		{"192.0.2.1", true}, {"192.0.2.2", true}, {"192.0.2.3", false}, {"::ffff:192.0.2.4", false},
		{"2001:db8:0:1::1", true}, {"2001:db8:0:2::1", true}, {"2001:db8:0:3::1", false},
		{"198.51.100.1", false}, // the total is reached
	}
	for _, s := range steps {
		if got := l.acquire(ip(s.client)); got != s.want {
			t.Errorf("%s: got %v, want %v", s.client, got, s.want)
		}
	}
	l.release(ip("192.0.2.1"))
	l.release(ip("192.0.2.2"))
	l.release(ip("2001:db8:0:1::1"))
	l.release(ip("2001:db8:0:2::1"))
	if len(l.byClient) != 0 || l.total != 0 {
		t.Errorf("left: %v, %d", l.byClient, l.total)
	}
	if !l.acquire(netip.Addr{}) {
		t.Error("an address that is not known is not one client")
	}
}

func TestStreamHostile(t *testing.T) {
	overBoth(t, func(t *testing.T, cfg StreamConfig, _ *fake) {
		c := dialStream(t, listenStream(t, cfg))
		response := query(t, "hit", 1)
		response[2] |= 0x80
		c.send(framed(nil, []byte{1}, response, query(t, "drop", 2), query(t, "error", 3), query(t, "panic-hit", 4),
			query(t, "panic-miss", 5), query(t, "hit", 6)))
		c.want(6)
	})
}

func TestStreamLargeMessages(t *testing.T) {
	overBoth(t, func(t *testing.T, cfg StreamConfig, _ *fake) {
		cfg.Handler = echo{}
		c := dialStream(t, listenStream(t, cfg))
		for i, size := range []int{wire.MaxMessage, 12, readSize, readSize - 2, 20000} {
			msg := make([]byte, size)
			msg[1] = byte(i)
			go func() { _, _ = c.Write(framed(msg)) }()
			got := make([]byte, size+2)
			if _, err := io.ReadFull(c, got); err != nil {
				t.Fatal(err)
			}
			msg[2] |= 0x80
			if !bytes.Equal(got, framed(msg)) {
				t.Errorf("%d octets came back different", size)
			}
		}
	})
}

// TestStreamReaderThatDoesNotRead floods a connection with hits and takes nothing: the listener has to stop reading. Then
// the client takes all answers, and none is missing.
func TestStreamReaderThatDoesNotRead(t *testing.T) {
	cfg := StreamConfig{Common: common(echo{})}
	s := listenStream(t, cfg)
	c := dialStream(t, s)
	msg := make([]byte, 60000)
	b := framed(msg)
	sent := 0
	_ = c.raw.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
	var part int
	for {
		n, err := c.raw.Write(b)
		if err != nil {
			part = n
			break
		}
		if sent++; sent > 5000 {
			t.Fatal("the listener reads on and on")
		}
	}
	_ = c.raw.SetWriteDeadline(time.Time{})
	go func() { _, _ = c.raw.Write(b[part:]) }()
	if n, err := io.CopyN(io.Discard, c, int64((sent+1)*len(b))); err != nil {
		t.Errorf("got %d octets of %d answers: %v", n, sent+1, err)
	}
}

func TestStreamDrain(t *testing.T) {
	overBoth(t, func(t *testing.T, cfg StreamConfig, h *fake) {
		s := listenStream(t, cfg)
		c, idle := dialStream(t, s), dialStream(t, s)
		idle.send(framed(query(t, "hit", 9)))
		idle.want(9)
		c.send(framed(query(t, "slow", 1)))
		receive(t, h.waiting)
		done := shutdown(within(t), s)
		idle.end()
		if _, err := net.Dial("tcp", s.Addr().String()); err == nil {
			t.Error("a new connection while draining")
		}
		close(h.gate)
		c.want(1)
		c.end()
		if err := receive(t, done); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
	})
}

func TestStreamShutdownLosesPatience(t *testing.T) {
	overBoth(t, func(t *testing.T, cfg StreamConfig, h *fake) {
		s := listenStream(t, cfg)
		c := dialStream(t, s)
		c.send(framed(query(t, "slow", 1)))
		receive(t, h.waiting)
		ctx, cancel := context.WithCancel(context.Background())
		done := shutdown(ctx, s)
		cancel()
		if err := receive(t, done); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		receive(t, s.done)
	})
}

// TestStreamSocketGone closes the socket behind the listener's back: Serve says so at once, whatever its clients do.
func TestStreamSocketGone(t *testing.T) {
	overBoth(t, func(t *testing.T, cfg StreamConfig, h *fake) {
		s, err := ListenStream(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		if withGoroutines {
			s.ln.Listener = disguised{s.ln.Listener}
		}
		served := make(chan error, 1)
		go func() { served <- s.Serve() }()
		c, idle := dialStream(t, s), dialStream(t, s)
		idle.send(framed(query(t, "hit", 1)))
		idle.want(1)
		c.send(framed(query(t, "slow", 1)))
		receive(t, h.waiting)
		_ = s.ln.Listener.Close()
		if err := receive(t, served); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Serve: %v, want %v", err, net.ErrClosed)
		}
		if n := s.Connections(); n != 0 {
			t.Errorf("%d connections are open", n)
		}
		if err := s.Shutdown(within(t)); err != nil {
			t.Errorf("Shutdown afterwards: %v", err)
		}
		noLeaks(t)
	})
}

func TestDoTVersionsAndALPN(t *testing.T) {
	s := listenStream(t, StreamConfig{Common: common(newFake()), TLS: serverConfig()})
	tests := []struct {
		name string
		cfg  *tls.Config
		ok   bool
		alpn string
	}{
		{"dot", clientConfig("dot"), true, "dot"},
		{"dot among others", clientConfig("h2", "dot"), true, "dot"},
		{"no ALPN", clientConfig(), true, ""},
		{"another protocol", clientConfig("h2"), false, ""},
		{"TLS 1.2", &tls.Config{MaxVersion: tls.VersionTLS12}, true, ""},
		{"TLS 1.1", &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, false, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.cfg.RootCAs, tt.cfg.ServerName = clientConfig().RootCAs, "dns.test"
			c, err := tls.Dial("tcp", s.Addr().String(), tt.cfg)
			if (err == nil) != tt.ok {
				t.Fatalf("got %v, want success %v", err, tt.ok)
			}
			if err != nil {
				return
			}
			defer c.Close()
			if got := c.ConnectionState().NegotiatedProtocol; got != tt.alpn {
				t.Errorf("ALPN %q, want %q", got, tt.alpn)
			}
			if _, err := c.Write(framed(query(t, "hit", 1))); err != nil {
				t.Fatal(err)
			}
			if m, err := readFramed(c); err != nil || m.Id != 1 {
				t.Errorf("got %v, %v", m, err)
			}
		})
	}
}

// pipes is a net.Listener of in-memory connections, so that synctest's clock rules them.
type pipes struct {
	conns chan net.Conn
	once  sync.Once
	shut  chan struct{}
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), shut: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.shut:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.shut) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

func (p *pipes) dial() net.Conn {
	here, there := net.Pipe()
	p.conns <- there
	return here
}

// inTime runs test in a bubble with a stream listener on pipes.
func inTime(t *testing.T, cfg StreamConfig, test func(t *testing.T, p *pipes, s *Stream)) {
	synctest.Test(t, func(t *testing.T) {
		if err := cfg.complete(); err != nil {
			t.Fatal(err)
		}
		p := newPipes()
		s := newStream(cfg, p)
		served := make(chan error, 1)
		go func() { served <- s.Serve() }()
		test(t, p, s)
		if err := s.Shutdown(t.Context()); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

// ended returns after how long the server closed c.
func ended(c net.Conn) time.Duration {
	begin := time.Now()
	_, _ = io.Copy(io.Discard, c)
	return time.Since(begin)
}

const testIdle, testMessage, testHandshake = 7 * time.Second, 5 * time.Second, 3 * time.Second

func timed(h Handler) StreamConfig {
	return StreamConfig{
		Common: common(h), Limits: Limits{Idle: testIdle}, Message: testMessage, Handshake: testHandshake,
	}
}

// near fails unless a connection was closed after want, and a moment for the goodbye.
func near(t *testing.T, got, want time.Duration) {
	t.Helper()
	if got < want || got > want+2*linger {
		t.Errorf("closed after %v, want %v", got, want)
	}
}

func TestStreamIdle(t *testing.T) {
	inTime(t, timed(newFake()), func(t *testing.T, p *pipes, _ *Stream) {
		near(t, ended(p.dial()), testIdle)
	})
}

func TestStreamIdleAfterAnswers(t *testing.T) {
	inTime(t, timed(newFake()), func(t *testing.T, p *pipes, _ *Stream) {
		c := p.dial()
		for range 5 {
			time.Sleep(testIdle - time.Second) // the bubble's clock
			if _, err := c.Write(framed(query(t, "hit", 1))); err != nil {
				t.Fatal(err)
			}
			if _, err := readFramed(c); err != nil {
				t.Fatal(err)
			}
		}
		near(t, ended(c), testIdle)
	})
}

func TestStreamMessageNeverEnds(t *testing.T) {
	inTime(t, timed(newFake()), func(t *testing.T, p *pipes, _ *Stream) {
		c := p.dial()
		begin := time.Now()
		for _, b := range framed(query(t, "hit", 1)) {
			if _, err := c.Write([]byte{b}); err != nil {
				near(t, time.Since(begin), testMessage)
				return
			}
			time.Sleep(linger)
		}
		t.Error("a client may be as slow as it likes")
	})
}

func TestStreamInFlightIsNotIdle(t *testing.T) {
	h := newFake()
	h.gate = nil // made in the bubble
	inTime(t, timed(h), func(t *testing.T, p *pipes, _ *Stream) {
		h.gate, h.waiting = make(chan struct{}), make(chan string, 10)
		c := p.dial()
		if _, err := c.Write(framed(query(t, "slow", 1))); err != nil {
			t.Fatal(err)
		}
		<-h.waiting
		time.Sleep(10 * testIdle)
		close(h.gate)
		if m, err := readFramed(c); err != nil || m.Id != 1 {
			t.Fatalf("got %v, %v", m, err)
		}
		near(t, ended(c), testIdle)
	})
}

func TestStreamHandshakeNeverEnds(t *testing.T) {
	dot := timed(newFake())
	dot.TLS = serverConfig()
	inTime(t, dot, func(t *testing.T, p *pipes, _ *Stream) {
		near(t, ended(p.dial()), testHandshake)
	})
}

func TestStreamShutdownDuringHandshake(t *testing.T) {
	dot := timed(newFake())
	dot.TLS = serverConfig()
	inTime(t, dot, func(t *testing.T, p *pipes, s *Stream) {
		c := p.dial()
		synctest.Wait()
		begin := time.Now()
		if err := s.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		if d := time.Since(begin); d != 0 {
			t.Errorf("it took %v", d)
		}
		_ = c.Close()
	})
}

func TestStreamNobodyReads(t *testing.T) {
	inTime(t, timed(newFake()), func(t *testing.T, p *pipes, s *Stream) {
		c := p.dial()
		begin := time.Now()
		if _, err := c.Write(framed(query(t, "hit", 1), query(t, "miss", 2))); err != nil {
			t.Fatal(err)
		}
		for s.ln.limit.open() > 0 {
			time.Sleep(100 * time.Millisecond)
		}
		near(t, time.Since(begin), writeTimeout)
		_ = c.Close()
	})
}

// bulky answers every query after the gate has opened, with as much as a message holds.
type bulky struct {
	surprised
	gate chan struct{}
}

func (*bulky) ServeWire(dst []byte, _ *wire.Query) ([]byte, wire.Verdict) { return dst, wire.Miss }
func (b *bulky) Resolve(_ context.Context, dst []byte, _ *wire.Query) ([]byte, error) {
	<-b.gate
	return append(dst, make([]byte, wire.MaxMessage)...), nil
}

// TestStreamNobodyReadsMuch has 100 large answers ready at once for a client that does not read: they do not pile up
// until the write has waited for long enough, the connection is closed at once.
func TestStreamNobodyReadsMuch(t *testing.T) {
	// The gate is made in the bubble: whoever waits for a channel from outside keeps synctest.Wait waiting.
	h := &bulky{}
	inTime(t, timed(h), func(t *testing.T, p *pipes, s *Stream) {
		h.gate = make(chan struct{})
		c := p.dial()
		var queries [][]byte
		for i := range defaultPipeline {
			queries = append(queries, query(t, "miss", uint16(i)))
		}
		if _, err := c.Write(framed(queries...)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		begin := time.Now()
		close(h.gate)
		synctest.Wait()
		for s.ln.limit.open() > 0 {
			time.Sleep(100 * time.Millisecond)
		}
		near(t, time.Since(begin), 0)
		_ = c.Close()
	})
}

// TestStreamOneBatch has large answers come back together, in the hands of one goroutine: they count as well, when nobody reads
// them. A few wait for a client that takes its time, and a client that reads gets them all.
func TestStreamOneBatch(t *testing.T) {
	for _, tt := range []struct {
		name   string
		n      int
		unread time.Duration
		closed bool
	}{
		{"few for a slow client", 3, writeTimeout / 2, false},
		{"many for a slow client", defaultPipeline, writeTimeout / 2, true},
		{"many for a client that reads", defaultPipeline, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, client, ms := bulkyMisses(t, tt.n)
				c.mu.Lock()
				go c.miss(ms[0]) // it answers all when it comes to have the lock
				for c.back.Load() == nil {
					runtime.Gosched()
				}
				for _, m := range ms[1:] {
					c.miss(m)
				}
				c.mu.Unlock()
				time.Sleep(tt.unread)
				want := int64(tt.n * (prefixLen + wire.MaxMessage))
				got, _ := io.CopyN(io.Discard, client, want)
				c.s.wg.Wait()
				if tt.closed {
					want = 0
				}
				if c.broken != tt.closed || got != want {
					t.Errorf("%d octets were sent, want %d; closed: %v, want %v", got, want, c.broken, tt.closed)
				}
				if c.misses != 0 {
					t.Errorf("%d misses are left", c.misses)
				}
			})
		})
	}
}

// TestStreamUnsentBound has large answers come back one after the other for a client that does not read: what is pending for it
// stays within the bound, which one goroutine with misses may pass by what it has collected, and the connection is closed long
// before the write has had its time.
func TestStreamUnsentBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _, ms := bulkyMisses(t, defaultPipeline)
		begin := time.Now()
		for _, m := range ms {
			go c.miss(m)
			synctest.Wait()
			c.mu.Lock()
			if most := maxUnsent + flushSize + prefixLen + wire.MaxMessage; len(c.pending) > most {
				t.Errorf("%d octets are pending, want %d at most", len(c.pending), most)
			}
			c.mu.Unlock()
		}
		c.s.wg.Wait()
		if took := time.Since(begin); !c.broken || took != hurriedWrite {
			t.Errorf("after %v closed: %v, want it after %v", took, c.broken, hurriedWrite)
		}
		if c.misses != 0 {
			t.Errorf("%d misses are left", c.misses)
		}
	})
}

// bulkyMisses returns a connection with n misses that are to be given to its miss and whose answers are as large as may be, and
// the client's end of it.
func bulkyMisses(t *testing.T, n int) (c *streamConn, client net.Conn, ms []*miss) {
	t.Helper()
	h := &bulky{gate: make(chan struct{})}
	close(h.gate)
	common := common(h)
	s := newStreams(t.Context(), &common, nil, testIdle, testMessage)
	client, nc := net.Pipe()
	t.Cleanup(func() { _, _ = client.Close(), nc.Close() })
	d := newDNSMachine(newPeer(&common, nc, wire.TCP), n)
	c = newStreamConn(s, nc, nil, d)
	var tn turn
	if _, err := d.input(&tn, framed(slices.Repeat([][]byte{query(t, "miss", 1)}, n)...)); err != nil || len(tn.misses) != n {
		t.Fatal(len(tn.misses), err)
	}
	c.misses = n
	s.wg.Add(n)
	return c, client, tn.misses
}

// sized answers every query after the gate has opened, with so many octets.
type sized struct {
	surprised
	size    int
	waiting chan struct{}
	gate    chan struct{}
}

func (*sized) ServeWire(dst []byte, _ *wire.Query) ([]byte, wire.Verdict) { return dst, wire.Miss }
func (z *sized) Resolve(_ context.Context, dst []byte, _ *wire.Query) ([]byte, error) {
	z.waiting <- struct{}{}
	<-z.gate
	return append(dst, make([]byte, z.size)...), nil
}

// TestStreamReadyAtOnce has more than may wait for a client ready at once. The client reads, and gets it all.
func TestStreamReadyAtOnce(t *testing.T) {
	for _, tt := range []struct{ n, size int }{{defaultPipeline, 4000}, {8, 60000}} {
		t.Run(fmt.Sprintf("%d of %d octets", tt.n, tt.size), func(t *testing.T) {
			overBoth(t, func(t *testing.T, cfg StreamConfig, _ *fake) {
				h := &sized{size: tt.size, waiting: make(chan struct{}), gate: make(chan struct{})}
				cfg.Handler = h
				c := dialStream(t, listenStream(t, cfg))
				c.send(framed(slices.Repeat([][]byte{query(t, "miss", 1)}, tt.n)...))
				for range tt.n {
					<-h.waiting
				}
				close(h.gate)
				want := int64(tt.n * (prefixLen + tt.size))
				if got, err := io.CopyN(io.Discard, c, want); err != nil {
					t.Errorf("got %d of %d octets: %v", got, want, err)
				}
			})
		})
	}
}

// TestStreamPrefixAlone promises 64 KiB and sends nothing: no buffer is made for it.
func TestStreamPrefixAlone(t *testing.T) {
	c := &streamConn{buf: make([]byte, readSize)}
	c.buf[0], c.buf[1] = 0xff, 0xff
	if c.makeRoom(prefixLen); len(c.buf) != readSize {
		t.Errorf("after a prefix: got a buffer of %d octets, want %d", len(c.buf), readSize)
	}
	for len(c.buf) < prefixLen+wire.MaxMessage {
		before := len(c.buf)
		if c.makeRoom(before); len(c.buf) <= before || len(c.buf) > 2*before {
			t.Fatalf("a full buffer of %d octets became one of %d", before, len(c.buf))
		}
	}
	if len(c.buf) != prefixLen+wire.MaxMessage {
		t.Errorf("got a buffer of %d octets, want room for the message alone", len(c.buf))
	}
}

// failing fails as a listener does when descriptors run out, and goes on when they are back.
type failing struct {
	*pipes
	mu   sync.Mutex
	errs []error
}

func (f *failing) Accept() (net.Conn, error) {
	f.mu.Lock()
	if len(f.errs) > 0 {
		err := f.errs[0]
		f.errs = f.errs[1:]
		f.mu.Unlock()
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: err}
	}
	f.mu.Unlock()
	return f.pipes.Accept()
}

func TestAcceptSurvives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		ln := &failing{pipes: newPipes()}
		for _, err := range []error{
			syscall.ECONNABORTED, syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EPROTO,
		} {
			ln.errs = append(ln.errs, slices.Repeat([]error{err}, 5)...)
		}
		a := newAcceptor(ln, newConnLimit(Limits{}.withDefaults()), slog.New(slog.NewTextHandler(&log, nil)))
		begin := time.Now()
		go func() { _ = ln.dial() }()
		c, err := a.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if d := time.Since(begin); d < 10*time.Second || d > time.Minute {
			t.Errorf("30 failures took %v: no backoff, or too much", d)
		}
		if n := strings.Count(log.String(), "level=WARN"); n != 1 {
			t.Errorf("%d warnings, want 1:\n%s", n, log.String())
		}
		_ = c.Close()
		_ = c.Close()
		if n := a.limit.open(); n != 0 {
			t.Errorf("%d connections are counted after the last one", n)
		}
		// Close ends the pause, too.
		ln.errs = slices.Repeat([]error{syscall.EMFILE}, 1000)
		done := make(chan error)
		go func() {
			_, err := a.Accept()
			done <- err
		}()
		time.Sleep(5 * time.Second)
		_ = a.Close()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("got %v, want net.ErrClosed", err)
		}
	})
}

func BenchmarkStreamHits(b *testing.B) {
	cfg := StreamConfig{Common: common(echo{})}
	c := dialStream(b, listenStream(b, cfg))
	_ = c.raw.SetDeadline(time.Time{})
	const batch = 50
	var msgs []byte
	for i := range batch {
		msgs = append(msgs, framed(query(b, fmt.Sprint("hit", i), uint16(i)))...)
	}
	buf := make([]byte, len(msgs))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Write(msgs); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
	}
}

// TestStreamAllocs has hits allocate nothing of ours. crypto/tls allocates 24 octets for each record that it reads, at
// both ends, and more for a Read that has to wait for one.
func TestStreamAllocs(t *testing.T) {
	overBoth(t, func(t *testing.T, cfg StreamConfig, _ *fake) {
		cfg.Handler = echo{}
		most := 0.0
		if cfg.TLS != nil {
			if raceEnabled {
				t.Skip("the race detector has crypto/tls's pools forget things")
			}
			most = 2
		}
		c := dialStream(t, listenStream(t, cfg))
		msg := framed(query(t, "hit", 1))
		buf := make([]byte, len(msg))
		n := testing.AllocsPerRun(500, func() {
			if _, err := c.Write(msg); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c, buf); err != nil {
				t.Fatal(err)
			}
		})
		if n > most {
			t.Errorf("%v allocations a hit, want %v", n, most)
		}
	})
}
