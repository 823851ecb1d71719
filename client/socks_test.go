package client

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/proxy"

	"sallyway/tunnel"
)

func newSOCKS(t testing.TB, h *harness, user, password string) string {
	s := &SOCKS{Dialer: h, Logger: h.log, User: user, Password: password}
	return serve(t, s.Serve)
}

// dialSOCKS connects to a proxy with a deadline.
func dialSOCKS(t testing.TB, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	return c.(*net.TCPConn)
}

// socksRequest is a request of RFC 1928 §4 for a domain name.
func socksRequest(command byte, host string, port uint16) []byte {
	b := append([]byte{5, command, 0, 3, byte(len(host))}, host...)
	return binary.BigEndian.AppendUint16(b, port)
}

// expect reads exactly want.
func expect(t testing.TB, r io.Reader, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("got %x, %v, want %x", got, err, want)
	}
}

// expectEnd wants the connection to end without a byte.
func expectEnd(t testing.TB, c net.Conn) {
	t.Helper()
	if b, err := io.ReadAll(c); len(b) > 0 || errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
		t.Errorf("%d bytes and %v, want the end", len(b), err)
	}
}

func isTimeout(err error) bool {
	ne, ok := errors.AsType[net.Error](err)
	return ok && ne.Timeout()
}

// A foreign client: golang.org/x/net/proxy.
func TestSOCKSForeignClient(t *testing.T) {
	h := newHarness(t)
	v4, v6 := tcpServer(t, "127.0.0.1", echoTCP), tcpServer(t, "::1", echoTCP)
	for _, auth := range []*proxy.Auth{nil, {User: "alice", Password: "s3cret"}} {
		var user, password string
		if auth != nil {
			user, password = auth.User, auth.Password
		}
		d, err := proxy.SOCKS5("tcp", newSOCKS(t, h, user, password), auth, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, to := range []string{fmt.Sprintf("echo.corp.example:%d", v4), fmt.Sprintf("127.0.0.1:%d", v4), fmt.Sprintf("[::1]:%d", v6)} {
			c, err := d.Dial("tcp", to)
			if err != nil {
				t.Errorf("%s: %v", to, err)
				continue
			}
			_ = c.SetDeadline(time.Now().Add(20 * time.Second))
			data := make([]byte, 3<<20)
			rnd := rand.NewChaCha8([32]byte{1})
			_, _ = rnd.Read(data)
			sent := make(chan error, 1)
			go func() {
				_, err := c.Write(data)
				sent <- err
			}()
			got := sha256.New()
			if _, err := io.CopyN(got, c, int64(len(data))); err != nil {
				t.Errorf("%s: %v", to, err)
			}
			if err := <-sent; err != nil {
				t.Errorf("%s: %v", to, err)
			}
			if want := sha256.Sum256(data); !bytes.Equal(got.Sum(nil), want[:]) {
				t.Errorf("%s: what comes back is not what was sent", to)
			}
			c.Close()
		}
	}
}

// curl resolves names at the proxy.
func TestSOCKSCurl(t *testing.T) {
	curl := needCurl(t)
	h := newHarness(t)
	port := tcpServer(t, "127.0.0.1", httpServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "hello %s", r.Host)
	})))
	open, locked := newSOCKS(t, h, "", ""), newSOCKS(t, h, "alice", "s3cret")
	url := fmt.Sprintf("http://www.corp.example:%d/", port)
	want := fmt.Sprintf("hello www.corp.example:%d", port)
	if out, code := curl("--socks5-hostname", open, url); out != want || code != 0 {
		t.Errorf("%q, exit %d", out, code)
	}
	if out, code := curl("--socks5-hostname", "alice:s3cret@"+locked, url); out != want || code != 0 {
		t.Errorf("with password: %q, exit %d", out, code)
	}
	if got := h.gateway.lastAsked(); got.Host != "www.corp.example" || got.Port != port {
		t.Errorf("the gateway was asked for %v: the name was resolved on the way", got)
	}
	for _, bad := range []string{locked, "alice:wrong@" + locked, "bob:s3cret@" + locked, ":@" + locked} {
		if out, code := curl("--socks5-hostname", bad, url); code == 0 {
			t.Errorf("%s: %q", bad, out)
		}
	}
	if out, code := curl("--socks5-hostname", open, "http://denied.corp.example/"); code != 97 { // CURLE_PROXY
		t.Errorf("%q, exit %d, want curl's proxy error", out, code)
	}
}

// needCurl returns a function that runs curl and gives its output and exit code.
func needCurl(t testing.TB) func(args ...string) (string, int) {
	path, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("curl is not installed")
	}
	return func(args ...string) (string, int) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, path, append([]string{"-sS", "-q", "--noproxy", ""}, args...)...)
		cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=/nonexistent"}
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
			t.Fatal(err)
		}
		if stderr.Len() > 0 {
			t.Logf("curl: %s", strings.TrimSpace(stderr.String()))
		}
		return string(out), cmd.ProcessState.ExitCode()
	}
}

// httpServer serves one connection after the other by an HTTP server of Go's.
func httpServer(t testing.TB, h http.Handler) func(*net.TCPConn) {
	return func(c *net.TCPConn) {
		l := &oneConn{c: c, closed: make(chan struct{})}
		srv := &http.Server{Handler: h, ConnState: func(_ net.Conn, s http.ConnState) {
			if s == http.StateClosed || s == http.StateHijacked {
				l.Close()
			}
		}}
		stop := context.AfterFunc(t.Context(), func() { _ = srv.Close() })
		defer stop()
		_ = srv.Serve(l)
	}
}

// oneConn is a listener with one connection.
type oneConn struct {
	c      net.Conn
	taken  bool
	closed chan struct{}
}

func (l *oneConn) Accept() (net.Conn, error) {
	if !l.taken {
		l.taken = true
		return l.c, nil
	}
	<-l.closed
	return nil, net.ErrClosed
}

func (l *oneConn) Close() error {
	select {
	case <-l.closed:
	default:
		close(l.closed)
	}
	return nil
}
func (l *oneConn) Addr() net.Addr { return l.c.LocalAddr() }

func TestSOCKSRefusals(t *testing.T) {
	h := newHarness(t)
	addr := newSOCKS(t, h, "", "")
	nobody := closedPort(t)
	for _, c := range []struct {
		name    string
		request []byte
		code    byte
	}{
		{"refused", socksRequest(1, "refused.corp.example", 80), socksRefused},
		{"really refused", socksRequest(1, "www.corp.example", nobody), socksRefused},
		{"denied by policy", socksRequest(1, "denied.corp.example", 80), socksNotAllowed},
		{"silent", socksRequest(1, "silent.corp.example", 80), socksTTLExpired},
		{"no route at the gateway", socksRequest(1, "unroutable.corp.example", 80), socksHostUnreachable},
		{"no such name", socksRequest(1, "absent.corp.example", 80), socksHostUnreachable},
		{"gateway fails", socksRequest(1, "broken.corp.example", 80), socksFailure},
		{"no resource", socksRequest(1, "www.example.com", 80), socksNetUnreachable},
		{"no resource, IPv6", []byte{5, 1, 0, 4, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 80}, socksNetUnreachable},
		{"port 0", socksRequest(1, "www.corp.example", 0), socksFailure},
		{"BIND", socksRequest(2, "www.corp.example", 80), socksBadCommand},
		{"unknown command", socksRequest(9, "www.corp.example", 80), socksBadCommand},
		{"unknown address type", []byte{5, 1, 0, 2, 1, 2, 3, 4, 0, 80}, socksBadAddress},
		{"empty name", socksRequest(1, "", 80), socksBadAddress},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn := dialSOCKS(t, addr)
			_, _ = conn.Write([]byte{5, 1, 0})
			expect(t, conn, []byte{5, 0})
			_, _ = conn.Write(c.request)
			expect(t, conn, []byte{5, c.code, 0, 1, 0, 0, 0, 0, 0, 0})
			_, _ = io.Copy(io.Discard, conn) // the proxy hangs up
		})
	}
	if got := socksCode(&tunnel.ProxyError{Type: tunnel.DestinationProhibited}); got != socksNotAllowed {
		t.Errorf("the allow list's no is %d", got)
	}
	if got := socksCode(fmt.Errorf("gateway office: no session: %w", context.DeadlineExceeded)); got != socksTTLExpired {
		t.Errorf("no time is %d", got)
	}
}

func TestSOCKSGreeting(t *testing.T) {
	h := newHarness(t)
	open, locked := newSOCKS(t, h, "", ""), newSOCKS(t, h, "alice", "s3cret")
	for _, c := range []struct {
		name string
		addr string
		send [][]byte
		want [][]byte
	}{
		{"SOCKS4", open, [][]byte{{4, 1, 0, 80, 127, 0, 0, 1, 0}}, nil},
		{"HTTP", open, [][]byte{[]byte("GET / HTTP/1.1\r\n\r\n")}, nil},
		{"only GSSAPI", open, [][]byte{{5, 1, 1}}, [][]byte{{5, 0xff}}},
		{"no method at all", open, [][]byte{{5, 0}}, [][]byte{{5, 0xff}}},
		{"none where a password is wanted", locked, [][]byte{{5, 1, 0}}, [][]byte{{5, 0xff}}},
		{"wrong password", locked, [][]byte{{5, 2, 0, 2}, append([]byte("\x01\x05alice"), "\x05wrong"...)}, [][]byte{{5, 2}, {1, 1}}},
		{"password with a tail", locked, [][]byte{{5, 1, 2}, append([]byte("\x01\x05alice"), "\x07s3cret!"...)}, [][]byte{{5, 2}, {1, 1}}},
		{"empty password", locked, [][]byte{{5, 1, 2}, []byte("\x01\x05alice\x00")}, [][]byte{{5, 2}, {1, 1}}},
		{"another version of user and password", locked, [][]byte{{5, 1, 2}, append([]byte("\x02\x05alice"), "\x06s3cret"...)}, [][]byte{{5, 2}}},
		{"version 4 in the request", open, [][]byte{{5, 1, 0}, {4, 1, 0, 1, 127, 0, 0, 1, 0, 80}}, [][]byte{{5, 0}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn := dialSOCKS(t, c.addr)
			for i, b := range c.send {
				_, _ = conn.Write(b)
				if i < len(c.want) {
					expect(t, conn, c.want[i])
				}
			}
			expectEnd(t, conn)
		})
	}
	// The whole of a good one in one segment, byte by byte, and data right behind the request.
	port := tcpServer(t, "127.0.0.1", echoTCP)
	all := append([]byte("\x05\x02\x00\x02\x01\x05alice\x06s3cret"), socksRequest(1, "echo.corp.example", port)...)
	all = append(all, "early data"...)
	for _, step := range []int{len(all), 1} {
		conn := dialSOCKS(t, locked)
		for b := all; len(b) > 0; b = b[min(step, len(b)):] {
			if _, err := conn.Write(b[:min(step, len(b))]); err != nil {
				t.Fatal(err)
			}
		}
		expect(t, conn, []byte{5, 2})
		expect(t, conn, []byte{1, 0})
		expect(t, conn, []byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0})
		expect(t, conn, []byte("early data"))
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		expectEnd(t, conn) // half-close went through and came back
	}
}

// associate asks for a UDP association and returns where to send datagrams.
func associate(t testing.TB, addr string) (control *net.TCPConn, relay *net.UDPConn) {
	t.Helper()
	control = dialSOCKS(t, addr)
	_, _ = control.Write([]byte{5, 1, 0, 5, 3, 0, 1, 0, 0, 0, 0, 0, 0})
	expect(t, control, []byte{5, 0})
	reply := make([]byte, 10)
	if _, err := io.ReadFull(control, reply); err != nil || !bytes.Equal(reply[:8], []byte{5, 0, 0, 1, 127, 0, 0, 1}) {
		t.Fatalf("reply %x, %v", reply, err)
	}
	relay, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(binary.BigEndian.Uint16(reply[8:]))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { relay.Close() })
	_ = relay.SetDeadline(time.Now().Add(10 * time.Second))
	return control, relay
}

func TestSOCKSAssociate(t *testing.T) {
	h := newHarness(t)
	v4, v6 := udpEcho(t, "127.0.0.1"), udpEcho(t, "::1")
	control, relay := associate(t, newSOCKS(t, h, "", ""))
	buf := make([]byte, 65536)
	port := func(p uint16) []byte { return binary.BigEndian.AppendUint16(nil, p) }
	name := append([]byte("\x00\x00\x00\x03\x11echo.corp.example"), port(v4)...)
	for _, c := range []struct {
		header, payload []byte
	}{
		{append([]byte{0, 0, 0, 1, 127, 0, 0, 1}, port(v4)...), []byte("by address")},
		{append([]byte{0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}, port(v6)...), []byte("by IPv6 address")},
		{name, []byte("by name")},
		{name, bytes.Repeat([]byte("x"), 1472)},
		{name, nil},
	} {
		b := append(bytes.Clone(c.header), c.payload...)
		// What can not be relayed is dropped, and does not disturb: a fragment, a reserved field, a cut header, refused destinations.
		for _, bad := range [][]byte{
			{0, 0, 1, 1, 127, 0, 0, 1, 0, 9, 'x'},
			{1, 0, 0, 1, 127, 0, 0, 1, 0, 9},
			{0, 0, 0},
			{0, 0, 0, 1, 127},
			{0, 0, 0, 9, 1, 2, 3, 4},
			{},
			append([]byte("\x00\x00\x00\x03\x13denied.corp.example"), 0, 9),
			{0, 0, 0, 1, 192, 0, 2, 1, 0, 9, 'x'},
		} {
			if _, err := relay.Write(bad); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := relay.Write(b); err != nil {
			t.Fatal(err)
		}
		n, err := relay.Read(buf)
		if err != nil || !bytes.Equal(buf[:n], b) {
			t.Fatalf("got %.60x, %v, want %.60x", buf[:n], err, b)
		}
	}
	// The association ends with the connection that asked for it (RFC 1928 §7).
	control.Close()
	eventually(t, "the association to end", func() bool {
		_, err := relay.Write([]byte{0})
		return err != nil // ICMP port unreachable
	})
}

// Only the host that asked is served.
func TestSOCKSAssociateServesItsOwnerOnly(t *testing.T) {
	h := newHarness(t)
	port := udpEcho(t, "127.0.0.1")
	_, relay := associate(t, newSOCKS(t, h, "", ""))
	to := relay.RemoteAddr().(*net.UDPAddr)
	stranger, err := net.DialUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 2)}, to)
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	b := append(binary.BigEndian.AppendUint16([]byte{0, 0, 0, 1, 127, 0, 0, 1}, port), "hello"...)
	if _, err := stranger.Write(b); err != nil {
		t.Fatal(err)
	}
	if _, err := relay.Write(b); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	if n, err := relay.Read(buf); err != nil || !bytes.Equal(buf[:n], b) {
		t.Fatalf("%x, %v", buf[:n], err)
	}
	_ = stranger.SetReadDeadline(time.Now().Add(50 * time.Millisecond)) // the owner's answer came: the stranger's would be there, too
	if n, err := stranger.Read(buf); err == nil {
		t.Errorf("a stranger gets %x", buf[:n])
	}
	h.gateway.mu.Lock()
	defer h.gateway.mu.Unlock()
	if len(h.gateway.asked) != 1 {
		t.Errorf("the gateway was asked %d times", len(h.gateway.asked))
	}
}

func FuzzParseSOCKSDatagram(f *testing.F) {
	for _, s := range []string{
		"\x00\x00\x00\x01\x7f\x00\x00\x01\x00\x35payload", "\x00\x00\x00\x03\x02db\x15\x38x", "\x00\x00\x00\x04" + strings.Repeat("\x00", 15) + "\x01\x00\x50",
		"\x00\x00\x01\x01\x7f\x00\x00\x01\x00\x35", "\x00\x00\x00\x03\x00\x00\x50", "\x00\x00\x00\x03\xffab", "\x00\x00\x00", "",
		"\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\x0a\x00\x03\x07\x00\x50",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		host, port, payload, err := parseSOCKSDatagram(b)
		if err != nil {
			if host != "" || port != 0 || payload != nil {
				t.Fatal("an error and a destination")
			}
			return
		}
		if host == "" || len(payload) > len(b) {
			t.Fatalf("%q and %d bytes out of %d", host, len(payload), len(b))
		}
		// What is sent back names the same destination.
		h2, p2, rest, err := parseSOCKSDatagram(append(append([]byte{0, 0, 0}, socksAddr(host, port)...), payload...))
		if err != nil || h2 != host && !sameAddr(h2, host) || p2 != port || !bytes.Equal(rest, payload) {
			t.Fatalf("%q:%d becomes %q:%d, %v", host, port, h2, p2, err)
		}
	})
}
