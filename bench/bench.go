// Package bench measures the whole path (TUN → netstack → QUIC → relay → gateway) in a lab of network namespaces, next to
// raw TCP over the same links, and writes what it found with all that is needed to run it again.
//
// All hosts share the machine's cores, so absolute numbers are low and noisy: compare the rows of one run. Runs of the two
// ways are interleaved and medians are shown.
package bench

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyway/internal/lab"
)

// Config says how much is measured.
type Config struct {
	Bin   string // folder of the programs
	Runs  int    // of each kind
	Time  time.Duration
	Flows []int
	RTT   int  // round trips of the latency measurement
	Dials int  // new connections of the first-byte measurement
	MTU   int  // bytes; zero is 1500
	Peers bool // other products too, those that are installed
	Many  int  // connections of the measurement of many at once; zero leaves it out
}

// Quick is a run of a few minutes.
func Quick() Config {
	return Config{Runs: 3, Time: 3 * time.Second, Flows: []int{1, 8}, RTT: 1000, Dials: 50, Many: 1000}
}

// Full has more runs and flows.
func Full() Config {
	return Config{Runs: 7, Time: 5 * time.Second, Flows: []int{1, 2, 4, 8, 32}, RTT: 5000, Dials: 300, Peers: true, Many: 1000}
}

// Ports of the private host.
const (
	iperfPort = 5201
	echoPort  = 7000
)

// The ways that are always compared; the peers come beside them.
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
}

// Latency is a measurement of small exchanges on an idle lab, in milliseconds.
type Latency struct {
	Way       string  `json:"way"`
	RTT50     float64 `json:"rtt_p50_ms"`
	RTT99     float64 `json:"rtt_p99_ms"`
	Connect50 float64 `json:"connect_and_first_byte_p50_ms"`
	Connect99 float64 `json:"connect_and_first_byte_p99_ms"`
}

// Memory is a process's resident set in bytes.
type Memory struct {
	Process string `json:"process"`
	Idle    int64  `json:"idle"`
	Loaded  int64  `json:"after_load"`
}

// Result is everything that a run found.
type Result struct {
	Machine    Machine      `json:"machine"`
	Command    []string     `json:"command"`
	Started    time.Time    `json:"started"`
	Took       float64      `json:"took_seconds"`
	MTU        int          `json:"mtu"`
	Throughput []Throughput `json:"throughput"`
	Latency    []Latency    `json:"latency"`
	Memory     []Memory     `json:"memory"`
	Loaded     []Loaded     `json:"latency_under_load"`
	Setup      []Setup      `json:"setup"`
	Missing    []Missing    `json:"missing_peers,omitempty"`
	Relay      []Forwarded  `json:"relay,omitempty"`
	Netstack   []Stacked    `json:"netstack,omitempty"`
	Standings  []Standing   `json:"standings,omitempty"` // medians and ratios, of Throughput
}

// way is one of the compared ways: where the private host is reached, and the processes that carry it.
type way struct {
	name        string
	addr        netip.Addr
	iperf, echo uint16 // ports
	procs       []*lab.Proc
}

// runner is a run in progress.
type runner struct {
	cfg  Config
	out  io.Writer // progress
	site *lab.Site
	ways []way
	res  *Result

	server *lab.Proc // iperf3's
}

// Run measures. It tells progress on out.
func Run(ctx context.Context, cfg Config, out io.Writer) (*Result, error) {
	l, err := lab.New(lab.Config{Bin: cfg.Bin, MTU: cfg.MTU, Raw: true})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	res := &Result{Machine: thisMachine(ctx), Command: os.Args, Started: time.Now().UTC(), MTU: cmp.Or(cfg.MTU, 1500)}
	r := &runner{cfg: cfg, out: out, res: res, ways: []way{
		{name: Raw, addr: lab.RawAddr, iperf: iperfPort, echo: echoPort},
		{name: Sallyway, addr: lab.WebAddr, iperf: iperfPort, echo: echoPort},
	}}
	defer r.stopPeers()
	for _, part := range []func(context.Context, *lab.Lab) error{r.prepare, r.latency, r.throughput, r.memory, r.underLoad, r.setup} {
		if err := part(ctx, l); err != nil {
			return nil, err
		}
	}
	res.Took = time.Since(res.Started).Seconds()
	return res, nil
}

// prepare starts everything and waits until both ways work.
func (r *runner) prepare(ctx context.Context, l *lab.Lab) error {
	var err error
	r.site, err = l.Build(ctx, lab.SiteConfig{NoBranch: true}, func(step string) { fmt.Fprintln(r.out, step) })
	if err != nil {
		return err
	}
	// Listening on all addresses: the raw one and the resource's.
	if _, err := l.Private.Echo(fmt.Sprintf(":%d", echoPort)); err != nil {
		return err
	}
	if r.server, err = l.Private.Iperf3Server(ctx, iperfPort); err != nil {
		return err
	}
	web := lab.Resource{Name: "web", Gateway: lab.Office, Address: lab.WebAddr.String(), TCP: fmt.Sprintf("%d,%d", iperfPort, echoPort)}
	if err := l.AddResource(ctx, web, "client:"+lab.Laptop); err != nil {
		return err
	}
	r.ways[1].procs = r.processes()
	for _, n := range r.processes() {
		u, err := n.Usage()
		if err != nil {
			return err
		}
		r.res.Memory = append(r.res.Memory, Memory{Process: n.Name, Idle: u.RSS})
	}
	soon, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("the private host is not reached"))
	defer cancel()
	for _, w := range r.ways {
		err := lab.Until(soon, 50*time.Millisecond, func() error {
			_, err := r.firstByte(ctx, w)
			return err
		})
		if err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
	}
	return r.startPeers(ctx, l)
}

// processes are ours, with the platform.
func (r *runner) processes() []*lab.Proc {
	s := r.site
	return []*lab.Proc{s.Laptop.Proc, s.GatewayA.Proc, s.RelayA.Proc, s.RelayB.Proc, s.PlatformD}
}

// firstByte opens a connection, and returns how long it took until an answer had come.
func (r *runner) firstByte(ctx context.Context, w way) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	start := time.Now()
	c, err := r.site.Client.Dial(ctx, "tcp", netip.AddrPortFrom(w.addr, w.echo).String())
	if err != nil {
		return 0, err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	if err := c.SetDeadline(deadline); err != nil {
		return 0, err
	}
	b := []byte{1}
	if _, err := c.Write(b); err != nil {
		return 0, err
	}
	_, err = io.ReadFull(c, b)
	return time.Since(start), err
}

func (r *runner) latency(ctx context.Context, l *lab.Lab) error {
	for _, w := range slices.Clone(r.ways) {
		fmt.Fprintf(r.out, "latency: %s\n", w.name)
		if err := r.excuse(ctx, w, r.idle(ctx, l, w)); err != nil {
			return err
		}
	}
	return nil
}

// idle measures a way on the idle lab.
func (r *runner) idle(ctx context.Context, l *lab.Lab, w way) error {
	p, err := l.Client.StartPulse(ctx, netip.AddrPortFrom(w.addr, w.echo), pulsePace)
	if err != nil {
		return err
	}
	err = p.WaitBeats(ctx, r.cfg.RTT)
	p.Stop()
	if err != nil {
		return fmt.Errorf("latency of %s: %w", w.name, err)
	}
	rtt := p.RTT(50, 99)
	dials := make([]time.Duration, r.cfg.Dials)
	for i := range dials {
		if dials[i], err = r.firstByte(ctx, w); err != nil {
			return fmt.Errorf("first byte of %s: %w", w.name, err)
		}
	}
	slices.Sort(dials)
	r.res.Latency = append(r.res.Latency, Latency{
		Way: w.name, RTT50: ms(rtt[0]), RTT99: ms(rtt[1]),
		Connect50: ms(dials[len(dials)/2]), Connect99: ms(dials[len(dials)*99/100]),
	})
	return nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// throughput interleaves the ways, so that a change of the machine's mood meets both.
func (r *runner) throughput(ctx context.Context, l *lab.Lab) error {
	for run := range r.cfg.Runs {
		for _, flows := range r.cfg.Flows {
			for _, down := range []bool{false, true} {
				for _, w := range slices.Clone(r.ways) {
					t, err := r.once(ctx, l, w, flows, down)
					if gone := r.excuse(ctx, w, err); gone != nil {
						return fmt.Errorf("%s, %d flows, down %v: %w", w.name, flows, down, gone)
					}
					if err != nil {
						continue
					}
					fmt.Fprintf(r.out, "run %d/%d: %s %s, %d flows: %.0f Mbit/s\n", run+1, r.cfg.Runs, w.name, direction(down), flows, t.BitsPerSecond/1e6)
					r.res.Throughput = append(r.res.Throughput, t)
				}
			}
		}
	}
	return nil
}

func (r *runner) once(ctx context.Context, l *lab.Lab, w way, flows int, down bool) (Throughput, error) {
	before, err := cpu(w)
	if err != nil {
		return Throughput{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, r.cfg.Time+30*time.Second)
	defer cancel()
	res, err := r.iperf(ctx, l, lab.IperfRun{Addr: w.addr.String(), Port: w.iperf, Time: r.cfg.Time, Flows: flows, Down: down})
	if err != nil {
		return Throughput{}, err
	}
	t := Throughput{Way: w.name, Down: down, Flows: flows, BitsPerSecond: res.BitsPerSecond, Bytes: res.Bytes, Retransmits: res.Retransmits}
	if len(w.procs) == 0 {
		return t, nil
	}
	after, err := cpu(w)
	if err != nil {
		return Throughput{}, err
	}
	t.CPU = make(map[string]float64)
	for name, d := range after {
		t.CPU[name] = (d - before[name]).Seconds()
	}
	return t, nil
}

// iperf runs iperf3, and waits until its server listens again: it closes its port between two tests.
func (r *runner) iperf(ctx context.Context, l *lab.Lab, run lab.IperfRun) (lab.IperfResult, error) {
	mark := r.server.Log.Mark()
	res, err := l.Client.Iperf3(ctx, run)
	if err == nil {
		_, err = r.server.Log.Wait(ctx, mark, "Server listening")
	}
	return res, err
}

// cpu is what each of a way's processes has used so far, with the children that it has now.
func cpu(w way) (map[string]time.Duration, error) {
	used := make(map[string]time.Duration)
	for _, p := range w.procs {
		d, err := treeCPU(p.PID())
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p.Name, err)
		}
		used[p.Name] = d
	}
	return used, nil
}

// treeCPU is what a process and its living descendants have used. Servers such as sshd work in children that stay as long
// as their connection.
func treeCPU(pid int) (time.Duration, error) {
	u, err := lab.ReadUsage(pid)
	if err != nil {
		return 0, err
	}
	sum := u.CPU
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid)) // the pattern is good
	for _, t := range tasks {
		b, _ := os.ReadFile(t) // a thread that has ended has no children
		for f := range strings.FieldsSeq(string(b)) {
			if child, err := strconv.Atoi(f); err == nil {
				d, _ := treeCPU(child) // has ended meanwhile
				sum += d
			}
		}
	}
	return sum, nil
}

func (r *runner) memory(context.Context, *lab.Lab) error {
	for i, p := range r.processes() {
		u, err := p.Usage()
		if err != nil {
			return err
		}
		r.res.Memory[i].Loaded = u.RSS
	}
	return nil
}

func direction(down bool) string {
	if down {
		return "down"
	}
	return "up"
}
