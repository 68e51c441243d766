package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// queryTries is how often a query is sent over UDP within its time, as dig does.
const queryTries = 3

// queryClient asks one server, over a new connection for each query.
type queryClient struct {
	server   queryServer
	verifier *queryVerifier
	sessions tls.ClientSessionCache // nil: no session is resumed
	timeout  time.Duration          // for each query
	get      bool                   // DoH by GET
	ignoreTC bool
}

// queryHTTP is what HTTP added to an answer.
type queryHTTP struct {
	Proto        string `json:"proto"`
	Status       int    `json:"status"`
	CacheControl string `json:"cache_control,omitempty"`
	Age          string `json:"age,omitempty"`
}

// ask sends req and returns what came back. The result is never nil; with an error it holds what is known so far.
func (c *queryClient) ask(ctx context.Context, req *dns.Msg) (*queryResult, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	res := &queryResult{server: c.server, question: req.Question[0], when: time.Now()}
	req = req.Copy()
	if c.server.scheme != "dns" && c.server.scheme != "udp" && c.server.scheme != "tcp" && c.server.scheme != "tls" {
		req.Id = 0 // RFC 8484, section 4.1 and RFC 9250, section 4.2.1
	}
	msg, err := req.Pack()
	if err != nil {
		return res, err
	}
	c.verifier.reset()
	raw, err := c.exchange(ctx, res, req, msg)
	var verr error
	if res.tls, verr = c.verifier.result(); verr != nil {
		return res, verr // the reason, where the transport only knows of a failed handshake
	}
	if err != nil {
		return res, c.explain(ctx, err)
	}
	res.size = len(raw)
	res.resp, err = checkReply(req, raw)
	return res, err
}

// explain says in the user's words what a transport's error means.
func (c *queryClient) explain(ctx context.Context, err error) error {
	var idle *quic.IdleTimeoutError
	var handshake *quic.HandshakeTimeoutError
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		return errors.New("interrupted")
	case errors.Is(ctx.Err(), context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &idle),
		errors.As(err, &handshake):
		return fmt.Errorf("timed out after %v", c.timeout)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("the server closed the connection without a whole answer")
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("connection refused: nothing listens on %s", c.server.address())
	}
	return err
}

func (c *queryClient) exchange(ctx context.Context, res *queryResult, req *dns.Msg, msg []byte) ([]byte, error) {
	switch c.server.scheme {
	case "tcp", "tls":
		return c.stream(ctx, res, msg)
	case "https", "h3":
		return c.https(ctx, res, msg)
	case "quic":
		return c.quic(ctx, res, msg)
	}
	raw, err := c.udp(ctx, res, req, msg)
	if err != nil || c.ignoreTC || len(raw) < 4 || raw[2]&2 == 0 { // the TC bit, RFC 1035, section 4.1.1
		return raw, err
	}
	res.notes = append(res.notes, "Truncated, retrying in TCP mode.")
	return c.stream(ctx, res, msg)
}

// udp asks over UDP, and asks again when nothing comes. Datagrams that are no answer to req are passed over, as they
// may be a stranger's.
func (c *queryClient) udp(ctx context.Context, res *queryResult, req *dns.Msg, msg []byte) ([]byte, error) {
	res.transport = "UDP"
	var d net.Dialer
	conn, err := d.DialContext(ctx, "udp", c.server.address())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })()
	res.addr = addrPort(conn.RemoteAddr())
	buf := make([]byte, dns.MaxMsgSize)
	for try := 1; ; try++ {
		sent := time.Now()
		if _, err := conn.Write(msg); err != nil {
			return nil, err
		}
		if err := conn.SetReadDeadline(sent.Add(c.timeout / queryTries)); err != nil {
			return nil, err
		}
		for ctx.Err() == nil {
			n, err := conn.Read(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return nil, err
			}
			if _, err := checkReply(req, buf[:n]); errors.Is(err, errNotOurs) {
				res.notes = append(res.notes, "Warning: passed over a datagram: "+err.Error())
				continue
			}
			res.elapsed = time.Since(sent)
			return buf[:n], nil
		}
		if try == queryTries || ctx.Err() != nil {
			return nil, os.ErrDeadlineExceeded
		}
		res.notes = append(res.notes, fmt.Sprintf("No answer in %v, sent the query again.", c.timeout/queryTries))
	}
}

// stream asks over TCP or DoT: RFC 1035, section 4.2.2 and RFC 7858.
func (c *queryClient) stream(ctx context.Context, res *queryResult, msg []byte) ([]byte, error) {
	res.transport = "TCP"
	start := time.Now()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", c.server.address())
	if err != nil {
		return nil, err
	}
	defer func() { conn.Close() }()
	res.addr = addrPort(conn.RemoteAddr())
	if c.server.scheme == "tls" {
		res.transport = "DoT"
		tconn := tls.Client(conn, c.tlsConfig("dot"))
		if err := tconn.HandshakeContext(ctx); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = errors.New("the server closed the connection; is this its DoT port?")
			}
			return nil, fmt.Errorf("in the TLS handshake: %w", err)
		}
		conn = tconn
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	res.connect = time.Since(start)
	start = time.Now()
	if _, err := conn.Write(framed(msg)); err != nil {
		return nil, err
	}
	raw, err := readFramed(conn)
	res.elapsed = time.Since(start)
	return raw, err
}

// framed returns msg behind its length, in one piece.
func framed(msg []byte) []byte {
	return append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(msg)), uint16(len(msg))), msg...)
}

func readFramed(r io.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	msg := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(r, msg)
	return msg, err
}

// quic asks over DoQ, RFC 9250.
func (c *queryClient) quic(ctx context.Context, res *queryResult, msg []byte) ([]byte, error) {
	res.transport = "DoQ"
	start := time.Now()
	conn, err := c.dialQUIC(ctx, res, c.tlsConfig("doq"), nil)
	if err != nil {
		return nil, err
	}
	defer conn.CloseWithError(0, "") // DOQ_NO_ERROR
	res.connect = time.Since(start)
	start = time.Now()
	stream, err := conn.OpenStreamSync(ctx)
	if err != nil {
		return nil, doqError(err)
	}
	defer context.AfterFunc(ctx, func() { _ = stream.SetDeadline(time.Unix(1, 0)) })()
	if _, err := stream.Write(framed(msg)); err != nil {
		return nil, doqError(err)
	}
	if err := stream.Close(); err != nil { // the FIN says that there is one query, section 4.2
		return nil, doqError(err)
	}
	raw, err := readFramed(stream)
	res.elapsed = time.Since(start)
	return raw, doqError(err)
}

// doqCodes are the names of DoQ's error codes, RFC 9250, section 8.4.
var doqCodes = map[uint64]string{0: "DOQ_NO_ERROR", 1: "DOQ_INTERNAL_ERROR", 2: "DOQ_PROTOCOL_ERROR",
	3: "DOQ_REQUEST_CANCELLED", 4: "DOQ_EXCESSIVE_LOAD", 5: "DOQ_UNSPECIFIED_ERROR", 0xd098ea5e: "DOQ_ERROR_RESERVED"}

// doqError puts the name of a DoQ error code before err, if it has one.
func doqError(err error) error {
	var app *quic.ApplicationError
	var stream *quic.StreamError
	code := uint64(0)
	switch {
	case errors.As(err, &app) && app.Remote:
		code = uint64(app.ErrorCode)
	case errors.As(err, &stream) && stream.Remote:
		code = uint64(stream.ErrorCode)
	default:
		return err
	}
	name := doqCodes[code]
	if name == "" {
		name = fmt.Sprintf("DoQ error %#x", code)
	}
	return fmt.Errorf("the server ended the query with %s: %w", name, err)
}

// dialQUIC connects to the first of the server's addresses that answers, giving each its share of the time.
func (c *queryClient) dialQUIC(
	ctx context.Context, res *queryResult, conf *tls.Config, qconf *quic.Config,
) (*quic.Conn, error) {
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", c.server.host)
	if err != nil {
		return nil, err
	}
	if qconf == nil {
		qconf = &quic.Config{}
	}
	qconf = qconf.Clone()
	qconf.HandshakeIdleTimeout = c.timeout
	var conn *quic.Conn
	err = errors.New("the host has no address")
	for i, a := range addrs {
		if ctx.Err() != nil {
			break
		}
		deadline, _ := ctx.Deadline()
		share := time.Until(deadline) / time.Duration(len(addrs)-i)
		try, cancel := context.WithTimeout(ctx, share)
		res.addr = netip.AddrPortFrom(a.Unmap(), c.server.port)
		conn, err = quic.DialAddr(try, res.addr.String(), conf, qconf)
		cancel()
		if err == nil {
			return conn, nil
		}
	}
	return nil, err
}

// https asks over DoH, RFC 8484, on HTTP/1.1 and HTTP/2 or on HTTP/3.
func (c *queryClient) https(ctx context.Context, res *queryResult, msg []byte) ([]byte, error) {
	res.transport = "DoH"
	if c.server.scheme == "h3" {
		res.transport = "DoH3"
	}
	start := time.Now()
	var mu sync.Mutex // the transports dial in goroutines of their own, which may outlive the request
	var addr netip.AddrPort
	connected := start
	seen := func(a net.Addr) {
		mu.Lock()
		defer mu.Unlock()
		addr, connected = addrPort(a), time.Now()
	}
	defer func() {
		mu.Lock()
		defer mu.Unlock()
		res.addr = addr
	}()
	var transport http.RoundTripper
	if c.server.scheme == "h3" {
		// The time to connect is the dial's own, as http3 does not report it.
		t := &http3.Transport{TLSClientConfig: c.tlsConfig(), DisableCompression: true,
			Dial: func(ctx context.Context, _ string, conf *tls.Config, qconf *quic.Config) (*quic.Conn, error) {
				dialed := &queryResult{}
				conn, err := c.dialQUIC(ctx, dialed, conf, qconf)
				if dialed.addr.IsValid() { // it is not when the host has no address
					seen(net.UDPAddrFromAddrPort(dialed.addr))
				}
				return conn, err
			}}
		defer t.Close()
		transport = t
	} else {
		t := &http.Transport{TLSClientConfig: c.tlsConfig(), ForceAttemptHTTP2: true, DisableCompression: true,
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				var d net.Dialer
				conn, err := d.DialContext(ctx, network, c.server.address())
				if err == nil {
					seen(conn.RemoteAddr())
				}
				return conn, err
			}}
		defer t.CloseIdleConnections()
		transport = t
		ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
			GotConn: func(i httptrace.GotConnInfo) { seen(i.Conn.RemoteAddr()) },
		})
	}
	hreq, err := c.httpRequest(ctx, msg)
	if err != nil {
		return nil, err
	}
	resp, err := transport.RoundTrip(hreq) // not http.Client: a redirect is not followed
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	raw, err := readHTTP(res, resp)
	mu.Lock()
	defer mu.Unlock()
	res.connect, res.elapsed = connected.Sub(start), time.Since(connected)
	return raw, err
}

// httpRequest returns the request that carries msg, RFC 8484, section 4.1. Its authority is the name that is verified,
// so that a server of many names is asked by the right one.
func (c *queryClient) httpRequest(ctx context.Context, msg []byte) (*http.Request, error) {
	authority := queryServer{host: c.server.verify, port: c.server.port}.address()
	if c.server.port == 443 {
		authority = strings.TrimSuffix(authority, ":443")
	}
	target, err := url.Parse("https://" + authority + c.server.path)
	if err != nil {
		return nil, err
	}
	method, body := http.MethodPost, io.Reader(bytes.NewReader(msg))
	if c.get {
		method, body = http.MethodGet, nil
		dnsParam := "dns=" + base64.RawURLEncoding.EncodeToString(msg)
		if target.RawQuery != "" {
			dnsParam = "&" + dnsParam
		}
		target.RawQuery += dnsParam
	}
	req, err := http.NewRequestWithContext(ctx, method, target.String(), body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/dns-message")
	req.Header.Set("User-Agent", "dnsgateway")
	if !c.get {
		req.Header.Set("Content-Type", "application/dns-message")
	}
	return req, nil
}

// readHTTP returns the DNS message in resp, or why there is none.
func readHTTP(res *queryResult, resp *http.Response) ([]byte, error) {
	res.http = &queryHTTP{Proto: resp.Proto, Status: resp.StatusCode,
		CacheControl: resp.Header.Get("Cache-Control"), Age: resp.Header.Get("Age")}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 200)) // a hint; without it the status has to do
		hint := strings.TrimSpace(printable(string(text)))
		if hint != "" {
			hint = ": " + hint
		}
		return nil, fmt.Errorf("HTTP status %s%s", printable(resp.Status), hint)
	}
	contentType := resp.Header.Get("Content-Type")
	if media, _, err := mime.ParseMediaType(contentType); err != nil || media != "application/dns-message" {
		return nil, fmt.Errorf("content type %q, not application/dns-message: is this the path of a DoH server?", contentType)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, dns.MaxMsgSize+1))
	if err == nil && len(raw) > dns.MaxMsgSize {
		err = fmt.Errorf("the answer is longer than %d octets", dns.MaxMsgSize)
	}
	return raw, err
}

// errNotOurs marks a message that is no answer to our query.
var errNotOurs = errors.New("not an answer to this query")

// checkReply reads raw and checks that it answers req.
func checkReply(req *dns.Msg, raw []byte) (*dns.Msg, error) {
	resp := new(dns.Msg)
	unpackErr := resp.Unpack(raw)
	if len(raw) < 12 {
		return nil, fmt.Errorf("%w: %d octets are no DNS message", errNotOurs, len(raw))
	}
	switch {
	case !resp.Response:
		return nil, fmt.Errorf("%w: it is a query", errNotOurs)
	case resp.Id != req.Id:
		return nil, fmt.Errorf("%w: its ID is %d, not %d", errNotOurs, resp.Id, req.Id)
	case unpackErr != nil:
		return nil, fmt.Errorf("reading the answer of %d octets: %w", len(raw), unpackErr)
	case len(resp.Question) == 0 && resp.Rcode != dns.RcodeSuccess:
		return resp, nil // an error may leave the question out
	case len(resp.Question) != 1:
		return nil, fmt.Errorf("%w: it has %d questions", errNotOurs, len(resp.Question))
	}
	got, want := resp.Question[0], req.Question[0]
	if !strings.EqualFold(got.Name, want.Name) || got.Qtype != want.Qtype || got.Qclass != want.Qclass {
		return nil, fmt.Errorf("%w: its question is %s, not %s", errNotOurs, questionText(got), questionText(want))
	}
	return resp, nil
}

// addrPort returns the address of a UDP or TCP peer.
func addrPort(a net.Addr) netip.AddrPort {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		panic("query: a peer without an IP address: " + a.String())
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
