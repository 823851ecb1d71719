package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"sallyway/internal/version"
)

// Limits of the small HTTP servers: metrics and the control socket. A peer that sends or reads slower is cut off.
const (
	headerTimeout = 5 * time.Second
	readTimeout   = 10 * time.Second
	writeTimeout  = 30 * time.Second // a scrape of a busy daemon, a doctor that waits for the network
	idleTimeout   = 60 * time.Second
	maxHeader     = 16 << 10 // bytes
	stopTimeout   = 2 * time.Second
)

// newRegistry returns a daemon's own registry with the Go runtime, the process and the build in it.
func newRegistry(spec Spec) *Registry {
	v := version.Get()
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "sallyway_build_info",
		Help:        "Always 1; the labels say which build runs.",
		ConstLabels: prometheus.Labels{"daemon": spec.Name, "version": v.Version, "commit": v.Commit},
	})
	build.Set(1)
	r := &Registry{Registry: prometheus.NewRegistry(), known: make(map[string]MetricName)}
	r.MustRegister(build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// metricsHandler serves the daemon's health and /metrics.
func metricsHandler(h *Health, alive func() error, r prometheus.Gatherer, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	healthRoutes(mux, h, alive)
	mux.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{
		MaxRequestsInFlight: 4, Timeout: readTimeout,
		// What can be told is told: that the database is away is when it matters.
		ErrorHandling: promhttp.ContinueOnError, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}))
	return mux
}

// CheckHost lets only requests pass whose Host is an IP address, localhost or one of names (without port). A web page
// that rebinds its own name to this address is refused with 421, since the browser still sends that name.
func CheckHost(next http.Handler, names ...string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
		ok := strings.EqualFold(host, "localhost")
		if _, err := netip.ParseAddr(host); err == nil {
			ok = true
		}
		for _, n := range names {
			ok = ok || strings.EqualFold(host, n)
		}
		if !ok {
			http.Error(w, fmt.Sprintf("this server is not %q; use its IP address", host), http.StatusMisdirectedRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// httpServer returns a server with every limit set.
func httpServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           http.MaxBytesHandler(h, 1<<20),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
	}
}

// serve is Serve with a short grace: what is asked here is quick.
func serve(ctx context.Context, srv *http.Server, l net.Listener) error {
	return Serve(ctx, srv, l, stopTimeout)
}
