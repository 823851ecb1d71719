package tunnel

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

// Peer is who is at the other end of a session, proved by its certificate.
type Peer struct {
	Node identity.Node
	Key  identity.KeyHash
	// Session tells sessions of one gateway process apart.
	Session uint64
}

// Conn is a TCP-like connection that a Handler dialled: *net.TCPConn, or a stack's conn. If it has SetLinger(int) error, a reset is
// passed on as RST by SetLinger(0); if it has Reset(), by that.
type Conn interface {
	net.Conn
	CloseWrite() error
}

// IPService is what a Handler offers a peer over CONNECT-IP.
type IPService struct {
	// Assign are the peer's addresses: packets from others are dropped.
	Assign []netip.Prefix
	// Routes are where the peer may send: packets to elsewhere are dropped.
	Routes []netip.Prefix
	// Serve moves packets until the conn is closed or ctx ends. The conn is closed when it returns.
	Serve func(ctx context.Context, c *IPConn) error
}

// Handler decides what a peer may do and does it. Its methods are called concurrently, one goroutine per request; ctx ends when the peer
// gives up or the session ends. A refusal is a *ProxyError (see Denied); other errors are turned into one by AsProxyError.
type Handler interface {
	// Authorize decides whether the peer may have a session at all. It is called after the handshake, before any request.
	Authorize(ctx context.Context, p Peer) error
	// DialTCP connects to t, whose Host is what the peer named and whose Addr is set when that is an IP address.
	DialTCP(ctx context.Context, p Peer, t policy.Target) (Conn, error)
	// DialUDP returns a connected UDP socket or its like: Write sends, Read receives one datagram.
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

// Server is a gateway's end of its sessions.
type Server struct{}

// Listen makes a server on m. Run serves.
func Listen(m *Merged, cfg ServeConfig) (*Server, error) { return nil, nil }

// Run serves until ctx ends; then it ends every session and returns when all of its goroutines have stopped.
func (s *Server) Run(ctx context.Context) error { return nil }

// SessionInfo describes a session at a gateway.
type SessionInfo struct {
	Peer  Peer
	Since time.Time
	// Flows is how many flows are open, TotalFlows how many there were.
	Flows, TotalFlows uint64
	// Sent and Received are bytes of flows: payload, towards and from the peer.
	Sent, Received uint64
	// Virtual is the address of the active path, Path its link.
	Virtual netip.AddrPort
	Path    LinkInfo
	RTT     time.Duration
}

// Sessions lists the sessions, oldest first.
func (s *Server) Sessions() []SessionInfo { return nil }

// CloseWhere ends the open sessions for which f says so, at once, with the reason that the peer shows. It returns how many.
func (s *Server) CloseWhere(f func(p Peer) (reason string, end bool)) int { return 0 }

// Notify sends a notice to the sessions for which f holds; a nil f is all of them. It returns to how many.
func (s *Server) Notify(f func(p Peer) bool, n Notice) int { return 0 }

// Drain refuses new sessions and new flows from now on and tells every peer so.
func (s *Server) Drain(reason string) {}
