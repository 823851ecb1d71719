package client

import (
	"strings"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/legs"
	"sallyway/relay/leg"
	"sallyway/tunnel"
	"sallyway/tunnel/pathstate"
)

// The metrics of a node's ways to relays and gateways.
var (
	legsDesc = prometheus.NewDesc("sallyway_legs_up", "Connections to relays that are up, by what they are for and by transport.",
		[]string{"for", "transport"}, nil)
	wantedDesc   = prometheus.NewDesc("sallyway_legs_wanted", "Relays that the node keeps a connection to, or tries to.", []string{"for"}, nil)
	legMovesDesc = prometheus.NewDesc("sallyway_leg_moves_total", "Moves of connections to relays from one transport to another, by reason.",
		[]string{"for", "from", "to", "reason"}, nil)
	legDialsDesc = prometheus.NewDesc("sallyway_leg_dials_total", "Attempts at connections to relays that got one, and that did not.", []string{"for", "result"}, nil)
	legEndsDesc  = prometheus.NewDesc("sallyway_legs_lost_total", "Connections to relays that were lost.", []string{"for"}, nil)
	legBytesDesc = prometheus.NewDesc("sallyway_leg_bytes_total", "Bytes of sessions that went by way of relays.", []string{"for", "direction"}, nil)
	legDataDesc  = prometheus.NewDesc("sallyway_leg_datagrams_total", "Datagrams of sessions that went by way of relays.", []string{"for", "direction"}, nil)
	legDropsDesc = prometheus.NewDesc("sallyway_leg_dropped_total", "Datagrams of sessions that connections to relays dropped, by reason.", []string{"for", "reason"}, nil)
	pathDesc     = prometheus.NewDesc("sallyway_path_active", "1 for the path that carries the session with a gateway: its rung, and its relay unless it is direct.",
		[]string{"gateway", "rung", "relay"}, nil)
	aliveDesc   = prometheus.NewDesc("sallyway_path_alive", "1 while that path answers probes.", []string{"gateway"}, nil)
	standbyDesc = prometheus.NewDesc("sallyway_path_standby", "1 for the path that is kept ready beside it.", []string{"gateway", "rung", "relay"}, nil)
	lastDesc    = prometheus.NewDesc("sallyway_last_rung_sessions", "Sessions with gateways that only the last rung carries: SSH and TLS on the relays' other ports.", nil, nil)
)

// legTransports are those that a leg may have.
var legTransports = []leg.Transport{leg.UDP, leg.TLS}

// legReasons are the metric's words for why legs moved.
var legReasons = map[string]string{legs.WhyLost: "lost", legs.WhyUnanswered: "unanswered", legs.WhyBetter: "better_rung"}

// LegMetrics are the metrics of a node's legs, by what they are for: a gateway serves on some and dials other gateways with others.
func LegMetrics(by map[string]*legs.Keeper) prometheus.Collector {
	return collector{[]*prometheus.Desc{legsDesc, wantedDesc, legMovesDesc, legDialsDesc, legEndsDesc, legBytesDesc, legDataDesc, legDropsDesc}, func(ch chan<- prometheus.Metric) {
		for of, k := range by {
			all, up := k.Status(), map[leg.Transport]int{}
			for _, st := range all {
				if st.Up {
					up[st.Transport]++
				}
			}
			for _, t := range legTransports {
				ch <- prometheus.MustNewConstMetric(legsDesc, prometheus.GaugeValue, float64(up[t]), of, string(t))
			}
			ch <- prometheus.MustNewConstMetric(wantedDesc, prometheus.GaugeValue, float64(len(all)), of)
			for _, m := range k.Moves() {
				ch <- prometheus.MustNewConstMetric(legMovesDesc, prometheus.CounterValue, float64(m.Count), of, string(m.From), string(m.To), legReasons[m.Reason])
			}
			m := k.Metrics()
			ch <- prometheus.MustNewConstMetric(legEndsDesc, prometheus.CounterValue, float64(m.Lost.Load()), of)
			for _, c := range []struct {
				desc  *prometheus.Desc
				label string
				n     *atomic.Uint64
			}{
				{legDialsDesc, "up", &m.Dialed},
				{legDialsDesc, "failed", &m.DialFailed},
				{legBytesDesc, "sent", &m.SentBytes},
				{legBytesDesc, "received", &m.ReceivedBytes},
				{legDataDesc, "sent", &m.SentDatagrams},
				{legDataDesc, "received", &m.ReceivedDatagrams},
				{legDropsDesc, "full", &m.DroppedFull},
				{legDropsDesc, "too_large", &m.DroppedSize},
				{legDropsDesc, "closed", &m.DroppedClosed},
				{legDropsDesc, "refused", &m.DroppedError},
				{legDropsDesc, "malformed", &m.DroppedMalformed},
				{legDropsDesc, "unbound", &m.DroppedUnbound},
			} {
				ch <- prometheus.MustNewConstMetric(c.desc, prometheus.CounterValue, float64(c.n.Load()), of, c.label)
			}
		}
	}}
}

// Metrics are those of the sessions that this node opens.
func (s *Sessions) Metrics() []prometheus.Collector {
	return []prometheus.Collector{s.moves, collector{[]*prometheus.Desc{pathDesc, aliveDesc, standbyDesc, lastDesc}, func(ch chan<- prometheus.Metric) {
		one := func(d *prometheus.Desc, labels ...string) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, 1, labels...)
		}
		last := 0
		for _, st := range s.Status() {
			if !st.Up || st.Path == "" {
				continue
			}
			rung, relay := Rung(st.Path)
			one(pathDesc, st.Name, rung, relay)
			if rung == string(legs.LastTLS) {
				last++
			}
			if st.Standby != "" {
				rung, relay = Rung(st.Standby)
				one(standbyDesc, st.Name, rung, relay)
			}
			alive := 0.0
			if st.State == tunnel.Alive {
				alive = 1
			}
			ch <- prometheus.MustNewConstMetric(aliveDesc, prometheus.GaugeValue, alive, st.Name)
		}
		ch <- prometheus.MustNewConstMetric(lastDesc, prometheus.GaugeValue, float64(last))
	}}}
}

// collector is a collector whose metrics are read from the state when they are asked for.
type collector struct {
	descs   []*prometheus.Desc
	collect func(chan<- prometheus.Metric)
}

func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range c.descs {
		ch <- d
	}
}

func (c collector) Collect(ch chan<- prometheus.Metric) { c.collect(ch) }

// Rung splits the name of a path, as status and log show it: direct or a transport, and the relay, "" for a direct one. A gateway's names of
// served paths have no transport but that of the last rung: there the rung is "".
func Rung(path string) (rung, relay string) {
	if strings.HasPrefix(path, directPrefix) {
		return "direct", ""
	}
	relay, rung, _ = strings.Cut(path, " ")
	return rung, relay
}

// moveReasons are the metric's words for why paths moved, so that its labels are few whatever a reason says.
var moveReasons = map[string]string{
	"probes are not answered":               "unanswered",
	"the leg on the relay is gone":          "leg_gone",
	"the relay is draining":                 "draining",
	"a better rung works again":             "better_rung",
	"a direct path works":                   "direct_works",
	"the direct path ended":                 "direct_ended",
	"the relay's path is better":            "direct_worse",
	"direct paths are not allowed any more": "direct_forbidden",
	reasonNewLeg:                            "new_leg",
	reasonPeerLeg:                           "gateway_new_leg",
}

func newMoves() *prometheus.CounterVec {
	v := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sallyway_path_moves_total", Help: "Moves of sessions with gateways to another path, by reason.",
	}, []string{"reason"})
	v.WithLabelValues("other")
	for _, r := range moveReasons {
		v.WithLabelValues(r)
	}
	for _, r := range moveCauses {
		v.WithLabelValues(r)
	}
	return v
}

// moveCauses are the metric's words for moves that sessions made by themselves.
var moveCauses = map[tunnel.MoveCause]string{
	pathstate.CauseDead: "unanswered", pathstate.CauseGone: "leg_gone", pathstate.CauseLoss: "lossy", pathstate.CauseRTT: "slow", pathstate.CauseStalled: "stalled",
	pathstate.CauseBack: "good_again", pathstate.CauseRung: "better_rung",
}

// noteMoves counts the moves since it was last called for the session, when seen were its paths.
func (s *Sessions) noteMoves(p tunnel.PathInfo, seen *tunnel.PathInfo) {
	for cause, reason := range moveCauses {
		s.moves.WithLabelValues(reason).Add(float64(p.Causes[cause] - seen.Causes[cause]))
	}
	if n := p.Causes[pathstate.CauseOwner] - seen.Causes[pathstate.CauseOwner]; n > 0 {
		reason := moveReasons[p.LastReason]
		if reason == "" {
			reason = "other"
		}
		s.moves.WithLabelValues(reason).Add(float64(n))
	}
	*seen = p
}
