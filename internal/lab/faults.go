package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Impair has the router drop, in silence, some of what goes to a host and of what comes from it from now on, in percent of the packets,
// in place of what it was told about the host before. A super-packet counts as one. Nothing is dropped where both are 0.
func (l *Lab) Impair(h *Host, to, from int) error {
	link := site{name: h.Name}.link()
	err := l.Router.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "lab-impair-" + h.Name})
		chain := c.AddChain(&nftables.Chain{
			Name: "forward", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityMangle,
		})
		c.FlushChain(chain)
		for _, way := range []struct {
			match   []expr.Any
			percent int
		}{{out(link), to}, {in(link), from}} {
			if way.percent > 0 {
				c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: append(append(way.match, chance(way.percent)...), &expr.Verdict{Kind: expr.VerdictDrop})})
			}
		}
		return c.Flush()
	})
	if err != nil {
		return fmt.Errorf("impair the link of %s: %w", h.Name, err)
	}
	return nil
}

// chance matches so many of a hundred packets, at random.
func chance(percent int) []expr.Any {
	return []expr.Any{
		&expr.Numgen{Register: 1, Modulus: 100, Type: unix.NFT_NG_RANDOM},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 4, Size: 4},
		&expr.Cmp{Op: expr.CmpOpLt, Register: 1, Data: binary.BigEndian.AppendUint32(nil, uint32(percent))},
	}
}

// Unplug takes a host's link to the router down at the host's end, as when its cable is drawn or its power fails: the router sees the link
// without a carrier, and says so to nobody before it has given up on finding the host. Plugged undoes it, with the addresses and routes that
// the kernel removed meanwhile, returns when the link has its carrier, and is called once.
func (h *Host) Unplug() (plugged func() error, err error) {
	var addrs []netlink.Addr
	var routes []netlink.Route
	err = h.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if addrs, err = netlink.AddrList(link, netlink.FAMILY_ALL); err != nil {
			return err
		}
		if routes, err = netlink.RouteList(link, netlink.FAMILY_ALL); err != nil {
			return err
		}
		return netlink.LinkSetDown(link)
	})
	if err != nil {
		return nil, fmt.Errorf("unplug %s: %w", h.Name, err)
	}
	return func() error {
		err := h.Do(func() error {
			link, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			errs := netlink.LinkSetUp(link)
			for _, a := range addrs {
				if a.IP.IsLinkLocalUnicast() {
					continue // the kernel makes it anew
				}
				if a.IP.To4() == nil {
					a.Flags = unix.IFA_F_NODAD // usable at once
				}
				errs = errors.Join(errs, netlink.AddrReplace(link, &a))
			}
			for _, r := range routes {
				if r.Gw != nil {
					errs = errors.Join(errs, netlink.RouteReplace(&r))
				}
			}
			return errs
		})
		if err == nil {
			err = h.carried()
		}
		if err != nil {
			return fmt.Errorf("plug %s in again: %w", h.Name, err)
		}
		return nil
	}, nil
}

// carrierWait bounds how long the kernel takes to find that a link has its carrier again; it looks once a second at most.
const carrierWait = 5 * time.Second

// carried waits until the host's link works.
func (h *Host) carried() error {
	ctx, cancel := context.WithTimeout(context.Background(), carrierWait)
	defer cancel()
	return Until(ctx, 5*time.Millisecond, func() error {
		return h.Do(func() error {
			link, err := netlink.LinkByName("eth0")
			if err == nil && link.Attrs().OperState != netlink.OperUp {
				err = fmt.Errorf("eth0 is %v", link.Attrs().OperState)
			}
			return err
		})
	})
}

// KillAll ends the process and everything that descends from it at once. Servers such as sshd have children in sessions of their own.
func (p *Proc) KillAll() {
	for _, pid := range descendants(p.PID()) {
		_ = unix.Kill(pid, unix.SIGKILL) // has ended meanwhile
	}
	p.Kill()
}
