// Command platformd runs the platform: the control plane.
package main

import (
	"os"

	"sallyway/internal/daemon"
	"sallyway/platform/platformd"
)

func main() { os.Exit(daemon.Main(platformd.Command())) }
