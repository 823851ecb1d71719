package tunnel

import (
	"context"
	"fmt"
	mrand "math/rand/v2"
	"testing"
	"time"
)

// busyFlow keeps a flow of s busy both ways, checks every byte, and returns how many have come back. What it starts ends with finish.
func busyFlow(t *testing.T, s *Session) (came func() uint64, finish func()) {
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
	came = func() uint64 { return uint64(c.Offsets().Read) }
	eventually(t, "traffic", func() bool { return came() > 256<<10 })
	return came, func() {
		t.Helper()
		close(stop)
		if err := <-got; err != nil {
			t.Fatal(err)
		}
	}
}

// A gateway without an unused connection ID can not follow to another path, and the client replaces only those whose retirement it hears
// of, which the gateway sends on the path that is dead: two paths that were validated beside the active one hold the last two.
func TestRescueWithoutConnectionID(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	a, b, c, d := w.link("a"), w.link("b"), w.link("c"), w.link("d")
	s := w.dial(a, nil)
	came, finish := busyFlow(t, s)
	for _, l := range []*fakeLink{b, c} {
		if err := s.Standby(timeout(t, 5*time.Second), l, LinkInfo{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range []*fakeLink{a, b, c} {
		cut(l, true)
	}
	before, start := came(), time.Now()
	if err := s.Repoint(d, LinkInfo{Name: "d"}, "all lost"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "traffic on the fourth link", func() bool { return came() > before+256<<10 })
	t.Logf("256 KiB further after %v", time.Since(start))
	if in := w.server.Sessions()[0]; in.Rescued != 1 || in.Path.Name != "d" || w.merged.Stats().Rescued != 1 {
		t.Errorf("the gateway says %+v", in)
	}
	// The gateway gets connection IDs again: it follows by itself, and gives the address back.
	lent := func() int {
		w.merged.adding.Lock()
		defer w.merged.adding.Unlock()
		return len(w.merged.lent)
	}
	eventually(t, "the gateway follows", func() bool { return lent() == 0 })
	t.Logf("followed after %v", time.Since(start))
	e := w.link("e")
	if err := s.Standby(timeout(t, 5*time.Second), e, LinkInfo{}); err != nil {
		t.Fatal(err)
	}
	cut(d, true)
	before = came()
	if err := s.Failover("again"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "traffic on the fifth link", func() bool { return came() > before+256<<10 })
	finish()
	if n := w.server.Sessions()[0].Rescued; n != 1 {
		t.Errorf("rescued %d times", n)
	}
}

// Moves in quick succession, most of them before the exchange of connection IDs after the one before is over, from links that die.
func TestQuickMoves(t *testing.T) {
	t.Parallel()
	rnd := mrand.New(mrand.NewPCG(1, 2))
	w := newWorld(t, nil)
	links := make([]*fakeLink, 6)
	for i := range links {
		links[i] = w.link(fmt.Sprint(i))
	}
	s := w.dial(links[0], nil)
	came, finish := busyFlow(t, s)
	at := 0
	var worst time.Duration
	for i := range 200 {
		to := (at + 1 + rnd.IntN(len(links)-1)) % len(links)
		for j, l := range links {
			cut(l, j != to && (j == at || rnd.IntN(3) == 0))
		}
		reason := fmt.Sprint("move ", i)
		if rnd.IntN(3) == 0 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rnd.IntN(20))*time.Millisecond)
			err := s.Standby(ctx, links[to], LinkInfo{Name: fmt.Sprint(to)})
			cancel()
			if err == nil {
				err = s.Failover(reason)
			}
			if err == nil {
				at = to
			}
		}
		if at != to {
			if err := s.Repoint(links[to], LinkInfo{Name: fmt.Sprint(to)}, reason); err != nil {
				t.Fatal(err)
			}
			at = to
		}
		before, start := came(), time.Now()
		if i%20 != 19 {
			for limit := start.Add(time.Duration(rnd.IntN(8)) * time.Millisecond); time.Now().Before(limit) && came() == before; {
				time.Sleep(time.Millisecond) // a poll, not a wait
			}
			continue
		}
		eventually(t, fmt.Sprint("traffic after ", reason), func() bool { return came() > before+64<<10 })
		worst = max(worst, time.Since(start))
	}
	finish()
	t.Logf("longest until 64 KiB came back: %v, rescued %d times", worst, w.merged.Stats().Rescued)
	if worst > 5*time.Second {
		t.Errorf("a move took %v", worst)
	}
}
