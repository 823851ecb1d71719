package bench

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"
)

// TestForwardUDP: two senders get their own answers through the forwarder, and it ends when it is told to.
func TestForwardUDP(t *testing.T) {
	echo, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(loopback, 0)))
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := echo.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = echo.WriteToUDPAddrPort(b[:n], from) // loopback keeps what has room
		}
	}()
	// A free port: the forwarder takes it a moment later.
	free, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(loopback, 0)))
	if err != nil {
		t.Fatal(err)
	}
	at := free.LocalAddr().(*net.UDPAddr).AddrPort()
	free.Close()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- ForwardUDP(ctx, at, echo.LocalAddr().(*net.UDPAddr).AddrPort()) }()
	r := new(runner)
	for range 2 {
		c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(at))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var rtts []time.Duration
		for end := time.Now().Add(10 * time.Second); len(rtts) < 5 && time.Now().Before(end); {
			got, _, err := r.exchangeUDP(t.Context(), c, 5)
			if err != nil && len(rtts) > 0 {
				t.Fatal(err)
			}
			rtts = append(rtts, got...) // refused while it does not listen yet
		}
		if len(rtts) < 5 {
			t.Fatalf("%d answers", len(rtts))
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
