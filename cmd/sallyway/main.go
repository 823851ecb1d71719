// Command sallyway is what people type: it reaches private resources (connect) and says who may (the verbs for administrators).
package main

import (
	"os"

	"sallyway/client"
	"sallyway/internal/admin"
	"sallyway/internal/daemon"
)

func main() {
	root := admin.Command()
	root.AddCommand(client.Command(), client.BenchCommand())
	daemon.TraceCommands(root)
	os.Exit(daemon.Main(root))
}
