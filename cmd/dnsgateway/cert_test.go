package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"dnsgateway/gateway/certs"
	"dnsgateway/gateway/config"
)

func readLeaf(t *testing.T, dir string) *x509.Certificate {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "server.crt"), filepath.Join(dir, "server.key"))
	if err != nil {
		t.Fatal(err)
	}
	return pair.Leaf
}

func readPool(t *testing.T, file string) *x509.CertPool {
	t.Helper()
	ca, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		t.Fatalf("%s holds no certificate", file)
	}
	return pool
}

func TestCertMakesWhatTheGatewayTakes(t *testing.T) {
	t.Chdir(t.TempDir())
	out, stderr, code := runCommand(t, "cert", "--dir", "my pki", "dns.lan", "*.lan", "127.0.0.1")
	if code != 0 {
		t.Fatalf("got status %d, %s", code, stderr)
	}
	for _, key := range []string{"ca.key", "server.key"} {
		info, err := os.Stat(filepath.Join("my pki", key))
		if err != nil || runtime.GOOS != "windows" && info.Mode().Perm() != 0o600 {
			t.Errorf("%s: got %v, %v, want mode 0600", key, info, err)
		}
	}
	leaf := readLeaf(t, "my pki")
	for _, name := range []string{"dns.lan", "nas.lan", "127.0.0.1"} {
		if _, err := leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: readPool(t, "my pki/ca.crt")}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := time.Until(leaf.NotAfter).Round(24 * time.Hour); got != 90*24*time.Hour {
		t.Errorf("got validity %v, want 90 days", got)
	}

	// The YAML that it prints is a gateway's, once an upstream is there (the built-in ones serve).
	var yaml []string
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "listen:") || strings.HasPrefix(line, "tls:") {
			yaml = append(yaml, line)
		}
	}
	text := strings.Join(yaml, "") + "upstreams: [tls://192.0.2.1]\n"
	if err := os.WriteFile("config.yaml", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load("config.yaml", config.Options{})
	if err != nil {
		t.Fatalf("loading\n%s%v", text, err)
	}
	if len(cfg.Listen) != 4 || len(cfg.TLS) != 1 {
		t.Errorf("got %d listeners and %d pairs, want 4 and 1", len(cfg.Listen), len(cfg.TLS))
	}
	for _, want := range []string{
		"kdig @127.0.0.1 -p 8853 +tls-ca='my pki/ca.crt' +tls-hostname=dns.lan example.com",
		"curl --cacert 'my pki/ca.crt' -H 'accept: application/dns-json' 'https://dns.lan:8443/dns-query?name=example.com&type=A'",
		"dnsgateway query --ca 'my pki/ca.crt' @tls://dns.lan:8853 example.com",
		certs.Pin(leaf) + ":",
		"+tls-pin=" + strings.TrimPrefix(certs.Pin(leaf), "sha256/") + " ",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
}

func TestCertUsesTheCAAgain(t *testing.T) {
	dir := t.TempDir()
	if _, stderr, code := runCommand(t, "cert", "--dir", dir); code != 0 {
		t.Fatalf("got status %d, %s", code, stderr)
	}
	first := readLeaf(t, dir)
	roots := readPool(t, filepath.Join(dir, "ca.crt"))
	out, stderr, code := runCommand(t, "cert", "--dir", dir, "--days", "10", "other.test")
	if code != 0 {
		t.Fatalf("got status %d, %s", code, stderr)
	}
	second := readLeaf(t, dir)
	if first.Equal(second) || !cmp.Equal(second.DNSNames, []string{"other.test"}) {
		t.Errorf("got a certificate for %v, want a new one for other.test", second.DNSNames)
	}
	if _, err := second.Verify(x509.VerifyOptions{Roots: roots}); err != nil {
		t.Errorf("clients of the first CA: %v", err)
	}
	if !strings.Contains(out, "The CA (used again)") || !strings.Contains(out, "certificate (replaced)") {
		t.Errorf("got\n%s", out)
	}
	// In another folder, with the CA named.
	other := t.TempDir()
	_, stderr, code = runCommand(t, "cert", "--dir", other,
		"--ca-cert", filepath.Join(dir, "ca.crt"), "--ca-key", filepath.Join(dir, "ca.key"))
	if code != 0 {
		t.Fatalf("got status %d, %s", code, stderr)
	}
	if _, err := readLeaf(t, other).Verify(x509.VerifyOptions{Roots: roots, DNSName: "localhost"}); err != nil {
		t.Errorf("with the CA named: %v", err)
	}
	if _, err := os.Stat(filepath.Join(other, "ca.key")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the named CA's key was copied: %v", err)
	}
}

func TestCertOverwritesNothing(t *testing.T) {
	write := func(t *testing.T, dir string, names ...string) {
		t.Helper()
		for _, name := range names {
			if err := os.WriteFile(filepath.Join(dir, name), []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	tests := []struct {
		name  string
		setup func(t *testing.T, dir string)
		args  []string
		code  int
		want  string // in standard error, after DIR is replaced
	}{
		{"a certificate", func(t *testing.T, dir string) { write(t, dir, "server.crt") }, nil, 1,
			"DIR/server.crt is there and was not made with this CA; --force overwrites DIR/server.crt and DIR/server.key"},
		{"a key", func(t *testing.T, dir string) { write(t, dir, "server.key") }, nil, 1,
			"DIR/server.key is there and was not made with this CA; --force overwrites"},
		{"of another CA", func(t *testing.T, dir string) {
			runCommand(t, "cert", "--dir", dir)
			os.Remove(filepath.Join(dir, "ca.crt"))
			os.Remove(filepath.Join(dir, "ca.key"))
		}, nil, 1, "DIR/server.crt is there and was not made with this CA"},
		{"forced", func(t *testing.T, dir string) { write(t, dir, "server.crt", "server.key") }, []string{"--force"}, 0, ""},
		{"a CA without its key", func(t *testing.T, dir string) { write(t, dir, "ca.crt") }, []string{"--force"}, 1,
			"DIR/ca.crt is there and DIR/ca.key is not: nothing can be signed"},
		{"a CA key alone", func(t *testing.T, dir string) { write(t, dir, "ca.key") }, []string{"--force"}, 1,
			"DIR/ca.key is there and DIR/ca.crt is not"},
		{"a broken CA", func(t *testing.T, dir string) { write(t, dir, "ca.crt", "ca.key") }, []string{"--force"}, 1,
			"DIR/ca.crt, DIR/ca.key: CA certificate: it holds no certificate in PEM form"},
		{"no such CA", nil, []string{"--ca-cert", "no.crt", "--ca-key", "no.key"}, 1, "open no.crt: "},
		{"half a CA", nil, []string{"--ca-cert", "no.crt"}, 2, "ca-key"},
		{"too many days", nil, []string{"--days", "398"}, 2, "--days 398 is not between 1 and 397"},
		{"no days", nil, []string{"--days", "0"}, 2, "--days 0 is not between 1 and 397"},
		{"bad name", nil, []string{"a b"}, 2, `"a b" is neither a host name nor an IP address`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if tt.setup != nil {
				tt.setup(t, dir)
			}
			before, _ := os.ReadDir(dir)
			_, stderr, code := runCommand(t, append([]string{"cert", "--dir", dir}, tt.args...)...)
			got := strings.ReplaceAll(filepath.ToSlash(stderr), filepath.ToSlash(dir), "DIR")
			if code != tt.code || !strings.Contains(got, tt.want) {
				t.Errorf("got status %d, %q, want %d, %q", code, got, tt.code, tt.want)
			}
			if tt.code == 0 {
				readLeaf(t, dir)
				return
			}
			after, _ := os.ReadDir(dir)
			if len(after) != len(before) {
				t.Errorf("got files %v, want only %v: a refusal writes nothing", after, before)
			}
		})
	}
}

func TestCertNames(t *testing.T) {
	for _, tt := range []struct {
		hostname string
		err      error
		want     []string
	}{
		{"host.lan", nil, []string{"localhost", "host.lan", "127.0.0.1", "::1"}},
		{"LocalHost", nil, []string{"localhost", "127.0.0.1", "::1"}},
		{"my host", nil, []string{"localhost", "127.0.0.1", "::1"}},
		{"", errors.New("none"), []string{"localhost", "127.0.0.1", "::1"}},
	} {
		if diff := cmp.Diff(certNames(tt.hostname, tt.err), tt.want); diff != "" {
			t.Errorf("%q (-got +want):\n%s", tt.hostname, diff)
		}
	}
}

func TestClientTarget(t *testing.T) {
	for _, tt := range []struct {
		names      []string
		name, addr string
	}{
		{[]string{"localhost", "h", "127.0.0.1", "::1"}, "localhost", "127.0.0.1"},
		{[]string{"*.lan", "dns.lan."}, "dns.lan", "dns.lan"},
		{[]string{"*.lan"}, "dns.lan", "dns.lan"},
		{[]string{"192.0.2.1"}, "192.0.2.1", "192.0.2.1"},
		{[]string{"2001:db8::1", "a.test"}, "a.test", "2001:db8::1"},
	} {
		if name, addr := clientTarget(tt.names); name != tt.name || addr != tt.addr {
			t.Errorf("%v: got %s, %s, want %s, %s", tt.names, name, addr, tt.name, tt.addr)
		}
	}
}

func TestWords(t *testing.T) {
	for _, tt := range []struct{ in, shell, yaml string }{
		{"pki/ca.crt", "pki/ca.crt", "pki/ca.crt"},
		{"my pki", "'my pki'", `"my pki"`},
		{"it's", `'it'\''s'`, `"it's"`},
		{`C:\pki`, `'C:\pki'`, `"C:\\pki"`},
		{"", "''", `""`},
	} {
		if got := shellWord(tt.in); got != tt.shell {
			t.Errorf("shellWord(%q): got %s, want %s", tt.in, got, tt.shell)
		}
		if got := yamlWord(tt.in); got != tt.yaml {
			t.Errorf("yamlWord(%q): got %s, want %s", tt.in, got, tt.yaml)
		}
	}
}
