package gateway

import (
	"net"
	"net/netip"
	"sync"

	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

// openFlows are the connections that peers have open to destinations, so that they end with the policy that allowed them. The zero value
// is ready, and its methods may be called concurrently.
type openFlows struct {
	mu   sync.Mutex // guards open
	open map[*openFlow]struct{}
}

// openFlow is one connection to a destination.
type openFlow struct {
	of     *openFlows
	conn   net.Conn
	peer   identity.Node
	target policy.Target // as the peer named it, with the address that was dialled
}

// add takes c in; what it returns is closed in place of c.
func (o *openFlows) add(c net.Conn, peer identity.Node, t policy.Target, at netip.Addr) *openFlow {
	t.Addr = at
	f := &openFlow{of: o, conn: c, peer: peer, target: t}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.open == nil {
		o.open = map[*openFlow]struct{}{}
	}
	o.open[f] = struct{}{}
	return f
}

func (f *openFlow) close() error {
	f.of.mu.Lock()
	delete(f.of.open, f)
	f.of.mu.Unlock()
	return f.conn.Close()
}

// endDenied resets the flows that s does not allow any more, and returns how many.
func (o *openFlows) endDenied(s *policy.Snapshot) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := 0
	for f := range o.open {
		t := real(s, f.target)
		t.Addr = f.target.Addr
		if s.Evaluate(f.peer, t).Allowed {
			continue
		}
		if c, ok := f.conn.(*net.TCPConn); ok {
			_ = c.SetLinger(0) // the destination sees a reset, as the peer does
		}
		_ = f.conn.Close() // whoever reads from it finds out, and closes the flow
		n++
	}
	return n
}

// tcpFlow is an open TCP connection; everything but Close is the connection's own.
type tcpFlow struct {
	*net.TCPConn
	flow *openFlow
}

// Close ends the connection.
func (c *tcpFlow) Close() error { return c.flow.close() }
