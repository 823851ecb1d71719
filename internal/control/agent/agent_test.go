package agent

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// logBuffer is a log that can be read while it is written.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logBuffer) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func gatewayConfig(dir string, tok control.Token) Config {
	return Config{StateDir: dir, Kind: identity.Gateway, Token: tok.String(), Version: "v1", EnrolTimeout: 5 * time.Second}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("timed out waiting until %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// start runs an agent and returns how to stop it.
func start(t *testing.T, a *Agent) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
}

func TestEnrolAndRunOverTLS(t *testing.T) {
	f := newFake(t, nil)
	defer f.close()
	tok := f.newToken(identity.Gateway, "g-1")
	dir, log := t.TempDir(), &logBuffer{}
	cfg := gatewayConfig(dir, tok)
	cfg.Logger = log.logger()
	cfg.Heartbeat = func() control.Heartbeat { return control.Heartbeat{State: "degraded", Problems: []string{"p"}} }
	a, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if a.Node() != tok.Node || a.Name() != "the-g-1" || a.PlatformURL() != f.url {
		t.Errorf("node %v, name %q, platform %q", a.Node(), a.Name(), a.PlatformURL())
	}
	for name, cert := range map[string]func() (leaf string, err error){
		"gateway": func() (string, error) { c, err := a.Certificate(); return c.Leaf.URIs[0].String(), err },
		"site":    func() (string, error) { c, err := a.SiteCertificate(); return c.Leaf.URIs[0].String(), err },
	} {
		if uri, err := cert(); err != nil || uri != "spiffe://acme.sallyway/"+name+"/g-1" {
			t.Errorf("%s certificate: %q, %v", name, uri, err)
		}
	}
	if _, err := a.Snapshot(); !errors.Is(err, ErrNoConfig) {
		t.Errorf("snapshot before any configuration: %v", err)
	}

	seen := make(chan uint64, 16)
	a.OnConfig(func(c *control.Config) { seen <- c.Version })
	f.publish(f.configFor(tok.Node, 7))
	stop := start(t, a)
	if v := <-seen; v != 7 {
		t.Errorf("first configuration has version %d", v)
	}
	f.publish(f.configFor(tok.Node, 8))
	if v := <-seen; v != 8 {
		t.Errorf("second configuration has version %d", v)
	}
	if c, err := a.WaitConfig(t.Context()); err != nil || c.Version != 8 {
		t.Errorf("WaitConfig: %v, %v", c, err)
	}
	if s, err := a.Snapshot(); err != nil || s.Version != 8 {
		t.Errorf("snapshot: %v, %v", s, err)
	}
	waitFor(t, "a heartbeat arrived", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return len(f.beats) > 0 && f.beats[0].Version == "v1" && f.beats[0].State == "degraded" && !f.beats[0].Started.IsZero()
	})
	if st := a.Status(); !st.Connected || st.ConfigVersion != 8 || st.SnapshotVersion != 8 || st.Error != "" || st.CertificateExpiry.IsZero() {
		t.Errorf("status %+v", st)
	}
	if tr, err := a.Trust(identity.Client, identity.Site); err != nil || len(tr.Pins) != 2 || len(tr.Roots) != 1 {
		t.Errorf("trust: %+v, %v", tr, err)
	}
	stop()
	if a.Status().Connected {
		t.Error("still connected after Run returned")
	}

	// What lies in the state folder is for its owner, and what is logged is for everybody.
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		fi, err := d.Info()
		if err == nil && fi.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", path, fi.Mode())
		}
		if b, _ := os.ReadFile(path); bytes.Contains(b, []byte(tok.String())) || bytes.Contains(b, []byte(hex.EncodeToString(tok.Secret))) {
			t.Errorf("%s holds the enrolment token", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	secrets := []string{tok.String(), hex.EncodeToString(tok.Secret), "turn-password", "access-", "PRIVATE KEY"}
	for _, s := range secrets {
		if strings.Contains(log.String(), s) {
			t.Errorf("the log holds %.12q…:\n%s", s, log)
		}
	}
	if !strings.Contains(log.String(), "platform connected") {
		t.Errorf("the log does not say that the platform is connected:\n%s", log)
	}
}

func TestTokens(t *testing.T) {
	f := newFake(t, nil)
	defer f.close()
	first := f.newToken(identity.Gateway, "g-1")
	dir := t.TempDir()
	open := func(tok string, kind identity.Kind) (*Agent, error) {
		return Open(t.Context(), Config{StateDir: dir, Kind: kind, Token: tok, EnrolTimeout: 2 * time.Second})
	}
	if _, err := open("", identity.Gateway); !errors.Is(err, ErrNotEnrolled) {
		t.Fatalf("nothing at all: %v", err)
	}
	refused := func(tok string, kind identity.Kind, want ...string) {
		t.Helper()
		_, err := open(tok, kind)
		var e *EnrolmentRefusedError
		if !errors.As(err, &e) {
			t.Fatalf("not refused: %v", err)
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("refusal lacks %q: %v", w, err)
			}
		}
		if tok != "" && strings.Contains(err.Error(), tok) {
			t.Errorf("the refusal repeats the token: %v", err)
		}
	}
	refused("swe1.nonsense", identity.Gateway, "damaged")
	refused(first.String(), identity.Relay, "this token is for a gateway: run gatewayd up")
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Fatalf("refusals left %v behind", entries)
	}

	a, err := open(first.String(), identity.Gateway)
	if err != nil {
		t.Fatal(err)
	}
	key1 := identity.HashKey(a.Key().Public())
	if _, err = open(first.String(), identity.Gateway); err != nil || read(f, &f.enrols) != 1 {
		t.Fatalf("same token again: %v after %d enrolments", err, read(f, &f.enrols))
	}
	if a, err = open("", identity.Gateway); err != nil || identity.HashKey(a.Key().Public()) != key1 {
		t.Fatalf("no token: %v", err)
	}
	other := f.newToken(identity.Gateway, "g-2")
	refused(other.String(), identity.Gateway, "acme/gateway/g-1", "acme/gateway/g-2", "--state")

	second := f.newToken(identity.Gateway, "g-1")
	if a, err = open(second.String(), identity.Gateway); err != nil || read(f, &f.enrols) != 2 {
		t.Fatalf("newer token: %v after %d enrolments", err, read(f, &f.enrols))
	}
	if identity.HashKey(a.Key().Public()) == key1 {
		t.Error("a new enrolment kept the old key")
	}
	if _, err = open(first.String(), identity.Gateway); err != nil || read(f, &f.enrols) != 2 {
		t.Errorf("a token spent here long ago: %v after %d enrolments", err, read(f, &f.enrols))
	}

	// A token that was spent elsewhere is refused, and the node stays what it was.
	third := f.newToken(identity.Gateway, "g-1")
	f.set(func() { delete(f.tokens, string(third.Secret)) })
	refused(third.String(), identity.Gateway, "used before", "sallyway --org acme gateway token the-g-1")
	if _, err = open("", identity.Gateway); err != nil {
		t.Errorf("after a refused token: %v", err)
	}
	// Platform away: an enrolled node goes on as it was.
	fourth := f.newToken(identity.Gateway, "g-1")
	f.close()
	if _, err = open(fourth.String(), identity.Gateway); err != nil {
		t.Errorf("newer token while the platform is away: %v", err)
	}
	// Another kind of daemon on this folder.
	if _, err := open("", identity.Relay); err == nil || !strings.Contains(err.Error(), "--state") {
		t.Errorf("a relay on a gateway's folder: %v", err)
	}
}

// A host that dies after the platform has spent the token, and before the answer is written, still becomes the node.
func TestLostEnrolmentAnswer(t *testing.T) {
	f := newFake(t, nil)
	defer f.close()
	tok := f.newToken(identity.Gateway, "g-1")
	f.publish(f.configFor(tok.Node, 3))
	f.set(func() { f.loseEnrol = true })
	a, err := Open(t.Context(), gatewayConfig(t.TempDir(), tok)) // within one start
	if err != nil {
		t.Fatalf("answer lost: %v", err)
	}
	if a.Config() == nil || a.Config().Version != 3 || read(f, &f.enrols) != 1 {
		t.Errorf("configuration %v after %d enrolments", a.Config(), read(f, &f.enrols))
	}

	dir := t.TempDir()
	tok = f.newToken(identity.Gateway, "g-2")
	f.publish(f.configFor(tok.Node, 4))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, gatewayConfig(dir, tok)); err == nil {
		t.Fatal("opened with a dead context")
	}
	// The request did leave: play the platform's part with the key that lies there.
	key, err := identity.LoadOrCreateKey(filepath.Join(dir, enrollingKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	f.set(func() { delete(f.tokens, string(tok.Secret)); f.keys[tok.Node] = key.Public() })
	a, err = Open(t.Context(), gatewayConfig(dir, tok))
	if err != nil {
		t.Fatalf("restart after a crash within the enrolment: %v", err)
	}
	if identity.HashKey(a.Key().Public()) != identity.HashKey(key.Public()) {
		t.Error("another key than the one that was enrolled")
	}
	if _, err := os.Stat(filepath.Join(dir, enrollingFile)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s still there: %v", enrollingFile, err)
	}
}

// A crash between the writing of node.json and the renaming of the key leaves a node that starts.
func TestCrashBetweenStateAndKey(t *testing.T) {
	f := newFake(t, nil)
	defer f.close()
	dir := t.TempDir()
	if _, err := Open(t.Context(), gatewayConfig(dir, f.newToken(identity.Gateway, "g-1"))); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, keyFile), filepath.Join(dir, enrollingKeyFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := identity.LoadOrCreateKey(filepath.Join(dir, keyFile)); err != nil { // the key of the enrolment before
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), Config{StateDir: dir, Kind: identity.Gateway}); err != nil {
		t.Errorf("after the crash: %v", err)
	}
	if _, err := Open(t.Context(), Config{StateDir: dir, Kind: identity.Gateway}); err != nil {
		t.Errorf("one start later: %v", err)
	}
}

func TestDamagedState(t *testing.T) {
	f := newFake(t, nil)
	defer f.close()
	for _, name := range []string{nodeFile, keyFile, cacheFile} {
		dir := t.TempDir()
		if _, err := Open(t.Context(), gatewayConfig(dir, f.newToken(identity.Gateway, "g-1"))); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), Config{StateDir: dir, Kind: identity.Gateway}); err == nil || !strings.Contains(err.Error(), dir) {
			t.Errorf("damaged %s: %v", name, err)
		}
	}
}

func TestPlatformNotTrusted(t *testing.T) {
	f := newFake(t, nil)
	defer f.close()
	tests := []struct {
		name   string
		change func(*control.Token, *Config)
		kind   link.Kind
		want   []string
	}{
		{"another pin", func(tok *control.Token, _ *Config) { tok.Pin = strings.Repeat("ab", 32) }, link.Pin, []string{"abababababababab", "intercepts", f.pin()[:16]}},
		{"no pin, unknown CA", func(tok *control.Token, _ *Config) { tok.Pin = "" }, link.TLS, []string{"authority that this host does not know"}},
		{"clock years behind", func(_ *control.Token, c *Config) {
			c.Now = func() time.Time { return time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC) }
		}, link.Clock, []string{"2001-02-03T04:05:06Z", "valid from"}},
		{"name that does not resolve", func(tok *control.Token, c *Config) {
			tok.URL = "https://platform.invalid"
			c.DialContext = func(context.Context, string, string) (net.Conn, error) {
				return nil, &net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", Name: "platform.invalid", IsNotFound: true}}
			}
		}, link.DNS, []string{"platform.invalid does not resolve"}},
		{"name that the certificate lacks", func(tok *control.Token, c *Config) {
			tok.URL = "https://elsewhere.example"
			c.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, network, f.listener.Addr().String())
			}
		}, link.TLS, []string{"not for elsewhere.example"}},
		{"nobody listens", func(tok *control.Token, _ *Config) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			tok.URL = "https://" + l.Addr().String()
			l.Close()
		}, link.Connect, []string{"refuses the connection"}},
		{"plain HTTP asked of TLS", func(tok *control.Token, _ *Config) { tok.URL = "http" + strings.TrimPrefix(tok.URL, "https") }, "", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tok := f.newToken(identity.Gateway, "g-1")
			cfg := gatewayConfig(t.TempDir(), tok)
			cfg.EnrolTimeout = time.Second
			tt.change(&tok, &cfg)
			cfg.Token = tok.String()
			_, err := Open(t.Context(), cfg)
			if err == nil {
				t.Fatal("enrolled")
			}
			if strings.Contains(err.Error(), cfg.Token) {
				t.Errorf("the error repeats the token: %v", err)
			}
			if tt.kind == "" {
				return
			}
			var e *link.Error
			if !errors.As(err, &e) || e.Kind != tt.kind || e.Remedy == "" {
				t.Fatalf("error %v (%+v), want kind %s with a remedy", err, e, tt.kind)
			}
			for _, w := range append(tt.want, "enrol gateway the-g-1: ", "\n"+e.Remedy) {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error lacks %q: %v", w, err)
				}
			}
		})
	}
	if read(f, &f.enrols) != 0 {
		t.Errorf("%d enrolments", read(f, &f.enrols))
	}
}
