package pipeline

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"time"

	"dnsgateway/gateway/access"
	"dnsgateway/gateway/cache"
	"dnsgateway/gateway/route"
	"dnsgateway/gateway/wire"

	"github.com/miekg/dns"
)

// Exchanger is an upstream group.
type Exchanger interface {
	// Ask returns a response to q, of which it keeps nothing, or an error only if no server gave one. It returns by its own
	// deadline and is safe for concurrent use. The response is the caller's. An error may have a method ExtendedError()
	// (code uint16, text string) that says what to tell the client, RFC 8914.
	Ask(ctx context.Context, q wire.Question) (*wire.Answer, error)
}

// Observer is told about queries. Its method is called on the hot path: it must not block or allocate.
type Observer interface {
	// Query is called once for each query that was answered, refused or dropped. The RCODE means nothing when the
	// outcome is Dropped; d runs from the query's arrival to now.
	Query(t wire.Transport, rcode uint16, outcome Outcome, d time.Duration)
}

// Outcome says how a query ended.
type Outcome uint8

// The outcomes.
const (
	Hit         Outcome = iota // answered from the cache
	Miss                       // an upstream gave the answer, or none did
	Local                      // the gateway's own answer or error
	Refused                    // not allowed, and told so
	Dropped                    // no response: junk, not allowed, or over its rate
	Limited                    // over its rate, and told so
	NumOutcomes                // how many there are
)

// String returns the outcome's name as it stands in metrics and logs.
func (o Outcome) String() string {
	switch o {
	case Hit:
		return "hit"
	case Miss:
		return "miss"
	case Local:
		return "local"
	case Refused:
		return "refused"
	case Dropped:
		return "dropped"
	case Limited:
		return "limited"
	}
	return "unknown"
}

// Group is an upstream group with what the pipeline has to know of it.
type Group struct {
	Name     string // for the log
	Upstream Exchanger
	// TrustAD says that the AD bit of upstream's responses may be believed: its servers are authenticated, and validate
	// (RFC 4035, section 4.9.3). Without it AD is never set.
	TrustAD bool
}

// Config is what [New] needs. Access and a group have to be there.
type Config struct {
	Access *access.Control
	Cache  *cache.Cache // nil: off
	View   uint32       // stands in every cache key for whatever may change answers
	// Groups are the upstream groups. Routes says by the question's name which of them is asked, by its index, whatever the
	// type and the class; the first one gets the questions that Routes, which may be nil, does not match. Cached answers are
	// found without asking Routes: View has to be another one when Routes or what a group may answer is.
	Groups []Group
	Routes *route.Table
	// Chaos maps class CH names ("version.bind") to the text that they are answered with; all others are refused.
	Chaos map[string]string
	// Shape is what all responses have in common; UDPSize is 1232 and PadBlock 468 when they are 0.
	Shape wire.Shape
	// Inflight is how many exchanges may be under way at once; 0 means 10000. More are answered with SERVFAIL, at once:
	// a queue would only make everybody late. This is the bound on them; those of listeners are larger, and only for what is on its way here.
	Inflight int
	Observer Observer         // nil: none
	Logger   *slog.Logger     // nil: discard
	Now      func() time.Time // nil: time.Now
}

const (
	// defaultUDPSize avoids fragmentation on IPv6 paths; see https://dnsflagday.net/2020/.
	defaultUDPSize = 1232
	// defaultPadBlock is the block length of padded responses, RFC 8467, section 4.1.
	defaultPadBlock = 468
	defaultInflight = 10000
	// panicLogPause keeps a panic that anyone can cause again from flooding the log.
	panicLogPause = time.Minute
)

// Extended DNS errors of the gateway's own, RFC 8914, section 4. They carry no text where the code says it all: every
// octet more than the query had is an octet for who forges source addresses.
var (
	edeProhibited   = wire.EDE{Code: dns.ExtendedErrorCodeProhibited}
	edeNotSupported = wire.EDE{Code: dns.ExtendedErrorCodeNotSupported}
	// No code says "too many queries". 18 (Prohibited) is for clients that are not authorized, and this one is; so it
	// is 0 (Other), which should bring a text, RFC 8914, section 4.1.
	edeLimited = wire.EDE{Code: dns.ExtendedErrorCodeOther, Text: "query rate limit exceeded"}
	// 14 (Not Ready) is for a server that is not fully functional yet; a busy one is. So again 0 (Other) and a text.
	edeOverload = wire.EDE{Code: dns.ExtendedErrorCodeOther, Text: "too many queries in flight"}
	edeInternal = wire.EDE{Code: dns.ExtendedErrorCodeOther, Text: "internal error"}
	// For all types that should not be asked for, RFC 9824, section 3.5.
	edeInvalidType = wire.EDE{Code: dns.ExtendedErrorCodeInvalidQueryType}
)

// Pipeline answers queries. It is safe for concurrent use.
type Pipeline struct {
	access   *access.Control
	cache    *cache.Cache
	view     uint32
	groups   []Group
	routes   *route.Table
	chaos    map[string]*wire.Answer // by lower-case QNAME in wire form
	shape    wire.Shape
	inflight int64
	observer Observer
	log      *slog.Logger
	now      func() time.Time

	exchanges atomic.Int64  // under way
	slips     atomic.Uint32 // limited queries over UDP
	panics    atomic.Int64  // since the last one that was logged
	panicAt   atomic.Int64  // when one was logged last, Unix nanoseconds
}

// New checks c and builds a Pipeline. It starts nothing.
func New(c Config) (*Pipeline, error) {
	switch {
	case c.Access == nil:
		return nil, errors.New("no access control")
	case len(c.Groups) == 0 || slices.ContainsFunc(c.Groups, func(g Group) bool { return g.Upstream == nil }):
		return nil, errors.New("no upstream")
	case c.Routes.Groups() > len(c.Groups):
		return nil, fmt.Errorf("a route to group %d of %d", c.Routes.Groups()-1, len(c.Groups))
	case c.Inflight < 0:
		return nil, fmt.Errorf("a bound of %d exchanges", c.Inflight)
	}
	if c.Inflight == 0 {
		c.Inflight = defaultInflight
	}
	if c.Shape.UDPSize == 0 {
		c.Shape.UDPSize = defaultUDPSize
	}
	if c.Shape.PadBlock == 0 {
		c.Shape.PadBlock = defaultPadBlock
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	p := &Pipeline{
		access:   c.Access,
		cache:    c.Cache,
		view:     c.View,
		groups:   slices.Clone(c.Groups),
		routes:   c.Routes,
		shape:    c.Shape,
		inflight: int64(c.Inflight),
		observer: c.Observer,
		log:      c.Logger,
		now:      c.Now,
	}
	var err error
	if p.chaos, err = chaosAnswers(c.Chaos); err != nil {
		return nil, err
	}
	return p, nil
}

// ServeWire answers q, which has been parsed, from the cache, or refuses or drops it, appending the response to dst. It
// never waits for I/O and never allocates when dst has room. When it says Miss it appended nothing, and the caller calls
// Resolve with the same q. The listener has set q.Client, q.Transport and q.Received, by the clock that [Config].Now is;
// dst must not overlap q.Raw.
func (p *Pipeline) ServeWire(dst []byte, q *wire.Query) (out []byte, v wire.Verdict) {
	n := len(dst)
	defer func() {
		if r := recover(); r != nil {
			p.panicked(r, q)
			out, v = dst[:n], wire.Dropped
		}
	}()
	if q.Kind == wire.Junk && q.Fault == wire.RcodeSuccess {
		// Before admission, so that forged responses take no token from the client whose address they bear.
		p.observe(q, wire.RcodeSuccess, Dropped)
		return dst, wire.Dropped
	}
	if d := p.access.Admit(q.Client.Addr(), q.Transport.Encrypted(), q.Received); d != access.Allowed {
		return p.turnAway(dst, q, d)
	}
	if q.Fault != wire.RcodeSuccess {
		dst = p.shape.AppendError(dst, q, q.Fault)
		p.observe(q, q.Fault, Local)
		return dst, wire.Answered
	}
	if q.Kind != wire.Plain {
		return dst, wire.Miss
	}
	dst, ok := p.lookup(dst, q)
	if !ok {
		return dst, wire.Miss
	}
	return dst, wire.Answered
}

// turnAway answers or drops a query that access did not allow.
func (p *Pipeline) turnAway(dst []byte, q *wire.Query, d access.Decision) ([]byte, wire.Verdict) {
	switch {
	case d == access.Refused:
		dst = p.shape.AppendError(dst, q, wire.RcodeRefused, edeProhibited)
		p.observe(q, wire.RcodeRefused, Refused)
		return dst, wire.Answered
	case d == access.Limited && q.Transport != wire.UDP:
		dst = p.shape.AppendError(dst, q, wire.RcodeRefused, edeLimited)
		p.observe(q, wire.RcodeRefused, Limited)
		return dst, wire.Answered
	case d == access.Limited && q.Fault == wire.RcodeSuccess && p.slips.Add(1)%2 == 1:
		// Every second one is told to come back over TCP: a real client can, a forged address cannot. The answer is no
		// longer than the query, and half of the time there is none, so a flood grows weaker by it.
		dst = p.shape.AppendTruncated(dst, q)
		p.observe(q, wire.RcodeSuccess, Limited)
		return dst, wire.Answered
	}
	p.observe(q, wire.RcodeSuccess, Dropped)
	return dst, wire.Dropped
}

// lookup appends the cached answer for q, which has a sound IN question, if there is one.
func (p *Pipeline) lookup(dst []byte, q *wire.Query) ([]byte, bool) {
	if p.cache == nil {
		return dst, false
	}
	key := q.Key(p.view)
	f, ok := p.cache.Get(key, p.cache.Hash(key), q.Received)
	if !ok || f.Stale {
		return dst, false
	}
	dst = p.shape.AppendAnswer(dst, q, f.Answer, f.Age)
	p.observe(q, f.Answer.Rcode, Hit)
	return dst, true
}

// What Resolve returns when no response may be sent, or none could be made.
var (
	errNoAnswer = errors.New("not a query: no response may be sent")
	errPanic    = errors.New("panic while answering a query")
)

// Resolve answers q, for which ServeWire said Miss, by itself or by way of the upstream group, appending the response to
// dst. What may be kept goes into the cache. An error means that nothing may be sent; the lack of an answer from
// upstream is not one, but a SERVFAIL that says why.
func (p *Pipeline) Resolve(ctx context.Context, dst []byte, q *wire.Query) (out []byte, err error) {
	n := len(dst)
	defer func() {
		if r := recover(); r != nil {
			p.panicked(r, q)
			out, err = p.afterPanic(dst[:n], q)
		}
	}()
	switch {
	case q.Fault != wire.RcodeSuccess:
		// Not reached by who keeps to the contract, and no fault is ever forwarded for who does not.
		dst = p.shape.AppendError(dst, q, q.Fault)
		p.observe(q, q.Fault, Local)
		return dst, nil
	case q.Kind == wire.Junk:
		p.observe(q, wire.RcodeSuccess, Dropped)
		return dst, errNoAnswer
	}
	if a, ok := p.own(q); ok {
		return p.appendOwn(dst, q, a), nil
	}
	if q.Kind != wire.Plain && q.Qclass == wire.ClassIN {
		if dst, ok := p.lookup(dst, q); ok {
			return dst, nil
		}
	}
	if p.exchanges.Add(1) > p.inflight {
		p.exchanges.Add(-1)
		return p.appendOwn(dst, q, ownAnswer{rcode: wire.RcodeServFail, ede: &edeOverload}), nil
	}
	a, failure := p.exchange(ctx, q)
	if a == nil {
		dst = p.shape.AppendError(dst, q, wire.RcodeServFail, failure)
		p.observe(q, wire.RcodeServFail, Miss)
		return dst, nil
	}
	if p.cache != nil && q.Qclass == wire.ClassIN {
		// The key has no class. What comes back is what a hit would be sent: its TTLs are within the cache's bounds.
		key := q.Key(p.view)
		a = p.cache.Put(key, p.cache.Hash(key), a, p.now().UnixNano())
	}
	dst = p.shape.AppendAnswer(dst, q, a, 0)
	p.observe(q, a.Rcode, Miss)
	return dst, nil
}

// Inflight returns how many exchanges are under way.
func (p *Pipeline) Inflight() int { return int(p.exchanges.Load()) }

// observe tells the observer about the end of q.
func (p *Pipeline) observe(q *wire.Query, rcode uint16, o Outcome) {
	if p.observer != nil {
		p.observer.Query(q.Transport, rcode, o, time.Duration(p.now().UnixNano()-q.Received))
	}
}

// panicked logs a recovered panic with its stack, and at most one in a minute: whoever found the message that causes it
// can send it again. It names no client and no question, and does not panic itself.
func (p *Pipeline) panicked(r any, q *wire.Query) {
	defer func() { _ = recover() }() // the clock or the log may be what is broken
	n := p.panics.Add(1)
	now, last := p.now().UnixNano(), p.panicAt.Load()
	if last != 0 && now-last < int64(panicLogPause) || !p.panicAt.CompareAndSwap(last, now) {
		return
	}
	p.panics.Add(-n)
	p.log.Error("panic while answering a query", "panic", fmt.Sprint(r), "transport", q.Transport.String(), "panics", n,
		"stack", string(debug.Stack()))
}

// afterPanic appends SERVFAIL. If even that panics there is no answer.
func (p *Pipeline) afterPanic(dst []byte, q *wire.Query) (out []byte, err error) {
	defer func() {
		if r := recover(); r != nil {
			out, err = dst, errPanic
		}
	}()
	out = p.shape.AppendError(dst, q, wire.RcodeServFail, edeInternal)
	p.observe(q, wire.RcodeServFail, Local)
	return out, nil
}
