package netstack_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"sallyway/netstack"
)

// segmented is the control message that has the kernel send a payload as datagrams of size bytes.
func segmented(size int) []byte {
	oob := make([]byte, unix.CmsgSpace(2))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&oob[0]))
	h.Level, h.Type = unix.IPPROTO_UDP, unix.UDP_SEGMENT
	h.SetLen(unix.CmsgLen(2))
	binary.NativeEndian.PutUint16(oob[unix.CmsgLen(0):], uint16(size))
	return oob
}

// receiveRuns makes a socket receive runs of datagrams in one piece.
func receiveRuns(t *testing.T, c *net.UDPConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var errno error
	if err := raw.Control(func(fd uintptr) { errno = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_GRO, 1) }); err != nil || errno != nil {
		t.Fatal(err, errno)
	}
}

// readRun reads one piece, and how long its datagrams are.
func readRun(t *testing.T, c *net.UDPConn) ([]byte, int) {
	t.Helper()
	b, oob := make([]byte, 65535), make([]byte, unix.CmsgSpace(4))
	n, m, _, _, err := c.ReadMsgUDP(b, oob)
	if err != nil {
		t.Fatal(err)
	}
	size := n
	msgs, err := unix.ParseSocketControlMessage(oob[:m])
	if err != nil {
		t.Fatal(err)
	}
	for _, msg := range msgs {
		if msg.Header.Level == unix.IPPROTO_UDP && msg.Header.Type == unix.UDP_GRO {
			size = int(binary.NativeEndian.Uint32(msg.Data))
		}
	}
	return b[:n], size
}

// cutUp hides from the stack what its device can do.
type cutUp struct{ netstack.Device }

func (d cutUp) SetReadDeadline(t time.Time) error {
	return d.Device.(interface{ SetReadDeadline(time.Time) error }).SetReadDeadline(t)
}

// TestUDPSegments sends runs of datagrams with UDP_SEGMENT through the TUN and receives their echo with UDP_GRO and without.
func TestUDPSegments(t *testing.T) {
	type run struct{ n, size int }
	seen := make(chan run, 100)
	echo := netstack.Config{HandleUDP: func(_ context.Context, f *netstack.UDPFlow) {
		b := make([]byte, 65535)
		for {
			n, size, err := f.ReadPackets(b)
			if err != nil {
				return
			}
			seen <- run{n, size}
			if err := f.WritePackets(b[:n], max(1, size)); err != nil {
				t.Error(err)
			}
		}
	}}
	for _, offloaded := range []bool{true, false} {
		var wrap func(netstack.Device) netstack.Device
		if !offloaded {
			wrap = func(d netstack.Device) netstack.Device { return cutUp{d} }
		}
		l := newLabOn(t, 1500, echo, wrap)
		whole := offloaded && l.dev.EnableUDPSegments()
		if offloaded && !whole {
			t.Log("this kernel has no UDP segmentation offload for TUN: runs come cut up")
		}
		for _, f := range families {
			for _, gro := range []bool{true, false} {
				for _, r := range []run{{5000, 1000}, {4100, 1000}, {1000, 1000}, {64 * 1000, 1000}, {46 * 1400, 1400}, {3, 1}, {65507 / 2, 1452}} {
					t.Run(fmt.Sprintf("offloaded=%v/%s/gro=%v/%dof%d", offloaded, f.name, gro, r.n, r.size), func(t *testing.T) {
						conn, err := l.dial("udp", net.JoinHostPort(f.dst, "9"))
						if err != nil {
							t.Fatal(err)
						}
						defer conn.Close()
						c := conn.(*net.UDPConn)
						c.SetDeadline(time.Now().Add(testTimeout))
						if gro {
							receiveRuns(t, c)
						}
						data := make([]byte, r.n)
						rand.NewChaCha8([32]byte{3}).Read(data)
						if _, _, err := c.WriteMsgUDP(data, segmented(r.size), nil); err != nil {
							t.Fatal(err)
						}
						if whole && r.n > r.size {
							if got := <-seen; got != r {
								t.Errorf("the handler saw %v, want %v", got, r)
							}
						}
						var back []byte
						for pieces := 0; len(back) < r.n; pieces++ {
							b, size := readRun(t, c)
							back = append(back, b...)
							switch {
							case whole && gro && r.n > r.size && (len(b) != r.n || size != r.size):
								t.Errorf("%d bytes in pieces of %d at once, want %d of %d", len(b), size, r.n, r.size)
							case !gro && len(b) != min(r.size, r.n-pieces*r.size):
								t.Errorf("datagram %d has %d bytes, want %d", pieces, len(b), r.size)
							}
						}
						if !bytes.Equal(back, data) {
							t.Error("other bytes came back")
						}
						for len(seen) > 0 {
							<-seen
						}
					})
				}
			}
		}
		if s := l.stack.Stats(); s.BadChecksum+s.Malformed+s.UDPQueueFull+s.WriteErrors > 0 {
			t.Errorf("%+v", s)
		}
	}
}

// TestUDPReadRunInParts reads a run datagram by datagram, and with room for some.
func TestUDPReadRunInParts(t *testing.T) {
	got := make(chan error, 1)
	l := newLab(t, 1500, netstack.Config{HandleUDP: func(_ context.Context, f *netstack.UDPFlow) {
		got <- func() error {
			b := make([]byte, 250)
			for i, want := range []struct {
				n, size int
				err     error
			}{{100, 100, nil}, {200, 100, nil}, {50, 100, io.ErrShortBuffer}, {70, 70, nil}} {
				var n, size int
				var err error
				switch i {
				case 0:
					size = 100
					n, err = f.ReadPacket(b)
				case 2:
					n, size, err = f.ReadPackets(b[:50])
				default:
					n, size, err = f.ReadPackets(b)
				}
				if n != want.n || size != want.size || err != want.err {
					return fmt.Errorf("read %d: %d bytes of %d, %v, want %v", i, n, size, err, want)
				}
			}
			return nil
		}()
	}})
	c, err := l.dial("udp", "10.99.0.1:9")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if !l.dev.EnableUDPSegments() {
		t.Log("this kernel has no UDP segmentation offload for TUN: the run comes cut up")
		return
	}
	if _, _, err := c.(*net.UDPConn).WriteMsgUDP(make([]byte, 470), segmented(100), nil); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-got:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(testTimeout):
		t.Error("no datagram")
	}
}
