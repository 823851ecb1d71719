package reverse

import (
	"sync/atomic"

	"sallyway/internal/datagram"
)

// Link is one peer over the last rung: a gateway's bundle of channels, or a client's TLS connection. Its methods may be called concurrently.
type Link struct {
	out      *Queue
	receiver atomic.Pointer[datagram.Receiver]
	done     <-chan struct{}
	draining <-chan struct{}
	close    func()
	err      func() error
	stats    counters
}

var _ datagram.Link = (*Link)(nil)

// counters are a link's.
type counters struct {
	sent, received, sentBytes, receivedBytes    atomic.Uint64
	droppedFull, droppedSize, droppedUnreceived atomic.Uint64
}

// LinkStats are what a link did: datagrams, and bytes of payload.
type LinkStats struct {
	Sent, Received           uint64
	SentBytes, ReceivedBytes uint64
	// DroppedFull found the queue full or the link gone, DroppedSize were larger than MaxPayload, DroppedUnreceived came when nobody received.
	DroppedFull, DroppedSize, DroppedUnreceived uint64
}

// Send implements datagram.Link: what finds the queue full is dropped and counted. The congestion field does not pass a stream.
func (l *Link) Send(payload []byte, segment int, _ datagram.ECN) {
	if len(payload) == 0 {
		return
	}
	if segment <= 0 || segment > len(payload) {
		segment = len(payload)
	}
	all := uint64((len(payload) + segment - 1) / segment)
	if segment > MaxPayload {
		l.stats.droppedSize.Add(all)
		return
	}
	n, _ := l.out.Put(payload, segment) // closed is full
	sent := uint64((n + segment - 1) / segment)
	l.stats.sent.Add(sent)
	l.stats.sentBytes.Add(uint64(n))
	l.stats.droppedFull.Add(all - sent)
}

// SetReceiver implements datagram.Link. Receive is called by one goroutine at a time.
func (l *Link) SetReceiver(r datagram.Receiver) {
	if r == nil {
		l.receiver.Store(nil)
		return
	}
	l.receiver.Store(&r)
}

// MaxPayload implements datagram.Link.
func (l *Link) MaxPayload() int { return MaxPayload }

// Done implements datagram.Link.
func (l *Link) Done() <-chan struct{} { return l.done }

// Err says why the link ended, nil while it lives.
func (l *Link) Err() error { return l.err() }

// Draining is closed when the relay asks its nodes to move. A gateway learns it from Tunnel.Draining.
func (l *Link) Draining() <-chan struct{} { return l.draining }

// Close ends the link and waits for what runs for it. It may be called more than once, but not by the receiver.
func (l *Link) Close() { l.close() }

// Stats reads the counters.
func (l *Link) Stats() LinkStats {
	c := &l.stats
	return LinkStats{
		Sent: c.sent.Load(), Received: c.received.Load(), SentBytes: c.sentBytes.Load(), ReceivedBytes: c.receivedBytes.Load(),
		DroppedFull: c.droppedFull.Load(), DroppedSize: c.droppedSize.Load(), DroppedUnreceived: c.droppedUnreceived.Load(),
	}
}

// receive hands a run on.
func (l *Link) receive(run Run, owner *datagram.Buffer) {
	n := run.count()
	r := l.receiver.Load()
	if r == nil {
		l.stats.droppedUnreceived.Add(n)
		return
	}
	l.stats.received.Add(n)
	l.stats.receivedBytes.Add(uint64(len(run.Frames)) - n*frameHeader)
	(*r).Receive(run.batch(owner))
}
