package firewall

import (
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/nftables"

	"sallyway/internal/lab/alone"
)

func TestApplyAndVerify(t *testing.T) {
	if !alone.Here(t) {
		return
	}
	if err := Verify(nil); !errors.Is(err, ErrDiffers) {
		t.Errorf("no rules at all: %v", err)
	}
	if err := Apply(Relay()); err != nil {
		t.Fatal(err)
	}
	if err := Apply(nil); err != nil {
		t.Fatal(err)
	}
	if err := Verify(Relay()); !errors.Is(err, ErrDiffers) {
		t.Errorf("another role's rules: %v", err)
	}
	out, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s", out)
	if s := string(out); strings.Count(s, "policy drop") != 2 || strings.Contains(s, "5349") {
		t.Errorf("nft sees it otherwise")
	}
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	c.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: Table})
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := Verify(nil); !errors.Is(err, ErrDiffers) {
		t.Errorf("a removed table: %v", err)
	}
}
