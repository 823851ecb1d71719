package network

import (
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
	"github.com/insomniacslk/dhcp/rfc1035label"
	"github.com/vishvananda/netlink"

	"sallyway/internal/appliance/network/firewall"
	"sallyway/internal/lab/alone"
)

// server is a DHCP server on the peer.
type server struct {
	received

	mu      sync.Mutex
	address net.IP
	options []dhcpv4.Option
	silent  map[string]bool // kinds of messages that are not answered
	nak     map[string]bool // or refused
}

// kind names what a client's message is for (RFC 2131 section 4.3.2).
func kind(m *dhcpv4.DHCPv4, peer net.Addr) string {
	switch {
	case m.MessageType() == dhcpv4.MessageTypeDiscover:
		return "discover"
	case m.ServerIdentifier() != nil:
		return "select"
	case m.RequestedIPAddress() != nil:
		return "reboot"
	case peer.(*net.UDPAddr).IP.Equal(net.IPv4bcast):
		return "from nowhere" // renewals come from the address
	}
	return "renew"
}

// newServer serves on the peer's end of the wire.
func newServer(t *testing.T, p *alone.Peer, options ...dhcpv4.Option) *server {
	t.Helper()
	s := &server{address: net.IPv4(192, 0, 2, 10), options: options, silent: map[string]bool{}, nak: map[string]bool{}}
	if err := p.Do(func() error {
		srv, err := server4.NewServer("eth0", &net.UDPAddr{Port: 67}, s.answer)
		if err != nil {
			return err
		}
		t.Cleanup(func() { srv.Close() })
		go func() { _ = srv.Serve() }()
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *server) answer(conn net.PacketConn, peer net.Addr, m *dhcpv4.DHCPv4) {
	k := kind(m, peer)
	s.add(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.silent[k] {
		return
	}
	reply := dhcpv4.MessageTypeAck
	switch {
	case s.nak[k]:
		reply = dhcpv4.MessageTypeNak
	case k == "discover":
		reply = dhcpv4.MessageTypeOffer
	}
	r, err := dhcpv4.NewReplyFromRequest(m, dhcpv4.WithMessageType(reply), dhcpv4.WithYourIP(s.address),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(192, 0, 2, 1))))
	if err != nil {
		panic(err)
	}
	for _, o := range s.options {
		r.UpdateOption(o)
	}
	_, _ = conn.WriteTo(r.ToBytes(), peer)
}

func (s *server) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func lifetime(lease, t1, t2 time.Duration) []dhcpv4.Option {
	return []dhcpv4.Option{
		dhcpv4.OptSubnetMask(net.CIDRMask(24, 32)), dhcpv4.OptRouter(net.IPv4(192, 0, 2, 1)),
		dhcpv4.OptIPAddressLeaseTime(lease), dhcpv4.OptRenewTimeValue(t1),
		dhcpv4.OptGeneric(dhcpv4.OptionRebindingTimeValue, dhcpv4.Duration(t2).ToBytes()),
	}
}

func TestLease(t *testing.T) {
	t.Parallel()
	if !alone.Here(t) {
		return
	}
	peer := alone.NewPeer(t, nicName, nicMAC)
	if err := peer.Up("192.0.2.1/24"); err != nil {
		t.Fatal(err)
	}
	route := func(to string, via net.IP) *dhcpv4.Route {
		_, n, err := net.ParseCIDR(to)
		if err != nil {
			t.Fatal(err)
		}
		return &dhcpv4.Route{Dest: n, Router: via}
	}
	newServer(
		t, peer,
		append(
			lifetime(time.Hour, 0, 0),
			dhcpv4.OptDNS(net.IPv4(192, 0, 2, 53), net.IPv4(127, 0, 0, 1), net.IPv4(0, 0, 0, 0)),
			dhcpv4.OptDomainSearch(&rfc1035label.Labels{Labels: []string{"example.org", "bad\nnameserver 203.0.113.1"}}),
			dhcpv4.OptHostName("from-dhcp"), dhcpv4.OptNTPServers(net.IPv4(192, 0, 2, 123)),
			dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, []byte{0x05, 0x78}), // 1400
			dhcpv4.OptClasslessStaticRoute(
				route("0.0.0.0/0", net.IPv4(203, 0, 113, 1)), // not on the link, as on some clouds
				route("198.51.100.0/24", net.IPv4(192, 0, 2, 7)), route("10.9.0.0/16", net.IPv4zero),
			),
		)...,
	)
	n := begin(t, Config{})
	<-n.Online()
	until(t, "everything", func() bool {
		s := n.Status()
		return s.Hostname == "from-dhcp" && nicOf(n).MTU == 1400 && len(s.DNS) == 1
	})
	if err := firewall.Verify(nil); err != nil {
		t.Error(err)
	}
	l := nicOf(n)
	if !slices.Equal(l.Addresses, addresses("192.0.2.10/24")) || l.Source != "dhcp" || l.Error != "" || time.Until(l.Expires) < 50*time.Minute {
		t.Errorf("link: %+v", l)
	}
	b, err := os.ReadFile(n.cfg.ResolvConf)
	if err != nil || string(b) != "# Written by the appliance; changes are lost.\nnameserver 192.0.2.53\nsearch example.org\n" {
		t.Errorf("resolv.conf: %q, %v", b, err)
	}
	if got := n.Status().Clock.Servers; !slices.Equal(got, []string{"192.0.2.123"}) {
		t.Errorf("time servers: %q", got)
	}
	for to, via := range map[string]string{"8.8.8.8": "203.0.113.1", "198.51.100.9": "192.0.2.7", "10.9.1.1": "<nil>"} {
		r, err := netlink.RouteGet(net.ParseIP(to))
		if err != nil || len(r) != 1 || r[0].Gw.String() != via {
			t.Errorf("to %s: %v, %v; want via %s", to, r, err, via)
		}
	}
}

// TestLeaseLife renews with the server, then with any, loses the address when nobody answers, and gets one again.
func TestLeaseLife(t *testing.T) {
	t.Parallel()
	if !alone.Here(t) {
		return
	}
	peer := alone.NewPeer(t, nicName, nicMAC)
	if err := peer.Up("192.0.2.1/24"); err != nil {
		t.Fatal(err)
	}
	s := newServer(t, peer, append(lifetime(3*time.Second, time.Second, 2*time.Second), dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, []byte{2, 64}))...)
	n := begin(t, Config{})
	<-n.Online()
	if mtu := nicOf(n).MTU; mtu != 1500 {
		t.Errorf("an MTU of 576 made %d", mtu)
	}
	until(t, "a renewal", func() bool { return s.has("renew") })
	if s.has("from nowhere") {
		t.Error("a renewal came from no address")
	}
	first := nicOf(n).Expires
	until(t, "more time", func() bool { return nicOf(n).Expires.After(first) })

	// Nobody answers: the address is kept for as long as the lease lasts.
	s.set(func() { s.silent["renew"], s.silent["discover"] = true, true })
	began := time.Now()
	until(t, "no address", func() bool { return len(nicOf(n).Addresses) == 0 && len(nicOf(n).Routers) == 0 })
	if d := time.Since(began); d < time.Second {
		t.Errorf("the address was gone after %v", d)
	}
	until(t, "a word about it", func() bool {
		return strings.Contains(nicOf(n).Error, "expired") || strings.Contains(nicOf(n).Error, "answers")
	})
	if n.Status().Online {
		t.Error("online without an address")
	}

	// There is one again, another one.
	s.set(func() {
		clear(s.silent)
		s.address = net.IPv4(192, 0, 2, 11)
		s.options = lifetime(time.Hour, 0, 0)
	})
	until(t, "the new address", func() bool { return slices.Equal(nicOf(n).Addresses, addresses("192.0.2.11/24")) && n.Status().Online })

	// The cable was out and in: the client asks whether it is still there, and the network is another one.
	s.set(func() {
		s.nak["reboot"] = true
		s.address = net.IPv4(192, 0, 2, 12)
	})
	for _, up := range []bool{false, true} {
		if err := peer.Do(func() error {
			l, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			if up {
				return netlink.LinkSetUp(l)
			}
			return netlink.LinkSetDown(l)
		}); err != nil {
			t.Fatal(err)
		}
		if !up {
			until(t, "no carrier", func() bool { return !nicOf(n).Carrier })
			if got := nicOf(n).Addresses; !slices.Equal(got, addresses("192.0.2.11/24")) {
				t.Errorf("without a carrier the lease goes on, not %v", got)
			}
		}
	}
	until(t, "the other network's address", func() bool { return slices.Equal(nicOf(n).Addresses, addresses("192.0.2.12/24")) })
	if !s.has("reboot") {
		t.Error("nobody asked about the old address")
	}
}

func TestParseLease(t *testing.T) {
	ack := func(address net.IP, options ...dhcpv4.Option) *dhcpv4.DHCPv4 {
		m, err := dhcpv4.New(dhcpv4.WithMessageType(dhcpv4.MessageTypeAck), dhcpv4.WithYourIP(address),
			dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(192, 0, 2, 1))), dhcpv4.WithOption(dhcpv4.OptIPAddressLeaseTime(time.Hour)))
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range options {
			m.UpdateOption(o)
		}
		return m
	}
	good := net.IPv4(10, 1, 2, 3)
	for _, tc := range []struct {
		name string
		m    *dhcpv4.DHCPv4
		want string // a part of the error
		ok   func(*lease) bool
	}{
		{"no mask: the class's", ack(good), "", func(l *lease) bool { return l.address.Bits() == 8 }},
		{"times by default", ack(good), "", func(l *lease) bool { return l.t1 == 30*time.Minute && l.t2 == 52*time.Minute+30*time.Second }},
		{"T1 after the end", ack(good, lifetime(time.Hour, 2*time.Hour, 3*time.Hour)...), "", func(l *lease) bool { return l.t1 < l.t2 && l.t2 < l.length }},
		{"without end", ack(good, dhcpv4.OptIPAddressLeaseTime(forever*time.Second)), "", func(l *lease) bool { return l.unlimited }},
		{"very short", ack(good, dhcpv4.OptIPAddressLeaseTime(time.Second)), "", func(l *lease) bool { return l.length == shortestLease && l.t1 > 0 }},
		{"loopback", ack(net.IPv4(127, 0, 0, 1)), "none for a host", nil},
		{"no address", ack(net.IPv4zero), "none for a host", nil},
		{"broadcast", ack(net.IPv4bcast), "none for a host", nil},
		{"no lease time", ack(good, dhcpv4.OptIPAddressLeaseTime(0)), "no lease time", nil},
		{"mask with holes", ack(good, dhcpv4.OptGeneric(dhcpv4.OptionSubnetMask, []byte{255, 0, 255, 0})), "which is none", nil},
		{"no server", ack(good, dhcpv4.OptServerIdentifier(net.IPv4zero)), "", func(l *lease) bool { return true }},
		{"a router that is none", ack(good, dhcpv4.OptRouter(net.IPv4zero, net.IPv4(10, 0, 0, 1))), "", func(l *lease) bool {
			return len(l.routes) == 1 && l.routes[0].Via == netip.MustParseAddr("10.0.0.1")
		}},
	} {
		l, err := parseLease(tc.m, time.Now())
		switch {
		case tc.want == "" && err != nil, tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("%s: %v", tc.name, err)
		case err == nil && !tc.ok(l):
			t.Errorf("%s: %+v", tc.name, l)
		}
	}
}

// FuzzLease holds that whatever a server says, what comes out can be set on a link and written to a file.
func FuzzLease(f *testing.F) {
	m, err := dhcpv4.New(dhcpv4.WithMessageType(dhcpv4.MessageTypeAck), dhcpv4.WithYourIP(net.IPv4(192, 0, 2, 10)))
	if err != nil {
		f.Fatal(err)
	}
	for _, o := range append(lifetime(time.Hour, 0, 0), dhcpv4.OptDNS(net.IPv4(192, 0, 2, 53)), dhcpv4.OptHostName("x"),
		dhcpv4.OptServerIdentifier(net.IPv4(192, 0, 2, 1)), dhcpv4.OptDomainSearch(&rfc1035label.Labels{Labels: []string{"example.org"}}),
		dhcpv4.OptClasslessStaticRoute(&dhcpv4.Route{Dest: &net.IPNet{IP: net.IPv4(10, 0, 0, 0), Mask: net.CIDRMask(8, 32)}, Router: net.IPv4(192, 0, 2, 1)})) {
		m.UpdateOption(o)
	}
	f.Add(m.ToBytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := dhcpv4.FromBytes(b)
		if err != nil {
			return
		}
		l, err := parseLease(m, time.Now())
		if err != nil {
			return
		}
		if !isHost(l.address.Addr()) || l.address.Bits() < 1 || l.length < shortestLease || l.t1 <= 0 || l.t1 >= l.t2 || l.t2 >= l.length {
			t.Errorf("%+v", l)
		}
		text := string(resolvConf(l.dns, l.search))
		for line := range strings.Lines(text) {
			if !strings.HasPrefix(line, "nameserver ") && !strings.HasPrefix(line, "search ") && !strings.HasPrefix(line, "# ") {
				t.Errorf("resolv.conf: %q", text)
			}
		}
		if l.hostname != "" && !isName(l.hostname) || len(l.routes) > maxRoutes {
			t.Errorf("%+v", l)
		}
	})
}
