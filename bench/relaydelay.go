package bench

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sallyway/internal/lab"
	"sallyway/relay/udpio"
)

// Delay is the round-trip time of a small datagram from one client through a server to another and back, in microseconds:
// medians of the runs' percentiles.
type Delay struct {
	Server  string  `json:"server"`
	Link    string  `json:"link"`
	Load    float64 `json:"relay_load_bits_per_second"` // which the relay carries meanwhile; 0 is idle
	Runs    int     `json:"runs"`
	P50     float64 `json:"p50_us"`
	P99     float64 `json:"p99_us"`
	Added50 float64 `json:"added_p50_us"` // to the forwarder's, beside the same load
	Added99 float64 `json:"added_p99_us"`
	Lost    int     `json:"lost"` // of all runs
}

// Forwarder is what a relay's latency is compared with: a Go program that reads a datagram, looks its other end up, and writes
// it.
const Forwarder = "plain UDP forwarder"

const (
	pingPayload = 64              // bytes
	pingWait    = time.Second     // after that a datagram is lost
	pingLoad    = 13              // segments of the load's runs
	pingShare   = 0.5             // of what the relay carried alone
	forwardWait = 2 * time.Second // for the forwarder's answer
)

// delays measures the relay and the forwarder in turn, idle and while the relay carries half of what it can. What the
// forwarder adds beside a loaded relay is the machine's: the load shares its cores.
func (r *relayRun) delays(ctx context.Context, bed *relayBed) error {
	key := newRelayKey()
	srv, err := bed.start(ctx, OwnRelay, key, "")
	if err != nil {
		return err
	}
	defer srv.stop()
	var pairs [2]*relayPair // of the load, of the pings
	for i := range pairs {
		if pairs[i], err = newRelayPair(srv.addr, i, false, bed.dial(i), bed.dial(i), credentialsOf(OwnRelay, key)); err != nil {
			return err
		}
		defer pairs[i].close()
	}
	plain, err := r.plainPair(ctx, bed)
	if err != nil {
		return fmt.Errorf("%s: %w", Forwarder, err)
	}
	defer plain.close()
	var full []float64
	for range 3 {
		f, err := r.best(ctx, &loaded{srv, pairs[:1]}, pingLoad)
		if err != nil {
			return err
		}
		full = append(full, f.BitsPerSecond)
	}
	for _, load := range []float64{0, pingShare * median(full)} {
		own, base, err := r.delay(ctx, bed, load, pairs, plain)
		if err != nil {
			return err
		}
		own.Added50, own.Added99 = own.P50-base.P50, own.P99-base.P99
		r.res.RelayDelay = append(r.res.RelayDelay, own, base)
		fmt.Fprintf(r.out, "latency over %s beside %.1f Gbit/s: p50 %.0f, p99 %.0f µs; forwarder %.0f, %.0f\n", bed.link, own.Load/1e9, own.P50, own.P99, base.P50, base.P99)
	}
	return nil
}

// delay measures beside one load.
func (r *relayRun) delay(ctx context.Context, bed *relayBed, load float64, pairs [2]*relayPair, plain *relayPair) (own, base Delay, err error) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	var carried atomic.Int64 // bytes of the load
	start := time.Now()
	pressed := make(chan error, 1)
	if load > 0 {
		if err := pairs[0].b.udp.SetReadDeadline(time.Time{}); err != nil {
			cancel()
			return own, base, err
		}
		wg.Go(func() { pairs[0].b.receive(&carried, nil) })
		wg.Go(func() { pressed <- pairs[0].press(ctx, pingLoad, load) })
	} else {
		pressed <- nil
	}
	defer func() {
		cancel()
		err = errors.Join(err, <-pressed, pairs[0].b.udp.SetReadDeadline(time.Now()))
		wg.Wait()
	}()
	own, base = Delay{Server: OwnRelay, Link: bed.link}, Delay{Server: Forwarder, Link: bed.link}
	var p50, p99 [2][]float64
	for range r.cfg.Runs {
		for i, way := range []struct {
			pair *relayPair
			d    *Delay
		}{{pairs[1], &own}, {plain, &base}} {
			times, lost, err := way.pair.ping(ctx, r.cfg.Pings)
			if err != nil {
				return own, base, fmt.Errorf("%s: %w", way.d.Server, err)
			}
			way.d.Lost += lost
			way.d.Runs++
			p50[i] = append(p50[i], micro(times[len(times)/2]))
			p99[i] = append(p99[i], micro(times[len(times)*99/100]))
		}
	}
	own.Load = float64(carried.Load()) * 8 / time.Since(start).Seconds()
	base.Load = own.Load
	own.P50, own.P99 = median(p50[0]), median(p99[0])
	base.P50, base.P99 = median(p50[1]), median(p99[1])
	return own, base, nil
}

func micro(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }

// ping sends a datagram from a to b and back, one after the other, for a while. It returns the round-trip times, sorted.
func (p *relayPair) ping(ctx context.Context, length time.Duration) (times []time.Duration, lost int, err error) {
	if err := p.b.udp.SetReadDeadline(time.Time{}); err != nil {
		return nil, 0, err
	}
	echoed := make(chan error, 1)
	go func() { echoed <- p.b.echo() }()
	defer func() { err = errors.Join(err, p.b.udp.SetReadDeadline(time.Now()), <-echoed) }()
	message := binary.BigEndian.AppendUint16(nil, relayChannel)
	message = binary.BigEndian.AppendUint16(message, pingPayload)
	message = append(message, make([]byte, pingPayload)...)
	number, buf := message[4:12], make([]byte, udpio.MaxRead)
	for start, i := time.Now(), uint64(1); time.Since(start) < length && ctx.Err() == nil; i++ {
		binary.BigEndian.PutUint64(number, i)
		sent := time.Now()
		if err := p.a.sock.Write(message, 0, 0, udpio.Peer{}); err != nil {
			return nil, 0, err
		}
		if err := p.a.udp.SetReadDeadline(sent.Add(pingWait)); err != nil {
			return nil, 0, err
		}
		for {
			m, err := p.a.sock.Read(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				lost++
				break
			}
			if err != nil {
				return nil, 0, err
			}
			if m.N == len(message) && binary.BigEndian.Uint64(buf[4:]) == i {
				times = append(times, time.Since(sent))
				break
			}
		}
	}
	if len(times) == 0 {
		return nil, lost, errors.Join(errors.New("nothing came back"), ctx.Err())
	}
	slices.Sort(times)
	return times, lost, nil
}

// echo sends back what arrives, until the socket's deadline.
func (c *relayClient) echo() error {
	buf := make([]byte, udpio.MaxRead)
	for {
		m, err := c.sock.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := c.sock.Write(buf[:m.N], m.Segment, 0, udpio.Peer{}); err != nil {
			return err
		}
	}
}

// forwardEnd says where a forwarder listens.
type forwardEnd struct {
	Listen netip.AddrPort
}

// forwardPart is the plain forwarder: what comes from one of the first two senders goes to the other, one datagram a read. The
// first datagram of each is answered with itself. It runs until ctx ends.
func forwardPart(ctx context.Context, config []byte) error {
	var cfg forwardEnd
	if err := json.Unmarshal(config, &cfg); err != nil {
		return err
	}
	c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(cfg.Listen))
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = c.Close() })() // ends the read
	fmt.Println("ready", c.LocalAddr())
	other := make(map[netip.AddrPort]netip.AddrPort)
	var first netip.AddrPort
	buf := make([]byte, udpio.MaxRead)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			return ignoreEnd(ctx, err)
		}
		to, known := other[from]
		switch {
		case known:
		case !first.IsValid(), first == from:
			first, to = from, from
		default:
			other[first], other[from], to = from, first, from
		}
		if _, err := c.WriteToUDPAddrPort(buf[:n], to); err != nil {
			return err
		}
	}
}

// plainPair is a pair that a forwarder joins.
func (r *relayRun) plainPair(ctx context.Context, bed *relayBed) (*relayPair, error) {
	proc, err := startPart(ctx, bed.serve, "forward", forwardEnd{netip.AddrPortFrom(bed.server, 0)}, "")
	if err != nil {
		return nil, err
	}
	addr, err := readyAddr(ctx, proc)
	if err != nil {
		return nil, err
	}
	p := new(relayPair)
	for _, c := range []**relayClient{&p.a, &p.b} {
		udp, err := bed.dial(0)(addr)
		if err != nil {
			p.close()
			return nil, err
		}
		sock, _, err := udpio.New(udp, udpio.Config{})
		if err != nil {
			p.close()
			return nil, err
		}
		*c = &relayClient{udp: udp, sock: sock}
		buf := make([]byte, udpio.MaxRead)
		_, err = udp.Write([]byte("hello"))
		if err == nil {
			err = udp.SetReadDeadline(time.Now().Add(forwardWait))
		}
		if err == nil {
			_, err = udp.Read(buf)
		}
		if err != nil {
			p.close()
			return nil, err
		}
	}
	return p, nil
}

// readyAddr is the address that a process said it is ready at.
func readyAddr(ctx context.Context, p *lab.Proc) (netip.AddrPort, error) {
	ctx, cancel := context.WithTimeout(ctx, relayStart)
	defer cancel()
	line, err := p.Log.Wait(ctx, 0, "^ready ")
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%w\n%s", err, p.Log.Tail(5))
	}
	return netip.ParseAddrPort(line.Text[len("ready "):])
}
