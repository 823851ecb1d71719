package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// flavour is the kernel's package without its version. Debian's usual kernel for amd64 is packed more tightly than its cloud kernel, and knows the
// CD drives and network cards that hypervisors offer unless they are told otherwise: SATA, e1000.
var flavour = map[string]string{"amd64": "linux-image-amd64", "arm64": "linux-image-cloud-arm64"}

// always are modules that every machine loads at start. What is built into a kernel may be named all the same.
var always = []string{
	"crc32c_generic",            // by its algorithm, which no dependency names
	"virtio_pci", "virtio_mmio", // buses of devices
	"qemu_fw_cfg",                                                 // a source of configuration
	"ext4", "isofs", "vfat", "nls_ascii", "nls_cp437", "nls_utf8", // state partition, seeds, boot partition
	"tun", "nf_tables", "nft_ct", "nft_limit",
	"softdog", "efivarfs",
	"button", "evdev", // the power button
	"sch_fq", "tcp_bbr",
}

// byDevice are modules that a machine loads when it has a device for them.
var byDevice = map[string][]string{
	"amd64": {
		"virtio_net", "virtio_blk", "virtio_scsi", "virtio_rng", "virtio_console", "virtio_balloon", // KVM, Google
		"sd_mod", "sr_mod", "ata_piix", "ahci", "nvme", "crc32c_intel",
		"e1000", "e1000e", "8139cp", "igb", "ixgbevf", // what is emulated, and what is passed through
		"ena", "gve", // Amazon, Google
		"hv_vmbus", "hv_netvsc", "hv_storvsc", "hv_utils", "hyperv_keyboard", "pci_hyperv", "mana", // Hyper-V, Azure
		"vmxnet3", "vmw_pvscsi", "mptspi", "mptsas", // VMware
		"xen_netfront", "xen_blkfront",
	},
	"arm64": {
		"virtio_net", "virtio_blk", "virtio_scsi", "virtio_rng", "virtio_console", "virtio_balloon",
		"sd_mod", "sr_mod", "nvme", "ena", "gve", "hv_vmbus", "hv_netvsc", "hv_storvsc", "hv_utils", "pci_hyperv", "mana",
	},
}

// kernel is an unpacked kernel.
type kernel struct {
	release string // 6.1.0-1-cloud-amd64
	image   string // its file
	modules string // folder of its modules
}

// module is a module of the kernel: its name, with underscores, its file below the folder of modules, and what it needs loaded before, in order.
type module struct {
	name, path string
	needs      []string
}

func (b *builder) findKernel(ctx context.Context) (kernel, error) {
	found, err := filepath.Glob(filepath.Join(b.root, "boot", "vmlinuz-*"))
	if err != nil || len(found) != 1 {
		return kernel{}, fmt.Errorf("the kernel's package holds %d kernels", len(found))
	}
	k := kernel{image: found[0], release: strings.TrimPrefix(filepath.Base(found[0]), "vmlinuz-")}
	k.modules = filepath.Join(b.root, "lib/modules", k.release)
	_, err = run(ctx, b.work, "depmod", "-b", b.root, k.release)
	return k, err
}

// underscored is a module's name as the kernel and modules.alias write it.
func underscored(file string) string {
	name, _, _ := strings.Cut(filepath.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// index reads modules.dep: the modules by name.
func (k kernel) index() (map[string]module, error) {
	text, err := os.ReadFile(filepath.Join(k.modules, "modules.dep"))
	if err != nil {
		return nil, err
	}
	all := make(map[string]module)
	for line := range strings.Lines(string(text)) {
		path, deps, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok {
			continue
		}
		m := module{name: underscored(path), path: path}
		for _, d := range strings.Fields(deps) {
			m.needs = append(m.needs, underscored(d))
		}
		slices.Reverse(m.needs) // modules.dep(5): the last is to be loaded first
		all[m.name] = m
	}
	return all, nil
}

// builtin are names of modules that are parts of the kernel.
func (k kernel) builtin() (map[string]bool, error) {
	text, err := os.ReadFile(filepath.Join(k.modules, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	in := make(map[string]bool)
	for line := range strings.Lines(string(text)) {
		in[underscored(strings.TrimSpace(line))] = true
	}
	return in, nil
}

// choice is what of the modules goes into the image, each in an order in which every module comes after those that it needs.
type choice struct {
	always, byDevice []module
	aliases          string
}

func (k kernel) choose(first, later []string) (choice, error) {
	all, err := k.index()
	if err != nil {
		return choice{}, err
	}
	in, err := k.builtin()
	if err != nil {
		return choice{}, err
	}
	var c choice
	taken := make(map[string]bool)
	var missing []string
	take := func(to *[]module, names []string) {
		for _, name := range names {
			m, ok := all[name]
			if !ok {
				if !in[name] {
					missing = append(missing, name)
				}
				continue
			}
			for _, n := range append(slices.Clone(m.needs), name) {
				if !taken[n] {
					taken[n] = true
					*to = append(*to, all[n])
				}
			}
		}
	}
	take(&c.always, first)
	take(&c.byDevice, later)
	if len(missing) > 0 {
		return c, fmt.Errorf("no module %s in Linux %s", strings.Join(missing, ", "), k.release)
	}
	c.aliases, err = k.aliases(c.byDevice)
	return c, err
}

// aliases returns which devices the modules are for, and what they need of each other.
func (k kernel) aliases(modules []module) (string, error) {
	text, err := os.ReadFile(filepath.Join(k.modules, "modules.alias"))
	if err != nil {
		return "", err
	}
	here := make(map[string]bool)
	for _, m := range modules {
		here[m.name] = true
	}
	var out bytes.Buffer
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == "alias" && here[f[2]] && strings.Contains(f[1], ":") {
			out.WriteString(line)
		}
	}
	if out.Len() == 0 && len(modules) > 0 {
		return "", errors.New("no module is for any device")
	}
	for _, m := range modules {
		needs := slices.DeleteFunc(slices.Clone(m.needs), func(n string) bool { return !here[n] })
		if len(needs) > 0 {
			fmt.Fprintf(&out, "depends %s %s\n", m.name, strings.Join(needs, " "))
		}
	}
	return out.String(), nil
}
