package tunnel

import "errors"

// ErrNoStandby means that there is no validated standby path to move to.
var ErrNoStandby = errors.New("no standby path")

// CloseCode says why a session ended: the application error code of CONNECTION_CLOSE (RFC 9000 §19.19).
type CloseCode uint64

// The codes. Those of HTTP/3 (RFC 9114 §8.1) keep their meaning.
const (
	CloseNormal   CloseCode = 0x100 // H3_NO_ERROR: its owner closed it
	CloseRevoked  CloseCode = 0x5a1101
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

func (e *SessionError) Error() string { return "session ended: " + e.Reason }

// Unwrap returns the cause.
func (e *SessionError) Unwrap() error { return e.Err }

// Is matches ErrNoSession, ErrDenied for sessions that the gateway did not want, and ErrTimeout for silence.
func (e *SessionError) Is(target error) bool {
	switch e.Code {
	case CloseRevoked, CloseDenied:
		if target == ErrDenied {
			return true
		}
	case CloseLimit:
		if target == ErrLimit {
			return true
		}
	}
	return target == ErrNoSession
}
