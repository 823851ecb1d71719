package daemon

import (
	"context"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
)

// vendored runs `install --vendor` of a program whose start command has flags, as a package's maker does.
func vendored(t *testing.T, root string) *cobra.Command {
	t.Helper()
	var o Options
	up := &cobra.Command{Use: "up", RunE: func(*cobra.Command, []string) error { return nil }}
	o.Register(up, gatewaySpec)
	up.Flags().StringArray("allow", nil, "`CIDR` that may be reached")
	up.Flags().Int("standby", 1, "relays held besides the active one")
	Bind(up)
	program := &cobra.Command{Use: "gatewayd"}
	program.AddCommand(up, InstallCommand(gatewaySpec))
	program.SetErr(io.Discard)
	program.SetArgs([]string{"install", "--vendor", "--root", root})
	if code := run(context.Background(), program); code != ExitOK {
		t.Fatalf("install --vendor: exit %d", code)
	}
	return up
}

func TestVendor(t *testing.T) {
	root := t.TempDir()
	vendored(t, root)
	var files []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, strings.TrimPrefix(path, root))
		}
		return err
	})
	if want := []string{
		"/etc/sallyway/gatewayd.yaml", "/usr/lib/systemd/system/sallyway-gateway.service", "/usr/share/polkit-1/rules.d/50-sallyway-gateway.rules",
	}; err != nil || !slices.Equal(files, want) {
		t.Fatalf("%v: wrote %q, want %q", err, files, want)
	}
	unit, err := os.ReadFile(filepath.Join(root, files[1]))
	if err != nil {
		t.Fatal(err)
	}
	// The one template: what install writes on another host differs in the program's path and in who wrote it.
	other := t.TempDir()
	if code, out := runInstall(t, gatewaySpec, planted+"\n", "install", "--token-file", "-", "--root", other); code != ExitOK {
		t.Fatalf("exit %d: %s", code, out)
	}
	installed, err := os.ReadFile(filepath.Join(other, "etc/systemd/system/sallyway-gateway.service"))
	if err != nil {
		t.Fatal(err)
	}
	_, a, _ := strings.Cut(string(unit), "[Unit]")
	_, b, _ := strings.Cut(strings.ReplaceAll(string(installed), "/usr/local/bin/", "/usr/bin/"), "[Unit]")
	if a != b || a == "" {
		t.Errorf("package:\n%s\ninstall:\n%s", a, b)
	}

	// The example changes nothing as it is, and each of its lines is a setting once its comment is gone.
	example, err := os.ReadFile(filepath.Join(root, files[0]))
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string]any{}
	if err := yaml.Unmarshal(example, &keys); err != nil || len(keys) > 0 {
		t.Errorf("the example sets %v (%v)", keys, err)
	}
	var set strings.Builder
	for line := range strings.Lines(string(example)) {
		if rest, ok := strings.CutPrefix(line, "#"); ok && !strings.HasPrefix(rest, " ") {
			set.WriteString(rest)
		}
	}
	clear(keys)
	if err := yaml.Unmarshal([]byte(set.String()), &keys); err != nil {
		t.Fatalf("%v:\n%s", err, set.String())
	}
	for _, k := range []string{"allow", "standby", "log-level", "metrics-listen"} {
		if _, ok := keys[k]; !ok {
			t.Errorf("the example lacks %s", k)
		}
	}
	for _, k := range []string{"state", "token", "token-file", "config"} {
		if _, ok := keys[k]; ok {
			t.Errorf("the example offers %s, which is the unit's", k)
		}
	}
	path := filepath.Join(t.TempDir(), "example.yaml")
	if err := os.WriteFile(path, []byte(set.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	var o Options
	up := &cobra.Command{Use: "up", RunE: func(*cobra.Command, []string) error { return nil }}
	o.Register(up, gatewaySpec)
	up.Flags().StringArray("allow", nil, "")
	up.Flags().Int("standby", 7, "")
	Bind(up)
	up.SetArgs([]string{"--config", path})
	if err := up.Execute(); err != nil {
		t.Errorf("a file with all of it: %v", err)
	}
}

func TestVendorRefuses(t *testing.T) {
	for _, args := range [][]string{{"install", "--vendor"}, {"install", "--vendor", "--root", t.TempDir(), "--", "--standby", "0"}} {
		if os.Geteuid() != 0 && len(args) == 2 {
			continue // it asks for root first
		}
		if code, out := runInstall(t, gatewaySpec, "", args...); code != ExitUsage {
			t.Errorf("%q: exit %d: %s", args, code, out)
		}
	}
}

// TestInstallBesideAPackage shows that there is one unit, the package's, also where an install came before it.
func TestInstallBesideAPackage(t *testing.T) {
	root := t.TempDir()
	exists := func(path string) bool {
		_, err := os.Lstat(filepath.Join(root, path))
		return err == nil
	}
	const unit, polkit = "etc/systemd/system/sallyway-gateway.service", "etc/polkit-1/rules.d/50-sallyway-gateway.rules"
	const dropIn = "etc/systemd/system/sallyway-gateway.service.d/50-install.conf"
	if code, out := runInstall(t, gatewaySpec, planted, "install", "--root", root, "--token-file", "-"); code != ExitOK || !exists(unit) || !exists(polkit) {
		t.Fatalf("without a package: exit %d: %s", code, out)
	}
	if err := os.Remove(filepath.Join(root, "usr/local/bin/gatewayd")); err != nil {
		t.Fatal(err)
	}
	vendored(t, root)

	code, out := runInstall(t, gatewaySpec, planted, "install", "--root", root, "--token-file", "-", "--", "--standby", "0")
	if code != ExitOK || exists(unit) || exists(polkit) || exists("usr/local/bin/gatewayd") {
		t.Fatalf("exit %d: %s", code, out)
	}
	b, err := os.ReadFile(filepath.Join(root, dropIn))
	if want := "[Service]\nExecStart=\nExecStart=/usr/bin/gatewayd up --config /etc/sallyway/gatewayd.yaml --standby 0\n"; err != nil || !strings.HasSuffix(string(b), want) {
		t.Fatalf("%v: drop-in\n%s", err, b)
	}
	if code, out := runInstall(t, gatewaySpec, "", "install", "--root", root); code != ExitOK || exists(dropIn) || exists(unit) {
		t.Fatalf("without flags: exit %d: %s", code, out)
	}

	// A unit by somebody else's hand is theirs.
	theirs := filepath.Join(root, unit)
	if err := os.WriteFile(theirs, []byte("[Service]\nExecStart=/bin/true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, out := runInstall(t, gatewaySpec, "", "install", "--root", root); code != ExitOK || !exists(unit) {
		t.Fatalf("with a unit of the host's: exit %d: %s", code, out)
	}
	if err := os.Remove(theirs); err != nil {
		t.Fatal(err)
	}

	if code, out := runInstall(t, gatewaySpec, "", "uninstall", "--purge", "--root", root); code != ExitOK || !strings.Contains(out, "package sallyway-gateway") {
		t.Fatalf("uninstall: exit %d: %s", code, out)
	}
	for path, want := range map[string]bool{
		"etc/sallyway/gatewayd.token": false, "etc/sallyway/gatewayd.yaml": true,
		"usr/lib/systemd/system/sallyway-gateway.service": true, "usr/share/polkit-1/rules.d/50-sallyway-gateway.rules": true,
	} {
		if exists(path) != want {
			t.Errorf("after uninstall, %s is there: %v", path, !want)
		}
	}
}

// TestSystemctlBesideAPackage shows what systemd is told when an install's unit gives way to a package's.
func TestSystemctlBesideAPackage(t *testing.T) {
	root := t.TempDir()
	vendored(t, root)
	var calls []string
	in, err := newInstaller(gatewaySpec, root, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if err := in.write("/etc/systemd/system/sallyway-gateway.service", "# "+in.written()+"\n", 0o644); err != nil {
		t.Fatal(err)
	}
	in.live = true
	in.system = func(_ context.Context, args ...string) error {
		calls = append(calls, strings.Join(args, " "))
		return nil
	}
	for _, want := range [][]string{
		{"disable sallyway-gateway", "daemon-reload", "enable sallyway-gateway", "restart sallyway-gateway"},
		{"daemon-reload", "enable sallyway-gateway", "restart sallyway-gateway"},
	} {
		calls = nil
		if err := in.install(t.Context(), "token", nil, true); err != nil || !slices.Equal(calls, want) {
			t.Fatalf("%v: calls %q, want %q", err, calls, want)
		}
	}
	calls = nil
	if err := in.uninstall(t.Context(), false); err != nil || !slices.Equal(calls, []string{"disable --now sallyway-gateway", "daemon-reload"}) {
		t.Fatalf("uninstall: %v: %q", err, calls)
	}
}

func TestStateDirOfAUnit(t *testing.T) {
	t.Setenv("STATE_DIRECTORY", "/var/lib/private/sallyway/gatewayd")
	if got := DefaultStateDir("gatewayd"); got != "/var/lib/private/sallyway/gatewayd" {
		t.Errorf("in its unit: %s", got)
	}
	if got := DefaultStateDir("relayd"); strings.Contains(got, "gatewayd") {
		t.Errorf("another's: %s", got)
	}
	t.Setenv("STATE_DIRECTORY", "")
	if got := DefaultStateDir("gatewayd"); strings.Contains(got, "private") {
		t.Errorf("without a unit: %s", got)
	}
}
