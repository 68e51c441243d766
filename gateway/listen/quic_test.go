package listen

import (
	"context"
	"errors"
	"fmt"
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

// TestQUICReachesHandler asks what the framework would answer by itself.
func TestQUICReachesHandler(t *testing.T) {
	h := newFake()
	s := listenQUIC(t, QUICConfig{Common: common(h)})
	conn := dialQUIC(t, s.Addr().String())
	msg := func(edit func(m *dns.Msg)) []byte {
		m := new(dns.Msg).SetQuestion("miss.test.", dns.TypeA)
		m.Id = 0
		edit(m)
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
	for name, frame := range map[string]func([]byte) []byte{
		"RFC 9250": func(b []byte) []byte { return framed(b) }, "draft": func(b []byte) []byte { return b },
	} {
		got, err := io.ReadAll(ask(t, conn, frame(b)))
		if err != nil || string(got) != string(frame(want)) {
			t.Errorf("%s: got %d octets, %v, want the %d that were sent", name, len(got), err, len(frame(want)))
		}
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
	if b, err := io.ReadAll(ask(t, conn, framed(response))); len(b) != 0 || err != nil {
		t.Errorf("a response got %d octets, %v", len(b), err)
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

	second := dialQUIC(t, s.Addr().String())
	_, err := io.ReadAll(ask(t, second, framed(query(t, "hit", 0))))
	var closed *quic.ApplicationError
	if !errors.As(err, &closed) || closed.ErrorCode != doqExcessiveLoad {
		t.Errorf("a connection over the limit: %v", err)
	}
	_ = conn.CloseWithError(0, "")
	for s.limit.count() != 0 {
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
	stream := ask(t, dialQUIC(t, s.Addr().String()), framed(query(t, "hit", 0)))
	if n := len(h.queries()); n != 0 {
		t.Errorf("%d queries were answered before Serve", n)
	}
	begin()
	answerOf(t, stream)
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

func TestStartError(t *testing.T) {
	addr := netip.MustParseAddrPort("127.0.0.1:853")
	var bind *BindError
	if err := startError(addr, errors.New("other")); errors.As(err, &bind) {
		t.Errorf("got %v", err)
	}
	err := startError(addr, fmt.Errorf("wrapped: %w", &net.OpError{Op: "listen", Net: "udp", Err: errors.New("taken")}))
	if !errors.As(err, &bind) || !strings.Contains(err.Error(), "binding udp 127.0.0.1:853: ") || !strings.Contains(err.Error(), "taken") {
		t.Errorf("got %v", err)
	}
}
