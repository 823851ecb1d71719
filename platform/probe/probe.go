// Package probe tries relays from outside, as nodes reach them: STUN over UDP, a TLS handshake on the same port, and the two ports of the last
// rung. A relay whose heartbeats arrive and that nobody reaches is shown as degraded, with what helps.
//
// A relay's address is what an administrator of an organization typed, and its name is whoever's DNS: so names are resolved once for a look, each
// address is judged, and one that passed is dialled as it is. Addresses that are not of the Internet are dialled only where the operator says
// so (Mode). What comes back is read up to a line and shown to nobody but as good or bad.
//
// One platform of several looks; all read what it found from the database.
package probe

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/control"
	"sallyway/platform/registry"
)

// Intervals.
const (
	interval = 30 * time.Second // between two looks at a relay, give or take a tenth
	spread   = 8 * time.Second  // over which the looks of a round begin, and until what was lost is looked at once more
	refresh  = 10 * time.Second // what was found is read
	patience = 3 * time.Second  // for one port
	again    = time.Second      // until what failed is tried once more
	writing  = 10 * time.Second
	abreast  = 16 // relays that are looked at side by side
)

// Resolver finds the addresses of a name. *net.Resolver is one.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// Config is what a Prober needs. Registry and Log are required.
type Config struct {
	Registry *registry.Registry
	Log      *slog.Logger
	Mode     Mode
	// Leads says whether this platform is the one that looks; nil is always.
	Leads    func() bool
	Resolver Resolver              // nil is the system's
	Metrics  prometheus.Registerer // nil is none

	interval, spread, refresh, patience, again time.Duration // zero are the constants; for tests
	first                                      time.Duration // until the first round, besides; for tests
	// gate sees every address right before something is sent there, and may refuse; nil judges it once more.
	gate func(netip.AddrPort) error
}

// Prober looks at relays.
type Prober struct {
	cfg    Config
	looks  *prometheus.CounterVec
	warned map[string]bool // kinds of check that fail everywhere; the loop's own
}

// New returns a Prober. It starts nothing.
func New(cfg Config) *Prober {
	for _, d := range []struct {
		v         *time.Duration
		otherwise time.Duration
	}{{&cfg.interval, interval}, {&cfg.spread, spread}, {&cfg.refresh, refresh}, {&cfg.patience, patience}, {&cfg.again, again}} {
		if *d.v == 0 {
			*d.v = d.otherwise
		}
	}
	if cfg.Mode == "" {
		cfg.Mode = Auto
	}
	if cfg.Leads == nil {
		cfg.Leads = func() bool { return true }
	}
	if cfg.Resolver == nil {
		cfg.Resolver = net.DefaultResolver
	}
	if cfg.gate == nil {
		mode := cfg.Mode
		cfg.gate = func(at netip.AddrPort) error {
			if what := mode.refused(at.Addr()); what != "" {
				return fmt.Errorf("%v is %s", at, what)
			}
			return nil
		}
	}
	p := &Prober{cfg: cfg, warned: make(map[string]bool), looks: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sallyway_platform_relay_probes_total", Help: "Looks at relays from outside, by what was found.",
	}, []string{"state"})}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(p.looks, &outsideNow{cfg.Registry})
	}
	return p
}

// Run looks until ctx ends. Errors of the database are logged, and it goes on.
func (p *Prober) Run(ctx context.Context) error {
	if p.cfg.Mode == Off {
		<-ctx.Done()
		return nil
	}
	read := time.NewTicker(p.cfg.refresh)
	defer read.Stop()
	look := time.NewTimer(p.cfg.first + rand.N(p.cfg.spread+1))
	defer look.Stop()
	returning := p.cfg.Registry.Board.Returning()
	var gathered <-chan time.Time // those that return together are looked at together
	p.note(ctx, "read what was found of relays", p.cfg.Registry.LoadOutside(ctx))
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-read.C:
			if !p.cfg.Leads() { // who looks knows already
				p.note(ctx, "read what was found of relays", p.cfg.Registry.LoadOutside(ctx))
			}
		case <-returning:
			if gathered == nil {
				gathered = time.After(p.cfg.again)
			}
		case <-gathered:
			gathered = nil
			if ids := p.cfg.Registry.Board.TakeReturned(); p.cfg.Leads() {
				p.back(ctx, ids)
			}
		case <-look.C:
			if p.cfg.Leads() {
				p.round(ctx)
			}
			look.Reset(p.cfg.interval - p.cfg.interval/10 + rand.N(p.cfg.interval/5+1))
		}
	}
}

func (p *Prober) note(ctx context.Context, what string, err error) {
	if err != nil && ctx.Err() == nil {
		p.cfg.Log.Error("background work failed, it is tried again", "what", what, "error", err)
	}
}

// round looks at every relay once and writes down what was found.
func (p *Prober) round(ctx context.Context) {
	targets, err := p.cfg.Registry.RelayTargets(ctx)
	if err != nil {
		p.note(ctx, "list relays to look at", err)
		return
	}
	// A relay that was well is looked at once more before it is called otherwise: it may just start anew.
	now := p.cfg.Registry.Now()
	found := p.examine(ctx, targets, p.cfg.spread, func(relay string) bool {
		was, ok := p.cfg.Registry.Board.Outside(relay, now)
		return ok && was.State == control.OutsideReached
	})
	if ctx.Err() != nil {
		return // what was found says more about this platform than about relays
	}
	p.forgive(found)
	p.write(ctx, targets, found, p.cfg.Registry.FoundOutside)
}

// back looks at relays that are heard anew, without waiting for the next round.
func (p *Prober) back(ctx context.Context, ids []string) {
	targets, err := p.cfg.Registry.RelayTargets(ctx)
	if err != nil {
		p.note(ctx, "list relays to look at", err)
		return
	}
	targets = slices.DeleteFunc(targets, func(t registry.RelayTarget) bool { return !slices.Contains(ids, t.Node.ID) })
	if len(targets) == 0 {
		return
	}
	found := p.examine(ctx, targets, 0, func(string) bool { return true })
	if ctx.Err() != nil {
		return
	}
	for i := range found {
		for k := range found[i].checks {
			if c := &found[i].checks[k]; p.warned[c.kind] { // in the last round, which saw all
				c.forgiven = c.err != nil
			}
		}
	}
	p.write(ctx, targets, found, p.cfg.Registry.FoundOutsideOf)
}

// examine looks at targets, and a while later once more at those that it did not reach and that again says yes to.
func (p *Prober) examine(ctx context.Context, targets []registry.RelayTarget, spread time.Duration, again func(relay string) bool) []look {
	found := make([]look, len(targets))
	everything := make([]int, len(targets))
	for i := range everything {
		everything[i] = i
	}
	p.pass(ctx, targets, found, everything, spread)
	var lost []int
	for i := range targets {
		s := found[i].outcome(&targets[i]).State
		if s != control.OutsideReached && s != control.OutsideNotProbed && again(targets[i].Node.ID) {
			lost = append(lost, i)
		}
	}
	if len(lost) > 0 {
		select {
		case <-ctx.Done():
		case <-time.After(p.cfg.spread):
		}
		p.pass(ctx, targets, found, lost, spread)
	}
	return found
}

func (p *Prober) write(ctx context.Context, targets []registry.RelayTarget, found []look, to func(context.Context, map[string]control.Outside) error) {
	out := make(map[string]control.Outside, len(targets))
	for i := range targets {
		o := found[i].outcome(&targets[i])
		out[targets[i].Node.ID] = o
		p.looks.WithLabelValues(string(o.State)).Inc()
	}
	ctx, cancel := context.WithTimeout(ctx, writing)
	defer cancel()
	p.note(ctx, "write down what was found of relays", to(ctx, out))
}

// pass looks at some of the targets, by their place, within spread, and puts what it found there.
func (p *Prober) pass(ctx context.Context, targets []registry.RelayTarget, found []look, which []int, spread time.Duration) {
	slots := make(chan struct{}, abreast)
	var wg sync.WaitGroup
	for _, i := range which {
		wg.Go(func() {
			select {
			case <-ctx.Done():
				return
			case <-time.After(rand.N(spread + 1)):
			}
			slots <- struct{}{}
			defer func() { <-slots }()
			at := p.cfg.Registry.Now()
			found[i] = p.look(ctx, &targets[i])
			found[i].at = at
		})
	}
	wg.Wait()
}

// enough is of how many relays a check has to fail, and of all of them, to be this platform's own fault.
const enough = 3

// forgive leaves out checks that fail at every relay: then it is this platform that has no way out by that protocol.
func (p *Prober) forgive(all []look) {
	type tally struct{ tried, failed int }
	kinds := make(map[string]*tally)
	for _, l := range all {
		for _, c := range l.checks {
			t := kinds[c.kind]
			if t == nil {
				t = new(tally)
				kinds[c.kind] = t
			}
			t.tried++
			if c.err != nil {
				t.failed++
			}
		}
	}
	for kind, t := range kinds {
		own := t.tried >= enough && t.failed == t.tried
		if own && !p.warned[kind] {
			p.cfg.Log.Warn("no relay answers this platform; that is taken for its own network's doing", "check", kind, "relays", t.tried,
				"remedy", "let this host reach relays by "+kind+", or turn looks from outside off: --probe-relays off")
		}
		p.warned[kind] = own
		if !own {
			continue
		}
		for i := range all {
			for k := range all[i].checks {
				if c := &all[i].checks[k]; c.kind == kind {
					c.forgiven = true
				}
			}
		}
	}
}

// outsideNow tells what was found, at every scrape.
type outsideNow struct{ reg *registry.Registry }

var (
	reachedDesc = prometheus.NewDesc("sallyway_platform_relay_reached", "1 when the relay was reached from outside by all of its ports; relays that are not looked at are not in it.", []string{"org", "relay"}, nil)
	rttDesc     = prometheus.NewDesc("sallyway_platform_relay_rtt_seconds", "Round-trip time from the platform to the relay by STUN over UDP.", []string{"org", "relay"}, nil)
)

// Describe implements prometheus.Collector.
func (*outsideNow) Describe(ch chan<- *prometheus.Desc) {
	ch <- reachedDesc
	ch <- rttDesc
}

// Collect implements prometheus.Collector.
func (o *outsideNow) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), writing)
	defer cancel()
	targets, err := o.reg.RelayTargets(ctx)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(reachedDesc, err)
		return
	}
	now := o.reg.Now()
	for _, t := range targets {
		f, ok := o.reg.Board.Outside(t.Node.ID, now)
		if !ok || f.State == control.OutsideNotProbed {
			continue
		}
		reached := 0.0
		if f.State == control.OutsideReached {
			reached = 1
		}
		ch <- prometheus.MustNewConstMetric(reachedDesc, prometheus.GaugeValue, reached, t.Node.Org, t.Name)
		if f.RTT > 0 {
			ch <- prometheus.MustNewConstMetric(rttDesc, prometheus.GaugeValue, f.RTT.Seconds(), t.Node.Org, t.Name)
		}
	}
}
