package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sallyway/internal/policy"
	"sallyway/netstack"
	"sallyway/tunnel"
)

func TestOpenIP(t *testing.T) {
	h := newHandler(t, nil)
	svc, err := h.OpenIP(t.Context(), peer1)
	if err != nil {
		t.Fatal(err)
	}
	if want := []netip.Prefix{netip.MustParsePrefix("100.112.0.2/32"), netip.MustParsePrefix("fd77::2/128")}; !slices.Equal(svc.Assign, want) {
		t.Errorf("assigns %v, want %v", svc.Assign, want)
	}
	for _, a := range slices.Concat(gatewayVirtual, loopVirtual, []netip.Addr{netip.MustParseAddr("10.99.3.4"), netip.MustParseAddr("fd99::7")}) {
		if !slices.ContainsFunc(svc.Routes, func(p netip.Prefix) bool { return p.Contains(a) }) {
			t.Errorf("no route to %v: %v", a, svc.Routes)
		}
	}
	if slices.ContainsFunc(svc.Routes, func(p netip.Prefix) bool { return p.Contains(netip.MustParseAddr("192.0.2.1")) }) {
		t.Errorf("a route to what nobody serves: %v", svc.Routes)
	}
	if _, err := h.OpenIP(t.Context(), peer2); !errors.Is(err, tunnel.ErrDenied) || !strings.Contains(err.Error(), "virtual address") {
		t.Errorf("a peer without an address: %v", err)
	}
	h.enforce.stale = func() (bool, error) { return true, errors.New("old") }
	if _, err := h.OpenIP(t.Context(), peer1); !errors.Is(err, tunnel.ErrDenied) {
		t.Errorf("with stale policies: %v", err)
	}
}

// Whatever resources there are and in whatever order: the ranges do not overlap (RFC 9484 §4.7.3) and cover them all.
func TestRoutesNeverOverlap(t *testing.T) {
	h := newHandler(t, nil)
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		s := &policy.Snapshot{Org: "acme", Peers: []policy.Peer{{Node: client1, Virtual: clientVirtual}}}
		var all []netip.Prefix
		for i := range 1 + rnd.IntN(12) {
			var p netip.Prefix
			if rnd.IntN(3) == 0 {
				p = netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, byte(rnd.IntN(2)), byte(rnd.IntN(4) << 6)}), 8+rnd.IntN(30)).Masked()
			} else {
				p = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(rnd.IntN(4)), byte(rnd.IntN(8) << 5), byte(rnd.IntN(4))}), 8+rnd.IntN(25)).Masked()
			}
			all = append(all, p)
			s.Resource = append(s.Resource, policy.Resource{ID: fmt.Sprint(i), Address: p.String()})
		}
		h.enforce.snapshot = func() (*policy.Snapshot, error) { return s, nil }
		svc, err := h.OpenIP(t.Context(), peer1)
		if err != nil {
			t.Fatal(err)
		}
		for i, a := range svc.Routes {
			for _, b := range svc.Routes[i+1:] {
				if a.Overlaps(b) {
					t.Fatalf("%v and %v overlap; resources %v", a, b, all)
				}
			}
		}
		for _, p := range all {
			if !slices.ContainsFunc(svc.Routes, func(r netip.Prefix) bool { return r.Overlaps(p) && r.Bits() <= p.Bits() }) {
				t.Fatalf("%v is not covered by %v", p, svc.Routes)
			}
		}
	}
}

// reader gives packets of an exchange to a test.
func reader(t testing.TB, c *tunnel.IPConn) <-chan []byte {
	out := make(chan []byte, 64)
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, tunnel.MaxIPPacket)
		for {
			n, err := c.ReadPacket(b)
			if err != nil {
				return
			}
			select {
			case out <- bytes.Clone(b[:n]):
			default:
			}
		}
	}()
	t.Cleanup(func() { _ = c.Close(); <-done })
	return out
}

func send(t testing.TB, c *tunnel.IPConn, pkt []byte) {
	t.Helper()
	if icmp, err := c.WritePacket(pkt); err != nil || icmp != nil {
		t.Fatalf("%x, %v", icmp, err)
	}
}

func next(t testing.TB, packets <-chan []byte, what string) []byte {
	t.Helper()
	select {
	case p := <-packets:
		return p
	case <-time.After(10 * time.Second):
		t.Fatalf("no packet: %s", what)
		return nil
	}
}

func TestEchoOverIP(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("raw ICMP sockets need root")
	}
	l := newLab(t, newHandler(t, nil, "127.0.0.1", "::1", "10.99.0.0/16", "fd99::/64"))
	c := l.dialIP(t)
	packets := reader(t, c)
	data := bytes.Repeat([]byte("sallyway"), 100)
	for i, c4 := range []struct {
		name string
		dst  netip.Addr
	}{
		{"what the gateway's kernel answers", loopVirtual[0]},
		{"the same over IPv6", loopVirtual[1]},
		{"the gateway itself", gatewayVirtual[0]},
		{"the gateway itself over IPv6", gatewayVirtual[1]},
	} {
		e := netstack.Echo{Src: clientVirtual[i%2], Dst: c4.dst, ID: 7, Seq: uint16(i), Data: data}
		send(t, c, e.AppendPacket(nil))
		got, err := netstack.ParseEcho(next(t, packets, c4.name))
		if err != nil || !got.Reply || got.Src != e.Dst || got.Dst != e.Src || got.ID != 7 || got.Seq != uint16(i) || !bytes.Equal(got.Data, data) {
			t.Errorf("%s: %+v, %v", c4.name, got, err)
		}
	}

	// What policy does not allow is refused in the gateway's name, with the packet quoted (RFC 792, RFC 4443 §3.1).
	for i, dst := range []netip.Addr{netip.MustParseAddr("10.99.0.9"), netip.MustParseAddr("fd99::9")} {
		orig := netstack.Echo{Src: clientVirtual[i], Dst: dst, ID: 8, Seq: 1, TTL: 64, Data: data}.AppendPacket(nil)
		send(t, c, bytes.Clone(orig))
		p := next(t, packets, "ICMP for "+dst.String())
		head, typ, code, src := 20, byte(3), byte(13), netip.AddrFrom4([4]byte(p[12:16]))
		if dst.Is6() {
			head, typ, code, src = 40, 1, 1, netip.AddrFrom16([16]byte(p[8:24]))
		}
		if p[head] != typ || p[head+1] != code || src != gatewayVirtual[i] {
			t.Errorf("%v: ICMP %d/%d from %v, want %d/%d from %v", dst, p[head], p[head+1], src, typ, code, gatewayVirtual[i])
		}
		quoted, from := p[head+8:], 12 // addresses and the first 8 bytes; the hop limit is one lower by then
		if dst.Is6() {
			from = 8
		}
		if len(quoted) < head+8 || !bytes.Equal(quoted[from:head+8], orig[from:head+8]) {
			t.Errorf("%v: quotes %.60x, want the start of %.60x", dst, quoted, orig)
		}
	}

	// Dropped in silence: loopback itself, replies, other protocols, echo with a wrong checksum, and a source that is not the peer's.
	dropped := counted(t, l.metrics.packetsDropped)
	bad := netstack.Echo{Src: clientVirtual[0], Dst: loopVirtual[0], Seq: 1}.AppendPacket(nil)
	bad[len(bad)-1] ^= 1
	bad[22] ^= 1
	other := netstack.Echo{Src: clientVirtual[0], Dst: loopVirtual[0], Seq: 2}.AppendPacket(nil)
	send(t, c, bad)
	send(t, c, netstack.Echo{Src: clientVirtual[0], Dst: loopVirtual[0], Reply: true, Seq: 3}.AppendPacket(nil))
	send(t, c, netstack.Echo{Src: clientVirtual[0], Dst: netip.MustParseAddr("127.0.0.1"), Seq: 4}.AppendPacket(nil))
	before := c.Dropped()
	send(t, c, netstack.Echo{Src: netip.MustParseAddr("100.112.0.3"), Dst: loopVirtual[0], Seq: 5}.AppendPacket(nil))
	send(t, c, netstack.Echo{Src: netip.MustParseAddr("10.99.0.9"), Dst: loopVirtual[0], Seq: 6}.AppendPacket(nil))
	if got := c.Dropped() - before; got != 2 {
		t.Errorf("%d packets with a forged source left, want none", 2-got)
	}
	send(t, c, other)
	got, err := netstack.ParseEcho(next(t, packets, "the good one behind the bad ones"))
	if err != nil || got.Seq != 2 {
		t.Errorf("%+v, %v, want only the answer to the good one", got, err)
	}
	if counted(t, l.metrics.packetsDropped) == dropped {
		t.Error("nothing is counted as dropped")
	}
}

func full(a netip.Addr, port uint16) (tcpip.FullAddress, tcpip.NetworkProtocolNumber) {
	proto := ipv4.ProtocolNumber
	if a.Is6() {
		proto = ipv6.ProtocolNumber
	}
	return tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFromSlice(a.AsSlice()), Port: port}, proto
}

func dialTCP(t testing.TB, s *stack.Stack, a netip.Addr, port uint16, d time.Duration) (*gonet.TCPConn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	to, proto := full(a, port)
	return gonet.DialContextTCP(ctx, s, to, proto)
}

func TestTCPOverIP(t *testing.T) {
	l := newLab(t, newHandler(t, nil, "127.0.0.1", "::1", "10.99.0.0/16"))
	host := clientHost(t, l.dialIP(t))
	for i, addr := range []string{"127.0.0.1", "::1"} {
		port := tcpServer(t, addr, func(c *net.TCPConn) {
			defer c.Close()
			_, _ = io.Copy(c, c)
			_, _ = io.WriteString(c, " bye")
		})
		c, err := dialTCP(t, host, loopVirtual[i], port, 10*time.Second)
		if err != nil {
			t.Fatalf("%s: %v", addr, err)
		}
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		want := bytes.Repeat([]byte("0123456789abcdef"), 1<<15)
		sent := make(chan error, 1)
		go func() {
			_, err := c.Write(want)
			sent <- errors.Join(err, c.CloseWrite())
		}()
		got, err := io.ReadAll(c)
		if err := errors.Join(err, <-sent); err != nil || !bytes.Equal(got, append(want, " bye"...)) {
			t.Errorf("%s: %d of %d bytes, %v", addr, len(got), len(want)+4, err)
		}
		c.Close()
	}
	if conn, err := dialTCP(t, host, loopVirtual[0], closedPort(t), 10*time.Second); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("nobody listens: %v, %v, want RST", conn, err)
	}
}

// What policy or the allow list refuses shows at once, and as what it is: not as a timeout, not as an open port.
func TestTCPOverIPDenied(t *testing.T) {
	l := newLab(t, newHandler(t, nil, "10.99.0.0/16 443"))
	host := clientHost(t, l.dialIP(t))
	for _, dst := range []netip.AddrPort{netip.AddrPortFrom(loopVirtual[0], 80), netip.MustParseAddrPort("10.99.0.9:80")} {
		start := time.Now()
		conn, err := dialTCP(t, host, dst.Addr(), dst.Port(), 10*time.Second)
		if err == nil || errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 5*time.Second {
			t.Errorf("%v: %v, %v after %v, want a refusal at once", dst, conn, err, time.Since(start))
		}
	}
	if counted(t, l.metrics.flows.WithLabelValues("tcp", string(tunnel.DestinationProhibited))) != 2 {
		t.Error("the refusals are not counted")
	}
}

// The other end's reset arrives as one.
func TestTCPOverIPPassesResets(t *testing.T) {
	l := newLab(t, newHandler(t, nil, "127.0.0.1"))
	host := clientHost(t, l.dialIP(t))
	port := tcpServer(t, "127.0.0.1", func(c *net.TCPConn) {
		_, _ = io.ReadFull(c, make([]byte, 1))
		_ = c.SetLinger(0)
		c.Close()
	})
	c, err := dialTCP(t, host, loopVirtual[0], port, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	_, _ = c.Write([]byte("x"))
	if n, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d, %v, want a reset", n, err)
	}
}

func TestUDPOverIP(t *testing.T) {
	l := newLab(t, newHandler(t, nil, "127.0.0.1", "::1"))
	host := clientHost(t, l.dialIP(t))
	for i, addr := range []string{"127.0.0.1", "::1"} {
		to, proto := full(loopVirtual[i], udpEcho(t, addr))
		c, err := gonet.DialUDP(host, nil, &to, proto)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		b := make([]byte, 2000)
		for _, size := range []int{1, 512, 1200} {
			want := bytes.Repeat([]byte{byte(size)}, size)
			if _, err := c.Write(want); err != nil {
				t.Fatal(err)
			}
			if n, err := c.Read(b); err != nil || !bytes.Equal(b[:n], want) {
				t.Errorf("%s, %d bytes: %d, %v", addr, size, n, err)
			}
		}
		c.Close()
	}
	// Nobody there: ICMP port unreachable, which a connected socket sees as a refusal.
	to, proto := full(loopVirtual[0], closedPort(t))
	c, err := gonet.DialUDP(host, nil, &to, proto)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) { // a poll: an app learns it with its next call
		if _, err = c.Write([]byte("x")); err != nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nobody listens, and that does not show")
		}
	}
	if !strings.Contains(err.Error(), "refused") {
		t.Errorf("%v, want refused", err)
	}
}

func TestRejection(t *testing.T) {
	for typ, want := range map[tunnel.ErrorType]netstack.Reason{
		tunnel.ConnectionRefused: netstack.Refused, tunnel.ConnectionTerminated: netstack.Refused, tunnel.RequestDenied: netstack.AdminProhibited,
		tunnel.DestinationProhibited: netstack.AdminProhibited, tunnel.ConnectionTimeout: netstack.Silent, tunnel.DNSTimeout: netstack.Silent,
		tunnel.DestinationUnroutable: netstack.Unreachable, tunnel.DestinationNotFound: netstack.Unreachable, tunnel.InternalError: netstack.Unreachable,
	} {
		if got := rejection(&tunnel.ProxyError{Type: typ}); got != want {
			t.Errorf("%s: %v, want %v", typ, got, want)
		}
	}
}
