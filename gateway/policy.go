package gateway

import (
	"cmp"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"dnsgateway/gateway/access"
	"dnsgateway/gateway/config"
	"dnsgateway/gateway/forward"
	"dnsgateway/gateway/pipeline"
	"dnsgateway/gateway/route"
	"dnsgateway/gateway/wire"
)

// policy is all that may change answers. It is built whole and never changed.
type policy struct {
	pipeline *pipeline.Pipeline
	groups   []*forward.Group // in the file's order
}

// close ends the groups' connections. No query may be under way.
func (p *policy) close() error {
	var errs []error
	for _, u := range p.groups {
		errs = append(errs, u.Close())
	}
	return errors.Join(errs...)
}

func (g *Gateway) buildPolicy(cfg *config.Config) (_ *policy, err error) {
	p := &policy{}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	index := groupIndex(cfg.Upstreams)
	groups := make([]pipeline.Group, len(cfg.Upstreams))
	for _, c := range cfg.Upstreams {
		u, err := g.buildGroup(c, cfg.Bootstrap)
		if err != nil {
			return nil, config.At(c.Place, err)
		}
		p.groups = append(p.groups, u)
		groups[index[c.Name]] = pipeline.Group{Name: c.Name, Upstream: u, TrustAD: encrypted(c), Recovered: u.Recovered}
	}
	routes, err := route.New(routeRules(cfg.Rules, index))
	if err != nil {
		return nil, fmt.Errorf("rules: %w", err)
	}
	admit, err := access.New(access.Config{
		Allow: cfg.Access.Allow, Everywhere: cfg.Access.Set, Drop: cfg.Access.Otherwise == config.Drop,
		PerClient: cfg.Limits.PerClient, PrefixV4: cfg.Limits.PrefixV4, PrefixV6: cfg.Limits.PrefixV6,
	})
	if err != nil {
		return nil, fmt.Errorf("access: %w", err)
	}
	p.pipeline, err = pipeline.New(pipeline.Config{
		Access: admit, Cache: g.cache, View: view(cfg), Groups: groups, Routes: routes, Chaos: cfg.Local.Chaos,
		Inflight: cfg.Limits.Inflight,
		Stale:    pipeline.StaleConfig{After: cfg.Cache.Stale.After, TTL: uint32(cfg.Cache.Stale.TTL / time.Second)},
		Shape: wire.Shape{
			UDPSize:   uint16(cfg.Limits.UDPSize),
			Keepalive: keepalive(cfg.Limits.TCPIdle),
		},
		Observer: newQueryObserver(g.metrics),
		Logger:   g.log,
	})
	if err != nil {
		return nil, fmt.Errorf("pipeline: %w", err)
	}
	return p, nil
}

// groupIndex numbers the groups by their names as the pipeline does: the group "default" is the first one.
func groupIndex(groups []config.Group) map[string]int {
	index := map[string]int{config.DefaultGroup: 0}
	for _, c := range groups {
		if c.Name != config.DefaultGroup {
			index[c.Name] = len(index)
		}
	}
	return index
}

// routeRules turns the rules of the file into those of the table.
func routeRules(in []config.Rule, index map[string]int) []route.Rule {
	out := make([]route.Rule, len(in))
	for i, c := range in {
		r := &out[i]
		r.Group = index[c.Use]
		for _, n := range c.Names {
			switch n.Match {
			case config.Below:
				r.Below = append(r.Below, n.Values...)
			case config.Exact:
				r.Exact = append(r.Exact, n.Values...)
			case config.Regexp:
				r.Regexps = append(r.Regexps, n.Values...)
			}
		}
	}
	return out
}

// view returns the number that stands in the cache's keys for whatever may change answers: the rules, and for each group the
// servers, whom it takes for one, and what it passes on. How fast it is about it (pick, deadline, hedge, breaker) changes no
// answer, and no more does where all this stands in the file. So a configuration that says the same finds what the cache has,
// and one that does not begins anew.
func view(cfg *config.Config) uint32 {
	type (
		name struct {
			Match  config.Match
			Values []string
		}
		rule struct {
			Names []name
			Use   string
		}
		group struct {
			Name    string
			Private bool
			NextOn  config.NextOn
			Tiers   [][]config.Server
		}
	)
	var all struct {
		Rules     []rule
		Groups    []group
		Bootstrap []config.Server // finds the servers that are given by name
	}
	for _, c := range cfg.Rules {
		r := rule{Use: c.Use}
		for _, n := range c.Names {
			r.Names = append(r.Names, name{n.Match, n.Values})
		}
		all.Rules = append(all.Rules, r)
	}
	for _, c := range cfg.Upstreams {
		g := group{Name: c.Name, Private: c.Private, NextOn: c.NextOn}
		for _, tier := range c.Tiers {
			g.Tiers = append(g.Tiers, nowhere(tier))
		}
		all.Groups = append(all.Groups, g)
	}
	slices.SortFunc(all.Groups, func(a, b group) int { return cmp.Compare(a.Name, b.Name) })
	all.Bootstrap = nowhere(cfg.Bootstrap)
	text, err := json.Marshal(all)
	if err != nil {
		panic("gateway: a configuration that JSON cannot say: " + err.Error())
	}
	sum := sha256.Sum256(text)
	return binary.BigEndian.Uint32(sum[:])
}

// nowhere returns the servers without their places in the file, and without the key that we show to them.
func nowhere(servers []config.Server) []config.Server {
	out := slices.Clone(servers)
	for i := range out {
		s := &out[i]
		s.Place, s.CAFile = config.Place{}, ""
		if s.ClientCert != nil {
			s.ClientCert = &config.KeyPair{Cert: s.ClientCert.Cert}
		}
	}
	return out
}

// encrypted reports whether nobody between the group's servers and us can change what they say: then their AD bit may be
// believed (RFC 4035, section 4.9.3).
func encrypted(c config.Group) bool {
	for _, tier := range c.Tiers {
		for _, s := range tier {
			if s.Scheme == config.UDP || s.Scheme == config.TCP || s.Scheme == config.SDNS {
				return false // a stamp may be for plain DNS
			}
		}
	}
	return true
}

// keepalive returns idle in the units of the edns-tcp-keepalive option: 100 ms, RFC 7828, section 3.1.
func keepalive(idle time.Duration) uint16 {
	return uint16(min(idle/(100*time.Millisecond), 65535))
}

func (g *Gateway) buildGroup(c config.Group, bootstrap []config.Server) (*forward.Group, error) {
	fc := forward.Config{
		Name: c.Name, Pick: string(c.Pick), Deadline: c.Deadline,
		NextOn: forward.NextOn{
			Timeout: c.NextOn.Timeout, Connect: c.NextOn.Connect, ServFail: c.NextOn.ServFail, Refused: c.NextOn.Refused,
		},
		Hedge:   forward.Hedge{Never: c.Hedge.Never, After: c.Hedge.After},
		Breaker: forward.Breaker{OpenAfter: c.Breaker.OpenAfter, Probe: c.Breaker.Probe, MaxProbe: c.Breaker.MaxProbe},
		Logger:  g.log, Observer: upstreamObserver{g.metrics},
	}
	for _, tier := range c.Tiers {
		servers, err := buildServers(tier)
		if err != nil {
			return nil, err
		}
		fc.Tiers = append(fc.Tiers, servers)
	}
	var err error
	if fc.Bootstrap, err = buildServers(bootstrap); err != nil {
		return nil, err
	}
	return forward.NewGroup(fc)
}

func buildServers(in []config.Server) ([]forward.Server, error) {
	out := make([]forward.Server, len(in))
	for i, c := range in {
		s := forward.Server{
			URL: c.URL, Scheme: string(c.Scheme), Host: c.Host, Port: c.Port, Path: c.Path, VerifyName: c.VerifyName,
			Pins: c.Pins,
		}
		if c.CA != nil {
			s.Roots = x509.NewCertPool()
			if !s.Roots.AppendCertsFromPEM(c.CA) {
				return nil, fmt.Errorf("%s: no certificate in %s", c.URL, c.CAFile)
			}
		}
		if c.ClientCert != nil {
			pair, err := tls.X509KeyPair(c.ClientCert.Cert, c.ClientCert.Key)
			if err != nil {
				return nil, fmt.Errorf("%s: client certificate: %w", c.URL, err)
			}
			s.ClientCert = &pair
		}
		out[i] = s
	}
	return out, nil
}
