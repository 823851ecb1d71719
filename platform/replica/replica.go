// Package replica lets platforms that share a database act as one: what changes in one is pushed by all, the newest heartbeat of a node is known
// everywhere, one of them does the periodic jobs.
//
//	g, err := replica.New(replica.Config{Store: st, Seal: seal, Redis: url, Address: addr, Log: log})
//	g.Join(hub)
//	err = g.Run(ctx)
//
// They talk through Redis: one channel on which each publishes what happened, and a hash with the newest heartbeats for those that come
// later. Every message is sealed under the platform's data key: Redis is not trusted with what it carries, and can not forge it. Nothing depends on
// Redis alone. Changes are in the database with a version, which every replica looks at every few seconds, each second while Redis is away; then
// heartbeats and the lease of the periodic jobs go through the database, too. Without Redis that is how replicas live.
//
// In Redis, under sallyway:<id of the platform>: the channel events, the hash beats, the string lease:jobs.
package replica

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"sallyway/internal/control"
	"sallyway/platform/pki"
	"sallyway/platform/presence"
	"sallyway/platform/store"
)

// DeadAfter is how long after it was last seen a replica counts as gone.
const DeadAfter = 5 * showEvery

// Intervals.
const (
	pollAlone  = time.Second     // versions are looked at while Redis is away
	pollBoth   = 5 * time.Second // and while it is there, for a message that was lost
	showEvery  = 2 * time.Second // a replica writes down that it lives
	leaseEvery = 2 * time.Second
	leaseLife  = 6 * time.Second
	// beatsBack is how far back heartbeats are read from the database: what was written down and not read yet, with clocks that differ a little.
	beatsBack    = 30 * time.Second
	purgeAfter   = 10 * time.Minute
	leaseMargin  = time.Second // before its end a lease counts as lost
	redisTimeout = 3 * time.Second
	dbTimeout    = 10 * time.Second
	// queueMost bounds what waits for Redis. Beyond it events are dropped and counted: the versions in the database tell the rest.
	queueMost = 10_000
)

// jobs is the name of the lease of the periodic jobs.
const jobs = "jobs"

// Local is this process. Its methods do not block, and do not tell the group what they were told.
type Local interface {
	// RemoteChanged says that what nodes of org are told has changed, to a version; one that is known already is no news.
	RemoteChanged(org string, version uint64)
	// RemoteDropped says that a node lost its rights.
	RemoteDropped(node string)
	// RemoteOpened says that a node has opened a control stream at another replica.
	RemoteOpened(node string)
	// RemoteBeat says that a node sent a heartbeat to another replica.
	RemoteBeat(node string, b presence.Beat)
	// RemoteRefused says that another replica refused a source (an address) something.
	RemoteRefused(source string)
	// Streams is how many control streams there are.
	Streams() int
}

// Config is what a Group needs.
type Config struct {
	Store   store.Store
	Seal    *pki.Sealer
	Redis   string // URL; empty is none: replicas talk by the database alone
	Address string // where this replica listens, for people
	Log     *slog.Logger
	Now     func() time.Time
	Metrics prometheus.Registerer
}

// Group is this process's place among the replicas. Methods may be called concurrently.
type Group struct {
	cfg   Config
	id    string
	start time.Time
	redis *redisLink // nil without Redis
	local Local

	leads atomic.Int64 // until when, in Unix microseconds

	mu       sync.Mutex
	events   []event           // that wait for Redis; guarded by mu
	beats    map[string]event  // the newest of each node, that wait; guarded by mu
	unsaved  map[string]event  // that are not in the database; guarded by mu
	others   []*store.Replica  // that lived a moment ago; guarded by mu
	wake     chan struct{}     // capacity 1
	versions map[string]uint64 // of organizations as the database had them; only the poller's

	dropped prometheus.Counter
}

// event is something that happened. The names of its fields are short because there are many.
type event struct {
	Kind    string             `json:"k"`
	Name    string             `json:"n"` // organization, node or source
	Version uint64             `json:"v,omitempty"`
	At      int64              `json:"t,omitempty"` // Unix microseconds
	Beat    *control.Heartbeat `json:"b,omitempty"`
}

// Kinds of events.
const (
	changed = "changed"
	dropped = "dropped"
	opened  = "opened"
	beat    = "beat"
	refused = "refused"
)

// message is what goes over the channel.
type message struct {
	From   string  `json:"f"`
	Events []event `json:"e"`
}

// New prepares a group; Join and Run follow. A Redis that is away is no error.
func New(cfg Config) (*Group, error) {
	g := &Group{
		cfg: cfg, id: randomID(), start: cfg.Now(), beats: make(map[string]event), unsaved: make(map[string]event),
		wake: make(chan struct{}, 1), versions: make(map[string]uint64),
		dropped: prometheus.NewCounter(prometheus.CounterOpts{Name: "sallyway_platform_replica_events_dropped_total", Help: "Events that did not reach Redis; other replicas find them in the database."}),
	}
	cfg.Metrics.MustRegister(g.dropped,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "sallyway_platform_redis_connected", Help: "1 when replicas talk through Redis."}, func() float64 { return number(g.Connected()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "sallyway_platform_replica_leads", Help: "1 when this replica does the periodic jobs."}, func() float64 { return number(g.Leads()) }))
	if cfg.Redis != "" {
		var err error
		if g.redis, err = openRedis(cfg.Redis); err != nil {
			return nil, err
		}
	}
	return g, nil
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func randomID() string {
	b := make([]byte, 8)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return hex.EncodeToString(b)
}

// Join says who is told. It is called once, before Run.
func (g *Group) Join(l Local) { g.local = l }

// Changed, Dropped, Opened, Beat and Refused tell the others.

// Changed tells that what nodes of org are told has changed.
func (g *Group) Changed(org string, version uint64) {
	g.tell(event{Kind: changed, Name: org, Version: version})
}

// Dropped tells that a node lost its rights.
func (g *Group) Dropped(node string) { g.tell(event{Kind: dropped, Name: node}) }

// Opened tells that a node has a control stream here.
func (g *Group) Opened(node string) { g.tell(event{Kind: opened, Name: node}) }

// Refused tells that a source was refused something.
func (g *Group) Refused(source string) { g.tell(event{Kind: refused, Name: source}) }

// Beat tells a node's heartbeat.
func (g *Group) Beat(node string, b presence.Beat) {
	g.tell(event{Kind: beat, Name: node, At: b.At.UnixMicro(), Beat: &b.Heartbeat})
}

func (g *Group) tell(e event) {
	g.mu.Lock()
	if e.Kind == beat {
		g.unsaved[e.Name] = e
	}
	switch {
	case g.redis == nil || !g.redis.up.Load():
		if e.Kind != beat {
			g.dropped.Inc()
		}
	case e.Kind == beat:
		g.beats[e.Name] = e
	case len(g.events) >= queueMost:
		g.dropped.Inc()
	default:
		g.events = append(g.events, e)
	}
	g.mu.Unlock()
	select {
	case g.wake <- struct{}{}:
	default: // one wake-up waits already
	}
}

// take returns what waits.
func (g *Group) take() (events []event, beats []event) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, e := range g.beats {
		beats = append(beats, e)
	}
	clear(g.beats)
	events, g.events = g.events, nil
	return events, beats
}

// hear hands on what another replica told.
func (g *Group) hear(e event) {
	switch e.Kind {
	case changed:
		g.local.RemoteChanged(e.Name, e.Version)
	case dropped:
		g.local.RemoteDropped(e.Name)
	case opened:
		g.local.RemoteOpened(e.Name)
	case refused:
		g.local.RemoteRefused(e.Name)
	case beat:
		if e.Beat != nil {
			g.local.RemoteBeat(e.Name, presence.Beat{At: time.UnixMicro(e.At), Heartbeat: *e.Beat})
		}
	} // a newer replica's event is nothing to this one
}

// Leads says whether this replica does the periodic jobs.
func (g *Group) Leads() bool { return g.cfg.Now().UnixMicro() < g.leads.Load() }

// Connected says whether the replicas talk through Redis now.
func (g *Group) Connected() bool { return g.redis != nil && g.redis.up.Load() }

// States of Redis.
const (
	Connected = "connected"
	Away      = "away"
)

// Status is what is known of the replicas.
type Status struct {
	ID       string  `json:"id"`
	Leads    bool    `json:"leads"`           // does the periodic jobs
	Redis    string  `json:"redis,omitempty"` // Connected or Away; empty without one
	Replicas []Known `json:"replicas"`
}

// Known is a replica that lives.
type Known struct {
	ID      string    `json:"id"`
	Address string    `json:"address"`
	Started time.Time `json:"started"`
	Seen    time.Time `json:"seen"`
	Streams int       `json:"streams"` // nodes that it holds a control stream of
}

// Status returns what is known of the replicas, this one first.
func (g *Group) Status() Status {
	s := Status{ID: g.id, Leads: g.Leads(), Replicas: []Known{{ID: g.id, Address: g.cfg.Address, Started: g.start, Seen: g.cfg.Now(), Streams: g.local.Streams()}}}
	if g.redis != nil {
		s.Redis = Away
		if g.redis.up.Load() {
			s.Redis = Connected
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, r := range g.others {
		s.Replicas = append(s.Replicas, Known{ID: r.ID, Address: r.Address, Started: r.Started, Seen: r.Seen, Streams: r.Streams})
	}
	return s
}

// Run takes part until ctx ends, and then gives back the lease.
func (g *Group) Run(ctx context.Context) error {
	platform, err := g.platform(ctx)
	if err != nil {
		return err
	}
	w, ctx := errgroup.WithContext(ctx)
	if g.redis != nil {
		g.redis.prefix = "sallyway:" + platform + ":"
		w.Go(func() error { return g.receive(ctx) })
		w.Go(func() error { return g.send(ctx) })
	}
	w.Go(func() error { return g.poll(ctx) })
	w.Go(func() error { return g.lease(ctx) })
	err = w.Wait()
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), dbTimeout)
	defer cancel()
	return errors.Join(err, g.leave(stop))
}

// platformMeta is the key under which the database has the platform's id: several may share a Redis.
const platformMeta = "platform-id"

func (g *Group) platform(ctx context.Context) (id string, err error) {
	err = g.cfg.Store.Update(ctx, func(tx store.Tx) error {
		b, err := tx.Meta(ctx, platformMeta)
		if errors.Is(err, store.ErrNotFound) {
			id = randomID()
			return tx.PutMeta(ctx, platformMeta, []byte(id))
		}
		id = string(b)
		return err
	})
	return id, err
}

// poll looks at the database for what no message told.
func (g *Group) poll(ctx context.Context) error {
	t := time.NewTicker(pollAlone)
	defer t.Stop()
	var polled, shown time.Time
	failing := false
	for {
		now := time.Now()
		var err error
		if !g.Connected() || now.Sub(polled) >= pollBoth {
			polled = now
			err = g.look(ctx)
		}
		if now.Sub(shown) >= showEvery {
			shown = now
			err = errors.Join(err, g.show(ctx))
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && !failing {
			g.cfg.Log.Error("the database does not tell what other replicas do, it is tried again", "error", err)
		}
		failing = err != nil
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		case <-g.lookNow():
			polled = time.Time{}
		}
	}
}

// lookNow is signalled when Redis came or went: what happened between is in the database.
func (g *Group) lookNow() <-chan struct{} {
	if g.redis == nil {
		return nil
	}
	return g.redis.turned
}

// look compares the versions of the organizations.
func (g *Group) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	var orgs []*store.Org
	if err := g.cfg.Store.View(ctx, func(tx store.Tx) (err error) {
		orgs, err = tx.Orgs(ctx, store.Page{})
		return err
	}); err != nil {
		return err
	}
	for _, o := range orgs {
		if g.versions[o.Name] != o.Version {
			g.versions[o.Name] = o.Version
			g.local.RemoteChanged(o.Name, o.Version)
		}
	}
	return nil
}

// show writes down that this replica lives, and reads who else does. While Redis is away it exchanges heartbeats in the same way.
func (g *Group) show(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	now := g.cfg.Now().UTC().Truncate(time.Microsecond)
	me := &store.Replica{ID: g.id, Address: g.cfg.Address, Started: g.start, Seen: now, Streams: g.local.Streams()}
	away := !g.Connected()
	g.mu.Lock()
	var mine []*store.Beat
	if away && len(g.others) > 0 {
		for _, e := range g.unsaved {
			b, err := json.Marshal(e.Beat)
			if err != nil {
				continue // what came as JSON goes as JSON
			}
			mine = append(mine, &store.Beat{Node: e.Name, Replica: g.id, At: time.UnixMicro(e.At), Beat: b})
		}
	}
	if !away {
		clear(g.unsaved) // Redis has them
	}
	g.mu.Unlock()
	var all []*store.Replica
	if err := g.cfg.Store.Update(ctx, func(tx store.Tx) (err error) {
		if err := errors.Join(tx.PutReplica(ctx, me), tx.PutBeats(ctx, mine)); err != nil {
			return err
		}
		if g.Leads() {
			if err := tx.PurgeReplicas(ctx, now.Add(-purgeAfter)); err != nil {
				return err
			}
		}
		all, err = tx.Replicas(ctx)
		return err
	}); err != nil {
		return err
	}
	g.mu.Lock()
	for _, b := range mine {
		if e := g.unsaved[b.Node]; e.At == b.At.UnixMicro() {
			delete(g.unsaved, b.Node)
		}
	}
	g.others = nil
	for _, r := range all {
		if r.ID != g.id && now.Sub(r.Seen) < DeadAfter {
			g.others = append(g.others, r)
		}
	}
	alone := len(g.others) == 0
	g.mu.Unlock()
	if !away || alone {
		return nil
	}
	var theirs []*store.Beat
	if err := g.cfg.Store.View(ctx, func(tx store.Tx) (err error) {
		theirs, err = tx.Beats(ctx, now.Add(-beatsBack), g.id)
		return err
	}); err != nil {
		return err
	}
	for _, b := range theirs {
		e := event{Kind: beat, Name: b.Node, At: b.At.UnixMicro()}
		if err := json.Unmarshal(b.Beat, &e.Beat); err != nil {
			return fmt.Errorf("heartbeat of %s: %w", b.Node, err)
		}
		g.hear(e)
	}
	return nil
}

// lease takes the lease of the periodic jobs when it is free, and keeps it.
func (g *Group) lease(ctx context.Context) error {
	t := time.NewTicker(leaseEvery)
	defer t.Stop()
	for {
		now := g.cfg.Now()
		ok, err := g.tryLease(ctx, now)
		if err == nil { // else it runs out, unless the next try comes before
			until := int64(0)
			if ok {
				until = now.Add(leaseLife - leaseMargin).UnixMicro()
			}
			if was := g.leads.Swap(until); (was > now.UnixMicro()) != ok {
				g.cfg.Log.Info("periodic jobs", "replica", g.id, "here", ok)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

func (g *Group) tryLease(ctx context.Context, now time.Time) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, leaseEvery+time.Second)
	defer cancel()
	if g.Connected() {
		if ok, err := g.redis.lease(ctx, jobs, g.id, leaseLife); err == nil {
			return ok, nil
		}
	}
	var ok bool
	err := g.cfg.Store.Update(ctx, func(tx store.Tx) (err error) {
		ok, err = tx.TakeLease(ctx, jobs, g.id, now.UTC(), now.UTC().Add(leaseLife))
		return err
	})
	return ok, err
}

// leave gives back what this replica holds, so that the others need not wait.
func (g *Group) leave(ctx context.Context) error {
	g.leads.Store(0)
	var err error
	if g.redis != nil {
		if g.redis.up.Load() {
			_ = g.redis.drop(ctx, jobs, g.id) // it runs out by itself
		}
		err = g.redis.client.Close()
	}
	return errors.Join(err, g.cfg.Store.Update(ctx, func(tx store.Tx) error {
		return errors.Join(tx.DropReplica(ctx, g.id), tx.DropLease(ctx, jobs, g.id))
	}))
}
