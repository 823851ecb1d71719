package doctor

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/egress"
	"sallyway/internal/identity"
)

func TestMain(m *testing.M) {
	patience = 500 * time.Millisecond
	goleak.VerifyTestMain(m)
}

// state writes a state folder of a node that knows a platform and one relay.
func state(t *testing.T, kind identity.Kind, platform, pin string, ref control.RelayRef) string {
	t.Helper()
	dir := t.TempDir()
	node := identity.Node{Org: "acme", Kind: kind, ID: "n-1"}
	cfg := control.Config{Node: node}
	if kind == identity.Gateway {
		cfg.Gateway = &control.Gateway{Relays: []control.RelayRef{ref}}
	} else {
		cfg.Dialling = &control.Dialling{Gateways: []control.GatewayRef{{Relays: []control.RelayRef{ref}}, {Relays: []control.RelayRef{ref}}}}
	}
	for name, v := range map[string]any{
		"node.json":   map[string]any{"node": node, "name": "here", "url": platform, "pin": pin},
		"config.json": map[string]any{"config": cfg},
	} {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// rows are a doctor's rows by name.
func rows(t *testing.T, dir string) map[string]daemon.Check {
	t.Helper()
	out := map[string]daemon.Check{}
	for _, c := range Network(t.Context(), dir) {
		out[c.Check] = c
		if c.Result != daemon.Pass && c.Remedy == "" {
			t.Errorf("%s is %s and has no remedy: %s", c.Check, c.Result, c.Detail)
		}
	}
	return out
}

func want(t *testing.T, got map[string]daemon.Check, check string, r daemon.Result, parts ...string) {
	t.Helper()
	c, ok := got[check]
	if !ok {
		t.Errorf("no row %q in %v", check, got)
		return
	}
	if c.Result != r {
		t.Errorf("%s is %s, want %s: %s", check, c.Result, r, c.Detail)
	}
	for _, p := range parts {
		if !strings.Contains(c.Detail+c.Remedy, p) {
			t.Errorf("%s lacks %q: %s; %s", check, p, c.Detail, c.Remedy)
		}
	}
}

func TestNobodyEnrolled(t *testing.T) {
	want(t, rows(t, t.TempDir()), "enrolment", daemon.Fail, "create NAME")
}

// TestInterception: somebody with another certificate answers in the platform's and in the relay's place, and nobody speaks STUN or SSH.
func TestInterception(t *testing.T) {
	srv := httptest.NewUnstartedServer(http.NotFoundHandler())
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	defer srv.Close()
	port := netip.MustParseAddrPort(srv.Listener.Addr().String()).Port()
	ref := control.RelayRef{
		Node: identity.Node{Org: "acme", Kind: identity.Relay, ID: "r-1"}, Name: "fra-1", Host: "127.0.0.1", Port: port, SSHPort: port,
		Roots: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})),
	}
	got := rows(t, state(t, identity.Gateway, srv.URL, strings.Repeat("ab", 32), ref))
	want(t, got, "platform from here", daemon.Fail, "another CA", "Acme Co", "TLS inspection")
	want(t, got, "relay fra-1 by tls", daemon.Fail, "Acme Co")
	want(t, got, "relay fra-1 by udp", daemon.Fail, "UDP port")
	want(t, got, "DNS", daemon.Pass)
	if _, there := got["path MTU to fra-1"]; there {
		t.Error("a path MTU without a path")
	}
	// Without a pin the system's roots do not know it either.
	want(t, rows(t, state(t, identity.Client, srv.URL, "", ref)), "platform from here", daemon.Fail)
}

func TestBanner(t *testing.T) {
	serve := func(line string) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = c.Write([]byte(line)) // the test looks at what arrives
				c.Close()
			}
		}()
		t.Cleanup(func() { l.Close(); <-done })
		return l.Addr().String()
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if s, err := banner(ctx, new(egress.Dialer), serve("SSH-2.0-Go\r\n"), 2222); err != nil || !strings.Contains(s, "SSH-2.0-Go") {
		t.Errorf("%q, %v", s, err)
	}
	if _, err := banner(ctx, new(egress.Dialer), serve("HTTP/1.0 400 Bad Request\r\n"), 2222); err == nil || !strings.Contains(err.Error(), "no SSH") {
		t.Errorf("%v", err)
	}
}

func TestRefusedIsSaidPlainly(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := netip.MustParseAddrPort(l.Addr().String()).Port()
	l.Close()
	ref := control.RelayRef{Node: identity.Node{Org: "acme", Kind: identity.Relay, ID: "r-1"}, Name: "fra-1", Host: "127.0.0.1", Port: port}
	got := rows(t, state(t, identity.Client, "https://127.0.0.1:"+l.Addr().String()[len("127.0.0.1:"):], "", ref))
	want(t, got, "relay fra-1 by tls", daemon.Fail, "refused")
	want(t, got, "platform from here", daemon.Fail)
	want(t, got, "NAT", daemon.Warn)
}
