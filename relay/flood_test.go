package relay

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/pion/stun/v4"

	"sallyway/internal/identity"
	"sallyway/relay/udpio"
	"sallyway/relay/wire"
)

// floodVariable makes this program a flood (flooded) instead of a test. It says how long the datagrams are and from how many sockets.
const floodVariable = "SALLYWAY_RELAY_TEST_FLOOD"

// flood writes what standard input begins with to its sockets, over and over until standard input ends.
func flood(segment, sockets int) error {
	var socks []*udpio.Conn
	var to []udpio.Peer
	for i := range sockets {
		c, err := net.FileConn(os.NewFile(uintptr(3+i), "socket"))
		if err != nil {
			return err
		}
		sock, _, err := udpio.New(c.(*net.UDPConn), udpio.Config{})
		if err != nil {
			return err
		}
		socks = append(socks, sock)
		// Go takes an inherited socket for one that is not connected.
		to = append(to, udpio.Peer{Addr: c.RemoteAddr().(*net.UDPAddr).AddrPort()})
	}
	run := make([]byte, floodRun*segment)
	if _, err := io.ReadFull(os.Stdin, run); err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	for {
		for i, sock := range socks {
			_ = sock.Write(run, segment, 0, to[i]) // an ICMP error of an earlier one
		}
	}
}

// floodRun is how many datagrams a flood writes at once.
const floodRun = 64

// flooded has another process send run, floodRun datagrams of segment bytes, from the sockets of all of from over and over until the test ends.
func flooded(t *testing.T, run []byte, segment int, from ...*tester) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d", floodVariable, segment, len(from)), "GOMAXPROCS=1")
	cmd.Stderr = os.Stderr
	for _, a := range from {
		file, err := a.conn.(*net.UDPConn).File()
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, file)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if _, err := in.Write(run); err != nil {
		t.Fatal(err)
	}
}

const floodSize = 500 // bytes of payload of a flood's datagrams

// flooder is an allocation with two channels, and a run whose datagrams alternate between them: each is a write of its own for the relay.
func flooder(t *testing.T, l *lab, name string) (a *tester, run []byte) {
	t.Helper()
	a = allocated(t, l, node("acme", identity.Client, name))
	for k := range uint16(2) {
		g := allocated(t, l, node("acme", identity.Gateway, fmt.Sprintf("%s-%d", name, k)))
		a.want(0, a.bind(0x4001+k, g.relayed))
		g.want(0, g.bind(0x4001, a.relayed))
	}
	for k := range uint16(floodRun) {
		run = append(run, channelData(0x4001+k%2, string(make([]byte, floodSize)))...)
	}
	return a, run
}

// saturate sends more data through l than it can pass on, from several sources.
func saturate(t *testing.T, l *lab) {
	t.Helper()
	const sources = 4
	var from []*tester
	var run []byte
	for i := range sources {
		a, r := flooder(t, l, fmt.Sprintf("flood%d", i))
		from, run = append(from, a), r
	}
	flooded(t, run, floodSize+channelHeader, from...)
}

func (s *Server) queueDrops() (data, control uint64) {
	for _, sh := range s.sockets[1:] {
		data += sh.sock.Drops()
	}
	return data, s.sockets[0].sock.Drops()
}

// echo returns what asks a bare socket of this process, which knows no relay, for an echo: so long does the machine itself take.
func echo(t *testing.T) (ask func()) {
	t.Helper()
	far, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	near, err := net.DialUDP("udp4", nil, far.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 100)
		for {
			n, from, err := far.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = far.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	t.Cleanup(func() { far.Close(); near.Close(); <-done })
	return func() {
		b := make([]byte, 100)
		if _, err := near.Write(b); err != nil {
			t.Fatal(err)
		}
		if _, err := near.Read(b); err != nil {
			t.Fatal(err)
		}
	}
}

// TestControlIsNotStarved measures round trips of control while more data comes in than the relay can pass on. What a bare socket takes on
// the same busy machine is not held against the relay.
func TestControlIsNotStarved(t *testing.T) {
	const rounds, seldom, most = 200, 10, 50 * time.Millisecond
	cert, _ := certificate(t)
	l := start(t, func(c *Config) { c.Certificate = cert })
	plain := allocated(t, l, client1)
	secure, _, _ := dtlsDial(t, l, gateway1, wire.FlagPlainData)
	secure.allocate()
	plain.want(0, plain.do(stun.MethodRefresh))
	secure.want(0, secure.do(stun.MethodRefresh))
	saturate(t, l)

	until(t, "the data sockets overflow", func() bool { data, _ := l.queueDrops(); return data > 0 })
	before, _ := l.queueDrops()
	kinds := []struct {
		name  string
		every int // rounds; some things are limited
		ask   func()
	}{
		{"plain binding", seldom, func() { plain.want(0, plain.once(stun.MethodBinding)) }},
		{"plain refresh", 1, func() { plain.want(0, plain.do(stun.MethodRefresh)) }},
		{"DTLS binding", 1, func() { secure.want(0, secure.once(stun.MethodBinding)) }},
		{"DTLS refresh", 1, func() { secure.want(0, secure.do(stun.MethodRefresh)) }},
		{"rendezvous, indication", seldom, func() {
			plain.want(0, plain.do(wire.MethodRendezvous, wire.Node(gateway1)))
			secure.indication(wire.MethodRendezvous)
		}},
	}
	bare := echo(t)
	const tries = 3 // other work on the machine only adds
	for try := 1; ; try++ {
		took, base := make([][]time.Duration, len(kinds)), []time.Duration(nil)
		for round := range rounds {
			for range 3 {
				began := time.Now()
				bare()
				base = append(base, time.Since(began))
			}
			for i, k := range kinds {
				if round%k.every != 0 {
					continue
				}
				began := time.Now()
				k.ask()
				took[i] = append(took[i], time.Since(began))
			}
		}
		var all []time.Duration
		for i, k := range kinds {
			slices.Sort(took[i])
			all = append(all, took[i]...)
			n := len(took[i])
			t.Logf("%s: p50 %v, p90 %v, most %v", k.name, took[i][n/2], took[i][n*9/10], took[i][n-1])
		}
		slices.Sort(all)
		slices.Sort(base)
		p99, machine := all[len(all)*99/100], base[len(base)*99/100]
		t.Logf("all: p50 %v, p99 %v; a bare socket: p50 %v, p99 %v", all[len(all)/2], p99, base[len(base)/2], machine)
		if p99 <= most+machine {
			break
		}
		if try == tries {
			t.Errorf("p99 %v, want at most %v beyond a bare socket's %v", p99, most, machine)
			break
		}
	}
	after, control := l.queueDrops()
	if after == before {
		t.Error("the data sockets did not overflow meanwhile")
	}
	if control != 0 {
		t.Errorf("control's queue dropped %d", control)
	}
}
