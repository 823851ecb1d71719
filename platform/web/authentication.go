package web

import (
	"net/http"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/people"
)

func (s *Server) authenticationRoutes(mux *http.ServeMux) {
	for _, k := range kinds {
		if k.Kind == identity.Client {
			continue // a client enrols by token, or by its person's login
		}
		s.org(mux, "POST", "/networking/"+k.Plural+"/{name}/authentication", k.Plural, people.Write, func(q *request) error { return q.setAuthentication(k) })
	}
}

// setAuthentication changes how a node shows at enrolment who it is.
func (q *request) setAuthentication(k kindView) error {
	n, err := q.node(k)
	if err != nil {
		return err
	}
	how := q.value("authentication")
	req := control.UpdateNode{Authentication: &how}
	if how == control.AuthAWS {
		req.AWS = &control.AWSRule{Accounts: words(q.value("accounts")), Principals: words(q.value("principals"))}
	}
	changed, err := q.s.reg.UpdateNode(q.ctx, q.org, k.Kind, n.ID, req)
	if p := refusal(err); p != nil {
		f := q.again(p)
		f.values.Set("at", "authentication")
		return q.nodeDetail(k, n, p.Status, f)
	}
	if err != nil {
		return err
	}
	q.tell("good", k.One()+" "+changed.Name+" enrols by "+authWords[how]+" from now on.")
	return q.redirect(q.nodeURL(k, changed.Name))
}

var authWords = map[string]string{control.AuthToken: "token", control.AuthAWS: "its AWS identity"}
