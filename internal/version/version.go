// Package version says which Sallyway this binary is.
//
// The Makefile sets Version and Commit through the linker:
//
//	go build -ldflags "-X sallyway/internal/version.Version=v1.2.3 -X sallyway/internal/version.Commit=0123abcd"
//
// A binary built without it falls back on what the Go tool chain recorded, and says "devel" where it recorded nothing.
package version

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// Version and Commit are set by the linker. They are read through Get, which fills what is missing.
var (
	Version string
	Commit  string
)

// Info describes a build.
type Info struct {
	Version string `json:"version"` // v1.2.3, or devel
	Commit  string `json:"commit"`  // abbreviated Git hash, -dirty appended where the tree had changes; "" where unknown
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
}

// Get returns the build's description. It may be called concurrently.
func Get() Info {
	bi, _ := debug.ReadBuildInfo()
	return from(Version, Commit, bi)
}

// from fills what the linker left empty from bi, which may be nil.
func from(version, commit string, bi *debug.BuildInfo) Info {
	i := Info{Version: version, Commit: commit, Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH}
	if bi != nil {
		if i.Version == "" && bi.Main.Version != "" && bi.Main.Version != "(devel)" {
			i.Version = bi.Main.Version
		}
		if i.Commit == "" {
			i.Commit = revision(bi.Settings)
		}
	}
	if i.Version == "" {
		i.Version = "devel"
	}
	return i
}

// revision finds the abbreviated Git hash among the build settings; it is empty under -buildvcs=false.
func revision(settings []debug.BuildSetting) string {
	var rev, dirty string
	for _, s := range settings {
		switch {
		case s.Key == "vcs.revision":
			rev = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "-dirty"
		}
	}
	if rev == "" {
		return ""
	}
	if len(rev) > 12 {
		rev = rev[:12]
	}
	return rev + dirty
}

// String is the one line that `version` prints.
func (i Info) String() string {
	s := i.Version
	if i.Commit != "" {
		s += " (" + i.Commit + ")"
	}
	return fmt.Sprintf("%s %s %s/%s", s, i.Go, i.OS, i.Arch)
}
