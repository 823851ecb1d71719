package egress

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
)

// Kind says where the way by a proxy ends.
type Kind string

// The kinds.
const (
	Unreached Kind = "unreached"   // no connection to the proxy
	Auth      Kind = "auth"        // it wants other credentials, or of a kind that is not spoken here
	NotProxy  Kind = "not a proxy" // what answers is none, or breaks off
	Refused   Kind = "refused"     // it does not let us reach this target
	NoWay     Kind = "no way"      // it does not reach this target, or has not said so in time
)

// ofProxy reports whether another target would fare no better.
func (k Kind) ofProxy() bool { return k == Unreached || k == Auth || k == NotProxy }

// Error says why a connection by a proxy failed: one sentence why, one what to do.
type Error struct {
	Kind   Kind
	Proxy  string // URL, without user and password
	Reason string
	Remedy string
	Err    error // cause, may be nil
}

func (e *Error) Error() string { return "egress proxy " + e.Proxy + ": " + e.Reason }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Remedy returns what a user can do about err, or an empty string where it is not about a proxy.
func Remedy(err error) string {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Remedy
	}
	return ""
}

const credentialsRemedy = "put USER:PASSWORD into a file of mode 0600 and name it with --egress-proxy-credentials"

// unreached explains why there is no connection to the proxy.
func (d *Dialer) unreached(err error) error {
	e := &Error{
		Kind: Unreached, Proxy: d.Proxy(), Err: err,
		Remedy: "see that the proxy runs and that this host may reach it; " + d.change(),
	}
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns):
		e.Reason = fmt.Sprintf("its name does not resolve: %s", dns.Err)
	case errors.Is(err, syscall.ECONNREFUSED):
		e.Reason = "refuses the connection: nothing listens there"
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		e.Reason = "there is no route to it"
	case late(err):
		e.Reason = "does not answer"
	default:
		e.Reason = fmt.Sprintf("no connection to it: %v", err)
	}
	return e
}

// change says where the proxy's URL is set.
func (d *Dialer) change() string {
	if d.cfg.Source == "" {
		return "name another one, or none, with --egress-proxy"
	}
	return "it is named by " + d.cfg.Source + "; --egress-proxy none does without"
}

// broken explains what ended an exchange with the proxy before its answer was whole.
func (d *Dialer) broken(target string, err error) error {
	switch {
	case late(err):
		return d.silent(target, err)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return &Error{
			Kind: NotProxy, Proxy: d.Proxy(), Reason: fmt.Sprintf("ended the connection instead of answering about %s", target), Err: err,
			Remedy: "see the proxy's log: it may not allow this host, this target, or its kind may be another one (http, https, socks5)",
		}
	}
	return &Error{
		Kind: NotProxy, Proxy: d.Proxy(), Reason: fmt.Sprintf("what answers is no proxy of this kind: %v", err), Err: err,
		Remedy: "see that host, port and kind (http, https, socks5) are the proxy's; " + d.change(),
	}
}

// silent says that the proxy took the connection and gave no answer in time.
func (d *Dialer) silent(target string, err error) error {
	return &Error{
		Kind: NoWay, Proxy: d.Proxy(), Reason: fmt.Sprintf("has not answered about %s in time", target), Err: err,
		Remedy: "have the proxy's owner see whether it reaches " + target,
	}
}

// late reports whether time was up.
func late(err error) bool {
	var t interface{ Timeout() bool }
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || (errors.As(err, &t) && t.Timeout())
}
