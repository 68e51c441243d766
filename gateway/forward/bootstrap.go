package forward

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// Addresses are kept for their TTL within these bounds.
	minAddressTTL = 30 * time.Second
	maxAddressTTL = 24 * time.Hour
	// refreshEarly is the part of a lifetime after which Run asks again.
	refreshEarly = 0.8
	// resolutionDelay is how long the addresses of one family wait for those of the other, RFC 8305, section 3.
	resolutionDelay = 50 * time.Millisecond
	// After a lookup in vain the next one waits, from the first time to the second, doubling.
	minLookupPause = time.Second
	maxLookupPause = 60 * time.Second
)

// bootstrap finds the addresses of upstream servers that are given by name. It asks only the servers that it was given
// by address, never the system's resolver. What it has found it keeps: after their TTL the addresses are asked for
// again, and used until there are new ones.
type bootstrap struct {
	group *Group // the bootstrap servers

	// life ends with close: a lookup serves all who wait for it, and those who come later.
	life context.Context
	end  context.CancelFunc
	wg   sync.WaitGroup

	mu     sync.Mutex
	hosts  map[string]*host
	closed bool
}

// host is a name and what is known about it.
type host struct {
	name     string // fully qualified
	addrs    []netip.Addr
	ttl      time.Duration
	expires  time.Time
	failures int
	retry    time.Time     // not asked again before
	err      error         // of the last lookup
	busy     bool          // a lookup is under way
	lookup   chan struct{} // closed when that has an outcome to go on with; nil when there is nothing to wait for
}

// newBootstrap returns nil if cfg has no bootstrap servers.
func newBootstrap(cfg Config) (*bootstrap, error) {
	if len(cfg.Bootstrap) == 0 {
		return nil, nil
	}
	group, err := NewGroup(Config{Name: "bootstrap", Tiers: [][]Server{cfg.Bootstrap}, Pick: PickInOrder,
		Deadline: cfg.Deadline, Logger: cfg.Logger, Observer: cfg.Observer})
	if err != nil {
		return nil, fmt.Errorf("bootstrap: %w", err)
	}
	b := &bootstrap{group: group, hosts: make(map[string]*host)}
	b.life, b.end = context.WithCancel(context.Background())
	return b, nil
}

// want announces a host name, which run then keeps at hand.
func (b *bootstrap) want(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.hostLocked(name)
}

func (b *bootstrap) hostLocked(name string) *host {
	h := b.hosts[name]
	if h == nil {
		h = &host{name: dns.Fqdn(name)}
		b.hosts[name] = h
	}
	return h
}

// lookup returns the addresses of name, at least one. It waits only when none are known.
func (b *bootstrap) lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	for {
		b.mu.Lock()
		h, now := b.hostLocked(name), time.Now()
		if b.closed {
			b.mu.Unlock()
			return nil, errClosed
		}
		if !h.busy && !now.Before(h.retry) && !now.Before(h.expires) {
			b.startLocked(h)
		}
		addrs, err, wait := h.addrs, h.err, h.lookup
		b.mu.Unlock()
		switch {
		case len(addrs) > 0:
			return addrs, nil
		case wait == nil:
			return nil, &Error{Kind: KindBootstrap, Err: fmt.Errorf("no address for %s: %w", name, err)}
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, classify(KindBootstrap, "looking up "+name, ctx.Err())
		}
	}
}

// startLocked begins a lookup in the background; b.mu is held.
func (b *bootstrap) startLocked(h *host) {
	h.busy, h.lookup = true, make(chan struct{})
	b.wg.Go(func() { b.find(h) })
}

// found is the outcome for one address family.
type found struct {
	addrs []netip.Addr
	ttl   time.Duration
	err   error
}

// find asks for both families. The addresses of the first are put to use if the second lets itself be waited for.
func (b *bootstrap) find(h *host) {
	results := make(chan found, 2)
	for _, qtype := range []uint16{dns.TypeAAAA, dns.TypeA} {
		go func() { results <- b.ask(h.name, qtype) }()
	}
	first := <-results
	var second found
	timer := time.NewTimer(resolutionDelay)
	defer timer.Stop()
	if len(first.addrs) == 0 {
		timer.Stop() // nothing to use meanwhile
	}
	select {
	case second = <-results:
	case <-timer.C:
		b.store(h, first, false)
		second = <-results
	}
	both := found{addrs: append(slices.Clone(first.addrs), second.addrs...), ttl: minAddressTTL,
		err: cmp.Or(first.err, second.err)}
	switch {
	case first.err == nil && second.err == nil:
		both.ttl = min(cmp.Or(first.ttl, second.ttl), cmp.Or(second.ttl, first.ttl))
	case len(both.addrs) > 0:
		both.err = nil // one family is enough, but not for long
	}
	b.store(h, both, true)
}

// store puts the outcome of a lookup to use and wakes those who wait for it. Unless it is final, the lookup goes on.
func (b *bootstrap) store(h *host, f found, final bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	if f.err == nil && len(f.addrs) == 0 {
		f.err = errors.New("the name has none")
	}
	h.err = f.err
	if f.err == nil {
		h.addrs = f.addrs
		h.ttl = min(max(f.ttl, minAddressTTL), maxAddressTTL)
		h.expires, h.retry, h.failures = now.Add(h.ttl), now, 0
	} else if final {
		longest := maxLookupPause
		if len(h.addrs) == 0 {
			longest = 2 * minLookupPause // clients wait for the network to come up
		}
		h.retry = now.Add(min(longest, minLookupPause<<min(h.failures, 6)))
		h.failures++
	}
	if h.lookup != nil {
		close(h.lookup)
		h.lookup = nil
	}
	h.busy = !final
}

// ask asks for one family.
func (b *bootstrap) ask(name string, qtype uint16) found {
	m := new(dns.Msg)
	m.SetQuestion(name, qtype)
	resp, err := b.group.Exchange(b.life, m)
	if err != nil {
		return found{err: err}
	}
	if resp.Rcode != dns.RcodeSuccess && resp.Rcode != dns.RcodeNameError {
		return found{err: fmt.Errorf("RCODE %s", dns.RcodeToString[resp.Rcode])}
	}
	var f found
	for _, rr := range resp.Answer {
		var a netip.Addr
		switch rr := rr.(type) {
		case *dns.A:
			a, _ = netip.AddrFromSlice(rr.A.To4())
		case *dns.AAAA:
			a, _ = netip.AddrFromSlice(rr.AAAA.To16())
		default:
			continue
		}
		if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() {
			continue
		}
		ttl := time.Duration(rr.Header().Ttl) * time.Second
		if len(f.addrs) == 0 || ttl < f.ttl {
			f.ttl = ttl
		}
		f.addrs = append(f.addrs, a)
	}
	return f
}

// run keeps the addresses of all announced names fresh until ctx ends, and probes the bootstrap servers.
func (b *bootstrap) run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { b.group.Run(ctx) })
	for sleep(ctx, b.refresh(time.Now())) {
	}
}

// refresh starts the lookups that are due and returns when to look again.
func (b *bootstrap) refresh(now time.Time) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	next := maxLookupPause
	if b.closed {
		return next
	}
	for _, h := range b.hosts {
		due := h.expires.Add(-time.Duration(float64(h.ttl) * (1 - refreshEarly)))
		if h.retry.After(due) {
			due = h.retry
		}
		switch {
		case h.busy:
			next = min(next, minLookupPause)
		case !now.Before(due):
			b.startLocked(h)
			next = min(next, minLookupPause)
		default:
			next = min(next, due.Sub(now))
		}
	}
	return max(next, 10*time.Millisecond)
}

// close ends all lookups.
func (b *bootstrap) close() error {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.end()
	err := b.group.Close()
	b.wg.Wait()
	return err
}
