package wan

import (
	"errors"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestNetemAttrs(t *testing.T) {
	a := netemAttrs(Direction{Delay: 40 * time.Millisecond, Jitter: 10 * time.Millisecond, Loss: 0.005, Rate: 100e6})
	if a.Latency != 45_000 || a.Jitter != 5_000 || a.Loss != 0.5 || a.Rate64 != 12_500_000 {
		t.Errorf("%+v, rate %d", a, a.Rate64)
	}
	if want := uint32((1_250_000 + 625_000) / 1500); a.Limit != want {
		t.Errorf("limit of %d packets, want %d", a.Limit, want)
	}
	if a = netemAttrs(Direction{Delay: time.Second}); a.Rate64 != 0 || a.Limit < 40_000 {
		t.Errorf("without a rate: %+v", a)
	}
}

// TestNetem holds that netem is used or refused, whatever the kernel has: never silently absent.
func TestNetem(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		if err := Netem("lo", Direction{MTU: 1400}); err == nil || errors.Is(err, ErrNoNetem) {
			t.Errorf("an MTU: %v", err)
		}
		if err := Netem("lo", Direction{Loss: 2}); err == nil || errors.Is(err, ErrNoNetem) {
			t.Errorf("a loss of 2: %v", err)
		}
		if err := Netem("none", Direction{}); err == nil || errors.Is(err, ErrNoNetem) {
			t.Errorf("no such device: %v", err)
		}
		err := Netem("lo", Direction{Delay: 20 * time.Millisecond, Loss: 0.01, Rate: 10e6})
		has := false
		lo, lerr := netlink.LinkByName("lo")
		if lerr != nil {
			t.Error(lerr)
			return
		}
		qs, lerr := netlink.QdiscList(lo)
		if lerr != nil {
			t.Error(lerr)
		}
		for _, q := range qs {
			has = has || q.Type() == "netem"
		}
		switch {
		case err == nil && !has:
			t.Error("no error and no netem")
		case err != nil && (!errors.Is(err, ErrNoNetem) || has || !strings.Contains(err.Error(), "lo")):
			t.Errorf("%v; netem there: %v", err, has)
		}
		t.Logf("netem: %v", err)
	}()
	<-done
}
