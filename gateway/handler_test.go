package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sallyway/internal/daemon"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/netstack"
	"sallyway/tunnel"
)

var peer1, peer2 = tunnel.Peer{Node: client1}, tunnel.Peer{Node: client2}

func target(proto policy.Proto, host string, port uint16) policy.Target {
	t := policy.Target{Proto: proto, Host: host, Port: port}
	if a, err := netip.ParseAddr(host); err == nil {
		t.Addr = a.Unmap()
	}
	return t
}

// fullPort is a port on loopback that answers nobody: its queue of connections is full, so that the kernel drops every SYN.
func fullPort(t testing.TB) uint16 {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(fd) })
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(sa.(*syscall.SockaddrInet4).Port)
	for range 16 {
		c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), 250*time.Millisecond)
		if err != nil {
			return port
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Skip("this kernel's queue of connections does not fill")
	return 0
}

func TestHandlerDials(t *testing.T) {
	z := newZone(t, map[string]string{"web.corp.example": "127.0.0.1"})
	h := newHandler(t, z, "127.0.0.1", "10.99.0.0/16 80", "::1")
	port := tcpServer(t, "127.0.0.1", func(c *net.TCPConn) { _, _ = io.WriteString(c, "hello"); c.Close() })
	for _, host := range []string{"127.0.0.1", "100.112.0.20", "web.corp.example", "WEB.corp.example."} {
		c, err := h.DialTCP(t.Context(), peer1, target(policy.TCP, host, port))
		if err != nil {
			t.Errorf("%s: %v", host, err)
			continue
		}
		if b, err := io.ReadAll(c); err != nil || string(b) != "hello" {
			t.Errorf("%s: %q, %v", host, b, err)
		}
		c.Close()
	}
	echo := udpEcho(t, "127.0.0.1")
	c, err := h.DialUDP(t.Context(), peer1, target(policy.UDP, "100.112.0.20", echo))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _ = c.Write([]byte("x"))
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := c.Read(make([]byte, 10)); n != 1 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if got := counted(t, h.metrics.flows.WithLabelValues("tcp", "ok")); got != 4 {
		t.Errorf("%v TCP flows counted, want 4", got)
	}
}

func TestHandlerRefuses(t *testing.T) {
	z := newZone(t, map[string]string{"web.corp.example": "10.99.0.9"})
	h := newHandler(t, z, "127.0.0.1", "10.99.0.0/16 80", "::1")
	short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	for _, c := range []struct {
		name string
		ctx  context.Context
		who  tunnel.Peer
		to   policy.Target
		is   error
		says string
	}{
		{"nobody listens", t.Context(), peer1, target(policy.TCP, "127.0.0.1", closedPort(t)), tunnel.ErrRefused, "refused"},
		{"filtered", short, peer1, target(policy.TCP, "127.0.0.1", fullPort(t)), tunnel.ErrTimeout, "does not answer"},
		{"no rule for this peer", t.Context(), peer2, target(policy.TCP, "127.0.0.1", 80), tunnel.ErrDenied, "default deny"},
		{"a stranger", t.Context(), tunnel.Peer{Node: identity.Node{Org: "evil", Kind: identity.Client, ID: "c-1"}}, target(policy.TCP, "127.0.0.1", 80), tunnel.ErrDenied, "not among"},
		{"a protocol that the resource lacks", t.Context(), peer1, target(policy.UDP, "10.99.0.9", 80), tunnel.ErrDenied, "does not include udp port 80"},
		{"no resource", t.Context(), peer1, target(policy.TCP, "192.0.2.1", 80), tunnel.ErrDenied, "no resource"},
		{"policy says yes, the allow list no", t.Context(), peer1, target(policy.TCP, "127.0.0.2", 80), tunnel.ErrDenied, "loopback"},
		{"a port outside of the allow list", t.Context(), peer1, target(policy.TCP, "10.99.0.9", 81), tunnel.ErrDenied, "allow list"},
		{"a name that resolves to outside of the allow list", t.Context(), peer1, target(policy.TCP, "web.corp.example", 81), tunnel.ErrDenied, "allow list"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var conn net.Conn
			var err error
			if c.to.Proto == policy.UDP {
				conn, err = h.DialUDP(c.ctx, c.who, c.to)
			} else {
				var tc tunnel.Conn
				if tc, err = h.DialTCP(c.ctx, c.who, c.to); tc != nil {
					conn = tc.(net.Conn)
				}
			}
			if conn != nil || !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, %v, want %v that says %q", conn, err, c.is, c.says)
			}
			if errors.Is(err, tunnel.ErrDenied) && tunnel.AsProxyError(err).Rule == "" {
				t.Errorf("%v names no rule", err)
			}
		})
	}
	for _, result := range []tunnel.ErrorType{tunnel.ConnectionRefused, tunnel.ConnectionTimeout, tunnel.RequestDenied, tunnel.DestinationProhibited} {
		if counted(t, h.metrics.flows.WithLabelValues("tcp", string(result))) == 0 {
			t.Errorf("no TCP flow counted as %s", result)
		}
	}
}

func TestAuthorize(t *testing.T) {
	h := newHandler(t, nil)
	for _, p := range []tunnel.Peer{peer1, peer2} {
		if err := h.Authorize(t.Context(), p); err != nil {
			t.Errorf("%v: %v", p.Node, err)
		}
	}
	for _, n := range []identity.Node{
		{Org: "evil", Kind: identity.Client, ID: "c-1"}, {Org: "acme", Kind: identity.Client, ID: "c-9"}, {Org: "acme", Kind: identity.Site, ID: "c-1"}, {},
	} {
		if err := h.Authorize(t.Context(), tunnel.Peer{Node: n}); !errors.Is(err, tunnel.ErrDenied) {
			t.Errorf("%v: %v, want a refusal", n, err)
		}
	}
	h.enforce.stale = func() (bool, error) { return true, errors.New("valid until yesterday") }
	if err := h.Authorize(t.Context(), peer1); !errors.Is(err, tunnel.ErrDenied) || !strings.Contains(err.Error(), "valid until yesterday") {
		t.Errorf("%v, want a refusal that says since when", err)
	}
	h.enforce.snapshot = func() (*policy.Snapshot, error) { return nil, errors.New("none yet") }
	if err := h.Authorize(t.Context(), peer1); err == nil {
		t.Error("a gateway without policies lets in")
	}
}

// Only questions go to the gateway's name servers, which may trust its address with more.
func TestResolveTakesQuestionsOnly(t *testing.T) {
	z := newZone(t, map[string]string{"web.corp.example": "10.99.0.9"})
	h := newHandler(t, z)
	ask := func(change func(*dns.Msg)) error {
		q := new(dns.Msg).SetQuestion("web.corp.example.", dns.TypeA)
		change(q)
		b, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		_, err = h.Resolve(t.Context(), peer1, b)
		return err
	}
	if err := ask(func(*dns.Msg) {}); err != nil {
		t.Fatal(err)
	}
	<-z.queries
	for name, change := range map[string]func(*dns.Msg){
		"AXFR": func(q *dns.Msg) { q.Question[0].Qtype = dns.TypeAXFR }, "IXFR": func(q *dns.Msg) { q.Question[0].Qtype = dns.TypeIXFR },
		"UPDATE": func(q *dns.Msg) { q.Opcode = dns.OpcodeUpdate }, "NOTIFY": func(q *dns.Msg) { q.Opcode = dns.OpcodeNotify },
		"a reply": func(q *dns.Msg) { q.Response = true }, "two questions": func(q *dns.Msg) { q.Question = append(q.Question, q.Question[0]) },
		"none": func(q *dns.Msg) { q.Question = nil }, "another name": func(q *dns.Msg) { q.Question[0].Name = "www.example.com." },
		"the domain above": func(q *dns.Msg) { q.Question[0].Name = "corp.example." },
	} {
		if err := ask(change); err == nil {
			t.Errorf("%s is handed on", name)
		}
		select {
		case got := <-z.queries:
			t.Errorf("%s reached the name server as %s", name, got)
		default:
		}
	}
	h.names.servers = func() ([]string, error) { return nil, nil }
	if err := ask(func(*dns.Msg) {}); err == nil || !strings.Contains(err.Error(), "no name server") {
		t.Errorf("%v", err)
	}
}

// An answer that does not fit a datagram is fetched over TCP, and a dead name server is passed over.
func TestResolveGoesOn(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	pc, err := net.ListenPacket("udp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for _, srv := range []*dns.Server{{Listener: l}, {PacketConn: pc}} {
		overTCP := srv.Listener != nil
		started := make(chan struct{})
		srv.NotifyStartedFunc = func() { close(started) }
		srv.Handler = dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
			m := new(dns.Msg).SetReply(q)
			m.Truncated = !overTCP
			for i := range 200 {
				if overTCP {
					m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.IPv4(10, 99, 0, byte(i))})
				}
			}
			_ = w.WriteMsg(m)
		})
		go func() { _ = srv.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { _ = srv.Shutdown() })
	}
	h := newHandler(t, nil)
	h.names.servers = func() ([]string, error) {
		return []string{fmt.Sprintf("127.0.0.1:%d", closedPort(t)), l.Addr().String()}, nil
	}
	b, err := new(dns.Msg).SetQuestion("web.corp.example.", dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	out, err := h.Resolve(t.Context(), peer1, b)
	if err != nil {
		t.Fatal(err)
	}
	var m dns.Msg
	if err := m.Unpack(out); err != nil || len(m.Answer) != 200 || m.Truncated {
		t.Errorf("%d answers, truncated %v, %v", len(m.Answer), m.Truncated, err)
	}
}

func FuzzResolve(f *testing.F) {
	for _, name := range []string{"web.corp.example.", "www.example.com."} {
		b, err := new(dns.Msg).SetQuestion(name, dns.TypeA).Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{})
	h := newHandler(f, nil) // has no name server: what is asked about ends there
	f.Fuzz(func(t *testing.T, b []byte) {
		if out, err := h.Resolve(context.Background(), peer1, b); err == nil {
			t.Fatalf("%x is answered with %x by nobody", b, out)
		}
	})
}

func FuzzParseAllow(f *testing.F) {
	for _, s := range []string{"10.0.3.0/24 5432,8000-8100", "127.0.0.1", "::/0 all", "10.0.0.0/8 80-70", "x", "10.0.0.0/8  80", "::ffff:10.0.0.0/104"} {
		f.Add(s)
	}
	metadata := netip.MustParseAddr("169.254.169.254")
	f.Fuzz(func(t *testing.T, s string) {
		l, err := ParseAllow([]string{s})
		if err != nil {
			if len(err.Error()) > 600 {
				t.Fatalf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		if len(l.entries) != 1 {
			t.Fatalf("%q makes %d entries", s, len(l.entries))
		}
		// Only an entry inside of the special range opens it.
		if e := l.entries[0].prefix; l.Check(metadata, 80) == nil && (e.Bits() < 16 || !e.Contains(metadata)) {
			t.Fatalf("%q opens %v", s, metadata)
		}
	})
}

// After a restart the QUIC server has the same keys, so that peers learn of the restart from their next packet.
func TestSecretsStay(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	load := func() [2][32]byte {
		t.Helper()
		st, err := daemon.OpenState(dir, "gatewayd", "state")
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		reset, tokens, err := loadSecrets(st)
		if err != nil {
			t.Fatal(err)
		}
		return [2][32]byte{reset, tokens}
	}
	first := load()
	if first[0] == first[1] || first[0] == [32]byte{} || first[1] == [32]byte{} {
		t.Errorf("keys %x", first)
	}
	if again := load(); again != first {
		t.Error("a restart changes the keys")
	}
	path := filepath.Join(dir, secretsFile)
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v, want mode 0600", st.Mode(), err)
	}
	if err := os.WriteFile(path, []byte("cut"), 0o600); err != nil {
		t.Fatal(err)
	}
	damaged := load()
	if damaged == first || damaged[0] == [32]byte{} {
		t.Error("a damaged file is used")
	}
	if load() != damaged {
		t.Error("a damaged file is not replaced for good")
	}
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	st, err := daemon.OpenState(dir, "gatewayd", "state")
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if _, _, err := loadSecrets(st); err == nil {
		t.Error("a folder in its place goes unnoticed")
	}
}

// A peer that is refused again and again is a line, whether by connections or by echo requests, and all of it is counted.
func TestRefusalsAreOneLine(t *testing.T) {
	var log strings.Builder
	h := newHandler(t, nil)
	h.log = slog.New(slog.NewTextHandler(&log, nil))
	h.virtual = func() []netip.Addr { return nil } // no ICMP errors
	x := &ipSession{h: h, peer: peer1, ctx: t.Context()}
	const many = 50
	for i := range many {
		dst := netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})
		if _, err := h.DialTCP(t.Context(), peer1, target(policy.TCP, dst.String(), 22)); !errors.Is(err, tunnel.ErrDenied) {
			t.Fatal(err)
		}
		e := netstack.Echo{Src: clientVirtual[0], Dst: dst, Seq: uint16(i)}
		x.echo(e, e.AppendPacket(nil))
	}
	if lines := strings.Split(strings.TrimSpace(log.String()), "\n"); len(lines) != 2 || !strings.Contains(log.String(), "192.0.2.0") {
		t.Errorf("%d lines:\n%s", len(lines), log.String())
	}
	for _, proto := range []policy.Proto{policy.TCP, policy.ICMP} {
		if n := counted(t, h.metrics.flows.WithLabelValues(string(proto), string(tunnel.RequestDenied))); n != many {
			t.Errorf("%v of %d %s are counted", n, many, proto)
		}
	}
	_, _ = h.DialTCP(t.Context(), peer2, target(policy.TCP, "192.0.2.1", 22)) // another peer's is another's
	if !strings.Contains(log.String(), client2.ID) {
		t.Error("another peer's refusal is not told")
	}
}

// nameServer answers every question with rcode, or with an address where that is no error, and counts the questions.
func nameServer(t *testing.T, rcode int) (addr string, asked *atomic.Int32) {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	asked = new(atomic.Int32)
	started := make(chan struct{})
	srv := &dns.Server{PacketConn: pc, NotifyStartedFunc: func() { close(started) }, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		asked.Add(1)
		m := new(dns.Msg).SetRcode(q, rcode)
		if rcode == dns.RcodeSuccess {
			m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.IPv4(10, 99, 0, 9)})
		}
		_ = w.WriteMsg(m)
	})}
	go func() { _ = srv.ActivateAndServe() }()
	<-started
	t.Cleanup(func() { _ = srv.Shutdown() })
	return pc.LocalAddr().String(), asked
}

// That a name server fails is not the name's fault: the next one is asked, and a few at most.
func TestResolveAsksTheNextServer(t *testing.T) {
	const ok, fails, refuses, unknown, none = dns.RcodeSuccess, dns.RcodeServerFailure, dns.RcodeRefused, dns.RcodeNotImplemented, dns.RcodeNameError
	for name, c := range map[string]struct {
		servers []int
		want    int // rcode
		asked   int // servers
	}{
		"the first fails":        {[]int{fails, ok, ok}, ok, 2},
		"two are of no use":      {[]int{refuses, unknown, ok}, ok, 3},
		"there is no such name":  {[]int{none, ok}, none, 1},
		"it fails, there is not": {[]int{fails, none, ok}, none, 2},
		"all fail":               {[]int{fails, refuses}, fails, 2},
		"too many fail":          {[]int{fails, fails, fails, fails, ok}, fails, dnsServers},
	} {
		t.Run(name, func(t *testing.T) {
			var addrs []string
			var counts []*atomic.Int32
			for _, rcode := range c.servers {
				addr, asked := nameServer(t, rcode)
				addrs, counts = append(addrs, addr), append(counts, asked)
			}
			h := newHandler(t, nil)
			h.names.servers = func() ([]string, error) { return addrs, nil }
			b, err := new(dns.Msg).SetQuestion("web.corp.example.", dns.TypeA).Pack()
			if err != nil {
				t.Fatal(err)
			}
			out, err := h.Resolve(t.Context(), peer1, b)
			if err != nil {
				t.Fatal(err)
			}
			var m dns.Msg
			if err := m.Unpack(out); err != nil || m.Rcode != c.want || (len(m.Answer) == 1) != (c.want == ok) {
				t.Errorf("%v, %v, want rcode %d", m, err, c.want)
			}
			for i, n := range counts {
				if got := int(n.Load()); got != 1 && i < c.asked || got != 0 && i >= c.asked {
					t.Errorf("server %d was asked %d times", i, got)
				}
			}
		})
	}
}
