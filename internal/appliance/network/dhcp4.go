package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// dhcp4 is the DHCP client of one NIC (RFC 2131). Answers are read below the packet filter, from a packet socket that is open
// during an exchange alone and hears nothing but port 68.
type dhcp4 struct {
	nic    *nic
	silent int     // questions without an answer since there was one
	lease  *lease  // what the NIC has now
	routes []Route // what was set for it
}

const (
	dhcpFirst = 1 * time.Second  // until the first repetition: RFC 2131 section 4.1 says 4 s, and nobody wants to wait so long for a boot
	dhcpLast  = 64 * time.Second // the longest pause between repetitions, section 4.1
	renewLast = 60 * time.Second // the shortest pause between renewals of long leases, section 4.4.5
	reboots   = 3                // questions about an address that we had, before we go on with it unconfirmed or begin anew
)

// errNAK is a server's no.
var errNAK = errors.New("the DHCP server refuses the address")

// lease is what an ACK says, checked.
type lease struct {
	address   netip.Prefix
	server    netip.Addr
	began     time.Time // when it was asked for, with a monotonic reading: times count from there, section 4.4.1
	length    time.Duration
	t1, t2    time.Duration
	routes    []Route
	mtu       int
	dns, ntp  []netip.Addr
	search    []string
	hostname  string
	unlimited bool
}

// forever is the length that means it (section 3.3).
const forever = 0xffffffff

// shortestLease keeps a server from having us ask all the time.
const shortestLease = 2 * time.Second

// maxRoutes bounds what one server can fill the routing table with.
const maxRoutes = 64

// parseLease reads an ACK or offer. What is malformed or dangerous among the options is left out; what makes an address unusable is an
// error.
func parseLease(m *dhcpv4.DHCPv4, began time.Time) (*lease, error) {
	addr, ok := netip.AddrFromSlice(m.YourIPAddr.To4())
	if !ok || !isHost(addr) {
		return nil, fmt.Errorf("the DHCP server gave the address %v, which is none for a host", m.YourIPAddr)
	}
	mask := m.Options.Get(dhcpv4.OptionSubnetMask)
	bits := classBits(addr)
	if len(mask) == 4 {
		ones, size := net.IPMask(mask).Size()
		if size == 0 || ones == 0 {
			return nil, fmt.Errorf("the DHCP server gave the mask %v, which is none", net.IP(mask))
		}
		bits = ones
	}
	l := &lease{address: netip.PrefixFrom(addr, bits), began: began}
	l.server, _ = netip.AddrFromSlice(m.ServerIdentifier().To4())
	if !l.server.IsValid() {
		return nil, errors.New("the DHCP server does not name itself")
	}
	seconds := m.IPAddressLeaseTime(0) // the library multiplies: 0xffffffff seconds fit
	switch {
	case seconds <= 0:
		return nil, errors.New("the DHCP server gives no lease time")
	case seconds == forever*time.Second:
		l.unlimited = true
	}
	l.length = max(seconds, shortestLease)
	l.t1, l.t2 = m.IPAddressRenewalTime(0), m.IPAddressRebindingTime(0)
	if l.t2 <= 0 || l.t2 >= l.length {
		l.t2 = l.length / 8 * 7
	}
	if l.t1 <= 0 || l.t1 >= l.t2 {
		l.t1 = min(l.length/2, l.t2/2+l.t2/4)
	}
	all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	// With classless routes routers are not looked at (RFC 3442).
	for _, r := range m.ClasslessStaticRoute() {
		via, ok := netip.AddrFromSlice(r.Router.To4())
		to := prefix(r.Dest)
		if ok && to.IsValid() && (via.IsUnspecified() || isHost(via)) && !to.Addr().IsLoopback() && !to.Addr().IsMulticast() && len(l.routes) < maxRoutes {
			l.routes = append(l.routes, Route{To: to.Masked(), Via: via})
		}
	}
	if !m.Options.Has(dhcpv4.OptionClasslessStaticRoute) {
		for _, ip := range m.Router() {
			if via, ok := netip.AddrFromSlice(ip.To4()); ok && isHost(via) {
				l.routes = append(l.routes, Route{To: all, Via: via})
				break
			}
		}
	}
	if b := m.Options.Get(dhcpv4.OptionInterfaceMTU); len(b) == 2 {
		l.mtu = int(b[0])<<8 | int(b[1])
	}
	l.dns, l.ntp = hosts(m.DNS()), hosts(m.NTPServers())
	if s := m.DomainSearch(); s != nil {
		l.search = names(s.Labels)
	}
	if len(l.search) == 0 {
		l.search = names([]string{m.DomainName()})
	}
	if h := names([]string{m.HostName()}); len(h) == 1 {
		l.hostname = h[0]
	}
	return l, nil
}

// isHost says whether an address can be that of a host of a network.
func isHost(a netip.Addr) bool {
	return a.IsValid() && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// classBits is the prefix length that an address had when there were classes, for servers that send no mask.
func classBits(a netip.Addr) int {
	switch b := a.As4()[0]; {
	case b < 128:
		return 8
	case b < 192:
		return 16
	}
	return 24
}

// maxServers bounds what is kept of one list.
const maxServers = 8

// hosts are the usable addresses of a list.
func hosts(ips []net.IP) []netip.Addr {
	var all []netip.Addr
	for _, ip := range ips {
		if a, ok := netip.AddrFromSlice(ip); ok && isHost(a.Unmap()) && len(all) < maxServers && !slices.Contains(all, a.Unmap()) {
			all = append(all, a.Unmap())
		}
	}
	return all
}

// names are those of a list that are host or domain names: others could break out of the line of resolv.conf.
func names(list []string) []string {
	var all []string
	for _, s := range list {
		if s = string(bytes.TrimRight([]byte(s), ".\x00")); isName(s) && len(all) < maxServers {
			all = append(all, s)
		}
	}
	return all
}

// run has the NIC have an address, until ctx ends.
func (d *dhcp4) run(ctx context.Context) {
	for ctx.Err() == nil {
		l, err := d.acquire(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			d.nic.log.Warn("no address by DHCP", "error", err)
			d.nic.tell(byDHCP, &found{err: err.Error()})
			pause(ctx, d.nic.plug, retryFilter)
			continue
		}
		d.take(l)
		if err := d.hold(ctx); err != nil && ctx.Err() == nil {
			d.nic.log.Warn("the DHCP lease is lost", "address", d.lease.address, "error", err)
			d.drop(err)
		}
	}
}

// pause waits for d, less where the carrier comes or ctx ends. It says whether it was the carrier.
func pause(ctx context.Context, plug <-chan struct{}, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	case <-plug:
		return true
	}
	return false
}

// jitter spreads a duration by an eighth in both directions.
func jitter(d time.Duration) time.Duration { return d - d/8 + rand.N(d/4+1) }

// acquire asks whoever is there for an address, for as long as it takes.
func (d *dhcp4) acquire(ctx context.Context) (*lease, error) {
	conn, err := d.listen()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	began := time.Now()
	for wait := dhcpFirst; ; {
		discover, err := d.message(dhcpv4.MessageTypeDiscover, began)
		if err != nil {
			return nil, err
		}
		asked := time.Now()
		offer, err := d.ask(ctx, conn, conn, discover, jitter(wait), dhcpv4.MessageTypeOffer)
		if err == nil {
			if _, err = parseLease(offer, asked); err == nil {
				var l *lease
				if l, err = d.request(ctx, conn, offer, began); err == nil {
					return l, nil
				}
			}
			if ctx.Err() == nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				d.nic.log.Warn("a DHCP offer came to nothing", "error", err)
				d.nic.tell(byDHCP, &found{err: err.Error()})
				// A server that says no at once would be asked at once.
				if pause(ctx, d.nic.plug, jitter(wait)) {
					wait = dhcpFirst
					continue
				}
			}
		}
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case errors.Is(err, errPlug):
			wait = dhcpFirst
			continue
		case errors.Is(err, os.ErrDeadlineExceeded):
			if d.silent++; d.silent >= 3 {
				d.nic.tell(byDHCP, &found{err: fmt.Sprintf("no DHCP server answers (asked %d times)", d.silent)})
			}
		case errors.Is(err, unix.ENETDOWN) || errors.Is(err, unix.ENXIO):
			return nil, err // the link has gone down: a new socket is needed
		}
		wait = min(2*wait, dhcpLast)
	}
}

// request takes an offer.
func (d *dhcp4) request(ctx context.Context, conn net.PacketConn, offer *dhcpv4.DHCPv4, began time.Time) (*lease, error) {
	m, err := d.message(dhcpv4.MessageTypeRequest, began,
		dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(offer.YourIPAddr)),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(offer.ServerIdentifier())),
		dhcpv4.WithTransactionID(offer.TransactionID))
	if err != nil {
		return nil, err
	}
	for range reboots {
		asked := time.Now()
		ack, err := d.ask(ctx, conn, conn, m, jitter(2*dhcpFirst), dhcpv4.MessageTypeAck)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return parseLease(ack, asked)
	}
	return nil, fmt.Errorf("the DHCP server %v offers %v and then says nothing more", offer.ServerIdentifier(), offer.YourIPAddr)
}

// hold keeps the lease: renews it at T1 with its server and at T2 with any, asks again when the carrier was gone. It returns when the
// lease is over, with why, or with nil at ctx's end.
func (d *dhcp4) hold(ctx context.Context) error {
	select { // a carrier of before the lease is no news
	case <-d.nic.plug:
	default:
	}
	for {
		l := d.lease
		now := time.Since(l.began)
		// The next moment of the present state, and the state's end.
		due, rebinding := l.t1, false
		switch {
		case now >= l.length && !l.unlimited:
			return errors.New("it has expired and no DHCP server answers")
		case now >= l.t2:
			due, rebinding = now, true
		case now >= l.t1:
			due = now
		}
		if l.unlimited {
			due = 1 << 62
		}
		if due > now {
			replugged := pause(ctx, d.nic.plug, due-now)
			switch {
			case ctx.Err() != nil:
				return nil
			case replugged:
				if err := d.reboot(ctx); err != nil {
					return err
				}
			}
			continue
		}
		end := l.t2
		if rebinding {
			end = l.length
		}
		// Half of what remains, but not more often than once a minute where that leaves time (section 4.4.5).
		wait := min(max((end-now)/2, min(renewLast, l.length/8)), end-now)
		err := d.renew(ctx, rebinding, jitter(max(wait, time.Second/4)))
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, errNAK):
			return err
		case errors.Is(err, errPlug):
			if err := d.reboot(ctx); err != nil {
				return err
			}
		case err != nil && !errors.Is(err, os.ErrDeadlineExceeded):
			d.nic.log.Warn("the DHCP lease could not be renewed yet", "error", err)
			pause(ctx, d.nic.plug, jitter(max(wait, time.Second/4)))
		}
	}
}

// renew asks for more time: the server itself, or anyone (rebinding). It waits for at most that long.
func (d *dhcp4) renew(ctx context.Context, rebinding bool, wait time.Duration) error {
	read, err := d.listen()
	if err != nil {
		return err
	}
	defer read.Close()
	write, err := d.send(ctx, d.lease.address.Addr())
	if err != nil {
		return err
	}
	defer write.Close()
	m, err := d.message(dhcpv4.MessageTypeRequest, time.Now(), dhcpv4.WithClientIP(d.lease.address.Addr().AsSlice()))
	if err != nil {
		return err
	}
	to := d.lease.server
	if rebinding {
		to = netip.AddrFrom4([4]byte{255, 255, 255, 255})
	}
	asked := time.Now()
	ack, err := d.askAt(ctx, read, write, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, nclient4.ServerPort)), m, wait, dhcpv4.MessageTypeAck)
	if err != nil {
		return err
	}
	return d.renewed(ack, asked)
}

// reboot asks whether the address is still right here (section 3.2). Silence leaves it as it is, until it expires.
func (d *dhcp4) reboot(ctx context.Context) error {
	conn, err := d.listen()
	if err != nil {
		return err
	}
	defer conn.Close()
	m, err := d.message(dhcpv4.MessageTypeRequest, time.Now(), dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(d.lease.address.Addr().AsSlice())))
	if err != nil {
		return err
	}
	for i := range reboots {
		asked := time.Now()
		ack, err := d.ask(ctx, conn, conn, m, jitter(dhcpFirst<<i), dhcpv4.MessageTypeAck)
		switch {
		case err == nil:
			return d.renewed(ack, asked)
		case ctx.Err() != nil || errors.Is(err, errNAK):
			return err
		}
	}
	return nil
}

// renewed takes an ACK over.
func (d *dhcp4) renewed(ack *dhcpv4.DHCPv4, asked time.Time) error {
	l, err := parseLease(ack, asked)
	if err != nil {
		return err
	}
	if l.address.Addr() != d.lease.address.Addr() {
		return fmt.Errorf("the DHCP server gives another address now, %s", l.address)
	}
	d.take(l)
	return nil
}

// take puts a lease in place of the one before.
func (d *dhcp4) take(l *lease) {
	c := d.nic
	c.mtuFromNetwork(l.mtu)
	valid := time.Duration(0)
	if !l.unlimited {
		valid = max(time.Until(l.began.Add(l.length)), time.Second)
	}
	if err := c.address(l.address, valid, 0); err != nil {
		c.log.Error("the DHCP server's address cannot be set", "error", err)
		c.tell(byDHCP, &found{err: err.Error()})
	}
	if d.lease != nil && d.lease.address != l.address {
		c.dropAddress(d.lease.address)
	}
	networks := []netip.Prefix{l.address}
	for _, r := range d.routes {
		if !slices.Contains(l.routes, r) {
			c.dropRoute(r, networks)
		}
	}
	for _, r := range l.routes {
		if err := c.route(r, networks, unix.RTPROT_DHCP); err != nil {
			c.log.Warn("a route of the DHCP server's cannot be set", "error", err)
		}
	}
	if d.lease == nil || d.lease.address != l.address {
		c.log.Info("address by DHCP", "address", l.address, "server", l.server, "lease", l.length, "routes", len(l.routes))
	}
	d.lease, d.routes, d.silent = l, l.routes, 0
	f := &found{addresses: true, dns: l.dns, search: l.search, hostname: l.hostname}
	for _, a := range l.ntp {
		f.ntp = append(f.ntp, a.String())
	}
	if !l.unlimited {
		f.expires = time.Now().Add(valid)
	}
	c.tell(byDHCP, f)
}

// drop removes what the lease gave.
func (d *dhcp4) drop(why error) {
	for _, r := range d.routes {
		d.nic.dropRoute(r, []netip.Prefix{d.lease.address})
	}
	d.nic.dropAddress(d.lease.address)
	d.lease, d.routes = nil, nil
	d.nic.tell(byDHCP, &found{err: why.Error()})
}

// wanted are the options that are asked for.
var wanted = []dhcpv4.OptionCode{
	dhcpv4.OptionSubnetMask, dhcpv4.OptionClasslessStaticRoute, dhcpv4.OptionRouter, dhcpv4.OptionDomainNameServer, dhcpv4.OptionHostName,
	dhcpv4.OptionDomainName, dhcpv4.OptionInterfaceMTU, dhcpv4.OptionNTPServers, dhcpv4.OptionIPAddressLeaseTime, dhcpv4.OptionRenewTimeValue,
	dhcpv4.OptionRebindingTimeValue, dhcpv4.OptionDNSDomainSearchList,
}

// message makes one of ours.
func (d *dhcp4) message(kind dhcpv4.MessageType, began time.Time, more ...dhcpv4.Modifier) (*dhcpv4.DHCPv4, error) {
	c := d.nic
	modifiers := []dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind), dhcpv4.WithHwAddr(c.mac), dhcpv4.WithRequestedOptions(wanted...),
		dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(nclient4.MaxMessageSize)),
		dhcpv4.WithOption(dhcpv4.OptClientIdentifier(append([]byte{1}, c.mac...))), // 1 is Ethernet
	}
	if name := c.n.cfg.Hostname; name != "" {
		modifiers = append(modifiers, dhcpv4.WithOption(dhcpv4.OptHostName(name)))
	}
	m, err := dhcpv4.New(append(modifiers, more...)...)
	if err != nil {
		return nil, err
	}
	m.NumSeconds = uint16(min(time.Since(began)/time.Second, 0xffff))
	return m, nil
}

// errPlug says that the carrier came while an answer was waited for.
var errPlug = errors.New("the carrier has come back")

// ask sends a message to everybody and waits for the answer. Silence is os.ErrDeadlineExceeded.
func (d *dhcp4) ask(ctx context.Context, read, write net.PacketConn, m *dhcpv4.DHCPv4, wait time.Duration, want dhcpv4.MessageType) (*dhcpv4.DHCPv4, error) {
	return d.askAt(ctx, read, write, nclient4.DefaultServers, m, wait, want)
}

// askAt is ask with a receiver.
func (d *dhcp4) askAt(ctx context.Context, read, write net.PacketConn, to *net.UDPAddr, m *dhcpv4.DHCPv4, wait time.Duration, want dhcpv4.MessageType) (*dhcpv4.DHCPv4, error) {
	if err := read.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return nil, err
	}
	// What ends the wait early: the end, and the carrier.
	over := make(chan struct{})
	plugged := make(chan bool, 1)
	go func() {
		seen := false
		select {
		case <-over:
		case <-ctx.Done():
			_ = read.SetReadDeadline(time.Unix(1, 0))
		case <-d.nic.plug:
			seen = true
			_ = read.SetReadDeadline(time.Unix(1, 0))
		}
		plugged <- seen
	}()
	answer, err := d.await(read, write, to, m, want)
	close(over)
	if seen := <-plugged; seen && err != nil {
		return nil, errPlug
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return answer, err
}

func (d *dhcp4) await(read, write net.PacketConn, to *net.UDPAddr, m *dhcpv4.DHCPv4, want dhcpv4.MessageType) (*dhcpv4.DHCPv4, error) {
	if _, err := write.WriteTo(m.ToBytes(), to); err != nil {
		return nil, fmt.Errorf("ask for an address: %w", err)
	}
	b := make([]byte, nclient4.MaxMessageSize)
	for {
		n, _, err := read.ReadFrom(b)
		if err != nil {
			return nil, err
		}
		r, err := dhcpv4.FromBytes(b[:n])
		if err != nil || r.OpCode != dhcpv4.OpcodeBootReply || r.TransactionID != m.TransactionID || !bytes.Equal(r.ClientHWAddr, d.nic.mac) {
			continue
		}
		switch r.MessageType() {
		case want:
			return r, nil
		case dhcpv4.MessageTypeNak:
			if want == dhcpv4.MessageTypeAck {
				return nil, errNAK
			}
		}
	}
}

// listen opens the packet socket.
func (d *dhcp4) listen() (net.PacketConn, error) {
	filter, err := bpf.Assemble(toPort68)
	if err != nil {
		return nil, err
	}
	conn, err := packet.Listen(&net.Interface{Index: d.nic.index, Name: d.nic.name, HardwareAddr: d.nic.mac}, packet.Datagram, unix.ETH_P_IP, &packet.Config{Filter: filter})
	if err != nil {
		return nil, fmt.Errorf("hear DHCP servers: %w", err)
	}
	return nclient4.NewBroadcastUDPConn(conn, &net.UDPAddr{Port: nclient4.ClientPort}), nil
}

// toPort68 lets through IPv4 packets that are UDP, no later fragment, and for port 68.
var toPort68 = []bpf.Instruction{
	bpf.LoadAbsolute{Off: 9, Size: 1},
	bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_UDP, SkipTrue: 6},
	bpf.LoadAbsolute{Off: 6, Size: 2},
	bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 0x1fff, SkipTrue: 4},
	bpf.LoadMemShift{Off: 0},
	bpf.LoadIndirect{Off: 2, Size: 2},
	bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: nclient4.ClientPort, SkipTrue: 1},
	bpf.RetConstant{Val: 1 << 16},
	bpf.RetConstant{Val: 0},
}

// send opens the socket that renewals leave by: from an address of ours there is ARP, and servers are asked alone.
func (d *dhcp4) send(ctx context.Context, from netip.Addr) (net.PacketConn, error) {
	lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) error {
		var err error
		if cerr := rc.Control(func(fd uintptr) { err = bindTo(fd, d.nic.name) }); cerr != nil {
			return cerr
		}
		return err
	}}
	conn, err := lc.ListenPacket(ctx, "udp4", netip.AddrPortFrom(from, nclient4.ClientPort).String())
	if err != nil {
		return nil, fmt.Errorf("ask for more time: %w", err)
	}
	return conn, nil
}
