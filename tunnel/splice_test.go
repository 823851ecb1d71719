package tunnel

import (
	"testing"
	"time"
)

func TestGather(t *testing.T) {
	type read struct {
		n       int
		against uint64
		want    time.Duration
	}
	const piece = 16 << 10
	repeat := func(n int, r read) []read {
		rs := make([]read, n)
		for i := range rs {
			rs[i] = r
		}
		return rs
	}
	until := streaming/piece - 1 // reads before a flow counts as streaming
	for name, reads := range map[string][]read{
		"first megabyte":     repeat(until, read{piece, 7, 0}),
		"little, streaming":  append(repeat(until, read{piece, 7, 0}), repeat(5, read{piece, 7, gatherFor})...),
		"much, streaming":    append(repeat(until, read{piece, 7, 0}), repeat(5, read{gatherBelow, 7, 0})...),
		"much, then little":  append(repeat(until+1, read{gatherBelow, 0, 0}), read{1200, 0, gatherFor}),
		"an answer is asked": append(repeat(until, read{piece, 7, 0}), read{piece, 8, 0}, read{piece, 8, 0}),
		"each read answered": {{1 << 20, 1, 0}, {1200, 2, 0}, {1 << 20, 3, 0}, {1200, 4, 0}},
		"at the end":         append(repeat(until+1, read{gatherBelow, 0, 0}), read{0, 0, gatherFor}),
	} {
		var g gather
		for i, r := range reads {
			if got := g.after(r.n, r.against); got != r.want {
				t.Errorf("%s: read %d of %d bytes, %d the other way: wait %v, want %v", name, i, r.n, r.against, got, r.want)
				break
			}
		}
	}
}
