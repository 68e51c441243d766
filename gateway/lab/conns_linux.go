package lab

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// hasEnded reports whether the peer of conn has sent its FIN or RST, read or not.
func hasEnded(conn net.Conn) bool {
	c, ok := conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return true // we have closed it
	}
	ended := true
	// Control fails on what we have closed, and leaves ended as it is.
	_ = raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		ended = err == nil && info.State != unix.BPF_TCP_ESTABLISHED
	})
	return ended
}
