package network

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/ipv6"

	"sallyway/internal/lab/alone"
)

// option pads an option of a router advertisement.
func option(kind byte, body ...byte) []byte {
	o := append([]byte{kind, 0}, body...)
	for len(o)%8 != 0 {
		o = append(o, 0)
	}
	o[1] = byte(len(o) / 8)
	return o
}

// advertise makes a router advertisement with flags and options.
func advertise(flags byte, options ...[]byte) []byte {
	b := []byte{134, 0, 0, 0, 64, flags, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0}
	return append(b, slices.Concat(options...)...)
}

// rdnss is a name server for so many seconds, dnssl example.org.
func rdnss(seconds uint32, server string) []byte {
	a := netip.MustParseAddr(server).As16()
	return option(optionRDNSS, slices.Concat([]byte{0, 0}, binary.BigEndian.AppendUint32(nil, seconds), a[:])...)
}

func dnssl(seconds uint32, name string) []byte {
	b := slices.Concat([]byte{0, 0}, binary.BigEndian.AppendUint32(nil, seconds))
	for label := range strings.SplitSeq(name, ".") {
		b = append(append(b, byte(len(label))), label...)
	}
	return option(optionDNSSL, append(b, 0)...)
}

// slaac is a prefix that hosts make addresses in, for an hour.
func slaac(prefix string) []byte {
	p := netip.MustParsePrefix(prefix)
	a := p.Addr().As16()
	b := []byte{byte(p.Bits()), 0xc0}
	b = binary.BigEndian.AppendUint32(b, 3600)
	b = binary.BigEndian.AppendUint32(b, 1800)
	return option(3, slices.Concat(b, make([]byte, 4), a[:])...)
}

// TestRouterAdvertisements has a router on the wire that says everything once: an address, itself, a name server, for a short time.
func TestRouterAdvertisements(t *testing.T) {
	t.Parallel()
	if !alone.Here(t) {
		return
	}
	peer := alone.NewPeer(t, nicName, nicMAC)
	if err := peer.Up("fe80::1/64"); err != nil {
		t.Fatal(err)
	}
	n := begin(t, Config{})
	var conn net.PacketConn
	if err := peer.Do(func() (err error) {
		conn, err = net.ListenPacket("ip6:ipv6-icmp", "fe80::1%eth0")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	all := &net.IPAddr{IP: net.ParseIP("ff02::1"), Zone: "eth0"}
	send := func(b []byte) {
		if err := sendRaw(conn, b, all); err != nil {
			t.Fatal(err)
		}
	}
	send(advertise(0, slaac("2001:db8:1::/64"), rdnss(600, "2001:db8::53"), dnssl(600, "example.org")))
	until(t, "an address and a name server by advertisement", func() bool {
		send(advertise(0, slaac("2001:db8:1::/64"), rdnss(600, "2001:db8::53"), dnssl(600, "example.org")))
		l := nicOf(n)
		return len(l.Addresses) == 1 && len(n.Status().DNS) == 1 && len(l.Routers) == 1
	})
	l := nicOf(n)
	if !netip.MustParsePrefix("2001:db8:1::/64").Contains(l.Addresses[0].Addr()) || l.Source != "ra" || l.Routers[0] != netip.MustParseAddr("fe80::1") || !n.Status().Online {
		t.Errorf("link: %+v", l)
	}
	until(t, "resolv.conf", func() bool {
		b, err := os.ReadFile(n.cfg.ResolvConf)
		return err == nil && strings.Contains(string(b), "nameserver 2001:db8::53\nsearch example.org\n")
	})
	send(advertise(0, rdnss(1, "2001:db8::53"), dnssl(0, "example.org"))) // for a second more
	until(t, "no name server any more", func() bool { s := n.Status(); return len(s.DNS) == 0 && len(s.Search) == 0 })
}

// sendRaw sends with the hop limit that shows that no router was passed.
func sendRaw(conn net.PacketConn, b []byte, to net.Addr) error {
	if err := ipv6.NewPacketConn(conn).SetMulticastHopLimit(255); err != nil {
		return err
	}
	_, err := conn.WriteTo(b, to)
	return err
}

// TestDnsmasq has somebody else's server do all of it at once: DHCP, router advertisements, and addresses by DHCPv6.
func TestDnsmasq(t *testing.T) {
	t.Parallel()
	if !alone.Here(t) {
		return
	}
	peer := alone.NewPeer(t, nicName, nicMAC)
	if err := peer.Up("192.0.2.1/24", "2001:db8:2::1/64", "fe80::1/64"); err != nil {
		t.Fatal(err)
	}
	path, err := exec.LookPath("dnsmasq")
	if err != nil {
		t.Fatalf("%v: build/prerequisites.sh installs it", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	out, err := os.Create(filepath.Join(t.TempDir(), "dnsmasq.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.CommandContext(
		ctx, path, "--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface=eth0", "--bind-interfaces", "--user=root", "--no-hosts", "--no-resolv",
		"--dhcp-leasefile="+filepath.Join(t.TempDir(), "leases"), "--log-dhcp", "--pid-file=", "--dhcp-authoritative", "--no-ping",
		"--dhcp-range=192.0.2.50,192.0.2.60,255.255.255.0,120", "--dhcp-option=option:ntp-server,192.0.2.123", "--dhcp-option=option:dns-server,192.0.2.53",
		"--dhcp-option=option:mtu,1450", "--dhcp-option=option:domain-search,corp.example",
		"--enable-ra", "--dhcp-range=2001:db8:2::100,2001:db8:2::200,64,120", "--dhcp-option=option6:dns-server,[2001:db8:2::53]",
	)
	cmd.Stdout, cmd.Stderr = out, out
	if err := peer.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
		if t.Failed() {
			b, _ := os.ReadFile(out.Name())
			t.Logf("dnsmasq:\n%s", b)
		}
	})
	n := begin(t, Config{})
	v4, v6 := netip.MustParsePrefix("192.0.2.48/28"), netip.MustParsePrefix("2001:db8:2::/119")
	in := func(p netip.Prefix) bool {
		return slices.ContainsFunc(nicOf(n).Addresses, func(a netip.Prefix) bool { return p.Contains(a.Addr()) })
	}
	until(t, "addresses of both families", func() bool { return in(v4) && in(netip.MustParsePrefix("2001:db8:2::/64")) && in(v6) || stop(t, cmd) })
	until(t, "the rest", func() bool {
		s := n.Status()
		return nicOf(n).MTU == 1450 && len(s.DNS) == 2 && len(nicOf(n).Routers) == 2 && s.Online && slices.Contains(s.Search, "corp.example")
	})
	if l := nicOf(n); !strings.Contains(l.Source, "dhcp") || !strings.Contains(l.Source, "dhcpv6") {
		t.Errorf("source: %q", l.Source)
	}
	if got := n.Status().Clock.Servers; !slices.Equal(got, []string{"192.0.2.123"}) {
		t.Errorf("time servers: %q", got)
	}
	if _, err := netlink.RouteGet(net.ParseIP("2001:db8:ffff::1")); err != nil {
		t.Errorf("way out by IPv6: %v", err)
	}
}

// stop fails the test at once where the server is gone.
func stop(t *testing.T, cmd *exec.Cmd) bool {
	t.Helper()
	if cmd.ProcessState != nil {
		t.Fatalf("dnsmasq has ended: %v", cmd.ProcessState)
	}
	return false
}

func TestParseAdvertisement(t *testing.T) {
	a, err := parseAdvertisement(advertise(0xc0, rdnss(60, "2001:db8::53"), rdnss(60, "::1"), rdnss(60, "ff02::1"), dnssl(60, "a.example")))
	if err != nil || !a.managed || !a.other || a.lifetime != 30*time.Minute || len(a.dns) != 1 || a.dns[netip.MustParseAddr("2001:db8::53")] != time.Minute || a.search["a.example"] != time.Minute {
		t.Errorf("%+v, %v", a, err)
	}
	for name, b := range map[string][]byte{
		"short": {134, 0, 0}, "another type": append([]byte{135}, advertise(0)[1:]...), "a code": append([]byte{134, 1}, advertise(0)[2:]...),
		"an option without length": append(advertise(0), 25, 0, 0, 0, 0, 0, 0, 0), "an option that is cut": append(advertise(0), 25, 9, 0, 0, 0, 0, 0, 0),
	} {
		if _, err := parseAdvertisement(b); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	a, err = parseAdvertisement(advertise(0, dnssl(60, "bad\nname.example")))
	if err != nil || len(a.search) != 0 {
		t.Errorf("%+v, %v", a, err)
	}
}

func FuzzAdvertisement(f *testing.F) {
	f.Add(advertise(0xc0, slaac("2001:db8:1::/64"), rdnss(600, "2001:db8::53"), dnssl(600, "example.org")))
	f.Add(advertise(0, []byte{31, 2, 0, 0, 0, 0, 0, 9, 63, 'a', 0, 0, 0, 0, 0, 0}))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := parseAdvertisement(b)
		if err != nil {
			return
		}
		if len(a.dns) > maxAdvertised || len(a.search) > maxAdvertised {
			t.Errorf("%d servers, %d domains", len(a.dns), len(a.search))
		}
		for s := range a.search {
			if !isName(s) {
				t.Errorf("domain %q", s)
			}
		}
		for d := range a.dns {
			if !isHost(d) {
				t.Errorf("server %v", d)
			}
		}
	})
}

func TestParseReply(t *testing.T) {
	message := func(kind dhcpv6.MessageType, options ...dhcpv6.Option) *dhcpv6.Message {
		m, err := dhcpv6.NewMessage()
		if err != nil {
			t.Fatal(err)
		}
		m.MessageType = kind
		for _, o := range options {
			m.AddOption(o)
		}
		return m
	}
	server := dhcpv6.OptServerID(&dhcpv6.DUIDLL{HWType: 1, LinkLayerAddr: nicMAC})
	give := func(addr string, preferred, valid time.Duration) dhcpv6.Option {
		ia := &dhcpv6.OptIANA{}
		ia.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: net.ParseIP(addr), PreferredLifetime: preferred, ValidLifetime: valid})
		return ia
	}
	for _, tc := range []struct {
		name    string
		m       *dhcpv6.Message
		managed bool
		want    string
	}{
		{"an address", message(7, server, give("2001:db8::5", time.Minute, time.Hour)), true, ""},
		{"nothing but names", message(7, server, dhcpv6.OptDNS(net.ParseIP("2001:db8::53"))), false, ""},
		{"no server", message(7, give("2001:db8::5", time.Minute, time.Hour)), true, "name itself"},
		{"no address", message(7, server), true, "no address"},
		{"a void address", message(7, server, give("2001:db8::5", time.Hour, time.Minute)), true, "that can be used"},
		{"of the link", message(7, server, give("fe80::5", time.Minute, time.Hour)), true, "that can be used"},
		{"loopback", message(7, server, give("::1", time.Minute, time.Hour)), true, "that can be used"},
		{"refused", message(7, server, &dhcpv6.OptStatusCode{StatusCode: 1}), true, "refuses"},
	} {
		l, err := parseReply(tc.m, tc.managed, time.Now())
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: %v", tc.name, err)
		}
		if err == nil && tc.managed && (l.t1 <= 0 || l.t1 >= l.t2 || l.t2 >= l.length) {
			t.Errorf("%s: %+v", tc.name, l)
		}
	}
}

func FuzzReply(f *testing.F) {
	m, err := dhcpv6.NewMessage()
	if err != nil {
		f.Fatal(err)
	}
	m.MessageType = dhcpv6.MessageTypeReply
	m.AddOption(dhcpv6.OptServerID(&dhcpv6.DUIDLL{HWType: 1, LinkLayerAddr: nicMAC}))
	ia := &dhcpv6.OptIANA{}
	ia.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: net.ParseIP("2001:db8::5"), PreferredLifetime: time.Minute, ValidLifetime: time.Hour})
	m.AddOption(ia)
	m.AddOption(dhcpv6.OptDNS(net.ParseIP("2001:db8::53")))
	f.Add(m.ToBytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := dhcpv6.MessageFromBytes(b)
		if err != nil {
			return
		}
		l, err := parseReply(m, true, time.Now())
		if err != nil {
			return
		}
		if len(l.addresses) == 0 || l.t1 <= 0 || l.t1 >= l.t2 || l.t2 >= l.length {
			t.Errorf("%+v", l)
		}
		for _, s := range l.search {
			if !isName(s) {
				t.Errorf("domain %q", s)
			}
		}
	})
}
