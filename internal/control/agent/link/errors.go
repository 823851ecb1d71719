package link

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/egress"
	"sallyway/internal/identity"
)

// Kind says at which step the way to a platform failed.
type Kind string

// The steps.
const (
	DNS         Kind = "dns"
	Connect     Kind = "connect"
	TLS         Kind = "tls"
	Pin         Kind = "pin" // another CA than the pinned one
	Clock       Kind = "clock"
	Timeout     Kind = "timeout"
	Broken      Kind = "broken"       // the connection ended within an answer
	NotPlatform Kind = "not platform" // something else answered
	Proxy       Kind = "proxy"        // the egress proxy does not lead there
)

const checkURL = "check that the URL is the platform's"

var errTimeout = errors.New("the platform did not answer in time")

// Error is a failure to reach the platform: one sentence why, one what to do.
type Error struct {
	Kind   Kind
	Reason string
	Remedy string
	Err    error // cause, may be nil
}

func (e *Error) Error() string { return e.Reason }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Problem is a refusal by the platform.
type Problem struct {
	control.Problem
	Clock error // set when the clocks differ so much that it may be the cause
}

func (p *Problem) Error() string {
	s := p.Detail
	if s == "" {
		s = fmt.Sprintf("the platform answered %d %s", p.Status, strings.ToLower(p.Title))
	}
	for _, part := range p.Errors {
		switch {
		case strings.Contains(s, part.Message): // said already
		case part.Location != "":
			s += "; " + part.Location + ": " + part.Message
		default:
			s += "; " + part.Message
		}
	}
	if p.Clock != nil && !strings.Contains(s, "clock") { // the platform may have named both clocks itself
		s += "; " + p.Clock.Error()
	}
	return s
}

// Temporary reports whether the same request may succeed later without anybody doing anything.
func (p *Problem) Temporary() bool { return p.Status >= 500 || p.Status == 429 || p.Status == 408 }

// PinError says that the platform's chain does not hold the pinned CA key.
type PinError struct{ Want, Got identity.KeyHash }

func (e *PinError) Error() string {
	return fmt.Sprintf("the platform's certificate is not issued by the pinned CA (pin %s…, certificate by %s…)", e.Want.String()[:16], e.Got.String()[:16])
}

// Remedy returns what a user can do about err, or an empty string where nothing is known.
func Remedy(err error) string {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Remedy
	}
	if p, ok := errors.AsType[*Problem](err); ok {
		if c, ok := errors.AsType[*Error](p.Clock); ok && p.Remedy == "" {
			return c.Remedy
		}
		return p.Remedy
	}
	return ""
}

// explain turns an error of net/http into an *Error. A caller's own cancellation passes unchanged.
func (l *Link) explain(ctx context.Context, err error) error {
	host := l.base.Host
	cause := context.Cause(ctx)
	var (
		dns     *net.DNSError
		proxy   *egress.Error
		pin     *PinError
		invalid x509.CertificateInvalidError
		unknown x509.UnknownAuthorityError
		name    x509.HostnameError
		record  tls.RecordHeaderError
		op      *net.OpError
	)
	switch {
	case errors.Is(cause, errTimeout):
		return &Error{Kind: Timeout, Reason: fmt.Sprintf("the platform at %s did not answer within %s", host, l.cfg.Timeout), Remedy: reachRemedy(host), Err: err}
	case cause != nil:
		return cause
	case errors.As(err, &proxy):
		return &Error{Kind: Proxy, Reason: proxy.Error(), Remedy: proxy.Remedy, Err: err}
	case errors.As(err, &pin):
		return &Error{
			Kind:   Pin,
			Reason: fmt.Sprintf("%s shows a certificate of another CA than the pinned one (pinned %s…, shown %s…): somebody intercepts the connection, or the platform was installed anew", host, pin.Want.String()[:16], pin.Got.String()[:16]),
			Remedy: "if the platform was installed anew, get a new token from it (it carries the new pin); otherwise find out who answers in its place",
			Err:    err,
		}
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		now := l.cfg.Now()
		why := fmt.Sprintf("the certificate of %s is not valid now", host)
		if c := invalid.Cert; c != nil {
			why = fmt.Sprintf("the certificate of %s is valid from %s to %s, and this host's clock says %s", host,
				c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
		}
		return &Error{Kind: Clock, Reason: why, Remedy: "check this host's clock (timedatectl set-ntp true); if it is right, renew the platform's certificate", Err: err}
	case errors.As(err, &unknown):
		return &Error{Kind: TLS, Reason: fmt.Sprintf("the certificate of %s is signed by an authority that this host does not know", host), Remedy: "give the platform's CA pin with --ca-pin (it stands in its admin.token and in every enrolment token), or add its CA to the system's roots", Err: err}
	case errors.As(err, &name):
		return &Error{Kind: TLS, Reason: fmt.Sprintf("the certificate of the platform is not for %s: %v", l.base.Hostname(), name), Remedy: "use the URL that the platform advertises (platformd serve --advertise-url), or give it a certificate for this name", Err: err}
	case errors.As(err, &record), strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return &Error{Kind: TLS, Reason: fmt.Sprintf("%s does not speak TLS", host), Remedy: "check port and scheme of the URL", Err: err}
	case errors.As(err, &op) && (op.Op == "remote error" || op.Op == "local error"): // a TLS alert (crypto/tls)
		return &Error{Kind: TLS, Reason: fmt.Sprintf("TLS with %s: %v", host, op.Err), Remedy: "the platform must offer TLS 1.3 (a proxy in between may not)", Err: err}
	case errors.As(err, &dns):
		return &Error{Kind: DNS, Reason: fmt.Sprintf("the name %s does not resolve: %s", dns.Name, dns.Err), Remedy: "check the name, and this host's DNS (resolvectl query " + dns.Name + ")", Err: err}
	case errors.Is(err, syscall.ECONNREFUSED):
		return &Error{Kind: Connect, Reason: fmt.Sprintf("%s refuses the connection: nothing listens there", host), Remedy: "check that platformd runs and that the port is right", Err: err}
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		return &Error{Kind: Connect, Reason: fmt.Sprintf("there is no route to %s", host), Remedy: "check this host's network and default route", Err: err}
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded), isTimeout(err):
		return &Error{Kind: Timeout, Reason: fmt.Sprintf("%s does not answer", host), Remedy: reachRemedy(host), Err: err}
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return &Error{Kind: Broken, Reason: fmt.Sprintf("%s closed the connection", host), Remedy: "the platform restarts, or something in between cuts connections", Err: err}
	case errors.As(err, &op):
		return &Error{Kind: Connect, Reason: fmt.Sprintf("connection to %s: %v", host, op.Err), Remedy: reachRemedy(host), Err: err}
	}
	return &Error{Kind: Connect, Reason: fmt.Sprintf("request to %s: %v", host, unwrapURL(err)), Remedy: checkURL, Err: err}
}

func reachRemedy(host string) string {
	return "check that a firewall lets this host connect to " + host + " (TCP)"
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// unwrapURL takes off net/http's repetition of method and URL.
func unwrapURL(err error) error {
	if inner := errors.Unwrap(err); inner != nil {
		return inner
	}
	return err
}
