// Package gateway is the front door: it turns a checked configuration into running parts, and is the only place where
// the parts meet.
//
// Two lifetimes stand side by side. What belongs to the process (logger, metrics, cache, sockets, the admin endpoint) is
// made once. What belongs to the policy (access, upstream groups, the pipeline) is built whole, never changed, and
// reached through one atomic pointer, so that all of it can be replaced at once while queries run.
//
// What surprises a newcomer: New opens nothing, Start binds every socket or none, and only Run answers.
package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"dnsgateway/gateway/admin"
	"dnsgateway/gateway/cache"
	"dnsgateway/gateway/config"
	"dnsgateway/gateway/listen"
	"dnsgateway/gateway/observe"
	"dnsgateway/gateway/wire"
)

const (
	// minGrace is how long a stop waits at least for the queries in flight. It is longer than the default deadline of a
	// group; where a group has a longer one, the grace is graceMargin longer than that: each of them gets its answer.
	minGrace    = 5 * time.Second
	graceMargin = time.Second
	// adminGrace is how long a stop waits for requests to the admin endpoint, after everything else.
	adminGrace = time.Second
)

// Options are what a Gateway gets from its program.
type Options struct {
	Logger  *slog.Logger // nil discards
	Version string       // for metrics
}

// Listening is one bound socket.
type Listening struct {
	Listener config.Listener
	Network  string         // udp, tcp or udp+tcp
	Addr     netip.AddrPort // as bound
}

// Gateway is one running gateway. New, Start and Run are called once each and in this order, Close instead of Start or of
// Run; Addrs and Ready may be called at any time after Start, from any goroutine.
type Gateway struct {
	cfg     *config.Config
	log     *slog.Logger
	metrics *observe.Metrics
	cache   *cache.Cache // nil: off
	tls     *tls.Config  // nil without certificates
	admin   *admin.Server
	sockets []socket
	grace   time.Duration
	policy  atomic.Pointer[policy]

	snapshot *snapshot // nil: the cache is kept nowhere

	serving  atomic.Bool
	draining atomic.Bool
}

var _ listen.Handler = (*Gateway)(nil)

// New builds a gateway from cfg, which comes from config.Load and is not changed. It opens no socket and starts nothing.
func New(cfg *config.Config, o Options) (*Gateway, error) {
	g := &Gateway{cfg: cfg, log: o.Logger, grace: minGrace}
	for _, u := range cfg.Upstreams {
		g.grace = max(g.grace, u.Deadline+graceMargin)
	}
	if g.log == nil {
		g.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if g.tls, err = buildTLS(cfg.TLS); err != nil {
		return nil, err
	}
	if g.metrics, err = observe.New(prometheus.NewRegistry(), o.Version); err != nil {
		return nil, fmt.Errorf("making metrics: %w", err)
	}
	if cfg.Cache.Size > 0 {
		g.cache, err = cache.New(cache.Config{
			MaxBytes: cfg.Cache.Size, MinTTL: cfg.Cache.MinTTL, MaxTTL: cfg.Cache.MaxTTL, NegativeMaxTTL: cfg.Cache.NegativeMax,
			StaleFor: cfg.Cache.Stale.For, PrefetchHits: uint32(cfg.Cache.Prefetch.Hits), PrefetchRemaining: cfg.Cache.Prefetch.Remaining,
		})
		if err != nil {
			return nil, fmt.Errorf("making the cache: %w", err)
		}
		g.metrics.WatchCache(g.cacheStats)
		if cfg.Cache.Save.File != "" {
			g.snapshot = newSnapshot(g.cache, cfg.Cache.Save.File, cfg.Cache.Save.Every, g.log)
			g.metrics.WatchSnapshot(g.snapshot.Stats)
		}
	}
	p, err := g.buildPolicy(cfg)
	if err != nil {
		return nil, err
	}
	g.policy.Store(p)
	g.metrics.WatchInflight(g.inflightStats)
	return g, nil
}

// Expect is told what comes next by the one door that every transport enters by.
func (g *Gateway) Expect(qs []wire.Query) { g.policy.Load().pipeline.Expect(qs) }

// ServeWire is the fast half of the one door that every transport enters by.
func (g *Gateway) ServeWire(dst []byte, q *wire.Query) ([]byte, wire.Verdict) {
	return g.policy.Load().pipeline.ServeWire(dst, q)
}

// Resolve is the other half of that door.
func (g *Gateway) Resolve(ctx context.Context, dst []byte, q *wire.Query) ([]byte, error) {
	return g.policy.Load().pipeline.Resolve(ctx, dst, q)
}

// Start binds every socket of the configuration. After an error none is bound; the error names the entry's place in the
// file.
func (g *Gateway) Start(ctx context.Context) error {
	if err := g.bind(ctx); err != nil {
		return errors.Join(err, g.Close())
	}
	g.metrics.WatchListeners(g.listenerStats)
	return nil
}

// Addrs returns the bound sockets in the file's order.
func (g *Gateway) Addrs() []Listening {
	out := make([]Listening, len(g.sockets))
	for i, s := range g.sockets {
		out[i] = s.Listening
	}
	return out
}

// AdminAddr returns where the admin endpoint is bound, the zero value if it is off.
func (g *Gateway) AdminAddr() netip.AddrPort {
	if g.admin == nil {
		return netip.AddrPort{}
	}
	return addrPort(g.admin.Addr())
}

// Run answers queries until ctx ends. Then it takes no new ones, finishes those in flight within a grace time, and
// returns nil. It returns an error when a listener fails, which ends the others in the same way.
func (g *Gateway) Run(ctx context.Context) error {
	background, stopBackground := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBackground()
	p := g.policy.Load()
	var groups errgroup.Group
	for _, u := range p.groups {
		groups.Go(func() error { return u.Run(background) })
	}
	groups.Go(func() error { return p.pipeline.Run(background) })
	endSnapshot := g.keep(background)
	adminDone := make(chan struct{})
	go func() {
		defer close(adminDone)
		g.serveAdmin()
	}()

	serve, ctx := errgroup.WithContext(ctx)
	for _, s := range g.sockets {
		for _, server := range s.servers {
			serve.Go(func() error {
				if err := server.Serve(); err != nil {
					return fmt.Errorf("listener %s: %w", server.Name(), err)
				}
				return nil
			})
		}
	}
	g.serving.Store(true)
	g.log.Info("serving", "source", g.cfg.Source, "listeners", len(g.sockets))

	<-ctx.Done()
	g.draining.Store(true)
	g.log.Info("stopping", "grace", g.grace.String())
	limit, cancel := context.WithTimeout(background, g.grace)
	defer cancel()
	drained := g.shutdownListeners(limit)
	err := serve.Wait()
	stopBackground() // a load of the snapshot too, before the admin endpoint would wait for a flush that waits for it
	err = errors.Join(err, groups.Wait(), p.close())
	g.shutdownAdmin()
	<-adminDone
	endSnapshot() // after the last flush by the admin endpoint: what it forgot must not come back
	if drained != nil {
		g.log.Warn("queries were cut off", "err", drained)
	}
	g.log.Info("stopped")
	return err
}

// Close frees what New and Start made when Run is not reached.
func (g *Gateway) Close() error {
	limit, cancel := context.WithTimeout(context.Background(), g.grace)
	defer cancel()
	err := errors.Join(g.shutdownListeners(limit), g.policy.Load().close())
	g.shutdownAdmin()
	return err
}

func (g *Gateway) shutdownListeners(limit context.Context) error {
	var all errgroup.Group
	for _, s := range g.sockets {
		for _, server := range s.servers {
			all.Go(func() error { return server.Shutdown(limit) })
		}
	}
	return all.Wait()
}

// serveAdmin serves the admin endpoint until its Shutdown. Its failure is the operator's matter and no reason to leave
// clients without answers.
func (g *Gateway) serveAdmin() {
	if g.admin == nil {
		return
	}
	if err := g.admin.Serve(); err != nil {
		g.log.Error("the admin endpoint has failed; health and metrics are gone until the next start", "err", err)
	}
}

// shutdownAdmin closes the admin endpoint. A request that has to be cut off, a slow scrape's for one, spoils no stop.
func (g *Gateway) shutdownAdmin() {
	if g.admin == nil {
		return
	}
	limit, cancel := context.WithTimeout(context.Background(), adminGrace)
	defer cancel()
	if err := g.admin.Shutdown(limit); err != nil {
		g.log.Debug("closing the admin endpoint", "err", err)
	}
}
