package forward

import (
	"math/bits"
	"time"
)

const (
	// minHedge and maxHedge bound the time after which the next server is asked beside one that has not answered: below
	// lies what the scheduler alone may take, above what people notice.
	minHedge = 20 * time.Millisecond
	maxHedge = 400 * time.Millisecond
	// hedgeShare is one part in how many answers may take longer than the high quantile: 2 %. It is below what the
	// budget allows, so that in normal times the budget is not what decides.
	hedgeShare = 50
	// fewSamples is how many answers it takes to speak of such a quantile.
	fewSamples = hedgeShare
	// latencyMemory is how many answers the histogram weighs before all of them count half.
	latencyMemory = 1024
)

const (
	latencyOctaves = 18 // from 64 microseconds to 16 seconds
	latencyParts   = 4  // of each octave
)

// latencies is a decaying histogram of what answers took. The buckets are a quarter of an octave wide, so that a
// quantile is at most 25 % off.
type latencies struct {
	count [latencyOctaves * latencyParts]uint16
	total int
}

// bucketOf returns the bucket of d.
func bucketOf(d time.Duration) int {
	us := uint64(max(d, 0) / time.Microsecond)
	if us < 64 {
		return 0
	}
	octave := bits.Len64(us) - 7
	part := us >> (bits.Len64(us) - 3) & (latencyParts - 1)
	return min(octave*latencyParts+int(part), latencyOctaves*latencyParts-1)
}

// bucketEnd returns the upper bound of bucket i.
func bucketEnd(i int) time.Duration {
	return time.Duration(latencyParts+i%latencyParts+1) << (i / latencyParts) * (64 / latencyParts) * time.Microsecond
}

// add counts d.
func (l *latencies) add(d time.Duration) {
	l.count[bucketOf(d)]++
	if l.total++; l.total < latencyMemory {
		return
	}
	l.total = 0
	for i, n := range l.count {
		l.count[i] = n / 2
		l.total += int(n / 2)
	}
}

// high returns what all but one in hedgeShare answers were faster than, 0 without any. Of few answers it is twice what
// the slowest took.
func (l *latencies) high() time.Duration {
	above, allowed := 0, l.total/hedgeShare
	for i := len(l.count) - 1; i >= 0; i-- {
		if above += int(l.count[i]); above > allowed {
			if l.total < fewSamples {
				return 2 * bucketEnd(i)
			}
			return bucketEnd(i)
		}
	}
	return 0
}
