package daemon

import (
	"bytes"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestTokenTyped shows that a terminal is asked for the token, that Enter ends it, and that nothing of it is echoed to
// the log.
func TestTokenTyped(t *testing.T) {
	master, terminal := openTerminal(t)
	if _, err := fmt.Fprintln(master, planted); err != nil {
		t.Fatal(err)
	}
	var prompt bytes.Buffer
	flags := TokenFlags{file: "-"}
	got, err := flags.readFile(terminal, &prompt, nil)
	if err != nil || got.Reveal() != planted {
		t.Fatalf("token %q, %v", got.Reveal(), err)
	}
	if !bytes.Contains(prompt.Bytes(), []byte("Paste the token")) || bytes.Contains(prompt.Bytes(), []byte(planted)) {
		t.Fatalf("prompt %q", &prompt)
	}
}

func TestTypedIsFalse(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if typed(null) || typed(r) || typed(new(bytes.Buffer)) {
		t.Fatal("nobody types /dev/null, a pipe or a buffer")
	}
}

// openTerminal returns both ends of a pseudo-terminal (pts(4)).
func openTerminal(t *testing.T) (master, terminal *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = terminal.Close() })
	return master, terminal
}
