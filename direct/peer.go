package direct

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

// Peer is an other end of an Endpoint's. Its methods may be called concurrently.
type Peer struct {
	e   *Endpoint
	cfg PeerConfig

	// What follows is guarded by the endpoint's mu.
	checks  *checks
	hosts   []netip.Addr
	link    *Link // the asking end's
	punched bool
	used    time.Time // when it was punched, or last had a link
	failed  bool
	closed  bool
}

// Punch sends probes to the other end's addresses, the first 250 ms one every 50 ms to each, two seconds in all, and takes the other
// end's. Addresses that are not usable here are left out. It counts once.
//
// The first probes have left when it returns, so that an end which punches before it answers is the first: where the other end's probe
// comes first, a NAT that keeps track of it gives this end's another port.
func (p *Peer) Punch(addrs []netip.AddrPort) {
	p.start(addrs, p.e.private())
	p.e.step(time.Now())
	p.e.stepSoon()
}

func (p *Peer) start(addrs []netip.AddrPort, private bool) {
	e := p.e
	e.mu.Lock()
	defer e.mu.Unlock()
	if p.closed || p.punched {
		return
	}
	p.punched = true
	var use []netip.AddrPort
	for _, a := range addrs {
		if a = unmap(a); e.usable(a, private) && len(use) < MaxCandidates {
			use = append(use, a)
		}
	}
	for _, a := range use {
		if e.exact[a] == nil {
			e.exact[a] = p
		}
		if slices.Contains(p.hosts, a.Addr()) {
			continue
		}
		p.hosts = append(p.hosts, a.Addr())
		h := e.hosts[a.Addr()]
		if h == nil {
			h = &host{tokens: hostBurst, filled: time.Now()}
			e.hosts[a.Addr()] = h
		}
		h.peers = append(h.peers, p)
	}
	p.used = time.Now()
	p.checks.start(p.used, use)
}

// failLocked ends the attempt and returns what tells it.
func (p *Peer) failLocked(err error) func() {
	p.failed = true
	return func() {
		if p.cfg.OnFail != nil {
			p.cfg.OnFail(err)
		}
	}
}

// Close ends the exchange with the other end, and its links. It may be called more than once, and after the endpoint has ended.
func (p *Peer) Close() {
	p.e.mu.Lock()
	defer p.e.mu.Unlock()
	p.e.forgetLocked(p)
	p.e.stepSoon()
}

// forgetLocked takes a peer out of the tables.
func (e *Endpoint) forgetLocked(p *Peer) {
	if p.closed {
		return
	}
	p.closed = true
	delete(e.peers, p)
	maps.DeleteFunc(e.exact, func(_ netip.AddrPort, q *Peer) bool { return q == p })
	for _, a := range p.hosts {
		if h := e.hosts[a]; h != nil {
			h.peers = slices.DeleteFunc(h.peers, func(q *Peer) bool { return q == p })
			if len(h.peers) == 0 {
				delete(e.hosts, a)
			}
		}
	}
	for _, l := range *e.links.Load() {
		if l.peer == p {
			e.dropLocked(l)
		}
	}
	if len(e.peers) == 0 {
		e.idle = time.Now()
	}
}

// take takes a probe's token of the host.
func (h *host) take(now time.Time) bool {
	h.tokens = min(h.tokens+max(now.Sub(h.filled), 0).Seconds()*hostRate, hostBurst)
	h.filled = now
	if h.tokens < 1 {
		return false
	}
	h.tokens--
	return true
}

// candidatesLocked are the peers whose probe a datagram from the address may be: at most one where the address has proved itself or was
// named, else those that named the host, as often as its rate allows.
func (e *Endpoint) candidatesLocked(now time.Time, from netip.AddrPort) []*Peer {
	h := e.hosts[from.Addr()]
	if h == nil {
		return nil
	}
	if p := e.exact[from]; p != nil && len(h.peers) == 1 {
		return h.peers
	} else if p != nil {
		// Two sessions of one node come from one address: the one that named it first is the first to try.
		return append([]*Peer{p}, h.others(now, p)...)
	}
	return h.others(now, nil)
}

// others are the host's peers but one, as far as its rate goes.
func (h *host) others(now time.Time, but *Peer) []*Peer {
	var out []*Peer
	for _, p := range h.peers {
		if p != but {
			if !h.take(now) {
				break
			}
			out = append(out, p)
		}
	}
	return out
}
