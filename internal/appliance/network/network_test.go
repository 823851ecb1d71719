package network

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sallyway/internal/appliance/network/firewall"
	"sallyway/internal/lab/alone"
)

// stillClock is a clock that nobody may set.
type stillClock struct{ t *testing.T }

func (c stillClock) Now() time.Time { return time.Now() }

func (c stillClock) Step(d time.Duration) error {
	c.t.Errorf("the clock was stepped by %v", d)
	return errors.New("not this one")
}

func (c stillClock) Slew(time.Duration) error { return nil }

// nicName is the appliance's end of the wire in these tests, and nicMAC its hardware address.
const nicName = "nic0"

var nicMAC = net.HardwareAddr{0x52, 0x54, 0, 1, 2, 3}

// logTo writes a log to the test's.
func logTo(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// begin runs a network until the test's end.
func begin(t *testing.T, cfg Config) *Network {
	t.Helper()
	cfg.Log, cfg.Clock = logTo(t), stillClock{t}
	cfg.ResolvConf = filepath.Join(t.TempDir(), "resolv.conf")
	if len(cfg.Interfaces) == 0 {
		cfg.Interfaces = []Interface{{Name: nicName}}
	}
	n, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- n.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return n
}

// until polls.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; {
		if ok() {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// nicOf is the one link of a status.
func nicOf(n *Network) Link {
	for _, l := range n.Status().Links {
		return l
	}
	return Link{}
}

func addresses(p ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, s := range p {
		all = append(all, netip.MustParsePrefix(s))
	}
	return all
}

func TestStaticAddresses(t *testing.T) {
	t.Parallel()
	if !alone.Here(t) {
		return
	}
	peer := alone.NewPeer(t, nicName, nicMAC)
	if err := peer.Up("192.0.2.1/24", "2001:db8::1/64"); err != nil {
		t.Fatal(err)
	}
	n := begin(t, Config{
		Hostname: "office-1",
		Interfaces: []Interface{{
			MAC: "52:54:00:01:02:03", MTU: 1400,
			Addresses: addresses("192.0.2.10/24", "2001:db8::10/64"),
			Routers:   []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("fe80::1")},
			Routes:    []Route{{To: netip.MustParsePrefix("198.51.100.0/24"), Via: netip.MustParseAddr("192.0.2.7")}},
		}},
		DNS: []netip.Addr{netip.MustParseAddr("192.0.2.53")}, Search: []string{"example.org"},
	})
	<-n.Online()
	until(t, "both addresses", func() bool { return len(nicOf(n).Addresses) == 2 })
	l := nicOf(n)
	if l.Source != "static" || l.MTU != 1400 || !l.Carrier || l.Error != "" || len(l.Routers) != 2 {
		t.Errorf("link: %+v", l)
	}
	if name, err := os.Hostname(); err != nil || name != "office-1" {
		t.Errorf("host name %q, %v", name, err)
	}
	b, err := os.ReadFile(n.cfg.ResolvConf)
	if err != nil || !strings.Contains(string(b), "nameserver 192.0.2.53\nsearch example.org\n") {
		t.Errorf("resolv.conf: %q, %v", b, err)
	}
	routes, err := netlink.RouteGet(net.IPv4(198, 51, 100, 9))
	if err != nil || len(routes) != 1 || !routes[0].Gw.Equal(net.IPv4(192, 0, 2, 7)) {
		t.Errorf("route: %v, %v", routes, err)
	}
	// A host of the network is reached, and gets its answer.
	var ln net.Listener
	if err := peer.Do(func() (err error) {
		ln, err = net.Listen("tcp", "192.0.2.1:80")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "hello")
			c.Close()
		}
	}()
	c, err := net.DialTimeout("tcp", "192.0.2.1:80", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, err := io.ReadAll(c); err != nil || string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestFilterFirst shows that no link is up where the packet filter cannot be set, and that links go down when that comes later.
func TestFilterFirst(t *testing.T) {
	t.Parallel()
	if !alone.Here(t) {
		return
	}
	alone.NewPeer(t, nicName, nicMAC)
	// A thread without CAP_NET_ADMIN may set no rules; the NIC was up before.
	l, err := netlink.LinkByName(nicName)
	if err != nil {
		t.Fatal(err)
	}
	n, err := New(Config{Interfaces: []Interface{{Name: nicName}}, Ports: []firewall.Port{{Protocol: "sctp", First: 1, Last: 1}}, Log: logTo(t)})
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		t.Fatal(err)
	}
	if err := n.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "no link is raised") {
		t.Errorf("Run with a filter that cannot be set: %v", err)
	}
	if isUp(t) {
		t.Error("the link is up without a packet filter")
	}

	// The same when somebody removes the table, and it cannot be set again; then it can.
	n = begin(t, Config{})
	until(t, "up", func() bool { return isUp(t) })
	n.mu.Lock()
	n.ports = []firewall.Port{{Protocol: "sctp", First: 1, Last: 1}}
	n.mu.Unlock()
	if again := n.guard(); again != retryFilter || isUp(t) {
		t.Errorf("the link is up, and the filter is looked at again in %v", again)
	}
	if e := n.Status().Error; !strings.Contains(e, "sctp") {
		t.Errorf("status: %q", e)
	}
	n.mu.Lock()
	n.ports = nil
	n.mu.Unlock()
	n.guard()
	n.changed()
	until(t, "up again", func() bool { return isUp(t) && n.Status().Error == "" })
}

func isUp(t *testing.T) bool {
	t.Helper()
	l, err := netlink.LinkByName(nicName)
	if err != nil {
		t.Fatal(err)
	}
	return l.Attrs().RawFlags&unix.IFF_UP != 0
}

func TestConfigErrors(t *testing.T) {
	addr := netip.MustParseAddr
	for _, tc := range []struct {
		cfg  Config
		want string
	}{
		{Config{Hostname: "a b"}, "hostname"},
		{Config{Search: []string{"x\noptions ndots:9"}}, "search"},
		{Config{DNS: []netip.Addr{addr("0.0.0.0")}}, "dns"},
		{Config{NTP: []string{"a b"}}, "ntp"},
		{Config{Interfaces: []Interface{{Name: "lo"}}}, "lo"},
		{Config{Interfaces: []Interface{{Name: "../etc"}}}, "kernel"},
		{Config{Interfaces: []Interface{{Name: "eth0"}, {Name: "eth0"}}}, "twice"},
		{Config{Interfaces: []Interface{{MAC: "nonsense"}}}, "mac"},
		{Config{Interfaces: []Interface{{Name: "eth0", MTU: 576}}}, "mtu"},
		{Config{Interfaces: []Interface{{Name: "eth0", Addresses: addresses("127.0.0.1/8")}}}, "address"},
		{Config{Interfaces: []Interface{{Name: "eth0", Routers: []netip.Addr{addr("192.0.2.1")}}}}, "no address of its family"},
		{Config{Interfaces: []Interface{{Name: "eth0", Addresses: addresses("192.0.2.2/24"), Routers: []netip.Addr{addr("192.0.2.1"), addr("192.0.2.3")}}}}, "one of each family"},
		{Config{Interfaces: []Interface{{Name: "eth0", Routes: []Route{{To: netip.MustParsePrefix("10.0.0.0/8"), Via: addr("fe80::1")}}}}}, "route"},
	} {
		if _, err := New(tc.cfg); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: %v, want something about %q", tc.cfg, err, tc.want)
		}
	}
	if _, err := New(Config{}); err != nil {
		t.Errorf("the zero value: %v", err)
	}
}

// received are events in their order, as a server saw them.
type received struct {
	mu  sync.Mutex
	all []string
}

func (r *received) add(s string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, s)
}

func (r *received) has(s string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Contains(r.all, s)
}
