package relay

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"time"

	"sallyway/internal/datagram"
	"sallyway/relay/budget"
)

// streamBuffer is the read buffer of a stream in bytes: a TLS record.
const streamBuffer = 16 << 10

// tlsHandshake is the first byte of a TLS connection (RFC 8446 §5.1).
const tlsHandshake = 22

// frameSize returns how many bytes of a stream the message has whose first four bytes are b, padding included (RFC 8656 §12.5). ok is
// false where no message starts like that.
func frameSize(b []byte) (size int, ok bool) {
	n := int(binary.BigEndian.Uint16(b[2:]))
	switch first := b[0]; {
	case first <= 3:
		return n + stunHeader, n%4 == 0 && n+stunHeader <= datagram.MaxBatch
	case first >= 64 && first <= 79:
		size = (n + channelHeader + 3) &^ 3
		return size, size <= datagram.MaxBatch
	}
	return 0, false
}

// accept takes TCP connections until the listener is closed.
func (s *Server) accept() error {
	for {
		nc, err := s.tcp.Accept()
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err != nil { // out of descriptors, most likely: others will be closed
			s.count.acceptErrors.Add(1)
			const pause = 50 * time.Millisecond
			select {
			case <-time.After(pause):
			case <-s.closed:
			}
			continue
		}
		tc := nc.(*net.TCPConn)
		addr := tc.RemoteAddr().(*net.TCPAddr).AddrPort()
		src := budget.SourceOf(addr.Addr())
		c := &conn{s: s, kind: overTCP, addr: unmapped(addr), nc: tc}
		if s.handshake.allow(src, 1, s.now().UnixNano()) {
			c.half = s.conns.reserve(src, c.close)
		}
		if c.half == nil {
			s.count.handshakesRefused.Add(1)
			tc.Close()
			continue
		}
		limitUnsent(tc)
		if !s.conns.add(c) {
			tc.Close()
			continue
		}
		s.wg.Go(func() {
			defer c.finish()
			c.serve(tc)
		})
	}
}

// serve finds out what a TCP connection speaks, and serves it until it is closed.
func (c *conn) serve(tc *net.TCPConn) {
	var first [1]byte
	if tc.SetDeadline(time.Now().Add(c.s.cfg.handshakeTimeout)) != nil {
		return
	}
	if _, err := io.ReadFull(tc, first[:]); err != nil {
		return
	}
	in := &prefixed{Conn: tc, first: first[:]}
	if first[0] != tlsHandshake {
		if tc.SetDeadline(time.Time{}) == nil {
			c.stream(in)
		}
		return
	}
	if c.s.tlsConfig == nil {
		return
	}
	t := tls.Server(in, c.s.tlsConfig)
	ctx, cancel := context.WithTimeout(context.Background(), c.s.cfg.handshakeTimeout)
	err := t.HandshakeContext(ctx)
	cancel()
	if err != nil {
		c.s.count.handshakesFailed.Add(1)
		return
	}
	if tc.SetDeadline(time.Time{}) != nil {
		return
	}
	c.mu.Lock()
	c.kind, c.nc = overTLS, t
	closed := c.closed
	c.mu.Unlock()
	if closed {
		return
	}
	c.stream(t)
}

// prefixed is a connection of which the first byte has been read already.
type prefixed struct {
	net.Conn
	first []byte
}

func (p *prefixed) Read(b []byte) (int, error) {
	if len(p.first) > 0 {
		n := copy(b, p.first)
		p.first = p.first[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}

// stream reads messages from r until it ends or something else than a message comes.
func (c *conn) stream(r io.Reader) {
	br := bufio.NewReaderSize(r, streamBuffer)
	for {
		if _, err := br.Peek(channelHeader); err != nil {
			return
		}
		b, _ := br.Peek(br.Buffered()) // it is all there
		used, need, ok := c.consume(b)
		if !ok || !c.admits(used) {
			c.s.count.malformed.Add(1)
			return
		}
		_, _ = br.Discard(used) // it is all there
		switch {
		case used > 0:
		case need <= br.Size():
			if _, err := br.Peek(need); err != nil {
				return
			}
		default:
			if !c.admits(need) {
				return
			}
			big := datagram.NewBuffer()
			_, err := io.ReadFull(br, big.B[:need])
			if err == nil {
				_, _, ok = c.consume(big.B[:need])
			}
			big.Release()
			if err != nil || !ok {
				return
			}
		}
	}
}

// consume handles the whole messages at the start of b, which it may change, and returns their length. Where there is none, need is the
// length of the first. ok is false where b does not start like a message.
func (c *conn) consume(b []byte) (used, need int, ok bool) {
	for len(b)-used >= channelHeader {
		rest := b[used:]
		size, ok := frameSize(rest)
		if !ok {
			return used, 0, false
		}
		if size > len(rest) {
			return used, size, true
		}
		if rest[0] <= 3 {
			c.control(rest[:size])
			used += size
			continue
		}
		used += c.channelData(rest, size)
	}
	return used, channelHeader, true
}

func (c *conn) control(raw []byte) {
	c.s.control(&origin{conn: c, addr: c.addr, alloc: c.alloc.Load(), proven: true}, raw)
}

// channelData relays the ChannelData messages at the start of b, the first of which takes size bytes, as far as they are alike, and returns
// the bytes used.
func (c *conn) channelData(b []byte, size int) int {
	number, length := binary.BigEndian.Uint16(b), int(binary.BigEndian.Uint16(b[2:]))
	now, end := c.s.now().UnixNano(), size
	if length+channelHeader == size { // without padding in between they make one run
		for len(b)-end >= size && binary.BigEndian.Uint32(b[end:]) == binary.BigEndian.Uint32(b) {
			end += size
		}
	}
	a := c.alloc.Load()
	if a == nil {
		c.s.count.strays.Add(1)
		return end
	}
	if end == size {
		c.s.forward(a, nil, number, b[:channelHeader+length], channelHeader+length, 0, now)
	} else {
		c.s.forward(a, nil, number, b[:end], size, 0, now)
	}
	return end
}
