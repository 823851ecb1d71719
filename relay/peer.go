package relay

import (
	"context"
	"errors"
	"net"
	"net/netip"

	"github.com/pion/stun/v4"

	"sallyway/internal/datagram"
	"sallyway/relay/udpio"
)

// relayedSocket is an allocation's own UDP socket, which only allocations with configured peers need. It holds a read buffer only while
// there is something to read.
type relayedSocket struct {
	s     *Server
	owner *allocation
	sock  *udpio.Conn
}

// relayedBuffer is the kernel's buffer of a relayed socket in bytes, each way.
const relayedBuffer = 1 << 20

// openRelayed opens port for a. The caller starts it once a is in the table.
func (s *Server) openRelayed(a *allocation, port uint16) (*relayedSocket, error) {
	ip := s.cfg.RelayIP
	if !ip.IsValid() {
		ip = s.cfg.Listen.Addr()
	}
	if ip.IsUnspecified() {
		ip = netip.IPv4Unspecified()
		if s.advertise.Is6() {
			ip = netip.IPv6Unspecified()
		}
	}
	sock, _, err := udpio.Listen(context.Background(), netip.AddrPortFrom(ip, port), udpio.Config{ReadBuffer: relayedBuffer, WriteBuffer: relayedBuffer})
	if err != nil {
		return nil, err
	}
	return &relayedSocket{s: s, owner: a, sock: sock}, nil
}

func (r *relayedSocket) start() { r.s.wg.Go(r.serve) }

func (r *relayedSocket) close() {
	r.s.count.relayedSockDrops.Add(r.sock.Drops())
	r.sock.Close()
}

// openFor opens a's relayed socket where peer is a configured one and the socket is not open yet.
func (s *Server) openFor(a *allocation, peer netip.AddrPort) stun.ErrorCode {
	if _, ours := s.table.relayed.get(peer); ours || a.sock.Load() != nil {
		return 0
	}
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	if a.sock.Load() != nil {
		return 0
	}
	if a.dead.Load() {
		return codeMismatch
	}
	r, err := s.openRelayed(a, a.relayed.Port())
	if err != nil { // another program of this host holds the port
		s.log.Warn("relayed port is taken by another program", "node", a.owner.String())
		return codeCapacity
	}
	a.sock.Store(r)
	r.start()
	return 0
}

// serve relays what configured peers send to the allocation, until the socket is closed.
func (r *relayedSocket) serve() {
	for {
		if err := r.sock.Wait(); err != nil {
			return
		}
		buf := datagram.NewBuffer()
		m, err := r.sock.Read(buf.B[:])
		if err == nil {
			r.receive(buf.B[:m.N], m)
		}
		buf.Release()
		if errors.Is(err, net.ErrClosed) {
			return
		}
	}
}

func (r *relayedSocket) receive(data []byte, m udpio.Message) {
	a, now := r.owner, r.s.now().UnixNano()
	if a.dead.Load() || !a.org.hasPeer(m.From) || !a.permitted(m.From.Addr(), now) {
		r.s.count.unpermitted.Add(1)
		return
	}
	if !a.node.share.Take(len(data), now) {
		r.s.count.overQuota.Add(1)
		return
	}
	r.s.toClient(a, m.From, data, m.Segment, m.ECN, now)
}

// toPeer sends datagrams to a configured peer from a's relayed address. They are stride bytes apart in data, skip bytes of each are header.
func (s *Server) toPeer(a *allocation, peer netip.AddrPort, data []byte, stride, skip int, ecn datagram.ECN) {
	r := a.sock.Load()
	if r == nil {
		a.dropped.Add(1)
		s.count.unbound.Add(1)
		return
	}
	payload, segment := data, stride
	if skip > 0 {
		buf := datagram.NewBuffer()
		defer buf.Release()
		out := buf.B[:0]
		for len(data) > 0 {
			n := min(stride, len(data))
			out = append(out, data[skip:n]...)
			data = data[n:]
		}
		payload, segment = out, stride-skip
	}
	n := max(1, (len(payload)+max(segment, 1)-1)/max(segment, 1))
	a.sent.Add(uint64(len(payload)))
	s.count.relayed.Add(uint64(n))
	s.count.relayedBytes.Add(uint64(len(payload)))
	if err := r.sock.Write(payload, segment, ecn, udpio.Peer{Addr: peer}); err != nil {
		s.count.writeErrors.Add(1)
		a.dropped.Add(1)
	}
}
