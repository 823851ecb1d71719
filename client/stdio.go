package client

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/spf13/cobra"

	"sallyway/internal/daemon"
	"sallyway/tunnel"
)

// stdioUpgrade is the protocol that a GET /stdio on the control socket switches to: the bytes of one TCP flow.
const stdioUpgrade = "sallyway-stdio"

// stdioHandler carries a flow to ?to=HOST:PORT over a connection to the control socket, for `--stdio` beside a running client.
func stdioHandler(d Dialer) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, port, err := splitHostPort(r.URL.Query().Get("to"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		f, err := d.DialTCP(r.Context(), host, port)
		if err != nil {
			status, proxyStatus := httpRefusal(err)
			w.Header().Set("Proxy-Status", proxyStatus)
			http.Error(w, err.Error(), status)
			return
		}
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			f.Reset()
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		defer c.Close()
		if _, err := fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", stdioUpgrade); err != nil {
			f.Reset()
			return
		}
		conn, ok := c.(tunnel.Conn)
		if !ok {
			f.Reset()
			return
		}
		splice(context.Background(), f, &readAhead{conn, rw.Reader}) // ends when either side does
	})
}

// readAhead reads what the HTTP server had read ahead first.
type readAhead struct {
	tunnel.Conn
	r *bufio.Reader
}

func (r *readAhead) Read(b []byte) (int, error) {
	if r.r.Buffered() > 0 {
		return r.r.Read(b)
	}
	return r.Conn.Read(b)
}

// stdioByDaemon lets a client that runs on the same state folder carry the flow; done is false when none runs.
func (o *options) stdioByDaemon(cmd *cobra.Command) (done bool, err error) {
	conn, err := daemon.Dial(o.State).Upgrade(cmd.Context(), "/stdio?to="+o.stdio, stdioUpgrade)
	switch {
	case errors.Is(err, daemon.ErrNotRunning):
		return false, nil
	case err != nil:
		return true, daemon.Failf("connect to %s: %w", o.stdio, err)
	}
	return true, pumpStdio(cmd, conn)
}

func (o *options) runStdio(ctx context.Context, cmd *cobra.Command, c *Client) error {
	host, port, err := splitHostPort(o.stdio)
	if err != nil {
		return daemon.Usagef("--stdio: %w", err)
	}
	f, err := c.sessions.DialTCP(ctx, host, port)
	if err != nil {
		return daemon.Failf("connect to %s: %w", o.stdio, err)
	}
	stop := context.AfterFunc(ctx, f.Reset)
	defer stop()
	return pumpStdio(cmd, f)
}

// stdioFlow is what standard input and output are joined with.
type stdioFlow interface {
	io.ReadWriter
	CloseWrite() error
}

// pumpStdio ends when the flow has ended; the end of standard input closes its half only.
func pumpStdio(cmd *cobra.Command, f stdioFlow) error {
	go func() {
		_, _ = io.Copy(f, cmd.InOrStdin()) // an error shows on the other half
		_ = f.CloseWrite()
	}()
	if _, err := io.Copy(cmd.OutOrStdout(), f); err != nil {
		return daemon.Failf("the connection broke: %w", err)
	}
	return nil
}
