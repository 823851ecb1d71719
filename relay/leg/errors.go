package leg

import (
	"fmt"

	"github.com/pion/stun/v4"
)

// Codes of refusals that a caller may branch on (RFC 8489 §14.8, RFC 8656 §19, and what relay/wire gives them to mean).
const (
	CodeUnauthorized = stun.CodeUnauthorized           // 401: the credential does not count
	CodeForbidden    = stun.CodeForbidden              // 403: revoked, or the pair may not talk
	CodeNotFound     = stun.ErrorCode(404)             // 404: the peer is not on this relay now
	CodeMismatch     = stun.CodeAllocMismatch          // 437: there is no such allocation (any more), or one already
	CodeStaleNonce   = stun.CodeStaleNonce             // 438: dealt with here, never returned unless it repeats
	CodeFamily       = stun.CodeAddrFamilyNotSupported // 440: no relayed address of this family
	CodeWrongUser    = stun.CodeWrongCredentials       // 441: the allocation is another node's
	CodeQuota        = stun.CodeAllocQuotaReached      // 486: as many allocations as allowed
	CodeInsufficient = stun.CodeInsufficientCapacity   // 508: the relay is full or draining
)

// Error is a refusal by the relay. Branch on Code.
type Error struct {
	// Op is what was asked: "allocate", "refresh", "rendezvous", "bind channel".
	Op string
	// Code is the STUN error code.
	Code stun.ErrorCode
}

// Error says what the code means and what to do about it.
func (e *Error) Error() string {
	return fmt.Sprintf("%s: relay answered %d: %s", e.Op, int(e.Code), e.advice())
}

func (e *Error) advice() string {
	switch e.Code {
	case CodeUnauthorized:
		return "the credential does not count: it has expired or the relay's key has changed; check the clocks (NTP) and that this node reaches its platform to renew"
	case CodeForbidden:
		if e.Op == "rendezvous" || e.Op == "bind channel" {
			return "the two nodes may not talk through this relay: nodes of one organization may, one of them a gateway"
		}
		return "this node is revoked or disabled; ask the organization's administrator"
	case CodeNotFound:
		return "the peer has no allocation on this relay now; try its other relays"
	case CodeMismatch:
		return "the relay does not know this allocation (any more); dial again"
	case CodeStaleNonce:
		return "the relay keeps calling its own nonces stale; check the relay's clock"
	case CodeFamily:
		return "the relay has no relayed address of this family"
	case CodeWrongUser:
		return "the allocation belongs to another node"
	case CodeQuota:
		return "quota reached; close other legs of this node or raise the organization's quota"
	case CodeInsufficient:
		return "the relay has no room or is draining; use another relay"
	}
	return "unexpected; see the relay's log"
}
