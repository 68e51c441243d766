package listen

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"dnsgateway/gateway/wire"
)

// counted makes r count its system calls; those that find nothing to read are left out.
func counted(r *reader) (in, out *int) {
	in, out = new(int), new(int)
	rx, tx := r.rx.(*batchReceiver), r.tx.(*batchSender)
	rx.call = func(trap, fd uintptr, msgs []mmsghdr) (int, syscall.Errno) {
		n, e := mmsg(trap, fd, msgs)
		if e != unix.EAGAIN {
			*in++
		}
		return n, e
	}
	tx.call = func(trap, fd uintptr, msgs []mmsghdr) (int, syscall.Errno) {
		*out++
		return mmsg(trap, fd, msgs)
	}
	return in, out
}

// TestBatchCalls queues datagrams of clients of both families that ask several addresses: they cost a system call a
// batch, and each client, which takes answers from the address that it asked and from no other, gets its own.
func TestBatchCalls(t *testing.T) {
	tests := []struct {
		bind string
		ask  []string
	}{
		{"127.0.0.1:0", []string{"127.0.0.1"}},
		{"0.0.0.0:0", []string{"127.0.0.1", "127.0.0.2", "127.5.6.7"}},
		{"[::1]:0", []string{"::1"}},
		{"[::]:0", []string{"127.0.0.1", "::1", "127.0.0.2"}},
	}
	for _, tt := range tests {
		t.Run(tt.bind, func(t *testing.T) {
			h := newFake()
			cfg := PacketConfig{Common: common(h), Sockets: 1}
			cfg.Addr = netip.MustParseAddrPort(tt.bind)
			l, r := idlePacket(t, cfg)
			in, out := counted(r)
			var clients []*net.UDPConn
			for i := range 2 * batchSize {
				to := netip.AddrPortFrom(netip.MustParseAddr(tt.ask[i%len(tt.ask)]), l.port)
				c := dial(t, to.String())
				clients = append(clients, c)
				send(t, c, query(t, "hit", uint16(i)))
			}
			serveQueued(t, r, len(clients))
			if *in != 2 || *out != 2 {
				t.Errorf("%d datagrams took %d calls to read and %d to send, want 2 and 2", len(clients), *in, *out)
			}
			seen := h.queries()
			for i, c := range clients {
				if m := readMsg(t, c); m.Id != uint16(i) || len(m.Answer) != 1 {
					t.Errorf("got %v, want the answer to query %d", m, i)
				}
				q := seen[i]
				if got, want := q.Local, unmap(c.RemoteAddr().(*net.UDPAddr).AddrPort()); got != want {
					t.Errorf("Local: got %v, want %v", got, want)
				}
				if got, want := q.Client, unmap(c.LocalAddr().(*net.UDPAddr).AddrPort()); got != want {
					t.Errorf("Client: got %v, want %v", got, want)
				}
				if q.Received != seen[i/batchSize*batchSize].Received {
					t.Errorf("query %d is not of its batch's time", i)
				}
			}
		})
	}
}

// TestPacketExpect sends datagrams that are read together.
func TestPacketExpect(t *testing.T) {
	for _, broken := range []bool{false, true} {
		h := &expecting{fake: newFake(), broken: broken}
		var log syncBuffer
		cfg := PacketConfig{Common: common(h), Sockets: 1}
		cfg.Addr, cfg.Logger = netip.MustParseAddrPort("127.0.0.1:0"), slog.New(slog.NewTextHandler(&log, nil))
		l, r := idlePacket(t, cfg)
		c := dial(t, l.Addr().String())
		want := []string{"hit-a", "", "hit-b", "hit-c"}
		for i, name := range want {
			if name == "" {
				send(t, c, []byte("junk"))
			} else {
				send(t, c, query(t, name, uint16(i)))
			}
		}
		serveQueued(t, r, len(want))
		send(t, c, query(t, "hit-alone", 9))
		serveQueued(t, r, 1)
		for range len(want) {
			if m := readMsg(t, c); len(m.Answer) != 1 {
				t.Errorf("got %v, want an answer", m)
			}
		}
		if len(h.names) != 1 || !slices.Equal(h.names[0], want) || h.served[0] != 0 {
			t.Errorf("expected %q when %v were served, want %q before any of them", h.names, h.served, want)
		}
		if got := strings.Contains(log.String(), "panic"); got != broken {
			t.Errorf("broken is %v, and the log %q", broken, log.String())
		}
	}
}

// TestBatchAllocs is the budget of a batch of hits, from socket to socket.
func TestBatchAllocs(t *testing.T) {
	for _, bind := range []string{"127.0.0.1:0", "0.0.0.0:0", "[::]:0"} {
		t.Run(bind, func(t *testing.T) {
			batch := batcher(t, bind)
			if n := testing.AllocsPerRun(100, batch); n != 0 {
				t.Errorf("%v allocations a batch, want 0", n)
			}
		})
	}
}

// BenchmarkPacketHitBatch is one batch, with the client's half of the work.
func BenchmarkPacketHitBatch(b *testing.B) {
	batch := batcher(b, "[::]:0")
	b.ReportAllocs()
	for b.Loop() {
		batch()
	}
}

// batcher returns a function that has a batch of hits answered, without allocating itself.
func batcher(t testing.TB, bind string) func() {
	cfg := PacketConfig{Common: common(echo{}), Sockets: 1}
	cfg.Addr = netip.MustParseAddrPort(bind)
	l, r := idlePacket(t, cfg)
	_ = l.sockets[0].conn.SetReadDeadline(time.Time{})
	c := dial(t, target127(l))
	_ = c.SetDeadline(time.Time{})
	msg, buf := query(t, "hit", 1), make([]byte, 512)
	return func() {
		for range batchSize {
			if _, err := c.Write(msg); err != nil {
				t.Fatal(err)
			}
		}
		serveQueued(t, r, batchSize)
		for range batchSize {
			if n, _, err := c.ReadFromUDPAddrPort(buf); err != nil || n != len(msg) {
				t.Fatal(n, err)
			}
		}
	}
}

// TestBatchLongAnswers has answers that fill the reader's memory and go beyond it.
func TestBatchLongAnswers(t *testing.T) {
	l, r := idlePacket(t, PacketConfig{Common: common(long{}), Sockets: 1})
	for range 2 {
		var clients []*net.UDPConn // one would not have room for all
		for i := range batchSize {
			c := dial(t, l.Addr().String())
			clients = append(clients, c)
			send(t, c, query(t, "hit", uint16(i)))
		}
		serveQueued(t, r, batchSize)
		buf := make([]byte, 65535)
		for i, c := range clients {
			n, err := c.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			if want := longAnswer(nil, uint16(i)); !bytes.Equal(buf[:n], want) {
				t.Fatalf("answer %d: got %d octets, want %d", i, n, len(want))
			}
		}
	}
	if got, want := cap(r.out), batchSize*maxDatagram; got != want {
		t.Errorf("the reader holds %d octets, want %d", got, want)
	}
}

// long is a Handler whose answers are longer than a reader's memory lets all of a batch be.
type long struct{ echo }

func (long) ServeWire(dst []byte, q *wire.Query) ([]byte, wire.Verdict) {
	return longAnswer(dst, q.ID), wire.Answered
}

func longAnswer(dst []byte, id uint16) []byte {
	dst = binary.BigEndian.AppendUint16(dst, id)
	return append(dst, bytes.Repeat([]byte{byte(id)}, maxDatagram+int(id))...)
}

// TestBatchSenderFaults has the system call fail in every way: what comes after a fault is sent, nothing waits for long,
// and nothing is tried for ever.
func TestBatchSenderFaults(t *testing.T) {
	l, r := idlePacket(t, PacketConfig{Common: common(newFake()), Sockets: 1})
	c := dial(t, l.Addr().String())
	send(t, c, query(t, "hit", 0))
	packets, err := r.rx.receive()
	if err != nil {
		t.Fatal(err)
	}
	to := &packets[0].origin
	tests := []struct {
		name  string
		fault func(call, messages int) (int, syscall.Errno) // the messages that leave if there is no fault
		want  []uint16
		calls int
		stuck bool
	}{
		{"none", func(_, n int) (int, syscall.Errno) { return n, 0 }, []uint16{0, 1, 2, 3}, 1, false},
		{"one at a time", func(int, int) (int, syscall.Errno) { return 1, 0 }, []uint16{0, 1, 2, 3}, 4, false},
		{"interrupted", func(call, n int) (int, syscall.Errno) {
			if call < 10 {
				return 0, unix.EINTR
			}
			return n, 0
		}, []uint16{0, 1, 2, 3}, 11, false},
		{"filtered", func(call, n int) (int, syscall.Errno) {
			if call%2 == 0 {
				return 0, unix.EPERM
			}
			return 1, 0
		}, []uint16{1, 3}, 4, false},
		{"full once", func(call, n int) (int, syscall.Errno) {
			if call == 1 {
				return 0, unix.EAGAIN
			}
			return min(n, 3), 0
		}, []uint16{0, 1, 2, 3}, 3, false},
		{"full", func(int, int) (int, syscall.Errno) { return 0, unix.EAGAIN }, nil, 1 + sendTries, true},
		{"still full", func(int, int) (int, syscall.Errno) { return 0, unix.EAGAIN }, nil, 1, true},
		{"well again", func(_, n int) (int, syscall.Errno) { return n, 0 }, []uint16{0, 1, 2, 3}, 1, false},
	}
	s := r.tx.(*batchSender)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			calls := 0
			s.call = func(trap, fd uintptr, msgs []mmsghdr) (int, syscall.Errno) {
				n, e := tt.fault(calls, len(msgs))
				if calls++; e != 0 {
					return n, e
				}
				return mmsg(trap, fd, msgs[:n])
			}
			var answers []answer
			for id := range uint16(4) {
				answers = append(answers, answer{to, query(t, "hit", id)})
			}
			s.send(answers)
			for _, id := range tt.want {
				buf := make([]byte, 512)
				if _, err := c.Read(buf); err != nil || binary.BigEndian.Uint16(buf) != id {
					t.Errorf("got answer %x, %v; want %d", buf[:2], err, id)
				}
			}
			if calls != tt.calls || s.stuck != tt.stuck {
				t.Errorf("got %d calls, stuck %v; want %d, %v", calls, s.stuck, tt.calls, tt.stuck)
			}
		})
	}
}

// TestBatchSenderWait waits for room in a socket that has none, and then some.
func TestBatchSenderWait(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	for err == nil {
		_, err = unix.Write(fds[0], make([]byte, 1024))
	}
	var s batchSender
	for s.wait(uintptr(fds[0])) { // interrupted by the runtime
	}
	for err = nil; err == nil; {
		_, err = unix.Read(fds[1], make([]byte, 1024))
	}
	if !s.wait(uintptr(fds[0])) {
		t.Error("no room was found in an empty socket")
	}
}

// TestBatchReceiverFaults has reading fail: an interrupted call is made again, and an error ends no reader.
func TestBatchReceiverFaults(t *testing.T) {
	l, r := idlePacket(t, PacketConfig{Common: common(newFake()), Sockets: 1})
	faults := []syscall.Errno{unix.EINTR, unix.ENOBUFS, unix.ECONNREFUSED, unix.EINTR}
	r.rx.(*batchReceiver).call = func(trap, fd uintptr, msgs []mmsghdr) (int, syscall.Errno) {
		if len(faults) > 0 {
			e := faults[0]
			faults = faults[1:]
			return -1, e
		}
		return mmsg(trap, fd, msgs)
	}
	done := make(chan struct{})
	go func() { r.read(); close(done) }()
	c := dial(t, l.Addr().String())
	send(t, c, query(t, "hit", 7))
	if m := readMsg(t, c); m.Id != 7 {
		t.Errorf("got answer %d, want 7", m.Id)
	}
	l.close()
	receive(t, done)
}

// TestBatchDrain has more queries in the kernel than a batch holds when the time to read is over: they are answered.
func TestBatchDrain(t *testing.T) {
	l, r := idlePacket(t, PacketConfig{Common: common(newFake()), Sockets: 1})
	var clients []*net.UDPConn
	for i := range 3*batchSize + 1 {
		c := dial(t, l.Addr().String())
		clients = append(clients, c)
		send(t, c, query(t, []string{"hit", "miss"}[i%2], uint16(i)))
	}
	l.begin()
	l.halt()
	_ = l.sockets[0].conn.SetReadDeadline(time.Unix(1, 0))
	r.read()
	l.misses.finish()
	l.close()
	l.end()
	for i, c := range clients {
		if m := readMsg(t, c); m.Id != uint16(i) {
			t.Errorf("got answer %d, want %d", m.Id, i)
		}
	}
	rx := r.rx.(*batchReceiver)
	if rx.late > 5 {
		t.Errorf("%d batches for %d datagrams", rx.late, len(clients))
	}
}

// TestBatchDrainEnds has a flood go on when the time to read is over: it is not read for ever.
func TestBatchDrainEnds(t *testing.T) {
	l, r := idlePacket(t, PacketConfig{Common: common(echo{}), Sockets: 1})
	rx := r.rx.(*batchReceiver)
	rx.call = func(_, _ uintptr, msgs []mmsghdr) (int, syscall.Errno) { return len(msgs), 0 }
	_ = l.sockets[0].conn.SetReadDeadline(time.Unix(1, 0))
	for range maxLate {
		if packets, err := rx.receive(); len(packets) != batchSize || err != nil {
			t.Fatal(len(packets), err)
		}
	}
	if _, err := rx.receive(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v, want a deadline", err)
	}
}

// TestMissAnswersTogether lets many misses have their answers at once, as an upstream does: several answers leave with
// one call.
func TestMissAnswersTogether(t *testing.T) {
	const misses = 2 * batchSize
	h := newFake()
	l, r := idlePacket(t, PacketConfig{Common: common(h), Sockets: 1})
	calls := 0
	tx := l.sockets[0].tx.(*batchSender)
	tx.call = func(trap, fd uintptr, msgs []mmsghdr) (int, syscall.Errno) {
		calls++ // one worker sends at a time
		return mmsg(trap, fd, msgs)
	}
	c := dial(t, l.Addr().String())
	for id := range misses {
		send(t, c, query(t, "slow", uint16(id)))
	}
	serveQueued(t, r, misses)
	for range misses {
		receive(t, h.waiting)
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // where no two run at the same time by chance
	close(h.gate)
	seen := make(map[uint16]bool)
	for range misses {
		seen[readMsg(t, c).Id] = true
	}
	l.misses.finish()
	if len(seen) != misses || calls > misses/4 {
		t.Errorf("%d answers left with %d calls, want %d with at most %d", len(seen), calls, misses, misses/4)
	}
}

// TestMissAnswersWait has answers become ready while others are being sent: they leave next, as many as may wait.
func TestMissAnswersWait(t *testing.T) {
	l, _ := idlePacket(t, PacketConfig{Common: common(newFake()), Sockets: 1})
	s := l.sockets[0]
	sent := &recorder{}
	post := func(id byte) { s.post(&pending{s: s, resp: []byte{id}}) }
	entered, leave := make(chan struct{}), make(chan struct{})
	s.tx = senderFunc(func(answers []answer) {
		if len(sent.answers) == 0 {
			close(entered)
			<-leave
		}
		sent.send(answers)
	})
	done := make(chan struct{})
	go func() { post(0); close(done) }()
	receive(t, entered)
	for range maxUnsentAnswers {
		post(1)
	}
	post(2) // one too many
	close(leave)
	receive(t, done)
	post(3)
	want := [][]byte{{0}}
	for range maxUnsentAnswers {
		want = append(want, []byte{1})
	}
	if d := cmp.Diff(sent.answers, append(want, []byte{3})); d != "" {
		t.Error(d)
	}
}

type senderFunc func([]answer)

func (f senderFunc) send(answers []answer) { f(answers) }

// TestCanBatch asks a kernel that has the calls, which every Linux of this century's second decade does.
func TestCanBatch(t *testing.T) {
	l, r := idlePacket(t, PacketConfig{Common: common(newFake())})
	if _, ok := r.rx.(*batchReceiver); !ok || l.cfg.plain {
		t.Errorf("reads with %T", r.rx)
	}
	l.close()
	if canBatch(l.sockets[0].conn) {
		t.Error("a closed socket moves batches")
	}
}

// TestSockets looks at the group of sockets: how many there are, that they share one port, that the kernel uses all of
// them, and that nobody else gets in by binding the port.
func TestSockets(t *testing.T) {
	for _, bind := range []string{"127.0.0.1:0", "0.0.0.0:0", "[::]:0"} {
		t.Run(bind, func(t *testing.T) {
			const sockets = 4
			h := newFake()
			cfg := PacketConfig{Common: common(h), Sockets: sockets}
			cfg.Addr = netip.MustParseAddrPort(bind)
			l := listenPacket(t, cfg)
			if len(l.sockets) != sockets {
				t.Fatalf("%d sockets, want %d", len(l.sockets), sockets)
			}
			for _, s := range l.sockets {
				if got := s.conn.LocalAddr().String(); got != l.Addr().String() {
					t.Errorf("a socket is bound to %v, want %v", got, l.Addr())
				}
			}
			lanes := make(map[uint8]int)
			for i := range 50 * sockets { // one in 10^24 that a socket is left out
				c := dial(t, target127(l))
				send(t, c, query(t, "hit", uint16(i)))
				readMsg(t, c)
				_ = c.Close()
			}
			for _, q := range h.queries() {
				lanes[q.Lane]++
			}
			if len(lanes) != sockets || lanes[0] == 0 || lanes[sockets-1] == 0 {
				t.Errorf("queries by lane: %v", lanes)
			}
		})
	}
}

func TestSocketsTaken(t *testing.T) {
	foreign := func(t *testing.T, lc *net.ListenConfig) netip.AddrPort {
		c, err := listenUDP(t.Context(), lc, netip.MustParseAddrPort("127.0.0.1:0"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c.LocalAddr().(*net.UDPAddr).AddrPort()
	}
	ours := func(sockets int) func(t *testing.T) netip.AddrPort {
		return func(t *testing.T) netip.AddrPort {
			l, _ := idlePacket(t, PacketConfig{Common: common(newFake()), Sockets: sockets})
			return addrPort(l.Addr())
		}
	}
	holders := map[string]func(t *testing.T) netip.AddrPort{
		"one socket": ours(1),
		"a group":    ours(3),
		"another program": func(t *testing.T) netip.AddrPort {
			return foreign(t, new(net.ListenConfig))
		},
		"another program's group": func(t *testing.T) netip.AddrPort {
			return foreign(t, &net.ListenConfig{Control: reusePort})
		},
	}
	for name, hold := range holders {
		for _, sockets := range []int{0, 1, 3} {
			t.Run(fmt.Sprintf("%s, asked for %d", name, sockets), func(t *testing.T) {
				cfg := PacketConfig{Common: common(newFake()), Sockets: sockets}
				cfg.Addr = hold(t)
				_, err := ListenPacket(context.Background(), cfg)
				var bind *BindError
				if !errors.As(err, &bind) || bind.Addr != cfg.Addr || !errors.Is(err, syscall.EADDRINUSE) {
					t.Errorf("got %v, want a BindError with EADDRINUSE", err)
				}
			})
		}
	}
}

// TestSockaddr reads what package net reads.
func TestSockaddr(t *testing.T) {
	loopback, err := net.InterfaceByName("lo")
	if err != nil {
		t.Skip(err)
	}
	r := &batchReceiver{zones: make(map[uint32]string)}
	lo := uint32(loopback.Index)
	tests := []struct {
		family uint16
		scope  uint32
		n      int
		want   string
	}{
		{unix.AF_INET, 0, unix.SizeofSockaddrInet4, "192.0.2.1:4711"},
		{unix.AF_INET6, 0, unix.SizeofSockaddrInet6, "[2001:db8::1]:4711"},
		{unix.AF_INET6, 0, unix.SizeofSockaddrInet6, "[::ffff:192.0.2.1]:4711"},
		{unix.AF_INET6, lo, unix.SizeofSockaddrInet6, "[fe80::1%lo]:4711"},
		{unix.AF_INET6, 4000000000, unix.SizeofSockaddrInet6, "[fe80::1%4000000000]:4711"},
		{unix.AF_INET6, 0, unix.SizeofSockaddrInet4, ""},
		{unix.AF_INET, 0, 0, ""},
		{unix.AF_UNIX, 0, unix.SizeofSockaddrInet6, ""},
	}
	for _, tt := range tests {
		s := sockaddr{n: uint32(tt.n)}
		want, _ := netip.ParseAddrPort(tt.want)
		binary.NativeEndian.PutUint16(s.octets[:], tt.family)
		binary.BigEndian.PutUint16(s.octets[2:], 4711)
		if want.Addr().Is4() {
			copy(s.octets[4:], want.Addr().AsSlice())
		} else {
			a := want.Addr().As16()
			copy(s.octets[8:], a[:])
			binary.NativeEndian.PutUint32(s.octets[24:], tt.scope)
		}
		if got := s.addrPort(r.zone); got != want {
			t.Errorf("got %v, want %v", got, want)
		}
		if n := testing.AllocsPerRun(10, func() { s.addrPort(r.zone) }); n != 0 && tt.scope <= lo {
			t.Errorf("%v: %v allocations", want, n)
		}
	}
	delete(r.zones, lo)
	for i := range uint32(maxZones) {
		r.zones[1000000+i] = "veth"
	}
	if r.zone(lo); len(r.zones) > maxZones {
		t.Errorf("%d names are kept", len(r.zones))
	}
}

// FuzzPacket has a reader serve any datagram from any address with any control message, among others: its answer is the
// one that the Handler gives, it goes where the datagram came from, and the others get theirs.
func FuzzPacket(f *testing.F) {
	name := make([]byte, unix.SizeofSockaddrInet6)
	binary.NativeEndian.PutUint16(name, unix.AF_INET6)
	info := make([]byte, unix.CmsgSpace(unix.SizeofInet6Pktinfo))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&info[0]))
	h.Level, h.Type = unix.IPPROTO_IPV6, unix.IPV6_PKTINFO
	h.SetLen(unix.CmsgLen(unix.SizeofInet6Pktinfo))
	f.Add(query(f, "hit", 2), name, info)
	f.Add(query(f, "miss", 3), name[:unix.SizeofSockaddrInet4], []byte{})
	f.Add(query(f, "drop", 2), name, info[:20])
	f.Add([]byte{1, 2, 3}, []byte{}, info[:3])
	f.Add(make([]byte, 5000), name, info)
	l, r := idlePacket(f, PacketConfig{Common: common(fuzzHandler{}), Sockets: 1})
	l.local = netip.AddrPort{} // a wildcard's datagrams have control messages
	rx := r.rx.(*batchReceiver)
	tx := &recorder{}
	r.tx = tx
	l.sockets[0].tx = senderFunc(func([]answer) {})
	_ = l.sockets[0].conn.SetReadDeadline(time.Time{})
	other := query(f, "hit", 4)
	f.Fuzz(func(t *testing.T, datagram, name, oob []byte) {
		tx.answers = nil
		rx.call = func(_, _ uintptr, msgs []mmsghdr) (int, syscall.Errno) {
			for i, in := range [][]byte{other, datagram, other} {
				p := &rx.packets[i]
				msgs[i].n = uint32(copy(p.in[:], in))
				msgs[i].Namelen = uint32(copy(p.name.octets[:], name))
				msgs[i].SetControllen(copy(p.oob[:], oob))
			}
			return 3, 0
		}
		packets, err := rx.receive()
		if err != nil || len(packets) != 3 {
			t.Fatal(len(packets), err)
		}
		r.serve(packets)
		var q wire.Query
		if q.Parse(datagram); len(datagram) > maxDatagram {
			q.Parse(datagram[:wire.HeaderLen])
		}
		alone := appendReply(nil, mustParse(other), wire.RcodeSuccess)
		want := [][]byte{alone}
		if out, verdict := (fuzzHandler{}).ServeWire(nil, &q); verdict == wire.Answered {
			want = append(want, out)
		}
		want = append(want, alone)
		if d := cmp.Diff(tx.answers, want); d != "" {
			t.Error(d)
		}
		for i := range packets {
			if p := &packets[i]; !bytes.HasPrefix(p.name.octets[:], name[:min(len(name), len(p.name.octets))]) {
				t.Error("the client's address has changed")
			}
		}
	})
}

func mustParse(msg []byte) *wire.Query {
	q := new(wire.Query)
	q.Parse(msg)
	return q
}

// recorder is a sender that keeps copies.
type recorder struct{ answers [][]byte }

func (r *recorder) send(answers []answer) {
	for _, a := range answers {
		r.answers = append(r.answers, slices.Clone(a.msg))
	}
}
