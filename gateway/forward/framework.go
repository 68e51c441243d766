package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"

	"dnsgateway/gateway/wire"

	"github.com/AdguardTeam/dnsproxy/upstream"
	"github.com/ameshkov/dnsstamps"
	"github.com/miekg/dns"
)

const (
	// maxCalls bounds the calls into the framework that are under way for one server.
	maxCalls = 1024
	// maxAbandoned bounds those of them that nobody waits for any more: the framework takes no context.
	maxAbandoned = 64
)

// frameworkClient puts a context, a deadline and two bounds around a client of the framework.
type frameworkClient struct {
	identity
	up        upstream.Upstream
	slots     chan struct{}
	abandoned atomic.Int32
	mu        sync.RWMutex // orders closed and calls.Add
	closed    bool
	calls     sync.WaitGroup
}

var _ upstream.Upstream = (*frameworkClient)(nil)

// newFrameworkClient returns the framework's client for s.URL.
func newFrameworkClient(s Server, env environment) (*frameworkClient, error) {
	up, err := upstream.AddressToUpstream(s.URL, &upstream.Options{
		Logger:    slog.New(slog.DiscardHandler), // it logs every timeout as an error
		Bootstrap: upstream.StaticResolver{},     // never the system's resolver
		Timeout:   env.timeout,
	})
	if err != nil {
		return nil, err
	}
	return wrapUpstream(up, s.URL, env), nil
}

func wrapUpstream(up upstream.Upstream, url string, env environment) *frameworkClient {
	return &frameworkClient{identity: identity{url, env.timeout}, up: up, slots: make(chan struct{}, maxCalls)}
}

// Exchange implements [upstream.Upstream].
func (c *frameworkClient) Exchange(req *dns.Msg) (*dns.Msg, error) {
	return exchangeWithin(c.timeout, c, req)
}

// ExchangeContext is Exchange that ends with ctx.
func (c *frameworkClient) ExchangeContext(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
	return exchange(ctx, c, req)
}

// ask implements client. When its context ends first, the framework's call goes on by itself until its own timeout.
func (c *frameworkClient) ask(ctx context.Context, q *query) (*wire.Answer, error) {
	if err := c.enter(); err != nil {
		return nil, err
	}
	type outcome struct {
		resp *dns.Msg
		err  error
	}
	done := make(chan outcome, 1)
	var state atomic.Int32 // 1: answered, 2: abandoned; who comes first sets it
	go func() {
		defer c.calls.Done()
		resp, err := c.up.Exchange(q.message())
		<-c.slots
		if !state.CompareAndSwap(0, 1) {
			c.abandoned.Add(-1)
		}
		done <- outcome{resp, err}
	}()
	select {
	case o := <-done:
		if o.err != nil {
			return nil, classify(KindIO, "exchange", o.err)
		}
		a, err := q.checkMessage(o.resp)
		if err == nil && a.Truncated() {
			return nil, malformed("truncated, over TCP too")
		}
		return a, err
	case <-ctx.Done():
		if state.CompareAndSwap(0, 2) {
			c.abandoned.Add(1)
		}
		return nil, classify(KindTimeout, "exchange", ctx.Err())
	}
}

// enter takes a slot for a call, or says at once why there is none.
func (c *frameworkClient) enter() error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.closed {
		return errClosed
	}
	if n := c.abandoned.Load(); n >= maxAbandoned {
		return fault(KindBusy, "%d calls were abandoned and have not ended", n)
	}
	select {
	case c.slots <- struct{}{}:
		c.calls.Add(1)
		return nil
	default:
		return fault(KindBusy, "%d calls are under way", maxCalls)
	}
}

// abandonedCalls returns how many calls go on though nobody waits for them.
func (c *frameworkClient) abandonedCalls() int { return int(c.abandoned.Load()) }

// Close implements [upstream.Upstream]. It waits for the calls under way, which end by their timeout.
func (c *frameworkClient) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	err := c.up.Close()
	c.calls.Wait()
	return err
}

// newStampClient returns the client for an sdns:// URL: the framework's for DNSCrypt, ours for all others.
func newStampClient(s Server, env environment) (client, error) {
	inner, err := readStamp(s)
	if err != nil {
		return nil, fmt.Errorf("reading DNS stamp: %w", err)
	}
	if inner.Scheme != "sdns" {
		return newClient(inner, env)
	}
	if s.hasTLS() {
		return nil, errors.New("roots, pins and client certificates mean nothing to DNSCrypt")
	}
	return newFrameworkClient(s, env)
}

// readStamp returns s with what its stamp says, or as it is when that is for DNSCrypt.
func readStamp(s Server) (Server, error) {
	stamp, err := dnsstamps.NewServerStampFromString(s.URL)
	if err != nil || stamp.Proto == dnsstamps.StampProtoTypeDNSCrypt {
		return s, err
	}
	return stampServer(s, stamp)
}

// stampServer translates a stamp. See https://dnscrypt.info/stamps-specifications.
func stampServer(s Server, stamp dnsstamps.ServerStamp) (Server, error) {
	s.Path = stamp.Path
	s.tbsHashes = stamp.Hashes
	switch stamp.Proto {
	case dnsstamps.StampProtoTypePlain:
		s.Scheme, s.tbsHashes = "udp", nil
	case dnsstamps.StampProtoTypeDoH:
		s.Scheme = "https"
	case dnsstamps.StampProtoTypeTLS:
		s.Scheme = "tls"
	case dnsstamps.StampProtoTypeDoQ:
		s.Scheme = "quic"
	default:
		return s, fmt.Errorf("unknown protocol %d", stamp.Proto)
	}
	name, namePort, err := splitPort(stamp.ProviderName)
	if err != nil {
		return s, err
	}
	host, port, err := splitPort(stamp.ServerAddrStr)
	if err != nil {
		return s, err
	}
	// What the library fills in for a missing port are those of drafts, at which nobody listens.
	if port == 843 || port == 784 {
		port = 853
	}
	s.VerifyName, s.Host, s.Port = name, host, port
	if s.Host == "" {
		s.Host = name
	}
	if namePort != 0 {
		s.Port = namePort
	}
	return s, nil
}

// splitPort splits "host", "host:port", ":port", "[v6]" and "[v6]:port"; the port is 0 when there is none.
func splitPort(s string) (host string, port uint16, err error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return a.String(), 0, nil
	}
	host, text, err := net.SplitHostPort(s)
	if err != nil {
		if n := len(s); n > 2 && s[0] == '[' && s[n-1] == ']' {
			s = s[1 : n-1]
		}
		return s, 0, nil
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("port %q is no number below 65536", text)
	}
	return host, uint16(n), nil
}
