package udpio

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sallyway/internal/datagram"
)

func listen(t testing.TB, addr string, cfg Config) *Conn {
	t.Helper()
	c, _, err := Listen(context.Background(), netip.MustParseAddrPort(addr), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.UDPConn().SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return c
}

// pattern returns n bytes that differ from datagram to datagram.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i / 7)
	}
	return b
}

// readAll reads until want bytes have come and returns them with the number of reads and the datagrams' sizes.
func readAll(t testing.TB, c *Conn, want int) (got []byte, reads int, sizes []int, last Message) {
	t.Helper()
	buf := make([]byte, MaxRead)
	for len(got) < want {
		m, err := c.Read(buf)
		if err != nil {
			t.Fatalf("after %d of %d bytes: %v", len(got), want, err)
		}
		reads++
		got = append(got, buf[:m.N]...)
		for n := m.N; n > 0; n -= m.Segment {
			sizes = append(sizes, min(n, m.Segment))
		}
		last = m
	}
	return got, reads, sizes, last
}

func TestRunKeepsBoundariesAndECN(t *testing.T) {
	for _, tc := range []struct {
		name, to string
		cfg      Config
		coalesce bool
	}{
		{"ipv4", "127.0.0.1:0", Config{}, true},
		{"ipv6", "[::1]:0", Config{}, true},
		{"ipv4 without offload", "127.0.0.1:0", Config{NoOffload: true}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			from, to := listen(t, tc.to, tc.cfg), listen(t, tc.to, tc.cfg)
			data := pattern(20*1200 + 77)
			if err := from.Write(data, 1200, datagram.ECT0, Peer{Addr: to.LocalAddr()}); err != nil {
				t.Fatal(err)
			}
			got, reads, sizes, last := readAll(t, to, len(data))
			if !bytes.Equal(got, data) {
				t.Error("bytes differ")
			}
			if len(sizes) != 21 || sizes[0] != 1200 || sizes[20] != 77 {
				t.Errorf("datagram sizes %v", sizes)
			}
			if last.ECN != datagram.ECT0 {
				t.Errorf("ECN %v, want ECT(0)", last.ECN)
			}
			if last.From != from.LocalAddr() {
				t.Errorf("from %v, want %v", last.From, from.LocalAddr())
			}
			if tc.coalesce && to.GRO() && from.GSO() && reads != 1 {
				t.Errorf("%d reads for one run, want 1", reads)
			}
			if !tc.coalesce && reads != 21 {
				t.Errorf("%d reads without offload, want 21", reads)
			}
		})
	}
}

func TestEnvironmentTurnsOffloadOff(t *testing.T) {
	t.Setenv(datagram.NoOffload, "1")
	c := listen(t, "127.0.0.1:0", Config{})
	if c.GRO() || c.GSO() {
		t.Errorf("GRO %v, GSO %v, want both off", c.GRO(), c.GSO())
	}
	t.Setenv(datagram.NoOffload, "0")
	if c := listen(t, "127.0.0.1:0", Config{}); !c.GRO() || !c.GSO() {
		t.Errorf("GRO %v, GSO %v, want both on", c.GRO(), c.GSO())
	}
}

func TestWriteSplitsLongRuns(t *testing.T) {
	from, to := listen(t, "127.0.0.1:0", Config{}), listen(t, "127.0.0.1:0", Config{})
	for _, seg := range []int{100, 1456, 33000} {
		data := pattern(seg*150 + 1)
		if seg == 33000 {
			data = data[:seg*3+1]
		}
		if err := from.Write(data, seg, 0, Peer{Addr: to.LocalAddr()}); err != nil {
			t.Fatal(err)
		}
		got, _, sizes, _ := readAll(t, to, len(data))
		if !bytes.Equal(got, data) || sizes[0] != seg {
			t.Errorf("segment %d: got %d bytes, first datagram %d", seg, len(got), sizes[0])
		}
	}
}

func TestDualStackAnswersFromTheAddressAsked(t *testing.T) {
	server := listen(t, "[::]:0", Config{PacketInfo: true})
	port := server.LocalAddr().Port()
	for _, addr := range []string{"127.0.0.2", "::1"} {
		target := netip.AddrPortFrom(netip.MustParseAddr(addr), port)
		c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(target))
		if err != nil {
			t.Fatal(err)
		}
		client, _, err := New(c, Config{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
		client.UDPConn().SetDeadline(time.Now().Add(10 * time.Second))
		if err := client.Write([]byte("ping"), 0, datagram.ECT1, Peer{}); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, MaxRead)
		m, err := server.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if m.Local != target.Addr() || m.ECN != datagram.ECT1 {
			t.Errorf("local %v ECN %v, want %v ECT(1)", m.Local, m.ECN, target.Addr())
		}
		// The client is connected, so an answer from any other address would not arrive.
		if err := server.Write([]byte("pong"), 0, datagram.CE, Peer{Addr: m.From, Local: m.Local}); err != nil {
			t.Fatal(err)
		}
		m, err = client.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if string(buf[:m.N]) != "pong" || m.ECN != datagram.CE || m.From != target {
			t.Errorf("got %q ECN %v from %v", buf[:m.N], m.ECN, m.From)
		}
	}
}

func TestDontFragment(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0", "[::]:0"} {
		c := listen(t, addr, Config{})
		rc, err := c.UDPConn().SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		rc.Control(func(fd uintptr) {
			if c.v6 {
				if v, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER); v != unix.IPV6_PMTUDISC_PROBE {
					t.Errorf("%s: IPV6_MTU_DISCOVER %d, %v", addr, v, err)
				}
			}
			if v, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER); addr != "[::1]:0" && v != unix.IP_PMTUDISC_PROBE {
				t.Errorf("%s: IP_MTU_DISCOVER %d, %v", addr, v, err)
			}
		})
	}
}

func TestTooLarge(t *testing.T) {
	c := listen(t, "127.0.0.1:0", Config{})
	err := c.Write(make([]byte, MaxRead), 0, 0, Peer{Addr: c.LocalAddr()})
	if !TooLarge(err) {
		t.Errorf("a write of 64 KiB: %v, want too large", err)
	}
}

func TestBufferWarningNamesTheSysctl(t *testing.T) {
	// No system grants a buffer of 2 GiB: the kernel clamps it to less than asked.
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	u, warnings, err := New(c, Config{ReadBuffer: 1<<31 - 1})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	if len(warnings) == 0 || !strings.Contains(warnings[0], "sysctl -w net.core.rmem_max=2147483647") {
		t.Errorf("warnings %q", warnings)
	}
}

func TestReusePort(t *testing.T) {
	a := listen(t, "127.0.0.1:0", Config{ReusePort: true})
	listen(t, a.LocalAddr().String(), Config{ReusePort: true})
	if _, _, err := Listen(context.Background(), a.LocalAddr(), Config{}); err == nil {
		t.Error("a socket without ReusePort shares the port")
	}
}

func TestDropsAreCounted(t *testing.T) {
	to := listen(t, "127.0.0.1:0", Config{ReadBuffer: 4 << 10})
	from := listen(t, "127.0.0.1:0", Config{})
	rc, err := to.UDPConn().SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	rc.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 2304) })
	for range 200 {
		if err := from.Write(make([]byte, 1200), 0, 0, Peer{Addr: to.LocalAddr()}); err != nil {
			t.Fatal(err)
		}
	}
	if to.Drops() == 0 {
		t.Error("no drops counted with a full receive buffer")
	}
}

func TestClosedReadIsErrClosed(t *testing.T) {
	c := listen(t, "127.0.0.1:0", Config{})
	errs := make(chan error, 1)
	go func() {
		_, err := c.Read(make([]byte, MaxRead))
		errs <- err
	}()
	c.Close()
	if err := <-errs; !errors.Is(err, net.ErrClosed) {
		t.Errorf("read of a closed socket: %v", err)
	}
}

func TestNoAllocation(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::]:0"} {
		from, to := listen(t, addr, Config{PacketInfo: true}), listen(t, "127.0.0.1:0", Config{PacketInfo: true})
		data, buf := make([]byte, 4*1200), make([]byte, MaxRead)
		peer := Peer{Addr: to.LocalAddr(), Local: netip.MustParseAddr("127.0.0.1")}
		n := testing.AllocsPerRun(100, func() {
			if err := from.Write(data, 1200, datagram.ECT0, peer); err != nil {
				t.Fatal(err)
			}
			for got := 0; got < len(data); {
				m, err := to.Read(buf)
				if err != nil {
					t.Fatal(err)
				}
				got += m.N
			}
		})
		if n != 0 {
			t.Errorf("%s: %v allocations per write and read, want 0", addr, n)
		}
	}
}

func FuzzParseControl(f *testing.F) {
	c := &Conn{v6: true}
	var space [controlSpace]byte
	f.Add(c.control(space[:0], 1200, datagram.CE, Peer{Addr: netip.MustParseAddrPort("[::1]:1"), Local: netip.MustParseAddr("::1")}))
	f.Add([]byte{255, 255, 255, 255, 255, 255, 255, 255, 17, 0, 0, 0, 104, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == 0 {
			return
		}
		var m Message
		c.parse(b, &m)
	})
}
