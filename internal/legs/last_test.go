package legs

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/relay/reverse"
)

// lastPort is a relay's TLS port that takes everybody, or nobody.
type lastPort struct {
	addr    netip.AddrPort
	refuse  atomic.Bool
	dialled atomic.Int32
	name    atomic.Pointer[string] // the last server name
}

func startLastPort(t *testing.T, p *pki) *lastPort {
	t.Helper()
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		MinVersion: tls.VersionTLS13, ClientAuth: tls.RequestClientCert, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.leaf, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	l := &lastPort{addr: ln.Addr().(*net.TCPAddr).AddrPort()}
	done := make(chan struct{})
	t.Cleanup(func() {
		ln.Close()
		<-done
	})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			l.dialled.Add(1)
			if err := c.(*tls.Conn).HandshakeContext(context.Background()); err != nil {
				continue
			}
			name := c.(*tls.Conn).ConnectionState().ServerName
			l.name.Store(&name)
			if l.refuse.Load() {
				c.Close()
				continue
			}
			_, _ = c.Write([]byte{0, 0, byte(reverse.ControlReady)}) // the other end notices
		}
	}()
	return l
}

// TestLastRungIsDue: at once where a relay refuses UDP and TLS, not while there is a leg, and never for a node or relay without.
func TestLastRungIsDue(t *testing.T) {
	t.Parallel()
	r := startRelay(t, newPKI(t, relayNode))
	last := startLastPort(t, r.pki)
	missing := make(chan identity.Node, 16)
	cert := func() (*tls.Certificate, error) { return new(tls.Certificate), nil }
	k := New(Config{Certificate: cert, OnMissing: func(n identity.Node) {
		select {
		case missing <- n:
		default:
		}
	}})
	k.retry = 300 * time.Millisecond
	ref := r.pki.ref(r.addr, clientNode)
	ref.TLSPort = last.addr.Port()
	k.Want("gateway g-1", []control.RelayRef{ref})
	run(t, k)
	get(t, k, 10*time.Second)
	if k.Missing(relayNode) || k.UpFor(relayNode) == 0 {
		t.Error("missing while it is up")
	}
	if k.Missing(gatewayNode) || k.UpFor(gatewayNode) != 0 {
		t.Error("a relay that nobody wants is missing")
	}
	r.stop()
	begin := time.Now()
	select {
	case n := <-missing:
		if n != relayNode || !k.Missing(relayNode) {
			t.Errorf("%v, missing %v", n, k.Missing(relayNode))
		}
	case <-time.After(30 * time.Second):
		t.Fatal("nobody is told")
	}
	t.Logf("due %v after the relay stopped", time.Since(begin).Round(time.Millisecond))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	l, err := k.Last(ctx, relayNode, gatewayNode)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if name := *last.name.Load(); name != gatewayNode.ServerName() {
		t.Errorf("asked for %s", name)
	}
	// Refused, and not asked again at once.
	last.refuse.Store(true)
	if _, err := k.Last(ctx, relayNode, gatewayNode); !errors.Is(err, reverse.ErrRefused) {
		t.Errorf("%v", err)
	}
	n := last.dialled.Load()
	if _, err := k.Last(ctx, relayNode, gatewayNode); !errors.Is(err, ErrNoLastRung) || last.dialled.Load() != n {
		t.Errorf("again: %v", err)
	}
	last.refuse.Store(false)
	waitFor(t, 5*time.Second, "it is asked again", func() bool {
		again, err := k.Last(ctx, relayNode, gatewayNode)
		if err == nil {
			again.Close()
		}
		return err == nil
	})
	if _, err := k.Last(ctx, gatewayNode, gatewayNode); !errors.Is(err, ErrUnwanted) {
		t.Errorf("a relay that nobody wants: %v", err)
	}
	// The relay is back.
	r.start()
	get(t, k, 20*time.Second)
	if k.Missing(relayNode) {
		t.Error("missing although it is back")
	}
	// Neither relay nor node without.
	ref.TLSPort = 0
	k.Want("gateway g-1", []control.RelayRef{ref})
	waitFor(t, 5*time.Second, "the relay has no last rung", func() bool {
		_, err := k.Last(ctx, relayNode, gatewayNode)
		return errors.Is(err, ErrNoLastRung)
	})
}

// TestLastRungChecksTheRelay: who answers on the port must be the relay.
func TestLastRungChecksTheRelay(t *testing.T) {
	t.Parallel()
	mine, other := newPKI(t, relayNode), newPKI(t, relayNode)
	last := startLastPort(t, other)
	k := New(Config{Certificate: func() (*tls.Certificate, error) { return new(tls.Certificate), nil }})
	ref := mine.ref(last.addr, clientNode)
	ref.TLSPort = last.addr.Port()
	k.Want("gateway g-1", []control.RelayRef{ref})
	run(t, k)
	waitFor(t, 10*time.Second, "the relay is wanted", func() bool { return k.relay(relayNode) != nil })
	if l, err := k.Last(t.Context(), relayNode, gatewayNode); err == nil {
		l.Close()
		t.Error("another relay's certificate is taken")
	} else if errors.Is(err, reverse.ErrRefused) {
		t.Errorf("the client showed itself to somebody else: %v", err)
	}
}
