package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyway/internal/control"
	"sallyway/internal/control/agent"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/identity"
)

// TestOfflineRoot: the key of a root is made here and stays here; CAs are signed by it, tokens from here hold nodes to it, and another root
// follows it.
func TestOfflineRoot(t *testing.T) {
	srv, do := realPlatform(t)
	do(0, "login --token-file "+srv.AdminFile())
	dir := t.TempDir()
	file, second := filepath.Join(dir, "root.key"), filepath.Join(dir, "root-2.key")
	do(0, "organization create acme --offline-root --root-key "+file, "organization acme created", "nowhere else")
	st, err := os.Stat(file)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("the key's file: %v %v", st, err)
	}
	root, err := loadRootKey(file)
	if err != nil {
		t.Fatal(err)
	}
	hash := identity.CertificateKeyHash(root.Certificate).String()
	do(2, "organization create other --offline-root --root-key "+file, "not written over")
	do(0, "--org acme ca list", "current, key offline", hash[:16])
	do(0, "--org acme ca sign --root-key "+file, "nothing is asked for")

	token := func(line string) control.Token {
		t.Helper()
		var made control.CreatedNode
		if err := json.Unmarshal([]byte(do(0, line+" --json")), &made); err != nil {
			t.Fatal(err)
		}
		tok, err := control.ParseToken(made.Token)
		if err != nil || !strings.Contains(made.Command, made.Token) || !strings.Contains(made.Foreground, made.Token) {
			t.Fatalf("%+v %v", made, err)
		}
		return tok
	}
	made := token("--org acme gateway create office")
	if again := token("--org acme gateway token office"); made.Root != hash || again.Root != hash {
		t.Errorf("tokens name the roots %q and %q, want %q", made.Root, again.Root, hash)
	} else {
		made = again
	}
	if tok := token("gateway create plain"); tok.Root != "" {
		t.Errorf("the token of an organization with no root here names %q", tok.Root)
	}
	a, err := agent.Open(t.Context(), agent.Config{StateDir: t.TempDir(), Kind: identity.Gateway, Token: made.String()})
	if err != nil {
		t.Fatal(err)
	}
	if tr, err := a.Trust(identity.Client); err != nil || len(tr.Roots) != 1 || !tr.Roots[0].Equal(root.Certificate) {
		t.Errorf("a node trusts %+v, %v", tr, err)
	}
	made.Root = strings.Repeat("00", 32)
	if _, err := agent.Open(t.Context(), agent.Config{StateDir: t.TempDir(), Kind: identity.Gateway, Token: made.String()}); err == nil {
		t.Error("a node enrols at a platform that shows another root than its token names")
	}

	do(0, "--org acme ca rotate --kind gateway --plan", "generation 2 of the gateway CA is made", "the owner of the root signs")
	do(0, "--org acme ca rotate --kind gateway", "ca sign --root-key")
	do(0, "--org acme ca list", "requested")
	do(0, "--org acme ca rotate --kind gateway --abort")
	do(2, "--org acme ca rotate --kind root", "--new-root-key")
	do(0, "--org acme ca rotate --kind root --root-key "+file+" --new-root-key "+second, "generation 2")
	do(0, "--org acme ca list", "next, key offline")
	do(0, "--org acme ca rotate --kind root --finish")
	next, err := loadRootKey(second)
	if err != nil {
		t.Fatal(err)
	}
	do(1, "--org acme ca sign --root-key "+file, "use the key of the newest root")
	var cas control.List[control.AuthorityRecord]
	if err := json.Unmarshal([]byte(do(0, "--org acme ca list --json")), &cas); err != nil {
		t.Fatal(err)
	}
	for _, r := range cas.Items {
		if r.State == control.AuthorityCurrent && r.Kind != control.AuthoritySSH && r.Kind != control.AuthorityRoot && r.Issuer != identity.CertificateKeyHash(next.Certificate).String() {
			t.Errorf("%s CA by %.16s", r.Kind, r.Issuer)
		}
	}
	// Tokens go on naming the first root, from which nodes follow.
	late := token("--org acme gateway create late")
	if late.Root != hash {
		t.Errorf("after the rotation tokens name %q", late.Root)
	}
	if _, err := agent.Open(t.Context(), agent.Config{StateDir: t.TempDir(), Kind: identity.Gateway, Token: late.String()}); err != nil {
		t.Errorf("a node follows from there: %v", err)
	}

	// Neither key is in anything that the platform keeps.
	for _, name := range []string{file, second} {
		key, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		line := bytes.Split(key, []byte("\n"))[1]
		for _, db := range []string{"platform.db", "platform.db-wal"} {
			if b, err := os.ReadFile(filepath.Join(filepath.Dir(srv.AdminFile()), db)); err == nil && bytes.Contains(b, line) {
				t.Errorf("%s has the key of %s", db, name)
			}
		}
	}
	must := os.Chmod(file, 0o644)
	if _, err := loadRootKey(file); must != nil || err == nil {
		t.Errorf("a key that others can read: %v %v", must, err)
	}
}

// TestRootKeyOfALostAnswer: the key of a root that the platform may have taken stays; that of one which it refused does not.
func TestRootKeyOfALostAnswer(t *testing.T) {
	for _, c := range []struct {
		name  string
		err   error
		stays bool
	}{
		{"refused", &link.Problem{Problem: control.Problem{Status: 422, Code: control.CodeInvalid}}, false},
		{"taken name", &link.Problem{Problem: control.Problem{Status: 409, Code: control.CodeConflict}}, false},
		{"answer lost", &link.Problem{Problem: control.Problem{Status: 409, Code: "idempotency_answer_lost"}}, true},
		{"failed there", &link.Problem{Problem: control.Problem{Status: 500}}, true},
		{"connection lost", &link.Error{Kind: link.Broken, Reason: "lost"}, true},
		{"interrupted", context.Canceled, true},
	} {
		file := filepath.Join(t.TempDir(), "root.key")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		err := unusedKey(file, c.err)
		_, gone := os.Stat(file)
		if (gone == nil) != c.stays || strings.Contains(err.Error(), file) != c.stays {
			t.Errorf("%s: %v, %v", c.name, gone, err)
		}
	}
}
