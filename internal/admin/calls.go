package admin

import (
	"context"
	"fmt"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/identity"
	"sallyway/internal/platformapi"
)

// nodeCalls are the operations on a kind of node, in an organization or among the relays that organizations share.
type nodeCalls struct {
	list   func(context.Context) ([]control.NodeRecord, error)
	create func(context.Context, control.CreateNode) (control.CreatedNode, error)
	show   func(context.Context, string) (control.NodeRecord, error)
	update func(context.Context, string, control.UpdateNode) (control.NodeRecord, error)
	remove func(context.Context, string) error
	token  func(context.Context, string) (control.CreatedNode, error)
	verbs  map[string]func(context.Context, string) (control.NodeRecord, error)
}

func (k nodeKind) of(c *Client) nodeCalls {
	type verbs = map[string]func(context.Context, string) (control.NodeRecord, error)
	org := c.org
	switch {
	case k == relays && org == identity.SharedOrg:
		return nodeCalls{
			list: func(ctx context.Context) ([]control.NodeRecord, error) {
				return platformapi.Collect(c.AllSharedRelays(ctx))
			},
			create: plain1(c.CreateSharedRelay), show: plain1(c.ShowSharedRelay), update: plain2(c.UpdateSharedRelay),
			remove: plainDo(c.DeleteSharedRelay), token: plain1(c.ReissueSharedRelayToken),
			verbs: verbs{
				"disable": plain1(c.DisableSharedRelay), "enable": plain1(c.EnableSharedRelay), "revoke": plain1(c.RevokeSharedRelay), "drain": plain1(c.DrainSharedRelay),
			},
		}
	case k == relays:
		return nodeCalls{
			list: func(ctx context.Context) ([]control.NodeRecord, error) {
				return platformapi.Collect(c.AllRelays(ctx, org))
			},
			create: in1(org, c.CreateRelay), show: in1(org, c.ShowRelay), update: in2(org, c.UpdateRelay),
			remove: inDo(org, c.DeleteRelay), token: in1(org, c.ReissueRelayToken),
			verbs: verbs{
				"disable": in1(org, c.DisableRelay), "enable": in1(org, c.EnableRelay), "revoke": in1(org, c.RevokeRelay), "drain": in1(org, c.DrainRelay),
			},
		}
	case k == gateways:
		return nodeCalls{
			list: func(ctx context.Context) ([]control.NodeRecord, error) {
				return platformapi.Collect(c.AllGateways(ctx, org))
			},
			create: in1(org, c.CreateGateway), show: in1(org, c.ShowGateway), update: in2(org, c.UpdateGateway),
			remove: inDo(org, c.DeleteGateway), token: in1(org, c.ReissueGatewayToken),
			verbs: verbs{"disable": in1(org, c.DisableGateway), "enable": in1(org, c.EnableGateway), "revoke": in1(org, c.RevokeGateway)},
		}
	}
	return nodeCalls{
		list: func(ctx context.Context) ([]control.NodeRecord, error) {
			return platformapi.Collect(c.AllClients(ctx, org))
		},
		create: in1(org, c.CreateClient), show: in1(org, c.ShowClient), update: in2(org, c.UpdateClient),
		remove: inDo(org, c.DeleteClient), token: in1(org, c.ReissueClientToken),
		verbs: verbs{"disable": in1(org, c.DisableClient), "enable": in1(org, c.EnableClient), "revoke": in1(org, c.RevokeClient)},
	}
}

// peopleCalls are the operations on people.
type peopleCalls struct {
	list   func(context.Context) ([]control.PersonRecord, error)
	create func(context.Context, control.CreatePerson) (control.InvitedPerson, error)
	show   func(context.Context, string) (control.PersonRecord, error)
	update func(context.Context, string, control.UpdatePerson) (control.PersonRecord, error)
	remove func(context.Context, string) error
	invite func(context.Context, string) (control.Invitation, error)
	forget func(context.Context, string) (control.PersonRecord, error)
}

func (r *reach) people(c *Client) peopleCalls {
	if r.platform {
		return peopleCalls{
			list: func(ctx context.Context) ([]control.PersonRecord, error) {
				return platformapi.Collect(c.AllPeople(ctx))
			},
			create: plain1(c.CreatePerson), show: plain1(c.ShowPerson), update: plain2(c.UpdatePerson), remove: plainDo(c.DeletePerson),
			invite: plain1(c.InvitePerson), forget: plain1(c.ForgetFactor),
		}
	}
	return peopleCalls{
		list: func(ctx context.Context) ([]control.PersonRecord, error) {
			return platformapi.Collect(c.AllOrganizationPeople(ctx, c.org))
		},
		create: in1(c.org, c.CreateOrganizationPerson), show: in1(c.org, c.ShowOrganizationPerson), update: in2(c.org, c.UpdateOrganizationPerson),
		remove: inDo(c.org, c.DeleteOrganizationPerson), invite: in1(c.org, c.InviteOrganizationPerson), forget: in1(c.org, c.ForgetOrganizationFactor),
	}
}

// providerCalls are the operations on providers of single sign-on.
type providerCalls struct {
	list   func(context.Context) ([]control.ProviderRecord, error)
	create func(context.Context, control.CreateProvider) (control.ProviderRecord, error)
	show   func(context.Context, string) (control.ProviderRecord, error)
	update func(context.Context, string, control.UpdateProvider) (control.ProviderRecord, error)
	remove func(context.Context, string) error
}

func (r *reach) providers(c *Client) providerCalls {
	if r.platform {
		return providerCalls{
			list: func(ctx context.Context) ([]control.ProviderRecord, error) {
				return platformapi.Collect(c.AllProviders(ctx))
			},
			create: plain1(c.CreateProvider), show: plain1(c.ShowProvider), update: plain2(c.UpdateProvider), remove: plainDo(c.DeleteProvider),
		}
	}
	return providerCalls{
		list: func(ctx context.Context) ([]control.ProviderRecord, error) {
			return platformapi.Collect(c.AllOrganizationProviders(ctx, c.org))
		},
		create: in1(c.org, c.CreateOrganizationProvider), show: in1(c.org, c.ShowOrganizationProvider), update: in2(c.org, c.UpdateOrganizationProvider),
		remove: inDo(c.org, c.DeleteOrganizationProvider),
	}
}

// accountCalls are the operations on service accounts.
type accountCalls struct {
	list   func(context.Context) ([]control.ServiceAccountRecord, error)
	create func(context.Context, control.CreateServiceAccount) (control.ServiceAccountRecord, error)
	show   func(context.Context, string) (control.ServiceAccountRecord, error)
	update func(context.Context, string, control.UpdateServiceAccount) (control.ServiceAccountRecord, error)
	remove func(context.Context, string) error

	tokens      func(context.Context, string) (control.List[control.APIToken], error)
	createToken func(context.Context, string, control.CreateAPIToken) (control.CreatedAPIToken, error)
	revokeToken func(ctx context.Context, account, id string) error
}

func (r *reach) accounts(c *Client) accountCalls {
	if r.platform {
		return accountCalls{
			list: func(ctx context.Context) ([]control.ServiceAccountRecord, error) {
				return platformapi.Collect(c.AllServiceAccounts(ctx))
			},
			create: plain1(c.CreateServiceAccount), show: plain1(c.ShowServiceAccount), update: plain2(c.UpdateServiceAccount), remove: plainDo(c.DeleteServiceAccount),
			tokens: plain1(c.ListServiceAccountTokens), createToken: plain2(c.CreateServiceAccountToken),
			revokeToken: func(ctx context.Context, account, id string) error {
				return c.RevokeServiceAccountToken(ctx, account, id)
			},
		}
	}
	return accountCalls{
		list: func(ctx context.Context) ([]control.ServiceAccountRecord, error) {
			return platformapi.Collect(c.AllOrganizationServiceAccounts(ctx, c.org))
		},
		create: in1(c.org, c.CreateOrganizationServiceAccount), show: in1(c.org, c.ShowOrganizationServiceAccount), update: in2(c.org, c.UpdateOrganizationServiceAccount),
		remove: inDo(c.org, c.DeleteOrganizationServiceAccount),
		tokens: in1(c.org, c.ListOrganizationServiceAccountTokens), createToken: in2(c.org, c.CreateOrganizationServiceAccountToken),
		revokeToken: func(ctx context.Context, account, id string) error {
			return c.RevokeOrganizationServiceAccountToken(ctx, c.org, account, id)
		},
	}
}

// tokenCalls are the operations on API tokens: one's own, or those that stand for nobody.
type tokenCalls struct {
	list   func(context.Context) (control.List[control.APIToken], error)
	create func(context.Context, control.CreateAPIToken) (control.CreatedAPIToken, error)
	revoke func(context.Context, string) error
}

func tokensOf(c *Client, of string) (tokenCalls, error) {
	switch of {
	case "me":
		return tokenCalls{plain0(c.ListMyTokens), plain1(c.CreateMyToken), plainDo(c.RevokeMyToken)}, nil
	case "organization":
		return tokenCalls{in0(c.org, c.ListOrganizationTokens), in1(c.org, c.CreateOrganizationToken), inDo(c.org, c.RevokeOrganizationToken)}, nil
	case "platform":
		return tokenCalls{plain0(c.ListTokens), plain1(c.CreateToken), plainDo(c.RevokeToken)}, nil
	}
	return tokenCalls{}, daemon.Usagef("--of %.20q: want me, organization or platform", of)
}

// authorityCalls are the operations on CAs.
type authorityCalls struct {
	list   func(context.Context) (control.List[control.AuthorityRecord], error)
	rotate func(context.Context, control.RotateAuthority) (control.RotationPlan, error)
}

func authorities(c *Client) authorityCalls {
	if c.org == identity.SharedOrg {
		return authorityCalls{plain0(c.ListSharedAuthorities), plain1(c.RotateSharedAuthority)}
	}
	return authorityCalls{in0(c.org, c.ListAuthorities), in1(c.org, c.RotateAuthority)}
}

// objectNames are the names of the objects of a sort, for the shell's completion.
func objectNames(ctx context.Context, c *Client, plural string) ([]string, error) {
	var names []string
	var err error
	add := func(name string) { names = append(names, name) }
	switch plural {
	case policies:
		for v, bad := range c.AllPolicies(ctx, c.org) {
			add(v.Name)
			err = bad
		}
	case groups:
		for v, bad := range c.AllGroups(ctx, c.org) {
			add(v.Name)
			err = bad
		}
	case resources:
		for v, bad := range c.AllResources(ctx, c.org) {
			add(v.Name)
			err = bad
		}
	case webhooks:
		for v, bad := range c.AllWebhooks(ctx, c.org) {
			add(v.Name)
			err = bad
		}
	default:
		for _, k := range []nodeKind{relays, gateways, clients} {
			if k.plural != plural {
				continue
			}
			nodes, bad := k.of(c).list(ctx)
			for _, n := range nodes {
				add(n.Name)
			}
			err = bad
		}
	}
	return names, err
}

// removeObject deletes an object of a sort.
func removeObject(ctx context.Context, c *Client, plural, name string) error {
	switch plural {
	case policies:
		return c.DeletePolicy(ctx, c.org, name)
	case groups:
		return c.DeleteGroup(ctx, c.org, name)
	case resources:
		return c.DeleteResource(ctx, c.org, name)
	}
	for _, k := range []nodeKind{relays, gateways, clients} {
		if k.plural == plural {
			return k.of(c).remove(ctx, name)
		}
	}
	return fmt.Errorf("nothing is known of %s", plural) // no verb asks for it
}
