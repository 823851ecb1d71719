package oci_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sallyway/images/oci"
	"sallyway/internal/lab"
)

// site is a laboratory whose programs run in containers.
type site struct {
	*podman
	t     *testing.T
	lab   *lab.Lab
	names map[string]string // of the images by program
}

// netns is the path of a host's network namespace, good while the host is there.
func (s *site) netns(h *lab.Host) string {
	s.t.Helper()
	var path string
	err := h.Do(func() error {
		path = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return path
}

// publish carries connections to a port of a host to another, as an engine does for a published port.
func (s *site) publish(h *lab.Host, from, to string) {
	s.t.Helper()
	l, err := h.Listen(from)
	if err != nil {
		s.t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // the lab has closed it
			}
			go func() {
				defer c.Close()
				inner, err := h.Dial(s.t.Context(), "tcp", to)
				if err != nil {
					return // nobody listens: the caller sees the end
				}
				defer inner.Close()
				go func() {
					_, _ = io.Copy(inner, c) // either side may end
					_ = inner.(*net.TCPConn).CloseWrite()
				}()
				_, _ = io.Copy(c, inner)
			}()
		}
	}()
}

// admin runs an admin verb in a container of the client's image, on the platform's host, with the login in a volume of its own.
func (s *site) admin(args ...string) string {
	s.t.Helper()
	return s.adminWith("", args...)
}

func (s *site) adminWith(stdin string, args ...string) string {
	s.t.Helper()
	run := append([]string{
		"run", "--rm", "--interactive", "--network=ns:" + s.netns(s.lab.Platform), "--volume=admin:/var/lib/sallyway", "--entrypoint=/usr/bin/sallyway",
	}, hardened...)
	return s.mustWith(s.t, stdin, append(append(run, s.names["sallyway"]), args...)...)
}

// token creates a node and returns its token.
func (s *site) token(args ...string) string {
	s.t.Helper()
	var node struct{ Token string }
	if err := json.Unmarshal([]byte(s.admin(append(args, "--json")...)), &node); err != nil {
		s.t.Fatal(err)
	}
	return node.Token
}

// TestContainers runs platform, relay, gateway and client in containers: without a capability, without root, with nothing to write but a
// volume, and reaches a private page through them.
func TestContainers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	images := build(t, t.TempDir())
	s := &site{podman: newPodman(t), t: t, names: map[string]string{}}
	dir := t.TempDir()
	if err := oci.Save(images, dir); err != nil {
		t.Fatal(err)
	}
	for _, i := range images {
		fi, err := os.Stat(filepath.Join(dir, i.Archive()))
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %.1f MB", i.Archive(), float64(fi.Size())/1e6)
		if fi.Size() > oci.MaxSize {
			t.Errorf("%s has %d bytes, more than %d", i.Archive(), fi.Size(), oci.MaxSize)
		}
		s.must(t, "load", "--quiet", "--input="+filepath.Join(dir, i.Archive()))
		s.names[i.Program.Name] = i.Name
	}
	var err error
	if s.lab, err = lab.New(lab.Config{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.lab.Close)
	const page = "a private page"
	if _, err := s.lab.Private.Web(net.JoinHostPort(lab.WebAddr.String(), "80"), page); err != nil {
		t.Fatal(err)
	}

	// The platform, on the port that its image has.
	s.publish(s.lab.Platform, ":443", "127.0.0.1:4443")
	s.container(t, "platform", s.names["platformd"], s.netns(s.lab.Platform), []string{"--env=SALLYWAY_ADVERTISE_URL=" + s.lab.PlatformURL()})
	s.healthy(t, "platform")
	s.adminWith(s.must(t, "exec", "platform", "platformd", "admin", "token"), "login", "--token-file", "-")

	// A token by a file, one by the engine's secret, one by the environment.
	relay := s.file("relay.token", s.token("relay", "create", "relay-1", "--host", s.lab.Addr(s.lab.Relay1).String()))
	s.container(t, "relay", s.names["relayd"], s.netns(s.lab.Relay1),
		[]string{
			"--volume=" + relay + ":/run/secrets/token:ro", "--env=SALLYWAY_TOKEN_FILE=/run/secrets/token",
			"--env=SALLYWAY_DRAIN_TIMEOUT=2s", // there is no other relay that its nodes could move to
		})
	s.healthy(t, "relay")
	err = s.lab.Gateway.Do(func() error { // what --sysctl does in a namespace of the engine's
		return os.WriteFile("/proc/sys/net/ipv4/ping_group_range", fmt.Appendf(nil, "%d %[1]d", oci.UID), 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	s.must(t, "secret", "create", "office", s.file("gateway.token", s.token("gateway", "create", "office")))
	s.container(t, "gateway", s.names["gatewayd"], s.netns(s.lab.Gateway),
		[]string{fmt.Sprintf("--secret=office,type=mount,target=/etc/sallyway/token,uid=%d,mode=0400", oci.UID), "--env=SALLYWAY_TOKEN_FILE=/etc/sallyway/token"})
	env := s.file("client.env", "SALLYWAY_TOKEN="+s.token("client", "create", "laptop")+"\nSALLYWAY_SOCKS=1080\n")
	s.admin("resource", "create", "web", "--gateway", "office", "--address", lab.WebAddr.String(), "--tcp", "80", "--icmp")
	s.admin("policy", "allow", "--client", "laptop", "--resource", "web")
	s.container(t, "client", s.names["sallyway"], s.netns(s.lab.Client), []string{"--env-file=" + env}, "--forward", "127.0.0.1:8080=web:80")
	s.healthy(t, "gateway")
	s.healthy(t, "client")
	for _, name := range []string{"platform", "relay", "gateway", "client"} {
		s.confined(name)
	}

	s.unenrolled()

	fetch := func() error { return s.fetch("127.0.0.1:8080", page) }
	until(t, "the page through the forward", 30*time.Second, fetch)
	s.bySOCKS(page)
	for _, name := range []string{"gateway", "client"} {
		if n := strings.Count(s.log(name), "level=WARN"); n > 1 {
			t.Errorf("%s: %d warnings, want the one about the TUN at most:\n%s", name, n, s.log(name))
		}
	}
	for name, program := range map[string]string{"platform": "platformd", "relay": "relayd", "gateway": "gatewayd", "client": "sallyway connect"} {
		s.doctor(name, strings.Fields(program))
	}
	s.withTUN(page)
	s.flowSurvives("a restart of the relay", func() { s.must(t, "restart", "--time=10", "relay") }, page)
	s.healthy(t, "relay")
	until(t, "a page after the relay's restart", 30*time.Second, fetch)

	// A daemon whose platform is gone does its work, and says so: who restarts what is unhealthy must not cut sessions for it.
	s.ends("platform")
	if err := s.health(t.Context(), "platform"); err == nil {
		t.Error("a platform that was stopped is healthy")
	}
	for _, name := range []string{"relay", "gateway", "client"} {
		if err := s.health(t.Context(), name); err != nil {
			t.Errorf("%s without its platform: %v", name, err)
		}
	}
	if err := fetch(); err != nil {
		t.Errorf("without the platform: %v", err)
	}
	for _, name := range []string{"client", "gateway", "relay"} {
		s.ends(name)
	}
}

// file writes a file that the containers' user alone can read.
func (s *site) file(name, text string) string {
	s.t.Helper()
	path := filepath.Join(s.lab.Dir(), name)
	if err := lab.WriteToken(path, text, oci.UID); err != nil {
		s.t.Fatal(err)
	}
	return path
}

func (s *site) log(name string) string {
	b, err := os.ReadFile(s.logPath(s.t.Context(), name))
	if err != nil {
		s.t.Error(err)
	}
	return string(b)
}

// fetch gets the page from an address on the client's host.
func (s *site) fetch(addr, want string) error {
	ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Second)
	defer cancel()
	c := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return s.lab.Client.Dial(ctx, network, addr)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://web/", nil)
	if err != nil {
		return err
	}
	res, err := c.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && string(b) != want {
		err = fmt.Errorf("%s: %.100q, want %q", res.Status, b, want)
	}
	return err
}

// bySOCKS gets the page by name through the client's SOCKS5 proxy.
func (s *site) bySOCKS(page string) {
	s.t.Helper()
	r, err := s.lab.Client.Run(s.t.Context(), "curl", "--silent", "--show-error", "--max-time", "20", "--socks5-hostname", "127.0.0.1:1080", "http://"+lab.FQDN("web", lab.DefaultOrg)+"/")
	if err != nil || r.Stdout != page {
		s.t.Errorf("by SOCKS5: %q, %v", r.Stdout, err)
	}
}

// unenrolled runs a gateway that has no token: it ends at once, says what is missing, and is not to be started again.
func (s *site) unenrolled() {
	s.t.Helper()
	out, err := s.run(s.t.Context(), append(append([]string{"run", "--rm", "--network=ns:" + s.netns(s.lab.Gateway)}, hardened...), s.names["gatewayd"])...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.Contains(err.Error(), "sallyway gateway create NAME") {
		s.t.Errorf("a gateway without a token: %v %s", err, out)
	}
}

// withTUN runs a second client as the documentation says for those who want a TUN device: root with two capabilities, and the device.
func (s *site) withTUN(page string) {
	s.t.Helper()
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		s.t.Fatalf("this host has no TUN device: %v", err)
	}
	s.must(s.t, "secret", "create", "desktop", s.file("desktop.token", s.token("client", "create", "desktop")))
	s.admin("policy", "allow", "--client", "desktop", "--resource", "web")
	s.container(s.t, "desktop", s.names["sallyway"], s.netns(s.lab.Client), []string{
		"--user=0:0", "--cap-add=NET_ADMIN", "--cap-add=NET_RAW", "--device=/dev/net/tun",
		"--secret=desktop,type=mount,target=/etc/sallyway/token,mode=0400", "--env=SALLYWAY_TOKEN_FILE=/etc/sallyway/token",
	}, "--tun=on")
	s.healthy(s.t, "desktop")
	until(s.t, "the page through the TUN device", 30*time.Second, func() error {
		return s.fetch(net.JoinHostPort(lab.WebAddr.String(), "80"), page)
	})
	if _, err := s.lab.Client.Run(s.t.Context(), "ping", "-c", "3", "-W", "5", lab.WebAddr.String()); err != nil {
		s.t.Errorf("by a gateway without a capability: %v", err)
	}
	s.ends("desktop")
}

// flowSurvives holds an open connection to the private page over what do does.
func (s *site) flowSurvives(what string, do func(), page string) {
	s.t.Helper()
	c, err := s.lab.Client.Dial(s.t.Context(), "tcp", "127.0.0.1:8080")
	if err != nil {
		s.t.Fatal(err)
	}
	defer c.Close()
	r := bufio.NewReader(c)
	ask := func() error {
		if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
			return err
		}
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: web\r\n\r\n"); err != nil {
			return err
		}
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			return err
		}
		b, err := io.ReadAll(res.Body)
		if err == nil && string(b) != page {
			err = fmt.Errorf("%q, want %q", b, page)
		}
		return err
	}
	if err := ask(); err != nil {
		s.t.Fatal(err)
	}
	do()
	if err := ask(); err != nil {
		s.t.Errorf("%s: the open connection: %v", what, err)
	}
}

// confined holds what the kernel says of a container's process against what was asked for.
func (s *site) confined(name string) {
	s.t.Helper()
	pid := s.must(s.t, "inspect", "--format={{.State.Pid}}", name)
	b, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		s.t.Fatal(err)
	}
	uid := strconv.Itoa(oci.UID)
	for key, want := range map[string]string{
		"Uid": strings.Join([]string{uid, uid, uid, uid}, "\t"), "Gid": strings.Join([]string{uid, uid, uid, uid}, "\t"),
		"CapEff": "0000000000000000", "CapBnd": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1",
	} {
		if got := status(string(b), key); got != want {
			s.t.Errorf("%s: %s is %q, want %q", name, key, got, want)
		}
	}
	if b, err := os.ReadFile("/proc/" + pid + "/mounts"); err != nil {
		s.t.Error(err)
	} else if root, _, _ := strings.Cut(string(b), "\n"); !strings.Contains(root, " / ") || !strings.Contains(root, " ro,") {
		s.t.Errorf("%s: the root is mounted as %q", name, root)
	}
}

// status reads a line of /proc/PID/status.
func status(text, key string) string {
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// doctor wants no row of a container's doctor to fail.
func (s *site) doctor(name string, program []string) {
	s.t.Helper()
	out, err := s.run(s.t.Context(), append(append([]string{"exec", name}, program...), "doctor", "--json")...)
	if err != nil {
		s.t.Errorf("doctor: %v", err)
	}
	var rows []struct{ Check, Result, Detail string }
	if err := json.Unmarshal([]byte(out), &rows); err != nil {
		s.t.Fatal(err)
	}
	if len(rows) < 5 {
		s.t.Errorf("%s: %d rows", name, len(rows))
	}
	for _, r := range rows {
		if r.Result != "PASS" && r.Check != "UDP buffers" && r.Check != "TUN" {
			s.t.Errorf("%s: %s: %s: %s", name, r.Check, r.Result, r.Detail)
		}
	}
}

// ends stops a container as an operator does, and wants it to go by itself with 0.
func (s *site) ends(name string) {
	s.t.Helper()
	s.must(s.t, "stop", "--time=40", name)
	if code := s.must(s.t, "inspect", "--format={{.State.ExitCode}}", name); code != "0" {
		s.t.Errorf("%s was stopped and ended with %s\n%s", name, code, s.log(name))
	}
}
