package tunnel

import (
	"bytes"
	"context"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"sallyway/internal/policy"
)

// TestAtOnce holds what receiveRuns relies on: a call that is given the context returns what has come, and does not wait for more.
func TestAtOnce(t *testing.T) {
	var come atOnce
	if context.Cause(&come) != nil {
		t.Error("it has ended before anybody waited")
	}
	<-come.Done()
	if context.Cause(&come) != context.Canceled {
		t.Error("it goes on although somebody waited")
	}
}

// fakeDatagrams is a stream on which datagrams have come.
type fakeDatagrams struct {
	h3datagrams
	come [][]byte
}

func (f *fakeDatagrams) ReceiveDatagram(ctx context.Context) ([]byte, error) {
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	if len(f.come) == 0 {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	b := f.come[0]
	f.come = f.come[1:]
	if b == nil { // a pause
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	return b, nil
}

func TestReceiveRuns(t *testing.T) {
	type run struct{ n, size int }
	const other, pause = -1, -2
	for name, c := range map[string]struct {
		come []int
		want []run
	}{
		"one":                {[]int{5}, []run{{5, 5}}},
		"equal":              {[]int{5, 5, 5}, []run{{15, 5}}},
		"shorter ends it":    {[]int{5, 5, 3, 5, 5}, []run{{13, 5}, {10, 5}}},
		"longer begins":      {[]int{5, 6, 6, 1}, []run{{5, 5}, {13, 6}}},
		"empty ones":         {[]int{0, 0, 4, 4, 0}, []run{{0, 0}, {0, 0}, {8, 4}, {0, 0}}},
		"a pause":            {[]int{5, 5, pause, 5}, []run{{10, 5}, {5, 5}}},
		"other contexts":     {[]int{5, other, 5, other}, []run{{10, 5}}},
		"more than one call": {slices.Repeat([]int{1400}, 60), []run{{46 * 1400, 1400}, {14 * 1400, 1400}}},
	} {
		t.Run(name, func(t *testing.T) {
			str := new(fakeDatagrams)
			var sent, got []byte
			for i, n := range c.come {
				switch n {
				case other:
					str.come = append(str.come, []byte{1, 'x'})
				case pause:
					str.come = append(str.come, nil)
				default:
					p := bytes.Repeat([]byte{byte(i)}, n)
					sent = append(sent, p...)
					str.come = append(str.come, append([]byte{0}, p...))
				}
			}
			ctx, cancel := context.WithCancel(t.Context())
			var runs []run
			d := &datagrams{str: str}
			d.receiveRuns(ctx, func(b []byte, size int) {
				got = append(got, b...)
				if runs = append(runs, run{len(b), size}); len(runs) == len(c.want) {
					cancel()
				}
			})
			if !slices.Equal(runs, c.want) || !bytes.Equal(got, sent) {
				t.Errorf("%v, want %v; bytes the same: %v", runs, c.want, bytes.Equal(got, sent))
			}
			if d.Offsets().Read != uint64(len(sent)) {
				t.Errorf("%d bytes counted of %d", d.Offsets().Read, len(sent))
			}
		})
	}
}

// runPipe is a destination that echoes runs.
type runPipe struct {
	net.Conn
	back chan []byte
	size chan int
}

func (p *runPipe) WriteRun(b []byte, size int) error {
	p.size <- size
	p.back <- bytes.Clone(b)
	return nil
}

func (p *runPipe) ReadRun(b []byte) (n, size int, err error) {
	r, ok := <-p.back
	if !ok {
		return 0, 0, io.EOF
	}
	return copy(b, r), <-p.size, nil
}

// TestUDPRuns sends datagrams through a session to a destination that takes runs.
func TestUDPRuns(t *testing.T) {
	w := newWorld(t, nil)
	pipe := &runPipe{back: make(chan []byte, 100), size: make(chan int, 100)}
	here, there := net.Pipe() // for what is not runs
	defer there.Close()
	pipe.Conn = here
	w.handler.dialUDP = func(context.Context, policy.Target) (net.Conn, error) { return pipe, nil }
	s := w.dial(w.link("a"), nil)
	c, err := s.DialUDP(timeout(t, 5*time.Second), "127.0.0.1", 9)
	if err != nil {
		t.Fatal(err)
	}
	var want []byte
	for i := range 20 {
		p := bytes.Repeat([]byte{byte(i)}, 1000)
		want = append(want, p...)
		if err := c.WritePacket(p); err != nil {
			t.Fatal(err)
		}
	}
	var got []byte
	b := make([]byte, 65535)
	for len(got) < len(want) {
		n, err := c.ReadPacket(b)
		if err != nil || n != 1000 {
			t.Fatal(n, err)
		}
		got = append(got, b[:n]...)
	}
	if !bytes.Equal(got, want) {
		t.Error("other bytes came back")
	}
	close(pipe.back)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}
