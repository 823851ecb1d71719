// Package dialler is the platform as a client of organizations' gateways: sessions platform → relay → gateway → resource, for tests of
// resources and for webhooks to private addresses. The platform has no other way into a private network.
//
//	d := dialler.New(dialler.Config{View: hub.View, Registry: reg, Log: log})
//	go d.Run(ctx)
//	conn, err := d.Dial(ctx, "acme", "hooks.internal:443") // a policy of acme must let the platform reach a resource that covers it
//	test, err := d.Test(ctx, "acme", "db", control.TestResource{}, nil)
//
// For each organization the process has a node of kind platform, with a key that is in memory alone and a certificate of an hour that the
// organization's own CA issues, on the record. So a node of one organization can not speak to another's gateways or allocations, and an
// organization that switches this off is refused here, has the certificates revoked, and its gateways know no such peer any more.
//
// A session is opened when it is needed, over the first rung that leads to the gateway (TURN over UDP, TURN over TLS, TLS on 8443), and kept
// for IdleTime after its last connection. It is not moved between paths: when it is lost, the next Dial opens another.
package dialler

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/platform/store"
	"sallyway/platform/view"
	"sallyway/tunnel"
)

// Bounds of what the platform spends on this.
const (
	// IdleTime is how long a session is kept after its last connection.
	IdleTime = time.Minute
	// MaxSessions is how many sessions a process has, those of tests among them; MaxOrgSessions how many of them for one organization. A session
	// costs about five file descriptors, and memory for what is under way.
	MaxSessions, MaxOrgSessions = 64, 16
	// DialTimeout bounds Dial where the caller sets no bound.
	DialTimeout = 20 * time.Second
	// sweepInterval is how often sessions are looked at that nobody uses.
	sweepInterval = time.Second
	// renewBefore is how long before its end a certificate is followed by a new one, and sessions under it are not used any more.
	renewBefore = 10 * time.Minute
)

// Registry is what the platform writes down of this.
type Registry interface {
	// IssuePlatform issues a certificate for a node of kind platform: leaf first. A *registry.Error says that the organization does not want it.
	IssuePlatform(ctx context.Context, n identity.Node, public crypto.PublicKey) ([]*x509.Certificate, error)
	ResourceTested(ctx context.Context, org string, t *control.ResourceTest) error
}

var _ Registry = (*registry.Registry)(nil)

// Config is what a Dialler needs.
type Config struct {
	// View returns an organization as it is now; store.ErrNotFound where there is none.
	View     func(ctx context.Context, org string) (*view.View, error)
	Registry Registry
	// Relay says whether an address of a relay may be dialled, and why not: an organization's administrator typed it. Nil allows all.
	Relay   func(relay identity.Node, addr netip.Addr) error
	Log     *slog.Logger          // nil discards
	Metrics prometheus.Registerer // nil is none
	Now     func() time.Time      // nil is time.Now
	// Idle is how long a session is kept after its last connection; 0 is IdleTime.
	Idle time.Duration
}

// Dialler opens connections to resources. Its methods may be called concurrently.
type Dialler struct {
	cfg     Config
	log     *slog.Logger
	metrics metrics
	limits  limits
	tasks   sync.WaitGroup // attempts and sessions that are being closed
	ctx     context.Context
	stop    context.CancelFunc

	mu       sync.Mutex
	nodes    map[string]*node // by organization; guarded by mu
	sessions map[route]*held  // guarded by mu
	open     map[string]int   // sessions and attempts, by organization; guarded by mu
	total    int              // guarded by mu
	closed   bool             // guarded by mu
}

// route is whom a session is with.
type route struct {
	org, gateway string // name, id
}

// held is a session that Dial uses, or is opening.
type held struct {
	ready chan struct{} // closed when it is open or has failed; then s or err is set
	s     *session
	err   error
	users int       // connections and dials; guarded by Dialler.mu
	since time.Time // since when there are none; guarded by Dialler.mu
}

// New returns a dialler. Run keeps it.
func New(cfg Config) *Dialler {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Idle == 0 {
		cfg.Idle = IdleTime
	}
	d := &Dialler{cfg: cfg, log: cfg.Log, nodes: make(map[string]*node), sessions: make(map[route]*held), open: make(map[string]int)}
	d.ctx, d.stop = context.WithCancel(context.Background())
	d.metrics = newMetrics(cfg.Metrics, d)
	return d
}

// Run closes what nobody uses any more until ctx ends, and everything then.
func (d *Dialler) Run(ctx context.Context) error {
	t := time.NewTicker(sweepInterval)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			d.sweep(ctx)
		case <-ctx.Done():
			d.Close()
			return nil
		}
	}
}

// Close ends all sessions, and what is under way, and waits for that. It may be called more than once.
func (d *Dialler) Close() {
	d.mu.Lock()
	d.closed = true
	var ended []*held
	for r, h := range d.sessions {
		ended = append(ended, h)
		delete(d.sessions, r)
	}
	d.mu.Unlock()
	d.stop()
	for _, h := range ended {
		d.drop(h, "the platform stops")
	}
	d.tasks.Wait()
}

// drop closes a session that is not in the map any more, without waiting for it.
func (d *Dialler) drop(h *held, why string) {
	d.tasks.Go(func() {
		<-h.ready
		if h.s != nil {
			h.s.close(why)
		}
	})
}

// sweep closes sessions that are idle, have ended, or that their organization does not want any more.
func (d *Dialler) sweep(ctx context.Context) {
	d.mu.Lock()
	orgs := make(map[string]bool)
	for r := range d.sessions {
		orgs[r.org] = true
	}
	for org := range d.nodes {
		orgs[org] = true
	}
	d.mu.Unlock()
	for org := range orgs {
		v, err := d.cfg.View(ctx, org)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			continue // the database is away: what is open goes on
		}
		d.sweepOrg(org, v)
	}
}

// sweepOrg is sweep for one organization; v is nil where it is gone.
func (d *Dialler) sweepOrg(org string, v *view.View) {
	now := d.cfg.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	wanted := v != nil && v.Org.PlatformDial
	if n := d.nodes[org]; n != nil && (!wanted || n.unusable(v, now)) {
		delete(d.nodes, org)
	}
	for r, h := range d.sessions {
		if r.org != org {
			continue
		}
		select {
		case <-h.ready:
		default:
			continue
		}
		why := ""
		switch {
		case h.s == nil, h.s.over():
			why = "it is over"
		case !wanted:
			why = "the organization does not let the platform dial its gateways any more"
		case !v.GatewayServes(r.gateway):
			why = "the gateway is not used any more"
		case h.users == 0 && now.Sub(h.since) >= d.cfg.Idle:
			why = "idle"
		default:
			continue
		}
		delete(d.sessions, r)
		d.drop(h, why)
	}
}

// Dial opens a TCP connection to host:port inside of an organization's private networks: host is the full name of a resource, or an address or
// name that one covers. A policy of the organization must let the platform reach that resource; the gateway decides again. A refusal says which.
func (d *Dialler) Dial(ctx context.Context, org, hostport string) (net.Conn, error) {
	conn, err := d.dial(ctx, org, hostport)
	result := "ok"
	if err != nil {
		result = "failed"
		err = fmt.Errorf("dial %s through the gateways of %s: %w", hostport, org, err)
	}
	d.metrics.dials.WithLabelValues(result).Inc()
	return conn, err
}

func (d *Dialler) dial(ctx context.Context, org, hostport string) (net.Conn, error) {
	host, p, err := net.SplitHostPort(hostport)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(p, 10, 16)
	if err != nil || port == 0 || host == "" {
		return nil, fmt.Errorf("%.80q is no host and port", hostport)
	}
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, DialTimeout)
		defer cancel()
	}
	v, err := d.view(ctx, org)
	if err != nil {
		return nil, err
	}
	way, err := v.RouteFor(host, uint16(port))
	if err != nil {
		return nil, err
	}
	var errs failedDials
	for i, g := range way.Gateways {
		// With another gateway to go to, one that is not there does not get all the time.
		gctx, cancel := share(ctx, len(way.Gateways)-i)
		c, err := d.through(gctx, v, g, way.Host, way.Port)
		cancel()
		if err == nil {
			return c, nil
		}
		errs.add(g.Name, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errs.join()
}

// failedDials are why no gateway of a resource was reached. A relay that is not dialled for its address is named once, for all rungs and gateways.
type failedDials struct {
	errs    []error
	refused map[identity.Node]bool // relays
}

func (f *failedDials) add(gateway string, err error) {
	var left []error
	for _, e := range flatten(err) {
		s, isStep := errors.AsType[*stepError](e)
		if _, ok := errors.AsType[*addressError](e); !ok || !isStep {
			left = append(left, e)
			continue
		}
		if relay := s.way.ref; !f.refused[relay.Node] {
			if f.refused == nil {
				f.refused = make(map[identity.Node]bool)
			}
			f.refused[relay.Node] = true
			left = append(left, fmt.Errorf("relay %s: %w", relay.Name, s.err))
		}
	}
	if len(left) > 0 {
		f.errs = append(f.errs, fmt.Errorf("gateway %s: %w", gateway, errors.Join(left...)))
	}
}

func (f *failedDials) join() error {
	err := errors.Join(f.errs...)
	if len(f.refused) > 0 {
		err = fmt.Errorf("%w: %s", err, addressRemedy)
	}
	return err
}

// share bounds a try by its part of the time that is left.
func share(ctx context.Context, tries int) (context.Context, context.CancelFunc) {
	end, ok := ctx.Deadline()
	if !ok || tries < 2 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, time.Until(end)/time.Duration(tries))
}

// view is the organization's, unless it does not let the platform dial.
func (d *Dialler) view(ctx context.Context, org string) (*view.View, error) {
	v, err := d.cfg.View(ctx, org)
	switch {
	case errors.Is(err, store.ErrNotFound) || org == identity.SharedOrg:
		return nil, fmt.Errorf("there is no organization %.80q", org)
	case err != nil:
		return nil, err
	case !v.Org.PlatformDial:
		return nil, registry.DialOff(org)
	}
	return v, nil
}

// through opens a connection on the session with a gateway: the one there is, or a new one.
func (d *Dialler) through(ctx context.Context, v *view.View, g view.RouteGateway, host string, port uint16) (net.Conn, error) {
	for again := true; ; again = false {
		r := route{v.Org.Name, g.Node.ID}
		h, fresh, err := d.use(ctx, r, v, g)
		if err != nil {
			return nil, err
		}
		var st *tunnel.Stream
		err = patiently(ctx, d.cfg.Now, func() (err error) {
			st, err = h.s.t.DialTCP(ctx, host, port)
			return err
		})
		if err == nil {
			return &conn{Stream: st, to: addr(net.JoinHostPort(host, strconv.Itoa(int(port)))), done: func() { d.unuse(h) }}, nil
		}
		d.unuse(h)
		if !again || fresh || !errors.Is(err, tunnel.ErrNoSession) || ctx.Err() != nil {
			return nil, err
		}
		d.forget(r, h)
	}
}

// use returns the session with a gateway, and counts its user; fresh says that it was not there before.
func (d *Dialler) use(ctx context.Context, r route, v *view.View, g view.RouteGateway) (_ *held, fresh bool, _ error) {
	for {
		d.mu.Lock()
		if d.closed {
			d.mu.Unlock()
			return nil, false, net.ErrClosed
		}
		h := d.sessions[r]
		if h == nil {
			h, fresh = &held{ready: make(chan struct{}), since: d.cfg.Now()}, true
			d.sessions[r] = h
			// The attempt is everybody's who waits for it, so it does not end with this caller.
			d.tasks.Go(func() { d.fill(r, h, v, g) })
		}
		h.users++
		d.mu.Unlock()
		select {
		case <-h.ready:
		case <-ctx.Done():
			d.unuse(h)
			return nil, fresh, context.Cause(ctx)
		}
		if h.err != nil {
			d.unuse(h)
			return nil, fresh, h.err
		}
		if !h.s.over() && d.cfg.Now().Before(h.s.until.Add(-renewBefore)) {
			return h, fresh, nil
		}
		d.unuse(h)
		d.forget(r, h)
	}
}

// fill opens the session of h. One that failed is not kept.
func (d *Dialler) fill(r route, h *held, v *view.View, g view.RouteGateway) {
	defer close(h.ready)
	ctx, cancel := context.WithTimeout(d.ctx, DialTimeout)
	defer cancel()
	if h.s, h.err = d.session(ctx, v, g, nil); h.err == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.sessions[r] == h {
		delete(d.sessions, r)
	}
}

// unuse counts a user of a session out.
func (d *Dialler) unuse(h *held) {
	d.mu.Lock()
	defer d.mu.Unlock()
	h.users--
	h.since = d.cfg.Now()
}

// forget takes a session out of use. It is closed when its last connection has ended, or is over already.
func (d *Dialler) forget(r route, h *held) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.sessions[r] != h {
		return
	}
	delete(d.sessions, r)
	d.tasks.Go(func() {
		<-h.ready
		if h.s == nil {
			return
		}
		d.linger(h)
		h.s.close("replaced")
	})
}

// linger waits until nobody uses a session, it is over, or the dialler ends.
func (d *Dialler) linger(h *held) {
	t := time.NewTicker(sweepInterval)
	defer t.Stop()
	for {
		d.mu.Lock()
		users := h.users
		d.mu.Unlock()
		if users == 0 {
			return
		}
		select {
		case <-h.s.t.Done():
			return
		case <-d.ctx.Done():
			return
		case <-t.C:
		}
	}
}

// conn is a connection to a resource.
type conn struct {
	*tunnel.Stream
	to   addr
	once sync.Once
	done func()
}

var _ net.Conn = (*conn)(nil)

// Close implements net.Conn.
func (c *conn) Close() error {
	err := c.Stream.Close()
	c.once.Do(c.done)
	return err
}

// RemoteAddr is the address as the gateway dialled it.
func (c *conn) RemoteAddr() net.Addr { return c.to }

type addr string

// Network implements net.Addr.
func (addr) Network() string { return "tcp" }

// String implements net.Addr.
func (a addr) String() string { return string(a) }
