package listen

import (
	"encoding/binary"
	"sync"

	"dnsgateway/gateway/wire"
)

const (
	// prefixLen is the two-octet length field in front of every message, RFC 1035, section 4.2.2.
	prefixLen = 2
	// flushSize is how much is collected before it is written although more queries are waiting.
	flushSize = 16 << 10
	// aheadSize is how many queries are read before the first of them is answered, so that the Handler can expect them.
	aheadSize = 16
)

// dnsMachine is DNS over a stream: messages with a length in front (RFC 1035, section 4.2.2), any number of them at once
// (RFC 7766, section 6.2.1.1), and answers in the order in which they are ready.
type dnsMachine struct {
	peer
	pipeline int // how many misses may be under way
	misses   int
}

func newDNSMachine(p peer, pipeline int) *dnsMachine { return &dnsMachine{peer: p, pipeline: pipeline} }

// input implements machine.
func (d *dnsMachine) input(t *turn, data []byte) (used int, err error) {
	list := aheads.Get().(*[aheadSize]wire.Query)
	read := 0
	for more := true; more; {
		// No more than there may be misses, or they would be read again each time that one comes back.
		most := min(aheadSize, max(d.pipeline-d.misses, 1))
		qs := d.ahead(t, list[:most], data[used:])
		d.common.expect(qs)
		read = max(read, len(qs))
		more = len(qs) == most
		for i := range qs {
			if t.full = d.misses >= d.pipeline; t.full || len(t.out) >= flushSize {
				more = false
				break
			}
			d.query(t, &qs[i])
			used += prefixLen + len(qs[i].Raw)
		}
	}
	for i := range list[:read] {
		list[i].Raw, list[i].Name = nil, nil // they are the driver's
	}
	aheads.Put(list)
	return used, nil
}

// aheads has memory for the queries that are read ahead.
var aheads = sync.Pool{New: func() any { return new([aheadSize]wire.Query) }}

// ahead reads the first messages of data that are whole into list, as many as there is room for.
func (d *dnsMachine) ahead(t *turn, list []wire.Query, data []byte) []wire.Query {
	n := 0
	for ; n < len(list) && len(data) >= prefixLen; n++ {
		end := prefixLen + int(binary.BigEndian.Uint16(data))
		if len(data) < end {
			break
		}
		q := &list[n]
		q.Client, q.Local, q.Transport, q.Listener = d.client, d.local, d.transport, d.common.Name
		q.Received, q.Lane = t.received, t.lane
		q.Parse(data[prefixLen:end])
		data = data[end:]
	}
	return list[:n]
}

// query answers one message, or makes it a miss.
func (d *dnsMachine) query(t *turn, q *wire.Query) {
	t.served++
	at := len(t.out)
	out, verdict := d.common.serveWire(append(t.out, 0, 0), q)
	if verdict != wire.Answered || !setPrefix(out[at:]) {
		out = out[:at]
	}
	t.out = out
	if verdict == wire.Miss {
		d.misses++
		t.misses = append(t.misses, newMiss(q, q.Raw))
	}
}

// answer implements machine.
func (d *dnsMachine) answer(t *turn, _ *miss, msg []byte) {
	d.misses--
	at := len(t.out)
	t.out = append(append(t.out, 0, 0), msg...)
	if !setPrefix(t.out[at:]) {
		t.out = t.out[:at]
	}
}

// drain implements machine: DNS has no word for it. RFC 8490 has one for sessions, and we have no sessions.
func (*dnsMachine) drain(*turn) {}

// open implements machine: a message is all there is to begin.
func (*dnsMachine) open() bool { return false }

// done implements machine: what is not read by the time of the drain is not answered, and answers leave without the
// client's help.
func (*dnsMachine) done() bool { return true }

// setPrefix writes the length field of one message with room for it in front. It returns false for what cannot be sent:
// nothing, or more than a length field can say.
func setPrefix(framed []byte) bool {
	n := len(framed) - prefixLen
	if n <= 0 || n > wire.MaxMessage {
		return false
	}
	binary.BigEndian.PutUint16(framed, uint16(n))
	return true
}
