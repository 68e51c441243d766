//go:build !linux

package listen

import (
	"crypto/tls"
	"net"
)

// loops are there on Linux only: every connection has a goroutine here.
type loops struct{}

func (*loops) add(*streams, net.Conn, *tls.Conn, machine) bool { return false }
func (*loops) drain()                                          {}
func (*loops) abort()                                          {}
func (*loops) stop()                                           {}
