package oci_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/spf13/cobra"

	"sallyway/client"
	"sallyway/gateway"
	"sallyway/images/oci"
	"sallyway/internal/lab"
	"sallyway/license"
	"sallyway/platform/platformd"
	"sallyway/relay/relayd"
)

// created is the time of the tests' images.
var created = time.Unix(1_700_000_000, 0)

// compiler builds from this source tree into dir.
func compiler(t *testing.T, dir string) oci.Compiler {
	t.Helper()
	root, err := lab.SourceRoot()
	if err != nil {
		t.Fatal(err)
	}
	return oci.Compiler{Go: "go", Source: root, Dir: dir, Version: "v1.2.3+test", Commit: "0123456789ab"}
}

// build makes the images of the real programs for this machine.
func build(t *testing.T, dir string) []oci.Image {
	t.Helper()
	c := compiler(t, dir)
	if err := c.Compile(t.Context(), runtime.GOARCH, oci.Programs()); err != nil {
		t.Fatal(err)
	}
	return assemble(t, oci.Config{Binary: c.Binary, Notices: c.Notices, Arches: []string{runtime.GOARCH}})
}

func assemble(t *testing.T, c oci.Config) []oci.Image {
	t.Helper()
	c.Version, c.Commit, c.Created, c.License = "v1.2.3+test", "0123456789ab", created, []byte("the licence\n")
	images, err := oci.Build(c)
	if err != nil {
		t.Fatal(err)
	}
	return images
}

// small makes images of a few bytes that are different for each program and architecture.
func small(t *testing.T, repository string) []oci.Image {
	t.Helper()
	dir := t.TempDir()
	return assemble(t, oci.Config{Repository: repository, Notices: notices, Binary: func(program, arch string) (string, error) {
		path := filepath.Join(dir, program+"-"+arch)
		return path, os.WriteFile(path, []byte(path[len(dir):]), 0o755)
	}})
}

// notices stands for the licences of a program.
func notices(program, arch string) ([]byte, error) {
	return []byte("licences in " + program + " for " + arch), nil
}

// content is every entry of an image's file system.
func content(t *testing.T, img v1.Image) (map[string]*tar.Header, map[string][]byte) {
	t.Helper()
	r := mutate.Extract(img)
	defer r.Close()
	headers, data := map[string]*tar.Header{}, map[string][]byte{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return headers, data
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		path := "/" + strings.TrimSuffix(h.Name, "/")
		headers[path], data[path] = h, b
	}
}

func TestImage(t *testing.T) {
	for _, i := range small(t, "") {
		t.Run(i.Program.Name+"-"+i.Arch, func(t *testing.T) {
			file, err := i.Content.ConfigFile()
			if err != nil {
				t.Fatal(err)
			}
			if want := oci.DefaultRepository + "/" + i.Program.Name + ":v1.2.3-test"; i.Name != want {
				t.Errorf("name %q, want %q", i.Name, want)
			}
			if file.Architecture != i.Arch || file.OS != "linux" || !file.Created.Equal(created) {
				t.Errorf("config is for %s/%s of %v", file.OS, file.Architecture, file.Created)
			}
			c := file.Config
			if want := append([]string{"/usr/bin/" + i.Program.Name}, i.Program.Command...); !slices.Equal(c.Entrypoint, want) || len(c.Cmd) != 0 {
				t.Errorf("entry point %q %q, want %q", c.Entrypoint, c.Cmd, want)
			}
			if c.User != "65532:65532" || c.StopSignal != "SIGTERM" {
				t.Errorf("user %q, stop signal %q", c.User, c.StopSignal)
			}
			if _, ok := c.Volumes[oci.StateRoot]; !ok || len(c.Volumes) != 1 {
				t.Errorf("volumes %v", c.Volumes)
			}
			if h := c.Healthcheck; h == nil || !slices.Equal(h.Test, append([]string{"CMD", "/usr/bin/" + i.Program.Name}, i.Program.Health...)) {
				t.Errorf("health check %+v", h)
			}
			for label, want := range map[string]string{"version": "v1.2.3+test", "revision": "0123456789ab", "created": "2023-11-14T22:13:20Z", "licenses": "Apache-2.0", "title": i.Program.Name} {
				if got := c.Labels["org.opencontainers.image."+label]; got != want {
					t.Errorf("label %s is %q, want %q", label, got, want)
				}
			}

			headers, data := content(t, i.Content)
			for path, h := range headers {
				if h.Uid != 0 || h.Gid != 0 || !h.ModTime.Equal(created) {
					t.Errorf("%s is of %d:%d and %v", path, h.Uid, h.Gid, h.ModTime)
				}
				if path != oci.StateRoot && path != "/tmp" && h.Mode&0o022 != 0 {
					t.Errorf("%s can be written by others: %o", path, h.Mode)
				}
				if h.Mode&0o6000 != 0 {
					t.Errorf("%s is set-id: %o", path, h.Mode)
				}
				if h.Typeflag != tar.TypeDir && h.Mode&0o111 != 0 && path != i.Program.Path() {
					t.Errorf("%s can be run", path)
				}
				if h.Typeflag != tar.TypeDir && h.Typeflag != tar.TypeReg {
					t.Errorf("%s is of type %c", path, h.Typeflag)
				}
			}
			if string(data["/usr/bin/"+i.Program.Name]) != "/"+i.Program.Name+"-"+i.Arch {
				t.Errorf("the program is %.50q", data["/usr/bin/"+i.Program.Name])
			}
			if !strings.Contains(string(data["/etc/passwd"]), ":65532:65532:") || string(data["/usr/share/doc/sallyway/LICENSE"]) != "the licence\n" {
				t.Errorf("passwd %q", data["/etc/passwd"])
			}
			packed, err := gzip.NewReader(bytes.NewReader(data["/usr/share/doc/sallyway/NOTICES.gz"]))
			if err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(packed); err != nil || string(b) != "licences in "+i.Program.Name+" for "+i.Arch {
				t.Errorf("notices: %q, %v", b, err)
			}
			if h := headers[oci.StateRoot]; h == nil || h.Typeflag != tar.TypeDir {
				t.Errorf("%s is not there", oci.StateRoot)
			}
			pool := x509.NewCertPool()
			if !pool.AppendCertsFromPEM(data["/etc/ssl/certs/ca-certificates.crt"]) || bytes.Count(data["/etc/ssl/certs/ca-certificates.crt"], []byte("BEGIN")) < 80 {
				t.Error("hardly any certificate authority")
			}
		})
	}
}

// A build of the same source is the same bytes: programs, archives, layout, sums.
func TestBuildsAreEqual(t *testing.T) {
	c, again := compiler(t, t.TempDir()), compiler(t, t.TempDir())
	relay := oci.Programs()[1:2]
	for _, c := range []oci.Compiler{c, again} {
		if err := c.Compile(t.Context(), runtime.GOARCH, relay); err != nil {
			t.Fatal(err)
		}
	}
	dirs := [2]string{t.TempDir(), t.TempDir()}
	for n, c := range []oci.Compiler{c, again} {
		images := assemble(t, oci.Config{Programs: relay, Arches: []string{runtime.GOARCH}, Binary: c.Binary, Notices: c.Notices})
		for range 2 { // the second replaces the first
			if err := oci.Save(images, dirs[n]); err != nil {
				t.Fatal(err)
			}
		}
	}
	files := [2]map[string][]byte{}
	for n, dir := range dirs {
		files[n] = map[string][]byte{}
		err := fs.WalkDir(os.DirFS(dir), ".", func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			files[n][path], err = os.ReadFile(filepath.Join(dir, path))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(files[0]) < 8 || len(files[0]) != len(files[1]) {
		t.Fatalf("%d and %d files", len(files[0]), len(files[1]))
	}
	for path, b := range files[0] {
		if !bytes.Equal(b, files[1][path]) {
			t.Errorf("%s is not the same: %d and %d bytes", path, len(b), len(files[1][path]))
		}
	}
}

func TestTooLarge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "program")
	b := make([]byte, oci.MaxSize)
	_, _ = rand.Read(b) // does not compress
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := oci.Build(oci.Config{Programs: oci.Programs()[:1], Binary: func(string, string) (string, error) { return path, nil }})
	if err == nil || !strings.Contains(err.Error(), "gatewayd for amd64") {
		t.Fatalf("an image of %d bytes was built: %v", len(b), err)
	}
}

func TestLayout(t *testing.T) {
	dir := t.TempDir()
	if err := oci.Save(small(t, ""), dir); err != nil {
		t.Fatal(err)
	}
	path, err := layout.FromPath(filepath.Join(dir, oci.LayoutDir))
	if err != nil {
		t.Fatal(err)
	}
	all, err := path.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(all); err != nil {
		t.Fatal(err)
	}
	m, err := all.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Manifests) != len(oci.Programs()) {
		t.Fatalf("%d indexes", len(m.Manifests))
	}
	for n, p := range oci.Programs() {
		if got, want := m.Manifests[n].Annotations["org.opencontainers.image.ref.name"], oci.DefaultRepository+"/"+p.Name+":v1.2.3-test"; got != want {
			t.Errorf("index %d is %q, want %q", n, got, want)
		}
		idx, err := all.ImageIndex(m.Manifests[n].Digest)
		if err != nil {
			t.Fatal(err)
		}
		platforms(t, idx)
	}
}

// platforms wants an index to have both architectures.
func platforms(t *testing.T, idx v1.ImageIndex) {
	t.Helper()
	m, err := idx.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range m.Manifests {
		got = append(got, d.Platform.String())
	}
	if want := []string{"linux/amd64", "linux/arm64"}; !slices.Equal(got, want) {
		t.Errorf("platforms %v, want %v", got, want)
	}
}

func TestPush(t *testing.T) {
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer srv.Close()
	t.Setenv("DOCKER_CONFIG", t.TempDir()) // no login of whoever runs the test
	repository := strings.TrimPrefix(srv.URL, "http://") + "/team/sallyway"
	pushed, err := oci.Push(t.Context(), small(t, repository))
	if err != nil {
		t.Fatal(err)
	}
	if len(pushed) != len(oci.Programs()) {
		t.Fatalf("pushed %q", pushed)
	}
	for n, p := range oci.Programs() {
		tag, digest, _ := strings.Cut(pushed[n], "@")
		if tag != repository+"/"+p.Name+":v1.2.3-test" {
			t.Errorf("pushed %s", pushed[n])
		}
		ref, err := name.ParseReference(tag)
		if err != nil {
			t.Fatal(err)
		}
		idx, err := remote.Index(ref)
		if err != nil {
			t.Fatal(err)
		}
		if d, err := idx.Digest(); err != nil || d.String() != digest {
			t.Errorf("%s has digest %v, want %s (%v)", tag, d, digest, err)
		}
		if err := validate.Index(idx); err != nil {
			t.Error(err)
		}
		platforms(t, idx)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := oci.Push(ctx, small(t, repository)); !errors.Is(err, context.Canceled) {
		t.Errorf("a push that was cancelled: %v", err)
	}
}

// commands are the programs' own command lines.
func commands(t *testing.T) map[string]*cobra.Command {
	t.Helper()
	found := map[string]*cobra.Command{}
	for program, root := range map[string]*cobra.Command{"gatewayd": gateway.Command(), "relayd": relayd.Command(), "platformd": platformd.Command(), "sallyway-license": license.Command(), "sallyway": client.Command()} {
		for _, p := range oci.Programs() {
			if p.Name != program {
				continue
			}
			command := p.Command
			if program == "sallyway" {
				command = command[1:] // root is connect
			}
			cmd, rest, err := root.Find(command)
			if err != nil || len(rest) != 0 || cmd.RunE == nil {
				t.Fatalf("%s has no command %q: %v", program, p.Command, err)
			}
			found[program] = cmd
		}
	}
	return found
}

// flagOf finds the flag that an environment variable sets, "" for none.
func flagOf(cmd *cobra.Command, variable string) string {
	name, ok := strings.CutPrefix(variable, "SALLYWAY_")
	if !ok {
		return ""
	}
	name = strings.ToLower(strings.ReplaceAll(name, "_", "-"))
	if cmd.Flags().Lookup(name) == nil {
		return ""
	}
	return name
}

// The images know the daemons by their command lines: commands, variables and ports are those that these have.
func TestImagesFitTheDaemons(t *testing.T) {
	cmds := commands(t)
	ports := map[string]string{}
	for _, p := range oci.Programs() {
		cmd := cmds[p.Name]
		for _, e := range p.Env {
			variable, value, _ := strings.Cut(e, "=")
			if flagOf(cmd, variable) == "" {
				t.Errorf("%s: no flag is set by %s", p.Name, variable)
			}
			if variable == "SALLYWAY_LISTEN" {
				ports[p.Name] = value[1:] + "/tcp"
			} else if !strings.HasPrefix(value, oci.StateRoot+"/") {
				t.Errorf("%s: %s is not in the volume", p.Name, e)
			}
		}
		if state := p.Env[0]; !strings.HasPrefix(state, "SALLYWAY_STATE=") && !strings.HasPrefix(state, "SALLYWAY_DATA=") {
			t.Errorf("%s has its state in %s", p.Name, state)
		}
	}
	relay := func(flag string) string { return cmds["relayd"].Flags().Lookup(flag).DefValue }
	ports["relayd"] = fmt.Sprintf("%s/udp %[1]s/tcp %s/tcp %s/tcp", relay("listen-port"), relay("ssh-port"), relay("tls-port"))
	for _, p := range oci.Programs() {
		if got := strings.Join(p.Ports, " "); got != ports[p.Name] {
			t.Errorf("%s: ports %q, want %q", p.Name, got, ports[p.Name])
		}
	}
}
