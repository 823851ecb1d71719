package browser

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/entitlement"
	"sallyway/internal/identity"
	"sallyway/internal/lab"
	"sallyway/internal/policy"
	"sallyway/platform"
	"sallyway/platform/presence"
	"sallyway/platform/probe"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

const (
	owner    = "ada"
	password = "a sally is a dash out of a fortress"
)

// logBook is a log that is shown when a test fails.
type logBook struct{ t *testing.T }

func (l logBook) Write(b []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

// inProcess runs a platform of this process on a host of the lab. It trusts the issuer of licences.
func inProcess(t *testing.T, l *lab.Lab, issuer *entitlement.Key) *platform.Server {
	t.Helper()
	var srv *platform.Server
	cfg := platform.Config{
		Licence: platform.LicenceConfig{Trust: []string{issuer.Public().String()}},
		Data:    l.PlatformData(), Listen: ":443", ProbeRelays: probe.Off, AdvertiseURL: l.PlatformURL(),
		Log: slog.New(slog.NewTextHandler(logBook{t}, &slog.HandlerOptions{Level: slog.LevelError})),
	}
	check(t, l.Platform.Do(func() (err error) {
		srv, err = platform.Open(t.Context(), cfg)
		return err
	}))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the platform ended with %v", err)
		}
	})
	return srv
}

// licensed gives the organization a licence of which one kind of node is used up and another nearly.
func licensed(t *testing.T, reg *registry.Registry, issuer *entitlement.Key) {
	t.Helper()
	relays, gateways, clients := int64(6), int64(50), int64(8)
	bandwidth, now := int64(125e6), time.Now()
	jws, err := issuer.Sign(&entitlement.Entitlement{
		ID: "e-7qk2mzr4wbxa", Serial: 12, Issuer: "licences.example.com", Customer: "Acme Analytics", Organization: registry.DefaultOrg, Contact: "sales@example.com",
		Limits: entitlement.Limits{Relays: &relays, Gateways: &gateways, Clients: &clients, Bandwidth: &bandwidth}, Features: []string{"sso", "audit-export"},
		Issued: now, NotBefore: now.AddDate(0, 0, -65), Expires: now.AddDate(0, 0, 300),
	})
	check(t, err)
	_, err = reg.InstallLicence(t.Context(), registry.DefaultOrg, control.InstallLicence{Licence: jws, Source: "service https://licences.example.com"})
	check(t, err)
}

// estate is an organization in which something of everything is going on.
func estate(t *testing.T, reg *registry.Registry) {
	t.Helper()
	const org = registry.DefaultOrg
	ctx := registry.WithActor(t.Context(), "person:"+owner)
	now := time.Now()
	ids := make(map[string]string)
	alive := make(map[string]control.Heartbeat)
	node := func(kind identity.Kind, name, host string, beat *control.Heartbeat, age time.Duration) {
		made, err := reg.CreateNode(ctx, org, kind, control.CreateNode{Name: name, Host: host})
		check(t, err)
		ids[name] = made.ID
		if beat == nil {
			return
		}
		check(t, reg.Store.Update(ctx, func(tx store.Tx) error {
			n, err := tx.FindNode(ctx, org, kind, name)
			if err != nil {
				return err
			}
			n.Enrolled, n.Enrolment, n.Version, n.LastSeen = now.Add(-72*time.Hour), 1, "v1.4.0", now.Add(-age)
			if err := tx.UpdateNode(ctx, n); err != nil {
				return err
			}
			var h identity.KeyHash
			copy(h[:], name+"0123456789abcdef0123456789abcdef")
			return tx.PutKey(ctx, &store.Key{Hash: h, Node: n.ID, Public: []byte{1}, Enrolment: 1, Created: now.Add(-6 * time.Hour), NotAfter: now.Add(18 * time.Hour)})
		}))
		beat.Version = "v1.4.0"
		if age == 0 {
			alive[name] = *beat
		}
		reg.Board.Put(ids[name], presence.Beat{At: now.Add(-age), Heartbeat: *beat})
	}
	ready := func() *control.Heartbeat { return &control.Heartbeat{State: "ready"} }
	load := func(a, b float64) *control.Heartbeat {
		return &control.Heartbeat{State: "ready", Load: map[string]float64{"allocations": a, "bytes_per_second": b}}
	}
	node(identity.Relay, "fra-1", "203.0.113.7", load(412, 84e6), 0)
	node(identity.Relay, "ams-2", "relay-ams.example.com", load(218, 31e6), 0)
	drains := load(4, 1e5)
	drains.State = "draining"
	node(identity.Relay, "lon-1", "198.51.100.20", drains, 0)
	degraded := load(0, 0)
	degraded.Problems = []string{"listens on port 5350, and nodes are told to dial 5349: sallyway relay update sin-1 --port 5350"}
	node(identity.Relay, "sin-1", "2001:db8::17", degraded, 0)
	node(identity.Relay, "nyc-1", "192.0.2.44", ready(), 11*time.Minute)
	node(identity.Relay, "syd-1", "syd.example.com", nil, 0)
	for i := range 6 {
		node(identity.Client, fmt.Sprintf("laptop-%d", i+1), "", ready(), time.Duration(i/4)*time.Hour)
	}
	node(identity.Client, "build-runner", "", ready(), 0)
	node(identity.Gateway, "office", "", ready(), 0)
	node(identity.Gateway, "datacentre-frankfurt", "", ready(), 0)
	node(identity.Gateway, "branch-lyon", "", ready(), 3*time.Minute)
	node(identity.Gateway, "lab", "", nil, 0)
	tcp := func(s string) []policy.PortRange {
		p, err := policy.ParsePorts(s)
		check(t, err)
		return p
	}
	res := make(map[string]*control.ResourceRecord)
	for _, r := range []control.CreateResource{
		{Name: "orders-db", Address: "10.0.3.7", TCP: tcp("5432"), Gateways: []string{"datacentre-frankfurt", "office"}},
		{Name: "wiki", Address: "wiki.corp.example", TCP: tcp("443,80"), Gateways: []string{"office"}, Domains: []string{"corp.example"}},
		{Name: "kubernetes", Address: "10.0.9.1", TCP: tcp("6443"), Gateways: []string{"datacentre-frankfurt"}},
		{Name: "lab-network", Address: "10.7.0.0/16", TCP: tcp("all"), UDP: tcp("all"), ICMP: true, Gateways: []string{"lab", "branch-lyon"}},
		{Name: "printer", Address: "10.8.1.9", TCP: tcp("631"), Gateways: []string{"branch-lyon"}},
	} {
		made, err := reg.CreateResource(ctx, org, r)
		check(t, err)
		res[r.Name] = made
	}
	_, err := reg.PutGroup(ctx, org, "engineers", &[]string{"client:laptop-1", "client:laptop-2", "client:laptop-3"}, true)
	check(t, err)
	for _, p := range []control.CreatePolicy{
		{Subject: "group:engineers", Resource: "orders-db"},
		{Subject: "client:laptop-1", Resource: "wiki"},
		{Subject: "client:laptop-4", Resource: "wiki"},
		{Subject: "client:build-runner", Resource: "kubernetes"},
		{Subject: "gateway:office", Resource: "lab-network"},
	} {
		_, err := reg.CreatePolicy(ctx, org, p)
		check(t, err)
	}
	off := true
	_, err = reg.UpdatePolicy(ctx, org, "client-laptop-4-wiki", control.UpdatePolicy{Disabled: &off})
	check(t, err)
	check(t, reg.Store.Update(ctx, func(tx store.Tx) error {
		for g, relays := range map[string][]string{"office": {"fra-1", "ams-2"}, "datacentre-frankfurt": {"fra-1", "ams-2"}, "branch-lyon": {"ams-2", "fra-1"}} {
			var list []string
			for _, r := range relays {
				list = append(list, ids[r])
			}
			if err := tx.PutAssignment(ctx, ids[g], list); err != nil {
				return err
			}
		}
		return nil
	}))
	session := func(peer, relay string, sent, recv uint64, rtt time.Duration) control.SessionReport {
		return control.SessionReport{
			Peer: identity.Node{Org: org, Kind: identity.Client, ID: ids[peer]}, Relay: relay, Since: now.Add(-43 * time.Minute), Flows: 3,
			SentBytes: sent, RecvBytes: recv, RTT: rtt,
		}
	}
	beats := func(grown uint64, relay string) {
		at := time.Now()
		for name, beat := range alive {
			reg.Board.Put(ids[name], presence.Beat{At: at, Heartbeat: beat})
		}
		reg.Board.Put(ids["office"], presence.Beat{At: at, Heartbeat: control.Heartbeat{
			State: "ready", Version: "v1.4.0",
			RelayRTT:  map[string]time.Duration{ids["fra-1"]: 8 * time.Millisecond, ids["ams-2"]: 14600 * time.Microsecond, ids["lon-1"]: 21 * time.Millisecond},
			Sessions:  []control.SessionReport{session("laptop-1", relay, 41_000_000+grown, 2_100_000+grown/9, 14*time.Millisecond)},
			Resources: []control.ResourceHealth{{ID: res["wiki"].ID, OK: true, Since: now.Add(-26 * time.Hour)}, {ID: res["orders-db"].ID, OK: true, Since: now.Add(-2 * time.Hour)}},
		}})
		reg.Board.Put(ids["datacentre-frankfurt"], presence.Beat{At: at, Heartbeat: control.Heartbeat{
			State: "ready", Version: "v1.4.0",
			Sessions: []control.SessionReport{
				session("laptop-2", "fra-1 udp", 1_900_000_000+3*grown, 88_000_000, 21*time.Millisecond),
				session("build-runner", "direct 198.51.100.77:40112", 7_400_000+grown, 950_000, 3*time.Millisecond),
			},
			Resources: []control.ResourceHealth{
				{ID: res["orders-db"].ID, OK: false, Reason: "connection refused by 10.0.3.7:5432", Since: now.Add(-9 * time.Minute)},
				{ID: res["kubernetes"].ID, OK: false, Reason: "10.0.9.1:6443 does not answer within 5s", Since: now.Add(-4 * time.Minute)},
			},
		}})
	}
	beats(0, "fra-1 udp")
	go func() {
		// Heartbeats come on while the test looks.
		tick := time.NewTicker(2 * time.Second)
		defer tick.Stop()
		for n := uint64(1); ; n++ {
			select {
			case <-t.Context().Done():
				return
			case <-tick.C:
				relay := "fra-1 udp"
				if n > 2 {
					relay = "ams-2 udp"
				}
				beats(n*n*9_000_000, relay)
			}
		}
	}()
}

// TestGallery looks at every page: by day, by night and on a phone, each held against what everybody must be able to read and reach.
func TestGallery(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	issuer, err := entitlement.NewKey()
	check(t, err)
	srv := inProcess(t, l, issuer)
	b := start(t, l.Platform, srv.URL())

	code, err := srv.People().SetupCode(t.Context())
	check(t, err)
	b.open("/")
	b.sees(step, "Make the first account")
	b.pose("setup")
	b.fill("Setup code", "wrong-code")
	b.fill("Login", owner)
	b.fill("Your name", "Ada Lovelace")
	b.fill("Password", password)
	b.fill("Password again", password)
	b.turn("Make the account")
	b.sees(step, "setup code is not the right one")
	b.fill("Setup code", code)
	b.fill("Password", password)
	b.fill("Password again", password)
	b.turn("Make the account")
	b.sees(step, "First steps")
	b.pose("overview-empty")
	for _, p := range []string{"networking/relays", "networking/gateways", "networking/clients", "resources", "policies", "groups", "sessions", "topology", "history", "users", "service-accounts"} {
		b.open("/orgs/default/" + p)
		b.glance("empty-" + strings.ReplaceAll(p, "/", "-"))
	}

	estate(t, srv.Registry())
	placed(t, srv.Registry())
	licensed(t, srv.Registry(), issuer)
	trailed(t, srv.Registry())
	for _, g := range []struct{ name, path string }{
		{"overview", "/orgs/default/overview"},
		{"relays", "/orgs/default/networking/relays"},
		{"relay-new", "/orgs/default/networking/relays/new"},
		{"relay", "/orgs/default/networking/relays/fra-1"},
		{"relay-degraded", "/orgs/default/networking/relays/sin-1"},
		{"gateways", "/orgs/default/networking/gateways"},
		{"gateway", "/orgs/default/networking/gateways/office"},
		{"clients", "/orgs/default/networking/clients"},
		{"client", "/orgs/default/networking/clients/laptop-5"},
		{"resources", "/orgs/default/resources"},
		{"resource", "/orgs/default/resources/orders-db"},
		{"resource-edit", "/orgs/default/resources/orders-db/edit"},
		{"resource-test", "/orgs/default/resources/lab-network/test"},
		{"policies", "/orgs/default/policies"},
		{"policy-new", "/orgs/default/policies/new"},
		{"explain-yes", "/orgs/default/policies/explain?subject=client:laptop-1&resource=wiki"},
		{"explain-no", "/orgs/default/policies/explain?subject=client:laptop-4&resource=kubernetes"},
		{"groups", "/orgs/default/groups"},
		{"group", "/orgs/default/groups/engineers"},
		{"sessions", "/orgs/default/sessions"},
		{"topology", "/orgs/default/topology"},
		{"history", "/orgs/default/history"},
		{"certificates", "/orgs/default/certificates"},
		{"rotation", "/orgs/default/certificates/gateway/rotation"},
		{"audit", "/orgs/default/audit"},
		{"audit-search", "/orgs/default/audit?q=laptop-1&action=node."},
		{"webhooks", "/orgs/default/webhooks"},
		{"flows", "/orgs/default/flows"},
		{"flows-search", "/orgs/default/flows?client=laptop-1&since=24h"},
		{"sso", "/orgs/default/sso"},
		{"api-tokens", "/orgs/default/api-tokens"},
		{"users", "/orgs/default/users"},
		{"user-new", "/orgs/default/users/new"},
		{"service-accounts", "/orgs/default/service-accounts"},
		{"organization", "/orgs/default/organization"},
		{"licence", "/orgs/default/licence"},
		{"my-devices", "/orgs/default/my"},
		{"account", "/account"},
		{"device", "/device"},
		{"organization-new", "/orgs/new"},
		{"not-found", "/orgs/default/networking/relays/nowhere"},
	} {
		b.open(g.path)
		if g.name == "history" {
			b.until(step, "throughput is drawn, and a session that moved", `document.querySelector("main svg.picture .stroke") && document.querySelector("main svg .markdot")`)
		}
		b.pose(g.name)
	}
	// The keyboard, and the switch of the theme.
	b.open("/orgs/default/networking/relays")
	press := func(key string) {
		eval[bool](b, `document.body.dispatchEvent(new KeyboardEvent("keydown", { key: `+quote(key)+`, bubbles: true }))`)
	}
	press("/")
	b.until(step, "/ goes to the search", `document.activeElement.type === "search"`)
	eval[any](b, `document.activeElement.blur()`)
	press("g")
	press("t")
	b.until(step, "g t goes to the topology", `location.pathname.endsWith("/topology") && document.readyState === "complete"`)
	press("?")
	b.until(step, "? shows the shortcuts", `document.getElementById("shortcuts").open && document.getElementById("shortcuts").checkVisibility()`)
	for _, theme := range []string{"dark", "light", ""} {
		eval[bool](b, `window.here = true`)
		eval[any](b, `document.querySelector("form[action='/theme'] button").click()`)
		b.until(step, "the theme "+theme, `window.here === undefined && document.readyState === "complete" && (document.documentElement.dataset.theme || "") === `+quote(theme))
	}
	// What only a form shows.
	b.open("/orgs/default/networking/relays/syd-1")
	b.turn("Show deploy command")
	b.sees(step, "Waiting for syd-1 to connect")
	b.pose("deploy")
	b.click("Copy")
	b.sees(step, "Copied")
	b.open("/orgs/default/networking/relays/new")
	b.fill("Name", "fra-1")
	b.fill("Host address", "10.0.0.999")
	b.turn("Create Relay")
	b.sees(step, "neither an IP address nor a DNS name")
	b.pose("relay-new-refused")
	b.open("/orgs/default/users/new")
	b.fill("Login", "grace@example.com")
	b.turn("Invite")
	b.sees(step, "Send it to them by a way that you trust")
	b.pose("user-invited")
	b.open("/orgs/default/service-accounts")
	b.fill("Name", "terraform")
	b.turn("Create")
	b.fill("Name", "pipeline")
	b.turn("Create a token")
	b.sees(step, "Copy it now")
	b.pose("service-account")
	b.as(phone)
	b.open("/orgs/default/overview#menu")
	b.glanceAs("menu", phone)
	b.as(light)
	b.open("/orgs/default/overview")
	eval[any](b, `document.querySelector("form[action='/logout']").submit()`)
	b.sees(step, "You are logged out")
	b.pose("login")
}

// pose looks at a page in every way.
func (b *browser) pose(name string) {
	b.t.Helper()
	for _, l := range []look{light, dark, phone} {
		b.as(l)
		b.glanceAs(name, l)
	}
	b.as(light)
}

// glance looks at a page once.
func (b *browser) glance(name string) {
	b.t.Helper()
	b.glanceAs(name, light)
}

func (b *browser) glanceAs(name string, l look) {
	b.t.Helper()
	b.audit(name + " " + l.name)
	b.shoot(name + "-" + l.name)
}
