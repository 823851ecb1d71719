package pathstate

import (
	"fmt"
	"time"

	"sallyway/stun"
)

// When a path that lives is left for the standby. Every comparison is with the standby, which shares this host's access: what is wrong there is
// wrong with both.
const (
	// badLoss is the share of probes whose loss makes a path bad, if the standby loses a third of it at most, for lossFor. leastDecided probes must be
	// decided on both.
	badLoss      = 0.12
	lossFor      = 4 * time.Second
	leastDecided = 30
	// A round trip is bad that is twice the standby's and badRTT longer, for rttFor, unless it may be a queue of this session's own: what the
	// session moves in that time is ownQueue bytes or more.
	badRTT   = 50 * time.Millisecond
	rttFor   = 5 * time.Second
	ownQueue = 16 << 10
	// A path that answers probes is stalled if stalledPackets were sent in stalledFor, which is four round trips at least, and nothing came back; or if
	// sunkShare of packets were lost in each of sunkTimes periods of sunkPeriod, of sunkPackets at least, though probes are not.
	stalledFor     = 1500 * time.Millisecond
	stalledPackets = 6
	sunkShare      = 0.25
	sunkPackets    = 100
	sunkPeriod     = 2 * time.Second
	sunkTimes      = 3
	// settle is how long after a move, and after flows began to move, nothing is left for being bad.
	settle = 3 * time.Second
	// A path that was left for being bad is not gone to for holdLeast, or twice as long as the last time, holdMost at most; for each holdDecay
	// since then that counts as once less.
	holdLeast = 10 * time.Second
	holdMost  = 5 * time.Minute
	holdDecay = 10 * time.Minute
	// The session goes to a standby that has a lower rank, or from which it once was led astray, when that was good for backFor: it loses backLoss at
	// most, and its round trip is not much longer than the active path's without a queue.
	backFor  = 10 * time.Second
	backLoss = 0.05
)

// Load is what the session's QUIC and its flows have counted so far.
type Load struct {
	// Sent, Lost and Received are packets of QUIC.
	Sent, Lost, Received uint64
	// Bytes are those of flows, both ways.
	Bytes uint64
}

// penalty is that of a path that was left for being bad.
type penalty struct {
	level int
	left  time.Time // when it last was
	until time.Time
}

// quality is what tells whether the active path is worse than the standby. Times are virtual; zero is not now.
type quality struct {
	lossy, slow, better time.Time // since when

	seen    bool // load is set
	load    Load
	loadAt  time.Time
	rate    float64 // bytes of flows a second, smoothed
	came    Load    // when a packet last was received, or none had been sent since
	cameAt  time.Time
	sunk    Load // at the begin of the period
	sunkAt  time.Time
	sinking int // periods in a row

	held map[string]*penalty // by name
	home string              // the path that was left first for being bad, until the session is there again; empty: none
}

// fresh forgets what was measured of the pair of paths.
func (q *quality) fresh() {
	q.lossy, q.slow, q.better = time.Time{}, time.Time{}, time.Time{}
	q.cameAt, q.sunkAt, q.sinking = time.Time{}, time.Time{}, 0
}

// leave penalises a path that was left for being bad.
func (q *quality) leave(v time.Time, p *Path, why Cause) {
	if why != CauseLoss && why != CauseRTT && why != CauseStalled {
		return
	}
	h := q.held[p.name]
	if h == nil {
		if len(q.held) >= mostHeld {
			q.forget()
		}
		h = &penalty{}
		q.held[p.name] = h
	}
	h.level = max(h.level-int(v.Sub(h.left)/holdDecay), 0)
	h.left = v
	h.until = v.Add(min(holdLeast<<min(h.level, 10), holdMost))
	h.level++
	if q.home == "" {
		q.home = p.name
	}
}

// mostHeld bounds the paths that are remembered: names of direct paths are many in time.
const mostHeld = 64

// forget drops the penalty that is over first.
func (q *quality) forget() {
	var first string
	for name, h := range q.held {
		if f := q.held[first]; f == nil || h.until.Before(f.until) {
			first = name
		}
	}
	delete(q.held, first)
}

// Load takes what was counted.
func (m *Machine) Load(now time.Time, l Load) {
	v, q := m.advance(now), &m.quality
	took := v.Sub(q.loadAt)
	if !q.seen {
		q.seen, q.load, q.loadAt = true, l, v
		return
	}
	if took < BusyInterval/2 {
		return
	}
	if took > time.Second { // as after a pause
		q.rate = 0
	}
	q.rate += (float64(l.Bytes-q.load.Bytes)/took.Seconds() - q.rate) * min(took.Seconds(), 1)
	q.load, q.loadAt = l, v
	if q.cameAt.IsZero() || l.Received != q.came.Received || l.Sent == q.came.Sent {
		q.came, q.cameAt = l, v
	}
	switch {
	case q.sunkAt.IsZero():
		q.sunk, q.sunkAt = l, v
	case v.Sub(q.sunkAt) >= sunkPeriod:
		sent, lost := float64(l.Sent-q.sunk.Sent), float64(int64(l.Lost-q.sunk.Lost))
		if sent >= sunkPackets && lost >= sunkShare*sent {
			q.sinking++
		} else {
			q.sinking = 0
		}
		q.sunk, q.sunkAt = l, v
	}
}

// lasts reports whether something has been so for d, and keeps since when.
func lasts(since *time.Time, v time.Time, so bool, d time.Duration) bool {
	switch {
	case !so:
		*since = time.Time{}
	case since.IsZero():
		*since = v
	}
	return so && v.Sub(*since) >= d
}

// judgeQuality compares the active path, which lives, with the standby, which is alive, and says why the session should move, if it should.
func (m *Machine) judgeQuality(v time.Time) (Cause, string) {
	q, a, b := &m.quality, m.active, m.standby
	if v.Sub(m.busySince) < settle || !m.moved.IsZero() && v.Sub(m.moved) < settle || a.prober == nil || b.prober == nil {
		q.fresh()
		return "", ""
	}
	on, other := a.prober.Stats(), b.prober.Stats()
	if on.Decided < leastDecided || other.Decided < leastDecided {
		return "", ""
	}
	lossy := lasts(&q.lossy, v, on.Loss >= badLoss && other.Loss <= on.Loss/3, lossFor)
	slow := lasts(&q.slow, v, slower(on, other) && q.rate*(on.RTT-other.RTT).Seconds() < ownQueue, rttFor)
	good := other.Loss <= backLoss && !slower(other, on)
	if b.rank == a.rank {
		good = good && b.name == q.home && other.RTT <= on.MinRTT*5/4+badRTT/5
	}
	better := lasts(&q.better, v, good && b.rank <= a.rank, backFor)
	if h := q.held[b.name]; h != nil && v.Before(h.until) {
		return "", ""
	}
	switch {
	case lossy:
		return CauseLoss, fmt.Sprintf("left %s: %.0f %% of probes lost, %s %.0f %%", a.name, 100*on.Loss, b.name, 100*other.Loss)
	case q.isStalled(v, on):
		return CauseStalled, fmt.Sprintf("left %s: %d packets sent and nothing came back, though probes are answered", a.name, q.load.Sent-q.came.Sent)
	case q.sinking >= sunkTimes && on.Loss < badLoss && other.Loss < badLoss:
		return CauseStalled, fmt.Sprintf("left %s: packets are lost, though probes are answered", a.name)
	case slow:
		return CauseRTT, fmt.Sprintf("left %s: round trip %v, %s %v", a.name, on.RTT.Round(time.Millisecond), b.name, other.RTT.Round(time.Millisecond))
	case better && b.rank < a.rank:
		return CauseRung, fmt.Sprintf("%s is a better rung than %s, and was good for %v", b.name, a.name, backFor)
	case better:
		return CauseBack, fmt.Sprintf("back to %s: good for %v, %.0f %% of probes lost, round trip %v", b.name, backFor, 100*other.Loss, other.RTT.Round(time.Millisecond))
	}
	return "", ""
}

// slower reports whether a path's round trip is bad, compared with the other's.
func slower(p, other stun.PathStats) bool {
	return other.RTT > 0 && p.RTT > 2*other.RTT && p.RTT > other.RTT+badRTT
}

// isStalled reports whether QUIC sends and nothing comes back.
func (q *quality) isStalled(v time.Time, on stun.PathStats) bool {
	return !q.cameAt.IsZero() && q.load.Sent-q.came.Sent >= stalledPackets && v.Sub(q.cameAt) >= max(stalledFor, 4*on.RTT) &&
		on.Unanswered == 0 && on.LastAnswer.After(q.cameAt)
}
