package gateway

import (
	"io"
	"net"
	"testing"
	"time"

	"sallyway/internal/policy"
)

// TestFlowsEndWithTheirPolicy: an open flow whose rule is gone is reset, others go on, and closed ones are forgotten.
func TestFlowsEndWithTheirPolicy(t *testing.T) {
	z := newZone(t, map[string]string{"web.corp.example": "127.0.0.1"})
	h := newHandler(t, z, "127.0.0.1")
	ended := make(chan error, 3)
	port := tcpServer(t, "127.0.0.1", func(c *net.TCPConn) {
		_, err := io.Copy(io.Discard, c)
		ended <- err
		c.Close()
	})
	dial := func(host string) net.Conn {
		t.Helper()
		c, err := h.DialTCP(t.Context(), peer1, target(policy.TCP, host, port))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	byName, byVirtual, gone := dial("web.corp.example"), dial("100.112.0.20"), dial("127.0.0.1")
	if err := gone.Close(); err != nil {
		t.Error(err)
	}
	<-ended
	s, err := h.enforce.snapshot()
	if err != nil {
		t.Fatal(err)
	}
	if n := h.flows.endDenied(s); n != 0 {
		t.Errorf("%d flows ended, and every rule stands", n)
	}
	without := *s
	without.Rules = nil
	if n := h.flows.endDenied(&without); n != 2 {
		t.Errorf("%d flows ended, want the 2 that are open", n)
	}
	for range 2 {
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Fatal("the destination was not told")
		}
	}
	for _, c := range []net.Conn{byName, byVirtual} {
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("a flow without a rule is read from")
		}
		_ = c.Close()
	}
	if len(h.flows.open) != 0 {
		t.Errorf("%d flows are remembered after their end", len(h.flows.open))
	}
}
