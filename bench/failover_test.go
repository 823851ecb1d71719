package bench

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyway/internal/lab"
)

func TestArrivals(t *testing.T) {
	at := func(d int) time.Time { return time.Unix(1000, 0).Add(time.Duration(d) * time.Millisecond) }
	var a arrivals
	if a.longest(at(0), at(50)) != 50*time.Millisecond {
		t.Error("nothing came, and the gap is not the window")
	}
	for _, d := range []int{10, 20, 120, 130, 400} {
		a.add(at(d))
	}
	for _, c := range []struct{ from, to, want int }{
		{0, 15, 10},
		{15, 115, 95},   // goes on at the end
		{15, 125, 100},  // in its whole length, though it began before 20
		{50, 140, 100},  // began before the window
		{125, 350, 220}, // goes on
		{125, 500, 270},
		{401, 402, 2}, // nothing since the last
	} {
		if got := a.longest(at(c.from), at(c.to)); got != time.Duration(c.want)*time.Millisecond {
			t.Errorf("%d to %d: %v, want %d ms", c.from, c.to, got, c.want)
		}
	}
	for _, c := range []struct{ after, want int }{{0, 10}, {10, 20}, {50, 120}, {130, 400}} {
		if got := a.firstAfter(at(c.after)); !got.Equal(at(c.want)) {
			t.Errorf("first after %d: %v", c.after, got.Sub(at(0)))
		}
	}
	if !a.firstAfter(at(400)).IsZero() || !a.last().Equal(at(400)) {
		t.Error("something came after the last")
	}
}

// ends are two ends of a TCP connection on loopback.
func ends(t *testing.T) (near, far net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if near, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close() })
	if far, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	return near, far
}

func TestStreamChecksEveryByte(t *testing.T) {
	for _, down := range []bool{false, true} {
		near, far := ends(t)
		s := &streams{open: make(map[uint64]*stream)}
		go s.serve(far)
		x, err := s.start(near, down)
		if err != nil {
			t.Fatal(err)
		}
		err = lab.Until(t.Context(), time.Millisecond, func() error {
			if x.received.Load() < 3*patternSize { // past the pattern's end
				return errors.New("not yet")
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		n, err := x.finish(t.Context())
		if err != nil || n < 3*patternSize || n != x.sent.Load() || x.count() == 0 {
			t.Errorf("%s: %d of %d bytes, %v", direction(down), n, x.sent.Load(), err)
		}
		if len(s.open) != 0 {
			t.Errorf("%s: a stream that has ended is remembered", direction(down))
		}
	}
	t.Run("a byte is another", func(t *testing.T) {
		near, far := ends(t)
		x := &stream{ended: make(chan error, 2)}
		b := slices.Clone(pattern()[:1000])
		b[500] ^= 1
		if _, err := far.Write(b); err != nil {
			t.Fatal(err)
		}
		if err := x.receive(near); !errors.Is(err, errWrongBytes) {
			t.Errorf("%v", err)
		}
	})
	t.Run("the end is missing", func(t *testing.T) {
		near, _ := ends(t)
		x := &stream{conn: near, stopped: make(chan struct{}), ended: make(chan error, 2)}
		x.sent.Store(10)
		x.received.Store(9)
		x.ended <- nil
		x.ended <- nil
		if _, err := x.finish(t.Context()); !errors.Is(err, errWrongBytes) {
			t.Errorf("%v", err)
		}
	})
	t.Run("the rest does not arrive", func(t *testing.T) {
		near, _ := ends(t)
		x := &stream{conn: near, stopped: make(chan struct{}), ended: make(chan error, 2)}
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(net.ErrClosed)
		if _, err := x.finish(ctx); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v", err)
		}
	})
}

func TestBeatsTellHowTheyEnded(t *testing.T) {
	near, far := ends(t)
	b := startBeats(near, time.Millisecond)
	buf := make([]byte, 8)
	for range 3 {
		if _, err := far.Read(buf); err != nil {
			t.Fatal(err)
		}
		if _, err := far.Write(buf); err != nil {
			t.Fatal(err)
		}
	}
	if b.ended() != nil {
		t.Error(b.ended())
	}
	if _, err := far.Read(buf); err != nil {
		t.Fatal(err)
	}
	buf[7]++
	if _, err := far.Write(buf); err != nil {
		t.Fatal(err)
	}
	<-b.done
	if err := b.stop(); err == nil || !strings.Contains(err.Error(), "answer 4 is 5") {
		t.Errorf("%v", err)
	}
}

func TestParseDrops(t *testing.T) {
	got := parseDrops(strings.NewReader(`# HELP sallyway_relay_dropped_total Datagrams not relayed.
sallyway_relay_dropped_total{reason="queue_full"} 12
sallyway_relay_dropped_total{reason="unbound"} 1.5e+06
sallyway_relay_bytes_total 77
`))
	if len(got) != 2 || got["queue_full"] != 12 || got["unbound"] != 1500000 {
		t.Errorf("%v", got)
	}
}

func TestFailoverJobs(t *testing.T) {
	cfg := Failover{Runs: 20, PeerRuns: 3, Peers: []string{OpenSSH}}
	jobs, err := cfg.jobs()
	if err != nil {
		t.Fatal(err)
	}
	count := make(map[string]int)
	numbers := make(map[int]int)
	for i, j := range jobs {
		count[j.way] += j.runs
		count[j.load] += j.runs
		if i > 0 && jobs[i-1].way != j.way && j.way == Sallyway {
			t.Error("a peer's job comes before one of ours")
		}
		for run := j.first; run < j.first+j.runs && j.way == Sallyway; run++ {
			numbers[run]++
		}
	}
	n := len(Causes())
	if count[Sallyway] != 20*(3*n+2) || count[LoadQuiet] != 2*20 || count[OpenSSH] != 3*9 {
		t.Errorf("%v", count)
	}
	for run := range 20 {
		if numbers[run] != 3*n+2 {
			t.Errorf("run %d is made of %d kinds", run, numbers[run])
		}
	}
	if jobs[0].cause.takes <= jobs[1].cause.takes {
		t.Error("short jobs do not take turns with long ones")
	}
	cfg.NoOwn = true
	if jobs, err = cfg.jobs(); err != nil || len(jobs) != 9 {
		t.Errorf("%d jobs, %v", len(jobs), err)
	}
	for _, bad := range []Failover{{Causes: []string{"rain"}}, {Loads: []string{"sideways"}}} {
		if _, err := bad.jobs(); err == nil {
			t.Errorf("%+v is taken", bad)
		}
	}
}

// failoverSample is a result with something of every kind.
func failoverSample() *FailoverResult {
	r := &FailoverResult{
		Format: format, Kind: failoverKind, Started: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Command: []string{"bench", "failover"}, Labs: 3,
		Tries: []Try{
			{Way: OpenSSH, Cause: CauseKill, Load: LoadUp, Stall: 10800, Watched: 11000, Open: 6, Lost: 6},
			{Way: Sallyway, Cause: CauseGateway, Load: LoadIdle, Stall: 1200, New: 333, Open: 5, Lost: 5, Expect: true},
			{Way: Sallyway, Cause: CauseUDP, Load: LoadDown, Stall: 1400, New: 1410, Open: 7, Back: 30_000, Climb: 90, Bytes: 3e6},
			{Way: Sallyway, Cause: CauseBothKill, Load: LoadIdle, Stall: 11_000, New: 11_100, Resumed: 900, Open: 5},
			{
				Way: Sallyway, Cause: CauseDrain, Load: LoadIdle, Stall: 20, Before: 12, New: 3, Open: 5, Dropped: map[string]uint64{"relay-1 unbound": 2, "x": 1}, DroppedBefore: map[string]uint64{"x": 4}, Resent: 7,
				gaps: []time.Duration{10 * time.Millisecond, 30 * time.Millisecond},
			},
		},
		Missing: []Missing{{Nebula, "nebula is not installed\nmore"}},
		Failed:  []string{"Sallyway, x: not whole again\nmore"},
	}
	for i := range 20 { // 51, 52, … 70
		r.Tries = append(r.Tries, Try{Way: Sallyway, Cause: CauseKill, Load: LoadUp, Run: i, Stall: 51 + float64(i), Excess: 1 + float64(i), Bulk: 1 + float64(i), New: 5, Open: 6, Bytes: 1e6, Path: "relay-1 udp", After: "relay-2 udp", Moves: 1})
	}
	r.sort()
	r.Rows = r.sum()
	return r
}

func TestFailoverSums(t *testing.T) {
	r := failoverSample()
	if r.Rows[0].Way != Sallyway || r.Rows[0].Cause != CauseKill || r.Rows[1].Way != OpenSSH {
		t.Fatalf("rows in another order: %+v", r.Rows[:2])
	}
	row := r.Rows[0]
	if row.Runs != 20 || row.Stall != (Quantiles{60.5, 69, 70}) || *row.Bulk != (Quantiles{10.5, 19, 20}) || row.Bytes != 20e6 || row.Open != 120 {
		t.Errorf("%+v", row)
	}
	if r.Rows[1].New.Median != 11000 {
		t.Errorf("no new connection worked, and it took %v", r.Rows[1].New)
	}
	for _, c := range []struct {
		share float64
		want  float64
	}{{0, 1}, {0.5, 2}, {0.51, 3}, {0.75, 3}, {0.95, 4}, {1, 4}} {
		if got := atRank([]float64{1, 2, 3, 4}, c.share); got != c.want {
			t.Errorf("at %v: %v, want %v", c.share, got, c.want)
		}
	}
}

func TestFailoverMarkdown(t *testing.T) {
	md := failoverSample().markdown("x")
	for _, want := range []string{
		"| " + Sallyway + " | up | 20 | 60 / 69 / 70 | 10 / 19 / 20 | 10 / 19 / 20 | 0 / 0 / 0 | 5 / 5 / 5 | 0 of 120 | 20 |  |",
		"| " + OpenSSH + " | up | 1 | 10800 / 10800 / 10800 |",
		"| relay-killed | Sallyway | 60 / 69 / 70 | – | – | 10 / 19 / 20 | – | – | 0 of 120 |\n| relay-killed | " + OpenSSH + " | 10800 / 10800 / 10800 | – | – |",
		"| gateway-restarted | Sallyway | – | – | – | – | – | 333 / 333 / 333 | 5 of 5 (by its nature) |",
		"| relay-killed, load up: longest stall, median | ≤ 150 ms | 60 ms | holds |",
		"| udp-blocked, load down: longest stall, max | ≤ 1500 ms | 1400 ms | holds |",
		"| udp-blocked, load down: back on UDP, max | ≤ 60000 ms | 30000 ms | holds |",
		"| both-relays-killed, load idle: resumed after one is back, max | ≤ 5000 ms | 900 ms | holds |",
		"| relay-drained, load idle: longest stall, max, next to the undisturbed p99.9 | ≤ 30 ms | 20 ms | holds |",
		"| relay-drained, load idle: datagrams dropped by relays and legs | ≤ 0 | 3 | missed |",
		"| TCP connections lost, of those that may live on | ≤ 0 | 0 | holds |",
		"| – | – | – | – | 333 / 333 / 333 | 5 of 5 (by its nature) |",
		"back on UDP after 30000 / 30000 / 30000, stall meanwhile 90 / 90 / 90",
		"dropped by relays and legs 3 (4 before), sent again by QUIC 7 (0 before)",
		"- " + Nebula + ": nebula is not installed\n",
		"- Sallyway, x: not whole again\n",
		"OpenSSH, wireguard-go and TURN have no second one by design",
		"![Longest stall of an open connection, load up](x-cdf-up.svg)",
		"![Longest stall of an open connection, relay-killed](x-cdf-relay-killed.svg)",
	} {
		if !strings.Contains(md, want) {
			t.Errorf("%q is missing", want)
		}
	}
	if t.Failed() {
		t.Log(md)
	}
	if strings.Contains(failoverSample().Markdown(), "![") {
		t.Error("without a folder, pictures are named")
	}
}

func TestFailoverWriteAndRead(t *testing.T) {
	dir := t.TempDir()
	paths, err := failoverSample().Write(dir)
	if err != nil {
		t.Fatal(err)
	}
	pictures := 0
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		switch filepath.Ext(p) {
		case ".svg":
			pictures++
			wellFormed(t, p, string(b))
		case ".json":
			back, err := ReadFailover(p)
			if err != nil || len(back.Tries) != 25 || back.Rows[0].Stall.P95 != 69 {
				t.Errorf("%v", err)
			}
			if _, err := Read(p); err == nil {
				t.Error("a result of failovers is read as another")
			}
		}
	}
	if pictures != 4 {
		t.Errorf("%d pictures: %q", pictures, paths)
	}
	other := filepath.Join(dir, "other.json")
	b, _ := json.Marshal(sample()) // of plain values
	if err := os.WriteFile(other, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadFailover(other); err == nil {
		t.Error("another result is read as one of failovers")
	}
}
