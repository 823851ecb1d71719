package main

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
)

// tool finds a program of Debian's that `make prerequisites` installs.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skipf("%v: make prerequisites", err)
	}
	return path
}

func command(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestPackageVersion(t *testing.T) {
	at := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	// In the order in which they were built.
	builds := []struct {
		v    version
		want string
	}{
		{version{Commit: "0123456789ab", Time: at}, "0.0~git20261122100000.0123456789ab"},
		{version{Commit: "00a3456789ab", Time: at.Add(time.Second)}, "0.0~git20261122100001.00a3456789ab"},
		{version{Tag: "v0.9.0", Commit: "0123456789ab"}, "0.9.0"},
		{version{Tag: "v1.2.0-rc1", Commit: "0123456789ab"}, "1.2.0~rc1"},
		{version{Tag: "v1.2.0-rc1-3-g0123456", Commit: "0123456789ab"}, "1.2.0~rc1+3.g0123456"},
		{version{Tag: "v1.2.0-rc.2", Commit: "0123456789ab"}, "1.2.0~rc.2"},
		{version{Tag: "v1.2.0", Commit: "0123456789ab"}, "1.2.0"},
		{version{Tag: "v1.2.0", Commit: "0123456789ab-dirty"}, "1.2.0+dirty"},
		{version{Tag: "v1.2.0-4-g0123456", Commit: "0123456789ab"}, "1.2.0+4.g0123456"},
		{version{Tag: "v1.2.0-12-g0123456", Commit: "0123456789ab"}, "1.2.0+12.g0123456"},
		{version{Tag: "v1.10.0", Commit: "0123456789ab"}, "1.10.0"},
	}
	dpkg, rpm := tool(t, "dpkg"), tool(t, "rpm")
	for i, b := range builds {
		if got := packageVersion(b.v); got != b.want {
			t.Errorf("%+v: %s, want %s", b.v, got, b.want)
		}
		command(t, dpkg, "--validate-version", b.want)
		if i == 0 {
			continue
		}
		old := builds[i-1].want
		if strings.Contains(old, "dirty") {
			continue // + and a letter, after + and a digit for dpkg; nobody publishes one
		}
		command(t, dpkg, "--compare-versions", old, "lt", b.want)
		if out := strings.TrimSpace(command(t, rpm, "--eval", fmt.Sprintf("%%{lua:print(rpm.vercmp(%q, %q))}", old, b.want))); out != "-1" {
			t.Errorf("rpm: %s against %s: %s", old, b.want, out)
		}
	}
}

// staged lays a package out without packing it.
func staged(t *testing.T, p product, format string) string {
	t.Helper()
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, p.Program), []byte("#!/bin/sh\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	b := &builder{Version: version{Package: before, Commit: "0123456789ab", Time: time.Unix(1_700_000_000, 0).UTC()}, Arch: arch, Bin: bin}
	s := &stager{product: p, builder: b, format: format, root: filepath.Join(t.TempDir(), "stage")}
	if err := s.fill(); err != nil {
		t.Fatal(err)
	}
	return s.root
}

var exposureLine = regexp.MustCompile(`Overall exposure level for \S+: ([0-9.]+) `)

// TestUnits holds every unit below an exposure of 2.5 (systemd-analyze security: 0 is none, 10 is all), and has systemd read it.
func TestUnits(t *testing.T) {
	const most = 2.5
	analyze := tool(t, "systemd-analyze")
	for _, p := range products {
		root := staged(t, p, "deb")
		if err := os.Chmod(filepath.Join(root, "usr/bin", p.Program), 0o700); err != nil { //nolint:gosec // systemd looks whether it can be run
			t.Fatal(err)
		}
		unit := p.Unit + ".service"
		out := command(t, analyze, "security", "--offline=true", "--root="+root, unit)
		m := exposureLine.FindStringSubmatch(out)
		if m == nil {
			t.Fatalf("%s: no score in\n%s", unit, out)
		}
		score, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: exposure %.1f", unit, score)
		if score > most {
			t.Errorf("%s: exposure %.1f, at most %.1f is wanted\n%s", unit, score, most, out)
		}
		text, err := os.ReadFile(filepath.Join(root, "usr/lib/systemd/system", unit))
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), unit)
		here := strings.ReplaceAll(string(text), "ExecStart=/usr/bin/", "ExecStart="+root+"/usr/bin/")
		if err := os.WriteFile(path, []byte(here), 0o600); err != nil {
			t.Fatal(err)
		}
		if out := command(t, analyze, "verify", "--man=no", path); strings.Contains(out, unit) {
			t.Errorf("%s: %s", unit, out)
		}
	}
}

// TestContents looks at what packages hold as a distribution's checker does: paths, modes, owners, what counts as settings,
// a manual page of every command, and no trace of the machine that made them.
func TestContents(t *testing.T) {
	t.Parallel()
	dpkg, rpm := tool(t, "dpkg-deb"), tool(t, "rpm")
	_, nfpm := programs(t)
	out := t.TempDir()
	for _, arch := range []string{"amd64", "arm64"} {
		for _, p := range products {
			bin := t.TempDir()
			if err := os.WriteFile(filepath.Join(bin, p.Program), []byte("#!/bin/sh\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			b := &builder{Version: version{Package: before, Commit: "0123456789ab", Time: time.Unix(1_700_000_000, 0).UTC()}, Arch: arch, Bin: bin, Nfpm: nfpm}
			made, err := b.build(p, out)
			if err != nil {
				t.Fatal(err)
			}
			deb, rpmFile := made[0], made[1]
			if got := command(t, dpkg, "-f", deb, "Package", "Version", "Architecture"); got != fmt.Sprintf("Package: %s\nVersion: %s\nArchitecture: %s\n", p.Name, before, arch) {
				t.Errorf("%s: %s", deb, got)
			}
			if got := command(t, rpm, "-qp", "--qf", "%{NAME} %{VERSION} %{RELEASE} %{ARCH} %{LICENSE}", rpmFile); got != fmt.Sprintf("%s %s 1 %s Apache-2.0", p.Name, before, rpmArch[arch]) {
				t.Errorf("%s: %s", rpmFile, got)
			}
			contents(t, p, command(t, dpkg, "-c", deb))
			if got := command(t, dpkg, "--info", deb, "conffiles"); got != "/etc/sallyway/"+p.State+".yaml\n" {
				t.Errorf("conffiles of %s: %q", deb, got)
			}
			for _, script := range []string{"postinst", "prerm", "postrm"} {
				path := filepath.Join(t.TempDir(), script)
				if err := os.WriteFile(path, []byte(command(t, dpkg, "--info", deb, script)), 0o600); err != nil {
					t.Fatal(err)
				}
				command(t, "sh", "-n", path)
			}
			if got := command(t, rpm, "-qpl", rpmFile); strings.Count(got, "/man"+strconv.Itoa(p.Section)+"/") != pages(p.Root()) || strings.Contains(got, "vendor-completions") {
				t.Errorf("%s holds\n%s", rpmFile, got)
			}

			if arch != "amd64" {
				continue
			}
			// The same again is the same file.
			again, err := b.build(p, t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			for i := range made {
				if a, b := sum(t, made[i]), sum(t, again[i]); a != b {
					t.Errorf("%s was made twice and differs: %s, %s", made[i], a, b)
				}
			}
		}
	}
}

// contents judges a listing by dpkg-deb.
func contents(t *testing.T, p product, listing string) {
	t.Helper()
	modes := map[string]string{}
	for line := range strings.Lines(listing) {
		f := strings.Fields(line)
		mode, owner, path := f[0], f[1], strings.TrimPrefix(f[len(f)-1], ".")
		modes[path] = mode
		want := "-rw-r--r--"
		switch {
		case strings.HasSuffix(path, "/"):
			want = "drwxr-xr-x"
		case strings.HasPrefix(path, "/usr/bin/"):
			want = "-rwxr-xr-x"
		}
		if mode != want || owner != "root/root" {
			t.Errorf("%s: %s is %s %s, want %s root/root", p.Name, path, mode, owner, want)
		}
		if !strings.HasPrefix(path, "/usr/") && !strings.HasPrefix(path, "/etc/") && path != "/" || strings.HasPrefix(path, "/usr/local") {
			t.Errorf("%s: %s is no place for a package", p.Name, path)
		}
	}
	section := strconv.Itoa(p.Section)
	for _, path := range []string{
		"/usr/bin/" + p.Program, "/usr/lib/systemd/system/" + p.Unit + ".service", "/usr/lib/sysusers.d/" + p.Name + ".conf",
		"/etc/sallyway/" + p.State + ".yaml", "/usr/share/doc/" + p.Name + "/copyright", "/usr/share/doc/" + p.Name + "/changelog.gz",
		"/usr/share/man/man" + section + "/" + p.Program + "." + section + ".gz", "/usr/share/bash-completion/completions/" + p.Program,
		"/usr/share/zsh/vendor-completions/_" + p.Program, "/usr/share/fish/vendor_completions.d/" + p.Program + ".fish",
	} {
		if modes[path] == "" {
			t.Errorf("%s lacks %s", p.Name, path)
		}
	}
	if _, has := modes["/usr/lib/sysctl.d/50-"+p.Name+".conf"]; has != p.UDP {
		t.Errorf("%s has sysctls: %v", p.Name, has)
	}
	if got, want := strings.Count(listing, "/man"+section+"/")-1, pages(p.Root()); got != want { // and the folder
		t.Errorf("%s has %d manual pages, and %d commands", p.Name, got, want)
	}
}

// pages counts the commands that a person can see.
func pages(c *cobra.Command) int {
	n := 1
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() && !sub.IsAdditionalHelpTopicCommand() {
			n += pages(sub)
		}
	}
	return n
}

func sum(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(b))
}

// TestPagesAreRoots shows that defaults are those of root's daemon, whoever makes the package.
func TestPagesAreRoots(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", "/home/maker/.local/state")
	p := products[1]
	s := &stager{product: p, builder: &builder{}, format: "deb", root: t.TempDir()}
	up, _, err := s.tidy().Find([]string{"up"})
	if err != nil {
		t.Fatal(err)
	}
	if got := up.Flags().Lookup("state").DefValue; got != "/var/lib/sallyway/gatewayd" {
		t.Errorf("--state is %s", got)
	}
}

// TestCommandsAreThePrograms compares the commands that manual and completions are made from with those of the programs.
func TestCommandsAreThePrograms(t *testing.T) {
	bin, _ := programs(t)
	for _, p := range products {
		help := command(t, filepath.Join(bin, p.Program), "--help")
		_, list, _ := strings.Cut(help, "Available Commands:\n")
		list, _, _ = strings.Cut(list, "\n\n")
		var want []string
		for line := range strings.Lines(list) {
			if m := regexp.MustCompile(`^  ([a-z0-9-]+) +\S`).FindStringSubmatch(line); m != nil && m[1] != "completion" && m[1] != "help" {
				want = append(want, m[1])
			}
		}
		var got []string
		for _, c := range p.Root().Commands() {
			if c.IsAvailableCommand() {
				got = append(got, c.Name())
			}
		}
		slices.Sort(want)
		slices.Sort(got)
		if len(want) < 5 || !slices.Equal(want, got) {
			t.Errorf("%s has %q, the package's pages are of %q", p.Program, want, got)
		}
	}
}
