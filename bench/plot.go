package bench

import (
	"encoding/xml"
	"fmt"
	"math"
	"strings"
)

// Sizes of a picture in pixels.
const (
	plotWidth  = 900
	plotLabels = 280 // room for the rows' names
	plotRight  = 90  // room for a value beyond the longest bar
	markHeight = 15
	rowGap     = 10
	plotHead   = 64
	plotFoot   = 56
	charWidth  = 6.2 // of the font, about
)

// Colours: one hue is Sallyway, greys are everybody else; strong is up, pale is down.
const (
	ownStrong  = "#1f6feb"
	ownPale    = "#9cc2f8"
	peerStrong = "#6b7785"
	peerPale   = "#c3cad2"
	inkText    = "#1d2733"
	inkFaint   = "#5b6672"
	inkGrid    = "#e4e8ec"
	inkWhisker = "#11161c"
	inkTarget  = "#d1242f"
)

// chart is a picture of horizontal marks on one axis that begins at zero, or with log at the power of ten below the least.
type chart struct {
	title, about string
	where        string // of what run
	unit         string // of the axis
	log          bool
	rows         []chartRow
	legend       []legendEntry
	format       string // of values at marks
}

// chartRow is a name with some marks below each other.
type chartRow struct {
	label string
	head  bool // a heading without marks
	marks []mark
}

// mark is a bar of parts, a span from low to high without a bar, or dots. A bar's low and high are drawn as a whisker.
type mark struct {
	parts     []part
	low, high float64
	dots      []float64
	limit     float64 // a line that the mark should not pass, or should reach; zero is none
	colour    string  // of a span or dots
	text      string  // instead of the value
}

// part is a piece of a bar.
type part struct {
	value  float64
	colour string
	label  string // drawn where it fits
}

type legendEntry struct{ colour, text string }

// total is a bar's length.
func (m mark) total() float64 {
	var sum float64
	for _, p := range m.parts {
		sum += p.value
	}
	return sum
}

// most is the largest value of the mark.
func (m mark) most() float64 {
	most := max(m.total(), m.high, m.limit)
	for _, d := range m.dots {
		most = max(most, d)
	}
	return most
}

// least is the smallest value above zero; infinite where there is none.
func (m mark) least() float64 {
	least := math.Inf(1)
	for _, v := range append([]float64{m.low, m.high, m.total()}, m.dots...) {
		if v > 0 {
			least = min(least, v)
		}
	}
	return least
}

// svg draws the chart.
func (c chart) svg() string {
	height := plotHead + plotFoot
	var top, bottom float64 = 0, math.Inf(1)
	for _, r := range c.rows {
		height += rowGap + markHeight*max(1, len(r.marks))
		for _, m := range r.marks {
			top, bottom = max(top, m.most()), min(bottom, m.least())
		}
	}
	a := newAxis(bottom, top, c.log)
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="Helvetica, Arial, sans-serif" font-size="12" fill="%s">`+"\n",
		plotWidth, height, plotWidth, height, inkText)
	b.WriteString(`<rect width="100%" height="100%" fill="white"/>` + "\n")
	text(&b, 16, 26, "start", `font-size="17" font-weight="bold"`, c.title)
	text(&b, plotWidth-16, 26, "end", fmt.Sprintf(`fill=%q font-size="11"`, inkFaint), c.where)
	text(&b, 16, 46, "start", fmt.Sprintf(`fill=%q`, inkFaint), c.about)
	base := height - plotFoot
	for _, v := range a.ticks() {
		x := a.x(v)
		fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="%s"/>`+"\n", x, x, plotHead-4, base+4, inkGrid)
		text(&b, x, float64(base+18), "middle", fmt.Sprintf(`fill=%q font-size="11"`, inkFaint), number(v))
	}
	text(&b, plotWidth-16, float64(base+33), "end", fmt.Sprintf(`fill=%q font-size="11"`, inkFaint), c.unit)
	y := float64(plotHead)
	for _, r := range c.rows {
		style := ""
		if r.head {
			style = `font-weight="bold"`
		}
		tall := float64(markHeight * max(1, len(r.marks)))
		text(&b, plotLabels-12, y+tall/2+4, "end", style, r.label)
		for _, m := range r.marks {
			c.mark(&b, a, m, y)
			y += markHeight
		}
		if len(r.marks) == 0 {
			y += markHeight
		}
		y += rowGap
	}
	x := 16.0
	for _, l := range c.legend {
		fmt.Fprintf(&b, `<rect x="%.1f" y="%d" width="11" height="11" fill="%s"/>`, x, height-21, l.colour)
		text(&b, x+16, float64(height-11), "start", `font-size="11"`, l.text)
		x += 34 + charWidth*float64(len([]rune(l.text)))
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// mark draws one mark with its upper edge at y.
func (c chart) mark(b *strings.Builder, a axis, m mark, y float64) {
	const thick = markHeight - 3
	middle, end := y+thick/2.0, a.x(0)
	var sum float64
	for _, p := range m.parts {
		from, to := a.x(sum), a.x(sum+p.value)
		sum += p.value
		fmt.Fprintf(b, `<rect x="%.1f" y="%.1f" width="%.1f" height="%d" fill="%s"/>`+"\n", from, y, max(0, to-from), thick, p.colour)
		if p.label != "" && to-from > charWidth*float64(len([]rune(p.label)))+4 {
			text(b, (from+to)/2, y+thick-2.5, "middle", `font-size="9.5" fill="white"`, p.label)
		}
		end = to
	}
	if m.high > 0 && len(m.parts) > 0 && m.high > m.low {
		fmt.Fprintf(b, `<path d="M%.1f %.1fH%.1fM%.1f %.1fv4M%.1f %.1fv4" stroke="%s" fill="none"/>`+"\n",
			a.x(m.low), middle, a.x(m.high), a.x(m.low), middle-2, a.x(m.high), middle-2, inkWhisker)
		end = max(end, a.x(m.high))
	}
	if m.high > 0 && len(m.parts) == 0 {
		fmt.Fprintf(b, `<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke="%s" stroke-width="3"/>`, a.x(m.low), a.x(m.high), middle, middle, m.colour)
		fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="4.5" fill="%s"/><circle cx="%.1f" cy="%.1f" r="4" fill="white" stroke="%s" stroke-width="2"/>`+"\n",
			a.x(m.low), middle, m.colour, a.x(m.high), middle, m.colour)
		end = a.x(m.high) + 4
	}
	for _, d := range m.dots {
		fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="4" fill="%s" fill-opacity="0.65"/>`+"\n", a.x(d), middle, m.colour)
		end = max(end, a.x(d)+4)
	}
	if m.limit > 0 {
		fmt.Fprintf(b, `<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke="%s" stroke-width="2"/>`+"\n", a.x(m.limit), a.x(m.limit), y-1, y+thick+1, inkTarget)
	}
	label := m.text
	if label == "" && len(m.parts) > 0 {
		label = fmt.Sprintf(c.format, sum)
	}
	text(b, end+6, y+thick-2, "start", `font-size="11"`, label)
}

// text writes a text with its base at x, y.
func text(b *strings.Builder, x, y float64, anchor, style, s string) {
	if s == "" {
		return
	}
	fmt.Fprintf(b, `<text x="%.1f" y="%.1f" text-anchor="%s" %s>`, x, y, anchor, style)
	_ = xml.EscapeText(b, []byte(s)) // a Builder never fails
	b.WriteString("</text>\n")
}

// axis maps values to pixels.
type axis struct {
	from, to float64
	log      bool
}

// newAxis is an axis that holds values from low to high.
func newAxis(low, high float64, log bool) axis {
	if high <= 0 || math.IsInf(low, 1) {
		low, high = 1, 10
	}
	if log {
		return axis{from: math.Pow(10, math.Floor(math.Log10(low))), to: math.Pow(10, math.Ceil(math.Log10(high*0.999))), log: true}
	}
	return axis{to: high}
}

// x is where a value is. A value below the axis is at its start.
func (a axis) x(v float64) float64 {
	const width = plotWidth - plotLabels - plotRight
	at := v / a.to
	if a.log {
		at = math.Log10(max(v, a.from)/a.from) / math.Log10(a.to/a.from)
	}
	return plotLabels + width*min(max(at, 0), 1)
}

// ticks are round values on the axis.
func (a axis) ticks() []float64 {
	var out []float64
	if a.log {
		for v := a.from; v <= a.to*1.0001; v *= 10 {
			out = append(out, v)
		}
		return out
	}
	step := math.Pow(10, math.Floor(math.Log10(a.to)))
	for _, finer := range []float64{0.5, 0.4, 0.5} { // 0.5, 0.2, 0.1 of the power of ten
		if a.to/step >= 4 {
			break
		}
		step *= finer
	}
	for i := 0; float64(i)*step <= a.to; i++ {
		out = append(out, float64(i)*step)
	}
	return out
}

// number is a value at a tick.
func number(v float64) string {
	return strings.TrimSuffix(strings.TrimRight(fmt.Sprintf("%.6f", v), "0"), ".")
}
