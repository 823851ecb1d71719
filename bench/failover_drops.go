package bench

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"sallyway/client"
	"sallyway/gateway"
	"sallyway/internal/lab"
	"sallyway/internal/legs"
)

// dropCounter reads the counters of dropped datagrams of relays and legs again and again, so that those of a relay or leg that ends are known
// until shortly before.
type dropCounter struct {
	b      *failoverBed
	cancel context.CancelFunc
	done   chan struct{}

	mu     sync.Mutex
	first  map[string]uint64 // as each was when it was seen first; guarded by mu
	latest map[string]uint64 // guarded by mu
	marked map[string]uint64 // latest, at the mark; guarded by mu
}

// dropPace is that of reading.
const dropPace = 50 * time.Millisecond

// countDrops begins to read.
func (b *failoverBed) countDrops(ctx context.Context) *dropCounter {
	ctx, cancel := context.WithCancel(ctx)
	c := &dropCounter{b: b, cancel: cancel, done: make(chan struct{}), first: make(map[string]uint64), latest: make(map[string]uint64)}
	c.read(ctx)
	go func() {
		defer close(c.done)
		for ctx.Err() == nil {
			wait(ctx, dropPace)
			c.read(ctx)
		}
	}()
	return c
}

// mark divides what was dropped before from what is dropped after.
func (c *dropCounter) mark(ctx context.Context) {
	c.read(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.marked = make(map[string]uint64)
	for k, v := range c.latest {
		c.marked[k] = v
	}
}

func (c *dropCounter) stop() {
	c.cancel()
	<-c.done
}

// quicLost begins the names of the counters of packets that QUIC declared lost.
const quicLost = "QUIC's lost packets, "

// drops are what was dropped by relays and legs, by counter, without those that stand still, and what QUIC declared lost and sent again.
type drops struct {
	dropped map[string]uint64
	lost    uint64
}

func newDrops(counters map[string]uint64) drops {
	d := drops{dropped: make(map[string]uint64)}
	for name, n := range counters {
		if strings.HasPrefix(name, quicLost) {
			d.lost += n
		} else {
			d.dropped[name] = n
		}
	}
	return d
}

// result stops and returns what was dropped after the mark and before it.
func (c *dropCounter) result(ctx context.Context) (drops, drops) {
	c.read(ctx)
	c.stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	after, before := make(map[string]uint64), make(map[string]uint64)
	for k, v := range c.latest {
		name, _, _ := strings.Cut(k, " since ")
		at, known := c.marked[k]
		if !known {
			at = c.first[k]
		}
		if v > at {
			after[name] += v - at
		}
		if at > c.first[k] {
			before[name] += at - c.first[k]
		}
	}
	return newDrops(after), newDrops(before)
}

// read takes all counters that can be had now.
func (c *dropCounter) read(ctx context.Context) {
	now := make(map[string]uint64)
	for _, n := range []*lab.Node{c.b.site.RelayA, c.b.site.RelayB} {
		for reason, v := range relayDrops(ctx, n.Host) {
			now[n.Record.Name+" "+reason] = v
		}
	}
	leg := func(who string, all []legs.Status) {
		for _, r := range all {
			if r.Stats == nil {
				continue
			}
			for reason, v := range map[string]uint64{
				"full": r.Stats.DroppedFull, "size": r.Stats.DroppedSize, "closed": r.Stats.DroppedClosed, "error": r.Stats.DroppedError,
				"malformed": r.Stats.DroppedMalformed, "unbound": r.Stats.DroppedUnbound,
			} {
				now[fmt.Sprintf("%s's leg on %s %s since %d", who, r.Name, reason, r.Since.UnixNano())] = v
			}
		}
	}
	// What QUIC declares lost it sends again. The count falls when such a packet arrives after all.
	var cs client.Status
	if c.b.site.Laptop.Status(ctx, &cs) == nil {
		leg("client", cs.Relays)
		for _, g := range cs.Gateways {
			now[fmt.Sprintf("%sclient since %d", quicLost, g.Since.UnixNano())] = g.QUIC.PacketsLost
		}
	}
	var gs gateway.Status
	if c.b.site.GatewayA.Status(ctx, &gs) == nil {
		leg("gateway", gs.Relays)
		for _, s := range gs.Sessions {
			now[fmt.Sprintf("%sgateway since %d", quicLost, s.Since.UnixNano())] = s.QUIC.PacketsLost
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for k, v := range now {
		if _, ok := c.first[k]; !ok {
			c.first[k] = v
		}
		c.latest[k] = v
	}
}

// relayMetrics is where a relay tells its counters, on its own host.
const relayMetrics = "http://127.0.0.1:9466/metrics"

// relayDrops are a relay's counters of datagrams that it dropped, by reason; nothing of one that does not answer.
func relayDrops(ctx context.Context, h *lab.Host) map[string]uint64 {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, relayMetrics, nil)
	if err != nil {
		return nil
	}
	hc := h.HTTPClient()
	defer hc.CloseIdleConnections()
	res, err := hc.Do(req)
	if err != nil {
		return nil
	}
	defer res.Body.Close()
	return parseDrops(res.Body)
}

// droppedMetric is the relay's counter.
const droppedMetric = `sallyway_relay_dropped_total{reason="`

// parseDrops reads the counter out of Prometheus' text format.
func parseDrops(text io.Reader) map[string]uint64 {
	out := make(map[string]uint64)
	for s := bufio.NewScanner(text); s.Scan(); {
		rest, ok := strings.CutPrefix(s.Text(), droppedMetric)
		if !ok {
			continue
		}
		reason, value, ok := strings.Cut(rest, `"} `)
		if v, err := strconv.ParseFloat(value, 64); ok && err == nil {
			out[reason] = uint64(v)
		}
	}
	return out
}
