package lab

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"dnsgateway/gateway/certs"
)

// Files are the files that a gateway in front of a lab needs.
type Files struct {
	CA   string // the lab's CA: for the upstreams, and for the gateway's own clients
	Cert string
	Key  string
}

// WriteFiles issues a certificate for names (localhost, 127.0.0.1 and ::1 by default) and writes it, its key (mode 0600)
// and the lab's CA into dir, which has to exist. The paths it returns are absolute.
func (l *Lab) WriteFiles(dir string, names ...string) (Files, error) {
	if len(names) == 0 {
		names = []string{"localhost", "127.0.0.1", "::1"}
	}
	cert, key, err := l.ca.Issue(names)
	if err != nil {
		return Files{}, fmt.Errorf("issuing the gateway's certificate: %w", err)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return Files{}, err
	}
	f := Files{
		CA: filepath.Join(dir, "ca.crt"), Cert: filepath.Join(dir, "gateway.crt"), Key: filepath.Join(dir, "gateway.key"),
	}
	return f, errors.Join(certs.WriteFile(f.CA, l.CAPEM(), 0o644), certs.WriteFile(f.Cert, cert, 0o644),
		certs.WriteFile(f.Key, key, 0o600))
}

// Front is a gateway in front of a lab.
type Front struct {
	Host  string   // address to listen on, without brackets; 127.0.0.1 by default
	DNS   int      // UDP and TCP port; 0, here and below, means no such listener
	TLS   int      // TCP port
	HTTPS int      // TCP port, and UDP when HTTP has h3
	QUIC  int      // UDP port
	HTTP  []string // of h1, h2, h3; empty leaves it to the gateway
	Files Files    // from WriteFiles
	// Tiers are the names of servers by tier; nil makes each server of the lab a tier, in the order of its Config.
	Tiers    [][]string
	Deadline time.Duration // of the group; 0 leaves it to the gateway
	Pick     string        // of the group; "" leaves it to the gateway
	More     string        // further YAML, put at the end: whole top-level keys
}

// ConfigYAML returns the file of a gateway in front of l.
func (l *Lab) ConfigYAML(f Front) (string, error) {
	var b strings.Builder
	b.WriteString("listen:\n")
	for _, e := range f.listeners() {
		fmt.Fprintf(&b, "  - %s\n", e)
	}
	if f.Files.Cert != "" {
		fmt.Fprintf(&b, "tls: {cert: %s, key: %s}\n", strconv.Quote(f.Files.Cert), strconv.Quote(f.Files.Key))
	}
	tiers := f.Tiers
	if tiers == nil {
		for _, s := range l.servers {
			tiers = append(tiers, []string{s.name})
		}
	}
	b.WriteString("upstreams:\n  default:\n    try:\n")
	for _, tier := range tiers {
		for i, name := range tier {
			s := l.Server(name)
			if s == nil {
				return "", fmt.Errorf("the lab has no server %q", name)
			}
			lead := "      - - "
			if i > 0 {
				lead = "        - "
			}
			if s.scheme.encrypted() {
				fmt.Fprintf(&b, "%s{url: %q, ca: %s}\n", lead, s.URL(), strconv.Quote(f.Files.CA))
			} else {
				fmt.Fprintf(&b, "%s%q\n", lead, s.URL())
			}
		}
	}
	if f.Pick != "" {
		fmt.Fprintf(&b, "    pick: %s\n", f.Pick)
	}
	if f.Deadline != 0 {
		fmt.Fprintf(&b, "    deadline: %s\n", f.Deadline)
	}
	if f.More != "" {
		b.WriteString(strings.TrimRight(f.More, "\n") + "\n")
	}
	return b.String(), nil
}

func (f *Front) listeners() []string {
	host := f.Host
	if host == "" {
		host = "127.0.0.1"
	}
	at := func(port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }
	var out []string
	if f.DNS != 0 {
		out = append(out, strconv.Quote("dns://"+at(f.DNS)))
	}
	if f.TLS != 0 {
		out = append(out, strconv.Quote("tls://"+at(f.TLS)))
	}
	if f.HTTPS != 0 {
		url := strconv.Quote("https://" + at(f.HTTPS) + dohPath)
		if len(f.HTTP) > 0 {
			url = fmt.Sprintf("{url: %s, http: [%s]}", url, strings.Join(f.HTTP, ", "))
		}
		out = append(out, url)
	}
	if f.QUIC != 0 {
		out = append(out, strconv.Quote("quic://"+at(f.QUIC)))
	}
	return out
}

// The range that ports are taken from: below the ephemeral ports of all common systems, so that no client's own port
// lands on that of a server which is dead for a while.
const (
	firstPort = 20000
	lastPort  = 32767
)

// taken holds the ports that this process has been given, so that two callers never get the same one.
var taken struct {
	sync.Mutex
	ports map[int]bool
}

// FreePort returns a port that is free for TCP and UDP on the loopback addresses and that it will not return again in
// this process. Nothing keeps other programs from taking it.
func FreePort() (int, error) {
	taken.Lock()
	defer taken.Unlock()
	if taken.ports == nil {
		taken.ports = make(map[int]bool)
	}
	for range 1000 {
		port := firstPort + rand.IntN(lastPort-firstPort+1)
		if !taken.ports[port] && isFree(port) {
			taken.ports[port] = true
			return port, nil
		}
	}
	return 0, errors.New("no port is free for both TCP and UDP")
}

// FreePorts returns n ports as FreePort does.
func FreePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		port, err := FreePort()
		if err != nil {
			return nil, err
		}
		ports = append(ports, port)
	}
	return ports, nil
}

func isFree(port int) bool {
	for _, host := range []string{"127.0.0.1", "::1"} {
		if host == "::1" && !hasIPv6() {
			continue
		}
		addr := net.JoinHostPort(host, strconv.Itoa(port))
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			return false
		}
		ln.Close()
		conn, err := net.ListenPacket("udp", addr)
		if err != nil {
			return false
		}
		conn.Close()
	}
	return true
}

// hasIPv6 reports whether this machine has an IPv6 loopback address; containers often have none.
var hasIPv6 = sync.OnceValue(func() bool {
	conn, err := net.ListenPacket("udp", "[::1]:0")
	if err != nil {
		return false
	}
	conn.Close()
	return true
})
