package listen

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"dnsgateway/gateway/wire"
)

const (
	// maxDatagram is the longest query that is read in octets. We announce a payload size of at most 4096 octets (RFC
	// 6891, section 6.2.5) and a query is far shorter; the rest of a longer one is cut off and the Handler's FORMERR
	// says so.
	maxDatagram = 4096
	// defaultInflight is the number of cache misses that one UDP listener resolves at once.
	defaultInflight = 10000
	// maxSockets bounds PacketConfig.Sockets: more than any machine has cores gain nothing.
	maxSockets = 1024
	// readPause is the longest pause after errors. The socket's buffer holds what comes meanwhile, and errors that a
	// client can cause must not silence the listener.
	readPause = 10 * time.Millisecond
	// batchSize is how many datagrams one system call moves at most. Measured on loopback, a datagram of a batch of 8 costs
	// 8 % more than one of 32, of 16 3 % more, and of 64 1 % less, which is not worth that the first answer waits longer.
	batchSize = 32
	// maxUnsentAnswers is how many answers to misses may wait for one socket. Sending never takes long (see sender), so
	// this is not reached before the network is gone.
	maxUnsentAnswers = 1024
)

// PacketConfig configures a UDP listener.
type PacketConfig struct {
	Common
	// Inflight is the number of queries that may be in Resolve at once. As many more may wait for their turn, which
	// doubles the time that an answer takes at worst; beyond that the miss that has waited longest is shed without an
	// answer. 10000 by default. A Handler that bounds what it asks, and answers what it gives up, as the gateway's does, has
	// to be given more here than that bound: else misses wait and are shed here, in silence, before it comes to decide. What
	// is left for this bound then are the many who wait for few questions.
	Inflight int
	// Sockets is how many sockets share the port, each read by a goroutine of its own; one for each of GOMAXPROCS by
	// default. The kernel chooses by the client's address and port. Only Linux can do that: elsewhere there is one socket,
	// and Sockets is how many goroutines read it, 4 at most by default, because they take turns in the kernel.
	Sockets int

	// plain asks for the plain loop where there are batches, for tests.
	plain bool
}

// Packet is a plain UDP listener. The Handler keeps responses within the client's size.
type Packet struct {
	cfg     PacketConfig
	sockets []*socket
	addr    *net.UDPAddr
	// local is the bound address if it is a specific one. On a wildcard bind it is the zero value: then each datagram
	// carries the address that it was sent to, and the answer leaves from there.
	local netip.AddrPort
	info  packetInfo
	port  uint16

	misses missQueue
	pool   sync.Pool // of *pending
	unsent atomic.Uint64
	warned atomic.Int64 // when unsent was last worth a warning, in Unix nanoseconds
	life
}

// socket is one of the listener's sockets, and the way out for the answers to the misses that came in by it.
type socket struct {
	l    *Packet
	conn *net.UDPConn

	mu      sync.Mutex
	sending bool       // a worker sends what is in ready
	ready   []*pending // answered, waiting for that worker
	spare   []*pending // the memory of ready, while its former content is being sent
	answers []answer
	tx      sender
}

// origin is where a datagram came from, and so where its answer goes.
type origin struct {
	addr netip.AddrPort // as the socket spells it: mapped on a dual-stack socket
	name sockaddr       // the same as the kernel wrote it; the plain loop leaves it empty
	info []byte         // the control message that makes the answer leave from the address that was asked; or nil
}

// packet is one datagram that was read.
type packet struct {
	origin  // info aliases oob
	n, oobn int
	in      [maxDatagram + 1]byte // one more, so that a longer datagram shows
	oob     [oobSize]byte
}

// answer is one datagram to be sent.
type answer struct {
	to  *origin
	msg []byte
}

// receiver reads a socket for one goroutine.
type receiver interface {
	// receive waits for datagrams and returns those that are there, a batch at most. They are valid until the next call.
	receive() ([]packet, error)
}

// sender writes to a socket for one goroutine at a time.
type sender interface {
	// send sends answers. One that cannot be sent is lost, as others are on their way, and the client asks again; the
	// others leave. It does not wait for long and keeps nothing of answers.
	send(answers []answer)
}

// ListenPacket binds the UDP sockets. Nothing is read before Serve.
func ListenPacket(ctx context.Context, cfg PacketConfig) (*Packet, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if cfg.Inflight < 0 {
		return nil, errors.New("negative number of queries in flight")
	}
	if cfg.Inflight == 0 {
		cfg.Inflight = defaultInflight
	}
	if cfg.Sockets < 0 || cfg.Sockets > maxSockets {
		return nil, errors.New("number of sockets out of range")
	}
	if cfg.Sockets == 0 {
		cfg.Sockets = defaultSockets()
	}
	conns, err := bindPacket(ctx, cfg.Addr, cfg.Sockets)
	if err != nil {
		return nil, err
	}
	l := &Packet{cfg: cfg, addr: conns[0].LocalAddr().(*net.UDPAddr)}
	l.pool.New = func() any { return &pending{out: make([]byte, 0, wire.MinUDPSize)} }
	l.misses.init(cfg.Inflight, l.resolve, l.recycle)
	if !cfg.plain && !canBatch(conns[0]) {
		l.cfg.plain = true
	}
	local := l.addr.AddrPort()
	l.port = local.Port()
	wildcard := local.Addr().Unmap().IsUnspecified()
	if !wildcard {
		l.local = unmap(local)
	}
	for _, conn := range conns {
		if wildcard {
			if err := l.info.enable(conn, local.Addr().Is4()); err != nil {
				cfg.Logger.Warn("answers may leave from another address than the one that was asked", "err", err)
			}
		}
		l.sockets = append(l.sockets, &socket{l: l, conn: conn, tx: l.newSender(conn)})
	}
	l.init()
	return l, nil
}

// Addr implements Server.
func (l *Packet) Addr() net.Addr { return l.addr }

// Name implements Server.
func (l *Packet) Name() string { return l.cfg.Name }

// Shed returns how many misses were given up because too many others were being resolved: those that were pushed out of
// the queue, and those whose client will have given up before.
func (l *Packet) Shed() uint64 { return l.misses.shed.Load() }

// Unsent returns how many answers to misses were given up because too many others waited to be sent.
func (l *Packet) Unsent() uint64 { return l.unsent.Load() }

// Serve implements Server.
func (l *Packet) Serve() error {
	if !l.begin() {
		return nil
	}
	defer l.end()
	var readers sync.WaitGroup
	for lane := range max(l.cfg.Sockets, len(l.sockets)) {
		r := l.newReader(lane)
		readers.Go(r.read)
	}
	readers.Wait()
	l.misses.finish()
	l.close() // nothing is left to write
	if !l.halted() {
		return net.ErrClosed
	}
	return nil
}

// Shutdown implements Server.
func (l *Packet) Shutdown(ctx context.Context) error {
	first, serving := l.halt()
	if !serving {
		l.close()
		return nil
	}
	if first {
		until := time.Now().Add(drainRead)
		for _, s := range l.sockets {
			_ = s.conn.SetReadDeadline(until)
		}
	}
	return l.wait(ctx, l.close)
}

func (l *Packet) close() {
	for _, s := range l.sockets {
		_ = s.conn.Close()
	}
}

func (l *Packet) newReceiver(conn *net.UDPConn) receiver {
	if l.cfg.plain {
		return newPlainReceiver(conn)
	}
	return newBatchReceiver(conn, !l.local.IsValid())
}

func (l *Packet) newSender(conn *net.UDPConn) sender {
	if l.cfg.plain {
		return &plainSender{conn: conn, log: l.cfg.Logger}
	}
	return newBatchSender(conn, l.cfg.Logger)
}

// reader is one goroutine that reads a socket, and all that it needs to answer hits. It uses the same memory again and
// again.
type reader struct {
	s       *socket
	rx      receiver
	tx      sender // not the socket's: a hit never waits for another goroutine
	lane    uint8
	queries []wire.Query // one for each packet
	out     []byte       // holds the messages of answers, one behind the other
	answers []answer
}

func (l *Packet) newReader(lane int) *reader {
	s := l.sockets[lane%len(l.sockets)]
	return &reader{
		s: s, rx: l.newReceiver(s.conn), tx: l.newSender(s.conn), lane: uint8(lane), queries: make([]wire.Query, batchSize),
		// What is not used of it costs nothing: the system gives memory when it is touched.
		out: make([]byte, 0, batchSize*maxDatagram), answers: make([]answer, 0, batchSize),
	}
}

// read takes datagrams until Shutdown.
func (r *reader) read() {
	l := r.s.l
	b := backoff{longest: readPause}
	for {
		packets, err := r.rx.receive()
		switch {
		case err == nil:
			b.reset()
			r.serve(packets)
		case errors.Is(err, os.ErrDeadlineExceeded) && l.halted():
			return
		case errors.Is(err, net.ErrClosed):
			l.close() // if it was not us, then the others must not go on as if all were well
			return
		default:
			// ECONNREFUSED and EMSGSIZE are about one datagram, ENOBUFS and ENOMEM about a moment.
			b.pause(l.stop, l.cfg.Logger, "cannot read datagrams", err)
		}
	}
}

// serve answers the hits among packets, all at once, and hands the misses on. The clock is read once: what one system
// call brought had been received when it returned, and that is as much as can be known of each.
func (r *reader) serve(packets []packet) {
	now := time.Now().UnixNano()
	r.out, r.answers = r.out[:0], r.answers[:0]
	for i := range packets {
		r.parse(&r.queries[i], &packets[i], now)
	}
	r.s.l.cfg.expect(r.queries[:len(packets)])
	for i := range packets {
		r.serveOne(&r.queries[i], &packets[i])
	}
	if len(r.answers) > 0 {
		r.tx.send(r.answers)
	}
}

// parse makes q the query in p.
func (r *reader) parse(q *wire.Query, p *packet, now int64) {
	l := r.s.l
	q.Client, q.Transport, q.Listener, q.Received, q.Lane = unmap(p.addr), wire.UDP, l.cfg.Name, now, r.lane
	q.Local, p.info = l.local, nil
	if !q.Local.IsValid() {
		var to netip.Addr
		to, p.info = l.info.read(p.oob[:p.oobn])
		q.Local = netip.AddrPortFrom(to, l.port)
	}
	in := p.in[:p.n]
	if p.n > maxDatagram {
		in = in[:wire.HeaderLen]
	}
	q.Parse(in)
}

func (r *reader) serveOne(q *wire.Query, p *packet) {
	l := r.s.l
	at := len(r.out)
	out, verdict := l.cfg.serveWire(r.out[at:], q)
	switch {
	case verdict == wire.Miss:
		l.misses.add(l.newMiss(r.s, p, q))
	case verdict == wire.Answered && len(out) > 0:
		r.answers = append(r.answers, answer{&p.origin, out})
		if len(out) <= cap(r.out)-at { // else it has been given memory of its own
			r.out = r.out[:at+len(out)]
		}
	}
}

// pending is a query that Resolve has to answer, with memory of its own.
type pending struct {
	s    *socket
	to   origin
	oob  [oobSize]byte // holds to.info
	in   []byte
	out  []byte
	q    wire.Query
	resp []byte // the answer; aliases out unless it is a giant
}

// newMiss copies what the reader will use again.
func (l *Packet) newMiss(s *socket, p *packet, q *wire.Query) *pending {
	m := l.pool.Get().(*pending)
	m.s, m.to = s, p.origin
	m.to.info = m.oob[:copy(m.oob[:], p.info)]
	m.in = append(m.in[:0], q.Raw...)
	m.q = *q
	m.q.Parse(m.in)
	return m
}

// recycle takes back a miss that nobody uses any more.
func (l *Packet) recycle(m *pending) { l.pool.Put(m) }

// resolve answers a miss, which it owns, on a worker.
func (l *Packet) resolve(m *pending) {
	out, err := l.cfg.resolve(l.ctx, m.out[:0], &m.q)
	if cap(out) <= keepBuffer {
		m.out = out[:0]
	}
	if err != nil || len(out) == 0 {
		l.recycle(m)
		return
	}
	m.resp = out
	m.s.post(m)
}

// post sends the answer of m, or leaves it to the worker that is sending by the same socket: then several leave at once.
func (s *socket) post(m *pending) {
	s.mu.Lock()
	if len(s.ready) == maxUnsentAnswers {
		s.mu.Unlock()
		m.resp = nil
		s.l.recycle(m)
		s.l.giveUpAnswer()
		return
	}
	defer s.mu.Unlock()
	s.ready = append(s.ready, m)
	if s.sending {
		return
	}
	s.sending = true
	// What an upstream's connection brings at once makes many workers ready at once: those that can run have their turn
	// before the answers leave. With nobody else to run that is at once; 64 that were ready together took 2 to 7 calls
	// instead of 64, and bursts of 32 took 13 % less CPU on one core, 2 % on two.
	s.mu.Unlock()
	runtime.Gosched()
	s.mu.Lock()
	for len(s.ready) > 0 {
		batch := s.ready
		s.ready = s.spare[:0]
		s.mu.Unlock()
		s.answers = s.answers[:0]
		for _, m := range batch {
			s.answers = append(s.answers, answer{&m.to, m.resp})
		}
		s.tx.send(s.answers)
		clear(s.answers)
		for i, m := range batch {
			batch[i], m.resp = nil, nil
			s.l.recycle(m)
		}
		s.mu.Lock()
		s.spare = batch[:0]
	}
	s.sending = false
}

// giveUpAnswer counts an answer that is not sent, and says so now and then.
func (l *Packet) giveUpAnswer() {
	n := l.unsent.Add(1)
	now, last := time.Now().UnixNano(), l.warned.Load()
	if now-last >= int64(warnEvery) && l.warned.CompareAndSwap(last, now) {
		l.cfg.Logger.Warn("answers are given up: the socket does not take them as fast as they are ready", "unsent", n)
	}
}
