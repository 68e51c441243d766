package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// startHealth serves the admin endpoints with one status and body.
func startHealth(t *testing.T, status int, body string) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/readyz":
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body)
		case "/livez":
			_, _ = io.WriteString(w, "ok\n")
		case "/redirect":
			http.Redirect(w, r, "/livez", http.StatusFound)
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// unreadyBody has an escape sequence in it, which must not reach a terminal.
const unreadyBody = `{"ready":false,"reasons":["group \"default\": every server is failing","x\u001b[2J"],
"groups":[{"name":"default","servers":[{"url":"tls://192.0.2.1","state":"failing","error":"connection refused"},
{"url":"tls://192.0.2.2","state":"unknown"}]}]}`

func TestHealth(t *testing.T) {
	good := startHealth(t, 200, `{"ready":true}`)
	bad := startHealth(t, 503, unreadyBody)
	odd := startHealth(t, 500, "<p>not\x1b json")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	silent := l.Addr().String() // accepts by its backlog, and never answers
	t.Cleanup(func() { l.Close() })
	closed := closedPort(t)
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const rest = "listen: [\"dns://:8053\"]\nupstreams: [\"tls://192.0.2.1#dns.example\"]\n"
	admin := func(addr string) string { return fmt.Sprintf("admin: {listen: %q}\n", addr) + rest }
	_, goodPort, err := net.SplitHostPort(good)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		args   []string
		status int
		want   []string // in standard error; nil means it is empty
	}{
		{"ready", []string{"--url", "http://" + good + "/readyz"}, 0, nil},
		{"path is filled in", []string{"--url", "http://" + good}, 0, nil},
		{"ready by file", []string{"-c", file("good.yaml", admin(good))}, 0, nil},
		{"wildcard in the file", []string{"-c", file("any.yaml", admin("0.0.0.0:"+goodPort))}, 0, nil},
		{"not ready", []string{"--url", "http://" + bad}, 1, []string{"503 Service Unavailable\n",
			"\n  group \"default\": every server is failing\n", "\n  default: tls://192.0.2.1: connection refused\n"}},
		{"not ready by file", []string{"-c", file("bad.yaml", admin(bad))}, 1, []string{"every server is failing"}},
		{"but alive", []string{"--live", "--url", "http://" + bad}, 0, nil},
		{"but alive by file", []string{"--live", "-c", file("bad.yaml", admin(bad))}, 0, nil},
		{"not JSON", []string{"--url", "http://" + odd}, 1, []string{"500 Internal Server Error: <p>not"}},
		{"not followed", []string{"--url", "http://" + good + "/redirect"}, 1, []string{"302 Found"}},
		{"not there", []string{"--url", "http://" + closed}, 1, []string{"asking http://" + closed + "/readyz: ", "refused"}},
		{"silent", []string{"--timeout", "100ms", "--url", "http://" + silent}, 1, []string{"deadline exceeded"}},
		{"standard input", []string{"-c", "-"}, 2, []string{"use --url"}},
		{"both", []string{"-c", "x", "--url", "http://x"}, 2, []string{"[config url]"}},
		{"https", []string{"--url", "https://" + good}, 2, []string{"not of the form http://ADDRESS:PORT/readyz"}},
		{"no time", []string{"--timeout", "0s"}, 2, []string{"--timeout"}},
		{"argument", []string{"x"}, 2, []string{"x"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			stdout, stderr, status := runCommand(t, append([]string{"health"}, c.args...)...)
			if status != c.status || stdout != "" {
				t.Errorf("status %d, stdout %q; want %d, nothing", status, stdout, c.status)
			}
			if c.want == nil && stderr != "" || strings.Contains(stderr, "\x1b") {
				t.Errorf("stderr: %q", stderr)
			}
			for _, w := range c.want {
				if !strings.Contains(stderr, w) {
					t.Errorf("stderr %q, want %q in it", stderr, w)
				}
			}
		})
	}
}

// TestHealthURL checks what is asked without asking it.
func TestHealthURL(t *testing.T) {
	broken := filepath.Join(t.TempDir(), "broken.yaml")
	if err := os.WriteFile(broken, []byte("listen: {"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		flags healthFlags
		want  string
		note  bool
	}{
		{"default", healthFlags{}, "http://127.0.0.1:8081/readyz", false},
		{"live", healthFlags{live: true}, "http://127.0.0.1:8081/livez", false},
		{"a file that cannot be read", healthFlags{file: broken}, "http://127.0.0.1:8081/readyz", true},
		{"a file that is not there", healthFlags{file: broken + "x"}, "http://127.0.0.1:8081/readyz", true},
		{"url", healthFlags{url: "http://[::1]:1/other", live: true}, "http://[::1]:1/other", false},
	} {
		var note strings.Builder
		got, err := healthURL(&note, c.flags)
		if err != nil || got != c.want || note.Len() > 0 != c.note {
			t.Errorf("%s: %q, %v, note %q; want %q, note %v", c.name, got, err, note.String(), c.want, c.note)
		}
	}
}
