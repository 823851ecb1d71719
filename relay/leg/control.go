package leg

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/pion/stun/v4"

	"sallyway/internal/identity"
	"sallyway/relay/wire"
)

// Timing of requests.
const (
	// firstRTO is the wait before the first retransmission while no round-trip time is known, and the longest there is later
	// (RFC 8489 §6.2.1). Afterwards it is three round-trip times, at least leastRTO.
	firstRTO = 500 * time.Millisecond
	leastRTO = 50 * time.Millisecond
	// patience is how long an ordinary request may go unanswered before the relay counts as gone; streamPatience is that on TLS, where
	// it waits behind what TCP has taken already.
	patience       = 5 * time.Second
	streamPatience = 10 * time.Second
	// quickInterval and quickAttempts are the checks of a relay that is said to be gone; after the last, quickGrace or what the
	// round-trip time and its deviation suggest passes before they count as unanswered.
	quickInterval = 20 * time.Millisecond
	quickAttempts = 3
	quickGrace    = 25 * time.Millisecond
	// calmTotal bounds the checks where there is no such sign: what goes unanswered may just be late in a full queue. The path
	// machine does not wait for it.
	calmTotal = 500 * time.Millisecond
	// quickStream bounds both kinds of check on TLS, where TCP may have to retransmit first.
	quickStream = time.Second
	// gentleTotal and gentleStream bound the checks where nobody missed an answer of a path yet: nothing hurries, since whoever owns the leg has
	// been told and dials another one beside it.
	gentleTotal  = 1500 * time.Millisecond
	gentleStream = 3 * time.Second
	// leastSlow and slowStream are after how long without an answer an ordinary request makes the leg doubt, on UDP and TLS, where the round-trip
	// time and its deviation do not say more.
	leastSlow  = 200 * time.Millisecond
	slowStream = 700 * time.Millisecond
	// closeTimeout bounds how long Close waits for the relay to confirm.
	closeTimeout = 300 * time.Millisecond
	// authAttempts is how often a request is made anew for the nonce it was answered with.
	authAttempts = 3
)

// errNoAnswer says that a request went unanswered.
var errNoAnswer = errors.New("the relay does not answer")

// Signs that a relay may be gone.
var (
	errUnknown   = errors.New("the relay says that it does not know this leg")
	errSuspected = errors.New("its paths do not work")
	errSlow      = errors.New("an answer is late")
	errSilent    = errors.New("what came steadily has ended")
)

// schedule is how a request is repeated: after first, then after twice as long each time up to most, for at most attempts, until total
// has passed. After slow without an answer the leg doubts; 0 is never.
type schedule struct {
	first, most, total time.Duration
	slow               time.Duration
	attempts           int
}

// patient is the schedule of ordinary requests.
func (l *Leg) patient() schedule {
	l.mu.Lock()
	defer l.mu.Unlock()
	rto, slow := firstRTO, time.Duration(0)
	if l.rtt > 0 {
		rto, slow = min(max(3*l.rtt, leastRTO), firstRTO), 2*l.rtt+4*l.rttVar
	}
	if l.car.reliable() {
		s := schedule{first: streamPatience, most: streamPatience, total: streamPatience, attempts: 1}
		if slow > 0 {
			s.slow = max(slow, slowStream)
		}
		return s
	}
	s := schedule{first: rto, most: 2 * firstRTO, total: patience, attempts: 1 << 10}
	if slow > 0 {
		s.slow = max(slow, leastSlow)
	}
	return s
}

// quick is the schedule of checks after a sign that the relay is gone.
func (l *Leg) quick() schedule {
	if l.car.reliable() {
		return schedule{first: quickStream, most: quickStream, total: quickStream, attempts: 1}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	grace := max(quickGrace, l.rtt+4*l.rttVar)
	return schedule{
		first: quickInterval, most: quickInterval, attempts: quickAttempts,
		total: (quickAttempts-1)*quickInterval + grace,
	}
}

// calm is the schedule of checks without a sign.
func (l *Leg) calm() schedule {
	if l.car.reliable() {
		return l.quick()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return schedule{first: quickInterval, most: calmTotal / 4, attempts: 1 << 10, total: max(calmTotal, 3*(l.rtt+4*l.rttVar))}
}

// gentle is the schedule of checks that the leg makes by itself without a sign.
func (l *Leg) gentle() schedule {
	if l.car.reliable() {
		return schedule{first: gentleStream, most: gentleStream, total: gentleStream, attempts: 1}
	}
	s := l.calm()
	s.total = max(s.total, gentleTotal)
	return s
}

// request makes a request and returns the success response. What the relay refuses is an *Error. auth says that it carries the
// credential; a 401 or 438 is answered with the nonce that comes with it (RFC 8489 §9.2.5). Responses need no integrity of their own
// because they come inside DTLS or TLS, whose other end has been verified.
func (l *Leg) request(ctx context.Context, s schedule, op string, method stun.Method, auth bool, set ...stun.Setter) (*stun.Message, error) {
	for try := 1; ; try++ {
		l.mu.Lock()
		realm, nonce := l.realm, l.nonce
		l.mu.Unlock()
		setters := append([]stun.Setter{stun.TransactionID, stun.NewType(method, stun.ClassRequest)}, set...)
		if auth && nonce != "" {
			name, password := l.cfg.Credentials()
			setters = append(setters, stun.NewUsername(name), stun.NewRealm(realm), stun.NewNonce(nonce),
				stun.NewLongTermIntegrity(name, realm, password))
		}
		m, err := stun.Build(setters...)
		if err != nil {
			return nil, fmt.Errorf("%s: build the request: %w", op, err)
		}
		answer, err := l.roundTrip(ctx, s, m)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", op, err)
		}
		if answer.Type.Method != method {
			return nil, fmt.Errorf("%s: the relay answered with %v", op, answer.Type)
		}
		if answer.Type.Class == stun.ClassSuccessResponse {
			return answer, nil
		}
		var code stun.ErrorCodeAttribute
		if err := code.GetFrom(answer); err != nil {
			return nil, fmt.Errorf("%s: the relay answered with an error without code", op)
		}
		refused := &Error{Op: op, Code: code.Code}
		if code.Code == CodeMismatch && method != stun.MethodAllocate && method != stun.MethodRefresh {
			l.suspect(refused) // the allocation is gone, it says
		}
		if !auth || try == authAttempts || code.Code != CodeUnauthorized && code.Code != CodeStaleNonce {
			return nil, refused
		}
		var newRealm stun.Realm
		var newNonce stun.Nonce
		if newNonce.GetFrom(answer) != nil || len(newNonce) == 0 {
			return nil, refused
		}
		if newRealm.GetFrom(answer) != nil || len(newRealm) == 0 {
			newRealm = stun.Realm(realm)
		}
		if code.Code == CodeUnauthorized && nonce != "" && newNonce.String() == nonce {
			return nil, refused // the credential itself is refused
		}
		l.mu.Lock()
		l.realm, l.nonce = newRealm.String(), newNonce.String()
		l.mu.Unlock()
	}
}

// roundTrip sends m until it is answered.
func (l *Leg) roundTrip(ctx context.Context, s schedule, m *stun.Message) (*stun.Message, error) {
	answer := make(chan *stun.Message, 1)
	l.mu.Lock()
	if l.err != nil {
		defer l.mu.Unlock()
		return nil, l.err
	}
	l.pending[m.TransactionID] = answer
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		delete(l.pending, m.TransactionID)
		l.mu.Unlock()
	}()
	start := time.Now()
	if s.slow > 0 {
		defer time.AfterFunc(s.slow, func() { l.suspect(errSlow) }).Stop()
	}
	wait := s.first
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for attempt := 1; ; attempt++ {
		if attempt <= s.attempts {
			if err := l.car.write(m.Raw); err != nil {
				return nil, err
			}
		}
		// The last wait, and the one that would end beyond the total, ends with the total.
		left := s.total - time.Since(start)
		if attempt >= s.attempts || wait > left {
			wait = left
		}
		timer.Reset(wait)
		select {
		case a := <-answer:
			if attempt == 1 { // Karn: which attempt was answered?
				l.sample(time.Since(start))
			}
			return a, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-l.ctx.Done():
			if err := l.Err(); err != nil {
				return nil, err
			}
			return nil, net.ErrClosed
		case <-timer.C:
		}
		if time.Since(start) >= s.total {
			return nil, errNoAnswer
		}
		wait = min(2*wait, s.most)
	}
}

// sample smooths the round-trip time (RFC 6298 §2).
func (l *Leg) sample(rtt time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rtt == 0 {
		l.rtt, l.rttVar = rtt, rtt/2
		return
	}
	l.rttVar += ((l.rtt - rtt).Abs() - l.rttVar) / 4
	l.rtt += (rtt - l.rtt) / 8
}

// message implements upcalls: answers go to who waits for them, indications are acted upon.
func (l *Leg) message(b []byte) {
	m := new(stun.Message)
	if !stun.IsMessage(b) {
		l.malformed()
		return
	}
	if _, err := m.Write(b); err != nil { // copies b
		l.malformed()
		return
	}
	switch m.Type.Class {
	case stun.ClassSuccessResponse, stun.ClassErrorResponse:
		l.mu.Lock()
		waiting := l.pending[m.TransactionID]
		l.mu.Unlock()
		select {
		case waiting <- m:
		default: // nobody waits, or a repeated answer
		}
	case stun.ClassIndication:
		l.indicated(m)
	}
}

// indicated acts on an indication of the relay's.
func (l *Leg) indicated(m *stun.Message) {
	switch m.Type.Method {
	case wire.MethodRendezvous:
		in, err := readIndication(m)
		if err != nil {
			l.log.Warn("ignored a malformed rendezvous", "error", err)
			return
		}
		select {
		case l.asked <- in:
		default: // the peer asks again
		}
	case wire.MethodUnknown:
		l.suspect(errUnknown)
	case wire.MethodDrain:
		l.drain.Do(func() {
			l.cfg.Metrics.Draining.Add(1)
			seconds, _ := lifetimeOf(m)
			l.log.Info("relay is draining", "within", seconds)
			close(l.draining)
		})
	case wire.MethodRefused:
		var code stun.ErrorCodeAttribute
		if err := code.GetFrom(m); err != nil {
			code.Code = CodeForbidden
		}
		l.lose(&Error{Op: "allocation", Code: code.Code})
	}
}

// indication is a peer's wish to be connected.
type indication struct {
	peer identity.Node
	addr netip.AddrPort // its relayed address
	from netip.AddrPort // where the relay sees it; may be invalid
}

func readIndication(m *stun.Message) (in indication, err error) {
	var n wire.Node
	if err := n.GetFrom(m); err != nil {
		return in, err
	}
	in.peer = identity.Node(n)
	if in.addr, err = xorAddr(m, stun.AttrXORPeerAddress); err != nil {
		return in, err
	}
	in.from, _ = xorAddr(m, stun.AttrXORMappedAddress)
	return in, nil
}

// xorAddr reads an address attribute, IPv4 unmapped.
func xorAddr(m *stun.Message, t stun.AttrType) (netip.AddrPort, error) {
	var x stun.XORMappedAddress
	if err := x.GetFromAs(m, t); err != nil {
		return netip.AddrPort{}, fmt.Errorf("message of the relay without %v: %w", t, err)
	}
	a, ok := netip.AddrFromSlice(x.IP)
	if !ok || x.Port <= 0 || x.Port > 0xFFFF {
		return netip.AddrPort{}, fmt.Errorf("message of the relay with a malformed %v", t)
	}
	return netip.AddrPortFrom(a.Unmap(), uint16(x.Port)), nil
}

// xorPeer is XOR-PEER-ADDRESS (RFC 8656 §18.3).
type xorPeer netip.AddrPort

// AddTo implements stun.Setter.
func (a xorPeer) AddTo(m *stun.Message) error {
	ap := netip.AddrPort(a)
	x := stun.XORMappedAddress{IP: ap.Addr().AsSlice(), Port: int(ap.Port())}
	return x.AddToAs(m, stun.AttrXORPeerAddress)
}

// lifetimeAttr is LIFETIME (RFC 8656 §18.2).
func lifetimeAttr(d time.Duration) stun.Setter {
	return stun.RawAttribute{Type: stun.AttrLifetime, Value: binary.BigEndian.AppendUint32(nil, uint32(d/time.Second))}
}

func lifetimeOf(m *stun.Message) (time.Duration, bool) {
	v, err := m.Get(stun.AttrLifetime)
	if err != nil || len(v) != 4 {
		return 0, false
	}
	return time.Duration(binary.BigEndian.Uint32(v)) * time.Second, true
}

// channelAttr is CHANNEL-NUMBER (RFC 8656 §18.1).
func channelAttr(number uint16) stun.Setter {
	return stun.RawAttribute{Type: stun.AttrChannelNumber, Value: []byte{byte(number >> 8), byte(number), 0, 0}}
}

// transportUDP is REQUESTED-TRANSPORT for UDP (RFC 8656 §18.6).
var transportUDP = stun.RawAttribute{Type: stun.AttrRequestedTransport, Value: []byte{17, 0, 0, 0}}

// familyIPv6 is REQUESTED-ADDRESS-FAMILY for IPv6 (RFC 8656 §18.8).
var familyIPv6 = stun.RawAttribute{Type: stun.AttrRequestedAddressFamily, Value: []byte{2, 0, 0, 0}}
