package machine

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Jail is what a daemon is left with: a user of its own, a few capabilities, and no way to more.
type Jail struct {
	UID  int
	Caps []int // unix.CAP_…: what the daemon has, and the most that it or its children can get
}

// capabilities are those that daemons of ours have, by name.
var capabilities = map[string]int{
	"CAP_NET_ADMIN": unix.CAP_NET_ADMIN, "CAP_NET_RAW": unix.CAP_NET_RAW, "CAP_NET_BIND_SERVICE": unix.CAP_NET_BIND_SERVICE,
}

// String is what ParseJail reads.
func (j Jail) String() string {
	var names []string
	for name, c := range capabilities {
		if slices.Contains(j.Caps, c) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return strconv.Itoa(j.UID) + ":" + strings.Join(names, ",")
}

// ParseJail reads UID:CAP_A,CAP_B.
func ParseJail(s string) (Jail, error) {
	id, caps, found := strings.Cut(s, ":")
	uid, err := strconv.Atoi(id)
	if !found || err != nil || uid <= 0 {
		return Jail{}, fmt.Errorf("jail %.60q is not UID:CAPABILITIES with a user other than root", s)
	}
	j := Jail{UID: uid}
	for _, name := range strings.Split(caps, ",") {
		if name == "" {
			continue
		}
		c, known := capabilities[name]
		if !known {
			return Jail{}, fmt.Errorf("jail: unknown capability %.40q", name)
		}
		j.Caps = append(j.Caps, c)
	}
	return j, nil
}

// maxFiles is how many descriptors a daemon may have: a relay has one socket per allocation.
const maxFiles = 1 << 20

// raiseFiles raises the limit of open files to maxFiles, or as far as this process may.
func raiseFiles() error {
	err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: maxFiles, Max: maxFiles})
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return err
	}
	l.Cur = l.Max
	return unix.Setrlimit(unix.RLIMIT_NOFILE, &l)
}

// Enter turns this process into path with args as the jail's user; it returns only on error. The program it starts has the jail's
// capabilities, permitted and ambient, can never get others (bounding set, no_new_privs), and writes no core file.
func (j Jail) Enter(path string, args, env []string) error {
	runtime.LockOSThread() // these are settings of a thread; exec keeps those of the calling one
	defer runtime.UnlockOSThread()
	if err := raiseFiles(); err != nil {
		return fmt.Errorf("open files: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("core files: %w", err)
	}
	unix.Umask(0o077)
	for c := range uintptr(unix.CAP_LAST_CAP + 1) {
		if slices.Contains(j.Caps, int(c)) {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: this kernel has fewer
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("keep capabilities: %w", err)
	}
	// The raw calls change this thread alone, which is the one that goes on.
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); e != 0 {
		return fmt.Errorf("groups: %w", e)
	}
	id := uintptr(j.UID)
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, id, id, id); e != 0 {
		return fmt.Errorf("group: %w", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, id, id, id); e != 0 {
		return fmt.Errorf("user: %w", e)
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	for _, c := range j.Caps {
		data[c/32].Permitted |= 1 << (c % 32)
	}
	for i := range data {
		data[i].Effective, data[i].Inheritable = data[i].Permitted, data[i].Permitted
	}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return fmt.Errorf("capabilities: %w", err)
	}
	for _, c := range j.Caps {
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(c), 0, 0); err != nil {
			return fmt.Errorf("ambient capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no new privileges: %w", err)
	}
	if _, err := os.Stat(path); err != nil {
		return err
	}
	return unix.Exec(path, args, env)
}
