package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

// upstream is one of the host's own resolvers: a DNS server over UDP and TCP on one loopback port.
type upstream struct {
	addr netip.AddrPort
	mu   sync.Mutex
	nets []string // of the queries
}

func newUpstream(t testing.TB, handle func(network string, q *dns.Msg) *dns.Msg) *upstream {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u := &upstream{addr: l.Addr().(*net.TCPAddr).AddrPort()}
	pc, err := net.ListenPacket("udp", u.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	for _, srv := range []*dns.Server{{Listener: l}, {PacketConn: pc}} {
		network := "tcp"
		if srv.PacketConn != nil {
			network = "udp"
		}
		started := make(chan struct{})
		srv.NotifyStartedFunc = func() { close(started) }
		srv.Handler = dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
			u.mu.Lock()
			u.nets = append(u.nets, network)
			u.mu.Unlock()
			_ = w.WriteMsg(handle(network, q))
		})
		go func() { _ = srv.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { _ = srv.Shutdown() })
	}
	return u
}

func (u *upstream) asked() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return strings.Join(u.nets, " ")
}

func newStub(ups ...netip.AddrPort) *stub {
	tab := newTable(testDialling())
	return &stub{
		log: slog.New(slog.DiscardHandler), table: func() *table { return tab }, upstreams: func() []netip.AddrPort { return ups },
		resolve: func(context.Context, []identity.Node, []byte) ([]byte, error) {
			return nil, errors.New("no gateway here")
		},
	}
}

// ask packs, asks and unpacks; size as for answer.
func (s *stub) ask(t testing.TB, q *dns.Msg, size int) *dns.Msg {
	t.Helper()
	b, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	a := s.answer(t.Context(), b, size)
	if a == nil {
		t.Fatalf("no answer to %v", q)
	}
	if size == dns.MaxMsgSize {
		size = 65535
	} else if opt := q.IsEdns0(); opt != nil {
		size = max(dns.MinMsgSize, int(opt.UDPSize()))
	}
	if len(a) > size {
		t.Errorf("answer of %d bytes where %d fit", len(a), size)
	}
	m := new(dns.Msg)
	if err := m.Unpack(a); err != nil {
		t.Fatal(err)
	}
	if m.Id != q.Id || !m.Response || (q.Opcode == dns.OpcodeQuery && (len(m.Question) != 1 || m.Question[0] != q.Question[0])) {
		t.Errorf("answer does not fit its question: %v", m)
	}
	return m
}

func question(name string, typ uint16) *dns.Msg {
	q := new(dns.Msg).SetQuestion(name, typ)
	q.Id = 0xbeef
	return q
}

func answers(m *dns.Msg) string {
	var out []string
	for _, rr := range m.Answer {
		switch rr := rr.(type) {
		case *dns.A:
			out = append(out, rr.A.String())
		case *dns.AAAA:
			out = append(out, rr.AAAA.String())
		default:
			out = append(out, rr.String())
		}
		if rr.Header().Ttl > 60 {
			out = append(out, fmt.Sprintf("TTL %d", rr.Header().Ttl))
		}
	}
	return strings.Join(out, " ")
}

func TestStubAnswersFromTheTable(t *testing.T) {
	s := newStub()
	for _, c := range []struct {
		name  string
		typ   uint16
		rcode int
		want  string
	}{
		{"db.acme.sallyway.internal.", dns.TypeA, dns.RcodeSuccess, "100.112.0.10"},
		{"db.acme.sallyway.internal.", dns.TypeAAAA, dns.RcodeSuccess, "fd77::10"},
		{"dB.aCMe.SALLYWAY.internal.", dns.TypeA, dns.RcodeSuccess, "100.112.0.10"}, // 0x20: the question comes back as it was asked
		{"db.acme.sallyway.internal.", dns.TypeMX, dns.RcodeSuccess, ""},
		{"db.acme.sallyway.internal.", dns.TypeHTTPS, dns.RcodeSuccess, ""},
		{"db.acme.sallyway.internal.", dns.TypeANY, dns.RcodeSuccess, ""},
		{"db.corp.example.", dns.TypeA, dns.RcodeSuccess, "100.112.0.10"}, // its own name leads into the tunnel, too
		{"office.acme.sallyway.internal.", dns.TypeA, dns.RcodeSuccess, "100.112.0.5"},
		{"office.acme.sallyway.internal.", dns.TypeAAAA, dns.RcodeSuccess, "fd77::5"},
		{"host.acme.sallyway.internal.", dns.TypeAAAA, dns.RcodeSuccess, ""}, // has only IPv4
		{"lan.acme.sallyway.internal.", dns.TypeA, dns.RcodeSuccess, ""},     // a subnet has no address of its own
		{"weighed.acme.sallyway.internal.", dns.TypeA, dns.RcodeSuccess, "192.168.1.1"},
		{"nobody.acme.sallyway.internal.", dns.TypeA, dns.RcodeNameError, ""},
		{"db.other.sallyway.internal.", dns.TypeA, dns.RcodeNameError, ""},
		{"sallyway.internal.", dns.TypeSOA, dns.RcodeNameError, ""},
		{"xsallyway.internal.", dns.TypeA, dns.RcodeRefused, ""},
		{"db.", dns.TypeA, dns.RcodeRefused, ""}, // a bare label is the search list's business
		{"example.com.", dns.TypeA, dns.RcodeRefused, ""},
		{".", dns.TypeNS, dns.RcodeRefused, ""},
	} {
		m := s.ask(t, question(c.name, c.typ), dns.MinMsgSize)
		if m.Rcode != c.rcode || answers(m) != c.want {
			t.Errorf("%s %s: %s %q, want %s %q", c.name, dns.TypeToString[c.typ], dns.RcodeToString[m.Rcode], answers(m), dns.RcodeToString[c.rcode], c.want)
		}
	}
}

func TestStubLeavesWhatIsNoQuery(t *testing.T) {
	s := newStub()
	two := question("db.acme.sallyway.internal.", dns.TypeA)
	two.Question = append(two.Question, two.Question[0])
	none := &dns.Msg{}
	reply := question("db.acme.sallyway.internal.", dns.TypeA)
	reply.Response = true // answering replies would make two stubs play ping-pong
	for name, q := range map[string]*dns.Msg{"two questions": two, "none": none, "a reply": reply} {
		b, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		if a := s.answer(t.Context(), b, dns.MinMsgSize); a != nil {
			t.Errorf("%s: answered with %x", name, a)
		}
	}
	for _, b := range [][]byte{nil, {}, {0}, make([]byte, 11), []byte("GET / HTTP/1.1\r\n\r\n")} {
		if a := s.answer(t.Context(), b, dns.MinMsgSize); a != nil {
			t.Errorf("%x: answered with %x", b, a)
		}
	}
}

// What is not a plain query is neither answered as one nor handed on: an UPDATE has a question section, too.
func TestStubServesQueriesOnly(t *testing.T) {
	up := newUpstream(t, func(_ string, q *dns.Msg) *dns.Msg { return new(dns.Msg).SetReply(q) })
	s := newStub(up.addr)
	s.resolve = func(context.Context, []identity.Node, []byte) ([]byte, error) {
		t.Error("a gateway is asked")
		return nil, errors.New("no")
	}
	for _, name := range []string{"db.acme.sallyway.internal.", "x.corp.example.", "example.com."} {
		for _, op := range []int{dns.OpcodeUpdate, dns.OpcodeNotify, dns.OpcodeIQuery} {
			q := question(name, dns.TypeSOA)
			q.Opcode = op
			if m := s.ask(t, q, dns.MinMsgSize); m.Rcode != dns.RcodeNotImplemented || m.Opcode != op {
				t.Errorf("%s %s: %v", name, dns.OpcodeToString[op], m)
			}
		}
	}
	if up.asked() != "" {
		t.Errorf("the host's resolver was asked over %s", up.asked())
	}
}

// Names of domains that lie behind a gateway are resolved there.
func TestStubAsksTheGateway(t *testing.T) {
	s := newStub()
	var asked []identity.Node
	s.resolve = func(_ context.Context, g []identity.Node, query []byte) ([]byte, error) {
		asked = g
		q := new(dns.Msg)
		if err := q.Unpack(query); err != nil {
			return nil, err
		}
		m := new(dns.Msg).SetReply(q)
		m.Id = 0 // as RFC 8484 has it
		rr, err := dns.NewRR(q.Question[0].Name + " 60 IN A 10.0.3.7")
		m.Answer = append(m.Answer, rr)
		b, _ := m.Pack()
		return b, err
	}
	for name, gateway := range map[string]identity.Node{
		"x.intra.example.": gateway2, "corp.example.": gateway2, "a.apps.example.": gateway1, "www.six.example.": gateway1, "shop.apps.example.": gateway2,
	} {
		if name == "shop.apps.example." { // known by name, without an address
			continue
		}
		m := s.ask(t, question(name, dns.TypeA), dns.MinMsgSize)
		if answers(m) != "10.0.3.7" || len(asked) == 0 || asked[0] != gateway {
			t.Errorf("%s: %v from %v, want gateway %v", name, answers(m), asked, gateway)
		}
	}
	s.resolve = func(context.Context, []identity.Node, []byte) ([]byte, error) { return nil, errors.New("session over") }
	if m := s.ask(t, question("x.intra.example.", dns.TypeA), dns.MinMsgSize); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("%v, want SERVFAIL", m)
	}
	s.resolve = func(context.Context, []identity.Node, []byte) ([]byte, error) { return []byte("nonsense"), nil }
	if m := s.ask(t, question("x.intra.example.", dns.TypeA), dns.MinMsgSize); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("%v, want SERVFAIL", m)
	}
}

// The same over a real session: DNS over HTTPS at the gateway.
func TestStubOverASession(t *testing.T) {
	h := newHarness(t)
	s := &stub{log: h.log, table: h.Sessions.table.Load, resolve: h.Resolve, upstreams: func() []netip.AddrPort { return nil }}
	if m := s.ask(t, question("www.corp.example.", dns.TypeA), dns.MinMsgSize); answers(m) != "10.0.3.7" {
		t.Errorf("%v", m)
	}
	if m := s.ask(t, question("www.corp.example.", dns.TypeAAAA), dns.MinMsgSize); m.Rcode != dns.RcodeSuccess || answers(m) != "" {
		t.Errorf("%v", m)
	}
}

func TestStubForwardsTheRest(t *testing.T) {
	big := func(q *dns.Msg) *dns.Msg {
		m := new(dns.Msg).SetReply(q)
		for i := range 200 {
			rr, err := dns.NewRR(fmt.Sprintf("%s 60 IN A 192.0.2.%d", q.Question[0].Name, i%250))
			if err != nil {
				t.Error(err)
			}
			m.Answer = append(m.Answer, rr)
		}
		return m
	}
	up := newUpstream(t, func(network string, q *dns.Msg) *dns.Msg {
		switch q.Question[0].Name {
		case "big.example.com.":
			m := big(q)
			if network == "udp" {
				m.Answer, m.Truncated = nil, true
			}
			return m
		case "absent.example.com.":
			return new(dns.Msg).SetRcode(q, dns.RcodeNameError)
		}
		m := new(dns.Msg).SetReply(q)
		rr, err := dns.NewRR(q.Question[0].Name + " 60 IN A 192.0.2.1")
		if err != nil {
			t.Error(err)
		}
		m.Answer = append(m.Answer, rr)
		return m
	})
	s := newStub(up.addr)
	if m := s.ask(t, question("www.example.com.", dns.TypeA), dns.MinMsgSize); answers(m) != "192.0.2.1" || up.asked() != "udp" {
		t.Errorf("%v over %s", m, up.asked())
	}
	if m := s.ask(t, question("absent.example.com.", dns.TypeA), dns.MinMsgSize); m.Rcode != dns.RcodeNameError {
		t.Errorf("%v", m)
	}
	// Truncated over UDP: asked again over TCP; the whole goes out over TCP, what fits over UDP.
	if m := s.ask(t, question("big.example.com.", dns.TypeA), dns.MaxMsgSize); len(m.Answer) != 200 || m.Truncated || !strings.HasSuffix(up.asked(), "udp tcp") {
		t.Errorf("%d answers, truncated %v, over %s", len(m.Answer), m.Truncated, up.asked())
	}
	small := s.ask(t, question("big.example.com.", dns.TypeA), dns.MinMsgSize)
	if len(small.Answer) == 0 || len(small.Answer) >= 200 || !small.Truncated {
		t.Errorf("%d answers, truncated %v", len(small.Answer), small.Truncated)
	}
	q := question("big.example.com.", dns.TypeA)
	q.SetEdns0(1232, false)
	if m := s.ask(t, q, dns.MinMsgSize); len(m.Answer) <= len(small.Answer) || !m.Truncated {
		t.Errorf("with EDNS %d answers, without %d, truncated %v", len(m.Answer), len(small.Answer), m.Truncated)
	}
	// What is ours never goes to them.
	before := up.asked()
	for _, name := range []string{"db.acme.sallyway.internal.", "nobody.acme.sallyway.internal.", "x.intra.example."} {
		s.ask(t, question(name, dns.TypeA), dns.MinMsgSize)
	}
	if up.asked() != before {
		t.Error("names behind gateways leak to the host's resolver")
	}
}

// The first resolver that answers does; a dead one is passed over.
func TestStubPassesOverADeadResolver(t *testing.T) {
	up := newUpstream(t, func(_ string, q *dns.Msg) *dns.Msg { return new(dns.Msg).SetReply(q) })
	dead := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), closedPort(t))
	if m := newStub(dead, up.addr).ask(t, question("example.com.", dns.TypeA), dns.MinMsgSize); m.Rcode != dns.RcodeSuccess {
		t.Errorf("%v", m)
	}
	if m := newStub(dead).ask(t, question("example.com.", dns.TypeA), dns.MinMsgSize); m.Rcode != dns.RcodeRefused {
		t.Errorf("%v", m)
	}
}

// A query with EDNS gets an answer with EDNS (RFC 6891 §6.1.1), one without does not.
func TestStubSpeaksEDNS(t *testing.T) {
	s := newStub()
	for _, name := range []string{"db.acme.sallyway.internal.", "nobody.acme.sallyway.internal.", "example.com."} {
		q := question(name, dns.TypeA)
		if m := s.ask(t, q, dns.MinMsgSize); m.IsEdns0() != nil {
			t.Errorf("%s: EDNS out of the blue", name)
		}
		q.SetEdns0(4096, true)
		if m := s.ask(t, q, dns.MinMsgSize); m.IsEdns0() == nil || m.IsEdns0().UDPSize() < dns.MinMsgSize {
			t.Errorf("%s: no EDNS in the answer: %v", name, m)
		}
	}
}

func FuzzStubAnswer(f *testing.F) {
	for _, name := range []string{"db.acme.sallyway.internal.", "x.corp.example.", "nobody.acme.sallyway.internal.", "example.com."} {
		q := question(name, dns.TypeA)
		b, err := q.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, b)
		q.SetEdns0(70, true)
		if b, err = q.Pack(); err != nil {
			f.Fatal(err)
		}
		f.Add(b, []byte{})
	}
	f.Add([]byte{0xbe, 0xef, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 0x0c, 0, 1, 0, 1}, []byte("x")) // a name that points at itself
	s := newStub()
	f.Fuzz(func(t *testing.T, query, fromGateway []byte) {
		s.resolve = func(context.Context, []identity.Node, []byte) ([]byte, error) { return fromGateway, nil }
		for _, size := range []int{dns.MinMsgSize, dns.MaxMsgSize} {
			a := s.answer(t.Context(), query, size)
			if a == nil {
				continue
			}
			limit := 65535
			if size == dns.MinMsgSize {
				limit = 4096
			}
			var m dns.Msg
			if err := m.Unpack(a); err != nil || len(a) > limit || len(query) < 2 || a[0] != query[0] || a[1] != query[1] {
				t.Fatalf("%x is answered with %x: %v", query, a, err)
			}
		}
	})
}

// The gateway of the resource that names a name most closely resolves it, in whatever order resources come, and a name that belongs to
// gateways of which this node knows none is asked of nobody else.
func TestStubAsksTheClosestGateway(t *testing.T) {
	up := newUpstream(t, func(_ string, q *dns.Msg) *dns.Msg { return new(dns.Msg).SetReply(q) })
	d := anyDialling()
	d.Gateways = append(d.Gateways, control.GatewayRef{Node: gateway2, Name: "lab"})
	d.Resources = []control.ReachableResource{
		{Resource: policy.Resource{Name: "all", Address: "10.0.0.0/8", Domains: []string{"intra.example"}}, Gateways: []control.ServingGateway{{Node: gateway1}}},
		{Resource: policy.Resource{Name: "eu", Address: "10.2.0.0/16", Domains: []string{"eu.intra.example"}}, Gateways: []control.ServingGateway{{Node: gateway2}}},
		{Resource: policy.Resource{Name: "none", Address: "10.3.0.0/16", Domains: []string{"alone.example"}}},
	}
	s := newStub(up.addr)
	tab := newTable(d)
	s.table = func() *table { return tab }
	var asked []identity.Node
	s.resolve = func(_ context.Context, gateways []identity.Node, _ []byte) ([]byte, error) {
		asked = gateways
		return nil, errors.New("no gateway here")
	}
	for name, want := range map[string][]identity.Node{
		"db.eu.intra.example.": {gateway2}, "db.us.intra.example.": {gateway1}, "db.alone.example.": nil,
	} {
		asked = nil
		if m := s.ask(t, question(name, dns.TypeA), dns.MinMsgSize); m.Rcode != dns.RcodeServerFailure || !slices.Equal(asked, want) {
			t.Errorf("%s: %s, asked %v, want %v", name, dns.RcodeToString[m.Rcode], asked, want)
		}
	}
	if up.asked() != "" {
		t.Error("names behind gateways leak to the host's resolver")
	}
}

// However fast queries come, the stub holds a bounded number of them.
func TestStubBoundsQueries(t *testing.T) {
	s := newStub()
	var held atomic.Int32
	release := make(chan struct{})
	s.resolve = func(context.Context, []identity.Node, []byte) ([]byte, error) {
		held.Add(1)
		<-release
		return nil, errors.New("no gateway here")
	}
	q, err := question("x.intra.example.", dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	var asking sync.WaitGroup
	var dropped atomic.Int32
	for range maxQueries + 100 {
		asking.Go(func() {
			if s.answer(t.Context(), q, dns.MinMsgSize) == nil {
				dropped.Add(1)
			}
		})
	}
	eventually(t, "every query is held or dropped", func() bool { return held.Load()+dropped.Load() == maxQueries+100 })
	if held.Load() != maxQueries {
		t.Errorf("%d queries are held, want %d", held.Load(), maxQueries)
	}
	close(release)
	asking.Wait()
	if s.answer(t.Context(), q, dns.MinMsgSize) == nil {
		t.Error("no answer once there is room")
	}
}
