// Package flowlog keeps what gateways tell of connections: who reached what, by which gateway and relay, by which rule, how much passed, and why it
// ended. What was said over a connection nobody here knows; that it was there is personal data all the same, so that an organization can keep no
// flow log, and what is kept goes after a while.
//
//	s := flowlog.New(flowlog.Config{Registry: reg, Retention: 30 * 24 * time.Hour})
//	s.Put(ctx, gateway, batch)
//	page, err := s.List(ctx, "acme", flowlog.Filter{Client: "laptop"})
package flowlog

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"log/slog"
	"math"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// What is kept by default.
const (
	DefaultRetention = 30 * 24 * time.Hour
	DefaultRows      = 1_000_000 // of one organization
)

const (
	tidyEvery   = 10 * time.Minute
	tidyAtOnce  = 2000            // rows that one transaction removes: others wait for as long
	nameLife    = time.Minute     // names are read again
	nameMost    = 20_000          // names that are remembered
	aheadMost   = 5 * time.Minute // a gateway's clock may be before ours
	textMost    = 255             // bytes of a text that a gateway sends
	pageDefault = 100
	eachPage    = 1000
)

// Config is what a Service needs.
type Config struct {
	Registry *registry.Registry
	Log      *slog.Logger
	Metrics  prometheus.Registerer
	// Retention is how long a flow is kept after its end: zero is DefaultRetention.
	Retention time.Duration
	// Rows is how many flows of one organization are kept at most: zero is DefaultRows.
	Rows int
	// Leads says whether this replica does the periodic jobs; nil is yes.
	Leads func() bool
}

// Service is the flow log of all organizations. Its methods may be called concurrently.
type Service struct {
	cfg Config
	reg *registry.Registry

	mu    sync.Mutex
	names map[string]name // by organization and id; guarded by mu
	since time.Time       // the oldest of them was read; guarded by mu

	taken, dropped prometheus.Counter
}

// name is what a node or resource is called, and whose it is.
type name struct{ name, person, login string }

// New makes a service. Run keeps its table small.
func New(cfg Config) *Service {
	cfg.Retention = cmp.Or(cfg.Retention, DefaultRetention)
	cfg.Rows = cmp.Or(cfg.Rows, DefaultRows)
	if cfg.Leads == nil {
		cfg.Leads = func() bool { return true }
	}
	s := &Service{
		cfg: cfg, reg: cfg.Registry, names: make(map[string]name),
		taken:   prometheus.NewCounter(prometheus.CounterOpts{Name: "sallyway_platform_flow_log_total", Help: "Reports of flows that were written down."}),
		dropped: prometheus.NewCounter(prometheus.CounterOpts{Name: "sallyway_platform_flow_log_dropped_total", Help: "Flows that gateways had no room for while the platform was away."}),
	}
	cfg.Metrics.MustRegister(s.taken, s.dropped)
	return s
}

// Put writes down what a gateway tells. The same again changes nothing.
func (s *Service) Put(ctx context.Context, gateway identity.Node, b control.FlowBatch) error {
	if gateway.Kind != identity.Gateway {
		return registry.Refuse(http.StatusForbidden, control.CodeForbidden, "none needed: gateways do", "only gateways tell of flows")
	}
	if len(b.Flows) > control.MaxFlows {
		return registry.Invalid("body.flows", "send them in parts", "%d flows, limit %d", len(b.Flows), control.MaxFlows)
	}
	if b.Dropped > 0 {
		s.dropped.Add(float64(b.Dropped))
		s.cfg.Log.Warn("a gateway had no room for flows while the platform was away: they are missing from the flow log", "gateway", gateway.String(), "flows", b.Dropped)
	}
	rows, err := s.rows(ctx, gateway, b.Flows)
	if err != nil || len(rows) == 0 {
		return err
	}
	if err := s.reg.Store.Update(ctx, func(tx store.Tx) error {
		if _, err := tx.Org(ctx, gateway.Org); err != nil {
			return err
		}
		return tx.PutFlows(ctx, rows)
	}); err != nil {
		return err
	}
	s.taken.Add(float64(len(rows)))
	return nil
}

// rows makes rows of reports: the newest of each flow, with names. None when the organization keeps no log.
func (s *Service) rows(ctx context.Context, gateway identity.Node, fs []control.FlowReport) ([]*store.Flow, error) {
	var out []*store.Flow
	err := s.reg.Store.View(ctx, func(tx store.Tx) error {
		out = nil
		off, err := tx.FlowLogOff(ctx, gateway.Org)
		if err != nil || off {
			return err
		}
		own, err := s.node(ctx, tx, gateway.Org, gateway.ID)
		if err != nil {
			return err
		}
		latest := s.reg.Now().Add(aheadMost)
		at := make(map[string]int, len(fs))
		for i := range fs {
			f := &fs[i]
			// A gateway can not put anything into another organization's log, nor name what is none.
			if f.Peer.Org != gateway.Org || len(f.Peer.ID) > textMost || f.ID == "" || len(f.ID) > 64 || f.Started.IsZero() || f.Seen.Before(f.Started) || f.Seen.After(latest) {
				continue
			}
			peer, err := s.node(ctx, tx, gateway.Org, f.Peer.ID)
			if err != nil {
				return err
			}
			if f.Peer.Kind == identity.Platform {
				peer.name = string(identity.Platform)
			}
			resource, err := s.resource(ctx, tx, gateway.Org, clip(f.Resource))
			if err != nil {
				return err
			}
			row := &store.Flow{
				Gateway: gateway.ID, ID: f.ID, Org: gateway.Org, GatewayName: own.name, Client: clip(f.Peer.ID), ClientName: peer.name, Person: peer.person, Login: peer.login,
				Resource: clip(f.Resource), ResourceName: resource.name, Rule: clip(f.Rule), Protocol: clip(f.Protocol), Destination: clip(f.Destination), Address: clip(f.Address),
				Relay: clip(f.Relay), Path: clip(f.Path), Started: f.Started, Seen: f.Seen, Open: f.Open, Sent: bytes(f.Sent), Received: bytes(f.Received), Reason: clip(f.Reason),
			}
			if n, twice := at[f.ID]; twice {
				if out[n].Open {
					out[n] = row
				}
				continue
			}
			at[f.ID] = len(out)
			out = append(out, row)
		}
		return nil
	})
	return out, err
}

func bytes(n uint64) int64 { return int64(min(n, math.MaxInt64)) }

func clip(s string) string {
	s = strings.ToValidUTF8(s, "")
	if len(s) > textMost {
		s = strings.ToValidUTF8(s[:textMost], "")
	}
	return s
}

// known returns a name that was read a moment ago.
func (s *Service) known(key string) (name, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := s.reg.Now(); now.Sub(s.since) > nameLife || len(s.names) >= nameMost {
		clear(s.names)
		s.since = now
	}
	n, ok := s.names[key]
	return n, ok
}

func (s *Service) learn(key string, n name) name {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names[key] = n
	return n
}

// node names a node of org, and whose it is. One that is none any more has its id for a name.
func (s *Service) node(ctx context.Context, tx store.Tx, org, id string) (name, error) {
	key := org + " " + id
	if n, ok := s.known(key); ok {
		return n, nil
	}
	out := name{name: clip(id)}
	n, err := tx.Node(ctx, id)
	if err == nil && n.Org == org {
		out.name = n.Name
		if out.person, err = tx.NodePerson(ctx, id); err == nil {
			p, perr := tx.Person(ctx, out.person)
			if err = perr; err == nil {
				out.login = p.Login
			}
		}
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return out, err
	}
	return s.learn(key, out), nil
}

func (s *Service) resource(ctx context.Context, tx store.Tx, org, id string) (name, error) {
	key := org + " resource " + id
	if n, ok := s.known(key); ok {
		return n, nil
	}
	out := name{name: id}
	r, err := tx.FindResource(ctx, org, id)
	switch {
	case err == nil:
		out.name = r.Name
	case !errors.Is(err, store.ErrNotFound):
		return out, err
	}
	return s.learn(key, out), nil
}

// Filter chooses flows. Its zero value is all. Names may be ids, also of what was deleted.
type Filter struct {
	Client, Person, Resource, Gateway string
	From, To                          time.Time // of their start
	Cursor                            string    // of the page before
	Limit                             int       // zero is 100
}

// find turns names into ids: of what is not there any more, the name is taken for the id.
func (f *Filter) find(ctx context.Context, tx store.Tx, org string) (store.FlowFilter, error) {
	out := store.FlowFilter{Client: f.Client, Person: f.Person, Resource: f.Resource, Gateway: f.Gateway, From: f.From, To: f.To, Limit: f.Limit}
	if f.Client != "" {
		n, err := tx.FindNode(ctx, org, identity.Client, f.Client)
		if errors.Is(err, store.ErrNotFound) {
			n, err = tx.FindNode(ctx, org, identity.Gateway, f.Client) // site to site
		}
		if err == nil {
			out.Client = n.ID
		} else if !errors.Is(err, store.ErrNotFound) {
			return out, err
		}
	}
	if f.Gateway != "" {
		n, err := tx.FindNode(ctx, org, identity.Gateway, f.Gateway)
		if err == nil {
			out.Gateway = n.ID
		} else if !errors.Is(err, store.ErrNotFound) {
			return out, err
		}
	}
	if f.Resource != "" {
		r, err := tx.FindResource(ctx, org, f.Resource)
		if err == nil {
			out.Resource = r.ID
		} else if !errors.Is(err, store.ErrNotFound) {
			return out, err
		}
	}
	if f.Person != "" {
		p, err := tx.FindPerson(ctx, strings.ToLower(f.Person))
		if err == nil {
			out.Person = p.ID
		} else if !errors.Is(err, store.ErrNotFound) {
			return out, err
		}
	}
	if f.Cursor == "" {
		return out, nil
	}
	b, err := base64.RawURLEncoding.DecodeString(f.Cursor)
	at, id, ok := strings.Cut(string(b), " ")
	micros, nerr := strconv.ParseInt(at, 10, 64)
	if err != nil || nerr != nil || !ok {
		return out, registry.Invalid("query.cursor", "take next_cursor as it is", "the cursor is not one that a list returned")
	}
	out.BeforeStarted, out.BeforeID = time.UnixMicro(micros), id
	return out, nil
}

// List returns flows of org, the one that started last first.
func (s *Service) List(ctx context.Context, org string, f Filter) (*control.List[control.FlowRecord], error) {
	f.Limit = cmp.Or(f.Limit, pageDefault)
	out := &control.List[control.FlowRecord]{}
	err := s.reg.Store.View(ctx, func(tx store.Tx) error {
		out.Items, out.NextCursor = []control.FlowRecord{}, ""
		if _, err := tx.Org(ctx, org); err != nil {
			return registry.NotFound(err, "organization", org, org)
		}
		q, err := f.find(ctx, tx, org)
		if err != nil {
			return err
		}
		q.Limit++
		rows, err := tx.Flows(ctx, org, q)
		if err != nil {
			return err
		}
		if len(rows) > f.Limit {
			rows = rows[:f.Limit]
			last := rows[f.Limit-1]
			out.NextCursor = base64.RawURLEncoding.EncodeToString([]byte(strconv.FormatInt(last.Started.UnixMicro(), 10) + " " + last.ID))
		}
		for _, r := range rows {
			out.Items = append(out.Items, record(r))
		}
		return nil
	})
	return out, err
}

func record(r *store.Flow) control.FlowRecord {
	v := control.FlowRecord{
		ID: r.ID, Client: r.ClientName, ClientID: r.Client, Person: r.Login, Resource: r.ResourceName, ResourceID: r.Resource, Gateway: r.GatewayName, Relay: r.Relay, Path: r.Path,
		Rule: r.Rule, Protocol: r.Protocol, Destination: r.Destination, Address: r.Address, Started: r.Started, Seconds: r.Seen.Sub(r.Started).Seconds(),
		Sent: r.Sent, Received: r.Received, Reason: r.Reason,
	}
	if !r.Open {
		v.Ended = r.Seen
	}
	return v
}

// Each calls fn with the flows that a filter finds, newest first, whatever Cursor and Limit say. It reads in pieces.
func (s *Service) Each(ctx context.Context, org string, f Filter, fn func(control.FlowRecord) error) error {
	f.Cursor, f.Limit = "", eachPage
	for {
		l, err := s.List(ctx, org, f)
		if err != nil {
			return err
		}
		for _, r := range l.Items {
			if err := fn(r); err != nil {
				return err
			}
		}
		if f.Cursor = l.NextCursor; f.Cursor == "" {
			return nil
		}
	}
}

// On says whether org keeps a flow log.
func (s *Service) On(ctx context.Context, org string) (*control.FlowLog, error) {
	out := &control.FlowLog{}
	err := s.reg.Store.View(ctx, func(tx store.Tx) error {
		if _, err := tx.Org(ctx, org); err != nil {
			return registry.NotFound(err, "organization", org, org)
		}
		off, err := tx.FlowLogOff(ctx, org)
		out.On = !off
		return err
	})
	return out, err
}

// Set has org keep a flow log, or none from now on. What is there stays until its time is over, or Clear.
func (s *Service) Set(ctx context.Context, org string, on bool) (*control.FlowLog, error) {
	err := s.reg.Transact(ctx, func(c *registry.Change) error {
		if _, err := c.FindOrg(ctx, org); err != nil {
			return err
		}
		off, err := c.FlowLogOff(ctx, org)
		if err != nil || off != on {
			return err
		}
		if err := c.SetFlowLogOff(ctx, org, !on); err != nil {
			return err
		}
		if err := c.Record(ctx, org, "flow-log.update", org, map[string]any{"on": on}); err != nil {
			return err
		}
		return c.Bump(ctx, org)
	})
	return &control.FlowLog{On: on}, err
}

// Run removes what is old or too much, until ctx ends.
func (s *Service) Run(ctx context.Context) error {
	t := time.NewTicker(tidyEvery)
	defer t.Stop()
	for {
		if s.cfg.Leads() {
			if err := s.Tidy(ctx); err != nil && ctx.Err() == nil {
				s.cfg.Log.Warn("the flow log keeps more than it should for now", "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// Tidy removes what is old or too much, in short transactions.
func (s *Service) Tidy(ctx context.Context) error {
	orgs, err := s.reg.OrgNames(ctx)
	if err != nil {
		return err
	}
	before := s.reg.Now().Add(-s.cfg.Retention)
	jobs := []func(tx store.Tx) (int64, error){func(tx store.Tx) (int64, error) { return tx.PurgeFlows(ctx, before, tidyAtOnce) }}
	for _, org := range orgs {
		jobs = append(jobs, func(tx store.Tx) (int64, error) { return tx.TrimFlows(ctx, org, s.cfg.Rows, tidyAtOnce) })
	}
	for _, job := range jobs {
		for removed := int64(tidyAtOnce); removed == tidyAtOnce; {
			if err := s.reg.Store.Update(ctx, func(tx store.Tx) (err error) {
				removed, err = job(tx)
				return err
			}); err != nil {
				return err
			}
		}
	}
	return nil
}
