package leg_test

import (
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sallyway/internal/datagram"
	"sallyway/relay/leg"
)

// ethtoolSet sets one of the offloads that old ethtool commands name.
func ethtoolSet(name string, command, value uint32) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var request struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	arg := [2]uint32{command, value} // struct ethtool_value
	copy(request.name[:unix.IFNAMSIZ-1], name)
	request.data = unsafe.Pointer(&arg)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
	runtime.KeepAlive(&arg)
	if errno != 0 {
		return errno
	}
	return nil
}

// joined runs f on a thread that can be in either of two network namespaces, which a veth pair with an address at each end joins.
func joined(t *testing.T, f func(near, far func(func() error) error)) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine, and the namespaces with it
		err := func() error {
			var spaces [2]int
			for i := range spaces {
				if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
					return fmt.Errorf("make a network namespace: %w", err)
				}
				fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				spaces[i] = fd
			}
			in := func(i int) func(func() error) error {
				return func(do func() error) error {
					if err := unix.Setns(spaces[i], unix.CLONE_NEWNET); err != nil {
						return err
					}
					return do()
				}
			}
			attrs := netlink.NewLinkAttrs()
			attrs.Name = "end0"
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "end1", PeerNamespace: netlink.NsFd(spaces[0])}); err != nil {
				return fmt.Errorf("make a veth pair: %w", err)
			}
			for i, name := range []string{"end1", "end0"} {
				if err := in(i)(func() error {
					l, err := netlink.LinkByName(name)
					if err != nil {
						return err
					}
					addr, err := netlink.ParseAddr(fmt.Sprintf("192.0.2.%d/24", i+1))
					if err != nil {
						return err
					}
					if err := netlink.AddrAdd(l, addr); err != nil {
						return err
					}
					return netlink.LinkSetUp(l)
				}); err != nil {
					return err
				}
			}
			f(in(0), in(1))
			return nil
		}()
		if err != nil {
			t.Error(err)
		}
	}()
	<-done
}

// Legs on devices without the offloads that segmentation wants: kernels before 6.11 refuse a segmented write there (EIO), newer ones do it
// in software. Either way all of it passes, whole and in order, and so it does with the offloads off by environment.
func TestWithoutOffloads(t *testing.T) {
	key := newPKI(t, relayNode)
	for name, off := range map[string][]uint32{
		"no checksum offload":    {unix.ETHTOOL_STXCSUM},
		"no segmentation":        {unix.ETHTOOL_SGSO},
		"neither":                {unix.ETHTOOL_SGSO, unix.ETHTOOL_STXCSUM},
		"off by the environment": nil,
		"all on":                 nil,
	} {
		t.Run(name, func(t *testing.T) {
			if name == "off by the environment" {
				t.Setenv("SALLYWAY_NO_GSO", "1")
			}
			joined(t, func(near, far func(func() error) error) {
				for i, side := range []func(func() error) error{near, far} {
					for _, command := range off {
						if err := side(func() error { return ethtoolSet([]string{"end1", "end0"}[i], command, 0) }); err != nil {
							t.Errorf("turn an offload off: %v", err)
							return
						}
					}
				}
				l := startRelayOn(t, key, netip.MustParseAddrPort("192.0.2.2:0"), far)
				p := connectFrom(t, l.config(clientNode, leg.UDP), l.config(gatewayNode, leg.UDP), near, near)
				before := p.client.Stats()
				exchange(t, p.out, p.in, 4<<20, 128<<10, 1452)
				exchange(t, p.in, p.out, 4<<20, 128<<10, 1452)
				got := make(batches, 1000)
				p.in.SetReceiver(got)
				p.out.Send(make([]byte, 43*1452+100), 1452, datagram.ECT0)
				largest := 0
				for left := 44; left > 0; {
					b := <-got
					n := b.Count()
					largest, left = max(largest, n), left-n
					b.Release()
				}
				if name == "all on" && largest < 2 {
					t.Error("44 datagrams arrived one by one")
				}
				after := p.client.Stats()
				t.Logf("at most %d datagrams in one piece", largest)
				if n := after.DroppedError + after.DroppedFull + after.DroppedSize - before.DroppedError - before.DroppedFull - before.DroppedSize; n != 0 {
					t.Errorf("%d datagrams dropped: %+v", n, after)
				}
				p.in.SetReceiver(nil)
				p.client.Close()
				p.gateway.Close()
				l.stop()
			})
		})
	}
}
