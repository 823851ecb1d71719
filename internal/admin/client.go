package admin

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/identity"
	"sallyway/internal/version"
)

// pageSize is how many items a list asks for at once.
const pageSize = 200

// Client speaks the admin API for one organization. Its errors are those of link.
type Client struct {
	link  *link.Link
	token string // secret
	org   string
}

// NewClient returns a client with a credential, for an organization.
func NewClient(c control.AdminCredential, org string) (*Client, error) {
	l, err := link.New(link.Config{URL: c.URL, Pin: c.Pin, UserAgent: "sallyway/" + version.Get().Version})
	if err != nil {
		return nil, err
	}
	return &Client{link: l, token: c.Token, org: org}, nil
}

// in returns the same client for another organization.
func (c *Client) in(org string) *Client {
	other := *c
	other.org = org
	return &other
}

// Close closes idle connections.
func (c *Client) Close() { c.link.Close() }

// path joins the organization's path with escaped segments. Relays that organizations share have a path of their own.
func (c *Client) path(segments ...string) string {
	p := orgsPath + "/" + url.PathEscape(c.org)
	if c.org == identity.SharedOrg {
		p = sharedPath
	}
	for _, s := range segments {
		p += "/" + url.PathEscape(s)
	}
	return p
}

// chain is path for what the platform itself has, too, under the name of an organization: its audit log, and webhooks on that.
func (c *Client) chain(segments ...string) string {
	p := orgsPath + "/" + url.PathEscape(c.org)
	for _, s := range segments {
		p += "/" + url.PathEscape(s)
	}
	return p
}

const (
	orgsPath   = "/api/v1/orgs"
	sharedPath = "/api/v1/shared"
)

// send makes one request. in and out may be nil.
func (c *Client) send(ctx context.Context, method, path string, in, out any) error {
	return c.link.Do(ctx, link.Request{Method: method, Path: path, Bearer: c.token, JSON: in}, out)
}

// stream reads an answer of many lines; the caller closes it.
func (c *Client) stream(ctx context.Context, path string) (io.ReadCloser, error) {
	return c.link.Stream(ctx, link.Request{Method: http.MethodGet, Path: path, Bearer: c.token})
}

// get reads one document.
func get[T any](ctx context.Context, c *Client, path string) (T, error) {
	var doc T
	err := c.send(ctx, http.MethodGet, path, nil, &doc)
	return doc, err
}

// post sends a document (nil: none) and reads the answer.
func post[T any](ctx context.Context, c *Client, path string, in any) (T, error) {
	var doc T
	err := c.send(ctx, http.MethodPost, path, in, &doc)
	return doc, err
}

// patch changes an object and reads it.
func patch[T any](ctx context.Context, c *Client, path string, in any) (T, error) {
	var doc T
	err := c.send(ctx, http.MethodPatch, path, in, &doc)
	return doc, err
}

// remove deletes an object.
func (c *Client) remove(ctx context.Context, path string) error {
	return c.send(ctx, http.MethodDelete, path, nil, nil)
}

// page reads one page of a list.
func page[T any](ctx context.Context, c *Client, path, cursor string) (control.List[T], error) {
	q := url.Values{"limit": {strconv.Itoa(pageSize)}}
	if cursor != "" {
		q.Set("cursor", cursor)
	}
	return get[control.List[T]](ctx, c, path+"?"+q.Encode())
}

// all reads a whole list.
func all[T any](ctx context.Context, c *Client, path string) ([]T, error) {
	items := []T{}
	for cursor := ""; ; {
		p, err := page[T](ctx, c, path, cursor)
		if err != nil {
			return nil, err
		}
		items = append(items, p.Items...)
		if p.NextCursor == "" || p.NextCursor == cursor {
			return items, nil
		}
		cursor = p.NextCursor
	}
}
