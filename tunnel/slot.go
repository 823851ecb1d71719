package tunnel

import (
	"net"
	"sync"
	"sync/atomic"

	"github.com/quic-go/quic-go"

	"sallyway/internal/datagram"
)

// slots is how many paths a session has: active, standby, spare. QUIC's client may hold four connection IDs, and a Transport that is
// closed ends every connection that ever used it, so the slots stay while the session lives and are pointed to other links instead.
const slots = 3

// slotLink is what a slot is pointed to. It receives for the slot.
type slotLink struct {
	s    *slot
	link datagram.Link
	info LinkInfo
	mon  *monitor

	// alias marks what is sent, so that the gateway takes it as coming on another path.
	alias bool

	// receives says that the link's receiver is this one.
	receives atomic.Bool
	// gone is closed when the slot points elsewhere.
	gone chan struct{}
}

// Receive implements datagram.Receiver.
func (l *slotLink) Receive(b datagram.Batch) {
	if h := l.s.handshake; h != nil {
		h.receiveResets(b)
	}
	l.s.receive(b, &l.s.src, l)
}

// resetSize is the size of quic-go's stateless resets, in bytes.
const resetSize = 42

// receiveResets takes copies of what may be a stateless reset (RFC 9000 §10.3). Only the Transport of the handshake knows the tokens, so
// that a session which has moved would not notice that its gateway restarted. What is an ordinary packet QUIC drops as a duplicate.
func (s *slot) receiveResets(b datagram.Batch) {
	if b.Stride-b.Skip != resetSize && len(b.Data) > b.Stride {
		return // a reset comes alone
	}
	for payload, ok := b.Next(); ok; payload, ok = b.Next() { // b is a copy
		if len(payload) == resetSize && payload[0]&0xc0 == firstQUIC {
			buf := datagram.NewBuffer()
			n := copy(buf.B[:], payload)
			s.receive(datagram.NewBatch(buf.B[:n], n, 0, b.ECN, buf), &s.src, noProbes{})
		}
	}
}

// noProbes drops what is no QUIC.
type noProbes struct{}

func (noProbes) handleProbe([]byte) {}

func (l *slotLink) handleProbe(payload []byte) { l.mon.handle(payload) }

// release stops receiving.
func (l *slotLink) release() {
	if l.receives.CompareAndSwap(true, false) {
		l.link.SetReceiver(nil)
	}
}

// slot is a client's packet conn: whatever is written leaves on the link it is pointed to, and what arrives there is read as coming from
// the gateway's one virtual address.
type slot struct {
	vconn
	src source
	tr  *quic.Transport
	to  atomic.Pointer[slotLink]

	// handshake is the slot that the session was dialled on, nil if it is this one.
	handshake *slot

	pointing sync.Mutex // serialises point

	// path and validated belong to the session, under its lock.
	path      *quic.Path // nil until the slot was first probed; the handshake's slot has none at first
	validated bool
}

var _ quic.OOBCapablePacketConn = (*slot)(nil)

// gatewayAddr is the gateway's virtual address at the client.
var gatewayAddr = virtualAddr(1)

func newSlot(n int, raw *rawSocket) *slot {
	s := &slot{}
	s.src.addr.Store(gatewayAddr)
	s.init(virtualAddr(uint64(0x100+n)), raw, 0)
	s.tr = &quic.Transport{Conn: s, ConnectionIDLength: connectionIDLength}
	return s
}

// point makes the slot send on l and, if receive says so, receive from it. What it was pointed to before receives no more.
func (s *slot) point(l *slotLink, receive bool) {
	s.pointing.Lock()
	defer s.pointing.Unlock()
	old := s.to.Swap(l)
	if old != nil {
		old.release()
		close(old.gone)
	}
	if receive {
		l.receives.Store(true)
		l.link.SetReceiver(l)
	}
}

// WriteMsgUDP sends b, cut into segments if oob says so, on the slot's link, whatever addr says. It never fails.
func (s *slot) WriteMsgUDP(b, oob []byte, _ *net.UDPAddr) (n, oobn int, err error) {
	segment, ecn := parseControl(oob)
	l := s.to.Load()
	if l == nil {
		s.stats.droppedUnknown.Add(count(len(b), segment))
		return len(b), len(oob), nil
	}
	if l.alias {
		// Only the validation of the slot goes this way: single packets.
		l.link.Send(append([]byte{aliasMark}, b...), 0, datagram.NotECT)
		return len(b), len(oob), nil
	}
	l.link.Send(b, segment, ecn)
	s.stats.sent.Add(count(len(b), segment))
	s.wrote(&s.src)
	return len(b), len(oob), nil
}

// WriteTo sends one datagram.
func (s *slot) WriteTo(b []byte, _ net.Addr) (int, error) {
	n, _, err := s.WriteMsgUDP(b, nil, nil)
	return n, err
}

// ConnStats counts what passed between the session's links and QUIC. Links stays 0: see Path.
func (s *Session) ConnStats() ConnStats {
	var sum ConnStats
	for _, sl := range s.slots {
		st := sl.stats.snapshot()
		sum.Received += st.Received
		sum.Sent += st.Sent
		sum.DroppedFull += st.DroppedFull
		sum.DroppedUnknown += st.DroppedUnknown
		sum.DroppedSize += st.DroppedSize
		sum.DroppedLate += st.DroppedLate
		sum.Marked += st.Marked
		sum.Paused += st.Paused
		sum.Stalled += st.Stalled
		sum.Probes += st.Probes
	}
	return sum
}

// Close ends the slot and lets go of its link. It may be called more than once.
func (s *slot) Close() error {
	s.pointing.Lock()
	if old := s.to.Swap(nil); old != nil {
		old.release()
		close(old.gone)
	}
	s.pointing.Unlock()
	s.shut()
	return nil
}
