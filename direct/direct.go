// Package direct carries datagrams between two nodes without a relay, where the NATs and firewalls between them let it. It knows no role
// and no session: keys and candidates come from above, and what works is handed back as a datagram.Link.
//
// One end asks. Both gather where relays see their socket, tell each other over the session that they already have, and send a few
// authenticated probes to every address of the other's at the same time, which opens the NAT of either:
//
//	e := direct.New(direct.Config{Servers: relays})
//	go e.Run(ctx)
//	p, own, err := e.Open(ctx, direct.PeerConfig{Keys: session.ProbeKeys(), Asking: true, OnLink: use, OnFail: later})
//	tell(direct.Offer{Candidates: own})
//	p.Punch(theirs.Candidates)         // OnLink: the quickest address that answered, or OnFail
//
// On the wire there are probes (package stun) and QUIC, told apart by the first byte. The socket answers nothing but probes with valid
// integrity from a host that the other end named, never with more bytes than it was sent; and it passes QUIC only from an address that
// answered a probe of its own within the last 30 s. All else is counted and dropped. The socket is open only while somebody may use it.
package direct

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sallyway/internal/datagram"
	"sallyway/relay/udpio"
	"sallyway/stun"
)

const (
	// DefaultPeers is how many other ends there are at most: each has up to MaxCandidates addresses in the tables.
	DefaultPeers = 512
	// gatherTimeout bounds the wait for relays' answers; one that is there answers well before.
	gatherTimeout = 2 * time.Second
	// gatherMore is how long further relays are waited for after the first has answered.
	gatherMore = 250 * time.Millisecond
	// maxServers is how many relays are asked.
	maxServers = 4
	// reuse is for how long what relays saw is told to further ends.
	reuse = 15 * time.Second
	// linger is how long the socket stays open without anybody to use it.
	linger = 30 * time.Second
	// hostRate and hostBurst bound the probes from unproved ports of one host that are checked, a second.
	hostRate, hostBurst = 200, 100
	// writeBuffer is the socket's send buffer in bytes, as that of a leg.
	writeBuffer = 2 << 20
	// overhead is the IPv6 and UDP headers, in bytes; mtu Ethernet's.
	overhead, mtu = 40 + 8, 1500
)

// Errors that callers tell apart.
var (
	// ErrNoCandidates says that no relay told where the socket is seen, and there is no other address that may be told.
	ErrNoCandidates = errors.New("no address to be reached at: no relay answers over UDP")
	// ErrLimit says that there are too many peers.
	ErrLimit = errors.New("too many direct peers")
	// ErrUnreachable says that no address of the other end answered.
	ErrUnreachable = errors.New("no probe was answered: a NAT or firewall is in the way")
	// ErrTaken says that the address that answered belongs to another session.
	ErrTaken = errors.New("the address is in use by another session")
)

// Config configures an Endpoint.
type Config struct {
	// Servers names relays, which tell where they see the socket; it is called for every Open.
	Servers func() []netip.AddrPort
	// Private says whether private addresses and those of the host's interfaces may be told and tried. Nil is no.
	Private func() bool
	// Refuse says which addresses are neither told nor tried, such as those that a tunnel of this host leads to. Nil is none.
	Refuse func(netip.Addr) bool
	// MaxPeers is how many other ends there may be; 0 is DefaultPeers.
	MaxPeers int
	// Logger takes changes of state; nil discards them.
	Logger *slog.Logger

	listen   netip.AddrPort // tests: where to listen instead of everywhere
	loopback bool           // tests: loopback addresses are like any other
	linger   time.Duration  // tests: instead of linger
}

// PeerConfig is an other end.
type PeerConfig struct {
	// Keys are this end's for the probes: the session's.
	Keys stun.Keys
	// Asking is true at the end that chooses the address.
	Asking bool
	// OnLink is called with what works: at the asking end once, at the other one for every address that answers. It must not block.
	OnLink func(*Link)
	// OnFail is called when nothing works; at the other end when nothing worked for 30 s, which closes the peer. It must not block. Nil is
	// no call.
	OnFail func(error)
}

// Stats counts what an Endpoint saw.
type Stats struct {
	// Open says whether there is a socket. Peers and Links are how many there are.
	Open         bool
	Peers, Links int
	// Sent and Received are datagrams of QUIC.
	Sent, Received uint64
	// Probed are probes sent, Answered those of others that were answered.
	Probed, Answered uint64
	// Dropped are datagrams that got silence: QUIC from addresses that proved nothing, probes without integrity, anything else.
	Dropped uint64
	// Unsent are datagrams that the socket did not take.
	Unsent uint64
}

// Endpoint is a node's socket for direct paths and what goes on over it. Its methods may be called concurrently.
type Endpoint struct {
	cfg   Config
	wake  chan struct{} // 1 place
	links atomic.Pointer[map[netip.AddrPort]*Link]

	sent, received, probed, answered, dropped, unsent atomic.Uint64

	gathering sync.Mutex // held while relays are asked; taken before mu

	mu      sync.Mutex // guards what follows
	running bool
	ended   bool
	sock    *udpio.Conn
	idle    time.Time // since when nobody uses the socket
	peers   map[*Peer]struct{}
	exact   map[netip.AddrPort]*Peer
	hosts   map[netip.Addr]*host
	asker   *stun.Asker
	asked   chan struct{} // 1 place: the asker got an answer
	seen    []netip.AddrPort
	seenAt  time.Time
	tasks   sync.WaitGroup
}

// host is a host that the other ends named.
type host struct {
	peers  []*Peer
	tokens float64
	filled time.Time
}

// New makes an endpoint without a socket; see Run.
func New(cfg Config) *Endpoint {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxPeers == 0 {
		cfg.MaxPeers = DefaultPeers
	}
	if cfg.linger == 0 {
		cfg.linger = linger
	}
	e := &Endpoint{
		cfg: cfg, wake: make(chan struct{}, 1), asked: make(chan struct{}, 1),
		peers: map[*Peer]struct{}{}, exact: map[netip.AddrPort]*Peer{}, hosts: map[netip.Addr]*host{},
	}
	e.links.Store(&map[netip.AddrPort]*Link{})
	return e
}

// Run serves until ctx ends; then links and socket are closed, and it returns. It is called once.
func (e *Endpoint) Run(ctx context.Context) error {
	e.mu.Lock()
	e.running = true
	e.mu.Unlock()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		timer.Reset(e.step(time.Now()))
		select {
		case <-ctx.Done():
			e.end()
			return ctx.Err()
		case <-e.wake:
		case <-timer.C:
		}
	}
}

func (e *Endpoint) end() {
	e.mu.Lock()
	e.ended = true
	for p := range e.peers {
		e.forgetLocked(p)
	}
	e.closeLocked()
	e.mu.Unlock()
	e.tasks.Wait()
}

// closeLocked closes the socket, if there is one.
func (e *Endpoint) closeLocked() {
	if e.sock != nil {
		_ = e.sock.Close()
		e.sock, e.seen = nil, nil
		e.cfg.Logger.Info("direct socket closed")
	}
}

// step does what is due and returns how long nothing will be.
func (e *Endpoint) step(now time.Time) time.Duration {
	var calls []func()
	defer func() {
		for _, f := range calls {
			f()
		}
	}()
	e.mu.Lock()
	defer e.mu.Unlock()
	wait := time.Hour
	until := func(t time.Time) {
		if !t.IsZero() {
			wait = min(wait, max(t.Sub(now), time.Millisecond))
		}
	}
	if e.asker != nil {
		asks, next := e.asker.Step(now)
		for _, a := range asks {
			e.sendLocked(a.To, a.Request)
		}
		until(next)
	}
	for p := range e.peers {
		out, next := p.checks.step(now)
		for _, x := range out {
			e.sendLocked(x.to, x.b)
			e.probed.Add(1)
		}
		until(next)
		if p.checks.chosen != nil && p.link == nil && !p.failed {
			if l, err := e.linkLocked(p, p.checks.chosen); err == nil {
				p.link = l
				calls = append(calls, func() { p.cfg.OnLink(l) })
			} else {
				calls = append(calls, p.failLocked(err))
			}
		}
		if p.checks.over && !p.failed {
			calls = append(calls, p.failLocked(ErrUnreachable))
		}
	}
	// An end that only answers is forgotten when nothing works, or not any more.
	for _, l := range *e.links.Load() {
		l.peer.used = now
	}
	for p := range e.peers {
		switch left := Admission - now.Sub(p.used); {
		case p.cfg.Asking || !p.punched:
		case left > 0:
			wait = min(wait, left)
		default:
			e.forgetLocked(p)
			calls = append(calls, p.failLocked(ErrUnreachable))
		}
	}
	// A link ends with the admission of its address.
	for _, l := range *e.links.Load() {
		if left := Admission - now.Sub(time.Unix(0, l.proved.Load())); left > 0 {
			wait = min(wait, left)
		} else {
			e.cfg.Logger.Info("direct path ended", "address", l.addr, "reason", "no probe was answered for 30 s")
			e.dropLocked(l)
		}
	}
	if e.sock != nil && len(e.peers) == 0 && e.asker == nil {
		if left := e.cfg.linger - now.Sub(e.idle); left > 0 {
			wait = min(wait, left)
		} else {
			e.closeLocked()
		}
	}
	return wait
}

func (e *Endpoint) stepSoon() {
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// sendLocked sends a small datagram; one that the socket does not take is lost on the way.
func (e *Endpoint) sendLocked(to netip.AddrPort, b []byte) {
	if e.sock == nil || (to.Addr().Is6() && e.sock.LocalAddr().Addr().Is4()) {
		return
	}
	if err := e.sock.NewSenderTo(to).Send(b, 0, datagram.NotECT); err != nil {
		e.unsent.Add(1)
	}
}

// Open makes a peer and returns the addresses to tell it. It opens the socket if there is none, and asks the relays, for 2 s at most.
// The peer counts until it is closed.
func (e *Endpoint) Open(ctx context.Context, cfg PeerConfig) (*Peer, []netip.AddrPort, error) {
	p := &Peer{e: e, cfg: cfg, checks: newChecks(cfg.Keys, cfg.Asking)}
	e.mu.Lock()
	if e.ended || !e.running {
		e.mu.Unlock()
		return nil, nil, net.ErrClosed
	}
	if len(e.peers) >= e.cfg.MaxPeers {
		e.mu.Unlock()
		return nil, nil, ErrLimit
	}
	err := e.openLocked(ctx)
	if err == nil {
		e.peers[p] = struct{}{}
	}
	e.mu.Unlock()
	if err != nil {
		return nil, nil, err
	}
	own, err := e.gather(ctx)
	if err != nil {
		p.Close()
		return nil, nil, err
	}
	return p, own, nil
}

// openLocked opens the socket and starts to read it.
func (e *Endpoint) openLocked(ctx context.Context) error {
	if e.sock != nil {
		return nil
	}
	at := e.cfg.listen
	if !at.IsValid() {
		at = netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
	}
	sock, warnings, err := udpio.Listen(ctx, at, udpio.Config{WriteBuffer: writeBuffer})
	if err != nil {
		return fmt.Errorf("open the direct socket: %w", err)
	}
	for _, w := range warnings {
		e.cfg.Logger.Debug("UDP socket", "warning", w)
	}
	e.sock = sock
	e.cfg.Logger.Info("direct socket open", "port", sock.LocalAddr().Port())
	e.tasks.Go(func() { e.read(sock) })
	return nil
}

// NetworkChanged forgets where relays saw the socket: the host's addresses are others now.
func (e *Endpoint) NetworkChanged() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.seen = nil
}

// gather finds out where the socket may be reached.
func (e *Endpoint) gather(ctx context.Context) ([]netip.AddrPort, error) {
	e.gathering.Lock()
	defer e.gathering.Unlock()
	e.mu.Lock()
	fresh := len(e.seen) > 0 && time.Since(e.seenAt) < reuse
	e.mu.Unlock()
	if !fresh {
		if err := e.ask(ctx); err != nil {
			return nil, err
		}
	}
	private := e.private()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.sock == nil {
		return nil, net.ErrClosed
	}
	var out []netip.AddrPort
	add := func(a netip.AddrPort) {
		if len(out) < MaxCandidates && e.usable(a, private) && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	for _, a := range e.seen {
		add(a)
	}
	if private {
		for _, a := range hostAddrs() {
			add(netip.AddrPortFrom(a, e.sock.LocalAddr().Port()))
		}
	}
	if len(out) == 0 {
		return nil, ErrNoCandidates
	}
	return out, nil
}

// ask has the relays say where they see the socket.
func (e *Endpoint) ask(ctx context.Context) error {
	var servers []netip.AddrPort
	for _, s := range e.cfg.Servers() {
		if s = unmap(s); s.IsValid() && !slices.Contains(servers, s) && len(servers) < maxServers {
			servers = append(servers, s)
		}
	}
	asker, err := stun.NewAsker(servers)
	if err != nil {
		return err
	}
	e.mu.Lock()
	e.asker = asker
	select {
	case <-e.asked: // from before
	default:
	}
	e.mu.Unlock()
	e.stepSoon()
	timeout := time.NewTimer(gatherTimeout)
	defer timeout.Stop()
	if len(servers) == 0 {
		timeout.Reset(0)
	}
	var seen []netip.AddrPort
	for done := false; !done; {
		select {
		case <-e.asked:
			timeout.Reset(gatherMore)
		case <-timeout.C:
			done = true
		case <-ctx.Done():
			done = true
		}
		e.mu.Lock()
		seen = seen[:0]
		for _, b := range asker.Bindings() {
			seen = append(seen, b.Reflexive)
		}
		if done = done || len(seen) == len(servers); done {
			e.asker = nil
			// One that two relays agree on comes first: it is the same for every destination.
			slices.SortStableFunc(seen, func(a, b netip.AddrPort) int { return cmp.Compare(occurs(seen, b), occurs(seen, a)) })
			e.seen, e.seenAt = slices.Clone(slices.Compact(seen)), time.Now()
		}
		e.mu.Unlock()
	}
	return ctx.Err()
}

func occurs(in []netip.AddrPort, a netip.AddrPort) (n int) {
	for _, b := range in {
		if a == b {
			n++
		}
	}
	return n
}

func (e *Endpoint) private() bool { return e.cfg.Private != nil && e.cfg.Private() }

// usable reports whether an address may be told and tried.
func (e *Endpoint) usable(a netip.AddrPort, private bool) bool {
	if e.cfg.loopback && a.Addr().IsLoopback() {
		return true
	}
	return Usable(a, private) && (e.cfg.Refuse == nil || !e.cfg.Refuse(a.Addr()))
}

// Stats returns what was counted.
func (e *Endpoint) Stats() Stats {
	e.mu.Lock()
	defer e.mu.Unlock()
	return Stats{
		Open: e.sock != nil, Peers: len(e.peers), Links: len(*e.links.Load()), Sent: e.sent.Load(), Received: e.received.Load(),
		Probed: e.probed.Load(), Answered: e.answered.Load(), Dropped: e.dropped.Load(), Unsent: e.unsent.Load(),
	}
}
