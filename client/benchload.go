package client

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyway/internal/trial"
	"sallyway/tunnel"
)

// Sizes and times of the load.
const (
	// smallWrite and largeWrite are bytes per write: what is under way when the time is over is written to its end, so slow paths get little.
	smallWrite = 16 << 10
	largeWrite = 256 << 10
	// writeTime is how long a write should take at most.
	writeTime = 50 * time.Millisecond
	// drainTimeout bounds what a flow that was sent needs to arrive.
	drainTimeout = 20 * time.Second
	// A paced run sends datagrams of pacedSize bytes for pacedTime at most; autoPaced is its rate in bits per second where the path carries
	// twice that, maxPaced the largest.
	pacedSize = 1000
	pacedTime = 5 * time.Second
	autoPaced = 10e6
	maxPaced  = 200e6
	// pacedWait is how long after the last datagram that came back another one may.
	pacedWait = 700 * time.Millisecond
)

// latency measures round trips of a few bytes for as long as more says so; it is asked with how many there are.
func (b *benchRun) latency(ctx context.Context, more func(n int) bool) ([]time.Duration, error) {
	var out []time.Duration
	msg, back := make([]byte, echoSize), make([]byte, echoSize)
	pause := time.NewTimer(0)
	defer pause.Stop()
	for more(len(out)) {
		select {
		case <-pause.C:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		binary.BigEndian.PutUint64(msg, uint64(len(out)))
		began := time.Now()
		if err := b.echo.SetReadDeadline(began.Add(drainTimeout)); err != nil {
			return nil, err
		}
		if _, err := b.echo.Write(msg); err != nil {
			return nil, fmt.Errorf("latency: %w", err)
		}
		if _, err := io.ReadFull(b.echo, back); err != nil {
			return nil, fmt.Errorf("latency: %w", err)
		}
		took := time.Since(began)
		if [echoSize]byte(back) != [echoSize]byte(msg) {
			return nil, errors.New("latency: the gateway sends something else back than it was sent")
		}
		out = append(out, took)
		pause.Reset(max(echoPause-took, 0))
	}
	return out, nil
}

// load fills one direction for the configured time.
func (b *benchRun) load(ctx context.Context, up bool) (*BenchLoad, error) {
	port := uint16(trial.PortSource)
	if up {
		port = trial.PortDiscard
	}
	g, gctx := errgroup.WithContext(ctx)
	defer func() { _ = g.Wait() }() // after the resets below; its error was taken by then, or there is another
	var mu sync.Mutex               // guards what follows
	var total trial.Received
	var first, last time.Time
	counting := make(chan struct{}) // closed when all are open: what came before does not count
	flows := make([]*tunnel.Stream, b.cfg.Flows)
	for i := range flows {
		str, release, err := b.open(ctx, port)
		if err != nil {
			return nil, err
		}
		flows[i] = str
		defer str.Reset()
		defer release()
		if up {
			continue
		}
		// It is read from at once: what waits to be read fills the window that all flows of the session share, and the next one would not open.
		g.Go(func() error {
			n, began, ended, err := b.receive(str, counting)
			mu.Lock()
			defer mu.Unlock()
			total.Bytes += n
			if n > 0 && (first.IsZero() || began.Before(first)) {
				first = began
			}
			if ended.After(last) {
				last = ended
			}
			return err
		})
	}
	before, err := b.sample()
	if err != nil {
		return nil, err
	}
	end := time.Now().Add(b.cfg.Time)
	close(counting)
	var lat []time.Duration
	g.Go(func() (err error) {
		lat, err = b.latency(gctx, func(int) bool { return time.Now().Before(end) })
		return err
	})
	for _, str := range flows {
		if !up {
			if err := str.SetReadDeadline(end); err != nil {
				return nil, err
			}
			continue
		}
		g.Go(func() error {
			got, err := sendUntil(str, end)
			mu.Lock()
			defer mu.Unlock()
			total.Bytes, total.Took = total.Bytes+got.Bytes, max(total.Took, got.Took)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	after, err := b.sample()
	if err != nil {
		return nil, err
	}
	if !up {
		total.Took = last.Sub(first)
	}
	l := b.judged(up, before, after)
	l.Flows, l.Bytes, l.Took, l.Latency = b.cfg.Flows, total.Bytes, total.Took, summarize(lat)
	if total.Took > 0 {
		l.BitsPerSecond = float64(total.Bytes) * 8 / total.Took.Seconds()
	}
	if l.Bytes > 0 {
		l.SecondsPerGB = l.Client.Process * after.at.Sub(before.at).Seconds() / (float64(l.Bytes) / 1e9)
	}
	l.Limit = limitOf(l, b.report.Idle.P50)
	return l, nil
}

// sendUntil sends zeros until end and returns what the gateway says has arrived.
func sendUntil(str *tunnel.Stream, end time.Time) (got trial.Received, err error) {
	buf := make([]byte, largeWrite)
	size := smallWrite
	for time.Now().Before(end) {
		began := time.Now()
		if _, err := str.Write(buf[:size]); err != nil {
			return got, fmt.Errorf("send: %w", err)
		}
		switch took := time.Since(began); {
		case took > writeTime:
			size = max(size/2, smallWrite)
		case took < writeTime/4:
			size = min(size*2, largeWrite)
		}
	}
	if err := errors.Join(str.CloseWrite(), str.SetReadDeadline(time.Now().Add(drainTimeout))); err != nil {
		return got, fmt.Errorf("send: %w", err)
	}
	if err := trial.NewLines(str, io.Discard).Read(&got); err != nil {
		return got, fmt.Errorf("the gateway does not say what has arrived: %w", err)
	}
	return got, nil
}

// receive reads until the flow's deadline, which is set later, counts what comes once counting is closed, and resets the flow.
func (b *benchRun) receive(str *tunnel.Stream, counting <-chan struct{}) (n uint64, first, last time.Time, err error) {
	defer str.Reset()
	buf := make([]byte, largeWrite)
	counts := false
	for {
		k, err := str.Read(buf)
		if !counts {
			select {
			case <-counting:
				counts = true
			default:
			}
		}
		if k > 0 && counts {
			last = time.Now()
			if first.IsZero() {
				first = last
			}
			n += uint64(k)
			b.down.Add(uint64(k))
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return n, first, last, nil
		case err != nil:
			return n, first, last, fmt.Errorf("receive: %w", err)
		}
	}
}

// judged is what the counters of both ends say of a load between two looks at them.
func (b *benchRun) judged(up bool, before, after benchSample) *BenchLoad {
	took := after.at.Sub(before.at)
	l := &BenchLoad{Client: after.cpu.Since(before.cpu, took), Gateway: after.gateway.CPU.Since(before.gateway.CPU, took)}
	sender := func(s benchSample) trial.Sender {
		if !up {
			return s.gateway.Sender
		}
		q := s.client
		return trial.Sender{Packets: q.PacketsSent, Lost: q.PacketsLost, Bytes: q.BytesSent, Window: q.CongestionWindow, RTT: q.RTT, MinRTT: q.MinRTT}
	}
	from, to := sender(before), sender(after)
	l.Packets = to.Packets - min(from.Packets, to.Packets)
	l.Lost = to.Lost - min(from.Lost, to.Lost)
	if l.Packets > 0 {
		l.LossShare = float64(l.Lost) / float64(l.Packets)
	}
	var windows []uint64
	var rtts []time.Duration
	bytes := func(s benchSample) uint64 {
		if up {
			return s.gateway.Received
		}
		return s.down
	}
	last := before
	for _, s := range b.between(before, after) {
		if s.at.After(before.at) {
			windows, rtts = append(windows, sender(s).Window), append(rtts, sender(s).RTT)
		}
		if d := s.at.Sub(last.at); d >= time.Second {
			l.Intervals = append(l.Intervals, float64(bytes(s)-bytes(last))*8/d.Seconds())
			last = s
		}
	}
	slices.Sort(windows)
	if len(windows) > 0 {
		l.Window = windows[len(windows)/2]
	}
	l.RTT = summarize(rtts).P50
	return l
}

// paced sends datagrams at a steady rate and counts those that come back.
func (b *benchRun) paced(ctx context.Context) (*BenchUDP, error) {
	rate := b.cfg.UDP
	if rate == 0 {
		rate = autoPaced
		for _, l := range []*BenchLoad{b.report.Up, b.report.Down} {
			if l != nil && l.BitsPerSecond > 0 {
				rate = min(rate, l.BitsPerSecond/2)
			}
		}
	}
	took := min(b.cfg.Time, pacedTime)
	n := max(int(rate*took.Seconds()/8/pacedSize), 1)
	interval := took / time.Duration(n)
	b.step(fmt.Sprintf("datagrams at %s for %v", bitRate(rate), took))
	dctx, cancel := context.WithTimeout(ctx, DialTimeout)
	conn, err := b.session.DialUDP(dctx, trial.Host, trial.PortEcho)
	cancel()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	before, err := b.sample()
	if err != nil {
		return nil, err
	}
	began := time.Now()
	sent := make([]atomic.Int64, n) // when, since began
	rtts := make([]time.Duration, 0, n)
	var back atomic.Int64
	var reading sync.WaitGroup
	reading.Go(func() {
		buf := make([]byte, pacedSize)
		seen := make([]bool, n)
		for {
			k, err := conn.ReadPacket(buf)
			if err != nil {
				return // closed below, or the session is over, which the sender finds out, too
			}
			if k != pacedSize {
				continue
			}
			i := binary.BigEndian.Uint64(buf)
			if i >= uint64(n) || seen[i] {
				continue
			}
			seen[i] = true
			rtts = append(rtts, time.Since(began)-time.Duration(sent[i].Load()))
			back.Add(1)
		}
	})
	err = b.sendPaced(ctx, conn, sent, began, interval)
	spent := time.Since(began)
	if err == nil {
		err = waitBack(ctx, &back, int64(n))
	}
	conn.Close()
	reading.Wait()
	if err != nil {
		return nil, err
	}
	after, err := b.sample()
	if err != nil {
		return nil, err
	}
	u := &BenchUDP{
		Asked: rate, BitsPerSecond: float64(n) * pacedSize * 8 / spent.Seconds(), Size: pacedSize, Sent: uint64(n),
		AtGateway: after.gateway.Datagrams - before.gateway.Datagrams, Returned: uint64(len(rtts)), Jitter: jitter(rtts), Latency: summarize(rtts),
	}
	u.LossUp = 1 - float64(min(u.AtGateway, u.Sent))/float64(u.Sent)
	if u.AtGateway > 0 {
		u.LossDown = 1 - float64(min(u.Returned, u.AtGateway))/float64(u.AtGateway)
	}
	return u, nil
}

// sendPaced sends a datagram for each place of sent, evenly apart.
func (b *benchRun) sendPaced(ctx context.Context, conn *tunnel.UDPConn, sent []atomic.Int64, began time.Time, interval time.Duration) error {
	buf := make([]byte, pacedSize)
	pause := time.NewTimer(0)
	defer pause.Stop()
	for i := range sent {
		if wait := time.Until(began.Add(time.Duration(i) * interval)); wait > 0 {
			pause.Reset(wait)
			select {
			case <-pause.C:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		binary.BigEndian.PutUint64(buf, uint64(i))
		sent[i].Store(int64(time.Since(began)))
		if err := conn.WritePacket(buf); err != nil {
			return fmt.Errorf("send datagrams: %w", err)
		}
	}
	return nil
}

// waitBack waits until everything is back, or nothing more comes.
func waitBack(ctx context.Context, back *atomic.Int64, all int64) error {
	t := time.NewTicker(pacedWait / 10)
	defer t.Stop()
	have, since := back.Load(), time.Now()
	for have < all && time.Since(since) < pacedWait {
		select {
		case <-t.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if now := back.Load(); now != have {
			have, since = now, time.Now()
		}
	}
	return nil
}
