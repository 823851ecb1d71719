package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	mrand "math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
)

// ConnectedNodes is what nodes cost that are connected and tell how they are every ten seconds. Memory is platformd's, in bytes.
type ConnectedNodes struct {
	Nodes    int     `json:"nodes"`
	Relays   int     `json:"relays"`
	Gateways int     `json:"gateways"`
	Store    string  `json:"store"`
	Enrol    float64 `json:"enrol_seconds"` // creating and enrolling them by the API
	EnrolCPU Spent   `json:"enrol_cpu_seconds"`
	Fresh    int64   `json:"rss_before"` // enrolled, none connected

	Connect    float64 `json:"connect_seconds"` // all of them, begun within connectWithin
	ConnectCPU Spent   `json:"connect_cpu_seconds"`
	Steady     float64 `json:"steady_seconds"`
	SteadyCPU  Spent   `json:"steady_cpu_seconds"` // in that time
	Beats      int64   `json:"heartbeats"`
	Late       int64   `json:"heartbeats_failed"`
	RSS        int64   `json:"rss_steady"` // mean
	Peak       int64   `json:"rss_peak"`   // from the start of the platform to the end of the steady time
	Lost       int64   `json:"streams_lost"`
	ChangePeak int64   `json:"rss_peak_changes,omitempty"` // while policies changed
	Renewals   int     `json:"renewals"`                   // certificates renewed in the steady time, as so many nodes do
}

// PolicyChange is a change of policy until nodes have it: from the request to the API until a node has read the whole configuration.
type PolicyChange struct {
	What    string  `json:"what"`
	Runs    int     `json:"runs"`
	Nodes   int     `json:"nodes"` // that it concerns
	API     float64 `json:"api_ms"`
	Times   Waits   `json:"times"` // of all nodes of all runs
	Slowest float64 `json:"slowest_run_ms"`
	Bytes   float64 `json:"bytes_per_node"`
	CPU     Spent   `json:"cpu_seconds_per_run"`
}

// NodesReturn is what happens after a restart of the platform.
type NodesReturn struct {
	Nodes  int            `json:"nodes"`
	Down   float64        `json:"down_seconds"` // from SIGTERM until the platform is ready again
	Times  Waits          `json:"times"`        // of each node from then until its stream brought a configuration
	CPU    Spent          `json:"cpu_seconds"`
	Peak   int64          `json:"rss_peak"`
	Errors map[string]int `json:"errors,omitempty"` // since SIGTERM, by kind; before the platform is back they are its absence
	After  map[string]int `json:"errors_after_return,omitempty"`
}

const (
	connectWithin = 20 * time.Second // nodes begin at random within it, so that connecting is no burst
	connectMost   = 5 * time.Minute
	teamSize      = 200
)

// nodes connects nodes, changes policies and restarts the platform.
func (m *platformMeasure) nodes(ctx context.Context) (err error) {
	store := m.cfg.Stores[0]
	p, err := m.newPlatform(ctx, store)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	relays, gateways := max(2, m.cfg.Nodes/1000), max(4, m.cfg.Nodes/100)
	m.tell("%d nodes: creating and enrolling them (%s)", m.cfg.Nodes, store)
	res := &ConnectedNodes{Nodes: m.cfg.Nodes, Relays: relays, Gateways: gateways, Store: store}
	start, before := time.Now(), p.spent()
	f, err := newFleet(ctx, p, relays, gateways, m.cfg.Nodes-relays-gateways)
	if err != nil {
		return err
	}
	res.Enrol, res.EnrolCPU = time.Since(start).Seconds(), p.spent().minus(before)
	m.tell("enrolled in %.1f s, %.1f s CPU of platformd", res.Enrol, res.EnrolCPU.Platform)
	l, err := p.link(nil)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := f.furnish(ctx, l, gateways); err != nil {
		return err
	}
	// As a platform that has run for a while: the one that enrolled them all is still warm with that.
	if err := errors.Join(p.stop(syscall.SIGTERM), p.start(ctx)); err != nil {
		return err
	}
	res.Fresh, _ = p.memory()

	running, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	f.count()
	start, before = time.Now(), p.spent()
	for _, n := range f.all {
		begin := mrand.N(connectWithin) //nolint:gosec // no secret
		wg.Go(func() { n.run(running, begin) })
	}
	if err := f.awaitAll(ctx, connectMost); err != nil {
		return err
	}
	res.Connect, res.ConnectCPU = time.Since(start).Seconds(), p.spent().minus(before)
	m.tell("all connected after %.1f s, %.1f s CPU of platformd", res.Connect, res.ConnectCPU.Platform)
	m.res.Nodes = res
	wait(ctx, 2*control.HeartbeatInterval) // what connecting needed is given back
	if err := m.steady(ctx, p, f, res); err != nil {
		return err
	}
	if m.wants(PartPolicy) {
		if err := m.changes(ctx, p, f, l, gateways); err != nil {
			return err
		}
		_, res.ChangePeak = p.memory()
	}
	if m.wants(PartNodes) {
		if m.res.Return, err = m.comeBack(ctx, p, f); err != nil {
			return err
		}
	}
	return nil
}

// furnish makes resources and policies: some for everybody, some for a team each. The last four gateways serve nothing yet.
func (f *fleet) furnish(ctx context.Context, l *link.Link, gateways int) error {
	if err := f.group(ctx, l, "everybody", f.members); err != nil {
		return err
	}
	for i := range 5 {
		name := fmt.Sprintf("common-%d", i)
		if err := errors.Join(f.resource(ctx, l, name, i%2, 2+i%2), f.allow(ctx, l, "group:everybody", name)); err != nil {
			return err
		}
	}
	clients := f.members[gateways:]
	usual := max(1, gateways-4)
	for i := 0; i*teamSize < len(clients); i++ {
		team := fmt.Sprintf("team-%d", i)
		if err := f.group(ctx, l, team, clients[i*teamSize:min(len(clients), (i+1)*teamSize)]); err != nil {
			return err
		}
		for j := range 2 {
			name := fmt.Sprintf("%s-%d", team, j)
			if err := errors.Join(f.resource(ctx, l, name, (2*i+j)%usual), f.allow(ctx, l, "group:"+team, name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// steady looks at memory and processor time while nothing changes but what changes by itself: nodes renew their certificates, each twice a day.
func (m *platformMeasure) steady(ctx context.Context, p *controlPlane, f *fleet, res *ConnectedNodes) error {
	start, before, beats, late := time.Now(), p.spent(), f.beats.Load(), f.late.Load()
	f.count()
	var sum, samples int64
	pace := control.LeafLife / 2 / time.Duration(len(f.all))
	renewed := start
	for time.Since(start) < m.cfg.Steady && ctx.Err() == nil {
		wait(ctx, 500*time.Millisecond)
		now, _ := p.memory()
		sum, samples = sum+now, samples+1
		if time.Since(renewed) >= pace {
			renewed = renewed.Add(pace)
			if err := f.all[mrand.N(len(f.all))].renew(ctx); err != nil { //nolint:gosec // no secret
				return err
			}
			res.Renewals++
		}
	}
	_, res.Peak = p.memory()
	res.Steady, res.SteadyCPU = time.Since(start).Seconds(), p.spent().minus(before)
	res.Beats, res.Late, res.RSS = f.beats.Load()-beats, f.late.Load()-late, sum/max(1, samples)
	f.mu.Lock()
	for _, n := range f.errors {
		res.Lost += int64(n)
	}
	f.mu.Unlock()
	m.tell("steady: %.0f MiB, at most %.0f; platformd %.2f of a core, this load %.2f", mib(res.RSS), mib(res.Peak), res.SteadyCPU.Platform/res.Steady, res.SteadyCPU.Load/res.Steady)
	return context.Cause(ctx)
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }

// changes measures changes of policy.
func (m *platformMeasure) changes(ctx context.Context, p *controlPlane, f *fleet, l *link.Link, gateways int) error {
	if err := p.forgetPeak(); err != nil {
		return err
	}
	kinds := []struct {
		what   string
		serves [2]int
	}{
		{"a policy of a resource behind gateways that everybody uses", [2]int{0, 1}},
		{"a policy of a resource behind two gateways that nobody used before", [2]int{gateways - 2, gateways - 1}},
	}
	took := make([]PolicyChange, len(kinds)+1)
	times := make([][]time.Duration, len(took))
	one := func(i int, what, resource string, gone bool, serving [2]int, request func() error) error {
		w, err := m.change(ctx, p, f, resource, gone, serving, request, &took[i])
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		took[i].What = what
		times[i] = append(times[i], w...)
		return nil
	}
	for run := range changeRuns {
		for i, k := range kinds {
			name := fmt.Sprintf("changed-%d-%d", i, run)
			if err := f.resource(ctx, l, name, k.serves[:]...); err != nil {
				return err
			}
			wait(ctx, 3*time.Second)
			if err := one(i, k.what, name, false, k.serves, func() error { return f.allow(ctx, l, "group:everybody", name) }); err != nil {
				return err
			}
		}
		for i, k := range kinds {
			name := fmt.Sprintf("changed-%d-%d", i, run)
			remove := func() error { return p.admin(ctx, l, http.MethodDelete, "/orgs/default/policies/"+name, nil, nil) }
			wait(ctx, 3*time.Second)
			if err := one(len(kinds), "a policy is deleted", name, true, k.serves, remove); err != nil {
				return err
			}
		}
	}
	for i := range took {
		took[i].Times = sumWaits(times[i])
		runs := float64(took[i].Runs)
		took[i].API, took[i].Bytes = took[i].API/runs, took[i].Bytes/runs
		took[i].CPU = Spent{took[i].CPU.Platform / runs, took[i].CPU.Database / runs, took[i].CPU.Load / runs}
		m.tell("%s: %v ms (p50 / p99 / max) at %d nodes, %.2f s CPU of platformd, %.2f of the load", took[i].What, took[i].Times, took[i].Nodes, took[i].CPU.Platform, took[i].CPU.Load)
	}
	m.res.Changes = took
	return nil
}

// change makes one change and waits until every member has it.
func (m *platformMeasure) change(ctx context.Context, p *controlPlane, f *fleet, resource string, gone bool, serving [2]int, request func() error, sum *PolicyChange) ([]time.Duration, error) {
	w := &lookout{
		mark: []byte(`"` + resource + `.`), gone: gone, any: make(map[int]bool), done: make(chan struct{}), seen: make([]atomic.Int64, len(f.all)), begin: time.Now(),
	}
	w.newer = f.newest.Load() // what comes later is newer: nothing else changes now
	for _, g := range serving {
		w.any[f.members[g].n] = true
	}
	for _, r := range f.relays {
		w.seen[r.n].Store(math.MaxInt64)
	}
	w.left.Store(int64(len(f.members)))
	before := p.spent()
	w.begin = time.Now()
	f.watched.Store(w)
	defer f.watched.Store(nil)
	if err := request(); err != nil {
		return nil, err
	}
	sum.API += ms(time.Since(w.begin))
	const most = 2 * time.Minute
	select {
	case <-w.done:
	case <-time.After(most):
		return nil, fmt.Errorf("%d of %d nodes have not heard of it after %v", w.left.Load(), len(f.members), most)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	spent := p.spent().minus(before)
	sum.CPU = Spent{sum.CPU.Platform + spent.Platform, sum.CPU.Database + spent.Database, sum.CPU.Load + spent.Load}
	sum.Runs++
	sum.Nodes = len(f.members)
	sum.Bytes += float64(w.bytes.Load()) / float64(max(1, w.entries.Load()))
	var times []time.Duration
	var slowest time.Duration
	for _, n := range f.members {
		d := time.Duration(w.seen[n.n].Load())
		times, slowest = append(times, d), max(slowest, d)
	}
	sum.Slowest = max(sum.Slowest, ms(slowest))
	return times, nil
}

// comeBack restarts the platform under its nodes.
func (m *platformMeasure) comeBack(ctx context.Context, p *controlPlane, f *fleet) (*NodesReturn, error) {
	r := &NodesReturn{Nodes: len(f.all)}
	f.count()
	start := time.Now()
	if err := errors.Join(p.stop(syscall.SIGTERM), p.start(ctx)); err != nil {
		return nil, err
	}
	r.Down = time.Since(start).Seconds()
	f.mu.Lock()
	r.Errors = f.errors
	f.mu.Unlock()
	f.count()
	load := p.spent()
	load.Platform = 0 // the process is new
	if err := f.awaitAll(ctx, connectMost); err != nil {
		return nil, err
	}
	r.CPU = p.spent().minus(load)
	_, r.Peak = p.memory()
	f.mu.Lock()
	defer f.mu.Unlock()
	r.Times, r.After = sumWaits(f.joined), f.errors
	m.tell("restart: down for %.1f s, nodes back after %v ms (p50 / p99 / max), %.1f s CPU of platformd, %.0f MiB at most; errors after: %v", r.Down, r.Times, r.CPU.Platform, mib(r.Peak), r.After)
	return r, nil
}

// renew renews the node's certificate for the same key, as nodes do.
func (n *fleetNode) renew(ctx context.Context) error {
	bearer, err := n.token(ctx)
	if err != nil {
		return err
	}
	req, err := n.renewal()
	if err != nil {
		return err
	}
	var out control.RenewResponse
	if err := n.link.Do(ctx, link.Request{Method: http.MethodPost, Path: "/api/v1/node/renew", Bearer: bearer, JSON: req}, &out); err != nil {
		return err
	}
	if !bytes.Contains([]byte(out.Certificates.Leaf), []byte("BEGIN CERTIFICATE")) {
		return errors.New("no certificate in the answer to a renewal")
	}
	return nil
}
