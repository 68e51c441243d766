//go:build !linux

package listen

import (
	"crypto/tls"
	"net"
)

// loopSet is empty here: every connection has a goroutine.
type loopSet struct{}

func (*loopSet) add(*streams, net.Conn, *tls.Conn, machine) bool { return false }
func (*loopSet) drain()                                          {}
func (*loopSet) abort()                                          {}
func (*loopSet) stop()                                           {}

// acknowledge has no system call here.
func acknowledge(net.Conn) {}
