package daemon

import (
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
)

// Tuning is what a daemon asks of the Go runtime. A zero field leaves the runtime's default. The environment variables
// GOGC, GOMEMLIMIT and GOMAXPROCS win over it. What was measured, and why most daemons leave it zero, is in docs/performance.md, "Runtime
// settings".
type Tuning struct {
	GCPercent   int   // as GOGC
	MemoryLimit int64 // bytes, as GOMEMLIMIT; zero means 90 % of the cgroup's limit where there is one
	MaxProcs    int   // threads running Go code, as GOMAXPROCS
}

// cgroupMemory is where a cgroup v2 shows its memory limit inside its own namespace (containers).
const cgroupMemory = "/sys/fs/cgroup/memory.max"

// Tune applies t to this process. It is called once, at start.
func Tune(t Tuning) {
	if t.GCPercent != 0 && os.Getenv("GOGC") == "" {
		debug.SetGCPercent(t.GCPercent)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		limit := t.MemoryLimit
		if limit == 0 {
			limit = cgroupLimit(cgroupMemory)
		}
		if limit > 0 {
			debug.SetMemoryLimit(limit)
		}
	}
	if t.MaxProcs > 0 && os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(t.MaxProcs)
	}
}

// cgroupLimit returns 90 % of the limit in file, in bytes, and 0 where there is none.
func cgroupLimit(file string) int64 {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64) // "max" is no limit
	if err != nil || n <= 0 {
		return 0
	}
	return n / 10 * 9
}
