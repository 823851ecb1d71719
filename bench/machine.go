package bench

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"sallyway/internal/lab"
	"sallyway/internal/version"
)

// Machine is where a run took place, and of what.
type Machine struct {
	CPU        string  `json:"cpu"`
	Cores      int     `json:"cores"`
	MemoryGiB  float64 `json:"memory_gib"`
	Kernel     string  `json:"kernel"`
	Congestion string  `json:"tcp_congestion_control"`
	Load       string  `json:"load_before"` // of /proc/loadavg
	Go         string  `json:"go"`
	Iperf3     string  `json:"iperf3"`
	Version    string  `json:"version"`
	Commit     string  `json:"commit"`
}

func thisMachine(ctx context.Context) Machine {
	v := version.Get()
	m := Machine{Cores: runtime.NumCPU(), Go: runtime.Version(), Version: v.Version, Commit: v.Commit}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var i unix.Sysinfo_t
	if unix.Sysinfo(&i) == nil {
		m.MemoryGiB = float64(uint64(i.Totalram)*uint64(i.Unit)>>20) / 1024 //nolint:unconvert // 32 bits on some architectures
	}
	m.CPU = cpuModel()
	m.Congestion = firstLine("/proc/sys/net/ipv4/tcp_congestion_control")
	m.Load = firstLine("/proc/loadavg")
	if path, err := lab.Program("iperf3"); err == nil {
		if out, err := exec.CommandContext(ctx, path, "--version").Output(); err == nil {
			m.Iperf3, _, _ = strings.Cut(string(out), "\n")
		}
	}
	return m
}

func firstLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return line
}

func cpuModel() string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		if key, value, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
