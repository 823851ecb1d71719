// Package appliance boots the appliance's image in virtual machines, three ways: kernel and initramfs given to the emulator, by BIOS, and by UEFI.
// A real platform, relay and client stand around them in a lab; the machines' networks are QEMU's user networks in the namespace of the lab's gateway
// host, from which the private web server can be reached.
//
// The image is one that `make image-test` builds; $SALLYWAY_IMAGES is its folder. KVM is used where it really boots the kernel, else QEMU emulates
// the processor, and the times in seconds of processor that are printed are those.
package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyway/internal/appliance/console"
	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/lab"
)

// patience bounds each step. Where a processor is emulated on a busy machine, a start takes minutes.
const patience = 5 * time.Minute

// image is the image under test.
type image struct {
	dir, name, version string
}

// theImage finds it.
func theImage(t *testing.T) image {
	t.Helper()
	dir := os.Getenv("SALLYWAY_IMAGES")
	if dir == "" {
		if os.Getenv("CI") != "" {
			t.Fatal("SALLYWAY_IMAGES is not set: run make image-test")
		}
		t.Skip("run make image-test: it builds the image")
	}
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	found, err := filepath.Glob(filepath.Join(dir, "sallyway_*_amd64.json"))
	if err != nil || len(found) != 1 {
		t.Fatalf("%d images are in %s, want one", len(found), dir)
	}
	text, err := os.ReadFile(found[0])
	if err != nil {
		t.Fatal(err)
	}
	var m struct{ Version string }
	if err := json.Unmarshal(text, &m); err != nil {
		t.Fatal(err)
	}
	return image{dir: dir, name: strings.TrimSuffix(filepath.Base(found[0]), ".json"), version: m.Version}
}

func (i image) file(suffix string) string { return filepath.Join(i.dir, i.name+suffix) }

// page is what the private web server shows.
const page = "a page of the private network\n"

// laptop is the client.
const laptop = "laptop"

// world is what stands around the appliances.
type world struct {
	*lab.Lab
	image  image
	kvm    bool
	report *report
}

// newWorld makes a lab with platform, relay, client and private web server.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{image: theImage(t), report: &report{}}
	l, err := lab.New(lab.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	w.Lab = l
	w.kvm = w.probeKVM(t)
	ctx := within(t, patience)
	check(t, second(l.Private.Web(netip.AddrPortFrom(lab.WebAddr, 80).String(), page)))
	check(t, second(l.StartPlatform(ctx)))
	check(t, l.Login(ctx))
	check(t, second(l.Relay(ctx, l.Relay1, "relay-1")))
	check(t, second(l.StartNode(ctx, lab.NodeSpec{Kind: identity.Client, Name: laptop, Host: l.Client})))
	return w
}

// gateway makes a gateway on the platform, with more arguments of `sallyway gateway create`, and a resource behind it that the client may reach.
func (w *world) gateway(t *testing.T, name string, args ...string) control.CreatedNode {
	t.Helper()
	ctx := within(t, patience)
	var made control.CreatedNode
	check(t, w.SallywayJSON(ctx, &made, append([]string{"gateway", "create", name}, args...)...))
	check(t, w.AddResource(ctx, lab.Resource{Name: "web-" + name, Gateway: name, Address: lab.WebAddr.String(), TCP: "80"}, "client:"+laptop))
	return made
}

// record is what the platform knows of a gateway.
func (w *world) record(ctx context.Context, name string) (control.NodeRecord, error) {
	var r control.NodeRecord
	return r, w.SallywayJSON(ctx, &r, "gateway", "show", name)
}

// healthy waits until the platform says so of a gateway, and the client sees the page behind it.
func (w *world) healthy(t *testing.T, name string) control.NodeRecord {
	t.Helper()
	ctx := within(t, patience)
	var r control.NodeRecord
	check(t, lab.Until(ctx, time.Second, func() (err error) {
		if r, err = w.record(ctx, name); err == nil && r.State != control.StateHealthy {
			err = fmt.Errorf("%s is %s: %v", name, r.State, r.Problems)
		}
		return err
	}))
	check(t, lab.Until(ctx, time.Second, func() error {
		got, err := w.Client.Run(ctx, "curl", "-sS", "--max-time", "20", "http://"+lab.FQDN("web-"+name, lab.DefaultOrg)+"/")
		if err == nil && got.Stdout != page {
			err = fmt.Errorf("the page behind %s is %q", name, got.Stdout)
		}
		return err
	}))
	return r
}

// ready waits for the line that an appliance writes when everything works, after a place in its log.
func (m *machine) ready(t *testing.T, mark int) console.Ready {
	t.Helper()
	var r console.Ready
	m.document(t, mark, console.ReadyLine, &r)
	return r
}

// document waits for a line for machines.
func (m *machine) document(t *testing.T, mark int, word string, doc any) {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), patience, fmt.Errorf("%s: nothing of the kind within %v", m.Name, patience))
	defer cancel()
	if err := m.WaitReady(ctx, mark, word+` \{.*\}`); err != nil {
		t.Fatal(err)
	}
	line := m.Log.Since(mark, word+` \{.*\}`)[0].Text
	if err := json.Unmarshal([]byte(line[strings.Index(line, "{"):]), doc); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
}

// sound fails the test for what no console may show: a fault of the kernel or of a program, or a token.
func (m *machine) sound(t *testing.T, tokens ...string) {
	t.Helper()
	for _, l := range m.Log.Since(0, "Kernel panic|Oops|BUG:|general protection|Out of memory|panic: |fatal error:") {
		t.Errorf("%s: the console shows %q\n%s", m.Name, l.Text, m.Log.Tail(40))
	}
	m.discreet(t, tokens...)
}

// discreet fails the test when the console shows a token.
func (m *machine) discreet(t *testing.T, tokens ...string) {
	t.Helper()
	text, err := os.ReadFile(m.Log.Path)
	check(t, err)
	if slices.ContainsFunc(tokens, func(s string) bool { return strings.Contains(string(text), s) }) {
		t.Errorf("%s: the console shows a token", m.Name)
	}
}

// report is the table that the test prints: one line per figure.
type report struct {
	mu    sync.Mutex
	lines []string
}

func (r *report) add(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, fmt.Sprintf(format, args...))
}

// write puts the table beside the images, for `make image-test` to print.
func (r *report) write(t *testing.T, dir string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	slices.Sort(r.lines)
	text := strings.Join(r.lines, "\n") + "\n"
	t.Log("\n" + text)
	if err := os.WriteFile(filepath.Join(dir, "boot.txt"), []byte(text), 0o644); err != nil {
		t.Error(err)
	}
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, fmt.Errorf("%s: not done within %v", t.Name(), d))
	t.Cleanup(cancel)
	return ctx
}

func check(t *testing.T, err error) {
	t.Helper()
	var exit *lab.ExitError
	if errors.As(err, &exit) {
		t.Fatalf("%v\n%s", err, exit.Stderr)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func second[T any](_ T, err error) error { return err }
