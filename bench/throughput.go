package bench

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"sallyway/internal/lab"
	"sallyway/internal/lab/wan"
)

// Rate is one run of iperf3 with UDP datagrams of 1200 bytes at a rate.
type Rate struct {
	Way           string             `json:"way"`
	Down          bool               `json:"down"`
	Wanted        float64            `json:"wanted_bits_per_second"`
	BitsPerSecond float64            `json:"bits_per_second"` // received
	Lost          float64            `json:"lost_percent"`
	Jitter        float64            `json:"jitter_ms"`
	Bytes         int64              `json:"bytes"`
	CPU           map[string]float64 `json:"cpu_seconds,omitempty"`
}

// Ceiling is what an emulated link carries of plain UDP beyond its rate, one direction.
type Ceiling struct {
	Down          bool    `json:"down"`
	BitsPerSecond float64 `json:"bits_per_second"` // of IP packets
	Lost          float64 `json:"lost_percent"`    // by the link's loss and at its full queue
}

const (
	ceilingTime = 4 * time.Second
	// ceilingOver is how much more than its rate a link is given.
	ceilingOver = 1.1
	// iperfGrace is how much longer than its length an iperf3 run may take.
	iperfGrace = 30 * time.Second
)

// throughput interleaves the ways, so that a change of the machine's mood meets all of them.
func (r *runner) throughput(ctx context.Context, l *lab.Lab) error {
	for run := range r.cfg.Runs {
		for _, flows := range r.cfg.Flows {
			for _, down := range []bool{false, true} {
				err := r.each(ctx, func(w way) error {
					t, err := r.once(ctx, l, w, flows, down)
					if err != nil {
						return fmt.Errorf("%d flows %s: %w", flows, direction(down), err)
					}
					fmt.Fprintf(r.out, "run %d/%d: %s %s, %d flows: %.0f Mbit/s\n", run+1, r.cfg.Runs, w.name, direction(down), flows, t.BitsPerSecond/1e6)
					r.o.Throughput = append(r.o.Throughput, t)
					return nil
				})
				if err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// once is one run of iperf3 over TCP.
func (r *runner) once(ctx context.Context, l *lab.Lab, w way, flows int, down bool) (Throughput, error) {
	before, err := r.relayCounts(w)
	if err != nil {
		return Throughput{}, err
	}
	res, used, err := r.metered(ctx, l, w, lab.IperfRun{Flows: flows, Down: down, CC: r.cfg.CC})
	t := Throughput{Way: w.name, Down: down, Flows: flows, BitsPerSecond: res.BitsPerSecond, Bytes: res.Bytes, Retransmits: res.Retransmits, CPU: used}
	if err != nil || before == nil {
		return t, err
	}
	after, err := r.relayCounts(w)
	if err == nil {
		t.Relay = bundles(before, after)
	}
	return t, err
}

// metered runs iperf3 and returns what each of the way's processes has used meanwhile, in seconds; nil where it has none.
func (r *runner) metered(ctx context.Context, l *lab.Lab, w way, run lab.IperfRun) (lab.IperfResult, map[string]float64, error) {
	before, err := cpu(w)
	if err != nil {
		return lab.IperfResult{}, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, max(r.cfg.Time, run.Time)+iperfGrace)
	defer cancel()
	res, err := r.iperf(ctx, l, w, run)
	if err != nil || len(w.procs) == 0 {
		return res, nil, err
	}
	after, err := cpu(w)
	if err != nil {
		return res, nil, err
	}
	used := make(map[string]float64)
	for name, d := range after {
		used[name] = (d - before[name]).Seconds()
	}
	return res, used, nil
}

// rates sends UDP through the ways that carry it.
func (r *runner) rates(ctx context.Context, l *lab.Lab) error {
	for range r.cfg.RateRuns {
		for _, mbit := range r.cfg.Rates {
			for _, down := range []bool{false, true} {
				err := r.each(ctx, func(w way) error {
					if !w.packets {
						return nil
					}
					res, used, err := r.metered(ctx, l, w, lab.IperfRun{UDP: true, Rate: strconv.Itoa(mbit) + "M", Down: down})
					if err != nil {
						return fmt.Errorf("UDP at %d Mbit/s %s: %w", mbit, direction(down), err)
					}
					fmt.Fprintf(r.out, "UDP at %d Mbit/s: %s %s: %.1f %% lost\n", mbit, w.name, direction(down), res.LostPercent)
					r.o.Rates = append(r.o.Rates, Rate{
						Way: w.name, Down: down, Wanted: float64(mbit) * 1e6, BitsPerSecond: res.BitsPerSecond, Lost: res.LostPercent, Jitter: res.Jitter, Bytes: res.Bytes, CPU: used,
					})
					return nil
				})
				if err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// ceiling gives the emulated link more plain UDP than it has room for, past all products, and reads off the emulator what
// came out at its other end once its queue was full.
func (r *runner) ceiling(ctx context.Context, l *lab.Lab) error {
	if r.o.Link == nil || r.o.Link.Rate == 0 {
		return nil
	}
	raw := r.ways[slices.IndexFunc(r.ways, func(w way) bool { return w.name == Raw })]
	over := strconv.Itoa(int(float64(r.o.Link.Rate) * ceilingOver))
	for _, down := range []bool{false, true} {
		c, err := r.ceilingOnce(ctx, l, raw, over, down)
		if err != nil {
			return err
		}
		fmt.Fprintf(r.out, "the link %s: %.1f Mbit/s of UDP\n", direction(down), c.BitsPerSecond/1e6)
		r.o.Ceiling = append(r.o.Ceiling, c)
	}
	return nil
}

func (r *runner) ceilingOnce(ctx context.Context, l *lab.Lab, raw way, rate string, down bool) (Ceiling, error) {
	ctx, cancel := context.WithTimeout(ctx, ceilingTime+iperfGrace)
	defer cancel()
	load := make(chan error, 1)
	go func() {
		_, err := r.iperf(ctx, l, raw, lab.IperfRun{UDP: true, Rate: rate, Down: down, Time: ceilingTime})
		load <- err
	}()
	counted := func() wan.Count {
		s := l.AccessStats()
		if down {
			return s.BtoA
		}
		return s.AtoB
	}
	t := time.NewTimer(ceilingTime / 2) // the queue is full by then
	defer t.Stop()
	select {
	case err := <-load:
		return Ceiling{}, fmt.Errorf("UDP over the link ended early: %w", err)
	case <-t.C:
	}
	before, start := counted(), time.Now()
	t.Reset(ceilingTime / 3) // the length of the measurement
	select {
	case err := <-load:
		return Ceiling{}, fmt.Errorf("UDP over the link ended early: %w", err)
	case <-t.C:
	}
	after, took := counted(), time.Since(start)
	c := Ceiling{Down: down, BitsPerSecond: float64(after.Bytes-before.Bytes) * 8 / took.Seconds()}
	dropped := float64(after.Lost + after.QueueDrops - before.Lost - before.QueueDrops)
	c.Lost = 100 * ratio(dropped, dropped+float64(after.Passed-before.Passed))
	return c, <-load
}
