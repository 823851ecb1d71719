package admin

import (
	"context"

	"sallyway/internal/control"
	"sallyway/internal/platformapi"
	"sallyway/internal/version"
)

// pageSize is how many items a list asks for at once.
const pageSize = 200

// Client speaks the admin API for one organization. Its errors are those of link.
type Client struct {
	*platformapi.Client
	org string
}

// NewClient returns a client with a credential, for an organization.
func NewClient(c control.AdminCredential, org string) (*Client, error) {
	p, err := platformapi.New(platformapi.Config{URL: c.URL, Pin: c.Pin, Token: c.Token, UserAgent: "sallyway/" + version.Get().Version})
	if err != nil {
		return nil, err
	}
	return &Client{p, org}, nil
}

// in returns the same client for another organization.
func (c *Client) in(org string) *Client { return &Client{c.Client, org} }

// items are those of a list in one page.
func items[T any](l control.List[T], err error) ([]T, error) {
	if l.Items == nil {
		l.Items = []T{}
	}
	return l.Items, err
}

// The operations of the API that exist for an organization and for the platform are two methods of the client with the same arguments, but for the
// organization. These make them one: in* binds the organization, plain* drops the options that no verb uses.

type option = platformapi.Option

func in0[R any](org string, f func(context.Context, string, ...option) (R, error)) func(context.Context) (R, error) {
	return func(ctx context.Context) (R, error) { return f(ctx, org) }
}

func in1[A, R any](org string, f func(context.Context, string, A, ...option) (R, error)) func(context.Context, A) (R, error) {
	return func(ctx context.Context, a A) (R, error) { return f(ctx, org, a) }
}

func in2[A, B, R any](org string, f func(context.Context, string, A, B, ...option) (R, error)) func(context.Context, A, B) (R, error) {
	return func(ctx context.Context, a A, b B) (R, error) { return f(ctx, org, a, b) }
}

func inDo[A any](org string, f func(context.Context, string, A, ...option) error) func(context.Context, A) error {
	return func(ctx context.Context, a A) error { return f(ctx, org, a) }
}

func plain0[R any](f func(context.Context, ...option) (R, error)) func(context.Context) (R, error) {
	return func(ctx context.Context) (R, error) { return f(ctx) }
}

func plain1[A, R any](f func(context.Context, A, ...option) (R, error)) func(context.Context, A) (R, error) {
	return func(ctx context.Context, a A) (R, error) { return f(ctx, a) }
}

func plain2[A, B, R any](f func(context.Context, A, B, ...option) (R, error)) func(context.Context, A, B) (R, error) {
	return func(ctx context.Context, a A, b B) (R, error) { return f(ctx, a, b) }
}

func plainDo[A any](f func(context.Context, A, ...option) error) func(context.Context, A) error {
	return func(ctx context.Context, a A) error { return f(ctx, a) }
}
