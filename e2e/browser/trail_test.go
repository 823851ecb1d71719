package browser

import (
	"fmt"
	"testing"
	"time"

	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// trailed makes webhooks of every state, and flows of the estate's clients.
func trailed(t *testing.T, reg *registry.Registry) {
	t.Helper()
	ctx, now := t.Context(), time.Now().UTC().Truncate(time.Millisecond)
	head := int64(0)
	check(t, reg.Store.View(ctx, func(tx store.Tx) (err error) {
		head, _, err = tx.AuditHead(ctx, registry.DefaultOrg)
		return err
	}))
	hook := func(name string, w store.Webhook) store.Webhook {
		w.ID, w.Org, w.Name, w.URL, w.Created = identity.NewID("webhook"), registry.DefaultOrg, name, "https://"+name+".example/hooks/sallyway", now.Add(-240*time.Hour)
		w.Secret = reg.Seal.Seal(registry.WebhookLabel(w.ID), []byte("a secret of the gallery"))
		return w
	}
	hooks := []store.Webhook{
		hook("siem", store.Webhook{Cursor: head, SinkState: store.SinkState{Success: now.Add(-time.Minute)}}),
		hook("chat", store.Webhook{
			Cursor: head - 12, Events: []string{"node.*", "policy.*", "guessing.*", "authority.expiring"}, Tries: 9, Next: now.Add(24 * time.Hour),
			SinkState: store.SinkState{Success: now.Add(-26 * time.Hour), Failed: now.Add(-25 * time.Hour), Problem: "the receiver answered 503"},
		}),
		hook("tickets", store.Webhook{Cursor: head - 3, Events: []string{"certificate.expiring"}, Gateways: true, Disabled: "the receiver answered 410 Gone"}),
	}
	flow := func(i int, f store.Flow) *store.Flow {
		f.ID, f.Org, f.Protocol = fmt.Sprintf("gallery-%d", i), registry.DefaultOrg, "tcp"
		f.Started = now.Add(-time.Duration(i*i+2) * 7 * time.Minute)
		f.Seen = f.Started.Add(time.Duration(i*13+1) * time.Second)
		return &f
	}
	reasons := []string{"closed", "closed", "reset by the client", "no policy allows it any more", "session over: an administrator ended this session", "idle"}
	var flows []*store.Flow
	check(t, reg.Store.Update(ctx, func(tx store.Tx) error {
		flows = flows[:0]
		for i := range hooks {
			if err := tx.InsertWebhook(ctx, &hooks[i]); err != nil {
				return err
			}
		}
		resources, err := tx.Resources(ctx, registry.DefaultOrg, store.Page{})
		if err != nil {
			return err
		}
		for i := range 14 {
			name := fmt.Sprintf("laptop-%d", i%3+1)
			n, err := tx.FindNode(ctx, registry.DefaultOrg, identity.Client, name)
			if err != nil {
				return err
			}
			r := resources[i%len(resources)]
			f := store.Flow{
				Gateway: "g-gallery", GatewayName: "office", Client: n.ID, ClientName: n.Name, Resource: r.ID, ResourceName: r.Name, Rule: "engineers-" + r.Name, Destination: r.Name + ":443",
				Address: "10.0.3.7:443", Relay: "fra-1", Path: "udp", Sent: int64(i+1) * 12_345, Received: int64(i*i+1) * 1_234_567, Reason: reasons[i%len(reasons)], Open: i == 1,
			}
			if i%4 == 2 {
				f.Relay, f.Path = "", "direct"
			}
			if i%3 == 0 {
				f.Login = "grace@example.com"
			}
			flows = append(flows, flow(i, f))
		}
		return tx.PutFlows(ctx, flows)
	}))
}
