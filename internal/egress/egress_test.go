package egress

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	user     = "alice"
	password = "open:sesame %/@"
)

// serve accepts connections until the test ends and then waits for their handlers.
func serve(t *testing.T, l net.Listener, handle func(net.Conn)) {
	t.Helper()
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wg.Go(func() {
				defer c.Close()
				handle(c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
}

func listen(t *testing.T, addr string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// greeter is a target that speaks first, as SSH servers do, and then echoes.
func greeter(t *testing.T, addr string) string {
	t.Helper()
	l := listen(t, addr)
	serve(t, l, func(c net.Conn) {
		_, _ = io.WriteString(c, "hello\n")
		_, _ = io.Copy(c, c)
	})
	return l.Addr().String()
}

// httpProxy is a CONNECT proxy. Every target leads to what at says, "" being the target itself.
type httpProxy struct {
	credentials string // wanted, "USER:PASSWORD"; "" is none
	at          string
	mu          sync.Mutex
	asked       []string
}

func (p *httpProxy) handle(c net.Conn) {
	r := bufio.NewReader(c)
	line, err := r.ReadString('\n')
	if err != nil {
		return
	}
	fields := strings.Fields(line)
	if len(fields) != 3 || fields[0] != "CONNECT" {
		fmt.Fprint(c, "HTTP/1.1 405 Method Not Allowed\r\n\r\n")
		return
	}
	p.mu.Lock()
	p.asked = append(p.asked, fields[1])
	p.mu.Unlock()
	given := ""
	for {
		h, err := r.ReadString('\n')
		if err != nil {
			return
		}
		if h == "\r\n" {
			break
		}
		if v, ok := strings.CutPrefix(h, "Proxy-Authorization: "); ok {
			given = strings.TrimSpace(v)
		}
	}
	if p.credentials != "" {
		req := httptest.NewRequest("GET", "/", nil)
		req.Header.Set("Authorization", given)
		if u, pw, _ := req.BasicAuth(); u+":"+pw != p.credentials {
			fmt.Fprint(c, "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Negotiate\r\nProxy-Authenticate: Basic realm=\"x\"\r\nContent-Length: 6\r\n\r\ndenied")
			return
		}
	}
	target := fields[1]
	if p.at != "" {
		target = p.at
	}
	out, err := net.Dial("tcp", target)
	if err != nil {
		fmt.Fprint(c, "HTTP/1.1 502 Bad Gateway\r\n\r\n")
		return
	}
	defer out.Close()
	// What the target says goes out in the segment of the answer's head.
	first := make([]byte, 64)
	n, err := out.Read(first)
	if err != nil {
		return
	}
	_, _ = c.Write(append([]byte("HTTP/1.0 200 Connection established\r\nProxy-agent: test\r\n\r\n"), first[:n]...))
	splice(c, r, out)
}

func splice(c net.Conn, in io.Reader, out net.Conn) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(out, in)
		_ = out.(*net.TCPConn).CloseWrite()
	}()
	_, _ = io.Copy(c, out)
	c.Close()
	<-done
}

// targets are what was asked for.
func (p *httpProxy) targets() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.asked)
}

func (p *httpProxy) start(t *testing.T) string {
	t.Helper()
	l := listen(t, "127.0.0.1:0")
	serve(t, l, p.handle)
	return l.Addr().String()
}

// answers is a server that says text to whoever asks and then, or at once, what after does.
func answers(t *testing.T, text string, after func(net.Conn)) string {
	t.Helper()
	l := listen(t, "127.0.0.1:0")
	serve(t, l, func(c net.Conn) {
		b := make([]byte, 1024)
		if _, err := c.Read(b); err != nil {
			return
		}
		if _, err := io.WriteString(c, text); err == nil && after != nil {
			after(c)
		}
	})
	return l.Addr().String()
}

// dialer makes a Dialer.
func dialer(t *testing.T, cfg Config) *Dialer {
	t.Helper()
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// works wants the greeting and an echo.
func works(t *testing.T, d *Dialer, target string) net.Conn {
	t.Helper()
	c, err := d.DialContext(t.Context(), "tcp", target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, "ping\n"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, len("hello\nping\n"))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello\nping\n" {
		t.Fatalf("got %q, %v", b, err)
	}
	return c
}

// fails wants an error of a kind whose text has all parts, and a remedy.
func fails(t *testing.T, d *Dialer, target string, kind Kind, parts ...string) *Error {
	t.Helper()
	c, err := d.DialContext(t.Context(), "tcp", target)
	if err == nil {
		c.Close()
		t.Fatal("it connects")
	}
	e, ok := errors.AsType[*Error](err)
	if !ok || e.Kind != kind || e.Remedy == "" {
		t.Fatalf("%#v, want kind %s and a remedy", err, kind)
	}
	for _, p := range append(parts, d.Proxy()) {
		if !strings.Contains(e.Error(), p) {
			t.Errorf("%q lacks %q", e, p)
		}
	}
	if strings.Contains(fmt.Sprintf("%v %s %+v", err, e.Remedy, *d.Status()), password) {
		t.Errorf("the password is shown: %v %s", err, e.Remedy)
	}
	if st := d.Status(); (st.Error != "") != kind.ofProxy() || st.Failures == 0 || (st.Remedy != "") != kind.ofProxy() {
		t.Errorf("status %+v after %v", st, err)
	}
	return e
}

// outside is a target that no rule exempts.
const outside = "192.0.2.1:5349"

func withUser(scheme, proxy, user, password string) string {
	return (&url.URL{Scheme: scheme, User: url.UserPassword(user, password), Host: proxy}).String()
}

func TestConnect(t *testing.T) {
	p := &httpProxy{credentials: user + ":" + password, at: greeter(t, "127.0.0.1:0")}
	at := p.start(t)
	d := dialer(t, Config{URL: withUser("http", at, user, password)})
	for _, target := range []string{outside, "[2001:db8::1]:8443", "relay.example:2222"} {
		c := works(t, d, target)
		host, port, _ := net.SplitHostPort(target)
		want := target
		if _, err := netip.ParseAddr(host); err != nil {
			want = net.JoinHostPort("0.0.0.0", port)
		}
		if c.RemoteAddr().String() != want {
			t.Errorf("%s: the remote address is %v, want %s", target, c.RemoteAddr(), want)
		}
		if _, err := c.(syscall.Conn).SyscallConn(); err != nil {
			t.Error(err)
		}
		if got := p.targets(); got[len(got)-1] != target {
			t.Errorf("the proxy was asked for %s, want %s", got, target)
		}
	}
	if st := d.Status(); st.Connections != 3 || st.Error != "" || st.Since.IsZero() || st.Proxy != "http://"+at {
		t.Errorf("%+v", st)
	}
	wrong := dialer(t, Config{URL: withUser("http", at, user, "wrong")})
	fails(t, wrong, outside, Auth, "407", user, "does not take")
	fails(t, dialer(t, Config{URL: at}), outside, Auth, "407", "none are set")
}

func TestConnectToIPv6(t *testing.T) {
	target := greeter(t, "[::1]:0")
	_, port, _ := net.SplitHostPort(target)
	p := &httpProxy{at: target}
	works(t, dialer(t, Config{URL: p.start(t)}), net.JoinHostPort("2001:db8::1", port))
	l := listen(t, "[::1]:0")
	serve(t, l, p.handle)
	works(t, dialer(t, Config{URL: "http://" + l.Addr().String()}), outside) // and the proxy itself
}

func TestConnectOverTLS(t *testing.T) {
	p := &httpProxy{at: greeter(t, "127.0.0.1:0")}
	srv := httptest.NewUnstartedServer(nil)
	srv.StartTLS() // for its certificate
	cert, root := srv.TLS.Certificates[0], srv.Certificate()
	srv.Close()
	l := tls.NewListener(listen(t, "127.0.0.1:0"), &tls.Config{Certificates: []tls.Certificate{cert}})
	serve(t, l, p.handle)
	roots := x509.NewCertPool()
	roots.AddCert(root)
	u := "https://" + l.Addr().String()
	c := works(t, dialer(t, Config{URL: u, TLS: &tls.Config{RootCAs: roots}}), outside)
	if _, err := c.(syscall.Conn).SyscallConn(); err != nil {
		t.Error(err)
	}
	fails(t, dialer(t, Config{URL: u}), outside, Unreached, "TLS with the proxy", "unknown authority")
	plain := &httpProxy{}
	fails(t, dialer(t, Config{URL: "https://" + plain.start(t)}), outside, Unreached, "TLS with the proxy")
}

func TestConnectRefusals(t *testing.T) {
	for _, tc := range []struct {
		name, answer string
		kind         Kind
		part         string
	}{
		{"forbidden", "HTTP/1.1 403 Filtered\r\nServer: x\r\n\r\n", Refused, "192.0.2.1:5349: 403 Filtered"},
		{"no CONNECT", "HTTP/1.1 405 Method Not Allowed\r\n\r\n", Refused, "405"},
		{"bad gateway", "HTTP/1.1 502 Bad Gateway\r\n\r\n", NoWay, "does not lead to 192.0.2.1:5349: 502 Bad Gateway"},
		{"no reason", "HTTP/1.1 503\r\n\r\n", NoWay, "503"},
		{"redirect", "HTTP/1.1 302 Found\r\nLocation: http://portal\r\n\r\n", NoWay, "302"},
		{"other authentication", "HTTP/1.1 407 No\r\nProxy-Authenticate: NTLM\r\nProxy-Authenticate: Negotiate x\r\n\r\n", Auth, "by NTLM, Negotiate"},
		{"401 in its place", "HTTP/1.0 401 Unauthorized\r\n\r\n", Auth, "none are set (401)"},
		{"garbage", "SSH-2.0-OpenSSH_9.2\r\n", NotProxy, "no proxy of this kind"},
		{"not a status", "HTTP/1.1 2x0 OK\r\n\r\n", NotProxy, "status line"},
		{"HTTP/2", "HTTP/2 200 OK\r\n\r\n", NotProxy, "HTTP/1"},
		{"fields", "HTTP/1.1 200 OK\r\nno colon\r\n\r\n", NotProxy, "malformed fields"},
		{"endless head", "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 2*maxHead), NotProxy, "larger than 16384 bytes"},
		{"endless interim", strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 10), NotProxy, "interim"},
		{"closed within the head", "HTTP/1.1 200 OK\r\nX: ", NotProxy, "ended the connection"},
		{"closed at once", "", NotProxy, "ended the connection"},
		{"a terminal's controls", "HTTP/1.1 500 \x1b[31mred\x07\r\n\r\n", NoWay, "500 [31mred"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fails(t, dialer(t, Config{URL: answers(t, tc.answer, nil)}), outside, tc.kind, tc.part)
		})
	}
	t.Run("half-closed", func(t *testing.T) {
		at := answers(t, "HTTP/1.1 200", func(c net.Conn) {
			_ = c.(*net.TCPConn).CloseWrite()
			_, _ = io.Copy(io.Discard, c)
		})
		fails(t, dialer(t, Config{URL: at}), outside, NotProxy, "ended the connection")
	})
	t.Run("interim", func(t *testing.T) {
		at := answers(t, "HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhello\nping\n", func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
		works(t, dialer(t, Config{URL: at}), outside)
	})
}

// drip says a head without end, slowly.
func drip(c net.Conn) {
	for {
		if _, err := io.WriteString(c, "X"); err != nil {
			return
		}
		time.Sleep(5 * time.Millisecond) // what makes it slow
	}
}

func TestSlowProxies(t *testing.T) {
	silent := func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }
	for name, at := range map[string]string{
		"silent":          "http://" + answers(t, "", silent),
		"a slow head":     "http://" + answers(t, "HTTP/1.1 200 OK\r\nX: ", drip),
		"silent TLS":      "https://" + answers(t, "", silent),
		"silent SOCKS":    "socks5h://" + answers(t, "", silent),
		"SOCKS then none": "socks5h://" + answers(t, "\x05\x00", silent),
	} {
		t.Run(name, func(t *testing.T) {
			d := dialer(t, Config{URL: at, Timeout: 200 * time.Millisecond})
			_, err := d.DialContext(t.Context(), "tcp", outside)
			if e, ok := errors.AsType[*Error](err); !ok || (e.Kind != NoWay && e.Kind != Unreached) {
				t.Errorf("%v", err)
			}
			// Who gives up gets the connection's end at once, and the proxy is not to blame.
			d = dialer(t, Config{URL: at, Timeout: time.Minute})
			ctx, cancel := context.WithCancelCause(t.Context())
			why := errors.New("another way was faster")
			time.AfterFunc(20*time.Millisecond, func() { cancel(why) })
			if _, err := d.DialContext(ctx, "tcp", outside); !errors.Is(err, why) {
				t.Errorf("%v, want %v", err, why)
			}
			if st := d.Status(); st.Error != "" || st.Failures != 0 {
				t.Errorf("%+v", st)
			}
		})
	}
}

func TestProxyNotReached(t *testing.T) {
	l := listen(t, "127.0.0.1:0")
	at := l.Addr().String()
	l.Close()
	for _, scheme := range []string{"http", "https", "socks5", "socks5h"} {
		e := fails(t, dialer(t, Config{URL: withUser(scheme, at, user, password), Source: "HTTPS_PROXY"}), outside, Unreached, "refuses the connection")
		if !strings.Contains(e.Remedy, "HTTPS_PROXY") {
			t.Error(e.Remedy)
		}
	}
	// A label is longer than it may be, so that no resolver is asked.
	fails(t, dialer(t, Config{URL: "http://" + strings.Repeat("x", 64) + ".test:3128"}), outside, Unreached, "does not resolve")
}

// TestStatusRecovers: the status follows the proxy, and since says when it last changed.
func TestStatusRecovers(t *testing.T) {
	p := &httpProxy{at: greeter(t, "127.0.0.1:0")}
	d := dialer(t, Config{URL: p.start(t)})
	proxy := d.addr
	d.addr = answers(t, "nothing\n", nil)
	if _, err := d.DialContext(t.Context(), "tcp", outside); err == nil {
		t.Fatal("it connects")
	}
	bad := d.Status()
	d.addr = proxy
	works(t, d, outside)
	good := d.Status()
	works(t, d, outside)
	if again := d.Status(); bad.Error == "" || good.Error != "" || !good.Since.After(bad.Since) || again.Since != good.Since || again.Connections != 2 {
		t.Errorf("%+v\n%+v\n%+v", bad, good, again)
	}
}

// TestControl: every socket is told of, that to the proxy among them.
func TestControl(t *testing.T) {
	target := greeter(t, "127.0.0.1:0")
	p := &httpProxy{at: target}
	at := p.start(t)
	var seen atomic.Pointer[string]
	control := func(_, address string, _ syscall.RawConn) error {
		seen.Store(&address)
		return nil
	}
	d := dialer(t, Config{URL: at, Control: control})
	works(t, d, outside)
	if *seen.Load() != at {
		t.Errorf("the socket to %s was told of, want %s", *seen.Load(), at)
	}
	works(t, d, target) // loopback: without the proxy
	if *seen.Load() != target {
		t.Errorf("the socket to %s was told of, want %s", *seen.Load(), target)
	}
	d = dialer(t, Config{URL: at, Control: func(string, string, syscall.RawConn) error { return errors.New("no mark") }})
	if _, err := d.DialContext(t.Context(), "tcp", outside); err == nil || !strings.Contains(err.Error(), "no mark") {
		t.Error(err)
	}
}

func TestNoProxy(t *testing.T) {
	d := dialer(t, Config{URL: "http://192.0.2.80:3128", NoProxy: "10.0.0.0/8, fd00::/8,.corp.example,relay.example:2222,198.51.100.7,[2001:db8::7]:443"})
	for address, uses := range map[string]bool{
		"192.0.2.1:443": true, "[2001:db8::1]:443": true, "example.com:443": true,
		"127.0.0.1:443": false, "127.8.8.8:1": false, "[::1]:443": false, "localhost:443": false,
		"10.1.2.3:443": false, "11.1.2.3:443": true, "[fd12::1]:5349": false, "[fe12::1]:5349": true,
		"a.corp.example:443": false, "A.Corp.Example:443": false, "corp.example:443": true, "xcorp.example:443": true,
		"relay.example:2222": false, "fra.relay.example:2222": false, "relay.example:5349": true,
		"198.51.100.7:1": false, "[2001:db8::7]:443": false, "[2001:db8::7]:5349": true,
	} {
		if d.Uses(address) != uses || d.Resolves(address) != uses {
			t.Errorf("%s: by the proxy %v, resolved there %v, want %v", address, d.Uses(address), d.Resolves(address), uses)
		}
	}
	if dialer(t, Config{URL: "192.0.2.80:1", NoProxy: "*"}).Uses("192.0.2.1:443") {
		t.Error("* is not everything")
	}
	// What is exempt is dialled by us, whether the proxy runs or not, and says nothing about it.
	target := greeter(t, "127.0.0.1:0")
	works(t, d, target)
	if st := d.Status(); st.Connections != 0 || !st.Since.IsZero() {
		t.Errorf("%+v", st)
	}
}

func TestBadTargets(t *testing.T) {
	p := &httpProxy{at: greeter(t, "127.0.0.1:0")}
	d := dialer(t, Config{URL: p.start(t)})
	for _, target := range []string{"host", "host:", "host:0", "host:65536", "host:http", "a\r\nX: y:443", "a b:443", "a@b:443", "a/b:443", ":443", "\u00e4.example:443"} {
		if _, err := d.DialContext(t.Context(), "tcp", target); err == nil {
			t.Errorf("%q is dialled", target)
		}
	}
	if _, err := d.DialContext(t.Context(), "udp", outside); err == nil {
		t.Error("UDP is dialled")
	}
	if got := p.targets(); len(got) > 0 {
		t.Errorf("the proxy was asked for %q", got)
	}
}

// socksProxy is a SOCKS5 server that answers every request with reply and leads to at.
type socksProxy struct {
	user, password string // "" takes everybody
	reply          byte
	at             string
	asked          atomic.Pointer[string]
}

func (p *socksProxy) handle(c net.Conn) {
	read := func(n int) []byte {
		b := make([]byte, n)
		if _, err := io.ReadFull(c, b); err != nil {
			return make([]byte, n)
		}
		return b
	}
	methods := read(int(read(2)[1]))
	want := byte(0)
	if p.user != "" {
		want = 2
	}
	if !strings.Contains(string(methods), string(want)) {
		_, _ = c.Write([]byte{5, 0xff})
		return
	}
	_, _ = c.Write([]byte{5, want})
	if want == 2 {
		u := string(read(int(read(2)[1])))
		pw := string(read(int(read(1)[0])))
		if u != p.user || pw != p.password {
			_, _ = c.Write([]byte{1, 1})
			return
		}
		_, _ = c.Write([]byte{1, 0})
	}
	host := ""
	switch read(4)[3] {
	case 1:
		host = netip.AddrFrom4([4]byte(read(4))).String()
	case 4:
		host = netip.AddrFrom16([16]byte(read(16))).String()
	case 3:
		host = string(read(int(read(1)[0])))
	}
	port := read(2)
	asked := net.JoinHostPort(host, fmt.Sprint(int(port[0])<<8|int(port[1])))
	p.asked.Store(&asked)
	if p.reply != 0 {
		_, _ = c.Write([]byte{5, p.reply, 0, 1, 0, 0, 0, 0, 0, 0})
		return
	}
	out, err := net.Dial("tcp", p.at)
	if err != nil {
		return
	}
	defer out.Close()
	first := make([]byte, 64)
	n, err := out.Read(first)
	if err != nil {
		return
	}
	_, _ = c.Write(append([]byte{5, 0, 0, 1, 127, 0, 0, 1, 0, 1}, first[:n]...))
	splice(c, c, out)
}

func (p *socksProxy) start(t *testing.T) string {
	t.Helper()
	l := listen(t, "127.0.0.1:0")
	serve(t, l, p.handle)
	return l.Addr().String()
}

func TestSOCKS(t *testing.T) {
	target := greeter(t, "127.0.0.1:0")
	p := &socksProxy{user: user, password: password, at: target}
	at := p.start(t)
	for _, scheme := range []string{"socks5", "socks5h"} {
		d := dialer(t, Config{URL: withUser(scheme, at, user, password)})
		for _, address := range []string{outside, "[2001:db8::1]:8443"} {
			c := works(t, d, address)
			if *p.asked.Load() != address || c.RemoteAddr().String() != address {
				t.Errorf("asked for %s at %v, want %s", *p.asked.Load(), c.RemoteAddr(), address)
			}
		}
	}
	d := dialer(t, Config{URL: withUser("socks5h", at, user, password)})
	works(t, d, "relay.example:5349")
	if *p.asked.Load() != "relay.example:5349" {
		t.Errorf("asked for %s", *p.asked.Load())
	}
	fails(t, dialer(t, Config{URL: withUser("socks5h", at, user, "wrong")}), outside, Auth, user, "does not take")
	fails(t, dialer(t, Config{URL: "socks5h://" + at}), outside, Auth, "none are set")
	open := &socksProxy{at: target}
	works(t, dialer(t, Config{URL: withUser("socks5h", open.start(t), user, password)}), outside) // credentials that nobody wants
}

func TestSOCKSRefusals(t *testing.T) {
	for reply, want := range map[byte]struct {
		kind Kind
		part string
	}{
		1: {NoWay, "general SOCKS server failure"}, 2: {Refused, "does not let this host connect to " + outside}, 3: {NoWay, "network unreachable"},
		4: {NoWay, "host unreachable"}, 5: {NoWay, "connection refused"}, 6: {NoWay, "TTL expired"}, 7: {NoWay, "command not supported"}, 99: {NoWay, "unknown code: 99"},
	} {
		p := &socksProxy{reply: reply}
		fails(t, dialer(t, Config{URL: "socks5h://" + p.start(t)}), outside, want.kind, want.part)
	}
	for name, answer := range map[string]string{"HTTP": "HTTP/1.1 400 Bad Request\r\n\r\n", "SOCKS4": "\x00\x5a\x00\x00\x00\x00\x00\x00"} {
		t.Run(name, func(t *testing.T) {
			fails(t, dialer(t, Config{URL: "socks5h://" + answers(t, answer, nil)}), outside, NotProxy, "SOCKS5")
		})
	}
	fails(t, dialer(t, Config{URL: "socks5h://" + answers(t, "\x05", nil)}), outside, NotProxy, "ended the connection")
	fails(t, dialer(t, Config{URL: "socks5h://" + answers(t, "\x05\x00\x05\x00\x00\x03\xffshort", nil)}), outside, NotProxy)
}

// TestSOCKSResolvesHere: socks5 asks the proxy for addresses alone, IPv4 first.
func TestSOCKSResolvesHere(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	started := make(chan struct{})
	srv := &dns.Server{PacketConn: pc, NotifyStartedFunc: func() { close(started) }, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg).SetReply(r)
		for _, rr := range []string{"relay.example. 1 A 192.0.2.9", "relay.example. 1 AAAA 2001:db8::9"} {
			if a, err := dns.NewRR(rr); err == nil && r.Question[0].Name == "relay.example." && a.Header().Rrtype == r.Question[0].Qtype {
				m.Answer = append(m.Answer, a)
			}
		}
		if r.Question[0].Name != "relay.example." {
			m.Rcode = dns.RcodeNameError
		}
		_ = w.WriteMsg(m)
	})}
	ended := make(chan error, 1)
	go func() { ended <- srv.ActivateAndServe() }()
	<-started
	t.Cleanup(func() {
		_ = srv.Shutdown()
		<-ended
	})
	resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var nd net.Dialer
		return nd.DialContext(ctx, "udp", pc.LocalAddr().String())
	}}
	p := &socksProxy{at: greeter(t, "127.0.0.1:0")}
	d := dialer(t, Config{URL: "socks5://" + p.start(t), Resolver: resolver})
	works(t, d, "relay.example:5349")
	if *p.asked.Load() != "192.0.2.9:5349" {
		t.Errorf("asked for %s", *p.asked.Load())
	}
	p.reply = 4
	fails(t, d, "relay.example:5349", NoWay, "192.0.2.9", "host unreachable")
	if *p.asked.Load() != "[2001:db8::9]:5349" {
		t.Errorf("asked last for %s", *p.asked.Load())
	}
	e := fails(t, d, "nobody.example:5349", NoWay, "does not resolve on this host")
	if !strings.Contains(e.Remedy, "socks5h") || d.Resolves("relay.example:5349") {
		t.Error(e.Remedy)
	}
}
