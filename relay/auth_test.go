package relay

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pion/stun/v4"
	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/identity"
	"sallyway/relay/budget"
	"sallyway/relay/wire"
)

func TestCredentials(t *testing.T) {
	l := start(t, func(c *Config) { c.Keys = [][]byte{[]byte("next key"), testKey} })
	good := wire.Username{Expiry: time.Now().Add(time.Hour), Node: client1}
	with := func(u wire.Username, key []byte) *tester {
		c := dial(t, l, u.Node)
		c.username = u.String()
		c.password = wire.Password(key, c.username)
		return c
	}
	with(good, testKey).allocate()
	with(good, []byte("next key")).allocate()
	expired := good
	expired.Expiry = time.Now().Add(-time.Second)
	relayNode := good
	relayNode.Node.Kind = identity.Relay
	stranger := good
	stranger.Node.Org = "nobody"
	for name, tc := range map[string]struct {
		c    *tester
		code stun.ErrorCode
	}{
		"another relay's key": {with(good, []byte("key of another relay")), stun.CodeUnauthorized},
		"expired":             {with(expired, testKey), stun.CodeUnauthorized},
		"relay as client":     {with(relayNode, testKey), codeForbidden},
		"unserved tenant":     {with(stranger, testKey), codeForbidden},
	} {
		if got := errorCode(tc.c.tryAllocate()); got != tc.code {
			t.Errorf("%s: %d, want %d", name, got, tc.code)
		}
	}
	tampered := with(good, testKey)
	tampered.username = strings.Replace(tampered.username, ":acme:", ":other:", 1)
	tampered.want(stun.CodeUnauthorized, tampered.tryAllocate())

	// After the rotation the old key is worth nothing, and what it made lives on until it must show a password again.
	c := with(good, testKey)
	c.allocate()
	l.SetKeys([][]byte{[]byte("next key")})
	c.want(stun.CodeUnauthorized, c.do(stun.MethodRefresh))
	with(good, testKey).want(stun.CodeUnauthorized, with(good, testKey).tryAllocate())
	c.password = wire.Password([]byte("next key"), c.username)
	c.want(0, c.do(stun.MethodRefresh))
}

func TestRenewedUsernameRefreshesTheSameAllocation(t *testing.T) {
	l := start(t, nil)
	c := allocated(t, l, client1)
	renew := func(n identity.Node) {
		c.username = wire.Username{Expiry: time.Now().Add(72 * time.Hour), Node: n, Flags: wire.FlagPlainData}.String()
		c.password = wire.Password(testKey, c.username)
	}
	renew(client1)
	c.want(0, c.do(stun.MethodRefresh))
	renew(client2)
	c.want(stun.CodeWrongCredentials, c.do(stun.MethodRefresh))
	c.want(stun.CodeWrongCredentials, c.do(stun.MethodCreatePermission))
}

func TestLifetimeIsBounded(t *testing.T) {
	l := start(t, nil)
	c := dial(t, l, client1)
	granted := func(r *stun.Message) time.Duration {
		v, err := r.Get(stun.AttrLifetime)
		if err != nil || len(v) != 4 {
			t.Fatalf("LIFETIME % x, %v", v, err)
		}
		return time.Duration(uint32(v[0])<<24|uint32(v[1])<<16|uint32(v[2])<<8|uint32(v[3])) * time.Second
	}
	if d := granted(c.tryAllocate(lifetime(24 * time.Hour))); d != maxLifetime {
		t.Errorf("a day asked: %v granted", d)
	}
	if d := granted(c.do(stun.MethodRefresh)); d != defaultLifetime {
		t.Errorf("nothing asked: %v granted", d)
	}
	if d := granted(c.do(stun.MethodRefresh, lifetime(time.Second))); d != defaultLifetime {
		t.Errorf("a second asked: %v granted", d)
	}
	c.username = wire.Username{Expiry: time.Now().Add(2 * time.Minute), Node: client1}.String()
	c.password = wire.Password(testKey, c.username)
	if d := granted(c.do(stun.MethodRefresh, lifetime(time.Hour))); d > 2*time.Minute {
		t.Errorf("beyond the credential: %v granted", d)
	}
	l.clock.advance(2*time.Minute + time.Second)
	l.sweep()
	if n := l.Allocations(); n != 0 {
		t.Errorf("the allocation outlives its credential")
	}
}

// TestCredentialsInAnOutage: a credential counts past its expiry while the relay's platform is away, until its time for outages and no longer;
// and one without such a time does not.
func TestCredentialsInAnOutage(t *testing.T) {
	var outage atomic.Bool
	l := start(t, func(c *Config) { c.Outage = outage.Load })
	with := func(c *tester, u wire.Username) *tester {
		c.username = u.String()
		c.password = wire.Password(testKey, c.username)
		return c
	}
	begin := l.clock.now()
	soft := wire.Username{Expiry: begin.Add(time.Minute), Outage: begin.Add(3 * time.Hour), Node: client1}
	hard := wire.Username{Expiry: begin.Add(time.Minute), Node: client1}
	c := with(dial(t, l, client1), soft)
	c.allocate()
	l.clock.advance(2 * time.Minute)
	c.want(stun.CodeUnauthorized, c.do(stun.MethodRefresh))
	with(dial(t, l, client1), soft).want(stun.CodeUnauthorized, with(dial(t, l, client1), soft).tryAllocate())
	outage.Store(true)
	for range 3 {
		c.want(0, c.do(stun.MethodRefresh))
		l.clock.advance(9 * time.Minute)
		l.sweep()
	}
	with(dial(t, l, client1), soft).allocate()
	c.want(stun.CodeUnauthorized, with(dial(t, l, client1), hard).tryAllocate())
	tampered := soft
	tampered.Outage = begin.Add(100 * time.Hour)
	late := with(dial(t, l, client1), soft)
	late.username = tampered.String()
	late.want(stun.CodeUnauthorized, late.tryAllocate())
	l.clock.advance(3 * time.Hour)
	late.want(stun.CodeUnauthorized, with(dial(t, l, client1), soft).tryAllocate())
	l.sweep()
	if n := l.Allocations(); n != 0 {
		t.Errorf("%d allocations outlive their credentials", n)
	}
}

// TestAllocationLifetime: the setting bounds what is granted, whatever is asked.
func TestAllocationLifetime(t *testing.T) {
	l := start(t, func(c *Config) { c.AllocationLifetime = 20 * time.Second })
	c := dial(t, l, client1)
	for _, m := range []*stun.Message{c.tryAllocate(lifetime(time.Hour)), c.do(stun.MethodRefresh), c.do(stun.MethodRefresh, lifetime(time.Second))} {
		if v, err := m.Get(stun.AttrLifetime); err != nil || !bytes.Equal(v, []byte{0, 0, 0, 20}) {
			t.Errorf("LIFETIME % x, %v", v, err)
		}
	}
	l.clock.advance(21 * time.Second)
	l.sweep()
	if n := l.Allocations(); n != 0 {
		t.Error("an allocation that was not refreshed lives on")
	}
	for _, d := range []time.Duration{time.Second, 2 * time.Hour} {
		c := Config{Listen: netip.MustParseAddrPort("127.0.0.1:0"), AllocationLifetime: d}
		if err := c.fill(); err == nil {
			t.Errorf("a lifetime of %v is taken", d)
		}
	}
}

func TestNonce(t *testing.T) {
	n := &nonces{}
	from, now := netip.MustParseAddrPort("192.0.2.1:5000"), time.Now()
	nonce := []byte(n.issue(from, now))
	if len(nonce) != nonceLen || !n.valid(nonce, from, now) {
		t.Fatalf("nonce %q is not valid", nonce)
	}
	if !n.valid(nonce, netip.MustParseAddrPort("[::ffff:192.0.2.1]:5000"), now) {
		t.Error("the mapped form of the address is another address")
	}
	for name, ok := range map[string]bool{
		"other port":    n.valid(nonce, netip.MustParseAddrPort("192.0.2.1:5001"), now),
		"other address": n.valid(nonce, netip.MustParseAddrPort("192.0.2.2:5000"), now),
		"too old":       n.valid(nonce, from, now.Add(nonceLifetime+nonceTick)),
		"from ahead":    n.valid(nonce, from, now.Add(-2*nonceTick)),
		"other relay":   (&nonces{secret: [32]byte{1}}).valid(nonce, from, now),
		"empty":         n.valid(nil, from, now),
		"long":          n.valid(append(nonce, 'A'), from, now),
		"no base64":     n.valid([]byte("****************"), from, now),
	} {
		if ok {
			t.Errorf("%s: valid", name)
		}
	}
	for i := range nonce {
		bad := bytes.Clone(nonce)
		bad[i] ^= 1
		if n.valid(bad, from, now) {
			t.Errorf("valid with byte %d changed", i)
		}
	}
	if !n.valid(nonce, from, now.Add(nonceLifetime-2*nonceTick)) {
		t.Error("not valid for its lifetime")
	}
}

func TestNonceIsBoundToTheAddressOnTheWire(t *testing.T) {
	l := start(t, nil)
	a, b := dial(t, l, client1), dial(t, l, client1)
	a.allocate()
	b.nonce = a.nonce
	r := b.once(stun.MethodAllocate, b.requestedTransport(), stun.NewUsername(b.username), stun.NewRealm(wire.Realm), b.nonce, b.key())
	b.want(stun.CodeStaleNonce, r)
	l.clock.advance(nonceLifetime + 10*time.Second)
	r = a.once(stun.MethodRefresh, stun.NewUsername(a.username), stun.NewRealm(wire.Realm), a.nonce, a.key())
	a.want(stun.CodeStaleNonce, r)
	if !r.Contains(stun.AttrNonce) || !r.Contains(stun.AttrRealm) {
		t.Error("438 without nonce and realm")
	}
	a.want(0, a.do(stun.MethodRefresh))
}

// TestNothingIsKeptBeforeANonce sends requests with every kind of bad nonce and looks for traces.
func TestNothingIsKeptBeforeANonce(t *testing.T) {
	l := start(t, nil)
	c := dial(t, l, client1)
	c.want(0, c.once(stun.MethodBinding)) // the relay is up
	goroutines := runtime.NumGoroutine()
	for i := range 3000 {
		m, err := stun.Build(stun.NewType(stun.MethodAllocate, stun.ClassRequest), stun.TransactionID, c.requestedTransport(),
			stun.NewUsername(c.username), stun.NewRealm(wire.Realm), stun.NewNonce(fmt.Sprintf("%016d", i)), c.key())
		if err != nil {
			t.Fatal(err)
		}
		l.shards[0].handle(m.Raw, message(len(m.Raw), netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)}), 9)))
	}
	if n := runtime.NumGoroutine(); n > goroutines+2 {
		t.Errorf("%d goroutines more", n-goroutines)
	}
	l.table.mu.Lock()
	defer l.table.mu.Unlock()
	if len(l.table.all)+len(l.table.nodes)+len(l.table.sourceCount)+len(l.conns.all)+l.conns.half.Len() != 0 {
		t.Error("something is kept")
	}
	if l.count.authFailed.Load() != 0 {
		t.Error("credentials were looked at before the nonce")
	}
}

func TestErrorCodes(t *testing.T) {
	l := start(t, nil)
	c := dial(t, l, client1)
	c.want(stun.CodeUnauthorized, c.once(stun.MethodAllocate))
	c.want(stun.CodeUnauthorized, c.once(stun.MethodRefresh))
	c.want(stun.CodeBadRequest, c.once(stun.MethodAllocate, c.key()))
	c.want(stun.CodeBadRequest, c.once(stun.MethodAllocate, stun.NewUsername(c.username), stun.NewRealm(wire.Realm), c.key()))
	c.want(codeMismatch, c.do(stun.MethodRefresh))
	c.want(codeMismatch, c.do(stun.MethodCreatePermission))
	c.want(codeMismatch, c.do(stun.MethodChannelBind))
	c.want(codeMismatch, c.do(wire.MethodRendezvous, wire.Node(gateway1)))
	c.want(stun.CodeBadRequest, c.do(stun.MethodAllocate))
	c.want(stun.CodeBadRequest, c.do(stun.MethodAllocate, raw{stun.AttrRequestedTransport, []byte{17}}))
	c.want(codeCapacity, c.tryAllocate(raw{stun.AttrReservationToken, make([]byte, 8)}))
	c.want(codeCapacity, c.tryAllocate(raw{stun.AttrEvenPort, []byte{0x80}}))
	c.want(stun.CodeAddrFamilyNotSupported, c.tryAllocate(raw{stun.AttrRequestedAddressFamily, []byte{2, 0, 0, 0}}))
	c.want(stun.CodeBadRequest, c.tryAllocate(raw{stun.AttrLifetime, []byte{1}}))
	r := c.want(stun.CodeUnknownAttribute, c.tryAllocate(raw{stun.AttrChangeRequest, []byte{0, 0, 0, 6}}))
	if v, _ := r.Get(stun.AttrUnknownAttributes); !bytes.Equal(v, []byte{0, 3}) {
		t.Errorf("UNKNOWN-ATTRIBUTES % x", v)
	}
	c.want(0, c.tryAllocate(raw{stun.AttrDontFragment, nil}, raw{0x8999, []byte("optional")}, raw{stun.AttrEvenPort, []byte{0}}))
	if c.relayed.Port()%2 != 0 {
		t.Errorf("EVEN-PORT gave %d", c.relayed.Port())
	}
	c.want(codeMismatch, c.tryAllocate())
	c.want(stun.CodeBadRequest, c.do(stun.MethodCreatePermission))
	c.want(stun.CodeBadRequest, c.do(stun.MethodCreatePermission, raw{stun.AttrXORPeerAddress, []byte{0, 1, 2}}))
	c.want(stun.CodeBadRequest, c.do(wire.MethodRendezvous))
	c.want(stun.CodeBadRequest, c.do(wire.MethodRendezvous, raw{wire.AttrNode, []byte("not a node")}))
	c.want(stun.CodePeerAddrFamilyMismatch, c.permit(netip.MustParseAddrPort("[2001:db8::1]:1")))

	// The extras of RFC 3489 and RFC 5780 are not there.
	for _, extra := range []raw{{stun.AttrChangeRequest, []byte{0, 0, 0, 6}}, {stun.AttrResponsePort, []byte{0, 80, 0, 0}}, {stun.AttrPadding, make([]byte, 64)}} {
		c.want(stun.CodeUnknownAttribute, c.once(stun.MethodBinding, extra))
	}
	r = c.want(0, c.once(stun.MethodBinding, stun.Fingerprint))
	if stun.Fingerprint.Check(r) != nil {
		t.Error("no FINGERPRINT in the answer to one")
	}
	if r.Contains(stun.AttrOtherAddress) || r.Contains(stun.AttrResponseOrigin) {
		t.Error("the answer carries extras of RFC 5780")
	}
}

func TestRetransmittedAllocateIsAnsweredAgain(t *testing.T) {
	l := start(t, nil)
	c := dial(t, l, client1)
	c.want(stun.CodeBadRequest, c.do(stun.MethodAllocate)) // for the nonce
	m, err := stun.Build(stun.NewType(stun.MethodAllocate, stun.ClassRequest), stun.TransactionID, c.requestedTransport(),
		stun.NewUsername(c.username), stun.NewRealm(wire.Realm), c.nonce, c.key())
	if err != nil {
		t.Fatal(err)
	}
	first, second := c.want(0, c.exchange(m)), c.want(0, c.exchange(m))
	a, _ := first.Get(stun.AttrXORRelayedAddress)
	b, _ := second.Get(stun.AttrXORRelayedAddress)
	if !bytes.Equal(a, b) || l.Allocations() != 1 {
		t.Error("a retransmission made another allocation")
	}
}

// TestAmplification measures what a forged source can draw, per request and in the long run.
func TestAmplification(t *testing.T) {
	l := start(t, nil)
	c := dial(t, l, client1)
	long := stun.NewUsername(c.username)
	for _, tc := range []struct {
		name   string
		method stun.Method
		attrs  []stun.Setter
		most   float64 // payload bytes out over in
	}{
		{"Binding, bare", stun.MethodBinding, nil, 1.61},
		{"Binding, padded", stun.MethodBinding, []stun.Setter{raw{0x8022, make([]byte, 8)}}, 1},
		{"Allocate, minimal", stun.MethodAllocate, []stun.Setter{c.requestedTransport()}, 2.15},
		{"Allocate, with a user name", stun.MethodAllocate, []stun.Setter{c.requestedTransport(), long, stun.NewRealm(wire.Realm)}, 1},
		{"Allocate, stale nonce", stun.MethodAllocate, []stun.Setter{c.requestedTransport(), long, stun.NewRealm(wire.Realm), stun.NewNonce("0123456789abcdef"), c.key()}, 1},
		{"Refresh, bare", stun.MethodRefresh, nil, 3.01},
		{"Allocate, 400", stun.MethodAllocate, []stun.Setter{c.key()}, 1},
	} {
		m, err := stun.Build(append([]stun.Setter{stun.NewType(tc.method, stun.ClassRequest), stun.TransactionID}, tc.attrs...)...)
		if err != nil {
			t.Fatal(err)
		}
		r := c.exchange(m)
		if r == nil {
			t.Fatalf("%s: no answer", tc.name)
		}
		const headers = 28 // IPv4 and UDP
		ratio, wireRatio := float64(len(r.Raw))/float64(len(m.Raw)), float64(len(r.Raw)+headers)/float64(len(m.Raw)+headers)
		t.Logf("%-28s %3d in, %3d out: %.2f of payload, %.2f on the wire", tc.name, len(m.Raw), len(r.Raw), ratio, wireRatio)
		if ratio > tc.most {
			t.Errorf("%s: %.2f, want at most %.2f", tc.name, ratio, tc.most)
		}
	}
	// A flood in one source's name draws little more than it sends, whatever the port.
	in, out := 0, 0
	sock, err := net.ListenPacket("udp4", "127.0.0.9:0")
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	m := stun.MustBuild(stun.NewType(stun.MethodRefresh, stun.ClassRequest), stun.TransactionID)
	from := sock.LocalAddr().(*net.UDPAddr).AddrPort()
	for range 2000 {
		l.shards[0].handle(bytes.Clone(m.Raw), message(len(m.Raw), from))
		in += len(m.Raw)
	}
	buf := make([]byte, 2000)
	for {
		if err := sock.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		n, _, err := sock.ReadFrom(buf)
		if err != nil {
			break
		}
		out += n
	}
	t.Logf("flood: %d in, %d out", in, out)
	if out == 0 || out > in {
		t.Errorf("flood: %d bytes in, %d out", in, out)
	}
}

func TestUnprovenRepliesAreLimitedBySource(t *testing.T) {
	l := &limiter{}
	l.init(time.Second, 3)
	now := time.Now().UnixNano()
	a := budget.SourceOf(netip.MustParseAddr("192.0.2.1"))
	for i := range 5 {
		if got := l.allow(a, 1, now); got != (i < 3) {
			t.Errorf("token %d: %v", i, got)
		}
	}
	if !l.allow(a, 1, now+int64(time.Second)) {
		t.Error("no token after a second")
	}
	if !l.allow(budget.SourceOf(netip.MustParseAddr("192.0.2.2")), 1, now) {
		t.Error("another source is limited, too")
	}
	six := netip.MustParseAddr("2001:db8::1")
	for range 3 {
		l.allow(budget.SourceOf(six), 1, now)
	}
	if l.allow(budget.SourceOf(netip.MustParseAddr("2001:db8::ffff:1")), 1, now) {
		t.Error("an IPv6 /64 is not one source")
	}
	if !l.allow(budget.SourceOf(netip.MustParseAddr("2001:db8:0:1::1")), 1, now) {
		t.Error("another /64 is limited, too")
	}
	if budget.SourceOf(netip.MustParseAddr("::ffff:192.0.2.7")) != budget.SourceOf(netip.MustParseAddr("192.0.2.7")) {
		t.Error("the mapped form is another source")
	}
}

func TestBruteForceIsSlowed(t *testing.T) {
	l := start(t, nil)
	bad := dial(t, l, client1)
	bad.password = "wrong"
	answered := 0
	for range 12 {
		if errorCode(bad.tryAllocateQuick()) == stun.CodeUnauthorized {
			answered++
		}
	}
	if answered < 2 || answered > 9 {
		t.Errorf("%d of 12 wrong passwords in a row were answered", answered)
	}
	if l.count.authThrottled.Load() == 0 {
		t.Error("nothing was throttled")
	}
	// The node itself, from the same address, is not locked out.
	allocated(t, l, client1)
	// The time without answers doubles.
	p, now := &penalties{}, time.Now().UnixNano()
	key := []byte(":acme:client:c1:")
	last, gap := now, time.Duration(0)
	for i := range 12 {
		for !p.failed(key, now) {
			now += int64(10 * time.Millisecond)
		}
		g := time.Duration(now - last)
		if i > penaltyFree+1 && g < gap*3/2 && g < penaltyMost {
			t.Errorf("failure %d after %v, the one before after %v", i, g, gap)
		}
		last, gap = now, g
	}
	if gap < 10*time.Second {
		t.Errorf("after 12 failures the delay is %v", gap)
	}
	l.clock.advance(time.Minute)
	l.sweep()
	if !strings.Contains(l.log.String(), "requests refused") {
		t.Error("no alert in the log")
	}
}

// tryAllocateQuick is tryAllocate for which silence is an answer that comes soon.
func (c *tester) tryAllocateQuick() *stun.Message {
	c.t.Helper()
	attrs := []stun.Setter{c.requestedTransport()}
	if len(c.nonce) > 0 {
		attrs = append(attrs, stun.NewUsername(c.username), stun.NewRealm(wire.Realm), c.nonce, c.key())
	}
	m := stun.MustBuild(append([]stun.Setter{stun.NewType(stun.MethodAllocate, stun.ClassRequest), stun.TransactionID}, attrs...)...)
	c.write(m.Raw)
	b, ok := c.receive(100 * time.Millisecond)
	if !ok {
		return nil
	}
	r := &stun.Message{Raw: b}
	if r.Decode() != nil {
		c.t.Fatal("malformed answer")
	}
	_ = c.nonce.GetFrom(r)
	return r
}

// TestNoUserEnumeration compares the answers to an unknown name and to a wrong password, byte by byte but for the nonce.
func TestNoUserEnumeration(t *testing.T) {
	l := start(t, nil)
	var shapes []string
	for _, name := range []string{
		wire.Username{Expiry: time.Now().Add(time.Hour), Node: client1}.String(), wire.Username{Expiry: time.Now().Add(time.Hour), Node: foreign}.String(),
		"nobody", "1:acme:client:c1:", "99999999999:nowhere:client:c1:d",
	} {
		c := dial(t, l, client1)
		c.username, c.password = name, "wrong"
		r := c.want(stun.CodeUnauthorized, c.tryAllocate())
		shape := fmt.Sprint(len(r.Raw))
		for _, a := range r.Attributes {
			shape += fmt.Sprintf(" %v/%d", a.Type, a.Length)
		}
		shapes = append(shapes, shape)
	}
	for _, s := range shapes {
		if s != shapes[0] {
			t.Errorf("answers differ: %q", shapes)
		}
	}
}

func TestQuotas(t *testing.T) {
	l := start(t, func(c *Config) {
		c.Organizations["acme"] = Organization{Quota: Quota{Allocations: 4, NodeAllocations: 2}}
		c.Limits = Limits{Allocations: 6, SourceAllocations: 5, Permissions: 2, Channels: 2, NodeAllocations: 3}
	})
	try := func(n identity.Node, want stun.ErrorCode) *tester {
		t.Helper()
		c := dial(t, l, n)
		c.want(want, c.tryAllocate())
		return c
	}
	a := try(client1, 0)
	try(client1, 0)
	try(client1, codeQuota) // the node's
	g := try(gateway1, 0)
	try(gateway1, 0)
	try(client2, codeQuota) // the organization's
	try(foreign, 0)
	try(foreign, codeQuota) // the source's
	// Freed, there is room again.
	a.want(0, a.do(stun.MethodRefresh, lifetime(0)))
	b := try(client1, 0)
	g.want(0, g.do(stun.MethodRefresh, lifetime(0)))
	g = try(gateway1, 0)
	// Channels of one allocation.
	if err := l.SetOrganizations(map[string]Organization{"acme": {}, "other": {}}); err != nil {
		t.Fatal(err)
	}
	b.want(0, b.bind(0x4000, g.relayed))
	var other *allocation
	for _, x := range l.table.snapshot() {
		if x.owner == gateway1 && x.relayed != g.relayed {
			other = x
		}
	}
	b.want(0, b.bind(0x4001, other.relayed))
	if n := len(l.table.newest(client1).byPeer); n != 2 {
		t.Fatalf("%d channels", n)
	}
	al := l.table.newest(client1)
	if got := l.bind(al, 0x4002, netip.MustParseAddrPort("192.0.2.1:1"), l.now().UnixNano()); got != bindFull {
		t.Errorf("a third channel of two: %v", got)
	}
	one, two := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	now := l.now().UnixNano()
	if !al.permit([]netip.Addr{one, one}, 2, now) || al.permit([]netip.Addr{two}, 2, now) || !al.permit([]netip.Addr{one}, 2, now) {
		t.Error("permissions are not counted")
	}
	if !al.permit([]netip.Addr{two}, 2, now+int64(permissionLifetime)+1) {
		t.Error("permissions that ran out still count")
	}

	total := start(t, func(c *Config) { c.Limits.Allocations = 1 })
	allocated(t, total, client1)
	c := dial(t, total, client2)
	c.want(codeCapacity, c.tryAllocate())
}

// TestReturningNodeIsNotLockedOut lets a node come back from ever new ports without a goodbye.
func TestReturningNodeIsNotLockedOut(t *testing.T) {
	l := start(t, func(c *Config) { c.Limits.NodeAllocations = 3 })
	live := allocated(t, l, client1)
	for range 10 {
		l.clock.advance(16 * time.Second)
		live.want(0, live.do(stun.MethodRefresh))
		allocated(t, l, client1)
	}
	live.want(0, live.do(stun.MethodRefresh)) // what is heard of is not displaced
	allocatedOrQuota := dial(t, l, client1)
	allocatedOrQuota.want(codeQuota, allocatedOrQuota.tryAllocate())
}

func TestBandwidthQuota(t *testing.T) {
	l := start(t, func(c *Config) {
		c.Organizations["acme"] = Organization{Quota: Quota{NodeBandwidth: 100 << 10}}
	})
	a, g := allocated(t, l, client1), allocated(t, l, gateway1)
	a.want(0, a.bind(0x4000, g.relayed))
	g.want(0, g.bind(0x4000, a.relayed))
	frame := channelData(0x4000, strings.Repeat("x", 1200))
	for range 400 { // 480 KB against a burst of 128 KiB
		l.shards[0].handle(bytes.Clone(frame), message(len(frame), a.local()))
	}
	if got := l.count.relayed.Load(); got < 80 || got > 250 {
		t.Errorf("%d of 400 datagrams passed", got)
	}
	if l.count.overQuota.Load() == 0 {
		t.Error("nothing over quota")
	}
	// The gateway's own share is untouched, and so is the client's after a while.
	before := l.count.relayed.Load()
	l.shards[0].handle(bytes.Clone(frame), message(len(frame), g.local()))
	l.clock.advance(time.Second)
	l.shards[0].handle(bytes.Clone(frame), message(len(frame), a.local()))
	if got := l.count.relayed.Load() - before; got != 2 {
		t.Errorf("%d of 2 passed", got)
	}
}

// TestOneBudget: what a node sends by another rung of the relay it does not send by this one.
func TestOneBudget(t *testing.T) {
	b := budget.New()
	l := start(t, func(c *Config) {
		c.Budgets = b
		c.Organizations["acme"] = Organization{Quota: Quota{NodeBandwidth: 100 << 10}}
	})
	a, g := allocated(t, l, client1), allocated(t, l, gateway1)
	a.want(0, a.bind(0x4000, g.relayed))
	g.want(0, g.bind(0x4000, a.relayed))
	elsewhere := b.Enter(client1)
	for elsewhere.Take(64<<10, l.now().UnixNano()) {
	}
	frame := channelData(0x4000, strings.Repeat("x", 1200))
	passed := func(c *tester) bool {
		before := l.count.relayed.Load()
		l.shards[0].handle(bytes.Clone(frame), message(len(frame), c.local()))
		return l.count.relayed.Load() > before
	}
	for passed(a) { // the last bytes of its share
	}
	if l.count.overQuota.Load() == 0 || !passed(g) {
		t.Errorf("%d over quota, and the gateway's share is used up", l.count.overQuota.Load())
	}
	l.clock.advance(10 * time.Second)
	if !passed(a) {
		t.Error("nothing passes after a while")
	}
	b.Leave(client1)
	if !elsewhere.Take(1, l.now().UnixNano()) {
		t.Error("the share is used up again")
	}
}

func (c *tester) local() netip.AddrPort { return c.conn.LocalAddr().(*net.UDPAddr).AddrPort() }

func TestRevocation(t *testing.T) {
	cert, _ := certificate(t)
	l := start(t, func(c *Config) { c.Certificate = cert })
	udp, tcp := allocated(t, l, client1), tcpDial(t, l, client1, true)
	tcp.allocate()
	secure, _, _ := dtlsDial(t, l, client1, wire.FlagPlainData)
	secure.allocate()
	g := allocated(t, l, gateway1)
	udp.want(0, udp.bind(0x4000, g.relayed))
	g.want(0, g.bind(0x4000, udp.relayed))
	began := time.Now()
	l.SetDenied([]identity.Node{client1})
	for name, c := range map[string]*tester{"udp": udp, "tls": tcp, "dtls": secure} {
		var e stun.ErrorCodeAttribute
		if err := e.GetFrom(c.indication(wire.MethodRefused)); err != nil || e.Code != codeForbidden {
			t.Errorf("%s: Refused with %v, %v", name, e, err)
		}
	}
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("revocation took %v", d)
	}
	if b, ok := tcp.next(5 * time.Second); ok {
		t.Errorf("the TLS connection of a revoked node is open: % x", b)
	}
	udp.write(channelData(0x4000, "after"))
	g.wantNothing()
	c := dial(t, l, client1)
	c.want(codeForbidden, c.tryAllocate())
	allocated(t, l, client2)
	l.SetDenied(nil)
	allocated(t, l, client1)

	// An organization that is not served any more.
	if err := l.SetOrganizations(map[string]Organization{"other": {}}); err != nil {
		t.Fatal(err)
	}
	g.indication(wire.MethodRefused)
	if n := l.Allocations(); n != 0 {
		t.Errorf("%d allocations of a removed organization", n)
	}
}

// TestRestartIsNoticed gives a relay's allocations to a relay that knows nothing of them.
func TestRestartIsNoticed(t *testing.T) {
	l := start(t, nil)
	c := allocated(t, l, client1)
	l.stop()
	again := start(t, func(cfg *Config) { cfg.Listen = l.Addr() })
	payload := channelData(0x4000, "data for nobody, long enough")
	c.write(payload)
	b, ok := c.next(5 * time.Second)
	if !ok || !isMethod(b, wire.MethodUnknown) || len(b) > len(payload) {
		t.Fatalf("got % x, want an Unknown indication no longer than the data", b)
	}
	c.write(sendTo(t, c.relayed, "data"))
	c.indication(wire.MethodUnknown)
	dtlsRecord := append([]byte{23, 0xFE, 0xFD, 0, 1, 0, 0, 0, 0, 0, 1, 0, 30}, make([]byte, 30)...)
	c.write(dtlsRecord)
	c.indication(wire.MethodUnknown)
	c.write(channelData(0x4000, "tiny"))
	c.wantNothing() // an answer would be larger
	c.allocate()    // the same credential works at once
	if again.Allocations() != 1 {
		t.Error("no allocation after the restart")
	}
	// A flood is not answered in full.
	sent := 0
	for range 2000 {
		again.shards[0].handle(bytes.Clone(payload), message(len(payload), netip.MustParseAddrPort("127.0.0.77:9")))
		sent++
	}
	if n := again.count.unknown.Load(); n > 200 {
		t.Errorf("%d of %d strays answered", n, sent)
	}
}

func TestRendezvous(t *testing.T) {
	cert, _ := certificate(t)
	l := start(t, func(c *Config) { c.Certificate = cert })
	for _, over := range []string{"udp", "tls", "dtls"} {
		var a, g *tester
		switch over {
		case "udp":
			a, g = dial(t, l, client1), dial(t, l, gateway1)
		case "tls":
			a, g = tcpDial(t, l, client1, true), tcpDial(t, l, gateway1, true)
		case "dtls":
			a, _, _ = dtlsDial(t, l, client1, "")
			g, _, _ = dtlsDial(t, l, gateway1, "")
		}
		a.allocate()
		a.want(codeNotFound, a.do(wire.MethodRendezvous, wire.Node(node("acme", identity.Gateway, "elsewhere"))))
		a.want(codeForbidden, a.do(wire.MethodRendezvous, wire.Node(client2)))
		a.want(codeForbidden, a.do(wire.MethodRendezvous, wire.Node(foreign)))
		old := allocated(t, l, gateway1)
		g.allocate()
		r := a.want(0, a.do(wire.MethodRendezvous, wire.Node(gateway1)))
		v, err := r.Get(stun.AttrXORPeerAddress)
		if err != nil {
			t.Fatal(err)
		}
		if addr, _ := peerAddr(r, v); addr != g.relayed {
			t.Errorf("%s: rendezvous gave %v, the newest allocation is %v", over, addr, g.relayed)
		}
		var who wire.Node
		if who.GetFrom(r) != nil || identity.Node(who) != gateway1 {
			t.Errorf("%s: NODE %v", over, who)
		}
		times := 1 + indicationRepeats
		if over == "tls" {
			times = 1
		}
		for range times {
			m := g.indication(wire.MethodRendezvous)
			if who.GetFrom(m) != nil || identity.Node(who) != client1 {
				t.Errorf("%s: indication from %v", over, who)
			}
			v, _ := m.Get(stun.AttrXORPeerAddress)
			if addr, _ := peerAddr(m, v); addr != a.relayed {
				t.Errorf("%s: indication names %v, want %v", over, addr, a.relayed)
			}
			var from stun.XORMappedAddress
			if from.GetFrom(m) != nil || from.Port == 0 {
				t.Errorf("%s: indication without the requester's address", over)
			}
		}
		// Both are permitted without asking.
		a.write(sendPadded(t, a, g.relayed, "hello"))
		g.indication(stun.MethodData)
		// With a number the requester's channel is bound in the same round trip.
		a.want(0, a.do(wire.MethodRendezvous, wire.Node(gateway1), numberAttr(0x4123)))
		g.want(0, g.bind(0x4321, a.relayed))
		frame := channelData(0x4321, "abcd")
		g.write(frame)
		a.wantData(0x4123, "abcd")
		for _, c := range []*tester{a, g, old} {
			c.want(0, c.do(stun.MethodRefresh, lifetime(0)))
		}
	}
}

func sendPadded(t *testing.T, _ *tester, peer netip.AddrPort, s string) []byte {
	return sendTo(t, peer, s)
}

func TestRendezvousIsLimited(t *testing.T) {
	l := start(t, nil)
	a := allocated(t, l, client1)
	allocated(t, l, gateway1)
	codes := map[stun.ErrorCode]int{}
	for range rendezvousBurst * 2 {
		codes[errorCode(a.do(wire.MethodRendezvous, wire.Node(gateway1)))]++
	}
	if codes[0] < rendezvousBurst || codes[codeQuota] == 0 {
		t.Errorf("answers %v", codes)
	}
	// Coming back with another allocation pays nothing.
	a.want(0, a.do(stun.MethodRefresh, lifetime(0)))
	again := allocated(t, l, client1)
	again.want(codeQuota, again.do(wire.MethodRendezvous, wire.Node(gateway1)))
}

// TestEndedAllocationsDoNotUseUpChannels: who allocates, has a gateway bind a channel, and leaves, again and again, locks nobody out.
func TestEndedAllocationsDoNotUseUpChannels(t *testing.T) {
	const channels = 4
	l := start(t, func(c *Config) { c.Limits.Channels = channels })
	g := allocated(t, l, gateway1)
	for i := range uint16(3 * channels) {
		a := allocated(t, l, client1)
		a.want(0, a.do(wire.MethodRendezvous, wire.Node(gateway1)))
		g.indication(wire.MethodRendezvous)
		g.want(0, g.bind(0x4100+i, a.relayed))
		a.want(0, a.do(stun.MethodRefresh, lifetime(0)))
	}
	// Channels to allocations that live count.
	for i := range uint16(channels + 1) {
		a := allocated(t, l, client1)
		a.want(0, a.do(wire.MethodRendezvous, wire.Node(gateway1)))
		want := stun.ErrorCode(0)
		if i == channels {
			want = codeCapacity
		}
		g.want(want, g.bind(0x4200+i, a.relayed))
	}
}

func TestDrain(t *testing.T) {
	l := start(t, nil)
	a, g := allocated(t, l, client1), allocated(t, l, gateway1)
	a.want(0, a.bind(0x4000, g.relayed))
	g.want(0, g.bind(0x4000, a.relayed))
	if !l.Ready() {
		t.Error("not ready")
	}
	left := make(chan int, 1)
	go func() { left <- l.Drain(context.Background(), 10*time.Second) }()
	m := a.indication(wire.MethodDrain)
	if v, _ := m.Get(stun.AttrLifetime); !bytes.Equal(v, []byte{0, 0, 0, 10}) {
		t.Errorf("LIFETIME % x", v)
	}
	g.indication(wire.MethodDrain)
	if l.Ready() || !l.Snapshot().Draining {
		t.Error("ready while draining")
	}
	c := dial(t, l, client2)
	c.want(codeCapacity, c.tryAllocate())
	a.write(channelData(0x4000, "still"))
	for {
		b, ok := g.next(5 * time.Second)
		if !ok {
			t.Fatal("no data while draining")
		}
		if bytes.Equal(b, channelData(0x4000, "still")) {
			break
		}
	}
	a.want(0, a.do(stun.MethodRefresh))
	a.want(0, a.do(stun.MethodRefresh, lifetime(0)))
	g.want(0, g.do(stun.MethodRefresh, lifetime(0)))
	select {
	case n := <-left:
		if n != 0 {
			t.Errorf("%d left", n)
		}
	case <-time.After(5 * time.Second):
		t.Error("Drain does not return when the last allocation is gone")
	}
	m2 := start(t, nil)
	allocated(t, m2, client1)
	if n := m2.Drain(context.Background(), 50*time.Millisecond); n != 1 {
		t.Errorf("%d left at the deadline, want 1", n)
	}
}

// TestNoAddressesInLogsAndMetrics plants addresses and payload and looks for them.
func TestNoAddressesInLogsAndMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	l := start(t, func(c *Config) { c.Metrics = reg })
	a, g := allocated(t, l, client1), allocated(t, l, gateway1)
	a.want(0, a.bind(0x4000, g.relayed))
	g.want(0, g.bind(0x4000, a.relayed))
	a.write(channelData(0x4000, "planted-payload"))
	g.wantData(0x4000, "planted-payload")
	bad := dial(t, l, client1)
	bad.password = "planted-password"
	bad.tryAllocate()
	l.SetDenied([]identity.Node{client1})
	l.clock.advance(time.Minute)
	l.sweep()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	text := l.log.String() + fmt.Sprint(families) + fmt.Sprintf("%+v", l.Snapshot())
	for _, planted := range []string{"127.0.0.1", "planted", fmt.Sprint(a.local().Port()), fmt.Sprint(g.local().Port()), a.relayed.String()} {
		if strings.Contains(text, planted) {
			t.Errorf("%q is in logs or metrics:\n%s", planted, text)
		}
	}
	if !strings.Contains(text, "acme/client/c1") {
		t.Error("the log does not name the node")
	}
	if len(families) < 10 {
		t.Errorf("%d metrics", len(families))
	}
	s := l.Snapshot()
	if s.Bytes != uint64(len("planted-payload")) || s.ByOrganization["acme"] != 1 || s.Nodes["acme/gateway/g1"].Received != s.Bytes {
		t.Errorf("snapshot %+v", s)
	}
}
