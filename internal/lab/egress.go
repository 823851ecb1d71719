package lab

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// OnlyByProxy has the router let the hosts reach TCP ports of the peer's host, where a proxy runs, and drop, in silence, all else that they
// send, open connections too, in place of what it was told before. Without hosts all is as in the beginning.
func (l *Lab) OnlyByProxy(ports []uint16, hosts ...*Host) error {
	return l.Router.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		// A packet has to pass every chain: the one of this table drops, and that of the router's own has to let through.
		t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "lab-egress"})
		only := c.AddChain(&nftables.Chain{
			Name: "forward", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityMangle,
		})
		c.FlushChain(only)
		own := &nftables.Table{Family: nftables.TableFamilyINet, Name: "lab"}
		fwd := &nftables.Chain{Name: "forward", Table: own}
		add := func(t *nftables.Table, chain *nftables.Chain, exprs ...[]expr.Any) {
			r := &nftables.Rule{Table: t, Chain: chain}
			for _, e := range exprs {
				r.Exprs = append(r.Exprs, e...)
			}
			c.AddRule(r)
		}
		proxy := site{name: l.Peer.Name}.link()
		for _, h := range hosts {
			from := site{name: h.Name}.link()
			for _, p := range ports {
				add(t, only, in(from), out(proxy), tcp(), dport(p, p), accept())
				add(own, fwd, in(from), out(proxy), tcp(), dport(p, p), accept())
			}
			add(t, only, in(from), []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}})
		}
		return c.Flush()
	})
}

// HTTPProxy starts tinyproxy on an address of the host. It wants user and password, and connects to the ports alone.
func (h *Host) HTTPProxy(ctx context.Context, addr netip.AddrPort, user, password string, ports ...uint16) (*Proc, error) {
	path, err := Program("tinyproxy")
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("tinyproxy-%d", addr.Port())
	var conf strings.Builder
	fmt.Fprintf(&conf, "Listen %s\nPort %d\nTimeout 3600\nMaxClients 200\nLogLevel Info\nBasicAuth %s %s\n", addr.Addr(), addr.Port(), user, password)
	for _, p := range ports {
		fmt.Fprintf(&conf, "ConnectPort %d\n", p)
	}
	file := h.Path(name + ".conf")
	if err := os.WriteFile(file, []byte(conf.String()), 0o600); err != nil {
		return nil, err
	}
	return h.proxy(ctx, Spec{Name: name, Args: []string{path, "-d", "-c", file}, Grace: time.Second}, addr)
}

// SOCKSProxy starts microsocks on an address of the host. It wants user and password.
func (h *Host) SOCKSProxy(ctx context.Context, addr netip.AddrPort, user, password string) (*Proc, error) {
	path, err := Program("microsocks")
	if err != nil {
		return nil, err
	}
	return h.proxy(ctx, Spec{
		Name: fmt.Sprintf("microsocks-%d", addr.Port()), Grace: time.Second,
		Args: []string{path, "-i", addr.Addr().String(), "-p", fmt.Sprint(addr.Port()), "-u", user, "-P", password},
	}, addr)
}

// proxy starts a server and waits until it accepts connections.
func (h *Host) proxy(ctx context.Context, spec Spec, addr netip.AddrPort) (*Proc, error) {
	p, err := h.Start(spec)
	if err != nil {
		return nil, err
	}
	return p, h.lab.settle(ctx, p, func() error {
		c, err := h.Dial(ctx, "tcp", addr.String())
		if err != nil {
			return err
		}
		return c.Close()
	})
}
