package dialler

import (
	"context"
	"crypto"
	"crypto/tls"
	"slices"
	"sync"
	"time"

	"sallyway/internal/identity"
	"sallyway/platform/view"
)

// node is this process as a member of an organization.
type node struct {
	id  identity.Node
	key crypto.Signer

	issuing sync.Mutex // held while a certificate is issued; taken before Dialler.mu
	// Guarded by Dialler.mu:
	cert  *tls.Certificate // nil before the first
	until time.Time        // when it ends
	hash  identity.KeyHash
}

// unusable reports whether the node can not be used any more: its certificate has ended, or its key is denied. Dialler.mu is held.
func (n *node) unusable(v *view.View, now time.Time) bool {
	return n.cert != nil && (!now.Before(n.until) || slices.Contains(v.Trust.Denied, n.hash))
}

// member returns this process's node in an organization, with a certificate that is good for a while.
func (d *Dialler) member(ctx context.Context, v *view.View) (n *node, cert *tls.Certificate, until time.Time, err error) {
	org := v.Org.Name
	now := d.cfg.Now()
	d.mu.Lock()
	n = d.nodes[org]
	if n == nil || n.unusable(v, now) {
		key, err := identity.NewKey()
		if err != nil {
			d.mu.Unlock()
			return nil, nil, until, err
		}
		n = &node{id: identity.Node{Org: org, Kind: identity.Platform, ID: identity.NewID(identity.Platform)}, key: key, hash: identity.HashKey(key.Public())}
		d.nodes[org] = n
	}
	d.mu.Unlock()

	n.issuing.Lock()
	defer n.issuing.Unlock()
	d.mu.Lock()
	cert, until = n.cert, n.until
	d.mu.Unlock()
	if cert != nil && now.Before(until.Add(-renewBefore)) {
		return n, cert, until, nil
	}
	chain, err := d.cfg.Registry.IssuePlatform(ctx, n.id, n.key.Public())
	if err != nil {
		return nil, nil, until, err
	}
	if cert, err = identity.TLSCertificate(chain, n.key); err != nil {
		return nil, nil, until, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n.cert, n.until = cert, chain[0].NotAfter
	return n, cert, n.until, nil
}
