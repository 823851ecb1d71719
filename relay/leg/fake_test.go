package leg

import (
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/pion/stun/v4"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/relay/wire"
)

var (
	relayNode   = identity.Node{Org: identity.SharedOrg, Kind: identity.Relay, ID: "r-1"}
	gatewayNode = identity.Node{Org: "acme", Kind: identity.Gateway, ID: "g-1"}
	clientNode  = identity.Node{Org: "acme", Kind: identity.Client, ID: "c-1"}

	fakeRelayed = netip.MustParseAddrPort("192.0.2.1:50000")
	peerRelayed = netip.MustParseAddrPort("192.0.2.1:50001")
)

// fakeRelay is a carrier with a relay at its other end: rtt later it answers what handle says. It keeps to the clock of a bubble.
type fakeRelay struct {
	t      *testing.T
	leg    *Leg
	rtt    time.Duration
	stream bool

	mu       sync.Mutex
	dead     bool
	nonce    string
	password string
	user     string                                            // the last user name
	override map[stun.Method]func(*stun.Message) *stun.Message // returns the answer, nil for silence; fallthrough when absent
	seen     []stun.Method
	bound    map[uint16]netip.AddrPort
	lifetime time.Duration
	sent     []string
	closed   bool
}

func newFakeRelay(t *testing.T) *fakeRelay {
	return &fakeRelay{
		t: t, rtt: 10 * time.Millisecond, nonce: "n1", password: "secret", lifetime: 10 * time.Minute,
		override: map[stun.Method]func(*stun.Message) *stun.Message{}, bound: map[uint16]netip.AddrPort{},
	}
}

func (f *fakeRelay) write(b []byte) error {
	m := new(stun.Message)
	if _, err := m.Write(b); err != nil {
		f.t.Errorf("leg wrote %x: %v", b, err)
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return net.ErrClosed
	}
	f.seen = append(f.seen, m.Type.Method)
	if f.dead {
		return nil
	}
	a := f.answerLocked(m)
	if a != nil {
		f.afterLocked(a)
	}
	return nil
}

func (f *fakeRelay) afterLocked(a *stun.Message) {
	time.AfterFunc(f.rtt, func() {
		f.mu.Lock()
		quiet := f.dead || f.closed
		f.mu.Unlock()
		if !quiet {
			f.leg.message(a.Raw)
		}
	})
}

// indicate sends an indication to the leg.
func (f *fakeRelay) indicate(method stun.Method, set ...stun.Setter) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.afterLocked(stun.MustBuild(append([]stun.Setter{stun.TransactionID, stun.NewType(method, stun.ClassIndication)}, set...)...))
}

func reply(m *stun.Message, class stun.MessageClass, set ...stun.Setter) *stun.Message {
	return stun.MustBuild(append([]stun.Setter{
		stun.NewTransactionIDSetter(m.TransactionID), stun.NewType(m.Type.Method, class),
	}, set...)...)
}

func refuse(m *stun.Message, code stun.ErrorCode, set ...stun.Setter) *stun.Message {
	return reply(m, stun.ClassErrorResponse, append([]stun.Setter{stun.ErrorCodeAttribute{Code: code}}, set...)...)
}

func xor(t stun.AttrType, a netip.AddrPort) stun.Setter { return xorAs{t, a} }

type xorAs struct {
	t stun.AttrType
	a netip.AddrPort
}

func (x xorAs) AddTo(m *stun.Message) error {
	v := stun.XORMappedAddress{IP: x.a.Addr().AsSlice(), Port: int(x.a.Port())}
	return v.AddToAs(m, x.t)
}

func (f *fakeRelay) answerLocked(m *stun.Message) *stun.Message {
	if m.Type.Method == stun.MethodBinding {
		return reply(m, stun.ClassSuccessResponse, xor(stun.AttrXORMappedAddress, netip.MustParseAddrPort("198.51.100.7:1234")))
	}
	var nonce stun.Nonce
	challenge := []stun.Setter{stun.NewRealm(wire.Realm), stun.NewNonce(f.nonce)}
	if nonce.GetFrom(m) != nil {
		return refuse(m, CodeUnauthorized, challenge...)
	}
	var user stun.Username
	if user.GetFrom(m) != nil || stun.NewLongTermIntegrity(user.String(), wire.Realm, f.password).Check(m) != nil {
		return refuse(m, CodeUnauthorized, challenge...)
	}
	f.user = user.String()
	if nonce.String() != f.nonce {
		return refuse(m, CodeStaleNonce, challenge...)
	}
	if o := f.override[m.Type.Method]; o != nil {
		return o(m)
	}
	switch m.Type.Method {
	case stun.MethodAllocate:
		return reply(m, stun.ClassSuccessResponse, xor(stun.AttrXORRelayedAddress, fakeRelayed),
			xor(stun.AttrXORMappedAddress, netip.MustParseAddrPort("198.51.100.7:1234")), lifetimeAttr(f.lifetime))
	case stun.MethodRefresh:
		d, _ := lifetimeOf(m)
		return reply(m, stun.ClassSuccessResponse, lifetimeAttr(min(d, f.lifetime)))
	case wire.MethodRendezvous:
		var n wire.Node
		if n.GetFrom(m) != nil || identity.Node(n) != gatewayNode {
			return refuse(m, CodeNotFound)
		}
		return reply(m, stun.ClassSuccessResponse, xor(stun.AttrXORPeerAddress, peerRelayed), n)
	case stun.MethodChannelBind:
		v, err := m.Get(stun.AttrChannelNumber)
		addr, aerr := xorAddr(m, stun.AttrXORPeerAddress)
		if err != nil || aerr != nil {
			return refuse(m, stun.CodeBadRequest)
		}
		n := uint16(v[0])<<8 | uint16(v[1])
		for number, a := range f.bound {
			if (number == n) != (a == addr) {
				return refuse(m, stun.CodeBadRequest)
			}
		}
		f.bound[n] = addr
		return reply(m, stun.ClassSuccessResponse)
	}
	return refuse(m, stun.CodeBadRequest)
}

func (f *fakeRelay) send(number uint16, payload []byte, segment int, _ datagram.ECN) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := uint64((len(payload) + segment - 1) / segment)
	if f.closed {
		f.leg.unsent(n, net.ErrClosed)
		return
	}
	f.sent = append(f.sent, string(payload))
	f.leg.sent(n, uint64(len(payload)))
}

func (f *fakeRelay) maxPayload() int { return 1400 }
func (f *fakeRelay) reliable() bool  { return f.stream }
func (f *fakeRelay) addrs() (local, remote netip.AddrPort) {
	return netip.MustParseAddrPort("10.0.0.2:1234"), netip.MustParseAddrPort("192.0.2.1:5349")
}

func (f *fakeRelay) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
}

// die makes the relay silent.
func (f *fakeRelay) die() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dead = true
}

// on replaces the relay's answers to a method.
func (f *fakeRelay) on(method stun.Method, h func(*stun.Message) *stun.Message) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.override[method] = h
}

// requests counts the requests of a method so far.
func (f *fakeRelay) requests(method stun.Method) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, m := range f.seen {
		if m == method {
			n++
		}
	}
	return n
}

func (f *fakeRelay) setRTT(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rtt = d
}

func (f *fakeRelay) lastUser() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.user
}

func (f *fakeRelay) isClosed() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.closed
}

func (f *fakeRelay) boundTo(number uint16) netip.AddrPort {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.bound[number]
}

func (f *fakeRelay) sentData() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.sent...)
}
