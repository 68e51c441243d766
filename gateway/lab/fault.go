package lab

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
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
	Stuck         FaultKind = "stuck"          // connections open when it begins never answer again, healed or not; new ones are well
	Loss          FaultKind = "loss"           // each answer is lost with the probability Fault.Share
)

// Fault is how a server misbehaves. The zero value is a server that is well.
type Fault struct {
	Kind     FaultKind
	Duration time.Duration // of Slow and Flap; others have none
	Share    float64       // of Loss: above 0, at most 1; others have none
}

// defaults are the faults in the order of help texts, as they are when only their kind is given.
var defaults = []Fault{
	{Kind: Dead}, {Kind: Silent}, {Kind: Slow, Duration: 2 * time.Second}, {Kind: ServFail}, {Kind: Refused}, {Kind: BadCert},
	{Kind: ExpiredCert}, {Kind: UnknownCA}, {Kind: Garbage}, {Kind: WrongID}, {Kind: WrongQuestion}, {Kind: Truncated},
	{Kind: RST}, {Kind: Flap, Duration: time.Second}, {Kind: TLSHang}, {Kind: Stuck}, {Kind: Loss, Share: 0.3},
}

// FaultNames returns the words that ParseFault takes, for help texts.
func FaultNames() []string {
	names := []string{"ok"}
	for _, f := range defaults {
		name := f.String()
		if kind, value, ok := strings.Cut(name, ":"); ok {
			name = kind + "[:" + value + "]"
		}
		names = append(names, name)
	}
	return names
}

// ParseFault reads a fault: a kind, for slow and flap with a duration behind a colon ("slow:2s"), which is 2s and 1s by
// default, for loss with a share ("loss:30%"), which is 30% by default. "ok" is the zero Fault.
func ParseFault(s string) (Fault, error) {
	kind, value, valued := strings.Cut(strings.TrimSpace(s), ":")
	if kind == "ok" && !valued {
		return Fault{}, nil
	}
	for _, f := range defaults {
		if string(f.Kind) != kind {
			continue
		}
		switch {
		case !valued:
		case f.Duration != 0:
			d, err := time.ParseDuration(value)
			if err != nil || d <= 0 {
				return Fault{}, fmt.Errorf("fault %s: %q is not a duration such as 2s", kind, value)
			}
			f.Duration = d
		case f.Share != 0:
			number, percent := strings.CutSuffix(value, "%")
			share, err := strconv.ParseFloat(number, 64)
			if err != nil || !percent || !(share > 0 && share <= 100) {
				return Fault{}, fmt.Errorf("fault %s: %q is not a share such as 30%%", kind, value)
			}
			f.Share = share / 100
		default:
			return Fault{}, fmt.Errorf("fault %s takes no duration", kind)
		}
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
	case Loss:
		return string(f.Kind) + ":" + strconv.FormatFloat(f.Share*100, 'g', 12, 64) + "%"
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
	if f.Kind != None && !slices.ContainsFunc(defaults, func(d Fault) bool { return d.Kind == f.Kind }) {
		return fmt.Errorf("unknown fault %q", string(f.Kind))
	}
	if (f.Kind == Slow || f.Kind == Flap) && f.Duration <= 0 {
		return fmt.Errorf("fault %s needs a duration", f.Kind)
	}
	if f.Kind == Loss && !(f.Share > 0 && f.Share <= 1) {
		return fmt.Errorf("fault %s needs a share above 0 and at most 1", f.Kind)
	}
	switch f.Kind {
	case BadCert, ExpiredCert, UnknownCA, TLSHang:
		if !scheme.encrypted() {
			return fmt.Errorf("fault %s needs an encrypted server, and %s is none", f.Kind, scheme)
		}
	case Stuck:
		if scheme == UDP {
			return fmt.Errorf("fault %s needs connections, and %s has none", f.Kind, scheme)
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
