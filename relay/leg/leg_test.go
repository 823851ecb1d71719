package leg_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/relay/leg"
	"sallyway/relay/wire"
)

// receiver takes datagrams one by one.
type receiver func(payload []byte)

func (r receiver) Receive(b datagram.Batch) {
	for p, ok := b.Next(); ok; p, ok = b.Next() {
		r(p)
	}
	b.Release()
}

// exchange sends total bytes over ch in super-packets, with at most window bytes on the way, and holds what arrives at the other end to a
// checksum.
func exchange(t *testing.T, from, to *leg.Channel, total, window, segment int) {
	t.Helper()
	if from.Leg().Transport() == leg.TLS {
		window = min(window, 24<<10) // its queue drops what takes long to drain, on a busy machine, too
	}
	want, got := sha256.New(), sha256.New()
	var arrived atomic.Int64
	progress := make(chan struct{}, 1)
	var bad atomic.Int64
	next := uint64(0)
	to.SetReceiver(receiver(func(p []byte) {
		if len(p) < 8 || binary.BigEndian.Uint64(p) != next {
			bad.Add(1)
		}
		next++
		got.Write(p)
		arrived.Add(int64(len(p)))
		select {
		case progress <- struct{}{}:
		default:
		}
	}))
	defer to.SetReceiver(nil)
	rnd := rand.New(rand.NewPCG(1, 2))
	super := make([]byte, 44*segment)
	for i := range super {
		super[i] = byte(rnd.Uint32())
	}
	seq, sent := uint64(0), 0
	for sent < total {
		n := min(1+rnd.IntN(len(super)), window/2)
		if n%segment != 0 && n%segment < 8 {
			n += 8
		}
		for at := 0; at < n; at += segment {
			binary.BigEndian.PutUint64(super[at:], seq)
			seq++
		}
		want.Write(super[:n])
		from.Send(super[:n], segment, datagram.ECT0)
		sent += n
		for timeout := time.After(10 * time.Second); int64(sent)-arrived.Load() > int64(window/2); {
			select {
			case <-progress:
			case <-timeout:
				t.Fatalf("%d of %d bytes arrived; sender %+v, receiver %+v", arrived.Load(), sent, from.Leg().Stats(), to.Leg().Stats())
			}
		}
	}
	for timeout := time.After(10 * time.Second); arrived.Load() < int64(sent); {
		select {
		case <-progress:
		case <-timeout:
			t.Fatalf("%d of %d bytes arrived; sender %+v, receiver %+v", arrived.Load(), sent, from.Leg().Stats(), to.Leg().Stats())
		}
	}
	to.SetReceiver(nil)
	if bad.Load() != 0 || !bytes.Equal(want.Sum(nil), got.Sum(nil)) {
		t.Errorf("%d datagrams out of place; checksums %x and %x", bad.Load(), want.Sum(nil), got.Sum(nil))
	}
}

func TestExchange(t *testing.T) {
	l := startRelay(t, newPKI(t, relayNode))
	for _, tt := range []struct {
		client, gateway leg.Transport
		flags           wire.Flags
		total, window   int
	}{
		{leg.UDP, leg.UDP, wire.FlagPlainData, 100 << 20, 1 << 20},
		{leg.TLS, leg.TLS, wire.FlagPlainData, 30 << 20, 128 << 10},
		{leg.UDP, leg.TLS, wire.FlagPlainData, 30 << 20, 128 << 10},
		{leg.UDP, leg.UDP, "", 2 << 20, 32 << 10}, // data in DTLS
	} {
		t.Run(fmt.Sprintf("%s-%s-%s", tt.client, tt.gateway, tt.flags), func(t *testing.T) {
			client, gateway := l.config(clientNode, tt.client), l.config(gatewayNode, tt.gateway)
			client.Credentials = credentials(clientNode, tt.flags)
			p := connect(t, client, gateway)
			segment := min(p.out.MaxPayload(), p.in.MaxPayload(), 1452)
			start := time.Now()
			exchange(t, p.out, p.in, tt.total, tt.window, segment)
			exchange(t, p.in, p.out, tt.total, tt.window, segment)
			t.Logf("%d MB each way in %v", tt.total>>20, time.Since(start).Round(time.Millisecond))
			for _, x := range []*leg.Leg{p.client, p.gateway} {
				st := x.Stats()
				if st.DroppedClosed+st.DroppedError+st.DroppedFull+st.DroppedMalformed+st.DroppedSize != 0 {
					t.Errorf("drops: %+v", st)
				}
				if err := x.Close(); err != nil {
					t.Error(err)
				}
			}
			waitFor(t, "the relay to forget both", func() bool { return l.Allocations() == 0 })
		})
	}
}

func waitFor(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited 5 s for %s", what)
		}
	}
}

// What is too large for the path is dropped and counted, and harms nothing.
func TestSendTooLarge(t *testing.T) {
	l := startRelay(t, newPKI(t, relayNode))
	for _, tr := range []leg.Transport{leg.UDP, leg.TLS} {
		p := connect(t, l.config(clientNode, tr), l.config(gatewayNode, tr))
		before := p.client.Stats().DroppedSize
		p.out.Send(make([]byte, 70000), 0, 0)
		p.out.Send(make([]byte, 200000), 66000, 0)
		if got := p.client.Stats().DroppedSize - before; got != 1+4 {
			t.Errorf("%s: %d datagrams counted as too large, want 5", tr, got)
		}
		p.out.Send(nil, 0, 0)
		exchange(t, p.out, p.in, 1<<10, 1<<10, 100)
		p.client.Close()
		p.gateway.Close()
	}
}

// A TLS leg whose TCP connection does not drain drops, counts, and does not block.
func TestQueueFull(t *testing.T) {
	l := startRelay(t, newPKI(t, relayNode))
	cfg := l.config(clientNode, leg.TLS)
	cfg.Queue = 32 << 10
	p := connect(t, cfg, l.config(gatewayNode, leg.TLS))
	b := make([]byte, 1<<20)
	start := time.Now()
	for range 200 {
		p.out.Send(b, 1200, 0)
	}
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("sending blocked for %v", d)
	}
	st := p.client.Stats()
	if st.DroppedFull == 0 {
		t.Error("200 MB went into a queue of 32 KiB")
	}
	if _, err := p.client.Connect(t.Context(), gatewayNode); err != nil {
		t.Errorf("control starves: %v", err)
	}
}

func TestDialRefused(t *testing.T) {
	l := startRelay(t, newPKI(t, relayNode))
	closed, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := closed.LocalAddr().(*net.UDPAddr).AddrPort()
	closed.Close()
	stranger := newPKI(t, relayNode)
	for _, tr := range []leg.Transport{leg.UDP, leg.TLS} {
		for _, tt := range []struct {
			name   string
			change func(*leg.Config)
			code   int
			is     error
			says   string
		}{
			{"expired", func(c *leg.Config) {
				u := wire.Username{Expiry: time.Now().Add(-time.Hour), Node: clientNode, Flags: wire.FlagPlainData}.String()
				c.Credentials = func() (string, string) { return u, wire.Password(credentialKey, u) }
			}, 401, nil, "expired"},
			{"wrong key", func(c *leg.Config) {
				u := wire.Username{Expiry: time.Now().Add(time.Hour), Node: clientNode}.String()
				c.Credentials = func() (string, string) { return u, wire.Password([]byte("another key"), u) }
			}, 401, nil, "renew"},
			{"closed port", func(c *leg.Config) { c.Addrs = []netip.AddrPort{nobody} }, 0, syscall.ECONNREFUSED, ""},
			{"other relay", func(c *leg.Config) { c.Relay.ID = "r-2" }, 0, nil, "want relay platform.shared/relay/r-2"},
			{"foreign root", func(c *leg.Config) {
				c.Verify = func(chain []*x509.Certificate) error {
					_, err := stranger.trust.Verify(chain, x509.ExtKeyUsageServerAuth)
					return err
				}
			}, 0, nil, "verify relay"},
			{"socket hook", func(c *leg.Config) {
				c.Control = func(string, string, syscall.RawConn) error { return errors.New("no such mark") }
			}, 0, nil, "no such mark"},
		} {
			t.Run(fmt.Sprintf("%s/%s", tr, tt.name), func(t *testing.T) {
				cfg := l.config(clientNode, tr)
				tt.change(&cfg)
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				start := time.Now()
				lg, err := leg.Dial(ctx, cfg)
				if err == nil {
					lg.Close()
					t.Fatal("dialled")
				}
				if time.Since(start) > 3*time.Second {
					t.Errorf("took %v", time.Since(start))
				}
				var e *leg.Error
				if tt.code != 0 && (!errors.As(err, &e) || int(e.Code) != tt.code) {
					t.Errorf("error %v, want code %d", err, tt.code)
				}
				if tt.is != nil && !errors.Is(err, tt.is) {
					t.Errorf("error %v, want %v", err, tt.is)
				}
				if !strings.Contains(err.Error(), tt.says) {
					t.Errorf("error %q does not say %q", err, tt.says)
				}
			})
		}
	}
	t.Run("second address", func(t *testing.T) {
		cfg := l.config(clientNode, leg.UDP)
		cfg.Addrs = []netip.AddrPort{nobody, l.addr}
		if lg := dial(t, cfg); lg.RemoteAddr() != l.addr {
			t.Errorf("reached %v", lg.RemoteAddr())
		}
	})
	t.Run("nobody answers", func(t *testing.T) {
		silent, err := net.ListenPacket("udp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
		cfg := l.config(clientNode, leg.UDP)
		cfg.Addrs = []netip.AddrPort{silent.LocalAddr().(*net.UDPAddr).AddrPort()}
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		if _, err := leg.Dial(ctx, cfg); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
	})
}

func TestConnectRefused(t *testing.T) {
	l := startRelay(t, newPKI(t, relayNode))
	dial(t, l.config(otherNode, leg.UDP))
	client := dial(t, l.config(clientNode, leg.UDP))
	for _, tt := range []struct {
		peer identity.Node
		code int
	}{
		{otherNode, 403},
		{identity.Node{Org: "acme", Kind: identity.Client, ID: "c-2"}, 403},
		{gatewayNode, 404},
	} {
		var e *leg.Error
		if _, err := client.Connect(t.Context(), tt.peer); !errors.As(err, &e) || int(e.Code) != tt.code {
			t.Errorf("%v: %v, want %d", tt.peer, err, tt.code)
		}
	}
	if client.Err() != nil {
		t.Error(client.Err())
	}
}

// lost waits for the leg's end, having it send meanwhile, and returns how long that took.
func lost(t *testing.T, p pair, within time.Duration) time.Duration {
	t.Helper()
	start := time.Now()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-p.client.Done():
			d := time.Since(start)
			t.Logf("lost after %v: %v", d.Round(time.Millisecond), p.client.Err())
			if d > within {
				t.Errorf("noticed after %v, want %v", d, within)
			}
			<-p.out.Done()
			return d
		case <-tick.C:
			p.out.Send(make([]byte, 14520), 1452, 0)
			if time.Since(start) > 10*time.Second {
				t.Fatal("not noticed")
			}
		}
	}
}

func TestLost(t *testing.T) {
	key := newPKI(t, relayNode)
	// Generous bounds for a busy machine; what to expect is 65 ms where checks decide.
	const bound = time.Second
	t.Run("relay restarted silently", func(t *testing.T) {
		a, b := startRelay(t, key), startRelay(t, key)
		hop := startProxy(t, a.addr)
		cfg := a.config(clientNode, leg.UDP)
		cfg.Addrs = []netip.AddrPort{hop.addr}
		p := connect(t, cfg, a.config(gatewayNode, leg.UDP))
		hop.target.Store(&b.addr)
		lost(t, p, bound)
		if !strings.Contains(p.client.Err().Error(), "does not know") {
			t.Errorf("lost for another reason: %v", p.client.Err())
		}
		// The next leg on the restarted relay is up at once.
		dial(t, cfg)
	})
	t.Run("silence and a suspicion", func(t *testing.T) {
		a := startRelay(t, key)
		hop := startProxy(t, a.addr)
		cfg := a.config(clientNode, leg.UDP)
		cfg.Addrs = []netip.AddrPort{hop.addr}
		p := connect(t, cfg, a.config(gatewayNode, leg.UDP))
		hop.target.Store(nil)
		p.client.Suspect()
		lost(t, p, bound)
	})
	t.Run("port closed", func(t *testing.T) {
		a := startRelay(t, key)
		front := startProxy(t, a.addr)
		cfg := a.config(clientNode, leg.UDP)
		cfg.Addrs = []netip.AddrPort{front.addr}
		p := connect(t, cfg, a.config(gatewayNode, leg.UDP))
		front.close()
		lost(t, p, bound)
		if !errors.Is(p.client.Err(), syscall.ECONNREFUSED) {
			t.Errorf("lost for another reason: %v", p.client.Err())
		}
	})
	for _, tr := range []leg.Transport{leg.UDP, leg.TLS} {
		t.Run(fmt.Sprintf("relay stopped/%s", tr), func(t *testing.T) {
			a := startRelay(t, key)
			p := connect(t, a.config(clientNode, tr), a.config(gatewayNode, tr))
			a.stop()
			lost(t, p, bound)
		})
		t.Run(fmt.Sprintf("revoked/%s", tr), func(t *testing.T) {
			a := startRelay(t, key)
			p := connect(t, a.config(clientNode, tr), a.config(gatewayNode, tr))
			a.SetDenied([]identity.Node{clientNode})
			lost(t, p, bound)
			var e *leg.Error
			if !errors.As(p.client.Err(), &e) || e.Code != leg.CodeForbidden {
				t.Errorf("lost for %v, want 403", p.client.Err())
			}
			if p.gateway.Err() != nil {
				t.Errorf("the other end went, too: %v", p.gateway.Err())
			}
			if _, err := leg.Dial(t.Context(), a.config(clientNode, tr)); err == nil {
				t.Error("a revoked node dialled")
			}
		})
		t.Run(fmt.Sprintf("drained/%s", tr), func(t *testing.T) {
			a := startRelay(t, key)
			p := connect(t, a.config(clientNode, tr), a.config(gatewayNode, tr))
			left := make(chan int, 1)
			go func() { left <- a.Drain(context.Background(), 5*time.Second) }()
			for _, x := range []*leg.Leg{p.client, p.gateway} {
				select {
				case <-x.Draining():
				case <-time.After(bound):
					t.Fatal("not told of the drain")
				}
			}
			exchange(t, p.out, p.in, 1<<20, 64<<10, 1200) // it still works
			var e *leg.Error
			if _, err := leg.Dial(t.Context(), a.config(clientNode, tr)); !errors.As(err, &e) || e.Code != leg.CodeInsufficient {
				t.Errorf("dialling a draining relay: %v", err)
			}
			p.client.Close()
			p.gateway.Close()
			if n := <-left; n != 0 {
				t.Errorf("%d allocations left", n)
			}
		})
	}
}

// A credential that was renewed (another expiry, hence another user name) refreshes the same allocation.
func TestRenewal(t *testing.T) {
	l := startRelay(t, newPKI(t, relayNode))
	for _, tr := range []leg.Transport{leg.UDP, leg.TLS} {
		cfg := l.config(clientNode, tr)
		var hours atomic.Int64
		cfg.Credentials = func() (string, string) {
			u := wire.Username{Expiry: time.Now().Add(time.Duration(1+hours.Load()) * time.Hour), Node: clientNode, Flags: wire.FlagPlainData}.String()
			return u, wire.Password(credentialKey, u)
		}
		p := connect(t, cfg, l.config(gatewayNode, tr))
		hours.Add(5)
		checks := p.client.Stats().Checks
		p.client.Suspect()
		waitFor(t, "the check", func() bool { return p.client.Stats().Checks > checks })
		if _, err := p.client.Connect(t.Context(), gatewayNode); err != nil {
			t.Errorf("%s: %v", tr, err)
		}
		exchange(t, p.out, p.in, 1<<10, 1<<10, 100)
		p.client.Close()
		p.gateway.Close()
	}
}

// A peer that moves to a new leg on the same relay does so make before break: both of its channels work for a while.
func TestMove(t *testing.T) {
	l := startRelay(t, newPKI(t, relayNode))
	chans := make(chan *leg.Channel, 4)
	cfg := l.config(gatewayNode, leg.UDP)
	cfg.OnRendezvous = func(_ identity.Node, _ netip.AddrPort, ch *leg.Channel) { chans <- ch }
	dial(t, cfg)
	slow, fast := dial(t, l.config(clientNode, leg.TLS)), dial(t, l.config(clientNode, leg.UDP))
	a, err := slow.Connect(t.Context(), gatewayNode)
	if err != nil {
		t.Fatal(err)
	}
	ain := <-chans
	b, err := fast.Connect(t.Context(), gatewayNode)
	if err != nil {
		t.Fatal(err)
	}
	bin := <-chans
	if ain == bin {
		t.Fatal("one channel for two legs")
	}
	for _, x := range []struct{ out, in *leg.Channel }{{a, ain}, {b, bin}, {a, ain}} {
		got := make(chan struct{}, 100)
		x.in.SetReceiver(receiver(func([]byte) { got <- struct{}{} }))
		waitFor(t, "data", func() bool {
			x.out.Send([]byte("hello"), 0, 0)
			select {
			case <-got:
				return true
			case <-time.After(5 * time.Millisecond):
				return false
			}
		})
		x.in.SetReceiver(nil)
	}
}

// Neither sending nor receiving allocates per packet.
func TestAllocs(t *testing.T) {
	l := startRelay(t, newPKI(t, relayNode))
	for _, tr := range []leg.Transport{leg.UDP, leg.TLS} {
		p := connect(t, l.config(clientNode, tr), l.config(gatewayNode, tr))
		super := make([]byte, 20*1200)
		arrived := make(chan struct{}, 1)
		var n int
		p.in.SetReceiver(receiver(func([]byte) {
			if n++; n%20 == 0 {
				arrived <- struct{}{}
			}
		}))
		// The relay and both legs are in this process, so the count takes everything in. It is per 20 datagrams; what is left is the TLS
		// library's, per record.
		got := testing.AllocsPerRun(300, func() {
			p.out.Send(super, 1200, datagram.ECT0)
			<-arrived
		})
		t.Logf("%s: %v allocations per 20 datagrams, end to end", tr, got)
		if limit := map[leg.Transport]float64{leg.UDP: 0, leg.TLS: 19}[tr]; got > limit {
			t.Errorf("%s: %v allocations per 20 datagrams, want at most %v", tr, got, limit)
		}
		p.client.Close()
		p.gateway.Close()
	}
}
