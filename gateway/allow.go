package gateway

import (
	"fmt"
	"net/netip"
	"strings"

	"sallyway/internal/policy"
)

// AllowList is the gateway's own upper bound on what may be reached through it: no message of a platform can widen it. The zero
// AllowList allows everything but the special addresses.
type AllowList struct {
	entries []allowEntry
	own     []netip.AddrPort // sockets of the gateway itself
}

type allowEntry struct {
	prefix netip.Prefix
	ports  []policy.PortRange // empty: all, and ICMP
}

// special are the addresses that only an entry which lies inside of them opens: this host, its link, clouds' metadata services, and what
// is no unicast destination. Most clouds' metadata is link-local (169.254.169.254); the others are named.
var special = []struct {
	prefix netip.Prefix
	what   string
}{
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("::1/128"), "loopback"},
	{netip.MustParsePrefix("0.0.0.0/8"), "unspecified"},
	{netip.MustParsePrefix("::/128"), "unspecified"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local or metadata"},
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("fec0::/10"), "site-local"},
	{netip.MustParsePrefix("fd00:ec2::254/128"), "metadata"},
	{netip.MustParsePrefix("fd20:ce::254/128"), "metadata"},
	{netip.MustParsePrefix("100.100.100.200/32"), "metadata"},
	{netip.MustParsePrefix("192.0.0.192/32"), "metadata"},
	{netip.MustParsePrefix("168.63.129.16/32"), "metadata"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
	{netip.MustParsePrefix("240.0.0.0/4"), "reserved or broadcast"},
}

// embedding are IPv6 prefixes that carry an IPv4 address: 32 bits at the given byte. The address inside is judged as well, so that
// no spelling of 127.0.0.1 is missed (RFC 4291 §2.5.5, RFC 6052 §2.1, RFC 8215 with a /96 below it, RFC 2765 §2.1, RFC 3056 §2).
var embedding = []struct {
	prefix netip.Prefix
	at     int
}{
	{netip.MustParsePrefix("::/96"), 12},
	{netip.MustParsePrefix("64:ff9b::/96"), 12},
	{netip.MustParsePrefix("64:ff9b:1::/48"), 12},
	{netip.MustParsePrefix("::ffff:0:0:0/96"), 12},
	{netip.MustParsePrefix("2002::/16"), 2},
}

// teredo carries the client's IPv4 address inverted in its last 32 bits (RFC 4380 §4).
var teredo = netip.MustParsePrefix("2001::/32")

// ParseAllow reads entries of the form "CIDR" or "CIDR PORTS", such as "10.0.3.0/24 5432,8000-8100". own are the gateway's own sockets.
func ParseAllow(entries []string, own ...netip.AddrPort) (*AllowList, error) {
	l := &AllowList{own: own}
	for _, s := range entries {
		cidr, ports, _ := strings.Cut(strings.TrimSpace(s), " ")
		p, err := netip.ParsePrefix(cidr)
		if err != nil {
			a, errAddr := netip.ParseAddr(cidr)
			if errAddr != nil {
				return nil, fmt.Errorf("allow entry %.80q: want CIDR or address, then a space and ports, such as \"10.0.3.0/24 5432,8000-8100\"", s)
			}
			p = netip.PrefixFrom(a, a.BitLen())
		}
		r, err := policy.ParsePorts(ports)
		if err == nil && ports != "" && len(r) == 0 {
			err = fmt.Errorf("there is no port in %.40q", ports)
		}
		if err != nil {
			return nil, fmt.Errorf("allow entry %.80q: %w", s, err)
		}
		l.entries = append(l.entries, allowEntry{p.Masked(), r})
	}
	return l, nil
}

// Check says why addr and port may not be reached, or nil. Port 0 is ICMP.
func (l *AllowList) Check(addr netip.Addr, port uint16) error {
	addr = addr.Unmap().WithZone("")
	for _, s := range l.own {
		if port == s.Port() && port != 0 && (s.Addr().Unmap() == addr || s.Addr().IsUnspecified()) {
			return fmt.Errorf("%v is the gateway's own socket", netip.AddrPortFrom(addr, port))
		}
	}
	for _, a := range spellings(addr) {
		for _, s := range special {
			if s.prefix.Contains(a) && !l.opened(s.prefix, addr, port) {
				return fmt.Errorf("%v is a %s address, which this gateway's allow list does not name", addr, s.what)
			}
		}
	}
	if len(l.entries) == 0 {
		return nil
	}
	for _, e := range l.entries {
		if e.covers(addr, port) {
			return nil
		}
	}
	return fmt.Errorf("%v port %d is outside of this gateway's own allow list", addr, port)
}

// opened reports whether an entry inside of the special prefix covers the address.
func (l *AllowList) opened(special netip.Prefix, addr netip.Addr, port uint16) bool {
	for _, e := range l.entries {
		if e.prefix.Bits() >= special.Bits() && special.Contains(e.prefix.Addr()) && e.covers(addr, port) {
			return true
		}
	}
	return false
}

func (e *allowEntry) covers(addr netip.Addr, port uint16) bool {
	if !e.prefix.Contains(addr) {
		return false
	}
	if len(e.ports) == 0 {
		return true
	}
	for _, r := range e.ports {
		if r.Contains(port) {
			return true
		}
	}
	return false
}

// spellings returns addr and the IPv4 address it carries, if any.
func spellings(addr netip.Addr) []netip.Addr {
	out := []netip.Addr{addr}
	if addr.Is4() {
		return out
	}
	b := addr.As16()
	for _, e := range embedding {
		if e.prefix.Contains(addr) && addr != netip.IPv6Unspecified() && addr != netip.IPv6Loopback() {
			out = append(out, netip.AddrFrom4([4]byte(b[e.at:e.at+4])))
		}
	}
	if teredo.Contains(addr) {
		out = append(out, netip.AddrFrom4([4]byte{^b[12], ^b[13], ^b[14], ^b[15]}))
	}
	return out
}
