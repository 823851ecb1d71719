package legs

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	server "sallyway/relay"
	"sallyway/relay/wire"
)

var (
	relayNode   = identity.Node{Org: identity.SharedOrg, Kind: identity.Relay, ID: "r-1"}
	gatewayNode = identity.Node{Org: "acme", Kind: identity.Gateway, ID: "g-1"}
	clientNode  = identity.Node{Org: "acme", Kind: identity.Client, ID: "c-1"}

	credentialKey = []byte("an HMAC key of exactly 32 bytes!")
)

// pki is a root, a CA for relays, and a relay's certificate.
type pki struct {
	root *x509.Certificate
	pin  identity.KeyHash
	leaf *tls.Certificate
}

func issue(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	tmpl.SerialNumber, tmpl.BasicConstraintsValid = big.NewInt(1), true
	tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func newPKI(t testing.TB, n identity.Node) *pki {
	t.Helper()
	var keys [3]crypto.Signer
	for i := range keys {
		k, err := identity.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		keys[i] = k
	}
	tmpl := &x509.Certificate{Subject: pkix.Name{CommonName: "root"}, IsCA: true, KeyUsage: x509.KeyUsageCertSign}
	root := issue(t, tmpl, tmpl, keys[0].Public(), keys[0])
	ca := issue(t, &x509.Certificate{Subject: pkix.Name{CommonName: "relays"}, IsCA: true, KeyUsage: x509.KeyUsageCertSign}, root, keys[1].Public(), keys[0])
	leaf := issue(t, &x509.Certificate{
		URIs: []*url.URL{n.URI()}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, ca, keys[2].Public(), keys[1])
	cert, err := identity.TLSCertificate([]*x509.Certificate{leaf, ca}, keys[2])
	if err != nil {
		t.Fatal(err)
	}
	return &pki{root, identity.CertificateKeyHash(ca), cert}
}

// relayServer is a relay on loopback that can be stopped and started again on the same port.
type relayServer struct {
	t    testing.TB
	pki  *pki
	addr netip.AddrPort
	stop func()
	*server.Server
}

func startRelay(t testing.TB, p *pki) *relayServer {
	t.Helper()
	r := &relayServer{t: t, pki: p, addr: netip.MustParseAddrPort("127.0.0.1:0")}
	r.start()
	t.Cleanup(func() { r.stop() })
	return r
}

func (r *relayServer) start() {
	r.t.Helper()
	var err error
	r.Server, err = server.New(server.Config{
		Listen: r.addr, Keys: [][]byte{credentialKey}, Organizations: map[string]server.Organization{"acme": {}},
		Certificate: func() (*tls.Certificate, error) { return r.pki.leaf, nil },
	})
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	if err := r.Listen(ctx); err != nil {
		cancel()
		r.t.Fatal(err)
	}
	r.addr = r.Addr()
	done := make(chan error, 1)
	go func(s *server.Server) { done <- s.Run(ctx) }(r.Server)
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("relay: %v", err)
		}
	})
}

// ref is how a node is told of the relay at addr.
func (p *pki) ref(addr netip.AddrPort, n identity.Node) control.RelayRef {
	u := wire.Username{Expiry: time.Now().Add(time.Hour), Node: n, Flags: wire.FlagPlainData}.String()
	return control.RelayRef{
		Node: relayNode, Name: "fra-1", Host: addr.Addr().String(), Port: addr.Port(),
		Roots: string(identity.EncodeCertificates(p.root)), Pins: []identity.KeyHash{p.pin}, Username: u, Password: wire.Password(credentialKey, u),
	}
}

// journal takes a log down, line by line with its time.
type journal struct {
	mu    sync.Mutex
	lines []map[string]any
}

func newJournal() (*journal, *slog.Logger) {
	j := &journal{}
	return j, slog.New(slog.NewJSONHandler(j, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func (j *journal) Write(b []byte) (int, error) {
	var line map[string]any
	if err := json.NewDecoder(bytes.NewReader(b)).Decode(&line); err != nil {
		return 0, err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, line)
	return len(b), nil
}

// times are those of the lines with a message.
func (j *journal) times(t testing.TB, msg string) []time.Time {
	t.Helper()
	j.mu.Lock()
	defer j.mu.Unlock()
	var out []time.Time
	for _, l := range j.lines {
		if l["msg"] == msg {
			at, err := time.Parse(time.RFC3339Nano, l["time"].(string))
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, at)
		}
	}
	return out
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	b, _ := json.MarshalIndent(j.lines, "", " ") // lines came from JSON
	return string(b)
}

// firewall stands before a relay: TCP passes, UDP passes where it is open and is dropped in silence where it is not.
type firewall struct {
	addr    netip.AddrPort
	udpOpen atomic.Bool
	dropped atomic.Int64
}

func newFirewall(t testing.TB, to netip.AddrPort) *firewall {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &firewall{addr: ln.Addr().(*net.TCPAddr).AddrPort()}
	pc, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(f.addr))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := map[io.Closer]bool{}
	keep := func(c io.Closer) {
		mu.Lock()
		defer mu.Unlock()
		open[c] = true
	}
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			keep(c)
			up, err := net.Dial("tcp", to.String())
			if err != nil {
				c.Close()
				continue
			}
			keep(up)
			for _, p := range [][2]net.Conn{{c, up}, {up, c}} {
				wg.Go(func() {
					_, _ = io.Copy(p[0], p[1])
					p[0].Close()
					p[1].Close()
				})
			}
		}
	})
	wg.Go(func() {
		behind := map[netip.AddrPort]*net.UDPConn{}
		buf := make([]byte, 65536)
		for {
			n, from, err := pc.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			if !f.udpOpen.Load() {
				f.dropped.Add(1)
				continue
			}
			up := behind[from]
			if up == nil {
				if up, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to)); err != nil {
					continue
				}
				behind[from] = up
				keep(up)
				wg.Go(func() {
					b := make([]byte, 65536)
					for {
						n, err := up.Read(b)
						if errors.Is(err, net.ErrClosed) {
							return
						}
						if err == nil {
							_, _ = pc.WriteToUDPAddrPort(b[:n], from)
						}
					}
				})
			}
			_, _ = up.Write(buf[:n])
		}
	})
	t.Cleanup(func() {
		ln.Close()
		pc.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return f
}

// run runs a keeper until the test ends, or until the function it returns is called; that waits for all of it.
func run(t testing.TB, k *Keeper) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- k.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Run does not return")
		}
	})
	t.Cleanup(stop)
	return stop
}

func waitFor(t testing.TB, d time.Duration, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(d); !cond(); time.Sleep(2 * time.Millisecond) { // a poll
		if time.Now().After(deadline) {
			t.Fatalf("waited %v for %s", d, what)
		}
	}
}
