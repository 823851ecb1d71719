package udpio

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// arrival is a datagram and the socket that got it.
type arrival struct {
	socket int
	data   string
}

// group opens sockets that share a port, and passes on what each reads until the test ends.
func group(t *testing.T, addr netip.AddrPort, n int) (conns []*Conn, arrived chan arrival) {
	t.Helper()
	arrived = make(chan arrival, 1024)
	var wg sync.WaitGroup
	for i := range n {
		c, _, err := Listen(context.Background(), addr, Config{ReusePort: true, PacketInfo: addr.Addr().IsUnspecified()})
		if err != nil {
			t.Fatal(err)
		}
		addr = netip.AddrPortFrom(addr.Addr(), c.LocalAddr().Port())
		conns = append(conns, c)
		wg.Go(func() {
			buf := make([]byte, MaxRead)
			for {
				m, err := c.Read(buf)
				if err != nil {
					return
				}
				for off := 0; off < m.N || m.N == 0; off += max(m.Segment, 1) {
					arrived <- arrival{i, string(buf[off:min(off+m.Segment, m.N)])}
					if m.N == 0 {
						break
					}
				}
			}
		})
	}
	t.Cleanup(func() {
		for _, c := range conns {
			c.Close()
		}
		wg.Wait()
	})
	return conns, arrived
}

// TestSteer looks at which socket of a port gets what: by the first byte, and by the source alone.
func TestSteer(t *testing.T) {
	const shards, sources = 3, 60
	for _, tc := range []struct{ listen, to string }{
		{"127.0.0.1", "127.0.0.1"}, {"::1", "::1"}, {"::", "127.0.0.1"}, {"::", "::1"}, {"0.0.0.0", "127.0.0.2"},
	} {
		t.Run(tc.listen+" "+tc.to, func(t *testing.T) {
			conns, arrived := group(t, netip.AddrPortFrom(netip.MustParseAddr(tc.listen), 0), 1+shards+1)
			steering := NewSteering([]ByteRange{{First: 0, Last: 3}, {First: 20, Last: 63}}, shards)
			if err := conns[1].Steer(steering, nil); err != nil {
				t.Fatal(err)
			}
			to := netip.AddrPortFrom(netip.MustParseAddr(tc.to), conns[0].LocalAddr().Port())
			next := func() arrival {
				select {
				case a := <-arrived:
					return a
				case <-time.After(5 * time.Second):
					t.Fatal("nothing arrives")
					return arrival{}
				}
			}
			used := map[int]int{}
			for s := range sources {
				c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
				if err != nil {
					t.Fatal(err)
				}
				of := 0
				for i, first := range []byte{64, 0, 79, 3, 4, 20, 255, 63, 64, 19} {
					data := fmt.Sprintf("%c source %d datagram %d", rune(0), s, i)
					b := []byte(data)
					b[0] = first
					if _, err := c.Write(b); err != nil {
						t.Fatal(err)
					}
					a := next()
					if a.data != string(b) {
						t.Fatalf("%q arrived", a.data)
					}
					switch {
					case first <= 3 || (first >= 20 && first <= 63):
						if a.socket != 0 {
							t.Errorf("control %d arrived at socket %d", first, a.socket)
						}
					case of == 0:
						of = a.socket
						used[of]++
					case a.socket != of:
						t.Errorf("data of one source arrived at sockets %d and %d", of, a.socket)
					}
				}
				// Pinned to the last socket, which gets nothing else; control is not.
				from := c.LocalAddr().(*net.UDPAddr).AddrPort()
				other := netip.AddrPortFrom(from.Addr(), from.Port()^1)
				if err := conns[0].Steer(steering, []Pin{{other, 0}, {from, 1 + shards}, {other, 0}}); err != nil {
					t.Fatal(err)
				}
				for first, want := range map[byte]int{64: 1 + shards, 255: 1 + shards, 0: 0, 20: 0} {
					if _, err := c.Write([]byte{first, 1, 2, 3}); err != nil {
						t.Fatal(err)
					}
					if a := next(); a.socket != want {
						t.Errorf("data %d of a pinned source arrived at socket %d, want %d", first, a.socket, want)
					}
				}
				if err := conns[1].Steer(steering, nil); err != nil {
					t.Fatal(err)
				}
				if _, err := c.Write(nil); err != nil {
					t.Fatal(err)
				}
				if a := next(); a.socket != 0 {
					t.Errorf("an empty datagram arrived at socket %d", a.socket)
				}
				c.Close()
			}
			if used[0] != 0 || len(used) != shards {
				t.Errorf("sources by socket %v, want some for each of 1 to %d", used, shards)
			}
			for socket, n := range used {
				if n < sources/shards/4 {
					t.Errorf("socket %d has %d of %d sources", socket, n, sources)
				}
			}
		})
	}
}

// TestSteerKeepsRunsTogether sends a run whose last datagram is of another kind: it comes with the others.
func TestSteerKeepsRunsTogether(t *testing.T) {
	conns, arrived := group(t, netip.MustParseAddrPort("127.0.0.1:0"), 2)
	if err := conns[0].Steer(NewSteering([]ByteRange{{First: 0, Last: 3}}, 1), nil); err != nil {
		t.Fatal(err)
	}
	if !conns[0].GRO() || !conns[0].GSO() {
		t.Skip("this kernel has no UDP segmentation offload")
	}
	c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(conns[0].LocalAddr()))
	if err != nil {
		t.Fatal(err)
	}
	out, _, err := New(c, Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := out.Write([]byte("@@@@@@@@\x00\x01"), 4, 0, Peer{}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []arrival{{1, "@@@@"}, {1, "@@@@"}, {1, "\x00\x01"}} {
		select {
		case a := <-arrived:
			if a != want {
				t.Errorf("%q arrived at %d, want %q at %d", a.data, a.socket, want.data, want.socket)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("nothing arrives")
		}
	}
}
