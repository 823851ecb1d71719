package registry

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/version"
	"sallyway/platform/audit"
	"sallyway/platform/presence"
	"sallyway/platform/store"
	"sallyway/platform/view"
	"sallyway/relay/reverse"
	"sallyway/relay/wire"
)

const presenceTimeout = presence.Timeout

// lookups are what the records of several nodes of an organization are made from, read once in a transaction. The zero value is ready.
type lookups struct {
	rungs    map[string]*store.RelayRungs
	assigned map[string][]string // ids of relays, by gateway
	names    map[string]string   // of relays by id, "" for a deleted one
	wishes   map[string]*store.Wishes
	trips    map[string]RoundTrip // of relays
}

func (l *lookups) relayRungs(ctx context.Context, tx store.Tx, org string) (_ map[string]*store.RelayRungs, err error) {
	if l.rungs == nil {
		l.rungs, err = tx.RelayRungs(ctx, org)
	}
	return l.rungs, err
}

// relays are the names of the relays that are assigned to a gateway, active first.
func (l *lookups) relays(ctx context.Context, tx store.Tx, g *store.Node) (names []string, err error) {
	if l.assigned == nil {
		if l.assigned, err = tx.Assignments(ctx, g.Org); err != nil {
			return nil, err
		}
		l.names = make(map[string]string)
	}
	for _, id := range l.assigned[g.ID] {
		name, known := l.names[id]
		if !known {
			if relay, err := tx.Node(ctx, id); err == nil && relay.Deleted.IsZero() {
				name = relay.Name
			}
			l.names[id] = name
		}
		if name != "" {
			names = append(names, name)
		}
	}
	return names, nil
}

// record is a node as administrators see it.
func (r *Registry) record(ctx context.Context, tx store.Tx, o *store.Org, n *store.Node) (*control.NodeRecord, error) {
	return r.recordBy(ctx, tx, o, n, new(lookups))
}

// recordBy is record for one of several nodes of an organization, which share l.
func (r *Registry) recordBy(ctx context.Context, tx store.Tx, o *store.Org, n *store.Node, l *lookups) (*control.NodeRecord, error) {
	rec := &control.NodeRecord{
		ID: n.ID, Name: n.Name, Kind: n.Kind, State: r.Board.State(n, r.Now()), Created: n.Created, Version: n.Version,
		Virtual: view.Addresses(o, n.Address), Host: n.Host, Port: n.Port, Peers: n.Peers,
	}
	if n.Kind == identity.Relay {
		rungs, err := l.relayRungs(ctx, tx, n.Org)
		if err != nil {
			return nil, err
		}
		if r := rungs[n.ID]; r != nil {
			rec.SSHPort, rec.TLSPort = r.SSHPort, r.TLSPort
		}
	}
	if n.NextHost != "" {
		rec.NextHost, rec.NextFrom = n.NextHost, &n.NextFrom
	}
	if !n.Enrolled.IsZero() {
		rec.Enrolled = &n.Enrolled
	}
	if n.Kind == identity.Client {
		login, err := ownerOf(ctx, tx, n.ID)
		if err != nil {
			return nil, err
		}
		rec.Person = login
	}
	if seen := r.Board.LastSeen(n); !seen.IsZero() {
		rec.LastSeen = &seen
	}
	if beat, ok := r.Board.Get(n.ID); ok {
		rec.Version, rec.Problems, rec.Load = clip(beat.Version, 64), beat.Problems, beat.Load
	}
	rec.Outdated = rec.Enrolled != nil && version.Outdated(rec.Version)
	keys, err := tx.Keys(ctx, n.ID)
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		if k.Enrolment == n.Enrolment {
			rec.Key, rec.NotAfter = &k.Hash, &k.NotAfter
			break
		}
	}
	if rec.Authentication, rec.AWS, err = authentication(ctx, tx, n); err != nil {
		return nil, err
	}
	if n.Kind == identity.Gateway {
		if rec.Relays, err = l.relays(ctx, tx, n); err != nil {
			return nil, err
		}
		if why := r.places.reasons(n.Org, n.ID, l.assigned[n.ID]); len(why) == len(rec.Relays) || len(rec.Relays) == 0 {
			rec.RelayReasons = why
		}
	}
	return rec, r.fillPlaces(ctx, tx, n, rec, l)
}

// Nodes lists the nodes of a kind.
func (r *Registry) Nodes(ctx context.Context, org string, kind identity.Kind, p store.Page) (*control.List[control.NodeRecord], error) {
	out := &control.List[control.NodeRecord]{Items: []control.NodeRecord{}}
	err := r.Store.View(ctx, func(tx store.Tx) error {
		o, err := findOrg(ctx, tx, org)
		if err != nil {
			return err
		}
		ns, err := tx.Nodes(ctx, org, kind, more(p))
		if err != nil {
			return err
		}
		ns, out.NextCursor = trim(ns, p.Limit, func(n *store.Node) string { return n.Name })
		var l lookups
		for _, n := range ns {
			rec, err := r.recordBy(ctx, tx, o, n, &l)
			if err != nil {
				return err
			}
			out.Items = append(out.Items, *rec)
		}
		return nil
	})
	return out, err
}

// Node returns a node by name or id.
func (r *Registry) Node(ctx context.Context, org string, kind identity.Kind, name string) (*control.NodeRecord, error) {
	var out *control.NodeRecord
	err := r.Store.View(ctx, func(tx store.Tx) error {
		o, err := findOrg(ctx, tx, org)
		if err != nil {
			return err
		}
		n, err := tx.FindNode(ctx, org, kind, name)
		if err != nil {
			return notFound(err, string(kind), name, org)
		}
		out, err = r.record(ctx, tx, o, n)
		return err
	})
	return out, err
}

// change finds a node and lets fn alter it; what fn altered is written, audited as action and pushed.
func (r *Registry) changeNode(ctx context.Context, org string, kind identity.Kind, name, action string,
	fn func(c *change, n *store.Node) (map[string]any, error),
) (*control.NodeRecord, error) {
	var out *control.NodeRecord
	err := r.update(ctx, func(c *change) error {
		o, err := c.org(ctx, org)
		if err != nil {
			return err
		}
		n, err := c.FindNode(ctx, org, kind, name)
		if err != nil {
			return notFound(err, string(kind), name, org)
		}
		detail, err := fn(c, n)
		if err != nil {
			return err
		}
		if err := c.UpdateNode(ctx, n); err != nil {
			return taken(err, string(kind), n.Name, org)
		}
		if detail == nil {
			detail = map[string]any{}
		}
		detail["name"] = n.Name
		if err := c.audit(ctx, org, action, n.Identity().String(), audit.OK, detail); err != nil {
			return err
		}
		if err := c.bump(ctx, org); err != nil {
			return err
		}
		out, err = r.record(ctx, c.Tx, o, n)
		return err
	})
	return out, err
}

// CreateNode makes a node and its first enrolment token.
func (r *Registry) CreateNode(ctx context.Context, org string, kind identity.Kind, req control.CreateNode) (*control.CreatedNode, error) {
	return r.CreateNodeOf(ctx, org, kind, req, nil)
}

// CreateNodeOf is CreateNode with something more in the same transaction; also may be nil, and its error undoes all.
func (r *Registry) CreateNodeOf(ctx context.Context, org string, kind identity.Kind, req control.CreateNode,
	also func(c *Change, n *store.Node) error,
) (*control.CreatedNode, error) {
	if err := checkName(string(kind), req.Name); err != nil {
		return nil, err
	}
	if kind != identity.Relay && (req.Host != "" || req.Port != 0 || len(req.Peers) > 0) {
		return nil, invalid("body.host", "leave out host, port and peers", "only relays have a host, a port and peers")
	}
	if kind == identity.Relay {
		if err := checkHost(req.Host); err != nil {
			return nil, err
		}
		if err := checkPeers(req.Peers); err != nil {
			return nil, err
		}
		if req.Port == 0 {
			req.Port = wire.Port
		}
	}
	if req.Authentication == "" {
		req.Authentication = control.AuthToken
	}
	if err := r.checkAuthentication(kind, req.Authentication, req.AWS); err != nil {
		return nil, err
	}
	var out *control.CreatedNode
	err := r.update(ctx, func(c *change) error {
		o, err := c.org(ctx, org)
		if err != nil {
			return err
		}
		if err := c.room(ctx, org, kind, false); err != nil {
			return err
		}
		n := &store.Node{
			ID: identity.NewID(kind), Org: org, Kind: kind, Name: req.Name, Status: store.Active, Host: req.Host, Port: req.Port, Peers: req.Peers, Created: c.now,
		}
		if kind != identity.Relay {
			if n.Address, err = c.address(ctx, org); err != nil {
				return err
			}
		}
		if err := c.InsertNode(ctx, n); err != nil {
			return taken(err, string(kind), req.Name, org)
		}
		if also != nil {
			if err := also(&Change{c}, n); err != nil {
				return err
			}
		}
		if kind == identity.Relay {
			if err := c.newRelayKey(ctx, n.ID); err != nil {
				return err
			}
		}
		detail := map[string]any{"name": n.Name, "host": n.Host}
		if err := c.setPlaces(ctx, n, created(req.Places), detail); err != nil {
			return err
		}
		if req.Authentication == control.AuthAWS {
			if err := c.setAWS(ctx, n, req.AWS, detail); err != nil {
				return err
			}
		}
		if err := c.audit(ctx, org, "node.create", n.Identity().String(), audit.OK, detail); err != nil {
			return err
		}
		if out, err = c.issueToken(ctx, o, n); err != nil {
			return err
		}
		return c.bump(ctx, org)
	})
	if Code(err) == control.CodeLicenceLimit {
		if e := r.refused(ctx, org, "licence.limit", string(kind), control.CodeLicenceLimit, actor(ctx)); e != nil {
			return nil, e
		}
	}
	return out, err
}

// issueToken makes an enrolment token for a node and drops the ones that were not used. A node that enrols by AWS gets its commands alone.
func (c *change) issueToken(ctx context.Context, o *store.Org, n *store.Node) (*control.CreatedNode, error) {
	if out, err := c.awsCommands(ctx, o, n); out != nil || err != nil {
		return out, err
	}
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		return nil, err
	}
	if err := c.DropEnrolmentTokens(ctx, n.ID); err != nil {
		return nil, err
	}
	t := &store.EnrolmentToken{
		Hash: sha256.Sum256(secret), Node: n.ID, Org: n.Org, Kind: n.Kind, Created: c.now, Expires: c.now.Add(cmp.Or(c.r.TokenLife, control.TokenLife)),
	}
	if err := c.InsertEnrolmentToken(ctx, t); err != nil {
		return nil, err
	}
	err := c.audit(ctx, n.Org, "token.issue", n.Identity().String(), audit.OK, map[string]any{"name": n.Name, "expires": t.Expires.Format(time.RFC3339)})
	if err != nil {
		return nil, err
	}
	rec, err := c.r.record(ctx, c.Tx, o, n)
	if err != nil {
		return nil, err
	}
	token := control.Token{URL: c.r.URL, Pin: c.r.Pin, Node: n.Identity(), Name: n.Name, Secret: secret}.String()
	out := &control.CreatedNode{NodeRecord: *rec, Token: token, Expires: t.Expires}
	out.Command, out.Foreground = commands(n.Kind, token)
	return out, nil
}

// commands are the deploy commands of a node: the token goes in on standard input, so that it is in no argument list.
func commands(k identity.Kind, token string) (production, foreground string) {
	feed := " --token-file - <<< '" + token + "'"
	switch k {
	case identity.Relay:
		return "sudo relayd install" + feed, "relayd start" + feed
	case identity.Gateway:
		return "sudo gatewayd install" + feed, "sudo gatewayd up" + feed
	}
	return "sudo sallyway connect" + feed, "sallyway connect" + feed
}

// ReissueToken makes a new enrolment token for a node. A revoked node may enrol again with it, by a new key.
func (r *Registry) ReissueToken(ctx context.Context, org string, kind identity.Kind, name string) (*control.CreatedNode, error) {
	var out *control.CreatedNode
	err := r.update(ctx, func(c *change) error {
		o, err := c.org(ctx, org)
		if err != nil {
			return err
		}
		n, err := c.FindNode(ctx, org, kind, name)
		if err != nil {
			return notFound(err, string(kind), name, org)
		}
		switch n.Status {
		case store.Disabled:
			return refuse(http.StatusConflict, control.CodeNodeDisabled, fmt.Sprintf("sallyway --org %s %s enable %s", org, kind, n.Name),
				"%s %q is disabled and can not enrol", kind, n.Name)
		case store.Revoked:
			n.Status, n.Enrolled = store.Active, time.Time{}
			n.Enrolment++ // none of its old keys belongs to this one
			if err := c.UpdateNode(ctx, n); err != nil {
				return err
			}
			if err := c.bump(ctx, org); err != nil {
				return err
			}
		}
		out, err = c.issueToken(ctx, o, n)
		return err
	})
	return out, err
}

// maxNotice is how far ahead the change of a relay's address can be announced.
const maxNotice = 366 * 24 * time.Hour

// MoveDue reports whether an announced address may have to come into force by now: so that nobody asks the database for nothing.
func (r *Registry) MoveDue(now time.Time) bool {
	next := r.nextMove.Load()
	return next != 0 && now.UnixMicro() >= next
}

// ForgetMoves forgets what is announced; MoveRelays of every organization finds it again.
func (r *Registry) ForgetMoves() { r.nextMove.Store(0) }

// announce notes when an announced address comes into force.
func (r *Registry) announce(at time.Time) {
	for {
		next := r.nextMove.Load()
		if next != 0 && next <= at.UnixMicro() || r.nextMove.CompareAndSwap(next, at.UnixMicro()) {
			return
		}
	}
}

// MoveRelays puts announced addresses in force whose time has come, and notes when the next one's comes.
func (r *Registry) MoveRelays(ctx context.Context, org string) error {
	due := func(n *store.Node) bool { return n.NextHost != "" && !n.NextFrom.After(r.Now()) }
	var ns []*store.Node
	err := r.Store.View(ctx, func(tx store.Tx) (err error) {
		ns, err = tx.Nodes(ctx, org, identity.Relay, store.Page{})
		return err
	})
	if err != nil {
		return err
	}
	for _, n := range ns {
		if n.NextHost != "" && !due(n) {
			r.announce(n.NextFrom)
		}
	}
	if !slices.ContainsFunc(ns, due) {
		return nil
	}
	return r.update(ctx, func(c *change) error {
		ns, err := c.Nodes(ctx, org, identity.Relay, store.Page{}) // what was read before may be old
		if err != nil {
			return err
		}
		for _, n := range ns {
			if !due(n) {
				continue
			}
			before := n.Host
			n.Host, n.NextHost, n.NextFrom = n.NextHost, "", time.Time{}
			if err := c.UpdateNode(ctx, n); err != nil {
				return err
			}
			if err := c.audit(ctx, org, "relay.move", n.Identity().String(), audit.OK, map[string]any{"name": n.Name, "host": n.Host, "before": before}); err != nil {
				return err
			}
			r.Log.Info("relay moved to its announced address", "org", org, "relay", n.Name, "host", n.Host, "before", before)
		}
		return c.bump(ctx, org)
	})
}

// UpdateNode changes what is not nil.
func (r *Registry) UpdateNode(ctx context.Context, org string, kind identity.Kind, name string, req control.UpdateNode) (*control.NodeRecord, error) {
	return r.changeNode(ctx, org, kind, name, "node.update", func(c *change, n *store.Node) (map[string]any, error) {
		detail := map[string]any{}
		if req.Name != nil {
			if err := checkName(string(kind), *req.Name); err != nil {
				return nil, err
			}
			detail["old_name"] = n.Name
			n.Name = *req.Name
		}
		if kind != identity.Relay && (req.Host != nil || req.Port != nil || req.Peers != nil || req.SSHPort != nil || req.TLSPort != nil) {
			return nil, invalid("body.host", "leave out host, port and peers", "only relays have a host, a port and peers")
		}
		if req.Host != nil {
			if err := checkHost(*req.Host); err != nil {
				return nil, err
			}
			switch {
			case req.From != nil && req.From.After(c.now) && *req.Host != n.Host:
				if req.From.After(c.now.Add(maxNotice)) {
					return nil, invalid("body.from", "a year ahead at most", "%v is too far ahead", req.From)
				}
				n.NextHost, n.NextFrom = *req.Host, req.From.UTC().Truncate(time.Microsecond)
				r.announce(n.NextFrom)
				detail["next_host"], detail["next_from"] = n.NextHost, n.NextFrom.Format(time.RFC3339)
			default:
				n.Host, n.NextHost, n.NextFrom = *req.Host, "", time.Time{}
				detail["host"] = n.Host
			}
		} else if req.From != nil {
			return nil, invalid("body.from", "name the new host, too", "a date without a host changes nothing")
		}
		if req.Port != nil {
			if *req.Port == 0 {
				return nil, invalid("body.port", "leave it out for the default", "port 0 is not a port")
			}
			n.Port = *req.Port
			detail["port"] = n.Port
		}
		if req.Peers != nil {
			if err := checkPeers(*req.Peers); err != nil {
				return nil, err
			}
			n.Peers = *req.Peers
			detail["peers"] = n.Peers
		}
		if err := c.setPlaces(ctx, n, req.UpdatePlaces, detail); err != nil {
			return nil, err
		}
		if err := c.updateAuthentication(ctx, n, req, detail); err != nil {
			return nil, err
		}
		return detail, c.updateRungs(ctx, n, req, detail)
	})
}

// updateRungs changes the ports of a relay's last rung.
func (c *change) updateRungs(ctx context.Context, n *store.Node, req control.UpdateNode, detail map[string]any) error {
	if req.SSHPort == nil && req.TLSPort == nil {
		return nil
	}
	all, err := c.RelayRungs(ctx, n.Org)
	if err != nil {
		return err
	}
	r := all[n.ID]
	if r == nil {
		r = &store.RelayRungs{Relay: n.ID, SSHPort: reverse.SSHPort, TLSPort: reverse.TLSPort}
	}
	if req.SSHPort != nil {
		r.SSHPort = *req.SSHPort
	}
	if req.TLSPort != nil {
		r.TLSPort = *req.TLSPort
	}
	detail["ssh_port"], detail["tls_port"] = r.SSHPort, r.TLSPort
	return c.PutRelayRungs(ctx, r)
}

// DisableNode takes a node its rights until EnableNode.
func (r *Registry) DisableNode(ctx context.Context, org string, kind identity.Kind, name string) (*control.NodeRecord, error) {
	return r.changeNode(ctx, org, kind, name, "node.disable", func(c *change, n *store.Node) (map[string]any, error) {
		if n.Status == store.Revoked {
			return nil, refuse(http.StatusConflict, control.CodeNodeRevoked, "nothing is left to disable", "%s %q is revoked", kind, n.Name)
		}
		n.Status = store.Disabled
		c.dropped = append(c.dropped, n.ID)
		return nil, nil
	})
}

// EnableNode undoes DisableNode and DrainNode.
func (r *Registry) EnableNode(ctx context.Context, org string, kind identity.Kind, name string) (*control.NodeRecord, error) {
	return r.changeNode(ctx, org, kind, name, "node.enable", func(_ *change, n *store.Node) (map[string]any, error) {
		if n.Status == store.Revoked {
			return nil, refuse(http.StatusConflict, control.CodeNodeRevoked, fmt.Sprintf("give it a new key with a new token: sallyway --org %s %s token %s", org, kind, n.Name),
				"%s %q is revoked, and a revoked key stays revoked", kind, n.Name)
		}
		n.Status, n.Draining = store.Active, false
		return nil, nil
	})
}

// RevokeNode denies all keys of a node for good.
func (r *Registry) RevokeNode(ctx context.Context, org string, kind identity.Kind, name string) (*control.NodeRecord, error) {
	return r.changeNode(ctx, org, kind, name, "node.revoke", func(c *change, n *store.Node) (map[string]any, error) {
		keys, err := c.denyKeys(ctx, n.ID)
		if err != nil {
			return nil, err
		}
		n.Status = store.Revoked
		c.dropped = append(c.dropped, n.ID)
		// The credentials that the revoked key holds were made under the relays' present keys. Those go in two steps, now and when the node
		// is enrolled anew, so that they are gone when its name is let in again and nobody else is stranded.
		return map[string]any{"keys": keys}, c.lostKey(ctx, n.Org)
	})
}

// denyKeys puts all keys of a node on the deny list for good, and returns their hashes.
func (c *change) denyKeys(ctx context.Context, node string) ([]string, error) {
	keys, err := c.Keys(ctx, node)
	if err != nil {
		return nil, err
	}
	var hashes []string
	for _, k := range keys {
		k.Denied = true
		if err := c.PutKey(ctx, k); err != nil {
			return nil, err
		}
		hashes = append(hashes, k.Hash.String())
	}
	return hashes, nil
}

// DrainNode has a relay take no new allocations; EnableNode ends it.
func (r *Registry) DrainNode(ctx context.Context, org string, kind identity.Kind, name string) (*control.NodeRecord, error) {
	if kind != identity.Relay {
		return nil, invalid("path.name", fmt.Sprintf("sallyway %s disable NAME", kind), "only relays drain")
	}
	return r.changeNode(ctx, org, kind, name, "node.drain", func(_ *change, n *store.Node) (map[string]any, error) {
		if n.Status != store.Active {
			return nil, refuse(http.StatusConflict, control.CodeConflict, "", "relay %q is %s", n.Name, n.Status)
		}
		n.Draining = true
		return nil, nil
	})
}

// DeleteNode deletes a node: its keys are denied, policies for it go, and no resource is served by it any more.
func (r *Registry) DeleteNode(ctx context.Context, org string, kind identity.Kind, name string) error {
	_, err := r.changeNode(ctx, org, kind, name, "node.delete", func(c *change, n *store.Node) (map[string]any, error) {
		keys, err := c.denyKeys(ctx, n.ID)
		if err != nil {
			return nil, err
		}
		policies, err := c.Policies(ctx, org, store.Page{})
		if err != nil {
			return nil, err
		}
		for _, p := range policies {
			if p.SubjectKind != subjectGroup && p.Subject == n.ID {
				if err := c.DeletePolicy(ctx, p.ID); err != nil {
					return nil, err
				}
			}
		}
		resources, err := c.Resources(ctx, org, store.Page{})
		if err != nil {
			return nil, err
		}
		for _, v := range resources {
			if v.ServedBy(n.ID) {
				v.Gateways = slices.DeleteFunc(v.Gateways, func(g store.ServingGateway) bool { return g.ID == n.ID })
				if err := c.UpdateResource(ctx, v); err != nil {
					return nil, err
				}
			}
		}
		if err := c.dropAssignments(ctx, n); err != nil {
			return nil, err
		}
		if err := c.DropEnrolmentTokens(ctx, n.ID); err != nil {
			return nil, err
		}
		n.Deleted = c.now
		c.dropped = append(c.dropped, n.ID)
		return map[string]any{"keys": keys}, nil
	})
	return err
}

// dropAssignments takes a deleted relay from all gateways that it was assigned to, and a deleted gateway its relays.
func (c *change) dropAssignments(ctx context.Context, n *store.Node) error {
	if n.Kind == identity.Gateway {
		return c.PutAssignment(ctx, n.ID, nil)
	}
	if n.Kind != identity.Relay {
		return nil
	}
	orgs, err := c.Orgs(ctx, store.Page{})
	if err != nil {
		return err
	}
	for _, o := range orgs {
		if n.Org != identity.SharedOrg && o.Name != n.Org {
			continue
		}
		all, err := c.Assignments(ctx, o.Name)
		if err != nil {
			return err
		}
		for g, relays := range all {
			if i := slices.Index(relays, n.ID); i >= 0 {
				if err := c.PutAssignment(ctx, g, slices.Delete(relays, i, i+1)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// maxHost is the longest host name (RFC 1035 §3.1 without the final dot).
const maxHost = 253

// validHost reports whether s is a DNS name of at least one label; wildcard allows "*." before it.
func validHost(s string, wildcard bool) bool {
	if wildcard {
		s = strings.TrimPrefix(s, "*.")
	}
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > maxHost {
		return false
	}
	for l := range strings.SplitSeq(strings.ToLower(s), ".") {
		// Underscores stand in names such as _dmarc, which hosts have too.
		if l = strings.ReplaceAll(l, "_", "a"); !identity.ValidLabel(l) {
			return false
		}
	}
	return true
}

func checkHost(h string) error {
	if a, err := netip.ParseAddr(h); err == nil && !a.IsUnspecified() && !a.IsMulticast() && a.Zone() == "" {
		return nil
	} else if err != nil && validHost(h, false) && !allDigits(h) {
		return nil
	}
	return invalid("body.host", "give the address or DNS name under which nodes reach the relay, without port: --host relay1.example.com",
		"relay host %.80q is neither an IP address nor a DNS name", h)
}

// allDigits reports whether s is made of digits and dots: a mistyped address rather than a name.
func allDigits(s string) bool { return strings.Trim(s, "0123456789.") == "" }

func checkPeers(peers []netip.AddrPort) error {
	const most = 256
	if len(peers) > most {
		return invalid("body.peers", "", "%d configured peers, limit %d", len(peers), most)
	}
	for _, p := range peers {
		if !p.IsValid() || p.Port() == 0 || p.Addr().IsUnspecified() || p.Addr().IsMulticast() || p.Addr().Is4In6() {
			return invalid("body.peers", "give address:port, such as 192.0.2.7:4433", "configured peer %v is not an address with a port", p)
		}
	}
	return nil
}

// TURNCredential makes a credential for standard TURN software, as a client of the organization.
func (r *Registry) TURNCredential(ctx context.Context, org, relay string, req control.CreateTURNCredential) (*control.TURNCredential, error) {
	const most = 24 * time.Hour
	ttl := time.Duration(req.TTL) * time.Second
	if req.TTL < 0 || ttl > most {
		return nil, invalid("body.ttl", "between 1 and 86400; 0 is one hour", "a credential can not live %d seconds", req.TTL)
	}
	if ttl == 0 {
		ttl = time.Hour
	}
	var out *control.TURNCredential
	err := r.update(ctx, func(c *change) error {
		if _, err := c.org(ctx, org); err != nil {
			return err
		}
		n, err := c.FindNode(ctx, org, identity.Relay, relay)
		if errors.Is(err, store.ErrNotFound) && org != identity.SharedOrg {
			n, err = c.FindNode(ctx, identity.SharedOrg, identity.Relay, relay)
		}
		if err != nil {
			return notFound(err, "relay", relay, org)
		}
		client, err := c.FindNode(ctx, org, identity.Client, req.Client)
		if err != nil {
			return notFound(err, "client", req.Client, org)
		}
		if err := c.mayShare(ctx, org, n); err != nil {
			return err
		}
		if client.Status != store.Active || n.Status != store.Active {
			return refuse(http.StatusConflict, control.CodeConflict, "enable both first", "relay %q is %s, client %q is %s", n.Name, n.Status, client.Name, client.Status)
		}
		keys, err := view.RelayKeys(ctx, c.Tx, r.Seal, n.ID)
		if err != nil {
			return err
		}
		if len(keys) == 0 {
			return fmt.Errorf("relay %s has no key", n.ID)
		}
		u := wire.Username{Expiry: c.now.Add(ttl), Node: client.Identity()}
		host := n.Host
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		out = &control.TURNCredential{
			Username: u.String(), Password: wire.Password(keys[0].Secret, u.String()), Realm: wire.Realm, Expires: time.Unix(u.Expiry.Unix(), 0).UTC(),
			URIs: []string{
				fmt.Sprintf("turn:%s:%d?transport=udp", host, n.Port), fmt.Sprintf("turn:%s:%d?transport=tcp", host, n.Port),
				fmt.Sprintf("turns:%s:%d?transport=tcp", host, n.Port), fmt.Sprintf("turns:%s:%d?transport=udp", host, n.Port),
			},
		}
		return c.audit(ctx, org, "relay.credential.issue", n.Identity().String(), audit.OK, map[string]any{
			"client": client.Identity().String(), "expires": out.Expires.Format(time.RFC3339),
		})
	})
	return out, err
}
