package tun

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"sallyway/tun/splitdns"
)

const (
	sshPort = 22

	// tcpEstablished is TCP_ESTABLISHED in the state column of /proc/net/tcp.
	tcpEstablished = "01"
)

// resolvConfs are where the host's resolvers are named; the others are what stands behind a stub in the first.
var resolvConfs = []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf", "/run/NetworkManager/no-stub-resolv.conf"}

// Hazards returns what the host must not lose by a route into the device. Protected is empty.
func (d *Device) Hazards() (Hazards, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.hazardsLocked()
}

func (d *Device) hazardsLocked() (Hazards, error) {
	h := Hazards{Resolvers: d.resolvers(), Logins: logins(os.Getenv("SSH_CONNECTION"))}
	links, err := d.nl.LinkList()
	if err != nil {
		return h, fmt.Errorf("list interfaces: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	addrs, err := d.nl.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return h, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		n := a.IPNet
		if a.Peer != nil {
			n = a.Peer
		}
		if p, ok := prefixFromIPNet(n); ok && a.LinkIndex != d.Index() {
			h.Connected = append(h.Connected, Subnet{p.Masked(), names[a.LinkIndex]})
		}
	}
	routes, err := d.nl.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return h, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.LinkIndex == d.Index() || r.Type != unix.RTN_UNICAST && r.Type != 0 {
			continue
		}
		p, ok := prefixFromIPNet(r.Dst)
		switch {
		case r.Dst == nil || ok && p.Bits() == 0:
			h.Gateways = appendIP(h.Gateways, r.Gw)
			if v, ok := r.Via.(*netlink.Via); ok {
				h.Gateways = appendIP(h.Gateways, v.Addr)
			}
			for _, n := range r.MultiPath {
				h.Gateways = appendIP(h.Gateways, n.Gw)
			}
		case ok && r.Gw == nil && len(r.MultiPath) == 0 && r.Protocol == unix.RTPROT_KERNEL && r.Table == unix.RT_TABLE_MAIN:
			// A subnet that an address stands for without being in it, as DHCP clients with noprefixroute set up.
			s := Subnet{p.Masked(), names[r.LinkIndex]}
			if !slices.Contains(h.Connected, s) {
				h.Connected = append(h.Connected, s)
			}
		}
	}
	return h, nil
}

func appendIP(as []netip.Addr, ip []byte) []netip.Addr {
	if a, ok := netip.AddrFromSlice(ip); ok && !a.IsUnspecified() {
		as = append(as, a.Unmap())
	}
	return as
}

// resolvers are the DNS servers of the host, without our own and those on loopback.
func (d *Device) resolvers() []netip.Addr {
	var as []netip.Addr
	for _, path := range resolvConfs {
		f, err := os.Open(path)
		if err != nil {
			continue // a host without resolvers has none to lose
		}
		for _, a := range nameservers(f) {
			if !a.IsLoopback() && !slices.Contains(d.ownResolvers, a) && !slices.Contains(as, a) {
				as = append(as, a)
			}
		}
		f.Close()
	}
	return as
}

// nameservers returns the addresses of the nameserver lines of a resolv.conf(5), without those that split DNS has put there.
func nameservers(r io.Reader) []netip.Addr {
	var as []netip.Addr
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 2 || f[0] != "nameserver" || strings.Contains(sc.Text(), splitdns.Mark) {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			as = append(as, a.Unmap().WithZone(""))
		}
	}
	return as
}

// logins are the peers of ssh logins to this host: of the shell that we were started from, and of every established
// connection to its port 22.
func logins(sshConnection string) []netip.Addr {
	var as []netip.Addr
	if f := strings.Fields(sshConnection); len(f) == 4 {
		if a, err := netip.ParseAddr(f[0]); err == nil {
			as = append(as, a.Unmap().WithZone(""))
		}
	}
	for _, path := range []string{"/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"} {
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		for _, a := range sshPeers(f) {
			if !slices.Contains(as, a) {
				as = append(as, a)
			}
		}
		f.Close()
	}
	return slices.DeleteFunc(as, netip.Addr.IsLoopback)
}

// sshPeers returns the remote addresses of the established connections to local port 22 in a /proc/net/tcp or tcp6.
func sshPeers(r io.Reader) []netip.Addr {
	var as []netip.Addr
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		// "  0: 0100007F:0016 0200007F:C350 01 …": slot, local, remote, state.
		f := strings.Fields(sc.Text())
		if len(f) < 4 || f[3] != tcpEstablished {
			continue
		}
		local, ok1 := procAddrPort(f[1])
		remote, ok2 := procAddrPort(f[2])
		if ok1 && ok2 && local.Port() == sshPort {
			as = append(as, remote.Addr().Unmap())
		}
	}
	return as
}

// procAddrPort reads an address of /proc/net/tcp: 32-bit words in host byte order as hex, a colon, the port as hex.
func procAddrPort(s string) (netip.AddrPort, bool) {
	host, port, ok := strings.Cut(s, ":")
	b, err := hex.DecodeString(host)
	if !ok || err != nil || len(b) != 4 && len(b) != 16 {
		return netip.AddrPort{}, false
	}
	if littleEndian {
		for i := 0; i < len(b); i += 4 {
			slices.Reverse(b[i : i+4])
		}
	}
	p, err := hex.DecodeString(port)
	if err != nil || len(p) != 2 {
		return netip.AddrPort{}, false
	}
	a, ok := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(a, uint16(p[0])<<8|uint16(p[1])), ok
}

// A network that comes up makes dozens of changes: Watch tells of them when no other has come for watchQuiet, after watchSettle at the latest.
const (
	watchQuiet  = 30 * time.Millisecond
	watchSettle = 300 * time.Millisecond
)

// Watch calls changed some time after addresses or routes of the host have changed, other than on the device itself, until
// ctx ends. It watches the network namespace of the calling thread, from before it first waits.
func (d *Device) Watch(ctx context.Context, changed func()) error {
	sock, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR)
	if err != nil {
		return fmt.Errorf("watch the network: %w", err)
	}
	defer sock.Close()
	defer context.AfterFunc(ctx, sock.Close)()
	changes := make(chan struct{}, 1) // told in a goroutine of its own, so that none is missed meanwhile
	var telling sync.WaitGroup
	defer telling.Wait()
	defer close(changes)
	telling.Go(func() {
		for range changes {
			settle(changes)
			if ctx.Err() == nil {
				changed()
			}
		}
	})
	for {
		msgs, _, err := sock.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS): // more changes than fit
		case err != nil:
			return fmt.Errorf("watch the network: %w", err)
		case !slices.ContainsFunc(msgs, func(m syscall.NetlinkMessage) bool { return d.concerns(m) }):
			continue
		}
		select {
		case changes <- struct{}{}:
		default:
		}
	}
}

// settle waits until there are no more changes for now, or changes is closed.
func settle(changes <-chan struct{}) {
	quiet, most := time.NewTimer(watchQuiet), time.NewTimer(watchSettle)
	defer quiet.Stop()
	defer most.Stop()
	for {
		select {
		case _, ok := <-changes:
			if !ok {
				return
			}
			quiet.Reset(watchQuiet)
		case <-quiet.C:
			return
		case <-most.C:
			return
		}
	}
}

// concerns reports whether a message is about a way to other hosts than by the device. Link-local addresses and the routes that
// follow them lead to no relay; an interface that comes up is told of by its other addresses.
func (d *Device) concerns(m syscall.NetlinkMessage) bool {
	switch m.Header.Type {
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		if len(m.Data) < unix.SizeofIfAddrmsg {
			return true
		}
		const scopeAt, indexAt = 3, 4 // in struct ifaddrmsg
		return m.Data[scopeAt] < unix.RT_SCOPE_LINK && int(binary.NativeEndian.Uint32(m.Data[indexAt:])) != d.Index()
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		attrs, err := syscall.ParseNetlinkRouteAttr(&m)
		return err != nil || !slices.ContainsFunc(attrs, func(a syscall.NetlinkRouteAttr) bool {
			switch a.Attr.Type {
			case unix.RTA_OIF:
				return len(a.Value) == 4 && int(binary.NativeEndian.Uint32(a.Value)) == d.Index()
			case unix.RTA_DST:
				dst, ok := netip.AddrFromSlice(a.Value)
				return ok && (dst.IsLinkLocalUnicast() || dst.IsMulticast())
			}
			return false
		})
	}
	return false
}
