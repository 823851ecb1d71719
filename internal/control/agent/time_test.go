package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/identity"
)

// The tests of this file run in virtual time, over connections in memory.

// inBubble enrols a gateway at a fake platform and runs test with both.
func inBubble(t *testing.T, test func(t *testing.T, f *fakePlatform, l *pipeListener, cfg Config)) {
	synctest.Test(t, func(t *testing.T) {
		l := newPipeListener()
		f := newFake(t, l)
		defer func() {
			f.close()
			synctest.Wait()
		}()
		cfg := gatewayConfig(t.TempDir(), f.newToken(identity.Gateway, "g-1"))
		cfg.DialContext = l.dial
		test(t, f, l, cfg)
	})
}

func open(t *testing.T, cfg Config) *Agent {
	t.Helper()
	a, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestSilentStreamIsDead(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fakePlatform, _ *pipeListener, cfg Config) {
		log := &logBuffer{}
		cfg.Logger = log.logger()
		a := open(t, cfg)
		stop := start(t, a)
		defer stop()
		time.Sleep(95 * time.Second) // pings keep it alive
		if st := a.Status(); !st.Connected || read(f, &f.streams) != 1 {
			t.Fatalf("after 95 s of pings: %d streams, %+v", read(f, &f.streams), st)
		}
		f.set(func() { f.silent = true }) // the last ping was at 90 s
		time.Sleep(24 * time.Second)
		if st := a.Status(); !st.Connected || read(f, &f.streams) != 1 {
			t.Fatalf("after 29 s of silence: %d streams, %+v", read(f, &f.streams), st)
		}
		time.Sleep(3 * time.Second) // dead at 30 s, then a wait of at most one second
		if st := a.Status(); !st.Connected || read(f, &f.streams) != 2 || st.Error != "" {
			t.Errorf("not back: %d streams, %+v", read(f, &f.streams), st)
		}
		if !strings.Contains(log.String(), "silent for 30s") {
			t.Errorf("the log does not say why:\n%s", log)
		}
	})
}

func TestPlatformDownAndBack(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fakePlatform, l *pipeListener, cfg Config) {
		log := &logBuffer{}
		cfg.Logger = log.logger()
		a := open(t, cfg)
		f.publish(f.configFor(a.Node(), 5))
		stop := start(t, a)
		time.Sleep(time.Second)
		stop()

		// A restart without the platform serves the cache at once.
		l.setDown(true)
		cfg.Token = ""
		a = open(t, cfg)
		seen := make(chan uint64, 16)
		a.OnConfig(func(c *control.Config) { seen <- c.Version })
		stop = start(t, a)
		synctest.Wait()
		select {
		case v := <-seen:
			if v != 5 {
				t.Errorf("cached configuration has version %d", v)
			}
		default:
			t.Fatal("the cached configuration was not served at once")
		}
		if s, err := a.Snapshot(); err != nil || s.Version != 5 {
			t.Errorf("cached snapshot: %v, %v", s, err)
		}

		// Eight hours later everything still stands; the leaf's life is a day.
		time.Sleep(8 * time.Hour)
		if _, err := a.Certificate(); err != nil {
			t.Errorf("after eight hours: %v", err)
		}
		if stale, err := a.SnapshotProblem(); stale || err != nil {
			t.Errorf("after eight hours: stale %v, %v", stale, err)
		}
		if n := strings.Count(log.String(), "platform not connected; trying again"); n != 1 {
			t.Errorf("one reason is logged %d times above debug", n)
		}
		// A day and more: expired, and said so.
		time.Sleep(17 * time.Hour)
		if _, err := a.Certificate(); err == nil || !strings.Contains(err.Error(), "expired") || !strings.Contains(err.Error(), "platform is down") {
			t.Errorf("certificate after 25 h: %v", err)
		}
		if stale, err := a.SnapshotProblem(); !stale || err == nil {
			t.Errorf("snapshot after 25 h: stale %v, %v", stale, err)
		}
		if s, err := a.Snapshot(); err != nil || s.Version != 5 {
			t.Errorf("running flows lost their snapshot: %v", err)
		}
		// The platform is back: connected within the backoff's bound, certificates at once.
		l.setDown(false)
		time.Sleep(31 * time.Second)
		if st := a.Status(); !st.Connected {
			t.Errorf("not connected 31 s after the platform came back: %+v", st)
		}
		if _, err := a.Certificate(); err != nil || read(f, &f.renewals) == 0 {
			t.Errorf("certificate after the platform came back: %v, %d renewals", err, read(f, &f.renewals))
		}
		stop()
	})
}

func TestRenewalAtHalfLife(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fakePlatform, _ *pipeListener, cfg Config) {
		a := open(t, cfg)
		before, _ := a.Certificate()
		stop := start(t, a)
		time.Sleep(9 * time.Hour)
		if read(f, &f.renewals) != 0 {
			t.Errorf("%d renewals after 9 h of 24", read(f, &f.renewals))
		}
		time.Sleep(6 * time.Hour)
		if read(f, &f.renewals) != 1 {
			t.Errorf("%d renewals after 15 h of 24", read(f, &f.renewals))
		}
		after, err := a.Certificate()
		if err != nil || !after.Leaf.NotAfter.After(before.Leaf.NotAfter) {
			t.Errorf("certificate: %v", err)
		}
		if site, err := a.SiteCertificate(); err != nil || !site.Leaf.NotAfter.Equal(after.Leaf.NotAfter) {
			t.Errorf("site certificate: %v", err)
		}
		stop()
		cfg.Token = ""
		if kept, err := open(t, cfg).Certificate(); err != nil || !kept.Leaf.Equal(after.Leaf) {
			t.Errorf("the renewed certificate was not kept: %v", err)
		}
		// Two days: the access token (15 min) and the leaf (24 h) go by many times.
		a = open(t, cfg)
		stop = start(t, a)
		time.Sleep(48 * time.Hour)
		stop()
		if n := read(f, &f.renewals); n < 4 || n > 7 {
			t.Errorf("%d renewals in 63 hours", n)
		}
	})
}

// TestRenewalWhenTheCAIsGone: a leaf whose CA is not accepted any more is renewed within a minute, and once: a platform that issues by such a CA is
// not asked over and over.
func TestRenewalWhenTheCAIsGone(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fakePlatform, _ *pipeListener, cfg Config) {
		a := open(t, cfg)
		stop := start(t, a)
		defer stop()
		time.Sleep(time.Minute)
		next := newAuthority(t, "next", f.root)
		f.set(func() { f.nodes = next })
		f.publish(f.configFor(a.Node(), 20))
		time.Sleep(2 * time.Minute)
		if c, err := a.Certificate(); err != nil || !bytes.Equal(c.Certificate[1], next.cert.Raw) || read(f, &f.renewals) != 1 {
			t.Errorf("%d renewals, %v: the leaf is by the CA that is gone", read(f, &f.renewals), err)
		}
		c := f.configFor(a.Node(), 21)
		c.Trust.Pins[identity.Gateway] = []identity.KeyHash{{1}}
		f.publish(c)
		time.Sleep(time.Hour)
		if n := read(f, &f.renewals); n != 2 {
			t.Errorf("%d renewals, want 2", n)
		}
	})
}

func TestRenewalJitter(t *testing.T) {
	inBubble(t, func(t *testing.T, _ *fakePlatform, _ *pipeListener, cfg Config) {
		a := open(t, cfg)
		leaf, _ := a.Certificate()
		lo, hi := leaf.Leaf.NotAfter, leaf.Leaf.NotBefore
		for range 1000 {
			at := a.renewAt()
			if at.Before(lo) {
				lo = at
			}
			if at.After(hi) {
				hi = at
			}
		}
		half := leaf.Leaf.NotBefore.Add(12 * time.Hour)
		if d := half.Sub(lo); d < time.Hour || d > 3*time.Hour {
			t.Errorf("earliest renewal %v before half of the life", d)
		}
		if d := hi.Sub(half); d < time.Hour || d > 3*time.Hour {
			t.Errorf("latest renewal %v after half of the life", d)
		}
	})
}

func TestBlockedNodeAsksSlowly(t *testing.T) {
	for _, code := range []string{control.CodeNodeDisabled, control.CodeNodeRevoked, control.CodeNodeUnknown} {
		t.Run(code, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fakePlatform, _ *pipeListener, cfg Config) {
				log := &logBuffer{}
				cfg.Logger = log.logger()
				a := open(t, cfg)
				stop := start(t, a)
				defer stop()
				time.Sleep(5 * time.Second)
				f.set(func() {
					f.problem = &control.Problem{Status: 403, Code: code, Detail: "the gateway the-g-1 is not wanted"}
					f.access = map[string]identity.Node{}
					f.asked = nil
					for ch := range f.push {
						ch <- nil
					}
				})
				time.Sleep(10 * time.Minute)
				st := a.Status()
				if st.Connected || st.Blocked != "the gateway the-g-1 is not wanted" || st.Remedy == "" {
					t.Errorf("status %+v", st)
				}
				if n := len(read(f, &f.asked)); n < 15 || n > 26 {
					t.Errorf("asked %d times in ten minutes, want about 20", n)
				}
				if n := strings.Count(log.String(), "the platform refuses this node"); n != 1 {
					t.Errorf("logged %d times", n)
				}
				f.set(func() { f.problem = nil })
				time.Sleep(40 * time.Second)
				if st := a.Status(); !st.Connected || st.Blocked != "" {
					t.Errorf("enabled again: %+v", st)
				}
			})
		})
	}
}

func TestBackoff(t *testing.T) {
	full := backoff{random: func() float64 { return 1 }}
	for i, want := range []time.Duration{1, 2, 4, 8, 16, 20, 20, 20} {
		if got := full.next(); got != want*time.Second {
			t.Errorf("bound of try %d is %v, want %v", i, got, want*time.Second)
		}
	}
	full.reset()
	if got := full.next(); got != time.Second {
		t.Errorf("after a reset %v", got)
	}
	var b backoff
	seen := make(map[time.Duration]bool)
	for range 200 {
		b.n = 5
		d := b.next()
		if d < 0 || d > backoffMost {
			t.Fatalf("wait %v", d)
		}
		seen[d.Round(time.Second)] = true
	}
	if len(seen) < 20 {
		t.Errorf("only %d different waits: no full jitter", len(seen))
	}
}

func TestLowerVersionsAreRefused(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fakePlatform, _ *pipeListener, cfg Config) {
		a := open(t, cfg)
		n := a.Node()
		stop := start(t, a)
		step := func(c *control.Config) {
			f.publish(c)
			synctest.Wait()
		}
		step(f.configFor(n, 9))
		step(f.configFor(n, 8))
		if st := a.Status(); st.ConfigVersion != 9 || !strings.Contains(st.ConfigError, "version 8") || !strings.Contains(st.ConfigError, "version 9") {
			t.Errorf("after a lower version: %+v", st)
		}
		other := f.configFor(n, 10)
		other.Node.ID = "g-2"
		step(other)
		if st := a.Status(); st.ConfigVersion != 9 || !strings.Contains(st.ConfigError, "g-2") {
			t.Errorf("after another node's configuration: %+v", st)
		}
		noRoots := f.configFor(n, 10)
		noRoots.Trust.Roots = ""
		step(noRoots)
		if st := a.Status(); st.ConfigVersion != 9 || st.ConfigError == "" {
			t.Errorf("after a configuration without roots: %+v", st)
		}
		otherRoots := f.configFor(n, 10)
		otherRoots.Trust.Roots = foreignRoot(t) + otherRoots.Trust.Roots
		step(otherRoots)
		if st := a.Status(); st.ConfigVersion != 9 || !strings.Contains(st.ConfigError, "enrolled with") {
			t.Errorf("after a configuration with a foreign root: %+v", st)
		}

		// A newer configuration with an older, foreign or missing snapshot is taken over without the snapshot.
		for i, jws := range []string{
			f.snapshot(n, 8, time.Now().Add(time.Hour)),
			f.snapshot(identity.Node{Org: "acme", Kind: identity.Gateway, ID: "g-2"}, 12, time.Now().Add(time.Hour)),
			f.configFor(n, 11).Gateway.Snapshot + "x",
			"",
		} {
			c := f.configFor(n, uint64(11+i))
			c.Gateway.Snapshot = jws
			step(c)
			st := a.Status()
			s, err := a.Snapshot()
			if st.ConfigVersion != uint64(11+i) || err != nil || s.Version != 9 || st.SnapshotError == "" {
				t.Errorf("bad snapshot %d: config %d, snapshot %+v, %v, problem %q", i, st.ConfigVersion, s, err, st.SnapshotError)
			}
		}
		stop()

		// The highest versions outlive a restart.
		cfg.Token = ""
		f.publish(f.configFor(n, 13))
		a = open(t, cfg)
		if s, err := a.Snapshot(); err != nil || s.Version != 9 {
			t.Errorf("the last good snapshot after a restart: %+v, %v", s, err)
		}
		stop = start(t, a)
		synctest.Wait()
		if st := a.Status(); st.ConfigVersion != 14 || !strings.Contains(st.ConfigError, "version 13") {
			t.Errorf("lower version after a restart: %+v", st)
		}
		step(f.configFor(n, 15))
		if st := a.Status(); st.ConfigVersion != 15 || st.SnapshotVersion != 15 || st.ConfigError != "" || st.SnapshotError != "" {
			t.Errorf("good again: %+v", st)
		}
		stop()
		var kept cacheState
		if ok, err := load(cfg.StateDir, cacheFile, &kept); !ok || err != nil || kept.Highest != 15 || kept.HighestSnapshot != 15 {
			t.Errorf("%s: %+v, %v", filepath.Join(cfg.StateDir, cacheFile), kept, err)
		}
	})
}

// An access token that the platform forgot (it restarted) is replaced, and heartbeats go on.
func TestForgottenAccessToken(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fakePlatform, _ *pipeListener, cfg Config) {
		a := open(t, cfg)
		stop := start(t, a)
		defer stop()
		time.Sleep(5 * time.Second)
		f.set(func() {
			f.access = map[string]identity.Node{}
			for ch := range f.push {
				ch <- nil
			}
		})
		time.Sleep(10 * time.Second)
		f.set(func() { f.beats = nil })
		time.Sleep(35 * time.Second)
		if n := len(read(f, &f.beats)); n < 3 || n > 5 || !a.Status().Connected {
			t.Errorf("%d heartbeats in 35 s, status %+v", n, a.Status())
		}
	})
}

func TestClocksThatDiffer(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fakePlatform, _ *pipeListener, cfg Config) {
		a := open(t, cfg)
		// Four minutes: the node goes by the platform's clock for the platform's checks.
		f.set(func() { f.clock = func() time.Time { return time.Now().Add(4 * time.Minute) } })
		stop := start(t, a)
		time.Sleep(5 * time.Second)
		if st := a.Status(); !st.Connected {
			t.Errorf("clocks differ by 4 min: %+v", st)
		}
		stop()
		// An hour: refused, and both clocks are named.
		cfg.Token = ""
		a = open(t, cfg)
		f.set(func() { f.clock = func() time.Time { return time.Now().Add(time.Hour) } })
		stop = start(t, a)
		time.Sleep(5 * time.Second)
		st := a.Status()
		ours, theirs := time.Now().UTC().Format("2006-01-02T15:0"), time.Now().UTC().Add(time.Hour).Format("2006-01-02T15:0")
		if st.Connected || !strings.Contains(st.Error, ours) || !strings.Contains(st.Error, theirs) || !strings.Contains(st.Remedy, "clock") {
			t.Errorf("clocks differ by 1 h: %+v", st)
		}
		stop()
	})
}

// A platform that is away at the enrolment is waited for, and the wait has an end.
func TestEnrolmentWaits(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fakePlatform, l *pipeListener, cfg Config) {
		cfg.EnrolTimeout = time.Minute
		l.setDown(true)
		begin := time.Now()
		_, err := Open(t.Context(), cfg)
		if took := time.Since(begin); err == nil || took < time.Minute || took > 61*time.Second || !strings.Contains(err.Error(), "platform is down") {
			t.Fatalf("after %v: %v", took, err)
		}
		// One that takes connections and says nothing is no better.
		l.setDown(false)
		silent := cfg
		silent.DialContext = func(context.Context, string, string) (net.Conn, error) {
			near, far := net.Pipe()
			t.Cleanup(func() { near.Close(); far.Close() })
			return near, nil
		}
		silent.EnrolTimeout = 5 * time.Second
		var e *link.Error
		if _, err := Open(t.Context(), silent); !errors.As(err, &e) || e.Kind != link.Timeout || !strings.Contains(err.Error(), "did not answer within 5s") {
			t.Errorf("silent platform: %v", err)
		}
		l.setDown(true)
		time.AfterFunc(20*time.Second, func() { l.setDown(false) })
		if _, err := Open(t.Context(), cfg); err != nil || read(f, &f.enrols) != 1 {
			t.Fatalf("platform back after 20 s: %v", err)
		}
	})
}

func TestWaitConfigSaysWhy(t *testing.T) {
	inBubble(t, func(t *testing.T, _ *fakePlatform, l *pipeListener, cfg Config) {
		a := open(t, cfg)
		l.setDown(true)
		stop := start(t, a)
		defer stop()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if _, err := a.WaitConfig(ctx); !errors.Is(err, ErrNoConfig) || !strings.Contains(err.Error(), "platform is down") {
			t.Errorf("WaitConfig: %v", err)
		}
	})
}

// foreignRoot is a root that nobody here was enrolled with.
func foreignRoot(t *testing.T) string {
	t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return string(identity.EncodeCertificates(c))
}
