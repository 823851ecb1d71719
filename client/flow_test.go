package client

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/netstack"
	"sallyway/tunnel"
)

func TestDialContext(t *testing.T) {
	h := newHarness(t)
	c := &Client{sessions: h.Sessions}
	tcp, udp := tcpServer(t, "127.0.0.1", echoTCP), udpEcho(t, "127.0.0.1")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for _, network := range []string{"tcp", "tcp4", "tcp6", "udp", "udp4", "udp6"} {
		port := tcp
		if strings.HasPrefix(network, "udp") {
			port = udp
		}
		address := joinHostPort("echo.corp.example", port)
		conn, err := c.DialContext(ctx, network, address)
		if err != nil {
			t.Errorf("%s: %v", network, err)
			continue
		}
		if conn.RemoteAddr().String() != address {
			t.Errorf("%s: leads to %v", network, conn.RemoteAddr())
		}
		if _, err := conn.Write([]byte("hello")); err != nil {
			t.Errorf("%s: %v", network, err)
		}
		b := make([]byte, 5)
		if _, err := io.ReadFull(conn, b); err != nil || string(b) != "hello" {
			t.Errorf("%s: %q, %v", network, b, err)
		}
		if err := conn.Close(); err != nil {
			t.Errorf("%s: close: %v", network, err)
		}
		if _, err := conn.Read(b); err == nil {
			t.Errorf("%s: a closed connection is read", network)
		}
	}
	for address, want := range map[string]error{
		"denied.corp.example:80": tunnel.ErrDenied, "refused.corp.example:80": tunnel.ErrRefused, "silent.corp.example:80": tunnel.ErrTimeout,
	} {
		_, err := c.DialContext(ctx, "tcp", address)
		var pe *tunnel.ProxyError
		if !errors.Is(err, want) || !errors.As(err, &pe) || !strings.Contains(err.Error(), address) || !strings.Contains(err.Error(), "office") {
			t.Errorf("%s: %v, want %v that names the destination and the gateway", address, err, want)
		}
	}
	if _, err := c.DialContext(ctx, "tcp", "denied.corp.example:80"); err == nil || !strings.Contains(err.Error(), "no-entry") {
		t.Errorf("%v does not name the rule", err)
	}
	for _, bad := range [][2]string{{"unix", "db:1"}, {"", "db:1"}, {"ip", "db:1"}, {"tcp", "db"}, {"tcp", "db:0"}, {"tcp", "db:http"}, {"tcp", ":1"}, {"udp", "www.example.com:53"}} {
		if conn, err := c.DialContext(ctx, bad[0], bad[1]); err == nil {
			t.Errorf("%v: %v", bad, conn.RemoteAddr())
		}
	}
	over, cancelOver := context.WithCancel(ctx)
	cancelOver()
	if _, err := c.DialContext(over, "tcp", joinHostPort("echo.corp.example", tcp)); err == nil {
		t.Error("a dial whose time is over")
	}
}

// Of two gateways that serve a resource, the other one is asked when the first is not there; what a gateway answered is final.
func TestDialGoesOnToTheNextGateway(t *testing.T) {
	h := newHarness(t)
	port := tcpServer(t, "127.0.0.1", echoTCP)
	d := anyDialling()
	d.Gateways = append(d.Gateways, control.GatewayRef{Node: gateway2, Name: "lab"})
	for i := range d.Resources {
		d.Resources[i].Gateways = []control.ServingGateway{{Node: gateway2}, {Node: gateway1, Priority: 1}}
	}
	h.Sessions.table.Store(newTable(d))
	ctx, cancel := context.WithTimeout(t.Context(), 2*connectTimeout)
	defer cancel()

	// It refused this node: passed over at once, without waiting.
	refused := h.newLink(&d.Gateways[1], nil)
	refused.set(nil, tunnel.Denied("default deny", "not among the peers"))
	h.Sessions.mu.Lock()
	h.Sessions.gateways[gateway2] = refused
	h.Sessions.mu.Unlock()
	start := time.Now()
	f, err := h.DialTCP(ctx, "echo.corp.example", port)
	if err != nil {
		t.Fatal(err)
	}
	f.Reset()
	if d := time.Since(start); d > time.Second {
		t.Errorf("a gateway that has said no was waited for: %v", d)
	}
	// A no of the second one is the answer, also with the first one missing.
	if _, err := h.DialTCP(ctx, "denied.corp.example", port); !errors.Is(err, tunnel.ErrDenied) || !strings.Contains(err.Error(), "no-entry") {
		t.Errorf("%v", err)
	}
	// A session that is over is none.
	_ = h.session.Close("gone")
	short, cancelShort := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancelShort()
	if _, err := h.DialTCP(short, "echo.corp.example", port); err == nil {
		t.Error("a flow on a session that is over")
	}
}

func TestRejection(t *testing.T) {
	for _, c := range []struct {
		err  error
		want netstack.Reason
	}{
		{&tunnel.ProxyError{Type: tunnel.ConnectionRefused}, netstack.Refused},
		{&tunnel.ProxyError{Type: tunnel.ConnectionTerminated}, netstack.Refused},
		{&tunnel.ProxyError{Type: tunnel.ConnectionTimeout}, netstack.Silent},
		{&tunnel.ProxyError{Type: tunnel.DNSTimeout}, netstack.Silent},
		{tunnel.Denied("r", "no"), netstack.AdminProhibited},
		{&tunnel.ProxyError{Type: tunnel.DestinationProhibited}, netstack.AdminProhibited},
		{&tunnel.ProxyError{Type: tunnel.DestinationUnroutable}, netstack.Unreachable},
		{&tunnel.ProxyError{Type: tunnel.DestinationNotFound}, netstack.Unreachable},
		{&NoRouteError{"x"}, netstack.NetUnreachable},
		{context.DeadlineExceeded, netstack.Unreachable}, // the gateway is not reached
		{errors.New("x"), netstack.Unreachable},
	} {
		if got := rejection(fmt.Errorf("gateway office: %w", c.err)); got != c.want {
			t.Errorf("%v: %v, want %v", c.err, got, c.want)
		}
	}
}

// The control socket carries a flow for `--stdio` beside a running client.
func TestStdioHandler(t *testing.T) {
	h := newHarness(t)
	port := tcpServer(t, "127.0.0.1", echoTCP)
	addr := serve(t, func(ctx context.Context, l net.Listener) error {
		srv := &http.Server{Handler: stdioHandler(h)}
		stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
		defer stop()
		return srv.Serve(l)
	})
	ask := func(to string) (*net.TCPConn, *bufio.Reader, *http.Response) {
		c := dialSOCKS(t, addr)
		fmt.Fprintf(c, "GET /stdio?to=%s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\nearly ", url.QueryEscape(to), stdioUpgrade)
		r := bufio.NewReader(c)
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { res.Body.Close() })
		return c, r, res
	}
	c, r, res := ask(joinHostPort("echo.corp.example", port))
	if res.StatusCode != http.StatusSwitchingProtocols || res.Header.Get("Upgrade") != stdioUpgrade {
		t.Fatalf("%s %v", res.Status, res.Header)
	}
	_, _ = io.WriteString(c, "late")
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != "early late" {
		t.Errorf("%q, %v", b, err)
	}
	for to, status := range map[string]int{"denied.corp.example:80": 403, "refused.corp.example:80": 502, "www.example.com:80": 403, "nonsense": 400, "": 400} {
		if _, _, res := ask(to); res.StatusCode != status || (status != 400 && res.Header.Get("Proxy-Status") == "") {
			t.Errorf("%q: %s %v, want %d", to, res.Status, res.Header, status)
		}
	}
}

func TestPacketAddresses(t *testing.T) {
	v4 := append([]byte{0x45}, make([]byte, 19)...)
	copy(v4[12:], []byte{10, 0, 0, 1, 10, 0, 3, 7})
	v6 := append([]byte{0x60}, make([]byte, 39)...)
	v6[23], v6[39] = 1, 2
	for _, c := range []struct {
		pkt      []byte
		src, dst string
	}{{v4, "10.0.0.1", "10.0.3.7"}, {v6, "::1", "::2"}} {
		s, okS := source(c.pkt)
		d, okD := destination(c.pkt)
		if !okS || !okD || s.String() != c.src || d.String() != c.dst {
			t.Errorf("%x: %v → %v", c.pkt, s, d)
		}
	}
	for _, bad := range [][]byte{nil, {0x45}, v4[:19], v6[:39], bytes.Repeat([]byte{0x50}, 60), append([]byte{0x65}, v4[1:]...)} {
		if _, ok := destination(bad); ok {
			t.Errorf("%x has a destination", bad)
		}
		if _, ok := source(bad); ok {
			t.Errorf("%x has a source", bad)
		}
	}
}
