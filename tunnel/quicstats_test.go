package tunnel

import (
	"io"
	"testing"
	"time"
)

// TestQUICStats: both ends count what a flow cost, and the gateway finds the session by its number only while it lives.
func TestQUICStats(t *testing.T) {
	w := newWorld(t, nil)
	port := tcpServer(t, echo)
	s := w.dial(w.link("fra-1 udp"), nil)
	before := s.QUIC()
	c, err := s.DialTCP(timeout(t, 10*time.Second), "127.0.0.1", port)
	if err != nil {
		t.Fatal(err)
	}
	const size = 1 << 20
	go func() { _, _ = c.Write(make([]byte, size)); _ = c.CloseWrite() }()
	if n, err := io.Copy(io.Discard, c); err != nil || n != size {
		t.Fatalf("%d bytes, %v", n, err)
	}
	c.Close()
	id := w.server.Sessions()[0].Peer.Session
	far, path, ok := w.server.QUIC(id)
	if !ok || path.Name != "fra-1 udp" {
		t.Errorf("%v, path %+v", ok, path)
	}
	after := s.QUIC()
	if sent := after.BytesSent - before.BytesSent; sent < size {
		t.Errorf("%d bytes sent for a flow of %d", sent, size)
	}
	for end, q := range map[string]QUICStats{"client": after, "gateway": far} {
		if q.BytesSent < size || q.PacketsSent < size/1500 || q.PacketsReceived < size/1500 || q.PacketsLost > q.PacketsSent || q.CongestionWindow == 0 || q.RTT <= 0 || q.MinRTT <= 0 {
			t.Errorf("%s: %+v", end, q)
		}
	}
	if _, _, ok := w.server.QUIC(id + 1); ok {
		t.Error("a session that never was")
	}
	if err := s.Close("test over"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the session is gone at the gateway", func() bool { _, _, ok := w.server.QUIC(id); return !ok })
}
