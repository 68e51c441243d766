package forward

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// maxPending bounds the IDs in use on one connection. It leaves most of them free, so that a free one is found at
	// random soon.
	maxPending = 16384
	// maxTombstones is how many queries may stay without any answer before the connection is replaced.
	maxTombstones = 1024
	// writeTimeout is how long the peer may refuse to take our bytes.
	writeTimeout = 2 * time.Second
	readBuffer   = 8 << 10
)

// newStreamClient returns a client for DNS over TCP (RFC 7766), or over TLS (RFC 7858) if secure.
func newStreamClient(s Server, t *target, env environment, secure bool) *poolClient {
	var cfg *tls.Config
	f := keepalive
	if secure {
		cfg = s.tlsConfig("dot")
		f |= padded
	}
	dial := func(ctx context.Context, spawn func(func())) (link, error) {
		open := func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) { return dialStream(ctx, addr, cfg) }
		conn, err := race(ctx, t, open, func(c net.Conn) { c.Close() })
		if err != nil {
			return nil, err
		}
		return newStreamLink(conn, f, spawn), nil
	}
	return &poolClient{identity{s.URL, env.timeout}, newPool(env.timeout, dial)}
}

// dialStream connects to addr, and shakes hands if cfg is not nil.
func dialStream(ctx context.Context, addr netip.AddrPort, cfg *tls.Config) (net.Conn, error) {
	raw, err := dialTCP(ctx, addr)
	if err != nil || cfg == nil {
		return raw, err
	}
	conn := tls.Client(raw, cfg)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		if cause := ctx.Err(); cause != nil {
			err = cause
		}
		return nil, classify(KindTLS, "TLS handshake", err)
	}
	return conn, nil
}

// streamLink is one TCP or TLS connection with any number of queries in flight. One goroutine reads, one writes; they
// end when the connection is closed.
type streamLink struct {
	pulse   // its lock guards what follows
	conn    net.Conn
	form    form
	pending map[uint16]*call
	out     []byte        // frames that wait for the writer
	wake    chan struct{} // tells the writer of them
	gone    chan struct{} // closed at the end
}

// call is a query in flight on a stream. After it was given up it stays in pending as a tombstone until its answer
// comes or the connection ends, so that its ID is not used for another question meanwhile.
type call struct {
	q       *query
	done    chan streamReply
	givenUp bool
}

type streamReply struct {
	resp *dns.Msg
	err  error
}

// calls holds calls whose answer was taken: nobody else knows them any more.
var calls = sync.Pool{New: func() any { return &call{done: make(chan streamReply, 1)} }}

func newStreamLink(conn net.Conn, f form, spawn func(func())) *streamLink {
	l := &streamLink{conn: conn, form: f, pending: make(map[uint16]*call), wake: make(chan struct{}, 1),
		gone: make(chan struct{})}
	l.born(l.shut)
	spawn(l.read)
	spawn(l.write)
	return l
}

func (l *streamLink) vitals() *pulse { return &l.pulse }

// shut closes the connection and fails what is in flight. A nil err is the end of an idle connection.
func (l *streamLink) shut(err error) {
	close(l.gone)
	conn := l.conn
	if tc, ok := conn.(*tls.Conn); ok && err != nil {
		conn = tc.NetConn() // a close_notify could block where the peer takes no bytes
	}
	conn.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, c := range l.pending {
		delete(l.pending, id)
		if !c.givenUp {
			c.done <- streamReply{err: &brokenError{err: err, again: l.served}}
		}
	}
}

// ask implements link.
func (l *streamLink) ask(ctx context.Context, q *query) (*dns.Msg, error) {
	c := calls.Get().(*call)
	c.q, c.givenUp = q, false
	id, err := l.send(c)
	if err != nil {
		calls.Put(c)
		return nil, err
	}
	select {
	case r := <-c.done:
		c.q = nil
		calls.Put(c)
		return r.resp, r.err
	case <-ctx.Done():
	}
	l.mu.Lock()
	if l.pending[id] != c { // the answer came meanwhile
		l.mu.Unlock()
		r := <-c.done
		c.q = nil
		calls.Put(c)
		return r.resp, r.err
	}
	c.givenUp = true
	if len(l.pending)-l.live >= maxTombstones {
		l.draining = true // too much was lost on it
	}
	l.endLocked(false)
	return nil, classify(KindIO, "waiting for an answer", ctx.Err())
}

// send gives c an ID and hands its frame to the writer.
func (l *streamLink) send(c *call) (uint16, error) {
	l.mu.Lock()
	if l.dead {
		l.mu.Unlock()
		return 0, &brokenError{err: fault(KindIO, "connection closed"), again: true}
	}
	if len(l.pending) >= maxPending {
		l.mu.Unlock()
		return 0, fault(KindBusy, "%d queries in flight on one connection", maxPending)
	}
	// The runtime's generator is seeded by the system and cannot be foretold (math/rand/v2: ChaCha8).
	id := uint16(rand.Uint32())
	for l.pending[id] != nil {
		id = uint16(rand.Uint32())
	}
	l.pending[id] = c
	l.beginLocked(time.Now())
	l.out = binary.BigEndian.AppendUint16(l.out, uint16(c.q.size(l.form)))
	l.out = c.q.appendTo(l.out, id, l.form)
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
	return id, nil
}

// write sends frames, as many at once as have come together.
func (l *streamLink) write() {
	var buf []byte
	for {
		select {
		case <-l.gone:
			return
		case <-l.wake:
		}
		runtime.Gosched() // let those who are about to ask add their frames
		l.mu.Lock()
		buf, l.out = l.out, buf[:0]
		l.mu.Unlock()
		if len(buf) == 0 {
			continue
		}
		err := l.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
		if err == nil {
			_, err = l.conn.Write(buf)
		}
		if err != nil {
			l.die(classify(KindIO, "writing", err))
			return
		}
		if cap(buf) > 64<<10 {
			buf = nil // a burst is over
		}
	}
}

// read takes answers until the connection ends or brings something that is none.
func (l *streamLink) read() {
	r := bufio.NewReaderSize(l.conn, readBuffer)
	var buf []byte
	for {
		msg, err := readFrame(r, &buf)
		if err != nil {
			if err == io.EOF {
				err = errors.New("closed by the server")
			}
			l.die(classify(KindIO, "reading", err))
			return
		}
		if err := l.deliver(msg); err != nil {
			l.die(err)
			return
		}
	}
}

// readFrame reads one length-prefixed message, RFC 1035, section 4.2.2. The result is valid until the next call.
func readFrame(r *bufio.Reader, buf *[]byte) ([]byte, error) {
	var prefix [2]byte
	if _, err := io.ReadFull(r, prefix[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(prefix[:]))
	if n < headerLen {
		return nil, &Error{Kind: KindMismatch, Err: errShort}
	}
	if cap(*buf) < n {
		*buf = make([]byte, max(n, 2048))
	}
	msg := (*buf)[:n]
	if _, err := io.ReadFull(r, msg); err != nil {
		return nil, err
	}
	return msg, nil
}

// deliver hands msg to the call that waits for it. An error means that the stream cannot be trusted any more: an answer
// that nobody asked for, or to another question, or that is not even a response.
func (l *streamLink) deliver(msg []byte) error {
	if err := checkHeader(msg); err != nil {
		return err
	}
	id := binary.BigEndian.Uint16(msg)
	l.mu.Lock()
	c := l.pending[id]
	var q *query
	if c != nil {
		q = c.q // not later: once the connection is closed, the call may serve another query
	}
	l.mu.Unlock()
	if c == nil {
		return mismatch("wrong ID")
	}
	resp, err := q.check(msg, id)
	reply := streamReply{resp: resp, err: err}
	if kindOf(err) == KindMalformed {
		err = nil // this name's matter alone: the stream is sound
	}
	if resp != nil && resp.Truncated {
		reply = streamReply{err: mismatch("truncated over a stream")} // and yet the stream is sound
	}
	l.mu.Lock()
	if l.pending[id] != c { // the connection was closed meanwhile
		l.mu.Unlock()
		return nil
	}
	delete(l.pending, id)
	if c.givenUp {
		// Late, but it shows that the connection works.
		l.waiting, l.since, l.served = l.live > 0, time.Now(), true
		l.mu.Unlock()
		return err
	}
	c.done <- reply
	if resp != nil {
		l.heed(resp)
	}
	l.endLocked(err == nil)
	return err
}

// heed obeys the server's edns-tcp-keepalive, RFC 7828, section 3.2.2; l.mu is held.
func (l *streamLink) heed(resp *dns.Msg) {
	opt := resp.IsEdns0()
	if opt == nil {
		return
	}
	for _, o := range opt.Option {
		ka, ok := o.(*dns.EDNS0_TCP_KEEPALIVE)
		switch {
		case !ok:
		case ka.Timeout == 0:
			l.draining = true // no more queries, and close when all are answered
		default:
			was := l.idle
			l.idle = min(idleAfter, time.Duration(ka.Timeout)*100*time.Millisecond)
			if l.idle < was && !l.dead {
				l.timer.Reset(l.idle) // tick finds out what is left of it, and when it has fired just now, too
			}
		}
	}
}
