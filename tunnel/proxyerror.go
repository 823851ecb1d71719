package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"

	"github.com/dunglas/httpsfv"
)

// ErrorType is a proxy error type of RFC 9209 §2.3.
type ErrorType string

// The error types that a gateway tells.
const (
	ConnectionRefused     ErrorType = "connection_refused"        // the destination refused: RST, or ICMP port unreachable
	ConnectionTimeout     ErrorType = "connection_timeout"        // the destination does not answer
	ConnectionTerminated  ErrorType = "connection_terminated"     // the destination ended the connection before it was of use
	ConnectionLimit       ErrorType = "connection_limit_reached"  // the peer has as many flows as it may have
	DestinationNotFound   ErrorType = "destination_not_found"     // the name does not exist
	DestinationProhibited ErrorType = "destination_ip_prohibited" // the gateway's own allow list says no
	DestinationUnroutable ErrorType = "destination_ip_unroutable" // the gateway has no route, or a router on the way says so
	DNSError              ErrorType = "dns_error"                 // the name server said no
	DNSTimeout            ErrorType = "dns_timeout"               // the name server does not answer
	RequestDenied         ErrorType = "http_request_denied"       // no policy allows it
	RequestError          ErrorType = "http_request_error"        // the request makes no sense
	InternalError         ErrorType = "proxy_internal_error"      // the gateway failed
)

// What a failed flow means to whoever asked for it: match with errors.Is. Every *ProxyError is one of these at most.
var (
	// ErrRefused is answered with RST, or ICMP port unreachable.
	ErrRefused = errors.New("connection refused")
	// ErrTimeout is answered with silence.
	ErrTimeout = errors.New("destination does not answer")
	// ErrUnreachable is answered with ICMP host unreachable.
	ErrUnreachable = errors.New("destination unreachable")
	// ErrDenied is answered with ICMP administratively prohibited, or RST.
	ErrDenied = errors.New("denied by policy")
	// ErrNotFound means that there is no such name.
	ErrNotFound = errors.New("name not found")
	// ErrLimit means that the peer has too many flows.
	ErrLimit = errors.New("too many flows")
	// ErrReset means that a flow was reset by its other end.
	ErrReset = errors.New("flow reset")
	// ErrNoSession means that the session is over: Session.Err says why.
	ErrNoSession = errors.New("session ended")
)

// ProxyError is a refusal or failure of a gateway, as its Handler returns it and as the client sees it.
type ProxyError struct {
	// Type is the RFC 9209 error type; "" is proxy_internal_error.
	Type ErrorType
	// Status is the HTTP status; 0 is the type's own.
	Status int
	// Rule names the policy rule that said no, if one did.
	Rule string
	// Detail is one sentence for people. It crosses the wire: no secrets.
	Detail string
	// Err is the cause, where the error was made; it does not cross the wire.
	Err error
}

// Error says what, why and by which rule.
func (e *ProxyError) Error() string {
	var b strings.Builder
	b.WriteString(strings.ReplaceAll(string(e.kind()), "_", " "))
	if e.Detail != "" {
		b.WriteString(": ")
		b.WriteString(e.Detail)
	} else if e.Err != nil {
		fmt.Fprintf(&b, ": %v", e.Err)
	}
	if e.Rule != "" {
		fmt.Fprintf(&b, " (rule %q)", e.Rule)
	}
	return b.String()
}

// Unwrap returns the cause.
func (e *ProxyError) Unwrap() error { return e.Err }

// Is matches the sentinels of this package, and os.ErrDeadlineExceeded for timeouts.
func (e *ProxyError) Is(target error) bool {
	switch e.kind() {
	case ConnectionRefused:
		return target == ErrRefused
	case ConnectionTimeout, DNSTimeout:
		return target == ErrTimeout || target == os.ErrDeadlineExceeded
	case ConnectionTerminated:
		return target == ErrReset
	case ConnectionLimit:
		return target == ErrLimit
	case DestinationNotFound:
		return target == ErrNotFound
	case DestinationProhibited, RequestDenied:
		return target == ErrDenied
	case DestinationUnroutable:
		return target == ErrUnreachable
	}
	return false
}

// Timeout reports whether the destination did not answer (net.Error).
func (e *ProxyError) Timeout() bool { return errors.Is(e, ErrTimeout) }

func (e *ProxyError) kind() ErrorType {
	if e.Type == "" {
		return InternalError
	}
	return e.Type
}

// status is the HTTP status to answer with. Where RFC 9209 recommends 502 or 500 for a policy's no, 403 is what people understand.
func (e *ProxyError) status() int {
	if e.Status != 0 {
		return e.Status
	}
	switch e.kind() {
	case ConnectionRefused, ConnectionTerminated, DestinationUnroutable, DNSError, DestinationNotFound:
		return http.StatusBadGateway
	case ConnectionTimeout, DNSTimeout:
		return http.StatusGatewayTimeout
	case ConnectionLimit:
		return http.StatusServiceUnavailable
	case DestinationProhibited, RequestDenied:
		return http.StatusForbidden
	case RequestError:
		return http.StatusBadRequest
	}
	return http.StatusInternalServerError
}

// Denied returns the error for a policy's no: what a Decision says, as it goes to the peer.
func Denied(rule, reason string) *ProxyError {
	return &ProxyError{Type: RequestDenied, Rule: rule, Detail: reason}
}

// AsProxyError turns what dialling a destination returned into a ProxyError; a *ProxyError in err's chain is returned as it is.
func AsProxyError(err error) *ProxyError {
	if p, ok := errors.AsType[*ProxyError](err); ok {
		return p
	}
	e := &ProxyError{Type: InternalError, Err: err}
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		switch {
		case dns.IsNotFound:
			e.Type, e.Detail = DestinationNotFound, "no such name in the gateway's network"
		case dns.IsTimeout:
			e.Type, e.Detail = DNSTimeout, "the gateway's name server does not answer"
		default:
			e.Type, e.Detail = DNSError, "the gateway's name server failed"
		}
		return e
	}
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		e.Type, e.Detail = ConnectionRefused, "the destination refused the connection"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		e.Type, e.Detail = ConnectionTerminated, "the destination reset the connection"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EADDRNOTAVAIL),
		errors.Is(err, syscall.ENETDOWN), errors.Is(err, syscall.EHOSTDOWN):
		e.Type, e.Detail = DestinationUnroutable, "the gateway has no route to the destination"
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		e.Type, e.Detail = DestinationProhibited, "the gateway's host prohibits the destination"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT), isTimeout(err):
		e.Type, e.Detail = ConnectionTimeout, "the destination does not answer"
	case errors.Is(err, context.Canceled):
		e.Type, e.Detail = ConnectionTerminated, "the request was given up"
	default:
		e.Detail = "the gateway failed; its log says more"
	}
	return e
}

func isTimeout(err error) bool {
	t, ok := errors.AsType[net.Error](err)
	return ok && t.Timeout()
}

// Names of the header field and its parameters (RFC 9209 §2).
const (
	proxyStatusHeader = "Proxy-Status"
	paramError        = "error"
	paramDetails      = "details"
	paramRule         = "rule" // our extension: the policy rule's name
)

// maxDetail bounds what of a detail or rule goes into or comes out of a header, in bytes.
const maxDetail = 512

// header writes e into h as the proxy named proxy.
func (e *ProxyError) header(h http.Header, proxy string) {
	item := httpsfv.NewItem(printable(proxy))
	item.Params.Add(paramError, httpsfv.Token(e.kind()))
	if e.Detail != "" {
		item.Params.Add(paramDetails, printable(e.Detail))
	}
	if e.Rule != "" {
		item.Params.Add(paramRule, printable(e.Rule))
	}
	v, err := httpsfv.Marshal(httpsfv.List{item})
	if err != nil { // only a type that is not a token, which a Handler of ours does not return
		v = `"sallyway"; error=proxy_internal_error`
	}
	h.Set(proxyStatusHeader, v)
}

// parseProxyError reads the refusal in a response: Proxy-Status where there is one, else what the status tells.
func parseProxyError(status int, h http.Header) *ProxyError {
	e := &ProxyError{Status: status, Detail: fmt.Sprintf("the gateway answered %d %s", status, http.StatusText(status))}
	switch status {
	case http.StatusForbidden:
		e.Type = RequestDenied
	case http.StatusGatewayTimeout:
		e.Type = ConnectionTimeout
	case http.StatusBadGateway:
		e.Type = DestinationUnroutable
	case http.StatusBadRequest, http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusNotImplemented:
		e.Type = RequestError
	}
	list, err := httpsfv.UnmarshalList(h[proxyStatusHeader])
	if err != nil || len(list) == 0 {
		return e
	}
	item, ok := list[len(list)-1].(httpsfv.Item) // the last one is the nearest to us (RFC 9209 §2)
	if !ok || item.Params == nil {
		return e
	}
	if t, ok := item.Params.Get(paramError); ok {
		if t, ok := t.(httpsfv.Token); ok {
			e.Type = ErrorType(t)
		}
	}
	if d, ok := item.Params.Get(paramDetails); ok {
		if d, ok := d.(string); ok {
			e.Detail = d
		}
	}
	if r, ok := item.Params.Get(paramRule); ok {
		if r, ok := r.(string); ok {
			e.Rule = r
		}
	}
	return e
}

// printable makes s fit a structured field string: printable ASCII (RFC 9651 §3.3.3), bounded.
func printable(s string) string {
	if len(s) > maxDetail {
		s = s[:maxDetail]
	}
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r > 0x7e {
			return '?'
		}
		return r
	}, s)
}
