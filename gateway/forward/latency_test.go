package forward

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// TestBuckets holds for every duration that the histogram may meet that its bucket's end is above it, and at most a
// quarter above. Below 64 microseconds one bucket is for all, above its range the last one.
func TestBuckets(t *testing.T) {
	const last = latencyOctaves*latencyParts - 1
	check := func(d time.Duration) {
		t.Helper()
		i := bucketOf(d)
		if i < 0 || i > last {
			t.Fatalf("%v: got bucket %d of %d", d, i, last)
		}
		end := bucketEnd(i)
		switch {
		case i == last && d >= end:
		case end <= d:
			t.Errorf("%v: got bucket %d that ends at %v, want above", d, i, end)
		case d >= 64*time.Microsecond && end > d.Truncate(time.Microsecond)*5/4:
			t.Errorf("%v: got bucket %d that ends at %v, want at most 25%% above", d, i, end)
		case i > 0 && bucketEnd(i-1) > d:
			t.Errorf("%v: got bucket %d, want an earlier one, which ends at %v", d, i, bucketEnd(i-1))
		}
	}
	for i := range last + 1 {
		for off := -2 * time.Microsecond; off <= 2*time.Microsecond; off += time.Microsecond / 2 {
			check(bucketEnd(i) + off)
		}
		if i > 0 && bucketEnd(i) <= bucketEnd(i-1) {
			t.Errorf("bucket %d ends at %v, the one before at %v", i, bucketEnd(i), bucketEnd(i-1))
		}
	}
	for d := time.Duration(0); d < 20*time.Second; d += 97 * time.Microsecond {
		check(d)
	}
	for range 100000 {
		check(time.Duration(rand.Int64N(int64(20 * time.Second))))
	}
	for _, d := range []time.Duration{-time.Second, 0, 1, 1<<63 - 1} {
		bucketOf(d) // does not panic
	}
	if got := bucketEnd(last); got < 16*time.Second {
		t.Errorf("the last bucket ends at %v, want at least 16s", got)
	}
}

// TestLatencyHigh holds the quantile of known distributions.
func TestLatencyHigh(t *testing.T) {
	ms := time.Millisecond
	end := func(d time.Duration) time.Duration { return bucketEnd(bucketOf(d)) }
	many := func(n int, d time.Duration) []time.Duration { return slices.Repeat([]time.Duration{d}, n) }
	tests := []struct {
		name  string
		takes [][]time.Duration // one after the other
		want  time.Duration
	}{
		{"nothing", nil, 0},
		{"one", [][]time.Duration{many(1, 30*ms)}, 2 * end(30*ms)},
		{"few, the slowest decides", [][]time.Duration{many(fewSamples-2, 5*ms), many(1, 30*ms)}, 2 * end(30*ms)},
		{"enough", [][]time.Duration{many(fewSamples, 30*ms)}, end(30 * ms)},
		{"one in fifty may be slow", [][]time.Duration{many(fewSamples-1, 5*ms), many(1, 900*ms)}, end(5 * ms)},
		{"2 %", [][]time.Duration{many(490, 5*ms), many(10, 900*ms)}, end(5 * ms)},
		{"more than 2 %", [][]time.Duration{many(489, 5*ms), many(11, 900*ms)}, end(900 * ms)},
		{"longer than its range", [][]time.Duration{many(100, time.Hour)}, end(time.Hour)},
		{"what was slow fades", [][]time.Duration{many(500, 900*ms), many(8*latencyMemory, 5*ms)}, end(5 * ms)},
		{"what was fast fades at once", [][]time.Duration{many(8*latencyMemory, 5*ms), many(latencyMemory/25, 900*ms)}, end(900 * ms)},
	}
	for _, tt := range tests {
		var l latencies
		for _, part := range tt.takes {
			for _, d := range part {
				l.add(d)
			}
		}
		if got := l.high(); got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}

// TestLatencyQuantile holds high against the exact quantile of random samples, and that total is the sum of the counts
// whatever comes.
func TestLatencyQuantile(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		n := fewSamples + r.IntN(latencyMemory-fewSamples-1) // none has been forgotten yet
		var l latencies
		all := make([]time.Duration, n)
		median := float64(200+r.IntN(1000000)) * float64(time.Microsecond)
		for i := range all {
			all[i] = time.Duration(median*r.ExpFloat64()) + 64*time.Microsecond
			l.add(all[i])
		}
		slices.Sort(all)
		exact, got := all[n-1-n/hedgeShare], l.high()
		if exact < bucketEnd(latencyOctaves*latencyParts-2) && (got < exact || got > exact*5/4+2*time.Microsecond) {
			t.Errorf("%d samples: got %v, want %v and at most 25%% more", n, got, exact)
		}
		for range r.IntN(5000) {
			l.add(time.Duration(median * r.ExpFloat64()))
		}
		sum := 0
		for _, c := range l.count {
			sum += int(c)
		}
		if sum != l.total || sum >= latencyMemory {
			t.Errorf("got a total of %d and a sum of %d, want the same and below %d", l.total, sum, latencyMemory)
		}
	}
}
