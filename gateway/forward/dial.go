package forward

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"dnsgateway/gateway/nowait"
)

// connectionAttemptDelay is the head start of each address before the next, RFC 8305, section 5.
const connectionAttemptDelay = 250 * time.Millisecond

// maxAddresses bounds how many addresses of one name are tried: a name may have any number.
const maxAddresses = 6

// target is where a server is: one fixed address, or a host name.
type target struct {
	host  string
	port  uint16
	fixed []netip.AddrPort
	boot  *bootstrap
}

// addrs returns the addresses to try, best first, at least one. The caller does not write to the result.
func (t *target) addrs(ctx context.Context) ([]netip.AddrPort, error) {
	if t.fixed != nil {
		return t.fixed, nil
	}
	found, err := t.boot.lookup(ctx, t.host)
	if err != nil {
		return nil, err
	}
	return interleave(found, t.port), nil
}

// interleave orders addresses so that the families take turns, IPv6 first (RFC 8305, section 4), and cuts the list.
func interleave(found []netip.Addr, port uint16) []netip.AddrPort {
	var six, four []netip.AddrPort
	for _, a := range found {
		if a = a.Unmap(); a.Is4() {
			four = append(four, netip.AddrPortFrom(a, port))
		} else {
			six = append(six, netip.AddrPortFrom(a, port))
		}
	}
	var all []netip.AddrPort
	for i := range max(len(six), len(four)) {
		if i < len(six) {
			all = append(all, six[i])
		}
		if i < len(four) {
			all = append(all, four[i])
		}
	}
	return all[:min(len(all), maxAddresses)]
}

// race opens the target's addresses staggered (RFC 8305), and returns the first that is open all through: TLS or QUIC
// handshake included, because an address that only accepts is of no use. The others are closed. It returns when all
// that it started has ended; try has to end soon after its ctx.
func race[T comparable](ctx context.Context, t *target, try func(context.Context, netip.AddrPort) (T, error),
	shut func(T)) (T, error) {
	var none T
	addrs, err := t.addrs(ctx)
	if err != nil {
		return none, err
	}
	if len(addrs) == 1 {
		return try(ctx, addrs[0])
	}
	type outcome struct {
		conn T
		err  error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	outcomes := make(chan outcome)
	timer := time.NewTimer(0)
	defer timer.Stop()
	var (
		won     T
		errs    []error
		next    int
		running int
	)
	for {
		select {
		case <-timer.C:
			addr := addrs[next]
			next++
			running++
			go func() {
				conn, err := try(ctx, addr)
				outcomes <- outcome{conn, err}
			}()
			if next < len(addrs) {
				timer.Reset(connectionAttemptDelay)
			}
		case o := <-outcomes:
			running--
			switch {
			case o.err == nil && won == none:
				won = o.conn
				cancel()
			case o.err == nil:
				shut(o.conn)
			default:
				errs = append(errs, o.err)
			}
			done := won != none || ctx.Err() != nil || next == len(addrs)
			switch {
			case done && running == 0 && won != none:
				return won, nil
			case done && running == 0:
				return none, firstTelling(errs)
			case done:
				timer.Stop()
			default:
				timer.Reset(0)
			}
		}
	}
}

// firstTelling returns the first error that says more than that time was up.
func firstTelling(errs []error) error {
	for _, err := range errs {
		if kind := kindOf(err); kind != KindTimeout && kind != KindAbandoned {
			return err
		}
	}
	return errs[0]
}

// dialTCP connects to addr. One goroutine at a time may read from the connection, and one write.
func dialTCP(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return nil, dialError(ctx, "connecting to "+addr.String(), err)
	}
	return nowait.Conn(conn), nil
}

// dialError classifies the error of a dial: an "i/o timeout" with time left is the kernel's, and as good as no route.
func dialError(ctx context.Context, what string, err error) error {
	var ne net.Error
	if ctx.Err() == nil && errors.As(err, &ne) && ne.Timeout() {
		return fault(KindConnect, "%s: timed out", what)
	}
	if cause := ctx.Err(); cause != nil {
		err = cause
	}
	return classify(KindConnect, what, err)
}
