package gateway

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"sallyway/internal/policy"
	"sallyway/tunnel"
)

// openFlows are the connections that peers have open to destinations, so that they end with the policy that allowed them. The zero value
// is ready, and its methods may be called concurrently.
type openFlows struct {
	mu   sync.Mutex // guards open
	open map[*openFlow]struct{}
	log  *flowLog // nil: nobody wants to know
}

// openFlow is one connection to a destination.
type openFlow struct {
	of      *openFlows
	conn    net.Conn
	peer    tunnel.Peer
	target  policy.Target // as the peer named it, with the address that was dialled
	rule    string
	serves  string // id of the resource
	named   string // the destination in the words of the peer, or of the resource
	id      string // for the flow log
	started time.Time

	sent, received atomic.Uint64          // bytes to and from the destination
	reason         atomic.Pointer[string] // why it ends, the first that was said
}

// add takes c in; what it returns is closed in place of c.
func (o *openFlows) add(c net.Conn, p tunnel.Peer, t policy.Target, at netip.Addr, d policy.Decision) *openFlow {
	f := &openFlow{of: o, conn: c, peer: p, rule: d.Rule, started: time.Now()}
	f.named = net.JoinHostPort(t.Host, strconv.Itoa(int(t.Port)))
	if d.Resource != nil {
		f.serves = d.Resource.ID
		if t.Addr.IsValid() && slices.Contains(d.Resource.Virtual, t.Addr) {
			f.named = net.JoinHostPort(d.Resource.Name, strconv.Itoa(int(t.Port)))
		}
	}
	t.Addr = at
	f.target = t
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.open == nil {
		o.open = map[*openFlow]struct{}{}
	}
	o.open[f] = struct{}{}
	f.id = o.log.id()
	return f
}

// why says why the flow ends; the first reason counts.
func (f *openFlow) why(reason string) { f.reason.CompareAndSwap(nil, &reason) }

// read and wrote count and note what an error of the destination tells.
func (f *openFlow) read(n int, err error) {
	if n > 0 {
		f.received.Add(uint64(n))
	}
	if err != nil {
		f.failed(err)
	}
}

func (f *openFlow) wrote(n int, err error) {
	if n > 0 {
		f.sent.Add(uint64(n))
	}
	if err != nil {
		f.failed(err)
	}
}

func (f *openFlow) failed(err error) {
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed):
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		f.why(flowResetThere)
	case errors.Is(err, syscall.ECONNREFUSED):
		f.why(flowRefused)
	case errors.Is(err, os.ErrDeadlineExceeded):
		f.why(flowIdle)
	case errors.Is(err, syscall.ETIMEDOUT), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		f.why(flowLost)
	}
}

func (f *openFlow) close() error {
	f.of.mu.Lock()
	_, open := f.of.open[f]
	delete(f.of.open, f)
	f.of.mu.Unlock()
	err := f.conn.Close()
	if open {
		f.of.log.ended(f)
	}
	return err
}

// endDenied resets the flows that s does not allow any more, and returns how many.
func (o *openFlows) endDenied(s *policy.Snapshot) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := 0
	for f := range o.open {
		t := real(s, f.target)
		t.Addr = f.target.Addr
		if s.Evaluate(f.peer.Node, t).Allowed {
			continue
		}
		f.why(flowDenied)
		if c, ok := f.conn.(*net.TCPConn); ok {
			_ = c.SetLinger(0) // the destination sees a reset, as the peer does
		}
		_ = f.conn.Close() // whoever reads from it finds out, and closes the flow
		n++
	}
	return n
}

// tcpFlow is an open TCP connection; what is read and written is counted, everything else is the connection's own.
type tcpFlow struct {
	*net.TCPConn
	flow *openFlow
}

// Read reads from the destination.
func (c *tcpFlow) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	c.flow.read(n, err)
	return n, err
}

// Write writes to the destination.
func (c *tcpFlow) Write(b []byte) (int, error) {
	n, err := c.TCPConn.Write(b)
	c.flow.wrote(n, err)
	return n, err
}

// SetLinger is how a reset by the peer arrives here.
func (c *tcpFlow) SetLinger(sec int) error {
	if sec == 0 {
		c.flow.why(flowReset)
	}
	return c.TCPConn.SetLinger(sec)
}

// Close ends the connection.
func (c *tcpFlow) Close() error { return c.flow.close() }
