package listen

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
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

func TestPacket(t *testing.T) {
	h := newFake()
	l := listenPacket(t, PacketConfig{Common: common(h)})
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

func TestPacketQueryFields(t *testing.T) {
	h := newFake()
	l := listenPacket(t, PacketConfig{Common: common(h)})
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
func TestPacketWildcard(t *testing.T) {
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
				cfg := PacketConfig{Common: common(h)}
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

func TestPacketSlowHoldsNobody(t *testing.T) {
	h := newFake()
	l := listenPacket(t, PacketConfig{Common: common(h)})
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

func TestPacketInflight(t *testing.T) {
	h := newFake()
	l := listenPacket(t, PacketConfig{Common: common(h), Inflight: 1})
	c := dial(t, l.Addr().String())
	send(t, c, query(t, "slow", 1))
	receive(t, h.waiting)
	send(t, c, query(t, "miss", 2)) // dropped: nothing comes for it
	send(t, c, query(t, "hit", 3))
	if m := readMsg(t, c); m.Id != 3 {
		t.Fatalf("got answer %d, want 3", m.Id)
	}
	close(h.gate)
	if m := readMsg(t, c); m.Id != 1 {
		t.Fatalf("got answer %d, want 1", m.Id)
	}
	for l.misses.Load() != 0 {
		<-time.After(time.Millisecond)
	}
	send(t, c, query(t, "miss", 4))
	if m := readMsg(t, c); m.Id != 4 {
		t.Errorf("got answer %d, want 4", m.Id)
	}
}

// TestPacketHostile sends what has no answer, and what makes the Handler panic; the next query is answered.
func TestPacketHostile(t *testing.T) {
	l := listenPacket(t, PacketConfig{Common: common(newFake())})
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

func TestPacketTooLong(t *testing.T) {
	l := listenPacket(t, PacketConfig{Common: common(newFake())})
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

func TestPacketDrain(t *testing.T) {
	h := newFake()
	l := listenPacket(t, PacketConfig{Common: common(h)})
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

func TestPacketShutdownLosesPatience(t *testing.T) {
	h := newFake()
	l := listenPacket(t, PacketConfig{Common: common(h)})
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
func TestPacketSocketGone(t *testing.T) {
	l, err := ListenPacket(t.Context(), PacketConfig{Common: common(newFake())})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- l.Serve() }()
	_ = l.conn.Close()
	if err := receive(t, served); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want net.ErrClosed", err)
	}
	if err := l.Shutdown(within(t)); err != nil {
		t.Errorf("Shutdown afterwards: %v", err)
	}
	noLeaks(t)
}

// TestPacketUnsendable answers to where nothing can be sent; the next query is answered.
func TestPacketUnsendable(t *testing.T) {
	l := listenPacket(t, PacketConfig{Common: common(newFake())})
	c := dial(t, l.Addr().String())
	l.send(&packet{from: netip.MustParseAddrPort("[2001:db8::1]:1")}, query(t, "hit", 1))         // another family
	l.send(&packet{from: c.LocalAddr().(*net.UDPAddr).AddrPort()}, make([]byte, wire.MaxMessage)) // EMSGSIZE
	send(t, c, query(t, "hit", 2))
	if m := readMsg(t, c); m.Id != 2 {
		t.Errorf("got answer %d, want 2", m.Id)
	}
}

func TestPacketAllocs(t *testing.T) {
	for _, bind := range []string{"127.0.0.1:0", "0.0.0.0:0", "[::]:0"} {
		t.Run(bind, func(t *testing.T) {
			cfg := PacketConfig{Common: common(echo{})}
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
