package tunnel

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"

	"github.com/quic-go/quic-go/http3"

	"sallyway/internal/telemetry"
)

// plainConnect makes a CONNECT request to authority (RFC 9114 §4.4).
func plainConnect(authority string) *http.Request {
	return &http.Request{Method: http.MethodConnect, Host: authority, URL: &url.URL{Host: authority}, Header: http.Header{}}
}

// DialTCP opens a TCP flow to host, a name or an IP address, and returns when the gateway has connected. A refusal is a *ProxyError.
// ctx bounds the dial only.
func (s *Session) DialTCP(ctx context.Context, host string, port uint16) (*Stream, error) {
	target := net.JoinHostPort(host, strconv.Itoa(int(port)))
	str, _, err := s.connect(ctx, "", target, nil)
	if err != nil {
		return nil, fmt.Errorf("dial tcp %s: %w", target, err)
	}
	return s.newStream(str, Addr(target)), nil
}

func (s *Session) newStream(str h3stream, remote Addr) *Stream {
	st := &Stream{str: str, local: Addr("session"), remote: remote}
	st.session = &s.flows
	return st
}

// serveConnect is a TCP flow at the gateway.
func (p *peerSession) serveConnect(w http.ResponseWriter, r *http.Request) {
	t, err := parseAuthority(r.Host)
	if err != nil {
		p.fail(w, &ProxyError{Type: RequestError, Detail: err.Error()})
		return
	}
	done, err := p.openFlow()
	if err != nil {
		p.fail(w, err)
		return
	}
	defer done()
	conn, err := p.srv.cfg.Handler.DialTCP(telemetry.Extract(r.Context(), r.Header), p.peer, t)
	if err != nil {
		p.fail(w, err)
		return
	}
	flow := NewConnFlow(conn)
	str, err := takeStream(w)
	if err != nil {
		flow.Reset()
		return
	}
	st := &Stream{str: str, local: Addr(r.Host), remote: Addr(p.peer.Node.String())}
	st.session = &p.flows
	// How it ended is known to both ends already: by half-closes or a reset.
	_ = Splice(p.ctx, st, flow)
}

// takeStream answers 200 and takes the request's stream over.
func takeStream(w http.ResponseWriter) (*http3.Stream, error) {
	w.WriteHeader(http.StatusOK)
	return w.(http3.HTTPStreamer).HTTPStream()
}

// fail answers a request with err.
func (p *peerSession) fail(w http.ResponseWriter, err error) {
	e := AsProxyError(err)
	if e.kind() == InternalError {
		p.srv.cfg.Logger.Warn("request failed", "peer", p.peer.Node, "err", err)
	}
	e.header(w.Header(), p.srv.cfg.Node.ID)
	w.WriteHeader(e.status())
}
