package gateway

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/client"
	"sallyway/internal/control"
	"sallyway/tunnel"
)

// Reasons why flows end, as the log has them.
const (
	flowClosed     = "closed"
	flowReset      = "reset by the client"
	flowResetThere = "reset by the destination"
	flowRefused    = "refused by the destination"
	flowIdle       = "idle"
	flowLost       = "the destination does not answer any more"
	flowDenied     = "no policy allows it any more"
	flowStopped    = "the gateway stopped"
)

// Pacing and limits of the flow log.
const (
	flowEvery    = 5 * time.Second // the platform is told
	flowSettle   = time.Second     // after its end a flow waits for the end of its session, which says more about why
	flowInterim  = 5 * time.Minute // an open flow is told of again
	flowLook     = time.Minute     // open flows are looked through
	flowMost     = 10_000          // wait for the platform; beyond that the oldest are dropped, and counted
	flowFarewell = 2 * time.Second // the platform has, when the gateway stops
)

// flowLog gathers what the platform is told of flows. Nothing of it is on the way of data: flows count for themselves, and a flow costs one
// record when it ends. A nil flowLog takes nothing.
type flowLog struct {
	of   *openFlows
	post func(ctx context.Context, b control.FlowBatch) error // to the platform
	log  *slog.Logger
	now  func() time.Time
	// sessions are those that are open.
	sessions func() []tunnel.SessionInfo
	// rung is the transport of the gateway's own leg on a relay, "" when there is none.
	rung func(relay string) string

	on     atomic.Bool
	prefix string // tells the gateway's processes apart
	count  atomic.Uint64
	wake   chan struct{} // capacity 1: a batch is full

	mu      sync.Mutex
	queue   []flowRecord           // oldest first; guarded by mu
	dropped uint64                 // that the platform was not told of yet; guarded by mu
	paths   map[uint64]sessionPath // by session; guarded by mu

	lost prometheus.Counter
}

// flowRecord is a flow that the platform is to be told of.
type flowRecord struct {
	control.FlowReport
	session uint64
}

// sessionPath is what the log remembers of a session until all of its flows are told.
type sessionPath struct {
	path string
	over time.Time // zero is not
	why  string
}

func newFlowLog(of *openFlows, log *slog.Logger, post func(context.Context, control.FlowBatch) error) *flowLog {
	b := make([]byte, 6)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	l := &flowLog{
		of: of, post: post, log: log, now: time.Now, prefix: hex.EncodeToString(b) + "-", wake: make(chan struct{}, 1), paths: map[uint64]sessionPath{},
		sessions: func() []tunnel.SessionInfo { return nil }, rung: func(string) string { return "" },
		lost: prometheus.NewCounter(prometheus.CounterOpts{Name: "sallyway_gateway_flow_log_dropped_total", Help: "Flows that the flow log had no room for: the platform was away."}),
	}
	of.log = l
	return l
}

// collectors are the log's metrics.
func (l *flowLog) collectors() []prometheus.Collector {
	return []prometheus.Collector{l.lost, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "sallyway_gateway_flow_log_waiting", Help: "Flows that the platform is to be told of.",
	}, func() float64 {
		l.mu.Lock()
		defer l.mu.Unlock()
		return float64(len(l.queue))
	})}
}

// enable says whether the platform wants to know.
func (l *flowLog) enable(on bool) {
	if l == nil || l.on.Swap(on) == on || on {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue, l.dropped = nil, 0
}

// id names a flow.
func (l *flowLog) id() string {
	if l == nil {
		return ""
	}
	return l.prefix + strconv.FormatUint(l.count.Add(1), 36)
}

// ended takes a flow that is over.
func (l *flowLog) ended(f *openFlow) {
	if l == nil || !l.on.Load() {
		return
	}
	f.why(flowClosed)
	l.add(l.report(f, false))
}

func (l *flowLog) report(f *openFlow, open bool) flowRecord {
	r := flowRecord{session: f.peer.Session, FlowReport: control.FlowReport{
		ID: f.id, Peer: f.peer.Node, Resource: f.serves, Rule: f.rule, Protocol: string(f.target.Proto), Destination: f.named,
		Started: f.started, Seen: l.now(), Open: open, Sent: f.sent.Load(), Received: f.received.Load(),
	}}
	if a := f.conn.RemoteAddr(); a != nil {
		r.Address = a.String()
	}
	if why := f.reason.Load(); why != nil && !open {
		r.Reason = *why
	}
	return r
}

func (l *flowLog) add(rs ...flowRecord) {
	l.mu.Lock()
	l.queue = append(l.queue, rs...)
	l.trimLocked()
	full := len(l.queue) >= control.MaxFlows
	l.mu.Unlock()
	if full {
		select {
		case l.wake <- struct{}{}:
		default: // it is awake
		}
	}
}

func (l *flowLog) trimLocked() {
	if more := len(l.queue) - flowMost; more > 0 {
		l.queue = l.queue[more:]
		l.dropped += uint64(more)
		l.lost.Add(float64(more))
	}
}

// session notes the path of a session, and its end.
func (l *flowLog) session(s tunnel.SessionInfo, end error) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	p := sessionPath{path: s.Path.Name}
	if end != nil {
		p.over, p.why = l.now(), end.Error()
	}
	l.paths[s.Peer.Session] = p
}

// run tells the platform until ctx ends, and then what is left.
func (l *flowLog) run(ctx context.Context) error {
	tick := time.NewTicker(flowEvery)
	defer tick.Stop()
	looked := l.now()
	for {
		select {
		case <-ctx.Done():
			l.farewell(context.WithoutCancel(ctx))
			return nil
		case <-tick.C:
		case <-l.wake:
		}
		if now := l.now(); now.Sub(looked) >= flowLook {
			looked = now
			l.interim(now)
		}
		l.tell(ctx, flowSettle)
	}
}

// interim takes the flows that have been open for long, each every few minutes.
func (l *flowLog) interim(now time.Time) {
	if !l.on.Load() {
		return
	}
	var long []flowRecord
	l.of.mu.Lock()
	for f := range l.of.open {
		age := now.Sub(f.started)
		if age >= flowInterim && age%flowInterim < flowLook && len(long) < flowMost/2 {
			long = append(long, l.report(f, true))
		}
	}
	l.of.mu.Unlock()
	l.add(long...)
}

// farewell tells of the flows that end with the gateway.
func (l *flowLog) farewell(ctx context.Context) {
	if !l.on.Load() {
		return
	}
	var left []flowRecord
	l.of.mu.Lock()
	for f := range l.of.open {
		f.why(flowStopped)
		left = append(left, l.report(f, false))
	}
	clear(l.of.open) // they are told of: their close is not
	l.of.mu.Unlock()
	l.add(left...)
	ctx, cancel := context.WithTimeout(ctx, flowFarewell)
	defer cancel()
	l.tell(ctx, 0)
}

// tell sends what waits, in batches, as long as the platform takes them. Flows that ended less than settle ago wait for the next time.
func (l *flowLog) tell(ctx context.Context, settle time.Duration) {
	l.follow()
	for ctx.Err() == nil {
		batch, ids := l.take(settle)
		if len(batch.Flows) == 0 && batch.Dropped == 0 {
			l.forget()
			return
		}
		if err := l.post(ctx, batch); err != nil {
			l.log.Debug("flows are not told, they wait", "count", len(ids), "error", err)
			l.giveBack(batch, ids)
			return
		}
	}
}

// follow looks at the paths that open sessions have now.
func (l *flowLog) follow() {
	open := l.sessions()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range open {
		if p := l.paths[s.Peer.Session]; p.over.IsZero() {
			l.paths[s.Peer.Session] = sessionPath{path: s.Path.Name}
		}
	}
}

// forget lets go of sessions that are over.
func (l *flowLog) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	needed := make(map[uint64]bool, len(l.queue))
	for _, r := range l.queue {
		needed[r.session] = true
	}
	for id, p := range l.paths {
		if !p.over.IsZero() && l.now().Sub(p.over) > flowEvery && !needed[id] {
			delete(l.paths, id)
		}
	}
}

// take removes a batch from the queue.
func (l *flowLog) take(settle time.Duration) (control.FlowBatch, []flowRecord) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := control.FlowBatch{Dropped: l.dropped}
	before := l.now().Add(-settle)
	n := 0
	for n < len(l.queue) && n < control.MaxFlows && (settle == 0 || !l.queue[n].Seen.After(before)) {
		n++
	}
	taken := l.queue[:n:n]
	l.queue, l.dropped = l.queue[n:], 0
	for _, r := range taken {
		p := l.paths[r.session]
		// What ends with its session is reset like any other flow: the session knows why.
		if !r.Open && !p.over.IsZero() && (r.Reason == flowReset || r.Reason == flowClosed) && p.over.Sub(r.Seen).Abs() <= flowSettle {
			r.Reason = "session over: " + p.why
		}
		r.Path, r.Relay = client.Rung(p.path)
		if r.Path == "" {
			r.Path = l.rung(r.Relay)
		}
		b.Flows = append(b.Flows, r.FlowReport)
	}
	return b, taken
}

func (l *flowLog) giveBack(b control.FlowBatch, taken []flowRecord) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue = append(taken, l.queue...)
	l.dropped += b.Dropped
	l.trimLocked()
}
