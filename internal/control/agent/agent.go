// Package agent is a node's side of its platform: it enrols the node, keeps its certificates fresh, holds the control stream, and
// hands out the newest configuration, platform up or down.
//
//	a, err := agent.Open(ctx, agent.Config{StateDir: dir, Kind: identity.Gateway, Token: token, Logger: log, Version: v})
//	a.OnConfig(func(c *control.Config) { … })   // before Run; called in order from one goroutine
//	err = a.Run(ctx)                            // until ctx ends
//
// State in StateDir, every file mode 0600 and replaced atomically:
//
//	node.key        the node's private key; made here, leaves never
//	node.json       who the node is, its platform with CA pin, its certificates, its trust, the fingerprint of the token spent
//	config.json     the newest configuration (with credentials), the last good snapshot, the highest versions seen
//	ssh.key         the key of gateways and relays for the last rung; made here, leaves never
//	enrolling.key   the key of an enrolment that has not been confirmed, with enrolling.json
package agent

import (
	"context"
	"crypto"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

// ErrNotEnrolled is returned by Open when the state folder knows no node and there is no token.
var ErrNotEnrolled = errors.New("this node is not enrolled and no token was given")

// ErrNoConfig is returned while no configuration has arrived yet.
var ErrNoConfig = errors.New("no configuration has arrived from the platform yet")

// EnrolmentRefusedError says that a token can not be used here. Programs exit with code 3.
type EnrolmentRefusedError struct {
	Reason string
	Remedy string
	Err    error // cause, may be nil
}

// Error implements error.
func (e *EnrolmentRefusedError) Error() string {
	if e.Remedy == "" {
		return "enrolment refused: " + e.Reason
	}
	return "enrolment refused: " + e.Reason + "\n" + e.Remedy
}

// Unwrap returns the cause.
func (e *EnrolmentRefusedError) Unwrap() error { return e.Err }

// DefaultEnrolTimeout is how long Open goes on trying to reach the platform for an enrolment.
const DefaultEnrolTimeout = time.Minute

// Config says where the node's state is and what it runs with.
type Config struct {
	StateDir string // exists, belongs to this process alone
	Kind     identity.Kind
	// Token is the enrolment token; empty for a node that is enrolled.
	Token string
	// AWS has the node show the AWS identity of its host in the token's place, at every start; nil: it does not.
	AWS     *AWS
	Version string // of this program, told to the platform
	Logger  *slog.Logger
	// Heartbeat tells the node's state; nil sends version and start alone. Called from one goroutine.
	Heartbeat func() control.Heartbeat
	// EnrolTimeout is how long Open tries to reach the platform; zero is DefaultEnrolTimeout.
	EnrolTimeout time.Duration
	// DialContext opens connections to the platform, perhaps through a proxy; nil is a net.Dialer, and the proxy that net/http finds in the environment.
	DialContext func(ctx context.Context, network, addr string) (net.Conn, error)
	// Now tells the time; nil is time.Now.
	Now func() time.Time
}

// Agent is an enrolled node. All methods may be called concurrently; Run once.
type Agent struct {
	cfg  Config
	log  *slog.Logger
	key  crypto.Signer
	link *link.Link

	beat    chan struct{} // one heartbeat at once; capacity 1
	renew   chan struct{} // the platform is there: look whether certificates are due; capacity 1
	changed chan struct{} // a configuration for the subscribers; capacity 1

	access accessToken

	mu          sync.Mutex
	state       nodeState
	cache       cacheState
	heard       uint64 // the platform said that nothing is new up to this version
	cert, site  *tls.Certificate
	snapshot    *policy.Snapshot
	snapshotErr error
	configured  chan struct{} // closed when the first configuration is there
	subscribers []func(*control.Config)
	status      Status
}

// Node is the node's identity.
func (a *Agent) Node() identity.Node { return a.state.Node } // never changes after Open

// Name is the node's name as the platform knows it now.
func (a *Agent) Name() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.cache.Config; c != nil && c.Name != "" {
		return c.Name
	}
	return a.state.Name
}

// Key is the node's private key.
func (a *Agent) Key() crypto.Signer { return a.key }

// PlatformURL is the platform's URL.
func (a *Agent) PlatformURL() string { return a.state.URL } // never changes after Open

// Config is the newest configuration, nil before the first. It is shared: do not change it.
func (a *Agent) Config() *control.Config {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cache.Config
}

// WaitConfig returns the newest configuration as soon as there is one. Run must be running.
func (a *Agent) WaitConfig(ctx context.Context) (*control.Config, error) {
	select {
	case <-a.configured:
		return a.Config(), nil
	case <-ctx.Done():
		if st := a.Status(); st.Error != "" {
			return nil, fmt.Errorf("%w: %s", ErrNoConfig, st.Error)
		}
		return nil, fmt.Errorf("%w: %w", ErrNoConfig, context.Cause(ctx))
	}
}

// OnConfig has f called with every configuration, in order, from the one goroutine of Run that calls subscribers: first with the
// cached one, if any, as soon as Run runs. A slow f misses versions in between, never the newest. Call it before Run.
func (a *Agent) OnConfig(f func(*control.Config)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.subscribers = append(a.subscribers, f)
}

// HeartbeatNow has a heartbeat sent without waiting for the interval, for example when a relay starts to drain.
func (a *Agent) HeartbeatNow() { poke(a.beat) }

// Certificate is the node's own certificate: for GetCertificate and GetClientCertificate. An expired one is an error that says
// why it was not renewed.
func (a *Agent) Certificate() (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.usableLocked(a.cert, "certificate")
}

// SiteCertificate is what a gateway shows when it dials another gateway.
func (a *Agent) SiteCertificate() (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.usableLocked(a.site, "site certificate")
}

func (a *Agent) usableLocked(c *tls.Certificate, what string) (*tls.Certificate, error) {
	if c == nil {
		return nil, fmt.Errorf("%v has no %s", a.state.Node, what)
	}
	if now := a.cfg.Now(); now.After(c.Leaf.NotAfter.Add(identity.ClockSkew)) {
		why := "the platform has not renewed it"
		if a.status.Error != "" {
			why = a.status.Error
		}
		return nil, fmt.Errorf("the %s of %v expired at %s: %s", what, a.state.Node, c.Leaf.NotAfter.UTC().Format(time.RFC3339), why)
	}
	return c, nil
}

// Trust is the organization's trust in leaves of the given kinds, with the deny lists of the newest configuration and snapshot.
func (a *Agent) Trust(kinds ...identity.Kind) (*identity.Trust, error) {
	a.mu.Lock()
	t, s := a.trustLocked(), a.snapshot
	a.mu.Unlock()
	tr, err := a.trustFor(t, kinds...)
	if err == nil && s != nil {
		tr.Denied = slices.Concat(tr.Denied, s.Denied)
	}
	return tr, err
}

func (a *Agent) trustLocked() control.Trust {
	if c := a.cache.Config; c != nil {
		return c.Trust
	}
	return a.state.Trust
}

func (a *Agent) trustFor(t control.Trust, kinds ...identity.Kind) (*identity.Trust, error) {
	tr, err := t.For(kinds...)
	if err != nil {
		return nil, err
	}
	tr.Now = a.cfg.Now
	return tr, nil
}

// Snapshot is a gateway's newest good snapshot: signed for this gateway, never of a lower version than one seen before. It is
// returned also after its NotAfter, when Stale reports true: running flows go on, new ones do not. The error says why there is
// none. It is shared: do not change it.
func (a *Agent) Snapshot() (*policy.Snapshot, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.snapshot != nil {
		return a.snapshot, nil
	}
	if a.snapshotErr != nil {
		return nil, a.snapshotErr
	}
	return nil, ErrNoConfig
}

// SnapshotProblem says why new flows should be refused although there is a snapshot, or why the newest one was not taken over; nil
// when the snapshot is the newest, verified and within its time. stale is true when new flows must be refused.
func (a *Agent) SnapshotProblem() (stale bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.snapshotProblemLocked()
}

func (a *Agent) snapshotProblemLocked() (bool, error) {
	switch {
	case a.snapshot == nil && a.snapshotErr != nil:
		return true, a.snapshotErr
	case a.snapshot == nil:
		return true, ErrNoConfig
	case a.cfg.Now().After(a.snapshot.NotAfter):
		return true, fmt.Errorf("the policies held here were valid until %s and the platform has not renewed them", a.snapshot.NotAfter.UTC().Format(time.RFC3339))
	}
	return false, a.snapshotErr
}

// Status is what `status` and `doctor` show of the platform.
type Status struct {
	Node     identity.Node `json:"node"`
	Name     string        `json:"name"`
	Platform string        `json:"platform"`
	// Connected says that the control stream is up, Since since when it is as it is.
	Connected bool      `json:"connected"`
	Since     time.Time `json:"since"`
	// Blocked is the platform's reason for not talking to this node (disabled, revoked, deleted); empty: none.
	Blocked string `json:"blocked,omitempty"`
	// Error is the last failure while not connected, Remedy what to do about it.
	Error             string        `json:"error,omitempty"`
	Remedy            string        `json:"remedy,omitempty"`
	ConfigVersion     uint64        `json:"config_version"`
	ConfigError       string        `json:"config_error,omitempty"` // why the newest configuration was refused
	SnapshotVersion   uint64        `json:"snapshot_version,omitempty"`
	SnapshotNotAfter  time.Time     `json:"snapshot_not_after,omitzero"`
	SnapshotError     string        `json:"snapshot_error,omitempty"`
	CertificateExpiry time.Time     `json:"certificate_expiry"`
	RenewError        string        `json:"renew_error,omitempty"`
	ClockOffset       time.Duration `json:"clock_offset_ns"` // the platform's clock minus ours
}

// Status returns the present state.
func (a *Agent) Status() Status {
	offset := a.link.ClockOffset()
	name := a.Name()
	a.mu.Lock()
	defer a.mu.Unlock()
	st := a.status
	st.Node, st.Name, st.Platform, st.ClockOffset = a.state.Node, name, a.state.URL, offset
	if c := a.cache.Config; c != nil {
		st.ConfigVersion = c.Version
	}
	if a.cert != nil {
		st.CertificateExpiry = a.cert.Leaf.NotAfter
	}
	if a.state.Node.Kind == identity.Gateway {
		if s := a.snapshot; s != nil {
			st.SnapshotVersion, st.SnapshotNotAfter = s.Version, s.NotAfter
		}
		if _, err := a.snapshotProblemLocked(); err != nil {
			st.SnapshotError = err.Error()
		}
	}
	return st
}

// Connected says whether the control stream is up, and since when it is as it is.
func (a *Agent) Connected() (up bool, since time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.status.Connected, a.status.Since
}

// poke puts a signal into a channel of capacity one.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
