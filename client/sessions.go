package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"sallyway/direct"
	"sallyway/internal/control"
	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/internal/legs"
	"sallyway/internal/policy"
	"sallyway/internal/telemetry"
	"sallyway/relay/leg"
	"sallyway/tunnel"
)

// Timing of sessions.
const (
	// DialTimeout bounds a flow from the request to the gateway's answer where the caller sets no bound: longer than a gateway's own.
	DialTimeout = 20 * time.Second
	// reconnectDelay is the pause between attempts to reach a gateway, before jitter; a leg that comes up ends it.
	reconnectDelay = time.Second
	// denialGrace is how long after a configuration a gateway's refusal is taken for a policy that has not come to it yet: the platform
	// pushes to all nodes within a second, in no order. denialRetry is the pause between the attempts.
	denialGrace = 2 * time.Second
	denialRetry = 100 * time.Millisecond
	// firstConnect and connectTimeout bound an attempt over one relay, rendezvous and handshake: the first one is short, since a gateway that
	// was killed and is back is asked on its old allocation once, and each takes twice as long as the one before, for slow paths.
	firstConnect   = 1500 * time.Millisecond
	connectTimeout = 6 * time.Second
	// adjustInterval is how often a session's paths are looked at without an event.
	adjustInterval = 250 * time.Millisecond
)

// SessionsConfig says as whom to open sessions and over what.
type SessionsConfig struct {
	Certificate func() (*tls.Certificate, error)
	Trust       func() *identity.Trust
	Legs        *legs.Keeper
	// Direct lets sessions leave the relay where the organization allows it.
	Direct bool
	// Eager opens a session to every gateway at once; else the first flow opens it. Once open it is kept.
	Eager  bool
	Logger *slog.Logger
	// Tracer makes a span of every flow's dial, below which the gateway's is; nil is none.
	Tracer *telemetry.Tracer
}

// Sessions reaches resources: it finds the gateway that serves a destination, keeps a session with it over whatever relays work,
// and opens flows on it. Its methods may be called concurrently.
type Sessions struct {
	cfg    SessionsConfig
	table  atomic.Pointer[table]
	direct *direct.Endpoint // nil where direct paths are not used
	wake   chan struct{}    // 1 place: the set of gateways changed
	moves  *prometheus.CounterVec

	mu       sync.Mutex
	gateways map[identity.Node]*gatewayLink // guarded by mu, as reconciled
	reached  chan struct{}                  // closed and replaced when gateways follows the table; guarded by mu
}

// NewSessions returns the sessions of no gateways: see Update.
func NewSessions(cfg SessionsConfig) *Sessions {
	s := &Sessions{cfg: cfg, wake: make(chan struct{}, 1), moves: newMoves(), gateways: map[identity.Node]*gatewayLink{}, reached: make(chan struct{})}
	s.table.Store(newTable(nil))
	if cfg.Direct {
		s.direct = s.newDirect()
	}
	return s
}

// Update takes a new configuration over. Sessions with gateways that it lacks are closed.
func (s *Sessions) Update(d *control.Dialling) {
	s.table.Store(newTable(d))
	poke(s.wake)
}

// Wake tells the sessions that legs came up or went down.
func (s *Sessions) Wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range s.gateways {
		poke(g.wake)
	}
}

// Run keeps the sessions until ctx ends, then closes them and returns.
func (s *Sessions) Run(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	if s.direct != nil {
		g.Go(func() error {
			_ = s.direct.Run(gctx) // ends with gctx
			return nil
		})
	}
	for {
		s.reconcile(gctx, g)
		select {
		case <-s.wake:
		case <-ctx.Done():
			return g.Wait()
		}
	}
}

func (s *Sessions) reconcile(ctx context.Context, group *errgroup.Group) {
	t := s.table.Load()
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() {
		close(s.reached)
		s.reached = make(chan struct{})
	}()
	for n, g := range s.gateways {
		if t.gateways[n] == nil {
			g.cancel()
			delete(s.gateways, n)
		}
	}
	for n, ref := range t.gateways {
		if g := s.gateways[n]; g != nil {
			g.ref.Store(ref)
			g.told.Store(time.Now().UnixNano())
			poke(g.wake)
			continue
		}
		gctx, cancel := context.WithCancel(ctx)
		g := &gatewayLink{s: s, node: n, cancel: cancel, ended: gctx.Done(), wake: make(chan struct{}, 1), events: make(chan struct{}, 1), changed: make(chan struct{})}
		g.log = s.cfg.Logger.With("gateway", ref.Name)
		g.direct.answers = make(chan direct.Offer, 1)
		g.ref.Store(ref)
		g.told.Store(time.Now().UnixNano())
		g.wanted.Store(s.cfg.Eager)
		s.gateways[n] = g
		group.Go(func() error {
			g.run(gctx)
			return nil
		})
	}
}

// link returns the way to a gateway, nil if the configuration has none. A new configuration is followed by Run; link waits for it.
func (s *Sessions) link(ctx context.Context, n identity.Node) *gatewayLink {
	for {
		s.mu.Lock()
		g, reached := s.gateways[n], s.reached
		s.mu.Unlock()
		if g != nil || s.table.Load().gateways[n] == nil {
			return g
		}
		select {
		case <-reached:
		case <-ctx.Done():
			return nil
		}
	}
}

// Lookup says how a host is reached, or that it is not.
func (s *Sessions) Lookup(host string, proto policy.Proto, port uint16) (Route, error) {
	return s.table.Load().lookup(host, proto, port)
}

// DialTCP opens a TCP flow to host, which is a resource's name, an address or a host name that a resource covers.
func (s *Sessions) DialTCP(ctx context.Context, host string, port uint16) (*tunnel.Stream, error) {
	route, err := s.Lookup(host, policy.TCP, port)
	if err != nil {
		return nil, err
	}
	ctx, span := s.trace(ctx, "flow tcp", host, port)
	defer span.End()
	f, err := dialVia(ctx, s, route, func(ctx context.Context, t *tunnel.Session) (*tunnel.Stream, error) {
		return t.DialTCP(ctx, route.Host, port)
	})
	if err != nil {
		span.Fail(err.Error())
	}
	return f, err
}

// DialUDP opens a UDP flow to host, as DialTCP.
func (s *Sessions) DialUDP(ctx context.Context, host string, port uint16) (*tunnel.UDPConn, error) {
	route, err := s.Lookup(host, policy.UDP, port)
	if err != nil {
		return nil, err
	}
	ctx, span := s.trace(ctx, "flow udp", host, port)
	defer span.End()
	f, err := dialVia(ctx, s, route, func(ctx context.Context, t *tunnel.Session) (*tunnel.UDPConn, error) {
		return t.DialUDP(ctx, route.Host, port)
	})
	if err != nil {
		span.Fail(err.Error())
	}
	return f, err
}

// trace begins the span of a flow's dial.
func (s *Sessions) trace(ctx context.Context, name, host string, port uint16) (context.Context, telemetry.Span) {
	ctx, span := s.cfg.Tracer.Start(ctx, name, telemetry.Client)
	span.String("server.address", host)
	span.Int("server.port", int(port))
	return ctx, span
}

// Resolve has one of the gateways answer a DNS query in wire format.
func (s *Sessions) Resolve(ctx context.Context, gateways []identity.Node, query []byte) ([]byte, error) {
	return dialVia(ctx, s, Route{Gateways: gateways}, func(ctx context.Context, t *tunnel.Session) ([]byte, error) {
		return t.Resolve(ctx, query)
	})
}

// OpenIP opens an exchange of IP packets with a gateway.
func (s *Sessions) OpenIP(ctx context.Context, gateway identity.Node) (*tunnel.IPConn, error) {
	return dialVia(ctx, s, Route{Gateways: []identity.Node{gateway}}, func(ctx context.Context, t *tunnel.Session) (*tunnel.IPConn, error) {
		return t.DialIP(ctx)
	})
}

// dialVia runs dial on the session of the first gateway of the route that has one. What it answered is final, unless another may do better
// (see tellsMore).
func dialVia[T any](ctx context.Context, s *Sessions, route Route, dial func(context.Context, *tunnel.Session) (T, error)) (T, error) {
	var none T
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, DialTimeout)
		defer cancel()
	}
	last := fmt.Errorf("no gateway serves %s now", route.Host)
	var answer error // the first one of a gateway's: what the most preferred says explains more than that others are away
	gateways := s.fitFirst(route)
	for i, n := range gateways {
		g := s.link(ctx, n)
		if g == nil {
			continue
		}
		g.waiters.Add(1)
		defer g.waiters.Add(-1)
		// With another gateway to go to, one that is not there does not get all the time.
		gctx, cancel := ctx, context.CancelFunc(func() {})
		if i < len(gateways)-1 {
			gctx, cancel = context.WithTimeout(ctx, connectTimeout)
		}
		wait, span := telemetry.Child(gctx, "session")
		t, err := g.session(wait)
		cancel()
		if err != nil {
			span.Fail(err.Error())
		}
		if span.Recording() {
			span.String("sallyway.gateway", g.ref.Load().Name)
		}
		span.End()
		if err != nil {
			last = fmt.Errorf("gateway %s: %w", g.ref.Load().Name, err)
			continue
		}
		out, err := dial(ctx, t)
		if err == nil {
			return out, nil
		}
		last = fmt.Errorf("gateway %s: %w", g.ref.Load().Name, err)
		if !tellsMore(err) || ctx.Err() != nil {
			break
		}
		if answer == nil && !errors.Is(err, tunnel.ErrNoSession) {
			answer = last
		}
	}
	if answer != nil {
		last = answer
	}
	return none, last
}

// GatewayStatus is what is known of the session with one gateway.
type GatewayStatus struct {
	Gateway identity.Node `json:"gateway"`
	Name    string        `json:"name"`
	Up      bool          `json:"up"`
	Since   time.Time     `json:"since,omitzero"`
	Path    string        `json:"path,omitempty"`
	// State is the path's by its probes: unknown, alive, suspect or dead.
	State   tunnel.Liveness `json:"state,omitempty"`
	Standby string          `json:"standby,omitempty"`
	RTT     time.Duration   `json:"rtt_ns,omitempty"`
	Moves   uint64          `json:"moves"`
	// LastMove says why the path last moved.
	LastMove   string    `json:"last_move,omitempty"`
	LastMoveAt time.Time `json:"last_move_at,omitzero"`
	// Paths are the active path and the standby.
	Paths    []PathReport `json:"paths,omitempty"`
	Sent     uint64       `json:"sent_bytes"`
	Received uint64       `json:"received_bytes"`
	Error    string       `json:"error,omitempty"`
	// Draining says that the gateway takes no new flows; Unreached are resources that it does not reach, by id.
	Draining  bool         `json:"draining,omitempty"`
	Unreached Unreached    `json:"unreached,omitempty"`
	Direct    DirectStatus `json:"direct"`
	// QUIC is what QUIC counts at the client's end of the session.
	QUIC tunnel.QUICStats `json:"quic,omitzero"`
}

// Status lists the gateways.
func (s *Sessions) Status() []GatewayStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]GatewayStatus, 0, len(s.gateways))
	for _, g := range s.gateways {
		out = append(out, g.status())
	}
	return out
}

// gatewayLink is the way to one gateway: a session, or the attempts to get one.
type gatewayLink struct {
	s       *Sessions
	node    identity.Node
	log     *slog.Logger
	ref     atomic.Pointer[control.GatewayRef]
	cancel  context.CancelFunc
	ended   <-chan struct{} // closed when no configuration has the gateway any more, or the sessions end
	wake    chan struct{}   // 1 place: legs or the configuration changed, or a flow wants a session
	events  chan struct{}   // 1 place: a path changed
	wanted  atomic.Bool
	told    atomic.Int64 // when a configuration last spoke of the gateway, in Unix nanoseconds
	failed  int          // attempts in a row; of run
	last    lastRung     // of run
	direct  directRung
	single  bool         // the session was opened for one link; of run
	search  search       // of run
	waiters atomic.Int32 // flows that are being opened

	mu      sync.Mutex
	current *tunnel.Session
	lastErr error
	changed chan struct{} // closed and replaced when current or lastErr changes
	// What the gateway said on the current session.
	leaving   bool // it drains
	unreached Unreached
	silent    bool // its active path was dead, and none has answered since
	// newLegs are the relays on which the gateway has another leg than before, as it said, and when it did.
	newLegs map[identity.Node]time.Time
}

// session returns the live session, waiting for one until ctx ends. A gateway's refusal of this node ends the wait.
func (g *gatewayLink) session(ctx context.Context) (*tunnel.Session, error) {
	if !g.wanted.Swap(true) {
		poke(g.wake)
	}
	for {
		g.mu.Lock()
		t, err, changed := g.current, g.lastErr, g.changed
		g.mu.Unlock()
		if t != nil {
			select {
			case <-t.Done():
			default:
				return t, nil
			}
		} else if errors.Is(err, tunnel.ErrDenied) {
			return nil, err
		}
		select {
		case <-changed:
		case <-g.ended:
			return nil, fmt.Errorf("no session: the gateway is not configured any more, or this node stops: %w", net.ErrClosed)
		case <-ctx.Done():
			if err == nil {
				err = context.Cause(ctx)
			}
			return nil, fmt.Errorf("no session: %w", err)
		}
	}
}

func (g *gatewayLink) set(t *tunnel.Session, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.current, g.lastErr = t, err
	if t == nil {
		g.leaving, g.unreached, g.silent, g.newLegs = false, nil, false, nil
	}
	close(g.changed)
	g.changed = make(chan struct{})
}

func (g *gatewayLink) run(ctx context.Context) {
	who := fmt.Sprintf("gateway %s %p", g.node.ID, g) // a gateway that comes back may find its former link still ending
	defer g.s.cfg.Legs.Want(who, nil)
	var logged string
	for ctx.Err() == nil {
		if !g.wanted.Load() {
			g.s.cfg.Legs.Want(who, nil)
			select {
			case <-g.wake:
			case <-ctx.Done():
				return
			}
			continue
		}
		g.s.cfg.Legs.Want(who, g.ref.Load().Relays)
		t, err := g.connect(ctx)
		if errors.Is(err, tunnel.ErrDenied) && time.Since(time.Unix(0, g.told.Load())) < denialGrace {
			select {
			case <-time.After(denialRetry):
			case <-ctx.Done():
			}
			continue
		}
		if err != nil {
			g.failed++
			g.set(nil, err)
			// The first tries of a start come before the legs are up, or before the gateway is.
			if msg := err.Error(); msg != logged && g.failed > 2 && ctx.Err() == nil {
				logged = msg
				g.log.Warn("gateway not reached", "err", err)
			}
			delay := reconnectDelay/2 + rand.N(reconnectDelay)
			if g.waiters.Load() > 0 {
				g.awaitLegs()
				delay = min(delay, reconnectDelay)
			}
			select {
			case <-g.wake:
			case <-time.After(delay):
			case <-ctx.Done():
			}
			continue
		}
		logged, g.failed = "", 0
		g.set(t, nil)
		_ = t.Notify(tunnel.Notice{Type: NoticeUnreached}) // an older gateway does not know it; a session that is over shows below
		g.log.Info("session open", "path", t.Path().Active.Info.Name)
		g.direct.begin()
		g.maintain(ctx, t, who)
		g.direct.drop()
		err = t.Err()
		g.set(nil, err)
		_ = t.Close("no longer needed")
		g.sweepLast(tunnel.PathInfo{}, true)
		if ctx.Err() == nil {
			g.log.Info("session over", "err", err)
		}
	}
}

// connect opens a session over the first relay that leads to the gateway.
func (g *gatewayLink) connect(ctx context.Context) (*tunnel.Session, error) {
	var errs []error
	for _, ref := range g.ref.Load().Relays {
		l, err := g.s.cfg.Legs.Current(ref.Node)
		if l == nil {
			if err != nil {
				errs = append(errs, err)
			}
			continue
		}
		t, err := g.dial(ctx, l, ref.Name)
		if err == nil {
			return t, nil
		}
		g.noteAbsent(ref.Node, err)
		errs = append(errs, fmt.Errorf("over relay %s: %w", ref.Name, err))
		if errors.Is(err, tunnel.ErrDenied) {
			return nil, errors.Join(errs...)
		}
	}
	t, err := g.connectLast(ctx)
	if err == nil {
		return t, nil
	}
	if !errors.Is(err, legs.ErrNoLastRung) {
		errs = append(errs, err)
	}
	switch {
	case len(errs) > 0:
		return nil, errors.Join(errs...)
	case len(g.ref.Load().Relays) == 0:
		return nil, errors.New("the gateway has no relay: create one with `sallyway relay create`, and see that the gateway is up")
	}
	return nil, errors.New("no relay is reached yet")
}

func (g *gatewayLink) dial(ctx context.Context, l *leg.Leg, name string) (*tunnel.Session, error) {
	ctx, cancel := context.WithTimeout(ctx, min(firstConnect<<min(g.failed, 8), connectTimeout))
	defer cancel()
	ch, err := l.Connect(ctx, g.node)
	if err != nil {
		return nil, err
	}
	return g.open(ctx, ch, linkInfo(l, name, g.node))
}

// open opens a session over a link.
func (g *gatewayLink) open(ctx context.Context, l datagram.Link, info tunnel.LinkInfo) (*tunnel.Session, error) {
	// A session that begins with one relay keeps to one link, and is repointed when that is lost: it gets no standby even if a second relay
	// joins the configuration later.
	g.single = len(g.ref.Load().Relays) == 1
	return tunnel.Dial(ctx, tunnel.DialConfig{
		SingleLink: g.single,
		Link:       l, Info: info, Gateway: g.node, Certificate: g.s.cfg.Certificate, Trust: g.s.cfg.Trust, Logger: g.log,
		OnPath: g.pathEvent, OnNotice: g.notice,
	})
}

func (g *gatewayLink) status() GatewayStatus {
	g.mu.Lock()
	t, err, leaving, unreached := g.current, g.lastErr, g.leaving, g.unreached
	g.mu.Unlock()
	st := GatewayStatus{Gateway: g.node, Name: g.ref.Load().Name, Up: t != nil, Draining: leaving, Unreached: unreached}
	if err != nil {
		st.Error = err.Error()
	}
	if t == nil {
		return st
	}
	st.Direct = g.directStatus()
	p, stats := t.Path(), t.Stats()
	st.Since, st.Path, st.Standby, st.RTT, st.State = stats.Since, p.Active.Info.Name, p.Standby.Info.Name, stats.RTT, p.Active.State
	st.Moves, st.LastMove, st.Sent, st.Received = p.Moves, p.LastReason, stats.Sent, stats.Received
	st.LastMoveAt, st.Paths, st.QUIC = p.LastMove, reportPaths(p), t.QUIC()
	return st
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// poke puts a signal into a channel of capacity one.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
