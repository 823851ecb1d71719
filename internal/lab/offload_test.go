package lab_test

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"sallyway/internal/lab"
)

// perPacket sends bytes over TCP from the client to a relay and returns the mean size of what the relay's link took in.
func perPacket(t *testing.T, l *lab.Lab) float64 {
	t.Helper()
	const size = 8 << 20
	ln, err := l.Relay1.Listen(netip.AddrPortFrom(l.Addr(l.Relay1), 5349).String())
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan int64, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			got <- -1
			return
		}
		n, _ := io.Copy(io.Discard, c)
		c.Close()
		got <- n
	}()
	c, err := l.Client.Dial(soon(t, 5*time.Second), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(c, lab.Pattern(size)); err != nil {
		t.Fatal(err)
	}
	c.(*net.TCPConn).CloseWrite()
	if n := <-got; n != size {
		t.Fatalf("%d bytes came", n)
	}
	c.Close()
	var mean float64
	err = l.Relay1.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		s := link.Attrs().Statistics
		mean = float64(s.RxBytes) / float64(s.RxPackets)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return mean
}

func TestWire(t *testing.T) {
	const frame = 1500 + 14
	if mean := perPacket(t, newLab(t, lab.Config{})); mean <= frame {
		t.Errorf("the usual links: %.0f bytes a packet, want super-packets", mean)
	}
	for _, w := range []lab.Wire{{NoSegmentation: true}, {NoSegmentation: true, GRO: true, Hold: 20 * time.Microsecond}} {
		if mean := perPacket(t, newLab(t, lab.Config{Wire: w})); mean > frame {
			t.Errorf("%v: %.0f bytes a packet, want at most %d", w, mean, frame)
		}
	}
}

func TestDirect(t *testing.T) {
	for _, direct := range []bool{false, true} {
		l := newLab(t, lab.Config{Direct: direct})
		at := netip.AddrPortFrom(l.Addr(l.Gateway), 4500)
		if got := sends(t, l.Client, l.Gateway, "udp", at); got != direct {
			t.Errorf("direct %v: a datagram from the client to the gateway arrives: %v", direct, got)
		}
		if sends(t, l.Relay1, l.Gateway, "udp", at) || sends(t, l.Client, l.Gateway, "tcp", at) {
			t.Errorf("direct %v: more is open than UDP from the client to the gateway", direct)
		}
	}
}
