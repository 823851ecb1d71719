package udpio

import (
	"bytes"
	"net"
	"testing"
	"time"

	"sallyway/internal/datagram"
)

// pair is a connected socket and the one it is connected to.
func senderPair(t *testing.T, cfg Config) (out, in *Conn) {
	t.Helper()
	b, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	a, err := net.DialUDP("udp4", nil, b.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	if in, _, err = New(b, Config{}); err != nil {
		t.Fatal(err)
	}
	if out, _, err = New(a, cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close(); in.Close() })
	return out, in
}

func TestSender(t *testing.T) {
	for _, noOffload := range []bool{false, true} {
		out, in := senderPair(t, Config{NoOffload: noOffload})
		s := out.NewSender()
		sent := make([]byte, 100*1000+17) // more than a call takes
		for i := range sent {
			sent[i] = byte(i * 7)
		}
		if err := s.Send(sent, 1000, datagram.ECT0); err != nil {
			t.Fatal(err)
		}
		var got []byte
		buf := make([]byte, MaxRead)
		_ = in.UDPConn().SetReadDeadline(time.Now().Add(5 * time.Second))
		for len(got) < len(sent) {
			m, err := in.Read(buf)
			if err != nil {
				t.Fatalf("after %d bytes: %v", len(got), err)
			}
			if m.ECN != datagram.ECT0 {
				t.Errorf("ECN %v", m.ECN)
			}
			got = append(got, buf[:m.N]...)
		}
		if !bytes.Equal(got, sent) {
			t.Error("what arrived is not what was sent")
		}
		if err := s.Send(make([]byte, 66000), 0, 0); !TooLarge(err) {
			t.Errorf("66000 bytes in one datagram: %v", err)
		}
	}
}

func TestSenderAllocs(t *testing.T) {
	out, _ := senderPair(t, Config{})
	s := out.NewSender()
	b := make([]byte, 20*1000)
	if n := testing.AllocsPerRun(100, func() { _ = s.Send(b, 1000, datagram.ECT0) }); n != 0 {
		t.Errorf("%v allocations per send", n)
	}
}
