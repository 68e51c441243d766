//go:build !unix

package config

// writable knows nothing here: whether a file may be written shows when it is.
func writable(string) error { return nil }
