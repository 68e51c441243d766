package integration

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// client asks the gateway over one connection of one transport. It is used by one goroutine.
type client interface {
	ask(ctx context.Context, m *dns.Msg) (*dns.Msg, error)
	close()
}

// transports are the ways in.
var transports = []struct {
	name string
	dial func(t *testing.T, s *setup) client
}{
	{"udp", func(t *testing.T, s *setup) client { return dialClassic(t, s, "udp", s.plain) }},
	{"tcp", func(t *testing.T, s *setup) client { return dialClassic(t, s, "tcp", s.plain) }},
	{"dot", func(t *testing.T, s *setup) client { return dialClassic(t, s, "tcp-tls", s.dot) }},
	{"doh1", func(t *testing.T, s *setup) client {
		return &httpClient{url: "https://" + s.doh + "/dns-query", rt: &http.Transport{TLSClientConfig: s.tls("http/1.1")}}
	}},
	{"doh2", func(t *testing.T, s *setup) client {
		return &httpClient{url: "https://" + s.doh + "/dns-query",
			rt: &http.Transport{TLSClientConfig: s.tls(), ForceAttemptHTTP2: true}}
	}},
	{"doh3", func(t *testing.T, s *setup) client {
		return &httpClient{url: "https://" + s.doh + "/dns-query", rt: &http3.Transport{TLSClientConfig: s.tls()}}
	}},
	{"doq", func(t *testing.T, s *setup) client { return dialQUIC(t, s) }},
}

// contextWithDeadline bounds one question by the gateway's deadline.
func contextWithDeadline(t *testing.T) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), deadline+slack)
}

// classic is DNS over UDP, TCP or DoT.
type classic struct{ conn *dns.Conn }

func dialClassic(t *testing.T, s *setup, network, addr string) client {
	t.Helper()
	c := dns.Client{Net: network, TLSConfig: s.tls("dot"), Timeout: 10 * time.Second}
	conn, err := c.Dial(addr)
	if err != nil {
		t.Error(err)
		return nil
	}
	return &classic{conn}
}

func (c *classic) ask(ctx context.Context, m *dns.Msg) (*dns.Msg, error) {
	deadline, _ := ctx.Deadline()
	if err := c.conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	if err := c.conn.WriteMsg(m); err != nil {
		return nil, err
	}
	for {
		resp, err := c.conn.ReadMsg()
		if err != nil || resp.Id == m.Id {
			return resp, err
		}
	}
}

func (c *classic) close() { _ = c.conn.Close() }

// httpClient is DoH by POST.
type httpClient struct {
	url string
	rt  http.RoundTripper
}

func (c *httpClient) ask(ctx context.Context, m *dns.Msg) (*dns.Msg, error) {
	id := m.Id
	m.Id = 0
	b, err := m.Pack()
	m.Id = id
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/dns-message")
	resp, err := c.rt.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", resp.Status, body)
	}
	out := new(dns.Msg)
	if err := out.Unpack(body); err != nil {
		return nil, err
	}
	out.Id = id
	return out, nil
}

func (c *httpClient) close() {
	if cl, ok := c.rt.(io.Closer); ok {
		_ = cl.Close()
	}
	if cl, ok := c.rt.(interface{ CloseIdleConnections() }); ok {
		cl.CloseIdleConnections()
	}
}

// quicClient is DoQ, RFC 9250.
type quicClient struct{ conn *quic.Conn }

func dialQUIC(t *testing.T, s *setup) client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn, err := quic.DialAddr(ctx, s.doq, s.tls("doq"), nil)
	if err != nil {
		t.Error(err)
		return nil
	}
	return &quicClient{conn}
}

func (c *quicClient) ask(ctx context.Context, m *dns.Msg) (*dns.Msg, error) {
	id := m.Id
	m.Id = 0
	b, err := m.Pack()
	m.Id = id
	if err != nil {
		return nil, err
	}
	stream, err := c.conn.OpenStreamSync(ctx)
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	_ = stream.SetDeadline(deadline)
	if _, err := stream.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...)); err != nil {
		return nil, err
	}
	if err := stream.Close(); err != nil {
		return nil, err
	}
	body, err := io.ReadAll(stream)
	if err != nil {
		return nil, err
	}
	if len(body) < 2 || int(binary.BigEndian.Uint16(body)) != len(body)-2 {
		return nil, errors.New("the response is not framed by its length")
	}
	out := new(dns.Msg)
	if err := out.Unpack(body[2:]); err != nil {
		return nil, err
	}
	out.Id = id
	return out, nil
}

func (c *quicClient) close() { _ = c.conn.CloseWithError(0, "") }
