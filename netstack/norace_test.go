//go:build !race

package netstack

// race is whether the race detector watches.
const race = false
