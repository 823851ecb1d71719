package tunnel

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// Sizes of the buffers that Splice copies through, in bytes. A flow starts with a small one; one that fills it gets a large one and keeps
// it until it has been slow for a while, so that thousands of idle flows cost little and a busy one moves a lot per call.
const (
	smallBuffer = 16 << 10
	largeBuffer = 256 << 10
	// slowReads is after how many reads in a row that a small buffer would have done for a flow gives the large one back.
	slowReads = 16
)

// A flow that only streams one way is read in larger pieces: its reader lets data gather for a moment when there was little. Several
// such flows of one session arrive packet by packet in turns, and each would otherwise wake its reader, and the kernel behind it,
// for a few packets at a time.
const (
	// streaming is how many bytes have to pass one way, with none the other, until a flow counts as one that nobody waits for
	// piece by piece. What asks and answers is never held up.
	streaming = 1 << 20
	// gatherBelow is what is little, in bytes: about half of what one call to the kernel takes.
	gatherBelow = 32 << 10
	// gatherFor is long enough for a few large writes and far shorter than what a window covers.
	gatherFor = time.Millisecond
)

// gather says when a reader lets data gather. The zero gather is ready.
type gather struct {
	oneWay  int    // bytes since something passed the other way
	against uint64 // bytes that have passed the other way
}

// after is told of a read of n bytes, and how many have passed the other way so far. It returns how long to wait before the next.
func (g *gather) after(n int, against uint64) time.Duration {
	if against != g.against {
		g.against, g.oneWay = against, 0
	}
	g.oneWay += n
	if g.oneWay < streaming {
		return 0
	}
	g.oneWay = streaming // it does not overflow
	if n >= gatherBelow {
		return 0
	}
	return gatherFor
}

var (
	smallBuffers = sync.Pool{New: func() any { return new([smallBuffer]byte) }}
	largeBuffers = sync.Pool{New: func() any { return new([largeBuffer]byte) }}
)

// Splice copies both ways between a and b until both directions have ended, one of them fails, or ctx ends; it passes half-closes and
// resets on, closes both, and returns after both of its goroutines have. The error says what ended it early; nil when both directions
// came to their end.
func Splice(ctx context.Context, a, b Flow) error {
	var once sync.Once
	var first error
	fail := func(err error) {
		once.Do(func() { first = err })
		a.Reset()
		b.Reset()
	}
	stop := context.AfterFunc(ctx, func() { fail(context.Cause(ctx)) })
	var wg sync.WaitGroup
	var toA, toB atomic.Uint64 // bytes
	wg.Go(func() { copyFlow(b, a, &toB, &toA, fail) })
	copyFlow(a, b, &toA, &toB, fail)
	wg.Wait()
	stop()
	once.Do(func() {}) // a cancellation that comes now changes nothing any more
	err := errors.Join(a.Close(), b.Close())
	if first != nil {
		return first
	}
	return err
}

// copyFlow copies src to dst up to and including src's end. It counts in moved; against is the count of the other direction.
func copyFlow(dst, src Flow, moved, against *atomic.Uint64, fail func(error)) {
	small := smallBuffers.Get().(*[smallBuffer]byte)
	defer smallBuffers.Put(small)
	var large *[largeBuffer]byte
	defer func() {
		if large != nil {
			largeBuffers.Put(large)
		}
	}()
	var g gather
	buf, slow := small[:], 0
	for {
		n, err := src.Read(buf)
		if n > 0 {
			moved.Add(uint64(n))
			if _, werr := dst.Write(buf[:n]); werr != nil {
				fail(werr)
				return
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			if err := dst.CloseWrite(); err != nil {
				fail(err)
			}
			return
		case err != nil:
			fail(err)
			return
		case large == nil && n == len(buf):
			large = largeBuffers.Get().(*[largeBuffer]byte)
			buf, slow = large[:], 0
		case large != nil && n > smallBuffer:
			slow = 0
		case large != nil:
			if slow++; slow == slowReads {
				largeBuffers.Put(large)
				large, buf = nil, small[:]
			}
		}
		if d := g.after(n, against.Load()); d > 0 {
			time.Sleep(d)
		}
	}
}
