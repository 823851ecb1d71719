package bench

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// What is wanted of a platform. None of it fails a run: a machine with other work would.
const (
	nodesMemoryBar = 1536 // MiB, peak
	changeBar      = 2000 // milliseconds until the last node has it
	grantBar       = 20   // milliseconds, p99
	auditBar       = 2000 // entries a second
	pageBar        = 100  // milliseconds
)

func (r *PlatformResult) bars() []bar {
	var out []bar
	if n := r.Nodes; n != nil {
		most := max(n.Peak, n.ChangePeak)
		if r.Return != nil {
			most = max(most, r.Return.Peak)
		}
		out = append(out, bar{what: fmt.Sprintf("memory of the platform with %d nodes, at any time", n.Nodes), wanted: nodesMemoryBar, format: "%.0f MiB", got: mib(most)})
	}
	for _, c := range r.Changes {
		out = append(out, bar{what: fmt.Sprintf("%s: the last of %d nodes, slowest of %d runs", c.What, c.Nodes, c.Runs), wanted: changeBar, format: "%.0f ms", got: c.Slowest})
	}
	for _, g := range r.Grants {
		out = append(out, bar{what: fmt.Sprintf("grant on %s at %d a second, p99", g.Store, grantRate), wanted: grantBar, format: "%.1f ms", got: g.Grant.P99})
	}
	for _, a := range r.Audit {
		out = append(out, bar{what: "audit entries a second on " + a.Store, wanted: auditBar, atLeast: true, format: "%.0f", got: a.Rate})
	}
	var slowest PageTime
	for _, p := range r.Pages {
		if p.Times.P50 > slowest.Times.P50 {
			slowest = p
		}
	}
	if slowest.Page != "" {
		out = append(out, bar{what: "slowest page, median: " + cell(slowest.Page), wanted: pageBar, format: "%.0f ms", got: slowest.Times.P50})
	}
	return out
}

// Markdown is the result as tables.
func (r *PlatformResult) Markdown() string { return r.markdown("") }

func (r *PlatformResult) markdown(base string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# The platform, %s\n\nTimes are milliseconds, as median / p99 / most. The load runs on the same cores as the platform, so both tell their CPU seconds.\n", r.Started.Format("2006-01-02 15:04 MST"))
	for _, p := range r.pictures() {
		if base != "" {
			fmt.Fprintf(&b, "\n![%s](%s-%s.svg)\n", p.title, base, p.name)
		}
	}
	writeBars(&b, r.bars())
	r.nodesTable(&b)
	if len(r.Changes) > 0 {
		b.WriteString("\n| a change of policy | nodes | API | until a node has it | slowest run | KiB per node | CPU s platform / load |\n|---|---|---|---|---|---|---|\n")
	}
	for _, c := range r.Changes {
		fmt.Fprintf(&b, "| %s | %d | %.0f | %v | %.0f | %.1f | %.2f / %.2f |\n", c.What, c.Nodes, c.API, c.Times, c.Slowest, c.Bytes/1024, c.CPU.Platform, c.CPU.Load)
	}
	if len(r.Grants) > 0 {
		fmt.Fprintf(&b, "\n| %d clients a second start, on | for s | from dialling | from the connection on | failed | CPU s platform / database / load |\n|---|---|---|---|---|---|\n", grantRate)
	}
	for _, g := range r.Grants {
		fmt.Fprintf(&b, "| %s | %.0f | %v | %v | %d of %d | %.1f / %.1f / %.1f |\n", g.Store, g.For, g.Start, g.Grant, g.Failed, g.Wanted, g.CPU.Platform, g.CPU.Database, g.CPU.Load)
	}
	if len(r.Audit) > 0 {
		b.WriteString("\n| audit entries on | callers | a second |\n|---|---|---|\n")
	}
	for _, a := range r.Audit {
		fmt.Fprintf(&b, "| %s | %d | %.0f |\n", a.Store, a.Callers, a.Rate)
	}
	if o := r.PagesOf; len(r.Pages) > 0 {
		fmt.Fprintf(&b, "\nPages of an organization with %d gateways, %d resources and policies, %d clients, %d relays and %d sessions, %d times each, on %s:\n\n| page | time | KiB |\n|---|---|---|\n",
			o.Gateways, o.Resources, o.Clients, o.Relays, o.Sessions, pageRuns, o.Store)
	}
	for _, p := range r.Pages {
		fmt.Fprintf(&b, "| %s | %v | %d |\n", cell(p.Page), p.Times, p.Bytes>>10)
	}
	for _, f := range r.Failed {
		fmt.Fprintf(&b, "\nNot measured: %s\n", f)
	}
	(&Result{Machine: r.Machine, Command: r.Command, Started: r.Started, Took: r.Took}).footer(&b)
	return b.String()
}

func (r *PlatformResult) nodesTable(b *strings.Builder) {
	n := r.Nodes
	if n == nil {
		return
	}
	row := func(what, format string, args ...any) {
		fmt.Fprintf(b, "| %s | %s |\n", what, fmt.Sprintf(format, args...))
	}
	fmt.Fprintf(b, "\n| %d nodes, of them %d gateways and %d relays, on %s | |\n|---|---|\n", n.Nodes, n.Gateways, n.Relays, n.Store)
	row("created and enrolled by the API", "%.0f s, %.0f a second; CPU %.0f s platform, %.0f load", n.Enrol, float64(n.Nodes)/n.Enrol, n.EnrolCPU.Platform, n.EnrolCPU.Load)
	row("all connected", "after %.1f s, begun within %.0f s; CPU %.1f s platform, %.1f load", n.Connect, connectWithin.Seconds(), n.ConnectCPU.Platform, n.ConnectCPU.Load)
	row("memory of the platform", "%.0f MiB before, %.0f connected (%.0f KiB a node), %.0f at most", mib(n.Fresh), mib(n.RSS), float64(n.RSS-n.Fresh)/1024/float64(n.Nodes), mib(n.Peak))
	row(fmt.Sprintf("%.0f s at rest", n.Steady), "platform %.1f %% of a core, load %.1f %%; %d heartbeats, %d failed, %d renewals, %d streams lost", 100*n.SteadyCPU.Platform/n.Steady, 100*n.SteadyCPU.Load/n.Steady,
		n.Beats, n.Late, n.Renewals, n.Lost)
	if n.ChangePeak > 0 {
		row("memory while policies changed", "%.0f MiB at most", mib(n.ChangePeak))
	}
	if b := r.Return; b != nil {
		row("platform restarted", "away for %.1f s; nodes have their configuration after %v ms; CPU %.1f s platform, %.1f load; %.0f MiB at most", b.Down, b.Times, b.CPU.Platform, b.CPU.Load, mib(b.Peak))
		row("errors meanwhile", "until it was back: %s; after: %s", counts(b.Errors), counts(b.After))
	}
}

func counts(m map[string]int) string {
	if len(m) == 0 {
		return "none"
	}
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		parts = append(parts, fmt.Sprintf("%d %s", m[k], k))
	}
	return strings.Join(parts, ", ")
}

// pictures draws what there are figures for.
func (r *PlatformResult) pictures() []picture {
	where := (&Result{Machine: r.Machine, Started: r.Started}).where()
	var out []picture
	add := func(name string, c chart) {
		if c.where = where; len(c.rows) > 0 {
			out = append(out, picture{name, c.title, c.svg()})
		}
	}
	legend := []legendEntry{{ownStrong, "from the median (full) to p99 (hollow)"}, {inkTarget, "wanted at most"}}
	span := func(s Waits, limit float64) mark {
		return mark{low: s.P50, high: s.P99, limit: limit, colour: ownStrong, text: s.String()}
	}
	c := chart{title: "A change of policy", about: "from the request until a node has read its configuration", unit: "ms", legend: legend}
	for _, p := range r.Changes {
		c.rows = append(c.rows, chartRow{label: clipLabel(p.What), marks: []mark{span(p.Times, changeBar)}})
	}
	add("changes", c)
	c = chart{title: fmt.Sprintf("A client starts, %d a second", grantRate), about: "until it has its configuration with grants", unit: "ms", log: true, legend: legend}
	for _, g := range r.Grants {
		c.rows = append(c.rows, chartRow{label: g.Store + ", from dialling", marks: []mark{span(g.Start, 0)}}, chartRow{label: g.Store + ", from the connection on", marks: []mark{span(g.Grant, grantBar)}})
	}
	add("grants", c)
	c = chart{title: "Pages", about: fmt.Sprintf("of an organization with %d gateways, over a connection that stands", r.PagesOf.Gateways), unit: "ms", legend: legend}
	for _, p := range r.Pages {
		c.rows = append(c.rows, chartRow{label: clipLabel(p.Page), marks: []mark{span(p.Times, pageBar)}})
	}
	add("pages", c)
	return out
}

// labelMost is how many characters of a label fit beside a picture's marks.
const labelMost = 40

// clipLabel makes a label fit into a picture.
func clipLabel(s string) string {
	if len(s) > labelMost {
		return s[:labelMost] + "…"
	}
	return s
}

// Write puts the result into a folder as JSON, Markdown and pictures, and returns the paths.
func (r *PlatformResult) Write(dir string) ([]string, error) {
	name := "platform-" + r.Started.Format("20060102-150405")
	return writeResult(dir, name, r, r.markdown(name), r.pictures())
}
