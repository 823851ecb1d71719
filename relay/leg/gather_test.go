package leg

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"sallyway/internal/datagram"
	"sallyway/relay/udpio"
)

// kernel is what a gatherer sends to: it writes down the calls, and holds each until it may return.
type kernel struct {
	mu    sync.Mutex
	calls []call
	err   error
	hold  chan struct{} // a receive lets one call return; nil lets all
}

type call struct {
	b      []byte
	stride int
	ecn    datagram.ECN
}

func (k *kernel) transmit(b []byte, stride int, ecn datagram.ECN) error {
	k.mu.Lock()
	k.calls = append(k.calls, call{bytes.Clone(b), stride, ecn})
	err, hold := k.err, k.hold
	k.mu.Unlock()
	if hold != nil {
		<-hold
	}
	return err
}

// frames are the payloads of a call as a relay reads them.
func (c call) frames(t *testing.T) (channels []uint16, payloads []string) {
	for b := c.b; len(b) > 0; {
		d := b[:min(c.stride, len(b))]
		b = b[len(d):]
		if size := int(binary.BigEndian.Uint16(d[2:])); size != len(d)-channelHeader {
			t.Errorf("a frame of %d bytes says %d", len(d), size)
		}
		channels = append(channels, binary.BigEndian.Uint16(d))
		payloads = append(payloads, string(d[channelHeader:]))
	}
	return channels, payloads
}

func filled(c byte, n int) []byte { return bytes.Repeat([]byte{c}, n) }

func TestGather(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &kernel{hold: make(chan struct{})}
		up := &told{}
		g := newGatherer(k.transmit, up)
		var loop sync.WaitGroup
		loop.Go(g.loop)
		send := func(c byte, n, segment int, ecn datagram.ECN) {
			g.send(minChannel+uint16(c&1), filled(c, n), segment, ecn)
		}
		// The first finds nobody sending, and is sent by the loop, since it is more than one datagram.
		send('a', 250, 100, 0)
		synctest.Wait()
		// These wait while it is in the kernel. What is alike is gathered, across channels; a shorter one ends a run.
		send('b', 300, 100, 0)
		send('c', 100, 100, 0)
		send('d', 130, 100, 0) // ends short
		send('e', 100, 100, 0)
		send('f', 40, 40, 0) // joins as the last
		send('g', 100, 100, datagram.ECT0)
		synctest.Wait()
		if len(k.calls) != 1 {
			t.Fatalf("%d calls at once", len(k.calls))
		}
		for range 4 {
			k.hold <- struct{}{}
			synctest.Wait()
		}
		want := []struct {
			channels string
			sizes    []int
			ecn      datagram.ECN
		}{{"aaa", []int{100, 100, 50}, 0}, {"bbbcdd", []int{100, 100, 100, 100, 100, 30}, 0}, {"ef", []int{100, 40}, 0}, {"g", []int{100}, datagram.ECT0}}
		if len(k.calls) != len(want) {
			t.Fatalf("%d calls, want %d", len(k.calls), len(want))
		}
		for i, w := range want {
			channels, payloads := k.calls[i].frames(t)
			for j, c := range w.channels {
				if j >= len(payloads) || payloads[j] != string(filled(byte(c), w.sizes[j])) || channels[j] != minChannel+uint16(c&1) {
					t.Fatalf("call %d: frame %d is not %c", i, j, c)
				}
			}
			if len(payloads) != len(w.sizes) || k.calls[i].ecn != w.ecn {
				t.Errorf("call %d: %d frames, ECN %d", i, len(payloads), k.calls[i].ecn)
			}
		}
		if sent, unsent, n, _ := up.sending(); sent != 12 || unsent != 0 || n != 250+300+100+130+100+40+100 {
			t.Errorf("sent %d, %d bytes, unsent %d", sent, n, unsent)
		}
		g.stop()
		loop.Wait()
	})
}

func TestGatherBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &kernel{hold: make(chan struct{})}
		up := &told{}
		g := newGatherer(k.transmit, up)
		var senders sync.WaitGroup
		senders.Go(g.loop)
		// More than all runs take: who sends waits for the kernel, and nothing is lost or reordered.
		const datagrams = 10 * udpio.MaxSegments
		payload := make([]byte, datagrams*1000)
		for i := range datagrams {
			binary.BigEndian.PutUint32(payload[i*1000:], uint32(i))
		}
		done := false
		senders.Go(func() {
			g.send(minChannel, payload, 1000, 0)
			done = true
		})
		synctest.Wait()
		if done || g.n != gatherDepth {
			t.Fatalf("done %v with %d runs waiting", done, g.n)
		}
		for !done || g.n > 0 {
			k.hold <- struct{}{}
			synctest.Wait()
		}
		next := uint32(0)
		for _, c := range k.calls {
			_, payloads := c.frames(t)
			if len(payloads) > udpio.MaxSegments || len(c.b) > udpio.MaxWrite {
				t.Errorf("%d datagrams, %d bytes in a call", len(payloads), len(c.b))
			}
			for _, p := range payloads {
				if n := binary.BigEndian.Uint32([]byte(p)); n != next {
					t.Fatalf("datagram %d came when %d was due", n, next)
				}
				next++
			}
		}
		if next != datagrams {
			t.Errorf("%d datagrams", next)
		}
		// A lone datagram is sent by its caller when nobody else sends.
		k.hold = nil
		calls := len(k.calls)
		g.mu.Lock()
		loopIdle := !g.busy && g.n == 0
		g.mu.Unlock()
		g.send(minChannel, filled('x', 10), 10, 0)
		if !loopIdle || len(k.calls) != calls+1 {
			t.Error("a lone datagram was handed over")
		}
		// Errors are told with what they cost; what can never be sent, too.
		k.err = net.ErrClosed
		g.send(minChannel, filled('x', 30), 10, 0)
		synctest.Wait()
		if _, unsent, _, err := up.sending(); unsent != 3 || !errors.Is(err, net.ErrClosed) {
			t.Errorf("%d unsent, %v", unsent, err)
		}
		g.send(minChannel, make([]byte, udpio.MaxWrite), udpio.MaxWrite, 0)
		if _, unsent, _, err := up.sending(); unsent != 4 || !isTooLarge(err) {
			t.Errorf("%d unsent, %v", unsent, err)
		}
		// What waits when it is over is dropped and counted, and so is what comes after.
		k.err, k.hold = nil, make(chan struct{})
		g.send(minChannel, filled('y', 20), 10, 0)
		synctest.Wait()
		g.send(minChannel, filled('y', 20), 10, 0)
		blocked := make(chan struct{})
		senders.Go(func() {
			g.send(minChannel, payload, 1000, 0)
			close(blocked)
		})
		synctest.Wait()
		g.stop()
		<-blocked
		close(k.hold)
		senders.Wait()
		g.send(minChannel, filled('z', 10), 10, 0)
		if _, unsent, _, _ := up.sending(); unsent != 4+2+datagrams+1 {
			t.Errorf("%d unsent, want %d", unsent, 4+2+datagrams+1)
		}
	})
}

func TestGatherAllocs(t *testing.T) {
	up := &told{}
	sent := make(chan struct{}, 1)
	g := newGatherer(func([]byte, int, datagram.ECN) error { sent <- struct{}{}; return nil }, up)
	var loop sync.WaitGroup
	loop.Go(g.loop)
	super, alone := make([]byte, 14*1452), make([]byte, 40)
	for name, b := range map[string][]byte{"run": super, "lone datagram": alone} {
		if n := testing.AllocsPerRun(200, func() {
			g.send(minChannel, b, min(1452, len(b)), datagram.ECT0)
			<-sent
		}); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	g.stop()
	loop.Wait()
}

// Several goroutines send at once: each one's datagrams arrive in its order.
func TestGatherKeepsOrder(t *testing.T) { synctest.Test(t, gatherKeepsOrder) }

func gatherKeepsOrder(t *testing.T) {
	up := &told{}
	k := &kernel{}
	g := newGatherer(k.transmit, up)
	var senders, loop sync.WaitGroup
	loop.Go(g.loop)
	const each = 500
	for s := range 3 {
		senders.Go(func() {
			for i := 0; i < each; {
				n := min(1+i%7, each-i)
				b := make([]byte, 8*n)
				for j := range n {
					binary.BigEndian.PutUint32(b[8*j:], uint32(i+j))
				}
				g.send(minChannel+uint16(s), b, 8, 0)
				i += n
			}
		})
	}
	senders.Wait()
	synctest.Wait()
	g.stop()
	loop.Wait()
	var next [3]uint32
	for _, c := range k.calls {
		channels, payloads := c.frames(t)
		for i, p := range payloads {
			s := channels[i] - minChannel
			if n := binary.BigEndian.Uint32([]byte(p)); n != next[s] {
				t.Fatalf("sender %d: datagram %d came when %d was due", s, n, next[s])
			}
			next[s]++
		}
	}
	if slices.Min(next[:]) != each {
		t.Errorf("%v datagrams", next)
	}
}
