package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

const (
	// lanes is how many clients a load has: sockets and connections in turn, each with its share of the questions.
	lanes = 16
	// patience is how long a client waits for an answer; what comes later has not come.
	patience = 10 * time.Second
	// warmUp is how long the load runs before the part that counts.
	warmUp = time.Second
)

// load asks at a steady rate, whatever becomes of the answers. Question i is due i/rate after the begin and goes by lane
// i%lanes: an even lane is a UDP socket, an odd one a DoT connection, on which questions do not wait for each other.
type load struct {
	udp, dot string // addresses of the server under test
	tls      *tls.Config
	rate     int
	warm     int    // how many of the questions are before the part that counts
	fates    []fate // by question
	begin    time.Time
	redials  atomic.Int64
	late     atomic.Int64 // nanoseconds that a lane woke up too late at most: the machine was busy, whatever the server did
	wrong    atomic.Int64 // messages that answer no question of ours
}

// fate is what became of one question.
type fate struct {
	// came is the answer. 0 is nothing; else the nanoseconds since the question was due in the upper 56 bits, and the RCODE in
	// the lower 8.
	came atomic.Int64
	// first is the tier, 1 or 2, that was asked first; 0 is none. other says that the other one was asked, too.
	first atomic.Int32
	other atomic.Bool
}

// newLoad returns a load that asks nobody yet: the addresses are still to be set.
func newLoad(p plan) *load {
	warm := int(warmUp * time.Duration(p.rate) / time.Second)
	count := warm + int(p.length*time.Duration(p.rate)/time.Second)
	return &load{rate: p.rate, warm: warm, fates: make([]fate, count)}
}

// due returns when question i is to be asked, in time since the begin.
func (l *load) due(i int) time.Duration {
	return time.Duration(int64(i) * int64(time.Second) / int64(l.rate))
}

// run asks all questions and waits for their answers. When it returns all its sockets and connections are closed.
func (l *load) run(ctx context.Context, begin time.Time) error {
	l.begin = begin
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make([]error, lanes)
	var running sync.WaitGroup
	for k := range lanes {
		running.Go(func() {
			errs[k] = l.lane(ctx, k)
			if errs[k] != nil {
				cancel()
			}
		})
	}
	running.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return ctx.Err()
}

// lane asks the questions of lane k, and waits for what is still to come.
func (l *load) lane(ctx context.Context, k int) error {
	c := &client{l: l, dot: k%2 == 1, lane: k}
	defer c.close()
	if err := c.dial(ctx); err != nil {
		return fmt.Errorf("connecting to the server under test: %w", err)
	}
	for i := k; i < len(l.fates); i += lanes {
		due := l.begin.Add(l.due(i))
		wait := time.Until(due)
		if !sleep(ctx, wait) {
			return nil
		}
		if wait > 0 && i >= l.warm {
			l.wokeLate(time.Since(due))
		}
		raw, err := l.question(i).Pack()
		if err != nil {
			return err
		}
		c.send(ctx, raw)
	}
	last := l.begin.Add(l.due(len(l.fates)) + patience)
	for i := k; i < len(l.fates); i += lanes {
		for l.fates[i].came.Load() == 0 && time.Now().Before(last) {
			if !sleep(ctx, 5*time.Millisecond) {
				return nil
			}
		}
	}
	return nil
}

// greet asks what no upstream is asked, once over each transport. A gateway starts with the first connection what stays as long as
// it does; that is not counted as left behind.
func (l *load) greet(ctx context.Context) error {
	m := new(dns.Msg).SetQuestion("id.server.", dns.TypeTXT)
	m.Question[0].Qclass = dns.ClassCHAOS
	for _, c := range []struct{ network, addr string }{{"udp", l.udp}, {"tcp-tls", l.dot}} {
		client := dns.Client{Net: c.network, TLSConfig: l.tls, Timeout: 5 * time.Second}
		if _, _, err := client.ExchangeContext(ctx, m, c.addr); err != nil {
			return fmt.Errorf("greeting over %s: %w", c.network, err)
		}
	}
	return nil
}

// question returns question i: its name says which one it is, and so does its ID for a client.
func (l *load) question(i int) *dns.Msg {
	m := new(dns.Msg).SetQuestion("q"+strconv.Itoa(i)+".load.lab.test.", dns.TypeA)
	m.Id = uint16(i / lanes)
	return m
}

// receive takes a message that came on lane k.
func (l *load) receive(k int, raw []byte) {
	now := time.Now()
	m := new(dns.Msg)
	i, ok := -1, false
	if m.Unpack(raw) == nil && m.Response && len(m.Question) == 1 {
		i, ok = index(m.Question[0].Name)
	}
	if !ok || i < 0 || i >= len(l.fates) || i%lanes != k || m.Id != uint16(i/lanes) ||
		m.Rcode == dns.RcodeSuccess && len(m.Answer) != 1 {
		l.wrong.Add(1)
		return
	}
	took := max(now.Sub(l.begin.Add(l.due(i))), 1)
	l.fates[i].came.CompareAndSwap(0, int64(took)<<8|int64(m.Rcode&0xff)) // the first counts
}

func (l *load) wokeLate(by time.Duration) {
	for old := l.late.Load(); int64(by) > old && !l.late.CompareAndSwap(old, int64(by)); old = l.late.Load() {
	}
}

// index returns the number of the question whose name this is.
func index(name string) (int, bool) {
	label, _, _ := strings.Cut(name, ".")
	digits, ok := strings.CutPrefix(label, "q")
	i, err := strconv.Atoi(digits)
	return i, ok && err == nil
}

// reach notes that a message has reached the server of a tier; other messages than our questions do not matter. Servers call
// it at once.
func (l *load) reach(tier int32, raw []byte) {
	name, _, err := dns.UnpackDomainName(raw, min(12, len(raw)))
	if err != nil {
		return
	}
	i, ok := index(strings.ToLower(name))
	if !ok || i < 0 || i >= len(l.fates) {
		return
	}
	if f := &l.fates[i]; !f.first.CompareAndSwap(0, tier) && f.first.Load() != tier {
		f.other.Store(true)
	}
}

// client is one socket or connection, of which the lane alone writes and a goroutine reads.
type client struct {
	l       *load
	lane    int
	dot     bool
	conn    net.Conn
	broken  atomic.Bool // of conn
	reading sync.WaitGroup
}

func (c *client) dial(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if c.dot {
		c.conn, err = (&tls.Dialer{Config: c.l.tls}).DialContext(ctx, "tcp", c.l.dot)
	} else {
		c.conn, err = (&net.Dialer{}).DialContext(ctx, "udp", c.l.udp)
	}
	if err != nil {
		c.conn = nil
		return err
	}
	c.broken.Store(false)
	conn := c.conn
	c.reading.Go(func() { c.read(conn) })
	return nil
}

func (c *client) read(conn net.Conn) {
	defer c.broken.Store(true)
	buf := make([]byte, 65535)
	for {
		if !c.dot {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			c.l.receive(c.lane, buf[:n])
			continue
		}
		if _, err := io.ReadFull(conn, buf[:2]); err != nil {
			return
		}
		msg := buf[:binary.BigEndian.Uint16(buf)]
		if _, err := io.ReadFull(conn, msg); err != nil {
			return
		}
		c.l.receive(c.lane, msg)
	}
}

// send sends raw, on a new connection when the server has ended the old one. What cannot be sent stays unanswered.
func (c *client) send(ctx context.Context, raw []byte) {
	if c.conn == nil || c.broken.Load() {
		c.close()
		c.l.redials.Add(1)
		if c.dial(ctx) != nil {
			return
		}
	}
	if c.dot {
		raw = append(binary.BigEndian.AppendUint16(nil, uint16(len(raw))), raw...)
	}
	c.conn.SetWriteDeadline(time.Now().Add(patience))
	if _, err := c.conn.Write(raw); err != nil && c.dot {
		c.broken.Store(true)
	}
}

func (c *client) close() {
	if c.conn != nil {
		c.conn.Close()
		c.reading.Wait()
		c.conn = nil
	}
}

// sleep waits for d and reports whether ctx is still alive then.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
