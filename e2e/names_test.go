package e2e

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"sallyway/internal/lab"
)

// names has dig ask by UDP and TCP for names of each kind: ours, the gateway's network's, and everybody's.
func names(t *testing.T, s *lab.Site) {
	dig := program(t, "dig")
	ctx := within(t, time.Minute)
	check(t, s.AddResource(ctx, lab.Resource{Name: "intranet", Gateway: lab.Office, Address: "*.corp.test", TCP: "80", Domain: "corp.test"}, "client:"+lab.Laptop))
	if _, err := s.Laptop.Log.Wait(ctx, 0, `split DNS.*corp\.test`); err != nil { // until then the name is everybody's
		t.Fatal(err)
	}
	ask := func(args ...string) (string, error) {
		r, err := s.Client.Run(ctx, append([]string{dig, "+short", "+time=3", "+tries=1"}, args...)...)
		return strings.TrimSpace(r.Stdout), err
	}
	var virtual netip.Addr
	for _, how := range []string{"+notcp", "+tcp"} {
		out, err := ask(how, lab.FQDN("web", lab.DefaultOrg))
		if err != nil {
			t.Fatalf("dig %s: %v", how, err)
		}
		if virtual, err = netip.ParseAddr(out); err != nil {
			t.Errorf("dig %s of a resource: %q", how, out)
		}
		if out, err = ask(how, "AAAA", lab.FQDN("web", lab.DefaultOrg)); err != nil || !strings.Contains(out, ":") {
			t.Errorf("dig %s AAAA of a resource: %q, %v", how, out, err)
		}
		if out, err = ask(how, "public.example"); err != nil || out != "192.0.2.80" {
			t.Errorf("dig %s of a public name: %q, %v", how, out, err)
		}
		err = lab.Until(within(t, 10*time.Second), 100*time.Millisecond, func() error { _, err := wantAnswer(ask, how); return err })
		if err != nil {
			t.Error(err)
		}
	}
	if virtual.IsValid() {
		reach(t, s.Client, netip.AddrPortFrom(virtual, webPort), 5*time.Second)
	}
	r, err := s.Client.Run(ctx, program(t, "curl"), "-sS", "http://wiki.corp.test/")
	if err != nil || r.Stdout != page {
		t.Errorf("page by a name of the gateway's network: %q, %v", r.Stdout, err)
	}
	for _, suffix := range []string{"sallyway.internal", "corp.test"} {
		if asked := s.PublicDNS.Asked(suffix); len(asked) > 0 {
			t.Errorf("the public resolver was asked for %v", asked)
		}
	}
	if asked := s.PrivateDNS.Asked("public.example"); len(asked) > 0 {
		t.Errorf("the gateway's resolver was asked for %v", asked)
	}
	out, err := s.Client.Run(ctx, dig, "+time=3", "+tries=1", "nothing."+lab.DefaultOrg+".sallyway.internal")
	if err != nil || !strings.Contains(out.Stdout, "NXDOMAIN") {
		t.Errorf("a name that is nobody's: %v\n%s", err, out.Stdout)
	}
}

func wantAnswer(ask func(...string) (string, error), how string) (string, error) {
	out, err := ask(how, "wiki.corp.test")
	if err == nil && !strings.Contains(out, ".") {
		err = &answerError{how, out}
	}
	return out, err
}

type answerError struct{ how, out string }

func (e *answerError) Error() string { return "dig " + e.how + " wiki.corp.test: " + e.out }

// TestResolvConfIsGivenBack: the client's edit of resolv.conf is undone when it ends, and after it was killed at its next
// start and end.
func TestResolvConfIsGivenBack(t *testing.T) {
	s := newSite(t, lab.Config{}, lab.SiteConfig{NoBranch: true})
	servePrivate(t, s)
	want := "nameserver " + s.ResolverAddr().String() + "\n"
	read := func() string { return string(must(os.ReadFile(s.Client.ResolvConf()))(t)) }
	err := lab.Until(within(t, 10*time.Second), 20*time.Millisecond, func() error {
		if read() == want {
			return errors.New("a client with a TUN leaves resolv.conf as it is")
		}
		return nil
	})
	check(t, err)
	s.Laptop.Kill()
	check(t, s.Laptop.Proc.Start())
	check(t, s.Laptop.WaitReady(within(t, 30*time.Second)))
	check(t, s.Laptop.Stop())
	if got := read(); got != want {
		t.Errorf("resolv.conf afterwards: %q, want %q", got, want)
	}
}
