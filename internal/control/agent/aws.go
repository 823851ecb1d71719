package agent

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"sallyway/internal/awsidentity"
	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/daemon"
	"sallyway/internal/identity"
)

// AWS is the enrolment by the AWS identity of the host, in the place of a token.
type AWS struct {
	Platform string // its URL
	Pin      string // key hash of the CA of its certificate; empty: the system's roots vouch for it
	Org      string
	Name     string // of the node
	Root     string // key hash of the organization's root; empty: the platform names it
}

// AWSFlags are how a start command is told to enrol by AWS.
type AWSFlags struct {
	auth string
	aws  AWS
}

// Register adds the flags.
func (f *AWSFlags) Register(flags *pflag.FlagSet) {
	flags.StringVar(&f.auth, "auth", control.AuthToken, "how this host shows at enrolment who it is: token, or aws: its AWS identity (instance role, environment, shared profile), shown again at every start")
	flags.StringVar(&f.aws.Platform, "platform", "", "URL of the platform, with --auth aws")
	flags.StringVar(&f.aws.Pin, "ca-pin", "", "pin of the platform's certificate, with --auth aws")
	flags.StringVar(&f.aws.Org, "org", "default", "organization, with --auth aws")
	flags.StringVar(&f.aws.Name, "name", "", "the node's name, with --auth aws")
}

// Credential reads what a start command was given to enrol with: a token ("" for none), or the way by AWS.
func (p Program) Credential(cmd *cobra.Command, o *daemon.Options, f *AWSFlags) (string, *AWS, error) {
	switch f.auth {
	case control.AuthToken:
		if f.aws.Platform != "" || f.aws.Name != "" {
			return "", nil, daemon.Usagef("--platform and --name go with --auth aws: a token carries both")
		}
		token, err := p.Token(cmd, o)
		return token, nil, err
	case control.AuthAWS:
	default:
		return "", nil, daemon.Usagef("--auth %q: want token or aws", f.auth)
	}
	for _, name := range []string{"token", "token-file"} {
		if fl := cmd.Flags().Lookup(name); fl != nil && fl.Changed {
			return "", nil, daemon.Usagef("--auth aws takes no token: leave out --%s", name)
		}
	}
	if f.aws.Platform == "" || f.aws.Name == "" {
		return "", nil, daemon.Usagef("--auth aws needs --platform URL and --name NAME\n%s --auth aws --aws-accounts … prints the whole command", p.Create)
	}
	aws := f.aws
	aws.Root = o.Token.RootPin()
	return "", &aws, nil
}

// useAWS shows the host's AWS identity: to enrol, or at the start of a node that is enrolled. It goes on without where the platform is not
// reached and the node is enrolled: an outage of the platform stops nobody.
func (a *Agent) useAWS(ctx context.Context, enrolled bool) error {
	aws := a.cfg.AWS
	l, err := a.newLink(aws.Platform, aws.Pin)
	if err != nil {
		return &EnrolmentRefusedError{Reason: err.Error(), Err: err}
	}
	defer l.Close()
	if l.Plain() {
		return &EnrolmentRefusedError{Reason: "the platform's URL is plain HTTP", Remedy: "enrolment by AWS needs an https:// URL"}
	}
	creds, err := awsidentity.Find(ctx, awsidentity.Config{})
	if err != nil {
		return &EnrolmentRefusedError{Reason: err.Error(), Remedy: "give this host an AWS identity, or enrol it by token", Err: err}
	}
	a.log.Info("shows this host's AWS identity to the platform", "platform", aws.Platform, "name", aws.Name, "credentials", creds.Source)
	err = a.retryAWS(ctx, enrolled, func(ctx context.Context) error {
		c, err := a.challenge(ctx, l)
		if err != nil {
			return err
		}
		if !enrolled {
			return a.enrolAWS(ctx, l, creds, c)
		}
		if c.Node != a.state.Node {
			return &EnrolmentRefusedError{
				Reason: fmt.Sprintf("%s holds the state of %s (%v), and %s of organization %s at %s is another node", a.cfg.StateDir, a.state.Name, a.state.Node, aws.Name, aws.Org, aws.Platform),
				Remedy: fmt.Sprintf("start with the name of that node, use another folder with --state DIR, or remove %s to become %s", a.cfg.StateDir, aws.Name),
			}
		}
		return a.checkAWS(ctx, l, creds, c)
	})
	var unreachable *link.Error
	var p *link.Problem
	switch {
	case enrolled && (errors.As(err, &unreachable) || (errors.As(err, &p) && p.Temporary())):
		a.log.Warn("can not show this host's AWS identity now and go on as enrolled before; the next start tries again", "node", a.state.Node, "error", err, "remedy", link.Remedy(err))
		return nil
	case errors.As(err, &p) && !p.Temporary():
		e := &EnrolmentRefusedError{Reason: p.Error(), Remedy: link.Remedy(p), Err: p}
		return e
	case errors.As(err, &unreachable) || p != nil:
		return unreached(aws.as(identity.Node{Org: aws.Org, Kind: a.cfg.Kind}), err)
	}
	return err
}

// as is what of a token the rest of the enrolment needs: it has no secret.
func (w *AWS) as(n identity.Node) control.Token {
	return control.Token{URL: w.Platform, Pin: w.Pin, Node: n, Name: w.Name, Root: w.Root}
}

// startCheckTimeout is how long a node that is enrolled waits at its start for a platform that does not answer.
const startCheckTimeout = 10 * time.Second

// retryAWS tries until it is answered, or the time is over. Each try asks for a nonce of its own.
func (a *Agent) retryAWS(ctx context.Context, enrolled bool, try func(context.Context) error) error {
	life := a.cfg.EnrolTimeout
	if enrolled {
		life = min(life, startCheckTimeout)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, life, &link.Error{
		Kind: link.Timeout, Reason: fmt.Sprintf("the platform at %s did not answer within %s", a.cfg.AWS.Platform, life),
		Remedy: "check that a firewall lets this host connect to it (TCP)",
	})
	defer cancel()
	var last error
	for b := (backoff{}); ; {
		err := try(ctx)
		var p *link.Problem
		var e *link.Error
		again := (errors.As(err, &p) && p.Temporary()) ||
			(errors.As(err, &e) && e.Kind != link.Pin && e.Kind != link.Clock && e.Kind != link.TLS && e.Kind != link.NotPlatform)
		if !again && ctx.Err() == nil {
			return err
		}
		if ctx.Err() != nil {
			if last == nil || !again {
				last = err
			}
			return last
		}
		last = err
		a.log.Warn("the platform is not reached; trying again", "platform", a.cfg.AWS.Platform, "error", err, "remedy", link.Remedy(err))
		_ = sleep(ctx, b.next()) // the next try says why it ended
	}
}

func (a *Agent) challenge(ctx context.Context, l *link.Link) (*control.AWSChallenge, error) {
	aws := a.cfg.AWS
	c := new(control.AWSChallenge)
	err := l.Do(ctx, link.Request{Method: "POST", Path: "/api/v1/enroll/aws/challenge", JSON: control.AWSChallengeRequest{Org: aws.Org, Kind: a.cfg.Kind, Name: aws.Name}}, c)
	if err != nil {
		return nil, err
	}
	if c.Node.Org != aws.Org || c.Node.Kind != a.cfg.Kind {
		return nil, fmt.Errorf("the platform answered for %v, this is a %s of organization %s", c.Node, a.cfg.Kind, aws.Org)
	}
	return c, c.Node.Validate()
}

// sign signs for one platform, node and key: what another platform asked for is of no use to it here, nor the other way round.
func (a *Agent) sign(creds *awsidentity.Credentials, c *control.AWSChallenge, key crypto.Signer) (control.AWSSigned, error) {
	return creds.Sign(c.Endpoint, c.Region, map[string]string{
		control.AWSNonceHeader: c.Nonce, control.AWSPlatformHeader: a.cfg.AWS.Platform,
		control.AWSNodeHeader: c.Node.String(), control.AWSKeyHeader: identity.HashKey(key.Public()).String(),
	}, a.cfg.Now())
}

// enrolAWS enrols with a key that is kept until the platform has said yes: an answer that was lost is asked for again.
func (a *Agent) enrolAWS(ctx context.Context, l *link.Link, creds *awsidentity.Credentials, c *control.AWSChallenge) error {
	t := a.cfg.AWS.as(c.Node)
	dir := a.cfg.StateDir
	var begun enrollingState
	if _, err := load(dir, enrollingFile, &begun); err != nil {
		return err
	}
	if state := (enrollingState{Token: fingerprint(t), Node: t.Node, URL: t.URL}); begun != state {
		for _, old := range []string{enrollingKeyFile, enrollingSSHKeyFile} {
			if err := remove(dir, old); err != nil {
				return err
			}
		}
		if err := save(dir, enrollingFile, state); err != nil {
			return err
		}
	}
	key, err := identity.LoadOrCreateKey(filepath.Join(dir, enrollingKeyFile))
	if err != nil {
		return err
	}
	req := control.AWSEnrolRequest{Node: c.Node, Version: a.cfg.Version}
	if req.CSR, req.SiteCSR, err = requests(key, c.Node); err != nil {
		return err
	}
	if req.SSHCSR, err = a.sshRequest(c.Node, enrollingSSHKeyFile); err != nil {
		return err
	}
	if req.Signed, err = a.sign(creds, c, key); err != nil {
		return err
	}
	resp := new(control.EnrolResponse)
	if err := l.Do(ctx, link.Request{Method: "POST", Path: "/api/v1/enroll/aws", JSON: req}, resp); err != nil {
		return err
	}
	// Nobody handed a token over: a node that was enrolled follows the roots that it knows, and takes no others because the platform refused its key.
	if known := a.state.Trust.Roots; known != "" {
		if err := succeeds(known, resp.Trust); err != nil {
			return &EnrolmentRefusedError{
				Reason: fmt.Sprintf("the platform enrols %s anew under roots that do not follow those that it knows: %v", a.state.Name, err),
				Remedy: fmt.Sprintf("do not trust this platform before you know why; when it was installed anew, remove %s", a.cfg.StateDir), Err: err,
			}
		}
	}
	return a.join(t, key, resp, nil)
}

// checkAWS shows the identity again. A node whose key is denied, because it was let in again after a revocation, enrols anew.
func (a *Agent) checkAWS(ctx context.Context, l *link.Link, creds *awsidentity.Credentials, c *control.AWSChallenge) error {
	key, err := loadKey(a.cfg.StateDir, a.state.Key)
	if err != nil {
		return err
	}
	var access accessToken
	bearer, err := access.get(ctx, l, key, a.state.Node, a.cfg.AWS.Platform, a.cfg.Now)
	if p, ok := errors.AsType[*link.Problem](err); ok && p.Status == 401 && p.Code != control.CodeBadAssertion {
		a.log.Warn("the platform does not take this node's key any more: enrolling anew", "node", a.state.Node, "reason", p.Error())
		return a.enrolAWS(ctx, l, creds, c)
	}
	if err != nil {
		return err
	}
	signed, err := a.sign(creds, c, key)
	if err != nil {
		return err
	}
	if err := l.Do(ctx, link.Request{Method: "POST", Path: "/api/v1/node/aws", Bearer: bearer, JSON: control.AWSCheckRequest{Signed: signed}}, &struct{}{}); err != nil {
		return err
	}
	a.log.Info("the platform takes this host's AWS identity", "node", a.state.Node, "name", a.state.Name)
	return nil
}
