package oci_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// podman is an engine of the test's own: images, containers, volumes and locks are below one folder, and networks are namespaces that the test
// hands over, so nothing of the machine's own containers, firewall or bridges is touched.
type podman struct {
	dir string
}

// containersConf is what no flag of podman's says.
const containersConf = `[containers]
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
image_copy_tmp_dir = "%[1]s/copy"
[network]
network_config_dir = "%[1]s/networks"
`

// newPodman skips where there is no podman, which CI does not accept. What runs at the end of the test is removed.
func newPodman(t *testing.T) *podman {
	t.Helper()
	for _, program := range []string{"podman", "runc"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%s is not installed: build/prerequisites.sh", program)
		}
	}
	p := &podman{dir: t.TempDir()}
	for _, sub := range []string{"copy", "networks"} {
		if err := os.Mkdir(filepath.Join(p.dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(p.dir, "containers.conf"), fmt.Appendf(nil, containersConf, p.dir), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := p.run(ctx, "rm", "--all", "--force", "--time", "2"); err != nil {
			t.Errorf("containers remain: %v", err)
		}
	})
	return p
}

// run runs a podman command to its end and returns its standard output. The error has its standard error.
func (p *podman) run(ctx context.Context, args ...string) (string, error) {
	return p.runWith(ctx, "", args...)
}

// runWith is run with something to read for the command.
func (p *podman) runWith(ctx context.Context, stdin string, args ...string) (string, error) {
	all := []string{"--root=" + filepath.Join(p.dir, "root"), "--runroot=" + filepath.Join(p.dir, "run"), "--tmpdir=" + filepath.Join(p.dir, "tmp"), "--storage-driver=vfs"}
	cmd := exec.CommandContext(ctx, "podman", append(all, args...)...)
	// Health checks are run by the test: podman would make timers of systemd's for them.
	cmd.Env = append(os.Environ(), "CONTAINERS_CONF="+filepath.Join(p.dir, "containers.conf"), "DISABLE_HC_SYSTEMD=true")
	var out, errs bytes.Buffer
	if stdin != "" {
		cmd.Stdin = strings.NewReader(stdin)
	}
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("podman %s: %w\n%s%s", strings.Join(args, " "), err, out.String(), errs.String())
	}
	return out.String(), nil
}

// must is run for what has to succeed.
func (p *podman) must(t *testing.T, args ...string) string {
	t.Helper()
	return p.mustWith(t, "", args...)
}

func (p *podman) mustWith(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	out, err := p.runWith(t.Context(), stdin, args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// hardened are the arguments that every container of ours runs with: no capability, no way to get one, nothing to write but its volume.
// The limits are those that a host without CAP_SYS_RESOURCE can give.
var hardened = []string{
	"--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges",
	"--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096", "--no-hosts", "--dns=none",
}

// container starts a container in the background. Netns is the path of a network namespace.
func (p *podman) container(t *testing.T, name, image, netns string, args []string, command ...string) {
	t.Helper()
	run := append([]string{"run", "--detach", "--name=" + name, "--network=ns:" + netns, "--volume=" + name + ":/var/lib/sallyway"}, hardened...)
	p.must(t, append(append(append(run, args...), image), command...)...)
	t.Cleanup(func() {
		if t.Failed() {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			cmd := exec.CommandContext(ctx, "tail", "-n", "12", p.logPath(ctx, name))
			out, _ := cmd.CombinedOutput() // shown as it is
			t.Logf("log of %s:\n%s", name, out)
		}
	})
}

func (p *podman) logPath(ctx context.Context, name string) string {
	out, err := p.run(ctx, "inspect", "--format={{.HostConfig.LogConfig.Path}}", name)
	if err != nil {
		return os.DevNull
	}
	return strings.TrimSpace(out)
}

// health runs a container's health check once, as the engine does.
func (p *podman) health(ctx context.Context, name string) error {
	_, err := p.run(ctx, "healthcheck", "run", name)
	return err
}

// healthy waits until a container's health check passes, while it runs.
func (p *podman) healthy(t *testing.T, name string) {
	t.Helper()
	until(t, name+" is healthy", 45*time.Second, func() error {
		err := p.health(t.Context(), name)
		if err == nil {
			return nil
		}
		if gone := p.running(t.Context(), name); gone != nil {
			t.Fatal(gone)
		}
		return err
	})
}

// running says whether a container runs.
func (p *podman) running(ctx context.Context, name string) error {
	out, err := p.run(ctx, "inspect", "--format={{.State.Status}} {{.State.ExitCode}}", name)
	if err == nil && !strings.HasPrefix(out, "running") {
		err = fmt.Errorf("%s: %s", name, out)
	}
	return err
}

// until waits for f to return nil.
func until(t *testing.T, what string, patience time.Duration, f func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v: %v", what, patience, err)
		}
		select {
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		case <-time.After(250 * time.Millisecond):
		}
	}
}
