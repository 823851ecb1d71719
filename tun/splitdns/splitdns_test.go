package splitdns

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const original = "# by hand\nsearch example.org\nnameserver 10.0.0.53\nnameserver 10.0.0.54\noptions rotate timeout:2\n"

var ours = []netip.Addr{netip.MustParseAddr("100.112.0.1")}

// host is a host in a folder: resolv.conf, a state folder, and the names of /proc and /run.
type host struct {
	t    *testing.T
	dir  string
	conf string
	runs []string // commands run
}

func newHost(t *testing.T, content string) *host {
	h := &host{t: t, dir: t.TempDir()}
	h.conf = filepath.Join(h.dir, "etc/resolv.conf")
	for _, d := range []string{"etc", "state", "proc/1/ns", "proc/thread-self/ns", "proc/1/root"} {
		if err := os.MkdirAll(filepath.Join(h.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	h.link("proc/1/ns/net", "net:[1]")
	h.link("proc/thread-self/ns/net", "net:[1]")
	if content != "" {
		h.write(content)
	}
	return h
}

func (h *host) link(name, target string) {
	h.t.Helper()
	p := filepath.Join(h.dir, name)
	os.Remove(p)
	if err := os.Symlink(target, p); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) write(content string) {
	h.t.Helper()
	if err := os.WriteFile(h.conf, []byte(content), 0o644); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) read() string {
	h.t.Helper()
	b, err := os.ReadFile(h.conf)
	if errors.Is(err, fs.ErrNotExist) {
		return "(none)"
	}
	if err != nil {
		h.t.Fatal(err)
	}
	return string(b)
}

func (h *host) new() *DNS {
	h.t.Helper()
	d, err := New(Config{
		Interface: "sally0", StateDir: filepath.Join(h.dir, "state"), ResolvConf: h.conf, root: h.dir,
		Run: func(name string, args ...string) ([]byte, error) {
			h.runs = append(h.runs, strings.Join(append([]string{name}, args...), " "))
			return nil, nil
		},
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return d
}

func (h *host) wantUndone(content string) {
	h.t.Helper()
	if got := h.read(); got != content {
		h.t.Errorf("resolv.conf is %q, want %q", got, content)
	}
	for _, d := range []string{"state", "etc"} {
		es, err := os.ReadDir(filepath.Join(h.dir, d))
		if err != nil {
			h.t.Fatal(err)
		}
		for _, e := range es {
			if e.Name() != "resolv.conf" {
				h.t.Errorf("%s/%s is left", d, e.Name())
			}
		}
	}
}

func set(t *testing.T, d *DNS) {
	t.Helper()
	if err := d.Set(ours, []string{"corp.example.org", "acme.sallyway.internal."}); err != nil {
		t.Fatal(err)
	}
}

func TestResolvConf(t *testing.T) {
	h := newHost(t, original)
	d := h.new()
	if m, why := d.Mode(); m != ResolvConf {
		t.Fatal(m, why)
	}
	up := []netip.Addr{netip.MustParseAddr("10.0.0.53"), netip.MustParseAddr("10.0.0.54")}
	if got := d.Upstreams(); !slices.Equal(got, up) {
		t.Error("before:", got)
	}
	for range 2 {
		set(t, d)
		got := h.read()
		if ns := nameservers([]byte(got)); !slices.Equal(ns, append(slices.Clone(ours), up...)) {
			t.Errorf("nameservers %v in %q", ns, got)
		}
		if !strings.Contains(got, "search example.org\n") || !strings.Contains(got, "options timeout:2\n") || strings.Contains(got, "rotate") {
			t.Errorf("%q", got)
		}
		if got := d.Upstreams(); !slices.Equal(got, up) {
			t.Error("during:", got)
		}
	}
	if err := d.Set([]netip.Addr{netip.MustParseAddr("100.112.0.2")}, []string{"x"}); err != nil {
		t.Fatal(err)
	}
	if ns := nameservers([]byte(h.read())); len(ns) != 3 || ns[0] != netip.MustParseAddr("100.112.0.2") {
		t.Error("another server:", ns)
	}
	for range 2 {
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	h.wantUndone(original)
	if len(h.runs) > 0 {
		t.Error("ran", h.runs)
	}
}

func TestUndoAfterCrash(t *testing.T) {
	journal := func(h *host) string { return filepath.Join(h.dir, "state", journalName) }
	for name, c := range map[string]struct {
		before string // "" is no file
		crash  func(h *host)
		want   string
	}{
		"after the edit":   {original, func(*host) {}, original},
		"there was none":   {"", func(*host) {}, "(none)"},
		"before the edit":  {original, func(h *host) { h.write(original) }, original},
		"torn edit":        {original, func(h *host) { h.write(h.read()[:40]) }, original},
		"torn to nothing":  {original, func(h *host) { h.write("") }, original},
		"torn undo":        {original, func(h *host) { h.write(original[:20]) }, original},
		"written by dhcp":  {original, func(h *host) { h.write("nameserver 10.1.1.1\n") }, "nameserver 10.1.1.1\n"},
		"edited around us": {original, func(h *host) { h.write(h.read() + "nameserver 10.1.1.1\n") }, strings.Replace(original, " rotate", "", 1) + "nameserver 10.1.1.1\n"},
		"file removed":     {original, func(h *host) { os.Remove(h.conf) }, "(none)"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, c.before)
			set(t, h.new())
			c.crash(h)
			if _, err := os.Stat(journal(h)); err != nil {
				t.Fatal("no journal:", err)
			}
			h.new() // the next start
			h.wantUndone(c.want)
		})
	}
	t.Run("a symbolic link", func(t *testing.T) {
		h := newHost(t, "")
		real := filepath.Join(h.dir, "real.conf")
		os.WriteFile(real, []byte(original), 0o644)
		if err := os.Symlink("../real.conf", h.conf); err != nil {
			t.Fatal(err)
		}
		set(t, h.new())
		if b, _ := os.ReadFile(real); string(b) != original {
			t.Errorf("the file behind the link was written: %q", b)
		}
		h.new()
		h.wantUndone(original)
		if l, err := os.Readlink(h.conf); l != "../real.conf" || err != nil {
			t.Error(l, err)
		}
	})
	t.Run("a broken journal is said and kept", func(t *testing.T) {
		h := newHost(t, original)
		os.WriteFile(journal(h), []byte("{"), 0o600)
		_, err := New(Config{Interface: "sally0", StateDir: filepath.Join(h.dir, "state"), ResolvConf: h.conf, root: h.dir})
		if err == nil || !strings.Contains(err.Error(), journal(h)) || h.read() != original {
			t.Error(err)
		}
	})
}

func TestRewrittenWhileActive(t *testing.T) {
	h := newHost(t, original)
	d := h.new()
	set(t, d)
	h.write("nameserver 10.1.1.1\n") // a DHCP client
	set(t, d)
	if ns := nameservers([]byte(h.read())); len(ns) != 2 || ns[0] != ours[0] {
		t.Error(ns)
	}
	if up := d.Upstreams(); len(up) != 1 || up[0] != netip.MustParseAddr("10.1.1.1") {
		t.Error(up)
	}
	d.Close()
	h.wantUndone("nameserver 10.1.1.1\n")
}

// TestTwoDaemons: each keeps to its own lines, the later one is first, neither forwards in a circle, and whatever the order
// of their ends, the original is what is left.
func TestTwoDaemons(t *testing.T) {
	for _, ends := range [][]int{{0, 1}, {1, 0}} {
		h := newHost(t, strings.Replace(original, " rotate", "", 1))
		var ds [2]*DNS
		servers := [2][]netip.Addr{{netip.MustParseAddr("100.112.0.1")}, {netip.MustParseAddr("100.96.0.1")}}
		configs := [2]Config{}
		for i := range ds {
			state := filepath.Join(h.dir, "state", string(rune('a'+i)))
			os.Mkdir(state, 0o755)
			configs[i] = Config{Interface: "sally" + string(rune('0'+i)), StateDir: state, ResolvConf: h.conf, root: h.dir}
			var err error
			if ds[i], err = New(configs[i]); err != nil {
				t.Fatal(err)
			}
		}
		var first string
		for range 3 {
			for i := range ds {
				if err := ds[i].Set(servers[i], []string{"x.example"}); err != nil {
					t.Fatal(err)
				}
			}
			if first == "" {
				first = h.read()
			}
		}
		if h.read() != first {
			t.Errorf("they fight: %q, then %q", first, h.read())
		}
		ns := nameservers([]byte(first))
		if len(ns) != 4 || ns[0] != servers[1][0] || ns[1] != servers[0][0] {
			t.Error(ns)
		}
		if up := ds[0].Upstreams(); !slices.Equal(up, ns[2:]) {
			t.Error("of the first:", up)
		}
		if up := ds[1].Upstreams(); !slices.Equal(up, ns[1:]) {
			t.Error("of the second:", up)
		}
		for n, i := range ends {
			if n == 0 {
				if err := ds[i].Close(); err != nil {
					t.Fatal(err)
				}
				// The one that is left goes on.
				if err := ds[1-i].Set(servers[1-i], []string{"x.example"}); err != nil {
					t.Fatal(err)
				}
				if up := ds[1-i].Upstreams(); !slices.Equal(up, ns[2:]) {
					t.Error("of the one that is left:", up)
				}
			} else if _, err := New(configs[i]); err != nil { // after a crash
				t.Fatal(err)
			}
		}
		if got := h.read(); got != strings.Replace(original, " rotate", "", 1) {
			t.Errorf("left: %q", got)
		}
	}
}

func TestResolved(t *testing.T) {
	h := newHost(t, "nameserver 127.0.0.53\n")
	os.MkdirAll(filepath.Join(h.dir, "run/systemd/resolve"), 0o755)
	os.WriteFile(filepath.Join(h.dir, "run/systemd/resolve/resolv.conf"), []byte("nameserver 10.0.0.53\n"), 0o644)
	d := h.new()
	if m, why := d.Mode(); m != Resolved {
		t.Fatal(m, why)
	}
	if up := d.Upstreams(); len(up) != 1 || up[0] != netip.MustParseAddr("10.0.0.53") {
		t.Error(up)
	}
	set(t, d)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"resolvectl status sally0",
		"resolvectl default-route sally0 false",
		"resolvectl domain sally0 ~acme.sallyway.internal ~corp.example.org",
		"resolvectl dns sally0 100.112.0.1",
		"resolvectl revert sally0",
	}
	if !slices.Equal(h.runs, want) {
		t.Errorf("ran %q", h.runs)
	}
	h.wantUndone("nameserver 127.0.0.53\n")
}

// TestResolvedNotUsed: the folder is there, but programs do not ask it, or it does not answer, or it is another namespace's.
func TestResolvedNotUsed(t *testing.T) {
	for name, c := range map[string]struct {
		conf string
		ns   string
		err  error
	}{
		"resolv.conf leads elsewhere": {original, "net:[1]", nil},
		"resolvectl fails":            {"nameserver 127.0.0.53\n", "net:[1]", errors.New("no bus")},
		"another namespace":           {"nameserver 127.0.0.53\n", "net:[2]", nil},
	} {
		h := newHost(t, c.conf)
		h.link("proc/thread-self/ns/net", c.ns)
		os.MkdirAll(filepath.Join(h.dir, "run/systemd/resolve"), 0o755)
		d, err := New(Config{
			Interface: "sally0", StateDir: filepath.Join(h.dir, "state"), ResolvConf: h.conf, root: h.dir,
			Run: func(string, ...string) ([]byte, error) { return nil, c.err },
		})
		if err != nil {
			t.Fatal(err)
		}
		if m, why := d.Mode(); m != ResolvConf {
			t.Error(name, m, why)
		}
	}
}

func TestSharedResolvConfIsLeftAlone(t *testing.T) {
	h := newHost(t, original)
	h.link("proc/thread-self/ns/net", "net:[2]")
	// What process 1 sees under the same name is the same file.
	seen := filepath.Join(h.dir, "proc/1/root", h.conf)
	if err := os.MkdirAll(filepath.Dir(seen), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(h.conf, seen); err != nil {
		t.Fatal(err)
	}
	d := h.new()
	if m, why := d.Mode(); m != Off || !strings.Contains(why, "/etc/netns") {
		t.Error(m, why)
	}
	set(t, d)
	d.Close()
	if h.read() != original {
		t.Errorf("resolv.conf of the host was changed: %q", h.read())
	}
	h.wantUndone(original)
}

// TestForeignNamespace: who tells the host's namespace, when process 1 does not.
func TestForeignNamespace(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]string // under proc; links where they begin with net:
		want  bool
	}{
		"process 1, the same":           {map[string]string{"1/ns/net": "net:[2]"}, false},
		"process 1, another":            {map[string]string{"1/ns/net": "net:[1]"}, true},
		"kernel thread, the same":       {map[string]string{"2/ns/net": "net:[2]", "2/comm": "kthreadd\n"}, false},
		"kernel thread, another":        {map[string]string{"2/ns/net": "net:[1]", "2/comm": "kthreadd\n"}, true},
		"process 2 is no kernel thread": {map[string]string{"2/ns/net": "net:[1]", "2/comm": "sh\n"}, false},
		"an ancestor outside":           {map[string]string{"thread-self/status": "PPid:\t7\n", "7/ns/net": "net:[2]", "7/status": "PPid:\t6\n", "6/ns/net": "net:[1]"}, true},
		"all ancestors here":            {map[string]string{"thread-self/status": "PPid:\t7\n", "7/ns/net": "net:[2]", "7/status": "PPid:\t1\n"}, false},
		"nothing to see":                {nil, false},
	} {
		dir := t.TempDir()
		for n, content := range map[string]string{"thread-self/ns/net": "net:[2]"} {
			put(t, filepath.Join(dir, "proc", n), content)
		}
		for n, content := range c.files {
			put(t, filepath.Join(dir, "proc", n), content)
		}
		if got := foreignNamespace(dir); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func put(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	var err error
	if strings.HasPrefix(content, "net:") {
		err = os.Symlink(content, path)
	} else {
		err = os.WriteFile(path, []byte(content), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestSetRefuses(t *testing.T) {
	h := newHost(t, original)
	d := h.new()
	for _, n := range []string{"", ".", "~.", "~", "a..b", "-a.b", "a b", "a\nnameserver 6.6.6.6", strings.Repeat("a", 64), strings.Repeat("a.", 130)} {
		if err := d.Set(ours, []string{"good.example", n}); err == nil {
			t.Errorf("domain %q was taken", n)
		}
	}
	for _, a := range []netip.Addr{{}, netip.IPv4Unspecified(), netip.MustParseAddr("224.0.0.1"), netip.MustParseAddr("fe80::1%eth0")} {
		if err := d.Set([]netip.Addr{a}, []string{"good.example"}); err == nil {
			t.Errorf("server %v was taken", a)
		}
	}
	h.wantUndone(original)
	set(t, d)
	if err := d.Set(nil, nil); err != nil {
		t.Error(err)
	}
	h.wantUndone(original)
}

func FuzzEdit(f *testing.F) {
	f.Add([]byte(original))
	f.Add([]byte("options rotate"))
	f.Add([]byte("nameserver"))
	f.Add([]byte("options rotate\r\noptions  rotate ndots:1"))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = withoutOurs(b, Mark+"sally0")
		e := edit(b, ours, Mark+"sally0")
		ns := nameservers(e)
		if len(ns) == 0 || ns[0] != ours[0] || !slices.Equal(ns[1:], nameservers(b)) {
			t.Errorf("%q → %q: nameservers %v", b, e, ns)
		}
		if _, ok := inForce(e, ours, Mark+"sally0"); !ok {
			t.Errorf("%q → %q is not in force", b, e)
		}
		if !slices.Equal(nameservers(withoutOurs(e, Mark+"sally0")), nameservers(withoutOurs(b, Mark+"sally0"))) {
			t.Errorf("%q → %q → %q", b, e, withoutOurs(e, Mark+"sally0"))
		}
	})
}
