package fallback

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/platform/pki"
	"sallyway/relay/reverse"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// anOrg is an organization's PKI as its platform has it.
type anOrg struct {
	t    testing.TB
	name string
	root *pki.Authority
	cas  map[identity.Kind]*pki.Authority
	ssh  *pki.SSHAuthority
}

func newOrg(t testing.TB, name string) *anOrg {
	t.Helper()
	o := &anOrg{t: t, name: name, cas: map[identity.Kind]*pki.Authority{}}
	var err error
	if o.root, err = pki.NewRoot(name, time.Now()); err != nil {
		t.Fatal(err)
	}
	for _, k := range []identity.Kind{identity.Relay, identity.Gateway, identity.Client, identity.Site, identity.Platform} {
		if o.cas[k], err = o.root.NewIntermediate(name, k, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	if o.ssh, err = pki.NewSSHAuthority(); err != nil {
		t.Fatal(err)
	}
	return o
}

func (o *anOrg) node(k identity.Kind, id string) identity.Node {
	return identity.Node{Org: o.name, Kind: k, ID: id}
}

// leaf issues a certificate that is good for an hour from from.
func (o *anOrg) leaf(n identity.Node, from time.Time) *tls.Certificate {
	o.t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		o.t.Fatal(err)
	}
	ca := o.cas[n.Kind]
	c, err := ca.Leaf(n, key.Public(), from, time.Hour)
	if err != nil {
		o.t.Fatal(err)
	}
	cert, err := identity.TLSCertificate([]*x509.Certificate{c, ca.Certificate}, key)
	if err != nil {
		o.t.Fatal(err)
	}
	return cert
}

// gatewayKey is the hash of a gateway's X.509 key, which tests do not need otherwise.
func gatewayKey(n identity.Node) identity.KeyHash {
	var h identity.KeyHash
	copy(h[:], n.String())
	return h
}

func newSSHKey(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// sshIdentity issues a certificate for a new key; change, if not nil, spoils it and has it signed anew by by.
func (o *anOrg) sshIdentity(n identity.Node, change func(*ssh.Certificate), by *pki.SSHAuthority) reverse.Identity {
	o.t.Helper()
	key := newSSHKey(o.t)
	line, err := o.ssh.Issue(n, key.Public(), gatewayKey(n), time.Now(), time.Hour)
	if err != nil {
		o.t.Fatal(err)
	}
	id := reverse.Identity{Key: key, Certificate: line}
	if change == nil && by == nil {
		return id
	}
	cert, _, err := id.Parse()
	if err != nil {
		o.t.Fatal(err)
	}
	if change != nil {
		change(cert)
	}
	if by == nil {
		by = o.ssh
	}
	signer, err := ssh.NewSignerFromSigner(by.Key)
	if err != nil {
		o.t.Fatal(err)
	}
	if err := cert.SignCert(rand.Reader, signer); err != nil {
		o.t.Fatal(err)
	}
	id.Certificate = string(ssh.MarshalAuthorizedKey(cert))
	return id
}

func (o *anOrg) served() Organization {
	pins := map[identity.Kind][]identity.KeyHash{}
	for k, ca := range o.cas {
		pins[k] = []identity.KeyHash{identity.CertificateKeyHash(ca.Certificate)}
	}
	return Organization{Roots: string(identity.EncodeCertificates(o.root.Certificate)), Pins: pins, SSHCAs: []string{o.ssh.PublicKey()}}
}

func (o *anOrg) trust(k identity.Kind) *identity.Trust {
	return &identity.Trust{Roots: []*x509.Certificate{o.root.Certificate}, Pins: []identity.KeyHash{identity.CertificateKeyHash(o.cas[k].Certificate)}}
}

// world is a relay of acme that serves acme and beta.
type world struct {
	*Server
	t          testing.TB
	acme, beta *anOrg
	relay      identity.Node
	sshAddr    netip.AddrPort
	tlsAddr    netip.AddrPort
}

func newWorld(t testing.TB, change func(*Config)) *world {
	t.Helper()
	w := &world{t: t, acme: newOrg(t, "acme"), beta: newOrg(t, "beta")}
	w.relay = w.acme.node(identity.Relay, "r-1")
	cert, host := w.acme.leaf(w.relay, time.Now()), w.acme.sshIdentity(w.relay, nil, nil)
	loopback := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 0)
	cfg := Config{
		Relay: w.relay, SSH: loopback, TLS: loopback, Certificate: func() (*tls.Certificate, error) { return cert, nil },
		HostIdentity: func() reverse.Identity { return host }, Limits: Limits{Rate: 10_000, HalfOpenSource: 200},
		Logger: slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if change != nil {
		change(&cfg)
	}
	var err error
	if w.Server, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	w.follow(nil)
	if err := w.Listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.sshAddr, w.tlsAddr = w.Addrs()
	start(t, w.Server)
	return w
}

// follow has the relay take over both organizations, with these nodes denied.
func (w *world) follow(denied []identity.Node, keys ...identity.KeyHash) {
	w.t.Helper()
	acme := w.acme.served()
	acme.Denied = keys
	if err := w.SetOrganizations(map[string]Organization{"acme": acme, "beta": w.beta.served()}, denied); err != nil {
		w.t.Fatal(err)
	}
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(string(bytes.TrimSpace(b)))
	return len(b), nil
}

// start runs something until the test ends.
func start(t testing.TB, r interface{ Run(context.Context) error }) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("timed out: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// aGateway is a gateway's end: its links and what came on them.
type aGateway struct {
	*reverse.Tunnel
	node  identity.Node
	links chan *gatewayLink
	stop  func()
}

type gatewayLink struct {
	*reverse.Link
	peer identity.Node
	got  *receiver
}

// gateway connects a gateway and waits until it is there.
func (w *world) gateway(n identity.Node, id reverse.Identity) *aGateway {
	w.t.Helper()
	g := w.tunnel(n, id)
	waitFor(w.t, "the gateway is connected", func() bool { return len(w.connections(n)) > 0 && g.Status().Up })
	return g
}

func (w *world) tunnel(n identity.Node, id reverse.Identity) *aGateway {
	g := &aGateway{node: n, links: make(chan *gatewayLink, 64)}
	g.Tunnel = reverse.NewTunnel(reverse.TunnelConfig{
		Relay: w.relay, HostCAs: func() []string { return []string{w.acme.ssh.PublicKey()} },
		Resolve: func(context.Context) ([]netip.AddrPort, error) { return []netip.AddrPort{w.sshAddr}, nil },
		Gateway: n, Identity: func() reverse.Identity { return id },
		OnLink: func(peer identity.Node, l *reverse.Link) {
			gl := &gatewayLink{l, peer, newReceiver()}
			l.SetReceiver(gl.got)
			g.links <- gl
		},
	})
	g.stop = start(w.t, g.Tunnel)
	return g
}

// dial connects a client to a gateway.
func (w *world) dial(gateway identity.Node, cert *tls.Certificate) (*reverse.Link, error) {
	ctx, cancel := context.WithTimeout(w.t.Context(), 10*time.Second)
	defer cancel()
	l, err := reverse.DialTLS(ctx, reverse.TLSConfig{
		Relay: w.relay, Addrs: []netip.AddrPort{w.tlsAddr}, Gateway: gateway,
		Verify: func(chain []*x509.Certificate) error {
			_, err := w.acme.trust(identity.Relay).Verify(chain, x509.ExtKeyUsageServerAuth)
			return err
		},
		Certificate: func() (*tls.Certificate, error) { return cert, nil },
	})
	if err == nil {
		w.t.Cleanup(l.Close)
	}
	return l, err
}

// receiver keeps what arrives.
type receiver struct {
	mu    sync.Mutex
	all   [][]byte
	bytes int
	keep  bool
}

func newReceiver() *receiver { return &receiver{keep: true} }

func (r *receiver) Receive(b datagram.Batch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for p, ok := b.Next(); ok; p, ok = b.Next() {
		r.bytes += len(p)
		if r.keep {
			r.all = append(r.all, bytes.Clone(p))
		}
	}
	b.Release()
}

func (r *receiver) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}

func (r *receiver) datagrams() [][]byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.all
}

// rawSSH dials the SSH port by x/crypto alone, as somebody who does not run our gateway would.
func (w *world) rawSSH(user string, auth ...ssh.AuthMethod) (*ssh.Client, error) {
	nc, err := net.Dial("tcp", w.sshAddr.String())
	if err != nil {
		return nil, err
	}
	conn, channels, requests, err := ssh.NewClientConn(nc, "relay:2222", &ssh.ClientConfig{
		User: user, Auth: auth, HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: 5 * time.Second,
	})
	if err != nil {
		nc.Close()
		return nil, err
	}
	return ssh.NewClient(conn, channels, requests), nil
}

func signerOf(t testing.TB, id reverse.Identity) ssh.Signer {
	t.Helper()
	_, s, err := id.Parse()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func pemOf(b *pem.Block) []byte { return pem.EncodeToMemory(b) }

func addrOf(a, b, c, d byte) netip.Addr { return netip.AddrFrom4([4]byte{a, b, c, d}) }

func addrFrom(s string) netip.Addr { return netip.MustParseAddr(s) }
