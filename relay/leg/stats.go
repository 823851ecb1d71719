package leg

import (
	"sync/atomic"
	"time"
)

// Metrics are counters of the legs of a process. The zero Metrics is ready. They may be read while in use.
type Metrics struct {
	SentBytes, ReceivedBytes           atomic.Uint64 // of ChannelData payload
	SentDatagrams, ReceivedDatagrams   atomic.Uint64
	DroppedFull                        atomic.Uint64 // datagrams to send that found the socket or the queue full
	DroppedSize                        atomic.Uint64 // datagrams to send that were too large for the path
	DroppedClosed                      atomic.Uint64 // datagrams to send on a channel or leg that was gone
	DroppedError                       atomic.Uint64 // datagrams to send that the system refused for another reason
	DroppedMalformed                   atomic.Uint64 // received datagrams that are neither ChannelData nor control
	DroppedUnbound                     atomic.Uint64 // received datagrams of a channel that is not bound or has no receiver
	Dialed, DialFailed, Lost, Draining atomic.Uint64 // legs
	Checks                             atomic.Uint64 // immediate checks of a suspect relay
}

// Stats is a snapshot of one leg's counters.
type Stats struct {
	SentBytes, ReceivedBytes         uint64
	SentDatagrams, ReceivedDatagrams uint64
	DroppedFull, DroppedSize         uint64
	DroppedClosed, DroppedError      uint64
	DroppedMalformed, DroppedUnbound uint64
	Checks                           uint64
	// RTT is the smoothed round-trip time of control, 0 before the first answer.
	RTT time.Duration
	// Channels is how many channels are bound.
	Channels int
}

// snapshot reads the counters that make up Stats.
func (m *Metrics) snapshot() Stats {
	return Stats{
		SentBytes: m.SentBytes.Load(), ReceivedBytes: m.ReceivedBytes.Load(),
		SentDatagrams: m.SentDatagrams.Load(), ReceivedDatagrams: m.ReceivedDatagrams.Load(),
		DroppedFull: m.DroppedFull.Load(), DroppedSize: m.DroppedSize.Load(),
		DroppedClosed: m.DroppedClosed.Load(), DroppedError: m.DroppedError.Load(),
		DroppedMalformed: m.DroppedMalformed.Load(), DroppedUnbound: m.DroppedUnbound.Load(),
		Checks: m.Checks.Load(),
	}
}

// count adds to a leg's own counter and to its process's.
func count(own, shared *atomic.Uint64, n uint64) {
	if n > 0 {
		own.Add(n)
		shared.Add(n)
	}
}
