package netstack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// silentFor is how long a silent rejection is remembered: an app repeats its SYN for about two minutes (Linux:
	// tcp_syn_retries 6), and none of them may start another dial.
	silentFor = 150 * time.Second
	// maxSilent bounds what is remembered; beyond it repeated SYNs are dialled again.
	maxSilent = 8192

	tcpFlagSYN = 0x02
	tcpFlagACK = 0x10

	keepaliveIdle     = 2 * time.Minute
	keepaliveInterval = 30 * time.Second
	keepaliveCount    = 5
)

// ErrDecided is returned for a request that was accepted or rejected before.
var ErrDecided = errors.New("netstack: request already decided")

// tcpFlows are the connections that are being decided, and what bounds them.
type tcpFlows struct {
	s   *Stack
	ctx context.Context
	fwd *tcp.Forwarder

	mu      sync.Mutex // guards what follows; nothing is called under it
	stopped bool
	pending map[stack.TransportEndpointID]*TCPRequest
	perDst  map[netip.Addr]int
	silent  map[stack.TransportEndpointID]silentSYN
}

// silentSYN is a SYN that was rejected in silence.
type silentSYN struct {
	seq   uint32
	until time.Time
}

func newTCPFlows(s *Stack) *tcpFlows {
	return &tcpFlows{
		s:       s,
		pending: map[stack.TransportEndpointID]*TCPRequest{},
		perDst:  map[netip.Addr]int{},
		silent:  map[stack.TransportEndpointID]silentSYN{},
	}
}

func (t *tcpFlows) attach(gv *stack.Stack) {
	t.fwd = tcp.NewForwarder(gv, 0, t.s.cfg.Dials, t.serve)
}

func (t *tcpFlows) start(ctx context.Context) { t.ctx = ctx }

// stop lets no more connections in.
func (t *tcpFlows) stop() {
	t.mu.Lock()
	t.stopped = true
	t.mu.Unlock()
}

// handlePacket gets the TCP segments that belong to no connection. False makes the stack answer with a reset.
func (t *tcpFlows) handlePacket(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	seg := pkt.TransportHeader().Slice()
	if len(seg) < tcpHeaderLen || seg[13]&(tcpFlagSYN|tcpFlagACK) != tcpFlagSYN {
		return false
	}
	st := &t.s.stats
	seq := binary.BigEndian.Uint32(seg[4:])
	dst := addrOf(id.LocalAddress)

	t.mu.Lock()
	if _, again := t.pending[id]; again || t.stopped {
		t.mu.Unlock()
		return true
	}
	if x, ok := t.silent[id]; ok {
		if x.seq == seq {
			t.mu.Unlock()
			return true
		}
		delete(t.silent, id) // another connection from the same port
	}
	if len(t.pending) >= t.s.cfg.Dials || t.perDst[dst] >= t.s.cfg.DialsPerDestination ||
		st.tcpFlows.Load() >= int64(t.s.cfg.TCPFlows) {
		t.mu.Unlock()
		st.tcpOverLimit.Add(1)
		return true
	}
	r := &TCPRequest{
		Src: netip.AddrPortFrom(addrOf(id.RemoteAddress), id.RemotePort),
		Dst: netip.AddrPortFrom(dst, id.LocalPort),
		t:   t, id: id, seq: seq,
	}
	r.quote.set(pkt.NetworkHeader().Slice(), seg)
	t.pending[id] = r
	t.perDst[dst]++
	t.s.handlers.Add(1)
	t.mu.Unlock()
	st.tcpDials.Add(1)
	st.tcpFlows.Add(1)

	if !t.fwd.HandlePacket(id, pkt) {
		t.forget(r)
		t.finish()
		return false
	}
	return true
}

// forget ends the decision about r.
func (t *tcpFlows) forget(r *TCPRequest) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.pending[r.id] != r {
		return
	}
	delete(t.pending, r.id)
	dst := r.Dst.Addr()
	if t.perDst[dst]--; t.perDst[dst] == 0 {
		delete(t.perDst, dst)
	}
	t.s.stats.tcpDials.Add(-1)
}

// finish is the end of a flow.
func (t *tcpFlows) finish() {
	t.s.stats.tcpFlows.Add(-1)
	t.s.handlers.Done()
}

// serve runs the handler, on a goroutine of the forwarder.
func (t *tcpFlows) serve(req *tcp.ForwarderRequest) {
	t.mu.Lock()
	r := t.pending[req.ID()]
	t.mu.Unlock()
	defer t.finish()
	r.req = req
	t.s.stats.tcpRequests.Add(1)
	if h := t.s.cfg.HandleTCP; h != nil {
		h(t.ctx, r)
	}
	r.Reject(Refused) // where the handler has not decided
}

// sweep forgets silent rejections that no SYN repeats any more.
func (t *tcpFlows) sweep(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, x := range t.silent {
		if now.After(x.until) {
			delete(t.silent, id)
		}
	}
}

// TCPRequest is a connection that an app has asked for and that has not got an answer. Until it is accepted or rejected the
// app waits, and its repeated SYNs are ignored. A handler that returns without a decision has refused it.
type TCPRequest struct {
	Src, Dst netip.AddrPort // of the app, and what it dialled

	t     *tcpFlows
	id    stack.TransportEndpointID
	seq   uint32
	req   *tcp.ForwarderRequest
	quote quote

	mu      sync.Mutex // guards decided
	decided bool
}

func (r *TCPRequest) decide() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	first := !r.decided
	r.decided = true
	return first
}

// Accept completes the handshake with the app. The caller closes the connection. An error means that the app has gone.
func (r *TCPRequest) Accept() (*TCPConn, error) {
	if !r.decide() {
		return nil, ErrDecided
	}
	defer r.t.forget(r)
	wq := new(waiter.Queue)
	ep, terr := r.req.CreateEndpoint(wq)
	r.req.Complete(false)
	if terr != nil {
		r.t.s.stats.tcpFailed.Add(1)
		return nil, fmt.Errorf("accept %v for %v: %w", r.Dst, r.Src, goError(terr))
	}
	c, err := newTCPConn(ep, wq, r.Src, r.Dst)
	if err != nil {
		ep.Abort()
		return nil, err
	}
	r.t.mu.Lock()
	stopped := r.t.stopped
	r.t.mu.Unlock()
	if stopped {
		_ = c.Reset()
		return nil, net.ErrClosed
	}
	r.t.s.stats.tcpAccepted.Add(1)
	return c, nil
}

// Reject tells the app why there is no connection. It does nothing for a request that is decided.
func (r *TCPRequest) Reject(reason Reason) {
	if !r.decide() {
		return
	}
	defer r.t.forget(r)
	r.t.s.stats.tcpRejected.Add(1)
	if reason == Silent {
		r.t.mu.Lock()
		if len(r.t.silent) < maxSilent {
			r.t.silent[r.id] = silentSYN{r.seq, time.Now().Add(silentFor)}
		}
		r.t.mu.Unlock()
	}
	r.req.Complete(reason == Refused)
	if reason != Refused && reason != Silent {
		_ = r.t.s.Reject(r.quote.b[:r.quote.n], reason) // counted, and the app asks again
	}
}

func addrOf(a tcpip.Address) netip.Addr {
	b, _ := netip.AddrFromSlice(a.AsSlice())
	return b
}
