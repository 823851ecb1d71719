// Package client reaches private resources through gateways: the program behind `sallyway connect`, and a library for programs that want
// connections without a TUN device.
//
//	c, err := client.Dial(ctx, client.Config{StateDir: "/var/lib/my-app", Token: token})
//	defer c.Close()
//	conn, err := c.DialContext(ctx, "tcp", "db:5432")      // a resource's name, or any address that a resource covers
//
// Dial enrols the node with the token the first time and needs none after that. What the node may reach is the organization's policy.
package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"sallyway/internal/control"
	"sallyway/internal/control/agent"
	"sallyway/internal/egress"
	"sallyway/internal/identity"
	"sallyway/internal/legs"
	"sallyway/internal/telemetry"
	"sallyway/internal/version"
	"sallyway/relay/leg"
)

// Config says who the client is.
type Config struct {
	// StateDir holds the node's key, certificate and cached configuration; it exists, mode 0700, and belongs to this process alone.
	StateDir string
	// Token is an enrolment token, from `sallyway client create NAME`. It is needed once.
	Token string
	// Logger takes changes of state; nil discards them.
	Logger *slog.Logger
	// Standby is how many relays are held besides the active one; negative is none, 0 is one.
	Standby int
	// Transports are the ways to relays to try, in order; nil is UDP, then TLS, then the last rung: TLS on 8443.
	Transports []leg.Transport
	// NoDirect keeps sessions on relays even where the organization allows direct paths; without UDP among Transports they stay there, too.
	NoDirect bool
	// Egress dials TCP to relays and platform, perhaps through a proxy; nil dials relays itself, and the platform by the proxy that net/http
	// finds in the environment.
	Egress *egress.Dialer
	// Tracer makes a span of every flow's dial; nil is none.
	Tracer *telemetry.Tracer
}

// Client is a node that reaches resources. Its methods may be called concurrently.
type Client struct {
	agent    *agent.Agent
	legs     *legs.Keeper
	sessions *Sessions
	log      *slog.Logger
	standby  int
	onConfig []func(*control.Config) // set before run

	configured chan struct{} // closed when the first configuration is in force

	stop context.CancelFunc
	done chan struct{}
	once sync.Once
	err  error
}

// open makes a client that does not run yet.
func open(ctx context.Context, cfg Config) (*Client, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	c := &Client{log: cfg.Logger, standby: cfg.Standby, configured: make(chan struct{}), done: make(chan struct{})}
	if c.standby == 0 {
		c.standby = 1
	}
	ac := agent.Config{
		StateDir: cfg.StateDir, Kind: identity.Client, Token: cfg.Token, Version: version.Get().Version, Logger: cfg.Logger, Heartbeat: c.heartbeat,
	}
	if cfg.Egress != nil {
		ac.DialContext = cfg.Egress.DialContext
	}
	a, err := agent.Open(ctx, ac)
	if err != nil {
		return nil, err
	}
	c.agent = a
	wake := func() {
		if c.sessions != nil {
			c.sessions.Wake()
		}
	}
	lc := legs.Config{
		Logger: cfg.Logger, Transports: cfg.Transports, Dial: RelayDial(cfg.Egress), OnMissing: func(identity.Node) { wake() },
		OnUp: func(identity.Node, *leg.Leg) { wake() }, OnDown: func(identity.Node, error) { wake() },
	}
	if cfg.Transports == nil { // else others were chosen
		lc.Certificate = a.Certificate
	}
	c.legs = legs.New(lc)
	c.sessions = NewSessions(SessionsConfig{
		Certificate: a.Certificate, Legs: c.legs, Eager: true, Logger: cfg.Logger, Tracer: cfg.Tracer,
		Direct: !cfg.NoDirect && (cfg.Transports == nil || slices.Contains(cfg.Transports, leg.UDP)),
		Trust:  GatewayTrust(a, cfg.Logger),
	})
	return c, nil
}

// GatewayTrust is the trust in gateways' certificates as an agent knows it. Without a usable one it trusts nobody.
func GatewayTrust(a *agent.Agent, log *slog.Logger) func() *identity.Trust {
	return func() *identity.Trust {
		t, err := a.Trust(identity.Gateway)
		if err != nil {
			log.Error("the organization's trust is unusable", "err", err)
			return &identity.Trust{}
		}
		return t
	}
}

// run keeps the client until ctx ends.
func (c *Client) run(ctx context.Context) error {
	var first sync.Once
	c.agent.OnConfig(func(cfg *control.Config) {
		c.sessions.Update(TrimRelays(cfg.Dialling, 1+c.standby))
		for _, f := range c.onConfig {
			f(cfg)
		}
		first.Do(func() { close(c.configured) })
	})
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.agent.Run(ctx) })
	g.Go(func() error { return c.legs.Run(ctx) })
	g.Go(func() error { return c.sessions.Run(ctx) })
	return g.Wait()
}

// waitConfig waits until the first configuration has arrived and is in force: flows can be dialled from then on.
func (c *Client) waitConfig(ctx context.Context) error {
	if _, err := c.agent.WaitConfig(ctx); err != nil {
		return err
	}
	select {
	case <-c.configured:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// TrimRelays leaves every gateway the first n of its relays: one active, the others standby. It copies what it changes.
func TrimRelays(d *control.Dialling, n int) *control.Dialling {
	if d == nil {
		return nil
	}
	out := *d
	out.Gateways = append([]control.GatewayRef(nil), d.Gateways...)
	for i := range out.Gateways {
		if g := &out.Gateways[i]; len(g.Relays) > max(n, 1) {
			g.Relays = g.Relays[:max(n, 1)]
		}
	}
	return &out
}

func (c *Client) heartbeat() control.Heartbeat {
	hb := control.Heartbeat{State: "ready"}
	for _, st := range c.legs.Status() {
		if st.Up {
			hb.Relays = append(hb.Relays, st.Relay.ID)
		} else if st.Error != "" {
			hb.State = "degraded"
			hb.Problems = append(hb.Problems, "relay "+st.Name+": "+st.Error)
		}
	}
	return hb
}

// Dial opens a client and returns when its first configuration is there: from the platform, or from the state folder when the platform is
// not reached. ctx bounds that only.
func Dial(ctx context.Context, cfg Config) (*Client, error) {
	c, err := open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	c.stop = stop
	go func() {
		defer close(c.done)
		c.err = c.run(run)
	}()
	if err := c.waitConfig(ctx); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// DialContext opens a flow: network is tcp or udp (a 4 or 6 behind it does not matter), address is host:port where host is a resource's
// name, an address or a host name that a resource covers. A refusal is a *tunnel.ProxyError that names the rule. UDP connections
// carry a datagram a Write and have no deadlines.
func (c *Client) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := splitHostPort(address)
	if err != nil {
		return nil, err
	}
	switch network {
	case "tcp", "tcp4", "tcp6":
		f, err := c.sessions.DialTCP(ctx, host, port)
		if err != nil {
			return nil, fmt.Errorf("dial %s: %w", address, err)
		}
		return newConn(f, address), nil
	case "udp", "udp4", "udp6":
		f, err := c.sessions.DialUDP(ctx, host, port)
		if err != nil {
			return nil, fmt.Errorf("dial %s: %w", address, err)
		}
		return &packetConn{f, addr(address)}, nil
	}
	return nil, fmt.Errorf("dial %s: network %q is not tcp or udp", address, network)
}

// Close ends the client and its flows. It may be called more than once.
func (c *Client) Close() error {
	c.once.Do(func() {
		c.stop()
		<-c.done
		if errors.Is(c.err, context.Canceled) {
			c.err = nil
		}
	})
	return c.err
}
