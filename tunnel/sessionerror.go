package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/quic-go/quic-go"
)

// ErrNoStandby means that there is no validated standby path to move to.
var ErrNoStandby = errors.New("no standby path")

// CloseCode says why a session ended: the application error code of CONNECTION_CLOSE (RFC 9000 §19.19).
type CloseCode uint64

// The codes. Those of HTTP/3 (RFC 9114 §8.1) keep their meaning.
const (
	CloseNormal   CloseCode = 0x100    // H3_NO_ERROR: its owner closed it
	CloseRevoked  CloseCode = 0x5a1101 // its key was revoked, or its right to be here
	CloseDenied   CloseCode = 0x5a1102 // the gateway does not accept this node
	CloseLimit    CloseCode = 0x5a1103 // too many sessions of this node
	CloseShutdown CloseCode = 0x5a1104 // the gateway stops
	CloseDraining CloseCode = 0x5a1105 // the gateway takes no new sessions
)

// SessionError says why a session ended or did not begin.
type SessionError struct {
	// Code is 0 when the session ended without CONNECTION_CLOSE of an application.
	Code CloseCode
	// Reason is one sentence for people.
	Reason string
	// Remote says that the other end ended it.
	Remote bool
	// Err is QUIC's error.
	Err error
}

// Error says who ended the session and why.
func (e *SessionError) Error() string {
	if e.Remote {
		return "session ended by the other end: " + e.Reason
	}
	return "session ended: " + e.Reason
}

// Unwrap returns the cause.
func (e *SessionError) Unwrap() error { return e.Err }

// Is matches ErrNoSession always, ErrDenied and ErrLimit for sessions that the other end did not want, ErrTimeout for its silence, and
// net.ErrClosed for sessions that were closed on this side.
func (e *SessionError) Is(target error) bool {
	switch target {
	case ErrNoSession:
		return true
	case ErrDenied:
		return e.Code == CloseRevoked || e.Code == CloseDenied
	case ErrLimit:
		return e.Code == CloseLimit
	case ErrTimeout:
		_, idle := errors.AsType[*quic.IdleTimeoutError](e.Err)
		_, handshake := errors.AsType[*quic.HandshakeTimeoutError](e.Err)
		return idle || handshake || errors.Is(e.Err, context.DeadlineExceeded)
	case net.ErrClosed:
		return !e.Remote && e.Code == CloseNormal
	}
	return false
}

// firstCryptoError and lastCryptoError bound the transport errors that carry a TLS alert (RFC 9001 §4.8).
const firstCryptoError, lastCryptoError = 0x100, 0x1ff

// sessionError says in words of this package why a QUIC connection ended.
func sessionError(err error) *SessionError {
	if e, ok := errors.AsType[*SessionError](err); ok {
		return e
	}
	e := &SessionError{Err: err}
	if app, ok := errors.AsType[*quic.ApplicationError](err); ok {
		e.Code, e.Reason, e.Remote = CloseCode(app.ErrorCode), app.ErrorMessage, app.Remote
		if e.Reason == "" {
			e.Reason = "closed"
		}
		return e
	}
	if t, ok := errors.AsType[*quic.TransportError](err); ok {
		e.Remote = t.Remote
		crypto := t.ErrorCode >= firstCryptoError && t.ErrorCode <= lastCryptoError
		switch {
		case crypto && t.Remote:
			e.Reason = fmt.Sprintf("it does not accept this node's certificate (%v): revoked, expired, or of another organization; its log says which", t)
		case crypto:
			e.Reason = fmt.Sprintf("the other end's identity does not hold: %v", err)
		case t.ErrorCode == quic.ConnectionRefused:
			e.Reason = "it refuses connections now"
		default:
			e.Reason = t.Error()
		}
		return e
	}
	if _, ok := errors.AsType[*quic.StatelessResetError](err); ok {
		e.Reason, e.Remote = "the other end has restarted", true
		return e
	}
	if _, ok := errors.AsType[*quic.IdleTimeoutError](err); ok {
		e.Reason = "nothing was heard from the other end on any path for too long"
		return e
	}
	if _, ok := errors.AsType[*quic.HandshakeTimeoutError](err); ok {
		e.Reason = "the other end does not answer"
		return e
	}
	switch {
	case err == nil:
		e.Reason = "closed"
	case errors.Is(err, context.DeadlineExceeded):
		e.Reason = "the other end does not answer in time"
	default:
		e.Reason = err.Error()
	}
	return e
}
