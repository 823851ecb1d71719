package platform

import (
	"bytes"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyway/internal/auditfile"
	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// export reads lines that the platform streams.
func (l *lab) export(path string) []byte {
	l.t.Helper()
	req, err := http.NewRequestWithContext(l.t.Context(), "GET", l.at()+"/api/v1/orgs/default"+path, nil)
	must(l.t, err)
	req.Header.Set("Authorization", "Bearer "+l.admin.Token)
	resp, err := l.http.Do(req)
	must(l.t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if must(l.t, err); resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "application/x-ndjson" {
		l.t.Fatalf("export: %d %s", resp.StatusCode, b)
	}
	return b
}

func (l *lab) rootPin() identity.KeyHash {
	l.t.Helper()
	var pin identity.KeyHash
	must(l.t, l.srv.store.View(l.t.Context(), func(tx store.Tx) error {
		a, err := l.srv.reg.Authority(l.t.Context(), tx, "default", "root")
		if err == nil {
			pin = identity.CertificateKeyHash(a.Certificate)
		}
		return err
	}))
	return pin
}

// TestAuditExportIsVerifiedWithoutThePlatform: what the platform exports and signed is good under the organization's root, before and after a
// restart, and the platform itself notices a chain that was rewritten with good hashes.
func TestAuditExportIsVerifiedWithoutThePlatform(t *testing.T) {
	t.Parallel()
	l := start(t)
	pins := []identity.KeyHash{l.rootPin()}
	verify := func(b, earlier []byte) *auditfile.Report {
		t.Helper()
		o := auditfile.Options{Pins: pins}
		if earlier != nil {
			o.Earlier = bytes.NewReader(earlier)
		}
		r, err := auditfile.Verify(bytes.NewReader(b), o)
		must(t, err)
		if !r.OK || !r.Pinned {
			t.Fatalf("%+v", r)
		}
		return r
	}
	l.api("POST", "/clients", control.CreateNode{Name: "a"}, nil)
	must(t, l.srv.reg.SignAudit(t.Context()))
	l.api("POST", "/clients", control.CreateNode{Name: "b"}, nil)
	first := l.export("/audit:export")
	if r := verify(first, nil); r.Checkpoints != 1 || r.Beyond() < 1 {
		t.Errorf("signed once, then one more: %+v", r)
	}
	l.stop() // it signs what is new
	l.run()
	second := l.export("/audit:export")
	r := verify(second, first)
	if r.Checkpoints != 2 || r.Signed < 3 || !r.Earlier {
		t.Errorf("after a restart: %+v", r)
	}
	var v control.AuditVerification
	if l.api("GET", "/audit:verify", nil, &v); !v.OK || v.Signed != r.Signed {
		t.Errorf("%+v", v)
	}
	var list control.List[control.AuditCheckpoint]
	if l.api("GET", "/audit/checkpoints?limit=1", nil, &list); len(list.Items) != 1 || list.NextCursor == "" || len(list.Items[0].Signature) != 64 || list.Items[0].Certificates == "" {
		t.Errorf("%+v", list)
	}
	l.stop()
	l.rewrite("UPDATE audit SET actor = 'nobody' WHERE org = 'default' AND seq = 2")
	l.run()
	if l.api("GET", "/audit:verify", nil, &v); v.OK || !strings.Contains(v.Problem, "signed") {
		t.Errorf("a chain that was rewritten with good hashes: %+v", v)
	}
}

// rewrite changes an entry and makes all hashes good again, as an operator of the platform could.
func (l *lab) rewrite(statement string) {
	l.t.Helper()
	file := filepath.Join(l.cfg.Data, "platform.db")
	tamper(l.t, file, statement)
	st, err := store.OpenSQLite(l.t.Context(), file)
	must(l.t, err)
	var rows []*store.AuditEntry
	must(l.t, st.View(l.t.Context(), func(tx store.Tx) (err error) {
		rows, err = tx.Audit(l.t.Context(), "default", 0, 0)
		return err
	}))
	must(l.t, st.Close())
	db, err := sql.Open("sqlite", "file:"+file+"?_pragma=busy_timeout(10000)")
	must(l.t, err)
	defer db.Close()
	prev := ""
	for _, e := range rows {
		prev, err = auditfile.Hash(prev, "default", &auditfile.Entry{Seq: e.Seq, At: e.At, Actor: e.Actor, Action: e.Action, Object: e.Object, Result: e.Result, Detail: e.Detail})
		must(l.t, err)
		_, err = db.ExecContext(l.t.Context(), `UPDATE audit SET hash = ? WHERE org = 'default' AND seq = ?`, prev, e.Seq)
		must(l.t, err)
	}
	_, err = db.ExecContext(l.t.Context(), `UPDATE audit_heads SET hash = ? WHERE org = 'default'`, prev)
	must(l.t, err)
}

// TestAuditIsVerifiedAfterManyRoots: whoever rotates the root over and over does not end that the log can be verified, nor goes on for long.
func TestAuditIsVerifiedAfterManyRoots(t *testing.T) {
	t.Parallel()
	l := start(t)
	l.create(identity.Client, "asleep").join() // a rotation waits for it, so that it can be taken back
	pins := []identity.KeyHash{l.rootPin()}
	tries := 0
	for ; tries < 40; tries++ {
		if _, err := l.srv.reg.Rotate(t.Context(), "default", control.RotateAuthority{Kind: "root"}); err != nil {
			if registry.Code(err) != control.CodeRateLimited {
				t.Fatal(err)
			}
			break
		}
		if _, err := l.srv.reg.Rotate(t.Context(), "default", control.RotateAuthority{Kind: "root", Action: control.RotationAbort}); err != nil {
			t.Fatal(err)
		}
	}
	if tries != 20 {
		t.Errorf("%d rotations began in a day", tries)
	}
	must(t, l.srv.reg.SignAudit(t.Context()))
	r, err := auditfile.Verify(bytes.NewReader(l.export("/audit:export")), auditfile.Options{Pins: pins})
	must(t, err)
	if !r.OK || r.Checkpoints == 0 {
		t.Errorf("%+v", r)
	}
}

// TestAuditOfAnOrganizationOfTheSameName: one that was deleted leaves its chain, and no key that signs for the one that comes after it.
func TestAuditOfAnOrganizationOfTheSameName(t *testing.T) {
	t.Parallel()
	l := start(t)
	reg := l.srv.reg
	for range 2 {
		_, err := reg.CreateOrg(t.Context(), control.CreateOrganization{Name: "again"})
		must(t, err)
		must(t, reg.SignAudit(t.Context()))
		as, err := reg.Authorities(t.Context(), "again")
		must(t, err)
		pin := ""
		for _, a := range as {
			if a.Kind == control.AuthorityRoot {
				pin = a.Key
			}
		}
		cs, err := reg.Checkpoints(t.Context(), "again", 0, 100)
		must(t, err)
		chain, err := identity.DecodeCertificates([]byte(cs[len(cs)-1].Certificates))
		must(t, err)
		if got := identity.CertificateKeyHash(chain[len(chain)-1]).String(); got != pin {
			t.Errorf("the log is signed under the root %.16s, the organization's is %.16s", got, pin)
		}
		must(t, reg.DeleteOrg(t.Context(), "again"))
		must(t, reg.SignAudit(t.Context()))
	}
}

// TestAuditKeySurvivesANewDataKey: the key that signs the chains is sealed anew with everything else.
func TestAuditKeySurvivesANewDataKey(t *testing.T) {
	t.Parallel()
	l := start(t)
	must(t, l.srv.reg.SignAudit(t.Context()))
	var w control.Webhook
	l.api("POST", "/webhooks", control.CreateWebhook{Name: "siem", URL: "https://siem.example/in"}, &w)
	sealed := func() (out [][]byte) {
		must(t, l.srv.store.View(t.Context(), func(tx store.Tx) error {
			ks, err := tx.AuditKeys(t.Context(), "default")
			must(t, err)
			hook, err := tx.FindWebhook(t.Context(), "default", "siem")
			out = [][]byte{ks[0].Sealed, hook.Secret}
			return err
		}))
		return out
	}
	before := sealed()
	must(t, l.srv.store.Update(t.Context(), func(tx store.Tx) error { return registry.Reseal(t.Context(), tx, l.srv.reg.Seal, l.srv.reg.Seal) }))
	after := sealed()
	for i := range before {
		if bytes.Equal(before[i], after[i]) {
			t.Errorf("secret %d is not sealed anew", i)
		}
	}
	l.api("POST", "/clients", control.CreateNode{Name: "a"}, nil)
	must(t, l.srv.reg.SignAudit(t.Context()))
	var v control.AuditVerification
	if l.api("GET", "/audit:verify", nil, &v); !v.OK || v.Signed != v.Entries {
		t.Errorf("%+v", v)
	}
}

// TestFlowLog: gateways tell, the platform names and keeps, by filter and page, of its own organization alone, until the organization wants none.
func TestFlowLog(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	gw := w.gateway.stream()
	gw.wait("the flow log", func(c *control.Config) bool { return c.Gateway.FlowLog })
	var res control.ResourceRecord
	w.api("GET", "/resources/web", nil, &res)
	var ada control.PersonRecord
	w.api("POST", "/people", control.CreatePerson{Login: "ada", Role: "member"}, &ada)
	must(t, w.srv.store.Update(t.Context(), func(tx store.Tx) error { return tx.BindNode(t.Context(), w.client.id.ID, ada.ID) }))
	began := time.Now().Add(-time.Minute).UTC().Truncate(time.Millisecond)
	flow := func(id string, peer identity.Node) control.FlowReport {
		return control.FlowReport{
			ID: id, Peer: peer, Resource: res.ID, Rule: "laptop-web", Protocol: "tcp", Destination: "web:80", Address: "10.9.0.2:80", Relay: "relay-1", Path: "udp",
			Started: began, Seen: began.Add(30 * time.Second), Sent: 10, Received: 20, Reason: "closed",
		}
	}
	open := flow("f1", w.client.id)
	open.Open, open.Reason, open.Sent = true, "", 5
	stranger := w.client.id
	stranger.Org = "rival"
	later := flow("f3", w.client.id)
	later.Started = began.Add(time.Second)
	tell := func(who *node, status int, b control.FlowBatch) {
		t.Helper()
		if got, p := w.do(who.bearer, "POST", "/api/v1/node/flows", b, nil); got != status {
			t.Fatalf("flows of %s: %d %+v", who.name, got, p)
		}
	}
	tell(w.gateway, 200, control.FlowBatch{Flows: []control.FlowReport{open, flow("f2", stranger), later}, Dropped: 3})
	for range 2 { // a gateway that got no answer tells again
		tell(w.gateway, 200, control.FlowBatch{Flows: []control.FlowReport{open, flow("f1", w.client.id)}})
	}
	tell(w.client, 403, control.FlowBatch{Flows: []control.FlowReport{flow("f4", w.client.id)}})
	tell(w.gateway, 422, control.FlowBatch{Flows: make([]control.FlowReport, control.MaxFlows+1)})

	var l control.List[control.FlowRecord]
	w.api("GET", "/flows", nil, &l)
	if len(l.Items) != 2 {
		t.Fatalf("%+v", l.Items)
	}
	want := control.FlowRecord{
		ID: "f1", Client: "laptop", ClientID: w.client.id.ID, Person: "ada", Resource: "web", ResourceID: res.ID, Gateway: "gw", Relay: "relay-1", Path: "udp", Rule: "laptop-web", Protocol: "tcp",
		Destination: "web:80", Address: "10.9.0.2:80", Started: began, Ended: began.Add(30 * time.Second), Seconds: 30, Sent: 10, Received: 20, Reason: "closed",
	}
	if l.Items[1] != want {
		t.Errorf("%+v\nwant %+v", l.Items[1], want)
	}
	page := l
	w.api("GET", "/flows?limit=1", nil, &page)
	if len(page.Items) != 1 || page.Items[0].ID != "f3" || page.NextCursor == "" {
		t.Errorf("%+v", page)
	}
	next := page.NextCursor
	page = control.List[control.FlowRecord]{}
	if w.api("GET", "/flows?limit=1&cursor="+next, nil, &page); len(page.Items) != 1 || page.Items[0].ID != "f1" || page.NextCursor != "" {
		t.Errorf("%+v", page)
	}
	for query, n := range map[string]int{
		"client=laptop&resource=web&gateway=gw": 2, "client=" + w.client.id.ID: 2, "client=other": 0, "resource=other": 0, "person=nobody": 0, "person=ada": 2, "person=" + ada.ID: 2,
		"from=" + began.Add(time.Second).Format(time.RFC3339Nano): 1, "to=" + began.Add(time.Second).Format(time.RFC3339Nano): 1,
	} {
		page = control.List[control.FlowRecord]{}
		if w.api("GET", "/flows?"+query, nil, &page); len(page.Items) != n {
			t.Errorf("%s: %d flows, want %d", query, len(page.Items), n)
		}
	}
	if status, _ := w.do(w.admin.Token, "GET", "/api/v1/orgs/default/flows?cursor=x", nil, nil); status != 422 {
		t.Errorf("a cursor that is none: %d", status)
	}
	lines := bytes.Count(w.export("/flows:export?client=laptop"), []byte("\n"))
	if lines != 2 {
		t.Errorf("%d lines exported", lines)
	}
	w.api("PATCH", "/flow-log", control.FlowLog{On: false}, nil)
	gw.wait("no flow log", func(c *control.Config) bool { return !c.Gateway.FlowLog })
	tell(w.gateway, 200, control.FlowBatch{Flows: []control.FlowReport{flow("f9", w.client.id)}})
	w.api("GET", "/flows", nil, &l)
	if len(l.Items) != 2 {
		t.Errorf("%d flows after it was turned off", len(l.Items))
	}
}

// TestFlowsAreForgotten: by age, and beyond a number.
func TestFlowsAreForgotten(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t, func(c *Config) { c.FlowLog, c.FlowLogRows = time.Hour, 3 }))
	now := time.Now()
	var fs []control.FlowReport
	for i := range 6 {
		at := now.Add(-time.Duration(i) * 20 * time.Minute)
		fs = append(fs, control.FlowReport{ID: fmt.Sprint(i), Peer: w.client.id, Started: at, Seen: at, Reason: "closed"})
	}
	if status, p := w.do(w.gateway.bearer, "POST", "/api/v1/node/flows", control.FlowBatch{Flows: fs}, nil); status != 200 {
		t.Fatalf("%+v", p)
	}
	must(t, w.srv.trail.flows.Tidy(t.Context()))
	var l control.List[control.FlowRecord]
	if w.api("GET", "/flows", nil, &l); len(l.Items) != 3 || l.Items[2].ID != "2" {
		b, _ := json.Marshal(l.Items)
		t.Errorf("%s", b)
	}
}

// TestGuessingTokensIsAlerted: a source that guesses API tokens stands in the platform's own audit log, once.
func TestGuessingTokensIsAlerted(t *testing.T) {
	t.Parallel()
	l := start(t)
	told := func() (n int) {
		t.Helper()
		es, err := l.srv.reg.Audit(t.Context(), identity.SharedOrg, 0, 1000)
		must(t, err)
		for _, e := range es {
			if e.Action == "guessing.slow-down" && e.Detail["what"] == "API token" {
				n++
			}
		}
		return n
	}
	for i := range 40 {
		status, _ := l.do(fmt.Sprintf("swt1.%043d", i), "GET", "/api/v1/orgs", nil, nil)
		if status == 401 && told() != 0 {
			t.Fatalf("told after %d tries, before it has to wait", i+1)
		}
	}
	if n := told(); n != 1 {
		t.Errorf("told %d times, want once", n)
	}
}
