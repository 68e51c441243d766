package listen

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/net/http2"

	"dnsgateway/gateway/wire"
)

// TestH2Timing says how long a connection lives on which little has come.
func TestH2Timing(t *testing.T) {
	const idle = 7 * time.Second
	for _, tt := range []struct {
		name string
		do   func(s *h2Script)
		want time.Duration
		last string // what the client is told
	}{
		{"nothing was said", func(s *h2Script) { s.in.Reset() }, idle, "GOAWAY 0 NO_ERROR"},
		{"nothing was asked", func(*h2Script) {}, idle, "GOAWAY 0 NO_ERROR"},
		{"everything was answered", func(s *h2Script) { s.get(1, "hit") }, idle, "GOAWAY 1 NO_ERROR"},
		{"half a frame", func(s *h2Script) { s.in.WriteString("\x00\x00\x08\x06") }, bodyTimeout, "GOAWAY 0 NO_ERROR"},
		{"a request without its body", func(s *h2Script) { s.post(1) }, bodyTimeout, "GOAWAY 1 NO_ERROR"},
		{"a refused request without its end", func(s *h2Script) { s.post(1, "content-length", "100000") }, bodyTimeout, "GOAWAY 1 NO_ERROR"},
		{"half a header block", func(s *h2Script) {
			_ = s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82}})
		}, bodyTimeout, "GOAWAY 0 NO_ERROR"},
		{"a window that stays shut", func(s *h2Script) {
			_ = s.fr.WriteSettings(http2.Setting{ID: settingWindow})
			s.get(1, "hit")
		}, bodyTimeout, "GOAWAY 1 NO_ERROR"},
		{"a miss that takes a minute", func(s *h2Script) { s.get(1, "slow") }, time.Minute + idle, "GOAWAY 1 NO_ERROR"},
		{"a rule broken", func(s *h2Script) { _ = s.fr.WriteRawFrame(frameData, 0, 0, nil) }, 0, "GOAWAY 0 PROTOCOL_ERROR"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inTimeHTTPS(t, idle, func(t *testing.T, h *fake, p *pipes) {
				client := dialH2(t, p)
				time.AfterFunc(time.Minute, func() { close(h.gate) })
				s := newH2Script(t, h)
				_ = s.fr.WriteSettings()
				tt.do(s)
				begin := time.Now()
				go func() { _, _ = client.Write(s.in.Bytes()) }()
				out, err := io.ReadAll(client)
				if took := time.Since(begin); err != nil || took < tt.want || took > tt.want+linger {
					t.Errorf("the connection lived for %v, want %v: %v", took, tt.want, err)
				}
				said, err := h2Frames(out)
				if err != nil || len(said) == 0 || said[len(said)-1] != tt.last {
					t.Errorf("got %q, %v", said, err)
				}
				_ = client.NetConn().Close()
				time.Sleep(time.Minute) // in the bubble: the gate has opened
			})
		})
	}
}

// dialH2 makes the handshake in a bubble, where the year is another than the certificate's.
func dialH2(t *testing.T, p *pipes) *tls.Conn {
	t.Helper()
	cfg := clientConfig("h2")
	cfg.InsecureSkipVerify = true
	client := tls.Client(p.dial(), cfg)
	if err := client.Handshake(); err != nil {
		t.Fatal(err)
	}
	return client
}

// TestHTTPSHandshakeTiming has a client that says nothing at all.
func TestHTTPSHandshakeTiming(t *testing.T) {
	inTimeHTTPS(t, time.Second, func(t *testing.T, _ *fake, p *pipes) {
		if took := ended(p.dial()); took != headerTimeout {
			t.Errorf("it was waited for %v, want %v", took, headerTimeout)
		}
	})
}

// inTimeHTTPS runs test in a bubble with an HTTPS listener on pipes.
func inTimeHTTPS(t *testing.T, idle time.Duration, test func(t *testing.T, h *fake, p *pipes)) {
	synctest.Test(t, func(t *testing.T) {
		h := newFake()
		s, err := ListenHTTPS(t.Context(), HTTPSConfig{Common: common(h), Limits: Limits{Idle: idle}, TLS: serverConfig(), HTTP: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		_ = s.ln.Close()
		p := newPipes()
		s.ln = newAcceptor(p, s.limit, s.cfg.Logger)
		served := make(chan error, 1)
		go func() { served <- s.Serve() }()
		test(t, h, p)
		if err := s.Shutdown(t.Context()); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

// TestH2Many asks by Go's client, a hundred requests at a time on one connection, in every form: each gets its own answer.
func TestH2Many(t *testing.T) {
	s := listenHTTPS(t, HTTPSConfig{Common: common(newFake()), HTTP: []string{"h2"}})
	client := httpClient(t, "h2")
	if _, _, err := get(query(t, "hit", 0)).do(t, client, s.Addr()); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 90 {
		wg.Go(func() {
			for j := range 10 {
				name := [...]string{"hit", "miss", "nxdomain"}[(i+j)%3] + fmt.Sprintf("-%d-%d", i, j)
				if name[0] == 'n' {
					name = "nxdomain"
				}
				req := get(query(t, name, uint16(i)))
				switch {
				case i%3 == 1:
					req = post(query(t, name, uint16(i)))
				case i%3 == 2:
					req = with(req, "X-Padding", strings.Repeat("x", 100*j))
				}
				resp, body, err := req.do(t, client, s.Addr())
				var m dns.Msg
				if err != nil || resp.StatusCode != 200 || m.Unpack(body) != nil || m.Id != uint16(i) ||
					m.Question[0].Name != name+".test." || resp.ProtoMajor != 2 {
					t.Errorf("%s: %v, %v, %v", name, resp, err, &m)
				}
			}
		})
	}
	wg.Wait()
	if n := s.Connections(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// TestH2BigBodies sends the largest message there is, many at a time, with a trailer.
func TestH2BigBodies(t *testing.T) {
	s := listenHTTPS(t, HTTPSConfig{Common: common(newFake()), HTTP: []string{"h2"}})
	client := httpClient(t, "h2")
	m := new(dns.Msg).SetQuestion("hit.test.", dns.TypeA)
	padding := &dns.EDNS0_PADDING{}
	m.Extra = []dns.RR{&dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT, Class: 1232}, Option: []dns.EDNS0{padding}}}
	padding.Padding = make([]byte, wire.MaxMessage-m.Len())
	msg, err := m.Pack()
	if err != nil || len(msg) != wire.MaxMessage {
		t.Fatal(len(msg), err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			req, err := http.NewRequestWithContext(within(t), "POST", "https://"+s.Addr().String()+defaultPath, io.NopCloser(bytes.NewReader(msg)))
			if err != nil {
				t.Error(err)
				return
			}
			req.Header.Set("Content-Type", mediaMessage)
			req.Trailer = http.Header{"X-End": {"yes"}}
			resp, err := client.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			var m dns.Msg
			if err != nil || resp.StatusCode != 200 || m.Unpack(body) != nil || len(m.Answer) != 1 {
				t.Errorf("%v, %v: %s", resp.Status, err, body)
			}
		})
	}
	wg.Wait()
}

// TestH2DrainMany stops with a hundred requests under way: all are answered, and the client is told not to ask more.
func TestH2DrainMany(t *testing.T) {
	h := newFake()
	s := listenHTTPS(t, HTTPSConfig{Common: common(h), HTTP: []string{"h2"}})
	client := httpClient(t, "h2")
	if _, _, err := get(query(t, "hit", 0)).do(t, client, s.Addr()); err != nil {
		t.Fatal(err)
	}
	results := make(chan error, maxStreams)
	for i := range maxStreams {
		go func() {
			resp, body, err := get(query(t, "slow", uint16(i))).do(t, client, s.Addr())
			if err == nil && (resp.StatusCode != 200 || len(body) < 12 || body[1] != byte(i)) {
				err = errors.New(resp.Status)
			}
			results <- err
		}()
	}
	for range maxStreams {
		receive(t, h.waiting)
	}
	done := shutdown(within(t), s)
	if _, _, err := get(query(t, "hit", 0)).do(t, client, s.Addr()); err == nil {
		t.Error("an answer while the listener drains")
	}
	close(h.gate)
	for range maxStreams {
		if err := receive(t, results); err != nil {
			t.Error(err)
		}
	}
	if err := receive(t, done); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
}

// TestH2DoesNotRead has a client that asks and does not read: its connection ends, and the listener serves others.
func TestH2DoesNotRead(t *testing.T) {
	inTimeHTTPS(t, time.Minute, func(t *testing.T, h *fake, p *pipes) {
		client := dialH2(t, p)
		s := newH2Script(t, h)
		_ = s.fr.WriteSettings()
		s.get(1, "hit")
		begin := time.Now()
		if _, err := client.Write(s.in.Bytes()); err != nil {
			t.Fatal(err)
		}
		_, err := client.Write(bytes.Repeat([]byte{0}, 100_000)) // nobody reads it until the server closes
		if took := time.Since(begin); err == nil || took != writeTimeout {
			t.Errorf("the connection lived for %v, want %v: %v", took, writeTimeout, err)
		}
		_ = client.NetConn().Close()
	})
}

// h2Client says what its script has on a connection, and reads frame by frame.
type h2Client struct {
	*h2Script
	conn *tls.Conn
	r    h2Reader
}

// overH2 runs test with an HTTP/2 listener of either driver, and a client that has said which settings it has.
func overH2(t *testing.T, settings []http2.Setting, test func(t *testing.T, h *fake, s *HTTPS, c *h2Client)) {
	for _, driver := range []string{"loops", "goroutines"} {
		t.Run(driver, func(t *testing.T) {
			h := newFake()
			s, err := ListenHTTPS(t.Context(), HTTPSConfig{Common: common(h), TLS: serverConfig(), HTTP: []string{"h2"}})
			if err != nil {
				t.Fatal(err)
			}
			if driver == "goroutines" {
				s.ln.Listener = disguised{s.ln.Listener}
			}
			serve(t, s)
			conn, err := tls.Dial("tcp", s.Addr().String(), clientConfig("h2"))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			c := &h2Client{newH2Script(t, h), conn, newH2Reader(conn)}
			_ = c.fr.WriteSettings(settings...)
			c.send()
			c.expect("SETTINGS 3=100 4=65536 6=16384", "WINDOW 0 983041", "SETTINGS ack")
			test(t, h, s, c)
		})
	}
}

// send sends what was written.
func (c *h2Client) send() {
	c.t.Helper()
	if _, err := c.in.WriteTo(c.conn); err != nil {
		c.t.Fatal(err)
	}
}

// expect reads frames. The end of the connection is one too.
func (c *h2Client) expect(want ...string) {
	c.t.Helper()
	for _, want := range want {
		got, err := c.r.next()
		if err != nil {
			got = err.Error()
		}
		if got != want {
			c.t.Fatalf("got %s, want %s", got, want)
		}
	}
}

// TestH2DrainWindow stops while a request is resolved whose answer has to wait for the client's window: the connection
// ends when all of it was sent.
func TestH2DrainWindow(t *testing.T) {
	small := []http2.Setting{{ID: settingWindow, Val: 10}}
	overH2(t, small, func(t *testing.T, h *fake, s *HTTPS, c *h2Client) {
		c.get(1, "slow")
		c.get(3, "slow")
		c.send()
		receive(t, h.waiting)
		receive(t, h.waiting)
		done := shutdown(within(t), s)
		c.expect("GOAWAY 3 NO_ERROR")
		h.gate <- struct{}{}
		got, err := c.r.next() // of either stream
		first, second := uint32(1), uint32(3)
		if got == "HEADERS 3 200" {
			first, second = second, first
		}
		if want := fmt.Sprintf("HEADERS %d 200", first); err != nil || got != want {
			t.Fatalf("got %s, %v, want %s", got, err, want)
		}
		c.expect(fmt.Sprintf("DATA %d 10", first))
		for range 3 { // the other one may still be resolved, or wait as well
			_ = c.fr.WriteWindowUpdate(first, 10)
			c.send()
			c.expect(fmt.Sprintf("DATA %d 10", first))
		}
		_ = c.fr.WriteWindowUpdate(first, 100)
		c.send()
		c.expect(fmt.Sprintf("DATA %d 12 end", first))
		_ = c.fr.WriteWindowUpdate(second, 100) // before there is something to send
		_ = c.fr.WritePing(false, [8]byte([]byte("is it in")))
		c.send()
		c.expect("PING true is it in")
		h.gate <- struct{}{}
		c.expect(fmt.Sprintf("HEADERS %d 200", second), fmt.Sprintf("DATA %d 52 end", second), io.EOF.Error())
		if err := receive(t, done); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
	})
}

// TestH2DrainShutWindow has that client never open its window: it is not waited for longer than Shutdown may take.
func TestH2DrainShutWindow(t *testing.T) {
	small := []http2.Setting{{ID: settingWindow, Val: 10}}
	overH2(t, small, func(t *testing.T, h *fake, s *HTTPS, c *h2Client) {
		c.get(1, "slow")
		c.send()
		receive(t, h.waiting)
		ctx, cancel := context.WithCancel(t.Context())
		done := shutdown(ctx, s)
		c.expect("GOAWAY 1 NO_ERROR")
		close(h.gate)
		c.expect("HEADERS 1 200", "DATA 1 10")
		cancel()
		if err := receive(t, done); !errors.Is(err, context.Canceled) {
			t.Errorf("Shutdown: %v, want %v", err, context.Canceled)
		}
		receive(t, s.done)
	})
}

// TestH2LastWord has a client that is sent away in the middle of what it says: it can go on for a while, so that it comes to
// reading why.
func TestH2LastWord(t *testing.T) {
	overH2(t, nil, func(t *testing.T, _ *fake, s *HTTPS, c *h2Client) {
		block := make([]byte, maxFrame)
		_ = c.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndStream: true})
		for range maxBlock / maxFrame {
			_ = c.fr.WriteContinuation(1, false, block)
		}
		c.send()
		c.expect("GOAWAY 1 ENHANCE_YOUR_CALM")
		for range lingerMost/maxFrame - 10 {
			_ = c.fr.WriteContinuation(1, false, block)
		}
		c.send()
		c.expect(io.EOF.Error())
	})
}
