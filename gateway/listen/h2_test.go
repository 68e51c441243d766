package listen

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"dnsgateway/gateway/wire"
)

// h2Driver drives one connection as simply as can be.
type h2Driver struct {
	mu sync.Mutex
	m  machine
	nc net.Conn
	t  turn
	d  *doh
	wg sync.WaitGroup
}

// h2Server serves HTTP/2 over TLS on loopback, and returns its address.
func h2Server(t testing.TB, h Handler, altSvc string) net.Addr {
	t.Helper()
	c := common(h)
	if err := c.check(); err != nil {
		t.Fatal(err)
	}
	d := newDoH(t.Context(), c, defaultPath, altSvc)
	ln, err := tls.Listen("tcp", "127.0.0.1:0", serverTLS(serverConfig(), "h2"))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		_ = ln.Close()
		wg.Wait()
		noLeaks(t)
	})
	wg.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			stop := make(chan struct{})
			wg.Go(func() {
				select {
				case <-t.Context().Done():
				case <-stop:
				}
				_ = nc.Close()
			})
			wg.Go(func() {
				defer close(stop)
				p := &peer{common: &c, client: addrPort(nc.RemoteAddr()), local: addrPort(nc.LocalAddr()), transport: wire.DoH}
				(&h2Driver{m: newH2(p, d), nc: nc, d: d}).run()
			})
		}
	})
	return ln.Addr()
}

func (d *h2Driver) run() {
	defer d.wg.Wait()
	buf := make([]byte, 64<<10)
	have := 0
	for {
		n, err := d.nc.Read(buf[have:])
		if err != nil {
			return
		}
		have += n
		for {
			d.mu.Lock()
			used, err := d.m.input(&d.t, buf[:have])
			have = copy(buf, buf[used:have])
			said := len(d.t.out) > 0
			ok := d.flush()
			d.mu.Unlock()
			if err != nil || !ok {
				return
			}
			if used == 0 && !said {
				break
			}
		}
	}
}

// flush writes what there is to say and has the misses resolved.
func (d *h2Driver) flush() bool {
	for _, m := range d.t.misses {
		d.wg.Go(func() {
			out, err := d.d.cfg.resolve(d.d.ctx, m.out[:0], &m.q)
			if err != nil {
				out = nil
			}
			d.mu.Lock()
			defer d.mu.Unlock()
			d.m.answer(&d.t, m, out)
			d.flush()
		})
	}
	d.t.misses = d.t.misses[:0]
	_, err := d.nc.Write(d.t.out)
	d.t.out = d.t.out[:0]
	return err == nil
}

func TestH2DoH(t *testing.T) {
	tests := dohTests(t)
	altSvc := `h3=":4711"; ma=86400`
	addr := h2Server(t, newFake(), altSvc)
	testDoH(t, httpClient(t, "h2"), addr, tests, "h2", altSvc)
}

// h2Script is a client without a connection: what it says goes straight into a machine, and what comes back is read by
// x/net's Framer, which finds frames that are none.
type h2Script struct {
	t    testing.TB
	c    *h2
	d    *doh
	turn turn
	in   bytes.Buffer
	fr   *http2.Framer
	enc  *hpack.Encoder
	hb   bytes.Buffer
	err  error // of the machine
}

func newH2Script(t testing.TB, h Handler) *h2Script {
	t.Helper()
	cfg := common(h)
	if err := cfg.check(); err != nil {
		t.Fatal(err)
	}
	s := &h2Script{t: t, d: newDoH(context.Background(), cfg, defaultPath, "")}
	s.c = newH2(&peer{common: &s.d.cfg, client: cfg.Addr, local: cfg.Addr, transport: wire.DoH}, s.d)
	s.fr = http2.NewFramer(&s.in, nil)
	s.fr.AllowIllegalWrites = true
	s.enc = hpack.NewEncoder(&s.hb)
	s.in.WriteString(h2Preface)
	return s
}

// opened returns a script whose settings are exchanged.
func opened(t testing.TB, h Handler, settings ...http2.Setting) *h2Script {
	t.Helper()
	s := newH2Script(t, h)
	_ = s.fr.WriteSettings(settings...)
	_ = s.fr.WriteSettingsAck()
	got := s.play()
	if len(got) != 3 || got[0] != "SETTINGS 3=100 4=65536 6=16384" || got[1] != "WINDOW 0 983041" || got[2] != "SETTINGS ack" {
		t.Fatalf("got %q", got)
	}
	return s
}

// block returns a header block.
func (s *h2Script) block(fields ...string) []byte {
	s.hb.Reset()
	for i := 0; i < len(fields); i += 2 {
		_ = s.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return slices.Clone(s.hb.Bytes())
}

// request writes a request's HEADERS.
func (s *h2Script) request(id uint32, end bool, method, path string, more ...string) {
	fields := append([]string{":method", method, ":scheme", "https", ":authority", "dns.test", ":path", path}, more...)
	_ = s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: s.block(fields...), EndStream: end, EndHeaders: true})
}

func (s *h2Script) get(id uint32, name string) {
	s.request(id, true, "GET", defaultPath+"?dns="+b64(query(s.t, name, 0)))
}

func (s *h2Script) post(id uint32, more ...string) {
	s.request(id, false, "POST", defaultPath, append([]string{"content-type", mediaMessage}, more...)...)
}

// play gives the machine what was written and returns what it says.
func (s *h2Script) play() []string {
	s.t.Helper()
	for s.in.Len() > 0 && s.err == nil {
		before := len(s.turn.out)
		used, err := s.c.input(&s.turn, s.in.Bytes())
		s.in.Next(used)
		s.err = err
		if used == 0 && len(s.turn.out) == before {
			break
		}
	}
	return s.said()
}

// said takes what is in turn.out.
func (s *h2Script) said() []string {
	s.t.Helper()
	said, err := h2Frames(s.turn.out)
	if err != nil {
		s.t.Fatal(err)
	}
	s.turn.out = s.turn.out[:0]
	return said
}

// resolve answers all misses, the latest first.
func (s *h2Script) resolve() []string {
	s.t.Helper()
	for _, m := range slices.Backward(s.turn.misses) {
		out, err := s.d.cfg.resolve(s.d.ctx, nil, &m.q)
		if err != nil {
			out = nil
		}
		s.c.answer(&s.turn, m, out)
	}
	s.turn.misses = s.turn.misses[:0]
	return s.said()
}

// h2Frames renders frames.
func h2Frames(b []byte) (said []string, err error) {
	fr := newH2Reader(bytes.NewReader(b))
	for {
		f, err := fr.next()
		if err == io.EOF {
			return said, nil
		}
		if err != nil {
			return said, fmt.Errorf("behind %q: %w", said, err)
		}
		said = append(said, f)
	}
}

// h2Reader reads what we send.
type h2Reader struct{ fr *http2.Framer }

func newH2Reader(r io.Reader) h2Reader {
	fr := http2.NewFramer(nil, r)
	fr.ReadMetaHeaders = hpack.NewDecoder(0, nil) // a client that allows no table
	return h2Reader{fr}
}

// next renders one frame: a response's header by its status, bodies by their lengths.
func (r h2Reader) next() (string, error) {
	f, err := r.fr.ReadFrame()
	if err != nil {
		return "", err
	}
	id, end := f.Header().StreamID, ""
	if f.Header().Flags.Has(http2.FlagDataEndStream) { // of HEADERS too
		end = " end"
	}
	switch f := f.(type) {
	case *http2.MetaHeadersFrame:
		return fmt.Sprintf("HEADERS %d %s%s", id, f.PseudoValue("status"), end), nil
	case *http2.DataFrame:
		return fmt.Sprintf("DATA %d %d%s", id, len(f.Data()), end), nil
	case *http2.SettingsFrame:
		text := "SETTINGS"
		if f.IsAck() {
			text += " ack"
		}
		_ = f.ForeachSetting(func(v http2.Setting) error {
			text += fmt.Sprintf(" %d=%d", v.ID, v.Val)
			return nil
		})
		return text, nil
	case *http2.RSTStreamFrame:
		return fmt.Sprintf("RESET %d %v", id, f.ErrCode), nil
	case *http2.GoAwayFrame:
		return fmt.Sprintf("GOAWAY %d %v", f.LastStreamID, f.ErrCode), nil
	case *http2.WindowUpdateFrame:
		return fmt.Sprintf("WINDOW %d %d", id, f.Increment), nil
	case *http2.PingFrame:
		return fmt.Sprintf("PING %v %s", f.IsAck(), f.Data[:]), nil
	}
	return "", fmt.Errorf("a frame that we do not send: %v", f)
}

// want compares what the machine said.
func (s *h2Script) want(got []string, want ...string) {
	s.t.Helper()
	if d := cmp.Diff(got, want, cmpopts.EquateEmpty()); d != "" {
		s.t.Errorf("got (-), want (+):\n%s", d)
	}
}

func TestH2Allocations(t *testing.T) {
	for _, method := range []string{"GET", "POST"} {
		s := opened(t, echo{})
		id := uint32(1)
		msg := query(t, "hit", 0)
		var inputs [][]byte
		for range 1200 {
			if method == "GET" {
				s.request(id, true, "GET", defaultPath+"?dns="+b64(msg), "accept", mediaMessage, "user-agent", "test")
			} else {
				s.post(id, "accept", mediaMessage, "content-length", strconv.Itoa(len(msg)))
				_ = s.fr.WriteData(id, true, msg)
			}
			_ = s.fr.WriteWindowUpdate(0, 100)
			inputs = append(inputs, slices.Clone(s.in.Bytes()))
			s.in.Reset()
			id += 2
		}
		i := 0
		ask := func() {
			s.turn.out = s.turn.out[:0]
			// In two reads, so that a body is waited for.
			used, err := s.c.input(&s.turn, inputs[i][:frameHeader+int(inputs[i][2])])
			if err == nil {
				_, err = s.c.input(&s.turn, inputs[i][used:])
			}
			if err != nil || len(s.turn.out) < 100 {
				t.Fatalf("%v, %d octets", err, len(s.turn.out))
			}
			i++
		}
		for range 100 {
			ask()
		}
		if n := testing.AllocsPerRun(1000, ask); n != 0 && !raceEnabled { // which has pools forget
			t.Errorf("%s: %v allocations a hit, want 0", method, n)
		}
		if size := int(unsafe.Sizeof(*s.c)) + cap(s.c.table.octets) + 10*cap(s.c.table.entries) + 8*cap(s.c.streams); size > 2048 {
			t.Errorf("%s: an idle connection has %d octets", method, size)
		}
	}
}

func BenchmarkH2Get(b *testing.B) {
	s := opened(b, echo{})
	// As h2load has it: all fields but the path in the table.
	first := s.block(":method", "GET", ":scheme", "https", ":authority", "127.0.0.1:8443", "accept", "*/*", "user-agent", "h2load")
	_ = s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: first, EndStream: true, EndHeaders: true})
	s.play()
	path := defaultPath + "?dns=AAABAAABAAAAAAAAA3d3dwdleGFtcGxlA2NvbQAAAQAB"
	block := append([]byte{0x82, 0x87, 0xc0, 0x04, 0x80 | byte(hpack.HuffmanEncodeLength(path))}, hpack.AppendHuffmanString(nil, path)...)
	block = append(block, 0xbf, 0xbe)
	id := uint32(3)
	b.ReportAllocs()
	for b.Loop() {
		s.in.Reset()
		_ = s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndStream: true, EndHeaders: true})
		id += 2
		s.c.window = defaultWindow
		s.turn.out = s.turn.out[:0]
		if _, err := s.c.input(&s.turn, s.in.Bytes()); err != nil {
			b.Fatal(err)
		}
	}
}

func TestH2Exchange(t *testing.T) {
	s := opened(t, newFake())
	s.get(1, "hit")
	s.want(s.play(), "HEADERS 1 200", "DATA 1 50 end")
	s.request(3, true, "HEAD", defaultPath+"?dns="+b64(query(t, "hit", 0)))
	s.want(s.play(), "HEADERS 3 200 end")
	s.post(5)
	_ = s.fr.WriteData(5, false, query(t, "hit", 0)[:5])
	_ = s.fr.WriteDataPadded(5, false, nil, make([]byte, 9))
	s.want(s.play(), "WINDOW 5 10")
	_ = s.fr.WriteDataPadded(5, true, query(t, "hit", 0)[5:], make([]byte, 3))
	s.want(s.play(), "HEADERS 5 200", "DATA 5 50 end")

	// Trailers, a header block in pieces, and frames that mean nothing.
	s.post(7, "trailer", "x")
	_ = s.fr.WriteData(7, false, query(t, "hit", 0))
	_ = s.fr.WriteRawFrame(0xbe, 0xff, 7, []byte("unknown"))
	_ = s.fr.WritePriority(7, http2.PriorityParam{StreamDep: 5})
	block := s.block("x", "y", "zz", strings.Repeat("a", 5000))
	_ = s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 7, BlockFragment: block[:1], EndStream: true, PadLength: 7})
	s.want(s.play())
	if !s.c.open() {
		t.Error("a header block without its end is not open")
	}
	_ = s.fr.WriteContinuation(7, false, block[1:3000])
	_ = s.fr.WriteContinuation(7, true, block[3000:])
	s.want(s.play(), "HEADERS 7 200", "DATA 7 50 end")

	// Misses come back in any order, and one whose client has gone comes back to no one.
	for i, name := range []string{"miss", "nxdomain", "error", "drop", "miss"} {
		s.get(uint32(9+2*i), name)
	}
	s.want(s.play(), "RESET 15 INTERNAL_ERROR")
	if n := len(s.turn.misses); n != 4 || s.c.open() {
		t.Errorf("%d under way, open %v", n, s.c.open())
	}
	_ = s.fr.WriteRSTStream(17, http2.ErrCodeCancel)
	s.want(s.play())
	s.want(s.resolve(), "RESET 13 INTERNAL_ERROR", "HEADERS 11 200", "DATA 11 87 end", "HEADERS 9 200", "DATA 9 52 end")

	// Expect, of a request that is welcome and of one that is not.
	s.post(19, "expect", "100-continue")
	s.want(s.play(), "HEADERS 19 100")
	if !s.c.open() {
		t.Error("a request without its body is not open")
	}
	_ = s.fr.WriteData(19, true, query(t, "hit", 0))
	s.want(s.play(), "HEADERS 19 200", "DATA 19 50 end")
	s.request(21, false, "POST", defaultPath, "expect", "100-continue")
	s.want(s.play(), "HEADERS 21 415", "DATA 21 41 end")
	_ = s.fr.WriteData(21, true, query(t, "hit", 0)) // it was under way
	_ = s.fr.WritePing(false, [8]byte{'p', 'i', 'n', 'g', 'p', 'i', 'n', 'g'})
	s.want(s.play(), "PING true pingping")

	// A GET whose stream goes on.
	s.request(23, false, "GET", defaultPath+"?dns="+b64(query(t, "hit", 0)))
	_ = s.fr.WriteData(23, true, []byte("nothing"))
	s.want(s.play(), "HEADERS 23 200", "DATA 23 50 end")

	// What is left of all that is nothing.
	if len(s.c.streams) != 0 || s.c.bodies != 0 || s.c.held != 0 || s.c.orphans != 0 || s.c.open() {
		t.Errorf("left over: %+v", s.c)
	}
	if s.c.receiveWindow == connWindow {
		t.Error("the bodies were not counted")
	}
}

// TestH2BodyTooLarge has clients send more than a message, as much as their windows let them: each is answered once that is
// clear, and may come to its end, but not without one.
func TestH2BodyTooLarge(t *testing.T) {
	for _, tt := range []struct {
		name     string
		length   int // Content-Length
		size     int // that is sent
		trailers bool
		want     string // what ends the stream here
	}{
		{name: "a length that says so", length: 100_000, size: 100_000},
		{name: "no length", size: 100_000},
		{name: "as much as is read", size: maxBody},
		{name: "trailers", size: 200_000, trailers: true},
		{name: "more than is read", size: maxBody + 1, want: "RESET 1 NO_ERROR"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := opened(t, newFake())
			if tt.length > 0 {
				s.post(1, "content-length", strconv.Itoa(tt.length))
			} else {
				s.post(1)
			}
			var said []string
			window := streamWindow
			for left := tt.size; left > 0; {
				n := min(left, maxFrame, window)
				if n == 0 {
					t.Fatalf("%d octets are left and no window; got %q", left, said)
				}
				left, window = left-n, window-n
				_ = s.fr.WriteData(1, left == 0 && tt.want == "" && !tt.trailers, make([]byte, n))
				for _, f := range s.play() {
					var more int
					if n, _ := fmt.Sscanf(f, "WINDOW 1 %d", &more); n == 1 {
						window += more
					} else if !strings.HasPrefix(f, "WINDOW 0") {
						said = append(said, f)
					}
				}
			}
			if tt.trailers {
				_ = s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: s.block("x", "y"), EndStream: true, EndHeaders: true})
				said = append(said, s.play()...)
			}
			want := []string{"HEADERS 1 413", "DATA 1 39 end"}
			if tt.want != "" {
				want = append(want, tt.want)
			}
			s.want(said, want...)
			if len(s.c.streams) != 0 || s.c.bodies != 0 || s.c.open() {
				t.Errorf("left over: %+v", s.c)
			}
			s.get(3, "hit")
			s.want(s.play(), "HEADERS 3 200", "DATA 3 50 end")
		})
	}
	// A client that gives its body up when it has read the answer has done nothing wrong, and one that does not go on with it
	// holds no drain.
	s := opened(t, newFake())
	id := uint32(1)
	for range fullBudget {
		s.post(id, "content-length", "65536")
		_ = s.fr.WriteData(id, false, make([]byte, 100))
		_ = s.fr.WriteRSTStream(id, http2.ErrCodeCancel)
		s.want(s.play(), fmt.Sprintf("HEADERS %d 413", id), fmt.Sprintf("DATA %d 39 end", id))
		id += 2
	}
	s.post(id, "content-length", "65536")
	s.play()
	if !s.c.open() || !s.c.done() {
		t.Errorf("open %v, done %v", s.c.open(), s.c.done())
	}
}

// TestH2HeaderTooLarge has headers of which a part is enough to know that they are too large: the request is answered, and
// the table is as the client thinks, up to a bound.
func TestH2HeaderTooLarge(t *testing.T) {
	many := []string{"a", strings.Repeat("!", 9000), "b", strings.Repeat("?", 9000)}
	for i := range 80 {
		many = append(many, fmt.Sprint("x-", i), strings.Repeat("!", 1000))
	}
	for name, fields := range map[string][]string{
		"two fields":   many[:4],
		"many fields":  many,
		"one field":    {"cookie", strings.Repeat("!", 100_000)},
		"Huffman code": {"cookie", strings.Repeat("e", 100_000)},
	} {
		t.Run(name, func(t *testing.T) {
			s := opened(t, newFake())
			big := s.block(append(append([]string{":method", "GET", ":scheme", "https", ":path", "/"}, fields...), "in-the-table", "as before")...)
			send := func(id uint32, block []byte) {
				n := min(len(block), maxFrame)
				_ = s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block[:n], EndStream: true, EndHeaders: n == len(block)})
				for block = block[n:]; len(block) > 0; block = block[n:] {
					n = min(len(block), maxFrame)
					_ = s.fr.WriteContinuation(id, n == len(block), block[:n])
				}
			}
			send(1, big)
			s.want(s.play(), "HEADERS 1 431", "DATA 1 33 end")
			s.request(3, true, "GET", defaultPath+"?dns="+b64(query(t, "hit", 0)), "in-the-table", "as before")
			s.want(s.play(), "HEADERS 3 200", "DATA 3 50 end")
			send(5, s.block(append([]string{":method", "HEAD", ":scheme", "https", ":path", "/"}, fields...)...))
			s.want(s.play(), "HEADERS 5 431 end")
			// More of it is too much, and not to be asked again.
			send(7, slices.Concat(big, make([]byte, maxBlock)))
			s.want(s.play(), "GOAWAY 7 ENHANCE_YOUR_CALM")
			if s.err != errBlock || s.c.block != nil {
				t.Errorf("got %v with %d octets of a block", s.err, len(s.c.block))
			}
		})
	}
}

// TestH2Malformed are requests that are none: a stream error each, and the connection lives.
func TestH2Malformed(t *testing.T) {
	ok := []string{":method", "GET", ":scheme", "https", ":authority", "dns.test", ":path", "/"}
	with := func(more ...string) []string { return append(slices.Clone(ok), more...) }
	for _, tt := range []struct {
		name   string
		fields []string
	}{
		{"no method", ok[2:]},
		{"no scheme", append([]string{":method", "GET"}, ok[4:]...)},
		{"another scheme", []string{":method", "GET", ":scheme", "ftp", ":path", "/"}},
		{"no path", ok[:6]},
		{"empty path", []string{":method", "GET", ":scheme", "https", ":path", ""}},
		{"path without a slash", []string{":method", "GET", ":scheme", "https", ":path", "dns-query"}},
		{"asterisk", []string{":method", "GET", ":scheme", "https", ":path", "*"}},
		{"path with a bad escape", []string{":method", "GET", ":scheme", "https", ":path", "/%zz"}},
		{"two methods", with(":method", "GET")},
		{"unknown pseudo-header field", with(":protocol", "x")},
		{"pseudo-header field of a response", with(":status", "200")},
		{"pseudo-header field behind others", append([]string{"x", "y"}, ok...)},
		{"capitals", with("Accept", "x")},
		{"space in a name", with("a b", "x")},
		{"empty name", with("", "x")},
		{"line break in a value", with("x", "a\r\nb")},
		{"NUL in a value", with("x", "a\x00b")},
		{"space before a value", with("x", " a")},
		{"connection", with("connection", "close")},
		{"transfer-encoding", with("transfer-encoding", "chunked")},
		{"te", with("te", "gzip")},
		{"host that is not the authority", with("host", "other.test")},
		{"a body that does not come", with("content-length", "1")},
		{"length that is no number", with("content-length", "x")},
		{"two lengths", with("content-length", "0", "content-length", "00", "content-length", "1")},
		{"CONNECT with a path", []string{":method", "CONNECT", ":authority", "x", ":path", "/"}},
		{"CONNECT without an authority", []string{":method", "CONNECT"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := opened(t, newFake())
			_ = s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: s.block(tt.fields...), EndStream: true, EndHeaders: true})
			s.want(s.play(), "RESET 1 PROTOCOL_ERROR")
			s.get(3, "hit")
			s.want(s.play(), "HEADERS 3 200", "DATA 3 50 end")
		})
	}
	for _, fields := range [][]string{
		with("te", "trailers"), with("host", "DNS.test"), with("x", ""), with("content-length", "0"),
		{":method", "OPTIONS", ":scheme", "https", ":path", "*"}, {":method", "CONNECT", ":authority", "x:1"},
	} {
		s := opened(t, newFake())
		_ = s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: s.block(fields...), EndStream: true, EndHeaders: true})
		s.want(s.play(), "HEADERS 1 404", "DATA 1 22 end")
	}
}

// TestH2Errors has a client break rules of the protocol: the connection ends with what it did.
func TestH2Errors(t *testing.T) {
	hit := query(t, "hit", 0)
	raw := func(kind http2.FrameType, flags http2.Flags, id uint32, b string) func(*h2Script) {
		return func(s *h2Script) { _ = s.fr.WriteRawFrame(kind, flags, id, []byte(b)) }
	}
	for _, tt := range []struct {
		name string
		do   func(s *h2Script)
		want *h2Error
	}{
		{"frame too large", raw(0xbe, 0, 0, strings.Repeat("x", maxFrame+1)), errFrameSize},
		{"DATA on stream 0", raw(frameData, 0, 0, "x"), errFrameStream},
		{"DATA on an idle stream", raw(frameData, 0, 9, "x"), errIdle},
		{"DATA on a stream of ours", raw(frameData, 0, 2, "x"), errIdle},
		{"DATA on a closed stream", raw(frameData, 0, 1, "x"), errClosed},
		{"DATA with padding that is not there", raw(frameData, flagPadded, 1, ""), errFrameSize},
		{"DATA with too much padding", raw(frameData, flagPadded, 1, "\x02x"), errPadding},
		{"HEADERS on stream 0", raw(frameHeaders, flagEndHeaders, 0, "\x82"), errFrameStream},
		{"HEADERS on an even stream", raw(frameHeaders, flagEndHeaders, 6, "\x82"), errFrameStream},
		{"HEADERS on a closed stream", raw(frameHeaders, flagEndHeaders, 1, "\x82"), errClosed},
		{"HEADERS on a stream that was skipped", raw(frameHeaders, flagEndHeaders, 3, "\x82"), errIdle},
		{"HEADERS without room for priority", raw(frameHeaders, flagEndHeaders|flagPriority, 9, "\x82"), errFrameSize},
		{"HEADERS with too much padding", raw(frameHeaders, flagEndHeaders|flagPadded, 9, "\x09\x82"), errPadding},
		{"HEADERS that cannot be decoded", raw(frameHeaders, flagEndHeaders, 9, "\x80"), nil},
		{"PRIORITY on stream 0", raw(framePriority, 0, 0, "12345"), errFrameStream},
		{"PRIORITY of another size", raw(framePriority, 0, 9, "1234"), errFrameSize},
		{"PRIORITY on itself", raw(framePriority, 0, 9, "\x00\x00\x00\x095"), errDependency},
		{"RST_STREAM on stream 0", raw(frameReset, 0, 0, "1234"), errFrameStream},
		{"RST_STREAM on an idle stream", raw(frameReset, 0, 9, "1234"), errIdle},
		{"RST_STREAM of another size", raw(frameReset, 0, 1, "123"), errFrameSize},
		{"SETTINGS on a stream", raw(frameSettings, 0, 1, ""), errFrameStream},
		{"SETTINGS of another size", raw(frameSettings, 0, 0, "12345"), errFrameSize},
		{"SETTINGS acknowledged with something", raw(frameSettings, flagAck, 0, "123456"), errFrameSize},
		{"ENABLE_PUSH 2", raw(frameSettings, 0, 0, "\x00\x02\x00\x00\x00\x02"), errSetting},
		{"MAX_FRAME_SIZE too small", raw(frameSettings, 0, 0, "\x00\x05\x00\x00\x3f\xff"), errSetting},
		{"MAX_FRAME_SIZE too large", raw(frameSettings, 0, 0, "\x00\x05\x01\x00\x00\x00"), errSetting},
		{"INITIAL_WINDOW_SIZE too large", raw(frameSettings, 0, 0, "\x00\x04\x80\x00\x00\x00"), errWindow},
		{"PUSH_PROMISE", raw(framePush, flagEndHeaders, 1, "\x00\x00\x00\x02\x82"), errPush},
		{"PING on a stream", raw(framePing, 0, 1, "12345678"), errFrameStream},
		{"PING of another size", raw(framePing, 0, 0, "1234567"), errFrameSize},
		{"GOAWAY on a stream", raw(frameGoAway, 0, 1, "12345678"), errFrameStream},
		{"GOAWAY of another size", raw(frameGoAway, 0, 0, "1234567"), errFrameSize},
		{"WINDOW_UPDATE of another size", raw(frameWindow, 0, 0, "123"), errFrameSize},
		{"WINDOW_UPDATE by nothing", raw(frameWindow, 0, 0, "\x00\x00\x00\x00"), errNoIncrement},
		{"WINDOW_UPDATE by nothing on a closed stream", raw(frameWindow, 0, 1, "\x00\x00\x00\x00"), errNoIncrement},
		{"WINDOW_UPDATE on an idle stream", raw(frameWindow, 0, 9, "\x00\x00\x00\x01"), errIdle},
		{"WINDOW_UPDATE beyond the range", raw(frameWindow, 0, 0, "\x7f\xff\xff\xff"), errWindow},
		{"CONTINUATION without HEADERS", raw(frameContinuation, flagEndHeaders, 1, "\x82"), errContinuation},
		{"another frame in a header block", func(s *h2Script) {
			raw(frameHeaders, 0, 9, "\x82")(s)
			raw(framePing, 0, 0, "12345678")(s)
		}, errContinuation},
		{"another stream in a header block", func(s *h2Script) {
			raw(frameHeaders, 0, 9, "\x82")(s)
			raw(frameContinuation, flagEndHeaders, 11, "\x82")(s)
		}, errContinuation},
		{"a window that settings make too large", func(s *h2Script) {
			s.post(9)
			_ = s.fr.WriteWindowUpdate(9, maxInt31-defaultWindow)
			_ = s.fr.WriteSettings(http2.Setting{ID: settingWindow, Val: defaultWindow + 1})
		}, errWindow},
		{"more than the connection's window", func(s *h2Script) {
			// Only while its update waits: the machine gives it back by itself.
			s.c.receiveWindow = 10
			s.post(9)
			_ = s.fr.WriteData(9, true, hit)
		}, errOverrun},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := opened(t, newFake())
			s.get(1, "hit")
			s.get(5, "hit")
			s.want(s.play(), "HEADERS 1 200", "DATA 1 50 end", "HEADERS 5 200", "DATA 5 50 end")
			tt.do(s)
			got := s.play()
			code := http2.ErrCodeCompression
			if tt.want != nil {
				code = http2.ErrCode(tt.want.code)
				if s.err != tt.want {
					t.Errorf("got %v, want %v", s.err, tt.want)
				}
			}
			last := s.c.last
			if len(got) == 0 || got[len(got)-1] != fmt.Sprintf("GOAWAY %d %v", last, code) || s.err == nil {
				t.Errorf("got %q, %v", got, s.err)
			}
			s.get(101, "hit")
			s.want(s.play())
		})
	}
}

func TestH2Preface(t *testing.T) {
	for name, tt := range map[string]struct {
		octets string
		want   []string
	}{
		"HTTP/1.1":            {"GET / HTTP/1.1\r\n", []string{"SETTINGS 3=100 4=65536 6=16384", "WINDOW 0 983041", "GOAWAY 0 PROTOCOL_ERROR"}},
		"half of it":          {h2Preface[:10], []string{"SETTINGS 3=100 4=65536 6=16384", "WINDOW 0 983041"}},
		"no SETTINGS":         {h2Preface + "\x00\x00\x00\x01\x05\x00\x00\x00\x01", []string{"SETTINGS 3=100 4=65536 6=16384", "WINDOW 0 983041", "GOAWAY 0 PROTOCOL_ERROR"}},
		"acknowledged before": {h2Preface + "\x00\x00\x00\x04\x01\x00\x00\x00\x00", []string{"SETTINGS 3=100 4=65536 6=16384", "WINDOW 0 983041", "GOAWAY 0 PROTOCOL_ERROR"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newH2Script(t, newFake())
			s.in.Reset()
			s.in.WriteString(tt.octets)
			s.want(s.play(), tt.want...)
		})
	}
}

// TestH2StreamErrors has a client break rules of a stream: that one is reset, and the connection lives.
func TestH2StreamErrors(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(s *h2Script)
		want string
	}{
		{"DATA behind the end", func(s *h2Script) { s.get(1, "slow"); _ = s.fr.WriteData(1, false, []byte("x")) }, "STREAM_CLOSED"},
		{"HEADERS behind the end", func(s *h2Script) { s.get(1, "slow"); s.get(1, "slow") }, "STREAM_CLOSED"},
		{"HEADERS in between", func(s *h2Script) { s.post(1); s.post(1) }, "PROTOCOL_ERROR"},
		{"pseudo-header field in trailers", func(s *h2Script) { s.post(1); s.get(1, "hit") }, "PROTOCOL_ERROR"},
		{"less than Content-Length", func(s *h2Script) {
			s.post(1, "content-length", "2")
			_ = s.fr.WriteData(1, true, []byte("x"))
		}, "PROTOCOL_ERROR"},
		{"more than Content-Length", func(s *h2Script) {
			s.post(1, "content-length", "2")
			_ = s.fr.WriteData(1, false, []byte("xyz"))
		}, "PROTOCOL_ERROR"},
		{"trailers before the end of the body", func(s *h2Script) {
			s.post(1, "content-length", "2")
			_ = s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: s.block("x", "y"), EndStream: true, EndHeaders: true})
		}, "PROTOCOL_ERROR"},
		{"a stream that depends on itself", func(s *h2Script) {
			_ = s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: s.block(":method", "GET"), EndStream: true, EndHeaders: true,
				Priority: http2.PriorityParam{StreamDep: 1}})
		}, "PROTOCOL_ERROR"},
		{"PRIORITY of another size", func(s *h2Script) { s.get(1, "slow"); _ = s.fr.WriteRawFrame(framePriority, 0, 1, []byte("1234")) }, "FRAME_SIZE_ERROR"},
		{"WINDOW_UPDATE by nothing", func(s *h2Script) { s.get(1, "slow"); _ = s.fr.WriteRawFrame(frameWindow, 0, 1, make([]byte, 4)) }, "PROTOCOL_ERROR"},
		{"WINDOW_UPDATE beyond the range", func(s *h2Script) { s.get(1, "slow"); _ = s.fr.WriteWindowUpdate(1, maxInt31) }, "FLOW_CONTROL_ERROR"},
		{"more than the stream's window", func(s *h2Script) {
			s.post(1)
			_ = s.fr.WriteData(1, false, nil)
			s.play()
			s.c.streams[0].receive = 1
			_ = s.fr.WriteData(1, false, []byte("xyz"))
		}, "FLOW_CONTROL_ERROR"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := opened(t, newFake())
			tt.do(s)
			s.want(s.play(), "RESET 1 "+tt.want)
			s.get(3, "hit")
			s.want(s.play(), "HEADERS 3 200", "DATA 3 50 end")
			if len(s.c.streams) != 0 || s.c.bodies != 0 {
				t.Errorf("left over: %+v", s.c)
			}
		})
	}
}

func TestH2FlowControl(t *testing.T) {
	s := opened(t, newFake(), http2.Setting{ID: settingWindow, Val: 10})
	s.get(1, "hit")
	s.get(3, "miss")
	s.want(s.play(), "HEADERS 1 200", "DATA 1 10")
	s.want(s.resolve(), "HEADERS 3 200", "DATA 3 10")
	if !s.c.open() {
		t.Error("what waits for a window is not open")
	}
	_ = s.fr.WriteWindowUpdate(1, 5)
	_ = s.fr.WriteWindowUpdate(3, 42)
	s.want(s.play(), "DATA 1 5", "DATA 3 42 end")
	_ = s.fr.WriteSettings(http2.Setting{ID: settingWindow, Val: 0}) // now stream 1's is -10
	_ = s.fr.WriteWindowUpdate(1, 11)
	s.want(s.play(), "SETTINGS ack", "DATA 1 1")
	_ = s.fr.WriteSettings(http2.Setting{ID: settingWindow, Val: 1000})
	s.want(s.play(), "SETTINGS ack", "DATA 1 34 end")

	// The connection's window, and who has waited longest is first.
	s.c.window = 60
	for id := uint32(5); id < 12; id += 2 {
		s.get(id, "hit")
	}
	s.want(s.play(), "HEADERS 5 200", "DATA 5 50 end", "HEADERS 7 200", "DATA 7 10", "HEADERS 9 200", "HEADERS 11 200")
	_ = s.fr.WriteRSTStream(9, http2.ErrCodeCancel)
	_ = s.fr.WriteWindowUpdate(0, 45)
	s.want(s.play(), "DATA 7 40 end", "DATA 11 5")
	_ = s.fr.WriteWindowUpdate(0, 1000)
	s.want(s.play(), "DATA 11 45 end")
	if s.c.held != 0 || len(s.c.streams) != 0 {
		t.Errorf("left over: %+v", s.c)
	}
}

// large answers everything with 40000 octets.
type large struct{ echo }

func (large) ServeWire(dst []byte, q *wire.Query) ([]byte, wire.Verdict) {
	at := len(dst)
	dst = append(append(dst, q.Raw...), make([]byte, 40000-len(q.Raw))...)
	dst[at+2] |= 0x80
	return dst, wire.Answered
}

// TestH2Stalled has a client that never opens its window: what it makes us hold has a bound.
func TestH2Stalled(t *testing.T) {
	s := opened(t, large{}, http2.Setting{ID: settingWindow, Val: 0})
	for id := uint32(1); id < 200; id += 2 {
		s.get(id, "hit")
	}
	got := s.play()
	held := 0
	for _, st := range s.c.streams {
		held += len(st.buf)
	}
	if held != s.c.held || held > maxHeld || held < maxHeld/2 || !s.c.open() {
		t.Errorf("%d octets are held, counted as %d", held, s.c.held)
	}
	if last := got[len(got)-1]; last != "RESET 199 ENHANCE_YOUR_CALM" {
		t.Errorf("the last stream: %s", last)
	}
	_ = s.fr.WriteWindowUpdate(0, 10_000_000)
	_ = s.fr.WriteSettings(http2.Setting{ID: settingWindow, Val: 50000})
	if got := strings.Join(s.play(), ","); strings.Count(got, "end") != maxHeld/40000 || s.c.held != 0 || s.c.open() {
		t.Errorf("got %s", got)
	}
}

// TestH2Streams opens more streams than may be, in every way in which one stays open.
func TestH2Streams(t *testing.T) {
	for name, open := range map[string]func(s *h2Script, id uint32){
		"misses": func(s *h2Script, id uint32) { s.get(id, "miss") },
		"bodies": func(s *h2Script, id uint32) { s.post(id) },
		"misses that are given up": func(s *h2Script, id uint32) {
			s.get(id, "miss")
			_ = s.fr.WriteRSTStream(id, http2.ErrCodeCancel)
			s.play()
			s.c.earn(fullBudget) // see TestH2Floods
		},
		"windows": func(s *h2Script, id uint32) { s.get(id, "hit") },
	} {
		t.Run(name, func(t *testing.T) {
			var settings []http2.Setting
			if name == "windows" {
				settings = []http2.Setting{{ID: settingWindow, Val: 0}}
			}
			s := opened(t, newFake(), settings...)
			id := uint32(1)
			for range maxStreams {
				open(s, id)
				id += 2
			}
			if got := strings.Join(s.play(), ","); strings.Contains(got, "RESET") {
				t.Fatalf("got %s", got)
			}
			if n := len(s.c.streams) + s.c.orphans; n != maxStreams {
				t.Errorf("%d streams", n)
			}
			s.get(id, "hit")
			s.want(s.play(), fmt.Sprintf("RESET %d REFUSED_STREAM", id))
			// What waited is served when there is room.
			_ = s.fr.WriteSettings(http2.Setting{ID: settingWindow, Val: defaultWindow})
			if name == "bodies" {
				_ = s.fr.WriteData(1, true, query(t, "hit", 0))
			}
			s.play()
			s.resolve()
			s.get(id+2, "hit")
			s.want(s.play(), fmt.Sprintf("HEADERS %d 200", id+2), fmt.Sprintf("DATA %d 50 end", id+2))
		})
	}
}

// TestH2Expect sends requests that are read together: those in one piece are looked up together, and whatever else comes
// between them finds those before it answered.
func TestH2Expect(t *testing.T) {
	hits := func(n int, names ...string) []string { return append(slices.Repeat([]string{"hit"}, n), names...) }
	for _, tt := range []struct {
		name     string
		say      func(s *h2Script)
		expected [][]string
		want     []string // what is said to all but the hits
	}{
		{"one", func(s *h2Script) { s.get(1, "hit") }, nil, nil},
		{"some", func(s *h2Script) {
			for id := range uint32(5) {
				s.get(2*id+1, "hit")
			}
		}, [][]string{hits(5)}, nil},
		{"many", func(s *h2Script) {
			for id := range uint32(2*aheadSize + 2) {
				s.get(2*id+1, "hit")
			}
		}, [][]string{hits(aheadSize), hits(aheadSize), hits(2)}, nil},
		{"a stream that is reset", func(s *h2Script) {
			s.get(1, "hit")
			s.get(3, "miss")
			_ = s.fr.WriteRSTStream(3, http2.ErrCodeCancel)
			s.get(5, "hit")
			s.get(7, "hit")
		}, [][]string{hits(1, "miss"), hits(2)}, nil},
		{"streams that stay, among others", func(s *h2Script) {
			s.get(1, "miss")
			s.post(3)
			s.get(5, "miss")
			s.get(7, "hit")
			_ = s.fr.WriteData(3, true, query(s.t, "miss", 0))
			s.get(9, "miss")
			s.request(11, true, "GET", "/other")
			s.get(13, "miss")
		}, [][]string{{"miss", "hit"}},
			[]string{"HEADERS 11 404", "HEADERS 13 200", "HEADERS 9 200", "HEADERS 3 200", "HEADERS 5 200", "HEADERS 1 200"}},
		{"no query", func(s *h2Script) {
			s.get(1, "miss")
			s.request(3, true, "GET", defaultPath+"?dns=AAAA")
			s.get(5, "hit")
		}, nil, []string{"HEADERS 3 400", "HEADERS 1 200"}},
		{"a stream of a number that was used", func(s *h2Script) {
			s.get(1, "hit")
			s.get(3, "hit")
			s.get(3, "hit")
		}, [][]string{hits(2)}, []string{"GOAWAY 3 STREAM_CLOSED"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := &expecting{fake: newFake()}
			s := opened(t, h)
			tt.say(s)
			said := s.play()
			answered := len(said)
			said = append(said, s.resolve()...)
			if d := cmp.Diff(h.names, tt.expected, cmpopts.EquateEmpty()); d != "" {
				t.Errorf("expected: got (-), want (+):\n%s", d)
			}
			var rest []string
			for i, line := range said {
				if strings.HasPrefix(line, "DATA") || i < answered && strings.HasSuffix(line, " 200") {
					continue
				}
				rest = append(rest, line)
			}
			s.want(rest, tt.want...)
			for i, q := range h.queries() {
				if q.Kind != wire.Plain || q.Transport != wire.DoH {
					t.Errorf("query %d: %+v", i, q)
				}
			}
		})
	}
}

// TestH2LargeAnswers asks for many large answers at once: a turn says no more than one of them beyond enough, all come in the
// end, and what the client does meanwhile finds its streams.
func TestH2LargeAnswers(t *testing.T) {
	s := opened(t, large{}, http2.Setting{ID: settingWindow, Val: 10 << 20})
	_ = s.fr.WriteWindowUpdate(0, 100<<20)
	s.play()
	for id := uint32(1); id < 64; id += 2 {
		s.get(id, "hit")
	}
	_ = s.fr.WriteRSTStream(61, http2.ErrCodeCancel) // too late
	_ = s.fr.WritePing(false, [8]byte{})
	turns := func() (said []string) {
		for s.in.Len() > 0 && s.err == nil {
			var used int
			used, s.err = s.c.input(&s.turn, s.in.Bytes())
			if n := len(s.turn.out); n == 0 || n > enough+41000 {
				t.Fatalf("%d octets used, and %d said", used, n)
			}
			s.in.Next(used)
			said = append(said, s.said()...)
		}
		return said
	}
	said := turns()
	want := []string{}
	for id := 1; id < 64; id += 2 {
		want = append(want, fmt.Sprintf("HEADERS %d 200", id), fmt.Sprintf("DATA %d 16384", id), fmt.Sprintf("DATA %d 16384", id),
			fmt.Sprintf("DATA %d 7232 end", id))
	}
	s.want(said, append(want, "PING true "+string(make([]byte, 8)))...)
	if len(s.c.streams) != 0 || s.c.queued != 0 || !s.c.done() {
		t.Errorf("%d streams are left, %d queued", len(s.c.streams), s.c.queued)
	}
	// One that is reset in the same turn as those before it were asked.
	for id := uint32(65); id < 75; id += 2 {
		s.get(id, "hit")
	}
	_ = s.fr.WriteRSTStream(71, http2.ErrCodeCancel)
	s.get(75, "hit")
	said = turns()
	if got := strings.Join(said, ","); strings.Contains(got, " 71 ") || strings.Count(got, "end") != 5 || len(s.c.streams) != 0 {
		t.Errorf("got %s", got)
	}
	// And the end of a connection with some in the queue.
	for id := uint32(77); id < 87; id += 2 {
		s.get(id, "hit")
	}
	_ = s.fr.WriteRawFrame(frameWindow, 0, 0, make([]byte, 4))
	if said = turns(); said[len(said)-1] != "GOAWAY 85 PROTOCOL_ERROR" || s.err == nil || s.c.queued != 0 {
		t.Errorf("got %q", said)
	}
}

// TestH2Bodies has all streams send as much as they may at once: some are refused, and the others do not wait for ever.
func TestH2Bodies(t *testing.T) {
	s := opened(t, newFake())
	sent := 0
	for range 4 {
		for id := uint32(1); id < 2*maxStreams; id += 2 {
			if sent == 0 || s.c.find(id) != nil {
				if s.c.find(id) == nil {
					s.post(id)
				}
				_ = s.fr.WriteData(id, false, make([]byte, 16000))
			}
			for _, f := range s.play() {
				if strings.HasPrefix(f, "RESET") && !strings.HasSuffix(f, "REFUSED_STREAM") {
					t.Fatal(f)
				}
			}
		}
		sent++
	}
	if n := len(s.c.streams); n < 10 || s.c.bodies > maxBodies {
		t.Errorf("%d streams hold %d octets", n, s.c.bodies)
	}
	for _, st := range slices.Clone(s.c.streams) {
		_ = s.fr.WriteData(st.id, true, nil)
	}
	if got := s.play(); strings.Count(strings.Join(got, ","), " 400,") != len(got)/2 || s.c.bodies != 0 || s.err != nil {
		t.Errorf("got %q, %v", got, s.err)
	}
}

// TestH2Floods has clients that cost more than they ask: each is sent away, after a bounded number of frames.
func TestH2Floods(t *testing.T) {
	id := uint32(1)
	for _, tt := range []struct {
		name   string
		frames int // at most
		do     func(s *h2Script)
	}{
		{"rapid reset of misses", 100, func(s *h2Script) {
			s.get(id, "miss")
			_ = s.fr.WriteRSTStream(id, http2.ErrCodeCancel)
			id += 2
		}},
		{"rapid reset of bodies", 100, func(s *h2Script) {
			s.post(id)
			_ = s.fr.WriteRSTStream(id, http2.ErrCodeCancel)
			id += 2
		}},
		{"streams that we have to reset", 110, func(s *h2Script) {
			s.get(id, "miss")
			_ = s.fr.WriteRawFrame(frameWindow, 0, id, make([]byte, 4))
			id += 2
		}},
		{"requests that are none", 110, func(s *h2Script) { s.request(id, true, "GET", ""); id += 2 }},
		{"PING", 1001, func(s *h2Script) { _ = s.fr.WritePing(false, [8]byte{}) }},
		{"PING acknowledged", 1001, func(s *h2Script) { _ = s.fr.WritePing(true, [8]byte{}) }},
		{"SETTINGS", 1001, func(s *h2Script) { _ = s.fr.WriteSettings() }},
		{"SETTINGS acknowledged", 1001, func(s *h2Script) { _ = s.fr.WriteSettingsAck() }},
		{"PRIORITY", 1001, func(s *h2Script) { _ = s.fr.WritePriority(99, http2.PriorityParam{}) }},
		{"WINDOW_UPDATE", 1001, func(s *h2Script) { _ = s.fr.WriteWindowUpdate(0, 1) }},
		{"GOAWAY", 1001, func(s *h2Script) { _ = s.fr.WriteGoAway(0, 0, nil) }},
		{"HEADERS on a stream that was reset", 1012, func(s *h2Script) {
			s.request(1, false, "GET", "relative")
		}},
		{"unknown frames", 1001, func(s *h2Script) { _ = s.fr.WriteRawFrame(0xbe, 0, 0, nil) }},
		{"empty DATA", 1001, func(s *h2Script) {
			if s.c.find(id) == nil {
				s.post(id)
			}
			_ = s.fr.WriteData(id, false, nil)
		}},
		{"a body without an end", maxBody/maxFrame + 1 + fullBudget + 3*gainRequest, func(s *h2Script) {
			if s.c.last == 0 {
				s.post(1)
			}
			_ = s.fr.WriteData(1, false, make([]byte, maxFrame))
		}},
		{"CONTINUATION", maxContinuations + 1, func(s *h2Script) {
			if s.c.blockID == 0 {
				_ = s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: s.block("x", "y")})
			}
			_ = s.fr.WriteContinuation(id, false, nil)
		}},
		{"long CONTINUATION", maxBlock / maxFrame, func(s *h2Script) {
			if s.c.blockID == 0 {
				_ = s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: make([]byte, maxFrame)})
			}
			_ = s.fr.WriteContinuation(id, false, make([]byte, maxFrame))
		}},
		{"a header bomb", 2, func(s *h2Script) {
			// A field of 4 KB, and then one octet for each time it is meant.
			block := append(s.block("x", strings.Repeat("y", 3500)), bytes.Repeat([]byte{0xbe}, 1000)...)
			_ = s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndStream: true, EndHeaders: true})
			id += 2
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			id = 1
			s := opened(t, newFake())
			n, out := 0, 0
			for s.err == nil && n <= tt.frames {
				tt.do(s)
				n++
				out += len(strings.Join(s.play(), ""))
			}
			if e, ok := s.err.(*h2Error); !ok || e.code != codeCalm {
				t.Errorf("after %d: %v", n, s.err)
			}
			if n := len(s.turn.misses); n > maxStreams {
				t.Errorf("%d misses", n)
			}
			s.resolve()
			if s.c.orphans != 0 {
				t.Errorf("%d orphans are left", s.c.orphans)
			}
		})
	}
	// With requests between them the same frames are welcome.
	s := opened(t, newFake())
	for id := uint32(1); id < 10000; id += 2 {
		s.get(id, "hit")
		_ = s.fr.WriteWindowUpdate(0, 100)
		_ = s.fr.WritePing(false, [8]byte{})
		_ = s.fr.WriteRSTStream(id, http2.ErrCodeCancel)
		if s.play(); s.err != nil {
			t.Fatalf("stream %d: %v", id, s.err)
		}
	}
}

func TestH2Drain(t *testing.T) {
	s := opened(t, newFake())
	s.get(1, "miss")
	s.post(3)
	s.want(s.play())
	s.c.drain(&s.turn)
	s.c.drain(&s.turn)
	s.want(s.said(), "GOAWAY 3 NO_ERROR")
	s.get(5, "hit")
	s.post(7)
	_ = s.fr.WriteData(7, true, query(t, "hit", 0))
	_ = s.fr.WriteRSTStream(5, http2.ErrCodeCancel)
	_ = s.fr.WriteData(3, true, query(t, "hit", 0))
	s.want(s.play(), "HEADERS 3 200", "DATA 3 50 end")
	s.want(s.resolve(), "HEADERS 1 200", "DATA 1 52 end")
	if s.c.open() || !s.c.done() {
		t.Error("something is left")
	}
	_ = s.fr.WriteRawFrame(frameData, 0, 0, nil)
	s.want(s.play(), "GOAWAY 3 PROTOCOL_ERROR")

	s = newH2Script(t, newFake())
	s.c.drain(&s.turn)
	s.want(s.said(), "SETTINGS 3=100 4=65536 6=16384", "WINDOW 0 983041", "GOAWAY 0 NO_ERROR")
}
