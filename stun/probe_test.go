package stun

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"testing"
	"time"

	"github.com/pion/stun/v4"
)

func testKeys() Keys {
	var k Keys
	copy(k.Out[:], bytes.Repeat([]byte{0x11}, KeySize))
	copy(k.In[:], bytes.Repeat([]byte{0x22}, KeySize))
	return k
}

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func TestProbeExchange(t *testing.T) {
	from := netip.MustParseAddrPort("192.0.2.7:4000")
	for _, size := range []int{0, 1, MinProbe, MinProbe + 1, 1200, 1452, 9000, 1 << 20} {
		p, r := NewProber(testKeys()), NewResponder(testKeys().Swap(), 0, 0)
		b := p.Probe(epoch, size)
		want := max(min(size, MaxProbe), MinProbe)
		if len(b) < want || len(b) > want+7 {
			t.Errorf("probe of %d bytes, want %d", len(b), want)
		}
		if !IsProbe(b) || !IsRequest(b) || b[0] >= 4 {
			t.Errorf("a probe does not look like one: % x", b[:20])
		}
		a, ok := r.Respond(epoch, b, from)
		if !ok || !IsProbe(a) || IsRequest(a) {
			t.Fatalf("size %d: no answer", size)
		}
		got, ok := p.Handle(epoch.Add(30*time.Millisecond), a)
		if !ok || got.RTT != 30*time.Millisecond || got.Size != len(b) || got.Mapped != from || got.Late {
			t.Errorf("size %d: answer %+v, %v", size, got, ok)
		}
		if _, ok := p.Handle(epoch.Add(40*time.Millisecond), a); ok {
			t.Error("an answer counted twice")
		}
	}
}

// Every bit of a probe and of an answer is covered by the integrity or makes no difference to who accepts it.
func TestProbeTampered(t *testing.T) {
	p, r := NewProber(testKeys()), NewResponder(testKeys().Swap(), 1<<20, 1<<20)
	b := p.Probe(epoch, 60)
	a, _ := r.Respond(epoch, b, netip.AddrPort{})
	for i := range len(b) * 8 {
		c := bytes.Clone(b)
		c[i/8] ^= 1 << (i % 8)
		if _, ok := r.Respond(epoch, c, netip.AddrPort{}); ok {
			t.Errorf("request with bit %d flipped was answered", i)
		}
	}
	for i := range len(a) * 8 {
		c := bytes.Clone(a)
		c[i/8] ^= 1 << (i % 8)
		if _, ok := p.Handle(epoch, c); ok {
			t.Errorf("answer with bit %d flipped was accepted", i)
		}
	}
	for n := range len(b) {
		if _, ok := r.Respond(epoch, b[:n], netip.AddrPort{}); ok {
			t.Errorf("request cut to %d bytes was answered", n)
		}
	}
	if _, ok := r.Respond(epoch, append(bytes.Clone(b), 0), netip.AddrPort{}); ok {
		t.Error("request with a byte appended was answered")
	}
	if _, ok := p.Handle(epoch, a); !ok {
		t.Error("the genuine answer was not accepted after all that")
	}
}

// A packet reflected to its sender, or answered by somebody with the wrong direction's key, counts for nothing.
func TestProbeDirections(t *testing.T) {
	p := NewProber(testKeys())
	b := p.Probe(epoch, 0)
	if _, ok := NewResponder(testKeys(), 0, 0).Respond(epoch, b, netip.AddrPort{}); ok {
		t.Error("a reflected request was answered")
	}
	var m stun.Message
	if err := stun.Decode(b, &m); err != nil {
		t.Fatal(err)
	}
	seal := newSealer(testKeys().Out)
	reflected := stun.MustBuild(stun.NewTransactionIDSetter(m.TransactionID), stun.BindingSuccess, &seal)
	if _, ok := p.Handle(epoch, reflected.Raw); ok {
		t.Error("an answer under the request's key was accepted")
	}
	short := stun.MustBuild(stun.NewTransactionIDSetter(m.TransactionID), stun.BindingSuccess)
	if _, ok := p.Handle(epoch, short.Raw); ok {
		t.Error("an answer without integrity was accepted")
	}
}

// The integrity must be what any implementation of RFC 8489 §14.6 computes.
func TestProbeIntegrityVector(t *testing.T) {
	seal := newSealer(testKeys().Out)
	m := stun.MustBuild(stun.NewTransactionIDSetter([12]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}), stun.BindingRequest, &seal)
	// Computed with Python: hmac.new(b"\x11"*32, header, sha256).digest()[:16]
	want := "00010014" + "2112a442" + "0102030405060708090a0b0c" + "001c0010" + "4d49facc513ad794baa7a810ce61f175"
	if got := hex.EncodeToString(m.Raw); got != want {
		t.Errorf("probe %s, want %s", got, want)
	}
}

func TestResponderRate(t *testing.T) {
	k := testKeys()
	p, r := NewProber(k), NewResponder(k.Swap(), 10, 3)
	answered := 0
	now := epoch
	for range 20 { // 20 at once: the burst
		if _, ok := r.Respond(now, p.Probe(now, 0), netip.AddrPort{}); ok {
			answered++
		}
	}
	if answered != 3 {
		t.Errorf("%d of a burst answered, want 3", answered)
	}
	for range 20 { // 20 in a second: the rate
		now = now.Add(50 * time.Millisecond)
		if _, ok := r.Respond(now, p.Probe(now, 0), netip.AddrPort{}); ok {
			answered++
		}
	}
	if answered < 12 || answered > 13 {
		t.Errorf("%d answered, want 3 and 10 more", answered)
	}
	if a, l, i := r.Counts(); int(a) != answered || int(l) != 40-answered || i != 0 {
		t.Errorf("counts %d %d %d", a, l, i)
	}
	// Packets without integrity spend nothing of the rate.
	now = now.Add(time.Second)
	for range 100 {
		r.Respond(now, []byte("\x00\x01\x00\x14\x21\x12\xa4\x42 not for you at all, really"), netip.AddrPort{})
	}
	if _, ok := r.Respond(now, p.Probe(now, 0), netip.AddrPort{}); !ok {
		t.Error("forged probes kept a genuine one from being answered")
	}
}

func TestProberLoss(t *testing.T) {
	k := testKeys()
	p, r := NewProber(k), NewResponder(k.Swap(), 1<<20, 1<<20)
	now := epoch
	const rtt = 20 * time.Millisecond
	for i := range 200 {
		b := p.Probe(now, 0)
		if i%4 != 3 { // one in four is lost
			a, _ := r.Respond(now, b, netip.AddrPort{})
			if _, ok := p.Handle(now.Add(rtt), a); !ok {
				t.Fatal("answer refused")
			}
		}
		now = now.Add(100 * time.Millisecond)
		p.Expire(now, 90*time.Millisecond)
	}
	st := p.Stats()
	if st.Loss != 0.25 || st.RTT != rtt || st.MinRTT != rtt || st.Sent != 200 || st.Answered != 150 || st.Unanswered != 1 {
		t.Errorf("stats %+v", st)
	}
	if got := p.Timeout(50*time.Millisecond, time.Second); got != 50*time.Millisecond {
		t.Errorf("timeout %v", got)
	}

	// Silence counts up; a late answer takes it back and tells the true round-trip time.
	late := p.Probe(now, 0)
	for range 3 {
		p.Probe(now, 0)
	}
	now = now.Add(100 * time.Millisecond)
	if lost := p.Expire(now, 100*time.Millisecond); lost != 4 {
		t.Errorf("%d lost, want 4", lost)
	}
	if st := p.Stats(); st.Unanswered != 5 {
		t.Errorf("%d unanswered, want 5", st.Unanswered)
	}
	a, _ := r.Respond(now, late, netip.AddrPort{})
	before := p.Stats().Loss
	if got, ok := p.Handle(now.Add(time.Second), a); !ok || !got.Late || got.RTT != 1100*time.Millisecond {
		t.Errorf("late answer %+v %v", got, ok)
	}
	if st := p.Stats(); st.Unanswered != 0 || st.Loss >= before {
		t.Errorf("after a late answer %+v, loss before %v", st, before)
	}
	// Beyond memory it is no answer.
	old := p.Probe(now, 0)
	p.Expire(now.Add(10*time.Second), time.Second)
	a, _ = r.Respond(now, old, netip.AddrPort{})
	if _, ok := p.Handle(now.Add(10*time.Second), a); ok {
		t.Error("an answer ten seconds late was accepted")
	}
}

// What is remembered of unanswered probes is bounded, whoever forgets to call Expire.
func TestProberBounded(t *testing.T) {
	p := NewProber(testKeys())
	for range 10 * maxOutstanding {
		p.Probe(epoch, 0)
	}
	if len(p.pending) > maxOutstanding {
		t.Errorf("%d probes remembered", len(p.pending))
	}
	if st := p.Stats(); st.Loss != 1 {
		t.Errorf("loss %v, want 1", st.Loss)
	}
}

func FuzzProbe(f *testing.F) {
	k := testKeys()
	p := NewProber(k)
	f.Add(p.Probe(epoch, 0))
	f.Add(p.Probe(epoch, 100))
	a, _ := NewResponder(k.Swap(), 0, 0).Respond(epoch, p.Probe(epoch, 0), netip.MustParseAddrPort("192.0.2.1:1"))
	f.Add(a)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		in := bytes.Clone(b)
		p, r := NewProber(k), NewResponder(k, 0, 0)
		p.Probe(epoch, 0)
		if _, ok := p.Handle(epoch, b); ok {
			t.Error("an answer to a probe that was never seen was accepted")
		}
		// The responder has keys which the corpus was not made with.
		if _, ok := r.Respond(epoch, b, netip.AddrPort{}); ok {
			t.Error("a request without the key was answered")
		}
		// And now what an attacker with the key could send: anything, sealed.
		if n := len(b) - 20; n >= 0 && n%4 == 0 && n < 4000 {
			seal := newSealer(k.In)
			c := bytes.Clone(b)
			binary.BigEndian.PutUint16(c[2:], uint16(n+20))
			binary.BigEndian.PutUint32(c[4:], magicCookie)
			c = append(append(c, 0, 0x1c, 0, 16), seal.compute(c)...)
			p.Handle(epoch, c)
			r.Respond(epoch, c, netip.AddrPort{})
		}
		if !bytes.Equal(in, b) {
			t.Error("input was changed")
		}
	})
}
