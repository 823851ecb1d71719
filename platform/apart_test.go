package platform

import (
	"regexp"
	"strings"
	"testing"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/store"
)

// parameter is a part of a path that names something.
var parameter = regexp.MustCompile(`\{[^}]+\}`)

// TestObjectsOfOthersDoNotExist asks every route of the OpenAPI document that names an object for the objects of another organization and for shared
// relays, by their ids, which are the same everywhere: with the caller's own organization in the path there is none of them.
func TestObjectsOfOthersDoNotExist(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	if status, p := w.do(w.admin.Token, "POST", "/api/v1/orgs", control.CreateOrganization{Name: "rival"}, nil); status != 201 {
		t.Fatalf("%+v", p)
	}
	var shared control.CreatedNode
	if status, p := w.do(w.admin.Token, "POST", "/api/v1/shared/relays", control.CreateNode{Name: "world", Host: "world.example"}, &shared); status != 201 {
		t.Fatalf("%+v", p)
	}
	w.fromToken(shared.Token).join()
	w.inOrg("rival", "POST", "/clients", control.CreateNode{Name: "laptop"}, nil) // a credential needs a client of one's own
	w.api("POST", "/groups", control.CreateGroup{Name: "staff", Members: []string{"client:laptop"}}, nil)
	var web control.ResourceRecord
	w.api("GET", "/resources/web", nil, &web)
	var rule control.PolicyRecord
	w.api("GET", "/policies/client-laptop-web", nil, &rule)
	ids := map[string]string{
		"relay": w.relays[0].id.ID, "gateway": w.gateway.id.ID, "client": w.client.id.ID, "shared relay": shared.ID, "resource": web.ID, "policy": rule.ID, "group": "staff",
	}
	for what, id := range ids {
		if id == "" {
			t.Fatalf("no id of a %s", what)
		}
	}
	rival := w.apiToken("rival", store.ScopeAdmin, 0)
	before := w.auditDirect("default")
	routes := 0
	for path, ops := range w.document().Paths {
		rest, in := strings.CutPrefix(path, "/api/v1/orgs/{org}/")
		if !in || !strings.Contains(rest, "{") || strings.HasPrefix(rest, "my/") { // persons' own: no token has any
			continue
		}
		for method, op := range ops {
			method = strings.ToUpper(method)
			routes++
			for what, id := range ids {
				var doc any
				if op.RequestBody != nil {
					if doc = body(path); method == "PATCH" {
						doc = struct{}{}
					}
				}
				url := "/api/v1/orgs/rival/" + parameter.ReplaceAllString(rest, id)
				status, p := w.do(rival, method, url, doc, nil)
				if status == 422 && doc != nil {
					status, p = w.do(rival, method, url, struct{}{}, nil) // of a shape that bodies do not know: what is not there comes first
				}
				switch {
				case status == 404:
				case status == 422 && strings.HasSuffix(path, "/drain"): // only relays drain: said before anything is looked for
				case status == 201 && what == "shared relay" && strings.HasSuffix(path, "/credential"): // shared relays are there to be used
				case status/100 == 4 && status != 403 && status != 409 && !strings.Contains(p.Detail, id):
					t.Errorf("%s %s for a %s of another organization: %d %+v, want 404", method, url, what, status, p)
				default:
					t.Errorf("%s %s for a %s of another organization: %d %+v", method, url, what, status, p)
				}
			}
		}
	}
	if routes < 40 {
		t.Errorf("%d routes walked", routes)
	}
	// Nor are they named in what one's own objects refer to.
	for _, tc := range []struct {
		method, path string
		in           any
	}{
		{"POST", "/gateways", control.CreateNode{Name: "a", Places: control.Places{PinRelays: []string{w.relays[0].id.ID}}}},
		{"POST", "/gateways", control.CreateNode{Name: "a", Places: control.Places{ExcludeRelays: []string{"relay-1"}}}},
		{"PATCH", "/clients/laptop", control.UpdateNode{UpdatePlaces: control.UpdatePlaces{PreferRelays: texts(w.relays[1].id.ID)}}},
		{"POST", "/resources", control.CreateResource{Name: "a", Gateways: []string{w.gateway.id.ID}, Address: "10.0.0.1", TCP: []policy.PortRange{policy.AllPorts}}},
		{"POST", "/policies", control.CreatePolicy{Subject: "client:" + w.client.id.ID, Resource: web.ID}},
		{"POST", "/policies", control.CreatePolicy{Subject: "client:laptop", Resource: web.ID}},
		{"POST", "/groups", control.CreateGroup{Name: "a", Members: []string{"client:" + w.client.id.ID}}},
	} {
		if status, p := w.do(rival, tc.method, "/api/v1/orgs/rival"+tc.path, tc.in, nil); status != 404 && status != 422 {
			t.Errorf("%s %+v: %d %+v", tc.path, tc.in, status, p)
		}
	}
	for _, e := range w.auditDirect("default")[len(before):] {
		if e.Result == "ok" && e.Actor == "token:test" {
			t.Errorf("something was done: %+v", e)
		}
	}
	// And a shared relay is nobody's to change but the platform's.
	for _, token := range []string{rival, w.apiToken("default", store.ScopeAdmin, 0)} {
		for path, ops := range w.document().Paths {
			if !strings.HasPrefix(path, "/api/v1/shared/") {
				continue
			}
			for method, op := range ops {
				var doc any
				if op.RequestBody != nil {
					doc = control.CreateNode{Name: "mine", Host: "mine.example"}
				}
				url := parameter.ReplaceAllString(path, "world")
				if status, p := w.do(token, strings.ToUpper(method), url, doc, nil); status != 403 {
					t.Errorf("%s %s with an organization's token: %d %+v", method, url, status, p)
				}
			}
		}
	}
	if n, err := w.srv.Registry().Node(t.Context(), identity.SharedOrg, identity.Relay, "world"); err != nil || n.State == control.StateDisabled || n.State == control.StateRevoked {
		t.Errorf("the shared relay: %+v %v", n, err)
	}
}
