// Command sallyway-license runs the licence service.
package main

import (
	"os"

	"sallyway/internal/daemon"
	"sallyway/license"
)

func main() { os.Exit(daemon.Main(license.Command())) }
