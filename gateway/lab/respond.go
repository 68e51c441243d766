package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"hash/fnv"
	"math/rand/v2"

	"github.com/miekg/dns"
)

// action is what a transport does with a response.
type action uint8

const (
	send  action = iota
	drop         // say nothing; where a stream is held open for the response, hold it
	cut          // send half, then end in good order
	reset        // send half, then end without order
)

// respond makes the response to raw, which arrived over via (UDP or TCP for the two halves of a UDP server). It waits as
// long as the name or the fault takes, but no longer than ctx lives. raw is not kept.
func (s *Server) respond(ctx context.Context, via Scheme, raw []byte) ([]byte, action) {
	s.queries.Add(1)
	if s.lab.onQuery != nil {
		s.lab.onQuery(s.name, bytes.Clone(raw))
	}
	req := new(dns.Msg)
	if err := req.Unpack(raw); err != nil || req.Response {
		if len(raw) < 12 || raw[2]&0x80 != 0 {
			return nil, drop
		}
		return formErr(raw), send
	}
	resp, takes := s.lab.zone.answer(req)
	if f := s.Fault(); f.Kind == Slow {
		takes += f.Duration
	}
	if !pause(ctx, takes) {
		return nil, drop
	}
	act := send
	if s.isStuck(ctx) {
		return nil, drop
	}
	switch f := s.Fault(); f.Kind { // looked at again: a fault that began meanwhile is in force for this question, too
	case Silent:
		return nil, drop
	case Loss:
		if rand.Float64() < f.Share {
			return nil, drop
		}
	case Garbage:
		return garbage(seed(raw)), send
	case ServFail:
		resp = failure(req, dns.RcodeServerFailure)
	case Refused:
		resp = failure(req, dns.RcodeRefused)
	case WrongID:
		resp.Id ^= 0x5555
	case WrongQuestion:
		for i := range resp.Question {
			resp.Question[i].Name = "wrong." + zoneName + "."
		}
	case Truncated:
		act = cut
	case RST:
		if act = reset; via == UDP {
			act = drop
		}
	}
	msg, err := pack(via, req, resp)
	if err != nil {
		s.lab.log.Debug("packing a response", "server", s.name, "err", err)
		return formErr(raw), send
	}
	if act == cut && via == UDP {
		return msg[:len(msg)/2], send
	}
	return msg, act
}

// failure returns an empty response with rcode.
func failure(req *dns.Msg, rcode int) *dns.Msg {
	resp := new(dns.Msg).SetRcode(req, rcode)
	resp.RecursionAvailable = true
	return resp
}

// formErr returns a FORMERR with the ID and the opcode of raw and nothing else.
func formErr(raw []byte) []byte {
	msg := make([]byte, 12)
	copy(msg, raw[:2])
	msg[2] = 0x80 | raw[2]&0x79 // QR, opcode, RD
	msg[3] = 0x80 | dns.RcodeFormatError
	return msg
}

// pack gives resp its OPT record, the size that the client can take, and padding where it was asked for.
func pack(via Scheme, req, resp *dns.Msg) ([]byte, error) {
	size := dns.MinMsgSize
	asked := req.IsEdns0()
	if asked == nil {
		resp.Extra = nil
	} else {
		size = min(max(int(asked.UDPSize()), dns.MinMsgSize), ednsSize)
		resp.SetEdns0(ednsSize, asked.Do())
		if len(req.Question) == 1 && dns.CanonicalName(req.Question[0].Name) == edeName {
			opt := resp.IsEdns0()
			opt.Option = append(opt.Option, &dns.EDNS0_EDE{InfoCode: edeCode, ExtraText: edeText})
		}
	}
	if via == UDP {
		resp.Truncate(size)
	}
	msg, err := resp.Pack()
	if err != nil || !via.encrypted() || !hasPadding(asked) {
		return msg, err
	}
	fill := (padBlock - (len(msg)+4)%padBlock) % padBlock // the option itself takes 4 octets
	opt := resp.IsEdns0()
	opt.Option = append(opt.Option, &dns.EDNS0_PADDING{Padding: make([]byte, fill)})
	return resp.Pack()
}

// hasPadding reports whether opt, which may be nil, asks for padding.
func hasPadding(opt *dns.OPT) bool {
	if opt == nil {
		return false
	}
	for _, o := range opt.Option {
		if o.Option() == dns.EDNS0PADDING {
			return true
		}
	}
	return false
}

// seed is a number that depends on the question alone and not on the ID.
func seed(raw []byte) uint64 {
	h := fnv.New64a()
	h.Write(raw[2:])
	return h.Sum64()
}

// frame puts the two-octet length before msg, RFC 1035, section 4.2.2.
func frame(msg []byte) []byte {
	return append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(msg)), uint16(len(msg))), msg...)
}
