//go:build !linux

package listen

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
)

// defaultSockets is how many goroutines read the one socket. They take turns in the kernel, so more than a few gain
// nothing.
func defaultSockets() int { return min(runtime.GOMAXPROCS(0), 4) }

// bindPacket binds one socket: SO_REUSEPORT means something else, or nothing, on other systems than Linux.
func bindPacket(ctx context.Context, addr netip.AddrPort, _ int) ([]*net.UDPConn, error) {
	conn, err := bindUDP(ctx, addr)
	return []*net.UDPConn{conn}, err
}

// sockaddr has a use only where there are batches.
type sockaddr struct{}

func canBatch(*net.UDPConn) bool { return false }

func newBatchReceiver(conn *net.UDPConn, _ bool) receiver { return newPlainReceiver(conn) }

func newBatchSender(conn *net.UDPConn, log *slog.Logger) sender {
	return &plainSender{conn: conn, log: log}
}
