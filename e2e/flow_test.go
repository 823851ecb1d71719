package e2e

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/lab"
)

// The pace of a flow: 1.6 MB/s each way, and no more under way than an outage of some seconds may hold.
const (
	flowBlock  = 8 << 10 // bytes
	flowPace   = 5 * time.Millisecond
	flowWindow = 512 << 10 // bytes that have not come back
	pulsePace  = 10 * time.Millisecond
)

// flow is an application that must notice nothing: a TCP connection on which bytes go to an echo server and back without a pause, each of
// them known, and beside it one with a pulse.
type flow struct {
	pulse *lab.Pulse
	conn  halfCloser
	stop  chan struct{}
	wrote chan error // of the writer
	read  chan error // of the reader

	sent, got atomic.Int64 // bytes
}

type halfCloser interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// startFlow opens both connections. They are closed with the test at the latest.
func startFlow(t *testing.T, h *lab.Host, echo netip.AddrPort) *flow {
	t.Helper()
	f := &flow{stop: make(chan struct{}), wrote: make(chan error, 1), read: make(chan error, 1)}
	f.pulse = must(h.StartPulse(within(t, resume), echo, pulsePace))(t)
	t.Cleanup(f.pulse.Stop)
	f.conn = must(h.Dial(within(t, resume), "tcp", echo.String()))(t).(halfCloser)
	t.Cleanup(func() { f.conn.Close() })
	go func() { f.wrote <- f.write() }()
	go func() { f.read <- f.compare() }()
	f.goesOn(t, resume)
	return f
}

// write sends ascending numbers until it is told to stop, then ends its direction.
func (f *flow) write() error {
	tick := time.NewTicker(flowPace)
	defer tick.Stop()
	block := make([]byte, 0, flowBlock)
	for {
		select {
		case <-f.stop:
			return f.conn.CloseWrite()
		case <-tick.C:
		}
		if f.sent.Load()-f.got.Load() > flowWindow {
			continue
		}
		block = block[:0]
		for n := f.sent.Load() / 8; len(block) < flowBlock; n++ {
			block = binary.BigEndian.AppendUint64(block, uint64(n))
		}
		n, err := f.conn.Write(block)
		f.sent.Add(int64(n))
		if err != nil {
			return fmt.Errorf("after %d bytes sent: %w", f.sent.Load(), err)
		}
	}
}

// compare reads what comes back, to the end.
func (f *flow) compare() error {
	r := bufio.NewReader(f.conn)
	var b [8]byte
	for n := uint64(0); ; n++ {
		switch _, err := io.ReadFull(r, b[:]); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("after %d bytes back: %w", f.got.Load(), err)
		}
		if got := binary.BigEndian.Uint64(b[:]); got != n {
			return fmt.Errorf("%d bytes in: number %d where %d was sent", f.got.Load(), got, n)
		}
		f.got.Add(8)
	}
}

// goesOn waits until both connections have moved a fair number of bytes from now.
func (f *flow) goesOn(t *testing.T, most time.Duration) {
	t.Helper()
	ctx := within(t, most)
	want := f.got.Load() + 32*flowBlock
	check(t, lab.Until(ctx, flowPace, func() error {
		select {
		case err := <-f.read:
			f.read <- err
			return fmt.Errorf("the stream has ended: %w", err)
		default:
		}
		if got := f.got.Load(); got < want {
			return fmt.Errorf("%d bytes have come back, waiting for %d", got, want)
		}
		return nil
	}))
	check(t, f.pulse.WaitBeats(ctx, 20))
}

// silence is the longest that the pulse was without an answer since then.
func (f *flow) silence(since time.Time) time.Duration {
	gap, _ := f.pulse.LongestGap(since)
	return gap
}

// end closes both connections in order. Every byte must have come back and nothing may have been lost before.
func (f *flow) end(t *testing.T) {
	t.Helper()
	if err := f.pulse.Err(); err != nil {
		t.Errorf("the connection with the pulse was lost: %v", err)
	}
	f.pulse.Stop()
	close(f.stop)
	for _, half := range []chan error{f.wrote, f.read} {
		select {
		case err := <-half:
			if err != nil {
				t.Errorf("the stream was lost: %v", err)
			}
		case <-time.After(resume):
			t.Errorf("the stream does not end: %d bytes sent, %d have come back", f.sent.Load(), f.got.Load())
		}
	}
	if sent, got := f.sent.Load(), f.got.Load(); sent != got || sent == 0 {
		t.Errorf("%d bytes sent, %d have come back", sent, got)
	}
}

// platformState is what a daemon's status says of its platform.
func platformState(ctx context.Context, n *lab.Node) (connected bool, since time.Time, err error) {
	var doc struct {
		Platform struct {
			Connected bool      `json:"connected"`
			Since     time.Time `json:"since"`
		} `json:"platform"`
	}
	err = n.Status(ctx, &doc)
	return doc.Platform.Connected, doc.Platform.Since, err
}
