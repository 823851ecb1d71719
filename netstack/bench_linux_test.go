package netstack_test

import (
	"context"
	"io"
	"testing"
	"time"

	"sallyway/netstack"
)

// BenchmarkTCP is the speed of one TCP connection of the host through the TUN to a handler:
//
//	go test -run '^$' -bench TCP -benchtime 2s ./netstack
func BenchmarkTCP(b *testing.B) {
	const chunk = 256 << 10
	l := newLab(b, 1500, netstack.Config{HandleTCP: func(_ context.Context, r *netstack.TCPRequest) {
		c, err := r.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		buf := make([]byte, chunk)
		if r.Dst.Port() == 1 {
			for err == nil {
				_, err = c.Read(buf)
			}
			return
		}
		for err == nil {
			_, err = c.Write(buf)
		}
	}})
	buf := make([]byte, chunk)
	for _, dir := range []struct{ name, addr string }{{"up", "10.99.0.1:1"}, {"down", "10.99.0.1:2"}} {
		b.Run(dir.name, func(b *testing.B) {
			c, err := l.dial("tcp", dir.addr)
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(time.Minute))
			b.SetBytes(chunk)
			for b.Loop() {
				if dir.addr[len(dir.addr)-1] == '1' {
					_, err = c.Write(buf)
				} else {
					_, err = io.ReadFull(c, buf)
				}
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkUDP is the time of one datagram of 1400 bytes there and back.
func BenchmarkUDP(b *testing.B) {
	l := newLab(b, 1500, netstack.Config{HandleUDP: func(_ context.Context, f *netstack.UDPFlow) {
		buf := make([]byte, 65535)
		for {
			n, err := f.ReadPacket(buf)
			if err != nil {
				return
			}
			f.WritePacket(buf[:n])
		}
	}})
	c, err := l.dial("udp", "10.99.0.1:9")
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	buf := make([]byte, 1400)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		c.Write(buf)
		if _, err := c.Read(buf); err != nil {
			b.Fatal(err)
		}
	}
}

// idleConn is a PacketConn without packets.
type idleConn chan struct{}

func (c idleConn) ReadPacket([]byte) (int, error) {
	<-c
	return 0, io.EOF
}
func (c idleConn) WritePacket([]byte) ([]byte, error) { return nil, nil }
func (c idleConn) Close() error {
	close(c)
	return nil
}

// BenchmarkSession is the cost of a stack of its own for a session: made, run, ended.
func BenchmarkSession(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		s, err := netstack.New(netstack.Config{Conn: make(idleConn)})
		if err != nil {
			b.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := s.Run(ctx); err != nil {
			b.Fatal(err)
		}
	}
}
