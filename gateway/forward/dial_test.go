package forward

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"dnsgateway/gateway/nowait"
)

// TestDialNoWait: the scheduler is not told of the calls of an upstream's connection. Package nowait says what that would cost.
func TestDialNoWait(t *testing.T) {
	ln := must(net.Listen("tcp", "127.0.0.1:0"))
	defer ln.Close()
	conn := must(dialTCP(t.Context(), netip.MustParseAddrPort(ln.Addr().String())))
	defer conn.Close()
	plain := must(net.Dial("tcp", ln.Addr().String()))
	defer plain.Close()
	if got, want := fmt.Sprintf("%T", conn), fmt.Sprintf("%T", nowait.Conn(plain)); got != want {
		t.Errorf("the connection is a %s, want a %s", got, want)
	}
}
