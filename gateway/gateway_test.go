package gateway

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/miekg/dns"

	"dnsgateway/gateway/access"
	"dnsgateway/gateway/config"
	"dnsgateway/gateway/lab"
	"dnsgateway/gateway/listen"
	"dnsgateway/gateway/pipeline"
	"dnsgateway/gateway/wire"
)

// load reads a configuration from text. The lab's CA and a certificate of it for localhost lie beside it.
func load(t *testing.T, l *lab.Lab, text string) *config.Config {
	t.Helper()
	dir := t.TempDir()
	cert, key, err := l.CA().Issue([]string{"localhost", "127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"ca.crt": l.CAPEM(), "server.crt": cert, "server.key": key, "config.yaml": []byte(text),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cfg, err := config.Load(filepath.Join(dir, "config.yaml"), config.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func startLab(t *testing.T) *lab.Lab {
	t.Helper()
	l, err := lab.Start(context.Background(), lab.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// everything is a configuration with every kind of listener on ports that the system chooses.
func everything(l *lab.Lab) string {
	return `
listen:
  - dns://127.0.0.1:0
  - tls://127.0.0.1:0
  - {name: web, url: "https://127.0.0.1:0/dns-query", http: [h1, h2, h3]}
  - quic://127.0.0.1:0
tls: {cert: server.crt, key: server.key}
upstreams:
  default:
    try:
      - {url: "` + l.Server("tier1").URL() + `", ca: ca.crt}
      - {url: "` + l.Server("tier2").URL() + `", ca: ca.crt}
admin: 127.0.0.1:0
`
}

// runGateway starts a gateway and stops it at the end of the test, which fails if that does not go well.
func runGateway(t *testing.T, cfg *config.Config) *Gateway {
	t.Helper()
	g, err := New(cfg, Options{Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	if err := g.Start(ctx); err != nil {
		cancel()
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return g
}

func TestEveryListener(t *testing.T) {
	l := startLab(t)
	g := runGateway(t, load(t, l, everything(l)))
	addrs := g.Addrs()
	if len(addrs) != 4 {
		t.Fatalf("got %d sockets, want 4: %+v", len(addrs), addrs)
	}
	var networks []string
	for _, a := range addrs {
		if a.Addr.Port() == 0 {
			t.Errorf("%s: no port", a.Listener.URL)
		}
		networks = append(networks, a.Network)
	}
	if diff := cmp.Diff([]string{"udp+tcp", "tcp", "udp+tcp", "udp"}, networks); diff != "" {
		t.Errorf("networks (-want +got):\n%s", diff)
	}
	for _, network := range []string{"udp", "tcp"} { // both on the port that one of them was given
		c := dns.Client{Net: network, Timeout: 5 * time.Second}
		resp, _, err := c.Exchange(new(dns.Msg).SetQuestion("b.lab.test.", dns.TypeA), addrs[0].Addr.String())
		if err != nil || len(resp.Answer) != 1 {
			t.Errorf("%s: got %v, %v", network, resp, err)
		}
	}
	if !g.AdminAddr().IsValid() {
		t.Error("the admin endpoint is not bound")
	}
	if r := g.Ready(); !r.Ready || len(r.Listeners) != 4 || len(r.Groups) != 1 || len(r.Groups[0].Servers) != 2 {
		t.Errorf("readiness: got %+v", r)
	}
	if s := g.cacheStats(); s.Entries != 1 || s.MaxBytes != 64<<20 {
		t.Errorf("cache after two questions for one name: got %+v", s)
	}
	for n, o := range []pipeline.Outcome{pipeline.Hit, pipeline.Stale, pipeline.Miss, pipeline.Local} {
		for range 10 * (n + 1) {
			newQueryObserver(g.metrics).Query(wire.DoT, 0, 0, o)
		}
	}
	if s := g.cacheStats(); s.Hits != 11 || s.Stale != 20 || s.Misses != 31 {
		t.Errorf("cache after a miss, a hit, and 10, 20 and 30 of each kind: got %+v", s)
	}
	if len(g.listenerStats()) != 4 {
		t.Errorf("got %d listeners that count connections, want 4: %+v", len(g.listenerStats()), g.listenerStats())
	}
	conn, err := net.Dial("tcp", addrs[1].Addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for end := time.Now().Add(5 * time.Second); g.listenerStats()[1].Open != 1; {
		if time.Now().After(end) {
			t.Fatalf("one open connection: got %+v", g.listenerStats())
		}
		time.Sleep(time.Millisecond) // the kernel hands the connection over when it likes
	}
}

func TestReadyOnlyWhileServing(t *testing.T) {
	l := startLab(t)
	g, err := New(load(t, l, everything(l)), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r := g.Ready(); r.Ready || len(r.Reasons) != 1 {
		t.Errorf("before Run: got %+v, want one reason", r)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.Run(ctx); err != nil {
		t.Errorf("Run: %v", err)
	}
	if r := g.Ready(); r.Ready || !strings.Contains(strings.Join(r.Reasons, " "), "stopping") {
		t.Errorf("after Run: got %+v, want a reason that says stopping", r)
	}
}

// TestStartBindsAllOrNone takes one of the ports away: no other stays bound, and the error names every place.
func TestStartBindsAllOrNone(t *testing.T) {
	l := startLab(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = free.Close()
	cfg := load(t, l, "listen: [tcp://"+free.Addr().String()+", tcp://"+taken.Addr().String()+"]\nadmin: off\n")
	g, err := New(cfg, Options{})
	if err != nil {
		t.Fatal(err)
	}
	err = g.Start(t.Context())
	if !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), "config.yaml:1:") || !strings.Contains(err.Error(), "ss -lptun") {
		t.Errorf("got %v, want the place, the cause and what to do", err)
	}
	again, err := net.Listen("tcp", free.Addr().String())
	if err != nil {
		t.Fatalf("the other port is still bound: %v", err)
	}
	_ = again.Close()
}

// TestListenerFailureEndsRun closes a listener under the gateway's feet.
func TestListenerFailureEndsRun(t *testing.T) {
	l := startLab(t)
	g, err := New(load(t, l, everything(l)), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.sockets[0].servers[0] = &brokenServer{g.sockets[0].servers[0]}
	if err := g.Run(t.Context()); !errors.Is(err, errBroken) {
		t.Errorf("Run: got %v, want %v", err, errBroken)
	}
}

var errBroken = errors.New("broken")

// brokenServer is a listener whose socket breaks.
type brokenServer struct{ listen.Server }

func (b *brokenServer) Serve() error { return errBroken }

// TestDefaultAccess holds the default of the file to that of package access: neither knows the other.
func TestDefaultAccess(t *testing.T) {
	cfg, err := config.Load("", config.Options{})
	if err != nil {
		t.Fatal(err)
	}
	less := func(a, b netip.Prefix) bool { return a.String() < b.String() }
	if diff := cmp.Diff(access.PrivateNetworks(), cfg.Access.Allow, cmpopts.SortSlices(less),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Errorf("default access list (-access +config):\n%s", diff)
	}
}

func TestBuildGroupSaysWhatIsWrong(t *testing.T) {
	l := startLab(t)
	cfg := load(t, l, everything(l))
	bad := *cfg
	bad.Upstreams = slices.Clone(cfg.Upstreams)
	bad.Upstreams[0].Tiers = [][]config.Server{{{URL: "tls://x", Scheme: config.TLS, Host: "192.0.2.1", CA: []byte("nothing"), CAFile: "ca.crt"}}}
	if _, err := New(&bad, Options{}); err == nil || !strings.Contains(err.Error(), "no certificate in ca.crt") {
		t.Errorf("a CA file without certificates: got %v", err)
	}
	bad.Upstreams[0].Tiers = [][]config.Server{{{
		URL: "tls://x", Scheme: config.TLS, Host: "192.0.2.1", ClientCert: &config.KeyPair{Cert: []byte("x"), Key: []byte("y")},
	}}}
	if _, err := New(&bad, Options{}); err == nil || !strings.Contains(err.Error(), "client certificate") {
		t.Errorf("a client certificate that is none: got %v", err)
	}
}

func TestEncrypted(t *testing.T) {
	server := func(s config.Scheme) config.Server { return config.Server{Scheme: s} }
	for _, tt := range []struct {
		name  string
		tiers [][]config.Server
		want  bool
	}{
		{"all encrypted", [][]config.Server{{server(config.TLS), server(config.HTTPS)}, {server(config.QUIC), server(config.H3)}}, true},
		{"a plain one in the last tier", [][]config.Server{{server(config.TLS)}, {server(config.UDP)}}, false},
		{"discovered and verified", [][]config.Server{{server(config.Discover)}}, true},
		{"tcp", [][]config.Server{{server(config.TCP)}}, false},
		{"a stamp", [][]config.Server{{server(config.SDNS)}}, false},
	} {
		if got := encrypted(config.Group{Tiers: tt.tiers}); got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestKeepalive(t *testing.T) {
	for idle, want := range map[time.Duration]uint16{10 * time.Second: 100, 100 * time.Millisecond: 1, 24 * time.Hour: 65535} {
		if got := keepalive(idle); got != want {
			t.Errorf("%v: got %d, want %d", idle, got, want)
		}
	}
}

// TestStopIsNotHeldByAdmin stops while a connection to the admin endpoint is open that has asked nothing: a TCP health
// probe, or a scrape on its way.
func TestStopIsNotHeldByAdmin(t *testing.T) {
	l := startLab(t)
	g, err := New(load(t, l, everything(l)), Options{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := g.Start(ctx); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	conn, err := net.Dial("tcp", g.AdminAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: got %v, want nil", err)
	}
}

// TestGraceOutlastsTheDeadlines holds the time that a stop waits against the groups' deadlines.
func TestGraceOutlastsTheDeadlines(t *testing.T) {
	l := startLab(t)
	for text, want := range map[string]time.Duration{
		everything(l): minGrace,
		strings.Replace(everything(l), "default:\n", "default:\n    deadline: 30s\n", 1): 31 * time.Second,
	} {
		g, err := New(load(t, l, text), Options{})
		if err != nil {
			t.Fatal(err)
		}
		if g.grace != want {
			t.Errorf("got %v, want %v", g.grace, want)
		}
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestBadPairHasItsPlace is about what config.Load does not see: New says where it stands.
func TestBadPairHasItsPlace(t *testing.T) {
	l := startLab(t)
	cfg := load(t, l, everything(l))
	bad := *cfg
	bad.TLS = slices.Clone(cfg.TLS)
	bad.TLS[0].Key = []byte("nothing")
	if _, err := New(&bad, Options{}); err == nil || !strings.Contains(err.Error(), "config.yaml:7:") {
		t.Errorf("got %v, want an error with its place", err)
	}
}
