package bench

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"sallyway/internal/identity"
	"sallyway/internal/lab"
)

// Layer is what a part of the path carried in one direction: the median of some runs, and the CPU seconds per GB of each role's
// processes.
type Layer struct {
	Way      string             `json:"way"`
	Down     bool               `json:"down"`
	Runs     int                `json:"runs"`
	Median   float64            `json:"median_bits_per_second"`
	Low      float64            `json:"min_bits_per_second"`
	High     float64            `json:"max_bits_per_second"`
	CPUPerGB map[string]float64 `json:"cpu_seconds_per_gb,omitempty"` // by role
}

// The layers, each on top of the one before; raw TCP and the whole product stand around them.
const (
	RelayLayer = "relay alone"
	LegLayer   = "legs + QUIC through a relay"
)

// The roles whose processes are counted.
const (
	clientRole, relayRole, gatewayRole = "client", "relay", "gateway"
)

const (
	layersPort   = 50490 // of the relay without a platform: the router lets through to relays from 49152 on
	layersOrders = 7100  // where the client of the legs is told what to do
	layersWindow = 256 << 10
)

// LayersConfig says how much is measured.
type LayersConfig struct {
	Bin  string        // folder of the programs
	Time time.Duration // of each measurement, whole seconds
	Runs int
	MTU  int // of the links, bytes; zero is 1500
}

// LayersDefaults are enough runs for a median.
func LayersDefaults() LayersConfig { return LayersConfig{Time: 3 * time.Second, Runs: 5} }

// LayersQuick is a run of less than a minute.
func LayersQuick() LayersConfig { return LayersConfig{Time: time.Second, Runs: 3} }

// layersRun is a run in progress.
type layersRun struct {
	*runner
	cfg     LayersConfig
	lab     *lab.Lab
	relay   *relayServer // without a platform, for the relay alone and the legs
	pair    *relayPair   // from the client's host to the gateway's
	ends    map[string]*lab.Proc
	samples []layerSample
}

// layerSample is one run.
type layerSample struct {
	way   string
	down  bool
	bits  float64            // per second
	perGB map[string]float64 // CPU seconds by role
}

// RunLayers measures parts of the path over the same links in turn, from the bottom to the whole.
func RunLayers(ctx context.Context, cfg LayersConfig, out io.Writer) (*Result, error) {
	if cfg.MTU == 0 {
		cfg.MTU = tunMTU
	}
	l, err := lab.New(lab.Config{Bin: cfg.Bin, Raw: true, MTU: cfg.MTU})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	res := &Result{Machine: thisMachine(ctx), Command: os.Args, Started: time.Now().UTC(), MTU: cfg.MTU}
	r := &layersRun{runner: &runner{cfg: Load{Time: cfg.Time}, out: out, o: new(Outcome), res: res}, cfg: cfg, lab: l}
	if err := r.prepare(ctx, l); err != nil {
		return nil, err
	}
	if err := r.startParts(ctx); err != nil {
		return nil, err
	}
	defer r.pair.close()
	for run := range cfg.Runs {
		for _, down := range []bool{false, true} {
			for _, measure := range []func(context.Context, bool) (layerSample, error){r.raw, r.relayed, r.legs, r.whole} {
				s, err := measure(ctx, down)
				if err != nil {
					return nil, fmt.Errorf("%s, down %v: %w", s.way, down, err)
				}
				s.down = down
				fmt.Fprintf(out, "run %d/%d: %s %s: %.0f Mbit/s\n", run+1, cfg.Runs, s.way, direction(down), s.bits/1e6)
				r.samples = append(r.samples, s)
			}
		}
	}
	res.Layers = sumLayers(r.samples)
	res.Took = time.Since(res.Started).Seconds()
	return res, nil
}

// startParts starts a relay without a platform and both ends of the legs, beside the product, which is idle meanwhile.
func (r *layersRun) startParts(ctx context.Context) error {
	l := r.lab
	dir, err := os.MkdirTemp(l.Dir(), "pki-")
	if err != nil {
		return err
	}
	if err := writePKI(dir, identity.Relay, identity.Gateway, identity.Client); err != nil {
		return err
	}
	key := newRelayKey()
	bed := &relayBed{serve: l.Relay2, server: l.Addr(l.Relay2), port: layersPort}
	if r.relay, err = bed.start(ctx, OwnRelay, key, dir); err != nil {
		return err
	}
	from := func(h *lab.Host) relayDial {
		return func(server netip.AddrPort) (*net.UDPConn, error) { return dialUDP(h, netip.Addr{}, server) }
	}
	if r.pair, err = newRelayPair(r.relay.addr, 0, false, from(l.Client), from(l.Gateway), credentialsOf(OwnRelay, key)); err != nil {
		return err
	}
	r.ends = map[string]*lab.Proc{relayRole: r.relay.proc}
	for _, end := range []struct {
		role, part string
		host       *lab.Host
	}{{gatewayRole, "leg-gateway", l.Gateway}, {clientRole, "leg-client", l.Client}} {
		told := legEnd{Relay: r.relay.addr, Dir: dir, Listen: netip.AddrPortFrom(loopback, layersOrders)}
		if r.ends[end.role], err = startPart(ctx, end.host, end.part, told, hex.EncodeToString(key)); err != nil {
			r.pair.close()
			return fmt.Errorf("%s: %w", end.part, err)
		}
	}
	return nil
}

// raw is TCP around all products.
func (r *layersRun) raw(ctx context.Context, down bool) (layerSample, error) {
	s := layerSample{way: Raw}
	t, err := r.once(ctx, r.lab, r.ways[0], 1, down)
	s.bits = t.BitsPerSecond
	return s, err
}

// relayed is datagrams through two channels, in runs as long as quic-go sends them. Where they come from makes no difference.
func (r *layersRun) relayed(ctx context.Context, down bool) (layerSample, error) {
	p := *r.pair
	if down {
		p.a, p.b = p.b, p.a
	}
	f, err := forward(ctx, r.relay.proc.PID(), []*relayPair{&p}, pingLoad, layersWindow, r.cfg.Time)
	return layerSample{way: RelayLayer, bits: f.BitsPerSecond, perGB: map[string]float64{relayRole: f.CPUPerGB}}, err
}

// legs is one flow of a session.
func (r *layersRun) legs(ctx context.Context, down bool) (layerSample, error) {
	s := layerSample{way: LegLayer, perGB: make(map[string]float64)}
	before, err := roleCPU(r.ends)
	if err != nil {
		return s, err
	}
	a, err := legOrder{Down: down, Time: r.cfg.Time}.order(ctx, func(ctx context.Context) (net.Conn, error) {
		return r.lab.Client.Dial(ctx, "tcp", netip.AddrPortFrom(loopback, layersOrders).String())
	})
	if err != nil {
		return s, err
	}
	after, err := roleCPU(r.ends)
	if err != nil {
		return s, err
	}
	for role, d := range after {
		s.perGB[role] = ratio((d - before[role]).Seconds(), float64(a.Bytes)/1e9)
	}
	s.bits = float64(a.Bytes) * 8 / a.Took.Seconds()
	return s, nil
}

// roleCPU is what each role's process has used so far.
func roleCPU(procs map[string]*lab.Proc) (map[string]time.Duration, error) {
	used := make(map[string]time.Duration)
	for role, p := range procs {
		d, err := treeCPU(p.PID())
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p.Name, err)
		}
		used[role] = d
	}
	return used, nil
}

// whole is one TCP connection through the product.
func (r *layersRun) whole(ctx context.Context, down bool) (layerSample, error) {
	s := layerSample{way: Sallyway, perGB: make(map[string]float64)}
	t, err := r.once(ctx, r.lab, r.ways[1], 1, down)
	if err != nil {
		return s, err
	}
	s.bits = t.BitsPerSecond
	roles := map[string]string{r.site.Laptop.Proc.Name: clientRole, r.site.GatewayA.Proc.Name: gatewayRole, r.site.RelayA.Proc.Name: relayRole, r.site.RelayB.Proc.Name: relayRole}
	for name, seconds := range t.CPU {
		if role, ok := roles[name]; ok {
			s.perGB[role] += ratio(seconds, float64(t.Bytes)/1e9)
		}
	}
	return s, nil
}

// sumLayers returns medians, up before down, in the order in which the layers were measured first.
func sumLayers(samples []layerSample) []Layer {
	var out []Layer
	for _, down := range []bool{false, true} {
		var order []string
		bits := make(map[string][]float64)
		perGB := make(map[string]map[string][]float64)
		for _, s := range samples {
			if s.down != down {
				continue
			}
			if !slices.Contains(order, s.way) {
				order = append(order, s.way)
				perGB[s.way] = make(map[string][]float64)
			}
			bits[s.way] = append(bits[s.way], s.bits)
			for role, v := range s.perGB {
				perGB[s.way][role] = append(perGB[s.way][role], v)
			}
		}
		for _, w := range order {
			l := Layer{Way: w, Down: down, Runs: len(bits[w]), Median: median(bits[w]), Low: slices.Min(bits[w]), High: slices.Max(bits[w])}
			for role, v := range perGB[w] {
				if l.CPUPerGB == nil {
					l.CPUPerGB = make(map[string]float64)
				}
				l.CPUPerGB[role] = median(v)
			}
			out = append(out, l)
		}
	}
	return out
}

// cpu is the sum over all roles.
func (l Layer) cpu() float64 {
	var sum float64
	for _, v := range l.CPUPerGB {
		sum += v
	}
	return sum
}

// layersTable writes what each layer carries, and what it adds to the cost.
func (r *Result) layersTable(b *strings.Builder) {
	b.WriteString("\nLayer by layer over the same links, one flow, runs interleaved; medians. Each adds to the one above: the relay alone moves datagrams in runs of 13 between bare clients; " +
		"legs + QUIC is a session of ours with a stream between a source and a sink; Sallyway is the product, with TUN and netstack before it and TCP behind the gateway.\n\n" +
		"| layer | direction | Mbit/s | min–max | CPU s/GB | client | relay | gateway | adds s/GB | share of the whole |\n|---|---|---|---|---|---|---|---|---|---|\n")
	for _, down := range []bool{false, true} {
		var whole, below float64
		for _, l := range r.Layers {
			if l.Down == down && l.Way == Sallyway {
				whole = l.cpu()
			}
		}
		for _, l := range r.Layers {
			if l.Down != down {
				continue
			}
			adds, share := "–", "–"
			if l.CPUPerGB != nil {
				adds, share = fmt.Sprintf("%.2f", l.cpu()-below), known("%.0f %%", 100*ratio(l.cpu()-below, whole))
				below = l.cpu()
			}
			fmt.Fprintf(b, "| %s | %s | %.0f | %.0f–%.0f | %s | %s | %s | %s | %s | %s |\n", l.Way, direction(down), l.Median/1e6, l.Low/1e6, l.High/1e6, known("%.2f", l.cpu()),
				known("%.2f", l.CPUPerGB[clientRole]), known("%.2f", l.CPUPerGB[relayRole]), known("%.2f", l.CPUPerGB[gatewayRole]), adds, share)
		}
	}
}
