package relayd

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/relay/budget"
	"sallyway/relay/fallback"
	"sallyway/relay/reverse"
)

// lastRungRetry is between attempts to open the ports of the last rung, which another program of the host may have.
const lastRungRetry = 10 * time.Second

// servicePorts are the relay's other ports, which are nobody's peer.
func (o *options) servicePorts() []uint16 {
	var out []uint16
	for _, p := range []uint16{o.sshPort, o.tlsPort} {
		if p != 0 {
			out = append(out, p)
		}
	}
	return out
}

// newLastRung makes the server of SSH and TLS; nil when both are off.
func (d *relayDaemon) newLastRung(listen netip.Addr) error {
	if d.opts.sshPort == 0 && d.opts.tlsPort == 0 {
		return nil
	}
	cfg := fallback.Config{
		Relay: d.agent.Node(), Certificate: d.agent.Certificate, Logger: d.sh.Log, Metrics: d.sh.Metrics, Budgets: d.budgets,
		HostIdentity: func() reverse.Identity {
			key, cert := d.agent.SSH()
			return reverse.Identity{Key: key, Certificate: cert}
		},
	}
	if d.opts.sshPort != 0 {
		cfg.SSH = netip.AddrPortFrom(listen, d.opts.sshPort)
	}
	if d.opts.tlsPort != 0 {
		cfg.TLS = netip.AddrPortFrom(listen, d.opts.tlsPort)
	}
	rung, err := fallback.New(cfg)
	if err != nil {
		return err
	}
	d.rung.Store(rung)
	return nil
}

// serveLastRung serves until ctx ends. A port that is taken does not keep the relay from its work: it is tried again.
func (d *relayDaemon) serveLastRung(ctx context.Context) error {
	rung := d.rung.Load()
	if rung == nil {
		return nil
	}
	for {
		err := rung.Listen(ctx)
		d.setRungProblem(err)
		if err == nil {
			ssh, tls := rung.Addrs()
			d.sh.Log.Info("last rung is there", "ssh", ssh, "tls", tls)
			return rung.Run(ctx)
		}
		d.sh.Log.Error("the last rung is not there: nodes that reach this relay neither over UDP nor over TLS on the first port can not use it",
			"err", err, "remedy", "free the port, or choose others with --ssh-port and --tls-port", "retry_every", lastRungRetry)
		select {
		case <-time.After(lastRungRetry):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (d *relayDaemon) setRungProblem(err error) {
	d.sh.Health.Set("last rung", err)
	var text string
	if err != nil {
		text = err.Error()
	}
	d.rungProblem.Store(&text)
}

// followLastRung takes a configuration over.
func (d *relayDaemon) followLastRung(c *control.Relay) {
	rung := d.rung.Load()
	if rung == nil {
		return
	}
	orgs := map[string]fallback.Organization{}
	for _, o := range c.Orgs {
		if o.Trust == nil { // an older platform
			continue
		}
		orgs[o.Org] = fallback.Organization{Roots: o.Trust.Roots, Pins: o.Trust.Pins, Denied: o.Trust.Denied, SSHCAs: o.SSHCAs, Rates: budget.Rates{Organization: o.BytesPerSecond}}
	}
	if err := rung.SetOrganizations(orgs, c.Denied); err != nil {
		d.sh.Log.Error("an organization has no last rung here", "err", err)
	}
}

// drainLastRung tells who uses it, and waits until they have moved or ctx ends.
func (d *relayDaemon) drainLastRung(ctx context.Context) {
	rung := d.rung.Load()
	if rung == nil {
		return
	}
	rung.Drain()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for rung.Links() > 0 {
		select {
		case <-tick.C:
		case <-ctx.Done():
			d.sh.Log.Warn("drain deadline reached", "links_left", rung.Links())
			return
		}
	}
}

// lastRungProblem says that the last rung is not where nodes look for it, or "".
func (d *relayDaemon) lastRungProblem() string {
	if p := d.rungProblem.Load(); p != nil && *p != "" {
		return *p
	}
	c := d.agent.Config()
	if c == nil || c.Relay == nil || c.Relay.SSHPort == 0 && c.Relay.TLSPort == 0 {
		return "" // a platform that does not know of it, or it is switched off there
	}
	if c.Relay.SSHPort == d.opts.sshPort && c.Relay.TLSPort == d.opts.tlsPort {
		return ""
	}
	return fmt.Sprintf("the last rung listens on ports %d and %d, and nodes are told to dial %d and %d: sallyway relay update %s --ssh-port %d --tls-port %d",
		d.opts.sshPort, d.opts.tlsPort, c.Relay.SSHPort, c.Relay.TLSPort, d.agent.Name(), d.opts.sshPort, d.opts.tlsPort)
}

// lastRung is its state for status; nil when it is off.
func (d *relayDaemon) lastRung() *fallback.Snapshot {
	rung := d.rung.Load()
	if rung == nil {
		return nil
	}
	s := rung.Snapshot()
	return &s
}

func (d *relayDaemon) lastRungCheck() []daemon.Check {
	s := d.lastRung()
	if s == nil {
		return []daemon.Check{{Check: "last rung", Result: daemon.Pass, Detail: "switched off"}}
	}
	row := daemon.Check{Check: "last rung", Result: daemon.Pass, Detail: fmt.Sprintf("ssh on %v, tls on %v, %d gateways by %d connections, %d links", s.SSH, s.TLS, s.Gateways, s.Connections, s.Links)}
	if problem := d.lastRungProblem(); problem != "" {
		row.Result, row.Detail, row.Remedy = daemon.Warn, problem, "free the ports, or make both the same; where a firewall maps one port to the other, all is well"
	} else if key, _ := d.agent.SSH(); key == nil {
		row.Result, row.Detail, row.Remedy = daemon.Warn, "this relay has no SSH certificate yet", "it gets one at the next renewal, from a platform that issues them"
	}
	return []daemon.Check{row}
}

func renderLastRung(w io.Writer, s *fallback.Snapshot) error {
	if s == nil {
		return nil
	}
	_, err := fmt.Fprintf(w, "last rung  ssh on %v, tls on %v, %d gateways by %d ssh connections, %d links, %d bytes, %d refused\n",
		s.SSH, s.TLS, s.Gateways, s.Connections, s.Links, s.Bytes, s.Refused+s.Limited)
	return err
}
