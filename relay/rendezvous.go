package relay

import (
	"context"
	"net/netip"
	"time"

	"github.com/pion/stun/v4"

	"sallyway/internal/identity"
	"sallyway/relay/wire"
)

// Indications are not acknowledged: over UDP and DTLS each is sent again, since a duplicate does no harm.
const (
	indicationRepeats  = 2
	indicationInterval = 100 * time.Millisecond
)

// rendezvousRate and rendezvousBurst bound one node's rendezvous requests, per second and at once: a site that connects to every gateway
// after a restart needs the burst.
const (
	rendezvousRate  = 5
	rendezvousBurst = 200
)

// repeat is an indication to be sent again.
type repeat struct {
	at   time.Time
	left int
	to   *allocation
	raw  []byte
}

// rendezvous serves "connect me to NODE": it tells the requester NODE's relayed address and NODE who asked, and permits both.
func (s *Server) rendezvous(o *origin, m *stun.Message, a *allocation, key stun.MessageIntegrity) {
	var want wire.Node
	if want.GetFrom(m) != nil {
		s.fail(o, m, key, stun.CodeBadRequest)
		return
	}
	target := identity.Node(want)
	now := s.now().UnixNano()
	if !a.node.takeRendezvous(now) {
		s.fail(o, m, key, codeQuota)
		return
	}
	if !wire.MayConnect(a.owner, target) {
		s.count.forbidden.Add(1)
		s.fail(o, m, key, codeForbidden)
		return
	}
	b := s.table.newest(target)
	if b == nil {
		s.fail(o, m, key, codeNotFound)
		return
	}
	limit := s.cfg.Limits.Permissions
	if !a.permit([]netip.Addr{b.relayed.Addr()}, limit, now) || !b.permit([]netip.Addr{a.relayed.Addr()}, limit, now) {
		s.fail(o, m, key, codeQuota)
		return
	}
	if m.Contains(stun.AttrChannelNumber) { // bind at once
		number, ok := channelNumber(m)
		code := stun.CodeBadRequest
		if ok {
			code = s.bindAndPermit(a, number, b.relayed)
		}
		if code != 0 {
			s.fail(o, m, key, code)
			return
		}
	}
	s.count.rendezvous.Add(1)
	s.succeed(o, m, key, xorAddr{stun.AttrXORPeerAddress, b.relayed}, want)
	s.indicate(b, wire.MethodRendezvous, wire.Node(a.owner), xorAddr{stun.AttrXORPeerAddress, a.relayed}, xorAddr{stun.AttrXORMappedAddress, a.source})
}

// codeNotFound is the rendezvous answer for a node that has no allocation here.
const codeNotFound stun.ErrorCode = 404

// takeRendezvous takes one request of the node's allowance, which outlives its allocations.
func (n *nodeState) takeRendezvous(now int64) bool {
	const each = int64(time.Second) / rendezvousRate
	for {
		old := n.asked.Load()
		next := max(old, now) + each
		if next-now > rendezvousBurst*each {
			return false
		}
		if n.asked.CompareAndSwap(old, next) {
			return true
		}
	}
}

// indicate sends an indication to a's node on its control connection, and again after a while.
func (s *Server) indicate(a *allocation, method stun.Method, attrs ...stun.Setter) {
	m := stun.New()
	m.Type = stun.NewType(method, stun.ClassIndication)
	m.WriteHeader()
	_ = m.NewTransactionID() // a nil error from crypto/rand
	for _, at := range attrs {
		if err := at.AddTo(m); err != nil {
			panic("relay: building an indication: " + err.Error()) // only our own attributes go in
		}
	}
	s.deliver(a, m.Raw)
	if a.conn != nil && a.conn.kind != overDTLS {
		return
	}
	select {
	case s.repeats <- repeat{at: time.Now().Add(indicationInterval), left: indicationRepeats, to: a, raw: m.Raw}:
	default: // the first one was sent, and a request that went unanswered is repeated by its sender
		s.count.repeatDrops.Add(1)
	}
}

// deliver writes a control message to a's node.
func (s *Server) deliver(a *allocation, raw []byte) {
	s.write(&origin{udp: a.udp, conn: a.conn}, raw)
}

// repeatLoop sends indications again. All wait equally long, so the queue is in order of time.
func (s *Server) repeatLoop() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-s.closed:
			return
		case r := <-s.repeats:
			timer.Reset(time.Until(r.at))
			select {
			case <-s.closed:
				return
			case <-timer.C:
			}
			s.deliver(r.to, r.raw)
			if r.left--; r.left > 0 {
				r.at = r.at.Add(indicationInterval)
				select {
				case s.repeats <- r:
				default:
					s.count.repeatDrops.Add(1)
				}
			}
		}
	}
}

// refuse ends an allocation and tells its node why.
func (s *Server) refuse(a *allocation, code stun.ErrorCode, reason string) {
	if !s.end(a, reason) {
		return
	}
	s.indicate(a, wire.MethodRefused, stun.ErrorCodeAttribute{Code: code})
	if a.conn != nil {
		a.conn.closeAfterFlush()
	}
}

// unknown tells a source that the relay does not know what it sent: it has restarted, or the allocation is gone. The answer is never larger
// than what came.
func (s *Server) unknown(o *origin) {
	if o.size < stunHeader || o.conn != nil {
		return
	}
	if !s.allowUnproven(o, stunHeader) {
		return
	}
	s.count.unknown.Add(1)
	m := messages.Get().(*stun.Message)
	m.Reset()
	m.Type = stun.NewType(wire.MethodUnknown, stun.ClassIndication)
	m.WriteHeader()          // makes room, which a fresh message has not
	_ = m.NewTransactionID() // a nil error from crypto/rand
	s.write(o, m.Raw)
	messages.Put(m)
}

// Drain refuses new allocations, tells every node to move within d, and returns how many allocations are left: when none is, or after d,
// or when ctx ends.
func (s *Server) Drain(ctx context.Context, d time.Duration) (left int) {
	s.drainBy.Store(s.now().Add(d).UnixNano())
	s.draining.Store(true)
	all := s.table.snapshot()
	s.log.Info("relay drains", "allocations", len(all), "within", d)
	for _, a := range all {
		s.indicate(a, wire.MethodDrain, lifetime(d))
	}
	deadline := time.NewTimer(d)
	defer deadline.Stop()
	const interval = 50 * time.Millisecond
	poll := time.NewTicker(interval)
	defer poll.Stop()
	for {
		if left = s.inUse(); left == 0 {
			break
		}
		select {
		case <-poll.C:
			continue
		case <-deadline.C:
		case <-ctx.Done():
		}
		break
	}
	s.log.Info("relay drained", "allocations", left)
	return left
}

// inUse counts the allocations that a drain waits for. Nodes of ours speak at least every 15 s, so one that has been silent for twice that
// has moved already, or its path broke and it came back on another allocation.
func (s *Server) inUse() (n int) {
	const silent = int64(30 * time.Second)
	now := s.now().UnixNano()
	for _, a := range s.table.snapshot() {
		if !a.flags.Has(wire.FlagPlainData) || now-a.seen.Load() <= silent {
			n++
		}
	}
	return n
}

// Allocations returns how many allocations live.
func (s *Server) Allocations() int {
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	return len(s.table.all)
}
