package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyway/bench"
)

// TestFailoverBench makes one run each of a few causes as the benchmark does, with the real programs: no connection is lost, every byte is
// right, and the figures are written. How long anything took is not asserted.
func TestFailoverBench(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	cfg := bench.FailoverQuick()
	cfg.Bin, cfg.Labs = os.Getenv("SALLYWAY_BIN"), 1
	cfg.Causes, cfg.Loads = []string{bench.CauseKill, bench.CauseDrain, bench.CauseGateway}, []string{bench.LoadDown, bench.LoadIdle}
	res, err := bench.RunFailover(within(t, 4*time.Minute), cfg, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	if want := len(cfg.Causes)*len(cfg.Loads) + 1; len(res.Tries) != want || len(res.Rows) != want {
		t.Errorf("%d runs in %d rows, want %d", len(res.Tries), len(res.Rows), want)
	}
	for _, try := range res.Tries {
		if try.Silent || try.Wrong || try.New == 0 || try.Expect != (try.Cause == bench.CauseGateway) {
			t.Errorf("%+v", try)
		}
		if try.Expect {
			continue
		}
		// The cause took the path that was in use, and the connections are on another.
		if try.Lost != 0 || try.Stall == 0 || try.Path == "" || try.After == try.Path {
			t.Errorf("%+v", try)
		}
		if try.Load == bench.LoadDown && (try.Bytes == 0 || try.Bulk == 0) {
			t.Errorf("no stream: %+v", try)
		}
	}
	dir := t.TempDir()
	paths, err := res.Write(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(paths, func(p string) bool { return filepath.Ext(p) == ".svg" }) {
		t.Errorf("no picture: %q", paths)
	}
	i := slices.IndexFunc(paths, func(p string) bool { return filepath.Ext(p) == ".json" })
	if i < 0 {
		t.Fatalf("no JSON: %q", paths)
	}
	if back, err := bench.ReadFailover(paths[i]); err != nil || len(back.Tries) != len(res.Tries) {
		t.Errorf("what was written is read as %v", err)
	}
	if md := res.Markdown(); !strings.Contains(md, "## "+bench.CauseKill) || !strings.Contains(md, "| TCP connections lost") {
		t.Errorf("%s", md)
	}
}
