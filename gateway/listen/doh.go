package listen

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"io"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"dnsgateway/gateway/wire"
)

const (
	mediaMessage = "application/dns-message" // RFC 8484, section 6
	mediaJSON    = "application/dns-json"
	allowed      = "GET, HEAD, POST"
)

// doh answers DoH requests (RFC 8484), for all HTTP versions alike:
//
//	200  a DNS response, whatever its RCODE (RFC 8484, section 4.2.1), with Cache-Control: max-age from its TTLs
//	400  no query in the URL, bad base64url, or octets that are not a DNS query that can be read to its end
//	404  another path
//	405  another method than those in Allow
//	413  a message longer than 65535 octets
//	415  a POST of something that is not application/dns-message
//
// Base64url is taken as RFC 8484, section 6 has it: without padding and with nothing else in it, so that one message has
// one URL and one place in a cache. What cannot be answered (the Handler dropped it) ends the stream or connection
// without a response. A query that is sound but that DNS answers with FORMERR or NOTIMP is a 200.
//
// GET and HEAD with `name`, or with an Accept of application/dns-json, are the JSON form; see json.go. Nothing of what a
// client sent stands in a header or in the text of an error.
type doh struct {
	cfg Common
	// ctx is what Resolve gets; see life.
	ctx    context.Context
	path   string
	altSvc string // the Alt-Svc header of answers over TCP, RFC 7838; may be empty
	flight flight
	pool   sync.Pool // of *exchange
}

// exchange is one request's query and answer; it belongs to the request's goroutine.
type exchange struct {
	in  []byte
	out []byte
	q   wire.Query
}

func newDoH(ctx context.Context, cfg Common, path string) *doh {
	h := &doh{cfg: cfg, ctx: ctx, path: path}
	h.pool.New = func() any { return &exchange{out: make([]byte, 0, maxDatagram)} }
	return h
}

// refusal is a request that gets an HTTP error. Its text is for people and constant.
type refusal struct {
	status int
	text   string
}

// Error implements error.
func (e *refusal) Error() string { return e.text }

var (
	errPath      = &refusal{http.StatusNotFound, "there is nothing here"}
	errMethod    = &refusal{http.StatusMethodNotAllowed, "GET, HEAD or POST only"}
	errNoQuery   = &refusal{http.StatusBadRequest, "the dns parameter is missing (RFC 8484, section 4.1)"}
	errTwice     = &refusal{http.StatusBadRequest, "the dns parameter is there more than once"}
	errParams    = &refusal{http.StatusBadRequest, "the URL's parameters cannot be read"}
	errBase64    = &refusal{http.StatusBadRequest, "the dns parameter is not unpadded base64url (RFC 8484, section 6)"}
	errMessage   = &refusal{http.StatusBadRequest, "not a DNS query"}
	errBody      = &refusal{http.StatusBadRequest, "the body cannot be read"}
	errTooLarge  = &refusal{http.StatusRequestEntityTooLarge, "a DNS message has at most 65535 octets"}
	errMediaType = &refusal{http.StatusUnsupportedMediaType, "a POST has to be " + mediaMessage}
)

// ServeHTTP implements http.Handler.
func (h *doh) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.flight.enter()
	defer h.flight.leave()
	defer func() {
		// The HTTP servers log a panic that is not theirs with what the client sent; and it is ours to log.
		if p := recover(); p != nil {
			if p != http.ErrAbortHandler {
				h.cfg.logPanic(p)
			}
			panic(http.ErrAbortHandler)
		}
	}()
	if h.altSvc != "" && r.ProtoMajor < 3 {
		w.Header().Set("Alt-Svc", h.altSvc)
	}
	if r.URL.Path != h.path {
		h.refuse(w, errPath)
		return
	}
	x := h.pool.Get().(*exchange)
	x.in = x.in[:0]
	json, err := h.receive(w, r, x)
	if err == nil {
		err = h.answer(w, r, x, json)
	}
	if cap(x.in) <= keepBuffer && cap(x.out) <= keepBuffer {
		h.pool.Put(x)
	}
	var refused *refusal
	switch {
	case err == nil:
	case !errors.As(err, &refused):
		panic(http.ErrAbortHandler)
	case json:
		h.refuseJSON(w, refused)
	default:
		h.refuse(w, refused)
	}
}

// receive puts the query of r into x.in. json tells that the client wants the JSON form of answers and errors.
func (h *doh) receive(w http.ResponseWriter, r *http.Request, x *exchange) (json bool, err error) {
	switch r.Method {
	case http.MethodPost:
		return false, receivePost(w, r, x)
	case http.MethodGet, http.MethodHead:
	default:
		return false, errMethod
	}
	params, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return false, errParams
	}
	if !params.Has("dns") && (params.Has("name") || acceptsJSON(r.Header)) {
		x.in, err = jsonQuery(x.in, params)
		return true, err
	}
	return false, receiveGet(params["dns"], x)
}

func receiveGet(values []string, x *exchange) error {
	switch {
	case len(values) == 0:
		return errNoQuery
	case len(values) > 1:
		return errTwice
	case len(values[0]) > base64.RawURLEncoding.EncodedLen(wire.MaxMessage):
		return errTooLarge
	case strings.ContainsAny(values[0], "\r\n"): // the decoder would skip these
		return errBase64
	}
	var err error
	x.in, err = base64.RawURLEncoding.Strict().AppendDecode(x.in, []byte(values[0]))
	if err != nil {
		return errBase64
	}
	return nil
}

func receivePost(w http.ResponseWriter, r *http.Request, x *exchange) error {
	// A parameter without a value is an error that leaves the type known; RFC 8484 defines no parameters.
	media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil && !errors.Is(err, mime.ErrInvalidMediaParameter) || media != mediaMessage {
		return errMediaType
	}
	if r.Header.Get("Content-Encoding") != "" {
		return errMediaType
	}
	if r.ContentLength > wire.MaxMessage {
		return errTooLarge
	}
	// net/http times HTTP/1.1 and HTTP/2 itself; HTTP/3 needs this.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
	body := http.MaxBytesReader(w, r.Body, wire.MaxMessage)
	for {
		if len(x.in) == cap(x.in) {
			x.in = append(x.in, make([]byte, 512)...)[:len(x.in)]
		}
		n, err := body.Read(x.in[len(x.in):cap(x.in)])
		x.in = x.in[:len(x.in)+n]
		var tooLarge *http.MaxBytesError
		switch {
		case err == io.EOF:
			return nil
		case errors.As(err, &tooLarge):
			return errTooLarge
		case err != nil:
			return errBody
		}
	}
}

// answer asks the Handler and writes its response. An error that is no refusal means that nothing may be sent.
func (h *doh) answer(w http.ResponseWriter, r *http.Request, x *exchange, json bool) error {
	q := &x.q
	q.Client, q.Local, q.Transport, q.Listener = h.client(r), h.local(r), wire.DoH, h.cfg.Name
	if r.ProtoMajor == 3 {
		q.Transport = wire.DoH3
	}
	q.Received = time.Now().UnixNano()
	q.Parse(x.in)
	if q.Kind == wire.Junk || q.Fault == wire.RcodeFormErr && !readable(x.in) {
		return errMessage
	}
	out, verdict := h.cfg.serveWire(x.out[:0], q)
	if verdict == wire.Miss {
		var err error
		if out, err = h.cfg.resolve(h.ctx, x.out[:0], q); err != nil {
			return err
		}
	}
	x.out = out[:0]
	if verdict == wire.Dropped || len(out) < wire.HeaderLen {
		return http.ErrAbortHandler
	}
	media := mediaMessage
	header := w.Header()
	header.Set("Cache-Control", "max-age="+strconv.FormatUint(uint64(wire.Lifetime(out)), 10))
	if json {
		body, err := jsonResponse(out)
		if err != nil {
			return err
		}
		media, out = mediaJSON, body
	}
	header.Set("Content-Type", media)
	h.write(w, http.StatusOK, out)
	return nil
}

// write sends a response. net/http leaves the body of an answer to HEAD away.
func (h *doh) write(w http.ResponseWriter, status int, body []byte) {
	header := w.Header()
	header.Set("Content-Length", strconv.Itoa(len(body)))
	header.Set("X-Content-Type-Options", "nosniff")
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout))
	w.WriteHeader(status)
	_, _ = w.Write(body) // the client has gone; there is nobody to tell
}

// refuse sends an HTTP error as text.
func (h *doh) refuse(w http.ResponseWriter, e *refusal) {
	header := w.Header()
	header.Set("Content-Type", "text/plain; charset=utf-8")
	refuseHeader(header, e)
	h.write(w, e.status, []byte(e.text+"\n"))
}

// refuseHeader sets what HTTP asks for with an error: RFC 9110, sections 15.5.6 and 15.5.16.
func refuseHeader(header http.Header, e *refusal) {
	header.Set("Cache-Control", "no-store")
	switch e {
	case errMethod:
		header.Set("Allow", allowed)
	case errMediaType:
		header.Set("Accept", mediaMessage)
	}
}

// client returns who asked. RemoteAddr is set by the servers, not by the client.
func (h *doh) client(r *http.Request) netip.AddrPort {
	ap, _ := netip.ParseAddrPort(r.RemoteAddr)
	return unmap(ap)
}

func (h *doh) local(r *http.Request) netip.AddrPort {
	a, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	return addrPort(a)
}

// readable reports whether msg is a question section and records to its end, whatever they mean: then DNS has an
// answer for it, and otherwise HTTP has. It is asked only about messages that have earned a FORMERR.
func readable(msg []byte) bool {
	off := wire.HeaderLen
	for i := range 4 {
		for range binary.BigEndian.Uint16(msg[4+2*i:]) {
			if off = skipName(msg, off); off < 0 {
				return false
			}
			if off += 4; i > 0 {
				if off += 6; off > len(msg) {
					return false
				}
				off += int(binary.BigEndian.Uint16(msg[off-2:]))
			}
			if off > len(msg) {
				return false
			}
		}
	}
	return off == len(msg)
}

// skipName returns the offset behind the name at off, or -1.
func skipName(msg []byte, off int) int {
	for off < len(msg) {
		switch n := int(msg[off]); {
		case n == 0:
			return off + 1
		case n < 64:
			off += n + 1
		case n >= 192 && off+2 <= len(msg):
			return off + 2
		default:
			return -1
		}
	}
	return -1
}
