package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"sallyway/internal/lab"
)

// Spread is one run with both gateways, which have different relays.
type Spread struct {
	Down     bool       `json:"down"`
	Paths    [2]string  `json:"paths"`                    // of the sessions with the first and the second gateway
	Alone    [2]float64 `json:"alone_bits_per_second"`    // through either, the other idle
	Together [2]float64 `json:"together_bits_per_second"` // through both at once
}

// Move is one time that the relay in use went away.
type Move struct {
	How     string  `json:"how"`
	Load    string  `json:"load"`                 // of one TCP flow: none, up, down
	Silence float64 `json:"longest_silence_ms"`   // on an open connection with an exchange every few milliseconds, from then on
	Before  float64 `json:"longest_before_ms"`    // on the same connection before
	Lived   bool    `json:"connections_lived"`    // the open connection, and the load's
	Why     string  `json:"why_lost,omitempty"`   // of one that did not
	Through string  `json:"path_after,omitempty"` // of the session
}

// noLoad is the Move.Load of an idle lab.
const noLoad = "none"

// The ways in which a relay goes away.
const (
	Drained = "drained" // SIGTERM: the relay asks its nodes to move
	Killed  = "killed"  // SIGKILL: its host refuses what still comes
	CutOff  = "cut off" // its link is dead: nobody is told anything
)

const (
	movePace   = 5 * time.Millisecond
	moveBefore = 2 * time.Second // of the connection before the relay goes
	moveAfter  = 5 * time.Second
	moveWait   = 60 * time.Second // until everything is as it was
	settled    = 2 * time.Second  // without a change of the session's paths
	usedFor    = 300 * time.Millisecond
)

// spread measures both gateways, each alone and both at once.
func (r *runner) spread(ctx context.Context, l *lab.Lab) error {
	server, err := l.Private2.Iperf3Server(ctx, iperfPort)
	if err != nil {
		return err
	}
	if _, err := l.Private2.Echo(fmt.Sprintf(":%d", echoPort)); err != nil {
		return err
	}
	r.servers[lab.Private2Web] = server
	second := lab.Resource{Name: "web2", Gateway: lab.Branch, Address: lab.Private2Web.String(), TCP: fmt.Sprintf("%d,%d", iperfPort, echoPort)}
	if err := l.AddResource(ctx, second, "client:"+lab.Laptop); err != nil {
		return err
	}
	ways := [2]way{{addr: lab.WebAddr, iperf: iperfPort, echo: echoPort}, {addr: lab.Private2Web, iperf: iperfPort, echo: echoPort}}
	soon, cancel := context.WithTimeoutCause(ctx, moveWait, errors.New("the second private host is not reached"))
	defer cancel()
	err = lab.Until(soon, 50*time.Millisecond, func() error {
		_, err := r.firstByte(soon, ways[1])
		return err
	})
	if err != nil {
		return err
	}
	for range r.cfg.Spread {
		for _, down := range []bool{false, true} {
			s := Spread{Down: down}
			for i, w := range ways {
				res, err := r.iperf(ctx, l, w, lab.IperfRun{Down: down})
				if err != nil {
					return err
				}
				s.Alone[i] = res.BitsPerSecond
			}
			var errs [2]error
			var wg sync.WaitGroup
			for i, w := range ways {
				wg.Go(func() {
					var res lab.IperfResult
					res, errs[i] = r.iperf(ctx, l, w, lab.IperfRun{Down: down})
					s.Together[i] = res.BitsPerSecond
				})
			}
			wg.Wait()
			paths, err := r.paths(ctx)
			if err := errors.Join(errs[0], errs[1], err); err != nil {
				return err
			}
			s.Paths = [2]string{paths[lab.Office].Path, paths[lab.Branch].Path}
			fmt.Fprintf(r.out, "both gateways %s: %.0f and %.0f alone, %.0f and %.0f at once, over %s and %s\n",
				direction(down), s.Alone[0]/1e6, s.Alone[1]/1e6, s.Together[0]/1e6, s.Together[1]/1e6, s.Paths[0], s.Paths[1])
			r.o.Spread = append(r.o.Spread, s)
		}
	}
	return nil
}

// session is what the client's daemon tells of a session.
type session struct {
	Name    string `json:"name"`
	Path    string `json:"path"`
	Standby string `json:"standby"`
	Moves   uint64 `json:"moves"`
}

// paths are the client's sessions by the names of their gateways.
func (r *runner) paths(ctx context.Context) (map[string]session, error) {
	var doc struct {
		Gateways []session `json:"gateways"`
	}
	if err := r.site.Laptop.Status(ctx, &doc); err != nil {
		return nil, err
	}
	all := make(map[string]session)
	for _, g := range doc.Gateways {
		all[g.Name] = g
	}
	return all, nil
}

// whole waits until all is as in the beginning: relays, gateway and client ready, a standby path, and nothing that moves.
func (r *runner) whole(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, moveWait, errors.New("not whole again"))
	defer cancel()
	for _, n := range []*lab.Node{r.site.RelayA, r.site.RelayB, r.site.GatewayA, r.site.Laptop} {
		if err := n.WaitReady(ctx); err != nil {
			return err
		}
	}
	var last session
	var since time.Time // of last
	return lab.Until(ctx, 50*time.Millisecond, func() error {
		all, err := r.paths(ctx)
		if err != nil {
			return err
		}
		s := all[lab.Office]
		if s.Path == "" || s.Standby == "" {
			since = time.Time{}
			return fmt.Errorf("session with %s: path %q, standby %q", lab.Office, s.Path, s.Standby)
		}
		if s != last || since.IsZero() {
			last, since = s, time.Now()
		}
		if quiet := time.Since(since); quiet < settled {
			return fmt.Errorf("the paths of the session with %s are as they are only since %v", lab.Office, quiet)
		}
		return nil
	})
}

// moves takes the relay in use away in each way, idle and under load.
func (r *runner) moves(ctx context.Context, l *lab.Lab) error {
	for range r.cfg.Moves {
		for _, how := range []string{Drained, Killed, CutOff} {
			for _, load := range r.cfg.MoveLoads {
				if err := r.whole(ctx); err != nil {
					return err
				}
				m, err := r.move(ctx, l, how, load)
				if err != nil {
					return fmt.Errorf("relay %s, load %s: %w", how, load, err)
				}
				fmt.Fprintf(r.out, "relay %s, load %s: %.0f ms of silence (%.0f before)\n", how, load, m.Silence, m.Before)
				r.o.Moves = append(r.o.Moves, m)
			}
		}
	}
	return nil
}

// move takes the relay in use away once, and brings it back.
func (r *runner) move(ctx context.Context, l *lab.Lab, how, load string) (Move, error) {
	m := Move{How: how, Load: load, Lived: true}
	ctx, cancel := context.WithTimeoutCause(ctx, 2*moveWait, errors.New("took too long"))
	defer cancel()
	office := way{addr: lab.WebAddr, iperf: iperfPort, echo: echoPort}
	pulse, err := l.Client.StartPulse(ctx, netip.AddrPortFrom(office.addr, office.echo), movePace)
	if err != nil {
		return m, err
	}
	defer pulse.Stop()
	ended := make(chan error, 1)
	if load == noLoad {
		ended <- nil
	} else {
		go func() {
			_, err := r.iperf(ctx, l, office, lab.IperfRun{Time: moveBefore + usedFor + moveAfter, Down: load == "down"})
			ended <- err
		}()
	}
	used, err := lab.Busier(usedFor, l.Relay1, l.Relay2)
	if err != nil {
		return m, errors.Join(err, <-ended)
	}
	victim := r.site.RelayA
	if used == l.Relay2 {
		victim = r.site.RelayB
	}
	if err := pulse.WaitBeats(ctx, int(moveBefore/movePace)/2); err != nil {
		return m, errors.Join(err, <-ended)
	}
	before, _ := pulse.LongestGap(time.Time{})
	since := time.Now()
	switch how {
	case Drained:
		err = victim.Stop()
	case Killed:
		victim.Kill()
	case CutOff:
		err = l.Cut(used)
	}
	if err != nil {
		return m, errors.Join(err, <-ended)
	}
	after, cancelAfter := context.WithDeadline(ctx, since.Add(moveAfter))
	defer cancelAfter()
	<-after.Done() // the length of the measurement
	lost := errors.Join(<-ended, pulse.Err())
	if ctx.Err() != nil {
		return m, context.Cause(ctx)
	}
	silence, _ := pulse.LongestGap(since)
	if now := time.Since(since); pulse.Beats() > 0 && silence == 0 {
		silence = now // never again
	}
	m.Before, m.Silence = ms(before), ms(silence)
	if lost != nil {
		m.Lived, m.Why = false, lost.Error()
	}
	if all, err := r.paths(ctx); err == nil {
		m.Through = all[lab.Office].Path
	}
	if how == CutOff {
		return m, l.Cut()
	}
	return m, victim.Proc.Start()
}
