package listen

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"

	"dnsgateway/gateway/wire"
)

func listenPacket(t testing.TB, cfg PacketConfig) *Packet {
	t.Helper()
	l, err := ListenPacket(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l)
	return l
}

// dial returns a connected UDP socket: it takes answers only from the address that it asks.
func dial(t testing.TB, addr string) *net.UDPConn {
	t.Helper()
	c, err := net.Dial("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	return c.(*net.UDPConn)
}

func send(t testing.TB, c net.Conn, msg []byte) {
	t.Helper()
	if _, err := c.Write(msg); err != nil {
		t.Fatal(err)
	}
}

func readMsg(t testing.TB, c net.Conn) *dns.Msg {
	t.Helper()
	buf := make([]byte, 65535)
	n, err := c.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	m := new(dns.Msg)
	if err := m.Unpack(buf[:n]); err != nil {
		t.Fatal(err)
	}
	return m
}

// loops runs a test over both ways to move datagrams, which are one where there are no batches.
func loops(t *testing.T, test func(t *testing.T, plain bool)) {
	t.Run("batch", func(t *testing.T) { test(t, false) })
	t.Run("plain", func(t *testing.T) { test(t, true) })
}

func TestPacket(t *testing.T) { loops(t, testPacket) }

func testPacket(t *testing.T, plain bool) {
	h := newFake()
	l := listenPacket(t, PacketConfig{Common: common(h), plain: plain})
	for _, name := range []string{"hit.test.", "miss.test."} {
		client := &dns.Client{Net: "udp"}
		got, _, err := client.Exchange(new(dns.Msg).SetQuestion(name, dns.TypeA), l.Addr().String())
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(got.Answer) != 1 {
			t.Errorf("%s: got %v, want one answer", name, got)
		}
	}
	if l.Name() != "test" {
		t.Errorf("name %q", l.Name())
	}
}

func TestPacketQueryFields(t *testing.T) { loops(t, testPacketQueryFields) }

func testPacketQueryFields(t *testing.T, plain bool) {
	h := newFake()
	l := listenPacket(t, PacketConfig{Common: common(h), plain: plain})
	c := dial(t, l.Addr().String())
	before := time.Now().UnixNano()
	send(t, c, query(t, "hit", 7))
	readMsg(t, c)
	q := h.queries()[0]
	if q.Received < before || q.Received > time.Now().UnixNano() {
		t.Errorf("Received %d is not between the question and the answer", q.Received)
	}
	type fields struct {
		Client, Local string
		Transport     wire.Transport
		Listener      string
		ID            uint16
	}
	got := fields{q.Client.String(), q.Local.String(), q.Transport, q.Listener, q.ID}
	want := fields{c.LocalAddr().String(), l.Addr().String(), wire.UDP, "test", 7}
	if d := cmp.Diff(got, want); d != "" {
		t.Error(d)
	}
}

// TestPacketWildcard asks a wildcard socket by several addresses, with clients that take answers from no other.
func TestPacketWildcard(t *testing.T) { loops(t, testPacketWildcard) }

func testPacketWildcard(t *testing.T, plain bool) {
	tests := []struct {
		bind string
		ask  []string
	}{
		{"0.0.0.0:0", []string{"127.0.0.1", "127.0.0.2", "127.5.6.7"}},
		{"[::]:0", []string{"127.0.0.1", "127.0.0.2", "::1"}},
		{"[::1]:0", []string{"::1"}},
	}
	for _, tt := range tests {
		for _, name := range []string{"hit", "miss"} {
			t.Run(tt.bind+" "+name, func(t *testing.T) {
				h := newFake()
				cfg := PacketConfig{Common: common(h), plain: plain}
				cfg.Addr = netip.MustParseAddrPort(tt.bind)
				l := listenPacket(t, cfg)
				port := addrPort(l.Addr()).Port()
				for i, ip := range tt.ask {
					to := netip.AddrPortFrom(netip.MustParseAddr(ip), port)
					c := dial(t, to.String())
					send(t, c, query(t, name, uint16(i)))
					if m := readMsg(t, c); m.Id != uint16(i) || len(m.Answer) != 1 {
						t.Errorf("%v: got %v", to, m)
					}
					q := h.queries()[i]
					if q.Local != to {
						t.Errorf("Local: got %v, want %v", q.Local, to)
					}
					if want := c.LocalAddr().(*net.UDPAddr).AddrPort(); q.Client != unmap(want) {
						t.Errorf("Client: got %v, want %v", q.Client, want)
					}
				}
			})
		}
	}
}

func TestPacketSlowHoldsNobody(t *testing.T) { loops(t, testPacketSlowHoldsNobody) }

func testPacketSlowHoldsNobody(t *testing.T, plain bool) {
	h := newFake()
	l := listenPacket(t, PacketConfig{Common: common(h), plain: plain})
	c := dial(t, l.Addr().String())
	send(t, c, query(t, "slow", 1))
	receive(t, h.waiting)
	for i, name := range []string{"hit", "miss"} {
		send(t, c, query(t, name, uint16(2+i)))
		if m := readMsg(t, c); m.Id != uint16(2+i) {
			t.Fatalf("got answer %d, want %d", m.Id, 2+i)
		}
	}
	close(h.gate)
	if m := readMsg(t, c); m.Id != 1 {
		t.Errorf("got answer %d, want 1", m.Id)
	}
}

// TestPacketOverload fills the workers and the queue behind them: the oldest miss that waits is shed, and no hit is.
func TestPacketOverload(t *testing.T) { loops(t, testPacketOverload) }

func testPacketOverload(t *testing.T, plain bool) {
	h := newFake()
	l := listenPacket(t, PacketConfig{Common: common(h), Inflight: 2, Sockets: 1, plain: plain})
	c := dial(t, l.Addr().String())
	for id := range 2 {
		send(t, c, query(t, "slow", uint16(id)))
		receive(t, h.waiting)
	}
	for id := 10; id < 15; id++ {
		send(t, c, query(t, "miss", uint16(id)))
		send(t, c, query(t, "hit", uint16(100+id)))
	}
	for id := 10; id < 15; id++ {
		if m := readMsg(t, c); m.Id != uint16(100+id) {
			t.Fatalf("got answer %d, want the hit %d", m.Id, 100+id)
		}
	}
	if n := l.Shed(); n != 3 {
		t.Errorf("%d misses are shed, want 3", n)
	}
	close(h.gate)
	var got []int
	for range 4 {
		got = append(got, int(readMsg(t, c).Id))
	}
	slices.Sort(got)
	if d := cmp.Diff(got, []int{0, 1, 13, 14}); d != "" {
		t.Error(d)
	}
	send(t, c, query(t, "miss", 20))
	if m := readMsg(t, c); m.Id != 20 {
		t.Errorf("got answer %d, want 20", m.Id)
	}
	if n := l.Shed(); n != 3 {
		t.Errorf("%d misses are shed in the end, want 3", n)
	}
}

// stuck is a sender that waits for a word on gate.
type stuck struct {
	gate chan struct{}
	sent int
}

func (s *stuck) send(answers []answer) {
	<-s.gate
	s.sent += len(answers)
}

// TestPacketUnsent has a socket take nothing while answers are ready: what is too much is counted, and is worth a warning
// now and then.
func TestPacketUnsent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log syncBuffer
		c := common(echo{})
		c.Logger = slog.New(slog.NewTextHandler(&log, nil))
		tx := &stuck{gate: make(chan struct{})}
		l := &Packet{cfg: PacketConfig{Common: c}}
		l.pool.New = func() any { return new(pending) }
		s := &socket{l: l, tx: tx}
		post := func() { s.post(&pending{resp: make([]byte, 1)}) }
		go post()
		synctest.Wait() // it is sending
		for range maxUnsentAnswers + 3 {
			post()
		}
		check := func(unsent uint64, warnings int) {
			t.Helper()
			if n := l.Unsent(); n != unsent {
				t.Errorf("%d answers are given up, want %d", n, unsent)
			}
			if n := strings.Count(log.String(), "level=WARN"); n != warnings {
				t.Errorf("%d warnings, want %d:\n%s", n, warnings, log.String())
			}
		}
		check(3, 1)
		time.Sleep(warnEvery)
		post()
		post()
		check(5, 2)
		close(tx.gate)
		synctest.Wait()
		post()
		if want := 1 + maxUnsentAnswers + 1; tx.sent != want {
			t.Errorf("%d answers were sent, want %d", tx.sent, want)
		}
		check(5, 2)
	})
}

// TestPacketHostile sends what has no answer, and what makes the Handler panic; the next query is answered.
func TestPacketHostile(t *testing.T) { loops(t, testPacketHostile) }

func testPacketHostile(t *testing.T, plain bool) {
	l := listenPacket(t, PacketConfig{Common: common(newFake()), plain: plain})
	c := dial(t, l.Addr().String())
	response := query(t, "hit", 1)
	response[2] |= 0x80
	hostile := [][]byte{{}, {1}, response}
	for _, name := range []string{"drop", "error", "panic-hit", "panic-miss"} {
		hostile = append(hostile, query(t, name, 1))
	}
	for _, msg := range hostile {
		send(t, c, msg)
	}
	send(t, c, query(t, "hit", 2))
	if m := readMsg(t, c); m.Id != 2 {
		t.Errorf("got answer %d, want 2", m.Id)
	}
}

func TestPacketTooLong(t *testing.T) { loops(t, testPacketTooLong) }

func testPacketTooLong(t *testing.T, plain bool) {
	l := listenPacket(t, PacketConfig{Common: common(newFake()), plain: plain})
	c := dial(t, l.Addr().String())
	for _, tt := range []struct {
		size, rcode int
	}{{maxDatagram, dns.RcodeSuccess}, {maxDatagram + 1, dns.RcodeFormatError}, {9000, dns.RcodeFormatError}} {
		m := new(dns.Msg).SetQuestion("hit.test.", dns.TypeA)
		m.SetEdns0(1232, false)
		pad := &dns.EDNS0_PADDING{}
		m.IsEdns0().Option = append(m.IsEdns0().Option, pad)
		pad.Padding = make([]byte, tt.size-m.Len())
		b, err := m.Pack()
		if err != nil || len(b) != tt.size {
			t.Fatalf("packed %d octets, %v", len(b), err)
		}
		send(t, c, b)
		if got := readMsg(t, c); got.Id != m.Id || got.Rcode != tt.rcode {
			t.Errorf("%d octets: got id %d rcode %d, want %d %d", tt.size, got.Id, got.Rcode, m.Id, tt.rcode)
		}
	}
}

func TestPacketDrain(t *testing.T) { loops(t, testPacketDrain) }

func testPacketDrain(t *testing.T, plain bool) {
	h := newFake()
	l := listenPacket(t, PacketConfig{Common: common(h), plain: plain})
	c := dial(t, l.Addr().String())
	send(t, c, query(t, "slow", 1))
	receive(t, h.waiting)
	done := shutdown(within(t), l)
	close(h.gate)
	if m := readMsg(t, c); m.Id != 1 {
		t.Errorf("got answer %d, want 1", m.Id)
	}
	if err := receive(t, done); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	send(t, c, query(t, "hit", 2))
	if _, err := c.Read(make([]byte, 512)); err == nil {
		t.Error("an answer after Shutdown")
	}
}

func TestPacketShutdownLosesPatience(t *testing.T) { loops(t, testPacketShutdownLosesPatience) }

func testPacketShutdownLosesPatience(t *testing.T, plain bool) {
	h := newFake()
	l := listenPacket(t, PacketConfig{Common: common(h), plain: plain})
	c := dial(t, l.Addr().String())
	send(t, c, query(t, "slow", 1))
	receive(t, h.waiting)
	ctx, cancel := context.WithCancel(context.Background())
	done := shutdown(ctx, l)
	cancel()
	if err := receive(t, done); !errors.Is(err, context.Canceled) {
		t.Errorf("Shutdown: %v, want context.Canceled", err)
	}
	receive(t, l.done) // Resolve's context was cancelled, so that Serve ends
}

// TestPacketSocketGone closes the socket behind the listener's back: Serve says so instead of spinning.
func TestPacketSocketGone(t *testing.T) { loops(t, testPacketSocketGone) }

func testPacketSocketGone(t *testing.T, plain bool) {
	l, err := ListenPacket(t.Context(), PacketConfig{Common: common(newFake()), plain: plain})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- l.Serve() }()
	_ = l.sockets[0].conn.Close()
	if err := receive(t, served); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want net.ErrClosed", err)
	}
	if err := l.Shutdown(within(t)); err != nil {
		t.Errorf("Shutdown afterwards: %v", err)
	}
	noLeaks(t)
}

// TestPacketUnsendable has answers that cannot be sent among others, which arrive.
func TestPacketUnsendable(t *testing.T) { loops(t, testPacketUnsendable) }

func testPacketUnsendable(t *testing.T, plain bool) {
	l, r := idlePacket(t, PacketConfig{Common: common(newFake()), Sockets: 1, plain: plain})
	c := dial(t, l.Addr().String())
	send(t, c, query(t, "hit", 0))
	packets, err := r.rx.receive()
	if err != nil {
		t.Fatal(err)
	}
	good := &packets[0].origin
	family := &origin{addr: netip.MustParseAddrPort("[2001:db8::1]:1")} // and to a batch no address at all
	giant := make([]byte, wire.MaxMessage)                              // EMSGSIZE
	r.tx.send([]answer{
		{family, query(t, "hit", 1)}, {good, query(t, "hit", 2)}, {good, giant}, {family, nil}, {good, query(t, "hit", 3)}, {good, giant},
	})
	for _, id := range []uint16{2, 3} {
		if m := readMsg(t, c); m.Id != id {
			t.Errorf("got answer %d, want %d", m.Id, id)
		}
	}
}

// idlePacket returns a listener that nobody serves and a reader of its first socket, for the test to turn by hand.
func idlePacket(t testing.TB, cfg PacketConfig) (*Packet, *reader) {
	t.Helper()
	l, err := ListenPacket(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.misses.finish()
		_ = l.Shutdown(context.Background())
		noLeaks(t)
	})
	_ = l.sockets[0].conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	return l, l.newReader(0)
}

// serveQueued makes r serve until it has seen n datagrams.
func serveQueued(t testing.TB, r *reader, n int) {
	t.Helper()
	for n > 0 {
		packets, err := r.rx.receive()
		if err != nil {
			t.Fatal(err)
		}
		n -= len(packets)
		r.serve(packets)
	}
}

func TestPacketAllocs(t *testing.T) { loops(t, testPacketAllocs) }

func testPacketAllocs(t *testing.T, plain bool) {
	for _, bind := range []string{"127.0.0.1:0", "0.0.0.0:0", "[::]:0"} {
		t.Run(bind, func(t *testing.T) {
			cfg := PacketConfig{Common: common(echo{}), plain: plain}
			cfg.Addr = netip.MustParseAddrPort(bind)
			l := listenPacket(t, cfg)
			hit := hitter(t, l)
			if n := testing.AllocsPerRun(500, hit); n != 0 {
				t.Errorf("%v allocations a hit, want 0", n)
			}
		})
	}
}

func BenchmarkPacketHit(b *testing.B) {
	cfg := PacketConfig{Common: common(echo{})}
	cfg.Addr = netip.MustParseAddrPort("[::]:0")
	hit := hitter(b, listenPacket(b, cfg))
	b.ReportAllocs()
	for b.Loop() {
		hit()
	}
}

// hitter returns a function that asks l and takes the answer, without allocating itself.
func hitter(t testing.TB, l *Packet) func() {
	c := dial(t, target127(l))
	msg, buf := query(t, "hit", 1), make([]byte, 512)
	return func() {
		if _, err := c.Write(msg); err != nil {
			t.Fatal(err)
		}
		if n, _, err := c.ReadFromUDPAddrPort(buf); err != nil || n != len(msg) {
			t.Fatal(n, err)
		}
	}
}

// target127 is an address that l answers from: its own, or 127.0.0.2 if it is bound to all.
func target127(l *Packet) string {
	a := addrPort(l.Addr())
	if a.Addr().IsUnspecified() {
		a = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), a.Port())
	}
	return a.String()
}
