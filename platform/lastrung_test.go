package platform

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/relay/fallback"
	"sallyway/relay/reverse"
)

// sshRequest makes a node's request for an SSH certificate, for a new key.
func (n *node) sshRequest(as identity.Node) (ed25519.PrivateKey, string) {
	n.l.t.Helper()
	_, key, err := ed25519.GenerateKey(nil)
	must(n.l.t, err)
	csr, err := identity.Request(key, as)
	must(n.l.t, err)
	return key, string(csr)
}

// joinSSH enrols the node with an SSH key.
func (n *node) joinSSH() (*node, reverse.Identity) {
	n.l.t.Helper()
	req := n.request()
	key, csr := n.sshRequest(n.id)
	req.SSHCSR = csr
	if status, p := n.l.do("", "POST", "/api/v1/enroll", req, &n.enrol); status != 200 {
		n.l.t.Fatalf("enrol %s: %d %+v", n.name, status, p)
	}
	n.login()
	return n, reverse.Identity{Key: key, Certificate: n.enrol.Certificates.SSH}
}

func (n *node) leaf(pem string) *tls.Certificate {
	n.l.t.Helper()
	chain, err := identity.DecodeCertificates([]byte(pem))
	must(n.l.t, err)
	c, err := identity.TLSCertificate(chain, n.key)
	must(n.l.t, err)
	return c
}

// relayOrgs is what relayd makes of its configuration.
func relayOrgs(c *control.Config) map[string]fallback.Organization {
	out := map[string]fallback.Organization{}
	for _, o := range c.Relay.Orgs {
		out[o.Org] = fallback.Organization{Roots: o.Trust.Roots, Pins: o.Trust.Pins, Denied: o.Trust.Denied, SSHCAs: o.SSHCAs}
	}
	return out
}

// TestLastRung: what the platform issues and tells is enough for a relay, a gateway and a client to meet over the last rung, on a relay of
// the organization and on a shared one, and a revocation ends it.
func TestLastRung(t *testing.T) {
	t.Parallel()
	for _, shared := range []bool{false, true} {
		t.Run(map[bool]string{false: "own relay", true: "shared relay"}[shared], func(t *testing.T) {
			l := start(t)
			if shared {
				if status, p := l.do(l.admin.Token, "POST", "/api/v1/orgs", control.CreateOrganization{Name: "second"}, nil); status != 201 {
					t.Fatalf("%+v", p)
				}
			}
			var relay *node
			if shared {
				var made control.CreatedNode
				if status, p := l.do(l.admin.Token, "POST", "/api/v1/shared/relays", control.CreateNode{Name: "world", Host: "127.0.0.1"}, &made); status != 201 {
					t.Fatalf("%+v", p)
				}
				relay = l.fromToken(made.Token)
			} else {
				relay = l.create(identity.Relay, "relay-1")
			}
			relay, host := relay.joinSSH()
			relay.beat(control.Heartbeat{})
			g, ssh := l.create(identity.Gateway, "gw").joinSSH()
			c := l.create(identity.Client, "laptop").join()
			if c.enrol.Certificates.SSH != "" {
				t.Error("a client has an SSH certificate")
			}
			l.api("POST", "/resources", control.CreateResource{Name: "web", Gateways: []string{"gw"}, Address: "10.9.0.2", ICMP: true}, nil)
			l.api("POST", "/policies", control.CreatePolicy{Subject: "client:laptop", Resource: "web"}, nil)

			feed := relay.stream()
			conf := feed.wait("the organization", func(c *control.Config) bool {
				return slices.ContainsFunc(c.Relay.Orgs, func(o control.RelayOrg) bool { return o.Org == "default" })
			})
			for _, o := range conf.Relay.Orgs {
				if o.Trust == nil || len(o.SSHCAs) != 1 || (o.Org == "second") != (shared && o.Org != "default") {
					t.Errorf("%+v", o)
				}
			}
			if conf.Relay.SSHPort != reverse.SSHPort || conf.Relay.TLSPort != reverse.TLSPort {
				t.Errorf("ports %d and %d", conf.Relay.SSHPort, conf.Relay.TLSPort)
			}
			cert := relay.leaf(relay.enrol.Certificates.Leaf)
			loopback := netip.MustParseAddrPort("127.0.0.1:0")
			srv, err := fallback.New(fallback.Config{
				Relay: relay.id, SSH: loopback, TLS: loopback, Certificate: func() (*tls.Certificate, error) { return cert, nil },
				HostIdentity: func() reverse.Identity { return host },
			})
			must(t, err)
			must(t, srv.SetOrganizations(relayOrgs(conf), conf.Relay.Denied))
			must(t, srv.Listen(t.Context()))
			running(t, srv.Run)
			sshAddr, tlsAddr := srv.Addrs()

			ref := g.stream().wait("the relay", func(c *control.Config) bool { return len(c.Gateway.Relays) == 1 }).Gateway.Relays[0]
			if ref.SSHPort != reverse.SSHPort || ref.TLSPort != reverse.TLSPort || len(ref.SSHCAs) != 1 {
				t.Errorf("%+v", ref)
			}
			links := make(chan *reverse.Link, 1)
			tunnel := reverse.NewTunnel(reverse.TunnelConfig{
				Relay: ref.Node, HostCAs: func() []string { return ref.SSHCAs }, Gateway: g.id, Identity: func() reverse.Identity { return ssh },
				Resolve: func(context.Context) ([]netip.AddrPort, error) { return []netip.AddrPort{sshAddr}, nil },
				OnLink:  func(_ identity.Node, l *reverse.Link) { links <- l },
			})
			running(t, tunnel.Run)
			eventually(t, "the gateway is connected: "+tunnel.Status().Error, func() bool { return srv.Snapshot().Gateways == 1 })

			cref := c.stream().wait("the gateway", func(c *control.Config) bool {
				return len(c.Dialling.Gateways) == 1 && len(c.Dialling.Gateways[0].Relays) == 1
			}).Dialling.Gateways[0].Relays[0]
			mine := c.leaf(c.enrol.Certificates.Leaf)
			roots, err := identity.DecodeCertificates([]byte(cref.Roots))
			must(t, err)
			dial := func() (*reverse.Link, error) {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				return reverse.DialTLS(ctx, reverse.TLSConfig{
					Relay: cref.Node, Addrs: []netip.AddrPort{tlsAddr}, Gateway: g.id, Certificate: func() (*tls.Certificate, error) { return mine, nil },
					Verify: func(chain []*x509.Certificate) error {
						_, err := (&identity.Trust{Roots: roots, Pins: cref.Pins}).Verify(chain, x509.ExtKeyUsageServerAuth)
						return err
					},
				})
			}
			up, err := dial()
			must(t, err)
			defer up.Close()
			down := <-links
			down.SetReceiver(echo{down})
			got := make(chan string, 1)
			up.SetReceiver(listener(got))
			up.Send([]byte("hello"), 0, datagram.NotECT)
			if s := <-got; s != "hello" {
				t.Errorf("%q", s)
			}

			l.api("POST", "/gateways/gw/revoke", nil, nil)
			conf = feed.wait("the revoked gateway denied", func(c *control.Config) bool {
				return slices.Contains(c.Relay.Denied, g.id) && slices.ContainsFunc(c.Relay.Orgs, func(o control.RelayOrg) bool {
					return o.Org == "default" && slices.Contains(o.Trust.Denied, identity.HashKey(g.key.Public()))
				})
			})
			must(t, srv.SetOrganizations(relayOrgs(conf), conf.Relay.Denied))
			select {
			case <-up.Done():
			case <-time.After(5 * time.Second):
				t.Error("the revoked gateway's link is up")
			}
			if _, err := dial(); err == nil {
				t.Error("the revoked gateway is reached")
			}
		})
	}
}

// running runs something until the test ends.
func running(t *testing.T, run func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = run(ctx) // ends with ctx
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
}

type echo struct{ to datagram.Link }

func (e echo) Receive(b datagram.Batch) {
	for p, ok := b.Next(); ok; p, ok = b.Next() {
		e.to.Send(p, 0, datagram.NotECT)
	}
	b.Release()
}

type listener chan string

func (l listener) Receive(b datagram.Batch) {
	for p, ok := b.Next(); ok; p, ok = b.Next() {
		l <- string(p)
	}
	b.Release()
}

// TestSSHRequests: what is asked for beside, and by whom it can not be.
func TestSSHRequests(t *testing.T) {
	t.Parallel()
	l := start(t)
	g := l.create(identity.Gateway, "gw")
	c := l.create(identity.Client, "laptop")
	p256 := g.request()
	p256.SSHCSR = p256.CSR
	foreign, clients := g.request(), c.request()
	_, foreign.SSHCSR = g.sshRequest(identity.Node{Org: "default", Kind: identity.Gateway, ID: "g-other"})
	_, clients.SSHCSR = c.sshRequest(c.id)
	for name, req := range map[string]control.EnrolRequest{"P-256": p256, "another node's": foreign, "a client's": clients} {
		if status, p := l.do("", "POST", "/api/v1/enroll", req, nil); status != 422 || p.Code != registry.CodeBadRequest {
			t.Errorf("%s: %d %+v", name, status, p)
		}
	}
	g.join() // an older gateway, which does not ask
	if g.enrol.Certificates.SSH != "" {
		t.Error("a gateway that did not ask has an SSH certificate")
	}
	_, csr := g.sshRequest(g.id)
	req := g.request()
	var out control.RenewResponse
	if status, p := l.do(g.bearer, "POST", "/api/v1/node/renew", control.RenewRequest{CSR: req.CSR, SiteCSR: req.SiteCSR, SSHCSR: csr}, &out); status != 200 ||
		!strings.HasPrefix(out.Certificates.SSH, "ssh-ed25519-cert-v01@openssh.com ") {
		t.Errorf("%d %+v %q", status, p, out.Certificates.SSH)
	}
}

// TestLastRungPorts: relays whose software has no last rung are not shown with one, and an administrator moves its ports or switches them off.
func TestLastRungPorts(t *testing.T) {
	t.Parallel()
	l := start(t)
	l.create(identity.Relay, "old").join()
	if r := show(l, "old"); r.SSHPort != 0 || r.TLSPort != 0 {
		t.Errorf("%+v", r)
	}
	relay, _ := l.create(identity.Relay, "new").joinSSH()
	feed := relay.stream()
	if r := show(l, "new"); r.SSHPort != 2222 || r.TLSPort != 8443 {
		t.Errorf("%+v", r)
	}
	l.api("PATCH", "/relays/new", control.UpdateNode{SSHPort: ptr(uint16(0)), TLSPort: ptr(uint16(443))}, nil)
	if r := show(l, "new"); r.SSHPort != 0 || r.TLSPort != 443 {
		t.Errorf("%+v", r)
	}
	feed.wait("the relay is told", func(c *control.Config) bool { return c.Relay.SSHPort == 0 && c.Relay.TLSPort == 443 })
	l.create(identity.Gateway, "gw")
	if status, _ := l.do(l.admin.Token, "PATCH", "/api/v1/orgs/default/gateways/gw", control.UpdateNode{TLSPort: ptr(uint16(1))}, nil); status != 422 {
		t.Errorf("a gateway with a port: %d", status)
	}
}

func show(l *lab, relay string) (r control.NodeRecord) {
	l.t.Helper()
	l.api("GET", "/relays/"+relay, nil, &r)
	return r
}

// TestOlderDatabaseGetsAnSSHAuthority: organizations that were made before there was an SSH CA have one after the next start.
func TestOlderDatabaseGetsAnSSHAuthority(t *testing.T) {
	t.Parallel()
	l := start(t)
	l.stop()
	tamper(t, l.cfg.Data+"/platform.db", "DELETE FROM authorities WHERE kind = 'ssh'")
	l.run()
	_, id := l.create(identity.Gateway, "gw").joinSSH()
	if _, _, err := id.Parse(); err != nil {
		t.Error(err)
	}
	if !l.audited("default", "organization.ssh-ca", "default", "") {
		t.Error("the new CA is not audited")
	}
}
