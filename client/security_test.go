package client

import (
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// TestProxiesBeyondLoopbackNeedCredentials opens the proxies' listeners as the command line does.
func TestProxiesBeyondLoopbackNeedCredentials(t *testing.T) {
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := &Client{log: slog.New(slog.DiscardHandler)}
	for _, tc := range []struct {
		addr       string
		user, file string
		says       string // of the error; empty is success
	}{
		{"0.0.0.0:0", "", "", "listens beyond this host"},
		{"[::]:0", "", "", "listens beyond this host"},
		{"192.0.2.1:1080", "", "", "listens beyond this host"},
		{"[::ffff:192.0.2.1]:1080", "", "", "listens beyond this host"},
		{"0.0.0.0:0", "alice", "", "go together"},
		{"0.0.0.0:0", "", password, "go together"},
		{"0.0.0.0:0", "alice", password, ""},
		{"127.0.0.1:0", "", "", ""},
		{"127.8.9.10:0", "", "", ""},
		{"0", "", "", ""}, // a port alone is on loopback
		{":0", "", "", ""},
	} {
		for _, socks := range []bool{true, false} {
			o := &options{proxyUser: tc.user, proxyPasswordFile: tc.file}
			if socks {
				o.socks = tc.addr
			} else {
				o.http = tc.addr
			}
			ls, err := o.listen(c)
			for _, l := range ls {
				if host := l.l.Addr().String(); tc.user == "" && !strings.HasPrefix(host, "127.") {
					t.Errorf("%s listens on %s", tc.addr, host)
				}
				_ = l.l.Close()
			}
			if tc.says == "" && (err != nil || len(ls) != 1) || tc.says != "" && (err == nil || !strings.Contains(err.Error(), tc.says)) {
				t.Errorf("%+v, SOCKS %v: %v", tc, socks, err)
			}
		}
	}
}

// A listener that can not be had gives back those before it.
func TestListenIsAllOrNothing(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	o := &options{socks: at, http: at}
	if ls, err := o.listen(&Client{log: slog.New(slog.DiscardHandler)}); err == nil {
		t.Fatalf("two listeners on %s: %v", at, ls)
	}
	again, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatalf("the first listener is still open: %v", err)
	}
	_ = again.Close()
}

// TestHTTPProxyIsNoOrigin sends what a page of the web can make a browser send to a port of this host, under a name that the page has
// pointed here (DNS rebinding): requests in origin form, whatever their Host. None may lead anywhere.
func TestHTTPProxyIsNoOrigin(t *testing.T) {
	h := newHarness(t)
	var calls atomic.Int32
	port := origin(t, func(http.ResponseWriter, *http.Request) { calls.Add(1) })
	proxy := newProxy(t, h, "", "")
	for _, host := range []string{"www.corp.example:" + port, "127.0.0.1:" + port, "rebound.example.com", "localhost:" + port} {
		for _, line := range []string{"GET / HTTP/1.1", "POST /x HTTP/1.1", "OPTIONS * HTTP/1.1", "GET //www.corp.example:" + port + "/ HTTP/1.1", "GET https://www.corp.example:" + port + "/ HTTP/1.1"} {
			res := exchangeRaw(t, proxy, line+"\r\nHost: "+host+"\r\nOrigin: http://rebound.example.com\r\nContent-Length: 0\r\n\r\n")
			if res.StatusCode/100 != 4 && !strings.HasPrefix(line, "OPTIONS *") { // which net/http answers by itself, for everybody
				t.Errorf("%s for %s: %d", line, host, res.StatusCode)
			}
		}
	}
	if n := calls.Load(); n != 0 {
		t.Errorf("%d requests got through", n)
	}
}
