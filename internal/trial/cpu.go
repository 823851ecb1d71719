package trial

import (
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// CPU is processor time since some moment in the past: only differences mean something.
type CPU struct {
	// Process is what this process has used, user and system; 0 where the system does not tell.
	Process time.Duration `json:"process_ns"`
	// Cores is how many cores the process may use at once.
	Cores int `json:"cores"`
	// HostBusy and HostTotal are of all cores of the host, whoever used them, in units of the host's own; 0 where they are not known.
	HostBusy  uint64 `json:"host_busy"`
	HostTotal uint64 `json:"host_total"`
}

// ReadCPU reads what was used so far.
func ReadCPU() CPU {
	c := CPU{Process: processTime(), Cores: runtime.GOMAXPROCS(0)}
	b, err := os.ReadFile("/proc/stat") // proc_stat(5): Linux only
	if err == nil {
		c.HostBusy, c.HostTotal = parseStat(string(b))
	}
	return c
}

// parseStat reads the line of all cores of /proc/stat: user nice system idle iowait irq softirq steal, then guests, which are in user. What
// a hypervisor gave to others counts as busy: it is not to be had.
func parseStat(s string) (busy, total uint64) {
	line, _, _ := strings.Cut(s, "\n")
	f := strings.Fields(line)
	if len(f) < 9 || f[0] != "cpu" {
		return 0, 0
	}
	for i, v := range f[1:9] {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			return 0, 0
		}
		total += n
		if i != 3 && i != 4 { // idle and waiting for a disk
			busy += n
		}
	}
	return busy, total
}

// Load is how much of the processors was used between two readings.
type Load struct {
	// Process is how many cores the process kept busy on average, of Cores.
	Process float64 `json:"process_cores"`
	Cores   int     `json:"cores"`
	// Host is the busy share of the whole host, 0 to 1; negative is not known.
	Host float64 `json:"host_share"`
}

// Since is the load between an earlier reading and c, which were took apart.
func (c CPU) Since(earlier CPU, took time.Duration) Load {
	l := Load{Cores: c.Cores, Host: -1}
	if took > 0 && c.Process > earlier.Process {
		l.Process = float64(c.Process-earlier.Process) / float64(took)
	}
	if total := c.HostTotal - earlier.HostTotal; c.HostTotal > earlier.HostTotal && c.HostBusy >= earlier.HostBusy {
		l.Host = float64(c.HostBusy-earlier.HostBusy) / float64(total)
	}
	return l
}
