package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"sallyway/internal/lab"
)

// previous are the programs of the previous release: those of $SALLYWAY_PREVIOUS_BIN, else they are built, once for the run.
var previous = sync.OnceValues(func() (dir string, err error) {
	if dir := os.Getenv("SALLYWAY_PREVIOUS_BIN"); dir != "" {
		if _, err := os.Stat(filepath.Join(dir, "platformd")); err == nil {
			return dir, nil
		}
	}
	root, err := lab.SourceRoot()
	if err != nil {
		return "", err
	}
	if dir, err = os.MkdirTemp("", "sallyway-previous-"); err != nil {
		return "", err
	}
	previousBuilt = dir
	if err := os.Chmod(dir, 0o755); err != nil { // some programs run as nobody
		return "", err
	}
	out, err := exec.Command(filepath.Join(root, "build", "previous-release.sh"), dir).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == notInClone {
		return "", errNotInClone
	}
	if err != nil {
		return "", fmt.Errorf("build the previous release: %w\n%s", err, out)
	}
	return dir, nil
})

// previousBuilt is the folder that was made for them, which TestMain removes.
var previousBuilt string

// notInClone is what previous-release.sh exits with when the commit is not there.
const notInClone = 3

var errNotInClone = errors.New("the commit of the previous release (build/previous-release) is not in this clone, which is shallow: git fetch --unshallow")

// previousBin is the folder of the previous release's programs.
func previousBin(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	dir, err := previous()
	if errors.Is(err, errNotInClone) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// thisBin is the folder of the programs under test.
func thisBin(t *testing.T) string {
	t.Helper()
	return must(filepath.Abs(os.Getenv("SALLYWAY_BIN")))(t)
}

// upgrade stops a program, as a package does, and starts that of another release on the same state.
func upgrade(t *testing.T, p *lab.Proc, dir string) {
	t.Helper()
	check(t, p.Stop())
	p.Args[0] = filepath.Join(dir, filepath.Base(p.Args[0]))
	check(t, p.Start())
}

// TestUpgrade takes a site of the previous release to this one as docs/install.md says: platform, relays one after the other, gateways, clients. What the
// new release has not reached yet goes on working with what it has reached, old tools with the new platform too, and an open connection stays until its
// gateway's turn.
func TestUpgrade(t *testing.T) {
	old := previousBin(t)
	s := newSite(t, lab.Config{Bin: old}, lab.SiteConfig{NoBranch: true, RelayArgs: []string{"--drain-timeout", "5s"}})
	newer := thisBin(t)
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, resume)

	pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 10*time.Millisecond))(t)
	defer pulse.Stop()
	check(t, pulse.WaitBeats(within(t, 10*time.Second), 20))
	lives := func(what string, since time.Time) {
		t.Helper()
		check(t, pulse.WaitBeats(within(t, resume), 50))
		gap, _ := pulse.LongestGap(since)
		t.Logf("%s: longest silence of the open connection %v", what, gap.Round(time.Millisecond))
	}

	t.Run("the platform", func(t *testing.T) {
		since := time.Now()
		upgrade(t, s.PlatformD, newer)
		check(t, s.WaitPlatform(within(t, resume), s.PlatformD))
		if _, err := s.PlatformD.Log.Wait(within(t, resume), 0, `platform serves`); err != nil {
			t.Error(err)
		}
		lives("platform", since)
		// Nobody had to enrol anew, and changes by the old command reach the old gateway and the old client.
		all := []*lab.Node{s.RelayA, s.RelayB, s.GatewayA, s.Laptop}
		connected(t, s, len(all))
		check(t, s.AddResource(within(t, resume), lab.Resource{Name: "later", Gateway: lab.Office, Address: lab.DBAddr.String(), TCP: "5432"}, "client:"+lab.Laptop))
		must(s.Private.Echo(at(lab.DBAddr, 5432)))(t)
		reach(t, s.Client, netip.AddrPortFrom(lab.DBAddr, 5432), resume)
	})
	t.Run("relays", func(t *testing.T) {
		for _, r := range []*lab.Node{s.RelayA, s.RelayB} {
			healthy(t, s) // both relays, and a standby path: the next one may go
			since := time.Now()
			upgrade(t, r.Proc, newer)
			check(t, r.WaitReady(within(t, resume)))
			lives(r.Name, since)
		}
		healthy(t, s)
	})
	t.Run("the gateway", func(t *testing.T) {
		upgrade(t, s.GatewayA.Proc, newer)
		check(t, s.GatewayA.WaitReady(within(t, resume)))
		t.Logf("a new connection after %v", reach(t, s.Client, p.echo.Addr, resume).Round(time.Millisecond))
	})
	t.Run("the client", func(t *testing.T) {
		upgrade(t, s.Laptop.Proc, newer)
		check(t, s.Laptop.WaitReady(within(t, resume)))
		t.Logf("a new connection after %v", reach(t, s.Client, p.echo.Addr, resume).Round(time.Millisecond))
	})
	connected(t, s, 4)
}

// TestNewNodesOldPlatform: relays, a gateway and a client of this release enrol at a platform of the previous one and work.
func TestNewNodesOldPlatform(t *testing.T) {
	old := previousBin(t)
	mixed := t.TempDir()
	for name, dir := range map[string]string{"platformd": old, "relayd": thisBin(t), "gatewayd": thisBin(t), "sallyway": thisBin(t)} {
		check(t, os.Symlink(filepath.Join(dir, name), filepath.Join(mixed, name)))
	}
	site := newSite(t, lab.Config{Bin: mixed}, lab.SiteConfig{NoBranch: true})
	p := servePrivate(t, site)
	t.Logf("reached after %v", reach(t, site.Client, p.echo.Addr, resume).Round(time.Millisecond))
	// A change, and a platform that restarts, reach them.
	check(t, site.AddResource(within(t, resume), lab.Resource{Name: "later", Gateway: lab.Office, Address: lab.DBAddr.String(), TCP: "5432"}, "client:"+lab.Laptop))
	must(site.Private.Echo(at(lab.DBAddr, 5432)))(t)
	reach(t, site.Client, netip.AddrPortFrom(lab.DBAddr, 5432), resume)
	site.PlatformD.Kill()
	check(t, site.PlatformD.Start())
	check(t, site.WaitPlatform(within(t, resume), site.PlatformD))
	connected(t, site, 4)
}

// connected waits until the platform has heard of that many nodes, and all work.
func connected(t *testing.T, s *lab.Site, nodes int) {
	t.Helper()
	type node struct{ Name, State string }
	check(t, lab.Until(within(t, resume), 100*time.Millisecond, func() error {
		var doc struct{ Relays, Gateways, Clients []node }
		if err := s.SallywayJSON(t.Context(), &doc, "status"); err != nil {
			return err
		}
		good := 0
		for _, kind := range [][]node{doc.Relays, doc.Gateways, doc.Clients} {
			for _, n := range kind {
				if n.State == "healthy" {
					good++
				}
			}
		}
		if good != nodes {
			return fmt.Errorf("%d of %d nodes are healthy: %+v", good, nodes, doc)
		}
		return nil
	}))
}
