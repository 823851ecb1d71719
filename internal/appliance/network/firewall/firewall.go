// Package firewall is the appliance's packet filter: one nftables table, put in place by netlink before any link is up.
//
// Everything that comes in is dropped, except
//
//   - what comes from lo,
//   - answers: conntrack's established and related,
//   - ICMPv6 that IPv6 cannot do without: neighbour discovery with hop limit 255 (RFC 4861), multicast listener queries,
//   - echo requests, a few in a second,
//   - answers of DHCPv6 servers and relays on the link, which conntrack cannot tell for answers as the questions are
//     multicast. DHCP for IPv4 needs no rule: its client reads below the filter until there is an address, and is answered
//     as established from then on,
//   - the ports of the appliance's role.
//
// Nothing is forwarded. What goes out is let out.
//
//	if err := firewall.Apply(firewall.Relay()); err != nil {
//		return err // bring no link up
//	}
//
// The kernel has parts of it as modules: Modules names them.
package firewall

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Table is the name of the table, of the family inet.
const Table = "sallyway"

// Modules are the kernel's modules that the rules need, by their file names without .ko. What these depend on comes on top.
var Modules = []string{"nf_tables", "nft_ct", "nft_limit"}

// Protocol is what a port belongs to.
type Protocol string

// The protocols that have ports.
const (
	TCP Protocol = "tcp"
	UDP Protocol = "udp"
)

func (p Protocol) number() byte {
	if p == TCP {
		return unix.IPPROTO_TCP
	}
	return unix.IPPROTO_UDP
}

// Port is a run of ports that is open to everybody, from First to Last, both included.
type Port struct {
	Protocol    Protocol
	First, Last uint16
}

func (p Port) String() string {
	if p.First == p.Last {
		return fmt.Sprintf("%d/%s", p.First, p.Protocol)
	}
	return fmt.Sprintf("%d-%d/%s", p.First, p.Last, p.Protocol)
}

// ParsePort reads what String writes: "443/tcp", "49152-65535/udp".
func ParsePort(s string) (Port, error) {
	ports, protocol, ok := strings.Cut(s, "/")
	p := Port{Protocol: Protocol(protocol)}
	if ok {
		first, last, run := strings.Cut(ports, "-")
		if !run {
			last = first
		}
		a, err := strconv.ParseUint(first, 10, 16)
		b, err2 := strconv.ParseUint(last, 10, 16)
		p.First, p.Last = uint16(a), uint16(b)
		ok = err == nil && err2 == nil
	}
	if !ok || p.validate() != nil {
		return Port{}, fmt.Errorf("port %q: write it as 443/tcp or 49152-65535/udp", s)
	}
	return p, nil
}

func (p Port) validate() error {
	if p.Protocol != TCP && p.Protocol != UDP {
		return fmt.Errorf("port %s: the protocol is tcp or udp", p)
	}
	if p.First == 0 || p.Last < p.First {
		return fmt.Errorf("port %s: ports run from 1 to 65535, the lower first", p)
	}
	return nil
}

// Relay returns the ports of a relay: STUN, TURN and TLS on 5349, the last rung on 2222 and 8443, relayed addresses.
func Relay() []Port {
	return []Port{{UDP, 5349, 5349}, {TCP, 5349, 5349}, {TCP, 2222, 2222}, {TCP, 8443, 8443}, {UDP, 49152, 65535}}
}

// Platform returns the port of a platform.
func Platform() []Port {
	return []Port{{TCP, 443, 443}}
}

// Apply puts the rules in place of those that were there, in one transaction, and reads them back. After an error the rules
// are the former ones or none: no link may be up then. Nil ports open nothing. It needs CAP_NET_ADMIN and acts on the
// network namespace of the calling thread.
func Apply(ports []Port) error {
	for _, p := range ports {
		if err := p.validate(); err != nil {
			return err
		}
	}
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("packet filter: %w", err)
	}
	t := &nftables.Table{Family: nftables.TableFamilyINet, Name: Table}
	// Adding before deleting: deleting what is not there is an error.
	c.AddTable(t)
	c.DelTable(t)
	c.AddTable(t)
	for _, chain := range chains(t, ports) {
		c.AddChain(chain.Chain)
		for _, exprs := range chain.rules {
			c.AddRule(&nftables.Rule{Table: t, Chain: chain.Chain, Exprs: exprs})
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("packet filter: the kernel refused the rules (are its modules %s loaded?): %w", strings.Join(Modules, ", "), err)
	}
	return Verify(ports)
}

// ErrDiffers means that the kernel's rules are not the ones that were put there.
var ErrDiffers = errors.New("the packet filter is not as it was set")

// Verify reads the table back and compares every chain and rule with what Apply(ports) sets. What differs wraps ErrDiffers.
func Verify(ports []Port) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("packet filter: %w", err)
	}
	have, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("packet filter: read it back: %w", err)
	}
	have = slices.DeleteFunc(have, func(c *nftables.Chain) bool { return c.Table.Name != Table })
	t := &nftables.Table{Family: nftables.TableFamilyINet, Name: Table}
	want := chains(t, ports)
	if len(have) != len(want) {
		return fmt.Errorf("%w: %d chains, not %d", ErrDiffers, len(have), len(want))
	}
	for _, w := range want {
		i := slices.IndexFunc(have, func(c *nftables.Chain) bool { return c.Name == w.Name })
		if i < 0 {
			return fmt.Errorf("%w: no chain %s", ErrDiffers, w.Name)
		}
		h := have[i]
		if h.Type != w.Type || h.Hooknum == nil || *h.Hooknum != *w.Hooknum || h.Priority == nil || *h.Priority != *w.Priority || h.Policy == nil || *h.Policy != *w.Policy {
			return fmt.Errorf("%w: chain %s has another hook or policy", ErrDiffers, w.Name)
		}
		rules, err := c.GetRules(t, h)
		if err != nil {
			return fmt.Errorf("packet filter: read chain %s back: %w", w.Name, err)
		}
		if len(rules) != len(w.rules) {
			return fmt.Errorf("%w: chain %s has %d rules, not %d", ErrDiffers, w.Name, len(rules), len(w.rules))
		}
		for i, r := range rules {
			same, err := equal(r.Exprs, w.rules[i])
			if err != nil {
				return err
			}
			if !same {
				return fmt.Errorf("%w: rule %d of chain %s", ErrDiffers, i+1, w.Name)
			}
		}
	}
	return nil
}

// equal compares rules as the kernel would be told them.
func equal(a, b []expr.Any) (bool, error) {
	if len(a) != len(b) {
		return false, nil
	}
	for i := range a {
		x, err := expr.Marshal(byte(nftables.TableFamilyINet), a[i])
		if err != nil {
			return false, err
		}
		y, err := expr.Marshal(byte(nftables.TableFamilyINet), b[i])
		if err != nil {
			return false, err
		}
		if !bytes.Equal(x, y) {
			return false, nil
		}
	}
	return true, nil
}

// chain is a chain with its rules.
type chain struct {
	*nftables.Chain
	rules [][]expr.Any
}

// echoRate is how many echo requests are answered in a second, and at once.
const echoRate, echoBurst = 10, 20

// chains returns the whole table.
func chains(t *nftables.Table, ports []Port) []chain {
	drop := nftables.ChainPolicyDrop
	base := func(name string, hook *nftables.ChainHook) *nftables.Chain {
		return &nftables.Chain{Name: name, Table: t, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityFilter, Policy: &drop}
	}
	input := chain{Chain: base("input", nftables.ChainHookInput)}
	add := func(matches ...[]expr.Any) {
		input.rules = append(input.rules, append(slices.Concat(matches...), &expr.Verdict{Kind: expr.VerdictAccept}))
	}
	add(from("lo"))
	// Before answers: all requests of one ping are one flow, which the first answer establishes.
	for _, echo := range [][]expr.Any{
		slices.Concat(family(unix.NFPROTO_IPV4), transport(unix.IPPROTO_ICMP), icmpType(8)),
		slices.Concat(family(unix.NFPROTO_IPV6), transport(unix.IPPROTO_ICMPV6), icmpType(128)),
	} {
		add(echo, limit())
		input.rules = append(input.rules, append(slices.Clone(echo), &expr.Verdict{Kind: expr.VerdictDrop}))
	}
	add(answers())
	for _, kind := range []byte{134, 135, 136} { // router advertisement, neighbour solicitation and advertisement
		add(family(unix.NFPROTO_IPV6), transport(unix.IPPROTO_ICMPV6), hopLimit(255), icmpType(kind))
	}
	add(family(unix.NFPROTO_IPV6), transport(unix.IPPROTO_ICMPV6), sourceIsLinkLocal(), icmpType(130)) // multicast listener query
	add(family(unix.NFPROTO_IPV6), transport(unix.IPPROTO_UDP), sourceIsLinkLocal(), portIs(sourcePort, 547, 547), portIs(destinationPort, 546, 546))
	for _, p := range ports {
		add(transport(p.Protocol.number()), portIs(destinationPort, p.First, p.Last))
	}
	return []chain{input, {Chain: base("forward", nftables.ChainHookForward)}}
}

// from matches what comes in by a link.
func from(link string) []expr.Any {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, link)
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name}}
}

// answers matches what belongs to a flow that went out or was let in, and ICMP errors about one.
func answers() []expr.Any {
	return []expr.Any{
		&expr.Ct{Register: 1, Key: expr.CtKeySTATE},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED),
			Xor:  make([]byte, 4),
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

func family(number byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{number}}}
}

func transport(number byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{number}}}
}

func icmpType(kind byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{kind}},
	}
}

// hopLimit matches IPv6's hop limit: 255 has crossed no router.
func hopLimit(n byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 7, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{n}},
	}
}

// sourceIsLinkLocal matches IPv6 sources in fe80::/10.
func sourceIsLinkLocal() []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 8, Len: 2},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 2, Mask: []byte{0xff, 0xc0}, Xor: make([]byte, 2)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0xfe, 0x80}},
	}
}

// Offsets in the headers of TCP and UDP.
const (
	sourcePort      = 0
	destinationPort = 2
)

// portIs matches ports from first to last, both included.
func portIs(offset uint32, first, last uint16) []expr.Any {
	port := func(p uint16) []byte { return binaryutil.BigEndian.PutUint16(p) }
	load := &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2}
	if first == last {
		return []expr.Any{load, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: port(first)}}
	}
	return []expr.Any{load, &expr.Cmp{Op: expr.CmpOpGte, Register: 1, Data: port(first)}, &expr.Cmp{Op: expr.CmpOpLte, Register: 1, Data: port(last)}}
}

func limit() []expr.Any {
	return []expr.Any{&expr.Limit{Type: expr.LimitTypePkts, Rate: echoRate, Unit: expr.LimitTimeSecond, Burst: echoBurst}}
}
