package udpio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"sallyway/internal/datagram"
)

// controlSpace holds the largest set of control messages of a write: segment size, traffic class, IPv6 packet info.
const controlSpace = 128

// ecnMask is the ECN field in an IPv4 TOS or IPv6 traffic class byte (RFC 3168 §5).
const ecnMask = 3

func controlReusePort(_, _ string, rc syscall.RawConn) error {
	var serr error
	err := rc.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
	return errors.Join(err, serr)
}

// setup sets the socket's options. Only what makes the socket wrong is an error; what makes it slow is a warning.
func (c *Conn) setup(cfg Config) (warnings []string, err error) {
	cerr := c.raw.Control(func(f uintptr) {
		fd := int(f)
		var domain int
		if domain, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil {
			err = fmt.Errorf("read socket family: %w", err)
			return
		}
		c.v6 = domain == unix.AF_INET6
		// An IPv6 socket takes the IPv4 options, too, for its mapped peers; whether it has any shows only later.
		if e := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE); e != nil && !c.v6 {
			err = fmt.Errorf("set DF: %w", e)
			return
		}
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_RECVTOS, 1)
		if cfg.PacketInfo {
			if e := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_PKTINFO, 1); e != nil && !c.v6 {
				err = fmt.Errorf("ask for packet info: %w", e)
				return
			}
		}
		if c.v6 {
			if e := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE); e != nil {
				err = fmt.Errorf("set DF: %w", e)
				return
			}
			_ = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVTCLASS, 1)
			if cfg.PacketInfo {
				if e := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1); e != nil {
					err = fmt.Errorf("ask for packet info: %w", e)
					return
				}
			}
		}
		warnings = append(warnings, growBuffer(fd, "receive", "net.core.rmem_max", cfg.ReadBuffer, unix.SO_RCVBUF, unix.SO_RCVBUFFORCE)...)
		warnings = append(warnings, growBuffer(fd, "send", "net.core.wmem_max", cfg.WriteBuffer, unix.SO_SNDBUF, unix.SO_SNDBUFFORCE)...)
		if cfg.NoOffload || !datagram.OffloadAllowed() {
			return
		}
		c.gro = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1) == nil
		// Reading UDP_SEGMENT succeeds from Linux 4.18 on, where writes understand it.
		_, e := unix.GetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT)
		c.gso.Store(e == nil)
	})
	return warnings, errors.Join(cerr, err)
}

// growBuffer sizes one of the kernel's buffers, beyond the system's limit where privilege allows, and checks what it got: the kernel
// reports twice what is usable.
func growBuffer(fd int, what, sysctl string, want, plain, force int) []string {
	if want < 0 {
		return nil
	}
	if have, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, plain); err == nil && have/2 >= want {
		return nil
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, want) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, plain, want)
	}
	got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, plain)
	if err == nil && got/2 >= want {
		return nil
	}
	return []string{fmt.Sprintf("the UDP %s buffer is %d KiB, wanted %d KiB: bursts will be dropped; run sysctl -w %s=%d",
		what, got/2>>10, want>>10, sysctl, want)}
}

// parse reads the control messages of a read into m. It walks them by hand because the library's parser allocates.
func (c *Conn) parse(oob []byte, m *Message) {
	for len(oob) >= unix.SizeofCmsghdr {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&oob[0]))
		length := int(h.Len)
		if length < unix.SizeofCmsghdr || length > len(oob) {
			return
		}
		data := oob[unix.CmsgLen(0):length]
		switch {
		case h.Level == unix.IPPROTO_UDP && h.Type == unix.UDP_GRO && len(data) >= 2:
			// The kernel has an int here; its first two bytes are the size on little-endian machines, so read it whole.
			if len(data) >= 4 {
				m.Segment = int(int32(binary.NativeEndian.Uint32(data)))
			} else {
				m.Segment = int(binary.NativeEndian.Uint16(data))
			}
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_TOS && len(data) >= 1:
			m.ECN = datagram.ECN(data[0] & ecnMask)
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_TCLASS && len(data) >= 4:
			m.ECN = datagram.ECN(binary.NativeEndian.Uint32(data) & ecnMask)
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			m.Local = netip.AddrFrom4([4]byte(data[4:8])) // ipi_spec_dst: what to answer from
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			m.Local = netip.AddrFrom16([16]byte(data[:16])).Unmap()
		}
		next := unix.CmsgSpace(length - unix.CmsgLen(0))
		if next > len(oob) {
			return
		}
		oob = oob[next:]
	}
}

// control appends the control messages of a write to b, which has room for them.
func (c *Conn) control(b []byte, segment int, ecn datagram.ECN, to Peer) []byte {
	if segment > 0 {
		var d []byte
		b, d = appendHeader(b, unix.IPPROTO_UDP, unix.UDP_SEGMENT, 2)
		binary.NativeEndian.PutUint16(d, uint16(segment))
	}
	// An IPv4 peer of an IPv6 socket is served by the kernel's IPv4 code, which knows the IPv4 messages only. Go connects sockets of
	// the peer's own family, so a connected IPv6 socket has an IPv6 peer.
	four := !c.v6 || to.Addr.Addr().Is4() || to.Addr.Addr().Is4In6()
	if ecn != 0 {
		if four {
			var d []byte
			b, d = appendHeader(b, unix.IPPROTO_IP, unix.IP_TOS, 4)
			binary.NativeEndian.PutUint32(d, uint32(ecn))
		} else {
			var d []byte
			b, d = appendHeader(b, unix.IPPROTO_IPV6, unix.IPV6_TCLASS, 4)
			binary.NativeEndian.PutUint32(d, uint32(ecn))
		}
	}
	switch {
	case !to.Local.IsValid():
	case four && to.Local.Unmap().Is4():
		var d []byte
		b, d = appendHeader(b, unix.IPPROTO_IP, unix.IP_PKTINFO, unix.SizeofInet4Pktinfo)
		a := to.Local.Unmap().As4()
		copy(d[4:8], a[:])
	case !four && to.Local.Is6():
		var d []byte
		b, d = appendHeader(b, unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, unix.SizeofInet6Pktinfo)
		a := to.Local.As16()
		copy(d[:16], a[:])
	}
	return b
}

// appendHeader appends a control message with n bytes of zeros for data, which it returns as well.
func appendHeader(b []byte, level, typ int32, n int) (all, data []byte) {
	start := len(b)
	b = b[:start+unix.CmsgSpace(n)]
	clear(b[start:])
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[start]))
	h.Level, h.Type = level, typ
	h.SetLen(unix.CmsgLen(n))
	return b, b[start+unix.CmsgLen(0) : start+unix.CmsgLen(n)]
}

// TooLarge reports whether err says that a datagram exceeds the path's or the interface's MTU.
func TooLarge(err error) bool { return errors.Is(err, unix.EMSGSIZE) }

// offloadBroken reports whether err says that the route's device can not segment.
func offloadBroken(err error) bool { return errors.Is(err, unix.EIO) }

// retryEach reports whether datagrams refused as a run may pass one at a time.
func retryEach(err error) bool {
	return offloadBroken(err) || TooLarge(err) || errors.Is(err, unix.EINVAL)
}

func (c *Conn) wait() error {
	return c.raw.Read(func(fd uintptr) bool {
		p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p[:], 0)
		return n != 0 || (err != nil && !errors.Is(err, unix.EINTR))
	})
}
