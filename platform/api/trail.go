package api

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"sallyway/internal/control"
	"sallyway/platform/flowlog"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// exportLine is how long a piece of an export may take to be written before the reader counts as gone.
const exportLine = time.Minute

// trailRoutes adds the routes of what is made of what happened: signatures of the audit chain, webhooks, the flow log.
func (s *server) trailRoutes() {
	route(s, "GET", "/orgs/{org}/audit:export", "export-audit", "The whole audit chain with its signatures, to be verified without the platform: one JSON document a line",
		func(ctx context.Context, in *OrgPath) (*huma.StreamResponse, error) {
			if _, err := s.reg.Org(ctx, in.Org); err != nil {
				return nil, err
			}
			return &huma.StreamResponse{Body: func(hc huma.Context) {
				s.stream(hc, func(w http.ResponseWriter, alive func()) error { return s.reg.ExportAudit(ctx, in.Org, w, alive) })
			}}, nil
		}, marked("chain"))
	route(s, "GET", "/orgs/{org}/audit/checkpoints", "list-audit-checkpoints", "Signatures of the audit chain, oldest first", func(ctx context.Context, in *struct {
		OrgPath
		PageQuery
	},
	) (*body[control.List[control.AuditCheckpoint]], error) {
		p, err := in.page()
		if err != nil {
			return nil, err
		}
		after, _ := strconv.ParseInt(p.After, 10, 64)
		cs, err := s.reg.Checkpoints(ctx, in.Org, after, p.Limit+1)
		if err != nil {
			return nil, err
		}
		out := &body[control.List[control.AuditCheckpoint]]{}
		if len(cs) > p.Limit {
			cs = cs[:p.Limit]
			out.Body.NextCursor = cursor(strconv.FormatInt(cs[p.Limit-1].Seq, 10))
		}
		out.Body.Items = cs
		return out, nil
	}, marked("chain"))
	s.webhookRoutes()
	s.flowRoutes()
}

// stream writes an answer of lines, whose length nobody knows. An error in the middle cuts the connection, so that the reader sees that it is not whole.
func (s *server) stream(hc huma.Context, write func(w http.ResponseWriter, alive func()) error) {
	_, w := humago.Unwrap(hc)
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("Cache-Control", "no-store")
	rc := http.NewResponseController(w)
	err := write(w, func() { _ = rc.SetWriteDeadline(time.Now().Add(exportLine)) }) // a server without deadlines needs none
	if err != nil && hc.Context().Err() == nil {
		s.log.Error("an export broke off", "error", err)
		panic(http.ErrAbortHandler)
	}
}

func (s *server) webhookRoutes() {
	const base, object = "/orgs/{org}/webhooks", "/orgs/{org}/webhooks/{name}"
	route(s, "GET", base, "list-webhooks", "List webhooks", func(ctx context.Context, in *struct {
		OrgPath
		PageQuery
	},
	) (*body[control.List[control.Webhook]], error) {
		return paged(in.PageQuery, func(p store.Page) (*control.List[control.Webhook], error) { return s.cfg.Webhooks.List(ctx, in.Org, p) })
	}, marked("chain"))
	route(s, "POST", base, "create-webhook", "Have audit entries sent to a URL as they are written", func(ctx context.Context, in *struct {
		OrgPath
		Body control.CreateWebhook
	},
	) (*body[control.Webhook], error) {
		return one(s.cfg.Webhooks.Create(ctx, in.Org, in.Body))
	}, status(http.StatusCreated), marked("chain"))
	route(s, "GET", object, "show-webhook", "Show a webhook", func(ctx context.Context, in *ObjectPath) (*body[control.Webhook], error) {
		return one(s.cfg.Webhooks.Show(ctx, in.Org, in.Name))
	}, marked("chain"))
	route(s, "PATCH", object, "update-webhook", "Change a webhook, or have it go on", func(ctx context.Context, in *struct {
		ObjectPath
		Body control.UpdateWebhook
	},
	) (*body[control.Webhook], error) {
		return one(s.cfg.Webhooks.Update(ctx, in.Org, in.Name, in.Body))
	}, marked("chain"))
	route(s, "DELETE", object, "delete-webhook", "Delete a webhook", func(ctx context.Context, in *ObjectPath) (*struct{}, error) {
		return nil, s.cfg.Webhooks.Delete(ctx, in.Org, in.Name)
	}, status(http.StatusNoContent), marked("chain"))
	route(s, "POST", object+"/test", "test-webhook", "Send a test event now", func(ctx context.Context, in *ObjectPath) (*body[control.WebhookTest], error) {
		return one(s.cfg.Webhooks.Test(ctx, in.Org, in.Name))
	}, status(http.StatusOK), marked("chain"))
}

// FlowQuery chooses flows.
type FlowQuery struct {
	Client   string    `query:"client" maxLength:"63" doc:"name or id of a client, or of a gateway that dials"`
	Person   string    `query:"person" maxLength:"255" doc:"login or id of whose client it was"`
	Resource string    `query:"resource" maxLength:"63" doc:"name or id"`
	Gateway  string    `query:"gateway" maxLength:"63" doc:"name or id"`
	From     time.Time `query:"from" doc:"flows that began then or later (RFC 3339)"`
	To       time.Time `query:"to" doc:"flows that began before"`
}

func (q FlowQuery) filter() flowlog.Filter {
	return flowlog.Filter{Client: q.Client, Person: q.Person, Resource: q.Resource, Gateway: q.Gateway, From: q.From, To: q.To}
}

func (s *server) flowRoutes() {
	route(s, "GET", "/orgs/{org}/flows", "list-flows", "Connections that there were, as gateways told, newest first", func(ctx context.Context, in *struct {
		OrgPath
		PageQuery
		FlowQuery
	},
	) (*body[control.List[control.FlowRecord]], error) {
		f := in.filter()
		f.Limit, f.Cursor = in.Limit, in.Cursor
		return one(s.cfg.Flows.List(ctx, in.Org, f))
	})
	route(s, "GET", "/orgs/{org}/flows:export", "export-flows", "The same without pages: one JSON document a line", func(ctx context.Context, in *struct {
		OrgPath
		FlowQuery
	},
	) (*huma.StreamResponse, error) {
		if _, err := s.reg.Org(ctx, in.Org); err != nil {
			return nil, err
		}
		return &huma.StreamResponse{Body: func(hc huma.Context) {
			s.stream(hc, func(w http.ResponseWriter, alive func()) error {
				enc := json.NewEncoder(w)
				return s.cfg.Flows.Each(ctx, in.Org, in.filter(), func(r control.FlowRecord) error {
					alive()
					return enc.Encode(r)
				})
			})
		}}, nil
	})
	route(s, "GET", "/orgs/{org}/flow-log", "show-flow-log", "Whether connections are written down", func(ctx context.Context, in *OrgPath) (*body[control.FlowLog], error) {
		return one(s.cfg.Flows.On(ctx, in.Org))
	})
	route(s, "PATCH", "/orgs/{org}/flow-log", "update-flow-log", "Have connections written down, or not", func(ctx context.Context, in *struct {
		OrgPath
		Body control.FlowLog
	},
	) (*body[control.FlowLog], error) {
		return one(s.cfg.Flows.Set(ctx, in.Org, in.Body.On))
	})
}

// flows takes what a gateway tells of connections.
func (s *server) flows(w http.ResponseWriter, r *http.Request) {
	s.node(w, r, func(who *registry.Session) (any, error) {
		var b control.FlowBatch
		if err := decode(r, &b); err != nil {
			return nil, err
		}
		err := s.cfg.Flows.Put(r.Context(), who.Node, b)
		if errors.Is(err, store.ErrNotFound) {
			err = registry.NotFound(err, "organization", who.Node.Org, who.Node.Org)
		}
		return struct{}{}, err
	})
}
