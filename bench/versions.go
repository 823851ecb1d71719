package bench

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sallyway/internal/lab"
	"sallyway/internal/version"
)

// versionWait bounds a program that is asked for its version.
const versionWait = 5 * time.Second

// measured are programs that are asked for their versions, by the peer that runs them.
var measured = []struct {
	peer, program, arg string
}{
	{OpenSSH, "ssh", "-V"},
	{WireGuardGo, "wg", "--version"},
	{Nebula, "nebula", "-version"},
	{OpenVPN, "openvpn", "--version"},
	{CoturnTURN, "turnserver", "--version"},
}

// modulesOf are the modules whose versions matter, by the program that links them.
var modulesOf = map[string][]string{
	"gatewayd":     {"github.com/quic-go/quic-go", "gvisor.dev/gvisor", "github.com/pion/dtls/v3"},
	"bench":        {"github.com/pion/turn/v5"},
	"wireguard-go": {"golang.zx2c4.com/wireguard"},
}

// versions asks what is measured who it is. What cannot be asked is left out.
func versions(ctx context.Context, cfg Config) map[string]string {
	out := make(map[string]string)
	for _, daemon := range []string{"gatewayd", "relayd", "platformd", "sallyway"} {
		if v := daemonVersion(ctx, filepath.Join(cfg.Bin, daemon)); v != "" {
			out[daemon] = v
		}
	}
	exe, _ := os.Executable() // empty is no program
	for program, modules := range modulesOf {
		path := filepath.Join(cfg.Bin, program)
		if program == "bench" {
			path = exe
		}
		info, err := buildinfo.ReadFile(path)
		if err != nil {
			continue
		}
		for _, d := range append(info.Deps, &info.Main) {
			if slices.Contains(modules, d.Path) {
				out[d.Path] = d.Version
			}
		}
	}
	for _, m := range measured {
		if !slices.ContainsFunc(cfg.Scenarios, func(s Scenario) bool { return slices.Contains(s.Beside, m.peer) }) {
			continue
		}
		path, err := lab.Program(m.program)
		if err != nil {
			continue
		}
		if line := firstOutput(ctx, path, m.arg); line != "" {
			out[m.program] = line
		}
	}
	return out
}

// daemonVersion is what one of our programs says of itself.
func daemonVersion(ctx context.Context, path string) string {
	ctx, cancel := context.WithTimeout(ctx, versionWait)
	defer cancel()
	b, err := exec.CommandContext(ctx, path, "version", "--json").Output()
	if err != nil {
		return ""
	}
	var v version.Info
	if json.Unmarshal(b, &v) != nil {
		return ""
	}
	return strings.TrimSpace(v.Version + " " + v.Commit)
}

// firstOutput is the first line that a program prints, on either output.
func firstOutput(ctx context.Context, path string, args ...string) string {
	ctx, cancel := context.WithTimeout(ctx, versionWait)
	defer cancel()
	b, _ := exec.CommandContext(ctx, path, args...).CombinedOutput() // some say it and fail
	line, _, _ := bytes.Cut(bytes.TrimSpace(b), []byte("\n"))
	return string(bytes.TrimSpace(line))
}
