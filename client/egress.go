package client

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"sallyway/internal/daemon"
	"sallyway/internal/egress"
)

// EgressFlags are a node's settings about the proxy that its network demands.
type EgressFlags struct {
	url, credentials, noProxy string
	dialer                    *egress.Dialer
}

// egressFlag names the proxy.
const egressFlag = "egress-proxy"

// Register adds the flags to a start command.
func (e *EgressFlags) Register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&e.url, egressFlag, "", "proxy for TCP to relays and platform: http, https, socks5 or socks5h://HOST:PORT, or none (default: HTTPS_PROXY, else ALL_PROXY)")
	f.StringVar(&e.credentials, "egress-proxy-credentials", "", "file of mode 0600 with USER:PASSWORD for that proxy")
	f.StringVar(&e.noProxy, "egress-no-proxy", "", "addresses, networks and names that need no proxy, separated by commas (default: NO_PROXY)")
}

// Parse reads flags and environment. What is wrong is a usage error.
func (e *EgressFlags) Parse(cmd *cobra.Command) error {
	from := daemon.Source(cmd.Flags().Lookup(egressFlag))
	d, err := egress.Settings{
		URL: e.url, Readable: from == "flag" || from == "file", Credentials: e.credentials, NoProxy: e.noProxy,
	}.Open(os.Getenv)
	if err != nil {
		return daemon.Usagef("%w", err)
	}
	e.dialer = d
	return nil
}

// Keep tells the log and the metrics of the proxy, and the doctor by the state folder.
func (e *EgressFlags) Keep(sh *daemon.Shell) error {
	d := e.Dialer()
	if st := d.Status(); st != nil {
		sh.Log.Info("TCP to relays and platform goes through a proxy", "proxy", st.Proxy, "set_by", st.Source, "not_for", st.NoProxy)
		sh.Metrics.MustRegister(egressMetrics(d)...)
	}
	return sh.State.WriteFile(egress.StateFile, d.Save(), 0o600)
}

// egressMetrics are the metrics of a proxy.
func egressMetrics(d *egress.Dialer) []prometheus.Collector {
	counter := func(name, help string, f func(*egress.Status) uint64) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, func() float64 { return float64(f(d.Status())) })
	}
	return []prometheus.Collector{
		counter("sallyway_egress_connections_total", "Connections opened through the egress proxy.", func(st *egress.Status) uint64 { return st.Connections }),
		counter("sallyway_egress_failures_total", "Connections that the egress proxy did not open.", func(st *egress.Status) uint64 { return st.Failures }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "sallyway_egress_proxy_usable", Help: "1 when the egress proxy was reached last and took this node's credentials."}, func() float64 {
			if st := d.Status(); st.Since.IsZero() || st.Error != "" {
				return 0
			}
			return 1
		}),
	}
}

// Dialer is who dials relays and platform: without a proxy before Parse.
func (e *EgressFlags) Dialer() *egress.Dialer {
	if e.dialer == nil {
		return new(egress.Dialer)
	}
	return e.dialer
}

// RelayDial is what legs dial TCP with; nil, themselves, where there is no proxy.
func RelayDial(d *egress.Dialer) func(ctx context.Context, network, address string) (net.Conn, error) {
	if d == nil || d.Proxy() == "" {
		return nil
	}
	return d.DialContext
}

// RenderEgress writes the status line about the proxy.
func RenderEgress(w io.Writer, st *egress.Status) {
	switch {
	case st == nil:
	case st.Error != "":
		fmt.Fprintf(w, "proxy      %s (%s) since %s: %s\nremedy     %s\n", st.Proxy, st.Source, st.Since.Local().Format(time.DateTime), st.Error, st.Remedy)
	case st.Since.IsZero():
		fmt.Fprintf(w, "proxy      %s (%s), not used yet\n", st.Proxy, st.Source)
	default:
		fmt.Fprintf(w, "proxy      %s (%s) works since %s, %d connections, %d failed\n", st.Proxy, st.Source, st.Since.Local().Format(time.DateTime), st.Connections, st.Failures)
	}
}
