package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"time"

	"dnsgateway/gateway/lab"
)

// run is one fault against one target.
type run struct {
	*options
	target   target
	fault    fault
	dir      string // holds the folder of this run
	log      io.Writer
	measured func() // called when the load is over
}

// do makes the run. When it returns nothing of it is left.
func (r *run) do(ctx context.Context) (_ result, err error) {
	s, err := newSite(r.fault)
	if err != nil {
		return result{}, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	w := newLoad(r.plan)
	l, err := lab.Start(ctx, lab.Config{
		Servers: []lab.ServerConfig{
			{Name: "tier1", Scheme: lab.TLS, Addr: netip.AddrPortFrom(s.tier1, 0)},
			{Name: "tier2", Scheme: lab.TLS, Addr: netip.AddrPortFrom(s.tier2, 0)},
		},
		OnQuery: func(server string, raw []byte) { w.reach(map[string]int32{"tier1": 1, "tier2": 2}[server], raw) },
	})
	if err != nil {
		return result{}, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	c, err := r.course(l, s)
	if err != nil {
		return result{}, err
	}
	argv, env, err := r.target.command(c)
	if err != nil {
		return result{}, err
	}
	p, err := startProcess(ctx, s.argv(argv...), env, c.dot)
	if err != nil {
		return result{}, err
	}
	defer func() {
		if wrong := p.stop(); wrong != nil && r.target.judged() {
			err = errors.Join(err, wrong)
		}
	}()
	take := func() (census, error) { return count(ctx, p.cmd.Process.Pid, c.admin, r.target.judged()) }
	w.udp, w.dot = c.udp.String(), c.dot.String()
	w.tls = &tls.Config{RootCAs: l.Roots(), ServerName: "localhost", NextProtos: []string{"dot"}, MinVersion: tls.VersionTLS12}
	if r.target.judged() {
		if err := w.greet(ctx); err != nil {
			return result{}, err
		}
	}
	before, err := steady(ctx, take)
	if err != nil {
		return result{}, err
	}
	most, err := r.drive(ctx, w, c, s, p.cmd.Process.Pid)
	if err != nil {
		return result{}, err
	}
	r.measured()
	res := summarize(r.plan, w)
	res.Fault = r.fault.name
	res.Most, res.Before = most, before
	res.After, err = r.rest(ctx, before, take)
	return res, err
}

// course takes ports and writes the files of the run.
func (r *run) course(l *lab.Lab, s *site) (*course, error) {
	dir, err := os.MkdirTemp(r.dir, r.target.name()+"-"+r.fault.name+"-") // a run may be made again
	if err != nil {
		return nil, err
	}
	files, err := l.WriteFiles(dir, "localhost", s.server.String())
	if err != nil {
		return nil, err
	}
	ports, err := lab.FreePorts(3)
	if err != nil {
		return nil, err
	}
	at := func(i int) netip.AddrPort { return netip.AddrPortFrom(s.server, uint16(ports[i])) }
	return &course{
		tier1: l.Server("tier1"), tier2: l.Server("tier2"), files: files, dir: dir, showConfig: r.config,
		udp: at(0), dot: at(1), admin: at(2),
	}, nil
}

// drive runs the load, breaks the first tier and heals it at their time, and returns the most connections at once to each
// tier.
func (r *run) drive(ctx context.Context, w *load, c *course, s *site, pid int) (most [2]int, err error) {
	begin := time.Now().Add(200 * time.Millisecond) // the clients connect
	zero := begin.Add(warmUp)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var loadErr error
	done := make(chan struct{})
	go func() {
		defer close(done)
		if loadErr = w.run(ctx, begin); loadErr != nil {
			cancel()
		}
	}()
	var sampled chan int
	if r.fault.holed {
		// What the first tier thinks to be open is of no use: it does not hear of an end. So the other end is asked, often.
		sampled = make(chan int, 1)
		go func() {
			most := 0
			for sleep(ctx, 20*time.Millisecond) {
				most = max(most, connections(pid, c.tier1.Addr()))
			}
			sampled <- most
		}()
	}
	for _, step := range []struct {
		at time.Duration
		do func() error
	}{
		{r.plan.at, func() error { return r.begin(c, s) }},
		{r.plan.until, func() error { return r.end(c, s) }},
	} {
		if !sleep(ctx, time.Until(zero.Add(step.at))) {
			err = ctx.Err()
			break
		}
		if err = step.do(); err != nil {
			cancel()
			break
		}
	}
	<-done
	cancel()
	if err := errors.Join(loadErr, err); err != nil {
		if sampled != nil {
			<-sampled
		}
		return most, err
	}
	_, most[0] = c.tier1.OpenConns()
	_, most[1] = c.tier2.OpenConns()
	if sampled != nil {
		most[0] = <-sampled
	}
	return most, nil
}

func (r *run) begin(c *course, s *site) error {
	if r.fault.holed {
		return s.dig()
	}
	return c.tier1.SetFault(r.fault.lab)
}

func (r *run) end(c *course, s *site) error {
	if r.fault.holed {
		return s.fill()
	}
	return c.tier1.SetFault(lab.Fault{})
}

// rest waits until the process holds no more than before the first question, all clients being gone and idle connections
// to upstreams having had their time, and returns the last census.
func (r *run) rest(ctx context.Context, before census, take func() (census, error)) (census, error) {
	for end := time.Now().Add(r.settle); ; {
		now, err := take()
		if err != nil {
			return now, fmt.Errorf("counting goroutines and descriptors: %w", err)
		}
		if now.Goroutines <= before.Goroutines && now.Descriptors <= before.Descriptors || time.Now().After(end) {
			return now, nil
		}
		if !sleep(ctx, 500*time.Millisecond) {
			return now, ctx.Err()
		}
	}
}
