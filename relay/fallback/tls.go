package fallback

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/relay/budget"
	"sallyway/relay/reverse"
)

// clientSilence is how long a client may say nothing: it pings.
const clientSilence = 3 * reverse.KeepaliveTimeout

// toClientQueue bounds what waits for a client, in bytes. What comes when it is full waits in the gateway's channels.
const toClientQueue = 256 << 10

// join is a client's connection, joined with its gateway's.
type join struct {
	s       *Server
	id      uint64
	gateway identity.Node
	client  identity.Node
	chain   []*x509.Certificate
	nc      net.Conn // below TLS

	clientShare, gatewayShare *budget.Share // of bandwidth; from enter to leave

	toClient, toGateway *reverse.Queue
	bundle              *reverse.Bundle

	mu      sync.Mutex // guards what follows
	ended   bool
	widened map[*sshConn]bool // connections that have a channel of it, or are getting one
	tasks   sync.WaitGroup    // not begun when ended
}

// tlsConfig asks for a certificate and lets a handshake pass without: who is refused is refused after it, in one way.
func (s *Server) tlsConfig() *tls.Config {
	return &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		ClientAuth:                  tls.RequestClientCert,
		SessionTicketsDisabled:      true, // a ticket would outlive a revocation
		DynamicRecordSizingDisabled: true,
		GetCertificate:              func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.cfg.Certificate() },
	}
}

// parseServerName reads <gateway id>.<org>.sallyway.
func parseServerName(name string) (identity.Node, error) {
	n := identity.Node{Kind: identity.Gateway}
	rest, ours := strings.CutSuffix(name, ".sallyway")
	id, org, ok := strings.Cut(rest, ".")
	if !ours || !ok || org == identity.SharedOrg {
		return n, errors.New("the server name is not a gateway's")
	}
	n.ID, n.Org = id, org
	return n, n.Validate()
}

// allowsClient holds a client's chain against what is known of the gateway's organization.
func (r *rules) allowsClient(gateway identity.Node, chain []*x509.Certificate) (identity.Node, error) {
	org := r.orgs[gateway.Org]
	if org == nil {
		return identity.Node{}, fmt.Errorf("organization %s is not served here", gateway.Org)
	}
	n, err := org.trust.Verify(chain, x509.ExtKeyUsageClientAuth)
	switch {
	case err != nil:
		return n, err
	case n.Org != gateway.Org:
		return n, fmt.Errorf("%v is of another organization than %v", n, gateway)
	case !reverse.Dials(n.Kind):
		return n, fmt.Errorf("%v does not dial gateways", n)
	case r.denied[n]:
		return n, errRevoked
	}
	return n, nil
}

// serveTLS serves one connection to its end. A connection that leads nowhere is closed right after the handshake, whatever the reason is:
// no certificate, one of another organization, a gateway that is not there or does not exist.
func (s *Server) serveTLS(nc net.Conn, p *place) {
	if nc.SetDeadline(time.Now().Add(s.cfg.TLSGrace)) != nil {
		return
	}
	tcp := &reverse.Gather{Conn: nc}
	conn := tls.Server(tcp, s.tlsConfig())
	ctx, cancel := context.WithTimeout(context.Background(), s.cfg.TLSGrace)
	err := conn.HandshakeContext(ctx)
	cancel()
	if err != nil {
		s.count.tlsFailed.Add(1)
		return
	}
	defer conn.Close() // with close_notify
	cs := conn.ConnectionState()
	gateway, err := parseServerName(cs.ServerName)
	var client identity.Node
	if err == nil {
		client, err = s.rules.Load().allowsClient(gateway, cs.PeerCertificates)
	}
	if err != nil {
		s.count.tlsRefused.Add(1)
		s.log.Debug("TLS connection refused", "gateway", gateway, "err", err)
		return
	}
	j := &join{
		s: s, id: linkID(), gateway: gateway, client: client, chain: cs.PeerCertificates, nc: nc,
		toClient: reverse.NewQueue(toClientQueue), toGateway: reverse.NewQueue(reverse.DefaultQueue), widened: map[*sshConn]bool{},
	}
	j.bundle = reverse.NewBundle(j.toGateway, j.fromGateway, j.close)
	if err := s.enter(j); err != nil {
		s.count.tlsRefused.Add(1)
		s.log.Debug("TLS connection refused", "node", client, "gateway", gateway, "err", err)
		return
	}
	defer s.leave(j)
	_, err = s.rules.Load().allowsClient(gateway, j.chain) // now that SetOrganizations finds it: the rules may have changed
	if err == nil {
		err = j.open()
	}
	if err != nil {
		s.count.tlsRefused.Add(1)
		s.log.Debug("gateway not joined", "node", client, "gateway", gateway, "err", err)
		return
	}
	p.leave()
	if nc.SetDeadline(time.Time{}) != nil {
		return
	}
	ends := time.AfterFunc(j.chain[0].NotAfter.Add(identity.ClockSkew).Sub(s.now()), j.close)
	defer ends.Stop()
	s.count.joined.Add(1)
	s.log.Debug("client joined with gateway", "node", client, "gateway", gateway)
	j.toClient.PutControl(reverse.ControlReady)
	j.tasks.Go(func() {
		defer j.close()
		j.write(conn, tcp)
	})
	err = j.read(conn)
	s.log.Debug("client left gateway", "node", client, "gateway", gateway, "reason", err)
}

// enter takes a join onto the list, within the limits.
func (s *Server) enter(j *join) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.draining:
		return errors.New("the relay is draining")
	case len(s.joins) >= s.cfg.Limits.Connections:
		return fmt.Errorf("%d clients are connected, which is the limit", len(s.joins))
	case s.nodes[j.client] >= s.cfg.Limits.NodeConnections:
		return fmt.Errorf("the node has %d connections, which is the limit", s.nodes[j.client])
	}
	s.joins[j] = struct{}{}
	s.nodes[j.client]++
	j.clientShare, j.gatewayShare = s.cfg.Budgets.Enter(j.client), s.cfg.Budgets.Enter(j.gateway)
	return nil
}

// leave ends a join and waits until nothing of it runs.
func (s *Server) leave(j *join) {
	s.mu.Lock()
	delete(s.joins, j)
	if s.nodes[j.client]--; s.nodes[j.client] == 0 {
		delete(s.nodes, j.client)
	}
	s.mu.Unlock()
	j.close()
	j.tasks.Wait()
	j.bundle.Close()
	s.cfg.Budgets.Leave(j.client)
	s.cfg.Budgets.Leave(j.gateway)
}

// close ends both directions; it does not wait, and may be called more than once.
func (j *join) close() {
	j.mu.Lock()
	j.ended = true
	j.mu.Unlock()
	j.toClient.Close()
	j.toGateway.Close()
	_ = j.nc.Close() // the reader ends
}

var errNoGateway = errors.New("the gateway has no SSH connection here")

// open gets the first channel to the gateway, and has the others opened.
func (j *join) open() error {
	conns := j.s.connections(j.gateway)
	err := errNoGateway
	for len(conns) > 0 && err != nil {
		j.mu.Lock()
		j.widened[conns[0]] = true
		j.mu.Unlock()
		err = j.channel(conns[0])
		conns = conns[1:]
	}
	for _, c := range conns {
		j.widen(c)
	}
	return err
}

// widen opens a channel on another of the gateway's connections, without waiting.
func (j *join) widen(c *sshConn) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.ended || j.widened[c] || len(j.widened) == 0 {
		return // open has not chosen the first one yet, and will see this one
	}
	j.widened[c] = true
	j.tasks.Go(func() {
		if err := j.channel(c); err != nil {
			j.s.log.Debug("no further channel", "gateway", j.gateway, "slot", c.slot, "err", err)
		}
	})
}

// channel opens a channel on c and gives it to the bundle.
func (j *join) channel(c *sshConn) error {
	ch, requests, err := c.openChannel(reverse.Open{Link: j.id, Peer: j.client})
	if err != nil {
		return err
	}
	var rest sync.WaitGroup
	reverse.Drain(&rest, ch, requests)
	j.s.tasks.Go(rest.Wait) // ends with the channel
	return j.bundle.Add(ch, c.close)
}

// fromGateway takes frames of the gateway's and waits until the client has room.
func (j *join) fromGateway(frames []byte, _ *datagram.Buffer) error {
	n := 0
	if err := reverse.Frames(frames, func(r reverse.Run) { n += len(r.Frames) }); err != nil {
		return err
	}
	if n > 0 && !j.pays(j.gatewayShare, n) {
		return nil
	}
	j.s.count.down.Add(uint64(n))
	if !j.toClient.PutFrames(frames) {
		return net.ErrClosed
	}
	return nil
}

// pays reports whether a node may send n bytes of frames, and counts them otherwise.
func (j *join) pays(share *budget.Share, n int) bool {
	ok := share.Take(n, j.s.now().UnixNano())
	if !ok {
		j.s.count.overBudget.Add(uint64(n))
	}
	return ok
}

// write sends to the client what the gateway sent.
func (j *join) write(conn *tls.Conn, tcp *reverse.Gather) {
	buf := make([]byte, reverse.MaxChunk)
	for {
		n, _, ok := j.toClient.Take(buf)
		if !ok {
			return
		}
		if err := tcp.Burst(func() error {
			_, err := conn.Write(buf[:n])
			return err
		}); err != nil {
			return
		}
	}
}

// read passes on what the client sends: whole frames, as many as have come.
func (j *join) read(conn *tls.Conn) error {
	buf := make([]byte, reverse.MaxChunk)
	have := 0
	for {
		if err := conn.SetReadDeadline(time.Now().Add(clientSilence)); err != nil {
			return err
		}
		n, err := conn.Read(buf[have:])
		have += n
		used, ferr := j.frames(buf[:have])
		have = copy(buf, buf[used:have])
		switch {
		case ferr != nil:
			return ferr
		case errors.Is(err, os.ErrDeadlineExceeded):
			return errors.New("the client is silent")
		case errors.Is(err, io.EOF):
			return errors.New("the client closed the connection")
		case err != nil:
			return err
		}
	}
}

// frames passes the whole frames at the start of b on and returns their length.
func (j *join) frames(b []byte) (used int, err error) {
	start := 0
	flush := func() error {
		if start == used {
			return nil
		}
		run := b[start:used]
		if !j.pays(j.clientShare, len(run)) {
			return nil
		}
		j.s.count.up.Add(uint64(len(run)))
		if !j.toGateway.PutFrames(run) {
			return net.ErrClosed
		}
		return nil
	}
	for {
		_, kind, size, err := reverse.Next(b[used:])
		switch {
		case err != nil:
			return used, err
		case size == 0:
			return used, flush()
		case kind == 0 && size > 3:
			used += size
			continue
		}
		if err := flush(); err != nil {
			return used, err
		}
		used += size
		start = used
		if kind == reverse.ControlPing {
			j.toClient.PutControl(reverse.ControlPong)
		}
	}
}
