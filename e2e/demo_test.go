package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sallyway/internal/lab"
)

// TestDemo runs `make demo`'s program to its end, and again until it is interrupted: both times the machine is the same
// before and after, and nothing is left.
func TestDemo(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	labctl := filepath.Join(os.Getenv("SALLYWAY_BIN"), "labctl")
	before := must(lab.ReadMachineState())(t)
	folders := must(filepath.Glob(filepath.Join(os.TempDir(), "sallyway-lab-*")))(t)
	same := func(t *testing.T, out *buffer) {
		t.Helper()
		if d := before.Diff(must(lab.ReadMachineState())(t)); d != "" {
			t.Errorf("the machine is another one:\n%s", d)
		}
		if !strings.Contains(out.String(), "Cleaned up") {
			t.Error("the demo did not say that it cleaned up")
		}
		for _, f := range must(filepath.Glob(filepath.Join(os.TempDir(), "sallyway-lab-*")))(t) {
			if !strings.Contains(strings.Join(folders, " "), f) && strings.Contains(out.String(), f) {
				t.Errorf("%s is left", f)
			}
		}
	}
	t.Run("to its end", func(t *testing.T) {
		out := new(buffer)
		cmd := exec.CommandContext(within(t, 3*time.Minute), labctl, "demo", "--no-wait", "--bin", os.Getenv("SALLYWAY_BIN"))
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Run(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		for _, want := range []string{"Hello from the private network", "Mbit/s", "no policy allows", "A new connection worked"} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("the demo does not show %q", want)
			}
		}
		t.Logf("%s", out)
		same(t, out)
	})
	t.Run("interrupted", func(t *testing.T) {
		for _, sig := range []os.Signal{syscall.SIGINT, syscall.SIGTERM} {
			out := new(buffer)
			cmd := exec.CommandContext(within(t, 2*time.Minute), labctl, "demo", "--no-wait", "--bin", os.Getenv("SALLYWAY_BIN"))
			cmd.Stdout, cmd.Stderr = out, out
			check(t, cmd.Start())
			err := lab.Until(within(t, time.Minute), 20*time.Millisecond, func() error {
				if !strings.Contains(out.String(), "relayd enrols") {
					return &answerError{"demo", out.String()}
				}
				return nil
			})
			check(t, err)
			check(t, cmd.Process.Signal(sig))
			if err := cmd.Wait(); err != nil {
				t.Errorf("after %v: %v\n%s", sig, err, out)
			}
			same(t, out)
		}
	})
}

// buffer is a bytes.Buffer that may be read while a program writes.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
