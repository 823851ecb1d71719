package reverse

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync/atomic"
)

// Bounds of what a peer may send before it is authenticated, in bytes.
const (
	maxVersion   = 8 << 10
	maxKexInit   = 32 << 10
	maxUnproven  = 128 << 10
	msgKexInit   = 20 // RFC 4253 §12
	kexCookie    = 16
	strictClient = "kex-strict-c-v00@openssh.com"
	strictServer = "kex-strict-s-v00@openssh.com"
)

// ErrNotStrict says that the peer offers no strict key exchange, without which packets can be cut off in front of the first encrypted ones
// (CVE-2023-48795).
var ErrNotStrict = errors.New("the peer offers no strict key exchange (CVE-2023-48795): its SSH is too old")

var errUnproven = fmt.Errorf("more than %d bytes before authentication", maxUnproven)

// StrictConn is the connection below SSH. It reads the peer's first key exchange message (RFC 4253 §7.1), which is in clear, and ends a
// connection whose peer does not offer strict key exchange; and it bounds what comes before Admit.
type StrictConn struct {
	net.Conn
	marker   string
	seen     []byte // as long as the message is not whole
	checked  bool
	total    int
	admitted atomic.Bool
}

// NewStrictConn wraps c; server says that the peer is the client.
func NewStrictConn(c net.Conn, server bool) *StrictConn {
	s := &StrictConn{Conn: c, marker: strictServer}
	if server {
		s.marker = strictClient
	}
	return s
}

// Admit says that the peer is authenticated: its bytes are not counted any more.
func (s *StrictConn) Admit() { s.admitted.Store(true) }

// Read implements net.Conn; SSH calls it from one goroutine.
func (s *StrictConn) Read(b []byte) (int, error) {
	n, err := s.Conn.Read(b)
	if s.checked && s.admitted.Load() {
		return n, err
	}
	if s.total += n; s.total > maxUnproven && !s.admitted.Load() {
		return 0, errUnproven
	}
	if s.checked {
		return n, err
	}
	s.seen = append(s.seen, b[:n]...)
	whole, cerr := checkStrict(s.seen, s.marker)
	if cerr != nil {
		return 0, cerr
	}
	if whole {
		s.checked, s.seen = true, nil
	}
	return n, err
}

// checkStrict looks for marker in the first key exchange message of a stream that begins with b. whole is false while that has not arrived.
func checkStrict(b []byte, marker string) (whole bool, err error) {
	// Lines before the version are a server's privilege (RFC 4253 §4.2).
	at := 0
	for {
		end := bytes.IndexByte(b[at:], '\n')
		if at+max(end, 0) > maxVersion || (end < 0 && len(b) > maxVersion) {
			return false, errors.New("no SSH version")
		}
		if end < 0 {
			return false, nil
		}
		line := b[at : at+end]
		at += end + 1
		if bytes.HasPrefix(line, []byte("SSH-")) {
			break
		}
	}
	p := b[at:]
	const head = 6 // length, padding length, message number
	if len(p) < head {
		return false, nil
	}
	size := int(binary.BigEndian.Uint32(p))
	if size < head || size > maxKexInit || p[5] != msgKexInit {
		return false, errors.New("the first SSH message is no key exchange")
	}
	if len(p) < 4+size {
		return false, nil
	}
	list := p[head:]
	if len(list) < kexCookie+4 {
		return false, errors.New("malformed key exchange message")
	}
	list = list[kexCookie:]
	n := int(binary.BigEndian.Uint32(list))
	if n > size || len(list)-4 < n {
		return false, errors.New("malformed key exchange message")
	}
	if !slices.Contains(strings.Split(string(list[4:4+n]), ","), marker) {
		return false, ErrNotStrict
	}
	return true, nil
}
