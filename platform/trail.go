package platform

import (
	"cmp"
	"context"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyway/platform/flowlog"
	"sallyway/platform/registry"
	"sallyway/platform/syslog"
	"sallyway/platform/webhook"
)

// auditSignEvery is how often the heads of the audit chains are signed: what is cut off after the last signature leaves no trace in an export.
const auditSignEvery = time.Hour

// auditSignFarewell is what signing may take when the platform stops.
const auditSignFarewell = 5 * time.Second

// trail is what is made of what happened: signatures of the audit chains, their way to webhooks and syslog, and the flow log.
type trail struct {
	s        *Server
	webhooks *webhook.Service
	flows    *flowlog.Service
	sinks    []*syslog.Sink
}

func newTrail(s *Server) (*trail, error) {
	t := &trail{s: s}
	t.webhooks = webhook.New(webhook.Config{Registry: s.reg, Log: s.cfg.Log, Metrics: s.cfg.Metrics, Leads: t.leads, Through: s.dialler.Dial})
	t.flows = flowlog.New(flowlog.Config{Registry: s.reg, Log: s.cfg.Log, Metrics: s.cfg.Metrics, Leads: t.leads, Retention: s.cfg.FlowLog, Rows: s.cfg.FlowLogRows})
	for _, to := range s.cfg.AuditSyslog {
		sink, err := syslog.New(syslog.Config{Target: to, Registry: s.reg, Log: s.cfg.Log, Metrics: s.cfg.Metrics, Leads: t.leads})
		if err != nil {
			return nil, err
		}
		t.sinks = append(t.sinks, sink)
	}
	return t, nil
}

// Syslog says how the delivery of the audit logs to syslog goes, whichever replica does it.
func (s *Server) Syslog(ctx context.Context) ([]syslog.State, error) {
	var out []syslog.State
	for _, sink := range s.trail.sinks {
		st, err := sink.State(ctx)
		if err != nil {
			return nil, err
		}
		out = append(out, st)
	}
	return out, nil
}

// leads says whether this platform does what one of those on the same database does.
func (t *trail) leads() bool { return t.s.group == nil || t.s.group.Leads() }

// run works until ctx ends, and then signs what is new.
func (t *trail) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return t.webhooks.Run(ctx) })
	g.Go(func() error { return t.flows.Run(ctx) })
	for _, sink := range t.sinks {
		g.Go(func() error { return sink.Run(ctx) })
	}
	g.Go(func() error { t.sign(ctx); return nil })
	return g.Wait()
}

// sign signs the audit chains, the first time soon after the start: a key that can not sign shows at once.
func (t *trail) sign(ctx context.Context) {
	every := cmp.Or(t.s.cfg.AuditSign, auditSignEvery)
	const first = time.Minute
	timer := time.NewTimer(min(first, every))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			// Of several replicas any may sign: the same head is signed once.
			stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), auditSignFarewell)
			defer cancel()
			t.signNow(stop)
			return
		case <-timer.C:
		}
		if t.leads() {
			t.signNow(ctx)
		}
		timer.Reset(every)
	}
}

func (t *trail) signNow(ctx context.Context) {
	if err := t.s.reg.SignAudit(registry.WithActor(ctx, "platform")); err != nil && ctx.Err() == nil {
		t.s.cfg.Log.Error("an audit log is not signed", "error", err)
	}
}
