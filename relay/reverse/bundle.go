package reverse

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"sallyway/internal/datagram"
)

// closeGrace is how long a channel may take to end after it was closed; then its connection is.
const closeGrace = 5 * time.Second

// Bundle is the channels of one link, at either end: what is put into its queue leaves as chunks on whichever channel has room, and what
// arrives on any of them is handed on in the order in which it was sent. It ends with the first channel that does.
type Bundle struct {
	out  *Queue
	sink func(frames []byte, owner *datagram.Buffer) error
	end  func()

	turn turnstile

	mu       sync.Mutex // guards what follows
	channels []io.Closer
	err      error
	done     chan struct{}
	tasks    sync.WaitGroup
}

// NewBundle makes a bundle without channels. sink takes the frames of a chunk, which are whole but not checked and lie in owner, which it
// retains if it keeps them; it is called by one goroutine at a time, and its error ends the bundle. end, if not nil, is called once when the
// bundle ends.
func NewBundle(out *Queue, sink func(frames []byte, owner *datagram.Buffer) error, end func()) *Bundle {
	b := &Bundle{out: out, sink: sink, end: end, done: make(chan struct{})}
	b.turn.free.L = &b.turn.mu
	return b
}

// Add takes a channel in. kill closes the connection below it, and is called when the channel does not end closeGrace after it was closed.
func (b *Bundle) Add(ch io.ReadWriteCloser, kill func()) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil {
		_ = ch.Close() // the link is over
		return b.err
	}
	b.channels = append(b.channels, ch)
	var running sync.WaitGroup
	running.Go(func() { b.fail(b.read(ch)) })
	running.Go(func() { b.fail(b.write(ch)) })
	b.tasks.Go(func() {
		<-b.done
		t := time.AfterFunc(closeGrace, kill)
		running.Wait()
		t.Stop()
	})
	return nil
}

// Channels is how many channels there are.
func (b *Bundle) Channels() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.channels)
}

func (b *Bundle) write(ch io.Writer) error {
	buf := make([]byte, chunkHeader+MaxChunk)
	for {
		n, number, ok := b.out.Take(buf[chunkHeader:])
		if !ok {
			return net.ErrClosed
		}
		binary.BigEndian.PutUint32(buf, number)
		binary.BigEndian.PutUint16(buf[4:], uint16(n))
		if _, err := ch.Write(buf[:chunkHeader+n]); err != nil {
			return fmt.Errorf("write: %w", err)
		}
	}
}

func (b *Bundle) read(ch io.Reader) error {
	var head [chunkHeader]byte
	for {
		if _, err := io.ReadFull(ch, head[:]); err != nil {
			return ended(err)
		}
		number, n := binary.BigEndian.Uint32(head[:]), int(binary.BigEndian.Uint16(head[4:]))
		if n == 0 || n > MaxChunk {
			return fmt.Errorf("chunk of %d bytes", n)
		}
		buf := datagram.NewBuffer()
		_, err := io.ReadFull(ch, buf.B[:n])
		if err == nil {
			err = b.turn.take(number, func() error { return b.sink(buf.B[:n:n], buf) })
		}
		buf.Release()
		if err != nil {
			return ended(err)
		}
	}
}

// ended words the end of a stream.
func ended(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("the other side closed it")
	}
	return err
}

// fail ends the bundle.
func (b *Bundle) fail(err error) {
	b.mu.Lock()
	if b.err != nil {
		b.mu.Unlock()
		return
	}
	b.err = err
	channels := b.channels
	close(b.done)
	b.mu.Unlock()
	b.out.Close()
	b.turn.close()
	for _, ch := range channels {
		_ = ch.Close() // what is left of it ends with its connection
	}
	if b.end != nil {
		b.end()
	}
}

// Close ends the bundle and waits until nothing of it runs any more.
func (b *Bundle) Close() {
	b.fail(net.ErrClosed)
	b.tasks.Wait()
}

// Done is closed when the bundle has ended; Err says why.
func (b *Bundle) Done() <-chan struct{} { return b.done }

// Err is nil while the bundle lives.
func (b *Bundle) Err() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// turnstile lets chunks through in the order of their numbers. Each of the readers holds one, and the one with the lowest number never
// waits for another, so that they can not wait for one another.
type turnstile struct {
	mu     sync.Mutex // guards what follows
	free   sync.Cond
	next   uint32
	inside bool // somebody is in f
	closed bool
}

// errNumber says that a number came twice.
var errNumber = errors.New("the number of a chunk was there before")

// take waits for number's turn and calls f in it, without the lock.
func (t *turnstile) take(number uint32, f func() error) error {
	t.mu.Lock()
	for !t.closed && (t.inside || t.next != number) {
		if int32(number-t.next) < 0 {
			break
		}
		t.free.Wait()
	}
	switch {
	case t.closed:
		t.mu.Unlock()
		return net.ErrClosed
	case t.next != number:
		t.mu.Unlock()
		return errNumber
	}
	t.inside = true
	t.mu.Unlock()
	err := f()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.inside = false
	t.next++
	t.free.Broadcast()
	return err
}

func (t *turnstile) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	t.free.Broadcast()
}
