// Package datagram is the border between what moves packets (a leg on a relay, later a direct socket or a stream) and what
// speaks QUIC over them (tunnel): runs of equal-sized datagrams in one buffer, so that what the kernel coalesced stays together.
//
//	receiving:  leg reads ≤ 64 KiB in one system call → Batch → Receiver.Receive → queue → quic-go's ReadBatch
//	sending:    quic-go's super-packet → Link.Send → one system call
package datagram

import (
	"sync"
	"sync/atomic"
)

// MaxBatch is the size of a receive buffer in bytes: the largest a UDP_GRO read returns (65 535) rounded up.
const MaxBatch = 64 << 10

// ECN is the two-bit congestion field of an IP header (RFC 3168 §5).
type ECN uint8

// The ECN codepoints.
const (
	NotECT ECN = 0
	ECT1   ECN = 1
	ECT0   ECN = 2
	CE     ECN = 3
)

// Buffer is a pooled, counted receive buffer of MaxBatch bytes. It starts with one reference.
type Buffer struct {
	B    [MaxBatch]byte
	refs atomic.Int32
}

var pool = sync.Pool{New: func() any { return new(Buffer) }}

// NewBuffer takes a buffer from the pool, with one reference held by the caller.
func NewBuffer() *Buffer {
	b := pool.Get().(*Buffer)
	b.refs.Store(1)
	return b
}

// Retain adds a reference.
func (b *Buffer) Retain() { b.refs.Add(1) }

// Release drops a reference; the last one returns the buffer to the pool, and its bytes must not be touched any more.
func (b *Buffer) Release() {
	switch n := b.refs.Add(-1); {
	case n == 0:
		pool.Put(b)
	case n < 0:
		panic("datagram: buffer released twice")
	}
}

// Batch is a run of datagrams from one sender: Stride bytes apart in Data, each preceded by Skip bytes that are not payload
// (a ChannelData header). Every datagram but the last has Stride-Skip bytes of payload, the last one may have fewer.
// The zero Batch is empty.
type Batch struct {
	Data   []byte
	Stride int
	Skip   int
	ECN    ECN
	owner  *Buffer
}

// NewBatch makes a batch over data, which lies in owner. The batch takes over one reference to owner; nil means that data
// belongs to the garbage collector.
func NewBatch(data []byte, stride, skip int, ecn ECN, owner *Buffer) Batch {
	return Batch{Data: data, Stride: stride, Skip: skip, ECN: ecn, owner: owner}
}

// Next cuts the next datagram's payload off the batch. The bytes are valid until Release.
func (b *Batch) Next() (payload []byte, ok bool) {
	if len(b.Data) <= b.Skip || b.Stride <= b.Skip {
		return nil, false
	}
	n := min(b.Stride, len(b.Data))
	payload, b.Data = b.Data[b.Skip:n:n], b.Data[n:]
	return payload, true
}

// Peek returns what Next would cut off.
func (b *Batch) Peek() (payload []byte, ok bool) {
	at := *b
	return at.Next()
}

// Count returns how many datagrams are left.
func (b *Batch) Count() int {
	if b.Stride <= b.Skip || len(b.Data) <= b.Skip {
		return 0
	}
	n := len(b.Data) / b.Stride
	if len(b.Data)%b.Stride > b.Skip {
		n++
	}
	return n
}

// Release gives the batch's reference back and empties the batch. It may be called on an empty batch.
func (b *Batch) Release() {
	if b.owner != nil {
		b.owner.Release()
	}
	*b = Batch{}
}

// Receiver takes what arrives on a link. Receive takes over the batch, must not block (it drops and counts when its queue is
// full), and is called from one goroutine per link.
type Receiver interface {
	Receive(Batch)
}

// Link carries datagrams to one peer: a channel on a leg. Its methods may be called concurrently.
type Link interface {
	// Send sends payload as datagrams of segment bytes each (the last may be shorter); segment 0 means one datagram. It never
	// fails and never blocks: what can not be sent is dropped and counted. payload is not kept. A payload too large for the
	// path is dropped as well, which is how DPLPMTUD finds the path's limit.
	Send(payload []byte, segment int, ecn ECN)
	// SetReceiver says who takes what arrives. Before the first call, and with nil, arriving datagrams are dropped.
	SetReceiver(Receiver)
	// MaxPayload is the largest payload of one datagram, in bytes.
	MaxPayload() int
	// Done is closed when the link can not carry anything any more: its leg is gone or the channel was given up.
	Done() <-chan struct{}
}
