package appliance

import (
	"bytes"
	"crypto/ed25519"
	"debug/pe"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/appliance/console"
	"sallyway/internal/appliance/update"
	"sallyway/internal/lab"
)

// Seconds of an emulated processor until a gateway works. They are reported, and not asserted: a busy machine makes a processor slower, too.
const (
	directBar = 15
	uefiBar   = 30
)

func TestImage(t *testing.T) {
	w := newWorld(t)
	w.sizes(t)
	t.Run("boots", func(t *testing.T) {
		t.Run("direct", w.testDirect)
		t.Run("bios", w.testBIOS)
		t.Run("uefi", w.testUEFI)
		t.Run("unconfigured", w.testUnconfigured)
		t.Run("twice", w.testBuiltTwice)
	})
	w.report.write(t, w.image.dir)
}

// sizes holds the disks to what they may have.
func (w *world) sizes(t *testing.T) {
	for suffix, most := range map[string]int64{".qcow2": 25e6, "-hybrid.qcow2": 45e6, ".efi": 0, ".initrd": 0, ".vmlinuz": 0} {
		fi, err := os.Stat(w.image.file(suffix))
		check(t, err)
		w.report.add("%-22s %5.1f MB", "file *"+suffix, float64(fi.Size())/1e6)
		if most > 0 && fi.Size() > most {
			t.Errorf("%s has %d bytes, more than %d", fi.Name(), fi.Size(), most)
		}
	}
}

// testBuiltTwice: the same sources and packages give the same bytes. The command is that of `make image-test`, without its --out.
func (w *world) testBuiltTwice(t *testing.T) {
	t.Parallel()
	command := os.Getenv("SALLYWAY_IMAGE_COMMAND")
	if command == "" {
		if os.Getenv("CI") != "" {
			t.Fatal("SALLYWAY_IMAGE_COMMAND is not set: run make image-test")
		}
		t.Skip("run make image-test: it says how the image was built")
	}
	root, err := lab.SourceRoot()
	check(t, err)
	dir := t.TempDir()
	cmd := exec.Command("sh", "-c", command+` --out "$0"`, dir)
	cmd.Dir = root
	began := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	w.report.add("%-22s %5.1f s of processor, %.1f s on the clock", "built again in", (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds(), time.Since(began).Seconds())
	again := image{dir: dir, name: w.image.name}
	for _, suffix := range []string{".json", ".vmlinuz", ".initrd", ".efi", ".qcow2", "-hybrid.qcow2"} {
		one, err := os.ReadFile(w.image.file(suffix))
		check(t, err)
		two, err := os.ReadFile(again.file(suffix))
		check(t, err)
		if !bytes.Equal(one, two) {
			t.Errorf("%s is another one the second time", w.image.name+suffix)
		}
	}
}

// testDirect: kernel and initramfs from the emulator, the seed that the command line wrote in a SATA CD drive, no disk.
func (w *world) testDirect(t *testing.T) {
	t.Parallel()
	iso := filepath.Join(t.TempDir(), "seed.iso")
	made := w.gateway(t, "direct", "--appliance-iso", iso)
	began := time.Now()
	m := w.start(t, w.Gateway, "direct", slices.Concat(w.image.direct(), cd(iso))...)
	r := m.ready(t, 0)
	w.spent(t, m, "direct", time.Since(began), directBar)
	w.report.add("%-22s %5.0f MB in use, of %d MiB", "memory of a gateway", float64(r.MemoryBytes)/1e6, memory)
	if r.Role != "gateway" || r.Name != "direct" || !strings.HasPrefix(r.Config, "nocloud") || r.State != "memory" || !slices.Contains(r.Addresses, "10.0.2.15") {
		t.Errorf("ready: %+v", r)
	}
	w.healthy(t, "direct")
	m.sound(t, made.Token)
}

// testBIOS: syslinux, a static address, and two power cuts: while the node writes what it has just been given, and while it works.
func (w *world) testBIOS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	iso, d := filepath.Join(dir, "seed.iso"), filepath.Join(dir, "disk.qcow2")
	copyFile(t, d, w.image.file("-hybrid.qcow2"))
	made := w.gateway(t, "bios", "--appliance-iso", iso, "--appliance-address", "10.0.2.77/24", "--appliance-router", "10.0.2.2", "--appliance-dns", "10.0.2.3")
	m := w.start(t, w.Gateway, "bios", slices.Concat(disk(d, "qcow2"), cd(iso))...)
	again := func(args ...string) console.Ready {
		m.Kill()
		mark, began := m.Log.Mark(), time.Now()
		m.Args = append(w.qemu(), args...)
		check(t, m.Start())
		r := m.ready(t, mark)
		w.spent(t, m, "BIOS, after power cut", time.Since(began), 0)
		if r.Name != "bios" || r.State == "memory" || r.State == "" || !slices.Contains(r.Addresses, "10.0.2.77") {
			t.Errorf("ready after a power cut: %+v", r)
		}
		return r
	}

	// The platform has taken the key and the token is spent: from now on the node may not be lost.
	ctx := within(t, patience)
	check(t, lab.Until(ctx, 100*time.Millisecond, func() error {
		r, err := w.record(ctx, "bios")
		if err == nil && r.Enrolled == nil {
			err = fmt.Errorf("bios is %s", r.State)
		}
		return err
	}))
	first, err := w.record(ctx, "bios")
	check(t, err)
	again(slices.Concat(disk(d, "qcow2"), cd(iso))...)
	// And without the seed, which is not needed any more.
	if r := again(disk(d, "qcow2")...); !strings.HasPrefix(r.Config, "state") {
		t.Errorf("without its seed it is configured by %s", r.Config)
	}
	last := w.healthy(t, "bios")
	if first.Key == nil || last.Key == nil || *first.Key != *last.Key || first.ID != last.ID {
		t.Errorf("the node was %v with key %v, and is %v with key %v", first.ID, first.Key, last.ID, last.Key)
	}
	m.sound(t, made.Token)
}

// broken makes of an image one with a newer version whose kernel starts and then finds no process 1, since its initramfs is damaged. Only what has
// the same length is replaced.
func broken(t *testing.T, b []byte, version string) (_ []byte, newer string) {
	t.Helper()
	last := version[len(version)-1]
	if last < '0' || last > '8' {
		t.Fatalf("version %s: this test needs one that can be counted up by its last digit", version)
	}
	newer = version[:len(version)-1] + string(last+1)
	replace := func(old, with string) {
		if len(old) != len(with) || bytes.Count(b, []byte(old)) == 0 {
			t.Fatalf("the image does not hold %q, or %q is of another length", old, with)
		}
		b = bytes.ReplaceAll(b, []byte(old), []byte(with))
	}
	replace("VERSION_ID="+version+"\n", "VERSION_ID="+newer+"\n")
	replace("IMAGE_VERSION="+version+"\n", "IMAGE_VERSION="+newer+"\n")
	replace("PRETTY_NAME=\"Sallyway "+version+"\"", "PRETTY_NAME=\"Sallyway "+newer+"\"")
	replace(update.Parameter+version, update.Parameter+newer)
	replace("quiet panic=5", "quiet panic=1")
	f, err := pe.NewFile(bytes.NewReader(b))
	check(t, err)
	defer f.Close()
	initrd := f.Section(".initrd")
	if initrd == nil {
		t.Fatal("the image has no initramfs")
	}
	clear(b[initrd.Offset : initrd.Offset+64])
	return b, newer
}

// testUEFI: systemd-boot, the configuration from SMBIOS, and an update that does not start: after its tries the image before is back.
func (w *world) testUEFI(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	d := filepath.Join(dir, "disk.raw")
	raw(t, d, w.image.file(".qcow2"))
	url, key, newer, publish := w.serveBroken(t, dir)
	made := w.gateway(t, "uefi")
	config := fmt.Sprintf("role: gateway\ntoken: %s\nupdate: {url: %s, every: 10s, keys: [%s]}\n", made.Token, url, key)
	smbios := "type=11,value=io.systemd.credential.binary:sallyway.config=" + base64.StdEncoding.EncodeToString([]byte(config))
	began := time.Now()
	m := w.start(t, w.Gateway, "uefi", slices.Concat(ovmf(t, dir), disk(d, "raw"), []string{"-smbios", smbios})...)
	r := m.ready(t, 0)
	w.spent(t, m, "UEFI", time.Since(began), uefiBar)
	if !strings.HasPrefix(r.Config, "smbios") || r.Version != "v"+w.image.version || r.State == "memory" {
		t.Errorf("ready: %+v", r)
	}
	w.healthy(t, "uefi")
	mark := m.Log.Mark()
	publish()
	check(t, m.WaitReady(within(t, patience), mark, newer+".*waits for a restart"))
	fallen := time.Now()
	check(t, m.WaitReady(within(t, patience), mark, "Sallyway v"+w.image.version+" starts"))
	r = m.ready(t, mark)
	w.report.add("%-22s %5.1f s on the clock, three starts of a broken image between", "UEFI, rolled back in", time.Since(fallen).Seconds())
	if r.Version != "v"+w.image.version || !strings.HasPrefix(r.Config, "smbios") {
		t.Errorf("ready after the broken update: %+v", r)
	}
	if n := len(m.Log.Since(0, "Kernel panic")); n != 3 {
		t.Errorf("the broken image was started %d times, want 3", n)
	}
	w.healthy(t, "uefi")
	m.Kill()
	m.discreet(t, made.Token)

	out, err := exec.Command("mdir", "-b", "-i", d+"@@1M", "::/EFI/Linux").CombinedOutput()
	if err != nil {
		t.Fatalf("mdir: %v: %s", err, out)
	}
	for _, name := range []string{"sallyway_" + w.image.version + ".efi", "sallyway_" + newer + "+0-3.efi"} {
		if !strings.Contains(string(out), name) {
			t.Errorf("the boot partition holds\n%s\nand not %s", out, name)
		}
	}
}

// serveBroken signs a broken update and serves it in the private network once publish is called. It returns the manifest's URL, the public key,
// and its version.
func (w *world) serveBroken(t *testing.T, dir string) (url, key, version string, publish func()) {
	t.Helper()
	b, err := os.ReadFile(w.image.file(".efi"))
	check(t, err)
	b, version = broken(t, b, w.image.version)
	name := "sallyway_" + version + "_amd64.efi"
	check(t, os.WriteFile(filepath.Join(dir, name), b, 0o644))
	v, err := update.ParseVersion(version)
	check(t, err)
	man, err := update.Describe(filepath.Join(dir, name), v, "amd64")
	check(t, err)
	verifier, private, err := ed25519.GenerateKey(nil)
	check(t, err)
	signed, err := update.Sign(man, private)
	check(t, err)
	ln, err := w.Private.Listen(netip.AddrPortFrom(lab.WebAddr, 8088).String())
	check(t, err)
	var public atomic.Bool
	mux := http.NewServeMux()
	mux.HandleFunc("GET /appliance.sig", func(w http.ResponseWriter, r *http.Request) {
		if !public.Load() {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write(signed) // the client has gone
	})
	mux.HandleFunc("GET /"+name, func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, filepath.Join(dir, name)) })
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	go func() { _ = srv.Serve(ln) }() // ends with its listener
	t.Cleanup(func() { _ = srv.Close() })
	return "http://" + ln.Addr().String() + "/appliance.sig", base64.StdEncoding.EncodeToString(verifier), version, func() { public.Store(true) }
}

// mac is that of the second network card, and linkLocal the address that follows from it.
const (
	mac       = "52:54:00:aa:bb:cc"
	linkLocal = "fe80::5054:ff:feaa:bbcc"
)

// closedFor is how long a port has to stay silent.
const closedFor = 5 * time.Second

// testUnconfigured: without any configuration nothing answers but ping, and the console says what to do.
func (w *world) testUnconfigured(t *testing.T) {
	t.Parallel()
	m := w.start(t, w.Peer, "unconfigured", slices.Concat(w.image.direct(),
		[]string{"-netdev", "tap,id=lan,ifname=vm0,script=no,downscript=no", "-device", "virtio-net-pci,netdev=lan,romfile=,mac=" + mac})...)
	ctx := within(t, patience)
	check(t, lab.Until(ctx, 100*time.Millisecond, func() error { return second(w.Peer.Run(ctx, "ip", "link", "set", "vm0", "up")) }))
	began := time.Now()
	var u console.Unconfigured
	m.document(t, 0, console.UnconfiguredLine, &u)
	w.spent(t, m, "direct, unconfigured", time.Since(began), 0)
	if !slices.Contains(u.MAC, mac) || !slices.Contains(u.Addresses, "10.0.2.15") {
		t.Errorf("unconfigured: %+v", u)
	}
	check(t, second(m.Log.Wait(ctx, 0, `sallyway gateway create NAME --appliance-iso`)))

	ping := func() error {
		return second(w.Peer.Run(ctx, "ping", "-6", "-c", "1", "-W", "5", linkLocal+"%vm0"))
	}
	check(t, lab.Until(ctx, time.Second, ping))
	index, err := w.Peer.Run(ctx, "cat", "/sys/class/net/vm0/ifindex")
	check(t, err)
	if open := w.openPorts(t, linkLocal+"%"+strings.TrimSpace(index.Stdout)); len(open) > 0 {
		t.Errorf("ports that answer: %v", open)
	}
	check(t, lab.Until(ctx, time.Second, ping)) // it was there all the time
	m.sound(t)
}

// openPorts tries the ports that daemons of any kind use. One that refuses counts, too: it should be silent.
func (w *world) openPorts(t *testing.T, host string) []string {
	t.Helper()
	ports := []int{2222, 3478, 5349, 8080, 8443, 9090, 9469, 9470, 9471, 49152}
	for p := 1; p <= 1024; p++ {
		ports = append(ports, p)
	}
	var mu sync.Mutex
	var open []string
	var wg sync.WaitGroup
	limit := make(chan struct{}, 256)
	for _, p := range ports {
		wg.Go(func() {
			limit <- struct{}{}
			defer func() { <-limit }()
			c, err := w.dialShortly(t, net.JoinHostPort(host, fmt.Sprint(p)))
			var timeout net.Error
			if err == nil {
				_ = c.Close() // nothing was written
			} else if asNetError(err, &timeout) && timeout.Timeout() {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			open = append(open, fmt.Sprintf("%d (%v)", p, err))
		})
	}
	wg.Wait()
	return open
}
