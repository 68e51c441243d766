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
	mediaText    = "text/plain; charset=utf-8"
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
//	431  a header of more than 16 KiB
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
	h2Fields
	flight flight
	pool   sync.Pool // of *exchange
}

// exchange is one request's query and answer; it belongs to the request's goroutine.
type exchange struct {
	in  []byte
	out []byte
	q   wire.Query
}

func newDoH(ctx context.Context, cfg Common, path, altSvc string) *doh {
	h := &doh{cfg: cfg, ctx: ctx, path: path, altSvc: altSvc}
	h.compile(path, altSvc)
	h.pool.New = func() any { return &exchange{out: make([]byte, 0, maxDatagram)} }
	return h
}

// refusal is a request that gets an HTTP error. Its text is for people and constant.
type refusal struct {
	status int
	text   string
}

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
	errHeader    = &refusal{http.StatusRequestHeaderFieldsTooLarge, "the header is larger than 16 KiB"}
	errMediaType = &refusal{http.StatusUnsupportedMediaType, "a POST has to be " + mediaMessage}
)

// dohRequest is what a request's header says, whatever HTTP version it came by.
type dohRequest struct {
	method, path, rawQuery string // the path without its escapes
	contentType            string
	contentEncoding        string
	accept                 []string
	length                 int64 // of the body; -1 when it is not known
}

// form is what the answer to a request has to look like.
type form = uint8

const (
	formJSON form = 1 << iota // application/dns-json, errors too
	formHead                  // no body
)

// begin judges a request by its header. The query is appended to in, or is the body when hasBody.
func (h *doh) begin(in []byte, r *dohRequest) (query []byte, f form, hasBody bool, err *refusal) {
	if r.method == http.MethodHead {
		f = formHead
	}
	if r.path != h.path {
		return in, f, false, errPath
	}
	switch r.method {
	case http.MethodPost:
		return in, f, true, acceptable(r)
	case http.MethodGet, http.MethodHead:
	default:
		return in, f, false, errMethod
	}
	if value, ok := strings.CutPrefix(r.rawQuery, "dns="); ok && !strings.ContainsAny(value, "&%+;") {
		in, err = appendMessage(in, value)
		return in, f, false, err
	}
	params, perr := url.ParseQuery(r.rawQuery)
	if perr != nil {
		return in, f, false, errParams
	}
	values := params["dns"]
	switch {
	case len(values) == 0 && (params.Has("name") || acceptsJSON(r.accept)):
		in, err = jsonQuery(in, params)
		return in, f | formJSON, false, err
	case len(values) == 0:
		return in, f, false, errNoQuery
	case len(values) > 1:
		return in, f, false, errTwice
	}
	in, err = appendMessage(in, values[0])
	return in, f, false, err
}

// acceptable judges the header of a POST.
func acceptable(r *dohRequest) *refusal {
	if r.contentType != mediaMessage {
		// A parameter without a value is an error that leaves the type known; RFC 8484 defines no parameters.
		media, _, err := mime.ParseMediaType(r.contentType)
		if err != nil && !errors.Is(err, mime.ErrInvalidMediaParameter) || media != mediaMessage {
			return errMediaType
		}
	}
	if r.contentEncoding != "" {
		return errMediaType
	}
	if r.length > wire.MaxMessage {
		return errTooLarge
	}
	return nil
}

// appendMessage appends what a dns parameter says to dst.
func appendMessage[T string | []byte](dst []byte, value T) ([]byte, *refusal) {
	if len(value) > base64.RawURLEncoding.EncodedLen(wire.MaxMessage) {
		return dst, errTooLarge
	}
	if dst, ok := appendBase64(dst, value); ok {
		return dst, nil
	}
	return dst, errBase64
}

// sextets has the value of each character of base64url (RFC 4648, section 5), and 0xff for the others.
var sextets = func() (values [256]byte) {
	for i := range values {
		values[i] = 0xff
	}
	for i, c := range "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_" {
		values[c] = byte(i)
	}
	return values
}()

// appendBase64 appends what s is base64url for to dst. Package base64 would copy a string, and take line breaks.
func appendBase64[T string | []byte](dst []byte, s T) (decoded []byte, ok bool) {
	i := 0
	for ; i+4 <= len(s); i += 4 {
		a, b, c, d := sextets[s[i]], sextets[s[i+1]], sextets[s[i+2]], sextets[s[i+3]]
		if a|b|c|d == 0xff {
			return dst, false
		}
		dst = append(dst, a<<2|b>>4, b<<4|c>>2, c<<6|d)
	}
	switch len(s) - i {
	case 0:
		return dst, true
	case 2:
		a, b := sextets[s[i]], sextets[s[i+1]]
		return append(dst, a<<2|b>>4), a|b != 0xff && b&0xf == 0
	case 3:
		a, b, c := sextets[s[i]], sextets[s[i+1]], sextets[s[i+2]]
		return append(dst, a<<2|b>>4, b<<4|c>>2), a|b|c != 0xff && c&3 == 0
	}
	return dst, false // six bits are no octet
}

// parse makes q the query in msg. What is wrong with it as DNS is left to DNS when it can be answered.
func (h *doh) parse(q *wire.Query, msg []byte) *refusal {
	q.Received = time.Now().UnixNano()
	q.Parse(msg)
	if q.Kind == wire.Junk || q.Fault == wire.RcodeFormErr && !readable(msg) {
		return errMessage
	}
	return nil
}

// reply is a response, whatever HTTP version it leaves by.
type reply struct {
	status int
	media  string
	maxAge uint32 // of a 200, RFC 8484, section 5.1; others are not stored
	allow  bool   // 405, RFC 9110, section 15.5.6
	accept bool   // 415, RFC 9110, section 15.5.16
	head   bool   // the body stays here
	body   []byte
}

// answered makes a reply of a response of the Handler. An error means that it was none, and nothing may be sent.
func answered(msg []byte, f form) (reply, error) {
	if len(msg) < wire.HeaderLen {
		return reply{}, errNoAnswer
	}
	r := reply{
		status: http.StatusOK, media: mediaMessage, maxAge: wire.Lifetime(msg), head: f&formHead != 0, body: msg,
	}
	if f&formJSON != 0 {
		var err error
		r.media = mediaJSON
		if r.body, err = jsonResponse(msg); err != nil {
			return reply{}, err
		}
	}
	return r, nil
}

var errNoAnswer = errors.New("no answer")

// refused makes a reply of an error: text, or JSON for who asked for that.
func refused(e *refusal, f form) reply {
	r := reply{
		status: e.status, media: mediaText, allow: e == errMethod, accept: e == errMediaType, head: f&formHead != 0,
	}
	if f&formJSON != 0 {
		r.media, r.body = mediaJSON, jsonError(e)
	} else {
		r.body = []byte(e.text + "\n")
	}
	return r
}

// ServeHTTP implements http.Handler, for HTTP/1.1 and HTTP/3.
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
	x := h.pool.Get().(*exchange)
	reply, err := h.exchange(w, r, x)
	if err == nil {
		h.write(w, r, &reply)
	}
	if cap(x.in) <= keepBuffer && cap(x.out) <= keepBuffer {
		h.pool.Put(x)
	}
	if err != nil {
		panic(http.ErrAbortHandler)
	}
}

// exchange returns the reply to r. An error means that nothing may be sent. The reply's body may be in x.
func (h *doh) exchange(w http.ResponseWriter, r *http.Request, x *exchange) (reply, error) {
	req := dohRequest{
		method: r.Method, path: r.URL.Path, rawQuery: r.URL.RawQuery, contentType: r.Header.Get("Content-Type"),
		contentEncoding: r.Header.Get("Content-Encoding"), accept: r.Header["Accept"], length: r.ContentLength,
	}
	in, f, hasBody, refusal := h.begin(x.in[:0], &req)
	if refusal == nil && hasBody {
		in, refusal = readBody(in, w, r)
	}
	x.in = in
	q := &x.q
	if refusal == nil {
		refusal = h.parse(q, in)
	}
	if refusal != nil {
		return refused(refusal, f), nil
	}
	q.Client, q.Local, q.Transport, q.Listener = h.client(r), h.local(r), wire.DoH, h.cfg.Name
	if r.ProtoMajor == 3 {
		q.Transport = wire.DoH3
	}
	out, verdict := h.cfg.serveWire(x.out[:0], q)
	if verdict == wire.Miss {
		var err error
		if out, err = h.cfg.resolve(h.ctx, x.out[:0], q); err != nil {
			return reply{}, err
		}
	}
	x.out = out[:0]
	if verdict == wire.Dropped {
		return reply{}, errNoAnswer
	}
	return answered(out, f)
}

// readBody appends the body of r to in.
func readBody(in []byte, w http.ResponseWriter, r *http.Request) ([]byte, *refusal) {
	// net/http times HTTP/1.1 itself; HTTP/3 needs this.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
	body := http.MaxBytesReader(w, r.Body, wire.MaxMessage)
	for {
		if len(in) == cap(in) {
			in = append(in, make([]byte, 512)...)[:len(in)]
		}
		n, err := body.Read(in[len(in):cap(in)])
		in = in[:len(in)+n]
		var tooLarge *http.MaxBytesError
		switch {
		case err == io.EOF:
			return in, nil
		case errors.As(err, &tooLarge):
			return in, errTooLarge
		case err != nil:
			return in, errBody
		}
	}
}

// write sends a reply. net/http leaves the body of an answer to HEAD away.
func (h *doh) write(w http.ResponseWriter, r *http.Request, reply *reply) {
	header := w.Header()
	// Values share one array, and names are in canonical form: Set would allocate for each.
	values := [5]string{
		reply.media, strconv.Itoa(len(reply.body)), "nosniff", "no-store", h.altSvc,
	}
	if reply.status == http.StatusOK {
		values[3] = "max-age=" + strconv.FormatUint(uint64(reply.maxAge), 10)
	}
	header["Content-Type"], header["Content-Length"] = values[0:1:1], values[1:2:2]
	header["X-Content-Type-Options"], header["Cache-Control"] = values[2:3:3], values[3:4:4]
	if h.altSvc != "" && r.ProtoMajor < 3 {
		header["Alt-Svc"] = values[4:5:5]
	}
	if reply.allow {
		header.Set("Allow", allowed)
	}
	if reply.accept {
		header.Set("Accept", mediaMessage)
	}
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout))
	w.WriteHeader(reply.status)
	_, _ = w.Write(reply.body) // the client has gone; there is nobody to tell
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
