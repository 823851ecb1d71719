package legs

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"sallyway/internal/control"
	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/relay/leg"
	"sallyway/relay/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// get waits for the leg on the relay.
func get(t testing.TB, k *Keeper, d time.Duration) *leg.Leg {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	l, err := k.Leg(ctx, relayNode)
	if err != nil {
		t.Fatalf("no leg within %v: %v", d, err)
	}
	return l
}

func TestLegComesUpAndServes(t *testing.T) {
	t.Parallel()
	r := startRelay(t, newPKI(t, relayNode))
	type met struct {
		relay, peer identity.Node
		ch          *leg.Channel
	}
	asked := make(chan met, 1)
	up := make(chan identity.Node, 4)
	g := New(Config{
		OnRendezvous: func(relay, peer identity.Node, ch *leg.Channel) { asked <- met{relay, peer, ch} },
		OnUp:         func(n identity.Node, _ *leg.Leg) { up <- n },
	})
	c := New(Config{})
	if _, err := g.Leg(t.Context(), relayNode); !errors.Is(err, ErrUnwanted) {
		t.Errorf("a leg that nobody wants: %v", err)
	}
	if l, err := g.Current(relayNode); l != nil || !errors.Is(err, ErrUnwanted) {
		t.Errorf("Current: %v, %v", l, err)
	}
	g.Want("serving", []control.RelayRef{r.pki.ref(r.addr, gatewayNode)})
	c.Want("gateway g-1", []control.RelayRef{r.pki.ref(r.addr, clientNode)})
	stop := run(t, g)
	run(t, c)
	lg, lc := get(t, g, 10*time.Second), get(t, c, 10*time.Second)
	if lg.Transport() != leg.UDP || <-up != relayNode {
		t.Errorf("up over %s", lg.Transport())
	}
	st := g.Status()
	if len(st) != 1 || !st[0].Up || st[0].Relay != relayNode || st[0].Name != "fra-1" || st[0].Error != "" || st[0].Tries != 0 || st[0].Stats == nil ||
		st[0].Reflexive.Addr() != netip.MustParseAddr("127.0.0.1") || !st[0].Relayed.IsValid() {
		t.Errorf("status %+v", st)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	ch, err := lc.Connect(ctx, gatewayNode)
	if err != nil {
		t.Fatal(err)
	}
	m := <-asked
	if m.relay != relayNode || m.peer != clientNode {
		t.Errorf("asked by %v over %v", m.peer, m.relay)
	}
	got := make(chan string, 1)
	m.ch.SetReceiver(receiver(func(p []byte) {
		select {
		case got <- string(p):
		default:
		}
	}))
	arrived := false
	waitFor(t, 5*time.Second, "a datagram", func() bool { // what is sent before the other side has bound is lost
		ch.Send([]byte("hello"), 0, datagram.NotECT)
		select {
		case p := <-got:
			arrived = p == "hello"
		default:
		}
		return arrived
	})
	stop()
	if l, err := g.Current(relayNode); l != nil {
		t.Errorf("after Run there is a leg: %v, %v", l, err)
	}
	select {
	case <-lg.Done():
	default:
		t.Error("Run left its leg open")
	}
	waitFor(t, 5*time.Second, "the relay to forget the gateway", func() bool { return r.Allocations() == 1 })
}

type receiver func([]byte)

func (r receiver) Receive(b datagram.Batch) {
	for p, ok := b.Next(); ok; p, ok = b.Next() {
		r(p)
	}
	b.Release()
}

// The relay goes away: OnDown, one try about every RetryInterval with its line in the log, and back soon after its return.
func TestRelayAwayAndBack(t *testing.T) {
	if testing.Short() {
		t.Skip("takes three intervals of real time")
	}
	t.Parallel()
	r := startRelay(t, newPKI(t, relayNode))
	j, log := newJournal()
	down := make(chan error, 4)
	k := New(Config{Logger: log, OnDown: func(n identity.Node, err error) {
		if n != relayNode {
			t.Errorf("OnDown of %v", n)
		}
		down <- err
	}})
	k.Want("serving", []control.RelayRef{r.pki.ref(r.addr, gatewayNode)})
	run(t, k)
	first := get(t, k, 10*time.Second)
	if len(j.times(t, "leg up")) != 1 {
		t.Error("no line says that the leg is up")
	}
	r.stop()
	select {
	case err := <-down:
		if err == nil {
			t.Error("OnDown without a reason")
		}
	case <-time.After(20 * time.Second):
		t.Fatalf("nobody notices that the relay is gone\n%v", j)
	}
	<-first.Done()
	// Of the tries after the loss, the first comes at once, the others in intervals.
	waitFor(t, 4*RetryInterval, "two intervals", func() bool { return len(j.times(t, "relay not reached")) >= 3 })
	tries := j.times(t, "dialling relay")[1:]
	for i := 1; i < 3; i++ {
		if d := tries[i].Sub(tries[i-1]); d < RetryInterval*8/10 || d > RetryInterval*12/10 {
			t.Errorf("try %d came %v after the one before, want %v ± 20 %%", i+1, d, RetryInterval)
		}
	}
	if st := k.Status(); len(st) != 1 || st[0].Up || st[0].Tries < 3 || !strings.Contains(st[0].Error, "fra-1") {
		t.Errorf("status %+v", st)
	}
	back := time.Now()
	r.start()
	if l := get(t, k, 6*time.Second); l == first {
		t.Error("the old leg is back")
	}
	t.Logf("back after %v", time.Since(back).Round(time.Millisecond))
	if l, err := k.Current(relayNode); l == nil || err != nil {
		t.Errorf("Current: %v, %v", l, err)
	}
}

func TestJitter(t *testing.T) {
	lo, hi := RetryInterval, RetryInterval
	for range 10000 {
		d := jitter(RetryInterval)
		lo, hi = min(lo, d), max(hi, d)
	}
	if lo < RetryInterval*9/10 || hi > RetryInterval*11/10 || hi-lo < RetryInterval/10 {
		t.Errorf("jitter from %v to %v, want a tenth of %v", lo, hi, RetryInterval)
	}
	if AttemptTimeout >= RetryInterval*9/10 {
		t.Error("an attempt may still run when the next is due")
	}
}

// Where UDP is dropped in silence the leg comes up over TLS, and moves to UDP when that passes: the new leg first.
func TestFallsToTLSAndClimbsBack(t *testing.T) {
	t.Parallel()
	r := startRelay(t, newPKI(t, relayNode))
	fw := newFirewall(t, r.addr)
	j, log := newJournal()
	up := make(chan *leg.Leg, 4)
	k := New(Config{Logger: log, OnUp: func(_ identity.Node, l *leg.Leg) { up <- l }, OnDown: func(_ identity.Node, err error) { t.Errorf("OnDown: %v", err) }})
	k.upgrade = 300 * time.Millisecond
	k.Want("serving", []control.RelayRef{r.pki.ref(fw.addr, gatewayNode)})
	start := time.Now()
	run(t, k)
	first := get(t, k, 10*time.Second)
	if first.Transport() != leg.TLS || fw.dropped.Load() == 0 {
		t.Fatalf("up over %s, %d datagrams dropped", first.Transport(), fw.dropped.Load())
	}
	if d := time.Since(start); d < TLSStagger {
		t.Errorf("TLS won after %v: UDP had no field to itself", d)
	}
	if st := k.Status(); st[0].Transport != leg.TLS {
		t.Errorf("status %+v", st)
	}
	fw.udpOpen.Store(true)
	<-up
	select {
	case second := <-up:
		if l, _ := k.Current(relayNode); second.Transport() != leg.UDP || l != second {
			t.Errorf("moved to %s", second.Transport())
		}
	case <-time.After(20 * time.Second):
		t.Fatalf("the leg stays on TLS\n%v", j)
	}
	select {
	case <-first.Done():
	case <-time.After(5 * time.Second):
		t.Error("the old leg stays open")
	}
	if len(j.times(t, "leg moved")) != 1 {
		t.Error("no line says that the leg moved")
	}
}

func TestOnlyTheTransportsAskedFor(t *testing.T) {
	t.Parallel()
	r := startRelay(t, newPKI(t, relayNode))
	fw := newFirewall(t, r.addr)
	k := New(Config{Transports: []leg.Transport{leg.TLS}})
	k.Want("x", []control.RelayRef{r.pki.ref(fw.addr, gatewayNode)})
	run(t, k)
	if l := get(t, k, 10*time.Second); l.Transport() != leg.TLS || fw.dropped.Load() != 0 {
		t.Errorf("up over %s, %d datagrams tried", l.Transport(), fw.dropped.Load())
	}
}

// What is wrong with a relay is said, and no leg comes up.
func TestRefusedRelays(t *testing.T) {
	t.Parallel()
	p, other := newPKI(t, relayNode), newPKI(t, identity.Node{Org: identity.SharedOrg, Kind: identity.Relay, ID: "r-2"})
	r, r2 := startRelay(t, p), startRelay(t, other)
	nobody, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := nobody.Addr().(*net.TCPAddr).AddrPort()
	nobody.Close()
	for _, c := range []struct {
		name   string
		change func(*control.RelayRef)
		says   string
	}{
		{"wrong pin", func(ref *control.RelayRef) { ref.Pins = []identity.KeyHash{other.pin} }, "not issued by a pinned CA key"},
		{"no pin", func(ref *control.RelayRef) { ref.Pins = nil }, "not issued by a pinned CA key"},
		{"wrong root", func(ref *control.RelayRef) { ref.Roots = string(identity.EncodeCertificates(other.root)) }, "unknown authority"},
		{"no root", func(ref *control.RelayRef) { ref.Roots = "" }, "roots of relay fra-1"},
		{"another relay of the same CA", func(ref *control.RelayRef) { *ref = other.ref(r2.addr, gatewayNode) }, "r-2"},
		{"wrong password", func(ref *control.RelayRef) { ref.Password = "planted-secret" }, "401"},
		{"expired credential", func(ref *control.RelayRef) {
			ref.Username = wire.Username{Expiry: time.Now().Add(-time.Hour), Node: gatewayNode}.String()
			ref.Password = wire.Password(credentialKey, ref.Username)
		}, "401"},
		{"nobody there", func(ref *control.RelayRef) { ref.Port = dead.Port() }, "refused"},
		{"no such host", func(ref *control.RelayRef) { ref.Host = "relay.invalid" }, "address of relay fra-1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			j, log := newJournal()
			k := New(Config{Logger: log, OnUp: func(identity.Node, *leg.Leg) { t.Error("a leg came up") }, Resolver: &net.Resolver{
				PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no name server here") },
			}})
			ref := p.ref(r.addr, gatewayNode)
			c.change(&ref)
			k.Want("x", []control.RelayRef{ref})
			stop := run(t, k)
			waitFor(t, 10*time.Second, "the refusal", func() bool { return len(j.times(t, "relay not reached")) > 0 })
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			defer cancel()
			if _, err := k.Leg(ctx, relayNode); err == nil || !strings.Contains(err.Error(), c.says) || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Leg: %v, want an error that says %q", err, c.says)
			}
			st := k.Status()
			if len(st) != 1 || st[0].Up || !strings.Contains(st[0].Error, c.says) {
				t.Errorf("status %+v does not say %q", st, c.says)
			}
			stop()
			if strings.Contains(j.String(), "planted-secret") {
				t.Error("the log has the password")
			}
		})
	}
}

// Fresh credentials reach a leg that is up with its next request, without a new leg.
func TestWantRenewsCredentials(t *testing.T) {
	t.Parallel()
	r := startRelay(t, newPKI(t, relayNode))
	var ups atomic.Int32
	k := New(Config{OnUp: func(identity.Node, *leg.Leg) { ups.Add(1) }})
	ref := r.pki.ref(r.addr, clientNode)
	k.Want("a", []control.RelayRef{ref})
	run(t, k)
	g := New(Config{OnRendezvous: func(_, _ identity.Node, _ *leg.Channel) {}})
	g.Want("serving", []control.RelayRef{r.pki.ref(r.addr, gatewayNode)})
	run(t, g)
	l := get(t, k, 10*time.Second)
	get(t, g, 10*time.Second)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()

	// A credential that is spoilt shows at once with the next request …
	spoilt := ref
	spoilt.Password = "wrong"
	k.Want("a", []control.RelayRef{spoilt})
	waitFor(t, 5*time.Second, "the spoilt credential to be taken up", func() bool {
		k.mu.Lock()
		rl := k.relays[relayNode]
		k.mu.Unlock()
		rl.mu.Lock()
		defer rl.mu.Unlock()
		return rl.ref.Password == "wrong"
	})
	short, cancelShort := context.WithTimeout(ctx, time.Second)
	defer cancelShort()
	if _, err := l.Connect(short, gatewayNode); err == nil {
		t.Fatal("requests go on with the old credential")
	}
	// … and a renewed one works: the leg is the same as long as it lives.
	renewed := r.pki.ref(r.addr, clientNode)
	k.Want("a", []control.RelayRef{renewed})
	waitFor(t, 10*time.Second, "a channel with the renewed credential", func() bool {
		l, _ := k.Current(relayNode)
		if l == nil {
			return false
		}
		try, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err := l.Connect(try, gatewayNode)
		return err == nil
	})
	if ups.Load() != 1 {
		t.Errorf("%d legs were dialled, want the one", ups.Load())
	}
}

// Each user of the keeper wants its own set; a leg lives while one of them wants it.
func TestUnwantedIsClosed(t *testing.T) {
	t.Parallel()
	r := startRelay(t, newPKI(t, relayNode))
	k := New(Config{OnDown: func(identity.Node, error) { t.Error("OnDown for a leg that was given up") }})
	refs := []control.RelayRef{r.pki.ref(r.addr, gatewayNode)}
	k.Want("a", refs)
	k.Want("b", refs)
	run(t, k)
	l := get(t, k, 10*time.Second)
	k.Want("a", nil)
	k.Want("c", []control.RelayRef{}) // wants nothing
	if again := get(t, k, time.Second); again != l || len(k.Status()) != 1 {
		t.Error("a leg that somebody wants is gone")
	}
	k.Want("b", nil)
	select {
	case <-l.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("nobody wants the leg and it stays")
	}
	waitFor(t, 5*time.Second, "the keeper to forget it", func() bool {
		_, err := k.Current(relayNode)
		return errors.Is(err, ErrUnwanted) && len(k.Status()) == 0
	})
	waitFor(t, 5*time.Second, "the relay to forget it", func() bool { return r.Allocations() == 0 })
	k.Want("a", refs) // and it comes again
	get(t, k, 10*time.Second)
}

// A waiter that began before the relay was taken up gets the leg; one whose own time is over gets the cause.
func TestLegWaits(t *testing.T) {
	t.Parallel()
	r := startRelay(t, newPKI(t, relayNode))
	k := New(Config{})
	k.Want("a", []control.RelayRef{r.pki.ref(r.addr, gatewayNode)})
	got := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_, err := k.Leg(ctx, relayNode)
		got <- err
	}()
	run(t, k)
	if err := <-got; err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("the user went away")
	cancel(cause)
	k2 := New(Config{})
	k2.Want("a", []control.RelayRef{r.pki.ref(r.addr, gatewayNode)})
	if _, err := k2.Leg(ctx, relayNode); !errors.Is(err, cause) {
		t.Errorf("%v, want the cause", err)
	}
}

// Who waits for a leg on a relay that is given up is told at once.
func TestLegOfAGivenUpRelay(t *testing.T) {
	t.Parallel()
	fw := newFirewall(t, netip.MustParseAddrPort("127.0.0.1:1")) // drops UDP; nobody behind it
	k := New(Config{})
	k.Want("a", []control.RelayRef{newPKI(t, relayNode).ref(fw.addr, gatewayNode)})
	run(t, k)
	waitFor(t, 5*time.Second, "the first attempt", func() bool { return fw.dropped.Load() > 0 })
	got := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		_, err := k.Leg(ctx, relayNode)
		got <- err
	}()
	before := fw.dropped.Load()
	waitFor(t, 5*time.Second, "a repetition, by when the waiter waits", func() bool { return fw.dropped.Load() > before })
	k.Want("a", nil)
	select {
	case err := <-got:
		if !errors.Is(err, ErrUnwanted) {
			t.Errorf("%v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the waiter waits on")
		<-got
	}
}

// A relay that is drained is reported while its leg still carries.
func TestDraining(t *testing.T) {
	t.Parallel()
	r := startRelay(t, newPKI(t, relayNode))
	down := make(chan error, 4)
	k := New(Config{OnDown: func(_ identity.Node, err error) { down <- err }})
	k.Want("a", []control.RelayRef{r.pki.ref(r.addr, gatewayNode)})
	run(t, k)
	l := get(t, k, 10*time.Second)
	ctx, cancel := context.WithCancel(t.Context())
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		_ = r.Drain(ctx, 10*time.Second)
	}()
	select {
	case err := <-down:
		if !strings.Contains(err.Error(), "draining") {
			t.Errorf("OnDown: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("nobody is told")
	}
	if cur, _ := k.Current(relayNode); cur != l {
		t.Error("the leg is given up before there is another")
	}
	cancel()
	<-drained
}

func TestResolveSortsIPv4First(t *testing.T) {
	k := New(Config{})
	addrs, err := k.Addrs(t.Context(), control.RelayRef{Host: "::ffff:127.0.0.1"}, 5349)
	if want := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:5349")}; err != nil || !slices.Equal(addrs, want) {
		t.Errorf("%v, %v, want %v", addrs, err, want)
	}
	if addrs, err := k.Addrs(t.Context(), control.RelayRef{Host: "::1"}, 1); err != nil || !slices.Equal(addrs, []netip.AddrPort{netip.MustParseAddrPort("[::1]:1")}) {
		t.Errorf("%v, %v", addrs, err)
	}
}

// A change of the host's network ends a leg whose address it has taken away, and no other.
func TestAddressGone(t *testing.T) {
	t.Parallel()
	r := startRelay(t, newPKI(t, relayNode))
	k := New(Config{})
	var gone atomic.Bool
	k.addrs = func() ([]net.Addr, error) {
		if gone.Load() {
			return []net.Addr{&net.IPNet{IP: net.IPv4(192, 0, 2, 7), Mask: net.CIDRMask(24, 32)}}, nil
		}
		return net.InterfaceAddrs()
	}
	k.Want("a", []control.RelayRef{r.pki.ref(r.addr, gatewayNode)})
	run(t, k)
	first := get(t, k, 10*time.Second)
	k.Kick()
	waitFor(t, 5*time.Second, "the relay to answer", func() bool { return !first.Doubtful() })
	select {
	case <-first.Done():
		t.Fatalf("the leg ended though its address is there: %v", first.Err())
	case <-time.After(100 * time.Millisecond):
	}
	gone.Store(true)
	k.Kick()
	select {
	case <-first.Done():
	case <-time.After(5 * time.Second):
		t.Fatal("the leg outlives its address")
	}
	if !errors.Is(first.Err(), errOrphaned) {
		t.Errorf("the leg ended for %v", first.Err())
	}
	if second := get(t, k, 10*time.Second); second == first {
		t.Error("the leg that ended is still offered")
	}
}

func TestIsForeign(t *testing.T) {
	t.Parallel()
	host := []net.Addr{
		&net.IPNet{IP: net.IPv4(192, 0, 2, 7), Mask: net.CIDRMask(24, 32)},
		&net.IPNet{IP: net.ParseIP("2001:db8::7"), Mask: net.CIDRMask(64, 128)},
		&net.IPNet{IP: net.ParseIP("fe80::7"), Mask: net.CIDRMask(64, 128)},
	}
	for own, want := range map[string]bool{
		"192.0.2.7": false, "::ffff:192.0.2.7": false, "192.0.2.8": true,
		"2001:db8::7": false, "2001:db8::8": true, "fe80::7%eth0": false, "0.0.0.0": false, "::": false,
	} {
		if got := isForeign(netip.MustParseAddr(own), host); got != want {
			t.Errorf("%s: %v", own, got)
		}
	}
	if isForeign(netip.Addr{}, host) {
		t.Error("a leg whose address is not known is foreign")
	}
}
