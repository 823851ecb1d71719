package tunnel

import (
	"context"
	"net"
	"time"
)

// RunConn is what a connection of Handler.DialUDP may be besides: one that moves runs of datagrams in one call. A run is datagrams of one
// size behind each other, of which the last may be shorter.
type RunConn interface {
	net.Conn
	// ReadRun reads a run into b, which has room for 64 KiB: n bytes in datagrams of size.
	ReadRun(b []byte) (n, size int, err error)
	// WriteRun sends a run, in one call or in several.
	WriteRun(b []byte, size int) error
}

// receiveRuns hands over what arrives in QUIC datagrams until the stream or ctx ends, together what has come together. A datagram that
// comes alone passes at once and without a copy. The run is valid until f returns.
func (d *datagrams) receiveRuns(ctx context.Context, f func(run []byte, size int)) {
	var come atOnce
	for {
		b, err := d.str.ReceiveDatagram(ctx)
		if err != nil {
			return // as receiveFrames: the capsules' reader says how it ended
		}
		first, ok := udpPayload(b)
		if !ok {
			continue
		}
		d.countRead(len(first))
		if b, ok = d.receiveNow(&come); !ok {
			f(first, len(first))
			continue
		}
		d.gatherRun(&come, first, b, f)
	}
}

// gatherRun hands over first and next, and what has come behind them.
func (d *datagrams) gatherRun(come *atOnce, first, next []byte, f func(run []byte, size int)) {
	buf := udpBuffers.Get().(*[MaxUDPPayload + 8]byte)
	defer udpBuffers.Put(buf)
	n, size := copy(buf[:], first), len(first)
	for ok := true; ok; next, ok = d.receiveNow(come) {
		// One that is longer, or comes behind a shorter one, begins another run.
		if n%max(1, size) != 0 || size == 0 || len(next) == 0 || len(next) > size || n+len(next) > len(buf) {
			f(buf[:n], size)
			n, size = 0, len(next)
		}
		n += copy(buf[n:], next)
	}
	f(buf[:n], size)
}

// receiveNow returns the next payload if it has come already.
func (d *datagrams) receiveNow(come *atOnce) (payload []byte, ok bool) {
	for {
		come.asked = false
		b, err := d.str.ReceiveDatagram(come)
		if err != nil {
			return nil, false
		}
		if payload, ok = udpPayload(b); ok {
			d.countRead(len(payload))
			return payload, true
		}
	}
}

// atOnce is a context that ends as soon as somebody would wait: it makes a call that first looks at what is there not block. It is for
// one goroutine.
type atOnce struct{ asked bool }

var ended = func() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// Deadline implements context.Context.
func (*atOnce) Deadline() (time.Time, bool) { return time.Time{}, false }

// Value implements context.Context.
func (*atOnce) Value(any) any { return nil }

// Done implements context.Context.
func (c *atOnce) Done() <-chan struct{} {
	c.asked = true
	return ended
}

// Err implements context.Context.
func (c *atOnce) Err() error {
	if c.asked {
		return context.Canceled
	}
	return nil
}
