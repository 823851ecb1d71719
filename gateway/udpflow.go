package gateway

import (
	"net"
	"net/netip"
	"sync"

	"sallyway/tunnel"
)

const (
	// maxSegments is how many datagrams the kernel takes in one call (UDP_MAX_SEGMENTS before Linux 6.9).
	maxSegments = 64
	// maxRun is how many bytes of them: a packet of 65535 less the headers of Ethernet, IPv6 and UDP. The kernel cuts up itself what is
	// longer than that on a link.
	maxRun = maxPacket - 14 - 40 - 8
)

// udpFlow is an open UDP socket that moves runs of datagrams in one call where the kernel can (UDP_GRO, UDP_SEGMENT). Unlike a socket of
// a session it lets the kernel fragment, as a program's own would. Everything but reading, writing and Close is the socket's own.
type udpFlow struct {
	*net.UDPConn
	flow      *openFlow
	segmented bool // whether writes may be

	readMu sync.Mutex // guards what follows, and makes reads one at a time
	oob    []byte
	rest   []byte // datagrams of size bytes that Read has still to return
	size   int
}

var _ tunnel.RunConn = (*udpFlow)(nil)

// newUDPFlow takes a connected socket over.
func newUDPFlow(c *net.UDPConn, f *openFlow) *udpFlow {
	u := &udpFlow{UDPConn: c, flow: f}
	u.offload()
	return u
}

// Close ends the association.
func (u *udpFlow) Close() error { return u.flow.close() }

// ReadRun implements tunnel.RunConn.
func (u *udpFlow) ReadRun(b []byte) (n, size int, err error) {
	u.readMu.Lock()
	defer u.readMu.Unlock()
	defer func() { u.flow.read(n, err) }()
	if len(u.rest) > 0 {
		n = copy(b, u.rest[:min(len(u.rest), max(1, len(b)/u.size)*u.size)])
		u.rest = u.rest[n:]
		return n, u.size, nil
	}
	return u.read(b)
}

// read reads from the socket.
func (u *udpFlow) read(b []byte) (n, size int, err error) {
	n, oobn, _, _, err := u.ReadMsgUDPAddrPort(b, u.oob)
	if size = runSize(u.oob[:oobn]); size <= 0 || size > n {
		size = n
	}
	return n, size, err
}

// Read reads one datagram. b should hold 65535 bytes.
func (u *udpFlow) Read(b []byte) (n int, err error) {
	u.readMu.Lock()
	defer u.readMu.Unlock()
	defer func() { u.flow.read(n, err) }()
	if len(u.rest) == 0 {
		n, size, err := u.read(b)
		if err != nil || n == size {
			return n, err
		}
		u.rest, u.size = append(u.rest[:0], b[size:n]...), size
		return size, nil
	}
	k := min(u.size, len(u.rest))
	n = copy(b, u.rest[:k])
	u.rest = u.rest[k:]
	return n, nil
}

// Write sends one datagram.
func (u *udpFlow) Write(b []byte) (int, error) {
	n, err := u.UDPConn.Write(b)
	u.flow.wrote(n, err)
	return n, err
}

// WriteRun implements tunnel.RunConn.
func (u *udpFlow) WriteRun(b []byte, size int) error {
	run := size
	if u.segmented && size > 0 {
		run *= max(1, min(maxSegments, maxRun/size))
	}
	for {
		k := min(run, len(b))
		if err := u.writePiece(b[:k], size); err != nil {
			u.flow.wrote(0, err)
			return err
		}
		u.flow.wrote(k, nil)
		if b = b[k:]; len(b) == 0 {
			return nil
		}
	}
}

// writePiece sends datagrams of size bytes in one call, and in one call each where the kernel refuses: it segments none that would need
// to be fragmented besides.
func (u *udpFlow) writePiece(b []byte, size int) error {
	if len(b) > size {
		var space [segmentSpace]byte
		if _, _, err := u.WriteMsgUDPAddrPort(b, segmentControl(space[:], size), netip.AddrPort{}); err == nil || !tooLarge(err) {
			return err
		}
	}
	for {
		k := min(size, len(b))
		if _, err := u.UDPConn.Write(b[:k]); err != nil {
			return err
		}
		if b = b[k:]; len(b) == 0 {
			return nil
		}
	}
}
