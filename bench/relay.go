package bench

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"sallyway/internal/identity"
	"sallyway/internal/lab"
	"sallyway/relay"
	"sallyway/relay/wire"
)

// Forwarded is what a relay alone carried between pairs of allocations, each with a channel to the other: the median of some
// runs.
type Forwarded struct {
	Server        string  `json:"server"`
	Link          string  `json:"link"`
	Pairs         int     `json:"pairs"`    // of allocations
	Segments      int     `json:"segments"` // datagrams that the sender hands to its kernel at once
	Runs          int     `json:"runs"`
	BitsPerSecond float64 `json:"bits_per_second"`
	Low           float64 `json:"min_bits_per_second"`
	High          float64 `json:"max_bits_per_second"`
	PacketsPerS   float64 `json:"packets_per_second"`
	CPUPerGB      float64 `json:"cpu_seconds_per_gb"`   // of the relay's process
	CPUPerGbit    float64 `json:"cpu_seconds_per_gbit"` // the same
	PerCore       float64 `json:"bits_per_core_second"` // what one core would carry that did nothing but this
	Lost          float64 `json:"lost"`                 // share of what was sent
	Window        int     `json:"window_bytes"`         // in flight at most
}

// The relays that are compared.
const (
	OwnRelay  = "Sallyway relay"
	PionRelay = "pion/turn server"
)

// The links between a relay and its load.
const (
	Loopback = "loopback"
	Veth     = "veth" // between two network namespaces
)

const (
	relaySegment = 1452    // bytes of payload in each datagram: the largest QUIC packet of IPv4 at MTU 1500
	relayOrg     = "bench" // organization of our relay
	relayStart   = 20 * time.Second
	keyVariable  = "SALLYWAY_BENCH_RELAY_KEY" // of the child's environment: the key in hex
	startedPairs = 10                         // with more, sockets get the system's buffers
)

// RelayConfig says how much is measured of a relay alone.
type RelayConfig struct {
	Bin      string        // folder of the programs
	Time     time.Duration // of each measurement
	Runs     int
	Links    []string
	Pairs    []int
	Segments []int
	Windows  []int         // bytes; the best counts, for each server
	Pings    time.Duration // of each measurement of latency
	Idle     int           // allocations over DTLS whose memory is measured; those over UDP are the most pairs
	Settle   time.Duration // how long these are idle before it is measured again
}

// RelayDefaults are from one pair to 10 000 allocations, with what a quic-go sends at once and with as much as fits.
func RelayDefaults() RelayConfig {
	return RelayConfig{
		Time: time.Second, Runs: 5, Links: []string{Loopback, Veth}, Pairs: []int{1, 10, 1000, 5000}, Segments: []int{13, 44},
		Windows: []int{128 << 10, 512 << 10}, Pings: 2 * time.Second, Idle: idleAllocations,
		Settle: 150 * time.Second, // the runtime collects garbage every two minutes at the latest, and gives memory back slowly
	}
}

// RelayQuick is a run of less than a minute.
func RelayQuick() RelayConfig {
	return RelayConfig{
		Time: 300 * time.Millisecond, Runs: 3, Links: []string{Veth}, Pairs: []int{1, 1000}, Segments: []int{13, 44},
		Windows: []int{256 << 10}, Pings: 500 * time.Millisecond, Idle: 500,
	}
}

// RunRelay measures the relay alone, and pion's server in the same run.
func RunRelay(ctx context.Context, cfg RelayConfig, out io.Writer) (*Result, error) {
	l, err := lab.New(lab.Config{Bin: cfg.Bin})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	res := &Result{Machine: thisMachine(ctx), Command: os.Args, Started: time.Now().UTC()}
	r := &relayRun{cfg: cfg, out: out, lab: l, res: res}
	for i, link := range cfg.Links {
		bed, err := newRelayBed(l, link)
		if err != nil {
			return nil, err
		}
		for _, pairs := range cfg.Pairs {
			if err := r.series(ctx, bed, pairs, i == 0 && pairs == slices.Max(cfg.Pairs)); err != nil {
				return nil, fmt.Errorf("%s, %d pairs: %w", link, pairs, err)
			}
		}
		if err := r.delays(ctx, bed); err != nil {
			return nil, fmt.Errorf("latency over %s: %w", link, err)
		}
		if i == 0 && cfg.Idle > 0 {
			if err := r.idleLegs(ctx, bed); err != nil {
				return nil, fmt.Errorf("idle allocations: %w", err)
			}
		}
	}
	res.Took = time.Since(res.Started).Seconds()
	return res, nil
}

// relayRun is a run in progress.
type relayRun struct {
	cfg RelayConfig
	out io.Writer // progress
	lab *lab.Lab
	res *Result
}

// loaded is a relay with what is sent through it.
type loaded struct {
	*relayServer
	pairs []*relayPair
}

func (l *loaded) close() {
	for _, p := range l.pairs {
		p.close()
	}
	l.stop()
}

// series measures a number of pairs, both servers in turn: each starts anew, since ten thousand sockets for each at once are
// more than many a machine allows. With memory, it is noted once what the idle allocations cost.
func (r *relayRun) series(ctx context.Context, bed *relayBed, pairs int, memory bool) error {
	type kind struct {
		server   string
		segments int
	}
	servers := []string{OwnRelay, PionRelay}
	runs := make(map[kind][]Forwarded)
	for run := range r.cfg.Runs {
		for _, server := range servers {
			found, err := r.turn(ctx, bed, server, pairs, memory && run == 0)
			if err != nil {
				return fmt.Errorf("%s: %w", server, err)
			}
			for _, f := range found {
				runs[kind{server, f.Segments}] = append(runs[kind{server, f.Segments}], f)
			}
		}
	}
	for _, segments := range r.cfg.Segments {
		for _, server := range servers {
			r.res.Relay = append(r.res.Relay, medianForwarded(runs[kind{server, segments}]))
		}
	}
	return nil
}

// turn is one server's: a run with each number of segments.
func (r *relayRun) turn(ctx context.Context, bed *relayBed, server string, pairs int, memory bool) ([]Forwarded, error) {
	key := newRelayKey()
	srv, err := bed.start(ctx, server, key, "")
	if err != nil {
		return nil, err
	}
	l := &loaded{relayServer: srv}
	defer l.close()
	before, err := srv.proc.Usage()
	if err != nil {
		return nil, err
	}
	for i := range pairs {
		p, err := newRelayPair(srv.addr, i, pairs > startedPairs, bed.dial(i), bed.dial(i), credentialsOf(server, key))
		if err != nil {
			return nil, fmt.Errorf("pair %d: %w", i, err)
		}
		l.pairs = append(l.pairs, p)
	}
	if memory {
		after, err := srv.proc.Usage()
		if err != nil {
			return nil, err
		}
		r.res.RelayMemory = append(r.res.RelayMemory, RelayMemory{Server: server, Control: "UDP", Allocations: 2 * pairs, Empty: before.RSS, Idle: after.RSS})
	}
	var found []Forwarded
	for _, segments := range r.cfg.Segments {
		f, err := r.best(ctx, l, segments)
		if err != nil {
			return nil, err
		}
		f.Server, f.Link, f.Segments = server, bed.link, segments
		fmt.Fprintf(r.out, "%s over %s: %d pairs, %d segments: %.2f Gbit/s\n", server, bed.link, pairs, segments, f.BitsPerSecond/1e9)
		found = append(found, f)
	}
	return found, nil
}

// best measures with each window.
func (r *relayRun) best(ctx context.Context, l *loaded, segments int) (Forwarded, error) {
	var best Forwarded
	for _, window := range r.cfg.Windows {
		f, err := forward(ctx, l.proc.PID(), l.pairs, segments, window, r.cfg.Time)
		if err != nil {
			return Forwarded{}, err
		}
		if f.BitsPerSecond > best.BitsPerSecond {
			best = f
		}
	}
	return best, nil
}

// medianForwarded is the run in the middle, of an even number the lower, with the spread of all. Each figure is the median of
// its own, since the CPU of a short run is coarse.
func medianForwarded(v []Forwarded) Forwarded {
	v = slices.SortedFunc(slices.Values(v), func(a, b Forwarded) int { return cmp.Compare(a.BitsPerSecond, b.BitsPerSecond) })
	m := v[(len(v)-1)/2]
	m.Runs, m.Low, m.High = len(v), v[0].BitsPerSecond, v[len(v)-1].BitsPerSecond
	var cpu []float64
	for _, f := range v {
		cpu = append(cpu, f.CPUPerGB)
	}
	m.setCPU(median(cpu))
	return m
}

// setCPU sets what follows from CPU seconds per GB.
func (f *Forwarded) setCPU(perGB float64) {
	f.CPUPerGB, f.CPUPerGbit, f.PerCore = perGB, perGB/8, ratio(8e9, perGB)
}

// relayServer is a server in a process of its own.
type relayServer struct {
	proc *lab.Proc
	addr netip.AddrPort
}

func (s *relayServer) stop() { s.proc.Kill() }

// start starts a server. dir holds its certificate; empty is none.
func (b *relayBed) start(ctx context.Context, server string, key []byte, dir string) (*relayServer, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	name := "relay"
	if server == PionRelay {
		name = "server"
	}
	p, err := b.serve.Start(lab.Spec{
		Name: fmt.Sprintf("%s-%d", name, partNumber.Add(1)), Env: []string{keyVariable + "=" + hex.EncodeToString(key)}, Grace: time.Second,
		Args: []string{exe, "turn", name, "--server", netip.AddrPortFrom(b.server, b.port).String(), "--client", b.server.String(), "--target", b.server.String(), "--dir", dir},
	})
	if err != nil {
		return nil, err
	}
	s := &relayServer{proc: p}
	if s.addr, err = readyAddr(ctx, p); err != nil {
		s.stop()
		return nil, fmt.Errorf("start %s: %w", server, err)
	}
	return s, nil
}

// newRelayKey is a key of our relay's TURN passwords.
func newRelayKey() []byte {
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails (crypto/rand)
	return key
}

// credentialsOf says who a server takes its clients for: each end of each pair is a node of its own.
func credentialsOf(server string, key []byte) func(identity.Kind, int) (user, realm, password string) {
	if server == PionRelay {
		return func(identity.Kind, int) (string, string, string) { return turnUser, turnRealm, turnSecret }
	}
	return func(k identity.Kind, i int) (string, string, string) {
		u := relayUser(identity.Node{Org: relayOrg, Kind: k, ID: fmt.Sprintf("n%d", i)})
		return u, wire.Realm, wire.Password(key, u)
	}
}

// relayUser is the TURN user name of a node of ours.
func relayUser(n identity.Node) string {
	return wire.Username{Expiry: time.Now().Add(time.Hour), Node: n, Flags: wire.FlagPlainData}.String()
}

// RelayServer is our relay without a platform, with TLS and DTLS where TurnConfig.Dir has a certificate. It runs until ctx ends.
func RelayServer(ctx context.Context, cfg TurnConfig) error {
	key, err := relayKey()
	if err != nil {
		return err
	}
	const many = 1 << 16
	rc := relay.Config{
		Listen: cfg.Server, Keys: [][]byte{key}, Organizations: map[string]relay.Organization{relayOrg: {}},
		Limits: relay.Limits{Allocations: many, SourceAllocations: many, Connections: many, SourceHandshakes: many},
	}
	if cfg.Dir != "" {
		cert, err := loadNode(filepath.Join(cfg.Dir, string(identity.Relay)))
		if err != nil {
			return err
		}
		rc.Certificate = func() (*tls.Certificate, error) { return cert, nil }
	}
	s, err := relay.New(rc)
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

// newRelayPair makes the i-th pair from two sockets.
func newRelayPair(server netip.AddrPort, i int, small bool, a, b relayDial, credentials func(identity.Kind, int) (string, string, string)) (*relayPair, error) {
	p := new(relayPair)
	for _, end := range []struct {
		kind identity.Kind
		dial relayDial
		c    **relayClient
	}{{identity.Client, a, &p.a}, {identity.Gateway, b, &p.b}} {
		user, realm, password := credentials(end.kind, i)
		udp, err := end.dial(server)
		if err != nil {
			p.close()
			return nil, err
		}
		c, err := newRelayClient(udp, small, user, realm, password)
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

func (p *relayPair) close() {
	for _, c := range []*relayClient{p.a, p.b} {
		if c != nil {
			_ = c.sock.Close() // nobody needs it any more
		}
	}
}
