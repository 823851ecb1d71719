package leg_test

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"sallyway/internal/datagram"
	"sallyway/relay/leg"
)

// A relay that has only IPv6: the leg's wish for IPv4 is refused, and it takes what there is. ECN passes on IPv6, too.
func TestIPv6(t *testing.T) {
	if c, err := net.ListenPacket("udp6", "[::1]:0"); err != nil {
		t.Skip("no IPv6 on loopback:", err)
	} else {
		c.Close()
	}
	l := startRelayOn(t, newPKI(t, relayNode), netip.MustParseAddrPort("[::1]:0"), func(f func() error) error { return f() })
	for _, tr := range []leg.Transport{leg.UDP, leg.TLS} {
		p := connect(t, l.config(clientNode, tr), l.config(gatewayNode, tr))
		if !p.client.RelayedAddr().Addr().Is6() || !p.client.ReflexiveAddr().Addr().Is6() {
			t.Errorf("relayed %v, reflexive %v", p.client.RelayedAddr(), p.client.ReflexiveAddr())
		}
		if tr == leg.UDP && p.out.MaxPayload() != 1500-48-4 {
			t.Errorf("largest payload %d", p.out.MaxPayload())
		}
		exchange(t, p.out, p.in, 4<<20, 64<<10, 1400)
		p.client.Close()
		p.gateway.Close()
	}
}

type batches chan datagram.Batch

func (b batches) Receive(x datagram.Batch) { b <- x }

// What the sender marks reaches the receiver, and a super-packet stays together all the way: stride, skip and count say so.
func TestSuperPacket(t *testing.T) {
	l := startRelay(t, newPKI(t, relayNode))
	p := connect(t, l.config(clientNode, leg.UDP), l.config(gatewayNode, leg.UDP))
	got := make(batches, 100)
	p.in.SetReceiver(got)
	for _, ecn := range []datagram.ECN{datagram.ECT0, datagram.CE, datagram.ECT1, datagram.NotECT} {
		p.out.Send(make([]byte, 20*1300+700), 1300, ecn)
		left, largest := 21, 0
		for left > 0 {
			b := <-got
			if b.ECN != ecn || b.Skip != 4 {
				t.Errorf("ECN %d, skip %d; want ECN %d, skip 4", b.ECN, b.Skip, ecn)
			}
			largest = max(largest, b.Count())
			left -= b.Count()
			b.Release()
		}
		if largest < 2 && os.Getenv("SALLYWAY_NO_GSO") == "" {
			t.Errorf("21 datagrams arrived one by one")
		}
	}
}

// inNamespace runs f on a thread in a network namespace of its own whose loopback has the MTU.
func inNamespace(t *testing.T, mtu string, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for a network namespace")
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine, and the namespace with it
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("make a network namespace: %v", err)
			return
		}
		if out, err := exec.Command("ip", "link", "set", "lo", "up", "mtu", mtu).CombinedOutput(); err != nil {
			t.Errorf("ip link set lo: %v: %s", err, out)
			return
		}
		f()
	})
	wg.Wait()
}

// Datagrams beyond the path's MTU are dropped and counted, never fragmented, so that DPLPMTUD finds the limit; smaller ones pass, also
// when they come in the same super-packet size.
func TestSmallMTU(t *testing.T) {
	key := newPKI(t, relayNode)
	inNamespace(t, "1400", func() {
		l := startRelay(t, key)
		cfg := l.config(clientNode, leg.UDP)
		cfg.MTU = 1400
		p := connect(t, cfg, l.config(gatewayNode, leg.UDP))
		fits := p.out.MaxPayload()
		if fits != 1400-28-4 {
			t.Errorf("largest payload %d", fits)
		}
		before := p.client.Stats()
		p.out.Send(make([]byte, 10*(fits+1)), fits+1, datagram.ECT0)
		p.out.Send(make([]byte, fits+1), 0, datagram.ECT0)
		waitFor(t, "11 datagrams counted as too large", func() bool { return p.client.Stats().DroppedSize-before.DroppedSize == 11 })
		if p.client.Stats().SentDatagrams != before.SentDatagrams {
			t.Error("datagrams beyond the MTU count as sent")
		}
		exchange(t, p.out, p.in, 4<<20, 128<<10, fits)
		p.client.Close()
		p.gateway.Close()
		l.stop()
	})
}
