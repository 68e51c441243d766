package config

import (
	"encoding/base64"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// server returns what tests compare of a Server.
func server(scheme Scheme, host string, port uint16, path, name string) Server {
	return Server{Scheme: scheme, Host: host, Port: port, Path: path, VerifyName: name}
}

// tiers returns the servers of all tiers without their places, and without their URLs, which are as written.
func tiers(g Group) [][]Server {
	var all [][]Server
	for _, t := range g.Tiers {
		var tier []Server
		for _, s := range t {
			s.URL, s.Place = "", Place{}
			tier = append(tier, s)
		}
		all = append(all, tier)
	}
	return all
}

// TestSixLines loads the six lines that the design promises to be a whole gateway, as the message about an empty file shows
// them. Its host names are found by the upstreams that have addresses.
func TestSixLines(t *testing.T) {
	text := strings.ReplaceAll(strings.ReplaceAll(sixLines, "\n    ", "\n"), "server.", "pki/server.")
	cfg, err := parse(t, text)
	if err != nil {
		t.Fatal(err)
	}
	if len(cfg.Warnings) != 0 {
		t.Errorf("got warnings %v", cfg.Warnings)
	}
	v6 := netip.IPv6Unspecified()
	want := []Listener{
		{Name: "dns://:8053", URL: "dns://:8053", Scheme: DNS, Addr: netip.AddrPortFrom(v6, 8053)},
		{Name: "tls://:8853", URL: "tls://:8853", Scheme: TLS, Addr: netip.AddrPortFrom(v6, 8853)},
		{Name: "https://:8443/dns-query", URL: "https://:8443/dns-query", Scheme: HTTPS, Addr: netip.AddrPortFrom(v6, 8443),
			Path: "/dns-query", HTTP: []string{"h1", "h2"}},
	}
	if d := cmp.Diff(cfg.Listen, want, sameConfig); d != "" {
		t.Errorf("listen (-got +want):\n%s", d)
	}
	first := []Server{server(TLS, "1.1.1.1", 853, "", "cloudflare-dns.com"), server(TLS, "9.9.9.9", 853, "", "dns.quad9.net")}
	second := []Server{server(HTTPS, "dns.quad9.net", 443, "/dns-query", "dns.quad9.net"),
		server(QUIC, "dns.adguard-dns.com", 853, "", "dns.adguard-dns.com")}
	if d := cmp.Diff(tiers(cfg.Upstreams[0]), [][]Server{first, second}, sameConfig); d != "" {
		t.Errorf("tiers (-got +want):\n%s", d)
	}
	if d := cmp.Diff(tiers(Group{Tiers: [][]Server{cfg.Bootstrap}}), [][]Server{first}, sameConfig); d != "" {
		t.Errorf("bootstrap (-got +want):\n%s", d)
	}
	pair := cfg.TLS[0]
	if cfg.Log.Format != "json" || string(pair.Cert) != string(pki()["pki/server.crt"]) || pair.KeyFile != "pki/server.key" {
		t.Errorf("got log %+v, key file %q", cfg.Log, cfg.TLS[0].KeyFile)
	}
}

func TestListenAddresses(t *testing.T) {
	tests := []struct {
		url        string
		addr, path string
	}{
		{"dns://:8053", "[::]:8053", ""}, {"dns://*:8053", "[::]:8053", ""}, {"dns://0.0.0.0:8053", "0.0.0.0:8053", ""},
		{"dns://127.0.0.1", "127.0.0.1:53", ""}, {"udp://[::1]", "[::1]:53", ""}, {"tcp://[::ffff:10.0.0.1]:5", "10.0.0.1:5", ""},
		{"TLS://:853", "[::]:853", ""}, {"tls://10.0.0.1", "10.0.0.1:853", ""}, {"quic://10.0.0.1", "10.0.0.1:853", ""},
		{"https://10.0.0.1", "10.0.0.1:443", "/dns-query"}, {"https://10.0.0.1/", "10.0.0.1:443", "/dns-query"},
		{"https://:8443/d/x", "[::]:8443", "/d/x"}, {"dns://127.0.0.1:0", "127.0.0.1:0", ""},
		{"udp://[fe80::1%eth0]:53", "[fe80::1%eth0]:53", ""},
	}
	for _, tt := range tests {
		cfg, err := parse(t, "tls: {cert: pki/server.crt, key: pki/server.key}\nlisten: ["+quote(tt.url)+"]\n")
		if err != nil {
			t.Errorf("%s: %v", tt.url, err)
			continue
		}
		l := cfg.Listen[0]
		if l.Addr.String() != tt.addr || l.Path != tt.path || l.URL != tt.url || l.Name != tt.url {
			t.Errorf("%s: got %+v, want %s and path %q", tt.url, l, tt.addr, tt.path)
		}
	}
}

// TestListenTogether has listeners that the kernel does bind beside each other.
func TestListenTogether(t *testing.T) {
	for _, list := range [][]string{
		{"udp://:53", "tcp://:53"}, {"dns://127.0.0.1:53", "dns://127.0.0.2:53"}, {"tls://:853", "quic://:853"},
		{"dns://:0", "dns://:0"}, {"udp://0.0.0.0:53", "udp://[::1]:53"}, {"https://:443", "quic://:443"}, {"udp://:8081"},
		{`{url: "https://:443", http: h3}`, "tls://:443"},
	} {
		cfg, err := parse(t, "tls: {cert: pki/server.crt, key: pki/server.key}\nlisten:\n  - "+strings.Join(list, "\n  - ")+"\n")
		if err != nil || len(cfg.Listen) != len(list) {
			t.Errorf("%s: %v", list, err)
		}
	}
}

func TestUpstreamServers(t *testing.T) {
	tests := []struct {
		url  string
		want Server
	}{
		{"tls://9.9.9.9", server(TLS, "9.9.9.9", 853, "", "9.9.9.9")},
		{"tls://9.9.9.9:8853#dns.Quad9.net.", server(TLS, "9.9.9.9", 8853, "", "dns.quad9.net")},
		{"tls://127.0.0.1:8854#1.1.1.1", server(TLS, "127.0.0.1", 8854, "", "1.1.1.1")},
		{"tls://DNS.Quad9.net.", server(TLS, "dns.quad9.net", 853, "", "dns.quad9.net")},
		{"tls://[2620:FE::FE]", server(TLS, "2620:fe::fe", 853, "", "2620:fe::fe")},
		{"https://9.9.9.9#dns.quad9.net", server(HTTPS, "9.9.9.9", 443, "/dns-query", "dns.quad9.net")},
		{"https://dns.nextdns.io/ab12/My%20Phone", server(HTTPS, "dns.nextdns.io", 443, "/ab12/My%20Phone", "dns.nextdns.io")},
		{"h3://dns.google/dns-query", server(H3, "dns.google", 443, "/dns-query", "dns.google")},
		{"quic://94.140.14.140", server(QUIC, "94.140.14.140", 853, "", "94.140.14.140")},
		{"udp://10.0.0.1", server(UDP, "10.0.0.1", 53, "", "10.0.0.1")},
		{"tcp://10.0.0.1:5353", server(TCP, "10.0.0.1", 5353, "", "10.0.0.1")},
		{"sdns://AAAAAAAAAAAACzE5Mi4xNjguMS4x", Server{Scheme: SDNS}},
	}
	for _, tt := range tests {
		cfg, err := parse(t, "upstreams: "+quote(tt.url)+"\nbootstrap: 9.9.9.9\n")
		if err != nil {
			t.Errorf("%s: %v", tt.url, err)
			continue
		}
		if got := cfg.Upstreams[0].Tiers[0][0].URL; got != tt.url {
			t.Errorf("%s: got URL %s", tt.url, got)
		}
		if d := cmp.Diff(tiers(cfg.Upstreams[0]), [][]Server{{tt.want}}, sameConfig); d != "" {
			t.Errorf("%s (-got +want):\n%s", tt.url, d)
		}
	}
}

func TestDiscover(t *testing.T) {
	tests := []struct {
		address, url string
		want         Server
	}{
		{"192.0.2.1", "discover://192.0.2.1", server(Discover, "192.0.2.1", 53, "", "192.0.2.1")},
		{"192.0.2.1:53", "discover://192.0.2.1", server(Discover, "192.0.2.1", 53, "", "192.0.2.1")},
		{"192.0.2.1:5353", "discover://192.0.2.1:5353", server(Discover, "192.0.2.1", 5353, "", "192.0.2.1")},
		{"2001:DB8::1", "discover://[2001:db8::1]", server(Discover, "2001:db8::1", 53, "", "2001:db8::1")},
		{"[2001:db8::1]", "discover://[2001:db8::1]", server(Discover, "2001:db8::1", 53, "", "2001:db8::1")},
		{"[2001:db8::1]:5353", "discover://[2001:db8::1]:5353", server(Discover, "2001:db8::1", 5353, "", "2001:db8::1")},
		{"::ffff:192.0.2.1", "discover://192.0.2.1", server(Discover, "192.0.2.1", 53, "", "192.0.2.1")},
	}
	for _, tt := range tests {
		cfg, err := parse(t, "upstreams: [{discover: "+quote(tt.address)+"}]\n")
		if err != nil || len(cfg.Warnings) > 0 {
			t.Errorf("%s: %v", tt.address, err)
			continue
		}
		if got := cfg.Upstreams[0].Tiers[0][0].URL; got != tt.url {
			t.Errorf("%s: got URL %s, want %s", tt.address, got, tt.url)
		}
		if d := cmp.Diff(tiers(cfg.Upstreams[0]), [][]Server{{tt.want}}, sameConfig); d != "" {
			t.Errorf("%s (-got +want):\n%s", tt.address, d)
		}
	}
}

func TestServerObject(t *testing.T) {
	sum := [32]byte{1, 2, 3}
	pin := "sha256/" + base64.StdEncoding.EncodeToString(sum[:])
	cfg, err := parse(t, `
upstreams:
  - url: tls://10.0.0.53#ns1.corp.internal
    ca: pki/server.crt
    pin: `+pin+`
    client_cert: {cert: "file:pki/other.crt", key: "file:pki/other.key"}
  - {url: "tls://10.0.0.54", client_cert: {cert: "env:TLS_CERT", key: "env:TLS_KEY"}}
`)
	if err != nil {
		t.Fatal(err)
	}
	s, second := cfg.Upstreams[0].Tiers[0][0], cfg.Upstreams[0].Tiers[0][1]
	if string(s.CA) != string(pki()["pki/server.crt"]) || s.CAFile != "pki/server.crt" || len(s.Pins) != 1 || s.Pins[0] != sum {
		t.Errorf("got CA %q of %s, pins %x", s.CA, s.CAFile, s.Pins)
	}
	if s.ClientCert == nil || s.ClientCert.KeyFile != "pki/other.key" || string(s.ClientCert.Key) != string(pki()["pki/other.key"]) {
		t.Errorf("got client certificate %+v", s.ClientCert)
	}
	c := second.ClientCert
	if c == nil || c.KeyFile != "env:TLS_KEY" || c.CertFile != "env:TLS_CERT" || string(c.Key) != string(pki()["pki/server.key"]) {
		t.Errorf("got client certificate %+v from the environment", c)
	}
}

func TestGroups(t *testing.T) {
	a, b := server(TLS, "9.9.9.1", 853, "", "9.9.9.1"), server(TLS, "9.9.9.2", 853, "", "9.9.9.2")
	c := server(TLS, "9.9.9.3", 853, "", "9.9.9.3")
	tests := []struct {
		name, text string
		want       [][]Server
	}{
		{"scalar", "upstreams: tls://9.9.9.1", [][]Server{{a}}},
		{"list", "upstreams: [tls://9.9.9.1, tls://9.9.9.2]", [][]Server{{a, b}}},
		{"fallback", "upstreams: [tls://9.9.9.1]\nfallback: tls://9.9.9.2", [][]Server{{a}, {b}}},
		{"fallback, one tier", "upstreams: [tls://9.9.9.1]\nfallback: [tls://9.9.9.2, tls://9.9.9.3]", [][]Server{{a}, {b, c}}},
		{"fallback, tiers", "upstreams: [tls://9.9.9.1]\nfallback: [[tls://9.9.9.2], [tls://9.9.9.3]]", [][]Server{{a}, {b}, {c}}},
		{"group, scalar", "upstreams: {default: tls://9.9.9.1}", [][]Server{{a}}},
		{"group, list", "upstreams: {default: [tls://9.9.9.1, tls://9.9.9.2]}\nfallback: tls://9.9.9.3", [][]Server{{a, b}, {c}}},
		{"try, scalar", "upstreams: {default: {try: tls://9.9.9.1}}", [][]Server{{a}}},
		{"try, urls", "upstreams: {default: {try: [tls://9.9.9.1, tls://9.9.9.2]}}", [][]Server{{a}, {b}}},
		{"try, mixed", "upstreams: {default: {try: [[tls://9.9.9.1, {url: tls://9.9.9.2}], {url: tls://9.9.9.3}]}}",
			[][]Server{{a, b}, {c}}},
		{"try and fallback", "upstreams: {default: {try: tls://9.9.9.1}}\nfallback: [tls://9.9.9.2]", [][]Server{{a}, {b}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg, err := parse(t, tt.text)
			if err != nil {
				t.Fatal(err)
			}
			g := cfg.Upstreams[0]
			if d := cmp.Diff(tiers(g), tt.want, sameConfig); d != "" {
				t.Errorf("tiers (-got +want):\n%s", d)
			}
			all := NextOn{Timeout: true, Connect: true, ServFail: true, Refused: true}
			if g.Name != DefaultGroup || g.Pick != Fastest || g.Deadline != 3*time.Second || g.NextOn != all {
				t.Errorf("got group %+v without its defaults", g)
			}
		})
	}
	t.Run("fallback alone", func(t *testing.T) {
		cfg, err := parse(t, "fallback: tls://9.9.9.1")
		if err != nil {
			t.Fatal(err)
		}
		got := tiers(cfg.Upstreams[0])
		if len(got) != 2 || got[0][0].VerifyName != "cloudflare-dns.com" || !cmp.Equal(got[1], []Server{a}, sameConfig) {
			t.Errorf("got %+v, want the first tier of the default and the file's fallback", got)
		}
	})
}

func TestRules(t *testing.T) {
	below := func(values ...string) []Name { return []Name{{Match: Below, Values: values}} }
	octets := func(from, to int, zone string) (all []string) {
		for i := from; i <= to; i++ {
			all = append(all, strconv.Itoa(i)+"."+zone)
		}
		return all
	}
	tests := []struct {
		name string // as in the file
		want []Name
	}{
		{"corp.internal", below("corp.internal")},
		{"Corp.INTERNAL.", below("corp.internal")},
		{"internal", below("internal")},
		{"_sip._tcp.example", below("_sip._tcp.example")},
		{"xn--bcher-kva.example", below("xn--bcher-kva.example")},
		{"0/25.2.0.192.in-addr.arpa", below("0/25.2.0.192.in-addr.arpa")},
		{".", below("")},
		{"=corp.Internal.", []Name{{Match: Exact, Values: []string{"corp.internal"}}}},
		{"=.", []Name{{Match: Exact, Values: []string{""}}}},
		{`'/^ads?[0-9]*\./'`, []Name{{Match: Regexp, Values: []string{`^ads?[0-9]*\.`}}}},
		{"/a/b/", []Name{{Match: Regexp, Values: []string{"a/b"}}}},
		{`'/(?i)ADS\S/'`, []Name{{Match: Regexp, Values: []string{`(?i)ADS\S`}}}},
		{"[a, b]", append(below("a"), below("b")...)},
		{"10.0.0.0/8", below("10.in-addr.arpa")},
		{"192.168.0.0/16", below("168.192.in-addr.arpa")},
		{"192.0.2.0/24", below("2.0.192.in-addr.arpa")},
		{"192.0.2.7", below("7.2.0.192.in-addr.arpa")},
		{"192.0.2.7/32", below("7.2.0.192.in-addr.arpa")},
		{"0.0.0.0/0", below("in-addr.arpa")},
		{"172.16.0.0/12", below(octets(16, 31, "172.in-addr.arpa")...)},
		{"128.0.0.0/1", below(octets(128, 255, "in-addr.arpa")...)},
		{"192.0.2.254/31", below("254.2.0.192.in-addr.arpa", "255.2.0.192.in-addr.arpa")},
		{"'fd00::/8'", below("d.f.ip6.arpa")},
		{"'fc00::/7'", below("c.f.ip6.arpa", "d.f.ip6.arpa")},
		{"'2001:db8::/34'", below("0.8.b.d.0.1.0.0.2.ip6.arpa", "1.8.b.d.0.1.0.0.2.ip6.arpa", "2.8.b.d.0.1.0.0.2.ip6.arpa",
			"3.8.b.d.0.1.0.0.2.ip6.arpa")},
		{"'2001:db8::1'", below("1." + strings.Repeat("0.", 23) + "8.b.d.0.1.0.0.2.ip6.arpa")},
		{"'::/0'", below("ip6.arpa")},
	}
	for _, tt := range tests {
		text := "upstreams: {default: [tls://9.9.9.9], corp: {try: tls://10.0.0.53, private: true}}\n" +
			"rules: [{if: {name: " + tt.name + "}, use: corp}]\n"
		cfg, err := parse(t, text)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		want := []Rule{{Names: tt.want, Use: "corp"}}
		if d := cmp.Diff(cfg.Rules, want, sameConfig, cmpopts.IgnoreFields(Name{}, "Text")); d != "" {
			t.Errorf("%s (-got +want):\n%s", tt.name, d)
		}
	}
}

// TestRulesTogether has rules that may stand side by side.
func TestRulesTogether(t *testing.T) {
	const upstreams = "upstreams:\n  default: [tls://9.9.9.9]\n  corp: {try: tls://10.0.0.53, private: true}\n" +
		"  lab: {try: tls://10.0.1.53, private: true}\n  other: [tls://1.1.1.1]\n"
	tests := []struct{ name, rules string }{
		{"narrower first", "{if: {name: a.test}, use: other}, {if: {name: test}, use: default}"},
		{"narrower first in one list", "{if: {name: [a.test, =test, test]}, use: other}"},
		{"narrower private group", "{if: {name: lab.corp.internal}, use: lab}, {if: {name: corp.internal}, use: corp}"},
		{"private inside of another", "{if: {name: corp.example}, use: corp}, {if: {name: [example, .]}, use: other}"},
		{"exact is not below", "{if: {name: =corp.example}, use: corp}, {if: {name: [a.corp.example, corp.example]}, use: other}"},
		{"exact before the name", "{if: {name: =corp.example}, use: other}, {if: {name: corp.test}, use: corp}"},
		{"a label is whole", "{if: {name: internal}, use: corp}, {if: {name: notinternal}, use: other}"},
		{"private expression first", "{if: {name: /^secret/}, use: corp}, {if: {name: [example, =x.test, /x/]}, use: other}"},
		{"expression that does not match", "{if: {name: /^a/}, use: other}, {if: {name: =b.example}, use: corp}"},
		{"wider network", "{if: {name: [10.0.0.0/9, 10.0.0.0/8]}, use: corp}"},
	}
	for _, tt := range tests {
		cfg, err := parse(t, upstreams+"rules: [{if: {name: r1.invalid}, use: corp}, {if: {name: r2.invalid}, use: lab}, "+
			"{if: {name: =r3.invalid}, use: other}, "+tt.rules+"]\n")
		if err != nil || len(cfg.Warnings) > 0 {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func TestGroupSettings(t *testing.T) {
	breaker := Breaker{OpenAfter: 3, Probe: 2 * time.Second, MaxProbe: time.Minute}
	tests := []struct {
		keys string
		want Group
	}{
		{"", Group{Breaker: breaker}},
		{"hedge: auto", Group{Breaker: breaker}},
		{"hedge: never", Group{Breaker: breaker, Hedge: Hedge{Never: true}}},
		{"hedge: 250ms", Group{Breaker: breaker, Hedge: Hedge{After: 250 * time.Millisecond}}},
		{"private: true", Group{Breaker: breaker, Private: true}},
		{"private: false", Group{Breaker: breaker}},
		{"breaker: {}", Group{Breaker: breaker}},
		{"breaker: {open_after: 100}", Group{Breaker: Breaker{OpenAfter: 100, Probe: 2 * time.Second, MaxProbe: time.Minute}}},
		{"breaker: {probe: 5m}", Group{Breaker: Breaker{OpenAfter: 3, Probe: 5 * time.Minute, MaxProbe: 5 * time.Minute}}},
		{"breaker: {max_probe: 2s, probe: 100ms}", Group{Breaker: Breaker{OpenAfter: 3, Probe: 100 * time.Millisecond,
			MaxProbe: 2 * time.Second}}},
	}
	for _, tt := range tests {
		cfg, err := parse(t, "upstreams: {default: {try: [tls://9.9.9.9, tls://1.1.1.1], "+tt.keys+"}}\nfallback: tls://9.9.9.10\n")
		if err != nil || len(cfg.Warnings) > 0 {
			t.Errorf("%s: %v", tt.keys, err)
			continue
		}
		g := cfg.Upstreams[0]
		if d := cmp.Diff(Group{Hedge: g.Hedge, Breaker: g.Breaker, Private: g.Private}, tt.want, sameConfig); d != "" {
			t.Errorf("%s (-got +want):\n%s", tt.keys, d)
		}
	}
}

// TestFallbackIsOfDefault proves that no other group gets the tiers of `fallback`, least of all a private one.
func TestFallbackIsOfDefault(t *testing.T) {
	cfg, err := parse(t, "fallback: tls://9.9.9.9\nupstreams:\n  corp: {try: tls://10.0.0.53, private: true}\n  default: [tls://1.1.1.1]\n"+
		"rules: [{if: {name: corp.internal}, use: corp}]\n")
	if err != nil {
		t.Fatal(err)
	}
	if corp, other := cfg.Upstreams[0], cfg.Upstreams[1]; corp.Name != "corp" || len(corp.Tiers) != 1 || len(other.Tiers) != 2 {
		t.Errorf("got %+v, want the second tier in the group default only", cfg.Upstreams)
	}
}

// TestPrivateServersFindNoNames proves that the names of upstreams are not looked up at a private server.
func TestPrivateServersFindNoNames(t *testing.T) {
	cfg, err := parse(t, "upstreams:\n  corp: {try: tls://10.0.0.53, private: true}\n  default: [tls://dns.quad9.net, tls://1.1.1.1]\n"+
		"rules: [{if: {name: corp.internal}, use: corp}]\n")
	if err != nil {
		t.Fatal(err)
	}
	if len(cfg.Bootstrap) != 1 || cfg.Bootstrap[0].Host != "1.1.1.1" {
		t.Errorf("got bootstrap %+v, want 1.1.1.1 alone", cfg.Bootstrap)
	}
}

func TestDurations(t *testing.T) {
	tests := []struct {
		text string
		want time.Duration // negative: a mistake
	}{
		{"0", 0}, {"0s", 0}, {"250ms", 250 * time.Millisecond}, {"3s", 3 * time.Second}, {"1.8s", 1800 * time.Millisecond},
		{"5m", 5 * time.Minute}, {"1h30m", 90 * time.Minute}, {"1d", 24 * time.Hour}, {"24855d", maxDuration},
		{"", -1}, {"3", -1}, {"s", -1}, {"3x", -1}, {"3 s", -1}, {"-3s", -1}, {"+3s", -1}, {"1..5s", -1}, {"1h3", -1}, {"24856d", -1},
		{"0x10s", -1}, {"1e3s", -1}, {".5s", -1}, {"Infs", -1}, {strings.Repeat("9", 400) + "s", -1},
	}
	for _, tt := range tests {
		got, err := parseDuration(tt.text)
		if err != nil {
			got = -1
		}
		if got != tt.want {
			t.Errorf("%q: got %v, %v, want %v", tt.text, got, err, tt.want)
		}
		if again, _ := parseDuration(formatDuration(got)); got > 0 && again != got {
			t.Errorf("%q: got %s when it is written again", tt.text, formatDuration(got))
		}
	}
}

func TestSizes(t *testing.T) {
	tests := []struct {
		text string
		want int64 // negative: a mistake
	}{
		{"0", 0}, {"1B", 1}, {"1KB", 1024}, {"64MB", 64 << 20}, {"64MiB", 64 << 20}, {"1.5GB", 3 << 29}, {"1GiB", 1 << 30},
		{"", -1}, {"64", -1}, {"64mb", -1}, {"64M", -1}, {"MB", -1}, {"-1MB", -1}, {"1TB", -1}, {"9999999GB", -1},
		{strings.Repeat("9", 400) + "GB", -1},
	}
	for _, tt := range tests {
		got, err := parseSize(tt.text)
		if err != nil {
			got = -1
		}
		if got != tt.want {
			t.Errorf("%q: got %d, %v, want %d", tt.text, got, err, tt.want)
		}
	}
}

func lifetimes(c *Config) any {
	return []time.Duration{c.Cache.MinTTL, c.Cache.MaxTTL, c.Cache.NegativeMax}
}

func stale(c *Config) any    { return c.Cache.Stale }
func prefetch(c *Config) any { return c.Cache.Prefetch }
func save(c *Config) any     { return c.Cache.Save }

// TestSettings loads one text after the other and looks at one value.
func TestSettings(t *testing.T) {
	tests := []struct {
		text string
		got  func(*Config) any
		want any
	}{
		{"cache: off", func(c *Config) any { return c.Cache.Size }, int64(0)},
		{"cache: 0", func(c *Config) any { return c.Cache.Size }, int64(0)},
		{"cache: 1MB", func(c *Config) any { return c.Cache.Size }, int64(1 << 20)},
		{"cache: {ttl: {max: 10s}}", lifetimes,
			[]time.Duration{0, 10 * time.Second, 10 * time.Second}},
		{"cache: {ttl: {negative_max: 2m, max: 5m, min: 1m}}", lifetimes,
			[]time.Duration{time.Minute, 5 * time.Minute, 2 * time.Minute}},
		{"cache: 1MB", stale, Stale{After: 1800 * time.Millisecond, For: 24 * time.Hour, TTL: 30 * time.Second}},
		{"cache: {stale: {after: 0s}}", stale, Stale{For: 24 * time.Hour, TTL: 30 * time.Second}},
		{"cache: {stale: {for: 3d, ttl: 1s}}", stale, Stale{After: 1800 * time.Millisecond, For: 72 * time.Hour, TTL: time.Second}},
		{"cache: {stale: off}", stale, Stale{}},
		{"cache: {stale: {after: 1s, for: off}}", stale, Stale{}},
		{"cache: 1MB", prefetch, Prefetch{Hits: 5, Remaining: 0.1}},
		{"cache: {prefetch: {hits: 255, remaining: 12.5%}}", prefetch, Prefetch{Hits: 255, Remaining: 0.125}},
		{"cache: {prefetch: off}", prefetch, Prefetch{}},
		{"cache: 1MB", save, Save{Every: 5 * time.Minute}},
		{"cache: {save: off}", save, Save{Every: 5 * time.Minute}},
		{"cache: {save: {file: off}}", save, Save{Every: 5 * time.Minute}},
		{"cache: {save: file:no}", save, Save{File: "no", Every: 5 * time.Minute}},
		{"cache: {save: cache.bin}", save, Save{File: "cache.bin", Every: 5 * time.Minute}},
		{"cache: {save: file:pki/cache.bin}", save, Save{File: "pki/cache.bin", Every: 5 * time.Minute}},
		{"cache: {save: {every: 1s, file: file:cache.bin}}", save, Save{File: "cache.bin", Every: time.Second}},
		{"cache: {save: {every: 1d, file: cache.bin}}", save, Save{File: "cache.bin", Every: 24 * time.Hour}},
		{"listen: [dns://:53, {url: dns://:54, sockets: 4}, {url: udp://:55, sockets: 256}]",
			func(c *Config) any { return []int{c.Listen[0].Sockets, c.Listen[1].Sockets, c.Listen[2].Sockets} }, []int{0, 4, 256}},
		{"admin: {token: env:TOKEN}", func(c *Config) any { return c.Admin.Token }, "0123456789abcdef01234567"},
		{"admin: {listen: 127.0.0.1:82}", func(c *Config) any { return c.Admin.Token }, ""},
		{"limits: {per_client: 200/s}", func(c *Config) any { return c.Limits.PerClient }, 200.0},
		{"limits: {per_client: 90/m}", func(c *Config) any { return c.Limits.PerClient }, 1.5},
		{"limits: {per_client: 3600/h}", func(c *Config) any { return c.Limits.PerClient }, 1.0},
		{"limits: {per_client: off}", func(c *Config) any { return c.Limits.PerClient }, 0.0},
		{"limits: {}", func(c *Config) any { return c.Limits }, Limits{PrefixV4: 32, PrefixV6: 56, Inflight: 10000, TCPPerClient: 500,
			TCPPipeline: 100, TCPIdle: 10 * time.Second, UDPSize: 1232}},
		{"limits: {tcp_idle: 2m, prefix: {v6: 64}}", func(c *Config) any { return []any{c.Limits.TCPIdle, c.Limits.PrefixV6} },
			[]any{2 * time.Minute, 64}},
		{"log: debug", func(c *Config) any { return c.Log }, Log{Level: "debug", Output: "stdout"}},
		{"log: text", func(c *Config) any { return c.Log }, Log{Level: "info", Format: "text", Output: "stdout"}},
		{"log: {output: file:gateway.log}", func(c *Config) any { return c.Log.Output }, "gateway.log"},
		{"log: {output: file:stdout}", func(c *Config) any { return c.Log.Output }, "./stdout"},
		{"admin: off", func(c *Config) any { return c.Admin.Listen.IsValid() }, false},
		{"admin: {listen: off}", func(c *Config) any { return c.Admin.Listen.IsValid() }, false},
		{"admin: '[::1]:81'", func(c *Config) any { return c.Admin.Listen.String() }, "[::1]:81"},
		{"admin: 127.0.0.1:0", func(c *Config) any { return c.Admin.Listen.String() }, "127.0.0.1:0"},
		{"access: any", func(c *Config) any { return c.Access }, Access{Set: true, Allow: anyone, Otherwise: Refuse}},
		{"access: [loopback, 10.1.2.3]", func(c *Config) any { return c.Access }, Access{Set: true, Otherwise: Refuse,
			Allow: append(loopback[:2:2], netip.MustParsePrefix("10.1.2.3/32"))}},
		{"access: {allow: private, otherwise: drop}", func(c *Config) any { return c.Access },
			Access{Set: true, Allow: private, Otherwise: Drop}},
		{"local: {chaos: {id.server: a, version.bind: 'b c'}}", func(c *Config) any { return c.Local.Chaos },
			map[string]string{"id.server": "a", "version.bind": "b c"}},
		{"upstreams: {default: {try: tls://9.9.9.9, next_on: connect, deadline: 250ms}}",
			func(c *Config) any { g := c.Upstreams[0]; return []any{g.NextOn, g.Deadline} },
			[]any{NextOn{Connect: true}, 250 * time.Millisecond}},
		{"bootstrap: [9.9.9.9, 'tls://[2620:fe::fe]#dns.quad9.net']\nupstreams: tls://dns.quad9.net",
			func(c *Config) any { return tiers(Group{Tiers: [][]Server{c.Bootstrap}})[0] },
			[]Server{server(UDP, "9.9.9.9", 53, "", "9.9.9.9"), server(TLS, "2620:fe::fe", 853, "", "dns.quad9.net")}},
		// YAML's own means: anchors, merge keys, where the keys beside a merge key win.
		{"limits:\n  <<: &l {inflight: 7, udp_size: 600}\n  udp_size: 700\n",
			func(c *Config) any { return []int{c.Limits.Inflight, c.Limits.UDPSize} }, []int{7, 700}},
		{"upstreams: &u [tls://9.9.9.9]\nfallback: [tls://1.1.1.1]\nbootstrap: *u\n",
			func(c *Config) any { return c.Bootstrap[0].URL }, "tls://9.9.9.9"},
		{"cache:\n  <<: [{size: 2MB}, {size: 3MB, ttl: {min: 1s}}]\n",
			func(c *Config) any { return []any{c.Cache.Size, c.Cache.MinTTL} }, []any{int64(2 << 20), time.Second}},
	}
	for _, tt := range tests {
		cfg, err := parse(t, tt.text+"\n")
		if err != nil {
			t.Errorf("%s: %v", tt.text, err)
			continue
		}
		if d := cmp.Diff(tt.got(cfg), tt.want, sameConfig); d != "" {
			t.Errorf("%s (-got +want):\n%s", tt.text, d)
		}
	}
}

// TestInclude merges three files; paths in each are relative to its own folder.
func TestInclude(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, pki())
	write(t, dir, map[string][]byte{
		"etc/config.yaml":   []byte("include: conf.d/*.yaml\nlisten: [dns://:8053]\nlimits: {inflight: 5}\n"),
		"etc/conf.d/b.yaml": []byte("listen: [tcp://:9053]\nlimits: {udp_size: 600}\ninclude: ../more/tls.yaml\n"),
		"etc/conf.d/a.yaml": []byte("listen: [udp://:9053]\nlimits: {prefix: {v4: 24}}\nlog: json\n"),
		"etc/more/tls.yaml": []byte("tls: {cert: ../../pki/server.crt, key: ../../pki/server.key}\nlisten: [tls://:853]\n"),
		"etc/conf.d/c.yaml": []byte("# nothing yet\n"),
	})
	t.Chdir(dir)
	cfg, err := Load("etc/config.yaml", testOptions(""))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, l := range cfg.Listen {
		got = append(got, l.Place.File+" "+l.URL)
	}
	want := []string{"etc/config.yaml dns://:8053", "etc/conf.d/a.yaml udp://:9053", "etc/conf.d/b.yaml tcp://:9053",
		"etc/more/tls.yaml tls://:853"}
	if d := cmp.Diff(got, want); d != "" {
		t.Errorf("listeners (-got +want):\n%s", d)
	}
	if l := cfg.Limits; l.Inflight != 5 || l.UDPSize != 600 || l.PrefixV4 != 24 || cfg.Log.Format != "json" {
		t.Errorf("got limits %+v, log %+v", l, cfg.Log)
	}
	files := []string{"etc/config.yaml", "etc/conf.d/a.yaml", "etc/conf.d/b.yaml", "etc/more/tls.yaml", "etc/conf.d/c.yaml",
		"pki/server.crt", "pki/server.key"}
	if d := cmp.Diff(cfg.Files, files); d != "" {
		t.Errorf("files (-got +want):\n%s", d)
	}
}

func TestStamps(t *testing.T) {
	lp := func(s string) string { return string(rune(len(s))) + s }
	props := strings.Repeat("\x00", 8)
	stamp := func(s string) string { return "sdns://" + base64.RawURLEncoding.EncodeToString([]byte(s)) }
	hash := strings.Repeat("h", 32)
	tests := []struct {
		name, url, addr string
		ok              bool
	}{
		{"plain", stamp("\x00" + props + lp("9.9.9.9")), "9.9.9.9:53", true},
		{"plain, port", stamp("\x00" + props + lp("[2620:fe::fe]:5353")), "[2620:fe::fe]:5353", true},
		{"plain, v6", stamp("\x00" + props + lp("[2620:fe::fe]")), "[2620:fe::fe]:53", true},
		{"plain, no address", stamp("\x00" + props + lp("")), "", false},
		{"dnscrypt", stamp("\x01" + props + lp("9.9.9.9:8443") + lp(hash) + lp("2.dnscrypt-cert.quad9.net")), "9.9.9.9:8443", true},
		{"doh", stamp("\x02" + props + lp("9.9.9.9") + lp(hash) + lp("dns.quad9.net") + lp("/dns-query")), "9.9.9.9:443", true},
		{"doh, no hash", stamp("\x02" + props + lp("") + "\x00" + lp("dns.quad9.net") + lp("/dns-query")), "invalid AddrPort", true},
		{"doh, hashes and bootstrap", stamp("\x02" + props + lp(":8443") + "\xa0" + hash + lp(hash) + lp("dns.quad9.net") +
			lp("/dns-query") + lp("9.9.9.9")), "invalid AddrPort", true},
		{"dot", stamp("\x03" + props + lp("9.9.9.9") + lp(hash) + lp("dns.quad9.net")), "9.9.9.9:853", true},
		{"doq", stamp("\x04" + props + lp("9.9.9.9:0") + lp(hash) + lp("dns.quad9.net")), "", false},
		{"relay", stamp("\x81" + lp("9.9.9.9:443")), "", false},
		{"short", stamp("\x02" + props + lp("9.9.9.9") + "\xa0" + hash), "", false},
		{"short hash", stamp("\x02" + props + lp("9.9.9.9") + "\x20h"), "", false},
		{"padding", "sdns://AAAAAAAAAAAABzkuOS45Ljk=", "9.9.9.9:53", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			st, err := parseStamp(tt.url)
			if (err == nil) != tt.ok || err == nil && st.addr.String() != tt.addr {
				t.Errorf("got %v, %v, want %q and ok %v", st.addr, err, tt.addr, tt.ok)
			}
		})
	}
}
