// Package daemon is the shell that gatewayd, relayd, platformd and `sallyway connect` share: configuration in three
// layers, log, token input, exit codes, systemd, health and metrics, the local control socket, the state folder, and
// the commands that every daemon has (status, doctor, healthcheck, version, down, install, uninstall).
//
// A daemon describes itself with a Spec and writes one command of its own:
//
//	spec := daemon.Spec{Name: "relayd", Role: "relay", Start: []string{"start"}}
//	var opts daemon.Options
//	start := &cobra.Command{Use: "start", RunE: func(cmd *cobra.Command, _ []string) error {
//		sh, err := daemon.Open(spec, &opts, cmd.ErrOrStderr())
//		if err != nil {
//			return err
//		}
//		defer sh.Close()
//		token, err := opts.Token.Read(cmd, sh.Log)
//		…
//		sh.OnStatus = func(context.Context) (any, error) { return relay.Status(), nil }
//		return sh.Run(cmd.Context(), func(ctx context.Context) error { …; sh.Ready("serving"); … })
//	}}
//	opts.Register(start, spec)
//	daemon.Bind(start)
//	root := &cobra.Command{Use: spec.Name}
//	root.AddCommand(start)
//	root.AddCommand(daemon.Commands(spec)...)
//	os.Exit(daemon.Main(root))
package daemon

import (
	"context"
	"encoding/json"
	"io"
	"strings"
	"time"
)

// Spec describes a daemon to the shell. It is a value: nothing here changes after the start.
type Spec struct {
	Name  string   // program and, unless StateName is given, state folder: gatewayd, "sallyway connect"
	Role  string   // what the unit is named after: gateway, relay, platform
	Start []string // command words that run it in the foreground, for example {"up"}

	// StateName is the folder below /var/lib/sallyway, and what `install` names files in /etc/sallyway after. Empty means Name.
	StateName string
	// StateFlag is the name of the flag that names the state folder. Empty means state.
	StateFlag string
	// Capabilities is the unit's whole capability set, for example CAP_NET_BIND_SERVICE.
	Capabilities []string
	// Devices are DeviceAllow= lines of the unit, for example "/dev/net/tun rw". None means PrivateDevices.
	Devices []string
	// HostDNS lets the unit's user set up split DNS in systemd-resolved (a polkit rule that `install` writes).
	HostDNS bool
	// NoToken says that the daemon enrols nowhere, so that `install` asks for no token.
	NoToken bool
	// StopTimeout is how long systemd waits for a drain. Zero means 90 s.
	StopTimeout time.Duration

	// RenderStatus writes the status document as text. Nil prints the document itself.
	RenderStatus func(w io.Writer, doc json.RawMessage) error
	// Checks are the doctor's checks that need no running daemon. Nil means none.
	Checks func(ctx context.Context, stateDir string) []Check
}

func (s Spec) stateName() string {
	if s.StateName != "" {
		return s.StateName
	}
	return s.Name
}

func (s Spec) stateFlag() string {
	if s.StateFlag != "" {
		return s.StateFlag
	}
	return "state"
}

// program is the executable's name: the first word of Name.
func (s Spec) program() string {
	name, _, _ := strings.Cut(s.Name, " ")
	return name
}

// startLine is the command that a person types to start the daemon.
func (s Spec) startLine() string {
	line := s.Name
	for _, w := range s.Start {
		line += " " + w
	}
	return line
}
