package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ameshkov/dnsstamps"

	"dnsgateway/gateway/lab"
	"dnsgateway/integration/programs"
)

// target is a program under test.
type target interface {
	name() string
	judged() bool // whether the criteria bind it
	// command returns the command line that serves c.
	command(c *course) (argv, env []string, err error)
}

// course is what a target needs to know of a run.
type course struct {
	tier1, tier2 *lab.Server
	files        lab.Files
	dir          string // of the run
	udp, dot     netip.AddrPort
	admin        netip.AddrPort // unused by targets without one
	showConfig   bool
}

// newTarget builds the program called name, unless o names a built one.
func newTarget(ctx context.Context, name string, o *options, dir string) (target, error) {
	switch name {
	case "dnsgateway":
		t := dnsgateway{path: o.gateway, hedge: o.hedge}
		if t.path == "" {
			t.path = filepath.Join(dir, "dnsgateway")
			if err := programs.Gateway(ctx, t.path); err != nil {
				return nil, err
			}
		}
		return t, nil
	default:
		t := dnsproxy{path: o.dnsproxy}
		if t.path == "" {
			t.path = filepath.Join(dir, "dnsproxy")
			if err := programs.Dnsproxy(ctx, t.path); err != nil {
				return nil, err
			}
		}
		return t, nil
	}
}

// dnsgateway is our program.
type dnsgateway struct {
	path  string
	hedge string
}

func (dnsgateway) name() string { return "dnsgateway" }
func (dnsgateway) judged() bool { return true }

func (t dnsgateway) command(c *course) (argv, env []string, err error) {
	text := t.config(c)
	if c.showConfig {
		fmt.Fprint(os.Stderr, text)
	}
	file := filepath.Join(c.dir, "config.yaml")
	return []string{t.path, "run", "-c", file}, nil, os.WriteFile(file, []byte(text), 0o600)
}

func (t dnsgateway) config(c *course) string {
	var b strings.Builder
	fmt.Fprintf(&b, `listen: ["udp://%s", "tls://%s"]
tls: {cert: %q, key: %q}
upstreams:
  default:
    try:
      - [{url: %q, ca: %q}]
      - [{url: %q, ca: %q}]
`, c.udp, c.dot, c.files.Cert, c.files.Key, c.tier1.URL(), c.files.CA, c.tier2.URL(), c.files.CA)
	if t.hedge != "" {
		fmt.Fprintf(&b, "    hedge: %s\n", t.hedge)
	}
	// A client of the load has more questions open than a person when upstreams are slow.
	fmt.Fprintf(&b, `cache: off
access: [any]
limits: {per_client: off, tcp_pipeline: 10000}
log: {level: info, format: json}
admin: %q
`, c.admin)
	return b.String()
}

// dnsproxy is the command of the framework that we build on, with its own defaults.
type dnsproxy struct{ path string }

func (dnsproxy) name() string { return "dnsproxy" }
func (dnsproxy) judged() bool { return false }

func (t dnsproxy) command(c *course) (argv, env []string, err error) {
	// The lab's names are in no DNS that the program knows; a stamp carries name and address. It takes the port from the name.
	stamp := func(s *lab.Server) string {
		return (&dnsstamps.ServerStamp{
			Proto: dnsstamps.StampProtoTypeTLS, ServerAddrStr: s.Addr().String(), ProviderName: s.HostName() + ":" + port(s.Addr()),
		}).String()
	}
	argv = []string{t.path, "--listen=" + c.udp.Addr().String(), "--port=" + port(c.udp), "--tls-port=" + port(c.dot),
		"--tls-crt=" + c.files.Cert, "--tls-key=" + c.files.Key,
		"--upstream=" + stamp(c.tier1), "--fallback=" + stamp(c.tier2)}
	return argv, []string{"SSL_CERT_FILE=" + c.files.CA, "SSL_CERT_DIR=" + c.dir}, nil
}

func port(a netip.AddrPort) string { return strconv.Itoa(int(a.Port())) }

// process is a running target.
type process struct {
	cmd  *exec.Cmd
	out  bytes.Buffer // until done, its own
	done chan struct{}
	err  error // after done
}

// startProcess starts argv and waits until it listens on addr.
func startProcess(ctx context.Context, argv, env []string, addr netip.AddrPort) (*process, error) {
	p := &process{cmd: exec.Command(argv[0], argv[1:]...), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.done)
		p.err = p.cmd.Wait()
	}()
	for end := time.Now().Add(20 * time.Second); ; {
		conn, err := net.DialTimeout("tcp", addr.String(), time.Second)
		if err == nil {
			conn.Close()
			return p, nil
		}
		select {
		case <-p.done:
			return nil, fmt.Errorf("%s ended: %w\n%s", argv[0], p.err, tail(p.out.String()))
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), p.stop())
		case <-time.After(20 * time.Millisecond): // not every target can say that it is ready
		}
		if time.Now().After(end) {
			return nil, errors.Join(fmt.Errorf("nothing listens on %s: %w", addr, err), p.stop())
		}
	}
}

// stop ends the process and returns what was wrong with it: that it had ended before, or ends with another status than 0.
func (p *process) stop() error {
	early := false
	select {
	case <-p.done:
		early = true
	default:
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(15 * time.Second):
		p.cmd.Process.Kill()
		<-p.done
		return fmt.Errorf("it did not end within 15 s of SIGTERM:\n%s", tail(p.out.String()))
	}
	if early || p.err != nil {
		return fmt.Errorf("it ended by itself or ill: %v\n%s", p.err, tail(p.out.String()))
	}
	return nil
}

func tail(s string) string {
	const most = 4000
	if len(s) > most {
		return "...\n" + s[len(s)-most:]
	}
	return s
}
