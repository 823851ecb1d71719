package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyway/client"
	"sallyway/gateway"
	"sallyway/internal/lab"
	"sallyway/relay/leg"
	"sallyway/tunnel"
)

// failoverBed is a lab with one way through it, ours or a peer's, on which runs are made one after the other.
type failoverBed struct {
	l       *lab.Lab
	site    *lab.Site // with our programs; of a peer's bed only Lab is set
	way     way
	streams *streams
	guard   *guard               // of a peer's processes
	carried map[*lab.Host]uint64 // by a peer's hubs; see meter
	held    []net.Conn
	said    uint64 // number that was said last on the held connections
}

const (
	// heldConns are open on a bed over all of its runs, with an exchange on each after every run.
	heldConns = 4
	// wholeWait bounds how long everything may take to be whole again: longer than it takes to go back to UDP.
	wholeWait = 150 * time.Second
	// stillFor is how long the session's paths must have been what they are.
	stillFor = 500 * time.Millisecond
	// beforehand is for a stream to come up to speed.
	beforehand = 300 * time.Millisecond
	// ownWait and peerWaits bound how long something may be silent.
	ownWait   = 45 * time.Second
	peerWaits = 90 * time.Second
	// recently is how new the last answer is on a connection that works.
	recently = 250 * time.Millisecond
	// quietFor is how long nothing is said on a connection of LoadQuiet before: longer than paths are watched closely after the last packet.
	quietFor = 3 * time.Second
	// quietAfter is how long after the disturbance its next byte is sent.
	quietAfter = time.Second
)

// newFailoverBed lays out a lab and starts what it is for.
func newFailoverBed(ctx context.Context, cfg Failover, name string) (*failoverBed, error) {
	l, err := lab.New(lab.Config{Bin: cfg.Bin, Raw: name != Sallyway})
	if err != nil {
		return nil, err
	}
	b := &failoverBed{l: l, site: &lab.Site{Lab: l}}
	if err := b.prepare(ctx, name); err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

func (b *failoverBed) prepare(ctx context.Context, name string) (err error) {
	if _, err := b.l.Private.Echo(fmt.Sprintf(":%d", echoPort)); err != nil {
		return err
	}
	if b.streams, err = serveStreamsOn(b.l.Private, fmt.Sprintf(":%d", iperfPort)); err != nil {
		return err
	}
	if name != Sallyway {
		return b.preparePeer(ctx, name)
	}
	if b.site, err = b.l.Build(ctx, lab.SiteConfig{NoBranch: true, RelayArgs: []string{"--drain-timeout", relayDrain}}, nil); err != nil {
		return err
	}
	web := lab.Resource{Name: "web", Gateway: lab.Office, Address: lab.WebAddr.String(), TCP: fmt.Sprintf("%d,%d", iperfPort, echoPort)}
	if err := b.l.AddResource(ctx, web, "client:"+lab.Laptop); err != nil {
		return err
	}
	b.way = way{name: Sallyway, addr: lab.WebAddr, iperf: iperfPort, echo: echoPort}
	return b.reached(ctx)
}

// reached waits until the private host is.
func (b *failoverBed) reached(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, wholeWait, errors.New("the private host is not reached"))
	defer cancel()
	return lab.Until(ctx, 100*time.Millisecond, func() error {
		c, err := b.open(ctx)
		if err == nil {
			c.Close()
		}
		return err
	})
}

// close ends the bed. A nil one is none.
func (b *failoverBed) close() {
	if b == nil {
		return
	}
	b.letGo()
	if b.guard != nil {
		b.guard.end()
	}
	b.l.Close()
}

// letGo closes the held connections.
func (b *failoverBed) letGo() {
	for _, c := range b.held {
		c.Close()
	}
	b.held = nil
}

// openWait bounds one attempt at a new connection.
const openWait = 5 * time.Second

// open opens a connection to the echo server that has answered a number.
func (b *failoverBed) open(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, openWait)
	defer cancel()
	c, err := b.l.Client.Dial(ctx, "tcp", netip.AddrPortFrom(b.way.addr, b.way.echo).String())
	if err != nil {
		return nil, err
	}
	ended := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Now()) }) // it may be closed
	err = exchangeNumber(c, 0)
	if !ended() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// hold opens the held connections that are missing.
func (b *failoverBed) hold(ctx context.Context) error {
	for len(b.held) < heldConns {
		c, err := b.open(ctx)
		if err != nil {
			return fmt.Errorf("open a connection: %w", err)
		}
		b.held = append(b.held, c)
	}
	return nil
}

// heldLost says a number on every held connection and returns how many do not answer, and the error of one of them. These are closed.
func (b *failoverBed) heldLost(wait time.Duration) (lost int, why error) {
	b.said++
	type answer struct {
		c   net.Conn
		err error
	}
	answers := make(chan answer, len(b.held))
	for _, c := range b.held {
		go func() {
			err := c.SetDeadline(time.Now().Add(wait))
			if err == nil {
				err = exchangeNumber(c, b.said)
			}
			answers <- answer{c, err}
		}()
	}
	for range len(b.held) {
		if a := <-answers; a.err != nil {
			lost, why = lost+1, fmt.Errorf("a connection that was open before: %w", a.err)
			a.c.Close()
			b.held = slices.DeleteFunc(b.held, func(c net.Conn) bool { return c == a.c })
		}
	}
	return lost, why
}

// clientSession is the client's session with the gateway, as its daemon tells.
func (b *failoverBed) clientSession(ctx context.Context) (s client.GatewayStatus, st client.Status, err error) {
	if err := b.site.Laptop.Status(ctx, &st); err != nil {
		return s, st, err
	}
	for _, g := range st.Gateways {
		if g.Name == lab.Office {
			return g, st, nil
		}
	}
	return s, st, fmt.Errorf("the client has no gateway %s", lab.Office)
}

// relayOf is the relay and its host that a path goes through.
func (b *failoverBed) relayOf(path string) (*lab.Node, *lab.Host, error) {
	name, _, _ := strings.Cut(path, " ")
	for _, n := range []*lab.Node{b.site.RelayA, b.site.RelayB} {
		if n.Record.Name == name {
			return n, n.Host, nil
		}
	}
	return nil, nil, fmt.Errorf("path %q is through no relay of the lab", path)
}

// onUDP reports whether a path is through a relay over UDP.
func onUDP(path string) bool { return strings.HasSuffix(path, " "+string(leg.UDP)) }

// whole waits until everything is as in the beginning: all daemons ready, the legs of both ends on UDP, a standby path, and nothing that moves.
func (b *failoverBed) whole(ctx context.Context) error {
	if b.site.Laptop == nil {
		return b.reached(ctx)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, wholeWait, errors.New("not whole again"))
	defer cancel()
	for _, n := range []*lab.Node{b.site.RelayA, b.site.RelayB, b.site.GatewayA, b.site.Laptop} {
		if err := n.WaitReady(ctx); err != nil {
			return err
		}
	}
	var last string
	var since time.Time
	return lab.Until(ctx, 100*time.Millisecond, func() error {
		now, err := b.standing(ctx)
		if err != nil {
			since = time.Time{}
			return err
		}
		if now != last || since.IsZero() {
			last, since = now, time.Now()
		}
		if still := time.Since(since); still < stillFor {
			return fmt.Errorf("%s only since %v", now, still)
		}
		return nil
	})
}

// standing says over which paths the client's session stands, and fails where anything is not as it should be.
func (b *failoverBed) standing(ctx context.Context) (string, error) {
	s, st, err := b.clientSession(ctx)
	if err != nil {
		return "", err
	}
	if !onUDP(s.Path) || !onUDP(s.Standby) || s.State != tunnel.Alive {
		return "", fmt.Errorf("the client's session is over %q (%v), with %q as standby", s.Path, s.State, s.Standby)
	}
	var gw gateway.Status
	if err := b.site.GatewayA.Status(ctx, &gw); err != nil {
		return "", err
	}
	for who, all := range map[string]int{"client": len(st.Relays), "gateway": len(gw.Relays)} {
		if all < 2 {
			return "", fmt.Errorf("the %s has %d legs", who, all)
		}
	}
	for _, r := range append(st.Relays, gw.Relays...) {
		if !r.Up || r.Transport != leg.UDP {
			return "", fmt.Errorf("the leg on %s is %v over %q", r.Name, r.Up, r.Transport)
		}
	}
	return fmt.Sprintf("%s, %s, %d moves", s.Path, s.Standby, s.Moves), nil
}

// dials makes attempts at a new connection until one has brought an answer.
type dials struct {
	done chan time.Duration // 1 place: since the beginning
	wg   sync.WaitGroup
	stop context.CancelFunc
}

// The pace of attempts: close at first, then wider.
const (
	dialPace  = 20 * time.Millisecond
	dialSlow  = 250 * time.Millisecond
	dialClose = time.Second
)

// dial begins at once.
func (b *failoverBed) dial(ctx context.Context) *dials {
	ctx, cancel := context.WithCancel(ctx)
	d := &dials{done: make(chan time.Duration, 1), stop: cancel}
	start := time.Now()
	d.wg.Go(func() {
		for ctx.Err() == nil {
			d.wg.Go(func() {
				c, err := b.open(ctx)
				if err != nil {
					return
				}
				c.Close()
				select {
				case d.done <- time.Since(start):
					cancel()
				default:
				}
			})
			pace := dialPace
			if time.Since(start) > dialClose {
				pace = dialSlow
			}
			wait(ctx, pace)
		}
	})
	return d
}

// end stops the attempts.
func (d *dials) end() {
	d.stop()
	d.wg.Wait()
}

// wait waits for a time or for the end of ctx. The time is that of a measurement, or of an outage.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// ask sends a number on an idle connection and returns how long the answer took.
func ask(c net.Conn, n uint64, most time.Duration) (time.Duration, error) {
	start := time.Now()
	if err := c.SetDeadline(start.Add(most)); err != nil {
		return 0, err
	}
	err := exchangeNumber(c, n)
	if errors.Is(err, io.EOF) {
		err = errors.New("the connection was closed")
	}
	return time.Since(start), err
}
