package supervise

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
)

// notifySocket is the other end of sd_notify(3): a datagram socket that one daemon writes lines of KEY=VALUE to.
type notifySocket struct {
	conn *net.UnixConn
	path string
}

// listenNotify makes the socket for one user.
func listenNotify(path string, uid int) (*notifySocket, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("notify socket: %w", err)
	}
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("notify socket: %w", err)
	}
	if err := errors.Join(os.Chmod(path, 0o600), chown(path, uid)); err != nil {
		return nil, errors.Join(fmt.Errorf("notify socket: %w", err), c.Close())
	}
	return &notifySocket{c, path}, nil
}

// chown gives a path to a user; uid -1 leaves it.
func chown(path string, uid int) error {
	if uid < 0 {
		return nil
	}
	return os.Chown(path, uid, uid)
}

// notice is one message of a daemon.
type notice struct {
	ready, stopping, alive bool
	status                 string // "" where the message has none
}

// parseNotice reads a message. Lines that we do not know are passed over, as systemd does.
func parseNotice(b []byte) notice {
	var n notice
	for l := range strings.SplitSeq(string(b), "\n") {
		key, value, _ := strings.Cut(l, "=")
		switch {
		case key == "READY" && value == "1":
			n.ready = true
		case key == "STOPPING" && value == "1":
			n.stopping = true
		case key == "WATCHDOG" && value == "1":
			n.alive = true
		case key == "STATUS":
			n.status = printable(value[:min(len(value), lineBytes)])
		}
	}
	return n
}

// read hands messages over until the socket is closed.
func (s *notifySocket) read(ctx context.Context, to chan<- notice) {
	buf := make([]byte, 4096)
	for {
		n, _, err := s.conn.ReadFromUnix(buf)
		if err != nil {
			return
		}
		select {
		case to <- parseNotice(buf[:n]):
		case <-ctx.Done():
			return
		}
	}
}

func (s *notifySocket) close() error { return errors.Join(s.conn.Close(), removeIfThere(s.path)) }

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
