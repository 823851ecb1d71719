package main

import (
	"bytes"
	"debug/pe"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"sallyway/internal/appliance/state"
	"sallyway/internal/appliance/update"
)

func TestArchive(t *testing.T) {
	a := &archive{epoch: 1700000000}
	a.device("dev/console", 5, 1, 0o600)
	a.file("/init", []byte("five!"), 0o755)
	a.folder("empty", 0o700)
	var b, again bytes.Buffer
	if err := a.writeTo(&b); err != nil {
		t.Fatal(err)
	}
	if err := a.writeTo(&again); err != nil || !bytes.Equal(b.Bytes(), again.Bytes()) {
		t.Error("the same archive gave other bytes")
	}
	var got []string
	for rest := b.Bytes(); ; {
		field := func(i int) (n uint32) {
			if _, err := fmt.Sscanf(string(rest[6+8*i:14+8*i]), "%x", &n); err != nil {
				t.Fatalf("field %d of %.110q: %v", i, rest, err)
			}
			return n
		}
		if string(rest[:6]) != "070701" || b.Len()%4 != 0 {
			t.Fatalf("no header: %.20q", rest)
		}
		name := string(rest[110 : 110+field(11)-1])
		if name == trailer {
			break
		}
		data := rest[up(110+field(11), 4):]
		got = append(got, fmt.Sprintf("%s %o %d:%d %d %d %q", name, field(1), field(9), field(10), field(4), field(5), data[:field(6)]))
		rest = data[up(field(6), 4):]
	}
	want := []string{
		`dev 40755 0:0 2 1700000000 ""`, `dev/console 20600 5:1 1 1700000000 ""`, `empty 40700 0:0 2 1700000000 ""`, `init 100755 0:0 1 1700000000 "five!"`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("the archive holds\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// stub is a PE file with one section, and room for n more in its headers.
func stub(n int) []byte {
	const headers, offset = 0x400, 0x80
	b := make([]byte, headers+0x200)
	le := binary.LittleEndian
	copy(b, "MZ")
	le.PutUint32(b[peOffset:], offset)
	copy(b[offset:], "PE\x00\x00")
	coff := b[offset+peHeader:]
	le.PutUint16(coff, 0x8664)
	le.PutUint16(coff[coffSections:], 1)
	le.PutUint32(coff[coffTime:], 12345)
	const optionalSize = 240
	le.PutUint16(coff[coffOptionalSize:], optionalSize)
	optional := coff[coffSize:]
	le.PutUint16(optional, 0x20b)
	le.PutUint32(optional[optionalAlign:], 0x1000)
	le.PutUint32(optional[optionalFileAlign:], 0x200)
	le.PutUint32(optional[optionalImageSize:], 0x2000)
	le.PutUint32(optional[optionalHeaders:], uint32(offset+peHeader+coffSize+optionalSize+(1+n)*sectionSize))
	le.PutUint32(optional[optionalChecksum:], 777)
	le.PutUint32(optional[108:], 16) // NumberOfRvaAndSizes
	s := optional[optionalSize:]
	copy(s, ".text")
	le.PutUint32(s[8:], 0x1234) // more in memory than in the file
	le.PutUint32(s[12:], 0x1000)
	le.PutUint32(s[16:], 0x200)
	le.PutUint32(s[20:], headers)
	return b
}

func TestAddSections(t *testing.T) {
	linux := bytes.Repeat([]byte("linux"), 1000)
	out, err := addSections(stub(2), []section{{".cmdline", []byte("quiet")}, {".linux", linux}})
	if err != nil {
		t.Fatal(err)
	}
	f, err := pe.NewFile(bytes.NewReader(out))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var got []string
	for _, s := range f.Sections {
		got = append(got, fmt.Sprintf("%s %#x %#x", s.Name, s.VirtualAddress, s.VirtualSize))
	}
	if want := []string{".text 0x1000 0x1234", ".cmdline 0x3000 0x5", ".linux 0x4000 0x1388"}; !slices.Equal(got, want) {
		t.Errorf("sections %q, want %q", got, want)
	}
	data, err := f.Section(".linux").Data()
	if err != nil || !bytes.HasPrefix(data, linux) {
		t.Errorf("the section holds %d bytes, %v", len(data), err)
	}
	h := f.OptionalHeader.(*pe.OptionalHeader64)
	if f.TimeDateStamp != 0 || h.CheckSum != 0 || h.SizeOfImage != 0x6000 {
		t.Errorf("time %d, checksum %d, size in memory %#x", f.TimeDateStamp, h.CheckSum, h.SizeOfImage)
	}

	for name, b := range map[string][]byte{
		"empty": nil, "text": bytes.Repeat([]byte("no"), 100), "cut off": stub(2)[:0x90], "no room": stub(1), "beyond": append([]byte("MZ"), bytes.Repeat([]byte{0xff}, 100)...),
	} {
		if _, err := addSections(b, []section{{".a", nil}, {".b", nil}}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzAddSections(f *testing.F) {
	f.Add(stub(2))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<16 {
			return
		}
		out, err := addSections(b, []section{{".a", []byte("x")}})
		if err == nil && len(out) <= len(b) {
			t.Errorf("%d bytes became %d", len(b), len(out))
		}
	})
}

// The appliance itself has to find its way about the disk.
func TestPartitionTable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	boot := bytes.Repeat([]byte{0x90}, 440)
	if err := f.Truncate(diskSize); err != nil {
		t.Fatal(err)
	}
	if err := partitionTable(f, boot); err != nil {
		t.Fatal(err)
	}
	table, err := state.ReadTable(f, diskSize, sectorSize)
	if err != nil {
		t.Fatal(err)
	}
	var used []state.Partition
	for _, p := range table.Partitions {
		if !p.Empty() {
			used = append(used, p)
		}
	}
	if len(used) != 1 || used[0].Name != state.BootLabel || used[0].Type.String() != "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" ||
		used[0].First != espStart/sectorSize || used[0].Last != (espStart+espSize)/sectorSize-1 || used[0].Attributes != legacyBootable {
		t.Errorf("partitions %+v", used)
	}
	var mbr [sectorSize]byte
	if _, err := f.ReadAt(mbr[:], 0); err != nil || !bytes.Equal(mbr[:440], boot) || mbr[510] != 0x55 || mbr[511] != 0xaa {
		t.Errorf("MBR %x, %v", mbr[440:], err)
	}
	if out, err := exec.Command("sfdisk", "--verify", path).CombinedOutput(); err != nil || !strings.Contains(string(out), "No errors detected") {
		t.Errorf("sfdisk: %v: %s", err, out)
	}
}

func writeTree(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestChoose(t *testing.T) {
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{
		"modules.dep": "kernel/virtio.ko: kernel/virtio_ring.ko\nkernel/virtio_ring.ko:\nkernel/net/virtio-net.ko: kernel/net/failover.ko kernel/virtio.ko kernel/virtio_ring.ko\n" +
			"kernel/net/failover.ko:\nkernel/net/other.ko:\nkernel/scsi/sd_mod.ko: kernel/net/failover.ko\n",
		"modules.builtin": "kernel/fs/ext4/ext4.ko\n",
		"modules.alias":   "# aliases\nalias virtio:d00000001v* virtio_net\nalias net-pf-1 failover\nalias pci:v1* other\nalias scsi:t-0x00* sd_mod\n",
	})
	k := kernel{release: "6", modules: dir}
	c, err := k.choose([]string{"virtio", "ext4"}, []string{"virtio_net", "sd_mod"})
	if err != nil {
		t.Fatal(err)
	}
	names := func(ms []module) (out []string) {
		for _, m := range ms {
			out = append(out, m.name)
		}
		return out
	}
	if got, want := [][]string{names(c.always), names(c.byDevice)}, [][]string{{"virtio_ring", "virtio"}, {"failover", "virtio_net", "sd_mod"}}; !reflect.DeepEqual(got, want) {
		t.Errorf("modules %q, want %q", got, want)
	}
	want := "alias virtio:d00000001v* virtio_net\nalias scsi:t-0x00* sd_mod\ndepends virtio_net failover\ndepends sd_mod failover\n"
	if c.aliases != want {
		t.Errorf("aliases\n%swant\n%s", c.aliases, want)
	}
	if _, err := k.choose([]string{"nonsense"}, nil); err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("a module that is not there: %v", err)
	}
}

// qemu-img draws numbers for two formats; what is left is the same each time, and a disk that it still can read.
func TestFormatsAreTheSameEachTime(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip("qemu-img is missing: build/prerequisites.sh image")
	}
	content := bytes.Repeat([]byte("sallyway"), 1<<16)
	build := func() map[string][]byte {
		b := &builder{work: t.TempDir(), name: "x", options: options{arch: "amd64"}, tell: func(string) {}}
		raw := filepath.Join(b.work, "disk.raw")
		if err := os.WriteFile(raw, content, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := b.qcow2(t.Context(), raw, "x.qcow2"); err != nil {
			t.Fatal(err)
		}
		files, err := b.formats(t.Context(), raw)
		if err != nil {
			t.Fatal(err)
		}
		out := map[string][]byte{}
		for _, name := range append(files, "x.qcow2") {
			data, err := os.ReadFile(filepath.Join(b.work, name))
			if err != nil {
				t.Fatal(err)
			}
			out[name] = data
			format := strings.TrimPrefix(filepath.Ext(name), ".")
			if format == "xz" {
				continue
			}
			if format == "vhd" {
				format = "vpc"
			}
			back := filepath.Join(b.work, "back")
			if text, err := exec.Command("qemu-img", "convert", "-f", format, "-O", "raw", filepath.Join(b.work, name), back).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v: %s", name, err, text)
			}
			if got, err := os.ReadFile(back); err != nil || !bytes.HasPrefix(got, content) {
				t.Errorf("%s: another content comes back, %v", name, err)
			}
		}
		return out
	}
	one, two := build(), build()
	if len(one) != 4 {
		t.Errorf("%d formats", len(one))
	}
	for name := range one {
		if !bytes.Equal(one[name], two[name]) {
			t.Errorf("%s is another one each time", name)
		}
	}
	// The number that qemu-img draws has as many digits as it needs.
	short := []byte(vmdkDescriptor + "\nCID=abc\nparentCID=ffffffff\n" + strings.Repeat("\x00", 100))
	long := []byte(vmdkDescriptor + "\nCID=12345678\nparentCID=ffffffff\n" + strings.Repeat("\x00", 95))
	if err := errors.Join(fixVMDK(short), fixVMDK(long)); err != nil || !bytes.Equal(short, long) || !bytes.Contains(long, []byte("parentCID=ffffffff\n\x00")) {
		t.Errorf("descriptors %q and %q, %v", short, long, err)
	}
	if fixVMDK([]byte("no descriptor")) == nil || fixVHD([]byte("short")) == nil || fixVHD(bytes.Repeat([]byte{1}, 4096)) == nil {
		t.Error("what is no disk of the format is no error")
	}
}

func TestOptions(t *testing.T) {
	good := options{arch: "amd64", init: "x", version: "1.2.3", epoch: fatEpoch}
	if err := good.check(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*options){
		"arch": func(o *options) { o.arch = "mips" }, "init": func(o *options) { o.init = "" }, "version": func(o *options) { o.version = "devel" },
		"leave the v out": func(o *options) { o.version = "v1.2.3" }, "epoch": func(o *options) { o.epoch = 0 },
	} {
		o := good
		change(&o)
		if err := o.check(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSign(t *testing.T) {
	dir := t.TempDir()
	private, public, err := update.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	writeTree(t, dir, map[string]string{"sallyway_1.2.3_amd64.efi": "an image", "other.efi": "x"})
	key := filepath.Join(dir, "key")
	if err := os.WriteFile(key, []byte(private+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := signCommand()
	cmd.SetArgs([]string{"--key", key, filepath.Join(dir, "sallyway_1.2.3_amd64.efi")})
	if err := cmd.Execute(); err != nil {
		t.Fatal(err)
	}
	signed, err := os.ReadFile(filepath.Join(dir, "sallyway_1.2.3_amd64.efi"+signature))
	if err != nil {
		t.Fatal(err)
	}
	keys, err := update.ParsePublicKeys([]string{public})
	if err != nil {
		t.Fatal(err)
	}
	m, err := update.Open(signed, keys)
	if err != nil || m.Version != "1.2.3" || m.Arch != "amd64" || m.Size != int64(len("an image")) {
		t.Errorf("manifest %+v, %v", m, err)
	}
	if err := sign(filepath.Join(dir, "other.efi"), nil); err == nil {
		t.Error("an image without a version in its name was signed")
	}
}
