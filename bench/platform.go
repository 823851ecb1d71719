package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"syscall"
	"time"
)

// Parts of the platform's measurement.
const (
	PartNodes  = "nodes"  // connected nodes: memory, processor time, and the way back after a restart
	PartPolicy = "policy" // a change of policy until the last node has it
	PartGrants = "grants"
	PartAudit  = "audit"
	PartPages  = "pages"
)

// Databases of a platform.
const (
	SQLite     = "sqlite"
	PostgreSQL = "postgres"
)

// PlatformParts are all parts, in the order in which they are measured.
func PlatformParts() []string {
	return []string{PartNodes, PartPolicy, PartGrants, PartAudit, PartPages}
}

// PlatformStores are the databases that parts can be measured on.
func PlatformStores() []string { return []string{SQLite, PostgreSQL} }

// Platform says what of the control plane is measured. Zero numbers and times mean those of a full run.
type Platform struct {
	Bin    string   // folder of the programs
	Parts  []string // of PlatformParts; none is all
	Stores []string // of PlatformStores; none is all. Nodes and pages are on the first
	// Nodes are connected at once: of them 1 % gateways and 0.1 % relays, at least two each.
	Nodes  int
	Steady time.Duration // nodes stay connected while nothing changes
	Grants time.Duration // clients start for so long, 200 a second
	Audit  time.Duration // entries are appended for so long
	// PageGateways is how many gateways the organization has whose pages are read.
	PageGateways int
	Env          []string // more of platformd's environment
}

// Rates and sizes of the loads.
const (
	grantRate   = 200 // a second
	grantNodes  = 200 // clients that ask in turn
	auditCaller = 64  // that append at once
	changeRuns  = 3   // of each kind of change
)

// PlatformResult is what a run found.
type PlatformResult struct {
	Format  int       `json:"format"`
	Kind    string    `json:"kind"`
	Machine Machine   `json:"machine"`
	Command []string  `json:"command"`
	Started time.Time `json:"started"`
	Took    float64   `json:"took_seconds"`

	Nodes   *ConnectedNodes  `json:"nodes,omitempty"`
	Changes []PolicyChange   `json:"changes,omitempty"`
	Return  *NodesReturn     `json:"return,omitempty"`
	Grants  []GrantTimes     `json:"grants,omitempty"`
	Audit   []AuditRate      `json:"audit,omitempty"`
	Pages   []PageTime       `json:"pages,omitempty"`
	PagesOf PageOrganization `json:"pages_of,omitzero"`
	Failed  []string         `json:"failed,omitempty"` // parts that could not be measured, and why
}

// Waits is a distribution in milliseconds.
type Waits struct {
	N   int     `json:"n"`
	P50 float64 `json:"p50_ms"`
	P90 float64 `json:"p90_ms"`
	P99 float64 `json:"p99_ms"`
	Max float64 `json:"max_ms"`
}

// sumWaits sums up durations, which it sorts.
func sumWaits(d []time.Duration) Waits {
	if len(d) == 0 {
		return Waits{}
	}
	slices.Sort(d)
	return Waits{N: len(d), P50: ms(percentile(d, 50)), P90: ms(percentile(d, 90)), P99: ms(percentile(d, 99)), Max: ms(d[len(d)-1])}
}

// String implements fmt.Stringer.
func (s Waits) String() string {
	if s.N == 0 {
		return "–"
	}
	return fmt.Sprintf("%.1f / %.1f / %.1f", s.P50, s.P99, s.Max)
}

// Spent is processor time in seconds: of platformd, of the database where that is a process of its own, and of the load beside it.
type Spent struct {
	Platform float64 `json:"platform"`
	Database float64 `json:"database,omitempty"`
	Load     float64 `json:"load"`
}

func (s Spent) minus(o Spent) Spent {
	return Spent{s.Platform - o.Platform, s.Database - o.Database, s.Load - o.Load}
}

func (p *Platform) defaults() error {
	for _, d := range []struct {
		v     *time.Duration
		usual time.Duration
	}{{&p.Steady, time.Minute}, {&p.Grants, time.Minute}, {&p.Audit, 10 * time.Second}} {
		if *d.v == 0 {
			*d.v = d.usual
		}
	}
	if p.Nodes == 0 {
		p.Nodes = 10_000
	}
	if p.PageGateways == 0 {
		p.PageGateways = 1000
	}
	if len(p.Parts) == 0 {
		p.Parts = PlatformParts()
	}
	if len(p.Stores) == 0 {
		p.Stores = PlatformStores()
	}
	for _, s := range p.Parts {
		if !slices.Contains(PlatformParts(), s) {
			return fmt.Errorf("part %q is none of %v", s, PlatformParts())
		}
	}
	for _, s := range p.Stores {
		if !slices.Contains(PlatformStores(), s) {
			return fmt.Errorf("store %q is none of %v", s, PlatformStores())
		}
	}
	const fewest = 20
	if p.Nodes < fewest {
		return fmt.Errorf("%d nodes are fewer than %d", p.Nodes, fewest)
	}
	return nil
}

// besideNodes are the files that are open besides the connections of nodes: each has two, its control stream and what it asks.
const besideNodes = 200

// openFiles lets this process and those that it starts have this many connections.
func openFiles(n uint64) error {
	var have syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &have); err != nil {
		return err
	}
	if have.Cur >= n {
		return nil
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: n, Max: max(have.Max, n)}); err != nil {
		return fmt.Errorf("%d open files, at most %d are allowed here: %w: raise the limit (ulimit -n), or connect fewer nodes, by --nodes %d", n, have.Max, err, (have.Max-besideNodes)/2)
	}
	return nil
}

// RunPlatform measures. It tells progress on out. A part that fails is named in the result, the others go on, and the error says what failed.
func RunPlatform(ctx context.Context, cfg Platform, out io.Writer) (*PlatformResult, error) {
	if err := cfg.defaults(); err != nil {
		return nil, err
	}
	if slices.Contains(cfg.Parts, PartNodes) || slices.Contains(cfg.Parts, PartPolicy) {
		if err := openFiles(uint64(2*cfg.Nodes + besideNodes)); err != nil { //nolint:gosec // not negative
			return nil, err
		}
	}
	res := &PlatformResult{Format: format, Kind: "platform", Machine: thisMachine(ctx), Command: os.Args, Started: time.Now().UTC()}
	hold := new(holder)
	defer hold.release()
	m := &platformMeasure{cfg: cfg, out: out, res: res, hold: hold}
	var failed error
	for _, part := range []struct {
		names []string
		run   func(context.Context) error
	}{
		{[]string{PartNodes, PartPolicy}, m.nodes}, {[]string{PartGrants}, m.grants}, {[]string{PartAudit}, m.audit}, {[]string{PartPages}, m.pages},
	} {
		if !slices.ContainsFunc(part.names, m.wants) || ctx.Err() != nil {
			continue
		}
		if err := part.run(ctx); err != nil {
			res.Failed = append(res.Failed, fmt.Sprintf("%s: %v", part.names[0], err))
			failed = errors.Join(failed, err)
		}
	}
	res.Took = time.Since(res.Started).Seconds()
	return res, errors.Join(failed, context.Cause(ctx))
}

// platformMeasure is a run.
type platformMeasure struct {
	cfg  Platform
	out  io.Writer
	res  *PlatformResult
	hold *holder
}

func (m *platformMeasure) wants(part string) bool { return slices.Contains(m.cfg.Parts, part) }

func (m *platformMeasure) tell(format string, args ...any) {
	fmt.Fprintf(m.out, format+"\n", args...)
}
