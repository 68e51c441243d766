//go:build race

package nowait

import (
	"runtime"
	"unsafe"
)

// written tells the race detector that the kernel has written b, as package syscall does.
func written(b []byte) {
	if len(b) > 0 {
		runtime.RaceWriteRange(unsafe.Pointer(&b[0]), len(b))
	}
}

// read tells it that the kernel reads b.
func read(b []byte) {
	if len(b) > 0 {
		runtime.RaceReadRange(unsafe.Pointer(&b[0]), len(b))
	}
}
