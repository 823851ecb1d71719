package daemon

import (
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"testing"
)

func TestCgroupLimit(t *testing.T) {
	dir := t.TempDir()
	for text, want := range map[string]int64{"1000\n": 900, "max\n": 0, "": 0, "-5": 0} {
		file := filepath.Join(dir, "memory.max")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := cgroupLimit(file); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
	if got := cgroupLimit(filepath.Join(dir, "none")); got != 0 {
		t.Errorf("no file: %d", got)
	}
}

func TestTune(t *testing.T) {
	gc, limit, procs := debug.SetGCPercent(100), debug.SetMemoryLimit(-1), runtime.GOMAXPROCS(0)
	defer func() {
		debug.SetGCPercent(gc)
		debug.SetMemoryLimit(limit)
		runtime.GOMAXPROCS(procs)
	}()
	now := func() [3]int64 {
		p := debug.SetGCPercent(100)
		debug.SetGCPercent(p)
		return [3]int64{int64(p), debug.SetMemoryLimit(-1), int64(runtime.GOMAXPROCS(0))}
	}
	before := now()
	t.Setenv("GOGC", "50")
	t.Setenv("GOMEMLIMIT", "1GiB")
	t.Setenv("GOMAXPROCS", "1")
	Tune(Tuning{GCPercent: 400, MemoryLimit: 1 << 30, MaxProcs: procs + 1})
	if got := now(); got != before {
		t.Fatalf("the environment lost: %v, was %v", got, before)
	}
	for _, k := range []string{"GOGC", "GOMEMLIMIT", "GOMAXPROCS"} {
		t.Setenv(k, "")
	}
	Tune(Tuning{GCPercent: 400, MemoryLimit: 1 << 30, MaxProcs: procs + 1})
	if got, want := now(), [3]int64{400, 1 << 30, int64(procs + 1)}; got != want {
		t.Fatalf("got %v, want %v", got, want)
	}
}
