package agent

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

// authority is a CA of the fake platform.
type authority struct {
	cert  *x509.Certificate
	key   *ecdsa.PrivateKey
	above []*x509.Certificate // intermediates and root above, as shown in chains
}

func newAuthority(t *testing.T, name string, above *authority) *authority {
	t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(10, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	parent, signer := tmpl, key
	a := &authority{key: key}
	if above != nil {
		parent, signer = above.cert, above.key
		a.above = append([]*x509.Certificate{above.cert}, above.above...)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	a.cert, err = x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// issue signs a leaf and returns it with its chain.
func (a *authority) issue(tmpl *x509.Certificate, pub crypto.PublicKey) ([]*x509.Certificate, error) {
	tmpl.SerialNumber = big.NewInt(time.Now().UnixNano())
	tmpl.KeyUsage = x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, pub, a.key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return append([]*x509.Certificate{leaf, a.cert}, a.above...), nil
}

// fakePlatform is the platform's side of the wire contract, in memory. Fields above mu do not change while it serves.
type fakePlatform struct {
	t        *testing.T
	web      *authority // of its own TLS certificate
	root     *authority
	nodes    *authority // issues leaves of every kind
	signer   *policy.Signer
	url      string
	listener net.Listener
	server   *http.Server

	mu        sync.Mutex
	clock     func() time.Time
	leafLife  time.Duration
	tokens    map[string]*control.Token // unspent, by secret
	keys      map[identity.Node]crypto.PublicKey
	jtis      map[string]bool
	access    map[string]identity.Node
	config    *control.Config
	push      map[chan *control.Config]bool
	problem   *control.Problem // answers node requests
	silent    bool             // the stream says nothing after the first configuration
	loseEnrol bool             // spend the token and break the connection
	beats     []control.Heartbeat
	enrols    int
	renewals  int
	asked     []time.Time // of access tokens
	streams   int
}

// newFake makes a platform on listener; nil listens on loopback.
func newFake(t *testing.T, listener net.Listener) *fakePlatform {
	t.Helper()
	f := &fakePlatform{
		t: t, clock: time.Now, leafLife: control.LeafLife,
		tokens: make(map[string]*control.Token), keys: make(map[identity.Node]crypto.PublicKey), jtis: make(map[string]bool),
		access: make(map[string]identity.Node), push: make(map[chan *control.Config]bool),
	}
	f.web = newAuthority(t, "platform CA", nil)
	f.root = newAuthority(t, "root", nil)
	f.nodes = newAuthority(t, "nodes", f.root)
	policyCA := newAuthority(t, "policy", f.root)
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	chain, err := policyCA.issue(&x509.Certificate{
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
		URIs: []*url.URL{identity.Node{Org: "acme", Kind: identity.Policy, ID: "p-1"}.URI()},
	}, &key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	f.signer = &policy.Signer{Key: key, Chain: chain}
	f.nodes.above = append([]*x509.Certificate{}, f.nodes.above...)

	if listener == nil {
		if listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	f.serve(listener, f.webCertificate("127.0.0.1", time.Now().Add(-time.Hour), time.Now().AddDate(1, 0, 0)))
	return f
}

func (f *fakePlatform) webCertificate(host string, from, to time.Time) tls.Certificate {
	key, err := identity.NewKey()
	if err != nil {
		f.t.Fatal(err)
	}
	tmpl := &x509.Certificate{NotBefore: from, NotAfter: to, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if ip := net.ParseIP(host); ip != nil {
		tmpl.IPAddresses = []net.IP{ip}
	} else {
		tmpl.DNSNames = []string{host}
	}
	chain, err := f.web.issue(tmpl, &key.PublicKey)
	if err != nil {
		f.t.Fatal(err)
	}
	c, err := identity.TLSCertificate(chain, key)
	if err != nil {
		f.t.Fatal(err)
	}
	return *c
}

func (f *fakePlatform) serve(listener net.Listener, cert tls.Certificate) {
	f.listener = listener
	f.url = "https://" + listener.Addr().String()
	mux := http.NewServeMux()
	mux.HandleFunc("POST /api/v1/enroll", f.enrol)
	mux.HandleFunc("POST /api/v1/node/token", f.token)
	mux.HandleFunc("GET /api/v1/node/control", f.control)
	mux.HandleFunc("POST /api/v1/node/heartbeat", f.heartbeat)
	mux.HandleFunc("POST /api/v1/node/renew", f.renew)
	f.server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		now := f.clock()
		f.mu.Unlock()
		w.Header().Set("Date", now.UTC().Format(http.TimeFormat))
		mux.ServeHTTP(w, r)
	}), ErrorLog: log.New(io.Discard, "", 0)}
	tl := tls.NewListener(listener, &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}})
	go func() { _ = f.server.Serve(tl) }() // ends with Close
}

func (f *fakePlatform) close() { _ = f.server.Close() }

func (f *fakePlatform) pin() string { return identity.CertificateKeyHash(f.web.cert).String() }

// newToken makes an enrolment token.
func (f *fakePlatform) newToken(kind identity.Kind, id string) control.Token {
	tok := &control.Token{
		URL: f.url, Pin: f.pin(), Node: identity.Node{Org: "acme", Kind: kind, ID: id}, Name: "the-" + id, Secret: make([]byte, 32),
	}
	_, _ = rand.Read(tok.Secret)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tokens[string(tok.Secret)] = tok
	return *tok
}

func (f *fakePlatform) trust() control.Trust {
	return control.Trust{
		Roots: string(identity.EncodeCertificates(f.root.cert)),
		Pins: map[identity.Kind][]identity.KeyHash{
			identity.Gateway: {identity.CertificateKeyHash(f.nodes.cert)}, identity.Client: {identity.CertificateKeyHash(f.nodes.cert)},
			identity.Relay: {identity.CertificateKeyHash(f.nodes.cert)}, identity.Site: {identity.CertificateKeyHash(f.nodes.cert)},
			identity.Policy: {identity.CertificateKeyHash(f.signer.Chain[1])},
		},
	}
}

// snapshot signs a snapshot for n.
func (f *fakePlatform) snapshot(n identity.Node, version uint64, notAfter time.Time) string {
	s, err := f.signer.AppendSnapshot(nil, &policy.Snapshot{Org: n.Org, Audience: n, Version: version, Issued: time.Now(), NotAfter: notAfter})
	if err != nil {
		f.t.Fatal(err)
	}
	return string(s)
}

// configFor is a configuration of version for n. Gateways get a snapshot of the same version.
func (f *fakePlatform) configFor(n identity.Node, version uint64) *control.Config {
	c := &control.Config{Version: version, Node: n, Name: "the-" + n.ID, Trust: f.trust()}
	if n.Kind == identity.Gateway {
		c.Gateway = &control.Gateway{
			Snapshot: f.snapshot(n, version, time.Now().Add(24*time.Hour)),
			Relays:   []control.RelayRef{{Name: "fra-1", Username: "u", Password: "turn-password-" + n.ID}},
		}
	}
	return c
}

// publish sends a configuration to everybody and keeps it for who comes.
func (f *fakePlatform) publish(c *control.Config) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.config = c
	for ch := range f.push {
		ch <- c
	}
}

func (f *fakePlatform) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// read returns a field that the server changes.
func read[T any](f *fakePlatform, field *T) T {
	f.mu.Lock()
	defer f.mu.Unlock()
	return *field
}

func fail(w http.ResponseWriter, p control.Problem) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(p.Status)
	_ = json.NewEncoder(w).Encode(p)
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}

func (f *fakePlatform) enrol(w http.ResponseWriter, r *http.Request) {
	var req control.EnrolRequest
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		fail(w, control.Problem{Status: 400, Detail: err.Error()})
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	tok := f.tokens[string(req.Secret)]
	if tok == nil || tok.Node != req.Node {
		fail(w, control.Problem{Status: 409, Code: control.CodeTokenUsed, Detail: "this token was used before"})
		return
	}
	delete(f.tokens, string(req.Secret))
	f.enrols++
	certs, pub, err := f.signLocked(req.CSR, req.SiteCSR, req.Node)
	if err != nil {
		fail(w, control.Problem{Status: 422, Detail: err.Error()})
		return
	}
	f.keys[req.Node] = pub
	if f.loseEnrol {
		panic(http.ErrAbortHandler)
	}
	answer(w, control.EnrolResponse{Node: req.Node, Name: tok.Name, Certificates: certs, Trust: f.trust()})
}

func (f *fakePlatform) signLocked(csr, site string, n identity.Node) (control.Certificates, crypto.PublicKey, error) {
	leaf, pub, err := f.leafLocked(csr, n)
	if err != nil {
		return control.Certificates{}, nil, err
	}
	c := control.Certificates{Leaf: leaf}
	if n.Kind == identity.Gateway {
		n.Kind = identity.Site
		if c.Site, _, err = f.leafLocked(site, n); err != nil {
			return c, nil, err
		}
	}
	return c, pub, nil
}

func (f *fakePlatform) leafLocked(csr string, n identity.Node) (string, crypto.PublicKey, error) {
	block, _ := pem.Decode([]byte(csr))
	if block == nil {
		return "", nil, errors.New("no request")
	}
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return "", nil, err
	}
	if err := req.CheckSignature(); err != nil {
		return "", nil, err
	}
	if len(req.URIs) != 1 || req.URIs[0].String() != n.URI().String() {
		return "", nil, fmt.Errorf("request is for %v, want %v", req.URIs, n)
	}
	now := f.clock()
	chain, err := f.nodes.issue(&x509.Certificate{
		NotBefore: now, NotAfter: now.Add(f.leafLife), URIs: req.URIs, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, req.PublicKey)
	return string(identity.EncodeCertificates(chain...)), req.PublicKey, err
}

func (f *fakePlatform) token(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, time.Now())
	if f.problem != nil {
		fail(w, *f.problem)
		return
	}
	refuse := func(why string) {
		fail(w, control.Problem{Status: 401, Code: control.CodeBadAssertion, Detail: why})
	}
	if g := r.FormValue("grant_type"); g != "urn:ietf:params:oauth:grant-type:jwt-bearer" {
		refuse("grant type " + g)
		return
	}
	tok, err := jwt.ParseSigned(r.FormValue("assertion"), []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		refuse(err.Error())
		return
	}
	var claims jwt.Claims
	if err := tok.UnsafeClaimsWithoutVerification(&claims); err != nil {
		refuse(err.Error())
		return
	}
	n, err := identity.ParseNode(claims.Subject)
	if err != nil {
		refuse(err.Error())
		return
	}
	if err := tok.Claims(f.keys[n], &claims); err != nil {
		refuse("signature: " + err.Error())
		return
	}
	now := f.clock()
	switch {
	case claims.Issuer != n.String(), !slices.Contains(claims.Audience, f.url):
		refuse("issuer or audience")
	case claims.Expiry.Time().Before(now), claims.Expiry.Time().After(now.Add(control.AssertionLife)):
		refuse("the assertion's time is wrong")
	case claims.ID == "" || f.jtis[claims.ID]:
		refuse("replay")
	default:
		f.jtis[claims.ID] = true
		access := "access-" + rand.Text()
		f.access[access] = n
		answer(w, map[string]any{"access_token": access, "token_type": "Bearer", "expires_in": int(control.AccessTokenLife.Seconds())})
	}
}

func (f *fakePlatform) whoLocked(w http.ResponseWriter, r *http.Request) (identity.Node, bool) {
	n, ok := f.access[strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")]
	if !ok {
		fail(w, control.Problem{Status: 401, Detail: "access token unknown or expired"})
		return n, false
	}
	if f.problem != nil {
		fail(w, *f.problem)
		return n, false
	}
	return n, true
}

func (f *fakePlatform) heartbeat(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.whoLocked(w, r); !ok {
		return
	}
	var hb control.Heartbeat
	if err := json.NewDecoder(r.Body).Decode(&hb); err != nil {
		fail(w, control.Problem{Status: 400, Detail: err.Error()})
		return
	}
	f.beats = append(f.beats, hb)
	answer(w, struct{}{})
}

func (f *fakePlatform) renew(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, ok := f.whoLocked(w, r)
	if !ok {
		return
	}
	var req control.RenewRequest
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		fail(w, control.Problem{Status: 400, Detail: err.Error()})
		return
	}
	certs, pub, err := f.signLocked(req.CSR, req.SiteCSR, n)
	if err != nil {
		fail(w, control.Problem{Status: 422, Detail: err.Error()})
		return
	}
	f.renewals++
	f.keys[n] = pub
	answer(w, control.RenewResponse{Certificates: certs})
}

func (f *fakePlatform) control(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	_, ok := f.whoLocked(w, r)
	if !ok {
		f.mu.Unlock()
		return
	}
	f.streams++
	ch := make(chan *control.Config, 16)
	if f.config != nil {
		ch <- f.config
	}
	f.push[ch] = true
	f.mu.Unlock()
	defer f.set(func() { delete(f.push, ch) })

	rc := http.NewResponseController(w)
	w.Header().Set("Content-Type", "application/x-ndjson")
	_ = rc.Flush()
	enc := json.NewEncoder(w)
	tick := time.NewTicker(control.PingInterval)
	defer tick.Stop()
	for {
		ev := control.Event{Type: control.EventPing}
		select {
		case <-r.Context().Done():
			return
		case c := <-ch:
			if c == nil {
				return // the platform restarts
			}
			ev = control.Event{Type: control.EventConfig, Config: c}
		case <-tick.C:
			f.mu.Lock()
			silent := f.silent
			f.mu.Unlock()
			if silent {
				continue
			}
		}
		if enc.Encode(ev) != nil || rc.Flush() != nil {
			return
		}
	}
}

// pipeListener carries connections in memory, so that a test with virtual time has no sockets.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
	mu     sync.Mutex
	down   bool // dials are refused
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 443} }

func (l *pipeListener) setDown(down bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = down
}

func (l *pipeListener) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	l.mu.Lock()
	down := l.down
	l.mu.Unlock()
	if down {
		return nil, errors.New("platform is down")
	}
	near, far := net.Pipe()
	select {
	case l.conns <- far:
		return near, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
