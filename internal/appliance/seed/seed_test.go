package seed

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

func whole() Seed {
	return Seed{
		Role: "gateway", Token: "swe1.c2VjcmV0", Hostname: "office",
		Network: Network{
			Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.10/24"), netip.MustParsePrefix("2001:db8::10/64")},
			Routers:   []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("fe80::1")}, DNS: []netip.Addr{netip.MustParseAddr("192.0.2.53")},
			NTP: []string{"ntp.example", "192.0.2.123"}, Proxy: "http://proxy.example:3128",
		},
	}
}

func TestInstanceFollowsToken(t *testing.T) {
	a, b := whole(), whole()
	b.Token = "swe1.b3RoZXI"
	_, m1, _ := a.Documents()
	_, m2, _ := a.Documents()
	_, m3, _ := b.Documents()
	if !bytes.Equal(m1, m2) || bytes.Equal(m1, m3) {
		t.Errorf("meta-data %q, again %q, with another token %q", m1, m2, m3)
	}
}

func TestLeastDocument(t *testing.T) {
	user, _, err := Seed{Role: "relay", Token: "swe1.x"}.Documents()
	if want := "#cloud-config\nsallyway:\n  role: relay\n  token: swe1.x\n"; err != nil || string(user) != want {
		t.Errorf("user-data %q, %v, want %q", user, err, want)
	}
}

// readISO walks the volume by its descriptors, as a kernel does, and returns its files by their Rock Ridge names.
func readISO(t *testing.T, b []byte) (label string, files map[string]string) {
	t.Helper()
	if len(b)%isoSector != 0 {
		t.Fatalf("%d bytes are no whole sectors", len(b))
	}
	p := b[16*isoSector:]
	if string(p[1:6]) != "CD001" || p[0] != 1 || b[17*isoSector] != 255 {
		t.Fatal("no volume descriptors")
	}
	if n := binary.LittleEndian.Uint32(p[80:]); int(n)*isoSector != len(b) || binary.BigEndian.Uint32(p[84:]) != n {
		t.Fatalf("the volume has %d sectors and says %d", len(b)/isoSector, n)
	}
	root := p[156:190]
	at, size := binary.LittleEndian.Uint32(root[2:]), binary.LittleEndian.Uint32(root[10:])
	dir := b[at*isoSector : at*isoSector+size]
	files = make(map[string]string)
	for len(dir) > 0 && dir[0] > 0 {
		r := dir[:dir[0]]
		dir = dir[dir[0]:]
		at, size := binary.LittleEndian.Uint32(r[2:]), binary.LittleEndian.Uint32(r[10:])
		su := r[33+(int(r[32])|1):]
		name := ""
		for len(su) >= 4 {
			if string(su[:2]) == "NM" {
				name = string(su[5:su[2]])
			}
			su = su[su[2]:]
		}
		if r[25]&2 == 0 {
			files[name] = string(b[at*isoSector : at*isoSector+size])
		}
	}
	return strings.TrimSpace(string(p[40:72])), files
}

func TestISO(t *testing.T) {
	s := whole()
	var a, b bytes.Buffer
	if err := errors.Join(s.WriteISO(&a), s.WriteISO(&b)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a.Bytes(), b.Bytes()) {
		t.Error("the same seed gave two disks")
	}
	label, files := readISO(t, a.Bytes())
	user, meta, _ := s.Documents()
	if want := map[string]string{UserData: string(user), MetaData: string(meta)}; label != Label || !reflect.DeepEqual(files, want) {
		t.Errorf("label %q, files %q, want %q", label, files, want)
	}
}
