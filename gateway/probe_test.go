package gateway

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"sallyway/internal/control"
)

// bindings answers STUN Binding requests on a loopback socket until the test ends (RFC 8489 §6.3.1.1).
func bindings(t *testing.T) netip.AddrPort {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { _ = conn.Close(); <-done })
	go func() {
		defer close(done)
		b := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			if n < 20 {
				continue
			}
			out := append([]byte{1, 1, 0, 12}, b[4:20]...) // success, cookie and transaction
			out = append(out, 0, 0x20, 0, 8, 0, 1)         // XOR-MAPPED-ADDRESS, IPv4
			out = binary.BigEndian.AppendUint16(out, from.Port()^0x2112)
			a := from.Addr().Unmap().As4()
			out = binary.BigEndian.AppendUint32(out, binary.BigEndian.Uint32(a[:])^0x2112a442)
			_, _ = conn.WriteToUDPAddrPort(out, from)
		}
	}()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

func TestRelayProbes(t *testing.T) {
	var p relayProbes
	if p.round(t.Context()) {
		t.Error("a round of no relays")
	}
	a, b := bindings(t), bindings(t)
	relays := []control.ProbeRelay{{ID: "a", Host: a.Addr().String(), Port: a.Port()}, {ID: "b", Host: b.Addr().String(), Port: b.Port()}}
	p.follow(relays)
	p.round(t.Context())
	got := p.report()
	if len(got) != 2 || got["a"] <= 0 || got["b"] <= 0 {
		t.Fatalf("measured %v of two relays that answer", got)
	}
	p.follow(relays[:1])
	if got := p.report(); len(got) != 1 || got["a"] <= 0 {
		t.Errorf("b is still told after it was taken away: %v", got)
	}
	p.note(relays[1], time.Second)
	if got := p.report(); len(got) != 1 {
		t.Errorf("a late answer of b is told: %v", got)
	}
}

func TestRelayProbesMedian(t *testing.T) {
	var p relayProbes
	r := control.ProbeRelay{ID: "a", Host: "192.0.2.1", Port: 5349}
	p.follow([]control.ProbeRelay{r})
	for _, ms := range []int{900, 12, 11, 500, 13, 12, 11} {
		p.note(r, time.Duration(ms)*time.Millisecond)
	}
	if got := p.report()["a"]; got != 12*time.Millisecond {
		t.Errorf("median %v, want 12 ms of the newest five: 11, 500, 13, 12, 11", got)
	}
	for range probesKept {
		p.note(r, 0)
	}
	if got := p.report(); len(got) != 0 {
		t.Errorf("told %v of a relay that has been silent for five rounds", got)
	}
	p.note(r, time.Millisecond)
	r2 := r
	r2.Host = "192.0.2.2"
	p.follow([]control.ProbeRelay{r2})
	if got := p.report(); len(got) != 0 {
		t.Errorf("told %v of an address that it has not measured", got)
	}
}
