// Command relayd runs a relay.
package main

import (
	"os"

	"sallyway/internal/daemon"
	"sallyway/relay/relayd"
)

func main() { os.Exit(daemon.Main(relayd.Command())) }
