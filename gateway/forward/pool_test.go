package forward

import (
	"context"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"dnsgateway/gateway/wire"
)

// testLink is a link that answers at once.
type testLink struct{ pulse }

func newTestLink() *testLink {
	l := new(testLink)
	l.born(func(error) {})
	return l
}

func (l *testLink) vitals() *pulse { return &l.pulse }

func (l *testLink) ask(context.Context, *query) (*wire.Answer, error) {
	if !l.begin() {
		return nil, &brokenError{err: fault(KindIO, "connection closed"), again: true}
	}
	l.end(true)
	return new(wire.Answer), nil
}

// TestSecondDialServesAll holds that who waits for a dial that hangs takes the connection of a second one.
func TestSecondDialServesAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dials atomic.Int32
		p := newPool(environment{timeout: 10 * time.Second}, func(ctx context.Context, _ func(func())) (link, error) {
			if dials.Add(1) == 1 {
				<-ctx.Done()
				return nil, classify(KindConnect, "dialling", ctx.Err())
			}
			return newTestLink(), nil
		})
		defer p.close()
		const second = stallAfter + 100*time.Millisecond
		time.AfterFunc(second, func() { p.ask(t.Context(), rootQuery) })
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if _, err := p.ask(ctx, rootQuery); err != nil {
			t.Error(err)
		}
		if d := time.Since(start); d != second {
			t.Errorf("took %v, want %v, when the second dial succeeds", d, second)
		}
	})
}

// TestBackoffForgets holds that dials that failed before a connection was good do not count after it, and that those
// beside a good one do.
func TestBackoffForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var well atomic.Bool
		var dials atomic.Int32
		p := newPool(environment{timeout: time.Second}, func(context.Context, func(func())) (link, error) {
			dials.Add(1)
			if !well.Load() {
				return nil, fault(KindConnect, "refused")
			}
			return newTestLink(), nil
		})
		defer p.close()
		for range 5000 {
			p.ask(t.Context(), rootQuery)
			time.Sleep(time.Millisecond)
		}
		well.Store(true)
		time.Sleep(maxBackoff)
		for range 100 {
			if _, err := p.ask(t.Context(), rootQuery); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		// A second connection is wanted and refused, time and again.
		well.Store(false)
		v := p.links[0].vitals()
		v.mu.Lock()
		v.spread = 0
		v.mu.Unlock()
		dials.Store(0)
		for range 10000 {
			if _, err := p.ask(t.Context(), rootQuery); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
		if n := dials.Load(); n < 12 || n > 30 {
			t.Errorf("got %d dials in 10s beside a good connection, want a few and then one every %v", n, maxBackoff)
		}
		// The first connection after that ends the row again.
		well.Store(true)
		v.die(errStalled)
		time.Sleep(maxBackoff)
		p.ask(t.Context(), rootQuery)
		p.ask(t.Context(), rootQuery)
		well.Store(false)
		p.links[0].vitals().die(errStalled)
		if _, err := p.ask(t.Context(), rootQuery); kindOf(err) != KindConnect {
			t.Errorf("got %v, want the dial to be refused", err)
		}
		p.mu.Lock()
		wait := time.Until(p.retry)
		p.mu.Unlock()
		if wait > minBackoff {
			t.Errorf("one failed dial after good service backs off %v, want %v at most", wait, minBackoff)
		}
	})
}

// TestKeepaliveAtOnce holds that the idle time that a server sets is obeyed from the first time on.
func TestKeepaliveAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		l := newStreamLink(near, keepalive, func(f func()) { go f() })
		r := []byte{0, 15, 0, 2, 0, 9, 0, byte(wire.OptionKeepalive), 0, 2, 0, 5} // behind an extended DNS error
		time.Sleep(time.Second)
		start := time.Now()
		l.mu.Lock()
		l.beginLocked(start)
		l.heed(r)
		l.endLocked(true)
		far.Read(make([]byte, 1)) // until it is closed
		if d := time.Since(start); d != 500*time.Millisecond {
			t.Errorf("closed after %v, want 500ms", d)
		}
		l.mu.Lock()
		l.heed(r) // harms no closed one
		l.mu.Unlock()
		time.Sleep(time.Minute)
	})
}

func TestDoHPath(t *testing.T) {
	for _, tt := range []struct{ path, want string }{
		{"/dns-query", "/dns-query"},
		{"/abc/Bob%27s%20Phone", "/abc/Bob%27s%20Phone"},
		{"/abc/Bob's", "/abc/Bob's"},
		{"/a%2Fb", "/a%2Fb"},
		{"/a b", "/a%20b"},
		{"/100%", "/100%25"},
		{"/a?b", "/a%3Fb"},
	} {
		s := Server{Scheme: "https", Host: netip.IPv6Loopback().String(), Port: 443, VerifyName: "dns.test", Path: tt.path}
		if got := dohURL(s); got.RequestURI() != tt.want || got.Host != "dns.test" {
			t.Errorf("%q: got %q at %q, want %q", tt.path, got.RequestURI(), got.Host, tt.want)
		}
	}
}

// TestRenew holds that a connection on which an answer is waited for is set aside: the next query gets a new one, the
// answer still comes over the old one, which is closed then. One on which nothing is waited for stays.
func TestRenew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &piped{name: "a", hear: after(10 * time.Millisecond)}
		pool := newPool(environment{timeout: time.Second}, p.dial)
		defer pool.close()
		ask := func() (took time.Duration) {
			t.Helper()
			start := time.Now()
			if _, err := pool.ask(t.Context(), rootQuery); err != nil {
				t.Error(err)
			}
			return time.Since(start)
		}
		ask()
		if pool.renew(0) {
			t.Error("renewed a connection on which nothing is waited for")
		}
		if ask(); p.conns.Load() != 1 {
			t.Errorf("got %d connections, want the first one to stay when nothing is waited for", p.conns.Load())
		}
		p.set(after(800 * time.Millisecond))
		late := make(chan time.Duration)
		go func() { late <- ask() }()
		time.Sleep(100 * time.Millisecond)
		if pool.renew(101 * time.Millisecond) {
			t.Error("renewed too soon")
		}
		if !pool.renew(100 * time.Millisecond) {
			t.Error("not renewed")
		}
		p.set(after(10 * time.Millisecond))
		for range 3 {
			if d := ask(); d != 10*time.Millisecond || p.conns.Load() != 2 {
				t.Errorf("took %v over %d connections, want 10ms over a second one", d, p.conns.Load())
			}
		}
		if d := <-late; d != 800*time.Millisecond {
			t.Errorf("the late answer took %v, want 800ms", d)
		}
		synctest.Wait()
		if p.open != 1 {
			t.Errorf("got %d connections after the last answer, want the old one closed", p.open)
		}
	})
}
