package webhook

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"sallyway/internal/control"
	"sallyway/platform/pki"
	"sallyway/platform/presence"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// receiver is who takes events. It answers with status, which a test may change.
type receiverLab struct {
	*httptest.Server
	mu     sync.Mutex
	status int
	got    []delivery
}

type delivery struct {
	header http.Header
	body   []byte
	event
}

func newReceiver(t *testing.T) *receiverLab {
	r := &receiverLab{status: http.StatusNoContent}
	r.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		d := delivery{header: req.Header}
		d.body, _ = io.ReadAll(req.Body)
		_ = json.Unmarshal(d.body, &d.event)
		r.mu.Lock()
		defer r.mu.Unlock()
		r.got = append(r.got, d)
		if r.status/100 == 3 {
			w.Header().Set("Location", "https://127.0.0.1:1/elsewhere")
		}
		w.WriteHeader(r.status)
	}))
	t.Cleanup(r.Close)
	return r
}

func (r *receiverLab) answer(status int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.status = status
}

func (r *receiverLab) deliveries() []delivery {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.got)
}

// types are the actions that came, without doubles.
func (r *receiverLab) types() (out []string) {
	seen := map[string]bool{}
	for _, d := range r.deliveries() {
		if id := d.header.Get("webhook-id"); !seen[id] {
			seen[id] = true
			out = append(out, d.Type)
		}
	}
	return out
}

type lab struct {
	t   *testing.T
	reg *registry.Registry
	rec *receiverLab
}

func newLab(t *testing.T) *lab {
	t.Helper()
	st, err := store.OpenSQLite(t.Context(), filepath.Join(t.TempDir(), "test.db"))
	must(t, err)
	t.Cleanup(func() { must(t, st.Close()) })
	seal, err := pki.NewSealer(make([]byte, 32))
	must(t, err)
	l := &lab{t: t, rec: newReceiver(t)}
	l.reg = &registry.Registry{Store: st, Seal: seal, Board: new(presence.Board), Log: slog.New(slog.DiscardHandler), Now: time.Now, URL: "https://platform.example"}
	_, err = l.reg.Bootstrap(t.Context())
	must(t, err)
	return l
}

// service makes a service whose receivers may be on loopback.
func (l *lab) service(change ...func(*Config)) *Service {
	roots := x509.NewCertPool()
	roots.AddCert(l.rec.Certificate())
	c := Config{
		Registry: l.reg, Log: l.reg.Log, Metrics: prometheus.NewRegistry(), every: 5 * time.Millisecond, first: 10 * time.Millisecond,
		public: func(netip.Addr) bool { return true }, tls: &tls.Config{RootCAs: roots},
	}
	for _, f := range change {
		f(&c)
	}
	return New(c)
}

// run runs a service until the returned function is called.
func (l *lab) run(s *Service) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			l.t.Error(err)
		}
	})
	l.t.Cleanup(stop)
	return stop
}

func (l *lab) happen(actions ...string) {
	l.t.Helper()
	for _, a := range actions {
		must(l.t, l.reg.Transact(l.t.Context(), func(c *registry.Change) error {
			return c.Record(l.t.Context(), registry.DefaultOrg, a, "x/y", map[string]any{"n": 9007199254740993})
		}))
	}
}

func (l *lab) create(s *Service, req control.CreateWebhook) *control.Webhook {
	l.t.Helper()
	if req.Name == "" {
		req.Name = "siem"
	}
	if req.URL == "" {
		req.URL = l.rec.URL + "/in"
	}
	w, err := s.Create(l.t.Context(), registry.DefaultOrg, req)
	must(l.t, err)
	return w
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for until := time.Now().Add(30 * time.Second); !ok(); {
		if time.Now().After(until) {
			t.Fatal("not in time: " + what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// TestDelivery: what fits is delivered in order, signed, and nothing else.
func TestDelivery(t *testing.T) {
	l := newLab(t)
	s := l.service()
	l.happen("node.before")
	w := l.create(s, control.CreateWebhook{Events: []string{"node.*", "policy.allow"}})
	if !strings.HasPrefix(w.Secret, secretPrefix) {
		t.Errorf("secret %q", w.Secret)
	}
	l.run(s)
	l.happen("node.create", "policy.deny", "nodes.x", "policy.allow", "node.enrol.aws")
	want := []string{"node.create", "policy.allow", "node.enrol.aws"}
	eventually(t, "three events", func() bool { return slices.Equal(l.rec.types(), want) })
	secret, err := key(w.Secret)
	must(t, err)
	for _, d := range l.rec.deliveries() {
		id, at := d.header.Get("webhook-id"), d.header.Get("webhook-timestamp")
		if d.header.Get("webhook-signature") != Sign(secret, id, at, d.body) {
			t.Error("a signature is not good")
		}
		if sec, err := strconv.ParseInt(at, 10, 64); err != nil || time.Since(time.Unix(sec, 0)) > time.Minute {
			t.Errorf("time %q", at)
		}
		if d.Organization != registry.DefaultOrg || d.Data.Hash == "" || !strings.Contains(string(d.Data.Detail), "9007199254740993") || d.header.Get("Content-Type") != "application/json" {
			t.Errorf("%s", d.body)
		}
	}
	eventually(t, "nothing waits", func() bool {
		v, err := s.Show(t.Context(), registry.DefaultOrg, "siem")
		return err == nil && v.State == control.WebhookIdle && v.Backlog == 0 && v.LastSuccess != nil && v.Secret == ""
	})
}

// TestSignature is the example of the Standard Webhooks specification's reference implementations.
func TestSignature(t *testing.T) {
	k, err := key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
	must(t, err)
	got := Sign(k, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", []byte(`{"test": 2432232314}`))
	if want := "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// TestFailureIsTriedAgain: nothing is lost or overtaken while the receiver fails, another webhook is not held up, and another service goes on where
// the first was.
func TestFailureIsTriedAgain(t *testing.T) {
	l := newLab(t)
	s := l.service()
	l.create(s, control.CreateWebhook{Events: []string{"node.*"}})
	other := newReceiver(t)
	roots := x509.NewCertPool()
	roots.AddCert(l.rec.Certificate())
	roots.AddCert(other.Certificate())
	s.cfg.tls = &tls.Config{RootCAs: roots}
	l.create(s, control.CreateWebhook{Name: "other", URL: other.URL, Events: []string{"node.*"}})
	l.rec.answer(http.StatusInternalServerError)
	stop := l.run(s)
	l.happen("node.a", "node.b", "node.c")
	eventually(t, "the other webhook has all", func() bool { return len(other.types()) == 3 })
	show := func() *control.Webhook {
		v, err := s.Show(t.Context(), registry.DefaultOrg, "siem")
		must(t, err)
		return v
	}
	eventually(t, "it fails and says so", func() bool {
		v := show()
		return v.State == control.WebhookFailing && strings.Contains(v.Reason, "500") && v.FailedSince != nil && v.NextTry != nil && v.Backlog >= 3
	})
	eventually(t, "it tries again", func() bool { return len(l.rec.deliveries()) >= 3 })
	if got := l.rec.types(); !slices.Equal(got, []string{"node.a"}) {
		t.Errorf("%v came while the first was refused", got)
	}
	stop()
	l.rec.answer(http.StatusOK)
	s = l.service()
	l.run(s)
	eventually(t, "all came", func() bool { return slices.Equal(l.rec.types(), []string{"node.a", "node.b", "node.c"}) })
	eventually(t, "its state is good", func() bool {
		v := show()
		return v.State == control.WebhookIdle && v.Reason == "" && v.FailedSince == nil
	})
}

// TestOnlyTheLeaderDelivers: of several replicas one does.
func TestOnlyTheLeaderDelivers(t *testing.T) {
	l := newLab(t)
	leader, other := l.service(), l.service(func(c *Config) { c.Leads = func() bool { return false } })
	l.create(leader, control.CreateWebhook{})
	l.run(other)
	l.run(leader)
	l.happen("node.a", "node.b")
	eventually(t, "both events", func() bool { return len(l.rec.types()) == 2 })
	eventually(t, "the state is written", func() bool {
		v, err := leader.Show(t.Context(), registry.DefaultOrg, "siem")
		return err == nil && v.Backlog == 0
	})
	if n := len(l.rec.deliveries()); n != 2 {
		t.Errorf("%d deliveries of 2 events", n)
	}
}

// TestWhereItGoes: an address that is not the Internet's is refused however it is written, and a redirect is not followed.
func TestWhereItGoes(t *testing.T) {
	l := newLab(t)
	at, err := url.Parse(l.rec.URL)
	must(t, err)
	names := map[string]string{
		"loopback.example": "127.0.0.1", "private.example": "10.1.2.3", "metadata.example": "169.254.169.254", "mapped.example": "::ffff:10.0.0.1", "local.example": "fe80::1",
		"ula.example": "fd00::1", "carrier.example": "100.64.1.1", "nat64.example": "64:ff9b::a00:1", "sixtofour.example": "2002:a00:1::", "zero.example": "0.0.0.0", "many.example": "224.0.0.1",
	}
	strict := l.service(func(c *Config) {
		c.public = nil
		c.Resolve = func(_ context.Context, host string) ([]netip.Addr, error) {
			if a, ok := names[host]; ok {
				return []netip.Addr{netip.MustParseAddr(a)}, nil
			}
			return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
		}
	})
	try := func(s *Service, u string, through bool) *control.WebhookTest {
		t.Helper()
		l.create(s, control.CreateWebhook{Name: "x", URL: u, ThroughGateways: through})
		r, err := s.Test(t.Context(), registry.DefaultOrg, "x")
		must(t, err)
		must(t, s.Delete(t.Context(), registry.DefaultOrg, "x"))
		return r
	}
	for _, h := range []string{"127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "10.0.0.1", "169.254.169.254", "[fe80::1%25eth0]"} {
		u := "https://" + h + ":" + at.Port() + "/in"
		_, err := strict.Create(t.Context(), registry.DefaultOrg, control.CreateWebhook{Name: "x", URL: u})
		if e, ok := errors.AsType[*registry.Error](err); !ok || e.Problem.Status != http.StatusUnprocessableEntity || !strings.Contains(e.Problem.Remedy, "--through-gateways") {
			t.Errorf("%s: %v", h, err)
		}
		l.create(strict, control.CreateWebhook{Name: "x", URL: u, ThroughGateways: true})
		no, direct := false, "https://siem.example/in"
		for what, req := range map[string]control.UpdateWebhook{"taken from the gateways": {ThroughGateways: &no}, "both": {URL: &u, ThroughGateways: &no}} {
			if _, err := strict.Update(t.Context(), registry.DefaultOrg, "x", req); registry.Code(err) != control.CodeInvalid {
				t.Errorf("%s, %s: %v", h, what, err)
			}
		}
		_, err = strict.Update(t.Context(), registry.DefaultOrg, "x", control.UpdateWebhook{URL: &direct, ThroughGateways: &no})
		must(t, err)
		if _, err := strict.Update(t.Context(), registry.DefaultOrg, "x", control.UpdateWebhook{URL: &u}); registry.Code(err) != control.CodeInvalid {
			t.Errorf("%s: %v", h, err)
		}
		must(t, strict.Delete(t.Context(), registry.DefaultOrg, "x"))
	}
	// One that was made before such were refused says so when it is tried, once, and can be changed otherwise.
	l.create(l.service(), control.CreateWebhook{Name: "old", URL: "https://10.0.0.1/in"})
	r, err := strict.Test(t.Context(), registry.DefaultOrg, "old")
	must(t, err)
	if r.OK || !strings.Contains(r.Problem, "--through-gateways") || strings.Count(r.Problem, "10.0.0.1") != 1 {
		t.Errorf("%+v", r)
	}
	yes := true
	_, err = strict.Update(t.Context(), registry.DefaultOrg, "old", control.UpdateWebhook{Disabled: &yes})
	must(t, err)
	for h := range names {
		if r := try(strict, "https://"+h+":"+at.Port()+"/in", false); r.OK || !strings.Contains(r.Problem, "not a public address") || !strings.Contains(r.Problem, "--through-gateways") {
			t.Errorf("%s: %+v", h, r)
		}
	}
	if r := try(strict, "https://private.example/in", false); strings.Contains(r.Problem, "10.1.2.3") {
		t.Errorf("the platform looks names up for organizations: %+v", r)
	}
	if r := try(strict, "https://nowhere.example/in", false); !strings.Contains(r.Problem, "no such host") {
		t.Errorf("a name that is none: %+v", r)
	}
	if r := try(strict, "https://10.0.0.1/in", true); r.OK || !strings.Contains(r.Problem, "no way through gateways") {
		t.Errorf("without a way: %+v", r)
	}
	var asked []string
	through := l.service(func(c *Config) {
		c.public = nil
		c.Through = func(ctx context.Context, org, hostport string) (net.Conn, error) {
			asked = append(asked, org+" "+hostport)
			return (&net.Dialer{}).DialContext(ctx, "tcp", at.Host)
		}
	})
	if r := try(through, l.rec.URL, true); !r.OK || r.Status != http.StatusNoContent || !slices.Equal(asked, []string{"default " + at.Host}) {
		t.Errorf("through gateways: %+v, asked %v", r, asked)
	}
	l.rec.answer(http.StatusFound)
	before := len(l.rec.deliveries())
	if r := try(l.service(), l.rec.URL, false); r.OK || r.Status != http.StatusFound || !strings.Contains(r.Problem, "redirects are not followed") || len(l.rec.deliveries()) != before+1 {
		t.Errorf("a redirect: %+v", r)
	}
	untrusted := l.service(func(c *Config) { c.tls = nil })
	if r := try(untrusted, l.rec.URL, false); r.OK || !strings.Contains(r.Problem, "certificate") {
		t.Errorf("a certificate of nobody: %+v", r)
	}
}

// TestGoneIsDisabled: a receiver that says it is gone for good is left alone, which stands in the audit log; enabled again it goes on where it was.
func TestGoneIsDisabled(t *testing.T) {
	l := newLab(t)
	s := l.service()
	l.create(s, control.CreateWebhook{Events: []string{"node.*"}})
	l.rec.answer(http.StatusGone)
	l.run(s)
	l.happen("node.a")
	eventually(t, "it is disabled", func() bool {
		v, err := s.Show(t.Context(), registry.DefaultOrg, "siem")
		return err == nil && v.State == control.WebhookDisabled && strings.Contains(v.Reason, "410")
	})
	es, err := l.reg.Audit(t.Context(), registry.DefaultOrg, 0, 1000)
	must(t, err)
	if !slices.ContainsFunc(es, func(e control.AuditEntry) bool { return e.Action == "webhook.disable" }) {
		t.Error("it is not audited")
	}
	l.happen("node.b")
	l.rec.answer(http.StatusOK)
	off := false
	_, err = s.Update(t.Context(), registry.DefaultOrg, "siem", control.UpdateWebhook{Disabled: &off})
	must(t, err)
	eventually(t, "all came", func() bool { return slices.Equal(l.rec.types(), []string{"node.a", "node.b"}) })
}

// TestAuditHasNoSecretOfAURL: what stands in the path or query of a receiver's URL is often how it knows senders.
func TestAuditHasNoSecretOfAURL(t *testing.T) {
	l := newLab(t)
	s := l.service()
	l.create(s, control.CreateWebhook{URL: "https://hooks.example/planted-secret?k=planted-secret"})
	other := "https://hooks.example:8443/in/planted-secret"
	_, err := s.Update(t.Context(), registry.DefaultOrg, "siem", control.UpdateWebhook{URL: &other})
	must(t, err)
	must(t, s.Delete(t.Context(), registry.DefaultOrg, "siem"))
	es, err := l.reg.Audit(t.Context(), registry.DefaultOrg, 0, 1000)
	must(t, err)
	b, err := json.Marshal(es)
	must(t, err)
	if strings.Contains(string(b), "planted-secret") || !strings.Contains(string(b), "https://hooks.example:8443") {
		t.Errorf("%s", b)
	}
}

func TestRefusals(t *testing.T) {
	l := newLab(t)
	s := l.service()
	for _, c := range []control.CreateWebhook{
		{Name: "Bad Name", URL: "https://x.example"},
		{Name: "a", URL: "http://x.example"},
		{Name: "a", URL: "ftp://x.example", ThroughGateways: true},
		{Name: "a", URL: "https://user:pw@x.example"},
		{Name: "a", URL: "https://"},
		{Name: "a", URL: "x.example"},
		{Name: "a", URL: "https://x.example/#a"},
		{Name: "a", URL: "https://x.example", Events: []string{"node*"}},
		{Name: "a", URL: "https://x.example", Events: []string{"*.enrol"}},
		{Name: "a", URL: "https://x.example", Secret: "short"},
		{Name: "a", URL: "https://x.example", Secret: "whsec_not base64 at all"},
	} {
		if _, err := s.Create(t.Context(), registry.DefaultOrg, c); registry.Code(err) != control.CodeInvalid {
			t.Errorf("%+v: %v", c, err)
		}
	}
	if _, err := s.Create(t.Context(), "nobody", control.CreateWebhook{Name: "a", URL: "https://x.example"}); registry.Code(err) != control.CodeNotFound {
		t.Errorf("%v", err)
	}
	for i := range mostOfOrg {
		l.create(s, control.CreateWebhook{Name: "w" + strconv.Itoa(i)})
	}
	if _, err := s.Create(t.Context(), registry.DefaultOrg, control.CreateWebhook{Name: "a", URL: "https://x.example"}); registry.Code(err) != control.CodeConflict {
		t.Errorf("one too many: %v", err)
	}
	list, err := s.List(t.Context(), registry.DefaultOrg, store.Page{Limit: 3})
	if err != nil || len(list.Items) != 3 || list.NextCursor == "" {
		t.Errorf("%+v %v", list, err)
	}
}
