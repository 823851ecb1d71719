package daemon

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

var gatewaySpec = Spec{
	Name: "gatewayd", Role: "gateway", Start: []string{"up"},
	Capabilities: []string{"CAP_NET_ADMIN", "CAP_NET_RAW"}, Devices: []string{"/dev/net/tun rw"}, HostDNS: true,
}

// runInstall runs install or uninstall of spec below root.
func runInstall(t *testing.T, spec Spec, stdin string, args ...string) (int, string) {
	t.Helper()
	root := &cobra.Command{Use: spec.Name}
	root.AddCommand(InstallCommand(spec), UninstallCommand(spec))
	var errs bytes.Buffer
	root.SetIn(strings.NewReader(stdin))
	root.SetErr(&errs)
	root.SetArgs(args)
	return run(context.Background(), root), errs.String()
}

func TestInstall(t *testing.T) {
	root := t.TempDir()
	code, out := runInstall(t, gatewaySpec, planted+"\n", "install", "--token-file", "-", "--root", root, "--", "--standby", "0", "--name", `a "b" 100% $x`)
	if code != ExitOK || strings.Contains(out, planted) {
		t.Fatalf("exit %d: %s", code, out)
	}
	for path, mode := range map[string]fs.FileMode{
		"etc/systemd/system/sallyway-gateway.service":    0o644,
		"etc/sallyway/gatewayd.token":                    0o600,
		"etc/sallyway/gatewayd.yaml":                     0o644,
		"etc/polkit-1/rules.d/50-sallyway-gateway.rules": 0o644,
		"usr/local/bin/gatewayd":                         0o755,
	} {
		if fi, err := os.Stat(filepath.Join(root, path)); err != nil || fi.Mode().Perm() != mode {
			t.Errorf("%s: %v %v, want %v", path, fi, err, mode)
		}
	}
	token, err := os.ReadFile(filepath.Join(root, "etc/sallyway/gatewayd.token"))
	if err != nil || string(token) != planted+"\n" {
		t.Fatalf("token %q %v", token, err)
	}
	b, err := os.ReadFile(filepath.Join(root, "etc/systemd/system/sallyway-gateway.service"))
	if err != nil {
		t.Fatal(err)
	}
	unit := string(b)
	for _, want := range []string{
		`ExecStart=/usr/local/bin/gatewayd up --config /etc/sallyway/gatewayd.yaml --standby 0 --name "a \"b\" 100%% $$x"`,
		"Type=notify", "DynamicUser=yes", "StateDirectory=sallyway/gatewayd", "ProtectSystem=strict", "NoNewPrivileges=yes",
		"CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW\n", "DeviceAllow=/dev/net/tun rw", "LoadCredential=token:/etc/sallyway/gatewayd.token",
		"Restart=on-failure", "RestartPreventExitStatus=2 3", "SystemCallFilter=@system-service",
	} {
		if !strings.Contains(unit, want) {
			t.Errorf("unit lacks %q", want)
		}
	}
	if strings.Contains(unit, planted) || strings.Contains(unit, "PrivateDevices") {
		t.Errorf("unit:\n%s", unit)
	}

	// Again without a token: the old one stays, and so do the user's settings.
	config := filepath.Join(root, "etc/sallyway/gatewayd.yaml")
	if err := os.WriteFile(config, []byte("log-level: debug\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if code, out := runInstall(t, gatewaySpec, "", "install", "--root", root); code != ExitOK {
		t.Fatalf("again: exit %d: %s", code, out)
	}
	if b, _ := os.ReadFile(config); string(b) != "log-level: debug\n" {
		t.Fatalf("settings overwritten: %q", b)
	}

	state := filepath.Join(root, "var/lib/sallyway/gatewayd")
	if err := os.MkdirAll(state, 0o700); err != nil {
		t.Fatal(err)
	}
	if code, out := runInstall(t, gatewaySpec, "", "uninstall", "--root", root); code != ExitOK || !strings.Contains(out, "kept the state") {
		t.Fatalf("uninstall: exit %d: %s", code, out)
	}
	for path, want := range map[string]bool{
		"etc/systemd/system/sallyway-gateway.service": false, "etc/sallyway/gatewayd.token": false,
		"etc/polkit-1/rules.d/50-sallyway-gateway.rules": false, "etc/sallyway/gatewayd.yaml": true, "var/lib/sallyway/gatewayd": true,
	} {
		if _, err := os.Stat(filepath.Join(root, path)); (err == nil) != want {
			t.Errorf("after uninstall, %s: %v", path, err)
		}
	}
	if code, out := runInstall(t, gatewaySpec, "", "uninstall", "--purge", "--root", root); code != ExitOK {
		t.Fatalf("purge: exit %d: %s", code, out)
	}
	for _, path := range []string{config, state} {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after purge, %s: %v", path, err)
		}
	}
}

func TestInstallRefuses(t *testing.T) {
	for _, tc := range []struct {
		name string
		args []string
		want string
	}{
		{"no token", nil, "sallyway gateway create"},
		{"token in the unit", []string{"--token-file", "-", "--", "--token", planted}, "read by everybody"},
		{"token in the unit, one word", []string{"--token-file", "-", "--", "--token=" + planted}, "read by everybody"},
		{"a proxy's password in the unit", []string{"--token-file", "-", "--", "--egress-proxy", "http://ida:" + planted + "@proxy:3128"}, "LoadCredential=egress-proxy:"},
		{"flags before the dashes", []string{"surplus"}, "go after --"},
		{"line break", []string{"--token-file", "-", "--", "a\nExecStartPost=/bin/sh"}, "line break"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := t.TempDir()
			code, out := runInstall(t, gatewaySpec, planted, append([]string{"install", "--root", root}, tc.args...)...)
			if code != ExitUsage || !strings.Contains(out, tc.want) || strings.Contains(out, planted) {
				t.Fatalf("exit %d: %s", code, out)
			}
			if _, err := os.Stat(filepath.Join(root, "etc/systemd/system")); !errors.Is(err, fs.ErrNotExist) {
				t.Fatalf("a unit was written: %v", err)
			}
			if _, err := os.Stat(filepath.Join(root, "usr")); tc.args == nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatalf("the program was copied: %v", err)
			}
		})
	}
}

// TestInstallOfTwoWords shows a daemon that is a verb of a program: its files have no spaces in their names, and the
// unit runs the verb.
func TestInstallOfTwoWords(t *testing.T) {
	root := t.TempDir()
	spec := Spec{Name: "sallyway connect", Role: "client", StateName: "client"}
	if code, out := runInstall(t, spec, planted+"\n", "install", "--token-file", "-", "--root", root, "--", "--standby", "0"); code != ExitOK {
		t.Fatalf("exit %d: %s", code, out)
	}
	for _, path := range []string{"etc/sallyway/client.token", "etc/sallyway/client.yaml", "usr/local/bin/sallyway"} {
		if _, err := os.Stat(filepath.Join(root, path)); err != nil {
			t.Error(err)
		}
	}
	unit, err := os.ReadFile(filepath.Join(root, "etc/systemd/system/sallyway-client.service"))
	if want := "ExecStart=/usr/local/bin/sallyway connect --config /etc/sallyway/client.yaml --standby 0\n"; err != nil || !strings.Contains(string(unit), want) {
		t.Fatalf("%v: unit lacks %q:\n%s", err, want, unit)
	}
}

// TestSystemctl shows which commands the system gets, with a stand-in for systemctl and a folder for the system.
func TestSystemctl(t *testing.T) {
	var calls []string
	fail := ""
	in, err := newInstaller(Spec{Name: "platformd", Role: "platform", Start: []string{"serve"}, NoToken: true}, t.TempDir(), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	in.live = true
	in.system = func(_ context.Context, args ...string) error {
		calls = append(calls, strings.Join(args, " "))
		if args[0] == fail {
			return Failf("it failed")
		}
		return nil
	}
	expect := func(what string, err error, want ...string) {
		t.Helper()
		if err != nil || !slices.Equal(calls, want) {
			t.Fatalf("%s: %v, calls %q, want %q", what, err, calls, want)
		}
		calls = nil
	}
	expect("uninstall of nothing", in.uninstall(t.Context(), false), "daemon-reload")
	expect("install", in.install(t.Context(), "", nil, true), "daemon-reload", "enable sallyway-platform", "restart sallyway-platform")
	expect("install without start", in.install(t.Context(), "", nil, false), "daemon-reload", "enable sallyway-platform")
	fail = "restart"
	if err := in.install(t.Context(), "", nil, true); err == nil || !strings.Contains(err.Error(), "journalctl -u sallyway-platform") {
		t.Fatalf("a start that fails: %v", err)
	}
	calls, fail = nil, ""
	expect("uninstall", in.uninstall(t.Context(), false), "disable --now sallyway-platform", "daemon-reload")
}

func TestUnitIsValid(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("no systemd-analyze on this machine")
	}
	for _, spec := range []Spec{
		gatewaySpec,
		{Name: "relayd", Role: "relay", Start: []string{"start"}, Capabilities: []string{"CAP_NET_BIND_SERVICE"}},
		{Name: "platformd", Role: "platform", Start: []string{"serve"}, NoToken: true},
	} {
		token := "/etc/sallyway/x.token"
		if spec.NoToken {
			token = ""
		}
		unit, err := spec.unit("/bin/true", "/etc/sallyway/x.yaml", token, []string{"100% $x", ""})
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), spec.unitName()+".service")
		if err := os.WriteFile(path, []byte(unit), 0o644); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(analyze, "verify", "--man=no", path).CombinedOutput()
		if err != nil || strings.Contains(string(out), path) {
			t.Errorf("%s: %v: %s", spec.Name, err, out)
		}
	}
}

func TestRootOwned(t *testing.T) {
	for path, want := range map[string]bool{"/usr/bin/env": true, "/home/x/gatewayd": false, "/tmp/gatewayd": false, "/nonexistent": false} {
		if p, err := filepath.EvalSymlinks(path); err == nil {
			path = p
		}
		if got := rootOwned(path); got != want {
			t.Errorf("%s: %v, want %v", path, got, want)
		}
	}
}
