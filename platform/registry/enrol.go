package registry

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"maps"
	"net/http"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/pki"
	"sallyway/platform/store"
	"sallyway/platform/view"
	"sallyway/relay/reverse"
)

// Codes of refusals at enrolment besides those of package control.
const (
	CodeWrongKind  = "wrong_kind"  // the token is for another kind of node
	CodeWrongNode  = "wrong_node"  // the token is for another node
	CodeBadRequest = "bad_request" // the certificate request is not acceptable
	CodeKeyDenied  = "key_denied"  // the key is revoked
	CodeKeyInUse   = "key_in_use"  // the key belongs to another node
)

// requests are a node's checked certificate requests.
type requests struct {
	main *pki.Request
	site *pki.Request // nil when the node is no gateway or did not ask
	ssh  *pki.Request // nil when the node is neither gateway nor relay, or did not ask
}

// checkRequests checks what a node sent: proof of possession, its own identity, and one key for the X.509 leaves.
func checkRequests(n identity.Node, csr, siteCSR, sshCSR string) (*requests, error) {
	bad := func(err error) error {
		return refuse(http.StatusUnprocessableEntity, CodeBadRequest, "update the node's software; its key is made on the host and is P-256 or Ed25519", "certificate request: %v", err)
	}
	main, err := pki.ParseRequest([]byte(csr))
	if err != nil {
		return nil, bad(err)
	}
	if main.Node != n {
		return nil, bad(errors.New("it is for " + main.Node.String() + ", the node is " + n.String()))
	}
	out := &requests{main: main}
	if sshCSR != "" {
		if out.ssh, err = pki.ParseRequest([]byte(sshCSR)); err != nil {
			return nil, bad(err)
		}
		if out.ssh.Node != n || (n.Kind != identity.Gateway && n.Kind != identity.Relay) {
			return nil, bad(errors.New("the one for SSH is for " + out.ssh.Node.String() + ", which " + n.String() + " may not be"))
		}
		if _, ok := out.ssh.Public.(ed25519.PublicKey); !ok {
			return nil, bad(errors.New("the one for SSH is for a key that is not Ed25519"))
		}
	}
	if siteCSR == "" {
		return out, nil
	}
	if out.site, err = pki.ParseRequest([]byte(siteCSR)); err != nil {
		return nil, bad(err)
	}
	if want := (identity.Node{Org: n.Org, Kind: identity.Site, ID: n.ID}); n.Kind != identity.Gateway || out.site.Node != want {
		return nil, bad(errors.New("the second one is for " + out.site.Node.String() + ", which " + n.String() + " may not be"))
	}
	if out.site.Key != main.Key {
		return nil, bad(errors.New("the second one is for another key"))
	}
	return out, nil
}

// Enrol spends a token and makes a node a member of its organization. source is where the request came from, for the audit.
func (r *Registry) Enrol(ctx context.Context, source string, req control.EnrolRequest) (*control.EnrolResponse, error) {
	if err := req.Node.Validate(); err != nil {
		return nil, invalid("body.node", "", "node: %v", err)
	}
	ctx = WithActor(ctx, source)
	reqs, err := checkRequests(req.Node, req.CSR, req.SiteCSR, req.SSHCSR)
	if err != nil {
		return nil, r.enrolRefused(ctx, source, req.Node, err)
	}
	var out *control.EnrolResponse
	var refusal error
	err = r.update(ctx, func(c *change) error {
		out, refusal = nil, nil
		n, err := c.admit(ctx, req, reqs)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) {
				return err
			}
			refusal = e // audited below, in a transaction of its own: this one has changed nothing
			return nil
		}
		out, err = c.enrolled(ctx, n, req.Version, reqs, nil)
		return err
	})
	switch {
	case err != nil:
		return nil, err
	case refusal != nil:
		return nil, r.enrolRefused(ctx, source, req.Node, refusal)
	}
	r.Log.Info("node enrolled", "node", out.Node.String(), "name", out.Name, "key", reqs.main.Key.String(), "source", source)
	return out, nil
}

// admit decides whether a token may be spent, and spends it.
func (c *change) admit(ctx context.Context, req control.EnrolRequest, reqs *requests) (*store.Node, error) {
	again := "where you are admin, make a fresh token: sallyway --org " + req.Node.Org + " " + string(req.Node.Kind) + " token NAME"
	hash := sha256.Sum256(req.Secret)
	t, err := c.EnrolmentToken(ctx, hash)
	if errors.Is(err, store.ErrNotFound) {
		return nil, refuse(http.StatusForbidden, control.CodeTokenUnknown, again, "the enrolment token is not known: it was never issued here, or a newer one replaced it")
	}
	if err != nil {
		return nil, err
	}
	switch {
	case t.Kind != req.Node.Kind:
		return nil, refuse(http.StatusForbidden, CodeWrongKind, "use a token that was made for a "+string(req.Node.Kind), "the enrolment token is for a %s, this is a %s", t.Kind, req.Node.Kind)
	case t.Node != req.Node.ID || t.Org != req.Node.Org:
		return nil, refuse(http.StatusForbidden, CodeWrongNode, again, "the enrolment token is for another node than %v", req.Node)
	}
	n, err := c.Node(ctx, t.Node)
	if err != nil {
		return nil, err
	}
	if err := c.mayEnrol(ctx, n, reqs, again); err != nil {
		return nil, err
	}
	// The one statement that decides: all before only worded the refusal.
	if _, err := c.SpendEnrolmentToken(ctx, hash, req.Node, c.now); !errors.Is(err, store.ErrNotFound) {
		return n, err
	}
	if !t.Used.IsZero() {
		return nil, refuse(http.StatusForbidden, control.CodeTokenUsed, again, "the enrolment token was used already, at %s", t.Used.Format(time.RFC3339))
	}
	return nil, refuse(http.StatusForbidden, control.CodeTokenExpired, again, "the enrolment token expired at %s", t.Expires.Format(time.RFC3339))
}

// mayEnrol says whether a node that showed who it is may become a member with the key of reqs. again is what to do when it was revoked.
func (c *change) mayEnrol(ctx context.Context, n *store.Node, reqs *requests, again string) error {
	switch {
	case !n.Deleted.IsZero():
		return refuse(http.StatusForbidden, control.CodeNodeUnknown, "create it anew", "%s %q was deleted", n.Kind, n.Name)
	case n.Status == store.Disabled:
		return refuse(http.StatusForbidden, control.CodeNodeDisabled, "sallyway --org "+n.Org+" "+string(n.Kind)+" enable "+n.Name, "%s %q is disabled", n.Kind, n.Name)
	case n.Status == store.Revoked:
		return refuse(http.StatusForbidden, control.CodeNodeRevoked, again, "%s %q was revoked", n.Kind, n.Name)
	}
	k, err := c.Key(ctx, reqs.main.Key)
	switch {
	case errors.Is(err, store.ErrNotFound):
	case err != nil:
		return err
	case k.Node != n.ID:
		return refuse(http.StatusForbidden, CodeKeyInUse, "give each node a state folder of its own", "this key belongs to another node already")
	case k.Denied:
		return refuse(http.StatusForbidden, CodeKeyDenied, "remove the key from the node's state folder, so that it makes a new one", "this key of %s %q was revoked", n.Kind, n.Name)
	}
	if n.Enrolled.IsZero() {
		return c.room(ctx, n.Org, n.Kind, true)
	}
	return nil
}

// enrolled makes n a member with the key of reqs. detail is more for the audit.
func (c *change) enrolled(ctx context.Context, n *store.Node, version string, reqs *requests, detail map[string]any) (*control.EnrolResponse, error) {
	n.Enrolment++
	n.Enrolled, n.Version = c.now, clip(version, 64)
	if err := c.UpdateNode(ctx, n); err != nil {
		return nil, err
	}
	// A new enrolment takes the place of the old one: keys from before are denied.
	old, err := c.Keys(ctx, n.ID)
	if err != nil {
		return nil, err
	}
	revoked := false
	for _, k := range old {
		revoked = revoked || (k.Denied && k.NotAfter.After(c.now))
		if k.Hash != reqs.main.Key {
			k.Denied = true
			if err := c.PutKey(ctx, k); err != nil {
				return nil, err
			}
		}
	}
	if revoked {
		if err := c.lostKey(ctx, n.Org); err != nil { // see RevokeNode
			return nil, err
		}
	}
	certs, err := c.issue(ctx, n, reqs)
	if err != nil {
		return nil, err
	}
	entry := map[string]any{"name": n.Name, "key": reqs.main.Key.String(), "version": n.Version}
	maps.Copy(entry, detail)
	if err := c.audit(ctx, n.Org, "node.enrol", n.Identity().String(), audit.OK, entry); err != nil {
		return nil, err
	}
	if err := c.bump(ctx, n.Org); err != nil {
		return nil, err
	}
	trust, err := view.LoadTrust(ctx, c.Tx, n.Org, c.now)
	if err != nil {
		return nil, err
	}
	return &control.EnrolResponse{Node: n.Identity(), Name: n.Name, Certificates: *certs, Trust: trust}, nil
}

// issue makes the node's leaves and remembers the key.
func (c *change) issue(ctx context.Context, n *store.Node, reqs *requests) (*control.Certificates, error) {
	leaf := func(r *pki.Request) (*x509.Certificate, string, error) {
		ca, err := c.r.Authority(ctx, c.Tx, n.Org, string(r.Node.Kind))
		if err != nil {
			return nil, "", err
		}
		cert, err := ca.Leaf(r.Node, r.Public, c.now, c.r.life())
		if err != nil {
			return nil, "", err
		}
		err = c.audit(ctx, n.Org, "certificate.issue", r.Node.String(), audit.OK, map[string]any{
			"key": r.Key.String(), "serial": cert.SerialNumber.Text(16), "not_after": cert.NotAfter.UTC().Format(time.RFC3339),
		})
		return cert, string(identity.EncodeCertificates(cert, ca.Certificate)), err
	}
	cert, chain, err := leaf(reqs.main)
	if err != nil {
		return nil, err
	}
	out := &control.Certificates{Leaf: chain}
	if reqs.site != nil {
		if _, out.Site, err = leaf(reqs.site); err != nil {
			return nil, err
		}
	}
	if reqs.ssh != nil {
		if out.SSH, err = c.issueSSH(ctx, n, reqs); err != nil {
			return nil, err
		}
	}
	public, err := x509.MarshalPKIXPublicKey(reqs.main.Public)
	if err != nil {
		return nil, err
	}
	return out, c.PutKey(ctx, &store.Key{
		Hash: reqs.main.Key, Node: n.ID, Public: public, Enrolment: n.Enrolment, Created: c.now, NotAfter: cert.NotAfter.UTC(),
	})
}

// issueSSH makes the SSH certificate of a gateway or relay, and tells nodes of a relay's last rung from now on.
func (c *change) issueSSH(ctx context.Context, n *store.Node, reqs *requests) (string, error) {
	ca, err := c.r.sshAuthority(ctx, c.Tx, n.Org)
	if err != nil {
		return "", err
	}
	cert, err := ca.Issue(n.Identity(), reqs.ssh.Public, reqs.main.Key, c.now, c.r.life())
	if err != nil {
		return "", err
	}
	err = c.audit(ctx, n.Org, "certificate.issue", n.Identity().String(), audit.OK, map[string]any{
		"ssh_key": reqs.ssh.Key.String(), "key": reqs.main.Key.String(), "not_after": c.now.Add(c.r.life()).UTC().Format(time.RFC3339),
	})
	if err != nil || n.Kind != identity.Relay {
		return cert, err
	}
	rungs, err := c.RelayRungs(ctx, n.Org)
	if err == nil && rungs[n.ID] == nil {
		err = c.PutRelayRungs(ctx, &store.RelayRungs{Relay: n.ID, SSHPort: reverse.SSHPort, TLSPort: reverse.TLSPort})
	}
	return cert, err
}

// enrolRefused audits a refusal and returns it. Other errors pass unchanged.
func (r *Registry) enrolRefused(ctx context.Context, source string, n identity.Node, err error) error {
	var e *Error
	if !errors.As(err, &e) {
		return err
	}
	r.Log.Warn("enrolment refused", "node", n.String(), "code", e.Problem.Code, "reason", e.Detail, "source", source)
	return errors.Join(err, r.refused(ctx, n.Org, "node.enrol", n.String(), e.Problem.Code, source))
}

// Renew issues fresh leaves for a node that has shown who it is, for the same key or a new one.
func (r *Registry) Renew(ctx context.Context, who *Session, req control.RenewRequest) (*control.RenewResponse, error) {
	reqs, err := checkRequests(who.Node, req.CSR, req.SiteCSR, req.SSHCSR)
	if err != nil {
		return nil, err
	}
	ctx = WithActor(ctx, "node:"+who.Node.String())
	var out *control.RenewResponse
	err = r.update(ctx, func(c *change) error {
		n, err := c.who(ctx, who)
		if err != nil {
			return err
		}
		k, err := c.Key(ctx, reqs.main.Key)
		switch {
		case errors.Is(err, store.ErrNotFound):
		case err != nil:
			return err
		case k.Node != n.ID:
			return refuse(http.StatusForbidden, CodeKeyInUse, "give each node a state folder of its own", "this key belongs to another node already")
		case k.Denied || k.Enrolment != n.Enrolment:
			return refuse(http.StatusForbidden, CodeKeyDenied, "enrol again with a new token", "this key of %s %q was revoked or replaced", n.Kind, n.Name)
		}
		certs, err := c.issue(ctx, n, reqs)
		if err != nil {
			return err
		}
		out = &control.RenewResponse{Certificates: *certs}
		if err := c.audit(ctx, n.Org, "node.renew", n.Identity().String(), audit.OK, map[string]any{"key": reqs.main.Key.String()}); err != nil {
			return err
		}
		return c.bump(ctx, n.Org)
	})
	return out, err
}
