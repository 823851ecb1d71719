package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyway/client"
	"sallyway/gateway"
	"sallyway/internal/daemon"
	"sallyway/internal/egress"
	"sallyway/internal/identity"
	"sallyway/internal/lab"
	"sallyway/internal/legs"
	"sallyway/relay/leg"
	"sallyway/relay/reverse"
	"sallyway/relay/wire"
)

// Ports of the proxies, and who may use them.
const (
	anyProxyPort  = 3128 // leads to every port of relays and platform
	lastProxyPort = 3129 // not to 5349
	socksPort     = 1081
	proxyUser     = "ida"
	proxyPassword = "swordfish47"
	platformPort  = 443
)

// behindProxy is a site whose client and gateway reach nothing but proxies.
type behindProxy struct {
	*lab.Site
	full, last, socks *lab.Proc
	addr              netip.Addr
	client, gateway   lab.NodeSpec
	file              string // of the client's credentials
}

// url is a proxy's.
func (s *behindProxy) url(scheme string, port uint16) string {
	return fmt.Sprintf("%s://%s", scheme, at(s.addr, port))
}

// restart starts a node's daemon again with other settings about the proxy and waits until it is up.
func (s *behindProxy) restart(t *testing.T, n *lab.Node, spec lab.NodeSpec, args, env []string) {
	t.Helper()
	if n.Proc != nil {
		check(t, n.Stop())
	}
	spec.Args, spec.Env = append(slices.Clone(spec.Args), args...), env
	check(t, s.StartDaemon(n, spec))
}

// credentials writes the file that the client is given.
func (s *behindProxy) credentials(t *testing.T, text string) {
	t.Helper()
	check(t, os.WriteFile(s.file, []byte(text+"\n"), 0o600))
}

func newBehindProxy(t *testing.T) (*behindProxy, *private) {
	t.Helper()
	l := newLab(t, lab.Config{})
	for _, name := range []string{"tinyproxy", "microsocks"} {
		program(t, name)
	}
	s := &behindProxy{addr: l.Addr(l.Peer)}
	ctx := within(t, 3*time.Minute)
	proxy := func(port uint16, ports ...uint16) *lab.Proc {
		return must(l.Peer.HTTPProxy(ctx, netip.AddrPortFrom(s.addr, port), proxyUser, proxyPassword, ports...))(t)
	}
	s.full = proxy(anyProxyPort, platformPort, wire.Port, reverse.SSHPort, reverse.TLSPort)
	s.last = proxy(lastProxyPort, platformPort, reverse.SSHPort, reverse.TLSPort)
	s.socks = must(l.Peer.SOCKSProxy(ctx, netip.AddrPortFrom(s.addr, socksPort), proxyUser, proxyPassword))(t)
	check(t, l.OnlyByProxy([]uint16{anyProxyPort, lastProxyPort, socksPort}, l.Client, l.Gateway))
	withUser := fmt.Sprintf("http://%s:%s@%s", proxyUser, proxyPassword, at(s.addr, anyProxyPort))
	s.file = l.Client.Path("proxy.credentials")
	s.credentials(t, proxyUser+":"+proxyPassword)
	s.Site = must(l.Build(ctx, lab.SiteConfig{
		NoBranch: true, NoClient: true, GatewayEnv: []string{"HTTPS_PROXY=" + withUser},
	}, nil))(t)
	s.gateway = lab.NodeSpec{Kind: identity.Gateway, Name: lab.Office, Host: s.Gateway}
	s.client = lab.NodeSpec{Kind: identity.Client, Name: lab.Laptop, Host: s.Client, Args: []string{"--egress-proxy-credentials", s.file}}
	spec := s.client
	s.Laptop = must(s.CreateNode(ctx, spec))(t)
	s.restart(t, s.Laptop, s.client, []string{"--egress-proxy", s.url("http", anyProxyPort)}, nil)
	check(t, s.Laptop.WaitReady(ctx))
	return s, servePrivate(t, s.Site)
}

// egressOf waits until a client's status says of its proxy what ok wants.
func egressOf(t *testing.T, n *lab.Node, ok func(client.Status) bool) (st client.Status) {
	t.Helper()
	ctx := within(t, 30*time.Second)
	err := lab.Until(ctx, 100*time.Millisecond, func() error {
		st = client.Status{}
		if err := n.Status(ctx, &st); err != nil {
			return err
		}
		if st.Egress == nil || !ok(st) {
			return fmt.Errorf("%+v, proxy %+v", st.Platform, st.Egress)
		}
		return nil
	})
	check(t, err)
	return st
}

// diagnosis runs the client's doctor and returns its rows.
func (s *behindProxy) diagnosis(t *testing.T) map[string]daemon.Check {
	t.Helper()
	bin := must(s.Bin("sallyway"))(t)
	// The exit code is 1 where a row fails.
	r, err := s.Client.Run(within(t, time.Minute), bin, "connect", "doctor", "--json", "--state", s.Laptop.State)
	var rows []daemon.Check
	if jerr := json.Unmarshal([]byte(r.Stdout), &rows); jerr != nil {
		t.Fatalf("%v: %v: %s", err, jerr, r.Stdout)
	}
	if strings.Contains(r.Stdout+r.Stderr, proxyPassword) {
		t.Error("the doctor shows the password")
	}
	out := map[string]daemon.Check{}
	for _, row := range rows {
		out[row.Check] = row
	}
	return out
}

// TestEgressProxy: a client and a gateway that reach nothing but a proxy enrol, connect and serve through it, over the best rung that it lets
// through; what is wrong with it is said in status and doctor.
func TestEgressProxy(t *testing.T) {
	s, p := newBehindProxy(t)
	web := netip.AddrPortFrom(lab.WebAddr, webPort)
	fetch := func(t *testing.T) {
		t.Helper()
		reach(t, s.Client, web, 60*time.Second)
		r, err := s.Client.Run(within(t, 20*time.Second), program(t, "curl"), "-sS", "--max-time", "15", "http://"+web.String()+"/")
		if err != nil || r.Stdout != page {
			t.Errorf("%q, %v", r.Stdout, err)
		}
	}
	gatewayReady := func(t *testing.T) {
		t.Helper()
		check(t, s.GatewayA.WaitReady(within(t, 40*time.Second)))
	}

	t.Run("HTTP CONNECT to 5349", func(t *testing.T) {
		fetch(t)
		overPath(t, s.Laptop, string(leg.TLS), 30*time.Second)
		transports(t, s.GatewayA, string(leg.TLS), 30*time.Second)
		st := egressOf(t, s.Laptop, func(st client.Status) bool { return st.Egress.Connections > 2 && st.Platform.Connected })
		if st.Egress.Error != "" || st.Egress.Proxy != s.url("http", anyProxyPort) || st.Egress.Source != egress.Flag {
			t.Errorf("%+v", st.Egress)
		}
		var gs gateway.Status
		check(t, s.GatewayA.Status(within(t, 5*time.Second), &gs))
		if gs.Egress == nil || gs.Egress.Source != "HTTPS_PROXY" || gs.Egress.Error != "" || len(gs.Sessions) == 0 {
			t.Errorf("the gateway shows %+v %+v", gs.Egress, gs.Sessions)
		}
		for _, target := range []string{at(s.Addr(s.Relay1), wire.Port), at(s.Addr(s.Platform), platformPort)} {
			if !regexp.MustCompile(`CONNECT ` + regexp.QuoteMeta(target)).MatchString(s.full.Log.Tail(2000)) {
				t.Errorf("the proxy has not been asked for %s:\n%s", target, s.full.Log.Tail(20))
			}
		}
		rows := s.diagnosis(t)
		for _, name := range []string{"egress proxy", "egress proxy in use", "platform from here", "platform", "relay relay-1 by tls", "relay relay-1 by tls on its own port"} {
			if rows[name].Result != daemon.Pass {
				t.Errorf("%s: %+v", name, rows[name])
			}
		}
		if row := rows["relay relay-1 by udp"]; row.Result != daemon.Warn {
			t.Errorf("%+v", row)
		}
		upload(t, s.Site, p, 10<<20)
	})
	t.Run("8443 and 2222 where the proxy refuses 5349", func(t *testing.T) {
		s.restart(t, s.GatewayA, s.gateway, nil, []string{fmt.Sprintf("all_proxy=http://%s:%s@%s", proxyUser, proxyPassword, at(s.addr, lastProxyPort))})
		gatewayReady(t)
		s.restart(t, s.Laptop, s.client, []string{"--egress-proxy", s.url("http", lastProxyPort)}, nil)
		fetch(t)
		overPath(t, s.Laptop, string(legs.LastTLS), 30*time.Second)
		var gs gateway.Status
		check(t, s.GatewayA.Status(within(t, 5*time.Second), &gs))
		if len(gs.Sessions) == 0 || !strings.HasSuffix(gs.Sessions[0].Path, string(legs.LastSSH)) {
			t.Errorf("the gateway shows %+v", gs.Sessions)
		}
		st := egressOf(t, s.Laptop, func(st client.Status) bool { return len(st.Relays) > 0 && st.Relays[0].Error != "" })
		if r := st.Relays[0]; st.Egress.Error != "" || !strings.Contains(r.Error, "403") || !strings.Contains(r.Remedy, "allow CONNECT to") {
			t.Errorf("%+v %+v", st.Egress, r)
		}
		rows := s.diagnosis(t)
		if row := rows["relay relay-1 by tls"]; row.Result == daemon.Pass || !strings.Contains(row.Detail, "403") || !strings.Contains(row.Remedy, "allow CONNECT to "+at(s.Addr(s.Relay1), wire.Port)) {
			t.Errorf("%+v", row)
		}
		if row := rows["relay relay-1 by tls on its own port"]; row.Result != daemon.Pass {
			t.Errorf("%+v", row)
		}
	})
	t.Run("SOCKS5", func(t *testing.T) {
		s.restart(t, s.GatewayA, s.gateway, nil, []string{fmt.Sprintf("ALL_PROXY=socks5://%s:%s@%s", proxyUser, proxyPassword, at(s.addr, socksPort))})
		gatewayReady(t)
		s.restart(t, s.Laptop, s.client, []string{"--egress-proxy", s.url("socks5h", socksPort)}, nil)
		fetch(t)
		overPath(t, s.Laptop, string(leg.TLS), 30*time.Second)
		transports(t, s.GatewayA, string(leg.TLS), 30*time.Second)
	})
	t.Run("names that the proxy alone resolves", func(t *testing.T) {
		const name = "relays.lab.test"
		resolver := s.Addr(s.Peer).Prev() // the router's address on the proxy's side
		must(s.Router.DNS(at(resolver, 53), name+". 60 A "+s.Addr(s.Relay1).String()))(t)
		check(t, s.Peer.SetResolvers(resolver.String()))
		check(t, s.Platform.SetResolvers(resolver.String()))
		if r, err := s.Sallyway(within(t, 20*time.Second), "relay", "update", "relay-1", "--host", name); err != nil {
			t.Fatal(err, r.Stderr)
		}
		// The client knows the new name once the platform has told it.
		check(t, lab.Until(within(t, 20*time.Second), 100*time.Millisecond, func() error {
			var st client.Status
			if err := s.Laptop.Status(t.Context(), &st); err != nil {
				return err
			}
			if !slices.ContainsFunc(st.Relays, func(r legs.Status) bool { return r.Host == name }) {
				return fmt.Errorf("%+v", st.Relays)
			}
			return nil
		}))
		for _, u := range []string{s.url("socks5h", socksPort), s.url("http", anyProxyPort)} {
			s.restart(t, s.Laptop, s.client, []string{"--egress-proxy", u}, nil)
			fetch(t)
			transports(t, s.Laptop, string(leg.TLS), 30*time.Second)
		}
		if !strings.Contains(s.full.Log.Tail(2000), "CONNECT "+name) {
			t.Error("the proxy has not been asked for the name")
		}
		if r, err := s.Sallyway(within(t, 20*time.Second), "relay", "update", "relay-1", "--host", s.Addr(s.Relay1).String()); err != nil {
			t.Fatal(err, r.Stderr)
		}
	})
	for _, u := range []string{s.url("http", anyProxyPort), s.url("socks5h", socksPort)} {
		scheme, _, _ := strings.Cut(u, "://")
		t.Run("a wrong password, "+scheme, func(t *testing.T) {
			s.credentials(t, proxyUser+":nonsense")
			s.restart(t, s.Laptop, s.client, []string{"--egress-proxy", u}, nil)
			st := egressOf(t, s.Laptop, func(st client.Status) bool { return st.Egress.Error != "" && st.Platform.Error != "" })
			for _, text := range []string{st.Egress.Error, st.Platform.Error} {
				if !strings.Contains(text, u+": does not take user") {
					t.Errorf("%q", text)
				}
			}
			for _, text := range []string{st.Egress.Remedy, st.Platform.Remedy} {
				if !strings.Contains(text, s.file) {
					t.Errorf("%q", text)
				}
			}
			bin := must(s.Bin("sallyway"))(t)
			r, err := s.Client.Run(within(t, 10*time.Second), bin, "connect", "status", "--state", s.Laptop.State)
			if err != nil || !strings.Contains(r.Stdout, "\nproxy      "+u) || !strings.Contains(r.Stdout, "does not take user") {
				t.Errorf("%v\n%s", err, r.Stdout)
			}
			rows := s.diagnosis(t)
			for _, name := range []string{"egress proxy", "egress proxy in use"} {
				if row := rows[name]; row.Result != daemon.Fail || !strings.Contains(row.Detail, "does not take user") || !strings.Contains(row.Remedy, s.file) {
					t.Errorf("%s: %+v", name, row)
				}
			}
			// The right one in the same file is enough.
			s.credentials(t, proxyUser+":"+proxyPassword)
			egressOf(t, s.Laptop, func(st client.Status) bool { return st.Egress.Error == "" && st.Platform.Connected })
		})
	}
	t.Run("UDP is first where it passes", func(t *testing.T) {
		fetch(t)
		check(t, s.OnlyByProxy(nil))
		transports(t, s.Laptop, string(leg.UDP), 60*time.Second)
		overPath(t, s.Laptop, string(leg.UDP), 60*time.Second)
		egressOf(t, s.Laptop, func(st client.Status) bool { return st.Platform.Connected })
	})
	t.Run("no password anywhere", func(t *testing.T) {
		for _, log := range must(filepath.Glob(filepath.Join(s.Dir(), "*", "*.log")))(t) {
			if b := must(os.ReadFile(log))(t); strings.Contains(string(b), proxyPassword) {
				t.Errorf("%s holds the password", log)
			}
		}
		for _, n := range []*lab.Node{s.Laptop, s.GatewayA} { // both have used the SOCKS5 proxy last
			b := must(os.ReadFile(filepath.Join(n.State, egress.StateFile)))(t)
			if strings.Contains(string(b), proxyPassword) || !strings.Contains(string(b), "socks5") {
				t.Errorf("%s: %s", n.Name, b)
			}
		}
	})
	t.Run("a password in the open is refused", func(t *testing.T) {
		bin := must(s.Bin("sallyway"))(t)
		r, err := s.Client.Run(within(t, 10*time.Second), bin, "connect", "--state", s.Laptop.State, "--egress-proxy", "http://ida:"+proxyPassword+"@"+at(s.addr, anyProxyPort))
		if err == nil || r.Code != daemon.ExitUsage || !strings.Contains(r.Stderr, "--egress-proxy-credentials") || strings.Contains(r.Stderr, proxyPassword) {
			t.Errorf("exit code %d: %s", r.Code, r.Stderr)
		}
	})
}
