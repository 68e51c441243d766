//go:build linux

package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

// What runs the program itself is TestBench in the folder above.

var update = flag.Bool("update", false, "rewrite the golden files in testdata")

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		args, want string
	}{
		{"", "6 targets, [perf] 11 tests, 3 rounds of 6 s, 4 tries: integration/bench/run"},
		{"-m all -r 1 dnsgateway dnsdist",
			"2 targets, [perf mem scale] 11 tests, 1 rounds of 6 s, 4 tries: integration/bench/run -m all -r 1 dnsgateway dnsdist"},
		{"-t doh_hit,udp_hit -s 0.3 -tries 1 floor",
			"1 targets, [perf] 2 tests, 3 rounds of 0.3 s, 1 tries: integration/bench/run -s 0.3 -t doh_hit,udp_hit -tries 1 floor"},
		{"-markdown -o here -m mem,scale", "6 targets, [mem scale] 11 tests, 3 rounds of 6 s, 4 tries: integration/bench/run -m mem,scale"},
	} {
		o, err := parse(append([]string{"-cache", "c"}, strings.Fields(tt.args)...), io.Discard)
		if err != nil {
			t.Errorf("%s: %v", tt.args, err)
			continue
		}
		got := fmt.Sprintf("%d targets, %v %d tests, %d rounds of %v s, %d tries: %s", len(o.targets), o.modes, len(o.tests), o.rounds,
			o.seconds, o.tries, o.given)
		if got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.args, got, tt.want)
		}
	}
	for args, want := range map[string]string{
		"-cache c bind":              `unknown target "bind"; they are dnsgateway dnsdist unbound kresd dnsproxy floor`,
		"-cache c floor floor":       `target "floor" is there twice`,
		"-cache c -t udp_hit,udp":    `-t: unknown test "udp"; they are udp_hit,udp_max,`,
		"-cache c -m speed":          `-m: unknown mode "speed"; they are perf,mem,scale, or all`,
		"-cache c -r 0":              "-r, -tries and -conns are 1 or more",
		"-cache c -s 0":              "-s 0: 0.1 to 60",
		"-r 1":                       "-cache is not given: start it by integration/bench/run",
		"-cache c -nonsense":         "flag provided but not defined: -nonsense",
		"-cache c -m mem -names 999": "-r, -tries and -conns are 1 or more, -names is 1000 or more",
	} {
		var stderr bytes.Buffer
		if status := execute(t.Context(), strings.Fields(args), io.Discard, &stderr); status != 2 ||
			!strings.HasPrefix(stderr.String(), want) {
			t.Errorf("%s: got status %d, %q, want 2, %q", args, status, stderr.String(), want)
		}
	}
}

// TestReadme parses the commands that the README tells people to run, and looks for every test in its table.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	// In a block a command ends with its line or at a comment; in the text, where it may go on in the next line, at a backquote.
	commands := regexp.MustCompile("(?m)^\\./integration/bench/run([^#\n]*)|`\\./integration/bench/run([^`]*)`").FindAllSubmatch(readme, -1)
	if len(commands) < 6 {
		t.Errorf("%d commands, want all", len(commands))
	}
	for _, c := range commands {
		args := string(c[1]) + string(c[2])
		if _, err := parse(append([]string{"-cache", "c"}, strings.Fields(args)...), io.Discard); err != nil && !errors.Is(err, flag.ErrHelp) {
			t.Errorf("integration/bench/run%s: %v", args, err)
		}
	}
	for _, test := range tests {
		if !strings.Contains(string(readme), "`"+test.name+"`") {
			t.Errorf("the README does not say what %s is", test.name)
		}
	}
}

func TestParseGenerated(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       generated
	}{
		{"dnsperf", `
[Status] Sending queries (to 127.2.2.1:5301)
> NOERROR h0000001.bench.perfzone.net A 0.000300
> SERVFAIL h0000002.bench.perfzone.net A 0.900000
> NOERROR h0000003.bench.perfzone.net A 0.000100
> T h0000004.bench.perfzone.net A
  Queries sent:         4
  Queries completed:    3 (75.00%)
  Queries lost:         1 (25.00%)
  Response codes:       SERVFAIL 1 (33.33%), NOERROR 2 (66.67%)
  Queries per second:   43883.306927
`, generated{sent: 4, completed: 3, good: 2, rate: 43883.306927, latencies: []float64{100, 300}}},
		{"h2load", `
finished in 1.00s, 10949.00 req/s, 911.95KB/s
requests: 10957 total, 11141 started, 10949 done, 10947 succeeded, 2 failed, 5 errored, 1 timeout
status codes: 10947 2xx, 0 3xx, 2 4xx, 0 5xx
`, generated{sent: 10957, completed: 10949, good: 10947, rate: 10949}},
	} {
		got, err := parseGenerated([]byte(tt.text))
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if diff := cmp.Diff(got, tt.want, cmp.AllowUnexported(generated{})); diff != "" {
			t.Errorf("%s: got -, want +:\n%s", tt.name, diff)
		}
	}
	for _, text := range []string{"", "Queries sent: 9\nQueries completed: 0 (0.00%)\n", "Error: unable to read input\n"} {
		if g, err := parseGenerated([]byte(text)); err == nil {
			t.Errorf("%q: got %+v, want an error", text, g)
		}
	}
}

func TestPercentile(t *testing.T) {
	thousand := make([]float64, 1000)
	for i := range thousand {
		thousand[i] = float64(i + 1)
	}
	for _, tt := range []struct {
		of      []float64
		p, want float64
	}{
		{nil, 0.5, 0}, {thousand[:1], 0.99, 1}, {thousand[:2], 0.5, 1}, {thousand, 0.5, 500}, {thousand, 0.99, 990}, {thousand, 1, 1000},
	} {
		if got := percentile(tt.of, tt.p); got != tt.want {
			t.Errorf("%d values, %v: got %v, want %v", len(tt.of), tt.p, got, tt.want)
		}
	}
}

func TestValues(t *testing.T) {
	begin := time.Unix(0, 0)
	from := reading{at: begin, server: time.Second, total: time.Minute, counters: counters{responses: 10}}
	to := reading{at: begin.Add(2 * time.Second), server: 2 * time.Second, upstream: 200 * time.Millisecond, own: time.Second,
		total: time.Minute + 2400*time.Millisecond, stolen: 20 * time.Millisecond, counters: counters{responses: 110, handshakes: 4}}
	got := values(generated{sent: 200_010, completed: 200_000, good: 199_900, rate: 100_000}, from, to)
	want := map[string]float64{"qps": 100_000, "cpu": 5, "util": 50, "load": 60, "lost": 10 / 2000.1, "bad": 0.05, "up": 0.0005,
		"shakes": 0.00002, "foreign": 10, "stolen": 1}
	for name, v := range want {
		if d := got[name] - v; max(d, -d) > 1e-9 || len(got) != len(want) {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
	}
	if !spoilt(got) {
		t.Error("strangers used 10 % of a core: not spoilt")
	}
	if got["foreign"], got["stolen"] = 5, 9; !spoilt(got) {
		t.Error("the host took 9 % of a core: not spoilt")
	}
	if got["stolen"] = 5; spoilt(got) {
		t.Error("spoilt by 5 %")
	}
}

// A process's name may hold what separates the other fields.
func TestCPUTime(t *testing.T) {
	const stat = "17 (a) b (c) S 1 17 17 0 -1 4194560 1 2 3 4 100 20 3 4 20 0 1 0 99"
	if got, want := cpuTime([]byte(stat)), 1270*time.Millisecond; got != want {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := cpuTime(nil); got != 0 {
		t.Errorf("of nothing: got %v, want 0", got)
	}
	if got := cpuOf(os.Getpid()); got > time.Hour {
		t.Errorf("this test used %v", got)
	}
	if all, own := cpuOfAll(), cpuOf(os.Getpid()); all < own {
		t.Errorf("all processes used %v, this one alone %v", all, own)
	}
	if got := status([]int{os.Getpid()}, "VmRSS"); got < mebi {
		t.Errorf("this test uses %d octets", got)
	}
}

// Every target's configuration can be written, and holds what the site says.
func TestConfigs(t *testing.T) {
	p := newPaths("/cache")
	for _, target := range targets {
		dir := t.TempDir()
		s := newSite(p, load{cores: []int{0, 1}, entries: 1_000_000, conns: 5000}, dir, "/shm")
		path, err := target.write(s)
		if err != nil {
			t.Errorf("%s: %v", target.name, err)
			continue
		}
		text := strings.Join(target.command(p, s, path), " ")
		if path != "" {
			file, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			text += string(file)
		}
		for _, want := range []string{"5301", "8530", "4430", "8853", "/cache/pki/server.crt", "/cache/pki/server.key"} {
			if !strings.Contains(text, want) {
				t.Errorf("%s does not know %s:\n%s", target.name, want, text)
			}
		}
		if strings.Contains(text, "{{.") || strings.Contains(text, "no value") {
			t.Errorf("%s: something is not filled in:\n%s", target.name, text)
		}
	}
	s := newSite(p, load{entries: 1_000_000}, "", "")
	if got := s.Megabytes(128); got != 1280 {
		t.Errorf("a cache for ten times the names: got %d MB, want 1280", got)
	}
	if got := newSite(p, load{entries: 1000}, "", "").Megabytes(128); got != 128 {
		t.Errorf("a cache for 1,000 names: got %d MB, want 128", got)
	}
}

// A file of names is written once, and is the same in another cache folder.
func TestNames(t *testing.T) {
	var texts []string
	for range 2 {
		p := newPaths(t.TempDir())
		path, err := p.names(misses, 5, 3, true)
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for i := 5; i < 8; i++ {
			if !strings.Contains(string(text), hostName(misses, i)+" A\n") {
				t.Errorf("%s is missing in\n%s", hostName(misses, i), text)
			}
		}
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if again, err := p.names(misses, 5, 3, true); err != nil || again != path {
			t.Errorf("again: got %s, %v", again, err)
		}
		if after, _ := os.ReadFile(path); len(after) > 0 {
			t.Error("it was written again")
		}
		if left, _ := filepath.Glob(filepath.Join(p.cache, "names", "new-*")); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
		texts = append(texts, string(text))
	}
	if texts[0] != texts[1] || strings.Count(texts[0], "\n") != 3 {
		t.Errorf("got %q and %q, want the same three lines", texts[0], texts[1])
	}
}

func TestMissing(t *testing.T) {
	got := missing([]string{"sh:dash", "/etc/passwd:base-passwd", "no-such-command:a", "/no/such/file:b"})
	if diff := cmp.Diff(got, []string{"no-such-command:a", "/no/such/file:b"}); diff != "" {
		t.Errorf("got -, want +:\n%s", diff)
	}
}

func TestNumber(t *testing.T) {
	for x, want := range map[float64]string{
		0: "0", 1: "1", 0.004: "0.004", 0.25: "0.25", 6.204: "6.20", 18.66: "18.7", 123.4: "123", 1234.5: "1,234", 1234567: "1,234,567", -2500: "-2,500",
	} {
		if got := number(x); got != want {
			t.Errorf("%v: got %s, want %s", x, got, want)
		}
	}
}

// Three rounds become medians, ratios and marks.
func TestPrint(t *testing.T) {
	r := results{When: time.Date(2026, 11, 26, 0, 0, 0, 0, time.UTC), Command: "integration/bench/run", Machine: "a machine", Cores: []int{0, 1},
		Targets: []string{"dnsgateway", "dnsdist", "floor"}, Versions: map[string]string{"dnsgateway": "v1", "dnsdist": "dnsdist 1.7.3"}}
	add := func(target string, round int, test string, spoilt bool, v map[string]float64) {
		for name, value := range map[string]float64{"up": 0, "lost": 0, "bad": 0, "foreign": 1, "stolen": 0, "util": 95} {
			if _, ok := v[name]; !ok {
				v[name] = value
			}
		}
		r.Records = append(r.Records, record{target, round, test, v, spoilt})
	}
	for i, cpu := range []float64{5, 4, 9} {
		add("dnsgateway", i+1, "udp_hit", false, map[string]float64{"cpu": cpu, "qps": 200_000})
		add("dnsdist", i+1, "udp_hit", i == 1, map[string]float64{"cpu": 10, "qps": 100_000, "util": 80, "foreign": 5 + 5*float64(i)})
		add("floor", i+1, "udp_hit", false, map[string]float64{"cpu": 4, "qps": 250_000})
	}
	add("dnsgateway", 1, "lat_miss", false, map[string]float64{"cpu": 100, "p50": 150, "p99": 300, "up": 1})
	add("dnsdist", 1, "lat_miss", false, map[string]float64{"cpu": 100, "p50": 200, "p99": 400, "up": 0.5, "bad": 3})
	r.Records = append(r.Records, record{"dnsgateway", 1, "mem", map[string]float64{"start": 12.5, "rest": 20, "full": 60.25, "refetched": 0,
		"dot_each": 16, "dot_held": 10_000, "tcp_each": 5.5, "tcp_held": 9999}, false})
	for i, test := range []string{coresTest(1), coresTest(2), namesTest(1000), namesTest(100_000)} {
		add("dnsgateway", 1, test, false, map[string]float64{"cpu": float64(5 + i), "qps": 190_000})
		add("dnsdist", 1, test, false, map[string]float64{"cpu": float64(7 + i), "qps": 140_000})
	}
	var got bytes.Buffer
	if err := r.print(&got, true); err != nil {
		t.Fatal(err)
	}
	golden(t, "report.md", got.String())
	got.Reset()
	if err := r.print(&got, false); err != nil {
		t.Fatal(err)
	}
	golden(t, "report.txt", got.String())

	dir := t.TempDir()
	if err := r.write(dir); err != nil {
		t.Fatal(err)
	}
	var again, stderr bytes.Buffer
	if status := execute(t.Context(), []string{"-report", dir}, &again, &stderr); status != 0 || again.String() != got.String() {
		t.Errorf("-report: status %d, %s, got -, want +:\n%s", status, stderr.String(), cmp.Diff(again.String(), got.String()))
	}
	if status := execute(t.Context(), []string{"-report", filepath.Join(dir, "no")}, io.Discard, &stderr); status != 1 {
		t.Errorf("-report of nothing: got status %d, want 1", status)
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(got, string(want)); diff != "" {
		t.Errorf("%s (-update writes it): got -, want +:\n%s", name, diff)
	}
}

// A wrong answer is an error before anything is measured.
func TestJudge(t *testing.T) {
	name := hostName(hits, 1)
	q := new(dns.Msg).SetQuestion(name+".", dns.TypeA)
	record := func(text string) dns.RR {
		rr, err := dns.NewRR(text)
		if err != nil {
			t.Fatal(err)
		}
		return rr
	}
	for _, tt := range []struct {
		name  string
		spoil func(a *dns.Msg)
		good  bool
	}{
		{"good", func(*dns.Msg) {}, true},
		{"other letters", func(a *dns.Msg) { a.Question[0].Name = strings.ToUpper(a.Question[0].Name) }, true},
		{"other ID", func(a *dns.Msg) { a.Id++ }, false},
		{"query", func(a *dns.Msg) { a.Response = false }, false},
		{"other question", func(a *dns.Msg) { a.Question[0].Name = "x." }, false},
		{"SERVFAIL", func(a *dns.Msg) { a.Rcode = dns.RcodeServerFailure }, false},
		{"truncated", func(a *dns.Msg) { a.Truncated = true }, false},
		{"no record", func(a *dns.Msg) { a.Answer = nil }, false},
		{"other name's address", func(a *dns.Msg) { a.Answer[0].(*dns.A).A = net.IP(address(hostName(hits, 2)).AsSlice()) }, false},
		{"other type", func(a *dns.Msg) { a.Answer[0] = record(name + ". AAAA ::1") }, false},
	} {
		a := new(dns.Msg).SetReply(q)
		a.Answer = []dns.RR{record(name + ". 300 A " + address(name).String())}
		a.Question = slices.Clone(a.Question)
		tt.spoil(a)
		if err := judge(q, a, address(name)); (err == nil) != tt.good {
			t.Errorf("%s: got %v, want good: %v", tt.name, err, tt.good)
		}
	}
}

// The address is src/fastup.c's; check holds the two together on every run.
func TestAddress(t *testing.T) {
	a := address(hostName(hits, 1))
	if !netip.MustParsePrefix("198.18.0.0/16").Contains(a) || a != address(strings.ToUpper(hostName(hits, 1))+".") {
		t.Errorf("got %v", a)
	}
	if a == address(hostName(hits, 2)) {
		t.Error("two names have one address")
	}
}
