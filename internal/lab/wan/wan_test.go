package wan_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sallyway/internal/lab"
	"sallyway/internal/lab/wan"
)

const iperfPort = 5201

// network is a lab whose client has an emulated access link; none of the product runs.
func network(t *testing.T, link wan.Config) *lab.Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces")
	}
	l, err := lab.New(lab.Config{Raw: true, Access: &link})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

// ping sends echo requests from the client to the router, over the link and nothing else, and returns how many were
// answered and the smallest and mean round trip.
func ping(t *testing.T, l *lab.Lab, args ...string) (answered int, low, mean time.Duration) {
	t.Helper()
	path, err := lab.Program("ping")
	if err != nil {
		t.Skip(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	r, err := l.Client.Run(ctx, append(append([]string{path, "-n", "-q"}, args...), l.ResolverAddr().String())...)
	if err != nil && r.Code != 1 { // 1: some or all were not answered
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(\d+) received`).FindStringSubmatch(r.Stdout)
	if m == nil {
		t.Fatalf("ping says %q", r.Stdout)
	}
	answered, _ = strconv.Atoi(m[1])
	if _, times, ok := strings.Cut(r.Stdout, "mdev = "); ok {
		f := strings.Split(times, "/")
		ms := func(s string) time.Duration {
			x, _ := strconv.ParseFloat(s, 64)
			return time.Duration(x * float64(time.Millisecond))
		}
		low, mean = ms(f[0]), ms(f[1])
	}
	return answered, low, mean
}

func TestLinkDelay(t *testing.T) {
	way := wan.Direction{Delay: 20 * time.Millisecond}
	l := network(t, wan.Config{AtoB: way, BtoA: way})
	n, low, mean := ping(t, l, "-c", "20", "-i", "0.01")
	t.Logf("round trip of 40 ms: smallest %v, mean %v", low, mean)
	// Packets are never early; how late they are is the machine's load, except for the luckiest.
	if n != 20 || low < 40*time.Millisecond || low > 43*time.Millisecond {
		t.Fatalf("%d of 20 answered, smallest round trip %v", n, low)
	}
}

func TestLinkLoss(t *testing.T) {
	way := wan.Direction{Loss: 0.2}
	l := network(t, wan.Config{AtoB: way, BtoA: way, Seed: 1})
	n, _, _ := ping(t, l, "-c", "500", "-i", "0.001", "-W", "1")
	if share := float64(n) / 500; math.Abs(share-0.64) > 0.13 { // six standard deviations
		t.Fatalf("%.3f answered, want 0.64", share)
	}
	if s := l.AccessStats(); s.AtoB.Lost == 0 || s.BtoA.Lost == 0 {
		t.Fatalf("counted %+v", s)
	}
}

func TestLinkMTU(t *testing.T) {
	way := wan.Direction{MTU: 1400}
	l := network(t, wan.Config{AtoB: way, BtoA: way}) // the devices have 1500
	if n, _, _ := ping(t, l, "-c", "3", "-i", "0.01", "-M", "do", "-s", "1372", "-W", "1"); n != 3 {
		t.Errorf("1400 bytes: %d of 3 answered", n)
	}
	if n, _, _ := ping(t, l, "-c", "3", "-i", "0.01", "-M", "do", "-s", "1472", "-W", "1"); n != 0 {
		t.Errorf("1500 bytes: %d of 3 answered", n)
	}
	if s := l.AccessStats(); s.AtoB.MTUDrops != 3 {
		t.Errorf("counted %+v", s)
	}
}

// TestLinkCeiling tells what the emulator carries, which is no check: the machine decides. That TCP comes through whatever is
// cut out of its super-packets is one.
func TestLinkCeiling(t *testing.T) {
	for _, c := range []struct {
		name  string
		way   wan.Direction
		split bool
	}{
		{"super-packets whole", wan.Direction{Delay: time.Millisecond}, false},
		{"super-packets whole, 0.5 % loss", wan.Direction{Delay: time.Millisecond, Loss: 0.005}, false},
		{"packet by packet", wan.Direction{Delay: time.Millisecond}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := lab.Program("iperf3"); err != nil {
				t.Skip(err)
			}
			l := network(t, wan.Config{AtoB: c.way, BtoA: c.way, Split: c.split})
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if _, err := l.Private.Iperf3Server(ctx, iperfPort); err != nil {
				t.Fatal(err)
			}
			res, err := l.Client.Iperf3(ctx, lab.IperfRun{Addr: lab.RawAddr.String(), Port: iperfPort, Time: time.Second})
			if err != nil {
				t.Fatal(err)
			}
			if res.Bytes == 0 {
				t.Error("nothing has come")
			}
			if s := l.AccessStats().AtoB; c.way.Loss > 0 && (s.Lost == 0 || s.Passed < 50*s.Lost) {
				t.Errorf("counted %+v", s)
			}
			t.Logf("ceiling: %.0f Mbit/s; %+v", res.BitsPerSecond/1e6, l.AccessStats().AtoB)
		})
	}
}

// TestRunEnds holds that Run leaves nothing behind, and that the ends' failure is its own.
func TestRunEnds(t *testing.T) {
	before := runtime.NumGoroutine()
	a, b := newFake(), newFake()
	l, err := wan.New(wan.Config{A: a, B: b})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	a.in <- []byte{0x45, 1, 2, 3}
	if got := <-b.out; string(got) != "\x45\x01\x02\x03" {
		t.Fatalf("came as %x", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	soon, stop := context.WithTimeout(t.Context(), 5*time.Second)
	defer stop()
	err = lab.Until(soon, time.Millisecond, func() error {
		if n := runtime.NumGoroutine(); n > before {
			return fmt.Errorf("%d goroutines, %d before", n, before)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}

	c, d := newFake(), newFake()
	if l, err = wan.New(wan.Config{A: c, B: d}); err != nil {
		t.Fatal(err)
	}
	close(c.in)
	if err := l.Run(t.Context()); err == nil {
		t.Fatal("the end of an end is no error")
	}
}

// fake is an end without a device.
type fake struct {
	in   chan []byte
	out  chan []byte
	stop chan struct{}
}

func newFake() *fake {
	return &fake{in: make(chan []byte, 1), out: make(chan []byte, 1), stop: make(chan struct{})}
}

func (f *fake) HeaderLen() int { return 0 }

func (f *fake) Read(p []byte) (int, error) {
	select {
	case b, ok := <-f.in:
		if !ok {
			return 0, net.ErrClosed
		}
		return copy(p, b), nil
	case <-f.stop:
		return 0, os.ErrDeadlineExceeded
	}
}

func (f *fake) WriteParts(parts [][]byte) (int, error) {
	select {
	case f.out <- append([]byte(nil), parts[0]...):
		return len(parts[0]), nil
	default:
		return 0, unix.ENOBUFS
	}
}

func (f *fake) SetReadDeadline(time.Time) error { close(f.stop); return nil }

// TestLabNetem holds that a lab with netem has it or says that there is none.
func TestLabNetem(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces")
	}
	way := wan.Direction{Delay: 20 * time.Millisecond}
	l, err := lab.New(lab.Config{Raw: true, Access: &wan.Config{AtoB: way, BtoA: way}, AccessNetem: true})
	if errors.Is(err, wan.ErrNoNetem) {
		t.Log(err)
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	if n, low, _ := ping(t, l, "-c", "5", "-i", "0.01"); n != 5 || low < 40*time.Millisecond {
		t.Errorf("%d of 5 answered, smallest round trip %v", n, low)
	}
	if err := l.SetAccess(way, way); err == nil {
		t.Error("netem's link was changed")
	}
}

func TestLabSetAccess(t *testing.T) {
	way := wan.Direction{Delay: 20 * time.Millisecond}
	l := network(t, wan.Config{AtoB: way, BtoA: way})
	way.Delay = 5 * time.Millisecond
	if err := l.SetAccess(way, way); err != nil {
		t.Fatal(err)
	}
	if n, low, _ := ping(t, l, "-c", "10", "-i", "0.01"); n != 10 || low < 10*time.Millisecond || low > 20*time.Millisecond {
		t.Fatalf("%d of 10 answered, smallest round trip %v", n, low)
	}
}
