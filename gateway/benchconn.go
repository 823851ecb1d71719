package gateway

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"sallyway/internal/trial"
	"sallyway/tunnel"
)

// benchConn is what the flows of a run have in common: a net.Conn that leads nowhere. It has no deadlines: who uses it closes it.
type benchConn struct {
	run  *benchRun
	once sync.Once
	done chan struct{} // closed by cancel
}

// cancel wakes up whoever reads or writes.
func (c *benchConn) cancel() { c.once.Do(func() { close(c.done) }) }

// Close ends the flow. It may be called more than once.
func (c *benchConn) Close() error {
	c.cancel()
	c.leave()
	return nil
}

// leave takes the flow out of the run.
func (c *benchConn) leave() {
	c.run.mu.Lock()
	defer c.run.mu.Unlock()
	delete(c.run.conns, c)
}

func (c *benchConn) over() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// LocalAddr implements net.Conn.
func (c *benchConn) LocalAddr() net.Addr { return tunnel.Addr(trial.Host) }

// RemoteAddr implements net.Conn.
func (c *benchConn) RemoteAddr() net.Addr { return tunnel.Addr(c.run.peer.Node.String()) }

// SetDeadline implements net.Conn.
func (c *benchConn) SetDeadline(time.Time) error { return errors.ErrUnsupported }

// SetReadDeadline implements net.Conn.
func (c *benchConn) SetReadDeadline(time.Time) error { return errors.ErrUnsupported }

// SetWriteDeadline implements net.Conn.
func (c *benchConn) SetWriteDeadline(time.Time) error { return errors.ErrUnsupported }

// discardConn counts what comes, and says how much that was after its end.
type discardConn struct {
	*benchConn
	bytes       uint64
	first, last time.Time     // of bytes
	half        chan struct{} // closed by CloseWrite, after which the fields above stay
	closing     sync.Once
	rest        []byte // of what is still to be said; of Read
	said        bool
}

var (
	_ tunnel.Conn = (*discardConn)(nil)
	_ tunnel.Conn = (*sourceConn)(nil)
	_ tunnel.Conn = (*pipeConn)(nil)
	_ net.Conn    = (*datagramConn)(nil)
)

func (c *discardConn) Write(b []byte) (int, error) {
	if c.over() {
		return 0, errBenchOver
	}
	c.last = time.Now()
	if c.bytes == 0 {
		c.first = c.last
	}
	c.bytes += uint64(len(b))
	c.run.countReceived(len(b))
	return len(b), nil
}

func (c *discardConn) CloseWrite() error {
	c.closing.Do(func() { close(c.half) })
	return nil
}

func (c *discardConn) Read(b []byte) (int, error) {
	select {
	case <-c.half:
	case <-c.done:
		return 0, errBenchOver
	}
	if !c.said {
		c.said = true
		line, err := json.Marshal(trial.Received{Bytes: c.bytes, Took: c.last.Sub(c.first)})
		if err != nil {
			return 0, err
		}
		c.rest = append(line, '\n')
	}
	if len(c.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(b, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// sourceConn sends zeros for as long as somebody reads.
type sourceConn struct{ *benchConn }

func (c *sourceConn) Write(b []byte) (int, error) {
	if c.over() {
		return 0, errBenchOver
	}
	return len(b), nil // nobody asked for anything
}

func (c *sourceConn) CloseWrite() error { return nil }

// Read fills b with zeros: the buffer has had other flows' bytes in it.
func (c *sourceConn) Read(b []byte) (int, error) {
	if c.over() {
		return 0, errBenchOver
	}
	clear(b)
	c.run.countSent(len(b))
	return len(b), nil
}

// pipeConn is a conn with a goroutine at its other end.
type pipeConn struct {
	*benchConn
	in    *io.PipeWriter // what the peer sends
	out   *io.PipeReader // what it gets
	ended chan struct{}  // the goroutine's end
}

// newPipeConn runs f at the other end: in ends when the peer ends its half, what f writes to out the peer reads, and f's return ends that.
func newPipeConn(c *benchConn, f func(in io.Reader, out io.Writer) error) *pipeConn {
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	p := &pipeConn{benchConn: c, in: inW, out: outR, ended: make(chan struct{})}
	go func() {
		defer close(p.ended)
		err := f(inR, outW)
		if errors.Is(err, io.EOF) {
			err = nil
		}
		_ = outW.CloseWithError(err) // nil is the end
		_ = inR.CloseWithError(errBenchOver)
	}()
	go func() {
		select {
		case <-c.done:
			_ = inR.CloseWithError(errBenchOver)
			_ = outW.CloseWithError(errBenchOver)
		case <-p.ended:
		}
	}()
	return p
}

func (c *pipeConn) Write(b []byte) (int, error) { return c.in.Write(b) }
func (c *pipeConn) Read(b []byte) (int, error)  { return c.out.Read(b) }
func (c *pipeConn) CloseWrite() error           { return c.in.Close() }

// Close ends the flow and waits for the other end's goroutine.
func (c *pipeConn) Close() error {
	err := c.benchConn.Close()
	_ = c.out.Close() // who writes to it finds out
	<-c.ended
	return err
}

// newEchoConn sends everything back.
func newEchoConn(c *benchConn) *pipeConn {
	return newPipeConn(c, func(in io.Reader, out io.Writer) error {
		_, err := io.Copy(out, in)
		return err
	})
}

// newRunConn is the flow that a run stands and falls with.
func newRunConn(c *benchConn) *runConn {
	return &runConn{newPipeConn(c, func(in io.Reader, out io.Writer) error {
		err := c.run.answer(in, out)
		c.leave() // its end is read as one, while the run's other flows are cut
		c.run.finish(fmt.Errorf("the peer is done: %w", errBenchOver))
		return err
	})}
}

type runConn struct{ *pipeConn }

// Close ends the run with the flow.
func (c *runConn) Close() error {
	c.run.finish(fmt.Errorf("its flow or session ended: %w", errBenchOver))
	return c.pipeConn.Close()
}

// datagramConn sends datagrams back: as many as came, and no more bytes.
type datagramConn struct {
	*benchConn
	queue chan []byte
}

// Write takes one datagram. What finds the queue full is dropped, as a host would.
func (c *datagramConn) Write(b []byte) (int, error) {
	if c.over() {
		return 0, errBenchOver
	}
	if len(b) > benchBytes {
		return len(b), nil
	}
	c.run.datagrams.Add(1)
	c.run.countReceived(len(b))
	select {
	case c.queue <- append([]byte(nil), b...):
	default:
	}
	return len(b), nil
}

// Read returns the next datagram to send.
func (c *datagramConn) Read(b []byte) (int, error) {
	select {
	case d := <-c.queue:
		n := copy(b, d)
		c.run.countSent(n)
		return n, nil
	case <-c.done:
		return 0, errBenchOver
	}
}

// relayRTT is the gateway's own round trip to the relay of a session's path, 0 where it is not known.
func (d *gatewayDaemon) relayRTT(path tunnel.LinkInfo) time.Duration {
	for _, st := range d.legs.Status() {
		if st.Up && st.Stats != nil && (st.Name == path.Name || st.Relay.ID == path.Name) {
			return st.Stats.RTT
		}
	}
	return 0
}
