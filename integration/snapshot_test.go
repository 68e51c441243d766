package integration

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// savedNames is how many names the tests of snapshots have the gateway know.
const savedNames = 1000

func savedName(i int) string { return fmt.Sprintf("s%d.load.lab.test.", i) }

// newSnapshotSetup is a setup whose gateway runs with a file, config.yaml, and saves its cache to another, cache.bin.
func newSnapshotSetup(t *testing.T) *setup {
	t.Helper()
	s := new(setup)
	s.start(t, func() yaml {
		y := yaml{cache: fmt.Sprintf("{size: 8MB, save: {file: %s, every: 10s}}", s.file("cache.bin"))}
		write(t, s.file("config.yaml"), s.config(y))
		return y
	})
	return s
}

// again starts the gateway anew with config.yaml, until it serves.
func (s *setup) again(t *testing.T) {
	t.Helper()
	s.gateway = start(t, nil, program, "run", "-c", s.file("config.yaml"))
	s.gateway.await(`"msg":"serving"`)
}

// awaitSave waits until the cache was saved after a time. It is saved every 10 s.
func (s *setup) awaitSave(t *testing.T, after time.Time) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; <-time.After(20 * time.Millisecond) { // looking again is the only way to see a file
		if info, err := os.Stat(s.file("cache.bin")); err == nil && info.ModTime().After(after) {
			return
		}
		if time.Now().After(end) {
			t.Fatal("the cache was not saved within 30 s")
		}
	}
}

// askUntil asks for a name over UDP again and again, as clients do that get no answer, and fails the test if none comes by
// the time end. What came before the file was read waits for upstreams.
func (s *setup) askUntil(t *testing.T, name string, end time.Time) {
	t.Helper()
	for time.Now().Before(end) {
		c := dialClassic(t, s, "udp", s.plain)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		resp, err := c.ask(ctx, new(dns.Msg).SetQuestion(name, dns.TypeA))
		cancel()
		c.close()
		if err == nil && resp.Rcode == dns.RcodeSuccess {
			return
		}
	}
	t.Errorf("no answer for %s in time", name)
}

// known asks for all saved names once, one after the other on one connection, and returns how many were answered, and when
// the first and the last answer came.
func (s *setup) known(t *testing.T, began time.Time) (n int, first, last time.Duration) {
	t.Helper()
	c := dialClassic(t, s, "tcp", s.plain)
	defer c.close()
	for i := range savedNames {
		ctx, cancel := contextWithDeadline(t)
		resp, err := c.ask(ctx, new(dns.Msg).SetQuestion(savedName(i), dns.TypeA))
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = time.Since(began)
		}
		if resp.Rcode == dns.RcodeSuccess && len(resp.Answer) > 0 {
			n++
		}
	}
	return n, first, time.Since(began)
}

// TestSnapshotSurvivesKill kills a gateway that knows 1,000 names and starts it again with upstreams that are gone: it
// answers at once, and from its file. A file that is damaged is one warning.
func TestSnapshotSurvivesKill(t *testing.T) {
	s := newSnapshotSetup(t)
	if n, _, _ := s.known(t, time.Now()); n != savedNames {
		t.Fatalf("got %d answers to %d questions", n, savedNames)
	}
	asked := time.Now()
	s.awaitSave(t, asked)
	s.gateway.stop(syscall.SIGKILL)
	s.faultAll(t, "dead")

	began := time.Now()
	s.again(t)
	serving := time.Now()
	s.askUntil(t, savedName(0), serving.Add(time.Second))
	t.Logf("serving %v after the start, a first answer %v later", serving.Sub(began), time.Since(serving))
	s.gateway.await("the saved cache is loaded")
	if took := time.Since(serving); took > time.Second {
		t.Errorf("the cache was there %v after the gateway served, want 1 s at most", took)
	}
	n, first, last := s.known(t, serving)
	t.Logf("%d of %d names known: the first answer %v after the gateway served, the last one %v", n, savedNames, first, last)
	if n < savedNames*95/100 {
		t.Errorf("got %d names of %d from the file, want 95 %%", n, savedNames)
	}
	if status := s.gateway.stop(syscall.SIGTERM); status != 0 {
		t.Errorf("exit status: got %d, want 0", status)
	}
	noErrors(t, s.gateway)
	if out := s.gateway.output(); !strings.Contains(out, "the cache is saved") || strings.Contains(out, "lab.test.\"") {
		t.Errorf("want a last save, and no names of questions, in the log:\n%s", out)
	}

	data, err := os.ReadFile(s.file("cache.bin"))
	if err != nil {
		t.Fatal(err)
	}
	for name, broken := range map[string][]byte{
		"half": data[:len(data)/2], "empty": {}, "one bit": flipped(data), "garbage": bytes.Repeat([]byte("cache"), 1000),
	} {
		write(t, s.file("cache.bin"), string(broken))
		s.faultAll(t, "ok")
		s.again(t)
		s.gateway.await("the saved cache is ignored")
		if n, _, _ := s.known(t, time.Now()); n != savedNames {
			t.Errorf("%s: got %d answers to %d questions", name, n, savedNames)
		}
		if status := s.gateway.stop(syscall.SIGTERM); status != 0 {
			t.Errorf("%s: exit status: got %d, want 0", name, status)
		}
		if n := strings.Count(s.gateway.output(), `"level":"WARN"`); n != 1 {
			t.Errorf("%s: got %d warnings, want 1:\n%s", name, n, s.gateway.output())
		}
		noErrors(t, s.gateway)
	}
	s.again(t)
	s.gateway.await("the saved cache is loaded") // what replaced the damaged one is sound
}

// flipped returns data with one bit in its middle that is another.
func flipped(data []byte) []byte {
	out := bytes.Clone(data)
	out[len(out)/2] ^= 4
	return out
}

// TestFlush flushes names with the command, while dig shows from where the answers come.
func TestFlush(t *testing.T) {
	need(t, "dig")
	s := newSnapshotSetup(t)
	upstream := func() (n uint64) {
		for _, server := range s.lab.Servers() {
			n += server.Queries()
		}
		return n
	}
	names := []string{"load.lab.test", "a.load.lab.test", "b.a.load.lab.test", "aload.lab.test"}
	// asked returns which names dig has to have asked for upstream.
	asked := func() (fresh []string) {
		for _, name := range names {
			before := upstream()
			if out, status := run(t, "dig", "@127.0.0.1", "-p", port(s.plain), "+tries=1", "+timeout=5", name); status != 0 {
				t.Errorf("dig %s: exit status %d\n%s", name, status, out)
			}
			if upstream() > before {
				fresh = append(fresh, name)
			}
		}
		return fresh
	}
	asked()
	for _, step := range []struct {
		args  []string
		says  string
		fresh string
	}{
		{[]string{"nobody.example"}, "flushed nobody.example: 0 entries\n", ""},
		{[]string{"A.load.lab.test."}, "flushed A.load.lab.test.: 1 entry\n", "a.load.lab.test"},
		{[]string{"--below", "a.load.lab.test"}, "flushed a.load.lab.test and below: 2 entries\n", "a.load.lab.test b.a.load.lab.test"},
		{[]string{"--below", "load.lab.test"}, "flushed load.lab.test and below: 3 entries\n",
			"load.lab.test a.load.lab.test b.a.load.lab.test"},
		{nil, "flushed all answers: 4 entries\n", strings.Join(names, " ")},
	} {
		out, status := run(t, append([]string{program, "flush", "-c", s.file("config.yaml")}, step.args...)...)
		if status != 0 || out != step.says {
			t.Errorf("flush %v: got status %d, %q, want %q", step.args, status, out, step.says)
		}
		if got := strings.Join(asked(), " "); got != step.fresh {
			t.Errorf("after flush %v: %q were asked for upstream, want %q", step.args, got, step.fresh)
		}
	}
	if out, status := run(t, program, "flush", "-c", s.file("config.yaml"), "a..b"); status != 1 || !strings.Contains(out, "400 Bad Request: name: a label is empty") {
		t.Errorf("a bad name: got status %d, %q", status, out)
	}
	noErrors(t, s.gateway)
}
