//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// address is the one that the upstream gives for name: src/fastup.c makes it from an FNV-1a hash of the labels.
func address(name string) netip.Addr {
	hash := uint32(2166136261)
	for label := range strings.SplitSeq(strings.TrimSuffix(name, "."), ".") {
		for _, c := range append([]byte{byte(len(label))}, label...) {
			hash = (hash ^ uint32(c|0x20)) * 16777619
		}
	}
	return netip.AddrFrom4([4]byte{198, 18, byte(hash >> 8), byte(hash)})
}

// floorAddress is the address in the floor's answers.
var floorAddress = netip.MustParseAddr("192.0.2.1")

// judge says what is wrong with an answer.
func judge(q, a *dns.Msg, want netip.Addr) error {
	switch {
	case a.Id != q.Id || !a.Response || len(a.Question) != 1 || !strings.EqualFold(a.Question[0].Name, q.Question[0].Name):
		return fmt.Errorf("it belongs to another question:\n%v", a)
	case a.Rcode != dns.RcodeSuccess || a.Truncated || len(a.Answer) != 1:
		return fmt.Errorf("not one record:\n%v", a)
	}
	if rr, ok := a.Answer[0].(*dns.A); !ok || rr.A.String() != want.String() {
		return fmt.Errorf("want %v:\n%v", want, a)
	}
	return nil
}

// check asks a target over every transport, each name twice: one answer comes from the upstream, one from the cache.
func check(ctx context.Context, t *target, ca string) error {
	pem, err := os.ReadFile(ca)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	config := &tls.Config{RootCAs: roots, ServerName: serverName}
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", dohAddr.String())
		}}
	defer transport.CloseIdleConnections()
	ask := func(network string, addr netip.AddrPort) func(q *dns.Msg) (*dns.Msg, error) {
		client := dns.Client{Net: network, TLSConfig: config.Clone(), Timeout: 3 * time.Second}
		return func(q *dns.Msg) (*dns.Msg, error) {
			a, _, err := client.ExchangeContext(ctx, q, addr.String())
			return a, err
		}
	}
	for i, transport := range []struct {
		name string
		ask  func(q *dns.Msg) (*dns.Msg, error)
	}{
		{"UDP", ask("udp", udpAddr)}, {"TCP", ask("tcp", udpAddr)}, {"DoT", ask("tcp-tls", dotAddr)},
		{"DoH", func(q *dns.Msg) (*dns.Msg, error) { return askHTTPS(ctx, transport, q) }},
	} {
		for _, kind := range []string{"h", "c"} { // the floor relays what has no h in front, over UDP only
			if t.floor && kind != "h" && transport.name != "UDP" {
				continue
			}
			name, want := hostName(kind, 100+i)+".", address(hostName(kind, 100+i))
			if t.floor && kind == "h" {
				want = floorAddress
			}
			for range 2 {
				q := new(dns.Msg).SetQuestion(name, dns.TypeA)
				if transport.name == "DoH" {
					q.Id = 0 // RFC 8484, section 4.1
				}
				a, err := transport.ask(q)
				if err == nil {
					err = judge(q, a, want)
				}
				if err != nil {
					return fmt.Errorf("%s, %s over %s: %w", t.name, name, transport.name, err)
				}
			}
		}
	}
	return nil
}

func dohPath(q []byte) string { return "/dns-query?dns=" + base64.RawURLEncoding.EncodeToString(q) }

func askHTTPS(ctx context.Context, transport *http.Transport, q *dns.Msg) (*dns.Msg, error) {
	raw, err := q.Pack()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+serverName+dohPath(raw), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/dns-message")
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK || resp.ProtoMajor != 2 {
		return nil, fmt.Errorf("%s, %s", resp.Proto, resp.Status)
	}
	a := new(dns.Msg)
	return a, a.Unpack(body)
}

// firstAnswer asks over UDP again and again until a good answer comes, which ends a start.
func firstAnswer(ctx context.Context) error {
	q, err := new(dns.Msg).SetQuestion(hostName("h", 1)+".", dns.TypeA).Pack()
	if err != nil {
		return err
	}
	c, err := net.ListenUDP("udp4", nil) // not connected: a refused datagram would close the way for the next
	if err != nil {
		return err
	}
	defer c.Close()
	b := make([]byte, 2048)
	for ctx.Err() == nil {
		if _, err := c.WriteToUDPAddrPort(q, udpAddr); err != nil {
			return err
		}
		next := time.Now().Add(2 * time.Millisecond)
		if err := c.SetReadDeadline(next); err != nil {
			return err
		}
		for {
			n, err := c.Read(b)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return err
			}
			if n > 12 && bytes.Equal(b[:2], q[:2]) && b[3]&15 == 0 && b[7] > 0 { // NOERROR, with a record
				return nil
			}
		}
	}
	return ctx.Err()
}

// openIdle opens n connections to a TCP or DoT server from many client addresses, asks one question over each, and leaves
// them open.
func openIdle(ctx context.Context, addr netip.AddrPort, encrypted bool, n int) (conns []net.Conn, err error) {
	const sources, parallel = 50, 8
	var mu sync.Mutex
	var errs []error
	numbers := make(chan int)
	var opening sync.WaitGroup
	for range parallel {
		opening.Go(func() {
			for i := range numbers {
				c, err := openOne(ctx, addr, encrypted, net.IPv4(127, 2, 3, byte(1+i%sources)), i)
				mu.Lock()
				if err != nil {
					errs = append(errs, err)
				} else {
					conns = append(conns, c)
				}
				mu.Unlock()
			}
		})
	}
	for i := range n {
		numbers <- i
	}
	close(numbers)
	opening.Wait()
	if len(errs) > 0 { // many of the same: a server that holds fewer is measured with those
		err = fmt.Errorf("%d of %d connections: %w", len(errs), n, errs[0])
	}
	return conns, err
}

func openOne(ctx context.Context, addr netip.AddrPort, encrypted bool, from net.IP, i int) (net.Conn, error) {
	d := &net.Dialer{Timeout: 5 * time.Second, LocalAddr: &net.TCPAddr{IP: from}}
	c, err := d.DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return nil, err
	}
	if encrypted {
		// Whose certificate it is was checked before; here it would only cost the load's core.
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true})
	}
	q := new(dns.Msg).SetQuestion(hostName("h", i%1000)+".", dns.TypeA)
	conn := dns.Conn{Conn: c}
	err = c.SetDeadline(time.Now().Add(5 * time.Second))
	if err == nil {
		err = conn.WriteMsg(q)
	}
	var a *dns.Msg
	if err == nil {
		a, err = conn.ReadMsg()
	}
	if err == nil {
		err = judge(q, a, address(hostName("h", i%1000)))
	}
	if err == nil {
		err = c.SetDeadline(time.Time{})
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}
