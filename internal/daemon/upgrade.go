package daemon

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
)

// Upgraded is a connection to a daemon's control socket that has left HTTP.
type Upgraded struct {
	body io.ReadWriteCloser
	conn net.Conn
}

// Read reads what the daemon writes.
func (u *Upgraded) Read(b []byte) (int, error) { return u.body.Read(b) }

// Write writes to the daemon.
func (u *Upgraded) Write(b []byte) (int, error) { return u.body.Write(b) }

// CloseWrite ends this direction.
func (u *Upgraded) CloseWrite() error {
	if c, ok := u.conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return u.body.Close()
}

// Close ends both directions.
func (u *Upgraded) Close() error { return u.body.Close() }

// Upgrade asks for path and switches the connection to protocol (RFC 9110 §7.8). Errors are those of Get.
func (c *Client) Upgrade(ctx context.Context, path, protocol string) (*Upgraded, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://control"+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", protocol)
	up := &Upgraded{}
	t := c.http.Transport.(*http.Transport).Clone()
	dial := t.DialContext
	t.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		up.conn = conn
		return conn, err
	}
	res, err := t.RoundTrip(req)
	if err != nil {
		return nil, c.explain(err)
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		defer res.Body.Close()
		b, err := io.ReadAll(io.LimitReader(res.Body, 4<<10))
		if err != nil {
			return nil, c.explain(err)
		}
		return nil, &AnswerError{Status: res.StatusCode, Text: strings.TrimSpace(string(b))}
	}
	rw, ok := res.Body.(io.ReadWriteCloser)
	if !ok {
		return nil, fmt.Errorf("control socket: the connection can not be written to after %s", protocol)
	}
	up.body = rw
	return up, nil
}
