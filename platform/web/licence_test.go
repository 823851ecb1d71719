package web

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"sallyway/internal/entitlement"
	"sallyway/internal/identity"
	"sallyway/platform/people"
	"sallyway/platform/registry"
)

// TestLicencePage installs a licence by the form, shows use against limits, tells of the end on every page, and lets only who looks after the platform
// remove it.
func TestLicencePage(t *testing.T) {
	s := newSite(t)
	owner := s.owner()
	ada := s.browser().logIn("ada")
	s.furnish(registry.DefaultOrg)
	s.person(owner, "adam", registry.DefaultOrg, people.Admin)
	const path = "/orgs/default/licence"
	if a := ada.get(path); !strings.Contains(a.body, "trusts no issuer") || strings.Contains(a.body, `<textarea id="licence"`) {
		t.Error("a platform that trusts nobody offers to install a licence")
	}
	key, err := entitlement.NewKey()
	must(t, err)
	s.reg.LicenceTrust = entitlement.Trust{key.Public()}
	one, now := int64(1), time.Now()
	jws, err := key.Sign(&entitlement.Entitlement{
		ID: "e-1", Serial: 1, Issuer: "i", Customer: "<b>acme</b>", Organization: "default", Issued: now, NotBefore: now, Expires: now.Add(10 * 24 * time.Hour),
		Limits: entitlement.Limits{Gateways: &one}, Contact: "sales@example.com",
	})
	must(t, err)
	token := tokenIn(ada.get(path))
	if a := ada.post(path, token, "licence", "x"+jws); a.status != http.StatusUnprocessableEntity || !strings.Contains(a.body, "licence") {
		t.Errorf("a forged one: %d", a.status)
	}
	a := ada.post(path, token, "licence", jws)
	for _, want := range []string{"1 of 1", "Full", "Ends soon", "10 days left", "&lt;b&gt;acme", "sales@example.com", "this page", "usebar full"} {
		if !strings.Contains(a.body, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	if a := ada.get("/orgs/default/overview"); !strings.Contains(a.body, "the licence ends on") {
		t.Error("the overview does not tell of the end")
	}
	if a := ada.post("/orgs/default/networking/gateways/new", token, "name", "second"); a.status != http.StatusForbidden || !strings.Contains(a.body, "its licence allows 1") {
		t.Errorf("a second gateway: %d", a.status)
	}
	adam := s.browser().logIn("adam")
	page := adam.get(path)
	if strings.Contains(page.body, "Remove the licence") {
		t.Error("an organization's admin is offered to remove the licence")
	}
	if a := adam.post(path+"/do/remove", tokenIn(page)); a.status != http.StatusForbidden {
		t.Errorf("an organization's admin removes the licence: %d", a.status)
	}
	if a := ada.post(path+"/do/remove", token); a.status != http.StatusOK || !strings.Contains(a.body, "No licence") {
		t.Errorf("removal: %d", a.status)
	}
	if _, err := s.reg.Node(t.Context(), registry.DefaultOrg, identity.Gateway, "office"); err != nil {
		t.Error(err)
	}
}
