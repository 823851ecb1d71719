package platform

import (
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/pki"
	"sallyway/relay/wire"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("net/http.(*persistConn).readLoop"), goleak.IgnoreTopFunction("net/http.(*persistConn).writeLoop"))
}

func (l *lab) ready() (int, map[string]string) {
	l.t.Helper()
	resp, err := l.http.Get(l.srv.URL() + "/readyz")
	must(l.t, err)
	defer resp.Body.Close()
	var out struct{ Reasons map[string]string }
	must(l.t, json.NewDecoder(resp.Body).Decode(&out))
	return resp.StatusCode, out.Reasons
}

// eventually polls until ok, or fails.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("did not happen: %s", what)
		}
	}
}

func TestFullDisk(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("mounts a small disk, which only root may")
	}
	dir := t.TempDir()
	must(t, syscall.Mount("sallyway-test", dir, "tmpfs", 0, "size=2m,mode=0700"))
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	l := start(t, func(c *Config) { c.Data = dir })
	n := l.create(identity.Client, "laptop").join()
	f := n.stream()
	f.wait("its configuration", always)
	if status, reasons := l.ready(); status != 200 {
		t.Fatalf("%d %v", status, reasons)
	}
	fill, err := os.Create(filepath.Join(dir, "fill"))
	must(t, err)
	defer fill.Close()
	chunk := make([]byte, 4096)
	for err == nil {
		_, err = fill.Write(chunk)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	// What the database has reserved may still take a few changes.
	refused := false
	for i := 0; i < 200 && !refused; i++ {
		status, p := l.do(l.admin.Token, "POST", "/api/v1/orgs/default/clients", control.CreateNode{Name: fmt.Sprintf("n%d", i)}, nil)
		if status != 201 {
			refused = true
			if status != 503 || p.Code != "storage_unavailable" || !strings.Contains(p.Detail, "full") || !strings.Contains(p.Remedy, "make room") {
				t.Errorf("%d %+v", status, p)
			}
		}
	}
	if !refused {
		t.Fatal("200 nodes fit on a full disk")
	}
	if status, reasons := l.ready(); status != 503 || !strings.Contains(reasons["database"], "full") {
		t.Errorf("%d %v", status, reasons)
	}
	// What runs goes on, and reading works.
	n.beat(control.Heartbeat{})
	l.api("GET", "/clients", nil, nil)
	must(t, os.Remove(fill.Name()))
	must(t, fill.Close())
	eventually(t, "ready again", func() bool { status, _ := l.ready(); return status == 200 })
	l.api("POST", "/clients", control.CreateNode{Name: "after"}, nil)
}

func TestBackupAndRestore(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	file := filepath.Join(t.TempDir(), "backup.db")
	must(t, Home{Data: w.cfg.Data}.Backup(t.Context(), file)) // beside the running server
	if err := (Home{Data: w.cfg.Data}).Backup(t.Context(), file); err == nil {
		t.Error("a backup was overwritten")
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	w.api("POST", "/clients", control.CreateNode{Name: "later"}, nil)
	gw := w.gateway.stream().settled()
	seen := gw.last.Version
	w.stop()
	old, err := Home{Data: w.cfg.Data}.Restore(t.Context(), file)
	must(t, err)
	if _, err := os.Stat(old); err != nil {
		t.Errorf("the database from before: %v", err)
	}
	w.run()
	w.gateway.login()
	if c := w.gateway.stream().wait("its configuration", always); c.Version <= seen {
		t.Errorf("version %d after %d: the gateway would refuse it", c.Version, seen)
	}
	if status, _ := w.do(w.admin.Token, "GET", "/api/v1/orgs/default/clients/later", nil, nil); status != 404 {
		t.Errorf("what was made after the backup is there: %d", status)
	}
	var v control.AuditVerification
	w.api("GET", "/audit:verify", nil, &v)
	if !v.OK || !w.audited("default", "database.restore", "default", "") {
		t.Errorf("audit %+v", v)
	}
	if _, err := (Home{Data: t.TempDir()}).Restore(t.Context(), file); err == nil || !strings.Contains(err.Error(), "master key") {
		t.Errorf("restored without the master key: %v", err)
	}
	junk := filepath.Join(t.TempDir(), "junk")
	must(t, os.WriteFile(junk, []byte(strings.Repeat("junk", 1000)), 0o600))
	if _, err := (Home{Data: w.cfg.Data}).Restore(t.Context(), junk); err == nil {
		t.Error("junk was restored")
	}
}

func TestGivenCertificate(t *testing.T) {
	t.Parallel()
	ca, err := pki.NewServerCA(time.Now())
	must(t, err)
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	give := func(hosts ...string) {
		t.Helper()
		made, err := ca.Server(hosts, time.Now())
		must(t, err)
		var b []byte
		for _, der := range made.Certificate {
			b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
		}
		must(t, os.WriteFile(certFile, b, 0o644))
		der, err := x509.MarshalPKCS8PrivateKey(made.PrivateKey)
		must(t, err)
		must(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	}
	give("127.0.0.1")
	l := start(t, func(c *Config) { c.TLSCert, c.TLSKey = certFile, keyFile })
	if want := identity.CertificateKeyHash(ca.Certificate).String(); l.srv.Pin() != want {
		t.Errorf("pin %s, want the authority's %s", l.srv.Pin(), want)
	}
	l.create(identity.Client, "laptop").join()
	give("elsewhere.example")
	cfg := l.cfg
	cfg.Data, cfg.Listen = t.TempDir(), "127.0.0.1:0"
	if srv, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "not for the host") {
		t.Errorf("a certificate for another host: %v", err)
		if err == nil {
			_ = srv.Close()
		}
	}
}

func TestAdvertisedURL(t *testing.T) {
	t.Parallel()
	l := start(t)
	n := l.create(identity.Client, "laptop").join()
	first, pin := l.srv.URL(), l.srv.Pin()
	l.stop()
	_, port, err := net.SplitHostPort(l.cfg.Listen)
	must(t, err)
	l.cfg.AdvertiseURL = "https://localhost:" + port
	l.run()
	if l.srv.URL() != l.cfg.AdvertiseURL || l.srv.Pin() != pin {
		t.Errorf("URL %s, pin %s (before %s)", l.srv.URL(), l.srv.Pin(), pin)
	}
	var cred control.AdminCredential
	b, err := os.ReadFile(l.srv.AdminFile())
	must(t, err)
	must(t, json.Unmarshal(b, &cred))
	if cred.URL != l.srv.URL() || cred.Token != l.admin.Token {
		t.Errorf("admin.token is for %s", cred.URL)
	}
	n.login() // by the new name
	if token, p := n.exchange(n.assertion(func(c *jwt.Claims) { c.Audience = jwt.Audience{first} })); token == "" {
		t.Errorf("a node that knows the URL from before: %+v", p)
	}
	for _, bad := range []string{"ftp://x", "https://", "https://h/path", "h:443", "https://u:p@h"} {
		cfg := l.cfg
		cfg.Data, cfg.Listen, cfg.AdvertiseURL = t.TempDir(), "127.0.0.1:0", bad
		if srv, err := Open(t.Context(), cfg); err == nil {
			t.Errorf("%s is taken", bad)
			_ = srv.Close()
		}
	}
}

func TestPlainHTTPBehindALoadBalancer(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.HTTPListen = "127.0.0.1:0" })
	url := "http://" + l.srv.plain.Addr().String()
	guess := func(from string) int {
		req, err := http.NewRequest("GET", url+"/api/v1/orgs", nil)
		must(t, err)
		req.Header.Set("X-Forwarded-For", "203.0.113.9, "+from)
		req.Header.Set("Authorization", "Bearer swt1.guess")
		resp, err := http.DefaultClient.Do(req)
		must(t, err)
		defer resp.Body.Close()
		return resp.StatusCode
	}
	for range 30 {
		guess("192.0.2.1")
	}
	if s := guess("192.0.2.1"); s != 429 {
		t.Errorf("the guesser: %d", s)
	}
	if s := guess("192.0.2.2"); s != 401 {
		t.Errorf("somebody else behind the load balancer: %d", s)
	}
	resp, err := http.Get(url + "/healthz")
	must(t, err)
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != 200 || !strings.Contains(string(b), `"ready":true`) {
		t.Errorf("%d %q %v", resp.StatusCode, b, err)
	}
}

func TestSharedRelays(t *testing.T) {
	t.Parallel()
	l := start(t)
	if status, p := l.do(l.admin.Token, "POST", "/api/v1/orgs", control.CreateOrganization{Name: "second"}, nil); status != 201 {
		t.Fatalf("%+v", p)
	}
	var made control.CreatedNode
	if status, p := l.do(l.admin.Token, "POST", "/api/v1/shared/relays", control.CreateNode{Name: "world", Host: "relay.example"}, &made); status != 201 {
		t.Fatalf("%+v", p)
	}
	relay := l.fromToken(made.Token).join()
	relay.beat(control.Heartbeat{})
	if relay.id.Org != identity.SharedOrg {
		t.Errorf("relay %v", relay.id)
	}
	rf := relay.stream()
	c := rf.wait("both organizations", func(c *control.Config) bool { return len(c.Relay.Orgs) == 2 })
	for _, org := range []string{"default", "second"} {
		g := l.createIn(org, identity.Gateway, "gw").join()
		conf := g.stream().wait("the shared relay", func(c *control.Config) bool { return len(c.Gateway.Relays) == 1 })
		ref := conf.Gateway.Relays[0]
		if ref.Node != relay.id || ref.Password != wire.Password(c.Relay.Keys[0].Secret, ref.Username) || ref.Roots == conf.Trust.Roots {
			t.Errorf("%s: %+v", org, ref.Node)
		}
		roots, err := identity.DecodeCertificates([]byte(ref.Roots))
		must(t, err)
		leaf, err := identity.DecodeCertificates([]byte(relay.enrol.Certificates.Leaf))
		must(t, err)
		if _, err := (&identity.Trust{Roots: roots, Pins: ref.Pins}).Verify(leaf, x509.ExtKeyUsageServerAuth); err != nil {
			t.Errorf("%s: the relay's certificate by its own authority: %v", org, err)
		}
		if _, err := g.trust(identity.Gateway, identity.Relay).Verify(leaf, x509.ExtKeyUsageServerAuth); err == nil {
			t.Errorf("%s trusts the platform's relay authority for its own", org)
		}
		l.inOrg(org, "POST", "/gateways/gw/revoke", nil, nil)
		rf.wait("the revoked gateway denied", func(c *control.Config) bool {
			for _, n := range c.Relay.Denied {
				if n == g.id {
					return true
				}
			}
			return false
		})
	}
}

// TestOrganizationsAreApart: the same names in two organizations, and nothing of one in the other.
func TestOrganizationsAreApart(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	if status, p := w.do(w.admin.Token, "POST", "/api/v1/orgs", control.CreateOrganization{Name: "rival"}, nil); status != 201 {
		t.Fatalf("%+v", p)
	}
	g, c := w.createIn("rival", identity.Gateway, "gw").join(), w.createIn("rival", identity.Client, "laptop").join()
	conf := g.stream().wait("its configuration", always)
	if len(conf.Dialling.Gateways) != 0 || len(g.snapshot(conf).Peers) != 0 || len(conf.Gateway.Relays) != 0 {
		t.Errorf("sees another organization: %+v", conf)
	}
	theirs, err := identity.DecodeCertificates([]byte(c.enrol.Certificates.Leaf))
	must(t, err)
	if _, err := w.gateway.trust(identity.Client).Verify(theirs, x509.ExtKeyUsageClientAuth); err == nil {
		t.Error("a client of another organization is verified")
	}
	snapshot := w.gateway.stream().settled().last.Gateway.Snapshot
	if _, err := policy.OpenSnapshot(snapshot, g.trust(identity.Policy), g.id); err == nil {
		t.Error("a snapshot of another organization opens")
	}
	// The token of one organization's node does not enrol the other's.
	req := w.create(identity.Client, "fresh").request()
	req.Node.Org = "rival"
	if status, p := w.do("", "POST", "/api/v1/enroll", req, nil); status/100 != 4 {
		t.Errorf("%d %+v", status, p)
	}
}

func TestAuditNoticesTampering(t *testing.T) {
	t.Parallel()
	for what, spoil := range map[string]string{
		"changed": `UPDATE audit SET actor = 'nobody' WHERE org = 'default' AND seq = 3`,
		"detail":  `UPDATE audit SET detail = '{}' WHERE org = 'default' AND seq = 4`,
		"removed": `DELETE FROM audit WHERE org = 'default' AND seq = 3`,
		"cut off": `DELETE FROM audit WHERE org = 'default' AND seq > 5`,
		"moved":   `UPDATE audit SET seq = 1000 WHERE org = 'default' AND seq = 3`,
	} {
		l := start(t)
		for _, n := range []string{"a", "b", "c"} {
			l.api("POST", "/clients", control.CreateNode{Name: n}, nil)
		}
		var v control.AuditVerification
		if l.api("GET", "/audit:verify", nil, &v); !v.OK {
			t.Fatalf("%s: not whole before: %+v", what, v)
		}
		tamper(t, filepath.Join(l.cfg.Data, "platform.db"), spoil)
		if l.api("GET", "/audit:verify", nil, &v); v.OK || v.Problem == "" {
			t.Errorf("%s: not noticed: %+v", what, v)
		}
		l.stop()
	}
}

func TestPortInUse(t *testing.T) {
	t.Parallel()
	l := start(t)
	cfg := l.cfg
	cfg.Data = t.TempDir()
	_, err := Open(t.Context(), cfg)
	if err == nil || !strings.Contains(err.Error(), "another program listens there") {
		t.Errorf("%v", err)
	}
}

// tamper changes the database as somebody with access to its file would.
func tamper(t *testing.T, file, statement string) {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+file+"?_pragma=busy_timeout(10000)")
	must(t, err)
	defer db.Close()
	_, err = db.ExecContext(t.Context(), statement)
	must(t, err)
}

// TestSlowClients: who does not finish a request's head is cut off, and holds up nobody.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.headerTimeout = 300 * time.Millisecond })
	const slow = 50
	var conns []net.Conn
	for range slow {
		c, err := tls.Dial("tcp", l.cfg.Listen, &tls.Config{InsecureSkipVerify: true}) // the peer does not matter here
		must(t, err)
		defer c.Close()
		if _, err = c.Write([]byte("POST /api/v1/enroll HTTP/1.1\r\nHost: x\r\nX-Slow: ")); err == nil { // else it was cut off already
			conns = append(conns, c)
		}
	}
	if len(conns) == 0 {
		t.Fatal("nobody got as far as a request")
	}
	silent, err := net.Dial("tcp", l.cfg.Listen) // does not even begin the handshake
	must(t, err)
	defer silent.Close()
	l.api("GET", "/clients", nil, nil)
	for _, c := range append(conns, silent) {
		must(t, c.SetReadDeadline(time.Now().Add(5*time.Second)))
		if _, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("a slow client was not cut off")
		}
	}
}

// TestMetricsTellTheTruth scrapes before and after something happens.
func TestMetricsTellTheTruth(t *testing.T) {
	t.Parallel()
	reg := prometheus.NewRegistry()
	w := populate(t, start(t, func(c *Config) { c.Metrics = reg }))
	value := func(name string, labels ...string) float64 {
		t.Helper()
		families, err := reg.Gather()
		must(t, err)
		for _, f := range families {
			if f.GetName() != name {
				continue
			}
			for _, m := range f.GetMetric() {
				var have []string
				for _, p := range m.GetLabel() {
					have = append(have, p.GetName(), p.GetValue())
				}
				if len(labels) > 0 && !slices.Equal(have, labels) {
					continue
				}
				return m.GetGauge().GetValue() + m.GetCounter().GetValue()
			}
		}
		return 0
	}
	if v := value("sallyway_platform_nodes", "kind", "relay", "org", "default", "state", "healthy"); v != 2 {
		t.Errorf("%v healthy relays", v)
	}
	if v := value("sallyway_platform_control_streams"); v != 0 {
		t.Errorf("%v streams before any", v)
	}
	f := w.gateway.stream().settled()
	if v := value("sallyway_platform_control_streams"); v != 1 {
		t.Errorf("%v streams", v)
	}
	f.close()
	eventually(t, "the stream is gone from the gauge", func() bool { return value("sallyway_platform_control_streams") == 0 })
	w.do("", "POST", "/api/v1/enroll", w.client.request(), nil)
	if v := value("sallyway_platform_refusals_total", "code", control.CodeTokenUsed); v != 1 {
		t.Errorf("%v refusals", v)
	}
	if v := value("sallyway_platform_ready"); v != 1 {
		t.Errorf("ready %v", v)
	}
}
