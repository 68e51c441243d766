//go:build !unix

package main

// ignoreTTIN has nothing to do where there is no job control.
func ignoreTTIN() {}
