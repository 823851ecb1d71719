package network

import (
	"context"
	"encoding/binary"
	"errors"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/ipv6"
)

// router6 hears the router advertisements of one NIC (RFC 4861). Addresses and routes out of them are the kernel's work; here it is what the
// kernel leaves: name servers and search domains (RFC 8106), and whether there is DHCPv6 to be asked.
type router6 struct {
	nic  *nic
	conn net.PacketConn
	pc   *ipv6.PacketConn
}

const (
	solicitations   = 3               // RFC 4861 section 10, MAX_RTR_SOLICITATIONS
	solicitInterval = 4 * time.Second // RTR_SOLICITATION_INTERVAL
)

var allRouters = &net.IPAddr{IP: net.ParseIP("ff02::2")}

// newRouter6 opens the socket. It is called before the link is raised, so that the answer to the kernel's own solicitation is heard.
func newRouter6(c *nic) (*router6, error) {
	lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) error {
		var err error
		if cerr := rc.Control(func(fd uintptr) { err = bindTo(fd, c.name) }); cerr != nil {
			return cerr
		}
		return err
	}}
	conn, err := lc.ListenPacket(context.Background(), "ip6:ipv6-icmp", "::")
	if err != nil {
		return nil, err
	}
	r := &router6{nic: c, conn: conn, pc: ipv6.NewPacketConn(conn)}
	var filter ipv6.ICMPFilter
	filter.SetAll(true)
	filter.Accept(ipv6.ICMPTypeRouterAdvertisement)
	err = errors.Join(r.pc.SetICMPFilter(&filter), r.pc.SetControlMessage(ipv6.FlagHopLimit, true), r.pc.SetHopLimit(255), r.pc.SetMulticastHopLimit(255))
	if err != nil {
		conn.Close()
		return nil, err
	}
	return r, nil
}

// advertisement is what a router says, as far as we listen.
type advertisement struct {
	managed, other bool          // addresses, or other things, by DHCPv6
	lifetime       time.Duration // as a default router
	dns            map[netip.Addr]time.Duration
	search         map[string]time.Duration
}

// Types of options (RFC 8106 section 5).
const (
	optionRDNSS = 25
	optionDNSSL = 31
)

// maxAdvertised bounds what is kept of what routers say.
const maxAdvertised = 16

var errNoAdvertisement = errors.New("not a router advertisement")

// parseAdvertisement reads an ICMPv6 message (RFC 4861 section 4.2):
//
//	0  type 134, code 0, checksum (the kernel has looked)    8  reachable time
//	4  hop limit                                            12  retransmission timer
//	5  flags: managed 0x80, other 0x40                      16  options: type, length in units of 8 bytes, content
//	6  router lifetime in seconds
func parseAdvertisement(b []byte) (advertisement, error) {
	if len(b) < 16 || b[0] != 134 || b[1] != 0 {
		return advertisement{}, errNoAdvertisement
	}
	a := advertisement{
		managed: b[5]&0x80 != 0, other: b[5]&0x40 != 0, lifetime: time.Duration(binary.BigEndian.Uint16(b[6:])) * time.Second,
		dns: map[netip.Addr]time.Duration{}, search: map[string]time.Duration{},
	}
	for b = b[16:]; len(b) > 0; {
		if len(b) < 8 || b[1] == 0 || int(b[1])*8 > len(b) {
			return advertisement{}, errNoAdvertisement // section 6.1.2: all of it is to be discarded
		}
		option := b[:int(b[1])*8]
		b = b[len(option):]
		life := time.Duration(binary.BigEndian.Uint32(option[4:])) * time.Second
		switch option[0] {
		case optionRDNSS:
			for rest := option[8:]; len(rest) >= 16 && len(a.dns) < maxAdvertised; rest = rest[16:] {
				if addr := netip.AddrFrom16([16]byte(rest)); isHost(addr) && !addr.Is4In6() {
					a.dns[addr] = life
				}
			}
		case optionDNSSL:
			for _, name := range domains(option[8:]) {
				if len(a.search) < maxAdvertised {
					a.search[name] = life
				}
			}
		}
	}
	return a, nil
}

// domains reads names in the wire form of DNS, without compression, one behind the other; zeros are padding.
func domains(b []byte) []string {
	var all []string
	var labels []string
	for len(b) > 0 {
		n := int(b[0])
		b = b[1:]
		if n == 0 {
			if name := strings.Join(labels, "."); isName(name) {
				all = append(all, name)
			}
			labels = nil
			continue
		}
		if n > 63 || n > len(b) {
			break
		}
		labels, b = append(labels, string(b[:n])), b[n:]
	}
	return all
}

// run hears routers until ctx ends.
func (r *router6) run(ctx context.Context) {
	defer r.conn.Close()
	heard := make(chan advertisement)
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = r.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	wg.Go(func() { r.read(ctx, heard) })

	dns, search := map[netip.Addr]time.Time{}, map[string]time.Time{}
	var mode string // of DHCPv6
	var dhcp *dhcp6
	defer func() {
		if dhcp != nil {
			dhcp.stop()
		}
	}()
	solicit := time.NewTimer(0) // the link may be up for long
	defer solicit.Stop()
	sent := 0
	expire := time.NewTimer(time.Hour)
	defer expire.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.nic.plug6:
			sent = 0
			solicit.Reset(0)
		case <-solicit.C:
			if sent < solicitations {
				// Without an address that may be used yet it fails: the kernel sends one itself then.
				_, _ = r.conn.WriteTo([]byte{133, 0, 0, 0, 0, 0, 0, 0}, &net.IPAddr{IP: allRouters.IP, Zone: r.nic.name})
				sent++
				solicit.Reset(jitter(solicitInterval))
			}
		case <-expire.C:
		case a := <-heard:
			sent = solicitations
			now := time.Now()
			keep(dns, a.dns, now)
			keep(search, a.search, now)
			want := ""
			switch {
			case a.managed:
				want = "managed"
			case a.other:
				want = "other"
			}
			if want != mode && want != "" { // routers that say less do not take back what others have said
				if dhcp != nil {
					dhcp.stop()
				}
				mode, dhcp = want, startDHCP6(ctx, r.nic, a.managed)
			}
		}
		expire.Reset(min(tidy(dns), tidy(search)))
		f := &found{dns: keys(dns, netip.Addr.Compare), search: keys(search, strings.Compare)}
		r.nic.tell(byRA, f)
	}
}

// read passes advertisements on.
func (r *router6) read(ctx context.Context, heard chan<- advertisement) {
	b := make([]byte, 9000)
	for {
		n, cm, from, err := r.pc.ReadFrom(b)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			if !pauseFor(ctx, time.Second) { // the link is down for the moment
				return
			}
			continue
		}
		src, ok := from.(*net.IPAddr)
		// From the link itself alone: through no router (section 6.1.2).
		if !ok || !src.IP.IsLinkLocalUnicast() || cm == nil || cm.HopLimit != 255 {
			continue
		}
		a, err := parseAdvertisement(b[:n])
		if err != nil {
			continue
		}
		select {
		case heard <- a:
		case <-ctx.Done():
			return
		}
	}
}

// pauseFor waits, and says false at ctx's end.
func pauseFor(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// keep notes until when each is good; a life of zero ends it.
func keep[K comparable](all map[K]time.Time, said map[K]time.Duration, now time.Time) {
	for k, life := range said {
		switch {
		case life == 0:
			delete(all, k)
		case len(all) < maxAdvertised || !all[k].IsZero():
			all[k] = now.Add(life)
		}
	}
}

// tidy removes what is over, and returns how long it takes until the next one is.
func tidy[K comparable](all map[K]time.Time) time.Duration {
	next := time.Hour
	for k, until := range all {
		left := time.Until(until)
		if left <= 0 {
			delete(all, k)
			continue
		}
		next = min(next, left)
	}
	return next
}

// keys returns those of a map in order.
func keys[K comparable](all map[K]time.Time, order func(a, b K) int) []K {
	return slices.SortedFunc(maps.Keys(all), order)
}
