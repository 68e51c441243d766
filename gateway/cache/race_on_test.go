//go:build race

package cache

const race = true
