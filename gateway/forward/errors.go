package forward

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"github.com/quic-go/quic-go"
)

// The kinds of an [Error]. They are the values of a metrics label, so the list is short and closed.
const (
	KindConnect   = "connect"   // no connection: refused, no route
	KindBackoff   = "backoff"   // not asked: it was dialled in vain a moment ago
	KindTLS       = "tls"       // the handshake went wrong: wrong name, unknown authority, expired, pin, alert
	KindTimeout   = "timeout"   // no answer in time
	KindIO        = "io"        // the connection broke
	KindMismatch  = "mismatch"  // what was read is not an answer to the question
	KindMalformed = "malformed" // an answer to the question whose records cannot be read
	KindHTTP      = "http"      // an HTTP status or media type that carries no answer
	KindBootstrap = "bootstrap" // the server's host name has no address
	KindBusy      = "busy"      // our own bound on queries in flight or abandoned calls was reached
	KindClosed    = "closed"    // the group was closed
	KindAbandoned = "abandoned" // another server's answer came first; not a failure
)

// Error is why one server gave no answer.
type Error struct {
	Kind string // one of the Kind constants
	Err  error

	retry time.Time // of KindBackoff: when the server can be asked again
}

func (e *Error) Error() string { return e.Kind + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

func fault(kind, format string, args ...any) *Error {
	return &Error{Kind: kind, Err: fmt.Errorf(format, args...)}
}

var errClosed = &Error{Kind: KindClosed, Err: errors.New("upstream group is closed")}

// kindOf returns the kind of err, "" for nil.
func kindOf(err error) string {
	if err == nil {
		return ""
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	if isTimeout(err) {
		return KindTimeout
	}
	return KindIO
}

// isTimeout reports whether err says that time was up, be it a context's, a socket's or QUIC's.
func isTimeout(err error) bool {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		return true
	}
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// classify wraps err, which came up while doing what, as an *Error. The stage gives the kind when err itself does not.
func classify(stage, what string, err error) error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return err
	}
	switch {
	case errors.Is(err, context.Canceled):
		return fault(KindAbandoned, "%s: %w", what, err)
	case isTimeout(err):
		return fault(KindTimeout, "%s: no answer in time", what)
	case isTLS(err):
		return &Error{Kind: KindTLS, Err: explainTLS(err)}
	case errors.Is(err, syscall.ECONNREFUSED):
		return fault(KindConnect, "%s: connection refused", what)
	case errors.Is(err, syscall.ECONNRESET):
		return fault(stage, "%s: connection reset", what)
	}
	return fault(stage, "%s: %w", what, err)
}

// isTLS reports whether err comes from a TLS handshake or record, over TCP or QUIC.
func isTLS(err error) bool {
	var (
		cert   *tls.CertificateVerificationError
		alert  tls.AlertError
		record tls.RecordHeaderError
		pin    *pinError
		te     *quic.TransportError
	)
	switch {
	case errors.As(err, &cert), errors.As(err, &alert), errors.As(err, &record), errors.As(err, &pin):
		return true
	case errors.As(err, &te):
		return te.ErrorCode.IsCryptoError()
	}
	var op *net.OpError // crypto/tls reports alerts this way
	return errors.As(err, &op) && (op.Op == "remote error" || op.Op == "local error")
}

// Extended DNS error codes, RFC 8914, section 4.
const (
	edeNoReachableAuthority = dns.ExtendedErrorCodeNoReachableAuthority // 22
	edeNetworkError         = dns.ExtendedErrorCodeNetworkError         // 23
)

// NoAnswerError says that no server of a group gave a response.
type NoAnswerError struct {
	Group  string
	Causes []Cause // one for each server that was asked, in the order of asking
}

// Cause is one server's part in a [NoAnswerError].
type Cause struct {
	Server string // its URL as written
	Err    error
}

func (e *NoAnswerError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "group %q gave no answer", e.Group)
	for i, c := range e.Causes {
		sep := "; "
		if i == 0 {
			sep = ": "
		}
		fmt.Fprintf(&b, "%s%s: %v", sep, c.Server, c.Err)
	}
	return b.String()
}

// Unwrap returns the causes.
func (e *NoAnswerError) Unwrap() []error {
	errs := make([]error, len(e.Causes))
	for i, c := range e.Causes {
		errs[i] = c.Err
	}
	return errs
}

// Timeout reports whether a server was asked that may yet have answered when the time was over.
func (e *NoAnswerError) Timeout() bool {
	return slices.ContainsFunc(e.Causes, func(c Cause) bool { return kindOf(c.Err) == KindTimeout })
}

// ExtendedError returns the RFC 8914 code and text for the client: 22 when no server could be reached or all were
// silent, 23 when one was reached and the exchange with it went wrong. The text names no server and no client.
func (e *NoAnswerError) ExtendedError() (code uint16, text string) {
	kinds := make(map[string]bool)
	for _, c := range e.Causes {
		kinds[kindOf(c.Err)] = true
	}
	switch {
	case kinds[KindTLS]:
		return edeNetworkError, "upstream TLS error"
	case kinds[KindMismatch], kinds[KindMalformed]:
		return edeNetworkError, "upstream gave no valid answer"
	case kinds[KindIO], kinds[KindHTTP]:
		return edeNetworkError, "upstream connection error"
	case kinds[KindTimeout]:
		return edeNoReachableAuthority, "upstream timeout"
	}
	return edeNoReachableAuthority, "no upstream reachable"
}
