package lab

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"gopkg.in/yaml.v3"
)

func TestWriteFiles(t *testing.T) {
	l := startLab(t, Config{})
	dir := t.TempDir()
	f, err := l.WriteFiles(dir)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"localhost", "127.0.0.1", "::1"} {
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: l.Roots()}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	ca, err := os.ReadFile(f.CA)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(ca), string(l.CAPEM())); diff != "" {
		t.Errorf("CA (-got +want):\n%s", diff)
	}
	info, err := os.Stat(f.Key)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key: got %v, %v, want mode 0600", info, err)
	}
	if _, err := l.WriteFiles(filepath.Join(dir, "none")); err == nil {
		t.Error("no error for a folder that is not there")
	}
	if _, err := l.WriteFiles(dir, "a b"); err == nil {
		t.Error("no error for a name that is none")
	}
}

func TestConfigYAML(t *testing.T) {
	l := startLab(t, Config{})
	url := func(name string) string { return l.Server(name).URL() }
	got, err := l.ConfigYAML(Front{
		DNS: 8053, TLS: 8853, HTTPS: 8443, QUIC: 8853, HTTP: []string{"h1", "h3"}, Host: "::1",
		Files: Files{CA: "/d/ca.crt", Cert: "/d/my cert.crt", Key: `C:\key`},
		Tiers: [][]string{{"tls", "udp"}, {"https"}}, Pick: "in-order", Deadline: 1500 * time.Millisecond, More: "cache: 8MB\n\n",
	})
	if err != nil {
		t.Fatal(err)
	}
	want := `listen:
  - "dns://[::1]:8053"
  - "tls://[::1]:8853"
  - {url: "https://[::1]:8443/dns-query", http: [h1, h3]}
  - "quic://[::1]:8853"
tls: {cert: "/d/my cert.crt", key: "C:\\key"}
upstreams:
  default:
    try:
      - - {url: "` + url("tls") + `", ca: "/d/ca.crt"}
        - "` + url("udp") + `"
      - - {url: "` + url("https") + `", ca: "/d/ca.crt"}
    pick: in-order
    deadline: 1.5s
cache: 8MB
`
	if diff := cmp.Diff(got, want); diff != "" {
		t.Errorf("(-got +want):\n%s", diff)
	}
	var tree map[string]any
	if err := yaml.Unmarshal([]byte(got), &tree); err != nil {
		t.Fatal(err)
	}
	tiers := tree["upstreams"].(map[string]any)["default"].(map[string]any)["try"].([]any)
	if len(tiers) != 2 || len(tiers[0].([]any)) != 2 {
		t.Errorf("got tiers %v, want two of two and one", tiers)
	}

	plain, err := l.ConfigYAML(Front{DNS: 53, HTTPS: 443})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range l.Servers() { // each server is a tier
		if !strings.Contains(plain, "      - - {url: "+strconv.Quote(s.URL())) && s.Scheme().encrypted() {
			t.Errorf("%s is not in\n%s", s.URL(), plain)
		}
	}
	if strings.Contains(plain, "\ntls: ") || !strings.Contains(plain, `- "https://127.0.0.1:443/dns-query"`) {
		t.Errorf("got\n%s", plain)
	}
	if _, err := l.ConfigYAML(Front{Tiers: [][]string{{"nobody"}}}); err == nil {
		t.Error("no error for a server that is not there")
	}
}

func TestFreePorts(t *testing.T) {
	ports, err := FreePorts(20)
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[int]bool)
	for _, p := range ports {
		if seen[p] {
			t.Errorf("port %d came twice", p)
		}
		seen[p] = true
		if p < firstPort || p > lastPort {
			t.Errorf("port %d is out of the range", p)
		}
	}
	// A port that only one protocol has is not free.
	addr := "127.0.0.1:" + strconv.Itoa(ports[0])
	conn, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	if isFree(ports[0]) {
		t.Error("a port that UDP has is called free")
	}
	conn.Close()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	if isFree(ports[0]) {
		t.Error("a port that TCP has is called free")
	}
	ln.Close()
	if !isFree(ports[0]) {
		t.Error("a free port is not called free")
	}
}
