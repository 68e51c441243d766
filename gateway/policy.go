package gateway

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"dnsgateway/gateway/access"
	"dnsgateway/gateway/config"
	"dnsgateway/gateway/forward"
	"dnsgateway/gateway/pipeline"
	"dnsgateway/gateway/wire"
)

// policy is all that may change answers. It is built whole and never changed.
type policy struct {
	pipeline *pipeline.Pipeline
	groups   []*forward.Group
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
	var queries pipeline.Exchanger
	trusted := false
	for _, c := range cfg.Upstreams {
		u, err := g.buildGroup(c, cfg.Bootstrap)
		if err != nil {
			return nil, config.At(c.Place, err)
		}
		p.groups = append(p.groups, u)
		if c.Name == config.DefaultGroup {
			queries, trusted = u, encrypted(c)
		}
	}
	admit, err := access.New(access.Config{
		Allow: cfg.Access.Allow, Everywhere: cfg.Access.Set, Drop: cfg.Access.Otherwise == config.Drop,
		PerClient: cfg.Limits.PerClient, PrefixV4: cfg.Limits.PrefixV4, PrefixV6: cfg.Limits.PrefixV6,
	})
	if err != nil {
		return nil, fmt.Errorf("access: %w", err)
	}
	p.pipeline, err = pipeline.New(pipeline.Config{
		Access: admit, Cache: g.cache, Upstream: queries, Chaos: cfg.Local.Chaos, Inflight: cfg.Limits.Inflight,
		Shape: wire.Shape{
			UDPSize:   uint16(cfg.Limits.UDPSize),
			Keepalive: keepalive(cfg.Limits.TCPIdle),
		},
		TrustAD:  trusted,
		Observer: newQueryObserver(g.metrics),
		Logger:   g.log,
	})
	if err != nil {
		return nil, fmt.Errorf("pipeline: %w", err)
	}
	return p, nil
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
		Logger: g.log, Observer: upstreamObserver{g.metrics},
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
