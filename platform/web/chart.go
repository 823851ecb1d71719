package web

import (
	"fmt"
	"html/template"
	"math"
	"strings"
	"time"

	"sallyway/platform/web/history"
)

// Measures of a chart, in units of its view box: about the pixels that it is shown in, so that its letters are neither large nor small.
const (
	narrowChart, wideChart = 420.0, 960.0
	chartHeight            = 190.0
	chartLeft, chartRight  = 68.0, 10.0
	chartTop, chartBottom  = 12.0, 24.0
	chartInnerH            = chartHeight - chartTop - chartBottom
)

// chart is a picture of throughput and the same in words, for those who can not see it.
type chart struct {
	SVG   template.HTML // for a narrow place
	Wide  template.HTML // the same for a wide one
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
	c.Words = fmt.Sprintf("Throughput over the last %s: at most %s/s, now %s/s.", span(now.Sub(points[0].At)), bytesText(c.Peak), bytesText(c.Now))
	c.SVG = drawChart(narrowChart, points, events, now, hasUp, c.Words)
	c.Wide = drawChart(wideChart, points, events, now, hasUp, c.Words)
	return c
}

// drawChart makes the picture in a width.
func drawChart(width float64, points []history.Point, events []history.Event, now time.Time, hasUp bool, words string) template.HTML {
	chartWidth, chartInnerW := width, width-chartLeft-chartRight
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
	fmt.Fprintf(&b, `<svg class="picture" viewBox="0 0 %g %g" role="img" aria-label="%s">`, chartWidth, chartHeight, template.HTMLEscapeString(words))
	for i := range 3 {
		v := top * float64(i) / 2
		fmt.Fprintf(&b, `<path class="axis" d="M%.1f %.1fH%.1f"/><text x="%.1f" y="%.1f" text-anchor="end">%s/s</text>`, chartLeft, y(v), chartWidth-chartRight, chartLeft-7, y(v)+4, bytesText(v))
	}
	parts := 4
	if width < wideChart {
		parts = 2
	}
	for i := range parts + 1 {
		at := start.Add(length * time.Duration(i) / time.Duration(parts))
		anchor := "middle"
		switch i {
		case 0:
			anchor = "start"
		case parts:
			anchor = "end"
		}
		text := "now"
		if i < parts {
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
			if first == last {
				path.WriteString("h2") // a single step is seen, too
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
	return template.HTML(b.String()) // numbers and our own words alone
}
