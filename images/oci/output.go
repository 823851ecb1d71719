package oci

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Names below the folder that Save writes to.
const (
	// LayoutDir is an OCI image layout with an index per program: every architecture of it.
	LayoutDir = "oci"
	// SumsFile holds the SHA-256 of every archive, as sha256sum checks them.
	SumsFile = "SHA256SUMS"
)

// Archive is the file name of an image as docker and podman load it.
func (i Image) Archive() string { return i.Program.Name + "-" + i.Arch + ".tar" }

// Save writes each image as an archive for `docker load` and `podman load`, and all of them into one OCI image layout. What an earlier call
// wrote in dir is replaced.
func Save(images []Image, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var sums []byte
	for _, i := range images {
		tag, err := name.NewTag(i.Name)
		if err != nil {
			return fmt.Errorf("name of the image: %w", err)
		}
		path := filepath.Join(dir, i.Archive())
		if err := tarball.WriteToFile(path, tag, i.Content); err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		sums = fmt.Appendf(sums, "%x  %s\n", sha256.Sum256(b), i.Archive())
	}
	if err := os.WriteFile(filepath.Join(dir, SumsFile), sums, 0o644); err != nil {
		return err
	}
	return saveLayout(images, filepath.Join(dir, LayoutDir))
}

func saveLayout(images []Image, dir string) error {
	switch _, err := os.Stat(filepath.Join(dir, "oci-layout")); {
	case err == nil:
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return fmt.Errorf("write %s: %w", dir, err)
	}
	names, groups := byName(images)
	for _, n := range names {
		// The first is what the specification says, the second is how containerd names what it imports.
		note := layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": n, "io.containerd.image.name": n})
		if err := path.AppendIndex(index(groups[n]), note); err != nil {
			return fmt.Errorf("write %s to %s: %w", n, dir, err)
		}
	}
	return nil
}

// index joins the architectures of one program.
func index(images []Image) v1.ImageIndex {
	out := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, i := range images {
		out = mutate.AppendManifests(out, mutate.IndexAddendum{
			Add: i.Content, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: i.Arch}},
		})
	}
	return out
}

// Push sends every program's index to the registry that its name begins with, with the login that `docker login` or `podman login` left, and
// returns what can be pulled: the names with their digests.
func Push(ctx context.Context, images []Image) ([]string, error) {
	names, groups := byName(images)
	var out []string
	for _, n := range names {
		tag, err := name.NewTag(n)
		if err != nil {
			return out, fmt.Errorf("name of the image: %w", err)
		}
		idx := index(groups[n])
		if err := remote.WriteIndex(tag, idx, remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain)); err != nil {
			return out, fmt.Errorf("push %s: %w", n, err)
		}
		d, err := idx.Digest()
		if err != nil {
			return out, err
		}
		out = append(out, n+"@"+d.String())
	}
	return out, nil
}
