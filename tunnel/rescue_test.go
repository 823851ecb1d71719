package tunnel

import (
	"context"
	"fmt"
	mrand "math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"sallyway/internal/identity"
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
	came = func() uint64 { return c.Offsets().Read }
	eventually(t, "traffic", func() bool { return came() > 256<<10 })
	return came, func() {
		t.Helper()
		close(stop)
		if err := <-got; err != nil {
			t.Fatal(err)
		}
	}
}

// allLost makes a session with a busy flow whose three links, each validated, have just been cut, and a fourth one that works.
func (w *world) allLost(t *testing.T) (s *Session, d *fakeLink, came func() uint64, finish func()) {
	t.Helper()
	a, b, c := w.link("a"), w.link("b"), w.link("c")
	s = w.dial(a, nil)
	came, finish = busyFlow(t, s)
	for _, l := range []*fakeLink{b, c} {
		if err := s.Standby(timeout(t, 5*time.Second), l, LinkInfo{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range []*fakeLink{a, b, c} {
		cut(l, true)
	}
	return s, w.link("d"), came, finish
}

// A gateway without an unused connection ID can not follow to another path, and the client replaces only those whose retirement it hears
// of, which the gateway sends on the path that is dead: two paths that were validated beside the active one hold the last two.
func TestRescueWithoutConnectionID(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	s, d, came, finish := w.allLost(t)
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

// All paths are silent for so long that QUIC at the gateway would send again only seconds later, with as much under way as its window holds, and it
// has no connection ID for the path that comes.
func TestRescueAfterLongSilence(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	s, d, came, finish := w.allLost(t)
	const outage = 6 * time.Second
	<-time.After(outage) // the silence itself
	before, start := came(), time.Now()
	if err := s.Repoint(d, LinkInfo{Name: "d"}, "all lost"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "traffic on the fourth link", func() bool { return came() > before+256<<10 })
	took := time.Since(start)
	t.Logf("256 KiB further after %v", took)
	if took > outage/2 { // it was the whole of QUIC's own time once more
		t.Errorf("it took %v", took)
	}
	if in := w.server.Sessions()[0]; in.Rescued != 1 || in.Path.Name != "d" {
		t.Errorf("the gateway says %+v", in)
	}
	finish()
}

// Moves in quick succession, most of them before the exchange of connection IDs after the one before is over, from links that die. The
// sessions are all of one node.
func TestQuickMoves(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	var all sync.WaitGroup
	for seed := range uint64(4) {
		s, links := w.crowd(6)
		came, finish := busyFlow(t, s)
		defer finish()
		all.Go(func() { quickMoves(t, s, links, came, mrand.New(mrand.NewPCG(1, seed))) })
	}
	all.Wait()
	t.Logf("rescued %d times", w.merged.Stats().Rescued)
}

// crowd makes a session on the first of n links.
func (w *world) crowd(n int) (*Session, []*fakeLink) {
	links := make([]*fakeLink, n)
	for i := range links {
		links[i] = w.link(fmt.Sprint(i))
	}
	return w.dial(links[0], nil), links
}

func quickMoves(t *testing.T, s *Session, links []*fakeLink, came func() uint64, rnd *mrand.Rand) {
	at := 0
	var worst time.Duration
	for i := range 200 {
		to := (at + 1 + rnd.IntN(len(links)-1)) % len(links)
		reason := fmt.Sprint("move ", i)
		cut(links[to], false)
		ready := false
		if rnd.IntN(3) == 0 {
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			ready = s.Standby(ctx, links[to], LinkInfo{Name: fmt.Sprint(to)}) == nil
			cancel()
		}
		for j, l := range links {
			cut(l, j != to && (j == at || rnd.IntN(3) == 0))
		}
		if ready && s.Failover(reason) == nil {
			at = to
		}
		if at != to {
			if err := s.Repoint(links[to], LinkInfo{Name: fmt.Sprint(to)}, reason); err != nil {
				t.Errorf("%s: %v", reason, err)
				return
			}
			at = to
		}
		before, start := came(), time.Now()
		patience, enough := time.Duration(rnd.IntN(8))*time.Millisecond, uint64(1)
		if i%50 == 49 {
			patience, enough = 8*time.Second, 64<<10
		}
		for time.Since(start) < patience && came() < before+enough {
			time.Sleep(time.Millisecond) // a poll, not a wait
		}
		if i%50 == 49 {
			worst = max(worst, time.Since(start))
		}
	}
	t.Logf("longest until 64 KiB came back: %v", worst)
	if worst > 5*time.Second {
		t.Errorf("a move took %v", worst)
	}
}

// Only a link that brings the session's own probes and leads to its peer is used. The gateway is told of links that packets come over, while
// the active one is silent.
func TestRescueOnlyToThePeersLink(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	s, links := w.crowd(1)
	_, other := w.crowd(1)
	var sess, second *peerSession
	eventually(t, "sessions", func() bool {
		l := w.server.list()
		if len(l) == 2 {
			sess, second = l[0], l[1]
		}
		return len(l) == 2
	})
	cut(links[0], true)
	cut(other[0], true)
	add := func(peer identity.Node, of *peerSession, provedAgo time.Duration) (*port, *fakeLink) {
		_, g := newLinkPair(t)
		at, err := w.merged.Add(g, LinkInfo{Name: "new", Peer: peer})
		if err != nil {
			t.Fatal(err)
		}
		p := w.merged.port(net.UDPAddrFromAddrPort(at))
		if of != nil {
			p.prove(of)
			p.proved.Add(-int64(provedAgo))
		}
		return p, g
	}
	stranger := w.client
	stranger.ID = "c-two"
	var wrong []*port
	for _, l := range []struct {
		peer identity.Node
		of   *peerSession
		ago  time.Duration
	}{
		{stranger, sess, 0},             // leads to another node
		{identity.Node{}, sess, 0},      // leads to anybody
		{w.client, nil, 0},              // no probe came
		{w.client, sess, rescueProof},   // none for long
		{w.client, second, rescueProof}, // those of another session
	} {
		p, _ := add(l.peer, l.of, l.ago)
		wrong = append(wrong, p)
	}
	touch := func(ports ...*port) {
		for _, p := range ports {
			p.main.last.Store(int64(sinceEpoch()))
		}
	}
	for start := time.Now(); time.Since(start) < 2*rescueAfter+2*rescueEvery; time.Sleep(10 * time.Millisecond) { // the silence itself
		touch(wrong...)
	}
	if n := w.merged.Stats().Rescued; n != 0 {
		t.Fatalf("%d rescues over links that are not the session's", n)
	}
	right, g := add(w.client, sess, 0)
	eventually(t, "the rescue", func() bool {
		touch(append(wrong, right)...)
		return sess.rescued.Load() == 1
	})
	if second.rescued.Load() != 0 || w.server.Sessions()[0].Path.Name != "new" {
		t.Errorf("the gateway says %+v", w.server.Sessions())
	}
	// The address is given back when its own link brings packets again, or the other one ends.
	g.end()
	cut(links[0], false)
	eventually(t, "the address is back", func() bool { return w.server.Sessions()[0].Path.Name == "0" })
	c, err := s.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", tcpServer(t, echo))
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
}

func TestRescueIsDue(t *testing.T) {
	const ms = time.Millisecond
	p, q := &port{}, &port{}
	type look struct {
		over             *port
		came, heard, now time.Duration
		want             bool
	}
	for name, looks := range map[string][]look{
		"packets come, the active path is silent": {
			{p, 100 * ms, 50 * ms, 250 * ms, false}, {p, 480 * ms, 50 * ms, 500 * ms, false}, {p, 700 * ms, 50 * ms, 750 * ms, true},
		},
		"a standby is validated while the session is idle": {
			{p, 10100 * ms, 50 * ms, 10250 * ms, false}, {p, 10300 * ms, 50 * ms, 10500 * ms, false}, {p, 10300 * ms, 50 * ms, 12000 * ms, false},
		},
		"and once more, after a packet on the active path": {
			{p, 10100 * ms, 50 * ms, 10250 * ms, false}, {p, 20100 * ms, 15000 * ms, 20250 * ms, false}, {p, 20300 * ms, 15000 * ms, 21000 * ms, false},
		},
		"both are heard": {
			{p, 200 * ms, 210 * ms, 250 * ms, false}, {p, 700 * ms, 600 * ms, 750 * ms, false}, {p, 1200 * ms, 1100 * ms, 1250 * ms, false},
		},
		"packets come over one, then over another": {
			{p, 200 * ms, 0, 250 * ms, false}, {q, 740 * ms, 0, 750 * ms, false}, {q, 1200 * ms, 0, 1250 * ms, true},
		},
	} {
		var k stuck
		for i, l := range looks {
			if got := k.due(l.over, l.came, l.heard, l.now, rescueAfter); got != l.want {
				t.Errorf("%s, look %d: %v", name, i, got)
			}
		}
	}
}
