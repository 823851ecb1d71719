package oci

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/pem"
	"fmt"
	"io"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// entry is a file or, with a mode that says so, a folder of a layer.
type entry struct {
	path string // without a leading slash
	mode int64  // permissions
	dir  bool
	data []byte
}

// stateMode is that of the volume's root: whoever the container runs as may make its state folder there, and takes 0700 for it. Root without
// CAP_DAC_OVERRIDE and the random users of some clusters could not do so in a folder of UID's.
const stateMode = 0o1777

// base is the layer that all images share.
func (c *Config) base() (v1.Layer, error) {
	passwd := fmt.Sprintf("root:x:0:0:root:/root:/sbin/nologin\nsallyway:x:%d:%[1]d:Sallyway:%s:/sbin/nologin\n", UID, StateRoot)
	group := fmt.Sprintf("root:x:0:\nsallyway:x:%d:\n", UID)
	entries := []entry{
		{path: "etc", mode: 0o755, dir: true},
		{path: "etc/group", mode: 0o644, data: []byte(group)},
		{path: "etc/nsswitch.conf", mode: 0o644, data: []byte("hosts: files dns\n")},
		{path: "etc/passwd", mode: 0o644, data: []byte(passwd)},
		{path: "etc/sallyway", mode: 0o755, dir: true},
		{path: "etc/ssl", mode: 0o755, dir: true},
		{path: "etc/ssl/certs", mode: 0o755, dir: true},
		{path: "etc/ssl/certs/ca-certificates.crt", mode: 0o644, data: roots()},
		{path: "run", mode: 0o755, dir: true},
		{path: "run/secrets", mode: 0o755, dir: true},
		{path: "tmp", mode: 0o1777, dir: true},
		{path: "usr", mode: 0o755, dir: true},
		{path: "usr/share", mode: 0o755, dir: true},
		{path: "usr/share/doc", mode: 0o755, dir: true},
		{path: "usr/share/doc/sallyway", mode: 0o755, dir: true},
		{path: "usr/share/doc/sallyway/LICENSE", mode: 0o644, data: c.License},
		{path: "var", mode: 0o755, dir: true},
		{path: "var/lib", mode: 0o755, dir: true},
		{path: StateRoot[1:], mode: stateMode, dir: true},
	}
	return c.layer(entries)
}

// program is the layer with the program, and what has to be said of whose work is in it.
func (c *Config) program(p Program, arch, path string) (v1.Layer, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	entries := []entry{
		{path: "usr", mode: 0o755, dir: true},
		{path: "usr/bin", mode: 0o755, dir: true},
		{path: p.Path()[1:], mode: 0o755, data: b},
	}
	if c.Notices != nil {
		text, err := c.Notices(p.Name, arch)
		if err != nil {
			return nil, err
		}
		var packed bytes.Buffer
		w, err := gzip.NewWriterLevel(&packed, gzip.BestCompression)
		if err != nil {
			return nil, err
		}
		if _, err := w.Write(text); err != nil {
			return nil, err
		}
		if err := w.Close(); err != nil {
			return nil, err
		}
		entries = append(entries, entry{path: "usr/share/doc/sallyway/NOTICES.gz", mode: 0o644, data: packed.Bytes()})
	}
	return c.layer(entries)
}

// roots are the certificate authorities of the public web as Go's x509roots has them, in PEM. They come with a module, so an image does not
// depend on the host that it was built on. Those with conditions that PEM cannot say (distrusted after a date) are left out.
func roots() []byte {
	var b bytes.Buffer
	for r := range bundle.Roots() {
		if r.Constraint != nil {
			continue
		}
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: r.Certificate}) // a buffer takes all
	}
	return b.Bytes()
}

// layer packs entries. Everything is root's and of the build's time.
func (c *Config) layer(entries []entry) (v1.Layer, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.path, Mode: e.mode, Size: int64(len(e.data)), ModTime: c.Created, Typeflag: tar.TypeReg, Format: tar.FormatUSTAR}
		if e.dir {
			h.Name, h.Typeflag = e.path+"/", tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("pack %s: %w", e.path, err)
		}
		if _, err := w.Write(e.data); err != nil {
			return nil, fmt.Errorf("pack %s: %w", e.path, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil }
	return tarball.LayerFromOpener(open, tarball.WithMediaType(types.OCILayer), tarball.WithCompressedCaching, tarball.WithCompressionLevel(gzip.BestCompression))
}
