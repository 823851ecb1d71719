package tunnel

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	connectip "github.com/quic-go/connect-ip-go"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/quicvarint"
	"github.com/yosida95/uritemplate/v3"
	"golang.org/x/net/dns/dnsmessage"

	"sallyway/internal/policy"
)

// udpEcho answers every datagram with itself.
func udpEcho(t testing.TB) uint16 {
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 64<<10)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	t.Cleanup(func() { c.Close(); <-done })
	return uint16(c.LocalAddr().(*net.UDPAddr).Port)
}

func TestUDP(t *testing.T) {
	w := newWorld(t, nil)
	port := udpEcho(t)
	l := w.link("a")
	l.mtu.Store(1300) // 1472 never fits a QUIC datagram here
	l.peer.mtu.Store(1300)
	s := w.dial(l, nil)
	c, err := s.DialUDP(timeout(t, 5*time.Second), "127.0.0.1", port)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 64<<10)
	for _, size := range []int{1, 1100, 1200, 1252, 1472, 8000, 65507, 0, 100} {
		want := pseudo(size, byte(size))
		if err := c.WritePacket(want); err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		n, err := c.ReadPacket(b)
		if err != nil || !bytes.Equal(b[:n], want) {
			t.Fatalf("%d bytes: got %d, %v", size, n, err)
		}
	}
	if err := c.WritePacket(make([]byte, MaxUDPPayload+1)); err == nil {
		t.Error("a payload over the limit was taken")
	}
	c.Close()
	if _, err := c.ReadPacket(b); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read after close: %v", err)
	}
	if err := c.WritePacket(nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write after close: %v", err)
	}
	eventually(t, "flow gone at the gateway", func() bool { return w.server.Sessions()[0].Flows == 0 })
}

func TestUDPRefusedAndIdle(t *testing.T) {
	w := newWorld(t, nil)
	s := w.dial(w.link("a"), nil)
	gone, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(gone.LocalAddr().(*net.UDPAddr).Port)
	gone.Close()
	c, err := s.DialUDP(timeout(t, 5*time.Second), "127.0.0.1", port)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.WritePacket([]byte("anybody?"))
	if _, err := c.ReadPacket(make([]byte, 10)); !errors.Is(err, ErrRefused) {
		t.Errorf("got %v, want refused", err)
	}
	c.Close()

	w.handler.dialUDP = func(context.Context, policy.Target) (net.Conn, error) {
		c, err := net.Dial("udp4", net.JoinHostPort("127.0.0.1", "9"))
		if err == nil {
			_ = c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		}
		return c, err
	}
	if c, err = s.DialUDP(timeout(t, 5*time.Second), "127.0.0.1", port); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ReadPacket(make([]byte, 10)); !errors.Is(err, net.ErrClosed) || errors.Is(err, ErrRefused) {
		t.Errorf("got %v, want closed", err)
	}
	c.Close()
	eventually(t, "flows gone at the gateway", func() bool { return w.server.Sessions()[0].Flows == 0 })
	w.handler.dialUDP = nil
	if c, err = s.DialUDP(timeout(t, 5*time.Second), "127.0.0.1", 9); err != nil {
		t.Fatal(err)
	}
	s.Close("over")
	if _, err := c.ReadPacket(make([]byte, 10)); !errors.Is(err, ErrNoSession) {
		t.Errorf("got %v, want the session's end", err)
	}
}

// foreign dials the gateway with quic-go and http3 alone.
func foreign(t *testing.T, w *world, change func(*quic.Config)) (*quic.Conn, *http3.ClientConn) {
	t.Helper()
	l := w.link("foreign")
	raw, err := newRawSocket()
	if err != nil {
		t.Fatal(err)
	}
	sl := newSlot(0, raw)
	link := &slotLink{s: sl, link: l, mon: newMonitors(func() {}).add(l, LinkInfo{}), gone: make(chan struct{})}
	sl.point(link, true)
	cfg := w.config(l)
	qc := &quic.Config{EnableDatagrams: true}
	if change != nil {
		change(qc)
	}
	conn, err := sl.tr.Dial(timeout(t, 5*time.Second), gatewayAddr, cfg.tls(), qc)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.CloseWithError(0x100, "")
		sl.tr.Close()
		sl.Close()
		raw.Close()
	})
	return conn, (&http3.Transport{EnableDatagrams: true}).NewClientConn(conn)
}

// CONNECT-UDP as RFC 9298 has it, written down here from the RFC.
func TestForeignUDPClient(t *testing.T) {
	w := newWorld(t, nil)
	port := udpEcho(t)
	_, h3 := foreign(t, w, nil)
	<-h3.ReceivedSettings()
	if st := h3.Settings(); !st.EnableExtendedConnect || !st.EnableDatagrams {
		t.Fatalf("settings %+v", st)
	}
	str, err := h3.OpenRequestStream(timeout(t, 5*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	template := uritemplate.MustNew("https://proxy.example/.well-known/masque/udp/{target_host}/{target_port}/")
	vars := uritemplate.Values{}
	vars.Set("target_host", uritemplate.String("127.0.0.1"))
	vars.Set("target_port", uritemplate.String(strconv.Itoa(int(port))))
	u, err := template.Expand(vars)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequest(http.MethodConnect, u, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Proto = "connect-udp"
	req.Header.Set("Capsule-Protocol", "?1")
	if err := str.SendRequestHeader(req); err != nil {
		t.Fatal(err)
	}
	rsp, err := str.ReadResponse()
	if err != nil || rsp.StatusCode != 200 || rsp.Header.Get("Capsule-Protocol") != "?1" {
		t.Fatalf("%+v, %v", rsp, err)
	}
	// A datagram of an unknown context is dropped; one of context 0 is proxied.
	_ = str.SendDatagram([]byte{2, 'n', 'o'})
	_ = str.SendDatagram([]byte{0, 'h', 'i'})
	if b, err := str.ReceiveDatagram(timeout(t, 5*time.Second)); err != nil || string(b) != "\x00hi" {
		t.Fatalf("%q, %v", b, err)
	}
	// An unknown capsule is skipped; a DATAGRAM capsule is proxied, and its answer comes in one, being too large.
	big := pseudo(3000, 1)
	capsule := quicvarint.Append(nil, 0x1234)
	capsule = append(quicvarint.Append(capsule, 3), "abc"...)
	capsule = quicvarint.Append(capsule, 0)
	capsule = append(quicvarint.Append(capsule, uint64(len(big)+1)), 0)
	if _, err := str.Write(append(capsule, big...)); err != nil {
		t.Fatal(err)
	}
	p := http3.NewCapsuleParser(str)
	typ, r, err := p.Next()
	if err != nil || typ != 0 {
		t.Fatalf("capsule %v, %v", typ, err)
	}
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, append([]byte{0}, big...)) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	str.CancelRead(0x100)
	_ = str.Close()
	eventually(t, "flow gone at the gateway", func() bool { return w.server.Sessions()[0].Flows == 0 })
}

func dnsQuery(t testing.TB, name string) []byte {
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 7, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func dnsAnswer(query []byte) ([]byte, error) {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil {
		return nil, err
	}
	m.Response = true
	for i, ttl := range []uint32{300, 60} {
		m.Answers = append(m.Answers, dnsmessage.Resource{
			Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Class: dnsmessage.ClassINET, TTL: ttl},
			Body:   &dnsmessage.AResource{A: [4]byte{10, 0, 3, byte(i)}},
		})
	}
	return m.Pack()
}

func TestDNS(t *testing.T) {
	w := newWorld(t, nil)
	w.handler.resolve = dnsAnswer
	query := dnsQuery(t, "db.internal.")
	want, err := dnsAnswer(query)
	if err != nil {
		t.Fatal(err)
	}
	s := w.dial(w.link("a"), nil)
	if got, err := s.Resolve(timeout(t, 5*time.Second), query); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%x, %v", got, err)
	}
	if _, err := s.Resolve(timeout(t, 5*time.Second), []byte("no")); err == nil {
		t.Error("nonsense was resolved")
	}
	// A foreign client: HTTP/3 and RFC 8484 only.
	_, h3 := foreign(t, w, nil)
	client := http.Client{Transport: h3, Timeout: 5 * time.Second}
	do := func(req *http.Request, err error) (int, []byte, http.Header) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		if req.Method == http.MethodPost {
			req.Header.Set("Content-Type", "application/dns-message")
		}
		rsp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer rsp.Body.Close()
		b, _ := io.ReadAll(rsp.Body)
		return rsp.StatusCode, b, rsp.Header
	}
	const base = "https://gateway.example/dns-query"
	for _, req := range []func() (*http.Request, error){
		func() (*http.Request, error) {
			return http.NewRequest("GET", base+"?dns="+base64.RawURLEncoding.EncodeToString(query), nil)
		},
		func() (*http.Request, error) { return http.NewRequest("POST", base, bytes.NewReader(query)) },
	} {
		status, body, h := do(req())
		if status != 200 || !bytes.Equal(body, want) || h.Get("Content-Type") != "application/dns-message" || h.Get("Cache-Control") != "max-age=60" {
			t.Errorf("%d %x %v", status, body, h)
		}
	}
	for _, tc := range []struct {
		want int
		req  func() (*http.Request, error)
	}{
		{400, func() (*http.Request, error) { return http.NewRequest("GET", base, nil) }},
		{400, func() (*http.Request, error) { return http.NewRequest("GET", base+"?dns=!", nil) }},
		{400, func() (*http.Request, error) { return http.NewRequest("POST", base, strings.NewReader("x")) }},
		{405, func() (*http.Request, error) { return http.NewRequest("PUT", base, nil) }},
		{413, func() (*http.Request, error) {
			return http.NewRequest("POST", base, bytes.NewReader(make([]byte, 70000)))
		}},
		{404, func() (*http.Request, error) { return http.NewRequest("GET", "https://gateway.example/", nil) }},
	} {
		if status, _, h := do(tc.req()); status != tc.want || !strings.Contains(h.Get("Proxy-Status"), "error=http_request_error") {
			t.Errorf("%d %v, want %d", status, h, tc.want)
		}
	}
}

// ping makes an ICMP echo request, without ICMP's checksum, which nobody here looks at.
func ping(src, dst string, payload int) []byte {
	s, d := netip.MustParseAddr(src), netip.MustParseAddr(dst)
	b := make([]byte, 20+8+payload)
	b[0], b[8], b[9] = 0x45, 64, 1
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	copy(b[12:], s.AsSlice())
	copy(b[16:], d.AsSlice())
	b[20] = 8
	seal(b)
	return b
}

// seal sets an IPv4 header's checksum.
func seal(b []byte) {
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], ^sum(0, b[:20]))
}

// ipEcho answers echo requests.
func ipEcho(_ context.Context, c *IPConn) error {
	b := make([]byte, MaxIPPacket)
	for {
		n, err := c.ReadPacket(b)
		if err != nil {
			return err
		}
		p := b[:n]
		p[20] = 0
		var src [4]byte
		copy(src[:], p[12:16])
		copy(p[12:16], p[16:20])
		copy(p[16:20], src[:])
		if _, err := c.WritePacket(p); err != nil {
			return err
		}
	}
}

func TestIP(t *testing.T) {
	w := newWorld(t, nil)
	own := []netip.Prefix{netip.MustParsePrefix("100.112.0.7/32"), netip.MustParsePrefix("fd00::7/128")}
	w.handler.openIP = func(p Peer) (*IPService, error) {
		return &IPService{
			Assign: own, Serve: ipEcho,
			Routes: []netip.Prefix{netip.MustParsePrefix("10.0.3.0/24"), netip.MustParsePrefix("10.0.3.128/25"), netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("fd01::/16")},
		}, nil
	}
	l := w.link("a")
	l.mtu.Store(1250)
	s := w.dial(l, nil)
	c, err := s.DialIP(timeout(t, 5*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	if got := c.Assigned(); len(got) != 2 || got[0] != own[0] || got[1] != own[1] {
		t.Fatalf("assigned %v", got)
	}
	if got := c.Routes(); len(got) != 3 || got[0].String() != "10.0.0.0/24" || got[1].String() != "10.0.3.0/24" {
		t.Fatalf("routes %v", got)
	}
	b := make([]byte, MaxIPPacket)
	if icmp, err := c.WritePacket(ping("100.112.0.7", "10.0.3.9", 100)); err != nil || icmp != nil {
		t.Fatalf("%x, %v", icmp, err)
	}
	if n, err := c.ReadPacket(b); err != nil || n != 128 || b[20] != 0 || !bytes.Equal(b[12:16], []byte{10, 0, 3, 9}) {
		t.Fatalf("%x, %v", b[:n], err)
	}
	// What the gateway would drop does not leave: a forged source (CVE-2025-62820), an unrouted destination, a used-up hop limit.
	used := ping("100.112.0.7", "10.0.3.9", 0)
	used[8] = 1
	seal(used)
	for _, p := range [][]byte{ping("100.112.0.8", "10.0.3.9", 0), ping("100.112.0.7", "10.0.4.9", 0), used, {0x45}, nil} {
		if _, err := c.WritePacket(p); err != nil {
			t.Fatal(err)
		}
	}
	if c.Dropped() != 5 {
		t.Errorf("%d dropped, want 5", c.Dropped())
	}
	// A large ping passes; large TCP is told to be smaller.
	if icmp, err := c.WritePacket(ping("100.112.0.7", "10.0.3.9", 9000)); err != nil || icmp != nil {
		t.Fatalf("%x, %v", icmp, err)
	}
	if n, err := c.ReadPacket(b); err != nil || n != 9028 {
		t.Fatalf("%d bytes, %v", n, err)
	}
	bulk := ping("100.112.0.7", "10.0.3.9", 1400)
	bulk[9] = ipTCP
	seal(bulk)
	icmp, err := c.WritePacket(bulk)
	h, ok := parseIP(icmp)
	if err != nil || !ok || !h.icmpError || h.dst.String() != "100.112.0.7" || icmp[20] != 3 || icmp[21] != 4 || sum(0, icmp[20:]) != 0xffff {
		t.Errorf("too large: ICMP %x, %v", icmp, err)
	}
	c.Close()
	if _, err := c.ReadPacket(b); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read after close: %v", err)
	}
	eventually(t, "flow gone at the gateway", func() bool { return w.server.Sessions()[0].Flows == 0 })
}

// The gateway drops what comes from an address that is not the peer's, even from a client that sends it.
func TestIPForgedSource(t *testing.T) {
	w := newWorld(t, nil)
	got := make(chan []byte, 10)
	w.handler.openIP = func(p Peer) (*IPService, error) {
		return &IPService{
			Assign: []netip.Prefix{netip.MustParsePrefix("100.112.0.7/32")}, Routes: []netip.Prefix{netip.MustParsePrefix("10.0.3.0/24")},
			Serve: func(_ context.Context, c *IPConn) error {
				b := make([]byte, MaxIPPacket)
				for {
					n, err := c.ReadPacket(b)
					if err != nil {
						return err
					}
					got <- bytes.Clone(b[:n])
				}
			},
		}, nil
	}
	_, h3 := foreign(t, w, nil)
	req, err := connectip.NewRequest(timeout(t, 5*time.Second), uritemplate.MustNew("https://gateway.example"+ipPath))
	if err != nil {
		t.Fatal(err)
	}
	str, err := h3.OpenRequestStream(timeout(t, 5*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	<-h3.ReceivedSettings()
	hr, err := connectRequest(protoIP, "gateway.example", ipPath+"*/*/")
	if err != nil {
		t.Fatal(err)
	}
	hr.Header = req.Header()
	if err := str.SendRequestHeader(hr); err != nil {
		t.Fatal(err)
	}
	if rsp, err := str.ReadResponse(); err != nil || rsp.StatusCode != 200 {
		t.Fatalf("%+v, %v", rsp, err)
	}
	for _, p := range [][]byte{ping("100.112.0.8", "10.0.3.9", 0), ping("100.112.0.7", "10.0.9.9", 0), ping("100.112.0.7", "10.0.3.9", 1)} {
		if err := str.SendDatagram(append([]byte{0}, p...)); err != nil {
			t.Fatal(err)
		}
	}
	if p := <-got; len(p) != 29 {
		t.Fatalf("%x passed", p)
	}
	str.CancelRead(0x100)
	_ = str.Close()
}

// connect-ip-go's own client.
func TestForeignIPClient(t *testing.T) {
	w := newWorld(t, nil)
	w.handler.openIP = func(p Peer) (*IPService, error) {
		return &IPService{Assign: []netip.Prefix{netip.MustParsePrefix("100.112.0.7/32")}, Routes: []netip.Prefix{netip.MustParsePrefix("10.0.3.0/24")}, Serve: ipEcho}, nil
	}
	_, h3 := foreign(t, w, nil)
	ctx := timeout(t, 5*time.Second)
	req, err := connectip.NewRequest(ctx, uritemplate.MustNew("https://gateway.example"+ipPath))
	if err != nil {
		t.Fatal(err)
	}
	c, _, err := connectip.NewClientConn(h3).Dial(req)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if a, err := c.ReceiveAddressAssignment(ctx); err != nil || len(a) != 1 {
		t.Fatalf("%v, %v", a, err)
	}
	if _, err := c.Routes(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := c.WritePacket(ping("100.112.0.7", "10.0.3.9", 10)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1500)
	if n, err := c.ReadPacket(b); err != nil || n != 38 {
		t.Fatalf("%x, %v", b[:n], err)
	}
}
