package integration

import (
	"encoding/base64"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// replace fills in the words that the tables use for what differs from run to run.
func (s *setup) replace(line string) []string {
	words := strings.Fields(line)
	r := strings.NewReplacer("PLAIN", port(s.plain), "DOTPORT", port(s.dot), "DOHPORT", port(s.doh), "DOQPORT", port(s.doq),
		"CA", s.file("ca.crt"), "DIR", s.dir, "PROGRAM", program)
	for i, w := range words {
		words[i] = r.Replace(w)
	}
	return words
}

// story is one command line with what its output has to match, and not to match.
type story struct {
	name   string
	line   string
	want   []string // regular expressions, multi-line
	not    []string
	status int
}

func tell(t *testing.T, s *setup, stories []story) {
	t.Helper()
	for _, st := range stories {
		t.Run(st.name, func(t *testing.T) {
			argv := s.replace(st.line)
			need(t, argv[0])
			out, status := run(t, argv...)
			if status != st.status {
				t.Errorf("exit status: got %d, want %d", status, st.status)
			}
			for _, w := range st.want {
				if !regexp.MustCompile("(?m)" + w).MatchString(out) {
					t.Errorf("no match for %q", w)
				}
			}
			for _, w := range st.not {
				if regexp.MustCompile("(?m)" + w).MatchString(out) {
					t.Errorf("unwanted match for %q", w)
				}
			}
			if t.Failed() {
				t.Logf("%s\n%s", strings.Join(argv, " "), out)
			}
		})
	}
}

func TestDig(t *testing.T) {
	s := newSetup(t, yaml{more: "local: {chaos: {version.bind: dnsgateway, id.server: gw1}}\n"})
	const dig = "dig +tries=1 +timeout=5 @127.0.0.1 -p PLAIN "
	tell(t, s, []story{
		{name: "udp", line: dig + "www.lab.test", want: []string{
			`status: NOERROR`, `flags: qr rd ra;`, `^www\.lab\.test\.\s+\d+\sIN\sCNAME\sa\.lab\.test\.$`, `^b\.lab\.test\.\s+\d+\sIN\sA\s192\.0\.2\.10$`,
			`EDNS: version: 0, flags:; udp: 1232`, `\(UDP\)`}},
		{name: "tcp", line: dig + "+tcp www.lab.test", want: []string{`192\.0\.2\.10`, `\(TCP\)`}},
		{name: "letter case", line: dig + "+noall +question +answer WwW.LaB.tEsT", want: []string{`^;WwW\.LaB\.tEsT\.`, `^WwW\.LaB\.tEsT\.\s`}},
		{name: "dnssec", line: dig + "+dnssec www.lab.test", want: []string{`flags: do; udp: 1232`, `192\.0\.2\.10`}},
		{name: "truncated, then tcp", line: dig + "big.lab.test TXT", want: []string{`Truncated, retrying in TCP mode`, `status: NOERROR`, `"aaaa`}},
		{name: "ignore truncation", line: dig + "+ignore big.lab.test TXT", want: []string{`flags: qr tc rd ra;`, `ANSWER: 0`}},
		{name: "small buffer", line: dig + "+ignore +bufsize=512 many.lab.test", want: []string{`flags: qr tc rd ra;`, `ANSWER: 0`}},
		{name: "our buffer, not the client's", line: dig + "+ignore +bufsize=4096 many.lab.test", want: []string{`flags: qr tc rd ra;`}},
		{name: "no EDNS", line: dig + "+noedns www.lab.test", want: []string{`192\.0\.2\.10`}, not: []string{`EDNS`}},
		{name: "short", line: dig + "+short b.lab.test AAAA", want: []string{`^2001:db8::10$`}},
		{name: "nxdomain", line: dig + "nxdomain.lab.test", want: []string{`status: NXDOMAIN`, `SOA`}},
		{name: "nodata", line: dig + "nodata.lab.test", want: []string{`status: NOERROR`, `ANSWER: 0`, `SOA`}},
		{name: "https record", line: dig + "+short svc.lab.test TYPE65", want: []string{`alpn="h2,h3"`}},
		{name: "unknown type", line: dig + "+short unknown.lab.test TYPE65280", want: []string{`^\\# 4 C0000264$`}},
		{name: "unknown class", line: dig + "+header-only -c CLASS300 www.lab.test", want: []string{`status: FORMERR`}},
		{name: "any is minimal", line: dig + "+notcp lab.test ANY", want: []string{`HINFO\s"RFC8482" ""`, `ANSWER: 1,`}},
		{name: "axfr", line: dig + "lab.test AXFR", want: []string{`Transfer failed`}},
		{name: "version.bind", line: dig + "+short version.bind CH TXT", want: []string{`^"dnsgateway"$`}},
		{name: "id.server", line: dig + "+short id.server CH TXT", want: []string{`^"gw1"$`}},
		{name: "hostname.bind is not configured", line: dig + "hostname.bind CH TXT", want: []string{`status: REFUSED`}},
		{name: "other opcode", line: dig + "+opcode=5 www.lab.test SOA", want: []string{`status: NOTIMP`, `opcode: UPDATE`}},
		{name: "notify", line: dig + "+opcode=4 lab.test SOA", want: []string{`status: NOTIMP`}},
		{name: "edns version", line: dig + "+edns=1 +noednsnegotiation www.lab.test", want: []string{`status: BADVERS`, `EDNS: version: 0`}},
		{name: "ede passes", line: dig + "ede.lab.test", want: []string{`status: SERVFAIL`, `EDE: 6 \(DNSSEC Bogus\): \(lab: this name is broken on purpose\)`}},
		{name: "options", line: dig + "+subnet=192.0.2.0/24 +cookie +nsid b.lab.test", want: []string{`192\.0\.2\.10`}, not: []string{`CLIENT-SUBNET`, `NSID`}},
		{name: "no recursion desired", line: dig + "+norecurse b.lab.test", want: []string{`flags: qr ra;`, `192\.0\.2\.10`}},
		{name: "checking disabled", line: dig + "+cdflag b.lab.test", want: []string{`flags: qr rd ra cd;`}},
		{name: "keepalive", line: dig + "+tcp +keepopen +keepalive b.lab.test a.lab.test", want: []string{`TCP.KEEPALIVE: 10\.0 secs`, `192\.0\.2\.10`}},
	})
	noErrors(t, s.gateway)
}

func TestKdig(t *testing.T) {
	s := newSetup(t, yaml{})
	tell(t, s, []story{
		{name: "tls", line: "kdig +timeout=5 @127.0.0.1 -p DOTPORT +tls-ca=CA +tls-hostname=localhost www.lab.test", want: []string{
			`TLS session \(TLS1\.3\)`, `status: NOERROR`, `192\.0\.2\.10`, `\(TCP\)`}},
		{name: "tls, wrong name", line: "kdig +timeout=2 +retry=0 @127.0.0.1 -p DOTPORT +tls-ca=CA +tls-hostname=wrong.test www.lab.test",
			want: []string{`(?i)certificate`}, not: []string{`192\.0\.2\.10`}, status: 1},
		{name: "tls, padding", line: "kdig +timeout=5 @127.0.0.1 -p DOTPORT +tls-ca=CA +tls-hostname=localhost +padding=128 b.lab.test", want: []string{
			`Received 468 B`, `192\.0\.2\.10`}},
		{name: "https by post", line: "kdig +timeout=5 @127.0.0.1 -p DOHPORT +https=localhost/dns-query +tls-ca=CA +tls-hostname=localhost www.lab.test", want: []string{
			`HTTP session \(HTTP/2-POST\)`, `192\.0\.2\.10`}},
		{name: "https by get", line: "kdig +timeout=5 @127.0.0.1 -p DOHPORT +https=localhost/dns-query +https-get +tls-ca=CA +tls-hostname=localhost www.lab.test", want: []string{
			`HTTP session \(HTTP/2-GET\)`, `192\.0\.2\.10`}},
		{name: "quic", line: "kdig +timeout=5 @127.0.0.1 -p DOQPORT +tls-ca=CA +tls-hostname=localhost +quic www.lab.test", want: []string{
			`QUIC session \(QUICv1\)`, `192\.0\.2\.10`}},
	})
	noErrors(t, s.gateway)
}

func TestCurl(t *testing.T) {
	s := newSetup(t, yaml{})
	m := new(dns.Msg).SetQuestion("www.lab.test.", dns.TypeA)
	m.Id = 0
	packed, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, "query.bin"), packed, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, "large.bin"), make([]byte, 70_000), 0o600); err != nil {
		t.Fatal(err)
	}
	get := "?dns=" + base64.RawURLEncoding.EncodeToString(packed)
	const (
		curl = "curl -sS --max-time 10 --cacert CA -i --output - "
		at   = " https://localhost:DOHPORT/dns-query"
		post = " -H content-type:application/dns-message --data-binary @DIR/query.bin"
		ok   = `(?i)^content-type: application/dns-message`
		age  = `(?i)^cache-control: max-age=(100|9\d)\s*$` // the smallest TTL of the chain is 100 s
	)
	tell(t, s, []story{
		{name: "get h2", line: curl + "--http2" + at + get, want: []string{`^HTTP/2 200`, ok, age}},
		{name: "get h1", line: curl + "--http1.1" + at + get, want: []string{`^HTTP/1.1 200 OK`, ok, age, `(?i)^alt-svc: h3=`}},
		{name: "post h2", line: curl + "--http2" + post + at, want: []string{`^HTTP/2 200`, ok, age}},
		{name: "post h1", line: curl + "--http1.1" + post + at, want: []string{`^HTTP/1.1 200 OK`, ok, age}},
		{name: "media type parameters", line: curl + "-H content-type:application/dns-message;charset=x --data-binary @DIR/query.bin" + at, want: []string{`^HTTP/2 200`}},
		{name: "bad base64", line: curl + at + "?dns=%21%21", want: []string{`^HTTP/2 400`}},
		{name: "bad message", line: curl + at + "?dns=AAAA", want: []string{`^HTTP/2 400`}},
		{name: "other path", line: curl + "https://localhost:DOHPORT/other", want: []string{`^HTTP/2 404`}},
		{name: "other method", line: curl + "-X PUT" + at, want: []string{`^HTTP/2 405`, `(?i)^allow: .*GET.*POST`}},
		{name: "other media type", line: curl + "-H content-type:text/plain --data-binary @DIR/query.bin" + at, want: []string{`^HTTP/2 415`}},
		// Over HTTP/2 curl 7.88 may give the response up when the rest of its request is no longer wanted.
		{name: "too large", line: curl + "--http1.1 -H content-type:application/dns-message --data-binary @DIR/large.bin" + at, want: []string{`^HTTP/1.1 413`}},
		{name: "json", line: curl + "-H accept:application/dns-json" + at + "?name=b.lab.test&type=AAAA", want: []string{
			`(?i)^content-type: application/dns-json`, `"Status":\s*0`, `"data":\s*"2001:db8::10"`, `"type":\s*28`}},
		{name: "json nxdomain", line: curl + "-H accept:application/dns-json" + at + "?name=nxdomain.lab.test", want: []string{`"Status":\s*3`, `(?i)^cache-control: max-age=`}},
	})
	t.Run("doh-url", func(t *testing.T) {
		// curl resolves a name of the lab through the gateway and then fetches from that address: b.lab.test is not
		// reachable, so it is enough that curl says which address it tried.
		need(t, "curl")
		out, _ := run(t, "curl", "-v", "--max-time", "2", "--cacert", s.file("ca.crt"), "--doh-url",
			"https://localhost:"+port(s.doh)+"/dns-query", "http://tier1.lab.test:"+port(s.admin)+"/livez")
		if !strings.Contains(out, "127.0.0.1:"+port(s.admin)) {
			t.Errorf("curl --doh-url did not find the address of tier1.lab.test:\n%s", out)
		}
	})
	noErrors(t, s.gateway)
}

// TestTransports asks over every transport what dig, kdig and curl cannot all be asked for: HTTP/3 above all.
func TestTransports(t *testing.T) {
	s := newSnapshotSetup(t) // so that its metrics are there as well
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			c := tr.dial(t, s)
			if c == nil {
				return
			}
			defer c.close()
			for _, q := range []struct {
				name  string
				qtype uint16
				rcode int
				want  string
			}{
				{"www.lab.test.", dns.TypeA, dns.RcodeSuccess, "192.0.2.10"},
				{"x.wild.lab.test.", dns.TypeA, dns.RcodeSuccess, "192.0.2.40"},
				{"nxdomain.lab.test.", dns.TypeA, dns.RcodeNameError, "SOA"},
				{"slow.lab.test.", dns.TypeA, dns.RcodeSuccess, "192.0.2.60"},
			} {
				ctx, cancel := contextWithDeadline(t)
				resp, err := c.ask(ctx, new(dns.Msg).SetQuestion(q.name, q.qtype))
				cancel()
				if err != nil {
					t.Errorf("%s: %v", q.name, err)
					continue
				}
				if resp.Rcode != q.rcode || !strings.Contains(resp.String(), q.want) {
					t.Errorf("%s: got\n%v\nwant %s with %s", q.name, resp, dns.RcodeToString[q.rcode], q.want)
				}
			}
		})
	}
	status, metrics := get(t, "http://"+s.admin+"/metrics")
	if status != http.StatusOK {
		t.Fatalf("/metrics: got status %d", status)
	}
	for _, tr := range []string{"udp", "tcp", "dot", "doh", "doh3", "doq"} {
		if !strings.Contains(metrics, `transport="`+tr+`"`) {
			t.Errorf("/metrics knows nothing of transport %s", tr)
		}
	}
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range regexp.MustCompile("`(dnsgateway_[a-z_]+)`").FindAllStringSubmatch(string(readme), -1) {
		// No upstream has failed here, so there is no error to count yet.
		if name[1] != "dnsgateway_upstream_errors_total" && !strings.Contains(metrics, "# TYPE "+name[1]+" ") {
			t.Errorf("README.md has %s, /metrics has not", name[1])
		}
	}
	for _, secret := range []string{"lab.test.", "127.0.0.1\""} {
		if strings.Contains(metrics, secret) {
			t.Errorf("/metrics has %q in it: a client or a name", secret)
		}
	}
	noErrors(t, s.gateway)
}
