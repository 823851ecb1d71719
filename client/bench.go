package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/internal/trial"
	"sallyway/relay/leg"
	"sallyway/stun"
	"sallyway/tunnel"
)

// Bench measures the way to a gateway by load inside of the session that is there anyway: the services at the other end are the gateway's
// own (package trial).

// Defaults and sizes of a bench.
const (
	// DefaultBenchTime is the load's time in each direction.
	DefaultBenchTime = 5 * time.Second
	// idleTime is how long latency is measured before the load; it goes on up to idleMost while there are fewer than goodSamples.
	idleTime = time.Second
	idleMost = 3 * time.Second
	// goodSamples is how many a p99 needs to say more than the maximum.
	goodSamples = 100
	// echoPause is between round trips of the latency's measurement, echoSize their bytes.
	echoPause = 5 * time.Millisecond
	echoSize  = 64
	// samplePause is between looks at both ends' counters.
	samplePause = 200 * time.Millisecond
	// answerTimeout bounds the gateway's answer on a run: longer than its own for a connect, and than a path that moves.
	answerTimeout = 10 * time.Second
	// bindings and connects are how often a round trip is measured that has no probes of its own.
	bindings = 5
	connects = 3
	// bindingTimeout bounds one Binding request.
	bindingTimeout = time.Second
)

// BenchConfig says what to measure.
type BenchConfig struct {
	// Target is a gateway's name, or what DialContext takes for a host, with or without :port. A name in front of which stands gateway: or
	// resource: is one of these.
	Target string `json:"target"`
	// Time is the load's in each direction; 0 is DefaultBenchTime.
	Time time.Duration `json:"time_ns"`
	// Flows is how many flows carry it; 0 is one.
	Flows int `json:"flows"`
	// Up and Down choose the directions; neither is both.
	Up   bool `json:"up"`
	Down bool `json:"down"`
	// UDP is the rate of the paced datagrams in bits per second; 0 is chosen by what was measured before, negative is none.
	UDP float64 `json:"udp"`
}

func (c *BenchConfig) validate() error {
	if c.Time == 0 {
		c.Time = DefaultBenchTime
	}
	if c.Flows == 0 {
		c.Flows = 1
	}
	if !c.Up && !c.Down {
		c.Up, c.Down = true, true
	}
	switch {
	case c.Target == "":
		return errors.New("no resource or gateway is named")
	case c.Time < time.Second/10 || c.Time > trial.MaxTime:
		return fmt.Errorf("time %v: want 100ms to %v for each direction", c.Time, trial.MaxTime)
	case c.Flows < 1 || c.Flows > trial.MaxFlows:
		return fmt.Errorf("%d flows: want 1 to %d", c.Flows, trial.MaxFlows)
	case c.UDP > maxPaced:
		return fmt.Errorf("datagrams at %s: %s at most", bitRate(c.UDP), bitRate(maxPaced))
	}
	return nil
}

// benchTarget is where a bench goes.
type benchTarget struct {
	gateways []identity.Node
	resource string // name, "" for a gateway alone
	host     string // what the gateway is asked to connect to; "" for nothing
	port     uint16
	note     string // why nothing is connected to
}

// benchTarget finds what is named.
func (s *Sessions) benchTarget(target string) (benchTarget, error) {
	t := s.table.Load()
	kind, name, found := strings.Cut(target, ":")
	if !found || (kind != "gateway" && kind != "resource") {
		kind, name = "", target
	}
	host, port := name, uint16(0)
	if h, p, err := splitHostPort(name); err == nil {
		host, port = h, p
	} else if _, err := netip.ParseAddr(strings.Trim(name, "[]")); err == nil {
		host = strings.Trim(name, "[]")
	} else if strings.Contains(name, ":") {
		return benchTarget{}, fmt.Errorf("%.100q is not a resource, a gateway or host:port", target)
	}
	if kind != "gateway" {
		route, err := t.lookup(host, policy.TCP, port)
		if err == nil && route.Resource != nil {
			return resourceTarget(route, port), nil
		}
		if err == nil && kind == "" {
			return benchTarget{gateways: route.Gateways}, nil
		}
	}
	if kind != "resource" {
		for _, g := range t.gateways {
			if canonical(g.Name) == canonical(host) || canonical(g.FQDN) == canonical(host) {
				return benchTarget{gateways: []identity.Node{g.Node}}, nil
			}
		}
	}
	var known []string
	for i := range t.cfg.Resources {
		known = append(known, t.cfg.Resources[i].Name)
	}
	for _, g := range t.gateways {
		known = append(known, "gateway:"+g.Name)
	}
	slices.Sort(known)
	if len(known) == 0 {
		return benchTarget{}, fmt.Errorf("%.100q: this client may reach no resource yet: have a policy allow it one", target)
	}
	const most = 20
	more := ""
	if len(known) > most {
		known, more = known[:most], " …"
	}
	return benchTarget{}, fmt.Errorf("%.100q is neither a resource nor a gateway that this client may reach\nthere are: %s%s", target, strings.Join(known, ", "), more)
}

// resourceTarget is the way to a resource, with the port to connect to where none is named: the first one that says which.
func resourceTarget(route Route, port uint16) benchTarget {
	r := route.Resource
	out := benchTarget{gateways: route.Gateways, resource: r.Name, host: route.Host, port: port}
	for _, p := range r.TCP {
		if out.port == 0 && p != policy.AllPorts {
			out.port = p.First
		}
	}
	p, isAddr := r.Prefix()
	_, hostIsAddr := netip.ParseAddr(route.Host)
	switch {
	case isAddr && !p.IsSingleIP() && hostIsAddr != nil, strings.HasPrefix(r.Address, "*.") && !r.MatchesHost(route.Host):
		out.host, out.note = "", "it is many hosts: name one of them"
	case out.port == 0 && len(r.TCP) == 0:
		out.host, out.note = "", "it has no TCP port"
	case out.port == 0:
		out.host, out.note = "", "it has every port: name one, as in "+joinHostPort(r.Name, 443)
	}
	return out
}

// Bench measures the way to what cfg names. It takes about twice cfg.Time and three seconds more. step, which may be nil, is called with what
// is being done. A refusal of the gateway's is a *tunnel.ProxyError.
func (c *Client) Bench(ctx context.Context, cfg BenchConfig, step func(string)) (*BenchReport, error) {
	return c.sessions.Bench(ctx, cfg, step)
}

// Bench is Client.Bench.
func (s *Sessions) Bench(ctx context.Context, cfg BenchConfig, step func(string)) (*BenchReport, error) {
	if step == nil {
		step = func(string) {}
	}
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	to, err := s.benchTarget(cfg.Target)
	if err != nil {
		return nil, err
	}
	step("waiting for the session")
	var b *benchRun
	_, err = dialVia(ctx, s, Route{Gateways: to.gateways, Host: cfg.Target}, func(dctx context.Context, t *tunnel.Session) (*tunnel.Stream, error) {
		str, err := t.DialTCP(dctx, trial.Host, trial.PortRun)
		if err == nil {
			b = &benchRun{cfg: cfg, to: to, session: t, run: str, lines: trial.NewLines(str, str), step: step}
		}
		return str, err
	})
	if err != nil {
		return nil, err
	}
	defer b.run.Reset() // a run that went well is closed before
	return b.measure(ctx, s)
}

// benchRun is a bench under way.
type benchRun struct {
	cfg     BenchConfig
	to      benchTarget
	session *tunnel.Session
	step    func(string)
	report  BenchReport
	echo    *tunnel.Stream
	down    atomic.Uint64 // bytes of load that arrived here

	asking sync.Mutex // held from a request to its answer
	run    *tunnel.Stream
	lines  *trial.Lines

	mu      sync.Mutex
	samples []benchSample // guarded by mu
}

// benchSample is a look at both ends.
type benchSample struct {
	at      time.Time
	gateway trial.Stats
	client  tunnel.QUICStats
	cpu     trial.CPU
	down    uint64
}

// ask sends a request on the run.
func (b *benchRun) ask(req trial.Request) (a trial.Answer, err error) {
	b.asking.Lock()
	defer b.asking.Unlock()
	if err := b.run.SetDeadline(time.Now().Add(answerTimeout)); err != nil {
		return a, err
	}
	if err := errors.Join(b.lines.Write(req), b.lines.Read(&a)); err != nil {
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, tunnel.ErrReset):
			err = errors.New("it ended the run; its log says why")
		case errors.Is(err, os.ErrDeadlineExceeded):
			err = fmt.Errorf("no answer within %v: the path is gone, or this node's rights are; see `sallyway connect status`", answerTimeout)
		}
		return a, fmt.Errorf("the gateway: %w", err)
	}
	return a, nil
}

// sample looks at both ends and keeps what it sees.
func (b *benchRun) sample() (benchSample, error) {
	a, err := b.ask(trial.Request{Op: trial.OpStats})
	if err != nil {
		return benchSample{}, err
	}
	if a.Stats == nil {
		return benchSample{}, fmt.Errorf("the gateway tells nothing of the run: %s", a.Error)
	}
	s := benchSample{time.Now(), *a.Stats, b.session.QUIC(), trial.ReadCPU(), b.down.Load()}
	b.mu.Lock()
	b.samples = append(b.samples, s)
	b.mu.Unlock()
	return s, nil
}

// between are the samples from one to another.
func (b *benchRun) between(from, to benchSample) []benchSample {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []benchSample
	for _, s := range b.samples {
		if !s.at.Before(from.at) && !s.at.After(to.at) {
			out = append(out, s)
		}
	}
	slices.SortFunc(out, func(x, y benchSample) int { return x.at.Compare(y.at) })
	return out
}

// open opens a flow to one of the gateway's services, which ctx ends.
func (b *benchRun) open(ctx context.Context, port uint16) (*tunnel.Stream, func() bool, error) {
	dctx, cancel := context.WithTimeout(ctx, DialTimeout)
	defer cancel()
	str, err := b.session.DialTCP(dctx, trial.Host, port)
	if err != nil {
		return nil, nil, err
	}
	return str, context.AfterFunc(ctx, str.Reset), nil
}

func (b *benchRun) measure(ctx context.Context, s *Sessions) (*BenchReport, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(ctx, b.run.Reset)
	defer stop()
	// The looks at both ends go on all the time, also to tell the gateway that somebody is there.
	var looking sync.WaitGroup
	looking.Go(func() {
		t := time.NewTicker(samplePause)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
			if _, err := b.sample(); err != nil {
				cancel(err)
				return
			}
		}
	})
	err := b.steps(ctx, s)
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if err == nil {
		// The gateway forgets the run before it ends the flow, so that the next one may begin at once.
		stop()
		b.asking.Lock()
		err = errors.Join(b.run.SetDeadline(time.Now().Add(answerTimeout)), b.run.CloseWrite())
		if err == nil {
			_, err = io.Copy(io.Discard, b.run)
		}
		b.asking.Unlock()
		cancel(nil)
		looking.Wait()
		if err != nil {
			return nil, fmt.Errorf("end the run: %w", err)
		}
		return &b.report, b.run.Close()
	}
	cancel(err)
	looking.Wait()
	if over := b.session.Err(); over != nil {
		err = over
	}
	return nil, err
}

func (b *benchRun) steps(ctx context.Context, s *Sessions) (err error) {
	r := &b.report
	r.Target, r.Resource, r.Started, r.Time, r.Flows = b.cfg.Target, b.to.resource, time.Now(), b.cfg.Time, b.cfg.Flows
	r.Gateway.Node = b.session.Gateway()
	r.Gateway.Name = r.Gateway.Node.ID
	if ref := s.table.Load().gateways[r.Gateway.Node]; ref != nil {
		r.Gateway.Name = ref.Name
	}
	path := b.session.Path()
	r.Path, r.Standby = path.Active.Info.Name, path.Standby.Info.Name
	r.Relay, _, _ = strings.Cut(r.Path, " ")
	b.step("round trips")
	if ch, ok := path.Active.Link.(*leg.Channel); ok {
		r.Transport = string(ch.Leg().Transport())
		r.Hops = append(r.Hops, relayHop(ctx, ch.Leg(), r.Relay))
	}
	first, err := b.sample()
	if err != nil {
		return err
	}
	if rtt := first.gateway.RelayRTT; rtt > 0 {
		r.Hops = append(r.Hops, BenchHop{From: "gateway " + r.Gateway.Name, To: "relay " + r.Relay, RTT: rtt, Method: "the gateway's control connection"})
	}
	last, err := b.resourceHop()
	if err != nil {
		return err
	}
	b.step("latency without load")
	var release func() bool
	if b.echo, release, err = b.open(ctx, trial.PortEcho); err != nil {
		return err
	}
	defer b.echo.Reset()
	defer release()
	began := time.Now()
	idle, err := b.latency(ctx, func(n int) bool {
		d := time.Since(began)
		return d < idleTime || (n < goodSamples && d < idleMost)
	})
	if err != nil {
		return err
	}
	r.Idle = summarize(idle)
	// The probes' smallest is left out: it may be from another network, long ago.
	if p := b.session.Path().Active.Probes; p.RTT > 0 {
		n := p.Answered - min(path.Active.Probes.Answered, p.Answered)
		r.Hops = append(r.Hops, BenchHop{From: "client", To: "gateway " + r.Gateway.Name, RTT: p.RTT, Samples: int(n), Method: "path probes"})
	}
	if last != nil {
		r.Hops = append(r.Hops, *last)
	}
	if b.cfg.Up {
		b.step(fmt.Sprintf("load towards the gateway for %v", b.cfg.Time))
		if r.Up, err = b.load(ctx, true); err != nil {
			return err
		}
	}
	if b.cfg.Down {
		b.step(fmt.Sprintf("load from the gateway for %v", b.cfg.Time))
		if r.Down, err = b.load(ctx, false); err != nil {
			return err
		}
	}
	if b.cfg.UDP >= 0 {
		if r.UDP, err = b.paced(ctx); err != nil {
			return err
		}
	}
	r.Moves = b.session.Path().Moves - path.Moves
	return nil
}

// relayHop is the round trip to the relay of a leg: by Binding requests where UDP passes, else the leg's own measure.
func relayHop(ctx context.Context, l *leg.Leg, name string) BenchHop {
	hop := BenchHop{From: "client", To: "relay " + name, RTT: l.Stats().RTT, Method: "the leg's control connection"}
	if l.Transport() != leg.UDP {
		return hop
	}
	network := "udp4"
	if l.RemoteAddr().Addr().Unmap().Is6() {
		network = "udp6"
	}
	conn, err := net.ListenUDP(network, nil)
	if err != nil {
		return hop
	}
	defer conn.Close()
	var rtts []time.Duration
	for range bindings {
		bctx, cancel := context.WithTimeout(ctx, bindingTimeout)
		a, err := stun.Reflexive(bctx, conn, l.RemoteAddr())
		cancel()
		if err == nil && a.RTT > 0 {
			rtts = append(rtts, a.RTT)
		}
	}
	if len(rtts) > 0 {
		l := summarize(rtts)
		hop.RTT, hop.Min, hop.Samples, hop.Method = l.P50, l.Min, l.Samples, "STUN Binding"
	}
	return hop
}

// resourceHop is the round trip from the gateway to the resource, nil where none is named.
func (b *benchRun) resourceHop() (*BenchHop, error) {
	if b.to.resource == "" {
		return nil, nil
	}
	hop := &BenchHop{From: "gateway " + b.report.Gateway.Name, To: b.to.resource, Method: "TCP connect"}
	if b.to.host == "" {
		hop.Note = "not measured: " + b.to.note
		return hop, nil
	}
	hop.To = fmt.Sprintf("%s (%s)", b.to.resource, joinHostPort(b.to.host, b.to.port))
	var took []time.Duration
	for range connects {
		a, err := b.ask(trial.Request{Op: trial.OpConnect, Host: b.to.host, Port: b.to.port})
		if err != nil {
			return nil, err
		}
		if a.Connect == nil {
			hop.Note = "not measured: " + a.Error
			return hop, nil
		}
		took = append(took, a.Connect.Took)
		if a.Connect.Refused {
			hop.Note = "nobody listens on this port"
		}
	}
	l := summarize(took)
	hop.RTT, hop.Min, hop.Samples = l.P50, l.Min, l.Samples
	return hop, nil
}
