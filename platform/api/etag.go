package api

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"reflect"
	"slices"
	"strings"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"sallyway/internal/control"
	"sallyway/platform/registry"
)

// Entity tags (RFC 9110 §8.8.3) of single objects have two parts, "SET.WHOLE". SET is a hash of what is set in an object and WHOLE one of all that is
// shown, with state, load and times that change by themselves. If-None-Match looks at both: a poll sees every change. If-Match, which guards a change,
// looks at SET: a heartbeat between reading and writing makes no conflict.
const tagBytes = 9 // of each part: chance, not an adversary, is what two representations meet by

// tag is the entity tag of a representation.
func tag(v any) string {
	return `"` + hash(settled(v)) + "." + hash(v) + `"`
}

func hash(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return "" // what can not be encoded is not answered either
	}
	sum := sha256.Sum256(b)
	return base64.RawURLEncoding.EncodeToString(sum[:tagBytes])
}

// settled is a representation without what changes by itself.
func settled(v any) any {
	switch v := v.(type) {
	case *control.NodeRecord:
		return settledNode(*v)
	case *control.CreatedNode:
		return settledNode(v.NodeRecord)
	case *control.ResourceRecord:
		c := *v
		c.Reached = nil
		return c
	case *control.PersonRecord:
		return settledPerson(*v)
	case *control.InvitedPerson:
		return settledPerson(v.PersonRecord)
	case *control.Webhook:
		c := *v
		if c.State != control.WebhookDisabled {
			c.State = ""
		}
		c.Reason, c.LastSuccess, c.FailedSince, c.NextTry, c.Backlog, c.Secret = "", nil, nil, nil, 0, ""
		return c
	case *control.Licence:
		c := *v
		c.State, c.Problem, c.Use = "", "", nil
		return c
	case *control.Me:
		c := *v
		if v.Person != nil {
			p := settledPerson(*v.Person)
			c.Person = &p
		}
		return c
	}
	return v
}

func settledNode(n control.NodeRecord) control.NodeRecord {
	if n.State != control.StateDisabled && n.State != control.StateRevoked {
		n.State = ""
	}
	n.Enrolled, n.LastSeen, n.Version, n.Key, n.NotAfter, n.Problems, n.Load = nil, nil, "", nil, nil, nil, nil
	n.Outdated, n.RTT, n.Outside, n.Relays, n.RelayReasons = false, 0, nil, nil, nil
	return n
}

func settledPerson(p control.PersonRecord) control.PersonRecord {
	p.LastLogin, p.Clients = nil, nil
	return p
}

// tagged gives an answer its entity tag, and answers 304 where the caller has it already.
func tagged[O any](hc huma.Context, op *huma.Operation, out *O, err error) (*O, error) {
	if err != nil || out == nil || hc == nil || op.Metadata[public] != nil || !single[O]() {
		return out, err
	}
	b, ok := any(out).(interface{ content() any })
	if !ok {
		return out, nil
	}
	t := tag(b.content())
	hc.SetHeader("ETag", t)
	if op.Method != http.MethodGet {
		return out, nil
	}
	hc.SetHeader("Cache-Control", "private, no-cache")
	if have := entityTags(hc.Header("If-None-Match")); slices.Contains(have, "*") || slices.ContainsFunc(have, func(h string) bool { return strings.TrimPrefix(h, "W/") == t }) {
		return nil, huma.Status304NotModified()
	}
	return out, nil
}

// entityTags splits a list of entity tags. None of ours holds a comma.
func entityTags(header string) []string {
	var out []string
	for _, t := range strings.Split(header, ",") {
		if t = strings.TrimSpace(t); t != "" {
			out = append(out, t)
		}
	}
	return out
}

// show reads the object at a path; see route.
type show func(ctx context.Context, r *http.Request) (any, error)

// shower makes a show of the handler of a GET, whose input is filled with the path's words alone.
func shower[I, O any](h func(context.Context, *I) (*O, error)) show {
	return func(ctx context.Context, r *http.Request) (any, error) {
		in := new(I)
		fill(reflect.ValueOf(in).Elem(), r)
		out, err := h(ctx, in)
		if err != nil {
			return nil, err
		}
		return any(out).(interface{ content() any }).content(), nil //nolint:forcetypeassert // route asks single first
	}
}

func fill(v reflect.Value, r *http.Request) {
	for i := range v.NumField() {
		f := v.Type().Field(i)
		switch {
		case f.Anonymous && f.Type.Kind() == reflect.Struct:
			fill(v.Field(i), r)
		case f.Tag.Get("path") != "" && f.Type.Kind() == reflect.String:
			v.Field(i).SetString(r.PathValue(f.Tag.Get("path")))
		}
	}
}

// precondition is what a request with If-Match demands.
type precondition struct {
	r    *http.Request
	want []string
	show show // nil: the object has no entity tag
}

// precondition reads If-Match. Without one it is nil.
func (s *server) precondition(hc huma.Context, op *huma.Operation) *precondition {
	if hc == nil || !guarded(op) {
		return nil
	}
	r, _ := humago.Unwrap(hc)
	want := entityTags(strings.Join(r.Header.Values("If-Match"), ","))
	if len(want) == 0 {
		return nil
	}
	return &precondition{r: r, want: want, show: s.shows[op.Path]}
}

// guarded says whether an operation takes If-Match.
func guarded(op *huma.Operation) bool {
	return op.Method == http.MethodPatch || op.Method == http.MethodPut || op.Method == http.MethodDelete
}

// hold refuses when the object is another than the caller has seen. Run inside of the transaction that changes it, nothing comes in between.
func (p *precondition) hold(ctx context.Context) error {
	is := ""
	if p.show != nil {
		v, err := p.show(ctx, p.r)
		if err != nil {
			return err
		}
		is, _, _ = strings.Cut(tag(v), ".")
	}
	for _, w := range p.want {
		if set, _, _ := strings.Cut(w, "."); w == "*" || is != "" && set == is {
			return nil
		}
	}
	remedy := "read the object again, see whether the change still makes sense, and send it with the ETag of what was read"
	if p.show == nil {
		remedy = "leave If-Match out: this has no ETag"
	}
	return registry.Refuse(http.StatusPreconditionFailed, CodePrecondition, remedy, "it was changed since it was read: If-Match does not fit")
}
