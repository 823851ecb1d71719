package platform

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"slices"
	"testing"

	"sallyway/internal/control"
	"sallyway/relay/wire"
)

// TestRevokedKeyLosesTheRelays: a fresh token for a revoked node gives the revoked key nothing back at the relays, neither before it is spent nor
// after.
func TestRevokedKeyLosesTheRelays(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	held := w.client.stream().settled().last.Dialling.Gateways[0].Relays[0]
	relay := w.relays[slices.IndexFunc(w.relays, func(r *node) bool { return r.id == held.Node })]
	f := relay.stream()
	w.api("POST", "/clients/"+w.client.id.ID+"/revoke", nil, nil)
	denied := func(c *control.Config) bool { return slices.Contains(c.Relay.Denied, w.client.id) }
	f.wait("that the client is denied", denied)
	var made control.CreatedNode
	w.api("POST", "/clients/"+w.client.id.ID+"/token", nil, &made)
	now := relay.stream()
	if c := now.wait("its configuration", always); !denied(c) {
		t.Error("a token that is not spent yet let the revoked key in again")
	}
	now.close()
	f = relay.stream()
	w.fromToken(made.Token).join()
	c := f.wait("that the node is let in again", func(c *control.Config) bool { return !denied(c) })
	for _, k := range c.Relay.Keys {
		if wire.Password(k.Secret, held.Username) == held.Password {
			t.Error("the credential that the revoked key holds works again")
		}
	}
}

// TestFailedFirstStart: a first start that fails after it made the database still ends in a login.
func TestFailedFirstStart(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer taken.Close()
	dir := t.TempDir()
	if s, err := Open(context.Background(), Config{Data: dir, Listen: taken.Addr().String()}); err == nil {
		t.Error("the port is taken, and it starts", s.Close())
	}
	s, err := Open(context.Background(), Config{Data: dir, Listen: "127.0.0.1:0"})
	must(t, err)
	if _, err := os.Stat(s.AdminFile()); err != nil {
		t.Errorf("no credential for the administrator: %v", err)
	}
	must(t, s.Close())
	// Once issued, a file that was removed stays away.
	must(t, os.Remove(s.AdminFile()))
	s, err = Open(context.Background(), Config{Data: dir, Listen: "127.0.0.1:0"})
	must(t, err)
	if _, err := os.Stat(s.AdminFile()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the credential is back: %v", err)
	}
	must(t, s.Close())
}
