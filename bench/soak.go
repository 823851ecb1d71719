package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"
)

// Soak says for how long a lab is loaded without being disturbed: as much as goes, both ways at once.
type Soak struct {
	Bin string
	For time.Duration
}

// soakRound is how long a pair of streams lives: every byte is compared at the end of each.
const soakRound = 30 * time.Second

// SoakResult is what a saturated, undisturbed session did. Times are in milliseconds.
type SoakResult struct {
	Format  int       `json:"format"`
	Kind    string    `json:"kind"`
	Machine Machine   `json:"machine"`
	Command []string  `json:"command"`
	Started time.Time `json:"started"`
	Took    float64   `json:"took_seconds"`

	Path      string   `json:"path"`
	Moves     uint64   `json:"moves"`
	Moved     []string `json:"moved,omitempty"` // what the path was seen to be after a move
	Loaded    float64  `json:"loaded_seconds"`
	Up        int64    `json:"bytes_up"`   // that arrived and were compared
	Down      int64    `json:"bytes_down"` // the same
	Rounds    int      `json:"rounds"`
	Exchanges int      `json:"exchanges"`
	Typical   float64  `json:"exchange_p50_ms"`
	Slow      float64  `json:"exchange_p999_ms"`
	Longest   float64  `json:"exchange_max_ms"`
	Lost      int      `json:"connections_lost"`
	Why       []string `json:"why_lost,omitempty"`
}

// RunSoak loads one lab. It tells progress on out.
func RunSoak(ctx context.Context, cfg Soak, out io.Writer) (*SoakResult, error) {
	b, err := newFailoverBed(ctx, Failover{Bin: cfg.Bin}, Sallyway)
	if err != nil {
		return nil, err
	}
	defer b.close()
	if err := b.whole(ctx); err != nil {
		return nil, err
	}
	s, _, err := b.clientSession(ctx)
	if err != nil {
		return nil, err
	}
	res := &SoakResult{Format: format, Kind: "soak", Machine: thisMachine(ctx), Command: os.Args, Started: time.Now().UTC(), Path: s.Path}
	first, path := s.Moves, s.Path
	var gaps []time.Duration
	for start := time.Now(); time.Since(start) < cfg.For && ctx.Err() == nil; res.Rounds++ {
		began := time.Now()
		round, err := b.soak(ctx, min(soakRound, cfg.For-time.Since(start)), res)
		if err != nil {
			return nil, err
		}
		res.Loaded += time.Since(began).Seconds()
		gaps = append(gaps, round...)
		if s, _, err = b.clientSession(ctx); err != nil {
			return nil, err
		}
		if s.Path != path {
			path = s.Path
			res.Moved = append(res.Moved, fmt.Sprintf("after %.0f s: %s", time.Since(start).Seconds(), path))
		}
		res.Moves = s.Moves - first
		fmt.Fprintf(out, "%.0f s: %d moves, %s, %d GB up, %d GB down, %d lost\n", time.Since(start).Seconds(), res.Moves, path, res.Up/1e9, res.Down/1e9, res.Lost)
	}
	slices.Sort(gaps)
	if res.Exchanges = len(gaps); len(gaps) > 0 {
		res.Typical, res.Slow, res.Longest = ms(percentile(gaps, 50)), ms(percentile(gaps, 99.9)), ms(gaps[len(gaps)-1])
	}
	res.Took = time.Since(res.Started).Seconds()
	return res, context.Cause(ctx)
}

// soak is a round: a stream each way and the exchanges beside them. It returns the times between answers.
func (b *failoverBed) soak(ctx context.Context, long time.Duration, res *SoakResult) ([]time.Duration, error) {
	lose := func(what string, err error) {
		res.Lost++
		res.Why = append(res.Why, what+": "+err.Error())
	}
	c, err := b.open(ctx)
	if err != nil {
		return nil, fmt.Errorf("open the connection of the exchanges: %w", err)
	}
	beats := startBeats(c, failoverPace)
	begin := time.Now()
	var both []*stream
	for _, down := range []bool{false, true} {
		x, err := b.stream(ctx, down)
		if err != nil {
			return nil, errors.Join(err, beats.stop())
		}
		both = append(both, x)
	}
	wait(ctx, long)
	gaps := beats.gaps(begin, time.Now())
	if err := beats.stop(); err != nil {
		lose("the exchanges", err)
	}
	for i, got := range []*int64{&res.Up, &res.Down} {
		n, err := both[i].finish(ctx)
		if *got += n; err != nil && ctx.Err() == nil {
			lose("the stream "+direction(both[i].down), err)
		}
	}
	return gaps, nil
}

// stream opens a stream through the bed's way.
func (b *failoverBed) stream(ctx context.Context, down bool) (*stream, error) {
	ctx, cancel := context.WithTimeout(ctx, openWait)
	defer cancel()
	c, err := b.l.Client.Dial(ctx, "tcp", netip.AddrPortFrom(b.way.addr, b.way.iperf).String())
	if err != nil {
		return nil, fmt.Errorf("open the stream %s: %w", direction(down), err)
	}
	x, err := b.streams.start(c, down)
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("open the stream %s: %w", direction(down), err)
	}
	return x, nil
}

// Markdown is the result in words.
func (r *SoakResult) Markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Saturated and undisturbed, %s\n\nOne stream each way at once as fast as they go, new ones every %.0f s, and small exchanges beside them on one connection each %d ms.\n\n"+
		"| | |\n|---|---|\n| loaded | %.1f minutes |\n| moves, none of them needed (wanted: at most %d in half an hour) | %d |\n| compared | %.1f GB up, %.1f GB down |\n"+
		"| connections lost | %d of %d |\n| between answers, p50 / p99.9 / max | %.0f / %.0f / %.0f ms |\n| path | %s |\n",
		r.Started.Format("2006-01-02 15:04 MST"), soakRound.Seconds(), failoverPace.Milliseconds(), r.Loaded/60, needlessMost, r.Moves, float64(r.Up)/1e9, float64(r.Down)/1e9,
		r.Lost, 3*r.Rounds, r.Typical, r.Slow, r.Longest, r.Path)
	for _, m := range r.Moved {
		fmt.Fprintf(&b, "\nMoved %s\n", m)
	}
	for _, why := range r.Why {
		fmt.Fprintf(&b, "\nLost: %s\n", why)
	}
	(&Result{Machine: r.Machine, Command: r.Command, Started: r.Started, Took: r.Took}).footer(&b)
	return b.String()
}

// Write puts the result into a folder as JSON and Markdown, and returns the paths.
func (r *SoakResult) Write(dir string) ([]string, error) {
	return writeResult(dir, "soak-"+r.Started.Format("20060102-150405"), r, r.Markdown(), nil)
}
