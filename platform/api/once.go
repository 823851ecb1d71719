package api

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/http"
	"reflect"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"sallyway/internal/control"
	"sallyway/platform/people"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// Idempotency keys (draft-ietf-httpapi-idempotency-key-header). That a request was carried out is written in the transaction that carries it out, so
// two at once make one thing, on all replicas, whatever crashes. Its answer follows in a transaction of its own; when the platform crashes in between,
// the request is not repeated, and the caller is told that it was done.
const (
	keyHeader   = "Idempotency-Key"
	replayed    = "Idempotency-Replayed"
	maxKey      = 128              // characters
	keyLife     = 24 * time.Hour   // how long a key means the same request
	answerWait  = 2 * time.Minute  // an answer that is not there after this is lost: no request takes as long
	finishLimit = 10 * time.Second // for keeping an answer
)

// once is a request with an idempotency key.
type once struct {
	s       *server
	id      [32]byte // of caller and key
	request [32]byte // what is asked
}

// answered is the sealed content of store.Answer.
type answered struct {
	Request [32]byte         `json:"request"`
	Body    json.RawMessage  `json:"body,omitempty"`
	Problem *control.Problem `json:"problem,omitempty"` // instead
}

// callerID tells callers apart, for keys and for budgets: two tokens of one person are two.
func callerID(p *people.Principal) string {
	id := string(p.Kind) + ":" + p.ID + ":" + p.Token
	if p.Session != nil {
		id += "session"
	}
	return id
}

// once reads the key of a request. Without one it is nil.
func (s *server) once(ctx context.Context, hc huma.Context, op *huma.Operation, in any) (*once, error) {
	p := caller(ctx)
	if p == nil || !keyed(op) {
		return nil, nil
	}
	key := strings.TrimSpace(hc.Header(keyHeader))
	if key == "" {
		return nil, nil
	}
	if n := len(key); n >= 2 && key[0] == '"' && key[n-1] == '"' { // a string of RFC 8941, as the draft has it; a bare word is as good
		key = key[1 : n-1]
	}
	if key == "" || len(key) > maxKey || strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' }) {
		return nil, registry.Refuse(http.StatusBadRequest, control.CodeInvalid, "send a fresh random one with each new request, such as a UUID",
			"%s is not a word of 1 to %d printable characters", keyHeader, maxKey)
	}
	r, _ := humago.Unwrap(hc)
	what, err := json.Marshal(in) // its decoded form: another order or spacing is the same request
	if err != nil {
		return nil, err
	}
	return &once{
		s: s, id: digest(callerID(p), key),
		request: digest(r.Method, r.URL.EscapedPath(), r.URL.RawQuery, string(what)),
	}, nil
}

func digest(parts ...string) [32]byte {
	b, _ := json.Marshal(parts) // strings always encode, and two lists never to the same
	return sha256.Sum256(b)
}

func (o *once) label() string { return "answer:" + hex.EncodeToString(o.id[:]) }

// sealed encrypts what is kept: answers hold secrets, and a hash of a request could be tried with guesses of a password in it.
func (o *once) sealed(a answered) ([]byte, error) {
	b, err := json.Marshal(a)
	if err != nil {
		return nil, err
	}
	return o.s.reg.Seal.Seal(o.label(), b), nil
}

// mark says in the transaction that carries the request out that it was carried out.
func (o *once) mark(ctx context.Context, tx store.Tx, now time.Time) error {
	b, err := o.sealed(answered{Request: o.request})
	if err != nil {
		return err
	}
	return tx.InsertAnswer(ctx, &store.Answer{ID: o.id, Sealed: b, Created: now, Expires: now.Add(keyLife)})
}

// look says what is known of the key: an answer, or a refusal where there is none to give. Both are nil for a key that is new.
func (o *once) look(ctx context.Context) (*answered, error) {
	var kept *store.Answer
	now := o.s.reg.Now()
	err := o.s.reg.Store.View(ctx, func(tx store.Tx) (err error) {
		kept, err = tx.Answer(ctx, o.id, now)
		return err
	})
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	clear, err := o.s.reg.Seal.Open(o.label(), kept.Sealed)
	if err != nil { // answers live a day, and are not sealed anew when data keys change
		o.s.log.Warn("a kept answer to a request with an idempotency key does not open", "error", err)
		return nil, o.lost("its answer does not open any more: the platform's data keys were changed since")
	}
	var a answered
	if err := json.Unmarshal(clear, &a); err != nil {
		return nil, err
	}
	switch {
	case a.Request != o.request:
		return nil, registry.Refuse(http.StatusUnprocessableEntity, CodeKeyReused, "send a fresh key with each new request; the same one only to repeat a request as it was",
			"this %s was sent with another request before", keyHeader)
	case kept.Done:
		return &a, nil
	case now.Sub(kept.Created) < answerWait:
		return nil, registry.Refuse(http.StatusConflict, CodeInProgress, "repeat the request with the same key in a second", "the first request with this %s is being carried out", keyHeader)
	}
	return nil, o.lost("its answer was lost with the platform that gave it")
}

// lost refuses a request that was carried out and whose answer can not be given again.
func (o *once) lost(why string) error {
	return registry.Refuse(http.StatusConflict, CodeAnswerLost, "look at what it made; where the answer held a secret, make a fresh one; for anything new, send a fresh key",
		"the request with this %s was carried out, and %s", keyHeader, why)
}

// keep stores the answer: of a request that was carried out, or of one that had nothing to carry out. A caller that has gone meanwhile will ask for it.
func (o *once) keep(ctx context.Context, marked bool, a answered) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), finishLimit)
	defer cancel()
	a.Request = o.request
	b, err := o.sealed(a)
	if err != nil {
		return err
	}
	return o.s.reg.Store.Update(ctx, func(tx store.Tx) error {
		if marked {
			return tx.FinishAnswer(ctx, o.id, b)
		}
		now := o.s.reg.Now()
		return tx.InsertAnswer(ctx, &store.Answer{ID: o.id, Sealed: b, Done: true, Created: now, Expires: now.Add(keyLife)})
	})
}

// keyed says whether an operation takes idempotency keys: the methods that HTTP itself does not let a client repeat (RFC 9110 §9.2.2).
func keyed(op *huma.Operation) bool {
	return (op.Method == http.MethodPost || op.Method == http.MethodPatch) && op.Metadata[reads] == nil && op.Metadata[public] == nil
}

// serve runs the handler of an operation with what all have: idempotency keys, entity tags, preconditions.
func serve[I, O any](ctx context.Context, s *server, op *huma.Operation, in *I, h func(context.Context, *I) (*O, error)) (*O, error) {
	hc, _ := ctx.Value(requestKey{}).(huma.Context)
	key, err := s.once(ctx, hc, op, in)
	if err != nil {
		return nil, err
	}
	if key != nil {
		if a, err := key.look(ctx); a != nil || err != nil {
			return replay[O](hc, a, err)
		}
	}
	cond := s.precondition(hc, op)
	done := func() bool { return false }
	inner := ctx
	if key != nil || cond != nil {
		inner, done = registry.Before(ctx, func(ctx context.Context, tx store.Tx, now time.Time) error {
			if cond != nil {
				if err := cond.hold(ctx); err != nil {
					return err
				}
			}
			if key != nil {
				return key.mark(ctx, tx, now)
			}
			return nil
		})
	}
	out, err := h(inner, in)
	if err == nil && cond != nil && !done() {
		err = cond.hold(ctx) // it changed nothing, and is still refused when it was meant for something else
	}
	if key != nil {
		return settle(ctx, s, hc, key, done(), out, err)
	}
	return tagged(hc, op, out, err)
}

// settle keeps the answer to a request with a key. Where another one with the same key was first, its answer counts.
func settle[O any](ctx context.Context, s *server, hc huma.Context, key *once, marked bool, out *O, err error) (*O, error) {
	if err != nil && !marked {
		// Nothing was done here: the next try counts. A twin may have been faster, which then is why.
		if a, twin := key.look(context.WithoutCancel(ctx)); a != nil || registry.Code(twin) != "" {
			return replay[O](hc, a, twin)
		}
		return nil, err
	}
	var a answered
	if err != nil {
		var refusal *registry.Error
		if !errors.As(err, &refusal) {
			return nil, err // done, and nobody knows how far: as an answer that was lost
		}
		a.Problem = &refusal.Problem
	} else if b, ok := any(out).(interface{ content() any }); ok && out != nil {
		var bad error
		if a.Body, bad = json.Marshal(b.content()); bad != nil {
			return nil, bad
		}
	}
	if lost := key.keep(ctx, marked, a); lost != nil {
		if errors.Is(lost, store.ErrExists) {
			a, twin := key.look(ctx)
			return replay[O](hc, a, twin)
		}
		s.log.Warn("the answer to a request with an idempotency key was not kept", "error", lost)
	}
	if err != nil {
		return nil, err
	}
	return tagged(hc, hc.Operation(), out, nil)
}

// replay answers as before.
func replay[O any](hc huma.Context, a *answered, err error) (*O, error) {
	if err != nil {
		if c := registry.Code(err); c == CodeInProgress {
			hc.SetHeader("Retry-After", "1")
		}
		return nil, err
	}
	hc.SetHeader(replayed, "true")
	if a.Problem != nil {
		return nil, &registry.Error{Problem: *a.Problem}
	}
	out := new(O)
	b, ok := any(out).(interface{ content() any })
	if !ok {
		return nil, nil
	}
	if err := json.Unmarshal(a.Body, b.content()); err != nil {
		return nil, err
	}
	return tagged(hc, hc.Operation(), out, nil)
}

// content is the body of an answer, to fill or to read.
func (b *body[T]) content() any { return &b.Body }

// single says whether answers of type O are one object, and no list.
func single[O any]() bool {
	b, ok := any(new(O)).(interface{ content() any })
	if !ok {
		return false
	}
	t := reflect.TypeOf(b.content()).Elem()
	return !strings.HasPrefix(t.Name(), "List[")
}
