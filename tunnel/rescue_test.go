package tunnel

import (
	"testing"
	"time"
)

// A gateway without an unused connection ID can not follow to another path, and the client replaces only those whose retirement it hears
// of, which the gateway sends on the path that is dead: two paths that were validated beside the active one hold the last two.
func TestRescueWithoutConnectionID(t *testing.T) {
	w := newWorld(t, nil)
	port := tcpServer(t, echo)
	a, b, c, d := w.link("a"), w.link("b"), w.link("c"), w.link("d")
	s := w.dial(a, nil)
	flow, err := s.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port)
	if err != nil {
		t.Fatal(err)
	}
	stop, got := make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := exchange(flow, stop, 100*time.Microsecond)
		got <- err
	}()
	eventually(t, "traffic", func() bool { return flow.Offsets().Read > 1<<20 })
	for _, l := range []*fakeLink{b, c} {
		if err := s.Standby(timeout(t, 5*time.Second), l, LinkInfo{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range []*fakeLink{a, b, c} {
		cut(l, true)
	}
	before, start := flow.Offsets().Read, time.Now()
	if err := s.Repoint(d, LinkInfo{Name: "d"}, "all lost"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "traffic on the fourth link", func() bool { return flow.Offsets().Read > before+1<<20 })
	t.Logf("1 MiB further after %v", time.Since(start))
	close(stop)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
}
