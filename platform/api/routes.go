package api

import (
	"context"
	"encoding/base64"
	"errors"
	"net/http"
	"strconv"

	"github.com/danielgtaylor/huma/v2"

	"sallyway/internal/control"
	"sallyway/platform/audit"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// body is an answer with a body.
type body[T any] struct{ Body T }

// OrgPath is the part of a path that names an organization. It is exported, as those below, because huma reads embedded fields of exported types alone.
type OrgPath struct {
	Org string `path:"org" doc:"name of the organization" maxLength:"63"`
}

// ObjectPath names a thing of an organization.
type ObjectPath struct {
	OrgPath
	Name string `path:"name" doc:"name or id" maxLength:"63"`
}

// PageQuery is what lists that come in pages take.
type PageQuery struct {
	Limit  int    `query:"limit" minimum:"0" maximum:"1000" doc:"entries in a page; 0 is 100"`
	Cursor string `query:"cursor" maxLength:"256" doc:"next_cursor of the page before"`
}

// page decodes a cursor: the last name of the page before.
func (q PageQuery) page() (store.Page, error) {
	p := store.Page{Limit: q.Limit}
	if p.Limit == 0 {
		p.Limit = defaultLimit
	}
	after, err := base64.RawURLEncoding.DecodeString(q.Cursor)
	if err != nil {
		return p, &registry.Error{Problem: control.Problem{
			Status: http.StatusUnprocessableEntity, Code: control.CodeInvalid, Detail: "the cursor is not one that a list returned", Remedy: "take next_cursor as it is",
		}}
	}
	p.After = string(after)
	return p, nil
}

func cursor(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

// paged reads a page and encodes its cursor.
func paged[T any](q PageQuery, read func(store.Page) (*control.List[T], error)) (*body[control.List[T]], error) {
	p, err := q.page()
	if err != nil {
		return nil, err
	}
	l, err := read(p)
	if err != nil {
		return nil, err
	}
	if l.NextCursor != "" {
		l.NextCursor = cursor(l.NextCursor)
	}
	return &body[control.List[T]]{*l}, nil
}

// option changes an operation.
type option func(*huma.Operation)

func status(code int) option { return func(o *huma.Operation) { o.DefaultStatus = code } }

// marked sets a mark that permit looks at: reads, own (whoever is logged in may call it, and gets their own), mine (what persons do for
// themselves), platform (a caller of an organization may not), chain (the platform itself has this, too).
func marked(name string) option {
	return func(o *huma.Operation) {
		if o.Metadata == nil {
			o.Metadata = make(map[string]any)
		}
		o.Metadata[name] = true
	}
}

// route adds an operation of the admin API.
func route[I, O any](s *server, method, path, id, summary string, h func(ctx context.Context, in *I) (*O, error), opts ...option) {
	op := huma.Operation{
		OperationID: id, Method: method, Path: "/api/v1" + path, Summary: summary, MaxBodyBytes: maxBody,
		Security: []map[string][]string{{"token": {}}}, DefaultStatus: http.StatusOK,
	}
	for _, o := range opts {
		o(&op)
	}
	op.Errors = errorsOf(&op)
	if op.Method == http.MethodGet && single[O]() && op.Metadata[public] == nil {
		s.shows[op.Path] = shower(h)
	}
	huma.Register(s.api, op, func(ctx context.Context, in *I) (*O, error) {
		out, err := serve(ctx, s, &op, in, h)
		var same huma.StatusError
		switch {
		case err == nil:
			return out, nil
		case errors.As(err, &same) && same.GetStatus() == http.StatusNotModified:
			return nil, err
		}
		return nil, s.fail(ctx, err)
	})
}

func one[T any](v *T, err error) (*body[T], error) {
	if err != nil {
		return nil, err
	}
	return &body[T]{*v}, nil
}

func (s *server) orgRoutes() {
	route(s, "GET", "/orgs", "list-organizations", "List organizations", func(ctx context.Context, in *struct{ PageQuery }) (*body[control.List[control.Organization]], error) {
		if own, all := caller(ctx).Organizations(); !all {
			out := &body[control.List[control.Organization]]{control.List[control.Organization]{Items: []control.Organization{}}}
			for _, name := range own {
				o, err := s.reg.Org(ctx, name)
				if err != nil {
					return nil, err
				}
				out.Body.Items = append(out.Body.Items, *o)
			}
			return out, nil
		}
		return paged(in.PageQuery, func(p store.Page) (*control.List[control.Organization], error) { return s.reg.Orgs(ctx, p) })
	}, marked("own"))
	route(s, "POST", "/orgs", "create-organization", "Create an organization with a PKI of its own", func(ctx context.Context, in *struct{ Body control.CreateOrganization }) (*body[control.Organization], error) {
		return one(s.reg.CreateOrg(ctx, in.Body))
	}, status(http.StatusCreated))
	route(s, "GET", "/orgs/{org}", "show-organization", "Show an organization", func(ctx context.Context, in *OrgPath) (*body[control.Organization], error) {
		return one(s.reg.Org(ctx, in.Org))
	})
	route(s, "PATCH", "/orgs/{org}", "update-organization", "Change what an organization allows, or the virtual ranges of an empty one", func(ctx context.Context, in *struct {
		OrgPath
		Body control.UpdateOrganization
	},
	) (*body[control.Organization], error) {
		return one(s.reg.UpdateOrg(ctx, in.Org, in.Body))
	})
	route(s, "DELETE", "/orgs/{org}", "delete-organization", "Delete an empty organization", func(ctx context.Context, in *OrgPath) (*struct{}, error) {
		return nil, s.reg.DeleteOrg(ctx, in.Org)
	}, status(http.StatusNoContent), marked("platform"))
	route(s, "GET", "/orgs/{org}/status", "status", "Overview of an organization", func(ctx context.Context, in *OrgPath) (*body[control.OrgStatus], error) {
		return one(s.reg.Status(ctx, in.Org))
	})
	route(s, "GET", "/orgs/{org}/sessions", "list-sessions", "Live sessions as gateways report them", func(ctx context.Context, in *struct {
		OrgPath
		PageQuery
	},
	) (*body[control.List[control.SessionRecord]], error) {
		p, err := in.page()
		if err != nil {
			return nil, err
		}
		all, err := s.reg.Sessions(ctx, in.Org)
		if err != nil {
			return nil, err
		}
		// Sessions live in memory and come and go: the cursor is an offset.
		from, _ := strconv.Atoi(p.After)
		from = min(max(from, 0), len(all))
		to := min(from+p.Limit, len(all))
		out := &body[control.List[control.SessionRecord]]{}
		out.Body.Items = all[from:to]
		if to < len(all) {
			out.Body.NextCursor = cursor(strconv.Itoa(to))
		}
		return out, nil
	})
	route(s, "DELETE", "/orgs/{org}/sessions/{name}", "end-sessions", "End the sessions of a client or gateway; its key stays good", func(ctx context.Context, in *ObjectPath) (*struct{}, error) {
		return nil, s.reg.EndSessions(ctx, in.Org, in.Name)
	}, status(http.StatusNoContent))
	route(s, "GET", "/orgs/{org}/audit", "list-audit", "The organization's audit chain, oldest first", func(ctx context.Context, in *struct {
		OrgPath
		PageQuery
	},
	) (*body[control.List[control.AuditEntry]], error) {
		p, err := in.page()
		if err != nil {
			return nil, err
		}
		after, _ := strconv.ParseInt(p.After, 10, 64)
		es, err := s.reg.Audit(ctx, in.Org, after, p.Limit+1)
		if err != nil {
			return nil, err
		}
		out := &body[control.List[control.AuditEntry]]{}
		if len(es) > p.Limit {
			es = es[:p.Limit]
			out.Body.NextCursor = cursor(strconv.FormatInt(es[p.Limit-1].Seq, 10))
		}
		out.Body.Items = es
		return out, nil
	}, marked("chain"))
	route(s, "GET", "/orgs/{org}/audit:verify", "verify-audit", "Recompute the hash chain", func(ctx context.Context, in *OrgPath) (*body[control.AuditVerification], error) {
		if _, err := s.reg.Org(ctx, in.Org); err != nil {
			return nil, err
		}
		return one(audit.Verify(ctx, s.reg.Store, in.Org))
	}, marked("chain"))
}
