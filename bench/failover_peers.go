package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"sallyway/internal/lab"
)

// guard starts a peer's processes again when they end, as a service manager does, and its hub's when a run wants it.
type guard struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
	mu     sync.Mutex // held while a process is started, since Start is not called concurrently
}

// restartAfter is how long a process that has ended stays away.
const restartAfter = time.Second

// watch keeps processes running until end.
func watch(procs []*lab.Proc) *guard {
	ctx, cancel := context.WithCancel(context.Background())
	g := &guard{cancel: cancel}
	for _, p := range procs {
		g.wg.Go(func() {
			for {
				select {
				case <-p.Done():
				case <-ctx.Done():
					return
				}
				wait(ctx, restartAfter)
				if ctx.Err() != nil {
					return
				}
				g.mu.Lock()
				err := p.Start()
				g.mu.Unlock()
				if err != nil {
					return // the lab ends
				}
			}
		})
	}
	return g
}

// end stops the watching.
func (g *guard) end() {
	g.cancel()
	g.wg.Wait()
}

// preparePeer starts a peer on the bed.
func (b *failoverBed) preparePeer(ctx context.Context, name string) error {
	all := peers()
	i := slices.IndexFunc(all, func(p peer) bool { return p.name == name })
	if i < 0 {
		return fmt.Errorf("no peer %q; there are %q", name, Peers())
	}
	r := &runner{out: io.Discard, site: b.site, o: &Outcome{}}
	w, err := r.startPeer(ctx, b.l, all[i])
	if err != nil {
		return err
	}
	b.way = w
	ends := slices.DeleteFunc(slices.Clone(w.procs), func(p *lab.Proc) bool { return b.hubs()[p.Host] == p })
	b.guard = watch(ends)
	return b.reached(ctx)
}

// hubs are the hosts and processes of the peer that are in the place of relays.
func (b *failoverBed) hubs() map[*lab.Host]*lab.Proc {
	all := make(map[*lab.Host]*lab.Proc)
	for _, p := range b.way.procs {
		if p.Host == b.l.Relay1 || p.Host == b.l.Relay2 {
			all[p.Host] = p
		}
	}
	return all
}

// meter notes what the hubs have carried so far.
func (b *failoverBed) meter() error {
	b.carried = make(map[*lab.Host]uint64)
	for h := range b.hubs() {
		n, err := h.Traffic()
		if err != nil {
			return err
		}
		b.carried[h] = n
	}
	return nil
}

// hub is the one that has carried most since meter.
func (b *failoverBed) hub() (used *lab.Proc, err error) {
	var most uint64
	for h, p := range b.hubs() {
		n, err := h.Traffic()
		if err != nil {
			return nil, err
		}
		if n -= b.carried[h]; used == nil || n > most {
			used, most = p, n
		}
	}
	if used == nil {
		return nil, errors.New("the peer has no hub")
	}
	return used, nil
}

// unplugHub draws the cable of the hub in use.
func unplugHub(_ context.Context, b *failoverBed, _ string) (*disturbance, error) {
	hub, err := b.hub()
	if err != nil {
		return nil, err
	}
	return unplug(hub.Host)
}

// killHub kills a peer's hub; over starts it again.
func killHub(_ context.Context, b *failoverBed, _ string) (*disturbance, error) {
	hub, err := b.hub()
	if err != nil {
		return nil, err
	}
	d := &disturbance{at: time.Now()}
	hub.KillAll()
	d.over = func(ctx context.Context) (time.Time, error) {
		err := hub.Start()
		if err == nil && b.way.again != nil {
			err = b.way.again(ctx)
		}
		return time.Now(), err
	}
	return d, nil
}
