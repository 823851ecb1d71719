package lab

import (
	"encoding/binary"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// BlockPort has the router drop, in silence, what the hosts send to a port and what comes back from it, TCP and UDP, open connections too,
// in place of what it was told to block before. Port 0 blocks nothing.
func (l *Lab) BlockPort(port uint16, hosts ...*Host) error {
	return l.Router.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "lab-ports"})
		chain := c.AddChain(&nftables.Chain{
			Name: "forward", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityMangle,
		})
		c.FlushChain(chain)
		for _, h := range hosts {
			name := site{name: h.Name}.link()
			for _, proto := range [][]expr.Any{tcp(), udp()} {
				for _, way := range [][]expr.Any{append(in(name), dport(port, port)...), append(out(name), sport(port)...)} {
					if port != 0 {
						c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: append(append(append([]expr.Any{}, proto...), way...), &expr.Verdict{Kind: expr.VerdictDrop})})
					}
				}
			}
		}
		return c.Flush()
	})
}

// sport matches a source port.
func sport(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
	}
}
