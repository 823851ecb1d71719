package relay

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"net/netip"
	"time"

	"github.com/pion/stun/v4"

	"sallyway/internal/identity"
	"sallyway/relay/budget"
	"sallyway/relay/wire"
)

// nonceLifetime is how long a nonce is good for.
const nonceLifetime = 10 * time.Minute

// nonces makes and checks nonces that need no memory: a time and a MAC over it and the source address, so that a nonce proves that its
// bearer receives at that address. 16 characters, for a small answer:
//
//	base64url( seconds/4, 3 bytes | HMAC-SHA256(secret, seconds/4 | address | port), 9 bytes )
//
// A forger without a password gains nothing but a 401 from guessing the 72 bits.
type nonces struct {
	secret [32]byte
}

const (
	nonceTick = 4 * time.Second
	nonceLen  = 16
)

func (n *nonces) mac(tick uint32, from netip.AddrPort) (raw [12]byte) {
	var in [22]byte
	binary.BigEndian.PutUint32(in[:4], tick&0xFFFFFF)
	ip := from.Addr().Unmap().As16()
	copy(in[4:20], ip[:])
	binary.BigEndian.PutUint16(in[20:], from.Port())
	h := hmac.New(sha256.New, n.secret[:])
	h.Write(in[:])
	var sum [sha256.Size]byte
	copy(raw[:3], in[1:4])
	copy(raw[3:], h.Sum(sum[:0]))
	return raw
}

// issue returns a nonce for from.
func (n *nonces) issue(from netip.AddrPort, now time.Time) string {
	raw := n.mac(uint32(now.Unix()/int64(nonceTick/time.Second)), from)
	return base64.RawURLEncoding.EncodeToString(raw[:])
}

// valid reports whether nonce was issued for from within nonceLifetime.
func (n *nonces) valid(nonce []byte, from netip.AddrPort, now time.Time) bool {
	var raw [12]byte
	if len(nonce) != nonceLen {
		return false
	}
	if _, err := base64.RawURLEncoding.Decode(raw[:], nonce); err != nil {
		return false
	}
	tick := uint32(raw[0])<<16 | uint32(raw[1])<<8 | uint32(raw[2])
	want := n.mac(tick, from)
	if !hmac.Equal(raw[:], want[:]) {
		return false
	}
	age := (uint32(now.Unix()/int64(nonceTick/time.Second)) - tick) & 0xFFFFFF
	return time.Duration(age)*nonceTick < nonceLifetime
}

// verify finds the key under which m is signed by its user name. It takes the same time whether the name or the password is wrong.
func (s *Server) verify(m *stun.Message, username []byte) (wire.Username, stun.MessageIntegrity, bool) {
	user, err := wire.ParseUsername(string(username))
	var found stun.MessageIntegrity
	for _, k := range *s.keys.Load() {
		key := stun.NewLongTermIntegrity(string(username), wire.Realm, wire.Password(k, string(username)))
		if key.Check(m) == nil && found == nil {
			found = key
		}
	}
	return user, found, err == nil && found != nil
}

// authenticate checks a request's credentials and answers it where they do not hold. Nothing is remembered of a source before its nonce
// has proved that it receives at its address.
func (s *Server) authenticate(o *origin, m *stun.Message) (wire.Username, stun.MessageIntegrity, bool) {
	var none wire.Username
	if !m.Contains(stun.AttrMessageIntegrity) {
		s.challenge(o, m, stun.CodeUnauthorized)
		return none, nil, false
	}
	username, e1 := m.Get(stun.AttrUsername)
	nonce, e2 := m.Get(stun.AttrNonce)
	_, e3 := m.Get(stun.AttrRealm)
	const longest = 512 // bytes of USERNAME (RFC 8489 §14.3)
	if e1 != nil || e2 != nil || e3 != nil || len(username) > longest {
		s.answerUnproven(o, m, stun.ErrorCodeAttribute{Code: stun.CodeBadRequest})
		return none, nil, false
	}
	now := s.now()
	if !s.nonces.valid(nonce, o.addr, now) {
		s.challenge(o, m, stun.CodeStaleNonce)
		return none, nil, false
	}
	from := budget.SourceOf(o.addr.Addr())
	if o.alloc == nil && s.failures.active(from[:], now.UnixNano()) && !s.suspects.allow(from, 1, now.UnixNano()) {
		s.count.authThrottled.Add(1)
		return none, nil, false
	}
	user, key, ok := s.verify(m, username)
	if !ok {
		s.count.authFailed.Add(1)
		a := s.failures.failed(from[:], now.UnixNano())
		b := s.failures.failed(identityKey(username), now.UnixNano())
		if !a || !b {
			s.count.authThrottled.Add(1)
			return none, nil, false
		}
		s.challenge(o, m, stun.CodeUnauthorized)
		return none, nil, false
	}
	if !now.Before(s.credentialEnd(user)) {
		s.count.authExpired.Add(1)
		s.challenge(o, m, stun.CodeUnauthorized)
		return none, nil, false
	}
	if s.isDenied(user.Node) || (*s.orgs.Load())[user.Node.Org] == nil || !mayAllocate(user.Node.Kind) {
		s.count.forbidden.Add(1)
		s.fail(o, m, key, codeForbidden)
		return none, nil, false
	}
	o.proven = true
	return user, key, true
}

// credentialEnd is when a credential ends for this relay as things are: at its expiry, and in an outage of the platform later.
func (s *Server) credentialEnd(user wire.Username) time.Time {
	if user.Outage.IsZero() || s.cfg.Outage == nil || s.now().Before(user.Expiry) {
		return user.Expiry
	}
	return user.End(s.cfg.Outage())
}

// identityKey is the part of a user name that stays when its expiry changes.
func identityKey(username []byte) []byte {
	for i, c := range username {
		if c == ':' {
			return username[i:]
		}
	}
	return username
}

// mayAllocate reports whether nodes of kind k use relays as clients do.
func mayAllocate(k identity.Kind) bool {
	switch k {
	case identity.Client, identity.Gateway, identity.Site, identity.Platform:
		return true
	}
	return false
}

func (s *Server) isDenied(n identity.Node) bool {
	_, denied := (*s.denied.Load())[n]
	return denied
}
