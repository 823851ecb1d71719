package budget

import (
	"net/netip"
	"testing"
	"time"

	"sallyway/internal/identity"
)

func TestSourceOf(t *testing.T) {
	of := func(s string) Source { return SourceOf(netip.MustParseAddr(s)) }
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{"192.0.2.1", "192.0.2.1", true},
		{"192.0.2.1", "192.0.2.2", false},
		{"192.0.2.1", "::ffff:192.0.2.1", true},
		{"2001:db8::1", "2001:db8::ffff:2", true},
		{"2001:db8::1", "2001:db8:0:1::1", false},
		{"fe80::1%eth0", "fe80::2%eth1", true},
	} {
		if got := of(c.a) == of(c.b); got != c.same {
			t.Errorf("%s and %s are one source: %v", c.a, c.b, got)
		}
	}
}

func TestBucketKeepsItsRate(t *testing.T) {
	b := &bucket{}
	if !b.take(1<<40, 0) {
		t.Error("the zero bucket has a limit")
	}
	b.rate.Store(1 << 20)
	now, passed := time.Now().UnixNano(), 0
	for i := range 1000 {
		if b.take(10<<10, now+int64(i)*int64(10*time.Millisecond)) {
			passed++
		}
	}
	if passed < 1000*95/100 {
		t.Errorf("%d of 1000 passed at the rate", passed)
	}
	for range 1000 {
		b.take(10<<10, now+int64(10*time.Second))
	}
	if b.take(10<<10, now+int64(10*time.Second)) {
		t.Error("a burst without a bound")
	}
}

// Whoever uses a node's share uses up the same, and a node's share is one of its organization's.
func TestShares(t *testing.T) {
	node := func(org, id string) identity.Node { return identity.Node{Org: org, Kind: identity.Client, ID: id} }
	const second = int64(time.Second)
	now := time.Now().UnixNano()
	drain := func(s *Share, at int64) (n int) {
		for s.Take(1<<10, at) {
			n += 1 << 10
		}
		return n
	}
	b := New()
	b.Set("acme", Rates{Organization: 3 << 20, Node: 2 << 20})
	one, again, two := b.Enter(node("acme", "1")), b.Enter(node("acme", "1")), b.Enter(node("acme", "2"))
	other := b.Enter(node("other", "1"))
	if one != again || one == two || one == other {
		t.Fatal("whose is whose")
	}
	if n := drain(one, now); n == 0 || n > 2<<20/10+1<<10 {
		t.Errorf("a node's burst is %d bytes", n)
	}
	if n := drain(again, now); n != 0 {
		t.Errorf("%d bytes more by another way", n)
	}
	if n := drain(two, now); n == 0 || n > 3<<20/10 {
		t.Errorf("what is left of the organization's is %d bytes", n)
	}
	if !other.Take(1<<30, now) {
		t.Error("an organization without a bound has one")
	}
	now += second
	b.Leave(node("acme", "1"))
	if again != b.Enter(node("acme", "1")) {
		t.Error("a share was forgotten while somebody uses it")
	}
	b.Set("acme", Rates{Node: 1 << 20})
	if n := drain(one, now); n == 0 || n > 1<<20/8 {
		t.Errorf("a changed rate gives a burst of %d bytes", n)
	}
	b.Set("acme", Rates{})
	if !two.Take(1<<30, now) {
		t.Error("a bound that was taken away holds")
	}
	for _, n := range []identity.Node{node("acme", "1"), node("acme", "1"), node("acme", "2"), node("other", "1"), node("other", "1")} {
		b.Leave(n)
	}
	if len(b.nodes) != 0 {
		t.Errorf("%d nodes are left", len(b.nodes))
	}
}
