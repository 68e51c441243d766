package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
)

// netns is a network namespace with nothing but loopback: every port is free there, and no packet leaves.
type netns string

var namespaces atomic.Int64

func newNetns(t *testing.T) netns {
	t.Helper()
	needRoot(t)
	need(t, "ip")
	ns := netns(fmt.Sprintf("dnsgateway-%d-%d", os.Getpid(), namespaces.Add(1)))
	if out, status := run(t, "ip", "netns", "add", string(ns)); status != 0 {
		if os.Getenv("INTEGRATION_REQUIRE") == "1" {
			t.Fatalf("making a network namespace: %s", out)
		}
		t.Skipf("left out: this machine makes no network namespace: %s", out)
	}
	t.Cleanup(func() {
		if out, status := runCleanup("ip", "netns", "delete", string(ns)); status != 0 {
			t.Errorf("deleting the network namespace: %s", out)
		}
	})
	if out, status := run(t, ns.argv("ip", "link", "set", "lo", "up")...); status != 0 {
		t.Fatalf("bringing loopback up: %s", out)
	}
	return ns
}

func (ns netns) argv(argv ...string) []string {
	return append([]string{"ip", "netns", "exec", string(ns)}, argv...)
}

// shell returns what runs line with the folder dir as its working directory.
func (ns netns) shell(dir, line string) []string {
	return ns.argv("sh", "-ec", "cd "+dir+"\n"+line)
}

// blocks returns the fenced code blocks of a language in the README.
func blocks(t *testing.T, language string) []string {
	t.Helper()
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, m := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllStringSubmatch(string(text), -1) {
		out = append(out, m[1])
	}
	if len(out) == 0 {
		t.Fatalf("README.md has no %s block", language)
	}
	return out
}

// TestReadme runs every command of the README in the order in which it stands, in a network namespace of its own with
// the lab, and checks every YAML block. A block ends the lab or gateway that runs from a block before when it starts one
// itself.
func TestReadme(t *testing.T) {
	ns := newNetns(t)
	need(t, "dig", "kdig", "curl")
	dir := t.TempDir()
	if err := os.Symlink(program, filepath.Join(dir, "dnsgateway")); err != nil {
		t.Fatal(err)
	}
	for i, text := range blocks(t, "yaml") {
		write(t, filepath.Join(dir, fmt.Sprintf("readme%d.yaml", i+1)), text)
	}
	write(t, filepath.Join(dir, "config.yaml"), blocks(t, "yaml")[0])
	var running *process
	launch := func(line, ready string) {
		if running != nil {
			running.stop(15)
		}
		running = start(t, nil, ns.shell(dir, "exec "+line)...)
		running.await(ready)
	}
	for _, block := range blocks(t, "sh") {
		for line := range strings.SplitSeq(strings.ReplaceAll(block, "\\\n", ""), "\n") {
			line, _, _ = strings.Cut(line, "   #")
			switch line = strings.TrimSpace(line); {
			case line == "":
			case line == "./integration/test":
				// It is what runs this test.
			case strings.HasPrefix(line, "go build"), strings.HasPrefix(line, "docker"), strings.HasPrefix(line, "mkdir"):
				// The program was built by TestMain; TestDocker builds and runs the image.
			case strings.HasPrefix(line, "go run ./cmd/dnsgateway"):
				launch("./dnsgateway"+strings.TrimPrefix(line, "go run ./cmd/dnsgateway"), `"msg":"serving"`)
			case strings.HasPrefix(line, "./dnsgateway run"):
				launch(line, `"msg":"serving"`)
			case strings.HasPrefix(line, "./dnsgateway lab"):
				launch(line, "Stop: Ctrl-C")
			default:
				out, status := run(t, ns.shell(dir, line)...)
				if status != 0 || strings.Contains(line, "lab.test") && !regexp.MustCompile(`192\.0\.2\.|aaaa`).MatchString(out) {
					t.Errorf("%s\nexit status %d\n%s", line, status, out)
				}
			}
		}
	}
	for i := range blocks(t, "yaml") {
		line := fmt.Sprintf("./dnsgateway check -c readme%d.yaml", i+1)
		if out, status := run(t, ns.shell(dir, line)...); status != 0 {
			t.Errorf("%s: exit status %d\n%s", line, status, out)
		}
	}
}

// TestLabLines pastes every line that `dnsgateway lab` prints.
func TestLabLines(t *testing.T) {
	ns := newNetns(t)
	need(t, "dig", "kdig", "curl")
	dir := t.TempDir()
	p := start(t, nil, ns.argv(program, "lab", "--dir", filepath.Join(dir, "lab"))...)
	p.await("Stop: Ctrl-C")
	lines := regexp.MustCompile(`(?m)^  ((?:dig|kdig|curl|echo|`+regexp.QuoteMeta(program)+`) .*)$`).FindAllStringSubmatch(p.output(), -1)
	if len(lines) < 10 {
		t.Fatalf("the lab printed %d lines to paste:\n%s", len(lines), p.output())
	}
	for _, l := range lines {
		out, status := run(t, ns.shell(dir, l[1])...)
		if status != 0 || len(strings.TrimSpace(out)) == 0 || strings.Contains(out, "status: SERVFAIL") && !strings.Contains(l[1], "ede.") {
			t.Errorf("%s\nexit status %d\n%s", l[1], status, out)
		}
	}
	if status := p.stop(15); status != 0 {
		t.Errorf("exit status of the lab: got %d, want 0", status)
	}
}

// TestLabFaults breaks the lab's first upstream from the start and by typing; the answers go on.
func TestLabFaults(t *testing.T) {
	ns := newNetns(t)
	need(t, "dig")
	for _, fault := range []string{"dead", "silent", "slow:2s", "servfail", "badcert", "garbage", "flap"} {
		stdin, typed, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		p := start(t, stdin, ns.argv(program, "lab", "--fault", "tier1="+fault)...)
		p.await("Stop: Ctrl-C")
		for i, line := range []string{"", "tier1=ok", "tier2=dead", "tier1=" + fault} {
			if line != "" {
				fmt.Fprintln(typed, line)
				p.await(strings.ReplaceAll(line, "=", "\t")[:5])
			}
			out, status := run(t, ns.argv("dig", "@127.0.0.1", "-p", "8053", "+tries=1", "+timeout=4", "+short",
				fmt.Sprintf("f%d.load.lab.test", i))...)
			if status != 0 || strings.TrimSpace(out) == "" {
				t.Errorf("%s, then %q: exit status %d\n%s", fault, line, status, out)
			}
		}
		_ = typed.Close()
		_ = stdin.Close()
		if status := p.stop(15); status != 0 {
			t.Errorf("%s: exit status of the lab: got %d, want 0", fault, status)
		}
	}
}

// TestBuiltIn runs the program without a file where nobody answers: it says what it does, and a question gets SERVFAIL
// with the reason within the deadline.
func TestBuiltIn(t *testing.T) {
	ns := newNetns(t)
	need(t, "dig")
	p := start(t, nil, ns.argv(program)...)
	p.await(`"msg":"serving"`)
	for _, tcp := range []string{"+notcp", "+tcp"} {
		out, _ := run(t, ns.argv("dig", tcp, "@127.0.0.1", "-p", "8053", "+tries=1", "+timeout=4", "example.com")...)
		if !strings.Contains(out, "status: SERVFAIL") || !regexp.MustCompile(`EDE: 2[23] `).MatchString(out) {
			t.Errorf("%s: want SERVFAIL with EDE 22 or 23, got\n%s", tcp, out)
		}
	}
	out, status := run(t, ns.argv(program, "health")...)
	if status != 0 && status != 1 {
		t.Errorf("health: exit status %d\n%s", status, out)
	}
	if status := p.stop(15); status != 0 {
		t.Errorf("exit status: got %d, want 0", status)
	}
	noErrors(t, p)
}
