package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"sallyway/internal/lab"
)

// Stacked is what a userspace stack between a TUN and a TCP connection on loopback carried: the median of some runs of one
// flow.
type Stacked struct {
	Way      string  `json:"way"`
	Down     bool    `json:"down"` // from the stack to the host
	Runs     int     `json:"runs"`
	Median   float64 `json:"median_bits_per_second"`
	Low      float64 `json:"min_bits_per_second"`
	High     float64 `json:"max_bits_per_second"`
	CPUPerGB float64 `json:"cpu_seconds_per_gb"` // of the stack's process; 0 where there is none
}

// The constructions that are compared.
const (
	OwnNetstack   = "Sallyway TUN + netstack"
	PlainNetstack = "wireguard/tun + gVisor channel endpoint"
)

// stackBar is how many times the usual construction ours is to be.
const stackBar = 2.5

// NetstackConfig says how much is measured of the stack alone.
type NetstackConfig struct {
	Bin  string        // folder of the programs
	Time time.Duration // of each measurement, whole seconds
	Runs int
	MTU  int // of the TUN, bytes; zero is 1500
}

// NetstackDefaults are enough runs for a median.
func NetstackDefaults() NetstackConfig { return NetstackConfig{Time: 2 * time.Second, Runs: 5} }

// NetstackQuick is a run of half a minute.
func NetstackQuick() NetstackConfig { return NetstackConfig{Time: time.Second, Runs: 3} }

// RunNetstack measures TUN → stack → TCP on loopback with iperf3, all in one network namespace, our construction and the
// usual one in turn.
func RunNetstack(ctx context.Context, cfg NetstackConfig, out io.Writer) (*Result, error) {
	if cfg.MTU == 0 {
		cfg.MTU = tunMTU
	}
	l, err := lab.New(lab.Config{Bin: cfg.Bin})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	res := &Result{Machine: thisMachine(ctx), Command: os.Args, Started: time.Now().UTC(), MTU: cfg.MTU}
	h := l.Client
	r := &runner{out: out, res: res}
	if r.server, err = h.Iperf3Server(ctx, iperfPort); err != nil {
		return nil, err
	}
	r.ways = []way{{name: Raw, addr: loopback, iperf: iperfPort}}
	for i, end := range []struct{ way, part string }{{OwnNetstack, "netstack-own"}, {PlainNetstack, "netstack-plain"}} {
		n := byte(i + 1)
		told := netstackEnd{
			TUN: fmt.Sprintf("stack%d", n), MTU: cfg.MTU, Addr: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 210, n, 1}), 32),
			Routes: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 211, n, 0}), 24),
		}
		p, err := startPart(ctx, h, end.part, told, "")
		if err == nil && end.way == PlainNetstack {
			err = routePlain(h, told)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", end.way, err)
		}
		r.ways = append(r.ways, way{name: end.way, addr: netip.AddrFrom4([4]byte{10, 211, n, 1}), iperf: iperfPort, procs: []*lab.Proc{p}})
	}
	r.cfg.Time = cfg.Time
	for run := range cfg.Runs {
		for _, down := range []bool{false, true} {
			for _, w := range r.ways {
				t, err := r.once(ctx, l, w, 1, down)
				if err != nil {
					return nil, fmt.Errorf("%s, down %v: %w", w.name, down, err)
				}
				fmt.Fprintf(out, "run %d/%d: %s %s: %.0f Mbit/s\n", run+1, cfg.Runs, w.name, direction(down), t.BitsPerSecond/1e6)
				res.Throughput = append(res.Throughput, t)
			}
		}
	}
	for _, s := range res.standings() {
		res.Netstack = append(res.Netstack, Stacked{Way: s.Way, Down: s.Down, Runs: s.Runs, Median: s.Median, Low: s.Low, High: s.High, CPUPerGB: s.CPUPerGB})
	}
	res.Took = time.Since(res.Started).Seconds()
	return res, nil
}

// tunMTU is the MTU of a TUN in bytes where nothing else is said.
const tunMTU = 1500

// routePlain gives the usual construction's TUN its address and its route, with the congestion control that ours sets too.
func routePlain(h *lab.Host, cfg netstackEnd) error {
	if err := raise(h, cfg.TUN, cfg.Addr.String(), cfg.MTU); err != nil {
		return err
	}
	return h.Do(func() error {
		link, err := netlink.LinkByName(cfg.TUN)
		if err != nil {
			return err
		}
		return netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(cfg.Routes), Congctl: "cubic"})
	})
}

// startPart starts a part of a measurement (see Part) as a process on a host, and waits until it is ready. key may be empty.
func startPart(ctx context.Context, h *lab.Host, part string, config any, key string) (*lab.Proc, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	doc, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	spec := lab.Spec{Name: fmt.Sprintf("%s-%d", part, partNumber.Add(1)), Args: []string{exe, "part", part, string(doc)}, Grace: 2 * time.Second}
	if key != "" {
		spec.Env = []string{keyVariable + "=" + key}
	}
	p, err := h.Start(spec)
	if err != nil {
		return nil, err
	}
	return p, p.WaitReady(ctx, 0, "^ready")
}

// netstackTable writes the stacks' figures, with a bar under them.
func (r *Result) netstackTable(b *strings.Builder) {
	plain := make(map[bool]Stacked)
	own := make(map[bool]Stacked)
	for _, s := range r.Netstack {
		switch s.Way {
		case PlainNetstack:
			plain[s.Down] = s
		case OwnNetstack:
			own[s.Down] = s
		}
	}
	b.WriteString("The userspace stack alone: iperf3 → TUN → stack → splice → TCP on loopback, one flow, all in one network namespace, runs interleaved; medians. Raw TCP is loopback without a TUN.\n\n" +
		"| way | direction | Mbit/s | min–max | CPU s/GB | of the usual construction |\n|---|---|---|---|---|---|\n")
	for _, s := range r.Netstack {
		fmt.Fprintf(b, "| %s | %s | %.0f | %.0f–%.0f | %s | %s |\n", s.Way, direction(s.Down), s.Median/1e6, s.Low/1e6, s.High/1e6, known("%.2f", s.CPUPerGB),
			known("%.2f ×", ratio(s.Median, plain[s.Down].Median)))
	}
	var bars []bar
	for _, down := range []bool{false, true} {
		bars = append(bars, bar{
			what: fmt.Sprintf("%s, %s", OwnNetstack, direction(down)), wanted: stackBar, atLeast: true, format: "%.2f × the usual construction",
			got: ratio(own[down].Median, plain[down].Median),
		})
	}
	writeBars(b, bars)
}

// bar is something that is wanted of a figure. It is told, and fails nothing.
type bar struct {
	what        string
	got, wanted float64
	atLeast     bool   // else at most
	format      string // of got and wanted
}

func (b bar) holds() bool {
	if b.atLeast {
		return b.got >= b.wanted
	}
	return b.got <= b.wanted
}

// writeBars writes whether each holds; those without a figure are left out.
func writeBars(b *strings.Builder, bars []bar) {
	writeEveryBar(b, slices.DeleteFunc(slices.Clone(bars), func(x bar) bool { return x.got == 0 }))
}

// writeEveryBar is writeBars where a figure of nothing is a figure.
func writeEveryBar(b *strings.Builder, bars []bar) {
	if len(bars) == 0 {
		return
	}
	b.WriteString("\n| bar | wanted | measured | |\n|---|---|---|---|\n")
	for _, x := range bars {
		sign, verdict := "≤ ", "missed"
		if x.atLeast {
			sign = "≥ "
		}
		if x.holds() {
			verdict = "holds"
		}
		fmt.Fprintf(b, "| %s | %s%s | %s | %s |\n", x.what, sign, fmt.Sprintf(x.format, x.wanted), fmt.Sprintf(x.format, x.got), verdict)
	}
}
