package config

import (
	"encoding/base64"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"testing/fstest"

	"filippo.io/age"
	"filippo.io/age/armor"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/identity"
)

// token is an enrolment token of a node.
func token(t testing.TB, kind identity.Kind, name string) string {
	t.Helper()
	tok := control.Token{URL: "https://platform.example", Node: identity.Node{Org: "default", Kind: kind, ID: "g-aaaaaaaaaaaa"}, Name: name, Secret: make([]byte, 32)}
	s := tok.String()
	if _, err := control.ParseToken(s); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestParse(t *testing.T) {
	gw := token(t, identity.Gateway, "office")
	for _, tc := range []struct {
		name, doc string
		want      string // of the error; "" is none
	}{
		{"token alone", "token: " + gw, ""},
		{"json", `{"role": "gateway", "token": "` + gw + `", "gateway": {"allow": ["10.0.0.0/8"]}}`, ""},
		{"platform", "role: platform\nplatform: {advertise-url: https://p.example}", ""},
		{"network", "role: gateway\nnetwork:\n  addresses: [192.0.2.10/24]\n  routers: [192.0.2.1]\n  interfaces: [{mac: '52:54:00:12:34:56', routes: [{to: 10.0.0.0/8, via: 192.0.2.9}]}]", ""},
		{"empty", "", "no configuration"},
		{"comment", "# nothing\n", "no configuration"},
		{"no role", "hostname: x", "role: is missing"},
		{"typing error", "rol: gateway", `did you mean "role"`},
		{"typing error within", "role: gateway\nnetwork: {adresses: []}", `did you mean "addresses"`},
		{"unknown role", "role: gatewy", `did you mean "gateway"`},
		{"two documents", "role: gateway\n---\nrole: relay", "more than one"},
		{"token of a client", "token: " + token(t, identity.Client, "laptop"), "a client"},
		{"token of another role", "role: relay\ntoken: " + gw, "is for the gateway"},
		{"token for a platform", "role: all\ntoken: " + gw, "needs none"},
		{"bad hostname", "role: gateway\nhostname: a_b", "no host name"},
		{"long hostname", "role: gateway\nhostname: " + strings.Repeat("a.", 40) + "a", "no host name"},
		{"settings of another role", "role: relay\ngateway: {tun: off}\n", "the role is relay"},
		{"state is ours", "role: gateway\ngateway: {state: /tmp}", "sets this itself"},
		{"secret in the daemon's part", "role: gateway\ngateway: {token: abc}", "sets this itself"},
		{"health", "role: gateway\nhealth-listen: nine", "health-listen"},
		{"health port 0", "role: gateway\nhealth-listen: ':0'", "health-listen"},
		{"list", "- a", "a value"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := Parse([]byte(tc.doc))
			switch {
			case tc.want == "" && err != nil:
				t.Fatalf("%v", err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) && tc.name != "list":
				t.Fatalf("got %v, %v, want an error with %q", c, err, tc.want)
			case tc.name == "list" && err == nil:
				t.Fatal("a list is a configuration")
			}
			if err != nil && strings.Contains(err.Error(), "swe1") {
				t.Fatalf("the error shows the token: %v", err)
			}
		})
	}
}

func TestErrorsShowNoSecret(t *testing.T) {
	const secret = "swe1.c2VjcmV0LXNlY3JldC1zZWNyZXQ"
	for _, doc := range []string{"token: [" + secret + "]", "role: gateway\ntoken: " + secret, "token: {a: " + secret + "}", "network: " + secret, secret, "token: " + secret + "\n\tx", "gateway: " + secret} {
		_, err := Parse([]byte(doc))
		if err == nil || strings.Contains(err.Error(), "c2Vjcm") {
			t.Errorf("%q: %v", doc, err)
		}
	}
}

func TestSeal(t *testing.T) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	c, err := Parse([]byte("role: platform\nadmin-key: " + id.Recipient().String()))
	if err != nil {
		t.Fatal(err)
	}
	text, err := c.Seal([]byte("credential"))
	if err != nil || strings.Contains(text, "credential") {
		t.Fatalf("%q, %v", text, err)
	}
	r, err := age.Decrypt(armor.NewReader(strings.NewReader(text)), id)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != "credential" {
		t.Errorf("%q, %v", b, err)
	}
	for doc, want := range map[string]string{
		"role: platform\nadmin-key: " + id.String():            "no public key", // the private half: not shown either
		"role: gateway\nadmin-key: " + id.Recipient().String(): "is for a platform",
		"role: all\nadmin-key: ssh-ed25519 AAAA":               "no public key",
	} {
		if _, err := Parse([]byte(doc)); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), id.String()) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func TestSaveHasNoToken(t *testing.T) {
	doc := "token: " + token(t, identity.Gateway, "office") + "\ngateway: {allow: [10.0.0.0/8 5432], standby: 0}\nnetwork: {dns: [192.0.2.53], interfaces: [{name: eth1, disabled: true}]}\nhealth-listen: ':9470'\n" +
		"update: {url: 'https://u.example/m', every: 1h}"
	c, err := Parse([]byte(doc))
	if err != nil {
		t.Fatal(err)
	}
	if c.Role != Gateway || c.Hostname != "office" {
		t.Errorf("role %q, host name %q from the token", c.Role, c.Hostname)
	}
	b, err := c.Save()
	if err != nil || strings.Contains(string(b), "swe1") || strings.Contains(string(b), "token") {
		t.Fatalf("saved %q, %v", b, err)
	}
	again, err := Parse(b)
	if err != nil {
		t.Fatalf("%v in\n%s", err, b)
	}
	c.Token = ""
	if !reflect.DeepEqual(again, c) {
		t.Errorf("saved and read:\n%+v\nbefore:\n%+v", again, c)
	}
}

// oem is an SMBIOS structure of type 11 with strings.
func oem(lines ...string) []byte {
	b := []byte{11, 5, 0x00, 0x0e, byte(len(lines))}
	for _, l := range lines {
		b = append(append(b, l...), 0)
	}
	return append(b, 0)
}

func TestSMBIOS(t *testing.T) {
	gw := token(t, identity.Gateway, "office")
	b64 := base64.StdEncoding.EncodeToString([]byte("role: gateway\nhostname: b"))
	for _, tc := range []struct {
		name  string
		raw   []byte
		host  string // of the configuration; "-" is none
		wrong bool
	}{
		{"nothing of ours", oem("vendor", "io.systemd.credential:other=x"), "-", false},
		{"text", oem("io.systemd.credential:sallyway.config=hostname: a\nrole: gateway"), "a", false},
		{"binary", oem("x", "io.systemd.credential.binary:sallyway.config="+b64), "b", false},
		{"token alone", oem("io.systemd.credential:sallyway.token=" + gw), "office", false},
		{"token beside", oem("io.systemd.credential:sallyway.token="+gw, "io.systemd.credential:sallyway.config=gateway: {standby: 0}"), "office", false},
		{"user-data", oem("io.systemd.credential:sallyway.config=#cloud-config\nsallyway: {role: gateway, hostname: c}"), "c", false},
		{"bad base64", oem("io.systemd.credential.binary:sallyway.config=%%%"), "-", true},
		{"bad configuration", oem("io.systemd.credential:sallyway.config=rol: x"), "-", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := SMBIOS(fstest.MapFS{"firmware/dmi/entries/11-0/raw": {Data: tc.raw}, "firmware/dmi/entries/1-0/raw": {Data: []byte("x")}})
			if (f.Err != nil) != tc.wrong {
				t.Fatalf("error %v", f.Err)
			}
			host := "-"
			if f.Config != nil {
				host = f.Config.Hostname
			}
			if host != tc.host {
				t.Errorf("host name %q, want %q", host, tc.host)
			}
		})
	}
	f := SMBIOS(fstest.MapFS{"firmware/dmi/entries/11-0/raw": {Data: oem("a")[:4]}})
	if f.Config != nil || f.Err != nil || len(f.Notes) != 1 {
		t.Errorf("a damaged entry: %+v", f)
	}
	if f := SMBIOS(fstest.MapFS{}); f.Config != nil || f.Err != nil || f.Notes != nil {
		t.Errorf("a machine without SMBIOS: %+v", f)
	}
}

func TestFwCfg(t *testing.T) {
	for _, name := range []string{"opt/sallyway/config", "opt/io.systemd.credentials/sallyway.config"} {
		f := FwCfg(fstest.MapFS{"firmware/qemu_fw_cfg/by_name/" + name + "/raw": {Data: []byte("role: relay")}})
		if f.Err != nil || f.Config == nil || f.Config.Role != Relay {
			t.Errorf("%s: %+v", name, f)
		}
	}
}

func TestCmdline(t *testing.T) {
	for _, tc := range []struct {
		name, line, role string
		notes            int
		wrong            bool
	}{
		{"nothing", "quiet panic=5 sallyway.image=1.2.3", "", 0, false},
		{"role", "quiet sallyway.role=gateway sallyway.gateway.allow=10.0.0.0/8,192.0.2.1 x=y", "gateway", 0, false},
		{"quoted", `sallyway.role=gateway sallyway.gateway.allow="10.0.3.0/24 5432"`, "gateway", 0, false},
		{"secret", "sallyway.role=gateway sallyway.token=swe1.secret sallyway.gateway.proxy_password=x", "gateway", 2, false},
		{"typing error", "sallyway.rol=gateway", "", 0, true},
		{"both value and keys", "sallyway.gateway=x sallyway.gateway.tun=off", "", 0, true},
		{"empty part", "sallyway.gateway..tun=off", "", 0, true},
		{"metadata", "sallyway.metadata=maybe", "", 1, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, _ := Cmdline(tc.line)
			role := ""
			if f.Config != nil {
				role = string(f.Config.Role)
			}
			if role != tc.role || len(f.Notes) != tc.notes || (f.Err != nil) != tc.wrong {
				t.Fatalf("role %q, notes %q, error %v", role, f.Notes, f.Err)
			}
			for _, n := range f.Notes {
				if strings.Contains(n, "secret") && strings.Contains(n, "swe1") {
					t.Errorf("the note shows a secret: %s", n)
				}
			}
		})
	}
	f, _ := Cmdline(`sallyway.role=gateway sallyway.gateway.allow="10.0.3.0/24 5432" sallyway.gateway.allow=10.0.4.7 sallyway.gateway.standby=0`)
	if want := (map[string]any{"allow": []any{"10.0.3.0/24 5432", "10.0.4.7"}, "standby": 0}); f.Err != nil || !reflect.DeepEqual(f.Config.Daemons[Gateway], want) {
		t.Errorf("settings %v, %v, want %v", f.Config, f.Err, want)
	}
	if _, only := Cmdline("sallyway.metadata=1"); !only.Metadata {
		t.Error("metadata was asked for")
	}
}

func TestReadSeed(t *testing.T) {
	gw := token(t, identity.Gateway, "office")
	user := "#cloud-config\nhostname: seed-host\nwrite_files: [{path: /etc/x}]\nruncmd: [reboot]\nsallyway:\n  token: " + gw + "\n"
	f := ReadSeed(fstest.MapFS{"user-data": {Data: []byte(user)}, "meta-data": {Data: []byte("local-hostname: other")}, "network-config": {Data: []byte("x")}}, NoCloud, "sr0")
	if f.Err != nil || f.Config == nil || f.Config.Hostname != "seed-host" || f.Config.Token == "" || f.Where != "sr0" {
		t.Fatalf("%+v", f)
	}
	if len(f.Notes) != 3 || !strings.Contains(f.Notes[0], "write_files is refused") {
		t.Errorf("notes %q", f.Notes)
	}
	drive := ReadSeed(fstest.MapFS{
		"openstack/latest/user_data": {Data: []byte("#cloud-config\nsallyway: {role: relay}\n")}, "openstack/latest/meta_data.json": {Data: []byte(`{"hostname": "drive"}`)},
	}, ConfigDrive, "vdb")
	if drive.Err != nil || drive.Config == nil || drive.Config.Hostname != "drive" || drive.Source != "config-drive" {
		t.Errorf("%+v", drive)
	}
	for name, data := range map[string]string{"script": "#!/bin/sh\n", "no key of ours": "#cloud-config\nusers: []\n", "empty": ""} {
		if f := ReadSeed(fstest.MapFS{"user-data": {Data: []byte(data)}}, NoCloud, ""); f.Config != nil || f.Err != nil {
			t.Errorf("%s: %+v", name, f)
		}
	}
	for name, data := range map[string]string{"wrong key": "#cloud-config\nsallyway: {rol: x}\n", "no mapping": "#cloud-config\n- x\n", "too large": "#cloud-config\n" + strings.Repeat("#", maxDocument)} {
		if f := ReadSeed(fstest.MapFS{"user-data": {Data: []byte(data)}}, NoCloud, ""); f.Config != nil || f.Err == nil {
			t.Errorf("%s: %+v", name, f)
		}
	}
	if f := ReadSeed(fstest.MapFS{}, NoCloud, ""); f.Config != nil || f.Err != nil {
		t.Errorf("a disk without user-data: %+v", f)
	}
}

// volumes of the kinds that are looked at.
func isoVolume(label string) string {
	b := make([]byte, 17*2048)
	copy(b[16*2048:], "\x01CD001\x01")
	copy(b[16*2048+40:], label+strings.Repeat(" ", 32-len(label)))
	return string(b)
}

func fatVolume(label string, signature, at, name int, kind string) string {
	b := make([]byte, 1024)
	b[signature] = 0x29
	copy(b[at:], label+strings.Repeat(" ", 11-len(label)))
	copy(b[name:], kind)
	b[510], b[511] = 0x55, 0xaa
	return string(b)
}

func TestSeed(t *testing.T) {
	for _, tc := range []struct {
		name, volume string
		kind         Kind
		fstype       string
	}{
		{"iso", isoVolume("CIDATA"), NoCloud, "iso9660"},
		{"iso, lower case", isoVolume("cidata"), NoCloud, "iso9660"},
		{"config drive", isoVolume("config-2"), ConfigDrive, "iso9660"},
		{"other iso", isoVolume("DEBIAN"), NoSeed, ""},
		{"fat32", fatVolume("CIDATA", 66, 71, 82, "FAT32   "), NoCloud, "vfat"},
		{"fat16", fatVolume("CIDATA", 38, 43, 54, "FAT16   "), NoCloud, "vfat"},
		{"boot record alone", fatVolume("CIDATA", 0, 1, 100, ""), NoSeed, ""},
		{"short", "x", NoSeed, ""},
		{"zeros", strings.Repeat("\x00", 40000), NoSeed, ""},
	} {
		if kind, fstype := Seed(strings.NewReader(tc.volume)); kind != tc.kind || fstype != tc.fstype {
			t.Errorf("%s: %q, %q", tc.name, kind, fstype)
		}
	}
}

func TestChoose(t *testing.T) {
	parse := func(doc string) *Config {
		c, err := Parse([]byte(doc))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	gw, rl := token(t, identity.Gateway, "office"), token(t, identity.Relay, "fra")
	before := "role: gateway\nhostname: before\ngateway: {standby: 0}"
	for _, tc := range []struct {
		name          string
		found         []Found
		source, host  string
		token         string // its source
		notes, errors int
	}{
		{"nothing", []Found{{Source: "smbios"}, {Source: "state"}}, "", "", "", 0, 0},
		{"first wins", []Found{{Source: "smbios", Config: parse("role: gateway\nhostname: a")}, {Source: "state", Config: parse(before)}}, "smbios", "a", "", 1, 0},
		{"wrong is passed over", []Found{{Source: "smbios", Err: errors.New("x")}, {Source: "state", Config: parse(before)}}, "state", "before", "", 0, 1},
		{"token joins the configuration before", []Found{{Source: "smbios", Config: parse("token: " + gw)}, {Source: "state", Config: parse(before)}}, "state", "before", "smbios", 0, 0},
		{"token of another role stands alone", []Found{{Source: "nocloud", Where: "sr0", Config: parse("token: " + rl)}, {Source: "state", Config: parse(before)}}, "nocloud (sr0)", "fra", "nocloud (sr0)", 1, 0},
		{"token alone", []Found{{Source: "fw_cfg", Config: parse("token: " + gw)}}, "fw_cfg", "office", "fw_cfg", 0, 0},
		{"empty", []Found{{Source: "smbios", Err: ErrEmpty}}, "", "", "", 0, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := Choose(tc.found)
			host := ""
			if r.Config != nil {
				host = r.Config.Hostname
			}
			if r.Source != tc.source || host != tc.host || r.Token != tc.token || len(r.Notes) != tc.notes || len(r.Errs) != tc.errors {
				t.Fatalf("%+v", r)
			}
			if (r.Token != "") != (r.Config != nil && r.Config.Token != "") {
				t.Errorf("the token's source is %q, and the token %v", r.Token, r.Config)
			}
		})
	}
}

func TestMetadata(t *testing.T) {
	const data = "#cloud-config\nsallyway: {role: gateway, hostname: cloud}\n"
	aws := func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodPut && r.URL.Path == "/latest/api/token" && r.Header.Get("X-aws-ec2-metadata-token-ttl-seconds") != "":
			_, _ = w.Write([]byte("session"))
		case r.URL.Path == "/latest/user-data" && r.Header.Get("X-aws-ec2-metadata-token") == "session":
			_, _ = w.Write([]byte(data))
		default:
			http.Error(w, "no", http.StatusUnauthorized)
		}
	}
	google := func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Metadata-Flavor") != "Google" {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		_, _ = w.Write([]byte(data))
	}
	azure := func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Metadata") != "true" || r.URL.Path != "/metadata/instance/compute/userData" {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write([]byte(base64.StdEncoding.EncodeToString([]byte(data))))
	}
	for name, h := range map[string]http.HandlerFunc{"AWS": aws, "Google": google, "Azure": azure} {
		srv := httptest.NewServer(h)
		f := askClouds(t.Context(), srv.URL)
		srv.Close()
		if f.Err != nil || f.Config == nil || f.Config.Hostname != "cloud" || f.Where != name {
			t.Errorf("%s: %+v", name, f)
		}
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
	}))
	defer srv.Close()
	if f := askClouds(t.Context(), srv.URL); f.Config != nil || f.Err != nil || len(f.Notes) != 1 {
		t.Errorf("a network that is no cloud: %+v", f)
	}
}

func FuzzOEMStrings(f *testing.F) {
	f.Add(oem("a", "io.systemd.credential:sallyway.token=x"))
	f.Add([]byte{11, 5, 0, 0, 255})
	f.Fuzz(func(t *testing.T, raw []byte) {
		lines, err := oemStrings(raw)
		if err == nil && len(lines) != int(raw[4]) {
			t.Errorf("%d strings of %d", len(lines), raw[4])
		}
		if m, err := credentials(lines); err == nil {
			_, _ = fromCredentials(m) // must not panic
		}
	})
}

func FuzzCloudConfig(f *testing.F) {
	f.Add([]byte("#cloud-config\nhostname: a\nsallyway: {role: gateway, gateway: {allow: [10.0.0.0/8]}}\n"))
	f.Add([]byte("#cloud-config\nsallyway: &a {role: *a}\n"))
	f.Add([]byte("#cloud-config\n? [a]\n: b\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, _, err := cloudConfig(data)
		if err == nil && c != nil {
			if b, err := c.Save(); err != nil {
				t.Errorf("cannot be saved: %v", err)
			} else if _, err := Parse(b); err != nil {
				t.Errorf("what was saved cannot be read: %v\n%s", err, b)
			}
		}
		_, _ = withToken(data, "swe1.x") // must not panic
		_ = metaHostname(data)
	})
}

func FuzzCmdline(f *testing.F) {
	f.Add(`quiet sallyway.role=gateway sallyway.gateway.allow="a b" sallyway.gateway.tun=off`)
	f.Add(`sallyway.a.b.c.d.e.f.g=1 sallyway.a=2 "sallyway.role"=relay`)
	f.Fuzz(func(t *testing.T, line string) {
		found, _ := Cmdline(line)
		if found.Config != nil && found.Config.Token != daemon.Secret("") {
			t.Error("a command line gave a token")
		}
	})
}

func FuzzSeedVolume(f *testing.F) {
	f.Add([]byte(isoVolume("CIDATA")))
	f.Add([]byte(fatVolume("CIDATA", 66, 71, 82, "FAT32   ")))
	f.Fuzz(func(t *testing.T, b []byte) {
		if kind, fstype := Seed(strings.NewReader(string(b))); (kind == NoSeed) != (fstype == "") {
			t.Errorf("%q, %q", kind, fstype)
		}
	})
}
