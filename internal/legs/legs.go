// Package legs keeps a node's legs up: one on every relay that is wanted, dialled again when lost, over UDP where that works and
// over TLS where it does not.
//
//	k := legs.New(legs.Config{Logger: log, OnRendezvous: serve})
//	k.Want("serving", config.Gateway.Relays)
//	go k.Run(ctx)
//	l, err := k.Leg(ctx, relay)        // waits until it is up
//
// A lost leg is dialled again at once and then every RetryInterval, give or take a tenth, for as long as it is wanted. While somebody says
// that traffic waits for it (see Keeper.Waiting) attempts begin every half second and do not wait for one another, so that the relay's return is
// seen at once; after some dozens of them the pace is RetryInterval's again: a relay that stays away is not worth more, and one that comes back is
// not to be met by everybody at once.
//
// A leg is left before it is lost. One that doubts its relay (see leg.Config.OnDoubt) gets another one beside it over the other transport; if that is up
// first it takes the place of the doubtful one, which stays until its fate is known and nothing comes over it any more. A leg over TLS is tried over UDP
// again soon and then ever less often, up to UpgradeInterval, and replaced when that works, the new one first. UDP that did not hold for long is
// not returned to so soon.
package legs

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyway/internal/control"
	"sallyway/internal/egress"
	"sallyway/internal/identity"
	"sallyway/relay/leg"
)

// Timing of attempts.
const (
	// RetryInterval is from the start of one attempt at a relay to the start of the next, before jitter.
	RetryInterval = 5 * time.Second
	// AttemptTimeout bounds one attempt, so that it is over when the next is due.
	AttemptTimeout = 4 * time.Second
	// TLSStagger is how long UDP has the field to itself before TLS is tried beside it, unless it fails before. It is rushStagger while traffic
	// waits.
	TLSStagger = 1500 * time.Millisecond
	// UpgradeInterval is how often a leg over TLS looks whether UDP works by now, after the first looks, which come sooner.
	UpgradeInterval = 30 * time.Second
)

// Config of a Keeper.
type Config struct {
	Logger *slog.Logger
	// OnRendezvous takes the channels of peers that ask for this node; nil for nodes that only ask.
	OnRendezvous func(relay identity.Node, peer identity.Node, ch *leg.Channel)
	// OnUp and OnDown are told of every leg, from the goroutine of its relay; they must not block. OnUp of a leg that takes the place of another
	// comes without OnDown: the other one carries for a while yet. Either may be nil.
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
	retry, upgrade time.Duration              // RetryInterval and UpgradeInterval; tests have less time
	addrs          func() ([]net.Addr, error) // the host's
	wake           chan struct{}              // 1 place: the set of wanted relays changed

	mu     sync.Mutex
	wanted map[string][]control.RelayRef // by who wants them
	relays map[identity.Node]*relay
	// refused are the peers that the last rung did not lead to.
	refused map[lastKey]refusal
	moves   map[moveKey]uint64
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
	doubts  chan struct{} // 1 place: a leg began to doubt, or ended to
	waits   chan struct{} // 1 place: traffic waits
	lastErr error
	since   time.Time
	tries   int
	missing time.Time // since when there is no leg; zero while there is one
	failed  bool      // an attempt failed since
	waited  time.Time // when traffic last waited for a leg
	kicked  time.Time // when the host's network last changed
	doubted time.Time // since when current doubts; zero while it does not
	moves   int       // from transport to transport
	why     string    // of the last one
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
	// Doubtful says that the relay is being asked whether it is there; Moves is how often the transport changed, LastMove why it last did.
	Doubtful bool   `json:"doubtful,omitempty"`
	Moves    int    `json:"moves,omitempty"`
	LastMove string `json:"last_move,omitempty"`
	Tries    int    `json:"tries,omitempty"`
	Error    string `json:"error,omitempty"`
	Remedy   string `json:"remedy,omitempty"` // of Error, where an egress proxy is to blame
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
	if cfg.Metrics == nil {
		cfg.Metrics = new(leg.Metrics)
	}
	return &Keeper{
		cfg: cfg, retry: RetryInterval, upgrade: UpgradeInterval, addrs: net.InterfaceAddrs,
		wake: make(chan struct{}, 1), wanted: map[string][]control.RelayRef{}, relays: map[identity.Node]*relay{}, refused: map[lastKey]refusal{}, moves: map[moveKey]uint64{},
	}
}

// Metrics are the counters of all legs that the keeper has had.
func (k *Keeper) Metrics() *leg.Metrics { return k.cfg.Metrics }

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
	poke(k.wake)
}

// poke puts a signal into a channel of capacity one.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Waiting says that traffic waits for legs on relays now, which are dialled more often for a while if they are lost. It is to be called at least
// every second for as long as it is so.
func (k *Keeper) Waiting(relays ...identity.Node) {
	for _, n := range relays {
		r := k.relay(n)
		if r == nil {
			continue
		}
		r.mu.Lock()
		r.waited = time.Now()
		lost := r.current == nil
		r.mu.Unlock()
		if lost {
			poke(r.waits)
		}
	}
}

// Suspect has the leg on a relay ask it for a sign of life, because its paths do not work. If none comes another leg is dialled beside it.
func (k *Keeper) Suspect(n identity.Node) {
	if l, _ := k.Current(n); l != nil {
		l.Suspect()
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
		r := &relay{
			k: k, node: n, cancel: cancel, ref: ref, changed: make(chan struct{}), kick: make(chan struct{}, 1), doubts: make(chan struct{}, 1),
			waits: make(chan struct{}, 1),
		}
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
		s.Error, s.Remedy = r.lastErr.Error(), egress.Remedy(r.lastErr)
		if e, ok := errors.AsType[*leg.Error](r.lastErr); ok {
			s.Refused = e.Code == leg.CodeUnauthorized || e.Code == leg.CodeForbidden
		}
	}
	s.Moves, s.LastMove = r.moves, r.why
	if l := r.current; l != nil {
		st := l.Stats()
		s.Doubtful = l.Doubtful()
		s.Transport, s.Reflexive, s.Relayed, s.Stats = l.Transport(), l.ReflexiveAddr(), l.RelayedAddr(), &st
	}
	return s
}

// firstUpgrade is after how long a leg over TLS first looks for UDP.
func (k *Keeper) firstUpgrade() time.Duration { return min(upgradeFirst, k.upgrade) }

func (r *relay) set(l *leg.Leg, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.current, r.lastErr, r.since, r.doubted = l, err, time.Now(), time.Time{}
	switch {
	case l != nil:
		r.tries, r.missing, r.failed = 0, time.Time{}, false
	case r.missing.IsZero():
		r.missing = time.Now()
	}
	close(r.changed)
	r.changed = make(chan struct{})
}

// jitter is d give or take a tenth.
func jitter(d time.Duration) time.Duration {
	return d - d/10 + rand.N(d/5)
}

// Kick says that the host's network changed: legs are checked at once, and lost ones dialled at once.
func (k *Keeper) Kick() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, r := range k.relays {
		r.mu.Lock()
		r.kicked = time.Now()
		poke(r.kick)
		if r.current != nil {
			r.current.Suspect()
		}
		r.mu.Unlock()
	}
}
