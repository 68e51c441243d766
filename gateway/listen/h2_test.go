package listen

import (
	"crypto/tls"
	"net"
	"sync"
	"testing"

	"dnsgateway/gateway/wire"
)

// h2Driver drives one connection as simply as can be.
type h2Driver struct {
	mu sync.Mutex
	m  machine
	nc net.Conn
	t  turn
	d  *doh
	wg sync.WaitGroup
}

// h2Server serves HTTP/2 over TLS on loopback, and returns its address.
func h2Server(t testing.TB, h Handler, altSvc string) net.Addr {
	t.Helper()
	c := common(h)
	if err := c.check(); err != nil {
		t.Fatal(err)
	}
	d := newDoH(t.Context(), c, defaultPath, altSvc)
	ln, err := tls.Listen("tcp", "127.0.0.1:0", serverTLS(serverConfig(), "h2"))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		_ = ln.Close()
		wg.Wait()
		noLeaks(t)
	})
	wg.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			stop := make(chan struct{})
			wg.Go(func() {
				select {
				case <-t.Context().Done():
				case <-stop:
				}
				_ = nc.Close()
			})
			wg.Go(func() {
				defer close(stop)
				p := &peer{common: &c, client: addrPort(nc.RemoteAddr()), local: addrPort(nc.LocalAddr()), transport: wire.DoH}
				(&h2Driver{m: newH2(p, d), nc: nc, d: d}).run()
			})
		}
	})
	return ln.Addr()
}

func (d *h2Driver) run() {
	defer d.wg.Wait()
	buf := make([]byte, 64<<10)
	have := 0
	for {
		n, err := d.nc.Read(buf[have:])
		if err != nil {
			return
		}
		have += n
		for {
			d.mu.Lock()
			used, err := d.m.input(&d.t, buf[:have])
			have = copy(buf, buf[used:have])
			ok := d.flush()
			d.mu.Unlock()
			if err != nil || !ok {
				return
			}
			if used == 0 {
				break
			}
		}
	}
}

// flush writes what there is to say and has the misses resolved.
func (d *h2Driver) flush() bool {
	for _, m := range d.t.misses {
		d.wg.Go(func() {
			out, err := d.d.cfg.resolve(d.d.ctx, m.out[:0], &m.q)
			if err != nil {
				out = nil
			}
			d.mu.Lock()
			defer d.mu.Unlock()
			d.m.answer(&d.t, m, out)
			d.flush()
		})
	}
	d.t.misses = d.t.misses[:0]
	_, err := d.nc.Write(d.t.out)
	d.t.out = d.t.out[:0]
	return err == nil
}

func TestH2DoH(t *testing.T) {
	tests := dohTests(t)
	altSvc := `h3=":4711"; ma=86400`
	addr := h2Server(t, newFake(), altSvc)
	testDoH(t, httpClient(t, "h2"), addr, tests, "h2", altSvc)
}
