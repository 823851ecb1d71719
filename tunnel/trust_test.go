package tunnel

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyway/internal/identity"
)

// Every way in which an end's identity can be wrong must fail closed, and one of the two ends must say which it was.
func TestIdentityFailsClosed(t *testing.T) {
	server, client := x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth
	other := newTestCA(t, "acme")   // an organization of the same name with other keys
	foreign := newTestCA(t, "evil") // another one
	for _, tc := range []struct {
		name   string
		server func(w *world, c *ServeConfig)
		client func(w *world, c *DialConfig)
		want   string // in the client's error or in the gateway's log
	}{
		{"gateway is another", func(w *world, c *ServeConfig) {
			c.Certificate = always(w.ca.leaf(identity.Node{Org: "acme", Kind: identity.Gateway, ID: "g-two"}, server))
		}, nil, "acme/gateway/g-two answered, want acme/gateway/g-one"},
		{"gateway shows a client's name", func(w *world, c *ServeConfig) { c.Certificate = always(w.ca.leaf(w.client, server)) }, nil, "answered, want"},
		{"gateway shows a client's certificate", func(w *world, c *ServeConfig) { c.Certificate = always(w.ca.leaf(w.gateway, client)) }, nil, "incompatible key usage"},
		{"gateway of another organization", func(w *world, c *ServeConfig) {
			c.Certificate = always(foreign.leaf(identity.Node{Org: "evil", Kind: identity.Gateway, ID: "g-one"}, server))
		}, nil, "unknown authority"},
		{"gateway of an organization of the same name", func(w *world, c *ServeConfig) { c.Certificate = always(other.leaf(w.gateway, server)) }, nil, "unknown authority"},
		{"client pins another CA", nil, func(w *world, c *DialConfig) {
			c.Trust = func() *identity.Trust {
				tr := w.ca.trust()
				tr.Pins = []identity.KeyHash{{1}}
				return tr
			}
		}, "not issued by a pinned CA key"},
		{"gateway's key is revoked", nil, func(w *world, c *DialConfig) {
			cert, _ := w.serve.Certificate()
			c.Trust = func() *identity.Trust {
				tr := w.ca.trust()
				tr.Denied = []identity.KeyHash{identity.CertificateKeyHash(cert.Leaf)}
				return tr
			}
		}, "revoked"},
		{"client of another organization", nil, func(w *world, c *DialConfig) {
			c.Certificate = always(foreign.leaf(identity.Node{Org: "evil", Kind: identity.Client, ID: "c-one"}, client))
		}, "unknown authority"},
		{"client of an organization of the same name", nil, func(w *world, c *DialConfig) { c.Certificate = always(other.leaf(w.client, client)) }, "unknown authority"},
		{"client shows a gateway's certificate", nil, func(w *world, c *DialConfig) { c.Certificate = always(w.ca.leaf(w.gateway, server)) }, "incompatible key usage"},
		{"client is of kind gateway", nil, func(w *world, c *DialConfig) { c.Certificate = always(w.ca.leaf(w.gateway, client)) }, "only clients and sites"},
		{"client is of kind relay", nil, func(w *world, c *DialConfig) {
			c.Certificate = always(w.ca.leaf(identity.Node{Org: "acme", Kind: identity.Relay, ID: "r-one"}, client))
		}, "only clients and sites"},
		{"the platform of another organization", nil, func(w *world, c *DialConfig) {
			c.Certificate = always(foreign.leaf(identity.Node{Org: "evil", Kind: identity.Platform, ID: "p-one"}, client))
		}, "unknown authority"},
		{"the platform in the name of another organization", nil, func(w *world, c *DialConfig) {
			c.Certificate = always(w.ca.leaf(identity.Node{Org: "evil", Kind: identity.Platform, ID: "p-one"}, client))
		}, "is of another organization"},
		{"the platform shows a server's certificate", nil, func(w *world, c *DialConfig) {
			c.Certificate = always(w.ca.leaf(identity.Node{Org: "acme", Kind: identity.Platform, ID: "p-one"}, server))
		}, "incompatible key usage"},
		{"client is of kind policy", nil, func(w *world, c *DialConfig) {
			c.Certificate = always(w.ca.leaf(identity.Node{Org: "acme", Kind: identity.Policy, ID: "p-one"}, client))
		}, "only clients and sites"},
		{"gateway is of kind platform", func(w *world, c *ServeConfig) {
			c.Certificate = always(w.ca.leaf(identity.Node{Org: "acme", Kind: identity.Platform, ID: "g-one"}, server))
		}, nil, "answered, want"},
		{"client's key is revoked", nil, func(w *world, c *DialConfig) {
			w.mu.Lock()
			defer w.mu.Unlock()
			tr := *w.trust
			tr.Denied = []identity.KeyHash{identity.CertificateKeyHash(w.cert.Leaf)}
			w.trust = &tr
		}, "revoked"},
		{"gateway pins another CA", func(w *world, c *ServeConfig) {
			tr := w.ca.trust()
			tr.Pins = []identity.KeyHash{{1}}
			w.trust = tr
		}, nil, "not issued by a pinned CA key"},
		{"client without certificate", nil, func(w *world, c *DialConfig) { c.Certificate = always(&tls.Certificate{}) }, "certificate"},
		{"handler does not want it", func(w *world, c *ServeConfig) {
			w.handler.authorize = func(p Peer) error { return Denied("default deny", p.Node.String()+" is unknown") }
		}, nil, "acme/client/c-one is unknown"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var log logBuffer
			w := newWorld(t, func(c *ServeConfig) {
				c.Logger = log.logger()
			})
			if tc.server != nil {
				w = newWorldFunc(t, func(w *world, c *ServeConfig) {
					c.Logger = log.logger()
					tc.server(w, c)
				})
			}
			cfg := w.config(w.link("a"))
			if tc.client != nil {
				tc.client(w, &cfg)
			}
			s, err := Dial(timeout(t, 5*time.Second), cfg)
			if err == nil {
				s.Close("")
				t.Fatal("the session was opened")
			}
			if !errors.Is(err, ErrNoSession) {
				t.Errorf("%v is not ErrNoSession", err)
			}
			if !strings.Contains(err.Error(), tc.want) && !log.contains(tc.want) {
				t.Errorf("neither the error (%v) nor the gateway's log says %q", err, tc.want)
			}
			if n := len(w.server.Sessions()); n != 0 {
				t.Errorf("%d sessions", n)
			}
		})
	}
}

func TestSiteMayDial(t *testing.T) {
	for _, n := range []identity.Node{{Org: "acme", Kind: identity.Site, ID: "g-two"}, {Org: "acme", Kind: identity.Platform, ID: "p-one"}} {
		w := newWorld(t, nil)
		s := w.dial(w.link("a"), func(c *DialConfig) { c.Certificate = always(w.ca.leaf(n, x509.ExtKeyUsageClientAuth)) })
		if got := w.server.Sessions()[0].Peer.Node; got != n {
			t.Errorf("peer %v, want %v", got, n)
		}
		s.Close("")
	}
}

func TestRevocationEndsOpenSessions(t *testing.T) {
	w := newWorld(t, nil)
	port := tcpServer(t, echo)
	s := w.dial(w.link("a"), nil)
	c, err := s.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port)
	if err != nil {
		t.Fatal(err)
	}
	key := identity.CertificateKeyHash(w.cert.Leaf)
	if n := w.server.CloseWhere(func(p Peer) (string, bool) { return "x", p.Key != key }); n != 0 {
		t.Fatalf("%d sessions of others ended", n)
	}
	if n := w.server.CloseWhere(func(p Peer) (string, bool) { return "your key was revoked", p.Key == key }); n != 1 {
		t.Fatalf("%d sessions ended", n)
	}
	select {
	case <-s.Done():
	case <-time.After(5 * time.Second):
		t.Fatal("the session lives")
	}
	e, ok := errors.AsType[*SessionError](s.Err())
	if !ok || e.Code != CloseRevoked || e.Reason != "your key was revoked" || !e.Remote || !errors.Is(e, ErrDenied) {
		t.Fatalf("session ended with %v", s.Err())
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, ErrNoSession) || !errors.Is(err, ErrDenied) {
		t.Fatalf("read: %v", err)
	}
	if _, err := s.DialTCP(timeout(t, time.Second), "127.0.0.1", port); !errors.Is(err, ErrNoSession) {
		t.Fatalf("dial: %v", err)
	}
	if _, err := s.DialUDP(timeout(t, time.Second), "127.0.0.1", port); !errors.Is(err, ErrNoSession) {
		t.Fatalf("dial: %v", err)
	}
}

func TestLimitsAndDrain(t *testing.T) {
	var ended sync.WaitGroup
	ended.Add(2)
	w := newWorld(t, func(c *ServeConfig) {
		c.Limits = Limits{Sessions: 2, Flows: 3}
		c.OnSession = func(_ SessionInfo, end error) {
			if end != nil {
				ended.Done()
			}
		}
	})
	port := tcpServer(t, echo)
	notices := make(chan Notice, 10)
	s1 := w.dial(w.link("a"), func(c *DialConfig) { c.OnNotice = func(n Notice) { notices <- n } })
	s2 := w.dial(w.link("b"), nil)
	if _, err := Dial(timeout(t, 5*time.Second), w.config(w.link("c"))); !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), "limit") {
		t.Fatalf("third session: %v", err)
	}
	var flows []*Stream
	for i, s := range []*Session{s1, s2, s1} {
		c, err := s.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port)
		if err != nil {
			t.Fatalf("flow %d: %v", i, err)
		}
		flows = append(flows, c)
	}
	if _, err := s2.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port); !errors.Is(err, ErrLimit) {
		t.Fatalf("fourth flow: %v", err)
	}
	flows[0].Reset()
	eventually(t, "a free flow", func() bool { return w.server.Sessions()[0].Flows == 1 })
	c, err := s2.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port)
	if err != nil {
		t.Fatal(err)
	}
	w.server.Drain("maintenance")
	if n := <-notices; n.Type != NoticeDraining || n.Reason != "maintenance" {
		t.Fatalf("notice %+v", n)
	}
	if _, err := s2.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port); err == nil || !strings.Contains(err.Error(), "maintenance") {
		t.Fatalf("flow while draining: %v", err)
	}
	_, _ = c.Write([]byte("x")) // open flows go on
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	s1.Close("bye")
	if _, err := Dial(timeout(t, 5*time.Second), w.config(w.link("d"))); err == nil || !strings.Contains(err.Error(), "maintenance") {
		t.Fatalf("session while draining: %v", err)
	}
	s2.Close("bye")
	ended.Wait()
	if !errors.Is(s1.Err(), ErrNoSession) {
		t.Fatal(s1.Err())
	}
}

func TestNotices(t *testing.T) {
	up, down := make(chan Notice, 1), make(chan Notice, 1)
	w := newWorld(t, func(c *ServeConfig) { c.OnNotice = func(_ Peer, n Notice) { up <- n } })
	s := w.dial(w.link("a"), func(c *DialConfig) { c.OnNotice = func(n Notice) { down <- n } })
	if err := s.Notify(Notice{Type: "paths", Data: []byte(`{"a":1}`)}); err != nil {
		t.Fatal(err)
	}
	if n := <-up; n.Type != "paths" || string(n.Data) != `{"a":1}` {
		t.Fatalf("%+v", n)
	}
	if n := w.server.Notify(func(p Peer) bool { return p.Node == w.client }, Notice{Type: "relays", Reason: "moved"}); n != 1 {
		t.Fatalf("told %d", n)
	}
	if n := <-down; n.Type != "relays" || n.Reason != "moved" {
		t.Fatalf("%+v", n)
	}
	if err := s.Notify(Notice{Type: strings.Repeat("x", maxNotice)}); err == nil {
		t.Fatal("a notice over the limit was taken")
	}
}

func TestRetryUnderLoad(t *testing.T) {
	for _, limit := range []int{-1, 100} {
		w := newWorld(t, func(c *ServeConfig) { c.Limits.Handshakes = limit })
		c, g := newLinkPair(t)
		var mu sync.Mutex
		retries := 0
		look := func(b []byte) {
			// Long header of version 1 with packet type Retry (RFC 9000 §17.2.5).
			if b[0]&0xf0 == 0xf0 && b[4] == 1 {
				mu.Lock()
				retries++
				mu.Unlock()
			}
		}
		g.onSend.Store(&look)
		if _, err := w.merged.Add(g, LinkInfo{}); err != nil {
			t.Fatal(err)
		}
		w.dial(c, nil).Close("")
		mu.Lock()
		if (limit < 0) != (retries > 0) {
			t.Errorf("limit %d: %d Retry packets", limit, retries)
		}
		mu.Unlock()
	}
}

func TestNobodyAnswers(t *testing.T) {
	w := newWorld(t, nil)
	l := w.link("a")
	cut(l, true)
	if _, err := Dial(timeout(t, 100*time.Millisecond), w.config(l)); !errors.Is(err, ErrTimeout) {
		t.Fatalf("got %v", err)
	}
	cfg := w.config(l)
	cfg.HandshakeTimeout = 100 * time.Millisecond
	if _, err := Dial(timeout(t, 5*time.Second), cfg); !errors.Is(err, ErrTimeout) {
		t.Fatalf("got %v", err)
	}
}

func TestGatewayRestart(t *testing.T) {
	for _, moved := range []bool{false, true} {
		w := newWorld(t, nil)
		s := w.dial(w.link("a"), nil)
		if moved {
			if err := s.Standby(timeout(t, 5*time.Second), w.link("b"), LinkInfo{}); err != nil {
				t.Fatal(err)
			}
			if err := s.Failover("to see"); err != nil {
				t.Fatal(err)
			}
		}
		// Another process with the same keys is all that can be reached now.
		w2 := newWorld(t, nil)
		if err := s.Repoint(w2.link("new"), LinkInfo{}, "the gateway is elsewhere"); err != nil {
			t.Fatal(err)
		}
		select {
		case <-s.Done():
		case <-time.After(5 * time.Second):
			t.Fatalf("moved %v: the restart was not noticed", moved)
		}
		if e, ok := errors.AsType[*SessionError](s.Err()); !ok || !strings.Contains(e.Reason, "restarted") {
			t.Fatalf("got %v", s.Err())
		}
	}
}

func TestIdleTimeout(t *testing.T) {
	w := newWorld(t, nil)
	l := w.link("a")
	s := w.dial(l, func(c *DialConfig) { c.IdleTimeout = 300 * time.Millisecond })
	cut(l, true)
	select {
	case <-s.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the session lives")
	}
	if !errors.Is(s.Err(), ErrTimeout) {
		t.Fatalf("got %v", s.Err())
	}
}
