package listen

import (
	"crypto/tls"
	"math"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"dnsgateway/gateway/nowait"
	"dnsgateway/gateway/wire"
)

const (
	// readMost is the most that one read of a socket brings: hundreds of queries.
	readMost = 64 << 10
	// leftMost is what a machine may leave over and still be read for: one message that is not whole.
	leftMost = prefixLen + wire.MaxMessage
	// recordMost is more than a TLS record, of which all but the end may be there before a read (RFC 8446, section 5.2).
	recordMost = 17 << 10
	// roundMost is how many connections are served before the loop looks at the clock, and at who else wants something.
	roundMost = 128
	// busyMost is how long a loop keeps its thread. The scheduler looks for other sockets only when nothing is ready to
	// run, and a loop that has work is ready to run.
	busyMost = 200 * time.Microsecond
	// tick is how exact the times of connections are: they end late by up to this much, never early.
	tick  = 20 * time.Millisecond
	never = math.MaxInt64
)

// loopSet is the loops of one listener, guarded by streams.mu.
type loopSet struct {
	started bool
	all     []*loop
	next    int
	wg      sync.WaitGroup
}

// start starts a loop for each core when there is the first connection for them. Where descriptors have run out there are
// fewer, or none: connections have a goroutine then. streams.mu is held.
func (ls *loopSet) start(s *streams) {
	ls.started = true
	for i := range runtime.GOMAXPROCS(0) {
		l, err := newLoop(s, uint8(i))
		if err != nil {
			s.common.Logger.Warn("connections cost more than they should", "err", err)
			return
		}
		ls.all = append(ls.all, l)
		ls.wg.Go(l.run)
	}
}

// add gives a connection to a loop, unless it is not one of those that loops can have. streams.mu is held.
func (ls *loopSet) add(s *streams, nc net.Conn, tc *tls.Conn, m machine) bool {
	lc, ok := nc.(*limitedConn)
	if !ok {
		return false
	}
	tcp, ok := lc.Conn.(*net.TCPConn)
	if !ok {
		return false
	}
	var records *cipherConn
	if tc != nil {
		if records, ok = tc.NetConn().(*cipherConn); !ok {
			return false
		}
	}
	if !ls.started {
		ls.start(s)
	}
	if len(ls.all) == 0 {
		return false
	}
	fd := -1
	raw, err := tcp.SyscallConn()
	if err != nil {
		return false
	}
	if err := raw.Control(func(of uintptr) { fd, _ = unix.FcntlInt(of, unix.F_DUPFD_CLOEXEC, 0) }); err != nil || fd < 0 {
		return false
	}
	lc.leave()
	if records != nil {
		records.nc = nil
	}
	l := ls.all[ls.next%len(ls.all)]
	ls.next++
	l.call(&loopConn{
		flow: flow{s: s, m: m}, loop: l, client: lc.client, fd: fd, tls: tc, records: records, place: -1, unread: true,
	})
	return true
}

// drain implements streams.drain. streams.mu is held.
func (ls *loopSet) drain() { ls.tell(func(l *loop) { l.draining = true }) }

// abort implements streams.abort. streams.mu is held.
func (ls *loopSet) abort() { ls.tell(func(l *loop) { l.aborted = true }) }

// stop ends the loops, which have no connections any more.
func (ls *loopSet) stop() {
	ls.tell(func(l *loop) { l.stopped = true })
	ls.wg.Wait()
}

func (ls *loopSet) tell(what func(l *loop)) {
	for _, l := range ls.all {
		l.mu.Lock()
		what(l)
		l.mu.Unlock()
		l.wake()
	}
}

// loop drives many connections with one goroutine: it waits until some of them have something, and gives each a turn.
//
// It waits with an epoll descriptor of its own, which lies in Go's poller as a socket would. So no thread is blocked, a
// loop with nothing to do costs nothing, and one call tells of all connections that are ready. Connections are
// edge-triggered: no call is needed when one is empty, nor before the loop goes to sleep.
type loop struct {
	s      *streams
	file   *os.File // the epoll descriptor
	epoll  int
	event  int // an eventfd, in epoll; it is only ever written, each time is an edge
	events [roundMost]unix.EpollEvent
	conns  []*loopConn // by the number that epoll has for them; nil is free
	free   []int32
	times  dueTimes    // of all connections
	armed  int64       // when the file's deadline is, never without one
	again  []*loopConn // they may have more to read than their turn let them; each is there once
	now    int64       // at the beginning of the round, see clock
	since  int64       // when the loop got its thread
	gone   bool        // the loop has ended
	t      turn
	in     []byte // what is left over of a connection and what its read has brought
	cipher []byte // what a read has brought from below TLS

	mu       sync.Mutex
	calls    []*loopConn // they need a turn
	woken    bool
	draining bool
	aborted  bool
	stopped  bool
}

func newLoop(s *streams, lane uint8) (*loop, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		_ = unix.Close(epoll)
		return nil, os.NewSyscallError("eventfd", err)
	}
	err = unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, event, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: -1})
	if err == nil {
		err = unix.SetNonblock(epoll, true) // which is how os.NewFile knows that it belongs into Go's poller
	}
	if err != nil {
		_ = unix.Close(epoll)
		_ = unix.Close(event)
		return nil, os.NewSyscallError("epoll_ctl", err)
	}
	l := &loop{
		s: s, file: os.NewFile(uintptr(epoll), "epoll"), epoll: epoll, event: event, armed: never,
		in: make([]byte, leftMost+readMost+recordMost),
	}
	l.t.lane = lane
	if err := l.file.SetReadDeadline(time.Time{}); err != nil { // it is not in Go's poller
		l.close()
		return nil, err
	}
	return l, nil
}

func (l *loop) close() {
	_ = l.file.Close()
	_ = unix.Close(l.event)
}

// epoch is the beginning of clock.
var epoch = time.Now()

// clock is a time in nanoseconds that does not jump.
func clock(t time.Time) int64 { return int64(t.Sub(epoch)) }

// wake makes the loop take a round soon. It may be called until stop has returned.
func (l *loop) wake() {
	one := [8]byte{1}
	_, _ = unix.Write(l.event, one[:])
}

// call asks for a turn of c.
func (l *loop) call(c *loopConn) {
	l.mu.Lock()
	if !c.called {
		c.called = true
		l.calls = append(l.calls, c)
	}
	wake := !l.woken
	l.woken = true
	l.mu.Unlock()
	if wake {
		l.wake()
	}
}

// run is the loop.
func (l *loop) run() {
	defer l.close()
	raw, err := l.file.SyscallConn()
	if err != nil {
		panic("listen: a file without a descriptor: " + err.Error()) // ours, and open
	}
	for !l.gone {
		// It returns at the file's deadline, else when the loop has ended.
		_ = raw.Read(l.rounds)
		_ = l.file.SetReadDeadline(time.Time{})
		l.armed = never
	}
}

// rounds serves until there is nothing to do, and then returns false to be called when there is. It is all one call of
// RawConn.Read for one reason: the poller keeps what it learns in the meantime.
func (l *loop) rounds(uintptr) (gone bool) {
	l.since = never
	for {
		n := epollWait(l.epoll, l.events[:])
		t := time.Now()
		l.now, l.t.received = clock(t), t.UnixNano()
		l.since = min(l.since, l.now)
		again := l.again
		l.again = nil
		for _, c := range again {
			c.queued = false
		}
		for i := range l.events[:n] {
			e := &l.events[i]
			if e.Fd < 0 || l.conns[e.Fd] == nil {
				continue
			}
			c := l.conns[e.Fd]
			if e.Events&^unix.EPOLLOUT != 0 {
				c.unread = true
			}
			if e.Events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
				c.hup = true
			}
			l.serve(c)
		}
		for _, c := range again {
			if !c.queued { // else it has had its turn
				l.serve(c)
			}
		}
		if l.called() {
			l.gone = true
			return true
		}
		l.expire()
		switch {
		case n < len(l.events) && len(l.again) == 0:
			l.arm()
			return false
		case l.now-l.since > int64(busyMost):
			l.wake() // others first
			return false
		}
	}
}

// called serves those who have asked for it and does what the listener has told the loop to. It returns true when the
// loop has to end.
func (l *loop) called() bool {
	l.mu.Lock()
	if !l.woken && !l.draining && !l.aborted && !l.stopped {
		l.mu.Unlock()
		return false
	}
	calls := l.calls
	l.calls, l.woken = nil, false
	for _, c := range calls {
		c.called = false
	}
	draining, aborted, stopped := l.draining, l.aborted, l.stopped
	l.draining, l.aborted = false, false
	l.mu.Unlock()
	for _, c := range calls {
		if c.place < 0 && !c.closed {
			l.join(c)
		}
		l.serve(c)
	}
	if draining || aborted {
		for _, c := range l.conns {
			if c != nil {
				c.mu.Lock()
				c.draining = c.draining || draining
				c.broken = c.broken || aborted
				if draining {
					c.drainAt = l.now + int64(drainRead)
				}
				c.mu.Unlock()
				l.serve(c)
			}
		}
	}
	return stopped
}

// join makes c one of the loop's connections.
func (l *loop) join(c *loopConn) {
	number := int32(len(l.conns))
	if n := len(l.free); n > 0 {
		number = l.free[n-1]
		l.free = l.free[:n-1]
		l.conns[number] = c
	} else {
		l.conns = append(l.conns, c)
	}
	c.number, c.quiet = number, l.now
	l.times.push(c, never)
	err := unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, c.fd, &unix.EpollEvent{
		Events: unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET, Fd: number,
	})
	if err != nil {
		l.s.common.Logger.Debug("connection", "client", c.client, "err", os.NewSyscallError("epoll_ctl", err))
		c.broken = true
	}
}

// serve gives c a turn, and sees to its times and its end.
func (l *loop) serve(c *loopConn) {
	c.mu.Lock()
	if !c.safely(func() { l.turn(c) }) {
		l.t.out, l.t.cipher, l.t.misses = nil, nil, nil
		l.end(c)
	}
	if c.place >= 0 {
		l.times.hasten(c, c.due(l.now))
	}
	c.mu.Unlock()
}

// turn reads what c has, answers it, and sends that. c.mu is held.
func (l *loop) turn(c *loopConn) {
	t := &l.t
	if c.broken {
		c.collect(t, nil)
		l.end(c)
		return
	}
	if c.records != nil {
		c.records.out = &t.cipher
	}
	if len(c.pending) > 0 {
		c.sendPending(l.now)
	}
	if c.back.Load() != nil && c.collect(t, func() { c.send(t) }) {
		c.quiet = l.now
		c.send(t)
	}
	if c.draining && !c.leaving && l.now >= c.drainAt && !c.broken {
		c.leave(t)
		c.over = c.over || c.m.done()
	}
	t.served = 0
	have := copy(l.in, c.left)
	for budget := readMost; ; {
		have = c.feed(t, have)
		if c.broken || c.over || c.stalled || !c.unread {
			break
		}
		if have > leftMost {
			c.broken = true // a machine that lets it come to this has no rules
			break
		}
		if budget <= 0 {
			if !c.queued {
				c.queued = true
				l.again = append(l.again, c)
			}
			break
		}
		n := c.read(l, have)
		have += n
		budget -= max(n, 1)
	}
	c.keep(l.in[:have])
	switch {
	case c.stalled || have == 0 && !c.m.open():
		c.partial = 0
	case t.served > 0 || c.partial == 0:
		c.partial = l.now
	}
	if c.leaving && c.m.done() {
		c.over = true
	}
	l.end(c)
	t.trim()
}

// end brings c to its end when it is there. c.mu is held.
func (l *loop) end(c *loopConn) {
	if !c.broken && c.over && !c.stalled && c.misses == 0 {
		c.leave(&l.t)
		if c.tls != nil && !c.lingering {
			_ = c.tls.CloseWrite()
			c.send(&l.t)
		}
		if len(c.pending) == 0 && !c.lingering && !c.broken {
			c.lingering, c.lingerTo = true, l.now+int64(linger)
			c.broken = unix.Shutdown(c.fd, unix.SHUT_WR) != nil
		}
		if c.lingering && !c.broken {
			// Octets that we have not read would turn the close into a reset, and that takes our last answers with it.
			c.broken = c.discard(l.in)
		}
	}
	if !c.broken {
		return
	}
	if !c.closed {
		c.closed = true
		_ = unix.Close(c.fd)
		c.left, c.pending = nil, nil
	}
	if c.misses == 0 && c.place >= 0 {
		l.times.remove(c)
		l.conns[c.number] = nil
		l.free = append(l.free, c.number)
		c.s.limit.release(c.client)
		c.s.wg.Done()
	}
}

// expire ends what has had its time.
func (l *loop) expire() {
	for len(l.times) > 0 && l.times[0].at <= l.now {
		c := l.times[0].c
		c.mu.Lock()
		if at := c.due(l.now); at > l.now {
			l.times.delay(at)
			c.mu.Unlock()
			continue
		}
		switch {
		case len(c.pending) > 0 && c.stuck+int64(writeTimeout) <= l.now || c.lingering:
			c.broken = true
		case c.draining && !c.leaving: // turn does
		default:
			c.over = true
		}
		c.mu.Unlock()
		l.serve(c)
	}
}

// arm sets the file's deadline to when the next connection has had its time.
func (l *loop) arm() {
	if len(l.times) == 0 || l.times[0].at >= l.armed {
		return
	}
	l.armed = (l.times[0].at/int64(tick) + 1) * int64(tick)
	_ = l.file.SetReadDeadline(epoch.Add(time.Duration(l.armed)))
}

// loopConn is a connection that a loop drives. An idle one is this, its machine, what TLS keeps, and the kernel's.
type loopConn struct {
	flow
	loop    *loop
	client  netip.Addr  // has a place
	tls     *tls.Conn   // nil without
	records *cipherConn // below tls
	fd      int

	// The loop's own.
	place     int32 // in loop.times, negative before and after
	number    int32 // in loop.conns
	unread    bool  // there may be something to read
	hup       bool  // there is nothing after what there is to read
	queued    bool  // in loop.again
	lingering bool  // all is said
	lingered  int   // octets that were read since
	called    bool  // guarded by loop.mu

	// Guarded by flow.mu; times are those of clock.
	draining bool
	leaving  bool   // the machine has said goodbye
	over     bool   // nothing is read any more
	stalled  bool   // nothing is read until a miss has come back, or until the client has read
	closed   bool   // fd is
	left     []byte // what the machine has not taken
	pending  []byte // what the client has not taken
	partial  int64  // when what is unfinished was begun, else 0
	quiet    int64  // when something was last going on
	stuck    int64  // when the client last took something of pending
	drainAt  int64  // when draining has to become leaving
	lingerTo int64
}

// due returns when something has to be done about c if nothing happens. What it has to wait for has no time of its own: that
// is looked after now and then. mu is held.
//
// A connection is idle when it has nothing to send and nothing to wait for (RFC 7766, section 6.2.3): while a query is
// in flight there is no deadline, unless a message was begun, which has to come to its end.
func (c *loopConn) due(now int64) int64 {
	switch {
	case c.closed:
		return now + int64(c.s.idle)
	case c.draining && !c.leaving:
		return c.drainAt
	case len(c.pending) > 0:
		return c.stuck + int64(writeTimeout)
	case c.lingering:
		return c.lingerTo
	case c.over || c.stalled:
		return now + int64(c.s.idle) // a miss
	case c.partial != 0:
		return c.partial + int64(c.s.message)
	case c.misses > 0:
		return now + int64(c.s.idle)
	}
	return c.quiet + int64(c.s.idle)
}

// feed gives the machine the first have octets of the loop's buffer and returns how many are left over. mu is held.
func (c *loopConn) feed(t *turn, have int) (left int) {
	in := c.loop.in[:have]
	rest := in
	c.stalled = false
	for len(rest) > 0 && !c.broken {
		if c.stalled = len(c.pending) > maxPending; c.stalled {
			break
		}
		t.full = false
		used, err := c.m.input(t, rest)
		rest = rest[used:]
		if len(t.misses) > 0 { // c.miss as a value is an allocation
			c.start(t, c.miss)
		}
		said := len(t.out) > 0
		if used == 0 || len(t.out) >= flushSize {
			c.send(t)
		}
		if err != nil {
			c.s.common.Logger.Debug("connection", "client", c.client, "err", err)
			c.over, rest = true, nil
			break
		}
		if used == 0 && !said {
			c.stalled = t.full && c.misses > 0
			break
		}
	}
	c.send(t)
	return copy(in, rest)
}

// read reads once, behind the first have octets of the loop's buffer. mu is held.
func (c *loopConn) read(l *loop, have int) int {
	into := l.in[have : have+readMost]
	if c.tls != nil {
		if l.cipher == nil {
			l.cipher = make([]byte, readMost)
		}
		into = l.cipher
	}
	n, err := nowait.Receive(c.fd, into)
	switch {
	case err == unix.EAGAIN:
		c.unread = false
		n = 0
	case err != 0:
		c.broken = true
		return 0
	case n == 0:
		c.over = true
	case n < len(into) && !c.hup:
		c.unread = false // what comes now is a new edge
	}
	if c.tls == nil {
		if n > 0 {
			c.quiet = l.now
		}
		return n
	}
	r := c.records
	r.in, r.end = into[:n], c.over
	r.count(r.in)
	had := have
	for r.whole > 0 || len(r.in) > 0 || c.over {
		n, err := c.tls.Read(l.in[have:])
		have += n
		r.whole--
		if err == errEmpty {
			r.whole = 0 // some were not for us
		} else if err != nil {
			// The end, by close_notify or without; or what is wrong, and the alert that says so is on its way.
			c.over = true
			break
		}
	}
	r.in = nil
	if have > had { // octets of a record that does not end are nothing that the client has said
		c.quiet = l.now
	}
	c.send(&l.t)
	return have - had
}

// keep keeps what the machine has left over. The memory is as large as what is there, not as what a length in it promises:
// two octets of a client that sends no more must not cost us 64 KiB. mu is held.
func (c *loopConn) keep(left []byte) {
	if len(left) == 0 {
		c.left = nil
		return
	}
	if cap(c.left) > 4*len(left) {
		c.left = nil
	}
	c.left = append(c.left[:0], left...)
}

// send sends what is in t.out, after what is pending. mu is held.
func (c *loopConn) send(t *turn) {
	b := t.out
	if c.tls != nil {
		if len(b) > 0 {
			if _, err := c.tls.Write(b); err != nil {
				c.over = true // there was an alert, or close_notify
			}
		}
		b = t.cipher
	}
	t.out, t.cipher = t.out[:0], t.cipher[:0]
	if len(b) == 0 || c.broken {
		return
	}
	if len(c.pending) == 0 {
		n, err := nowait.Send(c.fd, b)
		if err != 0 && err != unix.EAGAIN {
			c.broken = true
			return
		}
		if b = b[n:]; len(b) == 0 {
			return
		}
		c.stuck = clock(time.Now())
	}
	if len(c.pending)+len(b) > maxUnsent {
		c.s.common.Logger.Debug("closing the connection of a client that does not read", "client", c.client)
		c.broken = true
		return
	}
	c.pending = append(c.pending, b...)
}

// sendPending sends what is pending as far as the client takes it. mu is held.
func (c *loopConn) sendPending(now int64) {
	n, err := nowait.Send(c.fd, c.pending)
	if err != 0 && err != unix.EAGAIN {
		c.broken = true
		return
	}
	if n > 0 {
		c.stuck, c.quiet = now, now
	}
	if c.pending = c.pending[n:]; len(c.pending) == 0 {
		c.pending = nil
	}
}

// leave has the machine say goodbye, once. mu is held.
func (c *loopConn) leave(t *turn) {
	if !c.leaving {
		c.leaving = true
		c.m.drain(t)
		c.send(t)
	}
}

// discard reads what nobody will answer, and returns true when the client has no more, or too much.
func (c *loopConn) discard(buf []byte) bool {
	for c.lingered < lingerMost {
		n, err := nowait.Receive(c.fd, buf)
		if err == unix.EAGAIN {
			return false
		}
		if err != 0 || n == 0 {
			break
		}
		c.lingered += n
	}
	return true
}

// miss resolves m and, with others that are ready at the same time, answers it.
func (c *loopConn) miss(m *miss) {
	defer c.s.wg.Done()
	if !c.resolve(m) {
		return
	}
	t := turns.Get().(*turn)
	defer turns.Put(t)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.records != nil {
		c.records.out = &t.cipher
	}
	calm := len(c.pending) == 0 && !c.broken
	if !c.safely(func() {
		c.collect(t, func() { c.send(t) })
		c.send(t)
	}) {
		t.out, t.cipher = nil, nil
	}
	t.trim()
	c.quiet = clock(time.Now())
	if c.stalled || c.leaving || c.over || c.broken || calm && len(c.pending) > 0 {
		c.loop.call(c)
	}
}

// epollWait returns how many events there are at once. The scheduler is not told of the call: see package nowait.
func epollWait(epoll int, events []unix.EpollEvent) int {
	n, _, err := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(epoll), uintptr(unsafe.Pointer(&events[0])),
		uintptr(len(events)), 0, 0, 0)
	if err != 0 {
		return 0
	}
	return int(n)
}

// acknowledge tells the client now that all it has sent is here, where it is a client on a socket.
func acknowledge(nc net.Conn) {
	if lc, ok := nc.(*limitedConn); ok {
		nc = lc.Conn
	}
	tcp, ok := nc.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1)
	})
}
