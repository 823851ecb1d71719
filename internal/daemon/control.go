package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// The control socket is HTTP over a Unix socket in the state folder. Only root and the daemon's own user get an answer.

// controlSocket is the socket's name in the state folder.
const controlSocket = "control.sock"

// maxSocketPath is the longest path that fits sockaddr_un with its terminating zero (unix(7)).
const maxSocketPath = 107

// controlTimeout bounds a request of a command to a daemon.
const controlTimeout = 20 * time.Second

// ErrNotRunning says that no daemon answers on a state folder.
var ErrNotRunning = errors.New("not running")

// listenControl makes the socket, mode 0600. A socket that is already there is a dead daemon's, because the caller
// holds the folder's lock.
func listenControl(s *State, log *slog.Logger) (net.Listener, error) {
	real := s.Path(controlSocket)
	if err := os.Remove(real); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove stale control socket: %w", err)
	}
	path, release, err := socketPath(s.dir)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	defer release()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on control socket %s: %w", real, err)
	}
	l.SetUnlinkOnClose(false) // its path may go through a descriptor that is closed by then
	if err := os.Chmod(real, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("control socket: %w", err), l.Close())
	}
	return &credListener{UnixListener: l, path: real, uid: os.Geteuid(), log: log}, nil
}

// credListener accepts connections of root and of one user.
type credListener struct {
	*net.UnixListener
	path string
	uid  int
	log  *slog.Logger
}

func (l *credListener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		uid, err := peerUID(c)
		if err == nil && (uid == 0 || uid == l.uid) {
			return c, nil
		}
		l.log.Warn("control socket refused a peer: only root and the daemon's user may connect", "uid", uid, "error", err)
		_ = c.Close() // refused: nothing was exchanged
	}
}

// Close closes the listener and removes the socket.
func (l *credListener) Close() error {
	err := l.UnixListener.Close()
	if rm := os.Remove(l.path); rm != nil && !errors.Is(rm, fs.ErrNotExist) {
		err = errors.Join(err, rm)
	}
	return err
}

// Client talks to the daemon that runs on a state folder. It may be used concurrently.
type Client struct {
	dir  string
	http *http.Client
}

// Dial returns a client for the daemon on a state folder. It connects at the first request.
func Dial(stateDir string) *Client {
	dir, err := filepath.Abs(stateDir)
	if err != nil {
		dir = stateDir
	}
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			path, release, err := socketPath(dir)
			if err != nil {
				return nil, err
			}
			defer release()
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		},
	}
	return &Client{dir: dir, http: &http.Client{Transport: transport, Timeout: controlTimeout}}
}

// Get asks for path and decodes the answer into out, which may be nil or a *json.RawMessage. The error is
// ErrNotRunning where no daemon answers, and else says what to do.
func (c *Client) Get(ctx context.Context, path string, out any) error {
	return c.do(ctx, http.MethodGet, path, nil, out)
}

// Post sends in, if it is not nil, as JSON and decodes the answer into out. Errors are those of Get.
func (c *Client) Post(ctx context.Context, path string, in, out any) error {
	return c.do(ctx, http.MethodPost, path, in, out)
}

func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://control"+path, body)
	if err != nil {
		return err
	}
	res, err := c.http.Do(req)
	if err != nil {
		return c.explain(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return c.explain(err)
	}
	if res.StatusCode >= 300 {
		return &AnswerError{Status: res.StatusCode, Text: strings.TrimSpace(string(b))}
	}
	switch out := out.(type) {
	case nil:
		return nil
	case *json.RawMessage:
		*out = b
		return nil
	default:
		if err := json.Unmarshal(b, out); err != nil {
			return fmt.Errorf("answer of the daemon: %w", err)
		}
		return nil
	}
}

// AnswerError is a daemon's refusal of a request on its control socket.
type AnswerError struct {
	Status int    // HTTP status
	Text   string // the answer's body
}

func (e *AnswerError) Error() string {
	return fmt.Sprintf("the daemon answered %d: %s", e.Status, e.Text)
}

func (c *Client) explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w (no daemon answers in %s)", ErrNotRunning, c.dir)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("the control socket in %s belongs to another user; run as root: %w", c.dir, fs.ErrPermission)
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return fmt.Errorf("the daemon in %s closed the connection; it may be stopping, or run as another user: %w", c.dir, err)
	}
	return fmt.Errorf("control socket in %s: %w", c.dir, err)
}
