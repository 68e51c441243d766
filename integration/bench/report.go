//go:build linux

package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"
)

// ours is the target that all others are compared with.
const ours = "dnsgateway"

// table is one of the report's.
type table struct {
	title, note string
	header      []string // of the first column, too
	rows        [][]string
}

// print writes the report.
func (r *results) print(w io.Writer, markdown bool) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, `%s`, %s, cores %s: the first for the server, the last for the load\n",
		r.When.Format("2006-01-02"), r.Command, r.Machine, cpuList(r.Cores))
	var versions []string
	for _, t := range r.Targets {
		if v := r.Versions[t]; v != "" {
			versions = append(versions, t+": "+v)
		}
	}
	fmt.Fprintf(&b, "\n%s\n\nMedians over the rounds, of which there are %d. %s.\n", strings.Join(versions, "; "), r.rounds(), legend)
	for _, t := range r.tables() {
		if markdown {
			t.markdown(&b)
		} else {
			t.text(&b)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// rounds is how many rounds have results.
func (r *results) rounds() (n int) {
	for _, rec := range r.Records {
		n = max(n, rec.Round)
	}
	return n
}

// of returns the values of a figure of a target's test, one for each round.
func (r *results) of(target, test, figure string) (v []float64) {
	for _, rec := range r.Records {
		if value, ok := rec.Values[figure]; ok && rec.Target == target && rec.Test == test {
			v = append(v, value)
		}
	}
	return v
}

// marks says what is wrong with a target's test in any round.
func (r *results) marks(target, test string) (marks string) {
	add := func(mark string, wrong bool) {
		if wrong && !strings.Contains(marks, mark) {
			marks += mark
		}
	}
	miss := strings.HasSuffix(test, "_miss")
	for _, rec := range r.Records {
		if rec.Target != target || rec.Test != test {
			continue
		}
		add("~", rec.Spoilt)
		add("!", rec.Values["lost"] > 0.05 || rec.Values["bad"] > 0.05)
		if up, ok := rec.Values["up"]; ok && target != "floor" {
			add("?", !miss && up > 0.01 || miss && (up < 0.99 || up > 1.05))
		}
	}
	return marks
}

// legend explains the marks.
const legend = "~: others used the machine in all tries (over 8 % of a core); !: over 0.05 % lost or not NOERROR;" +
	" ?: hits that went to the upstream, or misses that did not go there once"

// tables makes the tables of what was measured.
func (r *results) tables() (all []table) {
	var fast, late, sizes []string
	for _, t := range tests {
		if t.late {
			late = append(late, t.name)
		} else {
			fast = append(fast, t.name)
		}
	}
	for n := 1000; n <= 100_000_000; n *= 10 {
		sizes = append(sizes, namesTest(n))
	}
	fast, late, sizes = r.measured(fast...), r.measured(late...), r.measured(sizes...)
	cores := r.measured(coresTest(1), coresTest(2))
	if len(fast) > 0 {
		all = append(all, r.table("CPU of the server for a query, µs", "", fast, fast, "cpu"))
		if slices.Contains(r.Targets, ours) && len(r.Targets) > 1 {
			all = append(all, r.ratios(fast))
		}
		all = append(all, r.queries(fast))
	}
	if len(late) > 0 {
		all = append(all, r.table("Latency at 1,000 queries/s, µs, p50 / p99", "", late, late, "p50", "p99"))
	}
	if len(r.measured("mem")) > 0 {
		all = append(all, r.memory())
	}
	if len(cores) > 0 {
		note := "the load has a core of its own"
		if len(r.Cores) < 3 {
			note = "with two cores the server shares one of them with the load: only the CPU for a query says something there," +
				" and of that the load's use of the caches takes a part"
		}
		all = append(all, r.servers("Hits over UDP (udpblast) on one and two cores, µs for a query / queries in a second", note, cores, "cpu", "qps"))
	}
	if len(sizes) > 0 {
		all = append(all, r.servers("CPU for a hit over UDP (udpblast) with so many cached names, µs", "", sizes, "cpu"))
	}
	if tests := slices.Concat(fast, late, sizes, cores); len(tests) > 0 {
		all = append(all, r.control(tests))
	}
	return all
}

// measured returns those of tests that have results.
func (r *results) measured(tests ...string) (left []string) {
	for _, name := range tests {
		if slices.ContainsFunc(r.Records, func(rec record) bool { return rec.Test == name }) {
			left = append(left, name)
		}
	}
	return left
}

// queries marks where the server was not what limited the queries in a second.
func (r *results) queries(tests []string) table {
	t := r.table("Queries in a second, server on one core", "* the server's core was less than 90 % busy: the load or waiting is the limit",
		tests, tests, "qps")
	for i, target := range r.Targets {
		for j, test := range tests {
			if u := r.of(target, test, "util"); len(u) > 0 && median(u) < 90 {
				t.rows[i][j+1] += " *"
			}
		}
	}
	return t
}

// memory has a column for each figure of the one test, and no rows of targets that were left out.
func (r *results) memory() table {
	t := table{title: "Start and memory", header: []string{"target", "first answer, ms", "RSS at rest, MiB",
		"RSS with 100,000 names, MiB", "of those fetched again", "KiB for an idle DoT connection", "of them held",
		"KiB for an idle TCP connection", "of them held"}}
	for _, target := range r.Targets {
		if len(r.of(target, "mem", "rest")) == 0 {
			continue
		}
		row := []string{target}
		for _, figure := range []string{"start", "rest", "full", "refetched", "dot_each", "dot_held", "tcp_each", "tcp_held"} {
			row = append(row, r.cell(target, "mem", figure))
		}
		t.rows = append(t.rows, row)
	}
	return t
}

// servers is table without floor, which has no cache.
func (r *results) servers(title, note string, tests []string, figures ...string) table {
	t := r.table(title, note, tests, tests, figures...)
	t.rows = slices.DeleteFunc(t.rows, func(row []string) bool { return row[0] == "floor" })
	return t
}

// table has a row for each target and a column for each test; a cell is the medians of figures.
func (r *results) table(title, note string, tests, header []string, figures ...string) table {
	t := table{title: title, note: note, header: append([]string{"target"}, header...)}
	for _, target := range r.Targets {
		row := []string{target}
		for _, test := range tests {
			row = append(row, r.cell(target, test, figures...))
		}
		t.rows = append(t.rows, row)
	}
	return t
}

// cell is the medians of figures over the rounds, with the marks of the test.
func (r *results) cell(target, test string, figures ...string) string {
	var parts []string
	for _, f := range figures {
		if v := r.of(target, test, f); len(v) > 0 {
			parts = append(parts, number(median(v)))
		}
	}
	if len(parts) == 0 {
		return "-"
	}
	return strings.TrimSpace(strings.Join(parts, " / ") + " " + r.marks(target, test))
}

// ratios compares our CPU for a query with that of each other target: the ratio of the medians, and in brackets the
// smallest and the largest of a single round.
func (r *results) ratios(tests []string) table {
	t := table{title: "Ratio of CPU for a query, " + ours + " / target",
		note:   "below 1 the gateway is cheaper; in brackets the smallest and the largest of a single round",
		header: append([]string{"target"}, tests...)}
	for _, target := range r.Targets {
		if target == ours {
			continue
		}
		row := []string{target}
		for _, test := range tests {
			us, them := r.of(ours, test, "cpu"), r.of(target, test, "cpu")
			if len(us) == 0 || len(them) == 0 || median(them) == 0 {
				row = append(row, "-")
				continue
			}
			cell := fmt.Sprintf("%.2f", median(us)/median(them))
			var each []float64
			for i := range min(len(us), len(them)) {
				if them[i] > 0 {
					each = append(each, us[i]/them[i])
				}
			}
			if len(each) > 1 {
				cell += fmt.Sprintf(" [%.2f-%.2f]", slices.Min(each), slices.Max(each))
			}
			if strings.Contains(r.marks(ours, test)+r.marks(target, test), "~") {
				cell += " ~"
			}
			row = append(row, cell)
		}
		t.rows = append(t.rows, row)
	}
	return t
}

// control shows whether the figures may be believed: the worst of all tests and rounds.
func (r *results) control(tests []string) table {
	t := table{title: "Control, the worst of all tests and rounds",
		note: "upstream: responses of the upstream for a query, 0 for hits and 1 for misses; others and steal: used by strangers" +
			" and taken by the host, in percent of a core; spoilt: over 8 % of either in all tries",
		header: []string{"target", "upstream, hits", "upstream, misses", "lost %", "not NOERROR %", "others %", "steal %", "spoilt"}}
	for _, target := range r.Targets {
		of := func(figure string, miss bool) (v []float64) {
			for _, test := range tests {
				if strings.HasSuffix(test, "_miss") == miss {
					v = append(v, r.of(target, test, figure)...)
				}
			}
			return v
		}
		row := []string{target, "-", "-"}
		if v := of("up", false); len(v) > 0 {
			row[1] = number(slices.Max(v))
		}
		if v := of("up", true); len(v) > 0 {
			row[2] = number(slices.Min(v))
		}
		for _, figure := range []string{"lost", "bad", "foreign", "stolen"} {
			if v := append(of(figure, false), of(figure, true)...); len(v) > 0 {
				row = append(row, number(slices.Max(v)))
			}
		}
		if len(row) < len(t.header)-1 {
			continue // not measured
		}
		spoilt := "-"
		for _, rec := range r.Records {
			if rec.Target == target && rec.Spoilt {
				spoilt = strings.TrimPrefix(fmt.Sprintf("%s, %s in round %d", spoilt, rec.Test, rec.Round), "-, ")
			}
		}
		t.rows = append(t.rows, append(row, spoilt))
	}
	return t
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// number prints three digits that count, and whole numbers from 100 on.
func number(x float64) string {
	switch a := max(x, -x); {
	case a >= 100 || x == float64(int(x)):
		return group(fmt.Sprintf("%.0f", x))
	case a >= 10:
		return fmt.Sprintf("%.1f", x)
	case a >= 0.005:
		return fmt.Sprintf("%.2f", x)
	}
	return fmt.Sprintf("%.1g", x)
}

// group puts commas between thousands.
func group(digits string) string {
	for i := len(digits) - 3; i > 0 && digits[i-1] != '-'; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

func (t *table) markdown(b *strings.Builder) {
	fmt.Fprintf(b, "\n%s:\n\n| %s |\n%s|\n", t.title, strings.Join(t.header, " | "), strings.Repeat("|---", len(t.header)))
	for _, row := range t.rows {
		fmt.Fprintf(b, "| %s |\n", strings.Join(row, " | "))
	}
	if t.note != "" {
		fmt.Fprintf(b, "\n(%s)\n", t.note)
	}
}

func (t *table) text(b *strings.Builder) {
	widths := make([]int, len(t.header))
	lines := append([][]string{t.header}, t.rows...)
	for _, line := range lines {
		for i, cell := range line {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	fmt.Fprintf(b, "\n%s\n", t.title)
	for _, line := range lines {
		var row strings.Builder
		for i, cell := range line {
			row.WriteString(cell + strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)+2))
		}
		b.WriteString(strings.TrimRight(row.String(), " ") + "\n")
	}
	if t.note != "" {
		fmt.Fprintf(b, "(%s)\n", t.note)
	}
}
