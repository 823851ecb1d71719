// Command mkimage builds Sallyway's appliance: a kernel of Debian and one static program as process 1, as disks that virtual machines boot.
//
//	mkimage build --init PROGRAM --version 1.2.0 --epoch SECONDS [--arch arm64] [--out DIR]
//	mkimage key FILE                     # makes a key for signing images, and prints its public half
//	mkimage sign --key FILE IMAGE.efi    # writes IMAGE.efi.sig, what an appliance's update URL names
//
// Building needs neither root nor loop devices nor a container, and the same inputs give the same bytes. What it makes, in the folder --out:
//
//	NAME.qcow2            boots by UEFI, from one file that can be signed for Secure Boot
//	NAME-hybrid.qcow2     boots by UEFI and by BIOS; the disks below are the same one
//	NAME.raw.xz NAME.vmdk NAME.vhd
//	NAME.efi              the unified kernel image alone, which is what an update is
//	NAME.vmlinuz NAME.initrd
//	NAME.json             what is in it: packages with versions and hashes, sizes
//
// NAME is sallyway_VERSION_ARCH. There is no BIOS on arm64, so no hybrid: the other disks are those of UEFI.
//
// Debian packages are fetched by apt into a folder of their own (--cache) whatever the host's own apt is set up for, checked by the archive's
// signature, unpacked, and never installed. What lies where in the initramfs is said in internal/appliance, and what on the boot partition in
// internal/appliance/update. A hybrid disk holds kernel and initramfs as files that both syslinux and systemd-boot start (the Boot Loader
// Specification's type 1), so that it is no larger; updates that UEFI starts are unified kernel images (type 2) there as well.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/appliance/update"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := &cobra.Command{Use: "mkimage", Short: "Build and sign images of the appliance", SilenceUsage: true, SilenceErrors: true}
	root.AddCommand(buildCommand(), keyCommand(), signCommand())
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "mkimage: %v\n", err)
		os.Exit(1)
	}
}

func buildCommand() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use: "build", Short: "Build the disks", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.build(cmd.Context()) },
	}
	f := cmd.Flags()
	f.StringVar(&o.arch, "arch", "amd64", "amd64 or arm64")
	f.StringVar(&o.init, "init", "", "the static program that becomes process 1")
	f.StringVar(&o.version, "version", "", "version of the image: it orders the images on a disk")
	f.StringVar(&o.out, "out", "dist", "folder for the images")
	f.StringVar(&o.cache, "cache", "dist/cache", "folder for Debian packages")
	f.StringVar(&o.mirror, "mirror", "http://deb.debian.org", "where Debian's archives are")
	f.Int64Var(&o.epoch, "epoch", 0, "time of every file, in seconds since 1970")
	f.BoolVar(&o.quick, "quick", false, "only the qcow2 disks, with what they are made from")
	return cmd
}

// options is what is built.
type options struct {
	arch, init, version, out, cache, mirror string
	epoch                                   int64
	quick                                   bool
}

// cmdline is the kernel's command line, see internal/appliance. A check of the timer at start fails on busy emulators, and helps no virtual machine.
var cmdline = map[string]string{
	"amd64": "console=tty0 console=ttyS0,115200 quiet panic=5 oops=panic no_timer_check",
	"arm64": "console=tty0 console=ttyAMA0 console=ttyS0 quiet panic=5 oops=panic",
}

func (o options) check() error {
	switch {
	case cmdline[o.arch] == "":
		return fmt.Errorf("--arch %s: there are amd64 and arm64", o.arch)
	case o.init == "":
		return errors.New("--init is missing: name the program that becomes process 1")
	case o.version == "":
		return errors.New("--version is missing")
	case o.epoch < fatEpoch:
		return errors.New("--epoch is missing: the time of every file, in seconds since 1970 and not before 1980")
	}
	v, err := update.ParseVersion(o.version)
	if err == nil && string(v) != o.version {
		err = fmt.Errorf("--version %s: leave the v out", o.version)
	}
	return err
}

// arguments is the kernel's command line of this version.
func (o options) arguments() string { return cmdline[o.arch] + " " + update.Parameter + o.version }

// build makes everything in a folder beside the results and moves these into place at the end.
func (o options) build(ctx context.Context) (err error) {
	if err := o.check(); err != nil {
		return err
	}
	start := time.Now()
	// For mtools, which syslinux writes itself onto a disk with.
	if err := errors.Join(os.Setenv("SOURCE_DATE_EPOCH", strconv.FormatInt(o.epoch, 10)), os.MkdirAll(o.out, 0o755)); err != nil {
		return err
	}
	work, err := os.MkdirTemp(o.out, ".mkimage-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	if work, err = filepath.Abs(work); err != nil {
		return err
	}
	b := &builder{options: o, work: work, name: "sallyway_" + o.version + "_" + o.arch, tell: func(what string) {
		fmt.Fprintf(os.Stderr, "%5.1fs %s\n", time.Since(start).Seconds(), what)
	}}
	return b.run(ctx)
}

// builder is one build. Files are made in work.
type builder struct {
	options
	work, name string
	tell       func(string)

	packages []debianPackage
	root     string // where they are unpacked
	kernel   kernel
}

func (b *builder) run(ctx context.Context) error {
	b.tell("packages of Debian")
	if err := b.fetch(ctx); err != nil {
		return err
	}
	k, err := b.findKernel(ctx)
	if err != nil {
		return err
	}
	b.kernel = k
	b.tell("initramfs for Linux " + k.release)
	if err := b.initramfs(ctx); err != nil {
		return err
	}
	b.tell("unified kernel image")
	if err := b.uki(); err != nil {
		return err
	}
	b.tell("disks")
	made, err := b.disks(ctx)
	if err != nil {
		return err
	}
	made = append(made, b.name+".efi", b.name+".vmlinuz", b.name+".initrd")
	if err := b.manifest(made); err != nil {
		return err
	}
	for _, f := range append(made, b.name+".json") {
		if err := os.Rename(filepath.Join(b.work, f), filepath.Join(b.out, f)); err != nil {
			return err
		}
	}
	b.tell("done")
	return nil
}
