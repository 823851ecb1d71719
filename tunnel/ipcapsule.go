package tunnel

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/quicvarint"
)

// Capsules of IP proxying (RFC 9484 §4.7).
//
//	ADDRESS_ASSIGN, ADDRESS_REQUEST   any number of: request ID (varint), IP version, address, prefix length
//	ROUTE_ADVERTISEMENT               any number of: IP version, first address, last address, protocol (0: all)
const (
	capsuleAddressAssign  http3.CapsuleType = 1
	capsuleAddressRequest http3.CapsuleType = 2
	capsuleRoutes         http3.CapsuleType = 3
)

// maxRoutePrefixes bounds what a peer's routes turn into.
const maxRoutePrefixes = 65536

// assignment is an entry of ADDRESS_ASSIGN or ADDRESS_REQUEST.
type assignment struct {
	id     uint64 // of the request it answers; 0 is none
	prefix netip.Prefix
}

// refused reports whether the entry says no: 0.0.0.0/32 or ::/128.
func (a assignment) refused() bool { return a.prefix.Addr().IsUnspecified() && a.prefix.IsSingleIP() }

func assignments(ps []netip.Prefix) []assignment {
	out := make([]assignment, len(ps))
	for i, p := range ps {
		out[i].prefix = p.Masked()
	}
	return out
}

// appendAddresses appends an ADDRESS_ASSIGN capsule.
func appendAddresses(b []byte, as []assignment) []byte {
	var body []byte
	for _, a := range as {
		body = quicvarint.Append(body, a.id)
		body = appendVersioned(body, a.prefix.Addr())
		body = append(body, byte(a.prefix.Bits()))
	}
	return appendBody(b, capsuleAddressAssign, body)
}

// appendRoutes appends a ROUTE_ADVERTISEMENT capsule: ranges sorted and disjoint, of all protocols (RFC 9484 §4.7.3).
func appendRoutes(b []byte, ps []netip.Prefix) []byte {
	ps = slices.Clone(ps)
	slices.SortFunc(ps, func(a, b netip.Prefix) int {
		if c := a.Addr().BitLen() - b.Addr().BitLen(); c != 0 {
			return c
		}
		if c := a.Masked().Addr().Compare(b.Masked().Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	var body []byte
	var before netip.Addr // the last address of the range before
	for _, p := range ps {
		first, last := p.Masked().Addr(), lastAddr(p)
		if before.IsValid() && before.BitLen() == last.BitLen() && before.Compare(last) >= 0 {
			continue // a part of one before it
		}
		body = appendVersioned(body, first)
		body = append(body, last.AsSlice()...)
		body = append(body, 0)
		before = last
	}
	return appendBody(b, capsuleRoutes, body)
}

func appendVersioned(b []byte, a netip.Addr) []byte {
	if a.Is4() {
		b = append(b, 4)
	} else {
		b = append(b, 6)
	}
	return append(b, a.AsSlice()...)
}

func appendBody(b []byte, typ http3.CapsuleType, body []byte) []byte {
	b = quicvarint.Append(b, uint64(typ))
	b = quicvarint.Append(b, uint64(len(body)))
	return append(b, body...)
}

// answerAddresses is the ADDRESS_ASSIGN capsule that answers a request: what is assigned stays as it is, a request for it or for any
// address of a family gets it, another one is refused.
func answerAddresses(requests []assignment, assigned []netip.Prefix) []byte {
	out := assignments(assigned)
	for _, r := range requests {
		i := slices.IndexFunc(out, func(a assignment) bool {
			same := a.prefix == r.prefix || (r.prefix.Addr().IsUnspecified() && a.prefix.Addr().BitLen() == r.prefix.Addr().BitLen())
			return a.id == 0 && same
		})
		if i >= 0 {
			out[i].id = r.id
			continue
		}
		none := netip.IPv4Unspecified()
		if r.prefix.Addr().Is6() {
			none = netip.IPv6Unspecified()
		}
		out = append(out, assignment{r.id, netip.PrefixFrom(none, none.BitLen())})
	}
	return appendAddresses(nil, out)
}

// parseAddresses reads the body of ADDRESS_ASSIGN and ADDRESS_REQUEST.
func parseAddresses(b []byte) (out []assignment, err error) {
	for len(b) > 0 {
		id, n, err := quicvarint.Parse(b)
		if err != nil {
			return nil, fmt.Errorf("%w: request ID", errCapsule)
		}
		addr, rest, ok := cutVersioned(b[n:])
		if !ok || len(rest) == 0 {
			return nil, fmt.Errorf("%w: address", errCapsule)
		}
		p := netip.PrefixFrom(addr, int(rest[0]))
		if !p.IsValid() || p != p.Masked() {
			return nil, fmt.Errorf("%w: prefix %v/%d", errCapsule, addr, rest[0])
		}
		out, b = append(out, assignment{id, p}), rest[1:]
	}
	return out, nil
}

// parseRoutes reads the body of ROUTE_ADVERTISEMENT as prefixes. Ranges of one protocol only count, too: what else is sent there the
// other end drops.
func parseRoutes(b []byte) (out []netip.Prefix, err error) {
	for len(b) > 0 {
		first, rest, ok := cutVersioned(b)
		if !ok || len(rest) < first.BitLen()/8+1 {
			return nil, fmt.Errorf("%w: route", errCapsule)
		}
		last, _ := netip.AddrFromSlice(rest[:first.BitLen()/8])
		if first.Compare(last) > 0 {
			return nil, fmt.Errorf("%w: route from %v to %v", errCapsule, first, last)
		}
		if out = appendRange(out, first, last); len(out) > maxRoutePrefixes {
			return nil, fmt.Errorf("%w: too many routes", errCapsule)
		}
		b = rest[first.BitLen()/8+1:]
	}
	return out, nil
}

// cutVersioned reads an IP version and an address of it.
func cutVersioned(b []byte) (a netip.Addr, rest []byte, ok bool) {
	size := 0
	if len(b) > 0 {
		switch b[0] {
		case 4:
			size = 4
		case 6:
			size = 16
		}
	}
	if size == 0 || len(b) < 1+size {
		return a, nil, false
	}
	a, ok = netip.AddrFromSlice(b[1 : 1+size])
	return a, b[1+size:], ok
}

// appendRange appends the prefixes that make up the addresses from first to last.
func appendRange(out []netip.Prefix, first, last netip.Addr) []netip.Prefix {
	for {
		bits := first.BitLen()
		for bits > 0 {
			p := netip.PrefixFrom(first, bits-1)
			if p.Masked().Addr() != first || lastAddr(p).Compare(last) > 0 {
				break
			}
			bits--
		}
		p := netip.PrefixFrom(first, bits)
		out = append(out, p)
		end := lastAddr(p)
		if end.Compare(last) >= 0 {
			return out
		}
		first = end.Next()
	}
}

func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
