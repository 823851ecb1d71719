package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"sallyway/internal/identity"
	"sallyway/internal/lab"
)

// nobody is an unprivileged user.
const nobody = 65534

// Local listeners of the client without root.
const (
	socksAddr   = "127.0.0.1:1080"
	httpAddr    = "127.0.0.1:3128"
	forwardAddr = "127.0.0.1:8080"
)

// TestWithoutRoot runs the client as nobody: no TUN, and everything else.
func TestWithoutRoot(t *testing.T) {
	s := newSite(t, lab.Config{}, lab.SiteConfig{NoBranch: true, NoClient: true})
	ctx := within(t, 3*time.Minute)
	spec := lab.NodeSpec{
		Kind: identity.Client, Name: lab.Laptop, Host: s.Client, UID: nobody,
		Args: []string{"--socks", socksAddr, "--http", httpAddr, "--forward", forwardAddr + "=" + at(lab.WebAddr, webPort)},
	}
	n := must(s.CreateNode(ctx, spec))(t)
	servePrivate(t, s)
	// Tokens and state are the user's own.
	check(t, s.StartDaemon(n, spec))
	check(t, n.WaitReady(ctx))
	s.Laptop = n
	curl := program(t, "curl")
	fetch := func(t *testing.T, args ...string) {
		t.Helper()
		r, err := s.Client.RunWith(ctx, lab.Exec{Args: append([]string{curl, "-sS", "--max-time", "15"}, args...), UID: nobody})
		if err != nil || r.Stdout != page {
			t.Errorf("curl %v: %q, %v", args, r.Stdout, err)
		}
	}
	name, url := lab.FQDN("web", lab.DefaultOrg), "http://"+at(lab.WebAddr, webPort)+"/"
	t.Run("SOCKS5 by address", func(t *testing.T) { fetch(t, "--proxy", "socks5://"+socksAddr, url) })
	t.Run("SOCKS5 by name", func(t *testing.T) { fetch(t, "--proxy", "socks5h://"+socksAddr, "http://"+name+"/") })
	t.Run("SOCKS5 IPv6", func(t *testing.T) {
		fetch(t, "--proxy", "socks5h://"+socksAddr, "http://"+at(lab.WebAddr6, webPort)+"/")
	})
	t.Run("HTTP CONNECT", func(t *testing.T) { fetch(t, "--proxytunnel", "--proxy", "http://"+httpAddr, "http://"+name+"/") })
	t.Run("HTTP proxy without CONNECT", func(t *testing.T) { fetch(t, "--proxy", "http://"+httpAddr, "http://"+name+"/") })
	t.Run("forward", func(t *testing.T) { fetch(t, "http://"+forwardAddr+"/") })
	t.Run("denied says why in Proxy-Status", func(t *testing.T) {
		r, err := s.Client.Run(ctx, curl, "-sSv", "--max-time", "10", "--proxytunnel", "--proxy", "http://"+httpAddr, "http://"+at(lab.WebAddr, vaultPort)+"/")
		if err == nil || !strings.Contains(strings.ToLower(r.Stderr), "proxy-status:") || !strings.Contains(r.Stderr, "no policy allows") {
			t.Errorf("%v\n%s", err, r.Stderr)
		}
	})
	t.Run("refused says so in Proxy-Status", func(t *testing.T) {
		r, err := s.Client.Run(ctx, curl, "-sSv", "--max-time", "10", "--proxytunnel", "--proxy", "http://"+httpAddr, "http://"+at(lab.WebAddr, lab.ClosedPort)+"/")
		if err == nil || !strings.Contains(r.Stderr, "connection_refused") {
			t.Errorf("%v\n%s", err, r.Stderr)
		}
	})
	t.Run("500 parallel connections by forward", func(t *testing.T) { parallelHTTP(t, s, 500) })
	t.Run("no TUN", func(t *testing.T) {
		if err := dialOnce(t.Context(), s.Client, at(lab.WebAddr, webPort), time.Second); err == nil {
			t.Error("a client without root captures traffic")
		}
	})
	t.Run("metrics and files are nobody else's", func(t *testing.T) {
		fi := must(os.Stat(n.State))(t)
		if fi.Mode().Perm()&0o077 != 0 {
			t.Errorf("state folder has mode %v", fi.Mode())
		}
	})
}

// parallelHTTP fetches the page n times at once through the forward.
func parallelHTTP(t *testing.T, s *lab.Site, n int) {
	curl := program(t, "curl")
	var cfg strings.Builder
	for range n {
		fmt.Fprintf(&cfg, "url = http://%s/\noutput = /dev/null\n", forwardAddr)
	}
	r, err := s.Client.RunWith(within(t, time.Minute), lab.Exec{
		Args:  []string{curl, "-sS", "--parallel", "--parallel-immediate", "--parallel-max", "300", "-w", "%{http_code}\n", "-K", "-"},
		Stdin: cfg.String(),
	})
	if got := strings.Count(r.Stdout, "200\n"); err != nil || got != n {
		t.Errorf("%d of %d pages, %v", got, n, err)
	}
}

// TestSSH logs in with `sallyway connect --stdio` as ssh's ProxyCommand, as nobody and without a running client.
func TestSSH(t *testing.T) {
	ssh := program(t, "ssh")
	program(t, "sshd")
	s := newSite(t, lab.Config{}, lab.SiteConfig{NoBranch: true, NoClient: true})
	ctx := within(t, 2*time.Minute)
	name := lab.FQDN("bastion", lab.DefaultOrg)
	spec := lab.NodeSpec{Kind: identity.Client, Name: lab.Laptop, Host: s.Client, UID: nobody}
	n := must(s.CreateNode(ctx, spec))(t)
	check(t, os.Mkdir(n.State, 0o700))
	check(t, os.Chown(n.State, nobody, nobody))
	server := must(s.Private.SSHD(ctx, netip.AddrPortFrom(lab.SSHAddr, 22), name, lab.SSHAddr.String()))(t)
	check(t, s.AddResource(ctx, lab.Resource{Name: "bastion", Gateway: lab.Office, Address: lab.SSHAddr.String(), TCP: "22"}, "client:"+lab.Laptop))
	key := s.Client.Path("key")
	check(t, os.WriteFile(key, must(os.ReadFile(server.Key))(t), 0o600))
	check(t, os.Chown(key, nobody, nobody))
	bin := must(s.Bin("sallyway"))(t)
	login := func(host string, command ...string) (lab.Result, error) {
		proxy := fmt.Sprintf("%s connect --token-file %s --state %s --stdio %%h:%%p", bin, n.Token, n.State)
		args := []string{
			ssh, "-F", "none", "-i", key, "-o", "BatchMode=yes", "-o", "UserKnownHostsFile=" + server.KnownHosts,
			"-o", "ProxyCommand=" + proxy, "root@" + host,
		}
		return s.Client.RunWith(ctx, lab.Exec{Args: append(args, command...), UID: nobody})
	}
	for _, host := range []string{name, lab.SSHAddr.String()} {
		r, err := login(host, "head -c 5000000 /dev/zero | wc -c; echo $SSH_CONNECTION")
		if err != nil || !strings.HasPrefix(r.Stdout, "5000000\n") {
			t.Errorf("ssh %s: %q, %v\n%s", host, r.Stdout, err, r.Stderr)
		}
	}
	r, err := login(name, "head -c 3000000 /dev/zero")
	if err != nil || len(r.Stdout) != 3_000_000 {
		t.Errorf("3 MB from ssh: %d bytes, %v\n%s", len(r.Stdout), err, r.Stderr)
	}
}
