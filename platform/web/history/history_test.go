package history

import (
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/presence"
	"sallyway/platform/store"
)

// world is a recorder with a gateway, a client and two relays, and a clock of its own.
type world struct {
	t     *testing.T
	rec   *Recorder
	board *presence.Board
	now   time.Time
}

func newWorld(t *testing.T) *world {
	t.Helper()
	ctx := t.Context()
	st, err := store.OpenSQLite(ctx, filepath.Join(t.TempDir(), "platform.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.Close() })
	w := &world{t: t, board: new(presence.Board), now: time.Date(2027, 1, 2, 3, 0, 0, 0, time.UTC)}
	err = st.Update(ctx, func(tx store.Tx) error {
		if err := tx.InsertOrg(ctx, &store.Org{
			Name: "acme", Range4: netip.MustParsePrefix("100.112.0.0/12"), Range6: netip.MustParsePrefix("fd00:1::/48"), Created: w.now,
		}); err != nil {
			return err
		}
		for i, n := range []store.Node{
			{ID: "r-1", Kind: identity.Relay, Name: "fra-1"},
			{ID: "r-2", Kind: identity.Relay, Name: "ams-2"},
			{ID: "g-1", Kind: identity.Gateway, Name: "office"},
			{ID: "c-1", Kind: identity.Client, Name: "laptop"},
		} {
			n.Org, n.Status, n.Created, n.Enrolled, n.Address = "acme", store.Active, w.now, w.now, uint32(i+16)
			if err := tx.InsertNode(ctx, &n); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	w.rec = New(st, w.board, func() time.Time { return w.now })
	return w
}

// beat has the gateway tell of one session, and takes a sample.
func (w *world) beat(relay string, sent, recv uint64) {
	w.t.Helper()
	w.board.Put("r-1", presence.Beat{At: w.now, Heartbeat: control.Heartbeat{State: "ready", Load: map[string]float64{"bytes_per_second": 500, "allocations": 2}}})
	w.board.Put("g-1", presence.Beat{At: w.now, Heartbeat: control.Heartbeat{State: "ready", Sessions: []control.SessionReport{{
		Peer: identity.Node{Org: "acme", Kind: identity.Client, ID: "c-1"}, Relay: relay, Since: time.Date(2027, 1, 2, 2, 0, 0, 0, time.UTC), SentBytes: sent, RecvBytes: recv,
	}}}})
	w.sample()
}

func (w *world) sample() {
	w.t.Helper()
	if err := w.rec.Sample(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) last(points []Point) Point {
	w.t.Helper()
	for i := len(points) - 1; i >= 0; i-- {
		if points[i].Known {
			return points[i]
		}
	}
	w.t.Fatal("nothing is known")
	return Point{}
}

func TestThroughputAndMoves(t *testing.T) {
	w := newWorld(t)
	// What was carried before the first heartbeat is of no known time: it makes no peak.
	w.beat("fra-1 udp", 1_000_000_000, 5_000_000)
	if p := w.last(w.rec.Org("acme", Hour, w.now)); p.Down != 0 || p.Up != 0 || p.Sessions != 1 {
		t.Errorf("after the first heartbeat: %+v", p)
	}
	w.now = w.now.Add(10 * time.Second)
	w.beat("fra-1 udp", 1_000_020_000, 5_001_000)
	if p := w.last(w.rec.Org("acme", Hour, w.now)); p.Down != 2000 || p.Up != 100 {
		t.Errorf("20 kB down and 1 kB up in 10 s: %+v", p)
	}
	if p := w.last(w.rec.Node("r-1", Hour, w.now)); p.Down != 500 || p.Sessions != 2 {
		t.Errorf("the relay: %+v", p)
	}
	if p := w.last(w.rec.Org("acme", Day, w.now)); p.Down <= 0 || p.Down > 2000 {
		t.Errorf("the day's mean: %+v", p)
	}
	if es := w.rec.Events("acme", Hour, w.now); len(es) != 0 {
		t.Errorf("nothing moved, and yet: %+v", es)
	}
	w.now = w.now.Add(10 * time.Second)
	w.beat("ams-2 udp", 1_000_030_000, 5_001_000)
	es := w.rec.Events("acme", Hour, w.now)
	if len(es) != 1 || es[0].Kind != Moved || es[0].Peer != "laptop" || es[0].Node != "office" || es[0].From != "fra-1 udp" || es[0].To != "ams-2 udp" {
		t.Errorf("after a move: %+v", es)
	}
	// A counter that starts again is a new session's, not a negative flow.
	w.now = w.now.Add(10 * time.Second)
	w.beat("ams-2 udp", 10, 10)
	if p := w.last(w.rec.Org("acme", Hour, w.now)); p.Down != 0 || p.Up != 0 {
		t.Errorf("after counters that went back: %+v", p)
	}
}

func TestSilenceIsAnEventAndNoThroughput(t *testing.T) {
	w := newWorld(t)
	w.beat("fra-1 udp", 0, 0)
	w.now = w.now.Add(10 * time.Second)
	w.beat("fra-1 udp", 1_000_000, 0)
	w.now = w.now.Add(presence.Timeout)
	w.sample()
	points := w.rec.Org("acme", Hour, w.now)
	if p := points[len(points)-1]; p.Known {
		t.Errorf("a gateway that is silent still has %+v", p)
	}
	states := map[string]string{}
	for _, e := range w.rec.Events("acme", Hour, w.now) {
		states[e.Node] = e.From + ">" + e.To
	}
	for _, name := range []string{"fra-1", "office"} {
		if states[name] != "healthy>unreachable" {
			t.Errorf("%s: %q", name, states[name])
		}
	}
	if es := w.rec.Events("acme", Hour, w.now.Add(2*time.Hour)); len(es) != 0 {
		t.Errorf("of the last hour: %+v", es)
	}
	if points := w.rec.Org("acme", Hour, w.now.Add(2*time.Hour)); len(points) != fineLength || points[0].Known {
		t.Error("what is older than an hour is still there")
	}
}

func TestAnotherOrganizationsSessionsAreNotCounted(t *testing.T) {
	w := newWorld(t)
	for i := range 2 {
		w.now = w.now.Add(10 * time.Second)
		w.board.Put("g-1", presence.Beat{At: w.now, Heartbeat: control.Heartbeat{State: "ready", Sessions: []control.SessionReport{{
			Peer: identity.Node{Org: "other", Kind: identity.Client, ID: "c-9"}, SentBytes: uint64(i) * 1e9,
		}}}})
		w.sample()
	}
	if p := w.last(w.rec.Org("acme", Hour, w.now)); p.Down != 0 || p.Sessions != 0 {
		t.Errorf("%+v", p)
	}
}
