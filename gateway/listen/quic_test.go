package listen

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/quic-go/quic-go"

	"dnsgateway/gateway/wire"
)

func listenQUIC(t testing.TB, cfg QUICConfig) *QUIC {
	t.Helper()
	cfg.TLS = serverConfig()
	s, err := ListenQUIC(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, s)
	return s
}

func dialQUIC(t testing.TB, addr string) *quic.Conn {
	t.Helper()
	conn, err := quic.DialAddr(within(t), addr, clientConfig("doq"), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.CloseWithError(0, "") })
	return conn
}

// ask sends b on a stream of its own and returns the stream.
func ask(t testing.TB, conn *quic.Conn, b []byte) *quic.Stream {
	t.Helper()
	stream, err := conn.OpenStreamSync(within(t))
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := stream.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := stream.Close(); err != nil {
		t.Fatal(err)
	}
	return stream
}

// answerOf reads the one answer of a stream and its end.
func answerOf(t testing.TB, stream *quic.Stream) *dns.Msg {
	t.Helper()
	m, err := readFramed(stream)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := stream.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("behind the answer: %d octets, %v, want the end", n, err)
	}
	return m
}

// reset returns the code that the server has reset the stream with.
func reset(t testing.TB, stream *quic.Stream) quic.StreamErrorCode {
	t.Helper()
	b, err := io.ReadAll(stream)
	var serr *quic.StreamError
	if !errors.As(err, &serr) || !serr.Remote || len(b) != 0 {
		t.Fatalf("got %d octets and %v, want a reset stream", len(b), err)
	}
	return serr.ErrorCode
}

func TestQUIC(t *testing.T) {
	h := newFake()
	s := listenQUIC(t, QUICConfig{Common: common(h)})
	conn := dialQUIC(t, s.Addr().String())
	if got := conn.ConnectionState().TLS.NegotiatedProtocol; got != "doq" {
		t.Errorf("ALPN %q", got)
	}
	for i, name := range []string{"hit", "miss"} {
		if m := answerOf(t, ask(t, conn, framed(query(t, name, 0)))); len(m.Answer) != 1 {
			t.Errorf("%s: got %v", name, m)
		}
		q := h.queries()[i]
		if q.Transport != wire.DoQ || q.Listener != "test" || q.Received == 0 || q.Local.String() != s.Addr().String() ||
			q.Client.Port() != conn.LocalAddr().(*net.UDPAddr).AddrPort().Port() || q.Client.Addr().String() != "127.0.0.1" {
			t.Errorf("%s: got %+v", name, q)
		}
	}
	if s.Name() != "test" {
		t.Errorf("name %q", s.Name())
	}
}

func TestQUICWildcard(t *testing.T) {
	for bind, ask4 := range map[string][]string{"0.0.0.0:0": {"127.0.0.1", "127.0.0.2"}, "[::]:0": {"127.0.0.2", "::1"}} {
		t.Run(bind, func(t *testing.T) {
			h := newFake()
			cfg := QUICConfig{Common: common(h)}
			cfg.Addr = netip.MustParseAddrPort(bind)
			s := listenQUIC(t, cfg)
			for i, ip := range ask4 {
				to := netip.AddrPortFrom(netip.MustParseAddr(ip), addrPort(s.Addr()).Port())
				answerOf(t, ask(t, dialQUIC(t, to.String()), framed(query(t, "hit", 0))))
				if q := h.queries()[i]; q.Local != to || q.Client.Addr().Is4In6() {
					t.Errorf("asked %v: got local %v, client %v", to, q.Local, q.Client)
				}
			}
			if bind[0] == '0' {
				to := netip.AddrPortFrom(netip.IPv6Loopback(), addrPort(s.Addr()).Port())
				if _, err := quic.DialAddr(within(t), to.String(), clientConfig("doq"), nil); err == nil {
					t.Error("0.0.0.0 serves IPv6")
				}
			}
		})
	}
}

// TestQUICReachesHandler asks what needs the Handler's judgement, as on every other transport.
func TestQUICReachesHandler(t *testing.T) {
	h := newFake()
	s := listenQUIC(t, QUICConfig{Common: common(h)})
	conn := dialQUIC(t, s.Addr().String())
	msg := func(edit func(m *dns.Msg)) []byte {
		m := new(dns.Msg).SetQuestion("miss.test.", dns.TypeA)
		m.Id = 0
		edit(m)
		m.Id = 0
		b, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		return framed(b)
	}
	tests := []struct {
		name  string
		msg   []byte
		rcode int
	}{
		{"private PTR", msg(func(m *dns.Msg) { m.SetQuestion("1.0.0.10.in-addr.arpa.", dns.TypePTR) }), dns.RcodeSuccess},
		{"private SOA", msg(func(m *dns.Msg) { m.SetQuestion("168.192.in-addr.arpa.", dns.TypeSOA) }), dns.RcodeSuccess},
		{"ANY", msg(func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeANY }), dns.RcodeSuccess},
		{"no question", msg(func(m *dns.Msg) { m.Question = nil; m.SetEdns0(1232, false) }), dns.RcodeFormatError},
		{"two questions", msg(func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }), dns.RcodeFormatError},
		{"UPDATE", msg(func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }), dns.RcodeNotImplemented},
		{"nothing but a header", framed(make([]byte, 12)), dns.RcodeFormatError},
		{"nothing but a header, UPDATE", framed([]byte{0, 0, 0x28, 0, 0, 0, 0, 0, 0, 0, 0, 0}), dns.RcodeNotImplemented},
		{"octets behind the last record", framed(append(msg(func(*dns.Msg) {})[2:], 0, 0)), dns.RcodeFormatError},
		{"EDNS version", msg(func(m *dns.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) }), dns.RcodeBadVers},
	}
	for i, tt := range tests {
		m := answerOf(t, ask(t, conn, tt.msg))
		if m.Rcode != tt.rcode {
			t.Errorf("%s: got rcode %d, want %d", tt.name, m.Rcode, tt.rcode)
		}
		if n := len(h.queries()); n != i+1 {
			t.Fatalf("%s: %d queries have reached the handler, want %d", tt.name, n, i+1)
		}
	}
}

// TestQUICBytes checks that the Handler's octets are the client's: the size of a padded answer survives.
func TestQUICBytes(t *testing.T) {
	s := listenQUIC(t, QUICConfig{Common: common(echo{})})
	conn := dialQUIC(t, s.Addr().String())
	m := new(dns.Msg).SetQuestion("MiXed.test.", dns.TypeA)
	m.Id = 0
	m.SetEdns0(1232, false)
	m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_PADDING{Padding: make([]byte, 400)}}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	want := append([]byte(nil), b...)
	want[2] |= 0x80
	got, err := io.ReadAll(ask(t, conn, framed(b)))
	if err != nil || string(got) != string(framed(want)) {
		t.Errorf("got %d octets, %v, want the %d that were sent", len(got), err, len(framed(want)))
	}
}

func TestQUICNoAnswer(t *testing.T) {
	var log lockedBuilder
	cfg := QUICConfig{Common: common(newFake())}
	cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
	s := listenQUIC(t, cfg)
	conn := dialQUIC(t, s.Addr().String())
	for name, want := range map[string]quic.StreamErrorCode{
		"drop": doqUnspecified, "panic-hit": doqUnspecified, "panic-miss": doqInternalError, "error": doqUnspecified,
	} {
		if got := reset(t, ask(t, conn, framed(query(t, name, 0)))); got != want {
			t.Errorf("%s: reset with %d, want %d", name, got, want)
		}
	}
	response := query(t, "hit", 0)
	response[2] |= 0x80
	if got := reset(t, ask(t, conn, framed(response))); got != doqUnspecified {
		t.Errorf("a response: reset with %d, want %d", got, doqUnspecified)
	}
	answerOf(t, ask(t, conn, framed(query(t, "hit", 0)))) // the connection is as good as before
	// Garbage ends the connection; others go on, and nothing of it is logged.
	_, _ = io.ReadAll(ask(t, dialQUIC(t, s.Addr().String()), framed([]byte(strings.Repeat("garbage", 10)))))
	_, _ = io.ReadAll(ask(t, dialQUIC(t, s.Addr().String()), []byte("short")))
	answerOf(t, ask(t, conn, framed(query(t, "hit", 0))))
	for line := range strings.Lines(log.String()) {
		if !strings.Contains(line, "panic while answering a query") {
			t.Errorf("logged: %s", line)
		}
	}
}

func TestQUICSlowHoldsNobody(t *testing.T) {
	h := newFake()
	s := listenQUIC(t, QUICConfig{Common: common(h)})
	conn := dialQUIC(t, s.Addr().String())
	slow := ask(t, conn, framed(query(t, "slow", 0)))
	receive(t, h.waiting)
	answerOf(t, ask(t, conn, framed(query(t, "hit", 0))))
	answerOf(t, ask(t, conn, framed(query(t, "miss", 0))))
	close(h.gate)
	answerOf(t, slow)
}

func TestQUICLimits(t *testing.T) {
	h := newFake()
	s := listenQUIC(t, QUICConfig{Common: common(h), PerClient: 1, Inflight: 1})
	conn := dialQUIC(t, s.Addr().String())
	slow := ask(t, conn, framed(query(t, "slow", 0)))
	receive(t, h.waiting)
	if got := reset(t, ask(t, conn, framed(query(t, "miss", 0)))); got != doqExcessiveLoad {
		t.Errorf("a miss over the bound: reset with %d, want %d", got, doqExcessiveLoad)
	}
	answerOf(t, ask(t, conn, framed(query(t, "hit", 0))))
	close(h.gate)
	answerOf(t, slow)

	wantClosed(t, dialQUIC(t, s.Addr().String()), doqExcessiveLoad)
	_ = conn.CloseWithError(0, "")
	for s.Connections() != 0 {
		<-time.After(time.Millisecond)
	}
	answerOf(t, ask(t, dialQUIC(t, s.Addr().String()), framed(query(t, "hit", 0))))
}

func TestQUICWaitsForServe(t *testing.T) {
	h := newFake()
	s, err := ListenQUIC(t.Context(), QUICConfig{Common: common(h), TLS: serverConfig()})
	if err != nil {
		t.Fatal(err)
	}
	begin := serveLater(t, s)
	dialled := make(chan *quic.Conn, 1)
	go func() {
		conn, err := quic.DialAddr(within(t), s.Addr().String(), clientConfig("doq"), nil)
		if err != nil {
			t.Error(err)
		}
		dialled <- conn
	}()
	select {
	case <-dialled:
		t.Error("a handshake went on before Serve")
	case <-time.After(20 * time.Millisecond):
	}
	begin()
	answerOf(t, ask(t, receive(t, dialled), framed(query(t, "hit", 0))))
}

// wantClosed waits for the server to close conn, with code.
func wantClosed(t testing.TB, conn *quic.Conn, code quic.ApplicationErrorCode) {
	t.Helper()
	receive(t, conn.Context().Done())
	var closed *quic.ApplicationError
	if err := context.Cause(conn.Context()); !errors.As(err, &closed) || !closed.Remote || closed.ErrorCode != code {
		t.Errorf("got %v, want the connection closed with %d", err, code)
	}
}

// TestQUICProtocolErrors breaks the rules of RFC 9250, each on a connection of its own: the connection ends, and others
// go on.
func TestQUICProtocolErrors(t *testing.T) {
	h := newFake()
	s := listenQUIC(t, QUICConfig{Common: common(h)})
	good := dialQUIC(t, s.Addr().String())
	hit := query(t, "hit", 0)
	keepalive := new(dns.Msg).SetQuestion("hit.test.", dns.TypeA)
	keepalive.Id = 0
	keepalive.SetEdns0(1232, false)
	keepalive.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_TCP_KEEPALIVE{Code: dns.EDNS0TCPKEEPALIVE}}
	packed, err := keepalive.Pack()
	if err != nil {
		t.Fatal(err)
	}
	for name, sent := range map[string][]byte{
		"a message ID":             framed(query(t, "hit", 77)),
		"a second message":         append(framed(hit), framed(hit)...),
		"an octet behind":          append(framed(hit), 0),
		"an octet too few":         framed(hit)[:len(hit)+1],
		"half of a prefix":         {0},
		"nothing":                  {},
		"edns-tcp-keepalive":       framed(packed),
		"a prefix without a query": {0xff, 0xff},
	} {
		t.Run(name, func(t *testing.T) {
			conn := dialQUIC(t, s.Addr().String())
			ask(t, conn, sent)
			wantClosed(t, conn, doqProtocolError)
		})
	}
	if n := len(h.queries()); n != 0 {
		t.Errorf("%d of them have reached the handler", n)
	}
	answerOf(t, ask(t, good, framed(hit)))
}

// TestQUICIdle keeps a connection alive that asks nothing: it is closed all the same, and one that waits for its answer
// is not.
func TestQUICIdle(t *testing.T) {
	h := newFake()
	s := listenQUIC(t, QUICConfig{Common: common(h), Idle: 50 * time.Millisecond})
	waiting := dialQUIC(t, s.Addr().String())
	slow := ask(t, waiting, framed(query(t, "slow", 0)))
	receive(t, h.waiting)
	idle, err := quic.DialAddr(within(t), s.Addr().String(), clientConfig("doq"), &quic.Config{KeepAlivePeriod: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	wantClosed(t, idle, doqNoError)
	close(h.gate)
	answerOf(t, slow)
}

func TestQUICTotal(t *testing.T) {
	s := listenQUIC(t, QUICConfig{Common: common(newFake()), Total: 2})
	for range 2 {
		answerOf(t, ask(t, dialQUIC(t, s.Addr().String()), framed(query(t, "hit", 0))))
	}
	if _, err := quic.DialAddr(within(t), s.Addr().String(), clientConfig("doq"), nil); err == nil {
		t.Error("a third connection was let in")
	}
}

// TestQUICNo0RTT resumes a session: the client may send nothing before the handshake is over.
func TestQUICNo0RTT(t *testing.T) {
	s := listenQUIC(t, QUICConfig{Common: common(newFake())})
	cfg := clientConfig("doq")
	cfg.ClientSessionCache = tls.NewLRUClientSessionCache(1)
	for i := range 2 {
		conn, err := quic.DialAddrEarly(within(t), s.Addr().String(), cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		answerOf(t, ask(t, conn, framed(query(t, "hit", 0))))
		if state := conn.ConnectionState(); state.Used0RTT || i == 1 && !state.TLS.DidResume {
			t.Errorf("connection %d: 0-RTT %v, resumed %v", i, state.Used0RTT, state.TLS.DidResume)
		}
		_ = conn.CloseWithError(0, "")
	}
}

func TestQUICDrain(t *testing.T) {
	h := newFake()
	s := listenQUIC(t, QUICConfig{Common: common(h)})
	conn := dialQUIC(t, s.Addr().String())
	slow := ask(t, conn, framed(query(t, "slow", 0)))
	receive(t, h.waiting)
	done := shutdown(within(t), s)
	if got := reset(t, ask(t, conn, framed(query(t, "hit", 0)))); got != doqExcessiveLoad {
		t.Errorf("a new query while draining: reset with %d, want %d", got, doqExcessiveLoad)
	}
	close(h.gate)
	answerOf(t, slow)
	if err := receive(t, done); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
}

func TestQUICShutdownLosesPatience(t *testing.T) {
	h := newFake()
	s := listenQUIC(t, QUICConfig{Common: common(h)})
	conn := dialQUIC(t, s.Addr().String())
	ask(t, conn, framed(query(t, "slow", 0)))
	receive(t, h.waiting)
	ctx, cancel := context.WithCancel(context.Background())
	done := shutdown(ctx, s)
	cancel()
	if err := receive(t, done); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	receive(t, s.done)
}

func TestQUICTakenPort(t *testing.T) {
	taken := listenQUIC(t, QUICConfig{Common: common(newFake())})
	cfg := QUICConfig{Common: common(newFake()), TLS: serverConfig()}
	cfg.Addr = addrPort(taken.Addr())
	_, err := ListenQUIC(t.Context(), cfg)
	var bind *BindError
	if !errors.As(err, &bind) || bind.Network != "udp" {
		t.Errorf("got %v, want a *BindError", err)
	}
}
