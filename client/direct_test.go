package client

import (
	"net/netip"
	"testing"
	"time"

	"sallyway/direct"
	"sallyway/internal/control"
	"sallyway/stun"
	"sallyway/tunnel"
)

func TestDirectEnabled(t *testing.T) {
	for flag, want := range map[string]bool{"auto": true, "off": false} {
		if got, err := DirectEnabled(flag); got != want || err != nil {
			t.Errorf("%s: %v %v", flag, got, err)
		}
	}
	for _, flag := range []string{"on", "", "maybe"} {
		if _, err := DirectEnabled(flag); err == nil {
			t.Errorf("%q is taken", flag)
		}
	}
}

// TestDirectTriesBackOff: each failure doubles the pause up to ten minutes; a change of network begins anew.
func TestDirectTriesBackOff(t *testing.T) {
	d := &directRung{}
	d.begin()
	if wait := time.Until(d.next); wait <= 0 || wait > directAfter {
		t.Errorf("the first try in %v", wait)
	}
	want := directWait
	for range 8 {
		d.mu.Lock()
		d.failLocked("test")
		d.mu.Unlock()
		if wait := time.Until(d.next); (want - wait).Abs() > time.Second {
			t.Errorf("the next try in %v, want %v", wait, want)
		}
		want = min(2*want, directMost)
	}
	if want != directMost {
		t.Errorf("the pause grew to %v, want %v", want, directMost)
	}
	d.renew()
	d.renew()
	if time.Until(d.next) > 0 || d.wait != directWait {
		t.Errorf("after a change of network: next in %v, then %v", time.Until(d.next), d.wait)
	}
	d.mu.Lock()
	d.failLocked("test")
	d.mu.Unlock()
	if d.renew(); time.Until(d.next) < directWait/2 {
		t.Errorf("a second change of network within %v has it try at once", directRenew)
	}
}

// TestDirectIsOfferedAgain: a path that works is not given up at the first time that QUIC does not prove it.
func TestDirectIsOfferedAgain(t *testing.T) {
	d := &directRung{link: new(direct.Link), wait: directWait}
	d.mu.Lock()
	defer d.mu.Unlock()
	for n := 1; n < directProofs; n++ {
		d.unprovedLocked("test", true)
		if wait := time.Until(d.prove); d.link == nil || wait <= directProve/2 || wait > directProve {
			t.Fatalf("after %d failures: link %v, again in %v", n, d.link != nil, wait)
		}
	}
	if d.unprovedLocked("test", true); d.link != nil || !d.prove.IsZero() || d.proofs != 0 {
		t.Error("it is offered for ever")
	}
	d.link = new(direct.Link)
	if d.unprovedLocked("test", false); d.link != nil {
		t.Error("a path is kept that failed for good")
	}
}

// TestDirectIsLeftWhenWorse: the relay's path must have been much better for ten seconds, without a break.
func TestDirectIsLeftWhenWorse(t *testing.T) {
	const ms = time.Millisecond
	path := func(direct, relay time.Duration, lossDirect, lossRelay float64, state tunnel.Liveness) tunnel.PathInfo {
		return tunnel.PathInfo{
			Active:  tunnel.PathStatus{State: tunnel.Alive, Probes: stun.PathStats{RTT: direct, Loss: lossDirect}},
			Standby: tunnel.PathStatus{State: state, Probes: stun.PathStats{RTT: relay, Loss: lossRelay}},
		}
	}
	for _, tc := range []struct {
		name string
		path tunnel.PathInfo
		left bool
	}{
		{"better", path(10*ms, 30*ms, 0, 0, tunnel.Alive), false},
		{"as good", path(30*ms, 30*ms, 0, 0, tunnel.Alive), false},
		{"a little worse", path(50*ms, 30*ms, 0.02, 0, tunnel.Alive), false},
		{"longer", path(100*ms, 30*ms, 0, 0, tunnel.Alive), true},
		{"lossy", path(10*ms, 30*ms, 0.1, 0, tunnel.Alive), true},
		{"both lossy", path(10*ms, 30*ms, 0.1, 0.1, tunnel.Alive), false},
		{"longer, and the standby does not answer", path(100*ms, 30*ms, 0, 0, tunnel.Suspect), false},
		{"no standby", path(100*ms, 0, 0.5, 0, tunnel.Dead), false},
	} {
		d, now := &directRung{}, time.Now()
		left := false
		for at := time.Duration(0); at <= worseFor+time.Second; at += adjustInterval {
			left = d.worseLocked(tc.path, now.Add(at))
			if left && at <= worseFor {
				t.Errorf("%s: left after %v", tc.name, at)
			}
		}
		if left != tc.left {
			t.Errorf("%s: left %v", tc.name, left)
		}
		// One good moment begins anew.
		d = &directRung{}
		for at := time.Duration(0); at <= 3*worseFor; at += worseFor / 2 {
			if d.worseLocked(tc.path, now.Add(at)) && at < worseFor {
				t.Errorf("%s: left too early", tc.name)
			}
			d.worseLocked(path(10*ms, 30*ms, 0, 0, tunnel.Alive), now.Add(at+ms))
			if !d.worse.IsZero() {
				t.Errorf("%s: a good moment does not count", tc.name)
			}
		}
	}
}

// TestDirectNeverThroughTheTunnel: addresses that the node's own tunnel leads to, or may lead to, are no way to a gateway.
func TestDirectNeverThroughTheTunnel(t *testing.T) {
	s := NewSessions(SessionsConfig{})
	s.table.Store(newTable(anyDialling()))
	for a, want := range map[string]bool{
		"127.0.0.9": true, "100.113.0.1": true, "fd77::9": true, "198.51.100.7": false, "2001:db8::1": false,
	} {
		if got := s.LeadsInside(netip.MustParseAddr(a)); got != want {
			t.Errorf("%s: %v", a, got)
		}
	}
}

// TestDirectNeedsBoth: the organization and the host must allow it; an older platform's configuration, which says nothing, does not.
func TestDirectNeedsBoth(t *testing.T) {
	for _, tc := range []struct{ host, org, want bool }{{true, true, true}, {true, false, false}, {false, true, false}} {
		s := NewSessions(SessionsConfig{Direct: tc.host})
		d := anyDialling()
		d.Direct = control.Direct{On: tc.org}
		s.Update(d)
		if got := s.directAllowed(); got != tc.want {
			t.Errorf("host %v, organization %v: %v", tc.host, tc.org, got)
		}
	}
}
