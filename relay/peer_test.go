package relay

import (
	"bytes"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/pion/stun/v4"

	"sallyway/internal/datagram"
	"sallyway/relay/udpio"
	"sallyway/relay/wire"
)

// outside is a configured peer of acme that reads and writes in runs.
func outside(t *testing.T) (*udpio.Conn, netip.AddrPort, func(*Config)) {
	t.Helper()
	sock, _, err := udpio.Listen(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"), udpio.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sock.Close() })
	if err := sock.UDPConn().SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return sock, sock.LocalAddr(), func(c *Config) {
		c.Organizations["acme"] = Organization{Peers: []Peer{{Addr: sock.LocalAddr(), AllowLoopback: true}}}
	}
}

// TestRunsToAndFromConfiguredPeers sends super-datagrams both ways between a channel and a peer's socket.
func TestRunsToAndFromConfiguredPeers(t *testing.T) {
	peer, addr, configure := outside(t)
	l := start(t, configure)
	c := fast(t, l, client1)
	c.want(0, c.bind(0x4001, addr))
	if err := c.conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	strip := func(b []byte, stride int) (payload []byte) {
		for len(b) > 0 {
			n := min(stride, len(b))
			payload = append(payload, b[channelHeader:n]...)
			b = b[n:]
		}
		return payload
	}
	out := frames(0x4001, 44, 1452, 99)
	if err := c.sock.Write(out, 1456, datagram.ECT1, udpio.Peer{}); err != nil {
		t.Fatal(err)
	}
	want, got := strip(out, 1456), []byte(nil)
	buf := make([]byte, udpio.MaxRead)
	var relayed netip.AddrPort
	reads, whole := 0, c.sock.GSO() && peer.GRO() // loopback keeps what is written at once together
	for len(got) < len(want) {
		reads++
		m, err := peer.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if m.From != c.relayed || m.Segment > 1452 || m.ECN != datagram.ECT1 {
			t.Fatalf("from %v, segment %d, ECN %d", m.From, m.Segment, m.ECN)
		}
		relayed = m.From
		got = append(got, buf[:m.N]...)
	}
	if !bytes.Equal(got, want) {
		t.Error("bytes to the peer differ")
	}
	if whole && reads != 1 {
		t.Errorf("a run came to the peer in %d pieces", reads)
	}
	// 45 datagrams of 1452 bytes are less than 64 KiB, with headers more: they leave in two writes.
	back := bytes.Repeat([]byte("0123456789ab"), 45*1452/12)
	if err := peer.Write(back[:44*1452], 1452, datagram.CE, udpio.Peer{Addr: relayed}); err != nil {
		t.Fatal(err)
	}
	got, reads = nil, 0
	for len(got) < 44*1452 {
		reads++
		m, err := c.sock.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if m.ECN != datagram.CE || (m.Segment != 1456 && m.N > 1456) || !bytes.HasPrefix(buf, channelData(0x4001, "")[:2]) {
			t.Fatalf("segment %d, ECN %d, % x", m.Segment, m.ECN, buf[:4])
		}
		got = append(got, strip(buf[:m.N], m.Segment)...)
	}
	if !bytes.Equal(got, back[:44*1452]) {
		t.Error("bytes from the peer differ")
	}
	if whole && reads != 1 {
		t.Errorf("a run came from the peer in %d pieces", reads)
	}
}

// TestRelayedSocketOpensWhenNeeded looks at whether the port is taken on the host.
func TestRelayedSocketOpensWhenNeeded(t *testing.T) {
	_, addr, configure := outside(t)
	l := start(t, configure)
	taken := func(p netip.AddrPort) bool {
		c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(p))
		if err == nil {
			c.Close()
		}
		return err != nil
	}
	own := func() *tester {
		c := dial(t, l, client1)
		c.username, c.password = user(client1, wire.FlagPlainData)
		c.allocate()
		return c
	}
	// Our own nodes: when a configured peer is permitted, not before.
	c := own()
	if taken(c.relayed) {
		t.Error("the socket of one of our own nodes is open before it is needed")
	}
	c.want(0, c.permit(addr))
	if !taken(c.relayed) {
		t.Error("the socket is not open for a permitted peer")
	}
	c.want(0, c.do(stun.MethodRefresh, lifetime(0)))
	if taken(c.relayed) {
		t.Error("the socket outlives its allocation")
	}
	// Another program may have taken the port meanwhile.
	c = own()
	thief, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(c.relayed))
	if err != nil {
		t.Fatal(err)
	}
	defer thief.Close()
	c.want(codeCapacity, c.permit(addr))
	c.want(codeCapacity, c.bind(0x4000, addr))
	// A standard client in an organization with peers: at once. In one without: never.
	s := allocated(t, l, client2)
	if !taken(s.relayed) {
		t.Error("the socket of a standard client is not open")
	}
	f := allocated(t, l, foreign)
	if taken(f.relayed) {
		t.Error("a socket is open in an organization without peers")
	}
}
