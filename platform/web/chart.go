package web

import (
	"fmt"
	"html/template"
	"math"
	"strings"
	"time"

	"sallyway/platform/web/history"
)

// Measures of a chart, in units of its view box.
const (
	chartWidth, chartHeight  = 720.0, 190.0
	chartLeft, chartRight    = 62.0, 10.0
	chartTop, chartBottom    = 12.0, 24.0
	chartInnerW, chartInnerH = chartWidth - chartLeft - chartRight, chartHeight - chartTop - chartBottom
)

// chart is a picture of throughput and the same in words, for those who can not see it.
type chart struct {
	SVG   template.HTML
	Words string
	Empty bool
	// Peak and Now are bytes per second, both directions together.
	Peak, Now float64
}

// niceTop is the end of an axis: 1, 2 or 5 times a power of ten, not below v.
func niceTop(v float64) float64 {
	if v <= 0 {
		return 1000
	}
	p := math.Pow(10, math.Floor(math.Log10(v)))
	for _, m := range []float64{1, 2, 5, 10} {
		if m*p >= v {
			return m * p
		}
	}
	return 10 * p
}

// chartOf draws points; events are marked.
func chartOf(points []history.Point, events []history.Event, now time.Time) *chart {
	c := &chart{Empty: true}
	hasUp := false
	for _, p := range points {
		if p.Known {
			c.Empty = false
			c.Peak = max(c.Peak, p.Up+p.Down)
			c.Now = p.Up + p.Down
			hasUp = hasUp || p.Up > 0
		}
	}
	if len(points) == 0 || c.Empty {
		c.Words = "Nothing was measured in this time."
		c.Empty = true
		return c
	}
	top := 0.0
	for _, p := range points {
		top = max(top, p.Up, p.Down)
	}
	top = niceTop(top)
	start := points[0].At
	length := now.Sub(start)
	x := func(at time.Time) float64 {
		return chartLeft + chartInnerW*min(max(at.Sub(start).Seconds()/length.Seconds(), 0), 1)
	}
	y := func(v float64) float64 { return chartTop + chartInnerH*(1-min(v/top, 1)) }
	var b strings.Builder
	c.Words = fmt.Sprintf("Throughput over the last %s: at most %s/s, now %s/s.", span(length), bytesText(c.Peak), bytesText(c.Now))
	fmt.Fprintf(&b, `<svg class="picture" viewBox="0 0 %g %g" role="img" aria-label="%s">`, chartWidth, chartHeight, template.HTMLEscapeString(c.Words))
	for i := range 3 {
		v := top * float64(i) / 2
		fmt.Fprintf(&b, `<path class="axis" d="M%.1f %.1fH%.1f"/><text x="%.1f" y="%.1f" text-anchor="end">%s/s</text>`, chartLeft, y(v), chartWidth-chartRight, chartLeft-7, y(v)+4, bytesText(v))
	}
	for i := range 5 {
		at := start.Add(length * time.Duration(i) / 4)
		anchor := "middle"
		switch i {
		case 0:
			anchor = "start"
		case 4:
			anchor = "end"
		}
		text := "now"
		if i < 4 {
			text = span(now.Sub(at)) + " ago"
		}
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="%s">%s</text>`, x(at), chartHeight-6, anchor, text)
	}
	line := func(class string, value func(history.Point) float64, area bool) {
		var path strings.Builder
		open, first, last := false, 0.0, 0.0
		flush := func() {
			if !open {
				return
			}
			if area {
				fmt.Fprintf(&b, `<path class="area" d="%sL%.1f %.1fL%.1f %.1fZ"/>`, path.String(), last, y(0), first, y(0))
			}
			fmt.Fprintf(&b, `<path class="stroke%s" d="%s"/>`, class, path.String())
			path.Reset()
			open = false
		}
		for _, p := range points {
			if !p.Known {
				flush()
				continue
			}
			px := x(p.At)
			if !open {
				first, open = px, true
				fmt.Fprintf(&path, "M%.1f %.1f", px, y(value(p)))
			} else {
				fmt.Fprintf(&path, "L%.1f %.1f", px, y(value(p)))
			}
			last = px
		}
		flush()
	}
	line("", func(p history.Point) float64 { return p.Down }, true)
	if hasUp {
		line(" second", func(p history.Point) float64 { return p.Up }, false)
	}
	for _, e := range events {
		if e.Kind != history.Moved || e.At.Before(start) {
			continue
		}
		fmt.Fprintf(&b, `<path class="mark" d="M%.1f %.1fV%.1f"/><circle class="markdot" cx="%.1f" cy="%.1f" r="3"/>`, x(e.At), chartTop, chartTop+chartInnerH, x(e.At), chartTop)
	}
	b.WriteString(`</svg>`)
	c.SVG = template.HTML(b.String()) // numbers and our own words alone
	return c
}
