package egress

import (
	"context"
	"fmt"
	"net"
	"strings"

	"golang.org/x/net/proxy"
)

// once hands out a connection that is there already.
type once struct{ net.Conn }

// DialContext implements proxy.ContextDialer.
func (o once) DialContext(context.Context, string, string) (net.Conn, error) { return o.Conn, nil }

// Dial implements proxy.Dialer.
func (o once) Dial(string, string) (net.Conn, error) { return o.Conn, nil }

var _ proxy.ContextDialer = once{}

// What x/net's SOCKS5 client says, whose errors have no types: the reply codes of RFC 1928 §6, and how authentication ends.
const (
	socksNoMethod   = "no acceptable authentication methods"
	socksWrong      = "username/password authentication failed"
	socksRuleset    = "connection not allowed by ruleset"
	socksUnknown    = "unknown error " // before a reply's text
	socksBadVersion = "unexpected protocol version"
)

// socks asks a SOCKS5 proxy for target on a connection to it.
func (d *Dialer) socks(ctx context.Context, c net.Conn, target string, creds credentials) error {
	var auth *proxy.Auth
	if creds.user != "" {
		auth = &proxy.Auth{User: creds.user, Password: creds.password}
	}
	s, err := proxy.SOCKS5("tcp", d.addr, auth, once{c})
	if err != nil {
		return d.broken(target, err)
	}
	// The client reads what the protocol has and no more, so that c goes on where it stops. When it errs it has closed c.
	_, err = s.(proxy.ContextDialer).DialContext(ctx, "tcp", target)
	if err == nil {
		return nil
	}
	text := err.Error()
	_, reply, known := strings.Cut(text, socksUnknown)
	switch {
	case strings.HasSuffix(text, socksNoMethod) && auth == nil:
		return &Error{Kind: Auth, Proxy: d.Proxy(), Reason: "wants a user and a password, and none are set", Remedy: credentialsRemedy, Err: err}
	case strings.HasSuffix(text, socksNoMethod):
		return &Error{
			Kind: Auth, Proxy: d.Proxy(), Reason: "takes neither user and password nor nobody", Err: err,
			Remedy: "have the proxy's owner allow authentication by user and password (RFC 1929)",
		}
	case strings.HasSuffix(text, socksWrong):
		return &Error{
			Kind: Auth, Proxy: d.Proxy(), Reason: fmt.Sprintf("does not take user %.80q with this password", creds.user), Err: err,
			Remedy: "correct user and password: " + creds.source,
		}
	case strings.HasSuffix(text, socksRuleset):
		return &Error{Kind: Refused, Proxy: d.Proxy(), Reason: fmt.Sprintf("does not let this host connect to %s: %s", target, socksRuleset), Remedy: "have the proxy allow " + target, Err: err}
	case known:
		return &Error{Kind: NoWay, Proxy: d.Proxy(), Reason: fmt.Sprintf("does not lead to %s: %s", target, printable(reply, maxReason)), Remedy: "have the proxy's owner see whether it reaches " + target, Err: err}
	case strings.Contains(text, socksBadVersion):
		return d.broken(target, fmt.Errorf("it does not speak SOCKS5"))
	}
	return d.broken(target, err)
}
