package tunnel

import "net"

// relabel shows p's link under a new virtual address from now on. QUIC takes that for a move of the peer (RFC 9000 §9.3): it validates the
// new path, sends on the old one until then, and then begins there with a new congestion window. Nothing stalls, on the link nothing
// changes. The address before goes on to lead to the link; the one before that is forgotten, unless used says that a session is still
// there, or p's last move is not over: then nothing happens and relabel returns false.
func (m *Merged) relabel(p *port, used func(addr *net.UDPAddr) bool) bool {
	m.adding.Lock()
	defer m.adding.Unlock()
	now := p.main.addr.Load()
	ports := *m.ports.Load()
	if m.done || ports[virtualID(now)] != p || p.former != 0 && used(virtualAddr(p.former)) {
		return false
	}
	m.lastID += 2 // the one between is the alias of the link before
	next := virtualAddr(m.lastID)
	m.changeLocked(func(ports map[uint64]*port) {
		delete(ports, p.former)
		ports[virtualID(next)] = p
	})
	p.former = virtualID(now)
	p.main.addr.Store(next)
	return true
}
