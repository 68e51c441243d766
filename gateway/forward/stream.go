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

	"dnsgateway/gateway/wire"
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
	return &poolClient{identity{s.URL, env.timeout}, newPool(env, dial), true}
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
	results chan<- result // gets one result, unless the call is given up; there has to be room in it
	index   int           // of that result
	start   time.Time
	asked   *server // told of an answer that comes after the call was given up; nil for nobody

	link    *streamLink
	id      uint16
	givenUp bool // guarded by the link's lock
	beaten  bool // given up because another server had a good answer
}

// result is the outcome of an attempt.
type result struct {
	index int
	resp  *wire.Answer
	err   error // inside a *brokenError when the connection broke
}

// calls holds calls whose result was taken, or whose answer came late: nobody else knows them any more.
var calls = sync.Pool{New: func() any { return new(call) }}

// free returns c to calls.
func (c *call) free() {
	*c = call{}
	calls.Put(c)
}

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
			c.results <- result{index: c.index, err: &brokenError{err: err, again: l.served}}
		}
	}
}

// ask implements link.
func (l *streamLink) ask(ctx context.Context, q *query) (*wire.Answer, error) {
	results := make(chan result, 1)
	c := calls.Get().(*call)
	c.q, c.results, c.start = q, results, time.Now()
	if err := l.start(c); err != nil {
		c.free()
		return nil, err
	}
	select {
	case r := <-results:
		c.free()
		return r.resp, r.err
	case <-ctx.Done():
	}
	if !c.abandon(false) {
		c.free()
		r := <-results
		return r.resp, r.err
	}
	return nil, classify(KindIO, "waiting for an answer", ctx.Err())
}

// start gives c an ID and hands its frame to the writer. Without an error, c gets its result, or is given up by abandon.
func (l *streamLink) start(c *call) error {
	l.mu.Lock()
	if l.dead || l.draining {
		l.mu.Unlock()
		return &brokenError{err: fault(KindIO, "connection closed"), again: true}
	}
	if len(l.pending) >= maxPending {
		l.mu.Unlock()
		return fault(KindBusy, "%d queries in flight on one connection", maxPending)
	}
	// The runtime's generator is seeded by the system and cannot be foretold (math/rand/v2: ChaCha8).
	id := uint16(rand.Uint32())
	for l.pending[id] != nil {
		id = uint16(rand.Uint32())
	}
	c.link, c.id = l, id
	l.pending[id] = c
	l.beginLocked(c.start)
	l.out = binary.BigEndian.AppendUint16(l.out, uint16(c.q.size(l.form)))
	l.out = c.q.appendTo(l.out, id, l.form)
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
	return nil
}

// abandon gives c up, which was started, and reports true; or, where its result is there already, false. After true, c
// is its link's. Beaten says that another server had a good answer.
func (c *call) abandon(beaten bool) bool {
	l := c.link
	l.mu.Lock()
	if l.pending[c.id] != c {
		l.mu.Unlock()
		return false
	}
	c.givenUp, c.beaten = true, beaten
	if len(l.pending)-l.live >= maxTombstones {
		l.draining = true // too much was lost on it
	}
	l.endLocked(false)
	return true
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
	if n < wire.HeaderLen {
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
	index := 0
	if c != nil {
		q, index = c.q, c.index // not later: once the connection is closed, the call may serve another query
	}
	l.mu.Unlock()
	if c == nil {
		return mismatch("wrong ID")
	}
	resp, options, err := q.check(msg, id)
	r := result{index: index, resp: resp, err: err}
	if kindOf(err) == KindMalformed {
		err = nil // this name's matter alone: the stream is sound
	}
	if resp != nil && resp.Truncated() {
		r.resp, r.err = nil, malformed("truncated over a stream") // this name's matter, too
	}
	l.mu.Lock()
	if l.pending[id] != c { // the connection was closed meanwhile
		l.mu.Unlock()
		return nil
	}
	delete(l.pending, id)
	if c.givenUp {
		// Late, but it shows that the connection works.
		now := time.Now()
		l.waiting, l.since, l.served = l.live > 0, now, true
		l.mu.Unlock()
		switch {
		case c.asked == nil || r.err != nil:
		case noAnswer(resp.Rcode):
			if c.beaten {
				c.asked.refuted(now, q)
			}
		default:
			c.asked.heard(now, c.start)
		}
		c.free()
		return err
	}
	c.results <- r
	if resp != nil {
		l.heed(options)
	}
	l.endLocked(err == nil)
	return err
}

// heed obeys the server's edns-tcp-keepalive, RFC 7828, section 3.2.2; l.mu is held.
func (l *streamLink) heed(options []byte) {
	for len(options) > 0 {
		code, value, rest, ok := wire.NextOption(options)
		if !ok {
			return
		}
		options = rest
		if code != wire.OptionKeepalive || len(value) != 2 {
			continue
		}
		timeout := time.Duration(binary.BigEndian.Uint16(value)) * 100 * time.Millisecond
		if timeout == 0 {
			l.draining = true // no more queries, and close when all are answered
			return
		}
		was := l.idle
		l.idle = min(idleAfter, timeout)
		if l.idle < was && !l.dead {
			l.timer.Reset(l.idle) // tick finds out what is left of it, and when it has fired just now, too
		}
	}
}
