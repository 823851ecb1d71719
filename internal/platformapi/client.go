// Package platformapi is a client of the platform's admin API. Its methods, one for each operation, are generated from the OpenAPI document
// (calls.go); their types are those of package control.
//
//	c, err := platformapi.New(platformapi.Config{URL: url, Pin: pin, Token: token})
//	for relay, err := range c.AllRelays(ctx, "default") { … }
//	made, err := c.CreateGateway(ctx, "default", control.CreateNode{Name: "office"})
//
// A refusal is a *link.Problem, which holds the platform's control.Problem; a failure to reach the platform is a *link.Error. Requests whose
// connection is lost are repeated: those that create or change something carry an Idempotency-Key, so the platform carries them out once.
package platformapi

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
)

//go:generate go run ../../platform/api/generate ../../platform/api/openapi.json calls.go

// Limits of repeated requests.
const (
	tries      = 4                      // of one request, the first included
	firstPause = 200 * time.Millisecond // before the second try; doubled for each further one
	longestAsk = 5 * time.Second        // a Retry-After above this is the caller's to decide
	pageSize   = 200                    // objects that an iterator asks for at once
)

// Config says which platform, and who calls.
type Config struct {
	URL, Pin  string // see link.Config
	Token     string // secret
	UserAgent string
	// Edit adds to the headers of every request, such as a traceparent out of the context; nil adds nothing.
	Edit func(ctx context.Context, h http.Header)
}

// Client speaks the admin API. Its methods may be called concurrently.
type Client struct {
	cfg  Config
	link *link.Link
}

// New returns a client. It opens no connection.
func New(cfg Config) (*Client, error) {
	l, err := link.New(link.Config{URL: cfg.URL, Pin: cfg.Pin, UserAgent: cfg.UserAgent})
	if err != nil {
		return nil, err
	}
	return &Client{cfg: cfg, link: l}, nil
}

// Close closes idle connections.
func (c *Client) Close() { c.link.Close() }

// URL is the platform's URL.
func (c *Client) URL() string { return c.link.URL() }

// Plain reports whether the way is unprotected HTTP to somewhere else than this host.
func (c *Client) Plain() bool { return c.link.Plain() }

// Page is which page of a list; the zero value is the first, of the size that the platform chooses.
type Page struct {
	Limit  int    // objects at most
	Cursor string // NextCursor of the page before
}

func (p Page) values() url.Values {
	v := url.Values{}
	put(v, "limit", p.Limit)
	put(v, "cursor", p.Cursor)
	return v
}

func (p Page) query() string { return encoded(p.values()) }

// put sets a parameter of a query that is not zero.
func put[T comparable](v url.Values, name string, value T) {
	var zero T
	if value == zero {
		return
	}
	if t, ok := any(value).(time.Time); ok {
		v.Set(name, t.Format(time.RFC3339Nano))
		return
	}
	v.Set(name, fmt.Sprint(value))
}

func encoded(v url.Values) string {
	if len(v) == 0 {
		return ""
	}
	return "?" + v.Encode()
}

// Option changes a call.
type Option func(*call)

// call is one request on its way.
type call struct {
	header http.Header
	etag   *string
	once   bool // the platform takes no idempotency key for it
}

// unrepeated is for what has no caller yet, whom a key could belong to.
func unrepeated(c *call) {
	c.once = true
	c.header.Del("Idempotency-Key")
}

// IfMatch has a change refused (412, precondition_failed) when the object is no longer as it was read.
func IfMatch(etag string) Option { return func(c *call) { c.header.Set("If-Match", etag) } }

// ETag receives the entity tag of the object that is answered.
func ETag(to *string) Option { return func(c *call) { c.etag = to } }

// IdempotencyKey replaces the random key of a request: the same one again is the same request, also from another process.
func IdempotencyKey(key string) Option {
	return func(c *call) { c.header.Set("Idempotency-Key", key) }
}

// none is a body or an answer that there is none of.
type none struct{}

// do makes one request. in is none for no body.
func do[Out any](ctx context.Context, c *Client, method, path string, in any, opts []Option) (Out, error) {
	var out Out
	made := call{header: make(http.Header)}
	if method == http.MethodPost || method == http.MethodPatch {
		made.header.Set("Idempotency-Key", rand.Text())
	}
	for _, o := range opts {
		o(&made)
	}
	if c.cfg.Edit != nil {
		c.cfg.Edit(ctx, made.header)
	}
	var answer http.Header
	r := link.Request{Method: method, Path: path, Bearer: c.cfg.Token, Header: made.header, Answer: &answer}
	if _, ok := in.(none); !ok {
		r.JSON = in
	}
	var to any = &out
	if _, ok := to.(*none); ok {
		to = nil
	}
	lost := false // an earlier try may have been carried out
	for try := 1; ; try++ {
		err := c.link.Do(ctx, r, to)
		if err == nil {
			if made.etag != nil {
				*made.etag = answer.Get("ETag")
			}
			return out, nil
		}
		var p *link.Problem
		if lost && method == http.MethodDelete && errors.As(err, &p) && p.Status == http.StatusNotFound {
			return out, nil // the try whose answer was lost did it
		}
		again, pause := repeat(method, err, answer)
		if !again || try == tries || made.once {
			return out, err
		}
		lost = lost || p == nil
		timer := time.NewTimer(max(pause, firstPause<<(try-1)))
		select {
		case <-ctx.Done():
			timer.Stop()
			return out, err
		case <-timer.C:
		}
	}
}

// stream makes a request whose answer is read as it comes.
func stream(ctx context.Context, c *Client, path string, opts []Option) (io.ReadCloser, error) {
	made := call{header: make(http.Header)}
	for _, o := range opts {
		o(&made)
	}
	if c.cfg.Edit != nil {
		c.cfg.Edit(ctx, made.header)
	}
	return c.link.Stream(ctx, link.Request{Method: http.MethodGet, Path: path, Bearer: c.cfg.Token, Header: made.header})
}

// repeat says whether a request that failed is worth another try, and after which pause.
func repeat(method string, err error, answer http.Header) (bool, time.Duration) {
	var e *link.Error
	if errors.As(err, &e) {
		// The platform closed the connection, or a balancer did: it restarts. Whether the request was carried out, nobody here knows.
		return e.Kind == link.Broken && method != http.MethodPut, 0
	}
	var p *link.Problem
	if !errors.As(err, &p) || p.Status != http.StatusTooManyRequests && p.Code != codeInProgress {
		return false, 0
	}
	seconds, bad := strconv.Atoi(answer.Get("Retry-After"))
	pause := time.Duration(seconds) * time.Second
	return bad == nil && seconds >= 0 && pause <= longestAsk, pause
}

// codeInProgress says that the first try of a request is still being carried out.
const codeInProgress = "idempotency_key_in_progress"

// each walks over a list, page after page.
func each[T any](ctx context.Context, read func(context.Context, Page) (control.List[T], error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		p := Page{Limit: pageSize}
		for {
			l, err := read(ctx, p)
			if err != nil {
				yield(none, err)
				return
			}
			for _, v := range l.Items {
				if !yield(v, nil) {
					return
				}
			}
			if l.NextCursor == "" || l.NextCursor == p.Cursor {
				return
			}
			p.Cursor = l.NextCursor
		}
	}
}

// Collect reads all that an iterator of this package yields.
func Collect[T any](seq iter.Seq2[T, error]) ([]T, error) {
	items := []T{}
	for v, err := range seq {
		if err != nil {
			return nil, err
		}
		items = append(items, v)
	}
	return items, nil
}

// segment escapes a word of a path.
func segment(s string) string {
	switch s {
	case ".", "..": // net/url leaves them, and a client's net/http would walk up
		return strings.ReplaceAll(s, ".", "%2E")
	}
	return url.PathEscape(s)
}
