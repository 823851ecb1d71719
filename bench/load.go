package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sallyway/internal/lab"
)

// Loaded is the round trip of small exchanges on a connection of its own while one other saturates the same way, in
// milliseconds.
type Loaded struct {
	Way   string  `json:"way"`
	Down  bool    `json:"down"` // direction of the saturating flow
	RTT50 float64 `json:"rtt_p50_ms"`
	RTT99 float64 `json:"rtt_p99_ms"`
	Beats int     `json:"exchanges"`
}

// Setup is what it takes to get connections, in milliseconds.
type Setup struct {
	Way      string    `json:"way"`
	Warm50   float64   `json:"warm_flow_p50_ms"` // connect and first byte while the session stands
	Cold     []float64 `json:"cold_ms,omitempty"`
	Many     int       `json:"many"`       // connections at once
	ManyTook float64   `json:"many_ms"`    // until each had its first byte
	ManyLost int       `json:"many_lost"`  // that got none
	Why      string    `json:"why_failed"` // one of them
}

// Bounds of the measurements of many connections.
const (
	manyAtOnce = 64 // dials in progress
	manyWait   = 60 * time.Second
	coldRuns   = 3
	coldWait   = 30 * time.Second
	coldPace   = 20 * time.Millisecond // of the attempts
)

// pulsePace is the pause between two small exchanges.
const pulsePace = 2 * time.Millisecond

// underLoad measures small exchanges beside one flow, each way.
func (r *runner) underLoad(ctx context.Context, l *lab.Lab) error {
	for _, w := range slices.Clone(r.ways) {
		for _, down := range []bool{false, true} {
			fmt.Fprintf(r.out, "latency under load: %s %s\n", w.name, direction(down))
			m, err := r.loadedOnce(ctx, l, w, down)
			if err = r.excuse(ctx, w, err); err != nil {
				return fmt.Errorf("latency of %s under load: %w", w.name, err)
			}
			if m.Beats > 0 {
				r.res.Loaded = append(r.res.Loaded, m)
			}
		}
	}
	return nil
}

func (r *runner) loadedOnce(ctx context.Context, l *lab.Lab, w way, down bool) (Loaded, error) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.Time+30*time.Second)
	defer cancel()
	load := make(chan error, 1)
	go func() {
		_, err := r.iperf(ctx, l, lab.IperfRun{Addr: w.addr.String(), Port: w.iperf, Time: r.cfg.Time + time.Second, Down: down})
		load <- err
	}()
	p, err := l.Client.StartPulse(ctx, netip.AddrPortFrom(w.addr, w.echo), pulsePace)
	if err != nil {
		cancel()
		return Loaded{}, errors.Join(err, <-load)
	}
	err = <-load
	p.Stop()
	if err != nil {
		return Loaded{}, err
	}
	rtt := p.RTT(50, 99)
	return Loaded{Way: w.name, Down: down, RTT50: ms(rtt[0]), RTT99: ms(rtt[1]), Beats: p.Beats()}, nil
}

// setup measures cold sessions, where they are ours, and many connections at once.
func (r *runner) setup(ctx context.Context, _ *lab.Lab) error {
	if r.cfg.Many == 0 {
		return nil
	}
	for _, w := range slices.Clone(r.ways) {
		fmt.Fprintf(r.out, "%d connections at once: %s\n", r.cfg.Many, w.name)
		s := Setup{Way: w.name, Many: r.cfg.Many}
		for _, l := range r.res.Latency {
			if l.Way == w.name {
				s.Warm50 = l.Connect50
			}
		}
		r.many(ctx, w, &s)
		if w.name == Sallyway {
			for range coldRuns {
				d, err := r.cold(ctx, w)
				if err != nil {
					return fmt.Errorf("cold session: %w", err)
				}
				s.Cold = append(s.Cold, ms(d))
			}
		}
		r.res.Setup = append(r.res.Setup, s)
	}
	return ctx.Err()
}

// many opens connections, each of which has to bring a byte and stays open until all have.
func (r *runner) many(ctx context.Context, w way, s *Setup) {
	ctx, cancel := context.WithTimeout(ctx, manyWait)
	defer cancel()
	var mu sync.Mutex
	var open []net.Conn // guarded by mu
	var lost error      // guarded by mu
	turns := make(chan struct{}, manyAtOnce)
	start := time.Now()
	var wg sync.WaitGroup
	for range s.Many {
		turns <- struct{}{}
		wg.Go(func() {
			defer func() { <-turns }()
			c, err := r.exchange(ctx, w)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				s.ManyLost++
				lost = err
				return
			}
			open = append(open, c)
		})
	}
	wg.Wait()
	s.ManyTook = ms(time.Since(start))
	if lost != nil {
		s.Why = lost.Error()
	}
	for _, c := range open {
		c.Close()
	}
}

// exchange opens a connection that has answered one byte.
func (r *runner) exchange(ctx context.Context, w way) (net.Conn, error) {
	c, err := r.site.Client.Dial(ctx, "tcp", netip.AddrPortFrom(w.addr, w.echo).String())
	if err != nil {
		return nil, err
	}
	b := []byte{1}
	deadline, _ := ctx.Deadline()
	err = c.SetDeadline(deadline)
	if err == nil {
		_, err = c.Write(b)
	}
	if err == nil {
		_, err = io.ReadFull(c, b)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// cold starts the client's daemon anew and measures from its start to the first byte: process, control connection, relay,
// session and flow.
func (r *runner) cold(ctx context.Context, w way) (time.Duration, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, coldWait, errors.New("no session"))
	defer cancel()
	if err := r.site.Laptop.Stop(); err != nil {
		return 0, err
	}
	short, end := context.WithTimeout(ctx, coldPace)
	c, err := r.exchange(short, w)
	end()
	if err == nil {
		c.Close()
		return 0, errors.New("the private host is reached while the client's daemon is stopped")
	}
	start := time.Now()
	if err := r.site.Laptop.Start(); err != nil {
		return 0, err
	}
	// A dial that came too early would wait for TCP's own repeat, so that a new one is made at a fixed pace.
	done := make(chan time.Duration)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	t := time.NewTicker(coldPace)
	defer t.Stop()
	for {
		wg.Go(func() {
			c, err := r.exchange(ctx, w)
			if err != nil {
				return
			}
			c.Close()
			select {
			case done <- time.Since(start):
			case <-ctx.Done():
			}
		})
		select {
		case d := <-done:
			return d, nil
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		case <-t.C:
		}
	}
}

// excuse takes a peer that fails out of the run and names it in the result. The two ways that are always compared are
// not excused.
func (r *runner) excuse(ctx context.Context, w way, err error) error {
	if err == nil || ctx.Err() != nil || w.name == Raw || w.name == Sallyway {
		return err
	}
	fmt.Fprintf(r.out, "peer: %s leaves the run: %v\n", w.name, err)
	r.res.Missing = append(r.res.Missing, Missing{w.name, err.Error()})
	r.ways = slices.DeleteFunc(r.ways, func(o way) bool { return o.name == w.name })
	for _, p := range w.procs {
		p.Kill()
	}
	return nil
}

// loadTables writes what was found under load and about set-up.
func (r *Result) loadTables(b io.Writer) {
	if len(r.Loaded) > 0 {
		fmt.Fprint(b, "\n| beside one saturating flow | its direction | RTT p50 ms | RTT p99 ms |\n|---|---|---|---|\n")
	}
	for _, m := range r.Loaded {
		fmt.Fprintf(b, "| %s | %s | %.2f | %.2f |\n", m.Way, direction(m.Down), m.RTT50, m.RTT99)
	}
	if len(r.Setup) > 0 {
		fmt.Fprint(b, "\n| set-up | warm flow p50 ms | cold start to first byte ms | connections at once | all answered after ms | without answer |\n|---|---|---|---|---|---|\n")
	}
	for _, s := range r.Setup {
		cold := known("%.0f", median(s.Cold))
		fmt.Fprintf(b, "| %s | %.2f | %s | %d | %.0f | %d |\n", s.Way, s.Warm50, cold, s.Many, s.ManyTook, s.ManyLost)
	}
}
