//go:build !linux

package listen

import (
	"net"
	"net/netip"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// oobSize is room for one control message of either family.
const oobSize = 128

// packetInfo reads the address that a datagram was sent to (RFC 3542, section 6) and makes the answer leave from it,
// as far as golang.org/x/net knows how to do that on this system. Here it allocates.
type packetInfo struct{ v4, on bool }

// enable asks the system for packet information on a wildcard socket.
func (p *packetInfo) enable(conn *net.UDPConn, v4 bool) error {
	p.v4 = v4
	var err error
	if v4 {
		err = ipv4.NewPacketConn(conn).SetControlMessage(ipv4.FlagDst, true)
	} else {
		err = ipv6.NewPacketConn(conn).SetControlMessage(ipv6.FlagDst, true)
	}
	p.on = err == nil
	return err
}

// read returns the address that was asked, unmapped, and the control message for the answer.
func (p *packetInfo) read(oob []byte) (netip.Addr, []byte) {
	if !p.on || len(oob) == 0 {
		return netip.Addr{}, nil
	}
	var dst net.IP
	var answer []byte
	if p.v4 {
		var cm ipv4.ControlMessage
		if cm.Parse(oob) != nil {
			return netip.Addr{}, nil
		}
		dst = cm.Dst
		answer = (&ipv4.ControlMessage{Src: dst}).Marshal()
	} else {
		var cm ipv6.ControlMessage
		if cm.Parse(oob) != nil {
			return netip.Addr{}, nil
		}
		dst = cm.Dst
		answer = (&ipv6.ControlMessage{Src: dst}).Marshal()
	}
	a, _ := netip.AddrFromSlice(dst)
	return a.Unmap(), answer
}
