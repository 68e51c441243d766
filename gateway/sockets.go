package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"

	"dnsgateway/gateway/admin"
	"dnsgateway/gateway/certs"
	"dnsgateway/gateway/config"
	"dnsgateway/gateway/listen"
	"dnsgateway/gateway/wire"
)

// socket is one entry of `listen`, bound. A dns:// entry has two servers.
type socket struct {
	Listening
	servers []listen.Server
}

// backstop bounds the goroutines of a listener's misses. The pipeline's bound on all of them comes first, and answers; this
// one, which does not, is for what is on its way there.
func backstop(inflight int) int { return 2*inflight + 1000 }

// bind opens the admin endpoint and every listener. What was opened before an error stays in g, for Close.
func (g *Gateway) bind(ctx context.Context) error {
	if g.cfg.Admin.Listen.IsValid() {
		if err := g.bindAdmin(ctx); err != nil {
			return err
		}
	}
	var errs []error // a taken port is often one of several: all of them in one run
	for _, l := range g.cfg.Listen {
		s, err := g.bindListener(ctx, l)
		if err != nil {
			errs = append(errs, config.At(l.Place, explainBind(err)))
		}
		if len(s.servers) > 0 {
			s.Listener, s.Addr = l, addrPort(s.servers[0].Addr())
			g.sockets = append(g.sockets, s)
		}
	}
	return errors.Join(errs...)
}

// buildTLS returns the servers' TLS configuration, nil without certificates: config.Load has seen to it that no listener
// needs one then.
func buildTLS(pairs []config.KeyPair) (*tls.Config, error) {
	if len(pairs) == 0 {
		return nil, nil
	}
	var in []certs.Pair
	for _, p := range pairs {
		pair := certs.Pair{CertPEM: p.Cert, KeyPEM: p.Key, Source: p.CertFile, KeySource: p.KeyFile, Names: p.Names}
		if _, err := certs.NewStore([]certs.Pair{pair}); err != nil { // one by one, to know the place
			return nil, config.At(p.Place, err)
		}
		in = append(in, pair)
	}
	store, err := certs.NewStore(in)
	if err != nil {
		return nil, fmt.Errorf("tls: %w", err)
	}
	return &tls.Config{GetCertificate: store.Get, MinVersion: tls.VersionTLS12}, nil
}

func (g *Gateway) bindAdmin(ctx context.Context) error {
	c := admin.Config{Ready: g.Ready, Metrics: g.metrics.Handler(g.log), Token: g.cfg.Admin.Token, Logger: g.log}
	if g.cache != nil {
		c.Flush = g.flush
	}
	a, err := admin.New(c)
	if err != nil {
		return err
	}
	if err := a.Listen(ctx, g.cfg.Admin.Listen); err != nil {
		return config.At(g.cfg.Admin.Place, explainBind(err))
	}
	g.admin = a
	return nil
}

func (g *Gateway) bindListener(ctx context.Context, l config.Listener) (s socket, err error) {
	common := listen.Common{Handler: g, Name: l.Name, Addr: l.Addr, Logger: g.log}
	limits := listen.Limits{
		PerClient: g.cfg.Limits.TCPPerClient, PrefixV4: g.cfg.Limits.PrefixV4, PrefixV6: g.cfg.Limits.PrefixV6,
		Idle: g.cfg.Limits.TCPIdle,
	}
	stream := listen.StreamConfig{Common: common, Limits: limits, Pipeline: g.cfg.Limits.TCPPipeline}
	packet := listen.PacketConfig{Common: common, Inflight: backstop(g.cfg.Limits.Inflight), Sockets: l.Sockets}
	var one listen.Server
	switch l.Scheme {
	case config.DNS:
		s.Network = "udp+tcp"
		s.servers, err = bindBoth(ctx, packet, stream)
		return s, err
	case config.UDP:
		s.Network = "udp"
		one, err = listen.ListenPacket(ctx, packet)
	case config.TCP:
		s.Network = "tcp"
		one, err = listen.ListenStream(ctx, stream)
	case config.TLS:
		s.Network = "tcp"
		stream.TLS = g.tls
		one, err = listen.ListenStream(ctx, stream)
	case config.HTTPS:
		s.Network = "tcp"
		if slices.Contains(l.HTTP, "h3") {
			s.Network = "udp+tcp"
		}
		one, err = listen.ListenHTTPS(ctx, listen.HTTPSConfig{
			Common: common, Limits: limits, TLS: g.tls, Path: l.Path, HTTP: l.HTTP,
		})
	case config.QUIC:
		s.Network = "udp"
		one, err = listen.ListenQUIC(ctx, listen.QUICConfig{
			Common: common, TLS: g.tls, Inflight: backstop(g.cfg.Limits.Inflight),
			PerClient: limits.PerClient, PrefixV4: limits.PrefixV4, PrefixV6: limits.PrefixV6,
		})
	default:
		return s, fmt.Errorf("scheme %q cannot be listened on", l.Scheme)
	}
	if err != nil {
		return s, err // one holds a nil pointer of a listener's type
	}
	s.servers = []listen.Server{one}
	return s, nil
}

// bothTries is how often a port is looked for that is free for UDP and TCP alike, when the file leaves it to the system.
const bothTries = 20

// bindBoth binds UDP and TCP on one port.
func bindBoth(ctx context.Context, packet listen.PacketConfig, stream listen.StreamConfig) ([]listen.Server, error) {
	for try := 1; ; try++ {
		udp, err := listen.ListenPacket(ctx, packet)
		if err != nil {
			return nil, err
		}
		stream.Addr = netip.AddrPortFrom(stream.Addr.Addr(), addrPort(udp.Addr()).Port())
		tcp, err := listen.ListenStream(ctx, stream)
		if err == nil {
			return []listen.Server{udp, tcp}, nil
		}
		if closeErr := udp.Shutdown(ctx); closeErr != nil || packet.Addr.Port() != 0 || try == bothTries {
			return nil, errors.Join(err, closeErr)
		}
	}
}

// explainBind adds to a bind error what to do about it.
func explainBind(err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("%w; another program has this port: find it with `ss -lptun`, stop it, or choose another port", err)
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("%w; ports below 1024 need a privilege: choose a higher port, or give the program CAP_NET_BIND_SERVICE", err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("%w; this machine does not have that address: see `ip address`", err)
	}
	return err
}

// addrPort returns a's address, unmapped; a wildcard of both families stays the unspecified IPv6 address.
func addrPort(a net.Addr) netip.AddrPort {
	switch a := a.(type) {
	case *net.TCPAddr:
		ap := a.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	case *net.UDPAddr:
		ap := a.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}

// transportOf returns the transports that s serves, for metrics.
func (s *socket) transportOf(server listen.Server) wire.Transport {
	switch s.Listener.Scheme {
	case config.TLS:
		return wire.DoT
	case config.HTTPS:
		return wire.DoH
	case config.QUIC:
		return wire.DoQ
	}
	if _, ok := server.(*listen.Packet); ok {
		return wire.UDP
	}
	return wire.TCP
}
