package forward

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// unreadable answers names below "bad." with an address of three octets, and those below "slow." after a moment.
func unreadable(m *dns.Msg) *dns.Msg {
	r := new(dns.Msg).SetReply(m)
	h := dns.RR_Header{Name: m.Question[0].Name, Class: dns.ClassINET, Ttl: 300}
	if strings.HasPrefix(h.Name, "slow.") {
		time.Sleep(100 * time.Millisecond)
	}
	if strings.HasPrefix(h.Name, "bad.") {
		h.Rrtype = dns.TypeA
		r.Answer = []dns.RR{&dns.RFC3597{Hdr: h, Rdata: "7f0000"}}
		return r
	}
	h.Rrtype = dns.TypeTXT
	r.Answer = []dns.RR{&dns.TXT{Hdr: h, Txt: []string{"good"}}}
	return r
}

// TestUnreadableAnswer asks for names whose answers cannot be read: the connection stays, and what is in flight on it
// gets its answer.
func TestUnreadableAnswer(t *testing.T) {
	for _, scheme := range []string{"tls", "tcp", "udp", "https", "h3", "quic"} {
		t.Run(scheme, func(t *testing.T) {
			f := newFake(t, scheme, "first", func(f *fake) { f.answer = unreadable })
			c := newTestClient(t, f.server)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			ask := func(name string) error {
				q, err := queryOf(question(name))
				if err != nil {
					t.Error(err)
				}
				_, err = c.ask(ctx, q)
				return err
			}
			if err := ask("good.example."); err != nil {
				t.Fatal(err)
			}
			var slow sync.WaitGroup
			for i := range 5 {
				slow.Go(func() {
					if err := ask(fmt.Sprintf("slow.%d.example.", i)); err != nil {
						t.Errorf("in flight beside an unreadable answer: %v", err)
					}
				})
			}
			for i := range 5 {
				if err := ask(fmt.Sprintf("bad.%d.example.", i)); kindOf(err) != KindMalformed {
					t.Errorf("got %v, want an error of kind %s", err, KindMalformed)
				}
			}
			slow.Wait()
			if n := f.conns.Load(); n > 1 {
				t.Errorf("got %d connections, want 1", n)
			}
		})
	}
}

// TestUnreadableAnswersHarmNobody lets a stranger ask for as many such names as it likes: other names are answered, and
// no server is thought to be failing.
func TestUnreadableAnswersHarmNobody(t *testing.T) {
	first := newFake(t, "tls", "first", func(f *fake) { f.answer = unreadable })
	second := newFake(t, "tls", "second", func(f *fake) { f.answer = unreadable })
	g := newTestGroup(t, Config{Tiers: [][]Server{{first.server}, {second.server}}})
	var all sync.WaitGroup
	for i := range 200 {
		all.Go(func() {
			_, err := g.Exchange(t.Context(), question(fmt.Sprintf("bad.%d.example.", i)))
			var none *NoAnswerError
			if !errors.As(err, &none) {
				t.Errorf("bad name: got %v, want a *NoAnswerError", err)
			}
		})
		all.Go(func() {
			if _, err := g.Exchange(t.Context(), question(fmt.Sprintf("good.%d.example.", i))); err != nil {
				t.Errorf("good name: %v", err)
			}
		})
	}
	all.Wait()
	for _, s := range g.Status() {
		if s.State != StateOK && s.State != StateUnknown {
			t.Errorf("%s: got state %q: %s", s.URL, s.State, s.LastError)
		}
	}
}

// TestUnreadableCountsWhenRefuted is for a server whose answers nobody can read while another's are sound.
func TestUnreadableCountsWhenRefuted(t *testing.T) {
	first := newFake(t, "tls", "first", func(f *fake) { f.answer = unreadable })
	second := newFake(t, "tls", "second")
	g := newTestGroup(t, Config{Tiers: [][]Server{{first.server}, {second.server}}})
	for i := range openAfterRefuted {
		if _, err := g.Exchange(t.Context(), question(fmt.Sprintf("bad.%d.example.", i))); err != nil {
			t.Fatal(err)
		}
	}
	if s := g.Status()[0]; s.State != StateFailing {
		t.Errorf("after %d refuted answers: got state %q", openAfterRefuted, s.State)
	}
}

// TestBareError takes an error response without a question, as servers that know no EDNS send it.
func TestBareError(t *testing.T) {
	q, err := queryOf(question("a.example."))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		msg  []byte
		ok   bool
	}{
		{"FORMERR", []byte{0, 7, 0x80, 0x81, 0, 0, 0, 0, 0, 0, 0, 0}, true},
		{"REFUSED", []byte{0, 7, 0x80, 0x85, 0, 0, 0, 0, 0, 0, 0, 0}, true},
		{"NOERROR", []byte{0, 7, 0x80, 0x80, 0, 0, 0, 0, 0, 0, 0, 0}, false},
		{"NXDOMAIN", []byte{0, 7, 0x80, 0x83, 0, 0, 0, 0, 0, 0, 0, 0}, false},
		{"FORMERR with an answer", []byte{0, 7, 0x80, 0x81, 0, 0, 0, 1, 0, 0, 0, 0}, false},
		{"another ID", []byte{0, 8, 0x80, 0x81, 0, 0, 0, 0, 0, 0, 0, 0}, false},
	} {
		resp, _, err := q.check(tt.msg, 7)
		if (err == nil) != tt.ok {
			t.Errorf("%s: got %v, %v, want ok %v", tt.name, resp, err, tt.ok)
		}
		if err == nil && !sameQuestion(resp.Msg, q.question) {
			t.Errorf("%s: got %x, want the question of the query", tt.name, resp.Msg)
		}
	}
}

// TestWaitsForWhoCouldNotBeAsked has the only server back off: there is time, so it is waited for, and asked once more.
func TestWaitsForWhoCouldNotBeAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, servers := scripted(t, Config{Deadline: 3 * time.Second}, "a")
		tries := 0
		servers["a"].set(func(ctx context.Context, q *query) (*dns.Msg, error) {
			if tries++; tries == 1 {
				return nil, &Error{Kind: KindBackoff, Err: errors.New("refused"), retry: time.Now().Add(300 * time.Millisecond)}
			}
			return says("a", dns.RcodeSuccess, 0)(ctx, q)
		})
		start := time.Now()
		if _, err := g.Exchange(t.Context(), question("a.example.")); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(start); d != 300*time.Millisecond {
			t.Errorf("got an answer after %v, want 300ms", d)
		}
		// For ever in vain: one round more, and no failure is counted for what was never asked.
		tries = 0
		servers["a"].set(func(context.Context, *query) (*dns.Msg, error) {
			tries++
			return nil, &Error{Kind: KindBackoff, Err: errors.New("refused"), retry: time.Now().Add(300 * time.Millisecond)}
		})
		if _, err := g.Exchange(t.Context(), question("a.example.")); err == nil || tries != 2 {
			t.Errorf("got %v after %d tries, want an error after 2", err, tries)
		}
		if s := g.Status()[0]; s.State == StateFailing {
			t.Errorf("got state %q", s.State)
		}
	})
}
