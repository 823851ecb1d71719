package relay

import (
	"bytes"
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/pion/dtls/v3"
	"github.com/pion/stun/v4"

	"sallyway/relay/wire"
)

// tapped keeps what goes over a socket, both ways.
type tapped struct {
	*net.UDPConn
	mu      sync.Mutex // guards the rest
	in, out [][]byte
}

func (c *tapped) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := c.UDPConn.ReadFrom(b)
	if err == nil {
		c.mu.Lock()
		c.in = append(c.in, bytes.Clone(b[:n]))
		c.mu.Unlock()
	}
	return n, from, err
}

func (c *tapped) WriteTo(b []byte, to net.Addr) (int, error) {
	c.mu.Lock()
	c.out = append(c.out, bytes.Clone(b))
	c.mu.Unlock()
	return c.UDPConn.WriteTo(b, to)
}

// protected returns the datagrams of list that are one record of application data.
func protected(list [][]byte) (records [][]byte) {
	for _, d := range list {
		if len(d) > recordHeader && d[0] == 23 && d[4] == 1 {
			records = append(records, d)
		}
	}
	return records
}

// parkable is a client of l whose datagrams are kept, and its connection at the relay.
func parkable(t *testing.T, l *lab) (c *tester, tap *tapped, v *virtualConn) {
	t.Helper()
	sock, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sock.Close() })
	tap = &tapped{UDPConn: sock}
	dc, err := dtls.ClientWithOptions(tap, net.UDPAddrFromAddrPort(l.Addr()), dtls.WithInsecureSkipVerify(true))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := dc.HandshakeContext(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dc.Close() })
	name, password := user(client1, wire.FlagPlainData)
	c = &tester{t: t, conn: dc, username: name, password: password, transport: protocolUDP}
	c.allocate()
	p, _ := l.dtls.peers.get(sock.LocalAddr().(*net.UDPAddr).AddrPort())
	return c, tap, p.live
}

func (v *virtualConn) isParked() bool {
	v.life.RLock()
	defer v.life.RUnlock()
	return v.parked != nil
}

// TestParkedConnections goes back and forth between idle and not: nothing is lost, no counter is used twice, nothing old is taken again.
func TestParkedConnections(t *testing.T) {
	cert, _ := certificate(t)
	l := start(t, func(c *Config) { c.Certificate, c.linger = cert, 300*time.Millisecond })
	c, tap, v := parkable(t, l)
	g := allocated(t, l, gateway1)
	for range 3 {
		until(t, "the connection is parked", v.isParked)
		c.want(0, c.do(stun.MethodRefresh)) // the client begins
		until(t, "the connection is parked", v.isParked)
		g.want(0, g.do(wire.MethodRendezvous, wire.Node(client1))) // the relay begins
		c.indication(wire.MethodRendezvous)
	}
	until(t, "the connection is parked", v.isParked)
	// What waits are repeated indications, of which the client's side takes one at a time.
	for ok := true; ok; {
		_, ok = c.receive(50 * time.Millisecond)
	}
	tap.mu.Lock()
	sent, got := protected(tap.out), protected(tap.in)
	tap.mu.Unlock()
	if len(sent) < 4 || len(got) < 8 {
		t.Fatalf("%d and %d records", len(sent), len(got))
	}
	seen := map[string]bool{}
	for _, d := range got {
		epochAndCounter := string(d[3:11])
		if seen[epochAndCounter] {
			t.Errorf("the relay has used the counter % x twice", epochAndCounter)
		}
		seen[epochAndCounter] = true
	}

	// All over again what the client has sent, in its name.
	answers := len(got)
	for _, d := range sent {
		if _, err := tap.UDPConn.WriteToUDPAddrPort(d, l.Addr()); err != nil {
			t.Fatal(err)
		}
	}
	c.want(0, c.do(stun.MethodRefresh)) // is answered behind them
	tap.mu.Lock()
	answers = len(protected(tap.in)) - answers
	tap.mu.Unlock()
	if answers != 1 {
		t.Errorf("%d answers to %d old records and a new request ", answers, len(sent))
	}

	// A parked connection is told when the relay stops.
	until(t, "the connection is parked", v.isParked)
	l.stop()
	if !closedWithin(t, c.conn, 5*time.Second) {
		t.Error("the client is not told")
	}
}

// TestParkingLosesNothing uses a connection just when it is about to be parked.
func TestParkingLosesNothing(t *testing.T) {
	const linger = 20 * time.Millisecond
	cert, _ := certificate(t)
	l := start(t, func(c *Config) { c.Certificate, c.linger = cert, linger })
	c, _, v := parkable(t, l)
	c.want(0, c.do(stun.MethodRefresh))
	for i := range 60 {
		if i%4 == 0 {
			until(t, "the connection is parked", v.isParked)
		} else {
			time.Sleep(linger + time.Duration(i*10)*time.Microsecond) // the time is what is tested
		}
		c.want(0, c.do(stun.MethodRefresh))
	}
}
