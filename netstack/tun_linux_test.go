package netstack_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"

	"sallyway/netstack"
	"sallyway/tun"
)

var _ netstack.Device = (*tun.Device)(nil)

const testTimeout = 20 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// namespace is a network namespace of its own with loopback up.
type namespace struct {
	t  testing.TB
	ns netns.NsHandle
}

func newNamespace(t testing.TB) *namespace {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for a network namespace and a TUN device")
	}
	n := &namespace{t: t}
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
		var err error
		if n.ns, err = netns.New(); err == nil {
			var lo netlink.Link
			if lo, err = netlink.LinkByName("lo"); err == nil {
				err = netlink.LinkSetUp(lo)
			}
		}
		made <- err
	}()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.ns.Close() })
	return n
}

// do runs f on a thread inside the namespace.
func (n *namespace) do(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if err := netns.Set(n.ns); err != nil {
			n.t.Error(err)
			return
		}
		f()
	}()
	<-done
}

func (n *namespace) dial(network, addr string) (c net.Conn, err error) {
	n.do(func() { c, err = (&net.Dialer{Timeout: testTimeout}).Dial(network, addr) })
	return c, err
}

// lab is a host with a TUN whose packets go to a stack.
type lab struct {
	*namespace
	t     testing.TB
	dev   *tun.Device
	stack *netstack.Stack
}

const (
	hostAddr4, hostAddr6 = "10.77.0.1", "fd77::1"
	ownAddr4, ownAddr6   = "10.98.0.1", "fd98::1"
)

// newLab makes a lab; 10.96.0.0/12 and fd96::/12 go into the TUN.
func newLab(t testing.TB, mtu int, c netstack.Config) *lab {
	t.Helper()
	return newLabOn(t, mtu, c, nil)
}

// newLabOn is newLab with a device that wrap, where it is not nil, has changed for the stack.
func newLabOn(t testing.TB, mtu int, c netstack.Config, wrap func(netstack.Device) netstack.Device) *lab {
	t.Helper()
	l := &lab{namespace: newNamespace(t), t: t}
	l.do(func() {
		var err error
		if l.dev, err = tun.Open(tun.Config{Name: fmt.Sprintf("t%d", rand.Uint32()), MTU: mtu}); err != nil {
			t.Error(err)
			return
		}
		if err := l.dev.SetAddresses([]netip.Prefix{netip.MustParsePrefix(hostAddr4 + "/32"), netip.MustParsePrefix(hostAddr6 + "/128")}); err != nil {
			t.Error(err)
		}
		skipped, err := l.dev.SetRoutes([]netip.Prefix{netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("fd90::/12")}, nil)
		if err != nil || len(skipped) > 0 {
			t.Error(err, skipped)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	c.Device = l.dev
	if wrap != nil {
		c.Device = wrap(l.dev)
	}
	var err error
	if l.stack, err = netstack.New(c); err != nil {
		t.Fatal(err)
	}
	l.stack.SetAddresses([]netip.Addr{netip.MustParseAddr(ownAddr4), netip.MustParseAddr(ownAddr6)})
	ran := make(chan error, 1)
	go func() { ran <- l.stack.Run(context.Background()) }()
	t.Cleanup(func() {
		l.stack.Close()
		if err := <-ran; err != nil {
			t.Error("run:", err)
		}
		l.dev.Close()
	})
	return l
}

// eventually waits for ok.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(testTimeout); !ok(); {
		if time.Now().After(end) {
			t.Fatal("never: " + what)
		}
		time.Sleep(time.Millisecond)
	}
}

// serveTCP listens on loopback and serves each connection with f.
func serveTCP(t *testing.T, f func(*net.TCPConn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				f(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	return ln.Addr().String()
}

// splice joins an accepted connection with one to a server, as a gateway on the spot would.
func splice(down *netstack.TCPConn, up *net.TCPConn) {
	var wg sync.WaitGroup
	oneWay := func(dst, src interface {
		io.ReadWriter
		CloseWrite() error
	}, fail func(),
	) {
		_, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, 256<<10))
		if err == nil {
			err = dst.CloseWrite()
		}
		if err != nil {
			fail()
		}
	}
	fail := func() {
		down.Reset()
		up.SetLinger(0)
		up.Close()
	}
	wg.Go(func() { oneWay(up, down, fail) })
	wg.Go(func() { oneWay(down, up, fail) })
	wg.Wait()
	down.Close()
	up.Close()
}

func spliceTo(addr string) func(context.Context, *netstack.TCPRequest) {
	return func(ctx context.Context, r *netstack.TCPRequest) {
		up, err := net.Dial("tcp", addr)
		if err != nil {
			r.Reject(netstack.Refused)
			return
		}
		down, err := r.Accept()
		if err != nil {
			up.Close()
			return
		}
		splice(down, up.(*net.TCPConn))
	}
}

var families = []struct{ name, net, dst string }{{"IPv4", "10.99.0.", "10.99.0.1"}, {"IPv6", "fd99::", "fd99::1"}}

func TestTCPSplice(t *testing.T) {
	addr := serveTCP(t, func(c *net.TCPConn) {
		io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
	})
	for _, mtu := range []int{1280, 1500, 9000} {
		l := newLab(t, mtu, netstack.Config{HandleTCP: spliceTo(addr)})
		for _, f := range families {
			t.Run(fmt.Sprint(f.name, " ", mtu), func(t *testing.T) {
				c, err := l.dial("tcp", net.JoinHostPort(f.dst, "80"))
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				c.SetDeadline(time.Now().Add(testTimeout))
				data := make([]byte, 8<<20+17)
				rand.NewChaCha8([32]byte{1}).Read(data)
				go func() {
					c.Write(data)
					c.(*net.TCPConn).CloseWrite()
				}()
				h := sha256.New()
				n, err := io.Copy(h, c)
				if err != nil || n != int64(len(data)) || [32]byte(h.Sum(nil)) != sha256.Sum256(data) {
					t.Fatalf("%d of %d bytes came back, or others: %v", n, len(data), err)
				}
			})
		}
	}
}

func TestTCPManyFlows(t *testing.T) {
	addr := serveTCP(t, func(c *net.TCPConn) {
		io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
	})
	l := newLab(t, 1500, netstack.Config{HandleTCP: spliceTo(addr)})
	data := make([]byte, 256<<10)
	rand.NewChaCha8([32]byte{4}).Read(data)
	var wg sync.WaitGroup
	for i := range 60 {
		wg.Go(func() {
			f := families[i%len(families)]
			c, err := l.dial("tcp", net.JoinHostPort(fmt.Sprint(f.net, 1+i/10), fmt.Sprint(1000+i)))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(testTimeout))
			go func() {
				c.Write(data)
				c.(*net.TCPConn).CloseWrite()
			}()
			if b, err := io.ReadAll(c); err != nil || !bytes.Equal(b, data) {
				t.Errorf("flow %d: %d bytes, or others: %v", i, len(b), err)
			}
		})
	}
	wg.Wait()
	eventually(t, "every flow has ended", func() bool { return l.stack.Stats().TCPFlows == 0 })
	if s := l.stack.Stats(); s.TCPAccepted != 60 || s.WriteErrors > 0 || s.BadChecksum > 0 || s.Malformed > 0 {
		t.Errorf("%+v", s)
	}
}

func TestTCPReject(t *testing.T) {
	reasons := map[byte]netstack.Reason{1: netstack.Refused, 2: netstack.Unreachable, 3: netstack.NetUnreachable, 4: netstack.AdminProhibited}
	l := newLab(t, 1500, netstack.Config{HandleTCP: func(_ context.Context, r *netstack.TCPRequest) {
		b := r.Dst.Addr().AsSlice()
		r.Reject(reasons[b[len(b)-1]])
	}})
	for _, f := range families {
		for i, want := range []error{
			syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ENETUNREACH,
			map[string]error{"IPv4": syscall.EHOSTUNREACH, "IPv6": syscall.EACCES}[f.name],
		} {
			t.Run(fmt.Sprint(f.name, " ", reasons[byte(i+1)]), func(t *testing.T) {
				start := time.Now()
				c, err := l.dial("tcp", net.JoinHostPort(fmt.Sprint(f.net, i+1), "80"))
				if err == nil {
					c.Close()
				}
				if !errors.Is(err, want) {
					t.Errorf("dial: %v, want %v", err, want)
				}
				if d := time.Since(start); d > time.Second/2 {
					t.Errorf("took %v: the app should know at once", d)
				}
			})
		}
	}
	eventually(t, "no flow is left", func() bool { s := l.stack.Stats(); return s.TCPFlows == 0 && s.TCPDials == 0 })
}

func TestTCPNoDecisionIsRefused(t *testing.T) {
	l := newLab(t, 1500, netstack.Config{HandleTCP: func(context.Context, *netstack.TCPRequest) {}})
	if _, err := l.dial("tcp", "10.99.0.1:80"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Error(err)
	}
}

func TestTCPSilent(t *testing.T) {
	var dials atomic.Int32
	l := newLab(t, 1500, netstack.Config{HandleTCP: func(_ context.Context, r *netstack.TCPRequest) {
		dials.Add(1)
		r.Reject(netstack.Silent)
	}})
	var err error
	l.do(func() { _, err = (&net.Dialer{Timeout: 2500 * time.Millisecond}).Dial("tcp", "10.99.0.1:80") }) // SYN again after 1 s
	if ne, ok := errors.AsType[net.Error](err); !ok || !ne.Timeout() {
		t.Errorf("dial: %v, want a timeout", err)
	}
	if n := dials.Load(); n != 1 {
		t.Errorf("%d dials, want 1", n)
	}
}

func TestTCPSlowDialHappensOnce(t *testing.T) {
	var dials atomic.Int32
	l := newLab(t, 1500, netstack.Config{HandleTCP: func(_ context.Context, r *netstack.TCPRequest) {
		dials.Add(1)
		time.Sleep(1500 * time.Millisecond) // the dial; the app repeats its SYN after 1 s
		if c, err := r.Accept(); err == nil {
			c.Close()
		}
	}})
	c, err := l.dial("tcp", "10.99.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if n, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Error(n, err)
	}
	if n := dials.Load(); n != 1 {
		t.Errorf("%d dials, want 1", n)
	}
}

func TestTCPDialLimits(t *testing.T) {
	release := make(chan struct{})
	dead := netip.MustParseAddr("10.99.0.1")
	l := newLab(t, 1500, netstack.Config{DialsPerDestination: 3, HandleTCP: func(_ context.Context, r *netstack.TCPRequest) {
		if r.Dst.Addr() == dead {
			<-release
			r.Reject(netstack.Refused)
			return
		}
		if c, err := r.Accept(); err == nil {
			c.Close()
		}
	}})
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			if c, err := l.dial("tcp", fmt.Sprint("10.99.0.1:", 80+i)); err == nil {
				t.Error("connected to the dead host")
				c.Close()
			}
		})
	}
	eventually(t, "three dials and three dropped SYNs", func() bool {
		s := l.stack.Stats()
		return s.TCPDials == 3 && s.TCPOverLimit >= 3
	})
	c, err := l.dial("tcp", "10.99.0.2:80")
	if err != nil {
		t.Error("another host is blocked:", err)
	} else {
		c.Close()
	}
	close(release)
	wg.Wait() // the dropped SYNs come again
}

func TestTCPHalfCloseAndReset(t *testing.T) {
	got := make(chan []byte, 1)
	readErr := make(chan error, 1)
	done := make(chan struct{})
	l := newLab(t, 1500, netstack.Config{HandleTCP: func(_ context.Context, r *netstack.TCPRequest) {
		c, err := r.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		switch r.Dst.Port() {
		case 1: // the app half-closes, then gets an answer
			b, err := io.ReadAll(c)
			if err != nil {
				t.Error(err)
			}
			c.Write(append([]byte("got "), b...))
		case 2: // this side half-closes, then gets the rest
			c.Write([]byte("hello"))
			c.CloseWrite()
			b, err := io.ReadAll(c)
			if err != nil {
				t.Error(err)
			}
			got <- b
		case 3: // this side resets
			c.Read(make([]byte, 1))
			c.Reset()
		case 4, 5: // the app resets
			c.Write([]byte("up"))
			if r.Dst.Port() == 5 {
				c.CloseWrite() // even when this side is half-closed
			}
			_, err := io.Copy(io.Discard, struct{ io.Reader }{c})
			readErr <- err
			if _, err := c.Write([]byte("x")); err == nil {
				t.Error("write after reset")
			}
		case 6: // after CloseRead the app's data goes nowhere, and its connection lives
			c.CloseRead()
			if n, err := c.Read(make([]byte, 10)); err != io.EOF {
				t.Error(n, err)
			}
			c.Write([]byte("still here"))
			<-done
		}
	}})
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			dial := func(port string) *net.TCPConn {
				t.Helper()
				c, err := l.dial("tcp", net.JoinHostPort(f.dst, port))
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { c.Close() })
				c.SetDeadline(time.Now().Add(testTimeout))
				return c.(*net.TCPConn)
			}
			c := dial("1")
			c.Write([]byte("all"))
			c.CloseWrite()
			if b, err := io.ReadAll(c); string(b) != "got all" || err != nil {
				t.Errorf("after the app's half-close: %q, %v", b, err)
			}

			c = dial("2")
			if b, err := io.ReadAll(c); string(b) != "hello" || err != nil {
				t.Errorf("at our half-close: %q, %v", b, err)
			}
			c.Write([]byte("world"))
			c.CloseWrite()
			if b := <-got; string(b) != "world" {
				t.Errorf("after our half-close: %q", b)
			}

			c = dial("3")
			c.Write([]byte("x"))
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("our reset: %v, want ECONNRESET", err)
			}

			for _, port := range []string{"4", "5"} {
				c = dial(port)
				io.ReadFull(c, make([]byte, 2)) // else the reset may hit the handshake
				c.Write([]byte("x"))
				c.SetLinger(0)
				c.Close()
				if err := <-readErr; !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the app's reset (%s): %v, want ECONNRESET", port, err)
				}
			}

			c = dial("6")
			b := make([]byte, 10)
			if _, err := io.ReadFull(c, b); string(b) != "still here" || err != nil {
				t.Errorf("after our CloseRead: %q, %v", b, err)
			}
			c.Close()
		})
	}
	close(done)
}

func TestTCPDeadlineAndClose(t *testing.T) {
	results := make(chan error, 3)
	l := newLab(t, 1500, netstack.Config{HandleTCP: func(_ context.Context, r *netstack.TCPRequest) {
		c, err := r.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		_, err = c.Read(make([]byte, 1))
		results <- err
		c.SetReadDeadline(time.Time{})
		if _, err = io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Error("after the deadline was taken back:", err)
		}
		time.AfterFunc(20*time.Millisecond, func() { c.Close() })
		_, err = c.Read(make([]byte, 1))
		results <- err
		_, err = c.Write(make([]byte, 1))
		results <- err
	}})
	c, err := l.dial("tcp", "10.99.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := <-results; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	c.Write([]byte("x"))
	for range 2 {
		if err := <-results; !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	}
}

func TestUDP(t *testing.T) {
	l := newLab(t, 1500, netstack.Config{HandleUDP: func(_ context.Context, f *netstack.UDPFlow) {
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
		c, err := l.dial("udp", net.JoinHostPort(f.dst, "53"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(testTimeout))
		for _, n := range []int{0, 1, 100, 1452, 1472, 1473, 4000, 9001, 30000, 65507} {
			data := make([]byte, n)
			rand.NewChaCha8([32]byte{2}).Read(data)
			if _, err := c.Write(data); err != nil {
				t.Fatal(f.name, n, err)
			}
			b := make([]byte, 65535)
			m, err := c.Read(b)
			if err != nil || !bytes.Equal(b[:m], data) {
				t.Errorf("%s: %d bytes: %d came back, or others: %v", f.name, n, m, err)
			}
		}
	}
	if s := l.stack.Stats(); s.UDPFlows != 2 || s.UDPFlowsTotal != 2 {
		t.Errorf("%+v", s)
	}
}

func TestUDPReject(t *testing.T) {
	l := newLab(t, 1500, netstack.Config{HandleUDP: func(_ context.Context, f *netstack.UDPFlow) {
		switch f.Dst.Port() {
		case 1:
			f.Reject(netstack.Refused)
		case 2:
			f.Reject(netstack.AdminProhibited)
		case 3:
			f.Reject(netstack.Unreachable)
		}
	}})
	for _, f := range families {
		for port, want := range map[string]error{
			"1": syscall.ECONNREFUSED,
			"2": map[string]error{"IPv4": syscall.EHOSTUNREACH, "IPv6": syscall.EACCES}[f.name],
			"3": syscall.EHOSTUNREACH,
		} {
			c, err := l.dial("udp", net.JoinHostPort(f.dst, port))
			if err != nil {
				t.Fatal(err)
			}
			// Linux tells an unconnected-like socket only about hard errors, unless it asks (ip(7), IP_RECVERR).
			raw, _ := c.(*net.UDPConn).SyscallConn()
			raw.Control(func(fd uintptr) {
				syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, syscall.IP_RECVERR, 1)
				syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IPV6, syscall.IPV6_RECVERR, 1)
			})
			c.SetDeadline(time.Now().Add(testTimeout))
			c.Write([]byte("x"))
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, want) {
				t.Errorf("%s port %s: %v, want %v", f.name, port, err, want)
			}
			c.Close()
		}
	}
}

func TestUDPIdle(t *testing.T) {
	ended := make(chan error, 1)
	l := newLab(t, 1500, netstack.Config{UDPIdle: 50 * time.Millisecond, HandleUDP: func(_ context.Context, f *netstack.UDPFlow) {
		b := make([]byte, 10)
		for {
			if _, err := f.ReadPacket(b); err != nil {
				ended <- err
				return
			}
		}
	}})
	c, err := l.dial("udp", "10.99.0.1:9")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write([]byte("x"))
	select {
	case err := <-ended:
		if !errors.Is(err, netstack.ErrIdle) {
			t.Error(err)
		}
	case <-time.After(testTimeout):
		t.Error("the idle flow goes on")
	}
	eventually(t, "the flow is gone", func() bool { return l.stack.Stats().UDPFlows == 0 })
}

// ping sends an echo request from an unprivileged ICMP socket and returns the data that comes back.
func (l *lab) ping(dst string, data string) (string, error) {
	a := netip.MustParseAddr(dst)
	var b []byte
	var err error
	l.do(func() {
		domain, proto, typ := syscall.AF_INET, syscall.IPPROTO_ICMP, byte(8)
		var to syscall.Sockaddr = &syscall.SockaddrInet4{Addr: [4]byte(a.AsSlice()[:4])}
		if a.Is6() {
			domain, proto, typ = syscall.AF_INET6, syscall.IPPROTO_ICMPV6, 128
			to = &syscall.SockaddrInet6{Addr: a.As16()}
		}
		os.WriteFile("/proc/thread-self/net/../sys/net/ipv4/ping_group_range", []byte("0 0"), 0)
		var fd int
		if fd, err = syscall.Socket(domain, syscall.SOCK_DGRAM, proto); err != nil {
			if fd, err = syscall.Socket(domain, syscall.SOCK_RAW, proto); err != nil {
				return
			}
		}
		defer syscall.Close(fd)
		syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &syscall.Timeval{Sec: 2})
		msg := append([]byte{typ, 0, 0, 0, 0x12, 0x34, 0, 7}, data...)
		if typ == 8 { // of a raw socket the sum is ours
			var sum uint32
			for i := 0; i < len(msg)&^1; i += 2 {
				sum += uint32(msg[i])<<8 | uint32(msg[i+1])
			}
			if len(msg)%2 == 1 {
				sum += uint32(msg[len(msg)-1]) << 8
			}
			for sum>>16 != 0 {
				sum = sum>>16 + sum&0xffff
			}
			msg[2], msg[3] = byte(^sum>>8), byte(^sum)
		}
		if err = syscall.Sendto(fd, msg, 0, to); err != nil {
			return
		}
		buf := make([]byte, 2000)
		for {
			var n int
			if n, _, err = syscall.Recvfrom(fd, buf, 0); err != nil {
				return
			}
			b = buf[:n]
			if len(b) > 20 && b[0] == 0x45 {
				b = b[20:] // a raw IPv4 socket shows the IP header
			}
			if len(b) >= 8 && (b[0] == 0 || b[0] == 129) && b[7] == 7 {
				b = b[8:]
				return
			}
		}
	})
	return string(b), err
}

func TestEcho(t *testing.T) {
	var l *lab
	var seen atomic.Int32
	var ready sync.WaitGroup
	ready.Add(1)
	l = newLab(t, 1500, netstack.Config{HandlePacket: func(pkt []byte) {
		ready.Wait()
		e, err := netstack.ParseEcho(pkt)
		if err != nil {
			t.Errorf("%x: %v", pkt, err)
			return
		}
		if b := e.Dst.AsSlice(); b[len(b)-1] != 1 {
			return // nobody there
		}
		seen.Add(1)
		a := e.Answer()
		a.Data = append([]byte("re: "), a.Data...)
		if err := l.stack.Inject(a.AppendPacket(nil)); err != nil {
			t.Error(err)
		}
	}})
	ready.Done()
	for _, f := range families {
		if b, err := l.ping(f.dst, "hello"); b != "re: hello" || err != nil {
			t.Errorf("%s, answered by the handler: %q, %v", f.name, b, err)
		}
	}
	if seen.Load() != 2 {
		t.Errorf("the handler saw %d", seen.Load())
	}
	for _, own := range []string{ownAddr4, ownAddr6} {
		if b, err := l.ping(own, "hello"); b != "hello" || err != nil {
			t.Errorf("%s, our own: %q, %v", own, b, err)
		}
	}
	if seen.Load() != 2 {
		t.Errorf("echo to our own addresses reached the handler")
	}
	if b, err := l.ping("10.99.0.9", "hello"); err == nil {
		t.Errorf("an echo that nobody answered was answered: %q", b)
	}
}

func TestRunEndsEverything(t *testing.T) {
	in := make(chan struct{}, 2)
	l := newLab(t, 1500, netstack.Config{
		HandleTCP: func(_ context.Context, r *netstack.TCPRequest) {
			c, err := r.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			in <- struct{}{}
			c.Read(make([]byte, 1))
			c.Close()
		},
		HandleUDP: func(_ context.Context, f *netstack.UDPFlow) {
			in <- struct{}{}
			b := make([]byte, 1)
			f.ReadPacket(b)
			f.ReadPacket(b)
		},
	})
	c, err := l.dial("tcp", "10.99.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	u, err := l.dial("udp", "10.99.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	u.Write([]byte("x"))
	<-in
	<-in
	l.stack.Close()
	c.SetDeadline(time.Now().Add(testTimeout))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the app sees %v, want ECONNRESET", err)
	}
	// The device is still open, and another stack may have it.
	s, err := netstack.New(netstack.Config{Device: l.dev})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- s.Run(ctx) }()
	if c, err := l.dial("tcp", "10.99.0.1:80"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Error(c, err)
	}
	cancel()
	if err := <-ran; err != nil {
		t.Error(err)
	}
}
