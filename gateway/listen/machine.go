package listen

import (
	"net/netip"

	"dnsgateway/gateway/wire"
)

// machine is what is spoken on one connection: DNS messages with a length in front (TCP, DoT), or HTTP/2. It turns the
// client's octets into queries and answers into octets, and does no I/O, takes no time and starts nothing; its driver
// does. All calls of one machine are made with its connection's lock held.
type machine interface {
	// input takes what the client sent, beginning with what the call before left over, and returns how many octets it
	// has used up. It appends what there is to say to t.out and what cannot be answered at once to t.misses. It may stop
	// early, when enough is in t.out or too much is under way: who drives it calls again with the rest, after t.out was
	// taken away or a miss has come back; a call that uses up nothing waits for more octets or for a miss. It keeps
	// nothing of data. An error ends the connection when t.out was sent; it says why, for the log at debug level.
	input(t *turn, data []byte) (used int, err error)
	// answer appends the response to a miss of this machine to t.out: msg, or nil when nothing may be sent.
	answer(t *turn, m *miss, msg []byte)
	// drain says goodbye: nothing that the client begins from now on is answered. What is under way still is.
	drain(t *turn)
	// open reports whether the client has begun something that it has to bring to an end besides what input left over,
	// such as a request without its body: then it gets limited time for it, and not the time of an idle connection.
	open() bool
	// underWay returns how many misses have not come back.
	underWay() int
}

// peer is the other end of a connection, for the queries that come from it.
type peer struct {
	common    *Common
	client    netip.AddrPort
	local     netip.AddrPort
	transport wire.Transport
}

// turn is one call of a machine: memory that belongs to the goroutine that drives it and is used again for the next turn
// of any connection.
type turn struct {
	q      wire.Query
	out    []byte
	misses []*miss
	lane   uint8 // see wire.Query.Lane
}

// miss is a query that has to be resolved, with everything that its answer needs. It belongs to its machine until that
// has put it into turn.misses, and then to whoever resolves it.
type miss struct {
	q      wire.Query
	in     []byte // q.Raw
	out    []byte // room for the response
	stream uint32 // HTTP/2: the stream that asked
	form   uint8  // HTTP/2: the form of the answer
}
