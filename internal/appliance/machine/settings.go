package machine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// setting is a value of the kernel's below /proc/sys.
type setting struct {
	name, value string
	optional    bool // a kernel or an unloaded module may lack it
}

// settings are what a host that carries other people's packets and no user needs.
var settings = []setting{
	{"kernel/printk", "3 4 1 3", false}, // errors and worse on the console: it belongs to the status block
	{"kernel/panic", "5", false},        // seconds until the restart
	{"kernel/panic_on_oops", "1", false},
	{"kernel/dmesg_restrict", "1", false},
	{"kernel/kptr_restrict", "2", false},
	{"kernel/unprivileged_bpf_disabled", "1", true},
	{"kernel/yama/ptrace_scope", "2", true},
	{"kernel/kexec_load_disabled", "1", true},
	{"kernel/core_pattern", "|/nonexistent", false}, // a core file holds keys
	{"kernel/sysrq", "0", true},
	{"fs/suid_dumpable", "0", false},
	{"fs/protected_hardlinks", "1", false},
	{"fs/protected_symlinks", "1", false},
	{"fs/file-max", "1048576", false},
	{"net/core/rmem_max", "8388608", false}, // what the relay's and QUIC's sockets ask for
	{"net/core/wmem_max", "8388608", false},
	{"net/core/default_qdisc", "fq", true},
	{"net/ipv4/tcp_congestion_control", "bbr", true},
	{"net/ipv4/ip_forward", "0", false}, // packets go through the daemons, never around them
	{"net/ipv6/conf/all/forwarding", "0", true},
	{"net/ipv4/conf/all/accept_redirects", "0", false},
	{"net/ipv4/conf/default/accept_redirects", "0", false},
	{"net/ipv4/conf/all/send_redirects", "0", false},
	{"net/ipv4/conf/default/send_redirects", "0", false},
	{"net/ipv4/conf/all/accept_source_route", "0", false},
	{"net/ipv6/conf/all/accept_redirects", "0", true},
	{"net/ipv6/conf/default/accept_redirects", "0", true},
	{"net/ipv4/tcp_syncookies", "1", false},
	{"net/netfilter/nf_conntrack_max", "262144", true},
}

// Settings writes the kernel's settings below root, which is /proc/sys.
func Settings(root string) error {
	var errs []error
	for _, s := range settings {
		err := os.WriteFile(filepath.Join(root, s.name), []byte(s.value), 0o644)
		if err != nil && !(s.optional && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || isInvalid(err))) {
			errs = append(errs, fmt.Errorf("kernel setting %s: %w", strings.ReplaceAll(s.name, "/", "."), err))
		}
	}
	return errors.Join(errs...)
}
