package tunnel

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"sallyway/stun"
)

// peerSession is a session at the gateway.
type peerSession struct {
	srv       *Server
	conn      *quic.Conn
	peer      Peer
	since     time.Time
	responder *stun.Responder
	keys      stun.Keys       // this end's, for probes
	ctx       context.Context // the connection's

	flows      meter // read from the peer, written to it
	open, seen atomic.Int64
	renewed    atomic.Uint64 // congestion windows
	rescued    atomic.Uint64
	stuck      stuck // the server's watchRescues alone uses this and the next two
	known      known
	stoodIn    int // how often its link was shown under another's address since it was not stuck
	ctrl       atomic.Pointer[control]
}

// run serves requests until the connection ends and every handler has returned.
func (p *peerSession) run() {
	h := &http3.Server{Handler: p, EnableDatagrams: true, MaxHeaderBytes: maxHeader}
	ctx, cancel := context.WithCancel(p.ctx)
	var watching sync.WaitGroup
	watching.Go(func() { p.watchWindow(ctx) })
	_ = h.ServeQUICConn(p.conn) // why it ended is the connection's cause
	cancel()
	watching.Wait()
}

// ServeHTTP tells requests apart.
func (p *peerSession) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodConnect {
		if r.URL.Path == dnsPath {
			p.serveDNS(w, r)
			return
		}
		p.fail(w, &ProxyError{Type: RequestError, Status: http.StatusNotFound, Detail: "this is a gateway: there is nothing here"})
		return
	}
	switch r.Proto {
	case protoUDP:
		p.serveUDP(w, r)
	case protoIP:
		p.serveIP(w, r)
	case protoControl:
		p.serveControl(w, r)
	case "HTTP/3.0", "":
		p.serveConnect(w, r)
	default:
		p.fail(w, &ProxyError{Type: RequestError, Status: http.StatusNotImplemented, Detail: fmt.Sprintf("protocol %.40q is not spoken here", r.Proto)})
	}
}

// openFlow counts a flow in. The caller calls done when it is over.
func (p *peerSession) openFlow() (done func(), err error) {
	s, node := p.srv, p.peer.Node
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining != "" {
		return nil, &ProxyError{Type: ConnectionLimit, Detail: s.draining}
	}
	if s.flows[node] >= s.cfg.Limits.Flows {
		return nil, &ProxyError{Type: ConnectionLimit, Detail: fmt.Sprintf("%v has %d flows open, which is the limit", node, s.flows[node])}
	}
	s.flows[node]++
	p.open.Add(1)
	p.seen.Add(1)
	return func() {
		p.open.Add(-1)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.flows[node]--; s.flows[node] == 0 {
			delete(s.flows, node)
		}
	}, nil
}

// serveControl is the control stream at the gateway.
func (p *peerSession) serveControl(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != controlPath || p.ctrl.Load() != nil {
		p.fail(w, &ProxyError{Type: RequestError, Detail: "one control stream a session, at " + controlPath})
		return
	}
	str, err := takeStream(w)
	if err != nil {
		return // the peer is gone
	}
	str.SetPriority(0, false) // before any flow (RFC 9218 §4)
	ctrl := newControl(str)
	_ = ctrl.send(Notice{Type: noticeHello, Data: helloAnswers}) // the queue is empty
	if !p.ctrl.CompareAndSwap(nil, ctrl) {
		str.CancelRead(codeCanceled)
		str.CancelWrite(codeCanceled)
		return
	}
	ctx, cancel := context.WithCancel(p.ctx)
	written := make(chan struct{})
	go func() {
		defer close(written)
		ctrl.run(ctx)
	}()
	p.receiveNotices(newNoticeReader(str))
	// Without control a session neither moves nor hears of its end.
	_ = p.conn.CloseWithError(quic.ApplicationErrorCode(CloseNormal), "control stream ended")
	cancel()
	<-written
}

func (p *peerSession) receiveNotices(notices *noticeReader) {
	var freed time.Time
	for {
		n, err := notices.next()
		if err != nil {
			return
		}
		if n.Type == noticeCrowded {
			// A move has QUIC forget all other paths. It needs a connection ID, which it takes from the oldest path if that is silent.
			if now := time.Now(); now.Sub(freed) >= crowdedEvery && p.srv.renew(p) {
				freed = now
			}
			continue
		}
		if n.Type == noticePath {
			if ctrl := p.ctrl.Load(); len(n.Data) > 0 && len(n.Data) < mostMove && ctrl != nil {
				_ = ctrl.send(Notice{Type: noticeFollowed, Data: n.Data}) // a peer that wants more answers than there is room for asks again
			}
			p.srv.cfg.Logger.Info("peer moved", "peer", p.peer.Node, "session", p.peer.Session, "path", p.info().Path.Name, "reason", n.Reason)
			continue
		}
		if p.srv.cfg.OnNotice != nil {
			p.srv.cfg.OnNotice(p.peer, n)
		}
	}
}

func (p *peerSession) info() SessionInfo {
	in := SessionInfo{
		Peer: p.peer, Since: p.since, Flows: uint64(p.open.Load()), TotalFlows: uint64(p.seen.Load()),
		Sent: p.flows.written.Load(), Received: p.flows.read.Load(), RTT: p.conn.ConnectionStats().SmoothedRTT,
		Renewed: p.renewed.Load(), Rescued: p.rescued.Load(),
	}
	if a, ok := p.conn.RemoteAddr().(*net.UDPAddr); ok {
		in.Virtual = addrPort(a)
		if port := p.srv.merged.port(a); port != nil {
			in.Path = port.info
		}
	}
	return in
}
