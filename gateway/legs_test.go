package gateway

import (
	"testing"
	"time"

	"sallyway/internal/legs"
)

// TestFlowsWait: for which states of legs and flows lost legs are worth haste.
func TestFlowsWait(t *testing.T) {
	good, down, doubtful := legs.Status{Up: true}, legs.Status{}, legs.Status{Up: true, Doubtful: true}
	type look struct {
		at    time.Duration
		legs  []legs.Status
		bytes uint64
		want  bool
	}
	for _, c := range []struct {
		name  string
		looks []look
	}{
		{"no flow ever", []look{{0, []legs.Status{good}, 0, false}, {1, []legs.Status{down}, 0, false}}},
		{"flows that moved a moment before", []look{
			{0, []legs.Status{good}, 10, false},
			{time.Second, []legs.Status{down}, 10, true},
			{time.Minute, []legs.Status{down}, 10, true}, // the keeper has a bound
		}},
		{"flows that had rested", []look{
			{0, []legs.Status{good}, 10, false},
			{flowMemory, []legs.Status{good}, 10, false},
			{flowMemory + time.Second, []legs.Status{down}, 10, false},
		}},
		{"one of two legs", []look{
			{0, []legs.Status{good, good}, 10, false},
			{1, []legs.Status{down, good}, 20, false},
			{2, []legs.Status{down, down}, 20, true},
			{3, []legs.Status{good, down}, 20, false},
		}},
		{"doubts", []look{{0, []legs.Status{good}, 10, false}, {1, []legs.Status{doubtful}, 10, true}, {2, []legs.Status{good}, 10, false}}},
		{"a flow that begins while there is no leg", []look{{0, []legs.Status{down}, 0, false}, {time.Second, []legs.Status{down}, 5, true}}},
		{"no relay", []look{{0, nil, 0, false}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var w flowWatch
			begin := time.Now()
			for i, l := range c.looks {
				if got := w.note(begin.Add(l.at), l.legs, l.bytes); got != l.want {
					t.Errorf("look %d: %v, want %v", i, got, l.want)
				}
			}
		})
	}
}
