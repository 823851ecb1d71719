// Package oci makes container images of the programs, without a container engine, without root and without a base image:
// a static program, the certificate authorities of the public web, a user, and an empty folder for state.
//
//	/usr/bin/relayd                      the program
//	/etc/ssl/certs/ca-certificates.crt   public certificate authorities
//	/etc/passwd, /etc/group              root, and sallyway (65532), whom the program runs as
//	/etc/sallyway, /run/secrets          empty, for configuration and tokens to be mounted
//	/etc/nsswitch.conf                   names: hosts file first, then DNS
//	/var/lib/sallyway                    the volume; the state folder is made below it
//	/tmp                                 empty, for who mounts something there
//	/usr/share/doc/sallyway              licence, and NOTICES.gz: those of what is linked into the program
//
// The same source, Go release and time give the same bytes. There is no shell; nothing secret is in an image.
//
//	images, err := oci.Build(oci.Config{Binary: open, Arches: []string{"amd64", "arm64"}, Version: "v1.2.3", Created: time.Unix(epoch, 0)})
//	err = oci.Save(images, "dist/containers")
package oci

import (
	"cmp"
	"fmt"
	"regexp"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	// UID is the user and group that the programs run as. Nothing of theirs needs root.
	UID = 65532
	// StateRoot is the volume of every image. A daemon's state folder is below it.
	StateRoot = "/var/lib/sallyway"
	// DefaultRepository begins the images' names. It is no registry, so an image that was not loaded is not fetched from a stranger's.
	DefaultRepository = "localhost/sallyway"
	// MaxSize is the most bytes that an image may have, compressed, with its configuration.
	MaxSize = 15_000_000
)

// Timing of the health check. The check asks the daemon over its control socket and costs a few milliseconds.
const (
	healthInterval = 30 * time.Second
	healthTimeout  = 5 * time.Second
	healthStart    = 30 * time.Second // to enrol and to be told its configuration
	healthRetries  = 3
)

// Program is what one image runs.
type Program struct {
	Name    string   // of the program and of the image
	Title   string   // for the labels
	Command []string // what follows the program, before arguments of the user's
	Health  []string // what follows the program for the health check
	Env     []string // defaults, which the user's environment and arguments come before
	Ports   []string // that the program listens on for others, such as 5349/udp
}

// Programs are the images, in the order in which they are built.
func Programs() []Program {
	return []Program{
		{
			Name: "gatewayd", Title: "Sallyway gateway: a way into a private network that opens no port",
			Command: []string{"up"}, Health: []string{"healthcheck"},
			Env: []string{"SALLYWAY_STATE=" + StateRoot + "/gatewayd"},
		},
		{
			Name: "relayd", Title: "Sallyway relay: gateways and clients meet here, end to end encrypted",
			Command: []string{"start"}, Health: []string{"healthcheck"},
			Env: []string{"SALLYWAY_STATE=" + StateRoot + "/relayd"},
			// Relayed ports are not here: published one by one they cost an engine a process or a rule each, and Sallyway's own nodes need none.
			Ports: []string{"5349/udp", "5349/tcp", "2222/tcp", "8443/tcp"},
		},
		{
			Name: "platformd", Title: "Sallyway platform: who may reach what, certificates, relays, audit",
			Command: []string{"serve"}, Health: []string{"healthcheck"},
			// Without CAP_NET_BIND_SERVICE 443 cannot be had everywhere; 8443 is the relay's.
			Env:   []string{"SALLYWAY_DATA=" + StateRoot + "/platformd", "SALLYWAY_LISTEN=:4443"},
			Ports: []string{"4443/tcp"},
		},
		{
			Name: "sallyway-license", Title: "Sallyway licence service: signs what customers' platforms may have",
			Command: []string{"serve"}, Health: []string{"healthcheck"},
			Env:   []string{"SALLYWAY_DATA=" + StateRoot + "/license", "SALLYWAY_LISTEN=:4000"},
			Ports: []string{"4000/tcp"},
		},
		{
			Name: "sallyway", Title: "Sallyway client: reach private resources from this container",
			Command: []string{"connect"}, Health: []string{"connect", "healthcheck"},
			Env: []string{"SALLYWAY_STATE=" + StateRoot + "/client"},
		},
	}
}

// Path is where the program lies in its image.
func (p Program) Path() string { return "/usr/bin/" + p.Name }

// Config says what to build.
type Config struct {
	// Binary returns the path of a program that was built for linux on an architecture of Go's.
	Binary     func(program, arch string) (string, error)
	Programs   []Program // empty: all
	Arches     []string  // empty: amd64 and arm64
	Repository string    // empty: DefaultRepository
	Version    string    // empty: devel
	Commit     string    // of the source; empty where unknown
	Created    time.Time // zero: 1970; whole seconds
	License    []byte    // text of the licence
	// Notices returns the licences of what is linked into a program; nil leaves them out.
	Notices func(program, arch string) ([]byte, error)
}

// architectures are what is built where nobody says otherwise.
var architectures = []string{"amd64", "arm64"}

// Image is the image of one program for one architecture.
type Image struct {
	Content v1.Image
	Program Program
	Arch    string
	Name    string // repository, name and tag
	Size    int64  // compressed layers and configuration, in bytes
}

// Build makes the images, those of one program next to each other. One that is larger than MaxSize is an error.
func Build(c Config) ([]Image, error) {
	if len(c.Programs) == 0 {
		c.Programs = Programs()
	}
	if len(c.Arches) == 0 {
		c.Arches = architectures
	}
	c.Repository = cmp.Or(c.Repository, DefaultRepository)
	c.Version = cmp.Or(c.Version, "devel")
	c.Created = c.Created.UTC().Truncate(time.Second)
	if c.Created.IsZero() {
		c.Created = time.Unix(0, 0).UTC()
	}
	base, err := c.base()
	if err != nil {
		return nil, err
	}
	var out []Image
	for _, p := range c.Programs {
		for _, arch := range c.Arches {
			i, err := c.image(p, arch, base)
			if err != nil {
				return nil, fmt.Errorf("image %s for %s: %w", p.Name, arch, err)
			}
			out = append(out, i)
		}
	}
	return out, nil
}

// notInTag is what a tag cannot have: git describes releases with a plus sign, say.
var notInTag = regexp.MustCompile(`[^A-Za-z0-9_.-]`)

func (c *Config) image(p Program, arch string, base v1.Layer) (Image, error) {
	i := Image{Program: p, Arch: arch, Name: c.Repository + "/" + p.Name + ":" + notInTag.ReplaceAllString(c.Version, "-")}
	path, err := c.Binary(p.Name, arch)
	if err != nil {
		return i, err
	}
	program, err := c.program(p, arch, path)
	if err != nil {
		return i, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	history := func(what string) v1.History {
		return v1.History{Created: v1.Time{Time: c.Created}, CreatedBy: what}
	}
	img, err = mutate.Append(img,
		mutate.Addendum{Layer: base, History: history("user, certificate authorities, folder for state"), MediaType: types.OCILayer},
		mutate.Addendum{Layer: program, History: history(p.Path()), MediaType: types.OCILayer})
	if err != nil {
		return i, err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return i, err
	}
	file = file.DeepCopy()
	file.Architecture, file.OS, file.Created = arch, "linux", v1.Time{Time: c.Created}
	file.Config = c.config(p)
	if i.Content, err = mutate.ConfigFile(img, file); err != nil {
		return i, err
	}
	if i.Size, err = size(i.Content); err != nil {
		return i, err
	}
	if i.Size > MaxSize {
		return i, fmt.Errorf("%d bytes compressed: more than the %d that an image may have", i.Size, MaxSize)
	}
	return i, nil
}

// config is what an engine reads to run the image.
func (c *Config) config(p Program) v1.Config {
	var ports map[string]struct{}
	if len(p.Ports) > 0 {
		ports = make(map[string]struct{}, len(p.Ports))
	}
	for _, port := range p.Ports {
		ports[port] = struct{}{}
	}
	labels := map[string]string{
		"org.opencontainers.image.title":       p.Name,
		"org.opencontainers.image.description": p.Title,
		"org.opencontainers.image.vendor":      "Sallyway",
		"org.opencontainers.image.licenses":    "Apache-2.0",
		"org.opencontainers.image.version":     c.Version,
		"org.opencontainers.image.created":     c.Created.Format(time.RFC3339),
	}
	if c.Commit != "" {
		labels["org.opencontainers.image.revision"] = c.Commit
	}
	return v1.Config{
		User:         fmt.Sprintf("%d:%d", UID, UID),
		Entrypoint:   append([]string{p.Path()}, p.Command...),
		Env:          append([]string{"PATH=/usr/bin", "HOME=" + StateRoot}, p.Env...),
		ExposedPorts: ports,
		Volumes:      map[string]struct{}{StateRoot: {}},
		WorkingDir:   "/",
		StopSignal:   "SIGTERM",
		Labels:       labels,
		// Docker's own: the OCI format has no health check, and engines that read that format alone pass over it.
		Healthcheck: &v1.HealthConfig{
			Test:     append([]string{"CMD", p.Path()}, p.Health...),
			Interval: healthInterval, Timeout: healthTimeout, StartPeriod: healthStart, Retries: healthRetries,
		},
	}
}

// size is what has to be fetched for an image.
func size(img v1.Image) (int64, error) {
	m, err := img.Manifest()
	if err != nil {
		return 0, err
	}
	n := m.Config.Size
	for _, l := range m.Layers {
		n += l.Size
	}
	return n, nil
}

// byName groups the images of one name, which differ in their architecture. Names keep their order.
func byName(images []Image) (names []string, groups map[string][]Image) {
	groups = map[string][]Image{}
	for _, i := range images {
		if groups[i.Name] == nil {
			names = append(names, i.Name)
		}
		groups[i.Name] = append(groups[i.Name], i)
	}
	return names, groups
}
