package integration

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

// TestUnbound has Unbound forward to the gateway over DoT, with the gateway's certificate checked.
func TestUnbound(t *testing.T) {
	need(t, "unbound", "dig")
	s := newSetup(t, yaml{})
	listen := freePort(t)
	conf := s.file("unbound.conf")
	write(t, conf, fmt.Sprintf(`
server:
    directory: %[1]q
    chroot: ""
    username: ""
    pidfile: ""
    use-syslog: no
    logfile: ""
    num-threads: 1
    interface: 127.0.0.1@%[2]s
    do-not-query-localhost: no
    tls-cert-bundle: %[3]q
    module-config: "iterator"
    local-zone: "test." nodefault
    trust-anchor-file: ""
forward-zone:
    name: "."
    forward-tls-upstream: yes
    forward-addr: 127.0.0.1@%[4]s#localhost
remote-control:
    control-enable: no
`, s.dir, port(listen), s.file("ca.crt"), port(s.dot)))
	start(t, nil, "unbound", "-d", "-c", conf)
	askThrough(t, listen)
	noErrors(t, s.gateway)
}

// TestStubby has stubby forward to the gateway over DoT, with the gateway's certificate checked.
func TestStubby(t *testing.T) {
	need(t, "stubby", "dig")
	s := newSetup(t, yaml{})
	listen := freePort(t)
	conf := s.file("stubby.yml")
	write(t, conf, fmt.Sprintf(`
resolution_type: GETDNS_RESOLUTION_STUB
dns_transport_list:
  - GETDNS_TRANSPORT_TLS
tls_authentication: GETDNS_AUTHENTICATION_REQUIRED
tls_query_padding_blocksize: 128
tls_ca_file: %q
edns_client_subnet_private: 1
idle_timeout: 10000
round_robin_upstreams: 0
appdata_dir: %q
listen_addresses:
  - 127.0.0.1@%s
upstream_recursive_servers:
  - address_data: 127.0.0.1
    tls_port: %s
    tls_auth_name: "localhost"
`, s.file("ca.crt"), s.dir, port(listen), port(s.dot)))
	start(t, nil, "stubby", "-C", conf)
	askThrough(t, listen)
	noErrors(t, s.gateway)
}

// askThrough asks the forwarder at addr, once it is there.
func askThrough(t *testing.T, addr string) {
	t.Helper()
	awaitTCP(t, addr)
	for _, q := range []struct{ line, want string }{
		{"www.lab.test A", "192.0.2.10"},
		{"b.lab.test AAAA", "2001:db8::10"},
		{"+tcp big.lab.test TXT", "aaaa"},
		{"nxdomain.lab.test A", "NXDOMAIN"},
		{"unknown.lab.test TYPE65280", "C0000264"},
	} {
		argv := append([]string{"dig", "+tries=1", "+timeout=5", "@127.0.0.1", "-p", port(addr)}, strings.Fields(q.line)...)
		if out, _ := run(t, argv...); !strings.Contains(out, q.want) {
			t.Errorf("%s: no %q in\n%s", q.line, q.want, out)
		}
	}
}

// awaitTCP waits until something listens on addr.
func awaitTCP(t *testing.T, addr string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; {
		c, err := net.DialTimeout("tcp", addr, time.Second)
		if err == nil {
			_ = c.Close()
			return
		}
		if time.Now().After(end) {
			t.Fatalf("nothing listens on %s: %v", addr, err)
		}
		// The program that we wait for has no way to say that it is ready: ask again, at the pace of its start.
		<-time.After(20 * time.Millisecond)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
