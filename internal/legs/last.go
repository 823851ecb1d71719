package legs

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/relay/leg"
	"sallyway/relay/reverse"
)

// LastStagger is how long a relay's leg is waited for before the last rung is tried beside it; where UDP and TLS were both refused, it is
// tried at once.
const LastStagger = 3 * time.Second

// Names of the last rung beside leg.UDP and leg.TLS: a client's end and a gateway's.
const (
	LastTLS leg.Transport = "tls-8443"
	LastSSH leg.Transport = "ssh-2222"
)

// ErrNoLastRung says that there is no last rung: the relay or this node has none, or it was asked for a peer a moment ago and refused.
var ErrNoLastRung = errors.New("no last rung")

// lastKey is a peer at a relay.
type lastKey struct{ relay, peer identity.Node }

// Missing reports whether a wanted relay's leg has been missing for LastStagger, or can not be had, or has asked the relay for a sign of life for
// a while.
func (k *Keeper) Missing(n identity.Node) bool {
	r := k.relay(n)
	if r == nil {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current != nil {
		return !r.doubted.IsZero() && time.Since(r.doubted) >= doubtPatience
	}
	return !r.missing.IsZero() && (r.failed || time.Since(r.missing) >= LastStagger)
}

// UpFor is how long a relay's leg has been up as it is; 0 where it is not.
func (k *Keeper) UpFor(n identity.Node) time.Duration {
	r := k.relay(n)
	if r == nil {
		return 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current == nil {
		return 0
	}
	return time.Since(r.since)
}

func (k *Keeper) relay(n identity.Node) *relay {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.relays[n]
}

// Last connects to a peer over the relay's TLS port. ErrNoLastRung is at once.
func (k *Keeper) Last(ctx context.Context, relay, peer identity.Node) (*reverse.Link, error) {
	r := k.relay(relay)
	if r == nil {
		return nil, ErrUnwanted
	}
	r.mu.Lock()
	ref := r.ref
	r.mu.Unlock()
	key := lastKey{relay, peer}
	k.mu.Lock()
	rest := time.Until(k.refused[key].until)
	k.mu.Unlock()
	if ref.TLSPort == 0 || k.cfg.Certificate == nil || rest > 0 {
		return nil, ErrNoLastRung
	}
	addrs, dial, err := k.Way(ctx, ref, ref.TLSPort)
	if err != nil {
		return nil, err
	}
	trust, err := RelayTrust(ref)
	if err != nil {
		return nil, err
	}
	l, err := reverse.DialTLS(ctx, reverse.TLSConfig{
		Relay: ref.Node, Addrs: addrs, Gateway: peer, Certificate: k.cfg.Certificate, Control: k.cfg.Control, Dial: dial,
		Verify: k.verifier(trust),
	})
	if err != nil {
		if errors.Is(ctx.Err(), context.Canceled) {
			return nil, err
		}
		k.mu.Lock()
		if len(k.refused) > maxRefused {
			clear(k.refused)
		}
		n := k.refused[key].n + 1
		wait := min(refusedRest<<min(max(n-refusedOften, 0), 8), k.retry)
		k.refused[key] = refusal{n, time.Now().Add(jitter(wait))}
		k.mu.Unlock()
		return nil, fmt.Errorf("%s over %s: %w", ref.Name, LastTLS, err)
	}
	k.mu.Lock()
	delete(k.refused, key)
	k.mu.Unlock()
	return l, nil
}

// refusal is how often in a row a peer was refused, and until when it rests for that.
type refusal struct {
	n     int
	until time.Time
}

// refusedRest is how long a peer rests at a relay whose last rung did not lead to it: the gateway may be about to make its connection there. After
// refusedOften times it doubles, up to RetryInterval.
const (
	refusedRest  = 400 * time.Millisecond
	refusedOften = 6
)

// maxRefused bounds the pairs of relay and peer whose last refusal is remembered.
const maxRefused = 4096

// RelayTrust is the trust in a relay's certificate.
func RelayTrust(ref control.RelayRef) (*identity.Trust, error) {
	roots, err := identity.DecodeCertificates([]byte(ref.Roots))
	if err != nil {
		return nil, fmt.Errorf("roots of relay %s: %w", ref.Name, err)
	}
	return &identity.Trust{Roots: roots, Pins: ref.Pins}, nil
}

// missed tells that the last rung is worth a try.
func (r *relay) missed() {
	if r.k.cfg.OnMissing != nil && r.k.Missing(r.node) {
		r.k.cfg.OnMissing(r.node)
	}
}
