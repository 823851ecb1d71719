package platformd

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/letsencrypt/pebble/v2/ca"
	"github.com/letsencrypt/pebble/v2/db"
	"github.com/letsencrypt/pebble/v2/va"
	"github.com/letsencrypt/pebble/v2/wfe"
	"github.com/miekg/dns"

	"sallyway/platform"
)

// authority is an ACME server that validates for real, at a port of ours, names that all lie on this host.
type authority struct {
	directory, caFile string
	roots             *x509.CertPool
}

func openAuthority(t *testing.T, tlsPort int) *authority {
	t.Helper()
	t.Setenv("PEBBLE_VA_NOSLEEP", "1")
	names, err := net.Listen("tcp", "127.0.0.1:0") // the validator asks by TCP
	if err != nil {
		t.Fatal(err)
	}
	zone := &dns.Server{Listener: names, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		if name := q.Question[0]; name.Qtype == dns.TypeA && strings.HasSuffix(name.Name, "platform.example.") {
			m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: name.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1}, A: net.IPv4(127, 0, 0, 1)})
		}
		_ = w.WriteMsg(m) // who asked has gone: it asks again
	})}
	go func() { _ = zone.ActivateAndServe() }() // ends with Shutdown
	t.Cleanup(func() { _ = zone.Shutdown() })

	a := &authority{roots: x509.NewCertPool()}
	quiet := log.New(io.Discard, "", 0)
	memory := db.NewMemoryStore()
	issuer := ca.New(quiet, memory, "", "ecdsa", 0, 1, map[string]ca.Profile{"default": {Description: "default"}})
	validator := va.New(quiet, 1, tlsPort, true, names.Addr().String(), memory)
	front := wfe.New(quiet, memory, validator, issuer, []string{"authority.example"}, true, false, 1, 1)
	srv := httptest.NewTLSServer(front.Handler())
	t.Cleanup(srv.Close)
	a.directory = srv.URL + wfe.DirectoryPath
	a.caFile = filepath.Join(t.TempDir(), "directory.pem")
	if err := os.WriteFile(a.caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	a.roots.AppendCertsFromPEM(issuer.GetRootCert(0).PEM())
	return a
}

// TestACME has a platform get its certificate from an authority that looks for it at its port, and another one on the same data find it.
func TestACME(t *testing.T) {
	probe, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listen := probe.Addr().String()
	_, port, _ := net.SplitHostPort(listen)
	number, _ := strconv.Atoi(port)
	_ = probe.Close() // its port is the platform's now
	a := openAuthority(t, number)
	cfg := platform.Config{
		Data: t.TempDir(), Listen: listen, AdvertiseURL: "https://platform.example:" + port,
		ACME: platform.ACME{Domains: []string{"platform.example"}, Directory: a.directory, CAFile: a.caFile},
	}

	serial := ""
	for round := range 2 {
		ctx, cancel := context.WithCancel(t.Context())
		srv, err := platform.Open(ctx, cfg)
		if err != nil {
			t.Fatal(err)
		}
		if srv.Pin() != "" || srv.URL() != "https://platform.example:"+port {
			t.Errorf("URL %s, pin %q", srv.URL(), srv.Pin())
		}
		done := make(chan error, 1)
		go func() { done <- srv.Run(ctx) }()
		shown := func(name string) (*x509.Certificate, error) {
			d := tls.Dialer{Config: &tls.Config{RootCAs: a.roots, ServerName: name}}
			c, err := d.DialContext(ctx, "tcp", listen)
			if err != nil {
				return nil, err
			}
			defer c.Close()
			return c.(*tls.Conn).ConnectionState().PeerCertificates[0], nil
		}
		var cert *x509.Certificate
		for deadline := time.Now().Add(time.Minute); cert == nil; time.Sleep(50 * time.Millisecond) {
			if cert, err = shown("platform.example"); err != nil && time.Now().After(deadline) {
				t.Fatal(err, srv.Conditions())
			}
		}
		if got := cert.SerialNumber.String(); round == 0 {
			serial = got
		} else if got != serial {
			t.Error("the platform got a second certificate after its restart")
		}
		if _, err := shown("elsewhere.platform.example"); err == nil {
			t.Error("a certificate was obtained for a name that is not configured")
		}
		client := &http.Client{Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: a.roots}, DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "tcp", listen)
			},
		}}
		ready := func() bool {
			resp, err := client.Get(srv.URL() + "/readyz")
			if err != nil {
				return false
			}
			_ = resp.Body.Close()
			return resp.StatusCode == http.StatusOK
		}
		for deadline := time.Now().Add(time.Minute); !ready(); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("not ready: %v", srv.Conditions())
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	b, err := os.ReadFile(filepath.Join(cfg.Data, "platform.db"))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(b, []byte("PRIVATE KEY")) {
		t.Error("a key lies in the database unsealed")
	}
}

func TestACMERefused(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*platform.Config)
		want   string
	}{
		{"with a certificate", func(c *platform.Config) { c.TLSCert, c.TLSKey = "a", "b" }, "use one of --tls-cert and --acme-domain"},
		{"without HTTPS", func(c *platform.Config) { c.Listen, c.HTTPListen = "", "127.0.0.1:0" }, "give one with --listen"},
		{"an address", func(c *platform.Config) { c.ACME.Domains = []string{"192.0.2.1"} }, "no domain name"},
		{"a wildcard", func(c *platform.Config) { c.ACME.Domains = []string{"*.example.com"} }, "no domain name"},
		{"another host advertised", func(c *platform.Config) { c.AdvertiseURL = "https://other.example" }, "add it to --acme-domain"},
		{"a directory alone", func(c *platform.Config) { c.ACME.Domains = nil; c.ACME.Directory = "https://acme.example/dir" }, "name it with --acme-domain"},
		{"plain HTTP", func(c *platform.Config) { c.ACME.Directory = "http://acme.example/dir" }, "not an https URL"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := platform.Config{Data: t.TempDir(), Listen: "127.0.0.1:0", ACME: platform.ACME{Domains: []string{"platform.example"}}}
			tc.change(&c)
			srv, err := platform.Open(t.Context(), c)
			if err == nil {
				_ = srv.Close()
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("error %v, want one with %q", err, tc.want)
			}
		})
	}
}
