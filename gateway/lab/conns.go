package lab

import (
	"context"
	"net"
	"sync"
)

// connCount counts the connections of a server. Each has a number, from 1, by which Stuck tells old ones from new ones.
type connCount struct {
	mu    sync.Mutex
	total uint64
	now   map[uint64]net.Conn // by number
	most  int
}

// enter counts a new connection and returns its number; conn is the TCP connection under it, or nil. The caller calls leave
// once it has ended.
func (c *connCount) enter(conn net.Conn) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.now == nil {
		c.now = make(map[uint64]net.Conn)
	}
	c.total++
	c.now[c.total] = conn
	if len(c.now) > c.most {
		// A client that ends one connection and then opens another never had both, in whatever order we come to hear of it.
		both := 0
		for _, conn := range c.now {
			if conn == nil || !hasEnded(conn) {
				both++
			}
		}
		c.most = max(c.most, both)
	}
	return c.total
}

// leave is for connection number; the second time it does nothing.
func (c *connCount) leave(number uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.now, number)
}

func (c *connCount) accepted() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.total
}

func (c *connCount) open() (now, most int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.now), c.most
}

// numberKey is the context key of the number of the connection that a question came on.
type numberKey struct{}

func withNumber(ctx context.Context, number uint64) context.Context {
	return context.WithValue(ctx, numberKey{}, number)
}

// isStuck reports whether the connection that ctx is of never answers again. Plain UDP has none.
func (s *Server) isStuck(ctx context.Context) bool {
	number, ok := ctx.Value(numberKey{}).(uint64)
	return ok && number <= s.stuck.Load()
}
