package tunnel

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/internal/telemetry"
	"sallyway/stun"
)

// DialConfig says whom to dial, over what and as whom.
type DialConfig struct {
	// Link is the first path; it must carry payloads of 1200 bytes at least.
	Link datagram.Link
	// Info describes Link.
	Info LinkInfo
	// SingleLink says that there is no other link to make a standby of: the session then prepares to be repointed without one. A Standby
	// set all the same works, but until the first move the loss of both links at once is not survived.
	SingleLink bool
	// Gateway is who must answer: exactly this node, of kind gateway.
	Gateway identity.Node
	// Certificate returns this node's certificate: of kind client, site for a gateway that dials, or platform.
	Certificate func() (*tls.Certificate, error)
	// Trust returns what the gateway's certificate is held against. It is asked in every handshake.
	Trust func() *identity.Trust
	// HandshakeTimeout bounds silence during the handshake; 0 is DefaultHandshakeTimeout. ctx bounds all of Dial.
	HandshakeTimeout time.Duration
	// IdleTimeout is how long the session outlives the loss of every path; 0 is DefaultIdleTimeout.
	IdleTimeout time.Duration
	// OnNotice is called with every notice of the gateway, in order, from one goroutine. It must not call Close. Nil drops them.
	OnNotice func(Notice)
	// OnPath is called from one goroutine when the state of the active or the standby path changes, or the session has moved to its standby by
	// itself, which it does when the active path is dead, or bad while the standby is not. It may call Failover, Repoint and Standby, not Close. Nil is no call.
	OnPath func(PathEvent)
	// Logger takes changes of state; nil discards them.
	Logger *slog.Logger
}

// Session is a client's end of a session with a gateway. Its methods may be called concurrently.
type Session struct {
	cfg       DialConfig
	authority string
	conn      *quic.Conn
	h3        *http3.ClientConn
	ctrl      *control
	keys      stun.Keys
	since     time.Time
	raw       *rawSocket

	flows    meter
	monitors *monitors

	validating sync.Mutex // held while a path is being validated; taken before mu
	settled    sync.Once

	mu         sync.Mutex // guards what follows
	slots      [slots]*slot
	active     int // index into slots
	former     int // the active one before the last move
	standby    int // index into slots, -1 for none
	moves      uint64
	renewed    uint64    // congestion windows
	answers    bool      // the gateway says when it has followed a move; set before the session is there
	followed   uint64    // the last of the moves that it spoke of
	knocks     int       // since the last move
	knocked    time.Time // when the last one of all was
	lastMove   time.Time
	lastReason string
	causes     map[MoveCause]uint64
	err        error

	wake   chan struct{} // something about the paths changed
	events chan PathEvent
	ctx    context.Context // ends when the session does
	cancel context.CancelFunc
	tasks  sync.WaitGroup // everything that ctx ends
	done   chan struct{}
}

// Dial opens a session. It returns after the gateway has accepted this node: a *SessionError says that it did not, and why; one that is
// ErrTimeout that nobody answered on the link.
func Dial(ctx context.Context, cfg DialConfig) (*Session, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("dial %v: %w", cfg.Gateway, err)
	}
	raw, err := newRawSocket()
	if err != nil {
		return nil, fmt.Errorf("dial %v: %w", cfg.Gateway, err)
	}
	s := &Session{
		cfg: cfg, authority: cfg.Gateway.ServerName(), raw: raw, standby: -1, since: time.Now(),
		wake: make(chan struct{}, 1), events: make(chan PathEvent, 64), done: make(chan struct{}), causes: map[MoveCause]uint64{},
	}
	s.flows.wake = s.stepSoon
	s.monitors = newMonitors(s.stepSoon)
	for i := range s.slots {
		s.slots[i] = newSlot(i, raw)
		if i > 0 {
			s.slots[i].handshake = s.slots[0]
		}
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if err := s.handshake(ctx); err != nil {
		s.cancel()
		s.tasks.Wait()
		s.release()
		return nil, fmt.Errorf("dial %v: %w", cfg.Gateway, sessionError(err))
	}
	s.tasks.Go(func() { s.ctrl.run(s.ctx) })
	s.tasks.Go(s.watchPaths)
	s.tasks.Go(s.tellPaths)
	if cfg.SingleLink {
		s.tasks.Go(s.prepareSpare)
	}
	go s.run()
	return s, nil
}

// handshake dials QUIC and opens the control stream, whose first notice proves that the gateway accepted this node: in TLS 1.3 a client's
// handshake is complete before its certificate was looked at.
func (s *Session) handshake(ctx context.Context) error {
	first := s.slots[0]
	link := s.newLink(first, s.cfg.Link, s.cfg.Info)
	first.point(link, true)
	s.watchLink(link)
	qc := quicConfig(s.cfg.HandshakeTimeout, s.cfg.IdleTimeout)
	qc.KeepAlivePeriod = keepAlive
	conn, err := first.tr.Dial(ctx, gatewayAddr, s.cfg.tls(), qc)
	if err != nil {
		return err
	}
	s.conn = conn
	for _, sl := range s.slots {
		sl.src.in.set([]taker{conn})
	}
	if err := s.deriveKeys(); err != nil {
		return errors.Join(err, conn.CloseWithError(quic.ApplicationErrorCode(CloseNormal), "no keys"))
	}
	link.mon.start(s.keys)
	s.h3 = (&http3.Transport{
		EnableDatagrams: true, DisableCompression: true, MaxResponseHeaderBytes: maxHeader,
	}).NewClientConn(conn)
	hello := func() error {
		str, _, err := s.connect(ctx, protoControl, controlPath, nil)
		if err != nil {
			return err
		}
		s.ctrl = newControl(str)
		notices := newNoticeReader(str)
		if err := s.untilDone(ctx, str, func() error {
			n, err := notices.next()
			if err == nil && n.Type != noticeHello {
				err = fmt.Errorf("the gateway's first notice is %.40q, want %q", n.Type, noticeHello)
			}
			s.answers = bytes.Equal(n.Data, helloAnswers)
			return err
		}); err != nil {
			return err
		}
		s.tasks.Go(func() { s.receiveNotices(notices) })
		return nil
	}
	if err := hello(); err != nil {
		if over := context.Cause(conn.Context()); over != nil {
			err = over // it says more than the stream does
		}
		_ = conn.CloseWithError(quic.ApplicationErrorCode(CloseNormal), "given up")
		return err
	}
	return nil
}

// Label of the keys for probes, exported from the handshake (RFC 8446 §7.5): the client's direction first.
const probeKeyLabel = "EXPORTER-sallyway-path-probe"

func exportProbeKeys(conn *quic.Conn) (client stun.Keys, err error) {
	cs := conn.ConnectionState().TLS
	b, err := cs.ExportKeyingMaterial(probeKeyLabel, nil, 2*stun.KeySize)
	if err != nil {
		return client, fmt.Errorf("derive probe keys: %w", err)
	}
	copy(client.Out[:], b)
	copy(client.In[:], b[stun.KeySize:])
	return client, nil
}

func (s *Session) deriveKeys() (err error) {
	s.keys, err = exportProbeKeys(s.conn)
	return err
}

// run waits for the session's end and clears up.
func (s *Session) run() {
	<-s.conn.Context().Done()
	err := sessionError(context.Cause(s.conn.Context()))
	s.mu.Lock()
	s.err = err
	s.mu.Unlock()
	s.cfg.Logger.Info("session ended", "gateway", s.cfg.Gateway, "reason", err.Reason, "remote", err.Remote)
	s.cancel()
	s.tasks.Wait()
	if !err.Remote {
		// While the Transports live, QUIC answers what still arrives with the close again: the first one may have been lost.
		time.Sleep(min(max(3*s.conn.ConnectionStats().SmoothedRTT, leastLinger), mostLinger))
	}
	s.release()
	close(s.done)
}

// leastLinger and mostLinger bound how long a closed session stays to repeat that it is; in between it is three round trips
// (RFC 9000 §10.2).
const leastLinger, mostLinger = 20 * time.Millisecond, 250 * time.Millisecond

// release closes transports and slots, in this order.
func (s *Session) release() {
	for _, sl := range s.slots {
		_ = sl.tr.Close() // it closes no conn of its own, and waits for its goroutines
		_ = sl.Close()
	}
	_ = s.raw.Close()
}

// Gateway is who is at the other end.
func (s *Session) Gateway() identity.Node { return s.cfg.Gateway }

// ProbeKeys returns this end's keys for path probes, derived from the handshake (RFC 8446 §7.5). Session uses them by itself.
func (s *Session) ProbeKeys() stun.Keys { return s.keys }

// Notify sends a notice to the gateway. It does not wait for it to arrive.
func (s *Session) Notify(n Notice) error { return s.ctrl.send(n) }

// Done is closed when the session is over.
func (s *Session) Done() <-chan struct{} { return s.done }

// Err is nil while the session lives, then a *SessionError.
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// SessionStats counts a session's traffic.
type SessionStats struct {
	// Sent and Received are bytes of QUIC packets.
	Sent, Received uint64
	// Lost are bytes declared lost.
	Lost uint64
	// FlowSent and FlowReceived are bytes of flows: payload.
	FlowSent, FlowReceived uint64
	// Renewed is how often this end's sender got a new congestion window without a move.
	Renewed uint64
	// RTT is QUIC's smoothed round-trip time on the active path.
	RTT time.Duration
	// Since is when the session began.
	Since time.Time
}

// Stats counts what passed so far.
func (s *Session) Stats() SessionStats {
	q := s.conn.ConnectionStats()
	s.mu.Lock()
	renewed := s.renewed
	s.mu.Unlock()
	return SessionStats{
		Renewed: renewed,
		Sent:    q.BytesSent, Received: q.BytesReceived, Lost: q.BytesLost, RTT: q.SmoothedRTT, Since: s.since,
		FlowSent: s.flows.written.Load(), FlowReceived: s.flows.read.Load(),
	}
}

// Close ends the session, its flows with it, tells the gateway why, and waits for the session's goroutines. The links stay. It may be
// called more than once.
func (s *Session) Close(reason string) error {
	err := s.conn.CloseWithError(quic.ApplicationErrorCode(CloseNormal), reason)
	<-s.done
	return err
}

func (s *Session) receiveNotices(notices *noticeReader) {
	for {
		n, err := notices.next()
		if err != nil {
			if s.ctx.Err() == nil && s.conn.Context().Err() == nil {
				// A gateway ends the control stream only with the session; without it neither moves nor notices work.
				s.cfg.Logger.Warn("control stream failed", "gateway", s.cfg.Gateway, "err", err)
				reason := "control stream failed"
				if errors.Is(err, io.EOF) {
					reason = "control stream ended"
				}
				go func() { _ = s.conn.CloseWithError(quic.ApplicationErrorCode(CloseNormal), reason) }()
			}
			return
		}
		if n.Type == noticeFollowed {
			s.heardOfMove(n)
			continue
		}
		if s.cfg.OnNotice != nil {
			s.cfg.OnNotice(n)
		}
	}
}

// connect opens a request stream, sends a CONNECT request and returns the stream after a 2xx. proto "" is plain CONNECT to escapedPath,
// which is host:port then. A refusal is a *ProxyError.
func (s *Session) connect(ctx context.Context, proto, target string, header http.Header) (*http3.RequestStream, *http.Response, error) {
	var req *http.Request
	if proto == "" {
		req = plainConnect(target)
	} else {
		var err error
		if req, err = connectRequest(proto, s.authority, target); err != nil {
			return nil, nil, err
		}
		select { // extended CONNECT must be on offer (RFC 9220 §3)
		case <-s.h3.ReceivedSettings():
		case <-s.conn.Context().Done():
			return nil, nil, sessionError(context.Cause(s.conn.Context()))
		case <-ctx.Done():
			return nil, nil, dialError(ctx)
		}
		if !s.h3.Settings().EnableExtendedConnect {
			return nil, nil, errors.New("the gateway does not take extended CONNECT")
		}
	}
	for k, v := range header {
		req.Header[k] = v
	}
	return s.request(ctx, req)
}

// request opens a request stream, sends req, which has no body, and returns the stream after a 2xx. The client's RoundTrip is not used:
// it reads the connection's state, which a move changes.
func (s *Session) request(ctx context.Context, req *http.Request) (*http3.RequestStream, *http.Response, error) {
	telemetry.Inject(ctx, req.Header)
	str, err := s.h3.OpenRequestStream(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil, nil, dialError(ctx)
		}
		return nil, nil, streamError(err)
	}
	var rsp *http.Response
	err = s.untilDone(ctx, str, func() (err error) {
		if err = str.SendRequestHeader(req); err != nil {
			return err
		}
		rsp, err = str.ReadResponse()
		return err
	})
	if err == nil && (rsp.StatusCode < 200 || rsp.StatusCode > 299) {
		err = parseProxyError(rsp.StatusCode, rsp.Header)
	}
	if err != nil {
		str.CancelRead(codeCanceled)
		str.CancelWrite(codeCanceled)
		return nil, nil, err
	}
	return str, rsp, nil
}

// untilDone runs f, which uses str, and resets str when ctx ends before it returns.
func (s *Session) untilDone(ctx context.Context, str h3stream, f func() error) error {
	stop := context.AfterFunc(ctx, func() {
		str.CancelRead(codeCanceled)
		str.CancelWrite(codeCanceled)
	})
	err := f()
	if !stop() {
		return dialError(ctx)
	}
	return streamError(err)
}

// dialError says why a dial was given up: a deadline is the destination's silence.
func dialError(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return &ProxyError{Type: ConnectionTimeout, Detail: "no answer in time", Err: context.Cause(ctx)}
	}
	return context.Cause(ctx)
}
