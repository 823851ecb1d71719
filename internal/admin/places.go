package admin

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
)

// placesFlags are where a node is, and which relays it is to have.
type placesFlags struct {
	region, domain       string
	pin, exclude, prefer []string
}

func (f *placesFlags) register(cmd *cobra.Command, k nodeKind) {
	fl := cmd.Flags()
	fl.StringVar(&f.region, "region", "", "label of where it is, such as eu-central (empty: none)")
	if k == relays {
		fl.StringVar(&f.domain, "failure-domain", "", "what it may fail together with, such as a rack or a provider: a gateway's two relays are of different ones")
		return
	}
	what := "the gateway has"
	if k == clients {
		what = "the client uses of those that a gateway has"
	}
	fl.StringSliceVar(&f.pin, "pin-relay", nil, "relays that "+what+" before all others while they are usable (empty: none)")
	fl.StringSliceVar(&f.exclude, "exclude-relay", nil, "relays that "+what+" never")
	fl.StringSliceVar(&f.prefer, "prefer-relay", nil, "relays that "+what+" before nearer ones")
}

// create puts what was given into a request.
func (f *placesFlags) create(req *control.CreateNode) {
	req.Places = control.Places{Region: f.region, FailureDomain: f.domain, PinRelays: named(f.pin), ExcludeRelays: named(f.exclude), PreferRelays: named(f.prefer)}
}

// update is create for a change: what was given, an empty text or list included.
func (f *placesFlags) update(cmd *cobra.Command, u *control.UpdateNode) {
	set := cmd.Flags().Changed
	if set("region") {
		u.Region = &f.region
	}
	if set("failure-domain") {
		u.FailureDomain = &f.domain
	}
	for _, l := range []struct {
		flag string
		from []string
		into **[]string
	}{{"pin-relay", f.pin, &u.PinRelays}, {"exclude-relay", f.exclude, &u.ExcludeRelays}, {"prefer-relay", f.prefer, &u.PreferRelays}} {
		if set(l.flag) {
			names := named(l.from)
			if names == nil {
				names = []string{} // null would mean no change
			}
			*l.into = &names
		}
	}
}

// named leaves out what is empty.
func named(all []string) (names []string) {
	for _, s := range all {
		if s = strings.TrimSpace(s); s != "" {
			names = append(names, s)
		}
	}
	return names
}

// gatewayExplain shows why a gateway has its relays.
func (a *app) gatewayExplain() *cobra.Command {
	return a.completing(gateways.plural, &cobra.Command{
		Use: "explain NAME", Short: "Show every relay, and why the gateway has it or has not", Args: one("the gateway's name"),
		Long: `Show every relay that the gateway might have: its state, how far away the gateway finds it, how many gateways and how much
traffic it carries, and why the gateway has it or has not.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "explain the relays of gateway "+args[0], func(ctx context.Context, c *Client) error {
				got, err := c.ExplainGatewayRelays(ctx, c.org, args[0])
				if err != nil {
					return err
				}
				return a.show(cmd, got, func(w io.Writer) {
					if len(got.Items) == 0 {
						fmt.Fprintf(w, "there is no relay that gateway %s could have; make one: sallyway relay create NAME --host HOST\n", got.Gateway)
						return
					}
					table(w, "RELAY PLACE STATE RTT GATEWAYS LOAD REGION DOMAIN WHY", got.Items, choiceRow)
				})
			})
		},
	})
}

func choiceRow(r control.RelayChoice) []any {
	name := r.Relay
	if r.Shared {
		name += " (shared)"
	}
	return []any{name, r.Place, r.State, roundTrip(r.RTT), fmt.Sprintf("%d (%d active)", r.Gateways, r.Active), fmt.Sprintf("%g", r.Load), r.Region, r.FailureDomain, r.Why}
}

// regionsWord says in which regions shared relays serve an organization.
func regionsWord(regions []string) string {
	if len(regions) == 0 {
		return "all regions"
	}
	return strings.Join(regions, ", ")
}

// roundTrip words one, "" for none.
func roundTrip(d time.Duration) string {
	switch {
	case d <= 0:
		return ""
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1f ms", d.Seconds()*1000)
	}
	return fmt.Sprintf("%.0f ms", d.Seconds()*1000)
}

// outside words what the platform found when it tried a relay.
func outside(o *control.Outside) string {
	if o == nil {
		return ""
	}
	var parts []string
	switch o.State {
	case control.OutsideReached:
		parts = append(parts, "reached")
	case control.OutsidePartly, control.OutsideUnreached:
		parts = append(parts, o.Why)
	case control.OutsideNotProbed:
		parts = append(parts, "not probed: "+o.Why)
	}
	if o.Address != nil {
		parts = append(parts, "at "+o.Address.String())
	}
	for _, c := range o.Checks {
		parts = append(parts, c.Name+" "+c.Detail)
	}
	return strings.Join(parts, ", ")
}
