// Package console is what an appliance shows: on every console of the kernel's, in plain text without cursor control, so that a serial log
// reads well. It shows no secret, takes no command but Enter, and leads to no shell.
package console

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Lines for machines begin with these words.
const (
	ReadyLine        = "SALLYWAY-READY"
	UnconfiguredLine = "SALLYWAY-UNCONFIGURED"
)

// Ready is the document of the line that says that everything works.
type Ready struct {
	Role        string   `json:"role"`
	Name        string   `json:"name"`
	Version     string   `json:"version"`
	Addresses   []string `json:"addresses"`
	Config      string   `json:"config"` // the source of the configuration
	State       string   `json:"state"`  // the device of the state partition, "memory" without one
	Slot        string   `json:"slot,omitempty"`
	SinceBoot   float64  `json:"since_boot"` // seconds
	MemoryBytes uint64   `json:"memory_used_bytes,omitempty"`
}

// Unconfigured is the document of the line that says that nobody has configured the appliance.
type Unconfigured struct {
	MAC       []string `json:"mac"`
	Addresses []string `json:"addresses"`
	Version   string   `json:"version"`
	Problems  []string `json:"problems,omitempty"` // of configurations that were found and are wrong
	SinceBoot float64  `json:"since_boot"`         // seconds
}

// Machine writes a line for machines.
func (c *Console) Machine(word string, doc any) {
	b, err := json.Marshal(doc)
	if err != nil {
		b = []byte("{}") // the documents above always encode
	}
	c.Print(word + " " + string(b))
}

// queueLines is how many pieces of text wait for a slow console; what comes then is dropped, and process 1 never waits for one.
const queueLines = 256

// Console is all consoles together. Its methods may be called concurrently.
type Console struct {
	outs  []chan string
	wg    sync.WaitGroup
	enter chan struct{}

	mu     sync.Mutex // guards closed, and sending against closing
	closed bool
}

// Names returns the kernel's consoles, from /sys/class/tty/console/active.
func Names(sys string) []string {
	b, err := os.ReadFile(filepath.Join(sys, "class/tty/console/active"))
	if err != nil {
		return nil
	}
	return strings.Fields(string(b))
}

// Open opens the devices below dev. One that cannot be opened is left out; without any the console is standard output.
func Open(dev string, names []string) *Console {
	c := &Console{enter: make(chan struct{}, 1)}
	for _, n := range names {
		f, err := os.OpenFile(filepath.Join(dev, filepath.Base(n)), os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			continue
		}
		quietTerminal(int(f.Fd()))
		c.add(f)
		go c.read(f)
	}
	if len(c.outs) == 0 {
		c.add(os.Stdout)
	}
	return c
}

// New is a console on a writer; enter is where a person presses Enter, nil is nowhere.
func New(w io.Writer, enter io.Reader) *Console {
	c := &Console{enter: make(chan struct{}, 1)}
	c.add(w)
	if enter != nil {
		go c.read(enter)
	}
	return c
}

func (c *Console) add(w io.Writer) {
	q := make(chan string, queueLines)
	c.outs = append(c.outs, q)
	c.wg.Go(func() {
		for s := range q {
			_, _ = io.WriteString(w, s) // a console that is gone has nobody to tell
		}
	})
}

// quietTerminal keeps what is typed from being shown and from making signals.
func quietTerminal(fd int) {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return // no terminal
	}
	t.Lflag &^= unix.ECHO | unix.ISIG
	t.Oflag |= unix.OPOST | unix.ONLCR
	_ = unix.IoctlSetTermios(fd, unix.TCSETS, t) // it stays as it was then
}

// read turns each line that is typed into an Enter, and forgets what it was.
func (c *Console) read(r io.Reader) {
	in := bufio.NewReaderSize(r, 64)
	for {
		b, err := in.ReadByte()
		if err != nil {
			return
		}
		if b != '\n' && b != '\r' {
			continue
		}
		select {
		case c.enter <- struct{}{}:
		default:
		}
	}
}

// Enter has an element for each time that a person pressed Enter.
func (c *Console) Enter() <-chan struct{} { return c.enter }

// Print writes one line, or several.
func (c *Console) Print(text string) {
	text = clean(text) + "\n"
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	for _, q := range c.outs {
		select {
		case q <- text:
		default:
		}
	}
}

// clean takes out what would move a terminal's cursor.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' && r != '\t' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}

// Close writes what is waiting, for as long as ctx lasts. What is printed later is dropped.
func (c *Console) Close(ctx context.Context) {
	c.mu.Lock()
	if !c.closed {
		c.closed = true
		for _, q := range c.outs {
			close(q)
		}
	}
	c.mu.Unlock()
	done := make(chan struct{})
	go func() {
		c.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// Row is one line of the status block.
type Row struct{ Name, Text string }

// Block is the status block for people.
type Block struct {
	Title string
	Rows  []Row
	// Live rows change all the time (times, counters): they are shown and make no redraw.
	Live []Row
	// Say are sentences below, such as what to do next.
	Say []string
}

// width is that of a text console.
const width = 80

// String is the block as it is drawn. Long rows go on in further lines.
func (b Block) String() string {
	var s strings.Builder
	rule := strings.Repeat("-", width-1)
	fmt.Fprintf(&s, "%s\n  %s\n", rule, b.Title)
	for _, r := range append(append([]Row{}, b.Rows...), b.Live...) {
		name := r.Name
		for _, line := range wrap(r.Text, width-15) {
			fmt.Fprintf(&s, "  %-11s%s\n", name, line)
			name = ""
		}
	}
	for _, t := range b.Say {
		for _, line := range strings.Split(t, "\n") { // commands are for copying: they are not broken
			fmt.Fprintf(&s, "  %s\n", line)
		}
	}
	s.WriteString(rule)
	return s.String()
}

// Same says whether two blocks differ in nothing but their live rows.
func (b Block) Same(o Block) bool {
	b.Live, o.Live = nil, nil
	return b.String() == o.String()
}

// wrap breaks text at spaces into lines of at most n characters; a longer word stays whole.
func wrap(text string, n int) []string {
	var out []string
	for _, para := range strings.Split(text, "\n") {
		line := ""
		for _, w := range strings.Fields(para) {
			switch {
			case line == "":
				line = w
			case len(line)+1+len(w) <= n:
				line += " " + w
			default:
				out = append(out, line)
				line = w
			}
		}
		out = append(out, line)
	}
	return out
}
