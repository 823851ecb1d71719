//go:generate go test -run ^(TestDocument|TestCodes)$ . -update

package api

import (
	"cmp"
	"encoding/json"
	"net/http"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/control"
	"sallyway/internal/policy"
)

// Document is the OpenAPI 3.1 document of the API that this build serves, as indented JSON. revision is its info.version.
func Document(revision string) ([]byte, error) {
	s := routes(Config{Metrics: prometheus.NewRegistry()})
	s.api.OpenAPI().Info.Version = revision
	b, err := json.Marshal(s.api.OpenAPI())
	if err != nil {
		return nil, err
	}
	// By way of a map, so that members are sorted and a change of one line is one line.
	var doc any
	if err := json.Unmarshal(b, &doc); err != nil {
		return nil, err
	}
	if b, err = json.MarshalIndent(doc, "", "  "); err != nil {
		return nil, err
	}
	return append(b, '\n'), nil
}

// GoTypes are the Go types of the schemas of the document, by name; for the generator of the client.
func GoTypes() map[string]reflect.Type {
	s := routes(Config{Metrics: prometheus.NewRegistry()})
	schemas := s.api.OpenAPI().Components.Schemas
	out := make(map[string]reflect.Type)
	for name := range schemas.Map() {
		out[name] = schemas.TypeFromRef("#/components/schemas/" + name)
	}
	return out
}

// documents are the paths under which the document can be read.
var documents = map[string]struct {
	contentType string
	render      func(*huma.OpenAPI) ([]byte, error)
}{
	"/api/v1/openapi.json":     {"application/openapi+json", func(o *huma.OpenAPI) ([]byte, error) { return json.Marshal(o) }},
	"/api/v1/openapi.yaml":     {"application/openapi+yaml", (*huma.OpenAPI).YAML},
	"/api/v1/openapi-3.0.json": {"application/openapi+json", func(o *huma.OpenAPI) ([]byte, error) { return o.Downgrade() }},
	"/api/v1/openapi-3.0.yaml": {"application/openapi+yaml", (*huma.OpenAPI).DowngradeYAML},
}

// documents adds the paths of the document, and completes it: it comes after all other routes.
func (s *server) documents() {
	doc := s.api.OpenAPI()
	doc.AddOperation(&huma.Operation{
		OperationID: "openapi", Method: http.MethodGet, Path: "/api/v1/openapi.json", Summary: "This document; also as openapi.yaml, and for older tools as openapi-3.0.json and openapi-3.0.yaml",
		Responses: map[string]*huma.Response{"200": {Description: "OpenAPI 3.1", Content: map[string]*huma.MediaType{"application/openapi+json": {Schema: &huma.Schema{Type: huma.TypeObject}}}}},
	})
	s.describeAll()
	for path, d := range documents {
		text := sync.OnceValues(func() ([]byte, error) { return d.render(doc) })
		s.mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			b, err := text()
			if err != nil {
				write(w, &s.fail(r.Context(), err).Problem)
				return
			}
			w.Header().Set("Content-Type", d.contentType)
			_, _ = w.Write(b) // the peer has gone: nobody is left to tell
		})
	}
}

// tags are what operations are sorted by, by the word that scopes name; see object.
var tags = []struct{ word, name, about string }{
	{"organizations", "Organizations", "Tenants: each with nodes, policies and a PKI of its own."},
	{"status", "Organizations", ""},
	{"relays", "Relays", "Hosts that both ends can reach: of one organization, or shared."},
	{"gateways", "Gateways", "Hosts in the private network."},
	{"clients", "Clients", "Who reaches private resources."},
	{"resources", "Resources", "What is reached."},
	{"policies", "Policies", "Who may reach what."},
	{"groups", "Policies", ""},
	{"sessions", "Sessions", "Live sessions, as gateways report them."},
	{"audit", "Audit", "What was done, as a chain of hashes."},
	{"webhooks", "Webhooks", "Where audit entries are sent as they are written."},
	{"flows", "Flows", "Connections that there were, as gateways told."},
	{"flow-log", "Flows", ""},
	{"people", "People", "Accounts of persons and their roles."},
	{"providers", "Single sign-on", "OpenID Connect providers."},
	{"service-accounts", "Service accounts", "Programs that use the API."},
	{"tokens", "API tokens", "Credentials of programs."},
	{"me", "Me", "Who calls, and what is theirs."},
	{"my", "Me", ""},
	{"auth", "Login", "How programs log a person in (RFC 8628, RFC 8252)."},
	{"node", "Nodes", "What relays, gateways and clients themselves call."},
	{"enroll", "Nodes", ""},
	{"openapi.json", "This document", "The API, described."},
}

// describeAll completes the document: tags, headers, problems and examples of every operation.
func (s *server) describeAll() {
	doc := s.api.OpenAPI()
	for _, t := range tags {
		if t.about != "" {
			doc.Tags = append(doc.Tags, &huma.Tag{Name: t.name, Description: t.about})
		}
	}
	s.describeShared()
	for _, item := range doc.Paths {
		for _, op := range []*huma.Operation{item.Get, item.Put, item.Post, item.Patch, item.Delete} {
			if op != nil {
				s.describeOne(op)
			}
		}
	}
}

// headers of requests and answers that many operations have.
var (
	requestHeaders = map[string]string{
		"If-None-Match": "ETags of what the caller has: 304 while the object is as one of them says",
		"If-Match":      "ETag of what the caller has read: 412 when what is set in the object was changed since",
		keyHeader:       "a fresh random word, such as a UUID: a request that is repeated with it within 24 h is carried out once, and gets the first answer again",
	}
	answerHeaders = map[string]string{
		"RateLimit":        "requests that are left, and seconds until all are there again",
		"RateLimit-Policy": "requests that a caller has, and in how many seconds",
		"Retry-After":      "seconds to wait",
		"ETag":             "of the object: for If-None-Match and If-Match",
		replayed:           "true when this is the answer to an earlier request with the same " + keyHeader,
	}
)

func text() *huma.Schema { return &huma.Schema{Type: huma.TypeString} }

// describeShared puts what operations refer to into the document.
func (s *server) describeShared() {
	c := s.api.OpenAPI().Components
	c.Parameters, c.Headers, c.Responses = make(map[string]*huma.Param), make(map[string]*huma.Header), make(map[string]*huma.Response)
	for name, about := range requestHeaders {
		c.Parameters[name] = &huma.Param{Name: name, In: "header", Description: about, Schema: text()}
	}
	for name, about := range answerHeaders {
		c.Headers[name] = &huma.Header{Description: about, Schema: text()}
	}
}

func (s *server) describeOne(op *huma.Operation) {
	if len(op.Tags) == 0 {
		op.Tags = []string{tagOf(object(op))}
	}
	admin := by(op) == byAPI
	takes := func(header string) {
		op.Parameters = append(op.Parameters, &huma.Param{Ref: "#/components/parameters/" + header})
	}
	shown := op.Method == http.MethodGet && s.shows[op.Path] != nil
	switch {
	case !admin:
	case shown:
		takes("If-None-Match")
		op.Responses["304"] = &huma.Response{Description: "The object is as If-None-Match says"}
	case guarded(op) && s.shows[op.Path] != nil:
		takes("If-Match")
	}
	if admin && keyed(op) {
		takes(keyHeader)
	}
	for status, r := range op.Responses {
		code, _ := strconv.Atoi(status) // 0 for default
		if code == 0 || code >= 400 {
			op.Responses[status] = s.problemResponse(op, code)
			continue
		}
		if admin && code == http.StatusOK && r.Content == nil {
			r.Content = map[string]*huma.MediaType{"application/x-ndjson": {Schema: &huma.Schema{Type: huma.TypeString, Description: "one JSON document a line"}}}
		}
		if m := r.Content["application/json"]; m != nil && m.Schema != nil {
			m.Example = examples[s.typeName(m.Schema)]
		}
		var has []string
		if counted(op) {
			has = append(has, "RateLimit", "RateLimit-Policy")
		}
		if admin && keyed(op) {
			has = append(has, replayed)
		}
		if admin && (shown || op.Method != http.MethodGet) && answersOne(r) {
			has = append(has, "ETag")
		}
		r.Headers = headers(has)
	}
	if op.RequestBody != nil {
		for _, m := range op.RequestBody.Content {
			if m.Schema != nil && m.Example == nil && m.Examples == nil {
				m.Example = examples[s.typeName(m.Schema)]
			}
		}
	}
}

func headers(names []string) map[string]*huma.Header {
	out := make(map[string]*huma.Header, len(names))
	for _, n := range names {
		out[n] = &huma.Header{Ref: "#/components/headers/" + n}
	}
	return out
}

// counted says whether requests are taken from a caller's budget.
func counted(op *huma.Operation) bool { return op.Security != nil || op.Metadata[public] != nil }

// problemResponse refers to the description of a problem; operations that can answer with the same codes share one.
func (s *server) problemResponse(op *huma.Operation, status int) *huma.Response {
	name := strings.ReplaceAll(cmp.Or(http.StatusText(status), "Error"), " ", "") + map[string]string{byAPI: "", byNode: "Node", byLogin: "Login"}[by(op)]
	var has []string
	if by(op) == byAPI && status == http.StatusConflict && keyed(op) || by(op) == byAPI && status == http.StatusUnprocessableEntity && keyed(op) {
		name += "Keyed"
	}
	if counted(op) {
		has = append(has, "RateLimit", "RateLimit-Policy")
	} else {
		name += "Uncounted"
	}
	if status == http.StatusTooManyRequests || status == http.StatusConflict && keyed(op) {
		has = append(has, "Retry-After")
	}
	doc := s.api.OpenAPI()
	doc.Components.Responses[name] = &huma.Response{
		Description: problemsOf(op, status), Headers: headers(has),
		Content: map[string]*huma.MediaType{"application/problem+json": {Schema: doc.Components.Schemas.Schema(reflect.TypeFor[problem](), true, "Problem")}},
	}
	return &huma.Response{Ref: "#/components/responses/" + name}
}

func (s *server) typeName(schema *huma.Schema) string {
	if schema.Ref == "" {
		return ""
	}
	if t := s.api.OpenAPI().Components.Schemas.TypeFromRef(schema.Ref); t != nil {
		return t.Name()
	}
	return ""
}

func answersOne(r *huma.Response) bool {
	m := r.Content["application/json"]
	return m != nil && m.Schema != nil && !strings.HasPrefix(m.Schema.Ref, "#/components/schemas/List")
}

func tagOf(word string) string {
	for _, t := range tags {
		if t.word == word {
			return t.name
		}
	}
	return strings.ToUpper(word[:1]) + strings.ReplaceAll(word[1:], "-", " ")
}

// errorsOf are the statuses of the problems that an operation of the admin API answers.
func errorsOf(op *huma.Operation) []int {
	out := []int{http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusTooManyRequests, http.StatusServiceUnavailable}
	if op.Metadata[public] != nil {
		out = []int{http.StatusBadRequest, http.StatusForbidden, http.StatusTooManyRequests, http.StatusServiceUnavailable}
	}
	if op.Method != http.MethodGet {
		out = append(out, http.StatusBadRequest, http.StatusConflict, http.StatusUnprocessableEntity)
	}
	if guarded(op) {
		out = append(out, http.StatusPreconditionFailed)
	}
	out = append(out, http.StatusUnprocessableEntity)
	slices.Sort(out)
	return slices.Compact(out)
}

var exampleTime = time.Date(2027, 1, 31, 9, 30, 0, 0, time.UTC)

// examples of requests and answers, by the name of their type. They are values, so they can not be of another form than the code's.
var examples = map[string]any{
	"CreateOrganization":   control.CreateOrganization{Name: "acme"},
	"CreateNode":           control.CreateNode{Name: "office-1"},
	"CreateResource":       control.CreateResource{Name: "db", Gateways: []string{"office-1"}, Address: "10.0.3.7", TCP: []policy.PortRange{{First: 5432, Last: 5432}}},
	"CreatePolicy":         control.CreatePolicy{Subject: "client:laptop", Resource: "db"},
	"PolicyRecord":         control.PolicyRecord{ID: "p-4kbq2m3x7a5c", Name: "client-laptop-db", Subject: "client:laptop", Resource: "db", Created: exampleTime},
	"ExplainRequest":       control.ExplainRequest{Subject: "client:laptop", Resource: "db", Proto: policy.TCP, Port: 5432},
	"Explanation":          control.Explanation{Allowed: true, Rule: "client-laptop-db", Reason: "policy client-laptop-db allows it", Gateways: []string{"office-1"}},
	"CreateGroup":          control.CreateGroup{Name: "developers", Members: []string{"client:laptop"}},
	"GroupRecord":          control.GroupRecord{Name: "developers", Members: []string{"client:laptop"}, Created: exampleTime},
	"CreatePerson":         control.CreatePerson{Login: "ada", Name: "Ada", Email: "ada@example.com", Role: "admin"},
	"CreateServiceAccount": control.CreateServiceAccount{Name: "deploy", Scopes: []string{"resources:write", "policies:write"}},
	"CreateAPIToken":       control.CreateAPIToken{Name: "ci", Scopes: []string{"audit:read"}, Life: 90 * 24 * 3600},
	"CreateProvider":       control.CreateProvider{Name: "sso", Issuer: "https://login.example.com", ClientID: "sallyway"},
	"CreateTURNCredential": control.CreateTURNCredential{Client: "laptop", TTL: 3600},
	"Organization": control.Organization{
		Name: "acme", Range: []netip.Prefix{netip.MustParsePrefix("100.112.0.0/12"), netip.MustParsePrefix("fd5a:11::/48")}, Created: exampleTime,
	},
	"AuditVerification": control.AuditVerification{OK: true, Entries: 4711},
}
