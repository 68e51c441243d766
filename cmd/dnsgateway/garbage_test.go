package main

import (
	"runtime"
	"runtime/debug"
	"testing"
)

func TestGarbagePercent(t *testing.T) {
	for _, tt := range []struct {
		name    string
		live    uint64
		garbage uint64 // octets
	}{
		{"at the start", 0, 16 << 20},
		{"small", 8 << 20, 16 << 20},
		{"at the turn", 40 << 20, 16 << 20},
		{"a full cache", 1 << 30, 410 << 20},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := max(tt.live, 4<<20) / 100 * uint64(garbagePercent(tt.live))
			if got < tt.garbage*98/100 || got > tt.garbage*102/100 {
				t.Errorf("%d octets of garbage beside %d, want about %d", got, tt.live, tt.garbage)
			}
		})
	}
}

// TestTuneGarbage keeps 100 MB alive and sees that the collector's pace follows.
func TestTuneGarbage(t *testing.T) {
	t.Setenv("GOGC", "")
	before := debug.SetGCPercent(100)
	tuneGarbage()
	kept := make([]byte, 100<<20)
	got := 0
	for range 1000 {
		runtime.GC()
		runtime.Gosched() // to the finalizers
		if got = debug.SetGCPercent(garbageShare + 1); got == garbageShare {
			break
		}
	}
	if got != garbageShare {
		t.Errorf("GOGC is %d beside %d octets alive, want %d", got, len(kept), garbageShare)
	}
	runtime.KeepAlive(kept)
	debug.SetGCPercent(before)
}
