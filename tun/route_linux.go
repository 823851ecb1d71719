package tun

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// routeProtocol marks the routes that are ours (rtnetlink(7): above RTPROT_STATIC are free for daemons).
	routeProtocol = 113

	// routeCongestion is the congestion control of the host's own connections through the TUN: the first hop is a memory
	// copy, so nothing is gained by a pacing one such as bbr.
	routeCongestion = "cubic"

	// routeInitCwnd is the initial window of those connections, segments. There is no network to be careful of before
	// netstack, and its receive buffer of 1 MiB holds this.
	routeInitCwnd = 128
)

// SetAddresses makes addrs the addresses of the device: adds those it lacks, removes the others. IPv6 addresses are left
// out where the host has IPv6 off (see IPv6).
func (d *Device) SetAddresses(addrs []netip.Prefix) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	want := map[netip.Prefix]bool{}
	for _, p := range addrs {
		if !p.IsValid() {
			return fmt.Errorf("address %v: not valid", p)
		}
		p = netip.PrefixFrom(p.Addr().Unmap().WithZone(""), p.Bits())
		if p.Addr().Is6() && !d.ipv6 {
			continue
		}
		want[p] = true
	}
	have, err := d.nl.AddrList(d.link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", d.name, err)
	}
	var errs []error
	for _, a := range have {
		p, ok := prefixFromIPNet(a.IPNet)
		switch {
		case !ok || p.Addr().IsLinkLocalUnicast():
		case want[p]:
			delete(want, p)
		default:
			if err := d.nl.AddrDel(d.link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				errs = append(errs, fmt.Errorf("remove address %v: %w", p, err))
			}
		}
	}
	for p := range want {
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD // nobody else is on this link
		}
		// No prefix route: SetRoutes alone says what goes into the device.
		a.Flags |= unix.IFA_F_NOPREFIXROUTE
		if err := d.nl.AddrAdd(d.link, a); err != nil && !errors.Is(err, unix.EEXIST) {
			errs = append(errs, fmt.Errorf("add address %v: %w", p, permission(err)))
			continue
		}
		if p.Addr().Is6() {
			d.awaitLocal(p.Addr())
		}
	}
	return errors.Join(errs...)
}

const (
	localPoll = time.Millisecond
	localWait = time.Second
)

// awaitLocal waits until the kernel takes packets to a new IPv6 address: it makes the local route on a work queue, and
// answers with unreachable until then.
func (d *Device) awaitLocal(a netip.Addr) {
	for end := time.Now().Add(localWait); time.Now().Before(end); time.Sleep(localPoll) {
		rs, err := d.nl.RouteGet(a.AsSlice())
		if err == nil && len(rs) > 0 && rs[0].Type == unix.RTN_LOCAL {
			return
		}
	}
}

// SetOwnResolvers says which resolvers of the host are our own, as split DNS has named them there: routes may cover these.
func (d *Device) SetOwnResolvers(addrs []netip.Addr) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ownResolvers = slices.Clone(addrs)
}

// SetRoutes makes wanted the routes into the device: adds those that are missing, removes its earlier ones that are no
// longer wanted or have become dangerous. A prefix that would cut the host off from something (see Hazards), and one that
// somebody else has routed already, is left out and comes back with the reason. protected are more addresses that must
// stay outside: the platform, the relays. What is dangerous changes with the host's network: call it again when Watch says so.
func (d *Device) SetRoutes(wanted []netip.Prefix, protected []netip.Addr) (skipped []SkippedRoute, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	h, err := d.hazardsLocked()
	if err != nil {
		return nil, err
	}
	h.Protected = protected
	ok, skipped := h.partition(wanted)
	if !d.ipv6 {
		ok = slices.DeleteFunc(ok, func(p netip.Prefix) bool {
			if p.Addr().Is6() {
				skipped = append(skipped, SkippedRoute{p, "IPv6 is off on this host"})
			}
			return p.Addr().Is6()
		})
	}
	have, err := d.ownRoutes()
	if err != nil {
		return skipped, err
	}
	var errs []error
	for p, r := range have {
		if slices.Contains(ok, p) {
			continue
		}
		if err := d.nl.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("remove route %v: %w", p, err))
		}
	}
	for _, p := range ok {
		if _, there := have[p]; there {
			continue
		}
		switch err := d.addRoute(p); {
		case errors.Is(err, unix.EEXIST):
			skipped = append(skipped, SkippedRoute{p, "has a route already"})
		case err != nil:
			errs = append(errs, fmt.Errorf("add route %v: %w", p, permission(err)))
		}
	}
	return skipped, errors.Join(errs...)
}

// Routes returns the routes that SetRoutes has set and that are still there, sorted.
func (d *Device) Routes() ([]netip.Prefix, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	have, err := d.ownRoutes()
	if err != nil {
		return nil, err
	}
	var ps []netip.Prefix
	for p := range have {
		ps = append(ps, p)
	}
	slices.SortFunc(ps, comparePrefix)
	return ps, nil
}

func (d *Device) ownRoutes() (map[netip.Prefix]netlink.Route, error) {
	filter := &netlink.Route{LinkIndex: d.Index(), Protocol: routeProtocol}
	rs, err := d.nl.RouteListFiltered(netlink.FAMILY_ALL, filter, netlink.RT_FILTER_OIF|netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return nil, fmt.Errorf("list routes of %s: %w", d.name, err)
	}
	have := map[netip.Prefix]netlink.Route{}
	for _, r := range rs {
		if p, ok := prefixFromIPNet(r.Dst); ok {
			have[p] = r
		}
	}
	return have, nil
}

func (d *Device) addRoute(p netip.Prefix) error {
	r := &netlink.Route{
		LinkIndex: d.Index(),
		Dst:       ipNet(p),
		Protocol:  routeProtocol,
		InitCwnd:  routeInitCwnd,
		Congctl:   routeCongestion,
	}
	if p.Addr().Is4() {
		r.Scope = netlink.SCOPE_LINK
	}
	err := d.nl.RouteAdd(r)
	if err == nil || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EPERM) {
		return err
	}
	// The kernel may lack cubic or the metric: the route matters more than its speed.
	r.Congctl, r.InitCwnd = "", 0
	return d.nl.RouteAdd(r)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefixFromIPNet(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	if ok && len(n.Mask) == net.IPv4len {
		a = a.Unmap()
	}
	return netip.PrefixFrom(a, ones), ok
}
