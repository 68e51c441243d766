package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"dnsgateway/gateway/lab"
)

// output is a buffer that one goroutine reads while others write.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// wait waits until re matches what was written and returns the first group, or the match.
func (o *output) wait(t *testing.T, re string) string {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if m := regexp.MustCompile(re).FindStringSubmatch(o.String()); m != nil {
			return m[len(m)-1]
		}
	}
	t.Fatalf("%q did not come in\n%s", re, o.String())
	return ""
}

// labBase returns a value for --ports whose ports are free.
func labBase(t *testing.T) int {
	t.Helper()
	for range 100 {
		port, err := lab.FreePort()
		if err != nil {
			t.Fatal(err)
		}
		base, free := port-labTLS, true
		for _, p := range []int{labDNS, labAdmin, labHTTPS} {
			addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(base+p))
			ln, err := net.Listen("tcp", addr)
			conn, errUDP := net.ListenPacket("udp", addr)
			free = free && err == nil && errUDP == nil
			if err == nil {
				ln.Close()
			}
			if errUDP == nil {
				conn.Close()
			}
		}
		if free {
			return base
		}
	}
	t.Fatal("no free ports")
	return 0
}

// runningLab is a lab command that runs in this process.
type runningLab struct {
	out   output
	errs  output
	stdin io.WriteCloser
	stop  func() int // ends it and returns its exit status
}

func startLabCommand(t *testing.T, args ...string) *runningLab {
	t.Helper()
	r := new(runningLab)
	in, stdin := io.Pipe()
	r.stdin = stdin
	root := newRootCommand()
	root.SetIn(in)
	root.SetOut(&r.out)
	root.SetErr(&r.errs)
	ctx, cancel := context.WithCancel(t.Context())
	code := make(chan int, 1)
	go func() { code <- execute(ctx, root, append([]string{"lab"}, args...)) }()
	r.stop = sync.OnceValue(func() int {
		cancel()
		stdin.Close()
		select {
		case c := <-code:
			return c
		case <-time.After(20 * time.Second):
			t.Error("the lab does not end")
			return -1
		}
	})
	t.Cleanup(func() { r.stop() })
	return r
}

// askPlain asks the gateway in a lab over UDP.
func askPlain(t *testing.T, base int, name string) *dns.Msg {
	t.Helper()
	c := dns.Client{Timeout: 10 * time.Second}
	resp, _, err := c.Exchange(new(dns.Msg).SetQuestion(name, dns.TypeA), fmt.Sprintf("127.0.0.1:%d", base+labDNS))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return resp
}

// Faults that are typed change the upstreams while the gateway runs; the end of the input does not end the lab.
func TestLabTakesFaultsWhileItRuns(t *testing.T) {
	base := labBase(t)
	r := startLabCommand(t, "--ports", strconv.Itoa(base), "--fault", "tier1=servfail")
	file := r.out.wait(t, `Its settings are in (\S+gateway.yaml),`)
	r.out.wait(t, `tier1 +tls://127\.0\.0\.1:\d+#tier1\.lab\.test +servfail\n`)
	r.out.wait(t, "Stop: Ctrl-C\n")
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
	if resp := askPlain(t, base, "n1.load.lab.test."); resp.Rcode != dns.RcodeSuccess || len(resp.Answer) != 1 {
		t.Errorf("tier 1 is broken: got %v", resp)
	}
	io.WriteString(r.stdin, "\n")
	r.out.wait(t, `\ntier1 servfail, [1-9]\d* queries\ntier2 ok, [1-9]\d* queries\ntier3 ok, 0 queries\n`)
	io.WriteString(r.stdin, " tier2=dead \ntier9=dead\ntier1=nonsense\ntier1\n")
	r.out.wait(t, `\ntier2 dead, `)
	r.out.wait(t, `\nthere is no server "tier9"; the servers are tier1, tier2, tier3\n`)
	r.out.wait(t, `\nunknown fault "nonsense"; the faults are ok, dead, `)
	r.out.wait(t, `\nfault "tier1" is not of the form tier1=dead\n`)
	if resp := askPlain(t, base, "n2.load.lab.test."); resp.Rcode != dns.RcodeSuccess {
		t.Errorf("tiers 1 and 2 are broken: got %v", resp)
	}
	io.WriteString(r.stdin, "tier1=ok\n")
	r.out.wait(t, `\ntier1 ok, `)
	r.stdin.Close()
	if resp := askPlain(t, base, "n3.load.lab.test."); resp.Rcode != dns.RcodeSuccess {
		t.Errorf("after the end of the input: got %v", resp)
	}
	if got := r.stop(); got != 0 {
		t.Errorf("got status %d, %s, want 0", got, r.errs.String())
	}
	if _, err := os.Stat(filepath.Dir(file)); !os.IsNotExist(err) {
		t.Errorf("the temporary folder is left: %v", err)
	}
}

// Every line of the page works when it is pasted. Lines whose program is not installed here are left out.
func TestLabPageWorksWhenPasted(t *testing.T) {
	if testing.Short() {
		t.Skip("runs many programs")
	}
	dir := filepath.Join(t.TempDir(), "a folder") // has to be quoted
	r := startLabCommand(t, "--ports", strconv.Itoa(labBase(t)), "--dir", dir)
	r.out.wait(t, "Stop: Ctrl-C\n")
	_, page, _ := strings.Cut(r.out.String(), "Plain DNS\n")
	want := []struct{ line, output string }{
		{"dig .* www", `192\.0\.2\.10`},
		{"dig .* big", `a{250}`},
		{"dig .* svc", `h2,h3`},
		{"dig .*wild", `192\.0\.2\.40`},
		{"dig .* nxdomain", `NXDOMAIN`},
		{"dig .* slow", `192\.0\.2\.60`},
		{"dig .* ede", `lab: this name is broken on purpose`},
		{`kdig .* \+tls-hostname=localhost www`, `TLS session(?s:.*)192\.0\.2\.10`},
		{`kdig .* \+https`, `HTTP/2(?s:.*)192\.0\.2\.10`},
		{`kdig .* \+quic`, `QUIC session(?s:.*)192\.0\.2\.10`},
		{`curl .*\?dns=`, `w   w   w(?s:.*)300  \\0 002  \\n`},
		{`curl .*--data-binary`, `w   w   w(?s:.*)300  \\0 002  \\n`},
		{`curl .*\?name=`, `"data":"192\.0\.2\.10"`},
		{`curl .*--doh-url`, `This is tier2\.lab\.test\.`},
		{` query `, `192\.0\.2\.10`},
		{`curl .*readyz`, `"ready": true`},
		{`curl .*metrics`, `dnsgateway_queries_total`},
	}
	lines := 0
	for line := range strings.Lines(page) {
		line, ok := strings.CutPrefix(strings.TrimRight(line, "\n"), "  ")
		if !ok {
			continue
		}
		lines++
		t.Run(line, func(t *testing.T) {
			for _, w := range want {
				if regexp.MustCompile(w.line).MatchString(line) {
					if got := paste(t, line); !regexp.MustCompile(w.output).MatchString(got) {
						t.Errorf("got no %s in\n%s", w.output, got)
					}
					return
				}
			}
			t.Error("the test does not know what this line shows")
		})
	}
	if lines != len(want) {
		t.Errorf("got %d lines, want %d", lines, len(want))
	}
	if got := r.stop(); got != 0 {
		t.Errorf("got status %d, %s, want 0", got, r.errs.String())
	}
	if _, err := os.Stat(filepath.Join(dir, "ca.crt")); err != nil {
		t.Errorf("the folder that was named is not kept: %v", err)
	}
}

// paste runs line in a shell and returns what it prints.
func paste(t *testing.T, line string) string {
	t.Helper()
	for _, program := range []string{"dig", "kdig", "curl", "base64", "od"} {
		if _, err := exec.LookPath(program); err != nil && regexp.MustCompile(`\b`+program+`\b`).MatchString(line) {
			t.Skip(err)
		}
	}
	if strings.Contains(line, "+quic") {
		help, _ := exec.Command("kdig", "-h").CombinedOutput()
		if !bytes.Contains(help, []byte("quic")) {
			t.Skip("this kdig has no QUIC")
		}
	}
	if program, args, ok := strings.Cut(line, " query "); ok { // that program is this test: run it in here
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		if program != shellWord(self) {
			t.Errorf("got program %s, want %s", program, shellWord(self))
		}
		fields, err := exec.Command("sh", "-c", `for a in `+args+`; do printf '%s\n' "$a"; done`).Output()
		if err != nil {
			t.Fatal(err)
		}
		out, stderr, _ := runCommand(t, append([]string{"query"}, strings.Split(strings.TrimSpace(string(fields)), "\n")...)...)
		return out + stderr
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Errorf("%v", err)
	}
	return string(out)
}

func TestLabReportsMistakes(t *testing.T) {
	base := labBase(t)
	taken, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", base+labTLS))
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"fault without a server", []string{"--fault", "dead"}, 2, `fault "dead" is not of the form tier1=dead`},
		{"unknown server", []string{"--fault", "tier4=dead"}, 2, `there is no server "tier4"; the servers are tier1, tier2, tier3`},
		{"unknown fault", []string{"--fault", "tier1=ill"}, 2, `unknown fault "ill"; the faults are ok, dead, silent, `},
		{"ports too high", []string{"--ports", "64683"}, 2, "--ports 64683 is not between 0 and 64682"},
		{"argument", []string{"tier1=dead"}, 2, "tier1=dead"},
		{"folder is a file", []string{"--dir", file}, 1, "file"},
		{"port taken", []string{"--ports", strconv.Itoa(base)}, 1, "other ports: dnsgateway lab --ports 18000"},
		{"port taken, named", []string{"--ports", strconv.Itoa(base)}, 1, strconv.Itoa(base + labTLS)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, stderr, code := runCommand(t, append([]string{"lab"}, tt.args...)...)
			if code != tt.code || !strings.Contains(stderr, tt.want) {
				t.Errorf("got status %d, %q, want %d, %q", code, stderr, tt.code, tt.want)
			}
		})
	}
}
