package lab

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"

	"sallyway/internal/lab/wan"
	"sallyway/tun"
)

// layAccess lays a wire as an emulated link: w.a is the router's end and w.b the client's. It runs until the lab is closed.
func (l *Lab) layAccess(w wire) error {
	if l.cfg.AccessNetem {
		return l.netemAccess(w)
	}
	end := func(h *Host, name string, addrs []string) (d *tun.Device, err error) {
		err = h.Do(func() error {
			if d, err = tun.Open(tun.Config{Name: name, MTU: w.mtu}); err != nil {
				return err
			}
			return errors.Join(raise(name, addrs), lengthen(name))
		})
		if err != nil {
			err = fmt.Errorf("%s on %s: %w", name, h.Name, err)
		}
		return d, err
	}
	client, err := end(w.b, w.bName, w.bAddr)
	router, err2 := end(w.a, w.aName, w.aAddr)
	shut := func() {
		for _, d := range []*tun.Device{client, router} {
			if d != nil {
				d.Close()
			}
		}
	}
	if err := errors.Join(err, err2); err != nil {
		shut()
		return fmt.Errorf("the client's access: %w", err)
	}
	cfg := *l.cfg.Access
	cfg.A, cfg.B = client, router
	if l.access, err = wan.New(cfg); err != nil {
		shut()
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := l.access.Run(ctx); err != nil {
			l.cfg.Log.Warn("the client's access has ended", "error", err)
		}
	}()
	l.onClose(func() {
		cancel()
		<-ended
		shut()
	})
	return nil
}

// accessQueue is how many packets wait for the emulator at an end of the link: the kernel's 500 are less than one burst of a
// relay, and what they cannot hold would be lost without being counted.
const accessQueue = 20_000

// lengthen gives a link of the calling thread's namespace that queue.
func lengthen(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetTxQLen(link, accessQueue)
}

// netemAccess lays it as a veth pair whose ends delay and lose by the kernel's netem.
func (l *Lab) netemAccess(w wire) error {
	if err := lay(w); err != nil {
		return err
	}
	err := w.b.Do(func() error { return wan.Netem(w.bName, l.cfg.Access.AtoB) })
	if err == nil {
		err = w.a.Do(func() error { return wan.Netem(w.aName, l.cfg.Access.BtoA) })
	}
	if err != nil {
		return fmt.Errorf("the client's access: %w", err)
	}
	return nil
}

// SetAccess changes the client's emulated access link from now on, see Config.Access; up is its upload. It fails where there is none.
func (l *Lab) SetAccess(up, down wan.Direction) error {
	if l.access == nil {
		return errors.New("the client's access link is not emulated")
	}
	return l.access.Set(up, down)
}

// AccessStats are the counts of the client's emulated access link, see Config.Access; AtoB is its upload.
func (l *Lab) AccessStats() wan.Stats {
	if l.access == nil {
		return wan.Stats{}
	}
	return l.access.Stats()
}
