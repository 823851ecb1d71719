package bench

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Row is the median of the runs of one kind.
type Row struct {
	Flows    int
	Down     bool
	Raw      float64            // bit/s
	Sallyway float64            // bit/s
	CPUPerGB float64            // seconds of all our processes
	ByProc   map[string]float64 // seconds per GB
}

// Ratio is Sallyway's share of raw TCP; 0 where raw TCP was not measured.
func (r Row) Ratio() float64 {
	if r.Raw == 0 {
		return 0
	}
	return r.Sallyway / r.Raw
}

// Rows sums the runs up, by flows and direction.
func (r *Result) Rows() []Row {
	type kind struct {
		flows int
		down  bool
	}
	speeds := make(map[kind]map[string][]float64)
	cpu := make(map[kind]map[string][]float64)
	for _, t := range r.Throughput {
		k := kind{t.Flows, t.Down}
		if speeds[k] == nil {
			speeds[k], cpu[k] = make(map[string][]float64), make(map[string][]float64)
		}
		speeds[k][t.Way] = append(speeds[k][t.Way], t.BitsPerSecond)
		for p, s := range t.CPU {
			if t.Bytes > 0 && t.Way == Sallyway {
				cpu[k][p] = append(cpu[k][p], s/(float64(t.Bytes)/1e9))
			}
		}
	}
	var rows []Row
	for k, ways := range speeds {
		row := Row{Flows: k.flows, Down: k.down, Raw: median(ways[Raw]), Sallyway: median(ways[Sallyway]), ByProc: make(map[string]float64)}
		for p, s := range cpu[k] {
			row.ByProc[p] = median(s)
			row.CPUPerGB += row.ByProc[p]
		}
		rows = append(rows, row)
	}
	slices.SortFunc(rows, func(a, b Row) int {
		if c := cmp.Compare(a.Flows, b.Flows); c != 0 {
			return c
		}
		return strings.Compare(direction(b.Down), direction(a.Down)) // up first
	})
	return rows
}

// median of nothing is 0.
func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// Markdown is the result as tables.
func (r *Result) Markdown() string {
	var b strings.Builder
	if r.alone(&b) {
		r.footer(&b)
		return b.String()
	}
	fmt.Fprintf(&b, "Throughput through TUN → netstack → QUIC → relay → gateway, next to raw TCP over the same veths; medians.\n\n")
	fmt.Fprintf(&b, "| flows | direction | raw TCP Mbit/s | Sallyway Mbit/s | of raw | CPU s/GB |")
	procs := r.processNames()
	for _, p := range procs {
		fmt.Fprintf(&b, " %s |", p)
	}
	b.WriteString("\n|---|---|---|---|---|---|" + strings.Repeat("---|", len(procs)) + "\n")
	for _, row := range r.Rows() {
		fmt.Fprintf(&b, "| %d | %s | %.0f | %.0f | %.1f %% | %.1f |", row.Flows, direction(row.Down), row.Raw/1e6, row.Sallyway/1e6, 100*row.Ratio(), row.CPUPerGB)
		for _, p := range procs {
			fmt.Fprintf(&b, " %.1f |", row.ByProc[p])
		}
		b.WriteByte('\n')
	}
	r.standingsTable(&b)
	b.WriteString("\n| idle | RTT p50 ms | RTT p99 ms | connect and first byte p50 ms | p99 ms |\n|---|---|---|---|---|\n")
	for _, l := range r.Latency {
		fmt.Fprintf(&b, "| %s | %.2f | %.2f | %.2f | %.2f |\n", l.Way, l.RTT50, l.RTT99, l.Connect50, l.Connect99)
	}
	r.loadTables(&b)
	b.WriteString("\n| process | RSS idle MiB | after load MiB |\n|---|---|---|\n")
	for _, p := range r.Memory {
		fmt.Fprintf(&b, "| %s | %.0f | %.0f |\n", p.Process, float64(p.Idle)/(1<<20), float64(p.Loaded)/(1<<20))
	}
	r.footer(&b)
	return b.String()
}

// footer says where and how it was measured.
func (r *Result) footer(b io.Writer) {
	m, mtu := r.Machine, ""
	if r.MTU > 0 {
		mtu = fmt.Sprintf("MTU %d, ", r.MTU)
	}
	fmt.Fprintf(b, "\n%s, %d cores shared by all hosts, %.0f GiB, Linux %s, %s, %s%s, %s, commit %s, load before %s.\nCommand: `%s`, %s, %.0f s.\n",
		m.CPU, m.Cores, m.MemoryGiB, m.Kernel, m.Congestion, mtu, m.Iperf3, m.Go, cmp.Or(m.Commit, "unknown"), m.Load,
		strings.Join(r.Command, " "), r.Started.Format("2006-01-02 15:04 MST"), r.Took)
}

func (r *Result) processNames() []string {
	names := make(map[string]bool)
	for _, t := range r.Throughput {
		if t.Way != Sallyway {
			continue
		}
		for p := range t.CPU {
			names[p] = true
		}
	}
	return slices.Sorted(maps.Keys(names))
}

// Write puts the result into a folder as JSON and Markdown, and, when plot is set, as an SVG picture. It returns the paths.
func (r *Result) Write(dir string, plot bool) ([]string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	r.Standings = r.standings()
	doc, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return nil, err
	}
	base := filepath.Join(dir, r.Started.Format("20060102-150405"))
	files := map[string][]byte{base + ".json": append(doc, '\n'), base + ".md": []byte(r.Markdown())}
	if plot {
		files[base+".svg"] = []byte(r.SVG())
	}
	var errs error
	for path, content := range files {
		errs = errors.Join(errs, os.WriteFile(path, content, 0o644))
	}
	return slices.Sorted(maps.Keys(files)), errs
}
