package platformd

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
)

// run runs platformd's command line, and returns what it prints to standard output.
func run(ctx context.Context, args ...string) (out string, err error) {
	out, _, err = execute(ctx, args...)
	return out, err
}

func execute(ctx context.Context, args ...string) (out, told string, err error) {
	var b, e bytes.Buffer
	c := Command()
	c.SetArgs(args)
	c.SetOut(&b)
	c.SetErr(&e)
	err = c.ExecuteContext(ctx)
	return b.String(), e.String(), err
}

func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	for _, tc := range []struct {
		args string
		code int
		says string
	}{
		{"serve --database postgres://user:hunter2@db/x", daemon.ExitUsage, "--database-file"},
		{"serve --database mysql://user:hunter2@db/x", daemon.ExitUsage, "--database-file"},
		{"serve --database mysql://db/x", daemon.ExitUsage, "postgres://"},
		{"serve --database sqlite:/elsewhere.db", daemon.ExitUsage, "the file in the data folder"},
		{"serve --redis redis://h --metrics-listen=", daemon.ExitUsage, "alone on SQLite"},
		{"serve --redis redis://:hunter2@h", daemon.ExitUsage, "--redis-file"},
		{"serve --redis memcached://h", daemon.ExitUsage, "rediss://"},
		{"serve --redis redis://h --database postgres://db/x --metrics-listen=", daemon.ExitUsage, "--advertise-url"},
		{"serve --snapshot-life 1s", daemon.ExitUsage, "--snapshot-life"},
		{"serve --relay-credential-life 1s", daemon.ExitUsage, "--relay-credential-life"},
		{"serve --turn-key-rotation 1s", daemon.ExitUsage, "--turn-key-rotation"},
		{"serve --listen= --metrics-listen=", daemon.ExitUsage, "neither an HTTPS nor an HTTP address"},
		{"serve --listen 127.0.0.1:0 --metrics-listen= --tls-cert x", daemon.ExitUsage, "give both or none"},
		{"serve --listen 127.0.0.1:0 --metrics-listen= --advertise-url nonsense", daemon.ExitUsage, "not of the form https://host"},
		{"admin token", daemon.ExitDegraded, "platformd serve"},
		{"admin backup FILE", daemon.ExitDegraded, "there is no platform in"},
		{"admin restore FILE", daemon.ExitDegraded, "master key"},
		{"status", daemon.ExitDegraded, "not running"},
	} {
		data := filepath.Join(dir, strings.ReplaceAll(tc.args, "/", "_"))
		_, err := run(t.Context(), append(strings.Fields(tc.args), "--data", data)...)
		if err == nil || daemon.ExitCode(err) != tc.code || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: exit %d, %v, want %d with %q", tc.args, daemon.ExitCode(err), err, tc.code, tc.says)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the error repeats a password", tc.args)
		}
	}
}

// TestServe runs the daemon and the commands beside it.
func TestServe(t *testing.T) {
	dir := t.TempDir()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		// --state is the other name of --data.
		_, err := run(ctx, "serve", "--state", dir, "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")
		done <- err
	}()
	t.Cleanup(stop)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := run(ctx, "healthcheck", "--data", dir); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("not healthy: %v", err)
		}
	}
	out, err := run(ctx, "status", "--data", dir)
	if err != nil || !strings.Contains(out, "organization default") {
		t.Errorf("status: %q %v", out, err)
	}
	out, err = run(ctx, "admin", "token", "--data", dir, "--org", "default", "--read-only", "--expires", "1h")
	var cred control.AdminCredential
	if err != nil || json.Unmarshal([]byte(out), &cred) != nil || cred.Token == "" || cred.Pin == "" || !strings.HasPrefix(cred.URL, "https://127.0.0.1:") {
		t.Errorf("admin token: %+v %v", cred.URL, err)
	}
	if _, err := run(ctx, "admin", "token", "--data", dir, "--org", "nowhere"); err == nil {
		t.Error("a token for an organization that is not there")
	}
	backup := filepath.Join(t.TempDir(), "b.db")
	_, told, err := execute(ctx, "admin", "backup", backup, "--data", dir)
	if err != nil || !strings.Contains(told, "THE MASTER KEY IS NOT IN IT") || !strings.Contains(told, filepath.Join(dir, "master.key")) {
		t.Errorf("backup: %q %v", told, err)
	}
	noMasterIn(t, backup, filepath.Join(dir, "master.key"))
	if _, err := run(ctx, "admin", "restore", backup, "--data", dir); daemon.ExitCode(err) != daemon.ExitUsage || !strings.Contains(err.Error(), "already runs") {
		t.Errorf("restore under a running server: %v", err)
	}
	if out, err := run(ctx, "doctor", "--data", dir); err != nil || !strings.Contains(out, "chain whole") {
		t.Errorf("doctor: %q %v", out, err)
	}
	stop()
	if err := <-done; err != nil {
		t.Errorf("serve ended with %v", err)
	}
	if _, err := run(t.Context(), "admin", "restore", backup, "--data", dir); err != nil {
		t.Errorf("restore: %v", err)
	}
	if out, err := run(t.Context(), "admin", "migrate", "--data", dir); err != nil || !strings.HasPrefix(out, "schema ") {
		t.Errorf("migrate: %q %v", out, err)
	}
	for _, f := range []string{"platform.db", "master.key", "admin.token"} {
		if st, err := os.Stat(filepath.Join(dir, f)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v", f, err)
		}
	}
}

// noMasterIn wants a backup without the master key, neither as its file has it nor as bytes.
func noMasterIn(t *testing.T, backup, key string) {
	t.Helper()
	b, err := os.ReadFile(backup)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	text = bytes.TrimSpace(text)
	raw, err := hex.DecodeString(string(text))
	if err != nil {
		t.Fatal(err)
	}
	if len(raw) < 32 || bytes.Contains(b, text) || bytes.Contains(b, raw) {
		t.Errorf("the master key, of %d bytes, is in the backup", len(raw))
	}
}

// TestFlagsOfTheFrontDoor: what the documents promise to users stays.
func TestFlagsOfTheFrontDoor(t *testing.T) {
	find := func(path ...string) *cobra.Command {
		c, _, err := Command().Find(path)
		if err != nil || c.Name() != path[len(path)-1] {
			t.Fatalf("no command %v: %v", path, err)
		}
		return c
	}
	serve := find("serve")
	for _, f := range []string{"data", "state", "listen", "http-listen", "advertise-url", "database", "redis", "tls-cert", "tls-key", "config", "log-level"} {
		if serve.Flags().Lookup(f) == nil {
			t.Errorf("serve has no --%s", f)
		}
	}
	for _, c := range []string{"status", "doctor", "healthcheck", "install", "uninstall", "version", "down"} {
		find(c)
	}
	for _, c := range []string{"token", "backup", "restore", "migrate"} {
		find("admin", c)
	}
}
