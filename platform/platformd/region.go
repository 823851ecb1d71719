package platformd

import (
	"github.com/spf13/pflag"

	"sallyway/platform/probe"
)

// probeMode is the flag --probe-relays.
type probeMode probe.Mode

var _ pflag.Value = (*probeMode)(nil)

// String implements pflag.Value.
func (m *probeMode) String() string {
	if *m == "" {
		return string(probe.Auto)
	}
	return string(*m)
}

// Set implements pflag.Value.
func (m *probeMode) Set(s string) error {
	got, err := probe.ParseMode(s)
	*m = probeMode(got)
	return err
}

// Type implements pflag.Value.
func (m *probeMode) Type() string { return "mode" }
