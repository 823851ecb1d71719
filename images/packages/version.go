package main

import (
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// version is what is packaged.
type version struct {
	Tag     string    // of `git describe`: v1.2.3, v1.2.3-4-g0123abc, "" without a tag
	Commit  string    // abbreviated, -dirty appended where the tree has changes
	Time    time.Time // of the commit: every date in a package is this one
	Package string    // valid for dpkg and rpm alike
}

// describe asks git about the tree in dir.
func describe(dir string) (version, error) {
	git := func(args ...string) (string, error) { return output("git", append([]string{"-C", dir}, args...)...) }
	commit, err := git("rev-parse", "--short=12", "HEAD")
	if err != nil {
		return version{}, err
	}
	seconds, err := git("log", "-1", "--format=%ct")
	if err != nil {
		return version{}, err
	}
	n, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return version{}, fmt.Errorf("time of the commit: %w", err)
	}
	tag, _ := git("describe", "--tags", "--match", "v[0-9]*") // none is no error
	v := version{Tag: tag, Commit: commit, Time: time.Unix(n, 0).UTC()}
	if exec.Command("git", "-C", dir, "diff", "--quiet", "HEAD").Run() != nil {
		v.Commit += "-dirty"
	}
	v.Package = packageVersion(v)
	return v, nil
}

// described is what `git describe` says: a tag, how many commits are since, and the last of these.
var described = regexp.MustCompile(`^v([0-9]+(?:\.[0-9]+)*)(?:-([0-9A-Za-z.]*[A-Za-z][0-9A-Za-z.]*?))?(?:-([0-9]+)-g([0-9a-f]+))?$`)

// packageVersion turns a version into one that dpkg and rpm both take and order the same way: a release candidate
// before its release (~), what came after a release behind it (+), and what has no tag before every release. deb-version(7)
// and rpm-version(7) allow letters, digits and . + ~ in both.
func packageVersion(v version) string {
	hash, dirty := strings.CutSuffix(v.Commit, "-dirty")
	s := fmt.Sprintf("0.0~git%s.%s", v.Time.Format("20060102150405"), hash)
	if m := described.FindStringSubmatch(v.Tag); m != nil {
		s = m[1]
		if m[2] != "" {
			s += "~" + m[2]
		}
		if m[3] != "" {
			s += "+" + m[3] + ".g" + m[4]
		}
	}
	if dirty {
		s += "+dirty"
	}
	return s
}
