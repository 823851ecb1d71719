package lab

import (
	"encoding/binary"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Ports that the router lets through, towards relays and towards the platform.
const (
	relayPort   = 5349
	relayedLow  = 49152
	relayedHigh = 65535
	sshPort     = 2222
	tlsPort     = 8443
	httpsPort   = 443
)

// HubPort is a TCP port of the relays' hosts that Config.Raw opens, for what other products have in the place of a relay.
const HubPort = 2022

// routerFilter lets the router of the calling thread's namespace forward what goes to relays and to the platform, and
// answers to it. All else is dropped in silence: no site can be called, and no two sites see each other, except where Config
// says otherwise.
//
// The chain cut stands before the rules; see Lab.Cut.
func routerFilter(cfg Config) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "lab"})
	drop := nftables.ChainPolicyDrop
	cut := c.AddChain(&nftables.Chain{Name: "cut", Table: t})
	fwd := c.AddChain(&nftables.Chain{
		Name: "forward", Table: t, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &drop,
	})
	add := func(exprs ...[]expr.Any) {
		r := &nftables.Rule{Table: t, Chain: fwd}
		for _, e := range exprs {
			r.Exprs = append(r.Exprs, e...)
		}
		c.AddRule(r)
	}
	add([]expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: cut.Name}})
	add(established(), accept())
	for _, relay := range []string{"to-relay1", "to-relay2"} {
		add(out(relay), udp(), dport(relayPort, relayPort), accept())
		add(out(relay), udp(), dport(relayedLow, relayedHigh), accept())
		for _, p := range []uint16{relayPort, sshPort, tlsPort} {
			add(out(relay), tcp(), dport(p, p), accept())
		}
		// A configured peer is a host outside that relays may call.
		add(in(relay), out("to-peer"), udp(), accept())
	}
	add(out("to-platform"), tcp(), dport(httpsPort, httpsPort), accept())
	if cfg.Raw {
		add(out("to-gateway"), daddr(RawAddr.AsSlice()), accept())
		for _, relay := range []string{"to-relay1", "to-relay2"} {
			add(out(relay), tcp(), dport(HubPort, HubPort), accept())
		}
	}
	if cfg.Direct {
		add(in("to-client"), out("to-gateway"), udp(), accept())
	}
	return c.Flush()
}

// cutRules replaces the chain cut by rules that drop everything from and to the given links, and where noUDP says so all UDP.
func cutRules(links []string, noUDP bool) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	t := &nftables.Table{Family: nftables.TableFamilyINet, Name: "lab"}
	chain := &nftables.Chain{Name: "cut", Table: t}
	c.FlushChain(chain)
	for _, l := range links {
		for _, side := range [][]expr.Any{in(l), out(l)} {
			c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: append(side, &expr.Verdict{Kind: expr.VerdictDrop})})
		}
	}
	if noUDP {
		c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: append(udp(), &expr.Verdict{Kind: expr.VerdictDrop})})
	}
	return c.Flush()
}

// masquerade hides what leaves by dev behind dev's address.
func masquerade(dev string) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "lab"})
	chain := c.AddChain(&nftables.Chain{
		Name: "post", Table: t, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
	})
	c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: append(out(dev), &expr.Masq{})})
	return c.Flush()
}

// dropPort has the calling thread's namespace drop what comes for a port, TCP and UDP.
func dropPort(port uint16) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "lab"})
	chain := c.AddChain(&nftables.Chain{
		Name: "input", Table: t, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter,
	})
	for _, proto := range [][]expr.Any{tcp(), udp()} {
		c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: append(append(proto, dport(port, port)...), &expr.Verdict{Kind: expr.VerdictDrop})})
	}
	return c.Flush()
}

func accept() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }

// established matches answers and ICMP errors about flows that were let through.
func established() []expr.Any {
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

func in(dev string) []expr.Any  { return link(expr.MetaKeyIIFNAME, dev) }
func out(dev string) []expr.Any { return link(expr.MetaKeyOIFNAME, dev) }

func link(key expr.MetaKey, dev string) []expr.Any {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, dev)
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name}}
}

func tcp() []expr.Any { return transport(unix.IPPROTO_TCP) }
func udp() []expr.Any { return transport(unix.IPPROTO_UDP) }

func transport(proto byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
	}
}

// dport matches destination ports from low to high, both included.
func dport(low, high uint16) []expr.Any {
	be := func(p uint16) []byte { return binary.BigEndian.AppendUint16(nil, p) }
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpGte, Register: 1, Data: be(low)},
		&expr.Cmp{Op: expr.CmpOpLte, Register: 1, Data: be(high)},
	}
}

// daddr matches an IPv4 destination.
func daddr(ip []byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: ip},
	}
}
