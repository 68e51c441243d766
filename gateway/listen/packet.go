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
	// readPause is the longest pause after errors. The socket's buffer holds what comes meanwhile, and errors that a
	// client can cause must not silence the listener.
	readPause = 10 * time.Millisecond
	// maxReaders is how many goroutines read one socket. They take turns in the kernel, so more than a few gain nothing.
	maxReaders = 4
)

// PacketConfig configures a UDP listener.
type PacketConfig struct {
	Common
	// Inflight is the number of queries that may be in Resolve at once; a miss beyond it is dropped without an answer.
	// 10000 by default.
	Inflight int
}

// Packet is a plain UDP listener. The Handler keeps responses within the client's size.
type Packet struct {
	cfg  PacketConfig
	conn *net.UDPConn
	addr *net.UDPAddr
	// local is the bound address if it is a specific one. On a wildcard bind it is the zero value: then each datagram
	// carries the address that it was sent to, and the answer leaves from there.
	local netip.AddrPort
	info  packetInfo
	port  uint16

	pool   sync.Pool // of *packet
	misses atomic.Int64
	wg     sync.WaitGroup // readers and misses
	life
}

// packet is one datagram with everything that its answer needs. It belongs to one goroutine at a time: the reader that
// filled it, or the miss that it was handed to.
type packet struct {
	in   [maxDatagram + 1]byte // one more, so that a longer datagram shows
	oob  [oobSize]byte
	out  []byte
	from netip.AddrPort // as the socket spells it: mapped on a dual-stack socket
	info []byte         // the control message of the answer; aliases oob
	q    wire.Query
}

// ListenPacket binds a UDP socket. Nothing is read before Serve.
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
	conn, err := bindUDP(ctx, cfg.Addr)
	if err != nil {
		return nil, err
	}
	l := &Packet{cfg: cfg, conn: conn, addr: conn.LocalAddr().(*net.UDPAddr)}
	l.pool.New = func() any { return &packet{out: make([]byte, 0, maxDatagram)} }
	local := l.addr.AddrPort()
	l.port = local.Port()
	if local.Addr().Unmap().IsUnspecified() {
		if err := l.info.enable(conn, local.Addr().Is4()); err != nil {
			cfg.Logger.Warn("answers may leave from another address than the one that was asked", "err", err)
		}
	} else {
		l.local = unmap(local)
	}
	l.init()
	return l, nil
}

// Addr implements Server.
func (l *Packet) Addr() net.Addr { return l.addr }

// Name implements Server.
func (l *Packet) Name() string { return l.cfg.Name }

// Serve implements Server.
func (l *Packet) Serve() error {
	if !l.begin() {
		return nil
	}
	defer l.end()
	for range min(runtime.GOMAXPROCS(0), maxReaders) {
		l.wg.Go(l.read)
	}
	l.wg.Wait()
	_ = l.conn.Close() // nothing is left to write
	if !l.halted() {
		return net.ErrClosed
	}
	return nil
}

// Shutdown implements Server.
func (l *Packet) Shutdown(ctx context.Context) error {
	first, serving := l.halt()
	if !serving {
		_ = l.conn.Close()
		return nil
	}
	if first {
		_ = l.conn.SetReadDeadline(time.Now().Add(drainRead))
	}
	return l.wait(ctx, func() { _ = l.conn.Close() })
}

// read takes datagrams until Shutdown. A hit is answered from here with the same buffers again and again.
func (l *Packet) read() {
	b := backoff{longest: readPause}
	p := l.pool.Get().(*packet)
	for {
		n, oobn, _, from, err := l.conn.ReadMsgUDPAddrPort(p.in[:], p.oob[:])
		if err != nil {
			if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) && l.halted() {
				l.pool.Put(p)
				return
			}
			// ECONNREFUSED and EMSGSIZE are about one datagram, ENOBUFS and ENOMEM about a moment.
			b.pause(l.stop, l.cfg.Logger, "cannot read datagrams", err)
			continue
		}
		b.reset()
		p.from = from
		if !l.serve(p, n, oobn) {
			p = l.pool.Get().(*packet)
		}
	}
}

// serve answers the datagram in p and reports whether p may be used again: a miss takes it away.
func (l *Packet) serve(p *packet, n, oobn int) (keep bool) {
	q := &p.q
	q.Received = time.Now().UnixNano()
	q.Client, q.Transport, q.Listener = unmap(p.from), wire.UDP, l.cfg.Name
	q.Local, p.info = l.local, nil
	if !q.Local.IsValid() {
		var to netip.Addr
		to, p.info = l.info.read(p.oob[:oobn])
		q.Local = netip.AddrPortFrom(to, l.port)
	}
	if n > maxDatagram {
		n = wire.HeaderLen
	}
	q.Parse(p.in[:n])
	out, verdict := l.cfg.serveWire(p.out[:0], q)
	switch verdict {
	case wire.Answered:
		l.send(p, out)
	case wire.Miss:
		if l.misses.Add(1) > int64(l.cfg.Inflight) {
			l.misses.Add(-1)
			return true
		}
		l.wg.Add(1)
		go l.resolve(p)
		return false
	}
	return true
}

// resolve answers the miss in p, which it owns.
func (l *Packet) resolve(p *packet) {
	defer l.wg.Done()
	defer l.misses.Add(-1)
	if out, err := l.cfg.resolve(l.ctx, p.out[:0], &p.q); err == nil {
		l.send(p, out)
	}
	l.pool.Put(p)
}

// send writes out to p's client and keeps a buffer that has grown.
func (l *Packet) send(p *packet, out []byte) {
	if cap(out) <= keepBuffer {
		p.out = out[:0]
	}
	if len(out) == 0 {
		return
	}
	// A datagram that cannot be sent is lost, as others are on their way: the client asks again.
	if _, _, err := l.conn.WriteMsgUDPAddrPort(out, p.info, p.from); err != nil {
		l.cfg.Logger.Debug("cannot send an answer", "client", p.from, "err", err)
	}
}
