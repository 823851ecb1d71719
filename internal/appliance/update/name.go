package update

import (
	"cmp"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// Version is the version of an image: two to four numbers with dots between them, and for one that comes before the release
// that they name a tilde and letters, digits and dots: 1.4.0, 1.5.0~rc.1. That is what systemd-boot orders as we do.
type Version string

// versions allows numbers that fit into 32 bits.
var versions = regexp.MustCompile(`^(0|[1-9][0-9]{0,8})(\.(0|[1-9][0-9]{0,8})){1,3}(~[a-z0-9]+(\.[a-z0-9]+)*)?$`)

// maxVersion is the length of the longest version, in bytes.
const maxVersion = 48

// ParseVersion checks a version. A leading v, as tags have it, is dropped.
func ParseVersion(s string) (Version, error) {
	s = strings.TrimPrefix(s, "v")
	if len(s) > maxVersion || !versions.MatchString(s) {
		return "", fmt.Errorf("version %.60q: versions of images look like 1.4.0 or 1.5.0~rc.1", s)
	}
	return Version(s), nil
}

// Compare returns -1, 0 or 1 as v is older than w, the same, or newer. Both are valid.
func (v Version) Compare(w Version) int {
	release, before, _ := strings.Cut(string(v), "~")
	release2, before2, _ := strings.Cut(string(w), "~")
	if c := comparePoints(release, release2); c != 0 {
		return c
	}
	switch {
	case before == before2:
		return 0
	case before == "": // the release itself comes after all that lead to it
		return 1
	case before2 == "":
		return -1
	}
	return comparePoints(before, before2)
}

// comparePoints compares parts between dots, numbers as numbers. What ends first is older.
func comparePoints(a, b string) int {
	x, y := strings.Split(a, "."), strings.Split(b, ".")
	for i := range min(len(x), len(y)) {
		n, err := strconv.ParseUint(x[i], 10, 64)
		m, err2 := strconv.ParseUint(y[i], 10, 64)
		c := 0
		switch {
		case err == nil && err2 == nil:
			c = cmp.Compare(n, m)
		case err == nil: // numbers are before letters
			return -1
		case err2 == nil:
			return 1
		default:
			c = cmp.Compare(x[i], y[i])
		}
		if c != 0 {
			return c
		}
	}
	return cmp.Compare(len(x), len(y))
}

// Entry is the name of a unified kernel image among systemd-boot's, with its counter of tries (systemd's Automatic Boot Assessment):
//
//	sallyway_1.4.0.efi        good: it is not counted any more
//	sallyway_1.5.0+3.efi      new, three tries left
//	sallyway_1.5.0+1-2.efi    two tries were not blessed, one is left
//	sallyway_1.5.0+0-3.efi    no try is left; it is not started as long as there is another
type Entry struct {
	Version Version
	Counted bool
	Left    int // tries; 0 unless Counted
	Done    int
}

const (
	prefix   = "sallyway_"
	suffix   = ".efi"
	maxTries = 99
)

// ParseEntry reads the name of an image. Upper and lower case are the same, as on FAT and for the firmware. It says false for files that are not ours.
func ParseEntry(name string) (Entry, bool) {
	e, got, ok := parseEntry(name)
	return e, ok && got == suffix
}

// parseEntry reads the name of an image or of a boot loader's entry, and returns its suffix.
func parseEntry(name string) (Entry, string, bool) {
	name = strings.ToLower(name)
	name, ok := strings.CutPrefix(name, prefix)
	if !ok {
		return Entry{}, "", false
	}
	for _, end := range []string{suffix, ".conf"} {
		if rest, ok := strings.CutSuffix(name, end); ok {
			e, ok := parseCounted(rest)
			return e, end, ok
		}
	}
	return Entry{}, "", false
}

func parseCounted(name string) (Entry, bool) {
	version, counter, counted := strings.Cut(name, "+")
	if len(version) > maxVersion || !versions.MatchString(version) {
		return Entry{}, false
	}
	e := Entry{Version: Version(version), Counted: counted}
	if !counted {
		return e, true
	}
	left, done, tried := strings.Cut(counter, "-")
	var ok bool
	if e.Left, ok = tries(left); !ok {
		return Entry{}, false
	}
	if tried {
		if e.Done, ok = tries(done); !ok {
			return Entry{}, false
		}
	}
	return e, true
}

func tries(s string) (int, bool) {
	if s == "" || len(s) > 2 || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.Atoi(s)
	return n, err == nil
}

// String is the file name.
func (e Entry) String() string {
	switch {
	case !e.Counted:
		return prefix + string(e.Version) + suffix
	case e.Done == 0:
		return fmt.Sprintf("%s%s+%d%s", prefix, e.Version, e.Left, suffix)
	}
	return fmt.Sprintf("%s%s+%d-%d%s", prefix, e.Version, e.Left, e.Done, suffix)
}

// Failed says that all tries were used up and none was blessed. The entry that runs in its last try looks like it, too.
func (e Entry) Failed() bool { return e.Counted && e.Left == 0 }
