package listen

import (
	"context"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// endless is a machine whose client has always sent more by the time it is asked again.
type endless struct {
	*dnsMachine
	t      *testing.T
	client int // its end
	loop   *loop
	inputs int
}

func (m *endless) input(_ *turn, data []byte) (int, error) {
	for range m.inputs {
		if _, err := unix.Write(m.client, make([]byte, readMost)); err != nil {
			break // it is full
		}
	}
	m.inputs--
	if n := len(m.loop.again); n > 1 {
		m.t.Errorf("one connection is %d times among those that may have more to read", n)
	}
	return len(data), nil
}

// TestLoopBusyConnection has more come on a connection in each of its turns than the turn lets it read: it waits for the next
// one once, and not once more each round.
func TestLoopBusyConnection(t *testing.T) {
	c := common(echo{})
	limit := newConnLimit(Limits{}.withDefaults())
	s := newStreams(context.Background(), &c, limit, time.Minute, time.Minute)
	l, err := newLoop(s, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	m := &endless{newDNSMachine(peer{common: &c}, 1), t, ends[0], l, 100}
	client := common(echo{}).Addr.Addr()
	if !limit.acquire(client) {
		t.Fatal("no place")
	}
	s.wg.Add(1)
	l.call(&loopConn{flow: flow{s: s, m: m}, loop: l, client: client, fd: ends[1], place: -1, unread: true})
	if _, err := unix.Write(ends[0], make([]byte, readMost)); err != nil {
		t.Fatal(err)
	}
	for m.inputs > 0 {
		l.rounds(0)
	}
	_ = unix.Close(ends[0])
	for limit.open() > 0 {
		l.rounds(0)
	}
	s.wg.Wait()
}
