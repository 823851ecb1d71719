// Package link is the HTTPS way to a platform, for nodes and for the admin command alike: TLS 1.3 under the pinned CA key (or the
// system's roots where nothing is pinned), problem+json errors, and failures that say what is wrong and what to do.
//
//	l, err := link.New(link.Config{URL: "https://platform.example", Pin: pin})
//	err = l.Do(ctx, link.Request{Method: "GET", Path: "/api/v1/orgs", Bearer: token}, &orgs)
//
// HTTP/1.1 only: a control stream and a heartbeat then never share a connection, so one that died silently takes nothing with it.
package link

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/telemetry"
)

// Limits on what a platform may answer, and on how long it may take.
const (
	MaxBody        = 32 << 20         // bytes of a whole answer
	maxProblem     = 64 << 10         // bytes of an error's body
	DefaultTimeout = 20 * time.Second // of a request that is not a stream
	dialTimeout    = 10 * time.Second
	// MaxClockOffset is how far the clocks may differ before the difference is told: peers then refuse certificates.
	MaxClockOffset = identity.ClockSkew
)

// Config says which platform and how to know it.
type Config struct {
	URL string // https://host[:port], or http:// where something else protects the way
	// Pin is the key hash of a CA in the platform's certificate chain, in hexadecimal. Empty: the system's roots vouch.
	Pin string
	// UserAgent is sent with every request.
	UserAgent string
	// Timeout bounds a request that is not a stream; zero is DefaultTimeout.
	Timeout time.Duration
	// DialContext opens connections, perhaps through a proxy; nil is a net.Dialer, and the proxy that net/http finds in the environment.
	DialContext func(ctx context.Context, network, addr string) (net.Conn, error)
	// Now tells the time; nil is time.Now.
	Now func() time.Time
}

// Link is a way to one platform. All methods may be called concurrently.
type Link struct {
	cfg    Config
	base   *url.URL
	pin    *identity.KeyHash // nil: system roots
	client *http.Client

	mu     sync.Mutex
	offset time.Duration // the platform's clock minus ours, at the last answer
}

// New checks the configuration. It opens no connection.
func New(cfg Config) (*Link, error) {
	u, err := url.Parse(cfg.URL)
	if err != nil || u.Host == "" || (u.Scheme != "https" && u.Scheme != "http") {
		return nil, fmt.Errorf("platform URL %.80q is not of the form https://host[:port]", cfg.URL)
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("platform URL %.80q: only scheme, host, port and path count", u.Redacted())
	}
	u.Path = strings.TrimSuffix(u.Path, "/")
	l := &Link{cfg: cfg, base: u}
	if cfg.Pin != "" {
		var h identity.KeyHash
		if err := h.UnmarshalText([]byte(cfg.Pin)); err != nil {
			return nil, fmt.Errorf("CA pin: %w", err)
		}
		l.pin = &h
	}
	if l.cfg.Now == nil {
		l.cfg.Now = time.Now
	}
	if l.cfg.Timeout == 0 {
		l.cfg.Timeout = DefaultTimeout
	}
	dial, proxy := cfg.DialContext, (func(*http.Request) (*url.URL, error))(nil)
	if dial == nil {
		proxy = http.ProxyFromEnvironment
		dial = (&net.Dialer{Timeout: dialTimeout, KeepAlive: 15 * time.Second}).DialContext
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	l.client = &http.Client{
		Transport: &http.Transport{
			Proxy:                  proxy,
			DialContext:            dial,
			TLSClientConfig:        l.tlsConfig(),
			TLSHandshakeTimeout:    dialTimeout,
			ResponseHeaderTimeout:  l.cfg.Timeout * 5 / 4, // of a stream; the deadline of Do ends first
			MaxResponseHeaderBytes: 64 << 10,
			IdleConnTimeout:        time.Minute,
			MaxIdleConnsPerHost:    2,
			Protocols:              protocols,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return l, nil
}

// URL is the platform's URL.
func (l *Link) URL() string { return l.base.String() }

// Plain reports whether the way is unprotected HTTP to somewhere else than this host.
func (l *Link) Plain() bool {
	if l.base.Scheme == "https" {
		return false
	}
	host := l.base.Hostname()
	a, err := netip.ParseAddr(host)
	return host != "localhost" && (err != nil || !a.Unmap().IsLoopback())
}

// Close closes idle connections. Requests that run go on.
func (l *Link) Close() { l.client.CloseIdleConnections() }

// ClockOffset is the platform's clock minus ours at the last answer; zero before the first.
func (l *Link) ClockOffset() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.offset
}

func (l *Link) tlsConfig() *tls.Config {
	cfg := &tls.Config{MinVersion: tls.VersionTLS13, Time: l.cfg.Now}
	if l.pin != nil {
		// The verifier below checks chain, pin and host name; that of crypto/tls knows only the system's roots.
		cfg.InsecureSkipVerify = true
		cfg.VerifyConnection = func(cs tls.ConnectionState) error { return l.verifyPinned(cs.PeerCertificates) }
	}
	return cfg
}

// verifyPinned accepts a chain that holds a CA certificate with the pinned key under which the leaf is valid for the host.
func (l *Link) verifyPinned(chain []*x509.Certificate) error {
	if len(chain) == 0 {
		return errors.New("the platform showed no certificate")
	}
	roots, intermediates, found := x509.NewCertPool(), x509.NewCertPool(), false
	for _, c := range chain {
		switch {
		case c.IsCA && identity.CertificateKeyHash(c) == *l.pin:
			roots.AddCert(c)
			found = true
		default:
			intermediates.AddCert(c)
		}
	}
	if !found {
		return &PinError{Want: *l.pin, Got: identity.CertificateKeyHash(chain[len(chain)-1])}
	}
	leaf, now := chain[0], l.cfg.Now()
	at := now
	switch { // a clock that is off by less than ClockSkew passes
	case now.Before(leaf.NotBefore) && leaf.NotBefore.Sub(now) <= identity.ClockSkew:
		at = leaf.NotBefore
	case now.After(leaf.NotAfter) && now.Sub(leaf.NotAfter) <= identity.ClockSkew:
		at = leaf.NotAfter
	}
	_, err := leaf.Verify(x509.VerifyOptions{
		DNSName: l.base.Hostname(), Roots: roots, Intermediates: intermediates, CurrentTime: at,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	return err
}

// Request is one request. At most one of JSON and Form is set.
type Request struct {
	Method string
	Path   string // from the platform's root, with query
	Bearer string // secret; empty: none
	JSON   any    // body as JSON
	Form   url.Values
	Header http.Header  // sent with it, too
	Answer *http.Header // set to the headers of the answer, also of a refusal; nil: nobody asks
}

// Do sends a request and decodes the answer into out, which may be nil. Its error is a *Problem when the platform answered and
// said no, else an *Error.
func (l *Link) Do(ctx context.Context, r Request, out any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, l.cfg.Timeout, errTimeout)
	defer cancel()
	resp, err := l.send(ctx, r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, MaxBody+1))
	switch {
	case err != nil:
		return l.explain(ctx, err)
	case len(body) > MaxBody:
		return &Error{Kind: NotPlatform, Reason: fmt.Sprintf("%s answered more than %d bytes", l.base.Host, MaxBody), Remedy: checkURL}
	case out == nil:
		return nil
	}
	if err := json.Unmarshal(body, out); err != nil {
		return &Error{Kind: NotPlatform, Reason: fmt.Sprintf("%s answered something that is not the platform's JSON", l.base.Host), Remedy: checkURL, Err: err}
	}
	return nil
}

// Stream sends a request and returns the answer's body, which lives until ctx ends or it is closed.
func (l *Link) Stream(ctx context.Context, r Request) (io.ReadCloser, error) {
	resp, err := l.send(ctx, r)
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

func (l *Link) send(ctx context.Context, r Request) (*http.Response, error) {
	var body io.Reader
	contentType := ""
	switch {
	case r.Form != nil:
		body, contentType = strings.NewReader(r.Form.Encode()), "application/x-www-form-urlencoded"
	case r.JSON != nil:
		b, err := json.Marshal(r.JSON)
		if err != nil {
			return nil, fmt.Errorf("encode request: %w", err)
		}
		body, contentType = bytes.NewReader(b), "application/json"
	}
	req, err := http.NewRequestWithContext(ctx, r.Method, l.base.String()+r.Path, body)
	if err != nil {
		return nil, fmt.Errorf("build request: %w", err)
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	req.Header.Set("Accept", "application/json, application/x-ndjson, application/problem+json")
	if l.cfg.UserAgent != "" {
		req.Header.Set("User-Agent", l.cfg.UserAgent)
	}
	for name, values := range r.Header {
		req.Header[name] = values
	}
	if r.Bearer != "" {
		req.Header.Set("Authorization", "Bearer "+r.Bearer)
	}
	telemetry.Inject(ctx, req.Header)
	resp, err := l.client.Do(req)
	if err != nil {
		return nil, l.explain(ctx, err)
	}
	l.noteClock(resp.Header.Get("Date"))
	if r.Answer != nil {
		*r.Answer = resp.Header
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer resp.Body.Close()
	return nil, l.problem(resp)
}

func (l *Link) noteClock(date string) {
	at, err := http.ParseTime(date)
	if err != nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.offset = at.Add(time.Second / 2).Sub(l.cfg.Now()) // the header has whole seconds, cut off
}

// problem reads an answer that is not 2xx.
func (l *Link) problem(resp *http.Response) error {
	if resp.StatusCode/100 == 3 && resp.StatusCode != http.StatusNotModified {
		return &Error{
			Kind:   NotPlatform,
			Reason: fmt.Sprintf("%s redirects to %.200q, and redirects are not followed", l.base, resp.Header.Get("Location")),
			Remedy: "use the URL under which the platform itself answers",
		}
	}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxProblem)) // what was read is better than nothing
	p := &Problem{Clock: l.clockError()}
	if mt, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); strings.HasSuffix(mt, "json") {
		_ = json.Unmarshal(body, &p.Problem) // the status alone says enough
	}
	p.Status = resp.StatusCode
	if p.RequestID = resp.Header.Get(control.RequestIDHeader); !control.ValidRequestID(p.RequestID) {
		p.RequestID = ""
	}
	if p.Title == "" {
		p.Title = http.StatusText(resp.StatusCode)
	}
	return p
}

// clockError says that the clocks differ too much, or nil.
func (l *Link) clockError() error {
	off := l.ClockOffset()
	if off.Abs() <= MaxClockOffset {
		return nil
	}
	now := l.cfg.Now()
	return &Error{
		Kind: Clock,
		Reason: fmt.Sprintf("this host's clock says %s, the platform's says %s",
			now.UTC().Format(time.RFC3339), now.Add(off).UTC().Format(time.RFC3339)),
		Remedy: "set the clock of the one that is wrong (timedatectl set-ntp true)",
	}
}

// ClockError says that this host's clock and the platform's differ by more than MaxClockOffset, as an *Error, or nil.
func (l *Link) ClockError() error { return l.clockError() }

// LogValue shows the URL alone.
func (l *Link) LogValue() slog.Value { return slog.StringValue(l.base.String()) }
