package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// TestStopFinishesWhatIsInFlight sends SIGTERM while a slow question is under way over every transport: all get their
// answers, and the exit status is 0.
func TestStopFinishesWhatIsInFlight(t *testing.T) {
	arrived := make(chan struct{}, 16)
	s := newSetup(t, yaml{cache: "off"})
	var asked sync.WaitGroup
	for _, tr := range transports {
		asked.Go(func() {
			c := tr.dial(t, s)
			if c == nil {
				arrived <- struct{}{}
				return
			}
			defer c.close()
			// A first answer shows that the connection stands; then the question that takes a second.
			ctx, cancel := contextWithDeadline(t)
			defer cancel()
			if _, err := c.ask(ctx, new(dns.Msg).SetQuestion(tr.name+".load.lab.test.", dns.TypeA)); err != nil {
				t.Errorf("%s: %v", tr.name, err)
			}
			arrived <- struct{}{}
			resp, err := c.ask(ctx, new(dns.Msg).SetQuestion(tr.name+".slow.lab.test.", dns.TypeA))
			if err != nil || resp.Rcode == dns.RcodeServerFailure {
				t.Errorf("%s: no answer to what was in flight at SIGTERM: %v %v", tr.name, resp, err)
			}
		})
	}
	before := s.lab.Server("tier1").Queries()
	for range transports {
		<-arrived
	}
	awaitCount(t, func() uint64 { return s.lab.Server("tier1").Queries() - before }, uint64(2*len(transports)))
	if status := s.gateway.stop(syscall.SIGTERM); status != 0 {
		t.Errorf("exit status after SIGTERM: got %d, want 0", status)
	}
	asked.Wait()
	noErrors(t, s.gateway)
	if out := s.gateway.output(); strings.Contains(out, "cut off") {
		t.Errorf("queries were cut off:\n%s", out)
	}
}

// awaitCount waits until f returns at least want.
func awaitCount(t *testing.T, f func() uint64, want uint64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	for f() < want {
		if ctx.Err() != nil {
			t.Fatalf("got to %d of %d", f(), want)
		}
		// Asking again is the only way to see a counter move.
		<-time.After(5 * time.Millisecond)
	}
}

// TestHangup sends SIGHUP: the gateway goes on, and its log file is opened again.
func TestHangup(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "gateway.log")
	addr := freePort(t)
	admin := freePort(t)
	p := start(t, strings.NewReader(fmt.Sprintf(
		"listen: [dns://%s]\nadmin: {listen: %s}\nlog: {output: file:%s}\n", addr, admin, file)), program, "run", "-c", "-")
	awaitTCP(t, addr)
	awaitTCP(t, admin)
	if err := os.Rename(file, file+".1"); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	awaitCount(t, func() uint64 {
		b, err := os.ReadFile(file)
		if err != nil {
			return 0
		}
		return uint64(strings.Count(string(b), "SIGHUP: the log goes on"))
	}, 1)
	if status, body := get(t, "http://"+admin+"/livez"); status != http.StatusOK {
		t.Errorf("/livez after SIGHUP: got %d %s", status, body)
	}
	if status := p.stop(syscall.SIGTERM); status != 0 {
		t.Errorf("exit status: got %d, want 0", status)
	}
}

// TestReadiness breaks every upstream and heals them: /readyz says so, with reasons, and the health command follows.
func TestReadiness(t *testing.T) {
	s := newSetup(t, yaml{cache: "off"})
	health := func() int {
		_, status := run(t, program, "health", "--url", "http://"+s.admin)
		return status
	}
	ready := func() (status int, body struct {
		Ready   bool
		Reasons []string
		Groups  []struct {
			Name    string
			Servers []struct{ URL, State, Error string }
		}
	}) {
		status, text := get(t, "http://"+s.admin+"/readyz")
		if err := json.Unmarshal([]byte(text), &body); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		return status, body
	}
	if status, body := ready(); status != http.StatusOK || !body.Ready {
		t.Fatalf("at the start: got %d %+v, want ready", status, body)
	}
	if status := health(); status != 0 {
		t.Errorf("health: got exit status %d, want 0", status)
	}
	s.faultAll(t, "dead")
	for i := range 20 {
		argv := []string{"query", "--short", "@dns://" + s.plain, fmt.Sprintf("r%d.load.lab.test", i)}
		run(t, append([]string{program}, argv...)...)
		if status, _ := ready(); status == http.StatusServiceUnavailable {
			break
		}
	}
	status, body := ready()
	if status != http.StatusServiceUnavailable || body.Ready || len(body.Reasons) == 0 {
		t.Errorf("with all upstreams dead: got %d %+v, want 503 with a reason", status, body)
	}
	for _, g := range body.Groups {
		for _, server := range g.Servers {
			if server.State != "failing" || server.Error == "" {
				t.Errorf("server %s: got state %q, error %q", server.URL, server.State, server.Error)
			}
		}
	}
	if status := health(); status != 1 {
		t.Errorf("health with all upstreams dead: got exit status %d, want 1", status)
	}
	if status, _ := get(t, "http://"+s.admin+"/livez"); status != http.StatusOK {
		t.Errorf("/livez with all upstreams dead: got %d", status)
	}
	s.faultAll(t, "ok")
	awaitCount(t, func() uint64 {
		if status, _ := ready(); status == http.StatusOK {
			return 1
		}
		return 0
	}, 1)
	noErrors(t, s.gateway)
}

// TestNoUpstream asks when no server can be reached: SERVFAIL with an Extended DNS Error, within the deadline.
func TestNoUpstream(t *testing.T) {
	s := newSetup(t, yaml{cache: "off"})
	for _, fault := range []string{"dead", "silent"} {
		s.faultAll(t, fault)
		ctx, cancel := contextWithDeadline(t)
		c := dialClassic(t, s, "udp", s.plain)
		m := new(dns.Msg).SetQuestion(fault+".load.lab.test.", dns.TypeA)
		m.SetEdns0(1232, false)
		resp, err := c.ask(ctx, m)
		c.close()
		cancel()
		if err != nil {
			t.Errorf("%s: %v", fault, err)
			continue
		}
		if resp.Rcode != dns.RcodeServerFailure {
			t.Errorf("%s: got\n%v\nwant SERVFAIL", fault, resp)
		}
		if opt := resp.IsEdns0(); opt == nil || len(opt.Option) != 1 || opt.Option[0].Option() != dns.EDNS0EDE {
			t.Errorf("%s: no Extended DNS Error in\n%v", fault, resp)
		} else if code := opt.Option[0].(*dns.EDNS0_EDE).InfoCode; code != dns.ExtendedErrorCodeNoReachableAuthority && code != dns.ExtendedErrorCodeNetworkError {
			t.Errorf("%s: Extended DNS Error: got %d, want 22 or 23", fault, code)
		}
	}
	noErrors(t, s.gateway)
}

func (s *setup) faultAll(t *testing.T, text string) {
	t.Helper()
	for _, server := range s.lab.Servers() {
		s.faultOf(t, server.Name(), text)
	}
}

// TestBindErrors starts gateways whose addresses cannot be had: exit status 1, the line of the file, and what to do.
func TestBindErrors(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	file := filepath.Join(t.TempDir(), "config.yaml")
	write(t, file, fmt.Sprintf("listen:\n  - dns://%s\n  - dns://192.0.2.1:53\nadmin: off\n", taken.Addr()))
	out, status := run(t, program, "run", "-c", file)
	if status != 1 {
		t.Errorf("exit status: got %d, want 1", status)
	}
	for _, want := range []string{
		file + ":2:5: ", "    2 |   - dns://" + taken.Addr().String(), "address already in use", "ss -lptun",
		file + ":3:5: ", "cannot assign requested address", "ip address",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

// TestSecondSignal sends SIGTERM twice while a question waits for silent upstreams: the second one ends the program at
// once.
func TestSecondSignal(t *testing.T) {
	s := newSetup(t, yaml{cache: "off"})
	s.faultAll(t, "silent")
	c := dialClassic(t, s, "tcp", s.plain).(*classic)
	defer c.close()
	if err := c.conn.WriteMsg(new(dns.Msg).SetQuestion("a.load.lab.test.", dns.TypeA)); err != nil {
		t.Fatal(err)
	}
	awaitCount(t, func() uint64 { return s.lab.Server("tier1").Queries() }, 1)
	begin := time.Now()
	if err := s.gateway.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.gateway.await(`"msg":"stopping"`)
	if status := s.gateway.stop(syscall.SIGTERM); status == 0 {
		t.Error("exit status: got 0, want that of a signal")
	}
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("ended %v after the first signal, want at once after the second", took)
	}
}

// TestClosedPipe takes the reader of the log away, as a log shipper that is started again does: the gateway goes on.
func TestClosedPipe(t *testing.T) {
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	addr := freePort(t)
	cmd := exec.Command(program, "run", "-c", "-")
	cmd.Stdin = strings.NewReader("listen: [dns://" + addr + "]\nadmin: off\nlog: json\n")
	cmd.Stdout, cmd.Stderr = writer, writer
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = writer.Close()
	awaitTCP(t, addr)
	_ = reader.Close()
	for range 3 {
		if err := cmd.Process.Signal(syscall.SIGHUP); err != nil { // each writes a line
			t.Fatal(err)
		}
		awaitTCP(t, addr)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after the reader of its log went away: %v", err)
	}
}
