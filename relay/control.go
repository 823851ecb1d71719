package relay

import (
	"encoding/binary"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/pion/stun/v4"

	"sallyway/internal/identity"
	"sallyway/relay/budget"
	"sallyway/relay/wire"
)

// Error codes under shorter names than the library's (RFC 8656 §18).
const (
	codeForbidden = stun.CodeForbidden
	codeMismatch  = stun.CodeAllocMismatch
	codeQuota     = stun.CodeAllocQuotaReached
	codeCapacity  = stun.CodeInsufficientCapacity
)

// Attributes that pion/stun has no name for.
const attrAdditionalFamily stun.AttrType = 0x8000 // ADDITIONAL-ADDRESS-FAMILY, RFC 8656 §18.11

// Address families in attributes (RFC 8656 §18.8).
const (
	familyIPv4 = 1
	familyIPv6 = 2
)

const protocolUDP = 17

const stunHeader = 20

// origin is where a control message came from and how to answer it.
type origin struct {
	udp    udpEnd         // who asked over plain UDP
	conn   *conn          // the DTLS, TCP or TLS connection, else nil
	addr   netip.AddrPort // source address
	alloc  *allocation    // the allocation of this 5-tuple, or nil
	proven bool           // the source address is proven, by a handshake or a nonce
	size   int            // bytes of the request
}

func (s *Server) write(o *origin, b []byte) {
	if o.conn != nil {
		if !o.conn.enqueue(b, nil, true) && !o.conn.over() {
			s.count.controlDrops.Add(1)
		}
		return
	}
	if err := o.udp.sock.Write(b, 0, 0, o.udp.peer); err != nil {
		s.count.writeErrors.Add(1)
	}
}

var messages = sync.Pool{New: func() any { return new(stun.Message) }}

// control handles one STUN message. Whatever is malformed is dropped and counted, without an answer (RFC 8489 §6.3).
func (s *Server) control(o *origin, raw []byte) {
	if len(raw) < stunHeader || int(binary.BigEndian.Uint16(raw[2:]))+stunHeader != len(raw) || len(raw)%4 != 0 {
		s.count.malformed.Add(1)
		return
	}
	m := messages.Get().(*stun.Message)
	defer messages.Put(m)
	m.Raw = append(m.Raw[:0], raw...)
	if m.Decode() != nil {
		s.count.malformed.Add(1)
		return
	}
	if m.Contains(stun.AttrFingerprint) && stun.Fingerprint.Check(m) != nil {
		s.count.malformed.Add(1)
		return
	}
	o.size = len(raw)
	switch m.Type.Class {
	case stun.ClassRequest:
		s.request(o, m)
	case stun.ClassIndication:
		if m.Type.Method == stun.MethodSend {
			s.sendIndication(o, m)
		}
	}
}

func (s *Server) request(o *origin, m *stun.Message) {
	switch m.Type.Method {
	case stun.MethodBinding:
		s.count.bindings.Add(1)
		if unknown := unknownAttributes(m); len(unknown) > 0 {
			s.answerUnproven(o, m, stun.ErrorCodeAttribute{Code: stun.CodeUnknownAttribute}, unknown)
			return
		}
		s.answerUnproven(o, m, xorAddr{stun.AttrXORMappedAddress, o.addr})
		return
	case stun.MethodAllocate, stun.MethodRefresh, stun.MethodCreatePermission, stun.MethodChannelBind, wire.MethodRendezvous,
		stun.MethodConnect, stun.MethodConnectionBind:
	default:
		s.count.malformed.Add(1)
		return
	}
	user, key, ok := s.authenticate(o, m)
	if !ok {
		return
	}
	if unknown := unknownAttributes(m); len(unknown) > 0 {
		s.fail(o, m, key, stun.CodeUnknownAttribute, unknown)
		return
	}
	switch m.Type.Method {
	case stun.MethodAllocate:
		s.allocate(o, m, user, key)
		return
	case stun.MethodConnect, stun.MethodConnectionBind: // RFC 6062: never towards a peer
		s.count.forbidden.Add(1)
		s.fail(o, m, key, codeForbidden)
		return
	}
	a := o.alloc
	switch {
	case a == nil || a.dead.Load():
		s.fail(o, m, key, codeMismatch)
		return
	case a.owner != user.Node:
		s.fail(o, m, key, stun.CodeWrongCredentials)
		return
	}
	a.seen.Store(s.now().UnixNano())
	switch m.Type.Method {
	case stun.MethodRefresh:
		s.refresh(o, m, a, user, key)
	case stun.MethodCreatePermission:
		s.createPermission(o, m, a, key)
	case stun.MethodChannelBind:
		s.channelBind(o, m, a, key)
	case wire.MethodRendezvous:
		s.rendezvous(o, m, a, key)
	}
}

// unknownAttributes is the set of comprehension-required attributes of m that this relay does not know, as an attribute of the answer.
func unknownAttributes(m *stun.Message) stun.UnknownAttributes {
	var unknown stun.UnknownAttributes
	for _, a := range m.Attributes {
		if !a.Type.Required() || len(unknown) >= 16 {
			continue
		}
		switch a.Type {
		case stun.AttrMappedAddress, stun.AttrUsername, stun.AttrMessageIntegrity, stun.AttrErrorCode, stun.AttrUnknownAttributes,
			stun.AttrRealm, stun.AttrNonce, stun.AttrXORMappedAddress, stun.AttrChannelNumber, stun.AttrLifetime,
			stun.AttrXORPeerAddress, stun.AttrData, stun.AttrXORRelayedAddress, stun.AttrRequestedAddressFamily, stun.AttrEvenPort,
			stun.AttrRequestedTransport, stun.AttrDontFragment, stun.AttrReservationToken, stun.AttrConnectionID:
		default:
			unknown = append(unknown, a.Type)
		}
	}
	return unknown
}

// build makes an answer to m of the class, with a MESSAGE-INTEGRITY under key where there is one, and a FINGERPRINT where m has one.
// The message goes back to the pool by its caller.
func build(m *stun.Message, class stun.MessageClass, key stun.MessageIntegrity, attrs ...stun.Setter) *stun.Message {
	r := messages.Get().(*stun.Message)
	r.Reset()
	r.Type = stun.NewType(m.Type.Method, class)
	r.WriteHeader()
	err := m.AddTo(r)
	for _, a := range attrs {
		if err == nil {
			err = a.AddTo(r)
		}
	}
	if err == nil && key != nil {
		err = key.AddTo(r)
	}
	if err == nil && m.Contains(stun.AttrFingerprint) {
		err = stun.Fingerprint.AddTo(r)
	}
	if err != nil {
		panic("relay: building an answer: " + err.Error()) // only our own attributes go in
	}
	return r
}

// succeed answers an authenticated request.
func (s *Server) succeed(o *origin, m *stun.Message, key stun.MessageIntegrity, attrs ...stun.Setter) {
	r := build(m, stun.ClassSuccessResponse, key, attrs...)
	s.write(o, r.Raw)
	messages.Put(r)
}

// fail refuses an authenticated request.
func (s *Server) fail(o *origin, m *stun.Message, key stun.MessageIntegrity, code stun.ErrorCode, attrs ...stun.Setter) {
	s.count.refused(code)
	r := build(m, stun.ClassErrorResponse, key, append([]stun.Setter{stun.ErrorCodeAttribute{Code: code}}, attrs...)...)
	s.write(o, r.Raw)
	messages.Put(r)
}

// challenge answers 401 or 438 with a fresh nonce: no reason text and no SOFTWARE, so that little is reflected at a forged source.
func (s *Server) challenge(o *origin, m *stun.Message, code stun.ErrorCode) {
	s.answerUnproven(o, m, stun.ErrorCodeAttribute{Code: code}, stun.NewRealm(wire.Realm), stun.NewNonce(s.nonces.issue(o.addr, s.now())))
}

// answerUnproven answers a request whose source may be forged, where the source's allowance permits. What is an error is told by the
// first attribute.
func (s *Server) answerUnproven(o *origin, m *stun.Message, attrs ...stun.Setter) {
	class := stun.ClassSuccessResponse
	if e, isError := attrs[0].(stun.ErrorCodeAttribute); isError {
		class = stun.ClassErrorResponse
		s.count.refused(e.Code)
	}
	r := build(m, class, nil, attrs...)
	if s.allowUnproven(o, len(r.Raw)) {
		s.write(o, r.Raw)
	}
	messages.Put(r)
}

// allowUnproven charges an answer of n bytes to its source, unless that is proven. A forged source can thus draw a small constant
// number of bytes beyond what was sent in its name.
func (s *Server) allowUnproven(o *origin, n int) bool {
	if o.proven {
		return true
	}
	now, src := s.now().UnixNano(), budget.SourceOf(o.addr.Addr())
	over := max(0, n-o.size)
	if o.alloc != nil { // its address was proven when it allocated
		over = 0
	}
	if s.replies.allow(src, 1, now) && s.excess.allow(src, over, now) {
		return true
	}
	s.count.limited.Add(1)
	return false
}

// xorAddr is an address attribute, XORed (RFC 8489 §14.2).
type xorAddr struct {
	attr stun.AttrType
	addr netip.AddrPort
}

func (x xorAddr) AddTo(m *stun.Message) error {
	a := x.addr.Addr().Unmap()
	return (&stun.XORMappedAddress{IP: net.IP(a.AsSlice()), Port: int(x.addr.Port())}).AddToAs(m, x.attr)
}

// lifetime is the LIFETIME attribute.
type lifetime time.Duration

func (l lifetime) AddTo(m *stun.Message) error {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], uint32(time.Duration(l)/time.Second))
	m.Add(stun.AttrLifetime, b[:])
	return nil
}

// peerAddr decodes an XOR-PEER-ADDRESS value.
func peerAddr(m *stun.Message, v []byte) (netip.AddrPort, bool) {
	if len(v) < 8 || v[0] != 0 {
		return netip.AddrPort{}, false
	}
	port := binary.BigEndian.Uint16(v[2:]) ^ 0x2112
	pad := [16]byte{0x21, 0x12, 0xA4, 0x42}
	copy(pad[4:], m.TransactionID[:])
	switch {
	case v[1] == familyIPv4 && len(v) == 8:
		var a [4]byte
		for i := range a {
			a[i] = v[4+i] ^ pad[i]
		}
		return netip.AddrPortFrom(netip.AddrFrom4(a), port), true
	case v[1] == familyIPv6 && len(v) == 20:
		var a [16]byte
		for i := range a {
			a[i] = v[4+i] ^ pad[i]
		}
		return netip.AddrPortFrom(netip.AddrFrom16(a), port), true
	}
	return netip.AddrPort{}, false
}

// requestedLifetime reads LIFETIME and bounds it by the limits and by what is left of the credential (one with a time for outages is only
// asked for its expiry when the next request comes: what it is granted would else be too short to be refreshed). zero says that the client asked to
// end the allocation.
func (s *Server) requestedLifetime(m *stun.Message, user wire.Username) (d time.Duration, zero, ok bool) {
	d = defaultLifetime
	if v, err := m.Get(stun.AttrLifetime); err == nil {
		if len(v) != 4 {
			return 0, false, false
		}
		sec := binary.BigEndian.Uint32(v)
		if sec == 0 {
			return 0, true, true
		}
		d = min(max(time.Duration(sec)*time.Second, defaultLifetime), maxLifetime)
	}
	return max(min(d, s.cfg.AllocationLifetime, user.End(true).Sub(s.now())), time.Second), false, true
}

// allocate serves Allocate (RFC 8656 §7.2).
func (s *Server) allocate(o *origin, m *stun.Message, user wire.Username, key stun.MessageIntegrity) {
	if a := o.alloc; a != nil && !a.dead.Load() {
		if a.created == m.TransactionID && a.owner == user.Node { // a retransmission
			left := time.Duration(a.expires.Load() - s.now().UnixNano())
			s.succeedAllocate(o, m, key, a, left)
			return
		}
		s.fail(o, m, key, codeMismatch)
		return
	}
	transport, err := m.Get(stun.AttrRequestedTransport)
	switch {
	case err != nil || len(transport) != 4:
		s.fail(o, m, key, stun.CodeBadRequest)
		return
	case transport[0] != protocolUDP:
		s.fail(o, m, key, stun.CodeUnsupportedTransProto)
		return
	case m.Contains(stun.AttrReservationToken):
		s.fail(o, m, key, codeCapacity)
		return
	}
	even := false
	if v, err := m.Get(stun.AttrEvenPort); err == nil {
		// An even port is free; the next higher one is not reserved for anybody (RFC 8656 §18.7).
		const reserve = 0x80
		if len(v) != 1 || v[0]&reserve != 0 {
			s.fail(o, m, key, codeCapacity)
			return
		}
		even = true
	}
	if v, err := m.Get(stun.AttrRequestedAddressFamily); err == nil {
		want := byte(familyIPv4)
		if s.advertise.Is6() {
			want = familyIPv6
		}
		switch {
		case len(v) != 4 || m.Contains(attrAdditionalFamily):
			s.fail(o, m, key, stun.CodeBadRequest)
			return
		case v[0] != want:
			s.fail(o, m, key, stun.CodeAddrFamilyNotSupported)
			return
		}
	}
	d, zero, ok := s.requestedLifetime(m, user)
	if !ok {
		s.fail(o, m, key, stun.CodeBadRequest)
		return
	}
	if zero {
		d = min(defaultLifetime, s.cfg.AllocationLifetime)
	}
	a, code := s.newAllocation(o, m.TransactionID, user, d, even)
	if code != 0 {
		s.fail(o, m, key, code)
		return
	}
	s.succeedAllocate(o, m, key, a, d)
}

func (s *Server) succeedAllocate(o *origin, m *stun.Message, key stun.MessageIntegrity, a *allocation, d time.Duration) {
	s.succeed(o, m, key, xorAddr{stun.AttrXORRelayedAddress, a.relayed}, lifetime(d), xorAddr{stun.AttrXORMappedAddress, o.addr})
}

// newAllocation makes an allocation for user on the 5-tuple of o, or says with which error it is refused.
func (s *Server) newAllocation(o *origin, tx [12]byte, user wire.Username, d time.Duration, even bool) (*allocation, stun.ErrorCode) {
	org := (*s.orgs.Load())[user.Node.Org]
	if org == nil {
		return nil, codeForbidden
	}
	now := s.now().UnixNano()
	a := &allocation{
		owner: user.Node, flags: user.Flags, source: o.addr, created: tx, udp: o.udp, conn: o.conn, org: org,
	}
	switch {
	case o.conn == nil:
		a.plain = true
	case o.conn.kind == overDTLS && user.Flags.Has(wire.FlagPlainData):
		a.plain, a.udp = true, o.conn.udp
	}
	if a.plain { // control's own socket has room for control
		a.data = s.shards[int(a.source.Port())%len(s.shards)].sock
	}
	a.expires.Store(now + int64(d))
	a.seen.Store(now)
	quota := org.quota.Load()
	perNode := s.cfg.Limits.NodeAllocations
	if quota.NodeAllocations > 0 {
		perNode = quota.NodeAllocations
	}
	t := &s.table
	s.displace(a.owner, perNode, now)
	t.mu.Lock()
	defer t.mu.Unlock()
	if s.draining.Load() || len(t.all) >= s.cfg.Limits.Allocations {
		return nil, codeCapacity
	}
	ns := t.nodes[a.owner]
	if (ns != nil && len(ns.allocs) >= perNode) || (quota.Allocations > 0 && t.orgCount[org.name] >= quota.Allocations) ||
		t.sourceCount[budget.SourceOf(o.addr.Addr())] >= s.cfg.Limits.SourceAllocations {
		return nil, codeQuota
	}
	if a.plain {
		if other, taken := t.plain.get(a.source); taken && !other.dead.Load() {
			return nil, codeMismatch
		}
	}
	// A revocation or removal that came in since the check is seen here or sees the allocation in the table.
	if s.isDenied(a.owner) || (*s.orgs.Load())[org.name] != org {
		return nil, codeForbidden
	}
	var sock *relayedSocket
	port, ok := t.takePortLocked(now, func(port uint16) bool {
		if s.cfg.service(port) || (even && port%2 != 0) {
			return false
		}
		if len(*org.peers.Load()) == 0 || a.flags.Has(wire.FlagPlainData) {
			return true // the number alone is enough: data stays inside the relay
		}
		var err error
		sock, err = s.openRelayed(a, port)
		return err == nil
	})
	if !ok {
		return nil, codeCapacity
	}
	a.relayed = netip.AddrPortFrom(s.advertise, port)
	if ns == nil {
		ns = &nodeState{share: t.budgets.Enter(a.owner)}
		t.nodes[a.owner] = ns
	}
	a.node = ns
	t.insertLocked(a)
	if sock != nil {
		a.sock.Store(sock)
		sock.start()
	}
	if o.conn != nil {
		o.conn.alloc.Store(a)
		s.conns.release(o.conn.half)
	}
	o.alloc = a
	s.count.allocated.Add(1)
	s.log.Info("allocation made", "node", a.owner.String(), "allocations", len(t.all))
	return a, 0
}

// displace makes room for a node that has all the allocations it may, where one of them has been silent: a node whose path broke comes back
// from another address again and again, long before what it left behind expires.
func (s *Server) displace(n identity.Node, limit int, now int64) {
	const silent = 30 * time.Second
	s.table.mu.Lock()
	var oldest *allocation
	if ns := s.table.nodes[n]; ns != nil && len(ns.allocs) >= limit {
		for _, a := range ns.allocs {
			if oldest == nil || a.seen.Load() < oldest.seen.Load() {
				oldest = a
			}
		}
	}
	s.table.mu.Unlock()
	if oldest != nil && now-oldest.seen.Load() > int64(silent) {
		s.end(oldest, "displaced by a newer one of the node")
	}
}

// refresh serves Refresh (RFC 8656 §8.2). A renewed user name of the same node refreshes the same allocation.
func (s *Server) refresh(o *origin, m *stun.Message, a *allocation, user wire.Username, key stun.MessageIntegrity) {
	if v, err := m.Get(stun.AttrRequestedAddressFamily); err == nil {
		if len(v) != 4 || (v[0] == familyIPv6) != s.advertise.Is6() {
			s.fail(o, m, key, stun.CodePeerAddrFamilyMismatch)
			return
		}
	}
	d, zero, ok := s.requestedLifetime(m, user)
	switch {
	case !ok:
		s.fail(o, m, key, stun.CodeBadRequest)
	case zero:
		s.end(a, "refresh with lifetime 0")
		o.alloc = nil
		s.succeed(o, m, key, lifetime(0))
	default:
		a.expires.Store(s.now().Add(d).UnixNano())
		s.succeed(o, m, key, lifetime(d))
	}
}

// checkPeer applies the binding rule to the peer in an attribute and returns its address, or the error to answer.
func (s *Server) checkPeer(a *allocation, m *stun.Message, v []byte) (netip.AddrPort, stun.ErrorCode) {
	peer, ok := peerAddr(m, v)
	if !ok {
		return peer, stun.CodeBadRequest
	}
	// The mapped form of an IPv4 address is one, and no other encoding is looked through: the table has no key in such a form.
	peer = netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port())
	if _, ok := s.mayReach(a, peer); ok {
		return peer, 0
	}
	s.count.forbidden.Add(1)
	if peer.Addr().Is4() != a.relayed.Addr().Is4() {
		return peer, stun.CodePeerAddrFamilyMismatch
	}
	return peer, codeForbidden
}

// createPermission serves CreatePermission (RFC 8656 §10.2): all peers of the request or none.
func (s *Server) createPermission(o *origin, m *stun.Message, a *allocation, key stun.MessageIntegrity) {
	const most = 32 // peers in one request
	var ips []netip.Addr
	for _, attr := range m.Attributes {
		if attr.Type != stun.AttrXORPeerAddress {
			continue
		}
		peer, code := s.checkPeer(a, m, attr.Value)
		if code == 0 && len(ips) == most {
			code = stun.CodeBadRequest
		}
		if code == 0 {
			code = s.openFor(a, peer)
		}
		if code != 0 {
			s.fail(o, m, key, code)
			return
		}
		ips = append(ips, peer.Addr())
	}
	switch {
	case len(ips) == 0:
		s.fail(o, m, key, stun.CodeBadRequest)
	case !a.permit(ips, s.cfg.Limits.Permissions, s.now().UnixNano()):
		s.fail(o, m, key, codeCapacity)
	default:
		s.succeed(o, m, key)
	}
}

// channelBind serves ChannelBind (RFC 8656 §12.2). Of several peer addresses the first counts.
func (s *Server) channelBind(o *origin, m *stun.Message, a *allocation, key stun.MessageIntegrity) {
	number, okNumber := channelNumber(m)
	v, err := m.Get(stun.AttrXORPeerAddress)
	if !okNumber || err != nil {
		s.fail(o, m, key, stun.CodeBadRequest)
		return
	}
	peer, code := s.checkPeer(a, m, v)
	if code == 0 {
		code = s.bindAndPermit(a, number, peer)
	}
	if code != 0 {
		s.fail(o, m, key, code)
		return
	}
	s.succeed(o, m, key)
}

// bindAndPermit binds a channel to an allowed peer, which permits the peer, too.
func (s *Server) bindAndPermit(a *allocation, number uint16, peer netip.AddrPort) stun.ErrorCode {
	if code := s.openFor(a, peer); code != 0 {
		return code
	}
	now := s.now().UnixNano()
	switch s.bind(a, number, peer, now) {
	case bindConflict:
		return stun.CodeBadRequest
	case bindFull:
		return codeCapacity
	}
	if !a.permit([]netip.Addr{peer.Addr()}, s.cfg.Limits.Permissions, now) {
		return codeCapacity
	}
	return 0
}

// channelNumber reads CHANNEL-NUMBER and reports whether it is one that may be bound.
func channelNumber(m *stun.Message) (uint16, bool) {
	v, err := m.Get(stun.AttrChannelNumber)
	if err != nil || len(v) != 4 {
		return 0, false
	}
	n := binary.BigEndian.Uint16(v)
	return n, n >= minChannel && n <= maxChannel
}
