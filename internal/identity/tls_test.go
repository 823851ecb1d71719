package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// outcome is what both ends of a connection saw.
type outcome struct {
	client, server error
	resumed        bool
	alpn           string
}

// connect makes a TLS connection over loopback and sends a byte each way: in TLS 1.3 a client learns of its refusal only then.
func connect(t *testing.T, clientCfg, serverCfg *tls.Config) outcome {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var out outcome
	done := make(chan struct{})
	go func() {
		defer close(done)
		out.server = func() error {
			raw, err := ln.Accept()
			if err != nil {
				return err
			}
			defer raw.Close()
			_ = raw.SetDeadline(time.Now().Add(10 * time.Second))
			c := tls.Server(raw, serverCfg)
			defer c.Close()
			var b [1]byte
			if _, err := io.ReadFull(c, b[:]); err != nil {
				return err
			}
			_, err = c.Write(b[:])
			return err
		}()
	}()
	out.client = func() error {
		raw, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			return err
		}
		defer raw.Close()
		_ = raw.SetDeadline(time.Now().Add(10 * time.Second))
		c := tls.Client(raw, clientCfg)
		defer c.Close()
		if err := c.Handshake(); err != nil {
			return err
		}
		out.resumed, out.alpn = c.ConnectionState().DidResume, c.ConnectionState().NegotiatedProtocol
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		var b [1]byte
		_, err = io.ReadFull(c, b[:])
		return err
	}()
	<-done
	return out
}

// ends are the configurations of a client and a server of one organization, and what their checks saw.
type ends struct {
	client, server       *tls.Config
	sawClient, sawServer atomic.Int32 // times a check ran, at the server and at the client
	trust                atomic.Pointer[Trust]
	node                 atomic.Pointer[Node] // whom the server proved last
}

func newEnds(ca *testCA, clientCert, serverCert *tls.Certificate) *ends {
	e := &ends{}
	e.trust.Store(ca.trust())
	e.client = TLSConfig(func() (*tls.Certificate, error) { return clientCert, nil }, false, []string{"sallyway-test/1"}, func(chain []*x509.Certificate) error {
		e.sawServer.Add(1)
		_, err := e.trust.Load().Verify(chain, x509.ExtKeyUsageServerAuth)
		return err
	})
	e.server = TLSConfig(func() (*tls.Certificate, error) { return serverCert, nil }, true, []string{"sallyway-test/1"}, func(chain []*x509.Certificate) error {
		e.sawClient.Add(1)
		n, err := e.trust.Load().Verify(chain, x509.ExtKeyUsageClientAuth)
		e.node.Store(&n)
		return err
	})
	return e
}

func TestTLSMutual(t *testing.T) {
	defer goleak.VerifyNone(t)
	ca := newTestCA(t, "acme")
	e := newEnds(ca, ca.leaf(client1, client), ca.leaf(gateway1, server))
	for i := range 3 {
		// The name only routes: whatever is asked for, the identity is the certificate's.
		e.client.ServerName = []string{"", "g-2.acme.sallyway", "example.com"}[i]
		out := connect(t, e.client, e.server)
		if out.client != nil || out.server != nil || out.alpn != "sallyway-test/1" || *e.node.Load() != client1 {
			t.Fatalf("%+v, peer %v", out, e.node.Load())
		}
		if got := e.sawClient.Load(); got != int32(i+1) || e.sawServer.Load() != got {
			t.Errorf("after %d handshakes the checks ran %d and %d times", i+1, got, e.sawServer.Load())
		}
	}
}

func TestTLSRefusals(t *testing.T) {
	defer goleak.VerifyNone(t)
	acme, evil := newTestCA(t, "acme"), newTestCA(t, "acme")
	clientCert, serverCert := acme.leaf(client1, client), acme.leaf(gateway1, server)
	stolen := *clientCert // the certificate without its key
	stolen.PrivateKey = mustKey(t)
	for _, c := range []struct {
		name           string
		client, server *tls.Certificate
		change         func(e *ends)
		says           string // at either end
	}{
		{"client certificate as server", clientCert, acme.leaf(client1, client), nil, "usage"},
		{"server certificate as client", acme.leaf(gateway1, server), serverCert, nil, "usage"},
		{"client of another organization", evil.leaf(client1, client), serverCert, nil, "unknown authority"},
		{"server of another organization", clientCert, evil.leaf(gateway1, server), nil, "unknown authority"},
		{"no client certificate", &tls.Certificate{}, serverCert, nil, "didn't provide a certificate"},
		{"client certificate without its key", &stolen, serverCert, nil, "invalid signature"},
		{"another protocol", clientCert, serverCert, func(e *ends) { e.client.NextProtos = []string{"h2"} }, "no application protocol"},
		{"no protocol", clientCert, serverCert, func(e *ends) { e.client.NextProtos = nil }, `protocol ""`},
		{"server without protocol", clientCert, serverCert, func(e *ends) { e.server.NextProtos = nil }, `protocol ""`},
		{"TLS 1.2", clientCert, serverCert, func(e *ends) { e.client.MinVersion, e.client.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }, "version"},
		{"TLS 1.2 server", clientCert, serverCert, func(e *ends) { e.server.MinVersion, e.server.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }, "version"},
		{"revoked client", clientCert, serverCert, func(e *ends) {
			tr := *acme.trust()
			tr.Denied = []KeyHash{CertificateKeyHash(clientCert.Leaf)}
			e.trust.Store(&tr)
		}, "the key of acme/client/c-1 is revoked"},
		{"no certificate at hand", clientCert, serverCert, func(e *ends) {
			e.server.GetCertificate = TLSConfig(func() (*tls.Certificate, error) { return nil, errors.New("not enrolled") }, true, nil, nil).GetCertificate
		}, "not enrolled"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := newEnds(acme, c.client, c.server)
			if c.change != nil {
				c.change(e)
			}
			out := connect(t, e.client, e.server)
			if out.client == nil || out.server == nil {
				t.Fatalf("client %v, server %v: both must end", out.client, out.server)
			}
			if all := errors.Join(out.client, out.server).Error(); !strings.Contains(all, c.says) {
				t.Errorf("%q does not say %q", all, c.says)
			}
		})
	}
}

// A revocation between two connections holds: nothing resumes, and if a config that allowed resumption were in use, the check would run
// all the same.
func TestTLSRevokedBetweenConnections(t *testing.T) {
	defer goleak.VerifyNone(t)
	ca := newTestCA(t, "acme")
	clientCert := ca.leaf(client1, client)
	for _, tickets := range []bool{false, true} {
		e := newEnds(ca, clientCert, ca.leaf(gateway1, server))
		cache := tls.NewLRUClientSessionCache(8)
		e.client.ClientSessionCache, e.client.ServerName = cache, "g-1.acme.sallyway"
		if tickets {
			e.server.SessionTicketsDisabled, e.client.SessionTicketsDisabled = false, false
		}
		if out := connect(t, e.client, e.server); out.client != nil || out.server != nil {
			t.Fatalf("%+v", out)
		}
		if s, ok := cache.Get("g-1.acme.sallyway"); (ok && s != nil) != tickets {
			t.Fatalf("a ticket was given: %v, want %v", ok, tickets)
		}
		out := connect(t, e.client, e.server)
		if out.client != nil || out.server != nil || out.resumed != tickets {
			t.Fatalf("%+v, want resumed %v", out, tickets)
		}
		if e.sawClient.Load() != 2 || e.sawServer.Load() != 2 {
			t.Errorf("the checks ran %d and %d times for 2 connections", e.sawClient.Load(), e.sawServer.Load())
		}
		tr := *ca.trust()
		tr.Denied = []KeyHash{CertificateKeyHash(clientCert.Leaf)}
		e.trust.Store(&tr)
		out = connect(t, e.client, e.server)
		var revoked *RevokedError
		if !errors.As(out.server, &revoked) || out.client == nil {
			t.Errorf("tickets %v: after the revocation: %+v", tickets, out)
		}
	}
}

// A leaf that was renewed is shown from the next handshake on, without a new config.
func TestTLSCertificateIsAskedForEachTime(t *testing.T) {
	defer goleak.VerifyNone(t)
	ca := newTestCA(t, "acme")
	certs := []*tls.Certificate{ca.leaf(client1, client), ca.leaf(client1, client)}
	var i atomic.Int32
	var seen []KeyHash
	cc := TLSConfig(func() (*tls.Certificate, error) { return certs[i.Load()], nil }, false, nil, func([]*x509.Certificate) error { return nil })
	sc := TLSConfig(func() (*tls.Certificate, error) { return ca.leaf(gateway1, server), nil }, true, nil, func(c []*x509.Certificate) error {
		seen = append(seen, CertificateKeyHash(c[0]))
		return nil
	})
	for range certs {
		if out := connect(t, cc, sc); out.client != nil || out.server != nil {
			t.Fatalf("%+v", out)
		}
		i.Add(1)
	}
	if want := []KeyHash{CertificateKeyHash(certs[0].Leaf), CertificateKeyHash(certs[1].Leaf)}; !slices.Equal(seen, want) {
		t.Errorf("saw %v, want %v", seen, want)
	}
}
