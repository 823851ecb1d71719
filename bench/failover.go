package bench

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"
)

// Failover says what is measured of what happens to open connections when something between their ends goes away.
//
// Each cause has its runs with each load. A run takes a lab that is whole, opens the connections, watches them undisturbed for a window and
// disturbed for another, and makes the lab whole again. Several labs are there at once, and only one of them is in its windows at a time: what
// the others do meanwhile is to wait for relays, legs and standby paths to come back.
type Failover struct {
	Bin    string
	Causes []string      // names; nil is all
	Loads  []string      // nil is all
	Runs   int           // of each cause with each load
	Window time.Duration // of either kind, at least
	Labs   int           // at once
	Peers  []string      // names; their runs come after our own
	// PeerRuns are those of peers: they are silent for long.
	PeerRuns int
	NoOwn    bool // peers alone
}

// FailoverDefaults are the runs that figures are taken from.
func FailoverDefaults() Failover {
	return Failover{Runs: 20, Window: time.Second, Labs: 10, PeerRuns: 3}
}

// FailoverQuick is one run of each.
func FailoverQuick() Failover {
	f := FailoverDefaults()
	f.Runs, f.PeerRuns, f.Labs = 1, 1, 3
	return f
}

// The loads beside which causes are measured.
const (
	LoadUp   = "up"   // one stream from the client to the private host, as fast as it goes
	LoadDown = "down" // the other way
	LoadIdle = "idle" // the exchanges alone
	// LoadQuiet is a connection on which nothing is said for a while before and for a second after: the next byte. It belongs to LoadIdle.
	LoadQuiet = "quiet"
)

// Loads are those that may be asked for.
func Loads() []string { return []string{LoadUp, LoadDown, LoadIdle} }

// Try is one run. Times are in milliseconds.
type Try struct {
	Way   string `json:"way"`
	Cause string `json:"cause"`
	Load  string `json:"load"`
	Run   int    `json:"run"`

	Path  string `json:"path,omitempty"`       // of the session before
	After string `json:"path_after,omitempty"` // and at the end of the disturbed window
	Moves uint64 `json:"moves"`                // of the session in the disturbed window
	Early uint64 `json:"moves_before"`         // and in the undisturbed one
	// Watched is the length of the disturbed window, Window of the undisturbed one.
	Watched float64 `json:"watched_ms"`
	Window  float64 `json:"window_ms"`

	// Stall is the longest time without an answer on the connection with an exchange every few milliseconds, Before the same of the
	// undisturbed window, Excess the difference. With LoadQuiet they are the next byte's round trip.
	Stall  float64 `json:"stall_ms"`
	Before float64 `json:"stall_before_ms"`
	Excess float64 `json:"stall_excess_ms"`
	// Of the stream, at its receiver.
	Bulk       float64 `json:"bulk_stall_ms,omitempty"`
	BulkBefore float64 `json:"bulk_stall_before_ms,omitempty"`
	BulkExcess float64 `json:"bulk_stall_excess_ms,omitempty"`
	// New is from the disturbance until a connection that was begun after it has brought an answer, NewBefore what one takes undisturbed.
	New       float64 `json:"new_connection_ms"`
	NewBefore float64 `json:"new_connection_before_ms"`

	Open    int     `json:"connections"`
	Lost    int     `json:"connections_lost"`
	Why     string  `json:"why_lost,omitempty"`
	Expect  bool    `json:"end_is_expected,omitempty"` // the cause ends connections by its nature
	Bytes   int64   `json:"bytes_checked"`
	Wrong   bool    `json:"bytes_wrong,omitempty"`
	Silent  bool    `json:"never_again,omitempty"`   // something did not come back within the time that it had
	Resumed float64 `json:"resumed_ms,omitempty"`    // from the return of one relay to the next answer, where all were away
	Back    float64 `json:"back_ms,omitempty"`       // from the end of the cause until the session is back on UDP
	Climb   float64 `json:"back_stall_ms,omitempty"` // longest time without an answer meanwhile

	// Dropped are datagrams by the counters of relays and legs in the disturbed window, DroppedBefore in the undisturbed one, where the cause
	// wants them counted.
	Dropped       map[string]uint64 `json:"dropped,omitempty"`
	DroppedBefore map[string]uint64 `json:"dropped_before,omitempty"`
	// Resent are packets that QUIC declared lost at either end, and sent again, in the same windows.
	Resent       uint64 `json:"quic_lost_packets,omitempty"`
	ResentBefore uint64 `json:"quic_lost_packets_before,omitempty"`

	// Whole is how long the run waited for everything to be whole after the last one, Turn for its turn to be measured.
	Whole float64 `json:"waited_for_whole_ms"`
	Turn  float64 `json:"waited_for_turn_ms"`

	gaps []time.Duration // undisturbed, between answers
}

// FailoverResult is what a run of failovers found.
type FailoverResult struct {
	Format   int               `json:"format"`
	Kind     string            `json:"kind"`
	Machine  Machine           `json:"machine"`
	Versions map[string]string `json:"versions,omitempty"`
	Command  []string          `json:"command"`
	Started  time.Time         `json:"started"`
	Took     float64           `json:"took_seconds"`
	Labs     int               `json:"labs_at_once"`
	Rows     []FailoverRow     `json:"rows"`
	Tries    []Try             `json:"tries"`
	Missing  []Missing         `json:"missing_peers,omitempty"`
	Failed   []string          `json:"failed,omitempty"` // what could not be measured, and why
}

// failoverKind marks the JSON of a run of failovers.
const failoverKind = "failover"

// RunFailover measures. It tells progress on out. What fails is named in the result and in the error; the rest is complete.
func RunFailover(ctx context.Context, cfg Failover, out io.Writer) (*FailoverResult, error) {
	jobs, err := cfg.jobs()
	if err != nil {
		return nil, err
	}
	res := &FailoverResult{
		Format: format, Kind: failoverKind, Machine: thisMachine(ctx), Command: os.Args, Started: time.Now().UTC(), Labs: cfg.Labs,
		Versions: versions(ctx, Config{Bin: cfg.Bin, Scenarios: []Scenario{{Beside: cfg.Peers}}}),
	}
	turns := &failoverTurns{cfg: cfg, out: out, res: res, jobs: jobs}
	var wg sync.WaitGroup
	for range max(1, min(cfg.Labs, len(jobs))) {
		wg.Go(func() { turns.work(ctx) })
	}
	wg.Wait()
	res.sort()
	res.Rows = res.sum()
	res.Took = time.Since(res.Started).Seconds()
	var failed error
	for _, f := range res.Failed {
		failed = errors.Join(failed, errors.New(f))
	}
	return res, errors.Join(failed, context.Cause(ctx))
}

// failoverJob is some runs of a cause with a load, of ours or of a peer.
type failoverJob struct {
	way   string
	cause cause
	load  string
	first int // number of its first run
	runs  int
}

// jobRuns are the most of a job: few, so that no lab is busy for long when the others are done.
const jobRuns = 5

// split cuts a job into such.
func (j failoverJob) split() (all []failoverJob) {
	for end := j.first + j.runs; j.first < end; j.first += jobRuns {
		j.runs = min(jobRuns, end-j.first)
		all = append(all, j)
	}
	return all
}

// jobs are all, ours before peers'. Ours that take long take turns with those that are soon done: a lab that becomes whole leaves the cores to
// others.
func (f Failover) jobs() ([]failoverJob, error) {
	all := causes()
	names := f.Causes
	if len(names) == 0 {
		names = Causes()
	}
	loads := f.Loads
	if len(loads) == 0 {
		loads = Loads()
	}
	var own, others []failoverJob
	for _, n := range names {
		i := slices.IndexFunc(all, func(c cause) bool { return c.name == n })
		if i < 0 {
			return nil, fmt.Errorf("no cause %q; there are %q", n, Causes())
		}
		for _, l := range loads {
			if !slices.Contains(Loads(), l) {
				return nil, fmt.Errorf("no load %q; there are %q", l, Loads())
			}
			own = append(own, failoverJob{Sallyway, all[i], l, 0, f.Runs}.split()...)
			if l == LoadIdle && all[i].quiet {
				own = append(own, failoverJob{Sallyway, all[i], LoadQuiet, 0, f.Runs}.split()...)
			}
			for _, p := range f.Peers {
				if all[i].hub != nil {
					others = append(others, failoverJob{p, all[i], l, 0, f.PeerRuns})
				}
			}
		}
	}
	if f.NoOwn {
		own = nil
	}
	slices.SortStableFunc(own, func(a, b failoverJob) int { return cmp.Compare(b.cause.takes, a.cause.takes) })
	var turns []failoverJob
	for long, short := 0, len(own)-1; long <= short; long, short = long+1, short-1 {
		if turns = append(turns, own[long]); long < short {
			turns = append(turns, own[short])
		}
	}
	return append(turns, others...), nil
}

// failoverTurns hands out jobs, and the turn to measure.
type failoverTurns struct {
	cfg Failover
	out io.Writer

	turn sync.Mutex // held by the lab that is in its windows

	mu   sync.Mutex
	jobs []failoverJob   // that nobody does yet; guarded by mu
	res  *FailoverResult // its Tries, Missing and Failed are guarded by mu
}

// next takes a job, of the same way as the last one where there is one, so that a lab is used again.
func (t *failoverTurns) next(last string) (failoverJob, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.jobs) == 0 {
		return failoverJob{}, false
	}
	i := max(0, slices.IndexFunc(t.jobs, func(j failoverJob) bool { return j.way == last }))
	j := t.jobs[i]
	t.jobs = slices.Delete(t.jobs, i, i+1)
	return j, true
}

// forget drops the jobs of a peer that does not work.
func (t *failoverTurns) forget(way string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.jobs = slices.DeleteFunc(t.jobs, func(j failoverJob) bool { return j.way == way })
	if !slices.ContainsFunc(t.res.Missing, func(m Missing) bool { return m.Peer == way }) {
		t.res.Missing = append(t.res.Missing, Missing{way, err.Error()})
	}
	fmt.Fprintf(t.out, "%s takes no part: %v\n", way, err)
}

// attempts is how often a run that could not be measured is begun anew, each time in a new lab.
const attempts = 2

// work does jobs until none is left.
func (t *failoverTurns) work(ctx context.Context) {
	var bed *failoverBed
	defer func() { bed.close() }()
	for {
		way := ""
		if bed != nil {
			way = bed.way.name
		}
		j, ok := t.next(way)
		if !ok || ctx.Err() != nil {
			return
		}
		failed := 0
		for run := j.first; run < j.first+j.runs && ctx.Err() == nil; {
			var err error
			if bed == nil || bed.way.name != j.way {
				bed.close()
				// That takes both cores, so it has the turn.
				turn := take(&t.turn)
				bed, err = newFailoverBed(ctx, t.cfg, j.way)
				turn.give()
				if err != nil && j.way != Sallyway && ctx.Err() == nil {
					t.forget(j.way, err)
					break
				}
			}
			var try Try
			if err == nil {
				try, err = bed.run(ctx, t, j, run)
			}
			if err == nil {
				t.add(try)
				run++
				continue
			}
			if ctx.Err() != nil {
				return
			}
			// A lab in which something did not come back is not used again.
			bed.close()
			bed = nil
			failed++
			t.fail(fmt.Sprintf("%s, %s, load %s, run %d: %v", j.way, j.cause.name, j.load, run+1, err))
			if failed > attempts {
				break
			}
		}
	}
}

func (t *failoverTurns) add(try Try) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.res.Tries = append(t.res.Tries, try)
	fmt.Fprintf(t.out, "%s\n", try)
}

func (t *failoverTurns) fail(why string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.res.Failed = append(t.res.Failed, why)
	fmt.Fprintf(t.out, "failed: %s\n", why)
}

// String is a run in a line.
func (t Try) String() string {
	s := fmt.Sprintf("%s, %s, load %s, run %d: stall %.0f (%.0f before), stream %.0f (%.0f), new connection %.0f (%.0f) ms, %d of %d lost, %d MB",
		t.Way, t.Cause, t.Load, t.Run+1, t.Stall, t.Before, t.Bulk, t.BulkBefore, t.New, t.NewBefore, t.Lost, t.Open, t.Bytes/1e6)
	if t.Resumed > 0 {
		s += fmt.Sprintf(", resumed %.0f ms", t.Resumed)
	}
	if t.Back > 0 {
		s += fmt.Sprintf(", back after %.0f ms (stall %.0f)", t.Back, t.Climb)
	}
	if t.Silent {
		s += ", never again"
	}
	s += fmt.Sprintf(", waited %.1f + %.1f s", t.Whole/1000, t.Turn/1000)
	if t.Path != "" {
		s += ", " + t.Path + " → " + t.After
	}
	if t.Why != "" {
		s += ", lost: " + t.Why
	}
	return s
}

// Write puts the result into a folder as JSON, Markdown and SVG, and returns the paths.
func (r *FailoverResult) Write(dir string) ([]string, error) {
	name := "failover-" + r.Started.Format("20060102-150405")
	return writeResult(dir, name, r, r.markdown(name), r.pictures())
}
