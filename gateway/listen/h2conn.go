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

// h2Conn drives a connection that speaks HTTP/2. One goroutine reads; whoever has octets to send while nobody writes becomes
// the writer, and the others leave theirs in turn.out and go.
type h2Conn struct {
	s   *HTTPS
	nc  *tls.Conn
	raw net.Conn // below TLS

	mu       sync.Mutex
	changed  sync.Cond // writing, broken, or a miss has come back
	m        *h2
	t        *turn // nil while there is nothing to say
	spare    []byte
	writing  bool
	broken   bool      // nothing can be written any more
	draining bool      // Shutdown was called
	answered uint64    // m.answered at the last look
	since    time.Time // when what is open was begun, else zero
}

// startH2 returns the driver of a connection whose handshake is over, or nil when the listener has halted.
func (s *HTTPS) startH2(nc *tls.Conn) *h2Conn {
	c := &h2Conn{s: s, nc: nc, raw: nc.NetConn()}
	c.changed.L = &c.mu
	c.m = newH2(&peer{
		common: &s.doh.cfg, client: addrPort(nc.RemoteAddr()), local: addrPort(nc.LocalAddr()), transport: wire.DoH,
	}, s.doh)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return nil
	}
	s.h2conns[c] = struct{}{}
	return c
}

func (s *HTTPS) allH2() []*h2Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*h2Conn, 0, len(s.h2conns))
	for c := range s.h2conns {
		all = append(all, c)
	}
	return all
}

// serve runs the connection to its end.
func (c *h2Conn) serve() {
	defer c.raw.Close()
	if err := c.read(); err != nil {
		c.s.cfg.Logger.Debug("HTTP/2 connection", "client", c.m.peer.client, "err", err)
	}
	c.mu.Lock()
	for c.m.underWay() > 0 || c.writing && !c.broken {
		c.changed.Wait()
	}
	c.m.drain(c.turn())
	c.flush()
	broken := c.broken
	c.mu.Unlock()
	if broken {
		return
	}
	_ = c.raw.SetWriteDeadline(time.Now().Add(writeTimeout))
	_ = c.nc.CloseWrite()
	if h, ok := c.raw.(interface{ CloseWrite() error }); ok && h.CloseWrite() == nil {
		// Octets that we have not read would turn the close into a reset, and that takes our last answers with it.
		_ = c.raw.SetReadDeadline(time.Now().Add(linger))
		_, _ = io.CopyN(io.Discard, c.raw, maxPending)
	}
}

// read takes requests until the client has no more, breaks the rules, or has been idle for too long, or until drain. An
// error is one of the protocol.
func (c *h2Conn) read() error {
	buf := make([]byte, readSize)
	have := 0
	for {
		n, err := c.nc.Read(buf[have:])
		have += n
		if n == 0 && err != nil && !c.waiting(err) {
			return nil
		}
		rest, err := c.input(buf[:have])
		have = copy(buf, rest)
		if err != nil {
			return err
		}
		if have == len(buf) {
			grown := make([]byte, min(2*len(buf), frameHeader+maxFrame))
			copy(grown, buf)
			buf = grown
		} else if have == 0 && len(buf) > readSize {
			buf = make([]byte, readSize)
		}
		if !c.arm(have > 0) {
			return nil
		}
	}
}

// input gives the machine what has come and returns what it does not take yet.
func (c *h2Conn) input(data []byte) (rest []byte, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for used := 1; used > 0 && err == nil && !c.broken; {
		t := c.turn()
		used, err = c.m.input(t, data)
		data = data[used:]
		for i, m := range t.misses {
			go c.resolve(m)
			t.misses[i] = nil
		}
		t.misses = t.misses[:0]
		c.flush()
		for c.writing && len(c.t.out) > maxPending && !c.broken {
			c.changed.Wait()
		}
	}
	return data, err
}

// turn returns c.t. Whoever calls it calls flush next, which gives it back. mu is held.
func (c *h2Conn) turn() *turn {
	if c.t == nil {
		c.t = turns.Get().(*turn)
	}
	return c.t
}

// resolve answers a miss, which it owns.
func (c *h2Conn) resolve(m *miss) {
	out, err := c.s.cfg.resolve(c.s.ctx, m.out[:0], &m.q)
	if err != nil {
		out = out[:0]
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.m.answer(c.turn(), m, out)
	c.flush()
	if c.m.underWay() == 0 {
		c.setDeadline()
	}
	c.changed.Broadcast()
	if m.out = out; cap(m.out) <= keepBuffer && cap(m.in) <= keepBuffer {
		misses.Put(m)
	}
}

// flush sends what the machine has said, unless somebody is sending. mu is held, but not while the client takes its time.
func (c *h2Conn) flush() {
	if c.writing {
		if len(c.t.out) > maxUnsent && !c.broken {
			c.s.cfg.Logger.Debug("closing the connection of a client that does not read", "client", c.m.peer.client)
			c.broken = true
			_ = c.raw.Close() // which ends the write that goes on
		}
		return
	}
	c.writing = true
	for len(c.t.out) > 0 && !c.broken {
		b := c.t.out
		c.t.out = c.spare[:0]
		c.mu.Unlock()
		_ = c.raw.SetWriteDeadline(time.Now().Add(writeTimeout))
		_, err := c.nc.Write(b)
		c.mu.Lock()
		if err != nil {
			c.broken = true
			_ = c.raw.Close()
		}
		c.spare = b[:0]
		c.changed.Broadcast()
	}
	c.writing = false
	if cap(c.t.out) <= 2*enough {
		c.t.out = c.t.out[:0]
		turns.Put(c.t)
	}
	c.t, c.spare = nil, nil
	c.changed.Broadcast()
}

// arm sets the deadline of the next read; partial tells that a frame has begun. It returns false when there is nothing more
// to read for.
func (c *h2Conn) arm(partial bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case !partial && !c.m.open():
		c.since = time.Time{}
	case c.since.IsZero() || c.m.answered != c.answered:
		c.since = time.Now()
	}
	c.answered = c.m.answered
	c.setDeadline()
	return !c.broken
}

// setDeadline gives the client the time that it has to send the next octets. mu is held.
func (c *h2Conn) setDeadline() {
	var at time.Time
	switch {
	case !c.since.IsZero():
		at = c.since.Add(bodyTimeout)
	case c.m.underWay() > 0:
	case c.draining:
		at = time.Now().Add(drainRead)
	default:
		at = time.Now().Add(c.s.cfg.Idle)
	}
	_ = c.raw.SetReadDeadline(at)
}

// waiting reports whether err is a deadline that no longer holds, and reading goes on.
func (c *h2Conn) waiting(err error) bool {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken || !c.since.IsZero() && time.Since(c.since) >= bodyTimeout {
		return false
	}
	return c.m.underWay() > 0 || !c.since.IsZero()
}

// drain says goodbye and lets what is under way finish.
func (c *h2Conn) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.draining = true
	c.m.drain(c.turn())
	c.flush()
	c.setDeadline()
}
