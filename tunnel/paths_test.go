package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"sallyway/tunnel/pathstate"
)

// pattern checks that a stream carries the endless pseudo-random pattern in order.
type pattern struct{ x uint32 }

func (p *pattern) next() byte {
	p.x = p.x*1664525 + 1013904223
	return byte(p.x >> 24)
}

// exchange keeps a flow busy both ways until stop is closed, and checks every byte that comes back. It returns the bytes echoed.
func exchange(c *Stream, stop <-chan struct{}, pause time.Duration) (n int, err error) {
	var wg sync.WaitGroup
	var werr error
	wg.Go(func() {
		defer c.CloseWrite()
		var p pattern
		b := make([]byte, 8<<10)
		for {
			select {
			case <-stop:
				return
			default:
			}
			for i := range b {
				b[i] = p.next()
			}
			if _, werr = c.Write(b); werr != nil {
				return
			}
			if pause > 0 {
				time.Sleep(pause) // paces, does not wait for anything
			}
		}
	})
	var p pattern
	b := make([]byte, 64<<10)
	for {
		m, rerr := c.Read(b)
		for _, got := range b[:m] {
			if want := p.next(); got != want {
				err = fmt.Errorf("byte %d differs", n)
			}
			n++
		}
		if rerr != nil {
			if rerr != io.EOF {
				err = errors.Join(err, rerr)
			}
			break
		}
	}
	wg.Wait()
	return n, errors.Join(err, werr)
}

func TestFailoverUnderLoad(t *testing.T) {
	w := newWorld(t, nil)
	port := tcpServer(t, echo)
	first, second := w.link("first"), w.link("second")
	s := w.dial(first, nil)
	if err := s.Failover("none yet"); !errors.Is(err, ErrNoStandby) {
		t.Fatalf("failover without standby: %v", err)
	}
	if err := s.Standby(timeout(t, 5*time.Second), second, LinkInfo{Name: "second"}); err != nil {
		t.Fatal(err)
	}
	c, err := s.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port)
	if err != nil {
		t.Fatal(err)
	}
	stop, got := make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := exchange(c, stop, 0)
		got <- err
	}()
	eventually(t, "traffic", func() bool { return c.Offsets().Read > 1<<20 })
	cut(first, true)
	before := c.Offsets().Read
	start := time.Now()
	if err := s.Failover("cut"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "traffic on the second path", func() bool { return c.Offsets().Read > before+2<<20 })
	t.Logf("2 MiB further after %v", time.Since(start))
	close(stop)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	info := s.Path()
	if info.Active.Info.Name != "second" || info.Standby.Link != nil || info.Moves != 1 || info.LastReason != "cut" {
		t.Fatalf("path %+v", info)
	}
	eventually(t, "gateway on the second path", func() bool { return w.server.Sessions()[0].Path.Name == "second" })
}

func TestHundredMoves(t *testing.T) {
	w := newWorld(t, nil)
	port := tcpServer(t, echo)
	a, b := w.link("a"), w.link("b")
	s := w.dial(a, nil)
	c, err := s.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port)
	if err != nil {
		t.Fatal(err)
	}
	stop, got := make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := exchange(c, stop, 200*time.Microsecond)
		got <- err
	}()
	next, other := b, a
	var worst time.Duration
	for i := range 100 {
		if err := s.Standby(timeout(t, 5*time.Second), next, LinkInfo{Name: fmt.Sprint("move ", i)}); err != nil {
			t.Fatalf("move %d: %v", i, err)
		}
		cut(other, true)
		before := c.Offsets().Read
		start := time.Now()
		if err := s.Failover(fmt.Sprint("move ", i)); err != nil {
			t.Fatalf("move %d: %v", i, err)
		}
		eventually(t, fmt.Sprint("traffic after move ", i), func() bool { return c.Offsets().Read > before+64<<10 })
		worst = max(worst, time.Since(start))
		cut(other, false)
		next, other = other, next
	}
	close(stop)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	t.Logf("longest until 64 KiB came back: %v", worst)
	if worst > 2*time.Second {
		t.Errorf("a move took %v", worst)
	}
	if m := s.Path().Moves; m != 100 {
		t.Fatalf("%d moves", m)
	}
}

func TestRepointAfterTotalLoss(t *testing.T) {
	for _, withStandby := range []bool{true, false} {
		t.Run(fmt.Sprint("standby ", withStandby), func(t *testing.T) {
			w := newWorld(t, nil)
			port := tcpServer(t, echo)
			a, b := w.link("a"), w.link("b")
			s := w.dial(a, func(c *DialConfig) { c.SingleLink = !withStandby })
			if !withStandby {
				eventually(t, "a validated spare", func() bool {
					s.mu.Lock()
					defer s.mu.Unlock()
					return s.slots[1].validated || s.slots[2].validated
				})
			}
			if withStandby {
				if err := s.Standby(timeout(t, 5*time.Second), b, LinkInfo{Name: "b"}); err != nil {
					t.Fatal(err)
				}
			}
			c, err := s.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port)
			if err != nil {
				t.Fatal(err)
			}
			stop, got := make(chan struct{}), make(chan error, 1)
			go func() {
				_, err := exchange(c, stop, 0)
				got <- err
			}()
			eventually(t, "traffic", func() bool { return c.Offsets().Read > 1<<20 })
			cut(a, true)
			cut(b, true)
			if withStandby {
				// The standby is dead as well, but nobody noticed.
				if err := s.Failover("a is gone"); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(1500 * time.Millisecond) // the outage itself
			third := w.link("third")
			before, start := c.Offsets().Read, time.Now()
			if err := s.Repoint(third, LinkInfo{Name: "third"}, "all paths lost"); err != nil {
				t.Fatal(err)
			}
			eventually(t, "traffic on the new path", func() bool { return c.Offsets().Read > before+1<<20 })
			t.Logf("1 MiB further after %v", time.Since(start))
			if d := time.Since(start); d > time.Second {
				t.Errorf("took %v", d)
			}
			// The session is whole again: a standby can be had and moved to.
			fourth := w.link("fourth")
			if err := s.Standby(timeout(t, 5*time.Second), fourth, LinkInfo{Name: "fourth"}); err != nil {
				t.Fatal(err)
			}
			cut(third, true)
			before = c.Offsets().Read
			if err := s.Failover("again"); err != nil {
				t.Fatal(err)
			}
			eventually(t, "traffic on the fourth path", func() bool { return c.Offsets().Read > before+1<<20 })
			close(stop)
			if err := <-got; err != nil {
				t.Fatal(err)
			}
		})
	}
}

// Both links lost at once, whatever else was set up before: the gateway must have a connection ID left for the third.
func TestBothLinksLost(t *testing.T) {
	w := newWorld(t, nil)
	port := tcpServer(t, echo)
	a, b, c := w.link("a"), w.link("b"), w.link("c")
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
	if err := s.Standby(timeout(t, 5*time.Second), b, LinkInfo{}); err != nil {
		t.Fatal(err)
	}
	cut(a, true)
	cut(b, true)
	before := flow.Offsets().Read
	if err := s.Repoint(c, LinkInfo{}, "both lost"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "traffic on the third", func() bool { return flow.Offsets().Read > before+1<<20 })
	close(stop)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
}

func TestPathStates(t *testing.T) {
	w := newWorld(t, nil)
	port := tcpServer(t, echo)
	events := make(chan PathEvent, 100)
	a, b := w.link("a"), w.link("b")
	s := w.dial(a, func(c *DialConfig) { c.OnPath = func(e PathEvent) { events <- e } })
	await := func(role PathRole, name string, state Liveness) time.Duration {
		t.Helper()
		start := time.Now()
		for {
			select {
			case e := <-events:
				if e.Role == role && e.Info.Name == name && e.State == state {
					return time.Since(start)
				}
			case <-time.After(5 * time.Second):
				t.Fatalf("no event %s %s %s", role, name, state)
			}
		}
	}
	await(RoleActive, "first", Alive)
	if err := s.Standby(timeout(t, 5*time.Second), b, LinkInfo{Name: "b"}); err != nil {
		t.Fatal(err)
	}
	await(RoleStandby, "b", Alive)
	c, err := s.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port)
	if err != nil {
		t.Fatal(err)
	}
	stop, got := make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := exchange(c, stop, time.Millisecond)
		got <- err
	}()
	eventually(t, "traffic", func() bool { return c.Offsets().Read > 64<<10 })
	eventually(t, "probes of a busy session", func() bool { return s.Path().Active.Probes.Answered >= 5 })
	cut(a, true)
	d := await(RoleActive, "first", Dead)
	t.Logf("dead after %v", d)
	if d > 350*time.Millisecond {
		t.Errorf("dead after %v", d)
	}
	await(RoleActive, "b", Alive) // the session has moved by itself
	if st := s.Path(); st.Active.State != Alive || st.Active.Probes.RTT == 0 || st.Active.Since.IsZero() || st.Causes[pathstate.CauseDead] != 1 ||
		st.LastReason != "left first: probes are not answered" || !st.Active.HeldUntil.IsZero() {
		t.Errorf("status %+v", st)
	}
	// A link that ends is dead at once.
	b.end()
	if d := await(RoleActive, "b", Dead); d > 100*time.Millisecond {
		t.Errorf("ended link dead after %v", d)
	}
	cut(a, false)
	if err := s.Repoint(a, LinkInfo{Name: "a again"}, "only this is left"); err != nil {
		t.Fatal(err)
	}
	await(RoleActive, "a again", Alive)
	close(stop)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
}

// Standbys that are given up, right after a move and while the active path is dead, leave a way to move.
func TestStandbysGivenUp(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	a, b, c, d := w.link("a"), w.link("b"), w.link("c"), w.link("d")
	s := w.dial(a, nil)
	came, finish := busyFlow(t, s)
	if err := s.Standby(timeout(t, 5*time.Second), b, LinkInfo{Name: "b"}); err != nil {
		t.Fatal(err)
	}
	if err := s.Failover("once"); err != nil {
		t.Fatal(err)
	}
	for _, l := range []*fakeLink{a, b, c} {
		cut(l, true)
	}
	for range 4 {
		ctx, cancel := context.WithTimeout(t.Context(), 150*time.Millisecond)
		if err := s.Standby(ctx, c, LinkInfo{Name: "c"}); err == nil {
			t.Fatal("a dead link answered")
		}
		cancel()
	}
	s.mu.Lock()
	usable := 0
	for i, sl := range s.slots {
		if i != s.active && sl.validated {
			usable++
		}
	}
	s.mu.Unlock()
	if usable == 0 {
		t.Error("no slot is left that can be switched to")
	}
	before, start := came(), time.Now()
	if err := s.Repoint(d, LinkInfo{Name: "d"}, "all lost"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "traffic on the fourth link", func() bool { return came() > before+64<<10 })
	t.Logf("64 KiB further after %v", time.Since(start))
	finish()
}

// A standby can be replaced again and again without a move between: former ones do not hold the gateway's connection IDs for good.
func TestStandbysReplaced(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	s := w.dial(w.link("a"), nil)
	came, finish := busyFlow(t, s)
	for i := range 5 {
		name := fmt.Sprint("standby ", i)
		l := w.link(name)
		var err error
		start := time.Now()
		for ready := false; !ready && time.Since(start) < 20*time.Second; {
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			err = s.Standby(ctx, l, LinkInfo{Name: name})
			ready = err == nil
			cancel()
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s after %v", name, time.Since(start))
	}
	before := came()
	if err := s.Failover("to the last one"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "traffic on the last one", func() bool { return came() > before+64<<10 })
	if in := s.Path(); in.Active.Info.Name != "standby 4" || in.Moves != 1 {
		t.Errorf("paths %+v", in)
	}
	finish()
}

func TestStandbyThatDoesNotAnswer(t *testing.T) {
	w := newWorld(t, nil)
	s := w.dial(w.link("a"), nil)
	good, bad := w.link("good"), w.link("bad")
	if err := s.Standby(timeout(t, 5*time.Second), good, LinkInfo{Name: "good"}); err != nil {
		t.Fatal(err)
	}
	cut(bad, true)
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if err := s.Standby(ctx, bad, LinkInfo{Name: "bad"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
	if in := s.Path(); in.Standby.Info.Name != "good" {
		t.Fatalf("standby is %q", in.Standby.Info.Name)
	}
	if err := s.Failover("anyway"); err != nil {
		t.Fatal(err)
	}
	small, _ := newLinkPair(t)
	small.maxSize = 1100
	if err := s.Standby(ctx, small, LinkInfo{}); err == nil {
		t.Fatal("a link too small for QUIC was taken")
	}
	s.Close("done")
	if err := s.Standby(timeout(t, time.Second), bad, LinkInfo{}); !errors.Is(err, ErrNoSession) {
		t.Fatalf("standby of a closed session: %v", err)
	}
	if err := s.Repoint(bad, LinkInfo{}, ""); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("repoint of a closed session: %v", err)
	}
}

// A path of 1280 bytes: IPv6, UDP and ChannelData leave 1228 for QUIC.
func TestSmallPath(t *testing.T) {
	w := newWorld(t, nil)
	port := tcpServer(t, echo)
	c1, g1 := newLinkPair(t)
	for _, l := range []*fakeLink{c1, g1} {
		l.maxSize = 1228
		l.mtu.Store(1228)
	}
	if _, err := w.merged.Add(g1, LinkInfo{}); err != nil {
		t.Fatal(err)
	}
	s := w.dial(c1, nil)
	c, err := s.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port)
	if err != nil {
		t.Fatal(err)
	}
	stop, got := make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := exchange(c, stop, 0)
		got <- err
	}()
	eventually(t, "traffic", func() bool { return c.Offsets().Read > 4<<20 })
	close(stop)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	if c1.dropped.Load() == 0 {
		t.Error("no probe for a larger MTU was sent")
	}
}
