package listen

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"dnsgateway/gateway/wire"
)

// hurriedWrite bounds one write while more than maxUnsent waits behind it. The loops of Linux give no time then: their writes
// say at once that the client takes no more. Here only a write that has had time to end tells that, and while it has this time
// whatever else is ready is held, which is a pipeline of 64 KiB each in the worst case. So it is short.
const hurriedWrite = 250 * time.Millisecond

// streamConn is a connection with a goroutine of its own, which reads it and answers hits. Whoever has bytes to send while
// nobody writes becomes the writer, and writes on until nothing is pending; the others append to pending and go. So
// answers leave in the order in which they are ready, several in one segment when there are several, and no goroutine is
// there only to write.
type streamConn struct {
	flow
	raw net.Conn // the accepted connection
	nc  net.Conn // raw, or TLS over it

	// The reader's own.
	t       turn
	buf     []byte
	partial time.Time // also read under mu; when the first octet of what is unfinished came, else zero

	changed  sync.Cond // any of the below has changed, or a miss has come back
	writing  bool
	hurried  bool   // what is being written has hurriedWrite, and not writeTimeout
	pending  []byte // for the one who writes
	spare    []byte
	draining bool
	leaving  bool // the machine has said goodbye
}

func newStreamConn(s *streams, raw net.Conn, tc *tls.Conn, m machine) *streamConn {
	c := &streamConn{flow: flow{s: s, m: m}, raw: raw, nc: raw}
	c.changed.L = &c.mu
	if tc != nil {
		c.nc = tc
	}
	return c
}

// serve runs the connection to the end.
func (c *streamConn) serve() {
	defer c.raw.Close()
	c.read()
	c.finish()
}

// read serves queries until the client has no more, breaks the rules, or has been idle for too long, or until drain.
func (c *streamConn) read() {
	c.buf = make([]byte, readSize)
	have := 0
	c.arm(0, 0)
	for {
		n, err := c.nc.Read(c.buf[have:])
		have += n
		if err != nil && n == 0 && !c.goOn(err) {
			return
		}
		if n == 0 {
			continue
		}
		c.t.received, c.t.served = time.Now().UnixNano(), 0
		var going bool
		c.mu.Lock()
		if !c.safely(func() { have, going = c.feed(have) }) {
			c.fail()
		}
		c.mu.Unlock()
		if !going {
			return
		}
		c.makeRoom(have)
		c.arm(c.t.served, have)
	}
}

// feed gives the machine the first have octets of buf and returns how many are left over, and false when the connection is
// beyond use. It waits while too much is under way or pending: a client that does not read is not read. mu is held, but not
// while it waits.
func (c *streamConn) feed(have int) (left int, ok bool) {
	t := &c.t
	for rest := c.buf[:have]; !c.broken; {
		t.full = false
		used, err := c.m.input(t, rest)
		rest = rest[used:]
		if len(t.misses) > 0 { // c.miss as a value is an allocation
			c.start(t, c.miss)
		}
		said := len(t.out) > 0
		if used == 0 || len(rest) == 0 || len(t.out) >= flushSize {
			c.flush(t)
		}
		if err != nil {
			c.s.common.Logger.Debug("connection", "client", c.raw.RemoteAddr(), "err", err)
			return 0, false
		}
		for c.writing && len(c.pending) > maxPending && !c.broken {
			c.changed.Wait()
		}
		switch {
		case used > 0 && len(rest) > 0 || said && len(rest) > 0:
		case t.full && c.misses > 0:
			for before := c.misses; c.misses >= before && !c.broken; {
				c.changed.Wait()
			}
		default:
			return copy(c.buf, rest), !c.broken
		}
	}
	return 0, false
}

// makeRoom lets there be room to read behind what is there, and gives a large buffer back when it is empty. The buffer
// doubles as octets arrive, and is not made as long as a length prefix promises: two octets of a client that sends no
// more must not cost us 64 KiB.
func (c *streamConn) makeRoom(have int) {
	switch {
	case have == len(c.buf):
		grown := make([]byte, min(2*len(c.buf), prefixLen+wire.MaxMessage))
		copy(grown, c.buf)
		c.buf = grown
	case have == 0 && len(c.buf) > readSize:
		c.buf = make([]byte, readSize)
	}
}

// miss resolves m and, with others that are ready at the same time, answers it. Those that may wait for the client are pending
// before it becomes the writer. When there are more it makes way for them first: a client that reads gets them all, and they
// are not held for long for one that does not.
func (c *streamConn) miss(m *miss) {
	defer c.s.wg.Done()
	if !c.resolve(m) {
		return
	}
	t := turns.Get().(*turn)
	defer turns.Put(t)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.safely(func() {
		c.makeWay() // else everyone who comes by while there is too much would add to it
		c.collect(t, func() { c.leaveToWriter(t) })
		c.leaveToWriter(t)
		c.write(nil)
	}) {
		t.out = nil
		c.fail()
	}
	if !c.broken && (c.misses == 0 || c.leaving) {
		c.setReadDeadline()
	}
	c.changed.Broadcast()
}

// flush sends what is in t.out. mu is held.
func (c *streamConn) flush(t *turn) {
	if len(t.out) > 0 {
		c.write(t.out)
		t.out = t.out[:0]
	}
	t.trim()
}

// leaveToWriter puts what is in t.out behind what is pending. mu is held.
func (c *streamConn) leaveToWriter(t *turn) {
	c.await(t.out)
	t.out = t.out[:0]
	t.trim()
}

// await has b wait for the client, and returns when no more waits than may. It does not keep b. mu is held, but not while the
// client takes its time.
func (c *streamConn) await(b []byte) {
	if c.broken {
		return
	}
	c.pending = append(c.pending, b...) // at once: what the machine says later comes behind it
	c.makeWay()
}

// makeWay returns when no more waits for the client than may, or when the client has not taken what is being written in the
// time that it has then: it does not read, and its connection is broken. mu is held, but not while the client takes its time.
func (c *streamConn) makeWay() {
	for len(c.pending) > maxUnsent && !c.broken {
		switch {
		case !c.writing:
			c.writing = true
			c.writePending(hurriedWrite)
			c.writing = false // what has come to be pending is for the caller, who gives mu up to nobody before it writes
		case !c.hurried:
			c.setWriteDeadline(hurriedWrite)
		default:
			c.changed.Wait()
		}
	}
}

// write sends b, before which nothing is pending, and then what is, or leaves it to the goroutine that is writing. It does not
// keep b. mu is held, but not while the client takes its time.
func (c *streamConn) write(b []byte) {
	if c.writing {
		c.await(b)
		return
	}
	c.writing = true
	if len(b) > 0 && !c.broken {
		c.writeOut(b, writeTimeout)
	}
	for len(c.pending) > 0 && !c.broken {
		c.writePending(writeTimeout)
	}
	c.writing = false
	if cap(c.pending) > keepBuffer {
		c.pending = nil
	}
	if cap(c.spare) > keepBuffer {
		c.spare = nil
	}
	c.changed.Broadcast()
}

// writePending sends what is pending, and not what comes to be so meanwhile. It is for the writer. mu is held, but not during
// the write.
func (c *streamConn) writePending(limit time.Duration) {
	b := c.pending
	c.pending, c.spare = c.spare[:0], b[:0]
	c.writeOut(b, limit)
}

// writeOut sends b in so much time. It is for the writer. mu is held, but not during the write.
func (c *streamConn) writeOut(b []byte, limit time.Duration) {
	c.setWriteDeadline(limit)
	c.mu.Unlock()
	_, err := c.nc.Write(b)
	c.mu.Lock()
	if err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			c.s.common.Logger.Debug("closing the connection of a client that does not read", "client", c.raw.RemoteAddr())
		}
		// A part of an answer may be out: what follows could not be told from it.
		c.fail()
	}
	c.changed.Broadcast()
}

// setWriteDeadline gives the write that begins or goes on so much time from now. mu is held.
func (c *streamConn) setWriteDeadline(limit time.Duration) {
	c.hurried = limit == hurriedWrite
	_ = c.raw.SetWriteDeadline(time.Now().Add(limit))
}

// fail makes the connection broken, and ends the read and the write that go on. mu is held.
func (c *streamConn) fail() {
	c.broken = true
	c.pending = nil
	_ = c.raw.Close()
	c.changed.Broadcast()
}

// arm sets the deadline for the next read: after served more queries, have octets of an unfinished one are there.
func (c *streamConn) arm(served, have int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.broken:
		return
	case have == 0 && !c.m.open():
		c.partial = time.Time{}
	case served > 0 || c.partial.IsZero():
		c.partial = time.Now()
	}
	c.setReadDeadline()
}

// setReadDeadline gives the client the time that it has to send the next octets. mu is held.
//
// A connection is idle when it has nothing to send and nothing to wait for (RFC 7766, section 6.2.3): while a query is
// in flight there is no deadline, unless a message was begun, which has to come to its end.
func (c *streamConn) setReadDeadline() {
	var at time.Time
	switch {
	case c.leaving && c.m.done():
		at = time.Now()
	case c.draining && !c.leaving:
		return // drain has set it
	case !c.partial.IsZero():
		at = c.partial.Add(c.s.message)
	case c.misses == 0:
		at = time.Now().Add(c.s.idle)
	}
	_ = c.raw.SetReadDeadline(at)
}

// goOn reports whether err is a deadline that does not end the reading: one that no longer holds, or that of drain while
// the client may still send something of use.
func (c *streamConn) goOn(err error) bool {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.draining && !c.leaving && !c.broken {
		c.leave()
		if !c.m.done() {
			c.setReadDeadline()
			return !c.broken
		}
	}
	return c.misses > 0 && c.partial.IsZero() && !c.draining && !c.broken
}

// leave has the machine say goodbye. mu is held.
func (c *streamConn) leave() {
	if !c.leaving {
		c.leaving = true
		c.m.drain(&c.t)
		c.flush(&c.t)
	}
}

// drain makes the connection stop reading soon.
func (c *streamConn) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.draining = true
	_ = c.raw.SetReadDeadline(time.Now().Add(drainRead))
}

// finish waits for the answers of what was read, sends them, and says goodbye in the way that lets them arrive.
func (c *streamConn) finish() {
	c.mu.Lock()
	if !c.broken && !c.safely(c.leave) {
		c.fail()
	}
	for c.misses > 0 || c.writing && !c.broken {
		c.changed.Wait()
	}
	broken := c.broken
	c.mu.Unlock()
	if broken {
		return
	}
	_ = c.raw.SetWriteDeadline(time.Now().Add(writeTimeout))
	if t, ok := c.nc.(*tls.Conn); ok {
		_ = t.CloseWrite()
	}
	if h, ok := c.raw.(interface{ CloseWrite() error }); ok && h.CloseWrite() == nil {
		// Octets that we have not read would turn the close into a reset, and that takes our last answers with it.
		_ = c.raw.SetReadDeadline(time.Now().Add(linger))
		_, _ = io.CopyN(io.Discard, c.raw, lingerMost)
	}
}
