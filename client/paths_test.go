package client

import (
	"encoding/json"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/legs"
	"sallyway/tunnel"
)

// newPathLink is the way to a gateway on one relay that is wanted and not there.
func newPathLink(t *testing.T, h *harness) (*gatewayLink, identity.Node) {
	t.Helper()
	relay := identity.Node{Org: "acme", Kind: identity.Relay, ID: "r-1"}
	h.Sessions.cfg.Legs = legs.New(legs.Config{})
	g := h.newLink(&control.GatewayRef{Node: gateway1, Name: "office", Relays: []control.RelayRef{{Node: relay, Name: "near", TLSPort: 8443}}}, h.session)
	g.search.begin()
	return g, relay
}

// TestWhenToLookForPaths: the last rung's turn comes a while after the paths died, and until then, and for two seconds, one looks often.
func TestWhenToLookForPaths(t *testing.T) {
	h := newHarness(t)
	g, _ := newPathLink(t, h)
	up, _ := newMemLinks(t)
	alive := tunnel.PathInfo{Active: tunnel.PathStatus{Link: up, State: tunnel.Alive}}
	dead := tunnel.PathInfo{Active: tunnel.PathStatus{Link: up, State: tunnel.Dead}}
	g.noteDead(alive)
	if wait := g.lookAgain(alive); wait != 0 || g.lastDue(g.ref.Load().Relays[0]) {
		t.Errorf("while the path lives: %v", wait)
	}
	g.noteDead(dead)
	since := g.last.dead
	if wait := g.lookAgain(dead); wait <= 0 || wait > searchSoon {
		t.Errorf("just dead: look again in %v", wait)
	}
	if len(g.lastWanted(dead)) != 0 {
		t.Error("the last rung has its turn at once")
	}
	g.noteDead(dead)
	if g.last.dead != since {
		t.Error("a path that stays dead dies anew")
	}
	g.last.dead = time.Now().Add(-deadPatience)
	if len(g.lastWanted(dead)) != 1 {
		t.Error("the last rung has no turn")
	}
	g.last.trying = true
	if _, due := g.untilLast(dead); due || len(g.lastWanted(dead)) != 0 {
		t.Error("two attempts at once")
	}
	g.last.trying = false
	g.last.dead = time.Now().Add(-searchBriefly)
	if wait := g.lookAgain(dead); wait != 0 {
		t.Errorf("after a while without a path: look again in %v", wait)
	}
	suspect := dead
	suspect.Active.State = tunnel.Suspect
	g.noteDead(suspect)
	if g.last.dead.IsZero() {
		t.Error("a path that has not answered ends the outage")
	}
	g.noteDead(alive)
	if !g.last.dead.IsZero() {
		t.Error("a path that answers does not end it")
	}
}

func TestLossReasons(t *testing.T) {
	up, _ := newMemLinks(t)
	over := &memLink{done: make(chan struct{})}
	close(over.done)
	for _, c := range []struct {
		p    tunnel.PathStatus
		gone bool
		why  string
	}{
		{tunnel.PathStatus{Link: up, State: tunnel.Alive}, false, "probes are not answered"},
		{tunnel.PathStatus{Link: up, State: tunnel.Suspect}, false, "probes are not answered"},
		{tunnel.PathStatus{Link: up, State: tunnel.Dead}, true, "probes are not answered"},
		{tunnel.PathStatus{Link: over, State: tunnel.Alive}, true, "the leg on the relay is gone"},
	} {
		if isGone(c.p) != c.gone || lossReason(c.p) != c.why {
			t.Errorf("%s, done %v: gone %v, %q", c.p.State, closed(c.p.Link.Done()), isGone(c.p), lossReason(c.p))
		}
		if moveReasons[lossReason(c.p)] == "" {
			t.Errorf("no word for %q", lossReason(c.p))
		}
	}
	for _, why := range []string{reasonNewLeg, reasonPeerLeg} {
		if moveReasons[why] == "" {
			t.Errorf("no word for %q", why)
		}
	}
}

// TestNoticeOfALeg: what a gateway says of its legs is heeded after a moment, once, and is bounded.
func TestNoticeOfALeg(t *testing.T) {
	h := newHarness(t)
	g, relay := newPathLink(t, h)
	data, err := json.Marshal(relay)
	if err != nil {
		t.Fatal(err)
	}
	g.notice(tunnel.Notice{Type: NoticeLeg, Data: []byte(`"no node"`)})
	g.notice(tunnel.Notice{Type: NoticeLeg, Data: data})
	if len(g.wake) != 1 {
		t.Error("nobody is woken")
	}
	if g.heedsNewLeg(relay) {
		t.Error("heeded at once: this end may be about to have another leg, too")
	}
	g.newLegs[relay] = time.Now().Add(-followAfter)
	if !g.heedsNewLeg(relay) || g.heedsNewLeg(gateway1) {
		t.Error("not heeded, or of another relay")
	}
	g.sawNewLeg(relay)
	if g.heedsNewLeg(relay) {
		t.Error("heeded twice")
	}
	for i := range 2 * mostNewLegs {
		other := relay
		other.ID += string(rune('a' + i))
		data, _ := json.Marshal(other)
		g.notice(tunnel.Notice{Type: NoticeLeg, Data: data})
	}
	if n := len(g.newLegs); n != mostNewLegs {
		t.Errorf("%d relays are remembered", n)
	}
	g.set(nil, nil)
	if len(g.newLegs) != 0 {
		t.Error("they outlive the session")
	}
}
