package store

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	"sallyway/internal/identity"
)

// testPeople walks every statement about people, their logins and tokens.
func testPeople(t *testing.T, s Store) {
	hash := func(s string) (h [32]byte) { copy(h[:], fmt.Sprintf("%-32s", s)); return h }
	later := at.Add(time.Hour)
	ada := &Person{ID: "p-ada", Org: "acme", Login: "ada@example.com", Name: "Ada", Email: "a@b", Password: "$x$", PasswordChanged: at, TOTP: []byte{0, 255, 1}, TOTPStep: 5, Created: at}
	bob := &Person{ID: "p-bob", Org: "other", Login: "bob", Created: at}
	update(t, s, func(ctx context.Context, tx Tx) error {
		for _, o := range []string{"acme", "other"} {
			if err := tx.InsertOrg(ctx, org(o)); err != nil {
				return err
			}
		}
		return errors.Join(tx.InsertPerson(ctx, ada), tx.InsertPerson(ctx, bob))
	})
	same := func(what string, got, want any, err error) {
		t.Helper()
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v %v, want %+v", what, got, err, want)
		}
	}
	is := func(what string, err, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	logins := func(ps []*Person) (out []string) {
		for _, p := range ps {
			out = append(out, p.Login)
		}
		return out
	}
	update(t, s, func(ctx context.Context, tx Tx) error {
		twin := *bob
		twin.ID = "p-twin"
		is("the same login", tx.InsertPerson(ctx, &twin), ErrExists)
		got, err := tx.FindPerson(ctx, ada.Login)
		same("by login", got, ada, err)
		got, err = tx.FindPerson(ctx, ada.ID)
		same("by id", got, ada, err)
		_, err = tx.FindPerson(ctx, "nobody")
		is("nobody", err, ErrNotFound)
		n, err := tx.CountPeople(ctx)
		same("count", n, 2, err)

		is("step", tx.StepTOTP(ctx, ada.ID, 6), nil)
		is("the same step", tx.StepTOTP(ctx, ada.ID, 6), ErrNotFound)
		is("an older step", tx.StepTOTP(ctx, ada.ID, 5), ErrNotFound)
		ada.TOTPStep, ada.TOTP, ada.LastLogin, ada.Disabled = 6, nil, later, true
		is("update", tx.UpdatePerson(ctx, ada), nil)
		got, err = tx.Person(ctx, ada.ID)
		same("updated", got, ada, err)

		role := &PersonRole{Person: bob.ID, Org: "acme", Role: "owner", Created: at}
		is("role", tx.PutPersonRole(ctx, role), nil)
		role.Role = "member"
		is("another role", tx.PutPersonRole(ctx, role), nil)
		roles, err := tx.OrgRoles(ctx, "acme")
		same("roles of an organization", roles, []*PersonRole{role}, err)
		roles, err = tx.PersonRoles(ctx, bob.ID)
		same("roles of a person", roles, []*PersonRole{role}, err)
		for which, want := range map[string][]string{"acme": {"ada@example.com", "bob"}, "other": {"bob"}, "": {"ada@example.com", "bob"}} {
			ps, err := tx.People(ctx, which, Page{})
			same("people of "+which, logins(ps), want, err)
		}
		ps, err := tx.People(ctx, "acme", Page{After: "ada@example.com", Limit: 1})
		same("page", logins(ps), []string{"bob"}, err)
		is("role gone", tx.DeletePersonRole(ctx, bob.ID, "acme"), nil)
		is("role gone twice", tx.DeletePersonRole(ctx, bob.ID, "acme"), ErrNotFound)

		is("recovery codes", tx.PutRecoveryCodes(ctx, ada.ID, [][32]byte{hash("1"), hash("2")}), nil)
		is("spend", tx.SpendRecoveryCode(ctx, ada.ID, hash("1")), nil)
		is("spend twice", tx.SpendRecoveryCode(ctx, ada.ID, hash("1")), ErrNotFound)
		is("spend of somebody else", tx.SpendRecoveryCode(ctx, bob.ID, hash("2")), ErrNotFound)
		n, err = tx.RecoveryCodes(ctx, ada.ID)
		same("codes left", n, 1, err)
		return nil
	})

	session := &WebSession{ID: "s-1", Hash: hash("cookie"), Person: ada.ID, Created: at, Seen: at, Expires: later, Source: "192.0.2.1", Agent: "x", Provider: "corp"}
	ticket := &Ticket{Hash: hash("ticket"), Kind: "invite", Subject: ada.ID, Data: []byte{1, 2}, Created: at, Expires: later}
	device := &DeviceLogin{Hash: hash("device"), UserCode: hash("user"), State: "pending", Client: "x", Source: "192.0.2.1", Created: at, Expires: later}
	account := &ServiceAccount{ID: "a-1", Org: "acme", Name: "ci", Scopes: []string{"relays:read"}, Created: at, Creator: "token:x"}
	token := &AccessToken{ID: "t-1", Hash: hash("token"), Person: ada.ID, Name: "x", Scopes: []string{}, Created: at, Expires: later}
	program := &AccessToken{ID: "t-2", Hash: hash("program"), Account: account.ID, Name: "y", Scopes: []string{"relays:read"}, Created: at}
	provider := &Provider{ID: "i-1", Org: "acme", Name: "corp", Issuer: "https://id", ClientID: "c", Secret: []byte{9}, Settings: []byte(`{}`), Created: at}
	who := &PersonIdentity{Provider: provider.ID, Subject: "s", Person: ada.ID, Email: "a@b", Created: at}
	update(t, s, func(ctx context.Context, tx Tx) error {
		is("session", tx.InsertWebSession(ctx, session), nil)
		v, err := tx.WebSession(ctx, session.Hash)
		same("session", v, session, err)
		session.Seen = at.Add(time.Minute)
		is("touch", tx.TouchWebSession(ctx, session.ID, session.Seen), nil)
		vs, err := tx.WebSessions(ctx, ada.ID)
		same("sessions", vs, []*WebSession{session}, err)
		is("somebody else's session", tx.DeleteWebSession(ctx, bob.ID, session.ID), ErrNotFound)
		is("all but this", tx.DeleteWebSessions(ctx, ada.ID, session.ID), nil)
		_, err = tx.WebSession(ctx, session.Hash)
		is("kept", err, nil)

		is("ticket", tx.InsertTicket(ctx, ticket), nil)
		k, err := tx.Ticket(ctx, ticket.Hash, "invite", at)
		same("ticket", k, ticket, err)
		for _, bad := range []struct {
			hash [32]byte
			kind string
			now  time.Time
		}{{hash("x"), "invite", at}, {ticket.Hash, "setup", at}, {ticket.Hash, "invite", later}} {
			_, err := tx.SpendTicket(ctx, bad.hash, bad.kind, bad.now)
			is("a ticket that is not good", err, ErrNotFound)
		}
		k, err = tx.SpendTicket(ctx, ticket.Hash, "invite", at)
		same("spent", k, ticket, err)
		_, err = tx.SpendTicket(ctx, ticket.Hash, "invite", at)
		is("spent twice", err, ErrNotFound)
		is("again", tx.InsertTicket(ctx, ticket), nil)
		is("all", tx.DeleteTickets(ctx, "invite", ada.ID), nil)
		_, err = tx.Ticket(ctx, ticket.Hash, "invite", at)
		is("gone", err, ErrNotFound)

		is("device", tx.InsertDeviceLogin(ctx, device), nil)
		d, err := tx.FindDeviceLogin(ctx, device.UserCode)
		same("device", d, device, err)
		_, err = tx.SpendDeviceLogin(ctx, device.Hash, at)
		is("a pending one", err, ErrNotFound)
		n, err := tx.CountDeviceLogins(ctx, "192.0.2.1", at)
		same("pending", n, 1, err)
		is("poll", tx.PollDeviceLogin(ctx, device.Hash, at), nil)
		is("too late", tx.DecideDeviceLogin(ctx, device.UserCode, "approved", ada.ID, later), ErrNotFound)
		is("approve", tx.DecideDeviceLogin(ctx, device.UserCode, "approved", ada.ID, at), nil)
		is("deny after that", tx.DecideDeviceLogin(ctx, device.UserCode, "denied", bob.ID, at), ErrNotFound)
		device.State, device.Person, device.Polled = "approved", ada.ID, at
		d, err = tx.DeviceLogin(ctx, device.Hash)
		same("approved", d, device, err)
		d, err = tx.SpendDeviceLogin(ctx, device.Hash, at)
		same("taken", d, device, err)
		_, err = tx.SpendDeviceLogin(ctx, device.Hash, at)
		is("taken twice", err, ErrNotFound)

		is("account", tx.InsertServiceAccount(ctx, account), nil)
		is("the same name", tx.InsertServiceAccount(ctx, &ServiceAccount{ID: "a-2", Org: "acme", Name: "ci", Created: at}), ErrExists)
		account.Scopes, account.Disabled = []string{"*"}, true
		is("update", tx.UpdateServiceAccount(ctx, account), nil)
		a, err := tx.FindServiceAccount(ctx, "acme", "ci")
		same("account", a, account, err)
		as, err := tx.ServiceAccounts(ctx, "acme", Page{})
		same("accounts", as, []*ServiceAccount{account}, err)

		is("token", errors.Join(tx.InsertAccessToken(ctx, token), tx.InsertAccessToken(ctx, program)), nil)
		token.LastUsed, token.Source = at, "192.0.2.1"
		is("touch", tx.TouchAccessToken(ctx, token.ID, at, "192.0.2.1"), nil)
		is("revoke", tx.RevokeAccessToken(ctx, token.ID, at), nil)
		is("revoke twice", tx.RevokeAccessToken(ctx, token.ID, at), ErrNotFound)
		token.Revoked = at
		o, err := tx.AccessToken(ctx, token.Hash)
		same("token", o, token, err)
		os, err := tx.PersonTokens(ctx, ada.ID)
		same("tokens", os, []*AccessToken{token}, err)
		os, err = tx.AccountTokens(ctx, account.ID)
		same("tokens", os, []*AccessToken{program}, err)

		is("provider", tx.InsertProvider(ctx, provider), nil)
		provider.Secret, provider.Disabled = nil, true
		is("update", tx.UpdateProvider(ctx, provider), nil)
		p, err := tx.FindProvider(ctx, "acme", "corp")
		same("provider", p, provider, err)
		for which, want := range map[string]int{"acme": 1, "other": 0, "": 1} {
			ps, err := tx.Providers(ctx, which, Page{})
			same("providers", len(ps), want, err)
		}
		is("identity", tx.InsertPersonIdentity(ctx, who), nil)
		is("identity twice", tx.InsertPersonIdentity(ctx, who), ErrExists)
		i, err := tx.PersonIdentity(ctx, provider.ID, "s")
		same("identity", i, who, err)
		is2, err := tx.PersonIdentities(ctx, ada.ID)
		same("identities", is2, []*PersonIdentity{who}, err)
		return nil
	})

	laptop := node("c-laptop", "acme", "laptop", identity.Client)
	update(t, s, func(ctx context.Context, tx Tx) error {
		is("node", tx.InsertNode(ctx, laptop), nil)
		_, err := tx.NodePerson(ctx, laptop.ID)
		is("nobody's", err, ErrNotFound)
		is("bind", errors.Join(tx.BindNode(ctx, laptop.ID, bob.ID), tx.BindNode(ctx, laptop.ID, ada.ID)), nil)
		p, err := tx.NodePerson(ctx, laptop.ID)
		same("whose", p, ada.ID, err)
		m, err := tx.NodePeople(ctx, "acme")
		same("whose all are", m, map[string]string{laptop.ID: ada.ID}, err)
		ns, err := tx.PersonNodes(ctx, ada.ID)
		same("ada's", len(ns), 1, err)
		is("group", tx.InsertGroup(ctx, &Group{ID: "u-1", Org: "acme", Name: "staff", Created: at}), nil)
		is("people", tx.PutGroupPeople(ctx, "u-1", []string{ada.ID, bob.ID}), nil)
		g, err := tx.GroupPeople(ctx, "acme")
		slices.Sort(g["u-1"])
		same("people of groups", g, map[string][]string{"u-1": {ada.ID, bob.ID}}, err)
		is("fewer", tx.PutGroupPeople(ctx, "u-1", nil), nil)
		g, err = tx.GroupPeople(ctx, "acme")
		same("nobody", len(g), 0, err)
		return nil
	})

	// What has expired goes, and what belongs to a person goes with them.
	update(t, s, func(ctx context.Context, tx Tx) error {
		is("purge of nothing", tx.PurgePeople(ctx, at, at.Add(-time.Hour), at.Add(-time.Hour)), nil)
		_, err := tx.WebSession(ctx, session.Hash)
		is("kept", err, nil)
		is("purge", tx.PurgePeople(ctx, later.Add(time.Second), at, later), nil)
		_, err = tx.WebSession(ctx, session.Hash)
		is("session", err, ErrNotFound)
		_, err = tx.AccessToken(ctx, token.Hash)
		is("token", err, ErrNotFound)
		_, err = tx.AccessToken(ctx, program.Hash)
		is("a token for ever", err, nil)
		is("person", tx.DeletePerson(ctx, ada.ID), nil)
		_, err = tx.PersonIdentity(ctx, provider.ID, "s")
		is("identity", err, ErrNotFound)
		_, err = tx.NodePerson(ctx, laptop.ID)
		is("bond", err, ErrNotFound)
		is("account", tx.DeleteServiceAccount(ctx, account.ID), nil)
		_, err = tx.AccessToken(ctx, program.Hash)
		is("its token", err, ErrNotFound)
		is("organization", tx.DeleteOrg(ctx, "other"), nil)
		_, err = tx.Person(ctx, bob.ID)
		is("who was at home there", err, ErrNotFound)
		return nil
	})
}
