// Command appliance is the operating system of Sallyway's appliance image: process 1, and every program that it starts.
package main

import (
	"os"

	"github.com/spf13/cobra"

	"sallyway/gateway"
	"sallyway/internal/admin"
	"sallyway/internal/appliance"
	"sallyway/platform/platformd"
	"sallyway/relay/relayd"
)

func main() {
	os.Exit(appliance.Main(map[string]func() *cobra.Command{
		"gatewayd": gateway.Command, "relayd": relayd.Command, "platformd": platformd.Command, "sallyway": admin.Command,
	}))
}
