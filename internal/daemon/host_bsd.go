//go:build unix && !linux

package daemon

import (
	"errors"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// socketPath returns the path of the socket in dir; a path that is too long for sockaddr_un fails at listen.
func socketPath(dir string) (string, func(), error) {
	return filepath.Join(dir, controlSocket), func() {}, nil
}

// peerUID returns the user at the other end (LOCAL_PEERCRED), -1 with an error.
func peerUID(c *net.UnixConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	uid := -1
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptXucred(int(fd), 0, unix.LOCAL_PEERCRED) // level SOL_LOCAL
		if err != nil {
			credErr = err
			return
		}
		uid = int(cred.Uid)
	})
	return uid, errors.Join(err, credErr)
}

// takeLock takes an exclusive lock on the open file (flock(2)). taken says that another process holds it.
func takeLock(f *os.File) (taken bool, err error) {
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	return false, err
}

// isLocked says whether another process holds the lock.
func isLocked(f *os.File) (bool, error) {
	taken, err := takeLock(f)
	if !taken && err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_UN)
	}
	return taken, err
}
