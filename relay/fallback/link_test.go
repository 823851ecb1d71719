package fallback

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/relay/reverse"
)

// site is a world with a gateway, a client and a link between them.
func joined(t *testing.T) (w *world, g *aGateway, up *reverse.Link, down *gatewayLink) {
	t.Helper()
	w = newWorld(t, nil)
	n := w.acme.node(identity.Gateway, "g-1")
	g = w.gateway(n, w.acme.sshIdentity(n, nil, nil))
	up, err := w.dial(n, w.acme.leaf(w.acme.node(identity.Client, "c-1"), time.Now()))
	if err != nil {
		t.Fatal(err)
	}
	select {
	case down = <-g.links:
	case <-time.After(5 * time.Second):
		t.Fatal("the gateway has no link")
	}
	return w, g, up, down
}

// TestLinkCarriesDatagrams: what goes in on one end comes out at the other, whole and in order, over as many channels as there are.
func TestLinkCarriesDatagrams(t *testing.T) {
	w, g, up, down := joined(t)
	if want := w.acme.node(identity.Client, "c-1"); down.peer != want {
		t.Errorf("the gateway is told %v, want %v", down.peer, want)
	}
	waitFor(t, "all slots are there", func() bool { return g.Status().Connections == reverse.Slots })
	back := newReceiver()
	up.SetReceiver(back)
	for _, way := range []struct {
		name string
		from datagram.Link
		to   *receiver
	}{{"to the gateway", up, down.got}, {"to the client", down.Link, back}} {
		t.Run(way.name, func(t *testing.T) {
			sent := 0
			for sent < 5000 {
				// Runs of alike datagrams and a shorter one at the end, as QUIC sends them.
				size, n := 8+rand.N(1400), 1+rand.N(40)
				b := make([]byte, 0, size*n)
				for i := range n {
					d := make([]byte, size)
					if i == n-1 {
						d = d[:8+rand.N(size-7)]
					}
					binary.BigEndian.PutUint64(d, uint64(sent+i))
					b = append(b, d...)
				}
				way.from.Send(b, size, datagram.ECT0)
				sent += n
				waitFor(t, "the queue is not full", func() bool { return way.to.count() > sent-100 })
			}
			waitFor(t, "all has arrived", func() bool { return way.to.count() == sent })
			for i, d := range way.to.datagrams() {
				if got := binary.BigEndian.Uint64(d); got != uint64(i) {
					t.Fatalf("datagram %d is number %d", i, got)
				}
			}
		})
	}
	if st := up.Stats(); st.DroppedFull+st.DroppedSize != 0 || st.Sent < 5000 || st.Received < 5000 {
		t.Errorf("%+v", st)
	}
	v := w.Snapshot()
	if v.Gateways != 1 || v.Connections != reverse.Slots || v.Links != 1 || v.Bytes == 0 {
		t.Errorf("%+v", v)
	}
}

// TestLinkDropsAndCounts: a link whose peer does not read never blocks and never fails.
func TestLinkDropsAndCounts(t *testing.T) {
	_, _, up, down := joined(t)
	stuck := make(chan struct{})
	down.SetReceiver(blocked{stuck})
	b := make([]byte, 40*1400)
	begin := time.Now()
	for up.Stats().DroppedFull == 0 {
		up.Send(b, 1400, datagram.NotECT)
		if time.Since(begin) > 20*time.Second {
			t.Fatal("nothing was dropped")
		}
	}
	up.Send(make([]byte, reverse.MaxPayload+1), 0, datagram.NotECT)
	up.Send(nil, 0, datagram.NotECT)
	if st := up.Stats(); st.DroppedSize != 1 {
		t.Errorf("%+v", st)
	}
	close(stuck)
	got := newReceiver()
	down.SetReceiver(got)
	waitFor(t, "it goes on", func() bool {
		up.Send([]byte("after"), 0, datagram.NotECT)
		for _, d := range got.datagrams() {
			if string(d) == "after" {
				return true
			}
		}
		return false
	})
	select {
	case <-up.Done():
		t.Error("the link ended")
	default:
	}
}

type blocked struct{ until chan struct{} }

func (b blocked) Receive(batch datagram.Batch) {
	<-b.until
	batch.Release()
}

// TestLinkEndsOnBothSides: either end closes, the relay or the gateway goes away, and everybody learns it.
func TestLinkEndsOnBothSides(t *testing.T) {
	ends := func(t *testing.T, what string, l interface{ Done() <-chan struct{} }) {
		t.Helper()
		select {
		case <-l.Done():
		case <-time.After(5 * time.Second):
			t.Errorf("%s has not ended", what)
		}
	}
	for _, c := range []struct {
		name string
		end  func(w *world, g *aGateway, up *reverse.Link, down *gatewayLink)
	}{
		{"client", func(_ *world, _ *aGateway, up *reverse.Link, _ *gatewayLink) { up.Close() }},
		{"gateway's link", func(_ *world, _ *aGateway, _ *reverse.Link, down *gatewayLink) { down.Close() }},
		{"gateway", func(_ *world, g *aGateway, _ *reverse.Link, _ *gatewayLink) { g.stop() }},
		{"relay's connection", func(w *world, g *aGateway, _ *reverse.Link, _ *gatewayLink) { w.connections(g.node)[0].close() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, g, up, down := joined(t)
			c.end(w, g, up, down)
			ends(t, "the client's end", up)
			ends(t, "the gateway's end", down)
			if up.Err() == nil || down.Err() == nil {
				t.Error("no reason is given")
			}
			waitFor(t, "the relay has let it go", func() bool { return w.Links() == 0 })
		})
	}
}

// TestNewestConnectionWins: a newer connection of the same slot takes the place of the older one, which is closed; the other slots stay.
func TestNewestConnectionWins(t *testing.T) {
	w := newWorld(t, nil)
	n := w.acme.node(identity.Gateway, "g-1")
	id := w.acme.sshIdentity(n, nil, nil)
	first := w.gateway(n, id)
	old := w.connections(n)[0]
	first.stop() // its connection is closed; what follows opens two at once
	waitFor(t, "it is gone", func() bool { return len(w.connections(n)) == 0 })
	<-old.done

	a := w.gateway(n, id)
	old = w.connections(n)[0]
	b := w.tunnel(n, id)
	waitFor(t, "the newer one has the slot", func() bool {
		c := w.connections(n)
		return len(c) == 1 && c[0] != old
	})
	select {
	case <-old.done:
	case <-time.After(5 * time.Second):
		t.Fatal("the older connection is still open")
	}
	a.stop()
	waitFor(t, "the newer one serves", func() bool { return b.Status().Up && len(w.connections(n)) == 1 })
	if _, err := w.dial(n, w.acme.leaf(w.acme.node(identity.Client, "c-1"), time.Now())); err != nil {
		t.Fatal(err)
	}
	if l := <-b.links; l.peer.ID != "c-1" {
		t.Errorf("%v", l.peer)
	}
}

// TestManyClients: links of several clients do not meet.
func TestManyClients(t *testing.T) {
	w := newWorld(t, nil)
	n := w.acme.node(identity.Gateway, "g-1")
	g := w.gateway(n, w.acme.sshIdentity(n, nil, nil))
	for i := range 8 {
		kind := []identity.Kind{identity.Client, identity.Site, identity.Platform}[i%3]
		c := w.acme.node(kind, fmt.Sprintf("n-%d", i))
		up, err := w.dial(n, w.acme.leaf(c, time.Now()))
		if err != nil {
			t.Fatal(err)
		}
		down := <-g.links
		if down.peer != c {
			t.Errorf("the gateway is told %v, want %v", down.peer, c)
		}
		up.Send([]byte(c.ID), 0, datagram.NotECT)
		waitFor(t, "it has arrived", func() bool { return down.got.count() == 1 })
		if got := string(down.got.datagrams()[0]); got != c.ID {
			t.Errorf("%q came from %q", got, c.ID)
		}
	}
	if st := g.Status(); st.Links != 8 || st.TotalLinks != 8 {
		t.Errorf("%+v", st)
	}
}

// TestDrain: no new links, and who has one is told.
func TestDrain(t *testing.T) {
	w, g, up, _ := joined(t)
	w.Drain()
	select {
	case <-up.Draining():
	case <-time.After(5 * time.Second):
		t.Fatal("the client is not told")
	}
	waitFor(t, "the gateway is told", func() bool { return g.Status().Draining })
	if _, err := w.dial(g.node, w.acme.leaf(w.acme.node(identity.Client, "c-2"), time.Now())); err == nil {
		t.Error("a new link while draining")
	}
	select {
	case <-up.Done():
		t.Error("the link ended")
	default:
	}
}
