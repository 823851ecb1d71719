package dialler

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/policy"
	"sallyway/platform/registry"
	"sallyway/platform/store"
	"sallyway/platform/view"
	"sallyway/relay/leg"
	"sallyway/relay/reverse"
	"sallyway/tunnel"
)

// Bounds of a test.
const (
	// TestTimeout bounds a test: shorter than an administrator's patience and the servers' limits.
	TestTimeout = 14 * time.Second
	// maxGateways is how many gateways one test goes through.
	maxGateways = 8
	// firstByte is how long a resource may take to say something unasked, beside the time there and back.
	firstByte = 300 * time.Millisecond
)

// run is a test that goes on.
type run struct {
	d        *Dialler
	view     *view.View
	route    *view.Route
	progress func(*control.ResourceTest)

	begun time.Time

	mu   sync.Mutex // guards what follows; progress is called with it held, one call after the other
	doc  *control.ResourceTest
	took time.Duration // until the last gateway's connection to the resource was there
}

// Test opens a session of its own to a resource by each gateway that serves it, and says what each step took. progress is called with what is
// known so far after each step, one call after the other; it must not keep the document, and nil is nobody. What the organization does not allow
// is a result, too. An error is a *registry.Error for a request that makes no sense, or of the database.
func (d *Dialler) Test(ctx context.Context, org, resource string, req control.TestResource, progress func(*control.ResourceTest)) (*control.ResourceTest, error) {
	v, err := d.cfg.View(ctx, org)
	if errors.Is(err, store.ErrNotFound) {
		return nil, registry.NotFound(err, "resource", resource, org)
	}
	if err != nil {
		return nil, err
	}
	r := v.FindResource(resource)
	if r == nil {
		return nil, registry.NotFound(store.ErrNotFound, "resource", resource, org)
	}
	wait, ok := d.limits.begin(org, d.cfg.Now())
	if !ok {
		return nil, registry.Refuse(http.StatusTooManyRequests, control.CodeRateLimited, fmt.Sprintf("try again in %d s", int(wait.Seconds())+1), "too many tests at once")
	}
	defer d.limits.end(org)
	t := &run{d: d, view: v, progress: progress, doc: &control.ResourceTest{Resource: r.Name, Started: d.cfg.Now().UTC(), Gateways: []control.GatewayTest{}}}
	if t.progress == nil {
		t.progress = func(*control.ResourceTest) {}
	}
	t.begun = time.Now()
	if err := t.prepare(r, req); err != nil {
		return nil, err
	}
	if t.doc.Verdict == "" {
		t.all(ctx)
	}
	t.doc.Millis = millis(cmp.Or(t.took, time.Since(t.begun)))
	result := "ok"
	switch {
	case t.doc.Refused:
		result = "refused"
	case !t.doc.OK:
		result = "failed"
	}
	d.metrics.tests.WithLabelValues(result).Inc()
	// Who asked may have gone; that it happened stands in the audit.
	actx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return t.doc, d.cfg.Registry.ResourceTested(actx, org, t.doc)
}

// refuse ends the test before it begins.
func (t *run) refuse(remedy, format string, args ...any) {
	t.doc.Refused, t.doc.Verdict, t.doc.Remedy = true, fmt.Sprintf(format, args...), remedy
}

// prepare finds out what to dial, and whether the organization wants it. A verdict in the document is that it does not.
func (t *run) prepare(r *store.Resource, req control.TestResource) (err error) {
	v := t.view
	port := req.Port
	if port == 0 {
		port = portOf(r)
	}
	if port == 0 {
		return registry.Invalid("body.port", "a resource without TCP ports can not be tested", "resource %q has no TCP ports", r.Name)
	}
	if t.route, err = v.RouteTo(r, strings.ToLower(strings.TrimSuffix(req.Host, ".")), port); err != nil {
		return registry.Invalid("body.host", "name a host of the resource: sallyway resource test "+r.Name+" --host HOST", "%v", err)
	}
	t.doc.Target = policy.Target{Proto: policy.TCP, Host: t.route.Host, Port: port}.String()
	if req.Gateway != "" {
		t.route.Gateways = slices.DeleteFunc(t.route.Gateways, func(g view.RouteGateway) bool { return g.Name != req.Gateway && g.Node.ID != req.Gateway })
		if len(t.route.Gateways) == 0 {
			return registry.Invalid("body.gateway", "see `sallyway resource show "+r.Name+"`", "no enabled gateway %.80q serves resource %q", req.Gateway, r.Name)
		}
	}
	t.route.Gateways = t.route.Gateways[:min(len(t.route.Gateways), maxGateways)]
	if e := v.MayDial(r, policy.TCP, port); !e.Allowed {
		t.refuse(e.Remedy, "%s (rule %q)", e.Reason, e.Rule)
	}
	return nil
}

// portOf is the TCP port to test: the one that gateways probe, else the first.
func portOf(r *store.Resource) uint16 {
	if r.Health.Port != 0 {
		return r.Health.Port
	}
	if len(r.TCP) > 0 {
		return r.TCP[0].First
	}
	return 0
}

// all goes by all the gateways at once.
func (t *run) all(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, TestTimeout)
	defer cancel()
	for _, g := range t.route.Gateways {
		t.doc.Gateways = append(t.doc.Gateways, control.GatewayTest{Gateway: g.Name, Hops: []control.TestHop{}})
	}
	t.progress(t.doc)
	var wg sync.WaitGroup
	for i, g := range t.route.Gateways {
		wg.Go(func() { t.one(ctx, i, g) })
	}
	wg.Wait()
	var good, bad []*control.GatewayTest
	for i := range t.doc.Gateways {
		g := &t.doc.Gateways[i]
		if g.OK {
			good = append(good, g)
		} else {
			bad = append(bad, g)
		}
	}
	switch {
	case len(good) == 0:
		t.doc.Verdict, t.doc.Remedy = bad[0].Verdict, bad[0].Remedy
	case len(bad) == 0:
		t.doc.OK, t.doc.Verdict = true, good[0].Verdict
	default:
		t.doc.OK, t.doc.Verdict, t.doc.Remedy = true, fmt.Sprintf("reached by gateway %s, not by %s: %s", good[0].Gateway, bad[0].Gateway, bad[0].Verdict), bad[0].Remedy
	}
	for _, g := range good { // the rest says so of each
		if g.Verdict == "" {
			g.Verdict = "reached"
		}
	}
}

// set changes what is known of gateway i.
func (t *run) set(i int, f func(g *control.GatewayTest)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f(&t.doc.Gateways[i])
	t.progress(t.doc)
}

// one goes by one gateway.
func (t *run) one(ctx context.Context, i int, g view.RouteGateway) {
	fail := func(tried []*trace, verdict, remedy string) {
		t.set(i, func(doc *control.GatewayTest) {
			doc.Verdict, doc.Remedy, doc.Done = verdict, remedy, true
			doc.Tried = failures(tried)
		})
	}
	if !g.Enrolled {
		fail(nil, fmt.Sprintf("gateway %q has not enrolled yet", g.Name), "sallyway gateway token "+g.Name)
		return
	}
	var traces []*trace
	var shown atomic.Pointer[trace] // the first; the others run beside it, and are shown when one has won
	watch := func(w way) *trace {
		tr := &trace{way: w}
		tr.changed = func() {
			if shown.Load() == tr {
				t.set(i, func(doc *control.GatewayTest) { doc.Hops = tr.steps() })
			}
		}
		shown.CompareAndSwap(nil, tr)
		traces = append(traces, tr)
		return tr
	}
	s, err := t.d.session(ctx, t.view, g, watch)
	if err != nil {
		verdict, remedy := t.unreached(g, err)
		fail(traces, verdict, remedy)
		return
	}
	t.d.tasks.Add(1)
	defer func() {
		go func() {
			defer t.d.tasks.Done()
			s.close("the test is over")
		}()
	}()
	var won *trace
	for _, tr := range traces {
		if tr.way.ref.Node == s.way.ref.Node && tr.way.rung == s.way.rung {
			won = tr
		}
	}
	shown.Store(won)
	t.set(i, func(doc *control.GatewayTest) {
		doc.Path, doc.Hops, doc.Tried = s.way.String(), won.steps(), failures(traces)
	})
	t.resource(ctx, i, g, s, won)
}

// failures are why attempts failed, without those that were given up.
func failures(traces []*trace) []string {
	var out []string
	for _, tr := range traces {
		if why := tr.failed(); why != "" {
			out = append(out, why)
		}
	}
	return out
}

// resource opens a connection on the session and listens for a moment.
func (t *run) resource(ctx context.Context, i int, g view.RouteGateway, s *session, tr *trace) {
	target := net.JoinHostPort(t.route.Host, strconv.Itoa(int(t.route.Port)))
	var st *tunnel.Stream
	err := tr.step(control.StepResource, target, func() (string, error) {
		err := patiently(ctx, t.d.cfg.Now, func() (err error) {
			st, err = s.t.DialTCP(ctx, t.route.Host, t.route.Port)
			return err
		})
		return "policy, name and connection at the gateway", err
	})
	rtt := s.t.QUIC().RTT
	if err != nil {
		verdict, remedy := t.refusedBy(g, target, err)
		t.set(i, func(doc *control.GatewayTest) {
			doc.RTT, doc.Verdict, doc.Remedy, doc.Done = millis(rtt), verdict, remedy, true
		})
		return
	}
	defer st.Close()
	t.mu.Lock()
	t.took = max(t.took, time.Since(t.begun))
	t.mu.Unlock()
	said := "reached by gateway " + g.Name + " over " + s.way.String()
	_ = tr.step(control.StepFirstByte, target, func() (string, error) {
		if err := st.SetReadDeadline(time.Now().Add(firstByte + 2*rtt)); err != nil {
			return "", err
		}
		n, err := st.Read(make([]byte, 512))
		switch {
		case n > 0:
			return fmt.Sprintf("the resource speaks first: %d bytes", n), nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			return "", errSkipped
		case errors.Is(err, io.EOF):
			said += "; it closed the connection at once"
			return "", errors.New("the resource closed the connection at once")
		}
		said += "; it ended the connection at once"
		return "", err
	})
	t.set(i, func(doc *control.GatewayTest) {
		doc.OK, doc.RTT, doc.Verdict, doc.Done = true, millis(rtt), said, true
	})
}

// unreached words why no session was opened with a gateway, and what to do.
func (t *run) unreached(g view.RouteGateway, err error) (verdict, remedy string) {
	if e, ok := errors.AsType[*registry.Error](err); ok {
		return e.Problem.Detail, e.Problem.Remedy
	}
	var steps []*stepError
	for _, e := range flatten(err) {
		if s, ok := errors.AsType[*stepError](e); ok && !errors.Is(s.err, context.Canceled) {
			steps = append(steps, s)
		}
	}
	if len(steps) == 0 {
		if errors.Is(err, errNoRelay) {
			return fmt.Sprintf("gateway %q has no relay yet", g.Name), "sallyway relay list; a gateway gets a relay when one is healthy"
		}
		return err.Error(), "try again; the log of platformd says more"
	}
	for _, s := range steps {
		if e, ok := errors.AsType[*addressError](s.err); ok {
			return fmt.Sprintf("the platform does not dial relay %s (%s): %v", s.way.ref.Name, s.way.ref.Host, e), addressRemedy
		}
	}
	reached := map[string]bool{} // relays of which some rung works
	for _, s := range steps {
		if se, ok := errors.AsType[*tunnel.SessionError](s.err); ok && se.Code != 0 {
			return fmt.Sprintf("gateway %q refused the session: %s", g.Name, se.Reason), t.explainHint()
		}
		var answer *leg.Error
		if s.step == control.StepGateway || s.step == control.StepRendezvous || errors.As(s.err, &answer) || errors.Is(s.err, reverse.ErrRefused) {
			reached[s.way.ref.Name] = true
		}
	}
	for _, s := range steps {
		if s.step == control.StepGateway {
			return fmt.Sprintf("gateway %q does not answer by relay %s: %v", g.Name, s.way.ref.Name, s.err), gatewayRemedy
		}
	}
	for _, s := range steps {
		if e, ok := errors.AsType[*leg.Error](s.err); ok && e.Code == leg.CodeNotFound {
			return fmt.Sprintf("gateway %q is not connected to relay %s", g.Name, s.way.ref.Name), gatewayRemedy
		}
	}
	for _, s := range steps {
		if e, ok := errors.AsType[*leg.Error](s.err); ok {
			return fmt.Sprintf("relay %s does not take the platform: %v", s.way.ref.Name, e), "sallyway relay show " + s.way.ref.Name
		}
	}
	if len(reached) > 0 {
		return fmt.Sprintf("gateway %q is not connected to its relays", g.Name), gatewayRemedy
	}
	ref := steps[0].way.ref
	var rungs []string
	for _, s := range steps {
		if s.way.ref.Node == ref.Node {
			rungs = append(rungs, string(s.way.rung))
		}
	}
	return fmt.Sprintf("the platform does not reach relay %s (%s) by %s: %v", ref.Name, ref.Host, strings.Join(rungs, ", "), steps[0].err),
		fmt.Sprintf("see that the relay runs (sallyway relay show %s) and that platformd's host may send to %s: UDP and TCP %d, TCP %d", ref.Name, ref.Host, ref.Port, ref.TLSPort)
}

const addressRemedy = "use a relay with a public address; the platform's operator may allow private ones: platformd serve --probe-relays private"

const gatewayRemedy = "on the gateway's host: gatewayd status; gatewayd doctor; journalctl -u sallyway-gateway"

// flatten is the list of joined errors.
func flatten(err error) []error {
	if j, ok := err.(interface{ Unwrap() []error }); ok {
		return j.Unwrap()
	}
	return []error{err}
}

// explainHint shows what the platform thinks of its rights.
func (t *run) explainHint() string {
	return "sallyway policy explain --from platform --resource " + t.doc.Resource + "; the gateway may not have the newest policies yet: gatewayd status"
}

// refusedBy words what a gateway said of a resource.
func (t *run) refusedBy(g view.RouteGateway, target string, err error) (verdict, remedy string) {
	pe, ok := errors.AsType[*tunnel.ProxyError](err)
	if !ok {
		return fmt.Sprintf("the session with gateway %q ended: %v", g.Name, err), gatewayRemedy
	}
	says := fmt.Sprintf("gateway %q says: %s (Proxy-Status %s)", g.Name, pe.Error(), pe.Type)
	switch pe.Type {
	case tunnel.ConnectionRefused:
		return fmt.Sprintf("%s refuses connections: nothing listens there, or a firewall resets. %s", target, says), "start the service, or correct the resource's address and ports: sallyway resource update " + t.doc.Resource
	case tunnel.ConnectionTimeout:
		return fmt.Sprintf("%s does not answer gateway %q. %s", target, g.Name, says), "see that the host is up and that its firewall lets the gateway's host in"
	case tunnel.DestinationUnroutable:
		return fmt.Sprintf("gateway %q has no route to %s. %s", g.Name, target, says), "see the routes of the gateway's host, or let another gateway serve it: sallyway resource update " + t.doc.Resource + " --gateway NAME"
	case tunnel.DestinationNotFound, tunnel.DNSError, tunnel.DNSTimeout:
		return fmt.Sprintf("gateway %q can not resolve %s. %s", g.Name, t.route.Host, says), "see /etc/resolv.conf of the gateway's host, or give the resource an address: sallyway resource update " + t.doc.Resource + " --address IP"
	case tunnel.DestinationProhibited:
		return "the gateway's own allow list says no. " + says, "on the gateway's host: allow in its configuration file"
	case tunnel.RequestDenied:
		return "policy says no. " + says, t.explainHint()
	}
	return says, gatewayRemedy
}
