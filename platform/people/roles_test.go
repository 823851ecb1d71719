package people

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

func TestScopes(t *testing.T) {
	for _, tc := range []struct {
		scopes       string
		object, verb string
		may          bool
	}{
		{"*", "relays", Write, true},
		{"*:read", "relays", Read, true},
		{"*:read", "relays", Write, false},
		{"relays:read", "relays", Read, true},
		{"relays:read", "gateways", Read, false},
		{"relays:*", "relays", Write, true},
		{"* -people:write", "people", Write, false},
		{"* -people:write", "people", Read, true},
		{"-people:write *", "people", Write, false},
		{"", "relays", Read, false},
	} {
		if got := scopesOf(strings.Fields(tc.scopes)).May(tc.object, tc.verb); got != tc.may {
			t.Errorf("%q %s %s: %v", tc.scopes, tc.verb, tc.object, got)
		}
	}
	for _, tc := range []struct {
		have, want string
		ok         bool
	}{
		{"*", "* relays:read", true},
		{"*", "* -people:write", true},
		{"* -people:write", "*", false},
		{"* -people:write", "* -people:write", true},
		{"* -people:write", "people:read", true},
		{"* -people:write", "people:*", false},
		{"* -people:write", "*:write", false},
		{"* -people:write", "*:read", true},
		{"*:read", "relays:read", true},
		{"*:read", "relays:*", false},
		{"relays:read", "*:read", false},
		{"", "relays:read", false},
	} {
		if got := scopesOf(strings.Fields(tc.have)).Contains(scopesOf(strings.Fields(tc.want))); got != tc.ok {
			t.Errorf("%q contains %q: %v", tc.have, tc.want, got)
		}
	}
	// A set that is contained allows nothing that its container does not.
	all := []string{"*", "*:read", "*:write", "relays:read", "relays:*", "people:write", "people:read", "-people:write", "-relays:read", "-*:write"}
	for i := range 1 << len(all) {
		var have Scopes
		for j, s := range all {
			if i&(1<<j) != 0 {
				have = append(have, Scope(s))
			}
		}
		for _, want := range []Scopes{{"*"}, {"*", "-people:write"}, {"*:read"}, {"relays:*"}, {"people:write", "relays:read"}, {"*", "-relays:read"}} {
			if !have.Contains(want) {
				continue
			}
			for _, object := range []string{"relays", "people", "audit"} {
				for _, verb := range []string{Read, Write} {
					if want.May(object, verb) && !have.May(object, verb) {
						t.Fatalf("%v contains %v, which may %s %s", have, want, verb, object)
					}
				}
			}
		}
	}
	for _, bad := range []string{"", "relays", "relays:delete", "-relays:read", "Relays:read", "relays:read:x", "* *", "a:b"} {
		if _, err := ParseScopes([]string{bad}); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

// TestNobodyRaisesThemselves tries what each role must not hand out or touch.
func TestNobodyRaisesThemselves(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	owner := l.person("acme", "owner", Owner)
	admin := l.person("acme", "admin", Admin)
	auditor := l.person("acme", "auditor", Auditor)
	member := l.person("acme", "member", Member)
	rival := l.person("rival", "rival", Owner)
	platform := l.person(Platform, "platform", Owner)
	str := func(s string) *string { return &s }
	for _, by := range []*Principal{admin, auditor, member, rival} {
		for _, role := range []string{"owner", "admin", "member"} {
			if _, err := l.svc.UpdatePerson(ctx, by, "acme", by.Name, control.UpdatePerson{Role: str(role)}); err == nil {
				t.Errorf("%s made itself %s", by.Name, role)
			}
			if _, err := l.svc.CreatePerson(ctx, by, "acme", control.CreatePerson{Login: "x-" + by.Name, Role: role}); err == nil {
				t.Errorf("%s let somebody in", by.Name)
			}
		}
		if err := l.svc.DeletePerson(ctx, by, "acme", "owner"); err == nil {
			t.Errorf("%s deleted the owner", by.Name)
		}
	}
	// An owner of an organization has no say over the platform, other organizations, or an account that is at home elsewhere.
	for _, org := range []string{Platform, "rival"} {
		if _, err := l.svc.CreatePerson(ctx, owner, org, control.CreatePerson{Login: "mine", Role: "member"}); err == nil {
			t.Errorf("an owner of acme let somebody into %s", org)
		}
	}
	_, err := l.svc.CreatePerson(ctx, owner, "acme", control.CreatePerson{Login: "rival", Role: "member"})
	code(t, err, control.CodeConflict)
	_, err = l.svc.Person(ctx, "acme", "rival")
	code(t, err, control.CodeNotFound)
	_, err = l.svc.CreatePerson(ctx, platform, "acme", control.CreatePerson{Login: "rival", Role: "member"})
	must(t, err)
	yes := true
	for _, req := range []control.UpdatePerson{{Disabled: &yes}, {Name: str("x")}, {Email: str("a@b.example")}} {
		_, err := l.svc.UpdatePerson(ctx, owner, "acme", "rival", req)
		code(t, err, CodeOtherAccount)
	}
	_, err = l.svc.Invite(ctx, owner, "acme", "rival")
	code(t, err, CodeOtherAccount)
	_, err = l.svc.ForgetFactor(ctx, owner, "acme", "rival")
	code(t, err, CodeOtherAccount)
	must(t, l.svc.DeletePerson(ctx, owner, "acme", "rival")) // out of acme, and still in rival
	if l.role("rival", "rival") != "owner" {
		t.Error("an account was deleted by a guest's organization")
	}
	// A person of the platform who is at home in acme is not acme's to take over.
	_, err = l.svc.CreatePerson(ctx, root, Platform, control.CreatePerson{Login: "admin", Role: "owner"})
	must(t, err)
	_, err = l.svc.Invite(ctx, owner, "acme", "admin")
	code(t, err, control.CodeForbidden)
	_, err = l.svc.UpdatePerson(ctx, owner, "acme", "admin", control.UpdatePerson{Disabled: &yes})
	code(t, err, control.CodeForbidden)
}

// TestLastOwner has two owners take each other's role at once, in every way: one stays.
func TestLastOwner(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	member, yes := "member", true
	ways := map[string]func(by *Principal, org, name string) error{
		"demote": func(by *Principal, org, name string) error {
			_, err := l.svc.UpdatePerson(ctx, by, org, name, control.UpdatePerson{Role: &member})
			return err
		},
		"disable": func(by *Principal, org, name string) error {
			_, err := l.svc.UpdatePerson(ctx, by, org, name, control.UpdatePerson{Disabled: &yes})
			return err
		},
		"delete": func(by *Principal, org, name string) error { return l.svc.DeletePerson(ctx, by, org, name) },
	}
	for way, do := range ways {
		org := "org-" + way
		_, err := l.reg.CreateOrg(ctx, control.CreateOrganization{Name: org})
		must(t, err)
		a, b := l.person(org, way+"-a", Owner), l.person(org, way+"-b", Owner)
		errs := atOnce(2, func(i int) error {
			if i == 0 {
				return do(a, org, b.Name)
			}
			return do(b, org, a.Name)
		})
		if n := succeeded(errs); n != 1 {
			t.Errorf("%s: %d succeeded: %v", way, n, errs)
		}
		list, err := l.svc.People(ctx, org, store.Page{})
		must(t, err)
		owners := slices.DeleteFunc(list.Items, func(p control.PersonRecord) bool { return p.Role != "owner" || p.Disabled })
		if len(owners) != 1 {
			t.Fatalf("%s: owners %+v", way, owners)
		}
		// Nor can the one that is left go, by own hand or by the platform's.
		last := l.session(owners[0].Login)
		for _, by := range []*Principal{last, root} {
			if err := do(by, org, last.Name); registry.Code(err) != control.CodeConflict {
				t.Errorf("%s of the last owner by %s: %v", way, by.Name, err)
			}
		}
	}
	// Many changes at once leave exactly one role, and the audit tells of each.
	l.person("acme", "the-owner", Owner)
	l.person("acme", "target", Member)
	roles := []string{"admin", "auditor", "member", "owner"}
	errs := atOnce(16, func(i int) error {
		_, err := l.svc.UpdatePerson(ctx, root, "acme", "target", control.UpdatePerson{Role: &roles[i%len(roles)]})
		return err
	})
	if n := succeeded(errs); n != 16 {
		t.Fatalf("%v", errs)
	}
	es, err := l.reg.Audit(ctx, "acme", 0, 1000)
	must(t, err)
	lastRole := ""
	for _, e := range es {
		if r, ok := e.Detail["role"].(string); ok && e.Action == "person.update" {
			lastRole = r
		}
	}
	if got := l.role("acme", "target"); got != lastRole {
		t.Errorf("role %s, the audit's last is %s", got, lastRole)
	}
}

// TestDisabledPersonLosesAll: sessions, tokens, nodes, what waits for them.
func TestDisabledPersonLosesAll(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	l.person("acme", "owner", Owner)
	ada := l.person("acme", "ada", Member)
	bob := l.person("acme", "bob", Member)
	token, err := l.svc.CreateMyToken(ctx, ada, control.CreateAPIToken{Name: "x"})
	must(t, err)
	laptop, other := l.client(ada, "acme", "laptop"), l.client(bob, "acme", "bobs")
	device, err := l.svc.StartDevice(ctx, control.StartDevice{Client: "x"}, "192.0.2.1")
	must(t, err)
	must(t, l.svc.DecideDevice(ctx, ada, device.UserCode, true))
	dropped := ""
	l.reg.Dropped = func(id string) { dropped += id }

	yes, no := true, false
	_, err = l.svc.UpdatePerson(ctx, root, "acme", "ada", control.UpdatePerson{Disabled: &yes})
	must(t, err)
	_, err = l.svc.FromCookie(ctx, ada.Session.secret)
	code(t, err, CodeNoSession)
	_, err = l.svc.Authenticate(ctx, token.Token, "192.0.2.1")
	code(t, err, control.CodeTokenUnknown)
	_, err = l.svc.Take(ctx, control.TakeToken{Grant: control.GrantDevice, DeviceCode: device.DeviceCode}, "192.0.2.1")
	code(t, err, control.CodeDenied)
	if n := l.row(laptop.ID); n.Status != store.Revoked || dropped != laptop.ID {
		t.Errorf("the node is %s, dropped %q", n.Status, dropped)
	}
	if n := l.row(other.ID); n.Status != store.Active {
		t.Errorf("somebody else's node is %s", n.Status)
	}
	// A session object from before changes nothing any more.
	_, err = l.svc.CreateMyToken(ctx, ada, control.CreateAPIToken{Name: "y"})
	code(t, err, CodeNoSession)
	_, err = l.svc.CreateMyClient(ctx, ada, "acme", control.CreateNode{Name: "again"})
	code(t, err, CodeNoSession)
	// Enabled again, the person logs in and starts anew; the old key and token stay dead.
	_, err = l.svc.UpdatePerson(ctx, root, "acme", "ada", control.UpdatePerson{Disabled: &no})
	must(t, err)
	l.session("ada")
	_, err = l.svc.Authenticate(ctx, token.Token, "192.0.2.1")
	code(t, err, control.CodeTokenUnknown)
	if n := l.row(laptop.ID); n.Status != store.Revoked {
		t.Errorf("the node is %s", n.Status)
	}
}

func TestOwnClients(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	owner, ada, eve, rival := l.person("acme", "owner", Owner), l.person("acme", "ada", Member), l.person("acme", "eve", Member), l.person("rival", "rival", Owner)
	laptop := l.client(ada, "acme", "laptop")
	_, err := l.reg.CreateNode(ctx, "acme", identity.Client, control.CreateNode{Name: "kiosk"})
	must(t, err)
	for _, name := range []string{"laptop", laptop.ID, "kiosk"} {
		_, err := l.svc.ReissueMyClient(ctx, eve, "acme", name)
		code(t, err, control.CodeNotFound)
		code(t, l.svc.DeleteMyClient(ctx, eve, "acme", name), control.CodeNotFound)
		_, err = l.svc.ReissueMyClient(ctx, rival, "acme", name)
		code(t, err, control.CodeNotFound)
	}
	_, err = l.svc.CreateMyClient(ctx, rival, "acme", control.CreateNode{Name: "spy"})
	code(t, err, control.CodeNotFound)
	if _, err := l.svc.ReissueMyClient(ctx, ada, "acme", "laptop"); err != nil {
		t.Error(err)
	}
	own, err := l.svc.MyClients(ctx, ada, "acme")
	must(t, err)
	if len(own) != 1 || own[0].Name != "laptop" || own[0].Person != "ada" {
		t.Errorf("%+v", own)
	}

	// A policy for a person, or for a group with the person in it, is one for their clients.
	_, err = l.reg.CreateNode(ctx, "acme", identity.Gateway, control.CreateNode{Name: "gw"})
	must(t, err)
	for _, name := range []string{"db", "web"} {
		_, err = l.reg.CreateResource(ctx, "acme", control.CreateResource{Name: name, Gateways: []string{"gw"}, Address: "10.0.0.1", ICMP: true})
		must(t, err)
	}
	_, err = l.reg.CreatePolicy(ctx, "acme", control.CreatePolicy{Subject: "person:ada", Resource: "db"})
	must(t, err)
	members := []string{"person:ada", "client:kiosk"}
	g, err := l.reg.PutGroup(ctx, "acme", "staff", &members, true)
	must(t, err)
	if !slices.Equal(g.Members, []string{"client:kiosk", "person:ada"}) {
		t.Errorf("%v", g.Members)
	}
	_, err = l.reg.CreatePolicy(ctx, "acme", control.CreatePolicy{Subject: "group:staff", Resource: "web"})
	must(t, err)
	for _, name := range []string{"person:rival", "person:nobody"} {
		if _, err := l.reg.CreatePolicy(ctx, "acme", control.CreatePolicy{Subject: name, Resource: "db"}); err == nil {
			t.Errorf("a policy for %s", name)
		}
	}
	names := func(by *Principal) (out []string) {
		rs, err := l.svc.MyResources(ctx, by, "acme")
		must(t, err)
		for _, r := range rs {
			out = append(out, r.Name)
		}
		return out
	}
	if got := names(ada); !slices.Equal(got, []string{"db", "web"}) {
		t.Errorf("ada reaches %v", got)
	}
	if got := names(eve); len(got) != 0 {
		t.Errorf("eve reaches %v", got)
	}
	e, err := l.reg.Explain(ctx, "acme", control.ExplainRequest{Subject: "client:laptop", Resource: "db"})
	must(t, err)
	if !strings.Contains(e.Rule, "ada") {
		t.Errorf("%+v", e)
	}
	// Another client of the same person is in at once; when the person leaves, all is gone.
	l.client(ada, "acme", "phone")
	if got := names(ada); len(got) != 2 {
		t.Errorf("%v", got)
	}
	must(t, l.svc.DeletePerson(ctx, owner, "acme", "ada"))
	if n := l.row(laptop.ID); n.Status != store.Revoked {
		t.Errorf("the node is %s", n.Status)
	}
	ps, err := l.reg.Policies(ctx, "acme", store.Page{})
	must(t, err)
	if len(ps.Items) != 1 || ps.Items[0].Subject != "group:staff" {
		t.Errorf("%+v", ps.Items)
	}
	if g, err := l.reg.Group(ctx, "acme", "staff"); err != nil || !slices.Equal(g.Members, []string{"client:kiosk"}) {
		t.Errorf("%+v %v", g, err)
	}
	// So many and no more, also at once.
	errs := atOnce(maxClients+5, func(i int) error {
		_, err := l.svc.CreateMyClient(ctx, eve, "acme", control.CreateNode{Name: fmt.Sprintf("c%d", i)})
		return err
	})
	if n := succeeded(errs); n != maxClients {
		t.Errorf("%d clients", n)
	}
}

func TestTokensAreNarrow(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	owner, admin := l.person("acme", "owner", Owner), l.person("acme", "admin", Admin)
	made, err := l.svc.CreateMyToken(ctx, owner, control.CreateAPIToken{Name: "narrow", Scopes: []string{"relays:read", "self:write"}, Life: 3600})
	must(t, err)
	p, err := l.svc.Authenticate(ctx, made.Token, "192.0.2.9")
	must(t, err)
	if !p.May("acme", "relays", Read) || p.May("acme", "relays", Write) || p.May("acme", "people", Read) || p.May("rival", "relays", Read) {
		t.Errorf("%+v", p)
	}
	for _, scopes := range [][]string{nil, {"*"}, {"relays:*"}} {
		_, err := l.svc.CreateMyToken(ctx, p, control.CreateAPIToken{Name: "more", Scopes: scopes})
		code(t, err, control.CodeForbidden)
	}
	list, err := l.svc.MyTokens(ctx, owner)
	must(t, err)
	if len(list) != 1 || list[0].LastUsed == nil || list[0].Source != "192.0.2.9" {
		t.Errorf("%+v", list)
	}
	// A token follows its person: less of a role is less of a token.
	must(t, l.svc.RevokeMyToken(ctx, owner, made.ID))
	_, err = l.svc.Authenticate(ctx, made.Token, "192.0.2.9")
	code(t, err, control.CodeTokenUnknown)
	made, err = l.svc.CreateMyToken(ctx, admin, control.CreateAPIToken{Name: "x", Life: 60})
	must(t, err)
	auditor := "auditor"
	_, err = l.svc.UpdatePerson(ctx, owner, "acme", "admin", control.UpdatePerson{Role: &auditor})
	must(t, err)
	p, err = l.svc.Authenticate(ctx, made.Token, "192.0.2.9")
	must(t, err)
	if p.May("acme", "relays", Write) || !p.May("acme", "audit", Read) {
		t.Errorf("%+v", p)
	}
	l.advance(time.Hour)
	_, err = l.svc.Authenticate(ctx, made.Token, "192.0.2.9")
	code(t, err, control.CodeTokenExpired)
	code(t, l.svc.RevokeMyToken(ctx, owner, made.ID), control.CodeNotFound) // somebody else's
}

func TestServiceAccounts(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	l.person("acme", "owner", Owner)
	admin, auditor := l.person("acme", "admin", Admin), l.person("acme", "auditor", Auditor)
	for _, scopes := range [][]string{{"*"}, {"people:write"}, {"people:*"}, {"relays:write", "*:write"}} {
		_, err := l.svc.CreateServiceAccount(ctx, admin, "acme", control.CreateServiceAccount{Name: "more", Scopes: scopes})
		code(t, err, control.CodeForbidden)
	}
	_, err := l.svc.CreateServiceAccount(ctx, auditor, "acme", control.CreateServiceAccount{Name: "reader", Scopes: []string{"*:read"}})
	code(t, err, CodeReadOnly)
	_, err = l.svc.CreateServiceAccount(ctx, admin, "acme", control.CreateServiceAccount{Name: "none"})
	code(t, err, control.CodeInvalid)
	_, err = l.svc.CreateServiceAccount(ctx, admin, "acme", control.CreateServiceAccount{Name: "ci", Scopes: []string{"gateways:write", "gateways:read"}})
	must(t, err)
	// One with more rights than the caller's is not the caller's to use or change.
	_, err = l.svc.CreateServiceAccount(ctx, root, "acme", control.CreateServiceAccount{Name: "strong", Scopes: []string{"*"}})
	must(t, err)
	_, err = l.svc.CreateAccountToken(ctx, admin, "acme", "strong", control.CreateAPIToken{Name: "x", Scopes: []string{"relays:read"}})
	code(t, err, control.CodeForbidden)
	_, err = l.svc.UpdateServiceAccount(ctx, admin, "acme", "strong", control.UpdateServiceAccount{Scopes: &[]string{"relays:read"}})
	code(t, err, control.CodeForbidden)

	made, err := l.svc.CreateAccountToken(ctx, admin, "acme", "ci", control.CreateAPIToken{Name: "ci", Scopes: []string{"gateways:read", "relays:read"}})
	must(t, err)
	p, err := l.svc.Authenticate(ctx, made.Token, "192.0.2.1")
	must(t, err)
	if !p.May("acme", "gateways", Read) || p.May("acme", "gateways", Write) || p.May("acme", "relays", Read) || p.May("rival", "gateways", Read) || p.Actor != "service-account:acme/ci" {
		t.Errorf("%+v", p)
	}
	yes := true
	_, err = l.svc.UpdateServiceAccount(ctx, admin, "acme", "ci", control.UpdateServiceAccount{Disabled: &yes})
	must(t, err)
	_, err = l.svc.Authenticate(ctx, made.Token, "192.0.2.1")
	code(t, err, control.CodeTokenUnknown)
	no := false
	_, err = l.svc.UpdateServiceAccount(ctx, admin, "acme", "ci", control.UpdateServiceAccount{Disabled: &no})
	must(t, err)
	must(t, l.svc.RevokeAccountToken(ctx, admin, "acme", "ci", made.ID))
	_, err = l.svc.Authenticate(ctx, made.Token, "192.0.2.1")
	code(t, err, control.CodeTokenUnknown)
	must(t, l.svc.DeleteServiceAccount(ctx, admin, "acme", "ci"))

	// Tokens of their own: the words of old still work, and scopes narrow.
	for scope, may := range map[string][2]bool{"admin": {true, true}, "read-only": {true, false}, "relays:read": {true, false}, "gateways:write": {false, false}} {
		made, err := l.svc.CreateToken(ctx, root, "acme", control.CreateAPIToken{Name: "x", Scopes: []string{scope}})
		must(t, err)
		p, err := l.svc.Authenticate(ctx, made.Token, "192.0.2.1")
		must(t, err)
		if p.May("acme", "relays", Read) != may[0] || p.May("acme", "relays", Write) != may[1] || p.May("rival", "relays", Read) {
			t.Errorf("%s: %+v", scope, p)
		}
		must(t, l.svc.RevokeToken(ctx, root, "acme", made.ID))
		_, err = l.svc.Authenticate(ctx, made.Token, "192.0.2.1")
		code(t, err, control.CodeTokenUnknown)
	}
	_, err = l.svc.CreateToken(ctx, admin, "acme", control.CreateAPIToken{Name: "x", Scopes: []string{"*"}})
	code(t, err, control.CodeForbidden)
}
