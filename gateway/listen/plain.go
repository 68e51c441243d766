package listen

import (
	"log/slog"
	"net"
)

// plainReceiver reads one datagram at a time through package net: on systems without batches, and on a Linux whose
// sandbox forbids them.
type plainReceiver struct {
	conn *net.UDPConn
	one  []packet
}

func newPlainReceiver(conn *net.UDPConn) *plainReceiver {
	return &plainReceiver{conn: conn, one: make([]packet, 1)}
}

func (r *plainReceiver) receive() ([]packet, error) {
	p := &r.one[0]
	var err error
	p.n, p.oobn, _, p.addr, err = r.conn.ReadMsgUDPAddrPort(p.in[:], p.oob[:])
	return r.one, err
}

// plainSender sends one datagram at a time. Package net serves one goroutine after the other.
type plainSender struct {
	conn *net.UDPConn
	log  *slog.Logger
}

func (s *plainSender) send(answers []answer) {
	for _, a := range answers {
		if _, _, err := s.conn.WriteMsgUDPAddrPort(a.msg, a.to.info, a.to.addr); err != nil {
			s.log.Debug("cannot send an answer", "client", a.to.addr, "err", err)
		}
	}
}
