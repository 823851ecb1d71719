//go:build !linux

package tunnel

import "sallyway/internal/datagram"

// Elsewhere than on Linux quic-go neither segments nor reads control messages of a conn like ours.

func putECN([]byte, datagram.ECN) int { return 0 }

func parseControl([]byte) (segment int, ecn datagram.ECN) { return 0, datagram.NotECT }
