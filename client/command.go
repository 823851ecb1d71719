package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"sallyway/internal/control"
	"sallyway/internal/control/agent"
	"sallyway/internal/daemon"
	"sallyway/internal/doctor"
	"sallyway/internal/egress"
	"sallyway/internal/legs"
	"sallyway/tunnel"
)

// spec describes `sallyway connect` to the daemons' shell.
var spec = daemon.Spec{
	Name: "sallyway connect", Role: "client", StateName: "client",
	Capabilities: []string{"CAP_NET_ADMIN"}, Devices: []string{"/dev/net/tun rw"}, HostDNS: true,
	RenderStatus: renderStatus, Checks: doctor.Network,
}

var program = agent.Program{Create: "sallyway client create NAME", Start: "sallyway connect", Install: "sudo sallyway connect install"}

// options are the flags of `sallyway connect`.
type options struct {
	daemon.Options
	tun, routes, dns  string
	tunName           string
	mtu               int
	socks, http       string
	proxyUser         string
	proxyPasswordFile string
	forwards          []string
	stdio             string
	standby           int
	transport         string
	direct            string
	egress            EgressFlags
}

// Command is `sallyway connect` with its sub-commands: status, doctor, healthcheck, down, install, uninstall.
func Command() *cobra.Command {
	var o options
	o.MetricsListen = ""
	cmd := &cobra.Command{
		Use:   "connect",
		Short: "Reach private resources from this host",
		Long: `Connect this host to the resources that its organization's policies allow it, through the gateways that serve them.

As root it opens a TUN device, so that every program reaches resources by address and by name (web.default.sallyway.internal).
Without root the proxies, forwards and --stdio work all the same. The first run needs the token that
"sallyway client create NAME" printed; later runs do not.`,
		Example: `  sudo sallyway connect --token-file laptop.token
  sallyway connect --socks 1080 --forward 5432=db:5432
  ssh -o ProxyCommand='sallyway connect --stdio %h:%p' admin@bastion`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	o.Register(cmd, spec)
	f := cmd.Flags()
	f.StringVar(&o.tun, "tun", "auto", "TUN device: auto, on or off")
	f.StringVar(&o.tunName, "tun-name", "", "name of the TUN device (default sally0, or the next that is free)")
	f.IntVar(&o.mtu, "mtu", 0, "MTU of the TUN device in bytes (default 1500)")
	f.StringVar(&o.routes, "routes", "auto", "routes into the TUN device: auto or off")
	f.StringVar(&o.dns, "dns", "auto", "split DNS on this host: auto or off")
	f.StringVar(&o.socks, "socks", "", "serve SOCKS5 on this port or address:port (a port alone: on loopback)")
	f.StringVar(&o.http, "http", "", "serve an HTTP proxy (CONNECT) on this port or address:port")
	f.StringVar(&o.proxyUser, "proxy-user", "", "user that the proxies demand; needed where they listen beyond loopback")
	f.StringVar(&o.proxyPasswordFile, "proxy-password-file", "", "file with the password of --proxy-user")
	f.StringArrayVar(&o.forwards, "forward", nil, "LADDR=HOST:PORT: carry connections to a local port to a resource (repeatable)")
	f.StringVar(&o.stdio, "stdio", "", "HOST:PORT: connect standard input and output with a resource, for ssh's ProxyCommand")
	f.IntVar(&o.standby, "standby", 1, "relays held besides the active one, for each gateway")
	f.StringVar(&o.transport, "transport", "auto", "way to relays: auto (udp, then tls), udp or tls")
	f.StringVar(&o.direct, "direct", "auto", "paths to gateways without a relay: auto (where the organization allows it) or off")
	o.egress.Register(cmd)
	daemon.Bind(cmd)
	cmd.AddCommand(daemon.StatusCommand(spec), daemon.DoctorCommand(spec), daemon.HealthcheckCommand(spec), daemon.DownCommand(spec), daemon.InstallCommand(spec), daemon.UninstallCommand(spec))
	return cmd
}

// listeners are what serves local programs.
type listener struct {
	name  string
	l     net.Listener
	serve func(context.Context, net.Listener) error
}

func (o *options) run(cmd *cobra.Command) error {
	if o.stdio != "" {
		if done, err := o.stdioByDaemon(cmd); done {
			return err
		}
		o.tun = string(Off)
		if o.LogLevel == "info" {
			o.LogLevel = "warn" // standard error is the user's terminal
		}
	}
	hc, err := o.host()
	if err != nil {
		return daemon.Usagef("%w", err)
	}
	transports, err := legs.ParseTransports(o.transport)
	if err != nil {
		return daemon.Usagef("--transport: %w", err)
	}
	direct, err := DirectEnabled(o.direct)
	if err != nil {
		return daemon.Usagef("%w", err)
	}
	if err := o.egress.Parse(cmd); err != nil {
		return err
	}
	token, err := program.Token(cmd, &o.Options)
	if err != nil {
		return err
	}
	daemon.Tune(daemon.Tuning{})
	sh, err := daemon.Open(spec, &o.Options, cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	defer sh.Close()
	if err := o.egress.Keep(sh); err != nil {
		return err
	}
	c, err := open(cmd.Context(), Config{
		StateDir: sh.State.Dir(), Token: token, Logger: sh.Log, Standby: standby(o.standby), Transports: transports, NoDirect: !direct,
		Egress: o.egress.Dialer(), Tracer: sh.Tracer(),
	})
	if err != nil {
		return program.Error(err)
	}
	sh.Metrics.MustRegister(DirectMetrics(c.sessions.DirectStats)...)
	sh.Metrics.MustRegister(LegMetrics(map[string]*legs.Keeper{"dialling": c.legs}))
	sh.Metrics.MustRegister(c.sessions.Metrics()...)
	sh.Metrics.MustRegister(c.agent.Metrics())
	hc.OnNetwork = func() {
		c.legs.Kick()
		c.sessions.NetworkChanged()
	}
	hc.StateDir, hc.Platform, hc.Proxy, hc.Logger = sh.State.Dir(), c.agent.PlatformURL(), o.egress.Dialer().Host(), sh.Log
	host, err := OpenHost(hc, c.sessions)
	if err != nil {
		return daemon.Failf("%w", err)
	}
	c.onConfig = append(c.onConfig, func(cfg *control.Config) {
		if cfg.Dialling != nil {
			host.Update(cfg.Dialling)
		}
	})
	ls, err := o.listen(c)
	if err != nil {
		return err
	}
	if host.dev == nil && len(ls) == 0 && o.stdio == "" {
		sh.Log.Warn("nothing on this host uses the connection: add --socks, --http or --forward, or run as root for a TUN device")
	}
	sh.OnStatus = func(context.Context) (any, error) {
		st := c.status(host, ls)
		st.Egress = o.egress.Dialer().Status()
		return st, nil
	}
	sh.OnDoctor = func(ctx context.Context) []daemon.Check {
		return append(doctor.Egress(ctx, o.egress.Dialer(), c.agent.PlatformURL()), c.checks(host)...)
	}
	sh.Handle("GET /stdio", stdioHandler(c.sessions))
	sh.Handle("GET /bench", benchHandler(c.sessions, sh.Log))
	return sh.Run(cmd.Context(), func(ctx context.Context) error {
		g, ctx := errgroup.WithContext(ctx)
		g.Go(func() error { return c.run(ctx) })
		g.Go(func() error { return host.Run(ctx) })
		for _, l := range ls {
			sh.Log.Info("serving", "what", l.name, "listen", l.l.Addr().String())
			g.Go(func() error { return l.serve(ctx, l.l) })
		}
		g.Go(func() error {
			if err := c.waitConfig(ctx); err != nil {
				return ctx.Err()
			}
			sh.Ready("connected as " + c.agent.Name())
			sh.Log.Info("connected", "node", c.agent.Node(), "name", c.agent.Name())
			if o.stdio == "" {
				return nil
			}
			if err := o.runStdio(ctx, cmd, c); err != nil {
				return err
			}
			return errStdioDone
		})
		err := g.Wait()
		if errors.Is(err, errStdioDone) {
			return nil
		}
		return err
	})
}

// errStdioDone ends the program when standard input and output are done.
var errStdioDone = errors.New("standard input and output are done")

// standby turns the flag's 0, no standby, into Config's.
func standby(n int) int {
	if n <= 0 {
		return -1
	}
	return n
}

func (o *options) host() (HostConfig, error) {
	var hc HostConfig
	var errs [3]error
	hc.TUN, errs[0] = ParseChoice("tun", o.tun)
	hc.Routes, errs[1] = ParseChoice("routes", o.routes)
	hc.DNS, errs[2] = ParseChoice("dns", o.dns)
	hc.Name, hc.MTU = o.tunName, o.mtu
	return hc, errors.Join(errs[:]...)
}

// listen opens the proxies' and forwards' listeners, so that what is wrong with an address shows at once.
func (o *options) listen(c *Client) (out []listener, err error) {
	defer func() {
		if err != nil {
			for _, l := range out {
				_ = l.l.Close()
			}
			out = nil
		}
	}()
	var password string
	if o.proxyPasswordFile != "" {
		b, err := os.ReadFile(o.proxyPasswordFile)
		if err != nil {
			return nil, daemon.Usagef("password of the proxies: %w", err)
		}
		password = strings.TrimRight(string(b), "\r\n")
	}
	if (o.proxyUser == "") != (password == "") {
		return nil, daemon.Usagef("--proxy-user and --proxy-password-file go together")
	}
	add := func(name string, at netip.AddrPort, serve func(context.Context, net.Listener) error) error {
		l, err := net.Listen("tcp", at.String())
		if err != nil {
			return daemon.Usagef("%s: %w", name, err)
		}
		out = append(out, listener{name, l, serve})
		return nil
	}
	proxy := func(name, flag string, serve func(context.Context, net.Listener) error) error {
		if flag == "" {
			return nil
		}
		at, err := ParseListen(flag)
		if err != nil {
			return daemon.Usagef("--%s: %w", name, err)
		}
		if !at.Addr().IsLoopback() && o.proxyUser == "" {
			return daemon.Usagef("--%s %s listens beyond this host: give it --proxy-user and --proxy-password-file, or an address of loopback", name, flag)
		}
		return add(name, at, serve)
	}
	socks := &SOCKS{Dialer: c.sessions, Logger: c.log, User: o.proxyUser, Password: password}
	web := &HTTPProxy{Dialer: c.sessions, Logger: c.log, User: o.proxyUser, Password: password}
	if err := errors.Join(proxy("socks", o.socks, socks.Serve), proxy("http", o.http, web.Serve)); err != nil {
		return out, err
	}
	for _, s := range o.forwards {
		at, host, port, err := ParseForward(s)
		if err != nil {
			return out, daemon.Usagef("%w", err)
		}
		fw := &Forward{Dialer: c.sessions, Logger: c.log, Host: host, Port: port}
		if err := add("forward to "+joinHostPort(host, port), at, fw.Serve); err != nil {
			return out, err
		}
	}
	return out, nil
}

// Status is what `sallyway connect status` shows.
type Status struct {
	Platform  agent.Status    `json:"platform"`
	Relays    []legs.Status   `json:"relays"`
	Gateways  []GatewayStatus `json:"gateways"`
	Resources []string        `json:"resources"`
	Host      HostStatus      `json:"host"`
	Serving   []string        `json:"serving,omitempty"`
	Egress    *egress.Status  `json:"egress,omitempty"` // nil where there is no proxy
}

func (c *Client) status(h *Host, ls []listener) Status {
	st := Status{Platform: c.agent.Status(), Relays: c.legs.Status(), Gateways: c.sessions.Status(), Host: h.Status(), Resources: []string{}}
	for _, r := range c.sessions.table.Load().cfg.Resources {
		st.Resources = append(st.Resources, fmt.Sprintf("%s (%s)", r.FQDN, r.Address))
	}
	for _, l := range ls {
		st.Serving = append(st.Serving, l.name+" on "+l.l.Addr().String())
	}
	return st
}

// checks are the doctor's rows that only the running client knows.
func (c *Client) checks(h *Host) []daemon.Check {
	out := append(agent.Checks(c.agent), LegChecks(c.legs)...)
	for _, g := range c.sessions.Status() {
		row := daemon.Check{Check: "gateway " + g.Name, Result: daemon.Pass, Detail: "session over " + g.Path}
		switch {
		case g.Up && g.State == tunnel.Dead:
			row.Result, row.Detail = daemon.Fail, "the path over "+g.Path+" is dead: the session waits for another"
			row.Remedy = "see the rows about relays"
		case !g.Up:
			row.Result, row.Detail, row.Remedy = daemon.Fail, g.Error, "where you are admin, see `sallyway status`: is the gateway healthy, and on the same relay?"
		}
		out = append(out, row)
	}
	return append(out, HostChecks(h)...)
}

// LegChecks are the doctor's rows about relays.
func LegChecks(k *legs.Keeper) []daemon.Check {
	var out []daemon.Check
	for _, r := range k.Status() {
		row := daemon.Check{Check: "relay " + r.Name, Result: daemon.Pass, Detail: fmt.Sprintf("leg over %s, seen as %v", r.Transport, r.Reflexive)}
		switch {
		case !r.Up:
			row.Result, row.Detail = daemon.Fail, r.Error
			row.Remedy = fmt.Sprintf("let UDP and TCP port 5349 out to %s, and see that relayd runs there", r.Host)
			if r.Remedy != "" {
				row.Remedy = r.Remedy
			}
			if r.Refused {
				row.Remedy = "the relay refuses this node: is it disabled, revoked or deleted? ask an administrator of the organization"
			}
		case r.Transport != "udp":
			row.Result, row.Remedy = daemon.Warn, fmt.Sprintf("UDP is blocked on the way: let UDP port 5349 out to %s; until then it is slower", r.Host)
		}
		out = append(out, row)
	}
	if len(out) == 0 {
		out = append(out, daemon.Check{Check: "relays", Result: daemon.Warn, Detail: "none is assigned", Remedy: "create one: sallyway relay create NAME --host HOST"})
	}
	return out
}

// HostChecks are the doctor's rows about the host.
func HostChecks(h *Host) []daemon.Check {
	st := h.Status()
	row := daemon.Check{Check: "TUN", Result: daemon.Pass, Detail: fmt.Sprintf("%s, %d routes, DNS by %s", st.TUN, len(st.Routes), st.DNS)}
	switch {
	case st.Why == tunOff:
		row.Detail = st.Why
	case st.TUN == "":
		row.Result, row.Detail, row.Remedy = daemon.Warn, st.Why, "run as root, or with CAP_NET_ADMIN and /dev/net/tun, to have one"
	case strings.HasPrefix(st.DNS, "off: "):
		row.Result, row.Remedy = daemon.Warn, "names of resources do not resolve on this host, addresses work; see what DNS says is in the way"
	case len(st.Skipped) > 0:
		row.Result, row.Remedy = daemon.Warn, "left out: "+strings.Join(st.Skipped, "; ")+". Reach these by name or virtual address"
	}
	return []daemon.Check{row}
}

func renderStatus(w io.Writer, doc json.RawMessage) error {
	var st Status
	if err := json.Unmarshal(doc, &st); err != nil {
		return err
	}
	agent.Render(w, st.Platform)
	RenderEgress(w, st.Egress)
	RenderLegs(w, st.Relays)
	RenderGateways(w, st.Gateways)
	for _, r := range st.Resources {
		fmt.Fprintf(w, "resource   %s\n", r)
	}
	RenderHost(w, st.Host)
	for _, s := range st.Serving {
		fmt.Fprintf(w, "serving    %s\n", s)
	}
	return nil
}

// RenderLegs writes the status lines about relays.
func RenderLegs(w io.Writer, rs []legs.Status) {
	for _, r := range rs {
		if r.Up {
			fmt.Fprintf(w, "relay      %s (%s) up over %s since %s, seen as %v\n", r.Name, r.Host, r.Transport, r.Since.Local().Format(time.DateTime), r.Reflexive)
			if r.Doubtful {
				fmt.Fprintf(w, "           %s is asked for a sign of life\n", r.Name)
			}
			if r.Moves > 0 {
				fmt.Fprintf(w, "           %s moved %d times between udp and tls, the last time because %s\n", r.Name, r.Moves, r.LastMove)
			}
		} else {
			fmt.Fprintf(w, "relay      %s (%s) down, try %d: %s\n", r.Name, r.Host, r.Tries, strings.ReplaceAll(r.Error, "\n", "; "))
		}
	}
}

// RenderGateways writes the status lines about sessions.
func RenderGateways(w io.Writer, gs []GatewayStatus) {
	for _, g := range gs {
		switch {
		case g.Up && g.State == tunnel.Dead:
			fmt.Fprintf(w, "gateway    %s: the path over %s is dead, the session waits for another\n", g.Name, g.Path)
		case g.Up:
			fmt.Fprintf(w, "gateway    %s over %s (standby %s), RTT %v, %d moves, %d bytes sent, %d received\n", g.Name, g.Path, orNone(g.Standby), g.RTT.Round(10*time.Microsecond), g.Moves, g.Sent, g.Received)
		case g.Error != "":
			fmt.Fprintf(w, "gateway    %s not reached: %s\n", g.Name, g.Error)
		default:
			fmt.Fprintf(w, "gateway    %s no session yet\n", g.Name)
		}
		renderPaths(w, g)
		renderDirect(w, g.Name, g.Direct)
		if g.Draining {
			fmt.Fprintf(w, "           %s is draining: new connections go by way of others\n", g.Name)
		}
		for _, id := range slices.Sorted(maps.Keys(g.Unreached)) {
			fmt.Fprintf(w, "           %s does not reach %s\n", g.Name, g.Unreached[id])
		}
	}
}

// RenderHost writes the status lines about the host.
func RenderHost(w io.Writer, st HostStatus) {
	if st.TUN == "" {
		fmt.Fprintf(w, "tun        none: %s\n", st.Why)
		return
	}
	fmt.Fprintf(w, "tun        %s %v, routes %v, DNS by %s for %v\n", st.TUN, st.Addresses, st.Routes, st.DNS, st.Domains)
	for _, s := range st.Skipped {
		fmt.Fprintf(w, "skipped    %s\n", s)
	}
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}
