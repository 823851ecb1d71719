package leg

import "time"

const (
	// backlogDelay is how long what a leg holds unsent may take to drain.
	backlogDelay = 20 * time.Millisecond
	// backlogLook is how often a queue is looked at, at most: long enough that what drained meanwhile says something.
	backlogLook = 10 * time.Millisecond
	// backlogStanding is the delay below which nothing stands: network cards keep what they sent for about as long before they say so.
	backlogStanding = 5 * time.Millisecond
	// leastBacklog holds one large write of QUIC, in bytes.
	leastBacklog = 32 << 10
)

// backlog bounds a queue in bytes so that it holds no more than backlogDelay at the rate at which it drains: what is beyond is a delay for
// every flow of the leg. The rate shows only while something waits; a queue that is empty gets twice the room at each look, up to most.
type backlog struct {
	most int

	limit  int // 0 is most
	rate   float64
	at     time.Duration // of the last look
	queued int           // then
	passed int           // bytes queued since
}

// sent counts n bytes that were queued, and reports whether it is time to look.
func (b *backlog) sent(n int, now time.Duration) bool {
	b.passed += n
	return now-b.at >= backlogLook
}

// look takes how many bytes are queued and returns how many should be at most, and whether that is new.
func (b *backlog) look(queued int, now time.Duration) (limit int, changed bool) {
	if b.limit == 0 {
		b.limit = b.most
	}
	elapsed := now - b.at
	drained := b.queued + b.passed - queued
	waited := b.queued > 0 && queued > 0 && elapsed < 20*backlogLook // after a pause nobody knows when it became empty
	before := b.queued
	b.at, b.queued, b.passed = now, queued, 0
	want := b.limit
	switch {
	case waited && drained > 0 && min(queued, before)*int(elapsed/time.Microsecond) >= drained*int(backlogStanding/time.Microsecond):
		rate := float64(drained) / elapsed.Seconds()
		if b.rate == 0 || rate > b.rate {
			b.rate = rate
		} else {
			b.rate += (rate - b.rate) / 4
		}
		want = int(b.rate * backlogDelay.Seconds())
	case waited && drained <= 0: // nothing drained at all: a rate can not be told
	default:
		b.rate = 0
		want = 2 * b.limit
	}
	// One late look of a loaded machine, or one stall of the path, takes a quarter at most.
	want = min(max(want, b.limit-b.limit/4, leastBacklog), b.most)
	// A socket option is a system call: small changes are not worth it.
	if diff := want - b.limit; want != b.most && max(diff, -diff) < b.limit/8 || diff == 0 {
		return b.limit, false
	}
	b.limit = want
	return want, true
}
