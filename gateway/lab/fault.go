package lab

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// FaultKind is a way in which a server misbehaves.
type FaultKind string

// The faults. Those marked "conn" work on whole connections: what is open when such a fault begins or ends is closed.
// All others work on each question, on connections that are open already too.
const (
	None          FaultKind = ""               // answers as it should
	Dead          FaultKind = "dead"           // conn: the port is refused
	Silent        FaultKind = "silent"         // reads questions, never answers
	Slow          FaultKind = "slow"           // answers after Fault.Duration
	ServFail      FaultKind = "servfail"       // answers SERVFAIL
	Refused       FaultKind = "refused"        // answers REFUSED
	BadCert       FaultKind = "badcert"        // conn: a certificate for another name
	ExpiredCert   FaultKind = "expired-cert"   // conn: a certificate of yesteryear
	UnknownCA     FaultKind = "unknown-ca"     // conn: a certificate of a CA that nobody knows
	Garbage       FaultKind = "garbage"        // sound framing around random bytes
	WrongID       FaultKind = "wrong-id"       // the answer with another message ID
	WrongQuestion FaultKind = "wrong-question" // the answer to another name
	Truncated     FaultKind = "truncated"      // half of a frame, then the orderly end
	RST           FaultKind = "rst"            // half of a frame, then a reset; over UDP: no answer
	Flap          FaultKind = "flap"           // conn: dead and well in turn, each for Fault.Duration; dead first
	TLSHang       FaultKind = "tlshang"        // conn: connects, but no handshake goes on
)

// Fault is how a server misbehaves. The zero value is a server that is well.
type Fault struct {
	Kind     FaultKind
	Duration time.Duration // of Slow and Flap; others have none
}

// faultKinds are the kinds in the order of help texts, with their default durations.
var faultKinds = []struct {
	kind     FaultKind
	duration time.Duration
}{
	{Dead, 0}, {Silent, 0}, {Slow, 2 * time.Second}, {ServFail, 0}, {Refused, 0}, {BadCert, 0}, {ExpiredCert, 0},
	{UnknownCA, 0}, {Garbage, 0}, {WrongID, 0}, {WrongQuestion, 0}, {Truncated, 0}, {RST, 0}, {Flap, time.Second},
	{TLSHang, 0},
}

// FaultNames returns the words that ParseFault takes, for help texts.
func FaultNames() []string {
	names := []string{"ok"}
	for _, k := range faultKinds {
		name := string(k.kind)
		if k.duration != 0 {
			name += "[:" + k.duration.String() + "]"
		}
		names = append(names, name)
	}
	return names
}

// ParseFault reads a fault: a kind, and for slow and flap a duration behind a colon ("slow:2s"), which is 2s and 1s by
// default. "ok" is the zero Fault.
func ParseFault(s string) (Fault, error) {
	kind, duration, timed := strings.Cut(strings.TrimSpace(s), ":")
	if kind == "ok" && !timed {
		return Fault{}, nil
	}
	for _, k := range faultKinds {
		if string(k.kind) != kind {
			continue
		}
		f := Fault{Kind: k.kind, Duration: k.duration}
		if !timed {
			return f, nil
		}
		if k.duration == 0 {
			return Fault{}, fmt.Errorf("fault %s takes no duration", kind)
		}
		d, err := time.ParseDuration(duration)
		if err != nil || d <= 0 {
			return Fault{}, fmt.Errorf("fault %s: %q is not a duration such as 2s", kind, duration)
		}
		f.Duration = d
		return f, nil
	}
	return Fault{}, fmt.Errorf("unknown fault %q; the faults are %s", kind, strings.Join(FaultNames(), ", "))
}

// String returns f as ParseFault reads it.
func (f Fault) String() string {
	switch f.Kind {
	case None:
		return "ok"
	case Slow, Flap:
		return string(f.Kind) + ":" + f.Duration.String()
	}
	return string(f.Kind)
}

// mode is what a fault does to the listening side of a server.
type mode uint8

const (
	serving     mode = iota
	wrongName        // serving, with a certificate for another name
	expired          // serving, with an expired certificate
	unknownRoot      // serving, with a certificate of another CA
	hole             // accepting, and throwing away what comes
	down             // not there
)

func (f Fault) mode() mode {
	switch f.Kind {
	case Dead, Flap:
		return down
	case BadCert:
		return wrongName
	case ExpiredCert:
		return expired
	case UnknownCA:
		return unknownRoot
	case TLSHang:
		return hole
	}
	return serving
}

// check reports why f makes no sense for a server that speaks scheme.
func (f Fault) check(scheme Scheme) error {
	known := f.Kind == None
	for _, k := range faultKinds {
		known = known || k.kind == f.Kind
	}
	if !known {
		return fmt.Errorf("unknown fault %q", string(f.Kind))
	}
	if (f.Kind == Slow || f.Kind == Flap) && f.Duration <= 0 {
		return fmt.Errorf("fault %s needs a duration", f.Kind)
	}
	switch f.Kind {
	case BadCert, ExpiredCert, UnknownCA, TLSHang:
		if !scheme.encrypted() {
			return fmt.Errorf("fault %s needs an encrypted server, and %s is none", f.Kind, scheme)
		}
	}
	return nil
}

// garbage returns 64 octets that depend on seed alone.
func garbage(seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 0))
	b := make([]byte, 64)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}
