package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"time"
)

// site is where the parts of a run are: all on loopback, or, for a black hole, the server under test in a network namespace
// of its own, with a cable to each tier.
type site struct {
	tier1, tier2 netip.Addr // of the upstreams
	server       netip.Addr // of the server under test, where this process reaches it

	namespace string // empty on loopback
	cables    [2]cable
}

var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

func newSite(f fault) (*site, error) {
	if !f.holed {
		return &site{tier1: loopback, tier2: loopback, server: loopback}, nil
	}
	return newHoleSite()
}

// cable is a pair of virtual network cards: one end in this namespace, one in that of the server under test.
type cable struct {
	near, far         string // names of the cards
	nearAddr, farAddr netip.Addr
}

// nobody is a link-layer address that no card has: the kernel sends what is for it, and all who see it let it fall.
const nobody = "02:00:00:00:00:99"

var holes atomic.Int64

// newHoleSite makes the namespace and its two cables. The addresses are from 198.18.0.0/15, which is kept for benchmarks
// between two networks, RFC 2544, appendix C.2.2.
func newHoleSite() (_ *site, err error) {
	if os.Getuid() != 0 {
		return nil, errors.New("needs root for a network namespace")
	}
	id := fmt.Sprintf("%d-%d", os.Getpid(), holes.Add(1))
	s := &site{namespace: "failover-" + id}
	if err := ip("netns", "add", s.namespace); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if err := ip("-n", s.namespace, "link", "set", "lo", "up"); err != nil {
		return nil, err
	}
	block := rand.IntN(1 << 13)
	for i := range s.cables {
		base := [4]byte{198, 18, byte(block >> 5), byte(block<<3) + byte(i)<<2} // a network of four addresses each
		at := func(n byte) netip.Addr { return netip.AddrFrom4([4]byte{base[0], base[1], base[2], base[3] + n}) }
		c := cable{fmt.Sprintf("fo%s.%d", id, i), fmt.Sprintf("far%d", i), at(1), at(2)}
		s.cables[i] = c
		for _, args := range [][]string{
			{"link", "add", c.near, "type", "veth", "peer", "name", c.far, "netns", s.namespace},
			{"addr", "add", c.nearAddr.String() + "/30", "dev", c.near},
			{"link", "set", c.near, "up"},
			{"-n", s.namespace, "addr", "add", c.farAddr.String() + "/30", "dev", c.far},
			{"-n", s.namespace, "link", "set", c.far, "up"},
		} {
			if err := ip(args...); err != nil {
				return nil, err
			}
		}
	}
	s.tier1, s.tier2, s.server = s.cables[0].nearAddr, s.cables[1].nearAddr, s.cables[1].farAddr
	return s, nil
}

// argv returns what runs a program where the server under test belongs; the program keeps the process that ip starts as.
func (s *site) argv(argv ...string) []string {
	if s.namespace == "" {
		return argv
	}
	return append([]string{"ip", "netns", "exec", s.namespace}, argv...)
}

// dig makes the cable to the first tier swallow every packet, in both directions: neither SYN-ACK nor FIN nor RST arrives.
func (s *site) dig() error {
	c := s.cables[0]
	return errors.Join(
		ip("-n", s.namespace, "neigh", "replace", c.nearAddr.String(), "lladdr", nobody, "dev", c.far, "nud", "permanent"),
		ip("neigh", "replace", c.farAddr.String(), "lladdr", nobody, "dev", c.near, "nud", "permanent"))
}

// fill undoes dig.
func (s *site) fill() error {
	c := s.cables[0]
	return errors.Join(
		ip("neigh", "del", c.farAddr.String(), "dev", c.near),
		ip("-n", s.namespace, "neigh", "del", c.nearAddr.String(), "dev", c.far))
}

// close takes the namespace away, and the cables with it. Nothing may run in it any more.
func (s *site) close() error {
	if s.namespace == "" {
		return nil
	}
	var errs []error
	for _, c := range s.cables {
		// The namespace would take them with it, but only some time after.
		if c.near != "" && exists(c.near) {
			errs = append(errs, ip("link", "delete", c.near))
		}
	}
	return errors.Join(append(errs, ip("netns", "delete", s.namespace))...)
}

func exists(card string) bool {
	_, err := os.Stat("/sys/class/net/" + card)
	return err == nil
}

// ip runs the command of that name.
func ip(args ...string) error {
	// Not under the context of the run: a namespace is taken away when the run was cancelled, too.
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if out, err := exec.CommandContext(ctx, "ip", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
