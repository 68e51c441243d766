package gateway

import (
	"fmt"
	"time"

	"dnsgateway/gateway/admin"
	"dnsgateway/gateway/forward"
	"dnsgateway/gateway/listen"
	"dnsgateway/gateway/observe"
	"dnsgateway/gateway/pipeline"
	"dnsgateway/gateway/wire"
)

// queryObserver carries what the pipeline reports to the metrics.
type queryObserver struct {
	metrics    *observe.Metrics
	transports [wire.NumTransports]*observe.Transport
}

func newQueryObserver(m *observe.Metrics) *queryObserver {
	o := &queryObserver{metrics: m}
	for t := range wire.NumTransports {
		o.transports[t] = m.Transport(t.String())
	}
	return o
}

// outcomes and events map the pipeline's to the metrics'.
var outcomes = [pipeline.NumOutcomes]observe.Outcome{
	pipeline.Hit:     observe.Hit,
	pipeline.Miss:    observe.Miss,
	pipeline.Local:   observe.Local,
	pipeline.Refused: observe.Refused,
	pipeline.Dropped: observe.Dropped,
	pipeline.Limited: observe.Limited,
	pipeline.Stale:   observe.Stale,
}

var events = [pipeline.NumEvents]observe.Event{
	pipeline.Coalesced: observe.Coalesced,
	pipeline.Prefetch:  observe.Prefetch,
	pipeline.Shed:      observe.Shed,
}

// Query implements pipeline.Observer.
func (o *queryObserver) Query(t wire.Transport, lane uint8, rcode uint16, outcome pipeline.Outcome) bool {
	return o.transports[t].Query(lane, outcomes[outcome], rcode)
}

// Took implements pipeline.Observer.
func (o *queryObserver) Took(t wire.Transport, lane uint8, outcome pipeline.Outcome, d time.Duration) {
	o.transports[t].Took(lane, outcomes[outcome], d)
}

// Count implements pipeline.Observer.
func (o *queryObserver) Count(e pipeline.Event) { o.metrics.Count(events[e]) }

// upstreamObserver carries what the groups report to the metrics.
type upstreamObserver struct{ metrics *observe.Metrics }

// Server implements forward.Observer.
func (o upstreamObserver) Server(group, server string) forward.ServerObserver {
	return o.metrics.Server(group, server)
}

func (g *Gateway) cacheStats() observe.CacheStats {
	s := g.cache.Stats()
	return observe.CacheStats{
		Entries: s.Entries, Bytes: s.Bytes, MaxBytes: s.MaxBytes, Evictions: s.Evictions,
		Hits: g.metrics.Queries(observe.Hit), Stale: g.metrics.Queries(observe.Stale), Misses: g.metrics.Queries(observe.Miss),
	}
}

func (g *Gateway) inflightStats() observe.InflightStats {
	stats := observe.InflightStats{Now: g.policy.Load().pipeline.Inflight(), Max: g.cfg.Limits.Inflight}
	for _, s := range g.sockets {
		for _, server := range s.servers {
			if packet, ok := server.(*listen.Packet); ok {
				stats.Shed += packet.Shed()
				stats.Unsent += packet.Unsent()
			}
		}
	}
	return stats
}

func (g *Gateway) listenerStats() []observe.ListenerStats {
	var out []observe.ListenerStats
	for _, s := range g.sockets {
		for _, server := range s.servers {
			if open, ok := server.(interface{ Connections() int }); ok {
				out = append(out, observe.ListenerStats{
					Listener: server.Name(), Transport: s.transportOf(server).String(), Open: open.Connections(),
				})
			}
		}
	}
	return out
}

// Ready says whether the gateway should be given queries: every listener serves, it is not stopping, and each group has
// a server that is not known to be failing.
func (g *Gateway) Ready() admin.Readiness {
	r := admin.Readiness{Ready: true}
	no := func(format string, args ...any) {
		r.Ready = false
		r.Reasons = append(r.Reasons, fmt.Sprintf(format, args...))
	}
	serving := g.serving.Load() && !g.draining.Load()
	if g.draining.Load() {
		no("the gateway is stopping")
	} else if !serving {
		no("the listeners do not serve yet")
	}
	for _, s := range g.sockets {
		r.Listeners = append(r.Listeners, admin.Listener{
			Name: s.Listener.Name, URL: s.Listener.URL, Addr: s.Addr.String(), Ready: serving,
		})
	}
	for i, u := range g.policy.Load().groups {
		group := admin.Group{Name: g.cfg.Upstreams[i].Name}
		for _, s := range u.Status() {
			server := admin.UpstreamServer{URL: s.URL, Tier: s.Tier, State: s.State}
			if s.State == forward.StateFailing {
				server.Error = s.LastError
			} else {
				group.Ready = true
			}
			group.Servers = append(group.Servers, server)
		}
		if !group.Ready {
			no("every server of group %q is failing", group.Name)
		}
		r.Groups = append(r.Groups, group)
	}
	return r
}
