package web

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/people"
	"sallyway/platform/presence"
	"sallyway/platform/registry"
)

// BenchmarkPages measures what pages cost the server in an organization with 1000 gateways, resources and policies, 100 clients, 10 relays
// and 2000 sessions:
//
//	go test -run - -bench Pages ./platform/web
func BenchmarkPages(b *testing.B) {
	s := newSite(b)
	s.owner()
	ctx, org := b.Context(), registry.DefaultOrg
	var relays, gateways, clients []string
	create := func(kind identity.Kind, names *[]string, name, host string) {
		_, err := s.reg.CreateNode(ctx, org, kind, control.CreateNode{Name: name, Host: host})
		must(b, err)
		*names = append(*names, name)
	}
	for i := range 10 {
		create(identity.Relay, &relays, fmt.Sprintf("relay-%d", i), fmt.Sprintf("203.0.113.%d", i+1))
	}
	for i := range 100 {
		create(identity.Client, &clients, fmt.Sprintf("client-%d", i), "")
	}
	for i := range 1000 {
		create(identity.Gateway, &gateways, fmt.Sprintf("gateway-%d", i), "")
		_, err := s.reg.CreateResource(ctx, org, control.CreateResource{
			Name: fmt.Sprintf("resource-%d", i), Address: fmt.Sprintf("10.%d.%d.1", i/250, i%250), TCP: []policy.PortRange{policy.AllPorts}, Gateways: []string{gateways[i]},
		})
		must(b, err)
		_, err = s.reg.CreatePolicy(ctx, org, control.CreatePolicy{Subject: "client:" + clients[i%100], Resource: fmt.Sprintf("resource-%d", i)})
		must(b, err)
	}
	enrol(b, s.reg, org, identity.Relay, relays...)
	enrol(b, s.reg, org, identity.Gateway, gateways...)
	enrol(b, s.reg, org, identity.Client, clients...)
	var peers []identity.Node
	for _, name := range clients {
		n, err := s.reg.Node(ctx, org, identity.Client, name)
		must(b, err)
		peers = append(peers, identity.Node{Org: org, Kind: identity.Client, ID: n.ID})
	}
	beat := func(kind identity.Kind, name string, h control.Heartbeat) {
		n, err := s.reg.Node(ctx, org, kind, name)
		must(b, err)
		s.reg.Board.Put(n.ID, presence.Beat{At: time.Now().Add(time.Hour), Heartbeat: h}) // never old while it is measured
	}
	for _, name := range relays {
		beat(identity.Relay, name, control.Heartbeat{State: "ready", Load: map[string]float64{"allocations": 7}})
	}
	for i, name := range gateways {
		v, err := s.reg.Resource(ctx, org, fmt.Sprintf("resource-%d", i))
		must(b, err)
		beat(identity.Gateway, name, control.Heartbeat{
			State: "ready", Resources: []control.ResourceHealth{{ID: v.ID, OK: true}},
			Sessions: []control.SessionReport{{Peer: peers[i%100], Relay: "relay-1 udp"}, {Peer: peers[(i+1)%100], Relay: "relay-2 udp"}},
		})
	}
	must(b, s.reg.Allocate(ctx, org, time.Now().Add(-time.Hour)))
	must(b, s.web.history.Sample(ctx))
	p := s.principal("ada")
	rec := httptest.NewRecorder()
	people.SetCookie(rec, p.Session)
	for _, path := range []string{
		"overview", "networking/relays", "networking/gateways", "networking/gateways?page=11", "networking/gateways?q=999", "networking/gateways/gateway-500", "networking/clients",
		"resources", "resources?q=999", "resources/resource-500", "policies", "policies?q=999", "policies/explain", "policies/explain?subject=client:client-1&resource=resource-101",
		"sessions", "topology", "topology?subject=client:client-1", "history", "certificates", "audit", "audit?q=999", "users", "organization",
	} {
		b.Run(path, func(b *testing.B) {
			for b.Loop() {
				r := httptest.NewRequest(http.MethodGet, "https://platform.example/orgs/default/"+path, nil)
				for _, c := range rec.Result().Cookies() {
					r.AddCookie(c)
				}
				w := httptest.NewRecorder()
				s.web.ServeHTTP(w, r)
				if w.Code != http.StatusOK {
					b.Fatalf("%d: %.300s", w.Code, w.Body)
				}
			}
		})
	}
}
