package relay

import (
	"sync/atomic"
	"time"

	"github.com/pion/stun/v4"
	"github.com/prometheus/client_golang/prometheus"
)

type counter = atomic.Uint64

// counters are the relay's, since its start. Datagrams where nothing else is said.
type counters struct {
	relayed          counter
	relayedBytes     counter // payload
	unbound          counter // dropped: no channel, or the peer has none, or it ran out
	unpermitted      counter // dropped: a peer that the allocation has not permitted
	overQuota        counter // dropped: bandwidth
	queueDrops       counter // dropped: a slow TCP, TLS or DTLS client
	controlDrops     counter // messages of the relay's own that a slow TCP, TLS or DTLS client did not get
	writeErrors      counter
	readErrors       counter
	malformed        counter // messages dropped
	relayedSockDrops counter // by the kernel, at relayed sockets that are closed
	repeatDrops      counter // indications not sent again: too many wait
	strays           counter // ChannelData and DTLS records of nobody known
	unknown          counter // Unknown indications sent
	limited          counter // unauthenticated answers withheld
	bindings         counter // requests

	allocated         counter // allocations
	ended             counter // allocations
	rendezvous        counter // answered
	authFailed        counter // requests with wrong credentials
	authExpired       counter // requests with expired credentials
	authThrottled     counter // requests not looked at or not answered after failures
	forbidden         counter // requests and indications for what is not allowed
	handshakesRefused counter
	handshakesFailed  counter
	acceptErrors      counter
	errors            [8]counter // answers, by class of errorCodes

	reported     uint64 // what reportAbuse has told so far; the sweep's
	lastReported time.Time
}

// errorCodes are the codes that are counted by themselves; the last counter is for all others.
var errorCodes = [7]stun.ErrorCode{400, 401, 403, 437, 438, 486, 508}

// refused counts an error answer.
func (c *counters) refused(code stun.ErrorCode) {
	for i, known := range errorCodes {
		if known == code {
			c.errors[i].Add(1)
			return
		}
	}
	c.errors[len(errorCodes)].Add(1)
}

// register makes the counters visible to Prometheus.
func (s *Server) register(r prometheus.Registerer) error {
	c := &s.count
	add := func(name, help string, labels prometheus.Labels, v *counter) error {
		return r.Register(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Namespace: "sallyway", Subsystem: "relay", Name: name, Help: help, ConstLabels: labels,
		}, func() float64 { return float64(v.Load()) }))
	}
	for _, m := range []struct {
		name, help string
		labels     prometheus.Labels
		v          *counter
	}{
		{"datagrams_total", "Datagrams relayed.", nil, &c.relayed},
		{"bytes_total", "Payload bytes relayed.", nil, &c.relayedBytes},
		{"dropped_total", "Datagrams not relayed.", prometheus.Labels{"reason": "unbound"}, &c.unbound},
		{"dropped_total", "Datagrams not relayed.", prometheus.Labels{"reason": "unpermitted"}, &c.unpermitted},
		{"dropped_total", "Datagrams not relayed.", prometheus.Labels{"reason": "bandwidth"}, &c.overQuota},
		{"dropped_total", "Datagrams not relayed.", prometheus.Labels{"reason": "queue_full"}, &c.queueDrops},
		{"dropped_total", "Datagrams not relayed.", prometheus.Labels{"reason": "write_error"}, &c.writeErrors},
		{"dropped_total", "Datagrams not relayed.", prometheus.Labels{"reason": "malformed"}, &c.malformed},
		{"dropped_total", "Datagrams not relayed.", prometheus.Labels{"reason": "unknown_source"}, &c.strays},
		{"dropped_total", "Datagrams not relayed.", prometheus.Labels{"reason": "left_behind"}, &s.aside.dropped},
		{"control_dropped_total", "Messages of the relay's own that a slow client did not get.", nil, &c.controlDrops},
		{"set_aside_total", "Times that a source was set aside for sending more than its share of a full queue.", nil, &s.aside.total},
		{"repeats_dropped_total", "Indications not sent again: too many waited.", nil, &c.repeatDrops},
		{"read_errors_total", "Errors of UDP reads.", nil, &c.readErrors},
		{"unknown_indications_total", "Sources told that the relay does not know them.", nil, &c.unknown},
		{"replies_withheld_total", "Unauthenticated answers withheld by rate limits.", nil, &c.limited},
		{"bindings_total", "STUN Binding requests.", nil, &c.bindings},
		{"allocations_total", "Allocations made.", nil, &c.allocated},
		{"allocations_ended_total", "Allocations ended.", nil, &c.ended},
		{"rendezvous_total", "Rendezvous answered.", nil, &c.rendezvous},
		{"auth_failures_total", "Requests refused for their credentials.", prometheus.Labels{"reason": "wrong"}, &c.authFailed},
		{"auth_failures_total", "Requests refused for their credentials.", prometheus.Labels{"reason": "expired"}, &c.authExpired},
		{"auth_failures_total", "Requests refused for their credentials.", prometheus.Labels{"reason": "throttled"}, &c.authThrottled},
		{"forbidden_total", "Requests for what is not allowed.", nil, &c.forbidden},
		{"handshakes_refused_total", "TLS and DTLS handshakes refused by limits.", nil, &c.handshakesRefused},
		{"handshakes_failed_total", "TLS and DTLS handshakes that failed.", nil, &c.handshakesFailed},
		{"accept_errors_total", "Errors of accepting TCP connections.", nil, &c.acceptErrors},
	} {
		if err := add(m.name, m.help, m.labels, m.v); err != nil {
			return err
		}
	}
	for i := range c.errors {
		code := "other"
		if i < len(errorCodes) {
			code = stunCode(errorCodes[i])
		}
		if err := add("errors_total", "STUN error answers.", prometheus.Labels{"code": code}, &c.errors[i]); err != nil {
			return err
		}
	}
	gauge := func(name, help string, f func() float64) error {
		return r.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "sallyway", Subsystem: "relay", Name: name, Help: help}, f))
	}
	if err := gauge("allocations", "Live allocations.", func() float64 { return float64(s.Allocations()) }); err != nil {
		return err
	}
	if err := gauge("draining", "1 while the relay refuses new allocations.", func() float64 {
		if s.draining.Load() {
			return 1
		}
		return 0
	}); err != nil {
		return err
	}
	if err := gauge("set_aside", "Sources that are set aside now.", func() float64 { return float64(len(*s.aside.view.Load())) }); err != nil {
		return err
	}
	return r.Register(sockets{s})
}

func stunCode(c stun.ErrorCode) string {
	return string([]byte{'0' + byte(c/100), '0' + byte(c/10%10), '0' + byte(c%10)})
}

// Snapshot is the relay's state at a moment, for status and heartbeats. It has no addresses.
type Snapshot struct {
	Ready       bool          `json:"ready"`
	Draining    bool          `json:"draining"`
	Uptime      time.Duration `json:"uptime"`
	Allocations int           `json:"allocations"`
	Connections int           `json:"connections"` // DTLS, TCP and TLS
	// ByOrganization counts live allocations; Nodes says more of each node that has one.
	ByOrganization map[string]int          `json:"by_organization"`
	Nodes          map[string]NodeSnapshot `json:"nodes"`
	Datagrams      uint64                  `json:"datagrams"` // relayed
	Bytes          uint64                  `json:"bytes"`     // of payload relayed
	Dropped        uint64                  `json:"dropped"`   // datagrams
	AuthFailures   uint64                  `json:"auth_failures"`
	// BufferErrors are datagrams that the kernel dropped because a receive buffer of the relay was full (UdpRcvbufErrors).
	BufferErrors uint64 `json:"buffer_errors"`
}

// NodeSnapshot is about one node's live allocations.
type NodeSnapshot struct {
	Allocations int    `json:"allocations"`
	Sent        uint64 `json:"sent"`     // payload bytes from the node
	Received    uint64 `json:"received"` // payload bytes to the node
	Dropped     uint64 `json:"dropped"`  // datagrams of and to the node
}

// Snapshot returns the relay's state.
func (s *Server) Snapshot() Snapshot {
	c := &s.count
	v := Snapshot{
		Ready: s.Ready(), Draining: s.draining.Load(), Uptime: s.now().Sub(s.start),
		ByOrganization: map[string]int{}, Nodes: map[string]NodeSnapshot{},
		Datagrams: c.relayed.Load(), Bytes: c.relayedBytes.Load(),
		Dropped: c.unbound.Load() + c.unpermitted.Load() + c.overQuota.Load() + c.queueDrops.Load() + c.writeErrors.Load() +
			c.malformed.Load() + c.strays.Load() + s.aside.dropped.Load(),
		AuthFailures: c.authFailed.Load() + c.authExpired.Load(),
		BufferErrors: s.bufferErrors(),
		Connections:  len(s.conns.snapshot()),
	}
	for _, a := range s.table.snapshot() {
		v.Allocations++
		v.ByOrganization[a.owner.Org]++
		n := v.Nodes[a.owner.String()]
		n.Allocations++
		n.Sent += a.sent.Load()
		n.Received += a.got.Load()
		n.Dropped += a.dropped.Load()
		v.Nodes[a.owner.String()] = n
	}
	return v
}

// bufferErrors are the datagrams that the kernel did not put into a queue of the port, or of a relayed socket, for want of room. What was
// refused at the sockets of sources that are set aside is not among them: there it is meant.
func (s *Server) bufferErrors() (n uint64) {
	s.listening.Lock()
	defer s.listening.Unlock()
	for _, sh := range s.sockets {
		if !sh.outcasts {
			n += sh.sock.Drops()
		}
	}
	return n + s.relayedDrops()
}

// relayedDrops are those of relayed sockets, closed ones included.
func (s *Server) relayedDrops() uint64 {
	n := s.count.relayedSockDrops.Load()
	for _, a := range s.table.snapshot() {
		if r := a.sock.Load(); r != nil {
			n += r.sock.Drops()
		}
	}
	return n
}

// reportAbuse logs, once per window and without saying who, that answers were withheld or credentials were wrong.
func (s *Server) reportAbuse() {
	const window = 10 * time.Second
	c := &s.count
	total := c.limited.Load() + c.authFailed.Load() + c.authThrottled.Load() + c.handshakesRefused.Load()
	now := s.now()
	if total == c.reported || now.Sub(c.lastReported) < window {
		return
	}
	s.log.Warn("requests refused", "since_last", total-c.reported, "replies_withheld", c.limited.Load(), "auth_failed", c.authFailed.Load(),
		"auth_throttled", c.authThrottled.Load(), "handshakes_refused", c.handshakesRefused.Load())
	c.reported, c.lastReported = total, now
}
