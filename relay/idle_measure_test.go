//go:build measure

package relay

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"runtime/pprof"
	"strings"
	"testing"
	"time"

	"sallyway/internal/identity"
	"sallyway/relay/wire"
)

// TestMeasureIdle makes ten thousand allocations of our own nodes, control in DTLS, at a relay in a process of its own whose clients then
// say nothing, and prints what memory that process has.
func TestMeasureIdle(t *testing.T) {
	const n = 10_000
	addr, pid := relayProcess(t)
	l := &lab{Server: &Server{local: addr}}
	t.Logf("at the start: %s", memory(t, pid))
	t.Run("clients", func(t *testing.T) {
		for i := range n {
			t.Run("", func(t *testing.T) {
				sock, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, byte(i>>8), byte(i))})
				if err != nil {
					t.Fatal(err)
				}
				c, _, _ := dtlsOver(t, l, node("acme", identity.Client, fmt.Sprintf("c%d", i)), wire.FlagPlainData, sock)
				c.allocate()
				sock.Close() // without a goodbye
				c.conn.Close()
			})
		}
	})
	t.Logf("%d allocations: %s", n, memory(t, pid))
	time.Sleep(readerLinger + 2*time.Second) // measures what is left a while later
	t.Logf("idle: %s", memory(t, pid))
}

const processVariable = "SALLYWAY_RELAY_TEST_PROCESS"

// relayProcess runs TestRelayProcess in another process until the test ends.
func relayProcess(t *testing.T) (addr netip.AddrPort, pid int) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestRelayProcess$")
	cmd.Env = append(os.Environ(), processVariable+"=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return netip.MustParseAddrPort(strings.TrimSpace(line)), cmd.Process.Pid
}

// TestRelayProcess is a relay, for relayProcess.
func TestRelayProcess(t *testing.T) {
	if os.Getenv(processVariable) == "" {
		t.Skip("runs for TestMeasureIdle alone")
	}
	cert, _ := certificate(t)
	l := start(t, func(c *Config) {
		c.Certificate = cert
		c.Limits.SourceHandshakes, c.Limits.SourceAllocations = 1<<20, 1<<20
	})
	fmt.Println(l.Addr())
	_, _ = io.Copy(io.Discard, os.Stdin)
	if file := os.Getenv("HEAP"); file != "" {
		runtime.GC()
		f, err := os.Create(file)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		_ = pprof.WriteHeapProfile(f)
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		fmt.Fprintf(os.Stderr, "%d goroutines, heap in use %d MiB, stacks %d MiB, system %d MiB\n", runtime.NumGoroutine(), m.HeapInuse>>20, m.StackInuse>>20, m.Sys>>20)
	}
}

func memory(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, line := range strings.Split(string(b), "\n") {
		for _, key := range []string{"VmHWM", "VmRSS", "Threads"} {
			if strings.HasPrefix(line, key) {
				out = append(out, strings.Join(strings.Fields(line), " "))
			}
		}
	}
	return strings.Join(out, ", ")
}
