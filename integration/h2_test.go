package integration

import (
	"encoding/base64"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// TestH2Clients asks over HTTP/2 with clients of three kinds, many requests at a time: all are answered.
func TestH2Clients(t *testing.T) {
	need(t, "h2load", "nghttp", "curl")
	s := newSetup(t, yaml{})
	m := new(dns.Msg).SetQuestion("www.lab.test.", dns.TypeA)
	m.Id = 0
	msg, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.file("query"), msg, 0o600); err != nil {
		t.Fatal(err)
	}
	url := "https://" + s.doh + "/dns-query"
	get := url + "?dns=" + base64.RawURLEncoding.EncodeToString(msg)

	for name, argv := range map[string][]string{
		"GET":                          {"h2load", "-n", "2000", "-c", "8", "-m", "20", get},
		"POST":                         {"h2load", "-n", "2000", "-c", "8", "-m", "20", "-d", s.file("query"), "-H", "content-type: application/dns-message", url},
		"one at a time, small windows": {"h2load", "-n", "300", "-c", "3", "-m", "1", "-w", "6", "-W", "6", get},
	} {
		t.Run("h2load "+name, func(t *testing.T) {
			out, status := run(t, argv...)
			summary := regexp.MustCompile(`requests: (\d+) total, \d+ started, \d+ done, (\d+) succeeded, 0 failed, 0 errored, 0 timeout`).FindStringSubmatch(out)
			if status != 0 || summary == nil || summary[1] != summary[2] || !strings.Contains(out, fmt.Sprintf("status codes: %s 2xx", summary[1])) {
				t.Errorf("status %d:\n%s", status, out)
			}
		})
	}
	t.Run("nghttp", func(t *testing.T) {
		// With padding, PRIORITY as older clients have it, and a trailer.
		argv := []string{"nghttp", "-v", "-n", "-b", "100", "--trailer", "x: y", "-d", s.file("query"), "-H", "content-type: application/dns-message", url}
		out, status := run(t, argv...)
		if status != 0 || !strings.Contains(out, ":status: 200") || strings.Contains(out, "RST_STREAM") {
			t.Errorf("status %d:\n%s", status, out)
		}
		// What it fills a CONTINUATION frame with is more than 16 KiB.
		out, status = run(t, append(argv, "--continuation")...)
		if status != 0 || !strings.Contains(out, ":status: 431") || strings.Contains(out, "RST_STREAM") {
			t.Errorf("status %d:\n%s", status, tail(out, 2000))
		}
	})
	t.Run("curl", func(t *testing.T) {
		out, status := run(t, "curl", "-sS", "--http2", "--cacert", s.file("ca.crt"), "-o", s.file("answer"),
			"-w", "%{http_version} %{http_code} %{content_type}", get)
		if status != 0 || out != "2 200 application/dns-message" {
			t.Errorf("status %d: %s", status, out)
		}
		body, err := os.ReadFile(s.file("answer"))
		if err != nil || m.Unpack(body) != nil || !m.Response {
			t.Errorf("got %x, %v", body, err)
		}
		// A body that is too large, of a client that looks for the answer when it has sent all of it.
		for _, size := range []int{65536, 300_000} {
			if err := os.WriteFile(s.file("large"), make([]byte, size), 0o600); err != nil {
				t.Fatal(err)
			}
			out, status = run(t, "curl", "-sS", "--http2", "--cacert", s.file("ca.crt"), "-H", "content-type: application/dns-message",
				"--data-binary", "@"+s.file("large"), "-w", "%{http_code}", url)
			if status != 0 || out != "a DNS message has at most 65535 octets\n413" {
				t.Errorf("%d octets: status %d: %s", size, status, out)
			}
		}
		// A header that is too large, and one that is nearly as large as curl lets it be.
		for _, size := range []int{20_000, 60_000} {
			out, status = run(t, "curl", "-sS", "--http2", "--cacert", s.file("ca.crt"), "-H", "x: "+strings.Repeat("!", size), "-o", "/dev/null",
				"-w", "%{http_code}", get)
			if status != 0 || out != "431" {
				t.Errorf("%d octets: status %d: %s", size, status, out)
			}
		}
	})
	noErrors(t, s.gateway)
}
