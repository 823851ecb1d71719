package version

import (
	"strconv"
	"strings"
)

// Outdated reports whether a program that calls itself v is of an older release than this one: an older major or minor version, or one that is not known.
// A program without a version of its own (devel) calls none outdated.
func Outdated(v string) bool { return outdated(v, Get().Version) }

func outdated(v, own string) bool {
	major, minor, known := release(own)
	if !known {
		return false
	}
	m, n, known := release(v)
	return !known || m < major || m == major && n < minor
}

// release reads major and minor of a version such as v1.2.3 or v1.2.3-4-g0123abcd.
func release(v string) (major, minor int, ok bool) {
	rest, ok := strings.CutPrefix(v, "v")
	parts := strings.SplitN(rest, ".", 3)
	if !ok || len(parts) < 3 {
		return 0, 0, false
	}
	major, err1 := strconv.Atoi(parts[0])
	minor, err2 := strconv.Atoi(parts[1])
	return major, minor, err1 == nil && err2 == nil && major >= 0 && minor >= 0
}
