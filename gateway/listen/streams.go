package listen

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// readSize is the first read buffer of a connection that has a goroutine: dozens of queries. It grows to hold one
	// whole message when that is longer.
	readSize = 4 << 10
	// maxPending is how much may wait for the client before its connection is no longer read.
	maxPending = 64 << 10
	// maxUnsent is how much may wait for the client at all: misses that are in flight already append their answers
	// although the connection is no longer read, 100 of 64 KiB each in the worst case. Hits alone stay below 144 KiB,
	// which is maxPending, flushSize and one answer of 64 KiB; what is left holds a pipeline of ordinary answers. A
	// client that has more waiting, behind kernel buffers that are full, does not read.
	maxUnsent = 4 * maxPending
)

// streams drives the connections of one listener, each with its machine, from the end of the handshake to the end.
//
// On Linux a connection is not a goroutine: a few loops, one for each core, wait for all of them with epoll (see loop).
// Elsewhere, and where the connection is no TCP socket, each has a goroutine that reads (see streamConn). Both do the
// same: what one read brought is answered in one write; misses have a goroutine each, and those that are ready at once are
// answered in one write too (RFC 7766, sections 6.2.1.1 and 8); who does not read is not read; and the times are those of
// RFC 7766, section 6.2.3.
//
// add may be called any number of times, drain and abort at any time, and wait has to be called after the last add.
type streams struct {
	common *Common
	limit  *connLimit      // where a connection gives its place back that came from an acceptor
	ctx    context.Context // for Resolve, see life.ctx
	// idle is how long a connection may have nothing under way, message how long a client may take to bring to its end
	// what it has begun.
	idle, message time.Duration

	wg       sync.WaitGroup // connections and misses
	mu       sync.Mutex
	draining bool
	conns    map[*streamConn]struct{}
	loops    loopSet
}

func newStreams(ctx context.Context, c *Common, limit *connLimit, idle, message time.Duration) *streams {
	return &streams{
		common: c, limit: limit, ctx: ctx, idle: idle, message: message, conns: make(map[*streamConn]struct{}),
	}
}

// add takes over an accepted connection: nc as the acceptor gave it, and over it tc, whose handshake is complete, or nil.
// A tc that came from shakeHands costs least. When add returns, neither belongs to the caller any more; m never did. After
// drain, add closes the connection: no query of it was read.
func (s *streams) add(nc net.Conn, tc *tls.Conn, m machine) {
	s.mu.Lock()
	if s.draining {
		s.mu.Unlock()
		_ = nc.Close()
		return
	}
	s.wg.Add(1)
	if s.loops.add(s, nc, tc, m) {
		s.mu.Unlock()
		return
	}
	c := newStreamConn(s, nc, tc, m)
	s.conns[c] = struct{}{}
	s.mu.Unlock()
	go func() {
		defer s.wg.Done()
		c.serve()
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
	}()
}

// shakeHands makes nc the server's side of a TLS connection, which add can part from nc again; for the handshake there is so
// much time. nc stays the caller's when it fails.
//
// The last octets of a handshake are the client's, and crypto/tls has nothing to say to them, so the system would wait 40 ms
// for something that it could acknowledge them with. A client that leaves Nagle's algorithm on (RFC 9293, section 3.7.4) does
// not send its first query before that.
func shakeHands(ctx context.Context, nc net.Conn, cfg *tls.Config, limit time.Duration) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tc := tls.Server(&cipherConn{nc: nc}, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	acknowledge(nc)
	return tc, nil
}

// drain makes all connections stop reading soon, answer what they have read, and end.
func (s *streams) drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.draining = true
	for c := range s.conns {
		c.drain()
	}
	s.loops.drain()
}

// abort closes all connections.
func (s *streams) abort() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.draining = true
	for c := range s.conns {
		_ = c.raw.Close()
	}
	s.loops.abort()
}

// wait returns when all connections have ended, and everything that add has started. Nothing may be added any more.
func (s *streams) wait() {
	s.wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.loops.stop()
}

// flow is what a connection is to either driver: a machine with its lock and its misses.
type flow struct {
	s  *streams
	m  machine
	mu sync.Mutex // held in calls of m, and whatever else the driver says
	// Guarded by mu.
	misses int  // that were started and have not been collected
	broken bool // nothing can be sent any more, and m is no longer called
	// back are the misses that have been resolved and that m has not been told of, the latest first. Who puts the first
	// one there has to see to it that m is.
	back atomic.Pointer[miss]
}

// safely calls do and returns false when it has panicked: a bug of ours costs one connection, which is broken then. mu is
// held.
func (f *flow) safely(do func()) (ok bool) {
	defer func() {
		if r := recover(); r != nil {
			f.broken = true
			f.s.common.Logger.Error("panic while serving a connection", "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
		}
	}()
	do()
	return true
}

// start has do resolve the misses of a turn, each on a goroutine of its own. mu is held.
func (f *flow) start(t *turn, do func(*miss)) {
	for i, m := range t.misses {
		t.misses[i] = nil
		f.misses++
		f.s.wg.Add(1)
		go do(m)
	}
	t.misses = t.misses[:0]
}

// resolve answers the miss m, which it owns. The caller has counted it in s.wg. It returns true when the caller has to
// tell the machine, with collect.
func (f *flow) resolve(m *miss) bool {
	out, err := f.s.common.resolve(f.s.ctx, m.out[:0], &m.q)
	m.out, m.response = out, out
	if err != nil || len(out) == 0 {
		m.response = nil
	}
	for {
		next := f.back.Load()
		m.next = next
		if f.back.CompareAndSwap(next, m) {
			if next != nil {
				return false
			}
			break
		}
	}
	// Other misses of this connection are often ready now: one message of an upstream wakes many. They go first, and
	// then there is one write for all.
	runtime.Gosched()
	return true
}

// collect tells the machine of the misses that have come back, in their order, and calls flush when much is in t.out. From
// those that it is not told of, because the connection is broken or becomes so, nothing is left either. mu is held.
func (f *flow) collect(t *turn, flush func()) (any bool) {
	if f.back.Load() == nil {
		return false
	}
	var first *miss
	for m := f.back.Swap(nil); m != nil; {
		m.next, first, m = first, m, m.next
	}
	defer func() { // a panic comes by here too
		for ; first != nil; first = first.next {
			f.misses--
		}
	}()
	for first != nil && !f.broken {
		m := first
		first = m.next
		f.misses--
		f.m.answer(t, m, m.response)
		m.free()
		if len(t.out) >= flushSize {
			flush()
		}
	}
	return true
}
