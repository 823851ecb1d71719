package dialler

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/legs"
	"sallyway/platform/view"
	"sallyway/relay/leg"
	"sallyway/relay/reverse"
	"sallyway/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestRoom: sessions are bounded for one organization and in all, and come free again.
func TestRoom(t *testing.T) {
	d := New(Config{})
	defer d.Close()
	for i := range MaxOrgSessions {
		if err := d.room("acme"); err != nil {
			t.Fatalf("session %d: %v", i, err)
		}
	}
	if err := d.room("acme"); err == nil {
		t.Error("one more than an organization may have")
	}
	for i := MaxOrgSessions; i < MaxSessions; i++ {
		if err := d.room(fmt.Sprintf("org-%d", i)); err != nil {
			t.Fatalf("session %d: %v", i, err)
		}
	}
	if err := d.room("another"); err == nil {
		t.Error("one more than there may be")
	}
	d.leave("acme")
	if err := d.room("another"); err != nil {
		t.Errorf("after one has ended: %v", err)
	}
	d.Close()
	if err := d.room("acme"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
}

// TestLimits: tests of one organization are limited by time, and those of all by number.
func TestLimits(t *testing.T) {
	var l limits
	now := time.Unix(1e9, 0)
	for range testBurst {
		if _, ok := l.begin("acme", now); !ok {
			t.Fatal("refused below the limit")
		}
		l.end("acme")
	}
	wait, ok := l.begin("acme", now)
	if ok || wait <= 0 || wait > testRefill {
		t.Errorf("beyond the limit: %v after %v", ok, wait)
	}
	if _, ok := l.begin("rival", now); !ok {
		t.Error("another organization is refused")
	}
	l.end("rival")
	if _, ok := l.begin("acme", now.Add(testRefill)); !ok {
		t.Error("refused after a while")
	}
	l.end("acme")
	later := now.Add(time.Hour)
	for range maxOrgTests {
		if _, ok := l.begin("acme", later); !ok {
			t.Fatal("refused below the limit")
		}
	}
	if _, ok := l.begin("acme", later); ok {
		t.Error("more of one organization at once than there may be")
	}
	for range maxOrgTests {
		l.end("acme")
	}
	for i := range maxTests {
		if _, ok := l.begin(fmt.Sprint(i), later); !ok {
			t.Fatal("refused below the limit")
		}
	}
	if _, ok := l.begin("one more", later); ok {
		t.Error("more at once than there may be")
	}
	if n := len(l.orgs); n > maxTests+1 {
		t.Errorf("%d organizations are remembered", n)
	}
}

// TestWays: the order in which rungs are tried; a relay without the last one has none.
func TestWays(t *testing.T) {
	one := control.RelayRef{Name: "one", Port: 5349, TLSPort: 8443}
	two := control.RelayRef{Name: "two", Port: 5349}
	var got []string
	for _, w := range ways([]control.RelayRef{one, two}) {
		got = append(got, w.String())
	}
	if want := "[one udp one tls two udp two tls one tls-8443]"; fmt.Sprint(got) != want {
		t.Errorf("%v, want %s", got, want)
	}
}

// TestVerdicts: what does not work is told apart, and each verdict says what to do.
func TestVerdicts(t *testing.T) {
	relay := control.RelayRef{Node: identity.Node{Org: "acme", Kind: identity.Relay, ID: "r-1"}, Name: "fra-1", Host: "relay.example", Port: 5349, TLSPort: 8443}
	udp, tls, last := way{relay, leg.UDP}, way{relay, leg.TLS}, way{relay, legs.LastTLS}
	g := view.RouteGateway{Name: "office"}
	r := &run{doc: &control.ResourceTest{Resource: "db"}, route: &view.Route{Host: "db.internal", Port: 5432}}
	silent := errors.New("no answer")
	for _, c := range []struct {
		name            string
		err             error
		verdict, remedy string
	}{
		{
			"nothing passes", errors.Join(&stepError{udp, control.StepBinding, silent}, &stepError{tls, control.StepRelay, silent}, &stepError{last, control.StepRelay, silent}),
			"the platform does not reach relay fra-1 (relay.example) by udp, tls, tls-8443: no answer", "UDP and TCP 5349, TCP 8443",
		},
		{
			"the gateway is away", errors.Join(&stepError{udp, control.StepRendezvous, &leg.Error{Op: "rendezvous", Code: leg.CodeNotFound}}, &stepError{last, control.StepRelay, reverse.ErrRefused}),
			`gateway "office" is not connected to relay fra-1`, "gatewayd status",
		},
		{
			"only 8443 passes, and the gateway is away", errors.Join(&stepError{udp, control.StepBinding, silent}, &stepError{last, control.StepRelay, reverse.ErrRefused}),
			`gateway "office" is not connected to its relays`, "gatewayd status",
		},
		{
			"the relay is full", &stepError{udp, control.StepRelay, &leg.Error{Op: "allocate", Code: leg.CodeInsufficient}},
			"relay fra-1 does not take the platform: allocate", "sallyway relay show fra-1",
		},
		{
			"the gateway says no", &stepError{udp, control.StepGateway, &tunnel.SessionError{Code: tunnel.CloseDenied, Reason: "no policy", Remote: true}},
			`gateway "office" refused the session: no policy`, "policy explain --from platform",
		},
		{
			"the gateway is silent", &stepError{udp, control.StepGateway, &tunnel.SessionError{Reason: "the other end does not answer"}},
			`gateway "office" does not answer by relay fra-1`, "gatewayd status",
		},
		{
			"a private address", &stepError{udp, control.StepResolve, &addressError{errors.New("its address 10.0.0.1 is private")}},
			"the platform does not dial relay fra-1", "--probe-relays private",
		},
		{"no relay", errNoRelay, "has no relay yet", "sallyway relay list"},
	} {
		verdict, remedy := r.unreached(g, c.err)
		if !strings.Contains(verdict, c.verdict) || !strings.Contains(remedy, c.remedy) {
			t.Errorf("%s: %q, %q", c.name, verdict, remedy)
		}
	}
	for typ, want := range map[tunnel.ErrorType]string{
		tunnel.ConnectionRefused: "refuses connections", tunnel.ConnectionTimeout: "does not answer", tunnel.DestinationUnroutable: "no route",
		tunnel.DestinationNotFound: "can not resolve", tunnel.DestinationProhibited: "allow list", tunnel.RequestDenied: "policy says no",
	} {
		verdict, remedy := r.refusedBy(g, "db.internal:5432", fmt.Errorf("dial: %w", &tunnel.ProxyError{Type: typ}))
		if !strings.Contains(verdict, want) || remedy == "" {
			t.Errorf("%s: %q, %q", typ, verdict, remedy)
		}
	}
}

// TestRefusedAddressIsSaidOnce: of rungs and gateways by a relay that is not dialled, and with what to do about it.
func TestRefusedAddressIsSaidOnce(t *testing.T) {
	relay := func(name string) control.RelayRef {
		return control.RelayRef{Node: identity.Node{Org: "acme", Kind: identity.Relay, ID: name}, Name: name, Port: 5349, TLSPort: 8443}
	}
	private := func(ref control.RelayRef) error {
		var errs []error
		for _, w := range ways([]control.RelayRef{ref}) {
			errs = append(errs, &stepError{w, control.StepRelay, &addressError{errors.New("its address 10.0.3.5 is private")}})
		}
		return errors.Join(errs...)
	}
	silent := &stepError{way{relay("ams-1"), leg.UDP}, control.StepBinding, errors.New("no answer")}
	var f failedDials
	f.add("office", private(relay("fra-1")))
	f.add("second", private(relay("fra-1")))
	want := "gateway office: relay fra-1: its address 10.0.3.5 is private: " + addressRemedy
	if got := f.join(); got.Error() != want {
		t.Errorf("%q, want %q", got, want)
	}
	f.add("third", errors.Join(private(relay("fra-1")), silent))
	if got := f.join(); !strings.Contains(got.Error(), "gateway third: ams-1 udp: no answer") || strings.Count(got.Error(), "10.0.3.5") != 1 || !errors.Is(got, silent.err) {
		t.Errorf("%q", got)
	}
	f = failedDials{}
	f.add("office", silent)
	if got := f.join().Error(); got != "gateway office: ams-1 udp: no answer" {
		t.Errorf("%q", got)
	}
}
