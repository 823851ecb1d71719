// Package bench measures the whole path (TUN → netstack → QUIC → relay → gateway) in labs of network namespaces, next to raw
// TCP over the same links and to other products, and writes what it found with all that is needed to run it again.
//
// A run is a list of scenarios: a topology each, with what is to be measured on it. All hosts share the machine's cores, so
// absolute numbers are low and noisy: compare the rows of one run. The ways that are compared are measured in turn, again and
// again, and medians are shown.
//
//	res, err := bench.Run(ctx, bench.Config{Bin: "bin", Scenarios: bench.Quick()}, os.Stderr)
//	paths, err := res.Write("bench/results")
package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"time"

	"sallyway/internal/lab"
)

// Config says what is measured.
type Config struct {
	Bin       string // folder of the programs
	Scenarios []Scenario
	MTU       int // of the links between the sites where a scenario says nothing, in bytes; zero is 1500
}

// Ports of the private host.
const (
	iperfPort = 5201
	echoPort  = 7000
)

// The ways that are always compared; others come beside them.
const (
	Raw      = "raw TCP"
	Sallyway = "Sallyway"
)

// Throughput is one run of iperf3.
type Throughput struct {
	Way           string             `json:"way"`
	Down          bool               `json:"down"`
	Flows         int                `json:"flows"`
	BitsPerSecond float64            `json:"bits_per_second"`
	Bytes         int64              `json:"bytes"`
	Retransmits   int                `json:"retransmits"`
	CPU           map[string]float64 `json:"cpu_seconds,omitempty"` // per process, of ours or of the peer
	Relay         *Bundles           `json:"relay,omitempty"`       // of Sallyway's relay
}

// Memory is a process's resident set in bytes.
type Memory struct {
	Way     string `json:"way"`
	Process string `json:"process"`
	Idle    int64  `json:"idle"`
	Loaded  int64  `json:"after_load"`
}

// format is the version of what Write writes as JSON.
const format = 2

// Result is everything that a run found.
type Result struct {
	Format     int               `json:"format"`
	Machine    Machine           `json:"machine"`
	Versions   map[string]string `json:"versions,omitempty"` // of what was measured, by program or module
	Command    []string          `json:"command"`
	Started    time.Time         `json:"started"`
	Took       float64           `json:"took_seconds"`
	Scenarios  []*Outcome        `json:"scenarios,omitempty"`
	MTU        int               `json:"mtu,omitempty"`        // of a run of one layer
	Throughput []Throughput      `json:"throughput,omitempty"` // of a run of one layer
	Relay      []Forwarded       `json:"relay,omitempty"`
	Netstack   []Stacked         `json:"netstack,omitempty"`
	Alone
}

// Join adds what a run of one layer found.
func (r *Result) Join(layer *Result) {
	r.Relay = append(r.Relay, layer.Relay...)
	r.Netstack = append(r.Netstack, layer.Netstack...)
	r.Alone.join(layer.Alone)
	r.RelayDelay = append(r.RelayDelay, layer.RelayDelay...)
	r.RelayMemory = append(r.RelayMemory, layer.RelayMemory...)
	r.Took = time.Since(r.Started).Seconds()
}

// standings sums up a run of one layer.
func (r *Result) standings() []Standing { return standings(r.Throughput) }

// way is one of the compared ways: where the private host is reached, and the processes that carry it.
type way struct {
	name        string
	addr        netip.Addr
	iperf, echo uint16     // ports
	behind      netip.Addr // what addr leads to, where that is another; its iperf3 server is the one in use
	packets     bool       // carries UDP too
	procs       []*lab.Proc
	// again does what is left to do when the hub's process has been started again; nil is nothing.
	again func(context.Context) error
}

// runner is a scenario in progress.
type runner struct {
	cfg      Load
	scenario Scenario
	out      io.Writer // progress
	site     *lab.Site
	ways     []way
	forward  *way // per-packet forwarding of UDP, see forwardUDP; nil where it is not measured
	o        *Outcome
	res      *Result // of a run of one layer

	server  *lab.Proc                // iperf3's, where there is one for all ways
	servers map[netip.Addr]*lab.Proc // iperf3's, by the address they listen on
}

// Run measures one scenario after the other. It tells progress on out. A scenario that fails is named in the result, the
// others go on, and the error says what failed; the result is complete but for that.
func Run(ctx context.Context, cfg Config, out io.Writer) (*Result, error) {
	res := &Result{Format: format, Machine: thisMachine(ctx), Versions: versions(ctx, cfg), Command: os.Args, Started: time.Now().UTC()}
	var failed error
	for i, s := range cfg.Scenarios {
		fmt.Fprintf(out, "scenario %d/%d: %s\n", i+1, len(cfg.Scenarios), s.Name)
		if s.Lab.MTU == 0 {
			s.Lab.MTU = cfg.MTU
		}
		o, err := measure(ctx, cfg.Bin, s, out)
		if err != nil {
			o.Failed = err.Error()
			o.Standings = standings(o.Throughput)
			failed = errors.Join(failed, fmt.Errorf("%s: %w", s.Name, err))
			fmt.Fprintf(out, "scenario %s failed: %v\n", s.Name, err)
		}
		res.Scenarios = append(res.Scenarios, o)
		if ctx.Err() != nil {
			break
		}
	}
	res.Took = time.Since(res.Started).Seconds()
	return res, failed
}
