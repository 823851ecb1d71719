package relay

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pion/dtls/v3"
	"github.com/pion/stun/v4"
	"github.com/pion/turn/v5"

	"sallyway/internal/identity"
	"sallyway/relay/wire"
)

// pionClient allocates with pion's TURN client.
func pionClient(t *testing.T, l *lab, n identity.Node) net.PacketConn {
	t.Helper()
	name, password := user(n, "")
	sock, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c, err := turn.NewClient(&turn.ClientConfig{
		STUNServerAddr: l.Addr().String(), TURNServerAddr: l.Addr().String(),
		Username: name, Password: password, Realm: wire.Realm, Conn: sock,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Listen(); err != nil {
		t.Fatal(err)
	}
	conn, err := c.Allocate()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		c.Close()
		sock.Close()
	})
	return conn
}

func TestPionClientsOfAnAllowedPair(t *testing.T) {
	l := start(t, nil)
	a, b := pionClient(t, l, client1), pionClient(t, l, gateway1)
	// Each writes until the other has heard it: the first packets go out before the other side permits them.
	heard := make(chan string, 2)
	read := func(c net.PacketConn) {
		buf := make([]byte, 2000)
		n, from, err := c.ReadFrom(buf)
		if err == nil {
			heard <- fmt.Sprintf("%s %s", buf[:n], from)
		}
	}
	go read(a)
	go read(b)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(10 * time.Second)
	got := map[string]bool{}
	for len(got) < 2 {
		select {
		case h := <-heard:
			got[h] = true
		case <-tick.C:
			if _, err := a.WriteTo([]byte("from a"), b.LocalAddr()); err != nil {
				t.Fatal(err)
			}
			if _, err := b.WriteTo([]byte("from b"), a.LocalAddr()); err != nil {
				t.Fatal(err)
			}
		case <-deadline:
			t.Fatalf("heard only %v", got)
		}
	}
	if !got["from a "+a.LocalAddr().String()] || !got["from b "+b.LocalAddr().String()] {
		t.Errorf("heard %v", got)
	}
	// pion switches to channels behind the scenes.
	until(t, "a channel on both sides", func() bool {
		for _, x := range l.table.snapshot() {
			x.mu.Lock()
			n := len(x.byPeer)
			x.mu.Unlock()
			if n == 0 {
				return false
			}
		}
		return true
	})
}

func TestPionClientsOfAForbiddenPair(t *testing.T) {
	l := start(t, nil)
	a := pionClient(t, l, client1)
	for _, n := range []identity.Node{client2, foreign} {
		b := pionClient(t, l, n)
		if _, err := a.WriteTo([]byte("x"), b.LocalAddr()); err == nil || !strings.Contains(err.Error(), "403") {
			t.Errorf("client to %v: %v, want 403", n, err)
		}
	}
}

// dtlsDial connects a client of n with its control in DTLS. What comes beside DTLS on the socket is in plain.
func dtlsDial(t *testing.T, l *lab, n identity.Node, flags wire.Flags) (c *tester, sock *net.UDPConn, plain chan []byte) {
	t.Helper()
	sock, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sock.Close() })
	return dtlsOver(t, l, n, flags, sock)
}

// dtlsOver is dtlsDial on a given socket.
func dtlsOver(t *testing.T, l *lab, n identity.Node, flags wire.Flags, sock *net.UDPConn) (*tester, *net.UDPConn, chan []byte) {
	t.Helper()
	split := &splitConn{UDPConn: sock, plain: make(chan []byte, 100)}
	dc, err := dtls.ClientWithOptions(split, net.UDPAddrFromAddrPort(l.Addr()), dtls.WithInsecureSkipVerify(true))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := dc.HandshakeContext(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dc.Close() })
	name, password := user(n, flags)
	return &tester{t: t, conn: dc, username: name, password: password, transport: protocolUDP}, sock, split.plain
}

// splitConn keeps datagrams that are not DTLS from the DTLS client.
type splitConn struct {
	*net.UDPConn
	plain chan []byte
}

func (s *splitConn) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		n, from, err := s.UDPConn.ReadFrom(b)
		if err != nil || (n > 0 && b[0] >= 20 && b[0] <= 63) {
			return n, from, err
		}
		select {
		case s.plain <- bytes.Clone(b[:n]):
		default:
		}
	}
}

// foreignPeer runs coturn's echo peer and returns its address.
func foreignPeer(t *testing.T) netip.AddrPort {
	t.Helper()
	bin, err := exec.LookPath("turnutils_peer")
	if err != nil {
		t.Skip("turnutils_peer of coturn is not installed")
	}
	probe, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := probe.LocalAddr().(*net.UDPAddr).AddrPort()
	probe.Close()
	cmd := exec.Command(bin, "-L", "127.0.0.1", "-p", fmt.Sprint(addr.Port()))
	cmd.Stdout, cmd.Stderr = io.Discard, io.Discard
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(addr))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	until(t, "the echo peer answers", func() bool {
		_, _ = c.Write([]byte("?"))
		_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		_, err := c.Read(make([]byte, 10))
		return err == nil
	})
	return addr
}

func TestCoturnClient(t *testing.T) {
	bin, err := exec.LookPath("turnutils_uclient")
	if err != nil {
		t.Skip("turnutils_uclient of coturn is not installed")
	}
	peer := foreignPeer(t)
	// The client binds a channel to the peer's next port, too, for RTCP it is told not to use.
	rtcp := netip.AddrPortFrom(peer.Addr(), peer.Port()+1)
	cert, ca := certificate(t)
	l := start(t, func(c *Config) {
		c.Certificate = cert
		c.Limits.NodeAllocations = 4000 // the client leaves some behind when it gives up
		c.Limits.SourceAllocations, c.Limits.SourceHalfOpen, c.Limits.SourceHandshakes = 4000, 1000, 10000
		c.Organizations["acme"] = Organization{Peers: []Peer{{Addr: peer, AllowLoopback: true}, {Addr: rtcp, AllowLoopback: true}}}
	})
	name, password := user(client1, "")
	var running sync.WaitGroup
	for _, tc := range []struct {
		name string
		args []string
	}{
		{"udp", nil},
		{"udp send indications", []string{"-s"}},
		{"tcp", []string{"-t"}},
		{"tls", []string{"-t", "-S", "-E", ca}},
		{"dtls", []string{"-S", "-E", ca}},
		{"dtls send indications", []string{"-S", "-s"}},
		{"large", []string{"-l", "1200", "-n", "100", "-z", "1"}},
	} {
		// All at once, since the client mostly waits.
		running.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			args := append(append([]string{}, tc.args...), "-c", "-u", name, "-w", password, "-e", peer.Addr().String(), "-r", fmt.Sprint(peer.Port()),
				"-p", fmt.Sprint(l.Addr().Port()), "127.0.0.1")
			// The client picks channel numbers at random from the range of RFC 5766, three quarters of which RFC 8656 §12 took away
			// again, and gives up when refused. So it may have to try often.
			var out []byte
			var err error
			const tries = 200
			for range tries {
				out, err = exec.CommandContext(ctx, bin, args...).CombinedOutput()
				if err == nil || !bytes.Contains(out, []byte("channel bind: error 400")) {
					break
				}
			}
			if err != nil || !bytes.Contains(out, []byte("Total lost packets 0 (0.000000%)")) {
				t.Errorf("%s: %v: %s\n%v", tc.name, tc.args, out, err)
			}
		})
	}
	running.Wait()
}

func TestCoturnSTUNClient(t *testing.T) {
	bin, err := exec.LookPath("turnutils_stunclient")
	if err != nil {
		t.Skip("turnutils_stunclient of coturn is not installed")
	}
	l := start(t, nil)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, bin, "-p", fmt.Sprint(l.Addr().Port()), "127.0.0.1").CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("UDP reflexive addr: 127.0.0.1:")) {
		t.Errorf("%s\n%v", out, err)
	}
}

// tcpDial connects a client of n over TCP, or TLS where secure.
func tcpDial(t *testing.T, l *lab, n identity.Node, secure bool) *tester {
	t.Helper()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if secure {
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true})
	}
	name, password := user(n, "")
	return &tester{t: t, conn: c, stream: true, username: name, password: password, transport: protocolUDP}
}

// TestEveryTransportToEveryOther moves data both ways between all pairs of transports.
func TestEveryTransportToEveryOther(t *testing.T) {
	cert, _ := certificate(t)
	l := start(t, func(c *Config) { c.Certificate = cert })
	dials := map[string]func(n identity.Node) *tester{
		"udp":  func(n identity.Node) *tester { return dial(t, l, n) },
		"tcp":  func(n identity.Node) *tester { return tcpDial(t, l, n, false) },
		"tls":  func(n identity.Node) *tester { return tcpDial(t, l, n, true) },
		"dtls": func(n identity.Node) *tester { c, _, _ := dtlsDial(t, l, n, ""); return c },
	}
	for from, dialA := range dials {
		for to, dialB := range dials {
			a, b := dialA(client1), dialB(gateway1)
			a.allocate()
			b.allocate()
			a.want(0, a.bind(0x4000, b.relayed))
			b.want(0, b.bind(0x4FFF, a.relayed))
			for _, payload := range []string{"1", "12", "123", "1234", strings.Repeat("x", 1200)} {
				frame := channelData(0x4000, payload)
				if a.stream {
					frame = append(frame, make([]byte, (4-len(frame)%4)%4)...)
				}
				a.write(frame)
				b.wantData(0x4FFF, payload)
			}
			b.write(append(channelData(0x4FFF, "back"), channelData(0x4FFF, "more")...)[:b.frames(2)])
			a.wantData(0x4000, "back")
			if b.stream {
				a.wantData(0x4000, "more")
			}
			a.want(0, a.do(stun.MethodRefresh, lifetime(0)))
			b.want(0, b.do(stun.MethodRefresh, lifetime(0)))
			t.Logf("%s to %s passed", from, to)
		}
	}
}

// frames is the length of n eight-byte frames where the transport is a stream, else of one.
func (c *tester) frames(n int) int {
	if c.stream {
		return 8 * n
	}
	return 8
}

// TestPlainDataBesideDTLS is how our own nodes work: control in DTLS, ChannelData beside it.
func TestPlainDataBesideDTLS(t *testing.T) {
	cert, _ := certificate(t)
	l := start(t, func(c *Config) { c.Certificate = cert })
	a, sockA, plainA := dtlsDial(t, l, client1, wire.FlagPlainData)
	b, sockB, plainB := dtlsDial(t, l, gateway1, wire.FlagPlainData)
	a.allocate()
	b.allocate()
	a.want(0, a.bind(0x4000, b.relayed))
	b.want(0, b.bind(0x4001, a.relayed))
	to := net.UDPAddrFromAddrPort(l.Addr())
	for _, x := range []struct {
		name     string
		sock     *net.UDPConn
		number   uint16
		got      chan []byte
		expected []byte
	}{
		{"up", sockA, 0x4000, plainB, channelData(0x4001, "data")},
		{"down", sockB, 0x4001, plainA, channelData(0x4000, "data")},
	} {
		if _, err := x.sock.WriteToUDP(channelData(x.number, "data"), to); err != nil {
			t.Fatal(err)
		}
		select {
		case got := <-x.got:
			if !bytes.Equal(got, x.expected) {
				t.Errorf("%s: got % x, want % x", x.name, got, x.expected)
			}
		case <-time.After(5 * time.Second):
			t.Errorf("%s: nothing came beside DTLS", x.name)
		}
	}
	// Without the flag, data beside DTLS is nobody's.
	c, sockC, plainC := dtlsDial(t, l, client2, "")
	c.allocate()
	c.want(0, c.bind(0x4000, b.relayed))
	b.want(0, b.bind(0x4002, c.relayed))
	if _, err := sockC.WriteToUDP(channelData(0x4000, strings.Repeat("n", 40)), to); err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-plainC:
		if len(got) != stunHeader || !isMethod(got, wire.MethodUnknown) {
			t.Errorf("got % x, want an Unknown indication", got)
		}
	case <-time.After(5 * time.Second):
		t.Error("no Unknown indication for plain data without the flag")
	}
	select {
	case got := <-plainB:
		t.Errorf("plain data without the flag was relayed: % x", got)
	default:
	}
}

func isMethod(b []byte, method stun.Method) bool {
	m := &stun.Message{Raw: b}
	return m.Decode() == nil && m.Type.Method == method
}
