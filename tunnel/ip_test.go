package tunnel

import (
	"crypto/x509"
	"encoding/binary"
	"net/http"
	"net/netip"
	"slices"
	"testing"
	"time"

	connectip "github.com/quic-go/connect-ip-go"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/quicvarint"
	"github.com/yosida95/uritemplate/v3"

	"sallyway/internal/identity"
)

// capsuleBody cuts type and length off a capsule.
func capsuleBody(t testing.TB, b []byte) []byte {
	_, n, err := quicvarint.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	size, m, err := quicvarint.Parse(b[n:])
	if err != nil || int(size) != len(b)-n-m {
		t.Fatalf("capsule of %d bytes says %d, %v", len(b), size, err)
	}
	return b[n+m:]
}

func prefixes(ss ...string) (out []netip.Prefix) {
	for _, s := range ss {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func TestRoutes(t *testing.T) {
	in := prefixes("fd00::/8", "10.1.0.0/16", "10.0.0.0/8", "192.168.0.0/24", "0.0.0.0/32", "10.0.0.0/8")
	got, err := parseRoutes(capsuleBody(t, appendRoutes(nil, in)))
	if want := prefixes("0.0.0.0/32", "10.0.0.0/8", "192.168.0.0/24", "fd00::/8"); err != nil || !slices.Equal(got, want) {
		t.Fatalf("%v, %v", got, err)
	}
	everything := prefixes("0.0.0.0/0", "::/0")
	if got, err := parseRoutes(capsuleBody(t, appendRoutes(nil, everything))); err != nil || !slices.Equal(got, everything) {
		t.Fatalf("%v, %v", got, err)
	}
	// A range that is no prefix.
	got = appendRange(nil, netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.6"))
	if want := prefixes("10.0.0.1/32", "10.0.0.2/31", "10.0.0.4/31", "10.0.0.6/32"); !slices.Equal(got, want) {
		t.Fatalf("%v", got)
	}
	for _, bad := range [][]byte{{5}, {4, 1, 2}, {4, 10, 0, 0, 2, 10, 0, 0, 1, 0}, {4, 10, 0, 0, 1, 10, 0, 0, 2}} {
		if got, err := parseRoutes(bad); err == nil {
			t.Errorf("%x: %v", bad, got)
		}
	}
}

func TestAddressRequests(t *testing.T) {
	assigned := prefixes("100.112.0.7/32", "fd00::7/128")
	requests := []assignment{
		{1, netip.MustParsePrefix("0.0.0.0/32")},     // any
		{2, netip.MustParsePrefix("fd00::7/128")},    // its own
		{3, netip.MustParsePrefix("100.112.0.8/32")}, // another's
		{4, netip.MustParsePrefix("::/128")},         // a second one
	}
	got, err := parseAddresses(capsuleBody(t, answerAddresses(requests, assigned)))
	if err != nil || len(got) != 4 {
		t.Fatalf("%v, %v", got, err)
	}
	for i, want := range []struct {
		id      uint64
		refused bool
	}{{1, false}, {2, false}, {3, true}, {4, true}} {
		if got[i].id != want.id || got[i].refused() != want.refused {
			t.Errorf("entry %d: %+v", i, got[i])
		}
	}
	if got[0].prefix != assigned[0] || got[1].prefix != assigned[1] {
		t.Errorf("%v", got)
	}
	for _, bad := range [][]byte{{0}, {0, 4, 1, 2, 3, 4}, {0, 4, 1, 2, 3, 4, 33}, {0, 4, 1, 2, 3, 4, 8}, {0, 5, 1}} {
		if got, err := parseAddresses(bad); err == nil {
			t.Errorf("%x: %v", bad, got)
		}
	}
}

func TestPacketTooBig(t *testing.T) {
	b := make([]byte, lenIPv6+1400)
	b[0], b[6], b[7] = 0x60, ipUDP, 2
	binary.BigEndian.PutUint16(b[4:], 1400)
	src, dst := netip.MustParseAddr("fd00::7"), netip.MustParseAddr("fd01::1")
	copy(b[8:], src.AsSlice())
	copy(b[24:], dst.AsSlice())
	h, ok := parseIP(b)
	if !ok || !h.bulk || h.src != src || h.dst != dst {
		t.Fatalf("%+v", h)
	}
	p := packetTooBig(b, h)
	got, ok := parseIP(p)
	if !ok || !got.icmpError || got.dst != src || len(p) > leastMTU || binary.BigEndian.Uint32(p[lenIPv6+4:]) != leastMTU {
		t.Fatalf("%x", p)
	}
	if s := sum(uint32(len(p)-lenIPv6)+ipICMPv6, p[8:40]); sum(uint32(s), p[lenIPv6:]) != 0xffff {
		t.Error("wrong checksum")
	}
	if packetTooBig(p, got) != nil {
		t.Error("an ICMP error was answered")
	}
	v4 := ping("100.112.0.7", "10.0.3.9", 5)
	takeHop(v4)
	if h, ok := parseIP(v4); !ok || h.hops != 63 {
		t.Errorf("after a hop: %+v", h)
	}
}

func FuzzIPCapsules(f *testing.F) {
	f.Add([]byte{1, 4, 10, 0, 0, 1, 32, 2, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 128})
	f.Add([]byte{4, 10, 0, 0, 1, 10, 0, 0, 9, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if as, err := parseAddresses(b); err == nil {
			if _, err := parseAddresses(capsuleBody(t, answerAddresses(as, prefixes("100.112.0.7/32")))); err != nil {
				t.Fatalf("own answer: %v", err)
			}
		}
		if rs, err := parseRoutes(b); err == nil {
			for _, r := range rs {
				if r != r.Masked() {
					t.Fatalf("route %v", r)
				}
			}
		}
	})
}

// connect-ip-go as the gateway: what it assigns, routes and echoes must come through here.
func TestForeignIPServer(t *testing.T) {
	w := &world{
		t: t, ca: newTestCA(t, "acme"), merged: newMerged(t, MergedConfig{}),
		gateway: identity.Node{Org: "acme", Kind: identity.Gateway, ID: "g-one"},
		client:  identity.Node{Org: "acme", Kind: identity.Client, ID: "c-one"},
	}
	w.cert = w.ca.leaf(w.client, x509.ExtKeyUsageClientAuth)
	serve := ServeConfig{
		Node: w.gateway, Certificate: always(w.ca.leaf(w.gateway, x509.ExtKeyUsageServerAuth)), Trust: w.ca.trust, Handler: &testHandler{},
	}
	if err := serve.validate(); err != nil {
		t.Fatal(err)
	}
	tr := &quic.Transport{Conn: w.merged}
	ln, err := tr.Listen(serve.tls(), &quic.Config{EnableDatagrams: true})
	if err != nil {
		t.Fatal(err)
	}
	srv := &http3.Server{EnableDatagrams: true, Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		req, err := connectip.ParseProxyRequest(r, uritemplate.MustNew("https://gateway.example"+ipPath))
		if err != nil {
			t.Errorf("request: %v", err)
			return
		}
		c, err := new(connectip.Proxy).Proxy(rw, req)
		if err != nil {
			t.Errorf("proxy: %v", err)
			return
		}
		defer c.Close()
		_ = c.AssignAddresses(prefixes("100.112.0.7/32"))
		_ = c.AdvertiseRoute([]connectip.IPRoute{{StartIP: netip.MustParseAddr("10.0.3.0"), EndIP: netip.MustParseAddr("10.0.3.255")}})
		b := make([]byte, 2000)
		n, err := c.ReadPacket(b)
		if err != nil {
			t.Errorf("read: %v", err)
			return
		}
		src := [4]byte(b[12:16])
		copy(b[12:16], b[16:20])
		copy(b[16:20], src[:])
		b[20] = 0
		_, _ = c.WritePacket(b[:n])
		_, _ = c.ReadPacket(b) // until the client closes
	})}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = srv.ServeListener(ln)
	}()
	t.Cleanup(func() { srv.Close(); ln.Close(); tr.Close(); <-served })
	_, h3 := foreign(t, w, nil)
	<-h3.ReceivedSettings()
	str, err := h3.OpenRequestStream(timeout(t, 5*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	req, err := connectRequest(protoIP, "gateway.example", ipPath)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set(http3.CapsuleProtocolHeader, capsuleProtocol)
	if err := str.SendRequestHeader(req); err != nil {
		t.Fatal(err)
	}
	if rsp, err := str.ReadResponse(); err != nil || rsp.StatusCode != 200 {
		t.Fatalf("%+v, %v", rsp, err)
	}
	c := newIPConn(t.Context(), str, nil, true)
	c.start()
	defer c.Close()
	select {
	case <-c.learned:
	case <-time.After(5 * time.Second):
		t.Fatal("no addresses")
	}
	if !slices.Equal(c.Assigned(), prefixes("100.112.0.7/32")) || !slices.Equal(c.Routes(), prefixes("10.0.3.0/24")) {
		t.Fatalf("%v, %v", c.Assigned(), c.Routes())
	}
	if _, err := c.WritePacket(ping("100.112.0.7", "10.0.3.9", 10)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, MaxIPPacket)
	if n, err := c.ReadPacket(b); err != nil || n != 38 || b[20] != 0 {
		t.Fatalf("%x, %v", b[:n], err)
	}
}
