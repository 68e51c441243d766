// Package access decides who may ask and how often: an access list of networks, and a token bucket for every client
// prefix.
//
// It knows addresses and time and nothing of DNS: the caller turns a [Decision] into a response. Both tables are of a
// fixed size once built, so no stranger can make them grow, and [Control.Admit] neither waits for I/O nor allocates.
//
// What surprises a newcomer: the limiter remembers a bounded number of clients and forgets the one with the most tokens
// left first. A client that is over its rate has the fewest, so it is the last to be forgotten.
package access

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/gaissmai/bart"
)

// Decision says what to do with a query.
type Decision uint8

// The decisions.
const (
	Allowed Decision = iota // go on
	Refused                 // not on the list: say so
	Dropped                 // not on the list: say nothing
	Limited                 // on the list, but over its rate
)

// String returns the decision's name as it stands in logs.
func (d Decision) String() string {
	switch d {
	case Allowed:
		return "allowed"
	case Refused:
		return "refused"
	case Dropped:
		return "dropped"
	case Limited:
		return "limited"
	}
	return "unknown"
}

// Config is what [New] needs. The zero value answers loopback and private networks on plain transports, anyone on
// encrypted ones, and limits nobody.
type Config struct {
	// Allow lists the networks that may ask. IPv4-mapped prefixes mean the IPv4 network that they map. Nil means
	// [PrivateNetworks] unless Everywhere is set; with Everywhere an empty list admits nobody.
	Allow []netip.Prefix
	// Everywhere makes Allow hold for every transport. Without it Allow guards the plain ones (whose source addresses
	// anyone can forge), and encrypted ones answer anyone.
	Everywhere bool
	// Drop makes Admit say Dropped instead of Refused.
	Drop bool
	// PerClient is the rate of one client prefix in queries per second; 0 means no limit. A client that was quiet may
	// send a burst of twice the rate, and never less than ten queries: one web page asks that much at once.
	PerClient float64
	// PrefixV4 and PrefixV6 are how many leading bits of an address make one client; 0 means 32 and 56. A site usually
	// has a /56 or a /48 of IPv6 to choose source addresses from (RFC 6177, section 2), so /128 would limit nobody.
	PrefixV4, PrefixV6 int
	// Clients is how many client prefixes are remembered, rounded up to a power of two; 0 means 65536 (1.5 MB).
	Clients int
}

// Control answers whether a client may ask. It is safe for concurrent use.
type Control struct {
	allow      bart.Lite
	everywhere bool
	deny       Decision
	limit      *limiter // nil: off
}

// PrivateNetworks returns the networks that may ask over plain transports unless the operator says otherwise: loopback
// (RFC 1122, section 3.2.1.3 and RFC 4291, section 2.5.3), private (RFC 1918), unique local (RFC 4193) and link-local
// addresses (RFC 3927 and RFC 4291, section 2.5.6).
//
// The shared address space 100.64.0.0/10 is not among them: an ISP's customers have it in common (RFC 6598, section 1),
// so to one of them the others are strangers. Who means an overlay network by it writes it down.
func PrivateNetworks() []netip.Prefix {
	return []netip.Prefix{
		netip.MustParsePrefix("127.0.0.0/8"),
		netip.MustParsePrefix("::1/128"),
		netip.MustParsePrefix("10.0.0.0/8"),
		netip.MustParsePrefix("172.16.0.0/12"),
		netip.MustParsePrefix("192.168.0.0/16"),
		netip.MustParsePrefix("fc00::/7"),
		netip.MustParsePrefix("169.254.0.0/16"),
		netip.MustParsePrefix("fe80::/10"),
	}
}

// New checks c and builds the tables.
func New(c Config) (*Control, error) {
	a := &Control{everywhere: c.Everywhere, deny: Refused}
	if c.Drop {
		a.deny = Dropped
	}
	if c.Allow == nil && !c.Everywhere {
		c.Allow = PrivateNetworks()
	}
	var errs []error
	for i, p := range c.Allow {
		if !p.IsValid() {
			errs = append(errs, fmt.Errorf("allow[%d] is not a network", i))
			continue
		}
		a.allow.Insert(unmapPrefix(p).Masked())
	}
	if c.PerClient != 0 {
		l, err := newLimiter(c)
		errs = append(errs, err)
		a.limit = l
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return a, nil
}

// unmapPrefix turns a prefix of IPv4-mapped addresses into the IPv4 prefix that it stands for.
func unmapPrefix(p netip.Prefix) netip.Prefix {
	if a := p.Addr(); a.Is4In6() && p.Bits() >= 96 {
		return netip.PrefixFrom(a.Unmap(), p.Bits()-96)
	}
	return p
}

// Admit decides about one query of client at now, in Unix nanoseconds, and takes a token from its bucket when it is
// allowed. Encrypted says whether it came over an encrypted transport. An IPv4-mapped client is the IPv4 one, and its
// zone does not count. The rate holds on every transport; clients that are not on the list have no bucket, so that
// strangers cannot push out those who are.
func (a *Control) Admit(client netip.Addr, encrypted bool, now int64) Decision {
	client = client.Unmap().WithZone("")
	if (a.everywhere || !encrypted) && !a.allow.Contains(client) {
		return a.deny
	}
	if a.limit != nil && !a.limit.take(client, now) {
		return Limited
	}
	return Allowed
}
