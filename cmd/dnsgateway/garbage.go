package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

const (
	// garbageShare is how much garbage may stand beside what is alive before it is collected, in percent. Go's own 100 would
	// make a cache of 1 GB a process of 2 GB.
	garbageShare = 40
	// garbageLeast is how much there may always be, in octets: a gateway that has just begun would be collected every 2 MB
	// otherwise, at a thousand misses each.
	garbageLeast = 16 << 20
)

// tuneGarbage sets the garbage collector's pace after each collection by what was found alive, unless the environment says
// GOGC. It starts nothing: the runtime calls back.
func tuneGarbage() {
	if os.Getenv("GOGC") != "" {
		return
	}
	debug.SetGCPercent(garbagePercent(0))
	awaitCollection()
}

// cycle is garbage from the start: its cleanup runs after a collection.
type cycle struct{ _ *byte }

func awaitCollection() {
	runtime.SetFinalizer(&cycle{}, func(*cycle) {
		live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
		metrics.Read(live)
		debug.SetGCPercent(garbagePercent(live[0].Value.Uint64()))
		awaitCollection()
	})
}

// garbagePercent returns GOGC for a heap with live octets alive.
func garbagePercent(live uint64) int {
	const least = 4 << 20 // the runtime takes a smaller heap for this much, times GOGC/100
	return max(garbageShare, int(garbageLeast*100/max(live, least)))
}
