package admin

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const gatewaysPath = "/api/v1/orgs/acme/gateways"

func TestApplianceDisk(t *testing.T) {
	iso := filepath.Join(t.TempDir(), "office.iso")
	api := newFakeAPI(t, exchange{"POST", gatewaysPath, `{"name":"office"}`, 201, createdJSON},
		exchange{"POST", "/api/v1/orgs/acme/relays/fra-1/token", "", 0, createdJSON})
	loggedIn(t, api.server.URL, "acme")
	r := sallyway(t, "", "gateway", "create", "office", "--appliance-iso", iso, "--appliance-address", "192.0.2.10/24,2001:db8::10/64",
		"--appliance-router", "192.0.2.1", "--appliance-router", "fe80::1", "--appliance-dns", "192.0.2.53", "--appliance-ntp", "ntp.example", "--appliance-proxy", "http://proxy.example:3128")
	if r.code != 0 {
		t.Fatalf("exit code %d: %s", r.code, r.errors)
	}
	if !strings.Contains(r.out, iso) || strings.Contains(r.out, "swe1.secret") {
		t.Errorf("output %q: it names the disk and holds no token", r.out)
	}
	fi, err := os.Stat(iso)
	if err != nil || fi.Mode() != 0o600 {
		t.Errorf("the disk: %v, %v", fi, err)
	}
	disk, err := os.ReadFile(iso)
	if err != nil {
		t.Fatal(err)
	}
	want := `#cloud-config
sallyway:
  role: gateway
  token: swe1.secret
  network:
    addresses:
      - 192.0.2.10/24
      - 2001:db8::10/64
    routers:
      - 192.0.2.1
      - fe80::1
    dns:
      - 192.0.2.53
    ntp:
      - ntp.example
    proxy: http://proxy.example:3128
`
	if !bytes.Contains(disk, []byte(want)) {
		t.Errorf("the disk does not hold\n%s", want)
	}

	if r := sallyway(t, "", "gateway", "create", "again", "--appliance-iso", iso); r.code != 2 || !strings.Contains(r.errors, "the file exists") {
		t.Errorf("over another disk: exit code %d, %q", r.code, r.errors)
	}
	iso = filepath.Join(t.TempDir(), "relay.iso")
	if r := sallyway(t, "", "relay", "token", "fra-1", "--appliance-iso", iso); r.code != 0 {
		t.Errorf("a token's disk: exit code %d, %q", r.code, r.errors)
	}
	if disk, err := os.ReadFile(iso); err != nil || !bytes.Contains(disk, []byte("  role: relay\n  token: swe1.secret\n")) {
		t.Errorf("a token's disk: %v", err)
	}
}

// A disk without a token helps nobody.
func TestApplianceDiskIsRemoved(t *testing.T) {
	iso := filepath.Join(t.TempDir(), "office.iso")
	api := newFakeAPI(t, exchange{"POST", gatewaysPath, `{"name":"office"}`, 409, `{"detail":"there is one already","code":"conflict"}`})
	loggedIn(t, api.server.URL, "acme")
	if r := sallyway(t, "", "gateway", "create", "office", "--appliance-iso", iso); r.code != 1 {
		t.Errorf("exit code %d: %s", r.code, r.errors)
	}
	if _, err := os.Stat(iso); !os.IsNotExist(err) {
		t.Errorf("the disk is still there: %v", err)
	}
}

func TestApplianceFlags(t *testing.T) {
	api := newFakeAPI(t)
	loggedIn(t, api.server.URL, "acme")
	dir := t.TempDir()
	for args, want := range map[string]string{
		"gateway create g --appliance-address 192.0.2.1/24":                                                       "--appliance-iso",
		"gateway create g --appliance-iso ISO --appliance-address 192.0.2.1":                                      "--appliance-address",
		"gateway create g --appliance-iso ISO --appliance-address 192.0.2.1/32":                                   "192.0.2.1/24",
		"gateway create g --appliance-iso ISO --appliance-router 192.0.2.1":                                       "needs --appliance-address",
		"relay create r --host h --appliance-iso ISO --appliance-address 10.0.0.2/24 --appliance-router 10.1.0.1": "not in the network",
		"gateway create g --appliance-iso ISO --appliance-dns name":                                               "--appliance-dns",
		"gateway create g --appliance-iso ISO --appliance-proxy nonsense":                                         "http://proxy.example",
		"gateway create g --appliance-iso /nonexistent/x.iso":                                                     "/nonexistent/x.iso",
		"client create c --appliance-iso ISO":                                                                     "unknown flag",
	} {
		r := sallyway(t, "", strings.Fields(strings.ReplaceAll(args, "ISO", filepath.Join(dir, "x.iso")))...)
		if r.code != 2 || !strings.Contains(r.errors, want) {
			t.Errorf("%s: exit code %d, %q, want %q", args, r.code, r.errors, want)
		}
	}
	if left, err := fs.Glob(os.DirFS(dir), "*"); err != nil || len(left) > 0 {
		t.Errorf("files are left: %v %v", left, err)
	}
}
