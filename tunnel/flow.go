package tunnel

import (
	"io"
	"sync/atomic"
)

// Flow is a byte stream both ways that does not tell what carries it. Read and Write may run concurrently with each other and with
// everything else. A Read after the other end's CloseWrite returns io.EOF; one after its Reset returns an error that is ErrReset.
type Flow interface {
	io.Reader
	io.Writer
	// CloseWrite ends this direction: the other end reads io.EOF after everything written. Reading goes on.
	CloseWrite() error
	// Reset ends both directions at once; the other end's Read and Write fail with ErrReset. It may be called more than once.
	Reset()
	// Close releases the flow. What was not closed or reset before is: like Reset, unless both directions have ended.
	Close() error
	// Offsets are the bytes read and written so far.
	Offsets() Offsets
}

// Offsets count the bytes that passed through a flow.
type Offsets struct{ Read, Written uint64 }

// counter counts a flow's bytes.
type counter struct{ read, written atomic.Uint64 }

// Offsets implements Flow.
func (c *counter) Offsets() Offsets { return Offsets{c.read.Load(), c.written.Load()} }
