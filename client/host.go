package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyway/internal/control"
	"sallyway/tun"
	"sallyway/tun/splitdns"
)

// Choice is auto, on or off.
type Choice string

// The choices. Auto is on where it is possible, with a warning where it is not; On makes that fatal.
const (
	Auto Choice = "auto"
	On   Choice = "on"
	Off  Choice = "off"
)

// ParseChoice reads auto, on or off; what it is for names it in the error.
func ParseChoice(what, s string) (Choice, error) {
	switch c := Choice(s); c {
	case Auto, On, Off:
		return c, nil
	}
	return "", fmt.Errorf("--%s %.20q: want auto, on or off", what, s)
}

// HostConfig says what of the host is changed so that its programs reach resources by themselves.
type HostConfig struct {
	TUN    Choice
	Name   string // of the interface; tun.DefaultName where empty
	MTU    int    // tun.DefaultMTU where 0
	Routes Choice // Off sets none
	DNS    Choice // Off leaves the host's DNS alone
	// StateDir keeps the journal of what must be undone after a crash.
	StateDir string
	// Platform is the platform's URL, whose address no route may cover.
	Platform string
	// Proxy is the host of the egress proxy, which no route may cover either; "" is none.
	Proxy string
	// OnNetwork is called when the host's addresses or routes changed; nil is no call.
	OnNetwork func()
	Logger    *slog.Logger
}

// Host is the TUN device with its addresses, routes and split DNS, and the netstack behind it. Run it once; Update and Status may be
// called at any time.
type Host struct {
	cfg      HostConfig
	sessions *Sessions
	dev      *tun.Device // nil without a TUN
	dns      *splitdns.DNS
	capture  *capture
	updates  chan *control.Dialling  // 1 place, newest wins
	resolved map[string][]netip.Addr // what the names of relays and platform last resolved to; of follow

	mu     sync.Mutex
	status HostStatus
}

// HostStatus is what is set on the host.
type HostStatus struct {
	// TUN is the interface's name, empty without one; Why then says why.
	TUN       string         `json:"tun,omitempty"`
	Why       string         `json:"why,omitempty"`
	Addresses []netip.Addr   `json:"addresses,omitempty"`
	Routes    []netip.Prefix `json:"routes,omitempty"`
	Skipped   []string       `json:"skipped_routes,omitempty"`
	DNS       string         `json:"dns,omitempty"`
	Domains   []string       `json:"domains,omitempty"`
	Refused   uint64         `json:"refused_flows"`
	Dropped   uint64         `json:"dropped_packets"`
}

// tunOff is why there is no TUN device where none is wanted.
const tunOff = "turned off"

// OpenHost opens the TUN device. Without /dev/net/tun or CAP_NET_ADMIN it warns once, with the remedy, and returns a Host that does nothing,
// unless cfg.TUN is On.
func OpenHost(cfg HostConfig, s *Sessions) (*Host, error) {
	h := &Host{cfg: cfg, sessions: s, updates: make(chan *control.Dialling, 1)}
	if cfg.TUN == Off {
		h.status.Why = tunOff
		return h, nil
	}
	dev, err := tun.Open(tun.Config{Name: cfg.Name, MTU: cfg.MTU})
	if err != nil {
		if cfg.TUN == On || !errors.Is(err, tun.ErrUnavailable) {
			return nil, fmt.Errorf("TUN device: %w", err)
		}
		cfg.Logger.Warn("no TUN device: proxies and forwards work, programs do not reach resources by themselves", "err", err)
		h.status.Why = err.Error()
		return h, nil
	}
	h.dev = dev
	st := &stub{log: cfg.Logger, table: s.table.Load, resolve: s.Resolve, upstreams: h.upstreams}
	if h.capture, err = newCapture(cfg.Logger, dev, s, st); err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	if cfg.DNS != Off {
		if h.dns, err = splitdns.New(splitdns.Config{Interface: dev.Name(), StateDir: cfg.StateDir, Log: cfg.Logger}); err != nil {
			return nil, errors.Join(err, dev.Close())
		}
	}
	h.status.TUN = dev.Name()
	return h, nil
}

// Update has the host follow a new configuration. It does not wait.
func (h *Host) Update(d *control.Dialling) {
	for {
		select {
		case h.updates <- d:
			return
		default:
		}
		select {
		case <-h.updates:
		default:
		}
	}
}

// Run follows configurations and moves packets until ctx ends, then takes everything back.
func (h *Host) Run(ctx context.Context) error {
	if h.dev == nil {
		<-ctx.Done()
		return ctx.Err()
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return h.capture.run(gctx) })
	g.Go(func() error {
		h.follow(gctx)
		return gctx.Err()
	})
	err := g.Wait()
	if h.dns != nil {
		err = errors.Join(err, h.dns.Close())
	}
	return errors.Join(err, h.dev.Close())
}

// recheckInterval is how often routes are looked at again: hazards come and go with the host's own addresses and logins.
const recheckInterval = 30 * time.Second

func (h *Host) follow(ctx context.Context) {
	recheck := time.NewTicker(recheckInterval)
	defer recheck.Stop()
	network := make(chan struct{}, 1)
	var watching sync.WaitGroup
	defer watching.Wait()
	watching.Go(func() {
		if err := h.dev.Watch(ctx, func() {
			h.cfg.Logger.Info("the host's network changed")
			poke(network)
			if h.cfg.OnNetwork != nil {
				h.cfg.OnNetwork()
			}
		}); err != nil {
			h.cfg.Logger.Warn("changes of the host's network are only seen at intervals", "err", err, "interval", recheckInterval)
		}
	})
	var last *control.Dialling
	for {
		select {
		case <-ctx.Done():
			return
		case last = <-h.updates:
		case <-recheck.C:
		case <-network:
		}
		if last != nil {
			h.apply(ctx, last)
		}
	}
}

// apply sets addresses, then routes, then DNS. What fails is logged and shown in the status; the next recheck tries again.
func (h *Host) apply(ctx context.Context, d *control.Dialling) {
	t := newTable(d)
	addrs := make([]netip.Prefix, 0, len(d.Virtual))
	for _, a := range d.Virtual {
		addrs = append(addrs, netip.PrefixFrom(a, a.BitLen()))
	}
	if err := h.dev.SetAddresses(addrs); err != nil {
		h.cfg.Logger.Warn("addresses of the TUN device", "err", err)
	}
	st := HostStatus{TUN: h.dev.Name(), Addresses: d.Virtual}
	if h.cfg.Routes != Off {
		h.dev.SetOwnResolvers(t.stubAddrs()) // which DNS below names on the host, and which lie in our routes
		skipped, err := h.dev.SetRoutes(t.routes(), h.protected(ctx, d))
		if err != nil {
			h.cfg.Logger.Warn("routes into the TUN device", "err", err)
		}
		for _, s := range skipped {
			st.Skipped = append(st.Skipped, s.String())
		}
		h.mu.Lock()
		known := h.status.Skipped
		h.mu.Unlock()
		for _, s := range st.Skipped {
			if !slices.Contains(known, s) {
				h.cfg.Logger.Warn("route left out: reach the resource by its name or virtual address", "route", s)
			}
		}
		if st.Routes, err = h.dev.Routes(); err != nil {
			h.cfg.Logger.Warn("routes into the TUN device", "err", err)
		}
	}
	if h.dns != nil {
		mode, why := h.dns.Mode()
		st.DNS = mode.String()
		if why != "" {
			st.DNS += ": " + why
		}
		st.Domains = t.domains()
		if err := h.dns.Set(t.stubAddrs(), st.Domains); err != nil {
			h.cfg.Logger.Warn("split DNS", "err", err)
			st.DNS += ": " + err.Error()
		}
	}
	h.mu.Lock()
	if !slices.Equal(h.status.Domains, st.Domains) || h.status.DNS != st.DNS {
		h.cfg.Logger.Info("split DNS", "mode", st.DNS, "domains", st.Domains)
	}
	if !slices.Equal(h.status.Routes, st.Routes) {
		h.cfg.Logger.Info("routes", "tun", st.TUN, "routes", st.Routes)
	}
	h.status = st
	h.mu.Unlock()
}

// protected are the addresses of relays, platform and egress proxy, which must stay reachable outside of the TUN. A name that does not resolve now keeps
// the addresses it had: a route over them would cut off the relay, and with it what resolves names.
func (h *Host) protected(ctx context.Context, d *control.Dialling) []netip.Addr {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	var hosts []string
	if u, err := url.Parse(h.cfg.Platform); err == nil && u.Hostname() != "" {
		hosts = append(hosts, u.Hostname())
	}
	if h.cfg.Proxy != "" {
		hosts = append(hosts, h.cfg.Proxy)
	}
	for _, g := range d.Gateways {
		for _, r := range g.Relays {
			hosts = append(hosts, r.Host)
		}
	}
	slices.Sort(hosts)
	var out []netip.Addr
	known := map[string][]netip.Addr{}
	for _, host := range slices.Compact(hosts) {
		addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		if err != nil {
			h.cfg.Logger.Debug("address of a host to protect", "host", host, "err", err)
			addrs = h.resolved[host]
		}
		known[host] = addrs
		for _, a := range addrs {
			out = append(out, a.Unmap())
		}
	}
	h.resolved = known
	return out
}

// upstreams are the host's own resolvers, where the host's programs send every query to our stub.
func (h *Host) upstreams() []netip.AddrPort {
	if h.dns == nil {
		return nil
	}
	if mode, _ := h.dns.Mode(); mode != splitdns.ResolvConf {
		return nil
	}
	var out []netip.AddrPort
	for _, a := range h.dns.Upstreams() {
		out = append(out, netip.AddrPortFrom(a, dnsPort))
	}
	return out
}

// Resolvers are the host's own resolvers while split DNS has put the stub before them; nil where resolv.conf names them itself.
func (h *Host) Resolvers() []netip.AddrPort { return h.upstreams() }

// Status is what is set now.
func (h *Host) Status() HostStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	st := h.status
	if h.capture != nil {
		st.Refused, st.Dropped = h.capture.refused.Load(), h.capture.dropped.Load()
	}
	return st
}
