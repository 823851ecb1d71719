package agent_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/control/agent"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform"
)

// The tests of this file run the agent against the real platform, in process.

// startPlatform serves a platform from dir on addr until the returned function is called.
func startPlatform(t *testing.T, dir, addr string) (srv *platform.Server, stop func()) {
	t.Helper()
	srv, err := platform.Open(t.Context(), platform.Config{Data: dir, Listen: addr})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	return srv, sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("platform: %v", err)
		}
	})
}

type node struct {
	*agent.Agent
	log  *safeBuffer
	stop func()
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *safeBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *safeBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func startNode(t *testing.T, dir, token string, kind identity.Kind) *node {
	t.Helper()
	log := new(safeBuffer)
	a, err := agent.Open(t.Context(), agent.Config{
		StateDir: dir, Kind: kind, Token: token, Version: "v1", EnrolTimeout: 5 * time.Second,
		Logger: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	return &node{Agent: a, log: log, stop: sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("agent: %v", err)
		}
	})}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("timed out waiting until %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestRealPlatform(t *testing.T) {
	data := t.TempDir()
	srv, stopPlatform := startPlatform(t, data, "127.0.0.1:0")
	defer func() { stopPlatform() }()
	reg := srv.Registry()
	const org = "default"
	create := func(kind identity.Kind, req control.CreateNode) *control.CreatedNode {
		t.Helper()
		n, err := reg.CreateNode(t.Context(), org, kind, req)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	relayMade := create(identity.Relay, control.CreateNode{Name: "fra-1", Host: "192.0.2.1"})
	gatewayMade := create(identity.Gateway, control.CreateNode{Name: "office"})
	clientMade := create(identity.Client, control.CreateNode{Name: "laptop"})

	gwDir := t.TempDir()
	gw := startNode(t, gwDir, gatewayMade.Token, identity.Gateway)
	defer func() { gw.stop() }()
	cl := startNode(t, t.TempDir(), clientMade.Token, identity.Client)
	defer cl.stop()
	rl := startNode(t, t.TempDir(), relayMade.Token, identity.Relay)
	defer rl.stop()
	for _, n := range []*node{gw, cl, rl} {
		eventually(t, n.Name()+" has its configuration", func() bool { return n.Status().Connected && n.Config() != nil })
		if n.Name() == n.Node().ID || n.Config().Node != n.Node() {
			t.Errorf("%s: configuration of %v", n.Name(), n.Config().Node)
		}
		if _, err := n.Certificate(); err != nil {
			t.Errorf("%s: %v", n.Name(), err)
		}
	}
	if _, err := gw.SiteCertificate(); err != nil {
		t.Errorf("gateway as a site: %v", err)
	}
	if rl.Config().Relay == nil || len(rl.Config().Relay.Keys) == 0 {
		t.Errorf("relay's configuration %+v", rl.Config().Relay)
	}
	eventually(t, "the platform saw a heartbeat", func() bool {
		n, err := reg.Node(t.Context(), org, identity.Gateway, "office")
		return err == nil && n.LastSeen != nil && n.Version == "v1"
	})

	// The certificates of each prove themselves to the other.
	trust, err := gw.Trust(identity.Client)
	if err != nil {
		t.Fatal(err)
	}
	if who, err := trust.Verify(chain(t, cl.Agent), x509.ExtKeyUsageClientAuth); err != nil || who != cl.Node() {
		t.Errorf("client at the gateway: %v, %v", who, err)
	}

	// A change reaches the gateway as a snapshot, and the client as what it may reach.
	if _, err := reg.CreateResource(t.Context(), org, control.CreateResource{Name: "db", Gateways: []string{"office"}, Address: "10.0.3.7", TCP: []policy.PortRange{{First: 5432, Last: 5432}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := reg.CreatePolicy(t.Context(), org, control.CreatePolicy{Subject: "client:laptop", Resource: "db"}); err != nil {
		t.Fatal(err)
	}
	target := policy.Target{Proto: policy.TCP, Host: "10.0.3.7", Port: 5432}
	target.Addr = netip.MustParseAddr("10.0.3.7")
	allowed := func(n *node) bool {
		s, err := n.Snapshot()
		return err == nil && s.Evaluate(cl.Node(), target).Allowed
	}
	eventually(t, "the gateway allows it", func() bool { return allowed(gw) })
	eventually(t, "the client knows of it", func() bool {
		d := cl.Config().Dialling
		return d != nil && slices.ContainsFunc(d.Resources, func(r control.ReachableResource) bool { return r.Name == "db" })
	})

	// The platform restarts: the streams come back by themselves.
	addr := strings.TrimPrefix(srv.URL(), "https://")
	stopPlatform()
	eventually(t, "the gateway notices", func() bool { return !gw.Status().Connected })
	if !allowed(gw) {
		t.Error("the gateway lost its policies with the platform")
	}
	gw.stop()
	gw = startNode(t, gwDir, gatewayMade.Token, identity.Gateway) // the same token again, platform down
	if !allowed(gw) {
		t.Error("the gateway started without its cached policies")
	}
	srv, stopPlatform = startPlatform(t, data, addr)
	reg = srv.Registry()
	for _, n := range []*node{gw, cl, rl} {
		eventually(t, n.Name()+" is back", func() bool { return n.Status().Connected })
		if n.Status().ConfigError != "" {
			t.Errorf("%s: %s", n.Name(), n.Status().ConfigError)
		}
	}

	// A revoked client is told so, and the gateway denies its key.
	if _, err := reg.RevokeNode(t.Context(), org, identity.Client, "laptop"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the client is refused", func() bool { return cl.Status().Blocked != "" })
	if st := cl.Status(); !strings.Contains(st.Error, "revoked") || st.Remedy == "" {
		t.Errorf("status of the revoked client: %+v", st)
	}
	eventually(t, "the gateway denies the key", func() bool {
		tr, err := gw.Trust(identity.Client)
		if err != nil {
			return false
		}
		_, err = tr.Verify(chain(t, cl.Agent), x509.ExtKeyUsageClientAuth)
		var revoked *identity.RevokedError
		return errors.As(err, &revoked)
	})

	// Spent elsewhere: refused with a reason and exit code 3's error.
	_, err = agent.Open(t.Context(), agent.Config{StateDir: t.TempDir(), Kind: identity.Gateway, Token: gatewayMade.Token})
	var refused *agent.EnrolmentRefusedError
	if !errors.As(err, &refused) || !strings.Contains(refused.Reason, "used") || refused.Remedy == "" {
		t.Errorf("a token used twice: %v", err)
	}
	for _, n := range []*node{gw, cl, rl} {
		for _, secret := range []string{gatewayMade.Token, clientMade.Token, relayMade.Token} {
			if strings.Contains(n.log.String(), secret) {
				t.Errorf("the log of %s holds a token", n.Name())
			}
		}
	}
}

// chain is a node's own certificate chain as a peer sees it.
func chain(t *testing.T, a *agent.Agent) []*x509.Certificate {
	t.Helper()
	c, err := a.Certificate()
	if err != nil {
		t.Fatal(err)
	}
	var out []*x509.Certificate
	for _, der := range c.Certificate {
		x, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, x)
	}
	return out
}
