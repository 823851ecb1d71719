//go:build race

package netstack

// race is whether the race detector watches: it makes pools forget, so allocations say nothing.
const race = true
