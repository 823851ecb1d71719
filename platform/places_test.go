package platform

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
)

// choices asks why a gateway has its relays.
func (l *lab) choices(gateway string) (c control.RelayChoices) {
	l.t.Helper()
	l.api("GET", "/gateways/"+gateway+"/relays", nil, &c)
	return c
}

func recordOf(l *lab, path string) (r control.NodeRecord) {
	l.t.Helper()
	l.api("GET", "/"+path, nil, &r)
	return r
}

// texts is a list of a request, an empty one included: null would be no change.
func texts(s ...string) *[]string { s = append([]string{}, s...); return &s }

func text(s string) *string { return &s }

// TestWishes sets pins, exclusions, regions and failure domains over the API, and sees gateways and clients told accordingly.
func TestWishes(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t)) // relay-1 and relay-2, gw, laptop
	for name, places := range map[string]control.Places{
		"relay-3": {Region: "eu", FailureDomain: "rack-a"}, "relay-4": {Region: "eu", FailureDomain: "rack-a"}, "relay-5": {Region: "us", FailureDomain: "rack-b"},
	} {
		var made control.CreatedNode
		w.api("POST", "/relays", control.CreateNode{Name: name, Host: name + ".example", Places: places}, &made)
		w.fromToken(made.Token).join().beat(control.Heartbeat{})
	}
	relays := func() []string { return recordOf(w.lab, "gateways/gw").Relays }

	// At creation, and in the record.
	var made control.CreatedNode
	w.api("POST", "/gateways", control.CreateNode{Name: "berlin", Places: control.Places{Region: "eu", PinRelays: []string{"relay-4", "relay-3"}, ExcludeRelays: []string{"relay-1"}, PreferRelays: []string{"relay-5"}}}, &made)
	berlin := w.fromToken(made.Token).join()
	berlin.stream().wait("its two pinned relays", func(c *control.Config) bool {
		return len(c.Gateway.Relays) == 2 && c.Gateway.Relays[0].Name == "relay-4" && c.Gateway.Relays[1].Name == "relay-3"
	})
	rec := recordOf(w.lab, "gateways/berlin")
	if rec.Region != "eu" || !slices.Equal(rec.PinRelays, []string{"relay-4", "relay-3"}) || !slices.Equal(rec.ExcludeRelays, []string{"relay-1"}) || !slices.Equal(rec.PreferRelays, []string{"relay-5"}) {
		t.Errorf("%+v", rec.Places)
	}
	if r := recordOf(w.lab, "relays/relay-3"); r.Region != "eu" || r.FailureDomain != "rack-a" {
		t.Errorf("%+v", r.Places)
	}
	// Without the pins: two failure domains, not relay-1, a preferred one.
	w.api("PATCH", "/gateways/berlin", control.UpdateNode{UpdatePlaces: control.UpdatePlaces{PinRelays: texts("relay-3"), PreferRelays: texts()}}, nil)
	w.api("POST", "/relays/relay-4/drain", nil, nil)
	eventually(t, "berlin is on relay-3 and outside of its rack", func() bool {
		rs := recordOf(w.lab, "gateways/berlin").Relays
		return len(rs) == 2 && rs[0] == "relay-3" && (rs[1] == "relay-2" || rs[1] == "relay-5")
	})
	w.api("POST", "/relays/relay-4/enable", nil, nil)
	for _, c := range w.choices("berlin").Items {
		want := map[string]string{"relay-1": "excluded for this gateway", "relay-3": "pinned", "relay-4": "failure domain rack-a"}[c.Relay]
		if c.Why == "" || !strings.Contains(c.Why, want) {
			t.Errorf("%s: %q, want %q", c.Relay, c.Why, want)
		}
	}

	// A pin moves a gateway at once; the pinned relay's end is said, and the gateway goes on elsewhere.
	w.api("PATCH", "/gateways/gw", control.UpdateNode{UpdatePlaces: control.UpdatePlaces{PinRelays: texts("relay-5")}}, nil)
	eventually(t, "gw is on relay-5", func() bool { rs := relays(); return len(rs) == 2 && rs[0] == "relay-5" })
	w.api("DELETE", "/relays/relay-5", nil, nil)
	eventually(t, "gw leaves the deleted relay, and its reasons say so", func() bool {
		rec := recordOf(w.lab, "gateways/gw")
		return len(rec.Relays) == 2 && !slices.Contains(rec.Relays, "relay-5") && strings.Contains(strings.Join(rec.RelayReasons, " "), "relay-5 is pinned, but deleted")
	})
	if rec := recordOf(w.lab, "gateways/gw"); !slices.Equal(rec.PinRelays, []string{"relay-5"}) {
		t.Errorf("pins %v", rec.PinRelays)
	}
	w.api("PATCH", "/gateways/gw", control.UpdateNode{UpdatePlaces: control.UpdatePlaces{PinRelays: texts("relay-5", "relay-1")}}, nil) // what was named may stay

	// A client: the gateway's relays in its own order, without the excluded.
	w.api("PATCH", "/gateways/gw", control.UpdateNode{UpdatePlaces: control.UpdatePlaces{PinRelays: texts("relay-1", "relay-2")}}, nil)
	f := w.client.stream()
	names := func(c *control.Config) (out []string) {
		for _, g := range c.Dialling.Gateways {
			for _, r := range g.Relays {
				out = append(out, r.Name)
			}
		}
		return out
	}
	f.wait("the gateway's order", func(c *control.Config) bool { return slices.Equal(names(c), []string{"relay-1", "relay-2"}) })
	w.api("PATCH", "/clients/laptop", control.UpdateNode{UpdatePlaces: control.UpdatePlaces{PreferRelays: texts("relay-2")}}, nil)
	f.wait("its own order", func(c *control.Config) bool { return slices.Equal(names(c), []string{"relay-2", "relay-1"}) })
	w.api("PATCH", "/clients/laptop", control.UpdateNode{UpdatePlaces: control.UpdatePlaces{ExcludeRelays: texts("relay-2")}}, nil)
	f.wait("without the excluded", func(c *control.Config) bool { return slices.Equal(names(c), []string{"relay-1"}) })
	w.api("PATCH", "/clients/laptop", control.UpdateNode{UpdatePlaces: control.UpdatePlaces{ExcludeRelays: texts(), PreferRelays: texts(), Region: text("eu")}}, nil)
	w.api("PATCH", "/relays/relay-2", control.UpdateNode{UpdatePlaces: control.UpdatePlaces{Region: text("eu")}}, nil)
	f.wait("its region first", func(c *control.Config) bool { return slices.Equal(names(c), []string{"relay-2", "relay-1"}) })

	// What is wrong is refused with what would be right.
	for _, tc := range []struct {
		path string
		u    control.UpdatePlaces
		says string
	}{
		{"/gateways/gw", control.UpdatePlaces{PinRelays: texts("relay-9")}, "relay-1, relay-2, relay-3, relay-4"},
		{"/gateways/gw", control.UpdatePlaces{ExcludeRelays: texts("relay-1")}, "pinned and excluded"},
		{"/gateways/gw", control.UpdatePlaces{FailureDomain: text("x")}, "only relays"},
		{"/gateways/gw", control.UpdatePlaces{Region: text("EU West")}, "lower-case"},
		{"/relays/relay-1", control.UpdatePlaces{PinRelays: texts("relay-2")}, "gateways or clients"},
		{"/clients/laptop", control.UpdatePlaces{PreferRelays: texts("gw")}, "relay-1"},
	} {
		status, p := w.do(w.admin.Token, "PATCH", "/api/v1/orgs/default"+tc.path, control.UpdateNode{UpdatePlaces: tc.u}, nil)
		if status != 422 || !strings.Contains(p.Detail+p.Remedy, tc.says) {
			t.Errorf("%s %+v: %d %+v", tc.path, tc.u, status, p)
		}
	}
}

// TestEqualGateways: two gateways with equal round trips are active on different relays.
func TestEqualGateways(t *testing.T) {
	t.Parallel()
	l := start(t)
	rtts := make(map[string]time.Duration)
	for _, name := range []string{"relay-1", "relay-2"} {
		r := l.create(identity.Relay, name).join()
		r.beat(control.Heartbeat{})
		rtts[r.id.ID] = 12 * time.Millisecond
	}
	var active []string
	for _, name := range []string{"gw-1", "gw-2"} {
		g := l.create(identity.Gateway, name).join()
		g.beat(control.Heartbeat{RelayRTT: rtts})
		c := g.stream().wait("two relays", func(c *control.Config) bool { return len(c.Gateway.Relays) == 2 })
		active = append(active, c.Gateway.Relays[0].Name)
	}
	if active[0] == active[1] {
		t.Errorf("both gateways are active on %s", active[0])
	}
	for _, c := range l.choices("gw-1").Items {
		if c.Place == "" || c.Gateways != 2 || c.Active != 1 || c.RTT != 12*time.Millisecond || c.State != control.StateHealthy || c.Why == "" {
			t.Errorf("%+v", c)
		}
	}
}

// TestRegionsOfSharedRelays: an organization that allows a region uses shared relays of that one alone, is known to no other, and gets no credential there.
func TestRegionsOfSharedRelays(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Region = "eu" })
	shared := make(map[string]*node)
	feeds := make(map[string]*feed)
	for name, region := range map[string]string{"eu-1": "", "us-1": "us"} { // without a label: the deployment's
		var made control.CreatedNode
		if status, p := l.do(l.admin.Token, "POST", "/api/v1/shared/relays", control.CreateNode{Name: name, Host: name + ".example", Places: control.Places{Region: region}}, &made); status != 201 {
			t.Fatalf("%+v", p)
		}
		shared[name] = l.fromToken(made.Token).join()
		shared[name].beat(control.Heartbeat{})
		feeds[name] = shared[name].stream()
	}
	serves := func(want bool) func(*control.Config) bool {
		return func(c *control.Config) bool {
			return want == slices.ContainsFunc(c.Relay.Orgs, func(o control.RelayOrg) bool { return o.Org == "default" })
		}
	}
	g := l.create(identity.Gateway, "gw").join()
	l.create(identity.Client, "laptop").join()
	f := g.stream()
	f.wait("both relays", func(c *control.Config) bool { return len(c.Gateway.Relays) == 2 && len(c.Gateway.Probe) == 2 })
	feeds["us-1"].wait("that it serves the organization", serves(true))
	l.api("PATCH", "", control.UpdateOrganization{RelayRegions: texts("eu")}, nil)
	f.wait("the relay of its region alone", func(c *control.Config) bool {
		return len(c.Gateway.Relays) == 1 && c.Gateway.Relays[0].Name == "eu-1" && len(c.Gateway.Probe) == 0
	})
	feeds["us-1"].wait("that it serves the organization no more", serves(false))
	feeds["eu-1"].wait("that it serves the organization", serves(true))
	if status, p := l.do(l.admin.Token, "POST", "/api/v1/orgs/default/relays/us-1/credential", control.CreateTURNCredential{Client: "laptop"}, nil); status != 409 || !strings.Contains(p.Detail, "in eu only") {
		t.Errorf("a credential in another region: %d %+v", status, p)
	}
	eventually(t, "the relay of another region has no place, and it is said why", func() bool {
		return slices.ContainsFunc(l.choices("gw").Items, func(c control.RelayChoice) bool {
			return c.Relay == "us-1" && c.Place == "" && strings.Contains(c.Why, "allows shared relays in eu only")
		})
	})
	if status, p := l.do(l.admin.Token, "PATCH", "/api/v1/orgs/default", control.UpdateOrganization{RelayRegions: texts("ue")}, nil); status != 422 || !strings.Contains(p.Remedy, "eu, us") {
		t.Errorf("a mistyped region: %d %+v", status, p)
	}
	var o control.Organization
	l.api("PATCH", "", control.UpdateOrganization{RelayRegions: texts()}, &o)
	if o.Region != "eu" || len(o.RelayRegions) != 0 {
		t.Errorf("%+v", o)
	}
	f.wait("both relays again", func(c *control.Config) bool { return len(c.Gateway.Relays) == 2 })
}

// TestRegionOfADeployment: a database keeps the region of its first start, and a backup of another region is taken over only where one says so.
func TestRegionOfADeployment(t *testing.T) {
	t.Parallel()
	eu := start(t, func(c *Config) { c.Region = "eu" })
	var o control.Organization
	eu.api("GET", "", nil, &o)
	st, err := eu.srv.Status(t.Context())
	must(t, err)
	if o.Region != "eu" || st.Region != "eu" {
		t.Errorf("organization of %q, platform of %q", o.Region, st.Region)
	}
	if status, p := eu.do(eu.admin.Token, "POST", "/api/v1/orgs", control.CreateOrganization{Name: "later"}, &o); status != 201 || o.Region != "eu" {
		t.Errorf("%d %+v %+v", status, p, o)
	}
	home := Home{Data: eu.cfg.Data}
	backup := filepath.Join(t.TempDir(), "backup.db")
	must(t, home.Backup(t.Context(), backup))

	cfg := eu.cfg
	cfg.Data, cfg.Listen = t.TempDir(), "127.0.0.1:0"
	cfg.Region, cfg.Metrics = "us", nil
	us, err := Open(t.Context(), cfg)
	must(t, err)
	must(t, us.Close())
	cfg.Region = "eu"
	if _, err := Open(t.Context(), cfg); !errors.Is(err, registry.ErrOtherRegion) || !strings.Contains(err.Error(), "eu") || !strings.Contains(err.Error(), "us") {
		t.Errorf("another region at a later start: %v", err)
	}
	other := Home{Data: cfg.Data, MasterKey: filepath.Join(eu.cfg.Data, masterFile)}
	if _, err := other.Restore(t.Context(), backup); !errors.Is(err, registry.ErrOtherRegion) || !strings.Contains(err.Error(), "the backup is of eu, and this deployment is us") {
		t.Errorf("a backup of another region: %v", err)
	}
	if _, err := other.RestoreIn(t.Context(), backup, RestoreRegion{Other: true}); err != nil {
		t.Fatal(err)
	}
	db, reg, err := other.existing(t.Context())
	must(t, err)
	got, err := reg.Org(t.Context(), "later")
	must(t, err)
	must(t, db.Close())
	if got.Region != "us" {
		t.Errorf("taken over into %q", got.Region)
	}
	fresh := Home{Data: t.TempDir(), MasterKey: other.MasterKey}
	if _, err := fresh.RestoreIn(t.Context(), backup, RestoreRegion{Region: "ap"}); !errors.Is(err, registry.ErrOtherRegion) {
		t.Errorf("into a new deployment of another region: %v", err)
	}
	if _, err := fresh.Restore(t.Context(), backup); err != nil {
		t.Errorf("into a new deployment: %v", err)
	}
}
