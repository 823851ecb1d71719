package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"sallyway/internal/telemetry"
)

// Options are the flags that every daemon's start command has.
type Options struct {
	State         string   // state folder
	LogLevel      string   // debug, info, warn, error
	LogFormat     string   // text, json
	MetricsListen string   // address of /livez, /readyz, /healthz and /metrics; empty is off
	MetricsHosts  []string // names besides IP addresses and localhost that these answer to
	Token         TokenFlags
	// OTLP is the URL of a collector of metrics and traces; empty is what the standard environment variables say, and off without them.
	OTLP string
	// TraceRatio of the traces that begin here is sampled, unless the environment says otherwise.
	TraceRatio float64

	cmd *cobra.Command // that has the flags
}

// Register adds the flags to a start command, with the defaults that spec implies. Fields that are set before are the
// defaults instead.
func (o *Options) Register(cmd *cobra.Command, spec Spec) {
	o.cmd = cmd
	f := cmd.Flags()
	if o.State == "" {
		o.State = DefaultStateDir(spec.stateName())
	}
	if o.LogLevel == "" {
		o.LogLevel = "info"
	}
	if o.LogFormat == "" {
		o.LogFormat = "text"
	}
	f.StringVar(&o.State, spec.stateFlag(), o.State, "state folder")
	f.StringVar(&o.LogLevel, "log-level", o.LogLevel, "debug, info, warn or error")
	f.StringVar(&o.LogFormat, "log-format", o.LogFormat, "text or json")
	f.StringVar(&o.MetricsListen, "metrics-listen", o.MetricsListen, "address of /livez, /readyz, /healthz and /metrics (empty: off)")
	f.StringSliceVar(&o.MetricsHosts, "metrics-host", o.MetricsHosts, "name under which metrics may be asked for, besides IP addresses and localhost")
	TelemetryFlags(f, &o.OTLP, &o.TraceRatio)
	if !spec.NoToken {
		o.Token.Register(f)
	}
}

// Shell is a running daemon's surroundings. The On… functions are set before Run and may be called concurrently while
// it runs.
type Shell struct {
	Log     *slog.Logger
	State   *State
	Metrics *Registry
	Health  Health

	// OnStatus returns the status document, encoded as JSON. Nil answers the readiness alone.
	OnStatus func(ctx context.Context) (any, error)
	// OnDoctor returns the checks that only the running daemon can make. Nil means none.
	OnDoctor func(ctx context.Context) []Check
	// OnDrain begins a drain and returns at once; the daemon ends by itself when it is drained. Nil: drains are refused.
	OnDrain func(ctx context.Context) error
	// OnDrainBy is OnDrain for daemons that are told how long the old work may take; it goes with DrainByCommand.
	OnDrainBy func(ctx context.Context, deadline time.Duration) error
	// Alive says whether the daemon still works; while it errs, systemd's watchdog gets no sign of life and /livez says no. It asks nobody else. Nil
	// means yes.
	Alive func() error

	spec      Spec
	opts      *Options
	telemetry *telemetry.Telemetry // nil when off
	mux       *http.ServeMux
	metrics   net.Listener // nil when off

	mu   sync.Mutex
	stop context.CancelCauseFunc // ends Run's body; nil outside Run; guarded by mu
}

// errDown is the cause of a context that POST /down ended.
var errDown = errors.New("asked to stop by `down`")

// Open prepares a daemon: log, state folder with its lock, metrics listener. It starts nothing. The log goes to w,
// standard error in a real program. Errors are for the user, with exit codes.
func Open(spec Spec, opts *Options, w io.Writer) (*Shell, error) {
	if os.Getenv("SSLKEYLOGFILE") != "" && !keyLogAllowed {
		return nil, Usagef("SSLKEYLOGFILE is set: it asks for the keys of every connection to be written to a file, which this program refuses\nunset SSLKEYLOGFILE")
	}
	log, err := NewLogger(w, opts.LogLevel, opts.LogFormat)
	if err != nil {
		return nil, err
	}
	if opts.cmd != nil {
		warnUnknown(log, opts.cmd, os.Environ())
	}
	registry := newRegistry(spec)
	tele, err := openTelemetry(spec.program(), opts.OTLP, opts.TraceRatio, registry, log)
	if err != nil {
		return nil, err
	}
	state, err := OpenState(opts.State, spec.Name, spec.stateFlag())
	if err != nil {
		return nil, err
	}
	s := &Shell{Log: log, State: state, Metrics: registry, spec: spec, opts: opts, telemetry: tele, mux: http.NewServeMux()}
	if opts.MetricsListen != "" {
		if s.metrics, err = net.Listen("tcp", opts.MetricsListen); err != nil {
			return nil, errors.Join(Usagef("metrics: %w\nname a free address with --metrics-listen, or turn it off with --metrics-listen=", err), state.Close())
		}
	}
	s.routes()
	return s, nil
}

// Handle adds a handler to the control socket, as http.ServeMux does. It is called before Run. A handler that answers
// for longer than writeTimeout moves its deadline with http.ResponseController.
func (s *Shell) Handle(pattern string, h http.Handler) { s.mux.Handle(pattern, h) }

// Tracer makes the daemon's spans; it is nil, which makes none, where no collector is configured.
func (s *Shell) Tracer() *telemetry.Tracer { return s.telemetry.Tracer() }

// MetricsAddr returns where metrics are served, nil when off.
func (s *Shell) MetricsAddr() net.Addr {
	if s.metrics == nil {
		return nil
	}
	return s.metrics.Addr()
}

func (s *Shell) routes() {
	s.mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		if s.OnStatus == nil {
			writeJSON(w, http.StatusOK, s.Health.Readiness())
			return
		}
		doc, err := s.OnStatus(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		writeJSON(w, http.StatusOK, doc)
	})
	s.mux.HandleFunc("GET /doctor", func(w http.ResponseWriter, r *http.Request) {
		checks := []Check{}
		if s.OnDoctor != nil {
			checks = append(checks, s.OnDoctor(r.Context())...)
		}
		writeJSON(w, http.StatusOK, checks)
	})
	healthRoutes(s.mux, &s.Health, s.alive)
	s.mux.HandleFunc("GET /metrics/names", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, http.StatusOK, s.Metrics.Names()) })
	s.mux.HandleFunc("POST /down", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusAccepted, struct {
			PID int `json:"pid"`
		}{os.Getpid()})
		s.shutDown(errDown)
	})
	s.mux.HandleFunc("POST /drain", func(w http.ResponseWriter, r *http.Request) {
		if s.OnDrain == nil && s.OnDrainBy == nil {
			http.Error(w, s.spec.Name+" cannot be drained; stop it with `down`", http.StatusNotImplemented)
			return
		}
		if err := s.drain(r); err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		w.WriteHeader(http.StatusAccepted)
	})
}

// drain begins a drain as the request asks.
func (s *Shell) drain(r *http.Request) error {
	if s.OnDrainBy == nil {
		return s.OnDrain(r.Context())
	}
	d, err := time.ParseDuration(r.URL.Query().Get("deadline"))
	if err != nil || d < 0 {
		return fmt.Errorf("deadline %.40q is no duration", r.URL.Query().Get("deadline"))
	}
	return s.OnDrainBy(r.Context(), d)
}

func (s *Shell) shutDown(cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stop != nil {
		s.stop(cause)
	}
}

// Run serves the control socket and the metrics around body, and returns when body and they have ended. The context
// of body ends with ctx (a signal) or by `down`; a body that then returns nil or the context's error has stopped well,
// and Run returns nil.
func (s *Shell) Run(ctx context.Context, body func(ctx context.Context) error) error {
	control, err := listenControl(s.State, s.Log)
	if err != nil {
		return err
	}
	bodyCtx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	s.mu.Lock()
	s.stop = stop
	s.mu.Unlock()

	// The servers outlive the stop of body, so that status is answered during a drain.
	servers, stopServers := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServers()
	var g errgroup.Group
	server := func(name string, h http.Handler, l net.Listener) {
		g.Go(func() error {
			if err := serve(servers, httpServer(h), l); err != nil {
				err = fmt.Errorf("%s: %w", name, err)
				stop(err)
				return err
			}
			return nil
		})
	}
	server("control socket", s.mux, control)
	if s.metrics != nil {
		s.Log.Info("metrics", "listen", s.metrics.Addr().String())
		names := s.opts.MetricsHosts
		server("metrics", CheckHost(metricsHandler(&s.Health, s.alive, s.Metrics, s.Log), names...), s.metrics)
	}
	g.Go(func() error { return s.telemetry.Run(servers) })
	g.Go(func() error { s.watchdog(servers); return nil })
	g.Go(func() error {
		select {
		case <-bodyCtx.Done():
			s.Log.Info("stopping", "cause", context.Cause(bodyCtx))
		case <-servers.Done(): // body ended by itself
		}
		s.Health.setStarted(false)
		s.notify(sd.SdNotifyStopping)
		return nil
	})

	err = body(bodyCtx)
	if bodyCtx.Err() != nil && errors.Is(err, context.Canceled) {
		err = nil
	}
	stopServers()
	return errors.Join(err, g.Wait())
}

// Ready says that the daemon does its work: to /readyz, and to systemd with status as a line for people.
func (s *Shell) Ready(status string) {
	s.Health.setStarted(true)
	s.notify(sd.SdNotifyReady + "\nSTATUS=" + status)
}

// Status tells systemd in one line for people what the daemon is doing.
func (s *Shell) Status(text string) { s.notify("STATUS=" + text) }

// Close gives back what Open took. It is idempotent; Run must have returned.
func (s *Shell) Close() error {
	var err error
	if s.metrics != nil {
		if err = s.metrics.Close(); errors.Is(err, net.ErrClosed) {
			err = nil
		}
	}
	return errors.Join(err, s.State.Close())
}

// notify tells systemd. Without systemd it does nothing.
func (s *Shell) notify(state string) {
	if _, err := sd.SdNotify(false, state); err != nil {
		s.Log.Warn("systemd cannot be told", "error", err)
	}
}

// alive says whether the daemon still works.
func (s *Shell) alive() error {
	if s.Alive == nil {
		return nil
	}
	return s.Alive()
}

// watchdog gives systemd a sign of life at half the interval that it asks for.
func (s *Shell) watchdog(ctx context.Context) {
	interval, err := sd.SdWatchdogEnabled(false)
	if err != nil {
		s.Log.Warn("watchdog of systemd", "error", err)
	}
	if interval == 0 {
		return
	}
	t := time.NewTicker(interval / 2)
	defer t.Stop()
	for {
		if err := s.alive(); err == nil {
			s.notify(sd.SdNotifyWatchdog)
		} else {
			s.Log.Error("the watchdog gets no sign of life", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}
