package relay

import (
	"bytes"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/pion/stun/v4"

	"sallyway/internal/identity"
	"sallyway/relay/wire"
)

// TestForbiddenPeersOnEveryTransport tries every message that names a peer, over every transport, against nodes that the sender may not
// reach and against addresses that are no node at all. Nothing may arrive, and nothing may be bound.
func TestForbiddenPeersOnEveryTransport(t *testing.T) {
	cert, _ := certificate(t)
	outside, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer outside.Close()
	l := start(t, func(c *Config) { c.Certificate = cert })
	for name, connect := range map[string]func() *tester{
		"udp":        func() *tester { return dial(t, l, client1) },
		"tcp":        func() *tester { return tcpDial(t, l, client1, false) },
		"tls":        func() *tester { return tcpDial(t, l, client1, true) },
		"dtls":       func() *tester { c, _, _ := dtlsDial(t, l, client1, ""); return c },
		"dtls+plain": func() *tester { c, _, _ := dtlsDial(t, l, client1, wire.FlagPlainData); return c },
	} {
		t.Run(name, func(t *testing.T) {
			a := connect()
			a.allocate()
			victims := []*tester{allocated(t, l, client2), allocated(t, l, foreign)}
			peers := []netip.AddrPort{outside.LocalAddr().(*net.UDPAddr).AddrPort(), l.Addr(), a.relayed}
			for _, v := range victims {
				peers = append(peers, v.relayed)
			}
			number := uint16(minChannel)
			for _, p := range peers {
				for what, r := range map[string]*stun.Message{
					"CreatePermission": a.permit(p),
					"ChannelBind":      a.bind(number, p),
					"Connect":          a.do(stun.MethodConnect, peerAttr(p)),
					"ConnectionBind":   a.do(stun.MethodConnectionBind, raw{stun.AttrConnectionID, []byte{0, 0, 0, 1}}),
				} {
					if got := errorCode(r); got != codeForbidden {
						t.Errorf("%s for %v: %d, want 403", what, p, got)
					}
				}
				a.write(pad(sendTo(t, p, "to whom it may not concern")))
				a.write(pad(channelData(number, "to whom it may not concern")))
				number++
			}
			for _, n := range []identity.Node{client2, foreign, client1, node("acme", identity.Relay, "r1")} {
				if got := errorCode(a.do(wire.MethodRendezvous, wire.Node(n))); got != codeForbidden {
					t.Errorf("Rendezvous with %v: %d, want 403", n, got)
				}
			}
			a.want(0, a.do(stun.MethodRefresh)) // all before has been handled
			for _, v := range victims {
				v.wantNothing()
				v.want(0, v.do(stun.MethodRefresh, lifetime(0)))
			}
			for _, x := range l.table.snapshot() {
				if x.owner == client1 && len(x.byPeer)+len(x.perms) != 0 {
					t.Errorf("%d channels and %d permissions", len(x.byPeer), len(x.perms))
				}
			}
			a.want(0, a.do(stun.MethodRefresh, lifetime(0)))
		})
	}
	if err := outside.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, from, err := outside.ReadFrom(make([]byte, 100)); err == nil {
		t.Errorf("%d bytes from %v left the relay", n, from)
	}
}

// pad fills a message up to a multiple of four bytes, as streams need it and datagrams allow it (RFC 8656 §12.5).
func pad(b []byte) []byte {
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// TestPlainControlBesideDTLSIsNotHeard: where a node's control runs in DTLS, requests and indications outside of it on the same 5-tuple,
// which anybody who forges a source address could send, reach no allocation.
func TestPlainControlBesideDTLSIsNotHeard(t *testing.T) {
	cert, _ := certificate(t)
	l := start(t, func(c *Config) { c.Certificate = cert })
	a, sock, plain := dtlsDial(t, l, client1, wire.FlagPlainData)
	a.allocate()
	g := allocated(t, l, gateway1)
	g.want(0, g.permit(a.relayed))
	a.want(0, a.permit(g.relayed))
	to := net.UDPAddrFromAddrPort(l.Addr())
	if _, err := sock.WriteToUDP(sendTo(t, g.relayed, "forged"), to); err != nil {
		t.Fatal(err)
	}
	g.wantNothing()
	// Even with the right password: it is learned by nobody, and the answer is that there is no such allocation here.
	name, password := user(client1, wire.FlagPlainData)
	ask := func(attrs ...stun.Setter) *stun.Message {
		t.Helper()
		m := stun.MustBuild(append([]stun.Setter{stun.NewType(stun.MethodRefresh, stun.ClassRequest), stun.TransactionID}, attrs...)...)
		if _, err := sock.WriteToUDP(m.Raw, to); err != nil {
			t.Fatal(err)
		}
		for {
			select {
			case b := <-plain:
				r := &stun.Message{Raw: b}
				if r.Decode() == nil && r.TransactionID == m.TransactionID {
					return r
				}
			case <-time.After(5 * time.Second):
				t.Fatal("no answer")
			}
		}
	}
	var nonce stun.Nonce
	if err := nonce.GetFrom(ask(lifetime(0))); err != nil {
		t.Fatal(err)
	}
	r := ask(lifetime(0), stun.NewUsername(name), stun.NewRealm(wire.Realm), nonce, stun.NewLongTermIntegrity(name, wire.Realm, password))
	if got := errorCode(r); got != codeMismatch {
		t.Errorf("Refresh outside of DTLS: %d, want 437", got)
	}
	if n := l.Allocations(); n != 2 {
		t.Errorf("%d allocations", n)
	}
}

// TestReflectionInTheLongRun asks for challenges in one forged source's name for five minutes, just below the rate at which answers are
// counted, with the smallest request there is. What the source is sent beyond what was sent in its name must stay small all the same.
func TestReflectionInTheLongRun(t *testing.T) {
	l := start(t, nil)
	sock, err := net.ListenPacket("udp4", "127.0.0.9:0") // takes the answers, which nobody reads
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	from := sock.LocalAddr().(*net.UDPAddr).AddrPort()
	m := stun.MustBuild(stun.NewType(stun.MethodRefresh, stun.ClassRequest), stun.TransactionID)
	const minutes, perSecond = 5, 18
	asked := 0
	for range minutes * 60 * perSecond {
		l.clock.advance(time.Second / perSecond)
		l.shards[0].handle(bytes.Clone(m.Raw), message(len(m.Raw), from))
		asked++
	}
	answered := asked - int(l.count.limited.Load())
	const challenge = 60 // bytes, as TestAmplification measures it for this request
	in, out := asked*len(m.Raw), answered*challenge
	t.Logf("%d of %d answered: %d bytes in, %d out, %.2f", answered, asked, in, out, float64(out)/float64(in))
	if answered < 200 || float64(out) > 1.3*float64(in) {
		t.Errorf("%d bytes in, %d out", in, out)
	}
}

// TestMobilityIsNotOffered: an allocation belongs to its 5-tuple (RFC 8016's tickets are not known here), so that no other address resumes it.
func TestMobilityIsNotOffered(t *testing.T) {
	const ticket stun.AttrType = 0x8030
	l := start(t, nil)
	a := dial(t, l, client1)
	r := a.want(0, a.tryAllocate(raw{ticket, nil}))
	if r.Contains(ticket) {
		t.Error("a ticket was given")
	}
	b := dial(t, l, client1)
	b.want(codeMismatch, b.do(stun.MethodRefresh, raw{ticket, []byte("0123456789abcdef")}))
	b.want(codeMismatch, b.do(stun.MethodRefresh, lifetime(0), raw{ticket, []byte("0123456789abcdef")}))
	if n := l.Allocations(); n != 1 {
		t.Errorf("%d allocations", n)
	}
}

// TestSharedRelayKeepsTenantsApart: two organizations on one relay have the same credentials' key, so the name in a user name must be what
// counts, also where ids are equal.
func TestSharedRelayKeepsTenantsApart(t *testing.T) {
	l := start(t, nil)
	twin := node("other", identity.Gateway, "g1") // the same id as acme's gateway
	g, f := allocated(t, l, gateway1), allocated(t, l, twin)
	a := allocated(t, l, client1)
	r := a.want(0, a.do(wire.MethodRendezvous, wire.Node(gateway1)))
	v, err := r.Get(stun.AttrXORPeerAddress)
	if err != nil {
		t.Fatal(err)
	}
	if addr, _ := peerAddr(r, v); addr != g.relayed {
		t.Errorf("rendezvous leads to %v, want %v", addr, g.relayed)
	}
	a.want(codeForbidden, a.do(wire.MethodRendezvous, wire.Node(twin)))
	// A credential of the one does not refresh the other's allocation from its 5-tuple.
	f.username, f.password = user(gateway1, "")
	f.want(stun.CodeWrongCredentials, f.do(stun.MethodRefresh, lifetime(0)))
	if n := l.Allocations(); n != 3 {
		t.Errorf("%d allocations", n)
	}
}

// TestPaddingIsZero makes the relay pad short messages right after long ones of another organization have passed through the same buffers
// (the class of CVE-2020-4067).
func TestPaddingIsZero(t *testing.T) {
	cert, _ := certificate(t)
	l := start(t, func(c *Config) { c.Certificate = cert })
	secret := make([]byte, 1000)
	for i := range secret {
		secret[i] = 0xAA
	}
	fa, fg := allocated(t, l, node("other", identity.Client, "c9")), allocated(t, l, foreign)
	fa.want(0, fa.permit(fg.relayed))
	fg.want(0, fg.permit(fa.relayed))
	for name, connect := range map[string]func() *tester{
		"udp":  func() *tester { return dial(t, l, client1) },
		"tcp":  func() *tester { return tcpDial(t, l, client1, false) },
		"tls":  func() *tester { return tcpDial(t, l, client1, true) },
		"dtls": func() *tester { c, _, _ := dtlsDial(t, l, client1, ""); return c },
	} {
		a, g := connect(), allocated(t, l, gateway1)
		a.allocate()
		a.want(0, a.permit(g.relayed))
		g.want(0, g.permit(a.relayed))
		for round := range 20 {
			fa.write(sendTo(t, fg.relayed, string(secret)))
			fg.indication(stun.MethodData)
			g.write(sendTo(t, a.relayed, "short"))
			m := a.indication(stun.MethodData)
			v, err := m.Get(stun.AttrData)
			if err != nil || string(v) != "short" {
				t.Fatalf("%s: %q, %v", name, v, err)
			}
			for _, b := range m.Raw[len(m.Raw)-3:] {
				if b != 0 {
					t.Fatalf("%s, round %d: padding % x", name, round, m.Raw[len(m.Raw)-3:])
				}
			}
		}
		a.want(0, a.bind(0x4000, g.relayed))
		g.want(0, g.bind(0x4000, a.relayed))
		for round := range 20 {
			fa.write(sendTo(t, fg.relayed, string(secret)))
			fg.indication(stun.MethodData)
			g.write(channelData(0x4000, "short"))
			b, ok := a.next(5 * time.Second)
			if !ok {
				t.Fatalf("%s: no data", name)
			}
			for _, p := range b[channelHeader+5:] {
				if p != 0 {
					t.Fatalf("%s, round %d: % x", name, round, b)
				}
			}
		}
		a.want(0, a.do(stun.MethodRefresh, lifetime(0)))
		g.want(0, g.do(stun.MethodRefresh, lifetime(0)))
	}
}
