package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/internal/trial"
	"sallyway/tunnel"
)

// Limits of the service behind `sallyway bench`, beside those of package trial. What it sends goes to the peer alone, inside of the peer's
// session: the relay's quotas, congestion control and the peer's own windows bound it like any flow.
const (
	// maxBenchRuns is how many peers may measure at once. More would measure each other.
	maxBenchRuns = 4
	// A node's runs may take benchShare of the time in the long run, and benchBurst at a stretch; one that has less than benchLeast left waits.
	benchShare = 0.25
	benchBurst = 15 * time.Minute
	benchLeast = 10 * time.Second
	// benchConnect bounds a connection that is made to time it.
	benchConnect = 5 * time.Second
	// benchIdle is how long a run may say nothing: its client asks several times a second. What a killed client has left ends with it.
	benchIdle = 15 * time.Second
	// benchBytes is the largest datagram that is echoed, in bytes.
	benchBytes = 2048
	// maxBenchHost is the longest DNS name, in bytes (RFC 1035 §3.1).
	maxBenchHost = 253
)

// protoBench is what flows of the service count and log as.
const protoBench policy.Proto = "bench"

// errBenchOver ends the flows of a run that is over.
var errBenchOver = fmt.Errorf("the run is over: %w", net.ErrClosed)

// bench answers load to peers. The zero value is ready.
type bench struct {
	off bool // set before the first call
	// quic tells what QUIC counts of a session, relayRTT the gateway's own round trip to the relay of a path; nil is not known.
	quic     func(session uint64) (tunnel.QUICStats, tunnel.LinkInfo, bool)
	relayRTT func(path tunnel.LinkInfo) time.Duration

	mu    sync.Mutex
	runs  map[identity.Node]*benchRun     // guarded by mu
	spent map[identity.Node]*rate.Limiter // seconds of runs; guarded by mu
}

// benchRun is one peer's run: from the CONNECT to trial.PortRun to that flow's end.
type benchRun struct {
	h     *handler
	peer  tunnel.Peer
	began time.Time
	cpu   trial.CPU // when it began
	ctx   context.Context
	end   context.CancelCauseFunc

	received, sent, datagrams atomic.Uint64
	receivedAll, sentAll      prometheus.Counter // of all runs
	ended                     sync.Once

	mu    sync.Mutex
	conns map[*benchConn]struct{} // nil when the run is over; guarded by mu
}

// benchTCP opens a flow to one of the services.
func (h *handler) benchTCP(p tunnel.Peer, t policy.Target) (tunnel.Conn, error) {
	c, err := func() (tunnel.Conn, error) {
		if t.Port == trial.PortRun {
			return h.benchStart(p)
		}
		run, err := h.benchRunOf(p)
		if err != nil {
			return nil, err
		}
		c, err := run.open()
		if err != nil {
			return nil, err
		}
		switch t.Port {
		case trial.PortEcho:
			return newEchoConn(c), nil
		case trial.PortDiscard:
			return &discardConn{benchConn: c, half: make(chan struct{})}, nil
		case trial.PortSource:
			return &sourceConn{c}, nil
		}
		_ = c.Close()
		return nil, &tunnel.ProxyError{Type: tunnel.ConnectionRefused, Detail: fmt.Sprintf("there is no service on port %d of %s", t.Port, trial.Host)}
	}()
	if err != nil {
		return nil, h.refuse(p, policy.Target{Proto: protoBench, Host: fmt.Sprintf("%s:%d", trial.Host, t.Port)}, err)
	}
	h.metrics.flows.WithLabelValues(string(protoBench), "ok").Inc()
	return c, nil
}

// benchUDP opens an association with the echo of datagrams.
func (h *handler) benchUDP(p tunnel.Peer, t policy.Target) (net.Conn, error) {
	c, err := func() (net.Conn, error) {
		if t.Port != trial.PortEcho {
			return nil, &tunnel.ProxyError{Type: tunnel.ConnectionRefused, Detail: fmt.Sprintf("there is no service on UDP port %d of %s", t.Port, trial.Host)}
		}
		run, err := h.benchRunOf(p)
		if err != nil {
			return nil, err
		}
		c, err := run.open()
		if err != nil {
			return nil, err
		}
		return &datagramConn{c, make(chan []byte, trial.MaxDatagrams)}, nil
	}()
	if err != nil {
		return nil, h.refuse(p, policy.Target{Proto: protoBench, Host: fmt.Sprintf("%s:%d", trial.Host, t.Port)}, err)
	}
	h.metrics.flows.WithLabelValues(string(protoBench), "ok").Inc()
	return c, nil
}

// benchAllowed says whether a peer may use the services at all: who may reach something here, and only as long as new flows are taken.
func (h *handler) benchAllowed(p tunnel.Peer) error {
	if h.bench.off {
		return &tunnel.ProxyError{Type: tunnel.RequestDenied, Rule: "gatewayd --bench off", Detail: "this gateway is set not to answer bench"}
	}
	s, err := h.enforce.current()
	if err != nil {
		return err
	}
	if !reachesSomething(s, p.Node) {
		return tunnel.Denied(policy.DefaultDeny, fmt.Sprintf("%v may reach no resource of this gateway, so it may not measure the way to it", p.Node))
	}
	return nil
}

// reachesSomething reports whether a rule lets node reach a resource of the snapshot's gateway.
func reachesSomething(s *policy.Snapshot, node identity.Node) bool {
	if _, known := s.Peer(node); !known {
		return false
	}
	for i := range s.Rules {
		for _, subject := range s.Rules[i].Subjects {
			if asGateway(subject) != asGateway(node) {
				continue
			}
			for j := range s.Resource {
				r := &s.Resource[j]
				if r.ID == s.Rules[i].Resource && (len(r.TCP) > 0 || len(r.UDP) > 0 || r.ICMP) {
					return true
				}
			}
		}
	}
	return false
}

// benchStart begins a run, of which a peer has one at a time.
func (h *handler) benchStart(p tunnel.Peer) (tunnel.Conn, error) {
	if err := h.benchAllowed(p); err != nil {
		return nil, err
	}
	b := &h.bench
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	limit := func(detail string) error { return &tunnel.ProxyError{Type: tunnel.ConnectionLimit, Detail: detail} }
	switch left := b.leftLocked(p.Node, now); {
	case b.runs[p.Node] != nil:
		return nil, limit(fmt.Sprintf("%v measures already: one run at a time", p.Node))
	case len(b.runs) >= maxBenchRuns:
		return nil, limit(fmt.Sprintf("%d others measure now, which is the limit: try again in a minute or two", len(b.runs)))
	case left < benchLeast:
		wait := time.Duration(float64(benchLeast-left) / benchShare).Round(time.Second)
		return nil, limit(fmt.Sprintf("%v has measured for as long as it may: try again in %v", p.Node, max(wait, time.Second)))
	}
	run := &benchRun{h: h, peer: p, began: now, cpu: trial.ReadCPU(), conns: map[*benchConn]struct{}{}}
	run.receivedAll, run.sentAll = h.metrics.benchBytes.WithLabelValues("received"), h.metrics.benchBytes.WithLabelValues("sent")
	ctx, cancel := context.WithTimeoutCause(context.Background(), min(trial.MaxRun, b.leftLocked(p.Node, now)), fmt.Errorf("it took too long: %w", errBenchOver))
	run.ctx, run.end = context.WithCancelCause(ctx)
	c, err := run.open()
	if err != nil { // a run has room for its first flow
		cancel()
		return nil, err
	}
	if b.runs == nil {
		b.runs, b.spent = map[identity.Node]*benchRun{}, map[identity.Node]*rate.Limiter{}
	}
	b.runs[p.Node] = run
	h.metrics.benchRuns.Inc()
	h.log.Info("bench began", "peer", p.Node, "session", p.Session)
	context.AfterFunc(run.ctx, func() {
		cancel()
		run.ended.Do(run.over)
	})
	return newRunConn(c), nil
}

// leftLocked is how long a node's runs may still take now.
func (b *bench) leftLocked(n identity.Node, now time.Time) time.Duration {
	l := b.spent[n]
	if l == nil {
		return benchBurst
	}
	return time.Duration(l.TokensAt(now) * float64(time.Second))
}

// chargeLocked takes a run's time off its node's, and forgets nodes that have all of theirs again.
func (b *bench) chargeLocked(n identity.Node, now time.Time, took time.Duration) {
	for other, l := range b.spent {
		if l.TokensAt(now) >= benchBurst.Seconds() {
			delete(b.spent, other)
		}
	}
	l := b.spent[n]
	if l == nil {
		l = rate.NewLimiter(benchShare, int(benchBurst.Seconds()))
		b.spent[n] = l
	}
	seconds := min(int(took.Seconds())+1, l.Burst())
	l.ReserveN(now, seconds) // never refused: no more than the burst
}

// benchRunOf is the peer's run, when it is of the same session.
func (h *handler) benchRunOf(p tunnel.Peer) (*benchRun, error) {
	if err := h.benchAllowed(p); err != nil {
		return nil, err
	}
	h.bench.mu.Lock()
	defer h.bench.mu.Unlock()
	run := h.bench.runs[p.Node]
	if run == nil || run.peer.Session != p.Session {
		return nil, &tunnel.ProxyError{Type: tunnel.RequestError, Detail: fmt.Sprintf("no run was begun in this session: CONNECT %s:%d comes first", trial.Host, trial.PortRun)}
	}
	return run, nil
}

// endDenied ends the runs of peers that may reach nothing here any more, and returns how many.
func (b *bench) endDenied(s *policy.Snapshot) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for node, run := range b.runs {
		if !reachesSomething(s, node) {
			run.end(fmt.Errorf("no policy allows it any more: %w", errBenchOver))
			n++
		}
	}
	return n
}

// finish ends the run and returns when it is forgotten, so that the next one may begin. Only the first reason counts.
func (r *benchRun) finish(reason error) {
	r.end(reason)
	r.ended.Do(r.over)
}

// over closes what the run has open and forgets it, once its context has ended.
func (r *benchRun) over() {
	r.mu.Lock()
	conns := r.conns
	r.conns = nil
	r.mu.Unlock()
	for c := range conns {
		c.cancel()
	}
	b, now := &r.h.bench, time.Now()
	took := now.Sub(r.began)
	b.mu.Lock()
	delete(b.runs, r.peer.Node)
	b.chargeLocked(r.peer.Node, now, took)
	b.mu.Unlock()
	r.h.metrics.benchRuns.Dec()
	r.h.log.Info("bench over", "peer", r.peer.Node, "session", r.peer.Session, "took", took.Round(time.Millisecond),
		"sent", r.sent.Load(), "received", r.received.Load(), "datagrams", r.datagrams.Load(), "reason", context.Cause(r.ctx))
}

// open makes a flow of the run.
func (r *benchRun) open() (*benchConn, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.conns == nil:
		return nil, &tunnel.ProxyError{Type: tunnel.ConnectionTerminated, Detail: "the run is over"}
	case len(r.conns) >= trial.MaxConns:
		return nil, &tunnel.ProxyError{Type: tunnel.ConnectionLimit, Detail: fmt.Sprintf("a run has at most %d flows", trial.MaxConns)}
	}
	c := &benchConn{run: r, done: make(chan struct{})}
	r.conns[c] = struct{}{}
	return c, nil
}

func (r *benchRun) countReceived(n int) {
	r.received.Add(uint64(n))
	r.receivedAll.Add(float64(n))
}

func (r *benchRun) countSent(n int) {
	r.sent.Add(uint64(n))
	r.sentAll.Add(float64(n))
}

// stats is what the peer gets to know of the run.
func (r *benchRun) stats() *trial.Stats {
	st := &trial.Stats{Received: r.received.Load(), Sent: r.sent.Load(), Datagrams: r.datagrams.Load()}
	now := trial.ReadCPU()
	st.CPU = trial.CPU{
		Process: now.Process - r.cpu.Process, Cores: now.Cores, HostBusy: now.HostBusy - r.cpu.HostBusy, HostTotal: now.HostTotal - r.cpu.HostTotal,
	}
	b := &r.h.bench
	if b.quic == nil {
		return st
	}
	q, path, ok := b.quic(r.peer.Session)
	if !ok {
		return st
	}
	st.Sender = trial.Sender{Packets: q.PacketsSent, Lost: q.PacketsLost, Bytes: q.BytesSent, Window: q.CongestionWindow, RTT: q.RTT, MinRTT: q.MinRTT}
	if b.relayRTT != nil {
		st.RelayRTT = b.relayRTT(path)
	}
	return st
}

// connect times a TCP handshake with a destination that policies allow the peer. Nothing is sent on the connection.
func (r *benchRun) connect(req trial.Request) (*trial.Connect, error) {
	h := r.h
	// As strict as for a flow's target: what no name has does not get into look-ups and logs.
	if len(req.Host) > maxBenchHost || strings.ContainsFunc(req.Host, func(c rune) bool { return c <= ' ' || c >= 0x7f || strings.ContainsRune(`/\@[]%?#"`, c) }) {
		return nil, &tunnel.ProxyError{Type: tunnel.RequestError, Detail: "this is no name of a host"}
	}
	t := policy.Target{Proto: policy.TCP, Host: req.Host, Port: req.Port}
	if a, err := netip.ParseAddr(req.Host); err == nil {
		t.Addr = a.Unmap().WithZone("")
		t.Host = t.Addr.String()
	}
	dest, err := h.enforce.check(r.ctx, r.peer.Node, t)
	if err != nil {
		return nil, h.refuse(r.peer, t, err)
	}
	ctx, cancel := context.WithTimeout(r.ctx, benchConnect)
	defer cancel()
	began := time.Now()
	c, err := h.dialer.DialContext(ctx, "tcp", netip.AddrPortFrom(dest.addrs[0], t.Port).String())
	took := &trial.Connect{Took: time.Since(began)}
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		took.Refused = true
		_ = h.refuse(r.peer, t, err)
		return took, nil
	case err != nil:
		return nil, h.refuse(r.peer, t, err)
	}
	h.metrics.flows.WithLabelValues("tcp", "ok").Inc()
	h.log.Debug("flow open", "peer", r.peer.Node, "to", t, "rule", dest.decision.Rule, "for", "bench")
	return took, c.Close()
}

// answer serves the lines of a run until they end.
func (r *benchRun) answer(in io.Reader, out io.Writer) error {
	lines := trial.NewLines(in, out)
	connects := 0
	idle := time.AfterFunc(benchIdle, func() { r.end(fmt.Errorf("nothing was asked for %v: %w", benchIdle, errBenchOver)) })
	defer idle.Stop()
	for {
		var req trial.Request
		if err := lines.Read(&req); err != nil {
			return err
		}
		idle.Reset(benchIdle)
		var a trial.Answer
		var err error
		switch req.Op {
		case trial.OpStats:
			a.Stats = r.stats()
		case trial.OpConnect:
			if connects++; connects > trial.MaxConnects {
				err = fmt.Errorf("a run may connect %d times", trial.MaxConnects)
			} else {
				a.Connect, err = r.connect(req)
			}
		default:
			err = fmt.Errorf("this gateway does not know what %.20q is", req.Op)
		}
		if err != nil {
			a.Error = err.Error()
		}
		if err := lines.Write(a); err != nil {
			return err
		}
	}
}
