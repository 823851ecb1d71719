package web

import (
	"net/http"
	"time"

	"sallyway/internal/control"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// authorityName is a CA as people call it.
func authorityName(kind string) string {
	switch kind {
	case control.AuthorityRoot:
		return "Root of the organization"
	case control.AuthoritySSH:
		return "SSH CA"
	case registry.KindServer:
		return "The platform's HTTPS certificate"
	}
	return "CA for " + kind + " certificates"
}

// authorityView says how a CA is, and what is to be done. left is the time until its end; never is that there is none.
func authorityView(c *registry.CertificateRecord, org string, left time.Duration, never bool) (stateView, string) {
	rotate := "sallyway --org " + org + " ca rotate --kind " + c.Kind + " --plan"
	if c.Kind == registry.KindServer {
		rotate = "replace the files of --tls-cert and --tls-key"
	}
	switch {
	case c.State == store.Requested:
		return stateView{"Waits for the owner's signature", "warn", "warn"}, "where the key of the root is: sallyway --org " + org + " ca sign --root-key FILE"
	case c.State == store.Next:
		return stateView{"Next: accepted, issues nothing yet", "wait", "idle"}, ""
	case c.State == store.Retiring:
		return stateView{"Retires: still accepted", "off", "idle"}, ""
	case !never && left <= 0:
		return stateView{"Expired", "bad", "bad"}, "rotate it: " + rotate
	case !never && left <= certLast:
		return stateView{"Ends in a day", "bad", "bad"}, "rotate it now: " + rotate
	case !never && left <= certWarn && !c.Renews:
		return stateView{"Ends soon", "bad", "bad"}, "rotate it now: " + rotate
	case !never && left <= certNotice && !c.Renews:
		return stateView{"Ends in a month", "warn", "warn"}, "plan its rotation: " + rotate
	}
	return stateView{"Good", "good", "good"}, ""
}

// showRotation shows what a rotation does, or is doing.
func (q *request) showRotation() error {
	kind := q.r.PathValue("kind")
	plan, err := q.s.reg.Rotate(q.ctx, q.org, control.RotateAuthority{Kind: kind, Plan: true})
	if err != nil {
		return err
	}
	all, err := q.s.reg.Authorities(q.ctx, q.org)
	if err != nil {
		return err
	}
	data := struct {
		*control.RotationPlan
		Name             string
		Running, Next    bool
		Offline, Waiting bool
		More             int // nodes that have not heard, and are not shown
	}{RotationPlan: plan, Name: authorityName(kind)}
	if data.More = max(0, len(plan.Unheard)-pageSize); data.More > 0 {
		plan.Unheard = plan.Unheard[:pageSize]
	}
	for _, a := range all {
		if a.Kind == kind {
			data.Running = data.Running || a.State == control.AuthorityNext || a.State == control.AuthorityRetiring || a.State == control.AuthorityRequested
			data.Next = data.Next || a.State == control.AuthorityNext
		}
		data.Waiting = data.Waiting || a.State == control.AuthorityRequested
		data.Offline = data.Offline || (a.Kind == control.AuthorityRoot && a.State == control.AuthorityCurrent && a.Offline)
	}
	return q.render(http.StatusOK, "rotation", page{
		Title: "Rotation: " + data.Name, Nav: "certificates", Crumb: append(q.settingsCrumbs(), crumb{"Certificates", q.url("certificates")}), Live: true, Data: data,
	})
}

// rotate starts a rotation, or takes a next CA back.
func (q *request) rotate() error {
	kind, action := q.r.PathValue("kind"), q.value("action")
	if action != control.RotationAbort {
		action = control.RotationStart
	}
	if _, err := q.s.reg.Rotate(q.ctx, q.org, control.RotateAuthority{Kind: kind, Action: action}); err != nil {
		return err
	}
	if action == control.RotationAbort {
		q.tell("good", "The next one is taken back: "+authorityName(kind)+".")
		return q.redirect(q.url("certificates"))
	}
	q.tell("good", "The next one is made, and nodes are told of it: "+authorityName(kind)+".")
	return q.redirect(q.url("certificates", kind, "rotation"))
}
