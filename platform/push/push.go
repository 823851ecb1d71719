// Package push keeps nodes up to date: one control stream for each, which gets a node's whole configuration at once and again whenever its
// content changes, a ping when nothing does, and its end when the node loses its rights. It also runs what changes by itself: relays
// assigned by health, TURN keys rotated, housekeeping.
package push

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/allocation"
	"sallyway/platform/pki"
	"sallyway/platform/presence"
	"sallyway/platform/registry"
	"sallyway/platform/store"
	"sallyway/platform/view"
)

// Intervals.
const (
	settle        = 50 * time.Millisecond  // changes that follow each other are pushed as one
	allocateRest  = 200 * time.Millisecond // between two looks at who gets which relays: thousands of nodes come back at once
	sweepInterval = 2 * time.Second        // relays are looked at for silence
	flushInterval = 10 * time.Second       // counted refusals go to the audit
	houseInterval = time.Minute
	rotateRest    = 20 // rotations of CAs are not looked at for so many times as long as the last look took
	// refreshMost is when credentials and documents are made anew at the latest although nothing changed.
	refreshMost = time.Hour
)

// Config is what a Hub needs. Zero durations mean the defaults.
type Config struct {
	Registry *registry.Registry
	Log      *slog.Logger
	// DocumentLife is how long snapshots and grants are valid: 24 h. They are made anew after an hour, or half of it if that is less.
	DocumentLife time.Duration
	// CredentialLife is how long nodes' credentials for relays are valid while the platform can renew them, which is done at half of it: zero
	// is as long as the node's certificate. In an outage they are good as long as that.
	CredentialLife time.Duration
	// KeyRotation is the age at which a relay's TURN key is followed by a new one: 24 h.
	KeyRotation time.Duration
	// Peers are the other platforms on the same database; nil is none.
	Peers Peers
}

// Peers tells other platforms on the same database what happens here; what happens there comes by the Remote methods. Methods do not block.
type Peers interface {
	Changed(org string, version uint64)
	Dropped(node string)
	Opened(node string)
	Beat(node string, b presence.Beat)
	// Leads says whether this platform does what happens by itself: one of them does.
	Leads() bool
}

// alone are the peers of a platform that has none.
type alone struct{}

// Changed implements Peers, as do the others.
func (alone) Changed(string, uint64)     {}
func (alone) Dropped(string)             {}
func (alone) Opened(string)              {}
func (alone) Beat(string, presence.Beat) {}
func (alone) Leads() bool                { return true }

// Hub serves all streams.
type Hub struct {
	cfg     Config
	reg     *registry.Registry
	started time.Time
	kick    chan struct{} // capacity 1: something changed that may move relays
	moves   atomic.Bool   // another platform may have announced a relay's new address
	news    atomic.Bool   // something changed, for all that is known a rotation of CAs began

	mu      sync.Mutex
	orgs    map[string]*org    // guarded by mu
	streams map[string]*stream // newest stream, by node id; guarded by mu

	turns chan struct{} // holds one for each configuration that is made or sent
	lines sync.Pool     // of *[]byte, for configurations

	jobs    sync.Mutex
	queue   []*job // that wait; guarded by jobs
	workers int    // guarded by jobs

	metrics metrics
}

// org is what is cached of an organization.
type org struct {
	load sync.Mutex // held while the view is loaded, so that one load serves all; taken before Hub.mu

	// Guarded by Hub.mu:
	changed    chan struct{} // closed at the next change
	generation uint64
	version    uint64     // the highest that was heard of
	view       *view.View // nil when it is out of date
	signer     *policy.Signer
	renew      time.Time        // when the signer is replaced
	signs      identity.KeyHash // CA of the signer
}

type stream struct {
	cancel context.CancelCauseFunc
	since  time.Time
}

type metrics struct {
	pushes  prometheus.Counter
	streams prometheus.Gauge
}

// ErrReplaced ends a stream whose node opened a newer one.
var ErrReplaced = errors.New("replaced by a newer stream of the same node")

// ErrDropped ends the stream of a node that lost its rights.
var ErrDropped = errors.New("the node was deleted, disabled, revoked, or enrolled anew")

// New returns a hub that is told of changes by cfg.Registry. It starts nothing.
func New(cfg Config, metricsTo prometheus.Registerer) *Hub {
	if cfg.DocumentLife == 0 {
		cfg.DocumentLife = 24 * time.Hour
	}
	if cfg.KeyRotation == 0 {
		cfg.KeyRotation = 24 * time.Hour
	}
	if cfg.Peers == nil {
		cfg.Peers = alone{}
	}
	h := &Hub{
		cfg: cfg, reg: cfg.Registry, started: cfg.Registry.Now(), kick: make(chan struct{}, 1),
		orgs: make(map[string]*org), streams: make(map[string]*stream), turns: make(chan struct{}, 4*runtime.GOMAXPROCS(0)),
		lines: sync.Pool{New: func() any { return new([]byte) }},
		metrics: metrics{
			pushes:  prometheus.NewCounter(prometheus.CounterOpts{Name: "sallyway_platform_config_pushes_total", Help: "Configurations sent to nodes."}),
			streams: prometheus.NewGauge(prometheus.GaugeOpts{Name: "sallyway_platform_control_streams", Help: "Nodes with an open control stream."}),
		},
	}
	metricsTo.MustRegister(h.metrics.pushes, h.metrics.streams)
	cfg.Registry.Changed, cfg.Registry.Dropped = h.changed, h.dropped
	return h
}

func (h *Hub) orgLocked(name string) *org {
	o := h.orgs[name]
	if o == nil {
		o = &org{changed: make(chan struct{})}
		h.orgs[name] = o
	}
	return o
}

// changed is told of a change that was committed here.
func (h *Hub) changed(name string, version uint64) {
	h.mu.Lock()
	h.invalidateLocked(name, version)
	h.mu.Unlock()
	h.wakeAllocation()
	h.cfg.Peers.Changed(name, version)
}

// invalidateLocked wakes the streams of an organization.
func (h *Hub) invalidateLocked(name string, version uint64) {
	o := h.orgLocked(name)
	o.version = max(o.version, version)
	o.generation++
	o.view = nil
	h.news.Store(true)
	close(o.changed)
	o.changed = make(chan struct{})
}

func (h *Hub) wakeAllocation() {
	select {
	case h.kick <- struct{}{}:
	default: // one wake-up waits already
	}
}

// dropped is told of a node that lost its rights by a change that was committed here.
func (h *Hub) dropped(node string) {
	h.end(node, 0, ErrDropped)
	h.cfg.Peers.Dropped(node)
}

// end ends a node's stream that is older than age.
func (h *Hub) end(node string, age time.Duration, why error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s := h.streams[node]; s != nil && time.Since(s.since) >= age {
		s.cancel(why)
	}
}

// Heartbeat records what a node says of itself.
func (h *Hub) Heartbeat(node string, beat control.Heartbeat) {
	b := presence.Beat{At: h.reg.Now(), Heartbeat: beat}
	h.beat(node, b)
	h.cfg.Peers.Beat(node, b)
}

func (h *Hub) beat(node string, beat presence.Beat) {
	before, known := h.reg.Board.Get(node)
	if known && before.At.After(beat.At) {
		return // it took a longer way
	}
	h.reg.Board.Put(node, beat)
	if !known || before.State != beat.State || len(before.Problems) != len(beat.Problems) || beat.At.Sub(before.At) > presence.Timeout {
		h.wakeAllocation()
	}
}

// current returns an organization's view and signer, and a channel that closes at its next change.
func (h *Hub) current(ctx context.Context, name string) (*view.View, *policy.Signer, <-chan struct{}, error) {
	now := h.reg.Now()
	h.mu.Lock()
	o := h.orgLocked(name)
	if o.view != nil && now.Before(o.renew) && o.signs == o.view.PolicyCA {
		defer h.mu.Unlock()
		return o.view, o.signer, o.changed, nil
	}
	h.mu.Unlock()
	o.load.Lock()
	defer o.load.Unlock()
	h.mu.Lock()
	v, signer, renew, changed, generation := o.view, o.signer, o.renew, o.changed, o.generation
	h.mu.Unlock()
	if v == nil {
		if err := h.reg.Store.View(ctx, func(tx store.Tx) (err error) {
			v, err = view.Load(ctx, tx, h.reg.Seal, name, now)
			return err
		}); err != nil {
			return nil, nil, nil, err
		}
	}
	// A rotation of the policy CA has those who sign get a certificate by the new one.
	if signer == nil || !now.Before(renew) || identity.CertificateKeyHash(signer.Chain[1]) != v.PolicyCA {
		var err error
		if signer, err = h.reg.Signer(ctx, name); err != nil {
			return nil, nil, nil, err
		}
		renew = now.Add(pki.PolicyLife / 2)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	o.signer, o.renew, o.signs = signer, renew, identity.CertificateKeyHash(signer.Chain[1])
	o.version = max(o.version, v.Org.Version)
	if o.generation == generation {
		o.view = v // else a change came meanwhile; changed is closed, so the caller comes back
	}
	return v, signer, changed, nil
}

// Serve runs a node's control stream until ctx ends, the node loses its rights, a newer stream takes its place, or send fails. send is
// called from this goroutine alone, with an event (control.Event) as a line of JSON, and returns when it is written. The line is
// another node's afterwards.
func (h *Hub) Serve(ctx context.Context, who *registry.Session, send func(line []byte) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s := &stream{cancel: cancel, since: time.Now()}
	h.mu.Lock()
	if old := h.streams[who.Node.ID]; old != nil {
		old.cancel(ErrReplaced)
	}
	h.streams[who.Node.ID] = s
	h.mu.Unlock()
	h.metrics.streams.Inc()
	h.cfg.Peers.Opened(who.Node.ID)
	defer func() {
		h.metrics.streams.Dec()
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.streams[who.Node.ID] == s {
			delete(h.streams, who.Node.ID)
		}
	}()

	ping := time.NewTicker(control.PingInterval)
	defer ping.Stop()
	refresh := time.NewTimer(h.refreshIn())
	defer refresh.Stop()
	var last view.Sum // of what the node has; zero is nothing
	signed := make(view.Signed)
	expiry := h.credentialExpiry()
	if err := h.catchUp(ctx, who.Node.Org); err != nil {
		return err
	}
	for {
		v, signer, changed, err := h.current(ctx, who.Node.Org)
		if err != nil {
			return err
		}
		sum, there, err := v.Digest(who.Node.ID, expiry)
		if !there || !v.Speaks(who.Node.ID, who.Key) {
			return ErrDropped
		}
		if err != nil {
			return err
		}
		if sum != last {
			if err := h.configure(ctx, v, who.Node.ID, expiry, signer, signed, send); err != nil {
				return err
			}
			last = sum
			h.metrics.pushes.Inc()
		}
		has := v.Org.Version // since last was sent nothing changed for the node
		for wait := true; wait; {
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-ping.C:
				line, err := json.Marshal(control.Event{Type: control.EventPing, Version: has})
				if err == nil {
					err = send(append(line, '\n'))
				}
				if err != nil {
					return err
				}
			case <-refresh.C:
				last, wait = view.Sum{}, false // credentials and documents anew, although nothing changed
				clear(signed)
				expiry = h.credentialExpiry()
				refresh.Reset(h.refreshIn())
			case <-changed:
				select {
				case <-time.After(settle):
				case <-ctx.Done():
				}
				wait = false
			}
		}
	}
}

// Speaks reports whether a node has its rights by what is known here and now, without a look at the database. False is also that nothing is known.
func (h *Hub) Speaks(who *registry.Session) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	o := h.orgs[who.Node.Org]
	return o != nil && o.view != nil && o.view.Speaks(who.Node.ID, who.Key)
}

// job is a configuration to be made.
type job struct {
	do       func()
	done     chan struct{} // closed when it is done
	panicked any           // goes on in the goroutine that asked
}

// slow is how long sending a configuration may take before others need not wait for it any more.
const slow = 20 * time.Millisecond

// keptLine is the size of the largest buffer that is used again, in bytes. Gateways' configurations have MiB, and who reads slowly would hold one of them.
const keptLine = 256 << 10

// configure makes a node's configuration and sends it. A change may be for all nodes at once: few configurations are there at a time, and a few goroutines
// make them one after the other, so that the many nodes that wait cost little memory.
func (h *Hub) configure(ctx context.Context, v *view.View, node string, expiry time.Time, signer *policy.Signer, signed view.Signed, send func([]byte) error) error {
	select {
	case h.turns <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	leave := sync.OnceFunc(func() { <-h.turns })
	defer leave()
	line := h.lines.Get().(*[]byte)
	defer func() {
		if cap(*line) <= keptLine {
			h.lines.Put(line)
		}
	}()
	var err error
	j := &job{done: make(chan struct{}), do: func() {
		*line, err = v.AppendEvent((*line)[:0], node, expiry, view.Signing{Signer: signer, Now: h.reg.Now(), Life: h.cfg.DocumentLife, Kept: signed})
	}}
	h.jobs.Lock()
	h.queue = append(h.queue, j)
	if h.workers < runtime.GOMAXPROCS(0) {
		h.workers++
		go h.work()
	}
	h.jobs.Unlock()
	<-j.done
	if j.panicked != nil {
		panic(j.panicked)
	}
	if err != nil {
		return err
	}
	defer time.AfterFunc(slow, leave).Stop()
	return send(*line)
}

// work does what waits, and ends when nothing does.
func (h *Hub) work() {
	for {
		h.jobs.Lock()
		if len(h.queue) == 0 {
			h.queue = nil
			h.workers--
			h.jobs.Unlock()
			return
		}
		j := h.queue[0]
		h.queue = h.queue[1:]
		h.jobs.Unlock()
		func() {
			defer close(j.done)
			defer func() { j.panicked = recover() }()
			j.do()
		}()
	}
}

// refreshIn is when a stream makes its node's documents anew, spread so that not all do at once.
func (h *Hub) refreshIn() time.Duration {
	d := min(refreshMost, h.cfg.DocumentLife/2)
	if h.cfg.CredentialLife > 0 {
		d = min(d, h.cfg.CredentialLife/2)
	}
	return d - rand.N(d/10+1)
}

// credentialExpiry is when credentials made now expire; zero is with the node's certificate.
func (h *Hub) credentialExpiry() time.Time {
	if h.cfg.CredentialLife == 0 {
		return time.Time{}
	}
	return h.reg.Now().Add(h.cfg.CredentialLife)
}

// Run does what happens by itself, until ctx ends. Errors of the database are logged and tried again: the platform goes on from what it has.
func (h *Hub) Run(ctx context.Context) error {
	sweep, flush, house := time.NewTicker(sweepInterval), time.NewTicker(flushInterval), time.NewTicker(houseInterval)
	defer sweep.Stop()
	defer flush.Stop()
	defer house.Stop()
	looked := h.started
	kick, rest := h.kick, time.NewTimer(0)
	defer rest.Stop()
	led := false
	rotating := true         // a rotation of CAs is under way, or may be
	var rotateFrom time.Time // when rotations are looked at again
	// leads says whether the work below is this platform's, and begins it when that has just become so.
	leads := func() bool {
		now := h.cfg.Peers.Leads()
		if now && !led {
			h.rotate(ctx)
			h.moveRelays(ctx)
			if h.cfg.Peers != (alone{}) {
				h.allocate(ctx) // what happened while nobody did it
			}
		}
		led = now
		return now
	}
	leads()
	for {
		select {
		case <-ctx.Done():
			stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			err := h.reg.FlushRefusals(stop, true)
			if led {
				err = errors.Join(err, h.reg.Housekeeping(stop))
			}
			return err
		case <-kick:
			if leads() {
				h.allocate(ctx)
			}
			kick = nil
			rest.Reset(allocateRest)
		case <-rest.C:
			kick = h.kick
		case <-sweep.C:
			// Silence alone moves relays at two ages: of a heartbeat, or of this process, where none has come yet.
			now := h.reg.Now()
			from := looked
			looked = now
			if !leads() {
				continue
			}
			ages := []time.Duration{presence.Timeout, presence.Timeout + allocation.Patience}
			if h.reg.Board.Passed(from, now, ages...) || presence.Reached(h.started, from, now, ages...) {
				h.allocate(ctx)
			}
			if h.moves.Swap(false) || h.reg.MoveDue(now) {
				h.moveRelays(ctx)
			}
			// A rotation begins with a change. It asks for all nodes of its organization: with very many of them less often.
			if began := time.Now(); began.After(rotateFrom) && (h.news.Swap(false) || rotating) {
				var err error
				rotating, err = h.reg.AdvanceAuthorities(ctx)
				h.note(ctx, "rotate CAs", err)
				rotateFrom = time.Now().Add(rotateRest * time.Since(began))
			}
		case <-flush.C:
			h.note(ctx, "audit refusals", h.reg.FlushRefusals(ctx, false))
		case <-house.C:
			if !leads() {
				continue
			}
			h.note(ctx, "housekeeping", h.reg.Housekeeping(ctx))
			rotating = true
			h.warnExpiring(ctx)
			h.rotate(ctx)
			h.moveRelays(ctx)
			h.allocate(ctx)
		}
	}
}

func (h *Hub) note(ctx context.Context, what string, err error) {
	if err != nil && ctx.Err() == nil {
		h.cfg.Log.Error("background work failed, it is tried again", "what", what, "error", err)
	}
}

func (h *Hub) allocate(ctx context.Context) {
	orgs, err := h.reg.OrgNames(ctx)
	h.note(ctx, "list organizations", err)
	for _, o := range orgs {
		h.note(ctx, "assign relays", h.reg.Allocate(ctx, o, h.started))
	}
}

func (h *Hub) moveRelays(ctx context.Context) {
	h.reg.ForgetMoves()
	orgs, err := h.reg.OrgNames(ctx)
	h.note(ctx, "list organizations", err)
	for _, o := range orgs {
		h.note(ctx, "move relays to announced addresses", h.reg.MoveRelays(ctx, o))
	}
}

// warnExpiring tells of certificates that end soon.
func (h *Hub) warnExpiring(ctx context.Context) {
	if !h.reg.ExpiryDue() {
		return
	}
	orgs, err := h.reg.OrgNames(ctx)
	h.note(ctx, "list organizations", err)
	for _, o := range orgs {
		h.note(ctx, "look for certificates that end soon", h.reg.WarnExpiring(ctx, o))
	}
}

func (h *Hub) rotate(ctx context.Context) {
	orgs, err := h.reg.OrgNames(ctx)
	h.note(ctx, "list organizations", err)
	for _, o := range orgs {
		h.note(ctx, "rotate TURN keys", h.reg.RotateRelayKeys(ctx, o, h.cfg.KeyRotation))
	}
	h.note(ctx, "rotate TURN keys of shared relays", h.reg.RotateSharedKeys(ctx))
}

// Status is the HTTP status that tells why Serve ended before it sent anything.
func Status(err error) int {
	if errors.Is(err, ErrDropped) {
		return http.StatusForbidden
	}
	return http.StatusInternalServerError
}
