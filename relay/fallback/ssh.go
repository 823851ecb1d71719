package fallback

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"sallyway/internal/identity"
	"sallyway/relay/reverse"
)

const (
	// maxAuthTries bounds the attempts to authenticate on one connection.
	maxAuthTries = 3
	// maxRefusals is how many channels and requests a gateway may be refused before its connection is closed: ours ask for none.
	maxRefusals = 16
	// openTimeout bounds what a gateway needs to take a channel; after it, its connection is taken for dead.
	openTimeout = reverse.KeepaliveTimeout
)

// sshConn is a gateway's connection in a slot.
type sshConn struct {
	node  identity.Node
	slot  int
	cert  *ssh.Certificate
	hash  identity.KeyHash // of the node's X.509 key
	conn  *ssh.ServerConn
	since time.Time
	done  chan struct{}
}

func (c *sshConn) close() { _ = c.conn.Close() } // its server goroutine sees to the rest

// certKey is under which the checked certificate lies in the Permissions.
type certKey struct{}

// authenticate decides who a gateway is by the certificate that it holds the key of, and by nothing else. What was decided travels in the
// Permissions that are returned, since a client may offer one key and use another (CVE-2024-45337).
func (s *Server) authenticate(meta ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
	node, err := identity.ParseNode(meta.User())
	if err != nil || node.Kind != identity.Gateway {
		return nil, errors.New("the user is not a gateway's identity")
	}
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return nil, errors.New("a key without certificate")
	}
	if err := s.rules.Load().allowsGateway(node, cert, s.now); err != nil {
		return nil, err
	}
	return &ssh.Permissions{
		CriticalOptions: cert.CriticalOptions, ExtraData: map[any]any{certKey{}: cert},
	}, nil
}

// metadata is what a CertChecker asks of a connection.
type metadata struct {
	ssh.ConnMetadata
	user string
}

func (m metadata) User() string { return m.user }

// allowsGateway holds a certificate against what is known of the node's organization.
func (r *rules) allowsGateway(node identity.Node, cert *ssh.Certificate, now func() time.Time) error {
	org := r.orgs[node.Org]
	if org == nil {
		return fmt.Errorf("organization %s is not served here", node.Org)
	}
	if len(cert.ValidPrincipals) != 1 { // none would be for everybody
		return fmt.Errorf("certificate with %d principals, want one", len(cert.ValidPrincipals))
	}
	hash, err := keyHash(cert)
	if err != nil {
		return err
	}
	checker := ssh.CertChecker{
		IsUserAuthority: org.isCA,
		IsHostAuthority: func(ssh.PublicKey, string) bool { return false },
		IsRevoked:       func(*ssh.Certificate) bool { return r.denied[node] || org.denied[hash] },
		Clock:           now,
	}
	_, err = checker.Authenticate(metadata{user: node.String()}, cert)
	return err
}

// keyHash reads the hash of the key in the gateway's X.509 leaf, by which a certificate is denied.
func keyHash(cert *ssh.Certificate) (h identity.KeyHash, err error) {
	b, err := hex.DecodeString(cert.Extensions[reverse.KeyExtension])
	if err != nil || len(b) != len(h) {
		return h, errors.New("certificate without the hash of the node's key")
	}
	return identity.KeyHash(b), nil
}

// serveSSH serves one connection to its end.
func (s *Server) serveSSH(nc net.Conn, p *place) {
	if nc.SetDeadline(time.Now().Add(s.cfg.SSHGrace)) != nil {
		return
	}
	_, host, err := s.cfg.HostIdentity().Parse()
	if err != nil {
		s.count.sshFailed.Add(1)
		s.log.Debug("no SSH without a host certificate", "err", err)
		return
	}
	cfg := &ssh.ServerConfig{
		Config:                  ssh.Config{KeyExchanges: reverse.KeyExchanges, Ciphers: reverse.Ciphers, MACs: reverse.MACs},
		PublicKeyAuthAlgorithms: []string{ssh.KeyAlgoED25519},
		MaxAuthTries:            maxAuthTries,
		PublicKeyCallback:       s.authenticate,
		ServerVersion:           reverse.ServerVersion,
	}
	cfg.AddHostKey(host)
	sc := reverse.NewStrictConn(nc, true)
	conn, channels, requests, err := ssh.NewServerConn(sc, cfg)
	if err != nil {
		if denied := (*ssh.ServerAuthError)(nil); errors.As(err, &denied) {
			s.count.sshRefused.Add(1)
		} else {
			s.count.sshFailed.Add(1)
		}
		s.log.Debug("SSH connection refused", "err", err)
		return
	}
	defer conn.Close()
	sc.Admit()
	p.leave()
	if nc.SetDeadline(time.Time{}) != nil {
		return
	}
	cert, ok := conn.Permissions.ExtraData[certKey{}].(*ssh.Certificate)
	node, err := identity.ParseNode(conn.User())
	if !ok || err != nil {
		s.count.sshRefused.Add(1)
		return
	}
	hash, err := keyHash(cert)
	if err != nil {
		s.count.sshRefused.Add(1)
		return
	}
	c := &sshConn{
		node: node, hash: hash, slot: reverse.Slot(string(conn.ClientVersion())), cert: cert, conn: conn, since: s.now(), done: make(chan struct{}),
	}
	var tasks sync.WaitGroup
	defer func() {
		_ = conn.Close() // what serves it ends
		close(c.done)
		tasks.Wait()
	}()
	var refusals refusals
	refusals.most = func() { _ = conn.Close() }
	tasks.Go(func() {
		for r := range requests {
			ok := r.Type == reverse.KeepaliveRequest
			if !ok {
				s.count.sshRejected.Add(1)
				refusals.add()
			}
			_ = r.Reply(ok, nil)
		}
	})
	tasks.Go(func() {
		for ch := range channels {
			s.count.sshRejected.Add(1)
			refusals.add()
			_ = ch.Reject(ssh.Prohibited, "channels are opened by the relay")
		}
	})
	tasks.Go(func() { reverse.Keepalive(conn, c.done) })
	if err := s.add(c); err != nil {
		s.count.sshRefused.Add(1)
		s.log.Info("gateway's SSH connection refused", "node", node, "reason", err)
		return
	}
	defer s.remove(c)
	ends := time.AfterFunc(time.Unix(int64(cert.ValidBefore), 0).Sub(s.now()), c.close)
	defer ends.Stop()
	s.log.Info("gateway connected by SSH", "node", node, "slot", c.slot)
	err = conn.Wait()
	s.log.Info("gateway's SSH connection is over", "node", node, "slot", c.slot, "reason", err)
}

// refusals counts what a peer was refused and calls most when it is too much.
type refusals struct {
	mu   sync.Mutex
	n    int
	most func()
}

func (r *refusals) add() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.n++; r.n == maxRefusals {
		r.most()
	}
}

// add puts a connection into its slot, in place of the older one, which is closed. On the list, it asks once more whether the gateway may,
// since the rules may have changed during the handshake.
func (s *Server) add(c *sshConn) error {
	s.mu.Lock()
	g := s.gateways[c.node]
	if g == nil {
		if len(s.gateways) >= s.cfg.Limits.Gateways {
			s.mu.Unlock()
			return fmt.Errorf("%d gateways are connected, which is the limit", len(s.gateways))
		}
		g = &gateway{}
		s.gateways[c.node] = g
	}
	old := g.slots[c.slot]
	g.slots[c.slot] = c
	var waiting []*join
	for j := range s.joins {
		if j.gateway == c.node {
			waiting = append(waiting, j)
		}
	}
	draining := s.draining
	s.mu.Unlock()
	s.count.sshConnected.Add(1)
	if old != nil {
		s.count.sshReplaced.Add(1)
		old.close()
	}
	if err := s.rules.Load().allowsGateway(c.node, c.cert, s.now); err != nil {
		s.remove(c)
		return err
	}
	for _, j := range waiting {
		j.widen(c)
	}
	if draining {
		c.tellDraining()
	}
	return nil
}

func (c *sshConn) tellDraining() {
	_, _, _ = c.conn.SendRequest(reverse.DrainingRequest, false, nil) // a broken connection shows elsewhere
}

func (s *Server) remove(c *sshConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.gateways[c.node]
	if g == nil || g.slots[c.slot] != c {
		return // a newer one has the slot
	}
	g.slots[c.slot] = nil
	if *g == (gateway{}) {
		delete(s.gateways, c.node)
	}
}

// connections are a gateway's live ones.
func (s *Server) connections(n identity.Node) []*sshConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*sshConn
	if g := s.gateways[n]; g != nil {
		for _, c := range g.slots {
			if c != nil {
				out = append(out, c)
			}
		}
	}
	return out
}

// openChannel opens a channel to the gateway. A gateway that does not answer in time has its connection closed, which ends the call. It is
// called from a goroutine of its own since x/crypto's OpenChannel never returns when it comes just when the connection ends: the channel
// is then entered into a list that has been emptied already.
func (c *sshConn) openChannel(o reverse.Open) (ssh.Channel, <-chan *ssh.Request, error) {
	type answer struct {
		ch       ssh.Channel
		requests <-chan *ssh.Request
		err      error
	}
	got := make(chan answer, 1)
	late := time.AfterFunc(openTimeout, c.close)
	defer late.Stop()
	go func() {
		ch, requests, err := c.conn.OpenChannel(reverse.ChannelType, o.Marshal())
		got <- answer{ch, requests, err}
	}()
	select {
	case a := <-got:
		return a.ch, a.requests, a.err
	case <-c.done: // a channel that came at the last moment ends with the connection
		return nil, nil, net.ErrClosed
	}
}
