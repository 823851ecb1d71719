package stun

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// NAT says how the addresses that two servers saw relate (RFC 4787 §4.1).
type NAT string

// The kinds of mapping.
const (
	// NATUnknown: fewer than two servers answered and there is some NAT.
	NATUnknown NAT = "unknown"
	// NATNone: the servers see the socket's own address.
	NATNone NAT = "none"
	// NATEndpointIndependent: all servers see the same address; peers can be told to send there.
	NATEndpointIndependent NAT = "endpoint-independent"
	// NATDependent: every server sees another address (address-dependent, or address- and port-dependent mapping); a direct path
	// needs the other end to be better placed.
	NATDependent NAT = "address-dependent or address-and-port-dependent"
)

// Discovery is what servers saw of one socket.
type Discovery struct {
	// Local is the socket's address; its host part is that of the interface towards the first server.
	Local netip.AddrPort
	// Bindings are the answers, in the order in which the servers were named.
	Bindings []Binding
	// Silent are the servers that did not answer.
	Silent []netip.AddrPort
	// NAT is the kind of mapping.
	NAT NAT
}

// discoverTimeout bounds a discovery when the context does not: the first four attempts and the wait after them.
const discoverTimeout = 15 * FirstTimeout

// Discover opens a socket and asks every server (two suffice) where it sees it. Servers of another address family than the first are
// left out: one socket, one family. It fails only when nobody answered; without a deadline in ctx it gives up after 7.5 s.
func Discover(ctx context.Context, servers []netip.AddrPort) (*Discovery, error) {
	if len(servers) == 0 {
		return nil, errors.New("discover NAT: no relay to ask")
	}
	network := "udp6"
	if servers[0].Addr().Unmap().Is4() {
		network = "udp4"
	}
	conn, err := net.ListenUDP(network, nil)
	if err != nil {
		return nil, fmt.Errorf("discover NAT: %w", err)
	}
	defer conn.Close()
	return DiscoverOn(ctx, conn, servers)
}

// DiscoverOn is Discover on a socket of the caller's, which must be unconnected and read by nobody else meanwhile.
func DiscoverOn(ctx context.Context, conn PacketConn, servers []netip.AddrPort) (*Discovery, error) {
	if len(servers) == 0 {
		return nil, errors.New("discover NAT: no relay to ask")
	}
	var asked []netip.AddrPort
	for _, s := range servers {
		s = unmap(s)
		if s.Addr().Is4() == servers[0].Addr().Unmap().Is4() && !slices.Contains(asked, s) {
			asked = append(asked, s)
		}
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, discoverTimeout)
		defer cancel()
	}
	bindings, err := ask(ctx, conn, asked)
	if err != nil {
		return nil, fmt.Errorf("discover NAT by %v: %w", asked, err)
	}
	d := &Discovery{Local: localAddr(conn, asked[0]), Bindings: bindings}
	for _, s := range asked {
		if !slices.ContainsFunc(bindings, func(b Binding) bool { return b.Server == s }) {
			d.Silent = append(d.Silent, s)
		}
	}
	d.NAT = classify(d.Local, bindings)
	return d, nil
}

// classify tells the kind of mapping from what servers saw of one socket.
func classify(local netip.AddrPort, bindings []Binding) NAT {
	if len(bindings) == 0 {
		return NATUnknown
	}
	first := bindings[0].Reflexive
	for _, b := range bindings[1:] {
		if b.Reflexive != first {
			return NATDependent
		}
	}
	switch {
	case first == local:
		return NATNone
	case len(bindings) < 2:
		return NATUnknown
	}
	return NATEndpointIndependent
}

// localAddr is the socket's address; one bound to no address gets that of the interface towards server.
func localAddr(conn PacketConn, server netip.AddrPort) netip.AddrPort {
	udp, ok := conn.LocalAddr().(*net.UDPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	local := unmap(udp.AddrPort())
	if !local.Addr().IsUnspecified() {
		return local
	}
	// Connecting a UDP socket sends nothing; it makes the kernel choose the source address.
	if probe, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(server)); err == nil {
		defer probe.Close()
		return netip.AddrPortFrom(unmap(probe.LocalAddr().(*net.UDPAddr).AddrPort()).Addr(), local.Port())
	}
	return local
}

// String is a line for a status page.
func (d *Discovery) String() string {
	var b strings.Builder
	switch d.NAT {
	case NATNone:
		fmt.Fprintf(&b, "no NAT: relays see this host's own address %v", d.Local)
	case NATEndpointIndependent:
		fmt.Fprintf(&b, "NAT with endpoint-independent mapping: %v is seen as %v", d.Local, d.Bindings[0].Reflexive)
	case NATDependent:
		fmt.Fprintf(&b, "NAT with address-dependent or address-and-port-dependent mapping: %v is seen", d.Local)
		for i, m := range d.Bindings {
			sep := ","
			if i == 0 {
				sep = ""
			}
			fmt.Fprintf(&b, "%s as %v by %v", sep, m.Reflexive, m.Server)
		}
		b.WriteString("; direct paths will rarely work, relays do")
	default:
		if len(d.Bindings) > 0 {
			fmt.Fprintf(&b, "NAT: %v is seen as %v; its kind shows only when two relays answer", d.Local, d.Bindings[0].Reflexive)
		} else {
			b.WriteString("unknown: no relay answered")
		}
	}
	for _, m := range d.Bindings {
		if m.RTT > 0 {
			fmt.Fprintf(&b, "; %v in %v", m.Server, m.RTT.Round(100*time.Microsecond))
		}
	}
	for _, s := range d.Silent {
		fmt.Fprintf(&b, "; no answer from %v", s)
	}
	return b.String()
}
