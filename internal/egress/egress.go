// Package egress opens TCP connections to the outside through the proxy that a network demands: HTTP CONNECT (RFC 9110 §9.3.6) with Basic
// credentials, or SOCKS5 (RFC 1928) with user and password (RFC 1929).
//
//	http://HOST:PORT      CONNECT; names are resolved by the proxy
//	https://HOST:PORT     the same, inside of TLS to the proxy
//	socks5://HOST:PORT    names are resolved here
//	socks5h://HOST:PORT   names are resolved by the proxy
//
//	d, err := egress.Settings{URL: flag}.Open(os.Getenv)            // the flag, else HTTPS_PROXY or ALL_PROXY
//	conn, err := d.DialContext(ctx, "tcp", "relay.example:5349")    // by the proxy, unless NO_PROXY names the host
//
// What goes wrong is an *Error that names the proxy, what it said and what to do; never a password.
package egress

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/http/httpproxy"
)

const (
	// Timeout bounds an attempt: the connection to the proxy, and what it needs to reach the target.
	Timeout = 10 * time.Second
	// authRest is how long credentials that were refused are not shown again, unless they change: legs try every few seconds, and a directory may
	// lock an account after a few wrong passwords.
	authRest = 30 * time.Second
	// keepalive is between TCP keepalives on the socket to the proxy.
	keepalive = 15 * time.Second
	// maxTried bounds the addresses of a name that a SOCKS5 proxy is asked for in turn.
	maxTried = 4
)

// Config says which proxy to use, and for what.
type Config struct {
	// URL of the proxy. It may hold user and password.
	URL string
	// Source is where the URL comes from, for people: --egress-proxy, HTTPS_PROXY.
	Source string
	// NoProxy lists what is dialled without the proxy, as the environment variable NO_PROXY does: addresses, prefixes, names with everything
	// below them, each with an optional port, separated by commas; * is everything. This host itself never needs to be named.
	NoProxy string
	// Credentials are user and password, in place of those in the URL; nil is none.
	Credentials *Credentials
	// Control is called on every socket before it connects, that to the proxy among them (see net.Dialer.Control).
	Control func(network, address string, c syscall.RawConn) error
	// TLS is for the way to an https proxy; nil trusts the system's roots.
	TLS *tls.Config
	// Resolver finds addresses for socks5; nil is the system's.
	Resolver *net.Resolver
	// Timeout bounds an attempt; 0 is the constant Timeout.
	Timeout time.Duration
}

// Dialer dials through a proxy; the zero Dialer has none and dials itself. Its methods may be called concurrently.
type Dialer struct {
	cfg    Config
	scheme string
	addr   string // host:port of the proxy
	uses   func(*url.URL) (*url.URL, error)

	mu      sync.Mutex // guards what follows
	status  Status
	refused refusal
}

// refusal is what a proxy last said of credentials.
type refusal struct {
	creds credentials
	until time.Time
	err   *Error // nil before the first
}

// Status is what is known of a proxy.
type Status struct {
	Proxy   string `json:"proxy"` // without user and password
	Source  string `json:"source"`
	NoProxy string `json:"no_proxy,omitempty"`
	// Connections were opened through it, Failures were not.
	Connections uint64 `json:"connections"`
	Failures    uint64 `json:"failures"`
	// Error is why the proxy itself can not be used, empty while it can or nobody has tried; Since is when that last changed. That it does not
	// lead to one target is told to who dialled.
	Error  string    `json:"error,omitempty"`
	Remedy string    `json:"remedy,omitempty"`
	Since  time.Time `json:"since,omitzero"`
}

// New checks a configuration. It opens no connection.
func New(cfg Config) (*Dialer, error) {
	u, err := parse(cfg.URL)
	if err != nil {
		return nil, err
	}
	if cfg.Credentials == nil {
		cfg.Credentials = inURL(u)
	}
	if cfg.Resolver == nil {
		cfg.Resolver = net.DefaultResolver
	}
	d := &Dialer{cfg: cfg, scheme: u.Scheme, addr: u.Host}
	d.uses = (&httpproxy.Config{HTTPSProxy: d.Proxy(), NoProxy: cfg.NoProxy}).ProxyFunc()
	d.status = Status{Proxy: d.Proxy(), Source: cfg.Source, NoProxy: cfg.NoProxy}
	return d, nil
}

// ports are those that a URL need not name.
var ports = map[string]string{"http": "80", "https": "443", "socks5": "1080", "socks5h": "1080"}

// parse reads a proxy's URL. Errors do not show it: it may hold a password.
func parse(s string) (*url.URL, error) {
	if !strings.Contains(s, "://") {
		s = "http://" + s
	}
	u, err := url.Parse(s)
	if err != nil {
		return nil, errors.New("malformed proxy URL: want http://HOST:PORT, https://, socks5:// or socks5h://")
	}
	def, ok := ports[u.Scheme]
	switch port := u.Port(); {
	case !ok:
		return nil, fmt.Errorf("a proxy of kind %.20q is not known: want http, https, socks5 or socks5h", u.Scheme)
	case !plainHost(u.Hostname()):
		return nil, errors.New("the proxy URL names no host: want http://HOST:PORT")
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("the proxy URL has more than scheme, host and port")
	case port == "" && !strings.HasSuffix(u.Host, ":"):
		u.Host = net.JoinHostPort(u.Hostname(), def)
	default:
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return nil, errors.New("the proxy URL has no valid port")
		}
	}
	return u, nil
}

// plainHost refuses what could end a line or a field of a request.
func plainHost(h string) bool {
	return h != "" && len(h) <= 253 && !strings.ContainsFunc(h, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune(`/\@?#"<>`, r) })
}

// Proxy is the proxy's URL without user and password, "" where there is none.
func (d *Dialer) Proxy() string {
	if d.addr == "" {
		return ""
	}
	return d.scheme + "://" + d.addr
}

// Host is the proxy's host, "" where there is none.
func (d *Dialer) Host() string {
	host, _, _ := net.SplitHostPort(d.addr) // parse joined it, where there is one
	return host
}

// Uses reports whether the way to host:port is by the proxy.
func (d *Dialer) Uses(address string) bool {
	if d.addr == "" {
		return false
	}
	u, err := d.uses(&url.URL{Scheme: "https", Host: address})
	return err == nil && u != nil
}

// Resolves reports whether the proxy resolves the name in host:port, so that this host need not know it.
func (d *Dialer) Resolves(address string) bool { return d.scheme != "socks5" && d.Uses(address) }

// Status returns the present state, nil where there is no proxy.
func (d *Dialer) Status() *Status {
	if d.addr == "" {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	st := d.status
	return &st
}

// DialContext opens a TCP connection to host:port. ctx bounds the attempt, as Timeout does, and not the connection.
func (d *Dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil || !plainHost(host) || !strings.HasPrefix(network, "tcp") {
		return nil, fmt.Errorf("dial %s %.80q: not a host and port of TCP", network, address)
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil || number == 0 {
		return nil, fmt.Errorf("dial %.80q: no valid port", address)
	}
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(d.cfg.Timeout, Timeout))
	defer cancel()
	if !d.Uses(address) {
		return d.socket().DialContext(ctx, network, address)
	}
	c, err := d.dial(ctx, host, port)
	if err != nil && errors.Is(ctx.Err(), context.Canceled) {
		return nil, context.Cause(ctx) // the caller has given up; that says nothing about the proxy
	}
	d.note(err)
	if err != nil {
		return nil, err
	}
	c.remote = &net.TCPAddr{IP: net.IPv4zero, Port: int(number)}
	if a, err := netip.ParseAddr(host); err == nil {
		c.remote = net.TCPAddrFromAddrPort(netip.AddrPortFrom(a.Unmap(), uint16(number)))
	}
	return c, nil
}

// socket is what every TCP connection begins with.
func (d *Dialer) socket() *net.Dialer {
	return &net.Dialer{Control: d.cfg.Control, KeepAlive: keepalive}
}

// note keeps what an attempt says about the proxy. err is nil or an *Error.
func (d *Dialer) note(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	before, first := d.status.Error, d.status.Since.IsZero()
	d.status.Error, d.status.Remedy = "", ""
	if err == nil {
		d.status.Connections++
	} else {
		d.status.Failures++
		if e, ok := errors.AsType[*Error](err); ok && e.Kind.ofProxy() {
			d.status.Error, d.status.Remedy = e.Error(), e.Remedy
		}
	}
	if first || before != d.status.Error {
		d.status.Since = time.Now()
	}
}

// dial has the proxy connect to a target. Its error is an *Error.
func (d *Dialer) dial(ctx context.Context, host, port string) (*conn, error) {
	_, perr := netip.ParseAddr(host)
	if d.scheme != "socks5" || perr == nil {
		return d.dialTarget(ctx, net.JoinHostPort(host, port))
	}
	ips, err := d.cfg.Resolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, &Error{
			Kind: NoWay, Proxy: d.Proxy(), Reason: fmt.Sprintf("the name %s does not resolve on this host: %v", host, err),
			Remedy: "with socks5h in place of socks5 the proxy resolves names", Err: err,
		}
	}
	slices.SortStableFunc(ips, func(a, b netip.Addr) int { return a.Unmap().BitLen() - b.Unmap().BitLen() })
	var errs []error
	for _, ip := range ips[:min(len(ips), maxTried)] {
		c, err := d.dialTarget(ctx, net.JoinHostPort(ip.Unmap().String(), port))
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
		if e, ok := errors.AsType[*Error](err); ctx.Err() != nil || (ok && e.Kind.ofProxy()) {
			break // another address of the target would not help
		}
	}
	return nil, errors.Join(errs...)
}

// dialTarget opens a connection to the proxy and has it lead to target.
func (d *Dialer) dialTarget(ctx context.Context, target string) (_ *conn, err error) {
	creds, err := d.cfg.Credentials.read()
	if err != nil {
		return nil, &Error{Kind: Auth, Proxy: d.Proxy(), Reason: err.Error(), Remedy: credentialsRemedy, Err: err}
	}
	if e := d.refusedBefore(creds); e != nil {
		return nil, e
	}
	nc, err := d.socket().DialContext(ctx, "tcp", d.addr)
	if err != nil {
		return nil, d.unreached(err)
	}
	tcp := nc.(*net.TCPConn)
	defer func() {
		if err != nil {
			_ = tcp.Close() // what is wrong is known
		}
	}()
	// A deadline alone would not end an attempt that is given up earlier.
	stop := context.AfterFunc(ctx, func() { _ = tcp.SetDeadline(time.Unix(1, 0)) })
	c := &conn{Conn: nc, tcp: tcp}
	if d.scheme == "https" {
		if c.Conn, err = d.encrypt(ctx, nc); err != nil {
			stop()
			return nil, err
		}
	}
	if strings.HasPrefix(d.scheme, "socks5") {
		err = d.socks(ctx, c.Conn, target, creds)
	} else {
		err = d.connect(c.Conn, target, creds)
	}
	if e, ok := errors.AsType[*Error](err); ok && e.Kind == Auth {
		d.mu.Lock()
		d.refused = refusal{creds, time.Now().Add(authRest), e}
		d.mu.Unlock()
	}
	if !stop() && err == nil {
		err = d.silent(target, context.Cause(ctx))
	}
	if err == nil {
		err = tcp.SetDeadline(time.Time{})
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

// refusedBefore is what the proxy said a moment ago of these credentials, nil if nothing.
func (d *Dialer) refusedBefore(creds credentials) *Error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.refused.err == nil || d.refused.creds != creds || time.Now().After(d.refused.until) {
		return nil
	}
	return d.refused.err
}

// encrypt does the TLS handshake with an https proxy.
func (d *Dialer) encrypt(ctx context.Context, nc net.Conn) (net.Conn, error) {
	cfg := &tls.Config{}
	if d.cfg.TLS != nil {
		cfg = d.cfg.TLS.Clone()
	}
	cfg.MinVersion = max(cfg.MinVersion, tls.VersionTLS12)
	cfg.NextProtos = []string{"http/1.1"}
	if cfg.ServerName == "" {
		cfg.ServerName = d.Host()
	}
	tc := tls.Client(nc, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, &Error{
			Kind: Unreached, Proxy: d.Proxy(), Reason: fmt.Sprintf("TLS with the proxy itself: %v", err),
			Remedy: "see that the proxy speaks TLS on this port (http:// in place of https:// if not), and that its CA is among this host's roots", Err: err,
		}
	}
	return tc, nil
}

// conn is a connection through a proxy.
type conn struct {
	net.Conn // what carries the bytes: tcp, or TLS on it
	tcp      *net.TCPConn
	remote   *net.TCPAddr
}

// RemoteAddr is the target's address, the unspecified one where the proxy alone knows it.
func (c *conn) RemoteAddr() net.Addr { return c.remote }

// SyscallConn is the socket to the proxy.
func (c *conn) SyscallConn() (syscall.RawConn, error) { return c.tcp.SyscallConn() }

var _ syscall.Conn = (*conn)(nil)
