package daemon

import (
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
)

// Tuning is what a daemon asks of the Go runtime. A zero field leaves the runtime's default. The environment variables
// GOGC, GOMEMLIMIT and GOMAXPROCS win over it.
type Tuning struct {
	GCPercent   int   // as GOGC
	MemoryLimit int64 // bytes, as GOMEMLIMIT; zero means 90 % of the cgroup's limit where there is one
	MaxProcs    int   // threads running Go code, as GOMAXPROCS
}

// TuningOf is what was measured to be good for a daemon (docs/performance.md, "Runtime settings"). Garbage collection stays the
// runtime's own everywhere: less of it cost memory and brought nothing that could be seen.
//
// A client gets half of the cores, one at least. It is a guest on its host, where the programs whose traffic it carries and the kernel's
// network want the other half; and its goroutines work on one session's packets in turns, so that fewer threads hand them over less
// often. Gateways and relays serve many sessions at once and get every core.
func TuningOf(role string) Tuning {
	if role == "client" {
		return Tuning{MaxProcs: max(1, runtime.GOMAXPROCS(0)/2)}
	}
	return Tuning{}
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
