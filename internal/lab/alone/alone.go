// Package alone runs a test in namespaces of its own: network, mounts, host name. Code that acts on "the" network of its
// process, as an operating system's own does, cannot be tested on a locked thread, so the test's binary is started again
// for that one test, with every thread of it inside.
//
//	func TestLinks(t *testing.T) {
//		if !alone.Here(t) {
//			return // it has run in a process of its own, and t has its result
//		}
//		…
//	}
package alone

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inside is set in the environment of the process in the namespaces.
const inside = "SALLYWAY_TEST_ALONE"

// Here says whether the test runs in namespaces of its own. Where it does not, it has just been run in some, and its result
// is t's. It skips where there is no root. A test calls it first, and is no subtest.
func Here(t *testing.T) bool {
	t.Helper()
	if os.Getenv(inside) == t.Name() {
		// Mounts of the test are to be seen by nobody else.
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Fatalf("private mounts: %v", err)
		}
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("namespaces need root")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^"+regexp.QuoteMeta(t.Name())+"$", "-test.v")
	cmd.Env = append(os.Environ(), inside+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS,
		Pdeathsig:  syscall.SIGKILL,
	}
	runtime.LockOSThread() // Pdeathsig is about the thread that starts
	defer runtime.UnlockOSThread()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("in namespaces of its own: %v\n%s", err, out)
	}
	t.Logf("%s", out)
	return false
}

// Peer is another host: a network namespace with one operating system thread in it.
type Peer struct {
	calls chan func()
	ended chan struct{}
}

// NewPeer makes a host beside the test's own, and a wire to it: link is the name of the end here, and the peer's is called
// "eth0". Neither end is up. It is gone after the test.
func NewPeer(t *testing.T, link string, mac net.HardwareAddr) *Peer {
	t.Helper()
	p := &Peer{calls: make(chan func()), ended: make(chan struct{})}
	made := make(chan error)
	tid := make(chan int, 1)
	go func() {
		defer close(p.ended)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		tid <- unix.Gettid()
		made <- err
		for f := range p.calls {
			f()
		}
	}()
	if err := <-made; err != nil {
		t.Fatalf("make a network namespace: %v", err)
	}
	t.Cleanup(func() {
		close(p.calls)
		<-p.ended
	})
	ns, err := os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", <-tid))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = link, mac
	err = netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.Fd())})
	if err != nil {
		t.Fatalf("make the wire %s: %v", link, err)
	}
	return p
}

// Do runs f on the peer and waits for it. Sockets that f opens stay there; goroutines that it starts do not.
func (p *Peer) Do(f func() error) error {
	err := make(chan error, 1)
	p.calls <- func() { err <- f() }
	return <-err
}

// Up raises the peer's end of the wire and its loopback, and gives it addresses.
func (p *Peer) Up(addresses ...string) error {
	return p.Do(func() error {
		for _, name := range []string{"lo", "eth0"} {
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetUp(link); err != nil {
				return err
			}
			for _, a := range addresses {
				if name == "lo" {
					break
				}
				addr, err := netlink.ParseAddr(a)
				if err != nil {
					return err
				}
				if addr.IP.To4() == nil {
					addr.Flags |= unix.IFA_F_NODAD
				}
				if err := netlink.AddrAdd(link, addr); err != nil {
					return fmt.Errorf("address %s: %w", a, err)
				}
			}
		}
		return nil
	})
}
