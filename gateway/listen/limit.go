package listen

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
)

// connLimit counts connections, all and by client prefix. Its memory is bounded by the number of connections.
type connLimit struct {
	limits Limits

	mu       sync.Mutex
	total    int
	byClient map[netip.Prefix]int
}

func newConnLimit(l Limits) *connLimit {
	return &connLimit{limits: l, byClient: make(map[netip.Prefix]int)}
}

// prefix returns what counts as one client.
func (l *connLimit) prefix(client netip.Addr) netip.Prefix {
	client = client.Unmap().WithZone("")
	bits := l.limits.PrefixV6
	if client.Is4() {
		bits = l.limits.PrefixV4
	}
	p, _ := client.Prefix(bits) // the bits were checked; an invalid address is one client, too
	return p
}

// acquire reports whether client may have one more connection; if so, release has to be called once.
func (l *connLimit) acquire(client netip.Addr) bool {
	p := l.prefix(client)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.total >= l.limits.Total || l.limits.PerClient > 0 && l.byClient[p] >= l.limits.PerClient {
		return false
	}
	l.total++
	l.byClient[p]++
	return true
}

func (l *connLimit) release(client netip.Addr) {
	p := l.prefix(client)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total--
	if l.byClient[p]--; l.byClient[p] <= 0 {
		delete(l.byClient, p)
	}
}

// open returns how many connections there are.
func (l *connLimit) open() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total
}

// acceptor is a net.Listener that survives what passes (EMFILE, ECONNABORTED, ENOBUFS, ...) and closes connections over
// the limit as soon as they are accepted.
type acceptor struct {
	net.Listener
	limit *connLimit
	log   *slog.Logger

	once sync.Once
	stop chan struct{} // closed by Close
}

func newAcceptor(ln net.Listener, limit *connLimit, log *slog.Logger) *acceptor {
	return &acceptor{Listener: ln, limit: limit, log: log, stop: make(chan struct{})}
}

// Accept returns an error only after Close.
func (a *acceptor) Accept() (net.Conn, error) {
	b := backoff{longest: time.Second}
	for {
		nc, err := a.Listener.Accept()
		if err != nil {
			// Only Close ends the loop: whatever else accept(2) reports is about one connection, or about resources
			// that come back.
			if errors.Is(err, net.ErrClosed) {
				return nil, net.ErrClosed
			}
			b.pause(a.stop, a.log, "cannot accept connections", err)
			select {
			case <-a.stop:
				return nil, net.ErrClosed
			default:
				continue
			}
		}
		b.reset()
		client := addrPort(nc.RemoteAddr()).Addr()
		if !a.limit.acquire(client) {
			a.log.Debug("connection over the limit", "client", client)
			_ = nc.Close()
			continue
		}
		return &limitedConn{Conn: nc, limit: a.limit, client: client}, nil
	}
}

// Close implements net.Listener. It may be called more than once.
func (a *acceptor) Close() error {
	a.once.Do(func() { close(a.stop) })
	return a.Listener.Close()
}

// limitedConn gives its place back when it is closed.
type limitedConn struct {
	net.Conn
	limit  *connLimit
	client netip.Addr
	once   sync.Once
}

// Close implements net.Conn.
func (c *limitedConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { c.limit.release(c.client) })
	return err
}

// leave closes c, but its place is taken until whoever calls this has released it.
func (c *limitedConn) leave() {
	c.once.Do(func() {})
	_ = c.Conn.Close()
}

// CloseWrite sends FIN where the connection has that.
func (c *limitedConn) CloseWrite() error {
	if h, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return nil
}

// maxUnverified is the number of QUIC connections of a listener from which on new ones have to prove their address.
const maxUnverified = 500

// quicListener is to QUIC what acceptor is to TCP: it hands connections within the limits to HTTP/3 or DoQ.
//
// It takes no 0-RTT, and Accept returns a connection when its handshake is complete and its address therefore proven,
// so that nobody can use up another's connections.
type quicListener struct {
	limit     *connLimit
	excessive quic.ApplicationErrorCode // what a connection over the limit is closed with
	log       *slog.Logger
	addr      net.Addr
	ln        *quic.Listener  // set by Serve
	stop      <-chan struct{} // closed by Shutdown
	open      atomic.Int64    // connections, those in their handshake too
}

// verify says whether a client has to show that it has its address before anything is kept for it (RFC 9000, section
// 8.1.2). That costs a round trip, so it is asked for only when there are many connections.
func (l *quicListener) verify(net.Addr) bool {
	return l.open.Load() >= int64(min(l.limit.limits.Total/4, maxUnverified))
}

// admit counts connections from their first packet on.
func (l *quicListener) admit(ctx context.Context, _ *quic.ClientInfo) (context.Context, error) {
	if l.open.Add(1) > int64(l.limit.limits.Total) {
		l.open.Add(-1)
		return nil, errors.New("too many connections")
	}
	context.AfterFunc(ctx, func() { l.open.Add(-1) })
	return ctx, nil
}

// Accept implements http3.QUICListener.
func (l *quicListener) Accept(ctx context.Context) (*quic.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-l.stop:
			cancel()
		case <-ctx.Done():
		}
	})
	defer watch.Wait()
	defer cancel()
	for {
		conn, err := l.ln.Accept(ctx)
		if err != nil {
			select {
			case <-l.stop:
				return nil, quic.ErrServerClosed
			default:
				return nil, err
			}
		}
		client := addrPort(conn.RemoteAddr()).Addr()
		if l.limit.acquire(client) {
			context.AfterFunc(conn.Context(), func() { l.limit.release(client) })
			return conn, nil
		}
		l.log.Debug("connection over the limit", "client", client)
		_ = conn.CloseWithError(l.excessive, "")
	}
}

// Addr implements http3.QUICListener.
func (l *quicListener) Addr() net.Addr { return l.addr }

// Close implements http3.QUICListener.
func (l *quicListener) Close() error { return l.ln.Close() }
