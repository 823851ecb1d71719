package presence

import (
	"slices"
	"testing"
	"time"

	"sallyway/internal/control"
)

// TestOutsideSinceStart: what was found of a relay before its present start does not count, however wrong the relay's clock is.
func TestOutsideSinceStart(t *testing.T) {
	const relay = "r-aaaaaaaaaaaa"
	zero := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	at := func(s int) time.Time { return zero.Add(time.Duration(s) * time.Second) }
	for name, skew := range map[string]time.Duration{"right": 0, "slow": -time.Hour, "fast": time.Hour} {
		var b Board
		counts := func(found int) bool {
			b.SetOutside(map[string]control.Outside{relay: {State: control.OutsideUnreached, At: at(found), Why: "not reached"}})
			why, _ := b.Doubt(relay, at(60))
			return why != ""
		}
		beat := func(s, started int) {
			b.Put(relay, Beat{At: at(s), Heartbeat: control.Heartbeat{Started: at(started).Add(skew)}})
		}
		beat(10, -500)
		beat(20, -500)
		if !counts(15) {
			t.Errorf("%s clock: a look between two heartbeats of one start does not count", name)
		}
		beat(40, 39)
		if counts(15) || counts(38) {
			t.Errorf("%s clock: a look before the start counts", name)
		}
		beat(50, 39)
		if counts(38) || !counts(41) {
			t.Errorf("%s clock: a later heartbeat moves the start", name)
		}
	}
}

// TestReturning: relays that are heard for the first time, after a start, or after a silence are told once; others never.
func TestReturning(t *testing.T) {
	now := time.Now()
	var b Board
	beat := func(id string, after time.Duration, started int64) {
		b.Put(id, Beat{At: now.Add(after), Heartbeat: control.Heartbeat{Started: time.Unix(started, 0)}})
	}
	beat("r-early", 0, 1)
	told := b.Returning()
	for i, step := range []struct {
		id      string
		after   time.Duration
		started int64
		returns bool
	}{
		{"r-early", time.Second, 1, false},
		{"r-new", time.Second, 1, true},
		{"g-gateway", time.Second, 1, false},
		{"r-new", 11 * time.Second, 1, false},
		{"r-new", 12 * time.Second, 2, true},
		{"r-new", 12*time.Second + Timeout, 2, true},
	} {
		beat(step.id, step.after, step.started)
		woken := false
		select {
		case <-told:
			woken = true
		default:
		}
		if got := b.TakeReturned(); woken != step.returns || slices.Contains(got, step.id) != step.returns {
			t.Errorf("step %d: told %v, %v", i, woken, got)
		}
	}
	beat("r-gone", 0, 1)
	b.Drop("r-gone")
	if got := b.TakeReturned(); len(got) != 0 {
		t.Errorf("dropped relays return: %v", got)
	}
}
