// Package listen owns the sockets that clients talk to: [Packet] (plain UDP), [Stream] (TCP and DoT), [HTTPS] (DoH over
// HTTP/1.1, HTTP/2 and HTTP/3) and [QUIC] (DoQ).
//
// It does framing, buffers, connection limits and the drain, and leaves everything that a message means to its
// [Handler]: each transport fills the first fields of a [wire.Query], parses the bytes, calls Expect where several came at
// once, then ServeWire, and after a miss Resolve. Padding, truncation and EDNS options are the Handler's work, so that
// policy exists once.
//
// What surprises a newcomer: ServeWire runs on the goroutine that read the query, because it never waits; only misses
// get a goroutine of their own. (HTTP/1.1, HTTP/3 and [QUIC] have one per request anyway; HTTP/2 is our own.) And constructors
// bind but start nothing: clients wait in the kernel until Serve.
package listen

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"dnsgateway/gateway/wire"
)

// Handler answers queries. Its methods may be called from many goroutines at once.
type Handler interface {
	// Expect is told queries that came in together, before ServeWire is called for them one after the other: what has to be
	// fetched from memory for each can be fetched for all at once. It may set nothing of them but what belongs to the
	// Handler, and never waits for I/O. Not all queries are expected.
	Expect(qs []wire.Query)
	// ServeWire answers q if it can do so at once and appends the response to dst. It never waits for I/O. The result
	// is dst with or without a response behind it; q and its bytes are not used after the return.
	ServeWire(dst []byte, q *wire.Query) ([]byte, wire.Verdict)
	// Resolve answers q after a wire.Miss and appends the response to dst. It returns an error only when nothing may
	// be sent, and has to return soon after ctx is done. q and its bytes are not used after the return.
	Resolve(ctx context.Context, dst []byte, q *wire.Query) ([]byte, error)
}

// Server is one bound listener.
type Server interface {
	// Serve reads queries and answers them until Shutdown, and returns nil then. It is called at most once. When it
	// has returned, every goroutine that the listener started has ended.
	Serve() error
	// Shutdown stops taking queries, lets those in flight finish until ctx is done, and closes the sockets. It returns
	// ctx's error if something had to be cut off. It may be called before or without Serve, and more than once.
	Shutdown(ctx context.Context) error
	// Addr returns the bound address, with the port that the system chose if the configured one was 0.
	Addr() net.Addr
	// Name returns the name from the configuration.
	Name() string
}

var (
	_ Server = (*Packet)(nil)
	_ Server = (*Stream)(nil)
	_ Server = (*HTTPS)(nil)
	_ Server = (*QUIC)(nil)
)

// Common is what every listener has to know.
type Common struct {
	Handler Handler
	Name    string         // the listener's name in the file, or its URL
	Addr    netip.AddrPort // the unspecified IPv6 address means both families
	Logger  *slog.Logger   // nil discards
}

// Limits bound what connections can hold. The zero value of a field means its default.
type Limits struct {
	PerClient int           // connections of one client prefix; 0 means no limit
	PrefixV4  int           // bits that make one IPv4 client; 32 by default
	PrefixV6  int           // bits that make one IPv6 client; 56 by default
	Total     int           // connections of all clients; 10000 by default
	Idle      time.Duration // a connection with nothing in flight is closed after this time; 10 s by default
}

const (
	defaultTotal = 10000
	defaultIdle  = 10 * time.Second
	// writeTimeout bounds one write to a client that does not read.
	writeTimeout = 10 * time.Second
	// drainRead is how long Shutdown goes on reading, so that queries which the kernel has already taken are answered.
	drainRead = 20 * time.Millisecond
	// linger is how long a connection that we close may take to read what was sent: closing a TCP socket with unread
	// bytes resets it (RFC 9293, section 3.6.1), and quic-go drops what it has not sent yet.
	linger = 250 * time.Millisecond
	// lingerMost is how many octets that nobody needs are read of such a connection, because a client may look for what was
	// sent only when it has said everything.
	lingerMost = 1 << 20
	// keepBuffer is the largest buffer that goes back into a pool, so that one giant answer is not kept for ever.
	keepBuffer = 16 << 10
)

func (l Limits) withDefaults() Limits {
	if l.PrefixV4 == 0 {
		l.PrefixV4 = 32
	}
	if l.PrefixV6 == 0 {
		l.PrefixV6 = 56
	}
	if l.Total == 0 {
		l.Total = defaultTotal
	}
	if l.Idle == 0 {
		l.Idle = defaultIdle
	}
	return l
}

func (l Limits) check() error {
	if l.PerClient < 0 || l.Total < 0 || l.Idle < 0 ||
		l.PrefixV4 < 0 || l.PrefixV4 > 32 || l.PrefixV6 < 0 || l.PrefixV6 > 128 {
		return fmt.Errorf("connection limits out of range: %+v", l)
	}
	return nil
}

// check fills in the logger and refuses what cannot work.
func (c *Common) check() error {
	if c.Handler == nil {
		return errors.New("listener without a handler")
	}
	if !c.Addr.IsValid() {
		return fmt.Errorf("listener %q: invalid address", c.Name)
	}
	c.Addr = netip.AddrPortFrom(c.Addr.Addr().Unmap(), c.Addr.Port())
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.Logger = c.Logger.With("listener", c.Name)
	return nil
}

// serveWire is Handler.ServeWire for whom a panic of the Handler, a bug of ours, costs one query and not the process.
func (c *Common) serveWire(dst []byte, q *wire.Query) (out []byte, verdict wire.Verdict) {
	defer func() {
		if r := recover(); r != nil {
			c.logPanic(r)
			out, verdict = dst, wire.Dropped
		}
	}()
	return c.Handler.ServeWire(dst, q)
}

// expect is Handler.Expect where that can gain something. A panic costs nothing.
func (c *Common) expect(qs []wire.Query) {
	if len(qs) < 2 {
		return
	}
	defer func() {
		if r := recover(); r != nil {
			c.logPanic(r)
		}
	}()
	c.Handler.Expect(qs)
}

// resolve is Handler.Resolve for whom a panic is an error.
func (c *Common) resolve(ctx context.Context, dst []byte, q *wire.Query) (out []byte, err error) {
	defer func() {
		if r := recover(); r != nil {
			c.logPanic(r)
			out, err = dst, errPanic
		}
	}()
	return c.Handler.Resolve(ctx, dst, q)
}

var errPanic = errors.New("panic while answering a query")

func (c *Common) logPanic(r any) {
	c.Logger.Error("panic while answering a query", "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
}

// BindError says which socket could not be bound.
type BindError struct {
	Network string // "udp" or "tcp"
	Addr    netip.AddrPort
	Err     error
}

// Error implements error.
func (e *BindError) Error() string { return fmt.Sprintf("binding %s %v: %v", e.Network, e.Addr, e.Err) }

// Unwrap returns the system's error, so that errors.Is(err, syscall.EADDRINUSE) works.
func (e *BindError) Unwrap() error { return e.Err }

// target returns what to give to package net for addr: "tcp4" and "udp4" for IPv4 addresses, because package net takes
// 0.0.0.0 with "tcp" as both families; "tcp" and "udp" with no host for [::], which is both families, and IPv4 alone on
// a machine without IPv6; and "tcp6" and "udp6" for other IPv6 addresses.
func target(network string, addr netip.AddrPort) (string, string) {
	switch {
	case addr.Addr().Is4():
		return network + "4", addr.String()
	case addr.Addr() == netip.IPv6Unspecified():
		return network, ":" + strconv.Itoa(int(addr.Port()))
	}
	return network + "6", addr.String()
}

func bindTCP(ctx context.Context, addr netip.AddrPort) (net.Listener, error) {
	network, host := target("tcp", addr)
	ln, err := new(net.ListenConfig).Listen(ctx, network, host)
	if err != nil {
		return nil, &BindError{Network: "tcp", Addr: addr, Err: err}
	}
	return ln, nil
}

// bindUDP binds with large socket buffers: a burst waits in the kernel instead of being lost. The system may give less.
func bindUDP(ctx context.Context, addr netip.AddrPort) (*net.UDPConn, error) {
	return listenUDP(ctx, new(net.ListenConfig), addr)
}

func listenUDP(ctx context.Context, lc *net.ListenConfig, addr netip.AddrPort) (*net.UDPConn, error) {
	network, host := target("udp", addr)
	pc, err := lc.ListenPacket(ctx, network, host)
	if err != nil {
		return nil, &BindError{Network: "udp", Addr: addr, Err: err}
	}
	conn := pc.(*net.UDPConn)
	_ = conn.SetReadBuffer(socketBuffer)
	_ = conn.SetWriteBuffer(socketBuffer)
	return conn, nil
}

// socketBuffer is what we ask for in octets: a second of 10,000 queries at the kernel's truesize of about 768 octets a
// small datagram is 7 MB; half of that is a burst. Linux caps it at net.core.rmem_max.
const socketBuffer = 4 << 20

// addrPort returns a's address unmapped.
func addrPort(a net.Addr) netip.AddrPort {
	var ap netip.AddrPort
	switch a := a.(type) {
	case *net.TCPAddr:
		ap = a.AddrPort()
	case *net.UDPAddr:
		ap = a.AddrPort()
	}
	return unmap(ap)
}

func unmap(ap netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()) }

// life is the course that every listener takes: Serve at most once, Shutdown any number of times.
type life struct {
	// ctx is what Resolve gets. It is not a call's context but the listener's: it ends when Shutdown has lost patience,
	// and not when one client goes away, because other clients may wait for the same answer.
	ctx    context.Context
	cancel context.CancelFunc

	mu       sync.Mutex
	serving  bool
	stopping bool
	stop     chan struct{} // closed by the first Shutdown
	done     chan struct{} // closed when Serve has ended, or instead of it
}

func (l *life) init() {
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.stop, l.done = make(chan struct{}), make(chan struct{})
}

// begin is the first thing in Serve; false means that Shutdown came first.
func (l *life) begin() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopping || l.serving {
		return false
	}
	l.serving = true
	return true
}

// end is the last thing in Serve.
func (l *life) end() {
	l.cancel()
	close(l.done)
}

// halt marks the listener as stopping. first is true for one caller only; serving tells whether Serve will end by
// itself, or never began, and then there is nothing to wait for.
func (l *life) halt() (first, serving bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	first = !l.stopping
	if first {
		l.stopping = true
		close(l.stop)
		if !l.serving {
			l.cancel()
			close(l.done)
		}
	}
	return first, l.serving
}

func (l *life) halted() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stopping
}

// wait returns nil when Serve has ended, or ctx's error, having cancelled what is in flight and called force.
func (l *life) wait(ctx context.Context, force func()) error {
	select {
	case <-l.done:
		return nil
	case <-ctx.Done():
	}
	select {
	case <-l.done: // both: nothing was cut off
		return nil
	default:
	}
	l.cancel()
	force()
	return ctx.Err()
}

// backoff paces a loop whose socket fails for a while (EMFILE, ENOBUFS, ...).
type backoff struct {
	longest time.Duration
	delay   time.Duration
	warned  time.Time
}

// warnEvery is how often a failing socket is worth a warning.
const warnEvery = time.Minute

// pause waits a little longer each time, until stop is closed. It warns when the pauses have become long.
func (b *backoff) pause(stop <-chan struct{}, log *slog.Logger, msg string, err error) {
	b.delay = min(max(2*b.delay, time.Millisecond), b.longest)
	if now := time.Now(); b.delay == b.longest && now.Sub(b.warned) >= warnEvery {
		b.warned = now
		log.Warn(msg, "err", err)
	} else {
		log.Debug(msg, "err", err)
	}
	t := time.NewTimer(b.delay)
	defer t.Stop()
	select {
	case <-t.C:
	case <-stop:
	}
}

func (b *backoff) reset() { b.delay = 0 }

// flight counts what is being answered, for transports whose goroutines belong to a library.
type flight struct {
	mu    sync.Mutex
	n     int
	empty chan struct{} // non-nil while someone waits for n to be 0
}

func (f *flight) enter() {
	f.mu.Lock()
	f.n++
	f.mu.Unlock()
}

func (f *flight) leave() {
	f.mu.Lock()
	if f.n--; f.n == 0 && f.empty != nil {
		close(f.empty)
		f.empty = nil
	}
	f.mu.Unlock()
}

// wait returns a channel that is closed at the next moment with nothing in flight.
func (f *flight) wait() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.n == 0 {
		c := make(chan struct{})
		close(c)
		return c
	}
	if f.empty == nil {
		f.empty = make(chan struct{})
	}
	return f.empty
}
