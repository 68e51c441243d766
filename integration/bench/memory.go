//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

const mebi = 1 << 20

// spareFiles are the descriptors of a target that are for other things than its clients' connections.
const spareFiles = 6000

// settle is how long a server gets to come to rest before its memory is read.
const settle = 3 * time.Second

func rest(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(settle):
		return nil
	}
}

// with starts a target, runs f and stops the target.
func (b *bench) with(ctx context.Context, t *target, l load, f func(s *server) error) error {
	s, err := b.start(ctx, t, l)
	if err != nil {
		return err
	}
	return errors.Join(f(s), s.stop())
}

// memory reads how much memory a target uses: at rest, for idle connections, with 100,000 names. Each in a process of its
// own, so that none pays for what another left behind.
func (b *bench) memory(ctx context.Context, t *target, round int) error {
	v := map[string]float64{}
	full := load{cores: b.server(1), entries: fullNames}
	if err := b.with(ctx, t, full, func(s *server) error { return b.fullCache(ctx, s, v) }); err != nil {
		return err
	}
	crowd := full
	if crowd.conns = b.conns; t.files > 0 {
		crowd.conns = min(b.conns, (b.files-spareFiles)/t.files)
	}
	for _, kind := range []struct {
		name      string
		addr      netip.AddrPort
		encrypted bool
	}{{"dot", dotAddr, true}, {"tcp", udpAddr, false}} {
		if err := b.with(ctx, t, crowd, func(s *server) error {
			each, held, err := b.idle(ctx, s, kind.addr, kind.encrypted, crowd.conns)
			v[kind.name+"_each"], v[kind.name+"_held"] = each/1024, float64(held)
			return err
		}); err != nil {
			return err
		}
	}
	b.record(record{Target: t.name, Round: round, Test: "mem", Values: v})
	return nil
}

// fullCache reads the memory before and after 100,000 names, and how many of them had to be fetched again.
func (b *bench) fullCache(ctx context.Context, s *server, v map[string]float64) error {
	v["start"] = float64(s.first.Microseconds()) / 1000
	if err := rest(ctx); err != nil {
		return err
	}
	v["rest"] = float64(status(s.pids(), "VmRSS")) / mebi
	file, err := b.paths.names(fill, 0, fullNames, false)
	if err != nil {
		return err
	}
	if err := b.ask(ctx, file, 2); err != nil {
		return err
	}
	if err := rest(ctx); err != nil {
		return err
	}
	v["full"] = float64(status(s.pids(), "VmRSS")) / mebi
	before, err := readCounters(b.counters)
	if err != nil {
		return err
	}
	// Once, and in another order: a cache that evicts in the order of arrival would always have just lost the next one.
	shuffled, err := b.paths.names(fill, 0, fullNames, true)
	if err != nil {
		return err
	}
	if err := b.ask(ctx, shuffled, 1); err != nil {
		return err
	}
	after, err := readCounters(b.counters)
	v["refetched"] = float64(after.responses - before.responses)
	return err
}

// idle returns the memory that each idle connection takes, in octets, and how many of them the target held.
func (b *bench) idle(ctx context.Context, s *server, addr netip.AddrPort, encrypted bool, n int) (each float64, held int, err error) {
	// What is allocated once, at the first connections, is no connection's.
	first, err := openIdle(ctx, addr, encrypted, min(50, n))
	for _, c := range first {
		c.Close()
	}
	if err != nil {
		return 0, 0, err
	}
	if err := rest(ctx); err != nil {
		return 0, 0, err
	}
	before := status(s.pids(), "VmRSS")
	conns, err := openIdle(ctx, addr, encrypted, n)
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	if err != nil {
		fmt.Fprintf(b.log, "  %v\n", err) // how many it held is in the table
	}
	if err := rest(ctx); err != nil {
		return 0, 0, err
	}
	held = established(addr)
	if held == 0 {
		return 0, 0, fmt.Errorf("not one of %d connections to %v was held", n, addr)
	}
	return float64(status(s.pids(), "VmRSS")-before) / float64(held), held, nil
}

// scale measures hits over UDP on one and two cores, and with caches of more and more names.
func (b *bench) scale(ctx context.Context, t *target, round int) error {
	g := &generator{b.paths.udpblast, b.seconds}
	one := func(name string, l load) error {
		file, err := b.paths.names(hits, 0, l.entries, true)
		if err != nil {
			return err
		}
		filled, err := b.paths.names(hits, 0, l.entries, false)
		if err != nil {
			return err
		}
		return b.with(ctx, t, l, func(s *server) error {
			if err := b.ask(ctx, filled, 2); err != nil {
				return err
			}
			r, err := b.measure(ctx, s, fmt.Sprintf("%s.%d.%s", t.name, round, name),
				func(int) ([]string, error) { return g.blast(file), nil })
			if err != nil {
				return err
			}
			r.Target, r.Round, r.Test = t.name, round, name
			b.record(r)
			return nil
		})
	}
	for cores := 1; cores <= 2; cores++ {
		if cores > 1 && t.oneCore {
			continue
		}
		if err := one(coresTest(cores), load{cores: b.server(cores), entries: hitNames}); err != nil {
			return err
		}
	}
	for names := 1000; names <= b.names; names *= 10 {
		if err := one(namesTest(names), load{cores: b.server(1), entries: names}); err != nil {
			return err
		}
	}
	return nil
}

// The names of the scale mode's tests.
func coresTest(n int) string { return fmt.Sprintf("cores_%d", n) }
func namesTest(n int) string { return fmt.Sprintf("names_%d", n) }
