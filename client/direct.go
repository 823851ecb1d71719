package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/direct"
	"sallyway/internal/control"
	"sallyway/internal/legs"
	"sallyway/internal/policy"
	"sallyway/tunnel"
)

// NoticeDirect is the type of a notice whose data is a direct.Offer: a client's asks for a direct path, the gateway's answers it.
const NoticeDirect = "direct"

// When sessions take a direct path, and leave it.
const (
	// directAfter is how long after its begin a session first tries.
	directAfter = time.Second
	// directWait is the pause after a try that failed or a path that ended, which doubles up to directMost. A path that has held for
	// directHeld, and a change of network, begin anew.
	directWait = 30 * time.Second
	directMost = 10 * time.Minute
	directHeld = 5 * time.Minute
	// directAllow is the pause after the first try that fails once the organization allows direct paths: it doubles like the other. The
	// platform tells all nodes within a second, in no order, so the gateway may not know yet.
	directAllow = 2 * time.Second
	// directRenew is how often a change of network may have it try at once: on some hosts interfaces come and go all the time.
	directRenew = 15 * time.Second
	// directAnswer bounds the wait for the gateway's answer, and directProof that for the path to be proved by QUIC.
	directAnswer = 5 * time.Second
	directProof  = 3 * time.Second
	// A path that works and that QUIC does not prove is offered to it again after directProve, directProofs times in all: a gateway takes only a few
	// new paths of a session in five seconds, and the session may just have moved.
	directProve  = 6 * time.Second
	directProofs = 4
	// directEmptying is how long a link is kept after a session left it: packets may still arrive.
	directEmptying = 3 * time.Second
	// directMargin and directShare are by how much the round trip may be longer than over the relay: it spares the relay, and one
	// probe is not exact.
	directMargin = 5 * time.Millisecond
	directShare  = 1.1
	// worseMargin and worseShare say when a direct path is left for the standby: so much longer, or worseLoss more probes lost, for
	// worseFor.
	worseMargin = 20 * time.Millisecond
	worseShare  = 1.5
	worseLoss   = 0.05
	worseFor    = 10 * time.Second
)

// DirectEnabled reports whether --direct says that direct paths are used where the organization allows them.
func DirectEnabled(flag string) (bool, error) {
	c, err := ParseChoice("direct", flag)
	if err == nil && c == On {
		err = errors.New(`--direct "on": want auto or off; the organization's setting says whether it is allowed`)
	}
	return c != Off, err
}

// newDirect makes the socket for direct paths of sessions that this node opens.
func (s *Sessions) newDirect() *direct.Endpoint {
	return direct.New(direct.Config{
		Logger: s.cfg.Logger, Servers: func() []netip.AddrPort { return RelayAddrs(s.cfg.Legs) },
		Private: func() bool { return s.table.Load().cfg.Direct.Private },
		Refuse:  s.LeadsInside,
	})
}

// familyLookup bounds the look-up of relays' addresses of the other family.
const familyLookup = time.Second

// RelayAddrs are the addresses of the relays that a node has legs to, each followed by the relay's one of the other family: a leg needs one
// of them, but where a NAT is in the way of one family, there may be none in that of the other.
func RelayAddrs(k *legs.Keeper) []netip.AddrPort {
	ctx, cancel := context.WithTimeout(context.Background(), familyLookup)
	defer cancel()
	var out []netip.AddrPort
	for _, st := range k.Status() {
		l, _ := k.Current(st.Relay)
		if l == nil || !l.RemoteAddr().IsValid() { // only a proxy knows it
			continue
		}
		at := l.RemoteAddr()
		out = append(out, at)
		all, _ := k.Addrs(ctx, control.RelayRef{Name: st.Name, Host: st.Host}, at.Port()) // what is not found is not asked
		if i := slices.IndexFunc(all, func(a netip.AddrPort) bool { return a.Addr().Is4() != at.Addr().Unmap().Is4() }); i >= 0 {
			out = append(out, all[i])
		}
	}
	return out
}

// LeadsInside reports whether packets to an address go into this node's own tunnel, or may: a path to a gateway never runs through one.
func (s *Sessions) LeadsInside(a netip.Addr) bool {
	for _, p := range s.table.Load().cfg.Range {
		if p.Contains(a) {
			return true
		}
	}
	_, err := s.Lookup(a.String(), policy.UDP, 0)
	return err == nil
}

// directAllowed reports whether sessions may leave the relay.
func (s *Sessions) directAllowed() bool {
	return s.direct != nil && s.table.Load().cfg.Direct.On
}

// NetworkChanged has sessions try direct paths at once: the host's addresses or routes are others now.
func (s *Sessions) NetworkChanged() {
	if s.direct != nil {
		s.direct.NetworkChanged()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range s.gateways {
		g.direct.renew()
		poke(g.wake)
	}
}

// DirectStats counts what passed on direct paths of sessions that this node opened. The zero Stats is that of a node without any.
func (s *Sessions) DirectStats() direct.Stats {
	if s.direct == nil {
		return direct.Stats{}
	}
	return s.direct.Stats()
}

// directRung is what a gatewayLink knows of the direct path to its gateway.
type directRung struct {
	answers chan direct.Offer // 1 place: the gateway's

	mu     sync.Mutex // guards what follows
	trying bool
	peer   *direct.Peer
	link   *direct.Link // nil until it works
	moving bool         // the session is being moved to it
	proofs int          // that failed
	prove  time.Time    // when to move the session to it
	used   bool         // the session was moved to it
	left   time.Time    // when the session was seen elsewhere again
	since  time.Time    // when it moved
	worse  time.Time    // since when the standby is better; zero while it is not
	next   time.Time    // of the next try
	wait   time.Duration
	why    string    // what became of the last try
	fresh  time.Time // when a change of network was last heeded
	barred bool      // direct paths were not allowed when last looked
}

// renew forgets how often it failed.
func (d *directRung) renew() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now := time.Now(); now.Sub(d.fresh) > directRenew {
		d.fresh, d.next, d.wait = now, now, directWait
	}
}

// begin is called when a session opens.
func (d *directRung) begin() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dropLocked()
	d.next, d.wait, d.why = time.Now().Add(directAfter), directWait, ""
}

// drop lets go of what there is.
func (d *directRung) drop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dropLocked()
}

func (d *directRung) dropLocked() {
	if d.peer != nil {
		d.peer.Close()
	}
	d.peer, d.link, d.used, d.moving = nil, nil, false, false
	d.left, d.worse, d.proofs, d.prove = time.Time{}, time.Time{}, 0, time.Time{}
}

// unprovedLocked notes that QUIC has not proved the path, which is tried again if again says so, but not for ever.
func (d *directRung) unprovedLocked(why string, again bool) {
	if d.proofs++; !again || d.proofs >= directProofs {
		d.failLocked(why)
		return
	}
	d.why, d.prove = why, time.Now().Add(directProve)
}

// failLocked ends a try or a path; the next one comes later each time.
func (d *directRung) failLocked(why string) {
	d.dropLocked()
	d.why = why
	d.next = time.Now().Add(d.wait)
	d.wait = min(2*d.wait, directMost)
}

// isDirect reports whether a path needs no relay.
func isDirect(p tunnel.PathStatus) bool {
	_, ok := p.Link.(*direct.Link)
	return ok
}

// stepDirect looks after the direct path of a session: it starts tries, moves the session when one works, moves it back when paths without
// a relay are not allowed any more or are worse, and lets go of what the session has left. Tasks run what takes time; busy is held by
// whoever changes the session's paths.
func (g *gatewayLink) stepDirect(ctx context.Context, t *tunnel.Session, tasks *sync.WaitGroup, busy *atomic.Bool) {
	d, p := &g.direct, t.Path()
	allowed := g.s.directAllowed()
	now := time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	if allowed && d.barred && !d.used {
		d.next, d.wait = now.Add(directAfter), directAllow
	}
	d.barred = !allowed
	if d.used {
		on := p.Active.Link == d.link
		switch {
		case !on && d.left.IsZero():
			d.left = now
		case !on && !allowed:
			d.dropLocked()
			d.why = ""
		case !on && now.Sub(d.left) > directEmptying:
			if now.Sub(d.since) > directHeld {
				d.wait = directWait
			}
			d.failLocked("it ended: " + p.LastReason)
			if d.fresh.After(d.since) && d.left.Sub(d.fresh) < directRenew { // with the network that it was found in: another one may be there
				d.next, d.wait = now, directWait
			}
		case on && !allowed:
			g.leaveDirect(t, p, "direct paths are not allowed any more")
		case on && d.worseLocked(p, now):
			g.leaveDirect(t, p, "the relay's path is better")
		}
		return
	}
	switch {
	case !allowed:
		if d.peer != nil && !d.trying && !d.moving {
			d.dropLocked()
		}
	case d.link != nil && closed(d.link.Done()):
		d.failLocked("the path ended before it was used")
	case d.link != nil && !d.moving && !now.Before(d.prove):
		if rtt := p.Active.Probes.RTT; rtt > 0 && d.link.RTT() > time.Duration(float64(rtt)*directShare)+directMargin {
			g.log.Info("direct path not taken", "address", d.link.Addr(), "rtt", d.link.RTT(), "relay_rtt", rtt)
			d.failLocked("its round trip is longer than over the relay")
			return
		}
		if !busy.CompareAndSwap(false, true) {
			return
		}
		d.moving = true
		link := d.link
		tasks.Go(func() {
			defer busy.Store(false)
			g.moveDirect(ctx, t, link)
		})
	case d.link == nil && !d.trying && !now.Before(d.next):
		d.trying = true
		tasks.Go(func() { g.tryDirect(ctx, t) })
	}
}

// worseLocked reports whether the standby, a relay's path, has been much better for a while.
func (d *directRung) worseLocked(p tunnel.PathInfo, now time.Time) bool {
	on, other := p.Active.Probes, p.Standby.Probes
	better := p.Standby.State == tunnel.Alive && other.RTT > 0 &&
		(on.RTT > time.Duration(float64(other.RTT)*worseShare)+worseMargin || on.Loss > other.Loss+worseLoss)
	switch {
	case !better:
		d.worse = time.Time{}
	case d.worse.IsZero():
		d.worse = now
	}
	return better && now.Sub(d.worse) > worseFor
}

// leaveDirect moves a session to its standby. Where it has none, the end of the link has it look for a relay.
func (g *gatewayLink) leaveDirect(t *tunnel.Session, p tunnel.PathInfo, reason string) {
	if p.Standby.Link != nil && p.Standby.State != tunnel.Dead && t.Failover(reason) == nil {
		g.log.Info("path moved", "from", p.Active.Info.Name, "to", p.Standby.Info.Name, "reason", reason)
		return
	}
	g.direct.peer.Close()
}

// tryDirect asks the gateway for a direct path and punches. What works is left in the rung.
func (g *gatewayLink) tryDirect(ctx context.Context, t *tunnel.Session) {
	d := &g.direct
	peer, link, err := g.punch(ctx, t)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.trying = false
	if err != nil {
		if peer != nil {
			peer.Close()
		}
		if ctx.Err() == nil && err.Error() != d.why {
			g.log.Info("no direct path", "err", err)
		}
		d.failLocked(err.Error())
		return
	}
	d.peer, d.link = peer, link
	poke(g.wake)
}

// errSessionOver ends a try.
var errSessionOver = errors.New("the session is over")

func (g *gatewayLink) punch(ctx context.Context, t *tunnel.Session) (*direct.Peer, *direct.Link, error) {
	link, failed := make(chan *direct.Link, 1), make(chan error, 1)
	peer, own, err := g.s.direct.Open(ctx, direct.PeerConfig{
		Keys: t.ProbeKeys(), Asking: true, OnLink: func(l *direct.Link) { link <- l }, OnFail: func(err error) { failed <- err },
	})
	if err != nil {
		return nil, nil, err
	}
	select {
	case <-g.direct.answers: // of an earlier try
	default:
	}
	b, err := json.Marshal(direct.Offer{Candidates: own})
	if err == nil {
		err = t.Notify(tunnel.Notice{Type: NoticeDirect, Data: b})
	}
	if err != nil {
		return peer, nil, err
	}
	timeout := time.NewTimer(directAnswer)
	defer timeout.Stop()
	select {
	case o := <-g.direct.answers:
		if o.Refused != "" {
			return peer, nil, fmt.Errorf("the gateway: %s", o.Refused)
		}
		peer.Punch(o.Candidates)
	case <-timeout.C:
		return peer, nil, errors.New("the gateway did not answer: its version may know no direct paths")
	case <-t.Done():
		return peer, nil, errSessionOver
	case <-ctx.Done():
		return peer, nil, ctx.Err()
	}
	select {
	case l := <-link:
		return peer, l, nil
	case err := <-failed:
		return peer, nil, err
	case <-t.Done():
		return peer, nil, errSessionOver
	case <-ctx.Done():
		return peer, nil, ctx.Err()
	}
}

// moveDirect moves a session to a direct path, once QUIC has proved it.
func (g *gatewayLink) moveDirect(ctx context.Context, t *tunnel.Session, l *direct.Link) {
	const reason = "a direct path works"
	d := &g.direct
	from, info := t.Path().Active.Info.Name, tunnel.LinkInfo{Name: directName(l), Peer: g.node}
	cctx, cancel := context.WithTimeout(ctx, directProof)
	defer cancel()
	err := t.Standby(cctx, l, info)
	if err == nil && g.s.directAllowed() {
		err = t.Failover(reason)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.moving = false
	if d.link != l {
		return
	}
	if err != nil {
		g.log.Info("direct path not taken", "address", l.Addr(), "err", err)
		d.unprovedLocked(err.Error(), errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil)
		return
	}
	d.used, d.since, d.why = true, time.Now(), ""
	g.log.Info("path moved", "from", from, "to", info.Name, "reason", reason, "rtt", l.RTT())
	poke(g.wake)
}

// directPrefix begins the name of a direct path, at either end.
const directPrefix = "direct "

func directName(l *direct.Link) string { return fmt.Sprint(directPrefix, l.Addr()) }

// answered takes the gateway's answer.
func (d *directRung) answered(log *slog.Logger, n tunnel.Notice) {
	o, err := direct.ParseOffer(n.Data)
	if err != nil {
		log.Debug("notice not understood", "type", n.Type, "err", err)
		return
	}
	select {
	case <-d.answers:
	default:
	}
	d.answers <- o // one goroutine sends, so there is room
}

// DirectStatus is what status shows of the direct path to a gateway that is not in use.
type DirectStatus struct {
	// Allowed says that organization and host allow direct paths.
	Allowed bool `json:"allowed"`
	// Problem is why the last try failed, Next when the next one is.
	Problem string    `json:"problem,omitempty"`
	Next    time.Time `json:"next,omitzero"`
}

func (g *gatewayLink) directStatus() DirectStatus {
	st := DirectStatus{Allowed: g.s.directAllowed()}
	if !st.Allowed {
		return st
	}
	d := &g.direct
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.link == nil {
		st.Problem, st.Next = d.why, d.next
	}
	return st
}

// renderDirect writes the status line about the direct path.
func renderDirect(w io.Writer, name string, st DirectStatus) {
	if st.Allowed && st.Problem != "" {
		fmt.Fprintf(w, "           %s: no direct path: %s; next try at %s\n", name, st.Problem, st.Next.Local().Format(time.TimeOnly))
	}
}

// DirectMetrics are the metrics of a node's direct paths.
func DirectMetrics(stats func() direct.Stats) []prometheus.Collector {
	gauge := func(name, help string, f func(direct.Stats) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return f(stats()) })
	}
	counter := func(name, help string, f func(direct.Stats) uint64) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, func() float64 { return float64(f(stats())) })
	}
	return []prometheus.Collector{
		gauge("sallyway_direct_links", "Direct paths that work now.", func(s direct.Stats) float64 { return float64(s.Links) }),
		counter("sallyway_direct_sent_datagrams_total", "QUIC datagrams sent without a relay.", func(s direct.Stats) uint64 { return s.Sent }),
		counter("sallyway_direct_received_datagrams_total", "QUIC datagrams received without a relay.", func(s direct.Stats) uint64 { return s.Received }),
		counter("sallyway_direct_probes_total", "Probes sent to find and keep direct paths.", func(s direct.Stats) uint64 { return s.Probed }),
		counter("sallyway_direct_dropped_datagrams_total", "Datagrams to the direct socket that got silence.", func(s direct.Stats) uint64 { return s.Dropped }),
	}
}
