package listen

import (
	"encoding/binary"
	"slices"
	"sync"
	"time"

	"dnsgateway/gateway/wire"
)

// HTTP/2, RFC 9113, for DoH alone: a [machine] that knows frames, streams, flow control and what a client may not do. What
// a request means and what is answered is said at [doh].
//
// A request that its header completes and that is answered at once (a GET that the cache has) leaves nothing behind: only
// requests whose body has not come, misses, and responses that wait for the client's window are a stream here.

const (
	h2Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" // RFC 9113, section 3.4

	frameHeader = 9
	// maxFrame is the largest frame that we take, and make: the least that a client may ask for, and the protocol's
	// default.
	maxFrame = 16 << 10
	maxInt31 = 1<<31 - 1
	// defaultWindow is what either side may send before it heard of the other, RFC 9113, section 6.9.2.
	defaultWindow = 1<<16 - 1
	// enough is how much a turn says before it lets its driver write.
	enough = 16 << 10
	// maxBlock is what a header block may have, in octets as it comes and in the size of its fields: a request with more than
	// maxHeader is answered with 431, but its block is taken to the end, because the next one needs the table. A client that
	// sends more than this is sent away. maxContinuations is in how many frames besides the first one a block may come;
	// maxBlock fits into eight.
	maxBlock         = 8 * maxHeader
	maxContinuations = 16
	// maxBodies is how much of bodies that have not come to their end a connection may have here. They hold what a client
	// was allowed to send at once, and the window is opened again as they arrive: were it not, a hundred requests could
	// each wait for the others to leave room.
	maxBodies = connWindow
	// maxBody is how much of a request's body is read. What is in it behind a message's greatest length is dropped, so that a
	// client that reads nothing before it has sent everything learns why it is refused.
	maxBody = 1 << 20
	// maxHeld is how much may wait for the client's window. A client that has more waiting does not read.
	maxHeld = maxUnsent
	// fullBudget is what a client may cost us before it has asked for anything: see spend.
	fullBudget = 1000
	// What things cost, and what an answered request brings. A client needs two or three frames a request besides those
	// that carry it (WINDOW_UPDATE, an acknowledgement, PRIORITY); one that gave up its request has us work for nothing.
	costFrame   = 1
	costReset   = 10
	gainRequest = 5
)

// Frame types and flags, RFC 9113, section 6.
const (
	frameData         = 0
	frameHeaders      = 1
	framePriority     = 2
	frameReset        = 3
	frameSettings     = 4
	framePush         = 5
	framePing         = 6
	frameGoAway       = 7
	frameWindow       = 8
	frameContinuation = 9

	flagAck        = 0x1
	flagEndStream  = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20
)

// Settings, RFC 9113, section 6.5.2 and RFC 9218, section 2.1.
const (
	settingPush         = 2
	settingStreams      = 3
	settingWindow       = 4
	settingFrame        = 5
	settingHeaderList   = 6
	settingNoPriorities = 9
	settingLength       = 6 // in octets, of each
)

// h2Error is an error of a connection or a stream, RFC 9113, sections 5.4 and 7.
type h2Error struct {
	code uint32
	text string
}

// Error implements error.
func (e *h2Error) Error() string { return "HTTP/2: " + e.text }

const (
	codeNone        = 0
	codeProtocol    = 1
	codeInternal    = 2
	codeFlow        = 3
	codeClosed      = 5
	codeFrameSize   = 6
	codeRefused     = 7
	codeCompression = 9
	codeCalm        = 11
)

var (
	errPreface      = &h2Error{codeProtocol, "no connection preface"}
	errNoSettings   = &h2Error{codeProtocol, "the first frame is not SETTINGS"}
	errFrameSize    = &h2Error{codeFrameSize, "frame of a wrong size"}
	errFrameStream  = &h2Error{codeProtocol, "frame on a stream where it cannot be"}
	errIdle         = &h2Error{codeProtocol, "frame on a stream that was not opened"}
	errClosed       = &h2Error{codeClosed, "frame on a stream that is closed"}
	errPadding      = &h2Error{codeProtocol, "more padding than frame"}
	errContinuation = &h2Error{codeProtocol, "CONTINUATION out of place"}
	errPush         = &h2Error{codeProtocol, "PUSH_PROMISE from a client"}
	errSetting      = &h2Error{codeProtocol, "setting out of range"}
	errWindow       = &h2Error{codeFlow, "flow-control window out of range"}
	errOverrun      = &h2Error{codeFlow, "more octets than the window allows"}
	errNoIncrement  = &h2Error{codeProtocol, "WINDOW_UPDATE by nothing"}
	errDependency   = &h2Error{codeProtocol, "stream depends on itself"}
	errBlock        = &h2Error{codeCalm, "header block without an end"}
	errCalm         = &h2Error{codeCalm, "client keeps us busy without asking"}
	errEnded        = &h2Error{codeNone, "octets behind the end"}
)

// h2 is one HTTP/2 connection.
type h2 struct {
	peer *peer
	doh  *doh

	began   bool // our SETTINGS were sent
	preface bool // theirs has come
	settled bool // their first SETTINGS have come
	drained bool // GOAWAY was sent, final is its stream
	dead    bool

	table   fieldTable
	streams []*h2Stream // by their ids; not those that are closed
	ignored []uint32    // streams that we have reset before the client had ended them, at most maxStreams
	last    uint32      // the client's latest stream
	final   uint32      // the latest one before GOAWAY
	opened  uint64      // bit i: stream last-2*i was opened and not skipped

	// A header block whose end has not come.
	block     []byte
	blockID   uint32 // 0 when there is none
	blockEnd  bool   // END_STREAM
	blockSelf bool   // the stream depends on itself
	blocks    int    // CONTINUATION frames

	window        int64 // what we may send
	streamWindow  int64 // what we may send on a new stream
	receiveWindow int32 // what the client may send
	orphans       int   // misses that have not come back and whose stream is no more
	queued        int   // streams in that state
	again         int   // octets of the frame that was used already and comes again, because streams are queued
	bodies        int   // octets in streams that are not whole
	held          int   // octets in streams that wait for the window
	budget        int
}

// streamState is what a stream waits for.
type streamState uint8

const (
	collecting streamState = iota // its body
	discarding                    // its end; what is answered is known
	resolving                     // its miss
	sending                       // the client's window
	ending                        // its end, which says nothing any more
	queued                        // its turn: it was asked in one piece, and there was enough to say before
)

// h2Stream is a stream that is not answered, or that its client has not ended.
type h2Stream struct {
	id       uint32
	state    streamState
	form     form
	open     bool     // the client has not ended it
	refusal  *refusal // discarding
	length   int64    // Content-Length, -1 without
	received int64
	window   int64 // what we may send
	receive  int32 // what the client may send
	// buf is the message while the client sends, and then the rest of the response's body.
	buf  []byte
	sent int // of buf
}

var h2Streams = sync.Pool{New: func() any { return new(h2Stream) }}

// h2Scratch is memory for one call of input.
type h2Scratch struct {
	fields fieldReader
	header h2Header
	in     []byte // a message from a URL
	out    []byte // a response

	asked   [aheadSize]h2Ask
	queries [aheadSize]wire.Query // those of asked
	waiting int                   // how many of these are to be answered
}

// h2Ask is a request in one piece that is answered together with those that follow.
type h2Ask struct {
	id uint32
	in []byte // its message
}

var h2Scratches = sync.Pool{New: func() any { return new(h2Scratch) }}

// newH2 returns the machine of a connection that nothing has come on.
func newH2(p *peer, d *doh) *h2 {
	return &h2{
		peer: p, doh: d, table: fieldTable{max: maxTable}, window: defaultWindow, streamWindow: defaultWindow,
		receiveWindow: connWindow, budget: fullBudget,
	}
}

// input implements machine.
func (c *h2) input(t *turn, data []byte) (used int, err error) {
	if c.dead {
		return len(data), errEnded
	}
	c.begin(t)
	if !c.preface {
		n := min(len(data), len(h2Preface))
		if string(data[:n]) != h2Preface[:n] {
			return c.fail(t, 0, errPreface)
		}
		if n < len(h2Preface) {
			return 0, nil
		}
		c.preface = true
		used = n
	}
	x := h2Scratches.Get().(*h2Scratch)
	frame := 0 // the length of the last one
	if c.askQueued(t, x); c.queued == 0 {
		used += c.again
		c.again = 0
	}
	for c.queued == 0 && len(t.out) < enough {
		rest := data[used:]
		if len(rest) < frameHeader {
			break
		}
		n := int(rest[0])<<16 | int(rest[1])<<8 | int(rest[2])
		if n > maxFrame {
			err = errFrameSize
			break
		}
		if len(rest) < frameHeader+n {
			break
		}
		frame = frameHeader + n
		used += frame
		if rest[3] != frameHeaders {
			c.askNow(t, x) // it may be about one of them
		}
		id := binary.BigEndian.Uint32(rest[5:]) & maxInt31
		if err = c.frame(t, x, rest[3], rest[4], id, rest[frameHeader:frameHeader+n]); err != nil {
			break
		}
	}
	c.askNow(t, x)
	if cap(x.fields.text) <= keepBuffer && cap(x.in) <= keepBuffer && cap(x.out) <= keepBuffer {
		x.fields.rest = nil
		h2Scratches.Put(x)
	}
	switch {
	case err != nil:
		return c.fail(t, used, err)
	case c.queued > 0 && frame > 0:
		// Our driver calls again as long as there is something to use.
		c.again = frame
		used -= frame
	}
	return used, nil
}

// begin sends our half of the preface.
func (c *h2) begin(t *turn) {
	if c.began {
		return
	}
	c.began = true
	t.out = appendFrame(t.out, 3*settingLength, frameSettings, 0, 0)
	for _, s := range [...][2]uint32{
		{settingStreams, maxStreams}, {settingWindow, streamWindow}, {settingHeaderList, maxHeader},
	} {
		t.out = binary.BigEndian.AppendUint16(t.out, uint16(s[0]))
		t.out = binary.BigEndian.AppendUint32(t.out, s[1])
	}
	t.out = appendWindow(t.out, 0, connWindow-defaultWindow)
}

// fail ends the connection, RFC 9113, section 5.4.1.
func (c *h2) fail(t *turn, used int, err error) (int, error) {
	code := uint32(codeCompression)
	if e, ok := err.(*h2Error); ok {
		code = e.code
	}
	if !c.drained {
		c.final = c.last
	}
	c.dead = true
	t.out = c.appendGoAway(t.out, code)
	for _, st := range c.streams {
		if st.state == resolving {
			c.orphans++
		}
		c.release(st)
	}
	c.streams, c.ignored, c.block, c.table, c.queued = nil, nil, nil, fieldTable{}, 0
	return used, err
}

func (c *h2) appendGoAway(dst []byte, code uint32) []byte {
	dst = appendFrame(dst, 8, frameGoAway, 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, c.final)
	return binary.BigEndian.AppendUint32(dst, code)
}

// drain implements machine. Streams that the client opens later have numbers beyond the one in GOAWAY, which tells it that
// it may ask elsewhere (RFC 9113, section 6.8).
func (c *h2) drain(t *turn) {
	if c.dead || c.drained {
		return
	}
	c.begin(t)
	c.drained, c.final = true, c.last
	t.out = c.appendGoAway(t.out, codeNone)
}

// open implements machine.
func (c *h2) open() bool {
	if c.blockID != 0 {
		return true
	}
	for _, st := range c.streams {
		if st.open || st.state == sending {
			return true
		}
	}
	return false
}

// done implements machine. A stream that is resolved may have to wait for the client's window then.
func (c *h2) done() bool {
	return c.blockID == 0 && !slices.ContainsFunc(c.streams, func(st *h2Stream) bool { return st.state != ending })
}

// spend takes from the client's budget: frames and streams that ask for nothing, or that it gives up, have to be few
// beside requests that are answered. That bounds rapid reset (CVE-2023-44487) and floods of SETTINGS, PING, PRIORITY,
// WINDOW_UPDATE, empty frames and whatever else costs more here than there.
func (c *h2) spend(cost int) error {
	if c.budget -= cost; c.budget < 0 {
		return errCalm
	}
	return nil
}

func (c *h2) earn(gain int) { c.budget = min(c.budget+gain, fullBudget) }

// frame takes one frame. An error is one of the connection.
func (c *h2) frame(t *turn, x *h2Scratch, kind, flags byte, id uint32, b []byte) error {
	switch {
	case !c.settled && (kind != frameSettings || flags&flagAck != 0):
		return errNoSettings
	case c.blockID != 0 && (kind != frameContinuation || id != c.blockID):
		return errContinuation // RFC 9113, section 6.10
	}
	switch kind {
	case frameData:
		return c.data(t, x, flags, id, b)
	case frameHeaders:
		return c.headers(t, x, flags, id, b)
	case frameContinuation:
		return c.continuation(t, x, flags, b)
	case framePush:
		return errPush
	}
	if err := c.spend(costFrame); err != nil {
		return err
	}
	switch kind {
	case framePriority:
		return c.priority(t, id, b)
	case frameReset:
		return c.clientReset(id, b)
	case frameSettings:
		return c.settings(t, flags, id, b)
	case framePing:
		switch {
		case id != 0:
			return errFrameStream
		case len(b) != 8:
			return errFrameSize
		case flags&flagAck == 0:
			t.out = append(appendFrame(t.out, 8, framePing, flagAck, 0), b...)
		}
	case frameGoAway:
		// The client opens no more streams and takes none of ours, of which there are none.
		switch {
		case id != 0:
			return errFrameStream
		case len(b) < 8:
			return errFrameSize
		}
	case frameWindow:
		return c.windowUpdate(t, id, b)
	}
	return nil // RFC 9113, section 5.5: unknown types are ignored
}

// priority checks a frame that means nothing any more (RFC 9113, section 5.3.2).
func (c *h2) priority(t *turn, id uint32, b []byte) error {
	switch {
	case id == 0:
		return errFrameStream
	case len(b) != 5:
		if c.idle(id) {
			return errFrameSize
		}
		return c.reset(t, id, codeFrameSize)
	case binary.BigEndian.Uint32(b)&maxInt31 == id: // RFC 7540, section 5.3.1
		return errDependency
	}
	return nil
}

// clientReset ends a stream at the client's wish. Its miss goes on and is no one's.
func (c *h2) clientReset(id uint32, b []byte) error {
	switch {
	case id == 0:
		return errFrameStream
	case len(b) != 4:
		return errFrameSize
	case c.idle(id):
		return errIdle
	}
	c.forget(id)
	st := c.find(id)
	if st == nil {
		return nil
	}
	early := st.state != ending // else it is right to send no more of what is of no use
	c.remove(st)
	if early {
		return c.spend(costReset)
	}
	return nil
}

func (c *h2) settings(t *turn, flags byte, id uint32, b []byte) error {
	switch {
	case id != 0:
		return errFrameStream
	case flags&flagAck != 0 && len(b) != 0, len(b)%settingLength != 0:
		return errFrameSize
	case flags&flagAck != 0:
		return nil
	}
	c.settled = true
	// Our header blocks use no dynamic table and our frames have at most maxFrame octets, so that only the window is to
	// be remembered.
	for ; len(b) > 0; b = b[settingLength:] {
		value := binary.BigEndian.Uint32(b[2:])
		switch binary.BigEndian.Uint16(b) {
		case settingPush, settingNoPriorities:
			if value > 1 {
				return errSetting
			}
		case settingWindow:
			if value > maxInt31 {
				return errWindow
			}
			// Section 6.9.2: it holds for open streams too, whose windows may become negative.
			delta := int64(value) - c.streamWindow
			c.streamWindow = int64(value)
			for _, st := range c.streams {
				if st.window += delta; st.window > maxInt31 {
					return errWindow
				}
			}
		case settingFrame:
			if value < maxFrame || value >= 1<<24 {
				return errSetting
			}
		}
	}
	t.out = appendFrame(t.out, 0, frameSettings, flagAck, 0)
	return c.push(t)
}

func (c *h2) windowUpdate(t *turn, id uint32, b []byte) error {
	if len(b) != 4 {
		return errFrameSize
	}
	n := int64(binary.BigEndian.Uint32(b) & maxInt31)
	if id == 0 {
		if n == 0 {
			return errNoIncrement
		}
		if c.window += n; c.window > maxInt31 {
			return errWindow
		}
		return c.push(t)
	}
	st := c.find(id)
	switch {
	case c.idle(id):
		return errIdle
	case st == nil && n == 0:
		return errNoIncrement
	case st == nil && n+c.streamWindow > maxInt31+streamWindow:
		return errWindow // whatever we have sent of what answers have
	case st == nil:
		return nil // it may come after the end, section 5.1
	case n == 0:
		return c.reset(t, id, codeProtocol)
	}
	if st.window += n; st.window > maxInt31 {
		return c.reset(t, id, codeFlow)
	}
	return c.push(t)
}

// data takes a piece of a body.
func (c *h2) data(t *turn, x *h2Scratch, flags byte, id uint32, b []byte) error {
	if id == 0 {
		return errFrameStream
	}
	size := int32(len(b))
	if c.receiveWindow -= size; c.receiveWindow < 0 {
		return errOverrun
	}
	if gone := connWindow - c.receiveWindow; gone >= connWindow/2 {
		c.receiveWindow += gone
		t.out = appendWindow(t.out, 0, uint32(gone))
	}
	b, err := unpad(flags, b)
	if err != nil {
		return err
	}
	end := flags&flagEndStream != 0
	if len(b) == 0 && !end {
		if err := c.spend(costFrame); err != nil {
			return err
		}
	}
	st := c.find(id)
	switch {
	case st == nil && c.idle(id):
		return errIdle
	case st == nil && !c.ignores(id):
		return errClosed
	case st == nil:
		if end {
			c.forget(id)
		}
		return c.spend(costFrame)
	case !st.open:
		return c.reset(t, id, codeClosed)
	}
	if st.receive -= size; st.receive < 0 {
		return c.reset(t, id, codeFlow)
	}
	// The window of a stream has room for the largest message, and for its padding as it comes.
	if padding := size - int32(len(b)); padding > 0 && !end {
		st.receive += padding
		t.out = appendWindow(t.out, id, uint32(padding))
	}
	st.received += int64(len(b))
	st.open = !end
	if st.length >= 0 && (st.received > st.length || end && st.received < st.length) {
		return c.malformed(t, id, end) // RFC 9113, section 8.1.1
	}
	switch {
	case st.state == sending || st.state == ending:
		c.rest(t, st)
		return nil
	case st.received > wire.MaxMessage:
		if st.refusal == nil {
			st.refusal = errTooLarge
		}
		c.refuse(t, st)
		return nil
	case st.state == collecting && end && len(st.buf) == 0:
		c.ask(t, x, id, st, b, st.form)
		return nil
	case st.state == collecting:
		if c.bodies+len(b) > maxBodies {
			// Nothing was done with it, which this code says: the client may ask again.
			return c.reset(t, id, codeRefused)
		}
		c.bodies += len(b)
		st.buf = append(st.buf, b...)
	}
	if end {
		c.ended(t, x, st)
	}
	return nil
}

// ended answers a request that has come to its end.
func (c *h2) ended(t *turn, x *h2Scratch, st *h2Stream) {
	if st.refusal != nil {
		c.refuse(t, st)
		return
	}
	c.ask(t, x, st.id, st, st.buf, st.form)
}

// refuse answers a stream with the error that is its own.
func (c *h2) refuse(t *turn, st *h2Stream) {
	r := refused(st.refusal, st.form)
	c.respond(t, st.id, st, &r, time.Now().Unix())
}

// unpad takes the padding from a DATA or HEADERS frame.
func unpad(flags byte, b []byte) ([]byte, error) {
	if flags&flagPadded == 0 {
		return b, nil
	}
	if len(b) == 0 {
		return nil, errFrameSize
	}
	n := len(b) - 1 - int(b[0])
	if n < 0 {
		return nil, errPadding
	}
	return b[1 : 1+n], nil
}

// headers takes the beginning of a header block, which often is all of it.
func (c *h2) headers(t *turn, x *h2Scratch, flags byte, id uint32, b []byte) error {
	if id&1 == 0 {
		return errFrameStream // section 5.1.1
	}
	b, err := unpad(flags, b)
	if err != nil {
		return err
	}
	self := false
	if flags&flagPriority != 0 {
		if len(b) < 5 {
			return errFrameSize
		}
		self = binary.BigEndian.Uint32(b)&maxInt31 == id
		b = b[5:]
	}
	end := flags&flagEndStream != 0
	if flags&flagEndHeaders != 0 {
		return c.header(t, x, id, b, end, self)
	}
	c.block = append(c.block[:0], b...)
	c.blockID, c.blockEnd, c.blockSelf, c.blocks = id, end, self, 0
	return nil
}

// continuation takes more of a header block. Its length and its frames are both bounded, since frames may be empty.
func (c *h2) continuation(t *turn, x *h2Scratch, flags byte, b []byte) error {
	if c.blockID == 0 {
		return errContinuation
	}
	if c.blocks++; c.blocks > maxContinuations || len(c.block)+len(b) > maxBlock {
		c.last = max(c.last, c.blockID) // as in header
		return errBlock
	}
	c.block = append(c.block, b...)
	if flags&flagEndHeaders == 0 {
		return nil
	}
	id, block := c.blockID, c.block
	c.blockID, c.block = 0, nil
	return c.header(t, x, id, block, c.blockEnd, c.blockSelf)
}

// header takes a whole header block: a request's, or trailers.
func (c *h2) header(t *turn, x *h2Scratch, id uint32, block []byte, end, self bool) error {
	h := &x.header
	if err := h.read(&x.fields, &c.table, block); err != nil {
		if err == errBlock {
			c.last = max(c.last, id) // clients ask again for what GOAWAY does not cover
		}
		return err
	}
	if id <= c.last {
		c.askNow(t, x) // it may be about one of them
	}
	if st := c.find(id); st != nil {
		return c.trailers(t, x, st, h, end)
	}
	if id <= c.last {
		if c.ignores(id) {
			if end {
				c.forget(id)
			}
			return c.spend(costFrame)
		}
		if skipped := (c.last - id) / 2; skipped < 64 && c.opened>>skipped&1 == 0 {
			return errIdle // section 5.1.1: numbers go up
		}
		return errClosed
	}
	c.opened = c.opened<<((id-c.last)/2) | 1
	c.last = id
	switch {
	case c.drained:
		c.ignore(id, end) // RFC 9113, section 6.8
		return c.spend(costFrame)
	case len(c.streams)+c.orphans+x.waiting >= maxStreams:
		c.ignore(id, end)
		t.out = appendReset(t.out, id, codeRefused)
		return c.spend(costReset)
	case h.malformed || self:
		return c.malformed(t, id, end)
	}
	return c.request(t, x, id, h, end)
}

// trailers takes the second header of a request, which ends it and says nothing to us.
func (c *h2) trailers(t *turn, x *h2Scratch, st *h2Stream, h *h2Header, end bool) error {
	switch {
	case !st.open:
		return c.reset(t, st.id, codeClosed)
	case !end, h.malformed, h.seen != 0, st.length >= 0 && st.received != st.length:
		return c.malformed(t, st.id, end)
	}
	st.open = false
	if st.state == sending || st.state == ending {
		c.rest(t, st)
		return nil
	}
	c.ended(t, x, st)
	return nil
}

// malformed resets a stream whose request is none (RFC 9113, section 8.1.1), opened or not.
func (c *h2) malformed(t *turn, id uint32, end bool) error {
	if st := c.find(id); st != nil {
		st.open = !end
		return c.reset(t, id, codeProtocol)
	}
	c.ignore(id, end)
	t.out = appendReset(t.out, id, codeProtocol)
	return c.spend(costReset)
}

// reset ends a stream with an error of the client's.
func (c *h2) reset(t *turn, id uint32, code uint32) error {
	c.abort(t, id, code)
	return c.spend(costReset)
}

// abort ends a stream.
func (c *h2) abort(t *turn, id uint32, code uint32) {
	if st := c.find(id); st != nil {
		if st.open {
			c.ignore(id, false)
		}
		c.remove(st)
	}
	t.out = appendReset(t.out, id, code)
}

// idle reports whether a stream was never opened. Those with even numbers are ours, and we open none.
func (c *h2) idle(id uint32) bool { return id > c.last || id&1 == 0 }

func (c *h2) find(id uint32) *h2Stream {
	if i, ok := c.search(id); ok {
		return c.streams[i]
	}
	return nil
}

func (c *h2) search(id uint32) (int, bool) {
	return slices.BinarySearchFunc(c.streams, id, func(st *h2Stream, id uint32) int { return int(st.id) - int(id) })
}

// add opens a stream, the newest one.
func (c *h2) add(id uint32) *h2Stream {
	st := h2Streams.Get().(*h2Stream)
	*st = h2Stream{id: id, length: -1, window: c.streamWindow, receive: streamWindow, buf: st.buf[:0]}
	c.streams = append(c.streams, st)
	return st
}

// remove takes a stream out; it is closed then.
func (c *h2) remove(st *h2Stream) {
	switch st.state {
	case collecting:
		c.bodies -= len(st.buf)
	case resolving:
		c.orphans++
	case sending:
		c.held -= len(st.buf) - st.sent
	case queued:
		c.queued--
	}
	i, _ := c.search(st.id)
	c.streams = slices.Delete(c.streams, i, i+1)
	c.release(st)
	if len(c.streams) == 0 && cap(c.streams) > 8 {
		c.streams = nil // an idle connection is small
	}
}

func (*h2) release(st *h2Stream) {
	if cap(st.buf) > keepBuffer {
		st.buf = nil
	}
	st.refusal = nil
	h2Streams.Put(st)
}

// ignore remembers that what the client still sends on a stream means nothing: it has not seen our RST_STREAM yet (RFC
// 9113, section 5.1). Of too many the oldest are forgotten; what comes on them is an error then.
func (c *h2) ignore(id uint32, ended bool) {
	if ended {
		return
	}
	if len(c.ignored) >= maxStreams {
		c.ignored = slices.Delete(c.ignored, 0, len(c.ignored)-maxStreams+1)
	}
	c.ignored = append(c.ignored, id)
}

// ignores reports whether what comes on a stream means nothing.
func (c *h2) ignores(id uint32) bool {
	return slices.Contains(c.ignored, id)
}

// forget ends the ignoring.
func (c *h2) forget(id uint32) {
	if i := slices.Index(c.ignored, id); i >= 0 {
		c.ignored = slices.Delete(c.ignored, i, i+1)
		if len(c.ignored) == 0 {
			c.ignored = nil
		}
	}
}

// ask has a query answered. st is nil when the request came in one piece.
func (c *h2) ask(t *turn, x *h2Scratch, id uint32, st *h2Stream, msg []byte, f form) {
	q := &t.q
	if refusal := c.parse(t, q, msg); refusal != nil {
		r := refused(refusal, f)
		c.respond(t, id, st, &r, q.Received/int64(time.Second))
		return
	}
	c.serve(t, x, id, st, q, f)
}

// parse makes q the query in msg.
func (c *h2) parse(t *turn, q *wire.Query, msg []byte) *refusal {
	q.Client, q.Local, q.Transport = c.peer.client, c.peer.local, c.peer.transport
	q.Listener, q.Lane = c.peer.common.Name, t.lane
	return c.doh.parse(q, msg)
}

// askLater is ask for a request that came in one piece and wants a DNS message: it is answered together with those that
// follow at once, and before anything else that the client says is heard.
func (c *h2) askLater(t *turn, x *h2Scratch, id uint32, msg []byte) {
	a, q := &x.asked[x.waiting], &x.queries[x.waiting]
	a.id, a.in = id, append(a.in[:0], msg...)
	if refusal := c.parse(t, q, a.in); refusal != nil {
		c.askNow(t, x) // streams are kept in the order of their ids
		r := refused(refusal, 0)
		c.respond(t, id, nil, &r, q.Received/int64(time.Second))
		return
	}
	if x.waiting++; x.waiting == len(x.asked) {
		c.askNow(t, x)
	}
}

// askNow has those answered who wait for others. When there is enough to say, the rest is queued: answers may be large.
func (c *h2) askNow(t *turn, x *h2Scratch) {
	qs := x.queries[:x.waiting]
	x.waiting = 0
	c.peer.common.expect(qs)
	for i := range qs {
		a := &x.asked[i]
		if len(t.out) < enough {
			c.serve(t, x, a.id, nil, &qs[i], 0)
			continue
		}
		st := c.add(a.id)
		st.state, st.buf = queued, append(st.buf, a.in...)
		c.queued++
	}
}

// askQueued has those answered that are queued, until there is enough to say.
func (c *h2) askQueued(t *turn, x *h2Scratch) {
	for c.queued > 0 && len(t.out) < enough {
		i := slices.IndexFunc(c.streams, func(st *h2Stream) bool { return st.state == queued })
		st := c.streams[i]
		st.state = discarding
		c.queued--
		c.ask(t, x, st.id, st, st.buf, st.form)
	}
}

// serve has q answered, which is the query of a request.
func (c *h2) serve(t *turn, x *h2Scratch, id uint32, st *h2Stream, q *wire.Query, f form) {
	out, verdict := c.peer.common.serveWire(x.out[:0], q)
	x.out = out[:0]
	switch verdict {
	case wire.Answered:
		c.deliver(t, id, st, out, f, q.Received/int64(time.Second))
	case wire.Miss:
		m := newMiss(q, q.Raw)
		m.stream, m.form = id, f
		if st == nil {
			st = c.add(id)
		} else if st.state == collecting {
			c.bodies -= len(st.buf)
		}
		st.state, st.buf = resolving, st.buf[:0]
		t.misses = append(t.misses, m)
	default:
		c.abort(t, id, codeInternal) // as net/http does when a handler gives up
	}
}

// answer implements machine.
func (c *h2) answer(t *turn, m *miss, msg []byte) {
	c.earn(gainRequest)
	st := c.find(m.stream)
	if c.dead || st == nil {
		c.orphans--
		return
	}
	c.deliver(t, m.stream, st, msg, m.form, time.Now().Unix())
}

// deliver sends a response of the Handler.
func (c *h2) deliver(t *turn, id uint32, st *h2Stream, msg []byte, f form, now int64) {
	r, err := answered(msg, f)
	if err != nil {
		c.leave(st)
		c.abort(t, id, codeInternal)
		return
	}
	c.respond(t, id, st, &r, now)
}

// leave makes st a stream that waits for nothing.
func (c *h2) leave(st *h2Stream) {
	if st == nil {
		return
	}
	if st.state == collecting {
		c.bodies -= len(st.buf)
	}
	st.state, st.buf, st.sent = sending, st.buf[:0], 0
}

// respond sends a response, or as much of it as the client's windows let us.
func (c *h2) respond(t *turn, id uint32, st *h2Stream, r *reply, now int64) {
	c.earn(gainRequest)
	t.served++
	c.leave(st)
	at := len(t.out)
	t.out = c.doh.appendHeader(appendFrame(t.out, 0, frameHeaders, flagEndHeaders, id), r, now)
	n := len(t.out) - at - frameHeader
	t.out[at], t.out[at+1], t.out[at+2] = byte(n>>16), byte(n>>8), byte(n)
	body := r.body
	if r.head || len(body) == 0 {
		t.out[at+4] |= flagEndStream
		c.finish(t, st)
		return
	}
	room := min(c.window, c.streamWindow)
	if st != nil {
		room = min(c.window, st.window)
	}
	if len(body) <= maxFrame && int64(len(body)) <= room {
		c.window -= int64(len(body))
		t.out = append(appendFrame(t.out, len(body), frameData, flagEndStream, id), body...)
		c.finish(t, st)
		return
	}
	if c.held+len(body) > maxHeld {
		c.abort(t, id, codeCalm)
		return
	}
	if st == nil {
		st = c.add(id)
		st.state = sending
	}
	st.buf = append(st.buf, body...)
	c.held += len(body)
	c.send(t, st)
}

// send sends what the windows let us of a stream's response.
func (c *h2) send(t *turn, st *h2Stream) (done bool) {
	for {
		rest := st.buf[st.sent:]
		n := int(max(min(int64(len(rest)), maxFrame, c.window, st.window), 0))
		if n == 0 {
			return false
		}
		flags := byte(0)
		if n == len(rest) {
			flags = flagEndStream
		}
		t.out = append(appendFrame(t.out, n, frameData, flags, st.id), rest[:n]...)
		st.sent += n
		c.held -= n
		c.window -= int64(n)
		st.window -= int64(n)
		if n == len(rest) {
			c.finish(t, st)
			return true
		}
	}
}

// push sends what has waited for a window, oldest first.
func (c *h2) push(t *turn) error {
	for i := 0; i < len(c.streams) && c.window > 0 && c.held > 0; {
		if st := c.streams[i]; st.state != sending || !c.send(t, st) {
			i++
		}
	}
	return nil
}

// finish closes a stream that is answered, or lets its client come to its end.
func (c *h2) finish(t *turn, st *h2Stream) {
	if st == nil {
		return
	}
	st.state = ending
	if cap(st.buf) > keepBuffer {
		st.buf = nil
	}
	c.rest(t, st)
}

// rest goes on with a stream whose response is there, when its client has ended it or has sent more of it, which nobody needs.
// RFC 9113, section 8.1, lets us tell it to stop, by RST_STREAM with NO_ERROR; but many a client, curl 7.88 among them, takes
// that for a failure and does not look at the response. So one that comes to its end soon may.
func (c *h2) rest(t *turn, st *h2Stream) {
	switch {
	case st.state == sending && (!st.open || st.received > maxBody):
	case !st.open:
		c.remove(st)
	case st.received > maxBody:
		c.abort(t, st.id, codeNone)
	default:
		if gone := streamWindow - st.receive; gone >= streamWindow/2 {
			st.receive += gone
			t.out = appendWindow(t.out, st.id, uint32(gone))
		}
	}
}

// appendFrame appends the header of a frame.
func appendFrame(dst []byte, n int, kind, flags byte, id uint32) []byte {
	return append(dst, byte(n>>16), byte(n>>8), byte(n), kind, flags, byte(id>>24), byte(id>>16), byte(id>>8), byte(id))
}

func appendWindow(dst []byte, id, n uint32) []byte {
	return binary.BigEndian.AppendUint32(appendFrame(dst, 4, frameWindow, 0, id), n)
}

func appendReset(dst []byte, id, code uint32) []byte {
	return binary.BigEndian.AppendUint32(appendFrame(dst, 4, frameReset, 0, id), code)
}
