package gateway

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/control/agent"
	"sallyway/internal/daemon"
	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform"
	"sallyway/tunnel"
)

// spelled returns the ways in which an IPv4 address can be written, with the IPv6 forms that carry it.
func spelled(four string) []string {
	b := netip.MustParseAddr(four).As4()
	hex := fmt.Sprintf("%02x%02x:%02x%02x", b[0], b[1], b[2], b[3])
	inverted := fmt.Sprintf("%02x%02x:%02x%02x", ^b[0], ^b[1], ^b[2], ^b[3])
	return []string{
		four, "::ffff:" + four, "::ffff:" + hex, "0:0:0:0:0:ffff:" + hex, // mapped
		"64:ff9b::" + hex, "64:ff9b:1::" + hex, "64:ff9b:1:2:3:4:" + hex, // NAT64, well-known and local
		"2002:" + hex + "::", "2002:" + hex + ":1:2:3:4:5", // 6to4
		"2001:0:4136:e378:8000:63bf:" + inverted, // Teredo
		"::ffff:0:" + hex,                        // SIIT
	}
}

// TestEverySpellingOfSpecialAddresses asks for loopback, the unspecified address and the metadata service in every form, as a literal in the
// request and as what a name resolves to, of a gateway whose platform allows everything and whose list opens everything.
func TestEverySpellingOfSpecialAddresses(t *testing.T) {
	records := map[string]string{"loop.corp.example": "127.0.0.1", "any.corp.example": "0.0.0.0", "meta.corp.example": "169.254.169.254"}
	z := newZone(t, records)
	for name, allow := range map[string][]string{"default": nil, "wide": {"0.0.0.0/0", "::/0"}, "nearly as wide": {"0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"}} {
		l, err := ParseAllow(allow)
		if err != nil {
			t.Fatal(err)
		}
		all := []policy.PortRange{policy.AllPorts}
		s := &policy.Snapshot{Org: "acme", Peers: []policy.Peer{{Node: client1}}}
		for i, a := range []string{"0.0.0.0/0", "::/0", "*.corp.example", "loop.corp.example", "any.corp.example", "meta.corp.example"} {
			id := fmt.Sprint("r", i)
			s.Resource = append(s.Resource, policy.Resource{ID: id, Name: id, Address: a, TCP: all, UDP: all, ICMP: true})
			s.Rules = append(s.Rules, policy.Rule{ID: "p" + id, Resource: id, Subjects: []identity.Node{client1}})
		}
		e := &enforcer{
			snapshot: func() (*policy.Snapshot, error) { return s, nil }, stale: func() (bool, error) { return false, nil }, allow: l, resolver: z.resolver(),
		}
		check := func(proto policy.Proto, host string, port uint16) error {
			_, err := e.check(t.Context(), client1, policy.Target{Proto: proto, Host: host, Port: port})
			return err
		}
		if err := check(policy.TCP, "192.0.2.1", 80); err != nil {
			t.Fatalf("%s: the policy of this test allows nothing: %v", name, err)
		}
		hosts := []string{"::1", "::", "0:0:0:0:0:0:0:1", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "fd00:ec2::254", "127.255.255.254", "0.1.2.3"}
		for _, four := range []string{"127.0.0.1", "0.0.0.0", "169.254.169.254"} {
			hosts = append(hosts, spelled(four)...)
		}
		// What only some resolvers take for an address is a name to us: it is looked up, and nothing of the kind is found.
		hosts = append(hosts, "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.0.0.1.", "localhost", "[::1]", "127.000.000.001")
		for host := range records {
			hosts = append(hosts, host)
		}
		for _, h := range hosts {
			for _, proto := range []policy.Proto{policy.TCP, policy.UDP} {
				if err := check(proto, h, 80); err == nil {
					t.Errorf("%s list: %s to %s passes", name, proto, h)
				}
			}
			if err := check(policy.ICMP, h, 0); err == nil {
				t.Errorf("%s list: ping to %s passes", name, h)
			}
		}
	}
}

// TestOwnSocketsAreNeverReached names the address of the gateway's metrics in the allow list: it still is not reached.
func TestOwnSocketsAreNeverReached(t *testing.T) {
	for _, own := range []string{"10.0.3.2:9465", "0.0.0.0:9465", "[::]:9465"} {
		l, err := ParseAllow([]string{"10.0.3.2 9465", "10.0.3.0/24", "127.0.0.1 9465"}, netip.MustParseAddrPort(own))
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Check(netip.MustParseAddr("10.0.3.2"), 9465); err == nil || !strings.Contains(err.Error(), "own socket") {
			t.Errorf("own socket %s: %v", own, err)
		}
		if err := l.Check(netip.MustParseAddr("10.0.3.2"), 80); err != nil {
			t.Errorf("own socket %s, another port: %v", own, err)
		}
	}
}

// TestQUICSecretsAreStableAndPrivate holds the keys of stateless resets and tokens.
func TestQUICSecretsAreStableAndPrivate(t *testing.T) {
	dir := t.TempDir()
	load := func() (a, b [32]byte) {
		sh, err := daemon.Open(spec, &daemon.Options{State: dir}, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		defer sh.Close()
		a, b, err = loadSecrets(sh.State)
		if err != nil {
			t.Fatal(err)
		}
		return a, b
	}
	r1, k1 := load()
	r2, k2 := load()
	if r1 != r2 || k1 != k2 || r1 == k1 || r1 == [32]byte{} {
		t.Error("the secrets change, are one, or are none")
	}
	if st, err := os.Stat(filepath.Join(dir, secretsFile)); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
}

// pipeEnd is an end of a link in memory.
type pipeEnd struct {
	other *pipeEnd
	in    chan datagram.Batch
	rcv   atomic.Pointer[datagram.Receiver]
	done  chan struct{}
}

func newPipe(t *testing.T) (a, b *pipeEnd) {
	a = &pipeEnd{in: make(chan datagram.Batch, 1024), done: make(chan struct{})}
	b = &pipeEnd{in: make(chan datagram.Batch, 1024), done: a.done}
	a.other, b.other = b, a
	var ends sync.WaitGroup
	for _, e := range []*pipeEnd{a, b} {
		ends.Go(func() {
			for {
				select {
				case <-e.done:
					return
				case batch := <-e.in:
					if r := e.rcv.Load(); r != nil {
						(*r).Receive(batch)
					} else {
						batch.Release()
					}
				}
			}
		})
	}
	t.Cleanup(func() {
		close(a.done)
		ends.Wait()
	})
	return a, b
}

func (e *pipeEnd) Send(payload []byte, segment int, ecn datagram.ECN) {
	buf := datagram.NewBuffer()
	n := copy(buf.B[:], payload)
	if segment <= 0 || segment > n {
		segment = n
	}
	b := datagram.NewBatch(buf.B[:n], segment, 0, ecn, buf)
	select {
	case e.other.in <- b:
	default:
		b.Release()
	}
}

func (e *pipeEnd) SetReceiver(r datagram.Receiver) {
	if r == nil {
		e.rcv.Store(nil)
		return
	}
	e.rcv.Store(&r)
}

func (e *pipeEnd) MaxPayload() int       { return 1452 }
func (e *pipeEnd) Done() <-chan struct{} { return e.done }

type textLog struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *textLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *textLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// site is a platform, a gateway and a client of one organization in this process; links in memory stand for the relays.
type site struct {
	t       *testing.T
	srv     *platform.Server
	gateway *gatewayDaemon
	client  *agent.Agent
	log     *textLog
	stateOf map[string]string
	notice  func(tunnel.Notice) // of sessions that are dialled; set before
}

func startSite(t *testing.T, allow ...string) *site {
	t.Helper()
	x := &site{t: t, log: new(textLog), stateOf: map[string]string{}}
	run := func(what string, f func(context.Context) error) {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- f(ctx) }()
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("%s: %v", what, err)
			}
		})
	}
	fatal := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	x.srv, err = platform.Open(t.Context(), platform.Config{Data: t.TempDir(), Listen: "127.0.0.1:0"})
	fatal(err)
	run("platform", x.srv.Run)
	reg := x.srv.Registry()
	gw, err := reg.CreateNode(t.Context(), "default", identity.Gateway, control.CreateNode{Name: "gw"})
	fatal(err)
	cl, err := reg.CreateNode(t.Context(), "default", identity.Client, control.CreateNode{Name: "laptop"})
	fatal(err)
	_, err = reg.CreateResource(t.Context(), "default", control.CreateResource{Name: "loop", Gateways: []string{"gw"}, Address: "127.0.0.0/8", TCP: []policy.PortRange{policy.AllPorts}})
	fatal(err)
	_, err = reg.CreatePolicy(t.Context(), "default", control.CreatePolicy{Name: "p", Subject: "client:laptop", Resource: "loop"})
	fatal(err)

	x.stateOf["gateway"] = t.TempDir()
	o := &options{tun: "off", routes: "off", dns: "off", transport: "auto", direct: "auto", allow: allow}
	o.State, o.MetricsListen, o.LogLevel = x.stateOf["gateway"], "127.0.0.1:0", "debug"
	sh, err := daemon.Open(spec, &o.Options, x.log)
	fatal(err)
	t.Cleanup(func() { sh.Close() })
	x.gateway, err = newGateway(t.Context(), o, sh, gw.Token)
	fatal(err)
	run("gateway", func(ctx context.Context) error { return sh.Run(ctx, x.gateway.run) })

	x.stateOf["client"] = t.TempDir()
	x.client, err = agent.Open(t.Context(), agent.Config{
		StateDir: x.stateOf["client"], Kind: identity.Client, Token: cl.Token, Version: "v1", Logger: slog.New(slog.NewTextHandler(x.log, nil)),
	})
	fatal(err)
	run("client", x.client.Run)
	within, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err = x.gateway.agent.WaitConfig(within)
	fatal(err)
	x.poll("the policy at the gateway", func() bool {
		s, err := x.gateway.agent.Snapshot()
		return err == nil && len(s.Rules) == 1
	})
	return x
}

func (x *site) poll(what string, ok func() bool) {
	x.t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(end) {
			x.t.Fatalf("never: %s\n%s", what, x.log)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (x *site) dial() (*tunnel.Session, error) {
	x.t.Helper()
	a, b := newPipe(x.t)
	if _, err := x.gateway.merged.Add(b, tunnel.LinkInfo{Name: "memory", Peer: x.client.Node()}); err != nil {
		x.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(x.t.Context(), 10*time.Second)
	defer cancel()
	cert, err := x.client.Certificate()
	if err != nil {
		x.t.Fatal(err)
	}
	return tunnel.Dial(ctx, tunnel.DialConfig{
		Link: a, Gateway: x.gateway.agent.Node(), OnNotice: x.notice, Certificate: func() (*tls.Certificate, error) { return cert, nil },
		Trust: func() *identity.Trust {
			tr, err := x.client.Trust(identity.Gateway)
			if err != nil {
				return new(identity.Trust)
			}
			return tr
		},
	})
}

// TestRevocationEndsSessionsInTime revokes, disables and deletes a client, takes its policy away, and ends its session, and each time
// measures from the administrator's call to the end of an open session of QUIC, with the real platform, agents and gateway.
func TestRevocationEndsSessionsInTime(t *testing.T) {
	echo, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	port := netip.MustParseAddrPort(echo.Addr().String()).Port()
	closed := netip.MustParseAddrPort(other.Addr().String()).Port()
	x := startSite(t, fmt.Sprintf("127.0.0.1 %d", port))
	reg := x.srv.Registry()
	back := func(f func() error) func() error { return f }
	for _, step := range []struct {
		name    string
		do      func() error
		undo    func() error // nil: what comes after can not
		again   bool         // the client may come back at once
		refused string       // what a new session is told; "" is anything
	}{
		{"session kill", func() error { return reg.EndSessions(t.Context(), "default", "laptop") }, nil, true, ""},
		{"policy disabled", func() error {
			off := true
			_, err := reg.UpdatePolicy(t.Context(), "default", "p", control.UpdatePolicy{Disabled: &off})
			return err
		}, back(func() error {
			off := false
			_, err := reg.UpdatePolicy(t.Context(), "default", "p", control.UpdatePolicy{Disabled: &off})
			return err
		}), false, ""},
		{"client disabled", func() error {
			_, err := reg.DisableNode(t.Context(), "default", identity.Client, "laptop")
			return err
		}, back(func() error {
			_, err := reg.EnableNode(t.Context(), "default", identity.Client, "laptop")
			return err
		}), false, ""},
		{"client revoked", func() error {
			_, err := reg.RevokeNode(t.Context(), "default", identity.Client, "laptop")
			return err
		}, nil, false, "revoked"},
	} {
		var s *tunnel.Session
		x.poll("a session before: "+step.name, func() bool {
			s, err = x.dial()
			return err == nil
		})
		defer s.Close("test over")
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		flow, err := s.DialTCP(ctx, "127.0.0.1", port)
		if err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if _, err := flow.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(flow, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		// The platform allows all of loopback; the gateway's own list names one port.
		if c, err := s.DialTCP(ctx, "127.0.0.1", closed); !errors.Is(err, tunnel.ErrDenied) || !strings.Contains(err.Error(), "allow list") {
			t.Errorf("a port outside of the allow list: %v", err)
			if c != nil {
				c.Close()
			}
		}
		cancel()
		began := time.Now()
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		select {
		case <-s.Done():
		case <-time.After(5*time.Second - time.Since(began)):
			t.Fatalf("%s: the session is open after %v\n%s", step.name, time.Since(began), x.log)
		}
		if _, err := io.ReadFull(flow, make([]byte, 1)); err == nil {
			t.Errorf("%s: the flow is open", step.name)
		}
		t.Logf("%s: over after %v: %v", step.name, time.Since(began).Round(time.Millisecond), s.Err())
		if again, err := x.dial(); (err == nil) != step.again || (err != nil && !strings.Contains(err.Error()+x.log.String(), step.refused)) {
			t.Errorf("%s: a new session: %v", step.name, err)
		} else if err == nil {
			again.Close("test over")
		}
		if step.undo != nil {
			if err := step.undo(); err != nil {
				t.Fatal(err)
			}
		}
	}
	// Nothing secret is in what gateway and client wrote; what must be kept is for its owner alone.
	cfg := x.gateway.agent.Config()
	if cfg == nil {
		t.Fatal("no configuration")
	}
	for who, dir := range x.stateOf {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			st, err := e.Info()
			if err != nil {
				t.Fatal(err)
			}
			if st.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s of the %s has mode %v", e.Name(), who, st.Mode())
			}
			if e.Name() == "node.key" {
				b, err := os.ReadFile(filepath.Join(dir, e.Name()))
				if err != nil {
					t.Fatal(err)
				}
				if line := strings.Split(string(b), "\n")[1]; strings.Contains(x.log.String(), line) {
					t.Errorf("the log holds the key of the %s", who)
				}
			}
		}
	}
	if strings.Contains(x.log.String(), "PRIVATE KEY") {
		t.Error("the log holds a private key")
	}
}
