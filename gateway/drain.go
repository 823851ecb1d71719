package gateway

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyway/client"
	"sallyway/internal/daemon"
	"sallyway/tunnel"
)

// DefaultDrain is how long a gateway that is stopped lets open connections finish: long enough for a request under way, short enough for
// whoever waits for the restart.
const DefaultDrain = 5 * time.Second

// drainByHand is how long they may take when somebody drains the gateway to take it out of service.
const drainByHand = 10 * time.Minute

// drainPoll is how often a drain looks whether the last connection is gone.
const drainPoll = 100 * time.Millisecond

// drainOrder asks for a drain.
type drainOrder struct {
	reason   string
	deadline time.Duration
}

// drainBy begins a drain and returns at once.
func (d *gatewayDaemon) drainBy(_ context.Context, deadline time.Duration) error {
	select {
	case d.drainCh <- drainOrder{"the gateway is being taken out of service", deadline}:
		return nil
	default:
		return errors.New("it drains already")
	}
}

// drainReason is why the gateway drains, "" if it does not.
func (d *gatewayDaemon) drainReason() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.drain
}

// serve runs until ctx ends or a drain is ordered, drains, and ends. Everything lives through the drain, so that peers move on and the
// platform sees it.
func (d *gatewayDaemon) serve(ctx context.Context) error {
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	g, work := errgroup.WithContext(work)
	g.Go(func() error { return d.run(work) })
	g.Go(func() error {
		defer cancel()
		select {
		case o := <-d.drainCh:
			d.drainNow(work, ctx.Done(), o)
		case <-ctx.Done():
			d.drainNow(work, nil, drainOrder{"the gateway stops", d.opts.drain})
		case <-work.Done():
		}
		return nil
	})
	if err := g.Wait(); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// drainNow takes no new flows and returns when the last one is gone, at the deadline, when work ends, or when stop is closed and the shorter
// deadline of a stop has passed. A nil stop never is.
func (d *gatewayDaemon) drainNow(work context.Context, stop <-chan struct{}, o drainOrder) {
	d.mu.Lock()
	d.drain = o.reason
	d.mu.Unlock()
	d.sh.Health.Set("drain", errors.New(o.reason))
	d.sh.Status("draining")
	d.sh.Log.Info("draining", "reason", o.reason, "flows", d.handler.flows.count(), "deadline", o.deadline)
	d.srv.Drain(o.reason)
	d.agent.HeartbeatNow()
	deadline := time.NewTimer(o.deadline)
	defer deadline.Stop()
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for d.handler.flows.count() > 0 {
		select {
		case <-tick.C:
		case <-stop:
			stop = nil
			deadline.Reset(min(o.deadline, d.opts.drain))
		case <-deadline.C:
			d.sh.Log.Warn("drain deadline reached", "flows_left", d.handler.flows.count())
			return
		case <-work.Done():
			return
		}
	}
	d.sh.Log.Info("drained")
}

// count is how many connections are open.
func (o *openFlows) count() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.open)
}

// healthChanged tells everybody what is reached now.
func (d *gatewayDaemon) healthChanged() {
	for _, s := range d.srv.Sessions() {
		d.tellHealth(s.Peer)
	}
	d.agent.HeartbeatNow()
}

// tellHealth tells a peer which of its resources this gateway does not reach.
func (d *gatewayDaemon) tellHealth(p tunnel.Peer) {
	s, err := d.agent.Snapshot()
	if err != nil {
		return
	}
	d.srv.Notify(func(o tunnel.Peer) bool { return o.Session == p.Session }, d.health.notice(s, p.Node))
}

// onNotice takes a peer's notice: it asks for what is not reached when its session begins.
func (d *gatewayDaemon) onNotice(p tunnel.Peer, n tunnel.Notice) {
	switch n.Type {
	case client.NoticeUnreached:
		d.tellHealth(p)
	case client.NoticeDirect:
		d.direct.asked(p, n)
	}
}

// check is the row of doctor.
func (h *health) check() daemon.Check {
	row := daemon.Check{Check: "resources", Result: daemon.Pass}
	ok, lost := 0, ""
	for _, r := range h.report() {
		if r.OK {
			ok++
			continue
		}
		row.Result = daemon.Warn
		lost += fmt.Sprintf("; %s since %s: %s", r.Name, r.Since.Local().Format(time.DateTime), r.Reason)
	}
	row.Detail = fmt.Sprintf("%d reached%s", ok, lost)
	if row.Result == daemon.Warn {
		row.Remedy = "look whether the resource is up and whether a firewall lets this host reach it; --health of `sallyway resource update` says what is asked"
	}
	return row
}
