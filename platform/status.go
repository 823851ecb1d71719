package platform

import (
	"context"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/replica"
	"sallyway/platform/syslog"
)

// Status is what `platformd status` shows.
type Status struct {
	URL           string            `json:"url"`
	Pin           string            `json:"pin,omitempty"`
	Region        string            `json:"region,omitempty"`
	Ready         bool              `json:"ready"`
	Conditions    map[string]string `json:"conditions,omitempty"` // what does not work, and why
	Organizations []OrgCounts       `json:"organizations"`
	Replicas      *replica.Status   `json:"replicas,omitempty"` // of a platform on PostgreSQL
	Syslog        []syslog.State    `json:"syslog,omitempty"`   // receivers of the audit logs
}

// Count is how many there are of a kind of node.
type Count struct {
	All       int `json:"all"`
	Reachable int `json:"reachable"`
}

// OrgCounts are an organization in numbers.
type OrgCounts struct {
	Name      string `json:"name"`
	Relays    Count  `json:"relays"`
	Gateways  Count  `json:"gateways"`
	Clients   Count  `json:"clients"`
	Resources int    `json:"resources"`
	Policies  int    `json:"policies"`
	Sessions  int    `json:"sessions"`
}

func count(nodes []control.NodeRecord) Count {
	c := Count{All: len(nodes)}
	for _, n := range nodes {
		switch n.State {
		case control.StateHealthy, control.StateDegraded, control.StateDraining:
			c.Reachable++
		}
	}
	return c
}

// Status gathers what the platform knows of itself.
func (s *Server) Status(ctx context.Context) (*Status, error) {
	out := &Status{URL: s.url, Pin: s.pin, Region: s.reg.Region, Conditions: s.Conditions(), Organizations: []OrgCounts{}}
	out.Ready = len(out.Conditions) == 0
	out.Replicas = s.Replicas()
	var err error
	if out.Syslog, err = s.Syslog(ctx); err != nil {
		return nil, err
	}
	names, err := s.reg.OrgNames(ctx)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if name == identity.SharedOrg {
			continue
		}
		o, err := s.reg.Status(ctx, name)
		if err != nil {
			return nil, err
		}
		out.Organizations = append(out.Organizations, OrgCounts{
			Name: name, Relays: count(o.Relays), Gateways: count(o.Gateways), Clients: count(o.Clients),
			Resources: o.Resources, Policies: o.Policies, Sessions: o.Sessions,
		})
	}
	return out, nil
}
