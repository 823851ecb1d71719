package e2e

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sallyway/internal/control"
	"sallyway/internal/lab"
)

// peerPort is where turnutils_peer listens.
const peerPort = 3480

// TestStandardTURNClient has coturn's client talk over the relay with a configured peer, over every transport.
func TestStandardTURNClient(t *testing.T) {
	uclient, peerBin := program(t, "turnutils_uclient"), program(t, "turnutils_peer")
	l := newLab(t, lab.Config{})
	peer := netip.AddrPortFrom(l.Addr(l.Peer), peerPort)
	rtcp := netip.AddrPortFrom(l.Addr(l.Peer), peerPort+1) // coturn's client binds the port above too
	s, err := l.Build(within(t, 2*time.Minute), lab.SiteConfig{NoBranch: true, RelayCreate: []string{"--peer", peer.String() + "," + rtcp.String()}}, nil)
	check(t, err)
	must(s.Peer.Start(lab.Spec{Name: "peer", Args: []string{peerBin, "-L", peer.Addr().String(), "-p", strconv.Itoa(peerPort)}}))(t)
	// Each run is a client of its own: coturn's leaves its allocations behind, and a node may have so many only.
	n := 0
	fresh := func() control.TURNCredential {
		n++
		name := fmt.Sprintf("turn-%d", n)
		must(s.Sallyway(within(t, 10*time.Second), "client", "create", name))(t)
		return credential(t, s, lab.DefaultOrg, s.RelayA.Name, name)
	}
	for _, transport := range []struct {
		name string
		args []string
	}{
		{"UDP", nil},
		{"TCP", []string{"-t"}},
		{"TLS", []string{"-t", "-S"}},
		{"DTLS", []string{"-S"}},
	} {
		t.Run(transport.name+" with indications", func(t *testing.T) {
			out, err := turn(t, s, uclient, fresh(), s.Relay1, peer, append(transport.args, "-s")...)
			if err != nil || !passed(out) {
				t.Errorf("%v\n%s", err, out)
			}
		})
		t.Run(transport.name+" with a channel", func(t *testing.T) {
			// This client takes any number from 0x4000 to 0x7fff for each of its two channels. RFC 8656 §12 has left 0x4000 to
			// 0x4fff, the others are refused with 400, and it then ends: on average every sixteenth run has two good numbers.
			for range 400 {
				out, err := turn(t, s, uclient, fresh(), s.Relay1, peer, transport.args...)
				if strings.Contains(out, "channel bind: error 400") {
					continue
				}
				if err != nil || !passed(out) {
					t.Errorf("%v\n%s", err, out)
				}
				return
			}
			t.Error("no pair of channel numbers was good")
		})
	}
	t.Run("another peer", func(t *testing.T) {
		other := netip.AddrPortFrom(peer.Addr(), peerPort+2)
		must(s.Peer.Start(lab.Spec{Name: "peer2", Args: []string{peerBin, "-L", other.Addr().String(), "-p", strconv.Itoa(int(other.Port()))}}))(t)
		for _, p := range []netip.AddrPort{other, netip.AddrPortFrom(l.Addr(l.Platform), 443), netip.MustParseAddrPort("127.0.0.1:5349")} {
			if out, err := turn(t, s, uclient, fresh(), s.Relay1, p); err == nil && strings.Contains(out, "tot_recv_msgs=20") {
				t.Errorf("the relay sends to %v", p)
			}
		}
	})
	t.Run("wrong password", func(t *testing.T) {
		bad := fresh()
		bad.Password = "x" + bad.Password
		if out, err := turn(t, s, uclient, bad, s.Relay1, peer); err == nil && strings.Contains(out, "tot_recv_msgs=20") {
			t.Errorf("a wrong password works:\n%s", out)
		}
	})
}

// passed says whether all of the messages came back.
func passed(out string) bool {
	return strings.Contains(out, "Total lost packets 0 ") && regexp.MustCompile(`tot_recv_msgs=20\b`).MatchString(out)
}

// credential asks for a TURN credential for standard software.
func credential(t *testing.T, s *lab.Site, org, relay, client string) control.TURNCredential {
	t.Helper()
	var c control.TURNCredential
	check(t, s.SallywayJSON(within(t, 10*time.Second), &c, "relay", "credential", relay, "--org", org, "--client", client))
	if c.Username == "" || c.Password == "" {
		t.Fatalf("credential %+v", c)
	}
	return c
}

// turnWait is how long coturn's client may take for its 20 messages: it goes on asking where it is refused.
const turnWait = 8 * time.Second

// turn sends 20 messages to a peer over a relay with coturn's client.
func turn(t *testing.T, s *lab.Site, uclient string, c control.TURNCredential, relay *lab.Host, peer netip.AddrPort, more ...string) (string, error) {
	t.Helper()
	args := append([]string{
		uclient, "-u", c.Username, "-w", c.Password, "-p", "5349", "-e", peer.Addr().String(), "-r", strconv.Itoa(int(peer.Port())),
		"-v", "-c", "-n", "20", "-m", "1", "-l", "171",
	}, more...)
	r, err := s.Client.Run(within(t, turnWait), append(args, s.Addr(relay).String())...)
	return r.Stdout + r.Stderr, err
}

// TestRelayKnowsNothing: after traffic no file or log of a relay, and no packet that it was given, holds what the traffic
// was, and no file or log who spoke with whom.
func TestRelayKnowsNothing(t *testing.T) {
	s := newSite(t, lab.Config{}, lab.SiteConfig{NoBranch: true, RelayArgs: []string{"--drain-timeout", "2s"}})
	p := servePrivate(t, s)
	reach(t, s.Client, p.web.Addr, 20*time.Second)
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails
	planted := "planted-" + hex.EncodeToString(b)
	packets, seen := sniff(t, []*lab.Host{s.Relay1, s.Relay2}, planted)

	secret := must(s.Private.Web(at(lab.WebAddr, 7100), planted))(t)
	r, err := s.Client.Run(within(t, 20*time.Second), program(t, "curl"), "-sS", "-H", "X-Planted: "+planted, secret.URL("/"))
	if err != nil || r.Stdout != planted {
		t.Fatalf("curl: %q, %v", r.Stdout, err)
	}
	c := must(s.Client.Dial(within(t, 10*time.Second), "tcp", p.echo.Addr.String()))(t)
	echoes(t, c, bytes.Repeat([]byte(planted), 1000))
	c.Close()
	u := must(s.Client.Dial(within(t, 10*time.Second), "udp", p.udp.Addr.String()))(t)
	check(t, roundTrip(u, []byte(planted)))
	u.Close()
	// Sessions that end and legs that move write logs too.
	check(t, s.Laptop.Restart())
	reach(t, s.Client, p.web.Addr, resume)
	must(s.MoveClient())(t)
	reach(t, s.Client, p.web.Addr, resume)

	if packets.Load() == 0 {
		t.Error("no packet was seen: the test sees nothing")
	}
	if n := seen.Load(); n > 0 {
		t.Errorf("%d packets at the relays hold the planted value in clear", n)
	}
	check(t, s.RelayA.Stop())
	check(t, s.RelayB.Stop())
	never := []string{planted, lab.WebAddr.String(), lab.WebAddr6.String(), "203.0.113.18", "203.0.113.19", "web.default"}
	files := 0
	for _, h := range []*lab.Host{s.Relay1, s.Relay2} {
		check(t, filepath.WalkDir(h.Dir(), func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			files++
			for _, n := range never {
				if i := bytes.Index(content, []byte(n)); i >= 0 {
					t.Errorf("%s on %s holds %q: …%s…", filepath.Base(path), h.Name, n, content[max(0, i-120):min(len(content), i+60)])
				}
			}
			return nil
		}))
	}
	if files < 4 {
		t.Errorf("only %d files were looked at", files)
	}
}

// sniff counts the packets on the hosts' links, and those that hold a text.
func sniff(t *testing.T, hosts []*lab.Host, text string) (packets, holding *atomic.Int64) {
	t.Helper()
	packets, holding = new(atomic.Int64), new(atomic.Int64)
	for _, h := range hosts {
		var f *os.File
		check(t, h.Do(func() error {
			const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // network order
			fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, all)
			if err != nil {
				return fmt.Errorf("packet socket: %w", err)
			}
			f = os.NewFile(uintptr(fd), "packets")
			return nil
		}))
		t.Cleanup(func() { f.Close() })
		go func() {
			b := make([]byte, 1<<17)
			for {
				n, err := f.Read(b)
				if errors.Is(err, os.ErrClosed) {
					return
				}
				if err == nil {
					packets.Add(1)
					if bytes.Contains(b[:n], []byte(text)) {
						holding.Add(1)
					}
				}
			}
		}()
	}
	return packets, holding
}
