// Command floor is what the machine and Go's libraries cost without any DNS work, the measure that a server in Go can
// come near to and not pass. Names whose first label begins with h get a fixed answer made in place from the query; all
// others go through one pipelined DoT connection, as the misses of a forwarder do. There is no cache, no check, no bound.
//
//	floor UDP-AND-TCP-ADDR DOT-ADDR DOH-ADDR CERT KEY UPSTREAM UPSTREAM-NAME CA
//
// UDP: one goroutine, golang.org/x/net/ipv4's batches. TCP and DoT: a goroutine for each connection, and the answers to
// all queries that one read brought leave in one write. DoH: net/http.
package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/net/ipv4"
)

const (
	batch  = 32
	header = 12
)

// record is an A record of the question's name: 192.0.2.1, TTL 300.
var record = [16]byte{0xc0, header, 0, 1, 0, 1, 0, 0, 1, 44, 0, 4, 192, 0, 2, 1}

func main() {
	log.SetFlags(0)
	if len(os.Args) != 9 {
		log.Fatal("usage: floor UDP-AND-TCP-ADDR DOT-ADDR DOH-ADDR CERT KEY UPSTREAM UPSTREAM-NAME CA")
	}
	if err := serve(os.Args[1:]); err != nil {
		log.Fatal(err)
	}
}

// serve returns the first error of any of the servers.
func serve(args []string) error {
	cert, err := tls.LoadX509KeyPair(args[3], args[4])
	if err != nil {
		return err
	}
	config := &tls.Config{Certificates: []tls.Certificate{cert}}
	ca, err := os.ReadFile(args[7])
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	up, err := tls.Dial("tcp", args[5], &tls.Config{RootCAs: roots, ServerName: args[6]})
	if err != nil {
		return err
	}
	addr, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return err
	}
	udp, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(addr))
	if err != nil {
		return err
	}
	plain, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	dot, err := tls.Listen("tcp", args[1], config)
	if err != nil {
		return err
	}
	doh := &http.Server{Addr: args[2], Handler: http.HandlerFunc(serveHTTP), TLSConfig: config}
	relay := &relay{up: up, udp: udp, ready: make(chan struct{}, 1)}
	ended := make(chan error)
	for _, f := range []func() error{
		func() error { return serveUDP(udp, relay) }, relay.send, relay.receive,
		func() error { return serveStreams(plain) }, func() error { return serveStreams(dot) },
		func() error { return doh.ListenAndServeTLS("", "") },
	} {
		go func() { ended <- f() }()
	}
	return <-ended
}

// answer turns the query in b[:n] into its answer, in place: b has to have room for the record.
func answer(b []byte, n int) []byte {
	b[2] |= 0x84 // QR, AA
	b[3] = 0x80  // RA
	b[7] = 1     // one record
	copy(b[n:], record[:])
	return b[:n+len(record)]
}

func serveUDP(c *net.UDPConn, r *relay) error {
	if err := errors.Join(c.SetReadBuffer(4<<20), c.SetWriteBuffer(4<<20)); err != nil {
		return err
	}
	p := ipv4.NewPacketConn(c)
	in, out := make([]ipv4.Message, batch), make([]ipv4.Message, batch)
	var buffers [batch][2048]byte
	for i := range in {
		in[i].Buffers, out[i].Buffers = [][]byte{buffers[i][:1500]}, [][]byte{nil}
	}
	for {
		n, err := p.ReadBatch(in, 0)
		if err != nil {
			return err
		}
		ready := 0
		for i := range n {
			b, l := buffers[i][:], in[i].N
			switch {
			case l <= header+1:
			case b[header+1] == 'h':
				out[ready].Buffers[0], out[ready].Addr = answer(b, l), in[i].Addr
				ready++
			default:
				r.add(b[:l], in[i].Addr)
			}
		}
		for done := 0; done < ready; {
			k, err := p.WriteBatch(out[done:ready], 0)
			if err != nil {
				return err
			}
			done += k
		}
	}
}

// relay sends queries on through one connection and matches the answers by an ID of its own.
type relay struct {
	up    *tls.Conn
	udp   *net.UDPConn
	ready chan struct{} // something is pending

	mu      sync.Mutex
	asked   [65536]asker
	next    uint16
	pending []byte // framed queries that wait to be written together
}

type asker struct {
	addr net.Addr
	id   uint16
}

// add queues a query; it copies q.
func (r *relay) add(q []byte, from net.Addr) {
	r.mu.Lock()
	r.asked[r.next] = asker{from, binary.BigEndian.Uint16(q)}
	r.pending = binary.BigEndian.AppendUint16(r.pending, uint16(len(q)))
	r.pending = binary.BigEndian.AppendUint16(r.pending, r.next)
	r.pending = append(r.pending, q[2:]...)
	r.next++
	r.mu.Unlock()
	select {
	case r.ready <- struct{}{}:
	default:
	}
}

func (r *relay) send() error {
	var out []byte
	for range r.ready {
		r.mu.Lock()
		out, r.pending = r.pending, out[:0]
		r.mu.Unlock()
		if len(out) == 0 {
			continue
		}
		if _, err := r.up.Write(out); err != nil {
			return err
		}
	}
	return nil
}

func (r *relay) receive() error {
	in, b := bufio.NewReaderSize(r.up, 16384), make([]byte, 65535)
	for {
		m, err := readMessage(in, b)
		if err != nil {
			return err
		}
		r.mu.Lock()
		to := r.asked[binary.BigEndian.Uint16(m)]
		r.mu.Unlock()
		binary.BigEndian.PutUint16(m, to.id)
		if _, err := r.udp.WriteTo(m, to.addr); err != nil {
			return err
		}
	}
}

// readMessage reads a message with its length in front of it (RFC 1035, section 4.2.2) into b.
func readMessage(r io.Reader, b []byte) ([]byte, error) {
	if _, err := io.ReadFull(r, b[:2]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(b))
	if n <= header || n > len(b) {
		return nil, errors.New("a message of unusable length")
	}
	_, err := io.ReadFull(r, b[:n])
	return b[:n], err
}

func serveStreams(l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go serveStream(c)
	}
}

func serveStream(c net.Conn) {
	defer c.Close()
	const most = 4096
	in, out := bufio.NewReaderSize(c, most), make([]byte, 0, most)
	b := make([]byte, 1500)
	for {
		q, err := readMessage(in, b[:1500-len(record)])
		if err != nil {
			return
		}
		a := answer(b, len(q))
		out = append(binary.BigEndian.AppendUint16(out, uint16(len(a))), a...)
		if next, err := in.Peek(min(2, in.Buffered())); err == nil && len(next) == 2 &&
			in.Buffered() >= 2+int(binary.BigEndian.Uint16(next)) && len(out) < most-len(b) {
			continue // the next query is here already
		}
		if _, err := c.Write(out); err != nil {
			return
		}
		out = out[:0]
	}
}

func serveHTTP(w http.ResponseWriter, r *http.Request) {
	q, err := base64.RawURLEncoding.DecodeString(r.URL.Query().Get("dns"))
	if err != nil || len(q) <= header {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/dns-message")
	n := len(q)
	w.Write(answer(append(q, record[:]...), n))
}
