package relay

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pion/stun/v4"

	"sallyway/internal/identity"
	"sallyway/relay/wire"
)

// sendTo is a Send indication.
func sendTo(t testing.TB, peer netip.AddrPort, payload string) []byte {
	t.Helper()
	m, err := stun.Build(stun.NewType(stun.MethodSend, stun.ClassIndication), stun.TransactionID, peerAttr(peer), raw{stun.AttrData, []byte(payload)})
	if err != nil {
		t.Fatal(err)
	}
	return m.Raw
}

// TestBindingRule holds who may reach whom against every way to name a peer.
func TestBindingRule(t *testing.T) {
	l := start(t, func(c *Config) { c.Limits.NodeAllocations = 100 })
	site, platform := node("acme", identity.Site, "s1"), node("acme", identity.Platform, "p1")
	gateway2, foreignClient, foreignPlatform := node("acme", identity.Gateway, "g2"), node("other", identity.Client, "c1"), node("other", identity.Platform, "p1")
	all := []identity.Node{client1, client2, gateway1, gateway2, site, platform, foreign, foreignClient, foreignPlatform}
	peers := map[identity.Node]*tester{}
	for _, n := range all {
		peers[n] = allocated(t, l, n)
	}
	number := uint16(minChannel)
	for _, from := range all {
		for _, to := range all {
			a := allocated(t, l, from)
			want := codeForbidden
			allowed := from.Org == to.Org && (from.Kind == identity.Gateway) != (to.Kind == identity.Gateway)
			if allowed {
				want = 0
			}
			if got := errorCode(a.permit(peers[to].relayed)); got != want {
				t.Errorf("CreatePermission %v to %v: %d, want %d", from, to, got, want)
			}
			if got := errorCode(a.bind(number, peers[to].relayed)); got != want {
				t.Errorf("ChannelBind %v to %v: %d, want %d", from, to, got, want)
			}
			if got := errorCode(a.do(wire.MethodRendezvous, wire.Node(to))); got != want {
				t.Errorf("Rendezvous %v to %v: %d, want %d", from, to, got, want)
			}
			// A Send has no answer: see whether it counts as forbidden.
			before := l.count.forbidden.Load()
			a.write(sendTo(t, peers[to].relayed, "x"))
			a.want(0, a.do(stun.MethodRefresh)) // the Send has been handled before this is answered
			if forbidden := l.count.forbidden.Load() > before; forbidden == allowed {
				t.Errorf("Send %v to %v: forbidden %v", from, to, forbidden)
			}
			a.want(0, a.do(stun.MethodRefresh, lifetime(0)))
		}
	}
}

// TestClientsCanNotReachOneAnother is the data path's side of the rule: even with permission for the relay's own address, which is the
// address of every peer, nothing passes between two clients or two organizations.
func TestClientsCanNotReachOneAnother(t *testing.T) {
	l := start(t, nil)
	a, g := allocated(t, l, client1), allocated(t, l, gateway1)
	a.want(0, a.permit(g.relayed))
	for _, n := range []identity.Node{client2, foreign} {
		b := allocated(t, l, n)
		a.write(sendTo(t, b.relayed, "secret"))
		b.wantNothing()
	}
	g.want(0, g.permit(a.relayed))
	a.write(sendTo(t, g.relayed, "fine"))
	m := g.indication(stun.MethodData)
	if v, _ := m.Get(stun.AttrData); string(v) != "fine" {
		t.Errorf("Data indication carries %q", v)
	}
}

func TestServicesAreNeverPeers(t *testing.T) {
	l := start(t, func(c *Config) { c.ServicePorts = []uint16{2222, 8443} })
	a := allocated(t, l, client1)
	for _, port := range []uint16{l.Addr().Port(), 2222, 8443, 22, 80, 50000, a.relayed.Port()} {
		peer := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
		if got := errorCode(a.permit(peer)); got != codeForbidden {
			t.Errorf("CreatePermission for port %d: %d", port, got)
		}
		if got := errorCode(a.bind(minChannel, peer)); got != codeForbidden {
			t.Errorf("ChannelBind for port %d: %d", port, got)
		}
	}
}

// encodings are ways to write an IPv4 address.
func encodings(four string) []string {
	b := netip.MustParseAddr(four).As4()
	hex := fmt.Sprintf("%02x%02x:%02x%02x", b[0], b[1], b[2], b[3])
	inverted := fmt.Sprintf("%02x%02x:%02x%02x", ^b[0], ^b[1], ^b[2], ^b[3])
	return []string{
		four, "::ffff:" + four, "::" + hex, "64:ff9b::" + hex, "64:ff9b:1::" + hex, "64:ff9b:1:2:3:4:" + hex, "2002:" + hex + "::", "2002:" + hex + "::1",
		"2001:0:4136:e378:8000:63bf:" + inverted, "::ffff:0:" + hex,
	}
}

func TestEncodedPeersAreRefused(t *testing.T) {
	l := start(t, nil)
	a := allocated(t, l, client1)
	for _, four := range []string{"127.0.0.1", "0.0.0.0", "169.254.169.254", "10.0.0.1"} {
		for _, e := range append(encodings(four), "::1", "::", "fe80::1", "fd00:ec2::254") {
			peer := netip.AddrPortFrom(netip.MustParseAddr(e), 80)
			for what, r := range map[string]*stun.Message{
				"CreatePermission": a.do(stun.MethodCreatePermission, rawPeer(peer)),
				"ChannelBind":      a.do(stun.MethodChannelBind, numberAttr(minChannel), rawPeer(peer)),
			} {
				if got := errorCode(r); got != codeForbidden && got != stun.CodePeerAddrFamilyMismatch {
					t.Errorf("%s for %s: %d, want 403 or 443", what, e, got)
				}
			}
		}
	}
	if n := len(l.table.snapshot()[0].byPeer); n != 0 {
		t.Errorf("%d channels bound", n)
	}
}

// rawPeer is XOR-PEER-ADDRESS with the address in the form given: a mapped one stays IPv6.
type rawPeer netip.AddrPort

func (p rawPeer) AddTo(m *stun.Message) error {
	a := netip.AddrPort(p)
	b := a.Addr().AsSlice()
	family := byte(familyIPv4)
	if len(b) == 16 {
		family = familyIPv6
	}
	pad := append([]byte{0x21, 0x12, 0xA4, 0x42}, m.TransactionID[:]...)
	for i := range b {
		b[i] ^= pad[i]
	}
	port := a.Port() ^ 0x2112
	m.Add(stun.AttrXORPeerAddress, append([]byte{0, family, byte(port >> 8), byte(port)}, b...))
	return nil
}

func TestPeerACL(t *testing.T) {
	cfg := Config{Advertise: netip.MustParseAddr("198.51.100.7"), ServicePorts: []uint16{2222}}
	check := func(addr string, loopback bool) error {
		c := cfg
		c.Organizations = map[string]Organization{"acme": {Peers: []Peer{{Addr: netip.MustParseAddrPort(addr), AllowLoopback: loopback}}}}
		_, err := New(c)
		return err
	}
	for _, ok := range []string{"203.0.113.9:443", "10.1.2.3:5432", "192.168.1.1:1", "100.64.0.1:9", "8.8.8.8:53", "[::ffff:8.8.8.8]:53"} {
		if err := check(ok, false); err != nil {
			t.Errorf("%s named exactly: %v", ok, err)
		}
	}
	for _, four := range []string{"127.0.0.1", "0.0.0.0", "169.254.169.254"} {
		for _, e := range encodings(four) {
			addr := netip.AddrPortFrom(netip.MustParseAddr(e), 80).String()
			if check(addr, false) == nil {
				t.Errorf("%s is accepted", addr)
			}
			if four == "0.0.0.0" && check(addr, true) == nil {
				t.Errorf("%s is accepted with AllowLoopback", addr)
			}
		}
	}
	for _, bad := range []string{
		"224.0.0.1:1", "255.255.255.255:1", "240.0.0.1:1", "0.1.2.3:1", "[::1]:1", "[::]:1", "[ff02::1]:1", "[fe80::1]:1", "[fec0::1]:1",
		"100.100.100.200:80", "[fd00:ec2::254]:80", "168.63.129.16:80", "198.51.100.7:5349", "198.51.100.7:2222", "198.51.100.7:50000", "8.8.8.8:0",
		"[64:ff9b::808:808]:53", "[2002:808:808::1]:53", "[2001:db8::1]:53",
	} {
		if check(bad, false) == nil {
			t.Errorf("%s is accepted", bad)
		}
	}
	for _, bad := range []string{"127.0.0.1:5349", "127.0.0.1:2222", "198.51.100.7:5349", "224.0.0.1:1"} {
		if check(bad, true) == nil {
			t.Errorf("%s is accepted with AllowLoopback", bad)
		}
	}
	if err := check("127.0.0.1:3480", true); err != nil {
		t.Errorf("loopback with AllowLoopback: %v", err)
	}
}

func TestMalformedACLRefusesToStart(t *testing.T) {
	cfg := Config{Advertise: netip.MustParseAddr("198.51.100.7")}
	for name, orgs := range map[string]map[string]Organization{
		"no address":        {"acme": {Peers: []Peer{{}}}},
		"one bad of two":    {"acme": {Peers: []Peer{{Addr: netip.MustParseAddrPort("8.8.8.8:53")}, {Addr: netip.MustParseAddrPort("127.0.0.1:53")}}}},
		"zone":              {"acme": {Peers: []Peer{{Addr: netip.MustParseAddrPort("[fe80::1%eth0]:53")}}}},
		"organization name": {"Acme Inc": {}},
	} {
		c := cfg
		c.Organizations = orgs
		if _, err := New(c); err == nil {
			t.Errorf("%s: the relay starts", name)
		}
	}
	// At run time the organization keeps the peers it had, and the others are served as they should be.
	good := Peer{Addr: netip.MustParseAddrPort("192.168.7.7:53")}
	l := start(t, func(c *Config) { c.Organizations["acme"] = Organization{Peers: []Peer{good}} })
	a, f := allocated(t, l, client1), allocated(t, l, foreign)
	if err := l.SetOrganizations(map[string]Organization{"acme": {Peers: []Peer{{}}}, "third": {Peers: []Peer{good, {}}}}); err == nil {
		t.Error("a malformed peer is accepted at run time")
	}
	a.want(0, a.permit(good.Addr))
	f.want(codeForbidden, f.do(stun.MethodRefresh)) // not served any more
	n := allocated(t, l, node("third", identity.Client, "c3"))
	n.want(codeForbidden, n.permit(good.Addr))
}

func TestConnectIsRefused(t *testing.T) {
	l := start(t, nil)
	a, b := allocated(t, l, client1), allocated(t, l, gateway1)
	a.want(codeForbidden, a.do(stun.MethodConnect, peerAttr(b.relayed)))
	a.want(codeForbidden, a.do(stun.MethodConnectionBind, raw{stun.AttrConnectionID, []byte{1, 2, 3, 4}}))
	c := dial(t, l, client2)
	c.transport = 6 // TCP
	c.want(stun.CodeUnsupportedTransProto, c.tryAllocate())
}

func TestDuplicatePeerFirstWins(t *testing.T) {
	l := start(t, nil)
	a, g, other := allocated(t, l, client1), allocated(t, l, gateway1), allocated(t, l, foreign)
	// The first is allowed and bound; the second, which is not, is not looked at.
	a.want(0, a.do(stun.MethodChannelBind, numberAttr(minChannel), peerAttr(g.relayed), peerAttr(other.relayed)))
	for _, x := range l.table.snapshot() {
		if x.owner == client1 && (x.channelFor(g.relayed) == nil || x.channelFor(other.relayed) != nil) {
			t.Error("not the first peer is bound")
		}
	}
	a.want(codeForbidden, a.do(stun.MethodChannelBind, numberAttr(minChannel+1), peerAttr(other.relayed), peerAttr(g.relayed)))
	// CreatePermission is for all or none.
	a.want(codeForbidden, a.do(stun.MethodCreatePermission, peerAttr(g.relayed), peerAttr(other.relayed)))
}

func TestChannelNumbers(t *testing.T) {
	l := start(t, nil)
	a, g := allocated(t, l, client1), allocated(t, l, gateway1)
	for _, n := range []uint16{0, 1, 0x3FFF, 0x5000, 0x7FFF, 0x8000, 0xFFFF} {
		a.want(stun.CodeBadRequest, a.bind(n, g.relayed))
	}
	a.want(0, a.bind(maxChannel, g.relayed))
	a.want(0, a.bind(maxChannel, g.relayed)) // refresh
	a.want(stun.CodeBadRequest, a.bind(minChannel, g.relayed))
	g2 := allocated(t, l, node("acme", identity.Gateway, "g2"))
	a.want(stun.CodeBadRequest, a.bind(maxChannel, g2.relayed))
	a.want(0, a.bind(minChannel, g2.relayed))
	a.want(stun.CodeBadRequest, a.do(stun.MethodChannelBind, peerAttr(g.relayed)))
	a.want(stun.CodeBadRequest, a.do(stun.MethodChannelBind, numberAttr(minChannel)))
}

// TestConfiguredPeer exchanges data with an echo server outside the relay, by channel and by indication, both ways through the socket.
func TestConfiguredPeer(t *testing.T) {
	echo, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	go func() {
		buf := make([]byte, 2000)
		for {
			n, from, err := echo.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = echo.WriteTo(buf[:n], from)
		}
	}()
	peer := echo.LocalAddr().(*net.UDPAddr).AddrPort()
	orgs := map[string]Organization{"acme": {Peers: []Peer{{Addr: peer, AllowLoopback: true}}}, "other": {}}
	l := start(t, func(c *Config) { c.Organizations = orgs })
	a := allocated(t, l, client1)
	a.want(0, a.permit(peer))
	a.write(sendTo(t, peer, "by indication"))
	if v, _ := a.indication(stun.MethodData).Get(stun.AttrData); string(v) != "by indication" {
		t.Errorf("Data %q", v)
	}
	a.want(0, a.bind(minChannel, peer))
	a.write(channelData(minChannel, "by channel"))
	a.wantData(minChannel, "by channel")
	// A stranger who knows the relayed address gets nothing in.
	stranger, err := net.Dial("udp4", a.relayed.String())
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	if _, err := stranger.Write([]byte("let me in")); err != nil {
		t.Fatal(err)
	}
	until(t, "the stranger's datagram is counted", func() bool { return l.count.unpermitted.Load() == 1 })
	a.wantNothing()
	// The other organization has no such peer.
	f := allocated(t, l, foreign)
	f.want(codeForbidden, f.permit(peer))
	// The permission runs out, the channel a little later.
	l.clock.advance(permissionLifetime + time.Second)
	a.write(channelData(minChannel, "unheard"))
	a.wantNothing()
	// Taken out of the configuration, the peer is gone at once.
	a.want(0, a.bind(minChannel, peer))
	a.write(channelData(minChannel, "again"))
	a.wantData(minChannel, "again")
	if err := l.SetOrganizations(map[string]Organization{"acme": {}, "other": {}}); err != nil {
		t.Fatal(err)
	}
	a.write(channelData(minChannel, "removed"))
	a.wantNothing()
	a.want(codeForbidden, a.permit(peer))
}

func TestPermissionAndChannelExpire(t *testing.T) {
	l := start(t, nil)
	a, g := allocated(t, l, client1), allocated(t, l, gateway1)
	g.want(0, g.permit(a.relayed))
	a.want(0, a.permit(g.relayed))
	a.write(sendTo(t, g.relayed, "1"))
	g.indication(stun.MethodData)
	l.clock.advance(permissionLifetime - time.Second)
	a.write(sendTo(t, g.relayed, "2"))
	g.indication(stun.MethodData)
	l.clock.advance(2 * time.Second)
	a.write(sendTo(t, g.relayed, "3"))
	g.wantNothing()
	a.want(0, a.permit(g.relayed))
	a.write(sendTo(t, g.relayed, "4")) // the receiver's permission ran out, too
	g.wantNothing()

	a.want(0, a.bind(0x4001, g.relayed))
	g.want(0, g.bind(0x4002, a.relayed))
	a.write(channelData(0x4001, "5"))
	g.wantData(0x4002, "5")
	a.want(0, a.do(stun.MethodRefresh, lifetime(time.Hour)))
	g.want(0, g.do(stun.MethodRefresh, lifetime(time.Hour)))
	l.clock.advance(channelLifetime - time.Second)
	a.want(0, a.bind(0x4001, g.relayed))
	a.write(channelData(0x4001, "6"))
	g.wantData(0x4002, "6")
	l.clock.advance(2 * time.Second)
	a.write(channelData(0x4001, "7"))
	g.wantNothing() // the gateway's end ran out
	l.sweep()
	g.want(0, g.bind(0x4003, a.relayed)) // another number is free to take
	a.write(channelData(0x4001, "8"))
	g.wantData(0x4003, "8")
	// The allocation itself.
	l.clock.advance(time.Hour)
	l.sweep()
	if n := l.Allocations(); n != 0 {
		t.Errorf("%d allocations after their lifetime", n)
	}
	a.want(codeMismatch, a.bind(0x4001, g.relayed))
}

func TestPortIsFreedQuarantinedAndRandom(t *testing.T) {
	l := start(t, func(c *Config) { c.MinPort, c.MaxPort = 51000, 51003 })
	var used []uint16
	a := allocated(t, l, client1)
	used = append(used, a.relayed.Port())
	a.want(0, a.do(stun.MethodRefresh, lifetime(0)))
	if n := l.Allocations(); n != 0 {
		t.Errorf("%d allocations after Refresh 0", n)
	}
	a.want(codeMismatch, a.do(stun.MethodRefresh, lifetime(0)))
	for range 3 {
		c := allocated(t, l, client1)
		if contains16(used, c.relayed.Port()) {
			t.Errorf("port %d is used again within the quarantine", c.relayed.Port())
		}
		used = append(used, c.relayed.Port())
	}
	c := dial(t, l, client1)
	c.want(codeCapacity, c.tryAllocate())
	l.clock.advance(portQuarantine + time.Second)
	l.sweep()
	allocated(t, l, client1)

	ports := map[uint16]bool{}
	m := start(t, func(c *Config) { c.Limits.NodeAllocations = 50 })
	rising := true
	var last uint16
	for range 20 {
		p := allocated(t, m, client1).relayed.Port()
		rising = rising && p > last
		last = p
		ports[p] = true
	}
	if len(ports) != 20 || rising {
		t.Errorf("20 allocations have %d ports, rising %v", len(ports), rising)
	}
}

func contains16(list []uint16, p uint16) bool {
	for _, x := range list {
		if x == p {
			return true
		}
	}
	return false
}

// TestLatePacketDoesNotCrossOrganizations reuses a relayed port for another organization while the first one's peer still has a channel.
func TestLatePacketDoesNotCrossOrganizations(t *testing.T) {
	l := start(t, func(c *Config) { c.MinPort, c.MaxPort = 51000, 51001 })
	a, g := allocated(t, l, client1), allocated(t, l, gateway1)
	a.want(0, a.bind(0x4000, g.relayed))
	g.want(0, g.bind(0x4000, a.relayed))
	freed := g.relayed
	g.want(0, g.do(stun.MethodRefresh, lifetime(0)))
	l.clock.advance(portQuarantine + time.Second)
	f := allocated(t, l, foreign)
	if f.relayed != freed {
		t.Fatalf("the port was not used again: %v, %v", f.relayed, freed)
	}
	a.write(channelData(0x4000, "late"))
	a.write(sendTo(t, freed, "late"))
	f.wantNothing()
	a.want(codeForbidden, a.bind(0x4000, freed))
}

func TestErrorAnswersCarryNoStrayBytes(t *testing.T) {
	l := start(t, nil)
	c := dial(t, l, client1)
	for _, r := range []*stun.Message{
		c.once(stun.MethodAllocate, c.requestedTransport()),
		c.once(stun.MethodBinding, raw{stun.AttrChangeRequest, []byte{0, 0, 0, 6}}),
		c.tryAllocate(raw{stun.AttrRequestedAddressFamily, []byte{2, 0, 0, 0}}),
		c.tryAllocate(),
	} {
		b := r.Raw[stunHeader:]
		for len(b) > 0 {
			n := int(binary.BigEndian.Uint16(b[2:]))
			padded := (n + 3) &^ 3
			if pad := b[4+n : 4+padded]; !bytes.Equal(pad, make([]byte, len(pad))) {
				t.Errorf("padding % x", pad)
			}
			if stun.AttrType(binary.BigEndian.Uint16(b)) == stun.AttrErrorCode && (b[4] != 0 || b[5] != 0 || n != 4) {
				t.Errorf("ERROR-CODE % x", b[:4+n])
			}
			b = b[4+padded:]
		}
		if strings.Contains(string(r.Raw), "pion") || r.Contains(stun.AttrSoftware) {
			t.Error("the answer names software")
		}
	}
}
