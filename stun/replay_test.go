package stun

import (
	"net/netip"
	"testing"
	"time"
)

func TestProbePlayedBack(t *testing.T) {
	k := testKeys()
	var numbers Numbers
	// Two paths share keys and numbers; the other end answers both.
	one, two, r := NewNumberedProber(k, &numbers), NewNumberedProber(k, &numbers), NewOrderedResponder(k.Swap(), 1<<20, 1<<20)
	answers := func(b []byte) bool {
		_, ok := r.Respond(epoch, b, netip.AddrPort{})
		return ok
	}
	bare := NewProber(k).Probe(epoch, 0)
	if !answers(bare) {
		t.Error("an asker that does not number its probes was not answered")
	}
	first := one.Probe(epoch, 0)
	if !answers(first) || answers(first) {
		t.Error("a probe was answered twice, or never")
	}
	held, later := one.Probe(epoch, 0), two.Probe(epoch, 1200)
	if !answers(later) || answers(later) || answers(first) {
		t.Error("a padded probe of the other path was answered twice, or never")
	}
	if !answers(held) || answers(held) {
		t.Error("an overtaken probe was answered twice, or never")
	}
	if answers(bare) {
		t.Error("a probe without a number was answered after one with a number")
	}
	old := one.Probe(epoch, 0)
	for range replayWindow {
		if !answers(two.Probe(epoch, 0)) {
			t.Fatal("a probe in order was not answered")
		}
	}
	if answers(old) {
		t.Error("a probe was answered that had been held back for long")
	}
	// What was not numbered by this end's counter changes nothing without its keys.
	forged := NewNumberedProber(k.Swap(), &numbers).Probe(epoch, 0)
	if answers(forged) || !answers(one.Probe(epoch, 0)) {
		t.Error("a reflected probe was answered, or spent a number")
	}
	if answered, _, invalid := r.Counts(); answered != 5+replayWindow || invalid == 0 {
		t.Errorf("%d answered, %d refused", answered, invalid)
	}
}

// An answer counts once, for the probe that it answers, on the path that it went out on.
func TestAnswerPlayedBack(t *testing.T) {
	k := testKeys()
	var numbers Numbers
	one, two, r := NewNumberedProber(k, &numbers), NewNumberedProber(k, &numbers), NewOrderedResponder(k.Swap(), 0, 0)
	a, ok := r.Respond(epoch, one.Probe(epoch, 0), netip.AddrPort{})
	if !ok {
		t.Fatal("no answer")
	}
	if _, ok := two.Handle(epoch, a); ok {
		t.Error("an answer counted on another path")
	}
	if _, ok := one.Handle(epoch, a); !ok {
		t.Error("an answer did not count")
	}
	if _, ok := one.Handle(epoch, a); ok {
		t.Error("an answer counted twice")
	}
	b, _ := r.Respond(epoch, one.Probe(epoch, 0), netip.AddrPort{})
	one.Expire(epoch.Add(forgetAfter), time.Second)
	if _, ok := one.Handle(epoch.Add(forgetAfter), b); ok {
		t.Error("an answer counted that had been held back for long")
	}
}

func TestReplays(t *testing.T) {
	var r replays
	for i, c := range []struct {
		n    uint64
		want bool
	}{
		{0, true},
		{5, true},
		{5, false},
		{4, true},
		{0, false},
		{4, false},
		{5 + replayWindow, true},
		{5, false},
		{6, true},
		{6, false},
		{1 << 40, true},
		{1 << 40, false},
		{1<<40 - replayWindow, false},
		{1<<40 - replayWindow + 1, true},
		{7, false},
		{1<<40 + 64, true},
		{1<<40 + 1, true},
	} {
		if got := r.first(c.n); got != c.want {
			t.Errorf("%d: number %d: %v", i, c.n, got)
		}
	}
}
