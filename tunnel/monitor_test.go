package tunnel

import (
	"bytes"
	"testing"
	"time"

	"sallyway/stun"
)

// A probe that somebody recorded on one link and sends to the gateway again, there or on another link, is not answered, and proves nothing of
// that link. One that a client gets is not either.
func TestProbesPlayedBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	a, b := w.link("a"), w.link("b")
	recorded := make(chan []byte, 1)
	record := func(payload []byte) {
		if stun.IsProbe(payload) && stun.IsRequest(payload) {
			select {
			case recorded <- bytes.Clone(payload):
			default:
			}
		}
	}
	a.onSend.Store(&record)
	s := w.dial(a, nil)
	_, finish := busyFlow(t, s)
	defer finish()
	var probe []byte
	select {
	case probe = <-recorded:
	case <-time.After(5 * time.Second):
		t.Fatal("no probe was sent")
	}
	eventually(t, "answers", func() bool { return s.Path().Active.Probes.Answered > 1 })
	before := b.peer.sent.Load()
	probes := w.merged.Stats().Probes
	const times = 20
	for range times {
		b.Send(probe, 0, 0)
	}
	eventually(t, "probes at the gateway", func() bool {
		return b.pending.Load() == 0 && b.peer.pending.Load() == 0 && w.merged.Stats().Probes >= probes+times
	})
	if n := b.peer.sent.Load() - before; n != 0 {
		t.Errorf("%d answers on the other link", n)
	}
	w.merged.adding.Lock()
	for p := range w.merged.links {
		if p.info.Name == "b" && (p.responder.Load() != nil || p.proved.Load() != 0) {
			t.Error("what was played back proves that the session is behind the other link")
		}
	}
	w.merged.adding.Unlock()
	// Its own probes are numbered on: they are answered.
	answered := s.Path().Active.Probes.Answered
	eventually(t, "more answers", func() bool { return s.Path().Active.Probes.Answered > answered+2 })
	a.peer.Send(probe, 0, 0) // to the client, under the wrong direction's key
	eventually(t, "still more", func() bool { return s.Path().Active.Probes.Answered > answered+4 })
	if st := s.Path(); st.Active.State != Alive || st.Moves != 0 {
		t.Errorf("paths %+v", st)
	}
}
