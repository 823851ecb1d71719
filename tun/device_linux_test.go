package tun

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"sallyway/internal/datagram"
)

// inNamespace runs f on a thread in a network namespace of its own, with loopback up.
func inNamespace(t *testing.T, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for a network namespace and a TUN device")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
		ns, err := netns.New()
		if err != nil {
			t.Error(err)
			return
		}
		defer ns.Close()
		up(t, "lo")
		f()
	}()
	<-done
}

func up(t *testing.T, name string) netlink.Link {
	l, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(l)
	}
	if err != nil {
		t.Error(err)
	}
	return l
}

// newLAN makes the interface lan0, a veth whose peer is up too.
func newLAN(t *testing.T) netlink.Link {
	la := netlink.NewLinkAttrs()
	la.Name = "lan0"
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: la, PeerName: "peer0"}); err != nil {
		t.Error(err)
		runtime.Goexit()
	}
	up(t, "peer0")
	return up(t, "lan0")
}

func prefixes(ss ...string) (ps []netip.Prefix) {
	for _, s := range ss {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

func open(t *testing.T) *Device {
	d, err := Open(Config{Name: fmt.Sprintf("t%d", rand.Uint32()), MTU: 1400})
	if err != nil {
		t.Error(err)
		runtime.Goexit()
	}
	return d
}

func TestOpen(t *testing.T) {
	inNamespace(t, func() {
		d := open(t)
		defer d.Close()
		if d.HeaderLen() != 10 || d.MTU() != 1400 {
			t.Errorf("header of %d bytes, MTU %d", d.HeaderLen(), d.MTU())
		}
		l, err := netlink.LinkByName(d.Name())
		if err != nil || l.Attrs().MTU != 1400 || l.Attrs().Flags&net.FlagUp == 0 || l.Attrs().Index != d.Index() {
			t.Errorf("%+v %v", l, err)
		}
		if _, err := Open(Config{Name: d.Name()}); !errors.Is(err, unix.EBUSY) {
			t.Errorf("the same device again: %v", err)
		}
		read := make(chan error, 1)
		go func() {
			_, err := d.Read(make([]byte, 2000))
			read <- err
		}()
		d.Close()
		if err := <-read; !errors.Is(err, net.ErrClosed) {
			t.Errorf("read after close: %v", err)
		}
		if _, err := d.WriteParts([][]byte{make([]byte, 30)}); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write after close: %v", err)
		}
		if _, err := netlink.LinkByName(d.Name()); err == nil {
			t.Error("the device is still there")
		}
	})
}

// TestNextFreeName: two daemons of one host that were given no name do not meet; a name that was given is taken as it is.
func TestNextFreeName(t *testing.T) {
	inNamespace(t, func() {
		for _, want := range []string{"sally0", "sally1", "sally2"} {
			d, err := Open(Config{})
			if err != nil || d.Name() != want {
				t.Errorf("opened %v, %v; want %s", d, err, want)
				return
			}
			defer d.Close()
		}
		if _, err := Open(Config{Name: DefaultName}); !errors.Is(err, unix.EBUSY) {
			t.Errorf("a name that was given and is taken: %v", err)
		}
	})
}

func TestOpenWithoutCapability(t *testing.T) {
	inNamespace(t, func() {
		// Drop CAP_NET_ADMIN from this thread alone; it ends with the test.
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		if err := unix.Capget(&hdr, &data[0]); err != nil {
			t.Error(err)
			return
		}
		data[0].Effective &^= 1 << unix.CAP_NET_ADMIN
		if err := unix.Capset(&hdr, &data[0]); err != nil {
			t.Error(err)
			return
		}
		_, err := Open(Config{})
		if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
			t.Errorf("%v: want ErrUnavailable with the remedy", err)
		}
	})
}

func TestPacketsPass(t *testing.T) {
	inNamespace(t, func() {
		d := open(t)
		defer d.Close()
		if err := d.SetAddresses(prefixes("10.77.0.1/32")); err != nil {
			t.Error(err)
		}
		if _, err := d.SetRoutes(prefixes("10.99.0.0/16"), nil); err != nil {
			t.Error(err)
		}
		c, err := net.Dial("udp", "10.99.0.1:9")
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		c.Write([]byte("ping"))
		b := make([]byte, 70000)
		d.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := d.Read(b)
		if err != nil || n != d.HeaderLen()+20+8+4 || string(b[n-4:n]) != "ping" {
			t.Errorf("%x %v", b[:n], err)
			return
		}
		// Back with addresses and ports swapped: sums stay right, but for the partial one of UDP, which the header tells of.
		ip := b[d.HeaderLen():n]
		for i := range 4 {
			ip[12+i], ip[16+i] = ip[16+i], ip[12+i]
		}
		ip[20], ip[21], ip[22], ip[23] = ip[22], ip[23], ip[20], ip[21]
		if m, err := d.WriteParts([][]byte{b[:d.HeaderLen()], ip[:20], nil, ip[20:25], ip[25:]}); m != n || err != nil {
			t.Error(m, err)
		}
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if n, err := c.Read(make([]byte, 10)); n != 4 || err != nil {
			t.Error(n, err)
		}
		parts := [][]byte{b[:d.HeaderLen()], ip}
		if avg := testing.AllocsPerRun(100, func() { d.WriteParts(parts) }); avg != 0 {
			t.Errorf("%v allocations a write", avg)
		}
		if _, err := d.WriteParts(nil); err == nil {
			t.Error("an empty packet was written")
		}
		if _, err := d.WriteParts(slices.Repeat(parts, maxParts)); !errors.Is(err, unix.EMSGSIZE) {
			t.Error(err)
		}
	})
}

// The switch for all offloads gives packets as they would be on a wire: no header, none larger than the MTU, sums complete.
func TestWithoutOffload(t *testing.T) {
	t.Setenv(datagram.NoOffload, "1")
	inNamespace(t, func() {
		d := open(t)
		defer d.Close()
		if d.HeaderLen() != 0 || d.EnableUDPSegments() {
			t.Errorf("a header of %d bytes, or runs of UDP", d.HeaderLen())
		}
		if err := d.SetAddresses(prefixes("10.77.0.1/32")); err != nil {
			t.Error(err)
		}
		if _, err := d.SetRoutes(prefixes("10.99.0.0/16"), nil); err != nil {
			t.Error(err)
		}
		c, err := net.Dial("udp", "10.99.0.1:9")
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		raw, err := c.(*net.UDPConn).SyscallConn()
		if err != nil {
			t.Error(err)
			return
		}
		var errno error
		if err := raw.Control(func(fd uintptr) { errno = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1000) }); err != nil || errno != nil {
			t.Error(err, errno)
		}
		if _, err := c.Write(make([]byte, 2500)); err != nil { // a program's own run
			t.Error(err)
		}
		d.SetReadDeadline(time.Now().Add(10 * time.Second))
		b := make([]byte, 70000)
		for _, size := range []int{1000, 1000, 500} {
			n, err := d.Read(b)
			if err != nil || n != 20+8+size {
				t.Errorf("a packet of %d bytes, %v, want %d of payload", n, err, size)
				return
			}
			sum := uint32(17 + n - 20) // the pseudo header: protocol and length, then the addresses (RFC 768)
			for i := 12; i < n; i += 2 {
				sum += uint32(b[i])<<8 | uint32(b[i+1])
			}
			for sum>>16 != 0 {
				sum = sum&0xffff + sum>>16
			}
			if sum != 0xffff || b[26] == 0 && b[27] == 0 {
				t.Errorf("sum %#x with checksum %x", sum, b[26:28])
			}
		}
	})
}

func TestSetAddresses(t *testing.T) {
	inNamespace(t, func() {
		d := open(t)
		defer d.Close()
		for _, want := range [][]netip.Prefix{
			prefixes("100.112.0.7/32"),
			prefixes("100.112.0.7/32", "fd77::7/128"),
			prefixes("100.112.0.8/12", "fd77::8/64"),
			nil,
		} {
			for range 2 {
				if err := d.SetAddresses(want); err != nil {
					t.Error(err)
				}
			}
			as, err := netlink.AddrList(d.link, netlink.FAMILY_ALL)
			if err != nil {
				t.Error(err)
			}
			var got []netip.Prefix
			for _, a := range as {
				p, _ := prefixFromIPNet(a.IPNet)
				got = append(got, p)
			}
			slices.SortFunc(got, comparePrefix)
			if !slices.Equal(got, want) {
				t.Errorf("%v, want %v", got, want)
			}
		}
		d.SetAddresses(prefixes("100.112.0.8/12"))
		if rs, err := d.Routes(); len(rs) > 0 || err != nil {
			t.Error("an address brought routes with it:", rs, err)
		}
	})
}

func TestIPv6Off(t *testing.T) {
	inNamespace(t, func() {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0); err != nil {
			t.Error(err)
			return
		}
		d := open(t)
		defer d.Close()
		if d.IPv6() {
			t.Error("IPv6 is said to be on")
		}
		if err := d.SetAddresses(prefixes("100.112.0.7/32", "fd77::7/128")); err != nil {
			t.Error(err)
		}
		skipped, err := d.SetRoutes(prefixes("10.1.0.0/16", "fd99::/64"), nil)
		if err != nil || len(skipped) != 1 || skipped[0].String() != "fd99::/64: IPv6 is off on this host" {
			t.Error(skipped, err)
		}
	})
}

func TestSetRoutes(t *testing.T) {
	inNamespace(t, func() {
		// A host with a LAN, a default gateway, and a subnet that somebody else has routed.
		lan := newLAN(t)
		for _, a := range []string{"192.168.7.2/24", "2001:db8:7::2/64"} {
			addr, _ := netlink.ParseAddr(a)
			addr.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(lan, addr); err != nil {
				t.Error(err)
			}
		}
		for dst, gw := range map[string]string{"0.0.0.0/0": "192.168.7.1", "10.50.0.0/16": "192.168.7.9", "::/0": "2001:db8:7::1"} {
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: lan.Attrs().Index, Dst: ipNet(netip.MustParsePrefix(dst)), Gw: net.ParseIP(gw)}); err != nil {
				t.Error(dst, err)
			}
		}
		d := open(t)
		defer d.Close()
		if err := d.SetAddresses(prefixes("100.112.0.7/32", "fd77::7/128")); err != nil {
			t.Error(err)
		}
		relay := netip.MustParseAddr("198.51.100.4")
		wanted := prefixes("10.1.0.0/16", "fd99::/64", "100.112.0.0/12",
			"0.0.0.0/0", "::/0", "192.168.0.0/16", "2001:db8:7::/64", "198.51.100.0/24", "10.50.0.0/16")
		for range 2 {
			skipped, err := d.SetRoutes(wanted, []netip.Addr{relay})
			if err != nil {
				t.Error(err)
			}
			var got []string
			for _, s := range skipped {
				got = append(got, s.String())
			}
			slices.Sort(got)
			want := []string{
				"0.0.0.0/0: is a default route",
				"10.50.0.0/16: has a route already",
				"192.168.0.0/16: covers the subnet 192.168.7.0/24 of lan0",
				"198.51.100.0/24: covers the address of the platform or a relay, 198.51.100.4",
				"2001:db8:7::/64: covers the subnet 2001:db8:7::/64 of lan0",
				"::/0: is a default route",
			}
			if !slices.Equal(got, want) {
				t.Errorf("skipped %q\nwant    %q", got, want)
			}
			if rs, err := d.Routes(); !slices.Equal(rs, prefixes("10.1.0.0/16", "100.112.0.0/12", "fd99::/64")) || err != nil {
				t.Error(rs, err)
			}
		}
		h, err := d.Hazards()
		if err != nil || !slices.Contains(h.Gateways, netip.MustParseAddr("192.168.7.1")) || !slices.Contains(h.Gateways, netip.MustParseAddr("2001:db8:7::1")) {
			t.Errorf("%+v %v", h, err)
		}
		r, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{LinkIndex: d.Index(), Protocol: routeProtocol}, netlink.RT_FILTER_OIF|netlink.RT_FILTER_PROTOCOL)
		if err != nil || len(r) != 2 || r[0].Congctl != routeCongestion || r[0].InitCwnd != routeInitCwnd {
			t.Errorf("%+v %v", r, err)
		}
		// A route that somebody else puts on our device is not ours to remove; one of ours that became dangerous is.
		foreign := &netlink.Route{LinkIndex: d.Index(), Dst: ipNet(netip.MustParsePrefix("10.60.0.0/16")), Scope: netlink.SCOPE_LINK}
		if err := netlink.RouteAdd(foreign); err != nil {
			t.Error(err)
		}
		skipped, err := d.SetRoutes(prefixes("10.1.0.0/16", "10.2.0.0/16"), []netip.Addr{netip.MustParseAddr("10.1.0.1")})
		if err != nil || len(skipped) != 1 {
			t.Error(skipped, err)
		}
		if rs, err := d.Routes(); !slices.Equal(rs, prefixes("10.2.0.0/16")) || err != nil {
			t.Error(rs, err)
		}
		if rs, _ := netlink.RouteList(d.link, netlink.FAMILY_V4); len(rs) != 2 {
			t.Errorf("%v: want ours and the foreign one", rs)
		}
	})
}

// TestLogins makes an established connection to port 22 and finds its peer.
func TestLogins(t *testing.T) {
	inNamespace(t, func() {
		lan := newLAN(t)
		for _, a := range []string{"192.168.7.2/24", "192.168.8.9/24"} {
			addr, _ := netlink.ParseAddr(a)
			netlink.AddrAdd(lan, addr)
		}
		ln, err := net.Listen("tcp", "192.168.7.2:22")
		if err != nil {
			t.Error(err)
			return
		}
		defer ln.Close()
		c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(192, 168, 8, 9)}}).Dial("tcp", "192.168.7.2:22")
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		got := logins("203.0.113.77 50000 192.168.7.2 22")
		want := []netip.Addr{netip.MustParseAddr("203.0.113.77"), netip.MustParseAddr("192.168.8.9")}
		if !slices.Equal(got, want) {
			t.Errorf("%v, want %v", got, want)
		}
	})
}

// TestResolversAreHazards: but for our own and those on loopback.
func TestResolversAreHazards(t *testing.T) {
	old := resolvConfs
	defer func() { resolvConfs = old }()
	resolvConfs = []string{filepath.Join(t.TempDir(), "resolv.conf"), "/nowhere"}
	if err := os.WriteFile(resolvConfs[0], []byte("nameserver 100.96.0.9 # sallyway sally1\nnameserver 100.112.0.1\nnameserver 127.0.0.1\nnameserver 10.1.0.53\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	inNamespace(t, func() {
		d := open(t)
		defer d.Close()
		wanted := prefixes("100.96.0.0/12", "100.112.0.0/12", "10.1.0.0/16")
		if skipped, err := d.SetRoutes(wanted, nil); len(skipped) != 2 || err != nil {
			t.Error(skipped, err)
		}
		d.SetOwnResolvers([]netip.Addr{netip.MustParseAddr("100.112.0.1")})
		skipped, err := d.SetRoutes(wanted, nil)
		if err != nil || len(skipped) != 1 || skipped[0].String() != "10.1.0.0/16: covers the DNS resolver 10.1.0.53" {
			t.Error(skipped, err)
		}
	})
}

func TestWatch(t *testing.T) {
	inNamespace(t, func() {
		d := open(t)
		defer d.Close()
		lan := newLAN(t)
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		told, watched := make(chan struct{}, 10), make(chan error, 1)
		ns, err := netns.Get()
		if err != nil {
			t.Error(err)
			return
		}
		defer ns.Close()
		go func() {
			runtime.LockOSThread()
			if err := netns.Set(ns); err != nil {
				watched <- err
				return
			}
			watched <- d.Watch(ctx, func() { told <- struct{}{} })
		}()
		// It may not have begun: change until it tells.
		a, _ := netlink.ParseAddr("192.168.7.2/24")
		for i := 0; ; i++ {
			if i%2 == 0 {
				err = netlink.AddrAdd(lan, a)
			} else {
				err = netlink.AddrDel(lan, a)
			}
			if err != nil {
				t.Error(err)
				return
			}
			select {
			case <-told:
			case <-time.After(10 * time.Millisecond):
				continue
			case <-ctx.Done():
				t.Error("never told")
			}
			break
		}
		for len(told) > 0 {
			<-told
		}
		// What happens on the device itself is not told, nor is an address that leads to no other network.
		local, _ := netlink.ParseAddr("fe80::7/64")
		if err := netlink.AddrAdd(lan, local); err != nil {
			t.Error(err)
		}
		if err := d.SetAddresses(prefixes("100.112.0.7/32")); err != nil {
			t.Error(err)
		}
		if _, err := d.SetRoutes(prefixes("10.99.0.0/16"), nil); err != nil {
			t.Error(err)
		}
		select {
		case <-told:
			// One may be left from the last change of the LAN's address.
			select {
			case <-told:
				t.Error("told of what leads nowhere else")
			case <-time.After(2 * watchSettle):
			}
		case <-time.After(2 * watchSettle):
		}
		cancel()
		if err := <-watched; err != nil {
			t.Error(err)
		}
	})
}

// TestDeviceDeleted: somebody deletes the interface under us.
func TestDeviceDeleted(t *testing.T) {
	inNamespace(t, func() {
		d := open(t)
		defer d.Close()
		read := make(chan error, 1)
		go func() {
			_, err := d.Read(make([]byte, 2000))
			read <- err
		}()
		if err := netlink.LinkDel(d.link); err != nil {
			t.Error(err)
		}
		if err := <-read; !errors.Is(err, net.ErrClosed) {
			t.Errorf("read: %v", err)
		}
		if _, err := d.WriteParts([][]byte{make([]byte, 40)}); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write: %v", err)
		}
	})
}

func TestProcAddrPort(t *testing.T) {
	if !littleEndian {
		t.Skip("the samples are of a little-endian host")
	}
	const sample = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 0200A8C0:0016 0900A8C0:C350 01 00000000:00000000 00:00000000 00000000     0        0 1 1
   2: 0200A8C0:0050 0A00A8C0:C350 01 00000000:00000000 00:00000000 00000000     0        0 1 1
   3: B80D0120000000000000000001000000:0016 B80D0120000000000000000002000000:C351 01 0 0
   4: 0000000000000000FFFF00000200A8C0:0016 0000000000000000FFFF00000B00A8C0:C351 01 0 0
garbage 1 2 01
`
	got := sshPeers(strings.NewReader(sample))
	want := []netip.Addr{netip.MustParseAddr("192.168.0.9"), netip.MustParseAddr("2001:db8::2"), netip.MustParseAddr("192.168.0.11")}
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestNameservers(t *testing.T) {
	got := nameservers(strings.NewReader("# nameserver 1.1.1.1\nsearch example.org\nnameserver 10.0.0.53\nnameserver\nnameserver x\nnameserver fe80::1%eth0\noptions edns0\n"))
	if want := []netip.Addr{netip.MustParseAddr("10.0.0.53"), netip.MustParseAddr("fe80::1")}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func FuzzHostFiles(f *testing.F) {
	f.Add("nameserver 10.0.0.53\nnameserver fe80::1%eth0 # x\n")
	f.Add("   1: 0200A8C0:0016 0900A8C0:C350 01 00000000:00000000\n")
	f.Add("   3: B80D0120000000000000000001000000:0016 B80D0120000000000000000002000000:C351 01 0 0\n")
	f.Fuzz(func(t *testing.T, s string) {
		for _, a := range append(nameservers(strings.NewReader(s)), sshPeers(strings.NewReader(s))...) {
			if !a.IsValid() || a.Zone() != "" || a.Is4In6() {
				t.Errorf("%q: %v", s, a)
			}
		}
	})
}

func TestOpenWithoutDeviceNode(t *testing.T) {
	inNamespace(t, func() {
		// In a mount namespace of this thread /dev/net is empty.
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			t.Error(err)
			return
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Error(err)
			return
		}
		if err := unix.Mount("tmpfs", filepath.Dir(clonePath), "tmpfs", 0, ""); err != nil {
			t.Error(err)
			return
		}
		_, err := Open(Config{})
		if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "modprobe") {
			t.Errorf("%v: want ErrUnavailable with the remedy", err)
		}
	})
	if _, err := os.Stat(clonePath); errors.Is(err, syscall.ENOENT) {
		t.Error("the test took the host's device node away")
	}
}
