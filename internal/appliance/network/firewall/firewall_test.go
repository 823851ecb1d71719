package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"sallyway/internal/lab/alone"
)

func TestApplyAndVerify(t *testing.T) {
	t.Parallel()
	if !alone.Here(t) {
		return
	}
	if err := Verify(nil); !errors.Is(err, ErrDiffers) {
		t.Errorf("no rules at all: %v", err)
	}
	if err := Apply(Relay()); err != nil {
		t.Fatal(err)
	}
	if err := Apply(nil); err != nil {
		t.Fatal(err)
	}
	if err := Verify(Relay()); !errors.Is(err, ErrDiffers) {
		t.Errorf("another role's rules: %v", err)
	}
	out, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s", out)
	if s := string(out); strings.Count(s, "policy drop") != 2 || strings.Contains(s, "5349") {
		t.Errorf("nft sees it otherwise")
	}
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	c.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: Table})
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := Verify(nil); !errors.Is(err, ErrDiffers) {
		t.Errorf("a removed table: %v", err)
	}
}

// wire lays a wire to a stranger: fd00::1 and 192.0.2.1 there, …2 here.
func wire(t *testing.T) *alone.Peer {
	t.Helper()
	peer := alone.NewPeer(t, "nic0", nil)
	if err := peer.Up("192.0.2.1/24", "fd00::1/64"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"lo", "nic0"} {
		l, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetUp(l); err != nil {
			t.Fatal(err)
		}
		if name == "lo" {
			continue
		}
		for _, a := range []string{"192.0.2.2/24", "fd00::2/64"} {
			addr, err := netlink.ParseAddr(a)
			if err != nil {
				t.Fatal(err)
			}
			addr.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrReplace(l, addr); err != nil {
				t.Fatal(err)
			}
		}
	}
	return peer
}

// hosts are the appliance's addresses on the wire.
var hosts = []string{"192.0.2.2", "fd00::2"}

// knock is a port of the appliance, at one of its addresses.
type knock struct {
	network, host string
	port          uint16
}

// silence is how long nothing has to come for it to count as nothing.
const silence = 400 * time.Millisecond

// reached knocks from the peer at ports that something listens at, all at once, and returns those where that has noticed: it waits for want, and
// then for as long as silence takes.
func reached(t *testing.T, peer *alone.Peer, knocks, want []knock) []knock {
	t.Helper()
	noticed := make(chan knock, len(knocks))
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, k := range knocks {
		addr := net.JoinHostPort(k.host, fmt.Sprint(k.port))
		if k.network == "tcp" {
			ln, err := net.Listen("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			wg.Go(func() {
				if c, err := ln.Accept(); err == nil {
					c.Close()
					noticed <- k
				}
			})
			continue
		}
		conn, err := net.ListenPacket("udp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		wg.Go(func() {
			if _, _, err := conn.ReadFrom(make([]byte, 64)); err == nil {
				noticed <- k
			}
		})
	}
	var fds []int
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	if err := peer.Do(func() error {
		for _, k := range knocks {
			kind := unix.SOCK_STREAM
			if k.network == "udp" {
				kind = unix.SOCK_DGRAM
			}
			addr := netip.MustParseAddr(k.host)
			domain, to := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(k.port), Addr: addr.As16()})
			if addr.Is4() {
				domain, to = unix.AF_INET, &unix.SockaddrInet4{Port: int(k.port), Addr: addr.As4()}
			}
			fd, err := unix.Socket(domain, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			fds = append(fds, fd)
			if err := unix.Connect(fd, to); err != nil && !errors.Is(err, unix.EINPROGRESS) {
				return err
			}
			if k.network == "udp" {
				if _, err := unix.Write(fd, []byte("knock")); err != nil {
					return err
				}
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	var got []knock
	end := time.NewTimer(20 * time.Second)
	defer end.Stop()
	if len(want) == 0 {
		end.Reset(silence)
	}
	for {
		select {
		case k := <-noticed:
			if got = append(got, k); len(got) == len(want) {
				end.Reset(silence)
			}
			continue
		case <-end.C:
		}
		break
	}
	for i, k := range knocks {
		if errno, err := unix.GetsockoptInt(fds[i], unix.SOL_SOCKET, unix.SO_ERROR); err != nil || errno != 0 {
			t.Errorf("%v: there is an answer, %v, %v, where there should be silence", k, unix.Errno(errno), err)
		}
	}
	return got
}

// TestPortsByRole knocks from the other end of a wire at ports that something listens at.
func TestPortsByRole(t *testing.T) {
	t.Parallel()
	if !alone.Here(t) {
		return
	}
	peer := wire(t)
	var knocks []knock
	for _, host := range hosts {
		for _, port := range []uint16{22, 68, 443, 546, 2222, 5349, 8443, 49151, 49152, 65535} {
			knocks = append(knocks, knock{"tcp", host, port}, knock{"udp", host, port})
		}
	}
	// Where nothing is filtered everything is reached: what is silent below is so by the filter.
	if got := reached(t, peer, knocks, knocks); len(got) != len(knocks) {
		t.Fatalf("without a filter only %v are reached", got)
	}
	for _, role := range []struct {
		name  string
		ports []Port
		open  []string
	}{
		{"gateway", nil, nil},
		{"relay", Relay(), []string{"tcp 2222", "tcp 5349", "udp 5349", "tcp 8443", "udp 49152", "udp 65535"}},
		{"platform", Platform(), []string{"tcp 443"}},
		{"a port for health", []Port{{TCP, 22, 22}}, []string{"tcp 22"}},
	} {
		if err := Apply(role.ports); err != nil {
			t.Fatal(err)
		}
		var want []knock
		for _, k := range knocks {
			if slices.Contains(role.open, fmt.Sprintf("%s %d", k.network, k.port)) {
				want = append(want, k)
			}
		}
		got := reached(t, peer, knocks, want)
		for _, k := range knocks {
			if is, should := slices.Contains(got, k), slices.Contains(want, k); is != should {
				t.Errorf("%s: %v reached: %v", role.name, k, is)
			}
		}
	}
}

// TestAnswersPass opens nothing and calls out: answers come in, and go on when rules are replaced.
func TestAnswersPass(t *testing.T) {
	t.Parallel()
	if !alone.Here(t) {
		return
	}
	peer := wire(t)
	if err := Apply(nil); err != nil {
		t.Fatal(err)
	}
	var ln net.Listener
	var udp net.PacketConn
	if err := peer.Do(func() (err error) {
		if ln, err = net.Listen("tcp", "192.0.2.1:80"); err != nil {
			return err
		}
		udp, err = net.ListenPacket("udp", "[fd00::1]:53")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	defer udp.Close()
	go func() {
		if c, err := ln.Accept(); err == nil {
			b := make([]byte, 64)
			for {
				n, err := c.Read(b)
				if err != nil {
					c.Close()
					return
				}
				_, _ = c.Write(b[:n])
			}
		}
	}()
	go func() {
		b := make([]byte, 64)
		for {
			n, from, err := udp.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = udp.WriteTo(b[:n], from)
		}
	}()
	c, err := net.DialTimeout("tcp", "192.0.2.1:80", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	u, err := net.Dial("udp", "[fd00::1]:53") // needs neighbour discovery
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	for _, ports := range [][]Port{nil, Relay(), nil} {
		if err := Apply(ports); err != nil {
			t.Fatal(err)
		}
		for _, conn := range []net.Conn{c, u} {
			if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Write([]byte("question")); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 64)
			if n, err := conn.Read(b); err != nil || string(b[:n]) != "question" {
				t.Errorf("%v: %q, %v", conn.RemoteAddr(), b[:n], err)
			}
		}
	}
	// Loopback is not filtered.
	own, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	lo, err := net.DialTimeout("tcp", own.Addr().String(), 10*time.Second)
	if err != nil {
		t.Errorf("loopback: %v", err)
	} else {
		lo.Close()
	}
	// ICMP errors about what goes out come in: the port is closed, and that is said at once.
	if _, err := net.DialTimeout("tcp", "192.0.2.1:81", 10*time.Second); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a closed port there: %v", err)
	}
	r, err := net.Dial("udp", "192.0.2.1:81")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	_ = r.SetDeadline(time.Now().Add(10 * time.Second))
	_, _ = r.Write([]byte("x"))
	if _, err := r.Read(make([]byte, 8)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("port unreachable does not come in: %v", err)
	}
}

// TestEchoIsLimited answers a few pings, and not a flood.
func TestEchoIsLimited(t *testing.T) {
	t.Parallel()
	if !alone.Here(t) {
		return
	}
	peer := wire(t)
	if err := Apply(nil); err != nil {
		t.Fatal(err)
	}
	const flood = 10 * echoBurst
	for _, host := range hosts {
		network, proto, kind := "ip4:icmp", 1, icmp.Type(ipv4.ICMPTypeEcho)
		if strings.Contains(host, ":") {
			network, proto, kind = "ip6:ipv6-icmp", 58, ipv6.ICMPTypeEchoRequest
		}
		answers := 0
		if err := peer.Do(func() error {
			c, err := net.Dial(network, host)
			if err != nil {
				return err
			}
			defer c.Close()
			for seq := range flood {
				m := icmp.Message{Type: kind, Body: &icmp.Echo{ID: 1, Seq: seq}}
				b, err := m.Marshal(nil)
				if err != nil {
					return err
				}
				if _, err := c.Write(b); err != nil {
					return err
				}
			}
			b := make([]byte, 1500)
			for {
				if err := c.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
					return err
				}
				n, _, err := c.(net.PacketConn).ReadFrom(b) // without IPv4's header
				if err != nil {
					return nil
				}
				if m, err := icmp.ParseMessage(proto, b[:n]); err == nil && (m.Type == ipv4.ICMPTypeEchoReply || m.Type == ipv6.ICMPTypeEchoReply) {
					answers++
				}
			}
		}); err != nil {
			t.Fatal(err)
		}
		if answers == 0 || answers > flood/2 {
			t.Errorf("%s: %d of %d pings were answered", host, answers, flood)
		}
	}
}

// TestRedirectsAreDropped lets in what IPv6 needs, from the link alone, and no other ICMP.
func TestRedirectsAreDropped(t *testing.T) {
	t.Parallel()
	if !alone.Here(t) {
		return
	}
	peer := wire(t)
	if err := Apply(nil); err != nil {
		t.Fatal(err)
	}
	in := func(kind byte, hops int) bool {
		t.Helper()
		conn, err := net.ListenPacket("ip6:ipv6-icmp", "::") // above the filter
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := peer.Do(func() error {
			c, err := net.Dial("ip6:ipv6-icmp", "fd00::2")
			if err != nil {
				return err
			}
			defer c.Close()
			if err := ipv6.NewConn(c).SetHopLimit(hops); err != nil {
				return err
			}
			b := make([]byte, 40)
			b[0] = kind
			binary.BigEndian.PutUint32(b[24:], 0xc0ffee)
			_, err = c.Write(b)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1500)
		for {
			if err := conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			n, _, err := conn.ReadFrom(b)
			if err != nil {
				return false
			}
			if n == 40 && b[0] == kind && binary.BigEndian.Uint32(b[24:]) == 0xc0ffee {
				return true
			}
		}
	}
	if !in(134, 255) {
		t.Error("a router advertisement of the link is dropped")
	}
	if in(134, 64) {
		t.Error("a router advertisement from afar is let in")
	}
	if in(137, 255) {
		t.Error("a redirect is let in")
	}
	if in(139, 255) {
		t.Error("a node information query is let in")
	}
}

func TestParsePort(t *testing.T) {
	for _, p := range slices.Concat(Relay(), Platform()) {
		if got, err := ParsePort(p.String()); err != nil || got != p {
			t.Errorf("%s: %v, %v", p, got, err)
		}
	}
	for _, s := range []string{"", "443", "/tcp", "0/tcp", "443/sctp", "9-8/udp", "65536/tcp", "1-65536/udp", "-1/tcp", "1-/tcp"} {
		if p, err := ParsePort(s); err == nil {
			t.Errorf("%q: %v", s, p)
		}
	}
}
