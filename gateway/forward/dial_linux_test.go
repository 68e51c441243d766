package forward

import (
	"net"
	"net/netip"
	"testing"
)

// TestDialNoWait: the scheduler is not told of the calls of an upstream's connection. Package nowait says what that would cost.
func TestDialNoWait(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	conn, err := dialTCP(t.Context(), netip.MustParseAddrPort(ln.Addr().String()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, plain := conn.(*net.TCPConn); plain {
		t.Error("the connection is package net's own")
	}
}
