package tunnel

import (
	"context"
	"net"
	"slices"
	"time"
)

// watchWindow gives what the gateway sends a new congestion window when a renewal says so, until ctx ends.
func (p *peerSession) watchWindow(ctx context.Context) {
	stirred := make(chan struct{}, 1)
	p.flows.wake = func() {
		select {
		case stirred <- struct{}{}:
		default:
		}
	}
	p.flows.idle.Store(true)
	ticker := time.NewTicker(renewSample)
	defer ticker.Stop()
	var r renewal
	for {
		ticker.Stop()
		select {
		case <-ctx.Done():
			return
		case <-stirred:
		}
		ticker.Reset(renewSample)
		moved, lastMoved := p.flows.total(), time.Now()
		for busy := true; busy; {
			var now time.Time
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
				now = time.Now()
			}
			if r.sample(now, p.conn.ConnectionStats()) && p.srv.renew(p) {
				r.began(now)
				p.renewed.Add(1)
				p.srv.cfg.Logger.Debug("congestion window renewed", "peer", p.peer.Node, "session", p.peer.Session)
			}
			if m := p.flows.total(); m != moved {
				moved, lastMoved = m, now
			} else if now.Sub(lastMoved) >= busyFor {
				p.flows.idle.Store(true)
				busy = p.flows.total() != moved // else a byte passed just before it would have woken us
			}
		}
	}
}

// renew shows a session's link under a new address.
func (s *Server) renew(p *peerSession) bool {
	a, ok := p.conn.RemoteAddr().(*net.UDPAddr)
	if !ok {
		return false
	}
	port := s.merged.port(a)
	if port == nil {
		return false
	}
	return s.relabel(port)
}

func (s *Server) relabel(p *port) bool {
	return s.merged.relabel(p, func(addr *net.UDPAddr) bool { return s.behind(virtualID(addr)) })
}

// renew gives what the client sends a new congestion window: the spare slot takes over the active one's link. It reports whether it did. It
// does nothing where a failover may need the spare: while a path is in doubt, and right after a move.
func (s *Session) renew(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil || now.Sub(s.lastMove) < renewPause || !s.takeOverLocked(false) {
		return false
	}
	s.renewed++
	s.cfg.Logger.Debug("congestion window renewed", "gateway", s.cfg.Gateway, "path", s.slots[s.active].to.Load().info.Name)
	s.tasks.Go(s.prepareSpare)
	return true
}

// takeOverLocked has the spare slot, or the standby's if need be, take over the active one's link, if there is one and the link is alive. QUIC begins
// to send there at once, with a new congestion window and all that was under way.
func (s *Session) takeOverLocked(need bool) bool {
	i := slices.IndexFunc(s.slots[:], func(sl *slot) bool {
		return sl.validated && sl != s.slots[s.active] && (s.standby < 0 || sl != s.slots[s.standby])
	})
	if i < 0 && need && s.standby >= 0 && s.slots[s.standby].validated {
		i = s.standby
	}
	if i < 0 {
		return false
	}
	old := s.slots[s.active].to.Load()
	if old.mon.status().State != Alive {
		return false
	}
	next := &slotLink{s: s.slots[i], link: old.link, info: old.info, mon: old.mon, gone: make(chan struct{})}
	old.receives.Store(false)
	s.slots[i].point(next, true)
	s.watchLink(next)
	if err := s.slots[i].path.Switch(); err != nil {
		s.cfg.Logger.Warn("slots not switched", "gateway", s.cfg.Gateway, "err", err)
		return false
	}
	s.active = i
	if s.standby == i {
		s.standby = -1
	}
	return true
}
