// Package legs keeps a node's legs up: one on every relay that is wanted, dialled again when lost, over UDP where that works and
// over TLS where it does not.
//
//	k := legs.New(legs.Config{Logger: log, OnRendezvous: serve})
//	k.Want("serving", config.Gateway.Relays)
//	go k.Run(ctx)
//	l, err := k.Leg(ctx, relay)        // waits until it is up
//
// A lost leg is dialled again at once and then every RetryInterval, give or take a tenth, for as long as it is wanted. A leg that had to
// fall back to TLS is tried over UDP again every UpgradeInterval and replaced when that works, the new one first.
package legs

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/relay/leg"
)

// Timing of attempts.
const (
	// RetryInterval is from the start of one attempt at a relay to the start of the next, before jitter.
	RetryInterval = 5 * time.Second
	// AttemptTimeout bounds one attempt, so that it is over when the next is due.
	AttemptTimeout = 4 * time.Second
	// TLSStagger is how long UDP has the field to itself before TLS is tried beside it.
	TLSStagger = 1500 * time.Millisecond
	// UpgradeInterval is how often a leg over TLS looks whether UDP works by now.
	UpgradeInterval = 30 * time.Second
)

// Config of a Keeper.
type Config struct {
	Logger *slog.Logger
	// OnRendezvous takes the channels of peers that ask for this node; nil for nodes that only ask.
	OnRendezvous func(relay identity.Node, peer identity.Node, ch *leg.Channel)
	// OnUp and OnDown are told of every leg, from the goroutine of its relay; they must not block. Either may be nil.
	OnUp   func(relay identity.Node, l *leg.Leg)
	OnDown func(relay identity.Node, err error)
	// Certificate is what this node shows on the last rung; nil is that it dials none.
	Certificate func() (*tls.Certificate, error)
	// OnMissing is told when the last rung is worth a try, as OnUp; nil is nothing.
	OnMissing func(relay identity.Node)
	// Control is called on every socket (see net.Dialer.Control).
	Control func(network, address string, c syscall.RawConn) error
	// Dial opens TCP connections to relays, by host and port: where it leads through a proxy, that may resolve the host. Nil is a net.Dialer
	// with Control.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Transports are those to try, in order of preference; nil is UDP, then TLS.
	Transports []leg.Transport
	// Keepalive is the longest silence on a leg's control connection; 0 is leg.DefaultKeepalive. It bounds how long a restarted relay
	// goes unnoticed while nothing is sent.
	Keepalive time.Duration
	// Resolver finds relays' addresses; nil is the system's.
	Resolver *net.Resolver
	Metrics  *leg.Metrics
}

// Keeper holds the legs. Its methods may be called concurrently.
type Keeper struct {
	cfg            Config
	retry, upgrade time.Duration // RetryInterval and UpgradeInterval; tests have less time
	wake           chan struct{} // 1 place: the set of wanted relays changed

	mu     sync.Mutex
	wanted map[string][]control.RelayRef // by who wants them
	relays map[identity.Node]*relay
	// refused is until when the last rung is not tried again.
	refused map[lastKey]time.Time
}

// relay is the state of one wanted relay; the fields below mu belong to it.
type relay struct {
	k      *Keeper
	node   identity.Node
	cancel context.CancelFunc

	mu      sync.Mutex
	ref     control.RelayRef // of node; what else is in it may change
	current *leg.Leg
	changed chan struct{} // closed and replaced when current changes
	kick    chan struct{} // 1 place: the host's network changed
	lastErr error
	since   time.Time
	tries   int
	missing time.Time // since when there is no leg; zero while there is one
	failed  bool      // an attempt failed since
}

// Status is what is known of one relay's leg.
type Status struct {
	Relay     identity.Node  `json:"relay"`
	Name      string         `json:"name"`
	Host      string         `json:"host"`
	Up        bool           `json:"up"`
	Transport leg.Transport  `json:"transport,omitempty"`
	Since     time.Time      `json:"since,omitzero"`
	Reflexive netip.AddrPort `json:"reflexive,omitzero"`
	Relayed   netip.AddrPort `json:"relayed,omitzero"`
	Stats     *leg.Stats     `json:"stats,omitempty"`
	Tries     int            `json:"tries,omitempty"`
	Error     string         `json:"error,omitempty"`
	// Refused says that the relay was reached and does not take this node: 401 or 403.
	Refused bool `json:"refused,omitempty"`
}

// ParseTransports reads a choice of transports: auto, udp or tls. Auto is nil: UDP, then TLS.
func ParseTransports(s string) ([]leg.Transport, error) {
	switch s {
	case "auto", "":
		return nil, nil
	case string(leg.UDP), string(leg.TLS):
		return []leg.Transport{leg.Transport(s)}, nil
	}
	return nil, fmt.Errorf("%.20q: want auto, udp or tls", s)
}

// New returns a keeper of no legs.
func New(cfg Config) *Keeper {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if len(cfg.Transports) == 0 {
		cfg.Transports = []leg.Transport{leg.UDP, leg.TLS}
	}
	if cfg.Resolver == nil {
		cfg.Resolver = net.DefaultResolver
	}
	return &Keeper{
		cfg: cfg, retry: RetryInterval, upgrade: UpgradeInterval,
		wake: make(chan struct{}, 1), wanted: map[string][]control.RelayRef{}, relays: map[identity.Node]*relay{}, refused: map[lastKey]time.Time{},
	}
}

// Want says which relays who wants legs on, in place of what who wanted before; an empty list is none. Legs that nobody wants any more
// are closed. A reference replaces an older one to the same relay, so fresh credentials take effect at the next refresh.
func (k *Keeper) Want(who string, refs []control.RelayRef) {
	k.mu.Lock()
	if len(refs) == 0 {
		delete(k.wanted, who)
	} else {
		k.wanted[who] = slices.Clone(refs)
	}
	k.mu.Unlock()
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// Run keeps the legs until ctx ends, then closes them and returns.
func (k *Keeper) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for {
		k.reconcile(ctx, g)
		select {
		case <-k.wake:
		case <-ctx.Done():
			return g.Wait()
		}
	}
}

// reconcile starts what is newly wanted and stops what is not wanted any more.
func (k *Keeper) reconcile(ctx context.Context, g *errgroup.Group) {
	k.mu.Lock()
	defer k.mu.Unlock()
	want := map[identity.Node]control.RelayRef{}
	for _, refs := range k.wanted {
		for _, ref := range refs {
			want[ref.Node] = ref
		}
	}
	for n, r := range k.relays {
		if _, ok := want[n]; !ok {
			r.cancel()
			delete(k.relays, n)
		}
	}
	for n, ref := range want {
		if r := k.relays[n]; r != nil {
			r.mu.Lock()
			r.ref = ref
			r.mu.Unlock()
			continue
		}
		rctx, cancel := context.WithCancel(ctx)
		r := &relay{k: k, node: n, cancel: cancel, ref: ref, changed: make(chan struct{}), kick: make(chan struct{}, 1)}
		k.relays[n] = r
		g.Go(func() error {
			r.keep(rctx)
			return nil
		})
	}
}

// ErrUnwanted says that no leg on the relay is being kept.
var ErrUnwanted = errors.New("no leg is kept on this relay")

// Leg returns the live leg on a wanted relay, waiting for it until ctx ends. The error then names why the relay is not reached.
func (k *Keeper) Leg(ctx context.Context, n identity.Node) (*leg.Leg, error) {
	for {
		k.mu.Lock()
		r := k.relays[n]
		pending := r == nil && k.isWantedLocked(n)
		k.mu.Unlock()
		if r == nil && !pending {
			return nil, ErrUnwanted
		}
		changed := time.After(10 * time.Millisecond) // only until Run takes up what was just wanted
		var wait <-chan struct{}
		if r != nil {
			r.mu.Lock()
			l, err := r.current, r.lastErr
			wait = r.changed
			r.mu.Unlock()
			if l != nil {
				return l, nil
			}
			select {
			case <-wait:
			case <-ctx.Done():
				return nil, errors.Join(err, context.Cause(ctx))
			}
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Current returns the live leg on a relay, or nil and why there is none.
func (k *Keeper) Current(n identity.Node) (*leg.Leg, error) {
	k.mu.Lock()
	r := k.relays[n]
	k.mu.Unlock()
	if r == nil {
		return nil, ErrUnwanted
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.current, r.lastErr
}

func (k *Keeper) isWantedLocked(n identity.Node) bool {
	for _, refs := range k.wanted {
		for _, ref := range refs {
			if ref.Node == n {
				return true
			}
		}
	}
	return false
}

// Status lists the wanted relays, by name.
func (k *Keeper) Status() []Status {
	k.mu.Lock()
	rs := make([]*relay, 0, len(k.relays))
	for _, r := range k.relays {
		rs = append(rs, r)
	}
	k.mu.Unlock()
	out := make([]Status, 0, len(rs))
	for _, r := range rs {
		out = append(out, r.status())
	}
	slices.SortFunc(out, func(a, b Status) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

func (r *relay) status() Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := Status{Relay: r.ref.Node, Name: r.ref.Name, Host: r.ref.Host, Up: r.current != nil, Since: r.since, Tries: r.tries}
	if r.lastErr != nil {
		s.Error = r.lastErr.Error()
		if e, ok := errors.AsType[*leg.Error](r.lastErr); ok {
			s.Refused = e.Code == leg.CodeUnauthorized || e.Code == leg.CodeForbidden
		}
	}
	if l := r.current; l != nil {
		st := l.Stats()
		s.Transport, s.Reflexive, s.Relayed, s.Stats = l.Transport(), l.ReflexiveAddr(), l.RelayedAddr(), &st
	}
	return s
}

// keep holds one leg up until ctx ends.
func (r *relay) keep(ctx context.Context) {
	r.mu.Lock()
	log := r.k.cfg.Logger.With("relay", r.ref.Name)
	r.mu.Unlock()
	r.mu.Lock()
	r.missing = time.Now()
	r.mu.Unlock()
	defer r.set(nil, ErrUnwanted) // who waits for the leg looks again
	for ctx.Err() == nil {
		started := time.Now()
		r.mu.Lock()
		r.tries++
		try := r.tries
		r.mu.Unlock()
		select {
		case <-r.kick: // this attempt is for it
		default:
		}
		log.Info("dialling relay", "try", try)
		l, err := r.dial(ctx, r.k.cfg.Transports)
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			r.set(nil, err)
			r.mu.Lock()
			r.failed = true
			r.mu.Unlock()
			r.missed()
			log.Warn("relay not reached", "err", err, "retry_every", r.k.retry)
			if !r.pause(ctx, time.Until(started.Add(jitter(r.k.retry)))) {
				return
			}
			continue
		}
		log.Info("leg up", "transport", l.Transport(), "reflexive", l.ReflexiveAddr(), "relayed", l.RelayedAddr())
		err = r.hold(ctx, l, log)
		if ctx.Err() != nil {
			return
		}
		log.Warn("leg lost", "err", err)
		if r.k.cfg.OnDown != nil {
			r.k.cfg.OnDown(r.node, err)
		}
		// A relay that takes legs and loses them soon must not be dialled in a tight loop.
		if time.Since(started) < r.k.retry && !r.pause(ctx, jitter(r.k.retry)) {
			return
		}
	}
}

// hold serves a leg until it is lost, replaced by none, or ctx ends. It closes what it held.
func (r *relay) hold(ctx context.Context, l *leg.Leg, log *slog.Logger) error {
	r.set(l, nil)
	if r.k.cfg.OnUp != nil {
		r.k.cfg.OnUp(r.node, l)
	}
	upgrade := time.NewTicker(r.k.upgrade)
	defer upgrade.Stop()
	draining := l.Draining()
	upgrades := make(chan *leg.Leg, 1) // nil: the attempt failed
	trying := false
	uctx, stop := context.WithCancel(ctx)
	defer func() {
		stop()
		if !trying {
			return
		}
		if better := <-upgrades; better != nil {
			_ = better.Close()
		}
	}()
	for {
		select {
		case <-ctx.Done():
			r.set(nil, nil)
			_ = l.Close() // only ever reports what Done told
			return ctx.Err()
		case <-l.Done():
			err := l.Err()
			r.set(nil, err)
			_ = l.Close()
			return err
		case <-draining:
			draining = nil
			log.Info("relay is draining")
			if r.k.cfg.OnDown != nil {
				r.k.cfg.OnDown(r.node, errors.New("the relay is draining"))
			}
		case <-upgrade.C:
			if trying || l.Transport() == r.k.cfg.Transports[0] {
				continue
			}
			trying = true
			go func() {
				better, err := r.dial(uctx, r.k.cfg.Transports[:1])
				if err != nil {
					better = nil
				}
				upgrades <- better
			}()
		case better := <-upgrades:
			trying = false
			if better == nil {
				continue
			}
			log.Info("leg moved up", "from", l.Transport(), "to", better.Transport())
			old := l
			l = better
			draining = l.Draining()
			r.set(l, nil)
			if r.k.cfg.OnUp != nil {
				r.k.cfg.OnUp(r.node, l)
			}
			_ = old.Close()
		}
	}
}

func (r *relay) set(l *leg.Leg, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.current, r.lastErr, r.since = l, err, time.Now()
	switch {
	case l != nil:
		r.tries, r.missing, r.failed = 0, time.Time{}, false
	case r.missing.IsZero():
		r.missing = time.Now()
	}
	close(r.changed)
	r.changed = make(chan struct{})
}

// dial makes one attempt: the transports race, each with a stagger behind the one before. The first leg wins.
func (r *relay) dial(ctx context.Context, transports []leg.Transport) (*leg.Leg, error) {
	ctx, cancel := context.WithTimeout(ctx, AttemptTimeout)
	defer cancel()
	r.mu.Lock()
	ref := r.ref
	r.mu.Unlock()
	var addrs []netip.AddrPort
	if r.k.cfg.Dial == nil { // else TLS may need none, and does not wait for them
		var err error
		if addrs, err = r.k.Addrs(ctx, ref, ref.Port); err != nil {
			return nil, err
		}
	}
	trust, err := relayTrust(ref)
	if err != nil {
		return nil, err
	}
	defer time.AfterFunc(LastStagger, r.missed).Stop()
	type result struct {
		l   *leg.Leg
		err error
	}
	results := make(chan result, len(transports))
	noAddress := make(chan struct{}) // closed when the first transport has nothing to dial, so that the next one need not wait
	for i, t := range transports {
		go func() {
			if i > 0 && !stagger(ctx, time.Duration(i)*TLSStagger, noAddress) {
				results <- result{nil, nil}
				return
			}
			addrs, dial, err := addrs, dialFunc(nil), error(nil)
			if r.k.cfg.Dial != nil {
				addrs, dial, err = r.k.way(ctx, ref, t)
			}
			if err != nil {
				if i == 0 {
					close(noAddress)
				}
				results <- result{nil, err}
				return
			}
			l, err := leg.Dial(ctx, leg.Config{
				Relay: ref.Node, Addrs: addrs, Transport: t, Control: r.k.cfg.Control, Dial: dial, Keepalive: r.k.cfg.Keepalive, Logger: r.k.cfg.Logger, Metrics: r.k.cfg.Metrics,
				Verify: r.k.verifier(trust),
				Credentials: func() (string, string) {
					r.mu.Lock()
					defer r.mu.Unlock()
					return r.ref.Username, r.ref.Password
				},
				OnRendezvous: r.onRendezvous(),
			})
			if err != nil {
				err = fmt.Errorf("%s over %s: %w", ref.Name, t, err)
			}
			results <- result{l, err}
		}()
	}
	var won *leg.Leg
	var errs []error
	for range transports {
		res := <-results
		switch {
		case res.l != nil && won == nil:
			won = res.l
			cancel() // the others give up
		case res.l != nil:
			_ = res.l.Close()
		case res.err != nil:
			errs = append(errs, res.err)
		}
	}
	if won != nil {
		return won, nil
	}
	return nil, errors.Join(errs...)
}

func (r *relay) onRendezvous() func(identity.Node, netip.AddrPort, *leg.Channel) {
	if r.k.cfg.OnRendezvous == nil {
		return nil
	}
	n := r.node
	return func(peer identity.Node, _ netip.AddrPort, ch *leg.Channel) { r.k.cfg.OnRendezvous(n, peer, ch) }
}

// Addrs finds the addresses of a port of a relay, IPv4 first.
func (k *Keeper) Addrs(ctx context.Context, ref control.RelayRef, port uint16) ([]netip.AddrPort, error) {
	if a, err := netip.ParseAddr(ref.Host); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(a.Unmap(), port)}, nil
	}
	addrs, err := k.cfg.Resolver.LookupNetIP(ctx, "ip", ref.Host)
	if err != nil {
		return nil, fmt.Errorf("address of relay %s: %w", ref.Name, err)
	}
	slices.SortStableFunc(addrs, func(a, b netip.Addr) int { return a.Unmap().BitLen() - b.Unmap().BitLen() })
	out := make([]netip.AddrPort, len(addrs))
	for i, a := range addrs {
		out[i] = netip.AddrPortFrom(a.Unmap(), port)
	}
	return out, nil
}

// dialFunc opens a connection (see net.Dialer.DialContext).
type dialFunc = func(ctx context.Context, network, address string) (net.Conn, error)

// Way is how a TCP port of a relay is dialled: its addresses and, where Config.Dial is set, a function that dials its host in place of the
// address. That is then one, and unspecified where the host is a name.
func (k *Keeper) Way(ctx context.Context, ref control.RelayRef, port uint16) ([]netip.AddrPort, dialFunc, error) {
	if k.cfg.Dial == nil {
		addrs, err := k.Addrs(ctx, ref, port)
		return addrs, nil, err
	}
	at := netip.IPv4Unspecified()
	if a, err := netip.ParseAddr(ref.Host); err == nil {
		at = a.Unmap()
	}
	target := net.JoinHostPort(ref.Host, strconv.Itoa(int(port)))
	return []netip.AddrPort{netip.AddrPortFrom(at, port)}, func(ctx context.Context, network, _ string) (net.Conn, error) {
		return k.cfg.Dial(ctx, network, target)
	}, nil
}

// way is Way for a leg.
func (k *Keeper) way(ctx context.Context, ref control.RelayRef, t leg.Transport) ([]netip.AddrPort, dialFunc, error) {
	if t == leg.TLS {
		return k.Way(ctx, ref, ref.Port)
	}
	addrs, err := k.Addrs(ctx, ref, ref.Port)
	return addrs, nil, err
}

// verifier checks a relay's certificate. Where a proxy may be on the way, it says what may have happened.
func (k *Keeper) verifier(trust *identity.Trust) func(chain []*x509.Certificate) error {
	return func(chain []*x509.Certificate) error {
		_, err := trust.Verify(chain, x509.ExtKeyUsageServerAuth)
		if err != nil && k.cfg.Dial != nil && len(chain) > 0 {
			err = fmt.Errorf("%w; the certificate is issued by %.80q: if the egress proxy opens TLS, exempt the relay from that", err, chain[0].Issuer.String())
		}
		return err
	}
}

// jitter is d give or take a tenth.
func jitter(d time.Duration) time.Duration {
	return d - d/10 + rand.N(d/5)
}

// pause is sleep that a change of the network ends early.
func (r *relay) pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-r.kick:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}

// Kick says that the host's network changed: legs are checked at once, and lost ones dialled at once.
func (k *Keeper) Kick() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, r := range k.relays {
		select {
		case r.kick <- struct{}{}:
		default:
		}
		r.mu.Lock()
		if r.current != nil {
			r.current.Suspect()
		}
		r.mu.Unlock()
	}
}

// stagger waits, not longer than until now is closed, and reports whether ctx is still alive.
func stagger(ctx context.Context, d time.Duration, now <-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-now:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}
