package tunnel

import (
	"context"
	"errors"
	"io"
	"sync"
)

// Sizes of the buffers that Splice copies through, in bytes. A flow starts with a small one; one that fills it gets a large one and keeps
// it until it has been slow for a while, so that thousands of idle flows cost little and a busy one moves a lot per call.
const (
	smallBuffer = 16 << 10
	largeBuffer = 256 << 10
	// slowReads is after how many reads in a row that a small buffer would have done for a flow gives the large one back.
	slowReads = 16
)

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
	wg.Go(func() { copyFlow(b, a, fail) })
	copyFlow(a, b, fail)
	wg.Wait()
	stop()
	once.Do(func() {}) // a cancellation that comes now changes nothing any more
	err := errors.Join(a.Close(), b.Close())
	if first != nil {
		return first
	}
	return err
}

// copyFlow copies src to dst up to and including src's end.
func copyFlow(dst, src Flow, fail func(error)) {
	small := smallBuffers.Get().(*[smallBuffer]byte)
	defer smallBuffers.Put(small)
	var large *[largeBuffer]byte
	defer func() {
		if large != nil {
			largeBuffers.Put(large)
		}
	}()
	buf, slow := small[:], 0
	for {
		n, err := src.Read(buf)
		if n > 0 {
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
	}
}
