package relay

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
)

// Peer is an address outside the relay that an organization's allocations may exchange data with: exactly one address and port. Private
// addresses (RFC 1918 and the rest of the reserved list) may be named, since naming one exactly is the operator's decision. Never
// allowed, whatever is configured, are multicast, the unspecified address, and a service port of the relay itself.
type Peer struct {
	Addr netip.AddrPort
	// AllowLoopback admits a loopback, link-local or metadata address, for tests and for a peer on the relay's own host.
	AllowLoopback bool
}

// Prefixes that embed an IPv4 address, and where in the 16 bytes it stands.
var embedded = []struct {
	prefix netip.Prefix
	at     int
	invert bool
}{
	{netip.MustParsePrefix("64:ff9b::/96"), 12, false},    // NAT64, RFC 6052
	{netip.MustParsePrefix("64:ff9b:1::/48"), 12, false},  // local NAT64, RFC 8215, with a /96 below it
	{netip.MustParsePrefix("2002::/16"), 2, false},        // 6to4, RFC 3056
	{netip.MustParsePrefix("2001::/32"), 12, true},        // Teredo, RFC 4380 §4: the client's address, inverted
	{netip.MustParsePrefix("::ffff:0:0:0/96"), 12, false}, // SIIT, RFC 2765
	{netip.MustParsePrefix("::/96"), 12, false},           // IPv4-compatible, RFC 4291 §2.5.5.1
}

// canonical returns the address that a really means: IPv4 in any of its IPv6 encodings becomes IPv4. encoded reports whether a was such
// an encoding other than the mapped form, which sockets treat as IPv4 anyway.
func canonical(a netip.Addr) (c netip.Addr, encoded bool) {
	a = a.WithZone("").Unmap()
	if a.Is4() || a == netip.IPv6Loopback() || a.IsUnspecified() {
		return a, false
	}
	raw := a.As16()
	for _, e := range embedded {
		if !e.prefix.Contains(a) {
			continue
		}
		v := binary.BigEndian.Uint32(raw[e.at:])
		if e.invert {
			v = ^v
		}
		var four [4]byte
		binary.BigEndian.PutUint32(four[:], v)
		return netip.AddrFrom4(four), true
	}
	return a, false
}

// Prefixes of addresses on the relay's own host and link: AllowLoopback opens them.
var ownLink = prefixes("127.0.0.0/8", "::1/128", "169.254.0.0/16", "fe80::/10", "fec0::/10", "100.100.100.200/32", "fd00:ec2::254/128",
	"168.63.129.16/32", "192.0.0.192/32")

// Prefixes that are never a peer.
var never = prefixes("0.0.0.0/8", "::/128", "224.0.0.0/4", "240.0.0.0/4", "ff00::/8")

// The rest of what is reserved (RFC 1918, RFC 6598, RFC 4193, the documentation and benchmark ranges) may be named exactly.

func prefixes(s ...string) []netip.Prefix {
	p := make([]netip.Prefix, len(s))
	for i := range s {
		p[i] = netip.MustParsePrefix(s[i])
	}
	return p
}

func within(a netip.Addr, list []netip.Prefix) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) })
}

// checkPeers validates an organization's peers. One bad entry refuses them all.
func (c *Config) checkPeers(peers []Peer) (map[netip.AddrPort]struct{}, error) {
	set := make(map[netip.AddrPort]struct{}, len(peers))
	local := localAddrs()
	for _, p := range peers {
		if !p.Addr.IsValid() || p.Addr.Port() == 0 || p.Addr.Addr().Zone() != "" {
			return nil, fmt.Errorf("peer %q is not an IP address with a port", p.Addr)
		}
		ip, encoded := canonical(p.Addr.Addr())
		own := ip == c.Advertise || ip == c.Listen.Addr().Unmap() || ip == c.RelayIP.Unmap() || ip.IsLoopback() || slices.Contains(local, ip)
		switch {
		case within(ip, never):
			return nil, fmt.Errorf("peer %v is in a range that is never a peer", p.Addr)
		case own && c.service(p.Addr.Port()):
			return nil, fmt.Errorf("peer %v is a service of this relay", p.Addr)
		case own && !ip.IsLoopback() && !p.AllowLoopback:
			return nil, fmt.Errorf("peer %v is this relay itself", p.Addr)
		case within(ip, ownLink) && !p.AllowLoopback:
			return nil, fmt.Errorf("peer %v is a loopback, link-local or metadata address", p.Addr)
		case encoded:
			return nil, fmt.Errorf("peer %v encodes %v: name that address itself", p.Addr, ip)
		case ip.Is4() != c.Advertise.Is4():
			return nil, fmt.Errorf("peer %v is of another address family than relayed addresses", p.Addr)
		}
		set[netip.AddrPortFrom(ip, p.Addr.Port())] = struct{}{}
	}
	return set, nil
}

// localAddrs are the addresses of this host's interfaces.
func localAddrs() []netip.Addr {
	ifaces, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	var list []netip.Addr
	for _, i := range ifaces {
		if p, err := netip.ParsePrefix(i.String()); err == nil {
			list = append(list, p.Addr().Unmap())
		}
	}
	return list
}

// service reports whether port is one of the relay's own.
func (c *Config) service(port uint16) bool {
	return port == c.Listen.Port() || slices.Contains(c.ServicePorts, port)
}
