package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyway/internal/appliance/config"
	"sallyway/internal/appliance/console"
	"sallyway/internal/appliance/network"
	"sallyway/internal/appliance/supervise"
	"sallyway/internal/daemon"
)

// document is what the console needs of the status documents of the daemons: the fields of theirs that it shows. All of it is for people.
type document struct {
	Platform struct {
		Name      string `json:"name"`
		Platform  string `json:"platform"`
		Connected bool   `json:"connected"`
		Blocked   string `json:"blocked"`
		Error     string `json:"error"`
		Remedy    string `json:"remedy"`
	} `json:"platform"`
	// Of a gateway.
	Relays []struct {
		Name      string `json:"name"`
		Host      string `json:"host"`
		Up        bool   `json:"up"`
		Transport string `json:"transport"`
		Error     string `json:"error"`
		Stats     *struct {
			RTT time.Duration
		} `json:"stats"`
	} `json:"relays"`
	LastRung []struct {
		Up    bool   `json:"up"`
		Relay string `json:"relay"`
	} `json:"last_rung"`
	Resources []string `json:"resources"`
	Health    []struct {
		Name   string `json:"name"`
		OK     bool   `json:"ok"`
		Reason string `json:"reason"`
	} `json:"health"`
	Sessions []struct{} `json:"sessions"`
	// Of a relay.
	Listen netip.AddrPort `json:"listen"`
	Relay  *struct {
		Allocations int
		Connections int
	} `json:"relay"`
	// Of a platform.
	URL           string            `json:"url"`
	Conditions    map[string]string `json:"conditions"`
	Organizations []struct {
		Name     string                       `json:"name"`
		Relays   struct{ All, Reachable int } `json:"relays"`
		Gateways struct{ All, Reachable int } `json:"gateways"`
		Clients  struct{ All, Reachable int } `json:"clients"`
	} `json:"organizations"`
}

// view is what is known of one daemon at a moment.
type view struct {
	program program
	status  supervise.Status
	logs    []supervise.Line
	doc     document
	answers bool // its control socket does
	silent  bool // it did not answer this time, and the document is an older one
	ready   bool
	reasons map[string]string // why it is not
}

// askTimeout bounds a question to a daemon.
const askTimeout = 5 * time.Second

// look asks a daemon how it is.
func look(ctx context.Context, p program, d *supervise.Daemon) view {
	v := view{program: p, status: d.Status(), logs: d.Logs().Last(40)}
	if v.status.PID == 0 {
		return v
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	c := daemon.Dial(p.folder())
	var r daemon.Readiness
	err := c.Get(ctx, "/readyz", &r)
	var answer *daemon.AnswerError
	switch {
	case err == nil:
		v.answers, v.ready = true, r.Ready
	case errors.As(err, &answer):
		v.answers = true
		if json.Unmarshal([]byte(answer.Text), &r) == nil {
			v.reasons = r.Reasons
		}
	default:
		return v
	}
	var raw json.RawMessage
	if c.Get(ctx, "/status", &raw) == nil {
		v.doc = readStatus(raw)
	}
	return v
}

// after fills what a daemon that does not answer for once, on a busy machine, said the time before.
func (v view) after(before view) view {
	if v.status.PID != 0 && v.status.PID == before.status.PID && !v.answers && before.answers {
		v.doc, v.answers, v.silent = before.doc, true, true
	}
	return v
}

// readStatus takes what it can of a status document. A field of another shape than expected, in a future version, is left out.
func readStatus(raw json.RawMessage) document {
	var fields map[string]json.RawMessage
	if json.Unmarshal(raw, &fields) != nil {
		return document{}
	}
	var d document
	for name, value := range fields {
		if b, err := json.Marshal(map[string]json.RawMessage{name: value}); err == nil {
			var one document
			if json.Unmarshal(b, &one) == nil {
				_ = json.Unmarshal(b, &d) // it has just been read
			}
		}
	}

	return d
}

// lastError is the newest thing that is wrong with a daemon, "" when nothing is.
func (v view) lastError() string {
	if v.status.Exit != "" && v.status.State != supervise.Ready && v.status.State != supervise.Starting {
		return v.program.name + " " + v.status.Exit + v.said()
	}
	for _, k := range slices.Sorted(func(yield func(string) bool) {
		for k := range v.reasons {
			if !yield(k) {
				return
			}
		}
	}) {
		if k != "start" {
			return k + ": " + v.reasons[k]
		}
	}
	switch {
	case v.doc.Platform.Blocked != "":
		return "the platform does not talk to this node: " + v.doc.Platform.Blocked
	case v.answers && !v.doc.Platform.Connected && v.doc.Platform.Error != "":
		return "platform: " + v.doc.Platform.Error + remedy(v.doc.Platform.Remedy)
	}
	if v.status.State == supervise.Starting && !v.answers && v.status.Exit != "" {
		return v.program.name + " before: " + v.status.Exit + v.said()
	}
	return ""
}

func remedy(s string) string {
	if s == "" {
		return ""
	}
	return " (" + s + ")"
}

// said is what the daemon wrote last, as it ended: its message for people (see daemon.Main), which begins with its name.
func (v view) said() string {
	for i := len(v.logs) - 1; i >= 0; i-- {
		if text, ours := strings.CutPrefix(v.logs[i].Text, v.program.name+": "); ours {
			for _, l := range v.logs[i+1:] {
				text += "\n" + strings.TrimSpace(l.Text)
			}
			return ": " + text
		}
	}
	return ""
}

// rows are the daemon's part of the status block.
func (v view) rows() (rows, live []console.Row) {
	state := string(v.status.State)
	if v.status.State == supervise.Ready && !v.ready && !v.silent {
		state = "running, not ready"
	}
	if v.status.State == supervise.Starting && v.answers {
		state = "starting: waits for its platform"
	}
	if v.status.State == supervise.Refused {
		state = "stopped: it is tried again when the configuration changes, else every ten minutes"
	}
	if v.status.Restarts > 0 {
		state += fmt.Sprintf(" (restarts: %d)", v.status.Restarts)
	}
	rows = append(rows, console.Row{Name: string(v.program.role), Text: state})
	d := v.doc
	if p := d.Platform; p.Platform != "" {
		text := p.Platform + ", not connected"
		if p.Connected {
			text = p.Platform + ", connected"
		}
		rows = append(rows, console.Row{Name: "platform", Text: text})
	}
	switch v.program.role {
	case config.Gateway:
		for _, r := range d.Relays {
			text := fmt.Sprintf("relay %s (%s), down", r.Name, r.Host)
			if r.Up {
				text = fmt.Sprintf("relay %s (%s) by %s", r.Name, r.Host, strings.ToUpper(r.Transport))
			}
			rows = append(rows, console.Row{Name: "path", Text: text})
			if r.Up && r.Stats != nil && r.Stats.RTT > 0 {
				live = append(live, console.Row{Name: "RTT", Text: fmt.Sprintf("%v to %s", r.Stats.RTT.Round(10*time.Microsecond), r.Name)})
			}
			if !r.Up && r.Error != "" {
				rows = append(rows, console.Row{Text: r.Error})
			}
		}
		for _, l := range d.LastRung {
			if l.Up {
				rows = append(rows, console.Row{Name: "path", Text: "by SSH through " + l.Relay + " (last rung)"})
			}
		}
		if v.answers {
			rows = append(rows, console.Row{Name: "resources", Text: list(d.Resources, 8, "none yet")})
		}
		for _, h := range d.Health {
			if !h.OK {
				rows = append(rows, console.Row{Name: "unreached", Text: h.Name + ": " + h.Reason})
			}
		}
		if v.answers {
			live = append(live, console.Row{Name: "sessions", Text: strconv.Itoa(len(d.Sessions))})
		}
	case config.Relay:
		if d.Listen.IsValid() {
			rows = append(rows, console.Row{Name: "serving on", Text: d.Listen.String()})
		}
		if d.Relay != nil {
			live = append(live, console.Row{Name: "relaying", Text: fmt.Sprintf("%d allocations", d.Relay.Allocations)})
		}
	case config.Platform:
		if d.URL != "" {
			rows = append(rows, console.Row{Name: "URL", Text: d.URL})
		}
		for _, o := range d.Organizations {
			live = append(live, console.Row{Name: "nodes", Text: fmt.Sprintf("%s: relays %d/%d, gateways %d/%d, clients %d/%d reachable", o.Name,
				o.Relays.Reachable, o.Relays.All, o.Gateways.Reachable, o.Gateways.All, o.Clients.Reachable, o.Clients.All)})
		}
	}
	return rows, live
}

// list joins at most n names.
func list(names []string, n int, none string) string {
	switch {
	case len(names) == 0:
		return none
	case len(names) > n:
		return strings.Join(names[:n], ", ") + fmt.Sprintf(" and %d more", len(names)-n)
	}
	return strings.Join(names, ", ")
}

// addresses are those of all NICs.
func addresses(s network.Status) []string {
	out := []string{}
	for _, l := range s.Links {
		for _, a := range l.Addresses {
			out = append(out, a.Addr().String())
		}
	}
	return out
}

// networkRows are the NICs' part of the status block.
func networkRows(s network.Status) []console.Row {
	var rows []console.Row
	for _, l := range s.Links {
		text := l.Name + " " + l.MAC
		if l.Driver != "" {
			text += " (" + l.Driver + ")"
		}
		switch {
		case len(l.Addresses) > 0:
			var all []string
			for _, a := range l.Addresses {
				all = append(all, a.String())
			}
			text += " " + strings.Join(all, " ")
			if l.Source != "" {
				text += " by " + l.Source
			}
		case !l.Carrier:
			text += ", no cable or link"
		case l.Error != "":
			text += ", no address: " + l.Error
		default:
			text += ", no address yet"
		}
		rows = append(rows, console.Row{Name: "network", Text: text})
	}
	if len(rows) == 0 {
		rows = append(rows, console.Row{Name: "network", Text: "no NIC that this image has a driver for"})
	}
	ports := "none"
	if len(s.Ports) > 0 {
		ports = strings.Join(s.Ports, " ")
	}
	rows = append(rows, console.Row{Name: "open ports", Text: ports})
	if s.Error != "" {
		rows = append(rows, console.Row{Name: "problem", Text: s.Error})
	}
	return rows
}

// memory is how much of the machine's memory is used, in bytes.
func memory(meminfo string) (used, total uint64) {
	b, err := os.ReadFile(meminfo)
	if err != nil {
		return 0, 0
	}
	var available uint64
	for l := range strings.SplitSeq(string(b), "\n") {
		w := strings.Fields(l)
		if len(w) < 2 {
			continue
		}
		n, err := strconv.ParseUint(w[1], 10, 64)
		if err != nil {
			continue
		}
		switch w[0] {
		case "MemTotal:":
			total = n << 10
		case "MemAvailable:":
			available = n << 10
		}
	}
	return total - min(available, total), total
}
