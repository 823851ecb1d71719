package splitdns

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

const (
	journalName = "resolv.conf.journal"

	// Mark and the name of the interface end every line of ours, so that it is found again in a file that others have
	// rewritten, and so that two daemons on one host do not take each other's lines for their own.
	Mark = "# sallyway "

	maxResolvConf = 1 << 20 // bytes; a file beyond is not one
)

// journal is what undoes an edit. It is on the disk before the edit is.
type journal struct {
	Path     string      `json:"path"`
	Marker   string      `json:"marker"` // at the end of our lines
	Existed  bool        `json:"existed"`
	Link     string      `json:"link,omitempty"` // where Path led as a symbolic link
	Original []byte      `json:"original"`
	Mode     fs.FileMode `json:"mode"`
	Written  []string    `json:"written"` // SHA-256 of what we have put there, or were about to
	Edited   []byte      `json:"edited"`  // the last of those
}

// torn reports whether b is what a crash leaves of a file that was being written in place.
func (j *journal) torn(b []byte) bool {
	return j.Existed && (len(b) < len(j.Edited) && bytes.HasPrefix(j.Edited, b) || len(b) < len(j.Original) && bytes.HasPrefix(j.Original, b))
}

// ours reports whether b is what we have written.
func (j *journal) ours(b []byte) bool { return slices.Contains(j.Written, hash(b)) || j.torn(b) }

func (d *DNS) marker() string { return Mark + d.cfg.Interface }

func (d *DNS) journalPath() string { return filepath.Join(d.cfg.StateDir, journalName) }

func hash(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// setResolvConfLocked puts servers first in resolv.conf.
func (d *DNS) setResolvConfLocked(servers []netip.Addr) error {
	j, err := readJournal(d.journalPath())
	if err != nil {
		return err
	}
	current, err := readFile(d.cfg.ResolvConf)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if upstreams, ok := inForce(current, servers, d.marker()); ok && j != nil {
		d.upstreams = upstreams
		return nil
	}
	if j == nil || !j.ours(current) {
		// The first edit, or somebody has written the file since: what is there now is the original.
		if j, err = snapshot(d.cfg.ResolvConf); err != nil {
			return err
		}
		j.Marker = d.marker()
		j.Original = withoutOurs(j.Original, j.Marker)
	}
	edited := edit(j.Original, servers, j.Marker)
	j.Written, j.Edited = append(j.Written, hash(edited)), edited
	if err := writeJournal(d.journalPath(), j); err != nil {
		return err
	}
	if err := replaceFile(d.cfg.ResolvConf, edited, j.Mode); err != nil {
		return err
	}
	d.upstreams, _ = inForce(edited, servers, j.Marker)
	return nil
}

// inForce reports whether servers are the first in a resolv.conf but for those of other daemons of ours, which forward to
// them, and which servers follow.
func inForce(b []byte, servers []netip.Addr, marker string) (upstreams []netip.Addr, ok bool) {
	var own []netip.Addr
	for line := range bytes.Lines(b) {
		as := nameservers(line)
		line = bytes.TrimRight(line, "\r\n")
		switch {
		case len(as) == 0:
		case bytes.HasSuffix(line, []byte(marker)):
			own = append(own, as...)
		case len(own) > 0:
			if !slices.Contains(servers, as[0]) {
				upstreams = append(upstreams, as...)
			}
		case !bytes.Contains(line, []byte(Mark)):
			return nil, false
		}
	}
	return upstreams, len(own) > 0 && slices.Equal(own, servers)
}

// snapshot is a journal that leads back to the file as it is.
func snapshot(path string) (*journal, error) {
	j := &journal{Path: path, Mode: 0o644}
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return j, nil
	}
	if err != nil {
		return nil, err
	}
	j.Existed = true
	if fi.Mode()&fs.ModeSymlink != 0 {
		if j.Link, err = os.Readlink(path); err != nil {
			return nil, err
		}
	} else {
		j.Mode = fi.Mode().Perm()
	}
	j.Original, err = readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil // a link to a file that is not there (yet)
	}
	return j, err
}

// edit puts servers before the first nameserver of a resolv.conf.
func edit(original []byte, servers []netip.Addr, marker string) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Edited by Sallyway, which puts its resolver first and undoes that when it ends. %s\n", marker)
	for _, s := range servers {
		// resolv.conf(5) knows comments only at the start of a line, and ignores what follows the address.
		fmt.Fprintf(&b, "nameserver %v %s\n", s, marker)
	}
	for line := range bytes.Lines(original) {
		f := bytes.Fields(line)
		if len(f) > 1 && string(f[0]) == "options" {
			// With rotate the others would be asked about our names.
			if kept := slices.DeleteFunc(f, func(o []byte) bool { return string(o) == "rotate" }); len(kept) == 1 {
				continue
			} else if len(kept) < len(bytes.Fields(line)) {
				line = append(bytes.Join(kept, []byte(" ")), '\n')
			}
		}
		b.Write(line)
	}
	return b.Bytes()
}

// withoutOurs is b without the lines that edit adds.
func withoutOurs(b []byte, marker string) []byte {
	var out []byte
	for line := range bytes.Lines(b) {
		if !bytes.HasSuffix(bytes.TrimRight(line, "\r\n"), []byte(marker)) {
			out = append(out, line...)
		}
	}
	return out
}

// undo puts back what the journal says and removes the journal. It reports whether the file was changed.
func undo(path string) (bool, error) {
	j, err := readJournal(path)
	if j == nil || err != nil {
		return false, err
	}
	current, err := readFile(j.Path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	changed := false
	switch {
	case err == nil && j.ours(current):
		changed = true
		switch {
		case !j.Existed:
			err = os.Remove(j.Path)
		case j.Link != "":
			err = replaceLink(j.Path, j.Link)
		default:
			err = replaceFile(j.Path, j.Original, j.Mode)
		}
	case err == nil && j.Marker != "" && !bytes.Equal(withoutOurs(current, j.Marker), current):
		// Somebody has edited it around our lines: only they go.
		changed = true
		err = replaceFile(j.Path, withoutOurs(current, j.Marker), j.Mode)
	default:
		err = nil // never edited, or written anew by somebody else
	}
	if err != nil {
		return false, err
	}
	if err := os.Remove(path); err != nil {
		return changed, err
	}
	return changed, syncDir(filepath.Dir(path))
}

func readJournal(path string) (*journal, error) {
	b, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var j journal
	if err := json.Unmarshal(b, &j); err != nil {
		return nil, fmt.Errorf("%s: %w: look at resolv.conf yourself, then remove this file", path, err)
	}
	return &j, nil
}

func writeJournal(path string, j *journal) error {
	b, err := json.Marshal(j)
	if err != nil {
		return err
	}
	return replaceFile(path, b, 0o600)
}

func readFile(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxResolvConf {
		return nil, fmt.Errorf("%s: not a regular file of at most %d bytes", path, maxResolvConf)
	}
	return os.ReadFile(path)
}

// replaceFile makes b the content of path such that a power cut leaves the old or the new. A file that is mounted, as in
// containers, cannot be replaced and is written in place.
func replaceFile(path string, b []byte, mode fs.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return overwrite(path, b, err)
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(b)
	err = errors.Join(err, tmp.Chmod(mode), tmp.Sync(), tmp.Close())
	if err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return overwrite(path, b, err)
	}
	return syncDir(filepath.Dir(path))
}

// overwrite writes in place where cause says that path cannot be replaced.
func overwrite(path string, b []byte, cause error) error {
	if !errors.Is(cause, syscall.EBUSY) && !errors.Is(cause, syscall.EXDEV) && !errors.Is(cause, syscall.EROFS) {
		return cause
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

// replaceLink makes path a symbolic link to target.
func replaceLink(path, target string) error {
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".sallyway")
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		os.Remove(tmp)
		return err
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes renames in a folder outlive a power cut.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOTSUP) {
		return err
	}
	return nil
}
