package people

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"time"

	"sallyway/internal/addrspace"
	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/people/oidc"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// Limits of what is asked of providers of single sign-on.
const (
	providerTimeout = 10 * time.Second
	discoveryLife   = 10 * time.Minute // a provider's documents are read again after this
)

const providerObject = "providers"

// providerSettings is what the database has of a provider as JSON.
type providerSettings struct {
	control.ProviderRules
	// Private says that the provider may have a private address: an administrator of the platform has set it up.
	Private bool `json:"private"`
}

// providerClient makes requests to providers. It follows no redirects: a provider's documents are where its issuer says. With private it
// dials any address, otherwise public ones only, looked at after the name was resolved.
func providerClient(private bool) *http.Client {
	d := &net.Dialer{Timeout: providerTimeout}
	if !private {
		d.Control = func(_, address string, _ syscall.RawConn) error {
			a, err := netip.ParseAddrPort(address)
			if err != nil || !addrspace.Public(a.Addr()) {
				return fmt.Errorf("%s is not a public address: a provider in a private network is set up by an administrator of the platform", address)
			}
			return nil
		}
	}
	return &http.Client{
		Timeout: providerTimeout,
		Transport: bounded{&http.Transport{
			DialContext: d.DialContext, TLSHandshakeTimeout: providerTimeout, MaxResponseHeaderBytes: 64 << 10, IdleConnTimeout: time.Minute, ForceAttemptHTTP2: true,
		}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// maxAnswer bounds what is read of a provider's answer in bytes.
const maxAnswer = 1 << 20

// bounded cuts answers off at maxAnswer.
type bounded struct{ next http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.next.RoundTrip(r)
	if err == nil {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, maxAnswer), resp.Body}
	}
	return resp, err
}

// providers are the providers that were asked for their documents lately.
type providers struct {
	mu    sync.Mutex
	known map[string]knownProvider // by id; guarded by mu
}

type knownProvider struct {
	p       *oidc.Provider
	as      string // what it was made from
	fetched time.Time
}

// redirectURI is of one provider alone, so that no provider's answer is taken for another's (RFC 9700 §4.4.2.1).
func (s *Service) redirectURI(id string) string { return s.reg.URL + CallbackPath + id }

// Paths of single sign-on; Routes serves them.
const (
	StartPath    = "/auth/oidc/start/"
	CallbackPath = "/auth/oidc/callback/"
)

func (s *Service) clientOf(set *providerSettings) *http.Client {
	if set.Private {
		return s.httpPrivate
	}
	return s.httpPublic
}

func settingsOf(v *store.Provider) (*providerSettings, error) {
	var set providerSettings
	return &set, json.Unmarshal(v.Settings, &set)
}

// discover returns a provider with its documents.
func (s *Service) discover(ctx context.Context, v *store.Provider, set *providerSettings) (*oidc.Provider, error) {
	key, err := s.reg.Seal.Open(registry.ProviderLabel(v.ID), v.Secret)
	if err != nil {
		return nil, err
	}
	as := string(hashText(v.Issuer, v.ClientID, string(key), s.reg.URL, strings.Join(set.Scopes, " "), fmt.Sprint(set.Private)))
	now := s.reg.Now()
	s.sso.mu.Lock()
	known, ok := s.sso.known[v.ID]
	s.sso.mu.Unlock()
	if ok && known.as == as && now.Sub(known.fetched) < discoveryLife {
		return known.p, nil
	}
	scopes := set.Scopes
	if len(scopes) == 0 {
		scopes = []string{"profile", "email"}
	}
	p, err := oidc.Discover(ctx, s.clientOf(set), oidc.Config{Issuer: v.Issuer, ClientID: v.ClientID, Secret: string(key), Redirect: s.redirectURI(v.ID), Scopes: scopes, Now: s.reg.Now})
	if err != nil {
		return nil, registry.Refuse(http.StatusBadGateway, CodeProvider, "see that the issuer is right, and that the platform reaches it", "single sign-on with %s does not work now: %v", v.Name, err)
	}
	s.sso.mu.Lock()
	defer s.sso.mu.Unlock()
	if s.sso.known == nil {
		s.sso.known = make(map[string]knownProvider)
	}
	s.sso.known[v.ID] = knownProvider{p: p, as: as, fetched: now}
	return p, nil
}

func hashText(parts ...string) []byte {
	h := hashOf(strings.Join(parts, "\x00"))
	return h[:]
}

func (s *Service) providerRecord(v *store.Provider) (*control.ProviderRecord, error) {
	set, err := settingsOf(v)
	if err != nil {
		return nil, err
	}
	return &control.ProviderRecord{
		ID: v.ID, Name: v.Name, Issuer: v.Issuer, ClientID: v.ClientID, Redirect: s.redirectURI(v.ID), Disabled: v.Disabled, Created: v.Created, ProviderRules: set.ProviderRules,
	}, nil
}

// checkRules refuses rules that make no sense, or hand out more than the caller may.
func checkRules(by *Principal, org string, r *control.ProviderRules) error {
	for i, m := range r.Mapping {
		if err := checkRole(m.Role); err != nil {
			return err
		}
		at := org
		if m.Org != "" {
			if org != Platform {
				return registry.Invalid("body.mapping", "leave org out", "a provider of an organization gives roles in that organization only")
			}
			at = m.Org
		}
		if m.Group == "" {
			return registry.Invalid("body.mapping", "name a group, or * for everybody of the provider", "rule %d names no group", i+1)
		}
		if err := mayAssign(by, at, m.Role); err != nil {
			return err
		}
	}
	if r.Create && len(r.Mapping) == 0 {
		return registry.Invalid("body.create", `say who becomes what, such as "mapping": [{"group": "*", "role": "member"}]`, "accounts can not be made without a mapping that gives them a role")
	}
	return nil
}

// checkIssuer refuses what is no issuer (OpenID Connect Discovery §4.1). Plain HTTP is for a provider on the platform's own host.
func checkIssuer(issuer string) error {
	u, err := url.Parse(issuer)
	local := err == nil && (u.Hostname() == "localhost" || u.Hostname() == "127.0.0.1" || u.Hostname() == "::1")
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Scheme != "https" && (u.Scheme != "http" || !local) {
		return registry.Invalid("body.issuer", "such as https://id.example.com/realms/staff, as the provider's discovery document has it", "%.100q is no issuer", issuer)
	}
	return nil
}

// Providers lists those of org, or of the platform.
func (s *Service) Providers(ctx context.Context, org string, page store.Page) (*control.List[control.ProviderRecord], error) {
	out := &control.List[control.ProviderRecord]{}
	err := s.reg.Store.View(ctx, func(tx store.Tx) error {
		out = &control.List[control.ProviderRecord]{Items: []control.ProviderRecord{}}
		if _, err := tx.Org(ctx, org); err != nil {
			return orgError(err, org)
		}
		p := page
		if p.Limit > 0 {
			p.Limit++
		}
		vs, err := tx.Providers(ctx, org, p)
		if err != nil {
			return err
		}
		if page.Limit > 0 && len(vs) > page.Limit {
			vs = vs[:page.Limit]
			out.NextCursor = vs[page.Limit-1].Name
		}
		for _, v := range vs {
			rec, err := s.providerRecord(v)
			if err != nil {
				return err
			}
			out.Items = append(out.Items, *rec)
		}
		return nil
	})
	return out, err
}

// Provider returns one by name or id.
func (s *Service) Provider(ctx context.Context, org, name string) (out *control.ProviderRecord, err error) {
	err = s.reg.Store.View(ctx, func(tx store.Tx) error {
		if _, err := tx.Org(ctx, org); err != nil {
			return orgError(err, org)
		}
		v, err := tx.FindProvider(ctx, org, name)
		if err != nil {
			return registry.NotFound(err, "provider", name, org)
		}
		out, err = s.providerRecord(v)
		return err
	})
	return out, err
}

// provider finds one for a transaction of a caller who may change it.
func (s *Service) provider(ctx context.Context, by *Principal, org, name string, fn func(c *registry.Change, v *store.Provider) error) error {
	if err := by.Require(org, providerObject, Write); err != nil {
		return err
	}
	return s.transact(ctx, by, func(c *registry.Change) error {
		if err := s.still(ctx, c, by, org, providerObject, Write); err != nil {
			return err
		}
		if _, err := c.FindOrg(ctx, org); err != nil {
			return err
		}
		v, err := c.FindProvider(ctx, org, name)
		if err != nil {
			return registry.NotFound(err, "provider", name, org)
		}
		return fn(c, v)
	})
}

// CreateProvider adds single sign-on. The provider is asked for its documents before it is kept.
func (s *Service) CreateProvider(ctx context.Context, by *Principal, org string, req control.CreateProvider) (out *control.ProviderRecord, err error) {
	if err := by.Require(org, providerObject, Write); err != nil {
		return nil, err
	}
	if err := registry.CheckName("provider", req.Name); err != nil {
		return nil, err
	}
	if err := checkIssuer(req.Issuer); err != nil {
		return nil, err
	}
	if req.ClientID == "" {
		return nil, registry.Invalid("body.client_id", "register the platform at the provider first", "the client id is missing")
	}
	if err := checkRules(by, org, &req.ProviderRules); err != nil {
		return nil, err
	}
	set := &providerSettings{ProviderRules: req.ProviderRules, Private: by.May(Platform, providerObject, Write)}
	b, err := json.Marshal(set)
	if err != nil {
		return nil, err
	}
	v := &store.Provider{ID: identity.NewID("idp"), Org: org, Name: req.Name, Issuer: req.Issuer, ClientID: req.ClientID, Settings: b}
	v.Secret = s.reg.Seal.Seal(registry.ProviderLabel(v.ID), []byte(req.Secret))
	if _, err := s.discover(ctx, v, set); err != nil {
		return nil, err
	}
	err = s.transact(ctx, by, func(c *registry.Change) error {
		if err := s.still(ctx, c, by, org, providerObject, Write); err != nil {
			return err
		}
		if _, err := c.FindOrg(ctx, org); err != nil {
			return err
		}
		for _, m := range req.Mapping {
			if m.Org != "" {
				if _, err := c.FindOrg(ctx, m.Org); err != nil {
					return err
				}
			}
		}
		v.Created = c.Now()
		if err := c.InsertProvider(ctx, v); err != nil {
			return registry.Taken(err, "provider", req.Name, org)
		}
		if out, err = s.providerRecord(v); err != nil {
			return err
		}
		return c.Record(ctx, org, "provider.create", "provider/"+v.ID, map[string]any{"name": v.Name, "issuer": v.Issuer, "client_id": v.ClientID, "rules": req.ProviderRules})
	})
	return out, err
}

// UpdateProvider changes one. The issuer stays: another issuer's users are other people.
func (s *Service) UpdateProvider(ctx context.Context, by *Principal, org, name string, req control.UpdateProvider) (out *control.ProviderRecord, err error) {
	if req.Rules != nil {
		if err := checkRules(by, org, req.Rules); err != nil {
			return nil, err
		}
	}
	err = s.provider(ctx, by, org, name, func(c *registry.Change, v *store.Provider) error {
		set, err := settingsOf(v)
		if err != nil {
			return err
		}
		// What it hands out now is no more than the caller may: otherwise somebody else set it up.
		if err := checkRules(by, org, &set.ProviderRules); err != nil {
			return err
		}
		detail := map[string]any{"name": v.Name}
		if req.ClientID != nil {
			v.ClientID = *req.ClientID
			detail["client_id"] = v.ClientID
		}
		if req.Secret != nil {
			v.Secret = s.reg.Seal.Seal(registry.ProviderLabel(v.ID), []byte(*req.Secret))
			detail["secret"] = "new"
		}
		if req.Disabled != nil {
			v.Disabled = *req.Disabled
			detail["disabled"] = v.Disabled
		}
		if req.Rules != nil {
			set.ProviderRules = *req.Rules
			detail["rules"] = set.ProviderRules
		}
		if v.Settings, err = json.Marshal(set); err != nil {
			return err
		}
		if err := c.UpdateProvider(ctx, v); err != nil {
			return err
		}
		if out, err = s.providerRecord(v); err != nil {
			return err
		}
		return c.Record(ctx, org, "provider.update", "provider/"+v.ID, detail)
	})
	return out, err
}

// DeleteProvider deletes one. The people stay; who has no password needs an invitation then.
func (s *Service) DeleteProvider(ctx context.Context, by *Principal, org, name string) error {
	return s.provider(ctx, by, org, name, func(c *registry.Change, v *store.Provider) error {
		if err := c.DeleteProvider(ctx, v.ID); err != nil {
			return err
		}
		return c.Record(ctx, org, "provider.delete", "provider/"+v.ID, map[string]any{"name": v.Name})
	})
}

// LoginProvider is a provider that the login page offers.
type LoginProvider struct {
	Name string
	Org  string // empty for one of the platform
	URL  string // of this platform: follow it to log in; ?return= names a path to come back to
}

// LoginProviders lists what the login page offers: providers of the platform, and with an organization's name its own.
func (s *Service) LoginProviders(ctx context.Context, org string) (out []LoginProvider, err error) {
	err = s.reg.Store.View(ctx, func(tx store.Tx) error {
		out = nil
		orgs := []string{Platform}
		if org != "" && org != Platform {
			orgs = append(orgs, org)
		}
		for _, o := range orgs {
			vs, err := tx.Providers(ctx, o, store.Page{})
			if err != nil {
				return err
			}
			for _, v := range vs {
				if !v.Disabled {
					out = append(out, LoginProvider{Name: v.Name, Org: homeWord(o), URL: StartPath + v.ID})
				}
			}
		}
		return nil
	})
	return out, err
}
