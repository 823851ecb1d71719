package bench

import (
	"fmt"
	"math"
	"strings"
)

// Sizes of the picture in pixels.
const (
	plotWidth  = 760
	plotHeight = 360
	plotLeft   = 70
	plotBase   = 300 // y of the axis
	plotTop    = 40
)

// SVG draws the medians as bars on a logarithmic axis, raw TCP beside Sallyway.
func (r *Result) SVG() string {
	rows := r.Rows()
	low, high := 1e6, 1e7
	for _, row := range rows {
		high = max(high, row.Raw, row.Sallyway)
	}
	high = math.Pow(10, math.Ceil(math.Log10(high)))
	y := func(v float64) float64 {
		share := (math.Log10(max(v, low)) - math.Log10(low)) / (math.Log10(high) - math.Log10(low))
		return plotBase - share*(plotBase-plotTop)
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n", plotWidth, plotHeight)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="white"/>`+"\n")
	fmt.Fprintf(&b, `<text x="%d" y="20" font-size="14">TCP throughput by iperf3, Mbit/s, medians (commit %s)</text>`+"\n", plotLeft, r.Machine.Commit)
	for v := low; v <= high; v *= 10 {
		fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%.0f</text>`+"\n",
			plotLeft, plotWidth-10, y(v), y(v), plotLeft-6, y(v)+4, v/1e6)
	}
	step := float64(plotWidth-plotLeft-20) / float64(max(1, len(rows)))
	bar := step * 0.38
	for i, row := range rows {
		x := plotLeft + float64(i)*step + step*0.1
		for j, v := range []float64{row.Raw, row.Sallyway} {
			colour := [2]string{"#9aa5b1", "#1f6feb"}[j]
			fmt.Fprintf(&b, `<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="%s"/>`, x+float64(j)*bar, y(v), bar, plotBase-y(v), colour)
			fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="middle" font-size="10">%.0f</text>`+"\n", x+(float64(j)+0.5)*bar, y(v)-4, v/1e6)
		}
		fmt.Fprintf(&b, `<text x="%.1f" y="%d" text-anchor="middle">%d %s</text>`+"\n", x+bar, plotBase+18, row.Flows, direction(row.Down))
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d">flows and direction</text>`, plotLeft, plotBase+40)
	fmt.Fprintf(&b, `<rect x="300" y="%d" width="12" height="12" fill="#9aa5b1"/><text x="318" y="%d">%s</text>`, plotBase+30, plotBase+40, Raw)
	fmt.Fprintf(&b, `<rect x="420" y="%d" width="12" height="12" fill="#1f6feb"/><text x="438" y="%d">%s</text>`+"\n</svg>\n", plotBase+30, plotBase+40, Sallyway)
	return b.String()
}
