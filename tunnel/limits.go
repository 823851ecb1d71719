package tunnel

import "time"

// Defaults of limits and timers.
const (
	// DefaultQueue is how many runs of datagrams wait to be read by QUIC: 16 MiB at most.
	DefaultQueue = 256
	// DefaultHandshakeTimeout bounds silence during the handshake.
	DefaultHandshakeTimeout = 5 * time.Second
	// DefaultIdleTimeout outlives a relay's restart and a laptop's short sleep.
	DefaultIdleTimeout = 120 * time.Second
	// DefaultSessions is how many sessions a node may have at a gateway: one in use, one left by a crash, and room for a second process.
	DefaultSessions = 8
	// DefaultFlows is how many flows a node may have open at a gateway.
	DefaultFlows = 4096
	// DefaultHandshakes is how many handshakes a second go without Retry.
	DefaultHandshakes = 50
)
