// Package entitlement is the document by which a licence says how much an organization of a platform may have. The licence service signs it
// (package license), a platform verifies it offline against keys that its operator pinned.
//
// It is a compact JWS (RFC 7515) by Ed25519 (RFC 8037), with the type sallyway-entitlement+jws and the id of the key in its header. Documents for the
// same place have serial numbers that only grow: who keeps one refuses a lower one, so an old document with more in it can not come back. A licence
// that is taken back is a document of the next serial that has ended already.
//
//	jws, err := key.Sign(&entitlement.Entitlement{ID: id, Serial: 1, Issuer: "example", Customer: "acme", Organization: "prod", …})
//	e, err := trust.Open(jws)
//	err = e.For(installation, "prod")
//	err = e.Valid(time.Now())
package entitlement

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// Limits of a document.
const (
	// MaxDocument bounds a signed document, in bytes; one is about 600.
	MaxDocument = 16 << 10
	// MaxText bounds the names in it, in bytes.
	MaxText = 200
	// MaxFeatures bounds the list of features.
	MaxFeatures = 100
	// MaxCount bounds a limit: more is no limit at all.
	MaxCount = 1_000_000_000
	// Skew is how much the clocks of issuer and platform may differ.
	Skew = 5 * time.Minute
)

// Errors that callers branch on.
var (
	// ErrUntrusted says that no pinned key has signed a document.
	ErrUntrusted = errors.New("no trusted key has signed the licence")
	// ErrExpired says that a document's time is over.
	ErrExpired = errors.New("the licence has expired")
	// ErrEarly says that a document's time has not come.
	ErrEarly = errors.New("the licence is not valid yet")
	// ErrElsewhere says that a document is for another platform or organization.
	ErrElsewhere = errors.New("the licence is for another place")
)

// Entitlement is what the document says.
type Entitlement struct {
	ID     string `json:"id"`
	Serial int64  `json:"serial"` // grows with every document for the same place; 1 at least
	Issuer string `json:"issuer"`
	// Customer is who has it: a name for people.
	Customer string `json:"customer"`
	// Platform is the id of the installation that it is for; empty is any.
	Platform     string   `json:"platform,omitempty"`
	Organization string   `json:"organization"`
	Limits       Limits   `json:"limits"`
	Features     []string `json:"features,omitempty"`
	// Issued, NotBefore and Expires are whole seconds.
	Issued    time.Time `json:"issued"`
	NotBefore time.Time `json:"not_before"`
	Expires   time.Time `json:"expires"`
	// Contact is whom to ask for more: shown with every refusal.
	Contact string `json:"contact,omitempty"`
	// Reason says why a document ends what was before; empty otherwise.
	Reason string `json:"reason,omitempty"`
}

// Limits are how much there may be; nil is without limit.
type Limits struct {
	Gateways *int64 `json:"gateways,omitempty" minimum:"0"`
	Relays   *int64 `json:"relays,omitempty" minimum:"0"`
	Clients  *int64 `json:"clients,omitempty" minimum:"0"`
	// Bandwidth is in bytes per second, of what all nodes together send through each relay.
	Bandwidth *int64 `json:"bandwidth,omitempty" minimum:"1" doc:"bytes per second"`
}

// Check says what is wrong with a document.
func (e *Entitlement) Check() error {
	for _, f := range []struct {
		name, text string
		required   bool
	}{
		{"id", e.ID, true},
		{"issuer", e.Issuer, true},
		{"customer", e.Customer, true},
		{"platform", e.Platform, false},
		{"organization", e.Organization, true},
		{"contact", e.Contact, false},
		{"reason", e.Reason, false},
	} {
		if err := checkText(f.name, f.text, f.required); err != nil {
			return err
		}
	}
	if len(e.Features) > MaxFeatures {
		return fmt.Errorf("%d features, limit %d", len(e.Features), MaxFeatures)
	}
	for _, f := range e.Features {
		if err := checkText("feature", f, true); err != nil {
			return err
		}
	}
	for name, n := range e.Limits.all() {
		if n != nil && (*n < 0 || name == "bandwidth" && *n == 0 || *n > MaxCount && name != "bandwidth") {
			return fmt.Errorf("limit %s of %d makes no sense (at most %d; a bandwidth is 1 at least)", name, *n, MaxCount)
		}
	}
	for name, t := range map[string]time.Time{"issued": e.Issued, "not_before": e.NotBefore, "expires": e.Expires} {
		if t.Year() < 2000 || t.Year() > 9998 || t.Nanosecond() != 0 {
			return fmt.Errorf("%s is no time in whole seconds", name)
		}
	}
	if e.Serial < 1 {
		return fmt.Errorf("serial %d is less than 1", e.Serial)
	}
	return nil
}

func checkText(name, s string, required bool) error {
	switch {
	case required && s == "":
		return fmt.Errorf("there is no %s", name)
	case len(s) > MaxText:
		return fmt.Errorf("%s of %d bytes, limit %d", name, len(s), MaxText)
	case strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\uFFFD' }):
		return fmt.Errorf("%s holds characters that are no text", name)
	}
	return nil
}

func (l *Limits) all() map[string]*int64 {
	return map[string]*int64{"gateways": l.Gateways, "relays": l.Relays, "clients": l.Clients, "bandwidth": l.Bandwidth}
}

// For says whether the document is for an organization of the platform with an id: ErrElsewhere when not.
func (e *Entitlement) For(platform, org string) error {
	switch {
	case e.Organization != org:
		return fmt.Errorf("%w: it is for the organization %q, this is %q", ErrElsewhere, e.Organization, org)
	case e.Platform != "" && e.Platform != platform:
		return fmt.Errorf("%w: it is for the platform %q, this is %q", ErrElsewhere, e.Platform, platform)
	}
	return nil
}

// Valid says whether the document's time is now: ErrEarly or ErrExpired when not.
func (e *Entitlement) Valid(now time.Time) error {
	switch {
	case !now.Before(e.Expires):
		if e.Reason != "" {
			return fmt.Errorf("%w: it ended on %s: %s", ErrExpired, e.Expires.UTC().Format(time.DateOnly), e.Reason)
		}
		return fmt.Errorf("%w: it ended on %s", ErrExpired, e.Expires.UTC().Format(time.DateOnly))
	case now.Add(Skew).Before(e.NotBefore):
		return fmt.Errorf("%w: it begins at %s, this host's clock says %s", ErrEarly, e.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return nil
}

// encode is the one encoding of a document.
func (e *Entitlement) encode() ([]byte, error) {
	c := *e
	c.Issued, c.NotBefore, c.Expires = seconds(c.Issued), seconds(c.NotBefore), seconds(c.Expires)
	if err := c.Check(); err != nil {
		return nil, err
	}
	return json.Marshal(&c)
}

func seconds(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }

// decode reads a document strictly: an unknown member may be a limit that this program would not hold.
func decode(b []byte) (*Entitlement, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	e := new(Entitlement)
	if err := d.Decode(e); err != nil {
		return nil, fmt.Errorf("licence: %w: a newer program may know it", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("licence: something follows the document")
	}
	if err := e.Check(); err != nil {
		return nil, fmt.Errorf("licence: %w", err)
	}
	again, err := e.encode()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, b) { // members twice, in other cases, other spellings of a time
		return nil, errors.New("licence: it is not in the one encoding that a document has")
	}
	return e, nil
}
