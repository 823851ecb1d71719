package agent

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/identity"
)

// keptTokens is how many fingerprints of spent tokens a node remembers, so that a start line with an older token stays harmless.
const keptTokens = 16

// commands are the start commands per kind, for errors.
var commands = map[identity.Kind]string{
	identity.Relay: "relayd start", identity.Gateway: "gatewayd up", identity.Client: "sallyway connect",
}

// Open loads the node's state and enrols the node where the token asks for it: none yet, or a newer token of the same node. A
// token spent here before changes nothing. Open talks to the platform only to enrol, and starts nothing.
//
// Errors: ErrNotEnrolled, *EnrolmentRefusedError (a token that can not be used here), *link.Error (the platform is not reached).
func Open(ctx context.Context, cfg Config) (*Agent, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.EnrolTimeout == 0 {
		cfg.EnrolTimeout = DefaultEnrolTimeout
	}
	if commands[cfg.Kind] == "" {
		return nil, fmt.Errorf("no node of kind %q enrols", cfg.Kind)
	}
	a := &Agent{
		cfg: cfg, log: cfg.Logger,
		beat: make(chan struct{}, 1), renew: make(chan struct{}, 1), changed: make(chan struct{}, 1), configured: make(chan struct{}),
	}
	a.status.Since = cfg.Now()
	enrolled, err := load(cfg.StateDir, nodeFile, &a.state)
	if err != nil {
		return nil, err
	}
	if enrolled && a.state.Node.Kind != cfg.Kind {
		return nil, fmt.Errorf("%s holds the state of a %s (%v): give this %s a folder of its own with --state DIR", cfg.StateDir, a.state.Node.Kind, a.state.Node, cfg.Kind)
	}
	if cfg.AWS != nil {
		if err := a.useAWS(ctx, enrolled); err != nil {
			return nil, err
		}
		enrolled = true
	}
	if cfg.Token == "" && !enrolled {
		return nil, ErrNotEnrolled
	}
	if cfg.Token != "" {
		if err := a.useToken(ctx, enrolled); err != nil {
			return nil, err
		}
	}
	if err := a.load(); err != nil {
		return nil, err
	}
	return a, nil
}

// load completes an agent from its state folder.
func (a *Agent) load() error {
	var err error
	if a.key, err = loadKey(a.cfg.StateDir, a.state.Key); err != nil {
		return err
	}
	if a.cert, a.site, err = ownCertificates(a.state.Certificates, a.key, a.state.Node); err != nil {
		return fmt.Errorf("certificates in %s: %w", filepath.Join(a.cfg.StateDir, nodeFile), err)
	}
	if a.link, err = a.newLink(a.state.URL, a.state.Pin); err != nil {
		return err
	}
	if _, err = load(a.cfg.StateDir, cacheFile, &a.cache); err != nil {
		return err
	}
	if a.cache.Config != nil {
		if a.cache.Config.Node != a.state.Node {
			return fmt.Errorf("%s is for %v, this is %v: remove it", filepath.Join(a.cfg.StateDir, cacheFile), a.cache.Config.Node, a.state.Node)
		}
		a.mu.Lock()
		if a.cache.Snapshot != "" {
			a.snapshotErr = a.takeSnapshotLocked(a.cache.Snapshot, a.cache.Config.Trust)
		}
		a.mu.Unlock()
		close(a.configured)
		poke(a.changed)
	}
	return nil
}

func (a *Agent) newLink(url, pin string) (*link.Link, error) {
	return link.New(link.Config{
		URL: url, Pin: pin, UserAgent: "sallyway-" + string(a.cfg.Kind) + "/" + a.cfg.Version,
		DialContext: a.cfg.DialContext, Now: a.cfg.Now,
	})
}

// useToken decides what a token means here and enrols when it is news.
func (a *Agent) useToken(ctx context.Context, enrolled bool) error {
	t, err := control.ParseToken(a.cfg.Token)
	if err != nil {
		return &EnrolmentRefusedError{Reason: err.Error(), Err: err}
	}
	if t.Node.Kind != a.cfg.Kind {
		return &EnrolmentRefusedError{
			Reason: fmt.Sprintf("this token is for the %s %s (%v), and this is a %s", t.Node.Kind, t.Name, t.Node, a.cfg.Kind),
			Remedy: fmt.Sprintf("this token is for a %s: run %s", t.Node.Kind, commands[t.Node.Kind]),
		}
	}
	fp := fingerprint(t)
	switch {
	case enrolled && t.Node != a.state.Node:
		return &EnrolmentRefusedError{
			Reason: fmt.Sprintf("the token is for %s (%v), and %s belongs to %s (%v)", t.Name, t.Node, a.cfg.StateDir, a.state.Name, a.state.Node),
			Remedy: fmt.Sprintf("start without this token to run %s, use another folder with --state DIR, or remove %s to become %s", a.state.Name, a.cfg.StateDir, t.Name),
		}
	case enrolled && (fp == a.state.Token || slices.Contains(a.state.OldTokens, fp)):
		a.log.Info("already enrolled with this token", "node", a.state.Node, "name", a.state.Name)
		return nil
	}
	err = a.enrol(ctx, t)
	var unreachable *link.Error
	if enrolled && errors.As(err, &unreachable) {
		a.log.Warn("can not use the newer token now and go on as enrolled before; the next start tries it again",
			"node", a.state.Node, "error", err, "remedy", unreachable.Remedy)
		return nil
	}
	return err
}

// enrol spends the token. A new key is made for every enrolment; the old one stays in use until the platform has said yes.
func (a *Agent) enrol(ctx context.Context, t control.Token) error {
	dir := a.cfg.StateDir
	var begun enrollingState
	if _, err := load(dir, enrollingFile, &begun); err != nil {
		return err
	}
	fp := fingerprint(t)
	resumed := begun.Token == fp
	if !resumed {
		for _, old := range []string{enrollingKeyFile, enrollingSSHKeyFile} {
			if err := remove(dir, old); err != nil {
				return err
			}
		}
		if err := save(dir, enrollingFile, enrollingState{Token: fp, Node: t.Node, URL: t.URL}); err != nil {
			return err
		}
	}
	key, err := identity.LoadOrCreateKey(filepath.Join(dir, enrollingKeyFile))
	if err != nil {
		return err
	}
	l, err := a.newLink(t.URL, t.Pin)
	if err != nil {
		return &EnrolmentRefusedError{Reason: err.Error(), Err: err}
	}
	defer l.Close()
	if l.Plain() {
		a.log.Warn("the platform's URL is plain HTTP: whoever listens on the way can use the token", "platform", t.URL)
	}
	resp, cached, err := a.spend(ctx, l, t, key, resumed)
	if err != nil {
		return err
	}
	if err := l.ClockError(); err != nil {
		a.log.Warn("the clocks differ: peers will refuse certificates", "error", err, "remedy", link.Remedy(err))
	}
	return a.join(t, key, resp, cached)
}

// spend sends the enrolment until it is answered or EnrolTimeout is over. uncertain says that the token may have been spent by this
// key before: then a refusal is held against what the platform knows of the key.
func (a *Agent) spend(ctx context.Context, l *link.Link, t control.Token, key crypto.Signer, uncertain bool) (*control.EnrolResponse, *control.Config, error) {
	req := control.EnrolRequest{Secret: t.Secret, Node: t.Node, Version: a.cfg.Version}
	var err error
	if req.CSR, req.SiteCSR, err = requests(key, t.Node); err != nil {
		return nil, nil, err
	}
	if req.SSHCSR, err = a.sshRequest(t.Node, enrollingSSHKeyFile); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, a.cfg.EnrolTimeout, &link.Error{
		Kind: link.Timeout, Reason: fmt.Sprintf("the platform at %s did not answer within %s", t.URL, a.cfg.EnrolTimeout),
		Remedy: "check that a firewall lets this host connect to it (TCP)",
	})
	defer cancel()
	var last error
	for b := (backoff{}); ; {
		resp := new(control.EnrolResponse)
		err := l.Do(ctx, link.Request{Method: "POST", Path: "/api/v1/enroll", JSON: req}, resp)
		if err == nil {
			return resp, nil, nil
		}
		var p *link.Problem
		var e *link.Error
		switch {
		case errors.As(err, &p) && !p.Temporary():
			if uncertain {
				if resp, cfg, rerr := a.recover(ctx, l, t, key); rerr == nil {
					a.log.Info("this token was spent by this host before: took up the enrolment that was interrupted", "node", t.Node)
					return resp, cfg, nil
				}
			}
			return nil, nil, refusal(t, p)
		case errors.As(err, &e) && (e.Kind == link.Pin || e.Kind == link.Clock || e.Kind == link.TLS || e.Kind == link.NotPlatform):
			return nil, nil, unreached(t, err) // trying again changes nothing
		case errors.As(err, &e) && (e.Kind == link.Timeout || e.Kind == link.Broken):
			uncertain = true
		}
		if ctx.Err() != nil {
			if last == nil {
				last = err
			}
			return nil, nil, unreached(t, last)
		}
		last = err
		a.log.Warn("the platform is not reached; trying again", "platform", t.URL, "error", err, "remedy", link.Remedy(err))
		_ = sleep(ctx, b.next()) // the next try says why it ended
	}
}

// unreached adds to an error of the way to the platform whom it kept from enrolling, and what to do.
func unreached(t control.Token, err error) error {
	if remedy := link.Remedy(err); remedy != "" {
		return fmt.Errorf("enrol %s %s: %w\n%s", t.Node.Kind, t.Name, err, remedy)
	}
	return fmt.Errorf("enrol %s %s: %w", t.Node.Kind, t.Name, err)
}

// refusal words the platform's no.
func refusal(t control.Token, p *link.Problem) error {
	e := &EnrolmentRefusedError{Reason: p.Error(), Remedy: link.Remedy(p), Err: p}
	if e.Remedy == "" {
		e.Remedy = fmt.Sprintf("where you are admin, make a fresh token: sallyway --org %s %s token %s", t.Node.Org, t.Node.Kind, t.Name)
	}
	return e
}

// recover takes up an enrolment whose answer was lost: the platform knows the key, so its assertion works.
func (a *Agent) recover(ctx context.Context, l *link.Link, t control.Token, key crypto.Signer) (*control.EnrolResponse, *control.Config, error) {
	var access accessToken
	bearer, err := access.get(ctx, l, key, t.Node, t.URL, a.cfg.Now)
	if err != nil {
		return nil, nil, err
	}
	certs, err := a.requestRenewal(ctx, l, bearer, key, t.Node, enrollingSSHKeyFile)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, link.DefaultTimeout)
	defer cancel()
	body, err := l.Stream(ctx, link.Request{Method: "GET", Path: "/api/v1/node/control", Bearer: bearer})
	if err != nil {
		return nil, nil, err
	}
	defer body.Close()
	for d := json.NewDecoder(body); ; {
		var ev control.Event
		if err := d.Decode(&ev); err != nil {
			return nil, nil, err
		}
		if ev.Type == control.EventConfig && ev.Config != nil {
			return &control.EnrolResponse{Node: t.Node, Name: t.Name, Certificates: certs, Trust: ev.Config.Trust}, ev.Config, nil
		}
	}
}

// join makes the answer of an enrolment the node's state. Its order lets a crash at any point leave a node that starts: node.json
// names the key by hash, and loadKey finds it under either name.
func (a *Agent) join(t control.Token, key crypto.Signer, resp *control.EnrolResponse, cached *control.Config) error {
	if resp.Node != t.Node {
		return fmt.Errorf("the platform enrolled %v with a token for %v", resp.Node, t.Node)
	}
	if _, _, err := ownCertificates(resp.Certificates, key, t.Node); err != nil {
		return fmt.Errorf("certificates from the platform: %w", err)
	}
	if _, err := resp.Trust.For(t.Node.Kind); err != nil {
		return fmt.Errorf("trust from the platform: %w", err)
	}
	if err := checkRootPin(t.Root, resp.Trust); err != nil {
		return &EnrolmentRefusedError{Reason: err.Error(), Remedy: "do not trust this platform: ask the owner of organization " + t.Node.Org + " which root it has (--root-pin)", Err: err}
	}
	old := a.state.OldTokens
	if a.state.Token != "" {
		old = append(old, a.state.Token)
	}
	old = old[max(0, len(old)-keptTokens):]
	dir := a.cfg.StateDir
	// Versions seen before were those of the enrolment before: whoever hands over a token is an admin of this host.
	if err := remove(dir, cacheFile); err != nil {
		return err
	}
	a.state = nodeState{
		Node: t.Node, Name: resp.Name, URL: t.URL, Pin: t.Pin, Token: fingerprint(t), OldTokens: old,
		Key: identity.HashKey(key.Public()), Enrolled: a.cfg.Now().UTC(), Certificates: resp.Certificates, Trust: resp.Trust,
	}
	// A crash between this and what follows leaves an SSH key without certificate, until the enrolment is taken up again.
	if err := rename(filepath.Join(dir, enrollingSSHKeyFile), filepath.Join(dir, sshKeyFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("write state: %w", err)
	}
	if err := save(dir, nodeFile, a.state); err != nil {
		return err
	}
	if err := rename(filepath.Join(dir, enrollingKeyFile), filepath.Join(dir, keyFile)); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	if err := remove(dir, enrollingFile); err != nil {
		return err
	}
	if cached != nil && cached.Node == t.Node {
		if err := save(dir, cacheFile, cacheState{Highest: cached.Version, Config: cached}); err != nil {
			return err
		}
	}
	a.log.Info("enrolled", "node", t.Node, "name", resp.Name, "platform", t.URL, "key", a.state.Key)
	return nil
}

// checkRootPin holds the roots that a platform shows at an enrolment to the one that the organization's owner named; pin is its key hash, ""
// is none. One that follows it is as good.
func checkRootPin(pin string, t control.Trust) error {
	if pin == "" {
		return nil
	}
	all, err := identity.DecodeCertificates([]byte(t.Roots + t.Lineage))
	if err != nil {
		return fmt.Errorf("roots of the platform: %w", err)
	}
	all = slices.DeleteFunc(all, func(c *x509.Certificate) bool {
		return !identity.IsRoot(c) || identity.CertificateKeyHash(c).String() != pin
	})
	err = errors.New("it is not among them")
	if len(all) > 0 {
		err = succeeds(string(identity.EncodeCertificates(all...)), t)
	}
	if err != nil {
		return fmt.Errorf("the platform shows roots that do not follow %.16s, which the organization's owner named: %w", pin, err)
	}
	return nil
}

// requests makes a node's certificate requests: one, and for gateways a second of kind site for the same key.
func requests(key crypto.Signer, n identity.Node) (csr, site string, err error) {
	b, err := identity.Request(key, n)
	if err != nil {
		return "", "", err
	}
	if n.Kind != identity.Gateway {
		return string(b), "", nil
	}
	n.Kind = identity.Site
	s, err := identity.Request(key, n)
	return string(b), string(s), err
}

// requestRenewal asks for fresh leaves and holds them to key and identity. sshFile holds the SSH key.
func (a *Agent) requestRenewal(ctx context.Context, l *link.Link, bearer string, key crypto.Signer, n identity.Node, sshFile string) (control.Certificates, error) {
	var req control.RenewRequest
	var err error
	if req.CSR, req.SiteCSR, err = requests(key, n); err != nil {
		return control.Certificates{}, err
	}
	if req.SSHCSR, err = a.sshRequest(n, sshFile); err != nil {
		return control.Certificates{}, err
	}
	var resp control.RenewResponse
	if err := l.Do(ctx, link.Request{Method: "POST", Path: "/api/v1/node/renew", Bearer: bearer, JSON: req}, &resp); err != nil {
		return control.Certificates{}, err
	}
	if _, _, err := ownCertificates(resp.Certificates, key, n); err != nil {
		return control.Certificates{}, fmt.Errorf("certificates from the platform: %w", err)
	}
	return resp.Certificates, nil
}
