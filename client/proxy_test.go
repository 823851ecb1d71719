package client

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/dunglas/httpsfv"

	"sallyway/tunnel"
)

func newProxy(t testing.TB, h *harness, user, password string) string {
	p := &HTTPProxy{Dialer: h, Logger: h.log, User: user, Password: password}
	return serve(t, p.Serve)
}

func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !cond(); time.Sleep(2 * time.Millisecond) { // a poll
		if time.Now().After(deadline) {
			t.Fatalf("timed out: %s", what)
		}
	}
}

func sameAddr(a, b string) bool {
	x, err1 := netip.ParseAddr(a)
	y, err2 := netip.ParseAddr(b)
	return err1 == nil && err2 == nil && x.Unmap() == y.Unmap()
}

// origin is an HTTP server in the private network that names its port.
func origin(t testing.TB, h http.HandlerFunc) (port string) {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	_, port, err := net.SplitHostPort(s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func TestHTTPProxyCurl(t *testing.T) {
	curl := needCurl(t)
	h := newHarness(t)
	port := origin(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %s %d", r.Method, r.Host, r.URL, len(b))
	})
	open, locked := newProxy(t, h, "", ""), newProxy(t, h, "alice", "s3cret")
	url := "http://www.corp.example:" + port + "/a?b"
	want := "GET www.corp.example:" + port + " /a?b 0"
	for _, c := range []struct {
		name string
		args []string
		out  string
		code int
	}{
		{"absolute URI", []string{"-x", open, url}, want, 0},
		{"CONNECT", []string{"-p", "-x", open, url}, want, 0},
		{"POST", []string{"-x", open, "-d", strings.Repeat("x", 100000), url}, "POST www.corp.example:" + port + " /a?b 100000", 0},
		{"two on one connection", []string{"-x", open, url, url}, want + want, 0},
		{"by address", []string{"-x", open, "http://127.0.0.1:" + port + "/"}, "GET 127.0.0.1:" + port + " / 0", 0},
		{"with password", []string{"-x", locked, "-U", "alice:s3cret", url}, want, 0},
		{"CONNECT with password", []string{"-p", "-x", locked, "-U", "alice:s3cret", url}, want, 0},
		{"without password", []string{"-o", "/dev/null", "-w", "%{http_code}", "-x", locked, url}, "407", 0},
		{"wrong password", []string{"-o", "/dev/null", "-w", "%{http_code}", "-x", locked, "-U", "alice:wrong", url}, "407", 0},
		{"CONNECT, wrong password", []string{"-o", "/dev/null", "-w", "%{http_connect}", "-p", "-x", locked, "-U", "alice:wrong", url}, "407", 56},
		{
			"denied",
			[]string{"-o", "/dev/null", "-w", "%{http_code} %header{proxy-status}", "-x", open, "http://denied.corp.example/"},
			`403 "sallyway";error=http_request_denied;details="the rule says no";rule="no-entry"`, 0,
		},
		{"CONNECT denied", []string{"-o", "/dev/null", "-w", "%{http_connect}", "-p", "-x", open, "http://denied.corp.example/"}, "403", 56},
		{"refused", []string{"-o", "/dev/null", "-w", "%{http_code}", "-x", open, "http://refused.corp.example/"}, "502", 0},
		{"silent", []string{"-o", "/dev/null", "-w", "%{http_code}", "-x", open, "http://silent.corp.example/"}, "504", 0},
		{"no resource", []string{"-o", "/dev/null", "-w", "%{http_code}", "-x", open, "http://www.example.com/"}, "403", 0},
		{"not a proxy request", []string{"-o", "/dev/null", "-w", "%{http_code}", "http://" + open + "/"}, "400", 0},
	} {
		if out, code := curl(c.args...); out != c.out || code != c.code {
			t.Errorf("%s: %q, exit %d, want %q, exit %d", c.name, out, code, c.out, c.code)
		}
	}
}

// exchangeRaw sends a request as it stands and reads the response.
func exchangeRaw(t testing.TB, addr, request string) *http.Response {
	t.Helper()
	c := dialSOCKS(t, addr)
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	method, _, _ := strings.Cut(request, " ")
	res, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%.60q: %v", request, err)
	}
	t.Cleanup(func() { res.Body.Close() })
	return res
}

func TestHTTPProxyRefusalsSayWhy(t *testing.T) {
	h := newHarness(t)
	addr := newProxy(t, h, "", "")
	for _, c := range []struct {
		target string
		status int
		error  tunnel.ErrorType
		says   string
	}{
		{"denied.corp.example:80", 403, tunnel.RequestDenied, "no-entry"},
		{"refused.corp.example:80", 502, tunnel.ConnectionRefused, "refused"},
		{"silent.corp.example:80", 504, tunnel.ConnectionTimeout, "does not answer"},
		{"unroutable.corp.example:80", 502, tunnel.DestinationUnroutable, "no route"},
		{"absent.corp.example:80", 502, tunnel.DestinationNotFound, "no such name"},
		{"broken.corp.example:80", 500, tunnel.InternalError, "gateway"},
		{"www.example.com:80", 403, tunnel.RequestDenied, "policy explain"},
	} {
		for _, request := range []string{
			"CONNECT " + c.target + " HTTP/1.1\r\nHost: " + c.target + "\r\n\r\n", "GET http://" + c.target + "/ HTTP/1.1\r\nHost: " + c.target + "\r\n\r\n",
		} {
			res := exchangeRaw(t, addr, request)
			body, _ := io.ReadAll(res.Body)
			list, err := httpsfv.UnmarshalList(res.Header["Proxy-Status"])
			if err != nil || len(list) != 1 {
				t.Errorf("%.40q: Proxy-Status %q: %v", request, res.Header["Proxy-Status"], err)
				continue
			}
			item := list[0].(httpsfv.Item)
			got, _ := item.Params.Get("error")
			if res.StatusCode != c.status || item.Value != "sallyway" || got != httpsfv.Token(c.error) || !strings.Contains(string(body), c.says) {
				t.Errorf("%.40q: %s, %q, body %q; want %d, %s and %q", request, res.Status, res.Header["Proxy-Status"], body, c.status, c.error, c.says)
			}
		}
	}
	for request, status := range map[string]int{
		"CONNECT www.corp.example HTTP/1.1\r\nHost: x\r\n\r\n":                         400,
		"CONNECT www.corp.example:0 HTTP/1.1\r\nHost: x\r\n\r\n":                       400,
		"CONNECT www.corp.example:99999 HTTP/1.1\r\nHost: x\r\n\r\n":                   400,
		"GET https://www.corp.example/ HTTP/1.1\r\nHost: www.corp.example\r\n\r\n":     400,
		"GET ftp://www.corp.example/ HTTP/1.1\r\nHost: www.corp.example\r\n\r\n":       400,
		"GET / HTTP/1.1\r\nHost: www.corp.example\r\n\r\n":                             400,
		"GET / HTTP/1.1\r\nX: " + strings.Repeat("x", 100<<10) + "\r\nHost: y\r\n\r\n": 431,
	} {
		if res := exchangeRaw(t, addr, request); res.StatusCode != status {
			t.Errorf("%.60q: %s, want %d", request, res.Status, status)
		}
	}
}

func TestHTTPProxyRemovesHopByHopFields(t *testing.T) {
	h := newHarness(t)
	got := make(chan http.Header, 1)
	port := origin(t, func(w http.ResponseWriter, r *http.Request) {
		got <- r.Header.Clone()
		w.Header()["Connection"] = []string{"X-Hop"}
		w.Header().Set("X-Hop", "1")
		w.Header().Set("Keep-Alive", "timeout=5")
		w.Header().Set("Proxy-Authenticate", "Basic")
		w.Header()["X-End"] = []string{"1", "2"}
		w.WriteHeader(http.StatusTeapot)
	})
	to := "www.corp.example:" + port
	res := exchangeRaw(t, newProxy(t, h, "alice", "s3cret"), "GET http://"+to+"/ HTTP/1.1\r\nHost: "+to+"\r\nConnection: X-One, x-two\r\nConnection: X-Three\r\n"+
		"X-One: 1\r\nX-Two: 2\r\nX-Three: 3\r\nX-End: kept\r\nKeep-Alive: 1\r\nProxy-Connection: keep-alive\r\nTE: trailers\r\nUpgrade: h2c\r\n"+
		"Proxy-Authorization: Basic YWxpY2U6czNjcmV0\r\nAuthorization: Bearer mine\r\n\r\n")
	if res.StatusCode != http.StatusTeapot || strings.Join(res.Header["X-End"], " ") != "1 2" {
		t.Errorf("%s %v", res.Status, res.Header)
	}
	for _, k := range []string{"X-Hop", "Keep-Alive", "Proxy-Authenticate"} {
		if v := res.Header.Get(k); v != "" {
			t.Errorf("response: %s: %s came through", k, v)
		}
	}
	hd := <-got
	for _, k := range []string{"Connection", "X-One", "X-Two", "X-Three", "Keep-Alive", "Proxy-Connection", "Te", "Upgrade", "Proxy-Authorization"} {
		if v := hd.Values(k); len(v) > 0 {
			t.Errorf("request: %s: %q came through", k, v)
		}
	}
	if hd.Get("X-End") != "kept" || hd.Get("Authorization") != "Bearer mine" {
		t.Errorf("end-to-end fields are missing: %v", hd)
	}
}

// What an origin sends bit by bit arrives bit by bit, and a body that is cut short does not look whole.
func TestHTTPProxyStreams(t *testing.T) {
	h := newHarness(t)
	release := make(chan struct{})
	port := origin(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "first ")
		_ = http.NewResponseController(w).Flush()
		select {
		case <-release:
		case <-r.Context().Done():
		}
		panic(http.ErrAbortHandler)
	})
	to := "www.corp.example:" + port
	res := exchangeRaw(t, newProxy(t, h, "", ""), "GET http://"+to+"/ HTTP/1.1\r\nHost: "+to+"\r\n\r\n")
	b := make([]byte, 6)
	_, err := io.ReadFull(res.Body, b)
	close(release)
	if err != nil || string(b) != "first " {
		t.Fatalf("%q, %v", b, err)
	}
	if rest, err := io.ReadAll(res.Body); err == nil {
		t.Errorf("a body that was cut after %q ends as if whole", rest)
	}
}

// CONNECT passes half-closes and what was sent right behind the request.
func TestHTTPProxyConnect(t *testing.T) {
	h := newHarness(t)
	port := tcpServer(t, "127.0.0.1", echoTCP)
	c := dialSOCKS(t, newProxy(t, h, "", ""))
	to := joinHostPort("echo.corp.example", port)
	if _, err := fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\nearly ", to, to); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(c)
	res, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err != nil || res.StatusCode != 200 {
		t.Fatalf("%v, %v", res, err)
	}
	if _, err := io.WriteString(c, "late"); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != "early late" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestForward(t *testing.T) {
	h := newHarness(t)
	port := tcpServer(t, "127.0.0.1", echoTCP)
	f := &Forward{Dialer: h, Logger: h.log, Host: "echo.corp.example", Port: port}
	c := dialSOCKS(t, serve(t, f.Serve))
	if _, err := io.WriteString(c, "through the forward"); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "through the forward" {
		t.Errorf("%q, %v", b, err)
	}
	for _, host := range []string{"denied.corp.example", "refused.corp.example", "www.example.com"} {
		f := &Forward{Dialer: h, Logger: h.log, Host: host, Port: 80}
		c, err := net.Dial("tcp", serve(t, f.Serve))
		if err != nil {
			if !errors.Is(err, syscall.ECONNRESET) { // the reset may come before the dial is over
				t.Errorf("%s: %v", host, err)
			}
			continue
		}
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		if b, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) || len(b) > 0 {
			t.Errorf("%s: %q, %v, want a reset", host, b, err)
		}
		c.Close()
	}
}

// The other end's reset reaches the user, and the user's the other end.
func TestForwardPassesResets(t *testing.T) {
	h := newHarness(t)
	saw := make(chan error, 1)
	port := tcpServer(t, "127.0.0.1", func(c *net.TCPConn) {
		b := make([]byte, 4)
		if _, err := io.ReadFull(c, b); err != nil {
			t.Error(err)
		}
		if string(b) == "kill" {
			_ = c.SetLinger(0)
			c.Close()
			return
		}
		_, _ = c.Write([]byte("."))
		_, err := c.Read(b)
		saw <- err
		c.Close()
	})
	f := &Forward{Dialer: h, Logger: h.log, Host: "x.corp.example", Port: port}
	addr := serve(t, f.Serve)
	c := dialSOCKS(t, addr)
	_, _ = io.WriteString(c, "kill")
	if b, err := io.ReadAll(c); err == nil || isTimeout(err) {
		t.Errorf("%q, %v, want a reset", b, err)
	}
	c = dialSOCKS(t, addr)
	_, _ = io.WriteString(c, "wait")
	expect(t, c, []byte("."))
	_ = c.SetLinger(0)
	c.Close()
	select {
	case err := <-saw:
		if err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%v, want a reset", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the destination never learns that its peer is gone")
	}
}

// When a proxy stops, what runs over it ends, and Serve waits for that.
func TestServeEndsItsConnections(t *testing.T) {
	h := newHarness(t)
	port := tcpServer(t, "127.0.0.1", echoTCP)
	for name, p := range map[string]struct {
		serve  func(context.Context, net.Listener) error
		prefix string
		answer []byte
	}{
		"forward": {(&Forward{Dialer: h, Logger: h.log, Host: "x.corp.example", Port: port}).Serve, "", nil},
		"SOCKS":   {(&SOCKS{Dialer: h, Logger: h.log}).Serve, "\x05\x01\x00" + string(socksRequest(1, "x.corp.example", port)), []byte{5, 0, 5, 0, 0, 1, 0, 0, 0, 0, 0, 0}},
		"HTTP": {
			(&HTTPProxy{Dialer: h, Logger: h.log}).Serve, fmt.Sprintf("CONNECT x.corp.example:%d HTTP/1.1\r\nHost: x\r\n\r\n", port),
			[]byte("HTTP/1.1 200 Connection established\r\n\r\n"),
		},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- p.serve(ctx, l) }()
			idle := dialSOCKS(t, l.Addr().String()) // has not said what it wants
			c := dialSOCKS(t, l.Addr().String())
			_, _ = io.WriteString(c, p.prefix)
			expect(t, c, p.answer)
			_, _ = io.WriteString(c, "x")
			expect(t, c, []byte("x"))
			cancel()
			select {
			case err := <-done:
				if !errors.Is(err, context.Canceled) {
					t.Errorf("Serve: %v", err)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("Serve waits for its connections to end by themselves")
			}
			for _, c := range []net.Conn{c, idle} {
				if _, err := c.Read(make([]byte, 1)); err == nil || isTimeout(err) {
					t.Errorf("a connection lives on: %v", err)
				}
			}
			if _, err := net.Dial("tcp", l.Addr().String()); err == nil {
				t.Error("the listener lives on")
			}
		})
	}
}

func TestParseListen(t *testing.T) {
	for s, want := range map[string]string{
		"1080": "127.0.0.1:1080", ":1080": "127.0.0.1:1080", "localhost:1080": "127.0.0.1:1080", "127.0.0.1:1080": "127.0.0.1:1080", "0.0.0.0:1080": "0.0.0.0:1080",
		"[::1]:1080": "[::1]:1080", "[::]:1": "[::]:1", "0": "127.0.0.1:0", "[fe80::1%eth0]:80": "[fe80::1%eth0]:80",
	} {
		if got, err := ParseListen(s); err != nil || got != netip.MustParseAddrPort(want) {
			t.Errorf("ParseListen(%q) = %v, %v, want %s", s, got, err, want)
		}
	}
	for _, s := range []string{"", ":", "x", "65536", "-1", "1.2.3.4", "1.2.3.4:", "1.2.3.4:65536", "host:80", "::1:80", "*:80", "127.0.0.1:80:90", " 80", "localhost:", "localhost:x"} {
		if got, err := ParseListen(s); err == nil {
			t.Errorf("ParseListen(%q) = %v", s, got)
		}
	}
}

func TestParseForward(t *testing.T) {
	for s, want := range map[string]string{
		"5432=db:5432": "127.0.0.1:5432 db 5432", ":5432=db:5432": "127.0.0.1:5432 db 5432", "0.0.0.0:80=www.corp.example:8080": "0.0.0.0:80 www.corp.example 8080",
		"[::1]:53=[2001:db8::1]:53": "[::1]:53 2001:db8::1 53", "80=10.0.0.1:80": "127.0.0.1:80 10.0.0.1 80",
	} {
		local, host, port, err := ParseForward(s)
		if got := fmt.Sprintf("%v %s %d", local, host, port); err != nil || got != want {
			t.Errorf("ParseForward(%q) = %s, %v, want %s", s, got, err, want)
		}
	}
	for _, s := range []string{"", "5432", "=", "5432=", "=db:5432", "5432=db", "5432=db:0", "5432=db:x", "5432=:5432", "5432=db:65536", "x=db:5432", "5432=a=b:1:2"} {
		if l, h, p, err := ParseForward(s); err == nil {
			t.Errorf("ParseForward(%q) = %v %s %d", s, l, h, p)
		} else if !strings.Contains(err.Error(), "forward") {
			t.Errorf("ParseForward(%q): %v does not say what is wrong with what", s, err)
		}
	}
}

func FuzzParseForward(f *testing.F) {
	for _, s := range []string{"5432=db:5432", "[::1]:53=[2001:db8::1]:53", "=", "a=b=c:1", "localhost:localhost:1=x:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		local, host, port, err := ParseForward(s)
		if err == nil && (!local.IsValid() || host == "" || port == 0) {
			t.Fatalf("ParseForward(%q) = %v %q %d", s, local, host, port)
		}
	})
}

// scarceListener has no descriptor for the first connection.
type scarceListener struct {
	net.Listener
	failed atomic.Bool
}

func (l *scarceListener) Accept() (net.Conn, error) {
	if !l.failed.Swap(true) {
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	}
	return l.Listener.Accept()
}

// A host that is out of descriptors for a moment costs connections, not the client.
func TestServeOutlivesWantOfDescriptors(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	over := make(chan error, 1)
	go func() {
		over <- serveConns(ctx, &scarceListener{Listener: l}, func(_ context.Context, c net.Conn) { _, _ = c.Write([]byte("hi")) })
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if b, err := io.ReadAll(c); string(b) != "hi" {
		t.Errorf("got %q, %v", b, err)
	}
	cancel()
	if err := <-over; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
