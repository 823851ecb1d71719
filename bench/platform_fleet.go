package bench

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/internal/version"
)

// fleet are nodes that live in this process. Each has its own key, its own connections from an address of its own on loopback, and does what
// package control/agent does: an access token by an assertion, the control stream, heartbeats on a second connection, and the same backoff.
type fleet struct {
	p       *controlPlane
	relays  []*fleetNode
	members []*fleetNode // gateways, then clients
	all     []*fleetNode

	up      atomic.Int64 // nodes with a stream that brought a configuration
	beats   atomic.Int64
	late    atomic.Int64  // heartbeats that failed
	newest  atomic.Uint64 // version of a configuration that some node was told
	watched atomic.Pointer[lookout]

	mu     sync.Mutex
	errors map[string]int // of streams and tokens, by what they say; guarded by mu
	joined []time.Duration
	since  time.Time // guarded by mu; joined counts from it
}

// fleetNode is one of them.
type fleetNode struct {
	f     *fleet
	n     int // among all
	id    identity.Node
	name  string
	key   *ecdsa.PrivateKey
	sign  jose.Signer
	link  *link.Link
	beat  control.Heartbeat
	ready chan struct{} // a heartbeat is due now; capacity 1

	mu     sync.Mutex
	bearer string    // guarded by mu
	until  time.Time // guarded by mu
}

// newFleet creates and enrols nodes, and takes the time.
func newFleet(ctx context.Context, p *controlPlane, relays, gateways, clients int) (*fleet, error) {
	f := &fleet{p: p, errors: make(map[string]int), all: make([]*fleetNode, relays+gateways+clients)}
	err := p.parallel(ctx, len(f.all), func(ctx context.Context, l *link.Link, i int) (err error) {
		kind, req := identity.Client, control.CreateNode{Name: fmt.Sprintf("c-%05d", i-relays-gateways)}
		switch {
		case i < relays:
			kind, req = identity.Relay, control.CreateNode{Name: fmt.Sprintf("relay-%03d", i), Host: fmt.Sprintf("203.0.113.%d", i%250+1)}
		case i < relays+gateways:
			kind, req = identity.Gateway, control.CreateNode{Name: fmt.Sprintf("gw-%04d", i-relays)}
		}
		f.all[i], err = f.enrol(ctx, l, kind, req, i)
		return err
	})
	if err != nil {
		return nil, err
	}
	f.relays, f.members = f.all[:relays], f.all[relays:]
	for i, g := range f.members[:gateways] {
		g.beat.RelayRTT = make(map[string]time.Duration)
		for j, r := range f.relays {
			g.beat.RelayRTT[r.id.ID] = time.Duration(5+(7*i+13*j)%40) * time.Millisecond
		}
		g.beat.Load = nil
	}
	// Sessions are told by gateways: one of every client.
	for i, c := range f.members[gateways:] {
		g := f.members[i%gateways]
		g.beat.Sessions = append(g.beat.Sessions, control.SessionReport{
			Peer: c.id, Key: identity.HashKey(c.key.Public()), Relay: f.relays[i%relays].name + " udp", Since: time.Now().UTC(), Flows: 3, SentBytes: 1 << 20, RecvBytes: 1 << 24, RTT: 20 * time.Millisecond,
		})
	}
	return f, nil
}

// enrol creates a node and spends its token for a fresh key.
func (f *fleet) enrol(ctx context.Context, l *link.Link, kind identity.Kind, req control.CreateNode, i int) (*fleetNode, error) {
	var created control.CreatedNode
	if err := f.p.admin(ctx, l, http.MethodPost, "/orgs/default/"+string(kind)+"s", req, &created); err != nil {
		return nil, err
	}
	token, err := control.ParseToken(created.Token)
	if err != nil {
		return nil, err
	}
	n := &fleetNode{f: f, n: i, id: token.Node, name: req.Name, ready: make(chan struct{}, 1)}
	if n.key, err = identity.NewKey(); err != nil {
		return nil, err
	}
	enrol := control.EnrolRequest{Secret: token.Secret, Node: token.Node, Version: version.Get().Version}
	r, err := n.renewal()
	if err != nil {
		return nil, err
	}
	enrol.CSR, enrol.SiteCSR = r.CSR, r.SiteCSR
	if err := l.Do(ctx, link.Request{Method: http.MethodPost, Path: "/api/v1/enroll", JSON: enrol}, nil); err != nil {
		return nil, err
	}
	if n.sign, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: n.key}, (&jose.SignerOptions{}).WithType("JWT")); err != nil {
		return nil, err
	}
	const perNet = 1 << 16
	n.link, err = f.p.link(net.IPv4(127, byte(1+i/perNet), byte(i>>8), byte(i))) //nolint:gosec // bytes of a number
	n.beat = control.Heartbeat{Version: version.Get().Version, Started: time.Now().UTC(), State: "ready"}
	if kind == identity.Relay {
		n.beat.Load = map[string]float64{"allocations": 7, "bytes_per_second": 1e6}
	}
	return n, err
}

// renewal is what the node asks certificates with.
func (n *fleetNode) renewal() (r control.RenewRequest, err error) {
	csr, err := identity.Request(n.key, n.id)
	if err != nil {
		return r, err
	}
	r.CSR = string(csr)
	if n.id.Kind == identity.Gateway {
		csr, err = identity.Request(n.key, identity.Node{Org: n.id.Org, Kind: identity.Site, ID: n.id.ID})
		r.SiteCSR = string(csr)
	}
	return r, err
}

// group makes a group of all nodes that may be in one.
func (f *fleet) group(ctx context.Context, l *link.Link, name string, nodes []*fleetNode) error {
	members := make([]string, 0, len(nodes))
	for _, n := range nodes {
		members = append(members, string(n.id.Kind)+":"+n.name)
	}
	return f.p.admin(ctx, l, http.MethodPost, "/orgs/default/groups", control.CreateGroup{Name: name, Members: members}, nil)
}

// resource makes a resource that gateways, by number, serve.
func (f *fleet) resource(ctx context.Context, l *link.Link, name string, gateways ...int) error {
	req := control.CreateResource{Name: name, Address: "10.0.0.1", TCP: []policy.PortRange{policy.AllPorts}}
	for _, g := range gateways {
		req.Gateways = append(req.Gateways, f.members[g].name)
	}
	return f.p.admin(ctx, l, http.MethodPost, "/orgs/default/resources", req, nil)
}

// allow makes a policy, of the resource's name.
func (f *fleet) allow(ctx context.Context, l *link.Link, subject, resource string) error {
	return f.p.admin(ctx, l, http.MethodPost, "/orgs/default/policies", control.CreatePolicy{Name: resource, Subject: subject, Resource: resource}, nil)
}

// token is an access token, a new one by an assertion when there is none that lives.
func (n *fleetNode) token(ctx context.Context) (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.bearer != "" && time.Now().Before(n.until) {
		return n.bearer, nil
	}
	now := time.Now()
	assertion, err := jwt.Signed(n.sign).Claims(jwt.Claims{
		Issuer: n.id.String(), Subject: n.id.String(), Audience: jwt.Audience{n.f.p.cred.URL}, ID: rand.Text(),
		IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(time.Minute)),
	}).Serialize()
	if err != nil {
		return "", err
	}
	var out struct {
		Token string `json:"access_token"`
	}
	form := url.Values{"grant_type": {"urn:ietf:params:oauth:grant-type:jwt-bearer"}, "assertion": {assertion}}
	if err := n.link.Do(ctx, link.Request{Method: http.MethodPost, Path: "/api/v1/node/token", Form: form}, &out); err != nil {
		return "", err
	}
	n.bearer, n.until = out.Token, now.Add(control.AccessTokenLife-time.Minute)
	return n.bearer, nil
}

// run keeps the node connected until ctx ends. It begins after a while.
func (n *fleetNode) run(ctx context.Context, begin time.Duration) {
	wait(ctx, begin)
	var wg sync.WaitGroup
	wg.Go(func() { n.heartbeats(ctx) })
	const first, most, steady = time.Second, 20 * time.Second, 10 * time.Second // of package agent
	for tries := 0; ctx.Err() == nil; tries++ {
		start := time.Now()
		err := n.stream(ctx)
		if ctx.Err() != nil {
			break
		}
		n.f.note(err)
		if time.Since(start) >= steady {
			tries = 0
		}
		wait(ctx, time.Duration(mrand.Float64()*float64(min(most, first<<min(tries, 10))))) //nolint:gosec // no secret
	}
	wg.Wait()
	n.link.Close()
}

// stream follows one control stream to its end.
func (n *fleetNode) stream(ctx context.Context) error {
	bearer, err := n.token(ctx)
	if err != nil {
		return err
	}
	body, err := n.link.Stream(ctx, link.Request{Method: http.MethodGet, Path: "/api/v1/node/control", Bearer: bearer})
	if err != nil {
		return err
	}
	defer body.Close()
	up := false
	defer func() {
		if up {
			n.f.up.Add(-1)
		}
	}()
	r := bufio.NewReaderSize(body, 4096)
	var line []byte
	for {
		line = line[:0]
		for {
			part, err := r.ReadSlice('\n')
			line = append(line, part...)
			if err == nil {
				break
			}
			if !errors.Is(err, bufio.ErrBufferFull) {
				return err
			}
		}
		v := configVersion(line)
		if v == 0 {
			continue // a ping
		}
		if !up {
			up = true
			n.f.arrived()
			poke(n.ready)
		}
		for old := n.f.newest.Load(); v > old && !n.f.newest.CompareAndSwap(old, v); old = n.f.newest.Load() {
		}
		if w := n.f.watched.Load(); w != nil {
			w.look(n, v, line)
		}
		if cap(line) > 64<<10 {
			line = nil // a node keeps what it was told; that is not measured here
		}
	}
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// configHead begins a line with a configuration: 10 000 of them are not decoded as JSON while the platform is measured beside it.
var configHead = []byte(`{"type":"config","config":{"version":`)

// configVersion is the version of the configuration in a line; zero is none.
func configVersion(line []byte) uint64 {
	rest, ok := bytes.CutPrefix(line, configHead)
	if !ok {
		return 0
	}
	digits, _, _ := bytes.Cut(rest, []byte(","))
	v, _ := strconv.ParseUint(string(digits), 10, 64) // zero is none
	return v
}

func (n *fleetNode) heartbeats(ctx context.Context) {
	tick := time.NewTicker(control.HeartbeatInterval)
	defer tick.Stop()
	connected := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.ready:
			connected = true
		case <-tick.C:
		}
		if !connected {
			continue
		}
		bearer, err := n.token(ctx)
		if err == nil {
			err = n.link.Do(ctx, link.Request{Method: http.MethodPost, Path: "/api/v1/node/heartbeat", Bearer: bearer, JSON: n.beat}, nil)
		}
		if err != nil {
			n.f.late.Add(1)
			continue
		}
		n.f.beats.Add(1)
	}
}

// note counts an error that is not the node's own end.
func (f *fleet) note(err error) {
	what := "the stream ended"
	var p *link.Problem
	var e *link.Error
	switch {
	case errors.As(err, &p):
		what = fmt.Sprintf("%d %s", p.Status, p.Code)
	case errors.As(err, &e):
		what = fmt.Sprint(e.Kind)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.errors[what]++
}

// count begins to count arrivals and errors anew.
func (f *fleet) count() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.since, f.joined, f.errors = time.Now(), nil, make(map[string]int)
}

// arrived is called by a node whose stream brought its first configuration.
func (f *fleet) arrived() {
	f.up.Add(1)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.joined = append(f.joined, time.Since(f.since))
}

// awaitAll waits until every node is connected.
func (f *fleet) awaitAll(ctx context.Context, most time.Duration) error {
	end := time.Now().Add(most)
	for f.up.Load() < int64(len(f.all)) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if time.Now().After(end) {
			f.mu.Lock()
			defer f.mu.Unlock()
			return fmt.Errorf("%d of %d nodes are connected after %v; errors: %v", f.up.Load(), len(f.all), most, f.errors)
		}
		wait(ctx, 20*time.Millisecond)
	}
	return nil
}

// lookout waits for a change at nodes.
type lookout struct {
	mark    []byte         // of what a node is told
	gone    bool           // the mark disappears
	any     map[int]bool   // nodes that see it by any newer configuration: what they get is signed and encoded
	newer   uint64         // than this version
	begin   time.Time      // of the request
	seen    []atomic.Int64 // nanoseconds after begin, by node; zero is not yet
	left    atomic.Int64
	done    chan struct{} // closed when none is left
	bytes   atomic.Int64  // of what brought it
	entries atomic.Int64
}

func (w *lookout) look(n *fleetNode, version uint64, line []byte) {
	if w.seen[n.n].Load() == math.MaxInt64 || version <= w.newer || !w.any[n.n] && bytes.Contains(line, w.mark) == w.gone {
		return
	}
	if w.seen[n.n].CompareAndSwap(0, int64(max(1, time.Since(w.begin)))) {
		w.bytes.Add(int64(len(line)))
		w.entries.Add(1)
		if w.left.Add(-1) == 0 {
			close(w.done)
		}
	}
}
