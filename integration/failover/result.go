package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// result is a line of the table.
type result struct {
	Fault    string `json:"fault"`
	Asked    int    `json:"asked"`
	Answered int    `json:"answered"`
	NotOK    int    `json:"not_noerror"` // answers with another RCODE than NOERROR
	Wrong    int    `json:"wrong"`       // messages that answer no question of ours
	Redials  int    `json:"redials"`     // DoT connections of clients that the server ended
	// Late is how late the load was at most through no fault of the server: a machine that is held up for long measures
	// itself.
	Late millis `json:"load_late_ms"`

	P50  millis `json:"p50_ms"`
	P99  millis `json:"p99_ms"`
	P999 millis `json:"p999_ms"`
	Max  millis `json:"max_ms"`
	// P99Outside is the 99th percentile of the questions outside the second in which the fault begins.
	P99Outside millis `json:"p99_outside_ms"`

	// Tier1 is the share of the questions from 5 s after recovery that the first tier was asked first. Both is the share of
	// all questions that both tiers were asked.
	Tier1 float64 `json:"tier1_again"`
	Both  float64 `json:"both_tiers"`
	// Most are the most connections at once to each tier.
	Most [2]int `json:"most_connections"`

	Before census `json:"before"`
	After  census `json:"after"`

	Reasons []string `json:"missed"` // criteria that are missed
}

// millis is a duration that is milliseconds in JSON.
type millis time.Duration

func (m millis) MarshalJSON() ([]byte, error) {
	return json.Marshal(math.Round(float64(m)/1e3) / 1e3)
}

func (m millis) String() string {
	ms := float64(m) / 1e6
	if ms < 99.95 {
		return fmt.Sprintf("%.1f", ms)
	}
	return fmt.Sprintf("%.0f", ms)
}

// summarize counts the answers of a load that is over. An answer that did not come took as long as clients wait.
func summarize(p plan, w *load) result {
	var res result
	var all, outside []time.Duration
	var late, first, both int
	for i := w.warm; i < len(w.fates); i++ {
		res.Asked++
		f := &w.fates[i]
		came := f.came.Load()
		took := time.Duration(came >> 8)
		if came == 0 || took >= patience {
			took = patience
		} else {
			res.Answered++
			if came&0xff != dns.RcodeSuccess {
				res.NotOK++
			}
		}
		all = append(all, took)
		due := w.due(i - w.warm)
		if due < p.at || due >= p.at+time.Second {
			outside = append(outside, took)
		}
		if due >= p.until+again {
			late++
			first += btoi(f.first.Load() == 1)
		}
		both += btoi(f.other.Load())
	}
	res.Tier1, res.Both = float64(first)/float64(late), float64(both)/float64(res.Asked)
	slices.Sort(all)
	slices.Sort(outside)
	res.P50, res.P99, res.P999 = percentile(all, 0.5), percentile(all, 0.99), percentile(all, 0.999)
	res.Max, res.P99Outside = percentile(all, 1), percentile(outside, 0.99)
	res.Late = millis(w.late.Load())
	res.Wrong, res.Redials = int(w.wrong.Load()), int(w.redials.Load())
	return res
}

// percentile returns the smallest value that at least the share p of sorted does not exceed.
func percentile(sorted []time.Duration, p float64) millis {
	if len(sorted) == 0 {
		return 0
	}
	rank := int(math.Ceil(p*float64(len(sorted)) - 1e-9)) // 0.999*1000 is a little more than 999
	return millis(sorted[min(max(rank, 1), len(sorted))-1])
}

// limits are how far the latencies of a run may exceed those of the fault-free one.
type limits struct {
	p999, p99 time.Duration // the second outside the fault's first second
}

// The limits of a full run are the criteria. Those of a short one only tell a broken engine from a sound one: it runs beside
// others on a machine that is not its own.
var (
	fullLimits  = limits{p999: 450 * time.Millisecond, p99: 50 * time.Millisecond}
	shortLimits = limits{p999: time.Second, p99: 200 * time.Millisecond}
)

const (
	// leastAgain is the share of questions that has to go to the first tier again.
	leastAgain = 0.95
	// mostConns is how many connections there may be to one upstream.
	mostConns = 4
)

// judge returns the criteria that r misses.
func (l limits) judge(r, base *result) []string {
	missed := []string{}
	miss := func(format string, args ...any) { missed = append(missed, fmt.Sprintf(format, args...)) }
	if n := r.Asked - r.Answered; n > 0 {
		miss("%d unanswered", n)
	}
	if r.NotOK > 0 {
		miss("%d with an RCODE", r.NotOK)
	}
	if r.Wrong > 0 {
		miss("%d wrong answers", r.Wrong)
	}
	if over := time.Duration(r.P999 - base.P999); over > l.p999 {
		miss("p99.9 is %v above the fault-free run's", over.Round(time.Millisecond))
	}
	if over := time.Duration(r.P99Outside - base.P99Outside); over > l.p99 {
		miss("p99 outside the first second is %v above", over.Round(time.Millisecond))
	}
	if r.Tier1 < leastAgain {
		miss("%.0f %% to tier 1 after recovery", math.Floor(r.Tier1*100))
	}
	for i, n := range r.Most {
		if n > mostConns {
			miss("%d connections to tier %d", n, i+1)
		}
	}
	if r.After.Goroutines > r.Before.Goroutines {
		miss("%d goroutines more than before", r.After.Goroutines-r.Before.Goroutines)
	}
	if r.After.Descriptors > r.Before.Descriptors {
		miss("%d descriptors more than before", r.After.Descriptors-r.Before.Descriptors)
	}
	return missed
}

// printJSON prints one object for a target.
func printJSON(w io.Writer, target string, p plan, results []result) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(struct {
		Target  string   `json:"target"`
		Rate    int      `json:"rate"`
		Results []result `json:"results"`
	}{target, p.rate, results})
}

// printTable prints the results for people: a cell that misses a criterion is in the verdict.
func printTable(w io.Writer, target string, p plan, l limits, results []result) error {
	rows := [][]string{{"fault", "answered", "rcodes", "p50", "p99", "p99.9", "p99*", "max", "late", "tier 1", "both", "conns", "goroutines", "fds", "verdict"}}
	for _, r := range results {
		verdict := "ok"
		if len(r.Reasons) > 0 {
			verdict = "FAIL: " + strings.Join(r.Reasons, "; ")
		}
		rows = append(rows, []string{
			r.Fault, fmt.Sprintf("%d/%d", r.Answered, r.Asked), fmt.Sprint(r.NotOK),
			r.P50.String(), r.P99.String(), r.P999.String(), r.P99Outside.String(), r.Max.String(), r.Late.String(),
			fmt.Sprintf("%.1f%%", r.Tier1*100), fmt.Sprintf("%.1f%%", r.Both*100), fmt.Sprintf("%d+%d", r.Most[0], r.Most[1]),
			change(r.Before.Goroutines, r.After.Goroutines), change(r.Before.Descriptors, r.After.Descriptors), verdict,
		})
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %d questions/s over UDP and DoT for %v, fault from %v to %v\n\n", target, p.rate, p.length, p.at, p.until)
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], len(cell))
		}
	}
	for _, row := range rows {
		for i, cell := range row {
			switch i {
			case 0:
				fmt.Fprintf(&b, "%-*s", widths[i], cell)
			case len(row) - 1:
				fmt.Fprintf(&b, "  %s\n", cell)
			default:
				fmt.Fprintf(&b, "  %*s", widths[i], cell)
			}
		}
	}
	fmt.Fprintf(&b, `
Latencies in ms, from when a question was due; one without an answer counts %v. rcodes: answers other than NOERROR.
p99*: outside the second in which the fault begins. late: how far the machine held up the load itself, which is in all of them.
tier 1: questions that it was asked first, from %v after recovery. both: questions that both tiers were asked, over the whole run.
conns: the most at once to tier 1 + tier 2. goroutines, fds: before the first question > after, idle connections gone.
Limits: p99.9 %v and p99* %v above the fault-free run's; tier 1 %.0f %%; %d conns to each; nothing unanswered, leaked or not NOERROR.

`, patience, again, l.p999, l.p99, leastAgain*100, mostConns)
	_, err := io.WriteString(w, b.String())
	return err
}

func change(before, after int) string {
	if before < 0 {
		return "-"
	}
	return fmt.Sprintf("%d>%d", before, after)
}
