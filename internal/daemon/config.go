package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// EnvPrefix begins every environment variable that Sallyway reads: the flag --listen-ip is SALLYWAY_LISTEN_IP.
const EnvPrefix = "SALLYWAY_"

// maxConfigFile bounds a configuration file. A real one has a few KiB.
const maxConfigFile = 1 << 20

// Keys of pflag.Flag.Annotations and cobra.Command.Annotations that this file keeps its notes under.
const (
	sourceNote   = "sallyway_source"
	fileKeysNote = "sallyway_file_keys"
)

// Binding is a command whose flags are also environment variables and keys of a file.
type Binding struct {
	cmd  *cobra.Command
	keys map[string]any // key that only the file has → pointer it is decoded into
	more Elsewhere      // nil is none
}

// Elsewhere reads settings by their flags' names from a place that the flags set so far name, and says which place in errors. No values: there
// is no such place.
type Elsewhere func(ctx context.Context) (place string, values map[string]string, err error)

// Elsewhere adds a place that is asked last: what stands there wins over the defaults alone. A name that no flag has is an error.
func (b *Binding) Elsewhere(read Elsewhere) { b.more = read }

// Bind makes each flag of cmd also an environment variable and a key of the YAML file that --config names; it adds
// that flag. A flag on the command line wins over the environment, that over the file, that over the default. The
// values are set before cmd's RunE. Everything wrong in them is a usage error that says where it stands.
//
// The file may hold the keys of every command of the program, so one file serves them all; a key that none has is an
// error.
func Bind(cmd *cobra.Command) *Binding {
	b := &Binding{cmd: cmd, keys: make(map[string]any)}
	if cmd.Flags().Lookup("config") == nil {
		cmd.Flags().String("config", "", "YAML file with flags as keys")
	}
	next := cmd.PreRunE
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		if err := b.load(os.LookupEnv); err != nil {
			return err
		}
		if next != nil {
			return next(cmd, args)
		}
		return nil
	}
	return b
}

// FileKey adds a key that only the file has, such as a nested list. It is decoded strictly into target, a pointer,
// whose value stays as it is where the file lacks the key.
func (b *Binding) FileKey(name string, target any) {
	b.keys[name] = target
	if b.cmd.Annotations == nil {
		b.cmd.Annotations = make(map[string]string)
	}
	b.cmd.Annotations[fileKeysNote] += " " + name
}

// Source says where a flag's value comes from: "flag", "env", "file", "elsewhere" or, for the default, "".
func Source(f *pflag.Flag) string {
	if s := f.Annotations[sourceNote]; len(s) > 0 {
		return s[0]
	}
	if f.Changed {
		return "flag"
	}
	return ""
}

// envName returns the environment variable of a flag.
func envName(flag string) string {
	return EnvPrefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// unbound are flags that make no sense outside the command line.
func unbound(name string) bool {
	switch name {
	case "help", "version", "json", "config":
		return true
	}
	return false
}

func (b *Binding) load(env func(string) (string, bool)) error {
	flags := b.cmd.Flags()
	path, _ := flags.GetString("config")
	if v, ok := env(envName("config")); ok && path == "" {
		path = v
	}
	file, err := readConfig(path)
	if err != nil {
		return err
	}
	if err := b.checkKeys(path, file); err != nil {
		return err
	}
	var errs error
	flags.VisitAll(func(f *pflag.Flag) {
		if errs != nil || f.Changed || unbound(f.Name) {
			return
		}
		if v, ok := env(envName(f.Name)); ok {
			if err := setText(f, v); err != nil {
				errs = Usagef("environment variable %s: %s", envName(f.Name), flagError(f, v, err))
				return
			}
			note(flags, f, "env")
		} else if n := file[f.Name]; n != nil {
			if err := setNode(f, n); err != nil {
				errs = Usagef("%s:%d: %s: %s", path, n.Line, f.Name, err)
				return
			}
			note(flags, f, "file")
		}
	})
	if errs != nil {
		return errs
	}
	for name, target := range b.keys {
		if n := file[name]; n != nil {
			if err := decodeStrict(n, target); err != nil {
				return Usagef("%s: key %q (line %d): %w", path, name, n.Line, err)
			}
		}
	}
	return b.loadElsewhere()
}

func (b *Binding) loadElsewhere() error {
	if b.more == nil {
		return nil
	}
	ctx := b.cmd.Context()
	if ctx == nil {
		ctx = context.Background()
	}
	place, values, err := b.more(ctx)
	if err != nil {
		return Usagef("%w", err)
	}
	flags := b.cmd.Flags()
	for _, key := range slices.Sorted(maps.Keys(values)) {
		name := strings.ReplaceAll(key, "_", "-")
		f := flags.Lookup(name)
		if f == nil || unbound(name) {
			return Usagef("%s: unknown setting %q%s", place, key, didYouMean(name, keysOf(keysOfProgram(b.cmd.Root(), true))))
		}
		if f.Changed {
			continue
		}
		if err := setText(f, values[key]); err != nil {
			return Usagef("%s: %s is not a valid %s", place, key, f.Value.Type()) // not the value: it may be a secret
		}
		note(flags, f, "elsewhere")
	}
	return nil
}

// note remembers where a value came from and marks the flag as set, which satisfies required flags.
func note(flags *pflag.FlagSet, f *pflag.Flag, source string) {
	f.Changed = true
	_ = flags.SetAnnotation(f.Name, sourceNote, []string{source}) // the flag exists: no error is possible
}

// keysOfProgram are the flags of every command of a program and the keys that only its files have. flags says to leave the latter out.
func keysOfProgram(root *cobra.Command, flags bool) map[string]bool {
	known := make(map[string]bool)
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		add := func(f *pflag.Flag) {
			if !unbound(f.Name) {
				known[f.Name] = true
			}
		}
		c.Flags().VisitAll(add)
		c.PersistentFlags().VisitAll(add)
		for _, k := range strings.Fields(c.Annotations[fileKeysNote]) {
			if !flags {
				known[k] = true
			}
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(root)
	return known
}

// checkKeys refuses keys that no command of the program knows.
func (b *Binding) checkKeys(path string, file map[string]*yaml.Node) error {
	known := keysOfProgram(b.cmd.Root(), false)
	for key, n := range file {
		if !known[key] {
			return Usagef("%s:%d: unknown key %q%s", path, n.Line, key, didYouMean(key, keysOf(known)))
		}
	}
	return nil
}

// readConfig returns the top-level keys of a YAML file with dashes for underscores. No path means no keys.
func readConfig(path string) (map[string]*yaml.Node, error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, Usagef("read configuration: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxConfigFile+1))
	if err != nil {
		return nil, Usagef("read configuration %s: %w", path, err)
	}
	if len(b) > maxConfigFile {
		return nil, Usagef("configuration %s is larger than %d bytes", path, maxConfigFile)
	}
	return parseConfig(path, b)
}

func parseConfig(path string, b []byte) (map[string]*yaml.Node, error) {
	dec := yaml.NewDecoder(strings.NewReader(string(b)))
	var doc yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil, nil // empty, or comments only
	} else if err != nil {
		return nil, Usagef("%s: %w", path, err)
	}
	var second yaml.Node
	if err := dec.Decode(&second); !errors.Is(err, io.EOF) {
		return nil, Usagef("%s: more than one YAML document", path)
	}
	if len(doc.Content) == 0 {
		return nil, nil
	}
	top := doc.Content[0]
	if top.Kind == yaml.ScalarNode && top.Tag == "!!null" {
		return nil, nil
	}
	if top.Kind != yaml.MappingNode {
		return nil, Usagef("%s:%d: want keys and values (key: value)", path, top.Line)
	}
	keys := make(map[string]*yaml.Node, len(top.Content)/2)
	for i := 0; i+1 < len(top.Content); i += 2 {
		k, v := top.Content[i], top.Content[i+1]
		name := strings.ReplaceAll(k.Value, "_", "-")
		if keys[name] != nil {
			return nil, Usagef("%s:%d: key %q stands here a second time", path, k.Line, k.Value)
		}
		keys[name] = v
	}
	return keys, nil
}

// setText sets a flag from one string; a list is comma-separated.
func setText(f *pflag.Flag, v string) error {
	list, ok := f.Value.(pflag.SliceValue)
	if !ok {
		return f.Value.Set(v)
	}
	var vs []string
	for _, s := range strings.Split(v, ",") {
		if s = strings.TrimSpace(s); s != "" {
			vs = append(vs, s)
		}
	}
	return list.Replace(vs)
}

// setNode sets a flag from a value of the file.
func setNode(f *pflag.Flag, n *yaml.Node) error {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	list, isList := f.Value.(pflag.SliceValue)
	switch {
	case n.Kind == yaml.ScalarNode && n.Tag == "!!null":
		return errors.New("has no value")
	case n.Kind == yaml.ScalarNode:
		if err := setText(f, n.Value); err != nil {
			return errors.New(flagError(f, n.Value, err))
		}
		return nil
	case n.Kind == yaml.SequenceNode && isList:
		vs := make([]string, 0, len(n.Content))
		for _, item := range n.Content {
			if item.Kind != yaml.ScalarNode || item.Tag == "!!null" {
				return fmt.Errorf("line %d: want a plain value", item.Line)
			}
			vs = append(vs, item.Value)
		}
		if err := list.Replace(vs); err != nil {
			return errors.New(flagError(f, strings.Join(vs, ","), err))
		}
		return nil
	case n.Kind == yaml.SequenceNode:
		return errors.New("takes one value, not a list")
	}
	return errors.New("takes a plain value")
}

// flagError explains why a value does not fit. It never shows the value of a secret flag.
func flagError(f *pflag.Flag, v string, err error) string {
	if _, ok := f.Value.(*secretValue); ok {
		return err.Error()
	}
	return fmt.Sprintf("%q is not a valid %s: %v", v, f.Value.Type(), err)
}

// decodeStrict decodes a nested value and refuses fields that the target lacks.
func decodeStrict(n *yaml.Node, target any) error {
	b, err := yaml.Marshal(n)
	if err != nil {
		return err
	}
	dec := yaml.NewDecoder(strings.NewReader(string(b)))
	dec.KnownFields(true)
	err = dec.Decode(target)
	var te *yaml.TypeError
	if errors.As(err, &te) {
		return explainFields(te, target)
	}
	return err
}
