package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/identity"
)

// DefaultOrg is the organization that platformd makes at its first start.
const DefaultOrg = "default"

// readyWait is how long a daemon may take until it works; with two loaded cores it is far less.
const readyWait = 30 * time.Second

// PlatformURL is where nodes reach the platform.
func (l *Lab) PlatformURL() string { return "https://" + l.Addr(l.Platform).String() }

// PlatformData is platformd's data folder.
func (l *Lab) PlatformData() string { return l.Platform.Path("data") }

// StartPlatform starts platformd and waits until it answers. Extra are more arguments.
func (l *Lab) StartPlatform(ctx context.Context, extra ...string) (*Proc, error) {
	bin, err := l.Bin("platformd")
	if err != nil {
		return nil, err
	}
	args := append([]string{bin, "serve", "--data", l.PlatformData(), "--listen", ":443", "--advertise-url", l.PlatformURL()}, extra...)
	p, err := l.Platform.Start(Spec{Name: "platformd", Args: args})
	if err != nil {
		return nil, err
	}
	return p, l.WaitPlatform(ctx, p)
}

// WaitPlatform waits until the platform answers.
func (l *Lab) WaitPlatform(ctx context.Context, p *Proc) error {
	ctx, cancel := context.WithTimeoutCause(ctx, readyWait, errors.New("platformd is not ready"))
	defer cancel()
	return l.settle(ctx, p, func() error {
		if _, err := os.Stat(filepath.Join(l.PlatformData(), "admin.token")); err != nil {
			return err
		}
		c, err := l.Platform.Dial(ctx, "tcp", l.Addr(l.Platform).String()+":443")
		if err != nil {
			return err
		}
		return c.Close()
	})
}

// settle waits until f returns nil, and not longer than the process lives.
func (l *Lab) settle(ctx context.Context, p *Proc, f func() error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := p.Done()
	go func() {
		select {
		case <-done:
			cancel(fmt.Errorf("%s on %s has ended", p.Name, p.Host.Name))
		case <-ctx.Done():
		}
	}()
	if err := Until(ctx, 50*time.Millisecond, f); err != nil {
		return fmt.Errorf("%w\n%s", err, p.Log.Tail(15))
	}
	return nil
}

// Sallyway runs the command sallyway on the platform's host, as its admin after Login.
func (l *Lab) Sallyway(ctx context.Context, args ...string) (Result, error) {
	bin, err := l.Bin("sallyway")
	if err != nil {
		return Result{}, err
	}
	return l.Platform.Run(ctx, append([]string{bin}, args...)...)
}

// SallywayJSON runs the command with --json and decodes what it prints into v.
func (l *Lab) SallywayJSON(ctx context.Context, v any, args ...string) error {
	r, err := l.Sallyway(ctx, append(slices.Clone(args), "--json")...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(r.Stdout), v); err != nil {
		return fmt.Errorf("sallyway %s: %w: %.200s", strings.Join(args, " "), err, r.Stdout)
	}
	return nil
}

// Login makes the platform's host its admin's.
func (l *Lab) Login(ctx context.Context) error {
	_, err := l.Sallyway(ctx, "login", "--url", l.PlatformURL(), "--token-file", filepath.Join(l.PlatformData(), "admin.token"))
	return err
}

// Node is a relay, gateway or client of an organization with its daemon.
type Node struct {
	*Proc
	Record control.CreatedNode
	Org    string
	State  string // state folder
	Token  string // file with the enrolment token
}

// Label is the node's identity as programs write it.
func (n *Node) Label() string {
	return identity.Node{Org: n.Org, Kind: n.Record.Kind, ID: n.Record.ID}.String()
}

// Ready asks the daemon whether it is ready. An error says why not.
func (n *Node) Ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var doc json.RawMessage
	return daemon.Dial(n.State).Get(ctx, "/readyz", &doc)
}

// Status reads the daemon's status document.
func (n *Node) Status(ctx context.Context, v any) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	return daemon.Dial(n.State).Get(ctx, "/status", v)
}

// WaitReady waits until the daemon is ready.
func (n *Node) WaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, readyWait, fmt.Errorf("%s is not ready", n.Name))
	defer cancel()
	return n.Host.lab.settle(ctx, n.Proc, func() error { return n.Ready(ctx) })
}

// NodeSpec describes a node to be created and started.
type NodeSpec struct {
	Org    string // empty is DefaultOrg
	Kind   identity.Kind
	Name   string
	Host   *Host
	Create []string // more arguments of `sallyway KIND create`
	Args   []string // more arguments of the daemon
	Env    []string // more of its environment
	UID    uint32   // the daemon's user; 0 is root
}

// CreateNode makes a node on the platform and puts its token into a file on its host. Nothing is started.
func (l *Lab) CreateNode(ctx context.Context, s NodeSpec) (*Node, error) {
	if s.Org == "" {
		s.Org = DefaultOrg
	}
	args := []string{string(s.Kind), "create", s.Name, "--org", s.Org}
	if s.Kind == identity.Relay && !slices.Contains(s.Create, "--host") {
		args = append(args, "--host", l.Addr(s.Host).String())
	}
	n := &Node{Org: s.Org, State: s.Host.Path("state-" + s.Name), Token: s.Host.Path(s.Name + ".token")}
	if err := l.SallywayJSON(ctx, &n.Record, append(args, s.Create...)...); err != nil {
		return nil, err
	}
	n.Record.Kind = s.Kind
	if n.Record.Token == "" || n.Record.ID == "" {
		return nil, fmt.Errorf("sallyway %s: no token or no id in the answer", strings.Join(args, " "))
	}
	return n, WriteToken(n.Token, n.Record.Token, s.UID)
}

// WriteToken writes a token into a file that its user alone reads.
func WriteToken(path, token string, uid uint32) error {
	if err := os.WriteFile(path, []byte(token+"\n"), 0o600); err != nil {
		return err
	}
	return os.Chown(path, int(uid), int(uid))
}

// starts are the daemons by kind: program and command.
var starts = map[identity.Kind][2]string{
	identity.Relay: {"relayd", "start"}, identity.Gateway: {"gatewayd", "up"}, identity.Client: {"sallyway", "connect"},
}

// StartNode creates a node, starts its daemon and waits until it is ready.
func (l *Lab) StartNode(ctx context.Context, s NodeSpec) (*Node, error) {
	n, err := l.CreateNode(ctx, s)
	if err != nil {
		return nil, err
	}
	if err := l.StartDaemon(n, s); err != nil {
		return n, err
	}
	return n, n.WaitReady(ctx)
}

// StartDaemon starts the daemon of a node that was created. It does not wait.
func (l *Lab) StartDaemon(n *Node, s NodeSpec) error {
	start := starts[s.Kind]
	bin, err := l.Bin(start[0])
	if err != nil {
		return err
	}
	if s.UID != 0 {
		if err := os.MkdirAll(n.State, 0o700); err != nil {
			return err
		}
		if err := os.Chown(n.State, int(s.UID), int(s.UID)); err != nil {
			return err
		}
	}
	args := append([]string{bin, start[1], "--token-file", n.Token, "--state", n.State}, s.Args...)
	n.Proc, err = s.Host.Start(Spec{Name: s.Name, Args: args, Env: s.Env, UID: s.UID})
	return err
}

// Relay starts a relay.
func (l *Lab) Relay(ctx context.Context, h *Host, name string, extra ...string) (*Node, error) {
	n, err := l.StartNode(ctx, NodeSpec{Kind: identity.Relay, Name: name, Host: h, Args: extra})
	if err != nil {
		return n, err
	}
	return n, n.Proc.WaitReady(ctx, 0, "Relay server started successfully")
}

// Resource is a resource to be created.
type Resource struct {
	Org     string // empty is DefaultOrg
	Name    string
	Gateway string // names, comma-separated
	Address string
	TCP     string
	UDP     string
	ICMP    bool
	Domain  string
}

// AddResource creates a resource and allows it to subjects: client:NAME or gateway:NAME.
func (l *Lab) AddResource(ctx context.Context, r Resource, subjects ...string) error {
	if r.Org == "" {
		r.Org = DefaultOrg
	}
	args := []string{"resource", "create", r.Name, "--org", r.Org, "--gateway", r.Gateway, "--address", r.Address}
	for _, f := range [][2]string{{"--tcp", r.TCP}, {"--udp", r.UDP}, {"--domain", r.Domain}} {
		if f[1] != "" {
			args = append(args, f[:]...)
		}
	}
	if r.ICMP {
		args = append(args, "--icmp")
	}
	if _, err := l.Sallyway(ctx, args...); err != nil {
		return err
	}
	for _, s := range subjects {
		if err := l.Allow(ctx, r.Org, s, r.Name); err != nil {
			return err
		}
	}
	return nil
}

// Allow lets a subject, client:NAME or gateway:NAME, reach a resource.
func (l *Lab) Allow(ctx context.Context, org, subject, resource string) error {
	args := []string{"policy", "allow", "--org", org, "--resource", resource}
	if client, ok := strings.CutPrefix(subject, "client:"); ok {
		args = append(args, "--client", client)
	} else {
		args = append(args, "--from", subject)
	}
	_, err := l.Sallyway(ctx, args...)
	return err
}

// FQDN is the name of a resource or gateway for nodes of its organization.
func FQDN(name, org string) string { return name + "." + org + ".sallyway.internal" }

// Site is a lab with everything in place: platform, two relays, a gateway in front of each private network, one client with
// a TUN device, and DNS servers.
type Site struct {
	*Lab
	PlatformD          *Proc
	RelayA, RelayB     *Node // relay-1 and relay-2
	GatewayA, GatewayB *Node // office and branch
	Laptop             *Node // nil when not asked for
	PublicDNS          *Nameserver
	PrivateDNS         *Nameserver
}

// SiteConfig says what Build leaves out or adds.
type SiteConfig struct {
	NoBranch     bool     // no second gateway
	NoClient     bool     // no client
	RelayArgs    []string // of both relays
	GatewayArgs  []string // of both gateways
	GatewayEnv   []string
	ClientArgs   []string
	PlatformArgs []string
	RelayCreate  []string // more arguments of `sallyway relay create`
}

// Names of what Build creates.
const (
	Office = "office" // the gateway of the private network
	Branch = "branch" // the gateway of the second one
	Laptop = "laptop" // the client
)

// Build starts everything. The steps are told to tell, when it is not nil, before they are taken.
func (l *Lab) Build(ctx context.Context, cfg SiteConfig, tell func(step string)) (*Site, error) {
	if tell == nil {
		tell = func(string) {}
	}
	s := &Site{Lab: l}
	return s, s.build(ctx, cfg, tell)
}

func (s *Site) build(ctx context.Context, cfg SiteConfig, tell func(string)) error {
	var err error
	if s.PublicDNS, err = s.Router.DNS(netip.AddrPortFrom(s.ResolverAddr(), 53).String(), "public.example. 60 A 192.0.2.80"); err != nil {
		return err
	}
	s.PrivateDNS, err = s.Private.DNS(netip.AddrPortFrom(DNSAddr, 53).String(),
		"wiki.corp.test. 60 A "+WebAddr.String(), "wiki.corp.test. 60 AAAA "+WebAddr6.String(), "db.corp.test. 60 A "+DBAddr.String())
	if err != nil {
		return err
	}
	if err := errors.Join(s.Client.SetResolvers(s.ResolverAddr().String()), s.Gateway.SetResolvers(DNSAddr.String())); err != nil {
		return err
	}
	tell("platformd serves; sallyway login")
	if s.PlatformD, err = s.StartPlatform(ctx, cfg.PlatformArgs...); err != nil {
		return err
	}
	if err := s.Login(ctx); err != nil {
		return err
	}
	tell("relayd enrols and starts on two hosts")
	for _, r := range []struct {
		node **Node
		h    *Host
		name string
	}{{&s.RelayA, s.Relay1, "relay-1"}, {&s.RelayB, s.Relay2, "relay-2"}} {
		*r.node, err = s.StartNode(ctx, NodeSpec{Kind: identity.Relay, Name: r.name, Host: r.h, Create: cfg.RelayCreate, Args: cfg.RelayArgs})
		if err != nil {
			return err
		}
	}
	tell("gatewayd enrols and dials out from the private network")
	if s.GatewayA, err = s.StartNode(ctx, NodeSpec{Kind: identity.Gateway, Name: Office, Host: s.Gateway, Args: cfg.GatewayArgs, Env: cfg.GatewayEnv}); err != nil {
		return err
	}
	if !cfg.NoBranch {
		if s.GatewayB, err = s.StartNode(ctx, NodeSpec{Kind: identity.Gateway, Name: Branch, Host: s.Gateway2, Args: cfg.GatewayArgs, Env: cfg.GatewayEnv}); err != nil {
			return err
		}
	}
	if cfg.NoClient {
		return nil
	}
	tell("sallyway connect enrols on the laptop")
	s.Laptop, err = s.StartNode(ctx, NodeSpec{Kind: identity.Client, Name: Laptop, Host: s.Client, Args: cfg.ClientArgs})
	return err
}
