package legs

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/relay/leg"
)

// pair is a gateway's keeper behind a firewall and a client's keeper beside the relay, with datagrams that go from the client to the gateway
// at a pace of 20 ms on the newest channel between them.
type pair struct {
	relay   *relayServer
	fw      *firewall
	gateway *Keeper
	up      chan *leg.Leg // of the gateway
	j       *journal
}

func startPair(t *testing.T) *pair {
	p := &pair{relay: startRelay(t, newPKI(t, relayNode)), up: make(chan *leg.Leg, 16)}
	p.fw = newFirewall(t, p.relay.addr)
	p.fw.udpOpen.Store(true)
	j, log := newJournal()
	p.j = j
	p.gateway = New(Config{
		Logger: log, OnRendezvous: func(_, _ identity.Node, ch *leg.Channel) { ch.SetReceiver(receiver(func([]byte) {})) },
		OnUp: func(_ identity.Node, l *leg.Leg) { p.up <- l },
	})
	p.gateway.upgrade = 500 * time.Millisecond
	p.gateway.Want("serving", []control.RelayRef{p.relay.pki.ref(p.fw.addr, gatewayNode)})
	client := New(Config{})
	client.Want("gateway g-1", []control.RelayRef{p.relay.pki.ref(p.relay.addr, clientNode)})
	run(t, p.gateway)
	run(t, client)
	get(t, p.gateway, 10*time.Second)
	lc := get(t, client, 10*time.Second)
	ctx, cancel := context.WithCancel(context.Background())
	var sending sync.WaitGroup
	sending.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		var ch *leg.Channel
		for n := 0; ; n++ {
			if n%10 == 0 { // the gateway may have another leg by now
				cctx, cancel := context.WithTimeout(ctx, time.Second)
				if newest, err := lc.Connect(cctx, gatewayNode); err == nil {
					ch = newest
				}
				cancel()
			}
			if ch != nil {
				ch.Send([]byte("data"), 0, datagram.NotECT)
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	})
	t.Cleanup(func() {
		cancel()
		sending.Wait()
	})
	return p
}

// next waits for the gateway's next leg.
func (p *pair) next(t *testing.T, want leg.Transport) *leg.Leg {
	t.Helper()
	select {
	case l := <-p.up:
		if l.Transport() != want {
			t.Fatalf("the next leg is over %s, want %s\n%v", l.Transport(), want, p.j)
		}
		return l
	case <-time.After(20 * time.Second):
		t.Fatalf("no other leg\n%v", p.j)
		return nil
	}
}

// TestUDPStopsUnderTraffic: a node to which datagrams come, and that sends nothing by itself, moves to TLS when UDP stops, and back; the leg before
// stays until it is known what became of it.
func TestUDPStopsUnderTraffic(t *testing.T) {
	t.Parallel()
	p := startPair(t)
	first := p.next(t, leg.UDP)
	waitFor(t, 10*time.Second, "traffic", func() bool { return first.Stats().ReceivedDatagrams > 50 })
	p.fw.udpOpen.Store(false)
	begin := time.Now()
	second := p.next(t, leg.TLS)
	t.Logf("on TLS %v after UDP stopped", time.Since(begin).Round(time.Millisecond))
	select {
	case <-first.Done():
		t.Errorf("the leg over UDP was lost before there was another: %v", first.Err())
	default:
	}
	if cur, _ := p.gateway.Current(relayNode); cur != second {
		t.Error("the leg over TLS is not the current one")
	}
	select {
	case <-first.Done():
	case <-time.After(10 * time.Second):
		t.Error("the leg over UDP stays though nothing comes over it")
	}
	waitFor(t, 10*time.Second, "traffic over TLS", func() bool { return second.Stats().ReceivedDatagrams > 50 })
	p.fw.udpOpen.Store(true)
	third := p.next(t, leg.UDP)
	select {
	case <-second.Done():
		t.Error("the leg over TLS was closed at once")
	default:
	}
	waitFor(t, 10*time.Second, "traffic over UDP", func() bool { return third.Stats().ReceivedDatagrams > 20 })
	select {
	case <-second.Done():
	case <-time.After(retireQuiet + 10*time.Second):
		t.Error("the leg over TLS stays though nothing comes over it")
	}
	moves := p.gateway.Moves()
	if len(moves) != 2 || moves[0].From != leg.TLS || moves[0].Reason != WhyBetter || moves[1].Reason != WhyUnanswered {
		t.Errorf("moves %+v", moves)
	}
	if st := p.gateway.Status()[0]; st.Moves != 2 || st.LastMove != WhyBetter || st.Doubtful {
		t.Errorf("status %+v", st)
	}
	if n := len(p.j.times(t, "leg lost")); n != 0 {
		t.Errorf("%d legs lost, want none: each had a successor", n)
	}
}

// TestSuspicionAlone moves nothing: the relay answers. It is alone on the machine, since a relay that does not run for half a second is lost.
func TestSuspicionAlone(t *testing.T) {
	p := startPair(t)
	first := p.next(t, leg.UDP)
	for range 20 {
		checks := first.Stats().Checks
		p.gateway.Suspect(relayNode)
		waitFor(t, 5*time.Second, "the check", func() bool {
			select {
			case <-first.Done():
				t.Fatalf("the leg is lost\n%v", p.j)
			default:
			}
			return first.Stats().Checks > checks
		})
	}
	p.gateway.Suspect(gatewayNode) // that nobody wants
	if cur, _ := p.gateway.Current(relayNode); cur != first || len(p.gateway.Moves()) != 0 {
		t.Errorf("it moved: %+v", p.gateway.Moves())
	}
}

// TestRefusedUDPDoesNotDelayTLS: where UDP is refused, TLS does not wait for its turn.
func TestRefusedUDPDoesNotDelayTLS(t *testing.T) {
	t.Parallel()
	r := startRelay(t, newPKI(t, relayNode))
	ln, err := net.Listen("tcp", "127.0.0.1:0") // and no UDP on this port
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", r.addr.String())
			if err != nil {
				c.Close()
				continue
			}
			for _, way := range [][2]net.Conn{{c, up}, {up, c}} {
				wg.Go(func() {
					_, _ = io.Copy(way[0], way[1])
					way[0].Close()
					way[1].Close()
				})
			}
		}
	})
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { ln.Close() })
	k := New(Config{})
	k.Want("x", []control.RelayRef{r.pki.ref(ln.Addr().(*net.TCPAddr).AddrPort(), gatewayNode)})
	begin := time.Now()
	stop := run(t, k)
	if l := get(t, k, 10*time.Second); l.Transport() != leg.TLS {
		t.Errorf("up over %s", l.Transport())
	}
	if d := time.Since(begin); d >= TLSStagger {
		t.Errorf("up after %v", d)
	}
	stop()
}

// TestWaiting: while traffic waits attempts begin twice a second and overlap, and when it does not they keep to their interval.
func TestWaiting(t *testing.T) {
	t.Parallel()
	fw := newFirewall(t, netip.MustParseAddrPort("127.0.0.1:1")) // drops UDP; nobody behind it
	j, log := newJournal()
	k := New(Config{Logger: log, Transports: []leg.Transport{leg.UDP}})
	k.Waiting(relayNode) // that nobody wants
	k.Want("x", []control.RelayRef{newPKI(t, relayNode).ref(fw.addr, gatewayNode)})
	run(t, k)
	waitFor(t, 5*time.Second, "the first attempt", func() bool { return len(j.times(t, "dialling relay")) == 1 })
	waitFor(t, 10*time.Second, "attempts in quick succession", func() bool {
		k.Waiting(relayNode)
		return len(j.times(t, "dialling relay")) >= 5
	})
	times := j.times(t, "dialling relay")
	for i := 2; i < len(times); i++ {
		if d := times[i].Sub(times[i-1]); d < rushInterval*8/10 {
			t.Errorf("attempt %d came %v after the one before", i+1, d)
		}
	}
	if n := len(j.times(t, "relay not reached")); n >= 4 {
		t.Errorf("%d attempts were over before the next: they wait for each other", n)
	}
	// What waits no more is not hurried for.
	waitFor(t, 10*time.Second, "the end of haste", func() bool {
		all := j.times(t, "dialling relay")
		return time.Since(all[len(all)-1]) > 2*rushLonger
	})
}

// Haste has an end.
func TestHasteIsBounded(t *testing.T) {
	k := &keeping{r: &relay{k: New(Config{}), waited: time.Now()}}
	var spent time.Duration
	for k.rushing() {
		spent += k.interval()
		k.rushed++
	}
	if k.rushed != rushMost || spent != rushShort*rushInterval+(rushMost-rushShort)*rushLonger {
		t.Errorf("%d attempts in %v", k.rushed, spent)
	}
	if k.interval() != RetryInterval {
		t.Errorf("then one in %v", k.interval())
	}
	k.rushed, k.r.waited = 0, time.Now().Add(-waitFresh)
	if k.rushing() {
		t.Error("what waited a while ago is hurried for")
	}
}
