package gateway

import (
	"bytes"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"sallyway/internal/datagram"
	"sallyway/internal/policy"
	"sallyway/tunnel"
)

// udpPair is a flow of a gateway and the socket that it leads to.
func udpPair(t *testing.T) (*udpFlow, *net.UDPConn) {
	t.Helper()
	server, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.DialUDP("udp", nil, server.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	var flows openFlows
	f := newUDPFlow(c, flows.add(c, tunnel.Peer{}, policy.Target{}, c.RemoteAddr().(*net.UDPAddr).AddrPort().Addr(), policy.Decision{}))
	t.Cleanup(func() {
		f.Close()
		server.Close()
		if len(flows.open) != 0 {
			t.Error("the flow is still counted")
		}
	})
	deadline := time.Now().Add(10 * time.Second)
	if err := server.SetDeadline(deadline); err != nil {
		t.Fatal(err)
	}
	if err := f.SetDeadline(deadline); err != nil {
		t.Fatal(err)
	}
	return f, server
}

func TestUDPFlowRuns(t *testing.T) {
	f, server := udpPair(t)
	if !f.segmented || f.oob == nil {
		t.Fatal("Linux has had UDP_SEGMENT and UDP_GRO since 5.0")
	}
	to := f.LocalAddr().(*net.UDPAddr).AddrPort()
	for _, r := range []struct{ n, size int }{{3000, 1000}, {2500, 1000}, {1000, 1000}, {0, 0}, {100 * 64, 64}, {46 * 1400, 1400}, {65507, 65507}} {
		data := make([]byte, r.n)
		rand.NewChaCha8([32]byte{4}).Read(data)
		if err := f.WriteRun(data, r.size); err != nil {
			t.Fatal(r, err)
		}
		b := make([]byte, 65535)
		var there []byte
		for first := true; first || len(there) < r.n; first = false {
			n, _, err := server.ReadFromUDPAddrPort(b)
			if err != nil {
				t.Fatal(r, err)
			}
			if want := min(r.size, r.n-len(there)); n != want {
				t.Fatalf("%v: a datagram of %d bytes, want %d", r, n, want)
			}
			there = append(there, b[:n]...)
		}
		if !bytes.Equal(there, data) {
			t.Errorf("%v: other bytes came", r)
		}
		if r.size == 0 || r.n > 64*r.size {
			continue
		}
		// The run comes back in one call, and datagram by datagram.
		for _, single := range []bool{false, true} {
			var oob []byte // one datagram may be larger than what is segmented
			if r.n > r.size {
				oob = segmentControl(make([]byte, segmentSpace), r.size)
			}
			if _, _, err := server.WriteMsgUDPAddrPort(data, oob, to); err != nil {
				t.Fatal(r, err)
			}
			var back []byte
			for len(back) < r.n {
				n, size, err := 0, r.size, error(nil)
				if single {
					n, err = f.Read(b)
				} else {
					n, size, err = f.ReadRun(b)
				}
				if err != nil {
					t.Fatal(r, err)
				}
				if want := min(r.size, r.n-len(back)); single && n != want || !single && (n != r.n || size != r.size) {
					t.Fatalf("%v: read %d bytes of %d", r, n, size)
				}
				back = append(back, b[:n]...)
			}
			if !bytes.Equal(back, data) {
				t.Errorf("%v: other bytes came back", r)
			}
		}
	}
}

// TestUDPFlowReadThenRun reads a run's first datagram by Read, and the rest by ReadRun.
func TestUDPFlowReadThenRun(t *testing.T) {
	f, server := udpPair(t)
	to := f.LocalAddr().(*net.UDPAddr).AddrPort()
	if _, _, err := server.WriteMsgUDPAddrPort([]byte("aabbccd"), segmentControl(make([]byte, segmentSpace), 2), to); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 65535)
	if n, err := f.Read(b); string(b[:n]) != "aa" || err != nil {
		t.Fatalf("%q %v", b[:n], err)
	}
	if n, size, err := f.ReadRun(b[:3]); string(b[:n]) != "bb" || size != 2 || err != nil {
		t.Fatalf("%q of %d, %v", b[:n], size, err)
	}
	if n, size, err := f.ReadRun(b); string(b[:n]) != "ccd" || size != 2 || err != nil {
		t.Fatalf("%q of %d, %v", b[:n], size, err)
	}
}

// The switch for all offloads takes runs from a flow, and nothing else.
func TestUDPFlowWithoutOffload(t *testing.T) {
	t.Setenv(datagram.NoOffload, "1")
	f, server := udpPair(t)
	if f.segmented || f.oob != nil {
		t.Fatal("the kernel is asked for runs")
	}
	data := make([]byte, 2500)
	rand.NewChaCha8([32]byte{5}).Read(data)
	if err := f.WriteRun(data, 1000); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 65535)
	var there []byte
	for range 3 {
		n, err := server.Read(b)
		if err != nil || n > 1000 {
			t.Fatal(n, err)
		}
		there = append(there, b[:n]...)
	}
	if !bytes.Equal(there, data) {
		t.Error("other bytes arrived")
	}
	for range 3 {
		if _, err := server.WriteTo(data[:1000], f.LocalAddr()); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		if n, size, err := f.ReadRun(b); err != nil || n != 1000 || size != 1000 {
			t.Fatalf("%d bytes of %d, %v, want one datagram", n, size, err)
		}
	}
}
