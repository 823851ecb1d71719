package tunnel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"sallyway/internal/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pseudo is an endless stream of bytes that both ends can make.
func pseudo(n int, seed byte) []byte {
	b := make([]byte, n)
	x := uint32(seed) + 1
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
}

func TestTCPBothWays(t *testing.T) {
	w := newWorld(t, nil)
	port := tcpServer(t, echo)
	s := w.dial(w.link("fra-1 udp"), nil)
	const size = 64 << 20
	data := pseudo(size, 1)
	c, err := s.DialTCP(timeout(t, 10*time.Second), "127.0.0.1", port)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := c.Write(data); err != nil {
			t.Errorf("write: %v", err)
		}
		if err := c.CloseWrite(); err != nil {
			t.Errorf("close write: %v", err)
		}
	})
	h := sha256.New()
	n, err := io.Copy(h, c)
	wg.Wait()
	if err != nil || n != size {
		t.Fatalf("read %d bytes, %v", n, err)
	}
	if want := sha256.Sum256(data); !bytes.Equal(h.Sum(nil), want[:]) {
		t.Fatal("checksum differs")
	}
	if got := c.Offsets(); got != (Offsets{size, size}) {
		t.Fatalf("offsets %v", got)
	}
	c.Close()
	eventually(t, "flow gone at the gateway", func() bool { return w.server.Sessions()[0].Flows == 0 })
	if in := w.server.Sessions()[0]; in.Sent != size || in.Received != size || in.TotalFlows != 1 || in.Path.Name != "fra-1 udp" || in.Peer.Node != w.client {
		t.Fatalf("session info %+v", in)
	}
}

func TestRefusals(t *testing.T) {
	w := newWorld(t, nil)
	s := w.dial(w.link("a"), nil)
	for _, tc := range []struct {
		name string
		err  error
		want error
		rule string
	}{
		{"refused", &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}, ErrRefused, ""},
		{"unreachable", syscall.EHOSTUNREACH, ErrUnreachable, ""},
		{"timeout", context.DeadlineExceeded, ErrTimeout, ""},
		{"no name", &net.DNSError{IsNotFound: true}, ErrNotFound, ""},
		{"denied", Denied("no databases", "c-one may not: \"why\" \\ ä"), ErrDenied, "no databases"},
		{"allow list", &ProxyError{Type: DestinationProhibited, Detail: "metadata address"}, ErrDenied, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w.handler.dialTCP = func(context.Context, policy.Target) (Conn, error) { return nil, tc.err }
			w.handler.dialUDP = func(context.Context, policy.Target) (net.Conn, error) { return nil, tc.err }
			w.handler.resolve = func([]byte) ([]byte, error) { return nil, tc.err }
			_, tcp := s.DialTCP(timeout(t, 5*time.Second), "db.internal", 5432)
			_, udp := s.DialUDP(timeout(t, 5*time.Second), "fd00::1", 53)
			_, dns := s.Resolve(timeout(t, 5*time.Second), make([]byte, 12))
			for _, err := range []error{tcp, udp, dns} {
				p, ok := errors.AsType[*ProxyError](err)
				if !ok || !errors.Is(err, tc.want) || p.Rule != tc.rule {
					t.Errorf("got %v, want %v by rule %q", err, tc.want, tc.rule)
				}
			}
		})
	}
	_, err := s.DialIP(timeout(t, 5*time.Second))
	if p, ok := errors.AsType[*ProxyError](err); !ok || p.Rule != policy.DefaultDeny || !errors.Is(err, ErrDenied) {
		t.Errorf("DialIP: %v", err)
	}
}

func TestDialTimeoutCancelsAtGateway(t *testing.T) {
	w := newWorld(t, nil)
	s := w.dial(w.link("a"), nil)
	canceled := make(chan struct{})
	w.handler.dialTCP = func(ctx context.Context, _ policy.Target) (Conn, error) {
		<-ctx.Done()
		close(canceled)
		return nil, ctx.Err()
	}
	_, err := s.DialTCP(timeout(t, 50*time.Millisecond), "10.0.0.1", 80)
	if !errors.Is(err, ErrTimeout) {
		t.Fatalf("got %v", err)
	}
	select {
	case <-canceled:
	case <-time.After(5 * time.Second):
		t.Fatal("the gateway goes on dialling")
	}
}

func TestHalfCloseAndReset(t *testing.T) {
	w := newWorld(t, nil)
	s := w.dial(w.link("a"), nil)
	dial := func(port uint16) *Stream {
		c, err := s.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	t.Run("client half-closes", func(t *testing.T) {
		port := tcpServer(t, func(c *net.TCPConn) {
			defer c.Close()
			b, _ := io.ReadAll(c)
			_, _ = c.Write(append(b, '!'))
		})
		c := dial(port)
		defer c.Close()
		_, _ = c.Write([]byte("hello"))
		_ = c.CloseWrite()
		if b, err := io.ReadAll(c); string(b) != "hello!" || err != nil {
			t.Fatalf("%q, %v", b, err)
		}
	})
	t.Run("server half-closes", func(t *testing.T) {
		got := make(chan string, 1)
		port := tcpServer(t, func(c *net.TCPConn) {
			defer c.Close()
			_ = c.CloseWrite()
			b, _ := io.ReadAll(c)
			got <- string(b)
		})
		c := dial(port)
		defer c.Close()
		if b, err := io.ReadAll(c); len(b) != 0 || err != nil {
			t.Fatalf("%q, %v", b, err)
		}
		_, _ = c.Write([]byte("later"))
		_ = c.CloseWrite()
		if s := <-got; s != "later" {
			t.Fatalf("%q", s)
		}
	})
	t.Run("server resets", func(t *testing.T) {
		port := tcpServer(t, func(c *net.TCPConn) {
			_, _ = c.Read(make([]byte, 1))
			_ = c.SetLinger(0)
			_ = c.Close()
		})
		c := dial(port)
		defer c.Close()
		_, _ = c.Write([]byte("x"))
		if _, err := io.ReadAll(c); !errors.Is(err, ErrReset) {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("client resets", func(t *testing.T) {
		got := make(chan error, 1)
		port := tcpServer(t, func(c *net.TCPConn) {
			defer c.Close()
			_, err := io.ReadAll(c)
			got <- err
		})
		c := dial(port)
		_, _ = c.Write([]byte("x"))
		c.Reset()
		if err := <-got; !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("got %v, want a reset", err)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Fatalf("read after reset: %v", err)
		}
	})
	t.Run("client closes after writing", func(t *testing.T) {
		got := make(chan string, 1)
		port := tcpServer(t, func(c *net.TCPConn) {
			defer c.Close()
			b, _ := io.ReadAll(c)
			got <- string(b)
		})
		c := dial(port)
		_, _ = c.Write([]byte("all of it"))
		_ = c.Close()
		if s := <-got; s != "all of it" {
			t.Fatalf("%q", s)
		}
	})
	eventually(t, "all flows gone", func() bool { return w.server.Sessions()[0].Flows == 0 })
}

func TestParallelStreams(t *testing.T) {
	w := newWorld(t, nil)
	port := tcpServer(t, echo)
	s := w.dial(w.link("a"), nil)
	var wg sync.WaitGroup
	for i := range 500 {
		wg.Go(func() {
			c, err := s.DialTCP(timeout(t, 30*time.Second), "127.0.0.1", port)
			if err != nil {
				t.Errorf("dial %d: %v", i, err)
				return
			}
			defer c.Close()
			data := pseudo(20_000, byte(i))
			go func() {
				_, _ = c.Write(data)
				_ = c.CloseWrite()
			}()
			if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, data) {
				t.Errorf("stream %d: %d bytes, %v", i, len(got), err)
			}
		})
	}
	wg.Wait()
	eventually(t, "all flows gone", func() bool { return w.server.Sessions()[0].Flows == 0 })
}
