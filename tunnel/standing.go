package tunnel

import "time"

// What a queue of ours may hold back. A queue that empties now and then costs nothing; one that stands adds its delay to every packet of the
// path, those of interactive flows included, and only the sender can end it.
const (
	// markDelay is the standing delay from which datagrams are marked as having met congestion (RFC 3168).
	markDelay = 5 * time.Millisecond
	// dropDelay is the standing delay from which they are dropped.
	dropDelay = 20 * time.Millisecond
	// standingFor is how long the delay must not fall below a bound before it counts as standing.
	standingFor = 20 * time.Millisecond
	// standingStep is how much of that may lie between two looks at the queue. A reader or a connection that a loaded machine wakes late finds
	// a long delay, which says nothing: what piled up meanwhile is read at once, and the last of it has not waited.
	standingStep = 5 * time.Millisecond
)

// verdict is what becomes of a datagram that waited.
type verdict uint8

const (
	pass verdict = iota
	mark
	drop
)

// standing finds the standing delay of a queue: the least that anything waited during standingFor, as CoDel does (RFC 8289 §4.2). The zero
// value is a queue that nothing waited in. Times are since any fixed moment.
type standing struct {
	looked             time.Duration // when something last left the queue
	overMark, overDrop time.Duration // for how long everything has waited longer
}

// judge takes what left the queue at now after waited. last says that nothing is left behind it: that is never dropped, and ends the
// standing of the queue.
func (s *standing) judge(now, waited time.Duration, last bool) verdict {
	step := min(now-s.looked, standingStep)
	s.looked = now
	if last || waited <= markDelay {
		s.overMark, s.overDrop = 0, 0
		return pass
	}
	s.overMark += step
	if waited > dropDelay {
		s.overDrop += step
	} else {
		s.overDrop = 0
	}
	switch {
	case s.overDrop >= standingFor:
		return drop
	case s.overMark >= standingFor:
		return mark
	}
	return pass
}
