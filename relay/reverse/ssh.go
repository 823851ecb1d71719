package reverse

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"sallyway/internal/identity"
)

// Identity is a node's SSH key, made on its host, with the certificate that its organization's SSH CA gave it.
type Identity struct {
	Key crypto.Signer
	// Certificate is a line of an authorized_keys file.
	Certificate string
}

// Parse reads the certificate and joins it with the key.
func (id Identity) Parse() (*ssh.Certificate, ssh.Signer, error) {
	if id.Key == nil || id.Certificate == "" {
		return nil, nil, errors.New("this node has no SSH certificate yet: it gets one when it renews its certificates with a platform that issues them")
	}
	pub, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(id.Certificate))
	if err != nil || len(rest) > 0 {
		return nil, nil, errors.New("malformed SSH certificate")
	}
	cert, ok := pub.(*ssh.Certificate)
	if !ok {
		return nil, nil, errors.New("an SSH key stands where a certificate should")
	}
	key, err := ssh.NewSignerFromSigner(id.Key)
	if err != nil {
		return nil, nil, fmt.Errorf("SSH key: %w", err)
	}
	signer, err := ssh.NewCertSigner(cert, key)
	if err != nil {
		return nil, nil, errors.New("the SSH certificate is for another key")
	}
	return cert, signer, nil
}

// ParseCAs reads the public keys of SSH CAs, lines of an authorized_keys file. They are Ed25519 keys.
func ParseCAs(lines []string) ([]ssh.PublicKey, error) {
	out := make([]ssh.PublicKey, len(lines))
	for i, l := range lines {
		k, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(l))
		if err != nil || len(rest) > 0 || k.Type() != ssh.KeyAlgoED25519 {
			return nil, errors.New("the key of an SSH CA is not an Ed25519 key in authorized_keys form")
		}
		out[i] = k
	}
	return out, nil
}

// AnyCA returns what a CertChecker asks: whether a key is one of cas.
func AnyCA(cas []ssh.PublicKey) func(ssh.PublicKey) bool {
	return func(k ssh.PublicKey) bool {
		b := k.Marshal()
		for _, ca := range cas {
			if bytes.Equal(ca.Marshal(), b) {
				return true
			}
		}
		return false
	}
}

// SSHConfig says which relay to dial, and as which gateway.
type SSHConfig struct {
	// Relay is the principal that the relay's host certificate must name, by HostCAs (lines of an authorized_keys file).
	Relay   identity.Node
	HostCAs []string
	// Addrs are the addresses of its SSH port, tried in this order.
	Addrs []netip.AddrPort
	// Gateway is this node, Identity its key and certificate, Slot which of its connections this is.
	Gateway  identity.Node
	Identity Identity
	Slot     int
	// OnChannel takes the channels that the relay opens, in order; it must not block. kill closes the connection.
	OnChannel func(o Open, ch io.ReadWriteCloser, kill func())
	// OnDraining is called when the relay says that it drains; nil is nothing.
	OnDraining func()
	// Dial and Control are as in TLSConfig.
	Dial    func(ctx context.Context, network, address string) (net.Conn, error)
	Control func(network, address string, c syscall.RawConn) error
}

// sshConn is a gateway's connection to a relay.
type sshConn struct {
	conn    ssh.Conn
	expires time.Time // of the certificate that it was opened with
	serial  uint64
	done    chan struct{}
	err     error // written before done is closed
	tasks   sync.WaitGroup
}

// dialSSH opens one connection.
func dialSSH(ctx context.Context, cfg *SSHConfig) (*sshConn, error) {
	if len(cfg.Addrs) == 0 {
		return nil, fmt.Errorf("no address of relay %v", cfg.Relay)
	}
	cert, signer, err := cfg.Identity.Parse()
	if err != nil {
		return nil, err
	}
	cas, err := ParseCAs(cfg.HostCAs)
	if err != nil {
		return nil, fmt.Errorf("relay %v: %w", cfg.Relay, err)
	}
	var errs []error
	for i, addr := range cfg.Addrs {
		actx, cancel := ctx, context.CancelFunc(func() {})
		if i < len(cfg.Addrs)-1 {
			actx, cancel = context.WithTimeout(ctx, SSHGrace/2)
		}
		c, err := openSSH(actx, cfg, addr, signer, cas)
		cancel()
		if err == nil {
			c.serial, c.expires = cert.Serial, time.Unix(int64(cert.ValidBefore), 0)
			return c, nil
		}
		errs = append(errs, fmt.Errorf("relay %v at %v: %w", cfg.Relay, addr, err))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

// hostKey checks a relay's certificate: by a CA of the relay, for the relay and nobody else. A certificate without principals would be for
// everybody.
func hostKey(relay identity.Node, cas []ssh.PublicKey, now func() time.Time) ssh.HostKeyCallback {
	known := AnyCA(cas)
	checker := &ssh.CertChecker{
		IsHostAuthority: func(k ssh.PublicKey, address string) bool {
			host, _, err := net.SplitHostPort(address)
			return err == nil && host == relay.ServerName() && known(k)
		},
		Clock: now,
	}
	return func(address string, remote net.Addr, key ssh.PublicKey) error {
		if c, ok := key.(*ssh.Certificate); ok && len(c.ValidPrincipals) != 1 {
			return fmt.Errorf("the relay's SSH certificate names %d hosts, want one", len(c.ValidPrincipals))
		}
		return checker.CheckHostKey(address, remote, key)
	}
}

func openSSH(ctx context.Context, cfg *SSHConfig, addr netip.AddrPort, signer ssh.Signer, cas []ssh.PublicKey) (*sshConn, error) {
	nc, err := dial(ctx, cfg.Dial, cfg.Control, addr)
	if err != nil {
		return nil, err
	}
	LimitUnsent(nc)
	stop := context.AfterFunc(ctx, func() { _ = nc.Close() })
	if err := nc.SetDeadline(time.Now().Add(SSHGrace)); err != nil {
		nc.Close()
		return nil, err
	}
	sc := NewStrictConn(nc, false)
	conn, channels, requests, err := ssh.NewClientConn(sc, net.JoinHostPort(cfg.Relay.ServerName(), strconv.Itoa(int(addr.Port()))), &ssh.ClientConfig{
		Config:            ssh.Config{KeyExchanges: KeyExchanges, Ciphers: Ciphers, MACs: MACs},
		User:              cfg.Gateway.String(),
		Auth:              []ssh.AuthMethod{ssh.PublicKeys(signer)},
		HostKeyCallback:   hostKey(cfg.Relay, cas, nil),
		HostKeyAlgorithms: []string{ssh.CertAlgoED25519v01},
		ClientVersion:     ClientVersion(cfg.Slot),
	})
	if !stop() {
		if err == nil {
			conn.Close()
		}
		return nil, ctx.Err()
	}
	if err != nil {
		nc.Close()
		return nil, fmt.Errorf("SSH handshake: %w", err)
	}
	sc.Admit()
	if err := nc.SetDeadline(time.Time{}); err != nil {
		conn.Close()
		return nil, err
	}
	c := &sshConn{conn: conn, done: make(chan struct{})}
	c.tasks.Go(func() { c.channels(cfg, channels) })
	c.tasks.Go(func() { c.requests(cfg, requests) })
	c.tasks.Go(func() { Keepalive(conn, c.done) })
	c.tasks.Go(func() {
		c.err = ended(conn.Wait())
		close(c.done)
	})
	return c, nil
}

// channels takes what the relay opens and refuses all else.
func (c *sshConn) channels(cfg *SSHConfig, in <-chan ssh.NewChannel) {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	kill := func() { _ = c.conn.Close() }
	for nc := range in {
		if nc.ChannelType() != ChannelType {
			_ = nc.Reject(ssh.UnknownChannelType, "only links")
			continue
		}
		o, err := ParseOpen(nc.ExtraData())
		if err != nil {
			_ = nc.Reject(ssh.Prohibited, err.Error())
			continue
		}
		ch, requests, err := nc.Accept()
		if err != nil {
			continue
		}
		Drain(&tasks, ch, requests)
		cfg.OnChannel(o, ch, kill)
	}
}

// Drain answers the requests on a channel, all with no, and throws away its other stream, which shares the window, until it ends.
func Drain(tasks *sync.WaitGroup, ch ssh.Channel, requests <-chan *ssh.Request) {
	tasks.Go(func() { ssh.DiscardRequests(requests) })
	tasks.Go(func() { _, _ = io.Copy(io.Discard, ch.Stderr()) }) // ends with the channel
}

func (c *sshConn) requests(cfg *SSHConfig, in <-chan *ssh.Request) {
	for r := range in {
		switch {
		case r.Type == DrainingRequest && cfg.OnDraining != nil:
			cfg.OnDraining()
		}
		_ = r.Reply(r.Type == KeepaliveRequest || r.Type == DrainingRequest, nil) // a broken connection shows elsewhere
	}
}

// Keepalive asks the other side for a sign of life every KeepaliveInterval and closes a connection that gives none, until done is closed.
func Keepalive(conn ssh.Conn, done <-chan struct{}) {
	t := time.NewTicker(KeepaliveInterval)
	defer t.Stop()
	for {
		select {
		case <-done:
			return
		case <-t.C:
		}
		late := time.AfterFunc(KeepaliveTimeout, func() { _ = conn.Close() })
		_, _, err := conn.SendRequest(KeepaliveRequest, true, nil)
		late.Stop()
		if err != nil {
			_ = conn.Close()
			return
		}
	}
}

func (c *sshConn) close() {
	_ = c.conn.Close()
	c.tasks.Wait()
}
