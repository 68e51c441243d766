package lab

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	"github.com/quic-go/quic-go"
)

func TestParseFault(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want Fault
		text string // what String gives
	}{
		{"ok", Fault{}, "ok"},
		{"dead", Fault{Kind: Dead}, "dead"},
		{" silent ", Fault{Kind: Silent}, "silent"},
		{"slow", Fault{Kind: Slow, Duration: 2 * time.Second}, "slow:2s"},
		{"slow:250ms", Fault{Kind: Slow, Duration: 250 * time.Millisecond}, "slow:250ms"},
		{"servfail", Fault{Kind: ServFail}, "servfail"},
		{"refused", Fault{Kind: Refused}, "refused"},
		{"badcert", Fault{Kind: BadCert}, "badcert"},
		{"expired-cert", Fault{Kind: ExpiredCert}, "expired-cert"},
		{"unknown-ca", Fault{Kind: UnknownCA}, "unknown-ca"},
		{"garbage", Fault{Kind: Garbage}, "garbage"},
		{"wrong-id", Fault{Kind: WrongID}, "wrong-id"},
		{"wrong-question", Fault{Kind: WrongQuestion}, "wrong-question"},
		{"truncated", Fault{Kind: Truncated}, "truncated"},
		{"rst", Fault{Kind: RST}, "rst"},
		{"flap", Fault{Kind: Flap, Duration: time.Second}, "flap:1s"},
		{"flap:100ms", Fault{Kind: Flap, Duration: 100 * time.Millisecond}, "flap:100ms"},
		{"tlshang", Fault{Kind: TLSHang}, "tlshang"},
		{"stuck", Fault{Kind: Stuck}, "stuck"},
		{"loss", Fault{Kind: Loss, Share: 0.3}, "loss:30%"},
		{"loss:29%", Fault{Kind: Loss, Share: 0.29}, "loss:29%"},
		{"loss:0.5%", Fault{Kind: Loss, Share: 0.005}, "loss:0.5%"},
		{"loss:100%", Fault{Kind: Loss, Share: 1}, "loss:100%"},
	} {
		got, err := ParseFault(tt.in)
		if err != nil || got != tt.want || got.String() != tt.text {
			t.Errorf("%q: got %v, %v, want %v (%s)", tt.in, got, err, tt.want, tt.text)
		}
		if again, err := ParseFault(got.String()); err != nil || again != got {
			t.Errorf("%q: its text parses to %v, %v", tt.in, again, err)
		}
	}
	for in, want := range map[string]string{
		"":           `unknown fault ""; the faults are ok, dead, silent, slow[:2s], `,
		"broken":     `unknown fault "broken"; the faults are ok, `,
		"ok:2s":      `unknown fault "ok"; the faults are `,
		"dead:2s":    "fault dead takes no duration",
		"slow:":      `fault slow: "" is not a duration such as 2s`,
		"slow:2":     `fault slow: "2" is not a duration such as 2s`,
		"flap:-1s":   `fault flap: "-1s" is not a duration such as 2s`,
		"flap:1s:2s": `fault flap: "1s:2s" is not a duration such as 2s`,
		"stuck:1s":   "fault stuck takes no duration",
		"loss:":      `fault loss: "" is not a share such as 30%`,
		"loss:0.3":   `fault loss: "0.3" is not a share such as 30%`,
		"loss:0%":    `fault loss: "0%" is not a share such as 30%`,
		"loss:101%":  `fault loss: "101%" is not a share such as 30%`,
		"loss:NaN%":  `fault loss: "NaN%" is not a share such as 30%`,
	} {
		if _, err := ParseFault(in); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: got error %v, want %q", in, err, want)
		}
	}
}

func TestSetFaultChecks(t *testing.T) {
	l := startLab(t, Config{})
	for _, tt := range []struct {
		server string
		fault  Fault
		want   string
	}{
		{"udp", Fault{Kind: BadCert}, "server udp: fault badcert needs an encrypted server, and udp is none"},
		{"tcp", Fault{Kind: TLSHang}, "server tcp: fault tlshang needs an encrypted server, and tcp is none"},
		{"tls", Fault{Kind: "broken"}, `server tls: unknown fault "broken"`},
		{"tls", Fault{Kind: Slow}, "server tls: fault slow needs a duration"},
		{"quic", Fault{Kind: Flap, Duration: -1}, "server quic: fault flap needs a duration"},
		{"tls", Fault{Kind: Loss}, "server tls: fault loss needs a share above 0 and at most 1"},
		{"udp", Fault{Kind: Stuck}, "server udp: fault stuck needs connections, and udp has none"},
	} {
		s := l.Server(tt.server)
		if err := s.SetFault(tt.fault); err == nil || err.Error() != tt.want {
			t.Errorf("got error %v, want %s", err, tt.want)
		}
		if got := s.Fault(); got != (Fault{}) {
			t.Errorf("%s: got fault %v after an error", s.Name(), got)
		}
	}
}

// expect is what a client of a new connection sees of a fault.
type expect func(t *testing.T, s *Server, resp *dns.Msg, err error)

func rcode(want int) expect {
	return func(t *testing.T, _ *Server, resp *dns.Msg, err error) {
		if err != nil || resp.Rcode != want {
			t.Errorf("got %v, %v, want %s", resp, err, dns.RcodeToString[want])
		}
	}
}

func silence(t *testing.T, _ *Server, resp *dns.Msg, err error) {
	if !isTimeout(err) {
		t.Errorf("got %v, %v, want a timeout", resp, err)
	}
}

func refusedPort(t *testing.T, s *Server, resp *dns.Msg, err error) {
	switch {
	case s.Scheme() == H3 || s.Scheme() == QUIC: // quic-go does not hear of ICMP
		silence(t, s, resp, err)
	case !errors.Is(err, syscall.ECONNREFUSED):
		t.Errorf("got %v, %v, want a refused connection", resp, err)
	}
}

// badCert wants an error that says text, whatever layer wraps it.
func badCert(text string) expect {
	return func(t *testing.T, s *Server, resp *dns.Msg, err error) {
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("got %v, %v, want an error with %q", resp, err, text)
		}
		if got := s.Queries(); got != 0 {
			t.Errorf("got %d queries, want none before the certificate is believed", got)
		}
	}
}

func anyError(t *testing.T, _ *Server, resp *dns.Msg, err error) {
	if err == nil || isTimeout(err) {
		t.Errorf("got %v, %v, want an error at once", resp, err)
	}
}

// Each fault does what its name says on a new connection over each transport, and the server is well when it is healed.
func TestFaults(t *testing.T) {
	tests := []struct {
		fault Fault
		want  expect
		wait  time.Duration
	}{
		{Fault{Kind: Dead}, refusedPort, haste},
		{Fault{Kind: Flap, Duration: time.Hour}, refusedPort, haste},
		{Fault{Kind: Silent}, silence, haste},
		{Fault{Kind: TLSHang}, silence, haste},
		{Fault{Kind: Slow, Duration: time.Hour}, silence, haste},
		{Fault{Kind: Slow, Duration: 50 * time.Millisecond}, rcode(dns.RcodeSuccess), patience},
		{Fault{Kind: ServFail}, rcode(dns.RcodeServerFailure), patience},
		{Fault{Kind: Refused}, rcode(dns.RcodeRefused), patience},
		{Fault{Kind: BadCert}, badCert("wrong.lab.test"), patience},
		{Fault{Kind: ExpiredCert}, badCert("expired"), patience},
		{Fault{Kind: UnknownCA}, badCert("unknown authority"), patience},
		{Fault{Kind: Garbage}, anyError, patience},
		{Fault{Kind: Stuck}, rcode(dns.RcodeSuccess), patience},
		{Fault{Kind: Loss, Share: 1}, silence, haste},
		{Fault{Kind: WrongID}, func(t *testing.T, s *Server, resp *dns.Msg, err error) {
			want := query(s.Scheme(), "b.lab.test.", dns.TypeA).Id ^ 0x5555
			if err != nil || resp.Id != want || len(resp.Answer) != 1 {
				t.Errorf("got %v, %v, want an answer with ID %d", resp, err, want)
			}
		}, patience},
		{Fault{Kind: WrongQuestion}, func(t *testing.T, _ *Server, resp *dns.Msg, err error) {
			if err != nil || len(resp.Question) != 1 || resp.Question[0].Name != "wrong.lab.test." {
				t.Errorf("got %v, %v, want another question", resp, err)
			}
		}, patience},
		{Fault{Kind: Truncated}, anyError, patience},
		{Fault{Kind: RST}, func(t *testing.T, s *Server, resp *dns.Msg, err error) {
			if s.Scheme() == UDP {
				silence(t, s, resp, err)
				return
			}
			anyError(t, s, resp, err)
			if !isReset(err) {
				t.Errorf("got error %v, want a reset", err)
			}
		}, patience},
	}
	for _, tt := range tests {
		t.Run(tt.fault.String(), func(t *testing.T) {
			l := startLab(t, Config{})
			for _, s := range l.Servers() {
				if tt.fault.check(s.Scheme()) != nil {
					continue
				}
				t.Run(s.Name(), func(t *testing.T) {
					if err := s.SetFault(tt.fault); err != nil {
						t.Fatal(err)
					}
					if got := s.Fault(); got != tt.fault {
						t.Errorf("got fault %v, want %v", got, tt.fault)
					}
					wait := tt.wait
					if tt.fault.Kind == RST && s.Scheme() == UDP {
						wait = haste
					}
					resp, err := askNew(t, l, s, "b.lab.test.", wait)
					tt.want(t, s, resp, err)
					addr := s.Addr()
					if err := s.SetFault(Fault{}); err != nil {
						t.Fatal(err)
					}
					if s.Addr() != addr {
						t.Errorf("healed at %v, want %v", s.Addr(), addr)
					}
					resp, err = askNew(t, l, s, "b.lab.test.", patience)
					rcode(dns.RcodeSuccess)(t, s, resp, err)
				})
			}
		})
	}
}

// isReset also takes an end inside the body: the kernel tells of a reset once, and the client of HTTP/2 may learn it while
// it writes.
func isReset(err error) bool {
	var app *quic.ApplicationError
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &app) || strings.Contains(err.Error(), "H3_INTERNAL_ERROR")
}

// A connection that was open when the fault began follows it.
func TestOpenConnectionsFollow(t *testing.T) {
	for _, tt := range []struct {
		fault  Fault
		want   expect
		wait   time.Duration
		closes bool // the connection is closed under the client
	}{
		{Fault{Kind: Silent}, silence, haste, false},
		{Fault{Kind: Stuck}, silence, haste, false},
		{Fault{Kind: ServFail}, rcode(dns.RcodeServerFailure), patience, false},
		{Fault{Kind: Garbage}, anyError, patience, false},
		{Fault{Kind: Dead}, refusedPort, haste, true},
		{Fault{Kind: BadCert}, badCert("wrong.lab.test"), patience, true},
		{Fault{Kind: TLSHang}, silence, haste, true},
	} {
		t.Run(tt.fault.String(), func(t *testing.T) {
			l := startLab(t, Config{})
			for _, s := range l.Servers() {
				if tt.fault.check(s.Scheme()) != nil {
					continue
				}
				t.Run(s.Name(), func(t *testing.T) {
					c := newClient(t, l, s)
					resp, err := c.ask(t, query(s.Scheme(), "b.lab.test.", dns.TypeA), patience)
					rcode(dns.RcodeSuccess)(t, s, resp, err)
					s.queries.Store(0)
					if err := s.SetFault(tt.fault); err != nil {
						t.Fatal(err)
					}
					if tt.closes && c.conn != nil && s.Scheme() != UDP {
						if _, err := c.conn.Read(make([]byte, 1)); err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
							t.Errorf("got %v on the open connection, want its end", err)
						}
						c.conn = nil // and the next one is refused
					}
					if tt.closes && c.quic != nil {
						select {
						case <-c.quic.Context().Done():
						case <-time.After(patience):
							t.Error("the open connection lives")
						}
						c.quic = nil
					}
					resp, err = c.ask(t, query(s.Scheme(), "b.lab.test.", dns.TypeA), tt.wait)
					tr, ok := transport(c)
					if ok && tt.closes && err != nil && !isTimeout(err) && !errors.Is(err, syscall.ECONNREFUSED) {
						// net/http may have learned of the end only by trying.
						tr.CloseIdleConnections()
						resp, err = c.ask(t, query(s.Scheme(), "b.lab.test.", dns.TypeA), tt.wait)
					}
					tt.want(t, s, resp, err)
				})
			}
		})
	}
}

func transport(c *client) (interface{ CloseIdleConnections() }, bool) {
	if c.http == nil {
		return nil, false
	}
	tr, ok := c.http.Transport.(interface{ CloseIdleConnections() })
	return tr, ok
}

// Half of a frame arrives, and then the end.
func TestTruncatedFrame(t *testing.T) {
	l := startLab(t, Config{})
	for _, scheme := range []Scheme{TCP, TLS, QUIC} {
		s := l.Server(string(scheme))
		if err := s.SetFault(Fault{Kind: Truncated}); err != nil {
			t.Fatal(err)
		}
		c := newClient(t, l, s)
		raw, err := query(scheme, "b.lab.test.", dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		var r io.Reader
		if scheme == QUIC {
			c.exchangeQUIC(ctx, raw) // dials; fails on the frame
			stream, err := c.quic.OpenStreamSync(ctx)
			if err != nil {
				t.Fatal(err)
			}
			stream.Write(frame(raw))
			stream.Close()
			r = stream
		} else {
			if err := c.dial(ctx); err != nil {
				t.Fatal(err)
			}
			c.conn.Write(frame(raw))
			r = c.conn
		}
		announced, got, err := rawFrame(r)
		if err != nil || len(got) == 0 || len(got) >= announced {
			t.Errorf("%s: got %d of %d octets, %v, want a part and an orderly end", scheme, len(got), announced, err)
		}
	}
	// Over HTTP the length is announced and the body is short; the client of HTTP/3 does not compare.
	for _, scheme := range []Scheme{HTTPS, H3} {
		s := l.Server(string(scheme))
		if err := s.SetFault(Fault{Kind: Truncated}); err != nil {
			t.Fatal(err)
		}
		c := newClient(t, l, s)
		raw, _ := query(scheme, "b.lab.test.", dns.TypeA).Pack()
		url := "https://" + s.Addr().String() + dohPath
		req, _ := http.NewRequestWithContext(t.Context(), "POST", url, strings.NewReader(string(raw)))
		req.Header.Set("Content-Type", dohMedia)
		resp, err := c.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err == nil && scheme != H3 || len(body) == 0 || int64(len(body)) >= resp.ContentLength {
			t.Errorf("%s: got %d of %d octets, %v, want a part and an error", scheme, len(body), resp.ContentLength, err)
		}
	}
}

// Connections that were open when Stuck began stay silent when the server is healed; those that came since are well.
func TestStuckStays(t *testing.T) {
	l := startLab(t, Config{})
	for _, s := range l.Servers() {
		if s.Scheme() == UDP {
			continue
		}
		t.Run(s.Name(), func(t *testing.T) {
			q := query(s.Scheme(), "b.lab.test.", dns.TypeA)
			old, young := newClient(t, l, s), newClient(t, l, s)
			resp, err := old.ask(t, q, patience)
			rcode(dns.RcodeSuccess)(t, s, resp, err)
			if err := s.SetFault(Fault{Kind: Stuck}); err != nil {
				t.Fatal(err)
			}
			resp, err = young.ask(t, q, patience)
			rcode(dns.RcodeSuccess)(t, s, resp, err)
			if err := s.SetFault(Fault{}); err != nil {
				t.Fatal(err)
			}
			resp, err = young.ask(t, q, patience)
			rcode(dns.RcodeSuccess)(t, s, resp, err)
			resp, err = old.ask(t, q, haste)
			silence(t, s, resp, err)
		})
	}
}

// Of many answers about the share of Loss never comes, on one connection, and none that comes is damaged.
func TestLoss(t *testing.T) {
	l := startLab(t, Config{Servers: []ServerConfig{{Name: "a", Scheme: TLS, Fault: Fault{Kind: Loss, Share: 0.3}}}})
	s := l.Server("a")
	c := newClient(t, l, s)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := c.dial(ctx); err != nil {
		t.Fatal(err)
	}
	const asked = 1000
	for i := range asked {
		q := query(TLS, "b.lab.test.", dns.TypeA)
		q.Id = uint16(i)
		raw, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.conn.Write(frame(raw)); err != nil {
			t.Fatal(err)
		}
	}
	c.conn.(*tls.Conn).CloseWrite() // the server answers what it will and then ends the connection
	got := 0
	for {
		raw, err := readFrame(c.conn)
		if err != nil {
			break
		}
		resp := new(dns.Msg)
		if err := resp.Unpack(raw); err != nil || len(resp.Answer) != 1 {
			t.Fatalf("got %v, %v", resp, err)
		}
		got++
	}
	// The standard deviation is 14.5: seven of them, and one run in 10^11 fails.
	if lost := asked - got; lost < 200 || lost > 400 {
		t.Errorf("%d of %d answers were lost, want about 300", lost, asked)
	}
}

// Nobody can resume a session of the time before a certificate became bad.
func TestBadCertIsNotResumed(t *testing.T) {
	l := startLab(t, Config{Servers: []ServerConfig{{Name: "a", Scheme: TLS}}})
	s := l.Server("a")
	conf := &tls.Config{RootCAs: l.Roots(), ServerName: s.HostName(), ClientSessionCache: tls.NewLRUClientSessionCache(8)}
	c := newClient(t, l, s)
	c.tls = conf
	if _, err := c.ask(t, query(TLS, "b.lab.test.", dns.TypeA), patience); err != nil { // reads the ticket, too
		t.Fatal(err)
	}
	if err := s.SetFault(Fault{Kind: UnknownCA}); err != nil {
		t.Fatal(err)
	}
	var unknown x509.UnknownAuthorityError
	if conn, err := tls.Dial("tcp", s.Addr().String(), conf); !errors.As(err, &unknown) {
		t.Errorf("got %v, %v, want an unknown authority", conn, err)
	}
}

func TestFlapGoesUpAndDown(t *testing.T) {
	l := startLab(t, Config{})
	for _, s := range l.Servers() {
		if err := s.SetFault(Fault{Kind: Flap, Duration: 50 * time.Millisecond}); err != nil {
			t.Fatal(err)
		}
		mode := func() mode {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.mode
		}
		changes, last := 0, mode()
		for deadline := time.Now().Add(patience); changes < 4 && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			if m := mode(); m != last {
				changes, last = changes+1, m
			}
		}
		if changes < 4 {
			t.Errorf("%s: got %d changes, want 4", s.Name(), changes)
		}
		if err := s.SetFault(Fault{}); err != nil {
			t.Fatal(err)
		}
		resp, err := askNew(t, l, s, "b.lab.test.", patience)
		rcode(dns.RcodeSuccess)(t, s, resp, err)
	}
}

// Faults change from many goroutines while clients ask: no race, no panic, and the last word counts.
func TestFaultsChangeWhileClientsAsk(t *testing.T) {
	l := startLab(t, Config{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ctx.Err() == nil; i++ {
			for _, s := range l.Servers() {
				f := defaults[i%len(defaults)]
				f.Duration = time.Millisecond
				s.SetFault(f) // some schemes refuse some faults
			}
		}
	}()
	for range 10 {
		for _, s := range l.Servers() {
			askNew(t, l, s, "b.lab.test.", 20*time.Millisecond) // anything may come of it
		}
	}
	cancel()
	<-done
	for _, s := range l.Servers() {
		if err := s.SetFault(Fault{}); err != nil {
			t.Fatal(err)
		}
		resp, err := askNew(t, l, s, "b.lab.test.", patience)
		rcode(dns.RcodeSuccess)(t, s, resp, err)
	}
}

func TestGarbageDependsOnTheQuestion(t *testing.T) {
	a, b := []byte("\x00\x01question one"), []byte("\x77\x01question one")
	b[1] = 0x99
	if diff := cmp.Diff(garbage(seed(a)), garbage(seed(b))); diff != "" {
		t.Errorf("the ID changes the garbage:\n%s", diff)
	}
	if cmp.Equal(garbage(seed(a)), garbage(seed([]byte("\x00\x01question two")))) {
		t.Error("two questions have the same garbage")
	}
}
