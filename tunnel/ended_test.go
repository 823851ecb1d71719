package tunnel

import "testing"

// TestPathOfAnEndedSession: whoever looks at the paths when the session is over finds one that is done, and no panic.
func TestPathOfAnEndedSession(t *testing.T) {
	w := newWorld(t, nil)
	s := w.dial(w.link("fra-1 udp"), nil)
	if err := s.Close("test"); err != nil {
		t.Fatal(err)
	}
	p := s.Path()
	select {
	case <-p.Active.Link.Done():
	default:
		t.Error("the active link is not done")
	}
	if p.Active.State != Dead || p.Standby.Link != nil {
		t.Errorf("%+v", p)
	}
	p.Active.Link.Send([]byte{1}, 0, 0)
	p.Active.Link.SetReceiver(nil)
}
