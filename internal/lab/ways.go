package lab

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// Way is what passes the router from one host to another; the other direction is another way.
type Way struct{ From, To *Host }

// CutWays has the router drop, in silence, everything on the given ways from now on, in place of what it was told to before. Without ways all
// is whole again.
func (l *Lab) CutWays(ways ...Way) error {
	err := l.Router.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "lab-ways"})
		chain := c.AddChain(&nftables.Chain{
			Name: "forward", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityMangle,
		})
		c.FlushChain(chain)
		for _, w := range ways {
			exprs := append(in(site{name: w.From.Name}.link()), out(site{name: w.To.Name}.link())...)
			c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: append(exprs, &expr.Verdict{Kind: expr.VerdictDrop})})
		}
		return c.Flush()
	})
	if err != nil {
		return fmt.Errorf("cut ways: %w", err)
	}
	return nil
}
