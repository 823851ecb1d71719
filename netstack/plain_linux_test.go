package netstack_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sallyway/netstack"
)

// plainTUN is a TUN without offloads as a PacketConn: each packet by itself, as in a CONNECT-IP session.
type plainTUN struct {
	*os.File
	pathMTU int // larger packets get an ICMP error
}

func (p plainTUN) ReadPacket(b []byte) (int, error) { return p.Read(b) }

func (p plainTUN) WritePacket(b []byte) ([]byte, error) {
	if len(b) > p.pathMTU {
		router := map[byte]netip.Addr{4: netip.MustParseAddr("10.98.0.1"), 6: netip.MustParseAddr("fd98::1")}[b[0]>>4]
		return netstack.AppendTooBig(nil, b, router, p.pathMTU), nil
	}
	_, err := p.Write(b)
	return nil, err
}

// newPlainLab is a namespace whose 10.99.0.0/16 and fd99::/64 lead to a stack on a PacketConn.
func newPlainLab(t *testing.T, pathMTU int, c netstack.Config) *namespace {
	n := newNamespace(t)
	var f *os.File
	n.do(func() {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Error(err)
			return
		}
		ifr, _ := unix.NewIfreq("plain0")
		ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
			t.Error(err)
		}
		f = os.NewFile(uintptr(fd), "plain0")
		l, err := netlink.LinkByName("plain0")
		if err != nil {
			t.Error(err)
			return
		}
		for _, a := range []string{hostAddr4 + "/32", hostAddr6 + "/128"} {
			addr, _ := netlink.ParseAddr(a)
			addr.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(l, addr); err != nil {
				t.Error(err)
			}
		}
		if err := netlink.LinkSetUp(l); err != nil {
			t.Error(err)
		}
		for _, r := range []string{"10.99.0.0/16", "fd99::/64"} {
			dst, _ := netlink.ParseIPNet(r)
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst}); err != nil {
				t.Error(err)
			}
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	c.Conn, c.MTU = plainTUN{f, pathMTU}, 1500
	s, err := netstack.New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel() // which closes the PacketConn
		if err := <-ran; err != nil {
			t.Error("run:", err)
		}
		if _, err := f.Read(nil); err == nil {
			t.Error("the PacketConn is still open")
		}
	})
	return n
}

func TestPacketConn(t *testing.T) {
	addr := serveTCP(t, func(c *net.TCPConn) {
		io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
	})
	n := newPlainLab(t, 1500, netstack.Config{HandleTCP: spliceTo(addr), HandleUDP: func(_ context.Context, f *netstack.UDPFlow) {
		b := make([]byte, 65535)
		for {
			n, err := f.ReadPacket(b)
			if err != nil {
				return
			}
			if err := f.WritePacket(b[:n]); err != nil {
				t.Error(err)
			}
		}
	}})
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			c, err := n.dial("tcp", net.JoinHostPort(f.dst, "80"))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(testTimeout))
			data := make([]byte, 1<<20)
			rand.NewChaCha8([32]byte{3}).Read(data)
			go func() {
				c.Write(data)
				c.(*net.TCPConn).CloseWrite()
			}()
			h := sha256.New()
			if m, err := io.Copy(h, c); err != nil || m != int64(len(data)) || [32]byte(h.Sum(nil)) != sha256.Sum256(data) {
				t.Errorf("%d of %d bytes came back, or others: %v", m, len(data), err)
			}
			u, err := n.dial("udp", net.JoinHostPort(f.dst, "53"))
			if err != nil {
				t.Fatal(err)
			}
			defer u.Close()
			u.SetDeadline(time.Now().Add(testTimeout))
			for _, size := range []int{1, 1452, 1472, 4000} {
				b := make([]byte, 65535)
				u.Write(data[:size])
				if m, err := u.Read(b); err != nil || string(b[:m]) != string(data[:size]) {
					t.Error(fmt.Sprint(size, " bytes: ", m), err)
				}
			}
		})
	}
}

// TestPacketConnPathMTU: the stack hears that its packets are too big for the session, and sends smaller ones.
func TestPacketConnPathMTU(t *testing.T) {
	const size = 1 << 20
	n := newPlainLab(t, 1300, netstack.Config{HandleTCP: func(_ context.Context, r *netstack.TCPRequest) {
		if c, err := r.Accept(); err == nil {
			c.Write(make([]byte, size))
			c.Close()
		}
	}})
	for _, f := range families {
		c, err := n.dial("tcp", net.JoinHostPort(f.dst, "80"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(testTimeout))
		if m, err := io.Copy(io.Discard, c); m != size || err != nil {
			t.Errorf("%s: %d bytes, %v", f.name, m, err)
		}
	}
}
