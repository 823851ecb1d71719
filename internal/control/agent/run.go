package agent

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

// Pacing of what is tried again.
const (
	backoffFirst = time.Second
	backoffMost  = 20 * time.Second
	blockedRetry = 30 * time.Second // a node that is disabled or revoked asks this often
	steady       = 10 * time.Second // a stream that lived this long resets the backoff
	streamDead   = 3 * control.PingInterval
	renewCheck   = time.Minute // the wall clock is looked at this often: timers stand still while a host sleeps
	maxEvent     = link.MaxBody
)

// backoff is exponential with full jitter: each wait is drawn from zero to a bound that doubles from 1 s to 20 s. The zero value
// starts at the first.
type backoff struct {
	n      int
	random func() float64 // nil is rand.Float64
}

func (b *backoff) next() time.Duration {
	bound := min(backoffMost, backoffFirst<<min(b.n, 10))
	b.n++
	return time.Duration(b.rand() * float64(bound))
}

func (b *backoff) rand() float64 {
	if b.random != nil {
		return b.random()
	}
	return rand.Float64()
}

func (b *backoff) reset() { b.n = 0 }

// sleep waits for d or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Run keeps the node in touch with its platform until ctx ends, then returns nil after everything has stopped.
func (a *Agent) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { a.notify(ctx) })
	wg.Go(func() { a.heartbeats(ctx) })
	wg.Go(func() { a.renewals(ctx) })
	a.follow(ctx)
	wg.Wait()
	a.link.Close()
	return nil
}

// notify calls the subscribers.
func (a *Agent) notify(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.changed:
		}
		a.mu.Lock()
		c, subscribers := a.cache.Config, a.subscribers
		a.mu.Unlock()
		for _, f := range subscribers {
			f(c)
		}
	}
}

// follow holds the control stream, again and again.
func (a *Agent) follow(ctx context.Context) {
	var b backoff
	for ctx.Err() == nil {
		up, err := a.stream(ctx)
		if ctx.Err() != nil {
			break
		}
		if up >= steady {
			b.reset()
		}
		wait := b.next()
		if why, yes := blocked(err); yes {
			a.disconnected(err, why)
			wait = jitter(blockedRetry, 0.2)
		} else {
			a.disconnected(err, "")
		}
		_ = sleep(ctx, wait) // the loop looks at ctx
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.status.Connected, a.status.Since = false, a.cfg.Now()
}

// jitter returns d ± part of it.
func jitter(d time.Duration, part float64) time.Duration {
	return d + time.Duration((2*rand.Float64()-1)*part*float64(d))
}

var errSilent = &link.Error{
	Kind:   link.Broken,
	Reason: fmt.Sprintf("the platform has been silent for %s", streamDead),
	Remedy: "check the network between this host and the platform",
}

// stream follows one control stream to its end and says how long it was up.
func (a *Agent) stream(ctx context.Context) (up time.Duration, err error) {
	bearer, err := a.bearer(ctx)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	body, err := a.link.Stream(ctx, link.Request{Method: http.MethodGet, Path: "/api/v1/node/control", Bearer: bearer})
	if err != nil {
		a.noteAuth(bearer, err)
		return 0, err
	}
	defer body.Close()
	watchdog := time.AfterFunc(streamDead, func() { cancel(errSilent) })
	defer watchdog.Stop()
	start := time.Now()
	a.connected()
	err = a.events(&watched{body, watchdog})
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return time.Since(start), err
}

// watched is a reader that puts off the watchdog whenever something arrives, so that a large event on a slow line is not silence.
type watched struct {
	io.Reader
	watchdog *time.Timer
}

func (w *watched) Read(b []byte) (int, error) {
	n, err := w.Reader.Read(b)
	if n > 0 {
		w.watchdog.Reset(streamDead)
	}
	return n, err
}

// events takes events from r until it ends. Events of unknown type are left to newer nodes.
func (a *Agent) events(r io.Reader) error {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 4096), maxEvent)
	for s.Scan() {
		if len(s.Bytes()) == 0 {
			continue
		}
		var ev control.Event
		if err := json.Unmarshal(s.Bytes(), &ev); err != nil {
			return &link.Error{Kind: link.NotPlatform, Reason: "the control stream carries something that is not an event", Remedy: "check what answers at the platform's URL", Err: err}
		}
		switch {
		case ev.Type == control.EventConfig && ev.Config != nil:
			a.apply(ev.Config)
		case ev.Type == control.EventPing:
			a.upToDate(ev.Version)
		}
	}
	if err := s.Err(); err != nil {
		return &link.Error{Kind: link.Broken, Reason: fmt.Sprintf("the control stream broke: %v", err), Remedy: "none needed: it is opened again", Err: err}
	}
	return &link.Error{Kind: link.Broken, Reason: "the platform ended the control stream", Remedy: "none needed: it is opened again (the platform may be restarting)", Err: io.EOF}
}

func (a *Agent) connected() {
	a.mu.Lock()
	a.status.Connected, a.status.Since = true, a.cfg.Now()
	a.status.Error, a.status.Remedy, a.status.Blocked = "", "", ""
	a.mu.Unlock()
	a.log.Info("platform connected", "platform", a.state.URL)
	if err := a.link.ClockError(); err != nil {
		a.log.Warn("the clocks differ", "error", err, "remedy", link.Remedy(err))
	}
	poke(a.beat)
	poke(a.renew)
}

// disconnected notes a failure. The log has each reason once; tries in between are for debugging.
func (a *Agent) disconnected(err error, why string) {
	reason, remedy := err.Error(), link.Remedy(err)
	if why != "" && remedy == "" {
		remedy = fmt.Sprintf("where you are admin: sallyway --org %s %s show %s; a new token: sallyway --org %[1]s %[2]s token %[3]s",
			a.state.Node.Org, a.state.Node.Kind, a.Name())
	}
	a.mu.Lock()
	news := a.status.Connected || a.status.Error != reason
	if a.status.Connected {
		a.status.Since = a.cfg.Now()
	}
	a.status.Connected = false
	a.status.Error, a.status.Remedy, a.status.Blocked = reason, remedy, why
	a.mu.Unlock()
	switch {
	case !news:
		a.log.Debug("platform still not connected", "error", reason)
	case why != "":
		a.log.Error("the platform refuses this node", "error", reason, "remedy", remedy, "retry", blockedRetry)
	default:
		a.log.Warn("platform not connected; trying again", "error", reason, "remedy", remedy)
	}
}

// apply takes over a configuration, or refuses it and keeps what is there.
func (a *Agent) apply(c *control.Config) {
	a.mu.Lock()
	defer a.mu.Unlock()
	err := a.checkLocked(c)
	if err != nil {
		if a.status.ConfigError != err.Error() {
			a.log.Error("configuration refused; the one before stays", "version", c.Version, "error", err)
		}
		a.status.ConfigError = err.Error()
		return
	}
	a.status.ConfigError = ""
	next := cacheState{Highest: c.Version, HighestSnapshot: a.cache.HighestSnapshot, Snapshot: a.cache.Snapshot, Config: c}
	same := a.cache.Config != nil && equal(a.cache.Config, c)
	a.cache = next
	if c.Trust.Roots != a.state.Trust.Roots {
		// From here on these roots count, and what follows them: one that has gone leads nowhere any more.
		a.state.Trust = c.Trust
		if err := save(a.cfg.StateDir, nodeFile, a.state); err != nil {
			a.log.Error("new roots of the organization not saved: after a restart this node follows them from the former ones", "error", err)
		}
		a.log.Info("the organization's roots changed, signed by the ones before", "version", c.Version)
	}
	if c.Node.Kind == identity.Gateway {
		jws := ""
		if c.Gateway != nil {
			jws = c.Gateway.Snapshot
		}
		before := a.snapshotErr
		if a.snapshotErr = a.takeSnapshotLocked(jws, c.Trust); a.snapshotErr != nil && (before == nil || before.Error() != a.snapshotErr.Error()) {
			a.log.Error("snapshot refused; the one before stays", "error", a.snapshotErr)
		}
	}
	if same {
		return
	}
	if err := save(a.cfg.StateDir, cacheFile, a.cache); err != nil {
		a.log.Error("configuration not saved: a restart without the platform would start from an older one", "error", err)
	}
	select {
	case <-a.configured:
	default:
		close(a.configured)
	}
	poke(a.changed)
}

// upToDate notes that nothing changed for the node up to a version.
func (a *Agent) upToDate(version uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.cache.Config != nil && a.status.ConfigError == "" {
		a.heard = max(a.heard, version)
	}
}

// heardVersion is what heartbeats acknowledge: the version of the newest configuration that counts here, or up to which it was said to be
// the newest.
func (a *Agent) heardVersion() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.cache.Config == nil {
		return 0
	}
	return max(a.heard, a.cache.Config.Version)
}

func (a *Agent) checkLocked(c *control.Config) error {
	switch {
	case c.Node != a.state.Node:
		return fmt.Errorf("configuration is for %v, this is %v", c.Node, a.state.Node)
	case c.Version < a.cache.Highest:
		return fmt.Errorf("configuration has version %d, and version %d was seen before: the platform was set back to an older state, or somebody replays; enrol anew with a fresh token to accept it", c.Version, a.cache.Highest)
	}
	if _, err := c.Trust.For(c.Node.Kind); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	return a.checkRootsLocked(c.Trust)
}

// checkRootsLocked refuses roots that this node does not know and that follow none it knows: a configuration is not signed itself, so whoever
// speaks for the platform could else put an organization of its own in place of ours.
func (a *Agent) checkRootsLocked(t control.Trust) error {
	err := succeeds(a.state.Trust.Roots, t)
	if se, ok := errors.AsType[*identity.SuccessionError](err); ok {
		return fmt.Errorf("the configuration names the root %v, which is neither one that this node was enrolled with or has followed, nor signed by it: the platform was installed anew, or somebody speaks in its name; enrol anew with a fresh token to accept it", se.Root)
	}
	return err
}

// succeeds holds the roots of t against known ones (PEM).
func succeeds(known string, t control.Trust) error {
	from, err := identity.DecodeCertificates([]byte(known))
	if err != nil {
		return fmt.Errorf("roots that this node knows: %w", err)
	}
	shown, err := identity.DecodeCertificates([]byte(t.Roots))
	if err != nil {
		return fmt.Errorf("roots of the configuration: %w", err)
	}
	var links []*x509.Certificate
	if t.Lineage != "" {
		if links, err = identity.DecodeCertificates([]byte(t.Lineage)); err != nil {
			return fmt.Errorf("former roots of the configuration: %w", err)
		}
	}
	return identity.Succession(from, shown, links)
}

// takeSnapshotLocked verifies a signed snapshot and keeps it if it is not older than one seen before. a.mu is held.
func (a *Agent) takeSnapshotLocked(jws string, t control.Trust) error {
	if jws == "" {
		return errors.New("the platform has sent no policies for this gateway")
	}
	trust, err := a.trustFor(t, identity.Policy)
	if err != nil {
		return err
	}
	s, err := policy.OpenSnapshot(jws, trust, a.state.Node)
	if err != nil {
		return err
	}
	if s.Version < a.cache.HighestSnapshot {
		return fmt.Errorf("snapshot has version %d, and version %d was seen before", s.Version, a.cache.HighestSnapshot)
	}
	a.snapshot, a.cache.Snapshot, a.cache.HighestSnapshot = s, jws, s.Version
	return nil
}

// equal compares two configurations by what they say.
func equal(a, b *control.Config) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

// heartbeats tells the platform how the node is, while it is connected.
func (a *Agent) heartbeats(ctx context.Context) {
	started := a.cfg.Now()
	tick := time.NewTicker(control.HeartbeatInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-a.beat:
		}
		a.mu.Lock()
		up := a.status.Connected
		a.mu.Unlock()
		if !up {
			continue
		}
		hb := control.Heartbeat{State: "ready"}
		if a.cfg.Heartbeat != nil {
			hb = a.cfg.Heartbeat()
		}
		if hb.Version == "" {
			hb.Version = a.cfg.Version
		}
		if hb.Started.IsZero() {
			hb.Started = started
		}
		hb.ConfigVersion = a.heardVersion()
		if err := a.call(ctx, "/api/v1/node/heartbeat", hb, nil); err != nil && ctx.Err() == nil {
			a.log.Debug("heartbeat not delivered", "error", err)
		}
	}
}

// renewals keeps the certificates fresh.
func (a *Agent) renewals(ctx context.Context) {
	var b backoff
	due := a.renewAt()
	wait := time.Duration(0)
	var hurried *tls.Certificate // what was renewed before its time
	for {
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-a.renew:
			timer.Stop()
		case <-timer.C:
		}
		disowned := a.disowned()
		hurry := disowned != nil && disowned != hurried
		if disowned == nil {
			hurried = nil
		}
		if left := due.Sub(a.cfg.Now()); left > 0 && !hurry {
			wait = min(left, renewCheck)
			continue
		}
		if err := a.renewNow(ctx); err != nil {
			if ctx.Err() != nil {
				return
			}
			a.log.Debug("certificates not renewed; trying again", "error", err)
			wait = b.next()
			continue
		}
		if hurry {
			a.mu.Lock()
			hurried = a.cert // once: a platform that issues what it does not accept is not asked over and over
			a.mu.Unlock()
		}
		if due, wait = a.renewAt(), 0; due.After(a.cfg.Now()) {
			b.reset()
			continue
		}
		wait = b.next() // a leaf that is due as it comes: the clocks differ
	}
}

// disowned returns the node's own certificate when the CA that issued it is none of those any more that its organization accepts: other nodes refuse
// it, however long it is valid. It is nil otherwise.
func (a *Agent) disowned() *tls.Certificate {
	a.mu.Lock()
	defer a.mu.Unlock()
	pins := a.trustLocked().Pins[a.state.Node.Kind]
	if len(pins) == 0 || len(a.cert.Certificate) < 2 {
		return nil
	}
	ca, err := x509.ParseCertificate(a.cert.Certificate[1])
	if err != nil || slices.Contains(pins, identity.CertificateKeyHash(ca)) {
		return nil
	}
	return a.cert
}

// renewAt is half of the leaf's life, ± a tenth of it, so that nodes enrolled together do not renew together. A platform backdates leaves
// by identity.ClockSkew, which is no part of their life.
func (a *Agent) renewAt() time.Time {
	a.mu.Lock()
	leaf := a.cert.Leaf
	a.mu.Unlock()
	issued := leaf.NotBefore
	if at := issued.Add(identity.ClockSkew); at.Before(leaf.NotAfter) {
		issued = at
	}
	return issued.Add(jitter(leaf.NotAfter.Sub(issued)/2, 0.2))
}

func (a *Agent) renewNow(ctx context.Context) error {
	bearer, err := a.bearer(ctx)
	if err == nil {
		var certs control.Certificates
		if certs, err = a.requestRenewal(ctx, a.link, bearer, a.key, a.state.Node, sshKeyFile); err == nil {
			return a.install(certs)
		}
		a.noteAuth(bearer, err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.status.RenewError = err.Error()
	return err
}

// install makes renewed certificates the node's.
func (a *Agent) install(certs control.Certificates) error {
	leaf, site, err := ownCertificates(certs, a.key, a.state.Node)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cert, a.site, a.state.Certificates, a.status.RenewError = leaf, site, certs, ""
	if err := save(a.cfg.StateDir, nodeFile, a.state); err != nil {
		a.log.Error("certificates renewed but not saved", "error", err)
	}
	a.log.Info("certificates renewed", "node", a.state.Node, "expires", leaf.Leaf.NotAfter)
	return nil
}
