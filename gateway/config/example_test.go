package config

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"gopkg.in/yaml.v3"
)

// sameConfig compares what a Config says, and not where it stands.
var sameConfig = cmp.Options{
	cmpopts.EquateComparable(netip.AddrPort{}, netip.Prefix{}, netip.Addr{}),
	cmpopts.IgnoreTypes(Place{}),
	cmpopts.IgnoreFields(Config{}, "Source", "Files", "Warnings"),
}

// example returns config.example.yaml, and goes to a folder that has the files which it names.
func example(t *testing.T) []byte {
	t.Helper()
	text, err := os.ReadFile("../../config.example.yaml")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write(t, dir, map[string][]byte{
		"config.yaml": text,
		"server.crt":  pki()["pki/server.crt"], "server.key": pki()["pki/server.key"],
		"lan.crt": pki()["pki/other.crt"], "lan.key": pki()["pki/other.key"],
		"corp-ca.pem":      pki()["pki/server.crt"],
		"client.crt":       pki()["pki/server.crt"],
		"admin.token":      []byte("0123456789abcdef0123456789abcdef\n"),
		"conf.d/more.yaml": []byte("listen: [tcp://127.0.0.1:9053]\n"),
	})
	t.Chdir(dir)
	return text
}

func exampleOptions(stdin string) Options {
	opts := testOptions(stdin)
	opts.LookupEnv = func(name string) (string, bool) { return string(pki()["pki/server.key"]), name == "CLIENT_KEY" }
	return opts
}

// TestExampleLoads proves that config.example.yaml works, without a warning, and names every key of every table.
func TestExampleLoads(t *testing.T) {
	example(t)
	used := make(map[string][]string)
	l := &loader{opts: exampleOptions(""), disk: osDisk, included: make(map[string]Place),
		used: func(table, key string) { used[table] = append(used[table], key) }}
	cfg := l.load("config.yaml")
	if len(l.errs)+len(l.warns) > 0 {
		t.Fatalf("got mistakes or warnings:\n%v\n%v", l.errs, l.warns)
	}
	if len(tables) < 21 {
		t.Errorf("got %d tables of keys, want all of them", len(tables))
	}
	for table, keys := range tables {
		for _, key := range keys {
			if !slices.Contains(used[table], key) {
				t.Errorf("the key %q of %q is not in config.example.yaml", key, table)
			}
		}
	}
	if got, want := len(cfg.Listen), 6; got != want {
		t.Errorf("got %d listeners, want %d", got, want)
	}
}

// TestExampleKeys takes one key after the other out of config.example.yaml and proves that each changes what is loaded: no
// key is ignored, and no value of the example is the default.
func TestExampleKeys(t *testing.T) {
	text := example(t)
	full, err := Load("-", exampleOptions(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	keys := 0
	var walk func(n *yaml.Node, path string)
	walk = func(n *yaml.Node, path string) {
		if n.Kind == yaml.SequenceNode || n.Kind == yaml.DocumentNode {
			for i, c := range n.Content {
				walk(c, fmt.Sprintf("%s[%d]", path, i))
			}
			return
		}
		for i := 0; n.Kind == yaml.MappingNode && i < len(n.Content); i += 2 {
			at := path + "." + n.Content[i].Value
			all := n.Content
			n.Content = slices.Concat(all[:i], all[i+2:])
			out, err := yaml.Marshal(&doc)
			n.Content = all
			if err != nil {
				t.Fatal(err)
			}
			keys++
			cfg, err := Load("-", exampleOptions(string(out)))
			if err == nil && cmp.Equal(cfg, full, sameConfig) {
				t.Errorf("%s changes nothing", at)
			}
			walk(n.Content[i+1], at)
		}
	}
	walk(&doc, "")
	if keys < 76 {
		t.Errorf("got %d keys, want at least 76", keys)
	}
}

// TestDefault holds the embedded default against what the issue asks of it.
func TestDefault(t *testing.T) {
	cfg, err := Load("", testOptions(""))
	if err != nil {
		t.Fatal(err)
	}
	if len(cfg.Warnings) != 0 || cfg.Source != Builtin || len(cfg.Files) != 0 {
		t.Errorf("got warnings %v, source %q, files %q", cfg.Warnings, cfg.Source, cfg.Files)
	}
	if len(cfg.Listen) != 1 || cfg.Listen[0].Scheme != DNS || cfg.Listen[0].Addr.String() != "[::]:8053" {
		t.Errorf("got listeners %+v, want UDP and TCP on 8053", cfg.Listen)
	}
	if len(cfg.Bootstrap) != 0 {
		t.Errorf("got bootstrap %v, want none: the default needs no DNS to start", cfg.Bootstrap)
	}
	if cfg.Access.Set || len(cfg.Access.Allow) == 0 || cfg.Cache.Size != 64<<20 {
		t.Errorf("got access %+v and cache %+v", cfg.Access, cfg.Cache)
	}
	if got, want := cfg.Admin.Listen.String(), "127.0.0.1:8081"; got != want {
		t.Errorf("got admin %s, want %s", got, want)
	}
	names := map[Scheme][]string{
		TLS: {"cloudflare-dns.com", "dns.quad9.net"}, HTTPS: {"cloudflare-dns.com", "dns.quad9.net"},
		QUIC: {"unfiltered.adguard-dns.com"},
	}
	order := []Scheme{TLS, HTTPS, QUIC}
	if len(cfg.Upstreams) != 1 || cfg.Upstreams[0].Name != DefaultGroup || len(cfg.Upstreams[0].Tiers) != len(order) {
		t.Fatalf("got %+v, want one group of three tiers", cfg.Upstreams)
	}
	for i, tier := range cfg.Upstreams[0].Tiers {
		for _, s := range tier {
			if _, ok := s.address(); !ok || s.Scheme != order[i] || !slices.Contains(names[s.Scheme], s.VerifyName) {
				t.Errorf("tier %d: got %s (verified as %q), want %s:// by address with one of %q", i+1, s.URL, s.VerifyName, order[i],
					names[order[i]])
			}
		}
	}
}

// TestSections proves that a file without a section has the default's.
func TestSections(t *testing.T) {
	builtin, err := Load("", testOptions(""))
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := parse(t, "log: {level: info}\n")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(cfg, builtin, sameConfig); d != "" {
		t.Errorf("got a config that is not the default (-got +want):\n%s", d)
	}
}

// TestPlaces proves that every part of a Config knows where it stands.
func TestPlaces(t *testing.T) {
	example(t)
	cfg, err := Load("config.yaml", exampleOptions(""))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]Place{"admin": cfg.Admin.Place, "cache.save": cfg.Cache.Save.Place}
	for i, l := range cfg.Listen {
		got[fmt.Sprintf("listener %d", i)] = l.Place
	}
	for i, p := range cfg.TLS {
		got[fmt.Sprintf("pair %d", i)] = p.Place
	}
	servers := slices.Clone(cfg.Bootstrap)
	for i, g := range cfg.Upstreams {
		got[fmt.Sprintf("group %d", i)] = g.Place
		servers = append(servers, slices.Concat(g.Tiers...)...)
	}
	for i, s := range servers {
		got[fmt.Sprintf("server %d", i)] = s.Place
	}
	for i, r := range cfg.Rules {
		got[fmt.Sprintf("rule %d", i)] = r.Place
		for j, n := range r.Names {
			got[fmt.Sprintf("rule %d, name %d", i, j)] = n.Place
		}
	}
	for what, p := range got {
		if p.Line == 0 || p.Col == 0 || p.Path == "" || p.Text == "" || !strings.HasSuffix(p.File, ".yaml") {
			t.Errorf("%s: got %+v, want a whole place", what, p)
		}
	}
	want := []string{"config.yaml", "conf.d/more.yaml", "server.crt", "server.key", "lan.crt", "lan.key", "corp-ca.pem", "client.crt",
		"admin.token"}
	if d := cmp.Diff(cfg.Files, want); d != "" {
		t.Errorf("files (-got +want):\n%s", d)
	}
}

// TestErrorsAs proves that single mistakes can be found in what Load returns.
func TestErrorsAs(t *testing.T) {
	_, err := parse(t, "cache: x\nlog: y\n")
	var all *Errors
	var one *Error
	if !errors.As(err, &all) || len(*all) != 2 || !errors.As(err, &one) || one.Path != "cache" {
		t.Errorf("got %v (%d mistakes, first %v), want two, cache first", err, len(*all), one)
	}
}
