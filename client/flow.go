package client

import (
	"bufio"
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"sallyway/tunnel"
)

// Dialer opens flows to resources. *Sessions is one.
type Dialer interface {
	DialTCP(ctx context.Context, host string, port uint16) (*tunnel.Stream, error)
	DialUDP(ctx context.Context, host string, port uint16) (*tunnel.UDPConn, error)
}

var _ Dialer = (*Sessions)(nil)

// splice joins a flow with a local connection until both are done. What ended it early has been passed on to both as a reset.
func splice(ctx context.Context, f tunnel.Flow, c tunnel.Conn) {
	_ = tunnel.Splice(ctx, f, tunnel.NewConnFlow(c))
}

// buffered makes a local TCP connection whose handshake was read through r (nil: none was) ready to be spliced.
func buffered(c net.Conn, r *bufio.Reader) tunnel.Conn {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return plainConn{c, r}
	}
	if r == nil || r.Buffered() == 0 {
		return t
	}
	return &bufferedConn{t, r}
}

// bufferedConn reads what a handshake had read ahead before the connection itself.
type bufferedConn struct {
	*net.TCPConn
	r *bufio.Reader
}

func (b *bufferedConn) Read(p []byte) (int, error) {
	if b.r != nil {
		if b.r.Buffered() > 0 {
			return b.r.Read(p)
		}
		b.r = nil
	}
	return b.TCPConn.Read(p)
}

// plainConn is a connection that can not be closed by halves: CloseWrite does nothing, and the end shows by Close.
type plainConn struct {
	net.Conn
	r *bufio.Reader
}

func (p plainConn) CloseWrite() error { return nil }

func (p plainConn) Read(b []byte) (int, error) {
	if p.r != nil && p.r.Buffered() > 0 {
		return p.r.Read(b)
	}
	return p.Conn.Read(b)
}

// socksCode is the SOCKS5 reply (RFC 1928 §6) for why a flow was not opened.
func socksCode(err error) byte {
	var none *NoRouteError
	switch {
	case errors.Is(err, tunnel.ErrRefused):
		return socksRefused
	case errors.Is(err, tunnel.ErrDenied):
		return socksNotAllowed
	case errors.As(err, &none):
		return socksNetUnreachable
	case errors.Is(err, tunnel.ErrUnreachable), errors.Is(err, tunnel.ErrNotFound):
		return socksHostUnreachable
	case errors.Is(err, tunnel.ErrTimeout), errors.Is(err, context.DeadlineExceeded):
		return socksTTLExpired
	}
	return socksFailure
}

// httpRefusal is the HTTP status and the Proxy-Status field value (RFC 9209) for why a flow was not opened.
func httpRefusal(err error) (int, string) {
	var pe *tunnel.ProxyError
	if errors.As(err, &pe) {
		return pe.HTTP("sallyway")
	}
	var none *NoRouteError
	if errors.As(err, &none) {
		pe = &tunnel.ProxyError{Type: tunnel.RequestDenied, Detail: none.Error()}
		return pe.HTTP("sallyway")
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, tunnel.ErrTimeout) {
		pe = &tunnel.ProxyError{Type: tunnel.ConnectionTimeout, Detail: err.Error()}
		return pe.HTTP("sallyway")
	}
	pe = &tunnel.ProxyError{Type: tunnel.DestinationUnroutable, Status: http.StatusBadGateway, Detail: err.Error()}
	return pe.HTTP("sallyway")
}

// netConn is a flow as a net.Conn with addresses that say where it leads.
type netConn struct {
	*tunnel.Stream
	remote addr
}

type addr string

func (a addr) Network() string { return "tcp" }
func (a addr) String() string  { return string(a) }

func newConn(s *tunnel.Stream, to string) net.Conn { return &netConn{s, addr(to)} }

// RemoteAddr is the destination as it was dialled.
func (c *netConn) RemoteAddr() net.Addr { return c.remote }

// packetConn is a UDP flow as a net.Conn: a Write is a datagram, a Read is one.
type packetConn struct {
	*tunnel.UDPConn
	remote addr
}

func (c *packetConn) Read(b []byte) (int, error) { return c.ReadPacket(b) }

func (c *packetConn) Write(b []byte) (int, error) {
	if err := c.WritePacket(b); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (c *packetConn) LocalAddr() net.Addr  { return addr("") }
func (c *packetConn) RemoteAddr() net.Addr { return c.remote }

// Deadlines are not kept by UDP flows: close the connection instead.
func (c *packetConn) SetDeadline(time.Time) error      { return errors.ErrUnsupported }
func (c *packetConn) SetReadDeadline(time.Time) error  { return errors.ErrUnsupported }
func (c *packetConn) SetWriteDeadline(time.Time) error { return errors.ErrUnsupported }

// joinHostPort is for logs and errors.
func joinHostPort(host string, port uint16) string {
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}

func hostOf(a netip.AddrPort) string { return a.Addr().Unmap().String() }
