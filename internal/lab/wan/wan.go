// Package wan emulates a long link between two network namespaces: delay, jitter, loss, a rate with a bounded queue,
// reordering, and an MTU beyond which packets vanish in silence, each direction with its own. It needs no module of the
// kernel: each end is a TUN device, and every packet goes through this process.
//
// TCP super-packets, which the vnet header of the devices carries, stay whole; where one of their segments is lost they are
// cut around it. Every limit and every count is of packets as a real link would see them, sizes are those of IP packets.
//
//	a, err := tun.Open(tun.Config{Name: "eth0"}) // on a thread of the one namespace
//	b, err := tun.Open(tun.Config{Name: "eth0"}) // on a thread of the other
//	way := wan.Direction{Delay: 40 * time.Millisecond, Rate: 100e6, Loss: 0.005}
//	l, err := wan.New(wan.Config{A: a, B: b, AtoB: way, BtoA: way, Seed: 1})
//	err = l.Run(ctx)
package wan

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sallyway/tun"
)

// Direction is what happens to packets one way. The zero Direction passes everything at once.
type Direction struct {
	Delay  time.Duration // of every packet, after it has been sent
	Jitter time.Duration // added to Delay: evenly distributed from nothing to this; it keeps the order
	Loss   float64       // share of packets that are lost, each independently: 0 to 1. They have used the rate
	Rate   int64         // bit/s of IP packets; zero is no limit
	// Queue is how many bytes wait for the rate; a packet that would exceed it is dropped. Zero is 100 ms of the rate, and
	// 32 KiB at least. It means nothing without a rate.
	Queue     int
	Reorder   float64       // share of packets that later ones may overtake: 0 to 1
	ReorderBy time.Duration // how long such a packet is held back; zero is a millisecond
	MTU       int           // bytes; larger packets vanish; zero is no limit
}

// Defaults and bounds of Direction.
const (
	queueTime        = 100 * time.Millisecond
	minQueue         = 32 << 10 // bytes
	defaultReorderBy = time.Millisecond
	minRate          = 8000        // bit/s: below, a packet takes longer than a second
	minLinkMTU       = 68          // bytes: RFC 791 section 3.2
	maxDelay         = time.Minute // of each of the delays
)

func (d Direction) validate() error {
	switch {
	case d.Delay < 0 || d.Delay > maxDelay || d.Jitter < 0 || d.Jitter > maxDelay || d.ReorderBy < 0 || d.ReorderBy > maxDelay:
		return fmt.Errorf("delay %v, jitter %v and reordering by %v are to be between 0 and %v", d.Delay, d.Jitter, d.ReorderBy, maxDelay)
	case !(d.Loss >= 0 && d.Loss <= 1): // NaN is neither
		return fmt.Errorf("loss %v is not between 0 and 1", d.Loss)
	case !(d.Reorder >= 0 && d.Reorder <= 1):
		return fmt.Errorf("reordering %v is not between 0 and 1", d.Reorder)
	case d.Rate != 0 && d.Rate < minRate:
		return fmt.Errorf("rate %d bit/s is below %d", d.Rate, minRate)
	case d.Queue < 0:
		return fmt.Errorf("queue of %d bytes", d.Queue)
	case d.MTU != 0 && d.MTU < minLinkMTU:
		return fmt.Errorf("MTU %d is below %d", d.MTU, minLinkMTU)
	}
	return nil
}

// withDefaults fills in what is zero.
func (d Direction) withDefaults() Direction {
	if d.Queue == 0 {
		d.Queue = max(minQueue, int(float64(d.Rate)/8*queueTime.Seconds()))
	}
	if d.ReorderBy == 0 {
		d.ReorderBy = defaultReorderBy
	}
	return d
}

// Port is an end of the link, such as a *tun.Device. Read gives one packet with HeaderLen bytes of virtio_net_hdr before it,
// and WriteParts takes one.
type Port interface {
	HeaderLen() int
	Read(p []byte) (int, error)
	WriteParts(parts [][]byte) (int, error)
	SetReadDeadline(t time.Time) error
}

var _ Port = (*tun.Device)(nil)

// Config describes a link.
type Config struct {
	A, B       Port // the ends; the caller closes them, after Run has returned
	AtoB, BtoA Direction
	Seed       uint64 // of what is random: the same seed and the same packets meet the same fate
	Split      bool   // cut every super-packet into the packets of a real link: faithful to the packet, and slower
}

// Validate says what is wrong with c.
func (c Config) Validate() error {
	if c.A == nil || c.B == nil {
		return errors.New("a link has two ends")
	}
	if a, b := c.A.HeaderLen(), c.B.HeaderLen(); a != b || a != 0 && a != vnetLen {
		return fmt.Errorf("the ends have vnet headers of %d and %d bytes", a, b)
	}
	if err := c.AtoB.validate(); err != nil {
		return fmt.Errorf("from A to B: %w", err)
	}
	if err := c.BtoA.validate(); err != nil {
		return fmt.Errorf("from B to A: %w", err)
	}
	return nil
}

// Count is what has become of the packets of one direction.
type Count struct {
	Passed     uint64 // handed to the other end
	Bytes      uint64 // of these
	Lost       uint64 // by Loss
	QueueDrops uint64 // found the queue full
	MTUDrops   uint64 // too large
	Reordered  uint64 // held back so that later ones could overtake
	Refused    uint64 // by the kernel of the other end
}

// Stats counts both directions.
type Stats struct{ AtoB, BtoA Count }

// Link is an emulated link.
type Link struct {
	ways [2]*way
}

// New makes a link. It carries nothing before Run.
func New(cfg Config) (*Link, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("emulated link: %w", err)
	}
	head := cfg.A.HeaderLen()
	return &Link{ways: [2]*way{
		{from: cfg.A, to: cfg.B, line: newLine(cfg.AtoB, head, cfg.Split, cfg.Seed, 0)},
		{from: cfg.B, to: cfg.A, line: newLine(cfg.BtoA, head, cfg.Split, cfg.Seed, 1)},
	}}, nil
}

// Stats returns the counts so far. It may be called at any time.
func (l *Link) Stats() Stats { return Stats{AtoB: l.ways[0].count(), BtoA: l.ways[1].count()} }

// Set changes what happens to packets that arrive from now on, also while Run carries others: one link can be many in turn. What is on its way
// stays as it is, and the counts go on.
func (l *Link) Set(aToB, bToA Direction) error {
	if err := (Config{A: l.ways[0].from, B: l.ways[0].to, AtoB: aToB, BtoA: bToA}).Validate(); err != nil {
		return fmt.Errorf("emulated link: %w", err)
	}
	for i, d := range []Direction{aToB, bToA} {
		w := l.ways[i]
		w.mu.Lock()
		w.line.set(d)
		w.mu.Unlock()
	}
	return nil
}

// Run carries packets until ctx ends, which is no error, or an end fails. What is on its way then is dropped. It is called
// once.
func (l *Link) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	for _, w := range l.ways {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			return fmt.Errorf("eventfd: %w", err)
		}
		defer unix.Close(fd)
		w.wake, w.start = fd, time.Now()
	}
	var mu sync.Mutex
	var failed error // the first; guarded by mu
	var wg sync.WaitGroup
	for _, w := range l.ways {
		for _, f := range []func(context.Context) error{w.take, w.deliver} {
			wg.Go(func() {
				err := f(ctx)
				if ctx.Err() == nil {
					mu.Lock()
					if failed == nil {
						failed = err
					}
					mu.Unlock()
				}
				cancel(err)
			})
		}
	}
	<-ctx.Done()
	for _, w := range l.ways {
		_ = w.from.SetReadDeadline(time.Unix(1, 0)) // fails on a closed end, which ends Read too
		w.awaken()
	}
	wg.Wait()
	mu.Lock()
	defer mu.Unlock()
	return failed
}

// way is one direction at work: one goroutine takes packets in, another hands them out when they are due.
type way struct {
	from, to Port
	start    time.Time // of the line's clock
	wake     int       // eventfd: the first packet is due earlier than deliver waits for

	mu    sync.Mutex
	line  *line         // guarded by mu
	until time.Duration // what deliver waits for; zero while it is not waiting; guarded by mu
}

func (w *way) count() Count {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.line.count
}

// take reads packets and puts them on the line.
func (w *way) take(ctx context.Context) error {
	frame := make([]byte, vnetLen+maxPacket)
	for {
		n, err := w.from.Read(frame)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("emulated link: %w", err)
		}
		w.mu.Lock()
		w.line.admit(time.Since(w.start), frame[:n])
		early := w.until != 0 && w.line.next() < w.until
		if early {
			w.until = 0 // once is enough
		}
		w.mu.Unlock()
		if early {
			w.awaken()
		}
	}
}

func (w *way) awaken() {
	_, _ = unix.Write(w.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // full means awake
}

// deliver hands packets out. It sleeps in ppoll: timers of the Go runtime are a millisecond late on an idle process.
func (w *way) deliver(ctx context.Context) error {
	var due []*packet
	parts := make([][]byte, 1)
	for ctx.Err() == nil {
		now := time.Since(w.start)
		w.mu.Lock()
		due = w.line.due(now, due[:0])
		w.until = 0
		next := w.line.next()
		if len(due) == 0 {
			w.until = next
		}
		w.mu.Unlock()
		if len(due) == 0 {
			if err := w.sleep(next - now); err != nil {
				return err
			}
			continue
		}
		var refused Count
		for _, p := range due {
			parts[0] = p.frame
			_, err := w.to.WriteParts(parts)
			if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrClosed) {
				return fmt.Errorf("emulated link: %w", err)
			}
			if err != nil {
				refused.Refused += uint64(p.packets)
				refused.Bytes += uint64(p.bytes)
			}
			p.release()
		}
		if refused.Refused > 0 {
			w.mu.Lock()
			w.line.count.Refused += refused.Refused
			w.line.count.Passed -= refused.Refused
			w.line.count.Bytes -= refused.Bytes
			w.mu.Unlock()
		}
	}
	return nil
}

// sleep waits for d, or until it is woken.
func (w *way) sleep(d time.Duration) error {
	ts := unix.NsecToTimespec(max(0, d.Nanoseconds()))
	fds := []unix.PollFd{{Fd: int32(w.wake), Events: unix.POLLIN}}
	n, err := unix.Ppoll(fds, &ts, nil)
	if err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("ppoll: %w", err)
	}
	if n > 0 {
		var b [8]byte
		_, _ = unix.Read(w.wake, b[:]) // empties it; it does not block
	}
	return nil
}
