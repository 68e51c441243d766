package listen

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"dnsgateway/gateway/wire"
)

// TestStreamOneWrite sends many queries in one segment: their answers come back in one, and in one TLS record.
func TestStreamOneWrite(t *testing.T) {
	overBoth(t, func(t *testing.T, cfg StreamConfig, _ *fake) {
		cfg.Handler = echo{}
		c := dialStream(t, listenStream(t, cfg))
		secure := cfg.TLS != nil
		var records recordCounter
		if secure {
			records.Conn = c.raw
			c.Conn = tls.Client(&records, clientConfig("dot"))
		}
		c.send(framed(query(t, "first", 1))) // with the handshake
		c.want(1)
		records.n = 0
		var all []byte
		for i := range 64 {
			all = append(all, framed(query(t, fmt.Sprint("hit", i), uint16(i)))...)
		}
		c.send(all)
		if secure {
			if _, err := io.ReadFull(c, make([]byte, len(all))); err != nil || records.n != 1 {
				t.Errorf("got %d records and %v, want one record", records.n, err)
			}
			return
		}
		if n, err := c.Read(make([]byte, 2*len(all))); n != len(all) || err != nil {
			t.Errorf("the first read brings %d octets and %v, want all %d", n, err, len(all))
		}
	})
}

// recordCounter counts the TLS records that its connection brings.
type recordCounter struct {
	net.Conn
	n, rest int
	header  []byte
}

func (r *recordCounter) Read(b []byte) (int, error) {
	n, err := r.Conn.Read(b)
	for part := b[:n]; len(part) > 0; {
		if r.rest > 0 {
			some := min(r.rest, len(part))
			r.rest, part = r.rest-some, part[some:]
			continue
		}
		r.header, part = append(r.header, part[0]), part[1:]
		if len(r.header) == 5 {
			r.rest = int(binary.BigEndian.Uint16(r.header[3:]))
			r.header = r.header[:0]
			r.n++
		}
	}
	return n, err
}

// TestStreamManyConnections has many clients ask hits and misses in any order at once.
func TestStreamManyConnections(t *testing.T) {
	for name, clients := range map[string]int{"tcp": 1000, "dot": 200} {
		t.Run(name, func(t *testing.T) {
			cfg := StreamConfig{Common: common(newFake())}
			if name == "dot" {
				cfg.TLS = serverConfig()
			}
			s := listenStream(t, cfg)
			var all sync.WaitGroup
			for k := range clients {
				c := dialStream(t, s)
				_ = c.raw.SetDeadline(time.Now().Add(30 * time.Second))
				all.Go(func() {
					const rounds, batch = 3, 8
					for round := range rounds {
						var msgs [][]byte
						var want []int
						for i := range batch {
							id := uint16(k*rounds*batch + round*batch + i)
							msgs = append(msgs, query(t, []string{"hit", "miss", "miss"}[(k+i)%3], id))
							want = append(want, int(id))
						}
						if _, err := c.Write(framed(msgs...)); err != nil {
							t.Error(err)
							return
						}
						var got []int
						for range batch {
							m, err := readFramed(c)
							if err != nil {
								t.Error(err)
								return
							}
							got = append(got, int(m.Id))
						}
						slices.Sort(got)
						slices.Sort(want)
						if !slices.Equal(got, want) {
							t.Errorf("got %v, want %v", got, want)
							return
						}
					}
				})
			}
			all.Wait()
			if n := s.Connections(); n != clients {
				t.Errorf("%d connections are open, want %d", n, clients)
			}
		})
	}
}

// TestStreamSlowReader floods a connection with large queries and begins to read when no more is taken: all answers come.
func TestStreamSlowReader(t *testing.T) {
	overBoth(t, func(t *testing.T, cfg StreamConfig, _ *fake) {
		cfg.Handler = echo{}
		c := dialStream(t, listenStream(t, cfg))
		const n, size = 400, 50000
		var sent atomic.Int32
		go func() {
			for i := range n {
				msg := make([]byte, size)
				binary.BigEndian.PutUint16(msg, uint16(i))
				if _, err := c.Write(framed(msg)); err != nil {
					t.Error(err)
					return
				}
				sent.Add(1)
			}
		}()
		for last := int32(-1); sent.Load() != last; {
			last = sent.Load()
			<-time.After(200 * time.Millisecond)
		}
		if sent.Load() == n {
			t.Fatal("the listener reads on and on")
		}
		r := bufio.NewReader(c)
		for i := range n {
			answer := make([]byte, prefixLen+size)
			if _, err := io.ReadFull(r, answer); err != nil {
				t.Fatalf("answer %d: %v", i, err)
			}
			if id := binary.BigEndian.Uint16(answer[prefixLen:]); int(id) != i {
				t.Fatalf("got answer %d, want %d", id, i)
			}
		}
	})
}

// TestStreamResets has clients go away in the middle of everything. Nothing stays behind.
func TestStreamResets(t *testing.T) {
	overBoth(t, func(t *testing.T, cfg StreamConfig, h *fake) {
		s := listenStream(t, cfg)
		for i := range 40 {
			c := dialStream(t, s)
			c.send(framed(query(t, "hit", 1), query(t, "slow", 2)))
			if i%2 == 0 {
				c.want(1)
			}
			c.send([]byte{0, 40, 1})
			if i%4 < 2 {
				_ = c.raw.SetLinger(0)
			}
			_ = c.raw.Close()
		}
		close(h.gate)
		awaitConns(t, s, 0)
	})
}

// awaitConns waits until n connections are open.
func awaitConns(t *testing.T, s *Stream, n int) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); s.Connections() != n; {
		if time.Now().After(end) {
			t.Fatalf("%d connections are open, want %d", s.Connections(), n)
		}
		<-time.After(time.Millisecond)
	}
}

// TestStreamNobodyReadsAnything is TestStreamNobodyReadsMuch with sockets and a loop: their buffers take something first.
func TestStreamNobodyReadsAnything(t *testing.T) {
	h := &bulky{gate: make(chan struct{})}
	s := listenStream(t, StreamConfig{Common: common(h)})
	for range 3 {
		c := dialStream(t, s)
		_ = c.raw.SetReadBuffer(4096)
		var queries [][]byte
		for i := range defaultPipeline {
			queries = append(queries, query(t, "miss", uint16(i)))
		}
		c.send(framed(queries...))
	}
	begin := time.Now()
	close(h.gate)
	awaitConns(t, s, 0)
	if d := time.Since(begin); d > writeTimeout/2 {
		t.Errorf("they were closed after %v", d)
	}
}

// TestStreamShutdownUnderLoad shuts down while clients ask and ask: every query that was taken is answered, and the
// connections end with a FIN, after close_notify.
func TestStreamShutdownUnderLoad(t *testing.T) {
	overBoth(t, func(t *testing.T, cfg StreamConfig, h *fake) {
		s := listenStream(t, cfg)
		var clients sync.WaitGroup
		var answers atomic.Int64
		begun := make(chan struct{}, 100)
		for range 20 {
			c := dialStream(t, s)
			c.send(framed(query(t, "hit", 0)))
			c.want(0)
			answers.Add(1)
			clients.Go(func() {
				window, over := make(chan struct{}, 60), make(chan struct{})
				defer close(over)
				go func() {
					for i := 0; ; i++ {
						for range 3 {
							select {
							case window <- struct{}{}:
							case <-over:
								return
							}
						}
						if _, err := c.Write(framed(query(t, "hit", 1), query(t, "miss", 2), query(t, "hit", 3))); err != nil {
							return
						}
						if i == 3 {
							begun <- struct{}{}
						}
					}
				}()
				for {
					_, err := readFramed(c)
					if err != nil {
						if !errors.Is(err, io.EOF) {
							t.Errorf("the connection ended with %v", err)
						}
						_ = c.raw.Close()
						return
					}
					answers.Add(1)
					<-window
				}
			})
		}
		for range 20 {
			receive(t, begun)
		}
		if err := s.Shutdown(within(t)); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		clients.Wait()
		if got, want := answers.Load(), int64(len(h.queries())); got != want {
			t.Errorf("%d answers to %d queries", got, want)
		}
	})
}

// TestStreamTimes has the times of connections on real sockets, where no bubble's clock rules.
func TestStreamTimes(t *testing.T) {
	const idle, message, handshake = 400 * time.Millisecond, 300 * time.Millisecond, 250 * time.Millisecond
	tests := []struct {
		name string
		want time.Duration
		do   func(t *testing.T, c *streamClient, h *fake)
	}{
		{"idle", idle, func(_ *testing.T, c *streamClient, _ *fake) {
			if tc, ok := c.Conn.(*tls.Conn); ok {
				_ = tc.Handshake()
			}
		}},
		{"idle after an answer", idle, func(t *testing.T, c *streamClient, _ *fake) {
			c.send(framed(query(t, "hit", 1)))
			c.want(1)
			<-time.After(idle / 2)
			c.send(framed(query(t, "hit", 2)))
			c.want(2)
		}},
		{"a message that does not end", message, func(t *testing.T, c *streamClient, _ *fake) {
			c.send(append(framed(query(t, "hit", 1)), 0, 40))
			c.want(1)
		}},
		{"a TLS record that does not end", idle, func(t *testing.T, c *streamClient, _ *fake) {
			c.send(framed(query(t, "hit", 1)))
			c.want(1)
			if _, ok := c.Conn.(*tls.Conn); !ok {
				return
			}
			// Octets now and then are nothing that a client has said.
			dripped := make(chan struct{})
			t.Cleanup(func() { <-dripped })
			go func() {
				defer close(dripped)
				_, err := c.raw.Write([]byte{23, 3, 3, 0x40, 0})
				for tick := time.NewTicker(idle / 8); err == nil; <-tick.C {
					_, err = c.raw.Write([]byte{1})
				}
			}()
		}},
		{"idle after a miss", idle, func(t *testing.T, c *streamClient, h *fake) {
			c.send(framed(query(t, "slow", 1)))
			receive(t, h.waiting)
			<-time.After(2 * idle)
			h.gate <- struct{}{}
			c.want(1)
		}},
	}
	overBoth(t, func(t *testing.T, cfg StreamConfig, h *fake) {
		cfg.Idle, cfg.Message, cfg.Handshake = idle, message, handshake
		s := listenStream(t, cfg)
		for _, tt := range tests {
			c := dialStream(t, s)
			tt.do(t, c, h)
			begin := time.Now()
			c.end()
			// The clock of this test begins when the answer is here; the server's began a little earlier.
			if d := time.Since(begin); d < tt.want-50*time.Millisecond || d > tt.want+500*time.Millisecond {
				t.Errorf("%s: closed after %v, want %v", tt.name, d, tt.want)
			}
		}
	})
}

// brokenMachine is a machine with a fault.
type brokenMachine struct {
	*dnsMachine
	fault string
}

func (m *brokenMachine) input(t *turn, data []byte) (used int, err error) {
	if m.fault == "answer panics" {
		return m.dnsMachine.input(t, data)
	}
	used, _ = m.dnsMachine.input(t, data) // there are misses
	if m.fault == "input panics" {
		panic("ordered by the test")
	}
	t.out = append(t.out, "goodbye"...)
	return used, errors.New("ordered by the test")
}

func (m *brokenMachine) answer(t *turn, q *miss, msg []byte) {
	m.dnsMachine.answer(t, q, msg)
	if m.fault == "answer panics" {
		panic("ordered by the test")
	}
}

// TestMachineFaults has a machine fail while misses are under way: the connection ends when all was said. And it has one
// panic: that costs one connection, of which nothing is left, and not the process.
func TestMachineFaults(t *testing.T) {
	for _, fault := range []string{"input fails", "input panics", "answer panics"} {
		for _, driver := range []string{"loops", "goroutines"} {
			t.Run(fault+", "+driver, func(t *testing.T) {
				var log syncBuffer
				h := newFake()
				c := common(h)
				c.Logger = slog.New(slog.NewTextHandler(&log, nil))
				ln, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					t.Fatal(err)
				}
				if driver == "goroutines" {
					ln = disguised{ln}
				}
				limit := newConnLimit(Limits{}.withDefaults())
				a := newAcceptor(ln, limit, c.Logger)
				s := newStreams(context.Background(), &c, limit, time.Minute, time.Minute)
				client, err := net.Dial("tcp", ln.Addr().String())
				if err != nil {
					t.Fatal(err)
				}
				nc, err := a.Accept()
				if err != nil {
					t.Fatal(err)
				}
				s.add(nc, nil, &brokenMachine{newDNSMachine(newPeer(&c, nc, wire.TCP), defaultPipeline), fault})
				const misses = 3
				_, _ = client.Write(framed(query(t, "slow", 1), query(t, "slow", 2), query(t, "slow", 3)))
				if fault != "input panics" { // of which the driver has not heard then
					for range misses {
						receive(t, h.waiting)
					}
				}
				close(h.gate)
				_ = client.SetReadDeadline(time.Now().Add(10 * time.Second))
				if fault == "input fails" {
					said := make([]byte, len("goodbye"))
					if _, err := io.ReadFull(client, said); err != nil || string(said) != "goodbye" {
						t.Errorf("got %q, %v", said, err)
					}
					for range misses {
						if _, err := readFramed(client); err != nil {
							t.Error(err)
						}
					}
				}
				if got, err := io.ReadAll(client); len(got) > 0 {
					t.Errorf("got %q and %v, want the end", got, err)
				}
				_ = client.Close()
				_ = a.Close()
				over := make(chan struct{})
				go func() {
					defer close(over)
					s.wait()
				}()
				receive(t, over)
				if panics := strings.HasSuffix(fault, "panics"); strings.Contains(log.String(), "panic") != panics || limit.open() != 0 {
					t.Errorf("%d connections are open; the log says %q", limit.open(), log.String())
				}
			})
		}
	}
}

// syncBuffer is written by several goroutines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// TestStreamTLSErrors sends what is no record after the handshake: the client is told so, and the connection ends.
func TestStreamTLSErrors(t *testing.T) {
	s := listenStream(t, StreamConfig{Common: common(newFake()), TLS: serverConfig()})
	c := dialStream(t, s)
	c.send(framed(query(t, "hit", 1)))
	c.want(1)
	if _, err := c.raw.Write([]byte("\x17\x03\x03\x00\x20this is not what TLS has sealed.")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 10)); err == nil || !strings.Contains(err.Error(), "bad record MAC") {
		t.Errorf("got %v, want the alert bad_record_mac", err)
	}
	awaitConns(t, s, 0)
}

// TestStreamKeyUpdate has openssl ask for new keys between two queries (RFC 8446, section 4.6.3); Go's client cannot.
func TestStreamKeyUpdate(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("left out: openssl is not installed")
	}
	s := listenStream(t, StreamConfig{Common: common(newFake()), TLS: serverConfig()})
	cmd := exec.CommandContext(within(t), "openssl", "s_client", "-connect", s.Addr().String(), "-tls1_3")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(out) // which brings much besides answers
	await := func(text string) {
		t.Helper()
		for seen := []byte(nil); !bytes.HasSuffix(seen, []byte(text)); {
			b, err := r.ReadByte()
			if err != nil {
				t.Fatalf("waiting for %q: %v; got %q", text, err, seen)
			}
			seen = append(seen, b)
		}
	}
	for i := range 3 {
		question := query(t, fmt.Sprint("hit", i), 7)
		if _, err := in.Write(framed(question)); err != nil {
			t.Fatal(err)
		}
		await(string(question[12:])) // the answer has the question in it
		if _, err := in.Write([]byte("K\n")); err != nil {
			t.Fatal(err)
		}
		await("KEYUPDATE\n")
	}
	_ = in.Close()
	_ = cmd.Wait()
}

// TestSessionTickets has days go by: a ticket is good for seven, the keys change every day, and the connection that
// shows a ticket gets a new one.
func TestSessionTickets(t *testing.T) {
	var days atomic.Int64
	begin := time.Now()
	now := func() time.Time { return begin.Add(time.Duration(days.Load()) * 24 * time.Hour) }
	cfg := serverConfig()
	cfg.Time = now
	s := listenStream(t, StreamConfig{Common: common(newFake()), TLS: cfg})
	// ask asks with a ticket out of cache, and reports whether it was taken.
	ask := func(cache tls.ClientSessionCache) bool {
		t.Helper()
		nc, err := net.Dial("tcp", s.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		_ = nc.SetDeadline(time.Now().Add(10 * time.Second))
		client := clientConfig("dot")
		client.ClientSessionCache = cache
		// The certificate does not live as long; the client's clock stands still.
		client.Time = func() time.Time { return begin }
		c := tls.Client(nc, client)
		if _, err := c.Write(framed(query(t, "hit", 1))); err != nil {
			t.Fatal(err)
		}
		if _, err := readFramed(c); err != nil { // tickets come before the answer
			t.Fatal(err)
		}
		return c.ConnectionState().DidResume
	}
	first := &firstTicket{}
	if ask(first) {
		t.Error("resumed without a ticket")
	}
	for _, tt := range []struct {
		day  int64
		want bool
	}{{0, true}, {1, true}, {6, true}, {8, false}} {
		days.Store(tt.day)
		if got := ask(first); got != tt.want {
			t.Errorf("day %d: a ticket of the first day is taken: %v, want %v", tt.day, got, tt.want)
		}
	}
	// The first octets of a ticket do not name its key; that keys change shows when an old one is gone while a ticket
	// of a later day is still good.
	later := &firstTicket{}
	ask(later)
	days.Store(13)
	if !ask(later) {
		t.Error("a ticket of the day 8 is not taken on the day 13")
	}
}

// firstTicket is a tls.ClientSessionCache that keeps the first ticket.
type firstTicket struct{ state *tls.ClientSessionState }

func (f *firstTicket) Get(string) (*tls.ClientSessionState, bool) { return f.state, f.state != nil }
func (f *firstTicket) Put(_ string, s *tls.ClientSessionState) {
	if f.state == nil {
		f.state = s
	}
}

// allMisses is a Handler that has to resolve everything.
type allMisses struct{ echo }

func (allMisses) ServeWire(dst []byte, _ *wire.Query) ([]byte, wire.Verdict) { return dst, wire.Miss }

// TestDNSMachineStops stops at the limits: when enough is to be sent, and when enough is under way.
func TestDNSMachineStops(t *testing.T) {
	c := common(echo{})
	d := newDNSMachine(peer{common: &c}, 2)
	var tn turn
	big := framed(make([]byte, 10000), make([]byte, 10000), make([]byte, 10000))
	if used, err := d.input(&tn, big); used != 2*10002 || err != nil || tn.full {
		t.Errorf("with %d octets to send: used %d, full %v, %v", len(tn.out), used, tn.full, err)
	}
	c.Handler = allMisses{}
	tn = turn{}
	small := framed(query(t, "a", 1), query(t, "b", 2), query(t, "c", 3))
	used, err := d.input(&tn, small)
	if used != 2*len(small)/3 || err != nil || !tn.full || d.misses != 2 || len(tn.misses) != 2 {
		t.Errorf("at the limit: used %d, full %v, %d under way, %v", used, tn.full, d.misses, err)
	}
	for _, m := range tn.misses {
		d.answer(&tn, m, nil)
	}
	if d.misses != 0 || len(tn.out) != 0 {
		t.Errorf("%d under way, %d octets for answers that nobody gave", d.misses, len(tn.out))
	}
}
