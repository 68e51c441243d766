package listen

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Datagrams travel in batches by recvmmsg(2) and sendmmsg(2), called directly. golang.org/x/net calls them too, but
// makes a net.Addr for each message that it reads, two allocations a query, and parses it for the one that it writes.
// Here an address goes back as the octets that it came in.
//
// The calls never block, so the scheduler is not told of them (RawSyscall6; see package nowait), which would also let it
// give our P away in the middle of a batch. What waits for datagrams is the runtime's poller, through [syscall.RawConn].

const (
	// sendWait is how long the answers of a batch wait for room in the socket's buffer, and sendTries how often. The
	// network drains a buffer of megabytes in a few milliseconds; one that does not is down.
	sendWait  = 5 * time.Millisecond
	sendTries = 4
	// maxLate is how many batches are taken after the read deadline, which Shutdown sets: what the kernel has by then is
	// answered, and it has no more than fits into socketBuffer.
	maxLate = 2 * socketBuffer / 768 / batchSize
	// maxZones is how many names of interfaces a reader keeps.
	maxZones = 256
)

// defaultSockets is one socket for each core that Go uses.
func defaultSockets() int { return min(runtime.GOMAXPROCS(0), maxSockets) }

// bindPacket binds n sockets to one address and port among which the kernel distributes the clients.
//
// SO_REUSEPORT lets a second program of the same user bind our port too, and then it gets a part of our clients without
// anyone being told. So the first socket is bound without it: that fails if anybody has the port, whatever options he
// has set. Setting the option afterwards opens the port for the others: the kernel makes the group when the second
// socket joins.
func bindPacket(ctx context.Context, addr netip.AddrPort, n int) (conns []*net.UDPConn, err error) {
	defer func() {
		if err != nil {
			for _, c := range conns {
				_ = c.Close()
			}
		}
	}()
	first, err := bindUDP(ctx, addr)
	if err != nil {
		return nil, err
	}
	if conns = append(conns, first); n == 1 {
		return conns, nil
	}
	raw, err := first.SyscallConn()
	if err == nil {
		err = reusePort("", "", raw)
	}
	if err != nil {
		return conns, &BindError{Network: "udp", Addr: addr, Err: err}
	}
	addr = netip.AddrPortFrom(addr.Addr(), addrPort(first.LocalAddr()).Port())
	for len(conns) < n {
		c, err := listenUDP(ctx, &net.ListenConfig{Control: reusePort}, addr)
		if err != nil {
			return conns, err
		}
		conns = append(conns, c)
	}
	return conns, nil
}

// reusePort is a net.ListenConfig's Control.
func reusePort(_, _ string, raw syscall.RawConn) (err error) {
	if e := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	}); e != nil {
		return e
	}
	return err
}

// canBatch reports whether both calls are there: a seccomp filter may know recvmsg and not recvmmsg.
func canBatch(conn *net.UDPConn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	ok := false
	err = raw.Control(func(fd uintptr) {
		_, in := mmsg(unix.SYS_RECVMMSG, fd, nil)
		_, out := mmsg(unix.SYS_SENDMMSG, fd, nil)
		ok = in == 0 && out == 0
	})
	return ok && err == nil
}

// sockaddr is a client's address as the kernel spells it, in the host's order but for what stands in the packet.
type sockaddr struct {
	octets [unix.SizeofSockaddrInet6]byte // the longer one; struct sockaddr_in fills the first 16
	n      uint32
}

// addrPort returns the address, mapped as on any dual-stack socket. zone names the interface of a link-local address.
func (s *sockaddr) addrPort(zone func(uint32) string) netip.AddrPort {
	b := s.octets[:s.n]
	switch {
	case len(b) >= unix.SizeofSockaddrInet6 && binary.NativeEndian.Uint16(b) == unix.AF_INET6:
		a := netip.AddrFrom16([16]byte(b[8:24]))
		if scope := binary.NativeEndian.Uint32(b[24:]); scope != 0 {
			a = a.WithZone(zone(scope))
		}
		return netip.AddrPortFrom(a, binary.BigEndian.Uint16(b[2:]))
	case len(b) >= unix.SizeofSockaddrInet4 && binary.NativeEndian.Uint16(b) == unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:]))
	}
	return netip.AddrPort{}
}

// mmsghdr is struct mmsghdr. The compiler pads it as C does.
type mmsghdr struct {
	unix.Msghdr
	n uint32 // octets that were received or sent
}

// mmsgCall is one of the two system calls. It returns how many messages were moved, or why the first was not.
type mmsgCall func(trap, fd uintptr, msgs []mmsghdr) (int, syscall.Errno)

func mmsg(trap, fd uintptr, msgs []mmsghdr) (int, syscall.Errno) {
	n, _, e := unix.RawSyscall6(trap, fd, uintptr(unsafe.Pointer(unsafe.SliceData(msgs))), uintptr(len(msgs)),
		unix.MSG_DONTWAIT, 0, 0)
	return int(n), e
}

// batchReceiver reads up to batchSize datagrams with one call.
type batchReceiver struct {
	raw     syscall.RawConn
	call    mmsgCall
	packets []packet
	msgs    []mmsghdr // msgs[i] points into packets[i]
	iovs    []unix.Iovec
	oobLen  int

	try   func(fd uintptr) bool // once for ever: a closure made for each call would be an allocation
	sweep func(fd uintptr)      // the same for what is there, without a wait
	late  int                   // batches that sweep brought
	n     int                   // what try brought
	err   error
	zones map[uint32]string
}

// newBatchReceiver returns the receiver of conn; info tells whether the kernel sends packet information.
func newBatchReceiver(conn *net.UDPConn, info bool) receiver {
	r := &batchReceiver{
		raw: rawConn(conn), call: mmsg, zones: make(map[uint32]string),
		packets: make([]packet, batchSize), msgs: make([]mmsghdr, batchSize), iovs: make([]unix.Iovec, batchSize),
	}
	if info {
		r.oobLen = oobSize
	}
	for i := range r.msgs {
		p, h := &r.packets[i], &r.msgs[i]
		r.iovs[i].Base = &p.in[0]
		r.iovs[i].SetLen(len(p.in))
		h.Name, h.Namelen = &p.name.octets[0], uint32(len(p.name.octets))
		h.Iov = &r.iovs[i]
		h.SetIovlen(1)
		if info {
			h.Control = &p.oob[0]
		}
		h.SetControllen(r.oobLen)
	}
	r.try = r.read
	r.sweep = func(fd uintptr) { r.read(fd) }
	return r
}

// rawConn never fails for a socket that was made by package net.
func rawConn(conn *net.UDPConn) syscall.RawConn {
	raw, err := conn.SyscallConn()
	if err != nil {
		panic("a UDP socket without a file descriptor: " + err.Error())
	}
	return raw
}

func (r *batchReceiver) receive() ([]packet, error) {
	r.n, r.err = 0, nil
	if err := r.raw.Read(r.try); err != nil {
		if !errors.Is(err, os.ErrDeadlineExceeded) || r.late >= maxLate {
			return nil, err
		}
		r.late++
		if e := r.raw.Control(r.sweep); e != nil || r.n == 0 {
			return nil, err
		}
	}
	for i := range r.n {
		p, h := &r.packets[i], &r.msgs[i]
		p.n, p.oobn, p.name.n = int(h.n), int(h.Controllen), h.Namelen
		p.addr = p.name.addrPort(r.zone)
		// The kernel has written how much of the room it used.
		h.Namelen = uint32(len(p.name.octets))
		h.SetControllen(r.oobLen)
	}
	return r.packets[:r.n], r.err
}

func (r *batchReceiver) read(fd uintptr) bool {
	for {
		n, e := r.call(unix.SYS_RECVMMSG, fd, r.msgs)
		switch e {
		case 0:
			r.n = n
			return true
		case unix.EINTR:
		case unix.EAGAIN:
			return false
		default:
			r.err = e
			return true
		}
	}
}

// zone returns an interface's name, or its number when it has gone, as package net does. The names are kept: a machine has
// few interfaces, and a name does not change while its interface is up.
func (r *batchReceiver) zone(index uint32) string {
	if name, ok := r.zones[index]; ok {
		return name
	}
	i, err := net.InterfaceByIndex(int(index))
	if err != nil {
		return strconv.FormatUint(uint64(index), 10)
	}
	if len(r.zones) >= maxZones { // interfaces of containers come and go
		clear(r.zones)
	}
	r.zones[index] = i.Name
	return i.Name
}

// batchSender sends up to batchSize datagrams with one call.
type batchSender struct {
	raw  syscall.RawConn
	call mmsgCall
	log  *slog.Logger
	msgs []mmsghdr
	iovs []unix.Iovec

	try   func(fd uintptr) // once for ever
	batch []answer         // what try sends
	poll  [1]unix.PollFd
	stuck bool // the last wait was in vain: until something leaves again there is no other one
}

func newBatchSender(conn *net.UDPConn, log *slog.Logger) sender {
	s := &batchSender{
		raw: rawConn(conn), call: mmsg, log: log, msgs: make([]mmsghdr, batchSize), iovs: make([]unix.Iovec, batchSize),
	}
	for i := range s.msgs {
		s.msgs[i].Iov = &s.iovs[i]
		s.msgs[i].SetIovlen(1)
	}
	s.try = s.write
	return s
}

// send implements sender. It takes [syscall.RawConn.Control] and not Write, which lets one goroutine in at a time: the
// kernel sends for many at once, and the reader's hits would wait for the misses.
func (s *batchSender) send(answers []answer) {
	for len(answers) > 0 {
		s.batch = answers[:min(len(answers), batchSize)]
		answers = answers[len(s.batch):]
		for i, a := range s.batch {
			h := &s.msgs[i]
			h.Name, h.Namelen = &a.to.name.octets[0], a.to.name.n
			s.iovs[i].Base = unsafe.SliceData(a.msg)
			s.iovs[i].SetLen(len(a.msg))
			h.Control = nil
			if len(a.to.info) > 0 {
				h.Control = &a.to.info[0]
			}
			h.SetControllen(len(a.to.info))
		}
		if s.raw.Control(s.try) != nil {
			break // closed
		}
	}
	s.batch = nil
}

// write sends the batch. The call stops at a message that cannot be sent, and says why only when that is its first one.
func (s *batchSender) write(fd uintptr) {
	for at, tries := 0, 0; at < len(s.batch); {
		n, e := s.call(unix.SYS_SENDMMSG, fd, s.msgs[at:len(s.batch)])
		switch e {
		case 0:
			at += n
			s.stuck = false
		case unix.EINTR:
		case unix.EAGAIN:
			if tries++; s.stuck || tries > sendTries || !s.wait(fd) {
				s.log.Debug("no room to send answers", "lost", len(s.batch)-at)
				s.stuck = true
				return
			}
		default: // EPERM, EMSGSIZE, ENETUNREACH, ...
			s.log.Debug("cannot send an answer", "client", s.batch[at].to.addr, "err", e)
			at++
		}
	}
}

// wait returns true when there may be room again. It is not done by the runtime's poller, where a bound would be a
// deadline, and that is one for all who send by the socket.
func (s *batchSender) wait(fd uintptr) bool {
	s.poll[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLOUT}
	n, err := unix.Poll(s.poll[:], int(sendWait/time.Millisecond))
	return n > 0 || err == unix.EINTR // the runtime interrupts its threads
}
