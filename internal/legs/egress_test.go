package legs

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/egress"
	"sallyway/relay/leg"
)

// noNames is a resolver that knows nothing, as where the proxy alone resolves names.
func noNames() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no name server") }}
}

// TestRelayIsDialledByName: where somebody else dials TCP, a relay whose name this host does not know is reached over TLS, without waiting for
// UDP, which has nowhere to go.
func TestRelayIsDialledByName(t *testing.T) {
	t.Parallel()
	r := startRelay(t, newPKI(t, relayNode))
	var asked atomic.Pointer[string]
	k := New(Config{Resolver: noNames(), Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		asked.Store(&address)
		var d net.Dialer
		return d.DialContext(ctx, network, r.addr.String())
	}})
	ref := r.pki.ref(r.addr, gatewayNode)
	ref.Host = strings.Repeat("x", 64) + ".test" // a name that no resolver is even asked for
	k.Want("serving", []control.RelayRef{ref})
	start := time.Now()
	run(t, k)
	l := get(t, k, 10*time.Second)
	if want := net.JoinHostPort(ref.Host, r.addr.String()[len("127.0.0.1:"):]); l.Transport() != leg.TLS || *asked.Load() != want {
		t.Errorf("up over %s, %s was dialled, want %s", l.Transport(), *asked.Load(), want)
	}
	if d := time.Since(start); d >= TLSStagger {
		t.Errorf("up after %v", d)
	}
	// Without somebody else there is no way.
	k = New(Config{Resolver: noNames()})
	k.Want("serving", []control.RelayRef{ref})
	run(t, k)
	waitFor(t, 10*time.Second, "the name is missed", func() bool {
		st := k.Status()
		return len(st) == 1 && strings.Contains(st[0].Error, "address of relay fra-1")
	})
}

// TestUDPIsFirstBesideAProxy: who dials TCP is asked only after UDP has had its time.
func TestUDPIsFirstBesideAProxy(t *testing.T) {
	t.Parallel()
	r := startRelay(t, newPKI(t, relayNode))
	k := New(Config{Dial: func(context.Context, string, string) (net.Conn, error) {
		t.Error("TCP is dialled")
		return nil, errors.New("no")
	}})
	k.Want("serving", []control.RelayRef{r.pki.ref(r.addr, gatewayNode)})
	run(t, k)
	if l := get(t, k, 10*time.Second); l.Transport() != leg.UDP || l.RemoteAddr() != r.addr {
		t.Errorf("up over %s to %v", l.Transport(), l.RemoteAddr())
	}
}

// TestProxyThatOpensTLS: the error names who issued the certificate and what to do.
func TestProxyThatOpensTLS(t *testing.T) {
	t.Parallel()
	mine, other := newPKI(t, relayNode), newPKI(t, relayNode)
	inspector := startLastPort(t, other)
	k := New(Config{
		Transports:  []leg.Transport{leg.TLS},
		Certificate: func() (*tls.Certificate, error) { return new(tls.Certificate), nil },
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, network, inspector.addr.String())
		},
	})
	ref := mine.ref(netip.MustParseAddrPort("192.0.2.1:5349"), clientNode)
	ref.TLSPort = 8443
	k.Want("gateway g-1", []control.RelayRef{ref})
	run(t, k)
	waitFor(t, 10*time.Second, "an error", func() bool { return len(k.Status()) == 1 && k.Status()[0].Error != "" })
	_, err := k.Last(t.Context(), relayNode, gatewayNode)
	if err == nil {
		t.Fatal("the last rung is up")
	}
	for _, text := range []string{k.Status()[0].Error, err.Error()} {
		if !strings.Contains(text, `issued by "CN=relays"`) || !strings.Contains(text, "exempt the relay") {
			t.Error(text)
		}
	}
}

// TestProxysRemedy: what the proxy said stands in the status with what to do about it.
func TestProxysRemedy(t *testing.T) {
	t.Parallel()
	k := New(Config{Transports: []leg.Transport{leg.TLS}, Dial: func(context.Context, string, string) (net.Conn, error) {
		return nil, &egress.Error{Kind: egress.Refused, Proxy: "http://p:1", Reason: "403", Remedy: "ask its owner"}
	}})
	k.Want("serving", []control.RelayRef{newPKI(t, relayNode).ref(netip.MustParseAddrPort("192.0.2.1:5349"), gatewayNode)})
	run(t, k)
	waitFor(t, 10*time.Second, "an error", func() bool {
		st := k.Status()
		return len(st) == 1 && strings.Contains(st[0].Error, "egress proxy http://p:1: 403") && st[0].Remedy == "ask its owner"
	})
}
