package platform

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/probe"
)

// lab is a platform under test, with an administrator.
type lab struct {
	t     *testing.T
	cfg   Config
	srv   *Server
	stop  func()
	admin control.AdminCredential
	http  *http.Client
	logs  *safeBuffer
}

// safeBuffer is a log that goroutines write to.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// start runs a platform on loopback until the test ends. change may alter its configuration.
func start(t *testing.T, change ...func(*Config)) *lab {
	t.Helper()
	l := &lab{t: t, logs: new(safeBuffer)}
	l.cfg = Config{Data: t.TempDir(), Listen: "127.0.0.1:0", APIRate: -1, ProbeRelays: probe.Off, Log: slog.New(slog.NewTextHandler(l.logs, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	for _, c := range change {
		c(&l.cfg)
	}
	l.run()
	t.Cleanup(func() {
		l.stop()
		if t.Failed() {
			t.Logf("log of the platform:\n%s", l.logs)
		}
	})
	b, err := os.ReadFile(l.srv.AdminFile())
	must(t, err)
	must(t, json.Unmarshal(b, &l.admin))
	return l
}

// run starts the server on the lab's data.
func (l *lab) run() {
	l.t.Helper()
	srv, err := Open(l.t.Context(), l.cfg)
	must(l.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	var once sync.Once
	l.srv = srv
	l.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				l.t.Errorf("platform ended with %v", err)
			}
		})
	}
	if srv.https != nil {
		l.cfg.Listen = srv.https.Addr().String() // the same again after a restart
	}
	l.http = pinned(srv.Pin())
}

// pinned is a client that trusts the CA with a key hash, as nodes do.
func pinned(pin string) *http.Client {
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{
		InsecureSkipVerify: true, // the check is below
		VerifyConnection: func(cs tls.ConnectionState) error {
			roots := x509.NewCertPool()
			for _, c := range cs.PeerCertificates {
				if c.IsCA && identity.CertificateKeyHash(c).String() == pin {
					roots.AddCert(c)
				}
			}
			_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, DNSName: cs.ServerName})
			return err
		},
	}}}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// do sends a request with a bearer token; out may be nil. It returns the status and, for errors, the problem.
func (l *lab) do(bearer, method, path string, in, out any) (int, control.Problem) {
	l.t.Helper()
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		must(l.t, err)
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(l.t.Context(), method, l.at()+path, body)
	must(l.t, err)
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := l.http.Do(req)
	must(l.t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	must(l.t, err)
	if resp.StatusCode/100 != 2 {
		var p control.Problem
		if ct := resp.Header.Get("Content-Type"); ct != "application/problem+json" {
			l.t.Errorf("%s %s: %d with %s: %s", method, path, resp.StatusCode, ct, b)
		}
		must(l.t, json.Unmarshal(b, &p))
		return resp.StatusCode, p
	}
	if out != nil {
		if err := json.Unmarshal(b, out); err != nil {
			l.t.Fatalf("%s %s: %v: %s", method, path, err, b)
		}
	}
	return resp.StatusCode, control.Problem{}
}

// api sends an administrator's request to the organization default that must work.
func (l *lab) api(method, path string, in, out any) {
	l.t.Helper()
	l.inOrg("default", method, path, in, out)
}

func (l *lab) inOrg(org, method, path string, in, out any) {
	l.t.Helper()
	if status, p := l.do(l.admin.Token, method, "/api/v1/orgs/"+org+path, in, out); status/100 != 2 {
		l.t.Fatalf("%s %s: %d %+v", method, path, status, p)
	}
}

// node is a node under test.
type node struct {
	l      *lab
	id     identity.Node
	name   string
	token  control.Token
	key    crypto.Signer
	enrol  control.EnrolResponse
	bearer string
}

// create makes a node in the organization default, without enrolling it.
func (l *lab) create(kind identity.Kind, name string) *node { return l.createIn("default", kind, name) }

func (l *lab) createIn(org string, kind identity.Kind, name string) *node {
	l.t.Helper()
	req := control.CreateNode{Name: name}
	if kind == identity.Relay {
		req.Host = name + ".example"
	}
	var made control.CreatedNode
	l.inOrg(org, "POST", "/"+string(kind)+"s", req, &made)
	return l.fromToken(made.Token)
}

func (l *lab) fromToken(token string) *node {
	l.t.Helper()
	tok, err := control.ParseToken(token)
	must(l.t, err)
	key, err := identity.NewKey()
	must(l.t, err)
	return &node{l: l, id: tok.Node, name: tok.Name, token: tok, key: key}
}

func (n *node) request() control.EnrolRequest {
	n.l.t.Helper()
	csr, err := identity.Request(n.key, n.id)
	must(n.l.t, err)
	req := control.EnrolRequest{Secret: n.token.Secret, Node: n.id, CSR: string(csr), Version: "test"}
	if n.id.Kind == identity.Gateway {
		site := n.id
		site.Kind = identity.Site
		csr, err := identity.Request(n.key, site)
		must(n.l.t, err)
		req.SiteCSR = string(csr)
	}
	return req
}

// join enrols the node and gets it an access token.
func (n *node) join() *node {
	n.l.t.Helper()
	if status, p := n.l.do("", "POST", "/api/v1/enroll", n.request(), &n.enrol); status != 200 {
		n.l.t.Fatalf("enrol %s: %d %+v", n.name, status, p)
	}
	n.login()
	return n
}

func (n *node) login() {
	n.l.t.Helper()
	token, p := n.exchange(n.assertion(nil))
	if token == "" {
		n.l.t.Fatalf("access token of %s: %+v", n.name, p)
	}
	n.bearer = token
}

// assertion makes an assertion; change may alter its claims.
func (n *node) assertion(change func(*jwt.Claims)) string {
	n.l.t.Helper()
	now := time.Now()
	c := jwt.Claims{
		Issuer: n.id.String(), Subject: n.id.String(), Audience: jwt.Audience{n.l.srv.URL()}, ID: rand.Text(),
		IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(time.Minute)),
	}
	if change != nil {
		change(&c)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: n.key}, nil)
	must(n.l.t, err)
	s, err := jwt.Signed(signer).Claims(c).Serialize()
	must(n.l.t, err)
	return s
}

func (n *node) exchange(assertion string) (string, control.Problem) {
	n.l.t.Helper()
	resp, err := n.l.http.PostForm(n.l.at()+"/api/v1/node/token", url.Values{
		"grant_type": {"urn:ietf:params:oauth:grant-type:jwt-bearer"}, "assertion": {assertion},
	})
	must(n.l.t, err)
	defer resp.Body.Close()
	var out struct {
		control.Problem
		Token string `json:"access_token"`
	}
	must(n.l.t, json.NewDecoder(resp.Body).Decode(&out))
	if (resp.StatusCode == 200) != (out.Token != "") {
		n.l.t.Errorf("status %d with token %t", resp.StatusCode, out.Token != "")
	}
	return out.Token, out.Problem
}

func (n *node) beat(b control.Heartbeat) {
	n.l.t.Helper()
	if b.State == "" {
		b.State = "ready"
	}
	if status, p := n.l.do(n.bearer, "POST", "/api/v1/node/heartbeat", b, nil); status != 200 {
		n.l.t.Fatalf("heartbeat of %s: %d %+v", n.name, status, p)
	}
}

// feed is a node's control stream.
type feed struct {
	t      *testing.T
	node   *node
	events chan control.Event // closed at the end
	close  func()
	last   control.Config
}

func (n *node) stream() *feed {
	n.l.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, "GET", n.l.at()+"/api/v1/node/control", nil)
	must(n.l.t, err)
	req.Header.Set("Authorization", "Bearer "+n.bearer)
	resp, err := n.l.http.Do(req)
	must(n.l.t, err)
	if resp.StatusCode != 200 {
		b, _ := io.ReadAll(resp.Body)
		n.l.t.Fatalf("control stream of %s: %d %s", n.name, resp.StatusCode, b)
	}
	f := &feed{t: n.l.t, node: n, events: make(chan control.Event, 1000)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer close(f.events)
		defer resp.Body.Close()
		for sc := bufio.NewReader(resp.Body); ; {
			line, err := sc.ReadBytes('\n')
			if err != nil {
				return
			}
			var ev control.Event
			if json.Unmarshal(line, &ev) != nil {
				return
			}
			f.events <- ev
		}
	}()
	f.close = func() { cancel(); <-done }
	n.l.t.Cleanup(f.close)
	return f
}

// wait reads configurations until one is as wanted; they must come within the time that the platform promises.
func (f *feed) wait(what string, want func(*control.Config) bool) *control.Config {
	f.t.Helper()
	deadline := time.After(5 * time.Second)
	for {
		select {
		case ev, ok := <-f.events:
			if !ok {
				f.t.Fatalf("the stream of %s ended before: %s", f.node.name, what)
			}
			if ev.Type != control.EventConfig {
				continue
			}
			if ev.Config.Version < f.last.Version {
				f.t.Fatalf("version %d after %d", ev.Config.Version, f.last.Version)
			}
			f.last = *ev.Config
			if want(ev.Config) {
				return ev.Config
			}
		case <-deadline:
			b, _ := json.MarshalIndent(f.last, "", " ")
			f.t.Fatalf("%s: not told: %s; last: %s", f.node.name, what, b)
		}
	}
}

// ended waits for the stream's end.
func (f *feed) ended() {
	f.t.Helper()
	deadline := time.After(5 * time.Second)
	for {
		select {
		case _, ok := <-f.events:
			if !ok {
				return
			}
		case <-deadline:
			f.t.Fatalf("the stream of %s goes on", f.node.name)
		}
	}
}

func always(*control.Config) bool { return true }

func (n *node) trust(kinds ...identity.Kind) *identity.Trust {
	n.l.t.Helper()
	tr, err := n.enrol.Trust.For(kinds...)
	must(n.l.t, err)
	return tr
}

// snapshot opens the snapshot in a gateway's configuration, as the gateway does.
func (n *node) snapshot(c *control.Config) *policy.Snapshot {
	n.l.t.Helper()
	s, err := policy.OpenSnapshot(c.Gateway.Snapshot, n.trust(identity.Policy), n.id)
	must(n.l.t, err)
	return s
}

// world is one of each: the usual case.
type world struct {
	*lab
	relays  []*node
	gateway *node
	client  *node
}

// populate makes two relays, a gateway, a client, resource web and the policy for it, all enrolled and with their first heartbeat.
func populate(t *testing.T, l *lab) *world {
	t.Helper()
	w := &world{lab: l}
	for i := range 2 {
		r := l.create(identity.Relay, fmt.Sprintf("relay-%d", i+1)).join()
		r.beat(control.Heartbeat{})
		w.relays = append(w.relays, r)
	}
	w.gateway = l.create(identity.Gateway, "gw").join()
	w.client = l.create(identity.Client, "laptop").join()
	l.api("POST", "/resources", control.CreateResource{Name: "web", Gateways: []string{"gw"}, Address: "10.9.0.2", TCP: []policy.PortRange{{First: 80, Last: 80}}, ICMP: true}, nil)
	l.api("POST", "/policies", control.CreatePolicy{Subject: "client:laptop", Resource: "web"}, nil)
	return w
}

func TestWholeStory(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	if !strings.Contains(w.logs.String(), "sallyway login --url "+w.srv.URL()+" --token-file "+w.srv.AdminFile()+" --ca-pin "+w.srv.Pin()) {
		t.Error("the log does not show the login line")
	}

	gw := w.gateway.stream()
	c := gw.wait("two relays and the client as a peer", func(c *control.Config) bool {
		return len(c.Gateway.Relays) == 2 && len(w.gateway.snapshot(c).Peers) == 1
	})
	s := w.gateway.snapshot(c)
	if d := s.Evaluate(w.client.id, policy.Target{Proto: policy.TCP, Host: "10.9.0.2", Addr: netip.MustParseAddr("10.9.0.2"), Port: 80}); !d.Allowed {
		t.Errorf("the client is refused: %+v", d)
	}

	cl := w.client.stream()
	c = cl.wait("a resource by a gateway on two relays", func(c *control.Config) bool {
		return len(c.Dialling.Resources) == 1 && len(c.Dialling.Gateways) == 1 && len(c.Dialling.Gateways[0].Relays) == 2
	})
	ref := c.Dialling.Gateways[0]
	g, err := policy.OpenGrant(ref.Grant, w.client.trust(identity.Policy), w.client.id)
	must(t, err)
	if g.Key != identity.HashKey(w.client.key.Public()) || g.Gateway != w.gateway.id || len(g.Relays) != 2 {
		t.Errorf("grant %+v", g)
	}
	if c.Dialling.Resources[0].FQDN != "web.default.sallyway.internal" || ref.FQDN != "gw.default.sallyway.internal" {
		t.Errorf("names %s, %s", c.Dialling.Resources[0].FQDN, ref.FQDN)
	}
	if r := w.relays[0].stream().wait("keys and the organization", always).Relay; len(r.Keys) == 0 || len(r.Orgs) != 1 || r.Orgs[0].Org != "default" {
		t.Errorf("relay %+v", r)
	}
}
