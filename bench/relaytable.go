package bench

import (
	"fmt"
	"strings"
)

// What is wanted of the relay alone, channel to channel.
const (
	relayBar44  = 5.0 // Gbit/s per core, in runs of 44 datagrams
	relayBar13  = 2.5 // in runs of 13, what quic-go sends at once
	relayBarCPU = 1.5 // seconds per GB
	relayBarTo  = 5.0 // times pion
)

// relayTable writes the relays' figures, with the bars under them.
func (r *Result) relayTable(b *strings.Builder) {
	type kind struct {
		link            string
		pairs, segments int
	}
	pion := make(map[kind]Forwarded)
	for _, f := range r.Relay {
		if f.Server == PionRelay {
			pion[kind{f.Link, f.Pairs, f.Segments}] = f
		}
	}
	fmt.Fprintf(b, "The relay alone, channel to channel, datagrams of %d bytes, one direction; medians of interleaved runs. The sender and all receivers share the cores with it. "+
		"A core's Gbit/s are what one would carry that did nothing else, by the CPU that the relay's process used.\n\n", relaySegment)
	b.WriteString("| server | link | pairs of allocations | segments | Gbit/s | min–max | packets/s | CPU s/GB | CPU s/Gbit | Gbit/s per core | lost | of pion |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n")
	var bars []bar
	for _, f := range r.Relay {
		p := pion[kind{f.Link, f.Pairs, f.Segments}]
		times := ratio(f.BitsPerSecond, p.BitsPerSecond)
		fmt.Fprintf(b, "| %s | %s | %d | %d | %.2f | %.2f–%.2f | %.0f | %.2f | %.3f | %.1f | %.1f %% | %s |\n", f.Server, f.Link, f.Pairs, f.Segments, f.BitsPerSecond/1e9, f.Low/1e9, f.High/1e9,
			f.PacketsPerS, f.CPUPerGB, f.CPUPerGbit, f.PerCore/1e9, 100*f.Lost, known("%.1f ×", times))
		if f.Server != OwnRelay {
			continue
		}
		name := fmt.Sprintf("%s, %d pairs, %d segments", f.Link, f.Pairs, f.Segments)
		wanted := map[int]float64{13: relayBar13, 44: relayBar44}[f.Segments]
		if wanted > 0 {
			bars = append(bars, bar{what: name, got: f.PerCore / 1e9, wanted: wanted, atLeast: true, format: "%.1f Gbit/s per core"})
		}
		bars = append(bars, bar{what: name, got: f.CPUPerGB, wanted: relayBarCPU, format: "%.2f CPU s/GB"}, bar{what: name, got: times, wanted: relayBarTo, atLeast: true, format: "%.1f × pion"})
	}
	r.delayTable(b)
	bars = append(bars, r.memoryTable(b)...)
	writeBars(b, bars)
}

// delayTable writes the latencies.
func (r *Result) delayTable(b *strings.Builder) {
	if len(r.RelayDelay) == 0 {
		return
	}
	b.WriteString("\nRound trip of a small datagram from client to client and back: two passes through the server. Beside a load, the relay carries that load, and the forwarder none: what it takes longer then is the machine's.\n\n" +
		"| server | link | beside Gbit/s in the relay | p50 µs | p99 µs | added p50 µs | added p99 µs | lost |\n|---|---|---|---|---|---|---|---|\n")
	for _, d := range r.RelayDelay {
		added50, added99 := "–", "–"
		if d.Server == OwnRelay {
			added50, added99 = fmt.Sprintf("%.0f", d.Added50), fmt.Sprintf("%.0f", d.Added99)
		}
		fmt.Fprintf(b, "| %s | %s | %.1f | %.0f | %.0f | %s | %s | %d |\n", d.Server, d.Link, d.Load/1e9, d.P50, d.P99, added50, added99, d.Lost)
	}
}

// memoryTable writes what idle allocations cost, and returns what is wanted of that.
func (r *Result) memoryTable(b *strings.Builder) (bars []bar) {
	if len(r.RelayMemory) == 0 {
		return nil
	}
	const mib = 1 << 20
	b.WriteString("\n| server | control | idle allocations | RSS before MiB | RSS MiB | settled MiB | lost by then | KiB each |\n|---|---|---|---|---|---|---|---|\n")
	for _, m := range r.RelayMemory {
		fmt.Fprintf(b, "| %s | %s | %d | %.0f | %.0f | %s | %s | %.1f |\n", m.Server, m.Control, m.Allocations, float64(m.Empty)/mib, float64(m.Idle)/mib, known("%.0f", float64(m.Settled)/mib), known("%.0f", float64(m.Lost)),
			float64(m.resident()-m.Empty)/1024/float64(max(1, m.Allocations)))
		if m.Server == OwnRelay && m.Allocations == idleAllocations {
			bars = append(bars, bar{what: fmt.Sprintf("%d idle allocations, %s", m.Allocations, m.Control), got: float64(m.resident()) / mib, wanted: idleBar / mib, format: "%.0f MiB"})
		}
	}
	return bars
}
