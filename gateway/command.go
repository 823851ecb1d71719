package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"sallyway/client"
	"sallyway/direct"
	"sallyway/internal/control"
	"sallyway/internal/control/agent"
	"sallyway/internal/daemon"
	"sallyway/internal/doctor"
	"sallyway/internal/egress"
	"sallyway/internal/identity"
	"sallyway/internal/legs"
	"sallyway/tunnel"
)

var spec = daemon.Spec{
	Name: "gatewayd", Role: "gateway", Start: []string{"up"}, Capabilities: []string{"CAP_NET_ADMIN", "CAP_NET_RAW"}, Devices: []string{"/dev/net/tun rw"},
	HostDNS: true, RenderStatus: renderStatus, Checks: doctor.Network, StopTimeout: DefaultDrain + 15*time.Second,
}

var program = agent.Program{Create: "sallyway gateway create NAME", Start: "sudo gatewayd up", Install: "sudo gatewayd install"}

// options are the flags of `gatewayd up`.
type options struct {
	daemon.Options
	tun, routes, dns string
	tunName          string
	mtu              int
	standby          int
	allow            []string
	servePastExpiry  bool
	transport        string
	drain            time.Duration
	bench            string
	direct           string
	egress           client.EgressFlags
	aws              agent.AWSFlags
	byAWS            *agent.AWS // nil: by token
}

// Command is gatewayd.
func Command() *cobra.Command {
	o := options{Options: daemon.Options{MetricsListen: "127.0.0.1:9465"}}
	up := &cobra.Command{
		Use:   "up",
		Short: "Run the gateway",
		Long: `Run a gateway: it lets the clients of its organization reach resources in this network, as policies say. It opens no port: it dials out to
relays (5349/udp, or 5349/tcp where UDP is blocked) and to the platform (443/tcp).

The first run needs the token that "sallyway gateway create NAME" printed; the same command again starts it without enrolling.
As root it also opens a TUN device, through which this host and the LAN behind it reach other gateways' resources.

What may be reached at all is bounded by --allow on this host, which no message of the platform can widen. Without --allow that is
everything but this host itself, its links and metadata services.`,
		Example: "  sudo gatewayd up --token-file gw.token\n  gatewayd up --allow '10.0.3.0/24 5432,8000-8100' --allow 10.0.4.7",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	o.Register(up, spec)
	f := up.Flags()
	o.aws.Register(f)
	f.StringVar(&o.tun, "tun", "auto", "TUN device: auto, on or off")
	f.StringVar(&o.tunName, "tun-name", "", "name of the TUN device (default sally0, or the next that is free)")
	f.IntVar(&o.mtu, "mtu", 0, "MTU of the TUN device in bytes (default 1500)")
	f.StringVar(&o.routes, "routes", "auto", "routes into the TUN device: auto or off")
	f.StringVar(&o.dns, "dns", "auto", "split DNS on this host: auto or off")
	f.IntVar(&o.standby, "standby", 1, "relays held besides the active one")
	f.StringArrayVar(&o.allow, "allow", nil, `"CIDR" or "CIDR PORTS" that may be reached through this gateway (repeatable)`)
	f.BoolVar(&o.servePastExpiry, "serve-past-expiry", false, "go on taking new flows when the policies held here are past their time")
	f.StringVar(&o.transport, "transport", "auto", "way to relays: auto (udp, then tls), udp or tls")
	f.StringVar(&o.direct, "direct", "auto", "paths to peers without a relay: auto (where the organization allows it) or off")
	f.StringVar(&o.bench, "bench", "on", "answer sallyway bench to clients that may reach something here: on or off")
	f.DurationVar(&o.drain, "drain-timeout", DefaultDrain, "how long a stopping gateway lets open connections finish; new ones go by way of other gateways meanwhile")
	o.egress.Register(up)
	daemon.Bind(up)
	root := &cobra.Command{
		Use: "gatewayd", Short: "Sallyway's gateway: a way into a private network that opens no port",
		SilenceUsage: true, SilenceErrors: true,
	}
	root.AddCommand(up, daemon.DrainByCommand(spec, drainByHand))
	root.AddCommand(daemon.Commands(spec)...)
	return root
}

func (o *options) run(cmd *cobra.Command) error {
	if o.bench != string(client.On) && o.bench != string(client.Off) {
		return daemon.Usagef("--bench %.20q: want on or off", o.bench)
	}
	if err := o.egress.Parse(cmd); err != nil {
		return err
	}
	token, aws, err := program.Credential(cmd, &o.Options, &o.aws)
	if err != nil {
		return err
	}
	o.byAWS = aws
	daemon.Tune(daemon.Tuning{})
	sh, err := daemon.Open(spec, &o.Options, cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	defer sh.Close()
	if err := o.egress.Keep(sh); err != nil {
		return err
	}
	d, err := newGateway(cmd.Context(), o, sh, token)
	if err != nil {
		return err
	}
	sh.OnStatus = func(context.Context) (any, error) { return d.status(), nil }
	sh.OnDoctor = func(ctx context.Context) []daemon.Check {
		return append(doctor.Egress(ctx, o.egress.Dialer(), d.agent.PlatformURL()), d.checks()...)
	}
	sh.OnDrainBy = d.drainBy
	return sh.Run(cmd.Context(), d.serve)
}

func (o *options) host() (client.HostConfig, error) {
	var hc client.HostConfig
	var errs [3]error
	hc.TUN, errs[0] = client.ParseChoice("tun", o.tun)
	hc.Routes, errs[1] = client.ParseChoice("routes", o.routes)
	hc.DNS, errs[2] = client.ParseChoice("dns", o.dns)
	hc.Name, hc.MTU = o.tunName, o.mtu
	return hc, errors.Join(errs[:]...)
}

// Status is what `gatewayd status` shows.
type Status struct {
	Platform  agent.Status             `json:"platform"`
	Relays    []legs.Status            `json:"relays"`
	LastRung  []LastRungStatus         `json:"last_rung"`
	NAT       natResult                `json:"nat"`
	Resources []string                 `json:"resources"`
	Health    []control.ResourceHealth `json:"health"`
	Draining  string                   `json:"draining,omitempty"` // the reason
	Direct    direct.Stats             `json:"direct"`
	Sessions  []SessionStatus          `json:"sessions"`
	Gateways  []client.GatewayStatus   `json:"gateways"`
	Host      client.HostStatus        `json:"host"`
	QUIC      tunnel.ConnStats         `json:"quic"`
	Egress    *egress.Status           `json:"egress,omitempty"` // nil where there is no proxy
}

// SessionStatus is one peer's session.
type SessionStatus struct {
	Peer     identity.Node    `json:"peer"`
	Key      identity.KeyHash `json:"key"`
	Since    time.Time        `json:"since"`
	Path     string           `json:"path"`
	Flows    uint64           `json:"flows"`
	Sent     uint64           `json:"sent_bytes"`
	Received uint64           `json:"received_bytes"`
	RTT      time.Duration    `json:"rtt_ns"`
	// QUIC is what QUIC counts at the gateway's end.
	QUIC tunnel.QUICStats `json:"quic"`
}

func (d *gatewayDaemon) status() Status {
	st := Status{
		Platform: d.agent.Status(), Relays: d.legs.Status(), LastRung: d.last.status(), Gateways: d.sites.Status(), Host: d.host.Status(), QUIC: d.merged.Stats(),
		Resources: []string{}, Sessions: []SessionStatus{}, Health: d.health.report(), Draining: d.drainReason(),
		Direct: d.direct.stats(), Egress: d.opts.egress.Dialer().Status(),
	}
	d.mu.Lock()
	st.NAT = d.nat
	d.mu.Unlock()
	if s, err := d.agent.Snapshot(); err == nil {
		st.Resources = append(st.Resources, resources(s)...)
	}
	for _, s := range d.srv.Sessions() {
		q, _, _ := d.srv.QUIC(s.Peer.Session) // nothing of one that has just ended
		st.Sessions = append(st.Sessions, SessionStatus{s.Peer.Node, s.Peer.Key, s.Since, s.Path.Name, s.Flows, s.Sent, s.Received, s.RTT, q})
	}
	return st
}

func (d *gatewayDaemon) checks() []daemon.Check {
	out := append(agent.Checks(d.agent), client.LegChecks(d.legs)...)
	row := daemon.Check{Check: "policies", Result: daemon.Pass, Detail: fmt.Sprintf("version %d", d.agent.Status().SnapshotVersion)}
	if stale, err := d.agent.SnapshotProblem(); err != nil {
		row.Result, row.Detail, row.Remedy = daemon.Warn, err.Error(), "let the gateway reach its platform"
		if stale {
			row.Result = daemon.Fail
		}
	}
	d.mu.Lock()
	nat := daemon.Check{Check: "NAT", Result: daemon.Pass, Detail: d.nat.Text}
	switch {
	case d.nat.At.IsZero():
		nat.Result, nat.Detail, nat.Remedy = daemon.Warn, "not measured yet", "ask again in a few seconds; it is measured once a relay is reached"
	case d.nat.Text == "":
		nat.Result, nat.Detail, nat.Remedy = daemon.Warn, "not known: "+d.nat.Error, "let UDP port 5349 out to the relays"
	}
	d.mu.Unlock()
	return append(append(out, row, nat, d.health.check()), client.HostChecks(d.host)...)
}

func renderStatus(w io.Writer, doc json.RawMessage) error {
	var st Status
	if err := json.Unmarshal(doc, &st); err != nil {
		return err
	}
	agent.Render(w, st.Platform)
	client.RenderEgress(w, st.Egress)
	client.RenderLegs(w, st.Relays)
	renderLastRung(w, st.LastRung)
	if !st.NAT.At.IsZero() {
		fmt.Fprintf(w, "nat        %s%s\n", st.NAT.Text, st.NAT.Error)
	}
	if st.Direct.Open {
		fmt.Fprintf(w, "direct     %d paths that work, with %d peers\n", st.Direct.Links, st.Direct.Peers)
	}
	for _, r := range st.Resources {
		fmt.Fprintf(w, "resource   %s\n", r)
	}
	for _, h := range st.Health {
		if !h.OK {
			fmt.Fprintf(w, "unreached  %s since %s: %s\n", h.Name, h.Since.Local().Format(time.DateTime), h.Reason)
		}
	}
	if st.Draining != "" {
		fmt.Fprintf(w, "draining   %s\n", st.Draining)
	}
	for _, s := range st.Sessions {
		fmt.Fprintf(w, "session    %v over %s since %s, %d flows, %d bytes sent, %d received, RTT %v\n", s.Peer, s.Path, s.Since.Local().Format(time.DateTime), s.Flows, s.Sent, s.Received, s.RTT.Round(10*time.Microsecond))
	}
	client.RenderGateways(w, st.Gateways)
	client.RenderHost(w, st.Host)
	return nil
}
