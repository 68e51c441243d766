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

const flushToken = "0123456789abcdef0123456789abcdef"

// startFlush is an admin endpoint that says one thing to POST /cache/flush. It tells asked what it was asked.
func startFlush(t *testing.T, status int, body string, asked *string) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*asked = r.Method + " " + r.URL.RequestURI() + " " + r.Header.Get("Authorization")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func TestFlush(t *testing.T) {
	var asked string
	good := startFlush(t, 200, `{"flushed": 12}`, &asked)
	one := startFlush(t, 200, `{"flushed": 1}`, &asked)
	refuses := startFlush(t, 401, `{"error": "the token\u001b[2J"}`, &asked)
	missing := startFlush(t, 404, "not found\n", &asked)
	other := startFlush(t, 200, "<p>hello\x1b", &asked)
	empty := startFlush(t, 200, `{}`, &asked)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() }) // accepts by its backlog, and never answers
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	file("token", flushToken+"\n")
	at := func(addr string) string { return file(addr+".yaml", fmt.Sprintf("admin: {listen: %q}\n", addr)) }
	_, goodPort, err := net.SplitHostPort(good)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		args   []string
		status int
		asked  string   // method, URL and Authorization; "" if nobody is to be asked
		stdout string   // all of it
		stderr []string // parts of it; nil means it is empty
	}{
		{"everything", []string{"-c", at(good)}, 0, "POST /cache/flush ", "flushed all answers: 12 entries\n", nil},
		{"a name", []string{"-c", at(one), "www.example.com"}, 0, "POST /cache/flush?below=false&name=www.example.com ",
			"flushed www.example.com: 1 entry\n", nil},
		{"and below", []string{"-c", at(good), "--below", "example.com."}, 0, "POST /cache/flush?below=true&name=example.com. ",
			"flushed example.com. and below: 12 entries\n", nil},
		{"a name that looks like a query", []string{"-c", at(good), "a&name=b#\x1b"}, 0,
			"POST /cache/flush?below=false&name=a%26name%3Db%23%1B ", "flushed a&name=b#\ufffd: 12 entries\n", nil},
		{"with the token, and a wildcard", []string{"-c", file("any.yaml", "admin: {listen: 0.0.0.0:"+goodPort+", token: file:token}\n")}, 0,
			"POST /cache/flush Bearer " + flushToken, "flushed all answers: 12 entries\n", nil},

		{"refused", []string{"-c", at(refuses)}, 1, "POST /cache/flush ", "",
			[]string{"http://" + refuses + "/cache/flush says 401 Unauthorized: the token\ufffd[2J\n"}},
		{"an older gateway", []string{"-c", at(missing)}, 1, "POST /cache/flush ", "", []string{"404 Not Found: not found; is it dnsgateway's"}},
		{"no gateway", []string{"-c", at(other)}, 1, "POST /cache/flush ", "", []string{"200 OK: <p>hello\ufffd; is it dnsgateway's"}},
		{"no number", []string{"-c", at(empty)}, 1, "POST /cache/flush ", "", []string{"is it dnsgateway's"}},
		{"not there", []string{"-c", at(closedPort(t))}, 1, "", "", []string{"/cache/flush: ", "refused"}},
		{"silent", []string{"--timeout", "100ms", "-c", at(l.Addr().String())}, 1, "", "", []string{"deadline exceeded"}},
		{"admin is off", []string{"-c", file("off.yaml", "admin: off\n")}, 1, "", "", []string{"turns admin.listen off"}},
		{"a broken file", []string{"-c", file("broken.yaml", "admin: {listen: x}\n")}, 1, "", "", []string{"broken.yaml:1:17: admin.listen: "}},
		{"no file", []string{"-c", filepath.Join(dir, "missing.yaml")}, 1, "", "", []string{"no such file"}},
		{"standard input", []string{"-c", "-"}, 2, "", "", []string{"standard input"}},
		{"below nothing", []string{"-c", at(good), "--below"}, 2, "", "", []string{"--below needs a name"}},
		{"an empty name", []string{"-c", at(good), ""}, 2, "", "", []string{"the name is empty"}},
		{"two names", []string{"-c", at(good), "a", "b"}, 2, "", "", []string{"at most 1 arg"}},
		{"no time", []string{"-c", at(good), "--timeout", "0s"}, 2, "", "", []string{"--timeout"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			asked = ""
			stdout, stderr, status := runCommand(t, append([]string{"flush"}, c.args...)...)
			if status != c.status || stdout != c.stdout || asked != c.asked {
				t.Errorf("status %d, stdout %q, asked %q; want %d, %q, %q", status, stdout, asked, c.status, c.stdout, c.asked)
			}
			if c.stderr == nil && stderr != "" || strings.ContainsAny(stderr, "\x1b") || strings.Contains(stderr, flushToken) {
				t.Errorf("stderr: %q", stderr)
			}
			for _, w := range c.stderr {
				if !strings.Contains(stderr, w) {
					t.Errorf("stderr %q, want %q in it", stderr, w)
				}
			}
		})
	}
}

// TestFlushDefault finds the built-in address without a file.
func TestFlushDefault(t *testing.T) {
	addr, token, err := adminOf(newFlushCommand(), "")
	if err != nil || addr.String() != defaultAdmin || token != "" {
		t.Errorf("got %v, %q, %v, want %s", addr, token, err, defaultAdmin)
	}
}
