package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyway/internal/lab"
)

// arch is what packages are made for here.
const arch = runtime.GOARCH

// Versions of the packages that are installed and upgraded.
const (
	before = "1.0.0"
	after  = "1.0.1"
)

// packed makes both versions of every package from the programs under test, into a folder.
func packed(t *testing.T) string {
	t.Helper()
	bin, nfpm := programs(t)
	out := t.TempDir()
	var wg sync.WaitGroup
	for _, v := range []string{before, after} {
		b := builder{Version: version{Package: v, Commit: "0123456789ab", Time: time.Unix(1_700_000_000, 0).UTC()}, Arch: arch, Bin: bin, Nfpm: nfpm}
		wg.Go(func() {
			for _, p := range products {
				if _, err := b.build(p, out); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return out
}

// programs returns the folder of the programs under test, and the program nfpm.
func programs(t *testing.T) (bin, nfpm string) {
	t.Helper()
	bin = os.Getenv("SALLYWAY_BIN")
	if bin == "" {
		root, err := lab.SourceRoot()
		if err != nil {
			t.Fatal(err)
		}
		bin = filepath.Join(root, "bin")
	}
	for _, p := range append([]string{"nfpm"}, programNames()...) {
		if _, err := os.Stat(filepath.Join(bin, p)); err != nil {
			t.Fatalf("%v\nmake build nfpm", err)
		}
	}
	return bin, filepath.Join(bin, "nfpm")
}

func programNames() []string {
	var out []string
	for _, p := range products {
		out = append(out, p.Program)
	}
	return out
}

// names are those of all packages.
func names() []string {
	var out []string
	for _, p := range products {
		out = append(out, p.Name)
	}
	return out
}

// TestLife installs, runs, upgrades, removes and purges the packages on every release: first where no systemd runs, as
// when an image is made, then on five machines with systemd that together are an organization, with connections
// through them during the upgrade.
func TestLife(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts, namespaces and packages need root")
	}
	t.Parallel() // it waits for a mirror first
	ctx, cancel := context.WithTimeout(t.Context(), 12*time.Minute)
	defer cancel()
	var roots map[string]string
	var packages string
	var wg sync.WaitGroup
	began := time.Now()
	wg.Go(func() { roots = debian(ctx, t, releases...) })
	wg.Go(func() { packages = packed(t) })
	wg.Wait()
	if t.Failed() || roots == nil || packages == "" {
		t.FailNow()
	}
	t.Logf("two Debians and %d packages made in %v", 2*2*len(products), time.Since(began).Round(time.Second))
	t.Run("rpm", func(t *testing.T) { rpm(ctx, t, roots[releases[0]], packages) })
	for _, r := range releases {
		t.Run("chroot/"+r, func(t *testing.T) { chroot(ctx, t, r, roots[r], packages) })
	}
	t.Run("systemd", func(t *testing.T) { organization(ctx, t, roots, packages) })
}

// chroot is the life of all packages where nothing runs.
func chroot(ctx context.Context, t *testing.T, release, root, packages string) {
	l, err := lab.New(lab.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	m := start(ctx, l.Peer, t, release, root, packages, "/usr/bin/sleep infinity")
	empty := m.tree(ctx)

	said := m.apt(ctx, before, names()...)
	for _, p := range products {
		if !strings.Contains(said, p.Hint()) {
			t.Errorf("the installation of %s does not say what is next:\n%s", p.Name, said)
		}
		if out := m.run(ctx, p.Program, "version"); !strings.Contains(out, p.Program) {
			t.Errorf("%s version: %s", p.Program, out)
		}
		if _, err := m.try(ctx, "", "systemctl", "is-enabled", p.Unit); err == nil {
			t.Errorf("%s is enabled before it is configured", p.Unit)
		}
		if out := m.run(ctx, "getent", "passwd", p.Unit); !strings.HasPrefix(out, p.Unit+":") {
			t.Errorf("user of %s: %q", p.Unit, out)
		}
		m.run(ctx, "systemd-analyze", "verify", "--man=no", p.Unit+".service")
		if out := m.run(ctx, "dpkg", "--verify", p.Name); strings.TrimSpace(out) != "" {
			t.Errorf("dpkg --verify %s: %s", p.Name, out)
		}
	}

	// What is configured for an image that is being made: install writes into it beside the package's unit.
	m.feed(ctx, "sallyway-token", "gatewayd", "install", "--root", "/image-of-a-host", "--token-file", "-")
	m.run(ctx, "rm", "-r", "/image-of-a-host")

	// An upgrade keeps what was set and brings back nothing that was taken away.
	m.feed(ctx, "log-level: debug\n", "tee", "/etc/sallyway/gatewayd.yaml")
	m.run(ctx, "rm", "/etc/sallyway/relayd.yaml")
	said = m.apt(ctx, after, names()...)
	if strings.Contains(said, "not started") {
		t.Errorf("an upgrade tells how to begin:\n%s", said)
	}
	if out := m.run(ctx, "cat", "/etc/sallyway/gatewayd.yaml"); out != "log-level: debug\n" {
		t.Errorf("settings after the upgrade: %q", out)
	}
	if _, err := m.try(ctx, "", "test", "-e", "/etc/sallyway/relayd.yaml"); err == nil {
		t.Error("the upgrade brought a removed file of settings back")
	}

	state := "/var/lib/sallyway/gatewayd/key"
	m.run(ctx, "mkdir", "-p", filepath.Dir(state))
	m.run(ctx, "touch", state, "/etc/sallyway/gatewayd.token")
	m.run(ctx, append([]string{"apt-get", "-q", "-y", "remove"}, names()...)...)
	for _, path := range []string{state, "/etc/sallyway/gatewayd.token", "/etc/sallyway/gatewayd.yaml"} {
		m.run(ctx, "test", "-e", path)
	}
	m.run(ctx, append([]string{"apt-get", "-q", "-y", "purge"}, names()...)...)
	// Users stay, as Debian has it: files somewhere may be theirs.
	left := slices.DeleteFunc(m.tree(ctx), func(p string) bool {
		return slices.Contains(empty, p) || strings.HasPrefix(p, "/etc/") && (strings.HasSuffix(p, "- f") || strings.Contains(p, "/.pwd.lock"))
	})
	if len(left) > 0 {
		t.Errorf("left after purge: %q", left)
	}
}

// rpm is the life of the RPM packages, with their scripts, by the rpm that Debian has. Its database knows none of what Debian
// brought, so dependencies are not asked for: the packages have none but files that every system has.
func rpm(ctx context.Context, t *testing.T, root, packages string) {
	l, err := lab.New(lab.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	m := start(ctx, l.Peer, t, releases[0], root, packages, "/usr/bin/sleep infinity")
	m.run(ctx, "rpm", "--initdb")
	empty := m.tree(ctx)
	files := func(version string) []string {
		var out []string
		for _, n := range names() {
			out = append(out, "/packages/"+fileName(product{Name: n}, version, arch, "rpm"))
		}
		return out
	}
	said := m.run(ctx, append([]string{"rpm", "--install", "--nodeps"}, files(before)...)...)
	for _, p := range products {
		if !strings.Contains(said, p.Hint()) {
			t.Errorf("the installation of %s does not say what is next:\n%s", p.Name, said)
		}
		m.run(ctx, p.Program, "version")
		if out := m.run(ctx, "rpm", "--query", "--configfiles", p.Name); out != "/etc/sallyway/"+p.State+".yaml\n" {
			t.Errorf("settings of %s: %q", p.Name, out)
		}
		if out := m.run(ctx, "getent", "passwd", p.Unit); !strings.HasPrefix(out, p.Unit+":") {
			t.Errorf("user of %s: %q", p.Unit, out)
		}
		m.run(ctx, "rpm", "--verify", "--nodeps", p.Name)
	}
	m.feed(ctx, "log-level: debug\n", "tee", "/etc/sallyway/gatewayd.yaml")
	said = m.run(ctx, append([]string{"rpm", "--upgrade", "--nodeps"}, files(after)...)...)
	if strings.Contains(said, "not started") {
		t.Errorf("an upgrade tells how to begin:\n%s", said)
	}
	if out := m.run(ctx, "cat", "/etc/sallyway/gatewayd.yaml"); out != "log-level: debug\n" {
		t.Errorf("settings after the upgrade: %q", out)
	}
	if out := m.run(ctx, "rpm", "--query", "--queryformat", "%{VERSION}-%{RELEASE}.%{ARCH}", "sallyway-relay"); out != after+"-1."+rpmArch[arch] {
		t.Errorf("rpm has %s", out)
	}
	m.run(ctx, append([]string{"rpm", "--erase"}, names()...)...)
	left := slices.DeleteFunc(m.tree(ctx), func(p string) bool {
		kept := strings.Contains(p, "/etc/sallyway/gatewayd.yaml.rpmsave ") || strings.HasPrefix(p, "/etc/sallyway d") ||
			strings.HasPrefix(p, "/usr/share/zsh") || strings.HasPrefix(p, "/usr/share/fish") // where rpm is at home, these are the package filesystem's
		return kept || slices.Contains(empty, p) || strings.HasPrefix(p, "/etc/") && (strings.HasSuffix(p, "- f") || strings.Contains(p, "/.pwd.lock"))
	})
	if len(left) > 0 {
		t.Errorf("left after erase: %q", left)
	}
}

// organizationSite are the machines of an organization.
type organizationSite struct {
	*lab.Lab
	t                                         *testing.T
	platform, relay1, relay2, gateway, client *machine
}

func organization(ctx context.Context, t *testing.T, roots map[string]string, packages string) {
	l, err := lab.New(lab.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	s := &organizationSite{Lab: l, t: t}
	var wg sync.WaitGroup
	for _, b := range []struct {
		m       **machine
		h       *lab.Host
		release string
	}{
		{&s.platform, l.Platform, "bookworm"},
		{&s.relay1, l.Relay1, "bookworm"},
		{&s.relay2, l.Relay2, "trixie"},
		{&s.gateway, l.Gateway, "trixie"},
		{&s.client, l.Client, "bookworm"},
	} {
		wg.Go(func() { *b.m = boot(ctx, b.h, t, b.release, roots[b.release], packages) })
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	for _, part := range []struct {
		name string
		do   func(context.Context)
	}{{"installed", s.install}, {"configured and running", s.configure}, {"upgraded", s.upgrade}, {"removed and purged", s.leave}} {
		began := time.Now()
		part.do(ctx)
		t.Logf("%s in %v", part.name, time.Since(began).Round(100*time.Millisecond))
	}
}

// install puts the packages on their machines. Nothing runs then.
func (s *organizationSite) install(ctx context.Context) {
	s.platform.apt(ctx, before, "sallyway", "sallyway-platform")
	s.relay1.apt(ctx, before, "sallyway-relay")
	s.relay2.apt(ctx, before, "sallyway-relay")
	s.gateway.apt(ctx, before, "sallyway-gateway")
	s.client.apt(ctx, before, "sallyway")
	for m, unit := range s.units() {
		if r, err := m.try(ctx, "", "systemctl", "is-active", unit); err == nil {
			s.t.Errorf("%s runs without configuration: %s", unit, r.Stdout)
		}
	}
	// Somebody who starts it all the same reads what is missing, once.
	if _, err := s.gateway.try(ctx, "", "systemctl", "start", "sallyway-gateway"); err == nil {
		s.t.Error("a gateway without a token started")
	}
	if out := s.gateway.run(ctx, "journalctl", "-u", "sallyway-gateway", "--no-pager"); !strings.Contains(out, "sallyway gateway create NAME") || !strings.Contains(out, "sudo gatewayd install --token-file -") || strings.Contains(out, "Scheduled restart") {
		s.t.Errorf("a gateway without a token says:\n%s", out)
	}
}

func (s *organizationSite) units() map[*machine]string {
	return map[*machine]string{
		s.platform: "sallyway-platform", s.relay1: "sallyway-relay", s.relay2: "sallyway-relay", s.gateway: "sallyway-gateway", s.client: "sallyway-client",
	}
}

// health waits until a daemon says that it is ready.
func (s *organizationSite) health(ctx context.Context, m *machine, command ...string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	err := lab.Until(ctx, 200*time.Millisecond, func() error {
		r, err := m.try(ctx, "", command...)
		if err != nil {
			return fmt.Errorf("%w: %s%s", err, r.Stdout, r.Stderr)
		}
		return nil
	})
	if err != nil {
		r, _ := m.try(context.WithoutCancel(ctx), "", "journalctl", "--no-pager", "-n", "40")
		s.t.Fatalf("%s: %s: %v\n%s", m.Name, strings.Join(command, " "), err, r.Stdout)
	}
}

// configure does what the documentation says: settings, install, a node after the other.
func (s *organizationSite) configure(ctx context.Context) {
	s.platform.feed(ctx, "advertise-url: "+s.PlatformURL()+"\n", "tee", "/etc/sallyway/platformd.yaml")
	s.platform.run(ctx, "platformd", "install")
	s.health(ctx, s.platform, "platformd", "healthcheck")
	s.platform.run(ctx, "sallyway", "login", "--url", s.PlatformURL(), "--token-file", "/var/lib/sallyway/platformd/admin.token")
	token := func(kind, name string, more ...string) string {
		s.platform.run(ctx, append([]string{"sallyway", kind, "create", name}, more...)...)
		out := s.platform.run(ctx, "sallyway", kind, "token", name, "--json")
		var made struct {
			Token string `json:"token"`
		}
		if err := json.Unmarshal([]byte(out), &made); err != nil || made.Token == "" {
			s.t.Fatalf("no token in %s: %v", out, err)
		}
		return made.Token
	}
	s.relay1.feed(ctx, token("relay", "fra-1", "--host", s.Addr(s.Relay1).String()), "relayd", "install", "--token-file", "-")
	s.relay2.feed(ctx, token("relay", "ams-2", "--host", s.Addr(s.Relay2).String()), "relayd", "install", "--token-file", "-", "--", "--drain-timeout", "25s")
	s.health(ctx, s.relay1, "relayd", "healthcheck")
	s.health(ctx, s.relay2, "relayd", "healthcheck")
	s.gateway.feed(ctx, token("gateway", "office"), "gatewayd", "install", "--token-file", "-")
	s.health(ctx, s.gateway, "gatewayd", "healthcheck")
	s.client.feed(ctx, token("client", "laptop"), "sallyway", "connect", "install", "--token-file", "-")
	s.platform.run(ctx, "sallyway", "resource", "create", "web", "--gateway", "office", "--address", lab.WebAddr.String(), "--tcp", "all")
	s.platform.run(ctx, "sallyway", "policy", "allow", "--client", "laptop", "--resource", "web")
	for m, unit := range s.units() {
		if out := m.run(ctx, "systemctl", "is-enabled", unit); strings.TrimSpace(out) != "enabled" {
			s.t.Errorf("%s after install: %s", unit, out)
		}
		if out := m.run(ctx, "systemctl", "show", unit, "-p", "FragmentPath"); strings.TrimSpace(out) != "FragmentPath=/usr/lib/systemd/system/"+unit+".service" &&
			strings.TrimSpace(out) != "FragmentPath=/lib/systemd/system/"+unit+".service" {
			s.t.Errorf("%s is not the package's unit: %s", unit, out)
		}
	}
	if out := s.relay2.run(ctx, "systemctl", "show", "sallyway-relay", "-p", "ExecStart"); !strings.Contains(out, "--drain-timeout 25s") {
		s.t.Errorf("flags after -- do not reach the unit: %s", out)
	}
}

// connect opens a connection from the client's host to the private network, as soon as there is a way.
func (s *organizationSite) connect(ctx context.Context, port uint16) *lab.Pulse {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var p *lab.Pulse
	err := lab.Until(ctx, 200*time.Millisecond, func() error {
		try, stop := context.WithTimeout(ctx, 5*time.Second)
		defer stop()
		var err error
		if p, err = s.Client.StartPulse(try, netip.AddrPortFrom(lab.WebAddr, port), 10*time.Millisecond); err != nil {
			return err
		}
		return p.WaitBeats(try, 10)
	})
	if err != nil {
		r, _ := s.client.try(context.WithoutCancel(ctx), "", "journalctl", "--no-pager", "-n", "60", "-u", "sallyway-client")
		g, _ := s.gateway.try(context.WithoutCancel(ctx), "", "journalctl", "--no-pager", "-n", "40", "-u", "sallyway-gateway")
		s.t.Fatalf("no way to the private network: %v\n%s\n%s", err, r.Stdout, g.Stdout)
	}
	return p
}

// main returns the process of a machine's unit and when it began.
func (s *organizationSite) main(ctx context.Context, m *machine) string {
	s.t.Helper()
	return m.run(ctx, "systemctl", "show", s.units()[m], "-p", "MainPID,ExecMainStartTimestampMonotonic,ActiveState")
}

// upgrade brings the new version to every machine, in the order that the documentation names. A connection through
// it all lives while platform and relays are upgraded; after gateway and client, which end connections, there is a way again.
func (s *organizationSite) upgrade(ctx context.Context) {
	if _, err := s.Private.Echo(netip.AddrPortFrom(lab.WebAddr, 7).String()); err != nil {
		s.t.Fatal(err)
	}
	pulse := s.connect(ctx, 7)
	defer pulse.Stop()
	s.look(ctx)
	for _, u := range []struct {
		m     *machine
		names []string
		check []string
		live  bool // connections live through it
	}{
		{s.platform, []string{"sallyway", "sallyway-platform"}, []string{"platformd", "healthcheck"}, true},
		{s.relay1, []string{"sallyway-relay"}, []string{"relayd", "healthcheck"}, true},
		{s.relay2, []string{"sallyway-relay"}, []string{"relayd", "healthcheck"}, true},
		{s.gateway, []string{"sallyway-gateway"}, []string{"gatewayd", "healthcheck"}, false},
		{s.client, []string{"sallyway"}, []string{"sallyway", "connect", "status"}, false},
	} {
		old := s.main(ctx, u.m)
		began := time.Now()
		u.m.apt(ctx, after, u.names...)
		s.health(ctx, u.m, u.check...)
		took := time.Since(began)
		if now := s.main(ctx, u.m); now == old || !strings.Contains(now, "ActiveState=active") {
			s.t.Errorf("%s was not restarted by its upgrade: %q, then %q", u.m.Name, old, now)
		}
		if !u.live {
			s.connect(ctx, 7).Stop()
			s.t.Logf("%s: upgraded in %v, a new connection works", u.m.Name, took.Round(100*time.Millisecond))
			continue
		}
		if err := pulse.WaitBeats(ctx, 50); err != nil {
			s.t.Fatalf("the upgrade of %s ended a connection: %v", u.m.Name, err)
		}
		gap, _ := pulse.LongestGap(began)
		s.t.Logf("%s: upgraded in %v, longest time without an answer on the open connection %v", u.m.Name, took.Round(100*time.Millisecond), gap.Round(time.Millisecond))
		s.relaysReady(ctx)
	}
	for m, unit := range s.units() {
		out := m.run(ctx, "journalctl", "--no-pager", "-u", unit)
		for line := range strings.Lines(out) {
			if low := strings.ToLower(line); strings.Contains(low, "not permitted") || strings.Contains(low, "permission denied") || strings.Contains(low, "panic") {
				s.t.Errorf("%s, on %s: something that the unit forbids is asked for: %s", unit, m.release, line)
			}
		}
		if out := m.run(ctx, "systemctl", "show", unit, "-p", "NRestarts"); strings.TrimSpace(out) != "NRestarts=0" {
			s.t.Errorf("%s: %s", unit, out)
		}
	}
}

// relaysReady waits until both relays are healthy for the platform, as one looks before the next is upgraded.
func (s *organizationSite) relaysReady(ctx context.Context) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	err := lab.Until(ctx, 300*time.Millisecond, func() error {
		r, err := s.platform.try(ctx, "", "sallyway", "relay", "list")
		if n := strings.Count(strings.ToLower(r.Stdout), "healthy"); n != 2 || err != nil {
			return fmt.Errorf("%d relays are healthy: %w\n%s", n, err, r.Stdout)
		}
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// look has every daemon's doctor examine its host, from where the operator stands, and sees that gateway and client have what
// needs capabilities and devices.
func (s *organizationSite) look(ctx context.Context) {
	for m, doctor := range map[*machine][]string{
		s.platform: {"platformd", "doctor"}, s.relay1: {"relayd", "doctor"}, s.relay2: {"relayd", "doctor"},
		s.gateway: {"gatewayd", "doctor"}, s.client: {"sallyway", "connect", "doctor"},
	} {
		if r, err := m.try(ctx, "", doctor...); err != nil {
			s.t.Errorf("%s: %v\n%s", strings.Join(doctor, " "), err, r.Stdout)
		}
	}
	for _, m := range []*machine{s.gateway, s.client} {
		if r, err := m.Run(ctx, "ip", "address", "show", "dev", "sally0"); err != nil || !strings.Contains(r.Stdout, "inet") {
			s.t.Errorf("the TUN device on %s: %v %s", m.Name, err, r.Stdout)
		}
	}
	s.client.run(ctx, "sh", "-c", "grep -q '^CapEff:.0*1000$' /proc/$(systemctl show -P MainPID sallyway-client)/status") // CAP_NET_ADMIN alone
}

// leave removes and purges.
func (s *organizationSite) leave(ctx context.Context) {
	packages := map[*machine][]string{
		s.platform: {"sallyway", "sallyway-platform"}, s.relay1: {"sallyway-relay"}, s.relay2: {"sallyway-relay"}, s.gateway: {"sallyway-gateway"}, s.client: {"sallyway"},
	}
	for _, m := range []*machine{s.client, s.gateway, s.relay1, s.relay2, s.platform} {
		unit := s.units()[m]
		m.run(ctx, append([]string{"apt-get", "-q", "-y", "remove"}, packages[m]...)...)
		if out := m.run(ctx, "systemctl", "show", unit, "-p", "ActiveState,LoadState"); !strings.Contains(out, "ActiveState=inactive") && !strings.Contains(out, "ActiveState=failed") {
			s.t.Errorf("%s after removal: %s", unit, out)
		}
		if out := m.run(ctx, "ls", "/var/lib/private/sallyway"); strings.TrimSpace(out) == "" {
			s.t.Errorf("%s: removal took the state", m.Name)
		}
		m.run(ctx, append([]string{"apt-get", "-q", "-y", "purge"}, packages[m]...)...)
		out := m.run(ctx, "find", "/etc", "/usr", "/var/lib", "-xdev", "-path", "/var/lib/dpkg", "-prune", "-o", "-name", "*sallyway*", "-print")
		if strings.TrimSpace(out) != "" {
			s.t.Errorf("%s: left after purge: %s", m.Name, out)
		}
	}
}
