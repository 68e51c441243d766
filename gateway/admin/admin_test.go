package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

var loopback = netip.MustParseAddrPort("127.0.0.1:0")

func ready() Readiness { return Readiness{Ready: true} }

func notReady() Readiness {
	return Readiness{
		Reasons:   []string{`group "default": every server is failing`},
		Listeners: []Listener{{Name: "plain", URL: "dns://:8053", Addr: "[::]:8053", Ready: true}},
		Groups: []Group{{Name: "default", Servers: []UpstreamServer{
			{URL: "tls://192.0.2.1", Tier: 1, State: "failing", Error: "connection refused"},
		}}},
	}
}

func metrics(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "up 1\n") }

func TestEndpoints(t *testing.T) {
	full := Config{Ready: ready, Metrics: http.HandlerFunc(metrics)}
	dead := Config{Ready: notReady, Live: func() error { return errors.New("stopping") }}
	for _, c := range []struct {
		name, method, path string
		cfg                Config
		status             int
		contentType        string
		body               string // a part of it
	}{
		{"live", "GET", "/livez", full, 200, textType, "ok\n"},
		{"live by a function", "GET", "/livez", Config{Ready: ready, Live: func() error { return nil }}, 200, textType, "ok\n"},
		{"not live", "GET", "/livez", dead, 503, textType, "stopping\n"},
		{"ready", "GET", "/readyz", full, 200, jsonType, `"ready": true`},
		{"not ready", "GET", "/readyz", dead, 503, jsonType, `"ready": false`},
		{"metrics", "GET", "/metrics", full, 200, "text/plain; charset=utf-8", "up 1\n"},
		{"no metrics", "GET", "/metrics", dead, 404, textType, "not found"},
		{"index", "GET", "/", full, 200, textType, "/metrics"},
		{"other path", "GET", "/livez/", full, 404, textType, "not found"},
		{"path that a mux would clean", "GET", "//livez", full, 404, textType, "not found"},
		{"POST", "POST", "/livez", full, 405, textType, "only GET and HEAD"},
		{"OPTIONS", "OPTIONS", "/metrics", full, 405, textType, "only GET and HEAD"},
		{"POST to nothing", "POST", "/x", full, 404, textType, "not found"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := New(c.cfg)
			if err != nil {
				t.Fatal(err)
			}
			w := httptest.NewRecorder()
			s.Handler().ServeHTTP(w, httptest.NewRequest(c.method, "http://admin"+c.path, nil))
			if w.Code != c.status {
				t.Errorf("status %d, want %d", w.Code, c.status)
			}
			if got := w.Header().Get("Content-Type"); c.path != "/metrics" && got != c.contentType {
				t.Errorf("content type %q, want %q", got, c.contentType)
			}
			if got := w.Body.String(); !strings.Contains(got, c.body) {
				t.Errorf("body %q, want %q in it", got, c.body)
			}
			allow := ""
			if c.status == 405 {
				allow = "GET, HEAD"
			}
			if got := w.Header().Get("Allow"); got != allow {
				t.Errorf("Allow %q, want %q", got, allow)
			}
			for name, want := range map[string]string{"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"} {
				if got := w.Header().Get(name); got != want {
					t.Errorf("%s %q, want %q", name, got, want)
				}
			}
		})
	}
}

func TestReadinessJSON(t *testing.T) {
	for _, c := range []struct {
		name  string
		ready func() Readiness
		want  string
	}{
		{"lists are never null", func() Readiness { return Readiness{Ready: true, Groups: []Group{{Name: "g", Ready: true}}} },
			`{"ready":true,"reasons":[],"listeners":[],"groups":[{"name":"g","ready":true,"servers":[]}]}`},
		{"everything", notReady, `{"ready":false,"reasons":["group \"default\": every server is failing"],` +
			`"listeners":[{"name":"plain","url":"dns://:8053","addr":"[::]:8053","ready":true}],` +
			`"groups":[{"name":"default","ready":false,"servers":[{"url":"tls://192.0.2.1","tier":1,"state":"failing",` +
			`"error":"connection refused"}]}]}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := New(Config{Ready: c.ready})
			if err != nil {
				t.Fatal(err)
			}
			w := httptest.NewRecorder()
			s.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/readyz", nil))
			var got bytes.Buffer
			if err := json.Compact(&got, w.Body.Bytes()); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(strings.TrimSpace(got.String()), c.want); d != "" {
				t.Errorf("-got +want:\n%s", d)
			}
		})
	}
}

func start(t *testing.T, cfg Config) (s *Server, served chan error) {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if s.Addr() != nil {
		t.Errorf("address %v before Listen", s.Addr())
	}
	if err := s.Listen(t.Context(), loopback); err != nil {
		t.Fatal(err)
	}
	served = make(chan error, 1)
	go func() { served <- s.Serve() }()
	t.Cleanup(func() {
		if err := s.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return s, served
}

func TestServeOverTheNetwork(t *testing.T) {
	s, served := start(t, Config{Ready: notReady, Metrics: http.HandlerFunc(metrics)})
	base := "http://" + s.Addr().String()
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	for _, c := range []struct {
		method, path string
		status       int
		body         bool
	}{{"GET", "/livez", 200, true}, {"HEAD", "/livez", 200, false}, {"HEAD", "/readyz", 503, false},
		{"GET", "/readyz", 503, true}, {"HEAD", "/metrics", 200, false}} {
		req, err := http.NewRequestWithContext(t.Context(), c.method, base+c.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != c.status || len(body) > 0 != c.body {
			t.Errorf("%s %s: status %d, %d octets, %v; want %d", c.method, c.path, resp.StatusCode, len(body), err, c.status)
		}
		if c.method == "HEAD" && c.path != "/metrics" && resp.ContentLength <= 0 {
			t.Errorf("HEAD %s: no content length", c.path)
		}
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err != nil {
		t.Errorf("Serve after Shutdown: %v, want nil", err)
	}
	if _, err := net.Dial("tcp", s.Addr().String()); err == nil {
		t.Error("still accepting after Shutdown")
	}
}

// TestShutdownFinishesRequests holds a request in its handler while the server stops.
func TestShutdownFinishesRequests(t *testing.T) {
	entered, leave := make(chan bool), make(chan bool)
	s, _ := start(t, Config{Ready: ready, Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(entered)
		<-leave
		_, _ = io.WriteString(w, "whole\n")
	})})
	type result struct {
		body []byte
		err  error
	}
	got := make(chan result, 1)
	go func() {
		resp, err := http.Get("http://" + s.Addr().String() + "/metrics")
		if err != nil {
			got <- result{err: err}
			return
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		got <- result{body, err}
	}()
	<-entered
	down := make(chan error, 1)
	go func() { down <- s.Shutdown(context.Background()) }()
	for { // until the socket is closed, which is the first thing that Shutdown does
		c, err := net.Dial("tcp", s.Addr().String())
		if err != nil {
			break
		}
		c.Close()
	}
	close(leave)
	if r := <-got; r.err != nil || string(r.body) != "whole\n" {
		t.Errorf("the request in flight: %q, %v", r.body, r.err)
	}
	if err := <-down; err != nil {
		t.Error(err)
	}
}

func TestShutdownWithinContext(t *testing.T) {
	entered, leave := make(chan bool), make(chan bool)
	s, _ := start(t, Config{Ready: ready, Metrics: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		close(entered)
		<-leave
	})})
	defer close(leave)
	go func() {
		if resp, err := http.Get("http://" + s.Addr().String() + "/metrics"); err == nil {
			resp.Body.Close()
		}
	}()
	<-entered
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

func TestLifecycleMistakes(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("no Ready: no error")
	}
	s, err := New(Config{Ready: ready})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(); err == nil {
		t.Error("Serve before Listen: no error")
	}
	if err := s.Listen(t.Context(), loopback); err != nil {
		t.Fatal(err)
	}
	addr := s.Addr().(*net.TCPAddr).AddrPort()
	if err := s.Listen(t.Context(), loopback); err == nil {
		t.Error("a second Listen: no error")
	}
	other, err := New(Config{Ready: ready})
	if err != nil {
		t.Fatal(err)
	}
	var op *net.OpError
	if err := other.Listen(t.Context(), addr); !errors.As(err, &op) || !strings.Contains(err.Error(), addr.String()) {
		t.Errorf("a port that is taken: %v, want a net.OpError with the address", err)
	}
	// bound but never served
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c, err := net.Dial("tcp", addr.String()); err == nil {
		c.Close()
		t.Error("the socket is still open after Shutdown")
	}
	if err := s.Serve(); err != nil {
		t.Errorf("Serve after Shutdown: %v, want nil", err)
	}
	if err := s.Listen(t.Context(), loopback); !errors.Is(err, http.ErrServerClosed) {
		t.Errorf("Listen after Shutdown: %v, want %v", err, http.ErrServerClosed)
	}
}

// pipeListener hands out one connection, so that the timeouts can be watched in a bubble.
type pipeListener struct{ conns chan net.Conn }

func (l pipeListener) Accept() (net.Conn, error) {
	c, ok := <-l.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}
func (l pipeListener) Close() error   { return nil }
func (l pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// TestSlowClients checks that a connection on which nothing whole arrives does not stay.
func TestSlowClients(t *testing.T) {
	for _, c := range []struct{ name, sent string }{{"silent", ""}, {"half a header", "GET /livez HTTP/1.1\r\nHo"}} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, err := New(Config{Ready: ready})
				if err != nil {
					t.Fatal(err)
				}
				client, server := net.Pipe()
				l := pipeListener{make(chan net.Conn, 1)}
				l.conns <- server
				s.listener = l
				go func() { _ = s.Serve() }()
				begin := time.Now()
				if _, err := io.WriteString(client, c.sent); err != nil {
					t.Fatal(err)
				}
				rest, err := io.ReadAll(client)
				if err != nil {
					t.Fatal(err)
				}
				// net/http may wait half a second more for the client to read its 408.
				if got := time.Since(begin); got < readTimeout || got > readTimeout+time.Second {
					t.Errorf("closed after %v with %q, want %v", got, rest, readTimeout)
				}
				close(l.conns)
				if err := s.Shutdown(t.Context()); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestHeaderLimit(t *testing.T) {
	s, _ := start(t, Config{Ready: ready})
	conn, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// The answer may come before all is sent; what Write then says does not matter.
	_, _ = io.WriteString(conn, "GET /livez HTTP/1.1\r\nHost: x\r\nX: "+strings.Repeat("x", 2*maxHeaderBytes)+"\r\n\r\n")
	line := make([]byte, len("HTTP/1.1 431"))
	if _, err := io.ReadFull(conn, line); err != nil || string(line) != "HTTP/1.1 431" {
		t.Errorf("got %q, %v, want status 431", line, err)
	}
}

// TestStrangersAreNotErrors checks that what net/http has to say of a bad client is at debug level.
func TestStrangersAreNotErrors(t *testing.T) {
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s, err := New(Config{Ready: ready, Logger: logger, Metrics: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		panic("a broken collector")
	})})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Listen(t.Context(), loopback); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve() }()
	if resp, err := http.Get("http://" + s.Addr().String() + "/metrics"); err == nil {
		resp.Body.Close()
		t.Errorf("status %d, want a closed connection", resp.StatusCode)
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-served
	if text := log.String(); !strings.Contains(text, "a broken collector") || strings.Contains(text, "level=ERROR") {
		t.Errorf("log: %q, want the panic, at debug level", text)
	}
}
