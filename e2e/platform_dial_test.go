package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/lab"
	"sallyway/relay/wire"
)

// resourceTest runs `sallyway resource test` and returns what it found, its exit code and what it wrote on standard error.
func resourceTest(t *testing.T, l *lab.Lab, name string, args ...string) (control.ResourceTest, lab.Result) {
	t.Helper()
	r, err := l.Sallyway(within(t, 30*time.Second), append([]string{"resource", "test", name, "--json"}, args...)...)
	if err != nil && r.Code == 0 {
		t.Fatal(err)
	}
	var doc control.ResourceTest
	if r.Stdout != "" {
		check(t, json.Unmarshal([]byte(r.Stdout), &doc))
	}
	return doc, r
}

// TestPlatformReachesAResource: the platform opens sessions to resources itself, over whatever rung leads there, where a policy lets it and the
// organization wants it; what does not work is told apart.
func TestPlatformReachesAResource(t *testing.T) {
	l := newLab(t, lab.Config{})
	s, err := l.Build(within(t, 2*time.Minute), lab.SiteConfig{NoBranch: true, NoClient: true, PlatformArgs: []string{"--probe-relays", "private"}}, nil)
	check(t, err)
	servePrivate(t, s, "platform")
	for _, relay := range []string{s.RelayA.Name, s.RelayB.Name} { // before, the gateway is not connected, and the answer says so
		must(s.GatewayA.Log.Wait(within(t, 10*time.Second), 0, `leg up.* relay=`+relay+` `))(t)
	}
	admin := func(args ...string) { t.Helper(); must(l.Sallyway(within(t, 20*time.Second), args...))(t) }
	must(s.Private.Web(at(lab.DBAddr, webPort), page))(t)
	admin("resource", "create", "shut", "--gateway", lab.Office, "--address", lab.WebAddr.String(), "--tcp", fmt.Sprint(lab.ClosedPort))
	admin("policy", "allow", "--from", "platform", "--resource", "shut")

	reached := func(step, rung string) {
		t.Helper()
		doc, r := resourceTest(t, l, "web")
		if !doc.OK || r.Code != 0 || len(doc.Gateways) != 1 || !strings.HasSuffix(doc.Gateways[0].Path, " "+rung) {
			t.Fatalf("%s: exit code %d, %s\n%s", step, r.Code, r.Stdout, r.Stderr)
		}
		var names []string
		for _, h := range doc.Gateways[0].Hops {
			names = append(names, h.Name)
			if h.State == control.HopFailed || (h.Millis <= 0 && h.Name != control.StepResolve) {
				t.Errorf("%s: hop %+v", step, h)
			}
		}
		for _, want := range []string{control.StepRelay, control.StepGateway, control.StepResource} {
			if !slices.Contains(names, want) {
				t.Errorf("%s: hops %v lack %s", step, names, want)
			}
		}
		t.Logf("%s: %s in %.0f ms", step, doc.Gateways[0].Path, doc.Millis)
	}
	refused := func(step, name, verdict, remedy string) {
		t.Helper()
		doc, r := resourceTest(t, l, name)
		if doc.OK || r.Code != 1 || !strings.Contains(doc.Verdict, verdict) || !strings.Contains(doc.Remedy, remedy) {
			t.Errorf("%s: exit code %d, verdict %q (want %q), remedy %q (want %q)\n%s", step, r.Code, doc.Verdict, verdict, doc.Remedy, remedy, r.Stderr)
		}
	}
	reached("everything passes", "udp")
	refused("nothing listens", "shut", "refuses connections", "resource update shut")
	refused("no policy", "vault", `rule "default deny"`, "sallyway policy allow --from platform --resource vault")

	// A webhook to a private address takes the same way, and needs the same policy.
	hook := "http://" + at(lab.WebAddr, webPort) + "/sum"
	admin("webhook", "create", "hook", "--url", hook, "--events", "organization.delete", "--through-gateways")
	admin("webhook", "test", "hook")
	admin("policy", "disable", "platform-web")
	if r, err := l.Sallyway(within(t, 30*time.Second), "webhook", "test", "hook"); err == nil || !strings.Contains(r.Stderr, "policy") {
		t.Errorf("a webhook without a policy: %v\n%s%s", err, r.Stdout, r.Stderr)
	}
	admin("policy", "enable", "platform-web")

	check(t, l.BlockUDPOf(l.Platform))
	reached("UDP is blocked at the platform", "tls")
	check(t, l.BlockUDPOf())
	check(t, l.BlockPort(wire.Port, l.Platform))
	reached("5349 is blocked at the platform", "tls-8443")
	check(t, l.BlockPort(wire.Port))

	admin("organization", "update", "default", "--platform-dial", "off")
	refused("switched off", "web", "does not let the platform dial its gateways", "--platform-dial on")
	admin("organization", "update", "default", "--platform-dial", "on")
	reached("switched on again", "udp")
	admin("policy", "delete", "platform-web")
	refused("the policy is deleted", "web", `rule "default deny"`, "policy allow --from platform --resource web")
	admin("policy", "allow", "--from", "platform", "--resource", "web")

	check(t, s.GatewayA.Stop())
	refused("the gateway is away", "web", "is not connected to", "gatewayd status")
	s.RelayA.Kill()
	s.RelayB.Kill()
	refused("the relays are away", "web", "the platform does not reach relay", "TCP 5349")

	audit := must(l.Sallyway(within(t, 20*time.Second), "audit", "tail", "-n", "200", "--json"))(t)
	for _, want := range []string{`"resource.test"`, `"certificate.revoke"`, `"certificate.issue"`} {
		if !strings.Contains(audit.Stdout, want) {
			t.Errorf("the audit lacks %s", want)
		}
	}
}
