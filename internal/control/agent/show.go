package agent

import (
	"fmt"
	"io"
	"time"

	"sallyway/internal/daemon"
)

// Checks are the doctor's rows about the platform, the clock and the certificate.
func Checks(a *Agent) []daemon.Check {
	st := a.Status()
	row := daemon.Check{Check: "platform", Result: daemon.Pass, Detail: st.Platform + " connected"}
	switch {
	case st.Blocked != "":
		row.Result, row.Detail, row.Remedy = daemon.Fail, st.Blocked, "ask an administrator of the organization"
	case !st.Connected:
		row.Result, row.Detail, row.Remedy = daemon.Warn, st.Error, st.Remedy
	}
	clock := daemon.Check{Check: "clock", Result: daemon.Pass, Detail: fmt.Sprintf("%v off the platform's", st.ClockOffset.Round(time.Second))}
	if st.ClockOffset.Abs() > time.Minute {
		clock.Result, clock.Remedy = daemon.Warn, "set the clock (NTP): certificates are valid within minutes"
	}
	cert := daemon.Check{Check: "certificate", Result: daemon.Pass, Detail: "valid until " + st.CertificateExpiry.UTC().Format(time.RFC3339)}
	if time.Until(st.CertificateExpiry) < 0 {
		cert.Result, cert.Remedy = daemon.Fail, "let the node reach its platform, or enrol it with a new token"
	}
	return []daemon.Check{row, clock, cert}
}

// Render writes the lines of a status about the node and its platform.
func Render(w io.Writer, st Status) {
	state := "connected since " + st.Since.Local().Format(time.DateTime)
	if !st.Connected {
		state = "not connected: " + st.Error + st.Blocked
	}
	fmt.Fprintf(w, "node       %s (%v)\nplatform   %s %s\n", st.Name, st.Node, st.Platform, state)
}
