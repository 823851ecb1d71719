package api

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"reflect"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"sallyway/internal/control"
	"sallyway/platform/push"
	"sallyway/platform/registry"
)

const (
	grantType = "urn:ietf:params:oauth:grant-type:jwt-bearer" // RFC 7523 §2.1

	// writeTimeout is how long a line of a control stream may take to be written before the node counts as gone.
	writeTimeout = 30 * time.Second
)

// accessToken is the answer to an assertion (RFC 6749 §5.1).
type accessToken struct {
	Token   string `json:"access_token"`
	Type    string `json:"token_type"`
	Expires int    `json:"expires_in"` // seconds
}

// nodeEndpoints adds what nodes call. They are plain handlers (a form, a stream, and other credentials than the admin API's) and are
// described by hand.
func (s *server) nodeEndpoints() {
	s.mux.HandleFunc("POST /api/v1/enroll", s.enroll)
	s.mux.HandleFunc("POST /api/v1/enroll/aws/challenge", s.awsChallenge)
	s.mux.HandleFunc("POST /api/v1/enroll/aws", s.enrollAWS)
	s.mux.HandleFunc("POST /api/v1/node/token", s.token)
	s.mux.HandleFunc("GET /api/v1/node/control", s.control)
	s.mux.HandleFunc("POST /api/v1/node/heartbeat", s.heartbeat)
	s.mux.HandleFunc("POST /api/v1/node/renew", s.renew)
	s.mux.HandleFunc("POST /api/v1/node/flows", s.flows)
	s.mux.HandleFunc("POST /api/v1/node/aws", s.checkAWS)

	s.describe("POST", "/enroll", "enrol", "Spend an enrolment token: certificates for a node's key", false,
		content("application/json", reflect.TypeFor[control.EnrolRequest]()), "application/json", reflect.TypeFor[control.EnrolResponse]())
	s.describe("POST", "/enroll/aws/challenge", "aws-challenge", "What a node signs to enrol by the AWS identity of its host", false,
		content("application/json", reflect.TypeFor[control.AWSChallengeRequest]()), "application/json", reflect.TypeFor[control.AWSChallenge]())
	s.describe("POST", "/enroll/aws", "enrol-by-aws", "Certificates for a node's key, by the AWS identity of its host", false,
		content("application/json", reflect.TypeFor[control.AWSEnrolRequest]()), "application/json", reflect.TypeFor[control.EnrolResponse]())
	s.describe("POST", "/node/aws", "node-aws", "Show the AWS identity of a node's host again, at its start", true,
		content("application/json", reflect.TypeFor[control.AWSCheckRequest]()), "application/json", reflect.TypeFor[struct{}]())
	s.describe("POST", "/node/token", "node-token", "Exchange an assertion (RFC 7523) for an access token", false,
		map[string]*huma.MediaType{"application/x-www-form-urlencoded": {Schema: &huma.Schema{
			Type: huma.TypeObject, Required: []string{"grant_type", "assertion"},
			Properties: map[string]*huma.Schema{"grant_type": {Type: huma.TypeString, Enum: []any{grantType}}, "assertion": {Type: huma.TypeString}},
		}}}, "application/json", reflect.TypeFor[accessToken]())
	s.describe("GET", "/node/control", "node-control", "The node's configuration, as a stream of events, one JSON a line", true,
		nil, "application/x-ndjson", reflect.TypeFor[control.Event]())
	s.describe("POST", "/node/heartbeat", "node-heartbeat", "What a node says of itself", true,
		content("application/json", reflect.TypeFor[control.Heartbeat]()), "application/json", reflect.TypeFor[struct{}]())
	s.describe("POST", "/node/flows", "node-flows", "What a gateway tells of connections", true,
		content("application/json", reflect.TypeFor[control.FlowBatch]()), "application/json", reflect.TypeFor[struct{}]())
	s.describe("POST", "/node/renew", "node-renew", "Fresh certificates for a node", true,
		content("application/json", reflect.TypeFor[control.RenewRequest]()), "application/json", reflect.TypeFor[control.RenewResponse]())
}

func content(mediaType string, t reflect.Type) map[string]*huma.MediaType {
	return map[string]*huma.MediaType{mediaType: {Extensions: map[string]any{"go": t}}}
}

// describe puts an endpoint into the OpenAPI document.
func (s *server) describe(method, path, id, summary string, bearer bool, in map[string]*huma.MediaType, outType string, out reflect.Type) {
	doc := s.api.OpenAPI()
	schemas := doc.Components.Schemas
	op := &huma.Operation{
		OperationID: id, Method: method, Path: "/api/v1" + path, Summary: summary,
		Responses: map[string]*huma.Response{
			"200":     {Description: "OK", Content: map[string]*huma.MediaType{outType: {Schema: schemas.Schema(out, true, id+"-response")}}},
			"default": {Description: "Error", Content: map[string]*huma.MediaType{"application/problem+json": {Schema: schemas.Schema(reflect.TypeFor[problem](), true, "Problem")}}},
		},
	}
	for _, m := range in {
		if t, ok := m.Extensions["go"].(reflect.Type); ok {
			m.Extensions, m.Schema = nil, schemas.Schema(t, true, id+"-request")
		}
	}
	if in != nil {
		op.RequestBody = &huma.RequestBody{Required: true, Content: in}
	}
	if bearer {
		op.Security = []map[string][]string{{"node": {}}}
	}
	doc.AddOperation(op)
}

// decode reads a JSON body. Fields that this version does not know are left to newer ones.
func decode(r *http.Request, v any) error {
	if err := json.NewDecoder(r.Body).Decode(v); err != nil {
		status, detail := http.StatusBadRequest, "the body is not the JSON that this request takes"
		var large *http.MaxBytesError
		if errors.As(err, &large) {
			status, detail = http.StatusRequestEntityTooLarge, "the body is too large"
		}
		return &registry.Error{Problem: control.Problem{Status: status, Code: control.CodeInvalid, Detail: detail, Remedy: "see /api/v1/openapi.json"}}
	}
	return nil
}

// refusal answers a refused request; a source that is refused too often is told to wait.
func (s *server) refusal(w http.ResponseWriter, r *http.Request, from string, err error) {
	if registry.Code(err) != "" {
		if !s.limiter.allow(from, s.reg.Now()) {
			s.guessing(r.Context(), "node", from)
			s.wait(w)
			return
		}
		s.limiter.failed(from, s.reg.Now())
	}
	write(w, &s.fail(r.Context(), err).Problem)
}

func (s *server) wait(w http.ResponseWriter) {
	w.Header().Set("Retry-After", "60")
	write(w, &tooMany().Problem)
}

// enroll spends a token.
func (s *server) enroll(w http.ResponseWriter, r *http.Request) {
	limited(s, w, r, s.reg.Enrol)
}

// awsChallenge answers what a node signs.
func (s *server) awsChallenge(w http.ResponseWriter, r *http.Request) {
	limited(s, w, r, func(ctx context.Context, _ string, req control.AWSChallengeRequest) (*control.AWSChallenge, error) {
		return s.reg.AWSChallenge(ctx, req)
	})
}

// enrollAWS enrols by an AWS identity.
func (s *server) enrollAWS(w http.ResponseWriter, r *http.Request) {
	limited(s, w, r, s.reg.EnrolByAWS)
}

// limited runs a request of somebody unknown. A source that was refused too often is not even looked at.
func limited[In, Out any](s *server, w http.ResponseWriter, r *http.Request, fn func(ctx context.Context, from string, req In) (*Out, error)) {
	from := source(r)
	if !s.limiter.allow(from, s.reg.Now()) {
		s.guessing(r.Context(), "enrolment", from)
		s.wait(w)
		return
	}
	var req In
	err := decode(r, &req)
	if err == nil {
		var out *Out
		if out, err = fn(r.Context(), from, req); err == nil {
			writeJSON(w, out)
			return
		}
	}
	s.refusal(w, r, from, err)
}

// token exchanges an assertion. A good one always passes, so that a refused node locks out nobody behind the same address.
func (s *server) token(w http.ResponseWriter, r *http.Request) {
	from := source(r)
	if g := r.PostFormValue("grant_type"); g != grantType {
		write(w, &control.Problem{Status: http.StatusBadRequest, Code: control.CodeInvalid, Detail: "the grant type is not " + grantType, Remedy: "see RFC 7523"})
		return
	}
	token, life, err := s.reg.AccessToken(r.Context(), from, r.PostFormValue("assertion"))
	if err != nil {
		s.refusal(w, r, from, err)
		return
	}
	writeJSON(w, accessToken{Token: token, Type: "Bearer", Expires: int(life.Seconds())})
}

// node runs a request of a node that showed its access token.
func (s *server) node(w http.ResponseWriter, r *http.Request, fn func(who *registry.Session) (any, error)) {
	who, err := s.who(r)
	if err == nil {
		if refusal := s.spend(w.Header().Set, "node:"+who.Node.String()); refusal != nil {
			write(w, &refusal.Problem)
			return
		}
		var out any
		if out, err = fn(who); err == nil {
			writeJSON(w, out)
			return
		}
	}
	write(w, &s.fail(r.Context(), err).Problem)
}

func (s *server) who(r *http.Request) (*registry.Session, error) {
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	// Most requests are heartbeats of nodes that are connected here: the database has nothing to add about them.
	if who, err := s.reg.Session(token); err == nil && s.hub.Speaks(who) {
		return who, nil
	}
	return s.reg.Who(r.Context(), token)
}

func (s *server) heartbeat(w http.ResponseWriter, r *http.Request) {
	s.node(w, r, func(who *registry.Session) (any, error) {
		var beat control.Heartbeat
		if err := decode(r, &beat); err != nil {
			return nil, err
		}
		s.hub.Heartbeat(who.Node.ID, beat)
		return struct{}{}, nil
	})
}

func (s *server) renew(w http.ResponseWriter, r *http.Request) {
	s.node(w, r, func(who *registry.Session) (any, error) {
		var req control.RenewRequest
		if err := decode(r, &req); err != nil {
			return nil, err
		}
		return s.reg.Renew(r.Context(), who, req)
	})
}

func (s *server) checkAWS(w http.ResponseWriter, r *http.Request) {
	s.node(w, r, func(who *registry.Session) (any, error) {
		var req control.AWSCheckRequest
		if err := decode(r, &req); err != nil {
			return nil, err
		}
		return struct{}{}, s.reg.CheckAWS(r.Context(), source(r), who, req)
	})
}

// control serves a node's control stream until it ends.
func (s *server) control(w http.ResponseWriter, r *http.Request) {
	who, err := s.who(r)
	if err != nil {
		write(w, &s.fail(r.Context(), err).Problem)
		return
	}
	rc := http.NewResponseController(w)
	// The server's read timeout is for requests: this one ends when either side wants.
	_ = rc.SetReadDeadline(time.Time{})
	sent := false
	err = s.hub.Serve(r.Context(), who, func(line []byte) error {
		if err := rc.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return err
		}
		if !sent {
			w.Header().Set("Content-Type", "application/x-ndjson")
			w.Header().Set("Cache-Control", "no-store")
			w.Header().Set("X-Accel-Buffering", "no")
			// The stream ends with its connection (RFC 9112 §6.3): without chunks a configuration goes out in three writes instead of five.
			w.Header().Set("Transfer-Encoding", "identity")
			sent = true
			s.log.Info("node connected", "node", who.Node.String())
		}
		if _, err := w.Write(line); err != nil {
			return err
		}
		return rc.Flush()
	})
	if !sent && errors.Is(err, push.ErrReplaced) {
		write(w, &control.Problem{
			Status: http.StatusConflict, Code: control.CodeConflict, Detail: "this stream was " + push.ErrReplaced.Error() + " before it began",
			Remedy: "nothing, where the node has just started again; otherwise two hosts run with the same key: enrol each with a token of its own",
		})
		return
	}
	if !sent && !errors.Is(err, context.Canceled) {
		if errors.Is(err, push.ErrDropped) {
			if _, err = s.who(r); err == nil {
				err = &registry.Error{Problem: control.Problem{Status: http.StatusForbidden, Code: control.CodeNodeUnknown, Detail: push.ErrDropped.Error(), Remedy: "enrol it with a new token"}}
			}
		}
		write(w, &s.fail(r.Context(), err).Problem)
		return
	}
	s.log.Info("node disconnected", "node", who.Node.String(), "reason", err)
}

// write answers a problem.
func write(w http.ResponseWriter, p *control.Problem) {
	if p.Title == "" {
		p.Title = http.StatusText(p.Status)
	}
	p.RequestID = w.Header().Get(control.RequestIDHeader)
	w.Header().Set("Content-Type", "application/problem+json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(p.Status)
	_ = json.NewEncoder(w).Encode(p) // the peer has gone: nobody is left to tell
}

// answer is write for huma.
func answer(ctx huma.Context, p *problem) {
	if p.Title == "" {
		p.Title = http.StatusText(p.Status)
	}
	p.RequestID = ctx.Header(control.RequestIDHeader)
	ctx.SetHeader("Content-Type", "application/problem+json")
	ctx.SetHeader("Cache-Control", "no-store")
	ctx.SetStatus(p.Status)
	_ = json.NewEncoder(ctx.BodyWriter()).Encode(p) // as above
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(v) // as above
}
