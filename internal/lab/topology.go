package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The sites around the router. Each has a /28 of 203.0.113.0/24 and a /64 of 2001:db8::/32: the router is the first address
// in both, the host the second.
const (
	siteClient = iota + 1
	sitePlatform
	siteRelay1
	siteRelay2
	siteGateway
	siteGateway2
	sitePeer
)

// site is a host's place at the router.
type site struct {
	n    int
	name string
}

func (s site) link() string { return "to-" + s.name }

func (s site) v4(host byte) netip.Addr {
	return netip.AddrFrom4([4]byte{203, 0, 113, byte(s.n)*16 + host})
}

func (s site) v6(host byte) netip.Addr {
	a := netip.MustParseAddr("2001:db8::").As16()
	a[5], a[15] = byte(s.n), host
	return netip.AddrFrom16(a)
}

// Addresses inside of the private networks. The gateways have .1 in theirs.
var (
	PrivateNet  = netip.MustParsePrefix("10.20.0.0/24")
	PrivateNet6 = netip.MustParsePrefix("fd20::/64")
	Private2Net = netip.MustParsePrefix("10.30.0.0/24")

	WebAddr     = netip.MustParseAddr("10.20.0.10")
	WebAddr6    = netip.MustParseAddr("fd20::10")
	DBAddr      = netip.MustParseAddr("10.20.0.11")
	SSHAddr     = netip.MustParseAddr("10.20.0.12")
	DNSAddr     = netip.MustParseAddr("10.20.0.53")
	NobodyAddr  = netip.MustParseAddr("10.20.0.99") // in the private network, and no host has it
	Private2Web = netip.MustParseAddr("10.30.0.10")

	// RawAddr is a private address that Config.Raw makes reachable without any Sallyway.
	RawAddr = netip.MustParseAddr("10.99.0.10")
)

// FilteredPort is dropped by the private hosts' firewall; nothing listens on ClosedPort.
const (
	FilteredPort = 4444
	ClosedPort   = 4445
)

const (
	natNet  = "192.168.77.0/24" // behind a site's own router, when Config.NAT asks for one
	lanMTU  = 1500
	maxMTU  = 65535
	minMTU  = 1280
	loopDev = "lo"
)

// wire is a veth pair to be laid.
type wire struct {
	a, b         *Host
	aName, bName string
	mtu          int
	aAddr, bAddr []string // prefixes such as 10.0.0.1/24
	kind         Wire
}

// lay makes the pair, moves both ends where they belong, and configures them.
func lay(w wire) error {
	err := w.a.Do(func() error {
		v := &netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: w.aName, MTU: w.mtu},
			PeerName:      w.bName,
			PeerNamespace: netlink.NsFd(int(w.b.netns.Fd())),
			PeerMTU:       uint32(w.mtu),
		}
		if err := netlink.LinkAdd(v); err != nil {
			return err
		}
		return errors.Join(raise(w.aName, w.aAddr), w.kind.apply(w.aName))
	})
	if err == nil {
		err = w.b.Do(func() error { return errors.Join(raise(w.bName, w.bAddr), w.kind.apply(w.bName)) })
	}
	if err != nil {
		return fmt.Errorf("veth %s on %s to %s on %s: %w", w.aName, w.a.Name, w.bName, w.b.Name, err)
	}
	return nil
}

// raise gives a link of the calling thread's namespace its addresses and brings it up.
func raise(name string, addrs []string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	for _, a := range addrs {
		if err := addAddr(link, a); err != nil {
			return err
		}
	}
	return nil
}

func addAddr(link netlink.Link, prefix string) error {
	a, err := netlink.ParseAddr(prefix)
	if err != nil {
		return err
	}
	if a.IP.To4() == nil {
		a.Flags = unix.IFA_F_NODAD // usable at once
	}
	if err := netlink.AddrAdd(link, a); err != nil {
		return fmt.Errorf("address %s: %w", prefix, err)
	}
	return nil
}

// route adds a route on the calling thread's namespace; an empty prefix is the default route.
func route(prefix, via, dev string) error {
	r := &netlink.Route{}
	if via != "" {
		r.Gw = net.ParseIP(via)
	}
	if dev != "" {
		link, err := netlink.LinkByName(dev)
		if err != nil {
			return err
		}
		r.LinkIndex = link.Attrs().Index
	}
	if prefix == "" {
		prefix = "0.0.0.0/0"
		if strings.Contains(via, ":") {
			prefix = "::/0"
		}
	}
	_, dst, err := net.ParseCIDR(prefix)
	if err != nil {
		return err
	}
	r.Dst = dst
	if err := netlink.RouteReplace(r); err != nil {
		return fmt.Errorf("route %s via %s%s: %w", prefix, via, dev, err)
	}
	return nil
}

// forward lets the calling thread's namespace route. The kernel resolves /proc/sys/net by the thread that opens it.
func forward() error {
	return errors.Join(
		os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0),
		os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0),
	)
}

// allowPing lets every user send ICMP echo on the calling thread's namespace, as most distributions do.
func allowPing() error {
	return os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0)
}

// layOut makes all hosts, wires, routes and filters.
func (l *Lab) layOut() error {
	var err error
	host := func(name string) *Host {
		if err != nil {
			return nil
		}
		var h *Host
		if h, err = newHost(l, name); err == nil {
			l.hosts = append(l.hosts, h)
			err = h.Do(allowPing)
		}
		return h
	}
	l.Router, l.Client, l.Platform = host("router"), host("client"), host("platform")
	l.Relay1, l.Relay2 = host("relay1"), host("relay2")
	l.Gateway, l.Gateway2 = host("gateway"), host("gateway2")
	l.Private, l.Private2, l.Peer = host("private"), host("private2"), host("peer")
	if err != nil {
		return err
	}
	if err := l.Router.Do(forward); err != nil {
		return err
	}
	for _, s := range []struct {
		site
		h   *Host
		nat bool
	}{
		{site{siteClient, "client"}, l.Client, l.cfg.NAT},
		{site{sitePlatform, "platform"}, l.Platform, false},
		{site{siteRelay1, "relay1"}, l.Relay1, false},
		{site{siteRelay2, "relay2"}, l.Relay2, false},
		{site{siteGateway, "gateway"}, l.Gateway, l.cfg.NAT},
		{site{siteGateway2, "gateway2"}, l.Gateway2, l.cfg.NAT},
		{site{sitePeer, "peer"}, l.Peer, false},
	} {
		if err := l.connect(s.site, s.h, s.nat); err != nil {
			return err
		}
	}
	if err := l.layPrivate(); err != nil {
		return err
	}
	if err := l.Router.Do(func() error { return routerFilter(l.cfg) }); err != nil {
		return fmt.Errorf("filter of the router: %w", err)
	}
	return nil
}

// connect wires a host to the router, with a masquerading router of the site's own in between when nat is set.
func (l *Lab) connect(s site, h *Host, nat bool) error {
	w := wire{
		a: l.Router, aName: s.link(), aAddr: []string{s.v4(1).String() + "/28", s.v6(1).String() + "/64"},
		b: h, bName: "eth0", bAddr: []string{s.v4(2).String() + "/28", s.v6(2).String() + "/64"}, mtu: l.cfg.MTU, kind: l.cfg.Wire,
	}
	outer := lay
	if s.n == siteClient && l.cfg.Access != nil {
		outer = l.layAccess
	}
	if !nat {
		if err := outer(w); err != nil {
			return err
		}
		return h.Do(func() error {
			return errors.Join(route("", s.v4(1).String(), ""), route("", s.v6(1).String(), ""))
		})
	}
	box, err := newHost(l, s.name+"-router")
	if err != nil {
		return err
	}
	l.hosts = append(l.hosts, box)
	w.b = box
	if err := outer(w); err != nil {
		return err
	}
	inside := wire{a: box, aName: "lan0", aAddr: []string{"192.168.77.1/24"}, b: h, bName: "eth0", bAddr: []string{"192.168.77.2/24"}, mtu: l.cfg.MTU, kind: l.cfg.Wire}
	if err := lay(inside); err != nil {
		return err
	}
	err = box.Do(func() error {
		return errors.Join(forward(), route("", s.v4(1).String(), ""), masquerade("eth0"))
	})
	if err != nil {
		return fmt.Errorf("router of site %s: %w", s.name, err)
	}
	return h.Do(func() error { return route("", "192.168.77.1", "") })
}

// layPrivate wires the private networks behind the gateways. Their hosts have no default route: they answer the gateway and
// nobody else.
func (l *Lab) layPrivate() error {
	private := wire{
		a: l.Gateway, aName: "lan0", aAddr: []string{"10.20.0.1/24", "fd20::1/64"},
		b: l.Private, bName: "lan0", bAddr: []string{
			WebAddr.String() + "/24", WebAddr6.String() + "/64", DBAddr.String() + "/24", SSHAddr.String() + "/24", DNSAddr.String() + "/24",
		}, mtu: lanMTU, kind: l.cfg.Wire,
	}
	private2 := wire{
		a: l.Gateway2, aName: "lan0", aAddr: []string{"10.30.0.1/24", "fd30::1/64"},
		b: l.Private2, bName: "lan0", bAddr: []string{Private2Web.String() + "/24", "fd30::10/64"}, mtu: lanMTU, kind: l.cfg.Wire,
	}
	if err := errors.Join(lay(private), lay(private2)); err != nil {
		return err
	}
	for _, h := range []*Host{l.Private, l.Private2} {
		if err := h.Do(func() error { return dropPort(FilteredPort) }); err != nil {
			return fmt.Errorf("filter of %s: %w", h.Name, err)
		}
	}
	if !l.cfg.Raw {
		return nil
	}
	// The way that does without Sallyway: routed, forwarded by the gateway's kernel.
	gw := site{siteGateway, "gateway"}
	return errors.Join(
		l.Private.Do(func() error {
			lan, err := netlink.LinkByName("lan0")
			if err != nil {
				return err
			}
			return errors.Join(addAddr(lan, RawAddr.String()+"/32"), route("", "10.20.0.1", ""))
		}),
		l.Gateway.Do(func() error { return errors.Join(forward(), route(RawAddr.String()+"/32", "", "lan0")) }),
		l.Router.Do(func() error { return route(RawAddr.String()+"/32", gw.v4(2).String(), "") }),
	)
}

// Addr returns a host's address at the router: its public one, or the one of its site's router where that masquerades.
func (l *Lab) Addr(h *Host) netip.Addr {
	for n, s := range map[int]*Host{
		siteClient: l.Client, sitePlatform: l.Platform, siteRelay1: l.Relay1, siteRelay2: l.Relay2,
		siteGateway: l.Gateway, siteGateway2: l.Gateway2, sitePeer: l.Peer,
	} {
		if s == h {
			return site{n: n}.v4(2)
		}
	}
	return netip.Addr{}
}

// ResolverAddr is where the lab's public DNS server answers the client.
func (l *Lab) ResolverAddr() netip.Addr { return site{n: siteClient}.v4(1) }

// MoveClient takes the client's address away and gives it another one, as a laptop that changes networks. It returns the
// new address. A client behind NAT keeps its own, and its router's changes.
func (l *Lab) MoveClient() (netip.Addr, error) {
	s := site{siteClient, "client"}
	from, to := s.v4(2+byte(l.moves%2)), s.v4(3-byte(l.moves%2))
	h := l.Client
	if l.cfg.NAT {
		h = l.host("client-router")
	}
	err := h.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		old, err := netlink.ParseAddr(from.String() + "/28")
		if err != nil {
			return err
		}
		if err := netlink.AddrDel(link, old); err != nil {
			return err
		}
		return errors.Join(addAddr(link, to.String()+"/28"), route("", s.v4(1).String(), ""))
	})
	if err != nil {
		return netip.Addr{}, fmt.Errorf("move the client: %w", err)
	}
	l.moves++
	return to, nil
}

func (l *Lab) host(name string) *Host {
	for _, h := range l.hosts {
		if h.Name == name {
			return h
		}
	}
	return nil
}

// linkBytes reads how much a link of the calling thread's namespace has carried.
func linkBytes(name string) (rx, tx uint64, err error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return 0, 0, err
	}
	s := link.Attrs().Statistics
	return s.RxBytes, s.TxBytes, nil
}
