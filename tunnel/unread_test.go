package tunnel

import (
	"net"
	"testing"
	"time"
)

// Flows that nobody reads keep what their window holds; new ones work all the same, in both directions.
func TestUnreadFlowsHoldUpNoOther(t *testing.T) {
	w := newWorld(t, nil)
	const unread = 16
	hold := make(chan struct{})
	defer close(hold) // before the servers' clean-up, which waits for their connections
	source := tcpServer(t, func(c *net.TCPConn) {
		defer c.Close()
		go func() {
			<-hold
			c.Close()
		}()
		stream(c)
	})
	sink := tcpServer(t, func(c *net.TCPConn) { // takes what the kernel takes, and never reads
		defer c.Close()
		_ = c.SetReadBuffer(4 << 10) // best effort: the kernel has a least size
		<-hold
	})
	echo := tcpServer(t, func(c *net.TCPConn) {
		defer c.Close()
		b := make([]byte, 1)
		if _, err := c.Read(b); err == nil {
			_, _ = c.Write(b) // the client looks at it
		}
	})
	s := w.dial(w.link("a"), nil)
	var flows []*Stream
	for i := range unread {
		port := source
		if i%2 == 1 {
			port = sink
		}
		c, err := s.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port)
		if err != nil {
			t.Fatalf("flow %d: %v", i, err)
		}
		t.Cleanup(c.Reset)
		flows = append(flows, c)
		if port == sink {
			go stream(c)
		}
	}
	// What is on its way has stopped: the windows of the unread flows are full.
	eventually(t, "standstill", func() bool {
		before := s.conn.ConnectionStats()
		time.Sleep(200 * time.Millisecond)
		after := s.conn.ConnectionStats()
		const trickle = 64 << 10
		return after.BytesReceived-before.BytesReceived < trickle && after.BytesSent-before.BytesSent < trickle
	})
	if got := s.conn.ConnectionStats(); got.BytesReceived < unread/2*streamWindow/2 {
		t.Fatalf("only %d bytes came: nothing is held up", got.BytesReceived)
	}
	c, err := s.DialTCP(timeout(t, 3*time.Second), "127.0.0.1", echo)
	if err != nil {
		t.Fatalf("a new flow beside %d unread ones: %v", len(flows), err)
	}
	defer c.Reset()
	if err := c.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := []byte{7}
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(b); n != 1 || b[0] != 7 {
		t.Errorf("%d bytes %v, %v", n, b, err)
	}
}
