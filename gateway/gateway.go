// Package gateway is the gateway daemon: it sits in a private network, dials out to relays and the platform, and lets the peers that its
// snapshot names reach what the snapshot and its own allow list let them.
//
//	peer ── QUIC over relays ──► tunnel.Server ──► handler: enforcer (snapshot, then allow list) ──► host's kernel dials
//	                                          └──► CONNECT-IP: a netstack per peer, echo answered by who really answers
//	host and LAN behind it ── TUN ──► client.Host ──► other gateways' resources (site to site)
//
// It opens no port: the QUIC server listens on the channels of its legs.
package gateway

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyway/client"
	"sallyway/internal/control"
	"sallyway/internal/control/agent"
	"sallyway/internal/daemon"
	"sallyway/internal/identity"
	"sallyway/internal/legs"
	"sallyway/internal/policy"
	"sallyway/internal/version"
	"sallyway/relay/leg"
	"sallyway/stun"
	"sallyway/tunnel"
)

// natInterval is how often the gateway looks at its reflexive address and NAT mapping.
const natInterval = 10 * time.Minute

// servingKeepalive is the longest silence on the legs that it serves on: a gateway that nobody uses must notice a restarted relay before
// somebody does, since nothing reaches it there meanwhile.
const servingKeepalive = 3 * time.Second

// natTimeout bounds one look.
const natTimeout = 10 * time.Second

// secretsFile keeps the keys that let peers notice a restart at once; in the state folder, 0600.
const secretsFile = "quic.key"

// gatewayDaemon is a running gateway.
type gatewayDaemon struct {
	opts     *options
	sh       *daemon.Shell
	agent    *agent.Agent
	legs     *legs.Keeper // what it serves on
	siteLegs *legs.Keeper // what it dials other gateways with
	merged   *tunnel.Merged
	srv      *tunnel.Server
	handler  *handler
	sites    *client.Sessions
	host     *client.Host
	last     *lastRung
	health   *health
	flowLog  *flowLog
	probes   relayProbes
	direct   *directPeers
	drainCh  chan drainOrder // 1 place

	mu    sync.Mutex
	names map[identity.Node]string // of relays
	nat   natResult
	drain string // why it drains, "" if it does not

	virtual atomic.Pointer[[]netip.Addr]
	ranges  atomic.Pointer[[]netip.Prefix] // the organization's virtual range
}

// natResult is what was found about the NAT in front of the gateway.
type natResult struct {
	At     time.Time       `json:"at,omitzero"`
	Text   string          `json:"text,omitempty"`
	Error  string          `json:"error,omitempty"`
	Result *stun.Discovery `json:"result,omitempty"`
}

// newGateway joins the parts. It starts nothing.
func newGateway(ctx context.Context, o *options, sh *daemon.Shell, token string) (*gatewayDaemon, error) {
	d := &gatewayDaemon{opts: o, sh: sh, names: map[identity.Node]string{}, drainCh: make(chan drainOrder, 1)}
	d.virtual.Store(&[]netip.Addr{})
	d.ranges.Store(&[]netip.Prefix{})
	allow, err := ParseAllow(o.allow, ownSockets(sh)...)
	if err != nil {
		return nil, daemon.Usagef("%w", err)
	}
	hc, err := o.host()
	if err != nil {
		return nil, daemon.Usagef("%w", err)
	}
	transports, err := legs.ParseTransports(o.transport)
	if err != nil {
		return nil, daemon.Usagef("--transport: %w", err)
	}
	d.agent, err = agent.Open(ctx, agent.Config{
		StateDir: sh.State.Dir(), Kind: identity.Gateway, Token: token, AWS: o.byAWS, Version: version.Get().Version, Logger: sh.Log, Heartbeat: d.heartbeat,
		DialContext: o.egress.Dialer().DialContext,
	})
	if err != nil {
		return nil, program.Error(err)
	}
	d.legs = legs.New(legs.Config{
		Logger: sh.Log, OnRendezvous: d.onRendezvous, Transports: transports, Dial: client.RelayDial(o.egress.Dialer()), Keepalive: servingKeepalive,
		OnUp: d.legUp, OnDown: func(identity.Node, error) { d.agent.HeartbeatNow() }, OnMissing: func(n identity.Node) { d.last.miss(n) },
	})
	d.last = &lastRung{d: d, off: transports != nil, missing: make(chan struct{}, 1), tunnels: map[identity.Node]*lastTunnel{}}
	siteLog := sh.Log.With("as", "site")
	wake := func() { d.sites.Wake() }
	lc := legs.Config{
		Logger: siteLog, Transports: transports, Dial: client.RelayDial(o.egress.Dialer()), OnMissing: func(identity.Node) { wake() },
		OnUp: func(identity.Node, *leg.Leg) { wake() }, OnDown: func(identity.Node, error) { wake() },
	}
	if !d.last.off {
		lc.Certificate = d.agent.SiteCertificate
	}
	d.siteLegs = legs.New(lc)
	useDirect, err := client.DirectEnabled(o.direct)
	if err != nil {
		return nil, daemon.Usagef("%w", err)
	}
	useDirect = useDirect && (transports == nil || slices.Contains(transports, leg.UDP))
	d.direct = newDirectPeers(d, useDirect)
	d.sites = client.NewSessions(client.SessionsConfig{
		Direct:      useDirect,
		Certificate: d.agent.SiteCertificate, Trust: client.GatewayTrust(d.agent, siteLog), Legs: d.siteLegs, Logger: siteLog,
		Tracer: sh.Tracer(),
	})
	hc.OnNetwork = func() {
		d.legs.Kick()
		d.siteLegs.Kick()
		d.sites.NetworkChanged()
		d.direct.networkChanged()
	}
	hc.StateDir, hc.Platform, hc.Proxy, hc.Logger = sh.State.Dir(), d.agent.PlatformURL(), o.egress.Dialer().Host(), sh.Log
	if d.host, err = client.OpenHost(hc, d.sites); err != nil {
		return nil, daemon.Failf("%w", err)
	}
	m := newMetrics()
	sh.Metrics.MustRegister(client.DirectMetrics(d.direct.stats)...)
	sh.Metrics.MustRegister(client.LegMetrics(map[string]*legs.Keeper{"serving": d.legs, "dialling": d.siteLegs}), &ways{d})
	sh.Metrics.MustRegister(d.sites.Metrics()...)
	sh.Metrics.MustRegister(d.agent.Metrics())
	sh.Metrics.MustRegister(m.flows, m.packetsDropped, m.benchRuns, m.benchBytes)
	enforce := &enforcer{
		snapshot: d.agent.Snapshot, stale: d.agent.SnapshotProblem, allow: allow, resolver: net.DefaultResolver, keepGoing: o.servePastExpiry,
		ranges: func() []netip.Prefix { return *d.ranges.Load() },
	}
	d.handler = &handler{
		log: sh.Log, tracer: sh.Tracer(), enforce: enforce, names: &names{enforce: enforce, servers: d.nameServers}, pings: &pinger{},
		virtual: func() []netip.Addr { return *d.virtual.Load() }, metrics: m,
		bench: bench{off: o.bench == string(client.Off), relayRTT: d.relayRTT},
	}
	d.flowLog = newFlowLog(&d.handler.flows, sh.Log, d.agent.ReportFlows)
	d.flowLog.rung = d.rung
	sh.Metrics.MustRegister(d.flowLog.collectors()...)
	d.health = newHealth(sh.Log, d.agent.Snapshot, (&prober{enforce}).probe, d.healthChanged)
	if d.merged, err = tunnel.NewMerged(tunnel.MergedConfig{}); err != nil {
		return nil, err
	}
	reset, tokens, err := loadSecrets(sh.State)
	if err != nil {
		return nil, daemon.Failf("%w", err)
	}
	d.srv, err = tunnel.Listen(d.merged, tunnel.ServeConfig{
		Node: d.agent.Node(), Certificate: d.agent.Certificate, Trust: d.peerTrust, Handler: d.handler, Logger: sh.Log,
		StatelessResetKey: reset, TokenKey: tokens, OnSession: d.onSession, OnNotice: d.onNotice,
	})
	if err != nil {
		return nil, err
	}
	d.handler.bench.quic = d.srv.QUIC
	d.flowLog.sessions = d.srv.Sessions
	return d, nil
}

// ownSockets are what the gateway listens on beyond loopback, which nobody may reach through it.
func ownSockets(sh *daemon.Shell) []netip.AddrPort {
	if a, ok := sh.MetricsAddr().(*net.TCPAddr); ok {
		return []netip.AddrPort{a.AddrPort()}
	}
	return nil
}

// loadSecrets reads or makes the key for stateless resets and the one for address validation tokens: the same after a restart, so that
// peers learn of it from the first packet.
func loadSecrets(st *daemon.State) (reset, tokens [32]byte, err error) {
	b, err := os.ReadFile(st.Path(secretsFile))
	if errors.Is(err, fs.ErrNotExist) || (err == nil && len(b) != 64) {
		b = make([]byte, 64)
		_, _ = rand.Read(b) // never fails (crypto/rand)
		err = st.WriteFile(secretsFile, b, 0o600)
	}
	if err != nil {
		return reset, tokens, fmt.Errorf("key of the QUIC server: %w", err)
	}
	copy(reset[:], b[:32])
	copy(tokens[:], b[32:])
	return reset, tokens, nil
}

// peerTrust is the trust in who dials. Without a usable one nobody is trusted.
func (d *gatewayDaemon) peerTrust() *identity.Trust {
	t, err := d.agent.Trust(identity.Client, identity.Site, identity.Platform)
	if err != nil {
		d.sh.Log.Error("the organization's trust is unusable", "err", err)
		return &identity.Trust{}
	}
	return t
}

// run serves until ctx ends.
func (d *gatewayDaemon) run(ctx context.Context) error {
	d.agent.OnConfig(d.follow)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.agent.Run(ctx) })
	g.Go(func() error { return d.srv.Run(ctx) })
	g.Go(func() error { return d.legs.Run(ctx) })
	g.Go(func() error { return d.siteLegs.Run(ctx) })
	g.Go(func() error { return d.last.run(ctx) })
	g.Go(func() error { return d.sites.Run(ctx) })
	g.Go(func() error { return d.host.Run(ctx) })
	g.Go(func() error { return d.watchNAT(ctx) })
	g.Go(func() error { return d.probes.run(ctx) })
	g.Go(func() error { return d.direct.run(ctx) })
	g.Go(func() error { return d.handler.often.Run(ctx, d.sh.Log) })
	g.Go(func() error { return d.health.run(ctx) })
	g.Go(func() error { return d.flowLog.run(ctx) })
	g.Go(func() error {
		if _, err := d.agent.WaitConfig(ctx); err != nil {
			return ctx.Err()
		}
		d.sh.Ready("serving as " + d.agent.Name())
		d.sh.Log.Info("gateway ready", "node", d.agent.Node(), "name", d.agent.Name())
		return nil
	})
	err := g.Wait()
	return errors.Join(err, d.merged.Close(), d.handler.pings.Close())
}

// follow takes a configuration over.
func (d *gatewayDaemon) follow(c *control.Config) {
	if c.Gateway != nil {
		refs := c.Gateway.Relays
		if n := 1 + max(d.opts.standby, 0); len(refs) > n {
			refs = refs[:n]
		}
		d.mu.Lock()
		for _, r := range refs {
			d.names[r.Node] = r.Name
		}
		d.mu.Unlock()
		d.legs.Want("serving", refs)
		d.last.follow(refs)
		d.probes.follow(c.Gateway.Probe)
		d.flowLog.enable(c.Gateway.FlowLog)
	}
	if c.Dialling != nil {
		virtual := slices.Clone(c.Dialling.Virtual)
		d.virtual.Store(&virtual)
		ranges := slices.Clone(c.Dialling.Range)
		d.ranges.Store(&ranges)
		d.sites.Update(client.TrimRelays(c.Dialling, 1+max(d.opts.standby, 0)))
		d.host.Update(c.Dialling)
		d.direct.follow(c.Dialling.Direct)
	}
	d.health.follow()
	d.endSessions(c)
}

// endSessions ends the sessions of peers that are revoked or that no policy lets in any more.
func (d *gatewayDaemon) endSessions(c *control.Config) {
	denied := map[identity.KeyHash]bool{}
	for _, k := range c.Trust.Denied {
		denied[k] = true
	}
	s, err := d.agent.Snapshot()
	if err == nil {
		for _, k := range s.Denied {
			denied[k] = true
		}
	}
	since := map[uint64]time.Time{}
	for _, x := range d.srv.Sessions() {
		since[x.Peer.Session] = x.Since
	}
	n := d.srv.CloseWhere(func(p tunnel.Peer) (string, bool) {
		if denied[p.Key] {
			return "the key of this node is revoked", true
		}
		if s != nil {
			if _, known := s.Peer(p.Node); !known {
				return "no policy lets this node use this gateway any more", true
			}
		}
		if c.Gateway != nil {
			for _, e := range c.Gateway.EndSessions {
				if began, ok := since[p.Session]; ok && asGateway(e.Node) == asGateway(p.Node) && began.Before(e.Before) {
					return "an administrator ended this session", true
				}
			}
		}
		return "", false
	})
	if n > 0 {
		d.sh.Log.Info("sessions ended", "count", n)
	}
	if s != nil {
		if n := d.handler.flows.endDenied(s); n > 0 {
			d.sh.Log.Info("flows ended: no policy allows them any more", "count", n)
		}
		d.handler.bench.endDenied(s)
	}
}

// asGateway names the gateway behind an identity of kind site.
func asGateway(n identity.Node) identity.Node {
	if n.Kind == identity.Site {
		n.Kind = identity.Gateway
	}
	return n
}

// onRendezvous takes the channel to a peer that asked for this gateway.
func (d *gatewayDaemon) onRendezvous(relay, peer identity.Node, ch *leg.Channel) {
	d.mu.Lock()
	name := d.names[relay]
	d.mu.Unlock()
	if name == "" {
		name = relay.ID
	}
	if _, err := d.merged.Add(ch, tunnel.LinkInfo{Name: name, Peer: peer}); err != nil {
		d.sh.Log.Debug("link not taken", "relay", name, "peer", peer, "err", err)
	}
}

// onSession logs sessions with the key that proved the peer, so that a certificate which the platform issued to somebody else shows.
func (d *gatewayDaemon) onSession(s tunnel.SessionInfo, end error) {
	d.flowLog.session(s, end)
	if end == nil {
		d.sh.Log.Info("session open", "peer", s.Peer.Node, "key", s.Peer.Key, "path", s.Path.Name)
		return
	}
	d.direct.sessionOver(s.Peer.Session)
	d.sh.Log.Info("session over", "peer", s.Peer.Node, "key", s.Peer.Key, "reason", end, "flows", s.TotalFlows, "sent", s.Sent, "received", s.Received)
}

// rung is the transport of the gateway's leg on a relay that goes by a name.
func (d *gatewayDaemon) rung(relay string) string {
	for _, st := range d.legs.Status() {
		if st.Up && st.Name == relay {
			return string(st.Transport)
		}
	}
	return ""
}

// nameServers are the host's own: split DNS of the site side may have put the stub before them.
func (d *gatewayDaemon) nameServers() ([]string, error) {
	if own := d.host.Resolvers(); len(own) > 0 {
		out := make([]string, len(own))
		for i, a := range own {
			out[i] = a.String()
		}
		return out, nil
	}
	return systemServers("/etc/resolv.conf")
}

func (d *gatewayDaemon) heartbeat() control.Heartbeat {
	hb := control.Heartbeat{State: "ready", Resources: d.health.report(), RelayRTT: d.probes.report()}
	for _, st := range d.legs.Status() {
		if st.Up {
			hb.Relays = append(hb.Relays, st.Relay.ID)
			continue
		}
		if st.Error != "" {
			hb.Problems = append(hb.Problems, "relay "+st.Name+": "+st.Error)
		}
	}
	d.last.heartbeat(&hb)
	if len(hb.Relays) == 0 || len(hb.Problems) > 0 {
		hb.State = "degraded"
	}
	if stale, why := d.agent.SnapshotProblem(); why != nil {
		hb.Problems = append(hb.Problems, why.Error())
		if stale {
			hb.State = "degraded"
		}
	}
	if d.drainReason() != "" {
		hb.State = "draining"
	}
	for _, s := range d.srv.Sessions() {
		hb.Sessions = append(hb.Sessions, control.SessionReport{
			Peer: s.Peer.Node, Key: s.Peer.Key, Relay: s.Path.Name, Since: s.Since, Flows: int(s.Flows), SentBytes: s.Sent, RecvBytes: s.Received, RTT: s.RTT,
		})
	}
	return hb
}

// watchNAT looks at the reflexive address and the mapping of the NAT in front, by Binding requests from one socket to two relays.
func (d *gatewayDaemon) watchNAT(ctx context.Context) error {
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-next.C:
		}
		wait := natInterval
		var servers []netip.AddrPort
		for _, st := range d.legs.Status() {
			if l, _ := d.legs.Current(st.Relay); l != nil && l.RemoteAddr().IsValid() {
				servers = append(servers, l.RemoteAddr())
			}
		}
		if len(servers) == 0 {
			wait = time.Second
		} else {
			nctx, cancel := context.WithTimeout(ctx, natTimeout)
			nat, err := stun.Discover(nctx, servers)
			cancel()
			r := natResult{At: time.Now(), Result: nat}
			if err != nil {
				r.Error = err.Error()
				wait = natInterval / 10
			} else {
				r.Text = nat.String()
			}
			d.mu.Lock()
			if r.Text != d.nat.Text && r.Error == "" {
				d.sh.Log.Info("reflexive address", "nat", r.Text)
			}
			d.nat = r
			d.mu.Unlock()
		}
		next.Reset(wait)
	}
}

// resources are what the snapshot lets be reached here, for the status.
func resources(s *policy.Snapshot) []string {
	var out []string
	for i := range s.Resource {
		r := &s.Resource[i]
		out = append(out, fmt.Sprintf("%s (%s) tcp %v udp %v icmp %v", r.Name, r.Address, r.TCP, r.UDP, r.ICMP))
	}
	return out
}
