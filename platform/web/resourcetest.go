package web

import (
	"bytes"
	"context"
	"net/http"
	"net/url"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/policy"
	"sallyway/platform/people"
)

// testStream is the header by which the script asks for a test's progress instead of a page; frames end with a record separator.
const (
	testStream = "X-Sallyway-Stream"
	frameEnd   = "\x1e"
)

// Tester opens sessions to resources.
type Tester interface {
	Test(ctx context.Context, org, resource string, req control.TestResource, progress func(*control.ResourceTest)) (*control.ResourceTest, error)
}

func (s *Server) testRoutes(mux *http.ServeMux) {
	s.org(mux, "GET", "/resources/{name}/test", "resources", people.Write, (*request).newTest)
	s.org(mux, "POST", "/resources/{name}/test", "resources", people.Write, (*request).testResource)
	s.org(mux, "POST", "/organization/platform-dial", "organizations", people.Write, (*request).switchPlatformDial)
}

// testView is a test as its template shows it.
type testView struct {
	*control.ResourceTest
	Running bool
	// Allow is the page that makes a policy for the platform, where that is what lacks and the reader may.
	Allow string
	// Switch is the page where the organization switches the platform on, where that is what lacks.
	Switch string
}

// hopView is how a hop looks.
type hopView struct {
	control.TestHop
	Title, Icon, Class, Word string
}

var hopTitles = map[string]string{
	control.StepResolve: "Name of the relay", control.StepBinding: "To the relay and back", control.StepRelay: "Relay lets the platform in",
	control.StepRendezvous: "Relay leads to the gateway", control.StepGateway: "Session with the gateway", control.StepResource: "Connection to the resource",
	control.StepFirstByte: "First byte of the resource",
}

var hopLooks = map[control.HopState]hopView{
	control.HopOK:      {Icon: "good", Class: "good", Word: "done"},
	control.HopFailed:  {Icon: "bad", Class: "bad", Word: "failed"},
	control.HopRunning: {Icon: "wait", Class: "idle", Word: "under way"},
	control.HopSkipped: {Icon: "info", Class: "idle", Word: "nothing came"},
}

// hop says how a hop looks.
func hop(h control.TestHop) hopView {
	v := hopLooks[h.State]
	v.TestHop, v.Title = h, hopTitles[h.Name]
	return v
}

func (q *request) testViewOf(t *control.ResourceTest, running bool) testView {
	v := testView{ResourceTest: t, Running: running}
	switch {
	case !t.Refused:
	case strings.Contains(t.Remedy, "--platform-dial"):
		v.Switch = q.url("organization")
	case strings.Contains(t.Remedy, "policy allow") && q.who.May(q.org, "policies", people.Write):
		v.Allow = q.url("policies", "new") + "?" + url.Values{"subject": {"platform"}, "resource": {t.Resource}}.Encode()
	}
	return v
}

// newTest asks what to test.
func (q *request) newTest() error {
	return q.testPage(http.StatusOK, newForm("host", q.value("host"), "port", q.value("port"), "gateway", q.value("gateway")), nil)
}

func (q *request) testPage(status int, f *form, t *control.ResourceTest) error {
	r, err := q.s.reg.Resource(q.ctx, q.org, q.r.PathValue("name"))
	if err != nil {
		return err
	}
	data := struct {
		Form   *form
		R      resourceRow
		URL    string
		Many   bool // it has several hosts: one is to be named
		Result *testView
	}{f, rowOf(*r), q.url("resources", url.PathEscape(r.Name)), manyHosts(r), nil}
	if t != nil {
		v := q.testViewOf(t, false)
		data.Result = &v
	}
	return q.render(status, "resource-test", page{
		Title: "Test " + r.Name, Nav: "resources", Crumb: []crumb{{"Resources", q.url("resources")}, {r.Name, data.URL}}, Data: data,
	})
}

// manyHosts reports whether a resource is several hosts, so that a test needs one to be named.
func manyHosts(r *control.ResourceRecord) bool {
	p, isAddr := r.Prefix()
	return isAddr && !p.IsSingleIP() || strings.HasPrefix(r.Address, "*.")
}

// testResource has the platform reach a resource: as a page when it is done, or with its progress, where the script asks for that.
func (q *request) testResource() error {
	req := control.TestResource{Gateway: q.value("gateway"), Host: q.value("host")}
	if s := q.value("port"); s != "" {
		ports, err := policy.ParsePorts(s)
		if err != nil || len(ports) != 1 || ports[0].First != ports[0].Last {
			return q.testPage(http.StatusUnprocessableEntity, q.again(&control.Problem{
				Detail: "the port is none", Errors: []control.ProblemPart{{Location: "body.port", Message: "one TCP port, such as 443"}},
			}), nil)
		}
		req.Port = ports[0].First
	}
	if q.r.Header.Get(testStream) != "" {
		return q.streamTest(req)
	}
	t, err := q.s.cfg.Dialler.Test(q.ctx, q.org, q.r.PathValue("name"), req, nil)
	if p := refusal(err); p != nil {
		return q.testPage(p.Status, q.again(p), nil)
	}
	if err != nil {
		return err
	}
	return q.testPage(http.StatusOK, newForm("host", q.value("host"), "port", q.value("port"), "gateway", q.value("gateway")), t)
}

// streamTest sends the result's part of the page each time that more is known.
func (q *request) streamTest(req control.TestResource) error {
	rc := http.NewResponseController(q.w)
	h := q.w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Accel-Buffering", "no")
	frame := func(name string, data any) {
		var b bytes.Buffer
		if err := q.s.pages["resource-test"].ExecuteTemplate(&b, name, data); err != nil {
			q.s.log.Error("page failed", "page", name, "error", err)
			return
		}
		b.WriteString(frameEnd)
		_ = rc.SetWriteDeadline(time.Now().Add(liveWrite)) // as below
		_, _ = q.w.Write(b.Bytes())                        // the reader has gone: the test's context ends, too
		_ = rc.Flush()                                     // as above
	}
	t, err := q.s.cfg.Dialler.Test(q.ctx, q.org, q.r.PathValue("name"), req, func(t *control.ResourceTest) { frame("test-result", q.testViewOf(t, true)) })
	switch p := refusal(err); {
	case p != nil:
		frame("problem", p)
	case err != nil:
		q.s.log.Error("test failed", "error", err)
		frame("problem", &control.Problem{Detail: "the platform failed at this test", Remedy: "its log says more"})
	default:
		frame("test-result", q.testViewOf(t, false))
	}
	return nil
}

// switchPlatformDial says whether the platform may dial the organization's gateways.
func (q *request) switchPlatformDial() error {
	on := q.value("platform_dial") != ""
	if _, err := q.s.reg.UpdateOrg(q.ctx, q.org, control.UpdateOrganization{PlatformDial: &on}); err != nil {
		return err
	}
	said := "The platform may reach resources, where a policy allows it."
	if !on {
		said = "The platform does not dial gateways of this organization any more. Its certificates for that are revoked."
	}
	q.tell("good", said)
	return q.redirect(q.url("organization"))
}
