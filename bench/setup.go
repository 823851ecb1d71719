package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"sallyway/internal/lab"
)

// Setup is what it takes to get connections, in milliseconds.
type Setup struct {
	Way      string    `json:"way"`
	Warm50   float64   `json:"warm_flow_p50_ms"` // connect and first byte while the session stands
	Cold     []float64 `json:"cold_ms,omitempty"`
	Many     int       `json:"many"`       // connections at once
	ManyTook float64   `json:"many_ms"`    // until each had its first byte
	ManyLost int       `json:"many_lost"`  // that got none
	Why      string    `json:"why_failed"` // one of them
}

// Bounds of the measurements of many connections.
const (
	manyAtOnce = 64 // dials in progress
	manyWait   = 60 * time.Second
	coldWait   = 30 * time.Second
	coldPace   = 20 * time.Millisecond // of the attempts
)

// setup measures cold sessions, where they are ours, and many connections at once.
func (r *runner) setup(ctx context.Context, _ *lab.Lab) error {
	err := r.each(ctx, func(w way) error {
		fmt.Fprintf(r.out, "%d connections at once: %s\n", r.cfg.Many, w.name)
		s := Setup{Way: w.name, Many: r.cfg.Many}
		for _, l := range r.o.Latency {
			if l.Way == w.name {
				s.Warm50 = l.Connect50
			}
		}
		r.many(ctx, w, &s)
		if w.name == Sallyway {
			for range r.cfg.Cold {
				d, err := r.cold(ctx, w)
				if err != nil {
					return fmt.Errorf("cold session: %w", err)
				}
				s.Cold = append(s.Cold, ms(d))
			}
		}
		r.o.Setup = append(r.o.Setup, s)
		return nil
	})
	return errors.Join(err, ctx.Err())
}

// many opens connections, each of which has to bring a byte and stays open until all have.
func (r *runner) many(ctx context.Context, w way, s *Setup) {
	ctx, cancel := context.WithTimeout(ctx, manyWait)
	defer cancel()
	var mu sync.Mutex
	var open []net.Conn // guarded by mu
	var lost error      // guarded by mu
	turns := make(chan struct{}, manyAtOnce)
	start := time.Now()
	var wg sync.WaitGroup
	for range s.Many {
		turns <- struct{}{}
		wg.Go(func() {
			defer func() { <-turns }()
			c, err := r.exchange(ctx, w)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				s.ManyLost++
				lost = err
				return
			}
			open = append(open, c)
		})
	}
	wg.Wait()
	s.ManyTook = ms(time.Since(start))
	if lost != nil {
		s.Why = lost.Error()
	}
	for _, c := range open {
		c.Close()
	}
}

// exchange opens a connection that has answered one byte.
func (r *runner) exchange(ctx context.Context, w way) (net.Conn, error) {
	c, err := r.site.Client.Dial(ctx, "tcp", netip.AddrPortFrom(w.addr, w.echo).String())
	if err != nil {
		return nil, err
	}
	b := []byte{1}
	deadline, _ := ctx.Deadline()
	err = c.SetDeadline(deadline)
	if err == nil {
		_, err = c.Write(b)
	}
	if err == nil {
		_, err = io.ReadFull(c, b)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// cold starts the client's daemon anew and measures from its start to the first byte: process, control connection, relay,
// session and flow.
func (r *runner) cold(ctx context.Context, w way) (time.Duration, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, coldWait, errors.New("no session"))
	defer cancel()
	if err := r.site.Laptop.Stop(); err != nil {
		return 0, err
	}
	short, end := context.WithTimeout(ctx, coldPace)
	c, err := r.exchange(short, w)
	end()
	if err == nil {
		c.Close()
		return 0, errors.New("the private host is reached while the client's daemon is stopped")
	}
	start := time.Now()
	if err := r.site.Laptop.Start(); err != nil {
		return 0, err
	}
	// A dial that came too early would wait for TCP's own repeat, so that a new one is made at a fixed pace.
	done := make(chan time.Duration)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	t := time.NewTicker(coldPace)
	defer t.Stop()
	for {
		wg.Go(func() {
			c, err := r.exchange(ctx, w)
			if err != nil {
				return
			}
			c.Close()
			select {
			case done <- time.Since(start):
			case <-ctx.Done():
			}
		})
		select {
		case d := <-done:
			return d, nil
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		case <-t.C:
		}
	}
}
