package network

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Sources of what is known about a NIC.
const (
	static   = "static"
	byDHCP   = "dhcp"
	byRA     = "ra"
	byDHCPv6 = "dhcpv6"
)

// sources in their order of precedence.
var sources = []string{static, byDHCP, byRA, byDHCPv6}

// found is what a source says.
type found struct {
	addresses bool // it has given us some
	dns       []netip.Addr
	search    []string
	ntp       []string
	hostname  string
	expires   time.Time // with a monotonic reading; zero: never, or nothing to expire
	err       string    // why there is nothing, for the console
}

// nic is one NIC, and the work on it.
type nic struct {
	n      *Network
	log    *slog.Logger
	name   string
	index  int
	mac    net.HardwareAddr
	driver string
	order  int // among the NICs, by the kernel's index: earlier ones are preferred
	cfg    Interface

	cancel context.CancelFunc
	ended  sync.WaitGroup
	// The carrier has come: see whether we are still where we were. One for each family.
	plug, plug6 chan struct{}

	// Guarded by n.mu.
	carrier   bool
	mtu       int
	addresses []netip.Prefix
	routers   []netip.Addr
	slaac     bool // an address is of the kernel's making, by router advertisements
	found     map[string]*found
}

// newNIC is called with n.mu held.
func newNIC(n *Network, l netlink.Link, order int) *nic {
	a := l.Attrs()
	c := &nic{
		n: n, log: n.log.With("link", a.Name), name: a.Name, index: a.Index, mac: slices.Clone(a.HardwareAddr), driver: driver(a.Name), order: order,
		plug: make(chan struct{}, 1), plug6: make(chan struct{}, 1), found: map[string]*found{},
	}
	for _, f := range n.cfg.Interfaces {
		if f.Name == "" && f.MAC == "" && order == 0 || f.Name != "" && f.Name == a.Name || f.MAC != "" && f.MAC == a.HardwareAddr.String() {
			c.cfg = f
		}
	}
	return c
}

// driver is the kernel's driver of a NIC; "" where sysfs does not say.
func driver(name string) string {
	path, err := os.Readlink(filepath.Join("/sys/class/net", name, "device/driver"))
	if err != nil {
		return ""
	}
	return filepath.Base(path)
}

// start begins the work.
func (c *nic) start(ctx context.Context) {
	ctx, c.cancel = context.WithCancel(ctx)
	c.ended.Go(func() { c.run(ctx) })
}

// stop ends the work and waits for that.
func (c *nic) stop() {
	c.cancel()
	c.ended.Wait()
}

// observe takes in what the kernel says. It is called with n.mu held.
func (c *nic) observe(l netlink.Link) {
	a := l.Attrs()
	carrier := a.RawFlags&unix.IFF_LOWER_UP != 0 && a.RawFlags&unix.IFF_RUNNING != 0
	if carrier && !c.carrier {
		for _, ch := range []chan struct{}{c.plug, c.plug6} {
			select {
			case ch <- struct{}{}:
			default:
			}
		}
	}
	c.carrier, c.mtu = carrier, a.MTU
	c.addresses, c.routers, c.slaac = nil, nil, false
	addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		c.log.Warn("addresses cannot be listed", "error", err)
		return
	}
	for _, a := range addrs {
		p := prefix(a.IPNet)
		if p.IsValid() && !p.Addr().IsLinkLocalUnicast() && a.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) == 0 {
			c.addresses = append(c.addresses, p)
			// DHCPv6 gives /128, the configuration what lasts.
			c.slaac = c.slaac || p.Addr().Is6() && a.Flags&unix.IFA_F_PERMANENT == 0 && p.Bits() == 64
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteList(l, family)
		if err != nil {
			c.log.Warn("routes cannot be listed", "error", err)
			return
		}
		for _, r := range routes {
			if via, ok := netip.AddrFromSlice(r.Gw); ok && isDefault(r.Dst) && !slices.Contains(c.routers, via.Unmap()) {
				c.routers = append(c.routers, via.Unmap())
			}
		}
	}
}

func isDefault(dst *net.IPNet) bool {
	if dst == nil {
		return true
	}
	ones, _ := dst.Mask.Size()
	return ones == 0 && dst.IP.IsUnspecified()
}

// link is the NIC's part of a Status. It is called with n.mu held.
func (c *nic) link() Link {
	l := Link{
		Name: c.name, MAC: c.mac.String(), Driver: c.driver, Carrier: c.carrier, MTU: c.mtu,
		Addresses: slices.Clone(c.addresses), Routers: slices.Clone(c.routers),
	}
	var from []string
	var errs []string
	for _, s := range sources {
		f := c.found[s]
		switch {
		case f == nil:
		case f.addresses || s == byRA && c.slaac:
			from = append(from, s)
			if !f.expires.IsZero() {
				l.Expires = time.Now().Add(time.Until(f.expires)).Round(time.Second) // the clock may have been stepped since
			}
		case f.err != "":
			errs = append(errs, f.err)
		}
	}
	l.Source = strings.Join(from, "+")
	switch {
	case c.cfg.Disabled:
		l.Error = "disabled by the configuration"
	case !c.carrier:
		l.Error = "no carrier: is it connected?"
	case len(c.addresses) == 0 || c.found[static] != nil && c.found[static].err != "":
		l.Error = strings.Join(errs, "; ")
	}
	return l
}

// tell keeps what a source says from now on; nil is nothing.
func (c *nic) tell(source string, f *found) {
	c.n.mu.Lock()
	c.found[source] = f
	c.n.mu.Unlock()
	c.n.changed()
}

// run configures the NIC and asks for what is not configured, until ctx ends.
func (c *nic) run(ctx context.Context) {
	l, err := netlink.LinkByIndex(c.index)
	if err != nil {
		return // it has gone again
	}
	if c.cfg.Disabled {
		_ = netlink.LinkSetDown(l)
		return
	}
	has := func(six bool) bool {
		return slices.ContainsFunc(c.cfg.Addresses, func(a netip.Prefix) bool { return a.Addr().Is6() == six })
	}
	var routers *router6
	if !has(true) {
		// Machines without IPv6 have no such socket, and need none.
		if routers, err = newRouter6(c); err != nil {
			c.log.Info("router advertisements are not heard", "error", err)
		}
	}
	if err := c.configure(l, has(true)); err != nil {
		if routers != nil {
			routers.conn.Close()
		}
		c.log.Error("the link cannot be configured", "error", err)
		c.tell(static, &found{err: err.Error()})
		if !has(false) && !has(true) {
			c.retire(ctx)
		}
		return
	}
	if len(c.cfg.Addresses) > 0 {
		c.tell(static, &found{addresses: true})
	}
	if !has(false) {
		c.ended.Go(func() { (&dhcp4{nic: c}).run(ctx) })
	}
	if routers != nil {
		c.ended.Go(func() { routers.run(ctx) })
	}
}

// retire forgets the NIC after a while, so that it is tried anew.
func (c *nic) retire(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(retryFilter):
		c.n.mu.Lock()
		if c.n.nics[c.index] == c {
			delete(c.n.nics, c.index)
		}
		c.n.mu.Unlock()
		c.n.changed()
	}
}

// sysctl writes one of the link's settings. Kernels without the family have none.
func (c *nic) sysctl(family, key, value string) {
	path := filepath.Join("/proc/sys/net", family, "conf", c.name, key)
	if err := os.WriteFile(path, []byte(value), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.log.Warn("a setting of the link cannot be changed", "setting", path, "error", err)
	}
}

// configure sets what is known beforehand and raises the link.
func (c *nic) configure(l netlink.Link, static6 bool) error {
	// Router advertisements count even where something below us forwards (2); redirects never do.
	ra := "2"
	if static6 {
		ra = "0"
	}
	for key, value := range map[string]string{"accept_ra": ra, "autoconf": ra, "accept_redirects": "0", "use_tempaddr": "0", "disable_ipv6": "0"} {
		if key == "autoconf" && ra == "2" {
			value = "1"
		}
		c.sysctl("ipv6", key, value)
	}
	for key, value := range map[string]string{"accept_redirects": "0", "send_redirects": "0", "accept_source_route": "0", "arp_notify": "1"} {
		c.sysctl("ipv4", key, value)
	}
	if c.cfg.MTU != 0 {
		if err := netlink.LinkSetMTU(l, c.cfg.MTU); err != nil {
			return fmt.Errorf("mtu %d: the driver takes no such: %w", c.cfg.MTU, err)
		}
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("raise it: %w", err)
	}
	for _, a := range c.cfg.Addresses {
		if err := netlink.AddrReplace(l, &netlink.Addr{IPNet: ipNet(a)}); err != nil {
			return fmt.Errorf("address %s: %w", a, err)
		}
	}
	for _, to := range c.cfg.Routers {
		all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if to.Is6() {
			all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		if err := c.route(Route{To: all, Via: to}, c.cfg.Addresses, unix.RTPROT_STATIC); err != nil {
			return err
		}
	}
	for _, r := range c.cfg.Routes {
		if err := c.route(r, c.cfg.Addresses, unix.RTPROT_STATIC); err != nil {
			return err
		}
	}
	return nil
}

// metric makes earlier NICs the preferred way out.
func (c *nic) metric() int { return 100 + 10*c.order }

// netlinkRoute is a route as the kernel takes it. A router that is on none of the networks is on the link all the same, as clouds with
// addresses of /32 have it.
func (c *nic) netlinkRoute(r Route, networks []netip.Prefix, protocol netlink.RouteProtocol) *netlink.Route {
	kr := &netlink.Route{LinkIndex: c.index, Dst: ipNet(r.To.Masked()), Priority: c.metric(), Protocol: protocol}
	switch {
	case !r.Via.IsValid() || r.Via.IsUnspecified():
		kr.Scope = unix.RT_SCOPE_LINK
	default:
		kr.Gw = r.Via.AsSlice()
		if !r.Via.IsLinkLocalUnicast() && !slices.ContainsFunc(networks, func(p netip.Prefix) bool { return p.Contains(r.Via) }) {
			kr.Flags = int(netlink.FLAG_ONLINK)
		}
	}
	return kr
}

func (c *nic) route(r Route, networks []netip.Prefix, protocol netlink.RouteProtocol) error {
	if err := netlink.RouteReplace(c.netlinkRoute(r, networks, protocol)); err != nil {
		via := "on the link"
		if r.Via.IsValid() {
			via = "via " + r.Via.String()
		}
		return fmt.Errorf("route to %s %s: %w", r.To, via, err)
	}
	return nil
}

// mtuFromNetwork sets an MTU that DHCP named, unless it is configured or makes no sense.
func (c *nic) mtuFromNetwork(mtu int) {
	c.n.mu.Lock()
	now := c.mtu
	c.n.mu.Unlock()
	switch {
	case mtu == 0 || mtu == now || c.cfg.MTU != 0:
		return
	case mtu < leastMTU:
		c.log.Warn("the DHCP server's MTU is too small, it is ignored", "mtu", mtu, "least", leastMTU)
		return
	}
	l, err := netlink.LinkByIndex(c.index)
	if err == nil {
		err = netlink.LinkSetMTU(l, mtu)
	}
	if err != nil {
		c.log.Warn("the DHCP server's MTU cannot be set", "mtu", mtu, "error", err)
	}
}

// address gives the NIC an address which the kernel removes by itself after that long; 0 is never.
func (c *nic) address(p netip.Prefix, valid, preferred time.Duration) error {
	l, err := netlink.LinkByIndex(c.index)
	if err != nil {
		return err
	}
	a := &netlink.Addr{IPNet: ipNet(p)}
	if valid > 0 {
		// Rounded up: before the kernel does we have tried to renew it, or removed it.
		a.ValidLft, a.PreferedLft = int((valid+time.Second-1)/time.Second), int((cmp.Or(preferred, valid)+time.Second-1)/time.Second)
	}
	if p.Addr().Is6() {
		a.Flags |= unix.IFA_F_NOPREFIXROUTE
	}
	if err := netlink.AddrReplace(l, a); err != nil {
		return fmt.Errorf("address %s: %w", p, err)
	}
	return nil
}

// dropAddress removes an address; that it is gone already is fine.
func (c *nic) dropAddress(p netip.Prefix) {
	l, err := netlink.LinkByIndex(c.index)
	if err == nil {
		err = netlink.AddrDel(l, &netlink.Addr{IPNet: ipNet(p)})
	}
	if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) && !errors.Is(err, unix.ENODEV) {
		c.log.Warn("an address cannot be removed", "address", p, "error", err)
	}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefix(n *net.IPNet) netip.Prefix {
	a, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if !ok || bits == 0 {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a.Unmap(), ones)
}

// bindTo has a socket see one link alone.
func bindTo(fd uintptr, name string) error {
	if err := unix.BindToDevice(int(fd), name); err != nil {
		return fmt.Errorf("bind to %s: %w", name, err)
	}
	return unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
}

// dropRoute removes a route; that it is gone already is fine.
func (c *nic) dropRoute(r Route, networks []netip.Prefix) {
	err := netlink.RouteDel(c.netlinkRoute(r, networks, unix.RTPROT_DHCP))
	if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENODEV) {
		c.log.Warn("a route cannot be removed", "to", r.To, "error", err)
	}
}
