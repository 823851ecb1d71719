// Package e2e runs the real programs in a lab: what a user would see, on real servers, over real namespaces. The programs
// are those of $SALLYWAY_BIN, else they are built for the run.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyway/internal/lab"
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run() // every test skips
	}
	defer func() {
		if previousBuilt != "" {
			os.RemoveAll(previousBuilt)
		}
	}()
	if os.Getenv("SALLYWAY_BIN") == "" {
		dir, err := os.MkdirTemp("", "sallyway-e2e-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		if err := os.Chmod(dir, 0o755); err != nil { // some programs run as nobody
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		if err := build(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		os.Setenv("SALLYWAY_BIN", dir)
	}
	return m.Run()
}

func build(dir string) error {
	root, err := lab.SourceRoot()
	if err != nil {
		return err
	}
	cmd := exec.Command("go", "build", "-o", dir+"/", "./cmd/...", "./internal/lab/cmd/...")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("build the programs: %w", err)
	}
	return nil
}

// newLab makes a lab that ends with the test. When the test fails, the ends of all logs are shown.
func newLab(t *testing.T, cfg lab.Config) *lab.Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	l, err := lab.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	t.Cleanup(func() {
		if t.Failed() {
			showLogs(t, l)
		}
	})
	return l
}

func showLogs(t *testing.T, l *lab.Lab) {
	logs, _ := filepath.Glob(filepath.Join(l.Dir(), "*", "*.log")) // the pattern is good
	keep := os.Getenv("SALLYWAY_E2E_LOGS")
	for _, path := range logs {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		if keep != "" {
			name := strings.ReplaceAll(t.Name(), "/", "_") + "-" + filepath.Base(filepath.Dir(path)) + "-" + filepath.Base(path)
			if err := os.WriteFile(filepath.Join(keep, name), b, 0o644); err != nil {
				t.Log(err)
			}
		}
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		t.Logf("%s/%s:\n%s", filepath.Base(filepath.Dir(path)), filepath.Base(path), strings.Join(lines[max(0, len(lines)-12):], "\n"))
	}
}

// newSite makes a lab with everything started.
func newSite(t *testing.T, cfg lab.Config, site lab.SiteConfig) *lab.Site {
	t.Helper()
	l := newLab(t, cfg)
	s, err := l.Build(within(t, 2*time.Minute), site, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// within is a context of the test with a deadline.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, fmt.Errorf("%s: not done within %v", t.Name(), d))
	t.Cleanup(cancel)
	return ctx
}

// program skips where a program is missing, which CI does not accept.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := lab.Program(name)
	var missing *lab.MissingError
	if errors.As(err, &missing) && os.Getenv("CI") == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func must[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// at is an address and a port as text.
func at(a netip.Addr, port uint16) string { return netip.AddrPortFrom(a, port).String() }

// Ports of the private host that resource web opens, besides those of the kinds of servers.
const (
	webPort   = 80
	echoPort  = 7000
	halfPort  = 7001
	http3Port = 7443
	iperfPort = 5201
	// vaultPort is open on the private host, and no policy allows it.
	vaultPort = 8200
)

const page = "<h1>Hello from the private network</h1>\n"

// private are the servers behind gateway office.
type private struct {
	web, web6, vault, echo, echo6, half, udp, udp6 *lab.Service
}

// servePrivate starts the private servers and creates the resources of the laptop.
func servePrivate(t *testing.T, s *lab.Site, subjects ...string) *private {
	t.Helper()
	p := &private{
		web:   must(s.Private.Web(at(lab.WebAddr, webPort), page))(t),
		web6:  must(s.Private.Web(at(lab.WebAddr6, webPort), page))(t),
		vault: must(s.Private.Web(at(lab.WebAddr, vaultPort), "secret\n"))(t),
		echo:  must(s.Private.Echo(at(lab.WebAddr, echoPort)))(t),
		echo6: must(s.Private.Echo(at(lab.WebAddr6, echoPort)))(t),
		half:  must(s.Private.HalfClose(at(lab.WebAddr, halfPort)))(t),
		udp:   must(s.Private.EchoUDP(at(lab.WebAddr, echoPort)))(t),
		udp6:  must(s.Private.EchoUDP(at(lab.WebAddr6, echoPort)))(t),
	}
	if len(subjects) == 0 {
		subjects = []string{"client:" + lab.Laptop}
	}
	ctx := within(t, time.Minute)
	ports := fmt.Sprintf("%d,%d-%d,%d-%d,%d-%d", webPort, 7000, 7999, iperfPort, iperfPort+9, lab.FilteredPort, lab.ClosedPort)
	check(t, s.AddResource(ctx, lab.Resource{Name: "web", Gateway: lab.Office, Address: lab.WebAddr.String(), TCP: ports, UDP: ports, ICMP: true}, subjects...))
	check(t, s.AddResource(ctx, lab.Resource{Name: "web6", Gateway: lab.Office, Address: lab.WebAddr6.String(), TCP: ports, UDP: ports, ICMP: true}, subjects...))
	check(t, s.AddResource(ctx, lab.Resource{Name: "vault", Gateway: lab.Office, Address: lab.WebAddr.String(), TCP: fmt.Sprint(vaultPort)}))
	return p
}

// reach waits until a TCP address answers the host.
func reach(t *testing.T, h *lab.Host, addr netip.AddrPort, d time.Duration) time.Duration {
	t.Helper()
	start := time.Now()
	err := lab.Until(within(t, d), 20*time.Millisecond, func() error { return dialOnce(t.Context(), h, addr.String(), time.Second) })
	if err != nil {
		t.Fatalf("%s does not reach %v: %v", h.Name, addr, err)
	}
	return time.Since(start)
}

// named waits until the client asks the tunnel for the organization's names: it says so in its log.
func named(t *testing.T, s *lab.Site) {
	t.Helper()
	if _, err := s.Laptop.Log.Wait(within(t, 10*time.Second), 0, `split DNS.*default\.sallyway\.internal`); err != nil {
		t.Fatal(err)
	}
}

func dialOnce(ctx context.Context, h *lab.Host, addr string, d time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	c, err := h.Dial(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	return c.Close()
}

// echoes sends a message over a connection and wants it back.
func echoes(t *testing.T, c net.Conn, msg []byte) {
	t.Helper()
	if err := roundTrip(c, msg); err != nil {
		t.Fatal(err)
	}
}

func roundTrip(c net.Conn, msg []byte) error {
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	werr := make(chan error, 1)
	go func() {
		_, err := c.Write(msg)
		werr <- err
	}()
	got := make([]byte, len(msg))
	for n := 0; n < len(got); {
		k, err := c.Read(got[n:])
		if err != nil {
			return fmt.Errorf("after %d of %d bytes: %w", n, len(msg), err)
		}
		n += k
	}
	if string(got) != string(msg) {
		return errors.New("the echo is another one")
	}
	return <-werr
}
