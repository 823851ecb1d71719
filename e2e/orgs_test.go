package e2e

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/lab"
	"sallyway/relay/leg"
	"sallyway/tunnel"
)

// stolen is what a thief finds in the state folder of a node.
type stolen struct {
	node   identity.Node
	key    crypto.Signer
	certs  map[string]*tls.Certificate // leaf, and site of a gateway
	config *control.Config
	trust  control.Trust
}

func steal(t *testing.T, n *lab.Node) stolen {
	t.Helper()
	read := func(name string) []byte { return must(os.ReadFile(filepath.Join(n.State, name)))(t) }
	var state struct {
		Node         identity.Node        `json:"node"`
		Certificates control.Certificates `json:"certificates"`
		Trust        control.Trust        `json:"trust"`
	}
	check(t, json.Unmarshal(read("node.json"), &state))
	var cache struct {
		Config *control.Config `json:"config"`
	}
	check(t, json.Unmarshal(read("config.json"), &cache))
	key := must(identity.DecodeKey(read("node.key")))(t)
	certs := make(map[string]*tls.Certificate)
	for name, pem := range map[string]string{"leaf": state.Certificates.Leaf, "site": state.Certificates.Site} {
		if pem != "" {
			certs[name] = must(identity.TLSCertificate(must(identity.DecodeCertificates([]byte(pem)))(t), key))(t)
		}
	}
	if cache.Config == nil {
		t.Fatalf("%s has no configuration", n.Name)
	}
	return stolen{state.Node, key, certs, cache.Config, state.Trust}
}

// ask sends a request to the platform from the client's host.
func ask(l *lab.Lab, method, path, bearer string, form url.Values) (*http.Response, error) {
	c := l.Client.HTTPClient()
	c.Transport.(*http.Transport).TLSClientConfig = &tls.Config{InsecureSkipVerify: true} // what is asked is refused anyway, or harmless
	req, err := http.NewRequest(method, l.PlatformURL()+path, strings.NewReader(form.Encode()))
	if err != nil {
		return nil, err
	}
	if form != nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	return c.Do(req)
}

// accessToken has the platform give a token for an assertion about node, signed with key (RFC 7523).
func accessToken(l *lab.Lab, key crypto.Signer, node identity.Node) (string, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", err
	}
	now := time.Now()
	assertion, err := jwt.Signed(signer).Claims(jwt.Claims{
		Issuer: node.String(), Subject: node.String(), Audience: jwt.Audience{l.PlatformURL()}, ID: rand.Text(),
		IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(time.Minute)),
	}).Serialize()
	if err != nil {
		return "", err
	}
	resp, err := ask(l, http.MethodPost, "/api/v1/node/token", "", url.Values{
		"grant_type": {"urn:ietf:params:oauth:grant-type:jwt-bearer"}, "assertion": {assertion},
	})
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var answer struct {
		Token string `json:"access_token"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || resp.StatusCode != http.StatusOK || answer.Token == "" {
		return "", fmt.Errorf("the platform answers %s: %w", resp.Status, err)
	}
	return answer.Token, nil
}

// TestOrganizationsAreApart: what another organization has gets nowhere, at each layer.
func TestOrganizationsAreApart(t *testing.T) {
	l := newLab(t, lab.Config{})
	ctx := within(t, 4*time.Minute)
	must(l.StartPlatform(ctx))(t)
	check(t, l.Login(ctx))
	const rival = "rival"
	must(l.Sallyway(ctx, "organization", "create", rival))(t)
	start := func(org string, kind identity.Kind, name string, h *lab.Host, args ...string) *lab.Node {
		t.Helper()
		return must(l.StartNode(ctx, lab.NodeSpec{Org: org, Kind: kind, Name: name, Host: h, Args: args}))(t)
	}
	relay := start(lab.DefaultOrg, identity.Relay, "relay-1", l.Relay1)
	office := start(lab.DefaultOrg, identity.Gateway, lab.Office, l.Gateway)
	laptop := start(lab.DefaultOrg, identity.Client, lab.Laptop, l.Client, "--tun", "off", "--http", "127.0.0.1:3128")
	rivalRelay := start(rival, identity.Relay, "relay-1", l.Relay2)
	rivalOffice := start(rival, identity.Gateway, "lair", l.Gateway2)
	spy := start(rival, identity.Client, "spy", l.Client, "--tun", "off", "--http", "127.0.0.1:3129")
	web := must(l.Private.Web(at(lab.WebAddr, webPort), page))(t)
	lair := must(l.Private2.Web(at(lab.Private2Web, webPort), "lair\n"))(t)
	check(t, l.AddResource(ctx, lab.Resource{Name: "web", Gateway: lab.Office, Address: lab.WebAddr.String(), TCP: "80"}, "client:"+lab.Laptop))
	check(t, l.AddResource(ctx, lab.Resource{Org: rival, Name: "lair", Gateway: "lair", Address: lab.Private2Web.String(), TCP: "80"}, "client:spy"))

	curl := program(t, "curl")
	fetch := func(proxy, url string) (string, error) {
		r, err := l.Client.Run(ctx, curl, "-sS", "--max-time", "8", "--proxytunnel", "--proxy", "http://"+proxy, url)
		return r.Stdout, err
	}
	t.Run("each works at home", func(t *testing.T) {
		for proxy, url := range map[string]string{"127.0.0.1:3128": web.URL("/"), "127.0.0.1:3129": lair.URL("/")} {
			err := lab.Until(within(t, 20*time.Second), 100*time.Millisecond, func() error {
				_, err := fetch(proxy, url)
				return err
			})
			if err != nil {
				t.Errorf("%s: %v", url, err)
			}
		}
	})
	calls := web.Calls()
	t.Run("client: no route to the other's resources", func(t *testing.T) {
		for _, url := range []string{web.URL("/"), "http://" + lab.FQDN("web", lab.DefaultOrg) + "/"} {
			if out, err := fetch("127.0.0.1:3129", url); err == nil {
				t.Errorf("the spy fetched %s: %q", url, out)
			}
		}
	})
	t.Run("platform: a token names its organization", func(t *testing.T) {
		n := must(l.CreateNode(ctx, lab.NodeSpec{Org: rival, Kind: identity.Client, Name: "mole", Host: l.Peer}))(t)
		tok := must(control.ParseToken(n.Record.Token))(t)
		tok.Node.Org = lab.DefaultOrg
		check(t, lab.WriteToken(n.Token, tok.String(), 0))
		// The relay's host can reach the platform.
		check(t, lab.WriteToken(l.Relay2.Path("mole.token"), tok.String(), 0))
		r, err := l.Relay2.Run(within(t, 20*time.Second), must(l.Bin("sallyway"))(t), "connect", "--tun", "off",
			"--token-file", l.Relay2.Path("mole.token"), "--state", l.Relay2.Path("mole"))
		if err == nil || r.Code != 3 {
			t.Errorf("exit code %d, %v", r.Code, err)
		}
		t.Logf("%s", r.Stderr)
	})
	t.Run("platform: objects of the other are not there", func(t *testing.T) {
		for _, args := range [][]string{
			{"resource", "create", "x", "--org", rival, "--gateway", lab.Office, "--address", "10.20.0.10", "--tcp", "80"},
			{"resource", "create", "x", "--org", rival, "--gateway", office.Record.ID, "--address", "10.20.0.10", "--tcp", "80"},
			{"policy", "allow", "--org", rival, "--client", "spy", "--resource", "web"},
			{"policy", "allow", "--org", lab.DefaultOrg, "--client", spy.Record.ID, "--resource", "web"},
			{"gateway", "show", office.Record.ID, "--org", rival},
			{"relay", "credential", relay.Record.ID, "--org", rival, "--client", "spy"},
		} {
			if r, err := l.Sallyway(ctx, args...); err == nil {
				t.Errorf("sallyway %s: %s", strings.Join(args, " "), r.Stdout)
			}
		}
	})

	mine, theirs := steal(t, spy), steal(t, laptop)
	home := theirs.config.Dialling.Gateways[0] // office
	legTo := func(ctx context.Context, ref control.RelayRef, user, password string) (*leg.Leg, error) {
		roots := must(identity.DecodeCertificates([]byte(ref.Roots)))(t)
		trust := identity.Trust{Roots: roots, Pins: ref.Pins}
		var lg *leg.Leg
		err := l.Client.Do(func() (err error) {
			lg, err = leg.Dial(ctx, leg.Config{
				Relay: ref.Node, Addrs: []netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr(ref.Host), ref.Port)},
				Verify: func(chain []*x509.Certificate) error {
					_, err := trust.Verify(chain, x509.ExtKeyUsageServerAuth)
					return err
				},
				Credentials: func() (string, string) { return user, password },
			})
			return err
		})
		return lg, err
	}
	ref, rivalRef := home.Relays[0], mine.config.Dialling.Gateways[0].Relays[0]
	rivals := map[string]stolen{"client": mine, "gateway": steal(t, rivalOffice), "relay": steal(t, rivalRelay)}
	gatewayRef := rivals["gateway"].config.Gateway.Relays[0]
	t.Run("relay: the other's credential opens no allocation", func(t *testing.T) {
		for _, c := range []control.RelayRef{rivalRef, gatewayRef} {
			lg, err := legTo(within(t, 20*time.Second), ref, c.Username, c.Password)
			if err == nil {
				lg.Close()
				t.Errorf("an allocation was made for %s", c.Username)
			}
			t.Logf("refused: %v", err)
		}
	})
	t.Run("platform: a node proves itself and sees its organization only", func(t *testing.T) {
		for kind, r := range rivals {
			if _, err := accessToken(l, r.key, theirs.node); err == nil {
				t.Errorf("the key of the other's %s passes for the laptop", kind)
			}
			access, err := accessToken(l, r.key, r.node)
			if err != nil {
				t.Errorf("the %s is not itself: %v", kind, err)
				continue
			}
			resp := must(ask(l, http.MethodGet, "/api/v1/orgs/"+lab.DefaultOrg+"/status", access, nil))(t)
			resp.Body.Close()
			if resp.StatusCode != http.StatusUnauthorized && resp.StatusCode != http.StatusForbidden && resp.StatusCode != http.StatusNotFound {
				t.Errorf("the other's %s asks for the organization's status: %s", kind, resp.Status)
			}
			told := string(must(json.Marshal(r.config))(t))
			if kind != "relay" && (strings.Contains(told, lab.WebAddr.String()) || strings.Contains(told, home.Node.ID)) {
				t.Errorf("the other's %s is told of this organization", kind)
			}
		}
	})
	t.Run("relay: a forged user name opens no allocation", func(t *testing.T) {
		name := strings.ReplaceAll(ref.Username, theirs.node.ID, mine.node.ID)
		lg, err := legTo(within(t, 20*time.Second), ref, name, ref.Password)
		if err == nil {
			lg.Close()
			t.Error("an allocation was made")
		}
	})
	t.Run("relay: no rendezvous with the other's gateway", func(t *testing.T) {
		lg := must(legTo(within(t, 20*time.Second), rivalRef, rivalRef.Username, rivalRef.Password))(t)
		defer lg.Close()
		for _, n := range []identity.Node{home.Node, {Org: rival, Kind: identity.Gateway, ID: home.Node.ID}} {
			if _, err := lg.Connect(within(t, 10*time.Second), n); err == nil {
				t.Errorf("rendezvous with %v", n)
			} else {
				t.Logf("refused: %v", err)
			}
		}
	})
	t.Run("relay: its certificate is not trusted by the other", func(t *testing.T) {
		swapped := ref
		swapped.Roots, swapped.Pins = rivalRef.Roots, rivalRef.Pins
		if lg, err := legTo(within(t, 20*time.Second), swapped, ref.Username, ref.Password); err == nil {
			lg.Close()
			t.Error("the spy takes the other's relay for its own")
		}
	})
	t.Run("gateway: TLS refuses the other's certificate, even on a stolen leg", func(t *testing.T) {
		lg := must(legTo(within(t, 20*time.Second), ref, ref.Username, ref.Password))(t)
		defer lg.Close()
		dial := func(cert *tls.Certificate, trust control.Trust) error {
			ch, err := lg.Connect(within(t, 10*time.Second), home.Node)
			if err != nil {
				return fmt.Errorf("rendezvous: %w", err)
			}
			s, err := tunnel.Dial(within(t, 10*time.Second), tunnel.DialConfig{
				Link: ch, Gateway: home.Node,
				Certificate: func() (*tls.Certificate, error) { return cert, nil },
				Trust: func() *identity.Trust {
					tr, err := trust.For(identity.Gateway)
					if err != nil {
						return new(identity.Trust)
					}
					return tr
				},
			})
			if err != nil {
				return err
			}
			defer s.Close("test over")
			c, err := s.DialTCP(within(t, 10*time.Second), lab.WebAddr.String(), webPort)
			if err != nil {
				return err
			}
			return errors.Join(c.Close())
		}
		if err := dial(theirs.certs["leaf"], theirs.trust); err != nil {
			t.Errorf("the test's own way does not work with the right certificate: %v", err)
		}
		for kind, r := range rivals {
			for which, cert := range r.certs {
				mark := office.Log.Mark()
				if err := dial(cert, theirs.trust); err == nil {
					t.Errorf("the gateway took the %s of the other's %s", which, kind)
				} else {
					t.Logf("%s of the %s refused: %v", which, kind, err)
				}
				if _, err := office.Log.Wait(within(t, 5*time.Second), mark, `(?i)refus`); err != nil {
					t.Error(err)
				}
			}
		}
		if err := dial(theirs.certs["leaf"], mine.trust); err == nil {
			t.Error("the spy took the other's gateway for its own")
		}
	})
	if n := web.Calls() - calls; n > 0 {
		t.Errorf("the other's page was fetched %d times", n)
	}
}
