package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/pki"
	"sallyway/platform/presence"
	"sallyway/platform/store"
)

// KindServer is the kind of the platform's own HTTPS certificate among those that are warned of.
const KindServer = "server"

// ServerCertificate is the platform's own HTTPS certificate.
type ServerCertificate struct {
	NotAfter time.Time
	// Renews says that it is made anew by itself, long before.
	Renews bool
}

// thresholds are the days before the end of what lives long at which a warning is given, each once; 0 is the end itself.
var thresholds = []int{0, 1, 7, 30} // ascending

// lateShare is the part of its life before the end of which a leaf is renewed: it is at half of it, with jitter.
const lateShare = 4

// Expiring is a certificate that ends soon.
type Expiring struct {
	Action  string // of the audit entry: authority.expiring, certificate.expiring, certificate.renewal-late
	Subject string // what it is
	Kind    string
	Ends    time.Time
	Days    int // the threshold that it is below
	Remedy  string
}

// threshold is the lowest one that what ends at end is below.
func threshold(end, now time.Time, most int) (days int, ok bool) {
	for _, d := range thresholds {
		if d <= most && end.Sub(now) <= time.Duration(d)*24*time.Hour {
			return d, true
		}
	}
	return 0, false
}

// Expiring lists what ends soon in an organization, and the platform's own certificate in identity.SharedOrg. A node that is not there can not
// renew: its leaf is no news.
func (r *Registry) Expiring(ctx context.Context, org string) ([]Expiring, error) {
	now := r.Now()
	certs, err := r.Certificates(ctx, org)
	if err != nil {
		return nil, err
	}
	var out []Expiring
	for _, c := range certs {
		switch {
		case c.CA && c.State == store.Retiring, c.NotAfter.IsZero():
		case c.CA:
			if days, ok := threshold(c.NotAfter, now, 30); ok {
				e := Expiring{Action: "authority.expiring", Subject: fmt.Sprintf("%s CA %d", c.Kind, c.Generation), Kind: c.Kind, Ends: c.NotAfter, Days: days}
				e.Remedy = fmt.Sprintf("sallyway --org %s ca rotate --kind %s --plan", org, c.Kind)
				if c.Kind == pki.KindTLS {
					e.Remedy = "give the platform a certificate with --tls-cert, and nodes new tokens"
				}
				out = append(out, e)
			}
		case r.late(&c, now):
			out = append(out, Expiring{
				Action: "certificate.renewal-late", Subject: identity.Node{Org: org, Kind: identity.Kind(c.Kind), ID: c.Node}.String(), Kind: c.Kind, Ends: c.NotAfter,
				Remedy: "see why on its host: " + map[string]string{"relay": "relayd status", "gateway": "gatewayd status"}[c.Kind],
			})
		}
	}
	if org == identity.SharedOrg && r.Server != nil {
		s, most := r.Server(), 30
		if s.Renews {
			most = 7 // nobody has to do anything before
		}
		if days, ok := threshold(s.NotAfter, now, most); ok && !s.NotAfter.IsZero() {
			out = append(out, Expiring{
				Action: "certificate.expiring", Subject: "HTTPS certificate", Kind: KindServer, Ends: s.NotAfter, Days: days,
				Remedy: "replace the files of --tls-cert and --tls-key: they are read again by themselves",
			})
		}
	}
	return out, nil
}

// late says whether a node is there and has not renewed a leaf that it should have.
func (r *Registry) late(c *CertificateRecord, now time.Time) bool {
	beat, ok := r.Board.Get(c.Node)
	return c.Renews && ok && now.Sub(beat.At) < presence.Timeout && c.NotAfter.Sub(now) < r.life()/lateShare
}

// WarnExpiring tells of what ends soon, each threshold once: a line in the log, and an entry in the audit chain, which webhooks deliver.
func (r *Registry) WarnExpiring(ctx context.Context, org string) error {
	found, err := r.Expiring(ctx, org)
	if err != nil {
		return err
	}
	var known []*store.ExpiryWarning
	if err := r.Store.View(ctx, func(tx store.Tx) (err error) {
		known, err = tx.ExpiryWarnings(ctx, org)
		return err
	}); err != nil || len(found)+len(known) == 0 {
		return err
	}
	var told []Expiring
	err = r.update(ctx, func(c *change) error {
		told = nil
		known, err := c.ExpiryWarnings(ctx, org) // another replica may have been faster
		if err != nil {
			return err
		}
		was := make(map[string]*store.ExpiryWarning, len(known))
		for _, w := range known {
			was[w.Subject] = w
		}
		for _, e := range found {
			w := was[e.Subject]
			delete(was, e.Subject)
			ends := e.Ends.UTC().Truncate(time.Microsecond)
			if w != nil && w.Ends.Equal(ends) && w.Days <= e.Days {
				continue
			}
			told = append(told, e)
			if err := errors.Join(
				c.PutExpiryWarning(ctx, &store.ExpiryWarning{Org: org, Subject: e.Subject, Ends: ends, Days: e.Days}),
				c.audit(ctx, org, e.Action, e.Subject, audit.OK, map[string]any{"kind": e.Kind, "not_after": ends.Format(time.RFC3339), "days": e.Days, "remedy": e.Remedy}),
			); err != nil {
				return err
			}
		}
		for subject := range was { // renewed, or gone
			if err := c.DeleteExpiryWarning(ctx, org, subject); err != nil {
				return err
			}
		}
		return nil
	})
	for _, e := range told {
		if err == nil {
			r.Log.Warn("a certificate ends soon", "org", org, "what", e.Subject, "kind", e.Kind, "not_after", e.Ends.UTC().Format(time.RFC3339), "remedy", e.Remedy)
		}
	}
	return err
}

// Ends is the soonest end of the certificates of an organization, by what they are ("ca" or "node") and kind. CAs that retire are left out, and so are
// nodes that are not there. In identity.SharedOrg the platform's own is among them.
func (r *Registry) Ends(ctx context.Context, org string) (map[[2]string]time.Time, error) {
	certs, err := r.Certificates(ctx, org)
	if err != nil {
		return nil, err
	}
	now := r.Now()
	out := make(map[[2]string]time.Time)
	note := func(what, kind string, end time.Time) {
		key := [2]string{what, kind}
		if have, ok := out[key]; !end.IsZero() && (!ok || end.Before(have)) {
			out[key] = end
		}
	}
	for _, c := range certs {
		if c.CA {
			if c.State != store.Retiring {
				note("ca", c.Kind, c.NotAfter)
			}
			continue
		}
		if beat, ok := r.Board.Get(c.Node); ok && c.Renews && now.Sub(beat.At) < presence.Timeout {
			note("node", c.Kind, c.NotAfter)
		}
	}
	if org == identity.SharedOrg && r.Server != nil {
		note(KindServer, KindServer, r.Server().NotAfter)
	}
	return out, nil
}

// expiryInterval is how often certificates are looked at for their end.
const expiryInterval = time.Hour

// ExpiryDue says whether it is time to look, and takes it as done.
func (r *Registry) ExpiryDue() bool {
	now := r.Now().UnixNano()
	last := r.expiryLooked.Load()
	every := min(expiryInterval, cmp.Or(r.life()/lateShare, expiryInterval))
	return (last == 0 || time.Duration(now-last) >= every) && r.expiryLooked.CompareAndSwap(last, now)
}
