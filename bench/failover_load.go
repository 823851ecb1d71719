package bench

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"sallyway/internal/lab"
)

// arrivals are the times at which something came. They may be asked while more comes.
type arrivals struct {
	mu sync.Mutex
	at []time.Time // guarded by mu
}

func (a *arrivals) add(t time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.at = append(a.at, t)
}

// last is when something came last; zero is never.
func (a *arrivals) last() time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.at) == 0 {
		return time.Time{}
	}
	return a.at[len(a.at)-1]
}

func (a *arrivals) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.at)
}

// firstAfter is when something came first after a time; zero is not yet.
func (a *arrivals) firstAfter(t time.Time) time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := len(a.at) - 1; i >= 0; i-- {
		if !a.at[i].After(t) {
			if i+1 < len(a.at) {
				return a.at[i+1]
			}
			return time.Time{}
		}
	}
	if len(a.at) > 0 {
		return a.at[0]
	}
	return time.Time{}
}

// gaps are the times without anything that ended after from and by to, in their whole length, and at last the one that goes on at to.
func (a *arrivals) gaps(from, to time.Time) []time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []time.Duration
	last := from
	for _, t := range a.at {
		if t.After(to) {
			break
		}
		if t.After(from) {
			out = append(out, t.Sub(last))
		}
		last = t
	}
	return append(out, to.Sub(last))
}

// longest is the longest of the gaps.
func (a *arrivals) longest(from, to time.Time) time.Duration {
	var longest time.Duration
	for _, g := range a.gaps(from, to) {
		longest = max(longest, g)
	}
	return longest
}

// beats is one TCP connection to an echo server on which a number goes to and fro at a fixed pace.
type beats struct {
	arrivals
	conn net.Conn
	done chan struct{}
	err  error // why the connection ended, valid when done is closed
}

// failoverPace is that of the exchanges.
const failoverPace = 10 * time.Millisecond

// startBeats begins on an open connection. The next number is sent pace after the answer to the last one.
func startBeats(c net.Conn, pace time.Duration) *beats {
	b := &beats{conn: c, done: make(chan struct{})}
	go b.run(pace)
	return b
}

func (b *beats) run(pace time.Duration) {
	defer close(b.done)
	t := time.NewTicker(pace)
	defer t.Stop()
	for n := uint64(1); ; n++ {
		if b.err = exchangeNumber(b.conn, n); b.err != nil {
			return
		}
		b.add(time.Now())
		<-t.C
	}
}

// exchangeNumber sends a number and wants it back.
func exchangeNumber(c net.Conn, n uint64) error {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], n)
	if _, err := c.Write(b[:]); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return err
	}
	if got := binary.BigEndian.Uint64(b[:]); got != n {
		return fmt.Errorf("answer %d is %d", n, got)
	}
	return nil
}

// ended is why the connection has ended, nil while it lives.
func (b *beats) ended() error {
	select {
	case <-b.done:
		return b.err
	default:
		return nil
	}
}

// stop closes the connection and returns why it had ended before.
func (b *beats) stop() error {
	err := b.ended()
	b.conn.Close()
	<-b.done
	return err
}

// patternSize is how much a stream's pattern repeats after, in bytes: no multiple of any block that is likely to be lost or doubled.
const patternSize = 1<<20 + 7

// streamBlock is written at once.
const streamBlock = 128 << 10

// pattern is the stream's bytes, twice, so that each piece of up to patternSize is in one.
var pattern = sync.OnceValue(func() []byte {
	b := make([]byte, patternSize, 2*patternSize)
	_, _ = mrand.NewChaCha8([32]byte{'f', 'a', 'i', 'l', 'o', 'v', 'e', 'r'}).Read(b) // never fails
	return append(b, b...)
})

// stream is one TCP connection that carries the pattern one way, every byte of which is looked at where it arrives. Both of its ends are in
// this process, on different hosts of the lab.
type stream struct {
	arrivals
	down     bool
	conn     net.Conn // the client's end
	stopped  chan struct{}
	once     sync.Once
	sent     atomic.Int64
	received atomic.Int64
	ended    chan error // 2 places: of either end
	forget   func()     // has its number forgotten; nil is nothing
}

// streams is the private host's end of streams.
type streams struct {
	mu   sync.Mutex
	last uint64             // guarded by mu
	open map[uint64]*stream // by the number that the client sends first; guarded by mu
}

// serveStreamsOn takes streams on the private host's port of iperf3.
func serveStreamsOn(h *lab.Host, addr string) (*streams, error) {
	ln, err := h.Listen(addr)
	if err != nil {
		return nil, err
	}
	s := &streams{open: make(map[uint64]*stream)}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return // the lab closes it
			}
			go s.serve(c)
		}
	}()
	return s, nil
}

func (s *streams) serve(c net.Conn) {
	defer c.Close()
	var b [8]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return
	}
	s.mu.Lock()
	x := s.open[binary.BigEndian.Uint64(b[:])]
	s.mu.Unlock()
	if x == nil {
		return
	}
	if !x.down {
		x.ended <- x.receive(c)
		return
	}
	x.ended <- x.send(c)
	_, _ = c.Read(b[:]) // the client closes when it has all
}

// start opens a stream over a connection to the private host.
func (s *streams) start(c net.Conn, down bool) (*stream, error) {
	x := &stream{down: down, conn: c, stopped: make(chan struct{}), ended: make(chan error, 2)}
	s.mu.Lock()
	s.last++
	n := s.last
	s.open[n] = x
	s.mu.Unlock()
	x.forget = func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.open, n)
	}
	if _, err := c.Write(binary.BigEndian.AppendUint64(nil, n)); err != nil {
		return nil, err
	}
	go func() {
		if down {
			x.ended <- x.receive(c)
		} else {
			x.ended <- x.send(c)
		}
	}()
	return x, nil
}

// send writes the pattern until the stream is stopped, and closes its half.
func (x *stream) send(c net.Conn) error {
	for {
		select {
		case <-x.stopped:
			half, ok := c.(interface{ CloseWrite() error })
			if !ok {
				return errors.New("the connection has no halves")
			}
			return half.CloseWrite()
		default:
		}
		at := x.sent.Load() % patternSize
		n, err := c.Write(pattern()[at : at+streamBlock])
		x.sent.Add(int64(n))
		if err != nil {
			return err
		}
	}
}

// errWrongBytes is a stream that brought other bytes than were sent.
var errWrongBytes = errors.New("other bytes arrive than were sent")

// receive reads to the end.
func (x *stream) receive(c net.Conn) error {
	b := make([]byte, 2*streamBlock)
	for {
		n, err := c.Read(b)
		if n > 0 {
			x.add(time.Now())
			at := x.received.Add(int64(n)) - int64(n)
			from := at % patternSize
			if !bytes.Equal(b[:n], pattern()[from:from+int64(n)]) {
				return fmt.Errorf("%w, after %d bytes", errWrongBytes, at)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// streamEnd bounds how long the rest of a stream may take to arrive.
const streamEnd = 20 * time.Second

// finish has the sender stop, waits until all has arrived, and returns how many bytes did. The error says what is wrong with them, or why the
// connection had ended.
func (x *stream) finish(ctx context.Context) (int64, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, streamEnd, errors.New("the rest of the stream does not arrive"))
	defer cancel()
	defer x.abandon()
	x.stop()
	var errs error
	for range 2 {
		select {
		case err := <-x.ended:
			errs = errors.Join(errs, err)
		case <-ctx.Done():
			return x.received.Load(), context.Cause(ctx)
		}
		if errs != nil {
			return x.received.Load(), errs
		}
	}
	if sent, got := x.sent.Load(), x.received.Load(); sent != got {
		return got, fmt.Errorf("%w: %d of %d", errWrongBytes, got, sent)
	}
	return x.received.Load(), nil
}

// abandon closes the stream without looking at what is left.
func (x *stream) abandon() {
	x.stop()
	x.conn.Close()
	if x.forget != nil {
		x.forget()
	}
}

// stop has the sender stop.
func (x *stream) stop() { x.once.Do(func() { close(x.stopped) }) }
