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
	look := time.NewTimer(rand.N(p.cfg.spread + 1))
	defer look.Stop()
	p.note(ctx, "read what was found of relays", p.cfg.Registry.LoadOutside(ctx))
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-read.C:
			if !p.cfg.Leads() { // who looks knows already
				p.note(ctx, "read what was found of relays", p.cfg.Registry.LoadOutside(ctx))
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
	found := make([]look, len(targets))
	everything := make([]int, len(targets))
	for i := range everything {
		everything[i] = i
	}
	p.pass(ctx, targets, found, everything)
	// A relay that was well is looked at once more before it is called otherwise: it may just start anew.
	var lost []int
	now := p.cfg.Registry.Now()
	for i := range targets {
		was, ok := p.cfg.Registry.Board.Outside(targets[i].Node.ID, now)
		if is := found[i].outcome(&targets[i], now); ok && was.State == control.OutsideReached && is.State != control.OutsideReached {
			lost = append(lost, i)
		}
	}
	if len(lost) > 0 {
		select {
		case <-ctx.Done():
		case <-time.After(p.cfg.spread):
		}
		p.pass(ctx, targets, found, lost)
	}
	if ctx.Err() != nil {
		return // what was found says more about this platform than about relays
	}
	p.forgive(found)
	now = p.cfg.Registry.Now()
	out := make(map[string]control.Outside, len(targets))
	for i := range targets {
		o := found[i].outcome(&targets[i], now)
		out[targets[i].Node.ID] = o
		p.looks.WithLabelValues(string(o.State)).Inc()
	}
	ctx, cancel := context.WithTimeout(ctx, writing)
	defer cancel()
	p.note(ctx, "write down what was found of relays", p.cfg.Registry.FoundOutside(ctx, out))
}

// pass looks at some of the targets, by their place, and puts what it found there.
func (p *Prober) pass(ctx context.Context, targets []registry.RelayTarget, found []look, which []int) {
	slots := make(chan struct{}, abreast)
	var wg sync.WaitGroup
	for _, i := range which {
		wg.Go(func() {
			select {
			case <-ctx.Done():
				return
			case <-time.After(rand.N(p.cfg.spread + 1)):
			}
			slots <- struct{}{}
			defer func() { <-slots }()
			found[i] = p.look(ctx, &targets[i])
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
