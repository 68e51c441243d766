package listen

import (
	"bytes"
	"encoding/base64"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"dnsgateway/gateway/wire"
)

// FuzzH2 has a client send any octets behind the preface, in pieces, with answers to its misses in between: nothing
// panics, what comes back is frames, no stream is answered twice, and what is held has a bound.
func FuzzH2(f *testing.F) {
	seed := func(do func(s *h2Script)) {
		s := newH2Script(f, fuzzHandler{})
		s.in.Reset()
		_ = s.fr.WriteSettings(http2.Setting{ID: settingWindow, Val: 20})
		do(s)
		f.Add(s.in.Bytes(), []byte{9, 30, 200})
	}
	seed(func(s *h2Script) {
		s.get(1, "hit")
		_ = s.fr.WriteWindowUpdate(1, 100)
		s.request(3, true, "HEAD", defaultPath+"?name=a.test")
		_ = s.fr.WritePing(false, [8]byte{})
	})
	seed(func(s *h2Script) {
		s.post(1)
		_ = s.fr.WriteData(1, false, query(f, "x", 0)[:5])
		_ = s.fr.WriteDataPadded(1, true, query(f, "x", 0)[5:], make([]byte, 3))
		s.post(3)
		_ = s.fr.WriteData(3, true, query(f, "x", 1))
		_ = s.fr.WriteRSTStream(3, http2.ErrCodeCancel)
		_ = s.fr.WriteWindowUpdate(0, 100)
	})
	seed(func(s *h2Script) {
		block := s.block(":method", "GET", ":scheme", "https", ":path", "/x", "accept", "y")
		_ = s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block[:3], PadLength: 4})
		_ = s.fr.WriteContinuation(1, false, block[3:])
		_ = s.fr.WriteContinuation(1, true, nil)
		_ = s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: s.block("a", "b"), EndStream: true, EndHeaders: true})
		_ = s.fr.WriteGoAway(0, 0, nil)
		_ = s.fr.WritePriority(9, http2.PriorityParam{StreamDep: 1})
	})
	seed(func(s *h2Script) {
		_ = s.fr.WriteSettings(http2.Setting{ID: settingWindow, Val: 1 << 20})
		_ = s.fr.WriteWindowUpdate(0, 1<<20)
		for id := uint32(1); id < 15; id += 2 {
			s.get(id, "large")
		}
		_ = s.fr.WriteRSTStream(9, http2.ErrCodeCancel)
		s.get(15, "large")
	})
	f.Fuzz(func(t *testing.T, octets, cuts []byte) {
		s := newH2Script(t, fuzzHandler{})
		all := append([]byte(h2Preface), octets...)
		var out []byte
		for have := 0; have < len(all) && s.err == nil; {
			n := len(all) - have
			if len(cuts) > 0 {
				n, cuts = min(n, int(cuts[0])+1), cuts[1:]
			}
			have += n
			s.in.Write(all[have-n : have])
			for s.err == nil {
				used, err := s.c.input(&s.turn, s.in.Bytes())
				s.in.Next(used)
				s.err = err
				said := len(s.turn.out) > 0
				out = append(out, s.turn.out...)
				s.turn.out = s.turn.out[:0]
				if used == 0 && !said {
					break
				}
			}
			if n&1 == 0 {
				for _, m := range s.turn.misses {
					msg, _ := s.d.cfg.resolve(s.d.ctx, nil, &m.q)
					s.c.answer(&s.turn, m, msg)
				}
				s.turn.misses = s.turn.misses[:0]
			}
			bodies, held, misses, waiting := 0, 0, 0, 0
			for _, st := range s.c.streams {
				switch st.state {
				case collecting:
					bodies += len(st.buf)
				case sending:
					held += len(st.buf) - st.sent
				case resolving:
					misses++
				case queued:
					waiting++
				}
			}
			if s.err == nil && (bodies != s.c.bodies || held != s.c.held || misses+s.c.orphans != len(s.turn.misses) ||
				waiting != s.c.queued) {
				t.Fatalf("%d, %d and %d of %d, counted as %+v", bodies, held, misses, len(s.turn.misses), s.c)
			}
			if bodies > maxBodies || held > maxHeld || len(s.c.streams)+s.c.orphans > maxStreams || len(s.c.block) > maxBlock ||
				len(s.c.ignored) > maxStreams || len(s.turn.misses) > maxStreams {
				t.Fatalf("too much: %+v", s.c)
			}
		}
		out = append(out, s.turn.out...)
		said, err := h2Frames(out)
		if err != nil {
			t.Fatal(err)
		}
		ended := map[string]bool{}
		for _, line := range said {
			words := strings.Fields(line)
			if words[0] != "HEADERS" && words[0] != "DATA" {
				continue
			}
			if ended[words[1]] {
				t.Fatalf("more of a stream that has ended: %q", said)
			}
			ended[words[1]] = words[len(words)-1] == "end"
		}
	})
}

// FuzzDoHForms sends the same request through net/http's handler and through HTTP/2: the same status, header and body.
func FuzzDoHForms(f *testing.F) {
	hit := query(f, "hit", 0)
	for _, s := range []struct {
		method, path, contentType, encoding, accept string
		body                                        []byte
	}{
		{"GET", defaultPath + "?dns=" + b64(hit), "", "", "", nil},
		{"GET", defaultPath + "?dns=" + b64(hit) + "%41", "", "", "*/*", nil},
		{"GET", "/dns%2dquery?x=1&dns=" + b64(hit), "", "", "", nil},
		{"HEAD", defaultPath + "?dns=" + b64(query(f, "miss", 1)), "", "", mediaMessage, nil},
		{"GET", defaultPath + "?name=hit.test&type=aaaa&do=1&cd=true", "", "", mediaJSON, nil},
		{"GET", defaultPath + "?name=..", "", "", "", nil},
		{"GET", defaultPath, "", "", mediaJSON, nil},
		{"GET", defaultPath + "?dns=%zz", "", "", "", nil},
		{"POST", defaultPath, mediaMessage, "", "", hit},
		{"POST", defaultPath + "?", mediaMessage + "; charset=utf-8", "", "", query(f, "drop", 2)},
		{"POST", defaultPath, mediaMessage, "gzip", "", twoQuestions(f)},
		{"PATCH", defaultPath, mediaMessage, "", "", hit},
	} {
		f.Add(s.method, s.path, s.contentType, s.encoding, s.accept, s.body)
	}
	f.Fuzz(func(t *testing.T, method, path, contentType, encoding, accept string, body []byte) {
		u, err := url.ParseRequestURI(path)
		if err != nil || path[0] != '/' || method == "" || method == "CONNECT" {
			return
		}
		for _, v := range []string{method, path, contentType, encoding, accept} {
			if !soundValue([]byte(v)) {
				return
			}
		}
		if len(method)+len(path)+len(contentType)+len(encoding)+len(accept) > maxHeader/2 || len(body) > wire.MaxMessage {
			return
		}
		s := opened(t, fuzzHandler{}, http2.Setting{ID: settingWindow, Val: 1 << 20})
		fields := []string{"content-type", contentType, "content-encoding", encoding, "accept", accept}
		if method == "POST" {
			fields = append(fields, "content-length", strconv.Itoa(len(body)))
		} else {
			body = nil
		}
		s.request(1, method != "POST", method, path, fields...)
		if method == "POST" {
			rest := body
			for ; len(rest) > maxFrame; rest = rest[maxFrame:] {
				_ = s.fr.WriteData(1, false, rest[:maxFrame])
			}
			_ = s.fr.WriteData(1, true, rest)
		}
		for s.in.Len() > 0 && s.err == nil {
			used, err := s.c.input(&s.turn, s.in.Bytes())
			s.in.Next(used)
			s.err = err
		}
		for _, m := range s.turn.misses {
			msg, _ := s.d.cfg.resolve(s.d.ctx, nil, &m.q)
			s.c.answer(&s.turn, m, msg)
		}
		if s.err != nil {
			t.Fatal(s.err)
		}
		got := readResponse(t, s.turn.out)

		w := httptest.NewRecorder()
		want := response{reset: true}
		if !aborted(s.d, w, &http.Request{
			Method: method, URL: u, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, ContentLength: int64(len(body)),
			Header:     http.Header{"Content-Type": {contentType}, "Content-Encoding": {encoding}, "Accept": {accept}},
			Body:       io.NopCloser(bytes.NewReader(body)),
			RemoteAddr: "127.0.0.1:4711",
		}) {
			want = response{status: w.Code, header: map[string]string{}, body: w.Body.String()}
			for k, v := range w.Header() {
				want.header[strings.ToLower(k)] = v[0]
			}
			if method == "HEAD" {
				want.body = "" // net/http leaves it away, the recorder does not
			}
		}
		if d := cmp.Diff(got, want, cmp.AllowUnexported(response{})); d != "" {
			t.Errorf("HTTP/2 (-), net/http (+):\n%s", d)
		}
	})
}

// response is what came back on a stream.
type response struct {
	reset  bool
	status int
	header map[string]string // but Date
	body   string
}

func readResponse(t *testing.T, out []byte) (r response) {
	fr := http2.NewFramer(nil, bytes.NewReader(out))
	fr.ReadMetaHeaders = hpack.NewDecoder(0, nil)
	for {
		f, err := fr.ReadFrame()
		if err == io.EOF {
			return r
		}
		if err != nil {
			t.Fatal(err)
		}
		switch f := f.(type) {
		case *http2.RSTStreamFrame:
			r.reset = f.ErrCode != http2.ErrCodeNo
		case *http2.DataFrame:
			r.body += string(f.Data())
		case *http2.MetaHeadersFrame:
			r.status, _ = strconv.Atoi(f.PseudoValue("status"))
			r.header = map[string]string{}
			for _, h := range f.RegularFields() {
				if h.Name == "date" {
					if _, err := http.ParseTime(h.Value); err != nil {
						t.Error(err)
					}
					continue
				}
				if r.header[h.Name] != "" {
					t.Errorf("%s twice", h.Name)
				}
				r.header[h.Name] = h.Value
			}
		}
	}
}

// FuzzBase64 compares with package encoding/base64.
func FuzzBase64(f *testing.F) {
	for _, s := range []string{"", "A", "AA", "AB", "AAA", "AAAA", "AAB", "-_-_", "AA==", "A\nAA", "+/AA"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, ok := appendBase64(nil, s)
		want, err := base64.RawURLEncoding.Strict().DecodeString(s)
		if wantOK := err == nil && !strings.ContainsAny(s, "\r\n"); ok != wantOK || ok && !bytes.Equal(got, want) {
			t.Errorf("got %x, %v, want %x, %v", got, ok, want, err)
		}
	})
}
