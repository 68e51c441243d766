//go:build race

package nowait

import (
	"runtime"
	"unsafe"
)

// written tells the race detector that the kernel has written b, as package syscall does.
func written(b []byte) { runtime.RaceWriteRange(unsafe.Pointer(unsafe.SliceData(b)), len(b)) }

// read tells it that the kernel reads b.
func read(b []byte) { runtime.RaceReadRange(unsafe.Pointer(unsafe.SliceData(b)), len(b)) }
