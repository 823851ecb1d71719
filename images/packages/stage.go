package main

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
	"github.com/spf13/pflag"

	"sallyway/images/notices"
	"sallyway/internal/daemon"
)

// stager lays one package out below root, as it will lie on a host.
type stager struct {
	product product
	builder *builder
	format  string // deb or rpm
	root    string
}

// fill writes everything that the package holds.
func (s *stager) fill() error {
	for _, step := range []func() error{s.program, s.unit, s.manual, s.completions, s.host, s.documents} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// write puts a file at path of the host.
func (s *stager) write(path string, content []byte) error {
	at := filepath.Join(s.root, path)
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		return err
	}
	return os.WriteFile(at, content, 0o600) // modes are the package's, not the stage's
}

// zip is write for what lies compressed on a host. There is no name and no time in it.
func (s *stager) zip(path string, content []byte) error {
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		return err
	}
	if _, err := w.Write(content); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	return s.write(path+".gz", b.Bytes())
}

func (s *stager) program() error {
	content, err := os.ReadFile(filepath.Join(s.builder.Bin, s.product.Program))
	if err != nil {
		return err
	}
	return s.write("/usr/bin/"+s.product.Program, content)
}

// unit has the program's own `install` write the unit, so that there is one template.
func (s *stager) unit() error {
	root := s.product.Root()
	var said bytes.Buffer
	root.SetOut(&said)
	root.SetErr(&said)
	root.SetArgs(slices.Concat(s.product.Words, []string{"install", "--vendor", "--root", s.root}))
	if err := root.Execute(); err != nil {
		return fmt.Errorf("%s install --vendor: %w\n%s", s.product.Command(), err, said.String())
	}
	return nil
}

// tidy returns the program's commands with defaults as they are for root, whoever makes the package.
func (s *stager) tidy() *cobra.Command {
	root := s.product.Root()
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		c.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if name := filepath.Base(f.DefValue); filepath.IsAbs(f.DefValue) && f.DefValue == daemon.DefaultStateDir(name) {
				f.DefValue = "/var/lib/sallyway/" + name
			}
		})
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(root)
	return root
}

// manual makes a page of every command.
func (s *stager) manual() error {
	dir, err := os.MkdirTemp("", "man-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	root := s.tidy()
	root.DisableAutoGenTag = true
	at := s.builder.Version.Time
	header := &doc.GenManHeader{Section: fmt.Sprint(s.product.Section), Date: &at, Source: "Sallyway " + s.builder.Version.Package, Manual: "Sallyway"}
	if err := doc.GenManTree(root, header, dir); err != nil {
		return err
	}
	pages, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, p := range pages {
		text, err := os.ReadFile(filepath.Join(dir, p.Name()))
		if err != nil {
			return err
		}
		if err := s.zip(fmt.Sprintf("/usr/share/man/man%d/%s", s.product.Section, p.Name()), text); err != nil {
			return err
		}
	}
	return nil
}

func (s *stager) completions() error {
	zsh := "/usr/share/zsh/vendor-completions/_"
	if s.format == "rpm" {
		zsh = "/usr/share/zsh/site-functions/_"
	}
	name := s.product.Program
	for path, generate := range map[string]func(*cobra.Command, io.Writer) error{
		"/usr/share/bash-completion/completions/" + name: func(c *cobra.Command, w io.Writer) error { return c.GenBashCompletionV2(w, true) },
		zsh + name: func(c *cobra.Command, w io.Writer) error { return c.GenZshCompletion(w) },
		"/usr/share/fish/vendor_completions.d/" + name + ".fish": func(c *cobra.Command, w io.Writer) error { return c.GenFishCompletion(w, true) },
	} {
		var b bytes.Buffer
		if err := generate(s.tidy(), &b); err != nil {
			return err
		}
		if err := s.write(path, b.Bytes()); err != nil {
			return err
		}
	}
	return nil
}

// host writes what the host's system reads: the unit's user, limits of the kernel.
func (s *stager) host() error {
	users, err := render("sysusers.conf", s.product)
	if err != nil {
		return err
	}
	if err := s.write("/usr/lib/sysusers.d/"+s.product.Name+".conf", []byte(users)); err != nil || !s.product.UDP {
		return err
	}
	limits, err := render("sysctl.conf", s.product)
	if err != nil {
		return err
	}
	return s.write("/usr/lib/sysctl.d/50-"+s.product.Name+".conf", []byte(limits))
}

// documents writes copyright, changelog and the licences of what is linked in.
func (s *stager) documents() error {
	dir := "/usr/share/doc/" + s.product.Name + "/"
	text, err := render("copyright", s.product)
	if err != nil {
		return err
	}
	if err := s.write(dir+"copyright", []byte(text)); err != nil {
		return err
	}
	v := s.builder.Version
	log := fmt.Sprintf("%s (%s) unstable; urgency=medium\n\n  * Built from commit %s.\n\n -- Sallyway authors <sallyway@localhost>  %s\n",
		s.product.Name, v.Package, v.Commit, v.Time.Format(time.RFC1123Z))
	if err := s.zip(dir+"changelog", []byte(log)); err != nil {
		return err
	}
	if s.builder.ModCache == "" {
		return nil
	}
	licences, err := notices.From(filepath.Join(s.builder.Bin, s.product.Program), s.builder.GoRoot, s.builder.ModCache)
	if err != nil {
		return err
	}
	return s.zip(dir+"NOTICES", licences)
}
