package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ameshkov/dnsstamps"
	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"

	"dnsgateway/gateway/certs"
)

var updateQuery = flag.Bool("update-query", false, "rewrite the golden files of the query command")

// queryServers is one server of every kind.
type queryServers struct {
	ca                        *queryCA
	conf                      *tls.Config
	plain, dot, doh, doh1     string
	h3, doq                   string
	wrongName, expired, early string // DoT with a bad certificate
}

func startQueryServers(t *testing.T) *queryServers {
	t.Helper()
	ca := newQueryCA(t)
	conf := ca.good(t)
	now := time.Now()
	dot := func(c *tls.Config) string { return startDNS(t, "tcp-tls", "127.0.0.1:0", withALPN(c, "dot")) }
	return &queryServers{
		ca: ca, conf: conf, plain: startPlain(t), dot: dot(conf), doh: startDoH(t, conf, false), doh1: startDoH(t, conf, true),
		h3: startH3(t, conf), doq: startDoQ(t, conf),
		wrongName: dot(ca.issue(t, now.Add(-time.Hour), now.Add(time.Hour), "other.test", "192.0.2.9")),
		expired:   dot(ca.issue(t, now.Add(-2*time.Hour), now.Add(-time.Hour), "127.0.0.1")),
		early:     dot(ca.issue(t, now.Add(time.Hour), now.Add(2*time.Hour), "127.0.0.1")),
	}
}

func (s *queryServers) pin() string { return certs.Pin(s.conf.Certificates[0].Leaf) }

// changeable are the parts of the output that differ from run to run, and what stands for them in the golden files.
var changeable = []struct {
	re   *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`\bid: \d+`), "id: ID"},
	{regexp.MustCompile(`"id": \d+`), `"id": 1`},
	{regexp.MustCompile(`[0-9.]+ msec`), "T msec"},
	{regexp.MustCompile(`_ms": [0-9.]+`), `_ms": 1`},
	{regexp.MustCompile(`127\.0\.0\.1([:#])\d+`), "127.0.0.1${1}PORT"},
	{regexp.MustCompile(`WHEN: .*`), "WHEN: DATE"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)`), "DATE"},
	{regexp.MustCompile(`sha256/[A-Za-z0-9+/=]{44}`), "sha256/PIN"},
	{regexp.MustCompile(`\d+ hours left`), "N hours left"},
	{regexp.MustCompile(`TLS_(AES_128_GCM_SHA256|AES_256_GCM_SHA384|CHACHA20_POLY1305_SHA256)`), "TLS13_SUITE"}, // by the CPU
}

func normalised(s string) string {
	for _, c := range changeable {
		s = c.re.ReplaceAllString(s, c.with)
	}
	return s
}

func TestQueryGolden(t *testing.T) {
	s := startQueryServers(t)
	ca := []string{"--ca", s.ca.file}
	for _, c := range []struct {
		name   string
		args   []string
		status int
	}{
		{"udp", []string{"@" + s.plain, "www.lab.test"}, 0},
		{"udp-truncated", []string{"@dns://" + s.plain, "big.lab.test", "TXT"}, 0},
		{"udp-ignore", []string{"@udp://" + s.plain, "big.lab.test", "TXT", "--ignore"}, 0},
		{"tcp", []string{"@tcp://" + s.plain, "www.lab.test", "--dnssec", "--cd"}, 0},
		{"nxdomain", []string{"nothing.lab.test", "mx", "@" + s.plain, "--tcp"}, 0},
		{"ede", []string{"@" + s.plain, "dead.lab.test"}, 0},
		{"badvers", []string{"@" + s.plain, "badvers.lab.test"}, 0},
		{"formerr", []string{"@" + s.plain, "formerr.lab.test"}, 0},
		{"escape", []string{"@" + s.plain, "escape.lab.test", "TYPE65280"}, 0},
		{"chaos", []string{"@" + s.plain, "version.bind", "TXT", "CH"}, 0},
		{"reverse", []string{"-x", "@" + s.plain, "192.0.2.7"}, 0},
		{"dot", append(ca, "@tls://"+s.dot, "www.lab.test"), 0},
		{"dot-name", append(ca, "@tls://"+s.dot+"#dns.lab.test", "www.lab.test", "--pin", s.pin()), 0},
		{"dot-resume", append(ca, "@tls://"+s.dot, "www.lab.test", "--resume"), 0},
		{"dot-insecure", []string{"@tls://" + s.wrongName, "www.lab.test", "--insecure"}, 0},
		{"dot-wrong-name", append(ca, "@tls://"+s.wrongName, "www.lab.test"), 9},
		{"doh-h2", append(ca, "@https://"+s.doh, "www.lab.test"), 0},
		{"doh-h1-get", append(ca, "@https://"+s.doh1+"/dns-query{?dns}", "www.lab.test", "--get"), 0},
		{"doh-404", append(ca, "@https://"+s.doh+"/nothing", "www.lab.test"), 9},
		{"doh3", append(ca, "@h3://"+s.h3+"/dns-query", "www.lab.test"), 0},
		{"doq", append(ca, "@quic://"+s.doq, "www.lab.test"), 0},
		{"short", append(ca, "@quic://"+s.doq, "www.lab.test", "--short"), 0},
		{"json", append(ca, "@tls://"+s.dot+"#dns.lab.test", "dead.lab.test", "--json"), 0},
		{"json-doh", append(ca, "@https://"+s.doh, "www.lab.test", "--json", "--dnssec"), 0},
		{"json-error", append(ca, "@tls://"+s.expired, "www.lab.test", "--json"), 9},
	} {
		t.Run(c.name, func(t *testing.T) {
			stdout, stderr, status := runCommand(t, append([]string{"query"}, c.args...)...)
			if status != c.status {
				t.Errorf("exit status %d, want %d", status, c.status)
			}
			got := normalised(stdout)
			if stderr != "" {
				got += "-- stderr --\n" + normalised(stderr)
			}
			if strings.Contains(got, "\x1b") {
				t.Errorf("an escape character came through: %q", got)
			}
			golden := filepath.Join("testdata", "query", c.name+".txt")
			if *updateQuery {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(got, string(want)); d != "" {
				t.Errorf("-got +want (rewrite by -update-query):\n%s", d)
			}
		})
	}
}

// TestQueryTLS checks what is accepted and what is not, and the words for it, over every encrypted transport.
func TestQueryTLS(t *testing.T) {
	s := startQueryServers(t)
	otherCA := newQueryCA(t)
	wrongPin := "sha256/" + base64.StdEncoding.EncodeToString(make([]byte, 32))
	caSum := sha256.Sum256(s.ca.cert.RawSubjectPublicKeyInfo)
	caPin := "sha256//" + base64.StdEncoding.EncodeToString(caSum[:])
	type test struct {
		name, server string
		args         []string
		want         string // in the error; "" means an answer
	}
	tests := []test{
		{"expired", "tls://" + s.expired, []string{"--ca", s.ca.file}, "expired: the certificate of CN="},
		{"not yet valid", "tls://" + s.early, []string{"--ca", s.ca.file}, "not yet valid: the certificate of CN="},
		{"expired and insecure", "tls://" + s.expired, []string{"--insecure"}, ""},
		{"two faults at once", "tls://" + s.wrongName, []string{"--ca", otherCA.file},
			"wrong name: the certificate is for other.test, 192.0.2.9, not for 127.0.0.1; unknown CA: "},
		{"name that is given", "tls://" + s.wrongName + "#other.test", []string{"--ca", s.ca.file}, ""},
		{"address as the name", "tls://" + s.wrongName + "#192.0.2.9", []string{"--ca", s.ca.file}, ""},
	}
	for _, server := range []string{"tls://" + s.dot, "https://" + s.doh, "h3://" + s.h3, "quic://" + s.doq} {
		tests = append(tests, []test{
			{"good", server, []string{"--ca", s.ca.file}, ""},
			{"unknown CA", server, []string{"--ca", otherCA.file},
				"unknown CA: no trusted root signed the certificate of CN=query test CA"},
			{"wrong name", server + "#wrong.test", []string{"--ca", s.ca.file},
				"wrong name: the certificate is for dns.lab.test, 127.0.0.1, not for wrong.test"},
			{"insecure", server + "#wrong.test", []string{"--insecure"}, ""},
			{"pin", server, []string{"--ca", s.ca.file, "--pin", wrongPin, "--pin", s.pin()}, ""},
			{"pin of the CA", server, []string{"--ca", s.ca.file, "--pin", caPin}, ""},
			{"wrong pin", server, []string{"--ca", s.ca.file, "--pin", wrongPin}, "no --pin matches: the server's key is " + s.pin()},
			{"pin only", server + "#wrong.test", []string{"--insecure", "--pin", s.pin()}, ""},
			{"wrong pin only", server, []string{"--insecure", "--pin", wrongPin}, "no --pin matches"},
			{"pin of a CA that is only sent along", server, []string{"--insecure", "--pin", caPin}, "no --pin matches"},
			{"pin does not outweigh the name", server + "#wrong.test", []string{"--ca", s.ca.file, "--pin", s.pin()}, "wrong name"},
		}...)
	}
	for _, c := range tests {
		scheme, _, _ := strings.Cut(c.server, ":")
		t.Run(c.name+"/"+scheme, func(t *testing.T) {
			args := append([]string{"query", "@" + c.server, "www.lab.test"}, c.args...)
			stdout, stderr, status := runCommand(t, args...)
			if c.want == "" {
				if status != 0 || !strings.Contains(stdout, "192.0.2.7") {
					t.Errorf("status %d, want an answer\n%s%s", status, stdout, stderr)
				}
				if !strings.Contains(stdout, "CERTIFICATE: subject: CN=query") {
					t.Errorf("the certificate is not shown:\n%s", stdout)
				}
				return
			}
			if status != exitNoAnswer || !strings.Contains(stderr, c.want) {
				t.Errorf("status %d and\n%s\nwant status 9 and %q", status, stderr, c.want)
			}
			if !strings.Contains(stderr, ";;   pin: sha256/") {
				t.Errorf("the certificate is not shown with the error:\n%s", stderr)
			}
		})
	}
}

// TestQueryNoAnswer checks the words for, and the exit status of, everything that ends without an answer.
func TestQueryNoAnswer(t *testing.T) {
	s := startQueryServers(t)
	silentUDP, silentTCP := startSilent(t)
	closed := closedPort(t)
	closing := startClosing(t)
	ca := []string{"--ca", s.ca.file}
	short := []string{"--timeout", "150ms"}
	for _, c := range []struct {
		name, server, qname string
		args                []string
		want                string
	}{
		{"udp no such host", "udp://a..b", "www.lab.test", nil, "no such host"},
		{"tcp no such host", "tcp://a..b", "www.lab.test", nil, "no such host"},
		{"dot no such host", "tls://a..b", "www.lab.test", nil, "no such host"},
		{"doh no such host", "https://a..b", "www.lab.test", nil, "no such host"},
		{"h3 no such host", "h3://a..b", "www.lab.test", nil, "no such host"},
		{"doq no such host", "quic://a..b", "www.lab.test", nil, "no such host"},
		{"udp silent", "udp://" + silentUDP, "www.lab.test", short, "timed out after 150ms"},
		{"tcp silent", "tcp://" + silentTCP, "www.lab.test", short, "timed out after 150ms"},
		{"dot silent", "tls://" + silentTCP, "www.lab.test", short, "timed out after 150ms"},
		{"doh silent", "https://" + silentTCP, "www.lab.test", short, "timed out after 150ms"},
		{"h3 silent", "h3://" + silentUDP, "www.lab.test", short, "timed out after 150ms"},
		{"doq silent", "quic://" + silentUDP, "www.lab.test", short, "timed out after 150ms"},
		{"udp refused", "udp://" + closed, "www.lab.test", nil, "connection refused: nothing listens on " + closed},
		{"tcp refused", "tcp://" + closed, "www.lab.test", nil, "connection refused: nothing listens on " + closed},
		{"dot refused", "tls://" + closed, "www.lab.test", nil, "connection refused: nothing listens on " + closed},
		{"doh refused", "https://" + closed, "www.lab.test", nil, "connection refused: nothing listens on " + closed},
		{"tcp closed", "tcp://" + closing, "www.lab.test", nil, "the server closed the connection without a whole answer"},
		{"dot to plain TCP", "tls://" + closing, "www.lab.test", nil, "in the TLS handshake: "},
		{"dot closed at once", "tls://" + startHangup(t), "www.lab.test", nil,
			"in the TLS handshake: the server closed the connection; is this its DoT port?"},
		{"doh redirect", "https://" + s.doh + "/redirect", "www.lab.test", ca, "HTTP status 302"},
		{"doh html", "https://" + s.doh + "/html", "www.lab.test", ca, "is this the path of a DoH server?"},
		{"doq reset", "quic://" + s.doq, "reset.lab.test", ca, "DOQ_EXCESSIVE_LOAD"},
		{"doq closed", "quic://" + s.doq, "close.lab.test", ca, "DOQ_INTERNAL_ERROR"},
		{"doq on a DoH3 port", "quic://" + s.h3, "www.lab.test", ca, "no application protocol"},
		{"tcp wrong ID", "tcp://" + s.plain, "wrongid.lab.test", nil, "not an answer to this query: its ID is "},
		{"tcp query", "tcp://" + s.plain, "query.lab.test", nil, "not an answer to this query: it is a query"},
		{"tcp other question", "tcp://" + s.plain, "other.lab.test", nil, "its question is evil.lab.test. A, not other.lab.test. A"},
		{"udp other question", "udp://" + s.plain, "other.lab.test", short, "timed out after 150ms"},
	} {
		t.Run(c.name, func(t *testing.T) {
			begin := time.Now()
			stdout, stderr, status := runCommand(t, append([]string{"query", "@" + c.server, c.qname}, c.args...)...)
			if status != exitNoAnswer || !strings.Contains(stderr, c.want) || stdout != "" {
				t.Errorf("status %d, stdout %q, stderr\n%s\nwant status 9, nothing, %q", status, stdout, stderr, c.want)
			}
			if strings.Contains(stderr, "\x1b") {
				t.Errorf("an escape character came through: %q", stderr)
			}
			if took := time.Since(begin); took > 4*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
}

// startSilent listens on UDP and TCP and never answers.
func startSilent(t *testing.T) (udp, tcp string) {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0") // the system's backlog accepts
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close(); l.Close() })
	return pc.LocalAddr().String(), l.Addr().String()
}

// closedPort returns a port that nothing listens on, on UDP and TCP.
func closedPort(t *testing.T) string {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	return pc.LocalAddr().String()
}

// startClosing reads what a client sends and closes the connection after half an answer.
func startClosing(t *testing.T) string {
	t.Helper()
	return startReading(t, []byte{0, 50, 1})
}

// startReading reads what a client sends, once, sends answer and closes the connection.
func startReading(t *testing.T, answer []byte) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			buf := make([]byte, 4096) // what is not read would make a reset of the close
			_, _ = c.Read(buf)
			_, _ = c.Write(answer)
			c.Close()
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

// startHangup closes every connection when its first bytes have come.
func startHangup(t *testing.T) string {
	t.Helper()
	return startReading(t, nil)
}

// TestQueryResends drops the first datagram and answers the second with a stranger's before its own.
func TestQueryResends(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	done := make(chan error, 1)
	go func() {
		buf := make([]byte, 1500)
		for i := 0; ; i++ {
			n, from, err := pc.ReadFrom(buf)
			if err != nil || i == 0 {
				if err != nil {
					done <- err
					return
				}
				continue
			}
			q := new(dns.Msg)
			if err := q.Unpack(buf[:n]); err != nil {
				done <- err
				return
			}
			m := labAnswer(q)
			m.Id++
			for range 2 {
				out, err := m.Pack()
				if err == nil {
					_, err = pc.WriteTo(out, from)
				}
				if err != nil {
					done <- err
					return
				}
				m.Id = q.Id
			}
			done <- nil
			return
		}
	}()
	stdout, stderr, status := runCommand(t, "query", "@"+pc.LocalAddr().String(), "www.lab.test", "--timeout", "600ms")
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if status != 0 {
		t.Fatalf("status %d: %s", status, stderr)
	}
	for _, want := range []string{
		"No answer in 200ms, sent the query again.", "passed over a datagram: not an answer", "192.0.2.7",
	} {
		if !strings.Contains(stdout, want) {
			t.Errorf("no %q in:\n%s", want, stdout)
		}
	}
}

func TestQueryInterrupted(t *testing.T) {
	silent, _ := startSilent(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	root := newRootCommand()
	var errs bytes.Buffer
	root.SetOut(io.Discard)
	root.SetErr(&errs)
	status := execute(ctx, root, []string{"query", "@" + silent, "x"})
	if status != 9 || !strings.Contains(errs.String(), "interrupted") {
		t.Errorf("status %d, %q; want 9, interrupted", status, errs.String())
	}
}

func TestQueryAuthority(t *testing.T) {
	s := startQueryServers(t)
	_, port, err := net.SplitHostPort(s.doh)
	if err != nil {
		t.Fatal(err)
	}
	for _, get := range []bool{false, true} {
		args := []string{"query", "@https://" + s.doh + "/dns-query?host=dns.lab.test:" + port + "#dns.lab.test", "www.lab.test",
			"--short", "--ca", s.ca.file, fmt.Sprintf("--get=%v", get)}
		if stdout, stderr, status := runCommand(t, args...); status != 0 || !strings.Contains(stdout, "192.0.2.7") {
			t.Errorf("GET %v: status %d, %s%s", get, status, stdout, stderr)
		}
	}
}

func TestQueryStamp(t *testing.T) {
	s := startQueryServers(t)
	tbs := sha256.Sum256(s.ca.cert.RawTBSCertificate)
	_, dohPort, err := net.SplitHostPort(s.doh)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		stamp dnsstamps.ServerStamp
		want  string // in the error
	}{
		{"plain", dnsstamps.ServerStamp{Proto: dnsstamps.StampProtoTypePlain, ServerAddrStr: s.plain}, ""},
		{"dot", dnsstamps.ServerStamp{Proto: dnsstamps.StampProtoTypeTLS, ServerAddrStr: s.dot, ProviderName: "dns.lab.test"}, ""},
		{"doq", dnsstamps.ServerStamp{Proto: dnsstamps.StampProtoTypeDoQ, ServerAddrStr: s.doq, ProviderName: "dns.lab.test",
			Hashes: [][]byte{tbs[:]}}, ""},
		{"doh", dnsstamps.ServerStamp{Proto: dnsstamps.StampProtoTypeDoH, ServerAddrStr: s.doh, ProviderName: "dns.lab.test",
			Path: "/dns-query"}, ""},
		{"doh with the port at the name", dnsstamps.ServerStamp{Proto: dnsstamps.StampProtoTypeDoH, ServerAddrStr: "127.0.0.1",
			ProviderName: "dns.lab.test:" + dohPort, Path: "/dns-query"}, ""},
		{"wrong hash", dnsstamps.ServerStamp{Proto: dnsstamps.StampProtoTypeTLS, ServerAddrStr: s.dot,
			ProviderName: "dns.lab.test", Hashes: [][]byte{make([]byte, 32)}}, "no certificate of the chain is one that the DNS stamp names"},
		{"wrong name", dnsstamps.ServerStamp{Proto: dnsstamps.StampProtoTypeTLS, ServerAddrStr: s.dot, ProviderName: "wrong.test"},
			"wrong name"},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := []string{"query", "@" + c.stamp.String(), "www.lab.test", "--short"}
			if c.stamp.Proto != dnsstamps.StampProtoTypePlain {
				args = append(args, "--ca", s.ca.file)
			}
			stdout, stderr, status := runCommand(t, args...)
			if c.want != "" {
				if status != 9 || !strings.Contains(stderr, c.want) {
					t.Errorf("status %d, %s; want 9, %q", status, stderr, c.want)
				}
			} else if status != 0 || !strings.Contains(stdout, "192.0.2.7") {
				t.Errorf("status %d, %s%s", status, stdout, stderr)
			}
		})
	}
}

func TestParseQueryServer(t *testing.T) {
	crypt := dnsstamps.ServerStamp{Proto: dnsstamps.StampProtoTypeDNSCrypt, ServerAddrStr: "192.0.2.1:443",
		ServerPk: make([]byte, 32), ProviderName: "2.dnscrypt-cert.test"}
	for _, c := range []struct {
		text string
		want string // scheme address verify path
		err  string
	}{
		{"1.1.1.1", "dns 1.1.1.1:53", ""},
		{"1.1.1.1:5353", "dns 1.1.1.1:5353", ""},
		{"::1", "dns [::1]:53", ""},
		{"fe80::1%lo", "dns [fe80::1%lo]:53", ""},
		{"[::1]", "dns [::1]:53", ""},
		{"[::1]:5353", "dns [::1]:5353", ""},
		{"dns.example", "dns dns.example:53", ""},
		{"dns.example:54", "dns dns.example:54", ""},
		{"dns://127.0.0.1:8053", "dns 127.0.0.1:8053 127.0.0.1", ""},
		{"udp://[::1]/", "udp [::1]:53 ::1", ""},
		{"tcp://h", "tcp h:53 h", ""},
		{"tls://1.1.1.1#one.one.one.one", "tls 1.1.1.1:853 one.one.one.one", ""},
		{"TLS://h:1", "tls h:1 h", ""},
		{"quic://h", "quic h:853 h", ""},
		{"https://h", "https h:443 h /dns-query", ""},
		{"https://h/", "https h:443 h /dns-query", ""},
		{"https://h/q/a%2Fb?x=y#n", "https h:443 n /q/a%2Fb?x=y", ""},
		{"h3://h/dns-query{?dns}", "h3 h:443 h /dns-query", ""},
		{"", "", "there is no host"},
		{"tls://", "", "there is no host"},
		{"tls://:853", "", "there is no host"},
		{"1.1.1.1:0", "", `port "0" is not between 1 and 65535`},
		{"tls://h:65536", "", `port "65536" is not between 1 and 65535`},
		{"tls://h:x", "", "not a URL: "},
		{"1:2:3", "", "an IPv6 address with a port is [ADDRESS]:PORT"},
		{"1.1.1.1#53", "", "a port is written with a colon"},
		{"udp://1.1.1.1#name", "", "no certificate to verify over udp://"},
		{"ftp://h", "", `scheme "ftp" is none of`},
		{"tls://u:p@h", "", "a user and password mean nothing here"},
		{"tls://h/path", "", "only https:// and h3:// have a path"},
		{"quic://h?x", "", "only https:// and h3:// have a path"},
		{"sdns://", "", "not a DNS stamp: "},
		{"sdns://!", "", "not a DNS stamp: "},
		{crypt.String(), "", "a stamp of DNSCrypt cannot be asked"},
	} {
		s, err := parseQueryServer(c.text)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) || !strings.HasPrefix(err.Error(), "server @"+c.text+": ") {
				t.Errorf("%q: %v, want an error with %q", c.text, err, c.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", c.text, err)
			continue
		}
		got := strings.TrimSpace(strings.Join([]string{s.scheme, s.address(), s.verify, s.path}, " "))
		if got != c.want {
			t.Errorf("%q: got %q, want %q", c.text, got, c.want)
		}
	}
}

func FuzzParseQueryServer(f *testing.F) {
	for _, s := range []string{"1.1.1.1:53", "[::1]", "tls://h#n", "https://h/p{?dns}", "sdns://AgcAAAAAAAAABzEuMC4wLjGg"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseQueryServer(text)
		if err != nil {
			return
		}
		if _, ok := queryPorts[s.scheme]; !ok || s.host == "" || s.port == 0 || s.text != text {
			t.Errorf("%q: %+v", text, s)
		}
		if s.encrypted() && s.verify == "" {
			t.Errorf("%q: nothing to verify: %+v", text, s)
		}
		if web := s.scheme == "https" || s.scheme == "h3"; web != strings.HasPrefix(s.path, "/") {
			t.Errorf("%q: path %q", text, s.path)
		}
	})
}

func TestQueryArguments(t *testing.T) {
	for _, c := range []struct {
		args    string
		reverse bool
		want    string // server question
		err     string
	}{
		{"example.com", false, queryDefaultServer + " example.com. A", ""},
		{"example.com aaaa", false, queryDefaultServer + " example.com. AAAA", ""},
		{"AAAA example.com", false, queryDefaultServer + " example.com. AAAA", ""},
		{"@1.1.1.1 . NS", false, "1.1.1.1 . NS", ""},
		{"example.com 65 @1.1.1.1", false, "1.1.1.1 example.com. HTTPS", ""},
		{"example.com type65280 class7", false, queryDefaultServer + " example.com. TYPE65280 CLASS7", ""},
		{"version.bind TXT ch", false, queryDefaultServer + " version.bind. TXT CH", ""},
		{"192.0.2.1", true, queryDefaultServer + " 1.2.0.192.in-addr.arpa. PTR", ""},
		{"::1 ANY", true, queryDefaultServer + " 1." + strings.Repeat("0.", 31) + "ip6.arpa. ANY", ""},
		{"a", false, queryDefaultServer + " a. A", ""},
		{"", false, "", "a name to ask for is missing"},
		{"@1.1.1.1", false, "", "a name to ask for is missing"},
		{"@1.1.1.1 @2.2.2.2 x", false, "", "only one @server"},
		{"tls://1.1.1.1 x", false, "", `written with an @ before it: @tls://1.1.1.1`},
		{"x A IN y", false, "", `"y" is one argument too many`},
		{"x y", false, "", `"y" is not a record type`},
		{"x TYPE65536", false, "", "is not a record type"},
		{"x A y", false, "", `"y" is not a class`},
		{"example.com", true, "", "not an IP address"},
		{"a..b", false, "", "is not a domain name"},
		{"bücher.example", false, "", "xn-- form"},
		{strings.Repeat("a", 64), false, "", "is not a domain name"},
	} {
		server, q, err := queryArguments(strings.Fields(c.args), c.reverse)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q: %v, want an error with %q", c.args, err, c.err)
			}
			continue
		}
		if got := server + " " + questionText(q); err != nil || got != c.want {
			t.Errorf("%q: got %q, %v, want %q", c.args, got, err, c.want)
		}
	}
}

func TestQueryUsage(t *testing.T) {
	pin := "sha256/" + base64.StdEncoding.EncodeToString(make([]byte, 32))
	notPEM := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(notPEM, []byte("hello"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args   []string
		status int
		want   string
	}{
		{nil, 2, "a name to ask for is missing"},
		{[]string{"@ftp://x", "x"}, 2, "server @ftp://x: scheme"},
		{[]string{"@1.1.1.1", "x", "--insecure"}, 2, "are for encrypted servers"},
		{[]string{"@1.1.1.1", "x", "--pin", pin}, 2, "are for encrypted servers"},
		{[]string{"@tls://h", "x", "--tcp"}, 2, "--tcp is for plain servers"},
		{[]string{"@tls://h", "x", "--get"}, 2, "--get is for https:// and h3:// servers"},
		{[]string{"@tls://h", "x", "--pin", "sha256/abc"}, 2, `--pin "sha256/abc" is not sha256/`},
		{[]string{"@tls://h", "x", "--timeout", "0s"}, 2, "--timeout has to be above 0"},
		{[]string{"@tls://h", "x", "--short", "--json"}, 2, "[json short]"},
		{[]string{"@tls://h", "x", "--nothing"}, 2, "--nothing"},
		{[]string{"@tls://h", "x", "--ca", filepath.Join(t.TempDir(), "none")}, 1, "--ca: open "},
		{[]string{"@tls://h", "x", "--ca", notPEM}, 1, "has no certificate in PEM"},
	} {
		stdout, stderr, status := runCommand(t, append([]string{"query"}, c.args...)...)
		if status != c.status || !strings.Contains(stderr, c.want) || stdout != "" {
			t.Errorf("%q: status %d, %q, %q; want %d, nothing, %q", c.args, status, stdout, stderr, c.status, c.want)
		}
	}
}

// TestQueryPadding checks RFC 8467's block for names of all lengths.
func TestQueryPadding(t *testing.T) {
	for n := 1; n < 250; n++ {
		name := dns.Fqdn(strings.TrimSuffix(strings.Repeat(strings.Repeat("a", 30)+".", 9)[:n], "."))
		for _, do := range []bool{false, true} {
			m := newQueryMessage(dns.Question{Name: name, Qtype: dns.TypeA, Qclass: dns.ClassINET}, queryFlags{dnssec: do}, true)
			raw, err := m.Pack()
			if err != nil {
				t.Fatal(err)
			}
			if len(raw)%queryPadBlock != 0 {
				t.Fatalf("name of %d: %d octets", n, len(raw))
			}
		}
	}
	m := newQueryMessage(dns.Question{Name: "x.", Qtype: 1, Qclass: 1}, queryFlags{}, false)
	if n := len(m.IsEdns0().Option); n != 0 {
		t.Errorf("%d options over a plain transport, want none", n)
	}
}

// TestQueryJSONIsOneObject checks that programs can read what is printed, also when no answer came.
func TestQueryJSONIsOneObject(t *testing.T) {
	s := startQueryServers(t)
	for _, server := range []string{s.plain, "tcp://" + closedPort(t), "https://" + closedPort(t)} {
		stdout, _, _ := runCommand(t, "query", "@"+server, "www.lab.test", "--json")
		var got struct {
			Server, Transport, Error string
			Response                 *struct{ Rcode string }
		}
		if err := json.Unmarshal([]byte(stdout), &got); err != nil {
			t.Fatalf("%v:\n%s", err, stdout)
		}
		if got.Server != server || got.Transport == "" || (got.Response == nil) == (got.Error == "") {
			t.Errorf("%s: %+v", server, got)
		}
	}
}

func FuzzCheckReply(f *testing.F) {
	req := newQueryMessage(dns.Question{Name: "www.lab.test.", Qtype: dns.TypeA, Qclass: dns.ClassINET}, queryFlags{}, false)
	req.Id = 1
	for _, name := range []string{"www.lab.test.", "dead.lab.test.", "escape.lab.test.", "x."} {
		q := req.Copy()
		q.Question[0].Name = name
		m := labAnswer(q)
		m.Question[0].Name = "www.lab.test."
		raw, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := checkReply(req, raw)
		if (m == nil) == (err == nil) {
			t.Fatalf("message %v, error %v", m, err)
		}
		if err != nil {
			return
		}
		// Whatever is in it, it can be printed without moving the cursor.
		var out bytes.Buffer
		res := &queryResult{resp: m, question: req.Question[0]}
		writeQueryDig(&out, res)
		writeQueryShort(&out, res)
		if i := strings.IndexFunc(out.String(), func(r rune) bool { return r < ' ' && r != '\n' && r != '\t' }); i >= 0 {
			t.Errorf("a control character at %d of %q", i, out.String())
		}
		if err := writeQueryJSON(&out, res, nil); err != nil {
			t.Error(err)
		}
	})
}

// TestParsePin: one pin of 64 begins with a slash.
func TestParsePin(t *testing.T) {
	for _, want := range [][32]byte{{}, {0: 0xfc}, {0: 0xff, 1: 0xff, 31: 1}} {
		b64 := base64.StdEncoding.EncodeToString(want[:])
		for _, s := range []string{"sha256/" + b64, "sha256//" + b64, b64} {
			if pin, err := parsePin(s); err != nil || pin != want {
				t.Errorf("%s: got %x, %v, want %x", s, pin, err, want)
			}
		}
		for _, s := range []string{"sha256///" + b64, "sha256/" + b64[1:], "sha256/" + b64 + "=", "sha256/"} {
			if pin, err := parsePin(s); err == nil {
				t.Errorf("%s is taken as %x", s, pin)
			}
		}
	}
}
