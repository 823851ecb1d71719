package relay

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/pion/stun/v4"
	"go.uber.org/goleak"

	"sallyway/internal/identity"
	"sallyway/relay/budget"
	"sallyway/relay/wire"
)

func TestMain(m *testing.M) {
	var segment, sockets int
	if n, _ := fmt.Sscan(os.Getenv(floodVariable), &segment, &sockets); n == 2 {
		fmt.Fprintln(os.Stderr, flood(segment, sockets))
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// closedWithin reports whether the relay closes c.
func closedWithin(t *testing.T, c net.Conn, d time.Duration) bool {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(d)); err != nil {
		t.Fatal(err)
	}
	_, err := c.Read(make([]byte, 1))
	ne, timeout := err.(net.Error)
	return err != nil && (!timeout || !ne.Timeout())
}

func tcpConn(t *testing.T, l *lab) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestHandshakeDeadline(t *testing.T) {
	cert, _ := certificate(t)
	l := start(t, func(c *Config) {
		c.Certificate = cert
		c.handshakeTimeout = 100 * time.Millisecond
	})
	silent, halfTLS := tcpConn(t, l), tcpConn(t, l)
	if _, err := halfTLS.Write([]byte{22, 3, 1, 0, 200, 1}); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]net.Conn{"silent": silent, "half a ClientHello": halfTLS} {
		if !closedWithin(t, c, 5*time.Second) {
			t.Errorf("%s: not closed", name)
		}
	}
	until(t, "no connection is left", func() bool {
		l.conns.mu.Lock()
		defer l.conns.mu.Unlock()
		return len(l.conns.all) == 0 && l.conns.half.Len() == 0 && len(l.conns.bySource) == 0
	})
	// DTLS: a ClientHello and nothing more.
	c := dial(t, l, client1)
	c.write(clientHello)
	b, ok := c.receive(5 * time.Second)
	if !ok || len(b) > len(clientHello) {
		t.Errorf("a ClientHello of %d bytes drew %d", len(clientHello), len(b))
	}
	until(t, "the half-open DTLS connection is gone", func() bool {
		_, found := l.dtls.peers.get(c.local())
		l.conns.mu.Lock()
		defer l.conns.mu.Unlock()
		return !found && l.conns.half.Len() == 0
	})
	if b, ok := c.receive(50 * time.Millisecond); ok {
		t.Errorf("a ClientHello without cookie drew more: % x", b)
	}
}

// clientHello is a DTLS 1.2 ClientHello without a cookie (RFC 6347 §4.2.1), in one record.
var clientHello = func() []byte {
	body := []byte{0xFE, 0xFD}                  // version
	body = append(body, make([]byte, 32)...)    // random
	body = append(body, 0, 0)                   // session id, cookie
	body = append(body, 0, 2, 0xC0, 0x2B, 1, 0) // ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, null compression
	ext := []byte{0, 10, 0, 4, 0, 2, 0, 23}     // supported groups: P-256
	ext = append(ext, 0, 11, 0, 2, 1, 0)        // point formats
	ext = append(ext, 0, 13, 0, 4, 0, 2, 4, 3)  // signature algorithms: ECDSA with SHA-256
	ext = append(ext, 0, 23, 0, 0)              // extended master secret
	body = append(body, byte(len(ext)>>8), byte(len(ext)))
	body = append(body, ext...)
	n := len(body)
	hs := append([]byte{1, 0, byte(n >> 8), byte(n), 0, 0, 0, 0, 0, 0, byte(n >> 8), byte(n)}, body...)
	return append([]byte{22, 0xFE, 0xFD, 0, 0, 0, 0, 0, 0, 0, 0, byte(len(hs) >> 8), byte(len(hs))}, hs...)
}()

func TestHalfOpenConnectionsAreBounded(t *testing.T) {
	l := start(t, func(c *Config) { c.Limits.SourceHalfOpen = 3 })
	var open []net.Conn
	for range 3 {
		open = append(open, tcpConn(t, l))
	}
	until(t, "three half-open connections", func() bool {
		l.conns.mu.Lock()
		defer l.conns.mu.Unlock()
		return l.conns.half.Len() == 3
	})
	if !closedWithin(t, tcpConn(t, l), 5*time.Second) {
		t.Error("a fourth half-open connection of a source is kept")
	}
	// Authenticated, a connection counts no more.
	name, password := user(client1, "")
	c := &tester{t: t, conn: open[0], stream: true, username: name, password: password, transport: protocolUDP}
	c.allocate()
	d := tcpDial(t, l, client1, false)
	d.allocate()

	// When the table is full, the oldest gives way.
	var table connections
	table.init(Limits{HalfOpen: 2, SourceHalfOpen: 2, Connections: 10})
	evicted := ""
	first := table.reserve(budget.Source{1}, func() { evicted += "first " })
	table.reserve(budget.Source{2}, func() { evicted += "second " })
	if table.reserve(budget.Source{3}, func() { evicted += "third " }) == nil || evicted != "first " {
		t.Errorf("evicted %q, want the first", evicted)
	}
	table.release(first) // twice given up is once
	if table.half.Len() != 2 || len(table.bySource) != 2 {
		t.Errorf("%d half-open of %d sources", table.half.Len(), len(table.bySource))
	}
}

// TestForgedHellosDoNotKeepOthersOut fills the table of half-open connections with ClientHellos of forged sources.
func TestForgedHellosDoNotKeepOthersOut(t *testing.T) {
	cert, _ := certificate(t)
	l := start(t, func(c *Config) {
		c.Certificate = cert
		c.Limits.HalfOpen = 20
	})
	for i := range 60 {
		l.shards[0].handle(bytes.Clone(clientHello), message(len(clientHello), netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 7, 7, byte(i)}), 9)))
	}
	l.conns.mu.Lock()
	half := l.conns.half.Len()
	l.conns.mu.Unlock()
	if half != 20 {
		t.Errorf("%d half-open, limit 20", half)
	}
	c, _, _ := dtlsDial(t, l, client1, "")
	c.allocate()
}

func TestBytesBeforeAuthenticationAreBounded(t *testing.T) {
	l := start(t, nil)
	c := tcpConn(t, l)
	b := stun.MustBuild(stun.BindingRequest, stun.TransactionID).Raw
	go func() { // what is answered must be read, or the writes block
		buf := make([]byte, 4096)
		for {
			if _, err := c.Read(buf); err != nil {
				return
			}
		}
	}()
	if err := c.SetWriteDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	sent := 0
	for {
		if _, err := c.Write(b); err != nil {
			break
		}
		if sent += len(b); sent > 100*maxPreAuth {
			t.Fatal("no end to what may be sent before authentication")
		}
	}
}

func TestConnectionsWithoutAllocationAreClosed(t *testing.T) {
	l := start(t, nil)
	idle, c := tcpDial(t, l, client1, false), tcpDial(t, l, client1, false)
	idle.want(0, idle.once(stun.MethodBinding))
	c.allocate()
	l.sweep()
	l.clock.advance(authTimeout + time.Second)
	l.sweep()
	if !closedWithin(t, idle.conn, 5*time.Second) {
		t.Error("a connection that never allocates is kept")
	}
	c.want(0, c.do(stun.MethodRefresh, lifetime(0)))
	l.sweep()
	l.clock.advance(authTimeout + time.Second)
	l.sweep()
	if !closedWithin(t, c.conn, 5*time.Second) {
		t.Error("a connection whose allocation ended is kept")
	}
}

func TestOldTLSIsRefused(t *testing.T) {
	cert, _ := certificate(t)
	l := start(t, func(c *Config) { c.Certificate = cert })
	for version, ok := range map[uint16]bool{tls.VersionTLS10: false, tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true} {
		c, err := tls.Dial("tcp4", l.Addr().String(), &tls.Config{InsecureSkipVerify: true, MinVersion: version, MaxVersion: version})
		if (err == nil) != ok {
			t.Errorf("%s: %v", tls.VersionName(version), err)
		}
		if err == nil {
			c.Close()
		}
	}
}

// TestCertificateIsRenewedWithoutRestart changes what the callback returns between two handshakes.
func TestCertificateIsRenewedWithoutRestart(t *testing.T) {
	first, _ := certificate(t)
	second, _ := certificate(t)
	now := make(chan func() (*tls.Certificate, error), 1)
	l := start(t, func(c *Config) {
		c.Certificate = func() (*tls.Certificate, error) {
			f := <-now
			now <- f
			return f()
		}
	})
	for _, f := range []func() (*tls.Certificate, error){first, second} {
		now <- f
		c, err := tls.Dial("tcp4", l.Addr().String(), &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		want, _ := f()
		if got := c.ConnectionState().PeerCertificates[0]; !bytes.Equal(got.Raw, want.Certificate[0]) {
			t.Error("the handshake shows another certificate")
		}
		c.Close()
		<-now
	}
}

// TestForgedRecordsDoNotHurtDTLS sends what an off-path attacker could send in a connected client's name.
func TestForgedRecordsDoNotHurtDTLS(t *testing.T) {
	cert, _ := certificate(t)
	l := start(t, func(c *Config) { c.Certificate = cert })
	c, sock, _ := dtlsDial(t, l, client1, wire.FlagPlainData)
	c.allocate()
	for _, forged := range [][]byte{
		{21, 0xFE, 0xFD, 0, 0, 0, 0, 0, 0, 0, 9, 0, 2, 2, 40},                                               // fatal alert in the clear
		{21, 0xFE, 0xFD, 0, 0, 0, 0, 0, 0, 0, 9, 0, 2, 1, 0},                                                // close_notify in the clear
		{22, 0xFE, 0xFD, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 21, 0xFE, 0xFD, 0, 0, 0, 0, 0, 0, 0, 9, 0, 2, 2, 40}, // behind an empty handshake record
		{23, 0xFE, 0xFD, 0, 1, 0, 0, 0, 0, 0, 99, 0, 4, 1, 2, 3, 4},                                         // encrypted garbage
		{20, 0xFE, 0xFD, 0, 0, 0, 0, 0, 0, 0, 9, 0, 1, 1},                                                   // change cipher spec
		{22, 0xFE, 0xFD, 0xFF}, // truncated
		clientHello,
	} {
		for range 3 {
			l.shards[0].handle(bytes.Clone(forged), message(len(forged), sock.LocalAddr().(*net.UDPAddr).AddrPort()))
		}
	}
	c.want(0, c.do(stun.MethodRefresh))
	if l.Allocations() != 1 {
		t.Error("the allocation is gone")
	}
}

// TestNewDTLSConnectionReplacesTheOld restarts a client on the same port: the old allocation ends when the new handshake completes.
func TestNewDTLSConnectionReplacesTheOld(t *testing.T) {
	cert, _ := certificate(t)
	l := start(t, func(c *Config) { c.Certificate = cert })
	sock, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	addr := sock.LocalAddr().(*net.UDPAddr)
	a, _, _ := dtlsOver(t, l, client1, wire.FlagPlainData, sock)
	a.allocate()
	sock.Close() // without a goodbye
	again, err := net.ListenUDP("udp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	b, _, _ := dtlsOver(t, l, client1, wire.FlagPlainData, again)
	b.allocate()
	if n := l.Allocations(); n != 1 {
		t.Errorf("%d allocations, want the new one alone", n)
	}
	b.want(0, b.do(stun.MethodRefresh))
}

// TestStopTellsClients stops a relay and looks at what its clients notice.
func TestStopTellsClients(t *testing.T) {
	cert, _ := certificate(t)
	l := start(t, func(c *Config) { c.Certificate = cert })
	secure, _, _ := dtlsDial(t, l, client1, "")
	secure.allocate()
	stream := tcpDial(t, l, gateway1, true)
	stream.allocate()
	l.stop()
	if !closedWithin(t, secure.conn, 5*time.Second) {
		t.Error("the DTLS client is not told")
	}
	if !closedWithin(t, stream.conn, 5*time.Second) {
		t.Error("the TLS client is not told")
	}
}

// TestIPv6Relay runs a relay that has no IPv4.
func TestIPv6Relay(t *testing.T) {
	l := start(t, func(c *Config) { c.Listen = netip.MustParseAddrPort("[::1]:0") })
	name, password := user(client1, "")
	dial6 := func(n identity.Node) *tester {
		conn, err := net.Dial("udp6", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		name, password = user(n, "")
		return &tester{t: t, conn: conn, username: name, password: password, transport: protocolUDP}
	}
	a, g := dial6(client1), dial6(gateway1)
	a.want(stun.CodeAddrFamilyNotSupported, a.tryAllocate(raw{stun.AttrRequestedAddressFamily, []byte{1, 0, 0, 0}}))
	a.want(0, a.tryAllocate(raw{stun.AttrRequestedAddressFamily, []byte{2, 0, 0, 0}}))
	g.allocate()
	if !a.relayed.Addr().Is6() || !g.relayed.Addr().Is6() {
		t.Errorf("relayed %v, %v", a.relayed, g.relayed)
	}
	a.want(0, a.bind(0x4000, g.relayed))
	g.want(0, g.bind(0x4000, a.relayed))
	a.write(channelData(0x4000, "six"))
	g.wantData(0x4000, "six")
}

// TestWildcardAndShards listens on every address with two sockets, and asks by IPv4 and IPv6.
func TestWildcardAndShards(t *testing.T) {
	l := start(t, func(c *Config) {
		c.Listen, c.Advertise, c.Shards = netip.MustParseAddrPort("[::]:0"), netip.MustParseAddr("127.0.0.1"), 2
	})
	var clients []*tester
	for i, host := range []string{"127.0.0.1", "127.0.0.3", "::1", "::1", "127.0.0.1", "127.0.0.1"} {
		conn, err := net.Dial("udp", netip.AddrPortFrom(netip.MustParseAddr(host), l.Addr().Port()).String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		n := []identity.Node{client1, gateway1}[i%2]
		name, password := user(n, "")
		c := &tester{t: t, conn: conn, username: name, password: password, transport: protocolUDP}
		c.allocate()
		clients = append(clients, c)
	}
	for i := 0; i < len(clients); i += 2 {
		a, g := clients[i], clients[i+1]
		a.want(0, a.bind(0x4000, g.relayed))
		g.want(0, g.bind(0x4001, a.relayed))
		a.write(channelData(0x4000, "across"))
		g.wantData(0x4001, "across")
		g.write(channelData(0x4001, "back"))
		a.wantData(0x4000, "back")
	}
}

// TestIdleDTLSIsSmall makes connections whose clients then vanish, and looks at what the relay's side of them takes.
func TestIdleDTLSIsSmall(t *testing.T) {
	const n = 200
	cert, _ := certificate(t)
	l := start(t, func(c *Config) {
		c.Certificate = cert
		c.Limits.SourceHandshakes, c.Limits.SourceHalfOpen = 10*n, n
	})
	used := func() uint64 {
		for range 6 { // pools are emptied and stacks halved one collection at a time
			runtime.GC()
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	before, goroutines := used(), runtime.NumGoroutine()
	t.Run("clients", func(t *testing.T) { // what they leave behind goes with the end of this
		for i := range n {
			sock, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
			if err != nil {
				t.Fatal(err)
			}
			c, _, _ := dtlsOver(t, l, node("acme", identity.Client, fmt.Sprintf("c%d", i)), wire.FlagPlainData, sock)
			c.allocate()
			sock.Close() // without a goodbye
			c.conn.Close()
		}
	})
	until(t, "all are parked", func() bool { return runtime.NumGoroutine()-goroutines <= 5 })
	if l.Allocations() < n*9/10 {
		t.Fatalf("%d of %d allocations", l.Allocations(), n)
	}
	each := (used() - before) / n
	t.Logf("%d bytes for each of %d idle DTLS connections", each, n)
	const most = 16 << 10 // what the race detector adds included
	if each > most {
		t.Errorf("%d bytes each", each)
	}
}

// TestControlDropsAreCountedApart: a message of the relay's own that does not get through is no datagram that was not relayed, and one for a
// connection that is over is nothing at all.
func TestControlDropsAreCountedApart(t *testing.T) {
	l := start(t, nil)
	full := make([]byte, maxQueuedControl)
	slow := &conn{s: l.Server, pending: &full, writing: true}
	for what, x := range map[string]struct {
		c    *conn
		want uint64
	}{
		"closed":  {&conn{s: l.Server, closed: true}, 0},
		"closing": {&conn{s: l.Server, closing: true}, 0},
		"full":    {slow, 1},
	} {
		before := l.count.controlDrops.Load()
		l.write(&origin{conn: x.c}, make([]byte, 20))
		if got := l.count.controlDrops.Load() - before; got != x.want {
			t.Errorf("%s: %d counted, want %d", what, got, x.want)
		}
	}
	if n := l.count.queueDrops.Load(); n != 0 {
		t.Errorf("%d datagrams count as dropped", n)
	}
}
