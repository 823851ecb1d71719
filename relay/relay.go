// Package relay is the relay's server: STUN and TURN (RFC 8489, RFC 8656) over UDP, DTLS, TCP and TLS on one port, with a data path
// of its own that moves ChannelData between two allocations in runs of up to 64 KiB.
//
//	datagram's first byte   0–3 STUN     20–63 DTLS     64–79 ChannelData      (RFC 7983 §7)
//	stream's first byte     0–3 STUN     22 TLS         64–79 ChannelData
//
// Two rules shape it. A relay sends only to nodes of the sender's own organization: a peer address is a key into the table of live
// allocations, never a place to send to, except for the configured peers of an organization. And nothing is remembered of anybody
// whose source address is not proven: requests over plain UDP are answered from the nonce alone, which is bound to the address.
//
//	s, err := relay.New(relay.Config{Advertise: ip, Keys: keys, Organizations: orgs, Certificate: cert, Logger: log})
//	err = s.Run(ctx)
//
// Lock order: table.mu, then allocation.mu, then a connection's queue. The data path takes none of them.
package relay

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/identity"
	"sallyway/relay/budget"
	"sallyway/relay/udpio"
	"sallyway/relay/wire"
)

// The range of relayed ports (RFC 8656 §7.2).
const (
	DefaultMinPort = 49152
	DefaultMaxPort = 65535
)

// Config is what a relay needs to know. Keys, organizations and denied nodes can be replaced while it runs.
type Config struct {
	// Listen is the address of the one port, UDP and TCP. The zero value is every address, wire.Port. Port 0 picks a free one.
	Listen netip.AddrPort
	// Advertise is the IP address in the relayed addresses that clients are told: the relay's address as the world sees it. The zero
	// value is Listen's, which must then be a specific one.
	Advertise netip.Addr
	// RelayIP is the address that relayed sockets bind to; zero is Listen's, or every address.
	RelayIP netip.Addr
	// MinPort and MaxPort bound the relayed ports, inclusive; zero means the default range.
	MinPort, MaxPort uint16
	// ServicePorts are ports of this host that are never a peer, besides the listening one: SSH and TLS fallback, metrics.
	ServicePorts []uint16
	// Keys are the live keys that TURN passwords are derived from (wire.Password): the current one and, during a rotation, another.
	Keys [][]byte
	// Organizations are those that this relay serves, by name.
	Organizations map[string]Organization
	// Denied are revoked nodes.
	Denied []identity.Node
	// Limits bound what the relay spends on all and on each; zero fields mean the default.
	Limits Limits
	// Certificate returns the relay's current certificate for TLS and DTLS. It is asked in every handshake, so a renewal needs no
	// restart. Nil serves neither.
	Certificate func() (*tls.Certificate, error)
	// Outage reports whether nodes may be without the chance to renew their credentials, because the relay does not reach the platform that
	// issues them or has only just reached it again: then a credential counts until its time for outages. Nil is never. It is asked when a
	// credential is past its expiry.
	Outage func() bool
	// AllocationLifetime is the longest that an allocation is granted without a refresh, from 10 s to an hour; 0 is an hour.
	AllocationLifetime time.Duration
	// Budgets count the bandwidth, and are shared with whatever else of this relay carries nodes' data; nil is a set of its own.
	Budgets *budget.Budgets
	// Shards is how many UDP sockets for data share the port, each with a goroutine of its own; 0 is GOMAXPROCS. There is one more for
	// control.
	Shards int
	// Logger takes changes of state. It is never told an address of a client or peer. Nil discards.
	Logger *slog.Logger
	// Metrics registers the counters; nil does without.
	Metrics prometheus.Registerer
	// Now tells the time; nil is time.Now.
	Now func() time.Time

	unfair           bool          // for comparison: the kernel drops what comes last
	linger           time.Duration // 0 is readerLinger
	handshakeTimeout time.Duration // 0 is handshakeTimeout; tests have less patience
}

// Organization is what a relay knows about a tenant.
type Organization struct {
	// Peers are addresses outside the relay that the organization's allocations may exchange data with.
	Peers []Peer
	// Quota bounds the organization; zero fields mean no bound of its own.
	Quota Quota
}

// Quota bounds an organization and each of its nodes.
type Quota struct {
	// Allocations is how many may live at once.
	Allocations int
	// NodeAllocations is how many one node may have.
	NodeAllocations int
	// Bandwidth and NodeBandwidth are in bytes per second of what nodes send through the relay.
	Bandwidth, NodeBandwidth int64
}

// Limits bound the relay as a whole.
type Limits struct {
	// Allocations in all; 16 000.
	Allocations int
	// SourceAllocations from one IPv4 address or IPv6 /64; 1024, since an office behind a NAT is one source.
	SourceAllocations int
	// NodeAllocations of one node where its organization sets no other; 16.
	NodeAllocations int
	// Permissions and Channels of one allocation; 64 (they are by IP address, and the relay's own counts once) and 2048.
	Permissions, Channels int
	// HalfOpen handshakes (DTLS, and TCP connections not authenticated yet) in all and from one source; 1024 and 64.
	HalfOpen, SourceHalfOpen int
	// SourceHandshakes is how many TCP connections and DTLS handshakes one source may begin per second; 50, and twice as many at once.
	SourceHandshakes int
	// Connections (DTLS, TCP, TLS) in all; 16 000.
	Connections int
}

// Limits that are not worth an option.
const (
	// handshakeTimeout is how long a DTLS or TLS handshake may take.
	handshakeTimeout = 5 * time.Second
	// authTimeout is how long a connection may live without an allocation.
	authTimeout = 30 * time.Second
	// maxPreAuth is how many bytes a connection may send before it has an allocation.
	maxPreAuth = 32 << 10
	// maxLifetime and defaultLifetime bound what an allocation is granted (RFC 8656 §7.2). A shorter one than minLifetime would have nodes
	// do little else than refresh.
	minLifetime     = 10 * time.Second
	maxLifetime     = time.Hour
	defaultLifetime = 10 * time.Minute
	// permissionLifetime and channelLifetime are RFC 8656 §9 and §12.
	permissionLifetime = 5 * time.Minute
	channelLifetime    = 10 * time.Minute
	// portQuarantine keeps a relayed port from being used again while late packets for its last owner may be under way.
	portQuarantine = 60 * time.Second
	// sweepInterval is how often what has expired is removed. The data path itself looks at the times.
	sweepInterval = time.Second
)

// organization is the live form of an Organization. Its address is stable while the organization is served.
type organization struct {
	name  string
	peers atomic.Pointer[map[netip.AddrPort]struct{}]
	quota atomic.Pointer[Quota]
}

func (o *organization) hasPeer(a netip.AddrPort) bool {
	_, ok := (*o.peers.Load())[a]
	return ok
}

// Server is a relay. Its exported methods may be called concurrently.
type Server struct {
	cfg   Config
	log   *slog.Logger
	now   func() time.Time
	start time.Time

	nonces  nonces
	keys    atomic.Pointer[[][]byte]
	orgs    atomic.Pointer[map[string]*organization]
	denied  atomic.Pointer[map[identity.Node]struct{}]
	setting sync.Mutex // serializes the setters

	table table
	dtls  dtlsTable
	conns connections

	replies   limiter   // unauthenticated replies by source, counted
	excess    limiter   // unauthenticated replies by source, in bytes beyond what came in
	handshake limiter   // new handshakes by source
	suspects  limiter   // authentication attempts of sources that failed before
	failures  penalties // failed authentications by source and identity

	repeats  chan repeat
	draining atomic.Bool
	drainBy  atomic.Int64 // Unix nanoseconds
	ready    atomic.Bool
	count    counters

	listening sync.Mutex
	sockets   []*shard // of the port
	shards    []*shard // those for data
	aside     *aside
	warnings  []string // of opening the sockets, with what to do
	tcp       net.Listener
	local     netip.AddrPort
	advertise netip.Addr
	tlsConfig *tls.Config
	wg        sync.WaitGroup
	closed    chan struct{}
}

// New checks cfg. It opens and starts nothing.
func New(cfg Config) (*Server, error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	s := &Server{
		cfg: cfg, log: cfg.Logger, now: cfg.Now, start: cfg.Now(), advertise: cfg.Advertise,
		repeats: make(chan repeat, 4096), closed: make(chan struct{}),
	}
	_, _ = rand.Read(s.nonces.secret[:])
	s.table.init(cfg.MinPort, cfg.MaxPort, cfg.Budgets)
	s.aside = newAside(1+cfg.Shards, cfg.Shards, nil)
	s.dtls.init(cfg.Limits)
	s.conns.init(cfg.Limits)
	s.replies.init(50*time.Millisecond, 100)
	s.excess.init(time.Second/256, 8<<10)
	s.handshake.init(time.Second/time.Duration(cfg.Limits.SourceHandshakes), 2*int64(cfg.Limits.SourceHandshakes))
	s.suspects.init(20*time.Millisecond, 20)
	if cfg.Certificate != nil {
		s.tlsConfig = &tls.Config{
			MinVersion:             tls.VersionTLS12,
			SessionTicketsDisabled: true,
			NextProtos:             []string{"stun.turn", "stun.nat-discovery"}, // RFC 7443
			GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cfg.Certificate() },
		}
	}
	empty := map[string]*organization{}
	s.orgs.Store(&empty)
	s.SetKeys(cfg.Keys)
	s.SetDenied(cfg.Denied)
	if err := s.SetOrganizations(cfg.Organizations); err != nil {
		return nil, err
	}
	if cfg.Metrics != nil {
		if err := s.register(cfg.Metrics); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return s, nil
}

// fill validates c and puts defaults in place.
func (c *Config) fill() error {
	if !c.Listen.IsValid() {
		c.Listen = netip.AddrPortFrom(netip.IPv6Unspecified(), wire.Port)
	}
	if !c.Advertise.IsValid() {
		c.Advertise = c.Listen.Addr()
	}
	c.Advertise = c.Advertise.Unmap()
	if c.Advertise.IsUnspecified() {
		return errors.New("the relay listens on every address: say which one clients are told (advertise)")
	}
	if c.MinPort == 0 {
		c.MinPort = DefaultMinPort
	}
	if c.MaxPort == 0 {
		c.MaxPort = DefaultMaxPort
	}
	if c.MinPort > c.MaxPort || c.MinPort < 1024 {
		return fmt.Errorf("relayed ports %d–%d are not a range above 1023", c.MinPort, c.MaxPort)
	}
	if c.Shards <= 0 {
		c.Shards = runtime.GOMAXPROCS(0)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Budgets == nil {
		c.Budgets = budget.New()
	}
	if c.AllocationLifetime == 0 {
		c.AllocationLifetime = maxLifetime
	}
	if c.AllocationLifetime < minLifetime || c.AllocationLifetime > maxLifetime {
		return fmt.Errorf("an allocation lifetime of %v is not between %v and %v", c.AllocationLifetime, minLifetime, maxLifetime)
	}
	if c.linger == 0 {
		c.linger = readerLinger
	}
	if c.handshakeTimeout == 0 {
		c.handshakeTimeout = handshakeTimeout
	}
	l := &c.Limits
	for _, f := range []struct {
		field *int
		value int
	}{
		{&l.Allocations, 16000},
		{&l.SourceAllocations, 1024},
		{&l.NodeAllocations, 16},
		{&l.Permissions, 64},
		{&l.Channels, 2048},
		{&l.HalfOpen, 1024},
		{&l.SourceHalfOpen, 64},
		{&l.Connections, 16000},
		{&l.SourceHandshakes, 50},
	} {
		if *f.field < 0 {
			return errors.New("a limit of the relay is negative")
		}
		if *f.field == 0 {
			*f.field = f.value
		}
	}
	return nil
}

// SetKeys replaces the live keys. Allocations stay; their next request needs a password under one of the new keys.
func (s *Server) SetKeys(keys [][]byte) {
	c := make([][]byte, 0, len(keys))
	for _, k := range keys {
		if len(k) > 0 {
			c = append(c, slices.Clone(k))
		}
	}
	s.keys.Store(&c)
}

// SetDenied replaces the set of revoked nodes and ends their allocations.
func (s *Server) SetDenied(nodes []identity.Node) {
	m := make(map[identity.Node]struct{}, len(nodes))
	for _, n := range nodes {
		m[n] = struct{}{}
	}
	s.denied.Store(&m)
	for _, a := range s.table.snapshot() {
		if _, gone := m[a.owner]; gone {
			s.refuse(a, codeForbidden, "revoked")
		}
	}
}

// SetOrganizations replaces the set of served organizations, their peers and quotas. Allocations of organizations that are gone end, and
// so do bindings to peers that are gone. An organization with a malformed peer keeps the peers it had (none, if it is new) and is named in
// the error; the mistake of one tenant holds up no other.
func (s *Server) SetOrganizations(orgs map[string]Organization) error {
	s.setting.Lock()
	defer s.setting.Unlock()
	old := *s.orgs.Load()
	var errs []error
	peers := make(map[string]*map[netip.AddrPort]struct{}, len(orgs))
	for name, o := range orgs {
		if !identity.ValidLabel(name) {
			errs = append(errs, fmt.Errorf("organization %q is not a DNS label in lower case", name))
			continue
		}
		set, err := s.cfg.checkPeers(o.Peers)
		peers[name] = &set
		if err != nil {
			errs = append(errs, fmt.Errorf("organization %s: %w", name, err))
			peers[name] = &map[netip.AddrPort]struct{}{}
			if former := old[name]; former != nil {
				peers[name] = former.peers.Load()
			}
		}
	}
	live := make(map[string]*organization, len(orgs))
	for name, set := range peers {
		o, org := orgs[name], old[name]
		if org == nil {
			org = &organization{name: name}
		}
		q := o.Quota
		org.quota.Store(&q)
		org.peers.Store(set)
		s.cfg.Budgets.Set(name, budget.Rates{Organization: q.Bandwidth, Node: q.NodeBandwidth})
		live[name] = org
	}
	s.orgs.Store(&live)
	for _, a := range s.table.snapshot() {
		if live[a.owner.Org] == nil {
			s.refuse(a, codeForbidden, "organization not served here any more")
			continue
		}
		s.dropLostPeers(a)
	}
	return errors.Join(errs...)
}

// Addr is where the relay listens, after Listen.
func (s *Server) Addr() netip.AddrPort { return s.local }

// Ready reports whether the relay takes new allocations: it is serving and not draining.
func (s *Server) Ready() bool { return s.ready.Load() && !s.draining.Load() }

// Listen opens the port. Run does it where it has not been done; doing it before tells the address and finds a taken port early.
func (s *Server) Listen(ctx context.Context) error {
	s.listening.Lock()
	defer s.listening.Unlock()
	if s.tcp != nil {
		return nil
	}
	// With port 0 the system picks for UDP, and TCP may find the same number taken.
	const tries = 16
	for try := 0; ; try++ {
		err := s.listen(ctx)
		if err == nil {
			return nil
		}
		s.closeSockets()
		if s.cfg.Listen.Port() != 0 || try == tries {
			return err
		}
	}
}

// listen opens TCP first: UDP sockets that share a port would join those of another relay of the same user.
func (s *Server) listen(ctx context.Context) error {
	addr := s.cfg.Listen
	network, host := "tcp4", addr.String()
	if addr.Addr().Is6() {
		network = "tcp6"
		if addr.Addr().IsUnspecified() { // as for UDP: the families that the system has
			network, host = "tcp", fmt.Sprintf(":%d", addr.Port())
		}
	}
	l, err := (&net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 3}}).
		Listen(ctx, network, host)
	if err != nil {
		return fmt.Errorf("listen on tcp %v: %w", addr, err)
	}
	s.tcp = l
	addr = netip.AddrPortFrom(addr.Addr(), uint16(l.Addr().(*net.TCPAddr).Port))
	// The sockets in the order by which the kernel is told of them: control, data, those set aside.
	// More busy shards than threads would keep control waiting for one of them, so there are not more of the last.
	for i := range 1 + s.cfg.Shards + s.cfg.Shards {
		uc, warnings, err := udpio.Listen(ctx, addr, udpio.Config{PacketInfo: addr.Addr().IsUnspecified(), ReusePort: true})
		if err != nil {
			return fmt.Errorf("listen on udp %v: %w", addr, err)
		}
		sh := &shard{s: s, sock: uc, out: uc, buf: make([]byte, udpio.MaxRead)}
		s.sockets = append(s.sockets, sh)
		switch data := i - 1; {
		case i == 0:
			sh.name, sh.out = "control", nil
			s.warnings = warnings
			for _, w := range warnings {
				s.log.Warn("udp socket", "warning", w)
			}
		case data < s.cfg.Shards:
			sh.name = fmt.Sprintf("data%d", data)
			s.shards = append(s.shards, sh)
		default:
			sh.name, sh.outcasts = fmt.Sprintf("aside%d", data-s.cfg.Shards), true
		}
	}
	steering := udpio.NewSteering(controlBytes, s.cfg.Shards)
	s.aside.steer = func(pins []udpio.Pin) error { return s.sockets[0].sock.Steer(steering, pins) }
	if err := s.aside.steer(nil); err != nil {
		// The kernel goes on to choose by a hash, among all of them, and each handles everything.
		s.log.Warn("control and data share queues, so control may wait while much data comes in", "err", err)
	} else if !s.cfg.unfair {
		for _, sh := range s.shards {
			sh.fair = newFairness(s.aside, sh.sock)
		}
	}
	s.local = addr
	s.cfg.Listen = addr
	return nil
}

// closeSockets undoes a listen that failed.
func (s *Server) closeSockets() {
	for _, sh := range s.sockets {
		sh.sock.Close()
	}
	s.sockets, s.shards = nil, nil
	if s.tcp != nil {
		s.tcp.Close()
		s.tcp = nil
	}
}

// Run serves until ctx ends, and returns when everything has stopped. It ends with nil when ctx ended it. A Server runs once.
func (s *Server) Run(ctx context.Context) error {
	if err := s.Listen(ctx); err != nil {
		return err
	}
	errs := make(chan error, len(s.sockets)+1)
	for _, sh := range s.sockets {
		s.wg.Go(func() { errs <- sh.serve() })
	}
	s.wg.Go(func() { errs <- s.accept() })
	s.wg.Go(s.repeatLoop)
	s.ready.Store(true)
	read, write := s.sockets[0].sock.Buffers()
	s.log.Info("relay is serving", "port", s.local.Port(), "shards", len(s.shards), "gso", s.sockets[0].sock.GSO(), "gro", s.sockets[0].sock.GRO(), "receive_buffer", read, "send_buffer", write)
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	var err error
	for running := true; running; {
		select {
		case <-ctx.Done():
			running = false
		case err = <-errs:
			running = false
		case <-tick.C:
			s.sweep()
		}
	}
	s.ready.Store(false)
	close(s.closed)
	for _, a := range s.table.snapshot() {
		s.end(a, "relay stops")
	}
	s.conns.closeAll()
	for _, sh := range s.sockets {
		sh.sock.Close()
	}
	s.tcp.Close()
	s.wg.Wait()
	if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// sweep removes what has expired.
func (s *Server) sweep() {
	now := s.now().UnixNano()
	for _, a := range s.table.snapshot() {
		if a.expires.Load() <= now {
			s.end(a, "expired")
			continue
		}
		s.expire(a, now)
	}
	s.conns.closeBare(now)
	s.aside.judge(time.Now(), func(i int) uint64 { return s.sockets[i].sock.Drops() })
	s.table.releasePorts(now)
	s.reportAbuse()
}
