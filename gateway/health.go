package gateway

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"sallyway/client"
	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/tunnel"
)

// Timing of the probes of resources. A resource counts as not reached after healthFailures probes in a row that fail, healthRetry apart, and
// as reached again after healthSuccesses that do not: at 2 % loss TCP's own repeats make a failure rare, and three in a row do not happen.
const (
	healthInterval  = 10 * time.Second // between probes that find no change, before jitter
	healthRetry     = time.Second      // between probes that contradict what is believed
	healthTimeout   = 4 * time.Second  // of one probe: two repeats of a SYN
	healthFailures  = 3
	healthSuccesses = 2
	// healthAtOnce bounds the probes under way.
	healthAtOnce = 16
	// healthBody is how much of an answer over HTTP is read, in bytes.
	healthBody = 4 << 10
)

// reach is what the probes of one resource say so far. The zero reach knows nothing.
type reach struct {
	known  bool
	ok     bool
	since  time.Time // when ok last changed
	reason string    // of the newest failure
	streak int       // probes in a row that contradict ok, or that fail while nothing is known
}

// observe takes a probe's result in and reports whether what is believed changed.
func (r *reach) observe(err error, now time.Time) (changed bool) {
	if err != nil {
		r.reason = err.Error()
	}
	if ok := err == nil; r.known && ok == r.ok || !r.known && ok {
		r.streak = 0
		if r.known {
			return false
		}
		r.known, r.ok, r.since = true, true, now
		return true
	}
	need := healthFailures
	if r.known && !r.ok {
		need = healthSuccesses
	}
	if r.streak++; r.streak < need {
		return false
	}
	r.known, r.ok, r.since, r.streak = true, err == nil, now, 0
	return true
}

// wait is how long until the next probe, before jitter.
func (r *reach) wait() time.Duration {
	if r.streak > 0 {
		return healthRetry
	}
	return healthInterval
}

// health probes the resources of the snapshot, as far as they can be probed. Its methods may be called concurrently.
type health struct {
	log      *slog.Logger
	snapshot func() (*policy.Snapshot, error)
	probe    func(ctx context.Context, host string, h policy.Health) error
	changed  func() // something is reached that was not, or the other way; from a probe's goroutine
	wake     chan struct{}
	slots    chan struct{} // healthAtOnce of them

	mu     sync.Mutex // guards probes
	probes map[string]*probed
}

// probed is a resource that is being probed; reach is guarded by health.mu.
type probed struct {
	name, host string
	how        policy.Health
	cancel     context.CancelFunc
	reach      reach
}

func newHealth(log *slog.Logger, snapshot func() (*policy.Snapshot, error), probe func(context.Context, string, policy.Health) error, changed func()) *health {
	return &health{
		log: log, snapshot: snapshot, probe: probe, changed: changed, wake: make(chan struct{}, 1), slots: make(chan struct{}, healthAtOnce),
		probes: map[string]*probed{},
	}
}

// follow has the newest snapshot's resources probed.
func (h *health) follow() {
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// run probes until ctx ends and returns when all probes have stopped.
func (h *health) run(ctx context.Context) error {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	for {
		if s, err := h.snapshot(); err == nil {
			h.reconcile(ctx, s, &tasks)
		}
		select {
		case <-h.wake:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// reconcile starts probing what is new and stops what is gone or probed otherwise now.
func (h *health) reconcile(ctx context.Context, s *policy.Snapshot, tasks *sync.WaitGroup) {
	h.mu.Lock()
	defer h.mu.Unlock()
	want := map[string]*probed{}
	for i := range s.Resource {
		r := &s.Resource[i]
		if host, how, ok := r.Probe(); ok {
			want[r.ID] = &probed{name: r.Name, host: host, how: how}
		}
	}
	for id, p := range h.probes {
		if w := want[id]; w == nil || w.host != p.host || w.how != p.how {
			p.cancel()
			delete(h.probes, id)
		}
	}
	for id, p := range want {
		if h.probes[id] != nil {
			continue
		}
		var pctx context.Context
		pctx, p.cancel = context.WithCancel(ctx)
		h.probes[id] = p
		tasks.Go(func() { h.keep(pctx, p) })
	}
}

// keep probes one resource until ctx ends.
func (h *health) keep(ctx context.Context, p *probed) {
	t := time.NewTimer(rand.N(healthRetry)) // many resources are not asked at once
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		select {
		case h.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		pctx, cancel := context.WithTimeout(ctx, healthTimeout)
		err := h.probe(pctx, p.host, p.how)
		cancel()
		<-h.slots
		if ctx.Err() != nil {
			return
		}
		h.mu.Lock()
		changed := p.reach.observe(err, time.Now())
		r := p.reach
		h.mu.Unlock()
		if changed {
			if r.ok {
				h.log.Info("resource reached", "resource", p.name, "probe", p.how)
			} else {
				h.log.Warn("resource not reached: new flows go by way of another gateway, where it has one", "resource", p.name, "probe", p.how, "err", r.reason)
			}
			h.changed()
		}
		wait := r.wait()
		t.Reset(wait - wait/10 + rand.N(wait/5))
	}
}

// report is what is known, for the platform and for people, by id.
func (h *health) report() []control.ResourceHealth {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]control.ResourceHealth, 0, len(h.probes))
	for id, p := range h.probes {
		if !p.reach.known {
			continue
		}
		rh := control.ResourceHealth{ID: id, Name: p.name, OK: p.reach.ok, Since: p.reach.since}
		if !rh.OK {
			rh.Reason = p.reach.reason
		}
		out = append(out, rh)
	}
	slices.SortFunc(out, func(a, b control.ResourceHealth) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// notice says which of the resources that a peer may reach here this gateway does not reach.
func (h *health) notice(s *policy.Snapshot, peer identity.Node) tunnel.Notice {
	lost := client.Unreached{}
	h.mu.Lock()
	for id, p := range h.probes {
		if p.reach.known && !p.reach.ok && mayUse(s, peer, id) {
			lost[id] = p.name + ": " + p.reach.reason
		}
	}
	h.mu.Unlock()
	b, _ := json.Marshal(lost) // strings always encode
	return tunnel.Notice{Type: client.NoticeUnreached, Data: b}
}

// mayUse reports whether a rule allows peer a resource.
func mayUse(s *policy.Snapshot, peer identity.Node, resource string) bool {
	for i := range s.Rules {
		if s.Rules[i].Resource == resource && slices.ContainsFunc(s.Rules[i].Subjects, func(n identity.Node) bool { return asGateway(n) == asGateway(peer) }) {
			return true
		}
	}
	return false
}

// prober makes the probes: what the gateway's own allow list bars is not probed either.
type prober struct{ enforce *enforcer }

// probe returns nil when the resource answers as asked.
func (p *prober) probe(ctx context.Context, host string, h policy.Health) error {
	addrs := []netip.Addr{}
	if a, err := netip.ParseAddr(host); err == nil {
		addrs = append(addrs, a)
	} else if addrs, err = p.enforce.resolver.LookupNetIP(ctx, "ip", host); err != nil {
		return fmt.Errorf("resolve %s: %w", host, err)
	}
	var errs []error
	for _, a := range addrs {
		a = a.Unmap().WithZone("")
		err := p.enforce.checkAddr(a, h.Port)
		if err == nil {
			err = probeAddr(ctx, netip.AddrPortFrom(a, h.Port), host, h)
		}
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func probeAddr(ctx context.Context, at netip.AddrPort, host string, h policy.Health) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", at.String())
	if err != nil {
		return err
	}
	defer c.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(deadline); err != nil {
			return err
		}
	}
	if h.Kind == policy.HealthTLS || h.Kind == policy.HealthHTTPS {
		// Whether it answers is asked, not who it is: its clients know its CA, a gateway does not. Nothing is sent to it that is not sent to anybody.
		t := tls.Client(c, &tls.Config{ServerName: host, InsecureSkipVerify: true, VerifyConnection: inTime}) //nolint:gosec // see above
		if err := t.HandshakeContext(ctx); err != nil {
			return fmt.Errorf("TLS handshake with %v: %w", at, err)
		}
		c = t
	}
	if h.Kind != policy.HealthHTTP && h.Kind != policy.HealthHTTPS {
		return nil
	}
	return probeHTTP(ctx, c, at, host, h)
}

// inTime refuses a certificate whose time is over or has not come: its clients would.
func inTime(cs tls.ConnectionState) error {
	if len(cs.PeerCertificates) == 0 {
		return errors.New("no certificate is shown")
	}
	leaf, now := cs.PeerCertificates[0], time.Now()
	if now.After(leaf.NotAfter) || now.Before(leaf.NotBefore) {
		return fmt.Errorf("the certificate is valid from %s to %s", leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// probeHTTP asks on an open connection.
func probeHTTP(ctx context.Context, c net.Conn, at netip.AddrPort, host string, h policy.Health) error {
	path := h.Path
	if path == "" {
		path = "/"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(host, strconv.Itoa(int(h.Port)))+path, nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", "sallyway-gateway")
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}
	res, err := tr.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("GET %s of %v: %w", path, at, err)
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, healthBody)) // the status counts
	if res.StatusCode >= http.StatusInternalServerError {
		return fmt.Errorf("GET %s of %v: %s", path, at, res.Status)
	}
	return nil
}
