package machine

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"testing/synctest"

	"golang.org/x/sys/unix"
)

// jailed is the environment variable that turns the test's binary into what runs in a jail, or enters one.
const jailed = "MACHINE_TEST_JAIL"

func TestMain(m *testing.M) {
	switch spec := os.Getenv(jailed); spec {
	case "":
		os.Exit(m.Run())
	case "inside":
		os.Exit(inside())
	default:
		j, err := ParseJail(spec)
		if err == nil {
			err = j.Enter("/proc/self/exe", []string{"inside"}, []string{jailed + "=inside"})
		}
		_, _ = os.Stderr.WriteString(err.Error())
		os.Exit(99)
	}
}

// inside prints what the kernel says about this process, and tries to get more.
func inside() int {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 98
	}
	_, _ = os.Stdout.Write(b)
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err == nil && l.Cur == l.Max {
		_, _ = os.Stdout.WriteString("Files: all\n")
	}
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &l); err == nil && l.Max == 0 {
		_, _ = os.Stdout.WriteString("Core: none\n")
	}
	if err := unix.Setresuid(0, 0, 0); err == nil {
		_, _ = os.Stdout.WriteString("Root: again\n")
	}
	if err := unix.Sethostname([]byte("x")); err == nil {
		_, _ = os.Stdout.WriteString("Hostname: changed\n")
	}
	return 0
}

func TestJail(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("another user can be become by root alone")
	}
	// The binary has to be reachable for the jail's user.
	dir, err := os.MkdirTemp("/tmp", "jail")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "binary")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(path, self, 0o755)); err != nil {
		t.Fatal(err)
	}
	run := func(spec string) map[string]string {
		t.Helper()
		cmd := exec.Command(path)
		cmd.Env = []string{jailed + "=" + spec}
		cmd.Dir = "/"
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		status := make(map[string]string)
		for l := range strings.Lines(string(out)) {
			if k, v, ok := strings.Cut(l, ":"); ok {
				status[k] = strings.Join(strings.Fields(v), " ")
			}
		}
		return status
	}
	s := run(Jail{UID: 901, Caps: []int{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW}}.String())
	const net = "0000000000003000" // CAP_NET_ADMIN 12, CAP_NET_RAW 13
	for k, want := range map[string]string{
		"Uid": "901 901 901 901", "Gid": "901 901 901 901", "Groups": "", "CapInh": net, "CapPrm": net, "CapEff": net, "CapBnd": net, "CapAmb": net,
		"NoNewPrivs": "1", "Files": "all", "Core": "none", "Root": "", "Hostname": "",
	} {
		if s[k] != want {
			t.Errorf("%s is %q, want %q", k, s[k], want)
		}
	}
	s = run("902:")
	if s["CapBnd"] != "0000000000000000" || s["CapAmb"] != "0000000000000000" || s["Uid"] != "902 902 902 902" {
		t.Errorf("without capabilities: %v", s)
	}
}

func TestParseJail(t *testing.T) {
	for _, bad := range []string{"", "901", "0:", "x:", "901:CAP_SYS_ADMIN", "-1:", "901:net"} {
		if j, err := ParseJail(bad); err == nil {
			t.Errorf("%q is %v", bad, j)
		}
	}
	j, err := ParseJail("901:CAP_NET_RAW,CAP_NET_ADMIN")
	if err != nil || j.String() != "901:CAP_NET_ADMIN,CAP_NET_RAW" {
		t.Errorf("%v, %v", j, err)
	}
}

func TestModules(t *testing.T) {
	m, err := ReadModules(fstest.MapFS{
		"010-tun.ko": {}, "002-virtio.ko": {}, "readme": {},
		"hw/001-net_failover.ko": {}, "hw/002-virtio_net.ko": {}, "hw/003-nvme-core.ko": {}, "hw/004-nvme.ko": {}, "hw/005-ena.ko": {},
		"hw/aliases": {Data: []byte("alias virtio:d00000001v* virtio_net\nalias pci:v*d*sv*sd*bc01sc08i02* nvme\nalias pci:v00001D0Fd0000EC20sv*sd*bc*sc*i* ena\n" +
			"depends virtio_net net_failover\ndepends nvme nvme_core\nalias bad[ x\nnonsense\n")},
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"002-virtio.ko", "010-tun.ko"}; !slices.Equal(m.fixed, want) {
		t.Errorf("always loaded are %v, want %v", m.fixed, want)
	}
	for _, tc := range []struct {
		devices, want []string
	}{
		{nil, nil},
		{[]string{"virtio:d00000001v00001AF4"}, []string{"001-net_failover.ko", "002-virtio_net.ko"}},
		{[]string{"pci:v00001234d00005678sv0sd0bc01sc08i02", "acpi:PNP0C0C:"}, []string{"003-nvme-core.ko", "004-nvme.ko"}},
		{[]string{"pci:v00001D0Fd0000EC20sv00000000sd00000000bc02sc00i00"}, []string{"005-ena.ko"}},
	} {
		if got := m.wanted(tc.devices); !slices.Equal(got, tc.want) {
			t.Errorf("%v: %v, want %v", tc.devices, got, tc.want)
		}
	}
	if m, err := ReadModules(fstest.MapFS{}); err != nil || len(m.fixed)+len(m.hw) != 0 {
		t.Errorf("an image without modules: %v, %v", m, err)
	}
}

func TestDevices(t *testing.T) {
	got := devices(fstest.MapFS{
		"bus/pci/devices/0000:00:01.0/modalias": {Data: []byte("pci:a\n")}, "bus/pci/devices/0000:00:02.0/modalias": {Data: []byte("pci:a\n")},
		"bus/virtio/devices/virtio0/modalias": {Data: []byte("virtio:b\n")}, "bus/usb/devices/x/modalias": {}, "bus/pci/drivers/y/modalias": {Data: []byte("no")},
	})
	if want := []string{"pci:a", "virtio:b"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func FuzzAliases(f *testing.F) {
	f.Add([]byte("alias pci:v*d* x\ndepends x y z\n"), "pci:v1d2")
	f.Add([]byte("alias a[ x\nalias * a\ndepends a b\ndepends b a\n"), "")
	f.Fuzz(func(t *testing.T, b []byte, device string) {
		m := &Modules{hw: []string{"001-a.ko", "002-b.ko"}, needs: map[string][]string{}}
		m.parseAliases(b)
		if got := m.wanted([]string{device}); len(got) > 2 {
			t.Errorf("%v", got)
		}
	})
}

func TestSettings(t *testing.T) {
	root := t.TempDir()
	for _, s := range settings {
		if s.optional {
			continue // a kernel may lack it
		}
		path := filepath.Join(root, s.name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, nil, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range settings {
		if s.optional {
			if err := os.MkdirAll(filepath.Join(root, filepath.Dir(filepath.Dir(s.name))), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := Settings(root); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(filepath.Join(root, "net/ipv4/ip_forward")); string(b) != "0" {
		t.Errorf("ip_forward is %q", b)
	}
	if err := Settings(t.TempDir() + "/none"); err == nil || !strings.Contains(err.Error(), "net.ipv4.ip_forward") {
		t.Errorf("a kernel without settings: %v", err)
	}
}

func TestParseStat(t *testing.T) {
	for _, tc := range []struct {
		line  string
		pid   int
		state string
		ppid  int
		ok    bool
	}{
		{"12 (gatewayd) Z 1 12 12 0", 12, "Z", 1, true},
		{"13 (a) Z 9 (b) S 4 1", 13, "S", 4, true},
		{"x (a) S 1", 0, "", 0, false},
		{"", 0, "", 0, false},
		{"5 (a) ", 0, "", 0, false},
	} {
		pid, state, ppid, ok := parseStat(tc.line)
		if pid != tc.pid || state != tc.state || ppid != tc.ppid || ok != tc.ok {
			t.Errorf("%q: %d %q %d %v", tc.line, pid, state, ppid, ok)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add("12 (gatewayd) Z 1 12 12 0")
	f.Fuzz(func(t *testing.T, s string) {
		if _, state, _, ok := parseStat(s); ok && state == "" {
			t.Errorf("%q has no state", s)
		}
	})
}

func TestZombies(t *testing.T) {
	cmd := exec.Command("/bin/true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if !zombies("/proc", os.Getpid())[pid] {
		t.Error("a dead child is not seen")
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if zombies("/proc", os.Getpid())[pid] {
		t.Error("a buried child is seen")
	}
}

func TestPowerPressed(t *testing.T) {
	event := func(kind, code uint16, value uint32) []byte {
		b := make([]byte, eventSize)
		binary.NativeEndian.PutUint16(b[16:], kind)
		binary.NativeEndian.PutUint16(b[18:], code)
		binary.NativeEndian.PutUint32(b[20:], value)
		return b
	}
	for name, tc := range map[string]struct {
		events []byte
		want   bool
	}{
		"press":       {bytes.Join([][]byte{event(0, 0, 0), event(evKey, keyPower, 1)}, nil), true},
		"release":     {event(evKey, keyPower, 0), false},
		"another key": {event(evKey, 30, 1), false},
		"half":        {event(evKey, keyPower, 1)[:20], false},
	} {
		if got := powerPressed(tc.events); got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestWatchdog: it is fed while all is well, starves when not, and is closed with the letter that stops it.
func TestWatchdog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "watchdog")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		ctx, cancel := context.WithCancel(t.Context())
		err := Watchdog(ctx, path, func() error {
			asked++
			switch {
			case asked == 3:
				return errors.New("something hangs")
			case asked == 5:
				cancel()
			}
			return nil
		}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Error(err)
		}
		if b, _ := os.ReadFile(path); string(b) != "\x00\x00\x00\x00V" {
			t.Errorf("it got %q", b)
		}
	})
	if err := Watchdog(t.Context(), filepath.Join(t.TempDir(), "none"), func() error { return nil }, nil); err == nil {
		t.Error("a machine without a watchdog says nothing")
	}
}
