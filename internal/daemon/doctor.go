package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// Result of one check of the doctor.
type Result string

// Results, from good to bad.
const (
	Pass Result = "PASS"
	Warn Result = "WARN" // works, with something missing
	Fail Result = "FAIL" // does not work
)

// Check is one row of the doctor.
type Check struct {
	Check  string `json:"check"`            // what was looked at
	Result Result `json:"result"`           // PASS, WARN or FAIL
	Detail string `json:"detail"`           // what was found
	Remedy string `json:"remedy,omitempty"` // what to do; empty on PASS
}

// failed says whether any check failed.
func failed(checks []Check) bool {
	for _, c := range checks {
		if c.Result == Fail {
			return true
		}
	}
	return false
}

// examine gathers the checks that need no daemon and, where one runs, its own.
func examine(ctx context.Context, spec Spec, stateDir string) []Check {
	checks := []Check{checkState(stateDir)}
	if spec.Checks != nil {
		checks = append(checks, spec.Checks(ctx, stateDir)...)
	}
	var online []Check
	err := Dial(stateDir).Get(ctx, "/doctor", &online)
	switch {
	case err == nil:
		checks = append(checks, Check{Check: "daemon", Result: Pass, Detail: "running"})
	case errors.Is(err, ErrNotRunning):
		checks = append(checks, Check{
			Check: "daemon", Result: Warn, Detail: "not running in " + stateDir,
			Remedy: fmt.Sprintf("start it: `%s`, or `systemctl start sallyway-%s` where it is installed", spec.startLine(), spec.Role),
		})
	default:
		checks = append(checks, Check{Check: "daemon", Result: Fail, Detail: err.Error(), Remedy: "run the doctor as root; if it still fails, restart the daemon"})
	}
	return append(checks, online...)
}

// renderChecks writes the checks as a table and their remedies below it.
func renderChecks(w io.Writer, checks []Check) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "CHECK\tRESULT\tDETAIL")
	for _, c := range checks {
		fmt.Fprintf(t, "%s\t%s\t%s\n", c.Check, c.Result, strings.ReplaceAll(c.Detail, "\n", "; "))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, c := range checks {
		if c.Result != Pass && c.Remedy != "" {
			if _, err := fmt.Fprintf(w, "\n%s: %s\n", c.Check, c.Remedy); err != nil {
				return err
			}
		}
	}
	return nil
}
