// Package people is who uses the platform: persons with local accounts or single sign-on, their roles in organizations, service accounts,
// and the tokens and browser sessions that stand for them.
//
//	svc := people.New(people.Config{Registry: reg, Log: log})
//	result, err := svc.LogIn(ctx, people.Login{Name: "ada", Password: "…", Source: from})
//	if err == nil && result.Session != nil {
//		people.SetCookie(w, result.Session)
//	}
//	p, err := svc.FromRequest(r)               // who calls: a Principal
//	if err := p.Require("acme", "relays", people.Read); err != nil { … }
//
// What a principal may do is a set of scopes for each organization: a role is a named set, a token of a person or a service account narrows
// or names them. Refusals are *registry.Error, as everywhere. Every change is one transaction with its audit entry.
package people

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// Lives of what people hold.
const (
	SessionIdle  = 8 * time.Hour      // a browser's session without a request
	SessionLife  = 7 * 24 * time.Hour // a browser's session in all
	InviteLife   = 72 * time.Hour     // a link with which a person chooses a password
	SetupLife    = 7 * 24 * time.Hour // the code with which the first owner is made
	secondLife   = 5 * time.Minute    // between password and second factor
	touchEvery   = time.Minute        // last use of sessions and tokens is written as often at most
	purgeEvery   = 10 * time.Minute   // what has expired is removed
	keepTokens   = 30 * 24 * time.Hour
	maxNameRunes = 100
)

// Platform is the organization that stands for the platform itself: a role there holds in every organization.
const Platform = identity.SharedOrg

// Config is what people need.
type Config struct {
	Registry *registry.Registry
	Log      *slog.Logger // nil discards
	// Shared says that other platforms serve the same people: setup codes in their logs stay good when this one starts.
	Shared bool
}

// Service serves all people. Its methods may be called concurrently.
type Service struct {
	reg    *registry.Registry
	log    *slog.Logger
	shared bool
	guard  guard
	hash   hasher
	sso    providers
	// httpPublic and httpPrivate make requests to providers; the former dials public addresses only.
	httpPublic, httpPrivate *http.Client
}

// New makes a service. Run keeps its tables tidy.
func New(cfg Config) *Service {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Service{reg: cfg.Registry, log: cfg.Log, shared: cfg.Shared, httpPublic: providerClient(false), httpPrivate: providerClient(true), hash: newHasher()}
}

// Run removes what has expired, until ctx ends.
func (s *Service) Run(ctx context.Context) error {
	t := time.NewTicker(purgeEvery)
	defer t.Stop()
	for {
		if err := s.purge(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("expired sessions stay for now", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

func (s *Service) purge(ctx context.Context) error {
	now := s.reg.Now()
	return s.reg.Store.Update(ctx, func(tx store.Tx) error {
		return tx.PurgePeople(ctx, now, now.Add(-SessionIdle), now.Add(-keepTokens))
	})
}

// secret makes a random text of 256 bits.
func secret() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return base64.RawURLEncoding.EncodeToString(b)
}

func hashOf(s string) [32]byte { return sha256.Sum256([]byte(s)) }

// clip bounds what is kept of foreign text.
func clip(s string, most int) string {
	s = strings.ToValidUTF8(s, "")
	if r := []rune(s); len(r) > most {
		return string(r[:most])
	}
	return s
}

func notFound(err error) bool { return errors.Is(err, store.ErrNotFound) }

// unauthorized refuses a login. The text is the same for whatever was wrong.
func unauthorized(code, remedy, text string) error {
	return registry.Refuse(http.StatusUnauthorized, code, remedy, "%s", text)
}

func forbidden(remedy, format string, args ...any) error {
	return registry.Refuse(http.StatusForbidden, control.CodeForbidden, remedy, format, args...)
}
