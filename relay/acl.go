package relay

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"sallyway/internal/addrspace"
)

// Peer is an address outside the relay that an organization's allocations may exchange data with: exactly one address and port. Private
// addresses (RFC 1918 and the rest of the reserved list) may be named, since naming one exactly is the operator's decision. Never
// allowed, whatever is configured, are multicast, the unspecified address, and a service port of the relay itself.
type Peer struct {
	Addr netip.AddrPort
	// AllowLoopback admits a loopback, link-local or metadata address, for tests and for a peer on the relay's own host.
	AllowLoopback bool
}

// checkPeers validates an organization's peers. One bad entry refuses them all.
func (c *Config) checkPeers(peers []Peer) (map[netip.AddrPort]struct{}, error) {
	set := make(map[netip.AddrPort]struct{}, len(peers))
	local := localAddrs()
	for _, p := range peers {
		if !p.Addr.IsValid() || p.Addr.Port() == 0 || p.Addr.Addr().Zone() != "" {
			return nil, fmt.Errorf("peer %q is not an IP address with a port", p.Addr)
		}
		ip, encoded := addrspace.Canonical(p.Addr.Addr())
		own := ip == c.Advertise || ip == c.Listen.Addr().Unmap() || ip == c.RelayIP.Unmap() || ip.IsLoopback() || slices.Contains(local, ip)
		class := addrspace.Of(ip).Class
		// The rest of what is reserved (RFC 1918, RFC 6598, RFC 4193, the documentation and benchmark ranges) may be named exactly.
		switch {
		case class == addrspace.Unspecified || class == addrspace.Multicast || class == addrspace.Reserved:
			return nil, fmt.Errorf("peer %v is in a range that is never a peer", p.Addr)
		case own && c.service(p.Addr.Port()):
			return nil, fmt.Errorf("peer %v is a service of this relay", p.Addr)
		case own && !ip.IsLoopback() && !p.AllowLoopback:
			return nil, fmt.Errorf("peer %v is this relay itself", p.Addr)
		case (class == addrspace.Loopback || class == addrspace.LinkLocal || class == addrspace.Metadata) && !p.AllowLoopback:
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
