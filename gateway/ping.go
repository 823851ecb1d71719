package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// maxPings bounds echo requests that wait for their answers; a request beyond is dropped, as a busy host would.
const maxPings = 4096

// errNoPing says that this process may not send ICMP echo.
var errNoPing = errors.New("this gateway may not send ICMP echo: give it CAP_NET_RAW, or its group a place in net.ipv4.ping_group_range")

// pinger asks hosts for ICMP echo with the host's own kernel, so that what a peer gets is an answer of who really answers. Its methods may
// be called concurrently. Sockets are opened at first use: one per family, raw where that is allowed, else the kernel's ping socket.
type pinger struct {
	mu     sync.Mutex
	conns  [2]*pingConn // by family: 0 is IPv4, 1 is IPv6
	closed bool
}

type pingConn struct {
	c    *icmp.PacketConn
	raw  bool
	v6   bool
	id   int // of our requests; the kernel chooses its own on a ping socket
	done chan struct{}

	mu      sync.Mutex
	seq     uint16
	pending map[uint16]*ping
}

type ping struct {
	dst    netip.Addr
	answer chan []byte // 1 place
}

// Echo sends payload to dst and returns the payload of the answer. It waits until ctx ends.
func (p *pinger) Echo(ctx context.Context, dst netip.Addr, payload []byte) ([]byte, error) {
	dst = dst.Unmap()
	c, err := p.conn(dst.Is6())
	if err != nil {
		return nil, err
	}
	w := &ping{dst: dst, answer: make(chan []byte, 1)}
	seq, err := c.add(w)
	if err != nil {
		return nil, err
	}
	defer c.remove(seq)
	var typ icmp.Type = ipv4.ICMPTypeEcho
	if c.v6 {
		typ = ipv6.ICMPTypeEchoRequest
	}
	m := icmp.Message{Type: typ, Body: &icmp.Echo{ID: c.id, Seq: int(seq), Data: payload}}
	b, err := m.Marshal(nil) // for IPv6 the kernel fills in the checksum
	if err != nil {
		return nil, fmt.Errorf("echo request to %v: %w", dst, err)
	}
	var to net.Addr = &net.IPAddr{IP: dst.AsSlice()}
	if !c.raw {
		to = &net.UDPAddr{IP: dst.AsSlice()}
	}
	if _, err := c.c.WriteTo(b, to); err != nil {
		return nil, fmt.Errorf("echo request to %v: %w", dst, err)
	}
	select {
	case answer := <-w.answer:
		return answer, nil
	case <-c.done:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (p *pinger) conn(v6 bool) (*pingConn, error) {
	i, raw, dgram, any := 0, "ip4:icmp", "udp4", "0.0.0.0"
	if v6 {
		i, raw, dgram, any = 1, "ip6:ipv6-icmp", "udp6", "::"
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, net.ErrClosed
	}
	if p.conns[i] != nil {
		return p.conns[i], nil
	}
	c := &pingConn{v6: v6, raw: true, id: os.Getpid() & 0xffff, done: make(chan struct{}), pending: map[uint16]*ping{}}
	var err error
	if c.c, err = icmp.ListenPacket(raw, any); err != nil {
		c.raw = false
		if c.c, err = icmp.ListenPacket(dgram, any); err != nil {
			return nil, fmt.Errorf("%w (%w)", errNoPing, err)
		}
	}
	p.conns[i] = c
	go c.read()
	return c, nil
}

// Close ends what waits and closes the sockets.
func (p *pinger) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	var errs []error
	for _, c := range p.conns {
		if c != nil {
			errs = append(errs, c.c.Close())
			<-c.done
		}
	}
	p.conns = [2]*pingConn{}
	return errors.Join(errs...)
}

func (c *pingConn) add(w *ping) (uint16, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.pending) >= maxPings {
		return 0, errors.New("too many echo requests are waiting")
	}
	for {
		c.seq++
		if c.pending[c.seq] == nil {
			c.pending[c.seq] = w
			return c.seq, nil
		}
	}
}

func (c *pingConn) remove(seq uint16) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, seq)
}

// read hands answers to who waits for them until the socket is closed.
func (c *pingConn) read() {
	defer close(c.done)
	buf := make([]byte, 64<<10)
	proto, reply := 1, icmp.Type(ipv4.ICMPTypeEchoReply)
	if c.v6 {
		proto, reply = 58, ipv6.ICMPTypeEchoReply
	}
	for {
		n, from, err := c.c.ReadFrom(buf)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue // an ICMP error about an earlier request
		}
		m, err := icmp.ParseMessage(proto, buf[:n])
		if err != nil || m.Type != reply {
			continue
		}
		e, ok := m.Body.(*icmp.Echo)
		if !ok || (c.raw && e.ID != c.id) {
			continue
		}
		c.mu.Lock()
		w := c.pending[uint16(e.Seq)]
		c.mu.Unlock()
		if w == nil || w.dst != addrOf(from) {
			continue
		}
		select {
		case w.answer <- append([]byte(nil), e.Data...):
		default: // a duplicate
		}
	}
}

// addrOf is the IP address in a net.Addr of a packet socket, unmapped and without zone; the zero Addr for others.
func addrOf(a net.Addr) netip.Addr {
	var ip net.IP
	switch a := a.(type) {
	case *net.IPAddr:
		ip = a.IP
	case *net.UDPAddr:
		ip = a.IP
	}
	out, _ := netip.AddrFromSlice(ip)
	return out.Unmap()
}
