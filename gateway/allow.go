package gateway

import (
	"fmt"
	"net/netip"
	"strings"

	"sallyway/internal/addrspace"
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

// guarded says whether addresses of a class are opened by nothing but an entry that lies inside of their range: this host, its link, clouds' metadata
// services, and what is no unicast destination.
func guarded(c addrspace.Class) bool {
	switch c {
	case addrspace.Loopback, addrspace.Unspecified, addrspace.LinkLocal, addrspace.Metadata, addrspace.Multicast, addrspace.Reserved:
		return true
	}
	return false
}

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
	// The address inside of another spelling is judged as well, so that none of 127.0.0.1 is missed.
	inside, embedded := addrspace.Canonical(addr)
	for _, a := range [...]netip.Addr{addr, inside} {
		if r := addrspace.Of(a); guarded(r.Class) && !l.opened(r.Prefix, addr, port) {
			return fmt.Errorf("%v is a %s address, which this gateway's allow list does not name", addr, r.What)
		}
		if !embedded {
			break
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
