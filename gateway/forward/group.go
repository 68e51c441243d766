package forward

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"dnsgateway/gateway/wire"

	"github.com/AdguardTeam/dnsproxy/upstream"
	"github.com/miekg/dns"
)

// Server says where an upstream server is and how to know that it is the right one.
type Server struct {
	URL        string           // as written: its name in messages, metrics and Status
	Scheme     string           // tls, https, h3, quic, udp, tcp, sdns, or discover: what the resolver at Host designates
	Host       string           // a host name or an IP address; empty for sdns
	Port       uint16           // 0 means the scheme's own
	Path       string           // https and h3; "" means /dns-query
	VerifyName string           // the name in SNI, :authority and the certificate; "" means Host
	Roots      *x509.CertPool   // nil means the system's
	Pins       [][32]byte       // SHA-256 of SubjectPublicKeyInfo; one has to match besides the name and the roots
	ClientCert *tls.Certificate // nil means none

	tbsHashes [][]byte     // a DNS stamp's: SHA-256 of a certificate's signed part
	addrs     []netip.Addr // a designated resolver's: Host is then not looked up
}

// NextOn is the set of outcomes that move a question on to the next server.
type NextOn struct {
	Timeout  bool // no answer in time
	Connect  bool // every other way to get no answer: refused, TLS, broken, wrong or malformed
	ServFail bool // RCODE 2
	Refused  bool // RCODE 5
}

// The picks: how a server is chosen inside a tier.
const (
	PickFastest = "fastest"  // the better of two taken at random, by latency and queries in flight
	PickRandom  = "random"   // any
	PickInOrder = "in-order" // as written
	PickRace    = "race"     // all at once, the first good answer wins
	PickSticky  = "sticky"   // by name, so that each server sees only some of the names
)

// DefaultDeadline is the time for one question over all tiers.
const DefaultDeadline = 3 * time.Second

// Config is what a [Group] is made of.
type Config struct {
	Name      string
	Tiers     [][]Server    // top to bottom
	Pick      string        // "" means PickFastest
	NextOn    NextOn        // the zero value means all of them
	Deadline  time.Duration // 0 means DefaultDeadline
	Hedge     Hedge
	Breaker   Breaker
	Previous  *Group       // the group that this one replaces: what it knows of servers that stay is taken over; nil for none
	Bootstrap []Server     // servers by address that resolve the host names in Tiers, in order
	Logger    *slog.Logger // nil means none
	Observer  Observer     // nil means none
}

// Observer counts what was asked of each server.
type Observer interface {
	// Server is called once for each server when a Group is made.
	Server(group, server string) ServerObserver
}

// ServerObserver counts one server's exchanges. It is called by many goroutines at once.
type ServerObserver interface {
	// Done reports one exchange that took d. The rcode is the response's, or -1 when there is none; kind is then one of
	// the Kind constants, else "".
	Done(d time.Duration, rcode int, kind string)
	// Hedge reports that the server is asked because another one is late.
	Hedge()
	// HedgeWon reports that the answer to such a query came first.
	HedgeWon()
	// State reports that the server is in another state: one of the State constants.
	State(state string)
	// Connections reports that so many connections were opened, or closed if it is negative.
	Connections(delta int)
}

// The states of a server.
const (
	StateUnknown = "unknown" // not asked yet
	StateOK      = "ok"
	StateSuspect = "suspect" // left alone for a moment, until a probe has told: half open, as circuit breakers call it
	StateFailing = "failing" // left alone while another server is ok: open
)

// ServerStatus is one server as its group sees it.
type ServerStatus struct {
	URL       string
	Tier      int // from 1
	State     string
	LastError string        // why it failed last; stays after it recovered
	Latency   time.Duration // decaying mean; 0 when unknown
	High      time.Duration // what 98 % of the answers were faster than; 0 when unknown
	Since     time.Time     // of the state; zero while unknown
	Abandoned int           // calls into the framework that go on though nobody waits for them
}

// client is one server over one transport. It is used by many goroutines at once.
type client interface {
	upstream.Upstream
	// ask returns the checked response to q, or an *Error. It returns soon after ctx ends.
	ask(ctx context.Context, q *query) (*wire.Answer, error)
}

// Group is an ordered set of upstream servers that stand for each other.
type Group struct {
	name     string
	tiers    [][]*server
	servers  []*server // all of them, in order
	pick     string
	nextOn   NextOn
	deadline time.Duration
	hedge    Hedge
	budget   budget
	searches sync.Pool // of *search
	log      *slog.Logger
	boot     *bootstrap   // nil when no server has a host name
	back     atomic.Int64 // when a server was last back, Unix nanoseconds

	mu     sync.RWMutex // orders closed and calls.Add
	closed bool
	calls  sync.WaitGroup // attempts under way
}

// NewGroup checks cfg and returns its group. It opens nothing and starts nothing. The error joins those of all mistakes.
func NewGroup(cfg Config) (*Group, error) {
	g := &Group{
		name: cfg.Name, pick: cmp.Or(cfg.Pick, PickFastest), nextOn: cfg.NextOn,
		deadline: cmp.Or(cfg.Deadline, DefaultDeadline), hedge: cfg.Hedge, log: cfg.Logger,
	}
	g.budget.Store(hedgeCap)
	g.searches.New = newSearch
	if g.nextOn == (NextOn{}) {
		g.nextOn = NextOn{Timeout: true, Connect: true, ServFail: true, Refused: true}
	}
	if g.log == nil {
		g.log = slog.New(slog.DiscardHandler)
	}
	g.log = g.log.With("group", g.name)
	var errs []error
	if g.deadline < 0 {
		errs = append(errs, fmt.Errorf("deadline %v is negative", g.deadline))
	}
	if g.hedge.After < 0 || g.hedge.Never && g.hedge.After > 0 {
		errs = append(errs, fmt.Errorf("hedge %+v makes no sense", g.hedge))
	}
	cfg.Breaker.OpenAfter = cmp.Or(cfg.Breaker.OpenAfter, defaultOpenAfter)
	cfg.Breaker.Probe = cmp.Or(cfg.Breaker.Probe, defaultProbe)
	cfg.Breaker.MaxProbe = cmp.Or(cfg.Breaker.MaxProbe, max(defaultMaxProbe, cfg.Breaker.Probe))
	if b := cfg.Breaker; b.OpenAfter < 0 || b.Probe < 0 || b.MaxProbe < b.Probe {
		errs = append(errs, fmt.Errorf("breaker %+v makes no sense", b))
	}
	if !slices.Contains([]string{PickFastest, PickRandom, PickInOrder, PickRace, PickSticky}, g.pick) {
		errs = append(errs, fmt.Errorf("unknown pick %q", g.pick))
	}
	var err error
	if g.boot, err = newBootstrap(cfg); err != nil {
		errs = append(errs, err)
	}
	env := environment{timeout: g.deadline, boot: g.boot, log: g.log}
	errs = append(errs, g.addTiers(cfg, func(s Server, obs ServerObserver) (client, error) {
		env := env
		env.count = obs.Connections
		return newClient(s, env)
	})...)
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return g, nil
}

// addTiers makes the servers of cfg with open.
func (g *Group) addTiers(cfg Config, open func(Server, ServerObserver) (client, error)) (errs []error) {
	for i, tier := range cfg.Tiers {
		var servers []*server
		for _, spec := range tier {
			var obs ServerObserver = noObserver{}
			if cfg.Observer != nil {
				obs = cfg.Observer.Server(cfg.Name, spec.URL)
			}
			c, err := open(spec, obs)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", spec.URL, err))
				continue
			}
			s := newServer(spec, i+1, c, obs, cfg.Breaker, g.log)
			s.group = g
			if cfg.Previous != nil {
				if old := cfg.Previous.find(spec); old != nil {
					s.inherit(old)
				}
			}
			obs.State(s.state)
			servers = append(servers, s)
		}
		if len(tier) == 0 {
			errs = append(errs, fmt.Errorf("tier %d is empty", i+1))
		}
		g.tiers = append(g.tiers, servers)
		g.servers = append(g.servers, servers...)
	}
	if len(cfg.Tiers) == 0 {
		errs = append(errs, errors.New("no servers"))
	}
	return errs
}

// pace returns what is usual for the fastest of the servers in use, 0 while that is unknown, and whether there are any.
func (g *Group) pace() (best time.Duration, any bool) {
	for _, s := range g.servers {
		if s.away.Load() {
			continue
		}
		any = true
		if usual := time.Duration(s.usual.Load()); usual > 0 && (best == 0 || usual < best) {
			best = usual
		}
	}
	return best, any
}

// find returns the group's server that is the same as spec, or nil.
func (g *Group) find(spec Server) *server {
	for _, s := range g.servers {
		if s.spec.same(spec) {
			return s
		}
	}
	return nil
}

// same reports whether s and o are the same server, asked in the same way.
func (s Server) same(o Server) bool {
	return s.URL == o.URL && s.Scheme == o.Scheme && s.Host == o.Host && s.Port == o.Port && s.Path == o.Path &&
		s.VerifyName == o.VerifyName && slices.Equal(s.Pins, o.Pins) && (s.Roots == nil) == (o.Roots == nil) &&
		(s.Roots == nil || s.Roots.Equal(o.Roots)) && (s.ClientCert == nil) == (o.ClientCert == nil) &&
		(s.ClientCert == nil || slices.EqualFunc(s.ClientCert.Certificate, o.ClientCert.Certificate, bytes.Equal))
}

type noObserver struct{}

func (noObserver) Done(time.Duration, int, string) {}
func (noObserver) Hedge()                          {}
func (noObserver) HedgeWon()                       {}
func (noObserver) State(string)                    {}
func (noObserver) Connections(int)                 {}

// Run probes failing servers and keeps the addresses of servers fresh until ctx ends. It returns when all that it
// started has ended. A group works without it: then a client's question is now and then spent on a failing server.
func (g *Group) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, s := range g.servers {
		wg.Go(func() { s.watch(ctx, g.deadline) })
	}
	if g.boot != nil {
		wg.Go(func() { g.boot.run(ctx) })
	}
	wg.Wait()
	return nil
}

// Ask asks the group's servers and returns a checked response to q. A response of any RCODE is one; the error says that
// no server gave any, and is a *NoAnswerError, or that ctx was cancelled. It returns by the group's deadline, or ctx's
// when that is sooner. It keeps nothing of q, and the response is the caller's.
func (g *Group) Ask(ctx context.Context, q wire.Question) (*wire.Answer, error) {
	return g.ask(ctx, newQuery(q))
}

// Exchange is Ask for messages. The response has req's ID and question; req is not modified.
func (g *Group) Exchange(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
	q, err := queryOf(req)
	if err != nil {
		return nil, err
	}
	a, err := g.ask(ctx, q)
	if err != nil {
		return nil, err
	}
	return messageOf(a, req)
}

// enter counts a call that Close has to wait for.
func (g *Group) enter() bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if !g.closed {
		g.calls.Add(1)
	}
	return !g.closed
}

// Status returns every server's state in the order of the tiers.
func (g *Group) Status() []ServerStatus {
	all := make([]ServerStatus, len(g.servers))
	for i, s := range g.servers {
		all[i] = s.status()
	}
	return all
}

// Recovered returns when a server last answered again that was gone, in Unix nanoseconds; 0 if none has. What the group had no
// answer to before that may have one now. Gone is a server that was failing, or in doubt and silent to a probe. One that only
// some names are too slow for was not, and neither was one that a query of many was lost to.
func (g *Group) Recovered() int64 { return g.back.Load() }

// Close closes all connections, ends what is in flight, and waits for it. Run has to be ended before by its context.
func (g *Group) Close() error {
	g.mu.Lock()
	closed := g.closed
	g.closed = true
	g.mu.Unlock()
	if closed {
		return nil
	}
	var errs []error
	for _, s := range g.servers {
		errs = append(errs, s.client.Close())
	}
	if g.boot != nil {
		errs = append(errs, g.boot.close())
	}
	g.calls.Wait()
	return errors.Join(errs...)
}

// environment is what all clients of a group share.
type environment struct {
	timeout time.Duration // bounds a dial and every exchange of Upstream.Exchange
	boot    *bootstrap    // nil when host names cannot be resolved
	log     *slog.Logger
	count   func(int) // told of connections opened and closed
}

// newClient returns the client for s.
func newClient(s Server, env environment) (client, error) {
	switch s.Scheme {
	case "sdns":
		return newStampClient(s, env)
	case "discover":
		return newDiscoverClient(s, env)
	}
	t, err := newTarget(&s, env)
	if err != nil {
		return nil, err
	}
	switch s.Scheme {
	case "tls":
		return newStreamClient(s, t, env, true), nil
	case "tcp", "udp":
		if s.hasTLS() {
			return nil, fmt.Errorf("roots, pins and client certificates mean nothing to %s", s.Scheme)
		}
		if s.Scheme == "tcp" {
			return newStreamClient(s, t, env, false), nil
		}
		return newUDPClient(s, t, env), nil
	case "https":
		return newHTTPSClient(s, t, env), nil
	case "h3":
		return newH3Client(s, t, env), nil
	case "quic":
		return newQUICClient(s, t, env), nil
	}
	return nil, fmt.Errorf("unknown scheme %q", s.Scheme)
}

var defaultPorts = map[string]uint16{"tls": 853, "quic": 853, "https": 443, "h3": 443, "udp": 53, "tcp": 53}

// newTarget fills in the defaults of s and returns where it is.
func newTarget(s *Server, env environment) (*target, error) {
	if s.Host == "" {
		return nil, errors.New("no host")
	}
	s.Port = cmp.Or(s.Port, defaultPorts[s.Scheme])
	s.VerifyName = strings.TrimSuffix(cmp.Or(s.VerifyName, s.Host), ".")
	s.Path = cmp.Or(strings.TrimSuffix(s.Path, "{?dns}"), "/dns-query") // RFC 8484, section 4.1: a URI template
	t := &target{host: s.Host, port: s.Port}
	if len(s.addrs) > 0 {
		t.fixed = interleave(s.addrs, s.Port)
		return t, nil
	}
	if a, err := netip.ParseAddr(s.Host); err == nil {
		t.fixed = []netip.AddrPort{netip.AddrPortFrom(a.Unmap(), s.Port)}
		return t, nil
	}
	if env.boot == nil {
		return nil, fmt.Errorf("host name %q needs a bootstrap server", s.Host)
	}
	t.boot = env.boot
	env.boot.want(s.Host)
	return t, nil
}

// hasTLS reports whether s has settings that only mean something with TLS.
func (s *Server) hasTLS() bool { return s.Roots != nil || len(s.Pins) > 0 || s.ClientCert != nil }
