package e2e

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyway/client"
	"sallyway/internal/identity"
	"sallyway/internal/lab"
	"sallyway/internal/legs"
	"sallyway/relay/wire"
)

// Bounds for programs that the race detector makes ten times as slow, on a machine that does other things as well. They tell a connection that
// was moved from one that waits for a timeout; how fast a move is, the benchmarks measure.
const (
	raceStall   = 10 * time.Second // longest silence of an open connection
	lostWhile   = 5 * time.Second  // no relay is there
	raceSettled = 90 * time.Second // until a session has its active and its standby path again, over UDP
)

// raceExit is the exit code of a program that the race detector had to say something about.
const raceExit = 66

// racePrograms returns the folder of the programs built with the race detector: $SALLYWAY_RACE_BIN, else they are built for the test.
func racePrograms(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("SALLYWAY_RACE_BIN")
	if dir == "" {
		program(t, "gcc")
		dir = t.TempDir()
		root := must(lab.SourceRoot())(t)
		cmd := exec.CommandContext(t.Context(), program(t, "go"), "build", "-race", "-o", dir+"/", "./cmd/...")
		cmd.Dir = root
		cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build the programs with the race detector: %v\n%s", err, out)
		}
	}
	for _, name := range []string{"platformd", "relayd", "gatewayd", "sallyway"} {
		info := must(buildinfo.ReadFile(filepath.Join(dir, name)))(t)
		raced := false
		for _, s := range info.Settings {
			raced = raced || (s.Key == "-race" && s.Value == "true")
		}
		if !raced {
			t.Fatalf("%s in %s was built without the race detector", name, dir)
		}
	}
	return dir
}

// raceSite is the site of TestFailoverUnderTheRaceDetector: a resource behind two gateways, and a pair of nodes with one relay each.
type raceSite struct {
	*lab.Site
	spare            *lab.Node // the second gateway of resource web
	lone, loneClient *lab.Node // with --standby 0
	echo, loneEcho   netip.AddrPort
}

func newRaceSite(t *testing.T) *raceSite {
	t.Helper()
	l := newLab(t, lab.Config{Bin: racePrograms(t), Direct: true})
	check(t, l.BlockDirect(true))
	site, err := l.Build(within(t, 3*time.Minute), lab.SiteConfig{NoBranch: true, RelayArgs: []string{"--drain-timeout", "5s"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	s := &raceSite{Site: site}
	for _, n := range []struct {
		node **lab.Node
		lab.NodeSpec
	}{
		{&s.spare, lab.NodeSpec{Kind: identity.Gateway, Name: "spare", Host: s.Gateway, Args: []string{"--tun", "off", "--metrics-listen", ""}}},
		{&s.lone, lab.NodeSpec{Kind: identity.Gateway, Name: "lone", Host: s.Gateway2, Args: []string{"--standby", "0"}}},
		{&s.loneClient, lab.NodeSpec{Kind: identity.Client, Name: "lone-client", Host: s.Peer, Args: []string{"--standby", "0"}}},
	} {
		*n.node = must(s.StartNode(within(t, time.Minute), n.NodeSpec))(t)
	}
	s.echo = must(s.Private.Echo(at(lab.WebAddr, echoPort)))(t).Addr
	s.loneEcho = must(s.Private2.Echo(at(lab.Private2Web, echoPort)))(t).Addr
	ctx := within(t, time.Minute)
	tcp := fmt.Sprint(echoPort)
	check(t, s.AddResource(ctx, lab.Resource{Name: "web", Gateway: lab.Office + ",spare", Address: lab.WebAddr.String(), TCP: tcp}, "client:"+lab.Laptop))
	check(t, s.AddResource(ctx, lab.Resource{Name: "depot", Gateway: "lone", Address: lab.Private2Web.String(), TCP: tcp}, "client:lone-client"))
	reach(t, s.Client, s.echo, time.Minute)
	reach(t, s.Peer, s.loneEcho, time.Minute)
	return s
}

// session is what a client says of its session with a gateway.
func session(ctx context.Context, n *lab.Node, gateway string) (client.GatewayStatus, error) {
	var st client.Status
	if err := n.Status(ctx, &st); err != nil {
		return client.GatewayStatus{}, err
	}
	for _, g := range st.Gateways {
		if g.Name == gateway {
			return g, nil
		}
	}
	return client.GatewayStatus{}, fmt.Errorf("%s has no session with %s: %+v", n.Name, gateway, st.Gateways)
}

// settled waits until the laptop's session with office is as it should be: an active and a standby path, both over UDP.
func (s *raceSite) settled(t *testing.T) {
	t.Helper()
	ctx := within(t, raceSettled)
	for _, n := range []*lab.Node{s.RelayA, s.RelayB, s.GatewayA, s.Laptop} {
		check(t, lab.Until(ctx, 50*time.Millisecond, func() error { return n.Ready(ctx) }))
	}
	check(t, lab.Until(ctx, 50*time.Millisecond, func() error {
		g, err := session(ctx, s.Laptop, lab.Office)
		if err != nil {
			return err
		}
		if !g.Up || !strings.HasSuffix(g.Path, " udp") || !strings.HasSuffix(g.Standby, " udp") {
			return fmt.Errorf("up %v over %q, standby %q: %s", g.Up, g.Path, g.Standby, g.Error)
		}
		return nil
	}))
}

// over waits until the laptop's session with office runs over a path whose name ends so.
func (s *raceSite) over(t *testing.T, suffix string, most time.Duration) {
	t.Helper()
	ctx := within(t, most)
	check(t, lab.Until(ctx, 50*time.Millisecond, func() error {
		g, err := session(ctx, s.Laptop, lab.Office)
		if err == nil && (!g.Up || !strings.HasSuffix(g.Path, " "+suffix)) {
			err = fmt.Errorf("up %v over %q, want %q", g.Up, g.Path, suffix)
		}
		return err
	}))
}

// relayInUse is the relay that carries a session.
func (s *raceSite) relayInUse(t *testing.T, n *lab.Node, gateway string) (*lab.Node, *lab.Host) {
	t.Helper()
	g := must(session(within(t, resume), n, gateway))(t)
	switch name, _, _ := strings.Cut(g.Path, " "); name {
	case s.RelayA.Record.Name:
		return s.RelayA, s.Relay1
	case s.RelayB.Record.Name:
		return s.RelayB, s.Relay2
	}
	t.Fatalf("session with %s over %q", gateway, g.Path)
	return nil, nil
}

// relayConnections counts the sockets of a host that are connected to a relay.
func (s *raceSite) relayConnections(t *testing.T, h *lab.Host) (n int, table string) {
	t.Helper()
	r := must(h.Run(within(t, resume), program(t, "ss"), "-Htun", "state", "connected"))(t)
	for line := range strings.Lines(r.Stdout) {
		for _, relay := range []*lab.Host{s.Relay1, s.Relay2} {
			if f := strings.Fields(line); len(f) > 0 && strings.HasPrefix(f[len(f)-1], s.Addr(relay).String()+":") {
				n++
			}
		}
	}
	return n, r.Stdout
}

// TestFailoverUnderTheRaceDetector takes every promise of failover once, with daemons that the race detector watches, under connections that
// stay open through all of it: none is lost, every byte is right, and no daemon has a race.
func TestFailoverUnderTheRaceDetector(t *testing.T) {
	s := newRaceSite(t)
	open := startFlow(t, s.Client, s.echo)
	begin := time.Now()
	for _, sc := range []struct {
		name  string
		stall time.Duration // longest silence that is no failure
		run   func(t *testing.T)
	}{
		{"one relay and no standby", raceStall, s.withoutStandby},
		{"relay killed", raceStall, func(t *testing.T) {
			relay, _ := s.relayInUse(t, s.Laptop, lab.Office)
			relay.Kill()
			open.goesOn(t, resume)
			check(t, relay.Proc.Start())
		}},
		{"relay cut off in silence", raceStall, func(t *testing.T) {
			_, host := s.relayInUse(t, s.Laptop, lab.Office)
			check(t, s.Cut(host))
			open.goesOn(t, resume)
			check(t, s.Cut())
		}},
		{"nothing reaches the relay", raceStall, func(t *testing.T) {
			_, host := s.relayInUse(t, s.Laptop, lab.Office)
			check(t, s.CutWays(lab.Way{From: s.Client, To: host}, lab.Way{From: s.Gateway, To: host}))
			open.goesOn(t, resume)
			check(t, s.CutWays())
		}},
		{"nothing comes from the relay", raceStall, func(t *testing.T) {
			_, host := s.relayInUse(t, s.Laptop, lab.Office)
			check(t, s.CutWays(lab.Way{From: host, To: s.Client}, lab.Way{From: host, To: s.Gateway}))
			open.goesOn(t, resume)
			check(t, s.CutWays())
		}},
		{"gateway's leg lost", raceStall, func(t *testing.T) {
			_, host := s.relayInUse(t, s.Laptop, lab.Office)
			check(t, s.CutWays(lab.Way{From: host, To: s.Gateway}, lab.Way{From: s.Gateway, To: host}))
			open.goesOn(t, resume)
			check(t, s.CutWays())
		}},
		{"a third of the packets lost", raceStall, func(t *testing.T) {
			relay, host := s.relayInUse(t, s.Laptop, lab.Office)
			check(t, s.Impair(host, 30, 30))
			ctx := within(t, raceSettled)
			check(t, lab.Until(ctx, 50*time.Millisecond, func() error {
				open.goesOn(t, resume) // a path is judged while something is on its way
				g, err := session(ctx, s.Laptop, lab.Office)
				if err == nil && strings.HasPrefix(g.Path, relay.Record.Name+" ") {
					err = fmt.Errorf("still over %q", g.Path)
				}
				return err
			}))
			check(t, s.Impair(host, 0, 0))
		}},
		{"gateway restarted", raceStall, func(t *testing.T) {
			s.lone.Kill()
			check(t, s.lone.Proc.Start())
			check(t, s.lone.WaitReady(within(t, raceSettled)))
			t.Logf("new connections through it after %v", reach(t, s.Peer, s.loneEcho, raceSettled).Round(time.Millisecond))
			open.goesOn(t, resume) // through the other gateway
		}},
		{"relay drains", raceStall, func(t *testing.T) {
			relay, _ := s.relayInUse(t, s.Laptop, lab.Office)
			if err := relay.Stop(); err != nil { // SIGTERM
				t.Error(err)
			}
			exitedClean(t, relay.Proc)
			open.goesOn(t, resume)
			check(t, relay.Proc.Start())
		}},
		{"client's address changes", raceStall, func(t *testing.T) {
			for range 2 {
				must(s.MoveClient())(t)
				open.goesOn(t, resume)
			}
		}},
		{"platform killed", raceStall, func(t *testing.T) {
			s.PlatformD.Kill()
			open.goesOn(t, resume)
			reach(t, s.Client, s.echo, resume)
			check(t, s.PlatformD.Start())
			check(t, s.WaitPlatform(within(t, resume), s.PlatformD))
			open.goesOn(t, resume)
		}},
		{"both relays lost for a while", lostWhile + raceStall, func(t *testing.T) {
			check(t, s.Cut(s.Relay1, s.Relay2))
			<-time.After(lostWhile)
			check(t, s.Cut())
			open.goesOn(t, resume)
		}},
		{"UDP blocked, then its port, then neither", raceStall, func(t *testing.T) {
			check(t, s.BlockUDP(true))
			open.goesOn(t, resume)
			s.over(t, "tls", raceSettled)
			check(t, s.BlockPort(wire.Port, s.Client))
			open.goesOn(t, resume)
			s.over(t, string(legs.LastTLS), raceSettled)
			check(t, s.BlockPort(0))
			check(t, s.BlockUDP(false))
		}},
		{"a direct path comes and goes", raceStall, func(t *testing.T) {
			check(t, s.BlockDirect(false))
			must(s.MoveClient())(t) // a change of network has direct paths tried anew
			ctx := within(t, raceSettled)
			check(t, lab.Until(ctx, 50*time.Millisecond, func() error {
				g, err := session(ctx, s.Laptop, lab.Office)
				if err == nil && !strings.HasPrefix(g.Path, "direct ") {
					err = fmt.Errorf("over %q: %+v", g.Path, g.Direct)
				}
				return err
			}))
			open.goesOn(t, resume)
			check(t, s.BlockDirect(true))
			open.goesOn(t, resume)
		}},
		{"gateway drains", raceStall, func(t *testing.T) { s.drainOffice(t, open) }},
	} {
		ok := t.Run(sc.name, func(t *testing.T) {
			if sc.name != "gateway drains" {
				defer s.settled(t)
			}
			since := time.Now()
			sc.run(t)
			gap := open.silence(since)
			t.Logf("longest silence %v", gap.Round(time.Millisecond))
			if gap > sc.stall {
				t.Errorf("longest silence %v, want at most %v", gap, sc.stall)
			}
		})
		if !ok {
			break
		}
	}
	t.Logf("all scenarios took %v", time.Since(begin).Round(time.Second))
	s.noRaces(t)
}

// withoutStandby: nodes with --standby 0 have one connection to one relay each, on the host's own table of sockets, and a relay that is killed
// and started again takes their connection up again.
func (s *raceSite) withoutStandby(t *testing.T) {
	open := startFlow(t, s.Peer, s.loneEcho)
	one := func() error {
		for _, h := range []*lab.Host{s.Gateway2, s.Peer} {
			if n, table := s.relayConnections(t, h); n != 1 {
				return fmt.Errorf("%s has %d connections to relays:\n%s", h.Name, n, table)
			}
		}
		return nil
	}
	// A gateway whose leg was late in coming up keeps a connection for the last rung for a minute.
	check(t, lab.Until(within(t, raceSettled), 100*time.Millisecond, one))
	for range 20 {
		open.goesOn(t, resume)
		check(t, one())
	}
	relay, _ := s.relayInUse(t, s.loneClient, "lone")
	relay.Kill()
	check(t, relay.Proc.Start())
	open.goesOn(t, 2*resume)
	open.end(t)
}

// drainOffice takes the gateway that serves out of service: what is open goes on and ends in peace, what is new goes by way of the other one.
func (s *raceSite) drainOffice(t *testing.T, open *flow) {
	s.settled(t)
	r, err := s.Gateway.Run(within(t, resume), must(s.Bin("gatewayd"))(t), "drain", "--state", s.GatewayA.State, "--deadline", "2m")
	if err != nil {
		t.Fatalf("drain: %v %s", err, r.Stderr)
	}
	check(t, lab.Until(within(t, resume), 100*time.Millisecond, func() error {
		if g, err := session(t.Context(), s.Laptop, lab.Office); err != nil || !g.Draining {
			return fmt.Errorf("office drains: %v, %w", g.Draining, err)
		}
		return nil
	}))
	other := startFlow(t, s.Client, s.echo)
	if g := must(session(within(t, resume), s.Laptop, "spare"))(t); !g.Up || g.Sent < flowBlock {
		t.Errorf("the new connection does not go by way of the other gateway: %+v", g)
	}
	open.goesOn(t, resume)
	select {
	case <-s.GatewayA.Done():
		t.Fatal("the gateway ended while connections were open")
	default:
	}
	open.end(t)
	exitedClean(t, s.GatewayA.Proc)
	other.goesOn(t, resume)
	other.end(t)
}

// exitedClean waits until a program has ended by itself, as it was asked to.
func exitedClean(t *testing.T, p *lab.Proc) {
	t.Helper()
	if code, err := p.Wait(within(t, resume)); err != nil || code != 0 {
		t.Errorf("%s: exit code %d (%d: a race), %v", p.Name, code, raceExit, err)
	}
}

// noRaces ends all daemons and looks for what the race detector has said, in all logs since the beginning.
func (s *raceSite) noRaces(t *testing.T) {
	t.Helper()
	for _, p := range []*lab.Proc{s.Laptop.Proc, s.loneClient.Proc, s.GatewayA.Proc, s.spare.Proc, s.lone.Proc, s.RelayA.Proc, s.RelayB.Proc, s.PlatformD} {
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
		exitedClean(t, p)
	}
	logs := must(filepath.Glob(filepath.Join(s.Dir(), "*", "*.log")))(t)
	if len(logs) < 8 {
		t.Errorf("only the logs %v", logs)
	}
	for _, path := range logs {
		b := must(os.ReadFile(path))(t)
		const most = 6 << 10 // bytes of a report that are shown
		if i := bytes.Index(b, []byte("WARNING: DATA RACE")); i >= 0 {
			t.Errorf("%s: %s", path, b[i:min(len(b), i+most)])
		}
	}
}
