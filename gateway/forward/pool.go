package forward

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"dnsgateway/gateway/wire"

	"github.com/AdguardTeam/dnsproxy/upstream"
	"github.com/miekg/dns"
)

const (
	// maxLinks is how many connections to a server take queries, RFC 7766, section 6.2.2: as few as will do.
	maxLinks = 2
	// maxDraining is how many more may be open because answers may still come on them.
	maxDraining = 2
	// maxConnections is how many connections may be open at once, those that are being opened included.
	maxConnections = maxLinks + maxDraining
	// maxAgain is how often a query is asked again because a connection broke that had brought answers.
	maxAgain = 64
	// spread is how many queries a connection takes before a second one is opened.
	spread = 64
	// stallAfter is how long a connection with queries in flight may bring nothing before it is replaced. Slow names
	// alone do not fill it on a busy connection, and on an idle one the price is a handshake.
	stallAfter = time.Second
	// idleAfter is how long a connection is kept without a query, RFC 9210, section 4.
	idleAfter = 30 * time.Second

	// Reconnecting backs off from minBackoff to maxBackoff. It stays below firstProbe, so that a probe is not in vain.
	minBackoff = 20 * time.Millisecond
	maxBackoff = time.Second
)

// link is one connection to a server. It is used by many goroutines at once.
type link interface {
	// ask returns the checked response to q, or an *Error, which is inside a *brokenError when the connection broke.
	ask(ctx context.Context, q *query) (*wire.Answer, error)
	vitals() *pulse
}

// brokenError says that a connection broke under a query that may be asked again.
type brokenError struct {
	err   error
	again bool // the connection was good once, so a new one may be
}

func (e *brokenError) Error() string { return e.err.Error() }
func (e *brokenError) Unwrap() error { return e.err }

// pulse is the life of a link as its pool sees it. Its lock also guards the rest of a stream link.
type pulse struct {
	mu       sync.Mutex
	kill     func(err error) // closes the connection, nil for idle; called once, without mu
	buried   func()          // called after kill; nil for nothing
	live     int             // queries in flight
	served   bool            // it has brought an answer
	proved   bool            // the pool has seen that
	waiting  bool            // something was asked since the last answer
	since    time.Time       // of waiting, and of the last answer
	used     time.Time
	idle     time.Duration
	spread   int // queries in flight from which on another connection is opened
	dead     bool
	cause    error // of dead; nil after an orderly end
	draining bool  // takes no more queries; closes when the last is answered
	timer    *time.Timer
}

// born starts the life of a link that kill closes.
func (p *pulse) born(kill func(error)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.kill, p.idle, p.spread, p.used = kill, idleAfter, spread, time.Now()
	p.timer = time.AfterFunc(p.idle, p.tick)
}

// tick closes a link that was idle long enough.
func (p *pulse) tick() {
	p.mu.Lock()
	left := p.idle - time.Since(p.used)
	switch {
	case p.dead:
	case p.live > 0:
		p.timer.Reset(p.idle)
	case left > 0:
		p.timer.Reset(left)
	default:
		p.dieLocked(nil)
		return
	}
	p.mu.Unlock()
}

// dieLocked closes the link once; p.mu is held and is released. It reports whether it was this call that closed it.
func (p *pulse) dieLocked(err error) bool {
	first := !p.dead
	if first {
		p.dead, p.cause = true, err
	}
	p.timer.Stop()
	buried := p.buried
	p.mu.Unlock()
	if first {
		p.kill(err)
		if buried != nil {
			buried()
		}
	}
	return first
}

// mourn has count called with 1 now and with -1 when the link has been closed.
func (p *pulse) mourn(count func(int)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.dead {
		p.buried = func() { count(-1) }
		count(1)
	}
}

// die closes the link because of err.
func (p *pulse) die(err error) bool {
	p.mu.Lock()
	return p.dieLocked(err)
}

// beginLocked counts a query that is going out; p.mu is held.
func (p *pulse) beginLocked(now time.Time) {
	p.live++
	p.used = now
	if !p.waiting {
		p.waiting, p.since = true, now
	}
}

// endLocked counts a query that was answered or given up; p.mu is held and is released.
func (p *pulse) endLocked(answered bool) {
	p.live--
	if answered {
		now := time.Now()
		p.served, p.waiting, p.since, p.used = true, p.live > 0, now, now
	}
	if p.live == 0 && p.draining {
		var err error
		if !answered {
			err = errStalled
		}
		p.dieLocked(err)
		return
	}
	p.mu.Unlock()
}

// begin and end are for links with a lock of their own.
func (p *pulse) begin() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dead {
		return false
	}
	p.beginLocked(time.Now())
	return true
}

func (p *pulse) end(answered bool) {
	p.mu.Lock()
	p.endLocked(answered)
}

// errStalled closes a connection that went silent.
var errStalled = &Error{Kind: KindTimeout, Err: errors.New("the connection brings no answers")}

func (p *pulse) broken(err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return &brokenError{err: err, again: p.served}
}

// pool keeps a server's connections: it dials, one at a time (a second time beside a dial that hangs), spreads the
// queries over what is open, and replaces what broke or went silent.
type pool struct {
	dial  func(ctx context.Context, spawn func(func())) (link, error)
	limit time.Duration // of a dial
	count func(int)     // told of connections opened and closed

	// life ends with close, not with a query: a connection is dialled for all who wait, and for those who come later.
	life context.Context
	end  context.CancelFunc
	wg   sync.WaitGroup // dials, and what links start through spawn

	mu       sync.Mutex
	links    []link
	draining []link
	closing  int           // how many connections are about to be closed
	grown    chan struct{} // closed, and replaced, when a link is added, or closing is over
	dialing  *dialing      // the newest dial under way, for which queries wait
	dials    int           // how many are under way
	failures int           // in a row; a link that brings its first answer ends the row
	retry    time.Time
	lastErr  error
	closed   bool
}

// dialing is a dial under way. err is set before done is closed.
type dialing struct {
	start time.Time
	done  chan struct{}
	err   error
}

func newPool(env environment, dial func(context.Context, func(func())) (link, error)) *pool {
	p := &pool{dial: dial, limit: env.timeout, count: env.count, grown: make(chan struct{})}
	if p.count == nil {
		p.count = func(int) {}
	}
	p.life, p.end = context.WithCancel(context.Background())
	return p
}

// ask sends q over one of the connections. When that breaks, and had been good before, q is asked once more over
// another: and again, because there are servers that close a connection after each answer.
func (p *pool) ask(ctx context.Context, q *query) (*wire.Answer, error) {
	for left := maxAgain; ; left-- {
		l, err := p.get(ctx)
		if err != nil {
			return nil, err
		}
		resp, err := l.ask(ctx, q)
		if err == nil {
			return resp, nil
		}
		var b *brokenError
		if !errors.As(err, &b) {
			return nil, err
		}
		if left == 0 || !b.again || ctx.Err() != nil {
			return nil, b.err
		}
	}
}

// start sends c over one of the connections if one that can take it is open, and reports whether it did.
func (p *pool) start(c *call) bool {
	l, _, _, err := p.pick(c.start)
	if err != nil {
		return false
	}
	s, ok := l.(*streamLink)
	return ok && s.start(c) == nil
}

// get returns a connection, and waits for one if none is open.
func (p *pool) get(ctx context.Context) (link, error) {
	for {
		l, d, grown, err := p.pick(time.Now())
		if l != nil || err != nil {
			return l, err
		}
		var done chan struct{}
		if d != nil {
			done = d.done
		}
		select {
		case <-done:
			if d.err != nil {
				return nil, d.err
			}
		case <-grown: // perhaps by another dial, beside one that hangs
		case <-ctx.Done():
			return nil, classify(KindConnect, "waiting for a connection", ctx.Err())
		}
	}
}

// pick returns the least busy connection, or what to wait for: the dial, or that there is a new connection. It starts a
// dial when there is need of one and none is under way.
func (p *pool) pick(now time.Time) (best link, d *dialing, grown <-chan struct{}, err error) {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil, nil, nil, errClosed
	}
	best, load, doomed := p.sweep(now)
	if len(doomed) > 0 {
		p.bury(doomed)
		return p.pick(now)
	}
	// A dial that hangs shall not keep out one that might succeed now.
	free := p.dialing == nil || p.dials < maxLinks && now.Sub(p.dialing.start) > stallAfter
	if free && (best == nil || load >= best.vitals().spread && len(p.links) < maxLinks) {
		full := len(p.links)+len(p.draining)+p.dials+p.closing >= maxConnections
		switch {
		case full && best == nil && len(p.draining) > 0 && p.closing == 0:
			// What may still come over the oldest is worth less than a connection that works. It is closed before.
			oldest := p.draining[0]
			p.draining = slices.Clone(p.draining[1:])
			p.bury([]link{oldest})
			return p.pick(now)
		case full:
		case !now.Before(p.retry):
			p.startDial(now)
		case best == nil && p.dialing == nil:
			err = &Error{Kind: KindBackoff, Err: fmt.Errorf("too soon to try again after: %w", p.lastErr), retry: p.retry}
		}
	}
	d, grown = p.dialing, p.grown
	p.mu.Unlock()
	if best != nil {
		return best, nil, nil, nil
	}
	return nil, d, grown, err
}

// bury closes links that went silent. p.mu is held and is released: closing may take a moment. Until then they count.
func (p *pool) bury(doomed []link) {
	p.closing += len(doomed)
	p.mu.Unlock()
	for _, l := range doomed {
		l.vitals().die(errStalled)
	}
	p.mu.Lock()
	p.closing -= len(doomed)
	close(p.grown)
	p.grown = make(chan struct{})
	p.mu.Unlock()
}

// renewer is a client with connections that can be replaced.
type renewer interface {
	// renew sets aside the connections on which answers are waited for and nothing has come for so long, so that the next
	// query gets a new one. It reports whether there were such.
	renew(quiet time.Duration) bool
}

func (p *pool) renew(quiet time.Duration) (any bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for _, l := range p.links {
		v := l.vitals()
		v.mu.Lock()
		if v.waiting && now.Sub(v.since) >= quiet {
			v.draining, any = true, true // sweep does the rest
		}
		v.mu.Unlock()
	}
	return any
}

// sweep forgets dead connections and sets aside those that went silent. It returns the least busy one, its load, and
// those that have to be closed because too many are set aside. p.mu is held.
func (p *pool) sweep(now time.Time) (best link, load int, doomed []link) {
	links := p.links[:0]
	for _, l := range p.links {
		v := l.vitals()
		v.mu.Lock()
		dead, failed, cause := v.dead, v.dead && !v.served && v.cause != nil, v.cause
		if v.served && !v.proved {
			// Once for each link: a server that refuses only the second one is still not dialled all the time.
			v.proved, p.failures = true, 0
		}
		if v.waiting && now.Sub(v.since) > stallAfter {
			v.draining = true
		}
		live, draining := v.live, v.draining
		v.mu.Unlock()
		switch {
		case failed:
			p.failed(now, cause)
		case dead:
		case draining && live == 0:
			doomed = append(doomed, l)
		case draining:
			p.draining = append(p.draining, l)
		default:
			links = append(links, l)
			if best == nil || live < load {
				best, load = l, live
			}
		}
	}
	clear(p.links[len(links):])
	p.links = links
	if len(p.draining) > 0 {
		p.draining = slices.DeleteFunc(p.draining, func(l link) bool {
			v := l.vitals()
			v.mu.Lock()
			defer v.mu.Unlock()
			return v.dead
		})
		if n := len(p.draining) - maxDraining; n > 0 {
			doomed = append(doomed, p.draining[:n]...)
			p.draining = slices.Clone(p.draining[n:])
		}
	}
	return best, load, doomed
}

// failed makes the next dial wait; p.mu is held.
func (p *pool) failed(now time.Time, err error) {
	d := min(maxBackoff, minBackoff<<min(p.failures, 10))
	p.failures++
	p.retry = now.Add(time.Duration(float64(d) * (0.5 + rand.Float64()/2)))
	p.lastErr = err
}

// startDial opens a connection in the background; p.mu is held.
func (p *pool) startDial(now time.Time) {
	d := &dialing{start: now, done: make(chan struct{})}
	p.dialing = d
	p.dials++
	p.wg.Go(func() {
		ctx, cancel := context.WithTimeout(p.life, p.limit)
		l, err := p.dial(ctx, p.wg.Go)
		cancel()
		p.mu.Lock()
		p.dials--
		if p.dialing == d {
			p.dialing = nil
		}
		closed := p.closed
		switch {
		case err != nil:
			p.failed(time.Now(), err)
		case !closed:
			l.vitals().mourn(p.count)
			p.links = append(p.links, l)
			close(p.grown)
			p.grown = make(chan struct{})
		}
		if closed {
			d.err = errClosed
		} else {
			d.err = err
		}
		p.mu.Unlock()
		if closed && err == nil {
			l.vitals().die(errClosed)
		}
		close(d.done)
	})
}

// close closes all connections and waits for what belongs to them.
func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	links := append(p.links, p.draining...)
	p.links, p.draining = nil, nil
	p.mu.Unlock()
	p.end()
	for _, l := range links {
		l.vitals().die(errClosed)
	}
	p.wg.Wait()
}

// identity is the part that all clients have in common.
type identity struct {
	url     string
	timeout time.Duration
}

// Address implements [upstream.Upstream].
func (i identity) Address() string { return i.url }

// exchange is Upstream.Exchange with a context for any client.
func exchange(ctx context.Context, c client, req *dns.Msg) (*dns.Msg, error) {
	q, err := queryOf(req)
	if err != nil {
		return nil, err
	}
	a, err := c.ask(ctx, q)
	if err != nil {
		return nil, err
	}
	return messageOf(a, req)
}

// exchangeWithin is Upstream.Exchange for any client.
func exchangeWithin(timeout time.Duration, c client, req *dns.Msg) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return exchange(ctx, c, req)
}

// poolClient is the client of every transport with connections.
type poolClient struct {
	identity
	*pool
	streams bool // its links are streams, so that pool.start works
}

var _ upstream.Upstream = (*poolClient)(nil)

// Exchange implements [upstream.Upstream].
func (c *poolClient) Exchange(req *dns.Msg) (*dns.Msg, error) {
	return exchangeWithin(c.timeout, c, req)
}

// ExchangeContext is Exchange that ends with ctx.
func (c *poolClient) ExchangeContext(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
	return exchange(ctx, c, req)
}

// Close implements [upstream.Upstream].
func (c *poolClient) Close() error {
	c.close()
	return nil
}
