package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestShort runs the program's short form on all faults: what the race detector would slow down is built without it.
func TestShort(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a minute")
	}
	program := filepath.Join(t.TempDir(), "failover")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("building the program: %v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "-short")
	// An interrupt lets it take its processes and namespaces away.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	out, err := cmd.CombinedOutput()
	t.Logf("\n%s", out)
	if err != nil {
		t.Error(err)
	}
}

// TestReadme parses the commands that the README tells people to run.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	commands := regexp.MustCompile("go run \\./integration/failover([^#`\n]*)").FindAllSubmatch(readme, -1)
	if len(commands) < 4 {
		t.Errorf("%d commands, want all", len(commands))
	}
	for _, c := range commands {
		if _, err := parse(strings.Fields(string(c[1])), io.Discard); err != nil {
			t.Errorf("go run ./integration/failover%s: %v", c[1], err)
		}
	}
}

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		args, want string
	}{
		{"", "10s 20s 30s 1000/s x1 [dnsgateway] 16 faults 450ms 50ms"},
		{"-short", "2s 4s 10.5s 150/s x6 [dnsgateway] 16 faults 1s 200ms"},
		{"-short -rate 100 -parallel 1", "2s 4s 10.5s 100/s x1 [dnsgateway] 16 faults 1s 200ms"},
		{"-target both -faults silent,loss", "10s 20s 30s 1000/s x1 [dnsgateway dnsproxy] 2 faults 450ms 50ms"},
	} {
		o, err := parse(strings.Fields(tt.args), io.Discard)
		if err != nil {
			t.Errorf("%s: %v", tt.args, err)
			continue
		}
		got := fmt.Sprintf("%v %v %v %d/s x%d %v %d faults %v %v", o.plan.at, o.plan.until, o.plan.length, o.plan.rate,
			o.parallel, o.targets, len(o.faults), o.limits.p999, o.limits.p99)
		if got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.args, got, tt.want)
		}
	}
	for args, want := range map[string]string{
		"-faults silent,deaf":   `-faults: unknown fault "deaf"; they are dead, blackhole, `,
		"-faults silent,silent": `-faults: "silent" is there twice`,
		"-target unbound":       `-target "unbound": dnsgateway, dnsproxy or both`,
		"-until 5s":             "-at 10s, -until 5s, -for 30s: they have to follow each other",
		"-for 25s":              "-at 10s, -until 20s, -for 25s: they have to follow each other, -for more than 5s after -until",
		"-rate 1":               "-rate 1: 16 to 20000",
		"-parallel 0":           "-parallel 0: 1 or more",
		"silent":                `unknown argument "silent"`,
		"-nonsense":             "flag provided but not defined: -nonsense",
	} {
		var stderr bytes.Buffer
		if status := execute(t.Context(), strings.Fields(args), io.Discard, &stderr); status != 2 ||
			!strings.HasPrefix(stderr.String(), want) {
			t.Errorf("%s: got status %d, %q, want 2, %q", args, status, stderr.String(), want)
		}
	}
}

func TestPercentile(t *testing.T) {
	var values []time.Duration
	for i := range 1000 {
		values = append(values, time.Duration(i+1))
	}
	for _, tt := range []struct {
		of   []time.Duration
		p    float64
		want millis
	}{
		{nil, 0.5, 0}, {values[:1], 0.5, 1}, {values[:1], 0.999, 1}, {values[:2], 0.5, 1}, {values, 0.5, 500},
		{values, 0.99, 990}, {values, 0.999, 999}, {values, 1, 1000},
	} {
		if got := percentile(tt.of, tt.p); got != tt.want {
			t.Errorf("%d values, %v: got %d, want %d", len(tt.of), tt.p, got, tt.want)
		}
	}
}

// What a load has got becomes the numbers of the table.
func TestSummarize(t *testing.T) {
	p := plan{at: 2 * time.Second, until: 4 * time.Second, length: 10 * time.Second, rate: 100}
	w := newLoad(p)
	for i := range w.fates {
		took := time.Millisecond
		switch i -= w.warm; {
		case i < 0:
			took = time.Minute // does not count
		case i >= 200 && i < 300:
			took = 500 * time.Millisecond
		case i == 400:
			took = patience // too late
		}
		w.fates[i+w.warm].came.Store(int64(took) << 8)
		raw, err := w.question(i + w.warm).Pack()
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case i < 900: // before recovery
			w.reach(2, raw)
		case i < 910:
			w.reach(2, raw)
			w.reach(1, raw)
		case i < 930:
			w.reach(1, raw)
			w.reach(2, raw)
			w.reach(1, raw)
		case i < 999:
			w.reach(1, raw)
			w.reach(1, raw)
		} // and the last one reaches nobody
	}
	w.reach(1, nil)
	w.reach(1, make([]byte, 12))
	w.fates[w.warm+1].came.Store(0)
	w.fates[w.warm+2].came.Store(int64(time.Millisecond)<<8 | 2) // SERVFAIL
	w.wrong.Store(3)
	w.redials.Store(4)
	w.wokeLate(2 * time.Millisecond)
	w.wokeLate(time.Millisecond)
	got := summarize(p, w)
	want := result{Asked: 1000, Answered: 998, NotOK: 1, Wrong: 3, Redials: 4, Late: millis(2 * time.Millisecond), P50: millis(time.Millisecond),
		P99: millis(500 * time.Millisecond), P999: millis(patience), Max: millis(patience), P99Outside: millis(time.Millisecond),
		Tier1: 0.89, Both: 0.03}
	if diff := cmp.Diff(got, want); diff != "" {
		t.Errorf("(-got +want):\n%s", diff)
	}
}

func TestJudge(t *testing.T) {
	sound := func() *result {
		return &result{Asked: 1000, Answered: 1000, P999: millis(20 * time.Millisecond), P99Outside: millis(5 * time.Millisecond),
			Tier1: 1, Most: [2]int{4, 4}, Before: census{18, 12}, After: census{18, 12}}
	}
	for _, tt := range []struct {
		want   string
		change func(r *result)
	}{
		{"", func(*result) {}},
		{"", func(r *result) {
			r.P999, r.P99Outside = millis(470*time.Millisecond), millis(55*time.Millisecond)
			r.Tier1, r.After = 0.95, census{17, 11}
		}},
		{"2 unanswered", func(r *result) { r.Answered = 998 }},
		{"7 with an RCODE", func(r *result) { r.NotOK = 7 }},
		{"1 wrong answers", func(r *result) { r.Wrong = 1 }},
		{"p99.9 is 451ms above the fault-free run's", func(r *result) { r.P999 = millis(471 * time.Millisecond) }},
		{"p99 outside the first second is 51ms above", func(r *result) { r.P99Outside = millis(56 * time.Millisecond) }},
		{"94 % to tier 1 after recovery", func(r *result) { r.Tier1 = 0.9499 }},
		{"5 connections to tier 1; 6 connections to tier 2", func(r *result) { r.Most = [2]int{5, 6} }},
		{"1 goroutines more than before; 2 descriptors more than before", func(r *result) { r.After = census{19, 14} }},
	} {
		r := sound()
		tt.change(r)
		if got := strings.Join(fullLimits.judge(r, sound()), "; "); got != tt.want {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
}

// Both forms of output hold what was measured.
func TestPrint(t *testing.T) {
	results := []result{{Fault: none, Asked: 3, Answered: 3, P50: millis(1234567), Before: census{18, 12}, After: census{18, 13}},
		{Fault: "silent", Asked: 3, Answered: 2, Max: millis(patience), Tier1: 0.5, Both: 0.25, Most: [2]int{2, 1},
			Before: census{-1, 12}, After: census{-1, 12}, Reasons: []string{"1 unanswered", "50 % to tier 1 after recovery"}}}
	var b strings.Builder
	if err := printTable(&b, "dnsgateway", short, shortLimits, results); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"none         3/3       0  1.2", "18>18  12>13  ok\n", "10000   0.0   50.0%  25.0%    2+1           -  12>12  FAIL: 1 unanswered; 50 %"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
	b.Reset()
	if err := printJSON(&b, "dnsgateway", short, results); err != nil {
		t.Fatal(err)
	}
	var back struct {
		Target  string
		Results []struct {
			Fault       string
			P50         float64 `json:"p50_ms"`
			Tier1       float64 `json:"tier1_again"`
			Connections []int   `json:"most_connections"`
			Missed      []string
		}
	}
	if err := json.Unmarshal([]byte(b.String()), &back); err != nil {
		t.Fatal(err)
	}
	if r := back.Results; back.Target != "dnsgateway" || len(r) != 2 || r[0].P50 != 1.235 || r[1].Tier1 != 0.5 ||
		!slices.Equal(r[1].Connections, []int{2, 1}) || len(r[1].Missed) != 2 {
		t.Errorf("got %+v from\n%s", back, b.String())
	}
}

func TestIndex(t *testing.T) {
	for name, want := range map[string]int{"q0.load.lab.test.": 0, "q31999.load.lab.test.": 31999, "wrong.lab.test.": -1, ".": -1, "q.": -1} {
		got, ok := index(name)
		if !ok {
			got = -1
		}
		if got != want {
			t.Errorf("%s: got %d, want %d", name, got, want)
		}
	}
}

func TestConnections(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("reads /proc")
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	addr := netip.MustParseAddrPort(ln.Addr().String())
	for want := range 3 {
		if got := connections(os.Getpid(), addr); got != want {
			t.Errorf("got %d connections, want %d", got, want)
		}
		conn, err := net.Dial("tcp", addr.String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
}
