package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	dto "github.com/prometheus/client_model/go"

	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/internal/trial"
	"sallyway/tunnel"
)

// benchLine asks a run for something.
func benchLine(t testing.TB, c io.ReadWriter, req trial.Request) (a trial.Answer) {
	t.Helper()
	l := trial.NewLines(c, c)
	if err := errors.Join(l.Write(req), l.Read(&a)); err != nil {
		t.Fatalf("%s: %v", req.Op, err)
	}
	return a
}

func (h *handler) benchDial(p tunnel.Peer, port uint16) (tunnel.Conn, error) {
	return h.DialTCP(context.Background(), p, policy.Target{Proto: policy.TCP, Host: trial.Host, Port: port})
}

func mustBench(t testing.TB, h *handler, p tunnel.Peer, port uint16) tunnel.Conn {
	t.Helper()
	c, err := h.benchDial(p, port)
	if err != nil {
		t.Fatalf("port %d: %v", port, err)
	}
	return c
}

// running is how many runs the metrics show.
func running(t testing.TB, h *handler) float64 {
	t.Helper()
	var m dto.Metric
	if err := h.metrics.benchRuns.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetGauge().GetValue()
}

// TestBenchServices uses every service over a real session.
func TestBenchServices(t *testing.T) {
	l := newLab(t, newHandler(t, nil))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	dial := func(port uint16) *tunnel.Stream {
		t.Helper()
		c, err := l.session.DialTCP(ctx, trial.Host, port)
		if err != nil {
			t.Fatalf("port %d: %v", port, err)
		}
		if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		return c
	}
	run := dial(trial.PortRun)
	if st := benchLine(t, run, trial.Request{Op: trial.OpStats}).Stats; st == nil || st.Received != 0 || st.CPU.Cores == 0 {
		t.Errorf("%+v", st)
	}
	if a := benchLine(t, run, trial.Request{Op: "dance"}); a.Error == "" || a.Stats != nil || a.Connect != nil {
		t.Errorf("an unknown operation: %+v", a)
	}
	if got := running(t, l.handler); got != 1 {
		t.Errorf("%v runs are counted", got)
	}

	echo := dial(trial.PortEcho)
	msg := bytes.Repeat([]byte("sally"), 20000)
	go func() { _, _ = echo.Write(msg); _ = echo.CloseWrite() }()
	if b, err := io.ReadAll(echo); err != nil || !bytes.Equal(b, msg) {
		t.Errorf("%d bytes came back, %v", len(b), err)
	}

	discard := dial(trial.PortDiscard)
	if _, err := discard.Write(make([]byte, 300_000)); err != nil {
		t.Fatal(err)
	}
	if err := discard.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	var got trial.Received
	if err := trial.NewLines(discard, nil).Read(&got); err != nil || got.Bytes != 300_000 || got.Took < 0 {
		t.Errorf("%+v, %v", got, err)
	}
	if n, err := discard.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("after the summary: %d, %v", n, err)
	}
	empty := dial(trial.PortDiscard)
	_ = empty.CloseWrite()
	if err := trial.NewLines(empty, nil).Read(&got); err != nil || got.Bytes != 0 || got.Took != 0 {
		t.Errorf("nothing was sent: %+v, %v", got, err)
	}

	source := dial(trial.PortSource)
	zeros := make([]byte, 500_000)
	zeros[0] = 1
	if _, err := io.ReadFull(source, zeros); err != nil || len(bytes.Trim(zeros, "\x00")) != 0 {
		t.Errorf("the source sends more than zeros, %v", err)
	}
	source.Reset()

	udp, err := l.session.DialUDP(ctx, trial.Host, trial.PortEcho)
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	b := make([]byte, 2*benchBytes)
	for _, size := range []int{0, 1, 1000, benchBytes} {
		// What is too large for the echo is not answered; the next one is, and nothing else.
		if err := errors.Join(udp.WritePacket(make([]byte, benchBytes+1)), udp.WritePacket(b[:size])); err != nil {
			t.Fatal(err)
		}
		if n, err := udp.ReadPacket(b); err != nil || n != size {
			t.Errorf("%d bytes came back for %d, %v", n, size, err)
		}
	}

	st := benchLine(t, run, trial.Request{Op: trial.OpStats}).Stats
	if st == nil || st.Received < 300_000 || st.Sent < 500_000 || st.Datagrams != 4 {
		t.Errorf("%+v", st)
	}
	// The end of the run is the end of its flows, and the next one may begin as soon as the flow has ended.
	late := dial(trial.PortSource)
	for range 30 {
		if err := run.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, run); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, late); err == nil {
			t.Error("a flow outlives its run")
		}
		run, late = dial(trial.PortRun), dial(trial.PortEcho)
	}
	if got := counted(t, l.metrics.flows.WithLabelValues("bench", "ok")); got < 10 {
		t.Errorf("%v flows are counted", got)
	}
	// So is the session's.
	if err := l.session.Close("test over"); err != nil {
		t.Error(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		l.bench.mu.Lock()
		n := len(l.bench.runs)
		l.bench.mu.Unlock()
		if n == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the run outlives its session")
		}
		<-time.After(time.Millisecond)
	}
	if got := running(t, l.handler); got != 0 {
		t.Errorf("%v runs are counted after the end", got)
	}
}

// TestBenchRefusals: who may reach nothing may not measure, nor does anybody where it is off or policies are old; flows need a run of the
// same session; and every refusal is counted and logged.
func TestBenchRefusals(t *testing.T) {
	var log bytes.Buffer
	newBench := func() *handler {
		h := newHandler(t, nil)
		log.Reset()
		h.log = slog.New(slog.NewTextHandler(&log, nil))
		return h
	}
	stranger := tunnel.Peer{Node: identity.Node{Org: "evil", Kind: identity.Client, ID: "c-1"}}
	other := peer1
	other.Session = 7
	for _, c := range []struct {
		name   string
		change func(h *handler)
		run    bool // peer1 has one
		who    tunnel.Peer
		port   uint16
		typ    tunnel.ErrorType
		says   string
	}{
		{"known, and may reach nothing", nil, false, peer2, trial.PortRun, tunnel.RequestDenied, "may reach no resource"},
		{"a stranger", nil, false, stranger, trial.PortRun, tunnel.RequestDenied, "may reach no resource"},
		{"a stranger beside a run", nil, true, stranger, trial.PortSource, tunnel.RequestDenied, "may reach no resource"},
		{"a rule without anything to reach", func(h *handler) {
			s := *must(h.enforce.snapshot())
			s.Resource = []policy.Resource{{ID: "r1", Name: "names only", Domains: []string{"corp.example"}}}
			h.enforce.snapshot = func() (*policy.Snapshot, error) { return &s, nil }
		}, false, peer1, trial.PortRun, tunnel.RequestDenied, "may reach no resource"},
		{"turned off", func(h *handler) { h.bench.off = true }, false, peer1, trial.PortRun, tunnel.RequestDenied, "--bench off"},
		{"old policies", func(h *handler) {
			h.enforce.stale = func() (bool, error) { return true, errors.New("valid until yesterday") }
		}, false, peer1, trial.PortRun, tunnel.RequestDenied, "valid until yesterday"},
		{"no run", nil, false, peer1, trial.PortSource, tunnel.RequestError, "no run was begun"},
		{"a run of another session", nil, true, other, trial.PortSource, tunnel.RequestError, "no run was begun"},
		{"a second run", nil, true, peer1, trial.PortRun, tunnel.ConnectionLimit, "one run at a time"},
		{"a second run, from another session", nil, true, other, trial.PortRun, tunnel.ConnectionLimit, "one run at a time"},
		{"no such service", nil, true, peer1, 80, tunnel.ConnectionRefused, "no service on port 80"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newBench()
			if c.change != nil {
				c.change(h)
			}
			if c.run {
				defer mustBench(t, h, peer1, trial.PortRun).Close()
			}
			conn, err := h.benchDial(c.who, c.port)
			if conn != nil || err == nil || tunnel.AsProxyError(err).Type != c.typ || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("%v, %v, want %s that says %q", conn, err, c.typ, c.says)
			}
			if counted(t, h.metrics.flows.WithLabelValues("bench", string(c.typ))) != 1 {
				t.Error("it is not counted")
			}
			if !strings.Contains(log.String(), "flow refused") || !strings.Contains(log.String(), trial.Host) {
				t.Errorf("it is not logged: %s", log.String())
			}
			if errors.Is(err, tunnel.ErrDenied) && tunnel.AsProxyError(err).Rule == "" {
				t.Errorf("%v names no rule", err)
			}
			udp, err := h.DialUDP(t.Context(), c.who, policy.Target{Proto: policy.UDP, Host: strings.ToUpper(trial.Host) + ".", Port: c.port})
			if udp != nil || err == nil {
				t.Errorf("as UDP: %v, %v", udp, err)
			}
		})
	}
}

// TestBenchIsNoDestination: the reserved name is never resolved or dialled, whatever a policy says of it.
func TestBenchIsNoDestination(t *testing.T) {
	z := newZone(t, map[string]string{trial.Host: "127.0.0.1"})
	h := newHandler(t, z, "127.0.0.1")
	s := *must(h.enforce.snapshot())
	s.Resource = append(s.Resource, policy.Resource{ID: "r9", Name: "trap", Address: "*.sallyway.invalid", TCP: []policy.PortRange{policy.AllPorts}, UDP: []policy.PortRange{policy.AllPorts}})
	s.Rules = append(s.Rules, policy.Rule{ID: "p9", Resource: "r9", Subjects: []identity.Node{client1}})
	h.enforce.snapshot = func() (*policy.Snapshot, error) { return &s, nil }
	port := tcpServer(t, "127.0.0.1", func(c *net.TCPConn) { t.Error("it is dialled"); c.Close() })
	for _, host := range []string{trial.Host, "Bench.SALLYWAY.invalid."} {
		if c, err := h.DialTCP(t.Context(), peer1, target(policy.TCP, host, port)); err == nil {
			t.Errorf("%s: a connection", host)
			c.Close()
		}
	}
	select {
	case q := <-z.queries:
		t.Errorf("%s is looked up", q)
	default:
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestBenchLimits: flows of a run, runs of a gateway, time of a run, silence, and time in the long run are bounded.
func TestBenchLimits(t *testing.T) {
	h := newHandler(t, nil)
	run := mustBench(t, h, peer1, trial.PortRun)
	conns := []tunnel.Conn{run}
	for len(conns) < trial.MaxConns {
		conns = append(conns, mustBench(t, h, peer1, trial.PortSource))
	}
	if _, err := h.benchDial(peer1, trial.PortEcho); !errors.Is(err, tunnel.ErrLimit) {
		t.Errorf("%v after %d flows", err, len(conns))
	}
	_ = conns[len(conns)-1].Close()
	conns[len(conns)-1] = mustBench(t, h, peer1, trial.PortEcho)
	_ = run.Close()
	for i, c := range conns {
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Errorf("flow %d outlives its run", i)
		}
		if _, err := c.Write(make([]byte, 1)); err == nil {
			t.Errorf("flow %d takes bytes after its run", i)
		}
		_ = c.Close()
	}
	// Several nodes at once.
	s := *must(h.enforce.snapshot())
	h.enforce.snapshot = func() (*policy.Snapshot, error) { return &s, nil }
	for i := range maxBenchRuns + 1 {
		n := identity.Node{Org: "acme", Kind: identity.Client, ID: fmt.Sprintf("c-1%d", i)}
		s.Peers = append(s.Peers, policy.Peer{Node: n})
		s.Rules = append(s.Rules, policy.Rule{ID: n.ID, Resource: "r1", Subjects: []identity.Node{n}})
		c, err := h.benchDial(tunnel.Peer{Node: n}, trial.PortRun)
		if i < maxBenchRuns && err != nil || i == maxBenchRuns && !errors.Is(err, tunnel.ErrLimit) {
			t.Errorf("run %d: %v", i, err)
		}
		if c != nil {
			defer c.Close()
		}
	}
}

// TestBenchTakesTurns: a node that has measured for as long as it may waits, and has all of its time again later.
func TestBenchTakesTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHandler(t, nil)
		began, runs := time.Now(), 0
		for ; ; runs++ {
			c, err := h.benchDial(peer1, trial.PortRun)
			if err != nil {
				if !errors.Is(err, tunnel.ErrLimit) || !strings.Contains(err.Error(), "try again in") {
					t.Fatal(err)
				}
				break
			}
			if time.Since(began) > 2*benchBurst {
				t.Fatal("a node may measure all the time")
			}
			// Somebody who asks all the time.
			var asking sync.WaitGroup
			asking.Go(func() {
				l := trial.NewLines(c, c)
				for {
					var a trial.Answer
					if errors.Join(l.Write(trial.Request{Op: trial.OpStats}), l.Read(&a)) != nil {
						return
					}
					time.Sleep(time.Second)
				}
			})
			start := time.Now()
			asking.Wait()
			if took := time.Since(start); took > trial.MaxRun+2*time.Second {
				t.Fatalf("a run of %v", took)
			}
			c.Close()
		}
		if took := time.Since(began); took < benchBurst || runs < int(benchBurst/trial.MaxRun) {
			t.Errorf("%d runs in %v and no more", runs, took)
		}
		time.Sleep(benchBurst * 4)
		c := mustBench(t, h, peer1, trial.PortRun)
		// One that says nothing is over soon.
		start := time.Now()
		if _, err := c.Read(make([]byte, 1)); err == nil || time.Since(start) > 2*benchIdle {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		c.Close()
		// Who has all of its time again is forgotten.
		time.Sleep(benchBurst * 5)
		h.bench.mu.Lock()
		h.bench.chargeLocked(client2, time.Now(), time.Second)
		if len(h.bench.spent) != 1 {
			t.Errorf("%d nodes are remembered", len(h.bench.spent))
		}
		h.bench.mu.Unlock()
	})
}

// TestBenchEndsWithPolicy: a run ends when its peer may reach nothing here any more, and not before.
func TestBenchEndsWithPolicy(t *testing.T) {
	h := newHandler(t, nil)
	run, source := mustBench(t, h, peer1, trial.PortRun), mustBench(t, h, peer1, trial.PortSource)
	defer run.Close()
	defer source.Close()
	s := *must(h.enforce.snapshot())
	s.Rules = s.Rules[1:]
	if n := h.bench.endDenied(&s); n != 0 {
		t.Errorf("%d runs ended, and a rule stands", n)
	}
	if _, err := source.Read(make([]byte, 10)); err != nil {
		t.Error(err)
	}
	s.Rules = nil
	if n := h.bench.endDenied(&s); n != 1 {
		t.Errorf("%d runs ended, want 1", n)
	}
	if _, err := run.Read(make([]byte, 1)); err == nil {
		t.Error("the run goes on")
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		if _, err := source.Read(make([]byte, 10)); err != nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the source goes on")
		}
	}
}

// TestBenchConnects: the time to a resource is measured where policy and allow list let the peer go, and nothing is sent there.
func TestBenchConnects(t *testing.T) {
	h := newHandler(t, nil, "127.0.0.1")
	got := make(chan int, trial.MaxConnects)
	port := tcpServer(t, "127.0.0.1", func(c *net.TCPConn) {
		b, _ := io.ReadAll(c)
		got <- len(b)
		c.Close()
	})
	run := mustBench(t, h, peer1, trial.PortRun)
	defer run.Close()
	ask := func(host string, port uint16) trial.Answer {
		t.Helper()
		return benchLine(t, run, trial.Request{Op: trial.OpConnect, Host: host, Port: port})
	}
	for _, host := range []string{"127.0.0.1", loopVirtual[0].String()} {
		if a := ask(host, port); a.Connect == nil || a.Connect.Took <= 0 || a.Connect.Refused {
			t.Errorf("%s: %+v", host, a)
		}
		if n := <-got; n != 0 {
			t.Errorf("%d bytes were sent to the resource", n)
		}
	}
	if a := ask("127.0.0.1", closedPort(t)); a.Connect == nil || !a.Connect.Refused {
		t.Errorf("nobody listens: %+v", a)
	}
	for host, says := range map[string]string{"192.0.2.1": "no resource", "10.99.0.9": "allow list", trial.Host: "no resource", "": "no resource"} {
		if a := ask(host, 80); a.Connect != nil || !strings.Contains(a.Error, says) {
			t.Errorf("%q: %+v, want an error that says %q", host, a, says)
		}
	}
	if a := ask("127.0.0.1", port); a.Connect == nil {
		t.Errorf("the last that is allowed: %+v", a)
	}
	<-got
	if a := ask("127.0.0.1", port); a.Connect != nil || !strings.Contains(a.Error, "times") {
		t.Errorf("one more than allowed: %+v", a)
	}
	_ = run.Close()
	run = mustBench(t, h, peer1, trial.PortRun)
	defer run.Close()
	for _, host := range []string{"a b.corp.example", "x\n.corp.example", "fe80::1%eth0", "[::1]", "a/b", "\u00e9.corp.example", strings.Repeat("a", 254)} {
		if a := ask(host, 80); a.Connect != nil || !strings.Contains(a.Error, "no name of a host") {
			t.Errorf("%.40q: %+v", host, a)
		}
	}
	if counted(t, h.metrics.flows.WithLabelValues("tcp", "ok")) != 3 || counted(t, h.metrics.flows.WithLabelValues("tcp", string(tunnel.ConnectionRefused))) != 1 {
		t.Error("the connections are not counted as flows")
	}
}

// TestBenchFlag: the switch is on or off, and nothing else starts a gateway.
func TestBenchFlag(t *testing.T) {
	cmd := Command()
	cmd.SetArgs([]string{"up", "--bench", "perhaps", "--state", t.TempDir()})
	cmd.SetOut(io.Discard)
	cmd.SetErr(io.Discard)
	if err := cmd.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), "--bench") {
		t.Errorf("%v, want that --bench is wrong", err)
	}
	up, _, err := cmd.Find([]string{"up"})
	if err != nil || up.Flags().Lookup("bench").DefValue != "on" {
		t.Errorf("the default is another one than the documents say: %v", err)
	}
}
