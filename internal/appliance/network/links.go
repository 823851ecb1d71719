package network

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sallyway/internal/appliance/network/firewall"
)

const (
	settleAfter = 50 * time.Millisecond // changes come in bunches
	lookAgain   = 30 * time.Second      // in case the kernel dropped a notice
	verifyEvery = 60 * time.Second      // how often the packet filter is read back
	retryFilter = 5 * time.Second       // how soon it is set again where that went wrong
)

// run is Run.
func (n *Network) run(ctx context.Context) error {
	n.mu.Lock()
	err := firewall.Apply(n.ports)
	n.filter = err == nil
	n.mu.Unlock()
	if err != nil {
		n.lower()
		return fmt.Errorf("no link is raised: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("raise lo: %w", err)
	}
	done := make(chan struct{})
	defer close(done)
	if err := n.subscribe(done); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer func() {
		cancel()
		n.stopAll()
		wg.Wait()
	}()
	wg.Go(func() { _ = n.clock.Run(ctx) })

	look, verify := time.NewTicker(lookAgain), time.NewTimer(verifyEvery)
	defer look.Stop()
	defer verify.Stop()
	for {
		n.settle(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
		case <-verify.C:
			verify.Reset(n.guard())
		case <-n.wake:
			select { // for the rest of the bunch
			case <-ctx.Done():
				return nil
			case <-time.After(settleAfter):
			}
		}
	}
}

// changed has the loop settle soon.
func (n *Network) changed() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// subscribe has the kernel wake the loop when links, addresses or routes change.
func (n *Network) subscribe(done <-chan struct{}) error {
	links, addrs, routes := make(chan netlink.LinkUpdate, 16), make(chan netlink.AddrUpdate, 16), make(chan netlink.RouteUpdate, 16)
	lost := func(error) { n.changed() } // an overrun: the loop looks at everything anyway
	err := netlink.LinkSubscribeWithOptions(links, done, netlink.LinkSubscribeOptions{ErrorCallback: lost})
	if err == nil {
		go drain(links, n.changed)
		err = netlink.AddrSubscribeWithOptions(addrs, done, netlink.AddrSubscribeOptions{ErrorCallback: lost})
	}
	if err == nil {
		go drain(addrs, n.changed)
		err = netlink.RouteSubscribeWithOptions(routes, done, netlink.RouteSubscribeOptions{ErrorCallback: lost})
	}
	if err == nil {
		go drain(routes, n.changed)
	}
	if err != nil {
		return fmt.Errorf("hear of changed links: %w", err)
	}
	return nil
}

// drain ends when netlink closes the channel, after done.
func drain[T any](ch <-chan T, f func()) {
	for range ch {
		f()
	}
}

// guard reads the packet filter back. Where it is not what it should be it is set again; where that fails, links go down until
// it can be. It returns when to look the next time.
func (n *Network) guard() time.Duration {
	n.mu.Lock()
	ports := n.ports
	err := firewall.Verify(ports)
	if err != nil {
		n.log.Error("the packet filter was changed by somebody else, it is set again", "error", err)
		err = firewall.Apply(ports)
	}
	n.filter = err == nil
	n.mu.Unlock()
	if err == nil {
		n.fail("filter", "")
		return verifyEvery
	}
	n.log.Error("links are down until the packet filter can be set", "error", err)
	n.fail("filter", err.Error())
	n.stopAll()
	n.lower()
	return retryFilter
}

// lower takes every NIC of ours down.
func (n *Network) lower() {
	links, err := netlink.LinkList()
	if err != nil {
		n.log.Error("links cannot be taken down", "error", err)
		return
	}
	for _, l := range links {
		if n.ours(l) {
			if err := netlink.LinkSetDown(l); err != nil {
				n.log.Error("a link cannot be taken down", "link", l.Attrs().Name, "error", err)
			}
		}
	}
}

// ours says whether a link is a physical NIC, or is named in the configuration. The kernel has no kind for physical ones.
// Ports of a bond or bridge, and the hardware below a Hyper-V NIC, belong to what is above them.
func (n *Network) ours(l netlink.Link) bool {
	a := l.Attrs()
	if a.MasterIndex != 0 || a.Flags&unix.IFF_LOOPBACK != 0 || a.RawFlags&unix.IFF_SLAVE != 0 {
		return false
	}
	if slices.ContainsFunc(n.cfg.Interfaces, func(f Interface) bool {
		return f.Name != "" && f.Name == a.Name || f.MAC != "" && f.MAC == a.HardwareAddr.String()
	}) {
		return true
	}
	return l.Type() == "device" && a.EncapType == "ether"
}

// settle looks at everything: NICs that have come or gone, what is found out about them, and what follows from that.
func (n *Network) settle(ctx context.Context) {
	links, err := netlink.LinkList()
	if err != nil {
		n.log.Error("links cannot be listed", "error", err)
		return
	}
	links = slices.DeleteFunc(links, func(l netlink.Link) bool { return !n.ours(l) })
	slices.SortFunc(links, func(a, b netlink.Link) int { return cmp.Compare(a.Attrs().Index, b.Attrs().Index) })
	present := map[int]bool{}
	var gone []*nic
	n.mu.Lock()
	up := n.filter && ctx.Err() == nil
	for order, l := range links {
		a := l.Attrs()
		present[a.Index] = true
		c := n.nics[a.Index]
		if c == nil && up {
			c = newNIC(n, l, order)
			n.nics[a.Index] = c
			c.start(ctx)
		}
		if c != nil {
			c.observe(l)
		}
	}
	for index, c := range n.nics {
		if !present[index] {
			gone = append(gone, c)
			delete(n.nics, index)
		}
	}
	n.mu.Unlock()
	for _, c := range gone {
		c.stop()
	}
	n.conclude()
}

// stopAll ends the work on all NICs.
func (n *Network) stopAll() {
	n.mu.Lock()
	all := n.nics
	n.nics = map[int]*nic{}
	n.mu.Unlock()
	for _, c := range all {
		c.stop()
	}
}

// fail keeps an error for the status under a name; "" ends it.
func (n *Network) fail(name, text string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.errors == nil {
		n.errors = map[string]string{}
	}
	n.errors[name] = text
	n.status.Error = ""
	for _, key := range []string{"filter", "resolv.conf", "hostname"} {
		if n.errors[key] != "" {
			n.status.Error = n.errors[key]
			return
		}
	}
}

// conclude writes resolv.conf and host name from what all NICs know together, tells the clock, and says whether we are online.
func (n *Network) conclude() {
	n.mu.Lock()
	var nics []*nic
	for _, c := range n.nics {
		nics = append(nics, c)
	}
	slices.SortFunc(nics, func(a, b *nic) int { return cmp.Compare(a.order, b.order) })
	var dns []netip.Addr
	var search, ntp []string
	hostname, online := n.cfg.Hostname, false
	for _, c := range nics {
		for _, source := range sources {
			f := c.found[source]
			if f == nil {
				continue
			}
			dns, search, ntp = union(dns, f.dns), union(search, f.search), union(ntp, f.ntp)
			hostname = cmp.Or(hostname, f.hostname)
		}
		online = online || len(c.addresses) > 0 && len(c.routers) > 0
	}
	if len(n.cfg.DNS) > 0 {
		dns = n.cfg.DNS
	}
	if len(n.cfg.Search) > 0 {
		search = n.cfg.Search
	}
	hostname = cmp.Or(hostname, DefaultHostname)
	newly := online && !n.status.Online
	n.status.DNS, n.status.Search, n.status.Online = dns, search, online
	n.mu.Unlock()

	n.setHostname(hostname)
	if conf := resolvConf(dns, search); len(nics) > 0 && !bytes.Equal(conf, n.resolv) {
		if err := replace(n.cfg.ResolvConf, conf); err != nil {
			n.fail("resolv.conf", fmt.Sprintf("write %s: %v", n.cfg.ResolvConf, err))
		} else {
			n.resolv = conf
			n.fail("resolv.conf", "")
		}
	}
	n.clock.Offer(ntp)
	if newly {
		n.log.Info("online", "dns", dns)
		n.clock.Now()
		select {
		case <-n.online:
		default:
			close(n.online)
		}
	}
}

func (n *Network) setHostname(name string) {
	name = name[:min(len(name), 64)] // HOST_NAME_MAX
	if n.status.Hostname == name {   // written by this goroutine alone
		return
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		n.fail("hostname", fmt.Sprintf("set the host name to %s: %v", name, err))
		return
	}
	n.fail("hostname", "")
	n.mu.Lock()
	n.status.Hostname = name
	n.mu.Unlock()
}

// union appends those of more that are not in all yet.
func union[T comparable](all, more []T) []T {
	for _, m := range more {
		if !slices.Contains(all, m) {
			all = append(all, m)
		}
	}
	return all
}

// Limits of resolv.conf(5): programs look at three servers and six domains.
const (
	maxDNS    = 3
	maxSearch = 6
)

// resolvConf returns the file's text.
func resolvConf(dns []netip.Addr, search []string) []byte {
	var b bytes.Buffer
	b.WriteString("# Written by the appliance; changes are lost.\n")
	for _, a := range dns[:min(len(dns), maxDNS)] {
		fmt.Fprintf(&b, "nameserver %s\n", a)
	}
	if len(search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(search[:min(len(search), maxSearch)], " "))
	}
	return b.Bytes()
}

// replace writes a file by renaming one over it.
func replace(path string, b []byte) error {
	if to, err := filepath.EvalSymlinks(path); err == nil {
		path = to
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".resolv-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}
