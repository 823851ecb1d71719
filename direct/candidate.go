package direct

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
)

const (
	// MaxCandidates is how many addresses an end names and how many of the other end's it tries.
	MaxCandidates = 8
	// maxOffer is the size of an encoded Offer in bytes; eight addresses need a tenth of it.
	maxOffer = 4 << 10
	// leastPort is the lowest port that is tried: NATs map to no lower one, and below are the services of third parties.
	leastPort = 1024
)

// Offer is what two ends tell each other on their session, as JSON: where they may be reached, or why they are not.
type Offer struct {
	Candidates []netip.AddrPort `json:"candidates,omitempty"`
	// Refused says why there is no direct path, for people.
	Refused string `json:"refused,omitempty"`
}

// ParseOffer reads an offer of the other end's. What is in it is not checked: Punch tries only what Usable holds for.
func ParseOffer(b []byte) (Offer, error) {
	var o Offer
	if len(b) > maxOffer {
		return o, fmt.Errorf("offer of %d bytes, limit %d", len(b), maxOffer)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	if err := d.Decode(&o); err != nil {
		return Offer{}, fmt.Errorf("decode offer: %w", err)
	}
	if len(o.Candidates) > MaxCandidates {
		return Offer{}, fmt.Errorf("offer of %d candidates, limit %d", len(o.Candidates), MaxCandidates)
	}
	for i, a := range o.Candidates {
		if !a.IsValid() {
			return Offer{}, errors.New("offer with an empty candidate")
		}
		o.Candidates[i] = unmap(a)
	}
	const most = 200 // bytes of a reason that are worth reading
	if len(o.Refused) > most {
		o.Refused = o.Refused[:most]
	}
	return o, nil
}

// never are addresses that are no host's elsewhere: this network, benchmarks between devices, the future.
var never = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("192.0.0.0/24"), netip.MustParsePrefix("240.0.0.0/4"),
	netip.MustParsePrefix("::/96"), netip.MustParsePrefix("64:ff9b::/96"), netip.MustParsePrefix("64:ff9b:1::/48"),
	netip.MustParsePrefix("2002::/16"), netip.MustParsePrefix("2001::/32"), netip.MustParsePrefix("fec0::/10"),
}

// carrier is the range of carriers' own NATs (RFC 6598), which is as private as RFC 1918's.
var carrier = netip.MustParsePrefix("100.64.0.0/10")

// Usable reports whether an address may be told to others and sent probes: that of a host which may be elsewhere; a private one only
// if private says so.
func Usable(a netip.AddrPort, private bool) bool {
	ip := a.Addr().Unmap()
	if !ip.IsGlobalUnicast() || ip.Zone() != "" || a.Port() < leastPort || ip.IsLoopback() || ip.IsLinkLocalUnicast() {
		return false
	}
	if slices.ContainsFunc(never, func(p netip.Prefix) bool { return p.Contains(ip) }) {
		return false
	}
	return private || (!ip.IsPrivate() && !carrier.Contains(ip))
}

// hostAddrs are the addresses of the host's interfaces that are up.
func hostAddrs() []netip.Addr {
	ifs, err := net.Interfaces()
	if err != nil {
		return nil
	}
	var out []netip.Addr
	for _, i := range ifs {
		if i.Flags&net.FlagUp == 0 || i.Flags&(net.FlagLoopback|net.FlagPointToPoint) != 0 {
			continue // a point-to-point device is a tunnel, this product's own among them
		}
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok {
				if ip, ok := netip.AddrFromSlice(n.IP); ok {
					out = append(out, ip.Unmap())
				}
			}
		}
	}
	return out
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
