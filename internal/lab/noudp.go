package lab

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// BlockUDPOf has the router drop, in silence, all UDP that the hosts send and that is sent to them from now on, in place of what it was told to
// block of UDP before. Without hosts all UDP passes.
func (l *Lab) BlockUDPOf(hosts ...*Host) error {
	err := l.Router.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "lab-udp"})
		chain := c.AddChain(&nftables.Chain{
			Name: "forward", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityMangle,
		})
		c.FlushChain(chain)
		for _, h := range hosts {
			name := site{name: h.Name}.link()
			for _, way := range [][]expr.Any{in(name), out(name)} {
				c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: append(append(way, udp()...), &expr.Verdict{Kind: expr.VerdictDrop})})
			}
		}
		return c.Flush()
	})
	if err != nil {
		return fmt.Errorf("block UDP: %w", err)
	}
	return nil
}
