// Package udpio is UDP socket I/O in runs: one system call moves up to 64 KiB of equal-sized datagrams of one peer, because the
// kernel's work per call, not per byte, is what a relay pays for. Reads coalesce (UDP_GRO), writes are segmented by the kernel or the
// network card (UDP_SEGMENT), the ECN field passes both ways, and datagrams leave with DF set.
//
//	c, warnings, err := udpio.Listen(ctx, netip.MustParseAddrPort("[::]:5349"), udpio.Config{})
//	buf := make([]byte, udpio.MaxRead)
//	m, err := c.Read(buf)                    // datagrams of m.Segment bytes each in buf[:m.N], the last may be shorter
//	err = c.Write(buf[:m.N], m.Segment, m.ECN, udpio.Peer{Addr: m.From})
//
// What the kernel can not do is done in user space: without UDP_SEGMENT every datagram is a write of its own. The environment
// can turn both offloads off: datagram.NoOffload.
package udpio

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"

	"sallyway/internal/datagram"
)

// Limits of one system call.
const (
	// MaxRead is the size of a read buffer in bytes: the largest coalesced read is 65 535.
	MaxRead = datagram.MaxBatch
	// MaxWrite is the most bytes in one segmented write: an IPv4 packet of 65 535 less its IP and UDP headers.
	MaxWrite = 65507
	// MaxSegments is the most datagrams in one segmented write (UDP_MAX_SEGMENTS before Linux 6.9).
	MaxSegments = 64
	// DefaultBuffer is the size of the kernel's socket buffers asked for, in bytes, each way: 100 ms of 640 Mbit/s.
	DefaultBuffer = 8 << 20
)

// Config says how a socket is set up. The zero Config is right for most.
type Config struct {
	// ReadBuffer and WriteBuffer are the kernel's buffer sizes in bytes; 0 is DefaultBuffer, negative leaves the system's default.
	ReadBuffer, WriteBuffer int
	// PacketInfo asks for the local address of every datagram, which a socket on a wildcard address needs to answer from the
	// address that was asked.
	PacketInfo bool
	// ReusePort lets several sockets share the port (SO_REUSEPORT); only Listen uses it.
	ReusePort bool
	// NoOffload turns GRO and GSO off for this socket, as datagram.NoOffload does for all.
	NoOffload bool
}

// Message describes one read.
type Message struct {
	// N is how many bytes were read; Segment is the length of every datagram in them but the last, which may be shorter. A lone
	// datagram has Segment == N. An empty datagram has N == 0.
	N, Segment int
	// ECN is the congestion field that all of them carried.
	ECN datagram.ECN
	// From is who sent them, IPv4 unmapped. It is set on connected sockets, too.
	From netip.AddrPort
	// Local is the address they were sent to (Config.PacketInfo), else the zero Addr.
	Local netip.Addr
}

// Peer is where a write goes: to whom, and from which local address. A zero Addr is for connected sockets; a zero Local lets the
// system choose.
type Peer struct {
	Addr  netip.AddrPort
	Local netip.Addr
}

// Conn is a UDP socket. Read is for one goroutine at a time, everything else may be called concurrently.
type Conn struct {
	udp  *net.UDPConn
	raw  syscall.RawConn
	v6   bool // an AF_INET6 socket, which may carry IPv4, too
	gro  bool
	gso  atomic.Bool
	oob  []byte // control messages of the read under way
	info bool
}

// Listen opens a UDP socket on addr. An unspecified IPv6 address takes IPv4, too. warnings are for the log: what could not be set
// and the command that would allow it.
func Listen(ctx context.Context, addr netip.AddrPort, cfg Config) (c *Conn, warnings []string, err error) {
	network, host := "udp4", addr.String()
	if addr.Addr().Is6() {
		network = "udp6"
		if addr.Addr().IsUnspecified() { // without a host the system's families are taken, IPv6 with IPv4 where there is IPv6
			network, host = "udp", fmt.Sprintf(":%d", addr.Port())
		}
	}
	lc := net.ListenConfig{}
	if cfg.ReusePort {
		lc.Control = controlReusePort
	}
	pc, err := lc.ListenPacket(ctx, network, host)
	if err != nil {
		return nil, nil, err
	}
	return New(pc.(*net.UDPConn), cfg)
}

// New sets an open socket up and takes it over: it is closed when New fails. A connected socket is fine; write to it with a zero Peer.
func New(udp *net.UDPConn, cfg Config) (c *Conn, warnings []string, err error) {
	raw, err := udp.SyscallConn()
	if err != nil {
		udp.Close()
		return nil, nil, err
	}
	c = &Conn{udp: udp, raw: raw, oob: make([]byte, 256), info: cfg.PacketInfo}
	if cfg.ReadBuffer == 0 {
		cfg.ReadBuffer = DefaultBuffer
	}
	if cfg.WriteBuffer == 0 {
		cfg.WriteBuffer = DefaultBuffer
	}
	if warnings, err = c.setup(cfg); err != nil {
		udp.Close()
		return nil, nil, err
	}
	return c, warnings, nil
}

// UDPConn is the socket itself, for addresses and deadlines. Reading from it directly loses the segment size.
func (c *Conn) UDPConn() *net.UDPConn { return c.udp }

// LocalAddr is the socket's own address.
func (c *Conn) LocalAddr() netip.AddrPort {
	a := c.udp.LocalAddr().(*net.UDPAddr).AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// GRO reports whether reads coalesce.
func (c *Conn) GRO() bool { return c.gro }

// GSO reports whether writes are segmented below user space. It turns false for good when the route turns out not to support it.
func (c *Conn) GSO() bool { return c.gso.Load() }

// Close closes the socket; a Read under way returns net.ErrClosed.
func (c *Conn) Close() error { return c.udp.Close() }

// Read waits for datagrams and reads a run of them into b, which should have MaxRead bytes. It does not allocate.
func (c *Conn) Read(b []byte) (Message, error) {
	n, oobn, _, from, err := c.udp.ReadMsgUDPAddrPort(b, c.oob)
	if err != nil {
		return Message{}, err
	}
	m := Message{N: n, Segment: n, From: netip.AddrPortFrom(from.Addr().Unmap(), from.Port())}
	c.parse(c.oob[:oobn], &m)
	if m.Segment <= 0 || m.Segment > n {
		m.Segment = n
	}
	return m, nil
}

// Write sends b as datagrams of segment bytes each, the last possibly shorter; segment 0, or one at least as long as b, sends one
// datagram. It splits what exceeds MaxWrite or MaxSegments, and does not allocate. On an error the datagrams after the refused call are
// not sent, except that a datagram too large for the path (EMSGSIZE) holds up no other. The first error is returned.
func (c *Conn) Write(b []byte, segment int, ecn datagram.ECN, to Peer) error {
	if segment <= 0 || segment >= len(b) {
		return c.write(b, 0, ecn, to)
	}
	if !c.gso.Load() {
		return c.writeEach(b, segment, ecn, to)
	}
	run := min(MaxSegments, MaxWrite/segment) * segment
	if run <= segment {
		return c.writeEach(b, segment, ecn, to)
	}
	for len(b) > 0 {
		n := min(run, len(b))
		seg := segment
		if n <= segment {
			seg = 0
		}
		if err := c.write(b[:n], seg, ecn, to); err != nil {
			if seg == 0 || !retryEach(err) {
				return err
			}
			if offloadBroken(err) {
				c.gso.Store(false)
			}
			return c.writeEach(b, segment, ecn, to)
		}
		b = b[n:]
	}
	return nil
}

// writeEach sends one datagram per system call.
func (c *Conn) writeEach(b []byte, segment int, ecn datagram.ECN, to Peer) error {
	var first error
	for len(b) > 0 {
		n := min(segment, len(b))
		if err := c.write(b[:n], 0, ecn, to); err != nil {
			if first == nil {
				first = err
			}
			if !TooLarge(err) {
				return first
			}
		}
		b = b[n:]
	}
	return first
}

func (c *Conn) write(b []byte, segment int, ecn datagram.ECN, to Peer) error {
	var space [controlSpace]byte
	oob := c.control(space[:0], segment, ecn, to)
	_, _, err := c.udp.WriteMsgUDPAddrPort(b, oob, to.Addr)
	return err
}

// Wait waits until a Read would return at once, so that a socket that is idle needs no buffer.
func (c *Conn) Wait() error { return c.wait() }
