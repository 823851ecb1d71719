package agent

import (
	"cmp"
	"fmt"
	"io"
	"time"

	"sallyway/internal/daemon"
	"sallyway/internal/identity"
)

// Checks are the doctor's rows about the platform, the clock, the configuration and the certificate.
func Checks(a *Agent) []daemon.Check { return checks(a.Status(), a.cfg.Now()) }

func checks(st Status, now time.Time) []daemon.Check {
	platform := daemon.Check{Check: "platform", Result: daemon.Pass, Detail: st.Platform + " connected"}
	switch {
	case st.Blocked != "":
		platform.Result, platform.Detail, platform.Remedy = daemon.Fail, st.Blocked, st.Remedy
	case !st.Connected:
		platform.Result, platform.Detail = daemon.Warn, cmp.Or(st.Error, "not connected yet")
		platform.Remedy = cmp.Or(st.Remedy, "wait a moment and look again")
	}
	clock := daemon.Check{Check: "clock", Result: daemon.Pass, Detail: fmt.Sprintf("%v off the platform's", st.ClockOffset.Round(time.Second))}
	if st.ClockOffset.Abs() > time.Minute {
		clock.Result, clock.Remedy = daemon.Warn, fmt.Sprintf("set the clock (timedatectl set-ntp true): certificates are refused from %v on", identity.ClockSkew)
	}
	cert := daemon.Check{Check: "certificate", Result: daemon.Pass, Detail: "valid until " + st.CertificateExpiry.UTC().Format(time.RFC3339)}
	if st.CertificateExpiry.Before(now) {
		cert.Result, cert.Remedy = daemon.Fail, "let the node reach its platform, or enrol it with a new token"
	}
	out := []daemon.Check{platform, clock, cert}
	if st.ConfigError != "" {
		out = append(out, daemon.Check{Check: "configuration", Result: daemon.Fail, Detail: st.ConfigError, Remedy: "enrol the node with a new token if the platform was set back on purpose"})
	}
	return out
}

// Render writes the lines of a status about the node and its platform.
func Render(w io.Writer, st Status) {
	since := st.Since.Local().Format(time.DateTime)
	state := "connected since " + since
	switch {
	case st.Blocked != "":
		state = "refuses this node since " + since + ": " + st.Blocked
	case !st.Connected && st.Error == "":
		state = "not connected yet"
	case !st.Connected:
		state = "not connected since " + since + ": " + st.Error
	}
	fmt.Fprintf(w, "node       %s (%v)\nplatform   %s %s\n", st.Name, st.Node, st.Platform, state)
	for _, line := range []struct{ name, text string }{
		{"remedy", st.Remedy}, {"config", st.ConfigError}, {"policies", st.SnapshotError}, {"renewal", st.RenewError},
	} {
		if line.text != "" {
			fmt.Fprintf(w, "%-10s %s\n", line.name, line.text)
		}
	}
}
