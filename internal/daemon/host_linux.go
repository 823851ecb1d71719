package daemon

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// socketPath returns a path of the socket in dir that fits sockaddr_un: for a long one it goes through a descriptor of
// the folder. The returned function closes that descriptor.
func socketPath(dir string) (string, func(), error) {
	path := filepath.Join(dir, controlSocket)
	if len(path) <= maxSocketPath {
		return path, func() {}, nil
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", fd, controlSocket), func() { _ = unix.Close(fd) }, nil
}

// peerUID returns the user at the other end (SO_PEERCRED), -1 with an error.
func peerUID(c *net.UnixConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	uid := -1
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			credErr = err
			return
		}
		uid = int(cred.Uid)
	})
	return uid, errors.Join(err, credErr)
}

// takeLock takes an exclusive lock that belongs to the open file (fcntl(2), open file description locks): unlike
// flock(2), these can be asked for without being taken. taken says that another process holds it.
func takeLock(f *os.File) (taken bool, err error) {
	err = fcntlLock(f, unix.F_OFD_SETLK, new(unix.Flock_t))
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return true, nil
	}
	return false, err
}

// isLocked says whether another process holds the lock.
func isLocked(f *os.File) (bool, error) {
	lock := new(unix.Flock_t)
	if err := fcntlLock(f, unix.F_OFD_GETLK, lock); err != nil {
		return false, err
	}
	return lock.Type != unix.F_UNLCK, nil
}

func fcntlLock(f *os.File, cmd int, lock *unix.Flock_t) error {
	lock.Type, lock.Whence = unix.F_WRLCK, io.SeekStart
	return unix.FcntlFlock(f.Fd(), cmd, lock)
}
