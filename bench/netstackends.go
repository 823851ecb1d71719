package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"sallyway/netstack"
	"sallyway/tun"
	"sallyway/tunnel"
)

// netstackEnd says what a process that is a userspace stack behind a TUN is to do.
type netstackEnd struct {
	TUN    string       // name of its device
	MTU    int          // bytes
	Addr   netip.Prefix // of the device
	Routes netip.Prefix // into the device; each connection there is spliced to the same port of loopback
}

// dialLoopback is where all connections lead.
func dialLoopback(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	var d net.Dialer
	d.SetMultipathTCP(false)
	c, err := d.DialContext(ctx, "tcp", netip.AddrPortFrom(loopback, to.Port()).String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// ownNetstack is our TUN and netstack. It runs until ctx ends.
func ownNetstack(ctx context.Context, config []byte) (err error) {
	var cfg netstackEnd
	if err := json.Unmarshal(config, &cfg); err != nil {
		return err
	}
	dev, err := tun.Open(tun.Config{Name: cfg.TUN, MTU: cfg.MTU})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	if err := dev.SetAddresses([]netip.Prefix{cfg.Addr}); err != nil {
		return err
	}
	if skipped, err := dev.SetRoutes([]netip.Prefix{cfg.Routes}, nil); err != nil || len(skipped) > 0 {
		return fmt.Errorf("route %v: %w %v", cfg.Routes, err, skipped)
	}
	s, err := netstack.New(netstack.Config{Device: dev, HandleTCP: func(ctx context.Context, r *netstack.TCPRequest) {
		up, err := dialLoopback(ctx, r.Dst)
		if err != nil {
			r.Reject(netstack.Refused)
			return
		}
		down, err := r.Accept()
		if err != nil {
			_ = up.Close()
			return
		}
		_ = tunnel.Splice(ctx, tunnel.NewConnFlow(down), tunnel.NewConnFlow(up)) // both ends hear of it
	}})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	return s.Run(ctx)
}

// plainNetstack is the usual construction; its TUN waits for an address and a route. It runs until ctx ends.
func plainNetstack(ctx context.Context, config []byte) error {
	var cfg netstackEnd
	if err := json.Unmarshal(config, &cfg); err != nil {
		return err
	}
	p, err := newPlainStack(cfg.TUN, cfg.MTU, dialLoopback)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	return p.run(ctx)
}
