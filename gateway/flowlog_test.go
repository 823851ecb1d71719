package gateway

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/policy"
	"sallyway/tunnel"
)

// told is a platform that takes flows.
type told struct {
	mu      sync.Mutex
	away    bool
	batches []control.FlowBatch
}

func (p *told) post(_ context.Context, b control.FlowBatch) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.away {
		return errors.New("away")
	}
	p.batches = append(p.batches, b)
	return nil
}

func (p *told) flows() (out []control.FlowReport) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.batches {
		out = append(out, b.Flows...)
	}
	return out
}

// logged is a handler whose flows are logged, with a clock of its own.
func logged(t *testing.T) (*handler, *flowLog, *told, func(time.Duration)) {
	t.Helper()
	h := newHandler(t, newZone(t, map[string]string{"web.corp.example": "127.0.0.1"}), "127.0.0.1")
	p := &told{}
	l := newFlowLog(&h.flows, slog.New(slog.DiscardHandler), p.post)
	var mu sync.Mutex
	ahead := time.Duration(0)
	l.now = func() time.Time {
		mu.Lock()
		defer mu.Unlock()
		return time.Now().Add(ahead)
	}
	l.enable(true)
	return h, l, p, func(d time.Duration) {
		mu.Lock()
		defer mu.Unlock()
		ahead += d
	}
}

func echoServer(t *testing.T) uint16 {
	return tcpServer(t, "127.0.0.1", func(c *net.TCPConn) {
		_, _ = io.Copy(c, c)
		c.Close()
	})
}

// TestFlowIsTold: bytes both ways, the rule and the resource, the path of the session, and why it ended.
func TestFlowIsTold(t *testing.T) {
	h, l, p, advance := logged(t)
	port := echoServer(t)
	l.session(tunnel.SessionInfo{Peer: peer1, Path: tunnel.LinkInfo{Name: "fra-1"}}, nil)
	l.rung = func(relay string) string { return map[string]string{"fra-1": "udp"}[relay] }
	use := func(host string) tunnel.Conn {
		t.Helper()
		c, err := h.DialTCP(t.Context(), peer1, target(policy.TCP, host, port))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("ping-")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		return c
	}
	ended, reset := use("web.corp.example"), use("100.112.0.20")
	if err := ended.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := ended.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal(err)
	}
	_ = ended.Close()
	_ = reset.(*tcpFlow).SetLinger(0)
	_ = reset.Close()
	l.tell(t.Context(), flowSettle)
	if n := len(p.flows()); n != 0 {
		t.Fatalf("%d flows are told before their session could say more", n)
	}
	advance(2 * flowSettle)
	l.tell(t.Context(), flowSettle)
	fs := p.flows()
	if len(fs) != 2 || fs[0].Reason != flowClosed || fs[1].Reason != flowReset {
		t.Fatalf("%+v", fs)
	}
	for _, f := range fs {
		if f.Sent != 5 || f.Received != 5 || f.Open || f.Peer != peer1.Node || f.Rule == "" || f.Resource == "" || f.Relay != "fra-1" || f.Path != "udp" || f.Protocol != "tcp" ||
			f.Address == "" || f.ID == fs[1].ID && f.Reason == flowClosed || f.Seen.Before(f.Started) {
			t.Errorf("%+v", f)
		}
	}
	if len(l.queue) != 0 || len(h.flows.open) != 0 {
		t.Errorf("%d flows wait, %d are open", len(l.queue), len(h.flows.open))
	}
}

// TestFlowSaysWhyItsSessionEnded: what is reset with its session tells the session's reason, and the path that it had.
func TestFlowSaysWhyItsSessionEnded(t *testing.T) {
	h, l, p, advance := logged(t)
	port := echoServer(t)
	c, err := h.DialTCP(t.Context(), peer1, target(policy.TCP, "127.0.0.1", port))
	if err != nil {
		t.Fatal(err)
	}
	_ = c.(*tcpFlow).SetLinger(0)
	_ = c.Close()
	l.session(tunnel.SessionInfo{Peer: peer1, Path: tunnel.LinkInfo{Name: "direct 192.0.2.7:4433"}}, errors.New("an administrator ended this session"))
	advance(2 * flowSettle)
	l.tell(t.Context(), flowSettle)
	fs := p.flows()
	if len(fs) != 1 || fs[0].Reason != "session over: an administrator ended this session" || fs[0].Path != "direct" || fs[0].Relay != "" {
		t.Fatalf("%+v", fs)
	}
	advance(time.Minute)
	l.tell(t.Context(), flowSettle)
	if len(l.paths) != 0 {
		t.Errorf("%d sessions are remembered", len(l.paths))
	}
}

// TestLongFlowsAreToldAgain: every few minutes while they are open, and at the gateway's end.
func TestLongFlowsAreToldAgain(t *testing.T) {
	h, l, p, advance := logged(t)
	c, err := h.DialTCP(t.Context(), peer1, target(policy.TCP, "127.0.0.1", echoServer(t)))
	if err != nil {
		t.Fatal(err)
	}
	for range 11 {
		advance(flowLook)
		l.interim(l.now())
	}
	advance(2 * flowSettle)
	l.tell(t.Context(), flowSettle)
	fs := p.flows()
	if len(fs) != 2 || !fs[0].Open || fs[0].ID != fs[1].ID || fs[0].Reason != "" {
		t.Fatalf("in 11 minutes: %+v", fs)
	}
	l.farewell(t.Context())
	if fs = p.flows(); len(fs) != 3 || fs[2].Open || fs[2].Reason != flowStopped || fs[2].ID != fs[0].ID {
		t.Errorf("at the end: %+v", fs)
	}
	_ = c.Close()
	l.tell(t.Context(), 0)
	if n := len(p.flows()); n != 3 {
		t.Errorf("it is told of again: %d", n)
	}
}

// TestFlowsWaitForThePlatform: a bounded number, the oldest are dropped, and how many is told. None when nobody wants to know.
func TestFlowsWaitForThePlatform(t *testing.T) {
	_, l, p, _ := logged(t)
	p.away = true
	at := time.Now().Add(-time.Hour)
	add := func(n int) {
		for range n {
			l.add(flowRecord{FlowReport: control.FlowReport{ID: l.id(), Seen: at}})
		}
	}
	add(flowMost)
	l.tell(t.Context(), flowSettle)
	add(7)
	l.tell(t.Context(), flowSettle)
	if len(l.queue) != flowMost || l.dropped != 7 || counted(t, l.lost) != 7 {
		t.Errorf("%d wait, %d dropped, counted %v", len(l.queue), l.dropped, counted(t, l.lost))
	}
	p.away = false
	l.tell(t.Context(), flowSettle)
	fs := p.flows()
	if len(fs) != flowMost || fs[0].ID == fs[1].ID || p.batches[0].Dropped != 7 || p.batches[1].Dropped != 0 || len(p.batches[0].Flows) != control.MaxFlows {
		t.Errorf("%d flows in %d batches", len(fs), len(p.batches))
	}
	add(3)
	l.enable(false)
	if len(l.queue) != 0 {
		t.Error("flows wait that nobody wants to know of")
	}
	var none *flowLog // a handler without one
	none.session(tunnel.SessionInfo{}, nil)
	none.enable(true)
	if none.id() != "" {
		t.Error("no log names a flow")
	}
}

// TestCountingCostsNothing: counting a read and a write allocates nothing.
func TestCountingCostsNothing(t *testing.T) {
	f := &openFlow{}
	if n := testing.AllocsPerRun(1000, func() {
		f.read(1400, nil)
		f.wrote(1400, nil)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkCount(b *testing.B) {
	f := &openFlow{}
	for b.Loop() {
		f.read(65536, nil)
	}
}
