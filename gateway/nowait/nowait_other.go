//go:build !linux

package nowait

import "net"

// Conn returns conn.
func Conn(conn net.Conn) net.Conn { return conn }
