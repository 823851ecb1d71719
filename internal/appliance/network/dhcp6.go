package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
)

// dhcp6 is the DHCPv6 client of one NIC (RFC 8415): addresses and other things, or other things alone, as routers say.
type dhcp6 struct {
	nic     *nic
	managed bool
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	lease   *lease6
}

const (
	solicit6First = 1 * time.Second // SOL_TIMEOUT, section 7.6
	solicit6Last  = 2 * time.Minute // not as rarely as SOL_MAX_RT: it is cheap
	refresh6      = 24 * time.Hour  // IRT_DEFAULT
	shortest6     = 2 * time.Second // for T1: keeps a server from having us ask all the time
)

// lease6 is what a REPLY says, checked.
type lease6 struct {
	addresses      map[netip.Addr]lifetimes
	server         dhcpv6.DUID
	began          time.Time
	t1, t2, length time.Duration // length is the longest valid lifetime; 0 without addresses
	dns            []netip.Addr
	ntp, search    []string
	refresh        time.Duration
	unlimited      bool
	identity       *dhcpv6.OptIANA // to be sent back
}

type lifetimes struct{ valid, preferred time.Duration }

// parseReply reads a REPLY. With managed it has to have an address.
func parseReply(m *dhcpv6.Message, managed bool, began time.Time) (*lease6, error) {
	l := &lease6{addresses: map[netip.Addr]lifetimes{}, server: m.Options.ServerID(), began: began, refresh: m.Options.InformationRefreshTime(refresh6)}
	if l.server == nil {
		return nil, errors.New("the DHCPv6 server does not name itself")
	}
	if s := m.Options.Status(); s != nil && s.StatusCode != iana.StatusSuccess {
		return nil, fmt.Errorf("the DHCPv6 server refuses: %v", s.StatusCode)
	}
	l.refresh = max(l.refresh, 10*time.Minute) // section 21.23: IRT_MINIMUM
	l.dns = hosts(m.Options.DNS())
	for _, a := range hosts(append(m.Options.NTPServers(), m.Options.SNTP()...)) {
		l.ntp = append(l.ntp, a.String())
	}
	if s := m.Options.DomainSearchList(); s != nil {
		l.search = names(s.Labels)
	}
	if !managed {
		return l, nil
	}
	ia := m.Options.OneIANA()
	if ia == nil {
		return nil, errors.New("the DHCPv6 server gives no address")
	}
	if s := ia.Options.Status(); s != nil && s.StatusCode != iana.StatusSuccess {
		return nil, fmt.Errorf("the DHCPv6 server gives no address: %v", s.StatusCode)
	}
	for _, a := range ia.Options.Addresses() {
		addr, ok := netip.AddrFromSlice(a.IPv6Addr)
		// Section 21.6: a preferred lifetime beyond the valid one makes the option void.
		if !ok || addr.Is4In6() || !isHost(addr) || addr.IsLinkLocalUnicast() || a.ValidLifetime <= 0 || a.PreferredLifetime > a.ValidLifetime || len(l.addresses) >= maxServers {
			continue
		}
		l.addresses[addr] = lifetimes{a.ValidLifetime, a.PreferredLifetime}
		l.length = max(l.length, a.ValidLifetime)
	}
	if len(l.addresses) == 0 {
		return nil, errors.New("the DHCPv6 server gives no address that can be used")
	}
	l.identity = ia
	l.unlimited = l.length >= forever*time.Second
	l.length = max(l.length, 4*shortest6)
	l.t1, l.t2 = ia.T1, ia.T2
	if l.t2 <= 0 || l.t2 >= l.length {
		l.t2 = l.length / 5 * 4
	}
	if l.t1 <= 0 || l.t1 >= l.t2 {
		l.t1 = l.t2 / 8 * 5
	}
	l.t1 = max(l.t1, shortest6)
	l.t2 = max(l.t2, l.t1+shortest6/2)
	return l, nil
}

// startDHCP6 begins to ask; stop ends it.
func startDHCP6(ctx context.Context, c *nic, managed bool) *dhcp6 {
	d := &dhcp6{nic: c, managed: managed}
	ctx, d.cancel = context.WithCancel(ctx)
	d.wg.Go(func() { d.run(ctx) })
	return d
}

// stop ends the asking. What was given stays until it expires: the kernel counts.
func (d *dhcp6) stop() {
	d.cancel()
	d.wg.Wait()
}

func (d *dhcp6) run(ctx context.Context) {
	silent := 0
	for wait := solicit6First; ctx.Err() == nil; {
		l, err := d.acquire(ctx, wait)
		if err == nil {
			silent, wait = 0, solicit6First
			d.take(l)
			if err = d.hold(ctx); err == nil || ctx.Err() != nil {
				continue // a new look at everything
			}
			d.nic.log.Warn("the DHCPv6 lease is lost", "error", err)
			d.drop()
		}
		if ctx.Err() != nil {
			return
		}
		if silent++; silent >= 3 {
			d.nic.tell(byDHCPv6, &found{err: err.Error()})
		}
		if !pauseFor(ctx, jitter(wait)) {
			return
		}
		wait = min(2*wait, solicit6Last)
	}
}

// acquire asks everybody once.
func (d *dhcp6) acquire(ctx context.Context, wait time.Duration) (*lease6, error) {
	conn, err := d.listen(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	began := time.Now()
	if !d.managed {
		m, err := d.message(dhcpv6.MessageTypeInformationRequest, nil)
		if err != nil {
			return nil, err
		}
		reply, err := d.ask(ctx, conn, m, jitter(2*wait), dhcpv6.MessageTypeReply)
		if err != nil {
			return nil, err
		}
		return parseReply(reply, false, began)
	}
	m, err := d.message(dhcpv6.MessageTypeSolicit, nil)
	if err != nil {
		return nil, err
	}
	advertise, err := d.ask(ctx, conn, m, jitter(2*wait), dhcpv6.MessageTypeAdvertise)
	if err != nil {
		return nil, err
	}
	offer, err := parseReply(advertise, true, began)
	if err != nil {
		return nil, err
	}
	if m, err = d.message(dhcpv6.MessageTypeRequest, offer); err != nil {
		return nil, err
	}
	began = time.Now()
	reply, err := d.ask(ctx, conn, m, jitter(2*wait), dhcpv6.MessageTypeReply)
	if err != nil {
		return nil, err
	}
	return parseReply(reply, true, began)
}

// hold prolongs what there is. It returns nil when everything is to be asked anew, and an error when the addresses are over.
func (d *dhcp6) hold(ctx context.Context) error {
	if !d.managed {
		pauseFor(ctx, d.lease.refresh)
		return nil
	}
	for {
		l := d.lease
		if l.unlimited {
			<-ctx.Done()
			return nil
		}
		now := time.Since(l.began)
		if now >= l.length {
			return errors.New("it has expired and no DHCPv6 server answers")
		}
		if now < l.t1 {
			if !pauseFor(ctx, l.t1-now) {
				return nil
			}
			continue
		}
		kind, end := dhcpv6.MessageTypeRenew, l.t2
		if now >= l.t2 {
			kind, end = dhcpv6.MessageTypeRebind, l.length
		}
		wait := min(max((end-now)/2, min(10*time.Second, l.length/8)), end-now) // REN_TIMEOUT, section 7.6
		err := d.prolong(ctx, kind, max(wait, shortest6/4))
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && !pauseFor(ctx, min(wait, 10*time.Second)/4) {
			return nil
		}
	}
}

func (d *dhcp6) prolong(ctx context.Context, kind dhcpv6.MessageType, wait time.Duration) error {
	conn, err := d.listen(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	m, err := d.message(kind, d.lease)
	if err != nil {
		return err
	}
	began := time.Now()
	reply, err := d.ask(ctx, conn, m, wait, dhcpv6.MessageTypeReply)
	if err != nil {
		return err
	}
	l, err := parseReply(reply, true, began)
	if err != nil {
		return err
	}
	d.take(l)
	return nil
}

// take puts a lease in place of the one before. The prefix of the network is the router's business, so addresses have 128 bits.
func (d *dhcp6) take(l *lease6) {
	c := d.nic
	for a, life := range l.addresses {
		valid, preferred := life.valid, life.preferred
		if valid >= forever*time.Second {
			valid, preferred = 0, 0
		}
		if err := c.address(netip.PrefixFrom(a, 128), valid, preferred); err != nil {
			c.log.Error("the DHCPv6 server's address cannot be set", "error", err)
		}
	}
	if d.lease != nil {
		for a := range d.lease.addresses {
			if _, still := l.addresses[a]; !still {
				c.dropAddress(netip.PrefixFrom(a, 128))
			}
		}
	}
	if d.lease == nil && len(l.addresses) > 0 {
		c.log.Info("addresses by DHCPv6", "addresses", len(l.addresses))
	}
	d.lease = l
	c.tell(byDHCPv6, &found{addresses: len(l.addresses) > 0, dns: l.dns, search: l.search, ntp: l.ntp})
}

func (d *dhcp6) drop() {
	for a := range d.lease.addresses {
		d.nic.dropAddress(netip.PrefixFrom(a, 128))
	}
	d.lease = nil
	d.nic.tell(byDHCPv6, nil)
}

// message makes one of ours; to the server of l, with the addresses of l, where the kind has these.
func (d *dhcp6) message(kind dhcpv6.MessageType, l *lease6) (*dhcpv6.Message, error) {
	m, err := dhcpv6.NewMessage()
	if err != nil {
		return nil, err
	}
	m.MessageType = kind
	m.AddOption(dhcpv6.OptClientID(d.duid()))
	m.AddOption(dhcpv6.OptElapsedTime(0))
	m.AddOption(dhcpv6.OptRequestedOption(dhcpv6.OptionDNSRecursiveNameServer, dhcpv6.OptionDomainSearchList, dhcpv6.OptionNTPServer, dhcpv6.OptionSNTPServerList,
		dhcpv6.OptionInformationRefreshTime))
	if l != nil && kind != dhcpv6.MessageTypeRebind {
		m.AddOption(dhcpv6.OptServerID(l.server))
	}
	if d.managed {
		ia := &dhcpv6.OptIANA{IaId: [4]byte(d.nic.mac[2:6])}
		if l != nil {
			for a := range l.addresses {
				ia.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: a.AsSlice()})
			}
		}
		m.AddOption(ia)
	}
	return m, nil
}

// duid identifies the machine by the NIC's address alone (section 11.4): it is the same after every start, without anything kept.
func (d *dhcp6) duid() dhcpv6.DUID {
	return &dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: d.nic.mac}
}

// listen opens the socket that servers answer to.
func (d *dhcp6) listen(ctx context.Context) (net.PacketConn, error) {
	lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) error {
		var err error
		if cerr := rc.Control(func(fd uintptr) { err = bindTo(fd, d.nic.name) }); cerr != nil {
			return cerr
		}
		return err
	}}
	conn, err := lc.ListenPacket(ctx, "udp6", fmt.Sprintf("[::]:%d", dhcpv6.DefaultClientPort))
	if err != nil {
		return nil, fmt.Errorf("hear DHCPv6 servers: %w", err)
	}
	return conn, nil
}

// ask sends a message to all servers and relays of the link and waits for the first answer of that kind that is ours.
func (d *dhcp6) ask(ctx context.Context, conn net.PacketConn, m *dhcpv6.Message, wait time.Duration, want dhcpv6.MessageType) (*dhcpv6.Message, error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	to := &net.UDPAddr{IP: dhcpv6.AllDHCPRelayAgentsAndServers, Port: dhcpv6.DefaultServerPort, Zone: d.nic.name}
	if _, err := conn.WriteTo(m.ToBytes(), to); err != nil {
		return nil, fmt.Errorf("ask DHCPv6 servers: %w", err)
	}
	b := make([]byte, 9000)
	for {
		n, _, err := conn.ReadFrom(b)
		if err != nil {
			return nil, fmt.Errorf("no DHCPv6 server answers: %w", err)
		}
		r, err := dhcpv6.MessageFromBytes(slices.Clone(b[:n]))
		if err != nil || r.TransactionID != m.TransactionID || r.MessageType != want || r.Options.ClientID() == nil || !r.Options.ClientID().Equal(d.duid()) {
			continue
		}
		return r, nil
	}
}
