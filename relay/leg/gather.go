package leg

import (
	"encoding/binary"
	"net"
	"sync"
	"syscall"

	"sallyway/internal/datagram"
	"sallyway/relay/udpio"
)

// gatherDepth bounds the runs that wait to be sent, the one in the kernel included, each of 64 KiB at most. Who sends when all are in use waits
// for the kernel, which never waits itself.
const gatherDepth = 4

// gatherer frames datagrams as ChannelData and sends them in runs: what is sent while the last run is in the kernel waits and goes in one
// system call, as long as size and ECN field are the same. QUIC sends from one goroutine a connection, 20 KiB at a time, so a goroutine of
// the gatherer's makes the system calls of what comes in several segments. A lone datagram that finds nobody sending is sent at once by
// its caller: an acknowledgement or a request costs no hand-over. Nothing is reordered, and nothing waits for a timer.
type gatherer struct {
	// transmit makes the system call, outside of mu, one at a time.
	transmit func(b []byte, segment int, ecn datagram.ECN) error
	up       upcalls

	mu      sync.Mutex // guards what follows
	work    sync.Cond  // there is a run, or it is over
	free    sync.Cond  // a run was sent, or it is over
	runs    [gatherDepth]run
	head, n int
	busy    bool // the first run is in the kernel
	over    bool
}

// run is framed datagrams of one stride; the last may be shorter, which makes it full.
type run struct {
	b         []byte // of MaxWrite, made when first used
	end       int
	datagrams int
	stride    int // header included
	ecn       datagram.ECN
	full      bool
}

func newGatherer(transmit func([]byte, int, datagram.ECN) error, up upcalls) *gatherer {
	g := &gatherer{transmit: transmit, up: up}
	g.work.L, g.free.L = &g.mu, &g.mu
	return g
}

// takes reports whether a datagram of n bytes with its header, of a send of stride, can join the run.
func (r *run) takes(n, stride int, ecn datagram.ECN) bool {
	return !r.full && r.ecn == ecn && (r.stride == stride || n < r.stride) && r.datagrams < udpio.MaxSegments && r.end+n <= len(r.b)
}

func (r *run) add(number uint16, payload []byte) {
	b := r.b[r.end:]
	binary.BigEndian.PutUint16(b, number)
	binary.BigEndian.PutUint16(b[2:], uint16(len(payload)))
	n := channelHeader + copy(b[channelHeader:], payload)
	r.end += n
	r.datagrams++
	r.full = n < r.stride
}

// send frames payload and sends it, or leaves it to the goroutine that does.
func (g *gatherer) send(number uint16, payload []byte, segment int, ecn datagram.ECN) {
	stride := segment + channelHeader
	datagrams := uint64((len(payload) + segment - 1) / segment)
	if stride > udpio.MaxWrite {
		g.up.unsent(datagrams, syscall.EMSGSIZE)
		return
	}
	g.mu.Lock()
	for alone := datagrams == 1; len(payload) > 0; {
		if g.over {
			g.mu.Unlock()
			g.up.unsent(uint64((len(payload)+segment-1)/segment), net.ErrClosed)
			return
		}
		var r *run
		if last := g.n - 1; last > 0 || (last == 0 && !g.busy) {
			r = &g.runs[(g.head+last)%gatherDepth]
		}
		if r == nil || !r.takes(channelHeader+min(segment, len(payload)), stride, ecn) {
			if g.n == gatherDepth {
				g.work.Signal() // this send may be what fills all of them
				g.free.Wait()
				continue
			}
			r = &g.runs[(g.head+g.n)%gatherDepth]
			g.n++
			if r.b == nil {
				r.b = make([]byte, udpio.MaxWrite)
			}
			*r = run{b: r.b, stride: stride, ecn: ecn}
		}
		for len(payload) > 0 {
			k := min(segment, len(payload))
			if !r.takes(channelHeader+k, stride, ecn) {
				break
			}
			r.add(number, payload[:k])
			payload = payload[k:]
		}
		if alone && g.n == 1 && !g.busy {
			g.firstLocked()
			alone = false
		}
	}
	if g.n > 0 && !g.busy {
		g.work.Signal()
	}
	g.mu.Unlock()
}

// firstLocked sends the first run. It lets go of mu meanwhile.
func (g *gatherer) firstLocked() {
	r := &g.runs[g.head]
	g.busy = true
	g.mu.Unlock()
	if err := g.transmit(r.b[:r.end], r.stride, r.ecn); err != nil {
		g.up.unsent(uint64(r.datagrams), err)
	} else {
		g.up.sent(uint64(r.datagrams), uint64(r.end-r.datagrams*channelHeader))
	}
	g.mu.Lock()
	g.busy = false
	g.head = (g.head + 1) % gatherDepth
	g.n--
	g.free.Signal()
}

// loop sends what waits, until stop.
func (g *gatherer) loop() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for {
		switch {
		case g.over:
			return
		case g.n > 0 && !g.busy:
			g.firstLocked()
		default:
			g.work.Wait()
		}
	}
}

// stop ends the loop and drops what waits.
func (g *gatherer) stop() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.over {
		return
	}
	g.over = true
	for i := range g.n {
		if i > 0 || !g.busy {
			g.up.unsent(uint64(g.runs[(g.head+i)%gatherDepth].datagrams), net.ErrClosed)
		}
	}
	g.work.Broadcast()
	g.free.Broadcast()
}
