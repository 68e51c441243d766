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
			ok := d.flush()
			d.mu.Unlock()
			if err != nil || !ok {
				return
			}
			if used == 0 {
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

// h2Frames renders frames: a response's header by its status, bodies by their lengths.
func h2Frames(b []byte) (said []string, err error) {
	fr := http2.NewFramer(nil, bytes.NewReader(b))
	fr.ReadMetaHeaders = hpack.NewDecoder(0, nil) // a client that allows no table
	for {
		f, err := fr.ReadFrame()
		if err == io.EOF {
			return said, nil
		}
		if err != nil {
			return said, fmt.Errorf("behind %q: %w", said, err)
		}
		id, end := f.Header().StreamID, ""
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			if f.StreamEnded() {
				end = " end"
			}
			said = append(said, fmt.Sprintf("HEADERS %d %s%s", id, f.PseudoValue("status"), end))
		case *http2.DataFrame:
			if f.StreamEnded() {
				end = " end"
			}
			said = append(said, fmt.Sprintf("DATA %d %d%s", id, len(f.Data()), end))
		case *http2.SettingsFrame:
			text := "SETTINGS"
			if f.IsAck() {
				text += " ack"
			}
			_ = f.ForeachSetting(func(v http2.Setting) error {
				text += fmt.Sprintf(" %d=%d", v.ID, v.Val)
				return nil
			})
			said = append(said, text)
		case *http2.RSTStreamFrame:
			said = append(said, fmt.Sprintf("RESET %d %v", id, f.ErrCode))
		case *http2.GoAwayFrame:
			said = append(said, fmt.Sprintf("GOAWAY %d %v", f.LastStreamID, f.ErrCode))
		case *http2.WindowUpdateFrame:
			said = append(said, fmt.Sprintf("WINDOW %d %d", id, f.Increment))
		case *http2.PingFrame:
			said = append(said, fmt.Sprintf("PING %v %s", f.IsAck(), f.Data[:]))
		default:
			return said, fmt.Errorf("a frame that we do not send: %v", f)
		}
	}
}

// want compares what the machine said.
func (s *h2Script) want(got []string, want ...string) {
	s.t.Helper()
	if d := cmp.Diff(got, want, cmpopts.EquateEmpty()); d != "" {
		s.t.Errorf("got (-), want (+):\n%s", d)
	}
}

// answerLen is the length of the fake's answer to "hit" and names as long.
const answerLen = 44

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
		if n := testing.AllocsPerRun(1000, ask); n != 0 {
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
