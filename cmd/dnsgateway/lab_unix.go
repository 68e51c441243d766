//go:build unix

package main

import (
	"os/signal"
	"syscall"
)

// ignoreTTIN lets a lab that runs in the background of a shell go on when it reads its commands: the read then fails,
// where without this the whole lab would be stopped.
func ignoreTTIN() { signal.Ignore(syscall.SIGTTIN) }
