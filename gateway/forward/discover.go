package forward

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"dnsgateway/gateway/wire"

	"github.com/AdguardTeam/dnsproxy/upstream"
	"github.com/miekg/dns"
)

const (
	// designationName is what a resolver is asked for the encrypted ones in its place, RFC 9462, section 4.
	designationName = "_dns.resolver.arpa."
	// resolverDomain is nobody's: a designated resolver cannot have a name there, RFC 9462, section 4.
	resolverDomain = "resolver.arpa."
	// maxAliases bounds a chain of SVCB records in AliasMode, as RFC 9460, section 3 wants it bounded.
	maxAliases = 8
	// maxDesignated bounds how many designated resolvers are kept: an answer may have any number.
	maxDesignated = 8
	// distrustAfter is how long designations are kept of which none could be verified, if their TTL is longer. RFC 9462,
	// section 4.2 wants the TTL respected, and lets a client find it too long: else who forged one answer would cut us off
	// for a day.
	distrustAfter = 5 * time.Minute
)

// discoverClient asks the encrypted resolvers that an unencrypted one designates, RFC 9462. It knows the latter by its
// address alone, and asks it nothing but where the former are. It uses only what can be verified (section 4.2): their
// certificates have to bear that address. There is no opportunistic discovery (section 4.3), for private addresses
// neither: it would not notice who sits in between.
type discoverClient struct {
	identity
	address netip.Addr
	plain   client
	open    func(designation) (*designated, error)
	log     *slog.Logger

	// life ends with Close: a discovery serves all who wait for it, and those who come later.
	life context.Context
	end  context.CancelFunc
	wg   sync.WaitGroup // discoveries, and the closing of what was replaced

	mu         sync.Mutex
	designated []*designated // by preference; replaced, never written to
	failing    bool          // some of them have failures
	found      time.Time     // when they were
	expires    time.Time
	failures   int       // of the discovery, in a row
	retry      time.Time // no discovery before
	err        error     // of the last discovery
	busy       chan struct{}
	closed     bool
}

var (
	_ upstream.Upstream = (*discoverClient)(nil)
	_ renewer           = (*discoverClient)(nil)
)

// designation is what SVCB and address records say of one designated resolver over one protocol.
type designation struct {
	scheme   string
	name     string // the TargetName, without the root's dot
	port     uint16
	path     string       // https and h3
	addrs    []netip.Addr // sorted
	priority uint16
}

// same reports whether d and o are the same resolver, asked in the same way.
func (d designation) same(o designation) bool {
	return d.scheme == o.scheme && d.name == o.name && d.port == o.port && d.path == o.path && slices.Equal(d.addrs, o.addrs)
}

// String returns the designation as a URL, without its addresses.
func (d designation) String() string {
	host := d.name
	if d.port != defaultPorts[d.scheme] {
		host = net.JoinHostPort(d.name, strconv.Itoa(int(d.port)))
	}
	return d.scheme + "://" + host + d.path
}

// designated is the client for a designation.
type designated struct {
	designation
	client

	// The rest is guarded by discoverClient.mu.
	calls    int // under way
	retired  bool
	idle     chan struct{} // closed when it is retired and calls is 0
	failures int           // in a row
	retry    time.Time     // preferred to others again from then on
}

// newDiscoverClient returns the client for what the resolver at s.Host designates.
func newDiscoverClient(s Server, env environment) (*discoverClient, error) {
	address, err := netip.ParseAddr(s.Host)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%q is not an address: what is discovered is verified by it", s.Host)
	case s.ClientCert != nil:
		return nil, errors.New("a client certificate is not shown to servers that are discovered")
	}
	resolver := Server{URL: s.URL, Scheme: "udp", Host: s.Host, Port: s.Port}
	t, err := newTarget(&resolver, env)
	if err != nil {
		return nil, err
	}
	address = address.Unmap().WithZone("") // a zone is this host's own matter; no certificate has one
	// Without SNI: the certificate has to be the one for the address, and that is the URI's host too (RFC 9462, section 6.3).
	open := func(d designation) (*designated, error) {
		inner, err := newClient(Server{URL: d.String(), Scheme: d.scheme, Host: d.name, Port: d.port, Path: d.path,
			addrs: d.addrs, VerifyName: address.String(), Roots: s.Roots, Pins: s.Pins}, env)
		if err != nil {
			return nil, err
		}
		return &designated{designation: d, client: inner}, nil
	}
	c := &discoverClient{identity: identity{s.URL, env.timeout}, address: address, plain: newUDPClient(resolver, t, env),
		open: open, log: env.log}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	c.log = c.log.With("server", s.URL)
	c.life, c.end = context.WithCancel(context.Background())
	return c, nil
}

// Exchange implements [upstream.Upstream].
func (c *discoverClient) Exchange(req *dns.Msg) (*dns.Msg, error) {
	return exchangeWithin(c.timeout, c, req)
}

// ExchangeContext is Exchange that ends with ctx.
func (c *discoverClient) ExchangeContext(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
	return exchange(ctx, c, req)
}

// ask implements client. It asks the designated resolvers one after the other until one has an answer. All but the last
// have their share of the time.
func (c *discoverClient) ask(ctx context.Context, q *query) (*wire.Answer, error) {
	all, err := c.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer c.leave(all)
	var errs []error
	for i, d := range all {
		a, err := d.askFor(ctx, share(ctx, len(all)-i), q)
		switch {
		case err == nil:
			c.mark(d, true)
			return a, nil
		case ctx.Err() != nil || !unreachable(err):
			return nil, d.explain(err)
		}
		c.mark(d, false)
		errs = append(errs, d.explain(err))
	}
	c.lost(errs)
	return nil, firstTelling(errs)
}

// share returns the time for one of several, or 0 for no other bound than ctx.
func share(ctx context.Context, several int) time.Duration {
	deadline, ok := ctx.Deadline()
	if !ok || several == 1 {
		return 0
	}
	return max(time.Until(deadline)/time.Duration(several), 1)
}

// unreachable reports whether err says nothing about the question, so that another resolver may have its answer.
func unreachable(err error) bool {
	switch kindOf(err) {
	case KindConnect, KindBackoff, KindTLS, KindTimeout, KindIO, KindHTTP:
		return true
	}
	return false
}

// askFor is ask that takes no longer than limit, unless that is 0.
func (d *designated) askFor(ctx context.Context, limit time.Duration, q *query) (*wire.Answer, error) {
	if limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	return d.ask(ctx, q)
}

// explain returns err with the designated resolver that it comes from.
func (d *designated) explain(err error) error {
	var e *Error
	if !errors.As(err, &e) {
		return err
	}
	return &Error{Kind: e.Kind, Err: fmt.Errorf("designated %s: %w", d, e.Err), retry: e.retry}
}

// enter returns the designated resolvers in the order in which to ask them, at least one; leave gives them back. It waits
// only when none are known, for a discovery that it may have to begin.
func (c *discoverClient) enter(ctx context.Context) ([]*designated, error) {
	for {
		c.mu.Lock()
		now := time.Now()
		if c.closed {
			c.mu.Unlock()
			return nil, errClosed
		}
		if c.busy == nil && !now.Before(c.retry) && !now.Before(c.expires) {
			c.busy = make(chan struct{})
			c.wg.Go(c.discover)
		}
		if len(c.designated) > 0 {
			all := c.orderLocked(now)
			for _, d := range all {
				d.calls++
			}
			c.mu.Unlock()
			return all, nil
		}
		err, wait := c.err, c.busy
		c.mu.Unlock()
		if wait == nil {
			return nil, err
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, classify(KindBootstrap, "asking "+c.address.String()+" for its encrypted resolvers", ctx.Err())
		}
	}
}

// orderLocked returns the designated resolvers by preference, those behind that failed lately. One whose pause is over is
// tried by one query, not by all at once. c.mu is held.
func (c *discoverClient) orderLocked(now time.Time) []*designated {
	if !c.failing {
		return c.designated
	}
	var good, bad []*designated
	tried := false
	for _, d := range c.designated {
		switch {
		case d.failures == 0:
			good = append(good, d)
		case !tried && !now.Before(d.retry):
			good, tried = append(good, d), true
			d.retry = now.Add(pauseAfter(d.failures))
		default:
			bad = append(bad, d)
		}
	}
	return append(good, bad...)
}

// pauseAfter returns how long something is left alone after so many failures in a row, at least one.
func pauseAfter(failures int) time.Duration {
	return min(maxLookupPause, minLookupPause<<min(failures-1, 6))
}

// leave gives back what enter returned.
func (c *discoverClient) leave(all []*designated) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, d := range all {
		if d.calls--; d.calls == 0 && d.retired {
			close(d.idle)
		}
	}
}

// mark remembers whether d could be reached.
func (c *discoverClient) mark(d *designated, well bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case !well:
		d.failures++
		d.retry = time.Now().Add(pauseAfter(d.failures))
		c.failing = c.failing || slices.Contains(c.designated, d)
	case d.failures > 0:
		d.failures = 0
		c.failing = slices.ContainsFunc(c.designated, func(d *designated) bool { return d.failures > 0 })
	}
}

// lost comes when none of the designated resolvers could be reached: there may be others meanwhile.
func (c *discoverClient) lost(errs []error) {
	kept := minAddressTTL // else: see distrustAfter
	for _, err := range errs {
		// What KindBackoff is about is inside it.
		for e := (*Error)(nil); errors.As(err, &e); err = e.Err {
			if e.Kind == KindTLS {
				kept = distrustAfter
			}
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if soon := c.found.Add(kept); soon.Before(c.expires) {
		c.expires = soon
	}
}

// renew implements renewer.
func (c *discoverClient) renew(quiet time.Duration) (any bool) {
	c.mu.Lock()
	all := c.designated
	c.mu.Unlock()
	for _, d := range all {
		if r, ok := d.client.(renewer); ok && r.renew(quiet) {
			any = true
		}
	}
	return any
}

// Close implements [upstream.Upstream].
func (c *discoverClient) Close() error {
	c.mu.Lock()
	c.closed = true
	all := c.designated
	c.mu.Unlock()
	c.end()
	errs := []error{c.plain.Close()}
	for _, d := range all {
		errs = append(errs, d.Close())
	}
	c.wg.Wait()
	return errors.Join(errs...)
}

// discover finds the designated resolvers and puts them to use.
func (c *discoverClient) discover() {
	ctx, cancel := context.WithTimeout(c.life, c.timeout)
	defer cancel()
	found, ttl, err := c.designations(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.busy)
	c.busy = nil
	if c.closed {
		return
	}
	if err == nil {
		err = c.replaceLocked(found)
	}
	now := time.Now()
	if err != nil {
		// What was found before stays in use: it is verified whenever a connection is opened.
		c.err = &Error{Kind: KindBootstrap, Err: err}
		c.failures++
		pause := pauseAfter(c.failures)
		if len(c.designated) == 0 {
			pause = min(pause, 2*minLookupPause) // clients wait for the network to come up
		}
		c.retry = now.Add(pause)
		return
	}
	c.err, c.failures, c.found = nil, 0, now
	c.expires = now.Add(min(max(ttl, minAddressTTL), maxAddressTTL))
}

// replaceLocked makes found the designated resolvers. Those that are among them already keep their connections; those
// that are no longer are closed when their last query has ended. c.mu is held.
func (c *discoverClient) replaceLocked(found []designation) error {
	known := func(all []*designated, f designation) int {
		return slices.IndexFunc(all, func(d *designated) bool { return d.same(f) })
	}
	// Among equals, one that has connections comes first.
	slices.SortStableFunc(found, func(a, b designation) int {
		return cmp.Or(cmp.Compare(a.priority, b.priority),
			cmp.Compare(min(0, known(c.designated, b)), min(0, known(c.designated, a))))
	})
	var all []*designated
	var errs []error
	fresh := 0
	for _, f := range found {
		if len(all) == maxDesignated || known(all, f) >= 0 {
			continue
		}
		if i := known(c.designated, f); i >= 0 {
			all = append(all, c.designated[i])
			continue
		}
		d, err := c.open(f)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		fresh++
		all = append(all, d)
	}
	if len(all) == 0 {
		return errors.Join(errs...)
	}
	old := c.designated
	c.designated = all
	c.failing = slices.ContainsFunc(all, func(d *designated) bool { return d.failures > 0 })
	for _, d := range old {
		if !slices.Contains(all, d) {
			c.retireLocked(d)
		}
	}
	if fresh > 0 || len(all) != len(old) {
		var names []string
		for _, d := range all {
			names = append(names, d.String())
		}
		c.log.Info("encrypted resolvers discovered", "designated", names)
	}
	return nil
}

// retireLocked closes d when its last query has ended, or with c. c.mu is held.
func (c *discoverClient) retireLocked(d *designated) {
	d.retired, d.idle = true, make(chan struct{})
	if d.calls == 0 {
		close(d.idle)
	}
	c.wg.Go(func() {
		select {
		case <-d.idle:
		case <-c.life.Done():
		}
		d.Close()
	})
}

// designations asks the unencrypted resolver what it designates. The result has at least one element and is in no order
// but that of chance, RFC 9460, section 2.4.1.
func (c *discoverClient) designations(ctx context.Context) ([]designation, time.Duration, error) {
	records, glue, ttl, err := c.services(ctx)
	if err != nil {
		return nil, 0, fmt.Errorf("asking %s for its encrypted resolvers: %w", c.address, err)
	}
	var found []designation
	for _, rr := range records {
		found = append(found, readDesignation(rr)...)
	}
	if len(found) == 0 {
		return nil, 0, fmt.Errorf("%s designates no encrypted resolver (RFC 9462)", c.address)
	}
	rand.Shuffle(len(found), func(i, j int) { found[i], found[j] = found[j], found[i] })
	slices.SortStableFunc(found, func(a, b designation) int { return cmp.Compare(a.priority, b.priority) })
	found = found[:min(len(found), 2*maxDesignated)] // some may have no address, or come twice
	short, err := c.locate(ctx, found, glue)
	found = slices.DeleteFunc(found, func(d designation) bool { return len(d.addrs) == 0 })
	if len(found) == 0 {
		return nil, 0, fmt.Errorf("no address for what %s designates: %w", c.address, err)
	}
	return found, min(ttl, short), nil
}

// services returns the SVCB records in ServiceMode to which designationName leads, and the addresses that came beside
// them by their owners' names. A record in AliasMode stands for all of its set, RFC 9460, section 2.4.1.
func (c *discoverClient) services(ctx context.Context) (
	_ []*dns.SVCB, glue map[string][]dns.RR, ttl time.Duration, _ error) {
	name, ttl, glue := designationName, maxAddressTTL, make(map[string][]dns.RR)
	for range maxAliases {
		resp, err := c.lookup(ctx, name, dns.TypeSVCB)
		if err != nil {
			return nil, nil, 0, err
		}
		for _, rr := range resp.Extra {
			owner := dns.CanonicalName(rr.Header().Name)
			glue[owner] = append(glue[owner], rr)
		}
		var set []*dns.SVCB
		var alias *dns.SVCB
		for _, rr := range resp.Answer {
			// Whatever CNAME records may be before them, these answer the question.
			if rr, ok := rr.(*dns.SVCB); ok {
				ttl = min(ttl, seconds(rr.Hdr.Ttl))
				if rr.Priority == 0 && alias == nil {
					alias = rr
				}
				set = append(set, rr)
			}
		}
		if alias == nil {
			return set, glue, ttl, nil
		}
		// RFC 9460, section 2.5.1: "." says that there is no such service.
		if name = dns.CanonicalName(alias.Target); name == "." || dns.IsSubDomain(resolverDomain, name) {
			return nil, nil, ttl, nil
		}
	}
	return nil, nil, 0, fmt.Errorf("more than %d aliases", maxAliases)
}

func seconds(ttl uint32) time.Duration { return time.Duration(ttl) * time.Second }

// lookup asks the unencrypted resolver. Nothing but names that belong to the discovery may be given to it.
func (c *discoverClient) lookup(ctx context.Context, name string, qtype uint16) (*dns.Msg, error) {
	m := new(dns.Msg)
	m.SetQuestion(name, qtype)
	resp, err := exchange(ctx, c.plain, m)
	if err != nil {
		return nil, err
	}
	if resp.Rcode != dns.RcodeSuccess && resp.Rcode != dns.RcodeNameError {
		return nil, fmt.Errorf("RCODE %s", dns.RcodeToString[resp.Rcode])
	}
	return resp, nil
}

// locate fills in the addresses that found lacks: from glue, or by asking the unencrypted resolver for those of the
// TargetNames. It returns the lowest TTL of what it used, and why something could not be found.
func (c *discoverClient) locate(ctx context.Context, found []designation, glue map[string][]dns.RR) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout/2) // one family that stays silent shall not spoil the whole
	defer cancel()
	type outcome struct {
		addrs []netip.Addr
		ttl   time.Duration
		err   error
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	names := make(map[string]*outcome)
	for _, d := range found {
		if len(d.addrs) > 0 || names[d.name] != nil {
			continue
		}
		o := new(outcome)
		names[d.name] = o
		name := dns.CanonicalName(d.name)
		if o.addrs, o.ttl = addressesOf(glue[name]); len(o.addrs) > 0 {
			continue
		}
		for _, qtype := range []uint16{dns.TypeAAAA, dns.TypeA} {
			wg.Go(func() {
				resp, err := c.lookup(ctx, name, qtype)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					o.ttl, o.err = minAddressTTL, err // to be asked again soon
					return
				}
				addrs, ttl := addressesOf(resp.Answer)
				o.addrs, o.ttl = append(o.addrs, addrs...), min(ttl, o.ttl)
			})
		}
	}
	wg.Wait()
	ttl, err := maxAddressTTL, errors.New("the name has none")
	for _, o := range names {
		ttl, err = min(ttl, o.ttl), cmp.Or(o.err, err)
	}
	for i := range found {
		if o := names[found[i].name]; len(found[i].addrs) == 0 && o != nil {
			found[i].addrs = sorted(o.addrs)
		}
	}
	return ttl, err
}

// addressesOf returns the addresses in records that can be connected to, and their lowest TTL.
func addressesOf(records []dns.RR) (addrs []netip.Addr, ttl time.Duration) {
	ttl = maxAddressTTL
	for _, rr := range records {
		var ip net.IP
		switch rr := rr.(type) {
		case *dns.A:
			ip = rr.A
		case *dns.AAAA:
			ip = rr.AAAA
		default:
			continue
		}
		if usable := usableAddrs([]net.IP{ip}); len(usable) > 0 {
			addrs, ttl = append(addrs, usable...), min(ttl, seconds(rr.Header().Ttl))
		}
	}
	return addrs, ttl
}

// usableAddrs returns those addresses that can be connected to.
func usableAddrs(ips []net.IP) (addrs []netip.Addr) {
	for _, ip := range ips {
		a, _ := netip.AddrFromSlice(ip)
		if a = a.Unmap(); a.IsValid() && !a.IsUnspecified() && !a.IsMulticast() {
			addrs = append(addrs, a)
		}
	}
	return addrs
}

// sorted returns a sorted copy of addrs without what is in it twice, so that servers that list them in turns do not seem
// to have changed them.
func sorted(addrs []netip.Addr) []netip.Addr {
	addrs = slices.Clone(addrs)
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}

// alpnSchemes says which client speaks a protocol, RFC 9461, section 4.1.
var alpnSchemes = map[string]string{"dot": "tls", "h2": "https", "h3": "h3", "doq": "quic"}

// readDesignation returns what rr designates, one for each protocol that we speak: nothing if rr has to be ignored.
func readDesignation(rr *dns.SVCB) []designation {
	name := dns.CanonicalName(rr.Target)
	if name == "." { // RFC 9460, section 2.5.2; it remains forbidden where no alias led to another name
		name = dns.CanonicalName(rr.Hdr.Name)
	}
	if rr.Priority == 0 || dns.IsSubDomain(resolverDomain, name) || !hostName(name) {
		return nil
	}
	d := designation{name: strings.TrimSuffix(name, "."), priority: rr.Priority}
	var protocols []string
	var mandatory []dns.SVCBKey
	present := make(map[dns.SVCBKey]bool)
	for _, kv := range rr.Value {
		present[kv.Key()] = true
		switch kv := kv.(type) {
		case *dns.SVCBMandatory:
			mandatory = kv.Code
		case *dns.SVCBAlpn:
			protocols = kv.Alpn
		case *dns.SVCBPort:
			if d.port = kv.Port; d.port == 0 {
				return nil
			}
		case *dns.SVCBIPv4Hint:
			d.addrs = append(d.addrs, usableAddrs(kv.Hint)...)
		case *dns.SVCBIPv6Hint:
			d.addrs = append(d.addrs, usableAddrs(kv.Hint)...)
		case *dns.SVCBDoHPath:
			d.path = expandPath(kv.Template)
		}
	}
	for _, key := range mandatory {
		// RFC 9460, section 8: what is mandatory is there, and is known. ech is not: it would be ignored.
		known := key >= dns.SVCB_ALPN && key <= dns.SVCB_IPV4HINT || key == dns.SVCB_IPV6HINT || key == dns.SVCB_DOHPATH
		if !known || !present[key] {
			return nil
		}
	}
	d.addrs = sorted(d.addrs)
	var all []designation
	for _, p := range protocols {
		d := d
		d.scheme = alpnSchemes[p]
		d.port = cmp.Or(d.port, defaultPorts[d.scheme])
		switch d.scheme {
		case "":
			continue
		case "https", "h3":
			if d.path == "" { // RFC 9461, section 5
				continue
			}
		default:
			d.path = ""
		}
		all = append(all, d)
	}
	return all
}

// hostName reports whether name, in lower case, can be a server's: it goes into SNI and certificates.
func hostName(name string) bool {
	for i := range len(name) {
		c := name[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' {
			return false
		}
	}
	return name != "."
}

// expandPath returns the path that a POST request goes to by a URI template (RFC 9461, section 5), or "" if it is none
// that we can use. No variable is defined in a POST request (RFC 8484, section 4.1), so expressions expand to nothing.
func expandPath(template string) string {
	if !strings.HasPrefix(template, "/") {
		return ""
	}
	var path strings.Builder
	takesDNS := false
	for rest := template; rest != ""; {
		literal, expression, found := strings.Cut(rest, "{")
		path.WriteString(literal)
		if !found {
			break
		}
		if expression, rest, found = strings.Cut(expression, "}"); !found {
			return ""
		}
		for variable := range strings.SplitSeq(strings.TrimLeft(expression, "+#./;?&"), ",") {
			takesDNS = takesDNS || variable == "dns"
		}
	}
	s := path.String()
	odd := func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune(`?#{}"<>\^|`+"`", r) }
	if _, err := url.PathUnescape(s); err != nil || !takesDNS || strings.ContainsFunc(s, odd) {
		return ""
	}
	return s
}
