package fallback

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"sallyway/internal/identity"
	"sallyway/platform/pki"
	"sallyway/relay/reverse"
)

// TestGatewayCertificates: who gets in by SSH, and that nobody else does.
func TestGatewayCertificates(t *testing.T) {
	w := newWorld(t, nil)
	n := w.acme.node(identity.Gateway, "g-1")
	other := w.acme.node(identity.Gateway, "g-2")
	stranger, err := pki.NewSSHAuthority()
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	unix := func(d time.Duration) uint64 { return uint64(now.Add(d).Unix()) }
	issue := func(change func(*ssh.Certificate)) reverse.Identity { return w.acme.sshIdentity(n, change, nil) }
	for _, c := range []struct {
		name string
		user identity.Node
		id   reverse.Identity
		ok   bool
	}{
		{"good", n, issue(nil), true},
		{"from where it may", n, issue(func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"source-address": "127.0.0.0/8"} }), true},
		{"foreign CA", n, w.acme.sshIdentity(n, nil, stranger), false},
		{"CA of another organization", n, w.acme.sshIdentity(n, nil, w.beta.ssh), false},
		{"other organization's gateway by our CA", w.beta.node(identity.Gateway, "g-1"), w.acme.sshIdentity(w.beta.node(identity.Gateway, "g-1"), nil, nil), false},
		{"organization not served", identity.Node{Org: "gamma", Kind: identity.Gateway, ID: "g-1"}, issue(nil), false},
		{"wrong principal", other, issue(nil), false},
		{"no principal", n, issue(func(c *ssh.Certificate) { c.ValidPrincipals = nil }), false},
		{"two principals", n, issue(func(c *ssh.Certificate) { c.ValidPrincipals = append(c.ValidPrincipals, other.String()) }), false},
		{"expired", n, issue(func(c *ssh.Certificate) { c.ValidBefore = unix(-time.Second) }), false},
		{"not yet valid", n, issue(func(c *ssh.Certificate) { c.ValidAfter = unix(time.Minute) }), false},
		{"host certificate", n, issue(func(c *ssh.Certificate) { c.CertType = ssh.HostCert }), false},
		{"unknown critical option", n, issue(func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"verify-required": ""} }), false},
		{"forced command", n, issue(func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"force-command": "true"} }), false},
		{"from elsewhere", n, issue(func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"source-address": "192.0.2.0/24"} }), false},
		{"without the key's hash", n, issue(func(c *ssh.Certificate) { c.Extensions = nil }), false},
		{"a client", w.acme.node(identity.Client, "c-1"), issue(func(c *ssh.Certificate) { c.ValidPrincipals = []string{"acme/client/c-1"} }), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn, err := w.rawSSH(c.user.String(), ssh.PublicKeys(signerOf(t, c.id)))
			if err == nil {
				conn.Close()
			}
			if (err == nil) != c.ok {
				t.Errorf("%v, want accepted %v", err, c.ok)
			}
		})
	}
	// Neither a plain key, nor a password, nor nothing; and an offered key decides nothing for the one that is used (CVE-2024-45337).
	plain, err := ssh.NewSignerFromKey(newSSHKey(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, auth := range map[string][]ssh.AuthMethod{
		"plain key": {ssh.PublicKeys(plain)},
		"password":  {ssh.Password("hunter2")},
		"keyboard": {ssh.KeyboardInteractive(func(string, string, []string, []bool) ([]string, error) {
			return []string{"hunter2"}, nil
		})},
		"none": {},
		"a certificate offered, another key used": {ssh.PublicKeys(offered{signerOf(t, issue(nil)), plain})},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := w.rawSSH(n.String(), auth...)
			if err == nil {
				conn.Close()
				t.Error("accepted")
			}
		})
	}
	waitFor(t, "nobody is left", func() bool { return len(w.connections(n)) == 0 })
	if v := w.Snapshot(); v.Refused == 0 {
		t.Errorf("%+v", v)
	}
}

// offered shows one key and signs with another.
type offered struct {
	ssh.Signer
	by ssh.Signer
}

func (o offered) Sign(r io.Reader, b []byte) (*ssh.Signature, error) { return o.by.Sign(r, b) }

// TestHostCertificates: a gateway talks to the relay that it means, and to nobody else.
func TestHostCertificates(t *testing.T) {
	acme := newOrg(t, "acme")
	relay := acme.node(identity.Relay, "r-1")
	stranger, err := pki.NewSSHAuthority()
	if err != nil {
		t.Fatal(err)
	}
	plain := newSSHKey(t)
	for _, c := range []struct {
		name string
		id   reverse.Identity
		ok   bool
	}{
		{"good", acme.sshIdentity(relay, nil, nil), true},
		{"foreign CA", acme.sshIdentity(relay, nil, stranger), false},
		{"another relay", acme.sshIdentity(acme.node(identity.Relay, "r-2"), nil, nil), false},
		{"no principal", acme.sshIdentity(relay, func(c *ssh.Certificate) { c.ValidPrincipals = nil }, nil), false},
		{"expired", acme.sshIdentity(relay, func(c *ssh.Certificate) { c.ValidBefore = uint64(time.Now().Add(-time.Minute).Unix()) }, nil), false},
		{"user certificate", acme.sshIdentity(relay, func(c *ssh.Certificate) { c.CertType = ssh.UserCert }, nil), false},
		{"critical option", acme.sshIdentity(relay, func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"x": "y"} }, nil), false},
		{"gateway's certificate", acme.sshIdentity(acme.node(identity.Gateway, "r-1"), nil, nil), false},
		{"plain key", reverse.Identity{Key: plain}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			var host ssh.Signer
			if c.id.Certificate == "" {
				if host, err = ssh.NewSignerFromKey(c.id.Key); err != nil {
					t.Fatal(err)
				}
			} else {
				host = signerOf(t, c.id)
			}
			addr := fakeRelay(t, host)
			n := acme.node(identity.Gateway, "g-1")
			id := acme.sshIdentity(n, nil, nil)
			g := reverse.NewTunnel(reverse.TunnelConfig{
				Relay: relay, HostCAs: func() []string { return []string{acme.ssh.PublicKey()} }, Gateway: n,
				Resolve:  func(context.Context) ([]netip.AddrPort, error) { return []netip.AddrPort{addr}, nil },
				Identity: func() reverse.Identity { return id }, OnLink: func(identity.Node, *reverse.Link) {},
			})
			start(t, g)
			waitFor(t, "it is decided", func() bool { st := g.Status(); return st.Up || st.Error != "" })
			if st := g.Status(); st.Up != c.ok {
				t.Errorf("%+v, want up %v", st, c.ok)
			} else if !c.ok && strings.Contains(st.Error, "authenticate") {
				t.Errorf("the gateway showed its certificate to somebody else: %s", st.Error)
			}
		})
	}
}

// fakeRelay is an SSH server that lets everybody in.
func fakeRelay(t *testing.T, host ssh.Signer) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	go func() {
		defer close(done)
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			cfg := &ssh.ServerConfig{NoClientAuth: true, PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return nil, nil }}
			cfg.AddHostKey(host)
			conn, channels, requests, err := ssh.NewServerConn(nc, cfg)
			if err != nil {
				nc.Close()
				continue
			}
			go ssh.DiscardRequests(requests)
			go func() {
				for c := range channels {
					_ = c.Reject(ssh.Prohibited, "")
				}
			}()
			go func() { _ = conn.Wait() }()
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// TestRevocationEndsConnections: a denied node, a denied key, an organization that leaves, and roots that change end what is open, at once,
// and let nothing new in.
func TestRevocationEndsConnections(t *testing.T) {
	for _, c := range []struct {
		name        string
		revoke      func(w *world, g *aGateway, client identity.Node, key identity.KeyHash)
		gateway     bool // it is the gateway that is out
		everyone    bool
		otherClient bool // another client still gets in
	}{
		{"gateway", func(w *world, g *aGateway, _ identity.Node, _ identity.KeyHash) { w.follow([]identity.Node{g.node}) }, true, false, false},
		{"gateway's key", func(w *world, g *aGateway, _ identity.Node, _ identity.KeyHash) { w.follow(nil, gatewayKey(g.node)) }, true, false, false},
		{"client", func(w *world, _ *aGateway, c identity.Node, _ identity.KeyHash) { w.follow([]identity.Node{c}) }, false, false, true},
		{"client's key", func(w *world, _ *aGateway, _ identity.Node, k identity.KeyHash) { w.follow(nil, k) }, false, false, true},
		{"organization", func(w *world, _ *aGateway, _ identity.Node, _ identity.KeyHash) {
			if err := w.SetOrganizations(map[string]Organization{"beta": w.beta.served()}, nil); err != nil {
				w.t.Error(err)
			}
		}, true, true, false},
		{"CA keys", func(w *world, _ *aGateway, _ identity.Node, _ identity.KeyHash) {
			w.acme.root, w.acme.cas, w.acme.ssh = w.beta.root, w.beta.cas, w.beta.ssh
			w.follow(nil)
		}, true, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, nil)
			n, client := w.acme.node(identity.Gateway, "g-1"), w.acme.node(identity.Client, "c-1")
			g := w.gateway(n, w.acme.sshIdentity(n, nil, nil))
			cert, second := w.acme.leaf(client, time.Now()), w.acme.leaf(w.acme.node(identity.Client, "c-2"), time.Now())
			up, err := w.dial(n, cert)
			if err != nil {
				t.Fatal(err)
			}
			waitFor(t, "all slots are there", func() bool { return len(w.connections(n)) == reverse.Slots })
			begin := time.Now()
			c.revoke(w, g, client, identity.CertificateKeyHash(cert.Leaf))
			select {
			case <-up.Done():
			case <-time.After(5 * time.Second):
				t.Fatal("the link is still up")
			}
			if d := time.Since(begin); d > time.Second {
				t.Errorf("it took %v", d)
			}
			if c.gateway {
				waitFor(t, "the gateway is out", func() bool { return len(w.connections(n)) == 0 })
			}
			if c.everyone {
				return
			}
			if _, err := w.dial(n, cert); !errors.Is(err, reverse.ErrRefused) {
				t.Errorf("again: %v", err)
			}
			if _, err := w.dial(n, second); (err == nil) != c.otherClient {
				t.Errorf("another client: %v, want in %v", err, c.otherClient)
			}
		})
	}
}

// TestConnectionEndsWithItsCertificate: nobody stays longer than the certificate that let it in.
func TestConnectionEndsWithItsCertificate(t *testing.T) {
	w := newWorld(t, nil)
	n := w.acme.node(identity.Gateway, "g-1")
	id := w.acme.sshIdentity(n, func(c *ssh.Certificate) { c.ValidBefore = uint64(time.Now().Add(2 * time.Second).Unix()) }, nil)
	w.gateway(n, id)
	conn := w.connections(n)[0]
	select {
	case <-conn.done:
	case <-time.After(10 * time.Second):
		t.Fatal("it is still open")
	}
}

// TestGatewayOpensNothing: a gateway that asks for channels and forwardings gets none, and is thrown out when it goes on asking.
func TestGatewayOpensNothing(t *testing.T) {
	w := newWorld(t, nil)
	n := w.acme.node(identity.Gateway, "g-1")
	auth := ssh.PublicKeys(signerOf(t, w.acme.sshIdentity(n, nil, nil)))
	conn, err := w.rawSSH(n.String(), auth)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, kind := range []string{"session", "x11", "auth-agent@openssh.com", "direct-tcpip", "forwarded-tcpip", "direct-streamlocal@openssh.com", "tun@openssh.com", reverse.ChannelType} {
		_, _, err := conn.OpenChannel(kind, nil)
		if open := (*ssh.OpenChannelError)(nil); !errors.As(err, &open) || open.Reason != ssh.Prohibited {
			t.Errorf("%s: %v", kind, err)
		}
	}
	for _, kind := range []string{"tcpip-forward", "cancel-tcpip-forward", "streamlocal-forward@openssh.com", "hostkeys-prove-00@openssh.com", reverse.DrainingRequest} {
		if ok, _, err := conn.SendRequest(kind, true, nil); ok || err != nil {
			t.Errorf("%s: %v, %v", kind, ok, err)
		}
	}
	if ok, _, err := conn.SendRequest(reverse.KeepaliveRequest, true, nil); !ok || err != nil {
		t.Errorf("keepalive: %v, %v", ok, err)
	}
	for range maxRefusals - 8 - 5 { // no more: x/crypto's OpenChannel may hang on a connection that is just ending
		_, _, _ = conn.OpenChannel("session", nil)
	}
	closed := make(chan error, 1)
	go func() { closed <- conn.Wait() }()
	select {
	case <-closed:
	case <-time.After(5 * time.Second):
		t.Error("it may go on asking")
	}
}

// TestOpenSSH runs OpenSSH's own client against the port: without a certificate it is not let in, and with a gateway's it gets no shell, no
// command, no subsystem and no forwarding.
func TestOpenSSH(t *testing.T) {
	client, err := exec.LookPath("ssh")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("OpenSSH's client is not installed")
		}
		t.Skip("OpenSSH's client is not installed")
	}
	w := newWorld(t, nil)
	n := w.acme.node(identity.Gateway, "g-1")
	id := w.acme.sshIdentity(n, nil, nil)
	dir := t.TempDir()
	key := filepath.Join(dir, "key")
	block, err := ssh.MarshalPrivateKey(id.Key, "")
	if err != nil {
		t.Fatal(err)
	}
	write := func(path, content string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(key, string(pemOf(block)))
	write(filepath.Join(dir, "cert"), id.Certificate+"\n")
	known := filepath.Join(dir, "known")
	write(known, "@cert-authority "+w.relay.ServerName()+" "+w.acme.ssh.PublicKey()+"\n")
	run := func(args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		all := append([]string{
			"-F", "none", "-v", "-p", strconv.Itoa(int(w.sshAddr.Port())), "-l", n.String(), "-o", "UserKnownHostsFile=" + known, "-o", "GlobalKnownHostsFile=none",
			"-o", "HostKeyAlias=" + w.relay.ServerName(), "-o", "StrictHostKeyChecking=yes", "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "BatchMode=yes",
		}, args...)
		out, err := exec.CommandContext(ctx, client, all...).CombinedOutput()
		return string(out), err
	}
	t.Run("without a certificate", func(t *testing.T) {
		out, err := run("-i", key, "127.0.0.1", "true")
		if err == nil || !strings.Contains(out, "Permission denied (publickey)") || strings.Contains(out, "Authenticated to") {
			t.Errorf("%v\n%s", err, out)
		}
	})
	with := []string{"-i", key, "-o", "CertificateFile=" + filepath.Join(dir, "cert")}
	for name, args := range map[string][]string{
		"shell":      {"-tt", "127.0.0.1"},
		"command":    {"127.0.0.1", "echo", "shell-is-here"},
		"subsystem":  {"-s", "127.0.0.1", "sftp"},
		"to a host":  {"-W", "127.0.0.1:" + strconv.Itoa(int(w.tlsAddr.Port())), "127.0.0.1"},
		"from there": {"-N", "-o", "ExitOnForwardFailure=yes", "-R", "127.0.0.1:0:127.0.0.1:1", "127.0.0.1"},
		"agent, X11": {"-A", "-X", "127.0.0.1", "echo", "shell-is-here"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := run(append(with, args...)...)
			if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) {
				t.Errorf("%v\n%s", err, out)
			}
			if !strings.Contains(out, "Authenticated to") {
				t.Errorf("the certificate does not count, so that the test shows nothing:\n%s", out)
			}
			if strings.Contains(out, "\nshell-is-here") || !(strings.Contains(out, "open failed: administratively prohibited") || strings.Contains(out, "remote port forwarding failed")) {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}
