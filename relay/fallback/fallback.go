// Package fallback is a relay's side of the last rung: SSH for gateways, TLS for clients, and the table that joins the two. Package reverse
// is the nodes' side and says what flows.
//
//	s, err := fallback.New(fallback.Config{Relay: node, SSH: addr, TLS: addr, Certificate: cert, HostIdentity: host})
//	s.SetOrganizations(orgs, denied)
//	err = s.Listen(ctx)
//	err = s.Run(ctx)
//
// Who may do what is decided by certificates alone, held against the CA keys of exactly the organizations that the relay serves: a gateway's
// SSH certificate by its organization's SSH CA, a client's X.509 chain by its organization's root and pins. Both are held against the
// deny lists again whenever these change, so that a revocation ends what is open. The relay sees QUIC ciphertext only.
package fallback

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/crypto/ssh"

	"sallyway/internal/identity"
	"sallyway/relay/budget"
	"sallyway/relay/reverse"
)

// Limits bound what peers may use; zero fields are the defaults below.
type Limits struct {
	// HalfOpen is how many connections may be in their handshake, HalfOpenSource how many of them from one source (an IPv4 address, an IPv6
	// /64). Where all places are taken, the oldest makes room.
	HalfOpen, HalfOpenSource int
	// Rate is how many connections a second one source may open, after a burst of twice as many.
	Rate float64
	// Connections is how many TLS connections there may be in all, NodeConnections how many of one node, Gateways how many gateways.
	Connections, NodeConnections, Gateways int
}

// Defaults of Limits.
const (
	DefaultHalfOpen        = 512
	DefaultHalfOpenSource  = 16
	DefaultRate            = 20
	DefaultConnections     = 8192
	DefaultNodeConnections = 64
	DefaultGateways        = 4096
)

func (l *Limits) fill() {
	set := func(v *int, def int) {
		if *v == 0 {
			*v = def
		}
	}
	set(&l.HalfOpen, DefaultHalfOpen)
	set(&l.HalfOpenSource, DefaultHalfOpenSource)
	set(&l.Connections, DefaultConnections)
	set(&l.NodeConnections, DefaultNodeConnections)
	set(&l.Gateways, DefaultGateways)
	if l.Rate == 0 {
		l.Rate = DefaultRate
	}
}

// Organization is what a relay knows of an organization that it serves.
type Organization struct {
	// Roots and Pins are of its X.509 certificates, the pins per kind of leaf.
	Roots string // PEM
	Pins  map[identity.Kind][]identity.KeyHash
	// SSHCAs are the keys that sign gateways' SSH certificates, lines of an authorized_keys file. None is no gateway by SSH.
	SSHCAs []string
	// Denied are hashes of revoked keys of nodes.
	Denied []identity.KeyHash
	// Rates bound what its nodes send. What is beyond them is dropped, as on every other rung.
	Rates budget.Rates
}

// Config of a Server.
type Config struct {
	// Relay is this relay.
	Relay identity.Node
	// SSH and TLS are the addresses to listen on; the zero one is off, port 0 is a free one.
	SSH, TLS netip.AddrPort
	// Certificate is the relay's own, HostIdentity its SSH key with host certificate. Both are asked at every handshake.
	Certificate  func() (*tls.Certificate, error)
	HostIdentity func() reverse.Identity
	Limits       Limits
	// Budgets count the bandwidth, and are shared with the relay's other rungs; nil is a set of its own.
	Budgets *budget.Budgets
	Logger  *slog.Logger
	// Metrics takes the counters; nil is none.
	Metrics prometheus.Registerer
	// Now tells the time; nil is time.Now.
	Now func() time.Time
	// SSHGrace and TLSGrace bound handshakes; 0 is reverse.SSHGrace and reverse.TLSGrace.
	SSHGrace, TLSGrace time.Duration
}

// rules are what decides. They are replaced as a whole and never change.
type rules struct {
	orgs   map[string]*organization
	denied map[identity.Node]bool
}

// organization is an Organization made ready.
type organization struct {
	of     Organization
	trust  *identity.Trust // in those that dial gateways
	isCA   func(ssh.PublicKey) bool
	denied map[identity.KeyHash]bool
}

// Server is the last rung of one relay. Its methods may be called concurrently.
type Server struct {
	cfg  Config
	log  *slog.Logger
	now  func() time.Time
	gate *gate

	count counters
	rules atomic.Pointer[rules]

	following sync.Mutex // one SetOrganizations after the other

	mu       sync.Mutex // guards what follows
	gateways map[identity.Node]*gateway
	joins    map[*join]struct{}
	nodes    map[identity.Node]int // joins by client
	draining bool
	closed   bool
	ssh, tls net.Listener
	open     map[net.Conn]struct{} // every connection, to be closed at the end
	tasks    sync.WaitGroup
}

// gateway is a gateway's connections, by slot.
type gateway struct {
	slots [reverse.Slots]*sshConn
}

// New checks the configuration. It starts nothing.
func New(cfg Config) (*Server, error) {
	if err := cfg.Relay.Validate(); err != nil {
		return nil, err
	}
	if cfg.Certificate == nil || cfg.HostIdentity == nil {
		return nil, errors.New("no certificates for the last rung")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.SSHGrace == 0 {
		cfg.SSHGrace = reverse.SSHGrace
	}
	if cfg.TLSGrace == 0 {
		cfg.TLSGrace = reverse.TLSGrace
	}
	if cfg.Budgets == nil {
		cfg.Budgets = budget.New()
	}
	cfg.Limits.fill()
	s := &Server{
		cfg: cfg, log: cfg.Logger, now: cfg.Now, gate: newGate(cfg.Limits, cfg.Now),
		gateways: map[identity.Node]*gateway{},
		joins:    map[*join]struct{}{}, nodes: map[identity.Node]int{}, open: map[net.Conn]struct{}{},
	}
	s.rules.Store(&rules{})
	if cfg.Metrics != nil {
		if err := s.register(cfg.Metrics); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Listen opens the ports.
func (s *Server) Listen(ctx context.Context) error {
	var lc net.ListenConfig
	listen := func(a netip.AddrPort) (net.Listener, error) {
		if !a.IsValid() {
			return nil, nil
		}
		return lc.Listen(ctx, "tcp", a.String())
	}
	sl, err := listen(s.cfg.SSH)
	if err != nil {
		return fmt.Errorf("SSH port of the last rung: %w", err)
	}
	tl, err := listen(s.cfg.TLS)
	if err != nil {
		if sl != nil {
			sl.Close()
		}
		return fmt.Errorf("TLS port of the last rung: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ssh, s.tls = sl, tl
	return nil
}

// Addrs are the addresses that are listened on; zero where a port is off.
func (s *Server) Addrs() (sshPort, tlsPort netip.AddrPort) {
	s.mu.Lock()
	defer s.mu.Unlock()
	addr := func(l net.Listener) netip.AddrPort {
		if l == nil {
			return netip.AddrPort{}
		}
		return l.Addr().(*net.TCPAddr).AddrPort()
	}
	return addr(s.ssh), addr(s.tls)
}

// Run serves until ctx ends, then closes everything and returns when nothing runs any more.
func (s *Server) Run(ctx context.Context) error {
	s.mu.Lock()
	sl, tl := s.ssh, s.tls
	s.mu.Unlock()
	var accept sync.WaitGroup
	for _, port := range []struct {
		l     net.Listener
		serve func(net.Conn, *place)
	}{{sl, s.serveSSH}, {tl, s.serveTLS}} {
		if port.l != nil {
			accept.Go(func() { s.accept(ctx, port.l, port.serve) })
		}
	}
	<-ctx.Done()
	for _, l := range []net.Listener{sl, tl} {
		if l != nil {
			l.Close()
		}
	}
	accept.Wait()
	s.mu.Lock()
	s.closed = true
	for c := range s.open {
		c.Close()
	}
	s.mu.Unlock()
	s.tasks.Wait()
	return ctx.Err()
}

// accept takes connections until the listener is closed.
func (s *Server) accept(ctx context.Context, l net.Listener, serve func(net.Conn, *place)) {
	for {
		nc, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of descriptors, most likely: others will be closed
			s.count.acceptErrors.Add(1)
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		from := nc.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()
		p := s.gate.enter(from, func() { nc.Close() })
		if p == nil {
			s.count.limited.Add(1)
			nc.Close()
			continue
		}
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			p.leave()
			nc.Close()
			return
		}
		s.open[nc] = struct{}{}
		s.mu.Unlock()
		reverse.LimitUnsent(nc)
		s.tasks.Go(func() {
			defer func() {
				p.leave()
				nc.Close()
				s.mu.Lock()
				defer s.mu.Unlock()
				delete(s.open, nc)
			}()
			serve(nc, p)
		})
	}
}

// SetOrganizations says which organizations there are and which nodes of them are denied, in place of what was said before. What is open
// and not allowed any more is closed. An organization whose keys can not be read is left out, and the error names it; the others are in force.
func (s *Server) SetOrganizations(orgs map[string]Organization, denied []identity.Node) error {
	s.following.Lock()
	defer s.following.Unlock()
	before := s.rules.Load()
	next := &rules{orgs: make(map[string]*organization, len(orgs)), denied: make(map[identity.Node]bool, len(denied))}
	for _, n := range denied {
		next.denied[n] = true
	}
	var errs []error
	for name, o := range orgs {
		ready, err := o.ready(s.now)
		if err != nil {
			errs = append(errs, fmt.Errorf("organization %s: %w", name, err))
			continue
		}
		s.cfg.Budgets.Set(name, o.Rates)
		next.orgs[name] = ready
	}
	s.rules.Store(next)
	// Whoever gets onto a list from now on looks at the new rules.
	conns, joins := s.everything()
	for _, c := range conns {
		if err := next.recheck(before, c.node, c.hash, func() error { return next.allowsGateway(c.node, c.cert, s.now) }); err != nil {
			s.log.Info("gateway's SSH connection closed", "node", c.node, "reason", err)
			c.close()
		}
	}
	for _, j := range joins {
		err := next.recheck(before, j.client, identity.CertificateKeyHash(j.chain[0]), func() error {
			_, err := next.allowsClient(j.gateway, j.chain)
			return err
		})
		if err != nil {
			s.log.Info("client's TLS connection closed", "node", j.client, "gateway", j.gateway, "reason", err)
			j.close()
		}
	}
	return errors.Join(errs...)
}

// recheck holds what was allowed before against r: only the deny lists where nothing else changed, by full where it did.
func (r *rules) recheck(before *rules, n identity.Node, key identity.KeyHash, full func() error) error {
	org, old := r.orgs[n.Org], before.orgs[n.Org]
	switch {
	case org == nil:
		return errors.New("the organization is not served here any more")
	case r.denied[n] || org.denied[key]:
		return errRevoked
	case old != nil && org.widens(old):
		return nil
	}
	return full()
}

// widens reports whether o trusts every key that was trusted before, as in the first part of a rotation: then whoever was let in stays, even if
// its certificate has ended since.
func (o *organization) widens(old *organization) bool {
	for _, c := range old.trust.Roots {
		if !slices.ContainsFunc(o.trust.Roots, c.Equal) {
			return false
		}
	}
	for k, pins := range old.of.Pins {
		for _, p := range pins {
			if !slices.Contains(o.of.Pins[k], p) {
				return false
			}
		}
	}
	return !slices.ContainsFunc(old.of.SSHCAs, func(ca string) bool { return !slices.Contains(o.of.SSHCAs, ca) })
}

var errRevoked = errors.New("revoked")

// everything is what is open.
func (s *Server) everything() (conns []*sshConn, joins []*join) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range s.gateways {
		for _, c := range g.slots {
			if c != nil {
				conns = append(conns, c)
			}
		}
	}
	return conns, slices.Collect(maps.Keys(s.joins))
}

func (o *Organization) ready(now func() time.Time) (*organization, error) {
	roots, err := identity.DecodeCertificates([]byte(o.Roots))
	if err != nil {
		return nil, fmt.Errorf("roots: %w", err)
	}
	cas, err := reverse.ParseCAs(o.SSHCAs)
	if err != nil {
		return nil, err
	}
	r := &organization{
		of: *o, trust: &identity.Trust{Roots: roots, Denied: slices.Clone(o.Denied), Now: now}, isCA: reverse.AnyCA(cas),
		denied: make(map[identity.KeyHash]bool, len(o.Denied)),
	}
	for _, k := range []identity.Kind{identity.Client, identity.Site, identity.Platform} {
		r.trust.Pins = append(r.trust.Pins, o.Pins[k]...)
	}
	for _, h := range o.Denied {
		r.denied[h] = true
	}
	return r, nil
}

// Drain refuses new links from now on and tells everybody who has one to move.
func (s *Server) Drain() {
	s.mu.Lock()
	s.draining = true
	s.mu.Unlock()
	conns, joins := s.everything()
	for _, j := range joins {
		j.toClient.PutControl(reverse.ControlDraining)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range conns {
		if !s.closed {
			s.tasks.Go(c.tellDraining)
		}
	}
}

// Links is how many links there are.
func (s *Server) Links() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.joins)
}

// Snapshot is the state at a moment, for status. It has no addresses of nodes.
type Snapshot struct {
	SSH      netip.AddrPort `json:"ssh,omitzero"`
	TLS      netip.AddrPort `json:"tls,omitzero"`
	Gateways int            `json:"gateways"`
	// Connections are gateways' SSH connections, Links what clients have joined to them.
	Connections int            `json:"ssh_connections"`
	Links       int            `json:"links"`
	ByNode      map[string]int `json:"by_gateway"` // SSH connections
	Bytes       uint64         `json:"bytes"`
	Refused     uint64         `json:"refused"`
	Limited     uint64         `json:"limited"`
}

// Snapshot returns the state.
func (s *Server) Snapshot() Snapshot {
	v := Snapshot{
		ByNode: map[string]int{}, Bytes: s.count.up.Load() + s.count.down.Load(),
		Refused: s.count.sshRefused.Load() + s.count.tlsRefused.Load(), Limited: s.count.limited.Load(),
	}
	v.SSH, v.TLS = s.Addrs()
	s.mu.Lock()
	defer s.mu.Unlock()
	v.Gateways, v.Links = len(s.gateways), len(s.joins)
	for n, g := range s.gateways {
		for _, c := range g.slots {
			if c != nil {
				v.Connections++
				v.ByNode[n.String()]++
			}
		}
	}
	return v
}

// linkID is a number that no other link has, of this process or one before it.
func linkID() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return binary.BigEndian.Uint64(b[:])
}
