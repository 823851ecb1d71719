package tun

import (
	"fmt"
	"net/netip"
	"slices"
)

// Hazards are the addresses of a host that no route of ours may take away from it. The zero value knows only what is
// wrong on every host.
type Hazards struct {
	Connected []Subnet     // what the host reaches without a gateway
	Gateways  []netip.Addr // next hops of its default routes
	Resolvers []netip.Addr // its DNS servers
	Logins    []netip.Addr // peers of live ssh logins
	Protected []netip.Addr // what the caller named: the platform, the relays
}

// Subnet is a connected subnet and the interface that it is on.
type Subnet struct {
	Prefix    netip.Prefix
	Interface string
}

// special are the prefixes that mean something on every host, and no route of ours may touch.
var special = []struct {
	prefix netip.Prefix
	what   string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "this network (0.0.0.0/8)"},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback (127.0.0.0/8)"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local (169.254.0.0/16)"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast (224.0.0.0/4)"},
	{netip.MustParsePrefix("255.255.255.255/32"), "broadcast (255.255.255.255)"},
	{netip.MustParsePrefix("::/127"), "loopback (::1)"},
	{netip.MustParsePrefix("::ffff:0:0/96"), "IPv4-mapped addresses (::ffff:0:0/96)"},
	{netip.MustParsePrefix("fe80::/10"), "link-local (fe80::/10)"},
	{netip.MustParsePrefix("ff00::/8"), "multicast (ff00::/8)"},
}

// Check returns why p must not be routed into the TUN, or "" where it may be. A connected subnet is in the way whether p
// contains it or lies within it: the one would move the subnet to the TUN where it is the same size, the other would take
// neighbours away. A subnet of a single address is the host's own and is not taken away by any route.
func (h Hazards) Check(p netip.Prefix) string {
	if !p.IsValid() {
		return "is not a prefix"
	}
	if p.Bits() == 0 {
		return "is a default route"
	}
	p = p.Masked()
	for _, s := range special {
		if p.Overlaps(s.prefix) {
			return "touches " + s.what
		}
	}
	for _, s := range h.Connected {
		c := s.Prefix.Masked()
		if c.IsSingleIP() || !p.Overlaps(c) {
			continue
		}
		if p.Bits() <= c.Bits() {
			return fmt.Sprintf("covers the subnet %v of %s", c, s.Interface)
		}
		return fmt.Sprintf("lies within the subnet %v of %s", c, s.Interface)
	}
	for _, set := range []struct {
		addrs []netip.Addr
		what  string
	}{
		{h.Gateways, "the default gateway"},
		{h.Resolvers, "the DNS resolver"},
		{h.Logins, "the peer of a live ssh login,"},
		{h.Protected, "the address of the platform or a relay,"},
	} {
		for _, a := range set.addrs {
			if p.Contains(a.Unmap().WithZone("")) {
				return fmt.Sprintf("covers %s %v", set.what, a.Unmap())
			}
		}
	}
	return ""
}

// partition splits wanted into what may be routed, sorted and without doubles, and what may not.
func (h Hazards) partition(wanted []netip.Prefix) (ok []netip.Prefix, skipped []SkippedRoute) {
	for _, p := range wanted {
		if reason := h.Check(p); reason != "" {
			skipped = append(skipped, SkippedRoute{p, reason})
			continue
		}
		ok = append(ok, p.Masked())
	}
	slices.SortFunc(ok, comparePrefix)
	return slices.Compact(ok), skipped
}

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}
