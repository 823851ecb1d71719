package tunnel

import (
	"time"

	"github.com/quic-go/quic-go"
)

// QUIC's sender leaves slow start for good when the delay grows, also while it sends next to nothing: one direction's full queue has the
// other direction grow by a packet per round trip from then on, and so does a burst of loss long after the path is clear again. A window
// of its own makes the sender ask the path again, and a move to another path, which below QUIC may be the same link, gives it one.
//
// A renewal says when. It does so only where the window is what limits the sender, grows by a packet per round trip, loses nothing, and
// where the path shows no queue of its own: then there is room, and whoever else uses it is not hurt. A delay above the path's least is a
// queue, or another way than before: a queue that is the sender's own grows with its window.
const (
	// renewSample is how far apart samples are at least.
	renewSample = 100 * time.Millisecond
	// renewLeastRTT is below which a window that grows by a packet per round trip is soon large enough.
	renewLeastRTT = 5 * time.Millisecond
	// renewRounds and renewLeast are how long a sender that never lost anything has to be held back by its window.
	renewRounds, renewLeast = 4, 400 * time.Millisecond
	// renewLossRounds and renewLossLeast are how long ago the last loss must be. Loss at random rates keeps a sender below that, and a path
	// that is full in truth shows it by then.
	renewLossRounds, renewLossLeast = 16, 3 * time.Second
	// renewWindow is what has to be small about a window that is renewed, in bytes: a new one has 38 400. With a larger one there is something to
	// lose, since slow start may end too early again. It is renewed where the sender was twice as fast before, or where nothing was lost and the
	// delay is steady.
	renewWindow = 128 << 10
	// renewPause and renewMostPause bound the time from one renewal to the next. It doubles when one has not raised the rate by half.
	renewPause, renewMostPause = 10 * time.Second, 5 * time.Minute
	// renewMeter is over what time the rate is measured that tells whether a renewal was worth it.
	renewMeter = time.Second
	// renewPacket is by how many bytes a window grows per round trip outside slow start, generously.
	renewPacket = 2 * 1500
)

// renewal judges one sender. The zero renewal is ready. It has no clock: times are given. It is not safe for concurrent use.
type renewal struct {
	last quic.ConnectionStats
	at   time.Time // of last

	since  time.Time     // the window has been the limit since then; zero: it is not
	window uint64        // when that began, bytes
	low    time.Duration // the least and the largest delay since then
	high   time.Duration
	lossAt time.Time // of the last loss seen on this path; zero: none

	renewed time.Time // of the last renewal
	pause   time.Duration
	before  float64 // rate at the last renewal, bytes a second
	best    float64 // rate since

	most    float64 // best rate ever
	meterAt time.Time
	meter   uint64 // bytes sent by then
}

// sample takes what QUIC counts at now and reports whether the sender should get a new window. If it gets one, began is to be called.
func (r *renewal) sample(now time.Time, s quic.ConnectionStats) bool {
	if r.at.IsZero() {
		r.at, r.last, r.meterAt, r.meter = now, s, now, s.BytesSent
		return false
	}
	took := now.Sub(r.at)
	if took < renewSample {
		return false
	}
	last := r.last
	r.last, r.at = s, now
	if d := now.Sub(r.meterAt); d >= renewMeter {
		r.best = max(r.best, float64(s.BytesSent-r.meter)/d.Seconds())
		r.most = max(r.most, r.best)
		r.meterAt, r.meter = now, s.BytesSent
	}
	if s.PacketsLost != last.PacketsLost {
		r.lossAt = now
	}
	// What was in flight on average, by Little's law, against the window.
	flight := float64(s.BytesSent-last.BytesSent) * s.SmoothedRTT.Seconds() / took.Seconds()
	if took > time.Second || s.PacketsLost != last.PacketsLost || s.CongestionWindow < last.CongestionWindow ||
		flight < 0.75*float64(last.CongestionWindow) {
		r.since = time.Time{}
		return false
	}
	if r.since.IsZero() {
		r.since, r.window, r.low, r.high = now, s.CongestionWindow, s.LatestRTT, s.LatestRTT
	}
	r.low, r.high = min(r.low, s.LatestRTT), max(r.high, s.LatestRTT)
	held := now.Sub(r.since)
	rounds := held.Seconds() / max(s.SmoothedRTT, time.Millisecond).Seconds()
	if float64(s.CongestionWindow-r.window) > renewPacket*(rounds+1) {
		r.since = time.Time{} // slow start
		return false
	}
	queue := r.low > s.MinRTT+queueless(s.MinRTT)
	switch {
	case s.MinRTT < renewLeastRTT:
		return false
	case s.CongestionWindow > renewWindow && r.most < 2*r.rate() &&
		(!r.lossAt.IsZero() || rounds < renewLossRounds || r.high > r.low+queueless(s.MinRTT)):
		return false
	case queue && (rounds < float64(s.CongestionWindow)/renewPacket || r.high > r.low+queueless(s.MinRTT)):
		return false
	case held < max(renewLeast, renewRounds*s.SmoothedRTT):
		return false
	case !r.lossAt.IsZero() && now.Sub(r.lossAt) < max(renewLossLeast, renewLossRounds*s.SmoothedRTT):
		return false
	}
	return r.renewed.IsZero() || now.Sub(r.renewed) >= r.nextPause()
}

// queueless is by how much a packet may be late that met no queue: what QUIC's slow start takes for none (RFC 9406 section 4.2 has the same).
func queueless(least time.Duration) time.Duration {
	return min(max(least/8, 4*time.Millisecond), 16*time.Millisecond)
}

// rate is what the window allows, in bytes a second.
func (r *renewal) rate() float64 {
	return float64(r.last.CongestionWindow) / max(r.last.SmoothedRTT, time.Millisecond).Seconds()
}

// nextPause is how long after the last renewal there may be another.
func (r *renewal) nextPause() time.Duration {
	if r.best < 1.5*r.before {
		return min(2*r.pause, renewMostPause)
	}
	return renewPause
}

// began says that the sender got a new window at now.
func (r *renewal) began(now time.Time) {
	if r.renewed.IsZero() {
		r.pause = renewPause
	} else {
		r.pause = r.nextPause()
	}
	r.renewed = now
	r.before, r.best = r.rate(), 0
	r.meterAt, r.meter = r.at, r.last.BytesSent
	r.fresh()
}

// fresh forgets the path: the sender has a new window, by a renewal or a move.
func (r *renewal) fresh() { r.since, r.lossAt = time.Time{}, time.Time{} }
