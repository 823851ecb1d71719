package console

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestLines(t *testing.T) {
	var out bytes.Buffer
	c := New(&out, nil)
	c.Machine(ReadyLine, Ready{Role: "gateway", Name: "office", Version: "v1", Addresses: []string{"192.0.2.1"}, Config: "smbios", State: "vda2", SinceBoot: 8.5})
	c.Machine(UnconfiguredLine, Unconfigured{MAC: []string{"52:54:00:12:34:56"}, Addresses: []string{}})
	c.Print("a\x1b[2Jb\xff\r")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c.Close(ctx)
	c.Print("late")
	c.Close(ctx)
	lines := strings.Split(out.String(), "\n")
	var r Ready
	if doc, ok := strings.CutPrefix(lines[0], ReadyLine+" "); !ok || json.Unmarshal([]byte(doc), &r) != nil || r.Name != "office" || r.SinceBoot != 8.5 {
		t.Errorf("%q", lines[0])
	}
	if !strings.HasPrefix(lines[1], UnconfiguredLine+` {"mac":["52:54:00:12:34:56"],"addresses":[]`) {
		t.Errorf("%q", lines[1])
	}
	if lines[2] != "a?[2Jb??" || len(lines) != 4 {
		t.Errorf("%q", lines[2:])
	}
}

// stuck is a console whose other end has stopped reading.
type stuck struct{ release chan struct{} }

func (s stuck) Write(p []byte) (int, error) {
	<-s.release
	return len(p), nil
}

func TestStuckConsoleHoldsNobodyUp(t *testing.T) {
	s := stuck{make(chan struct{})}
	c := New(s, nil)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 10 * queueLines {
			c.Print("x")
		}
	}()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("Print waits for a console that is stuck")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c.Close(ctx)
	close(s.release)
	c.wg.Wait()
}

func TestEnter(t *testing.T) {
	r, w := io.Pipe()
	c := New(io.Discard, r)
	if _, err := io.WriteString(w, "secret command\r"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.Enter():
	case <-time.After(20 * time.Second):
		t.Fatal("Enter was not noticed")
	}
	if _, err := io.WriteString(w, "no enter"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.Enter():
		t.Error("letters are no Enter")
	default:
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	c.Close(t.Context())
}

// TestTerminal opens a real terminal: what is typed is not shown, Ctrl-C is no signal, Enter is noticed.
func TestTerminal(t *testing.T) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	c := Open("/dev/pts", []string{strconv.Itoa(n), "none"})
	c.Print("hello")
	if _, err := master.WriteString("\x03typed\r"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.Enter():
	case <-time.After(20 * time.Second):
		t.Fatal("Enter was not noticed")
	}
	c.Print("bye")
	buf := make([]byte, 256)
	var got string
	for deadline := time.Now().Add(20 * time.Second); !strings.Contains(got, "bye") && time.Now().Before(deadline); {
		k, err := master.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		got += string(buf[:k])
	}
	if got != "hello\r\nbye\r\n" {
		t.Errorf("the terminal shows %q", got)
	}
	c.Close(t.Context())
}

func TestBlock(t *testing.T) {
	b := Block{
		Title: "Sallyway v1: gateway", Rows: []Row{{"network", "eth0 192.0.2.1/24"}, {"last error", strings.Repeat("word ", 40)}}, Live: []Row{{"up", "1s"}},
		Say: []string{"  sallyway gateway create NAME --appliance-iso seed.iso"},
	}
	text := b.String()
	for _, want := range []string{"  Sallyway v1: gateway\n", "  network    eth0 192.0.2.1/24\n", "  up         1s\n", "    sallyway gateway create NAME --appliance-iso seed.iso\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in\n%s", want, text)
		}
	}
	for l := range strings.Lines(text) {
		if len(l) > width {
			t.Errorf("%d characters: %q", len(l), l)
		}
	}
	later := b
	later.Live = []Row{{"up", "2s"}}
	if !b.Same(later) {
		t.Error("time that passes is a change")
	}
	later.Rows = later.Rows[:1]
	if b.Same(later) {
		t.Error("a row that has gone is no change")
	}
}

func TestNames(t *testing.T) {
	sys := t.TempDir()
	if got := Names(sys); got != nil {
		t.Errorf("%q", got)
	}
	dir := filepath.Join(sys, "class/tty/console")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "active"), []byte("tty0 ttyS0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := Names(sys); strings.Join(got, ",") != "tty0,ttyS0" {
		t.Errorf("%q", got)
	}
}

func FuzzWrap(f *testing.F) {
	f.Add("a b\nc", 3)
	f.Fuzz(func(t *testing.T, s string, n int) {
		words := strings.Fields(s)
		if got := strings.Fields(strings.Join(wrap(s, n), " ")); strings.Join(got, " ") != strings.Join(words, " ") {
			t.Errorf("%q has become %q", words, got)
		}
	})
}
