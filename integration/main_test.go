package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// program is the built command; TestMain builds it with the race detector on.
var program string

func TestMain(m *testing.M) {
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "dnsgateway-integration-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "dnsgateway")
	build := exec.Command("go", "build", "-race", "-o", program, "../cmd/dnsgateway")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "building the program:", err)
		return 1
	}
	return m.Run()
}

// need leaves the test out when a command, or a file given by its whole path, is missing, or fails it when the run requires
// all of them.
func need(t *testing.T, commands ...string) {
	t.Helper()
	for _, c := range commands {
		if _, err := exec.LookPath(c); err == nil {
			continue
		}
		if _, err := os.Stat(c); err == nil && filepath.IsAbs(c) {
			continue
		}
		if os.Getenv("INTEGRATION_REQUIRE") == "1" {
			t.Fatalf("%s is not installed", c)
		}
		t.Skipf("left out: %s is not installed", c)
	}
}

// needRoot leaves the test out for users who may not make a network namespace.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() == 0 {
		return
	}
	if os.Getenv("INTEGRATION_REQUIRE") == "1" {
		t.Fatal("needs root")
	}
	t.Skip("left out: needs root for a network namespace")
}

// process is one run of a program. Its output is kept and shown when the test fails.
type process struct {
	t    *testing.T
	name string
	cmd  *exec.Cmd
	done chan struct{}
	err  error // after done

	mu   sync.Mutex
	text bytes.Buffer
	wake chan struct{} // closed and replaced at each write
}

// Write collects standard output and standard error.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.text.Write(b)
	close(p.wake)
	p.wake = make(chan struct{})
	return len(b), nil
}

func (p *process) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.String()
}

// start runs a command until the test ends, which terminates it with SIGTERM.
func start(t *testing.T, stdin io.Reader, argv ...string) *process {
	t.Helper()
	p := &process{t: t, name: filepath.Base(argv[0]), done: make(chan struct{}), wake: make(chan struct{})}
	p.cmd = exec.Command(argv[0], argv[1:]...)
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = stdin, p, p
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		p.err = p.cmd.Wait()
	}()
	t.Cleanup(func() {
		p.stop(syscall.SIGTERM)
		if out := p.output(); t.Failed() {
			t.Logf("output of %s:\n%s", p.name, tail(out, 6000))
		}
	})
	return p
}

func tail(s string, n int) string {
	if len(s) > n {
		return "...\n" + s[len(s)-n:]
	}
	return s
}

// stop sends sig and returns the exit status. A process that is still there after 15 s is killed, and -1 returned.
func (p *process) stop(sig syscall.Signal) int {
	_ = p.cmd.Process.Signal(sig)
	select {
	case <-p.done:
	case <-time.After(15 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
		p.t.Errorf("%s did not end within 15 s of %v", p.name, sig)
		return -1
	}
	return p.cmd.ProcessState.ExitCode()
}

// await waits until the output holds text.
func (p *process) await(text string) {
	p.t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		p.mu.Lock()
		found, wake := strings.Contains(p.text.String(), text), p.wake
		p.mu.Unlock()
		if found {
			return
		}
		select {
		case <-wake:
		case <-p.done:
			if strings.Contains(p.output(), text) {
				return
			}
			p.t.Fatalf("%s ended (%v) before it said %q:\n%s", p.name, p.err, text, p.output())
		case <-timeout:
			p.t.Fatalf("%s did not say %q within 20 s:\n%s", p.name, text, p.output())
		}
	}
}

// run runs a command to its end and returns its output and exit status.
func run(t *testing.T, argv ...string) (output string, status int) {
	t.Helper()
	out, status := runCleanup(argv...)
	if status < 0 {
		t.Fatalf("%s: %s", strings.Join(argv, " "), out)
	}
	return out, status
}

// runCleanup is run for functions that run after the test; a command that cannot be started has status -1.
func runCleanup(argv ...string) (output string, status int) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return err.Error(), -1
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// startGateway runs the program with a configuration, on top of JSON logs to standard output, until it serves.
func startGateway(t *testing.T, yaml string) *process {
	t.Helper()
	p := start(t, strings.NewReader(yaml), program, "run", "-c", "-")
	p.await(`"msg":"serving"`)
	return p
}

// get fetches a URL of the admin endpoint.
func get(t *testing.T, url string) (status int, body string) {
	t.Helper()
	client := http.Client{Timeout: 10 * time.Second}
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// noErrors fails the test when the gateway logged a line at error level, or the race detector said something.
func noErrors(t *testing.T, p *process) {
	t.Helper()
	for line := range strings.SplitSeq(p.output(), "\n") {
		var entry struct{ Level string }
		if json.Unmarshal([]byte(line), &entry) == nil && entry.Level == "ERROR" {
			t.Errorf("logged at error level: %s", line)
		}
		if strings.Contains(line, "DATA RACE") {
			t.Errorf("the race detector reports:\n%s", p.output())
			return
		}
	}
}
