package registry

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/awsauth"
	"sallyway/platform/store"
)

// Enrolment by AWS. A node asks for a nonce (a signed text: nothing is kept for those who only ask), signs a request for
// sts:GetCallerIdentity that names nonce, platform, node and key, and STS tells whose it is. Nothing in a refusal tells whether a node of a
// name exists, except to an identity that may enrol it.

const (
	noncePrefix = "swa1."
	maxNonce    = 1 << 10 // bytes
)

// CodeNotAWS refuses the wrong way to enrol.
const CodeNotAWS = "wrong_authentication"

// nonce is what a nonce says, in JSON under a MAC.
type nonce struct {
	Node    identity.Node `json:"n"`
	Expires int64         `json:"e"` // Unix seconds
	Random  string        `json:"r"`
}

func (a *accessKey) nonceMAC(body string) []byte {
	m := hmac.New(sha256.New, a.secret)
	m.Write([]byte(noncePrefix + body))
	return m.Sum(nil)
}

func (a *accessKey) issueNonce(n nonce) string {
	b, err := json.Marshal(n)
	if err != nil {
		panic(fmt.Sprintf("encode nonce: %v", err)) // strings and numbers always encode
	}
	body := base64.RawURLEncoding.EncodeToString(b)
	return noncePrefix + body + "." + base64.RawURLEncoding.EncodeToString(a.nonceMAC(body))
}

// parseNonce checks a nonce's MAC, not its time.
func (a *accessKey) parseNonce(s string) (*nonce, bool) {
	rest, ours := strings.CutPrefix(s, noncePrefix)
	body, sig, two := strings.Cut(rest, ".")
	if len(s) > maxNonce || !ours || !two {
		return nil, false
	}
	got, err := base64.RawURLEncoding.DecodeString(sig)
	if err != nil || !hmac.Equal(got, a.nonceMAC(body)) {
		return nil, false
	}
	b, err := base64.RawURLEncoding.DecodeString(body)
	n := new(nonce)
	if err != nil || json.Unmarshal(b, n) != nil {
		return nil, false
	}
	return n, true
}

func (r *Registry) needAWS() error {
	if r.AWS == nil {
		return refuse(http.StatusForbidden, CodeNotAWS, "start platformd with --aws-region REGION, or enrol by token", "this platform does not enrol by AWS")
	}
	return nil
}

// AWSChallenge answers what a node has to sign.
func (r *Registry) AWSChallenge(ctx context.Context, req control.AWSChallengeRequest) (*control.AWSChallenge, error) {
	if err := r.needAWS(); err != nil {
		return nil, err
	}
	if (req.Kind != identity.Relay && req.Kind != identity.Gateway) || !identity.ValidLabel(req.Name) || (req.Org != identity.SharedOrg && !identity.ValidLabel(req.Org)) {
		return nil, invalid("body", "name organization, kind and name of a relay or gateway", "no %.20q %.80q of %.80q can enrol by AWS", req.Kind, req.Name, req.Org)
	}
	n := identity.Node{Org: req.Org, Kind: req.Kind}
	err := r.Store.View(ctx, func(tx store.Tx) error {
		found, err := tx.FindNode(ctx, req.Org, req.Kind, req.Name)
		switch {
		case errors.Is(err, store.ErrNotFound):
			// One that does not exist looks like any other, and the same each time.
			h := r.access.nonceMAC("nobody " + req.Org + "/" + string(req.Kind) + "/" + req.Name)
			n.ID = string(req.Kind[0]) + "-" + strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(h))[:12]
			return nil
		case err != nil:
			return err
		}
		n.ID = found.ID
		return nil
	})
	if err != nil {
		return nil, err
	}
	random := make([]byte, 16)
	if _, err := rand.Read(random); err != nil {
		return nil, err
	}
	expires := r.Now().Add(control.AWSNonceLife).Truncate(time.Second)
	return &control.AWSChallenge{
		Nonce: r.access.issueNonce(nonce{Node: n, Expires: expires.Unix(), Random: base64.RawURLEncoding.EncodeToString(random)}),
		Node:  n, Endpoint: r.AWS.Endpoint(), Region: r.AWS.Region(), Expires: expires.UTC(),
	}, nil
}

// EnrolByAWS makes a node a member of its organization by the AWS identity of its host. It may be repeated: what enrolled before is replaced,
// unless the key is the same.
func (r *Registry) EnrolByAWS(ctx context.Context, source string, req control.AWSEnrolRequest) (*control.EnrolResponse, error) {
	if err := req.Node.Validate(); err != nil {
		return nil, invalid("body.node", "", "node: %v", err)
	}
	ctx = WithActor(ctx, source)
	reqs, err := checkRequests(req.Node, req.CSR, req.SiteCSR, req.SSHCSR)
	if err != nil {
		return nil, r.enrolRefused(ctx, source, req.Node, err)
	}
	id, err := r.awsIdentity(ctx, req.Node, reqs.main.Key, req.Signed)
	if err != nil {
		return nil, r.enrolRefused(ctx, source, req.Node, err)
	}
	var out *control.EnrolResponse
	var refusal error
	err = r.update(ctx, func(c *change) error {
		out, refusal = nil, nil
		n, err := c.awsNode(ctx, req.Node, id)
		if err == nil {
			err = c.mayEnrol(ctx, n, reqs, "where you are admin, let it in again: sallyway --org "+n.Org+" "+string(n.Kind)+" token "+n.Name)
		}
		if err != nil {
			var e *Error
			if !errors.As(err, &e) {
				return err
			}
			refusal = e
			return nil
		}
		out, err = c.enrolled(ctx, n, req.Version, reqs, map[string]any{"aws": id.ARN})
		return err
	})
	switch {
	case err != nil:
		return nil, err
	case refusal != nil:
		return nil, r.enrolRefused(ctx, source, req.Node, refusal)
	}
	r.Log.Info("node enrolled", "node", out.Node.String(), "name", out.Name, "key", reqs.main.Key.String(), "source", source, "aws", id.ARN)
	return out, nil
}

// CheckAWS looks again, at a start of an enrolled node, whether the AWS identity of its host may be this node.
func (r *Registry) CheckAWS(ctx context.Context, source string, who *Session, req control.AWSCheckRequest) error {
	ctx = WithActor(ctx, source)
	refused := func(err error) error {
		var e *Error
		if !errors.As(err, &e) {
			return err
		}
		r.Log.Warn("node refused at its start", "node", who.Node.String(), "code", e.Problem.Code, "reason", e.Detail, "source", source)
		return errors.Join(err, r.refused(ctx, who.Node.Org, "node.check", who.Node.String(), e.Problem.Code, source))
	}
	id, err := r.awsIdentity(ctx, who.Node, who.Key, req.Signed)
	if err != nil {
		return refused(err)
	}
	var refusal error
	err = r.update(ctx, func(c *change) error {
		refusal = nil
		_, err := c.awsNode(ctx, who.Node, id)
		var e *Error
		if errors.As(err, &e) {
			refusal = e
			return nil
		}
		if err != nil {
			return err
		}
		return c.audit(ctx, who.Node.Org, "node.check", who.Node.String(), audit.OK, map[string]any{"aws": id.ARN})
	})
	if err == nil && refusal != nil {
		return refused(refusal)
	}
	return err
}

// awsIdentity spends the nonce and asks STS: a nonce is good for one question, whatever becomes of it.
func (r *Registry) awsIdentity(ctx context.Context, n identity.Node, key identity.KeyHash, signed control.AWSSigned) (*awsauth.Identity, error) {
	if err := r.needAWS(); err != nil {
		return nil, err
	}
	const again = "start the node again: it asks for a new one"
	text := signed.Headers[control.AWSNonceHeader]
	said, ours := r.access.parseNonce(text)
	switch {
	case !ours:
		return nil, refuse(http.StatusForbidden, control.CodeAWSNonce, again, "the nonce is not one of this platform")
	case said.Node != n:
		return nil, refuse(http.StatusForbidden, control.CodeAWSNonce, again, "the nonce is for another node than %v", n)
	case r.Now().Unix() >= said.Expires:
		return nil, refuse(http.StatusForbidden, control.CodeAWSNonce, again, "the nonce expired at %s", time.Unix(said.Expires, 0).UTC().Format(time.RFC3339))
	}
	platform := signed.Headers[control.AWSPlatformHeader]
	if u, err := CanonicalURL(platform); err != nil || !slices.Contains(r.Audiences, u) {
		return nil, refuse(http.StatusForbidden, control.CodeWrongAudience, "see --platform on the node, and --advertise-url here", "the request is signed for the platform %.80q, which is not this one", platform)
	}
	hash := sha256.Sum256([]byte(text))
	err := r.Store.Update(ctx, func(tx store.Tx) error { return tx.InsertAssertion(ctx, hash, time.Unix(said.Expires, 0).UTC()) })
	if errors.Is(err, store.ErrExists) {
		return nil, refuse(http.StatusForbidden, control.CodeAWSNonce, again, "the nonce was used before")
	}
	if err != nil {
		return nil, err
	}
	id, err := r.AWS.Verify(ctx, signed, map[string]string{
		control.AWSNonceHeader: text, control.AWSPlatformHeader: platform, control.AWSNodeHeader: n.String(), control.AWSKeyHeader: key.String(),
	})
	var bad *awsauth.RefusedError
	switch {
	case errors.As(err, &bad):
		return nil, refuse(http.StatusForbidden, control.CodeAWSBad, bad.Remedy, "%s", bad.Reason)
	case errors.Is(err, awsauth.ErrUnavailable):
		r.Log.Warn("an AWS identity can not be checked", "node", n.String(), "error", err)
		return nil, refuse(http.StatusServiceUnavailable, control.CodeAWSUnavailable, "let the platform reach "+r.AWS.Endpoint(), "%v", err)
	}
	return id, err
}

// awsNode finds a node that an identity may be. Who may not is not told whether there is one.
func (c *change) awsNode(ctx context.Context, who identity.Node, id *awsauth.Identity) (*store.Node, error) {
	no := func(why string) error {
		c.r.Log.Warn("AWS identity refused", "node", who.String(), "aws", id.ARN, "reason", why)
		return refuse(http.StatusForbidden, control.CodeAWSRefused,
			"where you are admin, see who may: sallyway --org "+who.Org+" "+string(who.Kind)+" show NAME (update NAME --auth aws --aws-principals … changes it)",
			"%s of account %s may not be this %s of organization %s, or there is no such %s that enrols by AWS", id.Principal(), id.Account, who.Kind, who.Org, who.Kind)
	}
	n, err := c.Node(ctx, who.ID)
	if errors.Is(err, store.ErrNotFound) || (err == nil && (n.Identity() != who || !n.Deleted.IsZero())) {
		return nil, no("there is no such node")
	}
	if err != nil {
		return nil, err
	}
	rule, err := c.NodeAWS(ctx, n.ID)
	if errors.Is(err, store.ErrNotFound) {
		return nil, no("it enrols by token")
	}
	if err != nil {
		return nil, err
	}
	if err := awsauth.Allow(&control.AWSRule{Accounts: rule.Accounts, Principals: rule.Principals}, id); err != nil {
		return nil, no(err.Error())
	}
	return n, nil
}

// authentication is how a node enrols.
func authentication(ctx context.Context, tx store.Tx, n *store.Node) (string, *control.AWSRule, error) {
	if n.Kind == identity.Client {
		return control.AuthToken, nil, nil
	}
	rule, err := tx.NodeAWS(ctx, n.ID)
	if errors.Is(err, store.ErrNotFound) {
		return control.AuthToken, nil, nil
	}
	if err != nil {
		return "", nil, err
	}
	return control.AuthAWS, &control.AWSRule{Accounts: rule.Accounts, Principals: rule.Principals}, nil
}

// checkAuthentication refuses what makes no sense.
func (r *Registry) checkAuthentication(kind identity.Kind, method string, rule *control.AWSRule) error {
	switch {
	case method == control.AuthToken && rule == nil:
		return nil
	case method == control.AuthToken:
		return invalid("body.aws", "leave aws out, or set authentication to aws", "a %s that enrols by token has no AWS identities", kind)
	case method != control.AuthAWS:
		return invalid("body.authentication", "token or aws", "authentication %.20q is not known", method)
	case kind != identity.Relay && kind != identity.Gateway:
		return invalid("body.authentication", "use a token", "a %s can not enrol by AWS", kind)
	}
	if err := r.needAWS(); err != nil {
		return err
	}
	if err := awsauth.CheckRule(rule); err != nil {
		return invalid("body.aws", "accounts of 12 digits, principals such as arn:aws:iam::123456789012:role/gateway-*", "%v", err)
	}
	return nil
}

// setAWS has a node enrol by AWS: its unused tokens go.
func (c *change) setAWS(ctx context.Context, n *store.Node, rule *control.AWSRule, detail map[string]any) error {
	detail["authentication"], detail["aws_accounts"], detail["aws_principals"] = control.AuthAWS, rule.Accounts, rule.Principals
	if err := c.DropEnrolmentTokens(ctx, n.ID); err != nil {
		return err
	}
	return c.PutNodeAWS(ctx, &store.NodeAWS{Node: n.ID, Accounts: rule.Accounts, Principals: rule.Principals})
}

// updateAuthentication changes how a node enrols from now on.
func (c *change) updateAuthentication(ctx context.Context, n *store.Node, req control.UpdateNode, detail map[string]any) error {
	if req.Authentication == nil && req.AWS == nil {
		return nil
	}
	method := ""
	if req.Authentication != nil {
		method = *req.Authentication
	} else {
		var err error
		if method, _, err = authentication(ctx, c.Tx, n); err != nil {
			return err
		}
	}
	rule := req.AWS
	if method == control.AuthAWS && rule == nil {
		var err error
		if _, rule, err = authentication(ctx, c.Tx, n); err != nil {
			return err
		}
	}
	if err := c.r.checkAuthentication(n.Kind, method, rule); err != nil {
		return err
	}
	if method == control.AuthAWS {
		return c.setAWS(ctx, n, rule, detail)
	}
	detail["authentication"] = method
	return c.DropNodeAWS(ctx, n.ID)
}

// awsCommands are the deploy commands of a node that enrols by AWS, nil for another. They hold no secret.
func (c *change) awsCommands(ctx context.Context, o *store.Org, n *store.Node) (*control.CreatedNode, error) {
	method, _, err := authentication(ctx, c.Tx, n)
	if err != nil || method != control.AuthAWS {
		return nil, err
	}
	rec, err := c.r.record(ctx, c.Tx, o, n)
	if err != nil {
		return nil, err
	}
	words := " --auth aws --platform " + c.r.URL + " --org " + n.Org + " --name " + n.Name
	if c.r.Pin != "" {
		words += " --ca-pin " + c.r.Pin
	}
	out := &control.CreatedNode{NodeRecord: *rec}
	out.Command, out.Foreground = "sudo relayd install --"+words, "relayd start"+words
	if n.Kind == identity.Gateway {
		out.Command, out.Foreground = "sudo gatewayd install --"+words, "sudo gatewayd up"+words
	}
	return out, nil
}
