package direct

import (
	"errors"
	"net"
	"net/netip"
	"time"

	"sallyway/internal/datagram"
	"sallyway/relay/udpio"
	"sallyway/stun"
)

// firstQUIC is the least first byte of a QUIC packet (RFC 9000 §17.2, RFC 9443).
const firstQUIC = 64

// readPause is the wait after a read that failed, so that a socket which fails for good does not take a processor.
const readPause = 10 * time.Millisecond

// read reads the socket until it is closed.
func (e *Endpoint) read(sock *udpio.Conn) {
	for {
		buf := datagram.NewBuffer()
		m, err := sock.Read(buf.B[:])
		if err != nil {
			buf.Release()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(readPause)
			continue
		}
		if m.N > 0 {
			e.receive(time.Now(), m, buf)
		}
		buf.Release()
	}
}

// receive takes what one read brought: QUIC in runs, and probes among them.
func (e *Endpoint) receive(now time.Time, m udpio.Message, buf *datagram.Buffer) {
	l := (*e.links.Load())[m.From]
	if l != nil && now.Sub(time.Unix(0, l.proved.Load())) >= Admission {
		l = nil
	}
	b := buf.B[:m.N]
	run := 0 // where the datagrams of QUIC that wait to be passed on begin
	pass := func(end int) {
		if end > run {
			e.quic(l, b[run:end:end], m.Segment, m.ECN, buf)
		}
	}
	for off := 0; off < len(b); off += m.Segment {
		end := min(off+m.Segment, len(b))
		if b[off] >= firstQUIC {
			continue
		}
		pass(off)
		run = end
		e.probe(now, m.From, l, b[off:end])
	}
	pass(len(b))
}

// quic passes a run of QUIC packets on.
func (e *Endpoint) quic(l *Link, b []byte, stride int, ecn datagram.ECN, buf *datagram.Buffer) {
	n := uint64((len(b) + stride - 1) / stride)
	if l == nil {
		e.dropped.Add(n)
		return
	}
	e.received.Add(n)
	if r := l.receiver.Load(); r != nil {
		buf.Retain()
		r.to.Receive(datagram.NewBatch(b, min(stride, len(b)), 0, ecn, buf))
	}
}

// probe takes a datagram that is no QUIC.
func (e *Endpoint) probe(now time.Time, from netip.AddrPort, l *Link, b []byte) {
	if len(b) < 20 || !stunCookie(b) {
		e.dropped.Add(1)
		return
	}
	e.mu.Lock()
	if e.asker != nil && e.asker.Handle(now, b, from) {
		e.mu.Unlock()
		select {
		case e.asked <- struct{}{}:
		default:
		}
		return
	}
	taken, call := e.probeLocked(now, from, b)
	e.mu.Unlock()
	switch {
	case call != nil:
		call()
	case taken:
	case l != nil && !stun.IsRequest(b):
		// An answer to a probe of whoever uses the link, who checks it.
		if r := l.receiver.Load(); r != nil {
			own := datagram.NewBuffer()
			n := copy(own.B[:], b)
			r.to.Receive(datagram.NewBatch(own.B[:n], n, 0, datagram.NotECT, own))
		}
	default:
		e.dropped.Add(1)
	}
}

func stunCookie(b []byte) bool {
	return b[4] == 0x21 && b[5] == 0x12 && b[6] == 0xA4 && b[7] == 0x42
}

// probeLocked gives a probe to the peer whose keys it carries.
func (e *Endpoint) probeLocked(now time.Time, from netip.AddrPort, b []byte) (taken bool, call func()) {
	if !stun.IsProbe(b) {
		return false, nil
	}
	for _, p := range e.candidatesLocked(now, from) {
		if !p.punched {
			continue
		}
		if stun.IsRequest(b) {
			if answer := p.checks.request(now, from, b); answer != nil {
				e.sendLocked(from, answer)
				e.answered.Add(1)
				e.stepSoon()
				return true, nil
			}
			continue
		}
		r := p.checks.answer(now, from, b)
		if r == nil {
			continue
		}
		e.stepSoon()
		if l := (*e.links.Load())[from]; l != nil {
			if l.peer == p {
				l.proved.Store(now.UnixNano())
			}
			return true, nil
		}
		if p.cfg.Asking {
			return true, nil // step hands the chosen one out
		}
		l, err := e.linkLocked(p, r)
		if err != nil {
			return true, nil
		}
		return true, func() { p.cfg.OnLink(l) }
	}
	return false, nil
}
