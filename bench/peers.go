package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"

	"sallyway/internal/lab"
)

// Names of the peers: products and constructions that do the same job.
const (
	OpenSSH         = "OpenSSH through a hub"
	WireGuardGo     = "wireguard-go through a hub"
	Nebula          = "Nebula through a relay"
	OpenVPN         = "OpenVPN through a server"
	PionTURN        = "TURN as commonly built (pion, quic-go)"
	CoturnTURN      = "TURN as commonly built (coturn, quic-go)"
	QUICDirect      = "QUIC from end to end, no relay (quic-go)"
	WireGuardDirect = "wireguard-go from end to end, no hub"
)

// Ports of the peers' hubs, all on the second relay's host: the router lets through one TCP port for them, and UDP from 49152 on.
const (
	sshHubPort       = lab.HubPort
	wireguardHubPort = 50820
	nebulaHubPort    = 50242
	openvpnHubPort   = 50194
	turnHubPort      = 50478
	coturnHubPort    = 50479
)

// Ports on the client's loopback that lead to the private host's: those of the peers that forward ports.
const (
	sshIperfPort = 15201
	sshEchoPort  = 17000
)

// Ports of the TURN stand-ins on the client's loopback, by kind: of iperf3 and of echo.
var (
	pionPorts   = [2]uint16{25201, 27000}
	coturnPorts = [2]uint16{35201, 37000}
	directPorts = [2]uint16{45201, 47000}
)

// peerWait bounds how long a peer has until the private host is reached through it.
const peerWait = 20 * time.Second

// peer is one of the compared products.
type peer struct {
	name  string
	needs []string // programs
	start func(context.Context, *lab.Lab) (way, error)
}

// Missing is a peer that did not take part.
type Missing struct {
	Peer string `json:"peer"`
	Why  string `json:"why"`
}

var loopback = netip.MustParseAddr("127.0.0.1")

// peers are all peers. Each reaches the private host in its own way, so that all may be up at once: those that route have
// an address of the private host for themselves.
func peers() []peer {
	return []peer{
		{OpenSSH, []string{"ssh", "sshd", "ssh-keygen"}, startSSH},
		{WireGuardGo, []string{"wg"}, startWireGuard},
		{Nebula, []string{"nebula", "nebula-cert"}, startNebula},
		{OpenVPN, []string{"openvpn"}, startOpenVPN},
		{PionTURN, nil, startPion},
		{CoturnTURN, []string{"turnserver"}, startCoturn},
		{QUICDirect, nil, startQUICDirect},
		{WireGuardDirect, []string{"wg"}, startWireGuardDirect},
	}
}

// Peers are the names of the peers that have a hub in the place of a relay.
func Peers() []string { return []string{OpenSSH, WireGuardGo, Nebula, OpenVPN, PionTURN, CoturnTURN} }

// startPeers starts those of the scenario's peers whose programs are there and adds their ways. A peer that is missing or
// does not work is named in the result.
func (r *runner) startPeers(ctx context.Context, l *lab.Lab) error {
	for _, p := range peers() {
		if !slices.Contains(r.scenario.Beside, p.name) {
			continue
		}
		fmt.Fprintf(r.out, "peer: %s\n", p.name)
		w, err := r.startPeer(ctx, l, p)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			for _, pr := range w.procs {
				pr.Kill()
			}
			fmt.Fprintf(r.out, "peer: %s takes no part: %v\n", p.name, err)
			r.o.Missing = append(r.o.Missing, Missing{p.name, err.Error()})
			continue
		}
		r.ways = append(r.ways, w)
	}
	return nil
}

func (r *runner) startPeer(ctx context.Context, l *lab.Lab, p peer) (way, error) {
	for _, program := range p.needs {
		if _, err := lab.Program(program); err != nil {
			return way{}, err
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, peerWait, errors.New("the private host is not reached in time"))
	defer cancel()
	w, err := p.start(ctx, l)
	w.name = p.name
	if err != nil {
		return w, err
	}
	err = lab.Until(ctx, 100*time.Millisecond, func() error {
		_, err := r.firstByte(ctx, w)
		return err
	})
	if err != nil {
		for _, pr := range w.procs {
			err = fmt.Errorf("%w\n%s:\n%s", err, pr.Name, pr.Log.Tail(5))
		}
	}
	return w, err
}

// stopPeers ends the peers' processes, the newest first. The lab would too, at its end.
func (r *runner) stopPeers() {
	for _, w := range slices.Backward(r.ways) {
		if w.name == Sallyway {
			continue
		}
		for _, p := range slices.Backward(w.procs) {
			if err := p.Stop(); err != nil {
				p.Kill()
			}
		}
	}
}

// startAll starts processes in turn and returns those that run, also with an error.
func startAll(specs ...hostSpec) ([]*lab.Proc, error) {
	var procs []*lab.Proc
	for _, s := range specs {
		p, err := s.host.Start(s.Spec)
		if err != nil {
			return procs, err
		}
		procs = append(procs, p)
	}
	return procs, nil
}

type hostSpec struct {
	host *lab.Host
	lab.Spec
}

// forwarding lets a host route, as hubs do.
func forwarding(h *lab.Host) error {
	return h.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0) })
}

// raise gives a link of a host an address and an MTU, brings it up, and routes prefixes over it.
func raise(h *lab.Host, dev, addr string, mtu int, routes ...string) error {
	return h.Do(func() error {
		link, err := netlink.LinkByName(dev)
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(addr)
		if err != nil {
			return err
		}
		err = errors.Join(netlink.LinkSetMTU(link, mtu), netlink.AddrReplace(link, a), netlink.LinkSetUp(link))
		for _, prefix := range routes {
			dst := netip.MustParsePrefix(prefix)
			err = errors.Join(err, netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(dst)}))
		}
		return err
	})
}

// peerDir makes the folder of a peer on a host.
func peerDir(h *lab.Host, name string) (string, error) {
	dir := h.Path(name)
	return dir, os.MkdirAll(dir, 0o700)
}

// writeAll writes files into a folder, readable by their owner alone.
func writeAll(dir string, files map[string]string) error {
	var errs error
	for name, text := range files {
		errs = errors.Join(errs, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	return errs
}
