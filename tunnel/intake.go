package tunnel

import (
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
)

const (
	// takeLimit is how many datagrams a connection may hold that it has not looked at. QUIC's queue takes takeMost (its
	// MaxConnUnprocessedPackets) and drops the rest without a word, which the sender takes for congestion.
	takeLimit, takeMost = 192, 256
	// takeAgain is how much room a connection that was full must have before it gets more: handing over one at a time would wake for each.
	takeAgain = takeLimit / 2
	// takePatience is how long a full connection may look at nothing before it gets takeTrial more, to see whether it is alive. If it then
	// looks at some and stops again, or at nothing though there is no room for another trial, the rest was lost inside of QUIC, which does
	// not count what it drops. A connection that only gets no processor time has everything in its queue yet.
	takePatience = 25 * time.Millisecond
	takeTrial    = 8
	// takeIdle is how long nothing must have been handed over for a connection to have looked at all of it. What is still missing then is
	// what it never counts, such as packets of a handshake that failed.
	takeIdle = time.Second
)

// taker is a connection that counts what it looks at: *quic.Conn.
type taker interface{ ConnectionStats() quic.ConnectionStats }

var _ taker = (*quic.Conn)(nil)

// intake bounds what the connections behind a virtual address have been handed and have not looked at. They count the bytes of each
// datagram when they take it out of their queue, in order, before they try to decrypt it. The zero intake bounds nothing. All but set and
// reached is for the goroutine that reads.
type intake struct {
	takers atomic.Pointer[[]taker]
	// wakeAt is the count of bytes from which a full connection is worth waking for, 0 while nobody waits.
	wakeAt atomic.Uint64

	counted *[]taker // the takers that base belongs to
	base    uint64   // what they had looked at when handed was 0
	handed  uint64   // bytes
	// ends has the value of handed after each of the datagrams first to next, which are not looked at.
	ends        *[takeMost]uint64
	first, next uint64

	begun  time.Duration // when something was last handed over
	since  time.Duration // when the connection was last seen to look at something, while it is full
	stale  uint64        // first as it was then
	trials int           // datagrams beyond takeLimit that were tried
	alive  bool          // it looked at something after a trial
}

// set says which connections take what comes from the address; none bounds nothing.
func (in *intake) set(takers []taker) {
	if len(takers) == 0 {
		in.takers.Store(nil)
		return
	}
	in.takers.Store(&takers)
}

// looked sums up what the connections have looked at, in bytes.
func looked(takers *[]taker) uint64 {
	sum := uint64(0)
	for _, t := range *takers {
		sum += t.ConnectionStats().BytesReceived
	}
	return sum
}

// room returns how many datagrams may be handed over now.
func (in *intake) room() int {
	takers := in.takers.Load()
	if takers != in.counted {
		in.counted = takers
		in.forget()
	}
	if takers == nil {
		return takeLimit
	}
	done := looked(takers) - in.base
	if done >= in.handed {
		// More than was handed over came by another address, before or after a move.
		in.base += done - in.handed
		in.first = in.next
		return takeLimit
	}
	for in.first < in.next && in.ends[in.first%takeMost] <= done {
		in.first++
	}
	return max(takeLimit+in.trials-int(in.next-in.first), 0)
}

// begin is told that datagrams are about to be handed over.
func (in *intake) begin(now time.Duration) {
	if now-in.begun >= takeIdle {
		in.forget()
	}
	in.begun = now
}

// hand counts a datagram of n bytes as handed over. There must be room.
func (in *intake) hand(n int) {
	if in.counted == nil {
		return
	}
	in.handed += uint64(n)
	in.ends[in.next%takeMost] = in.handed
	in.next++
}

// forget takes all that was handed over as looked at.
func (in *intake) forget() {
	if in.counted == nil {
		return
	}
	if in.ends == nil {
		in.ends = new([takeMost]uint64)
	}
	in.base, in.handed, in.first, in.next = looked(in.counted), 0, 0, 0
	in.trials, in.alive = 0, false
}

// wait begins to wait for room.
func (in *intake) wait(now time.Duration) {
	in.look(now)
	in.since = now
	in.wakeAt.Store(in.base + in.ends[(in.first+takeAgain-1)%takeMost])
}

// look notes when the connection has looked at something.
func (in *intake) look(now time.Duration) {
	if in.first != in.stale {
		in.since, in.stale = now, in.first
		in.alive = in.trials > 0
	}
}

// waited reports whether the wait is over: there is room again, or no hope that there will be, which stalled says.
func (in *intake) waited(now time.Duration) (over, stalled bool) {
	room := in.room()
	in.look(now)
	switch {
	case room-in.trials >= takeAgain:
		in.trials, in.alive = 0, false
	case now-in.since < takePatience:
		return false, false
	case in.alive || takeLimit+in.trials+takeTrial > takeMost:
		in.forget()
		stalled = true
	default:
		in.trials += takeTrial
	}
	in.wakeAt.Store(0)
	return true, stalled
}

// reached reports whether somebody waits for room and there is some. It may be called concurrently.
func (in *intake) reached() bool {
	at := in.wakeAt.Load()
	if at == 0 {
		return false
	}
	takers := in.takers.Load()
	return takers == nil || looked(takers) >= at
}
