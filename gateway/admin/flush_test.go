package admin

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

const token = "0123456789abcdef0123456789abcdef"

// boundTo is a listener that is never used.
type boundTo struct {
	net.Listener
	ip net.IP
}

func (l boundTo) Addr() net.Addr { return &net.TCPAddr{IP: l.ip, Port: 8081} }

// flushed is what was asked of the cache.
type flushed struct {
	Name  string
	Below bool
}

func TestFlush(t *testing.T) {
	header := func(pairs ...string) http.Header {
		h := http.Header{}
		for i := 0; i < len(pairs); i += 2 {
			h.Add(pairs[i], pairs[i+1])
		}
		return h
	}
	bearer := header("Authorization", "Bearer "+token)
	everything, one, all := &flushed{}, &flushed{Name: "a.example"}, &flushed{Name: "a.example", Below: true}
	for _, c := range []struct {
		name   string
		method string // "POST" by default
		query  string
		body   string
		header http.Header
		token  bool
		open   bool // other machines reach the endpoint
		off    bool // there is no cache
		status int
		want   *flushed // nil: the cache is not touched
		says   string   // a part of the body
	}{
		{name: "everything", status: 200, want: everything, says: `{"flushed": 7}`},
		{name: "a name", query: "name=a.example", status: 200, want: one},
		{name: "a name, in so many words", query: "name=a.example&below=false", status: 200, want: one},
		{name: "and below", query: "name=a.example&below=true", status: 200, want: all},
		{name: "the other way round", query: "below=true&name=a%2Eexample", status: 200, want: all},
		{name: "the root and below", query: "name=.&below=true", status: 200, want: &flushed{".", true}},

		{name: "GET", method: "GET", status: 405},
		{name: "HEAD", method: "HEAD", status: 405},
		{name: "DELETE", method: "DELETE", status: 405},
		{name: "OPTIONS of a preflight", method: "OPTIONS", header: header("Origin", "http://x"), status: 405},

		{name: "an empty name is not everything", query: "name=", status: 400, says: "empty"},
		{name: "a misspelled name is not everything", query: "nmae=a.example", status: 400, says: "no parameters but"},
		{name: "two names", query: "name=a&name=b", status: 400, says: "more than once"},
		{name: "below nothing", query: "below=true", status: 400, says: "below needs a name"},
		{name: "below what", query: "name=a&below=yes", status: 400, says: "true or false"},
		{name: "below empty", query: "name=a&below=", status: 400, says: "true or false"},
		{name: "no query", query: "name=%zz", status: 400, says: "cannot be read"},
		{name: "half a query", query: "name=a;below=true", status: 400, says: "cannot be read"},
		{name: "a form is not everything", body: "name=a.example", status: 400, says: "no body"},
		{name: "a bad name", query: "name=bad", status: 400, says: "name: two dots"},
		{name: "too late", query: "name=late", status: 503, says: `{"error":"the gateway is stopping; nothing was flushed"}`},
		{name: "the cache is off", off: true, status: 409, says: "the cache is off"},
		{name: "the cache is off, a name", off: true, query: "name=a", status: 409, says: "the cache is off"},

		{name: "a page of somebody else", header: header("Origin", "https://evil.example"), status: 403, says: "browser"},
		{name: "a page of nowhere", header: header("Origin", "null"), status: 403, says: "browser"},
		{name: "an empty Origin", header: header("Origin", ""), status: 403, says: "browser"},
		{name: "a page after DNS rebinding", header: header("Origin", "http://admin", "Sec-Fetch-Site", "same-origin"), status: 403,
			says: "browser"},
		{name: "cross-site", header: header("Sec-Fetch-Site", "cross-site"), status: 403, says: "browser"},
		{name: "a browser with the token", header: header("Origin", "http://x", "Authorization", "Bearer "+token), token: true, status: 403,
			says: "browser"},

		{name: "the token", header: bearer, token: true, status: 200, want: everything},
		{name: "the token from anywhere", header: bearer, token: true, open: true, status: 200, want: everything},
		{name: "the scheme in small letters", header: header("Authorization", "bearer  "+token), token: true, status: 200, want: everything},
		{name: "no token", token: true, status: 401, says: "Bearer TOKEN"},
		{name: "no token, and a mistake that it does not get to see", query: "x=y", token: true, status: 401, says: "Bearer TOKEN"},
		{name: "another token", header: header("Authorization", "Bearer "+token[1:]+"0"), token: true, status: 401},
		{name: "the front of the token", header: header("Authorization", "Bearer "+token[:8]), token: true, status: 401},
		{name: "more than the token", header: header("Authorization", "Bearer "+token+"0"), token: true, status: 401},
		{name: "an empty token", header: header("Authorization", "Bearer "), token: true, status: 401},
		{name: "another scheme", header: header("Authorization", "Basic "+token), token: true, status: 401},
		{name: "the token alone", header: header("Authorization", token), token: true, status: 401},
		{name: "two headers", header: header("Authorization", "Bearer x", "Authorization", "Bearer "+token), token: true, status: 401},
		{name: "the token in the URL", query: "access_token=" + token, token: true, status: 401},
		{name: "open without a token", open: true, status: 403, says: "admin.token"},
		{name: "open without a token, and one that is made up", header: bearer, open: true, status: 403, says: "admin.token"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got *flushed
			cfg := Config{Ready: ready, Flush: func(_ context.Context, name string, below bool) (int, error) {
				switch name {
				case "bad":
					return 0, errors.New("two dots")
				case "late":
					return 0, ErrStopping
				}
				got = &flushed{name, below}
				return 7, nil
			}}
			if c.off {
				cfg.Flush = nil
			}
			if c.token {
				cfg.Token = token
			}
			s, err := New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			s.listener = boundTo{ip: net.IPv6loopback}
			if c.open {
				s.listener = boundTo{ip: net.IPv6unspecified}
			}
			if c.method == "" {
				c.method = "POST"
			}
			r := httptest.NewRequest(c.method, "http://admin/cache/flush?"+c.query, strings.NewReader(c.body))
			if c.header != nil {
				r.Header = c.header
			}
			w := httptest.NewRecorder()
			s.Handler().ServeHTTP(w, r)
			if w.Code != c.status || !strings.Contains(w.Body.String(), c.says) {
				t.Errorf("got %d %q, want %d and %q", w.Code, w.Body.String(), c.status, c.says)
			}
			switch {
			case (got == nil) != (c.want == nil):
				t.Errorf("flushed %+v, want %+v", got, c.want)
			case got != nil && *got != *c.want:
				t.Errorf("flushed %+v, want %+v", *got, *c.want)
			}
			if got, want := w.Header().Get("Allow"), map[bool]string{true: "POST"}[c.status == 405]; got != want {
				t.Errorf("Allow %q, want %q", got, want)
			}
			if got, want := w.Header().Get("WWW-Authenticate"), map[bool]string{true: `Bearer realm="dnsgateway"`}[c.status == 401]; got != want {
				t.Errorf("WWW-Authenticate %q, want %q", got, want)
			}
			if strings.Contains(w.Body.String(), token) {
				t.Errorf("the answer shows the token: %q", w.Body.String())
			}
			var body struct{ Error string }
			if c.status != 405 && (w.Header().Get("Content-Type") != jsonType || json.Unmarshal(w.Body.Bytes(), &body) != nil ||
				(body.Error == "") != (c.status == 200)) {
				t.Errorf("got %q, want JSON with or without an error", w.Body.String())
			}
			if w.Header().Get("Access-Control-Allow-Origin") != "" {
				t.Error("a page may read this")
			}
		})
	}
}

// TestFlushOverTheNetwork asks on a real loopback address, which needs no token, and has health and metrics open when there
// is one.
func TestFlushOverTheNetwork(t *testing.T) {
	for _, withToken := range []string{"", token} {
		s, _ := start(t, Config{Ready: ready, Metrics: http.HandlerFunc(metrics), Token: withToken,
			Flush: func(context.Context, string, bool) (int, error) { return 3, nil }})
		base := "http://" + s.Addr().String()
		want := http.StatusOK
		if withToken != "" {
			want = http.StatusUnauthorized
		}
		resp, err := http.Post(base+"/cache/flush", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("with the token %q: got %s, want %d", withToken, resp.Status, want)
		}
		for _, path := range []string{"/", "/livez", "/readyz", "/metrics"} {
			resp, err := http.Get(base + path)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				t.Errorf("%s with the token %q: got %s", path, withToken, resp.Status)
			}
		}
	}
}

// FuzzFlushQuery proves that nothing but an empty query is the whole cache, and that what is refused is told so in JSON.
func FuzzFlushQuery(f *testing.F) {
	for _, q := range []string{"", "name=a&below=true", "name=", "below=true", "name=a&name=b", "name=%00", "a;b", "&", "name=%e4", "="} {
		f.Add(q)
	}
	f.Fuzz(func(t *testing.T, query string) {
		called := 0
		s, err := New(Config{Ready: ready, Flush: func(_ context.Context, name string, below bool) (int, error) {
			called++
			values, err := url.ParseQuery(query)
			if err != nil || name == "" && len(values) > 0 || name == "" && below || name != values.Get("name") {
				t.Errorf("%q flushes %q, below %v", query, name, below)
			}
			return 0, nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		s.listener = boundTo{ip: net.IPv6loopback}
		r := httptest.NewRequest("POST", "http://admin/cache/flush", nil)
		r.URL.RawQuery = query
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, r)
		if !json.Valid(w.Body.Bytes()) || (w.Code == http.StatusOK) != (called == 1) || w.Code != http.StatusOK && w.Code != http.StatusBadRequest {
			t.Errorf("%q: got %d %q, %d calls", query, w.Code, w.Body, called)
		}
	})
}
