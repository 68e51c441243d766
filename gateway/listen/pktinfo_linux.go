package listen

import (
	"net"
	"net/netip"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// oobSize is room for one control message of either family.
const oobSize = 64

// packetInfo reads the address that a datagram was sent to (RFC 3542, section 6) and makes the answer leave from it.
//
// golang.org/x/net parses control messages too, but allocates for each; ip(7) lets the received message be sent back.
type packetInfo struct{}

// enable asks the kernel for packet information on a wildcard socket. On a dual-stack socket IPv4 datagrams carry an
// IPv6 control message with a mapped address, which the kernel takes back as well.
func (*packetInfo) enable(conn *net.UDPConn, v4 bool) error {
	if v4 {
		return ipv4.NewPacketConn(conn).SetControlMessage(ipv4.FlagDst|ipv4.FlagInterface, true)
	}
	return ipv6.NewPacketConn(conn).SetControlMessage(ipv6.FlagDst|ipv6.FlagInterface, true)
}

// read returns the address that was asked, unmapped, and the control message for the answer, which is oob's with the
// interface taken out: the answer is routed as any other packet, it may leave by another interface than the one that
// the query came in by. Only link-local addresses mean nothing without their interface.
func (*packetInfo) read(oob []byte) (netip.Addr, []byte) {
	for b := oob; len(b) >= unix.SizeofCmsghdr; {
		h, data, rest, err := unix.ParseOneSocketControlMessage(b)
		if err != nil {
			break
		}
		end := len(b) - len(rest)
		switch {
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			clear(data[:4])                                     // ipi_ifindex
			return netip.AddrFrom4([4]byte(data[4:8])), b[:end] // ipi_spec_dst
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			a := netip.AddrFrom16([16]byte(data[:16])).Unmap() // ipi6_addr
			if !a.IsLinkLocalUnicast() || a.Is4() {
				clear(data[16:20]) // ipi6_ifindex
			}
			return a, b[:end]
		}
		b = rest
	}
	return netip.Addr{}, nil
}
