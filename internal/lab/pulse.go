package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Pulse is one TCP connection to an echo server on which a number goes to and fro at a fixed pace: it shows how long an
// outage was and whether the connection lived through it.
type Pulse struct {
	conn  net.Conn
	pace  time.Duration
	done  chan struct{}
	start time.Time

	mu    sync.Mutex
	beats []beat // guarded by mu
	err   error  // why the connection ended; guarded by mu
}

type beat struct {
	at  time.Time // of the answer
	rtt time.Duration
}

// pulseBeats bounds the memory of a pulse: an hour at 50 a second.
const pulseBeats = 200_000

// StartPulse connects from the host and begins. A next number is sent pace after the answer to the last one.
func (h *Host) StartPulse(ctx context.Context, addr netip.AddrPort, pace time.Duration) (*Pulse, error) {
	c, err := h.Dial(ctx, "tcp", addr.String())
	if err != nil {
		return nil, err
	}
	p := &Pulse{conn: c, pace: pace, done: make(chan struct{}), start: time.Now()}
	h.lab.onClose(func() { c.Close() })
	go p.beat()
	return p, nil
}

func (p *Pulse) beat() {
	defer close(p.done)
	t := time.NewTicker(p.pace)
	defer t.Stop()
	var b [8]byte
	for n := uint64(1); ; n++ {
		sent := time.Now()
		binary.BigEndian.PutUint64(b[:], n)
		_, err := p.conn.Write(b[:])
		if err == nil {
			_, err = io.ReadFull(p.conn, b[:])
		}
		if err == nil && binary.BigEndian.Uint64(b[:]) != n {
			err = fmt.Errorf("answer %d is %d", n, binary.BigEndian.Uint64(b[:]))
		}
		now := time.Now()
		p.mu.Lock()
		if err != nil {
			p.err = err
			p.mu.Unlock()
			return
		}
		if len(p.beats) < pulseBeats {
			p.beats = append(p.beats, beat{now, now.Sub(sent)})
		}
		p.mu.Unlock()
		<-t.C
	}
}

// Beats is how many answers have come.
func (p *Pulse) Beats() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.beats)
}

// WaitBeats waits for n more answers.
func (p *Pulse) WaitBeats(ctx context.Context, n int) error {
	want := p.Beats() + n
	return Until(ctx, p.pace, func() error {
		if have := p.Beats(); have < want {
			if err := p.Err(); err != nil {
				return fmt.Errorf("the connection has ended: %w", err)
			}
			return errors.New("no answer on the connection")
		}
		return nil
	})
}

// Err is why the connection ended, nil while it lives.
func (p *Pulse) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// LongestGap returns the longest time without an answer that ended after since, and when it ended.
func (p *Pulse) LongestGap(since time.Time) (time.Duration, time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	last, longest, end := p.start, time.Duration(0), time.Time{}
	for _, b := range p.beats {
		if gap := b.at.Sub(last); b.at.After(since) && gap > longest {
			longest, end = gap, b.at
		}
		last = b.at
	}
	return longest, end
}

// RTT returns percentiles of the round trips, each between 0 and 100.
func (p *Pulse) RTT(percentiles ...float64) []time.Duration {
	p.mu.Lock()
	rtts := make([]time.Duration, len(p.beats))
	for i, b := range p.beats {
		rtts[i] = b.rtt
	}
	p.mu.Unlock()
	slices.Sort(rtts)
	out := make([]time.Duration, len(percentiles))
	for i, q := range percentiles {
		if len(rtts) > 0 {
			out[i] = rtts[min(len(rtts)-1, int(q/100*float64(len(rtts))))]
		}
	}
	return out
}

// Stop closes the connection.
func (p *Pulse) Stop() {
	p.conn.Close()
	<-p.done
}

// Traffic is how many bytes a host's link to the router has carried, both ways.
func (h *Host) Traffic() (uint64, error) {
	var n uint64
	err := h.Do(func() error {
		rx, tx, err := linkBytes("eth0")
		n = rx + tx
		return err
	})
	return n, err
}

// Busier returns that one of the hosts which carries the most bytes during d: the relay in use.
func Busier(d time.Duration, hosts ...*Host) (*Host, error) {
	before := make([]uint64, len(hosts))
	for i, h := range hosts {
		n, err := h.Traffic()
		if err != nil {
			return nil, err
		}
		before[i] = n
	}
	time.Sleep(d) // the length of the measurement
	var busiest *Host
	var most uint64
	for i, h := range hosts {
		n, err := h.Traffic()
		if err != nil {
			return nil, err
		}
		if moved := n - before[i]; busiest == nil || moved > most {
			busiest, most = h, moved
		}
	}
	return busiest, nil
}
