package agent

import (
	"os"
	"path/filepath"
)

// Enrolled reports whether a state folder knows a node. It touches nothing.
func Enrolled(stateDir string) bool {
	_, err := os.Stat(filepath.Join(stateDir, nodeFile))
	return err == nil
}
