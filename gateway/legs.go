package gateway

import (
	"encoding/json"
	"time"

	"sallyway/client"
	"sallyway/internal/identity"
	"sallyway/internal/legs"
	"sallyway/relay/leg"
	"sallyway/tunnel"
)

// flowMemory is how long before the loss of all legs bytes of flows may have moved that are taken to wait since.
const flowMemory = 3 * time.Second

// legUp tells the platform of a leg, and the peers: those whose channels lead to the leg before, if there was one, move to the new one while the
// former one still carries.
func (d *gatewayDaemon) legUp(relay identity.Node, _ *leg.Leg) {
	d.agent.HeartbeatNow()
	data, err := json.Marshal(relay)
	if err != nil {
		d.sh.Log.Error("peers not told of a leg", "relay", relay, "err", err)
		return
	}
	d.srv.Notify(nil, tunnel.Notice{Type: client.NoticeLeg, Data: data})
}

// flowWatch finds out whether flows wait for legs.
type flowWatch struct {
	moved   uint64    // bytes of flows
	movedAt time.Time // when they were last seen to change
	lost    time.Time // since when no leg works
}

// note takes the legs' state and the bytes that flows moved so far, and reports whether there are flows that wait for a leg.
func (w *flowWatch) note(now time.Time, legs []legs.Status, bytes uint64) bool {
	if bytes != w.moved {
		w.moved, w.movedAt = bytes, now
	}
	for _, l := range legs {
		if l.Up && !l.Doubtful {
			w.lost = time.Time{}
			return false
		}
	}
	if w.lost.IsZero() {
		w.lost = now
	}
	return !w.movedAt.IsZero() && w.movedAt.Add(flowMemory).After(w.lost)
}

// watchFlows has lost legs dialled soon while flows wait for them.
func (d *gatewayDaemon) watchFlows(w *flowWatch) {
	var bytes uint64
	for _, s := range d.srv.Sessions() {
		bytes += s.Sent + s.Received
	}
	all := d.legs.Status()
	if w.note(time.Now(), all, bytes) {
		relays := make([]identity.Node, len(all))
		for i, l := range all {
			relays[i] = l.Relay
		}
		d.legs.Waiting(relays...)
	}
}
