package bench

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"sallyway/internal/lab"
	"sallyway/internal/lab/wan"
)

// Scenario is one topology and what is measured on it. Each has a lab of its own, one after the other.
type Scenario struct {
	Name  string
	About string // a sentence or two for who reads the results
	Lab   lab.Config
	// Branch adds the second gateway with its private network, which the platform gives another relay than the first.
	Branch bool
	// Beside are the names of what is measured in turn with raw TCP and Sallyway.
	Beside []string
	Load   Load
}

// Load says what is measured and how often. Zero and nil leave a measurement out.
type Load struct {
	Runs  int           // of iperf3 of each kind, the ways in turn
	Time  time.Duration // of one; whole seconds
	Flows []int         // of TCP at once
	CC    string        // congestion control of iperf3's ends; empty is the hosts' own

	Rates    []int // of UDP, in Mbit/s
	RateRuns int

	Beats  int  // exchanges on one connection, and of datagrams, while nothing else happens
	Dials  int  // new connections
	Loaded bool // exchanges beside one flow
	Many   int  // connections at once
	Cold   int  // starts of the client's daemon

	Ceiling bool // what an emulated link carries of plain UDP
	Spread  int  // runs through both gateways, alone and at once
	Moves   int  // of each kind: the relay in use is drained, killed, cut
	// MoveLoads are what goes on meanwhile: none, up, down.
	MoveLoads []string
}

// Outcome is what a scenario found.
type Outcome struct {
	Scenario string  `json:"scenario"`
	About    string  `json:"about"`
	MTU      int     `json:"mtu"`
	Wire     string  `json:"wire"` // what the links do with large packets
	Link     *Link   `json:"link,omitempty"`
	Took     float64 `json:"took_seconds"`
	Failed   string  `json:"failed,omitempty"` // why the rest of it is missing

	Throughput []Throughput `json:"throughput,omitempty"`
	Rates      []Rate       `json:"udp,omitempty"`
	Latency    []Latency    `json:"latency,omitempty"`
	Datagrams  []Datagram   `json:"udp_latency,omitempty"`
	Loaded     []Loaded     `json:"latency_under_load,omitempty"`
	Setup      []Setup      `json:"setup,omitempty"`
	Memory     []Memory     `json:"memory,omitempty"`
	Ceiling    []Ceiling    `json:"link_ceiling,omitempty"`
	Spread     []Spread     `json:"spread,omitempty"`
	Moves      []Move       `json:"moves,omitempty"`
	Missing    []Missing    `json:"missing_peers,omitempty"`
	Again      []string     `json:"measured_again,omitempty"` // failures that a second attempt did not repeat, or that ended a peer's part
	Standings  []Standing   `json:"standings,omitempty"`      // medians and ratios, of Throughput
}

// Link is the emulated link between the client's site and the rest, the same both ways.
type Link struct {
	RTT  float64 `json:"rtt_ms"`
	Loss float64 `json:"loss_percent"`
	Rate int64   `json:"bits_per_second"` // zero is as fast as the emulator goes
}

// linkOf describes a lab's emulated link; nil where it has none.
func linkOf(c *wan.Config) *Link {
	if c == nil {
		return nil
	}
	return &Link{RTT: ms(c.AtoB.Delay + c.BtoA.Delay), Loss: 100 * c.AtoB.Loss, Rate: c.AtoB.Rate}
}

// String is the link in a few words.
func (l Link) String() string {
	if l.Rate == 0 && l.RTT == 0 && l.Loss == 0 {
		return "no limit"
	}
	rate := "no limit"
	if l.Rate > 0 {
		rate = fmt.Sprintf("%d Mbit/s", l.Rate/1e6)
	}
	return fmt.Sprintf("%g ms, %g %%, %s", l.RTT, l.Loss, rate)
}

// step is one measurement.
type step struct {
	name   string
	wanted func(Load) bool
	do     func(*runner, context.Context, *lab.Lab) error
}

// steps are all, in their order: what the idle processes look like comes before any load.
var steps = []step{
	{"what the link carries", func(l Load) bool { return l.Ceiling }, (*runner).ceiling},
	{"latency", func(l Load) bool { return l.Beats > 0 }, (*runner).latency},
	{"throughput", func(l Load) bool { return len(l.Flows) > 0 }, (*runner).throughput},
	{"UDP at rates", func(l Load) bool { return len(l.Rates) > 0 }, (*runner).rates},
	{"latency under load", func(l Load) bool { return l.Loaded }, (*runner).underLoad},
	{"both relays", func(l Load) bool { return l.Spread > 0 }, (*runner).spread},
	{"moves", func(l Load) bool { return l.Moves > 0 }, (*runner).moves},
	{"many connections", func(l Load) bool { return l.Many > 0 }, (*runner).setup},
}

// measure runs a scenario. The outcome holds what was found also when there is an error.
func measure(ctx context.Context, bin string, s Scenario, out io.Writer) (*Outcome, error) {
	s.Lab.Bin, s.Lab.Raw = bin, true
	if s.Lab.MTU == 0 {
		s.Lab.MTU = usualMTU
	}
	start := time.Now()
	o := &Outcome{Scenario: s.Name, About: s.About, MTU: s.Lab.MTU, Wire: s.Lab.Wire.String(), Link: linkOf(s.Lab.Access)}
	l, err := lab.New(s.Lab)
	if err != nil {
		return o, err
	}
	defer l.Close()
	r := &runner{cfg: s.Load, scenario: s, out: out, o: o}
	defer r.stopPeers()
	if err := r.prepare(ctx, l); err != nil {
		return o, err
	}
	for _, step := range steps {
		if !step.wanted(s.Load) {
			continue
		}
		if err := step.do(r, ctx, l); err != nil {
			return o, fmt.Errorf("%s: %w", step.name, err)
		}
	}
	if err := r.memory(true); err != nil {
		return o, err
	}
	o.Standings = standings(o.Throughput)
	o.Took = time.Since(start).Seconds()
	return o, nil
}

// usualMTU is that of Ethernet, in bytes.
const usualMTU = 1500

// find returns a scenario by name.
func find(all []Scenario, name string) (Scenario, bool) {
	i := slices.IndexFunc(all, func(s Scenario) bool { return s.Name == name })
	if i < 0 {
		return Scenario{}, false
	}
	return all[i], true
}
