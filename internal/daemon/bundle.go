package daemon

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"sallyway/internal/version"
)

// bundleFacts are files of the kernel that say how the host is set up; none holds a secret.
var bundleFacts = []string{
	"/proc/version", "/etc/os-release", "/proc/net/dev", "/proc/net/route", "/proc/net/snmp", "/proc/loadavg", "/proc/meminfo", "/proc/sys/net/core/rmem_max",
	"/proc/sys/net/core/wmem_max", "/proc/sys/net/ipv4/ip_local_port_range", "/etc/resolv.conf",
}

// maxBundleFact bounds what is taken of one file, in bytes.
const maxBundleFact = 64 << 10

// writeBundle writes what helps somebody else to see what is wrong: the checks, the status, versions, the host's network, names and modes of
// the state folder's files. Contents of these are left out, and what looks like a secret is masked everywhere. An existing file is not replaced.
func writeBundle(ctx context.Context, path string, spec Spec, stateDir string, checks []Check, now time.Time) error {
	doc, err := json.MarshalIndent(checks, "", "  ")
	if err != nil {
		return err
	}
	files := map[string][]byte{"doctor.json": doc, "state.txt": listState(stateDir)}
	if v, err := json.MarshalIndent(version.Get(), "", "  "); err == nil {
		files["version.json"] = v
	}
	files["program.txt"] = fmt.Appendf(nil, "%s %s/%s\n", spec.Name, runtime.GOOS, runtime.GOARCH)
	var status json.RawMessage
	if err := Dial(stateDir).Get(ctx, "/status", &status); err == nil {
		files["status.json"] = status
	} else {
		files["status.txt"] = []byte(err.Error() + "\n")
	}
	for _, name := range bundleFacts {
		if b, err := os.ReadFile(name); err == nil { // not every host has all
			files["host/"+strings.ReplaceAll(strings.Trim(name, "/"), "/", "_")] = b[:min(len(b), maxBundleFact)]
		}
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = pack(f, files, now)
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// pack writes files as a compressed tar archive, masked.
func pack(f *os.File, files map[string][]byte, now time.Time) error {
	z := gzip.NewWriter(f)
	t := tar.NewWriter(z)
	for _, name := range sortedNames(files) {
		b := mask(files[name])
		if err := t.WriteHeader(&tar.Header{Name: "sallyway/" + name, Mode: 0o600, Size: int64(len(b)), ModTime: now, Format: tar.FormatPAX}); err != nil {
			return err
		}
		if _, err := t.Write(b); err != nil {
			return err
		}
	}
	return errors.Join(t.Close(), z.Close())
}

func sortedNames(files map[string][]byte) []string {
	return slices.Sorted(maps.Keys(files))
}

// listState lists a state folder: names, modes, sizes and times.
func listState(dir string) []byte {
	var b bytes.Buffer
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			fmt.Fprintf(&b, "%s: %v\n", path, err)
			return nil
		}
		if info, err := d.Info(); err == nil {
			fmt.Fprintf(&b, "%v %10d %s %s\n", info.Mode(), info.Size(), info.ModTime().UTC().Format(time.RFC3339), path)
		}
		return nil
	})
	if err != nil {
		fmt.Fprintln(&b, err)
	}
	return b.Bytes()
}

// masked stands in the place of a secret.
const masked = "(masked)"

// urlPassword is user and password of a URL, such as a proxy's.
var urlPassword = regexp.MustCompile(`://[^/\s:@"]+:[^/\s@"]+@`)

// masks are what looks like a secret: enrolment and bearer tokens, JWTs, private keys, and values whose name says so.
var masks = []struct {
	re   *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`swe1\.[A-Za-z0-9_-]+`), masked},
	{regexp.MustCompile(`eyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*`), masked},
	{regexp.MustCompile(`(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----`), masked},
	{regexp.MustCompile(`(?i)bearer +[^\s"]+`), masked},
	{regexp.MustCompile(`(?i)((?:password|passwd|secret|token|credential|private[_-]?key|api[_-]?key)\\?"?\s*[:=]\s*\\?")([^"\\]+)`), `${1}` + masked}, // quoted, in JSON in JSON too
	{regexp.MustCompile(`(?i)((?:password|passwd|secret|token|credential|private[_-]?key|api[_-]?key)\s*[:=]\s*)([^\s,}"\\]+)`), `${1}` + masked},
	{urlPassword, "://" + masked + "@"},
}

// mask replaces what looks like a secret.
func mask(b []byte) []byte {
	for _, m := range masks {
		b = m.re.ReplaceAll(b, []byte(m.with))
	}
	return b
}
