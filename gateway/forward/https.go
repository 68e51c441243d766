package forward

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"time"

	"dnsgateway/gateway/wire"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

const mediaType = "application/dns-message"

// maxHeaderBytes bounds the header of an HTTP response.
const maxHeaderBytes = 16 << 10

// roundTripper is one HTTP connection.
type roundTripper interface {
	RoundTrip(*http.Request) (*http.Response, error)
}

// httpLink is one connection to a DoH server, RFC 8484, over any version of HTTP.
type httpLink struct {
	pulse
	conn roundTripper
	url  *url.URL
	dead func() error // why the connection can take no more requests, or nil
}

func (l *httpLink) vitals() *pulse { return &l.pulse }

// dohURL returns the URL of requests to s. Its authority is the name that the certificate has to bear, whatever address
// it is sent to.
func dohURL(s Server) *url.URL {
	host := s.VerifyName
	if a, err := netip.ParseAddr(host); err == nil && a.Is6() {
		host = "[" + host + "]"
	}
	if s.Port != defaultPorts["https"] {
		host += ":" + strconv.Itoa(int(s.Port))
	}
	u := &url.URL{Scheme: "https", Host: host, Path: s.Path}
	if path, err := url.PathUnescape(s.Path); err == nil {
		u.Path, u.RawPath = path, s.Path // it goes out as it was written
	}
	return u
}

// newHTTPSClient returns a DoH client over HTTP/2, or HTTP/1.1 where the server has nothing better.
func newHTTPSClient(s Server, t *target, env environment) *poolClient {
	cfg, to := s.tlsConfig("h2", "http/1.1"), dohURL(s)
	dial := func(ctx context.Context, _ func(func())) (link, error) {
		open := func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) { return dialStream(ctx, addr, cfg) }
		conn, err := race(ctx, t, open, func(c net.Conn) { c.Close() })
		if err != nil {
			return nil, err
		}
		return newHTTPLink(ctx, conn.(*tls.Conn), to)
	}
	return &poolClient{identity{s.URL, env.timeout}, newPool(env, dial), false}
}

// newHTTPLink makes conn an HTTP connection. The transport serves for nothing else: which connections there are is the
// pool's business.
func newHTTPLink(ctx context.Context, conn *tls.Conn, to *url.URL) (link, error) {
	tr := &http.Transport{
		DialTLSContext:         func(context.Context, string, string) (net.Conn, error) { return conn, nil },
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHeaderBytes,
		Protocols:              new(http.Protocols),
	}
	tr.Protocols.SetHTTP1(true)
	tr.Protocols.SetHTTP2(true)
	cc, err := tr.NewClientConn(ctx, "https", net.JoinHostPort(to.Hostname(), "443"))
	if err != nil {
		conn.NetConn().Close()
		return nil, classify(KindIO, "starting HTTP", err)
	}
	l := &httpLink{conn: cc, url: to, dead: cc.Err}
	l.born(func(error) {
		conn.NetConn().SetDeadline(time.Unix(1, 0)) // or its goodbye waits for a peer that takes no bytes
		cc.Close()
		conn.NetConn().Close()
	})
	if conn.ConnectionState().NegotiatedProtocol != "h2" {
		l.spread = 1
	}
	cc.SetStateHook(func(cc *http.ClientConn) {
		if err := cc.Err(); err != nil {
			l.die(fault(KindIO, "HTTP connection: %w", err))
		}
	})
	return l, nil
}

// newH3Client returns a DoH client over HTTP/3.
func newH3Client(s Server, t *target, env environment) *poolClient {
	cfg, to := s.tlsConfig(http3.NextProtoH3), dohURL(s)
	tr := &http3.Transport{DisableCompression: true, MaxResponseHeaderBytes: maxHeaderBytes}
	dial := func(ctx context.Context, _ func(func())) (link, error) {
		conn, err := race(ctx, t, quicDialer(cfg, env.timeout), closeQUIC)
		if err != nil {
			return nil, err
		}
		l := &httpLink{conn: tr.NewClientConn(conn), url: to, dead: func() error { return gone(conn) }}
		l.bornQUIC(conn, quic.ApplicationErrorCode(http3.ErrCodeNoError))
		return l, nil
	}
	return &poolClient{identity{s.URL, env.timeout}, newPool(env, dial), false}
}

// ask implements link.
func (l *httpLink) ask(ctx context.Context, q *query) (*wire.Answer, error) {
	// The ID is 0, RFC 8484, section 4.1: the exchange is known by its request.
	body := q.appendTo(make([]byte, 0, q.size(padded)), 0, padded)
	req := (&http.Request{
		Method: http.MethodPost, URL: l.url, Host: l.url.Host, ContentLength: int64(len(body)),
		Body:    io.NopCloser(bytes.NewReader(body)),
		GetBody: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil },
		// An empty User-Agent is left out: who asks is nobody's business.
		Header: http.Header{"Content-Type": {mediaType}, "Accept": {mediaType}, "User-Agent": {""}},
	}).WithContext(ctx)
	if !l.begin() {
		return nil, &brokenError{err: fault(KindIO, "connection closed"), again: true}
	}
	resp, err := l.roundTrip(req, q)
	if err != nil && ctx.Err() != nil {
		err = classify(KindIO, "HTTP request", ctx.Err()) // whatever the end of the exchange looked like
	}
	// Any HTTP response shows that the connection works, even if it carries no answer.
	answered := err == nil || kindOf(err) == KindHTTP || kindOf(err) == KindMismatch || kindOf(err) == KindMalformed
	var dead error
	if !answered && ctx.Err() == nil {
		if dead = l.dead(); dead != nil {
			err = l.broken(err)
		}
	}
	l.end(answered)
	if dead != nil {
		l.die(fault(KindIO, "HTTP connection: %w", dead))
	}
	return resp, err
}

func (l *httpLink) roundTrip(req *http.Request, q *query) (*wire.Answer, error) {
	resp, err := l.conn.RoundTrip(req)
	if err != nil {
		return nil, classify(KindIO, "HTTP request", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fault(KindHTTP, "HTTP status %d", resp.StatusCode)
	}
	if got, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err != nil || got != mediaType {
		return nil, fault(KindHTTP, "media type %.40q", resp.Header.Get("Content-Type"))
	}
	msg, err := io.ReadAll(io.LimitReader(resp.Body, wire.MaxMessage+1))
	switch {
	case err != nil:
		return nil, classify(KindIO, "HTTP response", err)
	case len(msg) > wire.MaxMessage:
		return nil, mismatch("body of more than %d octets", wire.MaxMessage)
	}
	a, _, err := q.check(msg, 0)
	switch {
	case err != nil:
		return nil, err
	case a.Truncated():
		return nil, malformed("truncated over HTTP")
	}
	// What an HTTP cache on the way has already used up, RFC 8484, section 5.1.
	if seconds, err := strconv.ParseUint(resp.Header.Get("Age"), 10, 31); err == nil {
		a.Age(uint32(seconds))
	}
	return a, nil
}
