package registry

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/pki"
	"sallyway/platform/store"
	"sallyway/relay/wire"
)

// RelayTarget is a relay as it is tried from outside, and by what it shows that it is itself.
type RelayTarget struct {
	Node                   identity.Node
	Name, Host             string
	Port, SSHPort, TLSPort uint16 // the last two are 0 where there is none
	Roots                  []*x509.Certificate
	Pins                   []identity.KeyHash
}

// targetsMost is how many relays of one organization are tried: whoever may make relays has the platform send packets where they say.
const targetsMost = 256

// forgotten is for how long a relay that is silent is still tried.
const forgotten = 24 * time.Hour

// RelayTargets are the relays of all organizations and of the platform that are in service.
func (r *Registry) RelayTargets(ctx context.Context) ([]RelayTarget, error) {
	var out []RelayTarget
	err := r.Store.View(ctx, func(tx store.Tx) error {
		out = nil
		orgs, err := tx.Orgs(ctx, store.Page{})
		if err != nil {
			return err
		}
		now := r.Now()
		for _, o := range orgs {
			ns, err := tx.Nodes(ctx, o.Name, identity.Relay, store.Page{})
			if err != nil {
				return err
			}
			tried := 0
			var roots []*x509.Certificate
			var pins []identity.KeyHash
			var rungs map[string]*store.RelayRungs
			for _, n := range ns {
				if n.Status != store.Active || n.Enrolled.IsZero() || n.Host == "" || now.Sub(r.Board.LastSeen(n)) > forgotten || tried == targetsMost {
					continue
				}
				tried++
				if rungs == nil {
					if roots, pins, err = relayTrust(ctx, tx, o.Name); err != nil {
						return err
					}
					if rungs, err = tx.RelayRungs(ctx, o.Name); err != nil {
						return err
					}
				}
				t := RelayTarget{Node: n.Identity(), Name: n.Name, Host: n.Host, Port: n.Port, Roots: roots, Pins: pins}
				if t.Port == 0 {
					t.Port = wire.Port
				}
				if rung := rungs[n.ID]; rung != nil {
					t.SSHPort, t.TLSPort = rung.SSHPort, rung.TLSPort
				}
				out = append(out, t)
			}
		}
		return nil
	})
	return out, err
}

// relayTrust is by what relays of an organization show who they are: every root, and every CA that issues to relays.
func relayTrust(ctx context.Context, tx store.Tx, org string) (roots []*x509.Certificate, pins []identity.KeyHash, err error) {
	as, err := tx.Authorities(ctx, org)
	if err != nil {
		return nil, nil, err
	}
	for _, a := range as {
		if a.Kind != pki.KindRoot && a.Kind != string(identity.Relay) {
			continue
		}
		c, err := x509.ParseCertificate(a.Certificate)
		if err != nil {
			return nil, nil, fmt.Errorf("certificate of the %s CA of %s: %w", a.Kind, org, err)
		}
		if a.Kind == pki.KindRoot {
			roots = append(roots, c)
		} else {
			pins = append(pins, identity.CertificateKeyHash(c))
		}
	}
	return roots, pins, nil
}

// FoundOutside writes down what was found of all relays, by id, audits what changed, and shows it. Relays that are not in it are forgotten.
func (r *Registry) FoundOutside(ctx context.Context, found map[string]control.Outside) error {
	return r.foundOutside(ctx, found, true)
}

// FoundOutsideOf is FoundOutside of some relays: what is known of others stays.
func (r *Registry) FoundOutsideOf(ctx context.Context, found map[string]control.Outside) error {
	return r.foundOutside(ctx, found, false)
}

func (r *Registry) foundOutside(ctx context.Context, found map[string]control.Outside, whole bool) error {
	now := r.Now()
	all := make(map[string]control.Outside, len(found))
	err := r.update(ctx, func(c *change) error {
		clear(all)
		rows, err := c.RelayProbes(ctx)
		if err != nil {
			return err
		}
		before := make(map[string]control.Outside, len(rows))
		for _, p := range rows {
			var o control.Outside
			if json.Unmarshal(p.Found, &o) == nil {
				before[p.Relay] = o
			}
			if _, still := found[p.Relay]; !still {
				if !whole {
					if was, ok := before[p.Relay]; ok {
						all[p.Relay] = was
					}
					continue
				}
				if err := c.DropRelayProbe(ctx, p.Relay); err != nil {
					return err
				}
			}
		}
		for id, o := range found {
			n, err := c.Node(ctx, id)
			if err != nil || !n.Deleted.IsZero() {
				continue // gone meanwhile
			}
			was := before[id]
			if o.Since = now; was.State == o.State {
				o.Since = was.Since
			}
			b, err := json.Marshal(o)
			if err != nil {
				return err
			}
			if err := c.PutRelayProbe(ctx, &store.RelayProbe{Relay: id, At: o.At, Found: b}); err != nil {
				return err
			}
			all[id] = o
			if err := c.auditOutside(ctx, n, &was, &o); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		r.Board.SetOutside(all)
	}
	return err
}

// reached says whether a relay was reached in full, and whether that is known.
func reached(o *control.Outside) (yes, known bool) {
	return o.State == control.OutsideReached, o.State != "" && o.State != control.OutsideNotProbed
}

func (c *change) auditOutside(ctx context.Context, n *store.Node, was, is *control.Outside) error {
	yes, known := reached(is)
	before, knew := reached(was)
	if !known || (knew && yes == before) || (!knew && yes) {
		return nil
	}
	action, detail := "relay.reached", map[string]any{"name": n.Name}
	if !yes {
		action, detail["why"], detail["remedy"] = "relay.unreached", is.Why, is.Remedy
	}
	c.r.Log.Info("relay from outside", "org", n.Org, "relay", n.Name, "state", is.State, "why", is.Why)
	return c.audit(ctx, n.Org, action, n.Identity().String(), audit.OK, detail)
}

// LoadOutside shows what another platform found.
func (r *Registry) LoadOutside(ctx context.Context) error {
	var all map[string]control.Outside
	err := r.Store.View(ctx, func(tx store.Tx) error {
		rows, err := tx.RelayProbes(ctx)
		all = make(map[string]control.Outside, len(rows))
		for _, p := range rows {
			var o control.Outside
			if json.Unmarshal(p.Found, &o) == nil {
				all[p.Relay] = o
			}
		}
		return err
	})
	if err == nil {
		r.Board.SetOutside(all)
	}
	return err
}
