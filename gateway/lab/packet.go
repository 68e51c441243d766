package lab

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"
)

// packetFront serves plain UDP.
type packetFront struct {
	s      *Server
	conn   *net.UDPConn
	ctx    context.Context
	cancel context.CancelFunc
	all    sync.WaitGroup
}

func listenUDP(addr netip.AddrPort) (*net.UDPConn, error) {
	return net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
}

func (s *Server) openPacket(addr netip.AddrPort) (front, error) {
	conn, err := listenUDP(addr)
	if err != nil {
		return nil, err
	}
	f := &packetFront{s: s, conn: conn}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.all.Go(f.serve)
	return f, nil
}

func (f *packetFront) close() {
	f.cancel()
	f.conn.Close()
	f.all.Wait()
}

func (f *packetFront) serve() {
	slots := make(chan struct{}, pipeline)
	buf := make([]byte, 65535)
	for {
		n, client, err := f.conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			if !pause(f.ctx, time.Millisecond) {
				return
			}
			continue // some systems report a client that went away here
		}
		raw := append([]byte(nil), buf[:n]...)
		slots <- struct{}{}
		f.all.Go(func() {
			defer func() { <-slots }()
			if msg, act := f.s.respond(f.ctx, UDP, raw); act == send {
				f.conn.WriteToUDPAddrPort(msg, client)
			}
		})
	}
}

// packetHole is a bound UDP port that takes everything and says nothing: a QUIC server whose handshakes hang.
type packetHole struct {
	conn *net.UDPConn
	done chan struct{}
}

func openPacketHole(addr netip.AddrPort) (front, error) {
	conn, err := listenUDP(addr)
	if err != nil {
		return nil, err
	}
	h := &packetHole{conn: conn, done: make(chan struct{})}
	go func() {
		defer close(h.done)
		for buf := make([]byte, 2048); ; {
			if _, _, err := conn.ReadFromUDPAddrPort(buf); err != nil {
				return
			}
		}
	}()
	return h, nil
}

func (h *packetHole) close() {
	h.conn.Close()
	<-h.done
}
