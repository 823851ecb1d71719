package client

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"sallyway/internal/identity"
	"sallyway/internal/trial"
)

// BenchReport is what a bench found: the JSON of `sallyway bench --json`. Times ending in _ns are nanoseconds.
type BenchReport struct {
	Target string `json:"target"`
	// Resource is empty where a gateway was named.
	Resource string    `json:"resource,omitempty"`
	Gateway  BenchNode `json:"gateway"`
	// Relay and Transport are what the active path leads over, Path and Standby the paths as status shows them.
	Relay     string `json:"relay"`
	Transport string `json:"transport,omitempty"` // udp or tls
	Path      string `json:"path"`
	Standby   string `json:"standby,omitempty"`
	// Moves is how often the path changed during the run: the figures are of several paths then.
	Moves   uint64        `json:"moves"`
	Started time.Time     `json:"started"`
	Time    time.Duration `json:"time_ns"` // of load in each direction
	Flows   int           `json:"flows"`
	Hops    []BenchHop    `json:"hops"`
	// Idle is the latency of 64 bytes there and back on an open flow, before the load.
	Idle BenchLatency `json:"latency_idle"`
	// Up is towards the gateway, Down from it; null where it was not asked for.
	Up   *BenchLoad `json:"up"`
	Down *BenchLoad `json:"down"`
	UDP  *BenchUDP  `json:"udp"`
}

// BenchNode names a gateway.
type BenchNode struct {
	Node identity.Node `json:"node"`
	Name string        `json:"name"`
}

// BenchHop is a round trip between two places on the way.
type BenchHop struct {
	From string `json:"from"`
	To   string `json:"to"`
	// RTT is the median, or smoothed where it is a connection's own measure; 0 is not measured, and Note says why.
	RTT     time.Duration `json:"rtt_ns"`
	Min     time.Duration `json:"min_ns,omitempty"`
	Samples int           `json:"samples,omitempty"`
	Method  string        `json:"method"`
	Note    string        `json:"note,omitempty"`
}

// BenchLatency is a distribution of round trips.
type BenchLatency struct {
	Samples int           `json:"samples"`
	Min     time.Duration `json:"min_ns"`
	P50     time.Duration `json:"p50_ns"`
	P99     time.Duration `json:"p99_ns"`
	Max     time.Duration `json:"max_ns"`
}

// BenchLoad is a direction under load.
type BenchLoad struct {
	Flows int `json:"flows"`
	// BitsPerSecond is payload as it arrived, from the first byte to the last.
	BitsPerSecond float64       `json:"bits_per_second"`
	Bytes         uint64        `json:"bytes"`
	Took          time.Duration `json:"took_ns"`
	Intervals     []float64     `json:"intervals_bits_per_second"` // of about a second each
	// Packets are those that the sender sent in the session meanwhile, whatever they carried, and Lost those it took for lost.
	Packets   uint64  `json:"packets"`
	Lost      uint64  `json:"packets_lost"`
	LossShare float64 `json:"loss_share"`
	// Window is the median of the sender's congestion window in bytes, RTT that of its smoothed round-trip time.
	Window uint64        `json:"congestion_window_bytes"`
	RTT    time.Duration `json:"rtt_ns"`
	// Latency is that of small messages on another flow of the session meanwhile.
	Latency BenchLatency `json:"latency"`
	// Client and Gateway are the load of the processors at both ends; SecondsPerGB is the client's, per 10⁹ bytes.
	Client       trial.Load `json:"client_cpu"`
	Gateway      trial.Load `json:"gateway_cpu"`
	SecondsPerGB float64    `json:"client_cpu_seconds_per_gb"`
	Limit        BenchLimit `json:"limit"`
}

// BenchLimit is what held a load back, as far as the figures say.
type BenchLimit struct {
	// By is "cpu", "link", "loss" or "window"; "" where nothing that was measured stands out.
	By string `json:"by"`
	// Why is a sentence with the figures.
	Why string `json:"why"`
}

// BenchUDP is a run of evenly paced datagrams that the gateway sends back.
type BenchUDP struct {
	Asked         float64 `json:"asked_bits_per_second"`
	BitsPerSecond float64 `json:"bits_per_second"` // of payload, as sent
	Size          int     `json:"datagram_bytes"`
	Sent          uint64  `json:"sent"`
	AtGateway     uint64  `json:"at_gateway"`
	Returned      uint64  `json:"returned"`
	LossUp        float64 `json:"loss_share_up"`
	LossDown      float64 `json:"loss_share_down"`
	// Jitter is the mean difference between one round trip and the next.
	Jitter  time.Duration `json:"jitter_ns"`
	Latency BenchLatency  `json:"latency"`
}

// summarize sorts samples and describes them. Percentiles are by nearest rank.
func summarize(samples []time.Duration) BenchLatency {
	n := len(samples)
	if n == 0 {
		return BenchLatency{}
	}
	s := slices.Clone(samples)
	slices.Sort(s)
	rank := func(percent int) time.Duration { return s[max((n*percent+99)/100, 1)-1] }
	return BenchLatency{Samples: n, Min: s[0], P50: rank(50), P99: rank(99), Max: s[n-1]}
}

// jitter is the mean difference between neighbours.
func jitter(samples []time.Duration) time.Duration {
	if len(samples) < 2 {
		return 0
	}
	var sum time.Duration
	for i, d := range samples[1:] {
		sum += (d - samples[i]).Abs()
	}
	return sum / time.Duration(len(samples)-1)
}

// What the figures have to be for a limit to be named.
const (
	// hostFull and processFull are the shares of the processors that leave nothing to gain.
	hostFull, processFull = 0.93, 0.9
	// windowFull is the share of window per round trip that a sender reaches when its window holds it back: it never sends quite evenly.
	windowFull = 0.7
	// queueGrown and queueLeast are how much the round trip has to grow under load, as a factor and at least, for a queue to be the cause.
	queueGrown = 1.25
	queueLeast = 5 * time.Millisecond
	// ownShare is the share of the processors that this process must have had of a full host: else somebody else filled it, which need not be
	// what limits; hostBusy is from where that is worth a word.
	ownShare, hostBusy = 0.15, 0.8
	// lossLeast and lostLeast are the share and the number of packets below which loss explains nothing.
	lossLeast = 0.0002
	lostLeast = 3
	// costLeast is the use of processors, in cores, below which a cost per byte is mostly that of being there.
	costLeast = 0.1
)

// limitOf says what held a load back; idle is the round trip without load. It claims nothing that the figures do not show.
func limitOf(l *BenchLoad, idle time.Duration) BenchLimit {
	var busy string // with whatever
	most := 0.0
	for _, end := range []struct {
		who  string
		load trial.Load
	}{{"this host", l.Client}, {"the gateway's host", l.Gateway}} {
		cores := float64(end.load.Cores)
		switch {
		case end.load.Host >= hostFull && end.load.Process >= ownShare*cores:
			return BenchLimit{"cpu", fmt.Sprintf("CPU: %s was %.0f %% busy, %.1f of its cores with this process", end.who, end.load.Host*100, end.load.Process)}
		case cores > 0 && end.load.Process >= processFull*cores:
			return BenchLimit{"cpu", fmt.Sprintf("CPU: the process on %s used %.1f of the %d cores that it may", end.who, end.load.Process, end.load.Cores)}
		case end.load.Host > most:
			most, busy = end.load.Host, fmt.Sprintf("%s was %.0f %% busy, mostly with other programs", end.who, end.load.Host*100)
		}
	}
	limit := senderLimit(l, idle)
	switch {
	case limit.By == "" && most >= hostFull:
		return BenchLimit{"cpu", "CPU: " + busy}
	case limit.By != "" && most >= hostBusy:
		limit.Why += "; " + busy + ", which may have a part in it"
	}
	return limit
}

// senderLimit says what held the sender back, by its window.
func senderLimit(l *BenchLoad, idle time.Duration) BenchLimit {
	if l.RTT <= 0 || l.Window == 0 || l.BitsPerSecond < windowFull*float64(l.Window)*8/l.RTT.Seconds() {
		return BenchLimit{}
	}
	lossy := l.Lost >= lostLeast && l.LossShare >= lossLeast
	window := fmt.Sprintf("%s per %s", byteCount(l.Window), millis(l.RTT))
	switch queue := l.RTT - idle; {
	case idle > 0 && queue >= queueLeast && float64(l.RTT) >= queueGrown*float64(idle):
		why := fmt.Sprintf("the slowest link, about %s: its queue added %s to every round trip", bitRate(l.BitsPerSecond), millis(queue))
		if lossy {
			why += fmt.Sprintf(" and dropped %s of the packets", percent(l.LossShare))
		}
		return BenchLimit{"link", why}
	case lossy:
		return BenchLimit{"loss", fmt.Sprintf("loss: %s of the packets, each of which halves the window; what is left of it is %s", percent(l.LossShare), window)}
	}
	return BenchLimit{"window", "the congestion window, " + window + ", which nothing lost has held down: it grows with a longer --time"}
}

// Text writes the report for people.
func (r *BenchReport) Text(w io.Writer) {
	line := func(head, format string, args ...any) {
		fmt.Fprintf(w, "%-10s %s\n", head, fmt.Sprintf(format, args...))
	}
	what := "gateway " + r.Gateway.Name
	if r.Resource != "" {
		what = r.Resource + " by gateway " + r.Gateway.Name
	}
	line("bench", "%s", what)
	over := r.Path
	if r.Standby != "" {
		over += ", standby " + r.Standby
	}
	line("path", "over %s", over)
	if r.Moves > 0 {
		line("", "the path changed during the run (%d): the figures are of more than one", r.Moves)
	}
	fmt.Fprintln(w)
	head := "round trip"
	for _, h := range r.Hops {
		way := fmt.Sprintf("%s → %s", h.From, h.To)
		switch {
		case h.RTT == 0:
			line(head, "%-36s %s", way, h.Note)
		default:
			least := ""
			if h.Min > 0 {
				least = ", least " + millis(h.Min)
			}
			note := h.Method
			if h.Note != "" {
				note += ", " + h.Note
			}
			line(head, "%-36s %s%s (%s)", way, millis(h.RTT), least, note)
		}
		head = ""
	}
	line(head, "%-36s %s", "64 bytes through the session, idle", r.Idle)
	for _, d := range []struct {
		head string
		load *BenchLoad
	}{{"up", r.Up}, {"down", r.Down}} {
		if d.load != nil {
			fmt.Fprintln(w)
			d.load.text(line, d.head)
		}
	}
	if u := r.UDP; u != nil {
		fmt.Fprintln(w)
		line("udp", "%s in %d datagrams of %d bytes, and back", bitRate(u.BitsPerSecond), u.Sent, u.Size)
		line("", "lost %d up (%s), %d down (%s)", u.Sent-min(u.AtGateway, u.Sent), percent(u.LossUp), u.AtGateway-min(u.Returned, u.AtGateway), percent(u.LossDown))
		if u.Returned > 0 {
			line("", "round trip %s, jitter %s", u.Latency, millis(u.Jitter))
		}
	}
}

func (l *BenchLoad) text(line func(head, format string, args ...any), head string) {
	flows := "1 flow"
	if l.Flows != 1 {
		flows = fmt.Sprintf("%d flows", l.Flows)
	}
	line(head, "%s   %s, %s in %.1f s", bitRate(l.BitsPerSecond), flows, byteCount(l.Bytes), l.Took.Seconds())
	if len(l.Intervals) > 1 {
		line("", "by second: %s to %s", bitRate(slices.Min(l.Intervals)), bitRate(slices.Max(l.Intervals)))
	}
	line("", "lost %d of %d packets (%s); congestion window %s, round trip %s", l.Lost, l.Packets, percent(l.LossShare), byteCount(l.Window), millis(l.RTT))
	line("", "small messages meanwhile: %s", l.Latency)
	var cpu []string
	for _, end := range []struct {
		who  string
		load trial.Load
	}{{"client", l.Client}, {"gateway", l.Gateway}} {
		s := fmt.Sprintf("%s %.2f cores", end.who, end.load.Process)
		if end.load.Host >= 0 {
			s += fmt.Sprintf(" (its host %.0f %% busy)", end.load.Host*100)
		}
		cpu = append(cpu, s)
	}
	if l.Client.Process >= costLeast {
		cpu = append(cpu, fmt.Sprintf("client %.1f s/GB", l.SecondsPerGB))
	}
	line("", "CPU: %s", strings.Join(cpu, ", "))
	if l.Limit.By != "" {
		line("", "limited by %s", l.Limit.Why)
		return
	}
	line("", "what limits it does not show in these figures")
}

// String is p50 and p99, or the largest where there are too few samples for a p99.
func (l BenchLatency) String() string {
	switch {
	case l.Samples == 0:
		return "not measured"
	case l.Samples < goodSamples:
		return fmt.Sprintf("p50 %s, max %s (%d samples)", millis(l.P50), millis(l.Max), l.Samples)
	}
	return fmt.Sprintf("p50 %s, p99 %s (%d samples)", millis(l.P50), millis(l.P99), l.Samples)
}

// bitRate writes bits per second with a decimal unit.
func bitRate(v float64) string {
	switch {
	case v >= 1e9:
		return fmt.Sprintf("%.2f Gbit/s", v/1e9)
	case v >= 1e6:
		return fmt.Sprintf("%.1f Mbit/s", v/1e6)
	case v >= 1e3:
		return fmt.Sprintf("%.0f kbit/s", v/1e3)
	}
	return fmt.Sprintf("%.0f bit/s", v)
}

// byteCount writes bytes with a decimal unit.
func byteCount(n uint64) string {
	v := float64(n)
	switch {
	case v >= 1e9:
		return fmt.Sprintf("%.2f GB", v/1e9)
	case v >= 1e6:
		return fmt.Sprintf("%.1f MB", v/1e6)
	case v >= 1e3:
		return fmt.Sprintf("%.0f kB", v/1e3)
	}
	return fmt.Sprintf("%d B", n)
}

// millis writes a duration in milliseconds, with what digits matter.
func millis(d time.Duration) string {
	ms := float64(d) / float64(time.Millisecond)
	switch {
	case ms >= 100:
		return fmt.Sprintf("%.0f ms", ms)
	case ms >= 10:
		return fmt.Sprintf("%.1f ms", ms)
	case ms < 0.1 && ms > 0:
		return fmt.Sprintf("%.3f ms", ms)
	}
	return fmt.Sprintf("%.2f ms", ms)
}

// percent writes a share.
func percent(share float64) string {
	if share > 0 && share < 0.0001 {
		return "under 0.01 %"
	}
	return fmt.Sprintf("%.2f %%", share*100)
}
