// Package relayd is the relay daemon: a relay.Server that follows its platform. It enrols, takes keys, organizations and deny list from the
// control stream, reports its load, and drains before it stops.
package relayd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"sallyway/internal/control"
	"sallyway/internal/control/agent"
	"sallyway/internal/daemon"
	"sallyway/internal/doctor"
	"sallyway/internal/identity"
	"sallyway/internal/version"
	"sallyway/relay"
	"sallyway/relay/budget"
	"sallyway/relay/fallback"
	"sallyway/relay/reverse"
	"sallyway/relay/wire"
)

// DefaultDrain is how long a stopping relay waits for its nodes to move.
const DefaultDrain = 30 * time.Second

// outageOver is how long after the platform's return the relay goes on taking credentials by their time for outages: nodes are given until
// they are back there themselves, spread over 30 s.
const outageOver = 2 * time.Minute

// resolveTimeout bounds finding the advertised address of a relay that is known by name.
const resolveTimeout = 10 * time.Second

var spec = daemon.Spec{
	Name: "relayd", Role: "relay", Start: []string{"start"}, Capabilities: []string{"CAP_NET_BIND_SERVICE", "CAP_NET_ADMIN"},
	StopTimeout: DefaultDrain + 15*time.Second, RenderStatus: renderStatus, Checks: doctor.Network,
}

var program = agent.Program{Create: "sallyway relay create NAME --host ADDRESS", Start: "relayd start", Install: "sudo relayd install"}

// options are the flags of `relayd start`.
type options struct {
	daemon.Options
	listenIP, relayIP, advertise string
	port, minPort, maxPort       uint16
	sshPort, tlsPort             uint16
	shards, maxAllocations       int
	drain, lifetime              time.Duration
	aws                          agent.AWSFlags
}

// Command is relayd.
func Command() *cobra.Command {
	o := options{Options: daemon.Options{MetricsListen: "127.0.0.1:9466"}}
	start := &cobra.Command{
		Use:   "start",
		Short: "Run the relay",
		Long: `Run a relay: gateways and clients of its organization meet here, and it passes on what it can not read.

It needs inbound 5349/udp and 5349/tcp, 2222/tcp and 8443/tcp for nodes whose networks let only these through, and for configured peers the
relayed ports (49152-65535/udp); outbound 443/tcp to the platform.
The first run needs the token that "sallyway relay create NAME --host HOST" printed; the same command again starts it without enrolling.`,
		Example: "  relayd start --token-file relay.token\n  relayd start --listen-ip 203.0.113.7",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	o.Register(start, spec)
	f := start.Flags()
	o.aws.Register(f)
	f.StringVar(&o.listenIP, "listen-ip", "", "address to listen on (default: every address)")
	f.Uint16Var(&o.port, "listen-port", wire.Port, "port for STUN and TURN over UDP, DTLS, TCP and TLS")
	f.Uint16Var(&o.sshPort, "ssh-port", reverse.SSHPort, "port of the last rung for gateways, by SSH; 0 switches it off")
	f.Uint16Var(&o.tlsPort, "tls-port", reverse.TLSPort, "port of the last rung for clients, by TLS; 0 switches it off")
	f.StringVar(&o.advertise, "advertise-ip", "", "address that nodes are told (default: the relay's host as the platform knows it)")
	f.StringVar(&o.relayIP, "relay-ip", "", "address of relayed sockets (default: --listen-ip)")
	f.Uint16Var(&o.minPort, "min-port", relay.DefaultMinPort, "first relayed port")
	f.Uint16Var(&o.maxPort, "max-port", relay.DefaultMaxPort, "last relayed port")
	f.IntVar(&o.shards, "shards", 0, "UDP sockets for data, each with a thread of its own, beside one for control (default: one per core)")
	f.IntVar(&o.maxAllocations, "max-allocations", 0, "allocations in all (default 16000)")
	f.DurationVar(&o.lifetime, "allocation-lifetime", time.Hour, "longest that a node's allocation is kept without a refresh, from 10s to 1h; nodes ask for 10m and refresh at half of what they are given")
	f.DurationVar(&o.drain, "drain-timeout", DefaultDrain, "how long a stopping relay waits for its nodes to move")
	daemon.Bind(start)
	root := &cobra.Command{
		Use: "relayd", Short: "Sallyway's relay: gateways and clients meet here, end to end encrypted",
		SilenceUsage: true, SilenceErrors: true,
	}
	root.AddCommand(start, daemon.DrainCommand(spec))
	root.AddCommand(daemon.Commands(spec)...)
	return root
}

// relayDaemon is a running relay.
type relayDaemon struct {
	opts  *options
	sh    *daemon.Shell
	agent *agent.Agent
	// budgets are one for the relay's port and for the last rung: who uses both has no more for it.
	budgets *budget.Budgets

	srv  atomic.Pointer[relay.Server]
	stop context.CancelFunc // begins the drain

	rung        atomic.Pointer[fallback.Server] // nil when it is off
	rungProblem atomic.Pointer[string]          // why its ports are not open, "" when they are

	following sync.Mutex // one configuration is taken over after the other

	lastBytes uint64
	lastBeat  time.Time
}

func (o *options) run(cmd *cobra.Command) error {
	token, aws, err := program.Credential(cmd, &o.Options, &o.aws)
	if err != nil {
		return err
	}
	if o.lifetime < 10*time.Second || o.lifetime > time.Hour {
		return daemon.Usagef("--allocation-lifetime %v is not between 10s and 1h", o.lifetime)
	}
	daemon.Tune(daemon.Tuning{})
	sh, err := daemon.Open(spec, &o.Options, cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	defer sh.Close()
	d := &relayDaemon{opts: o, sh: sh, budgets: budget.New()}
	d.agent, err = agent.Open(cmd.Context(), agent.Config{
		StateDir: sh.State.Dir(), Kind: identity.Relay, Token: token, AWS: aws, Version: version.Get().Version, Logger: sh.Log, Heartbeat: d.heartbeat,
	})
	if err != nil {
		return program.Error(err)
	}
	ctx, stop := context.WithCancel(cmd.Context())
	defer stop()
	d.stop = stop
	d.agent.OnConfig(func(*control.Config) { d.follow() })
	sh.Metrics.MustRegister(d.agent.Metrics())
	sh.OnStatus = func(context.Context) (any, error) { return d.status(), nil }
	sh.OnDoctor = func(context.Context) []daemon.Check { return d.checks() }
	sh.OnDrain = func(context.Context) error { d.stop(); return nil }
	return sh.Run(ctx, d.serve)
}

// serve runs until ctx ends, then drains. The agent outlives the drain, so that the platform sees it.
func (d *relayDaemon) serve(ctx context.Context) error {
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	g, work := errgroup.WithContext(work)
	g.Go(func() error { return d.agent.Run(work) })
	g.Go(func() error {
		defer cancel()
		return d.relay(ctx, work)
	})
	err := g.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (d *relayDaemon) relay(ctx, work context.Context) error {
	first, err := d.agent.WaitConfig(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return err
	}
	srv, err := d.newServer(ctx, first)
	if err != nil {
		return err
	}
	if err := srv.Listen(ctx); err != nil {
		return daemon.Failf("%w\nis another relay running here? choose another --listen-ip or --listen-port", err)
	}
	d.srv.Store(srv)
	d.follow() // what came while the server was being made
	run, stop := context.WithCancel(work)
	defer stop()
	g, run := errgroup.WithContext(run)
	g.Go(func() error { return srv.Run(run) })
	g.Go(func() error { return d.serveLastRung(run) })
	g.Go(func() error {
		d.sh.Ready("serving on " + srv.Addr().String())
		d.sh.Log.Info("Relay server started successfully", "listen", srv.Addr(), "name", d.agent.Name())
		d.agent.HeartbeatNow()
		select {
		case <-ctx.Done():
			d.drain(srv)
		case <-run.Done():
		}
		stop()
		return nil
	})
	return g.Wait()
}

// outage reports whether nodes may not have been able to renew their credentials, as seen from here.
func (d *relayDaemon) outage() bool {
	connected, since := d.agent.Connected()
	return !connected || time.Since(since) < outageOver
}

func (d *relayDaemon) drain(srv *relay.Server) {
	d.sh.Health.Set("drain", errors.New("the relay drains: its nodes move to others"))
	d.sh.Status("draining")
	ctx, cancel := context.WithTimeout(context.Background(), d.opts.drain)
	defer cancel()
	go d.agent.HeartbeatNow()
	var rung sync.WaitGroup
	rung.Go(func() { d.drainLastRung(ctx) })
	if left := srv.Drain(ctx, d.opts.drain); left > 0 {
		d.sh.Log.Warn("drain deadline reached", "allocations_left", left)
	}
	rung.Wait()
}

func (d *relayDaemon) newServer(ctx context.Context, c *control.Config) (*relay.Server, error) {
	if c.Relay == nil {
		return nil, fmt.Errorf("the platform sent a configuration without a relay's part: this node is %v", c.Node)
	}
	cfg := relay.Config{
		MinPort: d.opts.minPort, MaxPort: d.opts.maxPort, Shards: d.opts.shards, Logger: d.sh.Log, Metrics: d.sh.Metrics,
		Certificate: d.agent.Certificate, Keys: keys(c.Relay), Organizations: organizations(c.Relay), Denied: c.Relay.Denied,
		Outage: d.outage, Budgets: d.budgets, AllocationLifetime: d.opts.lifetime,
		ServicePorts: d.opts.servicePorts(), Limits: relay.Limits{Allocations: d.opts.maxAllocations},
	}
	listen := netip.IPv4Unspecified()
	var err error
	if d.opts.listenIP != "" {
		if listen, err = netip.ParseAddr(d.opts.listenIP); err != nil {
			return nil, daemon.Usagef("--listen-ip: %w", err)
		}
	}
	cfg.Listen = netip.AddrPortFrom(listen, d.opts.port)
	if d.opts.relayIP != "" {
		if cfg.RelayIP, err = netip.ParseAddr(d.opts.relayIP); err != nil {
			return nil, daemon.Usagef("--relay-ip: %w", err)
		}
	}
	if cfg.Advertise, err = d.advertised(ctx, listen, c.Relay.Host); err != nil {
		return nil, err
	}
	srv, err := relay.New(cfg)
	if err != nil {
		return nil, daemon.Usagef("%w", err)
	}
	return srv, d.newLastRung(listen)
}

// advertised is the address that nodes are told: the flag's, the listening one, or the host's that the platform knows.
func (d *relayDaemon) advertised(ctx context.Context, listen netip.Addr, host string) (netip.Addr, error) {
	if d.opts.advertise != "" {
		a, err := netip.ParseAddr(d.opts.advertise)
		if err != nil {
			return a, daemon.Usagef("--advertise-ip: %w", err)
		}
		return a, nil
	}
	if a, err := netip.ParseAddr(host); err == nil {
		return a, nil
	}
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil || len(found) == 0 {
		if !listen.IsUnspecified() {
			return listen, nil
		}
		return netip.Addr{}, daemon.Failf("address of this relay's host %s: %w\ngive it with --advertise-ip", host, err)
	}
	slices.SortStableFunc(found, func(a, b netip.Addr) int { return a.Unmap().BitLen() - b.Unmap().BitLen() })
	return found[0].Unmap(), nil
}

// follow takes the newest configuration over. Two goroutines call it, the subscriber's and the one that makes the server: each looks for
// itself what is newest, so that neither puts an older deny list or older keys over newer ones.
func (d *relayDaemon) follow() {
	d.following.Lock()
	defer d.following.Unlock()
	srv, c := d.srv.Load(), d.agent.Config()
	if srv == nil || c == nil || c.Relay == nil {
		return
	}
	srv.SetKeys(keys(c.Relay))
	srv.SetDenied(c.Relay.Denied)
	d.followLastRung(c.Relay)
	if err := srv.SetOrganizations(organizations(c.Relay)); err != nil {
		d.sh.Log.Error("a configured peer is refused: its organization keeps its former peers, the rest of the configuration is in force", "err", err)
		d.sh.Health.Set("organizations", err)
	} else {
		d.sh.Health.Set("organizations", nil)
	}
	if c.Relay.Draining {
		d.sh.Log.Info("the platform asks this relay to drain")
		d.stop()
	}
}

func keys(r *control.Relay) [][]byte {
	var out [][]byte
	for _, k := range r.Keys {
		out = append(out, k.Secret)
	}
	return out
}

func organizations(r *control.Relay) map[string]relay.Organization {
	out := map[string]relay.Organization{}
	for _, o := range r.Orgs {
		ro := relay.Organization{Quota: relay.Quota{Allocations: o.MaxAllocations, Bandwidth: o.BytesPerSecond}}
		for _, p := range o.Peers {
			ro.Peers = append(ro.Peers, relay.Peer{Addr: p})
		}
		out[o.Org] = ro
	}
	return out
}

func (d *relayDaemon) heartbeat() control.Heartbeat {
	hb := control.Heartbeat{State: "ready"}
	srv := d.srv.Load()
	if srv == nil {
		hb.State = "degraded"
		hb.Problems = []string{"not serving yet"}
		return hb
	}
	s := srv.Snapshot()
	if s.Draining {
		hb.State = "draining"
	} else if problem := d.portProblem(); problem != "" {
		hb.State, hb.Problems = "degraded", []string{problem}
	}
	if problem := d.lastRungProblem(); problem != "" {
		hb.Problems = append(hb.Problems, problem)
	}
	now := time.Now()
	hb.Load = map[string]float64{"allocations": float64(s.Allocations)}
	if dt := now.Sub(d.lastBeat).Seconds(); !d.lastBeat.IsZero() && dt > 0 {
		hb.Load["bytes_per_second"] = float64(s.Bytes-d.lastBytes) / dt
	}
	d.lastBytes, d.lastBeat = s.Bytes, now
	return hb
}

// portProblem says that nodes are told to dial another port than the relay listens on, or "".
func (d *relayDaemon) portProblem() string {
	srv, c := d.srv.Load(), d.agent.Config()
	if srv == nil || c == nil || c.Relay == nil || c.Relay.Port == 0 || c.Relay.Port == srv.Addr().Port() {
		return ""
	}
	return fmt.Sprintf("listens on port %d, and nodes are told to dial %d: sallyway relay update %s --port %d",
		srv.Addr().Port(), c.Relay.Port, d.agent.Name(), srv.Addr().Port())
}

// Status is what `relayd status` shows.
type Status struct {
	Platform agent.Status    `json:"platform"`
	Listen   netip.AddrPort  `json:"listen,omitzero"`
	Relay    *relay.Snapshot `json:"relay,omitempty"`
	// LastRung is missing when it is switched off.
	LastRung *fallback.Snapshot `json:"last_rung,omitempty"`
}

func (d *relayDaemon) status() Status {
	st := Status{Platform: d.agent.Status()}
	if srv := d.srv.Load(); srv != nil {
		s := srv.Snapshot()
		st.Listen, st.Relay, st.LastRung = srv.Addr(), &s, d.lastRung()
	}
	return st
}

func (d *relayDaemon) checks() []daemon.Check {
	out := agent.Checks(d.agent)
	st := d.status()
	row := daemon.Check{Check: "relay", Result: daemon.Fail, Detail: "not serving yet", Remedy: "see the log: the relay waits for its platform"}
	if st.Relay != nil {
		row = daemon.Check{Check: "relay", Result: daemon.Pass, Detail: fmt.Sprintf("serving on %v, %d allocations", st.Listen, st.Relay.Allocations)}
		if problem := d.portProblem(); problem != "" {
			row.Result, row.Detail, row.Remedy = daemon.Warn, problem, "make both the same; where a firewall maps one port to the other, all is well"
		}
		for _, w := range d.srv.Load().Warnings() {
			out = append(out, daemon.Check{Check: "UDP buffers", Result: daemon.Warn, Detail: w, Remedy: "the command above, and the same line in /etc/sysctl.d"})
		}
		if st.Relay.BufferErrors > 0 {
			out = append(out, daemon.Check{
				Check: "UDP buffers", Result: daemon.Warn, Detail: fmt.Sprintf("%d datagrams dropped for want of receive buffer", st.Relay.BufferErrors),
				Remedy: "sysctl -w net.core.rmem_max=8388608, and in /etc/sysctl.d",
			})
		}
	}
	return append(append(out, row), d.lastRungCheck()...)
}

func renderStatus(w io.Writer, doc json.RawMessage) error {
	var st Status
	if err := json.Unmarshal(doc, &st); err != nil {
		return err
	}
	agent.Render(w, st.Platform)
	if st.Relay == nil {
		_, err := fmt.Fprintln(w, "relay      not serving yet")
		return err
	}
	fmt.Fprintf(w, "relay      on %v, up %v, %d allocations, %d connections, draining %v\n", st.Listen, st.Relay.Uptime.Round(time.Second), st.Relay.Allocations, st.Relay.Connections, st.Relay.Draining)
	fmt.Fprintf(w, "relayed    %d bytes in %d datagrams, %d dropped\n", st.Relay.Bytes, st.Relay.Datagrams, st.Relay.Dropped)
	return renderLastRung(w, st.LastRung)
}
