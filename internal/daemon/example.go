package daemon

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// exampleConfig returns a configuration file in which every setting of the start command stands as a comment with its
// default, so that the file changes nothing until it is edited. What the unit sets itself (state folder, token) is left out.
func exampleConfig(spec Spec, start *cobra.Command) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Settings of %s. Every flag of `%s` is a key; what stands here as a comment is the default.\n", spec.Name, spec.startLine())
	fmt.Fprintf(&b, "# A change acts after: systemctl restart %s\n", spec.unitName())
	start.Flags().VisitAll(func(f *pflag.Flag) {
		if unbound(f.Name) || f.Hidden || f.Name == spec.stateFlag() || f.Name == "token" || f.Name == "token-file" {
			return
		}
		value := f.DefValue
		switch f.Value.Type() {
		case "string":
			value = fmt.Sprintf("%q", f.DefValue)
		case "stringSlice", "stringArray":
			value = "[]"
		}
		fmt.Fprintf(&b, "\n# %s\n#%s: %s\n", strings.ReplaceAll(f.Usage, "\n", "\n# "), f.Name, value)
	})
	return b.String()
}
