package listen

import (
	"bytes"
	"net/http"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2/hpack"

	"dnsgateway/gateway/wire"
)

// h2Header is what a request's header says. Its octets are valid until the next header is read.
type h2Header struct {
	method, scheme, authority, path []byte
	contentType, contentEncoding    []byte
	accept                          []byte // all of them, separated by commas
	host                            []byte

	length    int64 // Content-Length, -1 without
	seen      uint8 // bit i: the pseudo-header field of kind i was there
	regular   bool  // a field that is no pseudo-header field was there
	expect    bool  // 100-continue, RFC 9110, section 10.1.1
	malformed bool  // RFC 9113, section 8.1.1
	tooLarge  bool  // for a 431
}

// read reads a header block. An error is one of the connection. The block is read to its end whatever is in it, because
// the next one needs the table.
func (h *h2Header) read(r *fieldReader, t *fieldTable, block []byte) error {
	*h = h2Header{length: -1, accept: h.accept[:0]}
	*r = fieldReader{rest: block, text: r.text[:0]}
	size := 0
	for {
		mark := len(r.text)
		f, ok, err := r.next(t)
		if !ok {
			return err
		}
		size += f.size()
		switch {
		case size > maxBlock:
			return errBlock
		case size > maxHeader:
			h.tooLarge = true
			r.text = r.text[:mark]
			h.check(&f)
		default:
			h.add(r, &f)
		}
	}
}

// check looks for what makes a request malformed.
func (h *h2Header) check(f *field) {
	if f.kind == fieldForbidden || f.unsound || f.kind == fieldTE && string(f.value) != "trailers" {
		h.malformed = true
	}
	if f.kind < fieldMethod || f.kind > fieldPath {
		h.regular = true
		return
	}
	if bit := uint8(1) << f.kind; h.seen&bit != 0 || h.regular {
		h.malformed = true // RFC 9113, section 8.3: once each, before all others
	} else {
		h.seen |= bit
	}
}

// add takes a field in.
func (h *h2Header) add(r *fieldReader, f *field) {
	h.check(f)
	var to *[]byte
	switch f.kind {
	case fieldMethod:
		to = &h.method
	case fieldScheme:
		to = &h.scheme
	case fieldAuthority:
		to = &h.authority
	case fieldPath:
		to = &h.path
	case fieldContentType:
		to = &h.contentType
	case fieldContentEncoding:
		to = &h.contentEncoding
	case fieldHost:
		to = &h.host
	case fieldAccept:
		h.accept = append(append(h.accept, ','), f.value...)
		return
	case fieldContentLength:
		n, ok := contentLength(f.value)
		if !ok || h.length >= 0 && h.length != n {
			h.malformed = true
		}
		h.length = n
		return
	case fieldExpect:
		h.expect = bytes.EqualFold(f.value, []byte("100-continue"))
		return
	default:
		return
	}
	if *to == nil { // of a field that is there twice, the first one counts, as for net/http
		// What is in a table may be moved by the fields that follow.
		*to = r.copy(f.value)
	}
}

// contentLength reads the value of Content-Length, RFC 9110, section 8.6.
func contentLength(v []byte) (n int64, ok bool) {
	if len(v) == 0 || len(v) > 18 {
		return 0, false
	}
	for _, c := range v {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = 10*n + int64(c-'0')
	}
	return n, true
}

// complete checks what a request has to have: RFC 9113, sections 8.3.1 and 8.5.
func (h *h2Header) complete() bool {
	if h.malformed {
		return false
	}
	if string(h.method) == http.MethodConnect {
		return h.scheme == nil && h.path == nil && len(h.authority) > 0
	}
	return len(h.method) > 0 && len(h.path) > 0 && (string(h.scheme) == "https" || string(h.scheme) == "http") &&
		(h.host == nil || h.authority == nil || bytes.EqualFold(h.host, h.authority))
}

// request begins a request whose header has come, and answers it when that is all.
func (c *h2) request(t *turn, x *h2Scratch, id uint32, h *h2Header, end bool) error {
	if !h.tooLarge && (!h.complete() || end && h.length > 0) {
		return c.malformed(t, id, end)
	}
	// What clients send, before what they may send: the two forms of RFC 8484, with nothing around them.
	if end && !h.tooLarge && string(h.method) == http.MethodGet && bytes.HasPrefix(h.path, c.doh.get) {
		if value := h.path[len(c.doh.get):]; len(c.doh.get) > 0 {
			in, refusal := appendMessage(x.in[:0], value)
			x.in = in
			if refusal == nil {
				c.askLater(t, x, id, in)
				return nil
			}
		}
	}
	c.askNow(t, x) // for streams are kept in the order of their ids, and this may become one of them
	if h.tooLarge {
		var f form
		if string(h.method) == http.MethodHead {
			f = formHead
		}
		c.judged(t, x, id, h, end, f, errHeader, false)
		return nil
	}
	if string(h.method) == http.MethodPost && len(c.doh.get) > 0 && string(h.path) == c.doh.path &&
		string(h.contentType) == mediaMessage && len(h.contentEncoding) == 0 && h.length <= wire.MaxMessage {
		c.judged(t, x, id, h, end, 0, nil, true)
		return nil
	}
	return c.slowRequest(t, x, id, h, end)
}

// slowRequest does the same for all requests.
func (c *h2) slowRequest(t *turn, x *h2Scratch, id uint32, h *h2Header, end bool) error {
	r := dohRequest{
		method: string(h.method), contentType: string(h.contentType), contentEncoding: string(h.contentEncoding),
		accept: []string{string(h.accept)}, length: h.length,
	}
	switch {
	case r.method == http.MethodConnect:
	case h.path[0] == '/' || r.method == http.MethodOptions && string(h.path) == "*":
		u, err := url.ParseRequestURI(string(h.path))
		if err != nil {
			return c.malformed(t, id, end)
		}
		r.path, r.rawQuery = u.Path, u.RawQuery
	default:
		return c.malformed(t, id, end)
	}
	in, f, hasBody, refusal := c.doh.begin(x.in[:0], &r)
	x.in = in
	c.judged(t, x, id, h, end, f, refusal, hasBody)
	return nil
}

// judged goes on with a request whose header was judged. One that has an end to come is not answered before that, although
// it may be clear already what with: first it has to be a request.
func (c *h2) judged(t *turn, x *h2Scratch, id uint32, h *h2Header, end bool, f form, refusal *refusal, hasBody bool) {
	if end {
		switch {
		case refusal != nil:
			r := refused(refusal, f)
			c.respond(t, id, nil, &r, time.Now().Unix())
		case hasBody:
			c.ask(t, x, id, nil, nil, f)
		default:
			c.ask(t, x, id, nil, x.in, f)
		}
		return
	}
	st := c.add(id)
	st.open, st.form, st.length, st.refusal = true, f, h.length, refusal
	switch {
	case refusal != nil:
		st.state = discarding
		if h.expect || refusal == errTooLarge {
			c.refuse(t, st) // the client waits for it, or has too much to say
			return
		}
	case hasBody:
		st.state = collecting
	default: // GET with a body, which means nothing
		st.state = discarding
		st.buf = append(st.buf, x.in...)
	}
	if h.expect {
		t.out = append(appendFrame(t.out, 5, frameHeaders, flagEndHeaders, id), 0x08, 3, '1', '0', '0')
	}
}

// Indices of the static table, RFC 7541, appendix A.
const (
	indexStatus        = 8
	indexStatus200     = 8
	indexStatus400     = 12
	indexStatus404     = 13
	indexAccept        = 19
	indexAllow         = 22
	indexCacheControl  = 24
	indexContentLength = 28
	indexContentType   = 31
	indexDate          = 33
)

// h2Fields are the parts of our header blocks that are always the same.
type h2Fields struct {
	get  []byte // what the path of a GET with a message begins with; empty when the path of the resource has escapes
	same []byte // in all responses
	ok   []byte // the beginning of all responses that are DNS messages
	date atomic.Pointer[h2Date]
}

// h2Date is a Date field, which RFC 9110, section 6.6.1 asks for.
type h2Date struct {
	second int64
	field  []byte
}

// compile sets the fields.
func (h *h2Fields) compile(path, altSvc string) {
	h.get = nil
	if u, err := url.ParseRequestURI(path); err == nil && u.Path == path && u.RawQuery == "" && !u.ForceQuery {
		h.get = []byte(path + "?dns=")
	}
	h.same = appendNamed(nil, "x-content-type-options", "nosniff")
	if altSvc != "" {
		h.same = appendNamed(h.same, "alt-svc", altSvc)
	}
	h.ok = append([]byte{0x80 | indexStatus200}, h.same...)
	h.ok = appendCompressed(appendLiteral(h.ok, indexContentType), mediaMessage)
}

// appendLiteral appends the beginning of a field that is not to be indexed (RFC 7541, section 6.2.2) whose name is in the
// static table.
func appendLiteral(dst []byte, index byte) []byte {
	if index < 15 {
		return append(dst, index)
	}
	return append(dst, 15, index-15)
}

// appendText appends a string as it is. It is shorter than 127 octets.
func appendText[T string | []byte](dst []byte, s T) []byte {
	return append(append(dst, byte(len(s))), s...)
}

// appendCompressed appends a string in Huffman code, whose length is less than 127.
func appendCompressed(dst []byte, s string) []byte {
	return hpack.AppendHuffmanString(append(dst, 0x80|byte(hpack.HuffmanEncodeLength(s))), s)
}

func appendNamed(dst []byte, name, value string) []byte {
	return appendCompressed(appendCompressed(append(dst, 0), name), value)
}

// appendHeader appends the header block of a response. It uses no dynamic table, which obeys whatever the client says of
// the size of its own.
func (h *doh) appendHeader(dst []byte, r *reply, now int64) []byte {
	if r.status == http.StatusOK && r.media == mediaMessage {
		dst = append(dst, h.ok...)
	} else {
		switch r.status {
		case http.StatusOK:
			dst = append(dst, 0x80|indexStatus200)
		case http.StatusBadRequest:
			dst = append(dst, 0x80|indexStatus400)
		case http.StatusNotFound:
			dst = append(dst, 0x80|indexStatus404)
		default:
			dst = appendText(appendLiteral(dst, indexStatus), strconv.Itoa(r.status))
		}
		dst = append(dst, h.same...)
		dst = appendText(appendLiteral(dst, indexContentType), r.media)
	}
	dst = append(dst, h.dateField(now)...)
	dst = appendNumber(appendLiteral(dst, indexContentLength), "", uint64(len(r.body)))
	if r.status == http.StatusOK {
		dst = appendNumber(appendLiteral(dst, indexCacheControl), "max-age=", uint64(r.maxAge))
	} else {
		dst = appendText(appendLiteral(dst, indexCacheControl), "no-store")
	}
	if r.allow {
		dst = appendText(appendLiteral(dst, indexAllow), allowed)
	}
	if r.accept {
		dst = appendText(appendLiteral(dst, indexAccept), mediaMessage)
	}
	return dst
}

// appendNumber appends a string that ends in a number.
func appendNumber(dst []byte, prefix string, n uint64) []byte {
	at := len(dst)
	dst = strconv.AppendUint(append(append(dst, 0), prefix...), n, 10)
	dst[at] = byte(len(dst) - at - 1)
	return dst
}

// dateField returns the Date field of a second. Whoever is first in it makes the field.
func (h *h2Fields) dateField(second int64) []byte {
	if d := h.date.Load(); d != nil && d.second == second {
		return d.field
	}
	text := time.Unix(second, 0).UTC().Format(http.TimeFormat)
	d := &h2Date{second: second, field: appendText(appendLiteral(nil, indexDate), text)}
	h.date.Store(d)
	return d.field
}
