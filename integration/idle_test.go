//go:build linux

package integration

import (
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

const (
	idleConns = 10000 // what a listener takes by default
	// What an idle connection may add to the resident memory of the program. Measured: 0.9 KB and 8.7 KB.
	idleTCP = 2 << 10
	idleDoT = 12 << 10
)

// TestIdleConnections opens 10,000 connections over TCP, and then over DoT, has each ask one question, and looks how much
// larger the program has become. The race detector multiplies memory, so the program is built without it.
func TestIdleConnections(t *testing.T) {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	if files.Max < idleConns+1000 {
		if os.Getenv("INTEGRATION_REQUIRE") == "1" {
			t.Fatalf("a process may have %d files open", files.Max)
		}
		t.Skipf("left out: a process may have %d files open", files.Max)
	}
	plain := filepath.Join(t.TempDir(), "dnsgateway")
	if out, err := exec.Command("go", "build", "-o", plain, "../cmd/dnsgateway").CombinedOutput(); err != nil {
		t.Fatalf("building the program: %v\n%s", err, out)
	}
	for _, tt := range []struct {
		name string
		most int
	}{{"tcp", idleTCP}, {"dot", idleDoT}} {
		t.Run(tt.name, func(t *testing.T) {
			s := new(setup)
			s.prepare(t)
			config := s.config(yaml{more: "limits: {tcp_idle: 10m}"})
			s.gateway = start(t, strings.NewReader(config), plain, "run", "-c", "-")
			s.gateway.await(`"msg":"serving"`)
			dial := s.dialer(tt.name == "dot")
			warm := open(t, dial, 200)
			for _, c := range warm {
				_ = c.Close()
			}
			before := resident(t, s.gateway)
			for _, c := range open(t, dial, idleConns-len(warm)) {
				defer c.Close()
			}
			each := (resident(t, s.gateway) - before) / (idleConns - len(warm))
			t.Logf("an idle connection costs %d octets", each)
			if each > tt.most {
				t.Errorf("an idle connection costs %d octets, want at most %d", each, tt.most)
			}
			noErrors(t, s.gateway)
		})
	}
}

// dialer returns a function that opens connection i, which comes from one of many addresses, and asks over it. What it
// returns is the socket; of TLS the client keeps nothing.
func (s *setup) dialer(secure bool) func(i int) (net.Conn, error) {
	addr, cfg := s.plain, s.tls("dot")
	if secure {
		addr = s.dot
	}
	question, err := new(dns.Msg).SetQuestion("idle.load.lab.test.", dns.TypeA).Pack()
	if err != nil {
		panic(err)
	}
	framed := append([]byte{0, byte(len(question))}, question...)
	return func(i int) (net.Conn, error) {
		from := &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+i%100))}
		nc, err := (&net.Dialer{LocalAddr: from, Timeout: deadline}).Dial("tcp", addr)
		if err != nil {
			return nil, err
		}
		_ = nc.SetDeadline(time.Now().Add(deadline))
		c := nc
		if secure {
			c = tls.Client(nc, cfg)
		}
		if _, err := c.Write(framed); err != nil {
			return nil, err
		}
		answer := make([]byte, 512)
		if _, err := c.Read(answer); err != nil {
			return nil, err
		}
		return nc, nil
	}
}

// open opens n connections, some at once.
func open(t *testing.T, dial func(i int) (net.Conn, error), n int) []net.Conn {
	t.Helper()
	conns, errs := make([]net.Conn, n), make([]error, n)
	var some sync.WaitGroup
	const atOnce = 8
	for k := range atOnce {
		some.Go(func() {
			for i := k; i < n; i += atOnce {
				if conns[i], errs[i] = dial(i); errs[i] != nil {
					return
				}
			}
		})
	}
	some.Wait()
	for i, err := range errs {
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
	}
	return conns
}

// resident returns the resident memory of p in octets.
func resident(t *testing.T, p *process) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(b), "VmRSS:")
	kB, err := strconv.Atoi(strings.Fields(after)[0])
	if err != nil {
		t.Fatal(err)
	}
	return kB << 10
}
