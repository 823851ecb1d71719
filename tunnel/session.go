package tunnel

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"log/slog"
	"net/netip"
	"time"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/stun"
)

// DialConfig says whom to dial, over what and as whom.
type DialConfig struct {
	// Link is the first path; it must carry 1200-byte payloads at least.
	Link datagram.Link
	// Info describes Link.
	Info LinkInfo
	// Gateway is who must answer: exactly this node, of kind gateway.
	Gateway identity.Node
	// Certificate returns this node's certificate: of kind client, or site for a gateway that dials.
	Certificate func() (*tls.Certificate, error)
	// Trust returns what the gateway's certificate is held against. It is asked in every handshake.
	Trust func() *identity.Trust
	// HandshakeTimeout bounds silence during the handshake; 0 is DefaultHandshakeTimeout. ctx bounds all of Dial.
	HandshakeTimeout time.Duration
	// IdleTimeout is how long the session outlives the loss of every path; 0 is DefaultIdleTimeout.
	IdleTimeout time.Duration
	// OnNotice is called with every notice of the gateway, in order, from one goroutine. Nil drops them.
	OnNotice func(Notice)
	// OnPath is called from one goroutine when the state of the active or the standby path changes. It may call Failover, Repoint
	// and Standby. Nil is no call.
	OnPath func(PathEvent)
	// Logger takes changes of state; nil discards them.
	Logger *slog.Logger
}

// Session is a client's end of a session with a gateway. Its methods may be called concurrently.
type Session struct{}

// Dial opens a session. It returns after the gateway has accepted this node: a *SessionError says that and why it did not, an error that
// is ErrTimeout that nobody answered on the link.
func Dial(ctx context.Context, cfg DialConfig) (*Session, error) { return nil, nil }

// Gateway is who is at the other end.
func (s *Session) Gateway() identity.Node { return identity.Node{} }

// DialTCP opens a TCP flow to host, a name or an IP address, and returns when the gateway has connected. A refusal is a *ProxyError.
// ctx bounds the dial only.
func (s *Session) DialTCP(ctx context.Context, host string, port uint16) (*Stream, error) {
	return nil, nil
}

// DialUDP opens a UDP flow to host. A refusal is a *ProxyError. ctx bounds the dial only.
func (s *Session) DialUDP(ctx context.Context, host string, port uint16) (*UDPConn, error) {
	return nil, nil
}

// DialIP opens an exchange of IP packets and returns when the gateway has assigned addresses. ctx bounds the dial only.
func (s *Session) DialIP(ctx context.Context) (*IPConn, error) { return nil, nil }

// Resolve has the gateway answer a DNS query in wire format (RFC 1035 §4.1) and returns the answer.
func (s *Session) Resolve(ctx context.Context, query []byte) ([]byte, error) { return nil, nil }

// Standby points a free slot to l and validates it end to end, so that Failover can move there without asking. A standby that was set
// before is let go. It fails when no answer comes before ctx ends; the session does not suffer.
func (s *Session) Standby(ctx context.Context, l datagram.Link, info LinkInfo) error { return nil }

// Failover moves the session to the standby path at once. It returns ErrNoStandby when there is none. The old path goes on receiving
// until its slot is pointed elsewhere.
func (s *Session) Failover(reason string) error { return nil }

// Repoint moves the session to l without validating it first: the way back after every path was lost. A slot that was ever validated
// carries it, so that congestion control and timers start anew; where there is none (no Standby was ever set) the active slot itself is
// pointed to l and QUIC's retransmission timer, backed off by then, sets the pace.
func (s *Session) Repoint(l datagram.Link, info LinkInfo, reason string) error { return nil }

// Path says what the paths are and how they do.
func (s *Session) Path() PathInfo { return PathInfo{} }

// ProbeKeys returns this end's keys for probes, derived from the handshake (RFC 8446 §7.5).
func (s *Session) ProbeKeys() stun.Keys { return stun.Keys{} }

// Notify sends a notice to the gateway. It does not wait for it to arrive.
func (s *Session) Notify(n Notice) error { return nil }

// Done is closed when the session is over.
func (s *Session) Done() <-chan struct{} { return nil }

// Err is nil while the session lives, then a *SessionError.
func (s *Session) Err() error { return nil }

// Stats counts what passed so far.
func (s *Session) Stats() SessionStats { return SessionStats{} }

// Close ends the session, its flows with it, tells the gateway why, and waits for the session's goroutines. The links stay.
func (s *Session) Close(reason string) error { return nil }

// Notice is a message on the session's control stream.
type Notice struct {
	// Type says what it is: the Notice constants, or what gateway and client agree on.
	Type string `json:"type"`
	// Reason is for people.
	Reason string `json:"reason,omitempty"`
	// Data is what the type says.
	Data json.RawMessage `json:"data,omitempty"`
}

// Types of notices that tunnel sends itself.
const (
	// NoticeDraining says that the gateway takes no new flows and ends soon.
	NoticeDraining = "draining"
)

// Liveness is the state of a path by its probes.
type Liveness string

// The states. A path is suspect when a probe is late and dead when three in a row were.
const (
	Unknown Liveness = "unknown"
	Alive   Liveness = "alive"
	Suspect Liveness = "suspect"
	Dead    Liveness = "dead"
)

// PathRole says what a session uses a path for.
type PathRole string

// The roles.
const (
	RoleActive  PathRole = "active"
	RoleStandby PathRole = "standby"
)

// PathEvent is a change of a path's state.
type PathEvent struct {
	Role  PathRole
	Link  datagram.Link
	Info  LinkInfo
	State Liveness
}

// PathStatus is what is known of one path.
type PathStatus struct {
	Link      datagram.Link
	Info      LinkInfo
	State     Liveness
	Validated bool // by QUIC, end to end
	Probes    stun.PathStats
}

// PathInfo is a session's paths. Standby.Link is nil where there is none.
type PathInfo struct {
	Active, Standby PathStatus
	// Moves counts how often the active path changed; LastMove is when and LastReason why.
	Moves      uint64
	LastMove   time.Time
	LastReason string
}

// SessionStats counts a session's traffic.
type SessionStats struct {
	// Sent and Received are bytes of QUIC packets.
	Sent, Received uint64
	// Lost are bytes declared lost.
	Lost uint64
	// RTT is QUIC's smoothed round-trip time on the active path.
	RTT time.Duration
	// Since is when the session began.
	Since time.Time
}

// Stream is a TCP flow through a session: a Flow, and a net.Conn with CloseWrite.
type Stream struct{ counter }

// UDPConn is a UDP flow through a session.
type UDPConn struct{}

// ReadPacket reads the next datagram's payload into b; what does not fit is cut off. It fails with ErrRefused when the destination
// answered with ICMP port unreachable, and with net.ErrClosed after Close.
func (c *UDPConn) ReadPacket(b []byte) (int, error) { return 0, nil }

// WritePacket sends one datagram with payload b, of up to MaxUDPPayload bytes. b is not kept.
func (c *UDPConn) WritePacket(b []byte) error { return nil }

// Close ends the flow. It may be called more than once.
func (c *UDPConn) Close() error { return nil }

// MaxUDPPayload is the largest payload of a UDP datagram, in bytes.
const MaxUDPPayload = 65527

// IPConn exchanges IP packets with the other end (RFC 9484). ReadPacket is for one goroutine, WritePacket for any.
type IPConn struct{}

// ReadPacket reads the next IP packet into b, which must have room for MaxIPPacket bytes.
func (c *IPConn) ReadPacket(b []byte) (int, error) { return 0, nil }

// WritePacket sends an IP packet, whose hop limit it decrements in place. A packet that the other end would drop (source not assigned,
// destination not routed) is dropped and counted. icmp, if not nil, is the ICMP error to hand to the packet's sender: it was too large.
func (c *IPConn) WritePacket(b []byte) (icmp []byte, err error) { return nil, nil }

// Assigned are the addresses that the gateway assigned to the client.
func (c *IPConn) Assigned() []netip.Prefix { return nil }

// Routes are where the client may send.
func (c *IPConn) Routes() []netip.Prefix { return nil }

// Close ends the exchange. It may be called more than once.
func (c *IPConn) Close() error { return nil }

// MaxIPPacket is the largest IP packet in bytes that an IPConn carries.
const MaxIPPacket = 65535
