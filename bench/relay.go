package bench

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"sallyway/internal/identity"
	"sallyway/relay"
	"sallyway/relay/udpio"
	"sallyway/relay/wire"
)

// Forwarded is what a relay alone carried between pairs of allocations, each with a channel to the other.
type Forwarded struct {
	Server        string  `json:"server"`
	Pairs         int     `json:"pairs"`    // of allocations
	Segments      int     `json:"segments"` // datagrams that the sender hands to its kernel at once
	BitsPerSecond float64 `json:"bits_per_second"`
	PacketsPerS   float64 `json:"packets_per_second"`
	CPUPerGB      float64 `json:"cpu_seconds_per_gb"` // of the relay's process
	Lost          float64 `json:"lost"`               // share of what was sent
	Window        int     `json:"window_bytes"`       // in flight at most
}

// The relays that are compared.
const (
	OwnRelay  = "Sallyway relay"
	PionRelay = "pion/turn server"
)

const (
	relaySegment = 1452                  // bytes of payload in each datagram: the largest QUIC packet of IPv4 at MTU 1500
	relayOrg     = "bench"               // organization of our relay
	relayStall   = 20 * time.Millisecond // without an arrival, what is missing is lost
	relayStart   = 20 * time.Second
	keyVariable  = "SALLYWAY_BENCH_RELAY_KEY" // of the child's environment: the key in hex
	startedPairs = 10                         // with more, sockets get the system's buffers
)

// RelayConfig says how much is measured of a relay alone.
type RelayConfig struct {
	Time     time.Duration // of each measurement
	Runs     int
	Pairs    []int
	Segments []int
	Windows  []int // bytes; the best counts, for each server
}

// RelayDefaults are one, ten and a thousand pairs, with what a quic-go sends at once and with as much as fits.
func RelayDefaults() RelayConfig {
	return RelayConfig{Time: 2 * time.Second, Runs: 3, Pairs: []int{1, 10, 1000}, Segments: []int{13, 44}, Windows: []int{128 << 10, 512 << 10}}
}

// RunRelay measures the relay alone, and pion's server in the same run, over loopback. It needs no lab.
func RunRelay(ctx context.Context, cfg RelayConfig, out io.Writer) (*Result, error) {
	res := &Result{Machine: thisMachine(ctx), Command: os.Args, Started: time.Now().UTC()}
	for _, pairs := range cfg.Pairs {
		for _, segments := range cfg.Segments {
			best := make(map[string][]Forwarded)
			for range cfg.Runs {
				for _, server := range []string{OwnRelay, PionRelay} {
					f, err := relayOnce(ctx, cfg, server, pairs, segments)
					if err != nil {
						return nil, fmt.Errorf("%s, %d pairs: %w", server, pairs, err)
					}
					fmt.Fprintf(out, "%s: %d pairs, %d segments: %.2f Gbit/s\n", server, pairs, segments, f.BitsPerSecond/1e9)
					best[server] = append(best[server], f)
				}
			}
			for _, server := range []string{OwnRelay, PionRelay} {
				v := best[server]
				slices.SortFunc(v, func(a, b Forwarded) int { return int(a.BitsPerSecond - b.BitsPerSecond) })
				res.Relay = append(res.Relay, v[(len(v)-1)/2]) // of an even number: the lower
			}
		}
	}
	res.Took = time.Since(res.Started).Seconds()
	return res, nil
}

// relayOnce starts a server, measures with each window, and returns the best.
func relayOnce(ctx context.Context, cfg RelayConfig, server string, pairs, segments int) (Forwarded, error) {
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails (crypto/rand)
	srv, err := startRelayServer(ctx, server, key)
	if err != nil {
		return Forwarded{}, err
	}
	defer srv.stop()
	credentials := func(identity.Kind, int) (string, string, string) { return turnUser, turnRealm, turnSecret }
	if server == OwnRelay {
		credentials = func(k identity.Kind, i int) (string, string, string) {
			u := wire.Username{Expiry: time.Now().Add(time.Hour), Node: identity.Node{Org: relayOrg, Kind: k, ID: fmt.Sprintf("n%d", i)}, Flags: wire.FlagPlainData}.String()
			return u, wire.Realm, wire.Password(key, u)
		}
	}
	var all []*relayPair
	defer func() {
		for _, p := range all {
			p.close()
		}
	}()
	for i := range pairs {
		p, err := newRelayPair(srv.addr, i, pairs > startedPairs, credentials)
		if err != nil {
			return Forwarded{}, fmt.Errorf("pair %d: %w", i, err)
		}
		all = append(all, p)
	}
	var best Forwarded
	for _, window := range cfg.Windows {
		f, err := forward(ctx, srv.cmd.Process.Pid, all, segments, window, cfg.Time)
		if err != nil {
			return Forwarded{}, err
		}
		if f.BitsPerSecond > best.BitsPerSecond {
			best = f
		}
	}
	best.Server = server
	return best, nil
}

// relayServer is a server in a process of its own.
type relayServer struct {
	cmd  *exec.Cmd
	addr netip.AddrPort
}

func startRelayServer(ctx context.Context, server string, key []byte) (*relayServer, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	args := []string{"turn", "relay"}
	if server == PionRelay {
		args[1] = "server"
	}
	cmd := exec.CommandContext(ctx, exe, append(args, "--server", "127.0.0.1:0", "--client", "127.0.0.1", "--target", "127.0.0.1")...)
	cmd.Env = append(os.Environ(), keyVariable+"="+hex.EncodeToString(key))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &relayServer{cmd: cmd}
	timer := time.AfterFunc(relayStart, func() { _ = cmd.Process.Kill() }) // ends the read below
	defer timer.Stop()
	var word, addr string
	if _, err := fmt.Fscanln(out, &word, &addr); err != nil {
		s.stop()
		return nil, fmt.Errorf("start %s: %w", server, err)
	}
	if s.addr, err = netip.ParseAddrPort(addr); err != nil {
		s.stop()
		return nil, err
	}
	return s, nil
}

func (s *relayServer) stop() {
	_ = s.cmd.Process.Kill() // may have ended
	_ = s.cmd.Wait()         // killed
}

// RelayServer is our relay without a platform. It runs until ctx ends.
func RelayServer(ctx context.Context, cfg TurnConfig) error {
	key, err := hex.DecodeString(os.Getenv(keyVariable))
	if err != nil || len(key) == 0 {
		return fmt.Errorf("%s is no key", keyVariable)
	}
	const many = 1 << 16
	s, err := relay.New(relay.Config{
		Listen: cfg.Server, Keys: [][]byte{key}, Organizations: map[string]relay.Organization{relayOrg: {}},
		Limits: relay.Limits{Allocations: many, SourceAllocations: many},
	})
	if err != nil {
		return err
	}
	if err := s.Listen(ctx); err != nil {
		return err
	}
	fmt.Println("ready", s.Addr())
	return s.Run(ctx)
}

// relayPair are two allocations with channels to each other.
type relayPair struct {
	a, b *relayClient
}

func newRelayPair(server netip.AddrPort, i int, small bool, credentials func(identity.Kind, int) (string, string, string)) (*relayPair, error) {
	p := new(relayPair)
	for _, end := range []struct {
		kind identity.Kind
		c    **relayClient
	}{{identity.Client, &p.a}, {identity.Gateway, &p.b}} {
		user, realm, password := credentials(end.kind, i)
		c, err := newRelayClient(source(i), server, small, user, realm, password)
		if err != nil {
			p.close()
			return nil, err
		}
		*end.c = c
	}
	if err := errors.Join(p.a.bind(p.b.relayed), p.b.bind(p.a.relayed)); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// sourcePairs come from one address: a relay answers a stranger only so often.
const sourcePairs = 16

// source is the loopback address of a pair.
func source(i int) netip.Addr {
	n := i / sourcePairs
	return netip.AddrFrom4([4]byte{127, 1, byte(n >> 8), byte(n) + 1})
}

func (p *relayPair) close() {
	for _, c := range []*relayClient{p.a, p.b} {
		if c != nil {
			c.sock.Close()
		}
	}
}

// forward sends through all pairs in turn for a while, from a to b, with at most window bytes on their way.
func forward(ctx context.Context, pid int, pairs []*relayPair, segments, window int, length time.Duration) (Forwarded, error) {
	run := make([]byte, 0, segments*(4+relaySegment))
	for range segments {
		run = binary.BigEndian.AppendUint16(run, relayChannel)
		run = binary.BigEndian.AppendUint16(run, relaySegment)
		run = append(run, make([]byte, relaySegment)...)
	}
	var arrived atomic.Int64 // bytes of payload
	progress := make(chan struct{}, 1)
	var wg sync.WaitGroup
	for _, p := range pairs {
		if err := p.b.udp.SetReadDeadline(time.Time{}); err != nil {
			return Forwarded{}, err
		}
		wg.Go(func() { p.b.receive(&arrived, progress) })
	}
	before, err := treeCPU(pid)
	if err != nil {
		return Forwarded{}, err
	}
	stall := time.NewTimer(relayStall)
	defer stall.Stop()
	var sent, lost int64
	start := time.Now()
	for i := 0; time.Since(start) < length && ctx.Err() == nil; i++ {
		if err := pairs[i%len(pairs)].a.sock.Write(run, 4+relaySegment, 0, udpio.Peer{}); err != nil && !errors.Is(err, syscall.ENOBUFS) {
			return Forwarded{}, err
		}
		sent += int64(segments * relaySegment)
		for sent-lost-arrived.Load() > int64(window) && ctx.Err() == nil {
			stall.Reset(relayStall)
			select {
			case <-progress:
			case <-stall.C:
				lost = sent - arrived.Load()
			}
		}
	}
	took, got := time.Since(start), arrived.Load()
	after, err := treeCPU(pid)
	if err != nil {
		return Forwarded{}, err
	}
	for _, p := range pairs {
		err = errors.Join(err, p.b.udp.SetReadDeadline(time.Now()))
	}
	wg.Wait()
	return Forwarded{
		Pairs: len(pairs), Segments: segments, Window: window, BitsPerSecond: float64(got) * 8 / took.Seconds(), PacketsPerS: float64(got) / relaySegment / took.Seconds(),
		CPUPerGB: ratio((after - before).Seconds(), float64(got)/1e9), Lost: max(0, ratio(float64(sent-arrived.Load()), float64(sent))),
	}, errors.Join(err, ctx.Err())
}

// receive counts until the socket's deadline.
func (c *relayClient) receive(arrived *atomic.Int64, progress chan<- struct{}) {
	buf := make([]byte, udpio.MaxRead)
	for {
		m, err := c.sock.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || m.Segment < 4 {
			continue // an ICMP error of a datagram
		}
		arrived.Add(int64(m.N - 4*((m.N+m.Segment-1)/m.Segment)))
		select {
		case progress <- struct{}{}:
		default:
		}
	}
}

// relayTable writes the relays' figures.
func (r *Result) relayTable(b *strings.Builder) {
	pion := make(map[[2]int]float64)
	for _, f := range r.Relay {
		if f.Server == PionRelay {
			pion[[2]int{f.Pairs, f.Segments}] = f.BitsPerSecond
		}
	}
	fmt.Fprintf(b, "The relay alone, channel to channel, datagrams of %d bytes, one direction, over loopback; medians. The sender and all receivers share the cores with it.\n\n", relaySegment)
	b.WriteString("| server | pairs of allocations | segments | Gbit/s | packets/s | relay's CPU s/GB | lost | of pion |\n|---|---|---|---|---|---|---|---|\n")
	for _, f := range r.Relay {
		fmt.Fprintf(b, "| %s | %d | %d | %.2f | %.0f | %.2f | %.1f %% | %s |\n", f.Server, f.Pairs, f.Segments, f.BitsPerSecond/1e9, f.PacketsPerS, f.CPUPerGB, 100*f.Lost,
			known("%.1f ×", ratio(f.BitsPerSecond, pion[[2]int{f.Pairs, f.Segments}])))
	}
}
