package relay

import (
	"errors"
	"net"

	"sallyway/relay/udpio"
)

// controlBytes are the first bytes of control, STUN and DTLS (RFC 7983 §7). ChannelData and what is nothing are data.
var controlBytes = []udpio.ByteRange{{First: 0, Last: 3}, {First: 20, Last: 63}}

// shard is one UDP socket of the port and the goroutine that reads it. One of them gets control, the others data, each that of its own
// sources. This is for the queues and for speed alone: every shard handles whatever comes, since the kernel may coalesce control behind
// data, or not be able to tell them apart.
type shard struct {
	s    *Server
	name string
	sock *udpio.Conn
	out  *udpio.Conn // by which data leaves; nil takes that of the receiver
	buf  []byte

	fair     *fairness // of a shard for data, where the kernel can be told whom to set aside
	outcasts bool      // gets those that are set aside
}

// serve reads until the socket is closed.
func (sh *shard) serve() error {
	s := sh.s
	for {
		m, err := sh.sock.Read(sh.buf)
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err != nil { // an ICMP error of an earlier write, or no memory: the next read may be fine
			s.count.readErrors.Add(1)
			continue
		}
		if sh.fair != nil && sh.fair.gone(m.From) {
			s.aside.dropped.Add(uint64((m.N + m.Segment - 1) / max(m.Segment, 1)))
			sh.fair.account(m.From, m.N, 0)
			continue
		}
		runs := sh.handle(sh.buf[:m.N], m)
		if sh.fair != nil {
			sh.fair.account(m.From, m.N, runs)
		} else if sh.outcasts {
			if o := s.aside.get(m.From); o != nil {
				o.used.Add(cost(m.N, runs))
			}
		}
	}
}

// handle tells the datagrams of one read apart by their first byte (RFC 7983 §7), and returns how many runs they made. It does not allocate
// for ChannelData.
func (sh *shard) handle(b []byte, m udpio.Message) (runs int) {
	s := sh.s
	now := s.now().UnixNano()
	var src *allocation
	looked := false
	for len(b) > 0 {
		n := min(m.Segment, len(b))
		switch first := b[0]; {
		case first >= 64 && first <= 79:
			if !looked {
				src, _ = s.table.plain.get(m.From)
				looked = true
			}
			if src != nil {
				n = s.datagrams(src, sh.out, b, m.Segment, m.ECN, now)
			} else {
				sh.unknown(n, m)
			}
		case first <= 3:
			sh.stun(b[:n], m)
			looked = false
		case first >= 20 && first <= 63:
			sh.handleDTLS(b[:n], m)
			looked = false
		default:
			s.count.malformed.Add(1)
		}
		b = b[n:]
		runs++
	}
	return runs
}

func (sh *shard) end(m udpio.Message) udpEnd {
	return udpEnd{sock: sh.sock, peer: udpio.Peer{Addr: m.From, Local: m.Local}}
}

func (sh *shard) unknown(size int, m udpio.Message) {
	sh.s.count.strays.Add(1)
	sh.s.unknown(&origin{udp: sh.end(m), addr: m.From, size: size})
}

func (sh *shard) stun(b []byte, m udpio.Message) {
	o := origin{udp: sh.end(m), addr: m.From}
	// Where the control runs in DTLS, plain requests of the same 5-tuple have no allocation.
	if a, ok := sh.s.table.plain.get(m.From); ok && a.conn == nil {
		o.alloc = a
	}
	sh.s.control(&o, b)
}
