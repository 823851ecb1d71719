package client

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// HTTPProxy serves HTTP CONNECT (RFC 9110 §9.3.6) and plain http:// requests by absolute URI, with an answer that names the
// reason where the gateway refuses (Proxy-Status, RFC 9209).
type HTTPProxy struct {
	Dialer Dialer
	Logger *slog.Logger
	// User and Password are demanded (Basic) when User is not empty.
	User, Password string
}

// Serve answers on l until ctx ends.
func (p *HTTPProxy) Serve(ctx context.Context, l net.Listener) error {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			host, port, err := splitHostPort(addr)
			if err != nil {
				return nil, err
			}
			f, err := p.Dialer.DialTCP(ctx, host, port)
			if err != nil {
				return nil, err
			}
			return newConn(f, addr), nil
		},
		DisableCompression: true, IdleConnTimeout: 30 * time.Second, MaxIdleConnsPerHost: 8,
	}
	defer transport.CloseIdleConnections()
	var open sync.WaitGroup // connections, also those that became tunnels: the server itself waits for none
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !p.authorized(r) {
				w.Header().Set("Proxy-Authenticate", `Basic realm="sallyway"`)
				http.Error(w, "this proxy wants user and password", http.StatusProxyAuthRequired)
				return
			}
			if r.Method == http.MethodConnect {
				p.connect(ctx, w, r, open.Done)
				return
			}
			p.forward(w, r, transport)
		}),
		ReadHeaderTimeout: handshakeTimeout, MaxHeaderBytes: 64 << 10, DisableGeneralOptionsHandler: true,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ConnState: func(_ net.Conn, s http.ConnState) {
			switch s {
			case http.StateNew:
				open.Add(1)
			case http.StateClosed:
				open.Done()
			}
		},
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		<-gctx.Done()
		return srv.Close()
	})
	g.Go(func() error {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return ctx.Err()
	})
	defer open.Wait()
	return g.Wait()
}

func (p *HTTPProxy) authorized(r *http.Request) bool {
	if p.User == "" {
		return true
	}
	// BasicAuth reads Authorization; a proxy's credentials are in a header of their own.
	probe := &http.Request{Header: http.Header{"Authorization": r.Header["Proxy-Authorization"]}}
	user, password, ok := probe.BasicAuth()
	return ok && subtle.ConstantTimeCompare([]byte(user), []byte(p.User))&subtle.ConstantTimeCompare([]byte(password), []byte(p.Password)) == 1
}

// connect carries a tunnel and calls done at the end of one that began.
func (p *HTTPProxy) connect(ctx context.Context, w http.ResponseWriter, r *http.Request, done func()) {
	host, port, err := splitHostPort(r.Host)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	f, err := p.Dialer.DialTCP(r.Context(), host, port)
	if err != nil {
		p.refuse(w, r.Host, err)
		return
	}
	c, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		f.Reset()
		http.Error(w, "CONNECT needs HTTP/1.1", http.StatusHTTPVersionNotSupported)
		return
	}
	defer done()
	defer c.Close()
	if _, err := io.WriteString(c, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		f.Reset()
		return
	}
	splice(ctx, f, buffered(c, rw.Reader))
}

// forward passes a request with an absolute URI on, hop-by-hop fields removed (RFC 9110 §7.6.1).
func (p *HTTPProxy) forward(w http.ResponseWriter, r *http.Request, t *http.Transport) {
	if r.URL.Scheme != "http" || r.URL.Host == "" {
		http.Error(w, "this is a proxy: ask for http://host/… or CONNECT host:port", http.StatusBadRequest)
		return
	}
	out := r.Clone(r.Context())
	out.RequestURI = ""
	dropHopByHop(out.Header)
	res, err := t.RoundTrip(out)
	if err != nil {
		p.refuse(w, r.URL.Host, err)
		return
	}
	defer res.Body.Close()
	dropHopByHop(res.Header)
	for k, v := range res.Header {
		w.Header()[k] = v
	}
	w.WriteHeader(res.StatusCode)
	if _, err := io.Copy(flushing{w, http.NewResponseController(w)}, res.Body); err != nil {
		panic(http.ErrAbortHandler) // the status is out: only a cut connection keeps a cut body from looking whole
	}
}

// flushing passes everything on at once, so that what an origin sends bit by bit arrives so.
type flushing struct {
	w io.Writer
	c *http.ResponseController
}

func (f flushing) Write(b []byte) (int, error) {
	n, err := f.w.Write(b)
	if err != nil {
		return n, err
	}
	return n, f.c.Flush()
}

func dropHopByHop(h http.Header) {
	for _, k := range strings.Split(strings.Join(h.Values("Connection"), ","), ",") {
		if k = strings.TrimSpace(k); k != "" {
			h.Del(k)
		}
	}
	for _, k := range []string{"Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authorization", "Proxy-Authenticate", "Te", "Trailer", "Transfer-Encoding", "Upgrade"} {
		h.Del(k)
	}
}

func (p *HTTPProxy) refuse(w http.ResponseWriter, to string, err error) {
	p.Logger.Info("proxy request refused", "to", to, "err", err)
	status, proxyStatus := httpRefusal(err)
	w.Header().Set("Proxy-Status", proxyStatus)
	http.Error(w, err.Error(), status)
}

// Forward carries connections to a local listener to one destination.
type Forward struct {
	Dialer Dialer
	Logger *slog.Logger
	Host   string
	Port   uint16
}

// Serve answers on l until ctx ends.
func (f *Forward) Serve(ctx context.Context, l net.Listener) error {
	return serveConns(ctx, l, func(ctx context.Context, c net.Conn) {
		flow, err := f.Dialer.DialTCP(ctx, f.Host, f.Port)
		if err != nil {
			f.Logger.Info("forward refused", "to", joinHostPort(f.Host, f.Port), "err", err)
			reset(c)
			return
		}
		splice(ctx, flow, buffered(c, nil))
	})
}

// ParseForward reads LADDR=HOST:PORT, where LADDR is a port (on loopback) or address:port.
func ParseForward(s string) (local netip.AddrPort, host string, port uint16, err error) {
	l, target, ok := strings.Cut(s, "=")
	if !ok {
		return local, "", 0, fmt.Errorf("forward %.100q: want LADDR=HOST:PORT, such as 5432=db:5432", s)
	}
	if local, err = ParseListen(l); err != nil {
		return local, "", 0, fmt.Errorf("forward %.100q: %w", s, err)
	}
	if host, port, err = splitHostPort(target); err != nil {
		return local, "", 0, fmt.Errorf("forward %.100q: %w", s, err)
	}
	return local, host, port, nil
}

// ParseListen reads a local listening address: port, :port or address:port. Without an address it is IPv4 loopback.
func ParseListen(s string) (netip.AddrPort, error) {
	if p, err := strconv.ParseUint(strings.TrimPrefix(s, ":"), 10, 16); err == nil {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(p)), nil
	}
	if rest, ok := strings.CutPrefix(s, "localhost:"); ok {
		return ParseListen(rest)
	}
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		return ap, fmt.Errorf("%.60q is not a port or address:port", s)
	}
	return ap, nil
}

// splitHostPort reads host:port with a numeric port.
func splitHostPort(s string) (string, uint16, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return "", 0, fmt.Errorf("%.100q is not host:port", s)
	}
	p, err := strconv.ParseUint(port, 10, 16)
	if err != nil || p == 0 || host == "" {
		return "", 0, fmt.Errorf("%.100q is not host:port", s)
	}
	return host, uint16(p), nil
}

// acceptPause is how long a listener waits when the host has nothing left for another connection: somebody may be done by then.
const acceptPause = 100 * time.Millisecond

// scarce reports whether accept failed for want of descriptors or memory, which passes, and not because of the listener.
func scarce(err error) bool {
	for _, e := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// sleep waits and reports whether ctx is still alive.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// serveConns accepts until ctx ends, runs handle for each connection, and returns when all have ended.
func serveConns(ctx context.Context, l net.Listener, handle func(context.Context, net.Conn)) error {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		<-gctx.Done()
		return l.Close()
	})
	g.Go(func() error {
		for {
			c, err := l.Accept()
			if err != nil {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if scarce(err) && sleep(gctx, acceptPause) {
					continue
				}
				return fmt.Errorf("accept on %v: %w", l.Addr(), err)
			}
			g.Go(func() error {
				stop := context.AfterFunc(gctx, func() { _ = c.Close() })
				defer stop()
				defer c.Close()
				handle(gctx, c)
				return nil
			})
		}
	})
	return g.Wait()
}

// reset closes a connection with RST instead of FIN, so that its user does not take a refusal for an empty answer.
func reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	_ = c.Close()
}
