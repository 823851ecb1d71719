package leg

import (
	"net"
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sallyway/internal/datagram"
	"sallyway/relay/udpio"
)

// shaped runs f on a thread in a network namespace of its own whose loopback drains at the rate, as tc writes it.
func shaped(t *testing.T, rate string, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for a network namespace")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine, and the namespace with it
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("make a network namespace: %v", err)
			return
		}
		for _, args := range [][]string{
			{"ip", "link", "set", "lo", "up", "mtu", "1500"},
			{"tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", rate, "burst", "20kb", "limit", "20mb"},
		} {
			if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
				t.Errorf("%v: %v: %s", args, err, out)
				return
			}
		}
		f()
	}()
	<-done
}

// On a slow way out the socket holds little more than drains in 20 ms, where it would hold megabytes.
func TestBacklogFollowsTheRate(t *testing.T) {
	shaped(t, "40mbit", func() {
		sink, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Error(err)
			return
		}
		defer sink.Close()
		nc, err := net.DialUDP("udp4", nil, sink.LocalAddr().(*net.UDPAddr))
		if err != nil {
			t.Error(err)
			return
		}
		conn, _, err := udpio.New(nc, udpio.Config{WriteBuffer: writeBuffer})
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		raw, err := nc.SyscallConn()
		if err != nil {
			t.Error(err)
			return
		}
		up := &told{suspected: make(chan error, 1)}
		u := &udpCarrier{conn: conn, tx: conn.NewSender(), up: up, plain: true, raw: raw, backlog: backlog{most: 2 * writeBuffer}}
		u.out = newGatherer(u.transmitData, up)
		done := make(chan struct{})
		go func() {
			u.out.loop()
			close(done)
		}()
		defer func() {
			u.out.stop()
			<-done
		}()
		// Ten times what drains, until the buffer has shrunk, and for a moment more: what it held before must drain first.
		super := make([]byte, 14*1400)
		const want = 256 << 10 // 20 ms of 40 Mbit/s are 100 KB, and a run of 64 KiB goes beyond; what the kernel needs to keep it counts, too
		held, small := 0, 0
		tick := time.NewTicker(4 * time.Millisecond)
		defer tick.Stop()
		for end := time.Now().Add(10 * time.Second); small < 20 && time.Now().Before(end); {
			u.send(minChannel, super, 1400, datagram.ECT0)
			<-tick.C
			if held, err = unsent(raw); err != nil {
				t.Error(err)
				return
			}
			if _, full, _, _ := up.sending(); full > 0 && held > 0 && held < want {
				small++
			} else {
				small = 0
			}
		}
		sent, full, _, uerr := up.sending()
		t.Logf("%d bytes wait, %d datagrams sent, %d dropped: %v", held, sent, full, uerr)
		if small < 20 {
			t.Errorf("%d bytes wait in the socket, want less than %d", held, want)
		}
	})
}
