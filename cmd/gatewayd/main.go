// Command gatewayd runs a gateway.
package main

import (
	"os"

	"sallyway/gateway"
	"sallyway/internal/daemon"
)

func main() { os.Exit(daemon.Main(gateway.Command())) }
