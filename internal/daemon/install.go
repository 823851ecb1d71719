package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// installer writes and removes a daemon's unit and what belongs to it.
type installer struct {
	spec   Spec
	root   string // everything is written below this folder; "" is the system itself
	vendor bool   // write what a package holds, below /usr, and nothing that belongs to one host
	live   bool   // the folder is the system's: use systemctl
	out    io.Writer
	exe    string                                          // the running program
	system func(ctx context.Context, args ...string) error // systemctl
}

func newInstaller(spec Spec, root string, out io.Writer) (*installer, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find the running program: %w", err)
	}
	return &installer{spec: spec, root: root, live: root == "", out: out, exe: exe, system: systemctl}, nil
}

func systemctl(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	if err != nil {
		return Failf("systemctl %s: %w\n%s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// booted says whether systemd runs this host (sd_booted(3)).
func booted() bool {
	fi, err := os.Lstat("/run/systemd/system")
	return err == nil && fi.IsDir()
}

// Paths as the installed system sees them. A package's files lie below /usr, and what install writes in /etc.
func (in *installer) unitPath() string {
	if in.vendor {
		return in.packagedUnit()
	}
	return "/etc/systemd/system/" + in.spec.unitName() + ".service"
}

// packagedUnit is the unit that a package brings.
func (in *installer) packagedUnit() string {
	return "/usr/lib/systemd/system/" + in.spec.unitName() + ".service"
}

// dropInPath changes the packaged unit: it holds the flags that were given to install.
func (in *installer) dropInPath() string {
	return "/etc/systemd/system/" + in.spec.unitName() + ".service.d/50-install.conf"
}

func (in *installer) tokenPath() string  { return "/etc/sallyway/" + in.spec.stateName() + ".token" }
func (in *installer) configPath() string { return "/etc/sallyway/" + in.spec.stateName() + ".yaml" }
func (in *installer) polkitPath() string {
	if in.vendor {
		return "/usr/share/polkit-1/rules.d/50-" + in.spec.unitName() + ".rules"
	}
	return "/etc/polkit-1/rules.d/50-" + in.spec.unitName() + ".rules"
}

func (in *installer) exePath() string {
	if in.vendor || in.packaged() {
		return "/usr/bin/" + in.spec.program()
	}
	return "/usr/local/bin/" + in.spec.program()
}

// packaged says whether a package has brought unit and program.
func (in *installer) packaged() bool {
	_, err := os.Stat(in.at(in.packagedUnit()))
	return err == nil
}

// own says whether install wrote the file at path.
func (in *installer) own(path string) bool {
	b, err := os.ReadFile(in.at(path))
	return err == nil && strings.HasPrefix(strings.TrimLeft(string(b), "/# "), fmt.Sprintf("Written by %q", in.spec.Name+" install"))
}

// at returns where a path of the installed system is written.
func (in *installer) at(path string) string { return filepath.Join(in.root, path) }

// write makes the folders above path and replaces the file.
func (in *installer) write(path, text string, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(in.at(path)), 0o755); err != nil {
		return fmt.Errorf("install: %w", err)
	}
	if err := WriteFile(in.at(path), []byte(text), mode); err != nil {
		return err
	}
	fmt.Fprintln(in.out, "wrote", in.at(path))
	return nil
}

// install writes everything and, on the system itself, starts the unit. It may be repeated; the newest token wins and
// the configuration file is left alone once it exists.
func (in *installer) install(ctx context.Context, token Secret, args []string, start bool) error {
	for _, a := range args {
		if a == "--token" || strings.HasPrefix(a, "--token=") {
			return Usagef("a token in a unit can be read by everybody\nhand it over with `install --token-file -`")
		}
		if urlPassword.MatchString(a) {
			return Usagef("a password in a unit can be read by everybody\nname the proxy without user and password, and hand these over by `systemctl edit %s`: LoadCredential=egress-proxy:FILE", in.spec.unitName())
		}
	}
	credential := ""
	if !in.spec.NoToken {
		credential = in.tokenPath()
		if _, err := os.Stat(in.at(credential)); token == "" && err != nil && !byAWS(args) {
			return Usagef("no token given\n`sallyway %s create NAME` prints one; then: %s install --token-file -", in.spec.Role, in.spec.Name)
		}
	}
	packaged := in.packaged()
	exe := in.exePath()
	if !packaged {
		var err error
		if exe, err = in.place(); err != nil {
			return err
		}
	}
	if credential != "" && token != "" {
		if err := in.write(credential, token.Reveal()+"\n", 0o600); err != nil {
			return err
		}
	}
	if _, err := os.Stat(in.at(in.configPath())); errors.Is(err, fs.ErrNotExist) {
		text := fmt.Sprintf("# Settings of %s: every flag of `%s --help` is a key, for example\n# log-level: debug\n", in.spec.Name, in.spec.startLine())
		if err := in.write(in.configPath(), text, 0o644); err != nil {
			return err
		}
	}
	var err error
	if packaged {
		err = in.adapt(ctx, exe, args)
	} else {
		err = in.writeUnit(exe, args)
	}
	if err != nil {
		return err
	}
	if !in.live {
		return nil
	}
	if err := in.system(ctx, "daemon-reload"); err != nil {
		return err
	}
	if err := in.system(ctx, "enable", in.spec.unitName()); err != nil {
		return err
	}
	if !start {
		return nil
	}
	// restart, since a repeated install may bring a new binary or token to a unit that runs
	if err := in.system(ctx, "restart", in.spec.unitName()); err != nil {
		return Failf("%w\nthe reason: journalctl -u %s -n 20", err, in.spec.unitName())
	}
	fmt.Fprintf(in.out, "%s runs; its log: journalctl -u %s\n", in.spec.unitName(), in.spec.unitName())
	return nil
}

// byAWS says whether flags of the start command have the node enrol by AWS, which takes no token.
func byAWS(args []string) bool {
	for i, a := range args {
		if a == "--auth=aws" || (a == "aws" && i > 0 && args[i-1] == "--auth") {
			return true
		}
	}
	return false
}

// written heads every file that install writes, so that it knows them again.
func (in *installer) written() string {
	return fmt.Sprintf("Written by %q; %q removes it.", in.spec.Name+" install", in.spec.Name+" uninstall")
}

// writeUnit writes the unit, and what lets it set up DNS.
func (in *installer) writeUnit(exe string, args []string) error {
	unit, err := in.spec.unit(exe, in.configPath(), in.tokenPath(), args)
	if err != nil {
		return err
	}
	head := in.written()
	if in.vendor {
		head = fmt.Sprintf("%q enables and starts it.", strings.TrimSuffix(in.spec.Name+" install --token-file -", in.noToken()))
	}
	head = fmt.Sprintf("# %s\n# Settings belong into %s; changes of the unit into \"systemctl edit %s\".\n", head, in.configPath(), in.spec.unitName())
	if err := in.write(in.unitPath(), head+unit, 0o644); err != nil {
		return err
	}
	if !in.spec.HostDNS {
		return nil
	}
	by := in.written()
	if in.vendor {
		by = "Split DNS of " + in.spec.unitName() + "."
	}
	return in.write(in.polkitPath(), "// "+by+"\n"+fmt.Sprintf(polkitRule, in.spec.unitName()), 0o644)
}

// noToken is what the install line of a daemon lacks that enrols nowhere.
func (in *installer) noToken() string {
	if in.spec.NoToken {
		return " --token-file -"
	}
	return ""
}

// adapt makes a package's unit run with args, by a drop-in, or without one where there are none. A unit that an
// install before the package wrote would hide the package's: it goes.
func (in *installer) adapt(ctx context.Context, exe string, args []string) error {
	if in.own(in.unitPath()) && in.live {
		if err := in.system(ctx, "disable", in.spec.unitName()); err != nil { // its link names the file that goes
			return err
		}
	}
	for _, p := range []string{in.unitPath(), in.polkitPath(), in.dropInPath()} {
		if !in.own(p) {
			continue
		}
		if err := os.Remove(in.at(p)); err != nil {
			return fmt.Errorf("install: %w", err)
		}
		if p != in.dropInPath() {
			fmt.Fprintf(in.out, "removed %s: the package has it\n", in.at(p))
		}
	}
	if len(args) == 0 {
		return nil
	}
	line, err := in.spec.execStart(exe, in.configPath(), args)
	if err != nil {
		return err
	}
	return in.write(in.dropInPath(), fmt.Sprintf("# %s\n[Service]\nExecStart=\nExecStart=%s\n", in.written(), line), 0o644)
}

// writeVendor writes what a package holds: unit, polkit rule and an example of the configuration. cmd is the start command.
func (in *installer) writeVendor(cmd *cobra.Command) error {
	if err := in.writeUnit(in.exePath(), nil); err != nil {
		return err
	}
	return in.write(in.configPath(), exampleConfig(in.spec, cmd), 0o644)
}

// place returns a path of the program that nobody but root can change, since a unit that runs a file in a user's
// folder hands that user the daemon. A program that lies elsewhere is copied to /usr/local/bin.
func (in *installer) place() (string, error) {
	if in.live && rootOwned(in.exe) {
		return in.exe, nil
	}
	target := in.at(in.exePath())
	if in.exe == target {
		return in.exePath(), nil
	}
	b, err := os.ReadFile("/proc/self/exe") // the program that runs, whatever lies at its path by now
	if err != nil {
		return "", fmt.Errorf("copy the program: %w", err)
	}
	return in.exePath(), in.write(in.exePath(), string(b), 0o755)
}

// rootOwned says whether only root can change or replace the file: it and every folder above it belong to root and are
// not writable by others. It is false for what ProtectHome hides from the unit and for what a reboot empties.
func rootOwned(path string) bool {
	for _, hidden := range []string{"/home/", "/root/", "/run/", "/tmp/", "/var/tmp/"} {
		if strings.HasPrefix(path, hidden) {
			return false
		}
	}
	for p := path; ; p = filepath.Dir(p) {
		fi, err := os.Lstat(p)
		if err != nil {
			return false
		}
		uid, known := owner(fi)
		if !known || uid != 0 || fi.Mode().Perm()&0o022 != 0 || fi.Mode()&fs.ModeSymlink != 0 {
			return false
		}
		if p == "/" {
			return true
		}
	}
}

// uninstall stops the unit and removes what install wrote. The state and the configuration stay, unless purge is set.
func (in *installer) uninstall(ctx context.Context, purge bool) error {
	_, err := os.Stat(in.at(in.unitPath()))
	packaged := in.packaged()
	if in.live && (err == nil || packaged) {
		if err := in.system(ctx, "disable", "--now", in.spec.unitName()); err != nil {
			return err
		}
	}
	gone := []string{in.unitPath(), in.tokenPath(), in.polkitPath(), in.dropInPath()}
	state := []string{"/var/lib/sallyway/" + in.spec.stateName(), "/var/lib/private/sallyway/" + in.spec.stateName()}
	if purge {
		if !packaged { // a package's file is dpkg's or rpm's to remove
			gone = append(gone, in.configPath())
		}
		gone = append(gone, state...)
	}
	for _, p := range gone {
		if _, err := os.Lstat(in.at(p)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := os.RemoveAll(in.at(p)); err != nil {
			return fmt.Errorf("uninstall: %w", err)
		}
		fmt.Fprintln(in.out, "removed", in.at(p))
	}
	_ = os.Remove(filepath.Dir(in.at(in.dropInPath()))) // where nothing else is in it
	if in.live {
		if err := in.system(ctx, "daemon-reload"); err != nil {
			return err
		}
	}
	if packaged {
		fmt.Fprintf(in.out, "program and unit belong to the package %s: remove that with apt or dnf\n", in.spec.packageName())
	}
	if !purge {
		fmt.Fprintf(in.out, "kept the state in %s; `%s uninstall --purge` removes it\n", in.at(state[0]), in.spec.Name)
	}
	return nil
}

// needRoot refuses what only root can do.
func needRoot(root, what string) error {
	if root == "" && os.Geteuid() != 0 {
		return Usagef("%s needs root\nrun it with sudo", what)
	}
	return nil
}

// InstallCommand writes a hardened systemd unit and starts it. Words after -- are flags of the start command.
func InstallCommand(spec Spec) *cobra.Command {
	var root string
	var noStart, vendor bool
	var token TokenFlags
	use := "install --token-file F|- [-- FLAGS]"
	if spec.NoToken {
		use = "install [-- FLAGS]"
	}
	cmd := &cobra.Command{
		Use:   use,
		Short: "Install " + spec.Name + " as the systemd unit " + spec.unitName() + " and start it",
		Args: func(cmd *cobra.Command, args []string) error {
			if cmd.ArgsLenAtDash() > 0 || (cmd.ArgsLenAtDash() < 0 && len(args) > 0) {
				return fmt.Errorf("unexpected %q; flags of `%s` go after --", args[0], spec.startLine())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := needRoot(root, spec.Name+" install"); err != nil {
				return err
			}
			if vendor {
				return installVendor(cmd, spec, root, args)
			}
			if root == "" && !booted() {
				return Usagef("systemd does not run this host\nrun `%s` under what starts its services, or write the unit for another host with --root DIR", spec.startLine())
			}
			var secret Secret
			if !spec.NoToken {
				var err error
				if secret, err = token.Read(cmd, slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))); err != nil {
					return err
				}
			}
			in, err := newInstaller(spec, root, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			return in.install(cmd.Context(), secret, args, !noStart)
		},
	}
	if !spec.NoToken {
		token.Register(cmd.Flags())
	}
	cmd.Flags().StringVar(&root, "root", "", "write below this folder and start nothing (for images and packages)")
	cmd.Flags().BoolVar(&vendor, "vendor", false, "write what a package holds, for those who make packages: the unit below /usr, an example of the configuration; with --root")
	cmd.Flags().BoolVar(&noStart, "no-start", false, "enable the unit for the next boot without starting it now")
	Bind(cmd)
	return cmd
}

// installVendor is `install --vendor`.
func installVendor(cmd *cobra.Command, spec Spec, root string, args []string) error {
	if root == "" || len(args) > 0 {
		return Usagef("--vendor writes a package's files below the folder that --root names, and takes no flags of `%s`", spec.startLine())
	}
	start := cmd.Root()
	for _, word := range append(strings.Fields(spec.Name)[1:], spec.Start...) {
		i := slices.IndexFunc(start.Commands(), func(c *cobra.Command) bool { return c.Name() == word })
		if i < 0 {
			return fmt.Errorf("%s has no command %q", start.Name(), word)
		}
		start = start.Commands()[i]
	}
	in, err := newInstaller(spec, root, cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	in.vendor = true
	return in.writeVendor(start)
}

// UninstallCommand reverses InstallCommand and keeps the state.
func UninstallCommand(spec Spec) *cobra.Command {
	var root string
	var purge bool
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Stop and remove the systemd unit " + spec.unitName() + "; the state is kept",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := needRoot(root, spec.Name+" uninstall"); err != nil {
				return err
			}
			in, err := newInstaller(spec, root, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			in.live = in.live && booted()
			return in.uninstall(cmd.Context(), purge)
		},
	}
	cmd.Flags().StringVar(&root, "root", "", "remove below this folder and stop nothing")
	cmd.Flags().BoolVar(&purge, "purge", false, "also remove the state and the configuration")
	return cmd
}
