package tunnel

import (
	"fmt"
	"testing"
	"time"
)

// busy keeps an echo going on a session until the test ends, and checks every byte of it.
func busy(t *testing.T, s *Session) *Stream {
	t.Helper()
	c, err := s.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", tcpServer(t, echo))
	if err != nil {
		t.Fatal(err)
	}
	stop, got := make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := exchange(c, stop, 200*time.Microsecond)
		got <- err
	}()
	t.Cleanup(func() {
		close(stop)
		if err := <-got; err != nil {
			t.Error(err)
		}
	})
	flows(t, c)
	return c
}

// flows waits until more comes back.
func flows(t *testing.T, c *Stream) {
	t.Helper()
	before := c.Offsets().Read
	eventually(t, "traffic", func() bool { return c.Offsets().Read > before+64<<10 })
}

func TestRenewClient(t *testing.T) {
	for _, single := range []bool{false, true} {
		t.Run(fmt.Sprint("single link ", single), func(t *testing.T) {
			w := newWorld(t, nil)
			s := w.dial(w.link("first"), func(c *DialConfig) { c.SingleLink = single })
			if !single {
				if err := s.Standby(timeout(t, 5*time.Second), w.link("second"), LinkInfo{Name: "second"}); err != nil {
					t.Fatal(err)
				}
			}
			c := busy(t, s)
			for range 10 {
				// The spare is validated again in between, or this could not be done twice.
				eventually(t, "renewal", func() bool { return s.renew(time.Now()) })
				flows(t, c)
			}
			p := s.Path()
			if p.Moves != 0 || p.Active.Info.Name != "first" || p.Active.State != Alive || (p.Standby.Link == nil) != single {
				t.Errorf("path %+v", p)
			}
		})
	}
}

// renewGateway has the gateway renew its window and waits until it did.
func renewGateway(t *testing.T, w *world) {
	t.Helper()
	before := w.server.Sessions()[0]
	eventually(t, "renewal", func() bool { return w.server.renew(w.server.list()[0]) })
	eventually(t, "new address", func() bool { return w.server.Sessions()[0].Virtual != before.Virtual })
	if after := w.server.Sessions()[0]; after.Path != before.Path {
		t.Fatalf("path was %v and is %v", before.Path, after.Path)
	}
}

func TestRenewGateway(t *testing.T) {
	w := newWorld(t, nil)
	s := w.dial(w.link("first"), nil)
	c := busy(t, s)
	ports := len(*w.server.merged.ports.Load())
	for range 10 {
		renewGateway(t, w)
		flows(t, c)
	}
	if got := len(*w.server.merged.ports.Load()); got != ports+1 {
		t.Errorf("%d addresses, %d before", got, ports)
	}
	if n := w.server.merged.Stats().Links; n != 1 {
		t.Errorf("%d links", n)
	}
}

// TestRenewAndMove holds that no renewal takes from a session what a failover needs.
func TestRenewAndMove(t *testing.T) {
	w := newWorld(t, nil)
	active, other := w.link("a"), w.link("b")
	s := w.dial(active, nil)
	c := busy(t, s)
	for i := range 20 {
		name := fmt.Sprint("move ", i)
		if err := s.Standby(timeout(t, 5*time.Second), other, LinkInfo{Name: name}); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if i%2 == 0 {
			renewGateway(t, w)
		}
		if i%4 >= 2 {
			s.mu.Lock()
			s.lastMove = time.Time{} // or it would have to be 10 s ago
			s.mu.Unlock()
			eventually(t, "renewal", func() bool { return s.renew(time.Now()) })
		}
		flows(t, c)
		cut(active, true)
		start := time.Now()
		if err := s.Failover(name); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		flows(t, c)
		t.Logf("%s: %v", name, time.Since(start))
		cut(active, false)
		active, other = other, active
	}
}
