package bench

import (
	"cmp"
	"fmt"
	"slices"
)

// Quantiles are the spread of a figure over runs, in milliseconds.
type Quantiles struct {
	Median float64 `json:"median"`
	P95    float64 `json:"p95"`
	Max    float64 `json:"max"`
}

// FailoverRow is the runs of a cause with a load on one way.
type FailoverRow struct {
	Way   string `json:"way"`
	Cause string `json:"cause"`
	Load  string `json:"load"`
	Runs  int    `json:"runs"`

	Stall      Quantiles  `json:"stall_ms"`
	Excess     Quantiles  `json:"stall_excess_ms"`
	Bulk       *Quantiles `json:"bulk_stall_ms,omitempty"`
	BulkExcess *Quantiles `json:"bulk_stall_excess_ms,omitempty"`
	New        Quantiles  `json:"new_connection_ms"`
	Resumed    *Quantiles `json:"resumed_ms,omitempty"`
	Back       *Quantiles `json:"back_ms,omitempty"`
	Climb      *Quantiles `json:"back_stall_ms,omitempty"`

	// Undisturbed is the time between two answers in the undisturbed windows of all of these runs, at its 99.9th percentile, of Gaps.
	Undisturbed float64 `json:"undisturbed_p999_ms,omitempty"`
	Gaps        int     `json:"undisturbed_answers,omitempty"`

	Open         int   `json:"connections"`
	Lost         int   `json:"connections_lost"`
	Expect       bool  `json:"end_is_expected,omitempty"`
	Never        int   `json:"runs_never_again,omitempty"`
	Bytes        int64 `json:"bytes_checked"`
	Wrong        int   `json:"runs_with_wrong_bytes"`
	Dropped      int   `json:"dropped,omitempty"`        // in the disturbed windows, by relays and legs
	Before       int   `json:"dropped_before,omitempty"` // in the undisturbed ones
	Resent       int   `json:"quic_lost_packets,omitempty"`
	ResentBefore int   `json:"quic_lost_packets_before,omitempty"`
	Early        int   `json:"needless_moves,omitempty"` // in the undisturbed windows
}

// atRank is the value that a share of the sorted values, between 0 and 1, is not above: the nearest rank.
func atRank(sorted []float64, share float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	n := int(share*float64(len(sorted))+0.999999) - 1
	return sorted[min(max(n, 0), len(sorted)-1)]
}

// quantiles of nothing are nil.
func quantiles(v []float64) *Quantiles {
	if len(v) == 0 {
		return nil
	}
	v = slices.Sorted(slices.Values(v))
	return &Quantiles{median(v), atRank(v, 0.95), v[len(v)-1]}
}

// sort puts runs in the order of causes, loads and runs, ours first.
func (r *FailoverResult) sort() {
	names, loads := Causes(), []string{LoadUp, LoadDown, LoadIdle, LoadQuiet}
	ways := append([]string{Sallyway}, Peers()...)
	slices.SortStableFunc(r.Tries, func(a, b Try) int {
		return cmp.Or(
			cmp.Compare(slices.Index(names, a.Cause), slices.Index(names, b.Cause)), cmp.Compare(slices.Index(ways, a.Way), slices.Index(ways, b.Way)),
			cmp.Compare(slices.Index(loads, a.Load), slices.Index(loads, b.Load)), cmp.Compare(a.Run, b.Run),
		)
	})
}

// tries are the runs of a kind.
func (r *FailoverResult) tries(way, cause, load string) []Try {
	var out []Try
	for _, t := range r.Tries {
		if t.Way == way && t.Cause == cause && t.Load == load {
			out = append(out, t)
		}
	}
	return out
}

// sum makes the rows, in the order of the runs.
func (r *FailoverResult) sum() []FailoverRow {
	var rows []FailoverRow
	for _, t := range r.Tries {
		if !slices.ContainsFunc(rows, func(o FailoverRow) bool { return o.Way == t.Way && o.Cause == t.Cause && o.Load == t.Load }) {
			rows = append(rows, sumTries(r.tries(t.Way, t.Cause, t.Load)))
		}
	}
	return rows
}

func sumTries(tries []Try) FailoverRow {
	row := FailoverRow{Way: tries[0].Way, Cause: tries[0].Cause, Load: tries[0].Load, Runs: len(tries)}
	of := func(value func(Try) float64, known func(Try) bool) *Quantiles {
		var v []float64
		for _, t := range tries {
			if known == nil || known(t) {
				v = append(v, value(t))
			}
		}
		return quantiles(v)
	}
	row.Stall = *of(func(t Try) float64 { return t.Stall }, nil)
	row.Excess = *of(func(t Try) float64 { return t.Excess }, nil)
	row.New = *of(func(t Try) float64 { return t.newOrNever() }, nil)
	streamed := func(t Try) bool { return t.Load == LoadUp || t.Load == LoadDown }
	row.Bulk = of(func(t Try) float64 { return t.Bulk }, streamed)
	row.BulkExcess = of(func(t Try) float64 { return t.BulkExcess }, streamed)
	row.Resumed = of(func(t Try) float64 { return t.Resumed }, func(t Try) bool { return t.Resumed > 0 })
	row.Back = of(func(t Try) float64 { return t.Back }, func(t Try) bool { return t.Back > 0 })
	row.Climb = of(func(t Try) float64 { return t.Climb }, func(t Try) bool { return t.Back > 0 })
	var gaps []float64
	for _, t := range tries {
		row.Open, row.Lost, row.Bytes = row.Open+t.Open, row.Lost+t.Lost, row.Bytes+t.Bytes
		row.Expect = row.Expect || t.Expect
		row.Early += int(t.Early)
		row.Resent, row.ResentBefore = row.Resent+int(t.Resent), row.ResentBefore+int(t.ResentBefore)
		if t.Silent {
			row.Never++
		}
		if t.Wrong {
			row.Wrong++
		}
		for _, n := range t.Dropped {
			row.Dropped += int(n)
		}
		for _, n := range t.DroppedBefore {
			row.Before += int(n)
		}
		for _, g := range t.gaps {
			gaps = append(gaps, ms(g))
		}
	}
	slices.Sort(gaps)
	row.Undisturbed, row.Gaps = atRank(gaps, 0.999), len(gaps)
	return row
}

// newOrNever is New, or where no new connection worked as long as anybody waited.
func (t Try) newOrNever() float64 {
	if t.New == 0 {
		return t.Watched
	}
	return t.New
}

// What is wanted; milliseconds.
const (
	killMedian, killP95 = killedBar, 300
	cutMedian, cutP95   = cutBar, 700
	addressMost         = 300
	blockedMost         = 1500
	backMost            = 60_000
	resumeMost          = 1000
	allocateMost        = 5000
	needlessMost        = 1 // in half an hour
)

// bars are what is wanted of our own rows, with what was measured.
func (r *FailoverResult) bars() []bar {
	var out []bar
	lost, wrong, measured := 0, 0, false
	early, minutes := 0, 0.0
	for _, t := range r.Tries {
		if t.Way == Sallyway && (t.Load == LoadUp || t.Load == LoadDown) {
			early, minutes = early+int(t.Early), minutes+t.Window/60_000
		}
	}
	for _, row := range r.Rows {
		if row.Way != Sallyway {
			continue
		}
		measured = true
		if !row.Expect {
			lost += row.Lost
		}
		wrong += row.Wrong
		out = append(out, row.bars()...)
	}
	if measured {
		out = append(out,
			bar{what: "TCP connections lost, of those that may live on", got: float64(lost), format: "%.0f"},
			bar{what: "runs with wrong bytes", got: float64(wrong), format: "%.0f"},
			bar{what: fmt.Sprintf("needless moves in %.1f minutes of undisturbed windows under load", minutes), got: float64(early), wanted: needlessMost, format: "%.0f"})
	}
	return out
}

func (row FailoverRow) bars() (out []bar) {
	add := func(what string, got, wanted float64) {
		out = append(out, bar{what: fmt.Sprintf("%s, load %s: %s", row.Cause, row.Load, what), got: got, wanted: wanted, format: "%.0f ms"})
	}
	stalls := func(median, p95 float64) {
		if row.Load == LoadQuiet { // the next byte arrives within a second
			add("next byte after the idle death, max", row.Stall.Max, 1000)
			return
		}
		add("longest stall, median", row.Stall.Median, median)
		add("longest stall, p95", row.Stall.P95, p95)
		if row.Bulk != nil {
			add("longest stall of the stream, median", row.Bulk.Median, median)
			add("longest stall of the stream, p95", row.Bulk.P95, p95)
		}
	}
	switch row.Cause {
	case CauseKill:
		stalls(killMedian, killP95)
	case CauseGone, CauseToRelay, CauseToNodes:
		stalls(cutMedian, cutP95)
	case CauseDrain:
		add("longest stall, median, next to the undisturbed p99.9", row.Stall.Median, row.Undisturbed)
		add("longest stall, max, next to the undisturbed p99.9", row.Stall.Max, row.Undisturbed)
		out = append(out, bar{what: fmt.Sprintf("%s, load %s: datagrams dropped by relays and legs", row.Cause, row.Load), got: float64(row.Dropped), format: "%.0f"})
	case CauseUDP:
		add("longest stall, median", row.Stall.Median, blockedMost)
		add("longest stall, max", row.Stall.Max, blockedMost)
		if row.Back != nil {
			add("back on UDP, max", row.Back.Max, backMost)
		}
	case CauseAddress:
		add("longest stall, median", row.Stall.Median, addressMost)
		add("longest stall, p95", row.Stall.P95, addressMost)
	case CauseBothGone, CauseBothKill:
		// In both causes the relay that comes back has no allocation of the nodes' any more: a killed one has forgotten them, the other's were given up
		// by the nodes in the silence.
		if row.Resumed != nil {
			add("resumed after one is back, median", row.Resumed.Median, resumeMost)
			add("resumed after one is back, max", row.Resumed.Max, allocateMost)
		}
	}
	return out
}
