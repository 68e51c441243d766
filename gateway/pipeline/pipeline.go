package pipeline

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"sync"
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
	// deadline, and soon after ctx ends, and is safe for concurrent use. The response is the caller's. An error may have a
	// method ExtendedError() (code uint16, text string) that says what to tell the client, RFC 8914, and a method Timeout()
	// bool that says whether the deadline is the reason.
	Ask(ctx context.Context, q wire.Question) (*wire.Answer, error)
}

// Observer is told about queries. Its methods are called on the hot path: they must not block or allocate.
type Observer interface {
	// Query is called once for each query that was answered, refused or dropped; lane is the query's. The RCODE means
	// nothing when the outcome is Dropped. It reports whether it wants to know how long the query took: to read the clock
	// for each hit costs more than all the rest of its counting.
	Query(t wire.Transport, lane uint8, rcode uint16, outcome Outcome) (timed bool)
	// Took is called when Query said so; d runs from the query's arrival to now.
	Took(t wire.Transport, lane uint8, outcome Outcome, d time.Duration)
	// Count is called for each event.
	Count(e Event)
}

// Event is something that happens to questions on their way upstream.
type Event uint8

// The events.
const (
	Coalesced Event = iota // a query waits for the answer to the same question of another one
	Prefetch               // a question is asked for nobody but the cache
	Shed                   // a question was given up for a newer one: see Config.Inflight
	NumEvents              // how many there are
)

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
	Stale                      // answered with what was known before, as upstreams do not answer: RFC 8767
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
	case Stale:
		return "stale"
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
	// Recovered returns when Upstream last had an answer again after it had none, in Unix nanoseconds, 0 if never: what failed
	// before that need not wait to be asked again. It is safe for concurrent use and allocates nothing. nil: nobody knows.
	Recovered func() int64
}

// StaleConfig says when answers go out whose time is over, RFC 8767. For how long the cache keeps them is its own business.
type StaleConfig struct {
	// After is for how long a client waits for upstreams, from its query's arrival, before it gets such an answer instead;
	// RFC 8767, section 5 has 1.8 s. The answer is asked for in any case, and kept when it comes. 0 means at once.
	After time.Duration
	// TTL is that of all records of such an answer, in seconds; 0 means 30, RFC 8767, section 4.
	TTL uint32
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
	// Inflight is how many exchanges may be under way at once; 0 means 10000. With more the oldest one is given up, and its
	// clients get a stale answer or SERVFAIL: a queue would only make everybody late. Queries that wait for the same answer
	// are one exchange. This is the bound on them; those of listeners are larger, and only for what is on its way here.
	Inflight int
	Stale    StaleConfig
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
	// defaultStaleTTL is from RFC 8767, section 4.
	defaultStaleTTL = 30
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
	stale    StaleConfig
	observer Observer
	log      *slog.Logger
	now      func() time.Time
	hash     func(key []byte) uint64 // the cache's, if there is one

	flights   table
	exchanges atomic.Int64 // under way
	sequence  atomic.Int64 // numbers the flights
	renewals  chan renewal

	mu      sync.RWMutex   // orders stopped and flying.Go
	stopped atomic.Bool    // nothing is begun in the background any more
	flying  sync.WaitGroup // flights on a goroutine of their own

	slips   atomic.Uint32 // limited queries over UDP
	panics  atomic.Int64  // since the last one that was logged
	panicAt atomic.Int64  // when one was logged last, Unix nanoseconds
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
	case c.Stale.After < 0:
		return nil, fmt.Errorf("stale answers after %v", c.Stale.After)
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
	if c.Stale.TTL == 0 {
		c.Stale.TTL = defaultStaleTTL
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
		stale:    c.Stale,
		observer: c.Observer,
		log:      c.Logger,
		now:      c.Now,
		hash:     hashKey,
		renewals: make(chan renewal, renewRoom),
	}
	if c.Cache != nil {
		p.hash = c.Cache.Hash
	}
	p.flights.init()
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
			p.panicked(r, q.Transport)
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
	if q.Kind != wire.Plain || p.cache == nil {
		return dst, wire.Miss
	}
	h, ok := p.find(q, q.Received, true)
	if !ok || !p.usable(q, &h) {
		return dst, wire.Miss
	}
	return p.appendHit(dst, q, &h), wire.Answered
}

// Expect is told the queries for which ServeWire is called next, all at once: with more answers in the cache than the
// processor's own caches hold, most of a hit's time goes by waiting for memory, and here that is waited for once for all of
// qs. It changes nothing but the keys that qs keep.
func (p *Pipeline) Expect(qs []wire.Query) {
	if p.cache == nil {
		return
	}
	var hashes [32]uint64
	n := 0
	for i := range qs {
		if qs[i].Kind != wire.Plain {
			continue
		}
		_, hashes[n] = p.key(&qs[i])
		if n++; n == len(hashes) {
			p.cache.Touch(hashes[:])
			n = 0
		}
	}
	p.cache.Touch(hashes[:n])
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
			p.panicked(r, q.Transport)
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
	return p.resolve(ctx, dst, q), nil
}

// Inflight returns how many exchanges are under way.
func (p *Pipeline) Inflight() int { return int(p.exchanges.Load()) }

// observe tells the observer about the end of q.
func (p *Pipeline) observe(q *wire.Query, rcode uint16, o Outcome) {
	if p.observer != nil && p.observer.Query(q.Transport, q.Lane, rcode, o) {
		p.observer.Took(q.Transport, q.Lane, o, time.Duration(p.now().UnixNano()-q.Received))
	}
}

// count tells the observer about e.
func (p *Pipeline) count(e Event) {
	if p.observer != nil {
		p.observer.Count(e)
	}
}

// panicked logs a recovered panic with its stack, and at most one in a minute: whoever found the message that causes it
// can send it again. It names no client and no question, and does not panic itself.
func (p *Pipeline) panicked(r any, t wire.Transport) {
	defer func() { _ = recover() }() // the clock or the log may be what is broken
	n := p.panics.Add(1)
	now, last := p.now().UnixNano(), p.panicAt.Load()
	if last != 0 && now-last < int64(panicLogPause) || !p.panicAt.CompareAndSwap(last, now) {
		return
	}
	p.panics.Add(-n)
	p.log.Error("panic while answering a query", "panic", fmt.Sprint(r), "transport", t.String(), "panics", n,
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
