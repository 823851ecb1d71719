package tunnel

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/quic-go/quic-go"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
)

// LinkInfo is what is known about a link where it is handed over.
type LinkInfo struct {
	// Name is for people: the relay and transport, such as "fra-1 udp".
	Name string
	// Peer is who the link leads to, as the relay vouches; the session's TLS proves it. The zero Node is anybody.
	Peer identity.Node
	// Rank orders kinds of paths: of two that are as good a session prefers the lower one.
	Rank int
}

// MergedConfig configures a Merged. The zero value is fine.
type MergedConfig struct {
	// Queue bounds what waits to be read, in buffers of 64 KiB; 0 is DefaultQueue. Where it is full, the address that has most waiting loses
	// its newest, which is counted.
	Queue int
}

// ConnStats counts what passed between links and QUIC.
type ConnStats struct {
	// Received and Sent are datagrams of QUIC.
	Received, Sent uint64
	// DroppedFull are datagrams that found the queue full.
	DroppedFull uint64
	// DroppedUnknown are datagrams to a virtual address whose link is gone.
	DroppedUnknown uint64
	// DroppedSize are received datagrams larger than any QUIC packet of ours.
	DroppedSize uint64
	// DroppedLate are received datagrams that were dropped because the queue had stood for more than 20 ms, Marked those that were marked as
	// having met congestion because it had for more than 5 ms.
	DroppedLate, Marked uint64
	// Paused is how often a connection had enough datagrams to look at and got no more for a moment, Stalled how often it was then not
	// seen to look at any.
	Paused, Stalled uint64
	// Probes are datagrams that were no QUIC.
	Probes uint64
	// Links is how many links there are now.
	Links int
	// Rescued is how often what was sent to an address began to leave over another link of the same peer, because a session could not follow
	// its peer there.
	Rescued uint64
}

// Merged joins a gateway's links into the one packet conn that QUIC serves on. Every link gets a virtual address of its own, which is
// never given to another one, so that a move of a session from link to link is a migration to QUIC.
type Merged struct {
	vconn
	ports atomic.Pointer[map[uint64]*port] // by number, two a link; copied on change
	probe atomic.Pointer[func(p *port, payload []byte)]

	adding sync.Mutex // guards changes of ports, what follows, and the fields of watchers
	lastID uint64
	done   bool
	links  map[*port]struct{}
	lent   map[uint64]lent     // addresses by number
	conns  map[remote]struct{} // that take what arrives

	stop     chan struct{}
	watchers sync.WaitGroup
}

var _ quic.OOBCapablePacketConn = (*Merged)(nil)

// port is a link of a Merged.
type port struct {
	m    *Merged
	link datagram.Link
	info LinkInfo
	// main has the link's virtual address, which relabel changes. alias has another one, of packets that a client marked: to QUIC they come
	// on another path, so that a client can have a second path validated over the only link it has.
	main, alias source
	former      uint64 // the number of the address that main had before, 0 for none; guarded by the Merged's adding

	// responder is the session whose probes were last seen on the link: the first to try. proved is when that was, since epoch.
	responder atomic.Pointer[peerSession]
	proved    atomic.Int64
}

// Receive implements datagram.Receiver.
func (p *port) Receive(b datagram.Batch) { p.m.receive(b, &p.main, p) }

func (p *port) handleProbe(payload []byte) {
	if payload[0] == aliasMark {
		if len(payload) > 1 && payload[1] >= firstQUIC {
			buf := datagram.NewBuffer()
			n := copy(buf.B[:], payload[1:])
			p.m.receive(datagram.NewBatch(buf.B[:n], n, 0, datagram.NotECT, buf), &p.alias, noProbes{})
		}
		return
	}
	if f := p.m.probe.Load(); f != nil {
		(*f)(p, payload)
	}
}

// NewMerged makes a conn without links. Close it when the server has stopped.
func NewMerged(cfg MergedConfig) (*Merged, error) {
	raw, err := newRawSocket()
	if err != nil {
		return nil, err
	}
	m := &Merged{
		stop: make(chan struct{}), lastID: 1, conns: map[remote]struct{}{}, links: map[*port]struct{}{}, lent: map[uint64]lent{},
	}
	m.orphaned = m.settle
	m.init(virtualAddr(1), raw, cfg.Queue)
	m.ports.Store(&map[uint64]*port{})
	return m, nil
}

// Add takes a link in: what arrives on it is read under the returned address, and what is written to that address leaves on it. The
// link is dropped when its Done is closed.
func (m *Merged) Add(l datagram.Link, info LinkInfo) (netip.AddrPort, error) {
	m.adding.Lock()
	defer m.adding.Unlock()
	if m.done {
		return netip.AddrPort{}, net.ErrClosed
	}
	m.lastID += 2
	p, addr := &port{m: m, link: l, info: info}, virtualAddr(m.lastID)
	p.main.addr.Store(addr)
	p.alias.addr.Store(virtualAddr(m.lastID + 1))
	m.changeLocked(func(ports map[uint64]*port) { ports[m.lastID], ports[m.lastID+1] = p, p })
	m.links[p] = struct{}{}
	l.SetReceiver(p)
	m.watchers.Go(func() {
		select {
		case <-l.Done():
			m.adding.Lock()
			defer m.adding.Unlock()
			delete(m.links, p)
			m.changeLocked(func(ports map[uint64]*port) {
				maps.DeleteFunc(ports, func(_ uint64, q *port) bool { return q == p })
			})
		case <-m.stop:
		}
		l.SetReceiver(nil)
	})
	return addrPort(addr), nil
}

// remote is a connection that counts what it takes and knows where its peer is: *quic.Conn.
type remote interface {
	taker
	RemoteAddr() net.Addr
	Context() context.Context
}

// attach makes known a connection that takes what arrives, until it ends: it is handed no more at a time than it can queue.
func (m *Merged) attach(conn remote) {
	m.adding.Lock()
	m.conns[conn] = struct{}{}
	m.settleLocked()
	m.adding.Unlock()
	context.AfterFunc(conn.Context(), func() {
		m.adding.Lock()
		defer m.adding.Unlock()
		delete(m.conns, conn)
		m.settleLocked()
	})
}

// settle finds out which connections are behind which address.
func (m *Merged) settle() {
	m.adding.Lock()
	defer m.adding.Unlock()
	m.settleLocked()
}

func (m *Merged) settleLocked() {
	at := make(map[*source][]taker, len(m.conns))
	for conn := range m.conns {
		a, _ := conn.RemoteAddr().(*net.UDPAddr)
		if p := m.port(a); p != nil {
			s := p.source(a)
			at[s] = append(at[s], conn)
		}
	}
	for _, p := range *m.ports.Load() {
		for _, s := range []*source{&p.main, &p.alias} {
			if old := s.in.takers.Load(); len(at[s]) == 0 || old == nil || !sameTakers(*old, at[s]) {
				s.in.set(at[s])
			}
		}
	}
}

func sameTakers(a, b []taker) bool {
	if len(a) != len(b) {
		return false
	}
	for _, t := range a {
		if !slices.Contains(b, t) {
			return false
		}
	}
	return true
}

// source returns the one of the link's two addresses that a is.
func (p *port) source(a *net.UDPAddr) *source {
	if virtualID(a) == virtualID(p.alias.addr.Load()) {
		return &p.alias
	}
	return &p.main
}

func (m *Merged) changeLocked(change func(map[uint64]*port)) {
	ports := maps.Clone(*m.ports.Load())
	change(ports)
	m.ports.Store(&ports)
}

// port returns the link that a virtual address stands for, or nil.
func (m *Merged) port(a *net.UDPAddr) *port { return (*m.ports.Load())[virtualID(a)] }

// WriteMsgUDP sends b, cut into segments if oob says so, to the link that addr stands for. It fails only after Close.
func (m *Merged) WriteMsgUDP(b, oob []byte, addr *net.UDPAddr) (n, oobn int, err error) {
	p := m.port(addr)
	segment, ecn := parseControl(oob)
	if p == nil {
		select {
		case <-m.stop:
			return 0, 0, net.ErrClosed
		default:
		}
		m.stats.droppedUnknown.Add(count(len(b), segment))
		return len(b), len(oob), nil
	}
	p.link.Send(b, segment, ecn)
	m.stats.sent.Add(count(len(b), segment))
	m.wrote(p.source(addr))
	return len(b), len(oob), nil
}

// WriteTo sends one datagram.
func (m *Merged) WriteTo(b []byte, addr net.Addr) (int, error) {
	a, _ := addr.(*net.UDPAddr)
	n, _, err := m.WriteMsgUDP(b, nil, a)
	return n, err
}

// Close ends the conn; its links are let go. It may be called more than once.
func (m *Merged) Close() error {
	m.adding.Lock()
	if !m.done {
		m.done = true
		close(m.stop)
		m.ports.Store(&map[uint64]*port{})
		clear(m.links)
		clear(m.lent)
	}
	m.adding.Unlock()
	m.shut()
	m.watchers.Wait()
	return m.raw.Close()
}

// Stats returns what was counted.
func (m *Merged) Stats() ConnStats {
	st := m.stats.snapshot()
	m.adding.Lock()
	defer m.adding.Unlock()
	st.Links = len(m.links)
	return st
}
