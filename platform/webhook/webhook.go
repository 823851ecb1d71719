// Package webhook tells programs elsewhere what happens in an organization: each entry of its audit chain that fits a webhook's patterns is sent to
// the webhook's URL, in order, at least once. How far it got is kept in the store, so that it goes on there after a restart, and on another replica.
//
//	s := webhook.New(webhook.Config{Registry: reg, Through: dialler.Dial})
//	w, err := s.Create(ctx, "acme", control.CreateWebhook{Name: "siem", URL: "https://siem.example/in", Events: []string{"node.*"}})
//	err = s.Run(ctx)
//
// A request is a POST of JSON with the headers of Standard Webhooks (https://www.standardwebhooks.com):
//
//	webhook-id         of the event: the same when it is sent again
//	webhook-timestamp  seconds since 1970, of the try
//	webhook-signature  v1,base64( HMAC-SHA256( secret, webhook-id "." webhook-timestamp "." body ) )
//
// Where it goes is what an organization's administrator typed, so the platform dials public addresses only, those that it found when it looked the name
// up; anything else goes through the organization's gateways, under its policies.
package webhook

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/addrspace"
	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// Limits.
const (
	mostOfOrg     = 20 // webhooks of one organization
	secretPrefix  = "whsec_"
	secretSize    = 32 // bytes
	secretAtLeast = 16 // characters of one's own
)

// Config is what a Service needs.
type Config struct {
	Registry *registry.Registry
	Log      *slog.Logger
	Metrics  prometheus.Registerer
	// Leads says whether this replica delivers; nil is yes.
	Leads func() bool
	// Through dials by the gateways of an organization, as its policies allow the platform; nil: webhooks through gateways can not be delivered.
	Through func(ctx context.Context, org, hostport string) (net.Conn, error)
	// Resolve looks a name up; nil is the system's resolver.
	Resolve func(ctx context.Context, host string) ([]netip.Addr, error)

	every  time.Duration           // between looks for what is due; zero is dueEvery
	first  time.Duration           // wait after the first failure; zero is firstWait
	public func(a netip.Addr) bool // nil is addrspace.Public; tests have their receivers on loopback
	tls    *tls.Config             // nil is the system's roots
}

// Service serves the webhooks of all organizations. Its methods may be called concurrently.
type Service struct {
	cfg Config
	reg *registry.Registry

	mu      sync.Mutex
	running map[string]string // id of a webhook that is being delivered: its organization; guarded by mu

	sent *prometheus.CounterVec
}

// New makes a service. Run delivers.
func New(cfg Config) *Service {
	if cfg.Leads == nil {
		cfg.Leads = func() bool { return true }
	}
	if cfg.Resolve == nil {
		cfg.Resolve = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	if cfg.public == nil {
		cfg.public = addrspace.Public
	}
	cfg.every, cfg.first = cmp.Or(cfg.every, dueEvery), cmp.Or(cfg.first, firstWait)
	s := &Service{cfg: cfg, reg: cfg.Registry, running: make(map[string]string), sent: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sallyway_platform_webhook_deliveries_total", Help: "Requests to webhooks, by result.",
	}, []string{"result"})}
	s.sent.WithLabelValues(resultOK)
	s.sent.WithLabelValues(resultFailed)
	cfg.Metrics.MustRegister(s.sent, &census{s})
	return s
}

// pattern is what events of a webhook look like: every action, those that begin with some words, or one.
var pattern = regexp.MustCompile(`^(\*|[a-z][a-z0-9-]*(\.[a-z][a-z0-9-]*)*(\.\*)?)$`)

// matches says whether an action fits one of the patterns; none is every action.
func matches(patterns []string, action string) bool {
	return len(patterns) == 0 || slices.ContainsFunc(patterns, func(p string) bool {
		prefix, open := strings.CutSuffix(p, "*")
		return p == action || open && strings.HasPrefix(action, prefix)
	})
}

func checkEvents(events []string) ([]string, error) {
	out := []string{}
	for _, e := range events {
		e = strings.TrimSpace(e)
		if len(e) > 100 || !pattern.MatchString(e) {
			return nil, registry.Invalid("body.events", "use actions as the audit log has them, such as node.enrol, or all that begin alike, such as node.*", "%.60q is no pattern of events", e)
		}
		if !slices.Contains(out, e) {
			out = append(out, e)
		}
	}
	return out, nil
}

func checkURL(s string, gateways bool) (string, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Host == "" || u.Hostname() == "" || u.Opaque != "":
		return "", registry.Invalid("body.url", "give all of it, such as https://siem.example/in", "%.100q is not a URL", s)
	case u.Scheme != "https" && (u.Scheme != "http" || !gateways):
		return "", registry.Invalid("body.url", "use https://; plain http:// is for what is reached through gateways", "what is delivered tells much, and goes encrypted only")
	case u.User != nil:
		return "", registry.Invalid("body.url", "leave it out: the signature says who sends", "the URL holds a user name")
	case u.Fragment != "":
		return "", registry.Invalid("body.url", "leave out what is behind the #", "the URL has a fragment")
	}
	return u.String(), nil
}

// checkLiteral refuses an address that is never dialled. Names are looked at when they are dialled.
func (s *Service) checkLiteral(at string, gateways bool) error {
	u, err := url.Parse(at)
	if err != nil || gateways {
		return err
	}
	if a, err := netip.ParseAddr(u.Hostname()); err == nil && !s.cfg.public(a) {
		return registry.Invalid("body.url", "have it dialled by a gateway, as a policy allows the platform: --through-gateways (through_gateways: true)",
			"%v is not a public address: the platform reaches such only through gateways", a)
	}
	return nil
}

// place is a URL as the audit has it, without path and query: receivers tell senders apart by secrets in these, and the audit goes to many.
func place(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		return ""
	}
	return u.Scheme + "://" + u.Host
}

func newSecret(own string) (string, error) {
	if own == "" {
		b := make([]byte, secretSize)
		_, _ = rand.Read(b) // never fails (crypto/rand)
		return secretPrefix + base64.StdEncoding.EncodeToString(b), nil
	}
	if _, err := key(own); err != nil || len(own) < secretAtLeast {
		return "", registry.Invalid("body.secret", "give none, then one is made; or at least 16 characters; behind whsec_ stands base64", "the secret is too short, or not what its beginning says")
	}
	return own, nil
}

// key is what signatures are made with: behind the prefix stands base64, else it is the secret itself.
func key(secret string) ([]byte, error) {
	if b, ok := strings.CutPrefix(secret, secretPrefix); ok {
		return base64.StdEncoding.DecodeString(b)
	}
	return []byte(secret), nil
}

// Create makes a webhook that begins with what happens from now on. The answer alone holds the secret.
func (s *Service) Create(ctx context.Context, org string, req control.CreateWebhook) (*control.Webhook, error) {
	if err := registry.CheckName("webhook", req.Name); err != nil {
		return nil, err
	}
	at, err := checkURL(req.URL, req.ThroughGateways)
	if err != nil {
		return nil, err
	}
	if err := s.checkLiteral(at, req.ThroughGateways); err != nil {
		return nil, err
	}
	events, err := checkEvents(req.Events)
	if err != nil {
		return nil, err
	}
	secret, err := newSecret(req.Secret)
	if err != nil {
		return nil, err
	}
	var w *store.Webhook
	err = s.reg.Transact(ctx, func(c *registry.Change) error {
		if _, err := c.FindOrg(ctx, org); err != nil {
			return err
		}
		have, err := c.Webhooks(ctx, org, store.Page{Limit: mostOfOrg})
		if err != nil {
			return err
		}
		if len(have) >= mostOfOrg {
			return registry.Conflict("delete one that is not needed any more", "organization %s has %d webhooks, which is the most", org, len(have))
		}
		id := identity.NewID("webhook")
		w = &store.Webhook{
			ID: id, Org: org, Name: req.Name, URL: at, Events: events, Secret: s.reg.Seal.Seal(registry.WebhookLabel(id), []byte(secret)), Gateways: req.ThroughGateways,
			Created: c.Now(), Next: c.Now(),
		}
		if err := c.Record(ctx, org, "webhook.create", "webhook/"+id, map[string]any{"name": w.Name, "url": place(w.URL), "events": events, "through_gateways": w.Gateways}); err != nil {
			return err
		}
		if w.Head, _, err = c.AuditHead(ctx, org); err != nil {
			return err
		}
		w.Cursor = w.Head
		return registry.Taken(c.InsertWebhook(ctx, w), "webhook", req.Name, org)
	})
	if err != nil {
		return nil, err
	}
	v := view(w)
	v.Secret = secret
	return v, nil
}

func view(w *store.Webhook) *control.Webhook {
	v := &control.Webhook{
		ID: w.ID, Name: w.Name, URL: w.URL, Events: w.Events, ThroughGateways: w.Gateways, Created: w.Created, State: control.WebhookIdle, Backlog: max(0, w.Head-w.Cursor),
		LastSuccess: when(w.Success), FailedSince: when(w.Failed), Reason: w.Problem,
	}
	switch {
	case w.Disabled != "":
		v.State, v.Reason = control.WebhookDisabled, w.Disabled
	case !w.Failed.IsZero():
		v.State, v.NextTry = control.WebhookFailing, when(w.Next)
	case v.Backlog > 0:
		v.State = control.WebhookDelivering
	}
	return v
}

func when(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// List lists webhooks of org.
func (s *Service) List(ctx context.Context, org string, p store.Page) (*control.List[control.Webhook], error) {
	out := &control.List[control.Webhook]{}
	err := s.reg.Store.View(ctx, func(tx store.Tx) error {
		*out = control.List[control.Webhook]{Items: []control.Webhook{}}
		if _, err := tx.Org(ctx, org); err != nil {
			return registry.NotFound(err, "organization", org, org)
		}
		more := p
		if more.Limit > 0 {
			more.Limit++
		}
		ws, err := tx.Webhooks(ctx, org, more)
		if err != nil {
			return err
		}
		if p.Limit > 0 && len(ws) > p.Limit {
			ws = ws[:p.Limit]
			out.NextCursor = ws[p.Limit-1].Name
		}
		for _, w := range ws {
			out.Items = append(out.Items, *view(w))
		}
		return nil
	})
	return out, err
}

func (s *Service) find(ctx context.Context, org, name string) (w *store.Webhook, err error) {
	err = s.reg.Store.View(ctx, func(tx store.Tx) error {
		w, err = tx.FindWebhook(ctx, org, name)
		return registry.NotFound(err, "webhook", name, org)
	})
	return w, err
}

// Show shows a webhook by name or id.
func (s *Service) Show(ctx context.Context, org, name string) (*control.Webhook, error) {
	w, err := s.find(ctx, org, name)
	if err != nil {
		return nil, err
	}
	return view(w), nil
}

// Update changes a webhook. The answer holds the secret when it was changed.
func (s *Service) Update(ctx context.Context, org, name string, req control.UpdateWebhook) (*control.Webhook, error) {
	var w *store.Webhook
	secret := ""
	err := s.reg.Transact(ctx, func(c *registry.Change) (err error) {
		if w, err = c.FindWebhook(ctx, org, name); err != nil {
			return registry.NotFound(err, "webhook", name, org)
		}
		detail := map[string]any{"name": w.Name}
		if req.ThroughGateways != nil {
			w.Gateways = *req.ThroughGateways
			detail["through_gateways"] = w.Gateways
		}
		if req.URL != nil {
			w.URL = *req.URL
			detail["url"] = place(w.URL)
		}
		if w.URL, err = checkURL(w.URL, w.Gateways); err != nil {
			return err
		}
		if req.URL != nil || req.ThroughGateways != nil { // one of before can still be disabled or renamed
			if err := s.checkLiteral(w.URL, w.Gateways); err != nil {
				return err
			}
		}
		if req.Events != nil {
			if w.Events, err = checkEvents(*req.Events); err != nil {
				return err
			}
			detail["events"] = w.Events
		}
		if req.Secret != nil {
			if secret, err = newSecret(*req.Secret); err != nil {
				return err
			}
			w.Secret = s.reg.Seal.Seal(registry.WebhookLabel(w.ID), []byte(secret))
			detail["secret"] = "changed"
		}
		if req.Disabled != nil {
			w.Disabled = ""
			if *req.Disabled {
				w.Disabled = "by " + registry.Actor(ctx)
			}
			detail["disabled"] = *req.Disabled
		}
		if req.Skip {
			detail["skipped"] = w.Head - w.Cursor
			w.Cursor = w.Head
		}
		// Whatever was wrong may be right now: it is tried at once.
		w.Tries, w.Next = 0, c.Now()
		if err := c.UpdateWebhook(ctx, w); err != nil {
			return err
		}
		return c.Record(ctx, org, "webhook.update", "webhook/"+w.ID, detail)
	})
	if err != nil {
		return nil, err
	}
	v := view(w)
	v.Secret = secret
	return v, nil
}

// Delete deletes a webhook.
func (s *Service) Delete(ctx context.Context, org, name string) error {
	return s.reg.Transact(ctx, func(c *registry.Change) error {
		w, err := c.FindWebhook(ctx, org, name)
		if err != nil {
			return registry.NotFound(err, "webhook", name, org)
		}
		if err := c.DeleteWebhook(ctx, w.ID); err != nil {
			return err
		}
		return c.Record(ctx, org, "webhook.delete", "webhook/"+w.ID, map[string]any{"name": w.Name, "url": place(w.URL)})
	})
}

// Test sends an event of the action webhook.test, and says how that went. It is no part of the order of the others.
func (s *Service) Test(ctx context.Context, org, name string) (*control.WebhookTest, error) {
	w, err := s.find(ctx, org, name)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	now := s.reg.Now().UTC()
	r, err := s.receiver(w)
	if err != nil {
		return nil, err
	}
	defer r.close()
	status, err := r.send(ctx, "test-"+identity.NewID("webhook"), event{
		Type: "webhook.test", Timestamp: now, Organization: org,
		Data: eventData{Actor: registry.Actor(ctx), Action: "webhook.test", Object: "webhook/" + w.ID, Result: audit.OK, Detail: []byte(`{}`)},
	})
	out := &control.WebhookTest{OK: err == nil, Status: status, Millis: time.Since(began).Milliseconds()}
	if err != nil {
		out.Problem = problem(err)
	}
	s.count(err)
	return out, s.reg.Transact(ctx, func(c *registry.Change) error {
		_, err := c.FindWebhook(ctx, org, w.ID)
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		return errors.Join(err, c.Record(ctx, org, "webhook.test", "webhook/"+w.ID, map[string]any{"name": w.Name, "ok": out.OK, "status": status}))
	})
}

// problem is an error as people read it, bounded.
func problem(err error) string {
	const most = 500
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // without method and URL
	}
	s := strings.ReplaceAll(strings.ToValidUTF8(err.Error(), ""), "\n", "; ")
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

var errGone = errors.New("the receiver answered 410 Gone")

const (
	resultOK     = "ok"
	resultFailed = "failed"
)

func (s *Service) count(err error) {
	if err != nil {
		s.sent.WithLabelValues(resultFailed).Inc()
		return
	}
	s.sent.WithLabelValues(resultOK).Inc()
}

// httpStatus reports whether a status means that the event was taken.
func httpStatus(code int) bool { return code >= http.StatusOK && code < http.StatusMultipleChoices }
