package bench

import (
	"context"
	"errors"
	"time"

	"sallyway/internal/lab"
	"sallyway/relay/wire"
)

// Names of the causes.
const (
	CauseKill     = "relay-killed"
	CauseGone     = "host-gone"
	CauseToRelay  = "cut-to-relay"
	CauseToNodes  = "cut-from-relay"
	CauseLoss     = "loss-30"
	CauseDrain    = "relay-drained"
	CauseUDP      = "udp-blocked"
	CausePort     = "5349-blocked"
	CauseAddress  = "address-changed"
	CauseGateway  = "gateway-restarted"
	CausePlatform = "platform-killed"
	CauseBothGone = "both-relays-gone"
	CauseBothKill = "both-relays-killed"
	// Of peers: what they have in the place of a relay is away for a while.
	causeHubAway = 10 * time.Second
)

// cause is something that happens to what is between the ends of open connections.
type cause struct {
	name, about string
	takes       time.Duration // of a run, about; the longest jobs come first
	window      time.Duration // of watching, where it must be longer than usual
	dark        time.Duration // everything is away so long, and then comes back while the connections are watched
	quiet       bool          // is also measured with LoadQuiet
	ends        bool          // open connections end, by its nature
	climbs      bool          // the session leaves UDP and comes back
	counts      bool          // dropped datagrams count
	hit         func(ctx context.Context, b *failoverBed, path string) (*disturbance, error)
	// hub is the same for a peer's hub; nil is a cause that peers are not measured with.
	hub func(ctx context.Context, b *failoverBed, path string) (*disturbance, error)
}

// Causes are the names of all causes.
func Causes() []string {
	var names []string
	for _, c := range causes() {
		names = append(names, c.name)
	}
	return names
}

// AboutCauses are the causes, a sentence each.
func AboutCauses() [][2]string {
	var out [][2]string
	for _, c := range causes() {
		out = append(out, [2]string{c.name, c.about})
	}
	return out
}

func causes() []cause {
	return []cause{
		{
			name: CauseKill, about: "The relay in use is killed (SIGKILL): its host refuses what still comes.", takes: 8 * time.Second, quiet: true,
			hit: killRelay, hub: killHub,
		},
		{
			name: CauseGone, about: "The host of the relay in use loses its link: nobody is told anything until routers give up on finding it.", takes: 25 * time.Second, quiet: true,
			hit: func(_ context.Context, b *failoverBed, path string) (*disturbance, error) {
				_, h, err := b.relayOf(path)
				if err != nil {
					return nil, err
				}
				return unplug(h)
			},
			hub: unplugHub,
		},
		{
			name: CauseToRelay, about: "All packets to the relay in use are dropped in silence; those from it pass.", takes: 25 * time.Second,
			hit: impair(100, 0),
		},
		{
			name: CauseToNodes, about: "All packets from the relay in use are dropped in silence; those to it pass.", takes: 25 * time.Second,
			hit: impair(0, 100),
		},
		{
			name: CauseLoss, about: "30 % of the packets to and from the relay in use are lost; a super-packet counts as one.", takes: 25 * time.Second, window: 2 * time.Second,
			hit: impair(30, 30),
		},
		{
			name: CauseDrain, about: "The relay in use is asked to end (SIGTERM): it drains.", takes: 25 * time.Second, counts: true,
			hit: drainRelay,
		},
		{
			name: CauseUDP, about: "The network between all sites drops UDP from now on; then it passes again.", takes: 40 * time.Second, climbs: true,
			hit: func(_ context.Context, b *failoverBed, _ string) (*disturbance, error) {
				return undone(b.l.BlockUDP(true), func() error { return b.l.BlockUDP(false) })
			},
		},
		{
			name: CausePort, about: "The networks of client and gateway drop everything to port 5349 from now on, UDP and TCP; then it passes again.", takes: 40 * time.Second, climbs: true,
			hit: func(_ context.Context, b *failoverBed, _ string) (*disturbance, error) {
				return undone(b.l.BlockPort(wire.Port, b.l.Client, b.l.Gateway), func() error { return b.l.BlockPort(0) })
			},
		},
		{
			name: CauseAddress, about: "The client's address changes.", takes: 40 * time.Second,
			hit: moveClient, hub: moveClient,
		},
		{
			name: CauseGateway, about: "The gateway is killed and started again: connections through it end, and what counts is when new ones work.", takes: 8 * time.Second, ends: true,
			hit: restartGateway,
		},
		{
			name: CausePlatform, about: "The platform is killed.", takes: 6 * time.Second,
			hit: func(_ context.Context, b *failoverBed, _ string) (*disturbance, error) {
				d := &disturbance{at: time.Now()}
				b.site.PlatformD.Kill()
				d.over = func(ctx context.Context) (time.Time, error) {
					err := b.site.PlatformD.Start()
					if err == nil {
						err = b.l.WaitPlatform(ctx, b.site.PlatformD)
					}
					return time.Now(), err
				}
				return d, nil
			},
		},
		{
			name: CauseBothGone, about: "The hosts of both relays lose their links for 10 s, then one of them has it again.", takes: 20 * time.Second, dark: causeHubAway,
			hit: bothGone,
		},
		{
			name: CauseBothKill, about: "Both relays are killed, and after 10 s one of them is started again, without its allocations.", takes: 20 * time.Second, dark: causeHubAway,
			hit: bothKilled,
		},
	}
}

// undone is a disturbance that has been done, and its end.
func undone(err error, over func() error) (*disturbance, error) {
	return &disturbance{at: time.Now(), over: func(context.Context) (time.Time, error) {
		err := over()
		return time.Now(), err
	}}, err
}

func killRelay(_ context.Context, b *failoverBed, path string) (*disturbance, error) {
	n, _, err := b.relayOf(path)
	if err != nil {
		return nil, err
	}
	d := &disturbance{at: time.Now(), over: func(context.Context) (time.Time, error) { return time.Now(), n.Proc.Start() }}
	n.Kill()
	return d, nil
}

// unplug draws a host's cable.
func unplug(hosts ...*lab.Host) (*disturbance, error) {
	d := &disturbance{at: time.Now()}
	var plugs []func() error
	for _, h := range hosts {
		plug, err := h.Unplug()
		if err != nil {
			return nil, err
		}
		plugs = append(plugs, plug)
	}
	d.over = func(context.Context) (time.Time, error) {
		var errs error
		for _, plug := range plugs {
			errs = errors.Join(errs, plug())
		}
		return time.Now(), errs
	}
	return d, nil
}

// impair drops some of the packets to and from the relay in use.
func impair(to, from int) func(context.Context, *failoverBed, string) (*disturbance, error) {
	return func(_ context.Context, b *failoverBed, path string) (*disturbance, error) {
		_, h, err := b.relayOf(path)
		if err != nil {
			return nil, err
		}
		return undone(b.l.Impair(h, to, from), func() error { return b.l.Impair(h, 0, 0) })
	}
}

// drainRelay asks the relay in use to end, which it has when the run is over.
func drainRelay(_ context.Context, b *failoverBed, path string) (*disturbance, error) {
	n, _, err := b.relayOf(path)
	if err != nil {
		return nil, err
	}
	d := &disturbance{at: time.Now()}
	stopped := make(chan error, 1)
	go func() { stopped <- n.Stop() }()
	done := n.Done()
	d.idle = func() bool { return closed(done) }
	d.over = func(context.Context) (time.Time, error) {
		if err := <-stopped; err != nil {
			return time.Time{}, err
		}
		return time.Now(), n.Proc.Start()
	}
	return d, nil
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func moveClient(_ context.Context, b *failoverBed, _ string) (*disturbance, error) {
	d := &disturbance{at: time.Now()}
	_, err := b.l.MoveClient()
	return d, err
}

func restartGateway(_ context.Context, b *failoverBed, _ string) (*disturbance, error) {
	d := &disturbance{at: time.Now()}
	b.site.GatewayA.Kill()
	return d, b.site.GatewayA.Proc.Start()
}

// bothGone takes both relays' links, gives back that of the relay that was in use, and the other's when the run is over.
func bothGone(ctx context.Context, b *failoverBed, path string) (*disturbance, error) {
	_, used, err := b.relayOf(path)
	if err != nil {
		return nil, err
	}
	other := b.l.Relay1
	if used == other {
		other = b.l.Relay2
	}
	first, err := unplug(used)
	if err != nil {
		return nil, err
	}
	second, err := unplug(other)
	if err != nil {
		return nil, err
	}
	first.rest = second.over
	return first, nil
}

// bothKilled kills both relays and starts the one that was in use first.
func bothKilled(_ context.Context, b *failoverBed, path string) (*disturbance, error) {
	n, _, err := b.relayOf(path)
	if err != nil {
		return nil, err
	}
	other := b.site.RelayA
	if n == other {
		other = b.site.RelayB
	}
	d := &disturbance{at: time.Now()}
	n.Kill()
	other.Kill()
	d.over = func(ctx context.Context) (time.Time, error) {
		mark := n.Log.Mark()
		if err := n.Proc.Start(); err != nil {
			return time.Time{}, err
		}
		line, err := n.Log.Wait(ctx, mark, "Relay server started successfully")
		return line.At, err
	}
	d.rest = func(context.Context) (time.Time, error) { return time.Now(), other.Proc.Start() }
	return d, nil
}
