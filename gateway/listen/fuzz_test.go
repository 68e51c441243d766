package listen

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/miekg/dns"

	"dnsgateway/gateway/wire"
)

// FuzzDoH sends any request to the DoH handler. It never panics but for ErrAbortHandler, its status is one of those that
// it documents, a 200 is a response to the query or JSON, and no header has a line break.
func FuzzDoH(f *testing.F) {
	hit := query(f, "hit", 0)
	seeds := []struct {
		method, path, rawQuery, contentType, accept string
		body                                        []byte
	}{
		{"GET", defaultPath, "dns=" + b64(hit), "", "", nil},
		{"HEAD", defaultPath, "dns=" + b64(query(f, "miss", 1)), "", mediaMessage, nil},
		{"GET", defaultPath, "name=hit.test&type=aaaa&do=1&cd=true", "", mediaJSON, nil},
		{"GET", defaultPath, "name=nxdomain.test&type=TYPE65", "", "", nil},
		{"GET", defaultPath, "", "", mediaJSON, nil},
		{"GET", defaultPath, "dns=%zz", "", "", nil},
		{"GET", "/", "", "", "", nil},
		{"POST", defaultPath, "", mediaMessage, "", hit},
		{"POST", defaultPath, "", mediaMessage + "; charset=utf-8", "", query(f, "drop", 2)},
		{"POST", defaultPath, "", mediaMessage, "", twoQuestions(f)},
		{"POST", defaultPath, "", "text/plain", "", hit},
		{"PATCH", defaultPath, "", mediaMessage, "", hit},
	}
	for _, s := range seeds {
		f.Add(s.method, s.path, s.rawQuery, s.contentType, s.accept, s.body)
	}
	c := common(fuzzHandler{})
	if err := c.check(); err != nil {
		f.Fatal(err)
	}
	h := newDoH(context.Background(), c, defaultPath, `h3=":443"; ma=86400`)
	statuses := []int{200, 400, 404, 405, 413, 415}
	f.Fuzz(func(t *testing.T, method, path, rawQuery, contentType, accept string, body []byte) {
		r := &http.Request{
			Method: method, URL: &url.URL{Path: path, RawQuery: rawQuery}, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
			Header:     http.Header{"Content-Type": {contentType}, "Accept": {accept}},
			Body:       io.NopCloser(bytes.NewReader(body)),
			RemoteAddr: "[::ffff:192.0.2.7]:4711", ContentLength: -1,
		}
		w := httptest.NewRecorder()
		if aborted(h, w, r) {
			if w.Body.Len() > 0 {
				t.Error("aborted with a body")
			}
			return
		}
		if !slices.Contains(statuses, w.Code) {
			t.Errorf("status %d", w.Code)
		}
		for k, values := range w.Header() {
			for _, v := range values {
				if bytes.ContainsAny([]byte(v), "\r\n") {
					t.Errorf("header %s: %q", k, v)
				}
			}
		}
		if w.Code == http.StatusMethodNotAllowed && w.Header().Get("Allow") != allowed {
			t.Error("405 without Allow")
		}
		switch media := w.Header().Get("Content-Type"); {
		case media == mediaJSON:
			if !json.Valid(w.Body.Bytes()) {
				t.Errorf("not JSON: %q", w.Body)
			}
		case w.Code == http.StatusOK:
			var m dns.Msg
			if err := m.Unpack(w.Body.Bytes()); err != nil || !m.Response || media != mediaMessage {
				t.Errorf("%s: %v, %v", media, err, &m)
			}
		case media != "text/plain; charset=utf-8":
			t.Errorf("an error as %q", media)
		}
	})
}

// FuzzStream writes any octets to a connection, cut into pieces anywhere: the answers are those to the whole messages in
// them, in order, whatever the cuts.
func FuzzStream(f *testing.F) {
	f.Add(framed(query(f, "hit", 1), query(f, "hit", 2)), []byte{1, 1, 1, 30})
	f.Add(framed(nil, []byte("xyz"), make([]byte, 5000), query(f, "hit", 2)), []byte{255, 0, 3})
	f.Add([]byte{0, 40, 1}, []byte{})
	cfg := StreamConfig{Common: common(echoLong{})}
	if err := cfg.complete(); err != nil {
		f.Fatal(err)
	}
	s := newStream(cfg, newPipes())
	f.Fuzz(func(t *testing.T, octets, cuts []byte) {
		conn := &script{in: octets, cuts: cuts}
		newStreamConn(s.streams, conn, nil, newDNSMachine(newPeer(&s.cfg.Common, conn, wire.TCP), s.cfg.Pipeline)).serve()
		var want []byte
		for rest := octets; len(rest) >= 2; {
			n := int(rest[0])<<8 | int(rest[1])
			if rest = rest[2:]; n > len(rest) {
				break
			}
			if n >= 3 {
				want = append(want, framed(rest[:n])...)
			}
			rest = rest[n:]
		}
		if !bytes.Equal(conn.out, want) {
			t.Errorf("got %x, want %x", conn.out, want)
		}
	})
}

// script is a connection whose client sends in, cut into pieces of cuts[i]+1 octets, and then half-closes.
type script struct {
	net.Conn
	in, cuts, out []byte
}

func (s *script) Read(b []byte) (int, error) {
	if len(s.in) == 0 {
		return 0, io.EOF
	}
	n := len(s.in)
	if len(s.cuts) > 0 {
		n, s.cuts = min(n, int(s.cuts[0])+1), s.cuts[1:]
	}
	n = copy(b, s.in[:n])
	s.in = s.in[n:]
	return n, nil
}

func (s *script) Write(b []byte) (int, error) {
	s.out = append(s.out, b...)
	return len(b), nil
}

func (*script) Close() error                     { return nil }
func (*script) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (*script) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (*script) SetReadDeadline(time.Time) error  { return nil }
func (*script) SetWriteDeadline(time.Time) error { return nil }

// echoLong sends back what is at least three octets long.
type echoLong struct{ echo }

func (echoLong) ServeWire(dst []byte, q *wire.Query) ([]byte, wire.Verdict) {
	if len(q.Raw) < 3 {
		return dst, wire.Dropped
	}
	return append(dst, q.Raw...), wire.Answered
}

func aborted(h http.Handler, w http.ResponseWriter, r *http.Request) (yes bool) {
	defer func() {
		if p := recover(); p != nil {
			if p != http.ErrAbortHandler {
				panic(p)
			}
			yes = true
		}
	}()
	h.ServeHTTP(w, r)
	return false
}

// fuzzHandler answers every query, half of them after a miss, and drops a few. Some answers are large.
type fuzzHandler struct{ surprised }

func (fuzzHandler) ServeWire(dst []byte, q *wire.Query) ([]byte, wire.Verdict) {
	switch {
	case firstLabel(q) == "drop":
		return dst, wire.Dropped
	case q.ID&1 != 0:
		return dst, wire.Miss
	case firstLabel(q) == "large":
		return large{}.ServeWire(dst, q)
	}
	return appendReply(dst, q, q.Fault), wire.Answered
}

func (fuzzHandler) Resolve(_ context.Context, dst []byte, q *wire.Query) ([]byte, error) {
	return appendReply(dst, q, q.Fault), nil
}

func twoQuestions(t testing.TB) []byte {
	m := new(dns.Msg).SetQuestion("hit.test.", dns.TypeA)
	m.Question = append(m.Question, m.Question[0])
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}
