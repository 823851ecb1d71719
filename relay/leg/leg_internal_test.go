package leg

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pion/stun/v4"
	"go.uber.org/goleak"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/relay/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func fakeConfig() Config {
	return Config{
		Relay: relayNode, Addrs: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:5349")},
		Verify:      func([]*x509.Certificate) error { return nil },
		Credentials: func() (string, string) { return "u", "secret" },
	}
}

// up starts a leg on f within a bubble.
func up(t *testing.T, f *fakeRelay, cfg Config) *Leg {
	t.Helper()
	if err := cfg.validate(); err != nil {
		t.Fatal(err)
	}
	f.leg = newLeg(cfg)
	if err := f.leg.begin(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	return f.leg
}

// bubble runs a test with a leg in virtual time, and closes the leg after it.
func bubble(t *testing.T, cfg Config, run func(t *testing.T, f *fakeRelay, l *Leg)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f := newFakeRelay(t)
		l := up(t, f, cfg)
		run(t, f, l)
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		select {
		case <-l.Done():
		default:
			t.Error("closed but not done")
		}
	})
}

// lostWithin waits for the leg's end and holds it to between least and most of virtual time.
func lostWithin(t *testing.T, l *Leg, least, most time.Duration) {
	t.Helper()
	start := time.Now()
	select {
	case <-l.Done():
	case <-time.After(time.Hour):
		t.Fatal("not lost within an hour")
	}
	if d := time.Since(start); d < least || d > most {
		t.Errorf("lost after %v, want between %v and %v (%v)", d, least, most, l.Err())
	}
}

func TestAllocate(t *testing.T) {
	bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
		if l.RelayedAddr() != fakeRelayed || l.ReflexiveAddr().String() != "198.51.100.7:1234" || l.Relay() != relayNode || l.Transport() != UDP {
			t.Errorf("relayed %v, reflexive %v, relay %v over %v", l.RelayedAddr(), l.ReflexiveAddr(), l.Relay(), l.Transport())
		}
		if rtt := l.Stats().RTT; rtt != f.rtt {
			t.Errorf("RTT %v, want %v", rtt, f.rtt)
		}
		if l.Err() != nil {
			t.Error(l.Err())
		}
		_ = l.Close()
		if !errors.Is(l.Err(), net.ErrClosed) {
			t.Errorf("error after Close: %v", l.Err())
		}
		if got := f.requests(stun.MethodRefresh); got != 1 {
			t.Errorf("%d Refresh on Close, want 1 of lifetime 0", got)
		}
		if _, err := l.Connect(t.Context(), gatewayNode); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Connect on a closed leg: %v", err)
		}
	})
}

func TestAllocateRefused(t *testing.T) {
	for _, tt := range []struct {
		code stun.ErrorCode
		says string
	}{
		{CodeForbidden, "revoked"},
		{CodeMismatch, "dial again"},
		{CodeQuota, "quota"},
		{CodeInsufficient, "another relay"},
		{CodeUnauthorized, "renew"},
	} {
		synctest.Test(t, func(t *testing.T) {
			f := newFakeRelay(t)
			f.on(stun.MethodAllocate, func(m *stun.Message) *stun.Message {
				return refuse(m, tt.code, stun.NewRealm(wire.Realm), stun.NewNonce(f.nonce))
			})
			cfg := fakeConfig()
			_ = cfg.validate()
			f.leg = newLeg(cfg)
			err := f.leg.begin(t.Context(), f)
			var e *Error
			if !errors.As(err, &e) || e.Code != tt.code || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%d: error %v, want one that says %q", tt.code, err, tt.says)
			}
			if !f.isClosed() {
				t.Error("the carrier was left open")
			}
		})
	}
}

// A relay without IPv4 answers 440; the leg asks for what it has.
func TestAllocateOtherFamily(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeRelay(t)
		v6 := netip.MustParseAddrPort("[2001:db8::1]:50000")
		f.on(stun.MethodAllocate, func(m *stun.Message) *stun.Message {
			if v, err := m.Get(stun.AttrRequestedAddressFamily); err != nil || v[0] != 2 {
				return refuse(m, CodeFamily)
			}
			return reply(m, stun.ClassSuccessResponse, xor(stun.AttrXORRelayedAddress, v6), lifetimeAttr(time.Minute))
		})
		l := up(t, f, fakeConfig())
		if l.RelayedAddr() != v6 {
			t.Errorf("relayed %v", l.RelayedAddr())
		}
		_ = l.Close()
	})
}

// The first requests go unanswered; retransmission gets there.
func TestAllocateLossy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeRelay(t)
		drop := 3
		f.on(stun.MethodAllocate, func(m *stun.Message) *stun.Message {
			if drop--; drop >= 0 {
				return nil
			}
			return reply(m, stun.ClassSuccessResponse, xor(stun.AttrXORRelayedAddress, fakeRelayed), lifetimeAttr(time.Minute))
		})
		l := up(t, f, fakeConfig())
		_ = l.Close()
	})
}

func TestRefresh(t *testing.T) {
	cfg := fakeConfig()
	var user atomic.Value
	user.Store("first")
	cfg.Credentials = func() (string, string) { return user.Load().(string), "secret" }
	bubble(t, cfg, func(t *testing.T, f *fakeRelay, l *Leg) {
		f.mu.Lock()
		f.nonce = "n2" // the one that the leg has is stale from now on
		f.mu.Unlock()
		user.Store("renewed")
		start := time.Now()
		for f.requests(stun.MethodRefresh) == 0 {
			time.Sleep(time.Second)
		}
		if d := time.Since(start); d < 4*time.Minute || d > 5*time.Minute+2*time.Second {
			t.Errorf("refreshed after %v of a lifetime of 10 min", d)
		}
		time.Sleep(time.Second)
		if got := f.lastUser(); got != "renewed" {
			t.Errorf("refreshed as %q, want the renewed credential", got)
		}
		time.Sleep(24 * time.Hour)
		if l.Err() != nil {
			t.Errorf("lost within a day of good weather: %v", l.Err())
		}
		if n := f.requests(stun.MethodRefresh); n < 288 || n > 320 {
			t.Errorf("%d refreshes in a day", n)
		}
		if n := f.requests(stun.MethodBinding); n < 5700 || n > 7300 {
			t.Errorf("%d keepalives in a day", n)
		}
	})
}

func TestRefreshRefused(t *testing.T) {
	// Revoked, forgotten and over quota end the leg at once.
	for _, code := range []stun.ErrorCode{CodeForbidden, CodeMismatch, CodeQuota, CodeWrongUser} {
		bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
			f.on(stun.MethodRefresh, func(m *stun.Message) *stun.Message { return refuse(m, code) })
			lostWithin(t, l, 0, 5*time.Minute+time.Second)
			var e *Error
			if !errors.As(l.Err(), &e) || e.Code != code {
				t.Errorf("lost for %v, want %d", l.Err(), code)
			}
		})
	}
	// An expired credential leaves the rest of the lifetime to renew it …
	bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
		f.mu.Lock()
		f.password = "rotated"
		f.mu.Unlock()
		lostWithin(t, l, 9*time.Minute, 11*time.Minute)
	})
	// … and a renewal in time saves the leg.
	cfg := fakeConfig()
	var password atomic.Value
	password.Store("secret")
	cfg.Credentials = func() (string, string) { return "u", password.Load().(string) }
	bubble(t, cfg, func(t *testing.T, f *fakeRelay, l *Leg) {
		f.mu.Lock()
		f.password = "rotated"
		f.mu.Unlock()
		time.Sleep(8 * time.Minute)
		password.Store("rotated")
		time.Sleep(time.Hour)
		if l.Err() != nil {
			t.Error(l.Err())
		}
	})
}

func TestFailureDetection(t *testing.T) {
	t.Run("silent, idle", func(t *testing.T) {
		bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
			f.die()
			lostWithin(t, l, 0, DefaultKeepalive+patience)
			if !errors.Is(l.Err(), errNoAnswer) {
				t.Error(l.Err())
			}
		})
	})
	for _, rtt := range []time.Duration{time.Millisecond, 10 * time.Millisecond, 100 * time.Millisecond} {
		t.Run(fmt.Sprint("signs, RTT ", rtt), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeRelay(t)
				f.rtt = rtt
				l := up(t, f, fakeConfig())
				f.die()
				l.suspect(errUnknown)
				lostWithin(t, l, 40*time.Millisecond, max(40*time.Millisecond+3*rtt, 65*time.Millisecond)+time.Millisecond)
				if n := f.requests(stun.MethodRefresh); n != quickAttempts {
					t.Errorf("%d checks, want %d", n, quickAttempts)
				}
				_ = l.Close()
			})
		})
	}
	t.Run("suspected", func(t *testing.T) {
		bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
			f.die()
			l.Suspect()
			lostWithin(t, l, calmTotal, calmTotal+time.Millisecond)
		})
	})
	t.Run("suspected while queues are full", func(t *testing.T) {
		bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
			f.setRTT(400 * time.Millisecond)
			l.Suspect()
			time.Sleep(2 * time.Second)
			if l.Err() != nil {
				t.Errorf("late answers brought the leg down: %v", l.Err())
			}
		})
	})
	t.Run("a sign during a calm check", func(t *testing.T) {
		bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
			f.die()
			l.Suspect()
			time.Sleep(50 * time.Millisecond)
			l.suspect(fmt.Errorf("read: %w", syscall.ECONNREFUSED))
			lostWithin(t, l, 40*time.Millisecond, 70*time.Millisecond)
		})
	})
	t.Run("a forged sign during a calm check", func(t *testing.T) {
		bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
			f.setRTT(30 * time.Millisecond)
			l.Suspect()
			time.Sleep(10 * time.Millisecond)
			l.suspect(errUnknown)
			time.Sleep(time.Second)
			if l.Err() != nil || l.Stats().Checks != 2 {
				t.Errorf("%v after %d checks, want 2", l.Err(), l.Stats().Checks)
			}
		})
	})
	t.Run("no route for a moment", func(t *testing.T) {
		bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
			n := 0
			f.on(stun.MethodRefresh, func(m *stun.Message) *stun.Message {
				if n++; n <= 5 { // 20, 40, 80, 125 ms apart: 265 ms
					return nil
				}
				return reply(m, stun.ClassSuccessResponse, lifetimeAttr(time.Minute))
			})
			l.suspect(syscall.ENETUNREACH)
			time.Sleep(time.Second)
			if l.Err() != nil {
				t.Error(l.Err())
			}
		})
	})
	t.Run("silent, idle, TLS", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFakeRelay(t)
			f.stream = true
			l := up(t, f, fakeConfig())
			f.die()
			lostWithin(t, l, 0, DefaultKeepalive+streamPatience)
			_ = l.Close()
		})
	})
	t.Run("forged signs", func(t *testing.T) {
		bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
			for range 10000 {
				l.suspect(errUnknown)
				time.Sleep(time.Millisecond)
			}
			if l.Err() != nil {
				t.Errorf("forged signs brought the leg down: %v", l.Err())
			}
			// 10 s of them cost at most ten checks a second.
			if n := f.requests(stun.MethodRefresh); n > 100 {
				t.Errorf("%d checks", n)
			}
		})
	})
	t.Run("sign during the pause", func(t *testing.T) {
		bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
			l.Suspect()
			time.Sleep(20 * time.Millisecond) // the check passed
			f.die()
			l.suspect(errUnknown)
			lostWithin(t, l, 0, checkPause+100*time.Millisecond)
		})
	})
	t.Run("loss of two checks", func(t *testing.T) {
		bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
			n := 0
			f.on(stun.MethodRefresh, func(m *stun.Message) *stun.Message {
				if n++; n < 3 {
					return nil
				}
				return reply(m, stun.ClassSuccessResponse, lifetimeAttr(time.Minute))
			})
			l.suspect(errUnknown)
			time.Sleep(time.Second)
			if l.Err() != nil {
				t.Error(l.Err())
			}
		})
	})
	t.Run("unknown in the tunnel", func(t *testing.T) {
		bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
			f.on(stun.MethodRefresh, func(m *stun.Message) *stun.Message { return refuse(m, CodeMismatch) })
			f.indicate(wire.MethodUnknown)
			lostWithin(t, l, 0, 3*f.rtt)
		})
	})
	t.Run("refused", func(t *testing.T) {
		bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
			f.indicate(wire.MethodRefused, stun.ErrorCodeAttribute{Code: CodeForbidden})
			lostWithin(t, l, 0, f.rtt)
			var e *Error
			if !errors.As(l.Err(), &e) || e.Code != CodeForbidden || !strings.Contains(e.Error(), "revoked") {
				t.Errorf("lost for %v", l.Err())
			}
		})
	})
	t.Run("broken carrier", func(t *testing.T) {
		bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
			l.broken(errors.New("end of file"))
			lostWithin(t, l, 0, 0)
		})
	})
}

func TestDrain(t *testing.T) {
	bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
		for range 2 { // a repeated one is fine
			f.indicate(wire.MethodDrain, lifetimeAttr(30*time.Second))
		}
		select {
		case <-l.Draining():
		case <-time.After(time.Second):
			t.Error("not draining")
		}
		if l.Err() != nil {
			t.Errorf("a draining leg lives on, but: %v", l.Err())
		}
	})
}

func TestConnect(t *testing.T) {
	bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
		ch, err := l.Connect(t.Context(), gatewayNode)
		if err != nil {
			t.Fatal(err)
		}
		if ch.Peer() != gatewayNode || ch.PeerAddr() != peerRelayed || ch.Leg() != l || ch.MaxPayload() != 1400 {
			t.Errorf("channel to %v at %v", ch.Peer(), ch.PeerAddr())
		}
		again, err := l.Connect(t.Context(), gatewayNode)
		if err != nil || again != ch {
			t.Errorf("second Connect: %p, %v; want the same channel %p", again, err, ch)
		}
		ch.Send([]byte("hello"), 0, 0)
		if len(f.sentData()) != 1 || l.Stats().SentBytes != 5 || l.Stats().SentDatagrams != 1 || l.Stats().Channels != 1 {
			t.Errorf("sent %q, stats %+v", f.sentData(), l.Stats())
		}
		// Channels are refreshed for as long as they live, and not after.
		time.Sleep(time.Hour)
		if n := f.requests(stun.MethodChannelBind); n < 12 || n > 16 {
			t.Errorf("%d ChannelBind in an hour", n)
		}
		ch.Close()
		ch.Close()
		<-ch.Done()
		ch.Send([]byte("late"), 0, 0)
		if len(f.sentData()) != 1 || l.Stats().DroppedClosed != 1 || l.Stats().Channels != 0 {
			t.Errorf("sent %q on a closed channel, stats %+v", f.sentData(), l.Stats())
		}
		// The same address gets the same number back, as it must while the relay remembers the binding.
		third, err := l.Connect(t.Context(), gatewayNode)
		if err != nil || third == ch {
			t.Errorf("Connect after Close: %v", err)
		}
		_ = l.Close()
		<-third.Done()
	})
}

func TestConnectRefused(t *testing.T) {
	bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
		var e *Error
		if _, err := l.Connect(t.Context(), clientNode); !errors.As(err, &e) || e.Code != CodeNotFound {
			t.Errorf("absent peer: %v", err)
		}
		if _, err := l.Connect(t.Context(), identity.Node{}); err == nil {
			t.Error("connected to nobody")
		}
		f.on(stun.MethodChannelBind, func(m *stun.Message) *stun.Message { return refuse(m, CodeForbidden) })
		if _, err := l.Connect(t.Context(), gatewayNode); !errors.As(err, &e) || e.Code != CodeForbidden || e.Op != "bind channel" {
			t.Errorf("refused binding: %v", err)
		}
		f.on(stun.MethodChannelBind, func(*stun.Message) *stun.Message { return nil })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := l.Connect(ctx, gatewayNode); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("unanswered binding: %v", err)
		}
		f.on(stun.MethodChannelBind, nil)
		if _, err := l.Connect(t.Context(), gatewayNode); err != nil {
			t.Errorf("after that: %v", err)
		}
		// The relay forgets the allocation: the leg finds out from whatever it asks next.
		f.on(wire.MethodRendezvous, func(m *stun.Message) *stun.Message { return refuse(m, CodeMismatch) })
		f.on(stun.MethodRefresh, func(m *stun.Message) *stun.Message { return refuse(m, CodeMismatch) })
		if _, err := l.Connect(t.Context(), gatewayNode); err == nil {
			t.Error("connected")
		}
		lostWithin(t, l, 0, time.Second)
	})
}

// A channel whose refresh is refused ends, and the leg goes on.
func TestChannelLost(t *testing.T) {
	bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
		ch, err := l.Connect(t.Context(), gatewayNode)
		if err != nil {
			t.Fatal(err)
		}
		f.on(stun.MethodChannelBind, func(m *stun.Message) *stun.Message { return refuse(m, CodeForbidden) })
		start := time.Now()
		<-ch.Done()
		if d := time.Since(start); d > channelRefresh+channelTick+time.Second {
			t.Errorf("the channel ended after %v", d)
		}
		if l.Err() != nil {
			t.Error(l.Err())
		}
	})
}

type arrivals struct {
	bubbleChan chan string
}

func (a arrivals) Receive(b datagram.Batch) {
	for p, ok := b.Next(); ok; p, ok = b.Next() {
		a.bubbleChan <- string(p)
	}
	b.Release()
}

func TestOnRendezvous(t *testing.T) {
	type call struct {
		peer identity.Node
		from netip.AddrPort
		ch   *Channel
	}
	var mu sync.Mutex // guards calls
	var calls []call
	seen := func() []call {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(calls)
	}
	cfg := fakeConfig()
	arrived := make(chan string, 10)
	cfg.OnRendezvous = func(peer identity.Node, from netip.AddrPort, ch *Channel) {
		ch.SetReceiver(arrivals{arrived})
		mu.Lock()
		defer mu.Unlock()
		calls = append(calls, call{peer, from, ch})
	}
	bubble(t, cfg, func(t *testing.T, f *fakeRelay, l *Leg) {
		from := netip.MustParseAddrPort("203.0.113.9:4321")
		ask := func(relayed netip.AddrPort) {
			f.indicate(wire.MethodRendezvous, wire.Node(clientNode), xor(stun.AttrXORPeerAddress, relayed), xor(stun.AttrXORMappedAddress, from))
			time.Sleep(time.Second)
		}
		at := func(i int) netip.AddrPort {
			return netip.AddrPortFrom(peerRelayed.Addr(), peerRelayed.Port()+uint16(i))
		}
		ask(at(0))
		ask(at(0)) // a duplicate
		calls := seen()
		if len(calls) != 1 || calls[0].peer != clientNode || calls[0].from != from {
			t.Fatalf("calls %+v, want one", calls)
		}
		first := calls[0].ch
		if got := f.boundTo(first.number); got != at(0) {
			t.Errorf("bound to %v", got)
		}
		// What comes on the channel reaches its receiver; what comes on another is counted.
		buf := datagram.NewBuffer()
		buf.Retain()
		frame := append(buf.B[:0], cd(first.number, "abcd", 0)...)
		l.data(first.number, datagram.NewBatch(frame, len(frame), 4, 0, buf))
		l.data(first.number+1, datagram.NewBatch(frame, len(frame), 4, 0, buf))
		if got := <-arrived; got != "abcd" {
			t.Errorf("arrived %q", got)
		}
		if st := l.Stats(); st.ReceivedBytes != 4 || st.ReceivedDatagrams != 1 || st.DroppedUnbound != 1 {
			t.Errorf("stats %+v", st)
		}
		// The peer comes back with a new allocation: a fresh channel. The old one ends once it has been silent for a while.
		ask(at(1))
		calls = seen()
		if len(calls) != 2 || calls[1].ch == first || calls[1].ch.PeerAddr() != at(1) {
			t.Fatalf("calls %+v, want a second", calls)
		}
		select {
		case <-first.Done():
			t.Error("the old channel ended before the peer can have moved")
		default:
		}
		start := time.Now()
		<-first.Done()
		if d := time.Since(start); d > (supersededTicks+1)*channelTick {
			t.Errorf("the silent old channel lived on for %v", d)
		}
		time.Sleep(time.Hour)
		select {
		case <-calls[1].ch.Done():
			t.Error("the only channel of a silent peer ended")
		default:
		}
		// More than a peer may have: the oldest goes at once.
		for i := range maxPerPeer {
			ask(at(2 + i))
		}
		select {
		case <-calls[1].ch.Done():
		default:
			t.Error("a peer has more channels than it may")
		}
		if n := l.Stats().Channels; n != maxPerPeer {
			t.Errorf("%d channels", n)
		}
		// Nonsense is ignored.
		f.indicate(wire.MethodRendezvous)
		f.indicate(wire.MethodRendezvous, stun.RawAttribute{Type: wire.AttrNode, Value: bytes.Repeat([]byte("x"), 500)})
		f.indicate(wire.MethodRendezvous, wire.Node(clientNode))
		time.Sleep(time.Second)
		calls = seen()
		if l.Err() != nil || len(calls) != 2+maxPerPeer {
			t.Errorf("%d calls, %v", len(calls), l.Err())
		}
	})
}

// Numbers are not given to another address before the relay has forgotten them; when they run out, that is said.
func TestChannelNumbers(t *testing.T) {
	bubble(t, fakeConfig(), func(t *testing.T, f *fakeRelay, l *Leg) {
		peer := func(i int) identity.Node {
			return identity.Node{Org: "acme", Kind: identity.Client, ID: fmt.Sprint("c-", i)}
		}
		addr := func(i int) netip.AddrPort {
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i >> 12)}), uint16(1+i))
		}
		const all = maxChannel - minChannel + 1
		for i := range all {
			ch, err := l.bind(t.Context(), peer(i), addr(i), nil)
			if err != nil {
				t.Fatalf("channel %d: %v", i, err)
			}
			ch.Close()
		}
		if _, err := l.bind(t.Context(), peer(all), addr(all), nil); !errors.Is(err, errNoNumbers) {
			t.Errorf("channel beyond the last: %v", err)
		}
		if ch, err := l.bind(t.Context(), peer(7), addr(7), nil); err != nil {
			t.Errorf("an address that has a number: %v", err)
		} else {
			ch.Close()
		}
		time.Sleep(channelLifetime + channelQuarantine + 2*channelTick)
		f.mu.Lock()
		clear(f.bound)
		f.mu.Unlock()
		if _, err := l.bind(t.Context(), peer(all), addr(all), nil); err != nil {
			t.Errorf("after their rest: %v", err)
		}
	})
}

// No log line and no error has the password or the nonce in it.
func TestNoSecrets(t *testing.T) {
	var out bytes.Buffer
	cfg := fakeConfig()
	cfg.Logger = slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))
	const secret = "hunter2-hunter2"
	cfg.Credentials = func() (string, string) { return "u", secret }
	synctest.Test(t, func(t *testing.T) {
		f := newFakeRelay(t)
		f.password, f.nonce = secret, "nonce-nonce"
		l := up(t, f, cfg)
		_, err := l.Connect(t.Context(), clientNode)
		f.on(stun.MethodRefresh, func(m *stun.Message) *stun.Message {
			return refuse(m, CodeUnauthorized, stun.NewRealm(wire.Realm), stun.NewNonce(f.nonce))
		})
		lostWithin(t, l, 0, time.Hour)
		_ = l.Close()
		fmt.Fprintln(&out, err, l.Err())
	})
	if s := out.String(); strings.Contains(s, secret) || strings.Contains(s, "nonce-nonce") || !strings.Contains(s, "leg is lost") {
		t.Errorf("log and errors:\n%s", s)
	}
}

func TestConfig(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Config)
		ok     bool
	}{
		{"complete", func(*Config) {}, true},
		{"no relay", func(c *Config) { c.Relay = identity.Node{} }, false},
		{"no address", func(c *Config) { c.Addrs = nil }, false},
		{"no verification", func(c *Config) { c.Verify = nil }, false},
		{"no credentials", func(c *Config) { c.Credentials = nil }, false},
		{"unknown transport", func(c *Config) { c.Transport = "sctp" }, false},
		{"negative", func(c *Config) { c.Keepalive = -1 }, false},
	} {
		c := fakeConfig()
		tt.change(&c)
		if err := c.validate(); (err == nil) != tt.ok {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}
