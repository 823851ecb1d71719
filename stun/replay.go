package stun

import "encoding/binary"

// attrNumber carries a probe's number. It is comprehension-optional (RFC 8489 §14): who does not know it answers all the same.
const attrNumber = 0xC0F8

// replayWindow is how many numbers below the newest are told apart: paths differ in delay, so that probes of one overtake those of another.
const replayWindow = 256

// replays remembers which numbers came (as RFC 4303 §3.4.3 does for sequence numbers). The zero replays has seen none.
type replays struct {
	newest uint64
	bits   [replayWindow / 64]uint64 // by number modulo replayWindow
}

// first reports whether a number comes for the first time, and notes it. 0 is a probe without one.
func (r *replays) first(n uint64) bool {
	if n == 0 {
		return r.newest == 0
	}
	if n+replayWindow <= r.newest {
		return false
	}
	for i := r.newest + 1; i <= n && i <= r.newest+replayWindow; i++ {
		r.bits[i/64%uint64(len(r.bits))] &^= 1 << (i % 64)
	}
	r.newest = max(r.newest, n)
	word, bit := &r.bits[n/64%uint64(len(r.bits))], uint64(1)<<(n%64)
	if *word&bit != 0 {
		return false
	}
	*word |= bit
	return true
}

// probeNumber returns the number in a request whose integrity is valid, 0 if it has none. It comes first.
func probeNumber(b []byte) uint64 {
	if len(b) < MinProbe+attrHeaderSize+numberSize || binary.BigEndian.Uint16(b[headerSize:]) != attrNumber ||
		binary.BigEndian.Uint16(b[headerSize+2:]) != numberSize {
		return 0
	}
	return binary.BigEndian.Uint64(b[headerSize+attrHeaderSize:])
}
