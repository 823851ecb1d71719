package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"sallyway/internal/lab"
)

// Latency is a measurement of small exchanges on an idle lab, in milliseconds.
type Latency struct {
	Way       string  `json:"way"`
	RTT50     float64 `json:"rtt_p50_ms"`
	RTT99     float64 `json:"rtt_p99_ms"`
	Connect50 float64 `json:"connect_and_first_byte_p50_ms"`
	Connect99 float64 `json:"connect_and_first_byte_p99_ms"`
}

// Datagram is a measurement of small UDP exchanges on an idle lab, in milliseconds.
type Datagram struct {
	Way   string  `json:"way"`
	RTT50 float64 `json:"rtt_p50_ms"`
	RTT99 float64 `json:"rtt_p99_ms"`
	Sent  int     `json:"sent"`
	Lost  int     `json:"lost"`
}

// Loaded is the round trip of small exchanges on a connection of its own while one other saturates the same way, in
// milliseconds.
type Loaded struct {
	Way   string  `json:"way"`
	Down  bool    `json:"down"` // direction of the saturating flow
	RTT50 float64 `json:"rtt_p50_ms"`
	RTT99 float64 `json:"rtt_p99_ms"`
	Beats int     `json:"exchanges"`
}

const (
	// pulsePace is the pause between two small exchanges.
	pulsePace = 2 * time.Millisecond
	// datagramSize is that of the UDP exchanges, in bytes.
	datagramSize = 64
	// datagramWait is how long an answer may take until it counts as lost.
	datagramWait = time.Second
)

// latency measures the ways one after the other: two at once would disturb each other.
func (r *runner) latency(ctx context.Context, l *lab.Lab) error {
	err := r.each(ctx, func(w way) error {
		fmt.Fprintf(r.out, "latency: %s\n", w.name)
		return r.idle(ctx, l, w)
	})
	if err != nil {
		return err
	}
	err = r.each(ctx, func(w way) error {
		if !w.packets {
			return nil
		}
		return r.datagrams(ctx, l, w)
	})
	if err != nil || r.forward == nil {
		return err
	}
	return r.datagrams(ctx, l, *r.forward)
}

// idle measures TCP on the idle lab.
func (r *runner) idle(ctx context.Context, l *lab.Lab, w way) error {
	p, err := l.Client.StartPulse(ctx, netip.AddrPortFrom(w.addr, w.echo), pulsePace)
	if err != nil {
		return err
	}
	err = p.WaitBeats(ctx, r.cfg.Beats)
	p.Stop()
	if err != nil {
		return err
	}
	rtt := p.RTT(50, 99)
	dials := make([]time.Duration, max(1, r.cfg.Dials))
	for i := range dials {
		if dials[i], err = r.firstByte(ctx, w); err != nil {
			return fmt.Errorf("first byte: %w", err)
		}
	}
	slices.Sort(dials)
	r.o.Latency = append(r.o.Latency, Latency{
		Way: w.name, RTT50: ms(rtt[0]), RTT99: ms(rtt[1]), Connect50: ms(percentile(dials, 50)), Connect99: ms(percentile(dials, 99)),
	})
	return nil
}

// datagrams measures UDP on the idle lab: one datagram and its answer at a time.
func (r *runner) datagrams(ctx context.Context, l *lab.Lab, w way) error {
	c, err := l.Client.Dial(ctx, "udp", netip.AddrPortFrom(w.addr, w.echo).String())
	if err != nil {
		return err
	}
	defer c.Close()
	if _, _, err := r.exchangeUDP(ctx, c, 3); err != nil { // the flow comes to be
		return err
	}
	rtts, lost, err := r.exchangeUDP(ctx, c, r.cfg.Beats)
	if err != nil {
		return err
	}
	if len(rtts) == 0 {
		return fmt.Errorf("none of %d datagrams was answered", r.cfg.Beats)
	}
	slices.Sort(rtts)
	r.o.Datagrams = append(r.o.Datagrams, Datagram{Way: w.name, RTT50: ms(percentile(rtts, 50)), RTT99: ms(percentile(rtts, 99)), Sent: r.cfg.Beats, Lost: lost})
	return nil
}

// exchangeUDP sends n datagrams, each after the answer to the last or when that is lost, at the pace of a pulse.
func (r *runner) exchangeUDP(ctx context.Context, c net.Conn, n int) (rtts []time.Duration, lost int, err error) {
	b, in := make([]byte, datagramSize), make([]byte, datagramSize)
	t := time.NewTicker(pulsePace)
	defer t.Stop()
	for i := range n {
		if ctx.Err() != nil {
			return rtts, lost, context.Cause(ctx)
		}
		binary.BigEndian.PutUint64(b, uint64(i))
		sent := time.Now()
		if err := c.SetDeadline(sent.Add(datagramWait)); err != nil {
			return rtts, lost, err
		}
		if _, err := c.Write(b); err != nil {
			return rtts, lost, err
		}
		for {
			_, err := c.Read(in)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				lost++
				break
			}
			if err != nil {
				return rtts, lost, err
			}
			if binary.BigEndian.Uint64(in) == uint64(i) { // else an answer that came too late
				rtts = append(rtts, time.Since(sent))
				break
			}
		}
		<-t.C
	}
	return rtts, lost, nil
}

// percentile of sorted values, between 0 and 100.
func percentile(sorted []time.Duration, q float64) time.Duration {
	return sorted[min(len(sorted)-1, int(q/100*float64(len(sorted))))]
}

// underLoad measures small exchanges beside one flow, each way.
func (r *runner) underLoad(ctx context.Context, l *lab.Lab) error {
	for _, down := range []bool{false, true} {
		err := r.each(ctx, func(w way) error {
			fmt.Fprintf(r.out, "latency under load: %s %s\n", w.name, direction(down))
			m, err := r.loadedOnce(ctx, l, w, down)
			if err != nil {
				return fmt.Errorf("beside load: %w", err)
			}
			r.o.Loaded = append(r.o.Loaded, m)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *runner) loadedOnce(ctx context.Context, l *lab.Lab, w way, down bool) (Loaded, error) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.Time+iperfGrace)
	defer cancel()
	load := make(chan error, 1)
	go func() {
		_, err := r.iperf(ctx, l, w, lab.IperfRun{Time: r.cfg.Time + time.Second, Down: down, CC: r.cfg.CC})
		load <- err
	}()
	p, err := l.Client.StartPulse(ctx, netip.AddrPortFrom(w.addr, w.echo), pulsePace)
	if err != nil {
		cancel()
		return Loaded{}, errors.Join(err, <-load)
	}
	err = <-load
	p.Stop()
	if err != nil {
		return Loaded{}, err
	}
	if p.Beats() == 0 {
		return Loaded{}, errors.New("no exchange was answered")
	}
	rtt := p.RTT(50, 99)
	return Loaded{Way: w.name, Down: down, RTT50: ms(rtt[0]), RTT99: ms(rtt[1]), Beats: p.Beats()}, nil
}
