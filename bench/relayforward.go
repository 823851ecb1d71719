package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"sallyway/relay/udpio"
)

const (
	relayStall = 20 * time.Millisecond  // without an arrival, what is missing is lost
	pressPause = 200 * time.Microsecond // between bursts of a steady load
	pressMost  = time.Millisecond
)

// forward sends through all pairs in turn for a while, from a to b, with at most window bytes on their way.
func forward(ctx context.Context, pid int, pairs []*relayPair, segments, window int, length time.Duration) (Forwarded, error) {
	run := channelRun(segments)
	var arrived atomic.Int64 // bytes of payload
	progress := make(chan struct{}, 1)
	var wg sync.WaitGroup
	for _, p := range pairs {
		if err := p.b.udp.SetReadDeadline(time.Time{}); err != nil {
			return Forwarded{}, err
		}
		wg.Go(func() { p.b.receive(&arrived, progress) })
	}
	before, err := treeCPU(pid)
	if err != nil {
		return Forwarded{}, err
	}
	stall := time.NewTimer(relayStall)
	defer stall.Stop()
	var sent, lost int64
	start := time.Now()
	for i := 0; time.Since(start) < length && ctx.Err() == nil; i++ {
		if err := pairs[i%len(pairs)].a.sock.Write(run, 4+relaySegment, 0, udpio.Peer{}); err != nil && !errors.Is(err, syscall.ENOBUFS) {
			return Forwarded{}, err
		}
		sent += int64(segments * relaySegment)
		for sent-lost-arrived.Load() > int64(window) && ctx.Err() == nil {
			stall.Reset(relayStall)
			select {
			case <-progress:
			case <-stall.C:
				lost = sent - arrived.Load()
			}
		}
	}
	took, got := time.Since(start), arrived.Load()
	after, err := treeCPU(pid)
	if err != nil {
		return Forwarded{}, err
	}
	for _, p := range pairs {
		err = errors.Join(err, p.b.udp.SetReadDeadline(time.Now()))
	}
	wg.Wait()
	f := Forwarded{
		Pairs: len(pairs), Segments: segments, Window: window, BitsPerSecond: float64(got) * 8 / took.Seconds(), PacketsPerS: float64(got) / relaySegment / took.Seconds(),
		Lost: max(0, ratio(float64(sent-arrived.Load()), float64(sent))),
	}
	f.setCPU(ratio((after - before).Seconds(), float64(got)/1e9))
	return f, errors.Join(err, ctx.Err())
}

// channelRun is a run of ChannelData messages of one channel, full of zeros.
func channelRun(segments int) []byte {
	run := make([]byte, 0, segments*(4+relaySegment))
	for range segments {
		run = binary.BigEndian.AppendUint16(run, relayChannel)
		run = binary.BigEndian.AppendUint16(run, relaySegment)
		run = append(run, make([]byte, relaySegment)...)
	}
	return run
}

// press sends from a to b at a rate in bit/s until ctx ends, in bursts of what pressPause owes. What it owes because it was not
// given the processor for longer than pressMost it forgets: nobody sends that at once.
func (p *relayPair) press(ctx context.Context, segments int, rate float64) error {
	run := channelRun(segments)
	perRun := float64(segments*relaySegment) * 8
	tick := time.NewTicker(pressPause)
	defer tick.Stop()
	start, sent := time.Now(), 0.0
	for {
		owed := time.Since(start).Seconds() * rate
		for sent = max(sent, owed-pressMost.Seconds()*rate); sent+perRun <= owed; sent += perRun {
			if err := p.a.sock.Write(run, 4+relaySegment, 0, udpio.Peer{}); err != nil && !errors.Is(err, syscall.ENOBUFS) {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// readBuffers serve sockets that are many and mostly idle.
var readBuffers = sync.Pool{New: func() any { return new([udpio.MaxRead]byte) }}

// receive counts until the socket's deadline.
func (c *relayClient) receive(arrived *atomic.Int64, progress chan<- struct{}) {
	for {
		var m udpio.Message
		err := c.wait()
		if err == nil {
			buf := readBuffers.Get().(*[udpio.MaxRead]byte)
			m, err = c.sock.Read(buf[:])
			readBuffers.Put(buf)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || m.Segment < 4 {
			continue // an ICMP error of a datagram
		}
		arrived.Add(int64(m.N - 4*((m.N+m.Segment-1)/m.Segment)))
		select {
		case progress <- struct{}{}:
		default:
		}
	}
}

// wait waits for something to read where buffers are dear.
func (c *relayClient) wait() error {
	if !c.small {
		return nil
	}
	return c.sock.Wait()
}
