// Package leg is a node's own connection to a relay: a TURN allocation (RFC 8656) and the channels on it, each of which is a
// datagram.Link to one peer.
//
//	UDP   control  STUN in DTLS                          data  ChannelData beside it on the same 5-tuple, or in DTLS
//	TLS   control  STUN in TLS over TCP                  data  ChannelData in it, padded to four bytes (RFC 8656 §12.5)
//
// ChannelData is two bytes of channel number (0x4000–0x4FFF), two bytes of length, payload. What the first byte of a UDP datagram
// says (RFC 7983 §7): 0–3 STUN, 20–63 DTLS, 64–79 ChannelData.
//
//	l, err := leg.Dial(ctx, leg.Config{Addrs: addrs, Relay: node, Verify: verify, Credentials: creds})
//	ch, err := l.Connect(ctx, gateway)      // rendezvous: the gateway's leg gets to know of us through its OnRendezvous
//	ch.SetReceiver(r)
//	ch.Send(payload, 1452, datagram.ECT0)   // never fails, never blocks
//	<-l.Done()                              // lost, and l.Err() says why: dial another
//
// A leg refreshes its allocation and its channels by itself, finds out when the relay is gone, and never comes back: whoever owns it
// dials the next one.
package leg

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pion/stun/v4"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/relay/wire"
)

// Transport is how a leg reaches its relay.
type Transport string

// The transports. UDP is the fast one; TLS passes where only TCP does.
const (
	UDP Transport = "udp"
	TLS Transport = "tls"
)

// Defaults of Config.
const (
	// DefaultLifetime is the allocation's lifetime to ask for (RFC 8656 §7.2).
	DefaultLifetime = 10 * time.Minute
	// DefaultKeepalive is how long control may be silent: shorter than the 30 s after which NATs forget a UDP mapping.
	DefaultKeepalive = 15 * time.Second
	// DefaultMTU is Ethernet's, in bytes of IP packet.
	DefaultMTU = 1500
	// DefaultQueue bounds what waits in a TLS leg to be written, in bytes: 20 ms of 400 Mbit/s. What comes when it is full is dropped.
	DefaultQueue = 1 << 20
	// DefaultAttempt bounds the attempt on one of the relay's addresses when there are more.
	DefaultAttempt = 3 * time.Second
)

// Config says which relay to dial, how, and as whom.
type Config struct {
	// Relay is the identity which the relay's certificate must prove.
	Relay identity.Node
	// Addrs are the relay's addresses, tried in this order.
	Addrs []netip.AddrPort
	// Transport is how to reach it; "" is UDP.
	Transport Transport
	// Verify checks the chain (leaf first) that the relay showed, by identity.Trust. That its leaf names Relay is checked here.
	Verify func(chain []*x509.Certificate) error
	// Credentials returns the TURN user name and password. It is called for every authenticated request, so that a renewed
	// credential takes effect at the next Refresh; it must not block.
	Credentials func() (username, password string)
	// OnRendezvous takes the channel to a peer that asked to be connected with this node, and the address it is seen at by the
	// relay. It is called once per channel, by one goroutine of the leg at a time, before the channel is bound: set a receiver
	// before returning and nothing that the peer sends is missed; what is sent before the binding, one round trip later, is dropped.
	// Nil means that nobody can ask for this node on this leg: no channel answers a peer's request. It must not block and must
	// not call Close.
	OnRendezvous func(peer identity.Node, from netip.AddrPort, ch *Channel)
	// OnDoubt is told when the leg begins to ask whether its relay is still there, and with false when the relay has answered; the other
	// outcome is Done. One goroutine of the leg calls it, and it must not block. Nil is nothing.
	OnDoubt func(doubtful bool)
	// Control is called on every socket before it connects, for SO_MARK and binding; nil is nothing (see net.Dialer.Control).
	Control func(network, address string, c syscall.RawConn) error
	// Dial opens the connection of a TLS leg; nil is a net.Dialer with Control. Where it leads through a proxy, the connection's RemoteAddr is the
	// relay's, not the proxy's, or the unspecified address where the proxy alone knows it.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Lifetime is the allocation's lifetime to ask for; 0 is DefaultLifetime. The relay may grant less.
	Lifetime time.Duration
	// Keepalive is the longest silence on control; 0 is DefaultKeepalive.
	Keepalive time.Duration
	// MTU of the path to the relay in bytes of IP packet; 0 is DefaultMTU. UDP channels derive MaxPayload from it.
	MTU int
	// Queue bounds in bytes what waits to be written on a TLS leg; 0 is DefaultQueue. Where less than that drains in 20 ms the bound is
	// what does.
	Queue int
	// Logger takes the leg's changes of state; nil discards them. No secret is ever logged.
	Logger *slog.Logger
	// Metrics are counted in addition to the leg's own Stats, shared by the legs of a process; nil is none.
	Metrics *Metrics
}

// validate fills the defaults in and says what is wrong.
func (c *Config) validate() error {
	if err := c.Relay.Validate(); err != nil {
		return fmt.Errorf("relay: %w", err)
	}
	switch c.Transport {
	case "":
		c.Transport = UDP
	case UDP, TLS:
	default:
		return fmt.Errorf("unknown transport %q, want %q or %q", c.Transport, UDP, TLS)
	}
	switch {
	case len(c.Addrs) == 0:
		return fmt.Errorf("no address of relay %v", c.Relay)
	case c.Verify == nil:
		return errors.New("no Verify: a relay's certificate must be checked")
	case c.Credentials == nil:
		return errors.New("no Credentials")
	case c.Lifetime < 0 || c.Keepalive < 0 || c.MTU < 0 || c.Queue < 0:
		return errors.New("negative lifetime, keepalive, MTU or queue")
	}
	if c.Lifetime == 0 {
		c.Lifetime = DefaultLifetime
	}
	if c.Keepalive == 0 {
		c.Keepalive = DefaultKeepalive
	}
	if c.MTU == 0 {
		c.MTU = DefaultMTU
	}
	if c.Queue == 0 {
		c.Queue = DefaultQueue
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = new(Metrics)
	}
	return nil
}

// carrier moves STUN messages and ChannelData between a leg and its relay. Its methods may be called concurrently.
type carrier interface {
	// write sends a control message. An error means that the carrier is broken.
	write(message []byte) error
	// send sends ChannelData and never blocks. payload and segment are not empty; payload is not kept. What became of it is told by sent
	// and unsent of upcalls, perhaps later.
	send(number uint16, payload []byte, segment int, ecn datagram.ECN)
	maxPayload() int
	// reliable reports whether the carrier retransmits by itself.
	reliable() bool
	addrs() (local, remote netip.AddrPort)
	// close ends the carrier and its goroutines without waiting for them.
	close()
}

// upcalls are what a carrier tells its leg: from its reading goroutine, except for sent and unsent.
type upcalls interface {
	// message takes an authenticated control message. b is valid during the call.
	message(b []byte)
	// data takes over a batch of a channel.
	data(number uint16, b datagram.Batch)
	// sent and unsent count datagrams that were to be sent: those that were, with the bytes of their payload, and those dropped for err.
	sent(datagrams, bytes uint64)
	unsent(datagrams uint64, err error)
	// malformed counts a datagram that nobody can read.
	malformed()
	// suspect reports a reason, which anybody could have forged, to think that the relay is gone.
	suspect(reason error)
	// broken reports that the carrier can not go on.
	broken(err error)
}

// Leg is an allocation on a relay. Its methods may be called concurrently.
type Leg struct {
	cfg  Config
	log  *slog.Logger
	car  carrier
	wg   sync.WaitGroup
	ctx  context.Context // ends with the leg
	stop context.CancelFunc

	done     chan struct{}
	draining chan struct{}
	drain    sync.Once
	doubtful atomic.Bool
	signs    chan error      // that the relay is gone, to be checked at once; one is enough
	doubts   chan error      // whether it is there, to be checked calmly; one is enough
	asked    chan indication // rendezvous that wait to be answered
	stats    Metrics

	announcing sync.Mutex // held during OnRendezvous

	// table has the live channels by number less minChannel, for the reader.
	table [maxChannel - minChannel + 1]atomic.Pointer[Channel]

	mu            sync.Mutex // guards everything below
	err           error
	realm, nonce  string
	pending       map[[stun.TransactionIDSize]byte]chan *stun.Message
	rtt, rttVar   time.Duration
	relayed       netip.AddrPort
	reflexive     netip.AddrPort
	local, remote netip.AddrPort
	lifetime      time.Duration
	expires       time.Time // of the allocation
	bindings      map[netip.AddrPort]*binding
	peers         map[identity.Node][]*Channel // live channels, oldest first
	next          uint16                       // the channel number to try next
}

var _ upcalls = (*Leg)(nil)

// newLeg makes a leg that is not connected to anything.
func newLeg(cfg Config) *Leg {
	l := &Leg{
		cfg: cfg, log: cfg.Logger.With("relay", cfg.Relay.String(), "transport", string(cfg.Transport)),
		done: make(chan struct{}), draining: make(chan struct{}),
		signs: make(chan error, 1), doubts: make(chan error, 1), asked: make(chan indication, askedQueue),
		pending:  map[[stun.TransactionIDSize]byte]chan *stun.Message{},
		bindings: map[netip.AddrPort]*binding{}, peers: map[identity.Node][]*Channel{},
		next: minChannel,
	}
	l.ctx, l.stop = context.WithCancel(context.Background())
	return l
}

// Dial connects to the relay, checks who it is and allocates. The leg it returns runs until Close or until it is lost. ctx bounds
// dialling only. What the relay refused is an *Error.
func Dial(ctx context.Context, cfg Config) (*Leg, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("dial relay: %w", err)
	}
	var errs []error
	for i, addr := range cfg.Addrs {
		attempt, cancel := ctx, context.CancelFunc(func() {})
		if i < len(cfg.Addrs)-1 {
			attempt, cancel = context.WithTimeout(ctx, DefaultAttempt)
		}
		l, err := dialAddr(attempt, cfg, netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port()))
		cancel()
		if err == nil {
			cfg.Metrics.Dialed.Add(1)
			return l, nil
		}
		at := addr.String()
		if addr.Addr().IsUnspecified() {
			at = "its name" // Dial knows it
		}
		errs = append(errs, fmt.Errorf("dial relay %v at %s over %s: %w", cfg.Relay, at, cfg.Transport, err))
		var refused *Error
		if ctx.Err() != nil || errors.As(err, &refused) {
			break // another address of the same relay would say the same
		}
	}
	cfg.Metrics.DialFailed.Add(1)
	return nil, errors.Join(errs...)
}

func dialAddr(ctx context.Context, cfg Config, addr netip.AddrPort) (*Leg, error) {
	l := newLeg(cfg)
	var car carrier
	var err error
	if cfg.Transport == TLS {
		car, err = dialTLS(ctx, &l.cfg, addr, l, l.wg.Go)
	} else {
		name, _ := cfg.Credentials()
		u, perr := wire.ParseUsername(name)
		car, err = dialUDP(ctx, &l.cfg, addr, perr == nil && u.Flags.Has(wire.FlagPlainData), l, l.wg.Go)
	}
	if err != nil {
		l.stop()
		l.wg.Wait()
		return nil, err
	}
	if err := l.begin(ctx, car); err != nil {
		return nil, err
	}
	return l, nil
}

// begin allocates over car and starts what keeps the leg alive. When it fails everything has stopped.
func (l *Leg) begin(ctx context.Context, car carrier) error {
	l.mu.Lock()
	l.car = car
	l.local, l.remote = car.addrs()
	l.mu.Unlock()
	if err := l.allocate(ctx); err != nil {
		if lost := l.Err(); lost != nil {
			err = lost
		}
		l.fail(err)
		car.close()
		l.wg.Wait()
		return err
	}
	l.wg.Go(l.maintain)
	l.wg.Go(l.keepChannels)
	l.wg.Go(l.watch)
	l.wg.Go(l.listen)
	l.wg.Go(l.answer)
	l.wg.Go(func() {
		<-l.ctx.Done()
		car.close()
	})
	l.log.Debug("leg is up", "local", l.LocalAddr(), "reflexive", l.ReflexiveAddr(), "relayed", l.RelayedAddr(), "rtt", l.Stats().RTT)
	return nil
}

// fail ends the leg; the first reason counts.
func (l *Leg) fail(err error) {
	l.mu.Lock()
	if l.err != nil {
		l.mu.Unlock()
		return
	}
	l.err = err
	var gone []*Channel
	for _, chs := range l.peers {
		gone = append(gone, chs...)
	}
	clear(l.peers)
	l.mu.Unlock()
	for _, ch := range gone {
		ch.end()
	}
	l.stop()
	close(l.done)
}

// lose ends a leg that did not want to end.
func (l *Leg) lose(err error) {
	select {
	case <-l.done:
		return
	default:
	}
	l.fail(err)
	if err := l.Err(); !errors.Is(err, net.ErrClosed) {
		l.cfg.Metrics.Lost.Add(1)
		l.log.Warn("leg is lost", "error", err)
	}
}

// Connect asks the relay to connect this leg with node and binds a channel to it. A live channel to the same relayed address is returned
// as it is. What the relay refused is an *Error: 404 says that node has no allocation on this relay now, 403 that the pair may not talk.
func (l *Leg) Connect(ctx context.Context, node identity.Node) (*Channel, error) {
	if err := node.Validate(); err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	m, err := l.request(ctx, l.patient(), "rendezvous", wire.MethodRendezvous, true, wire.Node(node))
	if err != nil {
		return nil, fmt.Errorf("connect to %v by relay %v: %w", node, l.cfg.Relay, err)
	}
	addr, err := xorAddr(m, stun.AttrXORPeerAddress)
	if err != nil {
		return nil, fmt.Errorf("connect to %v by relay %v: %w", node, l.cfg.Relay, err)
	}
	var named wire.Node
	if err := named.GetFrom(m); err == nil && identity.Node(named) != node {
		return nil, fmt.Errorf("connect to %v by relay %v: the relay offers %v", node, l.cfg.Relay, identity.Node(named))
	}
	ch, err := l.bind(ctx, node, addr, nil)
	if err != nil {
		return nil, fmt.Errorf("connect to %v by relay %v: %w", node, l.cfg.Relay, err)
	}
	return ch, nil
}

// Done is closed when the leg is lost or closed; Err then says why.
func (l *Leg) Done() <-chan struct{} { return l.done }

// Err is nil while the leg lives, net.ErrClosed after Close, else why it was lost.
func (l *Leg) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// Draining is closed when the relay asks its nodes to move: dial elsewhere first, then Close.
func (l *Leg) Draining() <-chan struct{} { return l.draining }

// Suspect has the leg check at once whether its relay still knows it; if not, Done is closed half a second later (on UDP with a long
// round-trip time, or on TLS, within about a second). Path probes that go unanswered are a reason to call it. It is patient because what
// goes unanswered may be stuck in a full queue. Closed ports and Unknown indications, which the leg sees by itself, are decided upon in
// 65 ms, or 40 ms and about two round-trip times. Where a request goes unanswered, or a stream of datagrams ends, it doubts by itself, with
// more patience (see Config.OnDoubt).
func (l *Leg) Suspect() { l.suspect(errSuspected) }

// Doubtful reports whether the leg is asking its relay for a sign of life and has had none yet.
func (l *Leg) Doubtful() bool { return l.doubtful.Load() }

// Close ends the allocation, closes every channel, and waits for the leg's goroutines. It may be called more than once.
func (l *Leg) Close() error {
	if l.Err() == nil {
		ctx, cancel := context.WithTimeout(l.ctx, closeTimeout)
		_, _ = l.refresh(ctx, l.quick(), 0) // if it is lost, the relay finds out when the lifetime ends
		cancel()
	}
	l.fail(net.ErrClosed)
	l.wg.Wait()
	return nil
}

// Abandon ends the leg at once and without a word to the relay, for one that nothing reaches any more. Close it all the same.
func (l *Leg) Abandon(why error) { l.lose(why) }

// Relay is who the leg leads to.
func (l *Leg) Relay() identity.Node { return l.cfg.Relay }

// Transport is how the leg reaches its relay.
func (l *Leg) Transport() Transport { return l.cfg.Transport }

// RemoteAddr is the relay's address that answered; the zero AddrPort where only a proxy knows it.
func (l *Leg) RemoteAddr() netip.AddrPort { return l.addr(&l.remote) }

// LocalAddr is the leg's socket's own address.
func (l *Leg) LocalAddr() netip.AddrPort { return l.addr(&l.local) }

// ReflexiveAddr is where the relay sees this leg come from.
func (l *Leg) ReflexiveAddr() netip.AddrPort { return l.addr(&l.reflexive) }

// RelayedAddr is the allocation's address on the relay.
func (l *Leg) RelayedAddr() netip.AddrPort { return l.addr(&l.relayed) }

func (l *Leg) addr(a *netip.AddrPort) netip.AddrPort {
	l.mu.Lock()
	defer l.mu.Unlock()
	return *a
}

// Stats is a snapshot of what the leg has counted.
func (l *Leg) Stats() Stats {
	st := l.stats.snapshot()
	l.mu.Lock()
	defer l.mu.Unlock()
	st.RTT = l.rtt
	for _, chs := range l.peers {
		st.Channels += len(chs)
	}
	return st
}

// data implements upcalls.
func (l *Leg) data(number uint16, b datagram.Batch) {
	n, bytes := uint64(b.Count()), len(b.Data)
	ch := l.table[number-minChannel].Load()
	if ch != nil {
		if r := ch.receiver.Load(); r != nil {
			bytes -= int(n) * b.Skip
			count(&l.stats.ReceivedDatagrams, &l.cfg.Metrics.ReceivedDatagrams, n)
			count(&l.stats.ReceivedBytes, &l.cfg.Metrics.ReceivedBytes, uint64(bytes))
			ch.heard.Store(true)
			(*r).Receive(b)
			return
		}
	}
	b.Release()
	count(&l.stats.DroppedUnbound, &l.cfg.Metrics.DroppedUnbound, n)
}

// sent implements upcalls.
func (l *Leg) sent(datagrams, bytes uint64) {
	count(&l.stats.SentDatagrams, &l.cfg.Metrics.SentDatagrams, datagrams)
	count(&l.stats.SentBytes, &l.cfg.Metrics.SentBytes, bytes)
}

// unsent implements upcalls.
func (l *Leg) unsent(datagrams uint64, err error) {
	own, shared := &l.stats.DroppedError, &l.cfg.Metrics.DroppedError
	switch {
	case isFull(err):
		own, shared = &l.stats.DroppedFull, &l.cfg.Metrics.DroppedFull
	case isTooLarge(err):
		own, shared = &l.stats.DroppedSize, &l.cfg.Metrics.DroppedSize
	case errors.Is(err, net.ErrClosed):
		own, shared = &l.stats.DroppedClosed, &l.cfg.Metrics.DroppedClosed
	}
	count(own, shared, datagrams)
}

// malformed implements upcalls.
func (l *Leg) malformed() { count(&l.stats.DroppedMalformed, &l.cfg.Metrics.DroppedMalformed, 1) }

// suspect implements upcalls. That the port is closed or the allocation unknown are signs; that there is no route, or that somebody's probes
// go unanswered, are doubts.
func (l *Leg) suspect(reason error) {
	var refused *Error
	to := l.doubts
	if errors.Is(reason, syscall.ECONNREFUSED) || errors.Is(reason, errUnknown) || errors.As(reason, &refused) {
		to = l.signs
	}
	select {
	case to <- reason:
	default: // a check is due already
	}
}

// broken implements upcalls.
func (l *Leg) broken(err error) { l.lose(err) }

// unbind forgets that peer has ch.
func (l *Leg) unbindLocked(ch *Channel) {
	chs := slices.DeleteFunc(l.peers[ch.peer], func(c *Channel) bool { return c == ch })
	if len(chs) == 0 {
		delete(l.peers, ch.peer)
	} else {
		l.peers[ch.peer] = chs
	}
	if b := l.bindings[ch.addr]; b != nil && b.ch == ch {
		b.ch = nil
	}
}
