package udpio

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNamespace runs f on a thread with a network namespace of its own, in which nothing but the loopback interface is up.
func inNamespace(t *testing.T, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for a network namespace and a raw socket")
	}
	done := make(chan struct{})
	go func() { // the thread is not unlocked, so it ends with the goroutine
		defer close(done)
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("new network namespace: %v", err)
			return
		}
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err != nil {
			t.Errorf("loopback: %v", err)
			return
		}
		f()
	}()
	<-done
}

// fragmentationNeeded is an ICMP message (RFC 792, RFC 1191 §4) that says that a datagram of the flow was too large, with a next-hop MTU.
func fragmentationNeeded(from, to netip.AddrPort, mtu uint16) []byte {
	b := []byte{3, 4, 0, 0, 0, 0, byte(mtu >> 8), byte(mtu)}
	ip := make([]byte, 20)
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(ip[2:], 1228)
	binary.BigEndian.PutUint16(ip[6:], 0x4000) // DF
	copy(ip[12:], from.Addr().AsSlice())
	copy(ip[16:], to.Addr().AsSlice())
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	udp := binary.BigEndian.AppendUint16(nil, from.Port())
	udp = binary.BigEndian.AppendUint16(udp, to.Port())
	udp = append(udp, 0x04, 0xb8, 0, 0)
	b = append(append(b, ip...), udp...)
	binary.BigEndian.PutUint16(b[2:], checksum(b))
	return b
}

// checksum is the Internet checksum (RFC 1071) of b, in which the field itself is zero.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// TestForgedFragmentationNeeded forges ICMP messages that claim a path MTU below what QUIC needs. A socket that believes them can not send
// 1200 bytes any more, which would stop every session on it while TCP fallbacks think that UDP works (the class of CVE-2024-53259).
func TestForgedFragmentationNeeded(t *testing.T) {
	inNamespace(t, func() {
		peer, _, err := Listen(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"), Config{})
		if err != nil {
			t.Error(err)
			return
		}
		defer peer.Close()
		raw, err := net.ListenPacket("ip4:icmp", "127.0.0.1")
		if err != nil {
			t.Error(err)
			return
		}
		defer raw.Close()
		forge := func(from netip.AddrPort) {
			for range 3 {
				if _, err := raw.WriteTo(fragmentationNeeded(from, peer.LocalAddr(), 576), &net.IPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
					t.Error(err)
				}
			}
		}
		// A socket that asks for the kernel's path MTU discovery believes the forgery: the test would see it.
		naive, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(peer.LocalAddr()))
		if err != nil {
			t.Error(err)
			return
		}
		defer naive.Close()
		rc, err := naive.SyscallConn()
		if err != nil {
			t.Error(err)
			return
		}
		_ = rc.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
		})
		deceived := false
		for end := time.Now().Add(5 * time.Second); !deceived && time.Now().Before(end); {
			forge(naive.LocalAddr().(*net.UDPAddr).AddrPort())
			for range 4 { // an error may be the report of the message, once; the size that is refused again and again is the effect
				_, err = naive.Write(make([]byte, 1200))
			}
			deceived = errors.Is(err, syscall.EMSGSIZE)
		}
		if !deceived {
			t.Errorf("the forgery does not work on a socket that believes it (%v): the test is worth nothing", err)
			return
		}
		connected, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(peer.LocalAddr()))
		if err != nil {
			t.Error(err)
			return
		}
		leg, _, err := New(connected, Config{})
		if err != nil {
			t.Error(err)
			return
		}
		defer leg.Close()
		server, _, err := Listen(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"), Config{})
		if err != nil {
			t.Error(err)
			return
		}
		defer server.Close()
		for name, c := range map[string]struct {
			conn *Conn
			to   Peer
		}{"connected, as a leg": {leg, Peer{}}, "unconnected, as a relay": {server, Peer{Addr: peer.LocalAddr()}}} {
			// A message is reported once, by whichever write comes next. A socket that believed it would refuse for ten minutes.
			for round := range 5 {
				forge(c.conn.LocalAddr())
				for _, segment := range []int{0, 1400} {
					good := 0
					for end := time.Now().Add(5 * time.Second); good < 5 && time.Now().Before(end); {
						if err = c.conn.Write(make([]byte, max(1400, 10*segment)), segment, 0, c.to); err == nil {
							good++
						} else if !TooLarge(err) {
							t.Errorf("%s: %v", name, err)
						}
					}
					if good < 5 {
						t.Errorf("%s, round %d: datagrams of 1400 bytes in runs of %d are refused: %v", name, round, segment, err)
						return
					}
				}
			}
		}
	})
}
