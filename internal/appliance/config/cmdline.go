package config

import (
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// cmdlinePrefix begins the words of the kernel's command line that are ours.
const cmdlinePrefix = "sallyway."

// words splits a kernel command line as the kernel does (next_arg in lib/cmdline.c): white space separates, double quotes keep together.
func words(line string) []string {
	var out []string
	var word strings.Builder
	quoted, any := false, false
	for _, r := range line {
		switch {
		case r == '"':
			quoted, any = !quoted, true
		case !quoted && (r == ' ' || r == '\t' || r == '\n' || r == '\r'):
			if any {
				out = append(out, word.String())
			}
			word.Reset()
			any = false
		default:
			word.WriteRune(r)
			any = true
		}
	}
	if any {
		out = append(out, word.String())
	}
	return out
}

// cmdlineSecrets are last words of keys that never stand on a command line: everybody on the host can read it, and it is logged.
var cmdlineSecrets = []string{"token", "password", "secret", "key"}

// imageKey is the version of the image that was started.
const imageKey = "image"

// CmdlineOnly are keys that only the command line has.
type CmdlineOnly struct {
	Metadata bool // ask the cloud's metadata service
}

// Cmdline reads the words sallyway.KEY=VALUE of a kernel command line; dots go into nested keys: sallyway.gateway.standby=0.
func Cmdline(line string) (Found, CmdlineOnly) {
	f := Found{Source: "cmdline"}
	var only CmdlineOnly
	tree := &yaml.Node{Kind: yaml.MappingNode}
	for _, w := range words(line) {
		key, value, _ := strings.Cut(w, "=")
		key, ours := strings.CutPrefix(key, cmdlinePrefix)
		if !ours {
			continue
		}
		path := strings.Split(strings.ReplaceAll(key, "_", "-"), ".")
		last := path[len(path)-1]
		if slices.ContainsFunc(cmdlineSecrets, func(s string) bool { return last == s || strings.HasSuffix(last, "-"+s) }) {
			f.Notes = append(f.Notes, fmt.Sprintf("command line: %s%.40s is refused: everybody can read a command line; hand it over by SMBIOS, fw_cfg or a seed disk", cmdlinePrefix, key))
			continue
		}
		if key == imageKey {
			continue // which image this is: internal/appliance/update reads it
		}
		if key == "metadata" {
			only.Metadata = value == "1" || value == "yes" || value == "true" || value == "on"
			if !only.Metadata && value != "0" && value != "no" && value != "false" && value != "off" {
				f.Notes = append(f.Notes, fmt.Sprintf("command line: sallyway.metadata is 1 or 0, not %.20q", value))
			}
			continue
		}
		if err := put(tree, path, value); err != nil {
			f.Err = fmt.Errorf("%s%.40s: %w", cmdlinePrefix, key, err)
			return f, only
		}
	}
	if len(tree.Content) == 0 {
		return f, only
	}
	f.Config, f.Err = parseNode(tree)
	return f, only
}

// maxDepth bounds the dots of one key.
const maxDepth = 6

// put sets a nested key. A key that was set before keeps both values, as a list.
func put(n *yaml.Node, path []string, value string) error {
	if len(path) > maxDepth {
		return fmt.Errorf("has more than %d parts", maxDepth)
	}
	if slices.Contains(path, "") {
		return fmt.Errorf("has an empty part")
	}
	for depth, name := range path {
		var child *yaml.Node
		for i := 0; i+1 < len(n.Content); i += 2 {
			if n.Content[i].Value == name {
				child = n.Content[i+1]
			}
		}
		leaf := depth == len(path)-1
		if child == nil {
			child = &yaml.Node{Kind: yaml.MappingNode, Tag: "!!map"}
			if leaf {
				*child = *scalar(value)
			}
			n.Content = append(n.Content, scalar(name), child)
			n = child
			continue
		}
		switch {
		case leaf && child.Kind == yaml.ScalarNode:
			first := *child
			*child = yaml.Node{Kind: yaml.SequenceNode, Tag: "!!seq", Content: []*yaml.Node{&first, scalar(value)}}
		case leaf && child.Kind == yaml.SequenceNode:
			child.Content = append(child.Content, scalar(value))
		case leaf, child.Kind != yaml.MappingNode:
			return fmt.Errorf("is a value in one place and has keys in another")
		}
		n = child
	}
	return nil
}

// scalar is a plain value whose type the decoder finds: standby=0 is a number, tun=off stays the word that YAML 1.2 has.
func scalar(v string) *yaml.Node {
	n := &yaml.Node{Kind: yaml.ScalarNode, Value: v}
	n.Tag = n.ShortTag()
	return n
}
