package bench

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
)

// Markdown is the result as tables.
func (r *FailoverResult) Markdown() string { return r.markdown("") }

// markdown is the same with the pictures in it, as Write calls their files beside base.md; without base there are none.
func (r *FailoverResult) markdown(base string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Failover, %s\n\n"+
		"Milliseconds, as median / p95 / max of the runs. The stall is the longest time without an answer on one open TCP connection with an exchange every %d ms, the stream's the longest time without "+
		"a byte at the receiver of one that runs as fast as it goes; both include the time from the last answer before the cause. \"More\" is the stall less the longest one of the undisturbed window of the same "+
		"length just before, on the same connections. The load quiet is a connection on which nothing was said for %.0f s before and %.0f s after: its stall is the next byte's round trip. A new connection is one "+
		"begun after the cause, until it has brought an answer. The stall of a connection that is lost ends when a new one works.\n",
		r.Started.Format("2006-01-02 15:04 MST"), failoverPace.Milliseconds(), quietFor.Seconds(), quietAfter.Seconds())
	for _, p := range r.pictures() {
		if base != "" {
			fmt.Fprintf(&b, "\n![%s](%s-%s.svg)\n", p.title, base, p.name)
		}
	}
	r.overview(&b)
	writeEveryBar(&b, r.bars())
	last := ""
	for _, row := range r.Rows {
		if row.Cause != last {
			fmt.Fprintf(&b, "\n## %s\n\n%s\n\n| way | load | runs | stall | more | stream's stall | more | new connection | lost | MB checked | |\n|---|---|---|---|---|---|---|---|---|---|---|\n", row.Cause, aboutCause(row.Cause))
			last = row.Cause
		}
		lost := fmt.Sprintf("%d of %d", row.Lost, row.Open)
		stall, more := &row.Stall, &row.Excess
		if row.Expect {
			lost += " (by its nature)"
			stall, more, row.Bulk, row.BulkExcess = nil, nil, nil, nil
		}
		fmt.Fprintf(&b, "| %s | %s | %d | %s | %s | %s | %s | %s | %s | %d | %s |\n", row.Way, row.Load, row.Runs, stall, more, row.Bulk, row.BulkExcess, &row.New, lost, row.Bytes/1e6, row.more())
	}
	if slices.ContainsFunc(r.Rows, func(row FailoverRow) bool { return row.Way != Sallyway }) {
		b.WriteString(aboutFailoverPeers)
	}
	head := "\nNot measured:\n\n"
	for _, m := range r.Missing {
		why, _, _ := strings.Cut(m.Why, "\n")
		fmt.Fprintf(&b, "%s- %s: %s\n", head, m.Peer, why)
		head = ""
	}
	head = "\nRuns that were begun anew:\n\n"
	for _, f := range r.Failed {
		why, _, _ := strings.Cut(f, "\n")
		fmt.Fprintf(&b, "%s- %s\n", head, why)
		head = ""
	}
	fmt.Fprintf(&b, "\n%d labs at once, one of them in its windows at a time.\n", r.Labs)
	(&Result{Machine: r.Machine, Versions: r.Versions, Command: r.Command, Started: r.Started, Took: r.Took}).footer(&b)
	return b.String()
}

// aboutFailoverPeers says how other products are measured, and what they are not given.
const aboutFailoverPeers = `
Other products: what they have in the place of a relay is killed, or its host unplugged, for 10 s, and comes back; a process of either end that gives up is started again after a second, as a
service manager would. Nebula has two relays and OpenVPN two servers, and the one in use is hit. OpenSSH, wireguard-go and TURN have no second one by design: a tunnel, a peer and an allocation
are of one server. Not measured, since the bench has no way to install them: Infisical's gateways, Tailscale with a control server of one's own, Firezone, NetBird, OpenZiti, cloudflared, connet,
frp and chisel.
`

// row is that of a kind; nil where there is none.
func (r *FailoverResult) row(way, cause, load string) *FailoverRow {
	i := slices.IndexFunc(r.Rows, func(o FailoverRow) bool { return o.Way == way && o.Cause == cause && o.Load == load })
	if i < 0 {
		return nil
	}
	return &r.Rows[i]
}

// overview is one line per cause and way: the longest stall of the exchanges beside each load, of the streams, and what came of it.
func (r *FailoverResult) overview(b *strings.Builder) {
	head := "\n| cause | way | longest stall, up | down | idle | of the stream, up | down | new connection, idle | lost |\n|---|---|---|---|---|---|---|---|---|\n"
	for _, c := range Causes() {
		for _, way := range append([]string{Sallyway}, Peers()...) {
			var stalls, bulks [2]*Quantiles
			var idle, fresh *Quantiles
			open, lost, expect := 0, 0, false
			for i, load := range []string{LoadUp, LoadDown, LoadIdle} {
				row := r.row(way, c, load)
				if row == nil {
					continue
				}
				if open, lost = open+row.Open, lost+row.Lost; load == LoadIdle {
					fresh = &row.New
				}
				switch expect = expect || row.Expect; {
				case row.Expect: // its stalls have no end
				case load == LoadIdle:
					idle = &row.Stall
				default:
					stalls[i], bulks[i] = &row.Stall, row.Bulk
				}
			}
			if open == 0 {
				continue
			}
			share := fmt.Sprintf("%d of %d", lost, open)
			if expect {
				share += " (by its nature)"
			}
			fmt.Fprintf(b, "%s| %s | %s | %s | %s | %s | %s | %s | %s | %s |\n", head, c, way, stalls[0], stalls[1], idle, bulks[0], bulks[1], fresh, share)
			head = ""
		}
	}
}

// more is what a row has beside the usual figures.
func (row FailoverRow) more() string {
	var parts []string
	add := func(format string, args ...any) { parts = append(parts, fmt.Sprintf(format, args...)) }
	if row.Resumed != nil {
		add("resumed %s after one was back", row.Resumed)
	}
	if row.Back != nil {
		add("back on UDP after %s, stall meanwhile %s", row.Back, row.Climb)
	}
	if row.Cause == CauseDrain && row.Gaps > 0 {
		add("undisturbed p99.9 %.1f of %d answers", row.Undisturbed, row.Gaps)
	}
	if row.Cause == CauseDrain {
		add("dropped by relays and legs %d (%d before), sent again by QUIC %d (%d before)", row.Dropped, row.Before, row.Resent, row.ResentBefore)
	}
	if row.Never > 0 {
		add("not everything works again in %d", row.Never)
	}
	if row.Wrong > 0 {
		add("wrong bytes in %d", row.Wrong)
	}
	if row.Early > 0 {
		add("%d moves in undisturbed windows", row.Early)
	}
	return strings.Join(parts, "; ")
}

// String is the three figures; of nothing a dash.
func (q *Quantiles) String() string {
	if q == nil {
		return "–"
	}
	return fmt.Sprintf("%.0f / %.0f / %.0f", q.Median, q.P95, q.Max)
}

func aboutCause(name string) string {
	for _, c := range causes() {
		if c.name == name {
			return c.about
		}
	}
	return ""
}

// Colours of the curves: a cause has the same one in every picture.
var curveColours = []string{
	"#1f6feb", "#d1242f", "#2da44e", "#bf8700", "#8250df", "#0aa2a2", "#e85aad", "#6b4f2a", "#5b6672", "#9a6700", "#11161c", "#54aeff", "#ff8c42",
}

// curve is a cumulative distribution.
type curve struct {
	name, colour string
	dashed       bool
	values       []float64 // sorted
	lost         int       // connections, of the runs together
}

// label is the name with the number of runs. The stall of a connection that is lost ends with the next one that works.
func (c curve) label() string {
	if c.lost > 0 {
		return fmt.Sprintf("%s (%d; %d lost)", c.name, len(c.values), c.lost)
	}
	return fmt.Sprintf("%s (%d)", c.name, len(c.values))
}

// pictures are the distributions of the stalls, one for each load, and of peers next to ours.
func (r *FailoverResult) pictures() []picture {
	where := (&Result{Machine: r.Machine, Started: r.Started}).where()
	var out []picture
	names := Causes()
	for _, load := range []string{LoadUp, LoadDown, LoadIdle, LoadQuiet} {
		var curves []curve
		for i, c := range names {
			if v := r.stalls(Sallyway, c, load); len(v) > 0 && !slices.ContainsFunc(r.tries(Sallyway, c, load), func(t Try) bool { return t.Expect }) {
				curves = append(curves, curve{name: c, colour: curveColours[i%len(curveColours)], values: v})
			}
		}
		if len(curves) > 0 {
			title := "Longest stall of an open connection, load " + load
			out = append(out, picture{"cdf-" + load, title, distribution(title, where, curves)})
		}
	}
	for _, c := range names {
		var curves []curve
		for i, way := range append([]string{Sallyway}, Peers()...) {
			var v []float64
			lost := 0
			for _, load := range Loads() {
				v = append(v, r.stalls(way, c, load)...)
				for _, t := range r.tries(way, c, load) {
					lost += t.Lost
				}
			}
			if slices.Sort(v); len(v) > 0 {
				curves = append(curves, curve{name: way, colour: curveColours[i%len(curveColours)], values: v, dashed: way != Sallyway, lost: lost})
			}
		}
		if len(curves) > 1 {
			title := "Longest stall of an open connection, " + c
			out = append(out, picture{"cdf-" + c, title, distribution(title, where, curves)})
		}
	}
	return out
}

// stalls are those of a kind, sorted.
func (r *FailoverResult) stalls(way, cause, load string) []float64 {
	var v []float64
	for _, t := range r.tries(way, cause, load) {
		v = append(v, t.Stall)
	}
	slices.Sort(v)
	return v
}

// Sizes of a picture of curves, in pixels.
const (
	curveLeft   = 60
	curveRight  = 640
	curveBottom = 360
	curveWidth  = 1000
)

// distribution draws curves on a logarithmic axis of milliseconds.
func distribution(title, where string, curves []curve) string {
	low, high := math.Inf(1), 0.0
	for _, c := range curves {
		low, high = min(low, max(c.values[0], 1)), max(high, c.values[len(c.values)-1])
	}
	a := newAxis(low, high, true)
	if a.to <= a.from {
		a.to = a.from * 10
	}
	x := func(v float64) float64 {
		return curveLeft + (curveRight-curveLeft)*min(max(math.Log10(max(v, a.from)/a.from)/math.Log10(a.to/a.from), 0), 1)
	}
	y := func(share float64) float64 { return curveBottom - (curveBottom-plotHead)*share }
	height := max(curveBottom+48, plotHead+20*len(curves)+20)
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="Helvetica, Arial, sans-serif" font-size="12" fill="%s">`+"\n", curveWidth, height, curveWidth, height, inkText)
	b.WriteString(`<rect width="100%" height="100%" fill="white"/>` + "\n")
	text(&b, 16, 26, "start", `font-size="17" font-weight="bold"`, title)
	text(&b, curveWidth-16, 26, "end", fmt.Sprintf(`fill=%q font-size="11"`, inkFaint), where)
	text(&b, 16, 46, "start", fmt.Sprintf(`fill=%q`, inkFaint), "share of the runs whose longest stall was not longer")
	for _, v := range a.ticks() {
		fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="%s"/>`+"\n", x(v), x(v), plotHead, curveBottom+4, inkGrid)
		text(&b, x(v), curveBottom+18, "middle", fmt.Sprintf(`fill=%q font-size="11"`, inkFaint), number(v))
	}
	for _, share := range []float64{0, 0.25, 0.5, 0.75, 0.95, 1} {
		fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="%s"/>`+"\n", curveLeft, curveRight, y(share), y(share), inkGrid)
		text(&b, curveLeft-8, y(share)+4, "end", fmt.Sprintf(`fill=%q font-size="11"`, inkFaint), fmt.Sprintf("%.0f %%", 100*share))
	}
	text(&b, curveRight, curveBottom+34, "end", fmt.Sprintf(`fill=%q font-size="11"`, inkFaint), "ms")
	for i, c := range curves {
		dash := ""
		if c.dashed {
			dash = ` stroke-dasharray="5 3"`
		}
		fmt.Fprintf(&b, `<path d="%s" stroke="%s" stroke-width="2" fill="none"%s/>`+"\n", stair(c.values, x, y), c.colour, dash)
		at := float64(plotHead + 8 + 20*i)
		fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="%s" stroke-width="3"%s/>`, curveRight+24, curveRight+44, at, at, c.colour, dash)
		text(&b, curveRight+50, at+4, "start", `font-size="11"`, c.label())
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// stair is the path of a distribution: at each value it rises by one share.
func stair(values []float64, x, y func(float64) float64) string {
	var b strings.Builder
	fmt.Fprintf(&b, "M%.1f %.1f", x(values[0]), y(0))
	for i, v := range values {
		fmt.Fprintf(&b, "H%.1fV%.1f", x(v), y(float64(i+1)/float64(len(values))))
	}
	return b.String()
}

// ReadFailover reads a result that Write has written as JSON.
func ReadFailover(path string) (*FailoverResult, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := new(FailoverResult)
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if r.Format != format || r.Kind != failoverKind || len(r.Tries) == 0 {
		return nil, fmt.Errorf("%s is no result of failovers of this version of bench", path)
	}
	return r, nil
}
