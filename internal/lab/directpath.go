package lab

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Tables of the router about what passes between the client's site and the first gateway's without a relay.
const (
	directBlock = "direct-block"
	directCount = "direct-count"
	directLoss  = "direct-loss"
)

// betweenEnds makes or remakes a table of the calling thread's namespace with a rule for UDP each way between the two sites.
func betweenEnds(table string, then ...expr.Any) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: table})
	c.FlushTable(t)
	chain := c.AddChain(&nftables.Chain{
		Name: "forward", Table: t, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityRef(*nftables.ChainPriorityFilter - 10),
	})
	for _, way := range [][2]string{{"to-client", "to-gateway"}, {"to-gateway", "to-client"}} {
		var exprs []expr.Any
		for _, e := range [][]expr.Any{in(way[0]), out(way[1]), udp(), then} {
			exprs = append(exprs, e...)
		}
		c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: exprs})
	}
	return c.Flush()
}

// BlockDirect has the router drop all UDP between the client and the first gateway from now on, in silence, or no more. It matters with
// Config.Direct only.
func (l *Lab) BlockDirect(on bool) error {
	err := l.Router.Do(func() error {
		if on {
			return betweenEnds(directBlock, &expr.Verdict{Kind: expr.VerdictDrop})
		}
		return noTable(directBlock)
	})
	if err != nil {
		return fmt.Errorf("block the direct path: %w", err)
	}
	return nil
}

// ImpairDirect has the router drop so many percent of that from now on, at random. A super-packet counts as one.
func (l *Lab) ImpairDirect(percent int) error {
	err := l.Router.Do(func() error {
		if percent > 0 {
			return betweenEnds(directLoss, append(chance(percent), &expr.Verdict{Kind: expr.VerdictDrop})...)
		}
		return noTable(directLoss)
	})
	if err != nil {
		return fmt.Errorf("impair the direct path: %w", err)
	}
	return nil
}

// noTable deletes a table of the calling thread's namespace, if there is one.
func noTable(name string) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	c.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: name})
	if err := c.Flush(); !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// CountDirect has the router count UDP packets between the client and the first gateway from now on, those that it then drops as well.
func (l *Lab) CountDirect() error {
	return l.Router.Do(func() error { return betweenEnds(directCount, &expr.Counter{}) })
}

// DirectPackets is how many were counted.
func (l *Lab) DirectPackets() (n uint64, err error) {
	err = l.Router.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		t := &nftables.Table{Family: nftables.TableFamilyINet, Name: directCount}
		rules, err := c.GetRules(t, &nftables.Chain{Name: "forward", Table: t})
		if err != nil {
			return err
		}
		for _, r := range rules {
			for _, e := range r.Exprs {
				if counter, ok := e.(*expr.Counter); ok {
					n += counter.Packets
				}
			}
		}
		return nil
	})
	return n, err
}
