package daemon

import "go.yaml.in/yaml/v3"

// DecodeStrict decodes a part of a YAML document into target, a pointer. A field that target lacks is an error that names the nearest one.
func DecodeStrict(n *yaml.Node, target any) error { return decodeStrict(n, target) }

// DidYouMean returns ` (did you mean "x"?)` for the name nearest to got, or "" where none is near. It sorts names.
func DidYouMean(got string, names []string) string { return didYouMean(got, names) }
