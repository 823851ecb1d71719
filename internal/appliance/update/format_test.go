package update

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf16"
)

func TestVersions(t *testing.T) {
	ordered := []Version{"0.9", "0.9.0", "0.10.0", "1.0.0~alpha", "1.0.0~rc.1", "1.0.0~rc.2", "1.0.0~rc.10", "1.0.0", "1.0.1", "1.10.0", "10.0.0", "2026.11.22"}
	for i, v := range ordered {
		if got, err := ParseVersion("v" + string(v)); err != nil || got != v {
			t.Errorf("%s: %v, %v", v, got, err)
		}
		for j, w := range ordered {
			want := 0
			if i < j {
				want = -1
			} else if i > j {
				want = 1
			}
			if got := v.Compare(w); got != want {
				t.Errorf("%s and %s: %d", v, w, got)
			}
		}
	}
	for _, s := range []string{"", "1", "v", "1.0.0-1", "1.0+3", "1..0", "1.0.", "01.0", "1.0~", "1.0~RC", "1.0_1", "../1.0", "1.0 ", strings.Repeat("1.", 40) + "0", "devel"} {
		if v, err := ParseVersion(s); err == nil {
			t.Errorf("%q is %s", s, v)
		}
	}
}

func TestEntries(t *testing.T) {
	for name, want := range map[string]Entry{
		"sallyway_1.4.0.efi":          {Version: "1.4.0"},
		"sallyway_1.5.0+3.efi":        {Version: "1.5.0", Counted: true, Left: 3},
		"sallyway_1.5.0+1-2.efi":      {Version: "1.5.0", Counted: true, Left: 1, Done: 2},
		"sallyway_1.5.0+0-3.efi":      {Version: "1.5.0", Counted: true, Done: 3},
		"sallyway_1.5.0~rc.1+2-1.efi": {Version: "1.5.0~rc.1", Counted: true, Left: 2, Done: 1},
	} {
		for _, n := range []string{name, strings.ToUpper(name)} {
			if got, ok := ParseEntry(n); !ok || got != want {
				t.Errorf("%s: %+v, %v", n, got, ok)
			}
		}
		if want.String() != name {
			t.Errorf("%+v is called %s", want, want)
		}
	}
	for _, name := range []string{"", "sallyway_.efi", "sallyway_1.0.efi.part", "other_1.0.efi", "sallyway_1.0+.efi", "sallyway_1.0+-1.efi", "sallyway_1.0+3-.efi", "sallyway_1.0+300.efi", "sallyway_1.0++3.efi", "sallyway_1.0+3-1-1.efi", "sallyway_1.0.conf"} {
		if e, ok := ParseEntry(name); ok {
			t.Errorf("%s: %+v", name, e)
		}
	}
}

// text is a string as efivarfs shows it.
func text(s string) string {
	b := []byte{6, 0, 0, 0}
	for _, c := range append(utf16.Encode([]rune(s)), 0) {
		b = binary.LittleEndian.AppendUint16(b, c)
	}
	return string(b)
}

func TestFindBoot(t *testing.T) {
	for _, tc := range []struct {
		name    string
		vars    map[string]string
		cmdline string
		want    Boot
	}{
		{"a counted start", map[string]string{
			"LoaderBootCountPath": text(`\EFI\Linux\sallyway_1.5.0+2-1.efi`), "LoaderEntrySelected": text("sallyway_1.5.0+3.efi"),
			"LoaderDevicePartUUID": text("AAAABBBB-0000-1111-2222-333344445555"),
		}, "quiet", Boot{UEFI: true, Version: "1.5.0", File: "sallyway_1.5.0+2-1.efi", Partition: "aaaabbbb-0000-1111-2222-333344445555"}},
		{"a good one", map[string]string{"LoaderEntrySelected": text("sallyway_1.5.0.efi")}, "", Boot{UEFI: true, Version: "1.5.0", File: "sallyway_1.5.0.efi"}},
		{"the entry of a hybrid disk", map[string]string{"LoaderEntrySelected": text("sallyway_1.5.0.conf")}, "", Boot{UEFI: true, Version: "1.5.0", File: "sallyway_1.5.0.conf"}},
		{"another boot loader", map[string]string{"Other": text("x")}, "a sallyway.image=1.4.0 b", Boot{UEFI: true, Version: "1.4.0"}},
		{"a broken variable", map[string]string{"LoaderEntrySelected": "x"}, "", Boot{UEFI: true}},
		{"BIOS", nil, "BOOT_IMAGE=/bios/1.4.0/vmlinuz sallyway.image=1.4.0", Boot{Version: "1.4.0"}},
		{"nothing says it", nil, "sallyway.image=../x", Boot{}},
	} {
		dir := t.TempDir()
		for name, b := range tc.vars {
			put(t, dir, map[string]string{"efi/efivars/" + name + loader: b})
		}
		put(t, dir, map[string]string{"cmdline": tc.cmdline + "\n"})
		if got := FindBoot(filepath.Join(dir, "efi/efivars"), filepath.Join(dir, "cmdline")); got != tc.want {
			t.Errorf("%s: %+v", tc.name, got)
		}
	}
}

// TestHybridDisk runs by UEFI from the entry that such a disk comes with, updates, and can go back.
func TestHybridDisk(t *testing.T) {
	key, dir := newKey(t), t.TempDir()
	u := uefi(t, key, func(c *Config) {
		if err := os.RemoveAll(filepath.Join(c.ESP, "EFI/Linux")); err != nil {
			t.Fatal(err)
		}
		put(t, c.ESP, map[string]string{"loader/entries/sallyway_1.0.0.conf": "title x", "bios/1.0.0/vmlinuz": "kernel"})
	})
	s, err := u.Status()
	if err != nil || s.Trial || len(s.Slots) != 1 || !s.Slots[0].Running || !s.Slots[0].Next {
		t.Fatalf("%+v, %v", s, err)
	}
	if _, err := u.Install(t.Context(), publish(t, dir, "1.1.0", key, nil), false); err != nil {
		t.Fatal(err)
	}
	if s, err = u.Status(); err != nil || len(s.Slots) != 2 || s.Slots[0].Version != "1.1.0" || !s.Slots[0].Next {
		t.Errorf("%+v, %v", s, err)
	}
}

func TestKeys(t *testing.T) {
	private, public, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "key")
	put(t, filepath.Dir(path), map[string]string{"key": private + "\n"})
	if _, err := ReadKey(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a key that all can read: %v", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	k, err := ReadKey(path)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := ParsePublicKeys([]string{public})
	if err != nil || !pub[0].Equal(k.Public()) {
		t.Errorf("%v, %v", pub, err)
	}
	if _, err := ParsePublicKeys([]string{private + "x"}); err == nil {
		t.Error("nonsense is a key")
	}
}

// FuzzManifest holds that nothing is read without a signature, and that what is read with one is fit to be used.
func FuzzManifest(f *testing.F) {
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	keys := []ed25519.PublicKey{key.Public().(ed25519.PublicKey)}
	sum := sha256.Sum256(nil)
	good, err := Sign(Manifest{Version: "1.0.0", Arch: "amd64", File: "x.efi", Size: 1, SHA256: hex.EncodeToString(sum[:])}, key)
	if err != nil {
		f.Fatal(err)
	}
	known, _, _ := bytes.Cut(good, []byte("\n"))
	f.Add(known, good)
	f.Add([]byte(`{"version":"1.0.0","file":"../x"}`), []byte("{}\n"+keyID(keys[0])+" AAAA"))
	f.Fuzz(func(t *testing.T, line, whole []byte) {
		// Somebody who has no key can send what was signed, with other lines behind it, and nothing else.
		first, _, _ := bytes.Cut(whole, []byte("\n"))
		if m, err := Open(whole, keys); err == nil && !bytes.Equal(first, known) {
			t.Errorf("%q is signed: %+v", whole, m)
		}
		if bytes.ContainsRune(line, '\n') {
			return
		}
		signed := fmt.Appendf(nil, "%s\n%s %s\n", line, keyID(keys[0]), base64Of(ed25519.Sign(key, append([]byte(signedFor), line...))))
		m, err := Open(signed, keys)
		if err != nil {
			return
		}
		if _, err := ParseVersion(string(m.Version)); err != nil || m.Size <= 0 || m.Size > maxImage || filepath.Base(m.File) != m.File || m.File[0] == '.' {
			t.Errorf("%+v", m)
		}
	})
}

// FuzzEntry holds that a name that is read is written the same way again, and stays in its folder.
func FuzzEntry(f *testing.F) {
	f.Add("sallyway_1.5.0+1-2.efi")
	f.Add("sallyway_1.5.0~rc.1.efi")
	f.Fuzz(func(t *testing.T, name string) {
		e, ok := ParseEntry(name)
		if !ok {
			return
		}
		if again, ok := ParseEntry(e.String()); !ok || again != e {
			t.Errorf("%q is %+v, and that is %q", name, e, e.String())
		}
		if filepath.Base(e.String()) != e.String() {
			t.Errorf("%q", e.String())
		}
	})
}

// FuzzMenu holds that a menu that was read can be written and read again.
func FuzzMenu(f *testing.F) {
	f.Add(Menu(MenuEntry{"1.1.0", "console=ttyS0"}, MenuEntry{"1.0.0", "quiet"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		entries := parseMenu(b)
		if again := parseMenu(Menu(entries...)); len(entries) > 0 && !slices.Equal(again, entries) {
			t.Errorf("%+v became %+v", entries, again)
		}
	})
}

// FuzzVariable reads what firmware may hold.
func FuzzVariable(f *testing.F) {
	f.Add([]byte(text("sallyway_1.0.0.efi")))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseVariable(b)
		if err == nil && len(s) > 3*len(b) {
			t.Errorf("%d bytes became %d", len(b), len(s))
		}
	})
}

func base64Of(b []byte) string { return base64.StdEncoding.EncodeToString(b) }
