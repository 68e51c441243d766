package lab

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// patience is how long a client waits for a server that ought to answer.
const patience = 10 * time.Second

// haste is how long a client waits for a server that ought to say nothing.
const haste = 300 * time.Millisecond

var allSchemes = []Scheme{UDP, TCP, TLS, HTTPS, H3, QUIC}

// startLab starts a lab with one server of each scheme, named after it, and checks at the end that no goroutine is left.
func startLab(t *testing.T, c Config) *Lab {
	t.Helper()
	if c.Servers == nil {
		for _, s := range allSchemes {
			c.Servers = append(c.Servers, ServerConfig{Name: string(s), Scheme: s})
		}
	}
	l, err := Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
		checkLeak(t)
	})
	return l
}

// checkLeak reports goroutines of the lab's servers. Those of QUIC connections may end a moment after their connection.
func checkLeak(t *testing.T) {
	t.Helper()
	var left []string
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		left = left[:0]
		buf := make([]byte, 1<<20)
		for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			own := strings.Contains(g, "dnsgateway/gateway/lab.(*") || strings.Contains(g, "quic-go") ||
				strings.Contains(g, "net/http.(*conn)") || strings.Contains(g, "net/http.(*http2server")
			if own && !strings.Contains(g, "testing.tRunner") {
				left = append(left, g)
			}
		}
		if len(left) == 0 {
			return
		}
	}
	t.Errorf("%d goroutines are left, the first:\n%s", len(left), left[0])
}

// client keeps one connection to a server, or one pool of them.
type client struct {
	s    *Server
	tls  *tls.Config
	conn net.Conn   // UDP, TCP, TLS
	quic *quic.Conn // QUIC
	http *http.Client
	get  bool
	done []func()
}

func newClient(t *testing.T, l *Lab, s *Server) *client {
	c := &client{s: s, tls: &tls.Config{RootCAs: l.Roots(), ServerName: s.HostName()}}
	switch s.Scheme() {
	case HTTPS:
		tr := &http.Transport{TLSClientConfig: c.tls, ForceAttemptHTTP2: true}
		c.http = &http.Client{Transport: tr}
		c.done = append(c.done, tr.CloseIdleConnections)
	case H3:
		tr := &http3.Transport{TLSClientConfig: c.tls}
		c.http = &http.Client{Transport: tr}
		c.done = append(c.done, func() { tr.Close() })
	}
	t.Cleanup(c.close)
	return c
}

func (c *client) close() {
	for _, f := range c.done {
		f()
	}
	c.done = nil
}

// exchange sends raw and returns the raw response.
func (c *client) exchange(ctx context.Context, raw []byte) ([]byte, error) {
	switch c.s.Scheme() {
	case HTTPS, H3:
		return c.exchangeHTTP(ctx, raw)
	case QUIC:
		return c.exchangeQUIC(ctx, raw)
	}
	if c.conn == nil {
		if err := c.dial(ctx); err != nil {
			return nil, err
		}
	}
	deadline, _ := ctx.Deadline()
	c.conn.SetDeadline(deadline)
	if c.s.Scheme() == UDP {
		if _, err := c.conn.Write(raw); err != nil {
			return nil, err
		}
		buf := make([]byte, 65535)
		n, err := c.conn.Read(buf)
		return buf[:n], err
	}
	if _, err := c.conn.Write(frame(raw)); err != nil {
		return nil, err
	}
	return readFrame(c.conn)
}

func (c *client) dial(ctx context.Context) (err error) {
	addr := c.s.Addr().String()
	switch c.s.Scheme() {
	case UDP:
		c.conn, err = (&net.Dialer{}).DialContext(ctx, "udp", addr)
	case TCP:
		c.conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	default:
		conf := c.tls.Clone()
		conf.NextProtos = []string{"dot"}
		c.conn, err = (&tls.Dialer{Config: conf}).DialContext(ctx, "tcp", addr)
	}
	if err == nil {
		conn := c.conn
		c.done = append(c.done, func() { conn.Close() })
	}
	return err
}

func (c *client) exchangeHTTP(ctx context.Context, raw []byte) ([]byte, error) {
	url := "https://" + c.s.Addr().String() + dohPath
	method, body := http.MethodPost, raw
	if c.get {
		method, body, url = http.MethodGet, nil, url+"?dns="+base64.RawURLEncoding.EncodeToString(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if !c.get {
		req.Header.Set("Content-Type", dohMedia)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != dohMedia {
		return nil, fmt.Errorf("status %s, type %q", resp.Status, resp.Header.Get("Content-Type"))
	}
	return io.ReadAll(resp.Body)
}

func (c *client) exchangeQUIC(ctx context.Context, raw []byte) ([]byte, error) {
	if c.quic == nil {
		conf := c.tls.Clone()
		conf.NextProtos = []string{"doq"}
		conn, err := quic.DialAddr(ctx, c.s.Addr().String(), conf, &quic.Config{HandshakeIdleTimeout: patience})
		if err != nil {
			return nil, err
		}
		c.quic = conn
		c.done = append(c.done, func() { conn.CloseWithError(0, "") })
	}
	stream, err := c.quic.OpenStreamSync(ctx)
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	stream.SetDeadline(deadline)
	if _, err := stream.Write(frame(raw)); err != nil {
		return nil, err
	}
	stream.Close()
	msg, err := readOnly(stream)
	if err != nil {
		stream.CancelRead(0)
	}
	return msg, err
}

// query returns a query that fits scheme: over HTTP and QUIC the ID is 0, RFC 8484, section 4.1 and RFC 9250,
// section 4.2.1.
func query(scheme Scheme, name string, rrtype uint16) *dns.Msg {
	m := new(dns.Msg).SetQuestion(name, rrtype)
	m.Id = 0x1234
	if scheme == HTTPS || scheme == H3 || scheme == QUIC {
		m.Id = 0
	}
	return m
}

// ask sends m on c and unpacks the response.
func (c *client) ask(t *testing.T, m *dns.Msg, wait time.Duration) (*dns.Msg, error) {
	t.Helper()
	raw, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	back, err := c.exchange(ctx, raw)
	if err != nil {
		return nil, err
	}
	resp := new(dns.Msg)
	if err := resp.Unpack(back); err != nil {
		return nil, fmt.Errorf("unpacking %d octets: %w", len(back), err)
	}
	return resp, nil
}

// askNew asks s for name on a new connection.
func askNew(t *testing.T, l *Lab, s *Server, name string, wait time.Duration) (*dns.Msg, error) {
	t.Helper()
	c := newClient(t, l, s)
	defer c.close()
	return c.ask(t, query(s.Scheme(), name, dns.TypeA), wait)
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &n) && n.Timeout()
}

// rawFrame reads a length and then what comes until the end.
func rawFrame(r io.Reader) (announced int, got []byte, err error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return 0, nil, err
	}
	got, err = io.ReadAll(r)
	return int(binary.BigEndian.Uint16(length[:])), got, err
}
