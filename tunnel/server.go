package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/time/rate"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/stun"
)

// Peer is who is at the other end of a session, proved by its certificate.
type Peer struct {
	Node identity.Node
	Key  identity.KeyHash
	// Session tells the sessions of one gateway process apart.
	Session uint64
}

// Conn is a TCP-like connection that a Handler dialled: *net.TCPConn, or a stack's conn. If it has Reset(), a reset is passed on by
// that; else if it has SetLinger(int) error, as RST by SetLinger(0) and Close.
type Conn interface {
	net.Conn
	CloseWrite() error
}

// Handler decides what a peer may do and does it. Its methods are called concurrently, one goroutine per request; ctx ends when the peer
// gives up or the session ends. A refusal is a *ProxyError (see Denied); other errors are turned into one by AsProxyError.
type Handler interface {
	// Authorize decides whether the peer may have a session at all. It is called after the handshake, before any request.
	Authorize(ctx context.Context, p Peer) error
	// DialTCP connects to t, whose Host is what the peer named and whose Addr is set when that is an IP address.
	DialTCP(ctx context.Context, p Peer, t policy.Target) (Conn, error)
	// DialUDP returns a connected UDP socket or its like: Write sends, Read receives one datagram. An error of Read ends the flow;
	// ECONNREFUSED as refused, a deadline (for idle flows) as closed.
	DialUDP(ctx context.Context, p Peer, t policy.Target) (net.Conn, error)
	// OpenIP decides whether the peer may exchange IP packets, and which.
	OpenIP(ctx context.Context, p Peer) (*IPService, error)
	// Resolve answers a DNS query in wire format.
	Resolve(ctx context.Context, p Peer, query []byte) ([]byte, error)
}

// ServeConfig says who serves and within which limits.
type ServeConfig struct {
	// Node is this gateway.
	Node identity.Node
	// Certificate returns its certificate, of kind gateway.
	Certificate func() (*tls.Certificate, error)
	// Trust returns what peers' certificates are held against, deny list included. It is asked in every handshake.
	Trust func() *identity.Trust
	// Handler decides.
	Handler Handler
	// StatelessResetKey lets peers notice a restart at once: secret, and the same after it. The zero key is none.
	StatelessResetKey [32]byte
	// TokenKey seals address validation tokens; the zero key is a random one.
	TokenKey [32]byte
	// Limits bound what peers may use; zero fields are defaults.
	Limits Limits
	// HandshakeTimeout bounds silence during the handshake; 0 is DefaultHandshakeTimeout.
	HandshakeTimeout time.Duration
	// IdleTimeout is how long a session outlives the loss of every path; 0 is DefaultIdleTimeout. The smaller of both ends' counts.
	IdleTimeout time.Duration
	// OnSession is called when a session was accepted and, with the reason in end, when it is over. Nil is no call.
	OnSession func(info SessionInfo, end error)
	// OnNotice is called with every notice of a peer, in order per session. Nil drops them.
	OnNotice func(p Peer, n Notice)
	// Logger takes changes of state; nil discards them.
	Logger *slog.Logger
}

// Limits bound what peers use of a gateway.
type Limits struct {
	// Sessions is how many sessions a node may have; 0 is DefaultSessions. A further one is refused.
	Sessions int
	// Flows is how many flows a node may have in all its sessions; 0 is DefaultFlows. A further one is refused with ErrLimit.
	Flows int
	// Handshakes is how many handshakes a second are taken without address validation; 0 is DefaultHandshakes, negative is none. Above
	// it QUIC's Retry (RFC 9000 §8.1.2) costs the dialler a round trip.
	Handshakes int
}

// Server is a gateway's end of its sessions. Its methods may be called concurrently.
type Server struct {
	cfg    ServeConfig
	merged *Merged
	tr     *quic.Transport

	mu       sync.Mutex // guards what follows
	sessions map[*peerSession]struct{}
	flows    map[identity.Node]int // open flows by node
	lastID   uint64
	draining string // the reason, "" if not
}

// Listen makes a server on m. Run serves; without it, Close m and nothing stays behind.
func Listen(m *Merged, cfg ServeConfig) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("serve sessions: %w", err)
	}
	s := &Server{
		cfg: cfg, merged: m, sessions: make(map[*peerSession]struct{}), flows: make(map[identity.Node]int),
		tr: &quic.Transport{Conn: m, ConnectionIDLength: connectionIDLength, DisableVersionNegotiationPackets: true},
	}
	if cfg.StatelessResetKey != [32]byte{} {
		k := quic.StatelessResetKey(cfg.StatelessResetKey)
		s.tr.StatelessResetKey = &k
	}
	if cfg.TokenKey != [32]byte{} {
		k := quic.TokenGeneratorKey(cfg.TokenKey)
		s.tr.TokenGeneratorKey = &k
	}
	perSecond := max(cfg.Limits.Handshakes, 0)
	unproved := rate.NewLimiter(rate.Limit(perSecond), perSecond)
	s.tr.VerifySourceAddress = func(net.Addr) bool { return !unproved.Allow() }
	return s, nil
}

// Run serves until ctx ends; then it ends every session and returns when all of its goroutines have stopped. It may be called once.
func (s *Server) Run(ctx context.Context) error {
	qc := quicConfig(s.cfg.HandshakeTimeout, s.cfg.IdleTimeout)
	qc.MaxIncomingStreams = int64(s.cfg.Limits.Flows + spareStreams)
	ln, err := s.tr.Listen(s.cfg.tls(), qc)
	if err != nil {
		return fmt.Errorf("serve sessions: %w", err)
	}
	probe := s.answerProbe
	s.merged.probe.Store(&probe)
	var tasks sync.WaitGroup
	watching, stopWatching := context.WithCancel(ctx)
	tasks.Go(func() { s.watchRescues(watching) })
	var accept error
	for {
		conn, err := ln.Accept(ctx)
		if err != nil {
			if ctx.Err() == nil {
				accept = fmt.Errorf("accept sessions: %w", err)
			}
			break
		}
		tasks.Go(func() { s.serve(ctx, conn) })
	}
	s.merged.probe.Store(nil)
	stopWatching()
	const reason = "the gateway stops"
	s.mu.Lock()
	s.draining = reason // what is not on the list yet does not get there any more
	s.mu.Unlock()
	s.closeWhere(CloseShutdown, func(Peer) (string, bool) { return reason, true })
	tasks.Wait()
	return errors.Join(accept, ln.Close(), s.tr.Close())
}

// serve is one session from handshake to end.
func (s *Server) serve(ctx context.Context, conn *quic.Conn) {
	p, err := s.admit(ctx, conn)
	if err != nil {
		e := sessionError(err)
		s.cfg.Logger.Info("session refused", "peer", p.peer.Node, "reason", e.Reason, "err", err)
		_ = conn.CloseWithError(quic.ApplicationErrorCode(e.Code), e.Reason)
		return
	}
	s.cfg.Logger.Debug("session began", "peer", p.peer.Node, "key", p.peer.Key, "session", p.peer.Session, "path", p.info().Path.Name)
	if s.cfg.OnSession != nil {
		s.cfg.OnSession(p.info(), nil)
	}
	p.run()
	end := sessionError(context.Cause(conn.Context()))
	s.mu.Lock()
	delete(s.sessions, p)
	s.mu.Unlock()
	s.cfg.Logger.Info("session ended", "peer", p.peer.Node, "session", p.peer.Session, "reason", end.Reason, "remote", end.Remote)
	if s.cfg.OnSession != nil {
		s.cfg.OnSession(p.info(), end)
	}
}

// admit decides whether a connection becomes a session. The session it returns is never nil.
func (s *Server) admit(ctx context.Context, conn *quic.Conn) (*peerSession, error) {
	chain := conn.ConnectionState().TLS.PeerCertificates
	p := &peerSession{srv: s, conn: conn, since: time.Now()}
	s.merged.attach(conn)
	node, err := s.cfg.verify(chain) // the handshake did this; whom it proved is asked here
	if err != nil {
		return p, &SessionError{Code: CloseDenied, Reason: err.Error(), Err: err}
	}
	p.peer = Peer{Node: node, Key: identity.CertificateKeyHash(chain[0])}
	keys, err := exportProbeKeys(conn)
	if err != nil {
		return p, err
	}
	p.keys = keys.Swap()
	p.responder = stun.NewOrderedResponder(p.keys, 0, 0)
	p.ctx = conn.Context()
	// The session is on the list before it is authorized, so that a revocation meanwhile ends it.
	s.mu.Lock()
	s.lastID++
	p.peer.Session = s.lastID
	if s.draining != "" {
		defer s.mu.Unlock()
		return p, &SessionError{Code: CloseDraining, Reason: s.draining}
	}
	n := 0
	for other := range s.sessions {
		if other.peer.Node == node {
			n++
		}
	}
	if n >= s.cfg.Limits.Sessions {
		defer s.mu.Unlock()
		return p, &SessionError{Code: CloseLimit, Reason: fmt.Sprintf("%v has %d sessions with this gateway, which is the limit", node, n)}
	}
	s.sessions[p] = struct{}{}
	s.mu.Unlock()
	err = func() error {
		if _, err := s.cfg.verify(chain); err != nil { // revoked between the handshake and the list
			return &SessionError{Code: CloseRevoked, Reason: err.Error(), Err: err}
		}
		ctx, cancel := context.WithTimeout(ctx, authorizeTimeout)
		defer cancel()
		if err := s.cfg.Handler.Authorize(ctx, p.peer); err != nil {
			e := AsProxyError(err)
			return &SessionError{Code: CloseDenied, Reason: e.Error(), Err: err}
		}
		return nil
	}()
	if err != nil {
		s.mu.Lock()
		delete(s.sessions, p)
		s.mu.Unlock()
	}
	return p, err
}

// answerProbe answers a path probe on a link of the gateway's with the keys of the session it belongs to: the one that was last right
// on this link, else any of the same node.
func (s *Server) answerProbe(p *port, b []byte) {
	if !stun.IsProbe(b) || !stun.IsRequest(b) {
		return
	}
	now := time.Now()
	answer := func(sess *peerSession) bool {
		if sess == nil {
			return false
		}
		a, ok := sess.responder.Respond(now, b, netip.AddrPort{})
		if ok {
			p.link.Send(a, 0, datagram.NotECT)
			p.prove(sess)
		}
		return ok
	}
	last := p.responder.Load()
	if answer(last) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for sess := range s.sessions {
		if sess != last && (p.info.Peer.IsZero() || p.info.Peer == sess.peer.Node) && answer(sess) {
			return
		}
	}
}

// SessionInfo describes a session at a gateway.
type SessionInfo struct {
	Peer  Peer
	Since time.Time
	// Flows is how many flows are open, TotalFlows how many there were.
	Flows, TotalFlows uint64
	// Sent and Received are bytes of flows: payload, towards and from the peer.
	Sent, Received uint64
	// Renewed is how often the gateway's sender got a new congestion window.
	Renewed uint64
	// Rescued is how often it could not follow the peer to another path without help.
	Rescued uint64
	// Virtual is the address of the active path, Path its link.
	Virtual netip.AddrPort
	Path    LinkInfo
	// RTT is QUIC's smoothed round-trip time.
	RTT time.Duration
}

// Sessions lists the sessions, oldest first.
func (s *Server) Sessions() []SessionInfo {
	var out []SessionInfo
	for _, p := range s.list() {
		out = append(out, p.info())
	}
	return out
}

func (s *Server) list() []*peerSession {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*peerSession, 0, len(s.sessions))
	for p := range s.sessions {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b *peerSession) int { return int(a.peer.Session) - int(b.peer.Session) })
	return out
}

// CloseWhere ends the open sessions for which f says so, at once, with the reason that the peer shows. It returns how many.
func (s *Server) CloseWhere(f func(p Peer) (reason string, end bool)) int {
	return s.closeWhere(CloseRevoked, f)
}

func (s *Server) closeWhere(code CloseCode, f func(p Peer) (reason string, end bool)) int {
	var ending sync.WaitGroup
	n := 0
	for _, p := range s.list() {
		if reason, end := f(p.peer); end {
			n++
			ending.Go(func() { _ = p.conn.CloseWithError(quic.ApplicationErrorCode(code), reason) })
		}
	}
	ending.Wait()
	return n
}

// ProbeKeys returns this end's keys for path probes of a session, derived from its handshake (RFC 8446 §7.5). The server uses them by
// itself on its links.
func (s *Server) ProbeKeys(session uint64) (stun.Keys, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for p := range s.sessions {
		if p.peer.Session == session {
			return p.keys, true
		}
	}
	return stun.Keys{}, false
}

// Notify sends a notice to the sessions for which f holds; a nil f is all of them. It returns to how many.
func (s *Server) Notify(f func(p Peer) bool, n Notice) int {
	told := 0
	for _, p := range s.list() {
		if ctrl := p.ctrl.Load(); ctrl != nil && (f == nil || f(p.peer)) && ctrl.send(n) == nil {
			told++
		}
	}
	return told
}

// Drain refuses new sessions and new flows from now on and tells every peer so.
func (s *Server) Drain(reason string) {
	if reason == "" {
		reason = "the gateway is draining"
	}
	s.mu.Lock()
	s.draining = reason
	s.mu.Unlock()
	s.Notify(nil, Notice{Type: NoticeDraining, Reason: reason})
}
