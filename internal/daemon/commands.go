package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/version"
)

// Commands returns the commands that every daemon has besides its start command: status, doctor, healthcheck, version,
// down, install, uninstall.
func Commands(spec Spec) []*cobra.Command {
	return []*cobra.Command{
		StatusCommand(spec), DoctorCommand(spec), HealthcheckCommand(spec), VersionCommand(spec),
		DownCommand(spec), InstallCommand(spec), UninstallCommand(spec),
	}
}

// local is what commands that ask a running daemon have in common.
type local struct {
	spec  Spec
	state string
	json  bool
}

// bind adds the flag for the state folder, and --json where the command prints something for scripts.
func (l *local) bind(cmd *cobra.Command, withJSON bool) *cobra.Command {
	cmd.Args = cobra.NoArgs
	cmd.Flags().StringVar(&l.state, l.spec.stateFlag(), DefaultStateDir(l.spec.stateName()), "state folder of the daemon")
	if withJSON {
		cmd.Flags().BoolVar(&l.json, "json", false, "print JSON")
	}
	Bind(cmd)
	return cmd
}

// explain adds to ErrNotRunning how to start the daemon.
func (l *local) explain(err error) error {
	if errors.Is(err, ErrNotRunning) {
		return Failf("%w\nstart it with `%s`, or name its state folder with --%s", err, l.spec.startLine(), l.spec.stateFlag())
	}
	return err
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// StatusCommand prints the running daemon's status document.
func StatusCommand(spec Spec) *cobra.Command {
	l := &local{spec: spec}
	return l.bind(&cobra.Command{
		Use:   "status",
		Short: "Show what the running " + spec.Name + " does",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var doc json.RawMessage
			if err := Dial(l.state).Get(cmd.Context(), "/status", &doc); err != nil {
				return l.explain(err)
			}
			if !l.json && spec.RenderStatus != nil {
				return spec.RenderStatus(cmd.OutOrStdout(), doc)
			}
			var b bytes.Buffer
			if err := json.Indent(&b, doc, "", "  "); err != nil {
				return fmt.Errorf("answer of the daemon: %w", err)
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), string(bytes.TrimSpace(b.Bytes())))
			return err
		},
	}, true)
}

// DoctorCommand checks the host and, where it runs, the daemon; the exit code is 1 if any check fails.
func DoctorCommand(spec Spec) *cobra.Command {
	l := &local{spec: spec}
	var bundle string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check this host and say what to do about what is wrong",
		RunE: func(cmd *cobra.Command, _ []string) error {
			checks := examine(cmd.Context(), spec, l.state)
			if bundle != "" {
				if err := writeBundle(cmd.Context(), bundle, spec, l.state, checks, time.Now()); err != nil {
					return Failf("write the bundle: %w", err)
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "%s holds the checks, the status and facts of this host; addresses and names are in it, secrets are masked: look before you send it\n", bundle)
			}
			print := renderChecks
			if l.json {
				print = func(w io.Writer, checks []Check) error { return printJSON(w, checks) }
			}
			if err := print(cmd.OutOrStdout(), checks); err != nil {
				return err
			}
			if failed(checks) {
				return Silent(ExitDegraded)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&bundle, "bundle", "", "also write the findings to this file, a .tar.gz for whoever helps")
	return l.bind(cmd, true)
}

// HealthcheckCommand exits with 0 if the daemon runs and is ready, and else with 1: a container's health check. With --live it is about the process
// alone: whether to start it anew.
func HealthcheckCommand(spec Spec) *cobra.Command {
	l := &local{spec: spec}
	var live bool
	cmd := &cobra.Command{
		Use:   "healthcheck",
		Short: "Exit with 0 if " + spec.Name + " runs and is ready",
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, fine := "/readyz", "ready"
			if live {
				path, fine = "/livez", "live"
			}
			var doc json.RawMessage
			err := Dial(l.state).Get(cmd.Context(), path, &doc)
			var answer *AnswerError
			if errors.As(err, &answer) && !live {
				var r Readiness
				if json.Unmarshal([]byte(answer.Text), &r) == nil {
					text := "not ready"
					for _, c := range slices.Sorted(maps.Keys(r.Reasons)) {
						text += "\n" + c + ": " + r.Reasons[c]
					}
					if l.json {
						return errors.Join(printJSON(cmd.OutOrStdout(), r), Silent(ExitDegraded))
					}
					return Failf("%s", text)
				}
			}
			if err != nil {
				return l.explain(err)
			}
			if l.json {
				_, err = cmd.OutOrStdout().Write(doc)
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), fine)
			return err
		},
	}
	cmd.Flags().BoolVar(&live, "live", false, "only whether the process works, whatever it needs: for a liveness probe")
	return l.bind(cmd, true)
}

// VersionCommand prints the build.
func VersionCommand(spec Spec) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := version.Get()
			if asJSON {
				return printJSON(cmd.OutOrStdout(), v)
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), spec.Name, v)
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// DownCommand stops the running daemon and waits until it is gone. It exits with 0 also where none runs. Under systemd
// the daemon stays down until the next boot or `systemctl start`, since it exits with 0.
func DownCommand(spec Spec) *cobra.Command {
	l := &local{spec: spec}
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Stop the running " + spec.Name + "; it stays down",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			err := Dial(l.state).Post(ctx, "/down", nil, nil)
			if errors.Is(err, ErrNotRunning) {
				_, err := fmt.Fprintln(cmd.ErrOrStderr(), spec.Name, "is not running in", l.state)
				return err
			}
			if err != nil {
				return err
			}
			if err := waitUnlocked(ctx, l.state); err != nil {
				return Failf("%s was told to stop and still runs after %v: %w\nit may be draining: see `%s status`", spec.Name, timeout, err, spec.Name)
			}
			_, err = fmt.Fprintln(cmd.ErrOrStderr(), spec.Name, "stopped")
			return err
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 2*time.Minute, "how long to wait for it to end")
	return l.bind(cmd, false)
}

// DrainCommand tells the running daemon to move its work elsewhere and end. It does not wait.
func DrainCommand(spec Spec) *cobra.Command {
	l := &local{spec: spec}
	return l.bind(&cobra.Command{
		Use:   "drain",
		Short: "Tell the running " + spec.Name + " to take no new work and end when the old is gone",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := Dial(l.state).Post(cmd.Context(), "/drain", nil, nil); err != nil {
				return l.explain(err)
			}
			_, err := fmt.Fprintln(cmd.ErrOrStderr(), spec.Name, "drains")
			return err
		},
	}, false)
}

// DrainByCommand is DrainCommand with a deadline for what is under way.
func DrainByCommand(spec Spec, deadline time.Duration) *cobra.Command {
	l := &local{spec: spec}
	cmd := &cobra.Command{
		Use:   "drain",
		Short: "Tell the running " + spec.Name + " to take no new work and end when the old is gone, or at the deadline",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if deadline < 0 {
				return Usagef("--deadline %v is negative", deadline)
			}
			if err := Dial(l.state).Post(cmd.Context(), "/drain?deadline="+deadline.String(), nil, nil); err != nil {
				return l.explain(err)
			}
			_, err := fmt.Fprintf(cmd.ErrOrStderr(), "%s drains, for %v at most\n", spec.Name, deadline)
			return err
		},
	}
	cmd.Flags().DurationVar(&deadline, "deadline", deadline, "how long what is under way may take; then it is cut off")
	return l.bind(cmd, false)
}

// waitUnlocked waits until no daemon holds the state folder: a file lock has no wake-up with a deadline, so it looks again
// every unlockPoll.
func waitUnlocked(ctx context.Context, dir string) error {
	t := time.NewTicker(unlockPoll)
	defer t.Stop()
	for {
		held, err := locked(dir)
		if err != nil || !held {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
}

const unlockPoll = 50 * time.Millisecond
