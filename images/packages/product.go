package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"sallyway/client"
	"sallyway/gateway"
	"sallyway/internal/admin"
	"sallyway/license"
	"sallyway/platform/platformd"
	"sallyway/relay/relayd"
)

// product is one package.
type product struct {
	Name    string                // of the package
	Program string                // in /usr/bin
	Words   []string              // of the daemon's command, after the program: connect, or nothing
	Unit    string                // without .service; also the user that it runs as
	State   string                // folder below /var/lib/sallyway, and what its files in /etc/sallyway are named after
	Section int                   // of the manual
	UDP     bool                  // it moves UDP datagrams, and brings the sysctls for that
	Root    func() *cobra.Command // the program's commands
	Summary string                // one line, no full stop
	About   string                // paragraphs for a person who chooses packages
	Next    []string              // what to type first
}

// products are all packages.
var products = []product{
	{
		Name: "sallyway", Program: "sallyway", Words: []string{"connect"}, Unit: "sallyway-client", State: "client", Section: 1, UDP: true, Root: commandLine,
		Summary: "command line and client for private resources",
		About: `Sallyway lets people and programs reach private resources while the
private network opens no inbound port. This package holds the command line
for administrators, and "sallyway connect", which reaches resources from
this host, by hand or as the unit sallyway-client.`,
		Next: []string{
			"sallyway login --url URL --token-file F                    (where you are admin)",
			"sallyway client create NAME                                (prints a token), then, on the host that shall reach resources:",
			"sudo sallyway connect install --token-file -               (or, without a unit: sallyway connect --token-file -)",
		},
	},
	{
		Name: "sallyway-gateway", Program: "gatewayd", Unit: "sallyway-gateway", State: "gatewayd", Section: 8, UDP: true, Root: gateway.Command,
		Summary: "way into a private network that opens no port",
		About: `The gateway dials out to relays, and lets the clients of its organization
reach resources in its network as policies say.
It stays stopped until it has a token: gatewayd install --token-file -`,
		Next: []string{"sallyway gateway create NAME             (where you are admin; prints a token), then here:", "sudo gatewayd install --token-file -"},
	},
	{
		Name: "sallyway-relay", Program: "relayd", Unit: "sallyway-relay", State: "relayd", Section: 8, UDP: true, Root: relayd.Command,
		Summary: "meeting point of Sallyway gateways and clients",
		About: `Gateways and clients of an organization meet at a relay, which passes on
what it can not read. It speaks STUN and TURN on port 5349.
It stays stopped until it has a token: relayd install --token-file -`,
		Next: []string{"sallyway relay create NAME --host HOST   (where you are admin; prints a token), then here:", "sudo relayd install --token-file -"},
	},
	{
		Name: "sallyway-platform", Program: "platformd", Unit: "sallyway-platform", State: "platformd", Section: 8, Root: platformd.Command,
		Summary: "control plane of Sallyway: access, certificates, audit",
		About: `The platform knows who may reach what, enrols every node, assigns relays
and keeps the audit log. It moves no traffic.
It stays stopped until it is told to start: platformd install`,
		Next: []string{"edit /etc/sallyway/platformd.yaml        (advertise-url, at least), then:", "sudo platformd install"},
	},
	{
		Name: "sallyway-license", Program: "sallyway-license", Unit: "sallyway-license", State: "license", Section: 8, Root: license.Command,
		Summary: "licence service of Sallyway, for who sells it",
		About: `The licence service signs what customers' platforms may have: gateways,
relays, clients, until when. Platforms verify that offline; a platform
without any licence needs none of this, and nothing there is limited.
It stays stopped until it is told to start: sallyway-license install`,
		Next: []string{"edit /etc/sallyway/license.yaml          (advertise-url, at least), then:", "sudo sallyway-license install"},
	},
}

// commandLine is the program sallyway, as cmd/sallyway puts it together.
func commandLine() *cobra.Command {
	root := admin.Command()
	root.AddCommand(client.Command(), client.BenchCommand())
	return root
}

// Command is what a person types to reach the daemon's verbs.
func (p product) Command() string { return strings.Join(append([]string{p.Program}, p.Words...), " ") }

// Hint is what an installation ends with.
func (p product) Hint() string {
	return fmt.Sprintf("%s is installed, and not started. Next:\n  %s", p.Name, strings.Join(p.Next, "\n  "))
}
