package view_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/pki"
	"sallyway/platform/presence"
	"sallyway/platform/registry"
	"sallyway/platform/store"
	"sallyway/platform/view"
)

// TestTold changes an organization at random, and what nodes are told stays what the plain model says, to the byte; digests differ where that does. All
// nodes are told at once, of buffers that are used again and with the grants that they have.
func TestTold(t *testing.T) {
	w := newWorld(t)
	orgs := []string{w.org, identity.SharedOrg}
	signers := make(map[string]*policy.Signer)
	for _, org := range orgs {
		s, err := w.reg.Signer(t.Context(), org)
		must(t, err)
		signers[org] = s
	}
	type known struct {
		hash   [32]byte
		digest view.Sum
		grants map[identity.Node]string // by gateway
	}
	var mu sync.Mutex
	before, kept := make(map[string]known), make(map[string]view.Signed)
	for _, n := range w.nodes {
		kept[n.ID] = make(view.Signed)
	}
	lines := sync.Pool{New: func() any { return new([]byte) }}
	var expiry time.Time
	same := 0
	steps := 100
	if testing.Short() {
		steps = 20
	}
	for step := range steps {
		what := w.change(step)
		if step%40 == 20 {
			must(t, w.reg.RotateRelayKeys(t.Context(), w.org, 0))
			expiry = time.Now().Add(time.Hour)
		}
		now := time.Now().Add(time.Duration(step) * time.Second)
		for _, org := range orgs {
			var v *view.View
			must(t, w.reg.Store.View(t.Context(), func(tx store.Tx) (err error) {
				v, err = view.Load(t.Context(), tx, w.reg.Seal, org, time.Now())
				return err
			}))
			var wg sync.WaitGroup
			for _, n := range w.nodes {
				if n.Org != org {
					continue
				}
				wg.Go(func() {
					line := lines.Get().(*[]byte)
					defer lines.Put(line)
					var err error
					*line, err = v.AppendEvent((*line)[:0], n.ID, expiry, view.Signing{Signer: signers[org], Now: now, Life: time.Hour, Kept: kept[n.ID]})
					if err != nil {
						t.Error(err)
						return
					}
					m := v.Model(n.ID, expiry)
					hash, err := m.Hash()
					if err != nil {
						t.Error(err)
					}
					grants, err := compare(*line, m, now)
					if err != nil {
						t.Errorf("step %d (%s): %v is told\n%s: %v", step, what, n, *line, err)
					}
					digest, there, err := v.Digest(n.ID, expiry)
					if err != nil || !there {
						t.Errorf("step %d (%s): digest of %v: %t, %v", step, what, n, there, err)
					}
					mu.Lock()
					defer mu.Unlock()
					was, told := before[n.ID]
					if told && was.hash != hash && was.digest == digest {
						t.Errorf("step %d (%s): %v is told something else, and its digest is the same", step, what, n)
					}
					for g, jws := range grants {
						if was.grants[g] == jws {
							same++
						}
					}
					before[n.ID] = known{hash, digest, grants}
				})
			}
			wg.Wait()
		}
		if t.Failed() {
			return
		}
	}
	if same < steps {
		t.Errorf("%d grants went out again as they were: too few", same)
	}
}

// compare says where an event is not what the model says, and returns the grants in it.
func compare(line []byte, m *view.Model, now time.Time) (map[identity.Node]string, error) {
	var ev control.Event
	if err := json.Unmarshal(line, &ev); err != nil {
		return nil, err
	}
	c, want := ev.Config, m.Config
	if m.Snapshot != nil {
		s := *m.Snapshot
		s.Issued = now.UTC().Truncate(time.Second)
		s.NotAfter = s.Issued.Add(time.Hour)
		if err := sameDocument(c.Gateway.Snapshot, &s); err != nil {
			return nil, err
		}
		want.Gateway.Snapshot = c.Gateway.Snapshot
	}
	grants := make(map[identity.Node]string)
	if want.Dialling != nil {
		if len(c.Dialling.Gateways) != len(m.Grants) {
			return nil, fmt.Errorf("%d gateways, want %d", len(c.Dialling.Gateways), len(m.Grants))
		}
		for i, g := range m.Grants {
			jws := c.Dialling.Gateways[i].Grant
			var is policy.Grant
			if err := json.Unmarshal(payload(jws), &is); err != nil {
				return nil, err
			}
			if is.Issued.After(now) || is.Issued.Nanosecond() != 0 || is.NotAfter.Sub(is.Issued) != time.Hour {
				return nil, fmt.Errorf("a grant from %v until %v", is.Issued, is.NotAfter)
			}
			g.Issued, g.NotAfter = is.Issued, is.NotAfter
			if err := sameDocument(jws, &g); err != nil {
				return nil, err
			}
			want.Dialling.Gateways[i].Grant = jws
			grants[g.Gateway] = jws
		}
	}
	b, err := json.Marshal(control.Event{Type: control.EventConfig, Config: &want})
	if b = append(b, '\n'); err == nil && !bytes.Equal(line, b) {
		err = fmt.Errorf("want\n%s", b)
	}
	return grants, err
}

func payload(jws string) []byte {
	parts := strings.Split(jws, ".")
	b, _ := base64.RawURLEncoding.DecodeString(parts[len(parts)/2]) // what is none is no JSON either
	return b
}

func sameDocument(jws string, want any) error {
	b, err := json.Marshal(want)
	if is := payload(jws); err == nil && !bytes.Equal(is, b) {
		err = fmt.Errorf("document %s, want %s", is, b)
	}
	return err
}

// world is an organization that changes at random.
type world struct {
	t                      *testing.T
	rand                   *rand.Rand
	reg                    *registry.Registry
	org                    string
	nodes                  []identity.Node
	relays, gateways, dial []string // ids; dial is who may be in groups
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

const (
	teams     = 3
	resources = 6
	policies  = 12
)

func newWorld(t *testing.T) *world {
	t.Helper()
	st, err := store.OpenSQLite(t.Context(), filepath.Join(t.TempDir(), "test.db"))
	must(t, err)
	t.Cleanup(func() { must(t, st.Close()) })
	seal, err := pki.NewSealer(make([]byte, 32))
	must(t, err)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	w := &world{
		t: t, rand: rand.New(rand.NewPCG(seed, 0)), org: "default",
		reg: &registry.Registry{Store: st, Seal: seal, Board: new(presence.Board), Log: slog.New(slog.DiscardHandler), Now: time.Now, URL: "https://platform.example"},
	}
	_, err = w.reg.Bootstrap(t.Context())
	must(t, err)
	for i := range 5 {
		for _, kind := range []identity.Kind{identity.Relay, identity.Gateway, identity.Client} {
			w.join(w.org, kind, fmt.Sprint(kind, i), i < 4)
		}
	}
	for i := range 3 {
		w.join(identity.SharedOrg, identity.Relay, fmt.Sprint("shared", i), i < 2)
	}
	ports := []policy.PortRange{{First: 80, Last: 80}}
	for i := range resources {
		_, err := w.reg.CreateResource(t.Context(), w.org, control.CreateResource{Name: fmt.Sprint("resource", i), Address: "10.0.0.1", TCP: ports, Gateways: []string{"gateway0"}})
		must(t, err)
	}
	for i := range teams {
		_, err := w.reg.PutGroup(t.Context(), w.org, fmt.Sprint("team", i), &[]string{"client:client1", "client:client2"}, true)
		must(t, err)
	}
	subjects := []string{"group:team0", "group:team1", "group:team2", "client:client0", "client:client3", "gateway:gateway1", "gateway:gateway4", "platform"}
	for i := range policies {
		p := control.CreatePolicy{Name: fmt.Sprint("policy", i), Subject: subjects[i%len(subjects)], Resource: fmt.Sprint("resource", (i+3*(i/len(subjects)))%resources)}
		_, err := w.reg.CreatePolicy(t.Context(), w.org, p)
		must(t, err)
	}
	return w
}

// join makes a node, and enrols it.
func (w *world) join(org string, kind identity.Kind, name string, enrol bool) {
	w.t.Helper()
	req := control.CreateNode{Name: name}
	if kind == identity.Relay {
		req.Host = "relay.example"
	}
	made, err := w.reg.CreateNode(w.t.Context(), org, kind, req)
	must(w.t, err)
	tok, err := control.ParseToken(made.Token)
	must(w.t, err)
	if enrol {
		key, err := identity.NewKey()
		must(w.t, err)
		csr, err := identity.Request(key, tok.Node)
		must(w.t, err)
		_, err = w.reg.Enrol(w.t.Context(), "test", control.EnrolRequest{Secret: tok.Secret, Node: tok.Node, CSR: string(csr)})
		must(w.t, err)
	}
	w.nodes = append(w.nodes, tok.Node)
	switch kind {
	case identity.Relay:
		w.relays = append(w.relays, tok.Node.ID)
	case identity.Gateway:
		w.gateways = append(w.gateways, tok.Node.ID)
	}
	if kind != identity.Relay {
		w.dial = append(w.dial, tok.Node.ID)
	}
}

// some are at most so many of a list, in any order.
func (w *world) some(of []string, most int) (out []string) {
	for _, i := range w.rand.Perm(len(of))[:w.rand.IntN(min(most, len(of))+1)] {
		out = append(out, of[i])
	}
	return out
}

// texts are names that nobody may have, as if somebody could: they look like what the text is cut at.
var texts = []string{
	"x", `"trust":{"roots":"","pins":null}`, `","trust":{"roots":"","pins":null},"a":"`, `"username":"","password":""`, `"relays":null,"grant":""`, `"snapshot":""`,
	`"gateways":[],"resources":[]`, `"virtual":null`, "<a>&\u2028\u2029", "\x00\x1f\x7f", "\xff\xfe", `\`, `\"`, "é😀",
}

// change changes something, and says what.
func (w *world) change(step int) (what string) {
	r := w.rand
	n := w.nodes[r.IntN(len(w.nodes))]
	must(w.t, w.reg.Store.Update(w.t.Context(), func(tx store.Tx) error {
		ctx := w.t.Context()
		node, err := tx.Node(ctx, n.ID)
		if err != nil {
			return err
		}
		switch r.IntN(15) {
		case 0:
			what, node.Name = "name", texts[r.IntN(len(texts))]+fmt.Sprint(step)
			return tx.UpdateNode(ctx, node)
		case 1:
			what, node.Host = "host", texts[r.IntN(len(texts))]
			return tx.UpdateNode(ctx, node)
		case 2:
			what, node.Status = "status", []store.Status{store.Active, store.Active, store.Disabled}[r.IntN(3)]
			return tx.UpdateNode(ctx, node)
		case 3:
			what, node.Address = "address", uint32(r.IntN(2)*(3000+step)) //nolint:gosec // small
			return tx.UpdateNode(ctx, node)
		case 4, 5:
			what = "assignment"
			return tx.PutAssignment(ctx, w.gateways[r.IntN(len(w.gateways))], w.some(w.relays, 4))
		case 6, 7:
			what = "wishes"
			wishes := &store.Wishes{Node: n.ID, Region: []string{"", "eu", "us"}[r.IntN(3)]}
			if n.Kind != identity.Relay {
				wishes.Pin, wishes.Exclude, wishes.Prefer = w.some(w.relays, 2), w.some(w.relays, 3), w.some(w.relays, 2)
			}
			return tx.PutWishes(ctx, wishes)
		case 8:
			if n.Kind == identity.Relay {
				what = "last rung"
				return tx.PutRelayRungs(ctx, &store.RelayRungs{Relay: n.ID, SSHPort: uint16(r.IntN(2) * 22), TLSPort: uint16(r.IntN(2) * 443)}) //nolint:gosec // ports
			}
			what = "end of sessions"
			return tx.PutSessionEnd(ctx, &store.SessionEnd{Org: w.org, Node: n.ID, Before: time.Now().Add(time.Duration(step) * time.Minute)})
		case 9, 10:
			what = "resource"
			res, err := tx.FindResource(ctx, w.org, fmt.Sprint("resource", r.IntN(resources)))
			if err != nil {
				return err
			}
			res.Gateways = nil
			for i, g := range w.some(w.gateways, 3) {
				res.Gateways = append(res.Gateways, store.ServingGateway{ID: g, Priority: i, Weight: 1})
			}
			res.Disabled, res.Target, res.Address = r.IntN(5) == 0, []string{"10.0.0.1", "10.0.0.0/8", `a<b>"c`}[r.IntN(3)], uint32(r.IntN(2)*(9000+step)) //nolint:gosec // small
			return tx.UpdateResource(ctx, res)
		case 11:
			what = "group"
			g, err := tx.FindGroup(ctx, w.org, fmt.Sprint("team", r.IntN(teams)))
			if err != nil {
				return err
			}
			g.Members = w.some(w.dial, 8)
			return tx.UpdateGroup(ctx, g)
		case 12:
			what = "policy"
			p, err := tx.FindPolicy(ctx, w.org, fmt.Sprint("policy", r.IntN(policies)))
			if err != nil {
				return err
			}
			p.Disabled = r.IntN(4) == 0
			return tx.UpdatePolicy(ctx, p)
		case 13:
			what = "key"
			keys, err := tx.Keys(ctx, n.ID)
			if err != nil || len(keys) == 0 {
				return err
			}
			if r.IntN(2) == 0 { // another one for the same time
				keys[0].Hash, keys[0].Created = identity.KeyHash{1, byte(step)}, keys[0].Created.Add(time.Second)
				return tx.PutKey(ctx, keys[0])
			}
			keys[0].NotAfter, keys[0].Denied = keys[0].NotAfter.Add(time.Duration(r.IntN(3))*time.Hour), r.IntN(5) == 0
			return tx.PutKey(ctx, keys[0])
		}
		what = "organization"
		org, err := tx.Org(ctx, w.org)
		if err != nil {
			return err
		}
		org.Direct, org.PlatformDial = r.IntN(2) == 0, r.IntN(2) == 0
		return tx.UpdateOrg(ctx, org)
	}))
	return what
}

// TestKeptGrantsNeedNothing: a grant that was signed before and is the same costs no memory.
func TestKeptGrantsNeedNothing(t *testing.T) {
	w := newWorld(t)
	signer, err := w.reg.Signer(t.Context(), w.org)
	must(t, err)
	untimed, err := policy.Untimed(&policy.Grant{Org: w.org, Node: w.nodes[0], Gateway: w.nodes[1]})
	must(t, err)
	now := time.Now()
	b, kept, err := signer.AppendGrant(nil, untimed, nil, now, now.Add(time.Hour), policy.Kept{})
	must(t, err)
	b = append(b, b...) // room
	if n := testing.AllocsPerRun(10, func() {
		again, _, err := signer.AppendGrant(b[:0], untimed, nil, now.Add(time.Minute), now.Add(time.Hour), kept)
		if err != nil || len(again) != len(b)/2 {
			t.Error(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
