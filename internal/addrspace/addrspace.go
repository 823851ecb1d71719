// Package addrspace says what an IP address is: one of the Internet, or one of the special-purpose ranges (RFC 6890) that lead to this host, its link,
// a network inside, or the metadata service of a cloud. Whoever dials what somebody else named asks here, after names are resolved and right before it
// dials the very address that it asked about:
//
//	if !addrspace.Public(a) {
//		return fmt.Errorf("%v is no public address (%s)", a, addrspace.Of(a).What)
//	}
//
// IPv6 has several spellings of an IPv4 address. The mapped one (::ffff:0:0/96, RFC 4291 §2.5.5.2) is IPv4 to every socket and is judged as IPv4. The
// others are not: what arrives depends on translators on the way, so Of has one Class for all of them, whatever is inside, and Canonical tells what that is.
package addrspace

import (
	"encoding/binary"
	"net/netip"
)

// Class is what an address is for.
type Class uint8

// The classes. The zero Class is that of no address at all.
const (
	None        Class = iota
	Internet          // global unicast, wherever it leads
	Unspecified       // this network (RFC 1122 §3.2.1.3): a socket takes it for this host
	Loopback          // this host
	LinkLocal         // this link, where most clouds answer metadata; site-local, too, and every address with a zone
	Metadata          // metadata and management services of clouds that are elsewhere than on the link
	Private           // networks inside: RFC 1918, RFC 4193, and shared address space (RFC 6598)
	Testing           // benchmarks (RFC 2544) and documentation (RFC 5737, RFC 3849)
	Assigned          // protocol assignments (RFC 6890), what 6to4 relays had (RFC 7526), discard-only (RFC 6666)
	Multicast         // no destination of a connection
	Reserved          // the former class E, broadcast among it
	Embedded          // IPv6 with an IPv4 address inside, other than the mapped form
)

// Range is a range of addresses of one class.
type Range struct {
	Prefix netip.Prefix // invalid for None and Internet, and where a zone made the address link-local
	Class  Class
	What   string // in words, for messages: "loopback"
}

// ranges are all that are not the Internet's. The first that holds an address is its range.
var ranges = [...]Range{
	{netip.MustParsePrefix("0.0.0.0/8"), Unspecified, "unspecified"},
	{netip.MustParsePrefix("127.0.0.0/8"), Loopback, "loopback"},
	{netip.MustParsePrefix("169.254.0.0/16"), LinkLocal, "link-local or metadata"},
	{netip.MustParsePrefix("100.100.100.200/32"), Metadata, "metadata"}, // Alibaba
	{netip.MustParsePrefix("192.0.0.192/32"), Metadata, "metadata"},     // Oracle
	{netip.MustParsePrefix("168.63.129.16/32"), Metadata, "metadata"},   // Azure
	{netip.MustParsePrefix("10.0.0.0/8"), Private, "private"},
	{netip.MustParsePrefix("172.16.0.0/12"), Private, "private"},
	{netip.MustParsePrefix("192.168.0.0/16"), Private, "private"},
	{netip.MustParsePrefix("100.64.0.0/10"), Private, "private (carrier)"},
	{netip.MustParsePrefix("198.18.0.0/15"), Testing, "private (benchmarks)"},
	{netip.MustParsePrefix("192.0.2.0/24"), Testing, "documentation"},
	{netip.MustParsePrefix("198.51.100.0/24"), Testing, "documentation"},
	{netip.MustParsePrefix("203.0.113.0/24"), Testing, "documentation"},
	{netip.MustParsePrefix("192.0.0.0/24"), Assigned, "reserved"},
	{netip.MustParsePrefix("192.88.99.0/24"), Assigned, "reserved"},
	{netip.MustParsePrefix("224.0.0.0/4"), Multicast, "multicast"},
	{netip.MustParsePrefix("240.0.0.0/4"), Reserved, "reserved or broadcast"},

	{netip.MustParsePrefix("::/128"), Unspecified, "unspecified"},
	{netip.MustParsePrefix("::1/128"), Loopback, "loopback"},
	{netip.MustParsePrefix("fe80::/10"), LinkLocal, "link-local"},
	{netip.MustParsePrefix("fec0::/10"), LinkLocal, "site-local"},      // RFC 3879
	{netip.MustParsePrefix("fd00:ec2::254/128"), Metadata, "metadata"}, // AWS
	{netip.MustParsePrefix("fd20:ce::254/128"), Metadata, "metadata"},  // Google
	{netip.MustParsePrefix("fc00::/7"), Private, "private"},            // RFC 4193
	{netip.MustParsePrefix("2001:db8::/32"), Testing, "documentation"}, // RFC 3849
	{netip.MustParsePrefix("100::/64"), Assigned, "reserved"},          // RFC 6666
	{netip.MustParsePrefix("ff00::/8"), Multicast, "multicast"},        // RFC 4291 §2.7
	{netip.MustParsePrefix("::/96"), Embedded, "IPv4-compatible"},      // RFC 4291 §2.5.5.1
	{netip.MustParsePrefix("::ffff:0:0:0/96"), Embedded, "translated"}, // SIIT, RFC 2765 §2.1
	{netip.MustParsePrefix("64:ff9b::/96"), Embedded, "translated"},    // NAT64, RFC 6052 §2.1
	{netip.MustParsePrefix("64:ff9b:1::/48"), Embedded, "translated"},  // local NAT64, RFC 8215, with a /96 below it
	{netip.MustParsePrefix("2001::/32"), Embedded, "Teredo"},           // RFC 4380 §4
	{netip.MustParsePrefix("2002::/16"), Embedded, "6to4"},             // RFC 3056 §2
}

// Those whose IPv4 address is not simply the last 32 bits.
var (
	teredo    = netip.MustParsePrefix("2001::/32")
	sixToFour = netip.MustParsePrefix("2002::/16")
)

// Of returns the range that an address lies in; that of the Internet has no prefix.
func Of(a netip.Addr) Range {
	switch {
	case !a.IsValid():
		return Range{What: "no address"}
	case a.Zone() != "":
		return Range{Class: LinkLocal, What: "link-local"}
	}
	a = a.Unmap()
	for i := range ranges {
		if ranges[i].Prefix.Contains(a) {
			return ranges[i]
		}
	}
	return Range{Class: Internet, What: "public"}
}

// Public says whether an address is one of the Internet: none of the special ranges, and none that stands for another address.
func Public(a netip.Addr) bool { return Of(a).Class == Internet }

// Canonical returns the address that a really means: IPv4 in any of its IPv6 spellings becomes IPv4, and a zone is dropped. embedded reports whether a
// was such a spelling other than the mapped form, which sockets take for IPv4 anyway.
func Canonical(a netip.Addr) (c netip.Addr, embedded bool) {
	a = a.WithZone("").Unmap()
	if Of(a).Class != Embedded {
		return a, false
	}
	raw := a.As16()
	four := [4]byte(raw[12:])
	switch {
	case sixToFour.Contains(a):
		four = [4]byte(raw[2:6])
	case teredo.Contains(a): // the client's address, each bit inverted
		binary.BigEndian.PutUint32(four[:], ^binary.BigEndian.Uint32(four[:]))
	}
	return netip.AddrFrom4(four), true
}
