package update

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newKey makes a key.
func newKey(t *testing.T) ed25519.PrivateKey {
	t.Helper()
	_, k, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// ukiSection is a section of an image.
type ukiSection struct{ name, data string }

// uki makes a PE file that debug/pe reads, with nothing in it but sections. Each is padded to 512 bytes, as linkers do it.
func uki(sections ...ukiSection) []byte {
	const header = 1024
	le := binary.LittleEndian
	b := make([]byte, header)
	copy(b, "MZ")
	le.PutUint32(b[0x3c:], 0x40)
	copy(b[0x40:], "PE\x00\x00")
	le.PutUint16(b[0x44:], 0x8664)
	le.PutUint16(b[0x46:], uint16(len(sections)))
	for i, s := range sections {
		h := b[0x58+i*40:]
		copy(h, s.name)
		padded := (len(s.data) + 511) / 512 * 512
		le.PutUint32(h[8:], uint32(len(s.data)))
		le.PutUint32(h[16:], uint32(padded))
		le.PutUint32(h[20:], uint32(len(b)))
		b = append(append(b, s.data...), make([]byte, padded-len(s.data))...)
	}
	return b
}

// image is a whole one.
func image(v Version) []byte {
	return uki(ukiSection{".cmdline", "console=ttyS0 panic=5 sallyway.image=" + string(v) + "\x00"}, ukiSection{".linux", "kernel " + string(v)}, ukiSection{".initrd", "initramfs " + string(v)})
}

// publish writes an image and its manifest into a folder and returns the manifest's path.
func publish(t *testing.T, dir string, v Version, key ed25519.PrivateKey, change func(*Manifest)) string {
	t.Helper()
	path := filepath.Join(dir, fmt.Sprintf("sallyway_%s_amd64.efi", v))
	if err := os.WriteFile(path, image(v), 0o644); err != nil {
		t.Fatal(err)
	}
	m, err := Describe(path, v, "amd64")
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(&m)
	}
	b, err := Sign(m, key)
	if err != nil {
		t.Fatal(err)
	}
	manifest := path + ".manifest"
	if err := os.WriteFile(manifest, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return manifest
}

// put writes files below a folder.
func put(t *testing.T, root string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
}

// tree lists the files below a folder.
func tree(t *testing.T, root string) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			rel, _ := filepath.Rel(root, path)
			all = append(all, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// uefi makes an updater of a machine that runs 1.0.0 by UEFI.
func uefi(t *testing.T, key ed25519.PrivateKey, change func(*Config)) *Updater {
	t.Helper()
	cfg := Config{
		ESP: t.TempDir(), Boot: Boot{UEFI: true, Version: "1.0.0"}, Arch: "amd64", Keys: []ed25519.PublicKey{key.Public().(ed25519.PublicKey)},
		free: func(string) (int64, error) { return 1 << 30, nil },
	}
	put(t, cfg.ESP, map[string]string{"EFI/Linux/sallyway_1.0.0.efi": string(image("1.0.0")), "EFI/BOOT/BOOTX64.EFI": "systemd-boot"})
	if change != nil {
		change(&cfg)
	}
	u, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func TestInstall(t *testing.T) {
	key, dir := newKey(t), t.TempDir()
	u := uefi(t, key, nil)
	put(t, u.cfg.ESP, map[string]string{"EFI/Linux/sallyway_0.8.0.efi": "old", "EFI/Linux/sallyway_0.9.0.efi": "last good", "EFI/Linux/sallyway_0.9.5+0-3.efi": "failed", "EFI/Linux/sallyway_9.part": "cut off"})
	v, err := u.Install(t.Context(), publish(t, dir, "1.1.0", key, nil), false)
	if err != nil || v != "1.1.0" {
		t.Fatal(v, err)
	}
	want := []string{"EFI/BOOT/BOOTX64.EFI", "EFI/Linux/sallyway_0.9.0.efi", "EFI/Linux/sallyway_1.0.0.efi", "EFI/Linux/sallyway_1.1.0+3.efi"}
	if got := tree(t, u.cfg.ESP); !slices.Equal(got, want) {
		t.Errorf("files: %q", got)
	}
	if b, err := os.ReadFile(filepath.Join(u.cfg.ESP, "EFI/Linux/sallyway_1.1.0+3.efi")); err != nil || !bytes.Equal(b, image("1.1.0")) {
		t.Errorf("the image: %d bytes, %v", len(b), err)
	}
	s, err := u.Status()
	if err != nil || s.Running != "1.0.0" || s.Trial || s.Failed != "" || len(s.Slots) != 3 {
		t.Fatalf("%+v, %v", s, err)
	}
	if n := s.Slots[0]; n.Version != "1.1.0" || !n.Next || n.TriesLeft != 3 || n.Good {
		t.Errorf("the new one: %+v", n)
	}
	// The same again, an older one, and a good one that is not newer than that which waits.
	for _, v := range []Version{"1.1.0", "1.0.5", "1.0.0", "0.9.0", "1.1.0~rc.1"} {
		if _, err := u.Install(t.Context(), publish(t, dir, v, key, nil), false); !errors.Is(err, ErrOlder) && !errors.Is(err, ErrInstalled) {
			t.Errorf("%s: %v", v, err)
		}
	}
	if got := tree(t, u.cfg.ESP); !slices.Equal(got, want) {
		t.Errorf("files: %q", got)
	}
	// Somebody at the machine may go back.
	if _, err := u.Install(t.Context(), publish(t, dir, "0.7.0", key, nil), true); err != nil {
		t.Error(err)
	}
}

// TestRefused holds what is not installed, and that nothing is left of it.
func TestRefused(t *testing.T) {
	key, dir := newKey(t), t.TempDir()
	manifest := func(change func(*Manifest)) func() string {
		return func() string { return publish(t, dir, "1.1.0", key, change) }
	}
	edit := func(suffix string, f func([]byte) []byte) func() string {
		return func() string {
			m := publish(t, dir, "1.1.0", key, nil)
			path := strings.TrimSuffix(m, ".manifest") + suffix
			b, err := os.ReadFile(path)
			if err == nil {
				err = os.WriteFile(path, f(b), 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
			return m
		}
	}
	for _, tc := range []struct {
		name   string
		from   func() string
		change func(*Config)
		want   string
	}{
		{"another architecture", manifest(func(m *Manifest) { m.Arch = "arm64" }), nil, "is for arm64"},
		{"older", func() string { return publish(t, dir, "0.9.9", key, nil) }, nil, ErrOlder.Error()},
		{"another's key", func() string { return publish(t, dir, "1.1.0", newKey(t), nil) }, nil, ErrUnsigned.Error()},
		{"a changed manifest", edit(".manifest", func(b []byte) []byte { return bytes.Replace(b, []byte("1.1.0"), []byte("1.9.0"), 1) }), nil, ErrUnsigned.Error()},
		{"no signature", edit(".manifest", func(b []byte) []byte { return b[:bytes.IndexByte(b, '\n')+1] }), nil, ErrUnsigned.Error()},
		{"a huge manifest", edit(".manifest", func(b []byte) []byte { return append(b, make([]byte, maxManifest)...) }), nil, "more than"},
		{"a changed image", edit("", func(b []byte) []byte { b[len(b)-600] ^= 1; return b }), nil, "not what its manifest says"},
		{"a short image", edit("", func(b []byte) []byte { return b[:len(b)-1] }), nil, "ends after"},
		{"a long image", edit("", func(b []byte) []byte { return append(b, 0) }), nil, "more than the"},
		{"no image", func() string {
			m := publish(t, dir, "1.1.0", key, nil)
			if err := os.Remove(strings.TrimSuffix(m, ".manifest")); err != nil {
				t.Fatal(err)
			}
			return m
		}, nil, "no such file"},
		{"no room", manifest(nil), func(c *Config) { c.free = func(string) (int64, error) { return 1000, nil } }, "are free"},
		{"no key", manifest(nil), func(c *Config) { c.Keys = nil }, "no key"},
		{"on trial itself", manifest(nil), func(c *Config) {
			from := filepath.Join(c.ESP, "EFI/Linux/sallyway_1.0.0.efi")
			if err := os.Rename(from, strings.TrimSuffix(from, ".efi")+"+2-1.efi"); err != nil {
				t.Fatal(err)
			}
		}, "on trial"},
		{"failed before", manifest(nil), func(c *Config) {
			put(t, c.ESP, map[string]string{"EFI/Linux/sallyway_1.1.0+0-3.efi": "x"})
		}, ErrFailed.Error()},
	} {
		t.Run(tc.name, func(t *testing.T) {
			u := uefi(t, key, tc.change)
			before := tree(t, u.cfg.ESP)
			_, err := u.Install(t.Context(), tc.from(), false)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
			if after := tree(t, u.cfg.ESP); !slices.Equal(before, after) {
				t.Errorf("files were %q, are %q", before, after)
			}
		})
	}
}

// TestReadBack has the disk give back other bytes than were written.
func TestReadBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.efi")
	put(t, filepath.Dir(path), map[string]string{"x.efi": "an image"})
	m, err := Describe(path, "1.0.0", "amd64")
	if err == nil {
		err = check(path, m)
	}
	if err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Dir(path), map[string]string{"x.efi": "an imago"})
	if err := check(path, m); err == nil || !strings.Contains(err.Error(), "failing") {
		t.Error(err)
	}
}

// TestManifestOfAnotherKind has a signature over the same bytes for another purpose.
func TestManifestOfAnotherKind(t *testing.T) {
	key := newKey(t)
	m := Manifest{Version: "1.0.0", Arch: "amd64", File: "x.efi", Size: 1, SHA256: strings.Repeat("00", 32)}
	b, err := Sign(m, key)
	if err != nil {
		t.Fatal(err)
	}
	keys := []ed25519.PublicKey{newKey(t).Public().(ed25519.PublicKey), key.Public().(ed25519.PublicKey)}
	if got, err := Open(b, keys); err != nil || got != m {
		t.Errorf("%+v, %v", got, err)
	}
	line, _, _ := bytes.Cut(b, []byte("\n"))
	plain := fmt.Appendf(nil, "%s\n%s ", line, keyID(keys[1]))
	plain = fmt.Appendf(plain, "%s\n", base64Of(ed25519.Sign(key, line)))
	if _, err := Open(plain, keys); !errors.Is(err, ErrUnsigned) {
		t.Errorf("a signature without the purpose: %v", err)
	}
	// Two keys: either is enough.
	other := newKey(t)
	if b, err = Sign(m, other, key); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(b, keys); err != nil {
		t.Error(err)
	}
	for _, bad := range []Manifest{
		{},
		{Version: "v1.0.0", Arch: "amd64", File: "x", Size: 1, SHA256: m.SHA256},
		{Version: "1.0.0", Arch: "amd64", File: "../x", Size: 1, SHA256: m.SHA256},
		{Version: "1.0.0", Arch: "amd64", File: "x", Size: maxImage + 1, SHA256: m.SHA256},
		{Version: "1.0.0", Arch: "a/b", File: "x", Size: 1, SHA256: m.SHA256},
		{Version: "1.0.0", Arch: "amd64", File: "x", Size: 1, SHA256: "00"},
	} {
		if _, err := Sign(bad, key); err == nil {
			t.Errorf("%+v is signed", bad)
		}
	}
}

// TestFetchByHTTPS downloads over TLS with a root of its own, and refuses what is not what it should be.
func TestFetchByHTTPS(t *testing.T) {
	key, dir := newKey(t), t.TempDir()
	manifest := filepath.Base(publish(t, dir, "1.1.0", key, nil))
	var cut atomic.Bool
	files := http.FileServer(http.Dir(dir))
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/away":
			http.Redirect(w, r, "http://127.0.0.1:1/x", http.StatusFound)
		case cut.Load() && strings.HasSuffix(r.URL.Path, ".efi"):
			b := image("1.1.0")
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			_, _ = w.Write(b[:len(b)/2])
			panic(http.ErrAbortHandler)
		default:
			files.ServeHTTP(w, r)
		}
	}))
	defer srv.Close()
	roots := srv.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	u := uefi(t, key, func(c *Config) { c.Roots = roots })
	cut.Store(true)
	before := tree(t, u.cfg.ESP)
	if _, err := u.Install(t.Context(), srv.URL+"/"+manifest, false); err == nil {
		t.Error("a connection that breaks off is taken for all")
	}
	if after := tree(t, u.cfg.ESP); !slices.Equal(before, after) {
		t.Errorf("files: %q", after)
	}
	for path, want := range map[string]string{"/none": "404", "/away": "https"} {
		if _, err := u.Install(t.Context(), srv.URL+path, false); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
	cut.Store(false)
	stranger := uefi(t, key, nil)
	if _, err := stranger.Install(t.Context(), srv.URL+"/"+manifest, false); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("an unknown certificate: %v", err)
	}
	if _, err := u.Install(t.Context(), srv.URL+"/"+manifest, false); err != nil {
		t.Error(err)
	}
	for url, good := range map[string]bool{
		"https://example.org/m": true, "http://10.0.2.2:8080/m": true, "http://[fd00::1]/m": true, "http://example.org/m": false, "http://8.8.8.8/m": false,
		"ftp://10.0.0.1/m": false, "https://user:secret@example.org/m": false, "https:///m": false,
	} {
		if _, err := New(Config{ESP: "/x", Running: "1.0.0", URL: url}); (err == nil) != good {
			t.Errorf("%s: %v", url, err)
		}
	}
}

var errCut = errors.New("the power is gone")

// bootable says which version a restart starts, by systemd-boot's rules, and fails where that file is not whole.
func bootable(t *testing.T, u *Updater) Version {
	t.Helper()
	s, err := u.Status()
	if err != nil {
		t.Fatal(err)
	}
	for _, slot := range s.Slots {
		if !slot.Next {
			continue
		}
		if u.cfg.Boot.UEFI {
			b, err := os.ReadFile(filepath.Join(u.cfg.ESP, slot.File))
			if err != nil || !bytes.Equal(b, image(slot.Version)) {
				t.Errorf("%s would be started and is not whole: %v", slot.File, err)
			}
			return slot.Version
		}
		for name, want := range map[string]string{BIOSKernel: "kernel ", BIOSInitrd: "initramfs "} {
			b, err := os.ReadFile(filepath.Join(u.cfg.ESP, slot.File, name))
			if err != nil || string(b) != want+string(slot.Version) {
				t.Errorf("%s/%s would be started and holds %q: %v", slot.File, name, b, err)
			}
		}
		return slot.Version
	}
	t.Error("nothing would be started")
	return ""
}

// TestPowerCuts cuts an update and a blessing off before each of their steps: what a restart starts is whole, the update can be made again then, and
// nothing is left of the first one.
func TestPowerCuts(t *testing.T) {
	key, dir := newKey(t), t.TempDir()
	manifest := publish(t, dir, "1.1.0", key, nil)
	for name, make := range map[string]func(*testing.T, func(*Config)) *Updater{
		"UEFI": func(t *testing.T, f func(*Config)) *Updater {
			u := uefi(t, key, f)
			put(t, u.cfg.ESP, map[string]string{"EFI/Linux/sallyway_0.9.0.efi": string(image("0.9.0")), "EFI/Linux/sallyway_0.8.0.efi": string(image("0.8.0"))})
			return u
		},
		"BIOS": func(t *testing.T, f func(*Config)) *Updater { return bios(t, key, f) },
	} {
		t.Run(name, func(t *testing.T) {
			whole := 0
			for at := 1; ; at++ {
				n := 0
				off := false
				u := make(t, func(c *Config) {
					c.step = func(string) error {
						if n++; n == at {
							off = true
						}
						if off {
							return errCut
						}
						return nil
					}
				})
				_, err := u.Install(t.Context(), manifest, false)
				cut := errors.Is(err, errCut)
				if err != nil && !cut {
					t.Fatalf("step %d: %v", at, err)
				}
				off, n = false, 1<<30
				next := bootable(t, u)
				if !cut {
					whole = at
					if next != "1.1.0" {
						t.Errorf("after all of it %s is next", next)
					}
					break
				}
				if next == "1.1.0" {
					continue // installed but for tidying up
				}
				if next != "1.0.0" {
					t.Errorf("cut off before step %d: %s is next", at, next)
				}
				if _, err := u.Install(t.Context(), manifest, false); err != nil {
					t.Errorf("after a cut before step %d: %v", at, err)
				}
				if bootable(t, u) != "1.1.0" {
					t.Errorf("after a cut before step %d the new one is not next", at)
				}
				for _, f := range tree(t, u.cfg.ESP) {
					if strings.HasSuffix(f, ".part") {
						t.Errorf("after a cut before step %d %s is left", at, f)
					}
				}
			}
			if whole < 4 {
				t.Errorf("only %d steps", whole)
			}
		})
	}
}

// TestBootCounting plays systemd-boot: a new image is started, counted, not blessed, and given up; another one is blessed.
func TestBootCounting(t *testing.T) {
	key, dir := newKey(t), t.TempDir()
	u := uefi(t, key, nil)
	if _, err := u.Install(t.Context(), publish(t, dir, "1.1.0", key, nil), false); err != nil {
		t.Fatal(err)
	}
	esp := u.cfg.ESP
	start := func(from, to string) *Updater {
		t.Helper()
		if err := os.Rename(filepath.Join(esp, EFILinux, from), filepath.Join(esp, EFILinux, to)); err != nil {
			t.Fatal(err)
		}
		cfg := u.cfg
		e, ok := ParseEntry(to)
		if !ok {
			t.Fatal(to)
		}
		cfg.Boot.Version = e.Version
		u, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	for _, names := range [][2]string{{"sallyway_1.1.0+3.efi", "sallyway_1.1.0+2-1.efi"}, {"sallyway_1.1.0+2-1.efi", "sallyway_1.1.0+1-2.efi"}, {"sallyway_1.1.0+1-2.efi", "sallyway_1.1.0+0-3.efi"}} {
		tried := start(names[0], names[1])
		s, err := tried.Status()
		if err != nil || !s.Trial || s.Failed != "" {
			t.Errorf("%s: %+v, %v", names[1], s, err)
		}
	}
	// systemd-boot passes it over now.
	if got := bootable(t, u); got != "1.0.0" {
		t.Errorf("%s is next", got)
	}
	s, err := u.Status()
	if err != nil || s.Failed != "1.1.0" || s.Trial {
		t.Errorf("%+v, %v", s, err)
	}
	// The next version takes its place, and is good.
	if _, err := u.Install(t.Context(), publish(t, dir, "1.2.0", key, nil), false); err != nil {
		t.Fatal(err)
	}
	good := start("sallyway_1.2.0+3.efi", "sallyway_1.2.0+2-1.efi")
	if err := good.Bless(); err != nil {
		t.Fatal(err)
	}
	want := []string{"EFI/BOOT/BOOTX64.EFI", "EFI/Linux/sallyway_1.0.0.efi", "EFI/Linux/sallyway_1.2.0.efi"}
	if got := tree(t, esp); !slices.Equal(got, want) {
		t.Errorf("files: %q", got)
	}
	if err := good.Bless(); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

// TestLastGoodStays does not remove the last good image while the running one is on trial, not even for room.
func TestLastGoodStays(t *testing.T) {
	key, dir := newKey(t), t.TempDir()
	u := uefi(t, key, func(c *Config) {
		c.Boot.Version = "1.5.0"
		c.free = func(string) (int64, error) { return 10, nil }
	})
	put(t, u.cfg.ESP, map[string]string{"EFI/Linux/sallyway_1.5.0+2-1.efi": string(image("1.5.0"))})
	if _, err := u.Install(t.Context(), publish(t, dir, "1.6.0", key, nil), true); err == nil || !strings.Contains(err.Error(), "are free") {
		t.Error(err)
	}
	if got := bootable(t, u); got != "1.5.0" {
		t.Errorf("%s is next", got)
	}
	if _, err := os.Stat(filepath.Join(u.cfg.ESP, "EFI/Linux/sallyway_1.0.0.efi")); err != nil {
		t.Error(err)
	}
	// Where the running one is good, the one before goes if there is no room otherwise.
	u = uefi(t, key, nil)
	put(t, u.cfg.ESP, map[string]string{"EFI/Linux/sallyway_0.9.0.efi": "x"})
	u.cfg.free = func(dir string) (int64, error) {
		if _, err := os.Stat(filepath.Join(dir, "EFI/Linux/sallyway_0.9.0.efi")); err == nil {
			return 10, nil
		}
		return 1 << 30, nil
	}
	if _, err := u.Install(t.Context(), publish(t, dir, "1.6.0", key, nil), false); err != nil {
		t.Error(err)
	}
}

// bios makes an updater of a machine that runs 1.0.0 by BIOS.
func bios(t *testing.T, key ed25519.PrivateKey, change func(*Config)) *Updater {
	t.Helper()
	return uefi(t, key, func(c *Config) {
		if err := os.RemoveAll(filepath.Join(c.ESP, "EFI")); err != nil {
			t.Fatal(err)
		}
		c.Boot.UEFI = false
		put(t, c.ESP, map[string]string{
			"bios/1.0.0/vmlinuz": "kernel 1.0.0", "bios/1.0.0/initrd": "initramfs 1.0.0", "bios/1.0.0/good": "",
			"bios/ldlinux.sys": "x", BIOSMenu: string(Menu(MenuEntry{"1.0.0", "console=ttyS0"})),
		})
		if change != nil {
			change(c)
		}
	})
}

func TestBIOS(t *testing.T) {
	key, dir := newKey(t), t.TempDir()
	u := bios(t, key, nil)
	if _, err := u.Install(t.Context(), publish(t, dir, "1.1.0", key, nil), false); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(u.cfg.ESP, BIOSMenu))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"DEFAULT 1.1.0\n", "TIMEOUT 30\n",
		"LABEL 1.1.0\n  LINUX /bios/1.1.0/vmlinuz\n  INITRD /bios/1.1.0/initrd\n  APPEND console=ttyS0 panic=5 sallyway.image=1.1.0\n",
		"LABEL 1.0.0\n  LINUX /bios/1.0.0/vmlinuz\n  INITRD /bios/1.0.0/initrd\n  APPEND console=ttyS0 sallyway.image=1.0.0\n",
	} {
		if !strings.Contains(string(b), want) {
			t.Errorf("the menu has no %q:\n%s", want, b)
		}
	}
	if got := bootable(t, u); got != "1.1.0" {
		t.Errorf("%s is next", got)
	}
	// It is started, is not healthy, and somebody goes back by the menu.
	cfg := u.cfg
	cfg.Boot.Version = "1.1.0"
	tried, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := tried.Status(); err != nil || !s.Trial || s.UEFI {
		t.Errorf("%+v, %v", s, err)
	}
	if err := tried.slots.begin(); err != nil {
		t.Fatal(err)
	}
	if s, err := u.Status(); err != nil || s.Failed != "1.1.0" {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := u.Install(t.Context(), publish(t, dir, "1.2.0", key, nil), false); err != nil {
		t.Fatal(err)
	}
	cfg.Boot.Version = "1.2.0"
	if tried, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	if err := tried.Bless(); err != nil {
		t.Fatal(err)
	}
	s, err := tried.Status()
	if err != nil || s.Trial || s.Failed != "" || len(s.Slots) != 2 || !s.Slots[0].Good {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestHealthy waits for a minute of health without a break, and gives up after ten.
func TestHealthy(t *testing.T) {
	key := newKey(t)
	trial := func(c *Config) {
		from := filepath.Join(c.ESP, "EFI/Linux/sallyway_1.0.0.efi")
		if err := os.Rename(from, strings.TrimSuffix(from, ".efi")+"+2-1.efi"); err != nil {
			t.Fatal(err)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		u := uefi(t, key, trial)
		began := time.Now()
		if err := u.Run(t.Context(), func() bool { return time.Since(began)%(50*time.Second) > time.Second }); !errors.Is(err, ErrUnhealthy) {
			t.Errorf("never a whole minute: %v", err)
		}
		if d := time.Since(began); d != defaultTrial {
			t.Errorf("given up after %v", d)
		}
		if s, err := u.Status(); err != nil || !s.Trial {
			t.Errorf("%+v, %v", s, err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		u := uefi(t, key, trial)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- u.Run(ctx, func() bool { return true }) }()
		time.Sleep(defaultHealthy - 2*time.Second)
		synctest.Wait()
		if s, err := u.Status(); err != nil || !s.Trial {
			t.Errorf("blessed before its time: %+v, %v", s, err)
		}
		time.Sleep(4 * time.Second)
		synctest.Wait()
		if s, err := u.Status(); err != nil || s.Trial {
			t.Errorf("not blessed: %+v, %v", s, err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestLooksAgain has a server that is away at first: nobody waits a day for the next look, and nobody asks all the time.
func TestLooksAgain(t *testing.T) {
	key := newKey(t)
	synctest.Test(t, func(t *testing.T) {
		u := uefi(t, key, func(c *Config) { c.URL = "https://updates.example/m" })
		var asked atomic.Int32
		u.client.Transport = roundTripper(func(*http.Request) (*http.Response, error) {
			asked.Add(1)
			return nil, errors.New("unreachable")
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- u.Run(ctx, func() bool { return false }) }()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := asked.Load(); n < 3 {
			t.Errorf("asked %d times in ten minutes", n)
		}
		time.Sleep(10 * 24 * time.Hour)
		synctest.Wait()
		if n := asked.Load(); n > 30 {
			t.Errorf("asked %d times in ten days", n)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestLooksForUpdates has Run find one.
func TestLooksForUpdates(t *testing.T) {
	key, dir := newKey(t), t.TempDir()
	manifest := filepath.Base(publish(t, dir, "1.0.0", key, nil))
	srv := httptest.NewServer(http.FileServer(http.Dir(dir)))
	defer srv.Close()
	u := uefi(t, key, func(c *Config) { c.URL, c.Every = srv.URL+"/"+manifest, 20*time.Millisecond })
	done := make(chan error)
	go func() { done <- u.Run(t.Context(), func() bool { return false }) }()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		if s, err := u.Status(); err != nil || time.Now().After(end) {
			t.Fatal(err, s)
		} else if strings.Contains(s.Latest, "newest") {
			break
		}
	}
	// The image of 1.1.0 is in the same manifest's place now.
	b, err := os.ReadFile(publish(t, dir, "1.1.0", key, nil))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, manifest+".new"), b, 0o644)
	}
	if err == nil {
		err = os.Rename(filepath.Join(dir, manifest+".new"), filepath.Join(dir, manifest))
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, ErrInstalled) {
		t.Error(err)
	}
	if got := bootable(t, u); got != "1.1.0" {
		t.Errorf("%s is next", got)
	}
}
