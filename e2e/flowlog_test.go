package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/lab"
)

// TestFlowLog: connections stand in the flow log with who, what, which way, how much and why they ended: one that ended by itself, and one that ended
// with the policy that allowed it.
func TestFlowLog(t *testing.T) {
	s := newSite(t, lab.Config{}, lab.SiteConfig{NoBranch: true, PlatformArgs: []string{"--probe-relays", "private"}})
	servePrivate(t, s)
	echo := at(lab.WebAddr, echoPort)
	if err := lab.Until(within(t, 30*time.Second), 50*time.Millisecond, func() error { return dialOnce(t.Context(), s.Client, echo, time.Second) }); err != nil {
		t.Fatal(err)
	}
	// exchange sends n bytes and reads them back.
	exchange := func(n int) net.Conn {
		t.Helper()
		c := must(s.Client.Dial(within(t, 10*time.Second), "tcp", echo))(t)
		t.Cleanup(func() { c.Close() })
		check(t, c.SetDeadline(time.Now().Add(20*time.Second)))
		sent := bytes.Repeat([]byte("sally"), n/5)
		wrote := make(chan error, 1)
		go func() {
			_, err := c.Write(sent)
			wrote <- err
		}()
		got := make([]byte, n)
		_, err := io.ReadFull(c, got)
		check(t, err)
		check(t, <-wrote)
		if !bytes.Equal(got, sent) {
			t.Fatal("other bytes came back")
		}
		return c
	}
	const ended, killed = 100_000, 50_000
	c := exchange(ended)
	check(t, c.(interface{ CloseWrite() error }).CloseWrite())
	if n, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("%d bytes more, %v", n, err)
	}
	c = exchange(killed)
	var policies control.List[control.PolicyRecord]
	check(t, s.SallywayJSON(within(t, 10*time.Second), &policies, "policy", "list"))
	rule := ""
	for _, p := range policies.Items {
		if p.Resource == "web" && strings.Contains(p.Name, lab.Laptop) {
			rule = p.Name
		}
	}
	must(s.Sallyway(within(t, 10*time.Second), "policy", "disable", rule))(t)
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Fatal("the connection goes on without its policy")
	}
	for _, want := range []struct {
		bytes  int64
		reason string
	}{{ended, "closed"}, {killed, "no policy allows it any more"}} {
		check(t, lab.Until(within(t, 30*time.Second), 200*time.Millisecond, func() error {
			var l control.List[control.FlowRecord]
			if err := s.SallywayJSON(within(t, 10*time.Second), &l, "flow", "list", "--client", lab.Laptop, "--resource", "web", "--since", "1h"); err != nil {
				return err
			}
			i := slices.IndexFunc(l.Items, func(f control.FlowRecord) bool { return f.Sent == want.bytes && !f.Ended.IsZero() })
			if i < 0 {
				return fmt.Errorf("no flow with %d bytes among %+v", want.bytes, l.Items)
			}
			f := l.Items[i]
			if f.Received != want.bytes || f.Reason != want.reason || f.Client != lab.Laptop || f.Resource != "web" || f.Gateway != lab.Office || f.Rule != rule || f.Protocol != "tcp" ||
				f.Destination != echo || f.Address != echo || f.Path == "" || f.Started.After(f.Ended) {
				t.Fatalf("%+v", f)
			}
			return nil
		}))
	}
	// A webhook to the private web server: the platform has one way there, through the gateway, and that alone by a policy.
	url := "http://" + at(lab.WebAddr, webPort) + "/"
	must(s.Sallyway(within(t, 10*time.Second), "webhook", "create", "inside", "--url", url, "--through-gateways"))(t)
	if r, err := s.Sallyway(within(t, 30*time.Second), "webhook", "test", "inside"); err == nil || strings.Contains(r.Stderr, "the receiver answered") {
		t.Errorf("a webhook goes inside without a policy: %v %s", err, r.Stderr)
	}
	must(s.Sallyway(within(t, 10*time.Second), "policy", "allow", "--from", "platform", "--resource", "web"))(t)
	check(t, lab.Until(within(t, 30*time.Second), 200*time.Millisecond, func() error {
		// The page takes GET alone: that it says so is proof that the event got there.
		r, err := s.Sallyway(within(t, 30*time.Second), "webhook", "test", "inside")
		if strings.Contains(r.Stderr, "the receiver answered 405") {
			return nil
		}
		return fmt.Errorf("%w: %s", err, r.Stderr)
	}))
	if r, err := s.Sallyway(within(t, 10*time.Second), "webhook", "create", "direct", "--url", "https://"+at(lab.WebAddr, webPort)+"/in"); err == nil || !strings.Contains(r.Stderr, "not a public address") {
		t.Errorf("a webhook to a private address that no gateway dials: %v %s", err, r.Stderr)
	}
	r := must(s.Sallyway(within(t, 10*time.Second), "flow", "export", "--resource", "vault"))(t)
	if strings.TrimSpace(r.Stdout) != "" {
		t.Errorf("flows to what nobody reached: %s", r.Stdout)
	}
}
