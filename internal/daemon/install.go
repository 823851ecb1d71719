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
	"strings"

	"github.com/spf13/cobra"
)

// installer writes and removes a daemon's unit and what belongs to it.
type installer struct {
	spec   Spec
	root   string // everything is written below this folder; "" is the system itself
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

// Paths as the installed system sees them.
func (in *installer) unitPath() string {
	return "/etc/systemd/system/" + in.spec.unitName() + ".service"
}

func (in *installer) tokenPath() string  { return "/etc/sallyway/" + in.spec.stateName() + ".token" }
func (in *installer) configPath() string { return "/etc/sallyway/" + in.spec.stateName() + ".yaml" }
func (in *installer) polkitPath() string {
	return "/etc/polkit-1/rules.d/50-" + in.spec.unitName() + ".rules"
}
func (in *installer) exePath() string { return "/usr/local/bin/" + in.spec.program() }

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
		if _, err := os.Stat(in.at(credential)); token == "" && err != nil {
			return Usagef("no token given\n`sallyway %s create NAME` prints one; then: %s install --token-file -", in.spec.Role, in.spec.Name)
		}
	}
	exe, err := in.place()
	if err != nil {
		return err
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
	unit, err := in.spec.unit(exe, in.configPath(), credential, args)
	if err != nil {
		return err
	}
	if err := in.write(in.unitPath(), unit, 0o644); err != nil {
		return err
	}
	if in.spec.HostDNS {
		if err := in.write(in.polkitPath(), fmt.Sprintf(polkitRule, in.spec.Name, in.spec.unitName()), 0o644); err != nil {
			return err
		}
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
	if in.live && err == nil {
		if err := in.system(ctx, "disable", "--now", in.spec.unitName()); err != nil {
			return err
		}
	}
	gone := []string{in.unitPath(), in.tokenPath(), in.polkitPath()}
	state := []string{"/var/lib/sallyway/" + in.spec.stateName(), "/var/lib/private/sallyway/" + in.spec.stateName()}
	if purge {
		gone = append(gone, in.configPath())
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
	if in.live {
		if err := in.system(ctx, "daemon-reload"); err != nil {
			return err
		}
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
	var noStart bool
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
	cmd.Flags().BoolVar(&noStart, "no-start", false, "enable the unit for the next boot without starting it now")
	Bind(cmd)
	return cmd
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
