package client

import (
	"fmt"
	"io"
	"time"

	"sallyway/tunnel"
)

// PathReport is what status shows of one path of a session.
type PathReport struct {
	Path string          `json:"path"`
	Role tunnel.PathRole `json:"role"`
	// State is by the probes: unknown, alive, suspect or dead; Since is when it began.
	State tunnel.Liveness `json:"state"`
	Since time.Time       `json:"since,omitzero"`
	RTT   time.Duration   `json:"rtt_ns,omitempty"`
	// Loss is the lost share of the last 64 probes, 0 to 1.
	Loss float64 `json:"loss"`
	// HeldUntil is until when the session does not go back to the path because it was bad.
	HeldUntil time.Time `json:"held_until,omitzero"`
}

func reportPaths(p tunnel.PathInfo) []PathReport {
	report := func(role tunnel.PathRole, st tunnel.PathStatus) PathReport {
		return PathReport{
			Path: st.Info.Name, Role: role, State: st.State, Since: st.Since, RTT: st.Probes.RTT, Loss: st.Probes.Loss, HeldUntil: st.HeldUntil,
		}
	}
	out := []PathReport{report(tunnel.RoleActive, p.Active)}
	if p.Standby.Link != nil {
		out = append(out, report(tunnel.RoleStandby, p.Standby))
	}
	return out
}

// renderPaths writes the status lines about a session's paths.
func renderPaths(w io.Writer, g GatewayStatus) {
	for _, p := range g.Paths {
		fmt.Fprintf(w, "  %-8s %s %s", p.Role, p.Path, p.State)
		if !p.Since.IsZero() {
			fmt.Fprintf(w, " since %s", p.Since.Local().Format(time.DateTime))
		}
		fmt.Fprintf(w, ", RTT %v, %.0f %% of probes lost", p.RTT.Round(10*time.Microsecond), 100*p.Loss)
		if !p.HeldUntil.IsZero() {
			fmt.Fprintf(w, "; it was bad and is not gone back to before %s", p.HeldUntil.Local().Format(time.TimeOnly))
		}
		fmt.Fprintln(w)
	}
	if g.Moves > 0 {
		fmt.Fprintf(w, "  moved    at %s: %s\n", g.LastMoveAt.Local().Format(time.DateTime), g.LastMove)
	}
}
