package listen

import (
	"net"
	"net/netip"
	"sync"

	"dnsgateway/gateway/wire"
)

// machine is what is spoken on one connection: DNS messages with a length in front (TCP, DoT), or HTTP/2. It turns the
// client's octets into queries and answers into octets, and does no I/O, takes no time and starts nothing; its driver
// does. All calls of one machine are made with its connection's lock held. None is made after one that has panicked.
type machine interface {
	// input takes what the client sent, beginning with what the call before left over, and returns how many octets it
	// has used up. It appends what there is to say to t.out and what cannot be answered at once to t.misses. It may stop
	// early, when enough is in t.out or too much is under way: who drives it calls again with the rest, after t.out was
	// taken away or a miss has come back; a call that uses up nothing and says nothing waits for more octets or for a
	// miss. It keeps nothing of data. An error ends the connection when t.out was sent; it says why, for the log at debug
	// level.
	input(t *turn, data []byte) (used int, err error)
	// answer appends the response to a miss of this machine to t.out: msg, or nil when nothing may be sent.
	answer(t *turn, m *miss, msg []byte)
	// drain says goodbye: nothing that the client begins from now on is answered. What is under way still is.
	drain(t *turn)
	// open reports whether the client has begun something that it has to bring to an end besides what input left over,
	// such as a request without its body: then it gets limited time for it, and not the time of an idle connection.
	open() bool
	// done reports, after drain, whether nothing is of use any more that the client may still send: it has begun nothing that
	// is answered, and no answer that is under way can need its window. Then it is read no more.
	done() bool
}

// peer is the other end of a connection, for the queries that come from it.
type peer struct {
	common    *Common
	client    netip.AddrPort
	local     netip.AddrPort
	transport wire.Transport
}

func newPeer(c *Common, nc net.Conn, tr wire.Transport) peer {
	return peer{common: c, client: addrPort(nc.RemoteAddr()), local: addrPort(nc.LocalAddr()), transport: tr}
}

// turn is one call of a machine: memory that belongs to the goroutine that drives it and is used again for the next turn
// of any connection.
type turn struct {
	q      wire.Query
	out    []byte
	misses []*miss
	lane   uint8 // see wire.Query.Lane
	// received is when what input gets was read, for wire.Query.Received.
	received int64
	// full is set by input when it has stopped because too much is under way: the driver reads no more until a miss has
	// come back.
	full bool
	// served counts the queries that have come to their end. A client that brings none to its end is slow.
	served int
	cipher []byte // the driver's: TLS records that are to be sent
}

// turns has the memory of those who have something to say now and then.
var turns = sync.Pool{New: func() any { return new(turn) }}

// trim lets go of what a giant answer has left.
func (t *turn) trim() {
	if cap(t.out) > 2*flushSize {
		t.out = nil
	}
	if cap(t.cipher) > 4*flushSize {
		t.cipher = nil
	}
}

// miss is a query that has to be resolved, with everything that its answer needs. It belongs to its machine until that
// has put it into turn.misses, and then to whoever resolves it.
type miss struct {
	q      wire.Query
	in     []byte // q.Raw
	out    []byte // room for the response
	stream uint32 // HTTP/2: the stream that asked
	form   uint8  // HTTP/2: the form of the answer

	// The driver's.
	response []byte // what Resolve gave, nil for nothing
	next     *miss  // see flow.back
}

var misses = sync.Pool{New: func() any { return new(miss) }}

// newMiss returns q, whose message is msg, with memory of its own.
func newMiss(q *wire.Query, msg []byte) *miss {
	m := misses.Get().(*miss)
	m.in = append(m.in[:0], msg...)
	m.q = *q
	m.q.Parse(m.in)
	return m
}

// free ends m, unless it holds too much to be kept.
func (m *miss) free() {
	m.response, m.next = nil, nil
	if cap(m.in) <= keepBuffer && cap(m.out) <= keepBuffer {
		misses.Put(m)
	}
}
