package appliance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"sallyway/internal/lab"
)

// memory is that of the machines, in MiB: what an appliance is said to run in.
const memory = 256

// machine is a virtual machine, whose serial console is its log.
type machine struct {
	*lab.Proc
}

// start turns a machine on. Its own disk and loader come with args; the first network card is at QEMU's user network.
func (w *world) start(t *testing.T, h *lab.Host, name string, args ...string) *machine {
	t.Helper()
	p, err := h.Start(lab.Spec{Name: name, Args: append(w.qemu(), args...)})
	check(t, err)
	m := &machine{p}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s:\n%s", name, m.Log.Tail(60))
		}
		m.Kill()
	})
	return m
}

// qemu is the command of any of the machines.
func (w *world) qemu() []string {
	args := []string{
		"qemu-system-x86_64", "-M", "q35", "-smp", "1", "-m", fmt.Sprint(memory), "-nodefaults", "-no-user-config", "-display", "none",
		"-monitor", "none", "-serial", "stdio",
		"-object", "rng-random,id=random,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=random",
		"-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=",
	}
	if w.kvm {
		return append(args, "-accel", "kvm", "-cpu", "host")
	}
	// Before version 10, QEMU's own cmpxchg16b crashes newer kernels.
	return append(args, "-accel", "tcg", "-cpu", "max,cx16=off")
}

// direct hands over kernel and initramfs.
func (i image) direct() []string {
	return []string{"-kernel", i.file(".vmlinuz"), "-initrd", i.file(".initrd"), "-append", "console=ttyS0 quiet panic=5 no_timer_check"}
}

// disk attaches a disk by virtio.
func disk(path, format string) []string {
	return []string{"-drive", "if=none,id=disk,format=" + format + ",file=" + path, "-device", "virtio-blk-pci,drive=disk"}
}

// cd attaches a seed as the CD of a SATA controller.
func cd(path string) []string {
	return []string{"-drive", "if=none,id=seed,format=raw,readonly=on,file=" + path, "-device", "ide-cd,drive=seed"}
}

// ovmf makes the machine start by UEFI, with variables of its own in dir.
func ovmf(t *testing.T, dir string) []string {
	t.Helper()
	const code, vars = "/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"
	own := filepath.Join(dir, "vars.fd")
	copyFile(t, own, vars)
	return []string{"-drive", "if=pflash,format=raw,readonly=on,file=" + code, "-drive", "if=pflash,format=raw,file=" + own}
}

func copyFile(t *testing.T, to, from string) {
	t.Helper()
	in, err := os.Open(from)
	check(t, err)
	defer in.Close()
	out, err := os.Create(to)
	check(t, err)
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	check(t, out.Close())
}

// raw unpacks a disk so that it can be read and written beside the machine.
func raw(t *testing.T, to, from string) {
	t.Helper()
	if out, err := exec.Command("qemu-img", "convert", "-q", "-O", "raw", from, to).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v: %s", err, out)
	}
}

// kvmWait is how long a kernel may take to write its first line under KVM.
const kvmWait = 6 * time.Second

// probeKVM says whether KVM boots the kernel. That /dev/kvm can be opened does not say so: inside of other virtual machines it may be there and not work.
func (w *world) probeKVM(t *testing.T) bool {
	t.Helper()
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		return false
	} else if err := f.Close(); err != nil {
		return false
	}
	p, err := w.Peer.Start(lab.Spec{Name: "kvm", Args: []string{
		"qemu-system-x86_64", "-M", "q35", "-accel", "kvm", "-cpu", "host", "-m", fmt.Sprint(memory), "-nodefaults", "-no-user-config", "-display", "none",
		"-monitor", "none", "-serial", "stdio", "-no-reboot", "-kernel", w.image.file(".vmlinuz"), "-append", "console=ttyS0 panic=-1",
	}})
	check(t, err)
	defer p.Kill()
	ctx, cancel := context.WithTimeout(t.Context(), kvmWait)
	defer cancel()
	return p.WaitReady(ctx, 0, "Linux version") == nil
}

// spent adds to the report what a machine has used since it was turned on, until it answered.
func (w *world) spent(t *testing.T, m *machine, how string, wall time.Duration, bar float64) {
	t.Helper()
	u, err := m.Usage()
	check(t, err)
	by := "emulated"
	if w.kvm {
		by = "KVM"
	}
	over := ""
	if bar > 0 && u.CPU.Seconds() > bar {
		over = fmt.Sprintf(", over the bar of %.0f", bar)
	}
	w.report.add("%-22s ready after %5.1f s of processor (%s%s), %5.1f s on the clock", how, u.CPU.Seconds(), by, over, wall.Seconds())
}

// dialShortly opens a TCP connection from the peer's host within closedFor.
func (w *world) dialShortly(t *testing.T, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(t.Context(), closedFor)
	defer cancel()
	return w.Peer.Dial(ctx, "tcp", addr)
}

func asNetError(err error, target *net.Error) bool { return errors.As(err, target) }
