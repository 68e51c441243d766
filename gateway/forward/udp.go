package forward

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"dnsgateway/gateway/wire"

	"github.com/AdguardTeam/dnsproxy/upstream"
	"github.com/miekg/dns"
)

const (
	// maxSockets bounds the sockets, one for each query, that are open towards one UDP server; more queries wait.
	maxSockets = 512
	// resendAfter is when a query is sent again, because a datagram may be lost; the time doubles from there.
	resendAfter = 500 * time.Millisecond
	// maxDatagram is more than a server may send us, which is udpSize.
	maxDatagram = 4096
)

// udpClient asks over UDP, and over TCP what does not fit. Each query has a socket of its own, connected, with a port
// that the kernel chose, so that who would forge an answer has to guess port and ID (RFC 5452, section 9).
type udpClient struct {
	identity
	target  *target
	slots   chan struct{}
	prefer  atomic.Uint32 // which of several addresses
	overTCP *poolClient

	// life ends with Close and takes the queries in flight with it.
	life context.Context
	end  context.CancelFunc
}

var _ upstream.Upstream = (*udpClient)(nil)

func newUDPClient(s Server, t *target, env environment) *udpClient {
	c := &udpClient{identity: identity{s.URL, env.timeout}, target: t, slots: make(chan struct{}, maxSockets),
		overTCP: newStreamClient(s, t, env, false)}
	c.life, c.end = context.WithCancel(context.Background())
	return c
}

// Exchange implements [upstream.Upstream].
func (c *udpClient) Exchange(req *dns.Msg) (*dns.Msg, error) {
	return exchangeWithin(c.timeout, c, req)
}

// ExchangeContext is Exchange that ends with ctx.
func (c *udpClient) ExchangeContext(ctx context.Context, req *dns.Msg) (*dns.Msg, error) {
	return exchange(ctx, c, req)
}

// Close implements [upstream.Upstream].
func (c *udpClient) Close() error {
	c.end()
	return c.overTCP.Close()
}

// ask implements client.
func (c *udpClient) ask(ctx context.Context, q *query) (*wire.Answer, error) {
	addrs, err := c.target.addrs(ctx)
	if err != nil {
		return nil, err
	}
	select {
	case c.slots <- struct{}{}:
	case <-c.life.Done():
		return nil, errClosed
	case <-ctx.Done():
		return nil, classify(KindBusy, "waiting for a socket", ctx.Err())
	}
	prefer := c.prefer.Load()
	resp, err := c.exchange(ctx, addrs[int(prefer)%len(addrs)], q)
	<-c.slots
	if err != nil {
		if kindOf(err) != KindAbandoned {
			c.prefer.CompareAndSwap(prefer, prefer+1)
		}
		return nil, err
	}
	if resp.Truncated() { // RFC 7766, section 5
		return c.overTCP.ask(ctx, q)
	}
	return resp, nil
}

var datagrams = sync.Pool{New: func() any { return new([maxDatagram]byte) }}

// exchange sends q to addr and waits for its answer. Packets that are none are passed over.
func (c *udpClient) exchange(ctx context.Context, addr netip.AddrPort, q *query) (*wire.Answer, error) {
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(addr))
	if err != nil {
		return nil, classify(KindConnect, "opening a socket", err)
	}
	defer conn.Close()
	wake := func() { conn.SetReadDeadline(time.Unix(1, 0)) }
	defer context.AfterFunc(ctx, wake)()
	defer context.AfterFunc(c.life, wake)()
	buf := datagrams.Get().(*[maxDatagram]byte)
	defer datagrams.Put(buf)
	id := uint16(rand.Uint32()) // see streamLink.send
	msg := q.appendTo(make([]byte, 0, q.size(0)), id, 0)
	strays := 0
	for wait := resendAfter; ; wait *= 2 {
		if _, err := conn.Write(msg); err != nil {
			return nil, classify(KindIO, "sending", err)
		}
		if err := conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
			return nil, classify(KindIO, "receiving", err)
		}
		for {
			if c.life.Err() != nil {
				return nil, errClosed
			}
			if err := ctx.Err(); err != nil {
				if strays > 0 && isTimeout(err) {
					return nil, fault(KindTimeout, "no answer in time, but %d packets that were none", strays)
				}
				return nil, classify(KindTimeout, "waiting for an answer", err)
			}
			n, err := conn.Read(buf[:])
			if err != nil {
				if isTimeout(err) {
					break // send again, or ctx is over
				}
				return nil, classify(KindIO, "receiving", err)
			}
			if n < wire.HeaderLen || binary.BigEndian.Uint16(buf[:]) != id {
				strays++
				continue
			}
			resp, _, err := q.check(buf[:n], id)
			if kindOf(err) == KindMalformed {
				return nil, err
			}
			if err != nil {
				strays++
				continue
			}
			return resp, nil
		}
	}
}
