package doctor

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"sallyway/internal/daemon"
)

// wantBuffer is how much a UDP socket should be able to hold, in bytes: 100 ms of 640 Mbit/s.
const wantBuffer = 8 << 20

// buffers is the row about the kernel's limits for UDP sockets. With CAP_NET_ADMIN a daemon gets what it asks for whatever they are.
func buffers() []daemon.Check {
	row := daemon.Check{Check: "UDP buffers", Result: daemon.Pass}
	var small []string
	for _, name := range []string{"rmem_max", "wmem_max"} {
		b, err := os.ReadFile("/proc/sys/net/core/" + name)
		if err != nil {
			return nil // a network namespace of its own may not show them
		}
		n, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err == nil && n < wantBuffer {
			small = append(small, fmt.Sprintf("net.core.%s=%d", name, wantBuffer))
		}
		row.Detail = strings.TrimPrefix(row.Detail+fmt.Sprintf(", %s %d KiB", name, n>>10), ", ")
	}
	if len(small) > 0 {
		row.Detail += "; enough only for daemons with CAP_NET_ADMIN"
		if os.Geteuid() != 0 {
			row.Result, row.Remedy = daemon.Warn, "sysctl -w "+strings.Join(small, " ")+", and in /etc/sysctl.d"
		}
	}
	return []daemon.Check{row}
}
