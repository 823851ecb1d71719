package machine

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Modules are the kernel modules of an image: those in its folder are always loaded, in the order of their names; those in hw below it
// when a device of this machine asks for one (its modalias), with those that they need.
type Modules struct {
	fixed []string // file names
	hw    []string // file names in hw, in the order of loading
	alias []alias
	needs map[string][]string // module → the others in hw that it needs
}

// alias is a pattern of device names and the module that drives them.
type alias struct{ pattern, module string }

// ReadModules reads an image's folder of modules. One without modules is fine: the kernel may have everything built in.
func ReadModules(dir fs.FS) (*Modules, error) {
	m := &Modules{needs: make(map[string][]string)}
	var err error
	if m.fixed, err = fs.Glob(dir, "*.ko"); err != nil {
		return nil, err
	}
	hw, err := fs.Glob(dir, "hw/*.ko")
	if err != nil {
		return nil, err
	}
	for _, f := range hw {
		m.hw = append(m.hw, path.Base(f))
	}
	slices.Sort(m.fixed)
	slices.Sort(m.hw)
	b, err := fs.ReadFile(dir, "hw/aliases")
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	} else if err != nil {
		return nil, err
	}
	m.parseAliases(b)
	return m, nil
}

// parseAliases reads lines of "alias PATTERN module" and "depends module other…". What is no such line is passed over.
func (m *Modules) parseAliases(b []byte) {
	s := bufio.NewScanner(bytes.NewReader(b))
	for s.Scan() {
		switch w := strings.Fields(s.Text()); {
		case len(w) == 3 && w[0] == "alias":
			if _, err := path.Match(w[1], ""); err == nil {
				m.alias = append(m.alias, alias{w[1], moduleName(w[2])})
			}
		case len(w) > 2 && w[0] == "depends":
			name := moduleName(w[1])
			for _, n := range w[2:] {
				m.needs[name] = append(m.needs[name], moduleName(n))
			}
		}
	}
}

// moduleName is a module's name from its file's (NNN-name.ko), as the kernel writes it.
func moduleName(file string) string {
	name := strings.TrimSuffix(path.Base(file), ".ko")
	if n, rest, found := strings.Cut(name, "-"); found && n != "" && strings.Trim(n, "0123456789") == "" {
		name = rest
	}
	return strings.ReplaceAll(name, "-", "_")
}

// wanted returns the files in hw that devices ask for, in the order of loading.
func (m *Modules) wanted(devices []string) []string {
	want := make(map[string]bool)
	var add func(name string)
	add = func(name string) {
		if !want[name] {
			want[name] = true
			for _, n := range m.needs[name] {
				add(n)
			}
		}
	}
	for _, a := range m.alias {
		for _, d := range devices {
			if ok, _ := path.Match(a.pattern, d); ok { // the pattern was checked when it was read
				add(a.module)
				break
			}
		}
	}
	var out []string
	for _, f := range m.hw {
		if want[moduleName(f)] {
			out = append(out, f)
		}
	}
	return out
}

// devices returns the modaliases of this machine's devices. sys is /sys.
func devices(sys fs.FS) []string {
	var out []string
	files, _ := fs.Glob(sys, "bus/*/devices/*/modalias") // the pattern is right
	for _, f := range files {
		b, err := fs.ReadFile(sys, f)
		if s := strings.TrimSpace(string(b)); err == nil && s != "" && !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

// rounds bounds how often devices are looked for again: a driver of a bus brings new ones.
const rounds = 6

// Load loads the modules below folder. A module that fails is reported and does not keep the others out: what it was for will be missed,
// and named, by who needs it.
func (m *Modules) Load(folder string) (loaded int, err error) {
	var errs []error
	done := make(map[string]bool)
	load := func(file string) {
		if done[file] {
			return
		}
		done[file] = true
		if err := insert(filepath.Join(folder, file)); err != nil {
			errs = append(errs, fmt.Errorf("module %s: %w", moduleName(file), err))
			return
		}
		loaded++
	}
	for _, f := range m.fixed {
		load(f)
	}
	for range rounds {
		before := loaded
		for _, f := range m.wanted(devices(os.DirFS("/sys"))) {
			load(path.Join("hw", f))
		}
		if loaded == before {
			break
		}
	}
	return loaded, errors.Join(errs...)
}

// insert loads one module. One that is there already, and one whose device is not, are no errors.
func insert(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}
