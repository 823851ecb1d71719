package view

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/store"
)

// A node that dials is told 40 KiB, of which all but four are told to many alike, and a change of policy may concern every node: what is alike is
// encoded once for a view, and each node's own is put into its holes. The text is that of encoding/json, to the byte.

// told is what many nodes are told, encoded.
type told struct {
	trust    []byte
	dialling hollow2 // around the node's addresses, and around gateways and resources
	gateways map[string]*toldGateway
	relays   map[string]*toldRelay
	once     sync.Once // most views are loaded to answer a question, and tell nobody anything
	err      error
}

// hollow is JSON with a hole: what is before it and after it.
type hollow [2][]byte

// hollow2 is JSON with two holes.
type hollow2 [3][]byte

// Holes, as zero fields are encoded that follow each other.
const (
	holeTrust       = `"trust":{"roots":"","pins":null}`
	holeSnapshot    = `"snapshot":""`
	holeVirtual     = `"virtual":null`
	holeReached     = `"gateways":[],"resources":[]`
	holeCredential  = `"username":"","password":""`
	holeRelaysGrant = `"relays":null,"grant":""`
	holeGateway     = `"gateway":{"org":"","kind":"","id":""},"relays":null,"pins":null,`
	eventHead       = `{"type":"config","config":`
)

// toldRelay is a relay as those are told of it who dial a gateway by it.
type toldRelay struct {
	node identity.Node
	keys []control.RelayKey
	json hollow // around the credential
}

// toldGateway is a gateway as those are told of it who dial it.
type toldGateway struct {
	node   identity.Node
	relays []*toldRelay
	json   hollow // around its relays and the grant
	// grant is the middle of a grant: from the gateway until its times, where all relays are in it in their order.
	grant []byte
}

func cut(b []byte, hole string) (hollow, error) {
	before, after, ok := bytes.Cut(b, []byte(hole))
	if !ok {
		return hollow{}, fmt.Errorf("%s is not in it", hole) // what is may be secret
	}
	return hollow{before, after}, nil
}

// hollowOf is v, whose fields at the hole are zero.
func hollowOf(v any, hole string) (hollow, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return hollow{}, err
	}
	return cut(b, hole)
}

func (v *View) cannotTell(err error) error {
	return fmt.Errorf("encode what nodes of %s are told: %w", v.Org.Name, err)
}

// prepareTold encodes what is shared.
func (v *View) prepareTold() error {
	v.once.Do(v.prepare)
	t := &v.told
	t.gateways, t.relays = make(map[string]*toldGateway), make(map[string]*toldRelay)
	var err error
	if t.trust, err = json.Marshal(v.Trust); err != nil {
		return err
	}
	outer, err := hollowOf(v.emptyDialling(), holeVirtual)
	if err != nil {
		return err
	}
	inner, err := cut(outer[1], holeReached)
	if err != nil {
		return err
	}
	t.dialling = hollow2{outer[0], inner[0], inner[1]}
	for _, g := range v.gateways {
		gateway := &toldGateway{node: g.Identity()}
		for _, ref := range v.refs(g.ID, credential{}) {
			r := t.relays[ref.Node.ID]
			if r == nil {
				_, home := v.relay(ref.Node.ID)
				r = &toldRelay{node: ref.Node, keys: home.relayKeys[ref.Node.ID]}
				if r.json, err = hollowOf(ref, holeCredential); err != nil {
					return err
				}
				t.relays[ref.Node.ID] = r
			}
			gateway.relays = append(gateway.relays, r)
		}
		ref := control.GatewayRef{Node: g.Identity(), Name: g.Name, FQDN: FQDN(g.Name, v.Org.Name), Virtual: Addresses(v.Org, g.Address)}
		if gateway.json, err = hollowOf(ref, holeRelaysGrant); err != nil {
			return err
		}
		if gateway.grant, err = v.grantMiddle(gateway.node, gateway.relays); err != nil {
			return err
		}
		t.gateways[g.ID] = gateway
	}
	return nil
}

// grantMiddle is the part of a grant between who has it and its times.
func (v *View) grantMiddle(gateway identity.Node, relays []*toldRelay) ([]byte, error) {
	grant := policy.Grant{Gateway: gateway, Pins: v.Trust.Pins[identity.Gateway]}
	for _, r := range relays {
		grant.Relays = append(grant.Relays, r.node)
	}
	b, err := policy.Untimed(&grant)
	if err != nil {
		return nil, err
	}
	at := bytes.Index(b, []byte(`"gateway":`))
	if at < 0 {
		return nil, errors.New("a grant names no gateway")
	}
	return b[at:], nil
}

// appendEvent appends the event with a node's configuration, of which c has what is not for those who dial.
func (v *View) appendEvent(b []byte, n *store.Node, c *control.Config, expiry time.Time, s *Signing) ([]byte, error) {
	text, err := hollowOf(c, holeTrust)
	if err != nil {
		return b, v.cannotTell(err)
	}
	b = append(append(b, eventHead...), text[0]...)
	b = append(append(b, `"trust":`...), v.told.trust...)
	if n.Kind == identity.Gateway {
		around, err := cut(text[1], holeSnapshot)
		if err != nil {
			return b, v.cannotTell(err)
		}
		b = append(append(b, around[0]...), `"snapshot":"`...)
		doc := v.snapshot(n)
		doc.Issued, doc.NotAfter = s.Now, s.Now.Add(s.Life)
		if b, err = s.Signer.AppendSnapshot(b, doc); err != nil {
			return b, err
		}
		b, text[1] = append(b, '"'), around[1]
	}
	b = append(b, text[1]...)
	if n.Kind == identity.Client || n.Kind == identity.Gateway {
		b = append(b[:len(b)-len("}")], `,"dialling":`...)
		if b, err = v.appendDialling(b, n, expiry, s); err != nil {
			return b, err
		}
		b = append(b, '}')
	}
	return append(b, "}\n"...), nil
}

// appendDialling appends what n, a client or a gateway, may reach. What is added here belongs into Digest, too.
func (v *View) appendDialling(b []byte, n *store.Node, expiry time.Time, s *Signing) ([]byte, error) {
	t := &v.told
	b = append(append(b, t.dialling[0]...), `"virtual":`...)
	b = appendAddresses(b, Addresses(v.Org, n.Address))
	b = append(append(b, t.dialling[1]...), `"gateways":[`...)
	grant := policy.Grant{Org: v.Org.Name, Node: dialler(n)}
	if key := v.keys[n.ID]; key != nil {
		grant.Key = key.Hash
	}
	holder, err := policy.Untimed(&grant)
	if err != nil {
		return b, v.cannotTell(err)
	}
	whose, err := cut(holder, holeGateway)
	if err != nil {
		return b, v.cannotTell(err)
	}
	name := v.credential(n, dialler(n), expiry)
	type known struct {
		relay              *toldRelay
		username, password string
	}
	passwords := make([]known, 0, 16) // there are few relays
	first := true
	for _, g := range v.dialledBy(n) {
		if g.ID == n.ID {
			continue
		}
		if !first {
			b = append(b, ',')
		}
		first = false
		gateway := t.gateways[g.ID]
		relays, middle := gateway.relays, gateway.grant
		if v.wishes[n.ID] != nil {
			relays = v.arrange(n, relays)
			if middle, err = v.grantMiddle(gateway.node, relays); err != nil {
				return b, v.cannotTell(err)
			}
		}
		b = append(append(b, gateway.json[0]...), `"relays":[`...)
		for i, r := range relays {
			if i > 0 {
				b = append(b, ',')
			}
			var k known
			for _, k = range passwords {
				if k.relay == r {
					break
				}
			}
			if k.relay != r {
				k.relay = r
				k.username, k.password = name.at(r.keys)
				passwords = append(passwords, k)
			}
			// Both are of letters that JSON needs not escape: labels, digits, base64url.
			b = append(append(append(b, r.json[0]...), `"username":"`...), k.username...)
			b = append(append(append(b, `","password":"`...), k.password...), '"')
			b = append(b, r.json[1]...)
		}
		b = append(b, `],"grant":"`...)
		var kept policy.Kept
		if b, kept, err = s.Signer.AppendGrant(b, whose[0], middle, s.Now, s.Now.Add(s.Life), s.Kept[g.ID]); err != nil {
			return b, err
		}
		if s.Kept != nil {
			s.Kept[g.ID] = kept
		}
		b = append(append(b, '"'), gateway.json[1]...)
	}
	b = append(b, `],"resources":[`...)
	for i, r := range v.usableBy(n) {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, r.json...)
	}
	return append(append(b, ']'), t.dialling[2]...), nil
}

// appendAddresses appends a list of addresses as JSON; nil is null.
func appendAddresses(b []byte, addrs []netip.Addr) []byte {
	if addrs == nil {
		return append(b, "null"...)
	}
	b = append(b, '[')
	for i, a := range addrs {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(a.AppendTo(append(b, '"')), '"')
	}
	return append(b, ']')
}
