package bench

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sallyway/internal/lab"
)

// relayBed is where a relay runs and where its load comes from.
type relayBed struct {
	link        string
	serve, load *lab.Host
	server      netip.Addr // where the relay listens
	port        uint16     // 0 is a free one
	sources     [2]byte    // the first bytes of the load's addresses
}

// relayDial opens a socket that is connected to a server.
type relayDial func(server netip.AddrPort) (*net.UDPConn, error)

// The veth pair between a relay and its load, beside the links of the lab.
const (
	bedServeLink, bedLoadLink = "bench0", "bench1"
	bedServe, bedLoad         = "10.200.0.1", "10.200.0.2"
	bedSources                = "10.201.0.0/16" // all of them addresses of the load's host
)

// newRelayBed lays a link. Over loopback the kernel takes short cuts which no wire has; over a veth pair datagrams pass from
// one host's stack to another's.
func newRelayBed(l *lab.Lab, link string) (*relayBed, error) {
	switch link {
	case Loopback:
		return &relayBed{link: link, serve: l.Relay1, load: l.Relay1, server: loopback, sources: [2]byte{127, 1}}, nil
	case Veth:
		b := &relayBed{link: link, serve: l.Relay1, load: l.Client, server: netip.MustParseAddr(bedServe), sources: [2]byte{10, 201}}
		return b, b.lay()
	}
	return nil, fmt.Errorf("no link %q", link)
}

// lay makes the veth pair.
func (b *relayBed) lay() error {
	var ns *os.File
	err := b.load.Do(func() (err error) {
		ns, err = os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
		return err
	})
	if err != nil {
		return err
	}
	defer ns.Close()
	err = b.serve.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: bedServeLink}, PeerName: bedLoadLink, PeerNamespace: netlink.NsFd(ns.Fd())})
	})
	if err != nil {
		return fmt.Errorf("veth pair: %w", err)
	}
	return errors.Join(
		raise(b.serve, bedServeLink, bedServe+"/30", tunMTU, bedSources),
		raise(b.load, bedLoadLink, bedLoad+"/30", tunMTU),
		b.load.Do(func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			return netlink.RouteReplace(&netlink.Route{
				LinkIndex: lo.Attrs().Index, Dst: ipNet(netip.MustParsePrefix(bedSources)), Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST,
			})
		}))
}

// sourceClients come from one address: a relay answers a stranger only so often.
const sourceClients = 32

// source is the address of the i-th client.
func (b *relayBed) source(i int) netip.Addr {
	n := i / sourceClients
	return netip.AddrFrom4([4]byte{b.sources[0], b.sources[1], byte(n >> 8), byte(n) + 1})
}

// dial opens the sockets of the i-th pair.
func (b *relayBed) dial(i int) relayDial {
	return func(server netip.AddrPort) (*net.UDPConn, error) { return dialUDP(b.load, b.source(2*i), server) }
}

// dialUDP opens a connected socket on a host; the zero source is any.
func dialUDP(h *lab.Host, from netip.Addr, to netip.AddrPort) (c *net.UDPConn, err error) {
	var local *net.UDPAddr
	if from.IsValid() {
		local = net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	}
	err = h.Do(func() (err error) {
		c, err = net.DialUDP("udp4", local, net.UDPAddrFromAddrPort(to))
		return err
	})
	return c, err
}
