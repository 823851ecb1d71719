package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"sallyway/internal/lab"
)

// Forwarded UDP is the yardstick of added latency: a process on the first relay's host that passes every datagram on as it
// comes, one read and one write each, with no encryption, no framing and nobody to ask.

// ForwardedUDP is its name in the results.
const ForwardedUDP = "raw UDP, forwarded packet by packet"

// forwardPort is the forwarder's, one that the router lets through to relays.
const forwardPort = 50700

// forwardFlows bounds the senders that a forwarder keeps apart.
const forwardFlows = 64

// forwardUDP starts the forwarder where datagrams are measured.
func (r *runner) forwardUDP(ctx context.Context, l *lab.Lab) error {
	if r.cfg.Beats == 0 {
		return nil
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	at := netip.AddrPortFrom(l.Addr(l.Relay1), forwardPort)
	to := netip.AddrPortFrom(lab.RawAddr, echoPort)
	p, err := l.Relay1.Start(lab.Spec{Name: "udp-forward", Args: []string{exe, "udp-forward", at.String(), to.String()}, Grace: time.Second})
	if err != nil {
		return err
	}
	r.forward = &way{name: ForwardedUDP, addr: at.Addr(), echo: forwardPort, packets: true}
	return p.WaitReady(ctx, 0, "^ready")
}

// ForwardUDP passes datagrams from at to another address, and the answers back, until ctx ends. It says ready on standard
// output.
func ForwardUDP(ctx context.Context, at, to netip.AddrPort) error {
	in, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return err
	}
	defer in.Close()
	stop := context.AfterFunc(ctx, func() { in.Close() })
	defer stop()
	fmt.Println("ready", in.LocalAddr())
	flows := make(map[netip.AddrPort]*net.UDPConn)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer func() {
		for _, c := range flows {
			c.Close()
		}
	}()
	b := make([]byte, 1<<16)
	for {
		n, from, err := in.ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			continue // an ICMP error of an answer
		}
		out := flows[from]
		if out == nil {
			if len(flows) == forwardFlows {
				continue
			}
			if out, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to)); err != nil {
				return err
			}
			flows[from] = out
			wg.Go(func() { forwardBack(in, out, from) })
		}
		_, _ = out.Write(b[:n]) // a datagram that is lost
	}
}

// forwardBack passes answers to who asked, until out is closed.
func forwardBack(in, out *net.UDPConn, to netip.AddrPort) {
	b := make([]byte, 1<<16)
	for {
		n, err := out.Read(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = in.WriteToUDPAddrPort(b[:n], to)
		}
	}
}
