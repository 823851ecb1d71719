package gateway

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sallyway/client"
	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/legs"
	"sallyway/relay/reverse"
	"sallyway/tunnel"
)

// Pacing of the last rung.
const (
	lastTick = 500 * time.Millisecond
	// lastLinger is how long SSH connections stay that are not needed any more: what broke once may break again.
	lastLinger = time.Minute
)

// lastRung keeps the gateway's SSH connections to its relays. With a standby there is a warm one on the active relay; others are there
// while a relay's leg is not, or the warm one is not.
type lastRung struct {
	d   *gatewayDaemon
	off bool // another transport was chosen
	// missing has room for one: a leg can not be had, or doubts its relay.
	missing chan struct{}

	mu      sync.Mutex // guards what follows
	refs    []control.RelayRef
	tunnels map[identity.Node]*lastTunnel
}

// lastTunnel is a tunnel that runs.
type lastTunnel struct {
	*reverse.Tunnel
	name   string
	cancel context.CancelFunc
	needed time.Time // when it last was
}

// LastRungStatus is the SSH connection to one relay.
type LastRungStatus struct {
	Name string `json:"name"`
	reverse.TunnelStatus
}

// follow takes over the relays that the gateway serves on, the active one first.
func (l *lastRung) follow(refs []control.RelayRef) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refs = slices.Clone(refs)
}

// miss is told of a leg that can not be had, or doubts its relay.
func (l *lastRung) miss(identity.Node) {
	select {
	case l.missing <- struct{}{}:
	default:
	}
}

// run keeps the tunnels, and looks after flows that wait for legs, until ctx ends.
func (l *lastRung) run(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	tick := time.NewTicker(lastTick)
	defer tick.Stop()
	var flows flowWatch
	for {
		l.d.watchFlows(&flows)
		if !l.off {
			l.adjust(ctx, &running)
		}
		select {
		case <-tick.C:
		case <-l.missing:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// adjust starts the tunnels that are wanted and stops those that are not.
func (l *lastRung) adjust(ctx context.Context, running *sync.WaitGroup) {
	if _, cert := l.d.agent.SSH(); cert == "" {
		return // a platform that has none to give
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	wanted := map[identity.Node]bool{}
	for i, ref := range l.refs {
		if ref.SSHPort != 0 && l.wantsLocked(i, ref) {
			wanted[ref.Node] = true
			if l.tunnels[ref.Node] == nil {
				l.startLocked(ctx, ref, running)
			}
		}
	}
	for n, t := range l.tunnels {
		if !wanted[n] {
			t.cancel()
			delete(l.tunnels, n)
		}
	}
}

// wantsLocked reports whether the i-th relay should have a tunnel.
func (l *lastRung) wantsLocked(i int, ref control.RelayRef) bool {
	warm := l.d.opts.standby > 0
	if warm && i == 0 {
		return true
	}
	t := l.tunnels[ref.Node]
	needed := l.d.legs.Missing(ref.Node)
	if warm && !needed {
		if first := l.tunnels[l.refs[0].Node]; first != nil {
			st := first.Status()
			needed = st.Draining || (!st.Up && time.Since(st.Since) > legs.LastStagger)
		}
	}
	if t == nil {
		return needed
	}
	if needed || (warm && t.Status().Links > 0) {
		t.needed = time.Now()
	}
	return time.Since(t.needed) < lastLinger
}

func (l *lastRung) startLocked(ctx context.Context, ref control.RelayRef, running *sync.WaitGroup) {
	ctx, cancel := context.WithCancel(ctx)
	d, node := l.d, ref.Node
	current := func() control.RelayRef { // what is told of the relay now
		l.mu.Lock()
		defer l.mu.Unlock()
		if i := slices.IndexFunc(l.refs, func(r control.RelayRef) bool { return r.Node == node }); i >= 0 {
			return l.refs[i]
		}
		return ref
	}
	info := func(peer identity.Node) tunnel.LinkInfo {
		return tunnel.LinkInfo{Name: ref.Name + " " + string(legs.LastSSH), Peer: peer}
	}
	// The relay is dialled by name where a proxy may have to resolve it.
	var dial func(ctx context.Context, network, address string) (net.Conn, error)
	if client.RelayDial(d.opts.egress.Dialer()) != nil {
		dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			r := current()
			_, way, err := d.legs.Way(ctx, r, r.SSHPort)
			if err != nil {
				return nil, err
			}
			return way(ctx, network, address)
		}
	}
	t := &lastTunnel{name: ref.Name, cancel: cancel, needed: time.Now(), Tunnel: reverse.NewTunnel(reverse.TunnelConfig{
		Relay: node, Gateway: d.agent.Node(), Logger: d.sh.Log.With("relay", ref.Name),
		Dial: dial, HostCAs: func() []string { return current().SSHCAs },
		Resolve: func(ctx context.Context) ([]netip.AddrPort, error) {
			r := current()
			addrs, _, err := d.legs.Way(ctx, r, r.SSHPort)
			return addrs, err
		},
		Identity: func() reverse.Identity {
			key, cert := d.agent.SSH()
			return reverse.Identity{Key: key, Certificate: cert}
		},
		OnLink: func(peer identity.Node, link *reverse.Link) {
			if _, err := d.merged.Add(link, info(peer)); err != nil {
				d.sh.Log.Debug("link not taken", "relay", ref.Name, "peer", peer, "err", err)
			}
		},
		OnChange: func(bool, error) { d.agent.HeartbeatNow() },
	})}
	l.tunnels[node] = t
	running.Go(func() { _ = t.Run(ctx) }) // ends with ctx
}

// status lists the tunnels, by name.
func (l *lastRung) status() []LastRungStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := []LastRungStatus{}
	for _, t := range l.tunnels {
		out = append(out, LastRungStatus{t.name, t.Status()})
	}
	slices.SortFunc(out, func(a, b LastRungStatus) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// heartbeat adds the relays that are reached by SSH alone.
func (l *lastRung) heartbeat(hb *control.Heartbeat) {
	for _, t := range l.status() {
		if t.Up && !slices.Contains(hb.Relays, t.Relay.ID) {
			hb.Relays = append(hb.Relays, t.Relay.ID)
		}
	}
}

// renderLastRung writes the status lines.
func renderLastRung(w io.Writer, ts []LastRungStatus) {
	for _, t := range ts {
		if t.Up {
			fmt.Fprintf(w, "last rung  %s up over %s since %s, %d connections, %d links\n", t.Name, legs.LastSSH, t.Since.Local().Format(time.DateTime), t.Connections, t.Links)
		} else {
			fmt.Fprintf(w, "last rung  %s down over %s: %s\n", t.Name, legs.LastSSH, t.Error)
		}
	}
}
